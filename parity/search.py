"""Looks for the input on which two functions part, where fixtures only try the inputs that somebody thought of.

A `Subject` is a pair with a strategy for its inputs (Hypothesis). Every input is judged as `parity.judge` judges, so
the score that the search climbs is the distance in noise units over its threshold. Where inputs are smooth, gradient
ascent on the difference of the two sides starts from the best of them. What parts is shrunk to a small input and
written as a snippet that shows it again.

A function may refuse an input: by an exception, or, where a compiled program cannot raise, by NaN. The sides agree on
such an input if both refuse it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from parity.errors import CannotLook, Misuse
from parity.judge import Findings, Judge
from parity.pair import Pair
from parity.verdict import THRESHOLDS, Judgement, Verdict

__all__ = ["EVALUATIONS", "PRECISIONS", "Example", "Found", "Look", "Subject", "look", "search", "show", "snippet"]

PRECISIONS = ("float64", "float32")
EVALUATIONS = 60
"""Of each function, unless a budget is named."""
SHRINKS = 80
"""Evaluations beyond the budget that making a found input small may take."""
ASCENT = 8
"""Evaluations that gradient ascent may take of the budget."""
STEPS = (1.0, 0.1, 0.01)
"""Lengths of its steps, relative to the input."""


@dataclass(frozen=True)
class Example:
    """One input. `variant` and `weights` are names that the subject turns into a pair and its weights."""

    inputs: tuple[np.ndarray, ...]
    precision: str = "float64"
    weights: int = 0
    variant: Hashable = None
    exact: bool = False
    """Ties in it are exact on both sides, whatever the noise: another choice is not as right."""


@dataclass
class Subject:
    """A pair of functions and the inputs to try.

    pair:    variant -> Pair; a variant is what is fixed before tracing (top-k, a size). None alone by default.
    draw:    Hypothesis' draw function -> Example, whose precision the search replaces.
    weights: (pair, number) -> weights by torch's names.
    smooth:  which inputs gradient ascent may move.
    """

    name: str
    pair: Callable[[Any], Pair]
    draw: Callable[[Callable[..., Any]], Example]
    weights: Callable[[Pair, int], Mapping[str, np.ndarray]] = lambda pair, number: {}
    smooth: tuple[int, ...] = ()
    precisions: tuple[str, ...] = PRECISIONS
    share: float = 1.0
    """Of the budget: less for what takes long."""
    judges: dict[Any, Judge] = field(default_factory=dict, repr=False)

    def judge(self, variant: Hashable) -> Judge:
        """Kept, so that programs are compiled once for each set of shapes."""
        if variant not in self.judges:
            self.judges[variant] = Judge(dataclasses.replace(self.pair(variant), hasty=True), shares=False)
        return self.judges[variant]


@dataclass(frozen=True)
class Look:
    """What one evaluation found."""

    verdict: Verdict
    z: float
    """The largest distance of any element of any output, in noise units."""
    score: float
    """The largest look over its threshold."""
    evidence: str
    values: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)
    findings: Findings | None = field(default=None, repr=False)

    @property
    def parted(self) -> bool:
        return self.verdict.gravity >= Verdict.PINNED.gravity

    def __str__(self) -> str:
        lines = [f"{self.verdict}: {self.evidence}"]
        for name, (ours, theirs) in self.values.items():
            lines += [f"{name}, jax:", str(ours), f"{name}, torch:", str(theirs)]
        return "\n".join(lines)


@dataclass
class Found:
    """What the search of one function gave."""

    name: str
    evaluations: int = 0
    undetermined: int = 0
    refused: int = 0
    """Inputs that both sides refuse."""
    z: float = 0.0
    score: float = 0.0
    verdict: Verdict | None = None
    evidence: str = ""
    best: Example | None = None
    example: Example | None = None
    """Where they part, minimised."""
    seconds: float = 0.0
    ended: bool = True
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        record = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("best", "example")}
        record |= {k: v if math.isfinite(v) else str(v) for k, v in record.items() if isinstance(v, float)}
        record["verdict"] = None if self.verdict is None else str(self.verdict)
        record["snippet"] = None if self.example is None else snippet(self.name, self.example)
        return record


class _Parted(Exception):
    """Hypothesis shrinks what raises."""


class _Enough(BaseException):
    """The budget is spent; Hypothesis hands on what is no Exception."""


def look(subject: Subject, example: Example) -> Look:
    """Judge both sides of a subject on one input."""
    judge = subject.judge(example.variant)
    weights = subject.weights(judge.pair, example.weights)
    try:
        with np.errstate(all="ignore"):
            found = judge(weights, example.inputs, example.precision)
    except CannotLook as error:
        return _refusal(judge, weights, example, error)
    wide = example.precision == "float64"
    judgements = {n: _strict(j, example.exact and n in found.excused, wide) for n, j in found.outputs.items()}
    worst = max(judgements, key=lambda name: (judgements[name].verdict.gravity, _score(judgements[name])))
    # What is as large as its noise, or excused by a tie, says nothing: it must not lead the climb.
    said = [j for j in judgements.values() if j.verdict is not Verdict.UNDETERMINED]
    return Look(
        verdict=judgements[worst].verdict,
        z=max((d.peak for j in said for d in (j.same, j.jax, j.torch)), default=0.0),
        score=max((_score(j) for j in said), default=0.0),
        evidence=f"{worst}: {judgements[worst].evidence}",
        values={name: found.values[name][:2] for name in judgements},
        findings=found,
    )


def _strict(judgement: Judgement, exact: bool, wide: bool) -> Judgement:
    """A difference that a tie excused is one after all where the tie is exact.

    And in float64 a side may repeat the reference's arithmetic bit for bit: that the other one errs more says nothing.
    """
    if exact:
        words = judgement.evidence.partition("; ")[2]
        return dataclasses.replace(judgement, verdict=Verdict.DIFFER, evidence=f"ties are exact here; {words}")
    if wide and judgement.verdict is Verdict.UNSTABLE and judgement.lost <= THRESHOLDS.unstable_ratio:
        return dataclasses.replace(judgement, verdict=Verdict.AGREE, dwarf=0.0)
    return dataclasses.replace(judgement, dwarf=0.0) if wide else judgement


def _score(judgement: Judgement) -> float:
    distances = max(d.excess for d in (judgement.same, judgement.jax, judgement.torch))
    return max(distances, judgement.lost / THRESHOLDS.unstable_ratio, judgement.dwarf / THRESHOLDS.dwarf_ratio)


def _refusal(judge: Judge, weights: Mapping[str, np.ndarray], example: Example, error: CannotLook) -> Look:
    """A side raised: does the other one refuse the input as well?"""
    if error.__cause__ is None:  # not a side's own exception: nothing was looked at
        raise error
    jax, torch = judge.cpu
    refusals: list[str] = []
    for name, side in (("jax", jax), ("torch", torch)):
        try:
            outputs, _ = side(weights, example.inputs, example.precision)
        except CannotLook as raised:
            refusals.append(str(raised))
            continue
        if any(value.dtype.kind == "f" and np.isnan(value).any() for value in outputs.values()):
            refusals.append(f"the {name} side gives NaN")
    if len(refusals) == 2:
        return Look(Verdict.UNDETERMINED, 0.0, 0.0, f"both refuse: {'; '.join(refusals)}")
    return Look(Verdict.DIFFER, math.inf, math.inf, f"{refusals[0] if refusals else error}; the other side does not")


# ------------------------------------------------------------------------------------------------ the search


def search(
    subject: Subject,
    evaluations: int = EVALUATIONS,
    seconds: float | None = None,
    seed: int = 0,
    tell: Callable[[Found], None] | None = None,
    precisions: Sequence[str] = PRECISIONS,
    found: Found | None = None,
) -> Found:
    """Look for an input on which `subject` parts, within so many evaluations or seconds (one more input and shrinking).

    The same seed and evaluations give the same result. `found` is filled as the search goes, so that whoever
    interrupts it has what there was.
    """
    found = Found(subject.name) if found is None else found
    allowed = [p for p in subject.precisions if p in precisions]
    if not allowed:
        raise Misuse(f"precision: {subject.name} is looked at in {', '.join(subject.precisions)}; ask for one of them")
    state = _State(subject, found, tell, evaluations, time.perf_counter() + (math.inf if seconds is None else seconds))
    started = time.perf_counter()
    try:
        _hypothesis(state, allowed, seed)
        if found.example is None and found.best is not None and subject.smooth:
            _ascend(state, found.best)
        if found.example is not None:
            _round(state, found.example)
    except CannotLook as error:
        found.error = str(error)
    except _Enough:
        pass
    except KeyboardInterrupt:
        found.ended = False
        raise
    finally:
        found.seconds += time.perf_counter() - started
    return found


@dataclass
class _State:
    subject: Subject
    found: Found
    tell: Callable[[Found], None] | None
    budget: int
    deadline: float

    @property
    def spent(self) -> bool:
        limit = self.budget + (SHRINKS if self.found.example is not None else 0)
        return self.found.evaluations >= limit or (
            self.found.example is None and time.perf_counter() > self.deadline and self.found.evaluations > 0
        )

    def __call__(self, example: Example) -> Look:
        """Evaluate and write down."""
        if self.spent:
            raise _Enough
        found, seen = self.found, look(self.subject, example)
        found.evaluations += 1
        found.undetermined += seen.verdict is Verdict.UNDETERMINED
        found.refused += seen.evidence.startswith("both refuse")
        if seen.parted:  # the last one is the smallest: only smaller ones are tried
            found.verdict, found.evidence, found.example = seen.verdict, seen.evidence, example
        elif found.verdict is None or (found.verdict is Verdict.UNDETERMINED and seen.verdict is Verdict.AGREE):
            found.verdict, found.evidence = seen.verdict, seen.evidence
        if seen.score > found.score or found.best is None:
            found.best, found.score = example, seen.score
        found.z = max(found.z, seen.z)
        if self.tell is not None:
            self.tell(found)
        return seen


def _hypothesis(state: _State, precisions: Sequence[str], seed: int) -> None:
    import hypothesis
    from hypothesis import strategies
    from hypothesis.errors import Flaky

    phases = (hypothesis.Phase.generate, hypothesis.Phase.target, hypothesis.Phase.shrink)
    searched = max(1, state.budget - (ASCENT if state.subject.smooth else 0))

    @hypothesis.settings(
        max_examples=searched, database=None, deadline=None, phases=phases, report_multiple_bugs=False,
        suppress_health_check=[*hypothesis.HealthCheck],  # pyright: ignore[reportArgumentType]
        verbosity=hypothesis.Verbosity.quiet,
    )  # fmt: skip
    @hypothesis.seed(seed)
    @hypothesis.given(strategies.data())
    def attempt(data: Any) -> None:
        precision = data.draw(strategies.sampled_from(list(precisions)))
        example = dataclasses.replace(state.subject.draw(data.draw), precision=precision)
        if state.found.example is None and state.found.evaluations >= searched:
            raise _Enough
        seen = state(example)
        # The order of magnitude: a difference of 1e15 units must not hide the way to the next.
        hypothesis.target(math.log(min(max(seen.score, _SMALLEST), _LARGEST)), label="distance over its threshold")
        if seen.parted:
            raise _Parted

    try:
        attempt()
    except (_Parted, Flaky):
        pass
    except _Enough:
        if state.found.example is not None:
            raise


_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def _ascend(state: _State, example: Example) -> None:
    """A few steps up the gradient of ½·Σ((f_jax − f_torch) / σ)², from the best input so far."""
    seen = state(example)
    while not seen.parted:
        slopes = _slopes(state.subject, example, seen)
        for step in STEPS:
            moved = list(example.inputs)
            for at, slope in slopes.items():
                size = math.sqrt(float(np.mean(np.square(moved[at], dtype=np.float64)))) or 1.0
                moved[at] = (moved[at] + step * size * slope).astype(np.float32)
            candidate = dataclasses.replace(example, inputs=tuple(moved))
            found = state(candidate)
            if found.score > seen.score or found.parted:
                example, seen = candidate, found
                break
        else:
            return


def _slopes(subject: Subject, example: Example, seen: Look) -> dict[int, np.ndarray]:
    """input -> direction (RMS 1) in which the two sides' outputs move apart: both sides' gradients, subtracted."""
    import jax
    import jax.numpy as jnp
    import torch

    from parity.sides import _flatten, _tensor, as_inputs

    judge = subject.judge(example.variant)
    pair, weights = judge.pair, subject.weights(judge.pair, example.weights)
    pulls = {}
    for name, (ours, theirs, _, noise) in (seen.findings.values if seen.findings else {}).items():
        if ours.dtype.kind == "f" and name in seen.values:
            with np.errstate(all="ignore"):
                pull = (ours - theirs) / np.square(noise.sigma)
            pulls[name] = np.where(np.isfinite(pull), pull, 0.0)
    top = max((np.abs(pull).max() for pull in pulls.values() if pull.size), default=0.0)
    if not top or pair.loss is not None:
        return {}
    pulls = {name: pull / top for name, pull in pulls.items()}
    inputs = as_inputs(example.inputs, "float64")
    with jax.enable_x64(True):
        params = pair.jax_params({k: np.asarray(v, np.float64) for k, v in weights.items()})

        def outputs(*moved):
            now = list(inputs)
            for at, value in zip(subject.smooth, moved):
                now[at] = value
            return [jnp.asarray(x) for x in jax.tree.leaves(pair.jax(params, *now)) if jnp.asarray(x).dtype.kind == "f"]

        _, back = jax.vjp(outputs, *(jnp.asarray(inputs[at]) for at in subject.smooth))
        ours = [np.asarray(g) for g in back([jnp.asarray(p) for p in pulls.values()])]
    tensors = [_tensor(x, "float64") for x in inputs]
    for at in subject.smooth:
        tensors[at].requires_grad_(True)
    given = {k: _tensor(v, "float64") for k, v in weights.items()}
    with torch.enable_grad():
        if isinstance(pair.torch, torch.nn.Module):
            module = judge.cpu[1]._module(torch.float64)
            result = pair.torch_call(module, *tensors) if pair.torch_call else module(*tensors)
        else:
            result = pair.torch(given, *tensors)
        flat = {"output" if k == "" else k: v for k, v in _flatten(result).items()}
        total = torch.stack([(flat[k] * torch.from_numpy(p)).sum() for k, p in pulls.items()]).sum()
        theirs = torch.autograd.grad(total, [tensors[at] for at in subject.smooth], allow_unused=True)
    slopes = {}
    for at, left, right in zip(subject.smooth, ours, theirs):
        slope = np.nan_to_num(left - (0.0 if right is None else right.numpy()))
        size = math.sqrt(float(np.mean(np.square(slope)))) if slope.size else 0.0
        slopes[at] = slope / size if size else slope
    return slopes


def _round(state: _State, example: Example) -> None:
    """What is left after shrinking with fewer digits, as long as it still parts."""
    for digits in (1, 2):
        for at, value in enumerate(example.inputs):
            short = _digits(value, digits)
            if value.dtype.kind != "f" or np.array_equal(short, value, equal_nan=True):
                continue
            inputs = (*example.inputs[:at], short, *example.inputs[at + 1 :])
            candidate = dataclasses.replace(example, inputs=inputs)
            if state(candidate).parted:
                example = candidate


def _digits(value: np.ndarray, digits: int) -> np.ndarray:
    """`value` rounded to so many decimal digits."""
    if value.dtype.kind != "f":
        return value
    flat = [float(f"{x:.{digits - 1}e}") for x in value.astype(np.float64).ravel()]
    return np.array(flat, np.float64).reshape(value.shape).astype(value.dtype)


# ------------------------------------------------------------------------------------------------ saying it


def snippet(name: str, example: Example) -> str:
    """Python that shows the example again."""
    arrays = ",\n    ".join(_literal(x) for x in example.inputs)
    fields = "".join(
        f", {key}={getattr(example, key)!r}"
        for key, default in (("precision", None), ("weights", 0), ("variant", None), ("exact", False))
        if getattr(example, key) != default
    )
    return (
        "import numpy as np\nfrom numpy import inf, nan\nfrom parity.search import Example, show\n\n"
        f"inputs = (\n    {arrays},\n)\n"
        f"print(show({name!r}, Example(inputs{fields})))"
    )


def _literal(x: np.ndarray) -> str:
    values = [str(v) for v in x.ravel()]
    if x.size > 1 and len(set(values)) == 1:
        return f"np.full({x.shape}, {values[0]}, np.{x.dtype.name})".replace("np.bool)", "np.bool_)")
    kind = "np.bool_" if x.dtype.kind == "b" else f"np.{x.dtype.name}"
    flat = f"np.array([{', '.join(values)}], {kind})"
    return f"{flat}.reshape{x.shape}" if x.ndim != 1 else flat


@lru_cache(maxsize=1)
def _subjects() -> dict[str, Subject]:
    from parity.search_subjects import subjects

    return {subject.name: subject for subject in subjects()}


def show(subject: str | Subject, example: Example) -> Look:
    """`look` for a subject of parity.search_subjects by its name, or for anybody's; print it."""
    if isinstance(subject, Subject):
        return look(subject, example)
    known = _subjects()
    if subject not in known:
        raise Misuse(f"subject: {subject!r} is not one of {', '.join(known)}; pass your Subject itself")
    return look(known[subject], example)
