"""Makes sample_audio.wav and sample_image.png, which the examples read: the same files every time.

    python examples/make_samples.py

The sound: 2.2 s, two channels, 11025 samples a second, 16 bits. On the left a tone glides up from 200 to 4,800 Hz, on
the right one glides down; then both hold 500, 1000 and 2000 Hz, a quarter of a second each. The picture: 224 × 224
pixels, 8 bits of red, green and blue; a disc, a square, a triangle and a ring over a sky that grows lighter downwards.
"""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np

RATE, SECONDS = 11025, 2.2
GLIDE_HZ, GLIDE_SECONDS = (200.0, 4800.0), (0.1, 1.2)
TONES_HZ, TONE_SECONDS = (500.0, 1000.0, 2000.0), 0.25
FIRST_TONE = 1.35  # where the first begins, in seconds; the others follow at once
SIDE, FINER = 224, 4  # every pixel is the mean of FINER² points, so that edges are smooth
FOLDER = Path(__file__).resolve().parent


def fade(seconds: np.ndarray, begin: float, length: float) -> np.ndarray:
    """1 from `begin` for `length` seconds, 0 elsewhere, over 20 ms on either side, so that nothing clicks."""
    inside = np.minimum(seconds - begin, begin + length - seconds) / 0.02
    return 0.5 - 0.5 * np.cos(np.pi * np.clip(inside, 0.0, 1.0))


def sound() -> np.ndarray:
    """The samples, (N, 2), int16."""
    seconds = np.arange(round(RATE * SECONDS)) / RATE
    begin, length = GLIDE_SECONDS
    channels = []
    for start, end in (GLIDE_HZ, GLIDE_HZ[::-1]):
        # hz(t) = start·(end / start)^(t / length): its integral from `begin` is the phase in turns.
        slope = np.log(end / start)
        turns = start * length / slope * np.expm1(slope * (seconds - begin) / length)
        both = 0.4 * fade(seconds, begin, length) * np.sin(2.0 * np.pi * turns)
        for i, hz in enumerate(TONES_HZ):
            both += 0.4 * fade(seconds, FIRST_TONE + i * TONE_SECONDS, TONE_SECONDS) * np.sin(2 * np.pi * hz * seconds)
        channels.append(both)
    return np.rint(32767.0 * np.stack(channels, axis=1)).astype("<i2")


def picture() -> np.ndarray:
    """The pixels, (224, 224, 3), uint8."""
    at = (np.arange(SIDE * FINER) + 0.5) / FINER
    y, x = at[:, None], at[None, :]
    sky = (y / SIDE)[..., None] * np.array([90.0, 90.0, 40.0]) + np.array([40.0, 80.0, 160.0])
    points = np.broadcast_to(sky, (SIDE * FINER, SIDE * FINER, 3)).copy()
    ring = np.hypot(y - 160.0, x - 164.0)
    shapes = {
        (220, 40, 40): np.hypot(y - 64.0, x - 64.0) < 40.0,  # a red disc
        (40, 170, 70): (np.abs(y - 64.0) < 32.0) & (np.abs(x - 160.0) < 32.0),  # a green square, on patches' edges
        (250, 210, 60): (y < 200.0) & (y - 120.0 > 2.0 * np.abs(x - 64.0)),  # a yellow triangle
        (245, 245, 245): (ring < 40.0) & (ring > 24.0),  # a white ring
    }
    for colour, inside in shapes.items():
        points[inside] = colour
    return np.rint(points.reshape(SIDE, FINER, SIDE, FINER, 3).mean(axis=(1, 3))).astype(np.uint8)


def write(folder: Path = FOLDER) -> None:
    """Both files, into a folder."""
    from PIL import Image

    with wave.open(str(folder / "sample_audio.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(sound().tobytes())
    Image.fromarray(picture()).save(folder / "sample_image.png", optimize=True)


if __name__ == "__main__":
    write()
