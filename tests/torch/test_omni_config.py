"""OmniConfig and its sections: what they refuse, and which of the family's files they read."""

from __future__ import annotations

import dataclasses
import json

import pytest

from omni_torch.config import ThinkerConfig
from omni_torch.omni_config import AudioConfig, OmniConfig, VisionConfig

THINKER = {"vocab_size": 101, "n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 48}
EXPORT = {
    "model_type": "muomni",
    "thinker": THINKER | {"ctx_len": 64},
    **THINKER,
    "audio": {
        "mel_bins": 128,
        "sample_rate": 8000,
        "frame_hop": 80,
        "frame_win": 200,
        "downsample_time": 8,
        "target_hz": 12.5,
        "d_model": 96,
        "n_layers": 2,
        "n_heads": 2,
        "d_ff": 384,
        "dropout": 0.3,
        "lr": 5e-4,
        "ctc_vocab_size": 98,
        "max_text_len": 64,
        "max_mel_length": 3600,
        "train_csv": "data/asr.csv",
        "save_dir": "out",
    },
    "vision": {
        "img_size": 32,
        "patch": 8,
        "d_model": 64,
        "n_layers": 3,
        "n_heads": 2,
        "d_ff": 128,
        "dropout": 0.2,
        "train_manifest": "images.json",
        "image_root": "images",
        "embed_dim": 128,
        "vocab_size": 101,
        "ctx_len": 64,
        "use_thinker_for_text": False,
        "thinker_ckpt": "out",
        "thinker": {},
        "temperature": 0.07,
    },
    "talker": {"d_model": 192},
    "torch_dtype": "float16",
}
"""As the family's exports are, with other numbers."""


def config(**sections) -> OmniConfig:
    return OmniConfig(ThinkerConfig(**THINKER), **sections)


def test_defaults_are_the_familys() -> None:
    assert dataclasses.astuple(AudioConfig()) == (192, 3, 768, 4, 0.1, 4, 16000, 1024, 160, 400)
    assert dataclasses.astuple(VisionConfig()) == (224, 16, 192, 12, 3, 768, 0.1)
    assert config() == config(audio=None, vision=None)
    assert hash(config(audio=AudioConfig())) == hash(config(audio=AudioConfig()))


def test_vectors_are_the_frames_halved_and_rounded_up() -> None:
    for factor, halvings in ((4, 2), (8, 3)):
        for frames in range(1, 70):
            left = frames
            for _ in range(halvings):
                left = (left + 1) // 2
            assert AudioConfig(downsample_factor=factor).num_vectors(frames) == left


def test_the_familys_export(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(EXPORT), encoding="utf-8")
    found = OmniConfig.from_json(path)
    assert found.thinker == ThinkerConfig(**THINKER, ctx_len=64)
    assert found.audio == AudioConfig(96, 2, 384, 2, 0.3, 8, 8000, 1024, 80, 200)
    assert found.vision == VisionConfig(32, 8, 64, 3, 2, 128, 0.2)
    assert OmniConfig.from_dict(EXPORT) == found


@pytest.mark.parametrize("sections", [{}, {"audio": AudioConfig(ff=8)}, {"vision": VisionConfig(patch=8)}])
def test_there_and_back(sections, tmp_path) -> None:
    made = config(**sections)
    made.to_json(tmp_path / "config.json")
    assert OmniConfig.from_json(tmp_path / "config.json") == made
    assert OmniConfig.from_dict(made.to_dict()) == made


@pytest.mark.parametrize(
    ("kind", "change", "names"),
    [
        (AudioConfig, {"heads": 5}, ("heads=5", "d=192")),
        (AudioConfig, {"downsample_factor": 2}, ("downsample_factor=2", "4 or 8")),
        (AudioConfig, {"win_length": 1025}, ("win_length=1025", "n_fft=1024")),
        (AudioConfig, {"hop_length": 0}, ("hop_length=0",)),
        (AudioConfig, {"layers": True}, ("layers=True",)),
        (AudioConfig, {"d": "192"}, ("d='192'",)),
        (VisionConfig, {"patch": 15}, ("patch=15", "img_size=224")),
        (VisionConfig, {"dropout": 1.0}, ("dropout=1.0", "[0, 1)")),
        (VisionConfig, {"ff": 2.5}, ("ff=2.5",)),
        (config, {"audio": VisionConfig()}, ("audio=", "AudioConfig")),
        (config, {"vision": {}}, ("vision={}", "VisionConfig")),
    ],
)
def test_refused(kind, change, names) -> None:
    with pytest.raises(ValueError) as caught:
        kind(**change)
    assert all(name in str(caught.value) for name in names), caught.value


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"audio": {"n_head": 3}}, ("'audio.n_head'", "'n_heads'")),
        ({"vision": {"size": 3}}, ("'vision.size'",)),
        ({"audio": {"mel_bins": 80}}, ("audio.mel_bins=80", "128")),
        ({"audio": {"d": 96, "d_model": 96}}, ("audio.d_model", "audio.d,")),
        ({"audio": [1]}, ("'audio' must be an object", "list")),
        ({"vision": {"heads": 5}}, ("vision.heads=5",)),
        ({"colour": 1}, ("'colour'",)),
        ({"thinker": {"d_model": 33}}, ("d_model=33",)),
    ],
)
def test_refused_in_a_file(change, names, tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(THINKER | change), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        OmniConfig.from_json(path)
    assert all(name in str(caught.value) for name in (*names, str(path))), caught.value
    with pytest.raises(ValueError):
        OmniConfig.from_dict(THINKER | change)


def test_no_mapping() -> None:
    with pytest.raises(ValueError, match="got list"):
        OmniConfig.from_dict([])  # pyright: ignore[reportArgumentType]
