"""The CTC loss against all paths counted one by one, and against torch's own."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from omni_torch.ctc import ctc_loss

ULPS = 16  # per frame: a logsumexp of three, a sum, and the log-softmax
EPS64 = np.finfo(np.float64).eps


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
def test_all_paths_counted(target, blank) -> None:
    logits = np.random.default_rng(0).normal(size=(1, 5, 4))
    padded = np.array([target + [-1] * (4 - len(target))])  # what lies behind a target is not read
    loss = ctc_loss(
        torch.from_numpy(logits), torch.from_numpy(padded), torch.tensor([5]), torch.tensor([len(target)]), blank
    )
    assert_near(loss, np.array([by_all_paths(logits[0], target, blank)]), 5)


@pytest.mark.parametrize("seed", range(6))
def test_torch_agrees(seed) -> None:
    blank = seed % 3
    logits, targets, input_lengths, target_lengths = (torch.from_numpy(x) for x in draw(seed, blank=blank))

    def theirs(logits):
        logp_TBV = logits.log_softmax(dim=-1).transpose(0, 1)
        return F.ctc_loss(
            logp_TBV, targets, input_lengths, target_lengths, blank=blank, reduction="none", zero_infinity=False
        )

    def ours(logits):
        return ctc_loss(logits, targets, input_lengths, target_lengths, blank)

    T = logits.shape[1]
    assert_near(ours(logits), theirs(logits), T)
    grad, expected = (torch.func.grad(lambda x, f=f: f(x).sum())(logits) for f in (ours, theirs))
    assert_near(grad, expected, T)
    for row, length in zip(grad, input_lengths.tolist()):
        assert not row[length:].any()


def test_batches_change_nothing() -> None:
    arguments = [torch.as_tensor(x) for x in draw(0)]
    losses = ctc_loss(*arguments)
    for i in range(5):
        assert_near(ctc_loss(*(x[i : i + 1] for x in arguments)), losses[i : i + 1], 20)


def test_long_clips_do_not_underflow() -> None:
    logits = torch.zeros(1, 2000, 30)
    logits[:, :, 0] = 20.0
    targets = torch.arange(50)[None] % 29 + 1
    loss = ctc_loss(logits, targets, torch.tensor([2000]), torch.tensor([50]))
    assert 500.0 < float(loss[0]) < 1000.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_give_float32(dtype) -> None:
    logits, *rest = draw(0)
    logits, rest = torch.from_numpy(logits).to(dtype), [torch.from_numpy(x) for x in rest]
    losses = ctc_loss(logits, *rest)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, ctc_loss(logits.float(), *rest))


def impossible() -> list:
    """Two clips of 4 frames; [1, 1, 2] fits into 4, [1, 1, 1] needs 5."""
    logits = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    return [logits, np.array([[1, 1, 2], [1, 1, 1]]), np.array([4, 4]), np.array([3, 3])]


@pytest.fixture
def compiled():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch.compile imports warns of its own future
        yield torch.compile(ctc_loss, backend="eager", dynamic=False)
    torch.compiler.reset()


def test_too_long_a_target_is_an_error_and_infinite_inside_compile(compiled) -> None:
    arguments = [torch.as_tensor(x) for x in impossible()]
    with pytest.raises(ValueError, match=r"targets\[1\] has 3 symbols, and needs 5 frames .* input_lengths\[1\] = 4"):
        ctc_loss(*arguments)
    logits = arguments[0].requires_grad_()
    losses = compiled(*arguments)
    assert losses.isfinite().tolist() == [True, False]
    assert losses[1].item() == math.inf
    losses.sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0].any()
    assert not logits.grad[1].any()


def test_a_symbol_that_is_none_is_nan_inside_compile(compiled) -> None:
    arguments = [torch.as_tensor(x) for x in impossible()]
    arguments[1] = torch.tensor([[1, 2, 1], [1, 0, 7]])
    assert compiled(*arguments).isnan().tolist() == [False, True]


def test_a_target_of_probability_zero_is_infinite() -> None:
    logits = torch.zeros(1, 4, 3)
    logits[:, :, 2] = -torch.inf
    rest = (torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2]))
    assert ctc_loss(logits, *rest).item() == math.inf
    assert not torch.func.grad(lambda x: ctc_loss(x, *rest).sum())(logits).any()
    assert ctc_loss(logits, torch.tensor([[1, 1]]), *rest[1:]).isfinite().all()
    logits[0, 1, 1] = torch.nan
    assert ctc_loss(logits, *rest).isnan().all()


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
        ctc_loss(*(torch.as_tensor(x) for x in arguments[:4]), arguments[4])
