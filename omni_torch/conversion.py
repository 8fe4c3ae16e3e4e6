"""convert_checkpoint: from any kind of file to any other, bit for bit, with a manifest that proves it.

The same file stands in both twins (omni_torch's copy).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .architecture import find_config, infer_config
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .checkpoint_folder import find_checkpoint
from .config import ThinkerConfig, read_config
from .files import write_atomic
from .foreign_names import STATES
from .inspection import file_digest
from .pt_archive import CheckpointError
from .pt_format import write_pt
from .state_tree import array_digest, concatenate, dtype_name, is_array, plain_tree, tree_digest

__all__ = ["Manifest", "convert_checkpoint"]

_KINDS = ("full", "legacy", "safetensors", "multimodal")
_FUSED = re.compile(r"(.*\.)?attn\.qkv\.(weight|bias)")
_PART = re.compile(r"(.*\.)?attn\.([qkv])\.(weight|bias)")


@dataclass(frozen=True)
class Manifest:
    """What became of every array of a file; written beside the new file as <target>.manifest.json.

    Attributes:
        source, target: file names. source_kind, target_kind: as Checkpoint.kind. source_sha256, target_sha256: of the
            files. source_arrays, target_arrays: name → its dtype, its shape and the SHA-256 of its bytes in C order,
            little-endian.
        renamed: name in the source's file → name here, where they differ.
        regrouped: array of the target → the source's arrays that it was made from, where q, k and v were joined or
            split.
        dropped: what the source held and the target does not → why.
        config: the target's config.json, or None where none was written or found right.
        told: where each field of that config comes from, as in Architecture.
    """

    source: str
    target: str
    source_kind: str
    target_kind: str
    source_sha256: str
    target_sha256: str
    source_arrays: dict[str, dict[str, Any]]
    target_arrays: dict[str, dict[str, Any]]
    renamed: dict[str, str]
    regrouped: dict[str, list[str]]
    dropped: dict[str, str]
    config: dict[str, Any] | None
    told: dict[str, str]

    def to_json(self) -> str:
        """One JSON object, indented: the manifest's file."""
        return json.dumps(asdict(self), indent=1) + "\n"


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    kind: str | None = None,
    *,
    split_qkv: bool | None = None,
    config: ThinkerConfig | str | os.PathLike[str] | None = None,
    n_heads: int | None = None,
) -> Manifest:
    """Write the checkpoint `source` to `target` as another kind, no bit of any array changed.

    The new file is written beside its place, read back, compared with the source array by array, and only then put
    there, with its manifest; a .safetensors file of a thinker also gets a config.json, unless an equal one is there.
    An error leaves everything as it was.

    Args:
        source: a file, or a folder, whose best checkpoint is taken.
        kind: "full" {model, optimizer, ...}, "legacy" (the bare state dict), "safetensors", or "multimodal" {thinker,
            part, ...}. None: safetensors by the target's suffix; else the source's own, and for a safetensors source
            multimodal where it has other parts, full where it says its step, legacy otherwise.
        split_qkv: True: q, k and v apart; False: joined as qkv; None: as the source has them.
        config, n_heads: for config.json, where neither a config beside the source nor the shapes tell (see
            infer_config).

    Raises:
        CheckpointError: as load_checkpoint and save_checkpoint; the target is the source; the target's kind cannot
            hold what the source holds, and `kind` was not given to leave it out; q, k and v that cannot be joined.
        ValueError: an unknown kind, or one that does not go with the target's suffix; as infer_config; a config.json of
            another model lies in the target's folder.
        OSError: the disk is full or fails.
    """
    file, place = find_checkpoint(source), Path(os.path.realpath(target))
    _check_place(file, place, Path(target))
    before = file_digest(file)
    held = load_checkpoint(file)
    made_kind = _kind(kind, place, held)
    kept, dropped = _kept(held, made_kind, kind is not None)
    model, regrouped = _regrouped(held.model, split_qkv)
    if regrouped and kept.optimizer is not None:
        raise CheckpointError(
            "split_qkv changes the parameters that the optimizer's state belongs to, so both cannot be had; leave "
            "split_qkv out, or drop the training state by kind='legacy'"
        )
    kept = replace(kept, model=model)
    described = _config(file, place, kept, config, n_heads) if made_kind == "safetensors" and held.model else None
    staging = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        staged = staging / place.name
        _write(staged, kept, made_kind)
        again = load_checkpoint(staged)
        _check_same(held, kept, again, regrouped)
        if file_digest(file) != before:
            raise CheckpointError(f"{str(file)!r} changed while it was read; convert it again")
        manifest = Manifest(
            source=file.name,
            target=place.name,
            source_kind=held.kind,
            target_kind=again.kind,
            source_sha256=before,
            target_sha256=file_digest(staged),
            source_arrays=dict(_arrays(held)),
            target_arrays=dict(_arrays(again)),
            renamed=held.renamed,
            regrouped=regrouped,
            dropped=dropped,
            config=described[0].to_dict() if described else None,
            told=described[1] if described else {},
        )
        files = [place.name]
        if described and not place.with_name("config.json").exists():
            described[0].to_json(staging / "config.json")
            files.insert(0, "config.json")
        proof = f"{place.name}.manifest.json"
        write_atomic(staging / proof, lambda stream: _put(stream, manifest.to_json()))
        for name in [*files, proof]:
            os.replace(staging / name, place.with_name(name))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


def _put(stream: Any, text: str) -> None:
    stream.write(text.encode("utf-8"))


def _check_place(file: Path, place: Path, target: Path) -> None:
    if place.is_dir() or not place.parent.is_dir():
        raise CheckpointError(
            f"cannot save to {str(target)!r}: it is a folder, or its folder does not exist; create it"
        )
    if place.suffix not in (".pt", ".pth", ".safetensors"):
        raise CheckpointError(f"target = {str(target)!r}: must end in .pt, .pth or .safetensors; rename it")
    if file.exists() and any(other.exists() and file.samefile(other) for other in (place, _manifest_of(place))):
        raise CheckpointError(f"target = {str(target)!r} is the source itself, which is never overwritten; rename it")


def _manifest_of(place: Path) -> Path:
    return place.with_name(f"{place.name}.manifest.json")


def _kind(kind: str | None, place: Path, held: Checkpoint) -> str:
    exchange = place.suffix == ".safetensors"
    if kind is None:
        if exchange:
            return "safetensors"
        if held.kind in ("full", "legacy"):
            return "multimodal" if held.parts else held.kind
        if held.kind != "safetensors" or held.parts:
            return "multimodal"
        return "legacy" if held.step is None and held.best_val_loss is None else "full"
    if kind not in _KINDS:
        raise ValueError(f"kind = {kind!r}: must be one of {', '.join(_KINDS)}, or None for the target's own")
    if (kind == "safetensors") != exchange:
        wanted = ".safetensors" if kind == "safetensors" else ".pt"
        raise ValueError(f"kind = {kind!r} does not go with {place.name!r}: give a target that ends in {wanted}")
    return kind


def _kept(held: Checkpoint, kind: str, named: bool) -> tuple[Checkpoint, dict[str, str]]:
    """What the target will hold, and what it will not, with the reason; an error unless the kind was named."""
    cannot: list[str] = []
    if kind in ("legacy", "safetensors"):
        cannot += [name for name in STATES if getattr(held, name) is not None]
    if kind == "legacy":
        cannot += [name for name in ("step", "best_val_loss") if getattr(held, name) is not None]
    if kind in ("full", "legacy"):
        cannot += [name for name in held.parts]
        if held.parts and held.optimizer is not None and "optimizer" not in cannot:
            cannot.append("optimizer")  # its state is of all the parts' parameters, by their number
        if not held.model:
            raise CheckpointError(
                f"kind = {kind!r} is ThinkerLM's, and the source is a {held.kind} checkpoint of "
                f"{', '.join(held.parts)} without it; give kind='multimodal' or a .safetensors target"
            )
    if cannot and not named:
        raise CheckpointError(
            f"a {kind} file cannot hold the source's {', '.join(cannot)}; say kind={kind!r} to leave that out, or give "
            "a .pt target"
        )
    dropped = {name: f"a {kind} file does not hold it" for name in cannot}
    dropped |= {name: rule for name, rule in held.ignored.items() if rule == "not in the format"}
    changes = {name: None for name in cannot if name not in held.parts}
    return replace(held, parts={} if kind in ("full", "legacy") else held.parts, **changes), dropped


def _regrouped(
    model: Mapping[str, Any], split: bool | None, only: Collection[str] | None = None
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The weights with q, k and v apart (True) or joined (False), each in its place; and what was made from what."""
    made: dict[str, Any] = {}
    regrouped: dict[str, list[str]] = {}
    for key, value in model.items():
        fused, part = _FUSED.fullmatch(key), _PART.fullmatch(key)
        if only is not None and key not in only:
            fused = part = None
        if split is True and fused:
            names = _names_of_parts(fused[1], fused[2])
            _check_free(names, model)
            if value.ndim == 0 or value.shape[0] % 3:
                raise CheckpointError(f"{key} has shape {tuple(value.shape)}, which does not split into q, k and v")
            rows = value.shape[0] // 3
            for i, name in enumerate(names):
                made[name], regrouped[name] = value[i * rows : (i + 1) * rows], [key]
        elif split is False and part:
            names = _names_of_parts(part[1], part[3])
            whole = f"{part[1] or ''}attn.qkv.{part[3]}"
            _check_free([whole], model)
            if not all(name in model and model[name].shape == value.shape for name in names) or value.ndim == 0:
                shown = ", ".join(f"{name} {tuple(model[name].shape) if name in model else None}" for name in names)
                raise CheckpointError(
                    f"q, k and v do not join: {shown}; only equal shapes do, so a file with fewer key/value heads than "
                    "heads keeps them apart: leave split_qkv out"
                )
            if part[2] == "q":
                made[whole], regrouped[whole] = concatenate([model[name] for name in names]), names
        else:
            made[key] = value
    return made, regrouped


def _names_of_parts(prefix: str | None, leaf: str) -> list[str]:
    return [f"{prefix or ''}attn.{letter}.{leaf}" for letter in "qkv"]


def _check_free(names: list[str], model: Mapping[str, Any]) -> None:
    for name in names:
        if name in model:
            raise CheckpointError(f"the source holds {name} both joined with others and apart; save one of them")


def _config(
    file: Path,
    place: Path,
    kept: Checkpoint,
    config: ThinkerConfig | str | os.PathLike[str] | None,
    n_heads: int | None,
) -> tuple[ThinkerConfig, dict[str, str]]:
    """The config of the target, and where it comes from."""
    found = infer_config(kept, n_heads=n_heads, config=find_config(file) if config is None else config)
    there = place.with_name("config.json")
    if there.exists() and read_config(there).config != found.config:
        raise ValueError(
            f"{str(there)!r} is the config of another model, and would be read as this one's; give a target in another "
            "folder"
        )
    return found.config, found.told


def _write(path: Path, kept: Checkpoint, kind: str) -> None:
    if kind == "legacy":
        tree = plain_tree(kept.model, "model")
        write_atomic(path, lambda stream: write_pt(stream, tree))
        return
    parts = kept.parts if kind == "multimodal" else kept.parts or None
    names = (*STATES, "step", "best_val_loss")
    save_checkpoint(path, model=kept.model, parts=parts, **{name: getattr(kept, name) for name in names})


def _held(checkpoint: Checkpoint) -> dict[str, Any]:
    names = ("model", *STATES, "step", "best_val_loss", "parts")
    return {name: getattr(checkpoint, name) for name in names}


def _check_same(held: Checkpoint, kept: Checkpoint, again: Checkpoint, regrouped: Mapping[str, list[str]]) -> None:
    """Refuse a file that, read back, does not hold what it should, or does not lead back to the source's weights."""
    back = again.model
    if regrouped:
        back = _regrouped(back, len(next(iter(regrouped.values()))) == 3, regrouped)[0]
    same = tree_digest(_held(again)) == tree_digest(_held(kept)) and tree_digest(back) == tree_digest(held.model)
    # The optimizer's state goes by the order of the parameters; a .safetensors file has none, and its own order.
    if not same or (again.kind != "safetensors" and list(again.model) != list(kept.model)):
        raise CheckpointError("the new file does not read back as it was written, and was removed; check the disk")


def _arrays(checkpoint: Checkpoint) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in _held(checkpoint).items():
        if name == "parts":
            for part, weights in value.items():
                yield from _walk(part, weights)
        else:
            yield from _walk(name, value)


def _walk(name: str, value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if is_array(value):
        yield name, {"dtype": dtype_name(value), "shape": list(value.shape), "sha256": array_digest(value)}
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _walk(f"{name}.{i}", item)
