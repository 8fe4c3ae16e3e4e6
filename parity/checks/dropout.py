"""Dropout: with masks given from outside both twins are one function; left to itself each draws the masks it promises.

Masks cannot be compared between two generators. So they are taken out of the way first: modules that multiply by a
given mask stand in the places of the twins' own, and forward and gradients are judged in noise units. Then each twin
draws for itself, what its dropout modules were given and gave is looked at, and statistics decide, all at one overall
error level, parity.statistics.ALPHA.

Shapes: B batch, T time, D model, K key/value heads, G query heads per key/value head.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

from parity import statistics as st
from parity.checks import Progress, Scope
from parity.result import CheckResult, Control, Row
from parity.verdict import Noise, Verdict
from parity.verdict import measure as measure_distance

__all__ = [
    "BLIND",
    "CLAIM",
    "CONTROLS",
    "LENGTHS",
    "PRECISIONS",
    "RATE",
    "Draws",
    "Measured",
    "Small",
    "Topic",
    "all_kept",
    "batch",
    "measure",
    "run",
    "small",
    "undropped",
]

CLAIM = (
    "With the same masks both twins compute the same logits, loss and gradients through every place that drops "
    "(attention probabilities, both residual branches), and with everything kept the same as in evaluation. Each "
    "twin's own masks have the rate that was asked for, scale what they keep by exactly 1 / (1 - rate), and are "
    "independent between positions, channels, heads, rows, places, layers and steps; evaluation drops nothing, and at "
    "rate 0 a model draws nothing and holds nothing to draw from."
)
BLIND = (
    "Deviations of a rate below those printed (`smallest seen`); dependence between unequal places of two rows, "
    "heads, layers or steps (equal places are compared, such as overlapping counters would leave alone), or one that "
    "leaves every pair uncorrelated; rates other than the two used; generators other than the frameworks' defaults; a "
    "JAX training loop that does not carry dropout's state from step to step (here it is carried); more than one layer "
    "with given masks; --precision float64 leaves each twin's own masks out (they are drawn in float32)."
)
CONTROLS = {
    "no scaling": "what is kept is not multiplied by 1 / (1 - rate)",
    "mask inverted": "dropped where it should be kept",
    "rate x 0.9": "nine tenths of the rate",
    "one mask for all layers": "every layer drops what the first one drops",
    "one mask for all steps": "every step drops what the first one drops (flax#5529)",
    "on in evaluation": "evaluation drops as training does (nanoGPT#240)",
}
PRECISIONS = ("float64", "float32")
GIVEN_RATE = 0.25
"""Of the given masks: 1 / (1 - rate) is not a power of two, so that a scale rounded elsewhere would show."""
RATE = 0.75
"""Of the twins' own masks: scaling is then exact in any order of operations, and kept is far from dropped."""
STEPS = 32
SEED = 20
SEED_STEPS = 2

_SMALL: dict[str, dict[str, Any]] = {
    "small mha-swiglu": {"vocab_size": 23, "n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 20},
    "small gqa-moe": {
        "vocab_size": 23, "n_layers": 1, "d_model": 16, "n_heads": 4, "d_ff": 12, "use_gqa": True, "kv_groups": 2,
        "use_swiglu": False, "use_moe": True, "num_experts": 2, "num_experts_per_tok": 2,
    },
}  # fmt: skip
LENGTHS = (7, 5, 2, 0, 3, 7)
"""Tokens in each row of the batch, padded on the right; the row without any is masked throughout."""
_OWN: dict[str, Any] = {
    "vocab_size": 29, "n_layers": 2, "d_model": 16, "n_heads": 4, "d_ff": 12, "dropout": RATE, "use_gqa": True,
    "kv_groups": 2, "use_swiglu": False,
}  # fmt: skip
_OWN_BATCH = (8, 12)


def run(scope: Scope, progress: Progress) -> CheckResult:
    """Judge the given masks in float64 and float32, then each twin's own masks."""
    from parity.checks._steps import merge

    started = time.perf_counter()
    result = CheckResult("dropout")
    precisions = [p for p in PRECISIONS if p in scope.precisions]
    for done, name in enumerate(_SMALL):
        progress(done, len(_SMALL) + 1, name)
        # Experts and dropout do not meet: meaning, in float64, says it all; float32 for those who have the time.
        few = precisions if name == next(iter(_SMALL)) or scope.full else precisions[:1]
        _given_masks(scope, name, few, result)
    if precisions:
        result.rows += _no_state()
    progress(len(_SMALL), len(_SMALL) + 1, "own masks")
    if "float32" in precisions:
        drawn = {}
        for side, draw in (("jax", _draw_jax), ("torch", _draw_torch)):
            verdict, words = Verdict.AGREE, "every place"
            try:
                drawn[side] = draw(scope)
            except _NoPlace as error:
                verdict, words = Verdict.DIFFER, str(error)
            name = f"places that drop ({side})"
            result.rows.append(Row("dropout", "", "own masks", "float32", name, verdict, words, device=scope.device))
        measured = measure(drawn)
        result.rows += [found.row(scope.device) for found in measured]
        tests = sum(len(found.outcomes) for found in measured)
        if scope.controls and len(drawn) == 2:
            result.controls += _own_controls(drawn, st.share(tests))
        result.notes.append(
            f"{tests} tests of own masks at an overall error level of {st.ALPHA:g} (each {st.share(tests):.1g}, "
            f"Bonferroni); smallest deviations are those seen with probability {st.POWER:g}; rate {RATE:g}, "
            f"{STEPS} steps, seed {scope.seed}"
        )
    if not precisions:
        result.error = f"dropout looks at {' and '.join(PRECISIONS)} only; ask for one of them with --precision"
    result.controls = merge(result.controls)
    result.seconds = time.perf_counter() - started
    progress(len(_SMALL) + 1, len(_SMALL) + 1, "")
    return result


# ------------------------------------------------------------------------------------------------ given masks


@dataclass(frozen=True)
class Small:
    """A pair of small models whose masks are inputs, made ready; and the torch model as it is when it evaluates."""

    name: str
    config: Any
    weights: Mapping[str, np.ndarray]
    judge: Any
    evaluation: Any


@lru_cache(maxsize=4)
def small(name: str, scope: Scope) -> Small:
    """The pair (tokens, targets, attention_mask, *masks) -> logits, loss and gradients; masks as `_shapes` lists them.

    Nothing in the twins is switched: their `drop` modules are replaced. The torch model is in training mode, so that
    its attention is written out.
    """
    from flax import nnx

    import omni_jax.losses
    import omni_jax.thinker
    import omni_torch.losses
    import omni_torch.thinker
    from omni_torch.config import ThinkerConfig
    from parity.fixtures import random_weights
    from parity.judge import Judge
    from parity.pair import pair_of
    from parity.precision import resolve_device

    config = ThinkerConfig(**_SMALL[name], dropout=GIVEN_RATE)
    module = omni_torch.thinker.ThinkerLM.from_config(config).train()
    evaluation = omni_torch.thinker.ThinkerLM.from_config(config).eval()
    abstract = nnx.eval_shape(lambda: omni_jax.thinker.ThinkerLM(**config.to_dict(), rngs=nnx.Rngs(0)))
    graphdef, template, rest = nnx.split(abstract, nnx.Param, ...)
    given = _given_module()
    blocks: Any = module.blocks
    for block in blocks:
        block.attn.drop, block.drop = given(), given()

    def forward(params, tokens, targets, mask, *masks):
        net = nnx.merge(graphdef, params, rest)
        blocks: Any = net.blocks
        for i, block in enumerate(blocks):
            block.attn.drop = _multiply(masks[3 * i : 3 * i + 1])
            block.drop = _multiply(masks[3 * i + 1 : 3 * i + 3])
        return {"logits": net(tokens, attention_mask=mask)}

    def torch_forward(net, tokens, targets, mask, *masks):
        for i, block in enumerate(net.blocks):
            block.attn.drop.masks = list(masks[3 * i : 3 * i + 1])
            block.drop.masks = list(masks[3 * i + 1 : 3 * i + 3])
        return {"logits": net(tokens, attention_mask=mask)}

    def torch_evaluation(net, tokens, targets, mask, *masks):
        return {"logits": net(tokens, attention_mask=mask)}

    loss = (
        lambda out, tokens, targets, *_: omni_jax.losses.cross_entropy(out["logits"], targets),
        lambda out, tokens, targets, *_: omni_torch.losses.cross_entropy(out["logits"], targets),
    )
    pair = pair_of(forward, module, template, loss=loss, torch_call=torch_forward, name=name)
    pair.hasty = True
    plain = pair_of(forward, evaluation, template, loss=loss, torch_call=torch_evaluation, name=name)
    devices = resolve_device(scope.device)
    judge = Judge(pair, draws=scope.draws, seed=scope.seed, devices=devices, device=scope.device)
    return Small(name, config, random_weights(config, scope.seed), judge, plain)


def _multiply(masks: Sequence[Any]) -> Callable[[Any], Any]:
    """What stands in nnx.Dropout's place: each call multiplies by the next mask."""
    left = list(masks)
    return lambda x: x * left.pop(0)


def _given_module() -> Any:  # a class made on demand: its base lives in torch
    from torch import nn

    class Given(nn.Module):
        """What stands in nn.Dropout's place: each call multiplies by the next mask."""

        p = GIVEN_RATE
        masks: list[Any]

        def forward(self, x: Any) -> Any:
            return x * self.masks.pop(0)

    return Given


def batch(config: Any, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, targets, attention_mask), each (B, T), with rows of LENGTHS."""
    mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    tokens = np.random.default_rng([seed, 41]).integers(3, config.vocab_size, mask.shape)
    tokens = np.where(mask, tokens, 0).astype(np.int32)
    targets = np.zeros_like(tokens)
    targets[:, :-1] = tokens[:, 1:]
    return tokens, targets, mask


def _shapes(config: Any, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Of the masks in the order of the calls: per layer (B, K, G, T, T), (B, T, D), (B, T, D)."""
    (B, T), K = shape, config.kv_groups if config.use_gqa else config.n_heads
    return [(B, K, config.n_heads // K, T, T), (B, T, config.d_model), (B, T, config.d_model)] * config.n_layers


def all_kept(config: Any, tokens: np.ndarray) -> list[np.ndarray]:
    """Masks that drop nothing, at rate 0, for a batch of tokens (B, T)."""
    return [np.ones(shape) for shape in _shapes(config, tokens.shape)]


@lru_cache(maxsize=8)
def undropped(name: str, scope: Scope, precision: str) -> Any:
    """What the judge finds where everything is kept: the findings of this check, and of accumulation's big batch."""
    made = small(name, scope)
    inputs = batch(made.config, scope.seed)
    return made.judge(made.weights, (*inputs, *all_kept(made.config, inputs[0])), precision)


def _keeps(config: Any, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng([seed, 43])
    return [rng.random(shape) >= GIVEN_RATE for shape in _shapes(config, (len(LENGTHS), max(LENGTHS)))]


def _masks(keeps: Sequence[np.ndarray], rate: float = GIVEN_RATE) -> list[np.ndarray]:
    return [keep / (1.0 - rate) for keep in keeps]


def _given_masks(scope: Scope, name: str, precisions: Sequence[str], result: CheckResult) -> None:
    if not precisions:
        return
    made = small(name, scope)
    inputs, keeps, dropped = batch(made.config, scope.seed), _keeps(made.config, scope.seed), {}
    # By regime, so that both precisions share their draws.
    for precision in precisions:
        dropped[precision] = made.judge(made.weights, (*inputs, *_masks(keeps)), precision)
        result.rows += dropped[precision].rows("dropout", name, f"rate {GIVEN_RATE:g}")
        if scope.controls:
            result.controls += _given_controls(made, dropped[precision], inputs, keeps)
    for precision in precisions:
        whole = undropped(name, scope, precision)
        result.rows += whole.rows("dropout", name, "all kept")
        result.rows += _as_in_evaluation(made, whole, inputs)
        if precision == "float64":
            result.rows.append(_additive(made, dropped[precision], whole, inputs, keeps))


def _no_state() -> list[Row]:
    """At rate 0 a model in training has no stream of random numbers: JAX holds parameters alone, torch draws none."""
    import torch
    from flax import nnx

    from omni_jax.thinker import ThinkerLM as JaxLM
    from omni_torch.thinker import ThinkerLM

    config = {**next(iter(_SMALL.values())), "dropout": 0.0}
    _, _, rest = nnx.split(nnx.eval_shape(lambda: JaxLM(**config, rngs=nnx.Rngs(0))), nnx.Param, ...)
    held = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(rest)]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        module = ThinkerLM(**config).train()
        before = torch.get_rng_state()
        module(torch.ones(1, 3, dtype=torch.long))
        drew = not torch.equal(before, torch.get_rng_state())
    found = {"jax": f"holds {', '.join(held)}" if held else "", "torch": "draws" if drew else ""}
    return [
        Row(
            "dropout", "small mha-swiglu", "rate 0", "", f"no random state ({side})",
            Verdict.DIFFER if wrong else Verdict.AGREE, wrong or "parameters alone",
        )
        for side, wrong in found.items()
    ]  # fmt: skip


def _as_in_evaluation(made: Small, whole: Any, inputs: Any) -> list[Row]:
    """Training with everything kept against the path of evaluation (torch: its fused attention)."""
    from parity.precision import unit_roundoff
    from parity.result import row_from_judgement
    from parity.sides import TorchSide
    from parity.verdict import judge_tensor

    unit, wide = unit_roundoff(whole.precision), whole.precision == "float64"
    device = "cpu" if wide else made.judge.far[1].device
    outputs, _ = TorchSide(made.evaluation, device)(made.weights, inputs, whole.precision)
    rows = []
    for name, value in outputs.items():
        ours, _, reference, noise = whole.values[name]
        judgement = judge_tensor(ours, value, reference, noise, unit, noisy_reference=wide)
        rows.append(
            row_from_judgement(
                judgement, check="dropout", config=made.name, regime="all kept", precision=whole.precision,
                name=f"{name}, torch in evaluation", device=whole.device, shape=value.shape,
            )
        )  # fmt: skip
    return rows


def _additive(made: Small, dropped: Any, whole: Any, inputs: Any, keeps: Any) -> Row:
    """Attention is additive in its mask: what one mask and its complement give is what everything kept gives.

    So it is if the mask multiplies probabilities that stay as they are; not if they are renormalised, and not if the
    mask came before the softmax.
    """
    from parity.precision import unit_roundoff
    from parity.result import row_from_judgement
    from parity.verdict import judge_tensor

    tap = "blocks.0.attn"
    rest = [~keeps[0], *keeps[1:]]
    sides = [side(made.weights, (*inputs, *_masks(rest)), "float64")[1][tap] for side in made.judge.cpu]
    ours, theirs, _, noise_dropped = dropped.values[f"tap {tap}"]
    _, _, reference, noise = whole.values[f"tap {tap}"]
    left = 1.0 - GIVEN_RATE
    # Both summands err, and the reference does.
    noise = Noise(np.hypot(noise.sigma, left * noise_dropped.sigma), noise.dof, noise.kappa)
    judgement = judge_tensor(
        left * (ours + sides[0]), left * (theirs + sides[1]), reference, noise, unit_roundoff("float64"),
        noisy_reference=True,
    )  # fmt: skip
    return row_from_judgement(
        judgement, check="dropout", config=made.name, regime="a mask and its complement", precision="float64",
        name="attention, not renormalised", shape=reference.shape,
    )  # fmt: skip


def _given_controls(made: Small, findings: Any, inputs: Any, keeps: Any) -> list[Control]:
    """Wrong masks on the torch side: rejected on every determined output."""
    from parity.checks._steps import rejection
    from parity.precision import unit_roundoff

    wide, unit = findings.precision == "float64", unit_roundoff(findings.precision)
    side = (made.judge.cpu if wide else made.judge.far)[1]
    wrongs = {
        "no scaling": _masks(keeps, 0.0),
        "mask inverted": _masks([~keep for keep in keeps]),
        "rate x 0.9": _masks(keeps, 0.9 * GIVEN_RATE),
    }
    controls = []
    for control, masks in wrongs.items():
        outputs, _ = side(made.weights, (*inputs, *masks), findings.precision)
        live = {k: outputs[k] for k, v in findings.outputs.items() if v.verdict is not Verdict.UNDETERMINED}
        where = f"{made.name}, {findings.precision}"
        controls.append(rejection(control, where, live, findings.values, unit, noisy_reference=wide))
    return controls


# ------------------------------------------------------------------------------------------------ own masks


@dataclass(frozen=True)
class Draws:
    """What one twin's dropout modules were given and gave; places by name, in the order of the calls.

    given, gave: (STEPS, *shape) of training. again, other: `gave` of SEED_STEPS steps with the same seed and with
    another one. evaluation: what is wrong with it, in words; empty when it drops nothing.
    """

    given: Mapping[str, np.ndarray]
    gave: Mapping[str, np.ndarray]
    again: Mapping[str, np.ndarray]
    other: Mapping[str, np.ndarray]
    evaluation: str


@dataclass(frozen=True)
class Topic:
    """One row: a claim about one side's own masks, with the tests that decide it, or what was wrong with it."""

    name: str
    side: str
    tests: tuple[Callable[[float], st.Outcome], ...] = ()
    wrong: str = ""
    fine: str = ""
    """What is said when nothing was wrong and nothing is left to chance."""

    def measure(self, level: float) -> Measured:
        return Measured(self, tuple(test(level) for test in self.tests))


@dataclass(frozen=True)
class Measured:
    """A topic with the outcomes of its tests."""

    topic: Topic
    outcomes: tuple[st.Outcome, ...]

    @property
    def rejected(self) -> bool:
        return bool(self.topic.wrong) or any(outcome.rejected for outcome in self.outcomes)

    def row(self, device: str) -> Row:
        topic, excess, smallest = self.topic, None, None
        words = topic.wrong or topic.fine
        if self.outcomes:
            worst = min(self.outcomes, key=lambda o: o.p)
            excess = abs(math.log(max(worst.p, 1e-300)) / math.log(worst.level))
            kinds = {o.unit: max(x.smallest for x in self.outcomes if x.unit == o.unit) for o in self.outcomes}
            smallest = kinds[worst.unit]
            words = f"{len(self.outcomes)} tests, worst {_words(worst)}; smallest seen: "
            words += ", ".join(f"{unit} {size:.2g}" for unit, size in kinds.items())
        return Row(
            "dropout", "", "own masks", "float32", f"{topic.name} ({topic.side})",
            Verdict.DIFFER if self.rejected else Verdict.AGREE, words, device=device, excess=excess,
            smallest_seen=smallest,
        )  # fmt: skip


def _words(o: st.Outcome) -> str:
    interval = "" if o.interval is None else f" in [{o.interval[0]:.4g}, {o.interval[1]:.4g}]"
    return f"{o.test} {o.estimate:.4g}{interval}, expected {o.expected:.4g}, p = {o.p:.2g} of {o.n} draws"


def measure(drawn: Mapping[str, Draws]) -> list[Measured]:
    """Every topic of every side. Correct twins have one that is `rejected` with probability ALPHA at most."""
    topics = [topic for side, draws in drawn.items() for topic in _topics(side, draws)]
    level = st.share(sum(len(topic.tests) for topic in topics))
    return [topic.measure(level) for topic in topics]


def _topics(side: str, draws: Draws) -> Iterator[Topic]:
    kept = {name: _kept(name, gave) for name, gave in draws.gave.items()}
    for name, mask in kept.items():
        yield Topic(f"rate, {name}", side, (partial(_rate_test, mask),))
    yield Topic("scale of what is kept", side, wrong=_scale(draws), fine=f"exactly {1 / (1 - RATE):g} times the input")
    axes: dict[str, list[Callable[[float], st.Outcome]]] = {}
    for name, mask in kept.items():
        for axis, what in enumerate(_axes(name)):
            slices, words = np.moveaxis(mask, axis, 0), f"{what}s of {name}"
            axes.setdefault(what, []).extend(partial(test, slices, words) for test in (_even_test, _pairs_test))
    for what, tests in axes.items():
        yield Topic(f"independence between {what}s", side, tuple(tests))
    places = partial(_pairs_test, _same_size(kept), "places")
    yield Topic("independence between places and layers", side, (places,))
    first, again, other = (
        np.concatenate([_kept(name, gave[:SEED_STEPS]).reshape(-1) for name, gave in those.items()])
        for those in (draws.gave, draws.again, draws.other)
    )
    wrong = "" if np.array_equal(first, again) else f"{np.sum(first != again)} of {first.size} masks differ"
    yield Topic("the same seed, the same masks", side, wrong=wrong, fine=f"{first.size} masks drawn again")
    seeds = partial(_pairs_test, np.stack([first, other]), "seeds")
    yield Topic("another seed, other masks", side, (seeds,))
    yield Topic("evaluation drops nothing", side, wrong=draws.evaluation, fine="every place gives what it was given")
    yield Topic("attention drops probabilities", side, wrong=_probabilities(draws), fine="rows sum to 1 before")


def _axes(name: str) -> tuple[str, ...]:
    return ("step", "row", "head", "position") if "attention" in name else ("step", "row", "position", "channel")


def _kept(name: str, gave: np.ndarray) -> np.ndarray:
    """(S, B, H, P) or (S, B, T, D) bools; of attention only the pairs of positions that may see each other."""
    if "attention" not in name:
        return gave != 0
    S, B, K, G, T, _ = gave.shape
    return (gave != 0).reshape(S, B, K * G, T, T)[..., *np.tril_indices(T)]


def _same_size(kept: Mapping[str, np.ndarray]) -> np.ndarray:
    """(places, draws): of every step as many as the smallest place draws, from the front, where one key would show."""
    size = min(mask[0].size for mask in kept.values())
    return np.stack([mask.reshape(len(mask), -1)[:, :size].reshape(-1) for mask in kept.values()])


def _scale(draws: Draws) -> str:
    """What is neither dropped nor scaled by exactly 1 / (1 - RATE), a power of two, in words."""
    wrong = {}
    for name, gave in draws.gave.items():
        off = (gave != 0) & (gave != draws.given[name] / np.float32(1.0 - RATE))
        if off.any():
            factor = gave[off][0] / draws.given[name][off][0]
            wrong[name] = f"{name}: {off.sum()} of {np.sum(gave != 0)} kept values, the first by {factor:.6g}"
    return "; ".join(wrong.values())


_KNOWN = 1 << 20
"""Degrees of freedom of a sigma that is not estimated."""


def _probabilities(draws: Draws) -> str:
    from parity.precision import unit_roundoff

    for name, given in draws.given.items():
        if "attention" not in name:
            continue
        T = given.shape[-1]
        future = ~np.tri(T, dtype=bool)
        if given[..., future].any() or draws.gave[name][..., future].any():
            return f"{name}: a position sees its future"
        off = np.asarray(np.sum(given, axis=-1, dtype=np.float64) - 1.0)
        # A float32 softmax adds T exponentials and divides by the total: √T roundings and the quotient's.
        sigma = np.full(off.shape, unit_roundoff("float32") * (1 + math.sqrt(T)))
        if not (given >= 0).all() or not measure_distance(off, sigma, _KNOWN).within:
            worst = float(np.abs(off).max())
            return f"{name}: rows of what is dropped from sum to 1 ± {worst:.2g}, not to 1: these are no probabilities"
    return ""


# ------------------------------------------------------------------------------------------------ exact tests


def _rate_test(mask: np.ndarray, level: float) -> st.Outcome:
    """Exact binomial test of how many were dropped; the interval is Clopper and Pearson's."""
    from scipy.special import bdtr, bdtrc, betaincinv

    n, dropped = mask.size, int(mask.size - mask.sum())
    above = float(bdtrc(dropped - 1, n, RATE)) if dropped else 1.0
    p = min(1.0, 2.0 * min(float(bdtr(dropped, n, RATE)), above))
    low = float(betaincinv(dropped, n - dropped + 1, level / 2)) if dropped else 0.0
    high = 1.0 - float(betaincinv(n - dropped, dropped + 1, level / 2)) if dropped < n else 1.0
    smallest = _reach(level) * math.sqrt(RATE * (1.0 - RATE) / n)
    return st.Outcome("rate", n, dropped / n, RATE, (low, high), p, level, smallest, "shift of the rate")


def _even_test(mask: np.ndarray, what: str, level: float) -> st.Outcome:
    """χ² over the slices of the first axis: is the rate the same in each? Variance matched, as the counts are binomial.

    Deviations as the RMS over the slices of (their rate - RATE), in standard deviations of one draw.
    """
    from scipy.special import chdtrc, chdtri, chndtrinc

    cells, n = len(mask), mask[0].size
    spread = RATE * (1.0 - RATE)
    counts = mask.reshape(cells, n).sum(axis=1)
    statistic = float(np.sum(np.square(counts - n * (1.0 - RATE))) / (n * spread))
    freedom = 2.0 * cells / (2.0 + (1.0 / spread - 6.0) / n)
    statistic *= freedom / cells
    p = float(chdtrc(freedom, statistic))
    shift = float(chndtrinc(float(chdtri(freedom, level)), freedom, 1.0 - st.POWER))
    estimate = math.sqrt(statistic / mask.size)
    smallest = math.sqrt(shift / mask.size)
    return st.Outcome(f"spread over {what}", mask.size, estimate, 0.0, None, p, level, smallest, "spread of rates/std")


def _pairs_test(mask: np.ndarray, what: str, level: float) -> st.Outcome:
    """The largest correlation between any two slices of the first axis.

    For two slices with given numbers of kept ones, how many are kept in both is hypergeometric: an exact test, made
    for the pair that is most and the pair that is least alike; p is the smaller one's, times the number of tests.
    """
    cells = len(mask)
    x = mask.reshape(cells, -1).astype(np.float32)  # whole numbers below 2²⁴: exact
    n, counts = x.shape[1], x.sum(axis=1).astype(np.float64)
    tests = cells * (cells - 1)  # two ends for each pair
    smallest = _reach(level / tests) / math.sqrt(n)
    spread = np.sqrt(counts * (n - counts))
    if not spread.all():
        return st.Outcome(f"correlation of {what}", n, math.nan, 0.0, None, 0.0, level, smallest, "correlation")
    both = (x @ x.T).astype(np.float64)
    r = (n * both - np.outer(counts, counts)) / np.outer(spread, spread)
    upper = np.triu_indices(cells, 1)
    found = []
    for pick in (np.argmax, np.argmin):
        at = int(pick(r[upper]))
        i, j = int(upper[0][at]), int(upper[1][at])
        p = _hypergeometric(int(both[i, j]), int(counts[i]), int(counts[j]), n, upper=pick is np.argmax)
        found.append((p, float(r[i, j]), f"correlation of {what} {i} × {j}"))
    p, estimate, name = min(found)
    half = _quantile(level / tests) / math.sqrt(n)
    interval = (estimate - half, estimate + half)
    return st.Outcome(name, n, estimate, 0.0, interval, min(1.0, p * tests), level, smallest, "correlation")


def _hypergeometric(both: int, first: int, second: int, n: int, *, upper: bool) -> float:
    """P(X ≥ both), or P(X ≤ both), for two independent subsets of n of these sizes."""
    from scipy.special import gammaln

    k = np.arange(max(0, first + second - n), min(first, second) + 1)

    def choose(a: Any, b: Any) -> Any:
        return gammaln(a + 1.0) - gammaln(b + 1.0) - gammaln(a - b + 1.0)

    logs = choose(first, k) + choose(n - first, second - k) - choose(n, second)
    return min(1.0, float(np.exp(logs[k >= both] if upper else logs[k <= both]).sum()))


def _quantile(level: float) -> float:
    from scipy.special import ndtri

    return -float(ndtri(level / 2.0))


def _reach(level: float) -> float:
    """The shift of a z-statistic that is rejected with probability POWER."""
    from scipy.special import ndtri

    return _quantile(level) + float(ndtri(st.POWER))


# ------------------------------------------------------------------------------------------------ drawing


def _places(n_layers: int) -> list[str]:
    """The places that drop, in the order of the calls."""
    return [f"blocks.{i} {place}" for i in range(n_layers) for place in ("attention", "first branch", "second branch")]


def _own_tokens(seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 47]).integers(3, _OWN["vocab_size"], _OWN_BATCH).astype(np.int32)


def _draw_torch(scope: Scope) -> Draws:
    """ThinkerLM in training mode, its dropout modules watched by forward hooks; torch's default generator."""
    import torch

    from omni_torch.thinker import ThinkerLM
    from parity.precision import resolve_device

    device = torch.device(resolve_device(scope.device)[1])
    names = _places(_OWN["n_layers"])
    seen: list[tuple[Any, Any]] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(SEED)
        model = ThinkerLM(**_OWN).to(device)
        tokens = torch.from_numpy(_own_tokens(scope.seed).astype(np.int64)).to(device)
        blocks: Any = model.blocks
        for block in blocks:
            # What comes from a position whose every key was dropped is zero, and tells nothing about the next mask.
            block.drop.register_forward_pre_hook(lambda module, args: args[0].where(args[0] != 0, 1.0))
            for drop in (block.attn.drop, block.drop):
                drop.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))

        def draw(seed: int, steps: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
            torch.manual_seed(seed)
            rows = []
            for _ in range(steps):
                seen.clear()
                model(tokens)
                rows.append([(x.cpu().numpy(), y.cpu().numpy()) for x, y in seen])
            return _by_place(names, rows)

        model.train()
        given, gave = draw(scope.seed, STEPS)
        again, other = draw(scope.seed, SEED_STEPS)[1], draw(scope.seed + 1, SEED_STEPS)[1]
        model.eval()
        outputs = []
        for seed in (scope.seed, scope.seed + 1):
            torch.manual_seed(seed)
            seen.clear()
            outputs.append(model(tokens))
        changed = sum(not torch.equal(x, y) for x, y in seen)
        wrong = f"{changed} of {len(seen)} places changed what they were given" if changed else ""
        if not torch.equal(*outputs):
            wrong = f"{wrong or 'the logits'} and depend on the seed"
    return Draws(given, gave, again, other, wrong)


def _draw_jax(scope: Scope) -> Draws:
    """ThinkerLM in training mode, its dropout modules watched; one compiled step, dropout's state carried."""
    import jax
    from flax import nnx

    from omni_jax.config import ThinkerConfig
    from omni_jax.thinker import ThinkerLM
    from parity.precision import resolve_device
    from parity.sides import compiled, compiler_options

    device = resolve_device(scope.device)[0] or jax.devices("cpu")[0]
    names = _places(_OWN["n_layers"])
    tokens = _own_tokens(scope.seed)

    def watched(net: Any, tokens: Any) -> list[tuple[Any, Any]]:
        """The model's own dropout modules, called by watchers that stand in their places for the time of one call."""
        seen: list[tuple[Any, Any]] = []
        own = [(part, part.drop) for block in net.blocks for part in (block.attn, block)]
        for part, drop in own:
            part.drop = _watch(drop, seen, nothing=0.0 if hasattr(part, "head_dim") else 1.0)
        net(tokens)
        for part, drop in own:
            part.drop = drop
        return seen

    def split(seed: int) -> tuple[Any, ...]:
        return nnx.split(ThinkerLM.from_config(ThinkerConfig(**_OWN), rngs=nnx.Rngs(seed)), nnx.Param, ...)

    with jax.default_device(device):
        graphdef, params, rest = split(scope.seed)

        def step(params: Any, rest: Any, tokens: Any) -> tuple[list[tuple[Any, Any]], Any]:
            net = nnx.merge(graphdef, params, rest)
            seen = watched(net, tokens)
            return seen, nnx.split(net, nnx.Param, ...)[2]

        program = compiled(jax.jit(step).lower(params, rest, tokens), compiler_options(True, "float32", device))

        def draw(params: Any, rest: Any, steps: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
            rows = []
            for _ in range(steps):
                seen, rest = program(params, rest, tokens)
                rows.append([(np.asarray(x), np.asarray(y)) for x, y in seen])
            return _by_place(names, rows)

        given, gave = draw(params, rest, STEPS)
        # The state is a value: the same one is the same seed (the tests build the model twice).
        again, other = draw(params, rest, SEED_STEPS)[1], draw(params, split(scope.seed + 1)[2], SEED_STEPS)[1]
        net = nnx.merge(graphdef, params, rest)
        net.eval()
        changed: list[bool] = []
        # Not a number is needed: in evaluation each place must hand back the very array that it was given.
        jax.eval_shape(lambda net, t: changed.extend(y is not x for x, y in watched(net, t)), net, tokens)
    wrong = f"{sum(changed)} of {len(changed)} places changed what they were given" if any(changed) else ""
    return Draws(given, gave, again, other, wrong)


def _watch(drop: Callable[[Any], Any], seen: list[tuple[Any, Any]], nothing: float) -> Callable[[Any], Any]:
    """`nothing` takes the place of zeros, as on the torch side."""
    import jax.numpy as jnp

    def call(x: Any) -> Any:
        x = jnp.where(x == 0, nothing, x)
        y = drop(x)
        seen.append((x, y))
        return y

    return call


class _NoPlace(Exception):
    """A place that must drop does not, or one drops that must not."""


def _by_place(names: list[str], rows: list[Any]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    if any(len(row) != len(names) for row in rows):
        raise _NoPlace(f"{len(rows[0])} places dropped something, expected {len(names)}: {', '.join(names)}")
    given, gave = ({name: np.stack([row[i][k] for row in rows]) for i, name in enumerate(names)} for k in (0, 1))
    return given, gave


# ------------------------------------------------------------------------------------------------ controls


def _own_controls(drawn: Mapping[str, Draws], level: float) -> list[Control]:
    """Each made of both twins' own draws; rejected only if the topics that it concerns are rejected on both sides."""
    rng = np.random.default_rng(SEED)
    controls = []

    def show(control: str, concerned: str, change: Callable[[Draws], Draws]) -> None:
        found = [
            topic.measure(level)
            for side, draws in drawn.items()
            for topic in _topics(side, change(draws))
            if topic.name.startswith(concerned)
        ]
        passed = [f"{m.topic.name} ({m.topic.side})" for m in found if not m.rejected]
        words = f"own masks: rejected by {len(found) - len(passed)} of {len(found)} rows"
        words += f"; passed {', '.join(passed)}" if passed else ""
        controls.append(Control(control, rejected=bool(found) and not passed, evidence=words))

    def remade(change: Callable[[str, np.ndarray], np.ndarray]) -> Callable[[Draws], Draws]:
        """The same inputs under changed masks."""

        def made(draws: Draws) -> Draws:
            scale = np.float32(1.0 - RATE)
            return replace(
                draws,
                gave={k: np.where(change(k, y != 0), draws.given[k], 0) / scale for k, y in draws.gave.items()},
            )

        return made

    def first_layer(draws: Draws) -> Draws:
        twin = lambda name: name.replace("blocks.1", "blocks.0")  # noqa: E731
        return replace(
            draws,
            given={k: draws.given[twin(k)] for k in draws.given},
            gave={k: draws.gave[twin(k)] for k in draws.gave},
        )

    show(
        "no scaling", "scale",
        lambda draws: replace(draws, gave={k: np.where(y != 0, draws.given[k], 0) for k, y in draws.gave.items()}),
    )  # fmt: skip
    show("mask inverted", "rate", remade(lambda name, keep: ~keep))
    more = 1.0 - 0.9  # of what was dropped, this share is kept after all
    show("rate x 0.9", "rate", remade(lambda name, keep: keep | (rng.random(keep.shape) < more)))
    show("one mask for all layers", "independence between places", first_layer)
    show(
        "one mask for all steps", "independence between steps",
        remade(lambda name, keep: np.broadcast_to(keep[:1], keep.shape)),
    )  # fmt: skip
    show(
        "on in evaluation", "evaluation",
        lambda draws: replace(draws, evaluation=_changed(draws.given, draws.gave)),
    )  # fmt: skip
    return controls


def _changed(given: Mapping[str, np.ndarray], gave: Mapping[str, np.ndarray]) -> str:
    changed = sum(not np.array_equal(given[name], gave[name]) for name in given)
    return f"{changed} of {len(given)} places changed what they were given" if changed else ""
