"""What is in a checkpoint file: architecture, sizes, dtypes and training state, in words and as plain values.

The same file stands in both twins (omni_jax's copy).
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .architecture import Architecture, find_config, infer_config, shape_facts
from .checkpoint import Checkpoint, _read
from .checkpoint_folder import find_checkpoint
from .config import ThinkerConfig
from .files import open_regular_file
from .foreign_names import STATES
from .pt_archive import CheckpointError
from .state_tree import dtype_name

__all__ = ["Inspection", "inspect_checkpoint", "file_digest"]

_MOST_KEYS = 12  # shown of a long list
_KINDS = {
    "full": "full: weights and training state, {model, optimizer, scheduler, scaler, step, best_val_loss}",
    "legacy": "legacy: a bare state dict, weights alone",
    "safetensors": "safetensors: weights alone, for exchange",
    "multimodal": "multimodal: a dict of parts, {thinker, proj_a, proj_v, ...}",
    "vision": "vision: a dict of parts, {vit, ...}",
    "audio": "audio: a dict of parts, {enc, head, ...}",
}


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint file holds; `str` of it is for people, `to_dict` for programs.

    Attributes:
        path: of the file.
        kind: as Checkpoint.kind.
        keys: the names at the file's top level; in a legacy or safetensors file, those of all arrays.
        architecture: the config and where each field comes from, or None where it cannot be told.
        problem: why it cannot be told, and what to do; None where it can.
        shapes: the fields of ThinkerConfig that the shapes alone tell.
        config_file: the file, given or beside it, that tells the rest, or None.
        parameters: number of numbers in all weights, other parts included; training state not.
        modules: the same by module: tok_emb, blocks.0, ..., norm, lm_head, and each other part.
        dtypes: number of numbers in weights of each dtype.
        states: which of optimizer, scheduler and scaler it holds.
        step: training steps done, or None where the file does not say.
        best_val_loss: lowest validation loss so far, nats per token, or None.
        parts: number of parameters of each part that is not the thinker.
        renamed, ignored: as in Checkpoint.
        bytes: size of the file.
        sha256: of the file.
    """

    path: str
    kind: str
    keys: tuple[str, ...]
    architecture: Architecture | None
    problem: str | None
    shapes: dict[str, Any]
    config_file: str | None
    parameters: int
    modules: dict[str, int]
    dtypes: dict[str, int]
    states: dict[str, bool]
    step: int | None
    best_val_loss: float | None
    parts: dict[str, int]
    renamed: dict[str, str]
    ignored: dict[str, str]
    bytes: int
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Everything as values of JSON; a loss that is no finite number as a string."""
        loss = self.best_val_loss
        finite = loss is None or math.isfinite(loss)
        return asdict(self) | {"keys": list(self.keys), "best_val_loss": loss if finite else str(loss)}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def inspect_checkpoint(
    path: str | os.PathLike[str],
    *,
    config: ThinkerConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    n_heads: int | None = None,
) -> Inspection:
    """Read a checkpoint file, or the best one of a folder, and say what is in it.

    Where the architecture cannot be told, the rest is said all the same, and `problem` says why. `config` and `n_heads`
    as in infer_config.

    Raises:
        CheckpointError: as load_checkpoint.
    """
    file = find_checkpoint(path)
    checkpoint, keys = _read(file)
    architecture, problem, shapes, config_file = _architecture(file, checkpoint, config, n_heads)
    arrays = dict(_weights(checkpoint))
    modules: dict[str, int] = {}
    dtypes: dict[str, int] = {}
    for name, value in arrays.items():
        count = math.prod(value.shape)
        part, _, rest = name.partition(".")
        module = f"{part}.{rest.partition('.')[0]}" if part == "blocks" else part
        modules[module] = modules.get(module, 0) + count
        dtypes[dtype_name(value)] = dtypes.get(dtype_name(value), 0) + count
    return Inspection(
        path=str(file),
        kind=checkpoint.kind,
        keys=keys,
        architecture=architecture,
        problem=problem,
        shapes=shapes,
        config_file=config_file,
        parameters=sum(modules.values()),
        modules=modules,
        dtypes=dict(sorted(dtypes.items())),
        states={name: getattr(checkpoint, name) is not None for name in STATES},
        step=checkpoint.step,
        best_val_loss=checkpoint.best_val_loss,
        parts={
            part: sum(math.prod(value.shape) for value in weights.values())
            for part, weights in checkpoint.parts.items()
        },
        renamed=checkpoint.renamed,
        ignored=checkpoint.ignored,
        bytes=file.stat().st_size,
        sha256=file_digest(file),
    )


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open_regular_file(path, "checkpoint", CheckpointError) as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _weights(checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
    yield from checkpoint.model.items()
    for part, weights in checkpoint.parts.items():
        for key, value in weights.items():
            yield f"{part}.{key}", value


def _architecture(
    file: Path,
    checkpoint: Checkpoint,
    config: ThinkerConfig | Mapping[str, Any] | str | os.PathLike[str] | None,
    n_heads: int | None,
) -> tuple[Architecture | None, str | None, dict[str, Any], str | None]:
    """The architecture or why not, what the shapes tell, and the config file."""
    shapes: dict[str, Any] = {}
    shown: str | None = None
    try:
        if checkpoint.model:
            shapes = shape_facts({key: tuple(value.shape) for key, value in checkpoint.model.items()})
            config = find_config(file) if config is None else config
            shown = os.fspath(config) if isinstance(config, str | os.PathLike) else None
        return infer_config(checkpoint, n_heads=n_heads, config=config), None, shapes, shown
    except ValueError as bad:
        return None, str(bad), shapes, shown


def _lines(found: Inspection) -> Iterator[str]:
    yield f"{found.path}: {found.bytes:,} bytes, SHA-256 {found.sha256}"
    yield f"kind: {_KINDS[found.kind]}"
    more = f", ... ({len(found.keys)} in all)" if len(found.keys) > _MOST_KEYS else ""
    yield f"keys at the top: {', '.join(map(_shown, found.keys[:_MOST_KEYS]))}{more}"
    for name, held in found.states.items():
        yield f"{name}: {'yes' if held else 'no'}"
    yield f"step: {'not said' if found.step is None else f'{found.step:,}'}"
    loss = found.best_val_loss
    yield f"best validation loss: {'not said' if loss is None else f'{loss:.6g} nats per token'}"
    yield f"parameters: {found.parameters:,} ({_listed({k: f'{v:,}' for k, v in found.dtypes.items()})})"
    for name, count in found.modules.items():
        yield f"  {_shown(name)}: {count:,}"
    if found.architecture is not None:
        beside = f" (config file: {found.config_file})" if found.config_file else ""
        yield f"architecture{beside}:"
        told = found.architecture.told
        for name, value in found.architecture.config.to_dict().items():
            yield f"  {name} = {value}  [{told[name]}]"
        yield (
            "  a model of another architecture refuses these weights: load_weights lists every key that is missing, "
            "unexpected or misshapen, and changes nothing"
        )
    else:
        yield f"architecture: cannot be told: {found.problem}"
        if found.shapes:
            yield f"  the shapes tell {_listed(found.shapes)}"
    if found.parts:
        yield f"other parts: {_listed({part: f'{count:,}' for part, count in found.parts.items()})}"
    for word, names in (("renamed", found.renamed), ("ignored", found.ignored)):
        if names:
            shown = [f"{_shown(name)} ({_shown(value)})" for name, value in list(names.items())[:_MOST_KEYS]]
            more = ", ..." if len(names) > _MOST_KEYS else ""
            yield f"{word}: {len(names)}: {', '.join(shown)}{more}"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{_shown(name)} {value}" for name, value in values.items()) or "none"


def _shown(name: str) -> str:
    return name if len(name) <= 120 else f"{name[:120]}..."
