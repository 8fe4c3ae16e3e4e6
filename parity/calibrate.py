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
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parity.verdict import THRESHOLDS, Distance, Noise, subtract

if TYPE_CHECKING:
    from parity.judge import Findings, Judge
    from parity.pair import Pair

__all__ = [
    "CEILING",
    "DRAWS",
    "MARGIN",
    "RATIO_MARGIN",
    "RECORD",
    "Calibration",
    "Draw",
    "calibrate",
    "foreign_pairs",
    "plan",
    "random_config",
    "supported",
]

RECORD = Path(__file__).parent / "assets" / "calibration.json"
DRAWS = 300
MARGIN = 1.25
"""Z must stand at least this factor above the largest clean value of the record: seeds and kernels to come."""
CEILING = 2.0
"""... and at most this factor, or the threshold is slack that nobody measured."""
RATIO_MARGIN = 4.0
"""The bounds on ratios of scales (sigma / kappa, error / error) vary by powers of two: at least this factor above."""
PER_CONFIGURATION = 5
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
        kind = "gelu swiglu".split()[c.use_swiglu] + f" {c.num_experts_per_tok}/{c.num_experts}" * c.use_moe
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
    """The draws in their order: each configuration in four precisions and a second float32, then one foreign pair."""
    names = list(foreign_pairs(0, sizes_only=True))
    foreign = [(name, precision) for precision in ("float64", "float32", "bfloat16", "float16") for name in names]
    planned: list[Draw] = []
    index = 0
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
        name, precision = foreign[index % len(foreign)]
        planned.append(Draw(name, None, "foreign", base + 3, precision, True))
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
        "elementwise 1e6": ((1000, 1000),),
        "elementwise 1": ((1,),),
        "softmax 700 x 900": ((700, 900),),
        "softmax 2": ((1, 2),),
        "layer norm 700 x 900": ((700, 900),),
        "layer norm 1 x 7": ((1, 7),),
        "matmul 300 x 1000 x 500": ((300, 1000), (1000, 500)),
        "matmul 1 x 3 x 1": ((1, 3), (3, 1)),
        "logsumexp 700 x 900": ((700, 900),),
        "look-up 5000 of 50": ((50, 16),),
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
        return jax.nn.gelu(x, approximate=False) + jnp.tanh(x) * jnp.exp(-x * x)

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


@dataclass
class Calibration:
    """What the draws gave so far; every list holds look / quantile, so Z itself is not in it."""

    seed: int
    planned: int
    draws: list[str] = field(default_factory=list)
    configurations: set = field(default_factory=set)
    compiled: set = field(default_factory=set)
    looks: dict[tuple[str, str, str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    """(twins or foreign, precision, side, look) -> values."""
    worst: dict[tuple[str, str, str, str], tuple[float, str]] = field(default_factory=dict)
    per_draw: list[tuple[float, str]] = field(default_factory=list)
    """Each draw's largest value."""
    tensors: int = 0
    conditioning: list[tuple[float, str]] = field(default_factory=list)
    errors: list[tuple[float, str]] = field(default_factory=list)
    power: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    """(tensor kind, precision) -> smallest relative error seen, per unit of Z."""
    bugs: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    tied: list[str] = field(default_factory=list)
    """Draws with an expert choice inside the noise: another choice is as right, so they say nothing."""
    versions: dict[str, str | None] = field(default_factory=dict)

    def take(self, draw: Draw, findings: Findings) -> None:
        """Write down every tensor of one draw."""
        if findings.ties:
            self.tied.append(draw.label)
            return
        group = "twins" if draw.config is not None else "foreign"
        largest = (0.0, "")
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
            ours, theirs, reference, noise = findings.values[name]
            self._scales(draw, where, ours, theirs, reference, noise)
            if judgement.verdict != "UNDETERMINED" and judgement.smallest_seen > 0:
                kind = _kind(name) if draw.config is not None else f"foreign: {draw.program}"
                self.power[kind, draw.precision].append(judgement.smallest_seen / THRESHOLDS.z)
        self.per_draw.append(largest)

    def _scales(self, draw, where, ours, theirs, reference, noise: Noise) -> None:
        from parity.precision import unit_roundoff

        if noise.kappa > 0:
            self.conditioning.append((_rms(noise.sigma) / noise.kappa, where))
        if draw.compiled and reference.size >= 64:
            floor = unit_roundoff(draw.precision) * _rms(np.where(np.isfinite(reference), reference, 0.0))
            errors = sorted(max(_rms(subtract(side, reference)), floor) for side in (ours, theirs))
            if errors[0] > 0:
                self.errors.append((errors[1] / errors[0], where))

    @property
    def largest(self) -> float:
        return max((value for value, _ in self.per_draw), default=0.0)

    @property
    def alarms(self) -> list[str]:
        """Draws that the thresholds in force would have called DIFFER."""
        return [f"{value:.2f} {where}" for value, where in self.per_draw if value > THRESHOLDS.z]

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
                "alarms": len(self.alarms),
                "alarm_limit_95": alarm_limit(len(self.alarms), len(self.draws)),
                "alarms_at": THRESHOLDS.z,
                "strata": [
                    dict(zip(("programs", "precision", "side", "look"), key))
                    | _quantiles(values)
                    | {"where": self.worst[key][1]}
                    for key, values in sorted(self.looks.items())
                ],
                "sigma_over_kappa": _quantiles([v for v, _ in self.conditioning])
                | {"where": max(self.conditioning, default=(0.0, ""))[1]},
                "error_ratio": _quantiles([v for v, _ in self.errors])
                | {"where": max(self.errors, default=(0.0, ""))[1]},
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
    for name, key in (("unstable_ratio", "sigma_over_kappa"), ("dwarf_ratio", "error_ratio")):
        low = RATIO_MARGIN * float(record[key]["max"])
        bounds[name] = low, CEILING**2 * low
    return bounds


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
        self.judges = {True: _judge(self.twins.pair)}
        self.judges[False] = _judge(self.twins.pair)
        self.judges[False].tracer = self.judges[True].tracer
        self.judges[False].cpu = self.judges[False].far = _Interpreted(self.judges[False]), self.judges[True].cpu[1]
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
        from parity.verdict import measure

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


def _judge(pair: Pair) -> Judge:
    from parity.judge import Judge

    return Judge(pair)


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


def _strict(value: Any) -> Any:
    """Four digits are enough for a record, and strict JSON has no infinity."""
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value


def write(record: Mapping[str, Any], path: str | Path) -> None:
    """One stratum a line, so that a difference between two records is readable."""
    lines = []
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            inner = ",\n  ".join(json.dumps(item, allow_nan=False) for item in value)
            lines.append(f' "{key}": [\n  {inner}\n ]')
        else:
            lines.append(f' "{key}": {json.dumps(value, allow_nan=False)}')
    Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
