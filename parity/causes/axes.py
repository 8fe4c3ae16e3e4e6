"""Another axis where a line or a function reduces along one: a softmax over the queries, a norm over time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from parity.causes.arrays import Hypothesis
from parity.causes.flat import Change, Flat

__all__ = ["other_axes"]

REDUCTIONS = {"reduce_sum": np.sum, "reduce_max": np.max, "reduce_min": np.min, "reduce_prod": np.prod}


def other_axes(flat: Flat, line: Sequence[int]) -> Iterator[Hypothesis]:
    """Everything that these steps reduce along one axis, reduced along each other axis."""
    found = [i for i in line if flat.steps[i].name in REDUCTIONS and len(flat.steps[i].eqn.params["axes"]) == 1]
    if not found:
        return
    first = flat.steps[found[0]]
    own, rank = first.eqn.params["axes"][0], np.ndim(flat.values[first.inputs[0]])
    for other in range(rank):
        shapes = [flat.values[flat.steps[i].inputs[0]].shape for i in found]
        if other == own or any(len(s) != rank or s[other] < 2 for s in shapes):
            continue
        changes = {i: _along(REDUCTIONS[flat.steps[i].name], other) for i in found}
        value = None
        try:
            value = flat(changes, wide=True)
        except Exception:  # it goes on with a shape that nothing else here can have
            continue
        if value.shape == flat.value.shape:
            words = f"along axis {other}, not {own}, at {first.place}"
            yield Hypothesis("another axis", words, value, 1)


def _along(reduction: Any, axis: int) -> Change:
    def change(inputs: list[np.ndarray], _: list[np.ndarray]) -> list[np.ndarray]:
        x = inputs[0]
        return [np.broadcast_to(reduction(x, axis=axis, keepdims=True), x.shape)]

    return change
