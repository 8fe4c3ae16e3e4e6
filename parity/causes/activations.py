"""Activations that are taken for each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["ACTIVATIONS", "GATES"]


def _normal(x: np.ndarray) -> np.ndarray:
    from scipy.special import ndtr

    return ndtr(x)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return expit(x)


def _cubic(x: np.ndarray) -> np.ndarray:
    return np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))


_ROOT = math.sqrt(2.0)
ACTIVATIONS: dict[str, tuple[tuple[str, str, Callable[[Any], Any]], ...]] = {
    "logistic": (
        ("exact GELU", "exact GELU in the place of SiLU", _normal),
        ("tanh GELU", "tanh GELU in the place of SiLU", lambda x: 0.5 * (1.0 + _cubic(x))),
        ("quick GELU", "sigmoid(1.702 x) in its place", lambda x: _sigmoid(1.702 * x)),
        ("ReLU", "ReLU in the place of SiLU", lambda x: (x > 0) * 1.0),
    ),
    "erf": (
        ("tanh GELU", "the tanh form of GELU", lambda y: _cubic(_ROOT * y)),
        ("quick GELU", "sigmoid(1.702 x) in its place", lambda y: 2.0 * _sigmoid(1.702 * _ROOT * y) - 1.0),
        ("SiLU", "SiLU in the place of GELU", lambda y: 2.0 * _sigmoid(_ROOT * y) - 1.0),
        ("ReLU", "ReLU in the place of GELU", np.sign),
    ),
    "tanh": (("exact GELU", "the exact form of GELU", lambda u: 2.0 * _normal(_from_cubic(u)) - 1.0),),
}


GATES: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
    ("SiLU", "SiLU in its place", _sigmoid),
    ("exact GELU", "exact GELU in its place", _normal),
    ("tanh GELU", "tanh GELU in its place", lambda x: 0.5 * (1.0 + _cubic(x))),
)


def _from_cubic(u: np.ndarray) -> np.ndarray:
    """The x of √(2/π)·(x + 0.044715 x³) = u, by Newton's iteration."""
    v = u / math.sqrt(2.0 / math.pi)
    x = np.cbrt(v / 0.044715) * (np.abs(v) > 1.0) + v * (np.abs(v) <= 1.0)
    for _ in range(60):
        x = x - (x + 0.044715 * x**3 - v) / (1.0 + 3 * 0.044715 * x**2)
    return x
