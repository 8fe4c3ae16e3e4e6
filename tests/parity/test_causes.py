"""Each family of causes on a program of a few lines: what was done to one side is named, at its place."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import toy  # noqa: E402

from parity import diagnosis  # noqa: E402
from parity.causes.flat import Flat  # noqa: E402
from parity.causes.program import hypotheses  # noqa: E402
from parity.locate import locate_pair  # noqa: E402
from parity.noise import Tracer  # noqa: E402
from parity.verdict import Noise, Verdict  # noqa: E402

X = np.random.default_rng(5).standard_normal((3, 5, 5))
MASK = np.random.default_rng(6).random((5, 5)) < 0.6
MASK[2] = False
IDS = np.random.default_rng(7).integers(0, 5, (3, 5)).astype(np.int32)


def softmax(x: Any, axis: int = -1) -> Any:
    e = jnp.exp(x - jnp.max(x, axis=axis, keepdims=True))
    return e / jnp.sum(e, axis=axis, keepdims=True)


def twice(x: Any) -> Any:
    return jnp.sin(x) * jnp.cos(x)


def called(x: Any, third: bool = False, first: bool = True) -> Any:
    a, b, c = x * 2.0, x * 3.0, x * 5.0
    a, b, c = (twice(a) if first else a), twice(b), (twice(c) if third else c)
    return a * b + jnp.cos(c)


def masked(x: Any, mask: Any, least: float = -math.inf) -> Any:
    x = jnp.where(mask[None], x, least)
    top = jnp.max(x, axis=-1, keepdims=True)
    e = jnp.exp(x - jnp.where(top == -math.inf, 0.0, top))
    total = jnp.sum(e, axis=-1, keepdims=True)
    return e / jnp.where(total == 0.0, 1.0, total)


def seen(x: Any, mask: Any, every: bool = False) -> Any:
    mask = mask & (jnp.arange(5)[None] < 4)
    return masked(x, mask | (every & ~jnp.any(mask, axis=-1, keepdims=True)))


def smoothed(x: Any, ids: Any, part: float = 0.0) -> Any:
    def loss(x: Any) -> Any:
        picked = jnp.squeeze(jnp.take_along_axis(x, ids[..., None], axis=-1), -1)
        target = (1.0 - part) * picked + part * jnp.mean(x, axis=-1) if part else picked
        return jnp.sum(jnp.log(jnp.sum(jnp.exp(x), axis=-1)) - target)

    return jax.grad(loss)(x)


def stepped(x: Any, rate: float = 0.5, most: float = math.inf) -> Any:
    def body(carry: Any, row: Any) -> Any:
        scale = jnp.float32(1).astype(x.dtype) / (jnp.sum(row * row) * 0.05)
        carry = carry * rate + (jnp.minimum(scale, most) if most < math.inf else scale) * row
        return carry, carry

    return jax.lax.scan(body, x[0] * 0.0, x)[1]


CAUSES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], dict[str, Any], str]] = {
    "axis": (softmax, (X,), {}, {"axis": 1}, r"^another axis: along axis 1, not 2, at .*\(softmax\)"),
    "also": (called, (X,), {}, {"third": True}, r"^applied too often: twice also to mul at .*\(called\)"),
    "left out": (called, (X,), {}, {"first": False}, r"^function left out: twice left out"),
    "mask": (masked, (X, MASK), {}, {"least": -1e9}, r"^mask value: a finite number"),
    "finite": (masked, (X, MASK), {"least": -1e4}, {}, r"^mask value: -inf in the place of -10000 "),
    "empty": (seen, (X, MASK), {}, {"every": True}, r"^empty rows: "),
    "smoothing": (smoothed, (X, IDS), {}, {"part": 0.1}, r"^label smoothing: .* 0\.1 \(1 / 10\) of its mean"),
    "loop": (stepped, (X,), {}, {"rate": 0.25}, r"^scale factor: 0\.25 .* in the place of 0\.5 .*\(stepped"),
    "clipped": (stepped, (X,), {}, {"most": 1.0}, r"^clipped: div at .*: at most 1"),
}


def flat(function: Callable[..., Any], args: tuple[Any, ...], how: dict[str, Any]) -> Flat:
    with jax.enable_x64(True):
        closed, _ = Tracer(lambda *a: function(*a, **how)).jaxpr(args, "float64")
    return Flat.of(closed, list(args), [f"input {i}" for i in range(len(args))], {}, 0)


@pytest.mark.parametrize("name", CAUSES)
def test_what_is_otherwise_in_a_program_is_named_at_its_place(name: str) -> None:
    function, args, ours, theirs, words = CAUSES[name]
    other = flat(function, args, theirs).value
    clean = flat(function, args, ours)
    assert not np.allclose(clean.value, other), "the bug must show"
    size = np.sqrt(np.mean(np.square(other)))
    noise = {"output": Noise(np.full(other.shape, 4 * size), 16.0, 1.0)}
    asked = diagnosis.Question(
        toy.toy_pair(), {}, (), "float64", "output", {"output": clean.value}, {"output": other}, noise
    )
    with np.errstate(all="ignore"):
        found = diagnosis.best(asked, "program", hypotheses(clean, other))
    assert found is not None
    assert found.within, str(found)
    assert re.search(words, str(found)), str(found)


def test_a_loop_is_laid_out_as_the_program_says() -> None:
    def forward(x: Any) -> Any:
        last, rows = jax.lax.scan(lambda c, r: (c * 0.5 + r, c - r), x[0], x, reverse=True)
        return rows + last[None]

    with jax.enable_x64(True):
        closed, _ = Tracer(forward).jaxpr((X,), "float64")
        right = np.asarray(forward(jnp.asarray(X)))
    laid = Flat.of(closed, [X], ["x"], {}, 0)
    assert not any(step.name == "scan" for step in laid.steps)
    assert np.abs(laid.value - right).max() <= 8 * np.finfo(float).eps * np.abs(right).max()


# --- the size of a residual ------------------------------------------------------------------------------------------

A = np.random.default_rng(8).standard_normal((16, 32))


def question(theirs: np.ndarray, ours: np.ndarray = A) -> diagnosis.Question:
    noise = {"output": Noise(np.ones(ours.shape), 16.0, 1.0)}
    return diagnosis.Question(toy.toy_pair(), {}, (), "float64", "output", {"output": ours}, {"output": theirs}, noise)


NARROW = np.finfo(np.float32).eps / 2
DRAWN = np.random.default_rng(9).standard_normal(A.shape)


def test_a_residual_as_large_as_rounding_and_spread_like_it_is_named_as_that() -> None:
    found = diagnosis._by_size(question(A + NARROW * DRAWN))
    assert found is not None
    assert found.named
    assert not found.within
    assert "computing in float32" in str(found)


@pytest.mark.parametrize(
    "residual",
    [
        pytest.param(NARROW * DRAWN / 64, id="too small"),
        pytest.param(NARROW * DRAWN * 64, id="too large"),
        pytest.param(NARROW * 16 * (np.arange(16) == 3)[:, None] * np.ones(A.shape), id="in one row"),
        pytest.param(NARROW * 64 * (np.arange(A.size) == 7).reshape(A.shape), id="in one element"),
    ],
)
def test_a_residual_of_another_size_or_shape_is_not(residual: np.ndarray) -> None:
    assert diagnosis._by_size(question(A + residual)) is None


def test_a_small_tensor_shows_no_spread() -> None:
    assert diagnosis._by_size(question((A + NARROW * DRAWN)[:2], A[:2])) is None


# --- what is no evidence, and what there is no time for --------------------------------------------------------------


def test_a_tensor_that_loses_bits_is_given_no_cause(one_thread) -> None:
    judge = toy.judge(eps=1e-6)
    findings = judge(toy.weights(), toy.inputs(), "float64")
    for found in (findings.taps, findings.outputs):
        for name, judgement in list(found.items()):
            if judgement.verdict is Verdict.DIFFER:
                found[name] = replace(judgement, verdict=Verdict.UNSTABLE)
    location = locate_pair(judge, toy.weights(), toy.inputs(), "float64", findings=findings)
    assert location.place == "output"
    assert location.diagnosis is None
    assert "output loses bits: what rounding makes of it is no evidence of a cause" in location.notes


def test_when_the_time_is_up_that_is_said(one_thread, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = locate_pair(toy.judge(strange=True), toy.weights(), toy.inputs(), "float64").diagnosis
    assert whole is not None
    assert whole.ended
    assert "the time was up" not in str(whole)
    late = time.monotonic() + 1e6
    monkeypatch.setattr(time, "monotonic", lambda: late)
    monkeypatch.setattr(diagnosis.Question, "up", property(lambda self: True))
    cut = locate_pair(toy.judge(strange=True), toy.weights(), toy.inputs(), "float64", seconds=1.0).diagnosis
    assert cut is not None
    assert 0 < cut.tried < whole.tried
    assert not cut.ended
    assert f"the time was up after {cut.tried} causes, the rest is untried" in str(cut)


def test_the_time_is_counted_from_the_beginning(one_thread, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[diagnosis.Question] = []
    monkeypatch.setattr("parity.locate.diagnose", lambda question, model: asked.append(question))
    locate_pair(toy.judge(eps=1e-6), toy.weights(), toy.inputs(), "float64", seconds=1e6)
    (one,) = asked
    assert not one.up
    assert not math.isinf(one.until)
    assert replace(one, until=time.monotonic()).up


def test_without_any_time_no_cause_is_looked_for(one_thread) -> None:
    found = locate_pair(toy.judge(eps=1e-6), toy.weights(), toy.inputs(), "float64", seconds=0)
    assert found.place == "tap norm"
    assert found.diagnosis is None
    assert any("no cause was looked for" in note for note in found.notes)
