"""The checks: one claim per file. This index imports no framework, so that `parity list` works with neither.

A check is a module with
    CLAIM     what a green row says, in one sentence,
    BLIND     what it cannot see,
    CONTROLS  the wrong things that it must reject, as {name: description},
    run(scope, progress) -> CheckResult, which shows the check its own controls too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from parity.errors import Misuse

__all__ = ["CHECKS", "OF_MODELS", "Progress", "Scope", "load"]

CHECKS = (
    "logits",
    "gradients",
    "decode",
    "sampling",
    "autodiff",
    "data",
    "dropout",
    "accumulation",
    "adamw",
    "recipe",
    "trajectory",
    "initializers",
    "mel",
    "image",
    "ctc",
    "audio-encoder",
    "vision-encoder",
    "fusion",
    "omni",
    "tokenizer",
    "checkpoint",
)
"""In the order in which they run and are listed."""

OF_MODELS = ("logits", "gradients")
"""Those that look at the configurations, checkpoint and text of a scope; the others have problems of their own."""

Progress = Callable[[int, int, str], None]
"""progress(done, total, label): called by a check after each unit of its work."""


@dataclass(frozen=True)
class Scope:
    """What a run looks at. Empty tuples mean "the default": every configuration, every regime."""

    configs: tuple[str, ...] = ()
    """Names of shared configurations, or paths of configuration files."""
    regimes: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ("float64", "float32", "bfloat16")
    device: str = "cpu"
    checkpoint: str | None = None
    text: str | None = None
    audio: str | None = None
    """A sound file of the user's, for the mel check."""
    image: str | None = None
    """A picture of the user's, for the image check."""
    seed: int = 0
    draws: int = 7
    controls: bool = True
    full: bool = False
    """Whole training runs, over ten seeds: minutes where the default takes seconds."""


def load(name: str) -> ModuleType:
    """The module of a check by its name; an unknown name is a `Misuse` that lists the known ones."""
    if name not in CHECKS:
        import difflib

        near = difflib.get_close_matches(name, CHECKS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise Misuse(f"check: {name!r} is not a check{hint} (known: {', '.join(CHECKS)}; see `parity list`)")
    return importlib.import_module(f"parity.checks.{name.replace('-', '_')}")
