"""Why do the sides part here? Known causes, tried as hypotheses; the one that explains the residual is named.

Families of causes are tried on the tensor at which the sides part. Two serve anybody's pair: what may have been done to
the array (parity.causes.arrays), and what may be otherwise at one place of the JAX program, its constants, order,
weights and inputs (parity.causes.program; for gradients, parity.causes.flow). Optimizers have formulas of their own
(parity.causes.optimizer). The last knows our models: the bugs of the catalogue, put into the other twin
(parity.causes.model).

A cause is named when it brings the residual to within the noise, or explains as much of it as THRESHOLDS asks. Where
nothing does, a residual that is as large as the rounding of a narrower type, and spread like it, is named as that.
Looking has a limit in seconds; what was left untried is said.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from parity.causes import arrays, optimizer
from parity.causes.arrays import Hypothesis, share
from parity.errors import CannotLook
from parity.pair import Pair
from parity.precision import precision as format_of
from parity.precision import unit_roundoff
from parity.sides import as_inputs
from parity.verdict import THRESHOLDS, Noise, measure, subtract

__all__ = ["Diagnosis", "Question", "best", "diagnose", "part"]

FEW = 8
"""A tensor of fewer elements is too small for a fit."""
MANY = 256
"""A tensor of fewer elements cannot show that its residual is spread like noise."""
SMALLEST = 1 / 8
"""In units of a narrower type's noise: less than this is not what computing a part in it leaves."""
GENERAL = 5
"""From this rank on a hypothesis fits a number that nobody would write."""


@dataclass(frozen=True)
class Diagnosis:
    """The best cause that was found for one tensor."""

    tensor: str
    cause: str
    words: str
    share: float
    """Of the residual: 1 is all of it."""
    left: float
    """z of what is left."""
    within: bool
    """What is left is within the noise."""
    named: bool
    """Whether it is good enough to be called the cause."""
    family: str
    """arrays, program, flow, optimizer, model or size."""
    tried: int
    ended: bool = True
    """Whether everything was tried before the time was up."""

    def __str__(self) -> str:
        return self._words + ("" if self.ended else f"; the time was up after {self.tried} causes, the rest is untried")

    @property
    def _words(self) -> str:
        if self.family == "size":
            return f"{self.cause}: {self.words}"
        much = f"explains {min(self.share, 1.0):.1%} of the residual, which leaves z = {self.left:.2g}"
        if self.named:
            return f"{self.cause}: {self.words}; {much}"
        return f"no known cause explains it ({self.tried} tried); the nearest, {self.cause}: {self.words}, {much}"


@dataclass(frozen=True)
class Question:
    """What parts: a tensor of a pair, and what the side in question gave for it and at the taps before it."""

    pair: Pair
    weights: Mapping[str, np.ndarray]
    inputs: Sequence[Any]
    precision: str
    tensor: str
    """A tap ("tap NAME"), an output, "loss" or "gradient NAME"."""
    ours: Mapping[str, np.ndarray]
    """What it is compared with, by the names of Findings.values."""
    theirs: Mapping[str, np.ndarray]
    noise: Mapping[str, Noise]
    parted: frozenset[str] = frozenset()
    """Every tensor that differs."""
    until: float = math.inf
    """When the time is up, as time.monotonic() tells it."""

    @property
    def up(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self.until

    @property
    def args(self) -> tuple[Any, ...]:
        """(parameters, *inputs) of the JAX function, rounded to the precision."""
        dtype = format_of(self.precision).numpy
        rounded = {k: np.asarray(v).astype(dtype) for k, v in self.weights.items()}
        return (self.pair.jax_params(rounded), *as_inputs(self.inputs, self.precision))

    def left(self, value: np.ndarray, tensor: str = "", precision: str = "") -> Any:
        """The distance of theirs from a value, in units of the precision's noise or another's."""
        tensor = tensor or self.tensor
        noise = self.noise[tensor]
        unit = unit_roundoff(precision or self.precision) * np.sqrt(2.0)
        # The noise is that of our values, theirs may be larger: they may have as much for their size. Elements without
        # noise, which a mask kept at zero, are measured by the tensor's own.
        moving = noise.sigma[noise.sigma > 0]
        typical = float(np.sqrt(np.mean(np.square(moving)))) if moving.size else 1.0
        size = float(np.sqrt(np.mean(np.square(self.ours[tensor])))) if tensor in self.ours else 0.0
        sigma = np.where(noise.sigma > 0, noise.sigma, typical)
        if size > 0 and np.isfinite(size):
            sigma = np.maximum(sigma, typical / size * np.nan_to_num(np.abs(self.theirs[tensor])))
        return measure(subtract(self.theirs[tensor], value), sigma * unit, noise.dof)


def diagnose(question: Question, model: bool = True) -> Diagnosis | None:
    """The best cause, or None if nothing could be tried. `model`: the library of our own models' bugs as well."""
    found: list[Diagnosis | None] = []
    question = _upstream(question)
    more = _with_more(question)
    asked = [question] if more is question else [more, question]
    with np.errstate(all="ignore"):
        for one in asked:
            if found and one.up:
                break
            few = one.theirs[one.tensor].size < FEW
            found.append(best(one, "arrays", _on_arrays(one), few))
            if optimizer.fits(one.tensor):
                found.append(optimizer.diagnose(one))
            elif one.tensor.startswith("gradient ") and "loss" not in one.parted:
                from parity.causes import flow

                found.append(flow.diagnose(one))
            else:
                found.append(_on_program(one, few))
            if any(d is not None and d.within for d in found):
                break
        if not any(d is not None and d.named for d in found):
            found.append(_by_size(question))
        if model and not any(d is not None and d.within for d in found):
            from parity.causes import model as library

            if library.fits(question.pair):
                found.append(library.diagnose(question))
    known = [d for d in found if d is not None]
    if not known:
        return None
    tried = sum(d.tried for d in known)
    # A general factor explains what a place in the program explains too: the place is the better answer.
    order = ("model", "program", "flow", "optimizer", "arrays", "size")
    winner = max(known, key=lambda d: (d.within, d.named, round(d.share, 6), -order.index(d.family)))
    return replace(winner, tried=tried, ended=not question.up)


def _upstream(question: Question) -> Question:
    """Of several outputs that differ the one that the fewest steps of the program make: it is nearest to the cause."""
    outputs = [
        n for n in question.ours if n in question.parted and not n.startswith(("tap ", "gradient ")) and n != "loss"
    ]
    if question.tensor not in outputs or len(outputs) < 2 or optimizer.fits(question.tensor):
        return question
    try:
        steps = dict(zip(outputs, (len(flat.steps) for flat in _parts(question, outputs, run=False))))
    except CannotLook:
        return question
    return replace(question, tensor=min(outputs, key=lambda n: (steps[n], outputs.index(n))))


def _with_more(question: Question) -> Question:
    """A loss is one number, which any constant explains: its gradient by the last parameter says the same with more."""
    gradients = [n for n in question.parted if n.startswith("gradient ")]
    if question.tensor != "loss" or not gradients:
        return question
    last = [n for n in question.theirs if n.startswith("gradient ")]
    order = {link.torch: i for i, link in enumerate(question.pair.links)}
    if hasattr(question.pair.torch, "named_parameters"):
        order = {name: i for i, (name, _) in enumerate(question.pair.torch.named_parameters())}
    tensor = max(last, key=lambda n: order.get(n.removeprefix("gradient "), -1))
    return replace(question, tensor=tensor) if tensor in gradients else question


def best(question: Question, family: str, hypotheses: Iterable[Hypothesis], few: bool = False) -> Diagnosis | None:
    """The hypothesis that leaves least; of those that leave nothing but noise, the most particular one.

    `few`: the tensor has few elements, so that a constant which was fitted to it proves nothing.
    """
    ours, theirs = question.ours[question.tensor], question.theirs[question.tensor]
    winner, key, tried = None, None, 0
    for hypothesis in hypotheses:
        if question.up and winner is not None:
            break
        tried += 1
        if few and hypothesis.number is not None:
            continue
        much = share(ours, theirs, hypothesis.value)
        if key is not None and much <= 0:
            continue
        close = much >= THRESHOLDS.explained
        distance = question.left(hypothesis.value) if close else None
        within = distance is not None and distance.within
        # A general factor that leaves more than noise is no cause, whatever it explains; nor is a part of a number.
        named = close and (within or (hypothesis.rank < GENERAL and not few))
        new = (within, named, -hypothesis.rank if within else 0, much)
        if key is None or new > key:
            winner, key = (hypothesis, much, within, named), new
            if within and hypothesis.rank == 0:
                break  # nothing could be more particular
    if winner is None:
        return None
    hypothesis, much, within, named = winner
    if not np.isfinite(much):
        much = 0.0
    left = question.left(hypothesis.value).rms if hypothesis.value.shape == theirs.shape else float("inf")
    return Diagnosis(question.tensor, hypothesis.cause, hypothesis.words, much, left, within, named, family, tried)


def _by_size(question: Question) -> Diagnosis | None:
    """The type whose rounding is as large as the residual, and as evenly spread over rows, columns and elements."""
    ours = question.ours[question.tensor]
    own = unit_roundoff(question.precision)
    for name in ("float32", "float16", "bfloat16"):
        if unit_roundoff(name) <= own or ours.size < MANY:
            continue
        distance = question.left(ours, precision=name)
        if distance.within and distance.rms >= SMALLEST:
            words = (
                f"as much as computing in {name} leaves here, and spread like it (z = {distance.rms:.2g} of its noise)"
            )
            return Diagnosis(question.tensor, "rounded inside", words, 0.0, distance.rms, False, True, "size", 1)
    return None


def _on_arrays(question: Question) -> Iterable[Hypothesis]:
    return arrays.hypotheses(question.ours[question.tensor], question.theirs[question.tensor])


def _on_program(question: Question, few: bool) -> Diagnosis | None:
    from parity.causes import program
    from parity.noise import _pools

    with _pools().limit(limits=1, user_api="blas"):
        try:
            flat = part(question)
        except CannotLook:
            return None
        tensor, theirs = question.tensor, question.theirs[question.tensor]
        ours = question.ours[tensor]
        if flat.value.shape != theirs.shape:
            return None
        fed = replace(question, ours={tensor: flat.value})
        if fed.left(flat.value).within and not question.left(ours).within:
            # What the JAX program means is what the other side gives: it is the run that rounds.
            words = f"the JAX side rounds {', '.join(_narrow_casts(flat)) or 'somewhere'}, the other side does not"
            much = share(ours, theirs, flat.value)
            return Diagnosis(tensor, "rounded inside", words, much, fed.left(flat.value).rms, True, True, "program", 1)
        if not replace(question, theirs={tensor: ours}).left(flat.value).within:
            return None  # something else is judged than what the function returns
        return best(fed, "program", program.hypotheses(flat, theirs), few)


def _narrow_casts(flat: Any) -> list[str]:
    """Where a program casts to a narrower float."""
    casts = [s for s in flat.steps if s.name in ("convert_element_type", "reduce_precision")]
    narrow = {str(s.place): str(s.eqn.outvars[0].aval.dtype) for s in casts if s.eqn.outvars[0].aval.dtype.itemsize < 8}
    return [f"to {dtype} at {place}" for place, dtype in narrow.items() if "float" in dtype]


def part(question: Question) -> Any:
    """The part of the JAX program that makes the tensor, fed with what the other side has at the taps before it."""
    return _parts(question, [question.tensor])[0]


def _parts(question: Question, tensors: Sequence[str], run: bool = True) -> list[Any]:
    """`part` of several tensors of one kind, from one trace. `run`: whether they are evaluated, or only laid out."""
    import jax

    from parity.causes.flat import Flat
    from parity.noise import Tracer
    from parity.weights import leaf_names

    pair, args = question.pair, question.args
    backwards = tensors[0].startswith("gradient ")
    tracer = Tracer(pair.jax_program() if backwards else forward(pair))
    closed, tree = tracer.jaxpr(args, "float64")
    leaves, names = jax.tree.leaves(args), [*leaf_names(args[0]), *(f"input {i}" for i in range(1, len(args)))]
    cuts = {k.removeprefix("tap "): v for k, v in question.theirs.items() if k.startswith("tap ")}
    result = jax.tree.unflatten(tree, list(range(tree.num_leaves)))
    known = dict(zip((n or "output" for n in leaf_names(result["outputs"])), jax.tree.leaves(result["outputs"])))
    known["loss"] = result.get("loss")
    found = []
    for tensor in tensors:
        if backwards:
            link = next(link for link in pair.links if link.torch == tensor.removeprefix("gradient "))
            at = leaf_names(result["gradients"]).index(link.jax)
            target = jax.tree.leaves(result["gradients"])[at]
            found.append(Flat.of(closed, leaves, names, cuts, target, run).turned(link.to_torch))
        else:
            target = tensor.removeprefix("tap ") if tensor.startswith("tap ") else known[tensor]
            found.append(Flat.of(closed, leaves, names, cuts, target, run))
    return found


def forward(pair: Pair) -> Any:
    """The JAX function's outputs and its loss, without gradients."""

    def function(params: Any, *inputs: Any) -> dict[str, Any]:
        outputs = pair.jax(params, *inputs)
        return {"outputs": outputs} | ({} if pair.loss is None else {"loss": pair.loss[0](outputs, *inputs)})

    return function
