"""What may be done to all that one line of the source makes: moved, clamped, or computed in less."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from parity.causes.arrays import NARROW, Hypothesis
from parity.causes.flat import COARSE, FINE, Change, Flat, wide_operand

__all__ = ["of_line"]


def of_line(flat: Flat, line: Sequence[int]) -> Iterator[Hypothesis]:
    """What may be done to all that one line makes: moved, or computed in less."""
    first = flat.steps[line[0]]
    for name, cut in NARROW.items() if flat.apart <= COARSE else ():
        less = lambda inputs, out, cut=cut: [cut(x) if x.dtype.kind == "f" else x for x in out]  # noqa: E731
        what = "all of" if len({flat.steps[i].place.line for i in line}) > 1 else "the line"
        yield Hypothesis("rounded inside", f"{what} {first.place} in {name}", flat(dict.fromkeys(line, less)), 4)
    shape = flat.values[first.outputs[0]].shape
    bounds = [i for i in line if flat.steps[i].name in ("max", "min", "clamp")]
    if bounds:
        passed = {i: wide_operand(flat, flat.steps[i]) for i in bounds}
        yield Hypothesis("left out", f"clamp at {first.place}: left out", flat(passed), 1)
    if flat.apart < FINE or any(flat.values[flat.steps[i].outputs[0]].shape != shape for i in line):
        return
    for axis, shift in itertools.product(range(len(shape)), (1, -1)):
        if shape[axis] > 1:
            moved = lambda _, out, s=shift, a=axis: [np.roll(x, s, a) for x in out]  # noqa: E731
            value = flat(dict.fromkeys(line, moved))
            yield Hypothesis(
                "shifted by one", f"the line {first.place} moved by {shift:+d} along axis {axis}", value, 2
            )
    yield from slices(flat, line)


def slices(flat: Flat, line: Sequence[int]) -> Iterator[Hypothesis]:
    """Every second element where a line takes halves, and halves where it takes every second."""
    changes: dict[int, Change] = {}
    for i in line:
        step = flat.steps[i]
        strides = step.eqn.params.get("strides") if step.name == "slice" else None
        if strides is None or strides[-1] != 2:
            continue
        start, count = step.eqn.params["start_indices"][-1], flat.values[step.outputs[0]].shape[-1]
        changes[i] = lambda inputs, _, a=start * count, n=count: [inputs[0][..., a : a + n]]
    if changes:
        place = flat.steps[line[0]].place
        yield Hypothesis("interleaved RoPE", f"halves, not neighbours, at {place}", flat(changes), 0)
