"""The KV cache: places, masks, positions."""

from __future__ import annotations

from parity.mutants.mutant import Edit, Mutant

__all__ = ["MUTANTS"]

CALL, JAX_CALL = "_CachedCall", ("omni_jax.cache", "_CachedCall.__init__")


def _mutant(
    name: str, report: str, what: str, *edits: Edit, where: str = "logits|beyond|unchanged", needs: str = ""
) -> Mutant:
    return Mutant(f"cache-{name}", "cache", report, what, edits, "decode", where, {}, needs)


def _torch(method: str, old: str, new: str) -> Edit:
    return Edit("omni_torch.cache", f"{CALL}.{method}", old, new)


def _jax(method: str, old: str, new: str) -> Edit:
    return Edit("omni_jax.cache", f"{CALL}.{method}", old, new)


MUTANTS = (
    _mutant("full-overwrites", "K01", "a full cache overwrites its last slot",
            Edit(*JAX_CALL, "self._fits = cache.length + time <= S", "self._fits = cache.length >= 0"),
                where="full cache", needs="a token beyond the last slot"),
    _mutant("padding-seen", "K02", "padding in front is seen from the second step on",
            _torch("mask", "old_BS = self._cache.kept[:, : min(length, self._slots)]",
                   "old_BS = torch.ones_like(self._cache.kept[:, : min(length, self._slots)])"), needs="left padding"),
    _mutant("mask-inverted", "K03", "stored tokens are hidden where they are to be seen",
            _torch("mask", "old_BS = self._cache.kept[:, : min(length, self._slots)]",
                   "old_BS = ~self._cache.kept[:, : min(length, self._slots)]")),
    _mutant("top-left", "A05", "a new query sees the first key alone, as is_causal aligns it",
            _torch("mask", "return torch.cat([old_BS, self._new_BT], dim=1)[:, None]",
                   "return (torch.cat([old_BS, self._new_BT], dim=1) & (torch.arange(old_BS.shape[1] + 1) < 1))[:,"
                   " None]")),
    _mutant("position-length", "P04", "positions count the slots, padding too",
            _torch("__init__", "cache.count[:, None] + counted_BT - 1", "cache.length + counted_BT - 1"),
                needs="left padding"),
    _mutant("position-ahead", "P04", "positions of new tokens are one too large after the first call",
            _torch("__init__", "cache.count[:, None] + counted_BT - 1",
                "cache.count[:, None] + counted_BT - (0 if cache.length else 1)")),
    _mutant("slot-behind", "K01", "new keys are written one slot too early",
            _torch("_write", "buffer_BS[:, self._cache.length : self._cache.length + self._time] = new_BT.detach()",
                   "at = max(self._cache.length - 1, 0); buffer_BS[:, at : at + self._time] = new_BT.detach()")),
    _mutant("count-late", "P09", "padding in a call is counted as tokens",
            _torch("finish", "cache.count += self._new_BT.sum(dim=1)", "cache.count += self._time"),
                needs="left padding"),
    _mutant("chunk-not-causal", "A04", "the tokens of one chunk see each other",
            _torch("mask", ".tril()", ""), needs="chunks of several tokens"),
    _mutant("window-long", "A10", "a window of one token more",
            _torch("mask", "age_S + query_T1 < self._slots", "age_S + query_T1 <= self._slots"),
            needs="chunks that push out old tokens of a window"),
    _mutant("window-short", "A10", "a window of one token fewer",
            _jax("mask", "age_1S + query_T1 < S", "age_1S + query_T1 < S - 1"),
                needs="chunks that push out old tokens of a window"),
    _mutant("values-stale", "K01", "the slot of the values is the one before",
            Edit("omni_jax.cache", "_LayerCache.store", "call._write(old_v, v_BTKd)",
                "call._write(old_v, jnp.roll(v_BTKd, 1, axis=2))")),
    _mutant("slots-seen-early", "K03", "a query sees the slot behind its own",
            _jax("mask", "slot_1S <= length + query_T1", "slot_1S <= length + query_T1 + 1")),
)  # fmt: skip
