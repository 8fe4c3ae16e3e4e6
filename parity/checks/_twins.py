"""The runs that the logits and gradients checks share: each case is traced, measured and run once per process."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from parity.checks import Progress, Scope
from parity.errors import Misuse
from parity.fixtures import (
    CONFIGS,
    REGIMES,
    Twins,
    calls_batch,
    clear_experts,
    loud_weights,
    stress_batch,
    tied_weights,
    twins,
    weights_of,
)
from parity.judge import Findings, Judge
from parity.precision import resolve_device
from parity.result import Control, Row, row_from_judgement
from parity.verdict import THRESHOLDS, Verdict, accepts, judge_tensor

__all__ = ["Case", "cases", "eps_control", "simple_controls"]

FAMILIAR_BOUND = 1e-3
"""The bound that ports are usually held to, here only to show what it lets through; no verdict uses it."""


@dataclass(frozen=True)
class Case:
    """One configuration in one regime, in one precision, with what both sides gave."""

    config: str
    regime: str
    precision: str
    main: Findings
    calls: Findings | None
    """The calls of other shapes (T = 1, far positions ...): in float64, in one regime."""
    tied: Row | None = None
    """Those with tied experts, where there are experts."""


@dataclass
class _Prepared:
    twins: Twins
    judge: Judge
    calls: Judge


_PREPARED: dict[Any, _Prepared] = {}
_CASES: dict[Any, Case] = {}


def cases(scope: Scope, progress: Progress, regimes: tuple[str, ...] = ()) -> Iterator[Case]:
    """Every case of the scope, in the order configuration, regime, precision."""
    wanted = [
        (config, regime, precision)
        for config in scope.configs or ((Path(scope.checkpoint).name,) if scope.checkpoint else tuple(CONFIGS))
        for regime in scope.regimes or (("trained",) if scope.checkpoint else REGIMES)
        for precision in scope.precisions
    ]
    for done, (config, regime, precision) in enumerate(wanted):
        progress(done, len(wanted), f"{config}, {regime}, {precision}")
        yield _case(scope, config, regime, precision)
    progress(len(wanted), len(wanted), "")


def _prepare(scope: Scope, config: str) -> _Prepared:
    key = (config, scope.configs, scope.device, scope.draws, scope.seed, scope.checkpoint)
    if key not in _PREPARED:
        devices = resolve_device(scope.device)
        shared = {"draws": scope.draws, "seed": scope.seed, "devices": devices, "device": scope.device}
        named = scope.configs[0] if scope.configs else None
        made = twins(config, checkpoint_config(scope.checkpoint, named) if scope.checkpoint else None)
        # With loud scores at far positions a single near tie of two keys has nearly all of a tensor's error, and which
        # side has more of it is luck: that one errs more says nothing here.
        loud = replace(THRESHOLDS, dwarf_ratio=math.inf)
        calls = Judge(made.calls, shares=False, limits=loud, **shared)
        _PREPARED[key] = _Prepared(made, Judge(made.pair, **shared), calls)
    return _PREPARED[key]


def _case(scope: Scope, config: str, regime: str, precision: str) -> Case:
    key = (config, regime, precision, scope)
    if key not in _CASES:
        prepared = _prepare(scope, config)
        weights, batch = _inputs(scope, config, regime)
        main = prepared.judge(weights, batch, precision)
        calls = tied = None
        regimes = scope.regimes or (("trained",) if scope.checkpoint else REGIMES)
        if precision == "float64" and regime == ("randomised" if "randomised" in regimes else regimes[0]):
            loud = loud_weights(prepared.twins.config, weights)
            others = calls_batch(batch[0], batch[2])
            calls = prepared.calls(loud, others, precision)
            if prepared.twins.config.use_moe:
                tied = _tied(prepared.calls(tied_weights(weights), others, precision), config, regime)
        _CASES[key] = Case(config, regime, precision, main, calls, tied)
    return _CASES[key]


def _tied(found: Findings, config: str, regime: str) -> Row:
    """Of experts that are equal to the bit the lowest are chosen: nothing is excused as a tie within the noise."""
    ours, theirs, truth, noise = found.values["default positions"]
    judgement = judge_tensor(ours, theirs, truth, noise, _unit("float64"), noisy_reference=True)
    fields = {"check": "logits", "config": config, "regime": regime, "precision": "float64", "device": found.device}
    return row_from_judgement(judgement, name="tied experts", shape=truth.shape, **fields)


@lru_cache(maxsize=64)
def _inputs(scope: Scope, config: str, regime: str) -> tuple[Mapping[str, np.ndarray], tuple[np.ndarray, ...]]:
    """Weights and batch of a case: the same objects for every precision, so that they share reference and draws."""
    made = _prepare(scope, config).twins
    weights = weights_of(config, regime, scope.seed, scope.checkpoint, made.config)
    text = None if scope.text is None else Path(scope.text).read_text(encoding="utf-8")
    narrow = "bfloat16" if "bfloat16" in scope.precisions else scope.precisions[-1]
    return weights, stress_batch(made.config, scope.seed, text, clear_experts(made, weights, narrow))


def checkpoint_config(checkpoint: str, config: str | None = None) -> Any:
    """The configuration of a checkpoint: the one named by --config, or the JSON file beside it."""
    from omni_torch.config import ThinkerConfig
    from parity.fixtures import configuration

    if config is not None:
        return configuration(config)
    path = Path(checkpoint)
    for beside in (path.parent / "config.json", path.with_suffix(".json")):
        if beside.exists():
            return ThinkerConfig.from_json(beside)
    raise Misuse(f"checkpoint: no configuration beside {path}; name one with --config FILE (the family's JSON)")


# ------------------------------------------------------------------------------------------------ controls


def simple_controls(seen: list[Case], names: tuple[str, ...], wanted: Callable[[str], bool]) -> list[Control]:
    """zeros, sign flipped and another tensor of the same shape, in the torch side's place, on every tensor `wanted`.

    Each must be rejected wherever the verdict on the true tensors was a determined one.
    """
    counts = {name: [0, 0, ""] for name in names}
    for case in seen:
        verdicts = case.main.verdicts
        values = {k: v for k, v in case.main.values.items() if wanted(k)}
        for name, (_, _, reference, noise) in values.items():
            if verdicts[name] is Verdict.UNDETERMINED or not np.any(reference):
                continue
            other = next((v[1] for k, v in values.items() if k != name and v[1].shape == reference.shape), None)
            if other is None:  # the same tensor of another case is another tensor too
                others = (
                    c.main.values[name][1]
                    for c in seen
                    if c is not case and c.precision == case.precision and name in c.main.values
                )
                other = next((v for v in others if v.shape == reference.shape), None)
            wrongs = {"zeros": np.zeros_like(reference), "sign flipped": -reference, "another tensor": other}
            for control in names:
                wrong = wrongs[control]
                # Two scalars may well be near each other; a scalar has no "another".
                if (
                    wrong is None
                    or np.array_equal(wrong, reference)
                    or (control == "another tensor" and wrong.size == 1)
                ):
                    continue
                counts[control][0] += 1
                if accepts(wrong, reference, noise, _unit(case.precision)):
                    counts[control][1] += 1
                    counts[control][2] = f"{case.config}, {case.regime}, {case.precision}, {name}"
    return [
        Control(
            name,
            rejected=shown > 0 and not passed,
            evidence=f"rejected on {shown - passed} of {shown} tensors" + (f"; passed on {where}" if passed else ""),
        )
        for name, (shown, passed, where) in counts.items()
        # A narrow scope may hold no second tensor of the same shape.
        if shown or name != "another tensor"
    ]


def eps_control(scope: Scope, seen: list[Case], prefix: str) -> Control | None:
    """A real bug: RMSNorm's eps 1e-6 where 1e-5 is meant (huggingface/candle#271), on the torch side, in float64.

    Every determined tensor must differ, although np.allclose on the float32 logits at `FAMILIAR_BOUND` sees nothing.
    """
    # Trained and randomised weights have ordinary activations; where they are tiny, allclose would see eps as well.
    case = next((c for c in reversed(seen) if c.precision == "float64" and c.regime != "fresh"), None)
    if case is None:
        return None
    prepared = _prepare(scope, case.config)
    weights, batch = _inputs(scope, case.config, case.regime)
    pair = copy.copy(prepared.twins.pair)
    pair.torch = copy.deepcopy(pair.torch)
    for module in pair.torch.modules():
        if hasattr(module, "eps"):
            module.eps = module.eps / 10
    from parity.sides import TorchSide

    bad, _ = TorchSide(pair)(weights, batch, "float64")
    single, _ = TorchSide(pair)(weights, batch, "float32")
    clean, _ = TorchSide(prepared.twins.pair)(weights, batch, "float32")
    familiar = np.allclose(single["logits"], clean["logits"], rtol=FAMILIAR_BOUND, atol=FAMILIAR_BOUND)
    shown, passed = 0, []
    for name, (_, _, reference, noise) in case.main.values.items():
        if name in case.main.outputs and name.startswith(prefix) and case.main.outputs[name].verdict == "AGREE":
            shown += 1
            if accepts(bad[name], reference, noise, _unit("float64"), noisy_reference=True):
                passed.append(name)
    if not shown:
        return None  # nothing agreed: the rows themselves say what is wrong
    words = f"rejected on {shown - len(passed)} of {shown} tensors of {case.config}, {case.regime}"
    words += f"; np.allclose on float32 logits at {FAMILIAR_BOUND:g}: {'passes' if familiar else 'fails too'}"
    return Control("eps 1e-6", rejected=shown > 0 and not passed, evidence=words)


def _unit(precision: str) -> float:
    from parity.precision import unit_roundoff

    return unit_roundoff(precision)
