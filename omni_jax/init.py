"""Initial weights: Xavier, Kaiming, zero, and the default that both twins share (torch's own, written out).

All of them are Flax initializers, `(key, shape, dtype) → array`, and go into nnx layers as kernel_init, bias_init or
embedding_init. Every uniform draw is half-open, U[−bound, bound): rounding may place a draw on −bound, never outside
±bound. Draws are made in promote_types(dtype, float32) and rounded once (so a bfloat16 draw can touch both bounds).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

__all__ = [
    "fan_in_fan_out",
    "xavier_uniform",
    "kaiming_uniform",
    "init_linear",
    "linear_default",
    "bias_default",
    "embedding_default",
]

# torch.nn.init.calculate_gain's table; leaky_relu with its default slope 0.01.
_GAINS = {
    "linear": 1.0,
    "sigmoid": 1.0,
    "tanh": 5.0 / 3.0,
    "relu": math.sqrt(2.0),
    "leaky_relu": math.sqrt(2.0 / (1.0 + 0.01**2)),
    "selu": 0.75,
}
_SCHEMES = ("xavier", "kaiming_relu", "zero")


def fan_in_fan_out(weight: Any) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight in Flax's layout: the last axis is the output, the one before it the input.

    Linear kernel (in, out); Conv kernel (*taps, in / groups, out), HWIO for images: both fans count every tap; an
    embedding (V, D): V and D, by the same rule (torch's layout makes it D and V). `weight` is anything with a shape.

    Raises ValueError below two dimensions, and for what has no shape.

    >>> fan_in_fan_out(jnp.zeros((5, 3))), fan_in_fan_out(jnp.zeros((3, 3, 4, 6)))
    ((5, 3), (36, 54))
    """
    if not hasattr(weight, "shape"):
        raise ValueError(f"weight must be an array, got {type(weight).__name__}; pass the weight itself")
    shape = tuple(weight.shape)
    if len(shape) < 2:
        raise ValueError(
            f"weight must have at least 2 dimensions (..., in, out), got shape {shape}; for a bias use bias_default, "
            "for a norm ones"
        )
    taps = math.prod(shape[:-2])
    return shape[-2] * taps, shape[-1] * taps


def xavier_uniform(
    key: Array, shape: Sequence[int], dtype: Any = jnp.float32, *, gain: float = 1.0
) -> Float[Array, "*shape"]:
    """U(±gain·√(6 / (fan_in + fan_out))); variance gain²·2 / (fan_in + fan_out).

    shape: (..., in, out). Keeps the variance of signals forward and of gradients backward through linear layers, as
    well as one number can do both.

    Raises ValueError below two dimensions, for a dtype that is not floating, for a gain that is negative or not finite.
    Source: Glorot & Bengio, AISTATS 2010, equation 16.

    >>> weight = xavier_uniform(jax.random.key(0), (400, 200))
    >>> bool(abs(weight).max() <= (6 / 600) ** 0.5), round(float(weight.std()), 2)  # √(2 / 600) = 0.058
    (True, 0.06)
    """
    if not (isinstance(gain, numbers.Real) and math.isfinite(gain) and gain >= 0.0):
        raise ValueError(f"gain must be finite and ≥ 0, got {gain!r}; pass for example gain=1.0")
    fans = sum(_fans(shape))
    return _uniform(key, shape, dtype, gain * math.sqrt(6.0 / fans) if fans else 0.0)


def kaiming_uniform(
    key: Array, shape: Sequence[int], dtype: Any = jnp.float32, *, nonlinearity: str = "relu"
) -> Float[Array, "*shape"]:
    """U(±gain·√(3 / fan_in)); variance gain² / fan_in.

    shape: (..., in, out). Keeps the second moment of signals through layers of that nonlinearity. Gains: linear 1,
    sigmoid 1, tanh 5/3, relu √2, leaky_relu √(2 / (1 + 0.01²)), selu 3/4.

    Raises ValueError below two dimensions, for a dtype that is not floating, for an unknown nonlinearity.
    Source: He et al., arXiv 1502.01852, equation 10 (fan_in mode).
    """
    gain = _gain(nonlinearity)
    fan_in, _ = _fans(shape)
    return _uniform(key, shape, dtype, gain * math.sqrt(3.0 / fan_in) if fan_in else 0.0)


def init_linear(layer: nnx.Linear, key: Array, scheme: str = "xavier") -> nnx.Linear:
    """A new Linear layer like `layer`: kernel by `scheme`, bias (if there is one) always zero. `layer` stays as it is.

    scheme: "xavier", "kaiming_relu" or "zero" (weights too, and nothing is drawn from `key`: its outputs, and the
    gradients behind it, are then 0).

    Raises ValueError for an unknown scheme and for anything that is not an nnx.Linear.

    >>> layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> init_linear(layer, jax.random.key(0), "xavier").bias[...].tolist()
    [0.0, 0.0]
    """
    if not isinstance(layer, nnx.Linear):
        raise ValueError(
            f"layer must be an nnx.Linear, got {type(layer).__name__}; for a bare kernel use xavier_uniform or "
            "kaiming_uniform"
        )
    if scheme not in _SCHEMES:
        raise ValueError(
            f"scheme must be one of {', '.join(_SCHEMES)}, got {scheme!r}; pass one of these, for example 'xavier'"
        )
    layer = nnx.clone(layer)
    shape, dtype = layer.kernel.shape, layer.kernel.dtype
    if scheme == "xavier":
        kernel = xavier_uniform(key, shape, dtype)
    elif scheme == "kaiming_relu":
        kernel = kaiming_uniform(key, shape, dtype, nonlinearity="relu")
    else:
        kernel = jnp.zeros(shape, dtype)
    layer.kernel.set_value(kernel)
    if layer.bias is not None:
        layer.bias.set_value(jnp.zeros(layer.bias.shape, layer.bias.dtype))
    return layer


def linear_default(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Float[Array, "*shape"]:
    """U(±1/√fan_in): what torch gives Linear and Conv weights (flax's own default is lecun_normal, √3 times as wide).

    shape: (..., in, out).

    Raises ValueError below two dimensions and for a dtype that is not floating.
    """
    fan_in, _ = _fans(shape)
    return _uniform(key, shape, dtype, 1.0 / math.sqrt(fan_in) if fan_in else 0.0)


def bias_default(fan_in: int) -> Callable[..., Float[Array, "*shape"]]:
    """An initializer of U(±1/√fan_in), with the fan_in of the kernel that the bias belongs to (flax's default is 0).

    Raises ValueError for a negative fan_in; the initializer raises it for a dtype that is not floating.
    """
    if not (isinstance(fan_in, numbers.Real) and fan_in >= 0):
        raise ValueError(
            f"fan_in must be a number ≥ 0, got {fan_in!r}; pass fan_in_fan_out(weight)[0] of the bias's weight"
        )
    bound = 1.0 / math.sqrt(fan_in) if fan_in else 0.0

    def initializer(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Float[Array, "*shape"]:
        return _uniform(key, shape, dtype, bound)

    return initializer


def embedding_default(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Float[Array, "*shape"]:
    """N(0, 1): torch's Embedding (flax's own default has standard deviation 1/√D).

    shape: any, (V, D) for an embedding.

    Raises ValueError for a dtype that is not floating.
    """
    return jax.random.normal(key, tuple(shape), _wide(dtype)).astype(dtype)


def _fans(shape: Sequence[int]) -> tuple[int, int]:
    return fan_in_fan_out(jax.ShapeDtypeStruct(tuple(shape), jnp.float32))


def _uniform(key: Array, shape: Sequence[int], dtype: Any, bound: float) -> Float[Array, "*shape"]:
    return jax.random.uniform(key, tuple(shape), _wide(dtype), minval=-bound, maxval=bound).astype(dtype)


def _wide(dtype: Any) -> jnp.dtype:
    """promote_types(dtype, float32), which strict dtype promotion refuses to say for bfloat16."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"an initial weight must have a real floating dtype, got {dtype}; pass for example dtype=jnp.float32"
        )
    return jnp.dtype(dtype) if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)


def _gain(nonlinearity: str) -> float:
    if not isinstance(nonlinearity, str) or nonlinearity not in _GAINS:
        raise ValueError(
            f"nonlinearity must be one of {', '.join(_GAINS)}, got {nonlinearity!r}; pass the nearest of these"
        )
    return _GAINS[nonlinearity]
