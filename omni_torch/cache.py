"""The keys and values that a model has computed, so that each token goes through it once.

Shapes: B batch, T new tokens, S slots, K key/value heads, d head size.

A cache has S slots per row. A token takes the next slot of its row, padding too; what must not be seen is marked in
`kept`. Keys are stored turned by RoPE and once per key/value head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .layers import check_tensor, dtype_name

__all__ = ["KVCache", "init_cache"]


@dataclass(eq=False)
class KVCache:
    """What `model(tokens, cache=...)` takes and gives back: the same object, its buffers written in place.

    k, v: per layer the keys and values of every slot, (B, S, K, d). kept: (B, S), slots that hold a token which may be
    seen. count: (B,), kept tokens so far, which is the position of the next one. length: slots written so far. window:
    the slots are a ring, and a full cache forgets its oldest token.

    No gradient flows through a call with a cache.
    """

    k: tuple[Float[Tensor, "B S K d"], ...]
    v: tuple[Float[Tensor, "B S K d"], ...]
    kept: Bool[Tensor, "B S"]
    count: Int[Tensor, " B"]
    length: int
    window: bool = False


# Buffers born in inference mode could not be written outside it.
@torch.inference_mode(False)
def init_cache(model: Any, batch_size: int, max_length: int | None = None, window: bool = False) -> KVCache:
    """An empty cache for `batch_size` rows of up to `max_length` tokens (None: the model's ctx_len).

    Its arrays have the model's compute dtype, and its device. A longer cache than ctx_len takes the model beyond what
    it was trained for. With `window` there is no end: every query sees the last max_length tokens, itself included, in
    every layer.

    Raises:
        ValueError: batch_size or max_length below 1; a window that is not a bool.
    """
    check_window(window)
    slots = model.config.ctx_len if max_length is None else max_length
    for name, value in (("batch_size", batch_size), ("max_length", slots)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} = {value!r} must be an integer of at least 1; give the number of rows and slots")
    table = model.tok_emb.weight
    shape = (batch_size, slots, *_heads(model))
    return KVCache(
        k=tuple(torch.zeros(shape, dtype=table.dtype, device=table.device) for _ in model.blocks),
        v=tuple(torch.zeros(shape, dtype=table.dtype, device=table.device) for _ in model.blocks),
        kept=torch.zeros(batch_size, slots, dtype=torch.bool, device=table.device),
        count=torch.zeros(batch_size, dtype=torch.long, device=table.device),
        length=0,
        window=window,
    )


class _CachedCall:
    """One call of the model on a cache: where its T tokens go, what they see, and the cache afterwards.

    Every layer gets its own `_LayerCache` and stores into it; `finish` counts the tokens. A call that fails half-way
    has not counted them, and the next one writes over them; in a full ring it has already forgotten the oldest ones.
    """

    def __init__(self, cache: KVCache, time: int, attention_mask: Tensor | None) -> None:
        self._cache, self._time = cache, time
        B, self._slots = cache.kept.shape
        device = cache.kept.device
        _check_room(cache, time)
        self._new_BT = (
            torch.ones(B, time, dtype=torch.bool, device=device) if attention_mask is None else attention_mask
        )
        counted_BT = self._new_BT.cumsum(dim=1)
        self.positions_BT = cache.count[:, None] + counted_BT - 1  # −1 where neither a token nor a key can be seen
        if cache.window:
            # As a tensor: torch.compile would make a program for each number that it slices a ring at.
            self._slots_T = (cache.length + torch.arange(time, device=device)) % self._slots
        # Only the slots in use are attended to.
        self._used = min(cache.length + time, self._slots)
        # Several tokens past the end of a ring: what they push out is still seen by the first of them.
        self._wraps = time > 1 and cache.length + time > self._slots
        self.layers = [_LayerCache(self, k, v) for k, v in zip(cache.k, cache.v, strict=True)]

    def _write(self, buffer_BS: Tensor, new_BT: Tensor) -> None:
        """`new` (B, T, ...) into the next T slots of `buffer` (B, S, ...)."""
        if self._cache.window:
            buffer_BS.index_copy_(1, self._slots_T, new_BT.detach())
        else:
            buffer_BS[:, self._cache.length : self._cache.length + self._time] = new_BT.detach()

    def mask(self) -> Bool[Tensor, "B T S"]:
        """Which stored key each new query may see: kept ones up to itself, in a ring the last S of them."""
        length, device = self._cache.length, self._cache.kept.device
        old_BS = self._cache.kept[:, : min(length, self._slots)]
        if self._time == 1:
            if length >= self._slots:  # the new token takes the place of the one that leaves the window
                return old_BS.index_copy(1, self._slots_T, self._new_BT)[:, None]
            return torch.cat([old_BS, self._new_BT], dim=1)[:, None]
        causal_TT = torch.ones(self._time, self._time, dtype=torch.bool, device=device).tril()
        old_BTS = old_BS[:, None].expand(-1, self._time, -1)
        if self._wraps:
            # The token in a slot is the latest one before `length` whose number is the slot's, modulo S.
            age_S = (length - 1 - torch.arange(old_BS.shape[1], device=device)) % self._slots + 1
            query_T1 = torch.arange(self._time, device=device)[:, None]
            old_BTS = old_BTS & (age_S + query_T1 < self._slots)
        return torch.cat([old_BTS, self._new_BT[:, None] & causal_TT], dim=2)

    def finish(self) -> KVCache:
        """The cache with the new tokens in it."""
        cache = self._cache
        self._write(cache.kept, self._new_BT)
        cache.count += self._new_BT.sum(dim=1)
        cache.length += self._time
        return cache


class _LayerCache:
    """One layer's keys and values during one call."""

    def __init__(self, call: _CachedCall, k_BSKd: Tensor, v_BSKd: Tensor) -> None:
        self._call, self._k_BSKd, self._v_BSKd = call, k_BSKd, v_BSKd

    def store(self, k_BTKd: Tensor, v_BTKd: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values; gives those to attend to, in the order of the call's mask."""
        call, keys, values = self._call, self._k_BSKd, self._v_BSKd
        if call._wraps:
            old = min(call._cache.length, call._slots)
            seen = torch.cat([keys[:, :old], k_BTKd], dim=1), torch.cat([values[:, :old], v_BTKd], dim=1)
        else:
            seen = keys[:, : call._used], values[:, : call._used]
        call._write(keys, k_BTKd)
        call._write(values, v_BTKd)
        return seen


def check_window(window: Any) -> None:
    if not isinstance(window, bool):
        raise ValueError(f"window={window!r} is not allowed: must be True or False; use True for a ring of slots")


def _heads(model: Any) -> tuple[int, int]:
    attn = model.blocks[0].attn
    return attn.kv_heads, attn.head_dim


def _check_room(cache: KVCache, time: int) -> None:
    S = cache.kept.shape[1]
    if cache.window and time > S:
        raise ValueError(
            f"{time} tokens in one call are more than the window's max_length={S} slots; pass them in chunks of at "
            f"most {S}, or make the cache longer"
        )
    if not cache.window and cache.length + time > S:
        raise ValueError(
            f"the cache is full: it holds {cache.length} tokens, and {time} more do not fit into max_length={S}; use "
            "init_cache(model, batch_size, a longer max_length), or window=True, which forgets the oldest tokens"
        )


def check_cache(cache: Any, model: Any, batch: int, time: int, attention_mask: Tensor | None) -> None:
    """That `cache` was made for this model and batch, and that the mask is about the new tokens."""
    if not isinstance(cache, KVCache):
        raise ValueError(f"cache is a {type(cache).__name__}, must be a KVCache; make one with init_cache(model, B)")
    S = cache.kept.shape[-1]
    first, table = cache.k[0] if cache.k else torch.empty(0), model.tok_emb.weight
    found = (len(cache.k), tuple(first.shape), dtype_name(first.dtype), first.device)
    wanted = (len(model.blocks), (batch, S, *_heads(model)), dtype_name(table.dtype), table.device)
    if found != wanted or tuple(cache.kept.shape) != (batch, S) or tuple(cache.count.shape) != (batch,):
        raise ValueError(
            f"cache has {found[0]} layers of (B, S, K, d) = {found[1]} in {found[2]} on {found[3]}, this model and "
            f"input need {wanted[0]} of {wanted[1]} in {wanted[2]} on {wanted[3]}; make one with "
            f"init_cache(model, batch_size={batch})"
        )
    if attention_mask is None:
        return
    check_tensor("attention_mask", attention_mask)
    if attention_mask.dtype != torch.bool or tuple(attention_mask.shape) != (batch, time):
        raise ValueError(
            f"attention_mask is {dtype_name(attention_mask.dtype)} of shape {tuple(attention_mask.shape)}: with a "
            f"cache it must be boolean of shape (B, T) = {(batch, time)}, True for new tokens which are not padding; "
            "leave out what the cache already knows"
        )
