"""Hypotheses about AdamW, clipping and the learning rate: the formulas with one thing otherwise, in plain numpy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from parity.causes.arrays import Hypothesis

if TYPE_CHECKING:
    from parity.diagnosis import Diagnosis, Question

__all__ = ["Variant", "diagnose", "fits", "states"]

Tree = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Variant:
    """AdamW's arithmetic; the defaults are the right one."""

    decay: float
    betas: tuple[float, float]
    eps: float = 1e-8
    coupled: bool = False
    """Decay enters the gradient and so the moments: Adam with L2."""
    scaled: bool = True
    """Decay is multiplied by the learning rate."""
    after: bool = False
    """Decay takes the parameter after its update."""
    corrections: tuple[bool, bool] = (True, True)
    count: int = 0
    """Added to the number of steps in the corrections, which is at least one."""
    root: str = "outside"
    """Where eps is added: outside the root, inside it, or before the correction."""
    sign: float = 1.0


def states(start: Tree, grads: Sequence[Tree], rates: Sequence[float], how: Variant) -> list[tuple[Tree, Tree, Tree]]:
    """(parameters, first moments, second moments) after each step."""
    p = {name: x.astype(np.float64) for name, x in start.items()}
    m = {name: np.zeros_like(x) for name, x in p.items()}
    v = {name: np.zeros_like(x) for name, x in p.items()}
    found = []
    for step, (grad, lr) in enumerate(zip(grads, rates), start=1):
        p, m, v = dict(p), dict(m), dict(v)
        t = max(step + how.count, 1)
        first, second = (1 - b**t if on else 1.0 for b, on in zip(how.betas, how.corrections))
        for name in p:
            g = grad[name].astype(np.float64) + (how.decay * p[name] if how.coupled else 0.0)
            m[name] = how.betas[0] * m[name] + (1 - how.betas[0]) * g
            v[name] = how.betas[1] * v[name] + (1 - how.betas[1]) * g * g
            if how.root == "inside":
                under = np.sqrt(v[name] / second + how.eps)
            elif how.root == "before":
                under = (np.sqrt(v[name]) + how.eps) / math.sqrt(second)
            else:
                under = np.sqrt(v[name] / second) + how.eps
            update = how.sign * lr * (m[name] / first) / under
            rate = (lr if how.scaled else 1.0) * (0.0 if how.coupled else how.decay)
            base = p[name] - update if how.after else p[name]
            p[name] = p[name] - update - rate * base
        found.append((p, m, v))
    return found


def fits(tensor: str) -> bool:
    """Whether the tensor is one of AdamW's: a displacement or a moment after some steps."""
    return ": " in tensor and tensor.rpartition(" after ")[2].isdigit()


def diagnose(question: Question) -> Diagnosis | None:
    """The formula that gives what the side gave, over all its steps."""
    from parity.diagnosis import best

    # The last step of the same tensor: over one step, many formulas are one.
    stem = question.tensor.rpartition(" after ")[0]
    same = [n for n in question.parted if n.rpartition(" after ")[0] == stem]
    last = max(same, key=lambda n: int(n.rpartition(" after ")[2]), default=question.tensor)
    asked = replace(question, tensor=last)
    return best(asked, "optimizer", _hypotheses(asked))


def _hypotheses(question: Question) -> Iterator[Hypothesis]:
    from parity.checks.adamw import HYPER, LR

    name, _, rest = question.tensor.rpartition(": ")
    what, _, after = rest.rpartition(" after ")
    start = {name: np.asarray(question.weights[name])}
    grads = [{name: g} for g in np.asarray(question.inputs[list(question.weights).index(name)])[: int(after)]]
    right = Variant(HYPER["weight_decay"], HYPER["betas"], HYPER["eps"])
    for cause, words, how in _variants(right):
        p, m, v = states(start, grads, [LR] * int(after), how)[-1]
        value = {"displacement": p[name] - start[name], "m": m[name], "v": v[name]}[what]
        yield Hypothesis(cause, words, value, 1)


def _variants(right: Variant) -> Iterator[tuple[str, str, Variant]]:
    one, two = right.betas
    yield "weight decay coupled", "decay enters the gradient: Adam with L2", replace(right, coupled=True)
    yield "weight decay", "decay is not multiplied by the learning rate", replace(right, scaled=False)
    yield "weight decay", "decay takes the parameter after its update", replace(right, after=True)
    for decay in (0.0, 1e-4, 1e-2):
        yield "weight decay", f"decay {decay:g} in the place of {right.decay:g}", replace(right, decay=decay)
    yield "bias correction missing", "neither moment is corrected", replace(right, corrections=(False, False))
    yield "bias correction missing", "the first moment is not corrected", replace(right, corrections=(False, True))
    yield "bias correction missing", "the second moment is not corrected", replace(right, corrections=(True, False))
    for count in (-1, 1):
        yield "shifted by one", f"corrections are {count:+d} step off", replace(right, count=count)
    yield "eps", "added under the root", replace(right, root="inside")
    yield "eps", "added before the correction", replace(right, root="before")
    for eps in (0.0, 1e-6, 1e-5, 1e-7):
        yield "eps", f"{eps:g} in the place of {right.eps:g}", replace(right, eps=eps)
    yield "betas", "the betas change places", replace(right, betas=(two, one))
    for beta in (0.95, 0.98, 0.99):
        yield "betas", f"beta2 {beta:g} in the place of {two:g}", replace(right, betas=(one, beta))
    for beta in (0.8, 0.95):
        yield "betas", f"beta1 {beta:g} in the place of {one:g}", replace(right, betas=(beta, two))
    yield "sign flipped", "the update goes uphill", replace(right, sign=-1.0)
    yield "no update", "the gradient does not move the parameter", replace(right, sign=0.0)
