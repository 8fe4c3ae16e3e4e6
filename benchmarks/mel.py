"""How fast a minute of sound becomes a mel spectrogram: both twins beside librosa.

    python benchmarks/mel.py [--rounds 7] [--write docs/speed.md]

The contenders take turns, each in a process of its own on the same core with one thread, as in generate.py; nothing of
the preparation is timed, JAX's compilation least of all. Needs librosa, of the extra `dev`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from contenders import Worker, serve
from generate import machine, markdown_table, show, verdict, write_section

CONTENDERS = ("librosa", "omni_torch", "omni_jax")
PACKAGES = ("jax", "jaxlib", "torch", "librosa", "numpy", "scipy")
RATE, SECONDS = 16000, 60
SETTINGS = {"n_fft": 1024, "hop_length": 160, "n_mels": 128, "power": 2.0, "center": True, "pad_mode": "reflect"}
WINDOWS = (400, 1024)  # the family's in training, and exercise 3's


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds; a median of fewer than 5 says little")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the report's section in this Markdown file")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error(f"--rounds {given.rounds}: must be at least 1")
    if find_spec("librosa") is None:
        parser.error("librosa is missing, which the twins are compared with; install it: pip install -e '.[dev]'")
    rows = measure(given.rounds)
    if given.write:
        write_section(given.write, markdown(rows, given.rounds))
    widths = [max(map(len, column)) for column in zip(*rows)]
    print("\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows))


def measure(rounds: int) -> list[list[str]]:
    """The rows of the report, the first being its head."""
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    ratios = ["× librosa (CPU)", "× librosa (wall)"]
    found = [["mel of one minute", "contender", "CPU, ms", "wall, ms", *ratios, "error", "aim"]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_wave(folder)
        workers = [Worker(contender, folder, core, __file__) for contender in CONTENDERS]
        try:
            for window in WINDOWS:
                answers: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
                for i in range(rounds):
                    # Whoever comes first in a round does not always come first.
                    for worker in workers[i % len(workers) :] + workers[: i % len(workers)]:
                        show(f"window {window}: round {i + 1} of {rounds}, {worker.name}")
                        answers[worker.name].append(worker.run(window))
                found += [row(f"window of {window} in {SETTINGS['n_fft']}", name, answers) for name in CONTENDERS]
        finally:
            for worker in workers:
                worker.close()
    show("")
    return found


def row(title: str, name: str, answers: dict[str, list[dict[str, float]]]) -> list[str]:
    """One contender's medians; ratios are taken round for round."""
    own = answers[name]
    times = [f"{1000 * median(a[clock] for a in own):.1f}" for clock in ("cpu", "wall")]
    factors = [median(b[clock] / a[clock] for a, b in zip(own, answers["librosa"])) for clock in ("cpu", "wall")]
    aim = "" if name == "librosa" else verdict(factors[0], 1.0)
    return [title, name, *times, *(f"{factor:.2f}" for factor in factors), f"{own[-1]['made']:.1e}", aim]


def markdown(rows: list[list[str]], rounds: int) -> str:
    """The report's section in docs/."""
    settings = ", ".join(f"{key} {value}" for key, value in SETTINGS.items())
    lines = [
        "## Mel spectrogram",
        "",
        "Written by `python benchmarks/mel.py --write docs/speed.md`.",
        "",
        "Machine: " + ", ".join(f"{key} {value}" for key, value in machine(*PACKAGES).items()) + ".",
        "",
        *markdown_table(rows),
        "",
        f"* {SECONDS} s of noise at {RATE} Hz, float32; {settings}; HTK mels without a norm.",
        f"* Medians of {rounds} rounds, in which the contenders take turns; each in a process of its own, all on one "
        "core with one thread, and called once before. Ratios are of one run; differences under 10 % are noise.",
        "* Error: the largest difference from librosa in float64, relative to its largest value.",
    ]
    return "\n".join(lines) + "\n"


def write_wave(folder: Path) -> None:
    """The wave, and its spectrograms in float64 by librosa."""
    wave = np.random.default_rng(0).normal(size=RATE * SECONDS).astype(np.float32)
    np.save(folder / "wave.npy", wave)
    for window in WINDOWS:
        np.save(folder / f"{window}.npy", by_librosa(wave.astype(np.float64), window, np.float64))


def by_librosa(wave: np.ndarray, window: int, dtype: Any) -> np.ndarray:
    """librosa's spectrogram."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports lazily, and what it imports warns of its own future
        import librosa

        return librosa.feature.melspectrogram(
            y=wave, sr=RATE, win_length=window, htk=True, norm=None, dtype=dtype, **SETTINGS
        )


def librosa(wave: np.ndarray) -> Callable[[int], Any]:
    """The contender to compare with, in float32."""
    return lambda window: by_librosa(wave, window, np.float32)


def omni_torch(wave: np.ndarray) -> Callable[[int], Any]:
    """The PyTorch twin, eager."""
    import torch

    from omni_torch import mel_spectrogram

    torch.set_num_threads(1)
    there = torch.from_numpy(wave)
    return lambda window: mel_spectrogram(there, RATE, win_length=window, **SETTINGS)


def omni_jax(wave: np.ndarray) -> Callable[[int], Any]:
    """The JAX twin, called as a user calls it."""
    import jax

    from omni_jax import mel_spectrogram

    there = jax.numpy.asarray(wave)
    return lambda window: jax.block_until_ready(mel_spectrogram(there, RATE, win_length=window, **SETTINGS))


def work(name: str, folder: Path) -> None:
    """A contender's process."""
    run = {"librosa": librosa, "omni_torch": omni_torch, "omni_jax": omni_jax}[name](np.load(folder / "wave.npy"))

    def make(window: int) -> Callable[[], Any]:
        return lambda: (window, run(window))

    def error(made: tuple[int, Any]) -> float:
        window, mel = made
        expected = np.load(folder / f"{window}.npy")
        return float(np.abs(np.asarray(mel) - expected).max() / expected.max())

    serve(make, error)


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2])) if len(sys.argv) == 3 and sys.argv[1] in CONTENDERS else main()
