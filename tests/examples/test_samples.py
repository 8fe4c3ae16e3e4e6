"""The files that the examples read are what make_samples.py makes, and small."""

from __future__ import annotations

import runpy
import wave
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
MOST_BYTES = 100_000


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    runpy.run_path(str(EXAMPLES / "make_samples.py"))["write"](folder)
    return folder


def test_the_sound_is_what_is_made(made) -> None:
    kept, new = ((folder / "sample_audio.wav").read_bytes() for folder in (EXAMPLES, made))
    assert kept == new
    assert len(kept) <= MOST_BYTES
    with wave.open(str(EXAMPLES / "sample_audio.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (11025, 2, 2)
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    assert 0.3 * 32768 < np.abs(samples.astype(int)).max() < 32767  # heard, and not clipped


def test_the_picture_is_what_is_made(made) -> None:
    """Pixel by pixel: the bytes of a PNG depend on who compresses it."""
    Image = pytest.importorskip("PIL.Image")
    kept, new = (Image.open(folder / "sample_image.png") for folder in (EXAMPLES, made))
    assert (kept.mode, kept.size) == (new.mode, new.size) == ("RGB", (224, 224))
    assert np.array_equal(np.asarray(kept), np.asarray(new))
    assert (EXAMPLES / "sample_image.png").stat().st_size <= MOST_BYTES
