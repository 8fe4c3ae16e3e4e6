"""Why do the sides part here? Known causes, tried as hypotheses; the one that explains the residual is named.

Families of causes are tried on the tensor at which the sides part. Two serve anybody's pair: what may have been done to
the array (parity.causes_arrays), and what may be otherwise at one place of the JAX program, its constants, order,
weights and inputs (parity.causes_program; for gradients, parity.causes_flow). Optimizers have formulas of their own
(parity.causes_optimizer). The last knows our models: the bugs of the catalogue, put into the other twin
(parity.causes_model).

A cause is named when it brings the residual to within the noise, or explains as much of it as THRESHOLDS asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from parity import causes_arrays, causes_optimizer
from parity.causes_arrays import Hypothesis, share
from parity.errors import CannotLook
from parity.pair import Pair
from parity.precision import precision as format_of
from parity.precision import unit_roundoff
from parity.sides import as_inputs
from parity.verdict import THRESHOLDS, Noise, measure, subtract

__all__ = ["Diagnosis", "Question", "best", "diagnose", "part"]

FEW = 8
"""A tensor of fewer elements is too small for a fit."""
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
    """arrays, program, flow, optimizer or model."""
    tried: int

    def __str__(self) -> str:
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

    @property
    def args(self) -> tuple[Any, ...]:
        """(parameters, *inputs) of the JAX function, rounded to the precision."""
        dtype = format_of(self.precision).numpy
        rounded = {k: np.asarray(v).astype(dtype) for k, v in self.weights.items()}
        return (self.pair.jax_params(rounded), *as_inputs(self.inputs, self.precision))

    def left(self, value: np.ndarray, tensor: str = "") -> Any:
        """The distance of theirs from a value."""
        tensor = tensor or self.tensor
        noise = self.noise[tensor]
        unit = unit_roundoff(self.precision) * np.sqrt(2.0)
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
    more = _with_more(question)
    asked = [question] if more is question else [more, question]
    with np.errstate(all="ignore"):
        for one in asked:
            few = one.theirs[one.tensor].size < FEW
            found.append(best(one, "arrays", _on_arrays(one), few))
            if causes_optimizer.fits(one.tensor):
                found.append(causes_optimizer.diagnose(one))
            elif one.tensor.startswith("gradient ") and "loss" not in one.parted:
                from parity import causes_flow

                found.append(causes_flow.diagnose(one))
            else:
                found.append(_on_program(one, few))
            if any(d is not None and d.within for d in found):
                break
        if model and not any(d is not None and d.within for d in found):
            from parity import causes_model

            if causes_model.fits(question.pair):
                found.append(causes_model.diagnose(question))
    known = [d for d in found if d is not None]
    if not known:
        return None
    tried = sum(d.tried for d in known)
    # A general factor explains what a place in the program explains too: the place is the better answer.
    order = ("model", "program", "flow", "optimizer", "arrays")
    winner = max(known, key=lambda d: (d.within, d.named, round(d.share, 6), -order.index(d.family)))
    return replace(winner, tried=tried)


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


def _on_arrays(question: Question) -> Iterable[Hypothesis]:
    return causes_arrays.hypotheses(question.ours[question.tensor], question.theirs[question.tensor])


def _on_program(question: Question, few: bool) -> Diagnosis | None:
    from parity import causes_program
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
        return best(fed, "program", causes_program.hypotheses(flat, theirs), few)


def _narrow_casts(flat: Any) -> list[str]:
    """Where a program casts to a narrower float."""
    casts = [s for s in flat.steps if s.name in ("convert_element_type", "reduce_precision")]
    narrow = {str(s.place): str(s.eqn.outvars[0].aval.dtype) for s in casts if s.eqn.outvars[0].aval.dtype.itemsize < 8}
    return [f"to {dtype} at {place}" for place, dtype in narrow.items() if "float" in dtype]


def part(question: Question) -> Any:
    """The part of the JAX program that makes the tensor, fed with what the other side has at the taps before it."""
    import jax

    from parity.causes_program import Flat
    from parity.noise import Tracer
    from parity.weights import leaf_names

    pair, tensor = question.pair, question.tensor
    args = question.args
    backwards = tensor.startswith("gradient ")
    tracer = Tracer(pair.jax_program() if backwards else forward(pair))
    closed, tree = tracer.jaxpr(args, "float64")
    names = [*leaf_names(args[0]), *(f"input {i}" for i in range(1, len(args)))]
    cuts = {k.removeprefix("tap "): v for k, v in question.theirs.items() if k.startswith("tap ")}
    if tensor.startswith("tap "):
        target: Any = tensor.removeprefix("tap ")
    else:
        result = jax.tree.unflatten(tree, list(range(tree.num_leaves)))
        if backwards:
            link = next(link for link in pair.links if link.torch == tensor.removeprefix("gradient "))
            at = leaf_names(result["gradients"]).index(link.jax)
            flat = Flat.of(closed, jax.tree.leaves(args), names, cuts, jax.tree.leaves(result["gradients"])[at])
            return flat.turned(link.to_torch)
        known = dict(zip((n or "output" for n in leaf_names(result["outputs"])), jax.tree.leaves(result["outputs"])))
        if "loss" in result:
            known["loss"] = result["loss"]
        target = known[tensor]
    return Flat.of(closed, jax.tree.leaves(args), names, cuts, target)


def forward(pair: Pair) -> Any:
    """The JAX function's outputs and its loss, without gradients."""

    def function(params: Any, *inputs: Any) -> dict[str, Any]:
        outputs = pair.jax(params, *inputs)
        return {"outputs": outputs} | ({} if pair.loss is None else {"loss": pair.loss[0](outputs, *inputs)})

    return function
