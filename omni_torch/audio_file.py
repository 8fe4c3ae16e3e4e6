"""Sound files to a mono wave at one sample rate, in numpy: what needs no framework.

Shapes: N samples, R of them at another rate, P phases, K taps.
"""

from __future__ import annotations

import math
import os

import numpy as np
from jaxtyping import Float

from .files import open_regular_file
from .mel import check_count

__all__ = ["read_audio", "resample"]

# The kernel of `resample`: an ideal low-pass at 0.94 of the lower rate's half, cut off after 64 of its zero crossings
# on either side by a Kaiser window with β = 12, whose side lobes lie 118 dB down:
# what is left of frequencies begins to fall at 0.88 of that half, and nothing above it comes back as another one.
_CUTOFF, _CROSSINGS, _BETA = 0.94, 64, 12.0
_MOST_RATE = 1 << 20  # Hz: a header can claim any, and a rate that is far from ours needs memory in proportion
_BLOCK = 1 << 20  # frames read at once: a file of many channels is never in memory as a whole
_TAPS = 1 << 20  # taps made at once
_MOST_SAMPLES = 1 << 29  # 9 hours at 16000 a second; a small file can claim a rate that makes any number of it


def read_audio(path: str | os.PathLike[str], sample_rate: int = 16000) -> Float[np.ndarray, " N"]:
    """The wave of a sound file: (N,), float32, mono, at `sample_rate`.

    WAV, FLAC, OGG and what else libsndfile reads; integers are scaled to [−1, 1). Several channels are averaged, other
    rates resampled (see `resample`), both in float64. A file that was cut off is read as far as it goes, where its
    format allows that.

    Raises:
        ValueError: the file is missing, empty, not a sound file or damaged; it has no samples, NaN or Inf among them,
            or more than 536,870,912 of them, read or resampled; sample_rate is not an integer from 1 up.
        ModuleNotFoundError: soundfile is not installed.
    """
    import soundfile

    check_count("sample_rate", sample_rate)
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"path is a {type(path).__name__}, must be a path; samples in an array need no loading")
    name = f"audio file {str(path)!r}"
    with open_regular_file(path, "audio file") as stream:
        try:
            with soundfile.SoundFile(stream) as file:
                rate = file.samplerate
                blocks, count = [], 0
                for block in file.blocks(_BLOCK, dtype="float64", always_2d=True):
                    blocks.append(block.mean(axis=1))
                    count += len(block)
                    if max(count, count * sample_rate // rate) > _MOST_SAMPLES:
                        raise ValueError(
                            f"{name}, of {rate} samples a second, makes too many of them for sample_rate = "
                            f"{sample_rate}: allowed are up to {_MOST_SAMPLES}; cut it into parts"
                        )
        except (soundfile.SoundFileError, RuntimeError, TypeError) as bad:  # TypeError: raw data, which name no format
            raise ValueError(
                f"{name} cannot be read as sound: {bad}; give an undamaged WAV, FLAC or OGG file"
            ) from None
    if count == 0:
        raise ValueError(f"{name} holds no samples, or was cut off: must hold at least one; record or export it again")
    wave = np.concatenate(blocks)
    if not np.isfinite(wave).all():
        first = int(np.argmin(np.isfinite(wave)))
        raise ValueError(
            f"{name} holds {wave[first]} at sample {first}: must be finite; export it again, or cut the bad part out"
        )
    wave = resample(wave, rate, sample_rate)
    if np.abs(wave).max() > np.finfo(np.float32).max:
        raise ValueError(f"{name} reaches {np.abs(wave).max():.1e}: must fit into float32; export it in [−1, 1]")
    return wave.astype(np.float32)


def resample(wave: Float[np.ndarray, " N"], from_rate: int, to_rate: int) -> Float[np.ndarray, " R"]:
    """The wave (N,) at another rate: ⌈N·to_rate / from_rate⌉ samples, float64; band-limited interpolation.

        y[n] = Σ_k x[k]·h(n·M/L − k),  h(t) = c·sinc(c·t)·kaiser(t·c / 64, β=12),  c = 0.94·min(1, L/M)

    with L/M = to_rate / from_rate in lowest terms; outside the wave x is 0. The taps of each of the L phases are
    divided by their sum, so that a constant stays one, away from the ends. Equal rates change nothing.

    Raises:
        ValueError: a rate that is not an integer from 1 up, or from_rate beyond 1,048,576; a wave that is not (N,)
            with N at least 1.

    Source: Smith & Gossett, A flexible sampling-rate conversion method, ICASSP 1984.
    """
    check_count("sample_rate", from_rate)
    check_count("sample_rate", to_rate)
    if from_rate > _MOST_RATE:
        raise ValueError(
            f"the sound has {from_rate} samples a second: must be at most {_MOST_RATE}; export it at its true rate"
        )
    x = np.asarray(wave, np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"wave has shape {x.shape}: must be (N,) with N at least 1; give one channel")
    common = math.gcd(from_rate, to_rate)
    L, M = to_rate // common, from_rate // common
    if L == M:
        return x
    cutoff = _CUTOFF * min(1.0, L / M)
    reach = math.ceil(_CROSSINGS / cutoff)
    count = -(-x.size * L // M)
    padded = np.pad(x, (reach, reach + M + 1))
    y = np.empty(count)
    rows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 2)
    at_once = max(1, _TAPS // (2 * reach + 2))
    for first in range(0, min(L, count), at_once):
        phases = np.arange(first, min(first + at_once, L, count))
        # Outputs phase, phase + L, ... have the same taps, and stand M inputs apart.
        for phase, taps in zip(phases.tolist(), _taps((phases * M % L) / L, cutoff, reach), strict=True):
            out = y[phase::L]
            out[:] = rows[phase * M // L :: M][: out.size] @ taps
    return y


def _taps(offsets: Float[np.ndarray, " P"], cutoff: float, reach: int) -> Float[np.ndarray, "P K"]:
    """h(offset − k) for k = −reach … reach + 1, a row for each offset, with sum 1."""
    t = cutoff * (offsets[:, None] - np.arange(-reach, reach + 2))
    window = np.i0(_BETA * np.sqrt(np.maximum(0.0, 1.0 - np.square(t / _CROSSINGS)))) * (np.abs(t) <= _CROSSINGS)
    taps = np.sinc(t) * window
    return taps / taps.sum(axis=1, keepdims=True)
