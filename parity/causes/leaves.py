"""What may stand in the place of a parameter, an input or the output of an earlier part."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from parity.causes.arrays import NARROW, Hypothesis
from parity.causes.flat import COARSE, Flat

__all__ = ["of_leaves"]


def of_leaves(flat: Flat) -> Iterator[Hypothesis]:
    floats = {s: n for s, n in flat.leaves.items() if flat.values[s].dtype.kind == "f"}
    for slot, name in flat.leaves.items():
        x, tap = flat.values[slot], name.startswith("the output of ")
        for rank, cause, words, value in _instead(x, tap):
            if rank == 4 and flat.apart > COARSE:
                continue
            yield Hypothesis(cause, f"{name}: {words}", flat(leaves={slot: value}), rank)
        for other, its_name in floats.items():
            if slot in floats and other > slot and not tap and flat.values[other].shape == x.shape:
                value = flat(leaves={slot: flat.values[other], other: x})
                yield Hypothesis("order", f"{name} and {its_name} change places", value, 1)
        for its_name, other in flat.spare.items() if slot in floats and not tap and x.ndim else ():
            if its_name != name and other.shape == x.shape:
                yield Hypothesis(
                    "another parameter", f"{its_name} in the place of {name}", flat(leaves={slot: other}), 1
                )
            elif its_name != name and other.shape == x.shape[::-1]:
                words = f"{its_name}, transposed, in the place of {name}"
                yield Hypothesis("another parameter", words, flat(leaves={slot: other.T}), 1)


def _instead(x: np.ndarray, tap: bool) -> Iterator[tuple[int, str, str, np.ndarray]]:
    """(rank, cause, words, value) that may stand in the place of a leaf."""
    if x.dtype.kind == "b" and x.size > 1:
        yield 1, "mask missing", "all True", np.ones_like(x)
        yield 1, "mask inverted", "inverted", ~x
    elif x.dtype.kind in "iu" and x.size > 1:
        for shift in (1, -1):
            yield 1, "shifted by one", f"{shift:+d}", x + shift
        for axis, shift in itertools.product(range(x.ndim), (1, -1)):
            yield 1, "shifted by one", f"moved by {shift:+d} along axis {axis}", np.roll(x, shift, axis)
        for narrow in ("int8", "uint8", "int16"):
            yield 1, "narrow integer", f"kept as {narrow}", x.astype(narrow).astype(x.dtype)
        yield 1, "input ignored", "all zero", np.zeros_like(x)
        if x.ndim:
            plain = np.broadcast_to(np.arange(x.shape[-1], dtype=x.dtype), x.shape)
            yield 1, "positions ignored", "counted from 0, whatever was given", plain
    elif x.dtype.kind == "f" and tap:
        if x.ndim:
            yield 2, "mean subtracted", "its mean taken off first", x - x.mean(-1, keepdims=True)
        for name, cut in NARROW.items():
            yield 4, "rounded inside", f"rounded to {name}", cut(x)
    elif x.dtype.kind == "f":
        if x.ndim == 2 and x.shape[0] == x.shape[1]:
            yield 1, "transposed weight", "transposed", x.T
        yield 1, "bias missing" if x.ndim == 1 else "zeros", "zeros in its place", np.zeros_like(x)
        if x.ndim == 1:
            yield 1, "norm scale not loaded", "ones in its place", np.ones_like(x)
            yield 1, "one plus scale", "1 + itself", 1.0 + x
        yield 1, "sign flipped", "its sign flipped", -x
        for name, cut in NARROW.items():
            yield 4, "rounded inside", f"rounded to {name}", cut(x)
