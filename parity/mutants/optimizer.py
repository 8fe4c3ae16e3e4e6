"""AdamW: moments, corrections, decay."""

from __future__ import annotations

from typing import Any

from parity.mutants.mutant import Edit, Mutant

__all__ = ["MUTANTS"]

TORCH, JAX = ("omni_torch.optim", "_update_"), ("omni_jax.optim", "_update")


def _mutant(
    name: str,
    report: str,
    what: str,
    *edits: Edit,
    where: str = "",
    needs: str = "",
    check: str = "adamw",
    **scope: Any,
) -> Mutant:
    return Mutant(f"optimizer-{name}", "optimizer", report, what, edits, check, where, scope, needs)


MUTANTS = (
    _mutant("eps-inside", "O01", "eps stands under the root",
            Edit(*TORCH, ".sqrt_().add_(eps)", ".add_(eps).sqrt_()"), where="displacement", needs="tiny gradients"),
    _mutant("eps-inside-jax", "O01", "eps stands under the root",
            Edit(*JAX, "(jnp.sqrt(v / correction2) + tiny)", "jnp.sqrt(v / correction2 + tiny)"), where="displacement"),
    _mutant("eps-uncorrected", "O01", "eps is added before the correction of the second moment",
            Edit(*JAX, "(jnp.sqrt(v / correction2) + tiny)", "((jnp.sqrt(v) + tiny) / jnp.sqrt(correction2))"),
            where="displacement", needs="tiny gradients"),
    _mutant("late", "O03", "corrections count the steps made before (at least one)",
            Edit(*TORCH, "t = state.t + 1", "t = max(state.t, 1)"), Edit(*TORCH, "state.t = t\n",
                "state.t = state.t + 1\n"),
            where="displacement", needs="more than one step"),
    _mutant("ahead", "O03", "corrections are one step ahead",
            Edit(*JAX, "_bias_correction(beta1, t, wide), _bias_correction(beta2, t, wide)",
                 "_bias_correction(beta1, t + 1, wide), _bias_correction(beta2, t + 1, wide)"), where="displacement"),
    _mutant("uncorrected", "O03", "the second moment is not corrected",
            Edit(*TORCH, "v.div(_bias_correction(beta2, t))", "v.clone()"), where="displacement"),
    _mutant("coupled", "O04", "decay is added to the gradient",
            Edit(*TORCH, "grad.to(wide), state.m", "grad.to(wide) + weight_decay * p.to(wide), state.m"),
            Edit(*TORCH, ".add_(x, alpha=weight_decay)", ""), where="displacement|: m|: v"),
    _mutant("decay-default", "O05", "decay 1e-4, optax's default, whatever is asked for",
            Edit(*JAX, "for x in (lr, eps, weight_decay)", "for x in (lr, eps, 1e-4)"), where="displacement"),
    _mutant("decay-unscaled", "O04", "decay is not multiplied by the learning rate",
            Edit(*TORCH, ".add_(x, alpha=weight_decay)", ".add_(x, alpha=weight_decay / lr)"), where="displacement"),
    _mutant("decay-after", "O14", "decay takes the parameter after its update",
            Edit(*JAX, "p = p - rate * direction", "p = p - rate * (direction - decay * p); p = p - rate * decay * p"),
            where="displacement"),
    _mutant("beta2", "O08", "beta2 0.99 where 0.999 is asked for",
            Edit(*TORCH, "beta1, beta2 = betas", "beta1, beta2 = betas[0], 0.99"), where=": v|displacement"),
    _mutant("betas-swapped", "O08", "the betas change places",
            Edit(*JAX, "beta1, beta2 = betas", "beta2, beta1 = betas"), where=": m|: v|displacement"),
    _mutant("ascent", "common: the sign of the update", "the update goes uphill",
            Edit(*TORCH, "x.sub_(update, alpha=lr)", "x.add_(update, alpha=lr)"), where="displacement"),
    _mutant("nothing-lost", "O12", "the new parameters are not written",
            Edit(*TORCH, "p.copy_(x)", "p.copy_(x + update * lr)"), where="displacement"),
    _mutant("moments-drift", "common: beta and 1 − beta rounded apart", "(1 − beta) is rounded to float32",
            Edit("omni_torch.optim", "_average_", "mean.lerp_(x, 1.0 - beta)",
                 "mean.mul_(beta).add_(x, alpha=float(torch.tensor(1.0 - beta, dtype=torch.float32)))"),
                     where=": m|: v|displacement"),
    _mutant("average-drift", "common: beta and 1 − beta do not add up to 1", "β·v + (1 − β)·v for moments in float32",
            Edit("omni_jax.optim", "_average", "if beta >= 0.5", "if beta > 1.0"), where="arrived",
            needs="moments that have arrived", precisions=("float32",)),
    _mutant("mask-inverted", "O07", "vectors decay, matrices do not",
            Edit("omni_torch.optim", "decay_mask", "p.ndim >= 2", "p.ndim < 2"), check="recipe"),
    _mutant("mask-frozen", "O11", "what decay spares is decayed too",
            Edit("omni_jax.optim", "decay_mask", "jnp.ndim(p) >= 2", "True"), check="recipe"),
)  # fmt: skip
