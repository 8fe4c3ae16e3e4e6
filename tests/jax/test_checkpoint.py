"""omni_jax.checkpoint: every format of the family in and out, bit for bit, and every refusal with its message."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

import omni_jax.files as files  # noqa: E402
from omni_jax.checkpoint import (  # noqa: E402
    Checkpoint,
    CheckpointError,
    export_weights,
    load_checkpoint,
    load_report,
    load_weights,
    save_checkpoint,
)
from omni_jax.pt_format import write_pt  # noqa: E402
from omni_jax.safetensors_format import read_safetensors, write_safetensors  # noqa: E402
from omni_jax.thinker import ThinkerLM  # noqa: E402

PT = runpy.run_path(str(Path(__file__).parent.parent / "pt_files.py"))
ATTACKS = PT["attacks"]("canary-of-the-attacks")
SIZE = dict(vocab_size=11, n_layers=2, d_model=8, n_heads=4, d_ff=12, dropout=0.0, rope_theta=1e4, ctx_len=8)
KINDS = {
    "mha": {},
    "gqa": {"use_gqa": True},
    "gelu": {"use_swiglu": False},
    "moe": {"use_moe": True, "num_experts": 3},
}


def make_model(seed=0, **more):
    return ThinkerLM(**(SIZE | more), rngs=nnx.Rngs(seed))


def ones(*shape):
    return np.ones(shape, np.float32)


def save_tree(path, tree):
    """A pt file of any tree, without save_checkpoint's checks."""
    with path.open("wb") as stream:
        write_pt(stream, tree)


def same(a, b):
    """Equal in structure, types, dtypes, shapes and bits; a torch tensor equals the array of its values."""
    if type(a).__module__ == "torch":
        dtype = str(a.dtype).removeprefix("torch.")
        raw = a.detach().contiguous().reshape(-1).view(a.dtype if a.dtype.itemsize == 1 else _bits(a)).numpy()
        return same(raw.view(np.dtype(dtype)).reshape(tuple(a.shape)), b)
    if isinstance(a, np.ndarray | jax.Array):
        if not isinstance(b, np.ndarray | jax.Array) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        return np.asarray(a).tobytes() == np.asarray(b).tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def _bits(tensor):
    import torch

    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]


@pytest.fixture(scope="module")
def torch():
    """torch, to make the files of the family; omni_jax itself never sees it."""
    return pytest.importorskip("torch")


def torch_state(torch, model, dtype="float32"):
    """The model's weights as a torch state dict."""
    state = OrderedDict()
    for key, value in export_weights(model).items():
        state[key] = torch.tensor(np.asarray(value, np.float64)).to(getattr(torch, dtype))
    return state


@pytest.fixture(scope="module")
def trained(torch):
    """A full checkpoint as the family's trainer writes it, after warm-up: lr is a tensor, AdamW has its moments."""
    state = torch_state(torch, make_model(use_gqa=True))
    parameters = [torch.nn.Parameter(value.clone()) for value in state.values()]
    optimizer = torch.optim.AdamW(parameters, lr=torch.tensor(3e-4), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 2))
    for _ in range(3):
        sum(p.square().sum() for p in parameters).backward()
        optimizer.step()
        scheduler.step()
    return {
        "model": OrderedDict(zip(state, (p.detach() for p in parameters), strict=True)),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3},
        "step": 3,
        "best_val_loss": math.inf,
    }


@pytest.fixture(scope="module")
def plain():
    """A full checkpoint of plain values and arrays, no torch needed."""
    weights = {key: np.asarray(value) for key, value in export_weights(make_model(use_gqa=True)).items()}
    moments = {i: {"step": np.asarray(3, np.float32), "exp_avg": value} for i, value in enumerate(weights.values())}
    group = {"lr": np.asarray(3e-4, np.float32), "betas": (0.9, 0.999), "foreach": None, "params": list(moments)}
    return {
        "model": weights,
        "optimizer": {"state": moments, "param_groups": [group]},
        "scheduler": {"_last_lr": [3e-4], "lr_lambdas": [None], "last_epoch": 3, "_is_initial": False},
        "scaler": {"scale": 65536.0, "_growth_tracker": -3, "seed": 1 << 40},
        "step": 3,
        "best_val_loss": math.inf,
    }


def test_full_is_bit_equal_to_what_torch_saved(tmp_path, torch, trained):
    torch.save(trained, tmp_path / "full.pt")
    got = load_checkpoint(tmp_path / "full.pt")
    assert got.kind == "full"
    assert got.step == 3
    assert got.best_val_loss == math.inf
    assert not got.renamed
    assert not got.ignored
    for part in ("model", "optimizer", "scheduler", "scaler"):
        assert same(dict(trained[part]), dict(getattr(got, part))), part
    assert isinstance(got.optimizer["param_groups"][0]["lr"], np.ndarray)


@pytest.mark.parametrize("kind", KINDS)
def test_legacy_loads_into_the_model(tmp_path, torch, kind):
    source, target = make_model(0, **KINDS[kind]), make_model(1, **KINDS[kind])
    torch.save(torch_state(torch, source), tmp_path / "legacy.pt")
    got = load_checkpoint(tmp_path / "legacy.pt")
    assert got.kind == "legacy"
    assert (got.optimizer, got.scheduler, got.scaler, got.step, got.best_val_loss) == (None,) * 5
    assert load_weights(target, got) is target
    assert same(export_weights(source), export_weights(target))
    a, b = (nnx.to_flat_state(nnx.state(model, nnx.Param)) for model in (source, target))
    for (path, x), (other, y) in zip(a, b, strict=True):
        assert path == other
        assert type(x) is type(y)
        assert same(x.get_value(), y.get_value())
        assert isinstance(y.get_value(), jax.Array)
    report = load_report(target, got)
    assert report.fits
    assert sorted(report.loaded) == sorted(export_weights(source))


def test_odd_tensors_keep_every_bit(tmp_path, torch):
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "bf16": torch.tensor([1.0, -0.0, 3.0e38, 1e-40], dtype=torch.bfloat16),
        "f16": torch.randn(3, dtype=torch.float16),
        "f64": torch.randn(2, 2, dtype=torch.float64),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "bf16_scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "nothing": torch.zeros(0, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "column": base[:, 2:4],
        "turned": base.T,
        "diagonal": base[:4, :4].diagonal(),
        "last": base[-1],
        "whole": base,
    }
    torch.save(state, tmp_path / "a.pt")
    got = load_checkpoint(tmp_path / "a.pt").model
    assert same(state, got)
    for name in ("b.pt", "b.safetensors"):
        save_checkpoint(tmp_path / name, model=got, step=5, best_val_loss=0.25)
        again = load_checkpoint(tmp_path / name)
        assert same(state, {key: again.model[key] for key in state})
        assert (again.step, again.best_val_loss) == (5, 0.25)
    back = torch.load(tmp_path / "b.pt", weights_only=True)["model"]
    for key, value in state.items():
        assert back[key].dtype == value.dtype
        assert back[key].shape == value.shape
        assert same(value, got[key])
        assert same(back[key], got[key])


@pytest.mark.parametrize("how", ["prefix", "infix", "both"])
def test_names_of_compiled_models(tmp_path, torch, how):
    weights = torch_state(torch, make_model())
    rename = {
        "prefix": lambda key: f"_orig_mod.{key}",
        "infix": lambda key: key.replace(".attn.", "._orig_mod.attn."),
        "both": lambda key: f"_orig_mod.{key}".replace(".attn.", ".attn._orig_mod."),
    }[how]
    torch.save({"model": OrderedDict((rename(k), v) for k, v in weights.items())}, tmp_path / "c.pt")
    got = load_checkpoint(tmp_path / "c.pt")
    assert same(dict(weights), got.model)
    assert got.renamed == {rename(key): key for key in weights if rename(key) != key}


def test_names_that_collide_are_refused(tmp_path):
    save_checkpoint(tmp_path / "c.pt", model={"norm.weight": np.ones(2), "_orig_mod.norm.weight": np.ones(2)})
    with pytest.raises(CheckpointError, match=r"both mean 'norm\.weight'"):
        load_checkpoint(tmp_path / "c.pt")


def test_split_attention_is_joined_for_the_model(tmp_path):
    source, target = make_model(0), make_model(1)
    fused = export_weights(source)
    state = {}
    for key, value in fused.items():
        if ".qkv." in key:
            for part, rows in zip("qkv", np.split(value, 3), strict=True):
                state[key.replace("qkv", part)] = rows
        else:
            state[key] = value
    save_checkpoint(tmp_path / "split.pt", model=state)
    got = load_checkpoint(tmp_path / "split.pt")
    assert "blocks.0.attn.q.weight" in got.model
    load_weights(target, got)
    assert same(fused, export_weights(target))
    assert load_report(target, got).renamed["blocks.1.attn.k.weight"] == "blocks.1.attn.qkv.weight"
    # A GQA model with as many groups as heads takes the same file as it is, and the fused file in thirds.
    for state in (got.model, fused):
        grouped = make_model(2, use_gqa=True, kv_groups=4)
        load_weights(grouped, state)
        assert same(export_weights(grouped), {key: got.model[key] for key in export_weights(grouped)})


def test_safetensors_with_prefixes(tmp_path):
    import safetensors.numpy

    model = make_model()
    weights = {key: np.ascontiguousarray(value) for key, value in export_weights(model).items()}
    parts = {f"thinker.{key}": value for key, value in weights.items()}
    parts |= {"audio_encoder.proj.weight": np.ones(2), "ocr.x": np.ones(1), "proj_a.bias": np.ones(3)}
    safetensors.numpy.save_file(parts, tmp_path / "model.safetensors", {"format": "pt"})
    got = load_checkpoint(tmp_path / "model.safetensors")
    assert got.kind == "safetensors"
    assert sorted(got.ignored) == ["audio_encoder.proj.weight", "ocr.x", "proj_a.bias"]
    assert {part: list(weights) for part, weights in got.parts.items()} == {
        "audio_encoder": ["proj.weight"],
        "ocr": ["x"],
        "proj_a": ["bias"],
    }
    assert same(weights, {key: got.model[key] for key in weights})
    report = load_report(make_model(1), got)
    assert report.fits
    assert sorted(report.ignored) == sorted(got.ignored)
    assert report.renamed["thinker.norm.weight"] == "norm.weight"
    parts["talker_x.weight"] = np.ones(1)  # no rule knows it
    safetensors.numpy.save_file(parts, tmp_path / "model.safetensors")
    assert load_report(model, load_checkpoint(tmp_path / "model.safetensors")).unexpected == ("talker_x.weight",)
    safetensors.numpy.save_file({"ocr.x": np.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no weights of ThinkerLM, only of ocr"):
        load_weights(model, load_checkpoint(tmp_path / "model.safetensors"))


def test_multimodal_dict(tmp_path, torch):
    weights = torch_state(torch, make_model())
    torch.save({"thinker": weights, "proj_a": {"weight": torch.ones(2)}, "proj_v": {}, "step": 9}, tmp_path / "m.pt")
    got = load_checkpoint(tmp_path / "m.pt")
    assert sorted(got.ignored) == ["proj_a", "proj_v"]
    assert got.step == 9
    assert same(dict(weights), got.model)


def test_other_parts_stand_apart(tmp_path):
    """A dict of parts, as fine-tuning writes it: the thinker in model, the rest in parts, training state kept."""
    weights = export_weights(make_model())
    parts = {"proj_a": {"weight": ones(2), "_orig_mod.bias": ones(1)}, "proj_v": {}}
    tree = {"thinker": weights, **parts, "optimizer": {"state": {}}, "step": 9, "note": "hello", "scaler": None}
    save_tree(tmp_path / "m.pt", tree)
    got = load_checkpoint(tmp_path / "m.pt")
    assert (got.kind, got.step, got.best_val_loss) == ("multimodal", 9, None)
    assert same(got.model, dict(weights))
    assert same(got.parts, {"proj_a": {"weight": ones(2), "bias": ones(1)}, "proj_v": {}})
    assert got.optimizer == {"state": {}}
    assert got.renamed == {"proj_a._orig_mod.bias": "proj_a.bias"}
    assert got.ignored == {
        "note": "not in the format",
        "proj_a": "a part of the multimodal model",
        "proj_v": "a part of the multimodal model",
    }
    report = load_report(make_model(), got)
    assert report.fits
    assert not report.renamed


@pytest.mark.parametrize(
    ("kind", "names"), [("vision", ["head", "vit"]), ("audio", ["enc", "head"]), ("multimodal", ["proj_a", "proj_v"])]
)
def test_a_file_without_a_thinker_is_read_and_says_so(tmp_path, kind, names):
    parts = {name: {"proj.weight": ones(2)} for name in names}
    save_tree(tmp_path / "p.pt", {**parts, "step": 4})
    got = load_checkpoint(tmp_path / "p.pt")
    assert (got.kind, got.step, got.model) == (kind, 4, {})
    assert same(got.parts, parts)
    with pytest.raises(CheckpointError, match=f"no weights of ThinkerLM, only of {', '.join(names)} .kind {kind}"):
        load_weights(make_model(), got)
    assert not load_report(make_model(), got).fits


@pytest.mark.parametrize("name", ["p.pt", "p.safetensors"])
@pytest.mark.parametrize("whole", [True, False])
def test_parts_are_saved_and_read_back(tmp_path, name, whole):
    weights = export_weights(make_model()) if whole else {}
    parts = {"vit": {"cls": ones(1, 1, 3), "blocks.0.x": ones(0)}, "head": {}}
    save_checkpoint(tmp_path / name, model=weights, parts=parts, step=None, best_val_loss=None)
    got = load_checkpoint(tmp_path / name)
    assert same(dict(sorted(got.model.items())), dict(sorted(weights.items())))
    assert same(dict(sorted(got.parts["vit"].items())), dict(sorted(parts["vit"].items())))
    assert sorted(got.parts) == ["head", "vit"]
    assert (got.step, got.best_val_loss) == (None, None)
    assert got.kind == ("safetensors" if name.endswith("s") else "multimodal" if whole else "vision")


def test_parts_that_cannot_be_saved_or_read(tmp_path):
    weights = export_weights(make_model())
    for parts in ({"model": {}}, {"a.b": {}}, {"vit": {"x": 1}}, {"": {}}, {"step": {"x": ones(1)}}, {"vit": None}):
        with pytest.raises(CheckpointError, match="parts holds"):
            save_checkpoint(tmp_path / "p.pt", model=weights, parts=parts)
    with pytest.raises(CheckpointError, match="parts without a model"):
        save_checkpoint(tmp_path / "p.pt", model={}, parts={"other": {"x": ones(1)}})
    assert not os.listdir(tmp_path)
    both = {"model": dict(weights), "thinker": dict(weights)}
    inside = {"model": {"proj_a.weight": ones(2), "norm.weight": ones(2)}, "proj_a": {"weight": ones(2)}}
    for tree, word in (
        (both, "both 'model' and 'thinker'"),
        (inside, "'proj_a' stands there twice"),
        ({"vit": {"x": "text"}}, "no tensor by name"),
        ({"model": {"\x1b[2J": ones(1)}}, "no tensor by name"),
        ({"\x1b[2J": ones(1)}, "cannot be printed"),
        ({"thinker": {}}, "state dict is empty"),
        ({"other": {"x": ones(1)}}, "no model"),
        ({"enc": {"x": ones(1)}, "head": {"a": ones(1), "_orig_mod.a": ones(1)}}, "both mean 'a'"),
    ):
        save_tree(tmp_path / "p.pt", tree)
        with pytest.raises(CheckpointError, match=word):
            load_checkpoint(tmp_path / "p.pt")


FOLDERS = {
    "run": (["best.pt", "last.pt"], "best.pt", "last.pt"),
    "family": (["thinker_best.pt", "thinker.pt", "thinker_step_1000.pt", "thinker_step_200.pt"], "thinker_best.pt",
               "thinker.pt"),
    "family before its end": (["thinker_step_1000.pt", "thinker_step_200.pt", "gpt2.pt"], "thinker_step_1000.pt",
                              "thinker_step_1000.pt"),
    "final of two forms": (["a-5.pt", "a.safetensors", "b-3.pt", "b.pt"], "a.safetensors", "a.safetensors"),
    "shards beside a whole": (["model-00001-of-00002.safetensors", "model.pt"], "model.pt", "model.pt"),
    "steps": (["step9.pt", "step10.pt", "tokenizer.model"], "step10.pt", "step10.pt"),
    "export": (["model.safetensors", "config.json"], "model.safetensors", "model.safetensors"),
    "one and a best": (["best_model.safetensors", "thinker.pt"], "best_model.safetensors", "thinker.pt"),
    "best alone": (["x_best.pth", ".hidden.pt"], "x_best.pth", "x_best.pth"),
    "no step": (["last.safetensors", "gpt2.pt"], "last.safetensors", "last.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_gives_its_best_or_its_latest(tmp_path, name):
    files, best, latest = FOLDERS[name]
    (tmp_path / "folder.pt").mkdir()
    for step, file in enumerate(files):
        if file.endswith((".pt", ".pth", ".safetensors")):
            save_checkpoint(tmp_path / file, model={"norm.weight": ones(2)}, step=step)
        else:
            (tmp_path / file).write_text("x")
    assert load_checkpoint(tmp_path).step == files.index(best)
    assert load_checkpoint(tmp_path, which="best").step == files.index(best)
    assert load_checkpoint(tmp_path, which="latest").step == files.index(latest)
    if "-of-" not in files[0]:
        assert load_checkpoint(tmp_path / files[0], which="latest").step == 0


def test_a_folder_that_leaves_a_choice_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"which = 'newest': must be one of best, latest"):
        load_checkpoint(tmp_path, which="newest")
    for names, word in (
        ([], "is a folder without a checkpoint"),
        (["a_best.pt", "b_best.pt"], "each may be the best"),
        (["a_step_5.pt", "b_step_5.pt"], "each is of step 5"),
        (["a.pt", "b.pt"], "no name tells which is the latest"),
        (["last.pt", "last.safetensors"], "each is the last"),
        (["a_step_5.pt", "a.pt", "a.pth"], "each is the final one"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "shards are not read; join them"),
    ):
        for file in names:
            (tmp_path / file).write_bytes(b"x")
        with pytest.raises(CheckpointError, match=word):
            load_checkpoint(tmp_path)
        for file in names:
            (tmp_path / file).unlink()
    (tmp_path / "best.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        load_checkpoint(tmp_path)


WRONG_FILES = {
    "empty": (b"", "is empty"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
    "html": (b"\n<!DOCTYPE html><html></html>", "web page"),
    "text": (b"hello world, this is no checkpoint", "neither a torch.save file nor safetensors"),
    "pickle": (b"\x80\x02}q\x00.", "bare pickle"),
    "zip of nothing": (PT["pack"]([("readme.txt", b"x")]), "does not belong"),
    "gzip": (b"\x1f\x8b\x08\x00", "compressed"),
    "vision": (PT["archive"](b"\x80\x02}X\x03\x00\x00\x00vit}s.", {}), "'vit': the state dict is empty"),
    "audio": (PT["archive"](b"\x80\x02}X\x03\x00\x00\x00enc}s.", {}), "'enc': the state dict is empty"),
    "list": (PT["archive"](b"\x80\x02].", {}), "not a dict"),
    "no weights": (PT["archive"](b"\x80\x02}.", {}), "no model"),
    "numbers": (PT["archive"](PT["model"](b"K\x01"), {}), "no model"),
    "step": (PT["archive"](b"\x80\x02}(X\x05\x00\x00\x00model" + PT["model"](PT["tensor"]())[2:-1]
             + b"X\x04\x00\x00\x00stepNX\x09\x00\x00\x00optimizerK\x01u."), "optimizer has type int, not dict"),
    "header": (b"\x10\x00\x00\x00\x00\x00\x00\x00{xxxxxxxxxxxxxxx", "not JSON"),
    "repeated": (b"\x12\x00\x00\x00\x00\x00\x00\x00" + b'{"a":1,"a":2}     ', "twice"),
    "huge header": (b"\xff\xff\xff\xff\xff\xff\xff\x7f{", "header has"),
    "cut header": (b"\xff\x00\x00\x00\x00\x00\x00\x00{", "cut off"),
    "dtype": (b"\x40\x00\x00\x00\x00\x00\x00\x00"
              + b'{"a":{"dtype":"F8_E5M2","shape":[1],"data_offsets":[0,1]}}'.ljust(64), "F8_E5M2"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_files_get_their_own_message(tmp_path, name):
    data, word = WRONG_FILES[name]
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=word) as caught:
        load_checkpoint(tmp_path / "x.pt")
    assert "x.pt" in str(caught.value)


def test_wrong_paths(tmp_path):
    for path, word in (("nowhere.pt", "does not exist"), (".", "is a folder"), ("a\0b", "not a valid path")):
        with pytest.raises(CheckpointError, match=word):
            load_checkpoint(f"{tmp_path}/{path}")
    for path in (3, None, b"a.pt"):
        with pytest.raises(
            CheckpointError, match=r"path = .* has type (int|NoneType|bytes): must be a str or os.PathL"
        ):
            load_checkpoint(path)
        with pytest.raises(CheckpointError, match=r"path = .* must be a str or os.PathLike; give the path of a file"):
            save_checkpoint(path, model=make_model())
    with pytest.raises(CheckpointError, match="no file name holds a NUL"):
        save_checkpoint(f"{tmp_path}/a\0b", model=make_model())
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_checkpoint(tmp_path / "pipe")


def test_truncated_anywhere(tmp_path, plain):
    save_checkpoint(tmp_path / "full.pt", **plain)
    data = (tmp_path / "full.pt").read_bytes()
    for size in [*range(1, 70), *range(70, len(data), len(data) // 40), len(data) - 1]:
        (tmp_path / "cut.pt").write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            load_checkpoint(tmp_path / "cut.pt")


def test_misfits_are_listed_at_once_and_nothing_changes():
    model = make_model()
    before = {key: value.copy() for key, value in export_weights(model).items()}
    state = export_weights(make_model(1))
    del state["norm.weight"]
    state["blocks.9.norm1.weight"] = np.ones(8, np.float32)
    state["lm_head.weight"] = np.ones((12, 8), np.float32)
    state["tok_emb.weight"] = state["tok_emb.weight"].astype(np.float16)
    state["blocks.0.norm1.weight"] = np.full(8, math.nan, np.float32)
    state["blocks.1.norm1.weight"] = jnp.full(8, math.inf)
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, state)
    for word in (
        "missing: norm.weight",
        "unexpected: blocks.9.norm1.weight",
        "lm_head.weight has shape (12, 8), and the model's lm_head.weight has (11, 8)",
        "tok_emb.weight has dtype float16, and the model's is float32",
        "blocks.0.norm1.weight holds NaN or Inf in 8 of 8 values",
        "blocks.1.norm1.weight holds NaN or Inf",
        "What to do",
    ):
        assert word in str(caught.value)
    assert same(before, export_weights(model))


@pytest.mark.parametrize(
    ("file", "model", "advice"),
    [("mha", "gqa", "use_gqa=False"), ("gqa", "mha", "use_gqa=True"), ("moe", "mha", "use_moe=True"),
     ("gelu", "mha", "use_swiglu=False"), ("mha", "gelu", "use_swiglu=True")],
)  # fmt: skip
def test_another_architecture_gets_advice(file, model, advice):
    with pytest.raises(CheckpointError, match=advice):
        load_weights(make_model(**KINDS[model]), export_weights(make_model(**KINDS[file])))


def test_foreign_architecture():
    with pytest.raises(CheckpointError, match="another architecture"):
        load_weights(make_model(), {"transformer.h.0.ln.weight": np.ones(3)})


def test_bfloat16_model_takes_a_bfloat16_file(tmp_path):
    source, target = (make_model(seed, param_dtype=jnp.bfloat16) for seed in (0, 1))
    save_checkpoint(tmp_path / "b.pt", model=source)
    got = load_checkpoint(tmp_path / "b.pt")
    assert got.model["norm.weight"].dtype == ml_dtypes.bfloat16
    load_weights(target, got)
    assert same(export_weights(source), export_weights(target))
    with pytest.raises(CheckpointError, match="convert the model"):
        load_weights(make_model(), got)


def test_loaded_weights_do_not_share_the_callers_memory():
    model, state = make_model(), {key: value.copy() for key, value in export_weights(make_model(1)).items()}
    load_weights(model, state)
    before = {key: value.copy() for key, value in export_weights(model).items()}
    for value in state.values():
        value += 1
    assert same(before, export_weights(model))


def test_an_abstract_model_is_filled():
    abstract = nnx.eval_shape(lambda: make_model())
    weights = export_weights(make_model(3))
    assert same(weights, export_weights(load_weights(abstract, weights)))


def test_what_we_save_torch_reads(tmp_path, torch, plain):
    save_checkpoint(tmp_path / "full.pt", **plain)
    raw = torch.load(tmp_path / "full.pt", weights_only=True)
    for key, value in plain.items():
        assert same(raw[key], value), key
    got = load_checkpoint(tmp_path / "full.pt")
    assert same(got.optimizer, plain["optimizer"])
    with pytest.raises(CheckpointError, match="weights only"):
        save_checkpoint(tmp_path / "x.safetensors", **plain)
    again = tmp_path / "again.pt"
    save_checkpoint(again, **plain)
    assert again.read_bytes() == (tmp_path / "full.pt").read_bytes()


def test_torch_to_jax_to_torch_is_byte_identical(tmp_path, torch, trained):
    torch.save(trained, tmp_path / "a.pt")
    got = load_checkpoint(tmp_path / "a.pt")
    parts = ("model", "optimizer", "scheduler", "scaler", "step", "best_val_loss")
    save_checkpoint(tmp_path / "b.pt", **{part: getattr(got, part) for part in parts})
    back = torch.load(tmp_path / "b.pt", weights_only=True)
    for part in ("model", "optimizer", "scheduler", "scaler"):
        assert same(dict(trained[part]), getattr(got, part))
        assert same(back[part], getattr(got, part))


def test_objects_are_saved_by_their_state(tmp_path):
    from omni_jax.optim import init_adamw_state

    model = make_model()
    state = init_adamw_state(nnx.state(model, nnx.Param))
    save_checkpoint(tmp_path / "a.pt", model=model, optimizer=state, step=1, best_val_loss=2.5)
    got = load_checkpoint(tmp_path / "a.pt")
    assert list(got.optimizer) == ["m", "v", "t"]
    assert got.optimizer["m"]["blocks"][0]["norm1"]["scale"].shape == (8,)
    for wrong in ({"optimizer": {"f": print}}, {"optimizer": {None: 1}}, {"step": -1}, {"best_val_loss": "low"}):
        with pytest.raises(CheckpointError):
            save_checkpoint(tmp_path / "a.pt", model=model, **wrong)
    with pytest.raises(CheckpointError, match="folder"):
        save_checkpoint(tmp_path / "no" / "a.pt", model=model)
    with pytest.raises(CheckpointError, match="model must be"):
        save_checkpoint(tmp_path / "a.pt", model={})
    with pytest.raises(CheckpointError, match="complex64"):
        save_checkpoint(tmp_path / "a.pt", model={"a": np.ones(2, np.complex64)})
    assert load_checkpoint(tmp_path / "a.pt").step == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file(tmp_path, monkeypatch, number, call):
    path = tmp_path / "a.pt"
    save_checkpoint(path, model=make_model(0), step=1)
    path.chmod(0o640)
    old = path.read_bytes()

    def fail(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, fail)
        with pytest.raises(OSError, match=os.strerror(number)):
            save_checkpoint(path, model=make_model(1), step=2)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["a.pt"]
    save_checkpoint(path, model=make_model(1), step=2)
    assert load_checkpoint(path).step == 2
    assert path.stat().st_mode & 0o777 == 0o640


def test_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    """The writer is killed 12 times; the file that stands there is always one that it finished."""
    code = (
        "import runpy, sys\nwrite = runpy.run_path(sys.argv[1])['write_atomic']\n"
        "for i in range(10**9):\n"
        "    write(sys.argv[2], lambda f: [f.write(bytes([i % 251]) * 4096) for _ in range(64)])\n"
    )
    path, rng = tmp_path / "a.bin", random.Random(0)
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-S", "-c", code, files.__file__, str(path)])
        while not path.exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0.03, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        data = path.read_bytes()
        assert len(data) == 64 * 4096
        assert len(set(data)) == 1
        path.unlink()
    files.write_atomic(path, lambda stream: None)
    assert os.listdir(tmp_path) == ["a.bin"]


def test_known_attacks_are_many():
    assert len(ATTACKS) >= 25


@pytest.mark.parametrize("name", ATTACKS)
def test_known_attack_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    data, word = ATTACKS[name]
    Path("attack.pt").write_bytes(data)
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint("attack.pt")
    assert word in str(caught.value)
    assert time.process_time() - start < 1
    assert not Path("canary-of-the-attacks").exists()


@pytest.mark.parametrize(
    ("name", "mutate"),
    [("full.pt", "byte_mutant"), ("full.pt", "structure_mutant"), ("weights.safetensors", "byte_mutant")],
)
def test_mutants_never_load_with_other_values(tmp_path, plain, name, mutate):
    """300 mutants each: CheckpointError and nothing else, or exactly the values that were saved."""
    if name == "full.pt":
        save_checkpoint(tmp_path / name, **plain)
    else:
        save_checkpoint(tmp_path / name, model=plain["model"], step=3)
    data, rng = (tmp_path / name).read_bytes(), random.Random(5)
    good = load_checkpoint(tmp_path / name)
    refused = 0
    for _ in range(300):
        (tmp_path / "mutant").write_bytes(PT[mutate](data, rng))
        try:
            got = load_checkpoint(tmp_path / "mutant")
        except CheckpointError:
            refused += 1
        else:
            for part in ("model", "optimizer", "scheduler", "scaler", "step", "best_val_loss"):
                assert same(getattr(got, part), getattr(good, part)), part
    assert refused > 200


def test_torch_is_not_needed(tmp_path, torch, trained):
    torch.save(trained, tmp_path / "a.pt")
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        "from omni_jax.checkpoint import load_checkpoint\n"
        "print(load_checkpoint(sys.argv[1]).step)"
    )
    root = str(Path(files.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, str(tmp_path / "a.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


def test_report_is_readable_and_a_checkpoint_is_frozen(tmp_path):
    report = load_report(make_model(), {"norm.weight": np.ones(8, np.float32)})
    assert "1 loaded, 0 renamed, 0 ignored by rule" in str(report)
    checkpoint = Checkpoint({}, None, None, None, None, None, "legacy")
    with pytest.raises(AttributeError):
        checkpoint.step = 1  # type: ignore[misc]


def test_metadata_of_our_safetensors(tmp_path):
    save_checkpoint(tmp_path / "a.safetensors", model=make_model(), step=4)
    raw = (tmp_path / "a.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert set(header["__metadata__"]) == {"format", "step", "best_val_loss", "sha256"}
    flipped = bytearray(raw)
    flipped[-1] ^= 1
    (tmp_path / "a.safetensors").write_bytes(flipped)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_checkpoint(tmp_path / "a.safetensors")


def test_names_of_distributed_models(tmp_path):
    """DistributedDataParallel puts `module.` in front of every key, torch.compile `_orig_mod.` before or after it."""
    weights = export_weights(make_model())
    for prefix in ("module.", "_orig_mod.module.", "module._orig_mod."):
        save_tree(tmp_path / "d.pt", {"model": {prefix + key: value for key, value in weights.items()}})
        got = load_checkpoint(tmp_path / "d.pt")
        assert same(dict(got.model), dict(weights))
        assert got.renamed == {prefix + key: key for key in weights}
    save_tree(tmp_path / "d.pt", {"module.norm.weight": ones(2), "lm_head.weight": ones(2)})  # not of all keys
    assert "module.norm.weight" in load_checkpoint(tmp_path / "d.pt").model


def test_safetensors_files_are_equal_byte_by_byte(tmp_path):
    tensors = {"b": ones(3), "a": ones(2, 2), "c": ones(0)}
    for name, order in (("1", "abc"), ("2", "cba")):
        with (tmp_path / name).open("wb") as stream:
            metadata = {key: key for key in order}
            write_safetensors(stream, {key: tensors[key] for key in order}, metadata)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    with (tmp_path / "1").open("rb") as stream:
        assert list(read_safetensors(stream)[1]) == ["a", "b", "c"]


def test_an_array_has_one_name_in_messages(tmp_path):
    save_tree(tmp_path / "x.pt", {"other": 3, "weight": ones(2)})
    with pytest.raises(CheckpointError, match="'weight': array"):
        load_checkpoint(tmp_path / "x.pt")
