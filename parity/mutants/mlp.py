"""Feed-forward layers: activations, gates, biases."""

from __future__ import annotations

from parity.mutants.mutant import Edit, Mutant

__all__ = ["MUTANTS"]

FIRST = r"^blocks\.0\.mlp$"
SWIGLU, JAX_SWIGLU = ("omni_torch.layers", "SwiGLU.forward"), ("omni_jax.layers", "SwiGLU.__call__")
GELU, JAX_GELU = ("omni_torch.layers", "GELUMLP.forward"), ("omni_jax.layers", "GELUMLP.__call__")
PLAIN = {"configs": ("mha-gelu",)}

MUTANTS = (
    Mutant(
        "mlp-gelu-tanh", "mlp", "M01", "the tanh form of GELU, jax.nn.gelu's default",
        (Edit(*JAX_GELU, "0.5 * h * (1.0 + jax.lax.erf(h * (0.5**0.5)))",
              "0.5 * h * (1.0 + jnp.tanh(0.7978845608028654 * (h + 0.044715 * h * h * h)))"),), "logits", FIRST, PLAIN,
    ),
    Mutant(
        "mlp-gelu-tanh-torch", "mlp", "M01", 'approximate="tanh"',
        (Edit(*GELU, 'approximate="none"', 'approximate="tanh"'),), "logits", FIRST, PLAIN,
    ),
    Mutant(
        "mlp-gelu-quick", "mlp", "M02", "x·sigmoid(1.702 x) for GELU",
        (Edit(*GELU, 'F.gelu(self.fc1(x), approximate="none")',
            "(lambda h: h * torch.sigmoid(1.702 * h))(self.fc1(x))"), ),
        "logits", FIRST, PLAIN,
    ),
    Mutant(
        "mlp-gelu-root", "mlp", "common: erf without the root", "erf(x / 2), not erf(x / √2)",
        (Edit(*JAX_GELU, "(0.5**0.5)", "0.5"),), "logits", FIRST, PLAIN,
    ),
    Mutant(
        "mlp-gate-up", "mlp", "M03", "gate and up change places",
        (Edit(*JAX_SWIGLU, "jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)",
              "jax.nn.silu(self.up_proj(x)) * self.gate_proj(x)"),), "logits", FIRST,
    ),
    Mutant(
        "mlp-gelu-for-silu", "mlp", "M01", "GELU (tanh) where SiLU belongs: GeGLU for SwiGLU",
        (Edit(*SWIGLU, "F.silu(self.gate_proj(x))", 'F.gelu(self.gate_proj(x), approximate="tanh")'),), "logits", FIRST,
    ),
    Mutant(
        "mlp-sigmoid-clipped", "mlp", "common: a sigmoid clipped for safety", "the gate's sigmoid is clipped at ±6",
        (Edit(*SWIGLU, "F.silu(self.gate_proj(x))", "(lambda g: g * torch.sigmoid(g.clamp(-6, 6)))(self.gate_proj(x))"),
            ),
        "logits", FIRST, needs="gates beyond ±6",
    ),
    Mutant(
        "mlp-bias-missing", "mlp", "W01", "the first bias is never added",
        (Edit(*GELU, "self.fc1(x)", "F.linear(x, self.fc1.weight)"), ), "logits", FIRST, PLAIN,
            needs="biases that are not 0",
    ),
    Mutant(
        "mlp-relu-for-silu", "mlp", "M02", "ReLU where SiLU belongs",
        (Edit(*JAX_SWIGLU, "jax.nn.silu(", "jnp.maximum(0.0, "),), "logits", FIRST,
    ),
)  # fmt: skip
