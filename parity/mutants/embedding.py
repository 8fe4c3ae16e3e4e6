"""Token embeddings and the head."""

from __future__ import annotations

from parity.mutants.mutant import Edit, Mutant

__all__ = ["MUTANTS"]

TORCH, JAX = ("omni_torch.layers", "TokenEmbedding.forward"), ("omni_jax.layers", "TokenEmbedding.__call__")
MODEL = ("omni_torch.thinker", "ThinkerLM.forward")
LAST = r"^logits$"

MUTANTS = (
    Mutant(
        "embedding-scaled", "embedding", "E01", "rows are multiplied by √D, as Gemma's are",
        (Edit(*TORCH, "F.embedding(tokens.long(), self.weight)",
              "F.embedding(tokens.long(), self.weight) * self.weight.shape[1] ** 0.5"),), "logits", r"^tok_emb$",
    ),
    Mutant(
        "embedding-tied", "embedding", "E02", "the head is the table of the embeddings",
        (Edit(*MODEL, "self.lm_head(self.norm(x_BTD))",
            "torch.nn.functional.linear(self.norm(x_BTD), self.tok_emb.weight)"), ),
        "logits", LAST,
    ),
    Mutant(
        "embedding-tied-gradient", "embedding", "E03", "the embeddings' gradient is counted twice",
        (Edit(*TORCH, "F.embedding(tokens.long(), self.weight)",
              "(lambda e: e + (e - e.detach()))(F.embedding(tokens.long(), self.weight))"),), "gradients", "tok_emb",
    ),
    Mutant(
        "embedding-row-on", "embedding", "P08", "every id is one too small: the table begins at 1",
        (Edit(*TORCH, "F.embedding(tokens.long(), self.weight)",
              "F.embedding((tokens.long() + 1).clamp(max=self.num_embeddings - 1), self.weight)"), ), "logits",
                  r"^tok_emb$",
    ),
    Mutant(
        "embedding-pad-frozen", "embedding", "common: padding_idx", "PAD's row has no gradient",
        (Edit(*TORCH, "F.embedding(tokens.long(), self.weight)",
            "F.embedding(tokens.long(), self.weight, padding_idx=0)"), ),
        "gradients", "tok_emb", needs="a PAD that is attended to",
    ),
    Mutant(
        "embedding-pad-zero", "embedding", "common: padding_idx", "PAD's row is zero",
        (Edit(*JAX, 'return jnp.take(table_VD, ids, axis=0, mode="fill", fill_value=jnp.nan)',
              'return jnp.take(table_VD, ids, axis=0, mode="fill", fill_value=jnp.nan) * (ids != 0)[..., None]'
              ".astype(table_VD.dtype)"),), "logits", r"^tok_emb$", needs="a PAD that is attended to",
    ),
    Mutant(
        "embedding-clamped", "embedding", "E06", "an id out of range takes the last row instead of NaN",
        (Edit(*JAX, 'mode="fill", fill_value=jnp.nan', 'mode="clip"'),), "logits", "ids out of range",
        needs="an id out of range inside jit",
    ),
    Mutant(
        "embedding-bfloat16", "embedding", "E01", "rows are rounded to bfloat16",
        (Edit(*TORCH, "F.embedding(tokens.long(), self.weight)",
              "F.embedding(tokens.long(), self.weight).bfloat16().to(self.weight.dtype)"),), "logits", r"^tok_emb$",
    ),
    Mutant(
        "embedding-last-norm", "embedding", "common: the last norm left out",
            "the head reads what no norm has been over",
        (Edit(*MODEL, "self.lm_head(self.norm(x_BTD))", "self.lm_head(x_BTD)"),), "logits", LAST,
    ),
)  # fmt: skip
