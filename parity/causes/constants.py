"""Another number where a number stands in the source, and a number too much at a result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from parity.causes.arrays import Hypothesis, is_named, name_constant
from parity.causes.fit import Fit
from parity.causes.flat import MOVES, Change, Flat, Step, value_of

__all__ = ["constants", "factors", "mixtures"]

EPS = (0.0, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
BASES = (1e4, 1e5, 5e5, 1e6)


MIXED = {"scatter-add", "scatter_add", "div"}
MASKED = ("select_n", "sub", "max", "min", "broadcast_in_dim", "convert_element_type")
"""Where the number of a mask, which may be infinite, comes in."""
LARGE = 1e30
"""What code is written with in the place of infinity: large enough for any score."""


def constants(flat: Flat, group: Sequence[int], fit: Fit) -> Iterator[Hypothesis]:
    """Another number where a number stands in the source."""
    first = flat.steps[group[0]]
    for at, slot in enumerate(first.inputs):
        value = flat.values[slot]
        if slot not in flat.literals or value.size != 1 or value.dtype.kind not in "fi" or np.isnan(value).any():
            continue
        value = value.reshape(())

        def changed(number: Any, at: int = at) -> np.ndarray:
            def change(i: int) -> Change:
                def put(inputs: list[Any], _: list[Any]) -> list[Any]:
                    number_ = np.full(np.shape(inputs[at]), number)
                    return value_of(flat.steps[i], [*inputs[:at], number_, *inputs[at + 1 :]])

                return put

            return flat({i: change(i) for i in group})

        if np.isinf(value):
            words = f"a finite number, as {-LARGE:g}, in the place of {float(value):g} at {first.place}"
            yield Hypothesis("mask value", words, changed(np.copysign(LARGE, value)), 0)
            continue
        if value.dtype.kind == "i":
            for other in {int(value) + 1, int(value) - 1, -100, 2 * int(value)} - {int(value)}:
                words = f"{other} in the place of {int(value)} at {first.place}"
                number = np.asarray(other, value.dtype)
                cause = _integer_cause(first)
                yield Hypothesis(cause, words, changed(number), 1 if cause == "shifted by one" else 0)
            continue
        number, found = fit(lambda c: changed(c), float(value), _scales(first, flat, float(value)))
        if found is not None:
            what = _constant_cause(first, flat, at, float(value), number)
            words = f"{name_constant(number)} in the place of {name_constant(float(value))} at {first.place}"
            yield Hypothesis(what, words, found, 0 if is_named(number) and value != 0 else 5, number)


def _integer_cause(step: Step) -> str:
    if step.name in ("min", "max", "clamp"):
        return "clipped"
    return "counted otherwise" if step.name in ("eq", "ne") else "shifted by one"


def _constant_cause(step: Step, flat: Flat, at: int, value: float, other: float) -> str:
    if math.isclose(value, -other):
        return "sign flipped"
    followers = {s.name for s in flat.steps if set(step.outputs) & set(s.inputs)}
    if {step.name, *followers} & {"min", "max", "clamp"} and not math.isfinite(other):
        return "clipped"
    if abs(value) >= 1 and not math.isfinite(other):
        return "mask value"
    if (
        step.name == "add"
        and min(abs(value), abs(other)) < 1.0
        and followers & {"rsqrt", "sqrt", "div", "log", "reshape"}
    ):
        return "eps"
    if step.name == "pow" and at == 0:
        return "base of the angles"
    return "scale factor" if step.name in ("mul", "div") else "constant"


def _scales(step: Step, flat: Flat, start: float) -> list[float]:
    sizes = {n for slot in (*step.inputs, *step.outputs) for n in np.shape(flat.values[slot]) if n > 1}
    found = {start * f for n in sizes for f in (n**0.5, n**-0.5, float(n), 1.0 / n)}
    found |= {1.0, -start, 2 * start, start / 2, start * 10, start / 10}
    if step.name == "add":
        found = set(EPS)
    elif step.name == "pow":
        found |= set(BASES)
    infinite = [-math.inf, math.inf] if step.name in MASKED else []
    return [*infinite, *sorted(found)]


def factors(flat: Flat, group: Sequence[int], fit: Fit) -> Iterator[Hypothesis]:
    """A factor or a constant too much at a result."""
    first = flat.steps[group[0]]
    value = flat.values[first.outputs[0]]
    if first.name in MOVES or value.dtype.kind != "f" or value.size < 2:
        return
    times = lambda c: flat({i: lambda _, out: [out[0] * c, *out[1:]] for i in group})  # noqa: E731
    starts = _scales(first, flat, 1.0) if first.name in ("dot_general", "div", "mul") else [-1.0]
    number, found = fit(times, 1.0, [0.0, *starts])
    if found is not None:
        cause = "sign flipped" if math.isclose(number, -1.0) else "scale factor"
        cause = "zeros" if abs(number) < np.finfo(np.float32).eps else cause
        words = f"{first.name} at {first.place} multiplied by {name_constant(number)}"
        yield Hypothesis(cause, words, found, 5, number)
    number, found = fit(lambda c: flat({i: lambda _, out: [out[0] + c, *out[1:]] for i in group}), 0.0, [1.0, -1.0])
    if found is not None:
        words = f"{first.name} at {first.place} plus {name_constant(number)}"
        yield Hypothesis("constant offset", words, found, 6, number)


def mixtures(flat: Flat, group: Sequence[int], fit: Fit) -> Iterator[Hypothesis]:
    """A result mixed with its own mean: of what is put at a target's place, that is label smoothing."""
    first = flat.steps[group[0]]
    value = flat.values[first.outputs[0]]
    if first.name not in MIXED or value.dtype.kind != "f" or not value.ndim or value.shape[-1] < 2:
        return

    def mixed(c: float) -> np.ndarray:
        change: Change = lambda _, out: [(1.0 - c) * out[0] + c * out[0].mean(-1, keepdims=True)]  # noqa: E731
        return flat(dict.fromkeys(group, change))

    number, found = fit(mixed, 0.0, [0.1])
    if found is not None:
        cause = "label smoothing" if first.name.startswith("scatter") else "mixed with its mean"
        words = f"{first.name} at {first.place}: {name_constant(number)} of its mean along the last axis"
        yield Hypothesis(cause, words, found, 5, number)
