"""What the checks of update steps share: pairs of plain functions over named tensors, and controls over precisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from parity.pair import Pair
from parity.result import Control
from parity.weights import Link

__all__ = ["merge", "pair_of_steps"]


def pair_of_steps(jax: Callable[..., Any], torch: Callable[..., Any], start: Mapping[str, np.ndarray]) -> Pair:
    """A pair of functions (parameters, gradients), both dicts under the names of `start`; inputs follow that order."""
    names = list(start)
    return Pair(
        jax=lambda params, *grads: jax(params, dict(zip(names, grads))),
        torch=lambda params, *grads: torch(params, dict(zip(names, grads))),
        template=dict(start),
        links=[Link(name, name) for name in names],
        name="steps",
    )


def merge(controls: Sequence[Control]) -> list[Control]:
    """One control per name: rejected only if every precision rejected it."""
    merged: dict[str, list[Control]] = {}
    for control in controls:
        merged.setdefault(control.name, []).append(control)
    return [Control(k, all(c.rejected for c in v), "; ".join(c.evidence for c in v)) for k, v in merged.items()]
