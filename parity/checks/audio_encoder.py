"""AudioEncoderTiny and CTCHead of both twins: every frame of clips of unequal length, and every gradient.

Shapes: B batch, T mel frames, M mel bands, U encoded frames, D model, V vocabulary.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from parity.checks import Progress, Scope
from parity.checks._encoders import SIMPLE
from parity.result import CheckResult

__all__ = ["BLIND", "CLAIM", "CONFIGS", "CONTROLS", "LENGTHS", "PRECISIONS", "bugs", "problems", "run"]

CLAIM = (
    "On the same weights and mel frames both AudioEncoderTinys and the CTCHeads on them, downsampling by 4 and by 8, "
    "give the same vector and the same logits of every frame, and the same gradient of every tensor; of clips of "
    "unequal length nothing behind a clip's own frames is read, and a clip in a batch is what it is alone: the same "
    "function in float64, and each as near to the float64 reference as its working precision allows."
)
BLIND = (
    "Training mode (dropout); clips beyond {most} frames; gradients in bfloat16; in the default run a downsampling by "
    "4 (the omni check has it), fresh weights, bfloat16, and JAX compiled in float64 (its program is evaluated): "
    "--full looks at all of these. A mistake that both twins share: the frozen reference numbers in tests/golden stand "
    "against that."
)
PRECISIONS = ("float64", "float32", "bfloat16")
BANDS, VOCABULARY = 128, 7

CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "audio x4": ({"d": 16, "heads": 2, "ff": 24, "layers": 1, "downsample_factor": 4}, ()),
    "audio x8": ({"d": 12, "heads": 3, "ff": 20, "layers": 1, "downsample_factor": 8}, ("float64", "float32")),
    "audio x4, deeper": ({"d": 24, "heads": 3, "ff": 40, "layers": 2, "downsample_factor": 4}, ()),
}
"""Settings, and the precisions of the default run."""
LENGTHS = (17, 10)
"""Frames of the clips: odd and even on the way down. Of each several vectors are left: over a single one attention has
no gradient but torch's rounding."""
BEHIND = 1e3
"""What stands behind a clip: read by anything, it would be seen."""
BLIND = BLIND.format(most=max(LENGTHS))


def problems(scope: Scope) -> list[Any]:
    """The models and clips that `scope` asks for."""
    from parity.checks._encoders import random_tensors

    found = []
    for name, (_, usual) in CONFIGS.items():
        if usual or scope.full:
            module, problem = _problem(name, scope.seed)
            found.append(problem("randomised", random_tensors(module, scope.seed)))
            if scope.full:
                fresh = {k: v.detach().numpy().copy() for k, v in module.named_parameters()}
                found.append(problem("fresh", fresh))
    return found


def _problem(name: str, seed: int) -> Any:
    import jax
    import torch
    from flax import nnx

    import omni_jax.audio_encoder
    import omni_torch.audio_encoder
    from parity.checks._encoders import Problem, merged
    from parity.pair import pair_of

    settings, usual = CONFIGS[name]
    d, factor, alone = settings["d"], settings["downsample_factor"], LENGTHS[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = torch.nn.ModuleDict(
            {
                "encoder": omni_torch.audio_encoder.AudioEncoderTiny(**settings),
                "head": omni_torch.audio_encoder.CTCHead(d, VOCABULARY),
            }
        ).eval()
    template, model = merged(
        lambda: nnx.Dict(
            encoder=omni_jax.audio_encoder.AudioEncoderTiny(**settings, rngs=nnx.Rngs(0)),
            head=omni_jax.audio_encoder.CTCHead(d, VOCABULARY, rngs=nnx.Rngs(0)),
        )
    )

    def forward(net, mel, lengths):
        frames, kept = net["encoder"](mel, lengths)
        return {"frames": frames, "logits": net["head"](frames), "lengths": kept}

    def ours(params, mel, lengths, weight):
        # Without a gradient of its own, which costs as much as the rest.
        single = model(jax.lax.stop_gradient(params))["encoder"](mel[1:2, :alone])
        return forward(model(params), mel, lengths) | {"alone": single}

    def theirs(net, mel, lengths, weight):
        with torch.no_grad():
            single = net["encoder"](mel[1:2, :alone])
        return forward(net, mel, lengths) | {"alone": single}

    def loss(out, mel, lengths, weight):
        return (out["logits"] * out["logits"] * weight).sum()  # of which no gradient is a constant

    pair = pair_of(ours, module, template, loss=(loss, loss), torch_call=theirs, name=name)
    pair.hasty = True
    rng = np.random.default_rng([seed, 73])
    B, T = len(LENGTHS), max(LENGTHS)
    mel = (2.0 * rng.standard_normal((B, T, BANDS)) - 3.0).astype(np.float32)  # as log-mels lie
    mel[np.arange(T) >= np.array(LENGTHS)[:, None]] = BEHIND
    weight = rng.standard_normal((B, -(-T // factor), VOCABULARY)).astype(np.float32)
    same = {"alone": lambda reference: reference["frames"][1:2, : -(-alone // factor)]}

    def problem(regime: str, tensors: Any) -> Problem:
        return Problem(name, regime, pair, tensors, [mel, np.array(LENGTHS, np.int32), weight], same, usual)

    return module, problem


# ------------------------------------------------------------------------------------------------ controls

SEEN = ("frames", "logits")


@contextlib.contextmanager
def _eps(module: Any) -> Iterator[None]:
    for part in module.modules():
        if hasattr(part, "eps"):
            part.eps = part.eps / 10
    yield


@contextlib.contextmanager
def _gelu(module: Any) -> Iterator[None]:
    for part in module.modules():
        if hasattr(part, "approximate"):
            part.approximate = "tanh"
    yield


@contextlib.contextmanager
def _same_padding(module: Any) -> Iterator[None]:
    """What "SAME" means in XLA: an even size is padded at its end only."""
    import torch

    def pad(part, args):
        both = [(1, 1) if n % 2 else (0, 1) for n in args[0].shape[:1:-1]]
        return (torch.nn.functional.pad(args[0], [n for pair in both for n in pair]),)

    for part in module.modules():
        if isinstance(part, torch.nn.Conv2d):
            part.padding = (0, 0)
            part.register_forward_pre_hook(pad)
    yield


def _channels_inside(weights: dict[str, np.ndarray]) -> None:
    proj = weights["encoder.proj.weight"]
    by_channel = proj.reshape(len(proj), 64, -1)
    weights["encoder.proj.weight"] = np.ascontiguousarray(by_channel.swapaxes(1, 2)).reshape(proj.shape)


def _time_and_frequency(weights: dict[str, np.ndarray]) -> None:
    for name, value in weights.items():
        weights[name] = value.swapaxes(2, 3) if value.ndim == 4 else value


def _one_frame_on(inputs: list[np.ndarray]) -> None:
    inputs[0] = np.roll(inputs[0], 1, axis=1)


def _every_frame(inputs: list[np.ndarray]) -> None:
    inputs[1] = np.full_like(inputs[1], inputs[0].shape[1])


def bugs() -> dict[str, Any]:
    """What CONTROLS names beside the simple ones, as `Bug`s."""
    from parity.checks._encoders import Bug

    return {
        "eps 1e-6": Bug(within=_eps, seen=SEEN),
        "tanh GELU": Bug(within=_gelu, seen=SEEN),
        "channels inside": Bug(weights=_channels_inside, seen=SEEN),
        "time for frequency": Bug(weights=_time_and_frequency, seen=SEEN),
        "SAME padding": Bug(within=_same_padding, seen=SEEN),
        "one frame on": Bug(inputs=_one_frame_on, seen=SEEN),
        "lengths forgotten": Bug(inputs=_every_frame, seen=(*SEEN, "lengths")),
    }


CONTROLS = {
    **SIMPLE,
    "eps 1e-6": "RMSNorm's eps a tenth of what it is",
    "tanh GELU": "GELU's tanh approximation for the exact one",
    "channels inside": "the projection reads frequency outside, channel inside",
    "time for frequency": "rows and columns of every convolution exchanged",
    "SAME padding": "strided convolutions padded at the end only, as XLA's SAME does",
    "one frame on": "every clip one frame later",
    "lengths forgotten": "what stands behind a clip is read",
}


def run(scope: Scope, progress: Progress) -> CheckResult:
    """Judge outputs and gradients of every problem of `scope`."""
    from parity.checks._encoders import controls, judged, judged_rows

    started = time.perf_counter()
    result, seen = CheckResult("audio-encoder"), []
    for problem, case in judged(problems(scope), scope, PRECISIONS, progress):
        seen.append((problem, case))
        result.rows += judged_rows("audio-encoder", case)
    if scope.controls:
        result.controls = controls(seen, bugs())
    result.seconds = time.perf_counter() - started
    return result
