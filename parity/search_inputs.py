"""Strategies for arrays that bugs hide from: magnitudes, offsets, ties, zeros, single rows of another size.

Everything but the plain numbers is drawn by Hypothesis, so that the search can climb and shrink it; what is left comes
from a seed, with few digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["PATTERNS", "choice", "floats", "integers", "mask", "number"]

PATTERNS = ("normal", "ties", "constant", "zeros", "some zeros", "one row", "one large", "rows of many sizes")
Draw = Callable[..., Any]


def number(draw: Draw, low: int, high: int) -> int:
    """An integer; those near 0 count as smaller."""
    from hypothesis import strategies

    return draw(strategies.integers(low, high))


def choice(draw: Draw, of: Sequence[Any]) -> Any:
    """One of several; the first counts as the smallest."""
    from hypothesis import strategies

    return draw(strategies.sampled_from(list(of)))


def floats(
    draw: Draw,
    shape: tuple[int, ...],
    sizes: tuple[int, int] = (-30, 4),
    offsets: bool = True,
    patterns: Sequence[str] = PATTERNS,
) -> np.ndarray:
    """float32 numbers of order 10^size, on an offset of up to 10^4 times that."""
    size = number(draw, *sizes)
    offset = min(number(draw, 0, 4), sizes[1] - size) if offsets else 0
    pattern = choice(draw, patterns)
    rng = np.random.default_rng([number(draw, 0, 999), len(shape)])
    x = rng.standard_normal(shape)
    rows = x.reshape(-1, shape[-1]) if x.ndim and x.size else x.reshape(1, -1)
    if pattern == "ties":
        x[...] = np.rint(x)
    elif pattern == "constant":
        x[...] = 1.0
    elif pattern == "zeros":
        x[...] = 0.0
    elif pattern == "some zeros":
        x[rng.random(shape) < 0.5] = 0.0
    elif pattern == "one row":
        rows[1:] = 0.0
    elif pattern == "one large":
        rows[:, :1] *= 100.0
    elif pattern == "rows of many sizes":
        rows *= np.exp2(rng.integers(-12, 1, (len(rows), 1)))
    x = np.vectorize(lambda v: float(f"{v:.2e}"), otypes=[np.float64])(x) if x.size else x
    if offset > 0:
        x = x + np.power(10.0, offset)
    return (x * np.power(10.0, size)).astype(np.float32)


def integers(draw: Draw, shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
    """int32 numbers from low to high: all alike, counting up, or drawn."""
    kind = choice(draw, ("drawn", "alike", "counting"))
    rng = np.random.default_rng([number(draw, 0, 999), len(shape)])
    if kind == "alike":
        return np.full(shape, number(draw, low, high), np.int32)
    if kind == "counting":
        start = number(draw, low, high)
        return np.minimum(start + np.arange(int(np.prod(shape))).reshape(shape), high).astype(np.int32)
    return rng.integers(low, high + 1, shape).astype(np.int32)


def mask(draw: Draw, batch: int, time: int) -> np.ndarray:
    """(B, T) of kept keys, row by row: all, left or right padding, none, one, or drawn."""
    kept = np.ones((batch, time), bool)
    for row in kept:
        kind = choice(draw, ("all", "left", "right", "none", "one", "drawn"))
        at = number(draw, 0, time - 1)
        if kind == "left":
            row[:at] = False
        elif kind == "right":
            row[at:] = False
        elif kind == "none":
            row[:] = False
        elif kind == "one":
            row[:] = False
            row[at] = True
        elif kind == "drawn":
            row[:] = np.random.default_rng([at, time]).random(time) < 0.5
    return kept
