"""Hypotheses about a program: what if one place of the JAX function were another?

The part of the program between the last taps and the one that parts is laid out as a list of steps, evaluated once,
and then again with a constant, an order, a rounding or an operation changed at one place of the source (wherever that
place runs). The change that turns its value into the other side's is the difference, whatever language that side is
written in.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from parity.causes.arrays import Hypothesis
from parity.causes.axes import other_axes
from parity.causes.constants import constants, factors, mixtures
from parity.causes.fit import Fit
from parity.causes.flat import Flat
from parity.causes.leaves import of_leaves
from parity.causes.lines import of_line
from parity.causes.orders import pairs
from parity.causes.runs import of_runs
from parity.causes.steps import alternatives

__all__ = ["hypotheses"]

MOST = 400
"""So many steps are looked into: a part without taps in a large program would take minutes."""


def hypotheses(flat: Flat, theirs: np.ndarray) -> Iterator[Hypothesis]:
    """Every change that is worth a look, with the value that the program then has."""
    if len(flat.steps) > MOST:
        flat.steps = flat.steps[-MOST:]
    fit = Fit(flat, theirs)
    flat.apart = fit.apart
    yield from of_leaves(flat)
    for group in flat.groups():
        yield from constants(flat, group, fit)
        yield from alternatives(flat, group)
        yield from factors(flat, group, fit)
        yield from mixtures(flat, group, fit)
    for line in flat.lines():
        yield from of_line(flat, line)
        yield from other_axes(flat, line)
    yield from of_runs(flat)
    yield from pairs(flat)
