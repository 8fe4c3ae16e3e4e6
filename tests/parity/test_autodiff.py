"""The autodiff check: it agrees, shows its controls, and names the function that real bugs were put into."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import omni_jax.autodiff  # noqa: E402
import omni_torch.autodiff  # noqa: E402
from parity.checks import Scope, autodiff  # noqa: E402
from parity.errors import CannotLook  # noqa: E402
from parity.result import CheckResult  # noqa: E402
from parity.verdict import Verdict  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*precisions: str, seed: int = 0, controls: bool = False) -> CheckResult:
    scope = Scope(precisions=precisions or autodiff.PRECISIONS, seed=seed, controls=controls)
    return autodiff.run(scope, lambda done, total, label: None)


@pytest.fixture(scope="module")
def result() -> CheckResult:
    return run(controls=True)


# --- the clean twins -------------------------------------------------------------------------------------------------


def test_it_agrees(result) -> None:
    assert result.error is None
    assert {row.verdict for row in result.rows} == {Verdict.AGREE}
    assert result.exit_code == 0


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_agrees_about_other_inputs(seed) -> None:
    found = run("float64", "float32", seed=seed, controls=True)
    assert {row.verdict for row in found.rows} == {Verdict.AGREE}
    assert all(control.rejected for control in found.controls), found.controls


@pytest.mark.parametrize("control", autodiff.CONTROLS)
def test_each_control_is_shown_in_every_precision_and_rejected(result, control) -> None:
    (shown,) = [found for found in result.controls if found.name == control]
    assert shown.rejected, shown.evidence
    precisions = {"float64", "float32"} | ({"bfloat16"} if control != "finite differences" else set())
    assert set(re.findall(r"(\w+): rejected on", shown.evidence)) == precisions
    for rejected, of in re.findall(r"rejected on (\d+) of (\d+)", shown.evidence):
        assert rejected == of != "0"


def test_finite_differences_pass_where_ports_usually_look(result) -> None:
    (shown,) = [found for found in result.controls if found.name == "finite differences"]
    assert shown.evidence.count("np.allclose at 0.001: passes") == 2


def test_every_public_function_is_judged_on_every_kind_of_input(result) -> None:
    names = {row.name for row in result.rows}
    for function in omni_torch.autodiff.__all__:
        assert any(function in name for name in names), function
    for precision in autodiff.PRECISIONS:
        assert {row.name for row in result.rows if row.precision == precision} == names
    shapes = {row.name: row.shape for row in result.rows}
    assert shapes["scalar: grad_with_stopped_target"] == ()
    assert shapes["column, row: ∂Σ(a² + ab)/∂a, grad_wrt_multiple_inputs"] == (7, 1)
    assert shapes["column, row: ∂Σ(a² + ab)/∂b, grad_wrt_multiple_inputs"] == (5,)
    assert shapes["squared errors: bias, per_example_grads"] == (7,)
    values = autodiff.problem(0)
    with np.errstate(over="ignore"):
        assert np.isinf(np.sum(values["huge"] ** 2))
    assert np.sum(values["tiny"] ** 2) == 0


@pytest.mark.parametrize("x", autodiff.SQUARES)
def test_what_is_exact_is_the_same_to_the_bit(result, x) -> None:
    """2x is exact in every binary format: there is no noise to hide in."""
    rows = [row for row in result.rows if row.name.startswith(f"{x}: Σ x²")]
    assert len(rows) == 4 * len(autodiff.PRECISIONS)
    for row in rows:
        assert row.excess == 0.0
        assert row.z_jax == row.z_torch == 0.0


def test_a_scope_without_its_precisions_is_an_error() -> None:
    found = run("float16")
    assert found.error is not None
    assert "autodiff looks at float64, float32, bfloat16 only" in found.error
    assert found.exit_code == 3


def test_the_formulas_are_those_of_the_functions() -> None:
    """By central differences in extended precision: the oracle is not a third autodiff, and may err by itself."""
    v = {k: x.astype(np.longdouble) for k, x in autodiff.problem(0).items()}
    truth = autodiff.closed_forms(v)
    step = np.longdouble(2.0) ** -20

    def differences(f: Callable[[Any], Any], x: np.ndarray) -> np.ndarray:
        found = np.zeros(x.shape, np.longdouble)
        for index in np.ndindex(x.shape):
            up, down = x.copy(), x.copy()
            up[index], down[index] = x[index] + step, x[index] - step
            found[index] = (f(up) - f(down)) / (2 * step)
        return found

    m = v["matrix"]
    target = m**2

    def squared_errors(w: Any, b: Any) -> Any:
        return np.sum((m @ w + b - v["target"]) ** 2)

    wanted = {
        "matrix: Σ x², value_and_grad": differences(lambda x: np.sum(x**2), m),
        "matrix: grad_with_stopped_target": differences(lambda x: np.sum((x - target) ** 2), m),
        "matrix, other: ∂Σ(a² + ab)/∂a, vjp": differences(lambda a: np.sum(a**2 + a * v["other"]), m),
        "column, row: ∂Σ(a² + ab)/∂a, grad_wrt_multiple_inputs": differences(
            lambda a: np.sum(a**2 + 0 * v["row"] + a * v["row"]), v["column"]
        ),
        "column, row: ∂Σ(a² + ab)/∂b, grad_wrt_multiple_inputs": differences(
            lambda b: np.sum(v["column"] ** 2 + v["column"] * b), v["row"]
        ),
        "scalar, matrix: ∂Σ(a² + ab)/∂a, grad_wrt_multiple_inputs": differences(
            lambda a: np.sum(a**2 + 0 * m + a * m), v["scalar"]
        ),
        "(xM)², vjp": differences(lambda x: np.sum(v["cotangent"] * (x @ v["map"]) ** 2), m),
        "(xM)², jvp": (((m + step * v["other"]) @ v["map"]) ** 2 - ((m - step * v["other"]) @ v["map"]) ** 2)
        / (2 * step),
        "squared errors: weight, value_and_grad of their sum": differences(
            lambda w: squared_errors(w, v["bias"]), v["weight"]
        ),
        "squared errors: bias, value_and_grad of their sum": differences(
            lambda b: squared_errors(v["weight"], b), v["bias"]
        ),
    }
    for name, by_differences in wanted.items():
        # Central differences of polynomials of degree 2 have no truncation error; extended precision loses 20 bits.
        slack = 1e4 * np.finfo(np.longdouble).eps / step + np.finfo(np.float64).eps
        assert np.all(np.abs(truth[name] - by_differences) <= slack * np.max(np.abs(truth[name]))), name
    for k in ("weight", "bias"):
        each, of_sum = (
            truth[f"squared errors: {k}, {f}"] for f in ("per_example_grads", "value_and_grad of their sum")
        )
        assert np.allclose(each.sum(0), of_sum, rtol=64 * np.finfo(np.float64).eps, atol=0.0)


# --- bugs, one at a time ---------------------------------------------------------------------------------------------
# Each is put into one twin from outside. `part` are the rows that must differ: exactly those whose names match.


def leaks(x):
    """backward() onto the input itself: the second call adds to what the first has left."""
    with torch.enable_grad():
        x.requires_grad_()
        (x * x).sum().backward()
    return x.grad.clone()


def torch_target_flows(x):
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(((leaf - leaf * leaf) ** 2).sum(), leaf)[0]


def jax_target_flows(x):
    return jax.grad(lambda x: jnp.sum((x - x * x) ** 2))(x)


def total_derivative(a, b):
    """The same tensor twice becomes one leaf."""
    with torch.enable_grad():
        leaf_a = a.detach().requires_grad_()
        leaf_b = leaf_a if a is b else b.detach().requires_grad_()
        return torch.autograd.grad((leaf_a * leaf_a + leaf_a * leaf_b).sum(), (leaf_a, leaf_b))


def mean_over_broadcast(a, b):
    """A broadcast input gets the mean of its gradients where their sum is meant."""
    df_da, df_db = CLEAN["torch"]["grad_wrt_multiple_inputs"](a, b)
    size = torch.broadcast_tensors(a, b)[0].numel()
    return df_da * (a.numel() / size), df_db * (b.numel() / size)


def forgets_direction(f, x, v):
    return CLEAN["torch"]["jvp"](f, x, jax.tree.map(torch.ones_like, v))


def forgets_cotangent(f, x, v):
    return CLEAN["jax"]["vjp"](f, x, jax.tree.map(jnp.ones_like, v))


def batch_mean(loss_fn, params, x, y):
    """Every example is given the gradient of the batch."""
    rows = CLEAN["torch"]["per_example_grads"](loss_fn, params, x, y)
    return {k: g.mean(0, keepdim=True).expand_as(g) for k, g in rows.items()}


def swapped(a, b):
    broadcast = a.shape != b.shape
    found = CLEAN["jax"]["grad_wrt_multiple_inputs"](a, b)
    return found if broadcast else found[::-1]


def through_float32(f, *inputs):
    value, gradients = CLEAN["torch"]["value_and_grad"](f, *inputs)
    return value, jax.tree.map(lambda g: (g / 3).float().to(g.dtype) * 3, gradients)


def jax_rounded(f, *inputs):
    """Gradients kept in bfloat16 on their way."""
    value, gradients = CLEAN["jax"]["value_and_grad"](f, *inputs)
    return value, jax.tree.map(lambda g: (g / 3).astype(jnp.bfloat16).astype(g.dtype) * 3, gradients)


MODULES = {"torch": omni_torch.autodiff, "jax": omni_jax.autodiff}
CLEAN = {side: {name: getattr(module, name) for name in module.__all__} for side, module in MODULES.items()}
BUGS = {
    "backward onto the input": ("torch", "grad_with_backward", leaks, r"^matrix: Σ x², (grad_with_backward|3 func)"),
    "detach forgotten": (
        "torch",
        "grad_with_stopped_target",
        torch_target_flows,
        r"^(matrix|scalar|large): grad_with_stopped_target",
    ),
    "stop_gradient forgotten": (
        "jax",
        "grad_with_stopped_target",
        jax_target_flows,
        r"^(matrix|scalar|large): grad_with_stopped_target",
    ),
    "total derivative": ("torch", "grad_wrt_multiple_inputs", total_derivative, r"^matrix, matrix: "),
    "mean over what was broadcast": (
        "torch",
        "grad_wrt_multiple_inputs",
        mean_over_broadcast,
        r"^(column, row: |scalar, matrix: .*/∂a)",
    ),
    "gradients swapped": (
        "jax",
        "grad_wrt_multiple_inputs",
        swapped,
        r"^(matrix, other: .*(multiple_inputs|3 functions)|(matrix, matrix|huge, tiny): )",
    ),
    "jvp without its direction": ("torch", "jvp", forgets_direction, r", jvp$"),
    "vjp without its cotangent": ("jax", "vjp", forgets_cotangent, r"^\(xM\)², vjp$"),
    "mean gradient for each": ("torch", "per_example_grads", batch_mean, r"per_example_grads"),
}


def differing(result: CheckResult) -> set[str]:
    return {row.name for row in result.rows if row.verdict is not Verdict.AGREE}


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_caught_and_named(name, monkeypatch, result) -> None:
    side, function, wrong, part = BUGS[name]
    monkeypatch.setattr(MODULES[side], function, wrong)
    found = run("float64", "float32")
    assert found.verdict is Verdict.DIFFER
    assert found.exit_code == 1
    assert differing(found) == {row.name for row in result.rows if re.search(part, row.name)}
    if function == "grad_with_stopped_target":
        evidence = {row.evidence for row in found.rows if row.name == "matrix: grad_with_stopped_target"}
        assert all(("JAX" if side == "jax" else "torch") in words or "not the same" in words for words in evidence)


def test_float32_inside_a_float64_gradient_is_seen(monkeypatch) -> None:
    monkeypatch.setattr(omni_torch.autodiff, "value_and_grad", through_float32)
    found = run("float64")
    assert found.exit_code == 1
    assert all("value_and_grad" in name or "functions" in name for name in differing(found))
    assert differing(run("float32")) <= differing(found)  # there it is a rounding like any other


def test_bfloat16_inside_a_float32_gradient_is_seen(monkeypatch) -> None:
    monkeypatch.setattr(omni_jax.autodiff, "value_and_grad", jax_rounded)
    found = run("float32")
    assert found.exit_code == 1
    assert {"matrix: Σ x², value_and_grad", "matrix: Σ x², 3 functions"} <= differing(found)


def test_a_function_that_needs_grad_mode_cannot_look(monkeypatch) -> None:
    """The torch side runs without recording: a function that relies on its caller's mode raises, and that is told."""

    def naive(x):
        leaf = x.detach().requires_grad_()
        (leaf * leaf).sum().backward()
        return leaf.grad

    monkeypatch.setattr(omni_torch.autodiff, "grad_with_backward", naive)
    with pytest.raises(CannotLook, match="the torch side raised RuntimeError"):
        run("float64")


def test_the_inputs_are_left_as_they_were() -> None:
    values = {k: torch.from_numpy(copy.copy(x)) for k, x in autodiff.problem(0).items()}
    before = {k: x.clone() for k, x in values.items()}
    autodiff.answers(omni_torch.autodiff, values)
    for k, x in values.items():
        assert torch.equal(x, before[k])
        assert x.grad is None
        assert not x.requires_grad
