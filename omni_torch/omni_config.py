"""The shape of an OmniLM: its thinker's, and those of its encoders, read from the family's JSON (omni_torch's copy).

The same file stands in both twins, so that neither needs the other; a test holds the copies equal.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .config import LARGEST_INT, TRAINING_KEYS, ThinkerConfig, invalid_value, read_json, shortened, typed_value

__all__ = ["AudioConfig", "VisionConfig", "OmniConfig"]

# The family's names of fields in the sections of its files → ours.
_BOTH = {"d_model": "d", "n_heads": "heads", "d_ff": "ff", "n_layers": "layers"}
_AUDIO = _BOTH | {"downsample_time": "downsample_factor", "frame_hop": "hop_length", "frame_win": "win_length"}
# What else its sections hold: training, and the heads that the encoders were trained with.
_AUDIO_IGNORED = ["target_hz", "ctc_vocab_size", "max_text_len", "max_mel_length", "train_csv"]
_VISION_IGNORED = ["train_manifest", "image_root", "embed_dim", "vocab_size", "ctx_len", "use_thinker_for_text"]
_VISION_IGNORED += ["thinker_ckpt", "thinker", "temperature"]
_MELS = 128


@dataclass(frozen=True)
class AudioConfig:
    """What AudioEncoderTiny's constructor takes, and the mel spectrogram that it was trained on; checked.

    d, heads, ff, layers are counts; dropout a probability; downsample_factor 4 or 8; sample_rate in Hz, n_fft,
    hop_length and win_length in samples.

    Raises:
        ValueError: a field of the wrong type or out of range; heads that do not divide d; win_length beyond n_fft.
    """

    d: int = 192
    heads: int = 3
    ff: int = 768
    layers: int = 4
    dropout: float = 0.1
    downsample_factor: int = 4
    sample_rate: int = 16000
    n_fft: int = 1024
    hop_length: int = 160
    win_length: int = 400

    def __post_init__(self) -> None:
        _check_encoder(self)
        if self.downsample_factor not in (4, 8):
            raise invalid_value("downsample_factor", self.downsample_factor, "4 or 8", "4 gives 25 vectors a second")
        if self.win_length > self.n_fft:
            raise invalid_value("win_length", self.win_length, f"at most n_fft={self.n_fft}", "give a larger n_fft")

    def num_vectors(self, frames: int) -> int:
        """How many vectors the encoder makes of so many mel frames: halved and rounded up, twice or three times."""
        return -(-frames // self.downsample_factor)


@dataclass(frozen=True)
class VisionConfig:
    """What ViTTiny's constructor takes, checked.

    img_size and patch are in pixels; d, layers, heads, ff are counts; dropout is a probability.

    Raises:
        ValueError: a field of the wrong type or out of range; a patch that does not divide img_size; heads that do not
            divide d.
    """

    img_size: int = 224
    patch: int = 16
    d: int = 192
    layers: int = 12
    heads: int = 3
    ff: int = 768
    dropout: float = 0.1

    def __post_init__(self) -> None:
        _check_encoder(self)
        if self.img_size % self.patch:
            raise invalid_value("patch", self.patch, f"a divisor of img_size={self.img_size}", "change one of them")


@dataclass(frozen=True)
class OmniConfig:
    """What OmniLM's constructor takes: the thinker's config and the encoders', None for a sense that it lacks.

    Raises:
        ValueError: a member of another type.
    """

    thinker: ThinkerConfig
    audio: AudioConfig | None = None
    vision: VisionConfig | None = None

    def __post_init__(self) -> None:
        for name, kind in (("thinker", ThinkerConfig), ("audio", AudioConfig), ("vision", VisionConfig)):
            value = getattr(self, name)
            if not isinstance(value, kind) and (value is not None or name == "thinker"):
                raise invalid_value(name, value, f"a {kind.__name__}", "OmniConfig.from_dict makes one of plain values")

    @classmethod
    def from_json(cls, path: str | Path) -> OmniConfig:
        """Read a config file of the family's exports: {"thinker": {...}, "audio": {...}, "vision": {...}, ...}.

        Raises:
            ValueError: as ThinkerConfig.from_json, and as `from_dict`.
        """
        return _omni(read_json(path), f"config file {path}")

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> OmniConfig:
        """Build from a mapping of the same form as such a file.

        The sections may have the family's names for their fields (d_model, n_heads, downsample_time, frame_win, ...).
        Its keys of training, and of the heads that the encoders were trained with, are ignored. A section that is
        missing or None is a sense that the model lacks.

        Raises:
            ValueError: a key that is not known (the nearest known one is given), one that stands there under two names,
                a section that is no object, or a value that is not allowed.
        """
        return _omni(mapping, "the mapping")

    def to_dict(self) -> dict[str, Any]:
        """The sections by name, each with every field by name: what `from_dict` takes."""
        return asdict(self)

    def to_json(self, path: str | Path) -> None:
        """Write a JSON config file in UTF-8 that `from_json` reads back to an equal config."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def _omni(mapping: Any, origin: str) -> OmniConfig:
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{origin}: must be an object of keys and values, got {type(mapping).__name__}")
    try:
        thinker = ThinkerConfig.from_dict(mapping)  # takes the level "thinker" over the top
    except ValueError as error:
        raise ValueError(f"{origin}: {str(error).removeprefix('the mapping: ')}") from error
    audio = _section(mapping, "audio", AudioConfig, _AUDIO, _AUDIO_IGNORED, origin)
    vision = _section(mapping, "vision", VisionConfig, _BOTH, _VISION_IGNORED, origin)
    return OmniConfig(thinker, audio, vision)


def _section(
    mapping: Mapping[str, Any], name: str, kind: type[Any], synonyms: dict[str, str], ignored: list[str], origin: str
) -> Any:
    section = mapping.get(name)
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise ValueError(
            f"{origin}: {name!r} must be an object with the encoder's keys, got {type(section).__name__}; leave it out "
            "where the model has no such encoder"
        )
    known = {field.name: field.name for field in fields(kind)} | synonyms
    passed = {*ignored, *TRAINING_KEYS}
    values: dict[str, Any] = {}
    for key, value in section.items():
        if key == "mel_bins" and name == "audio":
            if value != _MELS:
                raise ValueError(
                    f"{origin}: audio.mel_bins={shortened(value)} is not allowed: must be {_MELS}; change it"
                )
        elif key in known:
            if known[key] in values:
                raise ValueError(
                    f"{origin}: {name}.{key} is another name of {name}.{known[key]}, which stands there too; keep one"
                )
            values[known[key]] = value
        elif key not in passed:
            shown = str(key)[:60]
            near = difflib.get_close_matches(shown, [*known, *sorted(passed)], n=1, cutoff=0.0)
            raise ValueError(
                f"{origin}: unknown key {f'{name}.{shown}'!r}; the nearest known key is {near[0]!r}: rename it or "
                "remove it"
            )
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{origin}: {name}.{error}") from error


def _check_encoder(config: AudioConfig | VisionConfig) -> None:
    for field in fields(config):
        value = typed_value(field.name, str(field.type), getattr(config, field.name))
        object.__setattr__(config, field.name, value)
        if field.type == "int" and not 1 <= value <= LARGEST_INT:
            raise invalid_value(field.name, value, f"1 to {LARGEST_INT}", f"set {field.name} within these bounds")
    if not 0.0 <= config.dropout < 1.0:
        raise invalid_value("dropout", config.dropout, "in [0, 1)", "use 0.0 for no dropout")
    if config.d % config.heads:
        raise invalid_value("heads", config.heads, f"a divisor of d={config.d}", "change d or heads so that it divides")
