"""convert_checkpoint: from any kind of file to any other, bit for bit, with a manifest that proves it.

The same file stands in both twins (omni_jax's copy).
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

from .architecture import Architecture, find_config, infer_config, read_given
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .checkpoint_folder import checked_path, find_checkpoint
from .config import ThinkerConfig
from .files import write_atomic
from .foreign_names import STATES
from .inspection import file_digest
from .pt_archive import CheckpointError
from .pt_format import write_pt
from .state_tree import array_digest, concatenate, dtype_name, is_array, plain_tree, tree_digest

__all__ = ["Manifest", "convert_checkpoint"]

_KINDS = ("full", "legacy", "safetensors", "multimodal")
_FUSED = re.compile(r"(.*\.)?attn\.qkv\.(weight|bias)")
_FIXES = {
    errno.ENOSPC: "free space on that disk, or give a target on another one",
    errno.EDQUOT: "free space in your quota, or give a target on another disk",
    errno.ENAMETOOLONG: "give a shorter name: the manifest's adds .manifest.json to it",
}
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
        config: the model's, where the target has it beside (a .safetensors file) or it was given; else None.
        told: where each field of that config comes from, as in Architecture.
        notes: sentences for who reads the target: which fields of the config are assumed, that it needs one.
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
    notes: list[str]

    def to_json(self) -> str:
        """One JSON object, indented: the manifest's file."""
        return json.dumps(asdict(self), indent=1) + "\n"


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    kind: str | None = None,
    *,
    split_qkv: bool | None = None,
    config: ThinkerConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    n_heads: int | None = None,
) -> Manifest:
    """Write the checkpoint `source` to `target` as another kind, no bit of any array changed.

    The new file is written beside its place, read back, compared with the source array by array, and only then put
    there, with its manifest; a .safetensors file of a thinker also gets a config.json, unless its config is there. It
    holds what is told: what is assumed is left out, and assumed again by who reads it. An error leaves everything as
    it was.

    Args:
        source: a file, or a folder, whose best checkpoint is taken.
        kind: "full" {model, optimizer, ...}, "legacy" (the bare state dict), "safetensors", or "multimodal" {thinker,
            part, ...}. None: safetensors by the target's suffix, which leaves the training state out as `kind` would;
            else the source's own, and for a safetensors source multimodal where it has other parts, full where it says
            its step, legacy otherwise.
        split_qkv: True: q, k and v apart; False: joined as qkv; None: as the source has them.
        config, n_heads: the model's, where neither a config beside the source nor the shapes tell (see infer_config);
            checked, whatever the target.

    Raises:
        CheckpointError: as load_checkpoint and save_checkpoint; the target is the source, or no regular file; its kind
            cannot hold what the source holds, and was not asked for; q, k and v that cannot be joined.
        ValueError: an unknown kind, or one that does not go with the target's suffix; as infer_config; the config of
            another model lies where the target's is looked for.
        OSError: the disk is full or fails.
    """
    try:
        return _convert(source, target, kind, split_qkv, config, n_heads)
    except OSError as bad:
        fix = _FIXES.get(bad.errno or 0, "check the disk and the folder's permissions")
        raise OSError(bad.errno, f"cannot write {str(target)!r}: {bad.strerror or bad}; {fix}") from None


def _convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    kind: str | None,
    split_qkv: bool | None,
    config: ThinkerConfig | Mapping[str, Any] | str | os.PathLike[str] | None,
    n_heads: int | None,
) -> Manifest:
    target = checked_path(target, "target")
    file, place = find_checkpoint(source), Path(os.path.realpath(target))  # a link stays a link
    _check_place(file, place, target)
    before = file_digest(file)
    held = load_checkpoint(file)
    made_kind = _kind(kind, place, held)
    kept, dropped = _kept(held, made_kind, kind is not None or place.suffix == ".safetensors")
    model, regrouped = _regrouped(held.model, split_qkv)
    if regrouped and kept.optimizer is not None:
        raise CheckpointError(
            "q, k and v apart or joined (split_qkv, --split-qkv, --fuse-qkv) are other parameters than the optimizer's "
            "state belongs to, so both cannot be had; leave that out, or drop the training state: kind='legacy' "
            "(--kind legacy)"
        )
    kept = replace(kept, model=model)
    given = config is not None or n_heads is not None
    found, alone, notes = _described(file, place, target, kept, config, n_heads, given or made_kind == "safetensors")
    staging = Path(tempfile.mkdtemp(prefix=".convert.", dir=place.parent))
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
            config=found.config.to_dict() if found else None,
            told=found.told if found else {},
            notes=notes,
        )
        files = [place.name, _manifest_of(place).name]
        if found and alone and made_kind == "safetensors":
            # Without what is assumed: so whoever reads it assumes the same, and can tell.
            assumed = {field.name: field.default for field in fields(ThinkerConfig) if field.name in found.assumed}
            values = {k: v for k, v in found.config.to_dict().items() if k not in assumed or v != assumed[k]}
            _put(staging / "config.json", json.dumps(values, indent=2) + "\n")
            files.insert(0, "config.json")
        _put(staging / files[-1], manifest.to_json())
        _move(staging, files, place.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


def _put(path: Path, text: str) -> None:
    def write(stream: BinaryIO) -> None:
        stream.write(text.encode("utf-8"))

    write_atomic(path, write)


def _move(staging: Path, names: list[str], folder: Path) -> None:
    """Put the files in their places, all of them or none; one that replaces another takes its permission bits."""
    done: list[tuple[Path, Path | None]] = []
    try:
        for name in names:
            there, old = folder / name, None
            if there.exists():
                os.chmod(staging / name, stat.S_IMODE(there.stat().st_mode))
                old = staging / f"{name}.old"
                try:
                    os.link(there, old)
                except OSError:  # a file system without hard links
                    shutil.copy2(there, old)
            done.append((there, old))
            os.replace(staging / name, there)
    except BaseException:
        for there, old in reversed(done):
            if old is not None:
                os.replace(old, there)
            elif not (staging / there.name).exists():
                there.unlink(missing_ok=True)
        raise


def _check_place(file: Path, place: Path, target: Path) -> None:
    if place.is_dir() or not place.parent.is_dir():
        raise CheckpointError(
            f"cannot save to {str(target)!r}: it is a folder, or its folder does not exist; create it"
        )
    config = place.with_name("config.json")
    leads = f", which leads to {str(place)!r}" if target.is_symlink() else ""
    if place.suffix not in (".pt", ".pth", ".safetensors"):
        raise CheckpointError(f"target = {str(target)!r}{leads}: must end in .pt, .pth or .safetensors; rename it")
    for other in (place, _manifest_of(place), *([config] if place.suffix == ".safetensors" else [])):
        if other.exists() and not other.is_file():
            raise CheckpointError(f"cannot save to {str(target)!r}: {str(other)!r} is no regular file; remove it")
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
        raise ValueError(
            f"kind (--kind) = {kind!r}: must be one of {', '.join(_KINDS)}, or None (no --kind) for the target's own"
        )
    if (kind == "safetensors") != exchange:
        wanted = ".safetensors" if kind == "safetensors" else ".pt"
        raise ValueError(
            f"kind (--kind) = {kind!r} does not go with {place.name!r}: give a target that ends in {wanted}"
        )
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
                f"kind (--kind) = {kind!r} is ThinkerLM's, and the source, of kind {held.kind}, holds only "
                f"{', '.join(held.parts)}; give kind='multimodal' (--kind multimodal) or a .safetensors target"
            )
    if cannot and not named:
        raise CheckpointError(
            f"a {kind} file cannot hold the source's {', '.join(cannot)}; say kind={kind!r} (--kind {kind}) to leave "
            "that out, or give another kind"
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
                    "heads keeps them apart: leave split_qkv (--fuse-qkv) out"
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


def _described(
    file: Path,
    place: Path,
    target: Path,
    kept: Checkpoint,
    config: ThinkerConfig | Mapping[str, Any] | str | os.PathLike[str] | None,
    n_heads: int | None,
    needed: bool,
) -> tuple[Architecture | None, bool, list[str]]:
    """The source's architecture, where it is needed or a config lies beside the target; whether none does; notes.

    Raises:
        ValueError: it cannot be told, though it is needed; the config beside the target is another's.
    """
    beside = list(dict.fromkeys(there for path in (place, target) if (there := find_config(path)) is not None))
    if not kept.model:
        return None, not beside, []
    own = find_config(file) if config is None else config
    try:
        found = infer_config(kept, n_heads=n_heads, config=own)
    except ValueError as bad:
        if needed:
            raise
        if isinstance(bad, CheckpointError):  # no ThinkerLM: no config is read for it
            return None, not beside, []
        if beside and beside != [own]:
            raise ValueError(f"{str(beside[0])!r} would be read as the target's config, but {bad}") from None
        return None, not beside, [f"who reads the target needs a config: {bad}"]
    for there in beside:
        if read_given(there)[0] != found.config:
            raise ValueError(
                f"{str(there)!r} is the config of another model, and would be read as the target's; give a target in "
                f"another folder, or of another name, or, if it is the source's own, config= (--config {str(there)!r})"
            )
    notes = []
    if needed and found.assumed:
        notes.append(f"assumed: {', '.join(f'{name}={value}' for name, value in found.assumed.items())}")
    if not beside and place.suffix != ".safetensors" and (own is not None or found.told["n_heads"] == "hint"):
        notes.append("no config lies beside the target: who reads it gives config= (--config FILE), or puts it there")
    return found if needed else None, not beside, notes


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
