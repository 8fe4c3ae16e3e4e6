"""Known causes, each put into a pair: it is the one that is named; what has no known cause is not given one."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("jax")

import toy

from parity import diagnosis
from parity.causes import arrays
from parity.causes.arrays import Hypothesis, name_constant, share
from parity.locate import locate_pair
from parity.verdict import THRESHOLDS

CAUSES: dict[str, tuple[dict[str, Any], str, str]] = {
    "eps": ({"eps": 1e-6}, "tap norm", r"^eps: 1e-06 in the place of 1e-05 at .*toy\.py"),
    "mean": ({"mean": True}, "tap norm", r"^mean subtracted"),
    "ones": ({"ones": True}, "tap norm", r"^norm scale not loaded: norm\.scale"),
    "scale missing": ({"scale": 1.0}, "tap mix", r"^scale factor: 1 in the place of 0\.353553391 \(1 / √8\)"),
    "scale of the model": ({"scale": 1 / 8}, "tap mix", r"^scale factor: 0\.125 "),
    "mask": ({"mask": True}, "tap mix", r"^mask missing"),
    "transposed": ({"transposed": True}, "tap mix", r"^transposed weight: mix\.value\.kernel"),
    "shifted": ({"shifted": True}, "tap mix", r"^shifted by one: .*moved by"),
    "bfloat16": ({"bfloat16": True}, "tap mix", r"^rounded inside: .*bfloat16"),
    "bias": ({"bias": True}, "tap mlp", r"^bias missing: mlp\.up\.bias"),
    "tanh": ({"tanh": True}, "tap mlp", r"^tanh GELU: .*erf at"),
    "sign": ({"sign": True}, "tap mlp", r"^sign flipped"),
    "loss": ({"loss": 2.0}, "loss", r"^scale factor: (2 in the place of 1|.*multiplied by 2)"),
    "cut": ({"cut": True}, r"gradient norm.weight", r"^gradient stopped: no gradient flows through .* at .*toy\.py"),
}


@pytest.mark.parametrize("name", CAUSES)
def test_the_cause_is_named_at_its_place(name: str, one_thread) -> None:
    faults, place, cause = CAUSES[name]
    found = locate_pair(toy.judge(**faults), toy.weights(), toy.inputs(), "float64")
    if name != "cut":
        assert found.place == place
    assert found.diagnosis is not None
    assert found.diagnosis.named, str(found.diagnosis)
    assert found.diagnosis.within, str(found.diagnosis)
    assert re.search(cause, str(found.diagnosis)), str(found.diagnosis)


def test_what_no_known_cause_explains_is_not_named(one_thread) -> None:
    found = locate_pair(toy.judge(strange=True), toy.weights(), toy.inputs(), "float64")
    assert found.place == "tap mlp"
    assert found.diagnosis is not None
    assert not found.diagnosis.named
    assert str(found.diagnosis).startswith("no known cause explains it")
    assert "the nearest, " in str(found.diagnosis)


def test_a_rounding_inside_float32_is_found_against_the_reference(one_thread) -> None:
    found = locate_pair(toy.judge(bfloat16=True), toy.weights(), toy.inputs(), "float32")
    assert (found.place, found.side) == ("tap mix", "torch")
    assert found.diagnosis is not None
    assert found.diagnosis.named
    assert re.search(r"^rounded inside: .*bfloat16", str(found.diagnosis))


# --- arrays ----------------------------------------------------------------------------------------------------------

A = np.random.default_rng(0).standard_normal((5, 7, 7))
ORDER = [3, 0, 1, 4, 2]
DONE: dict[str, tuple[np.ndarray, str]] = {
    "zeros": (np.zeros_like(A), "it is zero"),
    "sign flipped": (-A, "its sign is flipped"),
    "scale factor": (A * math.sqrt(7), r"√7"),
    "constant offset": (A + 0.25, "plus 0.25"),
    "shifted by one": (np.roll(A, 1, 1), r"\+1 along axis 1"),
    "order": (A[ORDER], r"axis 0 in the order 3, 0, 1, 4, 2"),
    "transposed": (A.swapaxes(1, 2), "axes 1 and 2"),
    "rounded": (A.astype(np.float32).astype(np.float64), "float32"),
    "zeros of a line": (np.where(np.arange(7) == 2, 0.0, A), "zero at 2 of axis 2"),
    "scale by line": (A * np.arange(1.0, 8.0), "axis 2"),
}


@pytest.mark.parametrize("cause", DONE)
def test_what_was_done_to_an_array_is_found(cause: str) -> None:
    theirs, words = DONE[cause]
    exact = [
        h for h in arrays.hypotheses(A, theirs) if np.allclose(h.value, theirs, rtol=np.finfo(float).eps * 8, atol=0)
    ]
    assert exact
    first = min(exact, key=lambda h: h.rank)
    assert first.cause == cause.removesuffix(" of a line")
    assert re.search(words, first.words)


def test_noise_is_explained_by_nothing() -> None:
    theirs = A + np.random.default_rng(1).standard_normal(A.shape)
    assert max(share(A, theirs, h.value) for h in arrays.hypotheses(A, theirs)) < THRESHOLDS.explained


def test_the_share_is_of_the_squares() -> None:
    assert share(np.zeros(2), np.array([3.0, 4.0]), np.array([3.0, 0.0])) == pytest.approx(9 / 25)
    assert share(A, -A, -A) == 1.0
    assert share(A, -A, A) == 0.0
    assert share(np.array([np.nan, 1.0]), np.array([0.0, 1.0]), np.array([0.0, 1.0])) == 1.0


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (1 / math.sqrt(12), "0.288675135 (1 / √12)"),
        (-math.sqrt(2), "-1.41421356 (−√2)"),
        (31.0, "31"),
        (1 / 6, "(1 / 6)"),
    ],
)
def test_constants_have_names(number: float, words: str) -> None:
    assert words in name_constant(number)


# --- what is named ---------------------------------------------------------------------------------------------------


def question(theirs: np.ndarray) -> diagnosis.Question:
    from parity.verdict import Noise

    noise = {"output": Noise(np.ones_like(A), 16.0, 1.0)}
    pair = toy.toy_pair()
    return diagnosis.Question(pair, {}, (), "float64", "output", {"output": A}, {"output": theirs}, noise)


def test_the_most_particular_of_the_exact_ones_is_named() -> None:
    theirs = 2 * A
    every = [Hypothesis("general", "a fit", theirs, 6, 2.0), Hypothesis("particular", "a place", theirs, 1)]
    for hypotheses in (every, every[::-1]):
        found = diagnosis.best(question(theirs), "arrays", hypotheses)
        assert found is not None
        assert (found.cause, found.named, found.within) == ("particular", True, True)


@pytest.mark.parametrize(("part", "named"), [(0.97, True), (0.9, False)])
def test_a_cause_that_leaves_more_than_noise_must_explain_its_share(part: float, named: bool) -> None:
    """97 % of the difference are 99.91 % of its squares; 90 % are 99 %, and 60 % are 84 %."""
    theirs = 2 * A
    value = A + (part if named else 0.6) * A
    found = diagnosis.best(question(theirs), "arrays", [Hypothesis("cause", "words", value, 2)])
    assert found is not None
    assert found.named is named
    assert not found.within


def test_a_general_fit_that_leaves_more_than_noise_is_not_named() -> None:
    found = diagnosis.best(question(2 * A), "arrays", [Hypothesis("fit", "words", 1.97 * A, 6, 1.97)])
    assert found is not None
    assert not found.named


def test_one_number_is_not_explained_by_any_constant() -> None:
    from dataclasses import replace

    from parity.verdict import Noise

    asked = question(A)
    asked = replace(asked, ours={"output": np.array(1.0)}, theirs={"output": np.array(1.2345678)})
    asked = replace(asked, noise={"output": Noise(np.ones(()), 16.0, 1.0)})
    fitted = Hypothesis("scale factor", "words", np.array(1.2345678), 3, 1.2345678)
    assert diagnosis.best(asked, "arrays", [fitted], few=True) is None
    near = diagnosis.best(asked, "arrays", [Hypothesis("another place", "words", np.array(1.23), 1)], few=True)
    assert near is not None
    assert not near.named
    assert diagnosis.best(asked, "arrays", [fitted]) is not None
