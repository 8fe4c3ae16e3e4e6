"""AdamW: how far each parameter has come, and both moments, after 1, 10 and 100 steps, against a float64 oracle."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from parity.checks import Progress, Scope
from parity.result import CheckResult, Control, Row

__all__ = ["BLIND", "CLAIM", "CONTROLS", "HYPER", "LR", "STEPS", "problem", "run"]

CLAIM = (
    "adamw_step (JAX) and adamw_step_many_ (torch) move every parameter by the same displacement and leave the same "
    "moments as a third AdamW written from the paper's formula in extended precision, over 1, 10 and 100 steps. "
    "Moments that have arrived at a constant gradient stay there, and with betas that are exact in binary, below a "
    "half, moments are exact."
)
BLIND = (
    "Displacements lost in a parameter's own rounding (the noise of a parameter is a bound for what can be seen of its "
    "update); gradients other than those drawn; other eps, rates and decays than the one set, and of other betas all "
    "but those exact moments; more than 100 steps (`parity optimizers` makes 1,000); adamw_step_, the optimizers AdamW "
    "and adamw and their decay masks (the twins' tests hold them equal to the step); parameters narrower than float32."
)
CONTROLS = {
    "no update": "zeros in place of the displacement",
    "sign flipped": "the displacement with its sign flipped",
    "another tensor": "the displacement of another tensor of the same shape",
    "weight decay 1e-4": "optax's default decay where 0.1 is meant (deepdetect#1462)",
    "beta2 0.99": "another second beta, which changes nothing at step 1",
    "t - 1": "bias correction with the steps made before (jax#4834), from step 2 on",
    "drift": "beta * mean + (1 - beta) * x in float32, whose two factors do not add up to 1",
}
STEPS = (1, 10, 100)
LR = 3e-3
HYPER = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
PRECISIONS = ("float64", "float32")
DRAWS = 5
"""A hundred interpreted steps a draw are dear, and all but one of the tensors have elements to pool."""


@lru_cache(maxsize=4)
def problem(seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(parameters, gradients of 100 steps (100, *shape)): float32, by name.

    Gradients near 1e-9 show an eps in the wrong place, a zero gradient shows what decay does alone.
    """
    rng = np.random.default_rng([seed, 11])
    shapes = {
        "matrix": (24, 17),
        "twin of matrix": (24, 17),
        "tiny gradients": (40,),
        "no gradient": (13,),
        "scalar": (),
    }
    scales = {"matrix": 0.1, "twin of matrix": 1.0, "tiny gradients": 1e-9, "no gradient": 0.0, "scalar": 3.0}
    start = {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in shapes.items()}
    grads = {
        name: np.asarray(scales[name] * rng.standard_normal((max(STEPS), *shape)), np.float32)
        for name, shape in shapes.items()
    }
    return start, grads


def run(scope: Scope, progress: Progress) -> CheckResult:
    """Judge both twins against the oracle; torch.optim.AdamW and optax.adamw stand beside them and decide nothing."""
    from parity import oracle
    from parity.checks._steps import merge, pair_of_steps
    from parity.judge import Judge
    from parity.precision import resolve_device

    started = time.perf_counter()
    result = CheckResult("adamw")
    start, grads = problem(scope.seed)
    names = list(start)
    judge = Judge(
        pair_of_steps(_jax_steps, _torch_steps, start),
        draws=DRAWS,
        seed=scope.seed,
        devices=resolve_device(scope.device),
        device=scope.device,
    )
    inputs = tuple(grads[name] for name in names)
    truth = _named(oracle.adamw(start, _by_step(grads), [LR] * max(STEPS), **HYPER), start)
    origin = {f"{name}: displacement after {n}": start[name].astype(np.float64) for name in names for n in STEPS}
    precisions = [p for p in PRECISIONS if p in scope.precisions]
    for done, precision in enumerate(precisions):
        progress(2 * done, 2 * len(precisions), precision)
        findings = judge(start, inputs, precision, oracle=truth, origin=origin)
        result.rows += findings.rows("adamw", "", "synthetic gradients", None)
        if scope.controls:
            result.controls += _controls(findings, start, grads, precision)
        progress(2 * done + 1, 2 * len(precisions), f"{precision}, third parties")
        result.rows += _third_parties(findings, start, grads, precision)
    if precisions:
        rows, drift = _exact(precisions[-1])
        result.rows += rows
        result.controls += [drift] if scope.controls else []
    progress(1, 1, "")
    if not precisions:
        result.error = f"adamw looks at {' and '.join(PRECISIONS)} only; ask for one of them with --precision"
    result.controls = merge(result.controls)
    result.seconds = time.perf_counter() - started
    return result


def _jax_steps(params: Any, grads: Any) -> dict[str, Any]:
    import jax

    from omni_jax.optim import adamw_step, init_adamw_state

    def body(carry, grad):
        p, state = adamw_step(carry[0], grad, carry[1], LR, **HYPER)
        return (p, state), (p, state.m, state.v)

    _, (p, m, v) = jax.lax.scan(body, (params, init_adamw_state(params)), grads)
    at = lambda tree, name, n: tree[name][n - 1]  # noqa: E731
    return _outputs(list(params), lambda name, n: (at(p, name, n), at(m, name, n), at(v, name, n)))


def _torch_steps(params: Any, grads: Any) -> dict[str, Any]:
    from omni_torch.optim import adamw_step_many_, init_adamw_state

    p = [params[name].detach().clone() for name in params]
    states = [init_adamw_state(x) for x in p]
    kept = {}
    for step in range(max(STEPS)):
        states = adamw_step_many_(p, [grads[name][step] for name in params], states, LR, **HYPER)
        if step + 1 in STEPS:
            for name, x, s in zip(params, p, states):
                kept[name, step + 1] = (x.clone(), s.m.clone(), s.v.clone())
    return _outputs(list(params), lambda name, n: kept[name, n])


def _outputs(names: Sequence[str], at: Callable[[str, int], tuple[Any, Any, Any]]) -> dict[str, Any]:
    return {
        f"{name}: {what} after {n}": value
        for name in names
        for n in STEPS
        for what, value in zip(("displacement", "m", "v"), at(name, n))
    }


def _by_step(grads: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    return [{name: g[i] for name, g in grads.items()} for i in range(max(STEPS))]


def _named(steps: Sequence[Any], start: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:

    def at(name: str, n: int):
        step = steps[n - 1]
        return step.p[name], step.m[name], step.v[name]

    return {k: np.asarray(v, np.float64) for k, v in _outputs(list(start), at).items()}


# ------------------------------------------------------------------------------------------------ exact moments

LASTING, BRIEF = (0.9, 0.999), (0.25, 0.0)
"""Betas of moments that have arrived, and betas that are exact in binary, as their averages are."""


def _exact(precision: str) -> tuple[list[Row], Control]:
    """Moments that no rounding may touch: the gradients have twelve bits, so their squares and quarters are exact."""
    from parity.verdict import Verdict

    g = np.random.default_rng(12).integers(1, 2**12, (2, 40)).astype(precision)
    truths = {
        "moments that have arrived": (g[0], g[0] ** 2),
        "moments with small betas": (0.25 * (0.75 * g[0]) + 0.75 * g[1], g[1] ** 2),
    }
    rows = []
    for side, found in (("jax", _exact_jax(g)), ("torch", _exact_torch(g))):
        for name, truth in truths.items():
            wrong = [
                f"{int(np.count_nonzero(np.asarray(x) != y))} of {y.size} {moment} are not"
                for moment, x, y in zip("mv", found[name], truth)
                if not np.array_equal(x, y)
            ]
            words, verdict = "; ".join(wrong) or "every value equal", Verdict.DIFFER if wrong else Verdict.AGREE
            rows.append(Row("adamw", "", "exact moments", precision, f"{name} ({side})", verdict, words, shape=(40,)))
    beta, v = np.float32(LASTING[1]), (g[0] ** 2).astype(np.float32)
    left = int(np.count_nonzero(beta * v + np.float32(1.0 - LASTING[1]) * v != v))
    return rows, Control("drift", left > 0, f"{left} of {v.size} moments leave where they had arrived, in one step")


def _exact_jax(g: np.ndarray) -> dict[str, Any]:
    import jax

    from omni_jax.optim import AdamWState, adamw_step, init_adamw_state
    from parity.sides import compiled, compiler_options

    def moments(g: Any) -> dict[str, Any]:
        p, t = jax.numpy.zeros_like(g[0]), jax.numpy.asarray(1000, jax.numpy.int32)
        _, rest = adamw_step(p, g[0], AdamWState(g[0], g[0] * g[0], t), LR, **{**HYPER, "betas": LASTING})
        brief = init_adamw_state(p)
        for grad in (g[0], g[1]):
            p, brief = adamw_step(p, grad, brief, LR, **{**HYPER, "betas": BRIEF})
        return {"moments that have arrived": rest[:2], "moments with small betas": brief[:2]}

    with jax.enable_x64(g.dtype == np.float64):
        options = compiler_options(True, str(g.dtype), jax.devices()[0])
        return jax.tree.map(np.asarray, compiled(jax.jit(moments).lower(g), options)(g))


def _exact_torch(g: np.ndarray) -> dict[str, Any]:
    import torch

    from omni_torch.optim import AdamWState, adamw_step_, init_adamw_state

    first, second = torch.from_numpy(g)
    p = torch.zeros_like(first)
    rest = adamw_step_(p, first, AdamWState(first.clone(), first * first, 1000), LR, **{**HYPER, "betas": LASTING})
    p = torch.zeros_like(first)
    brief = init_adamw_state(p)
    for grad in (first, second):
        brief = adamw_step_(p, grad, brief, LR, **{**HYPER, "betas": BRIEF})
    found = {"moments that have arrived": rest, "moments with small betas": brief}
    return {name: (state.m.numpy(), state.v.numpy()) for name, state in found.items()}


# ------------------------------------------------------------------------------------------------ third parties


def _third_parties(findings, start, grads, precision: str) -> list[Row]:
    """torch.optim.AdamW and optax.adamw on the same problem: measured, explained, never deciding."""
    from parity import oracle
    from parity.precision import precision as format_of
    from parity.precision import unit_roundoff
    from parity.verdict import Verdict, accurate_bits, effective_bits, measure, subtract

    dtype = format_of(precision).numpy
    by_step, rates, unit = _by_step(grads), [LR] * max(STEPS), unit_roundoff(precision)
    parties = {
        "torch.optim.AdamW": (_torch_optim(start, by_step, precision), oracle.torch_adamw, oracle.TORCH_CAUSE),
        "optax.adamw": (_optax(start, by_step, precision), oracle.optax_adamw, oracle.OPTAX_CAUSE),
    }
    typed = {k: v.astype(dtype) for k, v in start.items()}
    exact = oracle.adamw(start, by_step, rates, **HYPER)
    rows = []
    for party, (steps, emulate, cause) in parties.items():
        narrow = [{k: g.astype(dtype) for k, g in step.items()} for step in by_step]
        emulation = emulate(typed, narrow, rates, **HYPER, dtype=dtype.type)
        for n in STEPS:
            truth = oracle.displacement(exact[n - 1], start)
            ours = {k: steps[n][k] - start[k].astype(np.float64) for k in start}
            worst, excess = None, -1.0
            for name in start:
                _, _, reference, noise = findings.values[f"{name}: displacement after {n}"]
                distance = measure(subtract(ours[name], reference), noise.sigma * unit, noise.dof)
                if distance.excess > excess:
                    worst, excess = (name, distance, reference), distance.excess
            assert worst is not None
            name, distance, reference = worst
            words = "within its noise"
            share = oracle.explained(ours, oracle.displacement(emulation[n - 1], start), truth)
            if share > 1 / 2:  # a larger part of the deviation than what is left
                words = f"{share:.0%} explained by {cause}"
            elif not distance.within:
                words = "unexplained"
            rows.append(
                Row(
                    "adamw", "", "1 step" if n == 1 else f"{n} steps", precision, party,
                    Verdict.AGREE if distance.within else Verdict.DIFFER, f"{words} ({name})", decides=False,
                    excess=excess, z_same=distance.rms, effective_torch=effective_bits(distance.rms, unit),
                    accurate_torch=accurate_bits(subtract(ours[name], reference), reference, unit),
                )
            )  # fmt: skip
    return rows


def _torch_optim(start, by_step, precision: str) -> dict[int, dict[str, np.ndarray]]:
    import torch
    from torch.optim.adamw import adamw  # what optimizer.step() calls; the class imports torch's compiler, seconds

    dtype = getattr(torch, precision)
    tensors = lambda named: [torch.from_numpy(np.array(v)).to(dtype) for v in named.values()]  # noqa: E731
    params, (beta1, beta2) = tensors(start), HYPER["betas"]
    first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
    counts = [torch.tensor(0.0) for _ in params]
    kept = {}
    for step, grads in enumerate(by_step, 1):
        gradients = tensors({k: grads[k] for k in start})
        adamw(
            params, gradients, first, second, [], counts, foreach=False, fused=False, amsgrad=False, beta1=beta1,
            beta2=beta2, lr=LR, weight_decay=HYPER["weight_decay"], eps=HYPER["eps"], maximize=False,
        )  # fmt: skip
        if step in STEPS:
            kept[step] = {k: p.double().numpy().copy() for k, p in zip(start, params)}
    return kept


def _optax(start, by_step, precision: str) -> dict[int, dict[str, np.ndarray]]:
    import jax
    import optax

    b1, b2 = HYPER["betas"]
    optimizer = optax.adamw(LR, b1=b1, b2=b2, eps=HYPER["eps"], weight_decay=HYPER["weight_decay"])
    dtype = np.dtype(precision)
    kept = {}
    # optax promotes its int32 count to float32 on its own: strict promotion is for our code.
    with jax.enable_x64(precision == "float64"), jax.numpy_dtype_promotion("standard"):
        params = {k: jax.numpy.asarray(v, dtype) for k, v in start.items()}
        state = optimizer.init(params)

        @jax.jit
        def advance(params, state, grads):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        for step, grads in enumerate(by_step, 1):
            params, state = advance(params, state, {k: g.astype(dtype) for k, g in grads.items()})
            if step in STEPS:
                kept[step] = {k: np.asarray(v).astype(np.float64) for k, v in params.items()}
    return kept


# ------------------------------------------------------------------------------------------------ controls


def _controls(findings, start, grads, precision: str) -> list[Control]:
    """Each wrong update in the torch side's place; rejected on every determined displacement that it changes."""
    from parity import oracle
    from parity.checks._steps import rejection
    from parity.precision import unit_roundoff
    from parity.verdict import Verdict

    by_step, rates = _by_step(grads), [LR] * max(STEPS)
    decayed = _named(oracle.adamw(start, by_step, rates, **{**HYPER, "weight_decay": 1e-4}), start)
    betas = _named(oracle.adamw(start, by_step, rates, **{**HYPER, "betas": (0.9, 0.99)}), start)
    behind = _named(_late_correction(start, by_step), start)
    wrongs = {"weight decay 1e-4": decayed, "beta2 0.99": betas, "t - 1": behind}
    truths = {k: v[2] for k, v in findings.values.items() if k in findings.outputs}
    controls = []
    for control in CONTROLS:
        shown: dict[str, np.ndarray] = {}
        for name, truth in truths.items():
            if findings.outputs[name].verdict is Verdict.UNDETERMINED or not np.any(truth):
                continue
            if control in wrongs and "displacement" not in name:
                continue  # decay and bias corrections do not enter the moments
            tensor, n = name.split(":")[0], int(name.rsplit(" ", 1)[1])
            if control in ("beta2 0.99", "t - 1") and (n == 1 or tensor == "no gradient"):
                continue  # without effect there
            other = {"matrix": "twin of matrix", "twin of matrix": "matrix"}.get(tensor)
            if control == "another tensor" and other is None:
                continue
            if control in wrongs:
                wrong = wrongs[control][name] - start[tensor]
            elif control == "another tensor":
                wrong = truths[name.replace(tensor, other or "", 1)]
            else:
                wrong = np.zeros_like(truth) if control == "no update" else -truth
            shown[name] = wrong
        controls.append(rejection(control, precision, shown, findings.values, unit_roundoff(precision)))
    return controls


def _late_correction(start, by_step) -> list[Any]:
    """AdamW whose bias corrections use t − 1 (t at the first step, where they would divide by zero)."""
    from parity.oracle import Step

    (beta1, beta2), eps, decay = HYPER["betas"], HYPER["eps"], HYPER["weight_decay"]
    p = {k: v.astype(np.longdouble) for k, v in start.items()}
    m, v = ({k: np.zeros_like(x) for k, x in p.items()} for _ in range(2))
    steps = []
    for t, grads in enumerate(by_step, 1):
        late = max(t - 1, 1)
        for k in p:
            g = grads[k].astype(np.longdouble)
            m = {**m, k: beta1 * m[k] + (1 - beta1) * g}
            v = {**v, k: beta2 * v[k] + (1 - beta2) * g * g}
            update = (m[k] / (1 - beta1**late)) / (np.sqrt(v[k] / (1 - beta2**late)) + eps) + decay * p[k]
            p = {**p, k: p[k] - LR * update}
        steps.append(Step(p, m, v, t))
    return steps
