"""Attention: scale, heads, masks, softmax, projections."""

from __future__ import annotations

from parity.mutants.mutant import Edit, Mutant

__all__ = ["MUTANTS"]

FIRST = r"^blocks\.0\.attn$"
FUSED = ("omni_torch.attention", "_attend_fused")
SELF = ("omni_torch.attention", "CausalSelfAttention.forward")
JAX_SELF = ("omni_jax.attention", "CausalSelfAttention.__call__")
JAX = ("omni_jax.attention", "attend")
SOFTMAX = ("omni_jax.attention", "_softmax")
GROUPED = {"configs": ("gqa-swiglu",)}
MASK = ("omni_torch.attention", "make_attention_mask")

MUTANTS = (
    Mutant(
        "attention-heads-tiled", "attention", "A01", "key/value heads tiled (0101) where they repeat (0011)",
        (Edit(*FUSED, "k_BSKd.transpose(1, 2),",
            "k_BSKd.transpose(1, 2).repeat(1, q_BTHd.shape[2] // k_BSKd.shape[2], 1, 1),"),
         Edit(*FUSED, "v_BSKd.transpose(1, 2),",
             "v_BSKd.transpose(1, 2).repeat(1, q_BTHd.shape[2] // v_BSKd.shape[2], 1, 1),")),
        "logits", FIRST, GROUPED, needs="grouped heads, 1 < K < H",
    ),
    Mutant(
        "attention-heads-tiled-jax", "attention", "A01", "query heads are grouped across, not within, key/value heads",
        (Edit(*JAX, "jnp.reshape(q_BTHd, (B, T, K, H // K, d)), (0, 2, 3, 1, 4)",
              "jnp.swapaxes(jnp.reshape(q_BTHd, (B, T, H // K, K, d)), 2, 3), (0, 2, 3, 1, 4)"),),
        "logits", FIRST, GROUPED, needs="grouped heads, 1 < K < H",
    ),
    Mutant(
        "attention-scale-model", "attention", "A02", "scores over the square root of d_model",
        (Edit(*FUSED, "math.sqrt(q_BTHd.shape[-1])", "math.sqrt(q_BTHd.shape[-1] * q_BTHd.shape[2])"), ), "logits",
            FIRST,
    ),
    Mutant(
        "attention-scale-missing", "attention", "A02", "scores without a scale",
        (Edit(*JAX, " * (1.0 / math.sqrt(d))", ""),), "logits", FIRST,
    ),
    Mutant(
        "attention-softcap", "attention", "A03", "scores capped by 50·tanh(s / 50)",
        (Edit(*JAX, "_softmax(scores,", "_softmax(50.0 * jnp.tanh(scores / 50.0),"),), "logits", FIRST,
        needs="large scores",
    ),
    Mutant(
        "attention-score-clamp", "attention", "common: scores clamped for safety", "scores clamped at ±50",
        (Edit(*JAX, "_softmax(scores,", "_softmax(jnp.clip(scores, -50.0, 50.0),"), ), "logits",
            r"far positions|T = 1|default",
        needs="scores beyond ±50",
    ),
    Mutant(
        "attention-sees-ahead", "attention", "A04", "the causal mask lets every query see one token ahead",
        (Edit(*MASK, ".tril()", ".tril(1)"),), "logits", FIRST,
    ),
    Mutant(
        "attention-not-itself", "attention", "A04", "the causal mask hides the query's own token",
        (Edit(*MASK, ".tril()", ".tril(-1)"),), "logits", FIRST,
    ),
    Mutant(
        "attention-mask-polarity", "attention", "A06", "the padding mask is taken for what to ignore",
        (Edit(*MASK, "kept = attention_mask[:, None, :] if", "kept = ~attention_mask[:, None, :] if"), ), "logits",
            FIRST,
        needs="padding",
    ),
    Mutant(
        "attention-mask-ignored", "attention", "K02", "padding is attended to",
        (Edit(*MASK, "return causal_TS[None] & kept", "return causal_TS[None] & kept.new_ones(kept.shape)"), ),
            "logits", FIRST,
        needs="padding",
    ),
    Mutant(
        "attention-empty-mean", "attention", "A09", "a row without a key gives the mean of v",
        (Edit(*FUSED, "y_BTHd if seen_BT1 is None else y_BTHd.masked_fill(~seen_BT1[..., None], 0.0)", "y_BTHd"), ),
            "logits", FIRST,
        needs="a row of padding alone",
    ),
    Mutant(
        "attention-empty-nan", "attention", "A09", "a row without a key gives NaN",
        (Edit(*SOFTMAX, "unnormalised / jnp.where(total == 0.0, 1.0, total)", "unnormalised / total"), ), "logits",
            FIRST,
        needs="a row of padding alone",
    ),
    Mutant(
        "attention-mask-finite", "attention", "A08", "masked scores are −1e4, not −inf",
        (Edit(*SOFTMAX, "jnp.where(seen, scores, -math.inf)", "jnp.where(seen, scores, -1e4)"),), "logits", FIRST,
        needs="a row of padding alone",
    ),
    Mutant(
        "attention-mask-added", "attention", "A08", "masked scores are lowered by 10, not removed",
        (Edit(*SOFTMAX, "jnp.where(seen, scores, -math.inf)", "jnp.where(seen, scores, scores - 10.0)"), ), "logits",
            FIRST,
    ),
    Mutant(
        "attention-softmax-bfloat16", "attention", "A11", "probabilities are rounded to bfloat16",
        (Edit(*JAX, "_softmax(scores, mask_BTS[:, None, None])",
              "_softmax(scores, mask_BTS[:, None, None]).astype(jnp.bfloat16).astype(wide)"),), "logits", FIRST,
    ),
    Mutant(
        "attention-softmax-axis", "attention", "common: softmax over the wrong axis", "softmax over the queries",
        (Edit(*SOFTMAX, "axis=-1", "axis=-2", 2),), "logits", FIRST,
    ),
    Mutant(
        "attention-output-transposed", "attention", "A13", "the square output projection is not transposed",
        (Edit(*SELF, "self.o(y_BTHd.reshape(B, T, D))", "y_BTHd.reshape(B, T, D) @ self.o.weight"),), "logits", FIRST,
    ),
    Mutant(
        "attention-qkv-order", "attention", "A14", "the fused projection is cut as q, v, k",
        (Edit(*JAX_SELF, "q, k, v = jnp.split(", "q, v, k = jnp.split("),), "logits", FIRST,
    ),
    Mutant(
        "attention-qkv-same", "attention", "A14", "keys are cut from the rows of the values",
        (Edit(*SELF, "self.qkv(x_BTD).chunk(3, dim=-1)", "[self.qkv(x_BTD).chunk(3, dim=-1)[i] for i in (0, 2, 2)]"),),
        "logits", FIRST,
    ),
    Mutant(
        "attention-qkv-by-head", "attention", "A14", "the fused projection is cut head by head (q, k, v of each)",
        (Edit(*SELF, "self.qkv(x_BTD).chunk(3, dim=-1)",
              "self.qkv(x_BTD).reshape(B, T, self.n_heads, 3, self.head_dim).movedim(3, 0).reshape(3, B, T, D)"),),
        "logits", FIRST,
    ),
    Mutant(
        "attention-heads-merged", "attention", "common: heads merged in the wrong order",
        "heads and channels change places before the output projection",
        (Edit(*JAX_SELF, "jnp.reshape(y_BTHd, (B, T, D))", "jnp.reshape(jnp.swapaxes(y_BTHd, 2, 3), (B, T, D))"),),
        "logits", FIRST,
    ),
    Mutant(
        "attention-heads-split", "attention", "V04",
            "projections are cut into channels by heads, not heads by channels",
        (Edit(*JAX_SELF, "v_BSKd = jnp.reshape(v, (B, T, self.kv_heads, self.head_dim))",
              "v_BSKd = jnp.swapaxes(jnp.reshape(v, (B, T, self.head_dim, self.kv_heads)), 2, 3)"),), "logits", FIRST,
    ),
    Mutant(
        "attention-shift-none", "attention", "common: softmax without its shift",
            "softmax is not shifted by the largest score",
        (Edit(*SOFTMAX, "jnp.exp(scores - jnp.where(top == -math.inf, 0.0, top))", "jnp.exp(scores)"),), "logits",
        equivalent="the shift cancels, as long as exp does not overflow: in float64 not below a score of 709",
    ),
    Mutant(
        "attention-top-gradient", "attention", "G08", "the largest score is not kept out of the gradient",
        (Edit(*SOFTMAX, "top = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))",
              "top = jnp.max(scores, axis=-1, keepdims=True)"),), "gradients",
        equivalent="the shift cancels, so its gradient does",
    ),
)  # fmt: skip
