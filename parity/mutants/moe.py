"""Mixtures of experts: router, weights, ties."""

from __future__ import annotations

from parity.mutants.mutant import Edit, Mutant

__all__ = ["MUTANTS"]

FIRST = r"^blocks\.0\.moe$"
TORCH, JAX = ("omni_torch.layers", "MoE.forward"), ("omni_jax.layers", "MoE.__call__")
MOE = {"configs": ("moe",)}

MUTANTS = (
    Mutant(
        "moe-not-renormalised", "moe", "M05", "the chosen weights are not divided by their sum",
        (Edit(*TORCH, "weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-8)", "pass"),), "logits", FIRST, MOE,
    ),
    Mutant(
        "moe-softmax-after", "moe", "M05", "softmax over the chosen experts alone: the same but for the 1e-8",
        (Edit(*JAX, "weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-8)",
              "weights = weights / jnp.sum(weights, axis=-1, keepdims=True)"),), "logits", FIRST, MOE,
    ),
    Mutant(
        "moe-worst", "moe", "common: ascending order", "the least likely experts are chosen",
        (Edit(*TORCH, "descending=True", "descending=False"),), "logits", FIRST, MOE,
    ),
    Mutant(
        "moe-one-fewer", "moe", "common: off by one in k", "one expert fewer is chosen",
        (Edit(*JAX, "lax.top_k(p_BTE, self.num_experts_per_tok)", "lax.top_k(p_BTE, self.num_experts_per_tok - 1)"),),
        "logits", FIRST, MOE,
    ),
    Mutant(
        "moe-last-expert-lost", "moe", "common: off by one over experts", "the last expert never runs",
        (Edit(*TORCH, "enumerate(self.experts)", "list(enumerate(self.experts))[:-1]"),), "logits", FIRST, MOE,
    ),
    Mutant(
        "moe-first-weight", "moe", "common: slot for weight", "every chosen expert gets the first one's weight",
        (Edit(*TORCH, "weights[rows, slots, None]", "weights[rows, torch.zeros_like(slots), None]"), ), "logits", FIRST,
            MOE,
    ),
    Mutant(
        "moe-router-detached", "moe", "M05", "no gradient reaches the router",
        (Edit(*JAX, "jnp.where(hit, weights, 0.0)", "jnp.where(hit, lax.stop_gradient(weights), 0.0)"),), "gradients",
        "router", MOE,
    ),
    Mutant(
        "moe-router-bfloat16", "moe", "A11", "the router's probabilities are rounded to bfloat16",
        (Edit(*TORCH, "self.router.weight.to(wide)), dim=-1)",
            "self.router.weight.to(wide)), dim=-1).bfloat16().to(wide)"), ),
        "logits", FIRST, MOE,
    ),
    Mutant(
        "moe-tie-order", "moe", "M08", "of equal experts the highest index wins",
        (Edit(*TORCH, "torch.sort(p_NE, dim=-1, descending=True, stable=True)",
              "(lambda s: (s.values, p_NE.shape[1] - 1 - s.indices))(torch.sort(p_NE.flip(-1), dim=-1,"
              " descending=True, stable=True))"), ),
        "logits", "tied experts", MOE, needs="tokens whose experts are tied",
    ),
)  # fmt: skip
