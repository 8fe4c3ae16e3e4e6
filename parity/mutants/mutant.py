"""One bug of the catalogue: where it comes from, what it changes, and who must catch it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["AREAS", "Edit", "Mutant", "in_both"]

AREAS = (
    "norm",
    "attention",
    "rope",
    "mlp",
    "moe",
    "embedding",
    "init",
    "optimizer",
    "schedule",
    "clipping",
    "loss",
    "gradients",
    "dtype",
    "dropout",
    "mel",
    "image",
    "tokenizer",
    "sampling",
    "cache",
    "checkpoint",
    "data",
)
"""The catalogue has a file for each."""


@dataclass(frozen=True)
class Edit:
    """In the source of function `name` ("Class.method" too) of `module`, `old` becomes `new`.

    `old` must occur exactly `count` times: an anchor that is not there is an error, never a mutant.
    """

    module: str
    name: str
    old: str
    new: str
    count: int = 1

    @property
    def target(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Mutant:
    """A bug that can be put into one side, or into both."""

    id: str
    area: str
    report: str
    """Row of `parity.mutants.rows` (a real report), or the source in words."""
    what: str
    edits: tuple[Edit, ...]
    check: str
    """The name of the check that must catch it."""
    where: str = ""
    """Regular expression of the tap or row where it must be located first; "" where the check has a single place."""
    scope: Mapping[str, Any] = field(default_factory=dict)
    """What of the check is run, as fields of Scope; by default float64 on the smallest fixture that has the code."""
    needs: str = ""
    """The inputs without which it cannot show."""
    equivalent: str = ""
    """Why nothing can tell it from the right code; such a mutant must agree."""
    symptom: str = ""
    """Regular expression of the error that is this bug's own symptom; any other exception is no kill."""

    @property
    def side(self) -> str:
        """jax, torch or both."""
        sides = {edit.module.partition(".")[0].removeprefix("omni_") for edit in self.edits}
        return "both" if len(sides) > 1 else sides.pop()


def in_both(module: str, name: str, old: str, new: str, count: int = 1) -> tuple[Edit, Edit]:
    """The same edit in a file that the twins have alike: the mistake that sharing would hide."""
    return tuple(Edit(f"omni_{side}.{module}", name, old, new, count) for side in ("jax", "torch"))  # pyright: ignore
