"""Which checks look at which module, in the order in which they are tried: the cheap and the broad first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from parity.checks import Scope

__all__ = ["Look", "looks_of"]


@dataclass(frozen=True)
class Look:
    """Checks that share one scope, and so their runs."""

    checks: tuple[str, ...]
    given: tuple[tuple[str, Any], ...] = field(default=())

    @property
    def scope(self) -> Scope:
        return Scope(**{"precisions": ("float64",), **dict(self.given), "controls": False})

    def __str__(self) -> str:
        given = [" ".join(value) for name, value in self.given if name in ("configs", "precisions")]
        return " ".join([" and ".join(self.checks), *(f"({words})" for words in given)])


def _look(*names: str, **given: Any) -> Look:
    return Look(names, tuple(given.items()))


def _model(config: str, **given: Any) -> Look:
    return _look("logits", "gradients", configs=(config,), regimes=("randomised",), **given)


NARROW: Mapping[str, Any] = {"precisions": ("bfloat16",)}
"""A cast that is left out shows where there is something to lose."""

MODEL = (
    _model("mha-swiglu"), _model("gqa-swiglu"), _model("mha-gelu"), _model("moe"),
    _look("decode"), _look("dropout"), _look("initializers"),
    _model("mha-swiglu", **NARROW), _model("moe-gqa-gelu", **NARROW),
)  # fmt: skip
TRAINING = (_look("accumulation"), _look("recipe"), _look("data"), _look("trajectory"))

LOOKS: Mapping[str, tuple[Look, ...]] = {
    "attention": MODEL,
    "layers": MODEL,
    "thinker": MODEL,
    "losses": (_model("mha-swiglu"), _look("accumulation"), _look("recipe"), _model("mha-swiglu", **NARROW)),
    "optim": (_look("adamw"), _look("recipe"), _look("adamw", precisions=("bfloat16", "float32"))),
    "init": (_look("initializers"),),
    "sampling": (_look("sampling"), _look("decode"), _look("sampling", precisions=("float32", "bfloat16"))),
    "mel": (_look("mel"), _look("audio-encoder")),
    "audio": (_look("mel"), _look("mel", precisions=("float32", "bfloat16"))),
    "audio_encoder": (_look("audio-encoder"), _look("ctc"), _look("audio-encoder", **NARROW)),
    "ctc": (_look("ctc"), _look("ctc", precisions=("float32", "bfloat16"))),
    "vision": (_look("image"), _look("vision-encoder"), _look("image", precisions=("float32", "bfloat16"))),
    "vision_encoder": (_look("vision-encoder"), _look("image"), _look("vision-encoder", **NARROW)),
    "fusion": (_look("fusion"), _look("omni"), _look("fusion", **NARROW)),
    "cache": (_look("decode"), _look("decode", **NARROW)),
    "generation": (_look("decode"), _look("sampling"), _look("omni")),
    "autodiff": (_look("autodiff"),),
    "data": (_look("data"), _look("recipe")),
    "training": TRAINING,
    "training_run": TRAINING,
    "training_utils": TRAINING,
    "image_file": (_look("image"),),
    "audio_file": (_look("mel"), _look("omni")),
}


def looks_of(module: str) -> tuple[Look, ...]:
    """The looks at a module of the twins; none for what no check runs."""
    return LOOKS.get(module, ())
