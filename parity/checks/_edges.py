"""What noise units do not see in a model: refused token ids, narrow targets, and how often a layer rounds in bfloat16.

Shapes: N rows, D model, T positions, C = d/2 channel pairs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from parity.checks import Scope
from parity.precision import unit_roundoff
from parity.result import Control, Row, row_from_judgement
from parity.verdict import Noise, Verdict, accepts, judge_tensor

__all__ = ["edges"]

V, D, N = 11, 32, 64
OUTSIDE = (-1, V, V + 7, -V, 2**31 - 1)


def edges(scope: Scope) -> tuple[list[Row], list[Control]]:
    """Of the layers by themselves, whatever the configurations are."""
    rows, controls = [*_out_of_range(), _int32_targets(), _no_such_target()], []
    if "bfloat16" in scope.precisions:
        found, controls = _rounds_once(scope)
        rows += found
    return rows, controls


def _out_of_range() -> list[Row]:
    """An id that is none: NaN inside jit, an error in torch; its neighbours get their rows."""
    import jax
    import torch
    from flax import nnx

    import omni_jax.layers
    import omni_torch.layers
    from parity.checks._encoders import merged

    table = np.random.default_rng(3).standard_normal((V, 4)).astype(np.float32)
    ids = np.array([0, *OUTSIDE, V - 1], np.int32)
    template, model = merged(lambda: omni_jax.layers.TokenEmbedding(V, 4, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda _: table, template)
    got = np.asarray(jax.jit(lambda params, ids: model(params)(ids))(params, ids))
    inside = (ids >= 0) & (ids < V)
    found = {
        "jax": [int(i) for i, x in zip(ids[~inside], got[~inside]) if not np.isnan(x).all()]
        + [int(i) for i, x in zip(ids[inside], got[inside]) if not np.array_equal(x, table[i])]
    }
    module = omni_torch.layers.TokenEmbedding(V, 4)
    found["torch"] = [i for i in OUTSIDE if not _refused(module, torch.tensor([[i]]))]
    rows = []
    for side, wrong in found.items():
        words = f"not so: {', '.join(map(str, wrong))}" if wrong else f"{len(OUTSIDE)} ids, none of them a row"
        verdict = Verdict.DIFFER if wrong else Verdict.AGREE
        rows.append(Row("logits", "", "layers alone", "", f"ids out of range ({side})", verdict, words))
    return rows


def _int32_targets() -> Row:
    """torch refuses targets of int32, which JAX has by default; our loss takes both, to the same bits."""
    import torch

    from omni_torch.losses import cross_entropy

    logits, targets = torch.linspace(-1.0, 1.0, 3 * V).reshape(3, V), torch.tensor([1, 0, V - 1])
    try:
        same = torch.equal(cross_entropy(logits, targets.int()), cross_entropy(logits, targets))
        words = "" if same else "another loss than with int64"
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
    verdict = Verdict.DIFFER if words else Verdict.AGREE
    return Row("logits", "", "layers alone", "", "targets of int32 (torch)", verdict, words or "the loss of int64")


def _no_such_target() -> Row:
    """Inside jit a target that is none makes the loss NaN, and its row of logits gets no gradient."""
    import jax

    from omni_jax.losses import cross_entropy

    logits = np.linspace(-1.0, 1.0, 3 * V, dtype=np.float32).reshape(3, V)
    loss, gradient = jax.jit(jax.value_and_grad(cross_entropy))(logits, np.array([1, V, -1], np.int32))
    fine = bool(np.isnan(loss)) and not np.any(gradient[1:]) and np.all(gradient[0])
    words = "NaN, and no gradient" if fine else f"loss {loss}, gradient {np.asarray(gradient[1:]).tolist()}"
    verdict = Verdict.AGREE if fine else Verdict.DIFFER
    return Row("logits", "", "layers alone", "", "targets out of range (jax)", verdict, words)


def _refused(module: Any, ids: Any) -> bool:
    try:
        module(ids)
    except ValueError:
        return True
    return False


def _rounds_once(scope: Scope) -> tuple[list[Row], list[Control]]:
    """In bfloat16, of a norm: what one rounding of the result does not explain must be noise of float32.

    The value nearest to the reference that rounds to the result stands for it, and is judged as float32.
    RoPE's angles stay in float32.
    """
    from flax import nnx

    import omni_jax.layers
    import omni_torch.layers
    from parity.checks._encoders import merged
    from parity.pair import Pair, pair_of

    rng = np.random.default_rng([scope.seed, 89])
    template, model = merged(lambda: omni_jax.layers.RMSNorm(D, rngs=nnx.Rngs(0)))
    norm = pair_of(
        lambda params, x: {"RMSNorm": model(params)(x)},
        omni_torch.layers.RMSNorm(D),
        template,
        torch_call=lambda module, x: {"RMSNorm": module(x)},
        name="RMSNorm",
    )
    x_ND = rng.standard_normal((N, D)) * np.exp2(rng.integers(-6, 7, (N, 1)))

    def angles(layers: Any) -> Any:
        def call(params: Any, positions: Any) -> dict[str, Any]:
            cos, sin = layers.rope_frequencies(positions, D, 10000.0, params["any"].dtype)
            return {"cos": cos, "sin": sin}

        return call

    from parity.weights import Link

    one = {"any": np.ones(1, np.float32)}
    rope = Pair(angles(omni_jax.layers), angles(omni_torch.layers), one, [Link("any", "any")], name="RoPE")
    positions = np.array([[0, 1, 2, 5, 17, 33, 63, 300]], np.int32)
    weight_D = _held(rng.uniform(0.5, 1.5, D))
    (row,), values = _judged(norm, {"weight": weight_D}, [_held(x_ND)], scope, "rounds once", _nearest)
    truth, noise = values["RMSNorm"]
    twice = _nearest(_held(_held(truth / weight_D) * weight_D), truth)
    passes = accepts(twice, truth, noise, unit_roundoff("float32"))
    control = Control("rounds twice", not passes, "passed" if passes else "rejected")
    rows, _ = _judged(rope, one, [positions], scope, "in float32", lambda got, truth: got)
    return [row, *rows], [control] if scope.controls else []


def _held(x: np.ndarray) -> np.ndarray:
    """What bfloat16 makes of x."""
    import ml_dtypes

    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def _judged(
    pair: Any, weights: Any, inputs: Sequence[Any], scope: Scope, words: str, stands_for: Callable[..., Any]
) -> tuple[list[Row], dict[str, tuple[np.ndarray, Noise]]]:
    """Rows, and (reference, noise) by name, of what both sides give in bfloat16; all inputs can be held in it."""
    import jax

    from parity.noise import Tracer, measure_program
    from parity.precision import resolve_device
    from parity.sides import JaxSide, TorchSide

    pair.hasty = True
    tracer = Tracer(pair.jax_program())
    args = (pair.jax_params(weights), *inputs)
    model = measure_program(tracer.program(args, "float32"), args, draws=scope.draws, seed=scope.seed)
    named = lambda leaves: pair.named(jax.tree.unflatten(model.tree, leaves))  # noqa: E731
    sigma, values = named(model.sigma), {}
    for (name, truth), noise in zip(named(model.reference).items(), model.noise):
        values[name] = truth, Noise(sigma[name], noise.dof, noise.kappa)
    devices = resolve_device(scope.device)
    sides = JaxSide(pair, tracer, devices[0]), TorchSide(pair, devices[1])
    got = [side(weights, inputs, "bfloat16")[0] for side in sides]
    rows = []
    for name, (truth, noise) in values.items():
        near = [stands_for(side[name], truth) for side in got]
        judgement = judge_tensor(near[0], near[1], truth, noise, unit_roundoff("float32"))
        fields = {"check": "logits", "config": "", "regime": "layers alone", "precision": "bfloat16"}
        fields |= {"name": f"{name} {words}", "device": scope.device, "shape": truth.shape}
        rows.append(row_from_judgement(judgement, **fields))
    return rows, values


def _nearest(got: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Of the values that round to `got` in bfloat16 the one next to `truth`."""
    _, exponent = np.frexp(got)
    half = np.ldexp(unit_roundoff("bfloat16"), exponent - 1)
    return np.clip(truth, got - half, got + half)
