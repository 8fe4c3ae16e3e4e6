"""The number with which a function of it comes nearest to the other side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from parity.causes.flat import Flat

__all__ = ["Fit"]

TINY = 2.0**-20
"""What is this small beside the number that stood there is none."""
PLAUSIBLE = 0.3
"""A constant is fitted to the end only if its first step takes this share of the residual."""


class Fit:
    """The number with which a function of it comes nearest to the other side: Gauss and Newton's iteration."""

    def __init__(self, flat: Flat, theirs: np.ndarray):
        self.theirs = np.asarray(theirs, np.float64)
        self.base = np.asarray(flat.value, np.float64)
        self.whole = self.square(self.base)
        size = float(np.sum(np.square(self.base)))
        self.apart = math.sqrt(self.whole / size) if size > 0 else math.inf

    def square(self, value: np.ndarray) -> float:
        if value.shape != self.theirs.shape:
            return math.inf
        difference = self.theirs - value
        return float(np.sum(np.square(difference))) if np.isfinite(difference).all() else math.inf

    def __call__(
        self, function: Callable[[float], np.ndarray], start: float, others: Sequence[float]
    ) -> tuple[float, np.ndarray | None]:
        """(number, value) of the best, or None where nothing near it helps."""
        with np.errstate(all="ignore"):
            best = (self.whole, start, self.base)
            move = self._newton(function, start, self.base)
            if move is None:  # no small step has an effect: only a mask's number may have one
                others = [x for x in others if math.isinf(x)]
                best = min([best, *((self.square(v := function(x)), x, v) for x in others)], key=lambda item: item[0])
                return (best[1], best[2]) if best[0] < (1.0 - PLAUSIBLE) * self.whole else (start, None)
            best = min(best, (self.square(v := function(move)), move, v), key=lambda item: item[0])
            for other in others:
                value = function(other)
                best = min(best, (self.square(value), other, value), key=lambda item: item[0])
            if not best[0] < (1.0 - PLAUSIBLE) * self.whole:
                return start, None
            for _ in range(20):
                move = self._newton(function, best[1], best[2]) if math.isfinite(best[1]) else None
                if move is None:
                    break
                tried = [move, (move + best[1]) / 2, (move + 3 * best[1]) / 4]
                if best[1] != 0:  # a factor that a step of this size stands for
                    tried.append(best[1] * math.exp(min(max(move / best[1] - 1.0, -5.0), 5.0)))
                better = [(self.square(v := function(m)), m, v) for m in tried]
                new = min(better, key=lambda item: item[0])
                if not new[0] < best[0]:
                    break
                best = new
            if best[1] != 0 and abs(best[1]) < TINY * abs(start):
                zero = function(0.0)  # what is left of a number that was let go
                if self.square(zero) < (1.0 - PLAUSIBLE) * self.whole:
                    best = (self.square(zero), 0.0, zero)
            return best[1], best[2]

    def _newton(self, function: Callable[[float], np.ndarray], at: float, value: np.ndarray) -> float | None:
        step = (abs(at) or 1.0) * 2.0**-13
        slope = (function(at + step) - value) / step
        size = float(np.sum(np.square(slope)))
        if not math.isfinite(size) or size == 0:
            return None
        return at + float(np.sum(slope * (self.theirs - value))) / size
