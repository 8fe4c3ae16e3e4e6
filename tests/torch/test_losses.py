"""Cross-entropy: the formula, ignored targets, labels out of range, low precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from omni_torch.layers import TokenIdError
from omni_torch.losses import cross_entropy, next_token_loss


def draw(V: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(3, 5, V)) * 3.0).to(dtype)
    targets = torch.from_numpy(rng.integers(0, V, (3, 5)))
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
@pytest.mark.parametrize("ignore_index", [0, 3, -100])
def test_cross_entropy_by_the_formula(V, ignore_index) -> None:
    logits, targets = draw(V)
    if ignore_index < 0:
        targets[1, 1] = ignore_index
    expected = by_the_formula(logits.numpy(), targets.numpy(), ignore_index)
    loss = cross_entropy(logits, targets, ignore_index)
    assert loss.dtype == torch.float64
    assert abs(float(loss) - expected) <= V * np.finfo(np.float64).eps * expected


def test_padding_is_ignored_by_default() -> None:
    logits, targets = draw(7)
    assert torch.equal(cross_entropy(logits, targets), cross_entropy(logits, targets, ignore_index=0))
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(cross_entropy(logits, targets), logits)
    assert torch.equal(grad.abs().sum(-1) == 0, targets == 0)


def test_all_ignored_is_zero_with_zero_gradients() -> None:
    logits, targets = draw(7)
    logits.requires_grad_()
    loss = cross_entropy(logits, torch.zeros_like(targets))
    (grad,) = torch.autograd.grad(loss, logits)
    assert float(loss.detach()) == 0.0
    assert torch.equal(grad, torch.zeros_like(grad))


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[1e5, 0.0, -1e5]])
    assert float(cross_entropy(logits, torch.tensor([1]))) == 1e5


@pytest.mark.parametrize("bad", [-100, -1, 101])
def test_label_out_of_range(bad) -> None:
    logits, targets = draw(101)
    targets[1, 2] = bad
    with pytest.raises(TokenIdError, match=rf"targets\[1, 2\] = {bad} "):
        cross_entropy(logits, targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_logits_give_a_float32_loss(dtype) -> None:
    logits, targets = draw(101, dtype)
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, cross_entropy(logits.float(), targets))


def test_shapes_and_dtypes_are_checked() -> None:
    logits, targets = draw(7)
    with pytest.raises(ValueError, match=r"targets have shape \(3, 4\), logits \(3, 5, 7\)"):
        cross_entropy(logits, targets[:, :-1])
    with pytest.raises(ValueError, match="targets must hold integers, got float64"):
        cross_entropy(logits, targets.double())
    with pytest.raises(ValueError, match="T at least 2"):
        next_token_loss(logits[:, :1], targets[:, :1])
    with pytest.raises(ValueError, match="tokens"):
        next_token_loss(logits, targets[:, :-1])


def test_next_token_loss_shifts() -> None:
    logits, tokens = draw(7)
    assert torch.equal(next_token_loss(logits, tokens), cross_entropy(logits[:, :-1], tokens[:, 1:]))
