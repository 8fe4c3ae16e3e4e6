"""A JAX program laid out as a list of steps, each with its value: one is changed, what follows is computed anew."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from parity.noise import CALLS, CASTS, _lift, _Run, inside

__all__ = ["Change", "COARSE", "FINE", "Flat", "Place", "Step", "MOVES", "WHOLE", "value_of", "wide_operand"]

WHOLE = CASTS | {"top_k", "sort", "cond", "while", "scan"}
MOVES = {
    "reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "copy", "slice", "name", "split",
    "turn", "turns", "concatenate", "stop_gradient", "convert_element_type", "dynamic_slice", "rev",
}  # fmt: skip
"""Steps that only move values: what could be wrong with their values is tried where these are made."""
TURNS = 32
"""A loop of so many turns is laid out turn by turn."""
SPREADS = {"broadcast_in_dim", "reshape", "squeeze"}
COARSE, FINE = 2.0**-5, 2.0**-16
"""Beyond the one, no rounding is tried; below the other, no change of order."""

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
class Step:
    """One operation: which slots it reads and writes, and where it stands."""

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

    steps: list[Step] = field(default_factory=list)
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
        cls,
        closed: Any,
        args: Sequence[np.ndarray],
        names: Sequence[str],
        cuts: Mapping[str, np.ndarray],
        target: Any,
        run: bool = True,
    ) -> Flat:
        """`target` is the name of a tap, or the number of an output leaf; `run`: evaluate it."""
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
                if eqn.primitive.name == "scan" and eqn.params["length"] <= TURNS:
                    out = loop(eqn, read_in, place)
                elif inner is not None:
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
                    flat.steps.append(Step(eqn, tuple(read_in), tuple(out), place))
                env.update(zip(eqn.outvars, out))
            return [read(v) for v in jaxpr.outvars]

        def made(name: str, inputs: Sequence[int], place: Place, **params: Any) -> int:
            out = next(flat.slots)
            flat.steps.append(Step(_Made(name, params), tuple(inputs), (out,), place))
            return out

        def loop(eqn: Any, inputs: Sequence[int], place: Place) -> list[int]:
            """A short loop, turn by turn."""
            body, consts, carry = eqn.params["jaxpr"], eqn.params["num_consts"], eqn.params["num_carry"]
            shared, state, lists = inputs[:consts], list(inputs[consts : consts + carry]), inputs[consts + carry :]
            turns = range(eqn.params["length"])
            rows: list[list[int]] = []
            for turn in reversed(turns) if eqn.params["reverse"] else turns:
                each = [made("turn", [x], place, at=turn) for x in lists]
                out = walk(body.jaxpr, [constant(c) for c in body.consts], [*shared, *state, *each], place)
                state = out[:carry]
                rows.append(out[carry:])
            rows = rows[::-1] if eqn.params["reverse"] else rows
            return [*state, *(made("turns", column, place) for column in zip(*rows))]

        inputs = [constant(x) for x in args]
        flat.leaves.update(zip(inputs, names))
        flat.spare = {n: flat.values[s] for s, n in zip(inputs, names) if flat.values[s].dtype.kind == "f"}
        outputs = walk(closed.jaxpr, [constant(c) for c in closed.consts], inputs, Place("", 0, 0, ""))
        flat.target = taps[target] if isinstance(target, str) else outputs[target]
        flat._keep_what_is_needed()
        for step in flat.steps if run else ():
            flat.values.update(zip(step.outputs, value_of(step, [flat.values[s] for s in step.inputs])))
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
        self,
        changes: Mapping[int, Change] | None = None,
        leaves: Mapping[int, Any] | None = None,
        wide: bool = False,
    ) -> np.ndarray:
        """The target's value with steps (by number) and leaves (by slot) changed; only what follows is computed.

        `wide`: a changed value may have more than its shape, and passes by what would only have spread it.
        """
        new: dict[int, Any] = dict(leaves or {})
        for i, step in enumerate(self.steps):
            change = changes.get(i) if changes else None
            touched = any(slot in new for slot in step.inputs)
            if not touched and change is None:
                continue
            inputs = [new.get(slot, self.values[slot]) for slot in step.inputs]
            if wide and step.name in SPREADS and inputs[0].shape != self.values[step.inputs[0]].shape:
                out = inputs[:1]
            else:
                out = value_of(step, inputs) if touched else [self.values[slot] for slot in step.outputs]
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


@dataclass(frozen=True)
class _Made:
    """What an unrolled loop adds: its lists are taken apart (`turn`) and put together (`turns`)."""

    name: str
    params: dict[str, Any]

    @property
    def primitive(self) -> _Made:
        return self


def value_of(step: Step, inputs: list[Any]) -> list[Any]:
    """What a step makes of these inputs."""
    if isinstance(step.eqn, _Made):
        return [inputs[0][step.eqn.params["at"]] if step.name == "turn" else np.stack(inputs)]
    run = _interpreter()
    run.tape.clear()  # what it notes for others is of no use here
    return run.equation(step.eqn, step.eqn, inputs) if step.name in WHOLE else run.value(step.eqn, inputs)


@cache
def _interpreter() -> _Run:
    return _Run("float64")


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


def wide_operand(flat: Flat, step: Step) -> Change:
    """Its largest operand passes; of equal ones, that which is no number of the source."""
    size = lambda i: (np.size(flat.values[step.inputs[i]]), step.inputs[i] not in flat.literals)  # noqa: E731
    at = max(range(len(step.inputs)), key=size)
    return lambda inputs, _: [inputs[at]]
