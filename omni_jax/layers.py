"""The layers between the embeddings and the logits, attention aside.

Shapes: B batch, T time, D model, H heads, d head size, C = d/2 channel pairs of RoPE, F feed-forward, V vocabulary,
E experts, N any number of tokens.

dtype=None means that the dtype of the parameters is the compute dtype, so that one graphdef serves float64, float32
and bfloat16 leaves. Norm statistics, RoPE's angles and the router's softmax stay in promote_types(dtype, float32),
whatever that dtype is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.core import Tracer
from jax.experimental import checkify
from jaxtyping import Array, Bool, Float, Int

from .init import bias_default, embedding_default, linear_default

__all__ = [
    "TokenIdError",
    "check_token_ids",
    "checked",
    "statistics_dtype",
    "TokenEmbedding",
    "RMSNorm",
    "rope_frequencies",
    "apply_rope",
    "SwiGLU",
    "GELUMLP",
    "MoE",
]


Arrays = TypeVar("Arrays", bound=tuple[Any, ...])
Given = ParamSpec("Given")
Result = TypeVar("Result")

# Part of jit's cache key: a program traced without the checks is not reused with them.
_checking = jax.make_user_context(default_value=False)


class TokenIdError(ValueError, IndexError):
    """A token id outside 0 … vocab_size − 1."""


def check_token_ids(tokens: Int[Array | np.ndarray, "*N"], vocab_size: int, name: str = "tokens") -> None:
    """Look at every id on the host; `name` is what the message calls them.

    Raises:
        TokenIdError: an id below 0 or from vocab_size up; the message gives the first one's place and value.
        ValueError: the ids are not integers.
    """
    ids = np.asarray(tokens)
    _check_integers(ids.dtype, name)
    bad = (ids < 0) | (ids >= vocab_size)
    if bad.any():
        at = np.argwhere(bad)[0].tolist()
        place = f"[{', '.join(map(str, at))}]" if at else ""
        raise TokenIdError(_not_an_id(f"{name}{place} = {int(ids[tuple(at)])}", vocab_size))


def checked(fn: Callable[Given, Result]) -> Callable[Given, Result]:
    """`fn` with the errors that cannot be raised inside jit, where else only NaN would tell.

    A compiled program cannot raise: an id out of range gives NaN there, and so does a full cache. Here the program
    hands out the first such fault, which is raised when the call is done. It is for finding a fault, not for speed:
    `fn` is traced at every call. It may be jitted, or contain jitted functions and loops.

    Raises:
        TokenIdError: a token id out of range.
        ValueError: a cache without room for the tokens.
    """

    @wraps(fn)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with _checking(True):
            error, result = checkify.checkify(fn, errors=checkify.user_checks)(*args, **kwargs)
        exception = error.get_exception()
        for kind in (TokenIdError, ValueError):
            # checkify carries text and numbers, no classes: ours start with the class's name.
            head, found, text = str(exception).partition(f"{kind.__name__}: ")
            if found and not head:
                raise kind(text.removesuffix(" (`check` failed)"))
        error.throw()
        return result

    return run


def check_inside(good: Bool[Array, ""], kind: type[ValueError], text: str, **numbers: Any) -> None:
    """Under `checked`, `kind` with `text` where `good` is False; without it nothing at all enters the program."""
    if _checking.value:
        checkify.check(good, f"{kind.__name__}: {text}", **numbers)


def _check_integers(dtype: Any, name: str) -> None:
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{name} must hold integers, got {dtype}; pass token ids")


def check_array(name: str, x: Any) -> None:
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise ValueError(f"{name} is a {type(x).__name__}, must be an array; pass jnp.asarray({name})")


def _not_an_id(what: str, vocab_size: int) -> str:
    return (
        f"{what} is not a token id of this model: allowed are 0 to {vocab_size - 1} (vocab_size={vocab_size}); encode "
        "with the tokenizer that belongs to the model"
    )


def statistics_dtype(dtype: Any) -> Any:
    """The dtype for sums that must not lose digits: promote_types(dtype, float32)."""
    # jnp.promote_types refuses to answer under strict dtype promotion.
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def cast_to_parameters(arrays: Arrays, /, *, dtype: Any = None, inexact: bool = True) -> Arrays:
    """flax's promote_dtype hook: (inputs, *parameters) in `dtype`, or in the parameters' own.

    flax's default promotes inputs and parameters to their common type, so that one float32 input would quietly turn
    a bfloat16 layer into a float32 one.
    """
    dtype = next(x.dtype for x in arrays[1:] if x is not None) if dtype is None else dtype
    return cast("Arrays", tuple(None if x is None else jnp.asarray(x, dtype) for x in arrays))


def _cast_to_statistics(arrays: Arrays, /, *, dtype: Any = None, inexact: bool = True) -> Arrays:
    return cast_to_parameters(arrays, dtype=statistics_dtype(arrays[1].dtype if dtype is None else dtype))


def make_linear(
    in_features: int,
    out_features: int,
    *,
    use_bias: bool = False,
    promote_dtype: Any = cast_to_parameters,
    rngs: nnx.Rngs,
    dtype: Any,
    param_dtype: Any,
) -> nnx.Linear:
    """nnx.Linear with every default written out, and weights drawn as torch draws them."""
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        precision=None,  # the caller's jax.default_matmul_precision decides
        kernel_init=linear_default,
        bias_init=bias_default(in_features),
        dot_general=lax.dot_general,
        promote_dtype=promote_dtype,
        preferred_element_type=None,
        rngs=rngs,
    )


def make_dropout(rate: float, rngs: nnx.Rngs) -> nnx.Dropout:
    """nnx.Dropout with every default written out; at rate 0 it holds no random state, so all state is parameters."""
    return nnx.Dropout(
        rate, broadcast_dims=(), deterministic=False, rng_collection="dropout", rngs=rngs if rate > 0.0 else None
    )


class TokenEmbedding(nnx.Embed):
    """Rows of a (V, D) table by token id.

    Inside somebody's jit an id out of range gives a row of NaN (nnx.Embed alone lets −1 wrap to the last row);
    `checked` makes that an error.

    Raises:
        TokenIdError: an id out of range where the ids are concrete.
    """

    def __init__(
        self, vocab_size: int, d_model: int, *, rngs: nnx.Rngs, dtype: Any = None, param_dtype: Any = jnp.float32
    ) -> None:
        super().__init__(
            vocab_size,
            d_model,
            dtype=dtype,
            param_dtype=param_dtype,
            embedding_init=embedding_default,
            promote_dtype=cast_to_parameters,
            rngs=rngs,
        )
        self.dtype = dtype  # nnx.Embed would pin the dtype of the table it was born with

    def __call__(self, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Ids (*B, T) to their rows of the table: (*B, T, D)."""
        if isinstance(tokens, Tracer):
            _check_integers(tokens.dtype, "tokens")
        else:
            check_token_ids(tokens, self.num_embeddings)
        ids = jnp.asarray(tokens)
        if ids.dtype.itemsize < 4:
            ids = ids.astype(jnp.int32)  # room for vocab_size itself
        if _checking.value:
            ids_N = jnp.ravel(ids)
            bad_N = (ids_N < 0) | (ids_N >= self.num_embeddings)
            first = ids_N[jnp.argmax(bad_N)]
            check_inside(~jnp.any(bad_N), TokenIdError, _not_an_id("{id}", self.num_embeddings), id=first)
        table_VD = self.embedding[...]
        if self.dtype is not None:
            table_VD = table_VD.astype(self.dtype)
        # "fill" takes a negative index from the end first, so it is sent beyond the table.
        ids = jnp.where(ids < 0, self.num_embeddings, ids)
        return jnp.take(table_VD, ids, axis=0, mode="fill", fill_value=jnp.nan)


class RMSNorm(nnx.RMSNorm):
    """x · rsqrt(mean(x²) + eps) · scale over the last axis.

    The statistics and the scale are applied before the cast back to the compute dtype. eps is written out: flax's own
    default is 1e-6, torch's is finfo(dtype).eps.

    Source: Zhang & Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467, equation 4.
    """

    def __init__(
        self, d_model: int, eps: float = 1e-5, *, rngs: nnx.Rngs, dtype: Any = None, param_dtype: Any = jnp.float32
    ) -> None:
        super().__init__(
            d_model,
            epsilon=eps,
            dtype=dtype,
            param_dtype=param_dtype,
            use_scale=True,
            scale_init=nnx.initializers.ones,
            reduction_axes=-1,
            feature_axes=-1,
            use_fast_variance=False,
            promote_dtype=cast_to_parameters,
            rngs=rngs,
        )

    # flax's own forward subtracts a mean of zeros and mixes dtypes, which strict promotion refuses.
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """x (*B, D), normalised over its last axis: (*B, D)."""
        assert self.scale is not None
        x, scale = self.promote_dtype((x, self.scale[...]), dtype=self.dtype)
        wide = statistics_dtype(x.dtype)
        x_wide = x.astype(wide)
        rms = lax.rsqrt(jnp.mean(jnp.square(x_wide), axis=-1, keepdims=True) + self.epsilon)
        scale_wide = jnp.reshape(scale.astype(wide), (1,) * (x.ndim - 1) + (-1,))
        return (x_wide * rms * scale_wide).astype(x.dtype)


def rope_frequencies(
    positions: Int[Array, "*B T"], head_dim: int, rope_theta: float = 10000.0, dtype: Any = jnp.float32
) -> tuple[Float[Array, "*B T C"], Float[Array, "*B T C"]]:
    """cos and sin of position · theta^(−2j/d) for the pairs j = 0 … d/2 − 1.

    Computed in promote_types(dtype, float32), for any position: there is no table to run out of.

    Source: Su et al., RoFormer, arXiv 2104.09864, section 3.2.2.
    """
    wide = statistics_dtype(dtype)
    exponent_C = jnp.arange(0, head_dim, 2, dtype=wide) / head_dim
    inv_freq_C = jnp.power(jnp.asarray(rope_theta, wide), -exponent_C)
    inv_freq = jnp.reshape(inv_freq_C, (1,) * positions.ndim + (-1,))
    angle_BTC = positions[..., None].astype(wide) * inv_freq
    return jnp.cos(angle_BTC), jnp.sin(angle_BTC)


def apply_rope(
    x_BTHd: Float[Array, "B T H d"], cos_BTC: Float[Array, "#B T C"], sin_BTC: Float[Array, "#B T C"]
) -> Float[Array, "B T H d"]:
    """Turn channel j and channel j + d/2 of every head by the angle of pair j (half-split, not interleaved).

    The product is taken in the dtype of the angles and rounded once to x's.
    """
    first, second = jnp.split(x_BTHd.astype(cos_BTC.dtype), 2, axis=-1)
    cos, sin = cos_BTC[:, :, None, :], sin_BTC[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTHd.dtype)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) · up(x)), without biases.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202, equation 6.
    """

    def __init__(
        self, d_model: int, d_ff: int, *, rngs: nnx.Rngs, dtype: Any = None, param_dtype: Any = jnp.float32
    ) -> None:
        kinds = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.gate_proj = make_linear(d_model, d_ff, **kinds)
        self.up_proj = make_linear(d_model, d_ff, **kinds)
        self.down_proj = make_linear(d_ff, d_model, **kinds)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """x (*B, D), through F hidden channels and back: (*B, D)."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class GELUMLP(nnx.Module):
    """fc2(gelu(fc1(x))), with biases and the exact GELU x·Φ(x).

    Source: Hendrycks & Gimpel, Gaussian Error Linear Units, arXiv 1606.08415, section 2.
    """

    def __init__(
        self, d_model: int, d_ff: int, *, rngs: nnx.Rngs, dtype: Any = None, param_dtype: Any = jnp.float32
    ) -> None:
        kinds = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.fc1 = make_linear(d_model, d_ff, use_bias=True, **kinds)
        self.fc2 = make_linear(d_ff, d_model, use_bias=True, **kinds)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """x (*B, D), through F hidden channels and back: (*B, D)."""
        # jax.nn.gelu's default is the tanh approximation, 4.7e-4 off. Its exact form goes through erfc and keeps bits
        # in the negative tail that torch's kernel, 1 + erf, cancels: written as torch has it, so that both err alike.
        h = self.fc1(x)
        return self.fc2(0.5 * h * (1.0 + jax.lax.erf(h * (0.5**0.5))))


class MoE(nnx.Module):
    """Σ over the k best experts of weight · expert(x), weights from a softmax over all experts.

    p = softmax(router(x)); the k largest p, divided by (their sum + 1e-8). Among equal p the lowest index wins.
    Router, weights and sum stay in promote_types(dtype, float32). Every expert sees every token, since shapes may not
    depend on values; what was not chosen is left out of the sum.

    Source: Shazeer et al., Outrageously Large Neural Networks, arXiv 1701.06538, equation 1; softmax before top-k and
    renormalised as in Mixtral (Jiang et al., arXiv 2401.04088, section 2.1), but for the 1e-8.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int = 8,
        num_experts_per_tok: int = 2,
        use_swiglu: bool = True,
        *,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ) -> None:
        kinds = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.num_experts_per_tok = num_experts_per_tok
        self.router = make_linear(d_model, num_experts, promote_dtype=_cast_to_statistics, **kinds)
        mlp = SwiGLU if use_swiglu else GELUMLP
        self.experts = nnx.List([mlp(d_model, d_ff, **kinds) for _ in range(num_experts)])

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """x (B, T, D), each token through its chosen experts: (B, T, D)."""
        logits_BTE = self.router(x)
        # Written out: jax.nn.softmax carries a derivative rule of its own, which hides the arithmetic from a jaxpr.
        shifted_BTE = logits_BTE - lax.stop_gradient(jnp.max(logits_BTE, axis=-1, keepdims=True))
        unnormalised_BTE = jnp.exp(shifted_BTE)
        p_BTE = unnormalised_BTE / jnp.sum(unnormalised_BTE, axis=-1, keepdims=True)
        weights, chosen = lax.top_k(p_BTE, self.num_experts_per_tok)  # the lowest index first among equals
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-8)
        y_BTD = jnp.zeros(x.shape, p_BTE.dtype)
        for e, expert in enumerate(self.experts):
            hit = chosen == e
            weight_BT1 = jnp.sum(jnp.where(hit, weights, 0.0), axis=-1, keepdims=True)
            # where, not a product: an expert that overflows on a token it was not given must not make it NaN.
            out_BTD = jnp.where(jnp.any(hit, axis=-1, keepdims=True), expert(x).astype(p_BTE.dtype), 0.0)
            y_BTD = y_BTD + weight_BT1 * out_BTD
        return y_BTD.astype(x.dtype)
