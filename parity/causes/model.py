"""Hypotheses about our own models: the bugs of the catalogue, put into one twin, so that it agrees with the other.

If the JAX twin with a bug agrees with the torch twin as it stands, then torch has that bug (or JAX lacks what the bug
adds), and the other way round. The library is the catalogue: what it does not hold is not found here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from parity.causes.arrays import Hypothesis
from parity.errors import CannotLook

if TYPE_CHECKING:
    from parity.diagnosis import Diagnosis, Question
    from parity.mutants import Mutant

__all__ = ["candidates", "diagnose", "fits"]

AREAS = {
    "attn": ("norm", "attention", "rope", "dtype"),
    "mlp": ("norm", "mlp", "dtype"),
    "moe": ("norm", "moe", "mlp", "dtype"),
    "tok_emb": ("embedding", "dtype"),
    "norm": ("norm", "dtype"),
    "logits": ("norm", "embedding", "dtype"),
    "loss": ("loss", "dtype"),
}
"""Last part of the name of a tensor -> areas of the catalogue that can be its cause."""
GRADIENTS = ("gradients", "embedding", "moe", "loss")
MODEL = "ThinkerLM"


def fits(pair: Any) -> bool:
    """Whether the pair is one of our language models."""
    return type(pair.torch).__name__ == MODEL and type(pair.torch).__module__.startswith("omni_torch.")


def candidates(tensor: str) -> tuple[Mutant, ...]:
    """The bugs of one twin that can show at this tensor."""
    from parity.mutants import catalogue

    last = tensor.removeprefix("tap ").rpartition(".")[2]
    areas = (
        GRADIENTS if tensor.startswith("gradient ") else AREAS.get(last, ("attention", "rope", "norm", "mlp", "moe"))
    )
    return tuple(m for m in catalogue(areas) if m.side != "both" and not m.equivalent)


def diagnose(question: Question) -> Diagnosis | None:
    """The bug that makes the twins agree, if one does."""
    from parity.diagnosis import best

    return best(question, "model", _hypotheses(question))


def _hypotheses(question: Question) -> Iterator[Hypothesis]:
    from parity.mutants.inject import injected

    ours, theirs = question.ours[question.tensor], question.theirs[question.tensor]
    for mutant in candidates(question.tensor):
        try:
            with injected(mutant.edits) as injection:
                every = _with_bug(question, mutant.side)
        except (CannotLook, OSError, KeyError):  # it does not apply to the code as it is
            continue
        value = every.get(question.tensor)
        if injection.dead or value is None or value.shape != theirs.shape or not _leaves_the_rest(question, every):
            continue
        if mutant.side == "jax":
            words = f"the torch side does as if it had the bug: {mutant.what} [{mutant.id}]"
        else:  # torch with the bug is to become what JAX is: said as what JAX would be with as much taken off
            words = f"the JAX side does as if it had the bug: {mutant.what} [{mutant.id}]"
            value = theirs - (value - ours)
        yield Hypothesis(mutant.area, words, value, 1)


def _leaves_the_rest(question: Question, every: Mapping[str, np.ndarray]) -> bool:
    """Whether what agreed without the bug agrees with it as well: else it is another bug."""
    same = [n for n in question.theirs if n not in question.parted and n in every]
    return all(
        every[n].shape == question.theirs[n].shape and replace(question, tensor=n).left(every[n]).within for n in same
    )


def _with_bug(question: Question, side: str) -> dict[str, np.ndarray]:
    """Everything that a side gives with the bug in, by the names of Findings.values; {} where it has to be run."""
    from parity.mutants.replay import evaluated
    from parity.sides import TorchSide

    if side == "torch":
        named, taps = TorchSide(question.pair)(question.weights, question.inputs, question.precision)
    else:
        named, taps, narrow = evaluated(question.pair, question.weights, question.inputs, question.precision)
        if narrow:
            return {}
    return {**{f"tap {name}": value for name, value in taps.items()}, **named}
