"""The CTC loss of both twins and its gradient, against each other, torch's own and optax's.

Shapes: B batch, T frames, N symbols, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from parity.checks import Progress, Scope
from parity.checks._encoders import SIMPLE
from parity.result import CheckResult, Row
from parity.verdict import Verdict

__all__ = ["BLIND", "CLAIM", "CONTROLS", "PRECISIONS", "bugs", "problem", "refusals", "run", "third_parties"]

CLAIM = (
    "Both ctc_loss give the same loss of every clip and the same gradient of every logit, with the blank first and "
    "last, for targets with equal neighbours, without symbols, and that just fit, and clips of unequal length; in "
    "float64 torch.nn.functional.ctc_loss and optax.ctc_loss give them too. A target that its frames cannot spell is "
    "refused, and where values cannot be looked at it is infinity with a gradient of 0, in both."
)
BLIND = (
    "Clips beyond {frames} frames and vocabularies beyond {symbols} symbols; logits in bfloat16, which are computed "
    "with in float32; in the default run JAX compiled in float64 (its program is evaluated; --full compiles it)."
)
PRECISIONS = ("float64", "float32")
T, V = 9, 7
TARGETS = ([2, 4, 1, 5], [3, 3, 3], [], [5, 1, 1, 2], [4], [2, 3, 2, 3], [1, 1, 2, 2])
FRAMES = (9, 6, 4, 5, 1, 8, 5)
"""Equal neighbours; none at all; one that just fits; one frame; loud logits; one that does not fit: it needs 6."""
LOUD, UNSPELT = 5, 6
BLANKS = {"blank:first": 0, "blank:last": V - 1}
BLIND = BLIND.format(frames=T, symbols=V)


def problem(seed: int) -> Any:
    """Both losses over the clips, with the logits as the parameters."""
    import torch

    import omni_jax.ctc
    import omni_torch.ctc
    from parity.checks._encoders import Problem, replaced
    from parity.pair import Pair
    from parity.weights import Link

    def ours(params, targets, frames, lengths, weight):
        given = (params["logits"], targets, frames, lengths)
        return {name: omni_jax.ctc.ctc_loss(*given, blank=blank) for name, blank in BLANKS.items()}

    def theirs(params, targets, frames, lengths, weight):
        given = (params["logits"], targets, frames, lengths)
        # JAX's is inside jit, where no value is looked at; torch's must not look either.
        with replaced(torch.compiler, "is_compiling", lambda: True):
            return {name: omni_torch.ctc.ctc_loss(*given, blank=blank) for name, blank in BLANKS.items()}

    def loss(out, targets, frames, lengths, weight):
        return sum((out[name] * weight[i]).sum() for i, name in enumerate(BLANKS))

    rng = np.random.default_rng([seed, 79])
    logits = 1.5 * rng.standard_normal((len(FRAMES), T, V))
    logits[LOUD] *= 20.0
    pair = Pair(
        jax=ours,
        torch=theirs,
        template={"logits": logits.astype(np.float32)},
        links=[Link("logits", "logits")],
        loss=(loss, loss),
        taps={},
        name="ctc",
        hasty=True,
    )
    targets = np.zeros((len(TARGETS), max(map(len, TARGETS))), np.int32)
    for row, symbols in zip(targets, TARGETS):
        row[: len(symbols)] = symbols
    weight = rng.uniform(0.5, 1.5, (len(BLANKS), len(FRAMES))).astype(np.float32)
    inputs = [targets, np.array(FRAMES, np.int32), np.array([len(x) for x in TARGETS], np.int32), weight]
    return Problem("ctc", "", pair, {"logits": logits.astype(np.float32)}, inputs, {}, PRECISIONS)


# ------------------------------------------------------------------------------------------------ third parties


def third_parties(problem: Any) -> dict[str, dict[str, np.ndarray]]:
    """party -> the outputs that the pair has, in float64, of the clips that can be spelt; JAX's by the interpreter."""
    return {"torch.nn.functional.ctc_loss": _torch(problem), "optax.ctc_loss": _optax(problem)}


def _torch(problem: Any) -> dict[str, np.ndarray]:
    import torch

    targets, frames, lengths, weight = (torch.from_numpy(np.array(x)) for x in problem.inputs)
    logits = torch.from_numpy(problem.weights["logits"].astype(np.float64)).requires_grad_()
    logp = torch.log_softmax(logits, -1).transpose(0, 1)
    rows = slice(0, UNSPELT)
    found: dict[str, np.ndarray] = {}
    total = logits.new_zeros(())
    for i, (name, blank) in enumerate(BLANKS.items()):
        losses = torch.nn.functional.ctc_loss(
            logp[:, rows], targets[rows].long(), frames[rows].long(), lengths[rows].long(), blank, reduction="none"
        )
        found[name] = losses.detach().numpy()
        total = total + (losses * weight[i, rows]).sum()
    (gradient,) = torch.autograd.grad(total, logits)
    return found | {"gradient logits": gradient.numpy()[rows]}


def _optax(problem: Any) -> dict[str, np.ndarray]:
    import jax
    import jax.numpy as jnp
    import optax

    from parity.noise import measure_program, trace

    targets, frames, lengths, weight = (x[..., :UNSPELT] if x.ndim == 2 and len(x) == 2 else x[:UNSPELT]
                                        for x in problem.inputs)  # fmt: skip

    def program(logits):
        def losses(logits):
            silent = (jnp.arange(T)[None] >= frames[:, None]).astype(logits.dtype)
            unused = (jnp.arange(targets.shape[1])[None] >= lengths[:, None]).astype(logits.dtype)
            out = {n: optax.ctc_loss(logits, silent, targets, unused, blank_id=b) for n, b in BLANKS.items()}
            return sum(jnp.sum(out[n] * weight[i]) for i, n in enumerate(BLANKS)), out

        gradient, out = jax.grad(losses, has_aux=True)(logits)
        return out | {"gradient logits": gradient}

    logits = problem.weights["logits"][:UNSPELT].astype(np.float64)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax needs both
        traced = trace(program, (logits,), "float64")
    model = measure_program(traced, (logits,), draws=2, kappa=False)
    return jax.tree.unflatten(model.tree, model.reference)


def refusals() -> dict[str, str]:
    """What each twin says of the target that does not fit, outside jit; empty if it takes it."""
    import jax.numpy as jnp
    import torch

    import omni_jax.ctc
    import omni_torch.ctc

    said = {}
    symbols, frames = np.array([TARGETS[UNSPELT]], np.int32), np.array([FRAMES[UNSPELT]], np.int32)
    given = (np.zeros((1, T, V), np.float32), symbols, frames, np.array([symbols.size], np.int32))
    sides: Any = {
        "jax": (omni_jax.ctc.ctc_loss, jnp.asarray),
        "torch": (omni_torch.ctc.ctc_loss, torch.from_numpy),
    }
    for side, (call, array) in sides.items():
        said[side] = ""
        try:
            call(*(array(x) for x in given))
        except ValueError as error:
            said[side] = str(error)
    return said


def _refusal_row(said: Mapping[str, str]) -> Row:
    silent = [side for side, words in said.items() if "frames" not in words]
    fine = not silent and len(set(said.values())) == 1
    words = "both refuse it, in the same words" if fine else f"taken, or refused otherwise: {', '.join(silent or said)}"
    return Row(
        "ctc", "ctc", "", "exact", "a target that does not fit", Verdict.AGREE if fine else Verdict.DIFFER, words
    )


# ------------------------------------------------------------------------------------------------ controls


def _blank(module: Any) -> Any:
    import omni_torch.ctc
    from parity.checks._encoders import replaced

    right = omni_torch.ctc.ctc_loss
    return replaced(omni_torch.ctc, "ctc_loss", lambda *given, blank: right(*given, blank=V - 1 - blank))


def _neighbours(module: Any) -> Any:
    import torch

    import omni_torch.ctc
    from parity.checks._encoders import replaced

    right = omni_torch.ctc._shift

    def shift(x, by, fill):
        return torch.full_like(x, fill) if by == 2 and not x.is_floating_point() else right(x, by, fill)

    return replaced(omni_torch.ctc, "_shift", shift)


def _one_frame_on(weights: dict[str, np.ndarray]) -> None:
    weights["logits"] = np.roll(weights["logits"], 1, axis=1)


def _every_frame(inputs: list[np.ndarray]) -> None:
    inputs[1] = np.full_like(inputs[1], T)


def _per_symbol(module: Any) -> Any:
    import omni_torch.ctc
    from parity.checks._encoders import replaced

    right = omni_torch.ctc.ctc_loss
    return replaced(
        omni_torch.ctc, "ctc_loss", lambda *given, blank: right(*given, blank=blank) / given[3].clamp(min=1)
    )


def bugs() -> dict[str, Any]:
    """What CONTROLS names beside the simple ones, as `Bug`s."""
    from parity.checks._encoders import Bug

    return {
        "blank at the other end": Bug(within=_blank),
        "equal neighbours without a blank": Bug(within=_neighbours),
        "one frame on": Bug(weights=_one_frame_on),
        "lengths forgotten": Bug(inputs=_every_frame),
        "divided by symbols": Bug(within=_per_symbol),
    }


CONTROLS = {
    **{name: SIMPLE[name] for name in ("zeros", "sign flipped", "another tensor")},
    "blank at the other end": "the last symbol is the blank where it is the first, and the other way round",
    "equal neighbours without a blank": "a path may go from a symbol to an equal one without a blank between",
    "one frame on": "every clip one frame later",
    "lengths forgotten": "the frames behind a clip are read",
    "divided by symbols": "torch's mean: each loss divided by the length of its target",
}


def run(scope: Scope, progress: Progress) -> CheckResult:
    """Judge losses and gradients; then those of torch and optax against ours."""
    from parity.checks._encoders import controls, judged, row_of

    started = time.perf_counter()
    result, seen = CheckResult("ctc"), []
    made = problem(scope.seed)
    for _, case in judged([made], scope, PRECISIONS, progress):
        seen.append((made, case))
        result.rows += case.main.rows("ctc", case.config, case.regime)
        if case.precision != "float64":
            continue
        for party, outputs in third_parties(made).items():
            for name, theirs in outputs.items():
                _, _, reference, noise = case.main.values[name]
                sigma = noise.sigma[:UNSPELT]
                if name not in BLANKS:  # they go by α + β − loss, of which each rounds as the loss does
                    losses = np.sum([case.main.values[k][2][:UNSPELT] for k in BLANKS], axis=0)
                    sigma = np.where(sigma > 0, sigma + losses[:, None, None], 0.0)
                noise = replace(noise, sigma=sigma)
                fields = {"config": case.config, "regime": case.regime}
                result.rows.append(
                    row_of("ctc", f"{party}: {name}", theirs, reference[:UNSPELT], noise, "float64", **fields)
                )
    result.rows.append(_refusal_row(refusals()))
    if scope.controls:
        result.controls = controls(seen, bugs())
    result.seconds = time.perf_counter() - started
    return result
