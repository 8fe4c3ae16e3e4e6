"""Checkpoints of the family, in and out: full and legacy torch.save files, and safetensors.

Reading is fail-closed: a file holds what the format says or is refused; a state fits the model key by key, or nothing
of the model is changed. Names in the dicts are always torch's keys, without what torch.compile puts into them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Shaped

from .checkpoint_folder import checked_path, find_checkpoint
from .files import open_regular_file, write_atomic
from .foreign_names import MAIN_PARTS, STATES, Named, named_file, named_weights, type_name, whole_weights
from .pt_archive import CheckpointError
from .pt_format import read_pt, write_pt
from .safetensors_format import read_safetensors, write_safetensors
from .state_fit import LoadReport, misfit, plan_load
from .state_tree import is_array, plain_number, plain_tree, tree_digest

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

Array = Shaped[np.ndarray, "..."] | Shaped[jax.Array, "..."]
Model = TypeVar("Model", bound=nnx.Module)

# Leaf name in JAX → in torch.
_LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "weight": "weight", "bias": "bias"}
_LEAF_NAMES |= {"cls": "cls", "pos": "pos"}  # ViTTiny's own
# Names at the top of a file that no part can have.
_TAKEN = ("model", "thinker", *STATES, "step", "best_val_loss", "sha256")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file of the family holds: ThinkerLM's weights, other parts, training state.

    Attributes:
        model: weights by normalised torch key, in torch's layout, numpy arrays (bfloat16 by ml_dtypes);
            empty where there is no thinker.
        optimizer, scheduler, scaler: their state dicts, or None.
        step: number of training steps done, or None.
        best_val_loss: lowest validation loss so far, nats per token, or None.
        kind: "full" (weights and training state), "legacy" (a bare state dict), "safetensors", or a dict of parts:
            "multimodal", "vision", "audio".
        renamed: name in the file → key in `model` (or part.key in `parts`), where they differ.
        ignored: name in the file → the rule by which it is left out of `model`.
        parts: what is not the thinker, by the name of the part (proj_a, vit, ...): its weights as in `model`.
    """

    model: dict[str, Array]
    optimizer: dict[Any, Any] | None
    scheduler: dict[Any, Any] | None
    scaler: dict[Any, Any] | None
    step: int | None
    best_val_loss: float | None
    kind: str
    renamed: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    parts: dict[str, dict[str, Array]] = field(default_factory=dict)


def load_checkpoint(path: str | os.PathLike[str], *, which: str = "best") -> Checkpoint:
    """Read a checkpoint file of the family, or the best or latest one of a folder; the content decides the kind.

    Keys lose every `_orig_mod` part, `module.` where all have it, and `thinker.` where the file holds a whole
    multimodal model. q, k and v stay as the file has them: a fused one looks like a GQA file with as many groups as
    heads, and only the model can tell.

    Args:
        which: for a folder. "best": `best*` or `*_best`, else as "latest". "latest": `last`, else the highest step
            number at the end of a name, else the only file.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or holds anything but data; a folder without a
            checkpoint, or with several that the names do not tell apart.
    """
    return _read(find_checkpoint(path, which))[0]


def load_report(model: nnx.Module, state: Mapping[str, Array] | Checkpoint) -> LoadReport:
    """What load_weights would do with `state`, without doing it."""
    return _plan(model, state)[0]


def load_weights(model: Model, state: Mapping[str, Array] | Checkpoint) -> Model:
    """Fill `model`, in place, with `state`, and return it; all of it, or an error and nothing changed.

    Where the model has qkv and the state q, k and v, their rows are concatenated in this order; where the model has
    them apart, of equal shape, a fused one is split.

    Args:
        state: a Checkpoint, or its `model`: arrays by torch key.

    Raises:
        CheckpointError: lists at once every key that is missing, unexpected, of another shape or dtype, or not finite;
            or says that the file holds no thinker.
    """
    report, values = _plan(model, state)
    if isinstance(state, Checkpoint):
        check_thinker(state)
    if not report.fits:
        raise CheckpointError(misfit(report))
    state_of_model = _variables(model)
    # Every new leaf is made before the first is put in its place. A copy: JAX may else share numpy's memory.
    leaves = [
        (path, variable.replace(jnp.array(_from_torch(path, np.asarray(values[torch_key(path)])), copy=True)))
        for path, variable in state_of_model.items()
    ]
    nnx.update(model, nnx.from_flat_state(leaves))
    return model


def export_weights(model: nnx.Module) -> dict[str, Array]:
    """The model's weights by torch key and in torch's layout, as load_weights takes them; numpy arrays."""
    return {
        torch_key(path): _to_torch(path, np.asarray(variable.get_value()))
        for path, variable in _variables(model).items()
    }


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nnx.Module | Mapping[str, Array],
    optimizer: Any = None,
    scheduler: Any = None,
    scaler: Any = None,
    step: int | None = 0,
    best_val_loss: float | None = math.inf,
    parts: Mapping[str, Mapping[str, Array]] | None = None,
) -> None:
    """Write a checkpoint in one step: a reader sees the file that was there before, or the new one, whole.

    A path that ends in `.safetensors` gets the weights, step and best_val_loss; any other gets the full format, which
    torch.load(path, weights_only=True) reads. Both carry a SHA-256 of all values, which load_checkpoint verifies.

    Args:
        model: a module, or weights by torch key; may be an empty dict where there are `parts`. An OmniLM has parts.
        optimizer, scheduler, scaler: a state dict, or what has a `state_dict` method.
        step, best_val_loss: numbers, or None where they are not known.
        parts: what is not the thinker: part → weights. With it, a .pt file is a multimodal dict, {thinker, part, ...},
            and a .safetensors file has prefixes.

    Raises:
        CheckpointError: something that the format cannot hold, or a path that cannot be a file.
        OSError: the disk is full or fails; the file that was there before is as it was.
    """
    path = checked_path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise CheckpointError(f"cannot save to {str(path)!r}: it is a folder, or its folder does not exist; create it")
    weights = export_weights(model) if isinstance(model, nnx.Module) else dict(model)
    if not (weights or parts) or not _is_state_dict(weights):
        raise CheckpointError("model must be a module with weights, or a dict of arrays by str, not empty")
    if any(key.startswith("thinker.") for key in weights):  # OmniLM's
        whole = named_weights(weights, "multimodal")
        weights, parts = whole.model, whole.parts | dict(parts or {})
    apart = _plain_parts(parts)
    if not weights and not any(part in MAIN_PARTS for part in apart):
        raise CheckpointError(f"parts without a model must have one of {', '.join(MAIN_PARTS[2:])}; give model=")
    states = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    numbers = {"step": _step(step), "best_val_loss": _loss(best_val_loss)}
    if path.suffix == ".safetensors":
        if any(value is not None for value in states.values()):
            raise CheckpointError("a .safetensors file holds weights only; save the training state to a .pt file")
        prefix = "thinker." if apart else ""
        arrays = plain_tree({f"{prefix}{key}": value for key, value in weights.items()}, "model")
        arrays |= {f"{part}.{key}": value for part in apart for key, value in apart[part].items()}
        metadata = {"format": "pt"} | {key: repr(value) for key, value in numbers.items() if value is not None}
        metadata |= {"parts": " ".join(apart)} if apart else {}
        metadata["sha256"] = tree_digest({"model": arrays, **metadata})
        write_atomic(path, lambda stream: write_safetensors(stream, arrays, metadata))
    else:
        held = {"model" if parts is None else "thinker": weights} if weights else {}
        tree = {key: plain_tree(value, key) for key, value in (held | apart | states | numbers).items()}
        tree["sha256"] = tree_digest(tree)
        write_atomic(path, lambda stream: write_pt(stream, tree))


def _is_state_dict(weights: Any) -> bool:
    return isinstance(weights, Mapping) and all(type(key) is str and is_array(weights[key]) for key in weights)


def _plain_parts(parts: Mapping[str, Any] | None) -> dict[str, Any]:
    """The parts, ready to be written, once their names and values are sound."""
    for part, weights in (parts or {}).items():
        if type(part) is not str or not part.isidentifier() or part in _TAKEN or not _is_state_dict(weights):
            raise CheckpointError(
                f"parts holds {str(part)[:60]!r}: must be names like 'proj_a', none of {', '.join(_TAKEN)}, each with "
                "a dict of arrays by str; give parts={'proj_a': ...}"
            )
    return {part: plain_tree(weights, part) for part, weights in (parts or {}).items()}


# From a file to a Checkpoint -----------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint in one file, and the names at the file's top level."""
    name = f"checkpoint {str(path)!r}"
    with open_regular_file(path, "checkpoint", CheckpointError) as stream:
        try:
            head = stream.read(16)
            stream.seek(0)
            if head[:4] == b"PK\x03\x04":
                tree = read_pt(stream)
                return _from_tree(tree), tuple(tree)
            if head[8:9] == b"{":
                arrays, metadata = read_safetensors(stream)
                return _from_safetensors(arrays, metadata), tuple(arrays)
            raise CheckpointError(_unknown_format(head))
        except CheckpointError as bad:
            raise CheckpointError(f"{name}: {bad}") from None
        except OSError as bad:
            raise CheckpointError(f"{name} cannot be read: {bad.strerror or bad}; check the disk") from None


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
            f"it holds a value of type {type_name(tree)}, not a dict by str; save {{'model': model.state_dict(), ...}}"
        )
    if "sha256" in tree and not is_array(tree["sha256"]):
        tree = dict(tree)
        if tree.pop("sha256") != tree_digest(tree):
            raise CheckpointError("its values do not match its own SHA-256: it was changed or damaged; fetch it again")
    found = named_file(tree)
    if found.kind == "legacy":
        return _checkpoint(found)
    states = {key: tree.get(key) for key in STATES}
    for key, state in states.items():
        if not isinstance(state, dict | None):
            raise CheckpointError(f"{key} has type {type_name(state)}, not dict; save {key}.state_dict()")
    return _checkpoint(found, tree.get("step"), tree.get("best_val_loss"), **states)


def _from_safetensors(arrays: Mapping[str, Array], metadata: dict[str, str]) -> Checkpoint:
    claimed = {key: value for key, value in metadata.items() if key != "sha256"}
    if "sha256" in metadata and metadata["sha256"] != tree_digest({"model": arrays, **claimed}):
        raise CheckpointError("its values do not match its own SHA-256: it was changed or damaged; fetch it again")
    found = named_weights(arrays, "safetensors", metadata.get("parts", "").split())
    for part in metadata.get("parts", "").split():
        found.parts.setdefault(part, {})  # one without arrays
    try:
        step = int(metadata["step"]) if "step" in metadata else None
        loss = float(metadata["best_val_loss"]) if "best_val_loss" in metadata else None
    except ValueError:
        raise CheckpointError("its metadata step or best_val_loss is no number; save the file again") from None
    return _checkpoint(found, step, loss)


def _checkpoint(found: Named, step: Any = None, loss: Any = None, **states: Any) -> Checkpoint:
    states = dict.fromkeys(STATES) | states
    return Checkpoint(
        found.model,
        **states,
        step=_step(step),
        best_val_loss=_loss(loss),
        kind=found.kind,
        renamed=found.renamed,
        ignored=found.ignored,
        parts=found.parts,
    )


def check_thinker(checkpoint: Checkpoint) -> None:
    """Refuse a file without a thinker, such as one of the vision encoder alone.

    Raises:
        CheckpointError: it holds other parts only.
    """
    if not checkpoint.model:
        raise CheckpointError(
            f"it holds no weights of ThinkerLM, only of {', '.join(checkpoint.parts)} (kind {checkpoint.kind}); give "
            "the thinker's file"
        )


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


def _plan(model: nnx.Module, state: Mapping[str, Array] | Checkpoint) -> tuple[LoadReport, dict[str, Any]]:
    """The report, and the value of every key of the model that the state has."""
    wanted = _wanted(model)
    if not isinstance(state, Checkpoint):
        return plan_load(wanted, state, {}, {})
    held = state
    if any(key.startswith("thinker.") for key in wanted):  # an OmniLM
        held = whole_weights(state, {key.partition(".")[0] for key in wanted})
    return plan_load(wanted, held.model, held.renamed, held.ignored)


# What is the framework's own -----------------------------------------------------------------------------------------


def _variables(model: nnx.Module) -> dict[tuple[Any, ...], Any]:
    """The model's parameters by their path."""
    return dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))


def torch_key(path: tuple[Any, ...]) -> str:
    """The torch key of a leaf: the same dotted path, with weight for kernel, scale and embedding."""
    *parents, leaf = (str(part) for part in path)
    if leaf not in _LEAF_NAMES:
        raise CheckpointError(
            f"no rule for the leaf {'.'.join(parents + [leaf])!r}; known are {', '.join(_LEAF_NAMES)}"
        )
    if parents[-1:] == ["in_proj"]:  # torch's fused attention owns the parameters of its projection itself
        return ".".join(parents) + f"_{_LEAF_NAMES[leaf]}"
    return ".".join(parents + [_LEAF_NAMES[leaf]])


def _from_torch(path: tuple[Any, ...], value: np.ndarray) -> np.ndarray:
    """From torch's layout to JAX's: a kernel is (*window, in, out), torch's weight (out, in, *window)."""
    return value.transpose(*range(2, value.ndim), 1, 0) if path[-1] == "kernel" else value


def _to_torch(path: tuple[Any, ...], value: np.ndarray) -> np.ndarray:
    return value.transpose(-1, -2, *range(value.ndim - 2)) if path[-1] == "kernel" else value


def _wanted(model: nnx.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every weight of the model, by torch key and in torch's layout."""
    wanted = {}
    for path, variable in _variables(model).items():
        value = variable.get_value()  # an array, or only its shape and dtype (nnx.eval_shape)
        shape = tuple(value.shape)
        if path[-1] == "kernel":  # (*window, in, out), in torch (out, in, *window)
            shape = (*shape[:-3:-1], *shape[:-2])
        wanted[torch_key(path)] = (shape, value.dtype.name)
    return wanted
