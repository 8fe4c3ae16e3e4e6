"""Clean draws of the checks: another seed, other sizes and settings, other weights, and the check run as it is.

A check holds its problem in constants of its module (sizes, configurations, recipes). `settings` draws others for them,
`run` puts them there for the time of one run. Nothing that a check claims is changed, so every alarm is a false one.
Constants are drawn inside what the check says that it looks at: what its BLIND or a comment excludes is left out.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from parity import checks
from parity.checks import Scope
from parity.result import CheckResult

__all__ = ["CHECKS", "RUNS", "in_full", "run", "settings"]

RUNS = {
    "decode": 3,
    "sampling": 6,
    "autodiff": 7,
    "data": 4,
    "dropout": 3,
    "accumulation": 4,
    "adamw": 4,
    "recipe": 8,
    "trajectory": 3,
    "initializers": 3,
    "mel": 7,
    "image": 7,
    "ctc": 6,
    "audio-encoder": 4,
    "vision-encoder": 4,
    "fusion": 8,
    "omni": 3,
    "tokenizer": 4,
    "checkpoint": 3,
}
"""How many seeds each set of constants is run with: compiled programs are kept, so more where a run is cheap."""
CHECKS = tuple(RUNS)
"""Those that a draw runs as they are. logits and gradients are in the draws of the twins (parity.calibrate)."""
OF_WEIGHTS = ("decode", "dropout", "accumulation", "audio-encoder", "vision-encoder", "omni")
"""Checks of models with weights: fresh ones, or all of them away from their initial values."""
SEEDLESS = ("tokenizer", "checkpoint")
"""Checks that a seed says nothing to: each of their runs has constants of its own."""
WHOLE = ("mel", "image", "ctc", "audio-encoder", "vision-encoder", "omni")
"""Checks that some of the draws run as --full does: JAX compiled in float64, bfloat16 where there is any."""
Rng = np.random.Generator


def in_full(check: str, variant: int, number: int) -> bool:
    """Does run `number` of a set of constants look at what --full looks at?"""
    return check in WHOLE and variant % 4 == 1 and number == 0


def settings(check: str, variant: int, seed: int = 0) -> dict[str, Any]:
    """Set `variant` of the constants of a check, by name ("module.NAME" of another module in parity.checks)."""
    rng = np.random.default_rng([seed, 13, CHECKS.index(check), variant])
    return _DRAWN[check](rng)


def run(check: str, constants: Mapping[str, Any], regime: str, seed: int, full: bool = False) -> CheckResult:
    """The result of one run without its controls; what it raises is its `error`, as in a run of `parity run`."""
    import torch

    module = checks.load(check)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_fresh_caches())
        for name, value in constants.items():
            stack.enter_context(_constant(module, name, value))
        if check in OF_WEIGHTS and regime == "fresh":
            stack.enter_context(_fresh_weights())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(seed)
        try:
            return module.run(Scope(seed=seed, controls=False, full=full), lambda *_: None)
        except Exception as error:
            return CheckResult(check, error=f"{type(error).__name__}: {' '.join(str(error).split())}")


@contextlib.contextmanager
def _constant(module: Any, name: str, value: Any) -> Iterator[None]:
    """`value` in the constant's place; a function is handed what stands there now, and gives what shall."""
    from parity.checks._encoders import replaced

    where, _, name = name.rpartition(".")
    owner = importlib.import_module(f"parity.checks.{where}") if where else module
    with replaced(owner, name, value(getattr(owner, name)) if callable(value) else value):
        yield


@contextlib.contextmanager
def _fresh_caches() -> Iterator[None]:
    """What checks keep is kept by seed, and knows nothing of other constants."""

    def clear() -> None:
        for name, module in list(sys.modules.items()):
            if name.startswith("parity.checks."):
                for value in list(vars(module).values()):
                    if callable(getattr(value, "cache_clear", None)):
                        value.cache_clear()

    clear()
    try:
        yield
    finally:
        clear()


@contextlib.contextmanager
def _fresh_weights() -> Iterator[None]:
    """Freshly initialised weights where a check would take random ones."""
    from parity import fixtures
    from parity.checks import _encoders
    from parity.checks._encoders import replaced

    def of_module(module: Any, seed: int) -> dict[str, np.ndarray]:
        return {name: parameter.detach().numpy().copy() for name, parameter in module.named_parameters()}

    with replaced(fixtures, "random_weights", fixtures._fresh), replaced(_encoders, "random_tensors", of_module):
        yield


# ------------------------------------------------------------------------------------------------ what is drawn


def _of(rng: Rng, *values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def _whole(rng: Rng, low: int, high: int) -> int:
    """From `low` to `high`, both included."""
    return int(rng.integers(low, high + 1))


def _heads(rng: Rng, most: int = 4) -> dict[str, int]:
    """d_model and n_heads, with an even head size."""
    heads = _whole(rng, 1, most)
    return {"d_model": heads * 2 * _whole(rng, 2, 6), "n_heads": heads}


def _thinker(rng: Rng, **more: Any) -> dict[str, Any]:
    """Sizes of a small ThinkerLM; grouped heads in every second one."""
    made = {"vocab_size": _whole(rng, 17, 40), **_heads(rng), "d_ff": _whole(rng, 8, 30)}
    if rng.random() < 0.5:
        groups = [k for k in range(1, made["n_heads"] + 1) if made["n_heads"] % k == 0]
        made |= {"use_gqa": True, "kv_groups": _of(rng, *groups)}
    return {**made, "use_swiglu": bool(rng.random() < 0.5), **more}


def _experts(rng: Rng) -> dict[str, Any]:
    count = _whole(rng, 2, 4)
    return {"use_moe": True, "num_experts": count, "num_experts_per_tok": 2}


def _redrawn(x: np.ndarray, sizes: Mapping[int, int], rng: Rng, rows: bool = False) -> np.ndarray:
    """Normal numbers as large as those of `x`, in its shape with other sizes; `rows`: each one by itself."""
    if not x.ndim:
        return x
    axes = tuple(range(int(rows), x.ndim))
    scale = np.sqrt(np.mean(np.square(x.astype(np.float64)), axis=axes, keepdims=True))
    shape = [n if rows and not axis else sizes.get(n, n) for axis, n in enumerate(x.shape)]
    return np.asarray(scale * rng.standard_normal(shape), np.float32)


def _sizes(rng: Rng, *usual: int) -> dict[int, int]:
    """For each of the usual sizes another one, no two alike, so that no axis stands for another."""
    most = 2 * max(usual)
    return dict(zip(usual, (int(n) for n in 2 + rng.permutation(most - 2)[: len(usual)])))


def _resized_steps(sizes: Mapping[int, int]) -> Callable[[Any], Any]:
    """Of a check's `problem`: parameters and gradients step by step, in other shapes."""

    def other(problem: Any) -> Any:
        def resized(seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
            start, grads = problem(seed)
            rng = np.random.default_rng([seed, 131])
            return (
                {name: _redrawn(x, sizes, rng) for name, x in start.items()},
                {name: _redrawn(x, sizes, rng, rows=True) for name, x in grads.items()},
            )

        return resized

    return other


def _decode(rng: Rng) -> dict[str, Any]:
    from parity.checks.decode import CASES, WINDOW, T

    layers = {"n_layers": 2, "ctx_len": T}
    configs = {
        "small gqa-swiglu": _thinker(rng, **layers) | {"use_swiglu": True},
        "small mha": _thinker(rng, **layers) | {"ctx_len": WINDOW},
        "small moe-gelu": _thinker(rng, n_layers=1, ctx_len=T, **_experts(rng)) | {"use_swiglu": False},
    }
    unequal, alone = (0, _whole(rng, 3, 6), _whole(rng, 1, 2)), (_whole(rng, 0, 1),)
    chunk, few = _whole(rng, 4, 9), _whole(rng, 2, 4)
    pads = {CASES[0].pads: unequal, CASES[-1].pads: alone}
    ways = {0: (chunk, chunk), 3: (few, 2 * few)}
    cases = []
    for i, case in enumerate(CASES):
        size, prompt = ways.get(i, (case.chunk, case.prompt))
        cases.append(
            type(case)(
                case.config, pads[case.pads], size, prompt, case.precisions, compiled=case.compiled, window=case.window
            )
        )
    return {"CONFIGS": configs, "CASES": tuple(cases)}


def _sampling(rng: Rng) -> dict[str, Any]:
    from parity.checks.sampling import SETTINGS, V

    def other(setting: Any) -> Any:
        temperature, top_p, penalty = setting.temperature, setting.top_p, setting.penalty
        return type(setting)(
            temperature=temperature if temperature in (0.0, 1.0) else round(float(rng.uniform(0.3, 1.8)), 2),
            top_k=setting.top_k if setting.top_k in (0, 1, V, V + 9) else _whole(rng, 2, 20),
            top_p=top_p if top_p in (0.0, 1.0) else _whole(rng, 1, 15) / 16,
            penalty=penalty if penalty == 1.0 else round(float(rng.uniform(0.7, 1.5)), 2),
        )

    return {"SETTINGS": tuple(map(other, SETTINGS))}


def _autodiff(rng: Rng) -> dict[str, Any]:
    sizes = _sizes(rng, 7, 5, 3, 6)

    def other(problem: Any) -> Any:
        def resized(seed: int) -> dict[str, np.ndarray]:
            draw = np.random.default_rng([seed, 137])
            return {name: _redrawn(x, sizes, draw) for name, x in problem(seed).items()}

        return resized

    return {"problem": other}


def _data(rng: Rng) -> dict[str, Any]:
    from parity.checks.data import BOS, EOS, PAD

    starts, crop = _of(rng, 8, 12, 16), _whole(rng, 2, 5)
    width = starts + crop - 1
    lengths = [_whole(rng, 5, 8)] * 2 + [2, _whole(rng, 9, 12)]
    rows = [[BOS, *rng.integers(3, 61, n - 2).tolist(), EOS] for n in lengths]
    rows[0][2] = rows[1][-2] = PAD
    rows[2] = [BOS, PAD]
    return {
        "CONFIG": _of(rng, "mha-swiglu", "gqa-swiglu", "mha-gelu"),
        "BATCH": _whole(rng, 2, 3),
        "SEQUENCES": rows,
        "STARTS": starts,
        "CROP": crop,
        "WIDTH": width,
        "CROP_LENGTHS": (1, crop, width),
    }


def _rows(rng: Rng) -> tuple[int, ...]:
    """LENGTHS of the dropout check: six rows, one without a token, and the longest twice."""
    most = _whole(rng, 5, 8)
    return (most, _whole(rng, 3, most), _whole(rng, 2, 3), 0, _whole(rng, 2, 4), most)


def _dropout(rng: Rng) -> dict[str, Any]:
    small = {
        "small mha-swiglu": _thinker(rng, n_layers=1),
        "small gqa-moe": _thinker(rng, n_layers=1, **_experts(rng)),
    }
    return {"dropout._SMALL": small, "dropout.LENGTHS": _rows(rng)}


def _accumulation(rng: Rng) -> dict[str, Any]:
    drawn = _dropout(rng)
    predicted = [max(n - 1, 0) for n in drawn["dropout.LENGTHS"]]
    first, second, third = (predicted[i] + predicted[i + 1] for i in (0, 2, 4))
    return {**drawn, "MICRO": (first, second, 0, third)}


def _adamw(rng: Rng) -> dict[str, Any]:
    # lr · decay well above 1e-5: identical roundings of a hundred decays in a row are no noise (decision 0001, Limits).
    return {
        "problem": _resized_steps(_sizes(rng, 24, 17, 40, 13)),
        "LR": round(float(np.exp(rng.uniform(np.log(2e-3), np.log(1e-2)))), 5),
        "HYPER": {
            "betas": (_of(rng, 0.8, 0.9, 0.95), _of(rng, 0.98, 0.995, 0.999)),
            "eps": _of(rng, 1e-9, 1e-8, 1e-6),
            "weight_decay": round(float(rng.uniform(0.1, 0.3)), 3),
        },
    }


def _recipe(rng: Rng) -> dict[str, Any]:
    end = _of(rng, 1000, 500, 300)
    warmup = _whole(rng, 1, end // 3)
    return {
        "problem": _resized_steps(_sizes(rng, 19, 12)),
        "RECIPE": {
            "lr": round(float(np.exp(rng.uniform(np.log(2e-3), np.log(3e-2)))), 5),
            "warmup_steps": _whole(rng, 1, 4),
            "max_steps": _whole(rng, 8, 11),
            "max_norm": round(float(rng.uniform(0.5, 2.0)), 3),
        },
        "SCHEDULES": {
            "warm-up": (warmup, end, round(float(rng.uniform(0.05, 0.5)), 3)),
            "no warm-up": (0, end, round(float(rng.uniform(0.05, 0.5)), 3)),
            "warm-up up to the last step": (end - 1, end, 0.1),
            "down to 0": (warmup, end, 0.0),
            "no descent": (warmup, end, 1.0),
        },
    }


def _trajectory(rng: Rng) -> dict[str, Any]:
    config = {**_thinker(rng), "n_layers": 1, "dropout": 0.0, "rope_theta": 10000.0, "ctx_len": 16}
    recipe = {"lr": round(float(rng.uniform(1e-2, 3e-2)), 4), "warmup_steps": _whole(rng, 3, 6), "max_steps": 50}
    return {
        "_training.CONFIG": config,
        "_training.BATCH": (_whole(rng, 3, 5), _whole(rng, 7, 11)),
        "_training.CYCLE": _whole(rng, 4, 7),
        "_training.RECIPE": {**recipe, "max_norm": round(float(rng.uniform(0.5, 1.2)), 2), "min_ratio": 0.1},
    }


def _initializers(rng: Rng) -> dict[str, Any]:
    return {
        "N_DRAWS": _of(rng, 40_000, 60_000, 80_000),
        "_FAN_IN": _whole(rng, 300, 500),
        "_FAN_OUT": _whole(rng, 200, 290),
        "_BIAS_FAN_IN": _whole(rng, 3, 9),
        "_EMBED": _whole(rng, 30, 60),
    }


def _mel(rng: Rng) -> dict[str, Any]:
    long, odd = _of(rng, 256, 400, 1024), 2 * _whole(rng, 40, 70) + 1
    scale = {"norm": _of(rng, None, "slaney"), "mel_scale": _of(rng, "htk", "slaney")}
    return {
        "SAMPLES": _whole(rng, 600, 900),
        "SHORT": _whole(rng, 25, 60),
        "SETTINGS": {
            "family": {
                "sample_rate": 16000, "n_fft": long, "hop_length": _whole(rng, 90, 200),
                "win_length": _whole(rng, 150, long), "n_mels": _whole(rng, 20, 128),
            },
            "slaney": {
                "sample_rate": _of(rng, 16000, 22050, 44100), "n_fft": _of(rng, 100, 128, 200),
                "hop_length": _whole(rng, 30, 80), "win_length": _whole(rng, 50, 100), "n_mels": _whole(rng, 8, 24),
                "f_min": 20.0, "f_max": 8000.0, "power": 1.0, "pad_mode": "constant", **scale,
            },
            "odd": {
                "sample_rate": 8000, "n_fft": odd, "hop_length": _whole(rng, 40, 80), "n_mels": _whole(rng, 6, 14),
                "power": 1.5, "center": False, "norm": "slaney",
            },
            "short": {
                "sample_rate": 8000, "n_fft": 100, "hop_length": _whole(rng, 10, 30), "n_mels": _whole(rng, 6, 14),
                "pad_mode": "constant",
            },
        },
    }  # fmt: skip


def _image(rng: Rng) -> dict[str, Any]:
    def cut(batch: int) -> tuple[int, int, int, int]:
        patch = _whole(rng, 1, 4)
        return batch, patch * _whole(rng, 1, 4), patch * _whole(rng, 1, 4), patch

    grid = (_whole(rng, 2, 5), _whole(rng, 2, 5))
    others = ((_whole(rng, 2, 8), _whole(rng, 2, 8)), (_whole(rng, 2, 4), _whole(rng, 5, 9)), (1, 1))
    return {
        "SIZE": (_whole(rng, 4, 9), _whole(rng, 9, 16)),
        "GRID": grid,
        "GRIDS": tuple(dict.fromkeys(other for other in others if other != grid)),
        "PATCHES": (cut(2), (1, 8, 4, 2)),
    }


def _ctc(rng: Rng) -> dict[str, Any]:
    most, symbols = _whole(rng, 7, 13), _whole(rng, 5, 12)

    def needed(target: list[int]) -> int:
        return len(target) + sum(a == b for a, b in itertools.pairwise(target))

    def target(length: int) -> list[int]:
        return [int(s) for s in rng.integers(1, symbols - 1, length)]

    same = _whole(rng, 1, symbols - 2)
    targets = [target(4), [same] * 3, [], target(3), target(1), target(4), [1, 1, 2, 2]]
    room = [max(needed(t), 1) for t in targets]
    frames = [most, min(most, room[1] + 1), _whole(rng, 1, most), room[3], 1, _whole(rng, room[5], most), room[6] - 1]
    return {
        "T": most,
        "V": symbols,
        "TARGETS": tuple(targets),
        "FRAMES": tuple(frames),
        "BLANKS": {"blank:first": 0, "blank:last": symbols - 1},
    }


def _audio(rng: Rng) -> dict[str, Any]:
    heads, factor = _whole(rng, 1, 3), _of(rng, 4, 8)
    made = {"d": heads * 2 * _whole(rng, 2, 5), "heads": heads, "ff": _whole(rng, 10, 30), "layers": _whole(rng, 1, 2)}
    longest = _whole(rng, 2 * factor, 3 * factor)
    return {
        "CONFIGS": {f"audio x{factor}": ({**made, "downsample_factor": factor}, ("float64", "float32"))},
        "LENGTHS": (longest, _whole(rng, factor + 1, longest)),
    }


def _vision(rng: Rng) -> dict[str, Any]:
    heads, patch, side = _whole(rng, 1, 3), _whole(rng, 2, 5), _whole(rng, 2, 4)
    made = {"d": heads * 2 * _whole(rng, 3, 6), "layers": _whole(rng, 1, 2), "heads": heads, "ff": _whole(rng, 10, 30)}
    other = (patch * _whole(rng, 1, 3), patch * _whole(rng, 4, 6))
    size = patch * side
    return {"CONFIGS": {"vit": ({"img_size": size, "patch": patch, **made}, ((size, size), other))}}


def _omni(rng: Rng) -> dict[str, Any]:
    from parity.checks.omni import FROZEN

    frames, patch = _whole(rng, 5, 8), _of(rng, 2, 4)
    thinker = {"vocab_size": 23, "n_layers": 1, "dropout": 0.1, "rope_theta": 10000.0, "ctx_len": 32}
    thinker |= {**_heads(rng), "d_ff": _whole(rng, 8, 24)}

    def encoder() -> dict[str, Any]:
        heads = _whole(rng, 1, 2)
        return {
            "heads": heads, "ff": _whole(rng, 8, 16), "layers": 1, "dropout": 0.1, "d": heads * 2 * _whole(rng, 2, 4)
        }  # fmt: skip

    sections = {
        "thinker": thinker,
        "audio": {**encoder(), "downsample_factor": 4},
        "vision": {**encoder(), "img_size": 8, "patch": patch},
    }
    return {
        "CONFIGS": {"omni": (sections, FROZEN)},
        "T": _whole(rng, 4, 7),
        "FRAMES": frames,
        "LENGTHS": (0, 0, frames, _whole(rng, 2, frames)),
    }


def _fusion(rng: Rng) -> dict[str, Any]:
    from parity.checks.fusion import CASES

    def other(case: Any) -> Any:
        lengths, more = list(case.lengths), _whole(rng, 0, 4)
        if case.ctx_len is None:
            lengths = [n and _whole(rng, 1, 9) for n in lengths]
        elif lengths[2]:
            lengths[2] += more
        ctx_len = case.ctx_len and case.ctx_len + more
        return type(case)(tuple(lengths), case.masks, case.targets, ctx_len, case.policy, case.chunks)

    return {"CASES": tuple(dict.fromkeys(map(other, CASES))), "B": _whole(rng, 2, 4), "D": _whole(rng, 1, 4)}


def _tokenizer(rng: Rng) -> dict[str, Any]:
    from parity.checks.tokenizer import TEXTS

    parts = [
        *" \n\t.,!",
        "  ",
        "the",
        "fox",
        "owl",
        "Once",
        "12",
        "é",
        "ß",
        "语",
        "שלום",
        "🦊",
        "🏳️‍🌈",
        "e\u0301",
        "<s>",
        "\0",
    ]

    def text() -> str:
        return "".join(_of(rng, *parts) for _ in range(_whole(rng, 1, 30)))

    return {"TEXTS": tuple(text() for _ in TEXTS)}


def _checkpoint(rng: Rng) -> dict[str, Any]:
    from parity.checks.checkpoint import SIZE

    heads = _of(rng, 2, 4)
    width = heads * 2 * _whole(rng, 1, 5)
    size = {"vocab_size": _whole(rng, 5, 40), "n_layers": _whole(rng, 2, 3), "d_model": width, "n_heads": heads}
    experts = {"use_moe": True, "num_experts": _whole(rng, 2, 3)}
    kinds = {"fused": {}, "grouped, experts": {"use_gqa": True, "kv_groups": _of(rng, 1, heads // 2), **experts}}
    return {"SIZE": {**SIZE, **size, "d_ff": width}, "KINDS": kinds}


_DRAWN: dict[str, Callable[[Rng], dict[str, Any]]] = {
    "decode": _decode,
    "sampling": _sampling,
    "autodiff": _autodiff,
    "data": _data,
    "dropout": _dropout,
    "accumulation": _accumulation,
    "adamw": _adamw,
    "recipe": _recipe,
    "trajectory": _trajectory,
    "initializers": _initializers,
    "mel": _mel,
    "image": _image,
    "ctc": _ctc,
    "audio-encoder": _audio,
    "vision-encoder": _vision,
    "fusion": _fusion,
    "omni": _omni,
    "tokenizer": _tokenizer,
    "checkpoint": _checkpoint,
}
