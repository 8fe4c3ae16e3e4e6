"""Causal self-attention over all heads, or with key/value heads shared by groups of query heads (GQA).

Shapes: B batch, T query time, S key time (T without a cache), D model, H heads, K key/value heads, G = H/K query heads
per key/value head, d head size, C = d/2 channel pairs of RoPE.

Masks are boolean, True where a query may see a key. A query that sees no key gets zeros, and hands zeros back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .layers import apply_rope, check_tensor, dtype_name, statistics_dtype

__all__ = ["make_attention_mask", "default_positions", "attend", "simple_attention", "CausalSelfAttention"]


def make_attention_mask(
    batch: int,
    time: int,
    attention_mask: Bool[Tensor, "B T"] | Bool[Tensor, "B T T"] | None = None,
    device: torch.device | None = None,
) -> Bool[Tensor, "B T T"] | Bool[Tensor, "1 T T"]:
    """Which key each query may see: itself and the past, and of these what `attention_mask` keeps.

    `attention_mask` is (B, T), keys to keep, or (B, T, T), queries by keys; None keeps all, and the batch axis of the
    result is then 1.

    Raises:
        ValueError: a mask that is not boolean (a 0/1 mask would be read as scores by others) or not of these shapes.
    """
    causal_TS = torch.ones(time, time, dtype=torch.bool, device=device).tril()
    if attention_mask is None:
        return causal_TS[None]
    check_tensor("attention_mask", attention_mask)
    if attention_mask.dtype != torch.bool:
        raise ValueError(
            f"attention_mask must be boolean (True: may be attended to), got {dtype_name(attention_mask.dtype)}; "
            "pass attention_mask != 0 for a mask of ones and zeros"
        )
    if tuple(attention_mask.shape) not in ((batch, time), (batch, time, time)):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: must be (B, T) = {(batch, time)} or (B, T, T) = "
            f"{(batch, time, time)}; give one entry per token of the input"
        )
    kept = attention_mask[:, None, :] if attention_mask.ndim == 2 else attention_mask
    return causal_TS[None] & kept


def default_positions(
    time: int,
    attention_mask: Bool[Tensor, "B T"] | Bool[Tensor, "B T T"] | None = None,
    device: torch.device | None = None,
) -> Int[Tensor, "B T"] | Int[Tensor, "1 T"]:
    """The position of each token when none is given: how many kept tokens come before it.

    cumsum(kept) − 1, at least 0, so left padding shifts nothing. A token is kept if a (B, T) mask keeps it, or if a
    (B, T, T) mask lets it see itself. Without a mask the batch axis is 1.
    """
    if attention_mask is None:
        return torch.arange(time, device=device)[None]
    kept_BT = attention_mask if attention_mask.ndim == 2 else attention_mask.diagonal(dim1=1, dim2=2)
    return (kept_BT.cumsum(dim=1) - 1).clamp(min=0)


def attend(
    q_BTHd: Float[Tensor, "B T H d"],
    k_BSKd: Float[Tensor, "B S K d"],
    v_BSKd: Float[Tensor, "B S K d"],
    mask_BTS: Bool[Tensor, "#B T S"],
    *,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "B T H d"]:
    """softmax(q·k / √d)·v, written out; consecutive query heads share a key/value head.

    Scores and softmax in promote_types(dtype, float32), probabilities rounded to the dtype of v; `dropout` is applied
    to them. A row without any key gives zeros, forward and gradient.

    Source: Vaswani et al., arXiv 1706.03762, equation 1; Ainslie et al., GQA, arXiv 2305.13245, section 2.2.
    """
    B, T, H, d = q_BTHd.shape
    K = k_BSKd.shape[2]
    wide = statistics_dtype(q_BTHd.dtype)
    q_BTKGd = q_BTHd.reshape(B, T, K, H // K, d)
    scores = torch.einsum("btkgd,bskd->bkgts", q_BTKGd.to(wide), k_BSKd.to(wide)) * (1.0 / math.sqrt(d))
    scores = scores.masked_fill(~mask_BTS[:, None, None], -math.inf)
    top = scores.detach().amax(dim=-1, keepdim=True)
    # A row of nothing but −inf: shifting it by 0 and dividing by 1 leaves zeros, where −inf − (−inf) would leave NaN.
    unnormalised = torch.exp(scores - top.masked_fill(top == -math.inf, 0.0))
    total = unnormalised.sum(dim=-1, keepdim=True)
    p_BKGTS = (unnormalised / total.masked_fill(total == 0.0, 1.0)).to(v_BSKd.dtype)
    if dropout is not None:
        p_BKGTS = dropout(p_BKGTS)
    return torch.einsum("bkgts,bskd->btkgd", p_BKGTS, v_BSKd).reshape(B, T, H, d)


def _attend_fused(
    q_BTHd: Float[Tensor, "B T H d"],
    k_BSKd: Float[Tensor, "B S K d"],
    v_BSKd: Float[Tensor, "B S K d"],
    mask_BTS: Bool[Tensor, "#B T S"] | None,
) -> Float[Tensor, "B T H d"]:
    """The same by torch's fused kernels; without a mask every query sees every key."""
    # What a kernel gives for a row without a key depends on the kernel (NaN, zeros, mean of v): such a row sees
    # every key here, and is zeroed afterwards, which zeroes its gradient too.
    seen_BT1 = seen_BTS = None
    if mask_BTS is not None:
        seen_BT1 = mask_BTS.any(dim=-1, keepdim=True)
        seen_BTS = mask_BTS | ~seen_BT1
    y_BHTd = F.scaled_dot_product_attention(
        q_BTHd.transpose(1, 2),
        k_BSKd.transpose(1, 2),
        v_BSKd.transpose(1, 2),
        attn_mask=None if seen_BTS is None else seen_BTS[:, None],
        dropout_p=0.0,
        is_causal=False,  # the mask says it; is_causal aligns a non-square mask at the top left
        scale=1.0 / math.sqrt(q_BTHd.shape[-1]),
        enable_gqa=q_BTHd.shape[2] != k_BSKd.shape[2],
    )
    y_BTHd = y_BHTd.transpose(1, 2)
    return y_BTHd if seen_BT1 is None else y_BTHd.masked_fill(~seen_BT1[..., None], 0.0)


def simple_attention(
    query: Float[Tensor, "*B T d"], key: Float[Tensor, "*B S d"], value: Float[Tensor, "*B S D"]
) -> tuple[Float[Tensor, "*B T D"], Float[Tensor, "*B T S"]]:
    """softmax(query·keyᵀ / √d)·value over any leading axes *B, without a mask: (output, weights).

    weights[t, s] is how much query t takes from value s; each query's weights sum to 1.

    Raises:
        ValueError: fewer than two axes, d or S of 0, or sizes that do not belong together.

    Source: Vaswani et al., arXiv 1706.03762, equation 1.
    """
    shapes = [tuple(x.shape) for x in (query, key, value)]
    q, k, v = shapes
    if min(map(len, shapes)) < 2 or q[-1] != k[-1] or k[-2] != v[-2] or 0 in k[-2:]:
        raise ValueError(
            f"query, key, value have shapes {q}, {k}, {v}: must be (..., T, d), (..., S, d), (..., S, D) with d and S "
            "of at least 1; add the missing axis, or give each key its value"
        )
    scores = query @ key.transpose(-2, -1) * (1.0 / math.sqrt(query.shape[-1]))
    weights = torch.softmax(scores, dim=-1)
    return weights @ value, weights


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention with RoPE, without biases.

    Multi-head: one projection `qkv` whose outputs are q, k, v in this order. Grouped (use_gqa): `q`, `k`, `v` apart,
    kv_groups key/value heads. Both: output projection `o`. In training with dropout > 0 attention is written out and
    the probabilities are dropped; otherwise torch's fused kernels compute it.
    """

    def __init__(
        self, d_model: int, n_heads: int, dropout: float = 0.1, use_gqa: bool = False, kv_groups: int | None = None
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.head_dim = d_model // n_heads
        self.kv_heads = n_heads if not use_gqa else n_heads // 2 if kv_groups is None else kv_groups
        self.use_gqa = use_gqa
        if use_gqa:
            self.q = nn.Linear(d_model, d_model, bias=False)
            self.k = nn.Linear(d_model, self.kv_heads * self.head_dim, bias=False)
            self.v = nn.Linear(d_model, self.kv_heads * self.head_dim, bias=False)
        else:
            self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.o = nn.Linear(d_model, d_model, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        cos_BTC: Float[Tensor, "#B T C"],
        sin_BTC: Float[Tensor, "#B T C"],
        mask_BTS: Bool[Tensor, "#B T S"] | None,
        cache: Any = None,
    ) -> Float[Tensor, "B T D"]:
        """Attention of x (B, T, D) to itself: (B, T, D); cos and sin (#B, T, C), mask (#B, T, S), #B being B or 1.

        `cache`, this layer's part of a call on a KVCache, takes the new keys and values and gives those to attend to.
        Without dropout the mask may be None: every query sees every key.
        """
        B, T, D = x_BTD.shape
        q, k, v = (self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)) if self.use_gqa else self.qkv(x_BTD).chunk(3, dim=-1)
        q_BTHd = apply_rope(q.reshape(B, T, self.n_heads, self.head_dim), cos_BTC, sin_BTC)
        k_BSKd = apply_rope(k.reshape(B, T, self.kv_heads, self.head_dim), cos_BTC, sin_BTC)
        v_BSKd = v.reshape(B, T, self.kv_heads, self.head_dim)
        if cache is not None:
            k_BSKd, v_BSKd = cache.store(k_BSKd, v_BSKd)
        if self.training and self.drop.p > 0.0 and mask_BTS is not None:
            y_BTHd = attend(q_BTHd, k_BSKd, v_BSKd, mask_BTS, dropout=self.drop)
        else:
            y_BTHd = _attend_fused(q_BTHd, k_BSKd, v_BSKd, mask_BTS)
        return self.o(y_BTHd.reshape(B, T, D))
