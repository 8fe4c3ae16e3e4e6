"""Gradient conventions: what stops, what adds up, what is divided."""

from __future__ import annotations

from parity.mutants.mutant import Edit, Mutant

__all__ = ["MUTANTS"]

TORCH, JAX = "omni_torch.autodiff", "omni_jax.autodiff"

MUTANTS = (
    Mutant("gradients-target-open", "gradients", "G08", "the target is not detached",
           (Edit(TORCH, "grad_with_stopped_target", "(leaf * leaf).detach()", "(leaf * leaf)"), ), "autodiff",
               "stopped_target"),
    Mutant("gradients-all-stopped", "gradients", "G08", "half of the gradient is stopped: x is detached in x·x",
           (Edit(TORCH, "_sum_of_squares", "(x * x).sum()", "(x * x.detach()).sum()"),), "autodiff", "Σ x²|target"),
    Mutant("gradients-accumulated", "gradients", "common: .grad accumulates", "every gradient is there twice",
           (Edit(TORCH, "_gradient", "else leaf.grad", "else 2 * leaf.grad"),), "autodiff", ""),
    Mutant("gradients-per-example-mean", "gradients", "O10", "per-example gradients of the mean, not of each loss",
           (Edit(TORCH, "per_example_grads", "losses_N.sum()", "losses_N.mean()"),), "autodiff", "per_example"),
    Mutant("gradients-residual-cut", "gradients", "G08", "attention's branch has no gradient",
           (Edit("omni_jax.thinker", "Block.__call__", 'checkpoint_name(y_BTD, f"{self.name}.attn")',
                 'jax.lax.stop_gradient(checkpoint_name(y_BTD, f"{self.name}.attn"))'), ), "gradients",
                     r"blocks\.[13]\.attn"),
    Mutant("gradients-norm-cut", "gradients", "G08", "the norm's statistics have no gradient",
           (Edit("omni_torch.layers", "RMSNorm.forward", "x_wide * rms *", "x_wide * rms.detach() *"),), "gradients",
           r"blocks\.[13]\.mlp"),
    Mutant("gradients-rope-cut", "gradients", "G08", "keys hand no gradient back through RoPE",
           (Edit("omni_torch.attention", "CausalSelfAttention.forward",
                 "k_BSKd = apply_rope(k.reshape(", "k_BSKd = apply_rope(k.detach().reshape("), ), "gradients",
                     r"blocks\.[13]\.attn"),
    Mutant("gradients-relu-half", "gradients", "G02", "what is masked hands back half a gradient",
           (Edit("omni_jax.attention", "_softmax", "unnormalised / jnp.where(total == 0.0, 1.0, total)",
                 "unnormalised / jnp.where(total == 0.0, 1.0, 0.5 * (total + jax.lax.stop_gradient(total)))"), ),
                     "gradients",
           r"blocks\.[13]\.attn"),
    Mutant("gradients-batch-divided", "gradients", "X09", "gradients are divided by the number of rows once more",
           (Edit("omni_jax.losses", "cross_entropy", "return jnp.sum(nats) /",
                 "few = nats / nats.shape[0]; nats = few + lax.stop_gradient(nats - few); return jnp.sum(nats) /"),),
           "gradients", "lm_head"),
)  # fmt: skip
