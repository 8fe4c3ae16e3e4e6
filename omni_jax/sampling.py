"""From logits to a token: repetition penalty, temperature, top-k, top-p, and the draw.

Shapes: B batch, V vocabulary.

The order is fixed: repetition penalty, temperature, top-k, top-p, renormalise. Everything is computed in
promote_types(dtype, float32), and means the same inside jit. Among exact ties the lowest id counts as the likelier.

Nothing is sorted: XLA's sort of 32,000 numbers takes longer on a CPU than the forward pass of a small model. The
smallest logit to keep is found by bisection over the ordered bits of the floats, exactly.
"""

from __future__ import annotations

import math
import numbers
import operator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from .layers import check_array, statistics_dtype

__all__ = ["apply_repetition_penalty", "truncated_probabilities", "sample"]

_BLOCK = 128


def apply_repetition_penalty(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], repetition_penalty: float
) -> Float[Array, "B V"]:
    """Logits with those of seen tokens made smaller: positive ones divided by the penalty, the others multiplied.

    `seen` is True for the ids that the text so far holds; a penalty of 1 changes nothing, one below 1 favours them.

    Raises:
        ValueError: logits that are not (B, V) floats, `seen` of another shape or not boolean, a penalty that is not a
            number from 1e-6 to 1e6.

    Source: Keskar et al., CTRL, arXiv 1909.05858, section 4.1; a negative logit is multiplied, as dividing it would
    make the token likelier.
    """
    logits_BV = _check_rows("logits_BV", logits_BV)
    _check_penalty(repetition_penalty)
    check_array("seen_BV", seen_BV)
    if seen_BV.dtype != jnp.bool_ or seen_BV.shape != logits_BV.shape:
        raise ValueError(
            f"seen_BV has shape {tuple(seen_BV.shape)} and dtype {seen_BV.dtype}: must be boolean, of the logits' "
            f"shape {tuple(logits_BV.shape)}; mark every id that the text holds"
        )
    return _penalise(logits_BV, jnp.asarray(seen_BV), repetition_penalty)


def truncated_probabilities(
    logits_BV: Float[Array, "B V"], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Float[Array, "B V"]:
    """The distribution that a token is drawn from, exactly 0 where it was cut off: (B, V), rows of sum 1.

    temperature: softmax(logits / temperature); 0 puts everything on the largest logit.
    top_k: keeps the k likeliest, exactly k; 0, or the size of the vocabulary and more, keeps all.
    top_p: keeps the smallest set of the likeliest whose share of what top-k left reaches p: the token that crosses p
    is in it. 0 keeps the likeliest alone, 1 keeps all.

    Raises:
        ValueError: a setting out of range; logits that are not (B, V) floats; where they are concrete, a row with NaN
            or +inf, or of nothing but −inf.

    Source: Fan et al., arXiv 1805.04833, section 5.4 (top-k); Holtzman et al., arXiv 1904.09751, section 3.1 (top-p).
    """
    _check_settings(temperature, top_k, top_p)
    logits_BV = _check_rows("logits_BV", logits_BV)
    if not isinstance(logits_BV, Tracer):
        _check_logit_values(np.asarray(logits_BV))
    if temperature == 0.0:
        return jax.nn.one_hot(_likeliest(logits_BV), logits_BV.shape[1], dtype=logits_BV.dtype)
    return _probabilities(logits_BV, temperature, top_k, top_p, truncating=_truncates(top_k, top_p, logits_BV.shape[1]))


def sample(p_BV: Float[Array, "B V"], uniforms_B: Float[Array, " B"]) -> Int[Array, " B"]:
    """One id per row by the inverse of its cumulative distribution: the first whose cumulative sum exceeds u · total.

    `p` need not sum to 1; a token of probability 0 is never drawn, whatever u and rounding do.

    Raises:
        ValueError: p not (B, V) floats or uniforms not (B,) floats; where they are concrete, p negative, not finite or
            all 0 in a row, or of an infinite sum; uniforms outside [0, 1).

    Source: Devroye, Non-Uniform Random Variate Generation (1986), section III.2.
    """
    p_BV = _check_rows("p_BV", p_BV)
    check_array("uniforms_B", uniforms_B)
    if tuple(uniforms_B.shape) != p_BV.shape[:1] or not jnp.issubdtype(uniforms_B.dtype, jnp.floating):
        raise ValueError(
            f"uniforms_B have shape {tuple(uniforms_B.shape)} and dtype {uniforms_B.dtype}: must be floating point of "
            f"shape {(p_BV.shape[0],)}; give one number per row of p"
        )
    if not isinstance(p_BV, Tracer):
        _check_probability_values(np.asarray(p_BV))
    if not isinstance(uniforms_B, Tracer):
        _check_uniform_values("uniforms_B", np.asarray(uniforms_B))
    return _draw(p_BV, jnp.asarray(uniforms_B, p_BV.dtype))


def _penalise(logits_BV: Array, seen_BV: Array, penalty: Any) -> Array:
    return jnp.where(seen_BV, jnp.where(logits_BV > 0.0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def _likeliest(logits_BV: Array) -> Array:
    """The lowest id of the largest logit; faster on a CPU than argmax, which carries pairs along."""
    V = logits_BV.shape[1]
    ids_BV = lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
    largest_BV = logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True)
    return jnp.minimum(jnp.min(jnp.where(largest_BV, ids_BV, V), axis=-1), V - 1)  # NaN equals nothing


@partial(jax.jit, static_argnames="truncating")
def _probabilities(logits_BV: Array, temperature: Any, top_k: Any, top_p: Any, truncating: bool) -> Array:
    # The largest logit is taken off first, and the divisor kept normal: no temperature above 0 makes inf − inf or 0/0.
    smallest = float(jnp.finfo(logits_BV.dtype).tiny)
    shifted_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    mass_BV = jnp.exp(shifted_BV / jnp.maximum(temperature, smallest))
    if truncating:
        # By the logits themselves: temperature keeps their order, but its rounding may make two of them equal.
        count_B1 = jnp.full((logits_BV.shape[0], 1), jnp.minimum(top_k, logits_BV.shape[1]), jnp.int32)
        top_BV = _smallest_set(logits_BV, jnp.ones(logits_BV.shape, jnp.int32), count_B1, top_k == 0)
        mass_BV = jnp.where(top_BV, mass_BV, 0.0)
        top_p = jnp.asarray(top_p, logits_BV.dtype)  # what rounds to 1 is 1
        goal_B1 = jnp.maximum(top_p * jnp.sum(mass_BV, axis=-1, keepdims=True), smallest)
        mass_BV = jnp.where(_smallest_set(logits_BV, mass_BV, goal_B1, top_p >= 1.0), mass_BV, 0.0)
    return mass_BV / jnp.sum(mass_BV, axis=-1, keepdims=True)


def _smallest_set(x_BV: Array, mass_BV: Array, goal_B1: Array, everything: Any) -> Array:
    """Which are the fewest of the largest x, lowest id first among equals, whose mass reaches the goal."""
    key_BV = _ordered_bits(x_BV)
    id_BV = lax.broadcasted_iota(jnp.int32, x_BV.shape, 1)
    zero = jnp.zeros((), mass_BV.dtype)

    def mass_of(kept_BV: Array) -> Array:
        return jnp.sum(jnp.where(kept_BV, mass_BV, zero), axis=-1, keepdims=True, dtype=mass_BV.dtype)

    # The smallest key such that what lies above it does not reach the goal: the key of the last token to keep.
    low, high = jnp.min(key_BV, axis=-1, keepdims=True), jnp.max(key_BV, axis=-1, keepdims=True)
    last_B1 = _bisect(lambda key_B1: mass_of(key_BV > key_B1) < goal_B1, jnp.where(everything, high, low), high)
    above_BV, equal_BV = key_BV > last_B1, key_BV == last_B1
    # Of several that are equal to it, the fewest that reach the goal: those with ids below an end.
    alone_B1 = jnp.sum(equal_BV, axis=-1, keepdims=True, dtype=jnp.int32) == 1
    ends = jnp.full(alone_B1.shape, x_BV.shape[1], jnp.int32)
    end_B1 = _bisect(
        lambda end_B1: mass_of(above_BV | (equal_BV & (id_BV < end_B1))) >= goal_B1,
        jnp.where(alone_B1 | everything, ends, 1),
        ends,
    )
    return above_BV | (equal_BV & (id_BV < end_B1)) | everything


def _bisect(holds: Any, low_B1: Array, high_B1: Array) -> Array:
    """The smallest integer in low … high at which `holds`, which must stay true above it, and is taken to at high."""

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # rounded down, without overflow
        found = holds(middle)
        return jnp.where(found, low, jnp.minimum(middle + 1, high)), jnp.where(found, middle, high)

    return lax.while_loop(lambda bounds: jnp.any(bounds[0] < bounds[1]), halve, (low_B1, high_B1))[1]


def _ordered_bits(x: Array) -> Array:
    """Integers in the order of the floats: their bits, those below the sign turned over for negative ones."""
    integer = jnp.int32 if x.dtype.itemsize == 4 else jnp.int64
    bits = lax.bitcast_convert_type(jnp.where(x == 0.0, 0.0, x), integer)  # −0 and 0 are a tie
    return jnp.where(bits < 0, bits ^ jnp.iinfo(integer).max, bits)


@jax.jit
def _draw(p_BV: Array, uniforms_B: Array) -> Array:
    # In two steps, a block of ids and then the id: a cumulative sum over all of V takes much longer on a CPU.
    B, V = p_BV.shape
    p_BNW = jnp.reshape(jnp.pad(p_BV, ((0, 0), (0, -V % _BLOCK))), (B, -1, _BLOCK))
    block_BN = jnp.sum(p_BNW, axis=-1)
    block_B1, left_B1 = _first_beyond(block_BN, uniforms_B[:, None] * jnp.sum(block_BN, axis=-1, keepdims=True))
    p_BW = jnp.take_along_axis(p_BNW, block_B1[:, :, None], axis=1)[:, 0]
    within_B1, _ = _first_beyond(p_BW, left_B1)
    return (block_B1 * _BLOCK + within_B1)[:, 0]


def _first_beyond(mass_BN: Array, goal_B1: Array) -> tuple[Array, Array]:
    """The first place whose cumulative sum exceeds the goal, and what of the goal is left when it begins.

    XLA's cumulative sums are not monotone: only places with mass count, and the largest of their sums is the whole. A
    goal that rounding has lifted to it is lowered, so that there is a place beyond it.
    """
    sums_BN = jnp.cumsum(mass_BN, axis=-1)
    ends_BN = jnp.where(mass_BN > 0.0, sums_BN, 0.0)
    total_B1 = jnp.max(ends_BN, axis=-1, keepdims=True)
    goal_B1 = jnp.minimum(goal_B1, jnp.nextafter(total_B1, jnp.zeros_like(total_B1)))
    at_B1 = jnp.argmax(ends_BN > goal_B1, axis=-1, keepdims=True).astype(jnp.int32)
    before_B1 = jnp.where(at_B1 > 0, jnp.take_along_axis(sums_BN, jnp.maximum(at_B1 - 1, 0), axis=-1), 0.0)
    return at_B1, goal_B1 - before_B1


def _truncates(top_k: int, top_p: float, vocab_size: int) -> bool:
    return 0 < top_k < vocab_size or top_p < 1.0


def _check_settings(temperature: float, top_k: int, top_p: float) -> None:
    _check_number("temperature", temperature, 0.0, math.inf, "use 0 for the likeliest token, 1 for the model's own")
    _check_integer("top_k", top_k, 0, "use 0 to keep every token")
    _check_number("top_p", top_p, 0.0, 1.0, "use 1 to keep every token")


def _check_penalty(repetition_penalty: float) -> None:
    # Beyond these the products of ordinary logits would overflow, or all become 0.
    _check_number("repetition_penalty", repetition_penalty, 1e-6, 1e6, "use 1 for none, 1.2 for CTRL's")


def _check_number(name: str, value: Any, least: float, most: float, fix: str) -> None:
    try:
        number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer that no float can hold
        number = math.inf
    if not math.isfinite(number) or not least <= number <= most:
        allowed = f"from {least:g}" + (f" to {most:g}" if math.isfinite(most) else " up, and finite")
        raise ValueError(f"{name}={value!r:.60} is not allowed: must be a number {allowed}; {fix}")


def _check_integer(name: str, value: Any, least: int, fix: str) -> int:
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name}={value!r:.60} is not allowed: must be an integer from {least} up; {fix}")
    return number


def _check_rows(name: str, x: Any) -> Array:
    """x in the dtype that sampling computes in."""
    check_array(name, x)
    if x.ndim != 2 or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} have shape {tuple(x.shape)} and dtype {x.dtype}: must be floating point of shape (B, V) with at "
            f"least one entry on each axis; pass one row per text, for example {name}[None]"
        )
    return jnp.asarray(x, statistics_dtype(x.dtype))


def _check_logit_values(logits_BV: np.ndarray) -> None:
    largest_B = logits_BV.max(axis=-1)  # NaN if one is
    bad = np.flatnonzero(~np.isfinite(largest_B))
    if bad.size:
        value = largest_B[bad[0]]
        what = "nothing but -inf" if value == -math.inf else f"{value}"
        raise ValueError(
            f"logits_BV[{bad[0]}] holds {what}: NaN and inf are not allowed, and one logit must be above -inf; look "
            "at what made them"
        )


def _check_probability_values(p_BV: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        sums_B = p_BV.sum(axis=-1)
    bad = np.flatnonzero(~((p_BV >= 0.0).all(axis=-1) & (sums_B >= np.finfo(p_BV.dtype).tiny) & np.isfinite(sums_B)))
    if bad.size:
        raise ValueError(
            f"p_BV[{bad[0]}] is no distribution: must be finite, not negative, and of a sum that is above 0 "
            "and finite; take it from truncated_probabilities"
        )


def _check_uniform_values(name: str, uniforms: np.ndarray) -> None:
    bad = np.argwhere(~((uniforms >= 0.0) & (uniforms < 1.0)))
    if len(bad):
        at = bad[0].tolist()
        raise ValueError(
            f"{name}{at} = {uniforms[tuple(at)]} is not allowed: must be in [0, 1); draw them with a uniform generator"
        )
