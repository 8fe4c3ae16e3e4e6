"""A function of the program that runs once too rarely or too often: left out, or applied to another value as well."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity.causes.arrays import Hypothesis
from parity.causes.flat import Flat, value_of

__all__ = ["Run", "of_runs"]


@dataclass(frozen=True)
class Run:
    """One run of a function of one array: numbers of its steps, the slot that it reads and the one that it makes."""

    steps: tuple[int, ...]
    reads: int
    makes: int

    def keeps(self, flat: Flat) -> bool:
        """Whether it keeps the shape of what it reads."""
        return flat.values[self.reads].shape == flat.values[self.makes].shape

    def __call__(self, flat: Flat, value: np.ndarray) -> np.ndarray:
        """What it would have made of another value."""
        new = {self.reads: value}
        for i in self.steps:
            step = flat.steps[i]
            new.update(zip(step.outputs, value_of(step, [new.get(s, flat.values[s]) for s in step.inputs])))
        return new[self.makes]


def of_runs(flat: Flat) -> Iterator[Hypothesis]:
    """Each run left out; and each function that runs twice or more, applied to every value of a shape it has had."""
    every = list(_runs(flat))
    for name, runs in every:
        for run in runs:
            if run.keeps(flat):
                value = flat({_maker(flat, run.makes): lambda _, out, run=run: [flat.values[run.reads]]})
                words = f"{name} left out ({flat.steps[run.steps[0]].place})"
                yield Hypothesis("function left out", words, value, 3)
    for name, runs in every:
        if len(runs) < 2:
            continue
        taken = {slot for run in runs for i in run.steps for slot in flat.steps[i].outputs}
        taken |= {run.reads for run in runs}
        for i, step in enumerate(flat.steps):
            out = flat.values[step.outputs[0]]
            run = next((r for r in runs if r.keeps(flat) and flat.values[r.reads].shape == out.shape), None)
            if run is None or out.dtype.kind != "f" or step.outputs[0] in taken or len(step.outputs) > 1:
                continue
            value = flat({i: lambda _, out, run=run: [run(flat, out[0])]})
            yield Hypothesis("applied too often", f"{name} also to {step.name} at {step.place}", value, 2)


def _maker(flat: Flat, slot: int) -> int:
    return next(i for i, step in enumerate(flat.steps) if slot in step.outputs)


def _runs(flat: Flat) -> Iterator[tuple[str, list[Run]]]:
    """(function, its runs) as far as a run reads one array that the others do not, and makes one."""
    found: dict[tuple[str, tuple[Any, ...]], list[list[int]]] = {}
    for function, group in itertools.groupby(range(len(flat.steps)), key=lambda i: flat.steps[i].place.function):
        numbers = list(group)
        marks = [(flat.steps[i].name, flat.steps[i].place) for i in numbers]
        length = next(n for n in range(1, len(marks) + 1) if len(marks) % n == 0 and _repeats(marks, n))
        for at in range(0, len(numbers), length) if length > 1 else ():
            found.setdefault((function, tuple(marks[:length])), []).append(numbers[at : at + length])
    for (function, _), pieces in found.items():
        made = [_run(flat, piece, [p for p in pieces if p is not piece]) for piece in pieces]
        if runs := [run for run in made if run is not None]:
            yield function, runs


def _repeats(marks: Sequence[object], length: int) -> bool:
    return all(mark == marks[i % length] for i, mark in enumerate(marks))


def _run(flat: Flat, piece: Sequence[int], others: Sequence[Sequence[int]]) -> Run | None:
    made = {slot for i in piece for slot in flat.steps[i].outputs}
    reads = {s for s in _outer(flat, piece) if flat.leaves.get(s, "the output of").startswith("the output of")}
    if others:
        shared = set.intersection(*(_outer(flat, other) for other in others)) & reads
        reads -= shared
    used = {slot for i, step in enumerate(flat.steps) if i not in piece for slot in step.inputs} | {flat.target}
    makes = made & used
    return Run(tuple(piece), reads.pop(), makes.pop()) if len(reads) == 1 and len(makes) == 1 else None


def _outer(flat: Flat, piece: Sequence[int]) -> set[int]:
    """The float slots that a run reads and does not make."""
    made = {slot for i in piece for slot in flat.steps[i].outputs}
    read = {slot for i in piece for slot in flat.steps[i].inputs}
    return {s for s in read - made - flat.literals if flat.values[s].dtype.kind == "f" and np.ndim(flat.values[s])}
