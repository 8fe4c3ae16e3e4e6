"""Connectionist temporal classification: the probability that frames spell a text.

Shapes: B batch, T frames, V vocabulary, N symbols of a target, S = 2N + 1 symbols with blanks between and around.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .layers import check_tensor, dtype_name, statistics_dtype

__all__ = ["ctc_loss"]

# The logarithm of an impossible path's probability. Finite, so that sums and gradients need no special case, and so far
# down that exp gives exactly 0; −inf − (−inf) would be NaN.
_NEVER = -1e30


def ctc_loss(
    logits_BTV: Float[Tensor, "B T V"],
    targets_BN: Int[Tensor, "B N"],
    input_lengths: Int[Tensor, " B"],
    target_lengths: Int[Tensor, " B"],
    blank: int = 0,
) -> Float[Tensor, " B"]:
    """−ln P(target | logits) of each clip, in nats: (B,); the caller takes the mean, or divides by lengths.

    P is the sum over all paths of symbols, one per frame, that spell the target once repeats are merged and blanks
    taken out; each path has the product of its symbols' softmax probabilities. Only the first input_lengths frames and
    the first target_lengths symbols count. Computed in promote_types(dtype, float32), by the recursion over

        α[t, s] = ln p[t, s] + logsumexp(α[t − 1, s], α[t − 1, s − 1], α[t − 1, s − 2])

    the last term only where symbol s is neither blank nor the same as s − 2. A target that needs more frames than there
    are (its symbols, and one more for each pair of equal neighbours) is an error; inside torch.compile, where values
    cannot be looked at, its loss is inf, with a gradient of 0. The same holds for a target of probability 0. Inside
    torch.compile a symbol that is no symbol makes the loss NaN; so does a NaN among a clip's logits, everywhere.

    Raises:
        ValueError: shapes or dtypes that do not fit; lengths outside 1 … T and 0 … N; a symbol outside 0 … V − 1, or
            the blank, within a target; a target with more symbols than its frames can spell.

    Source: Graves et al., Connectionist temporal classification, ICML 2006.
    """
    for name, x in (("logits", logits_BTV), ("targets", targets_BN)):
        check_tensor(name, x)
    check_tensor("input_lengths", input_lengths)
    check_tensor("target_lengths", target_lengths)
    _check_shapes(logits_BTV, targets_BN, input_lengths, target_lengths, blank)
    T, V = logits_BTV.shape[1:]
    if not torch.compiler.is_compiling():
        _check_values(targets_BN.tolist(), input_lengths.tolist(), target_lengths.tolist(), T, V, blank)
    device = logits_BTV.device
    wide = logits_BTV.to(statistics_dtype(logits_BTV.dtype))
    targets_BN, input_lengths, target_lengths = (
        x.to(device).long() for x in (targets_BN, input_lengths, target_lengths)
    )
    spelt_BN = torch.arange(targets_BN.shape[1], device=device)[None] < target_lengths[:, None]
    bad_B = (spelt_BN & ((targets_BN < 0) | (targets_BN >= V) | (targets_BN == blank))).any(dim=1)
    symbols_BN = torch.where(spelt_BN & ~bad_B[:, None], targets_BN, blank)
    logp_BTV = torch.log_softmax(wide, dim=-1)
    logp_BTV = torch.where(logp_BTV < _NEVER, _NEVER, logp_BTV)

    B, N = symbols_BN.shape
    between_BS = torch.stack([torch.full_like(symbols_BN, blank), symbols_BN], dim=2).reshape(B, 2 * N)
    extended_BS = F.pad(between_BS, (0, 1), value=blank)
    logp_BTS = logp_BTV.gather(2, extended_BS[:, None, :].expand(B, T, 2 * N + 1))
    skips_BS = (extended_BS != blank) & (extended_BS != _shift(extended_BS, 2, blank))
    place_S = torch.arange(2 * N + 1, device=device)
    alpha_BS = torch.where(place_S < 2, logp_BTS[:, 0], _NEVER)
    for t in range(1, T):
        new_BS = logp_BTS[:, t] + _log_add(alpha_BS, skips_BS)
        alpha_BS = torch.where((t < input_lengths)[:, None], new_BS, alpha_BS)
    # A path ends in the last symbol or in the blank behind it.
    place_BS = place_S[None] - 2 * target_lengths[:, None]
    ends_BS = torch.where((place_BS == 0) | (place_BS == -1), alpha_BS, _NEVER)
    top_B1 = ends_BS.detach().amax(dim=1, keepdim=True)
    total_B = top_B1.squeeze(1) + (ends_BS - top_B1).exp().sum(dim=1).log()
    losses_B = torch.where(total_B <= 0.5 * _NEVER, math.inf, -total_B)
    return torch.where(bad_B, math.nan, losses_B)


def _log_add(alpha_BS: Float[Tensor, "B S"], skips_BS: Bool[Tensor, "B S"]) -> Float[Tensor, "B S"]:
    """Stay, one symbol on, or two where that skips nothing but a blank: logsumexp of the three.

    Written out: torch's logsumexp takes its gradient's weights from the rounded result, which costs bits where |α| is
    large.
    """
    skipped_BS = torch.where(skips_BS, _shift(alpha_BS, 2, _NEVER), _NEVER)
    paths = torch.stack([alpha_BS, _shift(alpha_BS, 1, _NEVER), skipped_BS])
    top_BS = paths.detach().amax(dim=0)
    return top_BS + (paths - top_BS).exp().sum(dim=0).log()


def _shift(x_BS: Tensor, by: int, fill: int | float) -> Tensor:
    """x[:, s − by], `fill` where there is none."""
    return F.pad(x_BS, (by, 0), value=fill)[:, : x_BS.shape[1]]


def _check_shapes(logits: Any, targets: Any, input_lengths: Any, target_lengths: Any, blank: Any) -> None:
    if logits.ndim != 3 or 0 in logits.shape or not logits.is_floating_point():
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and dtype {dtype_name(logits.dtype)}: must be floating of shape "
            "(B, T, V); give the output of CTCHead"
        )
    B, _, V = logits.shape
    shapes = {"targets": targets, "input_lengths": input_lengths, "target_lengths": target_lengths}
    for name, x in shapes.items():
        right = x.ndim == 2 and x.shape[0] == B if name == "targets" else tuple(x.shape) == (B,)
        if not right or x.is_floating_point() or x.dtype is torch.bool:
            raise ValueError(
                f"{name} have shape {tuple(x.shape)} and dtype {dtype_name(x.dtype)}: must be integers of shape "
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
