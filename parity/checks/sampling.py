"""From logits to a token: the distribution that is drawn from, the draw by a given uniform, and each twin's own draws.

Two generators never draw the same numbers. So what they draw from is judged first: probabilities in noise units and
kept sets exactly, against an oracle written by sorting, in float64. Then the draw: the same uniforms must give the
same ids. Only then each twin draws for itself, and statistics decide.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from parity import statistics as st
from parity.checks import Progress, Scope
from parity.errors import CannotLook
from parity.result import CheckResult, Control, Row
from parity.verdict import THRESHOLDS, Noise, Verdict

__all__ = [
    "BLIND",
    "CLAIM",
    "CONTROLS",
    "PRECISIONS",
    "SETTINGS",
    "Setting",
    "Truth",
    "neighbours_test",
    "noisy_logits",
    "oracle",
    "possible_ids",
    "run",
    "tied",
]

CLAIM = (
    "Given the same logits both twins keep exactly the same tokens (repetition penalty, temperature, top-k, top-p, in "
    "this order; ties by the lowest id) and give them the same probabilities; given the same uniforms they draw the "
    "same ids, alone and in generate(); and what each twin's own generator draws follows the stated distribution."
)
BLIND = (
    "Deviations of a distribution below those printed (`smallest seen`); dependence between two draws; a kept set or "
    "an id whose boundary lies within the noise, where another choice is as right (counted in the evidence); "
    "vocabularies beyond {size} tokens."
)
CONTROLS = {
    "zeros": "zeros in place of the probabilities",
    "crossing token dropped": "top-p keeps what stays below p",
    "one token too many": "top-p keeps one token more than reaches p",
    "top-p before temperature": "the kept set is that of temperature 1",
    "top-k after top-p": "top-p looks at shares of the whole vocabulary",
    "ties by the highest id": "of equal logits the last ones are kept",
    "penalty multiplied": "positive logits are multiplied by the penalty too",
    "probabilities as logits": "softmax of what has been through a softmax",
    "logits as probabilities": "logits shifted above 0 and divided by their sum",
    "masked token drawn": "a token of probability 0 stands for the last one drawn",
    "argmax": "the likeliest token in place of a drawn one",
    "uniforms of the next row": "each row draws by its neighbour's uniform",
}
PRECISIONS = ("float64", "float32", "bfloat16")
"""Of the logits; bfloat16 ones are computed with in float32."""
V = 37
BLIND = BLIND.format(size=V)
FLAT = 32
"""Tokens of the flat rows: with dyadic p every sum is exact, and so no boundary is excused."""
DRAWS = 2000
"""Own draws of each twin, per setting."""
UNIFORMS = 8
"""Uniforms per distribution; beside drawn ones 0, the largest below 1, and exact boundaries."""


@dataclass(frozen=True)
class Setting:
    """One way to make probabilities of logits."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    penalty: float = 1.0

    def __str__(self) -> str:
        words = f"T {self.temperature:g}, k {self.top_k}, p {self.top_p:g}"
        return words + (f", penalty {self.penalty:g}" if self.penalty != 1.0 else "")


SETTINGS = (
    Setting(),
    Setting(temperature=0.0, top_k=3, top_p=0.5),
    Setting(temperature=0.3),
    Setting(top_k=1),
    Setting(top_k=5),
    Setting(top_k=V),
    Setting(top_k=V + 9, temperature=1.7),
    Setting(top_p=0.0),
    Setting(top_p=0.5),
    Setting(top_p=0.9, temperature=0.6),
    Setting(top_k=7, top_p=0.75, temperature=1.3),
    Setting(top_k=16, top_p=0.25),
    Setting(penalty=1.3, top_p=0.9),
    Setting(penalty=0.8, top_k=9, temperature=0.7),
)


# ------------------------------------------------------------------------------------------------ the oracle


def oracle(
    logits: np.ndarray, setting: Setting, seen: np.ndarray | None = None, wrong: str = ""
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(probabilities, kept, order, sums) of rows of logits, all (N, V), in float64 by sorting.

    order: ids from the likeliest down; sums: cumulative probabilities in that order of what top-k left. `wrong` names
    the control whose mistake is made.
    """
    x = np.array(logits, np.float64)
    if setting.penalty != 1.0 and seen is not None:
        divided = np.where((x > 0) & (wrong != "penalty multiplied"), x / setting.penalty, x * setting.penalty)
        x = np.where(seen, divided, x)
    ids = np.arange(x.shape[1])
    by_id = -ids if wrong == "ties by the highest id" else ids
    order = np.stack([np.lexsort((by_id, -row)) for row in x])
    ranks = np.argsort(order, axis=1)
    if setting.temperature == 0.0:
        one = (ranks == 0).astype(np.float64)
        return one, ranks == 0, order, np.ones_like(one)
    k = setting.top_k if 0 < setting.top_k < x.shape[1] else x.shape[1]

    def shares(temperature: float, kept: np.ndarray) -> np.ndarray:
        mass = np.where(kept, np.exp((x - x.max(1, keepdims=True)) / temperature), 0.0)
        return mass / mass.sum(1, keepdims=True)

    top = (ranks < k) & np.isfinite(x)
    judged_by = 1.0 if wrong == "top-p before temperature" else setting.temperature
    of = np.isfinite(x) if wrong == "top-k after top-p" else top
    sums = np.cumsum(np.take_along_axis(shares(judged_by, of), order, 1), axis=1)
    if setting.top_p < 1.0:
        # The sums of flat rows over a power of two are exact, and reach p exactly.
        reached = (sums < setting.top_p).sum(1) + 1
        reached += {"one token too many": 1, "crossing token dropped": -1}.get(wrong, 0)
        top &= ranks < np.maximum(reached, 1)[:, None]
    return shares(setting.temperature, top), top, order, sums


def possible_ids(
    logits: np.ndarray,
    spread: np.ndarray,
    setting: Setting,
    uniform: float | None,
    seen: np.ndarray | None = None,
    draws: int = 256,
    seed: int = 0,
) -> set[int]:
    """Ids that one row of float64 logits (V,) may give within its noise: `spread` is one noise unit, absolute.

    Every logit is moved by up to the tie threshold times its noise, many times; `uniform` None takes the likeliest.
    """
    rng = np.random.default_rng([seed, 59])
    moved = logits + THRESHOLDS.tie * spread * rng.uniform(-1.0, 1.0, (draws, len(logits)))
    moved[0] = logits
    p = oracle(moved, setting, None if seen is None else np.broadcast_to(seen, moved.shape))[0]
    if uniform is None:
        return set(np.argmax(p, axis=1).tolist())
    return set(_inverse(p, np.full(draws, uniform))[0].tolist())


def _inverse(p: np.ndarray, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids, gap): the first id whose cumulative sum exceeds u · total; and how far u · total is from each sum, (N, V).

    Where the sums do not move, at tokens of probability 0, there is no boundary: the gap is infinite.
    """
    sums = np.cumsum(p, axis=1)
    goal = uniforms[:, None] * sums[:, -1:]
    return np.argmax(sums > goal, axis=1), np.where(p > 0, np.abs(sums - goal), np.inf)


# ------------------------------------------------------------------------------------------------ the problem


def problem(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(logits, seen, exact): rows (N, V) in float32; exact: the rows whose sums are exact for dyadic p."""
    rng = np.random.default_rng([seed, 61])
    drawn = 2.5 * rng.standard_normal((7, V))
    drawn[1] = np.round(drawn[1])  # ties everywhere
    drawn[2, 5:20] = drawn[2].max() + 0.5  # ties at the top
    drawn[3, rng.random(V) < 0.5] = -np.inf
    drawn[4] = np.where(np.arange(V) == 11, 60.0, -60.0)  # as good as one-hot
    drawn[5] = -np.inf
    drawn[5, [8, 30]] = 1.5, -0.5
    drawn[6] -= 7.0  # nothing positive
    flat = np.full((2, V), -np.inf)
    flat[0, :FLAT] = 1.25
    flat[1, V - FLAT :] = -3.0
    only = np.full((1, V), -np.inf)
    only[0, 17] = 0.5
    logits = np.concatenate([drawn, flat, only]).astype(np.float32)
    seen = rng.random(logits.shape) < 0.4
    seen[7:9] = True  # a flat row stays flat
    exact = np.zeros(len(logits), bool)
    exact[7:10] = True
    return logits, seen, exact


@dataclass(frozen=True)
class Truth:
    """What the oracle says of every row under every setting, and its noise: settings by rows, (N, V)."""

    settings: tuple[Setting, ...]
    logits: np.ndarray
    seen: np.ndarray
    exact: np.ndarray
    p: np.ndarray
    kept: np.ndarray
    order: np.ndarray
    sums: np.ndarray
    noise: Noise
    noise_sums: Noise
    noise_cdf: Noise

    def boundary(self, unit: float) -> np.ndarray:
        """(N,): where what top-p keeps hangs on the rounding of a sum."""
        p = np.repeat([s.top_p for s in self.settings], len(self.logits))[:, None]
        near = np.abs(self.sums - p) <= THRESHOLDS.tie * self.noise_sums.sigma * unit
        ordered = np.take_along_axis(self.p, self.order, 1)
        live = np.take_along_axis(self.kept, self.order, 1) | (np.roll(ordered, 1, axis=1) > 0)
        asked = ((p > 0.0) & (p < 1.0))[:, 0] & ~np.tile(self.exact, len(self.settings))
        return (near & live).any(1) & asked


def truth(seed: int, precision: str, draws: int) -> Truth:
    """The oracle on the problem's logits as `precision` holds them: bfloat16 ones, or the same for the others."""
    return _truth(seed, "bfloat16" if precision == "bfloat16" else "float32", max(draws, 7))


@lru_cache(maxsize=4)
def _truth(seed: int, precision: str, draws: int) -> Truth:
    from parity.noise import measure_noise
    from parity.precision import precision as format_of

    logits, seen, exact = problem(seed)
    logits = logits.astype(format_of(precision).numpy).astype(np.float64)
    found = [oracle(logits, s, seen) for s in SETTINGS]
    p, kept, order, sums = (np.concatenate([row[i] for row in found]) for i in range(4))

    def program(logits, seen, penalty, temperature, top, kept, order):
        import jax.numpy as jnp

        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)

        def shares(kept):
            top = jnp.max(jnp.where(kept, logits, -1e30), axis=1, keepdims=True)
            mass = jnp.where(kept, jnp.exp((logits - top) / temperature), 0.0)
            return mass / jnp.sum(mass, axis=1, keepdims=True)

        p = shares(kept)
        ordered = jnp.take_along_axis(shares(top), order, axis=1)
        return p, jnp.cumsum(ordered, axis=1), jnp.cumsum(p, axis=1)

    count, many = len(logits), len(SETTINGS)
    column = lambda values: np.repeat(values, count)[:, None].astype(np.float32)  # noqa: E731
    k = np.array([s.top_k if 0 < s.top_k < V else V for s in SETTINGS])
    ranks = np.argsort(order, axis=1)
    inputs = (
        np.where(np.isfinite(np.tile(logits, (many, 1))), np.tile(logits, (many, 1)), -1e30).astype(np.float32),
        np.tile(seen, (many, 1)) & (column([s.penalty for s in SETTINGS]) != 1.0),
        column([s.penalty for s in SETTINGS]),
        column([s.temperature or 1.0 for s in SETTINGS]),
        (ranks < np.repeat(k, count)[:, None]) & np.isfinite(np.tile(logits, (many, 1))),
        kept,
        order.astype(np.int32),
    )
    noises = measure_noise(program, inputs, "float32", draws=draws).noise
    return Truth(SETTINGS, logits, seen, exact, p, kept, order, sums, *noises)


# ------------------------------------------------------------------------------------------------ the sides


@dataclass(frozen=True)
class Side:
    """One twin's functions over numpy arrays."""

    name: str
    probabilities: Callable[[np.ndarray, np.ndarray, Setting, str], np.ndarray]
    draw: Callable[[np.ndarray, np.ndarray, str], np.ndarray]


def sides(scope: Scope) -> tuple[Side, Side]:
    """Both twins; float64 runs on the CPU."""
    from parity.precision import resolve_device

    devices = resolve_device(scope.device)
    return _jax_side(devices[0]), _torch_side(devices[1])


def _jax_side(device: Any) -> Side:
    import jax

    from omni_jax import sampling
    from parity.precision import precision as format_of

    cpu = jax.devices("cpu")[0]

    def place(precision: str) -> Any:
        stack = contextlib.ExitStack()
        stack.enter_context(jax.enable_x64(precision == "float64"))
        stack.enter_context(jax.default_device(cpu if precision == "float64" else device))
        return stack

    def probabilities(logits, seen, setting, precision):
        # As users call them, and asked anew at every call: a test may have put a bug there.
        x = logits.astype(format_of(precision).numpy)
        with place(precision):
            if setting.penalty != 1.0:
                x = sampling.apply_repetition_penalty(x, seen, setting.penalty)
            return np.asarray(sampling.truncated_probabilities(x, setting.temperature, setting.top_k, setting.top_p))

    def draw(p, uniforms, precision):
        with place(precision):
            return np.asarray(sampling.sample(p, uniforms))

    return Side("jax", probabilities, draw)


def _torch_side(device: Any) -> Side:
    import torch

    from omni_torch import sampling

    def at(precision: str) -> Any:
        return "cpu" if precision == "float64" else device

    def probabilities(logits, seen, setting, precision):
        x = torch.from_numpy(logits).to(at(precision), getattr(torch, precision))
        if setting.penalty != 1.0:
            x = sampling.apply_repetition_penalty(x, torch.from_numpy(seen).to(x.device), setting.penalty)
        p = sampling.truncated_probabilities(x, setting.temperature, setting.top_k, setting.top_p)
        return p.cpu().numpy()

    def draw(p, uniforms, precision):
        given = [torch.from_numpy(x).to(at(precision)) for x in (p, uniforms)]
        return sampling.sample(*given).cpu().numpy()

    return Side("torch", probabilities, draw)


# ------------------------------------------------------------------------------------------------ the run


def run(scope: Scope, progress: Progress) -> CheckResult:
    """Judge probabilities, kept sets and draws by given uniforms in every precision; then each twin's own draws."""
    from parity.checks._steps import merge

    started = time.perf_counter()
    result = CheckResult("sampling")
    with _in_haste(scope):
        _look(scope, progress, result)
    order = list(CONTROLS)
    result.controls = sorted(merge(result.controls), key=lambda c: order.index(c.name))
    result.seconds = time.perf_counter() - started
    return result


def _look(scope: Scope, progress: Progress, result: CheckResult) -> None:
    both = sides(scope)
    precisions = [p for p in PRECISIONS if p in scope.precisions]
    for done, precision in enumerate(precisions):
        progress(done, len(precisions) + 1, precision)
        _distributions(scope, both, precision, result)
        if precision != "bfloat16":  # they are drawn from in float32
            _given_uniforms(scope, both, precision, result)
    progress(len(precisions), len(precisions) + 1, "generate")
    if "float32" in precisions:
        _generated(scope, result)
    if not precisions:
        result.error = f"sampling looks at {', '.join(PRECISIONS)} only; ask for one of them with --precision"
    progress(1, 1, "")


@contextlib.contextmanager
def _in_haste(scope: Scope) -> Iterator[None]:
    """On a CPU, the many small programs are compiled without XLA's dearer passes: most of a first run was that."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", before or scope.device == "cpu")
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def _computed_in(precision: str) -> tuple[str, Any, float]:
    """(name, numpy type, unit roundoff) of what probabilities are computed in."""
    from parity.precision import precision as format_of
    from parity.precision import unit_roundoff

    name = "float64" if precision == "float64" else "float32"
    return name, format_of(name).numpy, unit_roundoff(name)


def _distributions(scope: Scope, both: Sequence[Side], precision: str, result: CheckResult) -> None:
    """Kept sets exactly, and probabilities in noise units, of every row under every setting."""
    from parity.result import row_from_judgement
    from parity.verdict import judge_tensor

    made = truth(scope.seed, precision, scope.draws)
    name, dtype, unit = _computed_in(precision)
    fields: dict[str, Any] = {"check": "sampling", "config": "", "regime": "drawn logits", "precision": precision}
    fields |= {"device": "cpu" if precision == "float64" else scope.device}
    p = {}
    for side in both:
        found = [side.probabilities(made.logits, made.seen, setting, precision) for setting in SETTINGS]
        p[side.name] = np.concatenate(found)
        narrow = {str(x.dtype) for x in found} - {name}
        if narrow:
            words = f"{side.name} returned {', '.join(sorted(narrow))}; {precision} is to be computed in {name}"
            result.rows.append(Row(name=f"type ({side.name})", verdict=Verdict.DIFFER, evidence=words, **fields))
    kept, wrong, ties = made.kept, {}, np.zeros(len(made.p), bool)
    for side, values in p.items():
        # What is kept and below the smallest normal number may be flushed to zero.
        tiny = kept & (made.p < np.finfo(dtype).smallest_normal)
        differs = ((values > 0) != kept) & ~tiny
        excused = made.boundary(unit) & differs.any(1)
        ties |= excused
        wrong[side] = np.flatnonzero(differs.any(1) & ~excused)
    bad = "; ".join(f"{side}: {len(rows)}, first {_where(made, rows[0])}" for side, rows in wrong.items() if len(rows))
    words = f"{len(kept)} rows under {len(SETTINGS)} settings, {int(ties.sum())} ties within the noise at the crossing"
    result.rows.append(
        Row(
            name="kept sets", verdict=Verdict.DIFFER if bad else Verdict.AGREE, shape=kept.shape,
            evidence=f"{words}; other tokens kept by {bad}" if bad else words, **fields,
        )
    )  # fmt: skip
    settled = [np.where(ties[:, None], made.p, x.astype(np.float64)) for x in p.values()]
    judgement = judge_tensor(settled[0], settled[1], made.p, made.noise, unit, noisy_reference=precision == "float64")
    result.rows.append(row_from_judgement(judgement, name="probabilities", shape=made.p.shape, **fields))
    if scope.controls:
        result.controls += _distribution_controls(made, precision, unit)


def _where(made: Truth, row: int) -> str:
    return f"row {row % len(made.logits)} under {made.settings[row // len(made.logits)]}"


def _uniforms(scope: Scope, made: Truth, p: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(p, uniforms, exact): UNIFORMS of them for each row of p; exact where both p and its sums are."""
    rng = np.random.default_rng([scope.seed, 67])
    uniforms = rng.random((len(p), UNIFORMS), np.float32)
    uniforms[:, 0], uniforms[:, 1] = 0.0, np.nextafter(np.float32(1), np.float32(0))
    uniforms[:, 2] = np.floor(uniforms[:, 2] * FLAT) / FLAT  # boundaries of the flat rows
    # Distributions need not sum to 1; these factors leave every sum as exact, or as noisy, as it was.
    p = p * np.array([1.0, 0.25, 8.0], dtype)[np.arange(len(p)) % 3][:, None]
    largest = p.max(1, keepdims=True)
    exact = ((p == 0) | (p == largest)).all(1) & (np.frexp(largest)[0] == 0.5)[:, 0]
    return np.repeat(p, UNIFORMS, 0), uniforms.reshape(-1).astype(dtype), np.repeat(exact, UNIFORMS)


def _given_uniforms(scope: Scope, both: Sequence[Side], precision: str, result: CheckResult) -> None:
    """Ids by the same uniforms from the same distributions: those of the oracle."""
    made = truth(scope.seed, precision, scope.draws)
    _, dtype, unit = _computed_in(precision)
    p, uniforms, exact = _uniforms(scope, made, made.p.astype(dtype), dtype)
    ids, gap = _inverse(p.astype(np.float64), uniforms.astype(np.float64))
    scale = p.astype(np.float64).sum(1, keepdims=True)
    near = gap <= THRESHOLDS.tie * np.repeat(made.noise_cdf.sigma, UNIFORMS, 0) * scale * unit
    tied = near.any(1) & ~exact
    found = {side.name: side.draw(p, uniforms, precision) for side in both}

    def bad(drawn: np.ndarray) -> np.ndarray:
        """Rows that are wrong: another id where no boundary is near, or anywhere a token of probability 0."""
        inside = (drawn >= 0) & (drawn < V)
        masked = np.take_along_axis(p, np.where(inside, drawn, 0)[:, None], 1)[:, 0] == 0
        return ~inside | masked | ((drawn != ids) & ~tied)

    wrong = {side: int(bad(drawn).sum()) for side, drawn in found.items()}
    parted = int((found["jax"] != found["torch"]).sum())
    words = f"{len(ids)} draws, {int(exact.sum())} of them exact; {int(tied.sum())} uniforms within the noise of a "
    words += f"boundary, {parted} of which the twins draw apart"
    words += "".join(f"; {count} wrong in {side}" for side, count in wrong.items() if count)
    verdict = Verdict.DIFFER if any(wrong.values()) else Verdict.AGREE
    result.rows.append(
        Row(
            check="sampling", config="", regime="given uniforms", precision=precision, name="ids", verdict=verdict,
            evidence=words, device="cpu" if precision == "float64" else scope.device, shape=ids.shape,
        )
    )  # fmt: skip
    if not scope.controls:
        return
    masked = np.where(uniforms == uniforms.max(), V - 1, ids)
    wrongs = {
        "masked token drawn": masked,
        "argmax": np.argmax(p, axis=1),
        "uniforms of the next row": _inverse(p.astype(np.float64), np.roll(uniforms, UNIFORMS + 1))[0],
    }
    for name, drawn in wrongs.items():
        count = int(bad(drawn).sum())
        words = f"{precision}: wrong in {count} of {len(ids)} draws by given uniforms"
        result.controls.append(Control(name, count > 0, words))


def _distribution_controls(made: Truth, precision: str, unit: float) -> list[Control]:
    """Each mistake is made by the oracle; the tensor of all probabilities must be rejected."""
    from parity.checks._steps import rejection

    def under(wrong: str) -> np.ndarray:
        return np.concatenate([oracle(made.logits, s, made.seen, wrong)[0] for s in made.settings])

    shown = {"zeros": np.zeros_like(made.p)}
    for name in ("crossing token dropped", "one token too many", "top-p before temperature", "top-k after top-p"):
        shown[name] = under(name)
    for name in ("ties by the highest id", "penalty multiplied"):
        shown[name] = under(name)
    plain = oracle(made.logits, Setting())[0]
    shown["probabilities as logits"] = np.concatenate([oracle(plain, s, made.seen)[0] for s in made.settings])
    lifted = made.logits - np.where(np.isfinite(made.logits), made.logits, np.inf).min(1, keepdims=True)
    lifted = np.where(np.isfinite(lifted), lifted + 1.0, 0.0)
    shown["logits as probabilities"] = np.tile(lifted / lifted.sum(1, keepdims=True), (len(made.settings), 1))
    values = {"probabilities": (None, None, made.p, made.noise)}
    wide = precision == "float64"
    return [
        rejection(name, precision, {"probabilities": wrong}, values, unit, noisy_reference=wide)
        for name, wrong in shown.items()
    ]


# ------------------------------------------------------------------------------------------------ generate


CONFIG: dict[str, Any] = {
    "vocab_size": 29, "n_layers": 1, "d_model": 8, "n_heads": 2, "d_ff": 8, "ctx_len": 16, "use_swiglu": False,
}  # fmt: skip
PROMPTS = [[1, 7, 9, 20], [1, 5], [1, 11, 12]]
NEW_TOKENS = 9
SHARED = Setting(temperature=0.9, penalty=1.2)
CERTAIN = 0.95
"""Of DRAWS draws enough must go to other ids."""
OWN = (Setting(temperature=1.3, top_k=12, top_p=0.95), Setting(temperature=0.7, top_p=0.8))
"""Of each twin's own draws."""


@lru_cache(maxsize=2)
def _models(seed: int) -> tuple[Any, Any]:
    """(omni_jax model, omni_torch model) of CONFIG with the same weights."""
    import torch

    from omni_jax.checkpoint import load_weights
    from omni_jax.config import ThinkerConfig as JaxConfig
    from omni_jax.thinker import ThinkerLM as JaxLM
    from omni_torch.config import ThinkerConfig
    from omni_torch.thinker import ThinkerLM
    from parity.fixtures import random_weights

    config = ThinkerConfig(**CONFIG)
    weights = random_weights(config, seed)
    module = ThinkerLM.from_config(config).eval()
    module.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    model = JaxLM.from_config(JaxConfig(**CONFIG))
    load_weights(model, weights)
    model.eval()
    return model, module


def _generated(scope: Scope, result: CheckResult) -> None:
    """generate() with shared uniforms; then with each twin's own generator."""
    import jax

    from parity.precision import resolve_device

    devices = resolve_device(scope.device)
    model, module = _models(scope.seed)
    module = module.to(devices[1])
    with jax.default_device(devices[0]):
        _shared(scope, model, module, result)
        _own(scope, model, module, result)
    module.to("cpu")


def _shared(scope: Scope, model: Any, module: Any, result: CheckResult) -> None:
    import omni_jax.generation
    import omni_torch.generation

    uniforms = np.random.default_rng([scope.seed, 71]).random((len(PROMPTS), NEW_TOKENS), np.float32)
    arguments = {"temperature": SHARED.temperature, "top_k": SHARED.top_k, "top_p": SHARED.top_p}
    arguments |= {"repetition_penalty": SHARED.penalty, "eos_id": None, "uniforms": uniforms}
    ours = omni_jax.generation.generate(model, PROMPTS, NEW_TOKENS, **arguments).tokens
    theirs = omni_torch.generation.generate(module, PROMPTS, NEW_TOKENS, **arguments).tokens
    ties, wrong = 0, []
    for row, (prompt, left, right) in enumerate(zip(PROMPTS, ours, theirs, strict=True)):
        step = next((i for i, (a, b) in enumerate(zip(left, right)) if a != b), None)
        if step is None and len(left) == len(right):
            continue
        if step is not None and tied(
            module, [*prompt, *left[:step]], SHARED, uniforms[row, step], left[step], right[step]
        ):
            ties += 1
        else:
            wrong.append(f"row {row} at step {step}")
    words = f"{len(PROMPTS)} rows of {NEW_TOKENS} tokens under {SHARED}, {ties} ties within the noise"
    words += f"; other ids in {', '.join(wrong)}" if wrong else ""
    result.rows.append(
        Row(
            check="sampling", config="a small model", regime="generate, shared uniforms", precision="float32",
            name="ids", verdict=Verdict.DIFFER if wrong else Verdict.AGREE, evidence=words, device=scope.device,
            shape=uniforms.shape,
        )
    )  # fmt: skip


def noisy_logits(module: Any, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(float64 logits after `ids`, one noise unit of each in float32, absolute): (V,) each, for a torch model."""
    from parity.fixtures import twins
    from parity.noise import measure_noise
    from parity.precision import unit_roundoff

    pair = twins("a model", module.config).pair
    params = pair.jax_params({k: v.detach().cpu().float().numpy() for k, v in module.named_parameters()})
    tokens = np.asarray([ids], np.int32)
    inputs = (params, tokens, tokens, np.ones(tokens.shape, bool), np.arange(len(ids), dtype=np.int32)[None])
    found = measure_noise(pair.jax, inputs, "float32", draws=7)
    return found.reference[0][0, -1], found.noise[0].sigma[0, -1] * unit_roundoff("float32")


def tied(module: Any, ids: Sequence[int], setting: Setting, uniform: float | None, *chosen: int) -> bool:
    """Could rounding in float32 have led to each of the `chosen` ids after the text `ids`?"""
    logits, spread = noisy_logits(module, ids)
    seen = np.isin(np.arange(len(logits)), [i for i in ids if i != 0])
    return set(chosen) <= possible_ids(logits, spread, setting, uniform, seen)


def _own(scope: Scope, model: Any, module: Any, result: CheckResult) -> None:
    """The first token of DRAWS rows by each twin's own generator, against the oracle's distribution of it."""
    import torch

    import omni_jax.generation
    import omni_torch.generation

    # The first text after which no id is all but certain: of a certain one nothing can be counted.
    texts = [PROMPTS[0], *([1, i] for i in range(2, CONFIG["vocab_size"]))]
    with torch.no_grad():
        wide = next(module.parameters()).device
        module.to("cpu").double()
        after = ((text, module(torch.tensor([text]))[:, -1].numpy()) for text in texts)
        open_ = lambda x: all(oracle(x, setting)[0].max() < CERTAIN for setting in OWN)  # noqa: E731
        prompt, logits = next((pair for pair in after if open_(pair[1])), (PROMPTS[0], None))
        module.float().to(wide)
    if logits is None:
        raise CannotLook("the small model is all but certain after every text: of own draws nothing can be counted")
    generators = {
        "jax": lambda **more: omni_jax.generation.generate(model, prompt, 1, **more),
        "torch": lambda **more: omni_torch.generation.generate(module, prompt, 1, **more),
    }
    level = st.share(len(generators) * len(OWN) * 2)
    for side, generate in generators.items():

        def draw(setting: Setting, seed: int, generate: Callable[..., Any] = generate) -> np.ndarray:
            settings = {"temperature": setting.temperature, "top_k": setting.top_k, "top_p": setting.top_p}
            (ids,) = generate(**settings, num_samples=DRAWS, eos_id=None, seed=seed, stream=True)
            return np.asarray(ids)

        def row(name: str, verdict: bool, words: str, side: str = side, **more: Any) -> None:
            result.rows.append(
                Row(
                    check="sampling", config="a small model", regime="own generator", precision="float32",
                    name=f"{name} ({side})", verdict=Verdict.AGREE if verdict else Verdict.DIFFER, evidence=words,
                    device=scope.device, shape=(DRAWS,), **more,
                )
            )  # fmt: skip

        drawn = [draw(setting, scope.seed) for setting in OWN]
        for setting, ids in zip(OWN, drawn):
            p = oracle(logits, setting)[0][0]
            for name, outcome in (
                (f"distribution, {setting}", st.categorical_test(ids, p, level)),
                (f"neighbouring rows, {setting}", neighbours_test(ids, p, level)),
            ):
                words = f"{outcome.unit} {outcome.estimate:.3g} of {outcome.n} draws, p-value {outcome.p:.2g}"
                excess = abs(math.log(max(outcome.p, 1e-300)) / math.log(level))
                row(name, not outcome.rejected, words, smallest_seen=outcome.smallest, excess=excess)
        again, other = draw(OWN[0], scope.seed), draw(OWN[0], scope.seed + 1)
        same, moved = np.array_equal(again, drawn[0]), not np.array_equal(other, drawn[0])
        row("the same seed, the same ids", same, "two runs alike" if same else "two runs of one seed differ")
        row("another seed, other ids", moved, "others" if moved else "two seeds draw the same ids")
        if scope.controls:
            p = oracle(logits, OWN[0])[0][0]
            likeliest = np.full(DRAWS, int(np.argmax(p)))
            masked = np.where(np.arange(DRAWS) == 0, int(np.flatnonzero(p == 0)[0]), drawn[0])
            for name, ids in (("argmax", likeliest), ("masked token drawn", masked)):
                outcome = st.categorical_test(ids, p, level)
                words = f"{side}'s own draws: p-value {outcome.p:.2g}, level {level:.1g}"
                result.controls.append(Control(name, outcome.rejected, words))
    result.notes.append(
        f"own draws: {len(generators) * len(OWN) * 2} tests at an overall error level of {st.ALPHA:g} (each "
        f"{level:.1g}, Bonferroni); smallest deviations (Cohen's w) are those seen with probability "
        f"{st.POWER:g}; seed {scope.seed}"
    )


def neighbours_test(ids: np.ndarray, p: np.ndarray, level: float) -> st.Outcome:
    """Are rows 2i and 2i + 1 drawn independently? Whether each is the likeliest id: four cells of known probability."""
    top = int(np.argmax(p))
    first, second = (ids.reshape(-1, 2) == top).T.astype(np.int64)
    joint = np.outer(*[np.array([1.0 - p[top], p[top]])] * 2).reshape(-1)
    return dataclasses.replace(st.categorical_test(2 * first + second, joint, level), test="neighbours")
