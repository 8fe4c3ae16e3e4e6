"""omni_jax.inspection: everything that a file holds, told truly; the shipped model against its own description."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest

jax = pytest.importorskip("jax")

import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from omni_jax.checkpoint import CheckpointError, export_weights, save_checkpoint  # noqa: E402
from omni_jax.inspection import inspect_checkpoint  # noqa: E402
from omni_jax.pt_format import write_pt  # noqa: E402
from omni_jax.thinker import ThinkerLM, num_parameters  # noqa: E402

SHIPPED = Path(__file__).parent.parent.parent / "parity" / "assets"
SIZE = dict(vocab_size=11, n_layers=2, d_model=16, n_heads=4, d_ff=12, dropout=0.0, rope_theta=1e4, ctx_len=8)


def make_model(**more):
    return ThinkerLM(**(SIZE | more), rngs=nnx.Rngs(0))


def make_weights(**more):
    return {key: value.copy() for key, value in export_weights(make_model(**more)).items()}


def half(value):
    return value.astype(np.float16)


def zeros(*shape):
    return np.zeros(shape, np.float32)


def save_tree(path, tree):
    """A pt file of any tree, without save_checkpoint's checks."""
    with path.open("wb") as stream:
        write_pt(stream, tree)


def test_the_shipped_model():
    """What its own description says, found again in the file."""
    described = json.loads((SHIPPED / "thinker.json").read_text())
    found = inspect_checkpoint(SHIPPED / "thinker.pt")
    assert found.kind == "full"
    assert found.keys == ("model", "optimizer", "scheduler", "scaler", "step", "best_val_loss", "sha256")
    assert found.architecture is not None
    assert found.problem is None
    assert found.architecture.config.to_dict() == described["config"]
    assert found.config_file == str(SHIPPED / "thinker.json")
    assert found.parameters == described["parameters"] == sum(found.modules.values())
    assert list(found.modules) == ["tok_emb", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "norm", "lm_head"]
    assert found.dtypes == {"float32": described["parameters"]}
    assert found.states == {"optimizer": True, "scheduler": True, "scaler": False}
    assert found.step == described["steps"]
    assert round(found.best_val_loss, 6) == described["loss_nats_per_token"]["best_validation"]
    assert found.sha256 == described["sha256"]["file"]
    assert found.bytes == (SHIPPED / "thinker.pt").stat().st_size
    assert (found.parts, found.renamed, found.ignored) == ({}, {}, {})
    text = str(found)
    for words in (
        "529,248 (float32 529,248)",
        "optimizer: yes",
        "scaler: no",
        "step: 2,400",
        "0.360945 nats",
        "n_heads = 4  [config file]",
        "d_model = 96  [shapes]",
        "{model, optimizer, scheduler, scaler, step, best_val_loss}",
        "lists every key that is missing",
    ):
        assert words in text
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["architecture"]["config"] == described["config"]


def test_a_legacy_file_of_a_compiled_model(tmp_path):
    model = make_model(use_gqa=True)
    weights = export_weights(model)
    save_tree(tmp_path / "old.pt", {f"_orig_mod.{key}": value for key, value in weights.items()})
    found = inspect_checkpoint(tmp_path / "old.pt")
    assert found.kind == "legacy"
    assert found.keys == tuple(f"_orig_mod.{key}" for key in weights)
    assert found.architecture is None
    assert "do not tell n_heads: must be one of 2, 4, 8" in found.problem
    assert found.shapes == {
        **{"vocab_size": 11, "n_layers": 2, "d_model": 16, "d_ff": 12},
        **{"use_gqa": True, "use_swiglu": True, "use_moe": False},
    }
    assert found.parameters == num_parameters(model)
    assert not any(found.states.values())
    assert (found.step, found.best_val_loss) == (None, None)
    assert len(found.renamed) == len(weights)
    assert "d_model 16" in str(found)
    assert "step: not said" in str(found)
    model.config.to_json(tmp_path / "config.json")
    assert inspect_checkpoint(tmp_path / "old.pt").architecture.config == model.config
    assert inspect_checkpoint(tmp_path).config_file == str(tmp_path / "config.json")


def test_parts_dtypes_and_a_loss_that_is_no_number(tmp_path):
    weights = make_weights()
    weights["norm.weight"] = half(weights["norm.weight"])
    tree = {"thinker": weights, "proj_a": {"weight": zeros(3, 5)}, "proj_v": {}, "epoch": 3, "best_val_loss": math.inf}
    save_tree(tmp_path / "m.pt", tree)
    found = inspect_checkpoint(tmp_path / "m.pt")
    assert found.kind == "multimodal"
    assert found.parts == {"proj_a": 15, "proj_v": 0}
    assert found.modules["proj_a"] == 15
    assert found.dtypes == {"float16": 16, "float32": num_parameters(make_model()) - 16 + 15}
    assert found.parameters == num_parameters(make_model()) + 15
    assert found.ignored["epoch"] == "not in the format"
    assert found.to_dict()["best_val_loss"] == "inf"
    json.dumps(found.to_dict(), allow_nan=False)
    assert "other parts: proj_a 15, proj_v 0" in str(found)
    assert "best validation loss: inf" in str(found)


def test_a_file_without_a_thinker(tmp_path):
    save_checkpoint(tmp_path / "v.pt", model={}, parts={"vit": {"cls": zeros(1, 1, 4)}}, step=8)
    found = inspect_checkpoint(tmp_path / "v.pt")
    assert (found.kind, found.parameters, found.step, found.shapes) == ("vision", 4, 8, {})
    assert "only of vit" in found.problem


def test_safetensors(tmp_path):
    path = tmp_path / "w.safetensors"
    save_checkpoint(path, model=make_weights(use_moe=True, num_experts=3), step=7, best_val_loss=1.5)
    found = inspect_checkpoint(path)
    assert (found.kind, found.step, found.best_val_loss) == ("safetensors", 7, 1.5)
    assert found.shapes["num_experts"] == 3
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(found.keys) > 12
    assert f"({len(found.keys)} in all)" in str(found)


def test_long_names_are_cut(tmp_path):
    save_tree(tmp_path / "x.pt", {"a" * 500: zeros(1)})
    assert "a" * 200 not in str(inspect_checkpoint(tmp_path / "x.pt"))


def test_a_damaged_config_beside_is_told(tmp_path):
    save_checkpoint(tmp_path / "a.pt", model=make_weights())
    (tmp_path / "config.json").write_text("{")
    assert "not JSON" in inspect_checkpoint(tmp_path / "a.pt").problem


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect_checkpoint(tmp_path / "none.pt")
    (tmp_path / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        inspect_checkpoint(tmp_path)


def test_a_config_and_heads_may_be_given(tmp_path):
    model = make_model()
    save_checkpoint(tmp_path / "a.pt", model=model)
    assert "config= (--config FILE) or n_heads= (--n-heads N)" in inspect_checkpoint(tmp_path / "a.pt").problem
    found = inspect_checkpoint(tmp_path / "a.pt", n_heads=4)
    assert found.architecture.told["n_heads"] == "hint"
    model.config.to_json(tmp_path / "other.json")
    found = inspect_checkpoint(tmp_path / "a.pt", config=tmp_path / "other.json")
    assert found.architecture.config == model.config
    assert found.config_file == str(tmp_path / "other.json")
    assert "n_heads=3 does not fit" in inspect_checkpoint(tmp_path / "a.pt", n_heads=3).problem
