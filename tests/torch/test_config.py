"""ThinkerConfig: what it refuses, and which of the family's files it reads."""

from __future__ import annotations

import dataclasses
import json

import pytest

from omni_torch.config import BOS_ID, EOS_ID, PAD_ID, ThinkerConfig, read_config

REQUIRED = {"vocab_size": 101, "n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 48}
TRAINING = {"lr": 3e-4, "wd": 0.1, "use_flash": True, "train_text": "text.txt", "save_dir": "out"}


def write(tmp_path, content) -> str:
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return str(path)


def test_special_ids() -> None:
    assert (PAD_ID, BOS_ID, EOS_ID) == (0, 1, 2)


def test_fields_defaults_and_derived_sizes() -> None:
    config = ThinkerConfig(**REQUIRED)
    assert " ".join(config.to_dict()) == (
        "vocab_size n_layers d_model n_heads d_ff dropout rope_theta ctx_len use_gqa kv_groups use_swiglu use_moe "
        "num_experts num_experts_per_tok"
    )
    assert list(config.to_dict().values())[5:] == [0.1, 10000.0, 512, False, None, True, False, 8, 2]
    assert (config.head_dim, config.kv_heads) == (8, 4)
    assert ThinkerConfig(**REQUIRED, use_gqa=True).kv_heads == 2
    assert ThinkerConfig(**REQUIRED, use_gqa=True, kv_groups=1).kv_heads == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 64  # pyright: ignore[reportAttributeAccessIssue]
    assert hash(config) == hash(ThinkerConfig(**REQUIRED))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"d_model": 30}, ("d_model=30", "n_heads=4")),
        ({"d_model": 36, "n_heads": 4}, ("d_model=36", "head size 9", "d_model=40")),
        ({"use_gqa": True, "kv_groups": 3}, ("kv_groups=3", "n_heads=4")),
        ({"use_gqa": True, "kv_groups": 8}, ("kv_groups=8", "n_heads=4")),
        ({"use_gqa": True, "kv_groups": 0}, ("kv_groups=0",)),
        ({"use_gqa": True, "n_heads": 1}, ("kv_groups=None", "n_heads // 2 = 0")),
        ({"use_gqa": True, "n_heads": 5, "d_model": 40}, ("kv_groups=None", "n_heads // 2 = 2")),
        ({"kv_groups": 2}, ("kv_groups=2", "use_gqa=True")),
        ({"vocab_size": 2}, ("vocab_size=2", "3 to", "PAD, BOS, EOS")),
        ({"vocab_size": -1}, ("vocab_size=-1",)),
        ({"vocab_size": 2**31}, ("vocab_size=2147483648",)),
        ({"n_layers": 0}, ("n_layers=0", "1 to")),
        ({"n_heads": 0}, ("n_heads=0",)),
        ({"d_ff": -4}, ("d_ff=-4",)),
        ({"ctx_len": 0}, ("ctx_len=0",)),
        ({"dropout": 1.0}, ("dropout=1.0", "[0, 1)")),
        ({"dropout": -0.1}, ("dropout=-0.1",)),
        ({"dropout": float("nan")}, ("dropout=nan", "finite")),
        ({"dropout": "0.1"}, ("dropout='0.1'", "number")),
        ({"dropout": True}, ("dropout=True",)),
        ({"dropout": None}, ("dropout=None",)),
        ({"rope_theta": 0}, ("rope_theta=0.0", "above 0")),
        ({"rope_theta": float("inf")}, ("rope_theta=inf",)),
        ({"rope_theta": 10**400}, ("rope_theta=1000",)),
        ({"n_layers": True}, ("n_layers=True", "integer")),
        ({"n_layers": 2.0}, ("n_layers=2.0", "integer")),
        ({"n_layers": None}, ("n_layers=None",)),
        ({"use_gqa": 1}, ("use_gqa=1", "true or false")),
        ({"use_moe": "false"}, ("use_moe='false'",)),
        ({"kv_groups": False, "use_gqa": True}, ("kv_groups=False", "integer")),
        ({"num_experts": 2, "num_experts_per_tok": 3}, ("num_experts_per_tok=3", "num_experts=2")),
        ({"use_moe": True, "num_experts_per_tok": 0}, ("num_experts_per_tok=0",)),
        ({"d_ff": [48] * 100}, ("d_ff=[48, ", "...")),
    ],
)
def test_contradictions_name_field_value_and_fix(change, names) -> None:
    with pytest.raises(ValueError) as caught:
        ThinkerConfig(**(REQUIRED | change))
    message = str(caught.value)
    assert all(name in message for name in names), message
    assert "is not allowed: must be" in message
    assert message.rpartition("; ")[2].strip(), "the fix is missing"
    assert len(message) < 400


def test_whole_numbers_serve_as_floats() -> None:
    config = ThinkerConfig(**REQUIRED, dropout=0, rope_theta=10000)
    assert type(config.dropout) is float
    assert type(config.rope_theta) is float


def test_json_round_trip(tmp_path) -> None:
    config = ThinkerConfig(**REQUIRED, dropout=0.25, use_gqa=True, kv_groups=1, use_moe=True)
    path = tmp_path / "config.json"
    config.to_json(path)
    assert ThinkerConfig.from_json(path) == config
    assert ThinkerConfig.from_dict(config.to_dict()) == config


def test_flat_training_file(tmp_path) -> None:
    report = read_config(write(tmp_path, REQUIRED | {"rope_theta": 10000, "use_gqa": True} | TRAINING))
    assert report.config == ThinkerConfig(**REQUIRED, use_gqa=True)
    assert report.ignored == tuple(TRAINING)
    assert report.notes == ()


def test_fine_tuning_file_has_ctx_len_outside(tmp_path) -> None:
    content = {"thinker_ckpt": "a", "ctx_len": 64, "thinker": REQUIRED, "prompt": "You are ...", "sft_mix": {"a": 1}}
    report = read_config(write(tmp_path, content))
    assert report.config == ThinkerConfig(**REQUIRED, ctx_len=64)
    assert report.ignored == ("thinker_ckpt", "prompt", "sft_mix")


def test_export_file_repeats_keys_and_the_nested_value_wins(tmp_path) -> None:
    content = {"model_type": "muomni", "architectures": ["ThinkerLM"], "thinker": REQUIRED | {"lr": 1.0}}
    content |= REQUIRED | {"d_ff": 64, "audio": {"d_model": 192}, "torch_dtype": "float16"}
    report = read_config(write(tmp_path, content))
    assert report.config == ThinkerConfig(**REQUIRED)
    assert report.ignored == ("thinker.lr", "model_type", "architectures", "audio", "torch_dtype")
    assert report.notes == ("d_ff=64 at the top is overruled by thinker.d_ff=48",)


def test_use_flash_false_is_noted(tmp_path) -> None:
    (note,) = read_config(write(tmp_path, REQUIRED | {"use_flash": False})).notes
    assert "±50" in note


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (REQUIRED | {"n_head": 4}, ("unknown key 'n_head'", "'n_heads'")),
        ({"thinker": REQUIRED | {"drop_out": 0.1}}, ("unknown key 'thinker.drop_out'", "'dropout'")),
        (REQUIRED | {"window_size": 0}, ("unknown key 'window_size'",)),
        ({"d_model": 32, "thinker": {"vocab_size": 9}}, ("lacks n_layers, n_heads, d_ff",)),
        (REQUIRED | {"thinker": None}, ("'thinker' must be an object", "NoneType")),
        (REQUIRED | {"d_model": 33}, ("d_model=33",)),
        ([1, 2], ("must be an object", "list")),
        (b'{"vocab_size": 9, "vocab_size": 10}', ("'vocab_size' stands there twice",)),
        (b'{"dropout": NaN}', ("NaN",)),
        (b'{"rope_theta": -Infinity}', ("-Infinity",)),
        (b'{"vocab_size": 9', ("not JSON at line 1",)),
        (b"\xff\xfe{}", ("byte 0 is not UTF-8",)),
        (b"", ("is empty",)),
        (b"[" * 200_000, ("config file",)),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", ("config file",)),
        (b" " * (1 << 21), ("larger than",)),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", ("Git-LFS",)),
    ],
)
def test_bad_files_are_one_clear_value_error(tmp_path, content, words) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ValueError) as caught:
        ThinkerConfig.from_json(path)
    assert str(caught.value).startswith(f"config file {path}") or repr(path) in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_missing_file_and_folder(tmp_path) -> None:
    for path in (tmp_path / "no.json", tmp_path):
        with pytest.raises(ValueError, match="config file"):
            read_config(path)


def test_mapping_of_another_type() -> None:
    with pytest.raises(ValueError, match="the mapping: must be an object"):
        ThinkerConfig.from_dict([("vocab_size", 9)])  # pyright: ignore[reportArgumentType]
