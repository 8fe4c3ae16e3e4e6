"""From logits to a token: repetition penalty, temperature, top-k, top-p, and the draw.

Shapes: B batch, V vocabulary, N tokens that top-k left.

The order is fixed: repetition penalty, temperature, top-k, top-p, renormalise. Everything is computed in
promote_types(dtype, float32). Among exact ties the lowest id counts as the likelier.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .layers import check_tensor, dtype_name, statistics_dtype

__all__ = ["apply_repetition_penalty", "truncated_probabilities", "sample"]


def apply_repetition_penalty(
    logits_BV: Float[Tensor, "B V"], seen_BV: Bool[Tensor, "B V"], repetition_penalty: float
) -> Float[Tensor, "B V"]:
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
    check_tensor("seen_BV", seen_BV)
    if seen_BV.dtype != torch.bool or seen_BV.shape != logits_BV.shape:
        raise ValueError(
            f"seen_BV has shape {tuple(seen_BV.shape)} and dtype {dtype_name(seen_BV.dtype)}: must be boolean, of the "
            f"logits' shape {tuple(logits_BV.shape)}; mark every id that the text holds"
        )
    return _penalise(logits_BV, seen_BV, repetition_penalty)


def truncated_probabilities(
    logits_BV: Float[Tensor, "B V"], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Float[Tensor, "B V"]:
    """The distribution that a token is drawn from, exactly 0 where it was cut off: (B, V), rows of sum 1.

    temperature: softmax(logits / temperature); 0 puts everything on the largest logit.
    top_k: keeps the k likeliest, exactly k; 0, or the size of the vocabulary and more, keeps all.
    top_p: keeps the smallest set of the likeliest whose share of what top-k left reaches p: the token that crosses p
    is in it. 0 keeps the likeliest alone, 1 keeps all.

    Raises:
        ValueError: a setting out of range; logits that are not (B, V) floats; a row with NaN or +inf, or of nothing
            but −inf.

    Source: Fan et al., arXiv 1805.04833, section 5.4 (top-k); Holtzman et al., arXiv 1904.09751, section 3.1 (top-p).
    """
    _check_settings(temperature, top_k, top_p)
    logits_BV = _check_rows("logits_BV", logits_BV)
    _check_logit_values(logits_BV)
    if temperature == 0.0:
        return torch.zeros_like(logits_BV).scatter_(1, _likeliest(logits_BV)[:, None], 1.0)
    return _probabilities(logits_BV, temperature, top_k, top_p)


def sample(p_BV: Float[Tensor, "B V"], uniforms_B: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """One id per row by the inverse of its cumulative distribution: the first whose cumulative sum exceeds u · total.

    `p` need not sum to 1; a token of probability 0 is never drawn, whatever u and rounding do.

    Raises:
        ValueError: p not (B, V) floats or uniforms not (B,) floats; p negative, not finite or all 0 in a row, or of
            an infinite sum; uniforms outside [0, 1).

    Source: Devroye, Non-Uniform Random Variate Generation (1986), section III.2.
    """
    p_BV = _check_rows("p_BV", p_BV)
    check_tensor("uniforms_B", uniforms_B)
    if tuple(uniforms_B.shape) != tuple(p_BV.shape[:1]) or not uniforms_B.is_floating_point():
        raise ValueError(
            f"uniforms_B have shape {tuple(uniforms_B.shape)} and dtype {dtype_name(uniforms_B.dtype)}: must be "
            f"floating point of shape {(p_BV.shape[0],)}; give one number per row of p"
        )
    _check_probability_values(p_BV)
    _check_uniform_values("uniforms_B", uniforms_B)
    return _draw(p_BV, uniforms_B.to(p_BV))


def _penalise(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    return torch.where(seen_BV, torch.where(logits_BV > 0.0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def _likeliest(logits_BV: Tensor) -> Tensor:
    """The lowest id of the largest logit, which torch.argmax promises nowhere."""
    largest_BV = logits_BV == logits_BV.amax(dim=-1, keepdim=True)
    return largest_BV.to(torch.uint8).argmax(dim=-1)


def _probabilities(logits_BV: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    # The largest logit is taken off first, and the divisor kept normal: no temperature above 0 makes inf − inf or 0/0.
    smallest, eps = torch.finfo(logits_BV.dtype).tiny, torch.finfo(logits_BV.dtype).eps
    top_p = top_p if top_p < 1.0 - eps / 4.0 else 1.0  # what the logits' dtype rounds to 1 is 1
    shifted_BV = logits_BV - logits_BV.amax(dim=-1, keepdim=True)
    mass_BV = torch.exp(shifted_BV / max(temperature, smallest))
    if _truncates(top_k, top_p, logits_BV.shape[1]):
        # By the logits themselves: temperature keeps their order, but its rounding may make two of them equal.
        ids_BN = _top_ids(logits_BV, top_k)
        if top_p < 1.0:
            ordered = torch.sort(logits_BV.gather(1, ids_BN), dim=-1, descending=True, stable=True)
            ids_BN = ids_BN.gather(1, ordered.indices)
            mass_BN = mass_BV.gather(1, ids_BN)
            sums_BN = mass_BN.cumsum(dim=-1)
            before_BN = torch.nn.functional.pad(sums_BN[:, :-1], (1, 0))
            goal_B1 = (top_p * sums_BN[:, -1:]).clamp(min=smallest)
            mass_BN = mass_BN.masked_fill(before_BN >= goal_B1, 0.0)
        else:
            mass_BN = mass_BV.gather(1, ids_BN)
        mass_BV = torch.zeros_like(mass_BV).scatter_(1, ids_BN, mass_BN)
    return mass_BV / mass_BV.sum(dim=-1, keepdim=True)


def _top_ids(x_BV: Tensor, count: int) -> Tensor:
    """The ids of the `count` largest x in ascending order, lowest id first among equals; 0 is all of them."""
    B, V = x_BV.shape
    if count == 0 or count >= V:
        return torch.arange(V, device=x_BV.device).expand(B, V)
    # torch.topk leaves open which of several equal ones it takes, but not the value of the last.
    last_B1 = torch.topk(x_BV, count, dim=-1).values[:, -1:]
    above_BV, equal_BV = x_BV > last_B1, x_BV == last_B1
    wanted_B1 = count - above_BV.sum(dim=-1, keepdim=True)
    kept_BV = above_BV | (equal_BV & (equal_BV.cumsum(dim=-1) <= wanted_B1))
    # The place of the first kept one, the second, and so on: nonzero() would wait for the device. NaN keeps none.
    ranks_BN = torch.arange(1, count + 1, device=x_BV.device).expand(B, count)
    return torch.searchsorted(kept_BV.cumsum(dim=-1), ranks_BN.contiguous()).clamp(max=V - 1)


def _draw(p_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    # A sum in parallel need not be monotone: only places with mass count, and the largest of their sums is the whole.
    sums_BV = p_BV.cumsum(dim=-1).masked_fill(p_BV <= 0.0, 0.0)
    total_B1 = sums_BV.amax(dim=-1, keepdim=True)
    # A goal that rounding has lifted to the whole sum is lowered below it, so that there is a place beyond it.
    goal_B1 = torch.minimum(uniforms_B[:, None] * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return (sums_BV > goal_B1).to(torch.uint8).argmax(dim=-1)


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
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name}={value!r:.60} is not allowed: must be an integer from {least} up; {fix}")
    return number


def _check_rows(name: str, x: Tensor) -> Tensor:
    """x in the dtype that sampling computes in."""
    check_tensor(name, x)
    if x.ndim != 2 or 0 in x.shape or not x.is_floating_point():
        raise ValueError(
            f"{name} have shape {tuple(x.shape)} and dtype {dtype_name(x.dtype)}: must be floating point of shape (B, "
            f"V) with at least one entry on each axis; pass one row per text, for example {name}[None]"
        )
    return x.to(statistics_dtype(x.dtype))


def _check_logit_values(logits_BV: Tensor) -> None:
    largest = logits_BV.detach().amax(dim=-1).tolist()  # NaN if one is
    for row, value in enumerate(largest):
        if not math.isfinite(value):
            what = "nothing but -inf" if value == -math.inf else f"{value}"
            raise ValueError(
                f"logits_BV[{row}] holds {what}: NaN and inf are not allowed, and one logit must be above -inf; look "
                "at what made them"
            )


def _check_probability_values(p_BV: Tensor) -> None:
    sums_B = p_BV.sum(dim=-1)
    good = (p_BV >= 0.0).all(dim=-1) & (sums_B >= torch.finfo(p_BV.dtype).tiny) & sums_B.isfinite()
    if not bool(good.all()):
        raise ValueError(
            f"p_BV[{good.tolist().index(False)}] is no distribution: must be finite, not negative, and of a "
            "sum that is above 0 and finite; take it from truncated_probabilities"
        )


def _check_uniform_values(name: str, uniforms: Tensor) -> None:
    bad = (~((uniforms >= 0.0) & (uniforms < 1.0))).nonzero().tolist()
    if bad:
        raise ValueError(
            f"{name}{bad[0]} = {float(uniforms[tuple(bad[0])])} is not allowed: must be in [0, 1); draw them with a "
            "uniform generator"
        )
