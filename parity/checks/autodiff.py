"""Every way of asking for a gradient, against the closed form and against the other ways."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from parity.checks import Progress, Scope
from parity.result import CheckResult, Control, Row

__all__ = ["BLIND", "CLAIM", "CONTROLS", "PRECISIONS", "answers", "closed_forms", "problem", "run"]

CLAIM = (
    "Every gradient function of both twins' autodiff.py (autograd.grad and jax.grad, backward and jax.vjp, several "
    "inputs, value_and_grad, jvp, vjp, per-example gradients, detach and stop_gradient) gives what the formula on "
    "paper says, and where several of them can give one gradient, they give the same."
)
BLIND = (
    "Functions without a closed form (the gradients check has a whole model); derivatives of derivatives; empty "
    "inputs, .grad and requires_grad, compilation (the tests have those); a stopped target among tiny values, where "
    "what it stops is below the rounding."
)
CONTROLS = {
    "zeros": "zeros in place of each result",
    "sign flipped": "each result with its sign flipped",
    "gradients swapped": "(∂f/∂b, ∂f/∂a) in place of (∂f/∂a, ∂f/∂b)",
    "target not stopped": "the gradient through x² as well, 2(x − x²)(1 − 2x): torch without its detach()",
    "accumulated gradient": "what a second .backward() leaves on the same leaf: twice the gradient",
    "divided by N": "per-example gradients of the mean loss in place of each example's own",
    "finite differences": "((x + h)² − x²) / h with h = 2⁻¹²; beside it, whether np.allclose at 1e-3 sees it",
}
PRECISIONS = ("float64", "float32", "bfloat16")
DRAWS = 32
"""There are scalars among the results, and nothing to pool their noise with."""
STEP = 2.0**-12
"""Of the finite differences: bfloat16, which has 8 bits, could not see it."""
FAMILIAR_BOUND = 1e-3
"""The bound that ports are usually held to, here only to show what it lets through; no verdict uses it."""

SQUARES = ("matrix", "scalar", "huge", "tiny")
"""Where Σ x² is differentiated; the sum itself overflows float32 at "huge" and vanishes at "tiny"."""
TARGETS = ("matrix", "scalar", "large", "tiny")
PAIRS = (("matrix", "other"), ("column", "row"), ("scalar", "matrix"), ("matrix", "matrix"), ("huge", "tiny"))
"""(a, b) of Σ (a² + ab): of one shape, broadcast both ways, 0-d, the same tensor twice, of very different sizes."""
SAME = {
    **{f"{x}: Σ x²": ("grad_with_autograd_grad", "grad_with_backward", "value_and_grad") for x in SQUARES},
    **{f"matrix, other: ∂Σ(a² + ab)/∂{i}": ("grad_wrt_multiple_inputs", "value_and_grad", "vjp") for i in "ab"},
    "(xM)²": ("jvp value", "vjp value"),
}
"""What several functions give alike."""


def problem(seed: int) -> dict[str, np.ndarray]:
    """Inputs by name, float32."""
    rng = np.random.default_rng([seed, 17])
    shapes = {
        "matrix": (7, 5), "other": (7, 5), "column": (7, 1), "row": (5,), "huge": (6,), "large": (6,), "tiny": (6,),
        "map": (5, 3), "cotangent": (7, 3), "weight": (5,), "target": (7,),
    }  # fmt: skip
    scales = {"huge": 1e30, "large": 1e15, "tiny": 1e-25}
    values = {k: np.asarray(scales.get(k, 1.0) * rng.standard_normal(s), np.float32) for k, s in shapes.items()}
    # Away from 0 and 1, where a target that is not stopped gives the same; from 1/2 and -1/2, where results vanish.
    scalars = {"scalar": 1.7, "bias": -0.3, "one": 1.0}
    return values | {k: np.asarray(v, np.float32) for k, v in scalars.items()}


def answers(api: Any, v: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is compared, by `api`: omni_jax.autodiff or omni_torch.autodiff. Plain arithmetic suits both."""
    found: dict[str, Any] = {}
    for x in SQUARES:
        for name in ("grad_with_autograd_grad", "grad_with_backward"):
            if x == "matrix":
                getattr(api, name)(v[x])  # the second answer shows what the first may have left behind
            found[f"{x}: Σ x², {name}"] = getattr(api, name)(v[x])
        _, (found[f"{x}: Σ x², value_and_grad"],) = api.value_and_grad(lambda x: (x * x).sum(), v[x])
    for x in TARGETS:
        found[f"{x}: grad_with_stopped_target"] = api.grad_with_stopped_target(v[x])

    def both(name: str, gradients: Any, function: str) -> None:
        for i, gradient in zip("ab", gradients):
            found[f"{name}: ∂Σ(a² + ab)/∂{i}, {function}"] = gradient

    for a, b in PAIRS:
        both(f"{a}, {b}", api.grad_wrt_multiple_inputs(v[a], v[b]), "grad_wrt_multiple_inputs")
    pair = {"a": v["matrix"], "b": v["other"]}
    value, gradients = api.value_and_grad(lambda a, b: (a * a + a * b).sum(), pair["a"], pair["b"])
    found["matrix, other: Σ(a² + ab), value_and_grad value"] = value
    both("matrix, other", gradients, "value_and_grad")
    of_tree = lambda t: (t["a"] * t["a"] + t["a"] * t["b"]).sum()  # noqa: E731
    _, pulled = api.vjp(of_tree, pair, v["one"])
    both("matrix, other", (pulled["a"], pulled["b"]), "vjp")
    _, found["matrix, other: Σ(a² + ab) along (b, a), jvp"] = api.jvp(of_tree, pair, {"a": pair["b"], "b": pair["a"]})

    squared_map = lambda x: (x @ v["map"]) * (x @ v["map"])  # noqa: E731
    found["(xM)², jvp value"], found["(xM)², jvp"] = api.jvp(squared_map, v["matrix"], v["other"])
    found["(xM)², vjp value"], found["(xM)², vjp"] = api.vjp(squared_map, v["matrix"], v["cotangent"])

    def loss(params: Any, x: Any, y: Any) -> Any:
        residual = (params["weight"] * x).sum() + params["bias"] - y
        return residual * residual

    params = {"weight": v["weight"], "bias": v["bias"]}
    examples = api.per_example_grads(loss, params, v["matrix"], v["target"])
    for k, gradient in examples.items():
        found[f"squared errors: {k}, per_example_grads"] = gradient
    residuals = lambda p: v["matrix"] @ p["weight"] + p["bias"] - v["target"]  # noqa: E731
    _, (batch,) = api.value_and_grad(lambda p: (residuals(p) * residuals(p)).sum(), params)
    for k, gradient in batch.items():
        found[f"squared errors: {k}, value_and_grad of their sum"] = gradient
    return found


def closed_forms(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names of `answers` with what the formulas give, in extended precision, rounded to float64 at the end."""
    v = {k: np.asarray(x, np.longdouble) for k, x in values.items()}
    truth: dict[str, Any] = {}
    for x in SQUARES:
        truth |= {f"{x}: Σ x², {name}": 2 * v[x] for name in SAME[f"{x}: Σ x²"]}
    for x in TARGETS:
        truth[f"{x}: grad_with_stopped_target"] = 2 * (v[x] - v[x] ** 2)
    for a, b in PAIRS:
        shape = np.broadcast_shapes(v[a].shape, v[b].shape)
        wide_a, wide_b = np.broadcast_to(v[a], shape), np.broadcast_to(v[b], shape)
        for name in SAME.get(f"{a}, {b}: ∂Σ(a² + ab)/∂a", ("grad_wrt_multiple_inputs",)):
            truth[f"{a}, {b}: ∂Σ(a² + ab)/∂a, {name}"] = _summed(2 * wide_a + wide_b, v[a].shape)
            truth[f"{a}, {b}: ∂Σ(a² + ab)/∂b, {name}"] = _summed(wide_a, v[b].shape)
    a, b = v["matrix"], v["other"]
    truth["matrix, other: Σ(a² + ab), value_and_grad value"] = np.sum(a**2 + a * b)
    truth["matrix, other: Σ(a² + ab) along (b, a), jvp"] = np.sum((2 * a + b) * b + a * a)

    product = v["matrix"] @ v["map"]
    truth["(xM)², jvp value"] = truth["(xM)², vjp value"] = product**2
    truth["(xM)², jvp"] = 2 * product * (v["other"] @ v["map"])
    truth["(xM)², vjp"] = (2 * product * v["cotangent"]) @ v["map"].T

    residual = v["matrix"] @ v["weight"] + v["bias"] - v["target"]
    of_each = {"weight": 2 * residual[:, None] * v["matrix"], "bias": 2 * residual}
    for k, gradient in of_each.items():
        truth[f"squared errors: {k}, per_example_grads"] = gradient
        truth[f"squared errors: {k}, value_and_grad of their sum"] = gradient.sum(0)
    return {k: np.asarray(x, np.float64) for k, x in truth.items()}


def _summed(gradient: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Summed over what was broadcast from `shape`."""
    lead = gradient.ndim - len(shape)
    axes = tuple(range(lead)) + tuple(lead + i for i, n in enumerate(shape) if n != gradient.shape[lead + i])
    return np.asarray(gradient.sum(axis=axes, keepdims=True)).reshape(shape)


def run(scope: Scope, progress: Progress) -> CheckResult:
    """Judge both twins against the closed forms, and the functions of each against each other."""
    from parity.checks._steps import merge
    from parity.judge import Judge
    from parity.pair import Pair
    from parity.precision import precision as format_of
    from parity.precision import resolve_device
    from parity.weights import Link

    started = time.perf_counter()
    result = CheckResult("autodiff")
    start = problem(scope.seed)
    judge = Judge(
        Pair(_jax, _torch, dict(start), [Link(k, k) for k in start], name="autodiff", hasty=True),
        draws=max(scope.draws, DRAWS),
        seed=scope.seed,
        devices=resolve_device(scope.device),
        device=scope.device,
    )
    precisions = [p for p in PRECISIONS if p in scope.precisions]
    for done, precision in enumerate(precisions):
        progress(done, len(precisions), precision)
        # The formulas get the inputs that the sides get.
        values = {k: x.astype(format_of(precision).numpy).astype(np.float64) for k, x in start.items()}
        findings = judge(values, (), precision, oracle=closed_forms(values))
        result.rows += findings.rows("autodiff", "", "closed forms")
        result.rows += _each_other(findings, precision)
        if scope.controls:
            result.controls += _controls(findings, values, precision)
    progress(1, 1, "")
    if not precisions:
        result.error = f"autodiff looks at {', '.join(PRECISIONS)} only; ask for one of them with --precision"
    result.controls = merge(result.controls)
    result.seconds = time.perf_counter() - started
    return result


def _jax(values: Any) -> dict[str, Any]:
    from omni_jax import autodiff

    return answers(autodiff, values)


def _torch(values: Any) -> dict[str, Any]:
    from omni_torch import autodiff

    return answers(autodiff, values)


def _each_other(findings: Any, precision: str) -> list[Row]:
    """One row for each gradient that several functions give: the two of one side that are furthest apart."""
    from parity.precision import unit_roundoff
    from parity.verdict import Verdict, measure, subtract

    unit, rows = unit_roundoff(precision), []
    for what, functions in SAME.items():
        names = [f"{what}, {function}" for function in functions]
        noise = [findings.values[name][3] for name in names]
        worst, nearest, z = -1.0, "", [0.0, 0.0]
        for side, of in enumerate(("JAX", "torch")):
            for i, name in enumerate(names):
                for j in range(i):
                    apart = subtract(findings.values[name][side], findings.values[names[j]][side])
                    # The quieter of the two is the unit: noise that one of them alone has is no excuse.
                    unit_noise = min(noise[i], noise[j], key=lambda n: float(np.sum(np.square(n.sigma))))
                    distance = measure(apart, unit_noise.sigma * unit * math.sqrt(2.0), unit_noise.dof)
                    z[side] = max(z[side], distance.rms)
                    if distance.excess > worst:
                        worst = distance.excess
                        nearest = f"{functions[j]} and {functions[i]} of the {of} side, at {worst:.0%} of the threshold"
        verdict = Verdict.AGREE if worst <= 1.0 else Verdict.DIFFER
        if verdict is Verdict.AGREE and all(findings.verdicts[name] is Verdict.UNDETERMINED for name in names):
            verdict = Verdict.UNDETERMINED
        rows.append(
            Row(
                "autodiff", "", "closed forms", precision, f"{what}, {len(names)} functions", verdict,
                f"furthest apart: {nearest}", device=findings.device, shape=findings.shapes[names[0]],
                z_jax=z[0], z_torch=z[1], excess=worst,
            )
        )  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------------------ controls


def _controls(findings: Any, values: Mapping[str, np.ndarray], precision: str) -> list[Control]:
    from parity.checks._steps import rejection
    from parity.precision import unit_roundoff
    from parity.verdict import Verdict

    truth = {k: v[2] for k, v in findings.values.items() if findings.verdicts[k] is not Verdict.UNDETERMINED}
    swapped = {}
    for name, value in truth.items():
        other = name.replace("/∂a,", "/∂?,").replace("/∂b,", "/∂a,").replace("/∂?,", "/∂b,")
        if other != name and other in truth and truth[other].shape == value.shape:
            swapped[name] = truth[other]
    N = len(values["target"])
    wrongs: dict[str, dict[str, Any]] = {
        "zeros": {k: np.zeros_like(x) for k, x in truth.items() if np.any(x)},
        "sign flipped": {k: -x for k, x in truth.items() if np.any(x)},
        "gradients swapped": swapped,
        "target not stopped": {
            f"{x}: grad_with_stopped_target": _target_not_stopped(values[x], precision) for x in TARGETS if x != "tiny"
        },
        "accumulated gradient": {
            f"{x}: Σ x², {name}": _accumulated(values[x], precision) for x in SQUARES for name in SAME[f"{x}: Σ x²"]
        },
        "divided by N": {k: x / N for k, x in truth.items() if k.endswith("per_example_grads")},
    }
    if precision != "bfloat16":
        differences = {x: ((values[x] + STEP) ** 2 - values[x] ** 2) / STEP for x in ("matrix", "scalar")}
        wrongs["finite differences"] = {
            f"{x}: Σ x², {name}": wrong for x, wrong in differences.items() for name in SAME[f"{x}: Σ x²"]
        }
    controls = []
    for name, tensors in wrongs.items():
        shown = {k: wrong for k, wrong in tensors.items() if k in truth}
        wide, unit = precision == "float64", unit_roundoff(precision)
        control = rejection(name, precision, shown, findings.values, unit, noisy_reference=wide)
        if name == "finite differences":
            seen = all(np.allclose(w, truth[k], rtol=FAMILIAR_BOUND, atol=FAMILIAR_BOUND) for k, w in shown.items())
            words = f"{control.evidence}; np.allclose at {FAMILIAR_BOUND:g}: {'passes' if seen else 'fails too'}"
            control = replace(control, evidence=words)
        controls.append(control)
    return controls


def _target_not_stopped(x: np.ndarray, precision: str) -> np.ndarray:
    import torch

    leaf = torch.from_numpy(np.array(x)).to(getattr(torch, precision)).requires_grad_()
    (gradient,) = torch.autograd.grad(torch.square(leaf - leaf * leaf).sum(), leaf)
    return gradient.double().numpy()


def _accumulated(x: np.ndarray, precision: str) -> np.ndarray:
    import torch

    leaf = torch.from_numpy(np.array(x)).to(getattr(torch, precision)).requires_grad_()
    for _ in range(2):
        (leaf * leaf).sum().backward()
    assert leaf.grad is not None
    return leaf.grad.double().numpy()
