"""Dropout: places, scales, masks."""

from __future__ import annotations

from parity.mutants.mutant import Edit, Mutant

__all__ = ["MUTANTS"]

BLOCK = ("omni_torch.thinker", "Block.forward")
JAX_BLOCK = ("omni_jax.thinker", "Block.__call__")

MUTANTS = (
    Mutant("dropout-attention-none", "dropout", "R01", "attention's probabilities are never dropped",
           (Edit("omni_torch.attention", "attend", "p_BKGTS = dropout(p_BKGTS)", "pass"),), "dropout"),
    Mutant("dropout-residual-none", "dropout", "R01", "attention's branch is not dropped",
           (Edit(*BLOCK, "self.drop(self.attn(self.norm1(x_BTD), cos_BTC, sin_BTC, mask_BTS, cache))",
                 "self.attn(self.norm1(x_BTD), cos_BTC, sin_BTC, mask_BTS, cache)"),), "dropout"),
    Mutant("dropout-stream", "dropout", "common: dropped after the sum", "the whole residual stream is dropped",
           (Edit(*BLOCK, "return x_BTD + self.drop(feed_forward(self.norm2(x_BTD)))",
                 "return self.drop(x_BTD + feed_forward(self.norm2(x_BTD)))"),), "dropout"),
    Mutant("dropout-evaluation", "dropout", "R01", "attention drops in evaluation too",
           (Edit("omni_torch.attention", "_attend_fused", "dropout_p=0.0", "dropout_p=0.1"),), "dropout"),
    Mutant("dropout-before-softmax", "dropout", "common: scores dropped", "scores are dropped, not probabilities",
           (Edit("omni_torch.attention", "attend", "scores = scores.masked_fill(",
                 "scores = (scores if dropout is None else dropout(scores)).masked_fill("),
            Edit("omni_torch.attention", "attend", "p_BKGTS = dropout(p_BKGTS)", "pass")), "dropout"),
    Mutant("dropout-renormalised", "dropout", "R05", "probabilities are made to sum to 1 again after dropping",
           (Edit("omni_jax.attention", "attend", "p_BKGTS = dropout(p_BKGTS)",
                 "p_BKGTS = dropout(p_BKGTS); p_BKGTS = p_BKGTS / (jnp.sum(p_BKGTS, axis=-1, keepdims=True) + 1e-9)"),
                     ), "dropout"),
    Mutant("dropout-before", "dropout", "common: dropped in front of the branch",
        "the feed-forward branch drops its input",
           (Edit(*JAX_BLOCK, 'self.drop(checkpoint_name(y_BTD, f"{self.name}.{branch}"))',
                 'checkpoint_name(y_BTD, f"{self.name}.{branch}")'),
            Edit(*JAX_BLOCK, "feed_forward(self.norm2(x_BTD))", "feed_forward(self.drop(self.norm2(x_BTD)))")),
                "dropout"),
    Mutant("dropout-half-scale", "dropout", "R05", "what is kept is scaled once too often in the gradient",
           (Edit("omni_torch.attention", "attend", "p_BKGTS = dropout(p_BKGTS)",
                 "p_BKGTS = (lambda y: y.detach() + 0.75 * (y - y.detach()))(dropout(p_BKGTS))"), ), "dropout",
                     "gradient"),
)  # fmt: skip
