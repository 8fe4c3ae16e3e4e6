"""The mel scale, its filter bank, the arithmetic of frames, and a figure: what needs no framework, in float64 numpy.

Shapes: F = n_fft // 2 + 1 frequencies, M mel bands, T frames, N any.
"""

from __future__ import annotations

import math
import numbers
import os
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float

__all__ = ["hz_to_mel", "mel_to_hz", "mel_filter_bank", "num_frames", "frames_per_second", "plot_mel"]

# The Slaney scale: 200/3 Hz a mel up to 1000 Hz, from there 27 mels for a factor of 6.4.
_HZ_PER_MEL, _BREAK_HZ, _LOG_STEP = 200.0 / 3.0, 1000.0, math.log(6.4) / 27.0
_BREAK_MEL = _BREAK_HZ / _HZ_PER_MEL
_TICKS_HZ = (0, 250, 500, 1000, 2000, 4000, 8000, 16000, 32000)


def hz_to_mel(frequencies: Float[np.ndarray, "*N"] | float, mel_scale: str = "htk") -> Float[np.ndarray, "*N"]:
    """Hz to mels, in float64, of the same shape.

    "htk": mel = 2595·log10(1 + hz / 700). "slaney": mel = 3·hz / 200 below 1000 Hz, 15 + 27·ln(hz / 1000) / ln 6.4
    above.

    Raises:
        ValueError: another scale.

    Source: O'Shaughnessy, Speech Communication (1987); Slaney, Auditory Toolbox, Interval technical report
    1998-010, mfcc.

    >>> round(float(hz_to_mel(1000.0)), 2), round(float(hz_to_mel(1000.0, "slaney")), 2)
    (999.99, 15.0)
    """
    _one_of("mel_scale", mel_scale, ("htk", "slaney"))
    hz = np.asarray(frequencies, np.float64)
    if mel_scale == "htk":
        return np.asarray(2595.0 * np.log10(1.0 + hz / 700.0))
    above = _BREAK_MEL + np.log(np.maximum(hz, _BREAK_HZ) / _BREAK_HZ) / _LOG_STEP
    return np.where(hz < _BREAK_HZ, hz / _HZ_PER_MEL, above)


def mel_to_hz(mels: Float[np.ndarray, "*N"] | float, mel_scale: str = "htk") -> Float[np.ndarray, "*N"]:
    """Mels to Hz, the inverse of hz_to_mel, in float64, of the same shape.

    Raises:
        ValueError: another scale than "htk" or "slaney".
    """
    _one_of("mel_scale", mel_scale, ("htk", "slaney"))
    mel = np.asarray(mels, np.float64)
    if mel_scale == "htk":
        return np.asarray(700.0 * (np.power(10.0, mel / 2595.0) - 1.0))
    above = _BREAK_HZ * np.exp(_LOG_STEP * (np.maximum(mel, _BREAK_MEL) - _BREAK_MEL))
    return np.where(mel < _BREAK_MEL, mel * _HZ_PER_MEL, above)


def mel_filter_bank(
    sample_rate: int,
    n_fft: int,
    n_mels: int,
    f_min: float = 0.0,
    f_max: float | None = None,
    norm: str | None = None,
    mel_scale: str = "htk",
) -> Float[np.ndarray, "F M"]:
    """Triangles over the frequencies of an n_fft: (F, n_mels), float64, not to be written to.

    Band m rises from edge m to edge m + 1 and falls to edge m + 2, the n_mels + 2 edges being equally far apart in mels
    from f_min to f_max (half the sample rate where None). The peaks are 1 with norm=None; "slaney" divides each
    triangle by half its width in Hz, so that all areas are 1. A band narrower than the spacing of the frequencies may
    contain none of them: it is zero then, and n_fft too small for n_mels.

    Raises:
        ValueError: a size below 1, frequencies out of 0 ≤ f_min < f_max ≤ sample_rate / 2, another norm or scale.

    Source: Slaney, Auditory Toolbox, Interval technical report 1998-010, mfcc.
    """
    for name, value in (("sample_rate", sample_rate), ("n_fft", n_fft), ("n_mels", n_mels)):
        check_count(name, value)
    _one_of("norm", norm, (None, "slaney"))
    _one_of("mel_scale", mel_scale, ("htk", "slaney"))
    top = sample_rate / 2.0 if f_max is None else f_max
    if not (is_real(f_min) and is_real(top) and 0.0 <= f_min < top):
        raise ValueError(f"f_min = {f_min!r} and f_max = {f_max!r}: must be 0 ≤ f_min < f_max; give both in Hz")
    if top > sample_rate / 2.0:
        raise ValueError(
            f"f_max = {f_max!r} is above half the sample rate, {sample_rate / 2.0} Hz: a wave holds nothing there; "
            "give f_max=None for all there is"
        )
    return _filter_bank(int(sample_rate), int(n_fft), int(n_mels), float(f_min), float(top), norm, mel_scale)


@lru_cache(maxsize=32)
def _filter_bank(
    sample_rate: int, n_fft: int, n_mels: int, f_min: float, f_max: float, norm: str | None, mel_scale: str
) -> Float[np.ndarray, "F M"]:
    low, high = hz_to_mel(np.array([f_min, f_max]), mel_scale)
    edges = mel_to_hz(np.linspace(low, high, n_mels + 2), mel_scale)
    hz_F1 = np.fft.rfftfreq(n_fft, 1.0 / sample_rate)[:, None]
    widths = np.diff(edges)
    rising = (hz_F1 - edges[:-2]) / widths[:-1]
    falling = (edges[2:] - hz_F1) / widths[1:]
    bank_FM = np.maximum(0.0, np.minimum(rising, falling))
    if norm == "slaney":
        bank_FM *= 2.0 / (edges[2:] - edges[:-2])
    bank_FM.flags.writeable = False
    return bank_FM


@lru_cache(maxsize=32)
def hann_window(win_length: int) -> Float[np.ndarray, " N"]:
    """The periodic Hann window, ½ − ½·cos(2πk / N) for k = 0 … N − 1: (N,), float64; of one sample: 1.

    Source: Harris, On the use of windows for harmonic analysis, Proceedings of the IEEE 66, 1978.
    """
    window = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(win_length) / win_length)
    if win_length == 1:
        window[:] = 1.0
    window.flags.writeable = False
    return window


def num_frames(num_samples: int, n_fft: int, hop_length: int, center: bool = True) -> int:
    """Frames of a wave: 1 + ⌊(num_samples + 2·⌊n_fft / 2⌋·center − n_fft) / hop_length⌋.

    Frame t is centred on sample t·hop_length, or with center=False begins there.

    Raises:
        ValueError: a count below 1, or a wave shorter than n_fft with center=False: it has no frame.

    >>> num_frames(16000, n_fft=1024, hop_length=160)
    101
    """
    for name, value in (("num_samples", num_samples), ("n_fft", n_fft), ("hop_length", hop_length)):
        check_count(name, value)
    length = num_samples + (2 * (n_fft // 2) if center else 0)
    if length < n_fft:
        raise ValueError(
            f"the wave has {num_samples} samples: must be at least n_fft = {n_fft} with center=False; give a longer "
            "one, a smaller n_fft, or center=True"
        )
    return 1 + (length - n_fft) // hop_length


def frames_per_second(sample_rate: int, hop_length: int) -> float:
    """sample_rate / hop_length, in Hz.

    Raises:
        ValueError: a count below 1.

    >>> frames_per_second(16000, 160)
    100.0
    """
    check_count("sample_rate", sample_rate)
    check_count("hop_length", hop_length)
    return sample_rate / hop_length


def plot_mel(
    mel: Any,
    sample_rate: int,
    hop_length: int,
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    f_min: float = 0.0,
    f_max: float | None = None,
    mel_scale: str = "htk",
    power: float = 2.0,
    dynamic_range: float = 80.0,
) -> Any:
    """A figure of a mel spectrogram, an array (M, T): seconds to the right, Hz upwards on the mel scale, colour in dB.

    0 dB is the loudest value; what lies more than `dynamic_range` below it is shown as if it lay there, silence too.
    f_min, f_max, mel_scale and power are those that mel_spectrogram was called with. Written to `path` where one is
    given (its ending decides the format), and returned as a matplotlib Figure.

    Raises:
        ValueError: `mel` is not (M, T), or holds negative or non-finite values (a log-mel: give the mel itself), or
            dynamic_range is not positive.
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    if hasattr(mel, "detach"):  # a tensor with a gradient, or elsewhere than on the CPU
        mel = mel.detach().cpu()
    power_MT = np.asarray(mel, np.float64)
    if power_MT.ndim != 2 or 0 in power_MT.shape:
        raise ValueError(f"mel has shape {power_MT.shape}: must be (n_mels, T); give one clip, for example mel[0]")
    if not (np.isfinite(power_MT) & (power_MT >= 0.0)).all():
        raise ValueError("mel holds negative or non-finite values: must be a power; give mel_spectrogram's own result")
    if not dynamic_range > 0.0:
        raise ValueError(f"dynamic_range = {dynamic_range!r}: must be positive, in dB; give for example 80.0")
    M, T = power_MT.shape
    seconds = 1.0 / frames_per_second(sample_rate, hop_length)
    with np.errstate(divide="ignore", invalid="ignore"):
        decibels_MT = 20.0 / power * np.log10(power_MT / power_MT.max())
    decibels_MT = np.maximum(np.nan_to_num(decibels_MT, nan=-np.inf), -dynamic_range)

    figure = Figure(figsize=(8.0, 3.5), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(
        decibels_MT,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap="magma",
        vmin=-dynamic_range,
        vmax=0.0,
        extent=(-seconds / 2.0, (T - 0.5) * seconds, 0.5, M + 0.5),
    )
    # Band m peaks at edge m + 1 of M + 2: in units of edges the axis is linear.
    top = sample_rate / 2.0 if f_max is None else f_max
    low, high = (float(hz_to_mel(hz, mel_scale)) for hz in (f_min, top))
    places = {hz: (float(hz_to_mel(float(hz), mel_scale)) - low) / (high - low) * (M + 1) for hz in _TICKS_HZ}
    shown = {hz: min(max(place, 0.5), M + 0.5) for hz, place in places.items() if 0.0 <= place <= M + 1.0}
    axes.set_yticks(list(shown.values()), [f"{hz:,}" for hz in shown])
    axes.set_xlabel("time (s)")
    axes.set_ylabel("frequency (Hz)")
    if title is not None:
        axes.set_title(title)
    figure.colorbar(image, ax=axes, label="level (dB, loudest = 0)", pad=0.02)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def is_real(value: Any) -> bool:
    """Whether it is a real number of Python's or numpy's, True and False excepted."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_count(name: str, value: Any) -> None:
    """Refuse what is not an integer from 1 up; `name` is what the message calls it.

    Raises:
        ValueError: `value` is another thing.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} = {value!r}: must be an integer from 1 up; give for example {name}={_EXAMPLES[name]}")


def check_length(shape: tuple[int, ...], n_fft: int, fix: str) -> None:
    """Refuse waves of `shape`, (N,) or (B, N), that are too short to be reflected at their ends; `fix` says what helps.

    Raises:
        ValueError: N is from 1 to n_fft // 2.
    """
    least = n_fft // 2 + 1
    if len(shape) not in (1, 2) or 0 in shape or shape[-1] >= least:
        return
    if len(shape) == 2 and shape[0] >= least:
        raise ValueError(
            f"wave has shape {shape}, that is {shape[0]} waves of {shape[1]} samples: must be (N,) or (B, N); of one "
            "wave with its channels last give the mean over them, or swap its axes"
        )
    raise ValueError(
        f"the wave has {shape[-1]} samples: must have at least n_fft // 2 + 1 = {least} to be reflected at its ends; "
        f"{fix}"
    )


_EXAMPLES = {
    "sample_rate": 16000,
    "n_fft": 1024,
    "n_mels": 128,
    "hop_length": 160,
    "win_length": 400,
    "num_samples": 16000,
}


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} = {value!r}: must be one of {', '.join(map(repr, allowed))}; give {allowed[0]!r}")
