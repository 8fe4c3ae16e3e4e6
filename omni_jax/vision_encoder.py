"""ViTTiny, the encoder of pictures.

Shapes: B batch, H height, W width, N patches, T = 1 + N tokens (CLS first), D model.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from .attention import attend
from .init import bias_default, init_linear, linear_default
from .layers import RMSNorm, cast_to_parameters, make_dropout, make_linear, statistics_dtype
from .vision import check_images, resize_positions

__all__ = ["ViTTiny"]


class _LayerNorm(nnx.LayerNorm):
    """(x − mean) · rsqrt(variance + eps) · scale + bias, the statistics in promote_types(dtype, float32)."""

    def __init__(self, d: int, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any) -> None:
        super().__init__(
            d,
            epsilon=1e-5,  # flax's default is 1e-6
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=True,
            use_scale=True,
            bias_init=nnx.initializers.zeros,
            scale_init=nnx.initializers.ones,
            reduction_axes=-1,
            feature_axes=-1,
            use_fast_variance=False,  # E[x²] − E[x]² cancels where the mean is large
            promote_dtype=cast_to_parameters,
            rngs=rngs,
        )

    # flax's own forward mixes dtypes, which strict promotion refuses.
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        assert self.scale is not None
        assert self.bias is not None
        x, scale, bias = self.promote_dtype((x, self.scale[...], self.bias[...]), dtype=self.dtype)
        wide = statistics_dtype(x.dtype)
        x_wide = x.astype(wide)
        x_wide = x_wide - jnp.mean(x_wide, axis=-1, keepdims=True)
        spread = lax.rsqrt(jnp.mean(jnp.square(x_wide), axis=-1, keepdims=True) + self.epsilon)
        scale, bias = (jnp.reshape(p.astype(wide), (1,) * (x.ndim - 1) + (-1,)) for p in (scale, bias))
        return (x_wide * spread * scale + bias).astype(x.dtype)


class _SelfAttention(nnx.Module):
    """Multi-head attention of every token to every token, with the parameters of torch's nn.MultiheadAttention.

    Columns of in_proj are q, k, v in this order. They start as torch's do: in_proj Xavier, biases 0.
    """

    def __init__(self, d: int, heads: int, dropout: float, **kinds: Any) -> None:
        self.heads = heads
        self.in_proj = init_linear(make_linear(d, 3 * d, use_bias=True, **kinds), kinds["rngs"].params(), "xavier")
        self.out_proj = make_linear(d, d, use_bias=True, **kinds)
        self.out_proj.bias = nnx.Param(jnp.zeros((d,), kinds["param_dtype"]))
        self.drop = make_dropout(dropout, kinds["rngs"])

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        B, T, D = x_BTD.shape
        projected = jnp.split(self.in_proj(x_BTD), 3, axis=-1)
        q, k, v = (jnp.reshape(part, (B, T, self.heads, D // self.heads)) for part in projected)
        y_BTHd = attend(q, k, v, jnp.ones((1, T, T), jnp.bool_), dropout=self.drop)
        return self.out_proj(jnp.reshape(y_BTHd, (B, T, D)))


class _Block(nnx.Module):
    """x ← x + drop(self_attn(norm1(x))); x ← x + drop(linear2(drop(gelu(linear1(norm2(x)))))).

    What torch's nn.TransformerEncoderLayer(norm_first=True) computes and how it names its parameters. The outputs of
    the branches and of the block are named in the trace, by the dotted paths of the modules they come from.
    """

    def __init__(self, d: int, heads: int, ff: int, dropout: float, name: str, **kinds: Any) -> None:
        self.name = name
        self.self_attn = _SelfAttention(d, heads, dropout, **kinds)
        self.linear1 = make_linear(d, ff, use_bias=True, **kinds)
        self.linear2 = make_linear(ff, d, use_bias=True, **kinds)
        self.norm1 = _LayerNorm(d, **kinds)
        self.norm2 = _LayerNorm(d, **kinds)
        self.drop = make_dropout(dropout, kinds["rngs"])

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        y_BTD = self.self_attn(self.norm1(x_BTD))
        x_BTD = x_BTD + self.drop(checkpoint_name(y_BTD, f"{self.name}.self_attn"))
        # The exact GELU as torch has it, x·(1 + erf(x/√2))/2; jax.nn.gelu's default is the tanh approximation.
        hidden = self.linear1(self.norm2(x_BTD))
        hidden = 0.5 * hidden * (1.0 + lax.erf(hidden * (0.5**0.5)))
        y_BTD = self.linear2(self.drop(hidden))
        x_BTD = x_BTD + self.drop(checkpoint_name(y_BTD, f"{self.name}.linear2"))
        return checkpoint_name(x_BTD, self.name)


class ViTTiny(nnx.Module):
    """Vision transformer: patches by convolution, CLS token, learned positions, pre-norm blocks, RMSNorm.

    Images (B, 3, H, W) in [0, 1] become a vector for the whole picture and one for each patch. Positions are learned
    for img_size × img_size and interpolated (`resize_positions`) for any other size, so one model takes them all.
    Weights start from torch's default initialisation, cls and pos from 0. A new model is in training mode: call
    `model.eval()` before inference, or dropout is on.

    Args:
        img_size: height and width that the positions are learned for, in pixels.
        patch: side of a patch in pixels.
        d, layers, heads, ff, dropout: width, number of blocks, of attention heads, hidden width, dropout.
        name: the dotted path of this encoder in a model that owns it: what is named in the trace begins with it.
        dtype: the compute dtype, None for the parameters' own; `param_dtype` is what the parameters are stored in.

    Raises:
        ValueError: a number out of range, an img_size that patch does not divide, a d that heads does not divide.

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv 2010.11929.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch: int = 16,
        d: int = 192,
        layers: int = 12,
        heads: int = 3,
        ff: int = 768,
        dropout: float = 0.1,
        *,
        name: str = "",
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ) -> None:
        _check_settings(img_size, patch, d, layers, heads, ff, dropout)
        kinds = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.prefix = f"{name}." if name else ""
        self.patch = patch
        self.grid = (img_size // patch, img_size // patch)
        self.proj = nnx.Conv(
            3,
            d,
            kernel_size=(patch, patch),
            strides=(patch, patch),
            padding="VALID",
            use_bias=True,
            precision=None,  # the caller's jax.default_matmul_precision decides
            kernel_init=linear_default,
            bias_init=bias_default(3 * patch * patch),
            promote_dtype=cast_to_parameters,
            **kinds,
        )
        self.cls = nnx.Param(jnp.zeros((1, 1, d), param_dtype))
        self.pos = nnx.Param(jnp.zeros((1, 1 + self.grid[0] * self.grid[1], d), param_dtype))
        names = [f"{self.prefix}blocks.{i}" for i in range(layers)]
        self.blocks = nnx.List([_Block(d, heads, ff, dropout, name, **kinds) for name in names])
        self.norm = RMSNorm(d, **kinds)

    def __call__(self, images_B3HW: Float[Array, "B 3 H W"]) -> tuple[Float[Array, "B 1 D"], Float[Array, "B N D"]]:
        """Images (B, 3, H, W) to (the CLS token's vector (B, 1, D), the patches' row by row (B, N, D)).

        A NaN in an image makes both NaN.

        Raises:
            ValueError: images of another shape, not floating (levels of 0 … 255 must be divided by 255 first), or of
                sides that patch does not divide.
        """
        check_images(images_B3HW, self.patch)
        if not jnp.issubdtype(images_B3HW.dtype, jnp.floating):
            raise ValueError(
                f"images have dtype {images_B3HW.dtype}: must be floating point, in [0, 1]; pass images / 255"
            )
        patches_BhwD = self.proj(jnp.transpose(images_B3HW, (0, 2, 3, 1)))  # colours last, as XLA has them
        B, rows, columns, D = patches_BhwD.shape
        pos = resize_positions(self.pos[...], self.grid, (rows, columns)).astype(patches_BhwD.dtype)
        cls = jnp.broadcast_to(self.cls[...].astype(patches_BhwD.dtype), (B, 1, D))
        x_BTD = jnp.concatenate([cls, jnp.reshape(patches_BhwD, (B, rows * columns, D))], axis=1) + pos
        for block in self.blocks:
            x_BTD = block(x_BTD)
        x_BTD = checkpoint_name(self.norm(x_BTD), f"{self.prefix}norm")
        return x_BTD[:, :1], x_BTD[:, 1:]


def _check_settings(img_size: Any, patch: Any, d: Any, layers: Any, heads: Any, ff: Any, dropout: Any) -> None:
    counts = {"img_size": img_size, "patch": patch, "d": d, "layers": layers, "heads": heads, "ff": ff}
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} = {value!r} must be an integer from 1 up; the family's is in the signature")
    for name, value, divisor, by in (("img_size", img_size, "patch", patch), ("d", d, "heads", heads)):
        if value % by:
            raise ValueError(f"{name} = {value} must be a multiple of {divisor} = {by}; change one of them")
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout = {dropout!r} must be a number from 0 to below 1; give for example 0.1")
