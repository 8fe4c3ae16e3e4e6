"""From a sound file to a mel spectrogram.

Shapes: B batch, N samples, T frames, F = n_fft // 2 + 1 frequencies, M mel bands.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .audio_file import read_audio
from .layers import check_tensor, dtype_name, statistics_dtype
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


def load_audio(path: str | os.PathLike[str], sample_rate: int = 16000) -> Float[Tensor, " N"]:
    """The wave of a sound file (WAV, FLAC, OGG, ...): (N,), float32, mono, at `sample_rate`.

    Integers are scaled to [−1, 1), channels averaged, other rates resampled by a windowed sinc (see
    audio_file.resample), in float64. A file that was cut off is read as far as it goes, where its format allows that.

    Raises:
        ValueError: the file is missing, empty, not a sound file or damaged; it has no samples, or NaN or Inf among
            them, or more than 536,870,912; sample_rate is not an integer from 1 up.
    """
    return torch.from_numpy(read_audio(path, sample_rate))


def mel_spectrogram(
    wave: Float[Tensor, "B N"] | Float[Tensor, " N"],
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
) -> Float[Tensor, "B M T"] | Float[Tensor, "M T"]:
    """The mel spectrogram of each wave: (B, n_mels, T), or (n_mels, T) for one (N,); T is num_frames(N, ...).

        mel[m, t] = Σ_f bank[f, m]·|Σ_k hann[k]·x[t·hop + k]·exp(−2πi·f·k / n_fft)|^power

    torchaudio's definition. The window is a periodic Hann of win_length samples (n_fft where None) in the middle of
    n_fft. With `center` the wave is padded by n_fft // 2 on either side, "reflect"-ed at its first and last sample or
    by zeros ("constant", librosa's default), so that frame t is centred on sample t·hop_length. librosa's defaults are
    norm="slaney" and mel_scale="slaney". Computed in promote_types(dtype, float32). A silent frame has a gradient of 0.
    In float32 the error is below 1e-6 of the largest value, unless the loudest frequency lies outside f_min … f_max:
    then below 1e-6 times how much louder it is, since a Fourier transform errs in proportion to all of a frame.

    All arguments but `wave` are Python values. Inside torch.func.vmap a NaN stays NaN. torch.compile cannot enter it,
    since window and filter bank are made by numpy: give a compiled function the spectrogram.

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
    wave_BN = wave if wave.ndim == 2 else wave[None]
    if center and pad_mode == "reflect":
        check_length(tuple(wave.shape), n_fft, 'give a longer one, a smaller n_fft, or pad_mode="constant"')
    num_frames(wave_BN.shape[1], n_fft, hop_length, center)
    bank_FM = mel_filter_bank(sample_rate, n_fft, n_mels, f_min, f_max, norm, mel_scale)
    wide = statistics_dtype(wave_BN.dtype)
    mel_BMT = _mel(
        wave_BN.to(wide),
        torch.tensor(hann_window(win_length), dtype=wide, device=wave.device),
        torch.tensor(bank_FM, dtype=wide, device=wave.device),
        n_fft=int(n_fft),
        hop_length=int(hop_length),
        power=float(power),
        pad_mode=pad_mode if center else None,
    )
    return mel_BMT if wave.ndim == 2 else mel_BMT[0]


def _mel(
    wave_BN: Float[Tensor, "B N"],
    window_W: Float[Tensor, " W"],
    bank_FM: Float[Tensor, "F M"],
    *,
    n_fft: int,
    hop_length: int,
    power: float,
    pad_mode: Any,
) -> Float[Tensor, "B M T"]:
    """pad_mode None: no padding.

    In blocks of frames that stay in a CPU's cache: faster than all at once, and without gradients ten minutes need no
    more memory for what lies between wave and bands than a few seconds.
    """
    if pad_mode is not None:
        wave_BN = F.pad(wave_BN, (n_fft // 2, n_fft // 2), mode=pad_mode)
    # Only what lies under the window is cut out: where it stands in n_fft turns phases, not magnitudes.
    W = window_W.shape[0]
    left = (n_fft - W) // 2
    frames_BTW = wave_BN[:, left : wave_BN.shape[1] - (n_fft - W - left)].unfold(1, W, hop_length)

    def bands(frames_BKW: Tensor) -> Tensor:
        spectrum_BKF = torch.fft.rfft(frames_BKW * window_W, n=n_fft, dim=-1)
        values_BKF = spectrum_BKF.real.square() + spectrum_BKF.imag.square()
        if power != 2.0:
            # Where nothing is, |X|^p has no derivative for p ≤ 1: 0 is taken.
            sounding = values_BKF > 0.0
            values_BKF = torch.where(sounding, torch.where(sounding, values_BKF, 1.0).pow(power / 2.0), 0.0)
        return values_BKF @ bank_FM

    block = max(1, _BLOCK // wave_BN.shape[0])
    if torch.compiler.is_compiling():
        block = frames_BTW.shape[1]  # the loop would be unrolled
    return torch.cat([bands(frames) for frames in frames_BTW.split(block, dim=1)], dim=1).transpose(1, 2)


def log_mel(mel: Float[Tensor, "*B"], floor: float = 1e-10) -> Float[Tensor, "*B"]:
    """ln(max(mel, floor)), of the same shape, in promote_types(dtype, float32); gradient 0 up to the floor.

    The floor is an absolute one: a louder clip in the batch changes nothing for the others. Times 10 / ln 10: decibels.

    Raises:
        ValueError: `mel` is not a floating tensor; a floor that is not positive, or 0 in that dtype.
    """
    check_tensor("mel", mel)
    if not mel.is_floating_point():
        raise ValueError(f"mel has dtype {dtype_name(mel.dtype)}: must be floating; give mel_spectrogram's result")
    wide = statistics_dtype(mel.dtype)
    _check_floor(floor, torch.finfo(wide).tiny)
    mel_wide = mel.to(wide)
    return torch.log(torch.where(mel_wide > floor, mel_wide, floor))


def _check_wave(wave: Any, n_fft: int, power: float) -> None:
    check_tensor("wave", wave)
    if wave.ndim not in (1, 2) or 0 in wave.shape:
        raise ValueError(
            f"wave has shape {tuple(wave.shape)}: must be (N,) or (B, N) with at least one sample; give the mono wave"
        )
    if not wave.is_floating_point():
        raise ValueError(
            f"wave has dtype {dtype_name(wave.dtype)}: must be floating, in [−1, 1]; divide 16-bit samples by 32768.0"
        )
    if torch.compiler.is_compiling():
        return  # its values are not known
    try:
        peak = float(wave.detach().abs().max())
    except RuntimeError:
        return  # nor are they inside torch.func.vmap
    if not math.isfinite(peak):
        first = (~wave.detach().isfinite()).nonzero()[0].tolist()
        raise ValueError(f"wave holds NaN or Inf, first at {first}: must be finite; cut the bad part out")
    _check_peak(peak, torch.finfo(statistics_dtype(wave.dtype)).max, n_fft, power)


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
