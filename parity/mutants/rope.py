"""RoPE and positions."""

from __future__ import annotations

from parity.mutants.mutant import Edit, Mutant

__all__ = ["MUTANTS"]

FIRST = r"^blocks\.0\.attn$"
ANGLES, JAX_ANGLES = ("omni_torch.layers", "rope_frequencies"), ("omni_jax.layers", "rope_frequencies")
TURN, JAX_TURN = ("omni_torch.layers", "apply_rope"), ("omni_jax.layers", "apply_rope")
POSITIONS = ("omni_torch.attention", "default_positions")
SELF = ("omni_torch.attention", "CausalSelfAttention.forward")

MUTANTS = (
    Mutant(
        "rope-interleaved", "rope", "P01", "neighbouring channels are pairs, not halves",
        (Edit(*JAX_TURN, "jnp.split(x_BTHd.astype(cos_BTC.dtype), 2, axis=-1)",
              "(x_BTHd.astype(cos_BTC.dtype)[..., 0::2], x_BTHd.astype(cos_BTC.dtype)[..., 1::2])"),), "logits", FIRST,
        needs="more than one token",
    ),
    Mutant(
        "rope-interleaved-both-ends", "rope", "P01", "neighbouring channels are pairs, and stay where they are",
        (Edit(*TURN, "x_BTHd.to(cos_BTC.dtype).chunk(2, dim=-1)",
              "(x_BTHd.to(cos_BTC.dtype)[..., 0::2], x_BTHd.to(cos_BTC.dtype)[..., 1::2])"),), "logits", FIRST,
        needs="more than one token",
    ),
    Mutant(
        "rope-sign", "rope", "P02", "turned the other way: the permutation of q and k with its halves exchanged",
        (Edit(*JAX_TURN, "second * cos + first * sin", "second * cos - first * sin"),), "logits", FIRST,
    ),
    Mutant(
        "rope-backwards", "rope", "common: the sign of the angle", "every angle is negative, for q and k alike",
        (Edit(*ANGLES, "torch.sin(angle_BTC)", "-torch.sin(angle_BTC)"),), "logits", FIRST,
    ),
    Mutant(
        "rope-theta", "rope", "P03", "theta 10001 where 10000 is meant",
        (Edit(*ANGLES, "torch.pow(rope_theta", "torch.pow(rope_theta + 1.0"),), "logits", FIRST,
    ),
    Mutant(
        "rope-theta-ignored", "rope", "P03", "theta is always 10000, whatever the configuration says",
        (Edit(*JAX_ANGLES, "jnp.asarray(rope_theta, wide)", "jnp.asarray(10000.0, wide)"),), "logits", FIRST,
        {"configs": ("mha-gelu",)}, needs="a configuration with another theta",
    ),
    Mutant(
        "rope-exponent", "rope", "P03", "the exponent counts channels by d/2, not by d",
        (Edit(*ANGLES, "/ head_dim\n", "/ (head_dim // 2)\n"),), "logits", FIRST,
    ),
    Mutant(
        "rope-query-ahead", "rope", "P04", "the query's position is one too large",
        (Edit(*SELF, "q_BTHd = apply_rope(q.reshape(B, T, self.n_heads, self.head_dim), cos_BTC, sin_BTC)",
              "q_BTHd = apply_rope(q.reshape(B, T, self.n_heads, self.head_dim), cos_BTC.roll(-1, 1),"
              " sin_BTC.roll(-1, 1))"), ),
        "logits", FIRST,
    ),
    Mutant(
        "rope-shifted", "rope", "P04", "all positions are one too large, for queries and keys alike",
        (Edit(*ANGLES, "positions[..., None]", "(positions[..., None] + 1)"),), "logits",
        "^cos", {"precisions": ("bfloat16",)}, needs="the angles by themselves: a score knows only their distance",
    ),
    Mutant(
        "rope-float32", "rope", "P06", "angles are computed in float32",
        (Edit(*ANGLES, "angle_BTC = positions[..., None].to(wide) * inv_freq_C",
              "angle_BTC = (positions[..., None].float() * inv_freq_C.float()).to(wide)"),), "logits", FIRST,
    ),
    Mutant(
        "rope-bfloat16", "rope", "P06", "cos and sin are rounded to bfloat16",
        (Edit(*ANGLES, "torch.cos(angle_BTC), torch.sin(angle_BTC)",
              "torch.cos(angle_BTC).bfloat16().to(wide), torch.sin(angle_BTC).bfloat16().to(wide)"),), "logits", FIRST,
    ),
    Mutant(
        "rope-table-end", "rope", "P03", "positions end at 4095, the length of a table",
        (Edit(*JAX_ANGLES, "positions[..., None]", "jnp.minimum(positions[..., None], 4095)"), ), "logits",
            r"far positions",
        needs="positions beyond 4,000",
    ),
    Mutant(
        "rope-int8", "rope", "P10", "positions wrap at 128: a narrow integer",
        (Edit(*ANGLES, "positions[..., None].to(wide)", "positions[..., None].to(torch.int8).to(wide)"),), "logits",
        r"far positions", needs="positions beyond 127",
    ),
    Mutant(
        "rope-padding-counted", "rope", "P09", "default positions count padding",
        (Edit(*POSITIONS, "if attention_mask is None:", "if True:"), ), "logits", r"default positions",
            needs="left padding",
    ),
    Mutant(
        "rope-offset", "rope", "P08", "positions of kept tokens begin at 1, padding at 0",
        (Edit(*POSITIONS, "(kept_BT.cumsum(dim=1) - 1).clamp(min=0)", "kept_BT.cumsum(dim=1)"),), "logits",
        equivalent="what is kept is shifted as a whole, and nobody sees what is not",
    ),
    Mutant(
        "rope-values-turned", "rope", "common: RoPE on the values as well", "values are turned too",
        (Edit(*SELF, "v_BSKd = v.reshape(B, T, self.kv_heads, self.head_dim)",
              "v_BSKd = apply_rope(v.reshape(B, T, self.kv_heads, self.head_dim), cos_BTC, sin_BTC)"), ), "logits",
                  FIRST,
    ),
)  # fmt: skip
