"""Batches, padding, accumulation."""

from __future__ import annotations

from parity.mutants.mutant import Edit, Mutant

__all__ = ["MUTANTS"]

TORCH, JAX = "omni_torch.data", "omni_jax.data"


def _mutant(
    name: str, report: str, what: str, *edits: Edit, check: str = "data", needs: str = "", where: str = ""
) -> Mutant:
    return Mutant(f"data-{name}", "data", report, what, edits, check, where, {}, needs)


MUTANTS = (
    _mutant("targets-unshifted", "X01", "every position is asked for its own token",
            Edit(TORCH, "NextTokenDataset.__getitem__", "row[1:]", "row[:-1]")),
    _mutant("targets-shifted-twice", "X01", "targets are two places on",
            Edit(TORCH, "NextTokenDataset.__getitem__", "row[:-1], row[1:]", "row[:-1], row[1:].roll(-1)")),
    _mutant("mask-inverted", "A06", "attention_mask marks the padding",
            Edit(TORCH, "collate_next_token_batch", '"attention_mask": ~inputs', '"attention_mask": inputs')),
    _mutant("mask-from-values", "X06", "a token equal to pad_value is padding",
            Edit(TORCH, "pad_1d_sequences",
                "padding_mask = torch.arange(tokens.shape[1], device=device) >= lengths_B[:, None]",
                 "padding_mask = tokens == pad"), needs="a token that equals pad_value"),
    _mutant("pad-left", "common: left for right", "sequences are padded in front",
            Edit(TORCH, "pad_1d_sequences", "row[: len(seq)] = seq", "row[len(row) - len(seq) :] = seq")),
    _mutant("step-ignored", "R03", "the batch does not depend on the step",
            Edit(TORCH, "token_batch", "seed=seed, step=step)", "seed=seed, step=0)")),
    _mutant("last-start-lost", "common: off by one in the starts", "the last place where a row could begin is left out",
            Edit(TORCH, "token_batch", "ids[: last + 1] == BOS_ID", "ids[:last] == BOS_ID"),
                needs="a document that just fills a row"),
    _mutant("epoch-ignored", "R03", "every epoch has the first one's order",
            Edit(TORCH, "epoch_order", "seed=seed, epoch=epoch)", "seed=seed, epoch=0)")),
    _mutant("crop-last-lost", "common: off by one in the crops", "a crop never begins at the last place",
            Edit(TORCH, "RandomCropSequenceDataset.__getitem__", "room = self.tokens.shape[1] - self.crop_len + 1",
                "room = max(self.tokens.shape[1] - self.crop_len, 1)")),
    _mutant("index-wraps", "common: an index from the end", "item −1 is the first one",
            Edit(TORCH, "_position", "return i % n", "return max(i, 0) % n"), needs="an index from the end"),
    _mutant("bos-lost", "T02", "documents begin without BOS",
            Edit(TORCH, "token_stream", "parts += [bos, _ids", "parts += [_ids")),
    _mutant("sum-not-mean", "O09", "accumulated gradients are not divided",
            Edit("omni_torch.training", "accumulated_gradients", "total += gradient", "total += 4 * gradient"),
            check="accumulation"),
    _mutant("mean-of-means", "O10", "micro-batches count alike, whatever their tokens",
            Edit("omni_jax.training", "accumulated_gradients",
                "micro = (nats.astype(wide), jnp.asarray(count, jnp.int32), gradients)",
                 "one = jnp.maximum(count, 1); micro = (nats.astype(wide) / one.astype(wide), jnp.ones((), jnp.int32),"
                 " jax.tree.map(lambda g: g / one.astype(g.dtype), gradients))"), check="accumulation",
                     needs="unequal micro-batches"),
    _mutant("last-micro-lost", "common: off by one over micro-batches", "the last micro-batch is left out",
            Edit("omni_torch.training", "accumulated_gradients", "for batch in batches:",
                "for batch in list(batches)[:-1]:"),
            check="accumulation"),
)  # fmt: skip
