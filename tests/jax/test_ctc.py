"""The CTC loss against all paths counted one by one, and against optax."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.ctc import ctc_loss

ULPS = 16  # per frame: a logsumexp of three, a sum, and the log-softmax
EPS64 = np.finfo(np.float64).eps


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def draw(seed: int, B: int = 5, T: int = 20, V: int = 7, N: int = 6, blank: int = 0) -> tuple:
    """(logits, targets, input_lengths, target_lengths) that can all be spelt, with repeats and an empty target."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(B, T, V)) * 3.0
    symbols = [v for v in range(V) if v != blank]
    targets = rng.choice(symbols[:2] + symbols, size=(B, N))
    target_lengths = rng.integers(0, N + 1, B)
    target_lengths[0], target_lengths[-1] = N, 0
    return logits, targets, rng.integers(2 * N, T + 1, B), target_lengths


def by_all_paths(logits: np.ndarray, target: list[int], blank: int) -> float:
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    total = []
    for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        merged = [v for v, _ in itertools.groupby(path)]
        if [v for v in merged if v != blank] == target:
            total.append(math.prod(p[t, v] for t, v in enumerate(path)))
    return -math.log(math.fsum(total))


def assert_near(actual, expected, frames: int) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype == np.float64
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    assert np.abs(actual - expected).max() <= ULPS * frames * EPS64 * np.abs(expected).max()


@pytest.mark.parametrize("blank", [0, 2])
@pytest.mark.parametrize("target", [[], [1], [1, 1], [1, 3], [3, 1, 3], [3, 3, 1]])
def test_all_paths_counted(x64, target, blank) -> None:
    logits = np.random.default_rng(0).normal(size=(1, 5, 4))
    padded = np.array([target + [-1] * (4 - len(target))])  # what lies behind a target is not read
    loss = ctc_loss(jnp.asarray(logits), jnp.asarray(padded), jnp.array([5]), jnp.array([len(target)]), blank)
    assert_near(loss, np.array([by_all_paths(logits[0], target, blank)]), 5)


@pytest.mark.parametrize("seed", range(6))
def test_optax_agrees(x64, seed) -> None:
    optax = pytest.importorskip("optax")
    blank = seed % 3
    logits, targets, input_lengths, target_lengths = (jnp.asarray(x) for x in draw(seed, blank=blank))
    T, N = logits.shape[1], targets.shape[1]
    behind = lambda count, lengths: (jnp.arange(count)[None] >= lengths[:, None]).astype(jnp.float64)  # noqa: E731

    def theirs(logits):
        return optax.ctc_loss(logits, behind(T, input_lengths), targets, behind(N, target_lengths), blank_id=blank)

    def ours(logits):
        return ctc_loss(logits, targets, input_lengths, target_lengths, blank)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected, expected_grad = theirs(logits), jax.grad(lambda x: jnp.sum(theirs(x)))(logits)
    assert_near(ours(logits), expected, T)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(ours(x))))(logits)
    # optax's impossible paths cost 1e5, so they are out of the sum up to exp(−1e5) = 0.
    assert_near(grad, expected_grad, T)
    for row, length in zip(grad, input_lengths.tolist()):
        assert not row[length:].any()


def test_jit_and_batches_change_nothing(x64) -> None:
    arguments = [jnp.asarray(x) for x in draw(0)]
    losses = ctc_loss(*arguments)
    assert_near(jax.jit(ctc_loss)(*arguments), losses, 20)
    for i in range(5):
        assert_near(ctc_loss(*(x[i : i + 1] for x in arguments)), losses[i : i + 1], 20)


def test_long_clips_do_not_underflow() -> None:
    logits = jnp.zeros((1, 2000, 30)).at[:, :, 0].set(20.0)
    targets = jnp.asarray(np.arange(50)[None] % 29 + 1)
    loss = ctc_loss(logits, targets, jnp.array([2000]), jnp.array([50]))
    assert 500.0 < float(loss[0]) < 1000.0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_logits_give_float32(dtype) -> None:
    logits, *rest = draw(0)
    logits, rest = jnp.asarray(logits, dtype), [jnp.asarray(x) for x in rest]
    losses = ctc_loss(logits, *rest)
    assert losses.dtype == jnp.float32
    assert jnp.array_equal(losses, ctc_loss(logits.astype(jnp.float32), *rest))


def impossible() -> list:
    """Two clips of 4 frames; [1, 1, 2] fits into 4, [1, 1, 1] needs 5."""
    logits = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    return [logits, np.array([[1, 1, 2], [1, 1, 1]]), np.array([4, 4]), np.array([3, 3])]


def test_too_long_a_target_is_an_error_and_infinite_inside_jit() -> None:
    arguments = [jnp.asarray(x) for x in impossible()]
    with pytest.raises(ValueError, match=r"targets\[1\] has 3 symbols, and needs 5 frames .* input_lengths\[1\] = 4"):
        ctc_loss(*arguments)
    losses = jax.jit(ctc_loss)(*arguments)
    assert np.isfinite(losses).tolist() == [True, False]
    assert float(losses[1]) == math.inf
    grad = jax.jit(jax.grad(lambda logits, *rest: jnp.sum(ctc_loss(logits, *rest))))(*arguments)
    assert jnp.isfinite(grad).all()
    assert grad[0].any()
    assert not grad[1].any()


def test_a_target_of_probability_zero_is_infinite() -> None:
    logits = jnp.zeros((1, 4, 3)).at[:, :, 2].set(-jnp.inf)
    rest = (jnp.array([[1, 2]]), jnp.array([4]), jnp.array([2]))
    assert float(ctc_loss(logits, *rest)[0]) == math.inf
    assert not jax.grad(lambda x: jnp.sum(ctc_loss(x, *rest)))(logits).any()
    assert jnp.isfinite(ctc_loss(logits, jnp.array([[1, 1]]), *rest[1:])).all()
    assert jnp.isnan(ctc_loss(logits.at[0, 1, 1].set(jnp.nan), *rest)).all()


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, np.zeros((2, 4, 3), np.int32), "logits have shape .* and dtype int32: must be floating"),
        (0, np.zeros((2, 0, 3), np.float32), r"logits have shape \(2, 0, 3\)"),
        (1, np.ones((3, 3), np.int32), r"targets have shape \(3, 3\) .* of shape \(2, N\)"),
        (1, np.ones((2, 3), np.float32), "targets have .* dtype float32: must be integers"),
        (2, np.array([4, 5]), r"input_lengths\[1\] = 5: must be from 1 to 4"),
        (2, np.array([0, 4]), r"input_lengths\[0\] = 0"),
        (2, np.array([4]), r"input_lengths have shape \(1,\)"),
        (3, np.array([3, 4]), r"target_lengths\[1\] = 4: must be from 0 to 3"),
        (
            1,
            np.array([[1, 2, 1], [1, 0, 1]]),
            r"targets\[1, 1\] = 0: must be a symbol from 0 to 2 other than blank = 0",
        ),
        (1, np.array([[1, 3, 1], [1, 2, 1]]), r"targets\[0, 1\] = 3"),
        (4, 3, "blank = 3: must be a symbol from 0 to 2"),
    ],
)
def test_what_is_refused(place, value, words) -> None:
    arguments = [*impossible(), 0]
    arguments[place] = value
    with pytest.raises(ValueError, match=words):
        ctc_loss(*(jnp.asarray(x) for x in arguments[:4]), arguments[4])


def test_a_symbol_that_is_none_is_nan_inside_jit() -> None:
    arguments = [jnp.asarray(x) for x in impossible()]
    arguments[1] = jnp.array([[1, 2, 1], [1, 0, 7]])
    assert np.isnan(jax.jit(ctc_loss)(*arguments)).tolist() == [False, True]
