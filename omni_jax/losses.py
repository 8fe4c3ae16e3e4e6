"""Next-token cross-entropy with padding ignored.

Shapes: B batch, T time, V vocabulary, N any.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from .config import PAD_ID
from .layers import check_token_ids, statistics_dtype

__all__ = ["cross_entropy", "next_token_loss"]


def cross_entropy(
    logits: Float[Array, "*N V"], targets: Int[Array, "*N"], ignore_index: int = PAD_ID
) -> Float[Array, ""]:
    """Mean of logsumexp(logits) − logits[target] over the targets that are not `ignore_index`, in nats.

    Computed and returned in promote_types(dtype, float32). When every target is ignored: 0.0, with zero gradients.
    `ignore_index` is written out: PAD is 0 here; a label of −100 would wrap to class V − 100 in optax's loss. Inside
    jit a target out of range makes the loss NaN, and its row has no gradient.

    Raises:
        TokenIdError: a target outside 0 … V − 1 that is not `ignore_index`, where the targets are concrete.
        ValueError: shapes that do not fit, or targets that are not integers.
    """
    if tuple(logits.shape[:-1]) != tuple(targets.shape) or logits.ndim == 0:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}, logits {tuple(logits.shape)}: targets must have the shape of "
            "logits without its last axis; give one target per row of logits"
        )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets must hold integers, got {targets.dtype}; pass token ids")
    V = logits.shape[-1]
    if not isinstance(targets, Tracer):
        host = np.asarray(targets)
        check_token_ids(np.where(host != ignore_index, host, np.zeros_like(host)), V, "targets")
    targets = jnp.asarray(targets)
    keep = targets != ignore_index
    valid = (targets >= 0) & (targets < V)
    wide = logits.astype(statistics_dtype(logits.dtype))
    # Written out, as the softmax in attention is; rows are shifted by their largest logit so that exp cannot overflow.
    top = lax.stop_gradient(jnp.max(wide, axis=-1, keepdims=True))
    logsumexp = jnp.log(jnp.sum(jnp.exp(wide - top), axis=-1)) + jnp.squeeze(top, axis=-1)
    index = jnp.where(valid, targets, 0)
    picked = jnp.squeeze(jnp.take_along_axis(wide, index[..., None], axis=-1), axis=-1)
    nats = jnp.where(keep, jnp.where(valid, logsumexp - picked, jnp.nan), 0.0)
    return jnp.sum(nats) / jnp.maximum(jnp.sum(keep, dtype=jnp.int32), 1).astype(wide.dtype)


def next_token_loss(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], ignore_index: int = PAD_ID
) -> Float[Array, ""]:
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
