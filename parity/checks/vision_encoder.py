"""ViTTiny of both twins: the picture's vector, every patch's, every block's output, and every gradient.

Shapes: B batch, H height, W width, P patch side, N patches, D model.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from parity.checks import Progress, Scope
from parity.checks._encoders import SIMPLE
from parity.result import CheckResult

__all__ = ["BLIND", "CLAIM", "CONFIGS", "CONTROLS", "PRECISIONS", "bugs", "problems", "run"]

CLAIM = (
    "On the same weights and pictures both ViTTinys give the same vector of the picture and of every patch, the same "
    "output of every block, and the same gradient of every tensor, at the size that the positions are learned for and "
    "at others, where the table of positions is interpolated: the same function in float64, and each as near to the "
    "float64 reference as its working precision allows."
)
BLIND = (
    "Training mode (dropout); pictures beyond {most} pixels a side; gradients in bfloat16; in the default run more "
    "than one block, fresh weights, bfloat16, and JAX compiled in float64 (its program is evaluated): --full looks at "
    "all of these. A mistake that both twins share: the frozen reference numbers in tests/golden stand against that."
)
PRECISIONS = ("float64", "float32", "bfloat16")

_SMALL: dict[str, Any] = {"img_size": 12, "patch": 4, "d": 16, "layers": 1, "heads": 2, "ff": 24}
CONFIGS: dict[str, tuple[dict[str, Any], tuple[tuple[int, int], ...]]] = {
    "vit": (_SMALL, ((12, 12), (8, 20))),
    "vit, deeper": (
        {"img_size": 15, "patch": 3, "d": 24, "layers": 2, "heads": 3, "ff": 40},
        ((15, 15), (3, 6), (6, 27)),
    ),
}
"""Settings, and sizes of pictures: the first is the one that the positions are for. --full looks at all."""
OFFSET = 64.0
"""What one patch's activations have in common: a variance as E[x²] - E[x]² would lose most of its digits there."""
BLIND = BLIND.format(most=max(side for _, sizes in CONFIGS.values() for size in sizes for side in size))


def problems(scope: Scope) -> list[Any]:
    """The models and pictures that `scope` asks for."""
    from parity.checks._encoders import random_tensors

    found = []
    for name in CONFIGS if scope.full else list(CONFIGS)[:1]:
        module, problem = _problem(name, scope.seed)
        weights = random_tensors(module, scope.seed)
        weights["pos"][0, -1] += OFFSET
        found.append(problem("randomised", weights))
        if scope.full:
            found.append(problem("fresh", {k: v.detach().numpy().copy() for k, v in module.named_parameters()}))
    return found


def _problem(name: str, seed: int) -> Any:
    import torch
    from flax import nnx

    import omni_jax.vision_encoder
    import omni_torch.vision_encoder
    from parity.checks._encoders import Problem, merged
    from parity.pair import pair_of

    settings, sizes = CONFIGS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = omni_torch.vision_encoder.ViTTiny(**settings).eval()
    template, model = merged(lambda: omni_jax.vision_encoder.ViTTiny(**settings, rngs=nnx.Rngs(0)))
    labels = [f"{height}x{width}" for height, width in sizes]

    def forward(net, *inputs):
        out = {}
        for label, images in zip(labels, inputs):
            out[f"{label}:cls"], out[f"{label}:grid"] = net(images)
        return out

    # Another weight for every output, so that no two parts of a gradient stand for each other.
    def loss(out, *inputs):
        kinds = [f"{label}:{part}" for label in labels for part in ("cls", "grid")]
        return sum((out[kind] * weight).sum() for kind, weight in zip(kinds, inputs[len(labels) :]))

    pair = pair_of(
        lambda params, *inputs: forward(model(params), *inputs),
        module,
        template,
        loss=(loss, loss),
        torch_call=forward,
        name=name,
    )
    pair.hasty = True
    rng = np.random.default_rng([seed, 71])
    images = [rng.random((2, 3, *size)).astype(np.float32) for size in sizes]
    patches = [height * width // settings["patch"] ** 2 for height, width in sizes]
    weights = [rng.standard_normal((2, n, settings["d"])).astype(np.float32) for N in patches for n in (1, N)]

    def problem(regime: str, tensors: Mapping[str, np.ndarray]) -> Problem:
        return Problem(name, regime, pair, tensors, [*images, *weights], {}, ("float64", "float32"))

    return module, problem


# ------------------------------------------------------------------------------------------------ controls


@contextlib.contextmanager
def _eps(module: Any) -> Iterator[None]:
    for part in module.modules():
        if hasattr(part, "eps"):
            part.eps = part.eps / 10
    yield


def _gelu(module: Any) -> Any:
    from torch.nn import functional

    from parity.checks._encoders import replaced

    right = functional.gelu
    return replaced(functional, "gelu", lambda x, approximate: right(x, approximate="tanh"))


def _positions(mode: str, **how: Any) -> Any:
    """Positions of other sizes by torch's own interpolation."""

    def within(module: Any) -> Any:
        import torch

        import omni_torch.vision_encoder
        from parity.checks._encoders import replaced

        def resize(pos, grid, new_grid):
            if tuple(grid) == tuple(new_grid):
                return pos
            table = pos[:, 1:].reshape(1, *grid, -1).permute(0, 3, 1, 2)
            table = torch.nn.functional.interpolate(table, size=new_grid, mode=mode, **how)
            return torch.cat([pos[:, :1], table.flatten(2).transpose(1, 2)], dim=1)

        return replaced(omni_torch.vision_encoder, "resize_positions", resize)

    return within


def _exchange(first: int, second: int) -> Any:
    def change(weights: dict[str, np.ndarray]) -> None:
        for name in weights:
            if "in_proj" in name:
                parts = np.split(weights[name], 3)
                parts[first], parts[second] = parts[second], parts[first]
                weights[name] = np.concatenate(parts)

    return change


def _swap(weights: dict[str, np.ndarray]) -> None:
    weights["proj.weight"] = weights["proj.weight"].swapaxes(2, 3)


def _colours(inputs: list[np.ndarray]) -> None:
    for i, x in enumerate(inputs):
        inputs[i] = x[:, ::-1] if x.ndim == 4 else x


def bugs() -> dict[str, Any]:
    """What CONTROLS names, as `Bug`s."""
    from parity.checks._encoders import Bug

    other = tuple(f"{height}x{width}:grid" for _, sizes in CONFIGS.values() for height, width in sizes[1:])
    return {
        "eps 1e-6": Bug(within=_eps),
        "tanh GELU": Bug(within=_gelu),
        "patches transposed": Bug(weights=_swap),
        "colours reversed": Bug(inputs=_colours),
        "q, k, v in another order": Bug(weights=_exchange(1, 2)),
        "bilinear positions": Bug(within=_positions("bilinear", align_corners=False), seen=other),
        "corners aligned": Bug(within=_positions("bicubic", align_corners=True), seen=other),
        "positions averaged": Bug(within=_positions("bicubic", align_corners=False, antialias=True), seen=other),
    }


CONTROLS = {
    **SIMPLE,
    "eps 1e-6": "LayerNorm's and RMSNorm's eps a tenth of what it is",
    "tanh GELU": "GELU's tanh approximation for the exact one",
    "patches transposed": "rows and columns of the pixels of a patch exchanged",
    "colours reversed": "blue, green, red",
    "q, k, v in another order": "the fused projection read as q, v, k",
    "bilinear positions": "positions of another size interpolated linearly",
    "corners aligned": "positions of another size with align_corners=True",
    "positions averaged": "positions of a smaller size averaged (antialias), as pictures are",
}


def run(scope: Scope, progress: Progress) -> CheckResult:
    """Judge outputs, taps and gradients of every problem of `scope`."""
    from parity.checks._encoders import controls, judged, judged_rows

    started = time.perf_counter()
    result, seen = CheckResult("vision-encoder"), []
    for problem, case in judged(problems(scope), scope, PRECISIONS, progress):
        seen.append((problem, case))
        result.rows += judged_rows("vision-encoder", case)
    if scope.controls:
        result.controls = controls(seen, bugs())
    result.seconds = time.perf_counter() - started
    return result
