"""What the checks share: pairs of plain functions over named tensors, and how controls are shown and summed up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from parity.pair import Pair
from parity.result import Control
from parity.verdict import Noise, accepts
from parity.weights import Link

__all__ = ["merge", "pair_of_steps", "rejection"]


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


def rejection(
    name: str,
    where: str,
    wrongs: Mapping[str, np.ndarray],
    values: Mapping[str, tuple[Any, Any, np.ndarray, Noise]],
    unit: float,
    *,
    noisy_reference: bool = False,
    what: str = "tensors",
) -> Control:
    """Show `wrongs` in a side's place; rejected if there is one and none is accepted. `values`: those of Findings."""
    passed = [
        key
        for key, wrong in wrongs.items()
        if accepts(wrong, values[key][2], values[key][3], unit, noisy_reference=noisy_reference)
    ]
    words = f"{where}: rejected on {len(wrongs) - len(passed)} of {len(wrongs)} {what}"
    words += f"; passed on {', '.join(passed)}" if passed else ""
    return Control(name, rejected=bool(wrongs) and not passed, evidence=words)


def merge(controls: Sequence[Control]) -> list[Control]:
    """One control per name: rejected only if every precision rejected it."""
    merged: dict[str, list[Control]] = {}
    for control in controls:
        merged.setdefault(control.name, []).append(control)
    return [Control(k, all(c.rejected for c in v), "; ".join(c.evidence for c in v)) for k, v in merged.items()]
