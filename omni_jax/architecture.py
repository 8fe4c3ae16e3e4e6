"""What model a checkpoint was made from: its shapes tell most of it, a config file or a hint the rest.

The same file stands in both twins (omni_jax's copy): it reads shapes only. Letters: V vocabulary, D model, H heads,
K key/value heads, d = D/H head size, F feed-forward, E experts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, check_thinker, load_checkpoint
from .checkpoint_folder import find_checkpoint
from .config import ThinkerConfig, read_config
from .files import open_regular_file
from .foreign_names import export_name, whole_weights
from .omni_config import OmniConfig
from .pt_archive import CheckpointError
from .state_tree import count_not_finite, dtype_name

__all__ = ["Architecture", "infer_config", "find_config", "read_model", "read_omni", "read_given", "shape_facts"]

_BLOCK = re.compile(r"blocks\.(0|[1-9][0-9]{0,5})\.(.*)")
_EXPERT = re.compile(r"moe\.experts\.(0|[1-9][0-9]{0,5})\..*")
_FLOATS = ("float32", "bfloat16", "float16", "float64")
_LARGEST_SIDECAR = 1 << 20  # bytes
_GIVE = "give config= (--config FILE) "


@dataclass(frozen=True)
class Architecture:
    """A config, and where each of its fields comes from.

    Attributes:
        config: the model's.
        told: field → "shapes" (the weights leave no choice), "config file" (or a config given), "hint" (the caller's
            n_heads) or "assumed" (ThinkerConfig's default, since nothing tells: a config file may leave fields out).
    """

    config: ThinkerConfig
    told: dict[str, str]

    @property
    def assumed(self) -> dict[str, Any]:
        """The fields that nothing tells, and their values; those of experts only where the model has experts."""
        values = self.config.to_dict()
        unused = () if self.config.use_moe else ("num_experts", "num_experts_per_tok")
        return {name: values[name] for name, why in self.told.items() if why == "assumed" and name not in unused}


def infer_config(
    state: Mapping[str, Any] | Checkpoint,
    *,
    n_heads: int | None = None,
    config: ThinkerConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> Architecture:
    """The architecture that a state dict was made from.

    Shapes tell vocab_size, n_layers, d_model, d_ff, use_gqa, use_swiglu, use_moe and num_experts, and kv_groups once
    n_heads is known. They cannot tell n_heads (unless one value alone is possible): it comes from `config` or the hint.
    ctx_len, rope_theta, dropout and num_experts_per_tok come from `config`, or are ThinkerConfig's defaults. q, k and v
    apart, of equal shape, compute the same whether grouped or not: without a config, they are read as not grouped.

    Args:
        state: a Checkpoint, or its `model`: arrays of any shapes by torch key.
        config: a config, a dict of its fields, or the path of a file as `find_config` finds it.

    Raises:
        CheckpointError: the state is not a ThinkerLM's; every key that is missing, unexpected or misshapen is listed.
        ValueError: n_heads is needed and not given, or impossible (the possible values are listed); the config cannot
            be read, or contradicts the shapes or the hint.
    """
    weights = state.model if isinstance(state, Checkpoint) else state
    if isinstance(state, Checkpoint):
        check_thinker(state)
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    facts = shape_facts(shapes)
    given, named = (None, frozenset[str]()) if config is None else read_given(config)
    heads = _heads(shapes, facts, n_heads, given)
    facts |= {"n_heads": heads, "kv_groups": _kv_heads(shapes, facts, heads) if facts["use_gqa"] else None}
    if given is None:
        # num_experts_per_tok is 2 by default, and no more than there are experts.
        few = {"num_experts_per_tok": 1} if facts.get("num_experts") == 1 else {}
        found = ThinkerConfig.from_dict(facts | few)
    else:
        found = given
        _check_agrees(found, facts)
    _check_shapes(found, shapes)
    rest = {field.name: "config file" if field.name in named else "assumed" for field in fields(ThinkerConfig)}
    told = {name: "shapes" if name in facts else why for name, why in rest.items()}
    if len(_possible_heads(shapes, facts)) > 1:
        told["n_heads"] = "hint" if n_heads is not None else "config file"
    return Architecture(found, told)


def find_config(path: str | os.PathLike[str]) -> Path | None:
    """The config file that belongs to a checkpoint, or None: infer_config takes its path.

    Beside the file: `<its name>.json` if it describes a model (flat, under "thinker" or under "config"), else
    config.json, which a run folder and an export have. For a folder: the same for its best checkpoint.

    Raises:
        ValueError: the folder holds no checkpoint, or several that the names do not tell apart.
    """
    file = find_checkpoint(path)
    beside = file.with_suffix(".json")
    if beside.name != "config.json" and beside.is_file() and _describes_a_model(_read_object(beside)):
        return beside
    general = file.with_name("config.json")
    return general if general.is_file() else None


def read_model(
    path: str | os.PathLike[str],
    config: ThinkerConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    n_heads: int | None = None,
) -> tuple[Checkpoint, Architecture, str]:
    """A checkpoint, the architecture of its thinker, and the one floating-point dtype of its weights, by name.

    Raises:
        CheckpointError: as load_checkpoint; weights of several dtypes, or of integers, or with NaN or Inf.
        ValueError: as find_config and infer_config.
    """
    file = find_checkpoint(path)
    checkpoint = load_checkpoint(file)
    try:
        if config is None and checkpoint.model:
            config = find_config(file)
        found = infer_config(checkpoint, n_heads=n_heads, config=config)
        return checkpoint, found, _one_dtype(checkpoint.model)
    except ValueError as bad:
        kind = CheckpointError if isinstance(bad, CheckpointError) else ValueError
        raise kind(f"checkpoint {str(file)!r}: {bad}") from None


def read_omni(
    path: str | os.PathLike[str],
    config: OmniConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    audio: str | os.PathLike[str] | None = None,
    vision: str | os.PathLike[str] | None = None,
) -> tuple[dict[str, Any], OmniConfig, str]:
    """The weights of an OmniLM by its keys, its config, and the one floating-point dtype of its weights, by name.

    The config is the one given, or lies beside the checkpoint: shapes do not tell the encoders' heads. Parts that it
    has no section for are left out.

    Args:
        audio, vision: files (or folders) of the encoders, {enc, ...} and {vit, ...}, taken instead of those in `path`.

    Raises:
        CheckpointError: as load_checkpoint; a part that the config asks for is in none of the files; weights of several
            dtypes, or of integers, or with NaN or Inf.
        ValueError: no config, one that cannot be read or is not that of the checkpoint; a file for an encoder that it
            has no section for.
    """
    file = find_checkpoint(path)
    checkpoint = load_checkpoint(file)
    try:
        check_thinker(checkpoint)
        found = _omni_config(find_config(file) if config is None else config)
        infer_config(checkpoint, config=found.thinker)
        weights: dict[str, Any] = {}
        wanted = {"thinker"}
        for name, section, given in (("audio", found.audio, audio), ("vision", found.vision, vision)):
            encoder, projection = f"{name}_encoder", f"proj_{name[0]}"
            if section is None and given is not None:
                raise ValueError(f"{name} = {os.fspath(given)!r}, and the config has no section {name!r}: add it")
            if section is None:
                continue
            parts = {export_name(part): held for part, held in checkpoint.parts.items()}
            wanted |= {encoder, projection}
            if given is not None:
                parts |= {encoder: _encoder(given, encoder)}
                weights |= {f"{encoder}.{key}": value for key, value in parts[encoder].items()}
                wanted.remove(encoder)
            lacking = [part for part in (encoder, projection) if part not in parts]
            if lacking:
                raise CheckpointError(
                    f"it holds no {' and no '.join(lacking)}, and the config has a section {name!r}; give {name}= the "
                    f"encoder's checkpoint if it is a file of its own, or a config without {name!r}"
                )
        weights |= whole_weights(checkpoint, wanted).model
        return weights, found, _one_dtype(weights)
    except ValueError as bad:
        kind = CheckpointError if isinstance(bad, CheckpointError) else ValueError
        raise kind(f"checkpoint {str(file)!r}: {bad}") from None


def _encoder(path: str | os.PathLike[str], name: str) -> Mapping[str, Any]:
    """The weights of an encoder in a file of its own."""
    held = load_checkpoint(path)
    parts = {export_name(part): weights for part, weights in held.parts.items()}
    if name not in parts:
        shown = ", ".join(held.parts) or "no parts"
        raise CheckpointError(f"{os.fspath(path)!r} holds no {name} (it holds {shown}); give the encoder's checkpoint")
    return parts[name]


def _omni_config(config: Any) -> OmniConfig:
    if config is None:
        raise ValueError(
            "no config file lies beside it, and shapes do not tell the heads of its encoders; give config= (--config "
            'FILE) with {"thinker": {...}, "audio": {...}, "vision": {...}}'
        )
    if isinstance(config, OmniConfig):
        return config
    if isinstance(config, Mapping):
        return OmniConfig.from_dict(config)
    if not isinstance(config, str | os.PathLike):
        raise ValueError(f"config is a {type(config).__name__}: must be an OmniConfig, a dict, or the path of a file")
    mapping = _read_object(Path(config))
    if isinstance(mapping, dict) and isinstance(mapping.get("config"), dict) and "thinker" not in mapping:
        return OmniConfig.from_dict(mapping["config"])
    return OmniConfig.from_json(Path(config))


def _one_dtype(weights: Mapping[str, Any]) -> str:
    """The dtype that all of them have, once they are sound."""
    dtypes = sorted({dtype_name(value) for value in weights.values()})
    if len(dtypes) > 1 or dtypes[0] not in _FLOATS:
        raise CheckpointError(
            f"its weights have the dtypes {', '.join(dtypes)}: must be one of {', '.join(_FLOATS)}; convert them"
        )
    bad = {key: count for key, value in weights.items() if (count := count_not_finite(value))}
    if bad:
        shown = ", ".join(f"{count} in {key}" for key, count in list(bad.items())[:4])
        raise CheckpointError(
            f"its weights hold values that are NaN or Inf ({shown}{', ...' if len(bad) > 4 else ''}); take an "
            "earlier checkpoint, from before they went bad"
        )
    return dtypes[0]


def shape_facts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of ThinkerConfig that the shapes of a state dict tell, without n_heads and kv_groups.

    Raises:
        CheckpointError: the state is not a ThinkerLM's.
    """
    embedding = shapes.get("tok_emb.weight", ())
    if len(embedding) != 2 or 0 in embedding:
        shown = f"has shape {embedding}" if embedding else "is missing"
        raise CheckpointError(
            f"the state is not a ThinkerLM's: tok_emb.weight {shown}, and must be (vocab_size, d_model); its keys are "
            f"{', '.join(key[:80] for key in list(shapes)[:4])}, ...; give a checkpoint of ThinkerLM"
        )
    found = [match for key in shapes if (match := _BLOCK.fullmatch(key))]
    layers = {int(match[1]) for match in found}
    if layers != set(range(len(layers))) or not layers:
        raise CheckpointError(
            f"the state is not a whole ThinkerLM's: its blocks are {sorted(layers)[:8]}, and must be 0, 1, 2, ...; "
            "save the model's whole state dict"
        )
    first = {match[2]: shapes[match[0]] for match in found if match[1] == "0"}
    experts = {int(match[1]) for name in first if (match := _EXPERT.fullmatch(name))}
    branch = "moe.experts.0." if experts else "mlp."
    wide = next((first[name] for name in (f"{branch}gate_proj.weight", f"{branch}fc1.weight") if name in first), ())
    if len(wide) != 2:
        raise CheckpointError(
            f"the state is not a ThinkerLM's: block 0 has neither {branch}gate_proj.weight nor {branch}fc1.weight of "
            "two axes; give a checkpoint of ThinkerLM"
        )
    q, k = (first.get(f"attn.{name}.weight", ()) for name in "qk")
    facts: dict[str, Any] = {
        "vocab_size": embedding[0],
        "n_layers": len(layers),
        "d_model": embedding[1],
        "d_ff": wide[0],
        "use_gqa": bool(q) and q != k,
        "use_swiglu": f"{branch}gate_proj.weight" in first,
        "use_moe": bool(experts),
    }
    return facts | ({"num_experts": len(experts)} if experts else {})


# Heads ---------------------------------------------------------------------------------------------------------------


def _kv_heads(shapes: Mapping[str, tuple[int, ...]], facts: Mapping[str, Any], heads: int) -> int:
    """K of a GQA model: attn.k.weight has K·d = K·D/H rows. 0 where that is no whole number."""
    k = shapes.get("blocks.0.attn.k.weight", ())
    rows = k[0] if k else 0
    return 0 if rows * heads % facts["d_model"] else rows * heads // facts["d_model"]


def _possible_heads(shapes: Mapping[str, tuple[int, ...]], facts: Mapping[str, Any]) -> list[int]:
    """Every n_heads that the shapes allow: D/H whole and even, for RoPE, and K a divisor of H."""
    width = facts["d_model"]
    small = [n for n in range(1, int(width**0.5) + 1) if width % n == 0]
    possible = [n for n in sorted({*small, *(width // n for n in small)}) if width // n % 2 == 0]
    if facts["use_gqa"]:
        kv = {n: _kv_heads(shapes, facts, n) for n in possible}
        possible = [n for n in possible if kv[n] and n % kv[n] == 0]
    return possible


def _heads(
    shapes: Mapping[str, tuple[int, ...]], facts: Mapping[str, Any], hint: int | None, given: ThinkerConfig | None
) -> int:
    possible = _possible_heads(shapes, facts)
    shown = ", ".join(map(str, possible))
    if not possible:
        raise CheckpointError(
            f"no n_heads fits d_model={facts['d_model']} and the rows of attn.k.weight: the state is not a ThinkerLM's"
        )
    if hint is not None and (isinstance(hint, bool) or hint not in possible):
        raise ValueError(f"n_heads={hint!r} does not fit the checkpoint's shapes: must be one of {shown}")
    if hint is not None and given is not None and hint != given.n_heads:
        raise ValueError(
            f"n_heads={hint} and the config's n_heads={given.n_heads} contradict each other: must be equal; {_GIVE}"
            "without the hint"
        )
    if given is not None:
        return given.n_heads
    if hint is None and len(possible) > 1:
        raise ValueError(
            f"the checkpoint's shapes do not tell n_heads: must be one of {shown}, by who made it; {_GIVE}or "
            f"n_heads= (--n-heads N), for example {possible[-1] if len(possible) < 3 else possible[len(possible) // 2]}"
        )
    return possible[0] if hint is None else int(hint)


# Against the config --------------------------------------------------------------------------------------------------


def _check_agrees(config: ThinkerConfig, facts: Mapping[str, Any]) -> None:
    """Refuse a config of another model; use_gqa is free where there are as many key/value heads as heads."""
    free = not facts["use_gqa"] and config.kv_heads == config.n_heads
    wrong = [
        f"{name}={getattr(config, name)!r}, and the shapes say {value!r}"
        for name, value in facts.items()
        if name not in ("kv_groups", "n_heads") and not (name == "use_gqa" and free) and getattr(config, name) != value
    ]
    if not wrong and config.use_gqa and not free and config.kv_heads != facts["kv_groups"]:
        wrong = [f"{config.kv_heads} key/value heads, and the shapes of its {config.n_heads} heads say otherwise"]
    if wrong:
        raise ValueError(
            f"the config is not that of the checkpoint: it has {'; '.join(wrong)}; {_GIVE}that the checkpoint was "
            "made with"
        )


def _check_shapes(config: ThinkerConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a state that has other keys or shapes than a model of this config."""
    split = "blocks.0.attn.q.weight" in shapes
    wanted = dict(islice(_expected(config, split), len(shapes) + 9))  # bounded by the file, whatever its names claim
    wrong = [f"{key} is missing" for key in wanted if key not in shapes]
    wrong += [f"{key} is unexpected" for key in shapes if key not in wanted]
    wrong += [
        f"{key} has shape {shapes[key]}, not {shape}"
        for key, shape in wanted.items()
        if shapes.get(key, shape) != shape
    ]
    if wrong:
        more = f", and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        if any(key.endswith(".inv_freq") for key in shapes):
            more += " (inv_freq are RoPE's frequencies, which other models save and ThinkerLM computes from rope_theta)"
        raise CheckpointError(
            f"the state is not a ThinkerLM's: {'; '.join(wrong[:8])}{more}; give a checkpoint of ThinkerLM"
        )


def _expected(config: ThinkerConfig, split: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every key of a state dict and its shape; `split`: q, k and v apart."""
    V, D, F = config.vocab_size, config.d_model, config.d_ff
    rows = config.kv_heads * config.head_dim
    mlp = {"gate_proj.weight": (F, D), "up_proj.weight": (F, D), "down_proj.weight": (D, F)}
    if not config.use_swiglu:
        mlp = {"fc1.weight": (F, D), "fc1.bias": (F,), "fc2.weight": (D, F), "fc2.bias": (D,)}
    attention = {"qkv": (3 * D, D)} if not split else {"q": (D, D), "k": (rows, D), "v": (rows, D)}
    yield "tok_emb.weight", (V, D)
    for i in range(config.n_layers):
        block = f"blocks.{i}."
        yield f"{block}norm1.weight", (D,)
        for name, shape in (attention | {"o": (D, D)}).items():
            yield f"{block}attn.{name}.weight", shape
        yield f"{block}norm2.weight", (D,)
        if config.use_moe:
            yield f"{block}moe.router.weight", (config.num_experts, D)
        for branch in [f"moe.experts.{e}." for e in range(config.num_experts)] if config.use_moe else ["mlp."]:
            for name, shape in mlp.items():
                yield f"{block}{branch}{name}", shape
    yield "norm.weight", (D,)
    yield "lm_head.weight", (V, D)


# Config files --------------------------------------------------------------------------------------------------------


def read_given(
    config: ThinkerConfig | Mapping[str, Any] | str | os.PathLike[str],
) -> tuple[ThinkerConfig, frozenset[str]]:
    """A config as infer_config takes it, and the fields that it names.

    A file is a config file of the family, or a model's description with the config under "config".

    Raises:
        ValueError: it is of another type, or cannot be read.
    """
    if isinstance(config, ThinkerConfig):
        return config, frozenset(config.to_dict())
    if isinstance(config, Mapping):
        return ThinkerConfig.from_dict(config), _named(config)
    if not isinstance(config, str | os.PathLike):
        raise ValueError(
            f"config is a {type(config).__name__}: must be a ThinkerConfig, a dict of its fields, or the path of a "
            "config file; give one of these"
        )
    path = Path(config)
    mapping = _read_object(path)
    if isinstance(mapping, dict) and isinstance(mapping.get("config"), dict) and "d_model" not in mapping:
        try:
            return ThinkerConfig.from_dict(mapping["config"]), _named(mapping["config"])
        except ValueError as bad:
            raise ValueError(f"config file {str(path)!r}, under 'config': {bad}") from None
    return read_config(path).config, _named(mapping)


def _named(mapping: Any) -> frozenset[str]:
    """The keys of a config, with those of the level "thinker"."""
    return frozenset(mapping) | frozenset(mapping.get("thinker") or ())


def _read_object(path: Path) -> Any:
    """What the JSON file holds, or None where it is no JSON: read_config says why."""
    with open_regular_file(path, "config file") as file:
        raw = file.read(_LARGEST_SIDECAR + 1)
    try:
        return json.loads(raw.decode("utf-8")) if len(raw) <= _LARGEST_SIDECAR else None
    except (ValueError, RecursionError):
        return None


def _describes_a_model(mapping: Any) -> bool:
    if not isinstance(mapping, dict):
        return False
    return any(
        isinstance(level, dict) and "d_model" in level
        for level in (mapping, mapping.get("thinker"), mapping.get("config"))
    )
