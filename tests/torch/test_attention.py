"""Attention: masks, positions, grouped heads, rows without a key, and the written-out form against the fused one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from omni_torch import attention
from omni_torch.attention import (
    CausalSelfAttention,
    attend,
    default_positions,
    make_attention_mask,
    simple_attention,
)
from omni_torch.layers import rope_frequencies

B, T, H, D = 2, 7, 6, 4


def draw(kv_heads: int = 3, dtype: torch.dtype = torch.float64, size: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, H, D), (B, T, kv_heads, D), (B, T, kv_heads, D)]
    return [(torch.randn(s, generator=generator, dtype=torch.float64) * size).to(dtype) for s in shapes]


def holes() -> torch.Tensor:
    """Left padding in row 0 (so that its first queries see nothing), a hole in row 1."""
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :3] = False
    mask[1, 4] = False
    return mask


def by_the_formula(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One query at a time, in float64; query head h reads key/value head h // (H / K)."""
    y = np.zeros_like(q)
    for b, t, h in np.ndindex(*q.shape[:3]):
        g = h * k.shape[2] // q.shape[2]
        seen = np.flatnonzero(mask[min(b, len(mask) - 1), t])
        if len(seen):
            score = k[b, seen, g] @ q[b, t, h] / np.sqrt(q.shape[3])
            p = np.exp(score - score.max())
            y[b, t, h] = (p / p.sum()) @ v[b, seen, g]
    return y


def test_mask_is_causal_and_keeps_what_it_is_told() -> None:
    assert make_attention_mask(B, T).tolist() == [np.tril(np.ones((T, T), bool)).tolist()]
    kept = make_attention_mask(B, T, holes())
    assert torch.equal(kept, torch.ones(T, T).tril().bool() & holes()[:, None, :])
    square = torch.rand(B, T, T) > 0.5
    assert torch.equal(make_attention_mask(B, T, square), torch.ones(T, T).tril().bool() & square)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(B, T), "must be boolean .* got float32"),
        (torch.ones(B, T, dtype=torch.int64), "must be boolean .* got int64"),
        (torch.ones(B, T + 1, dtype=torch.bool), r"shape \(2, 8\): must be \(B, T\) = \(2, 7\)"),
        (torch.ones(T, T, dtype=torch.bool), r"\(B, T, T\) = \(2, 7, 7\)"),
        (torch.ones(1, T, T, dtype=torch.bool), r"shape \(1, 7, 7\)"),
    ],
)
def test_bad_masks(mask, words) -> None:
    with pytest.raises(ValueError, match=words):
        make_attention_mask(B, T, mask)


def test_default_positions_count_kept_tokens() -> None:
    assert default_positions(4).tolist() == [[0, 1, 2, 3]]
    assert default_positions(T, holes()).tolist() == [[0, 0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 3, 4, 5]]
    assert torch.equal(default_positions(T, make_attention_mask(B, T, holes())), default_positions(T, holes()))


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("form", [attend, attention._attend_fused])
def test_attention_by_the_formula(kv_heads, form) -> None:
    q, k, v = draw(kv_heads)
    for mask in (make_attention_mask(B, T), make_attention_mask(B, T, holes())):
        y = form(q, k, v, mask).numpy()
        expected = by_the_formula(q.numpy(), k.numpy(), v.numpy(), mask.numpy())
        assert np.abs(y - expected).max() <= 4 * (D + T) * np.finfo(np.float64).eps * np.abs(v.numpy()).max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 15.0])  # 15: scores far beyond ±50
def test_written_out_equals_fused(dtype, size) -> None:
    """Both forward and backward, in units of the dtype's rounding: a score of size s is known to s · eps."""
    results = []
    mask = make_attention_mask(B, T, holes())
    for form in (attend, attention._attend_fused):
        q, k, v = (x.requires_grad_() for x in draw(dtype=dtype, size=size))
        y = form(q, k, v, mask)
        y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(dtype))
        results.append([x.detach().double() for x in (y, q.grad, k.grad, v.grad)])
    eps = torch.finfo(dtype).eps
    wide_eps = min(eps, torch.finfo(torch.float32).eps)  # scores and softmax never run below float32
    for written, fused in zip(*results, strict=True):
        scale = max(float(fused.abs().max()), size)
        assert float((written - fused).abs().max()) <= 8 * (eps + wide_eps * size * size) * scale


@pytest.mark.parametrize("form", [attend, attention._attend_fused])
def test_a_row_without_a_key_gives_zeros_forward_and_backward(form) -> None:
    q, k, v = (x.requires_grad_() for x in draw())
    y = form(q, k, v, make_attention_mask(B, T, holes()))
    y.sum().backward()
    assert not y[0, :3].any()
    assert not q.grad[0, :3].any()
    assert not k.grad[0, :3].any()
    assert not v.grad[0, :3].any()
    assert y[0, 3:].all()
    assert all(bool(x.grad.isfinite().all()) for x in (q, k, v))
    empty = form(*draw(), torch.zeros(1, T, T, dtype=torch.bool))
    assert torch.equal(empty, torch.zeros_like(empty))


def make(dropout: float = 0.0, **kinds) -> tuple[CausalSelfAttention, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    module = CausalSelfAttention(24, 6, dropout, **kinds).double()
    cos, sin = rope_frequencies(torch.arange(T)[None], 4, dtype=torch.float64)
    return module, torch.randn(B, T, 24, dtype=torch.float64, requires_grad=True), cos, sin


@pytest.mark.parametrize("kinds", [{}, {"use_gqa": True}, {"use_gqa": True, "kv_groups": 1}])
def test_causality_by_gradients(kinds) -> None:
    """Output t depends on every input ≤ t (1), on none after it, exactly (2), and on itself (3)."""
    module, x, cos, sin = make(**kinds)
    y = module(x, cos, sin, make_attention_mask(B, T))
    for t in range(T):
        (grad,) = torch.autograd.grad(y[:, t].square().sum(), x, retain_graph=True)
        depends = grad.abs().sum(dim=-1) > 0
        assert depends[:, : t + 1].all()
        assert not depends[:, t + 1 :].any()


def test_names_and_shapes_of_the_projections() -> None:
    shapes = {name: tuple(p.shape) for name, p in make()[0].named_parameters()}
    assert shapes == {"qkv.weight": (72, 24), "o.weight": (24, 24)}
    shapes = {name: tuple(p.shape) for name, p in make(use_gqa=True, kv_groups=2)[0].named_parameters()}
    assert shapes == {"q.weight": (24, 24), "k.weight": (8, 24), "v.weight": (8, 24), "o.weight": (24, 24)}


def test_as_many_groups_as_heads_is_multi_head() -> None:
    grouped, x, cos, sin = make(use_gqa=True, kv_groups=6)
    fused, *_ = make()
    fused.qkv.weight.data = torch.cat([grouped.q.weight, grouped.k.weight, grouped.v.weight]).detach()
    fused.o.weight.data = grouped.o.weight.detach()
    mask = make_attention_mask(B, T, holes())
    difference = (grouped(x, cos, sin, mask) - fused(x, cos, sin, mask)).detach().abs().max()
    assert float(difference) <= 24 * torch.finfo(torch.float64).eps


def test_dropout_only_in_training_and_on_the_probabilities(monkeypatch) -> None:
    module, x, cos, sin = make(dropout=0.5)
    mask = make_attention_mask(B, T)
    seen = []
    monkeypatch.setattr(module.drop, "forward", lambda p: seen.append(p.shape) or p)
    trained = module(x, cos, sin, mask)
    assert seen == [(B, 6, 1, T, T)]
    evaluated = module.eval()(x, cos, sin, mask)
    assert len(seen) == 1
    assert float((trained - evaluated).detach().abs().max()) <= 24 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_simple_attention(leading) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(*leading, n, width, generator=draw, dtype=torch.float64) for n, width in ((5, 8), (7, 8), (7, 3))
    )
    output, weights = simple_attention(q, k, v)
    assert output.shape == (*leading, 5, 3)
    assert weights.shape == (*leading, 5, 7)
    e = torch.exp(q @ k.transpose(-2, -1) / 8**0.5)
    expected = e / e.sum(dim=-1, keepdim=True)
    eps = torch.finfo(torch.float64).eps
    assert float((weights.sum(dim=-1) - 1).abs().max()) <= 7 * eps
    assert float((weights - expected).abs().max()) <= 8 * 4 * eps
    assert float((output - expected @ v).abs().max()) <= 8 * 7 * eps * float(v.abs().max())


def test_no_mask_is_a_mask_that_hides_nothing() -> None:
    q, k, v = (torch.randn(2, n, 6, 4, dtype=torch.float64) for n in (1, 7, 7))
    everything = torch.ones(1, 1, 7, dtype=torch.bool)
    error = attention._attend_fused(q, k, v, None) - attention._attend_fused(q, k, v, everything)
    assert float(error.abs().max()) <= (4 + 7) * torch.finfo(torch.float64).eps * float(v.abs().max())


@pytest.mark.parametrize(
    "shapes",
    [
        ((3,), (3,), (3,)),
        ((2, 3), (4, 3), (5, 3)),
        ((2, 3), (4, 2), (4, 3)),
        ((2, 0), (4, 0), (4, 3)),
        ((2, 3), (0, 3), (0, 3)),
    ],
)
def test_simple_attention_refuses_shapes_that_do_not_belong_together(shapes) -> None:
    with pytest.raises(ValueError, match="query, key, value have shapes"):
        simple_attention(*map(torch.zeros, shapes))


def test_a_list_is_no_mask() -> None:
    with pytest.raises(ValueError, match="attention_mask is a list, must be a tensor"):
        attention.make_attention_mask(1, 2, [[True, True]])
