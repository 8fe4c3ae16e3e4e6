"""Does a state fit a model? Key by key, before anything is changed (omni_jax's copy).

The same file stands in both twins: a model is here a table of shapes and dtypes by key, a state a dict of arrays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .state_tree import concatenate, count_not_finite, dtype_name, is_array

__all__ = ["LoadReport", "plan_load", "misfit"]

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


def plan_load(
    wanted: Mapping[str, tuple[tuple[int, ...], str]],
    arrays: Mapping[str, Any],
    renamed: Mapping[str, str],
    ignored: Mapping[str, str],
) -> tuple[LoadReport, dict[str, Any]]:
    """The report, and the value of every key of the model that the state has.

    Args:
        wanted: shape and dtype of every weight of the model, by key.
        arrays: the state, by normalised key.
        renamed, ignored: what reading the file did to its names.
    """
    renamed = {name: key for name, key in renamed.items() if key in arrays}  # not those of other parts
    origin = {key: name for name, key in renamed.items()}
    values: dict[str, Any] = {}
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
        ignored=dict(ignored),
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


def _joined(key: str, sources: tuple[str, ...], arrays: Mapping[str, Any]) -> Any:
    parts = [arrays[source] for source in sources]
    if len(parts) == 3:
        if len({tuple(part.shape[1:]) for part in parts}) > 1 or any(part.ndim == 0 for part in parts):
            raise ValueError(f"shapes {', '.join(str(tuple(part.shape)) for part in parts)} do not concatenate")
        return concatenate(parts)
    split = _SPLIT.fullmatch(key)
    if sources == (key,) or split is None:
        return parts[0]
    if parts[0].ndim == 0 or len(parts[0]) % 3:
        raise ValueError(f"shape {tuple(parts[0].shape)} does not split into q, k and v")
    rows, place = len(parts[0]) // 3, "qkv".index(split[2])
    return parts[0][place * rows : (place + 1) * rows]


def _faults(key: str, value: Any, dtype: str) -> Iterator[str]:
    if not is_array(value):
        yield f"{key} has type {type(value).__name__}, not array"
        return
    if dtype_name(value) != dtype:
        yield f"{key} has dtype {dtype_name(value)}, and the model's is {dtype}"
    bad = count_not_finite(value)
    if bad:
        yield f"{key} holds NaN or Inf in {bad} of {math.prod(value.shape)} values"


def misfit(report: LoadReport) -> str:
    """What is wrong with it, and what to do, in one message."""
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
