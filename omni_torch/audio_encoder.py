"""AudioEncoderTiny: mel frames to a sequence of vectors; and the head that reads characters from it.

Shapes: B batch, T mel frames, M mel bands, U encoded frames (T over the downsampling factor, rounded up), D model,
H heads, d head size, C channels, F frequencies left, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .attention import _attend_fused, attend
from .layers import RMSNorm, check_tensor, dtype_name

__all__ = ["AudioEncoderTiny", "CTCHead"]

_MELS, _CHANNELS = 128, 64


class AudioEncoderTiny(nn.Module):
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
    ) -> None:
        super().__init__()
        _check_sizes(d, heads, ff, layers, dropout, downsample_factor)
        self.downsample_factor = downsample_factor
        four = _Down4x()
        self.down = four if downsample_factor == 4 else nn.ModuleList([four, _conv(_CHANNELS), _gelu()])
        self.proj = nn.Linear(_CHANNELS * (_MELS // downsample_factor), d)
        self.blocks = nn.ModuleList(_Block(d, heads, ff, dropout) for _ in range(layers))
        self.norm = RMSNorm(d)

    def forward(self, mel_BTM: Float[Tensor, "B T M"], lengths: Int[Tensor, " B"] | None = None) -> Any:
        """(B, T, 128) to (B, U, D); with `lengths`, (that, the lengths of its clips).

        The axes are those of mel_spectrogram's result with the last two swapped. `lengths` (B,) says how many frames
        of each clip are its own: what lies behind them is never read, so that a clip in a batch is as it is alone, and
        its result there is 0. U, and each length, is halved and rounded up once per convolution. A NaN in
        a clip's own frames makes its result NaN.

        Raises:
            ValueError: a mel of another rank, width or dtype; lengths of another shape, not integers, or outside
                1 … T (inside torch.compile: a clip without frames gives zeros, one with more than T has T).
        """
        check_mel(mel_BTM)
        B, T, _ = mel_BTM.shape
        if lengths is not None:
            _check_lengths(lengths, B, T)
            lengths = lengths.to(mel_BTM.device).clamp(0, T)
        x_BCTF = mel_BTM.to(self.proj.weight.dtype)[:, None]
        down: Any = self.down
        for layer in down.net if self.downsample_factor == 4 else (*down[0].net, *down[1:]):
            if isinstance(layer, nn.Conv2d):
                # A clip alone ends in the convolution's own zeros.
                x_BCTF = layer(_cut(x_BCTF, lengths, axis=2))
                lengths = None if lengths is None else (lengths + 1) // 2
            else:
                x_BCTF = layer(x_BCTF)
        U = x_BCTF.shape[2]
        x_BUD = self.proj(x_BCTF.transpose(1, 2).reshape(B, U, -1))  # channel outside, frequency inside
        mask_BUU = None if lengths is None else _kept(lengths, U)[:, None].expand(B, U, U)
        for block in self.blocks:
            x_BUD = block(x_BUD, mask_BUU)
        x_BUD = self.norm(x_BUD)
        return x_BUD if lengths is None else (_cut(x_BUD, lengths, axis=1), lengths)


class CTCHead(nn.Linear):
    """One linear layer with bias from (*B, d) to logits (*B, vocab_size), the blank of ctc_loss among them.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, d: int, vocab_size: int) -> None:
        _check_positive(d=d, vocab_size=vocab_size)
        super().__init__(d, vocab_size, bias=True)


class _Down4x(nn.Module):
    """Two convolutions, at the places 0 and 2 of `net`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(_conv(1), _gelu(), _conv(_CHANNELS), _gelu())


class _Block(nn.Module):
    """Pre-norm: x ← x + drop(out_proj(attention(norm1(x)))); x ← x + drop(mlp(norm2(x))); with biases."""

    def __init__(self, d: int, heads: int, ff: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = RMSNorm(d)
        self.qkv_proj = nn.Linear(d, 3 * d)
        self.out_proj = nn.Linear(d, d)
        self.norm2 = RMSNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, ff), _gelu(), nn.Linear(ff, d))
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BUD: Float[Tensor, "B U D"], mask_BUU: Bool[Tensor, "#B U U"] | None) -> Float[Tensor, "B U D"]:
        B, U, D = x_BUD.shape
        q, k, v = self.qkv_proj(self.norm1(x_BUD)).reshape(B, U, 3, self.heads, D // self.heads).unbind(2)
        if self.training and self.drop.p > 0.0:
            seen_BUU = x_BUD.new_ones((1, U, U), dtype=torch.bool) if mask_BUU is None else mask_BUU
            y_BUHd = attend(q, k, v, seen_BUU, dropout=self.drop)
        else:
            y_BUHd = _attend_fused(q, k, v, mask_BUU)
        x_BUD = x_BUD + self.drop(self.out_proj(y_BUHd.reshape(B, U, D)))
        return x_BUD + self.drop(self.mlp(self.norm2(x_BUD)))


def _gelu() -> nn.GELU:
    return nn.GELU(approximate="none")


def _conv(in_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, _CHANNELS, kernel_size=3, stride=2, padding=1, padding_mode="zeros")


def _kept(lengths: Int[Tensor, " B"], T: int) -> Bool[Tensor, "B T"]:
    return torch.arange(T, device=lengths.device)[None] < lengths[:, None]


def _cut(x: Tensor, lengths: Tensor | None, axis: int) -> Tensor:
    """x, zero along the time axis behind each clip's length; a NaN there does no harm, and has no gradient."""
    if lengths is None:
        return x
    shape = [1] * x.ndim
    shape[0], shape[axis] = x.shape[0], x.shape[axis]
    return x.masked_fill(~_kept(lengths, x.shape[axis]).reshape(shape), 0.0)


def check_mel(mel_BTM: Any) -> None:
    check_tensor("mel", mel_BTM)
    if mel_BTM.ndim != 3 or 0 in mel_BTM.shape or mel_BTM.shape[2] != _MELS:
        raise ValueError(
            f"mel has shape {tuple(mel_BTM.shape)}: must be (B, T, {_MELS}) with at least one clip and frame; swap the "
            f"last two axes of mel_spectrogram(wave, n_mels={_MELS})"
        )
    if not mel_BTM.is_floating_point():
        raise ValueError(f"mel has dtype {dtype_name(mel_BTM.dtype)}: must be floating; give mel_spectrogram's result")


def _check_lengths(lengths: Any, B: int, T: int) -> None:
    check_tensor("lengths", lengths)
    if tuple(lengths.shape) != (B,) or lengths.is_floating_point() or lengths.dtype is torch.bool:
        raise ValueError(
            f"lengths have shape {tuple(lengths.shape)} and dtype {dtype_name(lengths.dtype)}: must be integers of "
            f"shape {(B,)}; give each clip's number of frames"
        )
    if torch.compiler.is_compiling():
        return  # the values are not known
    for i, length in enumerate(lengths.tolist()):
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
