"""One step of a program for all noisy draws at once: values that differ between draws carry a leading axis of draws.

Python costs more than arithmetic on small arrays, so a program is walked once for all its draws. What does not differ
(integers, choices, constants, weights that are exact) has no such axis; numpy's broadcasting does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from parity.primitives import ELEMENTWISE, dot_general

__all__ = ["OverDraws", "with_draws"]


def with_draws(x: np.ndarray, rank: int, count: int) -> np.ndarray:
    """`x`, whose own rank is `rank`, with its axis of draws; a view if it had none."""
    return x if x.ndim > rank else np.broadcast_to(x, (count, *x.shape))


def _axes(key: str) -> Callable[[dict, int], dict]:
    return lambda params, count: {**params, key: tuple(a + 1 for a in params[key])}


def _axis(key: str) -> Callable[[dict, int], dict]:
    return lambda params, count: {**params, key: params[key] + 1}


def _slice(params: dict, count: int) -> dict:
    return {
        "start_indices": (0, *params["start_indices"]),
        "limit_indices": (count, *params["limit_indices"]),
        "strides": (1, *params["strides"]) if params["strides"] else None,
    }


SHIFTED: dict[str, Callable[[dict, int], dict]] = {
    "broadcast_in_dim": lambda p, count: {
        "shape": (count, *p["shape"]),
        "broadcast_dimensions": (0, *(a + 1 for a in p["broadcast_dimensions"])),
    },
    "concatenate": _axis("dimension"),
    "cumlogsumexp": _axis("axis"),
    "cummax": _axis("axis"),
    "cummin": _axis("axis"),
    "cumprod": _axis("axis"),
    "cumsum": _axis("axis"),
    "fft": lambda p, count: p,
    "reduce_max": _axes("axes"),
    "reduce_min": _axes("axes"),
    "reduce_prod": _axes("axes"),
    "reduce_sum": _axes("axes"),
    "reshape": lambda p, count: {"new_sizes": (count, *p["new_sizes"])},
    "rev": _axes("dimensions"),
    "slice": _slice,
    "split": _axis("axis"),
    "stack": _axis("axis"),
    "tile": lambda p, count: {"reps": (1, *p["reps"])},
    "transpose": lambda p, count: {"permutation": (0, *(a + 1 for a in p["permutation"]))},
    "unstack": _axis("axis"),
}
"""Primitives that need no more than other parameters for the axis in front; all their inputs are given that axis."""


class _Shifted:
    """An equation as implementations read it, with other parameters."""

    def __init__(self, params: dict):
        self.params = params


class OverDraws:
    """`evaluate(eqn, inputs)` for inputs of which any may have an axis of draws."""

    def __init__(self, eqn: Any, evaluate: Callable[[Any, list], Any]):
        self.eqn, self.evaluate = eqn, evaluate
        self.name = eqn.primitive.name
        self.ranks = [len(v.aval.shape) for v in eqn.invars]
        self.rank = 1 + max(self.ranks, default=0)
        self.shifted: dict[int, _Shifted] = {}

    def __call__(self, inputs: Sequence[np.ndarray]) -> Any:
        count = 0
        for x, rank in zip(inputs, self.ranks):
            if x.ndim > rank:
                count = len(x)
                break
        if not count:
            return self.evaluate(self.eqn, list(inputs))
        if self.name in ELEMENTWISE:
            return self.evaluate(self.eqn, [self._stretched(x, rank) for x, rank in zip(inputs, self.ranks)])
        if self.name == "dot_general":
            return self._dot(*inputs)
        if self.name == "conv_general_dilated" and inputs[1].ndim == self.ranks[1]:
            return self._convolution(*inputs)
        if self.name in SHIFTED:
            if count not in self.shifted:
                self.shifted[count] = _Shifted(SHIFTED[self.name](self.eqn.params, count))
            inputs = [with_draws(x, rank, count) for x, rank in zip(inputs, self.ranks)]
            return self.evaluate(self.shifted[count], inputs)
        # One draw after the other: what is rare, and what indexes.
        rows = [
            self.evaluate(self.eqn, [x[i] if x.ndim > rank else x for x, rank in zip(inputs, self.ranks)])
            for i in range(count)
        ]
        if isinstance(rows[0], (list, tuple)):
            return [np.stack(column) for column in zip(*rows)]
        return np.stack(rows)

    def _stretched(self, x: np.ndarray, rank: int) -> np.ndarray:
        """Scalars stand beside arrays: axes of length 1 between the draws and the value's own."""
        missing = self.rank - x.ndim
        return x if x.ndim <= rank or not missing else x.reshape(len(x), *[1] * missing, *x.shape[1:])

    def _convolution(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """The draws are more of the batch; they come first in it, so that groups of the batch stay together."""
        layout = self.eqn.params["dimension_numbers"]
        batch, there = layout.lhs_spec[0], layout.out_spec[0]
        if self.eqn.params["batch_group_count"] > 1:
            return np.stack([self.evaluate(self.eqn, [x, right]) for x in left])
        merged = np.moveaxis(left, 0, batch)
        shape = list(left.shape[1:])
        shape[batch] *= len(left)
        out = self.evaluate(self.eqn, [merged.reshape(shape), right])
        split = [*out.shape[:there], len(left), -1, *out.shape[there + 1 :]]
        return np.moveaxis(out.reshape(split), there, 0)

    def _dot(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        (contract_l, contract_r), (batch_l, batch_r) = self.eqn.params["dimension_numbers"]
        a, b = left.ndim > self.ranks[0], right.ndim > self.ranks[1]
        shift = lambda axes, by: tuple(i + by for i in axes)  # noqa: E731
        contract = shift(contract_l, a), shift(contract_r, b)
        batch = shift(batch_l, a), shift(batch_r, b)
        if a and b:
            return dot_general(left, right, (contract, ((0, *batch[0]), (0, *batch[1]))))
        out = dot_general(left, right, (contract, batch))
        # The draws are the first free axis of the side that has them.
        at = len(batch_l) if a else self.ranks[0] - len(contract_l)
        return np.moveaxis(out, at, 0)
