"""First weights: laws, fans, keys."""

from __future__ import annotations

from parity.mutants.mutant import Edit, Mutant

__all__ = ["MUTANTS"]


def _mutant(name: str, report: str, what: str, *edits: Edit, where: str = "", needs: str = "") -> Mutant:
    return Mutant(
        f"init-{name}", "init", report, what, edits, "initializers", where, {"precisions": ("float32",)}, needs
    )


MUTANTS = (
    _mutant("linear-lecun", "I01", "torch's Linear is √3 times too wide: the standard deviation of flax's default",
            Edit("omni_torch.init", "linear_default_", "1.0 / math.sqrt(fan_in)", "math.sqrt(3.0 / fan_in)")),
    _mutant("linear-lecun-jax", "I01", "JAX's Linear is √3 times too wide: the standard deviation of flax's default",
            Edit("omni_jax.init", "linear_default", "1.0 / math.sqrt(fan_in)", "math.sqrt(3.0 / fan_in)")),
    _mutant("bias-zero", "I01", "biases start at 0, flax's default",
            Edit("omni_jax.init", "bias_default", "return _uniform(key, shape, dtype, bound)",
                "return jnp.zeros(shape, dtype)")),
    _mutant("embedding-narrow", "I02", "embeddings have standard deviation 1/√D, flax's default",
            Edit("omni_jax.init", "embedding_default", "_wide(dtype)).astype(dtype)",
                 "_wide(dtype)).astype(dtype) / math.sqrt(shape[-1])")),
    _mutant("embedding-truncated", "I03", "embeddings are drawn truncated at two standard deviations",
            Edit("omni_jax.init", "embedding_default", "jax.random.normal(key, tuple(shape), _wide(dtype))",
                 "jax.random.truncated_normal(key, -2.0, 2.0, tuple(shape), _wide(dtype))")),
    _mutant("fans-swapped", "I04", "fan_in counts the outputs",
            Edit("omni_torch.init", "linear_default_", "fan_in, _ = fan_in_fan_out(weight)",
                "_, fan_in = fan_in_fan_out(weight)")),
    _mutant("fans-first-axis", "I04", "fan_in is the first axis of a kernel, torch's place for outputs",
            Edit("omni_jax.init", "linear_default", "fan_in, _ = _fans(shape)", "_, fan_in = _fans(shape)")),
    _mutant("xavier-three", "common: Kaiming's 3 for Xavier's 6", "Xavier's bound has a 3 where a 6 belongs",
            Edit("omni_jax.init", "xavier_uniform", "math.sqrt(6.0 / fans)", "math.sqrt(3.0 / fans)")),
    _mutant("kaiming-gain", "common: the gain is forgotten", "Kaiming for relu without its gain",
            Edit("omni_torch.init", "kaiming_uniform_", "gain = _gain(nonlinearity)", "gain = 1.0")),
    _mutant("uniform-one-sided", "common: U(0, b)", "uniform weights are not centred",
            Edit("omni_torch.init", "_uniform_", "x.uniform_(-bound, bound, generator=generator)",
                 "x.uniform_(0.0, 2.0 * bound, generator=generator)", 1)),
    _mutant("one-key", "I06", "every tensor is drawn with one key: layers are copies of each other",
            Edit("omni_jax.thinker", "_draw", "wide = np.float64 if leaf",
                "host = np.random.default_rng(7); wide = np.float64 if leaf"), where="model"),
    _mutant("float32-widened", "common: the dtype of a draw", "float64 weights are drawn in float32",
            Edit("omni_jax.init", "_uniform", "_wide(dtype)", "jnp.float32"), where="float64"),
    _mutant("wider", "I03", "2 % too wide",
            Edit("omni_torch.init", "xavier_uniform_", "gain * math.sqrt(6.0 / fans)",
                "1.02 * gain * math.sqrt(6.0 / fans)")),
)  # fmt: skip
