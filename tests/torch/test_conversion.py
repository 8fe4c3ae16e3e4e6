"""omni_torch.conversion: every pair of kinds, bit for bit, with the manifest to prove it; and what is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import omni_torch.conversion as conversion  # noqa: E402
from omni_torch.checkpoint import CheckpointError, export_weights, load_checkpoint, save_checkpoint  # noqa: E402
from omni_torch.config import ThinkerConfig, read_config  # noqa: E402
from omni_torch.conversion import convert_checkpoint  # noqa: E402
from omni_torch.inspection import inspect_checkpoint  # noqa: E402
from omni_torch.pt_format import write_pt  # noqa: E402
from omni_torch.state_tree import tree_digest  # noqa: E402
from omni_torch.thinker import ThinkerLM  # noqa: E402

SIZE = dict(vocab_size=11, n_layers=2, d_model=16, n_heads=4, d_ff=12, dropout=0.0, rope_theta=1e4, ctx_len=8)
SUFFIX = {"full": ".pt", "legacy": ".pt", "multimodal": ".pt", "safetensors": ".safetensors"}


def make_model(**more):
    return ThinkerLM(**(SIZE | more))


def make_weights(**more):
    return {key: value.clone() for key, value in export_weights(make_model(**more)).items()}


def zeros(*shape):
    return torch.zeros(shape)


def odd_arrays():
    """Values whose bits a careless copy loses."""
    return {
        "bf16": torch.tensor([1.0, -0.0, 3e38, 1e-40, torch.nan], dtype=torch.bfloat16),
        "f16": torch.tensor([[6e-8, -torch.inf]], dtype=torch.float16),
        "f64": torch.tensor([torch.pi, -0.0, torch.nan], dtype=torch.float64),
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "empty": zeros(0, 3),
        "nothing": torch.zeros(0, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "turned": torch.arange(6.0).reshape(2, 3).T,
    }


def raw_bytes(array):
    return array.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def save_tree(path, tree):
    """A pt file of any tree, without save_checkpoint's checks."""
    with path.open("wb") as stream:
        write_pt(stream, tree)


def write_source(folder, kind, weights):
    """A file of this kind with training state, as far as the kind can hold it."""
    path = folder / f"source{SUFFIX[kind]}"
    state = {
        "optimizer": {
            "state": {0: {"step": zeros(), "exp_avg": zeros(2)}},
            "param_groups": [{"betas": (0.9, 1.0)}],
        },
        "scheduler": {"_last_lr": [3e-4], "lr_lambdas": [None]},
        "scaler": None,
        "step": 3,
        "best_val_loss": 0.1,
    }
    parts = {"proj_a": {"weight": zeros(2, 3)}, "proj_v": odd_arrays()}
    if kind == "legacy":
        save_tree(path, weights)
    elif kind == "full":
        save_checkpoint(path, model=weights, **state)
    elif kind == "multimodal":
        save_checkpoint(path, model=weights, parts=parts, **state)
    else:
        save_checkpoint(path, model=weights, parts=parts, step=3, best_val_loss=0.1)
    ThinkerConfig(**SIZE).to_json(folder / "config.json")
    return path


def content(checkpoint):
    names = ("model", "optimizer", "scheduler", "scaler", "step", "best_val_loss", "parts")
    return {name: getattr(checkpoint, name) for name in names}


def check_manifest(made, path, checkpoint):
    """The manifest beside the file is what was returned, and its sums are those of the bytes."""
    text = path.with_name(f"{path.name}.manifest.json").read_text()
    assert text == made.to_json()
    told = json.loads(text)
    assert told["target_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    for key, value in checkpoint.model.items():
        record = told["target_arrays"][f"model.{key}"]
        assert record["sha256"] == hashlib.sha256(raw_bytes(value)).hexdigest()
        assert record["shape"] == list(value.shape)
    held = len(checkpoint.model) + sum(map(len, checkpoint.parts.values()))
    assert len(told["target_arrays"]) == held + (2 if checkpoint.optimizer else 0)


@pytest.mark.parametrize("target", SUFFIX)
@pytest.mark.parametrize("source", SUFFIX)
def test_every_kind_into_every_kind(tmp_path, source, target):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    file = write_source(tmp_path / "a", source, make_weights())
    before, held = file.read_bytes(), load_checkpoint(file)
    path = tmp_path / "b" / f"target{SUFFIX[target]}"
    made = convert_checkpoint(file, path, target)
    got = load_checkpoint(path)
    assert file.read_bytes() == before
    assert (made.source_kind, made.target_kind, got.kind) == (source, target, target)
    assert tree_digest(got.model) == tree_digest(held.model)
    assert made.source_sha256 == hashlib.sha256(before).hexdigest()
    check_manifest(made, path, got)
    lost = {name for name, value in content(held).items() if name != "parts" and value is not None} - {
        name for name, value in content(got).items() if value is not None
    }
    lost |= held.parts.keys() - got.parts.keys()
    assert set(made.dropped) == lost
    if source == target:
        assert not made.dropped
        assert tree_digest(content(got)) == tree_digest(content(held))
    kept = {name for name in made.source_arrays if name in made.target_arrays}
    assert all(made.source_arrays[name] == made.target_arrays[name] for name in kept)
    assert {name.partition(".")[0] for name in made.source_arrays.keys() - kept} <= lost
    config = ["config.json"] if target == "safetensors" else []
    assert sorted(os.listdir(tmp_path / "b")) == sorted([*config, path.name, f"{path.name}.manifest.json"])
    if config:
        assert read_config(tmp_path / "b" / "config.json").config == ThinkerConfig(**SIZE)
        assert made.config == ThinkerConfig(**SIZE).to_dict()
        assert made.told["n_heads"] == "config file"


def test_without_a_word_nothing_is_lost(tmp_path):
    weights = make_weights()
    for kind, suffix, wanted in (
        ("full", ".pt", "full"),
        ("legacy", ".pth", "legacy"),
        ("legacy", ".safetensors", "safetensors"),
        ("multimodal", ".pt", "multimodal"),
        ("safetensors", ".safetensors", "safetensors"),
        ("safetensors", ".pt", "multimodal"),
    ):
        file = write_source(tmp_path, kind, weights)
        made = convert_checkpoint(file, tmp_path / f"target{suffix}")
        assert made.target_kind == wanted
        assert not made.dropped
        held, got = load_checkpoint(file), load_checkpoint(tmp_path / f"target{suffix}")
        assert tree_digest(content(held)) == tree_digest(content(got))
    for kind in ("full", "multimodal"):
        file = write_source(tmp_path, kind, weights)
        for name in ("other.safetensors", "other.pt"):  # the suffix is the request for the kind
            made = convert_checkpoint(file, tmp_path / name, None if "safetensors" in name else "legacy")
            assert {"optimizer", "scheduler"} <= made.dropped.keys()
    save_checkpoint(tmp_path / "p.safetensors", model=weights, parts={"proj_a": {"weight": zeros(2, 3)}})
    assert not convert_checkpoint(tmp_path / "p.safetensors", tmp_path / "p.pt").dropped
    save_checkpoint(tmp_path / "s.safetensors", model=weights, step=3)
    assert convert_checkpoint(tmp_path / "s.safetensors", tmp_path / "s.pt").target_kind == "full"
    save_checkpoint(tmp_path / "s.safetensors", model=weights, step=None, best_val_loss=None)
    assert convert_checkpoint(tmp_path / "s.safetensors", tmp_path / "s.pt").target_kind == "legacy"


def test_odd_arrays_keep_every_bit_all_the_way_round(tmp_path):
    arrays = odd_arrays()
    save_tree(tmp_path / "0.pt", arrays)
    save_tree(tmp_path / "v.pt", {"vit": arrays, "head": {}})
    for source in ("0.pt", "v.pt"):
        if source == "0.pt":  # no ThinkerLM, so no config.json could be written
            with pytest.raises(CheckpointError, match=r"not a ThinkerLM's"):
                convert_checkpoint(tmp_path / source, tmp_path / "1.safetensors")
            kinds = [("1.pt", "full"), ("2.pt", "multimodal"), ("3.pt", "legacy")]
        else:
            kinds = [("1.safetensors", None), ("2.pt", None), ("3.pt", "multimodal")]
        steps = [tmp_path / source]
        for name, kind in kinds:
            convert_checkpoint(steps[-1], tmp_path / name, kind)
            steps.append(tmp_path / name)
        got = load_checkpoint(steps[-1])
        back = got.parts["vit"] if source == "v.pt" else got.model
        assert {key: raw_bytes(back[key]) for key in arrays} == {key: raw_bytes(arrays[key]) for key in arrays}
        assert tree_digest(back) == tree_digest(arrays)
        assert got.kind == ("vision" if source == "v.pt" else "legacy")
        for path in steps[1:]:
            assert path.with_name(f"{path.name}.manifest.json").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_qkv_is_split_and_joined_again(tmp_path, suffix):
    weights = make_weights()
    save_tree(tmp_path / "a.pt", weights)
    made = convert_checkpoint(tmp_path / "a.pt", tmp_path / f"b{suffix}", split_qkv=True, n_heads=4)
    apart = load_checkpoint(tmp_path / f"b{suffix}").model
    assert made.regrouped["blocks.1.attn.k.weight"] == ["blocks.1.attn.qkv.weight"]
    assert "blocks.0.attn.qkv.weight" not in apart
    whole = raw_bytes(weights["blocks.0.attn.qkv.weight"])
    assert b"".join(raw_bytes(apart[f"blocks.0.attn.{part}.weight"]) for part in "qkv") == whole
    assert ThinkerLM.from_checkpoint(tmp_path / f"b{suffix}", n_heads=4).config.n_heads == 4
    made = convert_checkpoint(tmp_path / f"b{suffix}", tmp_path / "c.pt", "legacy", split_qkv=False)
    assert made.regrouped["blocks.1.attn.qkv.weight"] == [f"blocks.1.attn.{part}.weight" for part in "qkv"]
    joined = load_checkpoint(tmp_path / "c.pt").model
    assert tree_digest(joined) == tree_digest(weights)
    assert not convert_checkpoint(tmp_path / "c.pt", tmp_path / "d.pt", split_qkv=False).regrouped


def test_qkv_that_cannot_be_regrouped(tmp_path):
    save_tree(tmp_path / "g.pt", make_weights(use_gqa=True))
    with pytest.raises(CheckpointError, match=r"do not join: blocks.0.attn.q.weight \(16, 16\), .*k.weight \(8, 16\)"):
        convert_checkpoint(tmp_path / "g.pt", tmp_path / "t.pt", split_qkv=False)
    assert not convert_checkpoint(tmp_path / "g.pt", tmp_path / "t.pt", split_qkv=True).regrouped
    both = make_weights() | {"blocks.0.attn.q.weight": zeros(16, 16)}
    save_tree(tmp_path / "b.pt", both)
    for split in (True, False):
        with pytest.raises(CheckpointError, match="both joined with others and apart"):
            convert_checkpoint(tmp_path / "b.pt", tmp_path / "u.pt", split_qkv=split)
    save_tree(tmp_path / "o.pt", {"attn.qkv.weight": zeros(4, 2)})
    with pytest.raises(CheckpointError, match="does not split"):
        convert_checkpoint(tmp_path / "o.pt", tmp_path / "u.pt", split_qkv=True)
    file = write_source(tmp_path, "full", make_weights())
    with pytest.raises(CheckpointError, match="q, k and v apart or joined"):
        convert_checkpoint(file, tmp_path / "u.pt", split_qkv=True)
    assert convert_checkpoint(file, tmp_path / "u.pt", "legacy", split_qkv=True).dropped["optimizer"]


def test_names_of_compiled_models_and_unknown_entries_are_told(tmp_path):
    weights = make_weights()
    save_tree(tmp_path / "a.pt", {"model": {f"_orig_mod.{k}": v for k, v in weights.items()}, "epoch": 3})
    made = convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt")
    assert made.renamed["_orig_mod.norm.weight"] == "norm.weight"
    assert made.dropped == {"epoch": "not in the format"}
    assert list(load_checkpoint(tmp_path / "b.pt").model) == list(weights)


def test_a_folder_gives_its_best(tmp_path):
    save_checkpoint(tmp_path / "best.pt", model=make_weights(), step=5)
    save_checkpoint(tmp_path / "last.pt", model=make_weights(), step=9)
    assert convert_checkpoint(tmp_path, tmp_path / "out.pt").source == "best.pt"


def test_the_config_beside_the_target(tmp_path):
    save_tree(tmp_path / "a.pt", make_weights())
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ValueError, match="do not tell n_heads"):
        convert_checkpoint(tmp_path / "a.pt", out / "b.safetensors")
    assert not os.listdir(out)
    made = convert_checkpoint(tmp_path / "a.pt", out / "b.safetensors", n_heads=2)
    assert (made.told["n_heads"], made.told["ctx_len"]) == ("hint", "assumed")
    assert read_config(out / "config.json").config.n_heads == 2
    other = (out / "config.json").read_bytes()
    with pytest.raises(ValueError, match="is the config of another model"):
        convert_checkpoint(tmp_path / "a.pt", out / "c.safetensors", config=ThinkerConfig(**SIZE))
    assert (out / "config.json").read_bytes() == other
    assert not (out / "c.safetensors").exists()
    convert_checkpoint(tmp_path / "a.pt", out / "c.safetensors", n_heads=2)
    assert (out / "config.json").read_bytes() == other


def test_the_source_is_never_overwritten(tmp_path):
    save_checkpoint(tmp_path / "a.pt", model=make_weights())
    before = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "link.pt").symlink_to("a.pt")
    (tmp_path / "hard.pt").hardlink_to(tmp_path / "a.pt")
    (tmp_path / "up").mkdir()
    for name in ("a.pt", "link.pt", "hard.pt", "up/../a.pt"):
        with pytest.raises(CheckpointError, match="is the source itself"):
            convert_checkpoint(tmp_path / "a.pt", tmp_path / name)
    with pytest.raises(CheckpointError, match="is the source itself"):
        convert_checkpoint(tmp_path / "link.pt", tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == before


WRONG = {
    "no source": (lambda p: (p / "none.pt", p / "t.pt", None), "does not exist"),
    "a pointer": (lambda p: (p / "lfs.pt", p / "t.pt", None), "git lfs pull"),
    "cut off": (lambda p: (p / "cut.pt", p / "t.pt", None), "damaged or cut off"),
    "a folder": (lambda p: (p / "a.pt", p, None), "it is a folder"),
    "no folder": (lambda p: (p / "a.pt", p / "no" / "t.pt", None), "its folder does not exist"),
    "suffix": (lambda p: (p / "a.pt", p / "t.bin", None), r"must end in .pt, .pth or .safetensors"),
    "kind": (lambda p: (p / "a.pt", p / "t.pt", "best"), r"kind \(--kind\) = 'best': must be one of full, legacy"),
    "kind and suffix": (lambda p: (p / "a.pt", p / "t.safetensors", "full"), "a target that ends in .pt"),
    "suffix and kind": (lambda p: (p / "a.pt", p / "t.pt", "safetensors"), "a target that ends in .safetensors"),
    "no thinker": (lambda p: (p / "v.pt", p / "t.pt", "full"), "the source, of kind vision, holds only vit"),
    "NUL": (lambda p: (p / "a.pt", f"{p}/t\0.pt", None), "target = .* no file name holds a NUL character"),
    "no path": (lambda p: (p / "a.pt", 3, None), "target = 3 has type int: must be a str or os.PathLike"),
    "a pipe": (lambda p: (p / "a.pt", p / "pipe.pt", None), "pipe.pt' is no regular file"),
    "a device": (lambda p: (p / "a.pt", p / "null.pt", None), "/dev/null': must end in"),
    "its manifest a folder": (lambda p: (p / "a.pt", p / "m.pt", None), "m.pt.manifest.json' is no regular file"),
    "a config that is none": (lambda p: (p / "a.pt", p / "f" / "t.safetensors", None), "config.json' is no regular"),
    "a link's suffix": (lambda p: (p / "a.pt", p / "link.pt", None), "link.pt', which leads to .*blob': must end in"),
    "heads of a .pt": (lambda p: (p / "a.pt", p / "t.pt", None, 3), "n_heads=3 does not fit"),
    "no thinker at all": (lambda p: (p / "v.pt", p / "t.pt", "legacy"), "give kind='multimodal'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_and_nothing_is_written(tmp_path, name):
    save_checkpoint(tmp_path / "a.pt", model=make_weights())
    save_checkpoint(tmp_path / "v.pt", model={}, parts={"vit": {"cls": zeros(2)}})
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:-30])
    (tmp_path / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "null.pt").symlink_to("/dev/null")
    (tmp_path / "link.pt").symlink_to("blob")
    (tmp_path / "m.pt.manifest.json").mkdir()
    (tmp_path / "f" / "config.json").mkdir(parents=True)
    before = sorted(os.listdir(tmp_path))
    arguments, word = WRONG[name]
    source, target, kind, *heads = arguments(tmp_path)
    with pytest.raises(ValueError, match=word):
        convert_checkpoint(source, target, kind, n_heads=heads[0] if heads else None)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("what", ["disk", "bits", "source", "rename"])
def test_a_failure_on_the_way_leaves_nothing(tmp_path, monkeypatch, what):
    save_checkpoint(tmp_path / "a.pt", model=make_weights())
    save_checkpoint(tmp_path / "t.pt", model={"norm.weight": zeros(2)})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if what == "disk":
        monkeypatch.setattr(conversion, "save_checkpoint", full)
    elif what == "rename":
        monkeypatch.setattr(conversion.os, "replace", full)
    elif what == "bits":  # the disk gives back other bits than it was given
        save = conversion.save_checkpoint
        monkeypatch.setattr(
            conversion,
            "save_checkpoint",
            lambda path, model, **more: save(path, model=model | {"norm.weight": zeros(16)}, **more),
        )
    else:
        sums = iter("ab")
        monkeypatch.setattr(conversion, "file_digest", lambda path: next(sums))
    with pytest.raises((OSError, CheckpointError), match=r"No space|read back|changed while"):
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "t.pt")
    assert {path.name: Path(path).read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", ["b.json", "config.json"])
def test_a_foreign_config_where_the_target_would_find_it(tmp_path, name, suffix):
    """The shapes fit it, so only its heads and its context tell that it is another model's."""
    out = tmp_path / "out"
    out.mkdir()
    save_tree(tmp_path / "a.pt", make_weights())
    ThinkerConfig(**(SIZE | {"n_heads": 2})).to_json(out / name)
    before = (out / name).read_bytes()
    with pytest.raises(ValueError, match="do not tell n_heads"):  # nor does anything else
        convert_checkpoint(tmp_path / "a.pt", out / f"b{suffix}")
    own = ThinkerConfig(**SIZE)
    own.to_json(tmp_path / "config.json")
    with pytest.raises(ValueError, match=rf"out/{name}' is the config of another model, and would be read as"):
        convert_checkpoint(tmp_path / "a.pt", out / f"b{suffix}")
    assert os.listdir(out) == [name]
    assert (out / name).read_bytes() == before
    own.to_json(out / name)
    convert_checkpoint(tmp_path / "a.pt", out / f"b{suffix}")
    assert ThinkerLM.from_checkpoint(out / f"b{suffix}").config == own
    assert sorted(os.listdir(out)) == sorted([name, f"b{suffix}", f"b{suffix}.manifest.json"])


def test_what_is_assumed_is_said_and_stays_assumed(tmp_path):
    save_tree(tmp_path / "a.pt", make_weights(use_moe=True, num_experts=1, num_experts_per_tok=1))
    (tmp_path / "out").mkdir()
    made = convert_checkpoint(tmp_path / "a.pt", tmp_path / "out" / "b.safetensors", n_heads=4)
    assert made.notes == ["assumed: dropout=0.1, rope_theta=10000.0, ctx_len=512, num_experts_per_tok=1"]
    assert made.config is not None
    assert made.config["ctx_len"] == 512
    told = inspect_checkpoint(tmp_path / "out" / "b.safetensors").architecture
    assert told is not None
    assert told.config.to_dict() == made.config
    assert (told.told["ctx_len"], told.told["n_heads"]) == ("assumed", "config file")


def test_a_target_that_needs_a_config_says_so(tmp_path):
    save_tree(tmp_path / "a.pt", make_weights())
    (tmp_path / "out").mkdir()
    (note,) = convert_checkpoint(tmp_path / "a.pt", tmp_path / "out" / "b.pt").notes
    assert "who reads the target needs a config: the checkpoint's shapes do not tell n_heads" in note
    made = convert_checkpoint(tmp_path / "a.pt", tmp_path / "out" / "b.pt", config=ThinkerConfig(**SIZE))
    assert made.config == ThinkerConfig(**SIZE).to_dict()
    assert made.notes == [
        "no config lies beside the target: who reads it gives config= (--config FILE), or puts it there"
    ]
    with pytest.raises(ValueError, match="the config is not that of the checkpoint"):
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "c.pt", config=ThinkerConfig(**(SIZE | {"d_ff": 13})))
    ThinkerConfig(**SIZE).to_json(tmp_path / "config.json")
    assert convert_checkpoint(tmp_path / "a.pt", tmp_path / "c.pt").notes == []


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_move_that_fails_leaves_the_old_files(tmp_path, monkeypatch, number):
    """config.json, the weights and the manifest are put in their places one by one."""
    save_tree(tmp_path / "a.pt", make_weights())
    out = tmp_path / "out"
    out.mkdir()
    convert_checkpoint(tmp_path / "a.pt", out / "t.safetensors", n_heads=4)
    (out / "config.json").unlink()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    save_tree(tmp_path / "a.pt", {key: value * 2 for key, value in make_weights().items()})
    replace, calls = os.replace, []

    def failing(source, target):
        if Path(target).parent == out:
            calls.append(target)
            if len(calls) == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(conversion.os, "replace", failing)
    with pytest.raises(
        OSError, match=r"cannot write .*t.safetensors': No space left on device; free space on that disk"
    ):
        convert_checkpoint(tmp_path / "a.pt", out / "t.safetensors", n_heads=4)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_target_keeps_its_permission_bits(tmp_path):
    save_tree(tmp_path / "a.pt", make_weights())
    convert_checkpoint(tmp_path / "a.pt", tmp_path / "t.pt")
    fresh = (tmp_path / "a.pt").stat().st_mode
    assert (tmp_path / "t.pt").stat().st_mode == fresh
    (tmp_path / "t.pt").chmod(0o640)
    convert_checkpoint(tmp_path / "a.pt", tmp_path / "t.pt")
    assert (tmp_path / "t.pt").stat().st_mode & 0o777 == 0o640


def test_a_name_that_is_too_long_says_so(tmp_path):
    save_tree(tmp_path / "a.pt", make_weights())
    for length in (245, 300):
        with pytest.raises(OSError, match="File name too long; give a shorter name"):
            convert_checkpoint(tmp_path / "a.pt", tmp_path / ("x" * length + ".pt"))
    assert os.listdir(tmp_path) == ["a.pt"]
