"""Next-token cross-entropy with padding ignored.

Shapes: B batch, T time, V vocabulary, N any.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .config import PAD_ID
from .layers import check_token_ids, statistics_dtype

__all__ = ["cross_entropy", "next_token_loss"]


def cross_entropy(
    logits: Float[Tensor, "*N V"], targets: Int[Tensor, "*N"], ignore_index: int = PAD_ID
) -> Float[Tensor, ""]:
    """Mean of logsumexp(logits) − logits[target] over the targets that are not `ignore_index`, in nats.

    Computed and returned in promote_types(dtype, float32). When every target is ignored: 0.0, with zero gradients.
    `ignore_index` is written out: PAD is 0 here, torch's own default is −100.

    Raises:
        TokenIdError: a target outside 0 … V − 1 that is not `ignore_index`.
        ValueError: shapes that do not fit, or targets that are not integers.
    """
    if tuple(logits.shape[:-1]) != tuple(targets.shape) or logits.ndim == 0:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}, logits {tuple(logits.shape)}: targets must have the shape of "
            "logits without its last axis; give one target per row of logits"
        )
    keep = targets != ignore_index
    if not torch.compiler.is_compiling():  # inside torch.compile the values are not known
        check_token_ids(targets.where(keep, 0), logits.shape[-1], "targets")
    wide = logits.to(statistics_dtype(logits.dtype)).reshape(-1, logits.shape[-1])
    total = F.cross_entropy(wide, targets.reshape(-1).long(), ignore_index=ignore_index, reduction="sum")
    return total / keep.sum().clamp(min=1)


def next_token_loss(
    logits: Float[Tensor, "B T V"], tokens: Int[Tensor, "B T"], ignore_index: int = PAD_ID
) -> Float[Tensor, ""]:
    """cross_entropy of logits[:, t] against tokens[:, t + 1]: the last position predicts nothing that is known.

    Raises:
        TokenIdError, ValueError: as `cross_entropy`; ValueError for fewer than two tokens.
    """
    if logits.ndim != 3 or tuple(logits.shape[:2]) != tuple(tokens.shape) or tokens.shape[1] < 2:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}, tokens {tuple(tokens.shape)}: must be (B, T, V) and (B, T) with "
            "T at least 2; pass the tokens that the logits were computed from"
        )
    return cross_entropy(logits[:, :-1], tokens[:, 1:], ignore_index)
