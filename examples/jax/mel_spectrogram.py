"""A mel spectrogram in JAX (exercise 3), and its two questions answered by running them.

1. What does each dimension represent? (1, 128, T): the clips of the batch, 128 bands of frequency from low to high, and
   T frames of time. A clip is heard in its own row only, a tone in its own band, a click in its own frames.
2. How many frames per second? sample_rate / hop_length = 16000 / 160 = 100, so one every 10 ms.

    python examples/jax/mel_spectrogram.py [FIGURE.png]    # keeps the figure there
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from omni_jax import (
    frames_per_second,
    hz_to_mel,
    load_audio,
    mel_filter_bank,
    mel_spectrogram,
    mel_to_hz,
    num_frames,
    plot_mel,
)

SAMPLE = Path(__file__).resolve().parent.parent / "sample_audio.wav"
SAMPLE_RATE, N_FFT, HOP_LENGTH, N_MELS = 16000, 1024, 160, 128
FILE_RATE = 11025  # what the file was recorded at


def mel_spec(audio: jax.Array) -> jax.Array:
    """The exercise's transform: (1, N) to (1, 128, T)."""
    return mel_spectrogram(audio, SAMPLE_RATE, n_fft=N_FFT, hop_length=HOP_LENGTH, n_mels=N_MELS)


def mel_by_hand(audio: jax.Array) -> jax.Array:
    """The same in four steps: frames, window, Fourier transform, bands."""
    padded = jnp.pad(audio, ((0, 0), (N_FFT // 2, N_FFT // 2)), mode="reflect")
    starts = jnp.arange(0, padded.shape[1] - N_FFT + 1, HOP_LENGTH)
    frames = padded[:, starts[:, None] + jnp.arange(N_FFT)[None]]
    hann = 0.5 - 0.5 * jnp.cos(2 * jnp.pi * jnp.arange(N_FFT) / N_FFT)
    power = jnp.abs(jnp.fft.rfft(frames * hann[None, None])) ** 2
    bank = jnp.asarray(mel_filter_bank(SAMPLE_RATE, N_FFT, N_MELS), power.dtype)
    return jnp.swapaxes(power @ bank, 1, 2)


def tone(hz: float, seconds: float = 0.5) -> jax.Array:
    """A steady tone, (1, N)."""
    return jnp.sin(2 * jnp.pi * hz * jnp.arange(round(SAMPLE_RATE * seconds)) / SAMPLE_RATE)[None]


def loudest_hz(mel: jax.Array) -> float:
    """The middle, in Hz, of the loudest band of a (1, 128, T): N_MELS + 2 edges stand equally far apart in mels."""
    band = int(mel[0].sum(axis=1).argmax())
    return float(mel_to_hz((band + 1) / (N_MELS + 1) * float(hz_to_mel(SAMPLE_RATE / 2))))


def listen(figure: Path) -> None:
    """The exercise."""
    audio = load_audio(SAMPLE, SAMPLE_RATE)[None]
    print(f"  Audio shape: {audio.shape}, Sample rate: {SAMPLE_RATE}")
    mel = mel_spec(audio)
    print(f"  Mel shape: {mel.shape}")
    check(mel.shape == (1, N_MELS, num_frames(audio.shape[1], N_FFT, HOP_LENGTH)), "a clip, 128 bands, T frames")
    apart = float(jnp.abs(mel - mel_by_hand(audio)).max() / mel.max())
    check(apart <= 64 * float(jnp.finfo(mel.dtype).eps), "the library's function is the four steps")
    plot_mel(mel[0], SAMPLE_RATE, HOP_LENGTH, figure, title=SAMPLE.name)
    check(figure.stat().st_size > 0, "the figure is written")

    # The file has its own rate: load_audio resamples. A transform told 16000 of samples that are not puts all too high.
    told = mel_spec(load_audio(SAMPLE, FILE_RATE)[None])
    second = slice(int(1.65 * FILE_RATE / HOP_LENGTH), int(1.8 * FILE_RATE / HOP_LENGTH))  # while it holds 1000 Hz
    right, wrong = loudest_hz(mel[:, :, 165:180]), loudest_hz(told[:, :, second])
    print(f"  its tone of 1000 Hz: {right:.0f} Hz; read at the file's rate and called 16000: {wrong:.0f} Hz")
    check(abs(right / 1000 - 1) < 0.03, "resampled, the tone stands where it sounds")
    check(abs(wrong / 1000 / (SAMPLE_RATE / FILE_RATE) - 1) < 0.03, "otherwise it is 16000 / 11025 times too high")


def question_1() -> None:
    """What does each dimension represent?"""
    low, high = tone(300.0), tone(3000.0)
    both = mel_spec(jnp.concatenate([low, high]))
    print(f"  two clips {(2, low.shape[1])} -> {both.shape}")
    changed = mel_spec(jnp.concatenate([low, 0.0 * high]))
    check(bool(jnp.array_equal(both[0], changed[0])), "first the clips: what one holds, the others do not hear")
    check(not changed[1].any(), "and silence is 0")
    for hz, mel in ((300.0, both[:1]), (3000.0, both[1:])):
        band = int(mel[0].sum(axis=1).argmax())
        print(f"  a tone of {hz:g} Hz is loudest in band {band}, around {loudest_hz(mel):.0f} Hz")
        step = float(hz_to_mel(SAMPLE_RATE / 2)) / (N_MELS + 1)
        off = abs(float(hz_to_mel(loudest_hz(mel))) - float(hz_to_mel(hz)))
        check(off <= 0.75 * step, "then the bands: a tone is loudest in the band nearest to it")
    click = jnp.zeros((1, SAMPLE_RATE)).at[0, SAMPLE_RATE // 2].set(1.0)
    heard = jnp.flatnonzero(mel_spec(click)[0].sum(axis=0) > 0)
    first, last, loudest = int(heard[0]), int(heard[-1]), int(mel_spec(click)[0].sum(axis=0).argmax())
    print(f"  a click in the middle of a second is in frames {first} to {last}, loudest in {loudest}")
    check(loudest == SAMPLE_RATE // 2 // HOP_LENGTH, "last the frames: each is centred on its own moment")
    check(last - first == 2 * ((N_FFT - 1) // 2 // HOP_LENGTH), "and sees what lies within n_fft / 2 samples of it")
    print(f"  Answer: (1, {N_MELS}, T): 1 clip, {N_MELS} bands of frequency on the mel scale, T frames of time.")


def question_2() -> None:
    """How many frames per second? (hop_length=160, sr=16000)"""
    rate = frames_per_second(SAMPLE_RATE, HOP_LENGTH)
    counts = [mel_spec(tone(440.0, seconds)).shape[2] for seconds in (1.0, 2.0, 3.0)]
    print(f"  frames of 1, 2 and 3 seconds: {counts}")
    check(counts == [rate * s + 1 for s in (1, 2, 3)], "100 each, and one, for both ends of the clip have one")
    print(f"  Answer: {SAMPLE_RATE} / {HOP_LENGTH} = {rate:g} frames per second.")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        figure = Path(sys.argv[1] if len(sys.argv) > 1 else f"{name}/mel.png")
        print(f"listen: {listen.__doc__}")
        listen(figure)
    for part in (question_1, question_2):
        print(f"{part.__name__}: {part.__doc__}")
        part()


def check(true: bool, claim: str) -> None:
    if not true:
        raise RuntimeError(f"not so: {claim}")


if __name__ == "__main__":
    main()
