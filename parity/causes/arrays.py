"""Hypotheses about two arrays alone: what simple thing was done to the one to make it the other?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ["NARROW", "Hypothesis", "hypotheses", "is_named", "name_constant", "share"]


@dataclass(frozen=True)
class Hypothesis:
    """A cause in words, and the value that a side would have given with it."""

    cause: str
    words: str
    value: np.ndarray
    rank: int
    """Of several that explain all, the one of the lowest rank is named: 0 is the most particular."""
    number: float | None = None


def _narrow(name: str) -> Callable[[Any], np.ndarray]:
    def cut(x: Any) -> np.ndarray:
        import ml_dtypes  # noqa: F401  registers bfloat16

        return np.asarray(x).astype(np.dtype(name)).astype(np.float64)

    return cut


def _ten_bits(x: Any) -> np.ndarray:
    """TF32: float32's exponent with 10 bits behind the point."""
    mantissa, exponent = np.frexp(np.asarray(x, np.float64))
    return np.ldexp(np.round(mantissa * 2.0**11) / 2.0**11, exponent)


NARROW: dict[str, Callable[[Any], np.ndarray]] = {
    "float32": _narrow("float32"),
    "TF32": _ten_bits,
    "float16": _narrow("float16"),
    "bfloat16": _narrow("bfloat16"),
}


NEARLY = 2.0**-20
"""A factor that is this near to 1 is what rounding a number to float32, here and there, leaves."""


def share(ours: np.ndarray, theirs: np.ndarray, value: np.ndarray) -> float:
    """How much of theirs − ours the value explains: 1 − ‖theirs − value‖² / ‖theirs − ours‖²."""
    theirs, value = np.asarray(theirs, np.float64), np.asarray(value, np.float64)
    if value.shape != theirs.shape:
        return -math.inf
    with np.errstate(all="ignore"):
        whole = float(np.sum(np.square(theirs - ours)))
        left = float(np.sum(np.square(theirs - value)))
    if not math.isfinite(whole):  # not finite on one side: how many of these elements are mended
        bad = lambda x: int(np.sum(np.isfinite(x) != np.isfinite(theirs)))  # noqa: E731
        return 1.0 - bad(value) / bad(ours) if bad(ours) else -math.inf
    return 1.0 - left / whole if whole > 0 and math.isfinite(left) else -math.inf


def hypotheses(ours: np.ndarray, theirs: np.ndarray) -> Iterator[Hypothesis]:
    """What may have been done to `ours`; for anybody's pair."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if a.shape != b.shape or not a.size:
        return
    yield Hypothesis("zeros", "it is zero", np.zeros_like(a), 1)
    yield Hypothesis("sign flipped", "its sign is flipped", -a, 1)
    if not np.isfinite(a).all():
        yield Hypothesis("not finite", "zeros where it is not finite", np.where(np.isfinite(a), a, 0.0), 0)
    square = float(np.sum(a * a))
    if square > 0 and a.size > 1 and np.isfinite(b).all():
        factor = float(np.sum(a * b)) / square
        if 0 < abs(factor - 1.0) < NEARLY:
            words = f"multiplied by 1 {'+' if factor > 1 else '−'} {abs(factor - 1.0):.3g}: a number kept in float32"
            yield Hypothesis("constant rounded", words, factor * a, 3, factor)
        else:
            yield Hypothesis("scale factor", f"multiplied by {name_constant(factor)}", factor * a, 3, factor)
        offset = float(np.mean(b - a))
        yield Hypothesis("constant offset", f"plus {name_constant(offset)}", a + offset, 3, offset)
    if a.ndim > 1:
        for eps in (0.0, 1e-6, 1e-5):
            normed = a / np.sqrt(np.mean(a * a, -1, keepdims=True) + eps)
            yield Hypothesis("normalised in place", f"divided by its root mean square (eps {eps:g})", normed, 2)
    for axis in range(a.ndim):
        for shift in (1, -1) if a.shape[axis] > 2 else ():
            yield Hypothesis("shifted by one", f"moved by {shift:+d} along axis {axis}", np.roll(a, shift, axis), 2)
            yield Hypothesis(
                "shifted by one", f"moved by {shift:+d} along axis {axis}, zeros behind it", _pushed(a, axis, shift), 2
            )
        if 1 < a.shape[axis] < a.size:
            yield from _permuted(a, b, axis)
            yield from _emptied(a, b, axis)
            yield from _by_line(a, b, axis)
    for i, j in itertools.combinations(range(a.ndim), 2):
        if a.shape[i] == a.shape[j] > 1:
            yield Hypothesis("transposed", f"axes {i} and {j} change places", np.swapaxes(a, i, j), 2)
    for name, cut in NARROW.items():
        with np.errstate(over="ignore"):
            yield Hypothesis("rounded", f"rounded to {name}", cut(a), 2)


def _pushed(a: np.ndarray, axis: int, shift: int) -> np.ndarray:
    moved = np.roll(np.moveaxis(a, axis, 0), shift, 0)
    moved[0 if shift > 0 else -1] = 0.0
    return np.moveaxis(moved, 0, axis)


def _permuted(a: np.ndarray, b: np.ndarray, axis: int) -> Iterator[Hypothesis]:
    """The same lines in another order: each of theirs takes the nearest of ours, if that is an order at all."""
    ours = np.moveaxis(a, axis, 0).reshape(a.shape[axis], -1)
    theirs = np.moveaxis(b, axis, 0).reshape(a.shape[axis], -1)
    if len(ours) > 4096 or not np.isfinite(theirs).all():
        return
    distance = np.sum(theirs**2, 1)[:, None] - 2 * theirs @ ours.T + np.sum(ours**2, 1)[None]
    order = np.argmin(distance, 1)
    if len(set(order.tolist())) == len(order) and (order != np.arange(len(order))).any():
        shown = ", ".join(map(str, order[:8])) + (" …" if len(order) > 8 else "")
        yield Hypothesis("order", f"axis {axis} in the order {shown}", np.take(a, order, axis), 2)


def _emptied(a: np.ndarray, b: np.ndarray, axis: int) -> Iterator[Hypothesis]:
    """Whole lines that are zero on their side only."""
    others = tuple(i for i in range(a.ndim) if i != axis)
    lines = ~b.any(others) & a.any(others)
    if lines.any() and not lines.all():
        at = np.flatnonzero(lines)
        shown = ", ".join(map(str, at[:8])) + (" …" if len(at) > 8 else "")
        kept = np.moveaxis(np.where(lines, 0.0, np.moveaxis(a, axis, -1)), -1, axis)
        yield Hypothesis("zeros", f"zero at {shown} of axis {axis}", kept, 1)


def _by_line(a: np.ndarray, b: np.ndarray, axis: int) -> Iterator[Hypothesis]:
    """A factor of its own for each index of an axis; it must have many elements, or anything would fit."""
    others = tuple(i for i in range(a.ndim) if i != axis)
    if a.size < 8 * a.shape[axis] or not np.isfinite(b).all():
        return
    square = np.sum(a * a, others, keepdims=True)
    factor = np.sum(a * b, others, keepdims=True) / np.where(square > 0, square, 1.0)
    yield Hypothesis("scale by line", f"a factor of its own for each index of axis {axis}", factor * a, 7)


def name_constant(number: float) -> str:
    """The number, and what it may stand for."""
    from parity.precision import unit_roundoff

    if not math.isfinite(number) or number == 0:
        return f"{number:g}"
    # A fit in float64 brings some 8 digits; so many decide between all these names.
    near = lambda value: math.isclose(value, abs(number), rel_tol=unit_roundoff("float32"))  # noqa: E731
    whole = round(number)
    if whole and abs(number) < 2**31 and near(abs(whole)):
        return str(whole)
    close = next((name for name, value in _constants() if near(value)), None)
    return f"{number:.9g} ({'−' if number < 0 else ''}{close})" if close else f"{number:.9g}"


def is_named(number: float) -> bool:
    """Whether it is a number that somebody may have written: a whole one, a root, a few digits."""
    from parity.precision import unit_roundoff

    name, few = name_constant(number), float(f"{number:.3g}")
    written = name.endswith(")") or name.lstrip("-").isdigit()
    return written or math.isclose(number, few, rel_tol=unit_roundoff("float32"))


@lru_cache(maxsize=1)
def _constants() -> tuple[tuple[str, float], ...]:
    many = range(2, 4097)
    known = [
        ("√2", 2**0.5),
        ("ln 2", math.log(2)),
        ("1 / ln 2", 1 / math.log(2)),
        ("π", math.pi),
        ("1 / ln 10", 1 / math.log(10)),
    ]
    known += [(f"√{n}", n**0.5) for n in many] + [(f"1 / {n}", 1 / n) for n in many]
    return (*known, *((f"1 / √{n}", n**-0.5) for n in many))
