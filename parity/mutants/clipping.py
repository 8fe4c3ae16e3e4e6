"""Clipping by the global norm."""

from __future__ import annotations

from parity.mutants.mutant import Edit, Mutant

__all__ = ["MUTANTS"]

TORCH, JAX = ("omni_torch.optim", "clip_grad_norm_"), ("omni_jax.optim", "clip_grad_norm")
NORM, JAX_NORM = ("omni_torch.optim", "global_norm"), ("omni_jax.optim", "global_norm")


def _mutant(name: str, report: str, what: str, *edits: Edit, check: str = "recipe", needs: str = "") -> Mutant:
    return Mutant(f"clipping-{name}", "clipping", report, what, edits, check, "clip|norm|gradient", {}, needs)


MUTANTS = (
    _mutant("eps-missing", "C01", "optax's form: nothing is added to the norm",
            Edit(*TORCH, "(norm + _CLIP_EPS)", "norm"), needs="clipping that is active"),
    _mutant("eps-larger", "C01", "1e-5 is added to the norm",
            Edit(*JAX, "(norm + _CLIP_EPS)", "(norm + 1e-5)"), needs="clipping that is active"),
    _mutant("each-alone", "C02", "every tensor is clipped by its own norm",
            Edit(*TORCH, "g.copy_(g.to(wide).mul_(scale.to(device=g.device, dtype=wide)))",
                 "g.mul_(torch.clamp(max_norm / (global_norm([g]) + _CLIP_EPS), max=1.0).to(g.dtype))")),
    _mutant("sum-of-norms", "C02", "the norm is the sum of the tensors' norms",
            Edit(*NORM, "return torch.linalg.vector_norm(torch.stack(norms))", "return torch.stack(norms).sum()")),
    _mutant("no-root", "common: the square root is forgotten", "the norm is Σ g²",
            Edit(*JAX_NORM, "return jnp.sqrt(sum(", "return (sum(")),
    _mutant("always", "common: min(1, …) left out", "small gradients are scaled up to max_norm",
            Edit(*JAX, "jnp.minimum(max_norm / (norm + _CLIP_EPS), 1.0)", "max_norm / (norm + _CLIP_EPS)"),
            needs="a gradient below max_norm"),
    _mutant("never", "common: clipping left out", "nothing is clipped",
            Edit(*TORCH, "max=1.0)", "min=1.0, max=1.0)"), needs="clipping that is active"),
    _mutant("first-lost", "common: off by one over tensors", "the first tensor is left out of the norm",
            Edit(*NORM, "for g in grads]\n", "for g in grads[1:]]\n")),
)  # fmt: skip
