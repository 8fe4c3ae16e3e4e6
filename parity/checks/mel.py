"""Mel spectrograms of both twins, their gradient, and what librosa and torch.stft make of the same waves.

Shapes: B waves, N samples, M mel bands, T frames, F frequencies.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parity.checks import Progress, Scope
from parity.checks._encoders import SIMPLE
from parity.result import CheckResult, Row
from parity.verdict import Verdict

__all__ = [
    "BLIND",
    "CLAIM",
    "CONTROLS",
    "PRECISIONS",
    "PROMISED",
    "SETTINGS",
    "bugs",
    "by_librosa",
    "by_stft",
    "problem",
    "record",
    "run",
    "waves",
]

CLAIM = (
    "Both mel_spectrograms and log_mels give the same bands at every frame, the first and the last among them, and the "
    "same gradient of every sample: of noise, silence, a clipped tone and clicks at the ends, for the family's "
    "settings and others (HTK's and Slaney's scale, with and without norm, powers 1, 1.5 and 2, reflected, constant "
    "and no padding, odd sizes, a wave shorter than the window), and a wave in a batch as alone. In float64 torch.stft "
    "gives them too, and librosa to within {narrow:g} of its maximum; in float32 the twins stay within {wide:g} of it."
)
BLIND = (
    "Waves beyond {samples} samples, unless you name a file (--audio); other settings than those (tests/parity/"
    "test_mel.py draws many). librosa's numbers are recorded ones in the default run, of seed 0 (--full computes "
    "them). In float32 the bands of quiet frequencies: the transform errs in proportion to the loudest frequency of a "
    "frame, also where that lies outside f_min … f_max."
)
PRECISIONS = ("float64", "float32")
PROMISED = {"float64": 1e-12, "float32": 1e-6}
"""Of the largest band of librosa's: what this project promises, and what no noise unit says, because librosa rounds
its filter bank by itself."""

SAMPLES, SHORT = 700, 37
SETTINGS: dict[str, dict[str, Any]] = {
    "family": {"sample_rate": 16000, "n_fft": 1024, "hop_length": 160, "win_length": 400, "n_mels": 128},
    "slaney": {
        "sample_rate": 22050, "n_fft": 128, "hop_length": 50, "win_length": 99, "n_mels": 20, "f_min": 20.0,
        "f_max": 8000.0, "power": 1.0, "pad_mode": "constant", "norm": "slaney", "mel_scale": "slaney",
    },
    "odd": {
        "sample_rate": 8000, "n_fft": 105, "hop_length": 60, "n_mels": 10, "power": 1.5, "center": False,
        "norm": "slaney",
    },
    "short": {"sample_rate": 8000, "n_fft": 100, "hop_length": 16, "n_mels": 10, "pad_mode": "constant"},
}  # fmt: skip
"""Of mel_spectrogram; "short" is of the first SHORT samples only."""
BLIND = BLIND.format(samples=SAMPLES)
CLAIM = CLAIM.format(narrow=PROMISED["float64"], wide=PROMISED["float32"])
ALONE = 2
"""The wave that is also looked at by itself."""
RECORDED = Path(__file__).parent.parent / "assets" / "librosa_mel.npz"


def waves(seed: int) -> np.ndarray:
    """(B, N) in float32: noise, silence, a clipped tone, and clicks at both ends."""
    rng = np.random.default_rng([seed, 83])
    at = np.arange(SAMPLES)
    noise = rng.standard_normal((2, SAMPLES))
    tone = np.clip(1.7 * np.sin(0.21 * at) + 0.01 * noise[1], -1.0, 1.0)
    clicks = 0.02 * rng.standard_normal(SAMPLES)
    clicks[[0, -1]] = 0.9, -0.8
    return np.stack([0.3 * noise[0], np.zeros(SAMPLES), tone, clicks]).astype(np.float32)


def _given(name: str, wave: Any) -> Any:
    return wave[:, :SHORT] if name == "short" else wave


def problem(seed: int) -> Any:
    """Every setting over the waves, with the waves as the parameters."""
    import jax

    import omni_jax.audio
    import omni_torch.audio
    from parity.checks._encoders import Problem
    from parity.pair import Pair
    from parity.weights import Link

    def outputs(audio, wave):
        out = {name: audio.mel_spectrogram(_given(name, wave), **how) for name, how in SETTINGS.items()}
        return out | {"log": audio.log_mel(out["family"])}

    def ours(params, *weights):
        wave = params["wave"]
        single = omni_jax.audio.mel_spectrogram(jax.lax.stop_gradient(wave)[ALONE], **SETTINGS["family"])
        return outputs(omni_jax.audio, wave) | {"alone": single}

    def theirs(params, *weights):
        wave = params["wave"]
        single = omni_torch.audio.mel_spectrogram(wave.detach()[ALONE], **SETTINGS["family"])
        return outputs(omni_torch.audio, wave) | {"alone": single}

    def loss(out, *weights):
        return sum((out[name] * weight).sum() for name, weight in zip(SETTINGS, weights))

    given = waves(seed)
    rng = np.random.default_rng([seed, 89])
    shapes = {name: _shape(_given(name, given).shape, how) for name, how in SETTINGS.items()}
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in shapes.values()]
    pair = Pair(
        jax=ours,
        torch=theirs,
        template={"wave": given},
        links=[Link("wave", "wave")],
        loss=(loss, loss),
        taps={},
        name="mel",
        hasty=True,
    )
    same = {"alone": lambda reference: reference["family"][ALONE]}
    return Problem("mel", "", pair, {"wave": given}, weights, same, PRECISIONS)


def _shape(shape: Sequence[int], how: Mapping[str, Any]) -> tuple[int, int, int]:
    from omni_torch.mel import num_frames

    T = num_frames(shape[1], how["n_fft"], how["hop_length"], how.get("center", True))
    return shape[0], how["n_mels"], T


# ------------------------------------------------------------------------------------------------ third parties


def by_stft(wave: np.ndarray, how: Mapping[str, Any]) -> np.ndarray:
    """torch.stft's power in float64, through the twins' filter bank."""
    import torch

    from omni_torch.mel import mel_filter_bank

    n_fft, W = how["n_fft"], how.get("win_length") or how["n_fft"]
    x = torch.from_numpy(wave.astype(np.float64))
    window = torch.hann_window(W, periodic=True, dtype=torch.float64)
    center, mode = how.get("center", True), how.get("pad_mode", "reflect")
    spectrum = torch.stft(x, n_fft, how["hop_length"], W, window, center=center, pad_mode=mode, return_complex=True)
    names = ("f_min", "f_max", "norm", "mel_scale")
    bank = mel_filter_bank(how["sample_rate"], n_fft, how["n_mels"], **{k: how[k] for k in names if k in how})
    return bank.T @ (spectrum.abs() ** how.get("power", 2.0)).numpy()


def by_librosa(wave: np.ndarray, how: Mapping[str, Any]) -> np.ndarray:
    """librosa's, in float64, of the same settings by its own names."""
    import warnings

    names = {"sample_rate": "sr", "f_min": "fmin", "f_max": "fmax"}
    given = {names.get(name, name): value for name, value in how.items() if name != "mel_scale"}
    given = {"norm": None, "pad_mode": "reflect", **given}
    htk = how.get("mel_scale", "htk") == "htk"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bands without a frequency, a wave shorter than the window
        import librosa

        return librosa.feature.melspectrogram(
            y=wave.astype(np.float64), window="hann", htk=htk, dtype=np.float64, **given
        )


def record(path: Path = RECORDED) -> None:
    """Write what librosa makes of the waves of seed 0; its import takes longer than this check."""
    given = waves(0)
    found: dict[str, Any] = {name: by_librosa(_given(name, given), how) for name, how in SETTINGS.items()}
    np.savez_compressed(path, digest=np.array(_digest(given)), **found)


def _digest(wave: np.ndarray) -> str:
    return hashlib.sha256(wave.tobytes() + repr(SETTINGS).encode()).hexdigest()


def _librosa(scope: Scope) -> tuple[dict[str, np.ndarray], str]:
    """(setting -> librosa's bands, nothing; or none of them, and why)."""
    given = waves(scope.seed)
    if scope.full:
        try:
            return {name: by_librosa(_given(name, given), how) for name, how in SETTINGS.items()}, ""
        except ImportError:
            return {}, "librosa is not installed: not compared with it"
    with np.load(RECORDED) as stored:
        if str(stored["digest"]) != _digest(given):
            return {}, "librosa's numbers are recorded for other waves (those of seed 0): not compared; --full does it"
        return {name: stored[name] for name in SETTINGS}, ""


def promised_row(name: str, precision: str, sides: Mapping[str, np.ndarray], theirs: np.ndarray) -> Row:
    """Both twins within PROMISED of the largest of `theirs`."""
    bound, most = PROMISED[precision], np.abs(theirs).max()
    with np.errstate(invalid="ignore"):
        off = {side: float(np.abs(x - theirs).max() / most) for side, x in sides.items() if x.shape == theirs.shape}
    fine = len(off) == len(sides) and all(value <= bound for value in off.values())
    words = (
        f"{' and '.join(f'{side} {value:.1e}' for side, value in off.items())} of its maximum; {bound:g} is promised"
    )
    return Row(
        "mel", "mel", "", precision, name, Verdict.AGREE if fine else Verdict.DIFFER, words, shape=theirs.shape,
        excess=max(off.values(), default=np.inf) / bound,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ your own file


def own_file(path: str) -> list[Row]:
    """The samples that both twins read, bit by bit; and the family's spectrogram of all of them."""
    import jax
    import torch

    import omni_jax.audio
    import omni_torch.audio

    ours, theirs = np.asarray(omni_jax.audio.load_audio(path)), omni_torch.audio.load_audio(path).numpy()
    equal = ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()
    name = Path(path).name
    verdict = Verdict.AGREE if equal else Verdict.DIFFER
    words = f"all {ours.size} samples equal" if equal else "the twins read other samples"
    rows = [Row("mel", name, "", "exact", f"{name}: samples", verdict, words, shape=ours.shape)]
    how: dict[str, Any] = SETTINGS["family"] | {"pad_mode": "constant"}  # however short it is
    truth = by_stft(ours[None], how)[0]
    if not truth.any():
        return [*rows, Row("mel", name, "", "float64", f"{name}: torch.stft", Verdict.UNDETERMINED, "it is silent")]
    for precision in PRECISIONS:
        wave: Any = ours.astype(precision)
        with jax.enable_x64(precision == "float64"):
            sides = {"jax": np.asarray(omni_jax.audio.mel_spectrogram(wave, **how))}
        sides["torch"] = omni_torch.audio.mel_spectrogram(torch.from_numpy(wave), **how).numpy()
        rows.append(promised_row(f"{name}: torch.stft", precision, sides, truth))
    return rows


# ------------------------------------------------------------------------------------------------ controls


def _changed(name: str, change: Any) -> Any:
    """A context that puts `change(right)` in the place of omni_torch.audio's function of this name."""

    def within(module: Any) -> Any:
        import omni_torch.audio
        from parity.checks._encoders import replaced

        return replaced(omni_torch.audio, name, change(getattr(omni_torch.audio, name)))

    return within


def _scale(right: Any) -> Any:
    other = {"htk": "slaney", "slaney": "htk"}
    return lambda rate, n_fft, n, low, high, norm, scale: right(rate, n_fft, n, low, high, norm, other[scale])


def _norm(right: Any) -> Any:
    other = {None: "slaney", "slaney": None}
    return lambda rate, n_fft, n, low, high, norm, scale: right(rate, n_fft, n, low, high, other[norm], scale)


def _padding(module: Any) -> Any:
    from torch.nn import functional

    from parity.checks._encoders import replaced

    right = functional.pad
    return replaced(
        functional, "pad", lambda x, pad, mode: right(x, pad, mode="constant" if mode == "reflect" else mode)
    )


def bugs() -> dict[str, Any]:
    """What CONTROLS names beside the simple ones, as `Bug`s."""
    from parity.checks._encoders import Bug

    every = tuple(SETTINGS)
    reflected = tuple(k for k, how in SETTINGS.items() if {"center", "pad_mode"}.isdisjoint(how))
    squared = tuple(k for k, how in SETTINGS.items() if "power" not in how)
    narrow = lambda right: lambda *args, power, **kw: right(*args, power=1.0 if power == 2.0 else power, **kw)  # noqa: E731
    return {
        "the other scale": Bug(within=_changed("mel_filter_bank", _scale), seen=every),
        "the other norm": Bug(within=_changed("mel_filter_bank", _norm), seen=every),
        "symmetric Hann": Bug(within=_changed("hann_window", lambda right: np.hanning), seen=every),
        "one frame on": Bug(
            within=_changed("_mel", lambda right: lambda *a, **k: right(*a, **k).roll(1, -1)), seen=every
        ),
        "magnitude for power": Bug(within=_changed("_mel", narrow), seen=squared),
        "zeros for a reflection": Bug(within=_padding, seen=reflected),
    }


CONTROLS = {
    **SIMPLE,
    "the other scale": "HTK's scale for Slaney's, and the other way round",
    "the other norm": "triangles of area 1 for triangles of height 1, and the other way round",
    "symmetric Hann": "the window that ends in 0 as well",
    "one frame on": "every frame one later",
    "magnitude for power": "power 1 where 2 is asked for",
    "zeros for a reflection": "constant padding where the wave is to be reflected",
}


def run(scope: Scope, progress: Progress) -> CheckResult:
    """Judge bands and gradients; then against torch.stft, librosa, and on the user's own file."""
    from parity.checks._encoders import controls, judged, row_of

    started = time.perf_counter()
    result, seen = CheckResult("mel"), []
    made = problem(scope.seed)
    recorded, why = _librosa(scope)
    result.notes += [why] if why else []
    for _, case in judged([made], scope, PRECISIONS, progress):
        seen.append((made, case))
        result.rows += case.main.rows("mel", case.config, case.regime)
        for name, how in SETTINGS.items():
            ours, theirs, reference, noise = case.main.values[name]
            if case.precision == "float64":
                truth = by_stft(_given(name, made.weights["wave"]), how)
                result.rows.append(
                    row_of("mel", f"torch.stft: {name}", truth, reference, noise, "float64", config="mel")
                )
            if name in recorded:
                sides = {"jax": ours, "torch": theirs}
                result.rows.append(promised_row(f"librosa: {name}", case.precision, sides, recorded[name]))
    if scope.audio is not None:
        result.rows += own_file(scope.audio)
    if scope.controls:
        result.controls = controls(seen, bugs())
    result.seconds = time.perf_counter() - started
    return result
