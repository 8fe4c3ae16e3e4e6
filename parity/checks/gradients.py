"""The loss and the gradient of every parameter."""

from __future__ import annotations

import time

from parity.checks import Progress, Scope
from parity.checks.logits import CONTROLS as LOGITS_CONTROLS
from parity.result import CheckResult

__all__ = ["BLIND", "CLAIM", "CONTROLS", "run"]

CLAIM = (
    "jax.grad and torch.autograd give the same gradient of the next-token loss for every parameter tensor, each judged "
    "against its own noise, before any optimizer could hide its scale."
)
BLIND = (
    "Gradients with respect to inputs; those at T = 1, at far positions, with scores beyond ±50 and from embeddings; "
    "dropout; a batch whose every target is ignored; gradients where the loss has kinks that the batches do not "
    "reach; tensors whose gradient is rounding noise (they are counted as UNDETERMINED, never as agreeing)."
)
CONTROLS = {name: words for name, words in LOGITS_CONTROLS.items() if name != "rounds twice"}


def run(scope: Scope, progress: Progress) -> CheckResult:
    """Judge the loss and every gradient of every case of `scope` (the runs are shared with the logits check)."""
    from parity.checks._twins import cases, eps_control, simple_controls

    started = time.perf_counter()
    result, seen = CheckResult("gradients"), []
    for case in cases(scope, progress):
        seen.append(case)
        names = [name for name in case.main.outputs if name == "loss" or name.startswith("gradient ")]
        result.rows += case.main.rows("gradients", case.config, case.regime, names)
    if scope.controls:
        result.controls = simple_controls(
            seen,
            ("zeros", "sign flipped", "another tensor"),
            lambda name: name == "loss" or name.startswith("gradient "),
        )
        bug = eps_control(scope, seen, "gradient ")
        result.controls += [bug] if bug else []
    result.seconds = time.perf_counter() - started
    return result
