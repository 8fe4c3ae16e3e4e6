"""Logits of both twins, and the output of every sub-module on the way to them."""

from __future__ import annotations

import time

from parity.checks import Progress, Scope
from parity.result import CheckResult

__all__ = ["BLIND", "CLAIM", "CONTROLS", "run"]

CLAIM = (
    "On the same weights and inputs both ThinkerLMs compute the same logits, and the same output of every named "
    "sub-module before them: the same function in float64, and each as near to the float64 reference as its working "
    "precision allows. Of tied experts the lowest are chosen, a token id out of range is refused (inside jit: NaN), "
    "and in bfloat16 norms and angles keep their statistics in float32 and round once."
)
BLIND = (
    "Inputs that were not tried: the verdict holds for the batches of parity/fixtures.py (left and right padding, "
    "fully masked rows, T = 1; positions beyond 4,000 and scores beyond ±50 in float64 only). Training mode; decoding "
    "with a cache; (B, T, T) masks. In bfloat16: whether softmax was taken in float32. A mistake that both twins "
    "share: the frozen reference numbers in tests/golden stand against that."
)
CONTROLS = {
    "zeros": "zeros in place of the torch side's tensor",
    "sign flipped": "the tensor with its sign flipped",
    "another tensor": "another tensor of the same shape",
    "eps 1e-6": "RMSNorm's eps a tenth of what it is; beside it, whether np.allclose on float32 logits at 1e-3 sees it",
    "rounds twice": "in bfloat16, a norm's scale applied after the cast",
}


def run(scope: Scope, progress: Progress) -> CheckResult:
    """Judge logits and taps of every case of `scope`."""
    from parity.checks._edges import edges
    from parity.checks._twins import cases, eps_control, simple_controls

    started = time.perf_counter()
    result, seen = CheckResult("logits"), []
    for case in cases(scope, progress):
        seen.append(case)
        names = ["logits", *(f"tap {name}" for name in case.main.taps)]
        result.rows += case.main.rows("logits", case.config, case.regime, names)
        if case.calls is not None:
            result.rows += case.calls.rows("logits", case.config, case.regime)
        result.rows += [case.tied] if case.tied is not None else []
        result.notes += [f"{case.config}, {case.regime}, {case.precision}: {n}" for n in case.main.notes if "pins" in n]
    rows, shown = edges(scope)
    result.rows += rows
    if scope.controls:
        result.controls = simple_controls(
            seen, ("zeros", "sign flipped", "another tensor"), lambda name: name == "logits" or name.startswith("tap ")
        )
        bug = eps_control(scope, seen, "logits")
        result.controls += [*([bug] if bug else []), *shown]
    result.seconds = time.perf_counter() - started
    return result
