"""Cross-entropy: the formula, ignored targets, labels out of range, low precision."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.layers import TokenIdError
from omni_jax.losses import cross_entropy, next_token_loss


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def draw(V: int, dtype=jnp.float64) -> tuple[jax.Array, np.ndarray]:
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(3, 5, V)) * 3.0, dtype)
    targets = rng.integers(0, V, (3, 5))
    targets[0, 0], targets[2, 3] = 0, 0
    return logits, targets


def by_the_formula(logits: np.ndarray, targets: np.ndarray, ignore_index: int) -> float:
    nats = [
        math.log(math.fsum(np.exp(row - row.max()))) + row.max() - row[target]
        for row, target in zip(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), strict=True)
        if target != ignore_index
    ]
    return math.fsum(nats) / len(nats)


@pytest.mark.parametrize("V", [7, 99, 100, 101, 300])  # around 100, where a label of −100 begins to wrap
@pytest.mark.parametrize("ignore_index", [0, -100])
def test_cross_entropy_by_the_formula(x64, V, ignore_index) -> None:
    logits, targets = draw(V)
    if ignore_index < 0:
        targets[1, 1] = ignore_index
    expected = by_the_formula(np.asarray(logits), targets, ignore_index)
    for loss in (
        cross_entropy(logits, targets, ignore_index),
        jax.jit(cross_entropy, static_argnums=2)(logits, targets, ignore_index),
    ):
        assert loss.dtype == jnp.float64
        assert abs(float(loss) - expected) <= V * np.finfo(np.float64).eps * expected


def test_padding_is_ignored_by_default(x64) -> None:
    logits, targets = draw(7)
    assert cross_entropy(logits, targets) == cross_entropy(logits, targets, ignore_index=0)
    grad = jax.jit(jax.grad(cross_entropy))(logits, targets)
    assert np.array_equal(np.abs(grad).sum(-1) == 0, targets == 0)


def test_all_ignored_is_zero_with_zero_gradients(x64) -> None:
    logits, targets = draw(7)
    loss, grad = jax.jit(jax.value_and_grad(cross_entropy))(logits, np.zeros_like(targets))
    assert float(loss) == 0.0
    assert not grad.any()


def test_large_logits_do_not_overflow() -> None:
    assert float(cross_entropy(jnp.array([[1e5, 0.0, -1e5]]), np.array([1]))) == 1e5


@pytest.mark.parametrize("bad", [-100, -1, 101])
def test_label_out_of_range_is_an_error_on_the_host_and_nan_inside_jit(bad) -> None:
    logits, targets = draw(101, jnp.float32)
    targets[1, 2] = bad
    with pytest.raises(TokenIdError, match=rf"targets\[1, 2\] = {bad} "):
        cross_entropy(logits, targets)
    assert jnp.isnan(jax.jit(cross_entropy)(logits, targets))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_low_precision_logits_give_a_float32_loss(dtype) -> None:
    logits, targets = draw(101, dtype)
    loss = cross_entropy(logits, targets)
    assert loss.dtype == jnp.float32
    assert loss == cross_entropy(logits.astype(jnp.float32), targets)


def test_shapes_and_dtypes_are_checked() -> None:
    logits, targets = draw(7, jnp.float32)
    with pytest.raises(ValueError, match=r"targets have shape \(3, 4\), logits \(3, 5, 7\)"):
        cross_entropy(logits, targets[:, :-1])
    with pytest.raises(ValueError, match="targets must hold integers, got float64"):
        cross_entropy(logits, targets.astype(float))
    with pytest.raises(ValueError, match="T at least 2"):
        next_token_loss(logits[:, :1], targets[:, :1])
    with pytest.raises(ValueError, match="tokens"):
        next_token_loss(logits, targets[:, :-1])


def test_next_token_loss_shifts() -> None:
    logits, tokens = draw(7, jnp.float32)
    assert next_token_loss(logits, tokens) == cross_entropy(logits[:, :-1], tokens[:, 1:])
