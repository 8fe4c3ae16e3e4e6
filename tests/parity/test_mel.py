"""The mel check; both twins over drawn settings against librosa; and what holds of them in float32."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import omni_jax.audio  # noqa: E402
import omni_torch.audio  # noqa: E402
from parity.checks import Scope, mel  # noqa: E402
from parity.checks._encoders import judged  # noqa: E402
from parity.result import CheckResult  # noqa: E402
from parity.runner import run as run_checks  # noqa: E402
from parity.verdict import Verdict  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
DRAWN = 50
LOUD_OUTSIDE = (69, 82, 831)
"""Of 3,000 drawings those whose float32 bands err by more than 1e-6 of the largest one."""


@pytest.fixture(scope="module")
def result(one_thread) -> CheckResult:
    return mel.run(Scope(), lambda *_: None)


def verdicts(precision: str = "float64", seed: int = 0) -> dict[str, Verdict]:
    scope = Scope(precisions=(precision,), seed=seed)
    ((_, case),) = judged([mel.problem(seed)], scope, mel.PRECISIONS, lambda *_: None)
    return case.main.verdicts


# --- the check -------------------------------------------------------------------------------------------------------


def test_the_run_agrees(result) -> None:
    assert result.error is None
    assert [row for row in result.rows if row.verdict is not Verdict.AGREE] == []
    assert result.exit_code == 0
    assert result.notes == []


@pytest.mark.parametrize("control", mel.CONTROLS)
def test_the_control_is_rejected(result, control) -> None:
    (found,) = [c for c in result.controls if c.name == control]
    assert found.rejected, found.evidence


def test_every_control_is_declared(result) -> None:
    assert {c.name for c in result.controls} == set(mel.CONTROLS)


def test_everything_is_looked_at(result) -> None:
    seen = {(row.precision, row.name) for row in result.rows}
    for name in mel.SETTINGS:
        assert {("float64", name), ("float32", name), ("float64", f"torch.stft: {name}")} <= seen
        assert {("float64", f"librosa: {name}"), ("float32", f"librosa: {name}")} <= seen
    assert {("float64", "alone"), ("float64", "log"), ("float64", "gradient wave")} <= seen


@pytest.mark.parametrize("seed", [1, 2])
def test_other_seeds_agree(seed) -> None:
    found = mel.run(Scope(seed=seed), lambda *_: None)
    assert {row.verdict for row in found.rows} == {Verdict.AGREE}
    assert any("recorded for other waves" in note for note in found.notes)


@pytest.mark.long
def test_the_full_run_compiles_and_asks_librosa() -> None:
    found = mel.run(Scope(full=True, seed=3), lambda *_: None)
    assert found.exit_code == 0
    assert found.notes == []
    assert sum(row.name.startswith("librosa") for row in found.rows) == 2 * len(mel.SETTINGS)


def test_what_is_recorded_is_what_librosa_says(tmp_path) -> None:
    pytest.importorskip("librosa")
    mel.record(tmp_path / "today.npz")
    with np.load(mel.RECORDED) as then, np.load(tmp_path / "today.npz") as now:
        assert set(then) == set(now)
        for name in then:
            if name != "digest":
                assert np.abs(then[name] - now[name]).max() <= mel.PROMISED["float64"] * np.abs(now[name]).max()
        assert str(then["digest"]) == str(now["digest"])


# --- bugs in the twins -----------------------------------------------------------------------------------------------


def test_a_torch_window_that_is_symmetric_is_seen(monkeypatch) -> None:
    monkeypatch.setattr(omni_torch.audio, "hann_window", np.hanning)
    found = verdicts()
    assert {found[name] for name in mel.SETTINGS} == {Verdict.DIFFER}


def test_a_jax_bank_of_the_other_scale_is_seen(monkeypatch) -> None:
    right = omni_jax.audio.mel_filter_bank
    monkeypatch.setattr(omni_jax.audio, "mel_filter_bank", mel._scale(right))
    found = verdicts()
    assert {found[name] for name in mel.SETTINGS} == {Verdict.DIFFER}


def test_a_bank_in_float32_is_named(monkeypatch) -> None:
    right = omni_torch.audio.mel_filter_bank
    monkeypatch.setattr(omni_torch.audio, "mel_filter_bank", lambda *a: right(*a).astype(np.float32))
    assert {verdicts()[name] for name in mel.SETTINGS} == {Verdict.PINNED}


def test_a_mistake_that_both_share_is_seen_by_third_parties(monkeypatch) -> None:
    for audio in (omni_jax.audio, omni_torch.audio):
        monkeypatch.setattr(audio, "hann_window", np.hanning)
    found = mel.run(Scope(precisions=("float64",), controls=False), lambda *_: None)
    verdict = {row.name: row.verdict for row in found.rows}
    for name in mel.SETTINGS:
        assert verdict[name] is Verdict.AGREE
        assert verdict[f"torch.stft: {name}"] is verdict[f"librosa: {name}"] is Verdict.DIFFER


def test_a_frame_too_few_is_no_pass(monkeypatch) -> None:
    right = omni_torch.audio._mel
    monkeypatch.setattr(omni_torch.audio, "_mel", lambda *a, **k: right(*a, **k)[..., :-1])
    found = run_checks(Scope(precisions=("float64",)), ("mel",))
    assert found.exit_code == 3
    assert found.checks[0].error


def test_a_gradient_of_silence_that_is_nan_is_seen(monkeypatch) -> None:
    def careless(wave, window, bank, *, n_fft, hop_length, power, pad_mode):
        n = n_fft // 2
        wave = wave if pad_mode is None else torch.nn.functional.pad(wave, (n, n), mode=pad_mode)
        left = (n_fft - len(window)) // 2
        frames = wave[:, left : wave.shape[1] - (n_fft - len(window) - left)].unfold(1, len(window), hop_length)
        spectrum = torch.fft.rfft(frames * window, n=n_fft)
        return ((spectrum.real**2 + spectrum.imag**2) ** (power / 2) @ bank).transpose(1, 2)

    monkeypatch.setattr(omni_torch.audio, "_mel", careless)
    found = verdicts()
    assert {found[name] for name in mel.SETTINGS} == {Verdict.AGREE}
    assert found["gradient wave"] is Verdict.DIFFER


# --- drawn settings --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def librosa() -> Any:
    librosa = pytest.importorskip("librosa")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports lazily, and what it imports warns of its own future
        librosa.feature.melspectrogram(y=np.ones(64), n_fft=16, n_mels=4)
    return librosa


def draw(seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    """A wave and the settings of its spectrogram, drawn."""
    rng = np.random.default_rng(seed)
    pick = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    sample_rate = pick(8000, 16000, 22050, 44100)
    n_fft = pick(64, 100, 127, 255, 256, 400, 512, 1024)
    f_min = pick(0.0, 0.0, 20.0, 133.3)
    settings = {
        "sample_rate": sample_rate,
        "n_fft": n_fft,
        "hop_length": int(rng.integers(1, n_fft)),
        "win_length": pick(None, int(rng.integers(2, n_fft + 1))),
        "n_mels": pick(1, 20, 40, 80, 128),
        "f_min": f_min,
        "f_max": pick(None, None, sample_rate / 3.0),
        "power": pick(1.0, 2.0, 2.0, 1.5),
        "center": pick(True, True, False),
        "pad_mode": pick("reflect", "constant"),
        "norm": pick(None, "slaney"),
        "mel_scale": pick("htk", "slaney"),
    }
    samples = n_fft + int(rng.integers(0, 1500))  # rarely a whole number of hops
    wave = rng.normal(size=samples) * np.exp(rng.normal()) + np.sin(np.arange(samples) * rng.uniform(0.0, 3.0))
    return wave, settings


def in_torch(wave: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    return omni_torch.audio.mel_spectrogram(torch.from_numpy(wave), **settings).numpy()


def in_jax(wave: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    with jax.enable_x64(wave.dtype == np.float64):
        return np.asarray(omni_jax.audio.mel_spectrogram(jnp.asarray(wave), **settings))


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("seed", range(DRAWN))
def test_both_twins_are_librosas(librosa, seed) -> None:
    wave, settings = draw(seed)
    for precision, bound in mel.PROMISED.items():
        given = wave.astype(precision)
        expected = mel.by_librosa(given, settings)
        made = [in_torch(given, settings), in_jax(given, settings)]
        for actual in made:
            assert actual.dtype == precision
            assert error(actual, expected) <= bound, settings
        assert error(*made) <= bound, settings


def loudness(wave: np.ndarray, settings: dict[str, Any]) -> float:
    """The largest magnitude of any frequency over the largest within the bands."""
    whole = settings | {"f_min": 0.0, "f_max": None, "power": 1.0}
    bank = omni_torch.audio.mel_filter_bank(
        *(settings[k] for k in ("sample_rate", "n_fft", "n_mels", "f_min", "f_max", "norm", "mel_scale"))
    )
    n_fft, W = whole["n_fft"], whole["win_length"] or whole["n_fft"]
    spectrum = torch.stft(
        torch.from_numpy(wave), n_fft, whole["hop_length"], W, torch.hann_window(W, dtype=torch.float64),
        center=whole["center"], pad_mode=whole["pad_mode"], return_complex=True,
    ).abs().numpy()  # fmt: skip
    return float(spectrum.max() / spectrum[bank.sum(1) > 0].max())


def float32_error(seed: int) -> tuple[float, float]:
    """(torch's error in float32, the part of it that is left when what is loud outside the bands is accounted for)."""
    wave, settings = draw(seed)
    narrow = wave.astype(np.float32)
    off = error(in_torch(narrow, settings), in_torch(narrow.astype(np.float64), settings))
    return off, off / loudness(narrow.astype(np.float64), settings)


@pytest.mark.parametrize("seed", LOUD_OUTSIDE)
def test_float32_errs_in_proportion_to_the_loudest_frequency_within_the_bands_or_not(seed) -> None:
    """A transform's error is relative to the whole frame: what f_max cuts off still counts. librosa's does the same."""
    wave, settings = draw(seed)
    off, own = float32_error(seed)
    assert settings["f_max"] is not None
    assert off > mel.PROMISED["float32"] >= own
    narrow = wave.astype(np.float32)
    in_jaxs = error(in_jax(narrow, settings), in_torch(narrow.astype(np.float64), settings))
    assert in_jaxs <= mel.PROMISED["float32"] * loudness(narrow.astype(np.float64), settings)


@pytest.mark.long
def test_of_3000_drawings_only_those_err_by_more() -> None:
    found = {seed: float32_error(seed) for seed in range(3000)}
    assert max(own for _, own in found.values()) <= mel.PROMISED["float32"]
    assert [seed for seed, (off, _) in found.items() if off > mel.PROMISED["float32"]] == list(LOUD_OUTSIDE)


# --- your own file ---------------------------------------------------------------------------------------------------


def saved(path: Path, wave: np.ndarray) -> Path:
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(path, wave, 8000)
    return path


def test_a_file_of_the_users_is_read_and_compared(tmp_path) -> None:
    path = saved(tmp_path / "own.wav", 0.3 * np.random.default_rng(0).standard_normal((4000, 2)))
    found = {(row.precision, row.name): row.verdict for row in mel.own_file(str(path))}
    assert set(found) == {
        ("exact", "own.wav: samples"), ("float64", "own.wav: torch.stft"), ("float32", "own.wav: torch.stft")
    }  # fmt: skip
    assert set(found.values()) == {Verdict.AGREE}


def test_a_short_and_a_silent_file(tmp_path) -> None:
    short = mel.own_file(str(saved(tmp_path / "short.wav", np.full(3, 0.25))))
    assert {row.verdict for row in short} == {Verdict.AGREE}
    silent = mel.own_file(str(saved(tmp_path / "silent.wav", np.zeros(900))))
    assert [row.verdict for row in silent] == [Verdict.AGREE, Verdict.UNDETERMINED]


def test_twins_that_read_a_file_differently_are_seen(tmp_path, monkeypatch) -> None:
    path = saved(tmp_path / "own.wav", 0.3 * np.random.default_rng(0).standard_normal(4000))
    right = omni_torch.audio.load_audio
    monkeypatch.setattr(omni_torch.audio, "load_audio", lambda path: right(path).roll(1))
    assert mel.own_file(str(path))[0].verdict is Verdict.DIFFER


def test_a_row_of_another_shape_is_no_pass() -> None:
    row = mel.promised_row("x", "float64", {"jax": np.ones(3), "torch": np.ones(2)}, np.ones(3))
    assert row.verdict is Verdict.DIFFER
