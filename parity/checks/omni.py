"""OmniLM of both twins on a batch whose rows have a picture, a clip, both or neither: logits, gradients, frozen parts.

Shapes: B batch, T text tokens, N fused length, V vocabulary, H height, W width, F mel frames, M mel bands.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from parity.checks import Progress, Scope
from parity.checks._encoders import SIMPLE
from parity.result import CheckResult, Control, Row
from parity.verdict import Verdict

__all__ = ["BLIND", "CLAIM", "CONFIGS", "CONTROLS", "FROZEN", "PRECISIONS", "bugs", "problems", "run", "steps"]

CLAIM = (
    "On the same weights both OmniLMs give the same logits and the same loss for a batch whose rows have a picture, a "
    "clip, both or neither, with padded texts and clips of unequal length, and the same gradient of every tensor that "
    "is trained, the encoders being frozen; and after a step of AdamW with weight decay the frozen tensors are what "
    "they were, bit by bit, and every other one has moved."
)
BLIND = (
    "Training mode; generation; checkpoints; larger models; gradients in bfloat16; in the default run gradients of the "
    "encoders (the checks audio-encoder and vision-encoder look at them), a row alone, bfloat16, and JAX compiled in "
    "float64 (its program is evaluated): --full looks at all of these."
)
PRECISIONS = ("float64", "float32", "bfloat16")
FROZEN = ("audio_encoder", "vision_encoder")
T, FRAMES, SIDE, BANDS = 5, 6, 8, 128
_THINKER: dict[str, Any] = {
    "vocab_size": 23, "n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 20, "dropout": 0.1, "rope_theta": 10000.0,
    "ctx_len": 32,
}  # fmt: skip
_ENCODER: dict[str, Any] = {"heads": 2, "ff": 12, "layers": 1, "dropout": 0.1}
CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "omni": (
        {
            "thinker": _THINKER,
            "audio": {**_ENCODER, "d": 8, "downsample_factor": 4},
            "vision": {**_ENCODER, "d": 8, "img_size": SIDE, "patch": 4},
        },
        FROZEN,
    ),
    "omni, all trained": (
        {
            "thinker": {**_THINKER, "n_layers": 2, "use_gqa": True, "kv_groups": 1},
            "audio": {**_ENCODER, "d": 12, "downsample_factor": 4},
            "vision": {**_ENCODER, "d": 12, "img_size": 2 * SIDE, "patch": 4},
        },
        (),
    ),
}
"""Sections, and what is frozen; encoders of one width, or a projector in the other's place would be a shape that does
not fit. --full looks at all."""
HAS_IMAGE, HAS_AUDIO = np.array([False, True, False, True]), np.array([False, False, True, True])
LENGTHS = (0, 0, FRAMES, 3)
LR, DECAY = 1e-2, 0.1
BEHIND = 1e3
"""What stands where a row lacks something: read by anything, it would be seen."""


def problems(scope: Scope) -> list[Any]:
    """The models and batches that `scope` asks for."""
    return [_problem(name, scope.seed, scope.full) for name in (CONFIGS if scope.full else list(CONFIGS)[:1])]


def batch(seed: int) -> list[np.ndarray]:
    """tokens, targets, attention_mask, images, mel, mel_lengths, has_image, has_audio; BEHIND where nothing is."""
    rng = np.random.default_rng([seed, 109])
    B = len(HAS_IMAGE)
    mask = np.ones((B, T), bool)
    mask[1, :2] = mask[3, -1:] = False
    tokens = rng.integers(1, _THINKER["vocab_size"], (B, T))
    targets = np.where(mask, np.roll(tokens, -1, axis=1), 0)
    targets[:, -1] = 0
    images = rng.random((B, 3, SIDE, SIDE))
    images[~HAS_IMAGE] = BEHIND
    mel = 0.5 * rng.standard_normal((B, FRAMES, BANDS))
    mel[np.arange(FRAMES) >= np.array(LENGTHS)[:, None]] = BEHIND
    whole = [np.where(mask, tokens, 0).astype(np.int32), targets.astype(np.int32), mask]
    return [
        *whole,
        images.astype(np.float32),
        mel.astype(np.float32),
        np.array(LENGTHS, np.int32),
        HAS_IMAGE,
        HAS_AUDIO,
    ]


def _given(inputs: Any) -> dict[str, Any]:
    names = ("attention_mask", "images", "mel", "mel_lengths", "has_image", "has_audio")
    return dict(zip(names, inputs))


def _problem(name: str, seed: int, full: bool) -> Any:
    import jax
    import torch
    from flax import nnx

    import omni_jax.fusion
    import omni_jax.omni_config
    import omni_torch.fusion
    import omni_torch.omni_config
    from parity.checks._encoders import Problem, random_tensors, replaced
    from parity.pair import pair_of
    from parity.weights import leaf_names, under_torch_names

    sections, frozen = CONFIGS[name]
    config = omni_torch.omni_config.OmniConfig.from_dict(sections)
    module = omni_torch.fusion.OmniLM(config).eval()
    fields = omni_jax.omni_config.OmniConfig.from_dict(sections)
    abstract = nnx.eval_shape(lambda: omni_jax.fusion.OmniLM(fields, rngs=nnx.Rngs(0)))
    abstract.eval()
    graphdef, template, rest = nnx.split(abstract, nnx.Param, ...)

    def ours(params, tokens, targets, *inputs):
        trained, kept = omni_jax.fusion.split_frozen(params, frozen)

        def objective(trained):
            net, seen = nnx.merge(graphdef, trained, kept, rest), []
            right = omni_jax.fusion.cross_entropy
            # The logits that the loss is taken of: to trace the model once more costs as much again.
            watch = lambda logits, targets: right((seen.append(logits), logits)[1], targets)  # noqa: E731
            with replaced(omni_jax.fusion, "cross_entropy", watch):
                loss = net.loss(tokens, targets, **_given(inputs))
            return loss, seen[0]

        (loss, logits), gradients = jax.value_and_grad(objective, has_aux=True)(trained)
        out = {"loss": loss, "logits": logits}
        if full:
            net = nnx.merge(graphdef, params, rest)
            out |= {"called": net(tokens, **_given(inputs)), "row alone": net.thinker(tokens[:1])}
        names = set(leaf_names(gradients))
        links = [link for link in pair.links if link.jax in names]
        return out | {f"gradient {k}": v for k, v in under_torch_names(links, gradients).items()}

    def forward(net, tokens, targets, *inputs):
        given = _given(inputs)
        return {"loss": net.loss(tokens, targets, **given), "logits": net(tokens, **given)}

    def theirs(net, tokens, targets, *inputs):
        trained, _ = omni_torch.fusion.split_frozen(dict(net.named_parameters()), frozen)
        with torch.enable_grad():
            loss = net.loss(tokens, targets, **_given(inputs))
            gradients = torch.autograd.grad(loss, list(trained.values()))
        out = forward(net, tokens, targets, *inputs)
        if full:
            out |= {"called": out["logits"], "row alone": net.thinker(tokens[:1])}
        return out | {f"gradient {k}": v for k, v in zip(trained, gradients)}

    pair = pair_of(ours, module, template, torch_call=theirs, name=name)
    pair.hasty = True
    same = {
        "row alone": lambda reference: reference["logits"][:1, -T:],
        "called": lambda reference: reference["logits"],
    }
    weights = random_tensors(module, seed)
    return Problem(name, "", pair, weights, batch(seed), same if full else {}, ("float64", "float32"), forward)


# ------------------------------------------------------------------------------------------------ a step


def steps(
    problem: Any, gradients: Mapping[str, np.ndarray], frozen: tuple[str, ...] | None = None
) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """side -> name -> (before, after) a step of AdamW with weight decay, in float32, each twin's own split and step.

    The optimizer gets all but `frozen` (None: the config's); what is without a gradient here has one of 0.
    """
    frozen = CONFIGS[problem.config][1] if frozen is None else frozen
    return {"jax": _jax_step(problem, gradients, frozen), "torch": _torch_step(problem, gradients, frozen)}


def _jax_step(
    problem: Any, gradients: Mapping[str, np.ndarray], frozen: tuple[str, ...]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    import jax
    from flax import nnx

    from omni_jax.fusion import split_frozen
    from omni_jax.optim import adamw_step, init_adamw_state
    from parity.noise import measure_program, trace
    from parity.weights import to_torch

    zeros = {name: np.zeros_like(x) for name, x in problem.weights.items()}
    params = problem.pair.jax_params(problem.weights)
    slopes, _ = split_frozen(problem.pair.jax_params({**zeros, **gradients}), frozen)

    def step(params, slopes):
        trained, kept = split_frozen(params, frozen)
        trained, _ = adamw_step(trained, slopes, init_adamw_state(trained), LR, weight_decay=DECAY)
        return nnx.merge_state(trained, kept)

    # Evaluated, not compiled: movement is exact in both.
    model = measure_program(trace(step, (params, slopes), "float64"), (params, slopes), draws=2, kappa=False)
    after = to_torch(problem.pair.links, jax.tree.unflatten(model.tree, model.reference))
    return {name: (x.astype(np.float64), after[name]) for name, x in problem.weights.items()}


def _torch_step(
    problem: Any, gradients: Mapping[str, np.ndarray], frozen: tuple[str, ...]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    import torch

    from omni_torch import fusion
    from omni_torch.optim import AdamW

    module = copy.deepcopy(problem.pair.torch)
    params = dict(module.named_parameters())
    for name, parameter in params.items():
        parameter.data = torch.from_numpy(problem.weights[name].copy())
        slope = gradients.get(name, np.zeros(parameter.shape))
        parameter.grad = torch.from_numpy(np.array(slope, np.float32))
    trained, _ = fusion.split_frozen(params, frozen)
    AdamW(trained.values(), lr=LR, weight_decay=DECAY).step()
    return {name: (problem.weights[name], x.detach().numpy()) for name, x in module.named_parameters()}


def step_rows(problem: Any, found: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]) -> list[Row]:
    """One row a tensor: frozen ones with every bit in both twins, the others moved in both."""
    rows = []
    frozen = tuple(f"{name}." for name in CONFIGS[problem.config][1])
    for name, value in problem.weights.items():
        still = bool(frozen) and name.startswith(frozen)
        same = {
            side: before.tobytes() == after.tobytes()
            for side, pairs in found.items()
            for before, after in [pairs[name]]
        }
        wrong = [side for side, equal in same.items() if equal is not still]
        fine, words = ("every bit as before", "moved") if still else ("moved", "not moved")
        verdict = Verdict.DIFFER if wrong else Verdict.AGREE
        words = f"{' and '.join(wrong)}: {words}" if wrong else fine
        fields = {"shape": value.shape, "excess": np.inf if wrong else 0.0}
        label = f"{'frozen' if still else 'trained'} {name}, after a step"
        rows.append(Row("omni", problem.config, "", "exact", label, verdict, words, **fields))
    return rows


# ------------------------------------------------------------------------------------------------ controls


def _every(index: int) -> Any:
    """Input `index` says yes to every row."""

    def change(inputs: list[np.ndarray]) -> None:
        inputs[index] = np.ones_like(inputs[index])
        inputs[5] = np.maximum(inputs[5], 1)

    return change


def _every_frame(inputs: list[np.ndarray]) -> None:
    inputs[5] = np.full_like(inputs[5], FRAMES)


def _exchanged(inputs: list[np.ndarray]) -> None:
    for i in (3, 4, 5):
        inputs[i] = inputs[i][[0, 3, 3, 1]] if i == 3 else inputs[i][[0, 1, 3, 2]]


def _swapped(weights: dict[str, np.ndarray]) -> None:
    for part in ("weight", "bias"):
        audio, vision = f"proj_a.{part}", f"proj_v.{part}"
        weights[audio], weights[vision] = weights[vision], weights[audio]


def _padding_seen(inputs: list[np.ndarray]) -> None:
    inputs[2] = np.ones_like(inputs[2])


@contextlib.contextmanager
def _eps(module: Any) -> Iterator[None]:
    for part in module.vision_encoder.modules():
        if hasattr(part, "eps"):
            part.eps = part.eps / 10
    yield


def _text_first(module: Any) -> Any:
    import omni_torch.fusion
    from parity.checks._encoders import replaced

    right = omni_torch.fusion.fuse

    def fuse(*given, **named):
        fused = right(*given, **named)
        order = [*range(fused.embeddings.shape[1])][::-1]
        return fused._replace(embeddings=fused.embeddings[:, order], attention_mask=fused.attention_mask[:, order])

    return replaced(omni_torch.fusion, "fuse", fuse)


def _every_position(module: Any) -> Any:
    """Positions count every place of the fused sequence, those that a row lacks too."""
    import torch

    import omni_torch.thinker
    from parity.checks._encoders import replaced

    right = omni_torch.thinker.rope_frequencies

    def frequencies(positions, *given):
        at = torch.arange(positions.shape[-1], device=positions.device)
        return right(at.expand(positions.shape), *given)

    return replaced(omni_torch.thinker, "rope_frequencies", frequencies)


def bugs() -> dict[str, Any]:
    """What CONTROLS names beside the simple ones and the frozen one, as `Bug`s."""
    from parity.checks._encoders import Bug

    both = ("logits", "loss")
    return {
        "missing pictures seen": Bug(inputs=_every(6), seen=both),
        "missing clips seen": Bug(inputs=_every(7), seen=both),
        "frames behind a clip seen": Bug(inputs=_every_frame, seen=both),
        "another row's picture": Bug(inputs=_exchanged, seen=both),
        "projectors swapped": Bug(weights=_swapped, seen=both),
        "padding seen": Bug(inputs=_padding_seen, seen=both),
        "positions of missing vectors counted": Bug(within=_every_position, seen=both),
        "sequence reversed": Bug(within=_text_first, seen=both),
        "LayerNorm's eps 1e-6": Bug(within=_eps, seen=both),
    }


CONTROLS = {
    **SIMPLE,
    "missing pictures seen": "rows without a picture attend to one",
    "missing clips seen": "rows without a clip attend to one",
    "frames behind a clip seen": "every clip counts as long as the longest",
    "another row's picture": "pictures and clips in other rows than theirs",
    "projectors swapped": "what is seen goes through the projector of what is heard, and the other way round",
    "padding seen": "the text's padding is attended to",
    "positions of missing vectors counted": "RoPE's positions count what a row lacks",
    "sequence reversed": "text, audio, image, each from its end",
    "LayerNorm's eps 1e-6": "the picture's encoder has flax's default",
    "frozen part decayed": "AdamW gets the frozen tensors too, without a gradient: weight decay alone",
}


def _decayed(problem: Any, gradients: Mapping[str, np.ndarray]) -> Control:
    rows = step_rows(problem, steps(problem, gradients, frozen=()))
    frozen = [row for row in rows if row.name.startswith("frozen")]
    seen = [row for row in frozen if row.evidence.startswith("jax and torch: ")]
    words = f"{problem.config}: rejected on {len(seen)} of {len(frozen)} tensors, in both twins"
    return Control("frozen part decayed", bool(frozen) and seen == frozen, words)


def run(scope: Scope, progress: Progress) -> CheckResult:
    """Judge logits, loss and gradients of every problem of `scope`, and look at a step of AdamW."""
    from parity.checks._encoders import controls, judged, judged_rows
    from parity.checks._steps import merge

    started = time.perf_counter()
    result, seen, stepped = CheckResult("omni"), [], {}
    for problem, case in judged(problems(scope), scope, PRECISIONS, progress):
        seen.append((problem, case))
        result.rows += judged_rows("omni", case)
        if problem.config not in stepped:
            known = {
                k.removeprefix("gradient "): v[1] for k, v in case.main.values.items() if k.startswith("gradient ")
            }
            gradients = {k: v.astype(np.float32) for k, v in known.items()}
            stepped[problem.config] = problem, gradients
            result.rows += step_rows(problem, steps(problem, gradients))
    if scope.controls:
        result.controls = controls(seen, bugs())
        result.controls += merge([_decayed(*found) for found in stepped.values() if CONFIGS[found[0].config][1]])
    result.seconds = time.perf_counter() - started
    return result
