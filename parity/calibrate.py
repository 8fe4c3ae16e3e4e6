"""Where the thresholds come from: what correct programs score, and what known bugs score, in noise units.

A draw is a program that is right by construction (the twins in a random configuration, or a foreign pair of a few
primitives) with weights, inputs and one precision; no two draws are equal. Every tensor of it is looked at as
`parity.verdict` looks, and each look is written down as look / quantile: the Z that would just have let it pass. The
record (`RECORD`) holds the distribution, the Z that it supports, and the smallest relative error that would have been
seen; a test holds `THRESHOLDS` to it, and docs/decisions/0001 tells the story.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parity.verdict import THRESHOLDS, Distance, Thresholds, measure, subtract

if TYPE_CHECKING:
    from parity.judge import Findings, Judge
    from parity.pair import Pair

__all__ = [
    "CEILING",
    "DRAWS",
    "MARGIN",
    "FEWEST_CONFIGURATIONS",
    "FEWEST_DRAWS",
    "RATIO_MARGIN",
    "RECORD",
    "Calibration",
    "Draw",
    "alarm_limit",
    "calibrate",
    "foreign_pairs",
    "objections",
    "plan",
    "random_config",
    "supported",
]

RECORD = Path(__file__).parent / "assets" / "calibration.json"
DRAWS = 312
MARGIN = 1.25
"""Z must stand at least this factor above the largest clean value of the record: seeds and kernels to come."""
CEILING = 2.0
"""... and at most this factor, or the threshold is slack that nobody measured."""
RATIO_MARGIN = 3.0
"""The bounds on ratios of errors vary more: at least this factor above the largest clean one, at most its square."""
FEWEST_DRAWS, FEWEST_CONFIGURATIONS = 200, 50
"""A record with fewer says nothing about the thresholds being too wide."""
COMPILE_EVERY = 5
"""Every fifth configuration runs on the JAX side too: a compilation for each new set of shapes costs seconds."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Draw:
    """One clean draw; `program` is "twins" (with a configuration) or the name of a foreign pair."""

    program: str
    config: Any
    regime: str
    seed: int
    precision: str
    compiled: bool
    """Both sides run. Otherwise torch alone does, against the interpreted reference of the JAX program."""

    @property
    def label(self) -> str:
        if self.config is None:
            return f"{self.program}, {self.precision}"
        c = self.config
        kind = ("gelu", "swiglu")[c.use_swiglu] + f" {c.num_experts_per_tok}/{c.num_experts}" * c.use_moe
        return (
            f"L{c.n_layers} D{c.d_model} H{c.n_heads}/{c.kv_heads} F{c.d_ff} V{c.vocab_size} {kind}, {self.regime}, "
            f"seed {self.seed}, {self.precision}"
        )


# ------------------------------------------------------------------------------------------------ what is drawn


def random_config(rng: np.random.Generator) -> Any:
    """A small ThinkerConfig with odd sizes: one or two layers, any head layout, both MLPs, dense or at least top-2.

    Top-1 routing is left out: the gradient of its router is zero but for rounding, so it says nothing of a kernel.
    """
    from omni_torch.config import ThinkerConfig

    heads = int(rng.integers(1, 7))
    head = 2 * int(rng.integers(1, 7))
    divisors = [k for k in range(1, heads + 1) if heads % k == 0]
    experts = int(rng.integers(2, 6))
    gqa = bool(rng.random() < 0.5)
    return ThinkerConfig(
        vocab_size=int(rng.integers(17, 301)),
        n_layers=int(rng.integers(1, 3)),
        d_model=heads * head,
        n_heads=heads,
        d_ff=int(rng.integers(5, 70)),
        rope_theta=10000.0,
        ctx_len=64,
        use_gqa=gqa,
        kv_groups=int(rng.choice(divisors)) if gqa else None,
        use_swiglu=bool(rng.random() < 0.5),
        use_moe=bool(rng.random() < 0.35),
        num_experts=experts,
        num_experts_per_tok=int(rng.integers(2, min(experts, 3) + 1)),
    )


def plan(draws: int = DRAWS, seed: int = 0) -> list[Draw]:
    """The draws in their order: each configuration four times, then a small foreign pair and often a large one."""
    precisions = ("float64", "float32", "bfloat16", "float16")
    sizes = foreign_pairs(0, sizes_only=True)
    small, large = (
        [(n, p) for p in precisions for n, shapes in sizes.items() if (math.prod(shapes[0]) < 1000) is least]
        for least in (True, False)
    )
    planned: list[Draw] = []
    index = big = 0
    while len(planned) < draws:
        rng = np.random.default_rng([seed, 11, index])
        config, compiled = random_config(rng), index % COMPILE_EVERY == 0
        regimes = ("randomised", "fresh") if index % 2 else ("fresh", "randomised")
        base = 1000 * seed + 10 * index
        # float64 and float32 share weights, inputs and so the draws of the noise; the others have their own.
        planned += [
            Draw("twins", config, regimes[0], base, "float64", compiled),
            Draw("twins", config, regimes[0], base, "float32", compiled),
            Draw("twins", config, regimes[1], base + 1, "bfloat16", compiled and index % 2 == 0),
            Draw("twins", config, regimes[1], base + 2, ("float32", "float16")[index % 2], False),
        ]
        foreign = [small[index % len(small)]]
        if index % 7 not in (0, 2, 4):
            foreign.append(large[big % len(large)])
            big += 1
        planned += [Draw(name, None, "foreign", base + 3, precision, True) for name, precision in foreign]
        index += 1
    return planned[:draws]


def foreign_pairs(seed: int, only: str | None = None, sizes_only: bool = False) -> dict[str, Any]:
    """name -> (pair, weights, inputs) of pairs of a few primitives, from one element to a million.

    The gradient with respect to the weights is judged as well, of the sum of output times a random cotangent.
    """
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "scalar chain": ((),),
        "mean of 1e6": ((1000, 1000),),
        "mean of 3": ((3,),),
        "elementwise 250 x 1000": ((250, 1000),),
        "elementwise 1": ((1,),),
        "softmax 700 x 900": ((700, 900),),
        "softmax 2": ((1, 2),),
        "layer norm 700 x 900": ((700, 900),),
        "layer norm 1 x 7": ((1, 7),),
        "matmul 300 x 1000 x 500": ((300, 1000), (1000, 500)),
        "matmul 1 x 3 x 1": ((1, 3), (3, 1)),
        "logsumexp 700 x 900": ((700, 900),),
        "look-up 5000 of 50": ((50, 21),),
        "running sum 40 x 500": ((40, 500),),
    }
    if sizes_only:
        return dict(shapes)
    return {name: _foreign(name, shapes[name], seed) for name in shapes if only in (None, name)}


def _foreign(name: str, shapes: Sequence[tuple[int, ...]], seed: int) -> tuple[Pair, dict[str, np.ndarray], tuple]:
    import jax
    import jax.numpy as jnp
    import torch

    from parity.pair import pair_of

    rng = np.random.default_rng([seed, len(name), sum(map(ord, name))])
    weights = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in zip("xy", shapes)}
    ids = rng.integers(0, 50, 5000).astype(np.int32)
    eps = 1e-5
    functional = torch.nn.functional

    def norm(x):
        centred = x - jnp.mean(x, -1, keepdims=True)
        return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + eps)

    def torch_norm(x):
        return functional.layer_norm(x, x.shape[-1:], eps=eps)

    def gelu(x):
        # torch's formula. jax.nn.gelu goes by erfc, which does not cancel in the left tail: not the same arithmetic.
        return 0.5 * x * (1 + jax.lax.erf(x / math.sqrt(2.0))) + jnp.tanh(x) * jnp.exp(-x * x)

    def torch_gelu(x):
        return functional.gelu(x) + torch.tanh(x) * torch.exp(-x * x)

    operations: dict[str, tuple[Callable, Callable]] = {
        "scalar": (lambda p: jnp.sin(p["x"]) * jnp.exp(p["x"]), lambda p: torch.sin(p["x"]) * torch.exp(p["x"])),
        "mean": (lambda p: jnp.mean(jnp.square(p["x"])), lambda p: torch.mean(torch.square(p["x"]))),
        "elementwise": (lambda p: gelu(p["x"]), lambda p: torch_gelu(p["x"])),
        "softmax": (lambda p: jax.nn.softmax(p["x"], -1), lambda p: torch.softmax(p["x"], -1)),
        "layer": (lambda p: norm(p["x"]), lambda p: torch_norm(p["x"])),
        "matmul": (lambda p: p["x"] @ p["y"], lambda p: p["x"] @ p["y"]),
        "logsumexp": (lambda p: jax.nn.logsumexp(p["x"], -1), lambda p: torch.logsumexp(p["x"], -1)),
        "look-up": (lambda p: jnp.take(p["x"], ids, 0), lambda p: p["x"][torch.from_numpy(ids.astype(np.int64))]),
        "running": (lambda p: jnp.cumsum(p["x"], -1), lambda p: torch.cumsum(p["x"], -1)),
    }
    ours, theirs = operations[name.split(" ")[0]]
    out = jax.eval_shape(ours, {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in weights.items()})
    cotangent = rng.standard_normal(out.shape).astype(np.float32)
    pair = pair_of(
        lambda p, c: ours(p),
        lambda p, c: theirs(p),
        weights,
        torch_shapes={k: v.shape for k, v in weights.items()},
        loss=(lambda o, c: jnp.sum(o * c), lambda o, c: torch.sum(o * c)),
        name=name,
    )
    return pair, weights, (cotangent,)


# ------------------------------------------------------------------------------------------------ what is measured


def _lists() -> defaultdict[Any, list]:
    return defaultdict(list)


@dataclass
class Calibration:
    """What the draws gave so far; every list holds look / quantile, so Z itself is not in it."""

    seed: int
    planned: int
    draws: list[str] = field(default_factory=list)
    configurations: set = field(default_factory=set)
    compiled: set = field(default_factory=set)
    looks: dict[tuple[str, str, str, str], list[float]] = field(default_factory=_lists)
    """(twins or foreign, precision, side, look) -> values."""
    worst: dict[tuple[str, str, str, str], tuple[float, str]] = field(default_factory=dict)
    per_draw: list[tuple[float, str]] = field(default_factory=list)
    """Each draw's largest value."""
    tensors: int = 0
    verdicts: dict[str, int] = field(default_factory=dict)
    alarms: list[str] = field(default_factory=list)
    """Tensors that the thresholds in force did not let pass, with the evidence."""
    alarmed: int = 0
    """Draws with such a tensor."""
    lost: dict[str, list[tuple[float, str]]] = field(default_factory=_lists)
    conditioning: dict[str, list[tuple[float, str]]] = field(default_factory=_lists)
    """sigma / kappa: not judged by itself, because the unit of a long sum is a left-to-right one."""
    dwarf: list[tuple[float, str]] = field(default_factory=list)
    power: dict[tuple[str, str], list[float]] = field(default_factory=_lists)
    """(tensor kind, precision) -> smallest relative error seen, per unit of Z."""
    bugs: dict[str, list[float]] = field(default_factory=_lists)
    tied: list[str] = field(default_factory=list)
    """Draws with an expert choice inside the noise: another choice is as right, so they say nothing."""
    versions: dict[str, str | None] = field(default_factory=dict)

    def take(self, draw: Draw, findings: Findings) -> None:
        """Write down every tensor of one draw."""
        if findings.ties:
            self.tied.append(draw.label)
            return
        group = "twins" if draw.config is not None else "foreign"
        largest, alarmed = (0.0, ""), False
        self.draws.append(draw.label)
        if draw.config is not None:
            self.configurations.add(draw.config)
            if draw.compiled:
                self.compiled.add(draw.config)
        judged = {**findings.outputs, **{f"tap {k}": v for k, v in findings.taps.items()}}
        for name, judgement in judged.items():
            where = f"{name} of {draw.label}"
            self.tensors += 1
            sides: dict[str, Distance] = {"torch": judgement.torch}
            if draw.compiled:
                sides |= {"jax": judgement.jax, "pair": judgement.same}
            for side, distance in sides.items():
                values = list(distance.looks)
                if distance.broken or distance.nonfinite:
                    values.append(("exact", math.inf))
                for look, ratio in values:
                    key, value = (group, draw.precision, side, look), ratio * THRESHOLDS.z
                    self.looks[key].append(value)
                    if value > self.worst.get(key, (-1.0, ""))[0]:
                        self.worst[key] = value, where
                    largest = max(largest, (value, f"{side}, {look}: {where}"))
            noise = findings.values[name][3]
            self.verdicts[str(judgement.verdict)] = self.verdicts.get(str(judgement.verdict), 0) + 1
            if judgement.verdict not in ("AGREE", "UNDETERMINED"):
                self.alarms.append(f"{judgement.verdict}: {where}: {judgement.evidence}")
                alarmed = True
            if judgement.verdict == "UNDETERMINED":
                continue
            self.lost[group].append((judgement.lost, where))
            if noise.kappa > 0:
                self.conditioning[group].append((_rms(noise.sigma) / noise.kappa, where))
            if draw.compiled:
                self.dwarf.append((judgement.dwarf, where))
            if judgement.smallest_seen > 0:
                kind = _kind(name) if draw.config is not None else f"foreign: {draw.program}"
                self.power[kind, draw.precision].append(judgement.smallest_seen / THRESHOLDS.z)
        self.alarmed += alarmed
        self.per_draw.append(largest)

    @property
    def largest(self) -> float:
        return max((value for value, _ in self.per_draw), default=0.0)

    def record(self) -> dict[str, Any]:
        """Plain JSON: quantiles per stratum, never the values themselves."""
        return _strict(
            {
                "command": f"parity calibrate --draws {self.planned} --seed {self.seed}",
                "date": datetime.date.today().isoformat(),
                "versions": self.versions,
                "complete": len(self.draws) + len(self.tied) == self.planned,
                "draws": len(self.draws),
                "tied": len(self.tied),
                "configurations": len(self.configurations),
                "configurations_compiled": len(self.compiled),
                "tensors": self.tensors,
                "looks": sum(map(len, self.looks.values())),
                "largest": max(self.per_draw, default=(0.0, "")),
                "largest_per_draw": _quantiles([value for value, _ in self.per_draw]),
                "verdicts": self.verdicts,
                "alarms": self.alarms,
                "draws_alarmed": self.alarmed,
                "alarm_limit_95": alarm_limit(self.alarmed, len(self.draws)),
                "alarms_at": THRESHOLDS.z,
                "strata": [
                    dict(zip(("programs", "precision", "side", "look"), key))
                    | _quantiles(values)
                    | {"where": self.worst[key][1]}
                    for key, values in sorted(self.looks.items())
                ],
                "lost": {group: _ranked(values) for group, values in self.lost.items()},
                "sigma_over_kappa": {group: _ranked(values) for group, values in self.conditioning.items()},
                "dwarf": _ranked(self.dwarf),
                "smallest_error_per_z": [
                    {"tensor": kind, "precision": precision} | _quantiles(values)
                    for (kind, precision), values in sorted(self.power.items())
                ],
                "bugs": {
                    bug: {"draws": len(values), "smallest": min(values), "median": float(np.median(values))}
                    for bug, values in self.bugs.items()
                },
            }
        )


def supported(record: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The range that a record supports for each calibrated threshold: (at least, at most)."""
    largest = float(record["largest"][0])
    bounds = {"z": (MARGIN * largest, CEILING * MARGIN * largest)}
    for name, entries in (("unstable_ratio", record["lost"].values()), ("dwarf_ratio", [record["dwarf"]])):
        low = RATIO_MARGIN * max(float(entry["max"]) for entry in entries)
        bounds[name] = low, RATIO_MARGIN * low
    return bounds


def objections(record: Mapping[str, Any]) -> list[str]:
    """What speaks against the thresholds in force, in sentences; too few draws may accuse, but not of slack."""
    found = [f"a correct program was not let pass: {alarm}" for alarm in record["alarms"]]
    for name, (low, high) in supported(record).items():
        value = getattr(THRESHOLDS, name)
        if value < low:
            found.append(f"{name} = {value:g} is below {low:.3g}, the largest clean value with its margin")
        if value > high and record["draws"] >= FEWEST_DRAWS and record["configurations"] >= FEWEST_CONFIGURATIONS:
            found.append(f"{name} = {value:g} is above {high:.3g}: slack that no clean draw asks for")
    return found


def alarm_limit(alarms: int, draws: int, level: float = 0.95) -> float:
    """Clopper and Pearson's upper confidence limit of the share of false alarms; 3 / n for none of n."""
    from scipy.stats import beta

    return 1.0 if alarms >= draws else float(beta.ppf(level, alarms + 1, draws - alarms))


def calibrate(
    draws: int = DRAWS, seed: int = 0, progress: Progress | None = None, into: Calibration | None = None
) -> Calibration:
    """Run the planned draws; what is done stands in `into` even if the run is interrupted."""
    from parity.precision import manifest
    from parity.runner import prepare

    prepare()
    planned = plan(draws, seed)
    result = Calibration(seed, draws) if into is None else into
    versions = manifest()["versions"]
    result.versions = {name: versions[name] for name in ("numpy", "scipy", "jax", "jaxlib", "flax", "torch")}
    tell = progress or (lambda *_: None)
    prepared: tuple[Any, _Twins] | None = None
    for done, draw in enumerate(planned):
        tell(done, draws, draw.label)
        if draw.config is None:
            pair, weights, inputs = foreign_pairs(draw.seed, draw.program)[draw.program]
            result.take(draw, _judge(pair)(weights, inputs, draw.precision))
            gc.collect()  # a million elements and their draws
            continue
        if prepared is None or prepared[0] is not draw.config:
            prepared = draw.config, _Twins(draw.config)
        weights, inputs = prepared[1].inputs(draw)
        result.take(draw, prepared[1].judge(draw.compiled)(weights, inputs, draw.precision))
        if draw.precision == "float32":
            for bug, value in prepared[1].bugs(draw, weights, inputs):
                result.bugs[bug].append(value)
    tell(draws, draws, "")
    return result


class _Twins:
    """The twins of one configuration with their judge, and the torch sides that carry a known bug."""

    def __init__(self, config: Any):
        from parity.fixtures import twins

        self.config = config
        self.twins = twins("calibration", config)
        # The interpreted reference does not err, so beside it every kernel "errs many times as much".
        lenient = dataclasses.replace(THRESHOLDS, dwarf_ratio=math.inf)
        both, alone = _judge(self.twins.pair), _judge(self.twins.pair, lenient)
        alone.tracer = both.tracer
        stand_in: Any = _Interpreted(alone)
        alone.cpu = alone.far = stand_in, both.cpu[1]
        self.judges = {True: both, False: alone}
        self.known: tuple[Any, Any] | None = None

    def judge(self, compiled: bool) -> Judge:
        return self.judges[compiled]

    def inputs(self, draw: Draw) -> tuple[Mapping[str, np.ndarray], tuple[np.ndarray, ...]]:
        """Weights and batch; the same objects for draws that share them, so that they share the noise."""
        from parity.fixtures import clear_experts, stress_batch, weights_of

        key = (draw.regime, draw.seed)
        if self.known is None or self.known[0] != key:
            weights = weights_of("calibration", draw.regime, draw.seed, config=self.config)
            # float64 comes first and shares with float32: the batch must be clear for that.
            narrow = "float32" if draw.precision == "float64" else draw.precision
            batch = stress_batch(self.config, draw.seed, clear=clear_experts(self.twins, weights, narrow))
            self.known = key, (weights, batch)
        return self.known[1]

    def bugs(self, draw: Draw, weights, inputs) -> Iterator[tuple[str, float]]:
        """Known bugs that np.allclose on float32 logits lets through: (name, the largest look / quantile)."""
        import copy

        import torch

        from omni_torch.thinker import ThinkerLM
        from parity.precision import unit_roundoff
        from parity.sides import TorchSide

        judge = self.judges[draw.compiled]
        reference, noise, _ = judge._named(judge.noise(weights, inputs, "float32"))
        unit = unit_roundoff("float32")
        for bug in ("RMSNorm eps 1e-6 for 1e-5", "RoPE theta 10001 for 10000"):
            pair = copy.copy(self.twins.pair)
            if bug.startswith("RoPE"):
                if self.config.head_dim < 4:
                    continue  # with one frequency, 1, theta has no effect
                with torch.device("cpu"):
                    pair.torch = ThinkerLM.from_config(dataclasses.replace(self.config, rope_theta=10001.0)).eval()
            else:
                pair.torch = copy.deepcopy(pair.torch)
                for module in pair.torch.modules():
                    if hasattr(module, "eps"):
                        module.eps = 1e-6
            wrong, _ = TorchSide(pair)(weights, inputs, "float32")
            looks = [
                measure(subtract(wrong[k], reference[k]), noise[k].sigma * unit, noise[k].dof).excess for k in wrong
            ]
            yield bug, max(looks) * THRESHOLDS.z


def _judge(pair: Pair, limits: Thresholds = THRESHOLDS) -> Judge:
    from parity.judge import Judge

    return Judge(pair, limits=limits)


class _Interpreted:
    """In the JAX side's place: the interpreted reference itself, so that nothing is compiled."""

    def __init__(self, judge: Judge):
        self.judge = judge

    def __call__(self, weights, inputs, precision):
        model = self.judge.noise(weights, inputs, precision)
        return self.judge._named(model)[0], dict(model.taps)


def _kind(name: str) -> str:
    """ "gradient blocks.1.attn.q.weight" -> "gradient attn.q.weight"; "tap blocks.0" -> "tap block"."""
    name = re.sub(r"experts\.\d+", "experts", name)
    return re.sub(r"blocks\.\d+$", "block", re.sub(r"blocks\.\d+\.", "", name))


def _rms(array: np.ndarray) -> float:
    return math.sqrt(float(np.mean(np.square(np.asarray(array, np.float64))))) if np.size(array) else 0.0


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {"count": 0, "median": 0.0, "p99": 0.0, "max": 0.0}
    middle, high = np.quantile(values, [0.5, 0.99], method="higher")
    return {"count": len(values), "median": float(middle), "p99": float(high), "max": float(max(values))}


def _ranked(values: Sequence[tuple[float, str]]) -> dict[str, Any]:
    return _quantiles([value for value, _ in values]) | {"where": max(values, default=(0.0, ""))[1]}


def _strict(value: Any) -> Any:
    """Four digits are enough for a record, and strict JSON has no infinity."""
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value
