"""AudioEncoderTiny: mel frames to a sequence of vectors; and the head that reads characters from it.

Shapes: B batch, T mel frames, M mel bands, U encoded frames (T over the downsampling factor, rounded up), D model,
H heads, d head size, C channels, F frequencies left, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from .attention import attend
from .init import bias_default, linear_default
from .layers import RMSNorm, cast_to_parameters, check_array, make_dropout, make_linear

__all__ = ["AudioEncoderTiny", "CTCHead"]

_MELS, _CHANNELS = 128, 64


class AudioEncoderTiny(nnx.Module):
    """Strided convolutions over the mel spectrogram, then bidirectional transformer blocks; no positions.

    Two convolutions (three for a downsampling by 8), 3×3, stride 2, padding 1, each followed by the exact GELU, halve
    time and frequency; a linear layer makes vectors of size d of the channels × frequencies at each time; then `layers`
    blocks and an RMSNorm. Dropout is on attention probabilities and on both residual branches.

    Raises:
        ValueError: d, heads, ff or layers below 1, heads that do not divide d, dropout outside [0, 1), a
            downsample_factor other than 4 or 8.
    """

    def __init__(
        self,
        d: int = 192,
        heads: int = 3,
        ff: int = 768,
        layers: int = 4,
        dropout: float = 0.1,
        downsample_factor: int = 4,
        *,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ) -> None:
        _check_sizes(d, heads, ff, layers, dropout, downsample_factor)
        kinds = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.downsample_factor = downsample_factor
        self.dtype = dtype
        four = _Down4x(**kinds)
        self.down = four if downsample_factor == 4 else nnx.List([four, _conv(_CHANNELS, **kinds)])
        self.proj = make_linear(_CHANNELS * (_MELS // downsample_factor), d, use_bias=True, **kinds)
        self.blocks = nnx.List([_Block(d, heads, ff, dropout, **kinds) for _ in range(layers)])
        self.norm = RMSNorm(d, **kinds)

    def __call__(self, mel_BTM: Float[Array, "B T M"], lengths: Int[Array, " B"] | None = None) -> Any:
        """(B, T, 128) to (B, U, D); with `lengths`, (that, the lengths of its clips).

        The axes are those of mel_spectrogram's result with the last two swapped. `lengths` (B,) says how many frames
        of each clip are its own: what lies behind them is never read, so that a clip in a batch is as it is alone, and
        its result there is 0. U, and each length, is halved and rounded up once per convolution. A NaN in
        a clip's own frames makes its result NaN.

        Raises:
            ValueError: a mel of another rank, width or dtype; lengths of another shape, not integers, or outside
                1 … T (inside jit: a clip without frames gives zeros, one with more than T has T).
        """
        check_mel(mel_BTM)
        B, T, _ = mel_BTM.shape
        if lengths is not None:
            _check_lengths(lengths, B, T)
            lengths = jnp.clip(jnp.asarray(lengths).astype(jnp.int32), 0, T)
        x_BTFC = jnp.asarray(mel_BTM, self.proj.kernel.dtype if self.dtype is None else self.dtype)[..., None]
        down: Any = self.down
        for conv in (*down.net[::2],) if self.downsample_factor == 4 else (*down[0].net[::2], down[1]):
            # A clip alone ends in the convolution's own zeros.
            x_BTFC = _gelu(conv(_cut(x_BTFC, lengths)))
            lengths = None if lengths is None else (lengths + 1) // 2
        U = x_BTFC.shape[1]
        x_BUD = self.proj(jnp.reshape(jnp.swapaxes(x_BTFC, 2, 3), (B, U, -1)))  # channel outside, frequency inside
        kept_BU = jnp.ones((1, U), jnp.bool_) if lengths is None else _kept(lengths, U)
        mask_BUU = jnp.broadcast_to(kept_BU[:, None], (kept_BU.shape[0], U, U))
        for block in self.blocks:
            x_BUD = block(x_BUD, mask_BUU)
        x_BUD = self.norm(x_BUD)
        return x_BUD if lengths is None else (_cut(x_BUD, lengths), lengths)


class CTCHead(nnx.Linear):
    """One linear layer with bias from (*B, d) to logits (*B, vocab_size), the blank of ctc_loss among them.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self, d: int, vocab_size: int, *, rngs: nnx.Rngs, dtype: Any = None, param_dtype: Any = jnp.float32
    ) -> None:
        _check_positive(d=d, vocab_size=vocab_size)
        super().__init__(
            d,
            vocab_size,
            use_bias=True,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=None,  # the caller's jax.default_matmul_precision decides
            kernel_init=linear_default,
            bias_init=bias_default(d),
            dot_general=lax.dot_general,
            promote_dtype=cast_to_parameters,
            preferred_element_type=None,
            rngs=rngs,
        )


class _Down4x(nnx.Module):
    """Two convolutions, at the places 0 and 2 of `net`: between and after them stands a GELU, which has no weights."""

    def __init__(self, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any) -> None:
        kinds = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.net = nnx.List([_conv(1, **kinds), _GELU(), _conv(_CHANNELS, **kinds), _GELU()])


class _Block(nnx.Module):
    """Pre-norm: x ← x + drop(out_proj(attention(norm1(x)))); x ← x + drop(mlp(norm2(x))); with biases."""

    def __init__(
        self, d: int, heads: int, ff: int, dropout: float, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any
    ) -> None:
        kinds = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.heads = heads
        self.norm1 = RMSNorm(d, **kinds)
        self.qkv_proj = make_linear(d, 3 * d, use_bias=True, **kinds)
        self.out_proj = make_linear(d, d, use_bias=True, **kinds)
        self.norm2 = RMSNorm(d, **kinds)
        self.mlp = nnx.List(
            [make_linear(d, ff, use_bias=True, **kinds), _GELU(), make_linear(ff, d, use_bias=True, **kinds)]
        )
        self.drop = make_dropout(dropout, rngs)

    def __call__(self, x_BUD: Float[Array, "B U D"], mask_BUU: Bool[Array, "#B U U"]) -> Float[Array, "B U D"]:
        B, U, D = x_BUD.shape
        qkv = jnp.reshape(self.qkv_proj(self.norm1(x_BUD)), (B, U, 3, self.heads, D // self.heads))
        y_BUHd = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], mask_BUU, dropout=self.drop)
        x_BUD = x_BUD + self.drop(self.out_proj(jnp.reshape(y_BUHd, (B, U, D))))
        h = self.norm2(x_BUD)
        for layer in self.mlp:
            h = layer(h)
        return x_BUD + self.drop(h)


class _GELU(nnx.Module):
    """A module without weights, so that those after it stand at the places that their keys say."""

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return _gelu(x)


def _gelu(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    # The exact form, as GELUMLP has it; jax.nn.gelu's default is the tanh approximation.
    return 0.5 * x * (1.0 + jax.lax.erf(x * (0.5**0.5)))


def _conv(in_channels: int, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any) -> nnx.Conv:
    """nnx.Conv with every default written out: "SAME" with stride 2 would pad even sizes at one end only."""
    return nnx.Conv(
        in_channels,
        _CHANNELS,
        kernel_size=(3, 3),
        strides=(2, 2),
        padding=((1, 1), (1, 1)),
        input_dilation=1,
        kernel_dilation=1,
        feature_group_count=1,
        use_bias=True,
        dtype=dtype,
        param_dtype=param_dtype,
        precision=None,
        kernel_init=linear_default,
        bias_init=bias_default(9 * in_channels),
        promote_dtype=cast_to_parameters,
        rngs=rngs,
    )


def _kept(lengths: Int[Array, " B"], T: int) -> Bool[Array, "B T"]:
    return jnp.arange(T, dtype=lengths.dtype)[None] < lengths[:, None]


def _cut(x: Array, lengths: Array | None) -> Array:
    """x (B, T, ...), zero behind each clip's length; a NaN there does no harm, and has no gradient."""
    if lengths is None:
        return x
    kept = _kept(lengths, x.shape[1])
    return jnp.where(jnp.reshape(kept, kept.shape + (1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))


def check_mel(mel_BTM: Any) -> None:
    check_array("mel", mel_BTM)
    if mel_BTM.ndim != 3 or 0 in mel_BTM.shape or mel_BTM.shape[2] != _MELS:
        raise ValueError(
            f"mel has shape {tuple(mel_BTM.shape)}: must be (B, T, {_MELS}) with at least one clip and frame; swap the "
            f"last two axes of mel_spectrogram(wave, n_mels={_MELS})"
        )
    if not jnp.issubdtype(mel_BTM.dtype, jnp.floating):
        raise ValueError(f"mel has dtype {mel_BTM.dtype}: must be floating; give mel_spectrogram's result")


def _check_lengths(lengths: Any, B: int, T: int) -> None:
    check_array("lengths", lengths)
    if tuple(lengths.shape) != (B,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"lengths have shape {tuple(lengths.shape)} and dtype {lengths.dtype}: must be integers of shape {(B,)}; "
            "give each clip's number of frames"
        )
    if isinstance(lengths, Tracer):
        return  # the values are not known
    for i, length in enumerate(np.asarray(lengths).tolist()):
        if not 1 <= length <= T:
            raise ValueError(
                f"lengths[{i}] = {length}: must be from 1 to the {T} frames of mel; give num_frames of each clip"
            )


def _check_sizes(d: int, heads: int, ff: int, layers: int, dropout: float, downsample_factor: int) -> None:
    _check_positive(d=d, heads=heads, ff=ff, layers=layers)
    if d % heads:
        raise ValueError(f"heads = {heads}: must divide d = {d}; give a d that is a multiple of heads")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout = {dropout!r}: must be in [0, 1); give for example 0.1")
    if downsample_factor not in (4, 8):
        raise ValueError(f"downsample_factor = {downsample_factor!r}: must be 4 or 8; give 4")


def _check_positive(**sizes: Any) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} = {value!r}: must be an integer from 1 up; give for example {name}=192")
