"""Causal self-attention over all heads, or with key/value heads shared by groups of query heads (GQA).

Shapes: B batch, T query time, S key time (T without a cache), D model, H heads, K key/value heads, G = H/K query heads
per key/value head, d head size, C = d/2 channel pairs of RoPE.

Masks are boolean, True where a query may see a key. A query that sees no key gets zeros, and hands zeros back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .layers import apply_rope, check_array, make_dropout, make_linear, statistics_dtype

__all__ = ["make_attention_mask", "default_positions", "attend", "simple_attention", "CausalSelfAttention"]

_SMALLEST_BLOCK, _MOST_BLOCKS = 128, 4


def make_attention_mask(
    batch: int, time: int, attention_mask: Bool[Array, "B T"] | Bool[Array, "B T T"] | None = None
) -> Bool[Array, "B T T"] | Bool[Array, "1 T T"]:
    """Which key each query may see: itself and the past, and of these what `attention_mask` keeps.

    `attention_mask` is (B, T), keys to keep, or (B, T, T), queries by keys; None keeps all, and the batch axis of the
    result is then 1.

    Raises:
        ValueError: a mask that is not boolean (a 0/1 mask would be read as scores by others) or not of these shapes.
    """
    causal_TS = jnp.tril(jnp.ones((time, time), jnp.bool_))
    if attention_mask is None:
        return causal_TS[None]
    check_array("attention_mask", attention_mask)
    if attention_mask.dtype != jnp.bool_:
        raise ValueError(
            f"attention_mask must be boolean (True: may be attended to), got {attention_mask.dtype}; "
            "pass attention_mask != 0 for a mask of ones and zeros"
        )
    if tuple(attention_mask.shape) not in ((batch, time), (batch, time, time)):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: must be (B, T) = {(batch, time)} or (B, T, T) = "
            f"{(batch, time, time)}; give one entry per token of the input"
        )
    attention_mask = jnp.asarray(attention_mask)
    kept = attention_mask[:, None, :] if attention_mask.ndim == 2 else attention_mask
    return causal_TS[None] & kept


def default_positions(
    time: int, attention_mask: Bool[Array, "B T"] | Bool[Array, "B T T"] | None = None
) -> Int[Array, "B T"] | Int[Array, "1 T"]:
    """The position of each token when none is given: how many kept tokens come before it.

    cumsum(kept) − 1, at least 0, so left padding shifts nothing. A token is kept if a (B, T) mask keeps it, or if a
    (B, T, T) mask lets it see itself. Without a mask the batch axis is 1.
    """
    if attention_mask is None:
        return jnp.arange(time, dtype=jnp.int32)[None]
    kept_BT = attention_mask if attention_mask.ndim == 2 else jnp.diagonal(attention_mask, axis1=1, axis2=2)
    return jnp.maximum(jnp.cumsum(kept_BT, axis=1, dtype=jnp.int32) - 1, 0)


def attend(
    q_BTHd: Float[Array, "B T H d"],
    k_BSKd: Float[Array, "B S K d"],
    v_BSKd: Float[Array, "B S K d"],
    mask_BTS: Bool[Array, "#B T S"],
    *,
    dropout: Callable[[Array], Array] | None = None,
) -> Float[Array, "B T H d"]:
    """softmax(q·k / √d)·v, written out; consecutive query heads share a key/value head.

    Scores and softmax in promote_types(dtype, float32), probabilities rounded to the dtype of v; `dropout` is applied
    to them. A row without any key gives zeros, forward and gradient.

    Source: Vaswani et al., arXiv 1706.03762, equation 1; Ainslie et al., GQA, arXiv 2305.13245, section 2.2.
    """
    B, T, H, d = q_BTHd.shape
    K = k_BSKd.shape[2]
    wide = statistics_dtype(q_BTHd.dtype)
    # Heads in front before the products: XLA would otherwise turn the scores round, which are larger, at every use.
    q_BKGTd = jnp.transpose(jnp.reshape(q_BTHd, (B, T, K, H // K, d)), (0, 2, 3, 1, 4))
    k_BKSd, v_BKSd = jnp.swapaxes(k_BSKd, 1, 2), jnp.swapaxes(v_BSKd, 1, 2)
    scores = jnp.einsum("bkgtd,bksd->bkgts", q_BKGTd, k_BKSd, preferred_element_type=wide) * (1.0 / math.sqrt(d))
    p_BKGTS = _softmax(scores, mask_BTS[:, None, None]).astype(v_BSKd.dtype)
    if dropout is not None:
        p_BKGTS = dropout(p_BKGTS)
    y_BKGTd = jnp.einsum("bkgts,bksd->bkgtd", p_BKGTS, v_BKSd, preferred_element_type=wide).astype(v_BSKd.dtype)
    return jnp.reshape(jnp.transpose(y_BKGTd, (0, 3, 1, 2, 4)), (B, T, H, d))


def _softmax(scores: Array, seen: Array) -> Array:
    """Softmax over the last axis of what may be seen; zeros, forward and gradient, where that is nothing."""
    scores = jnp.where(seen, scores, -math.inf)
    top = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    # A row of nothing but −inf: shifting it by 0 and dividing by 1 leaves zeros, where −inf − (−inf) would leave NaN.
    unnormalised = jnp.exp(scores - jnp.where(top == -math.inf, 0.0, top))
    total = jnp.sum(unnormalised, axis=-1, keepdims=True)
    return unnormalised / jnp.where(total == 0.0, 1.0, total)


def _attend_causal(
    q_BTHd: Float[Array, "B T H d"],
    k_BTKd: Float[Array, "B T K d"],
    v_BTKd: Float[Array, "B T K d"],
    mask_BTT: Bool[Array, "#B T T"],
    *,
    dropout: Callable[[Array], Array] | None = None,
) -> Float[Array, "B T H d"]:
    """`attend` for a causal mask, in blocks of queries, each without the keys after it: five eighths of the work."""
    T = q_BTHd.shape[1]
    block = max(_SMALLEST_BLOCK, -(-T // _MOST_BLOCKS))
    ends = [*range(block, T, block), T]
    return jnp.concatenate(
        [
            attend(q_BTHd[:, a:b], k_BTKd[:, :b], v_BTKd[:, :b], mask_BTT[:, a:b, :b], dropout=dropout)
            for a, b in zip([0, *ends], ends)
        ],
        axis=1,
    )


def _attend_one(
    q_BTHd: Float[Array, "B 1 H d"],
    k_BSKd: Float[Array, "B S K d"],
    v_BSKd: Float[Array, "B S K d"],
    mask_BTS: Bool[Array, "#B 1 S"],
    *,
    dropout: Callable[[Array], Array] | None = None,
) -> Float[Array, "B 1 H d"]:
    """`attend` for a single query, as products and sums that XLA fuses: einsum would turn the whole cache round first.

    On a CPU faster where a key/value head has several queries, and much slower where it has one.
    """
    B, _, H, d = q_BTHd.shape
    S, K = k_BSKd.shape[1:3]
    wide = statistics_dtype(q_BTHd.dtype)
    q_B1KGd = jnp.reshape(q_BTHd, (B, 1, K, H // K, d)).astype(wide)
    scores = jnp.sum(q_B1KGd * k_BSKd[:, :, :, None].astype(wide), axis=-1) * (1.0 / math.sqrt(d))
    p_BHS = _softmax(jnp.swapaxes(jnp.reshape(scores, (B, S, H)), 1, 2), mask_BTS).astype(v_BSKd.dtype)
    if dropout is not None:
        p_BHS = dropout(p_BHS)
    p_BSKG1 = jnp.reshape(jnp.swapaxes(p_BHS, 1, 2), (B, S, K, H // K, 1)).astype(wide)
    y_BKGd = jnp.sum(p_BSKG1 * v_BSKd[:, :, :, None].astype(wide), axis=1)
    return jnp.reshape(y_BKGd.astype(v_BSKd.dtype), (B, 1, H, d))


def simple_attention(
    query: Float[Array, "*B T d"], key: Float[Array, "*B S d"], value: Float[Array, "*B S D"]
) -> tuple[Float[Array, "*B T D"], Float[Array, "*B T S"]]:
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
    scores = jnp.matmul(query, jnp.swapaxes(key, -2, -1)) * (1.0 / math.sqrt(query.shape[-1]))
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.matmul(weights, value), weights


class CausalSelfAttention(nnx.Module):
    """Multi-head causal self-attention with RoPE, without biases.

    Multi-head: one projection `qkv` whose outputs are q, k, v in this order. Grouped (use_gqa): `q`, `k`, `v` apart,
    kv_groups key/value heads. Both: output projection `o`. Attention is written out; XLA fuses it.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        dropout: float = 0.1,
        use_gqa: bool = False,
        kv_groups: int | None = None,
        *,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ) -> None:
        kinds = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.n_heads = n_heads
        self.head_dim = d_model // n_heads
        self.kv_heads = n_heads if not use_gqa else n_heads // 2 if kv_groups is None else kv_groups
        self.use_gqa = use_gqa
        if use_gqa:
            self.q = make_linear(d_model, d_model, **kinds)
            self.k = make_linear(d_model, self.kv_heads * self.head_dim, **kinds)
            self.v = make_linear(d_model, self.kv_heads * self.head_dim, **kinds)
        else:
            self.qkv = make_linear(d_model, 3 * d_model, **kinds)
        self.o = make_linear(d_model, d_model, **kinds)
        self.drop = make_dropout(dropout, rngs)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        cos_BTC: Float[Array, "#B T C"],
        sin_BTC: Float[Array, "#B T C"],
        mask_BTS: Bool[Array, "#B T S"],
        cache: Any = None,
    ) -> Float[Array, "B T D"]:
        """Attention of x (B, T, D) to itself: (B, T, D); cos and sin (#B, T, C), mask (#B, T, S), #B being B or 1.

        `cache`, this layer's part of a call on a KVCache, takes the new keys and values and gives those to attend to.
        """
        B, T, D = x_BTD.shape
        if self.use_gqa:
            q, k, v = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        else:
            q, k, v = jnp.split(self.qkv(x_BTD), 3, axis=-1)
        q_BTHd = apply_rope(jnp.reshape(q, (B, T, self.n_heads, self.head_dim)), cos_BTC, sin_BTC)
        k_BSKd = apply_rope(jnp.reshape(k, (B, T, self.kv_heads, self.head_dim)), cos_BTC, sin_BTC)
        v_BSKd = jnp.reshape(v, (B, T, self.kv_heads, self.head_dim))
        form = attend
        if cache is not None:
            stored = cache.store(k_BSKd, v_BSKd)
            if cache.empty and T > _SMALLEST_BLOCK:  # the new tokens are all there is to see
                form, mask_BTS = _attend_causal, mask_BTS[:, :, :T]
            else:
                k_BSKd, v_BSKd = stored
                form = _attend_one if T == 1 and self.kv_heads < self.n_heads else attend
        y_BTHd = form(q_BTHd, k_BSKd, v_BSKd, mask_BTS, dropout=self.drop)
        return self.o(jnp.reshape(y_BTHd, (B, T, D)))
