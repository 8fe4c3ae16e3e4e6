"""Where the thresholds come from: what correct programs score, and what known bugs score, in noise units.

A draw is a program that is right by construction (the twins in a random configuration, a foreign pair of a few
primitives, or a whole check with other constants) with weights, inputs, precisions and thread counts; no two draws are
equal. Every tensor of it is looked at as `parity.verdict` looks, and each look is written down as look / quantile: the
Z that would just have let it pass. The record (`RECORD`) holds the distribution, what each check of `parity list`
scored, the Z that all of it supports, and the smallest relative error that would have been seen; a test holds
`THRESHOLDS` to it, and docs/decisions/0001 tells the story.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parity import clean
from parity.foreign import SHAPES, foreign_pair
from parity.verdict import THRESHOLDS, Distance, Thresholds, Verdict, measure, subtract

if TYPE_CHECKING:
    from parity.judge import Findings, Judge
    from parity.pair import Pair
    from parity.result import CheckResult, Row

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
    "Outcome",
    "alarm_limit",
    "calibrate",
    "objections",
    "outcome_of",
    "plan",
    "random_config",
    "supported",
]

RECORD = Path(__file__).parent / "assets" / "calibration.json"
DRAWS = 1222
"""56 configurations of the twins with the foreign pairs beside them, and 10 sets of constants of nearly every check."""
MARGIN = 1.25
"""Z must stand at least this factor above the largest clean value of the record: seeds and kernels to come."""
CEILING = 2.0
"""... and at most this factor, or the threshold is slack that nobody measured."""
RATIO_MARGIN = 3.0
"""The bounds on ratios of errors vary more: at least this factor above the largest clean one, at most its square."""
FEWEST_DRAWS, FEWEST_CONFIGURATIONS = 1000, 50
"""A record with fewer says nothing about the thresholds being too wide."""
COMPILE_EVERY = 5
"""Every fifth configuration runs on the JAX side too: a compilation for each new set of shapes costs seconds."""
CHECKS_PER_CONFIGURATION = 16
"""So many runs of checks for each configuration of the twins."""
FOREIGN = "foreign pairs"

Progress = Callable[[int, int, str], None]
Told = tuple[float, str]
"""A value, and where it was seen."""


@dataclass(frozen=True)
class Draw:
    """One clean draw; `program` is "twins" (with a configuration), the name of a foreign pair, or of a check."""

    program: str
    config: Any
    regime: str
    seed: int
    precision: str
    """Of a check "", which means those that it looks at."""
    compiled: bool
    """Both sides run. Otherwise torch alone does, against the interpreted reference of the JAX program."""
    variant: int = 0
    """Of a check: which set of constants (parity.clean.settings)."""
    full: bool = False
    torch_threads: int = 1
    xla_threads: int = 0
    """0: as many as there are cores."""

    @property
    def kind(self) -> str:
        return "twins" if self.config is not None else "checks" if self.program in clean.CHECKS else "foreign"

    @property
    def label(self) -> str:
        if self.kind == "foreign":
            return f"{self.program}, seed {self.seed}, {self.precision}"
        if self.kind == "checks":
            parts = (
                f"{self.program}, constants {self.variant}",
                self.regime,
                f"seed {self.seed}",
                "in full" * self.full,
            )
            return ", ".join(part for part in parts if part)
        c = self.config
        kind = ("gelu", "swiglu")[c.use_swiglu] + f" {c.num_experts_per_tok}/{c.num_experts}" * c.use_moe
        return (
            f"L{c.n_layers} D{c.d_model} H{c.n_heads}/{c.kv_heads} F{c.d_ff} V{c.vocab_size} {kind}, {self.regime}, "
            f"seed {self.seed}, {self.precision}"
        )

    @property
    def threads(self) -> str:
        xla = f"{self.xla_threads}" if self.xla_threads else "as many as cores"
        return f"torch {self.torch_threads}, XLA {xla}"


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
    """The draws in their order: any beginning of them has its share of the twins, of foreign pairs and of every check.

    For each configuration of the twins four draws, then a small foreign pair and often a large one, then some runs of
    checks. Thread counts go round in all of them.
    """
    precisions = ("float64", "float32", "bfloat16", "float16")
    small, large = (
        [(n, p) for p in precisions for n, shapes in SHAPES.items() if (math.prod(shapes[0]) < 1000) is least]
        for least in (True, False)
    )
    planned: list[Draw] = []
    runs, run_so_far = _check_runs(seed), 0
    big = 0
    for index in itertools.count():
        if len(planned) >= draws:
            return planned[:draws]
        rng = np.random.default_rng([seed, 11, index])
        config, compiled = random_config(rng), index % COMPILE_EVERY == 0
        regimes = ("randomised", "fresh") if index % 2 else ("fresh", "randomised")
        base = 1_000_000 * seed + 10 * index
        threads: dict[str, Any] = {"torch_threads": 1 + index // 2 % 2, "xla_threads": index % 2}
        # float64 and float32 share weights, inputs and so the draws of the noise; the others have their own.
        planned += [
            Draw("twins", config, regimes[0], base, "float64", compiled, **threads),
            Draw("twins", config, regimes[0], base, "float32", compiled, **threads),
            Draw("twins", config, regimes[1], base + 1, "bfloat16", compiled and index % 2 == 0, **threads),
            Draw("twins", config, regimes[1], base + 2, ("float32", "float16")[index % 2], False, **threads),
        ]
        foreign = [small[index % len(small)]]
        if index % 7 not in (0, 2, 4):
            foreign.append(large[big % len(large)])
            big += 1
        planned += [Draw(name, None, "foreign", base + 3, p, True, **threads) for name, p in foreign]
        while run_so_far < CHECKS_PER_CONFIGURATION * (index + 1):
            group = next(runs)
            planned += group
            run_so_far += len(group)
    raise AssertionError


def _check_runs(seed: int) -> Iterator[list[Draw]]:
    """Set after set of constants of every check, each with so many seeds as RUNS says."""
    for variant in itertools.count():
        for check, runs in clean.RUNS.items():
            yield [
                Draw(
                    check, None, ("fresh", "randomised")[(variant + i) % 2] if check in clean.OF_WEIGHTS else "",
                    1_000_000 * seed + 10_000 + 10 * variant + i, "", True,
                    variant=10 * variant + i if check in clean.SEEDLESS else variant,
                    full=clean.in_full(check, variant, i), torch_threads=1 + i % 2, xla_threads=variant % 2,
                )
                for i in range(runs)
            ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ what is measured


@dataclass
class Outcome:
    """What one draw gave, as plain JSON; every value of a look is look / quantile, so Z itself is not in it."""

    label: str
    kind: str
    precision: str
    configuration: str
    compiled: bool
    threads: str
    looks: list[tuple[str, str, float, str]] = field(default_factory=list)
    """(side, look, value, tensor), of the twins and foreign pairs."""
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By check of `parity list`: tensors, verdicts, the largest value ("z") and share of another bound ("share")."""
    alarms: list[str] = field(default_factory=list)
    """Tensors that the thresholds in force did not let pass, with the evidence."""
    lost: list[Told] = field(default_factory=list)
    conditioning: list[Told] = field(default_factory=list)
    """sigma / kappa: not judged by itself, because the unit of a long sum is a left-to-right one."""
    dwarf: list[Told] = field(default_factory=list)
    power: list[tuple[str, float]] = field(default_factory=list)
    """(tensor kind, smallest relative error seen, per unit of Z)."""
    bugs: list[tuple[str, float]] = field(default_factory=list)
    tied: bool = False
    """An expert choice is inside the noise: another one is as right, so the draw says nothing."""
    error: str = ""
    """Why the check could not look."""

    @property
    def largest(self) -> Told:
        return max((entry["z"], f"{entry['where']} of {self.label}") for entry in self.checks.values())


def outcome_of(draw: Draw) -> Outcome:
    """Run one draw in this process."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(draw.torch_threads)
    try:
        if draw.kind == "checks":
            constants = clean.settings(draw.program, draw.variant)
            return of_check(draw, clean.run(draw.program, constants, draw.regime, draw.seed, draw.full))
        if draw.kind == "foreign":
            pair, weights, inputs = foreign_pair(draw.program, draw.seed)
            outcome = of_findings(draw, _judge(pair)(weights, inputs, draw.precision))
            gc.collect()  # a million elements and their draws
            return outcome
        prepared = _prepared(draw.config)
        weights, inputs = prepared.inputs(draw)
        outcome = of_findings(draw, prepared.judge(draw.compiled)(weights, inputs, draw.precision))
        if draw.precision == "float32":
            outcome.bugs = list(prepared.bugs(draw, weights, inputs))
        return outcome
    finally:
        torch.set_num_threads(before)


def _begun(draw: Draw) -> Outcome:
    configuration = {"twins": repr(draw.config), "foreign": draw.program}.get(
        draw.kind, f"{draw.program} {draw.variant}"
    )
    return Outcome(draw.label, draw.kind, draw.precision, configuration, draw.compiled, draw.threads)


def _entry() -> dict[str, Any]:
    return {"tensors": 0, "verdicts": {}, "z": 0.0, "where": "", "share": 0.0, "share of": "", "alarms": 0}


def _noted(entry: dict[str, Any], verdict: Verdict) -> None:
    entry["tensors"] += 1
    entry["verdicts"][str(verdict)] = entry["verdicts"].get(str(verdict), 0) + 1
    entry["alarms"] += verdict not in (Verdict.AGREE, Verdict.UNDETERMINED)


def of_findings(draw: Draw, findings: Findings) -> Outcome:
    """Every tensor of a draw of the twins, or of a foreign pair."""
    outcome = _begun(draw)
    if findings.ties:
        outcome.tied = True
        return outcome
    judged = {**findings.outputs, **{f"tap {k}": v for k, v in findings.taps.items()}}
    for name, judgement in judged.items():
        check = FOREIGN
        if draw.kind == "twins":
            check = "gradients" if name == "loss" or name.startswith("gradient ") else "logits"
        entry = outcome.checks.setdefault(check, _entry())
        _noted(entry, judgement.verdict)
        sides: dict[str, Distance] = {"torch": judgement.torch}
        if draw.compiled:
            sides |= {"jax": judgement.jax, "pair": judgement.same}
        for side, distance in sides.items():
            values = list(distance.looks)
            if distance.broken or distance.nonfinite:
                values.append(("exact", math.inf))
            for look, ratio in values:
                value = ratio * THRESHOLDS.z
                outcome.looks.append((side, look, value, name))
                if value > entry["z"]:
                    entry["z"], entry["where"] = value, f"{side}, {look}: {name}"
        if judgement.verdict not in (Verdict.AGREE, Verdict.UNDETERMINED):
            outcome.alarms.append(f"{judgement.verdict}: {name} of {draw.label}: {judgement.evidence}")
        if judgement.verdict is Verdict.UNDETERMINED:
            continue
        noise = findings.values[name][3]
        outcome.lost.append((judgement.lost, name))
        if noise.kappa > 0:
            outcome.conditioning.append((_rms(noise.sigma) / noise.kappa, name))
        if draw.compiled:
            outcome.dwarf.append((judgement.dwarf, name))
        if judgement.smallest_seen > 0:
            kind = _kind(name) if draw.kind == "twins" else f"foreign: {draw.program}"
            outcome.power.append((kind, judgement.smallest_seen / THRESHOLDS.z))
    return outcome


def of_check(draw: Draw, result: CheckResult) -> Outcome:
    """Every row that decides of one run of a check."""
    outcome = _begun(draw)
    outcome.error = result.error or ""
    entry = outcome.checks.setdefault(draw.program, _entry())
    for row in result.deciding:
        _noted(entry, row.verdict)
        name = f"{row.name}, {row.precision}"
        if row.verdict not in (Verdict.AGREE, Verdict.UNDETERMINED):
            outcome.alarms.append(f"{row.verdict}: {name} of {draw.label}: {row.evidence}")
        # An infinite excess of what must be equal bit by bit is a verdict, and no distance.
        value = row.excess if row.excess is not None and math.isfinite(row.excess) else 0.0
        if _in_noise_units(row):
            if value * THRESHOLDS.z > entry["z"]:
                entry["z"], entry["where"] = value * THRESHOLDS.z, name
        elif value > entry["share"]:
            entry["share"], entry["share of"] = value, name
    return outcome


def _in_noise_units(row: Row) -> bool:
    """Against the threshold of a tensor; other rows have a level of significance or an envelope."""
    return any(z is not None for z in (row.z_same, row.z_jax, row.z_torch))


@dataclass
class Calibration:
    """What the draws gave so far."""

    seed: int
    planned: int
    outcomes: list[Outcome] = field(default_factory=list)
    versions: dict[str, str | None] = field(default_factory=dict)

    @property
    def told(self) -> list[Outcome]:
        """Those that say something."""
        return [o for o in self.outcomes if not o.tied and not o.error]

    @property
    def largest(self) -> float:
        return max((o.largest[0] for o in self.told), default=0.0)

    @property
    def alarmed(self) -> int:
        return sum(bool(o.alarms) for o in self.outcomes)

    def record(self) -> dict[str, Any]:
        """Plain JSON: quantiles per stratum, never the values themselves."""
        told = self.told
        twins = {kind: {o.configuration for o in told if o.kind == kind} for kind in ("twins", "checks")}
        looks: dict[tuple[str, str, str, str], list[Told]] = _lists()
        power: dict[tuple[str, str], list[float]] = _lists()
        bugs: dict[str, list[float]] = _lists()
        ratios: dict[str, dict[str, list[Told]]] = {"lost": _lists(), "conditioning": _lists(), "dwarf": _lists()}
        for o in told:
            for side, look, value, name in o.looks:
                looks[o.kind, o.precision, side, look].append((value, f"{name} of {o.label}"))
            for kind, value in o.power:
                power[kind, o.precision].append(value)
            for bug, value in o.bugs:
                bugs[bug].append(value)
            for what, groups in ratios.items():
                if seen := getattr(o, what):
                    groups[o.kind] += [(value, f"{name} of {o.label}") for value, name in seen]
        per_draw = [o.largest[0] for o in told]
        return _strict(
            {
                "command": f"parity calibrate --draws {self.planned} --seed {self.seed}",
                "date": datetime.date.today().isoformat(),
                "versions": self.versions,
                "complete": len(self.outcomes) == self.planned,
                "draws": len(told),
                "tied": sum(o.tied for o in self.outcomes),
                "configurations": len(twins["twins"]),
                "configurations_compiled": len({o.configuration for o in told if o.kind == "twins" and o.compiled}),
                "constants": len(twins["checks"]),
                "tensors": sum(entry["tensors"] for o in told for entry in o.checks.values()),
                "looks": sum(len(o.looks) for o in told),
                "threads": dict(sorted(Counter(o.threads for o in told).items())),
                "largest": max((o.largest for o in told), default=(0.0, "")),
                "largest_per_draw": _quantiles(per_draw),
                "verdicts": _verdicts(entry for o in told for entry in o.checks.values()),
                "alarms": [alarm for o in self.outcomes for alarm in o.alarms],
                "draws_alarmed": self.alarmed,
                "alarm_limit_95": alarm_limit(self.alarmed, len(told)),
                "alarms_at": THRESHOLDS.z,
                "could_not_look": [f"{o.label}: {o.error}" for o in self.outcomes if o.error],
                "checks": [self._check(name) for name in _listed(told)],
                "strata": [
                    dict(zip(("programs", "precision", "side", "look"), key)) | _ranked(values)
                    for key, values in sorted(looks.items())
                ],
                "lost": {kind: _ranked(values) for kind, values in ratios["lost"].items()},
                "sigma_over_kappa": {kind: _ranked(values) for kind, values in ratios["conditioning"].items()},
                "dwarf": _ranked([value for values in ratios["dwarf"].values() for value in values]),
                "smallest_error_per_z": [
                    {"tensor": kind, "precision": precision} | _quantiles(values)
                    for (kind, precision), values in sorted(power.items())
                ],
                "bugs": {
                    bug: {"draws": len(values), "smallest": min(values), "median": float(np.median(values))}
                    for bug, values in bugs.items()
                },
                "again": [
                    {"label": o.label, "tensors": sum(e["tensors"] for e in o.checks.values()), "largest": o.largest[0]}
                    for o in _first(told)
                ],
            }
        )

    def _check(self, name: str) -> dict[str, Any]:
        """What one check scored in all its draws."""
        seen = [o for o in self.told if name in o.checks]
        entries = [o.checks[name] for o in seen]
        alarmed = sum(bool(entry["alarms"]) for entry in entries)
        return {
            "check": name,
            "draws": len(seen),
            "configurations": len({o.configuration for o in seen}),
            "tensors": sum(entry["tensors"] for entry in entries),
            "verdicts": _verdicts(entries),
            "largest": max((entry["z"], f"{entry['where']} of {o.label}") for o, entry in zip(seen, entries)),
            "share": max((entry["share"], f"{entry['share of']} of {o.label}") for o, entry in zip(seen, entries)),
            "draws_alarmed": alarmed,
            "alarm_limit_95": alarm_limit(alarmed, len(seen)),
        }


def _lists() -> defaultdict[Any, list]:
    return defaultdict(list)


def _listed(told: Iterable[Outcome]) -> list[str]:
    """The checks that were drawn, in the order of `parity list`, then the foreign pairs."""
    from parity.checks import CHECKS

    seen = {name for o in told for name in o.checks}
    return [name for name in (*CHECKS, FOREIGN) if name in seen]


def _first(told: Iterable[Outcome]) -> list[Outcome]:
    """The first configuration of the twins, and the first draw of everything else: what a test makes again."""
    first: dict[Any, Outcome] = {}
    for o in told:
        what = (o.kind, o.precision if o.kind == "twins" else tuple(o.checks))
        first.setdefault(what, o)
    return list(first.values())


def _verdicts(entries: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for entry in entries:
        total.update(entry["verdicts"])
    return dict(total)


def supported(record: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The range that a record supports for each calibrated threshold: (at least, at most)."""
    largest = float(record["largest"][0])
    bounds = {"z": (MARGIN * largest, CEILING * MARGIN * largest)}
    for name, entries in (("unstable_ratio", record["lost"].values()), ("dwarf_ratio", [record["dwarf"]])):
        low = RATIO_MARGIN * max((float(entry["max"]) for entry in entries), default=0.0)
        bounds[name] = low, RATIO_MARGIN * low
    return bounds


def objections(record: Mapping[str, Any]) -> list[str]:
    """What speaks against the thresholds in force, in sentences; too few draws may accuse, but not of slack."""
    found = [f"a correct program was not let pass: {alarm}" for alarm in record["alarms"]]
    found += [f"a correct program could not be looked at: {words}" for words in record["could_not_look"]]
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
    draws: int = DRAWS,
    seed: int = 0,
    progress: Progress | None = None,
    into: Calibration | None = None,
    journal: str | Path | None = None,
) -> Calibration:
    """Run the planned draws; what is done stands in `into` even if the run is interrupted.

    With `journal`, a file, each draw is written there as soon as it is done, and those that stand there are not run
    again.
    """
    from parity.journal import Journal
    from parity.precision import manifest
    from parity.runner import prepare

    prepare()
    planned = plan(draws, seed)
    result = Calibration(seed, draws) if into is None else into
    versions = manifest()["versions"]
    result.versions = {name: versions[name] for name in ("numpy", "scipy", "jax", "jaxlib", "flax", "torch")}
    kept = Journal(journal, {"seed": seed, "versions": result.versions})
    tell = progress or (lambda *_: None)
    with Processes() as processes:
        for done, draw in enumerate(planned):
            tell(done, draws, draw.label)
            outcome = kept.done.get(draw.label)
            if outcome is None:
                outcome = processes(draw)
                kept.add(outcome)
            result.outcomes.append(outcome)
    tell(draws, draws, "")
    return result


class Processes:
    """This process, and beside it one whose XLA has a single thread: how many there are is settled at its start."""

    def __init__(self) -> None:
        self.single: Any = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.single is not None:
            self.single.shutdown(cancel_futures=True)

    def __call__(self, draw: Draw) -> Outcome:
        if not draw.xla_threads:
            return outcome_of(draw)
        import multiprocessing
        import os
        from concurrent.futures import ProcessPoolExecutor

        if self.single is None:
            context = multiprocessing.get_context("spawn")
            self.single = ProcessPoolExecutor(1, mp_context=context, initializer=_begin)
            before = os.environ.get(XLA_THREADS)
            os.environ[XLA_THREADS] = "1"
            try:
                return self.single.submit(outcome_of, draw).result()
            finally:
                del os.environ[XLA_THREADS]
                if before is not None:
                    os.environ[XLA_THREADS] = before
        return self.single.submit(outcome_of, draw).result()


XLA_THREADS = "NPROC"
"""What XLA's CPU client reads, once, for the number of its threads."""


def _begin() -> None:
    """Of the other process: Ctrl-C is for the first one."""
    import multiprocessing
    import os
    import signal
    import threading

    from parity.runner import prepare

    def follow() -> None:
        first = multiprocessing.parent_process()
        if first is not None:
            first.join()
        os._exit(1)  # it was killed

    threading.Thread(target=follow, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare()


_KEPT: dict[Any, Any] = {}


def _prepared(config: Any) -> _Twins:
    """The twins of one configuration, until another is asked for."""
    if config not in _KEPT:
        _KEPT.clear()
        _KEPT[config] = _Twins(config)
    return _KEPT[config]


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
