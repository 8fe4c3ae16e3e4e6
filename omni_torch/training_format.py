"""The training state of a checkpoint, laid out as torch.optim.AdamW and LambdaLR lay theirs out (omni_torch's copy)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .checkpoint import Checkpoint, CheckpointError
from .train_config import TrainConfig

__all__ = ["BETAS", "EPS", "optimizer_dict", "scheduler_dict", "saved_moments"]

# torch's defaults, which are the family's: written out, since frameworks differ in theirs.
BETAS = (0.9, 0.999)
EPS = 1e-8


def optimizer_dict(
    train_config: TrainConfig, lr: float, steps: Sequence[Any], moments: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    """torch's AdamW.state_dict(); `steps`, and `moments` "exp_avg" and "exp_avg_sq", have an array per parameter.

    The parameters stand in torch's order, that of model.parameters(), and the arrays in torch's layout.
    """
    group: dict[str, Any] = {"lr": lr, "betas": BETAS, "eps": EPS, "weight_decay": train_config.wd}
    group |= {"amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False}
    group |= {"fused": None, "decoupled_weight_decay": True, "initial_lr": train_config.lr}
    group["params"] = list(range(len(steps)))
    columns = zip(steps, moments["exp_avg"], moments["exp_avg_sq"], strict=True)
    state = {i: {"step": step, "exp_avg": m, "exp_avg_sq": v} for i, (step, m, v) in enumerate(columns)}
    return {"state": state, "param_groups": [group]}


def scheduler_dict(train_config: TrainConfig, step: int, lr: float) -> dict[str, Any]:
    """torch's LambdaLR.state_dict() after `step` updates."""
    return {
        "base_lrs": [train_config.lr],
        "last_epoch": step,
        "_step_count": step + 1,
        "_is_initial": False,
        "_get_lr_called_within_step": False,
        "_last_lr": [lr],
        "lr_lambdas": [None],  # torch does not save functions
    }


def saved_moments(checkpoint: Checkpoint, keys: Sequence[str]) -> tuple[int, dict[str, dict[str, Any]]]:
    """(updates made, moments by torch key: {"exp_avg": {key: array}, "exp_avg_sq": ...}) of a full checkpoint.

    Raises:
        CheckpointError: the file holds no optimizer of this model after `checkpoint.step` updates.
    """
    states = (checkpoint.optimizer or {}).get("state")
    step = checkpoint.step
    if step is None or not isinstance(states, dict) or list(states) != list(range(len(keys))):
        raise CheckpointError(
            f"it holds no training state of this model: a step and AdamW's moments of {len(keys)} parameters are "
            "needed; give the last.pt of a run"
        )
    for key, state in zip(keys, states.values()):
        if not isinstance(state, dict) or not {"step", "exp_avg", "exp_avg_sq"} <= state.keys():
            raise CheckpointError(f"the optimizer's state of {key} lacks step, exp_avg or exp_avg_sq; save it again")
        if int(state["step"]) != step:
            raise CheckpointError(f"the optimizer made {int(state['step'])} updates of {key}, the run {step}")
    names = ("exp_avg", "exp_avg_sq")
    return step, {name: {key: states[i][name] for i, key in enumerate(keys)} for name in names}
