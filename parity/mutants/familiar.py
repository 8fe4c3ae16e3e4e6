"""What ports are usually held to: np.allclose on the float32 logits of one prefill without padding, fresh weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from parity.checks import Scope
from parity.errors import CannotLook
from parity.mutants.mutant import Mutant

__all__ = ["BOUNDS", "Familiar", "concerned"]

BOUNDS = (1e-3, 1e-5)
"""Only to show what they let through; no verdict uses them."""
SHAPE = (2, 16)
MODEL = ("layers", "attention", "thinker")
"""A prefill runs nothing else."""


class Familiar:
    """The logits of both twins by configuration, and whether a bug moves them beyond the bounds."""

    def __init__(self) -> None:
        self.made: dict[str, tuple[Any, dict[str, np.ndarray], tuple[np.ndarray, ...], np.ndarray]] = {}

    def prepare(self, mutant: Mutant, scope: Scope) -> None:
        """Make the models, from clean code."""
        config = _config(scope)
        if not concerned(mutant) or config in self.made:
            return
        from parity.fixtures import twins, weights_of

        made = twins(config)
        made.pair.loss = None
        tokens = np.random.default_rng(5).integers(3, made.config.vocab_size, SHAPE).astype(np.int32)
        positions = np.ascontiguousarray(np.broadcast_to(np.arange(SHAPE[1], dtype=np.int32), SHAPE))
        weights, inputs = weights_of(config, "fresh"), (tokens, tokens, np.ones(SHAPE, bool), positions)
        self.made[config] = made.pair, weights, inputs, _logits("torch", made.pair, weights, inputs)

    def __call__(self, mutant: Mutant, scope: Scope) -> dict[str, bool]:
        """bound -> seen; to be called while the bug is in."""
        if not concerned(mutant):
            return {str(bound): False for bound in BOUNDS}
        pair, weights, inputs, right = self.made[_config(scope)]
        sides = ("jax", "torch") if mutant.side == "both" else (mutant.side,)
        try:
            found = {side: _logits(side, pair, weights, inputs) for side in sides}
        except CannotLook:  # a crash is seen by everybody
            return {str(bound): True for bound in BOUNDS}
        ours, theirs = found.get("jax", right), found.get("torch", right)
        return {str(bound): not np.allclose(ours, theirs, rtol=bound, atol=bound) for bound in BOUNDS}


def _config(scope: Scope) -> str:
    return scope.configs[0] if scope.configs else "mha-swiglu"


def concerned(mutant: Mutant) -> bool:
    """Whether a prefill runs code that the bug is in."""
    return any(edit.module.rpartition(".")[2] in MODEL for edit in mutant.edits)


def _logits(side: str, pair: Any, weights: dict[str, np.ndarray], inputs: tuple[np.ndarray, ...]) -> np.ndarray:
    from parity.mutants.replay import evaluated
    from parity.sides import TorchSide

    if side == "torch":
        return TorchSide(pair)(weights, inputs, "float32")[0]["logits"]
    return evaluated(pair, weights, inputs, "float32")[0]["logits"]
