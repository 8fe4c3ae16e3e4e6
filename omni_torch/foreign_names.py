"""The dicts of the family's files, brought to one form: the thinker's weights, the other parts, and what was renamed.

The same file stands in both twins (omni_torch's copy): it looks at names only, arrays pass through it untouched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .pt_archive import CheckpointError
from .state_tree import is_array

__all__ = [
    "STATES",
    "MAIN_PARTS",
    "Named",
    "named_dict",
    "named_file",
    "named_weights",
    "export_name",
    "whole_weights",
    "type_name",
]

# What a file holds of the training, besides weights.
STATES = ("optimizer", "scheduler", "scaler")
_NUMBERS = ("step", "best_val_loss")
# The prefixes of an export; a multimodal dict has the same parts as dicts of their own.
_PREFIXES = ("audio_encoder", "vision_encoder", "talker", "rvq", "proj_a", "proj_v", "ocr")
# A dict with one of these is a file of the family; the first one there decides what the others are.
MAIN_PARTS = ("model", "thinker", "vit", "enc", *_PREFIXES)
_KINDS = {"model": "full", "vit": "vision", "enc": "audio"}
# The encoders in files of their own → in an export.
_EXPORT_NAMES = {"enc": "audio_encoder", "vit": "vision_encoder"}
_NOT_IN_FORMAT = "not in the format"
_EMPTY = "the state dict is empty; save model.state_dict()"


@dataclass
class Named:
    """Weights by normalised key: `model` the thinker's, `parts` the others'; and what became of the file's names.

    `kind` is that of a pt file: "full", "legacy", "multimodal", "vision" or "audio".
    """

    kind: str
    model: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)


def named_file(tree: Mapping[str, Any]) -> Named:
    """A whole pt file: a dict of parts and training state, or a bare state dict.

    Raises:
        CheckpointError: it is neither; a state dict holds what is no array, is empty, or has two keys of one meaning.
    """
    strange = [key for key in tree if not key.isprintable()]
    if strange:
        raise CheckpointError(f"it has the name {strange[0][:80]!r}, which cannot be printed; save it again")
    main = next((part for part in MAIN_PARTS if isinstance(tree.get(part), dict)), None)
    if main is None and (not tree or not all(is_array(value) for value in tree.values())):
        raise CheckpointError(_not_a_model(tree))
    if main is None:
        return named_weights(tree, "legacy")
    if isinstance(tree.get("model"), dict) and isinstance(tree.get("thinker"), dict):
        raise CheckpointError("it holds both 'model' and 'thinker', which mean the same; save one of them")
    found = Named(_KINDS.get(main, "multimodal"))
    if found.kind in ("vision", "audio") and "vit" in tree and "enc" in tree:
        found.kind = "multimodal"
    if main in ("model", "thinker"):
        found = named_weights(tree[main], found.kind)
    for part in sorted(tree.keys() - {*STATES, *_NUMBERS}):
        value = tree[part]
        if part == main and part in ("model", "thinker"):
            continue
        if not isinstance(value, dict) or not (part == main or all(map(_is_weight, value, value.values()))):
            found.ignored[part] = _NOT_IN_FORMAT
            continue
        if part in found.parts:
            raise CheckpointError(f"{part!r} stands there twice, by itself and inside {main!r}; save one of each")
        if not value and part == main:
            raise CheckpointError(f"{part!r}: {_EMPTY}")
        found.ignored[part] = "a part of the multimodal model"
        found.parts[part] = named_dict(value, part, found.renamed)
    found.ignored = dict(sorted(found.ignored.items()))
    return found


def named_weights(weights: Mapping[Any, Any], kind: str, prefixes: Iterable[str] = ()) -> Named:
    """A state dict that may hold several parts by prefix: `thinker.` is taken off, and the export's other parts apart.

    Args:
        prefixes: names of further parts.

    Raises:
        CheckpointError: as `named_file`.
    """
    found = Named(kind)
    prefixes = {*_PREFIXES, *prefixes}
    stripped = _stripped(weights)
    whole = any(name.startswith("thinker.") for name in stripped.values())
    origin: dict[str, dict[str, str]] = {"": {}}
    for key, value in weights.items():
        name = stripped[key]
        prefix, dot, rest = name.partition(".")
        part = prefix if dot and rest and prefix in prefixes else ""
        if part:
            found.ignored[key] = f"{part}.* belongs to another part of the model"
        name = rest if part or (whole and prefix == "thinker" and rest) else name
        _put(name, value, key, found.parts.setdefault(part, {}) if part else found.model, origin.setdefault(part, {}))
    for part, names in origin.items():
        shown = f"{part}." if part else ""
        found.renamed |= {key: shown + name for name, key in names.items() if shown + name != key}
    return found


def named_dict(weights: Mapping[Any, Any], part: str, renamed: dict[str, str]) -> dict[str, Any]:
    """The state dict of one part by normalised key; what changes is added to `renamed`, as `part`.key.

    Raises:
        CheckpointError: it holds what is no array, or two keys of one meaning.
    """
    if not weights:
        return {}
    stripped = _stripped(weights)
    made: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for key, value in weights.items():
        _put(stripped[key], value, key, made, origin)
    renamed |= {f"{part}.{key}": f"{part}.{name}" for name, key in origin.items() if name != key}
    return made


def export_name(part: str) -> str:
    """The name that an export has for a part of a file: enc is audio_encoder there, vit vision_encoder."""
    return _EXPORT_NAMES.get(part, part)


def whole_weights(held: Any, wanted: Iterable[str]) -> Named:
    """The weights of a model of several parts, by its own keys, such as thinker.norm.weight, of a Checkpoint.

    Args:
        wanted: names of the model's parts; others are left out, and listed as ignored.
    """
    wanted = set(wanted)
    kept = {part: export_name(part) for part in held.parts if export_name(part) in wanted}
    found = Named(held.kind)
    found.model = {f"thinker.{key}": value for key, value in held.model.items()}
    for part, name in kept.items():
        found.model |= {f"{name}.{key}": value for key, value in held.parts[part].items()}
    for key, name in held.renamed.items():
        part, _, rest = name.partition(".")
        whole = f"{kept[part]}.{rest}" if part in kept else f"thinker.{name}"
        if whole != key:
            found.renamed[key] = whole
    found.ignored = {key: rule for key, rule in held.ignored.items() if rule == _NOT_IN_FORMAT}
    found.ignored |= {part: "a part that the model does not have" for part in held.parts if part not in kept}
    return found


def _put(name: str, value: Any, key: str, into: dict[str, Any], origin: dict[str, str]) -> None:
    if name in into:
        raise CheckpointError(f"keys collide: {origin[name]!r} and {key!r} both mean {name!r}; save one of each")
    into[name], origin[name] = value, key


def _stripped(weights: Mapping[Any, Any]) -> dict[str, str]:
    """Each key without the `_orig_mod` that torch.compile puts in front of, or between, its parts.

    And without the `module.` that DistributedDataParallel puts in front of all of them.
    """
    wrong = [f"{str(key)[:80]!r}: {type_name(value)}" for key, value in weights.items() if not _is_weight(key, value)]
    if wrong:
        raise CheckpointError(f"the state dict holds what is no tensor by name: {', '.join(wrong[:5])}; save it again")
    if not weights:
        raise CheckpointError(_EMPTY)
    names = {key: ".".join(part for part in key.split(".") if part != "_orig_mod") for key in weights}
    if all(name.startswith("module.") for name in names.values()):
        names = {key: name.removeprefix("module.") for key, name in names.items()}
    return names


def _is_weight(key: object, value: object) -> bool:
    return type(key) is str and key != "" and key.isprintable() and is_array(value)  # a terminal may obey the others


def _not_a_model(tree: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{key[:40]!r}: {type_name(value)}" for key, value in list(tree.items())[:5])
    return f"it is no model: a dict with {{{shown}}}; save {{'model': model.state_dict(), ...}} or the bare state dict"


def type_name(value: object) -> str:
    """The name of a value's type for a message, the same in both twins."""
    return "array" if is_array(value) else type(value).__name__
