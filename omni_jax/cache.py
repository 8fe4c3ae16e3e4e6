"""The keys and values that a model has computed, so that each token goes through it once.

Shapes: B batch, T new tokens, S slots, K key/value heads, d head size.

A cache has S slots per row. A token takes the next slot of its row, padding too; what must not be seen is marked in
`kept`. Keys are stored turned by RoPE and once per key/value head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from .layers import check_array, check_inside

__all__ = ["KVCache", "init_cache"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class KVCache:
    """What `model(tokens, cache=...)` takes and gives back; a tree of arrays, and nothing in it is changed in place.

    k, v: per layer the keys and values of every slot, (B, S, K, d). kept: (B, S), slots that hold a token which may be
    seen. count: (B,), kept tokens so far, which is the position of the next one. length: slots written so far. window:
    the slots are a ring, and a full cache forgets its oldest token.

    Donate it to a jitted step, or carry it through lax.while_loop, and the buffers are written in place.
    """

    k: tuple[Float[Array, "B S K d"], ...]
    v: tuple[Float[Array, "B S K d"], ...]
    kept: Bool[Array, "B S"]
    count: Int[Array, " B"]
    length: Int[Array | np.ndarray, ""]
    window: bool = field(default=False, metadata={"static": True})


def init_cache(model: Any, batch_size: int, max_length: int | None = None, window: bool = False) -> KVCache:
    """An empty cache for `batch_size` rows of up to `max_length` tokens (None: the model's ctx_len).

    Its arrays have the model's compute dtype. A longer cache than ctx_len takes the model beyond what it was trained
    for. With `window` there is no end: every query sees the last max_length tokens, itself included, in every layer.

    Raises:
        ValueError: batch_size or max_length below 1; a window that is not a bool.
    """
    check_window(window)
    slots = model.config.ctx_len if max_length is None else max_length
    for name, value in (("batch_size", batch_size), ("max_length", slots)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} = {value!r} must be an integer of at least 1; give the number of rows and slots")
    shape = (batch_size, slots, *_heads(model))
    dtype = _dtype(model)
    return KVCache(
        k=tuple(jnp.zeros(shape, dtype) for _ in model.blocks),
        v=tuple(jnp.zeros(shape, dtype) for _ in model.blocks),
        kept=jnp.zeros((batch_size, slots), jnp.bool_),
        count=jnp.zeros((batch_size,), jnp.int32),
        length=np.zeros((), np.int32),  # numpy's, so that a program which makes a cache knows that it is empty
        window=window,
    )


class _CachedCall:
    """One call of the model on a cache: where its T tokens go, what they see, and the cache afterwards.

    Every layer gets its own `_LayerCache` and stores into it; `finish` collects them. Whether the tokens fit is known
    here where `length` is concrete. Inside jit it is not: then nothing is written unless they fit, and `mark` turns
    the logits into NaN.
    """

    def __init__(self, cache: KVCache, time: int, attention_mask: Any) -> None:
        self._cache, self._time = cache, time
        B, S = cache.kept.shape
        _check_room(cache, time)
        self._new_BT = jnp.ones((B, time), jnp.bool_) if attention_mask is None else jnp.asarray(attention_mask)
        counted_BT = jnp.cumsum(self._new_BT, axis=1, dtype=jnp.int32)
        self.positions_BT = cache.count[:, None] + counted_BT - 1  # −1 where neither a token nor a key can be seen
        self._fits = None
        if not cache.window and isinstance(cache.length, Tracer):
            self._fits = cache.length + time <= S
            check_inside(self._fits, ValueError, _full("{length}", time, S), length=cache.length)
        # dynamic_update_slice clamps anyway; what it must not overwrite then is held back by _fits.
        self._start = cache.length % S if cache.window else jnp.minimum(cache.length, max(S - time, 0))
        self._kept_BS = self._write(cache.kept, self._new_BT)
        self.layers = [_LayerCache(self, k, v) for k, v in zip(cache.k, cache.v, strict=True)]

    @property
    def _splits(self) -> bool:
        """Several tokens in a ring: what they push out is still seen by the first of them."""
        return self._cache.window and self._time > 1

    def _write(self, buffer: Array, new: Array) -> Array:
        """`buffer` (B, S, ...) with `new` (B, T, ...) in the next T slots."""
        if self._splits:
            slots_T = (self._start + jnp.arange(self._time, dtype=jnp.int32)) % buffer.shape[1]
            return buffer.at[:, slots_T].set(new, unique_indices=True)
        if self._fits is not None:
            new = jnp.where(self._fits, new, lax.dynamic_slice_in_dim(buffer, self._start, self._time, axis=1))
        return lax.dynamic_update_slice_in_dim(buffer, new, self._start, axis=1)

    def mask(self) -> Bool[Array, "B T S"]:
        """Which stored key each new query may see: kept ones up to itself, in a ring the last S of them."""
        length, S = self._cache.length, self._kept_BS.shape[1]
        query_T1 = jnp.arange(self._time, dtype=jnp.int32)[:, None]
        slot_1S = jnp.arange(S, dtype=jnp.int32)[None]
        if not self._splits:
            if self._cache.window:  # a single token, which has just taken the place of the one that left the window
                return self._kept_BS[:, None]
            return self._kept_BS[:, None] & (slot_1S <= length + query_T1)[None]
        # The token in a slot is the latest one before `length` whose number is the slot's, modulo S.
        age_1S = (length - 1 - slot_1S) % S + 1
        old_BTS = self._cache.kept[:, None] & (age_1S + query_T1 < S)[None]
        new_BTT = self._new_BT[:, None] & jnp.tril(jnp.ones((self._time, self._time), jnp.bool_))[None]
        return jnp.concatenate([old_BTS, new_BTT], axis=2)

    def mark(self, logits: Array) -> Array:
        """`logits`, or NaN if the tokens did not fit."""
        return logits if self._fits is None else jnp.where(self._fits, logits, jnp.nan)

    def finish(self) -> KVCache:
        """The cache with the new tokens in it; as it was if they did not fit."""
        count_B = self._cache.count + jnp.sum(self._new_BT, axis=1, dtype=jnp.int32)
        length = self._cache.length + self._time
        if isinstance(length, np.generic):  # what numpy makes of the sum of 0-d arrays
            length = np.asarray(length)
        if self._fits is not None:
            count_B = jnp.where(self._fits, count_B, self._cache.count)
            length = jnp.where(self._fits, length, self._cache.length)
        k, v = (tuple(getattr(layer, name) for layer in self.layers) for name in ("k_BSKd", "v_BSKd"))
        return KVCache(k, v, self._kept_BS, count_B, length, self._cache.window)


class _LayerCache:
    """One layer's keys and values during one call."""

    def __init__(self, call: _CachedCall, k_BSKd: Array, v_BSKd: Array) -> None:
        self._call, self.k_BSKd, self.v_BSKd = call, k_BSKd, v_BSKd
        # Whether nothing is stored yet, as far as is known here; not asked of a ring, whose slots have another order.
        length = call._cache.length
        self.empty = not call._cache.window and not isinstance(length, Tracer) and int(length) == 0

    def store(self, k_BTKd: Array, v_BTKd: Array) -> tuple[Array, Array]:
        """Write the new keys and values; gives those to attend to, in the order of the call's mask."""
        call, old_k, old_v = self._call, self.k_BSKd, self.v_BSKd
        self.k_BSKd, self.v_BSKd = call._write(old_k, k_BTKd), call._write(old_v, v_BTKd)
        if call._splits:
            return jnp.concatenate([old_k, k_BTKd], axis=1), jnp.concatenate([old_v, v_BTKd], axis=1)
        return self.k_BSKd, self.v_BSKd


def check_window(window: Any) -> None:
    if not isinstance(window, bool):
        raise ValueError(f"window={window!r} is not allowed: must be True or False; use True for a ring of slots")


def _heads(model: Any) -> tuple[int, int]:
    attn = model.blocks[0].attn
    return attn.kv_heads, attn.head_dim


def _dtype(model: Any) -> Any:
    return jnp.dtype(model.tok_emb.embedding.dtype if model.dtype is None else model.dtype)


def _check_room(cache: KVCache, time: int) -> None:
    S = cache.kept.shape[1]
    if cache.window and time > S:
        raise ValueError(
            f"{time} tokens in one call are more than the window's max_length={S} slots; pass them in chunks of at "
            f"most {S}, or make the cache longer"
        )
    length = 0 if isinstance(cache.length, Tracer) else int(cache.length)
    if not cache.window and length + time > S:
        raise ValueError(_full(str(length), time, S))


def _full(length: str, time: int, slots: int) -> str:
    return (
        f"the cache is full: it holds {length} tokens, and {time} more do not fit into max_length={slots}; use "
        "init_cache(model, batch_size, a longer max_length), or window=True, which forgets the oldest tokens"
    )


def check_cache(cache: Any, model: Any, batch: int, time: int, attention_mask: Any) -> None:
    """That `cache` was made for this model and batch, and that the mask is about the new tokens."""
    if not isinstance(cache, KVCache):
        raise ValueError(f"cache is a {type(cache).__name__}, must be a KVCache; make one with init_cache(model, B)")
    S = cache.kept.shape[-1]
    found = (len(cache.k), cache.k[0].shape if cache.k else (), cache.k[0].dtype if cache.k else None)
    wanted = (len(model.blocks), (batch, S, *_heads(model)), _dtype(model))
    if found != wanted or cache.kept.shape != (batch, S) or cache.count.shape != (batch,):
        raise ValueError(
            f"cache has {found[0]} layers of (B, S, K, d) = {tuple(found[1])} in {found[2]}, this model and input need "
            f"{wanted[0]} of {wanted[1]} in {wanted[2]}; make one with init_cache(model, batch_size={batch})"
        )
    if attention_mask is None:
        return
    check_array("attention_mask", attention_mask)
    if attention_mask.dtype != jnp.bool_ or tuple(attention_mask.shape) != (batch, time):
        raise ValueError(
            f"attention_mask is {attention_mask.dtype} of shape {tuple(attention_mask.shape)}: with a cache it must be "
            f"boolean of shape (B, T) = {(batch, time)}, True for new tokens which are not padding; leave out what the "
            "cache already knows"
        )
