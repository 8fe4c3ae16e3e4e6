"""lax.conv_general_dilated in numpy: compiling it anew for every set of shapes would take longer than everything else.

Shapes: N batch, C input channels, O output channels, X output positions, W window positions.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = ["convolve"]


def convolve(left: np.ndarray, right: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    """The convolution that `params`, those of the equation, tell: windows cut out, then one product per group."""
    layout = params["dimension_numbers"]
    x_NC = _dilate(left.transpose(layout.lhs_spec), params["lhs_dilation"], params["padding"])
    w_OC = right.transpose(layout.rhs_spec)
    groups, batches = params["feature_group_count"], params["batch_group_count"]
    if batches > 1:  # the groups of the batch are those of the channels
        x_NC = np.concatenate(np.split(x_NC, batches, axis=0), axis=1)
        groups = batches
    window, rank = w_OC.shape[2:], w_OC.ndim - 2
    spans = [(n - 1) * d + 1 for n, d in zip(window, params["rhs_dilation"])]
    places = [max(0, (n - s) // by + 1) for n, s, by in zip(x_NC.shape[2:], spans, params["window_strides"])]
    N, C, O = x_NC.shape[0], w_OC.shape[1], w_OC.shape[0] // groups
    if not all(places):
        out = np.zeros((N, O * groups, *places))
    else:
        cut = np.lib.stride_tricks.sliding_window_view(x_NC, spans, axis=tuple(range(2, 2 + rank)))
        at = [slice(None, None, by) for by in params["window_strides"]]
        inside = [slice(None, None, d) for d in params["rhs_dilation"]]
        cut = cut[(slice(None), slice(None), *at, *inside)]
        cut = cut.reshape(N, groups, C, *places, *window)
        # (groups, N · X, C · W) @ (groups, C · W, O)
        to = (1, 0, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank))
        rows = cut.transpose(to).reshape(groups, N * math.prod(places), -1)
        out = rows @ w_OC.reshape(groups, O, -1).transpose(0, 2, 1)
        out = out.reshape(groups, N, *places, O).transpose(1, 0, 2 + rank, *range(2, 2 + rank))
        out = out.reshape(N, groups * O, *places)
    return out.transpose(np.argsort(layout.out_spec))


def _dilate(x_NC: np.ndarray, dilation: Any, padding: Any) -> np.ndarray:
    """Zeros between the elements and around them; padding below 0 cuts."""
    if all(d == 1 for d in dilation) and not any(map(any, padding)):
        return x_NC
    whole = [max(0, (n - 1) * d + 1) for n, d in zip(x_NC.shape[2:], dilation)]
    sizes = [n + low + high for n, (low, high) in zip(whole, padding)]
    out = np.zeros((*x_NC.shape[:2], *(max(0, n) for n in sizes)), x_NC.dtype)
    target, source = [slice(None)] * 2, [slice(None)] * 2
    for n, d, (low, _), size in zip(x_NC.shape[2:], dilation, padding, sizes):
        first = max(0, -(low // d)) if low < 0 else 0
        last = min(n, (size - 1 - low) // d + 1)
        target.append(slice(low + first * d, max(low + first * d, low + (last - 1) * d + 1), d))
        source.append(slice(first, max(first, last)))
    out[tuple(target)] = x_NC[tuple(source)]
    return out
