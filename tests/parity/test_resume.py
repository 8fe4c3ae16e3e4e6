"""A run that one twin began goes on in the other: the same weights, moments, step, batches, and nearly the same end."""

from __future__ import annotations

import json
import shutil
from types import ModuleType

import numpy as np
import pytest
from scipy.special import stdtrit

import omni_jax.checkpoint
import omni_jax.config
import omni_jax.training
import omni_torch.checkpoint
import omni_torch.config
import omni_torch.data
import omni_torch.training
from parity.statistics import share

TWINS: dict[str, ModuleType] = {"torch": omni_torch, "jax": omni_jax}
OTHER = {"torch": "jax", "jax": "torch"}
# MoE, GQA and the GELU MLP with its biases between them have every kind of parameter but qkv and SwiGLU's.
KINDS = {
    "swiglu": {},
    "gqa-moe-gelu": {"n_heads": 4, "use_gqa": True, "use_moe": True, "num_experts": 2, "use_swiglu": False},
}
CONFIG = {"vocab_size": 120, "n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 24, "ctx_len": 16, "dropout": 0.0}
TRAIN = {"lr": 0.01, "max_steps": 12, "warmup_steps": 2, "batch_size": 2, "gradient_accumulation_steps": 2}
TRAIN |= {"val_freq": 4, "checkpoint_freq": 100, "print_freq": 1, "seed": 3}


def make(side: str, out, resume: bool = False, **changes):
    twin = TWINS[side]
    flat = CONFIG | TRAIN | changes
    ids, val_ids = (
        omni_torch.data.token_stream([[3 + (i * k) % 97 for k in range(1, 12)] for i in documents], 1, 2)
        for documents in (range(1, 30), range(30, 34))
    )
    config = twin.config.ThinkerConfig.from_dict(flat)
    train_config = twin.training.TrainConfig.from_dict(flat)
    return twin.training.Trainer(config, train_config, ids, val_ids, out, resume, quiet=True)


def saved(out) -> tuple[dict, list[dict], dict]:
    """Weights, AdamW's states and the rest of last.pt, all as numpy arrays and numbers."""
    file = omni_jax.checkpoint.load_checkpoint(out / "last.pt")
    weights = {key: np.asarray(value) for key, value in file.model.items()}
    assert file.optimizer is not None
    moments = [{key: np.asarray(value) for key, value in s.items()} for s in file.optimizer["state"].values()]
    assert file.scheduler is not None
    schedule = {key: value for key, value in file.scheduler.items() if key != "_last_lr"}
    groups = [{k: v for k, v in group.items() if k != "lr"} for group in file.optimizer["param_groups"]]
    return weights, moments, {"schedule": schedule, "groups": groups, "step": file.step, "best": file.best_val_loss}


def same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other))
    return bool(np.array_equal(one, other))


def losses(out) -> np.ndarray:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return np.array([record["loss"] for record in records])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("begins", TWINS)
def test_the_other_twin_takes_over_bit_by_bit(tmp_path, begins, kind) -> None:
    """Read by the other twin and written again: every number is the same, and so are the next batches' bytes."""
    first = make(begins, tmp_path, **KINDS[kind])
    first.run(until=2)
    before = saved(tmp_path)
    second = make(OTHER[begins], tmp_path, resume=True, **KINDS[kind])
    assert second.state.step == 2
    assert second.state.best_val_loss == first.state.best_val_loss
    ours, theirs = first._batch(), second._batch()
    assert ours.dtype == theirs.dtype
    assert ours.tobytes() == theirs.tobytes()
    second._save()
    assert same(list(before), list(saved(tmp_path)))


def test_the_moments_stand_at_their_own_parameter(tmp_path) -> None:
    """torch numbers the moments by model.parameters(): the shapes of neighbours often agree, so shapes prove little."""
    trainer = make("jax", tmp_path)
    trainer.run(until=2)
    _, moments, _ = saved(tmp_path)
    by_key = trainer._by_key(trainer.state.optimizer.m)
    model = omni_torch.training.ThinkerLM.from_config(omni_torch.config.ThinkerConfig.from_dict(CONFIG))
    keys = [key for key, _ in model.named_parameters()]
    assert len(keys) == len(moments) == len({by_key[key].tobytes() for key in keys})
    for key, entry in zip(keys, moments):
        assert np.array_equal(entry["exp_avg"], by_key[key])


def perturbed(begun, folder, draw: int) -> np.ndarray:
    """The losses of torch going on from weights that are one unit roundoff off: what rounding alone may do."""
    import torch

    out = shutil.copytree(begun, folder / f"draw{draw}")
    trainer = make("torch", out, resume=True)
    generator = torch.Generator().manual_seed(draw)
    with torch.no_grad():
        for p in trainer.state.params.values():
            sign = torch.randint(0, 2, p.shape, generator=generator) * 2 - 1
            p.mul_(1 + sign * torch.finfo(p.dtype).eps)
    trainer.run()
    return losses(out)


@pytest.mark.parametrize("begins", TWINS)
def test_a_run_that_changes_the_twin_stays_where_rounding_takes_it(tmp_path, begins) -> None:
    begun = tmp_path / "begun"
    make(begins, begun).run(until=6)
    ends = {}
    for side in TWINS:
        out = shutil.copytree(begun, tmp_path / side)
        trainer = make(side, out, resume=True)
        trainer.run()
        ends[side] = losses(out)
        assert len(ends[side]) == 12
    draws = np.stack([perturbed(begun, tmp_path, draw) for draw in range(8)])
    # As the trajectory check does: Student's quantile times the spread, to which two losses' rounding is added.
    rounding = np.finfo(np.float32).eps * ends["torch"]
    spread = np.hypot(np.sqrt(np.mean((draws - ends["torch"]) ** 2, axis=0)), rounding)
    bound = -stdtrit(len(draws), share(len(ends["torch"])) / 2) * spread
    assert np.array_equal(ends["torch"][:6], ends["jax"][:6])
    assert np.all(np.abs(ends["torch"] - ends["jax"]) <= bound)
    assert np.all(np.abs(np.diff(ends["torch"][5:])) > bound[6:])  # the bound tells a run that skipped a step
