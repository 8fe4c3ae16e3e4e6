"""Cross-entropy and what is counted."""

from __future__ import annotations

from parity.mutants.mutant import Edit, Mutant

__all__ = ["MUTANTS"]

TORCH, JAX = ("omni_torch.losses", "cross_entropy"), ("omni_jax.losses", "cross_entropy")
LOSS = r"^loss$"

MUTANTS = (
    Mutant("loss-pad-counted", "loss", "X04", "PAD is a target like others",
           (Edit(*TORCH, "ignore_index=ignore_index, reduction", "ignore_index=-100, reduction"),), "gradients", LOSS),
    Mutant("loss-mean-over-all", "loss", "X04", "the mean is over all targets, ignored ones too",
           (Edit(*TORCH, "keep.sum().clamp(min=1)", "keep.numel()"),), "gradients", LOSS),
    Mutant("loss-sum", "loss", "O09", "a sum, not a mean",
           (Edit(*JAX, "jnp.sum(nats) / jnp.maximum(jnp.sum(keep, dtype=jnp.int32), 1).astype(wide.dtype)",
               "jnp.sum(nats)"), ),
           "gradients", LOSS),
    Mutant("loss-mean-of-rows", "loss", "X03", "a mean of the rows' means, which have unequal numbers of targets",
           (Edit(*JAX, "jnp.sum(nats) / jnp.maximum(jnp.sum(keep, dtype=jnp.int32), 1).astype(wide.dtype)",
                 "jnp.sum(jnp.sum(nats, axis=-1) / jnp.maximum(jnp.sum(keep, axis=-1, dtype=jnp.int32),"
                 " 1).astype(wide.dtype))"
                 " / nats.shape[0]"),), "gradients", LOSS, needs="rows of unequal length"),
    Mutant("loss-shifted-twice", "loss", "X01", "logits are moved one place on once more",
           (Edit(*TORCH, "wide = logits.to(statistics_dtype(logits.dtype)).reshape",
                 "wide = logits.roll(1, -2).to(statistics_dtype(logits.dtype)).reshape"),), "gradients", LOSS),
    Mutant("loss-bfloat16", "loss", "X07", "logits are rounded to bfloat16 first",
           (Edit(*TORCH, "logits.to(statistics_dtype(logits.dtype))",
               "logits.bfloat16().to(statistics_dtype(logits.dtype))"), ),
           "gradients", LOSS),
    Mutant("loss-smoothing", "loss", "X08", "label smoothing of 0.1 that nobody asked for",
           (Edit(*TORCH, 'reduction="sum"', 'reduction="sum", label_smoothing=0.1'),), "gradients", LOSS),
    Mutant("loss-two-logits", "loss", "common: bits for nats", "logarithms to the base 2",
           (Edit(*JAX, "logsumexp - picked", "(logsumexp - picked) / 0.6931471805599453"),), "gradients", LOSS),
    Mutant("loss-empty-nan", "loss", "X05", "a batch without any target gives 0 / 0",
           (Edit("omni_torch.training", "accumulated_gradients", "tokens.clamp(min=1)", "tokens"), ), "accumulation",
               "loss and gradients", needs="a batch without targets"),
    Mutant("loss-top-shift", "loss", "common: logsumexp without its shift put back",
        "the largest logit is not added back",
           (Edit(*JAX, " + jnp.squeeze(top, axis=-1)", ""),), "gradients", LOSS),
    Mutant("loss-zero-ignored", "loss", "X06", "EOS is ignored as PAD is",
           (Edit(*JAX, "keep = targets != ignore_index", "keep = (targets != ignore_index) & (targets != 2)"),),
           "gradients", LOSS, needs="EOS among the targets"),
)  # fmt: skip
