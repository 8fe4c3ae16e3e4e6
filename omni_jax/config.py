"""The shape of a ThinkerLM as a frozen dataclass, read from the family's JSON config files (omni_jax's copy).

The same file stands in both twins, so that neither needs the other; a test holds the copies equal.
"""

from __future__ import annotations

import difflib
import json
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .files import open_regular_file

__all__ = ["PAD_ID", "BOS_ID", "EOS_ID", "ThinkerConfig", "ConfigReport", "read_config"]

PAD_ID = 0
"""Padding: ignored as a target, skipped by decoding."""
BOS_ID = 1
"""Begins every document."""
EOS_ID = 2
"""Ends every document."""

# Keys of the family's files that say nothing about the shape of the model. They are listed, never guessed at.
TRAINING_KEYS = [
    *("lr", "wd", "warmup_steps", "max_steps", "batch_size", "gradient_accumulation_steps", "use_amp", "use_flash"),
    *("use_compile", "num_workers", "drop_last", "print_freq", "max_epochs", "val_split", "val_freq"),
    *("checkpoint_freq", "max_grad_norm", "seed", "shuffle_buffer_size", "train_text", "save_dir"),
]
_FINE_TUNING_KEYS = ["thinker_ckpt", "audio_ckpt", "vision_ckpt", "talker_ckpt", "prompt", "sft_mix"]
_EXPORT_KEYS = ["model_type", "architectures", "audio", "vision", "talker", "ocr", "torch_dtype"]
_EXPORT_KEYS += ["transformers_version"]
_IGNORED_KEYS = frozenset(TRAINING_KEYS + _FINE_TUNING_KEYS + _EXPORT_KEYS)

_NEST = "thinker"
LARGEST_INT = 2**31 - 1  # a size beyond this is a slip of the pen, and would fail later with a worse message
_LARGEST_FILE = 1 << 20  # the family's config files have some 2 kB


@dataclass(frozen=True)
class ThinkerConfig:
    """What ThinkerLM's constructor takes, checked.

    Sizes are counts; `ctx_len` is in tokens, `dropout` a probability, `rope_theta` RoPE's base.
    `kv_groups=None` with `use_gqa=True` means n_heads // 2 (see `kv_heads`).

    Raises:
        ValueError: a field of the wrong type or out of range, or two fields that contradict each other. The message
            names the field, its value, what is allowed, and the fix.
    """

    vocab_size: int
    n_layers: int
    d_model: int
    n_heads: int
    d_ff: int
    dropout: float = 0.1
    rope_theta: float = 10000.0
    ctx_len: int = 512
    use_gqa: bool = False
    kv_groups: int | None = None
    use_swiglu: bool = True
    use_moe: bool = False
    num_experts: int = 8
    num_experts_per_tok: int = 2

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, typed_value(field.name, str(field.type), getattr(self, field.name)))
        _check_ranges(self)
        _check_heads(self)
        if self.num_experts_per_tok > self.num_experts:
            raise invalid_value(
                "num_experts_per_tok",
                self.num_experts_per_tok,
                f"at most num_experts={self.num_experts}",
                "lower num_experts_per_tok or raise num_experts",
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head, d_model / n_heads."""
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads: n_heads without GQA, else kv_groups, by default n_heads // 2."""
        if not self.use_gqa:
            return self.n_heads
        return self.n_heads // 2 if self.kv_groups is None else self.kv_groups

    @classmethod
    def from_json(cls, path: str | Path) -> ThinkerConfig:
        """Read one of the family's config files; `read_config` also tells what was ignored.

        Raises:
            ValueError: as `read_config`.
        """
        return read_config(path).config

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> ThinkerConfig:
        """Build from a mapping of the same forms that `read_config` accepts in a file.

        Raises:
            ValueError: a key that is not known, a required one that is missing, or a value that is not allowed.
        """
        return _report(mapping, "the mapping").config

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, in order: what `from_dict` takes."""
        return asdict(self)

    def to_json(self, path: str | Path) -> None:
        """Write a flat JSON config file in UTF-8 that `from_json` reads back to an equal config."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class ConfigReport:
    """A config and what its file held besides.

    `ignored` lists the known keys that do not describe the model, in the file's order (nested ones as
    "thinker.<key>"); `notes` are sentences about what the reader should know.
    """

    config: ThinkerConfig
    ignored: tuple[str, ...]
    notes: tuple[str, ...]


def read_config(path: str | Path) -> ConfigReport:
    """Read a config file of the family: flat, or with the model's keys under "thinker".

    A fine-tuning file keeps ctx_len outside "thinker"; an export file repeats the model's keys at the top. The nested
    value wins. Training and export keys are ignored and listed; any other key is refused.

    Raises:
        ValueError: the file cannot be read, is not UTF-8, not JSON, not an object, repeats a key, holds NaN or
            Infinity, has an unknown key (the nearest known name is given), lacks a required one, or a value is not
            allowed.
    """
    return _report(read_json(path), f"config file {path}")


def read_json(path: str | Path) -> Any:
    """What a config file holds."""
    with open_regular_file(path, "config file") as file:
        raw = file.read(_LARGEST_FILE + 1)
    if len(raw) > _LARGEST_FILE:
        raise ValueError(f"config file {path}: larger than {_LARGEST_FILE} bytes, so not a config; check the path")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"config file {path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"config file {path}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}; "
            "give a config file such as ThinkerConfig.to_json writes"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config file {path}: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"the key {key!r} stands there twice; keep one of them")
        seen[key] = value
    return seen


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a value that a config may hold; write a finite number")


def _report(mapping: Any, origin: str) -> ConfigReport:
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{origin}: must be an object of keys and values, got {type(mapping).__name__}")
    nested = mapping.get(_NEST)
    if _NEST in mapping and not isinstance(nested, Mapping):
        raise ValueError(
            f"{origin}: {_NEST!r} must be an object with the model's keys, got {type(nested).__name__}; "
            "put the model's keys there, or at the top and leave it out"
        )
    values: dict[str, Any] = {}
    ignored: list[str] = []
    notes: list[str] = []
    known = [field.name for field in fields(ThinkerConfig)]
    # The nested level first, so that its values stand when the top level repeats a key.
    for level, prefix in ((nested or {}, f"{_NEST}."), (mapping, "")):
        for key, value in level.items():
            if key == _NEST and level is mapping:
                continue
            if key in known:
                if key in values and values[key] != value:
                    notes.append(
                        f"{key}={shortened(value)} at the top is overruled by {_NEST}.{key}={shortened(values[key])}"
                    )
                values.setdefault(key, value)
            elif key in _IGNORED_KEYS:
                ignored.append(f"{prefix}{key}")
                if key == "use_flash" and value is False:
                    notes.append(
                        "use_flash is false: the family then clamps attention scores to ±50, which this model never "
                        "does; results differ where a score is beyond ±50"
                    )
            else:
                name = str(key)[:60]
                near = difflib.get_close_matches(name, [*known, _NEST, *sorted(_IGNORED_KEYS)], n=1, cutoff=0.0)
                raise ValueError(
                    f"{origin}: unknown key {prefix + name!r}; the nearest known key is {near[0]!r}: "
                    "rename it or remove it"
                )
    missing = [field.name for field in fields(ThinkerConfig) if field.default is MISSING and field.name not in values]
    if missing:
        raise ValueError(f"{origin}: lacks {', '.join(missing)}; add every one of them")
    try:
        config = ThinkerConfig(**values)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error
    return ConfigReport(config, tuple(ignored), tuple(notes))


def invalid_value(field: str, value: object, allowed: str, fix: str) -> ValueError:
    return ValueError(f"{field}={shortened(value)} is not allowed: must be {allowed}; {fix}")


def shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def typed_value(field: str, annotation: str, value: Any) -> Any:
    """The value as the plain Python type that the field declares; bool never passes for a number."""
    if annotation == "bool":
        if not isinstance(value, bool):
            raise invalid_value(field, value, "true or false", f"write {field} as a bool, without quotes")
        return value
    if annotation == "float":
        return _number(field, value, float, "a finite number")
    if value is None and annotation == "int | None":
        return None
    return _number(field, value, operator.index, "an integer")


def _number(field: str, value: Any, convert: Callable[[Any], Any], allowed: str) -> Any:
    fix = f"write {field} as a plain number, without quotes"
    if isinstance(value, (bool, str, bytes)):
        raise invalid_value(field, value, allowed, fix)
    try:
        number = convert(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise invalid_value(field, value, allowed, fix) from error
    if isinstance(number, float) and not math.isfinite(number):
        raise invalid_value(field, value, allowed, f"give {field} a finite value")
    return number


def _check_ranges(config: ThinkerConfig) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        least = 3 if field.name == "vocab_size" else 1
        if str(field.type).startswith("int") and value is not None and not least <= value <= LARGEST_INT:
            why = " (ids 0, 1, 2 are PAD, BOS, EOS)" if field.name == "vocab_size" else ""
            raise invalid_value(
                field.name, value, f"{least} to {LARGEST_INT}{why}", f"set {field.name} within these bounds"
            )
    if not 0.0 <= config.dropout < 1.0:
        raise invalid_value("dropout", config.dropout, "in [0, 1)", "use 0.0 for no dropout")
    if not config.rope_theta > 0.0:
        raise invalid_value("rope_theta", config.rope_theta, "above 0", "10000.0 is the family's value")


def _check_heads(config: ThinkerConfig) -> None:
    d_model, n_heads = config.d_model, config.n_heads
    if d_model % n_heads:
        raise invalid_value(
            "d_model", d_model, f"divisible by n_heads={n_heads}", "change d_model or n_heads so that it divides"
        )
    if config.head_dim % 2:
        raise invalid_value(
            "d_model",
            d_model,
            f"an even multiple of n_heads={n_heads}, since RoPE turns pairs of channels (head size {config.head_dim})",
            f"use d_model={d_model + n_heads} or another n_heads",
        )
    if not config.use_gqa and config.kv_groups is not None:
        raise invalid_value(
            "kv_groups", config.kv_groups, "None while use_gqa=False", "set use_gqa=True or leave kv_groups out"
        )
    if n_heads % max(config.kv_heads, 1) or config.kv_heads == 0:
        default = f" (left out, it is n_heads // 2 = {config.kv_heads})" if config.kv_groups is None else ""
        raise invalid_value(
            "kv_groups",
            config.kv_groups,
            f"a divisor of n_heads={n_heads}{default}",
            "give a kv_groups that divides n_heads",
        )
