"""Precision: what is rounded on the way, and where."""

from __future__ import annotations

from parity.mutants.mutant import Edit, Mutant

__all__ = ["MUTANTS"]

FIRST = r"^blocks\.0\.attn$"

MUTANTS = (
    Mutant("dtype-norm-float32", "dtype", "D03", "the norm always computes in float32",
           (Edit("omni_torch.layers", "RMSNorm.forward", "wide = statistics_dtype(x.dtype)", "wide = torch.float32"),),
           "logits", FIRST),
    Mutant("dtype-loss-float32", "dtype", "D03", "the loss always computes in float32",
           (Edit("omni_torch.losses", "cross_entropy", "logits.to(statistics_dtype(logits.dtype))",
                 "logits.float().to(logits.dtype)"),), "gradients", "^loss$"),
    Mutant("dtype-attention-tf32", "dtype", "D01", "queries and keys are rounded to 10 bits, as TF32 does",
           (Edit("omni_torch.attention", "_attend_fused", "q_BTHd.transpose(1, 2),",
               "q_BTHd.half().to(q_BTHd.dtype).transpose(1, 2),"), ),
           "logits", FIRST),
    Mutant("dtype-head-bfloat16", "dtype", "D02", "the head multiplies in bfloat16",
           (Edit("omni_torch.thinker", "ThinkerLM.forward", "self.lm_head(self.norm(x_BTD))",
                 "self.lm_head(self.norm(x_BTD).bfloat16().to(x_BTD.dtype))"),), "logits", "^logits$"),
    Mutant("dtype-values-bfloat16", "dtype", "D05", "values are stored in bfloat16",
           (Edit("omni_torch.attention", "CausalSelfAttention.forward", "v_BSKd = v.reshape(",
               "v_BSKd = v.bfloat16().to(v.dtype).reshape("), ),
           "logits", FIRST),
    Mutant("dtype-statistics-narrow", "dtype", "A11", "norms, softmax and angles in bfloat16 where the parameters are",
           (Edit("omni_torch.layers", "statistics_dtype", "torch.promote_types(dtype, torch.float32)", "dtype"), ),
               "logits", "rounds once|in float32",
           {"precisions": ("bfloat16",), "regimes": ("randomised",)}, needs="a run in bfloat16"),
    Mutant("dtype-norm-late-cast", "dtype", "N07", "the scale is applied after the cast to bfloat16",
           (Edit("omni_torch.layers", "RMSNorm.forward", "(x_wide * rms * self.weight.to(wide)).to(x.dtype)",
                 "(x_wide * rms).to(x.dtype) * self.weight"), ), "logits", "rounds once",
           {"precisions": ("bfloat16",)}, needs="a run in bfloat16"),
    Mutant("dtype-cache-half", "dtype", "D05", "the cache keeps float16",
           (Edit("omni_torch.cache", "_CachedCall._write", "= new_BT.detach()",
                 "= new_BT.detach().half() if new_BT.is_floating_point() else new_BT"),), "decode", "logits"),
)  # fmt: skip
