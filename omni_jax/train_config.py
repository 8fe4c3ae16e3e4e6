"""How a ThinkerLM is trained, as a frozen dataclass read from the family's JSON config files (omni_jax's copy)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .config import LARGEST_INT, ThinkerConfig, invalid_value, read_config, typed_value

__all__ = ["TrainConfig"]


@dataclass(frozen=True)
class TrainConfig:
    """How a ThinkerLM is trained, checked: the training keys of the family's config files.

    lr: peak learning rate; wd: decoupled weight decay on every tensor; warmup_steps, max_steps: updates of the
    schedule (`warmup_cosine`); batch_size: rows of ctx_len predicted tokens in a micro-batch;
    gradient_accumulation_steps: micro-batches in an update; max_grad_norm: the global norm that gradients are clipped
    to; val_split: share of the documents kept for validation, 0 for none; val_freq, checkpoint_freq, print_freq:
    updates between validations, writes of last.pt, and lines of metrics; seed: of weights, batches and dropout;
    use_amp: compute in bfloat16, while parameters, gradients, moments and loss stay float32.

    Raises:
        ValueError: a field of the wrong type or out of range, or two that contradict each other. The message names
            the field, its value, what is allowed, and the fix.
    """

    lr: float = 3e-4
    wd: float = 0.1
    warmup_steps: int = 0
    max_steps: int = 1000
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    val_split: float = 0.1
    val_freq: int = 100
    checkpoint_freq: int = 100
    print_freq: int = 10
    seed: int = 0
    use_amp: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, typed_value(field.name, str(field.type), getattr(self, field.name)))
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name in ("warmup_steps", "seed") else 1
            if field.type == "int" and not least <= value <= LARGEST_INT:
                fix = f"set {field.name} within these bounds"
                raise invalid_value(field.name, value, f"{least} to {LARGEST_INT}", fix)
        for name in ("lr", "max_grad_norm"):
            if not getattr(self, name) > 0.0:
                raise invalid_value(
                    name, getattr(self, name), "above 0", f"the family's is {getattr(TrainConfig, name)}"
                )
        if not self.wd >= 0.0:
            raise invalid_value("wd", self.wd, "at least 0", "use 0.0 for no weight decay")
        if not 0.0 <= self.val_split < 1.0:
            raise invalid_value("val_split", self.val_split, "in [0, 1)", "use 0.0 for no validation")
        if self.warmup_steps >= self.max_steps:
            allowed = f"below max_steps={self.max_steps}"
            raise invalid_value("warmup_steps", self.warmup_steps, allowed, "lower warmup_steps or raise max_steps")

    @classmethod
    def from_json(cls, path: str | Path) -> TrainConfig:
        """Read the training keys of a config file that ThinkerConfig.from_json reads too; those left out get defaults.

        Raises:
            ValueError: as `read_config`, and a training key's value that is not allowed.
        """
        read_config(path)  # refuses whatever is no such file
        return cls._from_checked(json.loads(Path(path).read_bytes()), f"config file {path}")

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> TrainConfig:
        """Build from a mapping of the same forms that `from_json` accepts in a file, the model's keys included.

        Raises:
            ValueError: as `from_json`.
        """
        ThinkerConfig.from_dict(mapping)
        return cls._from_checked(mapping, "the mapping")

    @classmethod
    def _from_checked(cls, mapping: Mapping[str, Any], origin: str) -> TrainConfig:
        flat = {**mapping, **mapping.get("thinker", {})}  # the nested value wins, as it does for the model's keys
        try:
            return cls(**{field.name: flat[field.name] for field in fields(cls) if field.name in flat})
        except ValueError as bad:
            raise ValueError(f"{origin}: {bad}") from None

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, in order."""
        return asdict(self)
