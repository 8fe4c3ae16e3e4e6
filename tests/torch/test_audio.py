"""Mel spectrograms against librosa in float64 and torch.stft; sound files, resampling, and the figure."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_torch.audio import (
    frames_per_second,
    hz_to_mel,
    load_audio,
    log_mel,
    mel_filter_bank,
    mel_spectrogram,
    mel_to_hz,
    num_frames,
    plot_mel,
)
from omni_torch.audio_file import resample

# What is required of a spectrogram, relative to the largest value of librosa's in float64.
MOST_FLOAT64, MOST_FLOAT32 = 1e-12, 1e-6
SETTINGS = 60
EPS64 = np.finfo(np.float64).eps


@pytest.fixture(scope="module")
def librosa():
    librosa = pytest.importorskip("librosa")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports lazily, and what it imports warns of its own future
        librosa.feature.melspectrogram(y=np.ones(64), n_fft=16, n_mels=4)
    return librosa


def draw(seed: int) -> tuple[np.ndarray, dict]:
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


def by_librosa(librosa, wave: np.ndarray, settings: dict) -> np.ndarray:
    names = {"sample_rate": "sr", "f_min": "fmin", "f_max": "fmax"}
    chosen = {names.get(name, name): value for name, value in settings.items() if name != "mel_scale"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some drawn bands are empty
        return librosa.feature.melspectrogram(
            y=wave, window="hann", htk=settings["mel_scale"] == "htk", dtype=np.float64, **chosen
        )


def assert_near(actual, expected: np.ndarray, bound: float, what: object = "") -> None:
    actual = np.asarray(actual)
    assert actual.shape == expected.shape, what
    assert np.isfinite(actual).all(), what
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= bound, f"{what}: {error:.1e}"


@pytest.mark.parametrize("seed", range(SETTINGS))
def test_mel_is_librosas(librosa, seed) -> None:
    wave, settings = draw(seed)
    expected = by_librosa(librosa, wave, settings)
    mel = mel_spectrogram(torch.from_numpy(wave), **settings)
    assert mel.dtype == torch.float64
    assert_near(mel, expected, MOST_FLOAT64, settings)
    narrow = wave.astype(np.float32)
    mel = mel_spectrogram(torch.from_numpy(narrow), **settings)
    assert mel.dtype == torch.float32
    assert_near(mel, by_librosa(librosa, narrow.astype(np.float64), settings), MOST_FLOAT32, settings)
    count = num_frames(wave.size, settings["n_fft"], settings["hop_length"], settings["center"])
    assert mel.shape == (settings["n_mels"], count)


@pytest.mark.parametrize("seed", range(0, SETTINGS, 4))
def test_mel_is_torch_stfts(seed) -> None:
    wave, settings = draw(seed)
    x, n_fft = torch.from_numpy(wave), settings["n_fft"]
    win_length = n_fft if settings["win_length"] is None else settings["win_length"]
    window = torch.hann_window(win_length, periodic=True, dtype=torch.float64)
    kinds = {"center": settings["center"], "pad_mode": settings["pad_mode"], "return_complex": True}
    spectrum = torch.stft(x, n_fft, settings["hop_length"], win_length, window, **kinds)
    bank = mel_filter_bank(
        settings["sample_rate"],
        *(n_fft, settings["n_mels"], settings["f_min"], settings["f_max"], settings["norm"], settings["mel_scale"]),
    )
    expected = bank.T @ (spectrum.abs() ** settings["power"]).numpy()
    assert_near(mel_spectrogram(x, **settings), expected, MOST_FLOAT64, settings)


@pytest.mark.parametrize("mel_scale", ["htk", "slaney"])
@pytest.mark.parametrize("norm", [None, "slaney"])
def test_bank_and_scale_are_librosas(librosa, mel_scale, norm) -> None:
    htk = mel_scale == "htk"
    hz = np.array([0.0, 1.0, 440.0, 999.9, 1000.0, 1000.1, 8000.0])
    assert_near(hz_to_mel(hz, mel_scale), librosa.hz_to_mel(hz, htk=htk), 4 * EPS64)
    assert_near(mel_to_hz(hz_to_mel(hz, mel_scale), mel_scale), hz, 8 * EPS64)
    bank = mel_filter_bank(16000, 1024, 128, norm=norm, mel_scale=mel_scale)
    assert bank.dtype == np.float64
    expected = librosa.filters.mel(sr=16000, n_fft=1024, n_mels=128, htk=htk, norm=norm, dtype=np.float64).T
    assert_near(bank, expected, MOST_FLOAT64)


def test_the_familys_settings() -> None:
    mel = mel_spectrogram(torch.zeros((2, 16000)), win_length=400)
    assert mel.shape == (2, 128, 101)
    assert not mel.any()  # silence
    assert frames_per_second(16000, 160) == 100.0
    assert num_frames(16000, 1024, 160, center=False) == 94


def test_edges_differ_by_padding_and_nothing_else() -> None:
    """A bound on the middle alone would not see the padding."""
    wave = torch.from_numpy(np.random.default_rng(0).normal(size=4000))
    reflected, zeros = (mel_spectrogram(wave, n_fft=256, pad_mode=mode) for mode in ("reflect", "constant"))
    inner = slice(1, -1)  # one frame on either side reaches over an end
    assert_near(reflected[:, inner], np.asarray(zeros[:, inner]), 64 * EPS64)
    for end in (0, -1):
        assert float((reflected[:, end] - zeros[:, end]).abs().max()) > 0.1 * float(zeros[:, end].max())


def test_full_scale_clipping_stays_finite() -> None:
    clipped = torch.arange(3001).mul(0.3).sin().sign()
    assert bool(mel_spectrogram(clipped).isfinite().all())


def test_a_clip_does_not_hear_the_rest_of_the_batch() -> None:
    rng = np.random.default_rng(0)
    waves = torch.from_numpy(rng.normal(size=(3, 777)) * np.array([[1.0], [1e-4], [1e4]]))
    together = log_mel(mel_spectrogram(waves, n_fft=200, hop_length=50))
    for alone, row in zip(waves, together, strict=True):
        assert_near(row, np.asarray(log_mel(mel_spectrogram(alone, n_fft=200, hop_length=50))), 64 * EPS64)


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_vmap_and_gradients(power) -> None:
    run = partial(mel_spectrogram, n_fft=64, hop_length=20, n_mels=10, power=power)
    waves = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 150)))
    expected = np.asarray(run(waves))
    assert_near(torch.func.vmap(run)(waves), expected, 64 * EPS64)
    # Through the logarithm, and along one direction: two central differences.
    total = lambda waves: log_mel(run(waves)).sum()  # noqa: E731
    direction = torch.from_numpy(np.random.default_rng(1).normal(size=waves.shape))
    step = EPS64 ** (1 / 3)
    measured = float(total(waves + step * direction) - total(waves - step * direction)) / (2 * step)
    assert float((torch.func.grad(total)(waves) * direction).sum()) == pytest.approx(measured, rel=1e4 * step**2)


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_silence_has_a_finite_gradient(power) -> None:
    run = lambda wave: log_mel(mel_spectrogram(wave, n_fft=64, hop_length=20, n_mels=10, power=power)).sum()  # noqa: E731
    assert not torch.func.grad(run)(torch.zeros(100)).any()


def test_low_precision_is_computed_in_float32() -> None:
    wave = torch.from_numpy(np.random.default_rng(0).normal(size=500)).bfloat16()
    mel = mel_spectrogram(wave, n_fft=128)
    assert mel.dtype == torch.float32
    assert torch.equal(mel, mel_spectrogram(wave.float(), n_fft=128))
    assert log_mel(mel.bfloat16()).dtype == torch.float32


def test_log_mel_has_an_absolute_floor() -> None:
    mel = torch.tensor([0.0, 1e-12, 1e-10, 1.0, 10.0])
    assert_near(log_mel(mel), np.log([1e-10, 1e-10, 1e-10, 1.0, 10.0]), 1e-6)
    assert log_mel(mel, floor=1.0).tolist()[:4] == [0.0] * 4


@pytest.mark.parametrize("samples", [1, 2, 99, 512])
def test_a_clip_too_short_to_be_reflected(samples) -> None:
    wave = torch.ones(samples)
    with pytest.raises(ValueError, match=rf'has {samples} samples: must have at least .* = 513 .* pad_mode="constant"'):
        mel_spectrogram(wave)
    assert mel_spectrogram(wave, pad_mode="constant").shape == (128, samples // 160 + 1)
    with pytest.raises(ValueError, match="at least n_fft = 1024 with center=False"):
        mel_spectrogram(wave, center=False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_fft": 0}, "n_fft = 0: must be an integer from 1 up"),
        ({"hop_length": 2.5}, "hop_length = 2.5: must be an integer"),
        ({"win_length": 2000}, "win_length = 2000: must be at most n_fft = 1024"),
        ({"n_mels": 0}, "n_mels = 0"),
        ({"f_max": 9000.0}, "above half the sample rate, 8000.0 Hz"),
        ({"f_min": 500.0, "f_max": 400.0}, "0 ≤ f_min < f_max"),
        ({"power": 0.0}, "power = 0.0: must be a positive number"),
        ({"power": True}, "power = True: must be a positive number"),
        ({"pad_mode": "replicate"}, "pad_mode = 'replicate': must be one of 'reflect', 'constant'"),
        ({"norm": "htk"}, "norm = 'htk': must be one of None, 'slaney'"),
        ({"mel_scale": "bark"}, "mel_scale = 'bark': must be one of 'htk', 'slaney'"),
    ],
)
def test_settings_that_are_refused(settings, words) -> None:
    with pytest.raises(ValueError, match=words):
        mel_spectrogram(torch.ones(2000), **settings)


def test_numbers_of_numpy_are_numbers() -> None:
    wave = torch.ones(2000)
    found = mel_spectrogram(wave, power=np.float32(2), f_min=np.float32(20), n_mels=np.int64(8))
    assert bool((found == mel_spectrogram(wave, power=2.0, f_min=20.0, n_mels=8)).all())
    assert bool((log_mel(found, floor=np.float64(1e-3)) == log_mel(found, floor=1e-3)).all())
    with pytest.raises(ValueError, match="floor = True"):
        log_mel(found, floor=True)


@pytest.mark.parametrize("shape", [(2000, 2), (600, 512)])
def test_channels_that_come_last_are_named(shape) -> None:
    with pytest.raises(ValueError, match=r"wave has shape .*of one wave with its channels last give the mean"):
        mel_spectrogram(torch.ones(shape))


def test_waves_that_are_refused() -> None:
    wave = np.ones((2, 2000), np.float32)
    for bad in (np.nan, np.inf):
        wave[1, 7] = bad
        with pytest.raises(ValueError, match=r"wave holds NaN or Inf, first at \[1, 7\]"):
            mel_spectrogram(torch.from_numpy(wave))
    assert torch.func.vmap(mel_spectrogram)(torch.from_numpy(wave))[1].isnan().any()
    for shape in ((0,), (2, 0), (1, 2, 2000), ()):
        with pytest.raises(ValueError, match=r"wave has shape .*: must be \(N,\) or \(B, N\)"):
            mel_spectrogram(torch.ones(shape))
    with pytest.raises(ValueError, match=r"dtype int16: must be floating.*32768"):
        mel_spectrogram(torch.ones(2000, dtype=torch.int16))
    with pytest.raises(ValueError, match="wave is a list, must be a tensor"):
        mel_spectrogram([0.0] * 2000)
    with pytest.raises(ValueError, match=r"floor = 0.0: must be from"):
        log_mel(torch.ones(3), floor=0.0)


# Sound files ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def soundfile():
    return pytest.importorskip("soundfile")


def tone(rate: int, hz: float = 440.0, seconds: float = 0.5) -> np.ndarray:
    return 0.5 * np.sin(2.0 * np.pi * hz * np.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize(
    ("name", "subtype", "bits"),
    [
        ("a.wav", "PCM_U8", 7),
        ("a.wav", "PCM_16", 15),
        ("a.wav", "PCM_24", 23),
        ("a.wav", "FLOAT", 24),
        ("a.wav", "DOUBLE", 24),
        ("a.flac", "PCM_16", 15),
    ],
)
def test_formats_without_loss(soundfile, tmp_path, name, subtype, bits) -> None:
    wave = tone(16000)
    soundfile.write(tmp_path / name, wave, 16000, subtype=subtype)
    loaded = load_audio(tmp_path / name)
    assert loaded.dtype == torch.float32
    assert loaded.shape == wave.shape
    assert float(np.abs(np.asarray(loaded) - wave).max()) <= 2.0**-bits


def test_ogg(soundfile, tmp_path) -> None:
    soundfile.write(tmp_path / "a.ogg", tone(16000), 16000)
    loaded = np.asarray(load_audio(tmp_path / "a.ogg"))
    assert np.corrcoef(loaded, tone(16000))[0, 1] > 0.99


def test_channels_are_averaged(soundfile, tmp_path) -> None:
    left, right = tone(16000), tone(16000, 1000.0)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right, 0 * left], axis=1), 16000, subtype="DOUBLE")
    loaded = np.asarray(load_audio(tmp_path / "a.wav"))
    assert np.array_equal(loaded, ((left + right + 0 * left) / 3.0).astype(np.float32))


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 16001])
def test_other_rates_are_resampled(soundfile, tmp_path, rate) -> None:
    soundfile.write(tmp_path / "a.wav", tone(rate), rate, subtype="DOUBLE")
    loaded = np.asarray(load_audio(tmp_path / "a.wav"))
    assert loaded.size == -(-int(rate * 0.5) * 16000 // rate)
    inner = slice(200, -200)
    # Kaiser's ripple for β = 12: 118 dB.
    assert np.abs(loaded - tone(16000, 440.0, 1.0)[: loaded.size])[inner].max() <= 10 ** (-110 / 20)


def test_what_the_new_rate_cannot_hold_is_taken_out() -> None:
    heard = resample(tone(48000, 7000.0), 48000, 16000)
    silenced = resample(tone(48000, 9000.0), 48000, 16000)
    inner = slice(200, -200)
    assert np.abs(heard[inner]).max() > 0.499
    assert np.abs(silenced[inner]).max() <= 10 ** (-100 / 20)
    assert np.abs(resample(np.ones(2000), 44100, 16000)[200:-200] - 1.0).max() <= 64 * EPS64
    wave = tone(16000)
    assert np.array_equal(resample(wave, 16000, 16000), wave)
    for bad in (0, 1.5):
        with pytest.raises(ValueError, match="sample_rate = "):
            resample(wave, 16000, bad)
    assert resample(np.ones(1), 3, 7).shape == (3,)


def test_files_that_are_refused(soundfile, tmp_path) -> None:
    path = tmp_path / "a.wav"
    with pytest.raises(ValueError, match="does not exist"):
        load_audio(path)
    with pytest.raises(ValueError, match="is a folder"):
        load_audio(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"is empty \(0 bytes\)"):
        load_audio(path)
    for name in ("a.wav", "a.raw", "a.mp3"):
        (tmp_path / name).write_bytes(b"not a sound file at all" * 10)
        with pytest.raises(ValueError, match="cannot be read as sound"):
            load_audio(tmp_path / name)
    soundfile.write(path, np.zeros(0), 16000)
    with pytest.raises(ValueError, match="holds no samples"):
        load_audio(path)
    soundfile.write(path, np.array([0.0, 0.5, np.nan]), 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match="holds nan at sample 2"):
        load_audio(path)
    soundfile.write(path, tone(16000), 16000)
    with pytest.raises(ValueError, match="sample_rate = 0"):
        load_audio(path, 0)


def test_a_file_cut_off_is_read_as_far_as_it_goes(soundfile, tmp_path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(16000), 16000)
    whole = np.asarray(load_audio(path))
    path.write_bytes(path.read_bytes()[:4044])
    assert np.array_equal(load_audio(path), whole[:2000])


def test_what_is_no_path_and_what_would_fill_the_memory(soundfile, tmp_path) -> None:
    for path in (None, 3, b"a.wav", [0.0], np.zeros(3)):
        with pytest.raises(ValueError, match="must be a path"):
            load_audio(path)
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(16000), 16000)
    with pytest.raises(ValueError, match=r"allowed are up to 536870912; cut it into parts"):
        load_audio(path, 10**12)
    soundfile.write(path, tone(16000), 1)  # a small file can claim any rate
    with pytest.raises(ValueError, match="of 1 samples a second, makes too many of them"):
        load_audio(path, 10**6)
    soundfile.write(path, np.array([0.0, 1e300]), 16000, subtype="DOUBLE")
    with pytest.raises(ValueError, match=r"reaches 1.0e\+300: must fit into float32"):
        load_audio(path)


def test_a_wave_too_loud_for_its_dtype() -> None:
    for power in (2.0, 1.0, 0.01):
        with pytest.raises(ValueError, match=r"wave reaches 1.0e\+30: must be at most .*, or its power is Inf"):
            mel_spectrogram(torch.full((2000,), 1e30), power=power)
    assert mel_spectrogram(torch.full((2000,), 1e13)).max() < np.inf


@pytest.mark.parametrize("name", ["a.flac", "a.wav"])
def test_ten_minutes_of_two_channels(soundfile, tmp_path, name) -> None:
    """In 24 bits, and of another rate; the last second is heard as it is alone."""
    rate, seconds = 22050, 600
    second = np.stack([tone(rate, 440.0, 1.0), tone(rate, 1000.0, 1.0)], axis=1)
    whole = np.concatenate([np.zeros((rate * (seconds - 1), 2)), second])
    soundfile.write(tmp_path / name, whole, rate, subtype="PCM_24")
    loaded = load_audio(tmp_path / name)
    assert loaded.shape == (16000 * seconds,)
    mel = mel_spectrogram(loaded, n_fft=256, n_mels=8)
    assert mel.shape == (8, 100 * seconds + 1)
    assert not mel[:, : 100 * (seconds - 2)].any()
    alone = mel_spectrogram(loaded[-16000:], n_fft=256, n_mels=8)
    assert_near(mel[:, -90:], np.asarray(alone[:, -90:]), MOST_FLOAT32)


@pytest.mark.parametrize("channels", [1, 2])
def test_silence_stays_silence(soundfile, tmp_path, channels) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros((4410, channels)), 44100, subtype="PCM_U8")
    loaded = load_audio(tmp_path / "a.wav")
    assert not loaded.any()
    assert np.isfinite(np.asarray(log_mel(mel_spectrogram(loaded)))).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 60), st.integers(1, 60))
def test_resampled_lengths(samples, from_rate, to_rate) -> None:
    assert resample(np.ones(samples), from_rate, to_rate).shape == (-(-samples * to_rate // from_rate),)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_shapes(data) -> None:
    """Whatever is allowed: (B, n_mels, num_frames), the clip alone without B."""
    n_fft = data.draw(st.integers(1, 64))
    chosen = {"n_fft": n_fft, "hop_length": data.draw(st.integers(1, 80)), "n_mels": data.draw(st.integers(1, 12))}
    chosen |= {"win_length": data.draw(st.integers(1, n_fft)), "center": data.draw(st.booleans())}
    shape = (*data.draw(st.lists(st.integers(1, 3), max_size=1)), data.draw(st.integers(n_fft, 300)))
    mel = mel_spectrogram(torch.zeros(shape), **chosen)
    frames = num_frames(shape[-1], n_fft, chosen["hop_length"], chosen["center"])
    assert mel.shape == (*shape[:-1], chosen["n_mels"], frames)


# The figure ----------------------------------------------------------------------------------------------------------


def test_figure(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    mel = mel_spectrogram(torch.from_numpy(tone(16000, 1000.0)).float().requires_grad_())
    figure = plot_mel(mel, 16000, 160, tmp_path / "a.png", title="a tone")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    axes, bar = figure.axes
    assert "(s)" in axes.get_xlabel()
    assert "(Hz)" in axes.get_ylabel()
    assert "dB" in bar.get_ylabel()
    image = axes.get_images()[0]
    shown = np.asarray(image.get_array())
    assert shown.max() == 0.0
    assert shown.min() == -80.0
    # The loudest band stands where the axis says 1,000 Hz.
    ticks = {label.get_text(): place for label, place in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)}
    assert abs(shown[:, 20].argmax() + 1 - ticks["1,000"]) <= 1.0
    assert np.asarray(plot_mel(0.0 * mel, 16000, 160).axes[0].get_images()[0].get_array()).max() == -80.0
    with pytest.raises(ValueError, match=r"must be \(n_mels, T\)"):
        plot_mel(mel[None], 16000, 160)
    with pytest.raises(ValueError, match="must be a power"):
        plot_mel(log_mel(mel), 16000, 160)


def test_a_rate_that_no_sound_has_is_refused() -> None:
    with pytest.raises(ValueError, match="2147483647 samples a second: must be at most 1048576"):
        resample(np.zeros(8), 2**31 - 1, 16000)
