"""Files that torch itself saved, converted by either twin and read by the other: the same bits, kinds and manifests."""

from __future__ import annotations

from collections import OrderedDict
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import omni_jax
import omni_jax.run_folder
import omni_jax.state_tree
import omni_torch
import omni_torch.run_folder
import omni_torch.state_tree

TWINS: dict[str, ModuleType] = {"torch": omni_torch, "jax": omni_jax}
OTHER = {"torch": "jax", "jax": "torch"}
SIZE = {"vocab_size": 11, "n_layers": 2, "d_model": 16, "n_heads": 4, "d_ff": 12, "dropout": 0.0, "ctx_len": 8}
SUFFIX = {"full": ".pt", "legacy": ".pt", "multimodal": ".pt", "safetensors": ".safetensors"}
CONTENT = ("model", "optimizer", "scheduler", "scaler", "step", "best_val_loss", "parts")


def digest(side: str, path) -> str:
    """Everything that a file holds, as that twin reads it, in one sum."""
    held = TWINS[side].load_checkpoint(path)
    return TWINS[side].state_tree.tree_digest({name: getattr(held, name) for name in CONTENT})


@pytest.fixture(scope="module")
def trained():
    """What the family's trainers save: a compiled model's names, AdamW after warm-up, LambdaLR, a scaler."""
    torch.manual_seed(0)
    model = omni_torch.ThinkerLM(**SIZE, use_gqa=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(3e-4), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 2))
    for _ in range(3):
        model(torch.randint(3, 11, (2, 5))).square().mean().backward()
        optimizer.step()
        scheduler.step()
    return model, {
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": {"scale": 65536.0, "_growth_tracker": 3},
        "step": 3,
        "best_val_loss": 1.25,
    }


def compiled(state) -> OrderedDict:
    return OrderedDict((f"_orig_mod.{key}", value) for key, value in state.items())


def write_source(path, kind: str, trained) -> None:
    model, state = trained
    weights = compiled(model.state_dict())
    odd = {
        "bf16": torch.tensor([1.0, -0.0, 1e-40, torch.nan], dtype=torch.bfloat16),
        "f16": torch.tensor([[6e-8, -torch.inf]], dtype=torch.float16),
        "f64": torch.tensor(torch.pi, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "turned": torch.arange(6.0).reshape(2, 3).T,
    }
    parts = {"proj_a": torch.nn.Linear(3, 2).state_dict(), "proj_v": odd}
    if kind == "full":
        torch.save({"model": weights, **state}, path)
    elif kind == "legacy":
        torch.save(weights, path)
    elif kind == "multimodal":
        torch.save({"thinker": weights, **parts, **state}, path)
    else:
        from safetensors.torch import save_file

        flat = {f"thinker.{key}": value for key, value in model.state_dict().items()}
        flat |= {f"{part}.{key}": value.contiguous() for part in parts for key, value in parts[part].items()}
        save_file(flat, path, {"format": "pt"})
    model.config.to_json(path.with_name("config.json"))


@pytest.mark.parametrize("target", SUFFIX)
@pytest.mark.parametrize("source", SUFFIX)
def test_what_one_twin_converts_the_other_reads(tmp_path, trained, source, target) -> None:
    file = tmp_path / f"source{SUFFIX[source]}"
    write_source(file, source, trained)
    assert digest("torch", file) == digest("jax", file)
    manifests = {}
    for side in TWINS:
        path = tmp_path / f"{side}{SUFFIX[target]}"
        made = manifests[side] = TWINS[side].convert_checkpoint(file, path, target)
        assert digest(OTHER[side], path) == digest(side, path)
        held = TWINS[OTHER[side]].load_checkpoint(path)
        assert held.kind == made.target_kind == target
        back = tmp_path / f"back{SUFFIX[target]}"
        TWINS[OTHER[side]].convert_checkpoint(path, back)
        assert digest(side, back) == digest(side, path)
        if source == target:
            assert digest("torch", path) == digest("torch", file)
    same = ["source_arrays", "target_arrays", "source_sha256", "renamed", "dropped", "config", "told", "notes"]
    same += ["target_sha256"] if target == "safetensors" else []  # the same file, byte by byte
    for name in same:
        assert getattr(manifests["torch"], name) == getattr(manifests["jax"], name), name


@pytest.mark.parametrize("side", TWINS)
def test_torch_and_safetensors_read_what_we_convert(tmp_path, trained, side) -> None:
    from safetensors.torch import load_file

    model, state = trained
    write_source(tmp_path / "a.pt", "full", trained)
    convert = TWINS[side].convert_checkpoint
    convert(tmp_path / "a.pt", tmp_path / "full.pt")
    convert(tmp_path / "a.pt", tmp_path / "legacy.pt", "legacy")
    convert(tmp_path / "a.pt", tmp_path / "w.safetensors", "safetensors")
    full = torch.load(tmp_path / "full.pt", weights_only=True)
    legacy = torch.load(tmp_path / "legacy.pt", weights_only=True)
    for weights in (full["model"], legacy, load_file(tmp_path / "w.safetensors")):
        fresh = omni_torch.ThinkerLM(**model.config.to_dict())
        fresh.load_state_dict(weights)  # torch's own strict loader
        assert all(a.equal(b) for a, b in zip(fresh.state_dict().values(), model.state_dict().values(), strict=True))
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=torch.tensor(1.0))
    optimizer.load_state_dict(full["optimizer"])
    for ours, theirs in zip(optimizer.state.values(), state["optimizer"]["state"].values(), strict=True):
        assert all(ours[name].equal(theirs[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    assert full["scheduler"] == state["scheduler"]
    assert full["scaler"] == state["scaler"]


def test_a_file_of_one_twin_is_inspected_alike_by_both(tmp_path, trained) -> None:
    for kind in SUFFIX:
        write_source(tmp_path / f"s{SUFFIX[kind]}", kind, trained)
        told = [twin.inspect_checkpoint(tmp_path / f"s{SUFFIX[kind]}") for twin in TWINS.values()]
        assert told[0].to_dict() == told[1].to_dict()
        assert str(told[0]) == str(told[1])


def test_a_run_folder_becomes_a_model_in_both(tmp_path, trained) -> None:
    """config.json as a run writes it, the model's and the training's keys in one; best.pt before last.pt."""
    model, _ = trained
    folder = omni_torch.run_folder.RunFolder(tmp_path / "run")
    folder.start(model.config.to_dict() | {"lr": 1e-3, "max_steps": 5}, "0")
    omni_torch.save_checkpoint(folder.best, model=model, step=3)
    omni_torch.save_checkpoint(folder.last, model=omni_torch.ThinkerLM(**model.config.to_dict()), step=5)
    ids = [[1, 5, 9, 4]]
    made = {side: twin.ThinkerLM.from_checkpoint(folder.path) for side, twin in TWINS.items()}
    assert made["torch"].config.to_dict() == made["jax"].config.to_dict() == model.config.to_dict()
    with torch.no_grad():
        ours = made["torch"](torch.tensor(ids))
        assert ours.equal(model.eval()(torch.tensor(ids)))
    theirs = np.asarray(made["jax"](jnp.asarray(ids)))
    far = np.abs(theirs - ours.numpy()).max() / np.abs(theirs).max()
    assert far < 64 * np.finfo(np.float32).eps  # some ten roundings one after the other in each twin
