"""From a sound file to a mel spectrogram.

Shapes: B batch, N samples, T frames, F = n_fft // 2 + 1 frequencies, M mel bands.
"""

from __future__ import annotations

import math
import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float

from .audio_file import read_audio
from .layers import check_array, statistics_dtype
from .mel import (
    check_count,
    check_length,
    frames_per_second,
    hann_window,
    hz_to_mel,
    is_real,
    mel_filter_bank,
    mel_to_hz,
    num_frames,
    plot_mel,
)

__all__ = [
    "load_audio",
    "hz_to_mel",
    "mel_to_hz",
    "mel_filter_bank",
    "mel_spectrogram",
    "log_mel",
    "num_frames",
    "frames_per_second",
    "plot_mel",
]

_BLOCK = 256  # frames computed at once


def load_audio(path: str | os.PathLike[str], sample_rate: int = 16000) -> Float[Array, " N"]:
    """The wave of a sound file (WAV, FLAC, OGG, ...): (N,), float32, mono, at `sample_rate`.

    Integers are scaled to [−1, 1), channels averaged, other rates resampled by a windowed sinc (see
    audio_file.resample), in float64. A file that was cut off is read as far as it goes, where its format allows that.

    Raises:
        ValueError: the file is missing, empty, not a sound file or damaged; it has no samples, or NaN or Inf among
            them, or more than 536,870,912; sample_rate is not an integer from 1 up.
    """
    return jnp.asarray(read_audio(path, sample_rate))


def mel_spectrogram(
    wave: Float[Array, "B N"] | Float[Array, " N"],
    sample_rate: int = 16000,
    n_fft: int = 1024,
    hop_length: int = 160,
    win_length: int | None = None,
    n_mels: int = 128,
    f_min: float = 0.0,
    f_max: float | None = None,
    power: float = 2.0,
    center: bool = True,
    pad_mode: str = "reflect",
    norm: str | None = None,
    mel_scale: str = "htk",
) -> Float[Array, "B M T"] | Float[Array, "M T"]:
    """The mel spectrogram of each wave: (B, n_mels, T), or (n_mels, T) for one (N,); T is num_frames(N, ...).

        mel[m, t] = Σ_f bank[f, m]·|Σ_k hann[k]·x[t·hop + k]·exp(−2πi·f·k / n_fft)|^power

    torchaudio's definition. The window is a periodic Hann of win_length samples (n_fft where None) in the middle of
    n_fft. With `center` the wave is padded by n_fft // 2 on either side, "reflect"-ed at its first and last sample or
    by zeros ("constant", librosa's default), so that frame t is centred on sample t·hop_length. librosa's defaults are
    norm="slaney" and mel_scale="slaney". Computed in promote_types(dtype, float32). A silent frame has a gradient of 0.
    In float32 the error is below 1e-6 of the largest value, unless the loudest frequency lies outside f_min … f_max:
    then below 1e-6 times how much louder it is, since a Fourier transform errs in proportion to all of a frame.

    All arguments but `wave` are Python values: close over them in jit, vmap and grad. Inside jit a NaN stays NaN.

    Raises:
        ValueError: a wave of another rank or not floating, empty, with NaN, Inf or values whose power would be Inf, or
            too short for the padding or the window; what mel_filter_bank refuses; a hop, window, power or pad_mode that
            is not allowed.

    Source: Davis & Mermelstein, IEEE Transactions on Acoustics, Speech and Signal Processing 28 (1980).
    """
    win_length = n_fft if win_length is None else win_length
    _check_settings(n_fft, hop_length, win_length, power, pad_mode)
    power = float(power)
    _check_wave(wave, n_fft, power)
    wave_BN = jnp.asarray(wave) if wave.ndim == 2 else jnp.asarray(wave)[None]
    if center and pad_mode == "reflect":
        check_length(tuple(wave.shape), n_fft, 'give a longer one, a smaller n_fft, or pad_mode="constant"')
    num_frames(wave_BN.shape[1], n_fft, hop_length, center)
    bank_FM = mel_filter_bank(sample_rate, n_fft, n_mels, f_min, f_max, norm, mel_scale)
    wide = statistics_dtype(wave_BN.dtype)
    mel_BMT = _mel(
        wave_BN.astype(wide),
        jnp.asarray(hann_window(win_length), wide),
        jnp.asarray(bank_FM, wide),
        n_fft=int(n_fft),
        hop_length=int(hop_length),
        power=float(power),
        pad_mode=pad_mode if center else None,
    )
    return mel_BMT if wave.ndim == 2 else mel_BMT[0]


@partial(jax.jit, static_argnames=("n_fft", "hop_length", "power", "pad_mode"))
def _mel(
    wave_BN: Float[Array, "B N"],
    window_W: Float[Array, " W"],
    bank_FM: Float[Array, "F M"],
    *,
    n_fft: int,
    hop_length: int,
    power: float,
    pad_mode: Any,
) -> Float[Array, "B M T"]:
    """Jitted here, so that outside jit too the steps are fused; pad_mode None: no padding.

    In blocks of frames that stay in a CPU's cache: faster than all at once, and ten minutes need no more
    memory for what lies between wave and bands than a few seconds.
    """
    B = wave_BN.shape[0]
    T = num_frames(wave_BN.shape[1], n_fft, hop_length, pad_mode is not None)
    if pad_mode is not None:
        wave_BN = jnp.pad(wave_BN, ((0, 0), (n_fft // 2, n_fft // 2)), mode=pad_mode)
    # Only what lies under the window is cut out: where it stands in n_fft turns phases, not magnitudes.
    W = window_W.shape[0]
    first = (n_fft - W) // 2

    def frame(i: Array) -> Array:
        return lax.dynamic_slice(wave_BN, (i // T, first + i % T * hop_length), (1, W))[0]

    def bands(i_K: Array) -> Array:
        spectrum_KF = jnp.fft.rfft(jax.vmap(frame)(i_K) * window_W[None], n=n_fft, axis=-1)
        values_KF = jnp.square(spectrum_KF.real) + jnp.square(spectrum_KF.imag)
        if power != 2.0:
            # Where nothing is, |X|^p has no derivative for p ≤ 1: 0 is taken.
            sounding = values_KF > 0.0
            values_KF = jnp.where(sounding, jnp.power(jnp.where(sounding, values_KF, 1.0), power / 2.0), 0.0)
        # HIGHEST: accelerators would otherwise multiply in less than float32.
        return jnp.matmul(values_KF, bank_FM, precision=lax.Precision.HIGHEST)

    block = min(_BLOCK, B * T)
    blocks = -(-B * T // block)
    # The last block is filled up with its last frame.
    i_NK = jnp.minimum(jnp.arange(blocks * block, dtype=jnp.int32), B * T - 1)
    mel_NKM = lax.map(bands, jnp.reshape(i_NK, (blocks, block)))
    mel_BTM = jnp.reshape(jnp.reshape(mel_NKM, (blocks * block, -1))[: B * T], (B, T, -1))
    return jnp.swapaxes(mel_BTM, 1, 2)


def log_mel(mel: Float[Array, "*B"], floor: float = 1e-10) -> Float[Array, "*B"]:
    """ln(max(mel, floor)), of the same shape, in promote_types(dtype, float32); gradient 0 up to the floor.

    The floor is an absolute one: a louder clip in the batch changes nothing for the others. Times 10 / ln 10: decibels.

    Raises:
        ValueError: `mel` is not a floating array; a floor that is not positive, or 0 in that dtype.
    """
    check_array("mel", mel)
    if not jnp.issubdtype(mel.dtype, jnp.floating):
        raise ValueError(f"mel has dtype {mel.dtype}: must be floating; give mel_spectrogram's result")
    wide = statistics_dtype(mel.dtype)
    _check_floor(floor, float(jnp.finfo(wide).tiny))
    mel_wide = jnp.asarray(mel, wide)
    return jnp.log(jnp.where(mel_wide > floor, mel_wide, floor))


def _check_wave(wave: Any, n_fft: int, power: float) -> None:
    check_array("wave", wave)
    if wave.ndim not in (1, 2) or 0 in wave.shape:
        raise ValueError(
            f"wave has shape {tuple(wave.shape)}: must be (N,) or (B, N) with at least one sample; give the mono wave"
        )
    if not jnp.issubdtype(wave.dtype, jnp.floating):
        raise ValueError(f"wave has dtype {wave.dtype}: must be floating, in [−1, 1]; divide 16-bit samples by 32768.0")
    if isinstance(wave, Tracer):
        return  # its values are not known
    values = np.asarray(wave)
    peak = float(np.abs(values).max())
    if not math.isfinite(peak):
        first = np.argwhere(~np.isfinite(values))[0].tolist()
        raise ValueError(f"wave holds NaN or Inf, first at {first}: must be finite; cut the bad part out")
    _check_peak(peak, float(jnp.finfo(statistics_dtype(wave.dtype)).max), n_fft, power)


def _check_peak(peak: float, largest: float, n_fft: int, power: float) -> None:
    # |X| is at most n_fft·peak, and a band the sum of fewer than n_fft of its powers; |X|² is computed first.
    most = (largest / n_fft) ** (1.0 / max(power, 2.0)) / n_fft
    if peak > most:
        raise ValueError(
            f"wave reaches {peak:.1e}: must be at most {most:.1e}, or its power is Inf; scale it to [−1, 1]"
        )


def _check_settings(n_fft: int, hop_length: Any, win_length: Any, power: Any, pad_mode: Any) -> None:
    check_count("n_fft", n_fft)
    check_count("hop_length", hop_length)
    check_count("win_length", win_length)
    if win_length > n_fft:
        raise ValueError(f"win_length = {win_length}: must be at most n_fft = {n_fft}; give a larger n_fft")
    if not (is_real(power) and math.isfinite(power) and power > 0.0):
        raise ValueError(f"power = {power!r}: must be a positive number; give 2.0 for power, 1.0 for magnitude")
    if pad_mode not in ("reflect", "constant"):
        raise ValueError(f"pad_mode = {pad_mode!r}: must be one of 'reflect', 'constant'; give 'reflect'")


def _check_floor(floor: Any, smallest: float) -> None:
    if not (is_real(floor) and smallest <= floor < math.inf):
        raise ValueError(f"floor = {floor!r}: must be from {smallest:.1e} up, and finite; give for example 1e-10")
