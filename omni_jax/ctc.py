"""Connectionist temporal classification: the probability that frames spell a text.

Shapes: B batch, T frames, V vocabulary, N symbols of a target, S = 2N + 1 symbols with blanks between and around.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from .layers import check_array, statistics_dtype

__all__ = ["ctc_loss"]

# The logarithm of an impossible path's probability. Finite, so that sums and gradients need no special case, and so far
# down that exp gives exactly 0; −inf − (−inf) would be NaN.
_NEVER = -1e30


def ctc_loss(
    logits_BTV: Float[Array, "B T V"],
    targets_BN: Int[Array, "B N"],
    input_lengths: Int[Array, " B"],
    target_lengths: Int[Array, " B"],
    blank: int = 0,
) -> Float[Array, " B"]:
    """−ln P(target | logits) of each clip, in nats: (B,); the caller takes the mean, or divides by lengths.

    P is the sum over all paths of symbols, one per frame, that spell the target once repeats are merged and blanks
    taken out; each path has the product of its symbols' softmax probabilities. Only the first input_lengths frames and
    the first target_lengths symbols count. Computed in promote_types(dtype, float32), by the recursion over

        α[t, s] = ln p[t, s] + logsumexp(α[t − 1, s], α[t − 1, s − 1], α[t − 1, s − 2])

    the last term only where symbol s is neither blank nor the same as s − 2. A target that needs more frames than there
    are (its symbols, and one more for each pair of equal neighbours) is an error; inside jit, where values cannot be
    looked at, its loss is inf, with a gradient of 0. The same holds for a target of probability 0. Inside jit a symbol
    that is no symbol makes the loss NaN; so does a NaN among a clip's logits, everywhere.

    Raises:
        ValueError: shapes or dtypes that do not fit; lengths outside 1 … T and 0 … N; a symbol outside 0 … V − 1, or
            the blank, within a target; a target with more symbols than its frames can spell.

    Source: Graves et al., Connectionist temporal classification, ICML 2006.
    """
    for name, x in (("logits", logits_BTV), ("targets", targets_BN)):
        check_array(name, x)
    check_array("input_lengths", input_lengths)
    check_array("target_lengths", target_lengths)
    _check_shapes(logits_BTV, targets_BN, input_lengths, target_lengths, blank)
    T, V = logits_BTV.shape[1:]
    if not any(isinstance(x, Tracer) for x in (targets_BN, input_lengths, target_lengths)):
        known = (np.asarray(x).tolist() for x in (targets_BN, input_lengths, target_lengths))
        _check_values(*known, T=T, V=V, blank=blank)
    wide = jnp.asarray(logits_BTV, statistics_dtype(logits_BTV.dtype))
    targets_BN, input_lengths, target_lengths = (
        jnp.asarray(x).astype(jnp.int32) for x in (targets_BN, input_lengths, target_lengths)
    )
    spelt_BN = jnp.arange(targets_BN.shape[1], dtype=jnp.int32)[None] < target_lengths[:, None]
    bad_B = jnp.any(spelt_BN & ((targets_BN < 0) | (targets_BN >= V) | (targets_BN == blank)), axis=1)
    symbols_BN = jnp.where(spelt_BN & ~bad_B[:, None], targets_BN, blank)
    # Written out, as the softmax in attention is.
    shifted = wide - lax.stop_gradient(jnp.max(wide, axis=-1, keepdims=True))
    logp_BTV = shifted - jnp.log(jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True))
    logp_BTV = jnp.where(logp_BTV < _NEVER, _NEVER, logp_BTV)

    B, N = symbols_BN.shape
    blanks_BN = jnp.full((B, N), blank, jnp.int32)
    between_BS = jnp.reshape(jnp.stack([blanks_BN, symbols_BN], axis=2), (B, 2 * N))
    extended_BS = jnp.concatenate([between_BS, jnp.full((B, 1), blank, jnp.int32)], axis=1)
    logp_BTS = jnp.take_along_axis(logp_BTV, extended_BS[:, None, :], axis=2)
    skips_BS = (extended_BS != blank) & (extended_BS != _shift(extended_BS, 2, blank))
    start_BS = jnp.where(jnp.arange(2 * N + 1, dtype=jnp.int32)[None] < 2, logp_BTS[:, 0], _NEVER)

    def step(alpha_BS: Array, frame: tuple[Array, Array]) -> tuple[Array, None]:
        t, logp_BS = frame
        new_BS = logp_BS + _log_add(alpha_BS, skips_BS)
        return jnp.where((t < input_lengths)[:, None], new_BS, alpha_BS), None

    frames = (jnp.arange(1, T, dtype=jnp.int32), jnp.swapaxes(logp_BTS[:, 1:], 0, 1))
    alpha_BS, _ = lax.scan(step, start_BS, frames)
    # A path ends in the last symbol or in the blank behind it.
    place_BS = jnp.arange(2 * N + 1, dtype=jnp.int32)[None] - 2 * target_lengths[:, None]
    ends_BS = jnp.where((place_BS == 0) | (place_BS == -1), alpha_BS, _NEVER)
    top_B1 = lax.stop_gradient(jnp.max(ends_BS, axis=1, keepdims=True))
    total_B = jnp.squeeze(top_B1, axis=1) + jnp.log(jnp.sum(jnp.exp(ends_BS - top_B1), axis=1))
    losses_B = jnp.where(total_B <= 0.5 * _NEVER, math.inf, -total_B)
    return jnp.where(bad_B, math.nan, losses_B)


def _log_add(alpha_BS: Float[Array, "B S"], skips_BS: Bool[Array, "B S"]) -> Float[Array, "B S"]:
    """Stay, one symbol on, or two where that skips nothing but a blank: logsumexp of the three."""
    paths = jnp.stack([alpha_BS, _shift(alpha_BS, 1, _NEVER), jnp.where(skips_BS, _shift(alpha_BS, 2, _NEVER), _NEVER)])
    top = lax.stop_gradient(jnp.max(paths, axis=0))
    return top + jnp.log(jnp.sum(jnp.exp(paths - top[None]), axis=0))


def _shift(x_BS: Array, by: int, fill: int | float) -> Array:
    """x[:, s − by], `fill` where there is none."""
    return jnp.pad(x_BS, ((0, 0), (by, 0)), constant_values=fill)[:, : x_BS.shape[1]]


def _check_shapes(logits: Any, targets: Any, input_lengths: Any, target_lengths: Any, blank: Any) -> None:
    if logits.ndim != 3 or 0 in logits.shape or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and dtype {logits.dtype}: must be floating of shape "
            "(B, T, V); give the output of CTCHead"
        )
    B, _, V = logits.shape
    shapes = {"targets": targets, "input_lengths": input_lengths, "target_lengths": target_lengths}
    for name, x in shapes.items():
        right = x.ndim == 2 and x.shape[0] == B if name == "targets" else tuple(x.shape) == (B,)
        if not right or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(
                f"{name} have shape {tuple(x.shape)} and dtype {x.dtype}: must be integers of shape "
                f"{f'({B}, N)' if name == 'targets' else (B,)}; give one {'row' if name == 'targets' else 'number'} "
                "per clip"
            )
    if isinstance(blank, bool) or not isinstance(blank, int) or not 0 <= blank < V:
        raise ValueError(f"blank = {blank!r}: must be a symbol from 0 to {V - 1}; give for example blank=0")


def _check_values(
    targets: list[list[int]], input_lengths: list[int], target_lengths: list[int], T: int, V: int, blank: int
) -> None:
    for i, (row, frames, count) in enumerate(zip(targets, input_lengths, target_lengths)):
        if not 1 <= frames <= T:
            raise ValueError(f"input_lengths[{i}] = {frames}: must be from 1 to {T}; give the frames of each clip")
        if not 0 <= count <= len(row):
            raise ValueError(
                f"target_lengths[{i}] = {count}: must be from 0 to {len(row)}; give the symbols of each target"
            )
        symbols = row[:count]
        for n, symbol in enumerate(symbols):
            if not 0 <= symbol < V or symbol == blank:
                raise ValueError(
                    f"targets[{i}, {n}] = {symbol}: must be a symbol from 0 to {V - 1} other than blank = {blank}; "
                    "leave blanks out, and cut padding off by target_lengths"
                )
        needed = count + sum(a == b for a, b in pairwise(symbols))
        if needed > frames:
            raise ValueError(
                f"targets[{i}] has {count} symbols, and needs {needed} frames with a blank between equal ones: must be "
                f"at most input_lengths[{i}] = {frames}; downsample the clip less, or leave it out"
            )
