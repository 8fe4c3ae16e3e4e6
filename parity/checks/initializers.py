"""Initial weights: both twins' draws against the law each scheme promises, and against each other.

Random draws cannot be compared bit by bit. So every sample meets its exact law (mean, standard deviation, exact
bounds, Kolmogorov–Smirnov, χ², serial correlation), the two twins' samples meet each other, and the tensors of one
model are held pairwise independent; all at one overall error level, parity.statistics.ALPHA.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from parity import statistics as st
from parity.checks import Progress, Scope
from parity.result import CheckResult, Control, Row
from parity.verdict import Verdict

__all__ = ["BLIND", "CLAIM", "CONTROLS", "N_DRAWS", "NAME", "Measured", "controls", "measure", "run"]

NAME = "initializers"
CLAIM = (
    "Xavier, Kaiming, zero and default initial weights of both twins are drawn from the law that each scheme states, "
    "from the same law as each other; every parameter of two fresh models, which between them have every kind of "
    "parameter that ThinkerLM knows (MHA with a GELU MLP; GQA with a mixture of SwiGLU experts), drawn by "
    "ThinkerLM.from_config on both sides, and of a fresh ViTTiny, has the default's law, independently from tensor to "
    "tensor of its model. Weights asked for in float64 have digits that float32 does not."
)
BLIND = (
    "Deviations below those printed (`smallest seen`); swapped fans under Xavier, which is symmetric in them; "
    "dependence that leaves neighbours and pairs of tensors uncorrelated; pairs of bias vectors, which are pooled; "
    "dependence between models, or between one seed and the next; omni_jax's ThinkerLM(...), which draws other numbers "
    "than from_config and costs a compilation (a test holds it to the same laws); the law of dtypes other "
    "than float32; fans and configurations other than those drawn."
)
CONTROLS = {
    "zeros": "nothing was drawn: all weights zero",
    "not zero": "Xavier weights where the zero scheme was asked for",
    "std x 1.02": "the right shape, 2 % too wide",
    "bounds x 1.001": "the right shape, bounds exceeded by a thousandth",
    "normal for uniform": "a normal of the uniform's own standard deviation",
    "gain forgotten": "Kaiming with gain 1 where relu's √2 belongs",
    "fans swapped": "fan_out in place of fan_in",
    "flax default": "flax.nnx's own kernel (LeCun normal) in place of torch's",
    "embedding 1/sqrt(D)": "flax.nnx's own embedding in place of N(0, 1)",
    "zero router": "a router left at zero, as small as the model's own",
    "one key for two": "two layers of a model drawn with the same key",
    "parts of two laws": "one twin follows Xavier, the other Kaiming",
    "float32 widened": "float64 weights are drawn in float32",
}
N_DRAWS = 100_000
"""Draws per tensor of a scheme in an ordinary run."""

# Never square, so that swapped fans show; the bias layer is flat, so that one layer draws enough of them.
_FAN_IN, _FAN_OUT, _BIAS_FAN_IN, _EMBED = 400, 250, 5, 50
# Fresh models that between them have every kind of parameter. Layers twice, so that a key used for both shows; no
# tensor but norms and biases below the statistics' minimum, which makes the router's d_model · num_experts ≥ 1000.
_MODELS: dict[str, dict[str, Any]] = {
    "dense": {
        "vocab_size": 500,
        "n_layers": 2,
        "d_model": 48,
        "n_heads": 4,
        "d_ff": 1024,
        "use_swiglu": False,
    },
    "moe": {
        "vocab_size": 60,
        "n_layers": 2,
        "d_model": 256,
        "n_heads": 4,
        "d_ff": 40,
        "use_gqa": True,
        "kv_groups": 2,
        "use_swiglu": True,
        "use_moe": True,
        "num_experts": 4,
    },
}
_VISION: dict[str, Any] = {"img_size": 16, "patch": 8, "d": 48, "layers": 2, "heads": 3, "ff": 480}
"""A ViTTiny: convolution, CLS token, positions and an attention whose weights are Xavier's."""
_LABELS = (*_MODELS, "vision")
_POOLED = ("norms", "biases / bound", "zeros")
_ONE_SAMPLE = (st.mean_test, st.std_test, st.extremes_test, st.ks_test, st.chi_square_test, st.lag_test)

Samples = dict[str, np.ndarray]


@dataclass(frozen=True)
class Measured:
    """All tests of one tensor of one side ("jax", "torch"), or of both sides against each other ("both")."""

    name: str
    side: str
    law: str
    shape: tuple[int, ...]
    outcomes: tuple[st.Outcome, ...]
    decides: bool = True

    @property
    def rejected(self) -> bool:
        return any(outcome.rejected for outcome in self.outcomes)

    @property
    def worst(self) -> st.Outcome:
        """The outcome nearest to, or farthest beyond, its level."""
        return min(self.outcomes, key=lambda outcome: outcome.p)

    @property
    def smallest(self) -> st.Outcome:
        """The outcome whose `smallest` is this tensor's figure: the standard deviation's where there is one."""
        return next((outcome for outcome in self.outcomes if outcome.test == "std"), self.outcomes[0])


@dataclass(frozen=True)
class _Plan:
    name: str
    side: str
    law: str
    shape: tuple[int, ...]
    tests: tuple[Callable[[float], st.Outcome], ...]
    decides: bool = True


def measure(n_draws: int = N_DRAWS, seed: int = 0) -> list[Measured]:
    """Every test of every tensor. Correct twins have a row that is `rejected` with probability ALPHA at most.

    Raises ValueError for fewer draws than the statistics need.
    """
    plans = _plans(_draw_jax(n_draws, seed), _draw_torch(n_draws, seed), n_draws)
    level = st.share(sum(len(plan.tests) for plan in plans))
    return [Measured(p.name, p.side, p.law, p.shape, tuple(test(level) for test in p.tests), p.decides) for p in plans]


def controls(n_draws: int = N_DRAWS, seed: int = 0) -> list[Control]:
    """What the check must reject, at the level at which `measure` works; each is made of both twins' own draws."""
    drawn = {"jax": _draw_jax(n_draws, seed), "torch": _draw_torch(n_draws, seed)}
    level = st.share(sum(len(plan.tests) for plan in _plans(drawn["jax"], drawn["torch"], n_draws)))
    laws = _laws(n_draws)
    default, relu = laws["default Linear weight"], laws["kaiming_relu weight"]
    rng = np.random.default_rng(seed)
    shown: dict[str, list[st.Outcome]] = {name: [] for name in CONTROLS}

    def show(name: str, x: np.ndarray, law: st.Distribution) -> None:
        """The control counts as rejected only if it is on both sides."""
        outcomes = [test(level) for test in _one_sample(x, law)]
        shown[name].append(min(outcomes, key=lambda outcome: outcome.p))

    for samples in drawn.values():
        weight = samples["default Linear weight"]
        show("zeros", samples["zero weight"], default)
        show("not zero", samples["xavier weight"], st.constant(0.0))
        show("std x 1.02", 1.02 * weight.astype(np.float64), default)
        show("bounds x 1.001", 1.001 * weight.astype(np.float64), default)
        show("normal for uniform", default.std * samples["default Embedding"].astype(np.float64), default)
        he = samples["kaiming_relu weight"].astype(np.float64)
        show("gain forgotten", he / math.sqrt(2), relu)
        fan_in, fan_out = _shapes(n_draws)["weight"]
        show("fans swapped", he * math.sqrt(fan_in / fan_out), relu)
        router = "moe model blocks.1.moe.router"
        show("zero router", np.zeros_like(samples[router]), laws[router])
        for label, part in (("dense", "attn.qkv"), ("moe", "moe.experts.0.gate_proj")):
            last = part.rsplit(".", 1)[-1]  # the layers of its kind are pairs enough
            model = {name: x for name, x in _varied(samples, label).items() if name.endswith(last)}
            model[f"{label} model blocks.1.{part}"] = model[f"{label} model blocks.0.{part}"]
            shown["one key for two"].append(_pairs_test(model, level))
    show("flax default", drawn["jax"]["flax.nnx.Linear kernel"], default)
    show("embedding 1/sqrt(D)", drawn["jax"]["flax.nnx.Embed"], laws["default Embedding"])
    for one, other in (("jax", "torch"), ("torch", "jax")):
        x, y = drawn[one]["xavier weight"], drawn[other]["kaiming_relu weight"]
        shown["parts of two laws"].append(st.ks_two_sample_test(rng.permutation(x.reshape(-1)), y, level))
    found = [
        Control(name, bool(seen) and all(o.rejected for o in seen), "; ".join(_words(o) for o in seen))
        for name, seen in shown.items()
        if name != "float32 widened"
    ]
    passed = [name for name, x in _float64_draws().items() if not _lacks_digits(x.astype(np.float32).astype(x.dtype))]
    return [*found, Control("float32 widened", not passed, f"passed: {', '.join(passed)}" if passed else "rejected")]


def run(scope: Scope, progress: Progress) -> CheckResult:
    """The check: `measure` and `controls` as rows that the reports read."""
    start = time.perf_counter()
    result = CheckResult(NAME)
    progress(0, 2, "draws")
    measured = measure(N_DRAWS, scope.seed)
    progress(1, 2, "controls")
    for m in measured:
        worst, smallest = m.worst, m.smallest
        result.rows.append(
            Row(
                check=NAME,
                config="",
                regime="",
                precision="float32",
                name=f"{m.name} ({m.side})",
                verdict=Verdict.DIFFER if m.rejected else Verdict.AGREE,
                evidence=f"{m.law}: {len(m.outcomes)} tests, worst {_words(worst)}; smallest seen: "
                f"{smallest.unit} {smallest.smallest:.2g}",
                shape=m.shape,
                excess=abs(math.log(max(worst.p, 1e-300)) / math.log(worst.level)),
                smallest_seen=smallest.smallest,
                decides=m.decides,
            )
        )
    for name, x in _float64_draws().items():
        words = _lacks_digits(x)
        verdict = Verdict.DIFFER if words else Verdict.AGREE
        words = words or "float64, beyond the digits of float32"
        result.rows.append(Row(NAME, "", "", "float64", name, verdict, words, shape=x.shape))
    if scope.controls:
        result.controls = controls(N_DRAWS, scope.seed)
    tests = sum(len(m.outcomes) for m in measured)
    result.notes.append(
        f"{tests} tests at an overall error level of {st.ALPHA:g} (each {st.share(tests):.1g}, Bonferroni); smallest "
        f"deviations are those seen with probability {st.POWER:g}; draws per scheme {N_DRAWS}, seed {scope.seed}"
    )
    result.seconds = time.perf_counter() - start
    progress(2, 2, "done")
    return result


def _words(o: st.Outcome) -> str:
    return f"{o.test} {o.estimate:.6g} for {o.expected:.6g}, p {o.p:.2g} against {o.level:.1g}"


def _one_sample(x: np.ndarray, law: st.Distribution) -> list[Callable[[float], st.Outcome]]:
    """The tests that a sample must pass, as functions of the level (known only once all are counted)."""
    if law.family == "constant":
        return [lambda level: st.constant_test(x, law, level)]
    return [lambda level, test=test: test(x, law, level) for test in _ONE_SAMPLE]


def _plans(jax_samples: Samples, torch_samples: Samples, n_draws: int) -> list[_Plan]:
    sides = {"jax": jax_samples, "torch": torch_samples}
    plans = []
    for name, law in _laws(n_draws).items():
        both = all(name in samples for samples in sides.values())
        for side, samples in sides.items():
            if name in samples:
                x = samples[name]
                plans.append(_Plan(name, side, str(law), x.shape, tuple(_one_sample(x, law)), decides=both))
        if both and law.family != "constant":
            x, y = jax_samples[name], torch_samples[name]
            test = lambda level, x=x, y=y: st.ks_two_sample_test(x, y, level)  # noqa: E731
            plans.append(_Plan(name, "both", "one law", x.shape, (test,)))
    for label in _LABELS:
        for side, samples in sides.items():
            varied = _varied(samples, label)
            test = lambda level, varied=varied: _pairs_test(varied, level)  # noqa: E731
            plans.append(_Plan(_pairs(label), side, "independent", (len(varied),), (test,)))
    return plans


def _pairs(label: str) -> str:
    return f"all pairs of the {label} model's tensors"


def _varied(samples: Samples, label: str) -> Samples:
    """The tensors of one model that are drawn at random and not pooled."""
    start = f"{label} model "
    pooled = [start + name for name in _POOLED]
    return {name: x for name, x in samples.items() if name.startswith(start) and name not in pooled}


def _pairs_test(tensors: Samples, level: float) -> st.Outcome:
    """st.pairs_test over the tensors that vary: one that does not is for its own row to reject."""
    tensors = {name: x for name, x in tensors.items() if np.ptp(x) != 0.0}
    if len(tensors) < 2:
        return st.Outcome("correlation", 0, math.nan, 0.0, None, 0.0, level, math.nan, "no two tensors that vary")
    return st.pairs_test(tensors, level)


def _shapes(n_draws: int) -> dict[str, tuple[int, int]]:
    """(fan_in, fan_out) of the layers that are drawn."""
    if n_draws < st.MINIMUM:
        raise ValueError(f"n_draws must be at least {st.MINIMUM}, got {n_draws}")
    fan_out = max(_FAN_OUT, math.ceil(n_draws / _FAN_IN))
    fan_out += fan_out == _FAN_IN
    return {
        "weight": (_FAN_IN, fan_out),
        "bias": (_BIAS_FAN_IN, n_draws),
        "embedding": (math.ceil(n_draws / _EMBED), _EMBED),
    }


@lru_cache
def _laws(n_draws: int) -> dict[str, st.Distribution]:
    """What each scheme states, from its formula alone. A bound is rounded to float32, the dtype of the draws."""
    fan_in, fan_out = _shapes(n_draws)["weight"]
    zero = st.constant(0.0)

    def uniform(bound: float) -> st.Distribution:
        return st.uniform(float(np.float32(bound)))

    laws = {
        "xavier weight": uniform(math.sqrt(6 / (fan_in + fan_out))),
        "xavier bias": zero,
        "kaiming_relu weight": uniform(math.sqrt(2) * math.sqrt(3 / fan_in)),
        "kaiming_relu bias": zero,
        "zero weight": zero,
        "zero bias": zero,
        "default Linear weight": uniform(1 / math.sqrt(fan_in)),
        "default Linear bias": uniform(1 / math.sqrt(_BIAS_FAN_IN)),
        "default Embedding": st.normal(1.0),
    }
    for label, model in _MODELS.items():
        start = f"{label} model "
        laws[start + "tok_emb"] = st.normal(1.0)
        for path, fan in _model_fans(model).items():
            laws[start + path] = uniform(1 / math.sqrt(fan))
        laws[start + "norms"] = st.constant(1.0)
        if not model["use_swiglu"]:  # the quotient rounds
            laws[start + "biases / bound"] = st.uniform(1.0 + float(np.finfo(np.float32).eps))
    laws |= {f"vision model {path}": uniform(1 / math.sqrt(fan)) for path, fan in _vision_fans().items()}
    laws["vision model norms"], laws["vision model zeros"] = st.constant(1.0), zero
    laws["vision model biases / bound"] = st.uniform(1.0 + float(np.finfo(np.float32).eps))
    # Third parties, as their documentation states them; they inform, and decide nothing.
    laws["torch.nn.Linear weight"] = uniform(1 / math.sqrt(fan_in))
    laws["torch.nn.Linear bias"] = uniform(1 / math.sqrt(_BIAS_FAN_IN))
    laws["torch.nn.Embedding"] = st.normal(1.0)
    laws["flax.nnx.Linear kernel"] = st.truncated_normal(1 / math.sqrt(fan_in), cut=2.0)  # LeCun normal
    laws["flax.nnx.Linear bias"] = zero
    laws["flax.nnx.Embed"] = st.normal(1 / math.sqrt(_EMBED))
    return laws


def _model_fans(model: dict[str, Any]) -> dict[str, int]:
    """fan_in of every linear layer of a model of `_MODELS`, by its path."""
    d_model, d_ff = model["d_model"], model["d_ff"]
    attention = ("q", "k", "v") if model.get("use_gqa") else ("qkv",)
    layer = {f"attn.{part}": d_model for part in (*attention, "o")}
    mlp = {"gate_proj": d_model, "up_proj": d_model, "down_proj": d_ff}
    if not model["use_swiglu"]:
        mlp = {"fc1": d_model, "fc2": d_ff}
    if model.get("use_moe"):
        layer["moe.router"] = d_model
        layer |= {f"moe.experts.{e}.{part}": fan for e in range(model["num_experts"]) for part, fan in mlp.items()}
    else:
        layer |= {f"mlp.{part}": fan for part, fan in mlp.items()}
    fans = {f"blocks.{i}.{path}": fan for i in range(model["n_layers"]) for path, fan in layer.items()}
    return {**fans, "lm_head": d_model}


def _vision_fans() -> dict[str, float]:
    """fan_in of every layer of the ViTTiny, by its path."""
    d, ff, patch = _VISION["d"], _VISION["ff"], _VISION["patch"]
    # in_proj is Xavier's: √(6 / (d + 3d)) = 1 / √(2d/3).
    layer = {"self_attn.in_proj": 2 * d / 3, "self_attn.out_proj": d, "linear1": d, "linear2": ff}
    blocks = {f"blocks.{i}.{path}": fan for i in range(_VISION["layers"]) for path, fan in layer.items()}
    return {"proj": 3 * patch * patch, **blocks}


@lru_cache(maxsize=2)
def _draw_torch(n_draws: int, seed: int) -> Samples:
    import torch
    from torch import nn

    from omni_torch.config import ThinkerConfig
    from omni_torch.init import default_init_, embedding_default_, init_linear_
    from omni_torch.thinker import ThinkerLM
    from omni_torch.vision_encoder import ViTTiny

    shapes = _shapes(n_draws)
    samples: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        theirs, flat, embed = (
            nn.Linear(*shapes["weight"]),
            nn.Linear(*shapes["bias"]),
            nn.Embedding(*shapes["embedding"]),
        )
        samples["torch.nn.Linear weight"] = theirs.weight.clone()
        samples["torch.nn.Linear bias"] = flat.bias.clone()
        samples["torch.nn.Embedding"] = embed.weight.clone()
        layer = nn.Linear(*shapes["weight"])
        for scheme in ("xavier", "kaiming_relu", "zero"):
            layer.bias.fill_(1.0)
            init_linear_(layer, scheme)
            samples[f"{scheme} weight"], samples[f"{scheme} bias"] = layer.weight.clone(), layer.bias.clone()
        samples["default Linear weight"] = default_init_(layer).get_parameter("weight").clone()
        samples["default Linear bias"] = default_init_(flat).get_parameter("bias").clone()
        samples["default Embedding"] = embedding_default_(embed.weight).clone()
        models: dict[str, nn.Module] = {
            label: ThinkerLM.from_config(ThinkerConfig(**model)) for label, model in _MODELS.items()
        }
        models["vision"] = ViTTiny(**_VISION)
    drawn = {name: x.numpy() for name, x in samples.items()}
    for label, model in models.items():
        drawn |= _model_samples(label, {name: x.detach().numpy() for name, x in model.named_parameters()})
    return drawn


@lru_cache(maxsize=2)
def _draw_jax(n_draws: int, seed: int) -> Samples:
    import jax
    from flax import nnx

    from omni_jax.config import ThinkerConfig
    from omni_jax.thinker import ThinkerLM, fresh_model
    from omni_jax.vision_encoder import ViTTiny
    from parity.sides import compiled, compiler_options

    key = jax.random.key(seed)
    # Compiling is all the cost here; how fast the program runs does not matter.
    options = compiler_options(True, "float32", jax.devices()[0])
    sampler = compiled(jax.jit(_jax_sampler(n_draws)).lower(key), options)
    samples = {name: np.asarray(x) for name, x in sampler(key).items()}
    rngs = nnx.Rngs(seed)  # one for all models, as a user with several would have it
    for label, model in _MODELS.items():
        fresh = ThinkerLM.from_config(ThinkerConfig(**model), rngs=rngs)
        samples |= _model_samples(label, _jax_leaves(fresh))
    fresh = fresh_model(lambda rngs: ViTTiny(**_VISION, rngs=rngs), rngs)
    return samples | _model_samples("vision", _jax_leaves(fresh))


def _jax_leaves(model: Any) -> Samples:
    """Parameters by dotted path."""
    from flax import nnx

    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in flat}


def _jax_sampler(n_draws: int) -> Callable[[Any], dict[str, Any]]:
    """key → samples of the schemes, all in one call."""
    import jax
    from flax import nnx

    from omni_jax.init import bias_default, embedding_default, init_linear, linear_default

    shapes = _shapes(n_draws)

    def draw(key: Any) -> dict[str, Any]:
        keys = iter(jax.random.split(key, 8))
        samples = {}
        theirs = nnx.Linear(*shapes["weight"], rngs=nnx.Rngs(next(keys)))
        assert theirs.bias is not None
        samples["flax.nnx.Linear kernel"], samples["flax.nnx.Linear bias"] = theirs.kernel[...], theirs.bias[...]
        samples["flax.nnx.Embed"] = nnx.Embed(*shapes["embedding"], rngs=nnx.Rngs(next(keys))).embedding[...]
        theirs.bias[...] = theirs.bias[...] + 1.0  # so that a bias that is left alone shows
        for scheme in ("xavier", "kaiming_relu", "zero"):
            layer = init_linear(theirs, next(keys), scheme)
            assert layer.bias is not None
            samples[f"{scheme} weight"], samples[f"{scheme} bias"] = layer.kernel[...], layer.bias[...]
        samples["default Linear weight"] = linear_default(next(keys), shapes["weight"])
        samples["default Linear bias"] = bias_default(shapes["bias"][0])(next(keys), shapes["bias"][1:])
        samples["default Embedding"] = embedding_default(next(keys), shapes["embedding"])
        return samples

    return draw


def _model_samples(label: str, parameters: Samples) -> Samples:
    """A model's tensors by the names of `_laws`; short ones are pooled, biases after division by their bound."""
    samples, norms, biases, zeros = {}, [], [], []
    fans = _vision_fans() if label == "vision" else _model_fans(_MODELS[label])
    for name, x in parameters.items():
        # torch's attention has in_proj_weight and in_proj_bias.
        path, _, leaf = name.replace("in_proj_", "in_proj.").rpartition(".")
        attention = path.split(".")[-2:-1] == ["self_attn"]
        if leaf in ("cls", "pos") or (leaf == "bias" and ("norm" in path.rsplit(".", 1)[-1] or attention)):
            zeros.append(x.reshape(-1))
        elif "norm" in path.rsplit(".", 1)[-1]:
            norms.append(x)
        elif leaf == "bias":
            biases.append(x * np.float32(math.sqrt(fans[path])))
        else:
            samples[f"{label} model {path}"] = x
    for name, pool in zip(_POOLED, (norms, biases, zeros), strict=True):
        if pool:
            samples[f"{label} model {name}"] = np.concatenate(pool)
    return samples


@lru_cache(maxsize=1)
def _float64_draws() -> Samples:
    """A few weights of both laws by both twins, in float64."""
    import jax
    import torch

    from omni_jax import init as ours
    from omni_torch import init as theirs
    from parity.sides import compiled, compiler_options

    shape = (8, 8)
    with jax.enable_x64(True):

        def draw(key: Any) -> dict[str, Any]:
            return {
                "uniform in float64 (jax)": ours.linear_default(key, shape, jax.numpy.float64),
                "normal in float64 (jax)": ours.embedding_default(key, shape, jax.numpy.float64),
            }

        key = jax.random.key(0)
        options = compiler_options(True, "float64", jax.devices()[0])
        drawn = {name: np.asarray(x) for name, x in compiled(jax.jit(draw).lower(key), options)(key).items()}
    generator, empty = torch.Generator().manual_seed(0), torch.empty(shape, dtype=torch.float64)
    drawn["uniform in float64 (torch)"] = theirs.linear_default_(empty.clone(), generator).numpy()
    drawn["normal in float64 (torch)"] = theirs.embedding_default_(empty, generator).numpy()
    return drawn


def _lacks_digits(x: np.ndarray) -> str:
    """Words, if x is not float64 or float32 can hold most of it."""
    held = int(np.count_nonzero(x == x.astype(np.float32)))
    if x.dtype != np.float64:
        return f"{x.dtype} where float64 was asked for"
    return f"float32 holds {held} of {x.size} weights exactly" if 2 * held > x.size else ""
