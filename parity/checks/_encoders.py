"""What the checks of the encoders share: cases over a pair, controls by a bug in the torch side, rows against others.

A case is one pair (a model of some settings), one regime of weights and one precision.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from parity.checks import Progress, Scope
from parity.checks._twins import Case, simple_controls
from parity.pair import Pair
from parity.result import Control, Row
from parity.verdict import THRESHOLDS, Noise

__all__ = [
    "SIMPLE",
    "Bug",
    "Problem",
    "controls",
    "judged",
    "merged",
    "random_tensors",
    "replaced",
    "row_of",
    "wanted",
]

SIMPLE = {
    "zeros": "zeros in place of the torch side's tensor",
    "sign flipped": "the tensor with its sign flipped",
    "another tensor": "another tensor of the same shape",
}


@dataclass(frozen=True)
class Problem:
    """A pair with its weights and inputs; `same` names outputs that must be a part of another output's reference."""

    config: str
    regime: str
    pair: Pair
    weights: Mapping[str, np.ndarray]
    inputs: Sequence[np.ndarray]
    same: Mapping[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]]
    precisions: tuple[str, ...]
    """Those of the default run; --full looks at all."""
    forward: Callable[..., Any] | None = None
    """The torch call without what bugs need not show: gradients."""


@dataclass(frozen=True)
class Bug:
    """A mistake on the torch side: `within(module)` is a context in which a copy of the module makes it, `weights` and
    `inputs` change what it gets. Every output in `seen` must then be rejected (all of them, where none is named)."""

    within: Callable[[Any], Any] | None = None
    weights: Callable[[dict[str, np.ndarray]], Any] | None = None
    inputs: Callable[[list[np.ndarray]], Any] | None = None
    seen: tuple[str, ...] = ()


def wanted(scope: Scope, known: Sequence[str], usual: Sequence[str]) -> list[str]:
    """The precisions to look at: of those asked for the `usual` ones; all that are `known` with --full, or if none
    of the usual ones was asked for."""
    asked = [p for p in known if p in scope.precisions]
    few = [p for p in asked if p in usual]
    return asked if scope.full or not few else few


def merged(make: Callable[[], Any]) -> tuple[Any, Callable[[Any], Any]]:
    """(template of the parameters, params -> model) of a JAX model in evaluation, whose own values are never made."""
    from flax import nnx

    abstract = nnx.eval_shape(make)
    abstract.eval()
    graphdef, template, rest = nnx.split(abstract, nnx.Param, ...)
    return template, lambda params: nnx.merge(graphdef, params, rest)


def random_tensors(module: Any, seed: int) -> dict[str, np.ndarray]:
    """Weights of a torch module with nothing at its initial value: scales in [0.5, 1.5], biases and tables normal."""
    rng = np.random.default_rng([seed, 67])
    weights = {}
    for name, parameter in module.named_parameters():
        shape = tuple(parameter.shape)
        if "norm" in name and name.endswith("weight"):
            value = rng.uniform(0.5, 1.5, shape)
        elif len(shape) > 1 and name.endswith("weight"):
            value = rng.standard_normal(shape) * 1.2 / np.sqrt(np.prod(shape[1:]))
        else:
            value = 0.5 * rng.standard_normal(shape)
        weights[name] = value.astype(np.float32)
    return weights


def judged(
    problems: Sequence[Problem], scope: Scope, known: Sequence[str], progress: Progress
) -> Iterator[tuple[Problem, Case]]:
    """Every problem in every precision that is wanted of it, judged."""
    import jax

    from parity.judge import Judge
    from parity.precision import resolve_device

    devices = resolve_device(scope.device)
    work = [(problem, p) for problem in problems for p in wanted(scope, known, problem.precisions)]
    judges: dict[int, Any] = {}
    for done, (problem, precision) in enumerate(work):
        progress(done, len(work), f"{problem.config}, {problem.regime}, {precision}")
        pair = problem.pair
        if id(pair) not in judges:
            shares = len({p for q, p in work if q is problem} & {"float64", "float32"}) > 1
            judges[id(pair)] = Judge(
                pair, draws=scope.draws, seed=scope.seed, devices=devices, device=scope.device, shares=shares
            )
            if not scope.full:
                judges[id(pair)].cpu = _Evaluated(judges[id(pair)]), judges[id(pair)].cpu[1]
        judge, oracle = judges[id(pair)], None
        # What is evaluated does not err at all: that the other side errs more says nothing.
        evaluated = precision == "float64" and not scope.full
        judge.limits = replace(THRESHOLDS, dwarf_ratio=math.inf) if evaluated else THRESHOLDS
        if problem.same:
            model = judge.noise(problem.weights, problem.inputs, precision)
            oracle = pair.named(jax.tree.unflatten(model.tree, model.reference))
            oracle |= {name: part(oracle) for name, part in problem.same.items()}
        found = judge(problem.weights, problem.inputs, precision, oracle=oracle)
        yield problem, Case(problem.config, problem.regime, precision, found, None)
    progress(1, 1, "")


class _Evaluated:
    """JAX's side in float64 where nothing is compiled for it: what its program means, evaluated by the interpreter."""

    def __init__(self, judge: Any):
        self.judge = judge

    def __call__(self, weights: Mapping[str, np.ndarray], inputs: Sequence[np.ndarray], precision: str) -> Any:
        import jax

        model = self.judge.noise(weights, inputs, precision)
        return self.judge.pair.named(jax.tree.unflatten(model.tree, model.reference)), model.taps


def judged_rows(check: str, case: Case) -> list[Row]:
    """A row of each output, tap and gradient.

    In bfloat16 not of loss and gradients: torch's fused attention, whose backward pass takes its probabilities from
    rounded sums, errs by more than a unit there.
    """
    names = [*case.main.outputs, *(f"tap {name}" for name in case.main.taps)]
    if case.precision == "bfloat16":
        names = [name for name in names if not name.startswith("gradient ") and name != "loss"]
    return case.main.rows(check, case.config, case.regime, names)


def controls(seen: Sequence[tuple[Problem, Case]], bugs: Mapping[str, Bug]) -> list[Control]:
    """SIMPLE ones on every determined tensor, and each bug once for each pair; bfloat16 is too coarse for both."""
    from parity.checks._steps import merge, rejection
    from parity.precision import unit_roundoff
    from parity.sides import TorchSide

    fine = [(problem, case) for problem, case in seen if case.precision != "bfloat16"]
    twice = {name for problem, _ in fine for name in problem.same}  # no other tensor than the one they repeat
    found = simple_controls([case for _, case in fine], tuple(SIMPLE), lambda name: name not in twice)
    # The first case of each pair: of the random weights, where nothing is 0 that a bug might move.
    seen = list({id(problem.pair): (problem, case) for problem, case in reversed(seen)}.values())[::-1]
    for name, bug in bugs.items():
        for problem, case in seen:
            names = bug.seen or tuple(k for k in case.main.outputs if " " not in k and k != "loss")
            values = {k: case.main.values[k] for k in names if k in case.main.values}
            values = {k: v for k, v in values.items() if case.main.verdicts[k] == "AGREE"}
            if not values:
                continue
            pair = copy.copy(problem.pair)
            pair.loss, pair.torch = None, copy.deepcopy(pair.torch)
            pair.torch_call = problem.forward or pair.torch_call
            weights, inputs = dict(problem.weights), [np.array(x) for x in problem.inputs]
            if bug.weights is not None:
                bug.weights(weights)
            if bug.inputs is not None:
                bug.inputs(inputs)
            with bug.within(pair.torch) if bug.within else contextlib.nullcontext():
                wrong, _ = TorchSide(pair)(weights, inputs, case.precision)
            wide = case.precision == "float64"
            found.append(
                rejection(
                    name,
                    f"{case.config}, {case.precision}",
                    {k: wrong[k] for k in values},
                    values,
                    unit_roundoff(case.precision),
                    noisy_reference=wide,
                )
            )
    return merge(found)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` for the time being."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def row_of(
    check: str,
    name: str,
    theirs: np.ndarray,
    reference: np.ndarray,
    noise: Noise,
    precision: str,
    **fields: Any,
) -> Row:
    """What somebody else computed in `precision`, against our reference: apart by noise, or not the same function.

    How well their arithmetic is conditioned is not asked.
    """
    from parity.precision import unit_roundoff
    from parity.verdict import Verdict, determined, measure, subtract

    unit = unit_roundoff(precision) * (np.sqrt(2.0) if precision == "float64" else 1.0)
    if np.shape(theirs) != np.shape(reference):
        verdict, words, far = Verdict.DIFFER, f"shape {np.shape(theirs)} for {np.shape(reference)}", None
    else:
        far = measure(subtract(theirs, reference), noise.sigma * unit, noise.dof)
        verdict = Verdict.AGREE if far.within else Verdict.DIFFER
        words = f"nearest to its threshold: {far.where} at {far.excess:.3g} times it"
        if far.within and not determined(reference, noise.scaled(unit)):
            verdict, words = Verdict.UNDETERMINED, "its noise is as large as its value: zeros would have passed"
    return Row(
        check=check,
        config=fields.pop("config", ""),
        regime=fields.pop("regime", ""),
        precision=precision,
        name=name,
        verdict=verdict,
        evidence=words,
        shape=np.shape(reference),
        z_same=far and far.rms,
        excess=far.excess if far else np.inf,
        **fields,
    )
