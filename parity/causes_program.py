"""Hypotheses about a program: what if one place of the JAX function were another?

The part of the program between the last taps and the one that parts is laid out as a list of steps, evaluated once,
and then again with a constant, an order, a rounding or an operation changed at one place of the source (wherever that
place runs). The change that turns its value into the other side's is the difference, whatever language that side is
written in.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from parity.causes_arrays import NARROW, Hypothesis, is_named, name_constant
from parity.noise import CALLS, CASTS, _lift, _Run, inside

__all__ = ["Flat", "Place", "hypotheses"]

WHOLE = CASTS | {"top_k", "sort", "cond", "while", "scan"}
MOVES = {
    "reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "copy", "slice", "name", "split",
    "concatenate", "stop_gradient", "convert_element_type", "dynamic_slice", "rev",
}  # fmt: skip
"""Steps that only move values: what could be wrong with their values is tried where these are made."""
PLAUSIBLE = 0.3
"""A constant is fitted to the end only if its first step takes this share of the residual."""
COARSE, FINE = 2.0**-5, 2.0**-16
"""Beyond the one, no rounding is tried; below the other, no change of order."""
MOST = 400
"""So many steps are looked into: a part without taps in a large program would take minutes."""

EPS = (0.0, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
BASES = (1e4, 1e5, 5e5, 1e6)
CLIPS = (1.0, 5.0, 6.0, 10.0, 20.0, 30.0, 50.0, 100.0)
"""Bounds that code is written with."""

Change = Callable[[list[np.ndarray], list[np.ndarray]], list[np.ndarray]]


@dataclass(frozen=True)
class Place:
    """Where in the source a step stands."""

    file: str
    line: int
    column: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.function})" if self.file else "an unknown line"


@dataclass
class _Step:
    eqn: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    place: Place

    @property
    def name(self) -> str:
        return self.eqn.primitive.name


@dataclass
class Flat:
    """A program without calls: steps in order, and the value of every slot. Cut taps are constants to what follows."""

    steps: list[_Step] = field(default_factory=list)
    values: dict[int, Any] = field(default_factory=dict)
    leaves: dict[int, str] = field(default_factory=dict)
    """slot -> the name of the parameter, input or cut tap that it holds."""
    spare: dict[str, np.ndarray] = field(default_factory=dict)
    """Every parameter by its name, needed or not."""
    literals: set[int] = field(default_factory=set)
    apart: float = COARSE
    """How far the other side is, over the value's own size: where little, no change of order explains it, and where
    much, no rounding."""
    target: int = -1
    layout: Callable[[Any], np.ndarray] = np.asarray
    slots: Iterator[int] = field(default_factory=itertools.count)

    @classmethod
    def of(
        cls, closed: Any, args: Sequence[np.ndarray], names: Sequence[str], cuts: Mapping[str, np.ndarray], target: Any
    ) -> Flat:
        """`target` is the name of a tap, or the number of an output leaf."""
        flat, taps = cls(), {}

        def constant(value: Any) -> int:
            slot = next(flat.slots)
            flat.values[slot] = _lift(value)
            return slot

        def walk(jaxpr: Any, consts: Sequence[int], inputs: Sequence[int], caller: Place) -> list[int]:
            env = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, inputs))

            def read(atom: Any) -> int:
                if not hasattr(atom, "val"):
                    return env[atom]
                slot = constant(atom.val)
                flat.literals.add(slot)
                return slot

            for eqn in jaxpr.eqns:
                read_in = [read(v) for v in eqn.invars]
                inner = inside(eqn) if eqn.primitive.name in CALLS else None
                place = _place(eqn) or caller
                if inner is not None:
                    out = walk(inner[0], [constant(c) for c in inner[1]], read_in, place)
                elif eqn.primitive.name == "name" and eqn.params["name"] not in taps:
                    name = eqn.params["name"]
                    taps[name] = read_in[0]
                    out = read_in
                    if name in cuts and name != target:
                        out = [constant(cuts[name])]
                        flat.leaves[out[0]] = f"the output of {name}"
                else:
                    out = [next(flat.slots) for _ in eqn.outvars]
                    flat.steps.append(_Step(eqn, tuple(read_in), tuple(out), place))
                env.update(zip(eqn.outvars, out))
            return [read(v) for v in jaxpr.outvars]

        inputs = [constant(x) for x in args]
        flat.leaves.update(zip(inputs, names))
        flat.spare = {n: flat.values[s] for s, n in zip(inputs, names) if flat.values[s].dtype.kind == "f"}
        outputs = walk(closed.jaxpr, [constant(c) for c in closed.consts], inputs, Place("", 0, 0, ""))
        flat.target = taps[target] if isinstance(target, str) else outputs[target]
        flat._keep_what_is_needed()
        for step in flat.steps:
            flat.values.update(zip(step.outputs, _value(step, [flat.values[s] for s in step.inputs])))
        return flat

    def _keep_what_is_needed(self) -> None:
        needed, kept = {self.target}, []
        for step in reversed(self.steps):
            if needed & set(step.outputs):
                kept.append(step)
                needed |= set(step.inputs)
        self.steps = kept[::-1]
        self.leaves = {slot: name for slot, name in self.leaves.items() if slot in needed}

    def turned(self, layout: Callable[[np.ndarray], np.ndarray]) -> Flat:
        """The same with its value in the other side's layout."""
        self.layout = layout
        return self

    @property
    def value(self) -> np.ndarray:
        return self.layout(self.values[self.target])

    def __call__(
        self, changes: Mapping[int, Change] | None = None, leaves: Mapping[int, Any] | None = None
    ) -> np.ndarray:
        """The target's value with steps (by number) and leaves (by slot) changed; only what follows is computed."""
        new: dict[int, Any] = dict(leaves or {})
        for i, step in enumerate(self.steps):
            change = changes.get(i) if changes else None
            touched = any(slot in new for slot in step.inputs)
            if not touched and change is None:
                continue
            inputs = [new.get(slot, self.values[slot]) for slot in step.inputs]
            out = _value(step, inputs) if touched else [self.values[slot] for slot in step.outputs]
            new.update(zip(step.outputs, out if change is None else change(inputs, out)))
        return self.layout(new[self.target]) if self.target in new else self.value

    def groups(self) -> list[list[int]]:
        """Numbers of the steps that one place of the source made; where it ran more than once, each alone as well."""
        found: dict[Any, list[int]] = {}
        for i, step in enumerate(self.steps):
            found.setdefault((step.place, step.name, len(step.outputs)), []).append(i)
        return [*found.values(), *([i] for group in found.values() if len(group) > 1 for i in group)]

    def lines(self) -> list[list[int]]:
        """Numbers of the steps of one line that make floats or move them; of a line that runs again, each run too."""
        found: dict[Any, dict[Any, list[int]]] = {}
        for i, step in enumerate(self.steps):
            if self.values[step.outputs[0]].dtype.kind == "f":
                line = found.setdefault((step.place.file, step.place.line), {})
                line.setdefault((step.place, step.name), []).append(i)
        groups = []
        for line in found.values():
            runs = min(map(len, line.values()))
            groups.append(sorted(i for steps in line.values() for i in steps))
            if runs > 1 and len({len(steps) for steps in line.values()}) == 1:
                groups += [sorted(steps[run] for steps in line.values()) for run in range(runs)]
        functions: dict[Any, list[int]] = {}
        for i, step in enumerate(self.steps):
            if self.values[step.outputs[0]].dtype.kind == "f":
                functions.setdefault((step.place.file, step.place.function), []).append(i)
        groups += functions.values()
        return [group for group in groups if len(group) > 1]


def _value(step: _Step, inputs: list[Any]) -> list[Any]:
    run = _Run("float64")
    return run.equation(step.eqn, step.eqn, inputs) if step.name in WHOLE else run.value(step.eqn, inputs)


def _place(eqn: Any) -> Place | None:
    try:
        from jax._src import source_info_util

        frame = source_info_util.user_frame(eqn.source_info.traceback)
        path = Path(frame.file_name)  # pyright: ignore[reportOptionalMemberAccess]
        file = "/".join(path.parts[-2:])
        function = frame.function_name.removeprefix("made.<locals>.")  # pyright: ignore[reportOptionalMemberAccess]
        return Place(file, frame.start_line, frame.start_column, function)  # pyright: ignore
    except (ImportError, AttributeError, TypeError):  # a private module: only words and grouping depend on it
        return None


# ------------------------------------------------------------------------------------------------ hypotheses


def hypotheses(flat: Flat, theirs: np.ndarray) -> Iterator[Hypothesis]:
    """Every change that is worth a look, with the value that the program then has."""
    if len(flat.steps) > MOST:
        flat.steps = flat.steps[-MOST:]
    fit = _Fit(flat, theirs)
    flat.apart = fit.apart
    yield from _leaves(flat)
    for group in flat.groups():
        yield from _constants(flat, group, fit)
        yield from _discrete(flat, group)
        yield from _factors(flat, group, fit)
    for line in flat.lines():
        yield from _of_line(flat, line)
    yield from _pairs(flat)


def _of_line(flat: Flat, line: Sequence[int]) -> Iterator[Hypothesis]:
    """What may be done to all that one line makes: moved, or computed in less."""
    first = flat.steps[line[0]]
    for name, cut in NARROW.items() if flat.apart <= COARSE else ():
        less = lambda inputs, out, cut=cut: [cut(x) if x.dtype.kind == "f" else x for x in out]  # noqa: E731
        what = "all of" if len({flat.steps[i].place.line for i in line}) > 1 else "the line"
        yield Hypothesis("rounded inside", f"{what} {first.place} in {name}", flat(dict.fromkeys(line, less)), 4)
    shape = flat.values[first.outputs[0]].shape
    bounds = [i for i in line if flat.steps[i].name in ("max", "min", "clamp")]
    if bounds:
        passed = {i: _wide_operand(flat, flat.steps[i]) for i in bounds}
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
    yield from _slices(flat, line)


def _wide_operand(flat: Flat, step: _Step) -> Change:
    at = max(range(len(step.inputs)), key=lambda i: np.size(flat.values[step.inputs[i]]))
    return lambda inputs, _: [inputs[at]]


def _slices(flat: Flat, line: Sequence[int]) -> Iterator[Hypothesis]:
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


def _leaves(flat: Flat) -> Iterator[Hypothesis]:
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


def _constants(flat: Flat, group: Sequence[int], fit: _Fit) -> Iterator[Hypothesis]:
    """Another number where a number stands in the source."""
    first = flat.steps[group[0]]
    for at, slot in enumerate(first.inputs):
        value = flat.values[slot]
        if slot not in flat.literals or value.size != 1 or value.dtype.kind not in "fi" or not np.isfinite(value):
            continue
        value = value.reshape(())

        def changed(number: Any, at: int = at) -> np.ndarray:
            def change(i: int) -> Change:
                def put(inputs: list[Any], _: list[Any]) -> list[Any]:
                    number_ = np.full(np.shape(inputs[at]), number)
                    return _value(flat.steps[i], [*inputs[:at], number_, *inputs[at + 1 :]])

                return put

            return flat({i: change(i) for i in group})

        if value.dtype.kind == "i":
            for other in {int(value) + 1, int(value) - 1, -100, 2 * int(value)} - {int(value)}:
                words = f"{other} in the place of {int(value)} at {first.place}"
                number = np.asarray(other, value.dtype)
                yield Hypothesis(_integer_cause(first), words, changed(number), 0)
            continue
        number, found = fit(lambda c: changed(c), float(value), _scales(first, flat, float(value)))
        if found is not None:
            what = _constant_cause(first, flat, at, float(value), number)
            words = f"{name_constant(number)} in the place of {name_constant(float(value))} at {first.place}"
            yield Hypothesis(what, words, found, 0 if is_named(number) and value != 0 else 5, number)


def _integer_cause(step: _Step) -> str:
    if step.name in ("min", "max", "clamp"):
        return "clipped"
    return "counted otherwise" if step.name in ("eq", "ne") else "shifted by one"


def _constant_cause(step: _Step, flat: Flat, at: int, value: float, other: float) -> str:
    if math.isclose(value, -other):
        return "sign flipped"
    if abs(value) >= 1 and not math.isfinite(other):
        return "mask value"
    followers = {s.name for s in flat.steps if set(step.outputs) & set(s.inputs)}
    if (
        step.name == "add"
        and min(abs(value), abs(other)) < 1.0
        and followers & {"rsqrt", "sqrt", "div", "log", "reshape"}
    ):
        return "eps"
    if step.name == "pow" and at == 0:
        return "base of the angles"
    return "scale factor" if step.name in ("mul", "div") else "constant"


def _scales(step: _Step, flat: Flat, start: float) -> list[float]:
    sizes = {n for slot in (*step.inputs, *step.outputs) for n in np.shape(flat.values[slot]) if n > 1}
    found = {start * f for n in sizes for f in (n**0.5, n**-0.5, float(n), 1.0 / n)}
    found |= {1.0, -start, 2 * start, start / 2, start * 10, start / 10}
    if step.name == "add":
        found = set(EPS)
    elif step.name == "pow":
        found |= set(BASES)
    infinite = [-math.inf, math.inf] if step.name in ("select_n", "sub", "max", "min", "broadcast_in_dim") else []
    return [*infinite, *sorted(found)]


def _factors(flat: Flat, group: Sequence[int], fit: _Fit) -> Iterator[Hypothesis]:
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


def _discrete(flat: Flat, group: Sequence[int]) -> Iterator[Hypothesis]:
    first = flat.steps[group[0]]
    for rank, cause, words, change in _alternatives(flat, first):
        try:
            value = flat(dict.fromkeys(group, change))
        except Exception:
            continue
        if value.shape == flat.value.shape:
            yield Hypothesis(cause, f"{first.name} at {first.place}: {words}", value, rank)


def _alternatives(flat: Flat, step: _Step) -> Iterator[tuple[int, str, str, Change]]:
    """(rank, cause, words, change) of one step."""
    inputs = [flat.values[s] for s in step.inputs]
    out = flat.values[step.outputs[0]]
    on_value = lambda f: lambda _, out: [f(out[0]), *out[1:]]  # noqa: E731
    on_input = lambda f: lambda inputs, _: [f(inputs[0])]  # noqa: E731
    for cause, words, function in _ACTIVATIONS.get(step.name, ()):
        yield 0, cause, words, on_input(function)
    if step.name == "max" and (at := next((i for i, x in enumerate(inputs) if x.size > 1), None)) is not None:
        for cause, words, function in _GATES:
            yield 0, cause, words, lambda inputs, _, f=function, at=at: [inputs[at] * f(inputs[at])]
    if step.name == "rsqrt" and (eps := _eps_before(flat, step)) is not None:
        yield (
            0, "eps", f"{eps:g} added outside the root",
            on_input(lambda x: 1.0 / (np.sqrt(x - eps) + eps)),
        )  # fmt: skip
    if step.name == "select_n" and len(inputs) == 3:
        for at in (1, 2):
            if inputs[at].shape == out.shape and inputs[0].size > 1:
                words = f"its {'first' if at == 1 else 'second'} branch everywhere"
                yield 1, "mask missing", words, lambda inputs, _, at=at: [inputs[at]]
    if step.name == "top_k":
        yield 0, "order", "the smallest, not the largest", lambda inputs, _: _smallest(step, inputs)
    if flat.apart < FINE:
        pass
    elif step.name == "split":
        yield from _split_orders(step, inputs[0])
    elif step.name == "reshape":
        yield from _reshape_orders(inputs[0].shape, out.shape)
    elif step.name == "concatenate" and len(inputs) == 2 and inputs[0].shape == inputs[1].shape:
        yield 2, "order", "its parts change places", lambda inputs, _: [np.concatenate(inputs[::-1], axis=-1)]
    if step.name in ("sub", "div") and inputs[0].shape == inputs[1].shape:
        yield (
            2,
            "operands exchanged",
            "operands exchanged",
            lambda inputs, _: [inputs[1] - inputs[0] if step.name == "sub" else inputs[1] / inputs[0]],
        )
    if step.name in ("add", "sub"):
        flipped = (lambda a, b: a - b) if step.name == "add" else (lambda a, b: a + b)
        yield (
            2,
            "sign flipped",
            f"{'sub' if step.name == 'add' else 'add'} in its place",
            lambda inputs, _: [flipped(*inputs)],
        )
    if out.dtype.kind == "f" and step.name != "broadcast_in_dim" and flat.apart <= COARSE:
        for name, cut in NARROW.items():
            yield 4, "rounded inside", f"rounded to {name}", lambda _, out, cut=cut: [cut(x) for x in out]
    if step.name == "convert_element_type" and inputs[0].dtype.kind == "b" and out.size > 1:
        yield 1, "mask missing", "all True", on_value(np.ones_like)
    if step.name in ("min", "max", "clamp") and out.dtype.kind in "iu":
        yield 0, "left out", "left out", _wide_operand(flat, step)
    if step.name in MOVES or not out.size > 1:
        return
    if step.name in ("mul", "dot_general", "div", "add", "sub") and flat.apart <= COARSE:
        for name, cut in NARROW.items():
            for some in ((0,), (1,), (0, 1)):
                which = "both operands" if len(some) == 2 else f"its operand {some[0] + 1}"
                yield (
                    4,
                    "rounded inside",
                    f"{which} rounded to {name}",
                    lambda x, _, c=cut, some=some: _value(
                        step, [c(v) if i in some and v.dtype.kind == "f" else v for i, v in enumerate(x)]
                    ),
                )
            yield (
                4,
                "rounded inside",
                f"computed in {name}",
                lambda x, _, c=cut: [c(y) for y in _value(step, [c(v) if v.dtype.kind == "f" else v for v in x])],
            )
    if step.name in ("logistic", "exp", "tanh"):
        for bound in CLIPS:
            yield (
                0,
                "clipped",
                f"its input clipped at ±{bound:g}",
                lambda inputs, _, c=bound: _value(step, [np.clip(inputs[0], -c, c)]),
            )
    if step.name in ("mul", "dot_general"):
        for bound in CLIPS:
            yield 1, "clipped", f"clipped at ±{bound:g}", on_value(lambda x, c=bound: np.clip(x, -c, c))
            yield 1, "soft cap", f"capped by {bound:g}·tanh", on_value(lambda x, c=bound: c * np.tanh(x / c))
    if out.dtype.kind == "b":
        yield 1, "mask missing", "all True", on_value(np.ones_like)
        yield 1, "mask inverted", "inverted", on_value(np.logical_not)
    if out.dtype.kind in "iu":
        for shift in (1, -1):
            yield 2, "shifted by one", f"{shift:+d}", on_value(lambda x, s=shift: x + s)
    if out.dtype.kind != "f":
        return
    for at, x in enumerate(inputs):
        if len(inputs) <= 2 and x.dtype.kind == "f" and x.ndim and _fits(x.shape, out.shape):
            left = "" if len(inputs) == 1 else f", its operand {at + 1} passes"
            yield (
                3,
                "left out",
                f"left out{left}",
                lambda inputs, out, at=at: [np.broadcast_to(inputs[at], out[0].shape)],
            )
    if flat.apart < FINE:
        return
    for axis, shift in itertools.product(range(out.ndim), (1, -1)):
        if out.shape[axis] > 1:
            yield (
                2, "shifted by one", f"moved by {shift:+d} along axis {axis}",
                on_value(lambda x, s=shift, a=axis: np.roll(x, s, a)),
            )  # fmt: skip
    for a, b in itertools.combinations(range(out.ndim), 2):
        if out.shape[a] == out.shape[b] > 1:
            yield (
                2, "transposed", f"axes {a} and {b} change places",
                on_value(lambda x, a=a, b=b: np.swapaxes(x, a, b)),
            )  # fmt: skip
    if out.ndim and out.shape[-1] > 1:
        yield (
            2,
            "first for all",
            "the first of the last axis for all",
            on_value(lambda x: np.broadcast_to(x[..., :1], x.shape)),
        )
    if out.ndim:
        yield 2, "mean subtracted", "its mean taken off", on_value(lambda x: x - x.mean(-1, keepdims=True))


def _smallest(step: _Step, inputs: list[Any]) -> list[Any]:
    values, order = _value(step, [-inputs[0]])
    return [-values, order]


def _fits(shape: Sequence[int], whole: Sequence[int]) -> bool:
    return len(shape) == len(whole) and all(n in (1, m) for n, m in zip(shape, whole))


def _eps_before(flat: Flat, step: _Step) -> float | None:
    made = next((s for s in flat.steps if step.inputs[0] in s.outputs), None)
    if made is None or made.name != "add":
        return None
    return next((float(flat.values[s]) for s in made.inputs if s in flat.literals), None)


def _split_orders(step: _Step, x: np.ndarray) -> Iterator[tuple[int, str, str, Change]]:
    sizes, axis = step.eqn.params["sizes"], step.eqn.params["axis"]
    if len(set(sizes)) > 1 or len(sizes) > 3:
        return
    count = len(sizes)
    for order in itertools.product(range(count), repeat=count):
        if order != tuple(range(count)):
            words = f"parts taken as {', '.join(str(i + 1) for i in order)}"
            yield 1, "order of parts", words, lambda _, out, order=order: [out[i] for i in order]
    for block in range(1, sizes[0]):
        if sizes[0] % block == 0:
            words = "neighbours are cut apart, not halves" if block == 1 else f"cut by blocks of {block}"
            yield 1, "interleaved", words, lambda inputs, _, b=block: _by_blocks(inputs[0], axis, count, b)


def _by_blocks(x: np.ndarray, axis: int, count: int, block: int) -> list[np.ndarray]:
    moved = np.moveaxis(x, axis, -1)
    parts = moved.reshape(*moved.shape[:-1], -1, count, block)
    return [np.moveaxis(parts[..., i, :].reshape(*moved.shape[:-1], -1), -1, axis) for i in range(count)]


def _reshape_orders(old: tuple[int, ...], new: tuple[int, ...]) -> Iterator[tuple[int, str, str, Change]]:
    """An axis that is cut in two, or two that become one, in the other order."""
    short, long = sorted((old, new), key=len)
    if len(long) != len(short) + 1:
        return
    for p in range(len(short)):
        a, b = long[p], long[p + 1]
        if short[:p] == long[:p] and short[p] == a * b and short[p + 1 :] == long[p + 2 :] and min(a, b) > 1:
            if old is short:
                turned = (*long[:p], b, a, *long[p + 2 :])
                change: Change = lambda x, _, t=turned, p=p: [np.swapaxes(x[0].reshape(t), p, p + 1)]  # noqa: E731
            else:
                change = lambda x, _, p=p: [np.swapaxes(x[0], p, p + 1).reshape(new)]  # noqa: E731
            yield 1, "order", f"{a} by {b} taken as {b} by {a}", change


def _pairs(flat: Flat) -> Iterator[Hypothesis]:
    """Two changes that undo each other's order: heads tiled, channels interleaved and put back."""
    cuts: list[tuple[list[int], str, Change, str]] = []
    joins: list[tuple[list[int], str, Change, str]] = []
    for group in flat.groups():
        step = flat.steps[group[0]]
        if step.name == "reshape":
            old, new = (flat.values[s[0]].shape for s in (step.inputs, step.outputs))
            for _, _, words, change in _reshape_orders(old, new):
                (cuts if len(new) > len(old) else joins).append((group, words, change, "heads tiled"))
        elif step.name == "split" and len(step.outputs) == 2:
            half = lambda inputs, _, s=step: _by_blocks(inputs[0], s.eqn.params["axis"], 2, 1)  # noqa: E731
            cuts.append((group, "neighbours are pairs", half, "interleaved RoPE"))
        elif step.name == "concatenate" and len(step.inputs) == 2:
            back = lambda inputs, _: [np.stack(inputs, -1).reshape(*inputs[0].shape[:-1], -1)]  # noqa: E731
            joins.append((group, "put back beside each other", back, "interleaved RoPE"))
    for (one, words, cut, cause), (two, also, join, other) in itertools.product(cuts, joins):
        if cause != other or set(one) & set(two):
            continue
        try:
            value = flat({**dict.fromkeys(one, cut), **dict.fromkeys(two, join)})
        except Exception:
            continue
        if value.shape == flat.value.shape:
            yield Hypothesis(cause, f"{words} at {flat.steps[one[0]].place}, {also}", value, 0)


def _normal(x: np.ndarray) -> np.ndarray:
    from scipy.special import ndtr

    return ndtr(x)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return expit(x)


def _cubic(x: np.ndarray) -> np.ndarray:
    return np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))


_ROOT = math.sqrt(2.0)
_ACTIVATIONS: dict[str, tuple[tuple[str, str, Callable[[Any], Any]], ...]] = {
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


_GATES: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
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


class _Fit:
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
            if move is None:
                return start, None  # it has no effect
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
            return best[1], best[2]

    def _newton(self, function: Callable[[float], np.ndarray], at: float, value: np.ndarray) -> float | None:
        step = (abs(at) or 1.0) * 2.0**-13
        slope = (function(at + step) - value) / step
        size = float(np.sum(np.square(slope)))
        if not math.isfinite(size) or size == 0:
            return None
        return at + float(np.sum(slope * (self.theirs - value))) / size
