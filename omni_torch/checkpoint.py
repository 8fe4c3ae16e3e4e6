"""Checkpoints of the family, in and out: full and legacy torch.save files, and safetensors.

Reading is fail-closed: a file holds what the format says or is refused; a state fits the model key by key, or nothing
of the model is changed. Names in the dicts are always torch's keys, without what torch.compile puts into them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Shaped
from torch import nn

from .files import open_regular_file, write_atomic
from .pt_archive import CheckpointError
from .pt_format import read_pt, write_pt
from .safetensors_format import read_safetensors, write_safetensors
from .state_tree import dtype_name, is_array, plain_number, plain_tree, tree_digest

__all__ = [
    "CheckpointError",
    "Checkpoint",
    "LoadReport",
    "load_checkpoint",
    "load_report",
    "load_weights",
    "export_weights",
    "save_checkpoint",
]

Tensor = Shaped[torch.Tensor, "..."]
Model = TypeVar("Model", bound=nn.Module)

_OTHER_PARTS = ("audio_encoder", "vision_encoder", "talker", "rvq", "proj_a", "proj_v", "ocr")
_FUSED = re.compile(r"(.*\.)?qkv\.(weight|bias)")
_SPLIT = re.compile(r"(.*\.)?([qkv])\.(weight|bias)")
# What a foreign key says about the model that the file was made from.
_SIGNS = (
    (".attn.qkv.", "use_gqa=False"),
    (".attn.q.", "use_gqa=True and the file's kv_groups"),
    (".moe.", "use_moe=True"),
    (".mlp.gate_proj.", "use_swiglu=True"),
    (".mlp.fc1.", "use_swiglu=False"),
)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        model: weights by normalised key, on the CPU.
        optimizer, scheduler, scaler: their state dicts, or None.
        step: number of training steps done, or None.
        best_val_loss: lowest validation loss so far, nats per token, or None.
        kind: "full" (weights and training state), "legacy" (a bare state dict) or "safetensors".
        renamed: name in the file → key in `model`, where they differ.
        ignored: name in the file → the rule by which it is left out.
    """

    model: dict[str, Tensor]
    optimizer: dict[Any, Any] | None
    scheduler: dict[Any, Any] | None
    scaler: dict[Any, Any] | None
    step: int | None
    best_val_loss: float | None
    kind: str
    renamed: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadReport:
    """How a state fits a model: every key of the file and of the model is accounted for.

    Attributes:
        loaded: keys of the model that the state fills.
        renamed: key in the file → key in the model, where they differ (stripped, split or concatenated).
        ignored: key in the file → the rule by which it is left out.
        missing: keys of the model that the state does not have.
        unexpected: keys of the state that the model does not have.
        refused: a sentence for each key of another shape or dtype, or with NaN or Inf.
    """

    loaded: tuple[str, ...]
    renamed: dict[str, str]
    ignored: dict[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    refused: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether load_weights would load it."""
        return not (self.missing or self.unexpected or self.refused)

    def __str__(self) -> str:
        lines = [
            f"{len(self.loaded)} loaded, {len(self.renamed)} renamed, {len(self.ignored)} ignored by rule, "
            f"{len(self.missing)} missing, {len(self.unexpected)} unexpected, {len(self.refused)} refused"
        ]
        lines += [f"  missing: {key}" for key in self.missing]
        lines += [f"  unexpected: {key}" for key in self.unexpected]
        lines += [f"  refused: {reason}" for reason in self.refused]
        lines += [f"  ignored: {key} ({rule})" for key, rule in self.ignored.items()]
        return "\n".join(lines)


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint file of the family; its content decides the kind, not its name.

    Keys lose every `_orig_mod` part, and `thinker.` where the file holds a whole multimodal model. q, k and v stay as
    the file has them: a fused one looks like a GQA file with as many groups as heads, and only the model can tell.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or holds anything but data.
    """
    name = f"checkpoint {str(path)!r}"
    with open_regular_file(path, "checkpoint", CheckpointError) as stream:
        try:
            head = stream.read(16)
            stream.seek(0)
            if head[:4] == b"PK\x03\x04":
                return _from_tree(read_pt(stream))
            if head[8:9] == b"{":
                return _from_safetensors(*read_safetensors(stream))
            raise CheckpointError(_unknown_format(head))
        except CheckpointError as bad:
            raise CheckpointError(f"{name}: {bad}") from None
        except OSError as bad:
            raise CheckpointError(f"{name} cannot be read: {bad.strerror or bad}; check the disk") from None


def load_report(model: nn.Module, state: Mapping[str, Tensor] | Checkpoint) -> LoadReport:
    """What load_weights would do with `state`, without doing it."""
    return _plan(model, state)[0]


def load_weights(model: Model, state: Mapping[str, Tensor] | Checkpoint) -> Model:
    """Fill `model`, in place, with `state`, and return it; all of it, or an error and nothing changed.

    Where the model has qkv and the state q, k and v, their rows are concatenated in this order; where the model has
    them apart, of equal shape, a fused one is split.

    Args:
        state: a Checkpoint, or its `model`: arrays by torch key.

    Raises:
        CheckpointError: lists at once every key that is missing, unexpected, of another shape or dtype, or not finite.
    """
    report, values = _plan(model, state)
    if not report.fits:
        raise CheckpointError(_misfit(report))
    targets = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for key, value in values.items():
            targets[key].copy_(value)
    return model


def export_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights by torch key, as load_weights takes them; they share the model's memory."""
    return {key: value.detach() for key, value in model.state_dict().items()}


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | Mapping[str, Tensor],
    optimizer: Any = None,
    scheduler: Any = None,
    scaler: Any = None,
    step: int = 0,
    best_val_loss: float = math.inf,
) -> None:
    """Write a checkpoint in one step: a reader sees the file that was there before, or the new one, whole.

    A path that ends in `.safetensors` gets the weights, step and best_val_loss; any other gets the full format, which
    torch.load(path, weights_only=True) reads. Both carry a SHA-256 of all values, which load_checkpoint verifies.

    Args:
        model: a module, or weights by torch key.
        optimizer, scheduler, scaler: a state dict, or what has a `state_dict` method.

    Raises:
        CheckpointError: something that the format cannot hold, or a path that cannot be a file.
        OSError: the disk is full or fails; the file that was there before is as it was.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise CheckpointError(f"cannot save to {str(path)!r}: it is a folder, or its folder does not exist; create it")
    weights = export_weights(model) if isinstance(model, nn.Module) else dict(model)
    if not weights or not all(type(key) is str and is_array(value) for key, value in weights.items()):
        raise CheckpointError("model must be a module with weights, or a dict of arrays by str, not empty")
    tree: dict[str, Any] = {
        "model": weights,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "scaler": scaler,
        "step": _step(step),
        "best_val_loss": _loss(best_val_loss),
    }
    tree = {key: plain_tree(value, key) for key, value in tree.items()}
    if path.suffix == ".safetensors":
        if any(tree[key] is not None for key in ("optimizer", "scheduler", "scaler")):
            raise CheckpointError("a .safetensors file holds weights only; save the training state to a .pt file")
        metadata = {"format": "pt", "step": str(tree["step"]), "best_val_loss": repr(tree["best_val_loss"])}
        metadata["sha256"] = tree_digest({"model": tree["model"], **metadata})
        write_atomic(path, lambda stream: write_safetensors(stream, tree["model"], metadata))
    else:
        tree["sha256"] = tree_digest(tree)
        write_atomic(path, lambda stream: write_pt(stream, tree))


# From a file to a Checkpoint -----------------------------------------------------------------------------------------


def _unknown_format(head: bytes) -> str:
    if head[:1] == b"\x80":
        return "it is a bare pickle (torch before 1.6), which is not read; save it again with torch >= 1.6"
    if head[:2] in (b"PK", b"\x1f\x8b") or head[:6] == b"\xfd7zXZ\x00":
        return "it is a compressed or empty archive, not a checkpoint; unpack it first"
    return "it is neither a torch.save file nor safetensors; give the .pt or .safetensors file itself"


def _from_tree(tree: Any) -> Checkpoint:
    """Full, legacy and multimodal dicts."""
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise CheckpointError(
            f"it holds a {type(tree).__name__}, not a dict by str; save {{'model': model.state_dict(), ...}}"
        )
    if "sha256" in tree and not is_array(tree["sha256"]):
        tree = dict(tree)
        if tree.pop("sha256") != tree_digest(tree):
            raise CheckpointError("its values do not match its own SHA-256: it was changed or damaged; fetch it again")
    part = next((part for part in ("model", "thinker") if isinstance(tree.get(part), dict)), None)
    if part is None and (not tree or not all(is_array(value) for value in tree.values())):
        raise CheckpointError(_not_a_model(tree))
    if part is None:
        model, renamed, ignored = _normalise(tree)
        return Checkpoint(model, None, None, None, None, None, "legacy", renamed, ignored)
    model, renamed, ignored = _normalise(tree[part])
    states = {}
    for key in ("optimizer", "scheduler", "scaler"):
        states[key] = tree.get(key)
        if not isinstance(states[key], dict | None):
            raise CheckpointError(f"{key} is a {type(states[key]).__name__}, not a dict; save {key}.state_dict()")
    for key in tree.keys() - states.keys() - {part, "step", "best_val_loss"}:
        rule = "a part of the multimodal model" if part == "thinker" else "not in the format"
        ignored[key] = rule
    return Checkpoint(
        model,
        **states,
        step=_step(tree.get("step")),
        best_val_loss=_loss(tree.get("best_val_loss")),
        kind="full",
        renamed=renamed,
        ignored=dict(sorted(ignored.items())),
    )


def _from_safetensors(arrays: Mapping[str, Tensor], metadata: dict[str, str]) -> Checkpoint:
    claimed = {key: value for key, value in metadata.items() if key != "sha256"}
    if "sha256" in metadata and metadata["sha256"] != tree_digest({"model": arrays, **claimed}):
        raise CheckpointError("its values do not match its own SHA-256: it was changed or damaged; fetch it again")
    model, renamed, ignored = _normalise(arrays)
    try:
        step = int(metadata["step"]) if "step" in metadata else None
        loss = float(metadata["best_val_loss"]) if "best_val_loss" in metadata else None
    except ValueError:
        raise CheckpointError("its metadata step or best_val_loss is no number; save the file again") from None
    return Checkpoint(model, None, None, None, _step(step), _loss(loss), "safetensors", renamed, ignored)


def _not_a_model(tree: dict[str, Any]) -> str:
    for part, what in (("vit", "a vision"), ("enc", "an audio"), ("proj_a", "a projector")):
        if part in tree:
            return f"it is {what} checkpoint (it has {part!r}), not one of ThinkerLM; give the thinker's file"
    shown = ", ".join(f"{key[:40]!r}: {type(value).__name__}" for key, value in list(tree.items())[:5])
    return f"it is no model: a dict with {{{shown}}}; save {{'model': model.state_dict(), ...}} or the bare state dict"


def _normalise(weights: Mapping[Any, Any]) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str]]:
    """The weights by normalised key; name in the file → key where they differ; name in the file → why left out."""
    wrong = [f"{key!r}: {type(value).__name__}" for key, value in weights.items() if not _is_weight(key, value)]
    if wrong:
        raise CheckpointError(f"the state dict holds what is no tensor by name: {', '.join(wrong[:5])}; save it again")
    if not weights:
        raise CheckpointError("the state dict is empty; save model.state_dict()")
    stripped = {key: ".".join(part for part in key.split(".") if part != "_orig_mod") for key in weights}
    whole = any(name.startswith("thinker.") for name in stripped.values())
    model: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    ignored: dict[str, str] = {}
    clashes: list[str] = []
    for key, value in weights.items():
        name = stripped[key]
        prefix, _, rest = name.partition(".")
        if prefix in _OTHER_PARTS:
            ignored[key] = f"{prefix}.* belongs to another part of the model"
            continue
        if whole and prefix == "thinker":
            name = rest
        if name in model:
            clashes.append(f"{origin[name]!r} and {key!r} both mean {name!r}")
            continue
        model[name], origin[name] = value, key
    if clashes:
        raise CheckpointError(f"keys collide: {'; '.join(clashes)}; save one of each")
    if not model:
        raise CheckpointError(
            f"it has no weights of ThinkerLM, only {', '.join(sorted(ignored)[:5])}, ...; give its file"
        )
    return model, {key: name for name, key in origin.items() if name != key}, ignored


def _is_weight(key: object, value: object) -> bool:
    return type(key) is str and key != "" and is_array(value)


def _step(value: Any) -> int | None:
    value = plain_number(value)
    if value is None or (type(value) is int and 0 <= value < 1 << 63):
        return value
    raise CheckpointError(f"step = {value!r} is not a count; give an integer from 0 up")


def _loss(value: Any) -> float | None:
    value = plain_number(value)
    if value is None or (type(value) in (int, float)):
        return None if value is None else float(value)
    raise CheckpointError(f"best_val_loss = {value!r} is not a number; give a float")


# Does it fit? --------------------------------------------------------------------------------------------------------


def _plan(model: nn.Module, state: Mapping[str, Tensor] | Checkpoint) -> tuple[LoadReport, dict[str, Tensor]]:
    """The report, and the value of every key of the model that the state has."""
    checkpoint = state if isinstance(state, Checkpoint) else None
    arrays: Mapping[str, Tensor] = checkpoint.model if checkpoint else state  # type: ignore[assignment]
    wanted = _wanted(model)
    renamed = dict(checkpoint.renamed) if checkpoint else {}
    origin = {key: name for name, key in renamed.items()}
    values: dict[str, Tensor] = {}
    missing: list[str] = []
    refused: list[str] = []
    used: set[str] = set()
    for key, (shape, dtype) in wanted.items():
        sources = _sources(key, wanted, arrays)
        if not sources:
            missing.append(key)
            continue
        used.update(sources)
        for source in sources:
            if source != key:
                name = origin.get(source, source)
                renamed[name] = f"{renamed[name]}, {key}" if name in renamed and len(sources) == 1 else key
        wrong = [reason for source in sources for reason in _faults(source, arrays[source], dtype)]
        try:
            value = None if wrong else _joined(key, sources, arrays)
        except ValueError as bad:  # parts that do not join
            wrong.append(f"{', '.join(sources)}: {bad}")
            value = None
        if value is not None and tuple(value.shape) != shape:
            wrong.append(f"{' + '.join(sources)} has shape {tuple(value.shape)}, and the model's {key} has {shape}")
        refused += wrong
        if value is not None and not wrong:
            values[key] = value
    report = LoadReport(
        loaded=tuple(values),
        renamed=renamed,
        ignored=dict(checkpoint.ignored) if checkpoint else {},
        missing=tuple(missing),
        unexpected=tuple(str(key) for key in arrays if key not in used),
        refused=tuple(dict.fromkeys(refused)),
    )
    return report, values


def _sources(key: str, wanted: Mapping[str, Any], arrays: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of the state that fill `key`: itself, or q, k and v for qkv, or qkv for one of equal q, k and v."""
    if key in arrays:
        return (key,)
    if fused := _FUSED.fullmatch(key):
        parts = tuple(f"{fused[1] or ''}{part}.{fused[2]}" for part in "qkv")
        return parts if all(part in arrays and part not in wanted for part in parts) else ()
    if split := _SPLIT.fullmatch(key):
        whole = f"{split[1] or ''}qkv.{split[3]}"
        parts = tuple(f"{split[1] or ''}{part}.{split[3]}" for part in "qkv")
        alike = all(part in wanted and wanted[part] == wanted[key] and part not in arrays for part in parts)
        return (whole,) if alike and whole in arrays and whole not in wanted else ()
    return ()


def _joined(key: str, sources: tuple[str, ...], arrays: Mapping[str, Tensor]) -> Tensor:
    parts = [arrays[source] for source in sources]
    if len(parts) == 3:
        if len({tuple(part.shape[1:]) for part in parts}) > 1 or any(part.ndim == 0 for part in parts):
            raise ValueError(f"shapes {', '.join(str(tuple(part.shape)) for part in parts)} do not concatenate")
        return _concatenate(parts)
    split = _SPLIT.fullmatch(key)
    if sources == (key,) or split is None:
        return parts[0]
    if parts[0].ndim == 0 or len(parts[0]) % 3:
        raise ValueError(f"shape {tuple(parts[0].shape)} does not split into q, k and v")
    rows, place = len(parts[0]) // 3, "qkv".index(split[2])
    return parts[0][place * rows : (place + 1) * rows]


def _faults(key: str, value: Any, dtype: str) -> Iterator[str]:
    if not is_array(value):
        yield f"{key} is a {type(value).__name__}, not an array"
        return
    if dtype_name(value) != dtype:
        yield f"{key} has dtype {dtype_name(value)}, and the model's is {dtype}"
    bad = _count_not_finite(value)
    if bad:
        yield f"{key} holds NaN or Inf in {bad} of {math.prod(value.shape)} values"


def _misfit(report: LoadReport) -> str:
    if not report.loaded and not report.refused:
        return (
            f"the checkpoint is of another architecture: none of its {len(report.unexpected)} keys "
            f"({', '.join(report.unexpected[:4])}, ...) is one of the model's {len(report.missing)} "
            f"({', '.join(report.missing[:4])}, ...); give a checkpoint of this model"
        )
    advice = []
    foreign = list(report.unexpected) if report.missing else []
    foreign += [reason.split()[0] for reason in report.refused if " + " in reason]  # q, k, v that do not make a qkv
    for sign, setting in _SIGNS:
        if any(sign in key for key in foreign):
            advice.append(f"build the model with {setting}")
    if any("dtype" in reason for reason in report.refused):
        advice.append("convert the model, or the state, to one dtype")
    if any("NaN" in reason for reason in report.refused):
        advice.append("take an earlier checkpoint, from before the values went bad")
    if not advice:
        advice.append("build the model from the config that the checkpoint was made with")
    todo = "; ".join(dict.fromkeys(advice))
    return f"the checkpoint does not fit the model, which is unchanged: {report}\nWhat to do: {todo}"


# What is the framework's own -----------------------------------------------------------------------------------------


def _wanted(model: nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every weight of the model, by torch key."""
    return {key: (tuple(value.shape), dtype_name(value)) for key, value in model.state_dict().items()}


def _count_not_finite(value: Tensor) -> int:
    return int((~torch.isfinite(value)).sum()) if value.is_floating_point() or value.is_complex() else 0


def _concatenate(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=0)
