"""Norms: eps, statistics, scales."""

from __future__ import annotations

from parity.mutants.mutant import Edit, Mutant

__all__ = ["MUTANTS"]

TORCH, JAX = ("omni_torch.layers", "RMSNorm.forward"), ("omni_jax.layers", "RMSNorm.__call__")
FIRST = r"^blocks\.0\.attn$"

MUTANTS = (
    Mutant(
        "norm-eps-torch", "norm", "N01", "eps 1e-6 where 1e-5 is meant",
        (Edit(*TORCH, "+ self.eps", "+ 1e-6"),), "logits", FIRST,
    ),
    Mutant(
        "norm-eps-jax", "norm", "N01", "eps 1e-6 where 1e-5 is meant",
        (Edit(*JAX, "+ self.epsilon", "+ 1e-6"),), "logits", FIRST,
    ),
    Mutant(
        "norm-eps-finfo", "norm", "N02", "eps is the dtype's machine epsilon, torch.nn.RMSNorm's default",
        (Edit(*TORCH, "+ self.eps", "+ torch.finfo(wide).eps"),), "logits", FIRST,
    ),
    Mutant(
        "norm-eps-outside", "norm", "N03", "eps is added outside the square root",
        (Edit(*TORCH, "torch.rsqrt(x_wide.square().mean(dim=-1, keepdim=True) + self.eps)",
              "1.0 / (x_wide.square().mean(dim=-1, keepdim=True).sqrt() + self.eps)"),), "logits", FIRST,
    ),
    Mutant(
        "norm-eps-positional", "norm", "N04", "the width is taken for epsilon, as flax's first positional field was",
        (Edit(*JAX, "+ self.epsilon", "+ float(x.shape[-1])"),), "logits", FIRST,
    ),
    Mutant(
        "norm-mean-subtracted", "norm", "common: LayerNorm for RMSNorm", "the mean is taken off first",
        (Edit(*TORCH, "x_wide = x.to(wide)", "x_wide = x.to(wide); x_wide = x_wide - x_wide.mean(-1, keepdim=True)"),),
        "logits", FIRST,
    ),
    Mutant(
        "norm-scale-rounded", "norm", "N07", "the normalised value is rounded to bfloat16 before the scale",
        (Edit(*TORCH, "(x_wide * rms * self", "((x_wide * rms).to(torch.bfloat16).to(wide) * self"),), "logits", FIRST,
    ),
    Mutant(
        "norm-in-place", "norm", "N08", "x is divided in place, so that the residual stream is overwritten",
        (Edit(*TORCH, "return (x_wide * rms * self.weight.to(wide)).to(x.dtype)",
              "x_wide.data.mul_(rms.data); return (x_wide * self.weight.to(wide)).to(x.dtype)"), ), "logits",
                  r"^tok_emb$",
    ),
    Mutant(
        "norm-unbiased", "norm", "N09", "the mean square is divided by D - 1, as torch.var does",
        (Edit(*TORCH, "x_wide.square().mean(dim=-1, keepdim=True)",
              "x_wide.square().sum(dim=-1, keepdim=True) / (x.shape[-1] - 1)"),), "logits", FIRST,
    ),
    Mutant(
        "norm-scale-missing", "norm", "N10", "scales are never loaded: all ones",
        (Edit(*TORCH, "self.weight.to(wide)", "torch.ones_like(self.weight, dtype=wide)"),), "logits", FIRST,
        needs="weights whose norm scales are not 1: a fresh model hides it",
    ),
    Mutant(
        "norm-scale-plus-one", "norm", "N07", "1 + scale, Gemma's convention, on a scale stored as itself",
        (Edit(*JAX, "scale_wide = jnp.reshape(scale.astype(wide)", "scale_wide = 1.0 + jnp.reshape(scale.astype(wide)"),
            ),
        "logits", FIRST,
    ),
    Mutant(
        "norm-second-shared", "norm", "common: one norm used twice", "the feed-forward branch goes through norm1",
        (Edit("omni_torch.thinker", "Block.forward", "feed_forward(self.norm2(x_BTD))",
            "feed_forward(self.norm1(x_BTD))"), ),
        "logits", r"^blocks\.0\.mlp$", needs="norm scales that differ",
    ),
    Mutant(
        "norm-post", "norm", "common: post-norm for pre-norm", "the branch is normed behind attention, not before",
        (Edit("omni_torch.thinker", "Block.forward", "self.attn(self.norm1(x_BTD), cos_BTC, sin_BTC, mask_BTS, cache)",
              "self.norm1(self.attn(x_BTD, cos_BTC, sin_BTC, mask_BTS, cache))"),), "logits", FIRST,
    ),
    Mutant(
        "norm-fast-variance", "norm", "N05", "LayerNorm's variance as E[x²] − E[x]², flax's default",
        (Edit("omni_jax.vision_encoder", "_LayerNorm.__call__",
              "spread = lax.rsqrt(jnp.mean(jnp.square(x_wide), axis=-1, keepdims=True) + self.epsilon)",
              "raw = x.astype(wide); spread = lax.rsqrt(jnp.mean(jnp.square(raw), axis=-1, keepdims=True)"
              " - jnp.square(jnp.mean(raw, axis=-1, keepdims=True)) + self.epsilon)"),), "vision-encoder", "self_attn",
        {"precisions": ("float32",)}, needs="activations with an offset, in float32",
    ),
    Mutant(
        "norm-layernorm-eps", "norm", "N01", "LayerNorm's eps 1e-6, flax's default, where torch has 1e-5",
        (Edit("omni_jax.vision_encoder", "_LayerNorm.__call__", "+ self.epsilon", "+ 1e-6"), ), "vision-encoder",
            "self_attn",
    ),
)  # fmt: skip
