"""Gradients against closed forms, and what a transformation must still be able to do with them: jit, vmap, grad.

Inputs are small whole numbers, so that every closed form is exact in every dtype and equality can be asked for.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import omni_jax
from omni_jax.autodiff import (
    grad_with_autograd_grad,
    grad_with_backward,
    grad_with_stopped_target,
    grad_wrt_multiple_inputs,
    jvp,
    per_example_grads,
    value_and_grad,
    vjp,
)
from omni_jax.layers import SwiGLU

DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64]
SHAPES = [(), (0,), (1,), (5,), (3, 4), (2, 0, 3), (2, 3, 2)]
LARGEST = 7
"""2·(7 + 7²) still fits the 8 bits of bfloat16."""
UNARY = {
    "autograd_grad": (grad_with_autograd_grad, lambda x: 2 * x),
    "backward": (grad_with_backward, lambda x: 2 * x),
    "stopped_target": (grad_with_stopped_target, lambda x: 2 * (x - x * x)),
}
each_unary = pytest.mark.parametrize(("gradient", "closed"), UNARY.values(), ids=UNARY)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def fresh_trace_counts():
    chex.clear_trace_counter()


def whole(shape, dtype=jnp.float32, seed=0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(-LARGEST, LARGEST + 1, shape), dtype)


def wholes(shape) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, shape, elements=st.integers(-LARGEST, LARGEST).map(float))


def exactly(ours: jax.Array, theirs) -> None:
    assert isinstance(ours, jax.Array)
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


# --- one input -------------------------------------------------------------------------------------------------------


@each_unary
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_closed_form(x64, gradient, closed, shape, dtype) -> None:
    x = whole(shape, dtype)
    exactly(gradient(x), closed(x))


@each_unary
@settings(max_examples=15, deadline=None)
@given(data=st.data(), shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
def test_the_closed_form_over_shapes(gradient, closed, data, shape) -> None:
    x = data.draw(wholes(shape))
    exactly(gradient(x), closed(x))  # numpy in, JAX out


@each_unary
def test_repeated_calls_give_the_same(gradient, closed) -> None:
    x = whole((3, 4))
    for _ in range(4):
        exactly(gradient(x), closed(x))


@each_unary
def test_compiled_once_for_all_values_of_a_shape(gradient, closed) -> None:
    compiled = jax.jit(chex.assert_max_traces(gradient, n=1))
    for seed in range(3):
        x = whole((3, 4), seed=seed)
        exactly(compiled(x), closed(x))
    with pytest.raises(AssertionError, match="is traced > 1 times"):
        compiled(whole((2,)))


@each_unary
def test_mapped(gradient, closed) -> None:
    x = whole((5, 3))
    mapped = jax.jit(jax.vmap(chex.assert_max_traces(gradient, n=1)))
    exactly(mapped(x), closed(x))
    exactly(mapped(x + 1), closed(x + 1))


@each_unary
def test_differentiated_again(gradient, closed) -> None:
    """JAX's gradients are functions like any other; torch's come back detached."""
    second = jax.jacfwd(gradient)(whole((4,)))
    # The derivative of 2x, and of 2(x − stop(x²)) as well: what is stopped has no derivative of any order.
    exactly(second, 2 * jnp.eye(4))


@each_unary
def test_values_that_overflow_or_vanish_when_squared(gradient, closed) -> None:
    """Σ x² is inf or 0 there; 2x is neither."""
    x = jnp.array([1e30, -1e-30, 0.0])
    assert jnp.isinf(jnp.sum(x * x))
    if gradient is grad_with_stopped_target:
        x = jnp.array([1e15, -1e-30, 0.0])
    exactly(gradient(x), closed(x))


@each_unary
def test_nan_stays_where_it_is(gradient, closed) -> None:
    found = gradient(jnp.array([1.0, jnp.nan, 3.0]))
    assert np.array_equal(jnp.isnan(found), [False, True, False])


@each_unary
@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.array([1, 2], np.int32), r"x must have a dtype .*float32.*, got int32; convert it with \.astype\("),
        (np.array([True]), r"got bool"),
        (np.array([1j], np.complex64), r"got complex64"),
        (jnp.ones(2, jnp.float8_e4m3fn), r"got float8_e4m3fn"),
        ([1.0, 2.0], "x must be an array, got list; convert it"),
        (2.0, "x must be an array, got float"),
        (jax.random.key(0), "got key"),
    ],
    ids=["int", "bool", "complex", "float8", "list", "float", "key"],
)
def test_what_has_no_gradient_is_refused(gradient, closed, x, words) -> None:
    with pytest.raises(ValueError, match=words):
        gradient(x)


def test_a_refusal_inside_jit() -> None:
    with pytest.raises(ValueError, match="x must have a dtype"):
        jax.jit(grad_with_backward)(jnp.arange(3))


def test_the_target_would_learn_without_stop_gradient() -> None:
    x = whole((3, 4))
    through = jax.grad(lambda x: jnp.sum((x - x * x) ** 2))(x)
    exactly(through, 2 * (x - x * x) * (1 - 2 * x))
    assert not np.array_equal(through, grad_with_stopped_target(x))


# --- several inputs --------------------------------------------------------------------------------------------------


def summed_to(gradient: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    lead = gradient.ndim - len(shape)
    axes = tuple(range(lead)) + tuple(lead + i for i, n in enumerate(shape) if n == 1)
    return gradient.sum(axis=axes, keepdims=True).reshape(shape)


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    shapes=hnp.mutually_broadcastable_shapes(num_shapes=2, min_dims=0, max_dims=3, min_side=0, max_side=3),
)
def test_two_inputs_over_shapes_that_broadcast(data, shapes) -> None:
    a, b = (data.draw(wholes(shape)) for shape in shapes.input_shapes)
    wide_a, wide_b = np.broadcast_arrays(a, b)
    df_da, df_db = grad_wrt_multiple_inputs(a, b)
    exactly(df_da, summed_to(2 * wide_a + wide_b, a.shape))
    exactly(df_db, summed_to(np.array(wide_a), b.shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_array_twice_gives_partial_derivatives(x64, dtype) -> None:
    x = whole((3, 4), dtype)
    df_da, df_db = grad_wrt_multiple_inputs(x, x)
    exactly(df_da, 3 * x)
    exactly(df_db, x)


def test_two_inputs_compiled_and_mapped() -> None:
    compiled = jax.jit(chex.assert_max_traces(grad_wrt_multiple_inputs, n=1))
    for seed in range(3):
        a, b = whole((3, 4), seed=seed), whole((4,), seed=seed + 7)
        df_da, df_db = compiled(a, b)
        exactly(df_da, 2 * a + b[None])
        exactly(df_db, a.sum(0))
    chex.clear_trace_counter()
    mapped = jax.jit(jax.vmap(chex.assert_max_traces(grad_wrt_multiple_inputs, n=1), in_axes=(0, None)))
    df_da, df_db = mapped(a, b)
    exactly(df_da, 2 * a + b[None])
    exactly(df_db, a)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (jnp.ones(3), jnp.ones(4), r"a and b must have shapes that broadcast, got \(3,\) and \(4,\); make each"),
        (jnp.ones(3), jnp.ones(3, jnp.int32), r"b must have a dtype .* got int32"),
        (jnp.ones(3, jnp.int32), jnp.ones(3), r"a must have a dtype .* got int32"),
        (jnp.ones(3), jnp.ones(3, jnp.bfloat16), r"b must have the dtype of a, float32, got bfloat16; convert it"),
        (jnp.ones(3), 2.0, "b must be an array, got float"),
    ],
)
def test_two_inputs_that_do_not_fit(a, b, words) -> None:
    with pytest.raises(ValueError, match=words):
        grad_wrt_multiple_inputs(a, b)


# --- value_and_grad --------------------------------------------------------------------------------------------------


def test_value_and_gradients_of_every_input() -> None:
    x, y = whole((3, 4)), whole((3, 4), seed=1)
    value, gradients = value_and_grad(lambda x, y: jnp.sum(x * x * y), x, y)
    exactly(value, jnp.sum(x * x * y))
    assert isinstance(gradients, tuple)
    exactly(gradients[0], 2 * x * y)
    exactly(gradients[1], x * x)


def test_a_tree_of_inputs_gives_a_tree_of_gradients() -> None:
    params = {"w": whole((4, 3)), "rest": [whole((3,), seed=1), (whole((), seed=2),)]}
    x = whole((5, 4), seed=3)

    def f(p, x):
        return jnp.sum(x @ p["w"] + p["rest"][0][None]) * p["rest"][1][0]

    value, (of_params, of_x) = value_and_grad(f, params, x)
    scale = params["rest"][1][0]
    exactly(value, f(params, x))
    exactly(of_params["w"], jnp.broadcast_to(scale * x.sum(0)[:, None], (4, 3)))
    exactly(of_params["rest"][0], jnp.full(3, 5 * scale))
    exactly(of_params["rest"][1][0], jnp.sum(x @ params["w"] + params["rest"][0][None]))
    exactly(of_x, jnp.broadcast_to(scale * params["w"].sum(1), (5, 4)))


@pytest.mark.parametrize(
    "f",
    [lambda x, y: jnp.sum(2 * x), lambda x, y: jnp.sum(2 * x) + jnp.sum(jax.lax.stop_gradient(y))],
    ids=["unused", "stopped"],
)
def test_what_the_value_does_not_depend_on_has_gradient_zero(f) -> None:
    _, gradients = value_and_grad(f, whole((3,)), whole((2, 2)))
    exactly(gradients[0], jnp.full(3, 2.0))
    exactly(gradients[1], jnp.zeros((2, 2)))


def test_a_constant_has_gradient_zero() -> None:
    value, (gradient,) = value_and_grad(lambda x: jnp.float32(3.0), whole((2, 3), jnp.bfloat16))
    exactly(value, jnp.float32(3.0))
    exactly(gradient, jnp.zeros((2, 3), jnp.bfloat16))


def test_the_functions_of_functions_compiled_once() -> None:
    f = lambda x: x * x  # noqa: E731
    calls = {
        "value_and_grad": lambda x: value_and_grad(lambda x: jnp.sum(f(x)), x)[1][0] * x,
        "jvp": lambda x: jvp(f, x, x)[1],
        "vjp": lambda x: vjp(f, x, x)[1],
        "per_example_grads": lambda x: (
            jnp.sum(per_example_grads(lambda p, x, y: jnp.sum(p * x) * y, x, x[None], x[:1]), 0) * 2
        ),
    }
    for name, call in calls.items():
        chex.clear_trace_counter()
        compiled = jax.jit(chex.assert_max_traces(call, n=1))
        for seed in range(3):
            x = whole((4,), seed=seed)
            expected = 2 * x * x[0] if name == "per_example_grads" else 2 * x * x
            exactly(compiled(x), expected)


def test_the_functions_of_functions_mapped_and_differentiated() -> None:
    x = whole((3, 4))
    exactly(jax.vmap(lambda x: value_and_grad(lambda x: jnp.sum(x * x), x)[0])(x), jnp.sum(x * x, 1))
    exactly(jax.vmap(lambda x: jvp(lambda x: x * x, x, x)[1])(x), 2 * x * x)
    # forward over reverse: the Hessian of Σ x³ along v is 6xv
    gradient = lambda x: value_and_grad(lambda x: jnp.sum(x * x * x), x)[1][0]  # noqa: E731
    exactly(jvp(gradient, x[0], x[1])[1], 6 * x[0] * x[1])
    exactly(vjp(gradient, x[0], x[1])[1], 6 * x[0] * x[1])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: value_and_grad(lambda: jnp.float32(1)), "inputs: none given; pass at least one"),
        (
            lambda: value_and_grad(lambda x: x, jnp.ones(2)),
            r"f must return an array of shape \(\), got shape \(2,\); re",
        ),
        (lambda: value_and_grad(lambda x: x, jnp.ones(1)), r"got shape \(1,\)"),
        (lambda: value_and_grad(lambda x: 2.0, jnp.ones(2)), r"got float; return the loss itself, not"),
        (lambda: value_and_grad(lambda x: None, jnp.ones(2)), "got NoneType"),
        (
            lambda: value_and_grad(lambda x: jnp.sum(x).astype(jnp.int32), jnp.ones(2)),
            r"the value of f must have a dtype .*int32",
        ),
        (lambda: value_and_grad(jnp.sum, jnp.arange(2)), r"inputs\[0\] must have a dtype .*int32"),
        (
            lambda: value_and_grad(lambda x, p: jnp.sum(x), jnp.ones(2), {"w": [jnp.arange(2)]}),
            r"inputs\[1\]\['w'\]\[0\] must have a dtype",
        ),
        (lambda: value_and_grad(lambda p: jnp.float32(1), {}), r"inputs\[0\] holds no arrays; pass an array, or"),
    ],
)
def test_value_and_grad_refuses(call, words) -> None:
    with pytest.raises(ValueError, match=words):
        call()


# --- jvp and vjp -----------------------------------------------------------------------------------------------------

M = np.asarray(whole((4, 3), seed=9))


def squared_map(x: jax.Array) -> jax.Array:
    """(xM)², whose Jacobian ∂out[j]/∂x[i] = 2·(xM)[j]·M[i, j] is not symmetric."""
    return (x @ M) * (x @ M)


def jacobian(x: jax.Array) -> jax.Array:
    """(outputs, inputs)."""
    return 2 * (x @ M)[:, None] * M.T


def test_jvp_gives_columns_and_vjp_rows_of_the_jacobian() -> None:
    x = whole((4,))
    for i in range(4):
        value, column = jvp(squared_map, x, jnp.eye(4)[i])
        exactly(value, squared_map(x))
        exactly(column, jacobian(x)[:, i])
    for j in range(3):
        value, row = vjp(squared_map, x, jnp.eye(3)[j])
        exactly(value, squared_map(x))
        exactly(row, jacobian(x)[j])
    exactly(jax.vmap(lambda u: vjp(squared_map, x, u)[1])(jnp.eye(3)), jacobian(x))  # the whole of it at once


@settings(max_examples=20, deadline=None)
@given(x=wholes((4,)), v=wholes((4,)), u=wholes((3,)))
def test_pushing_forward_and_pulling_back_are_adjoint(x, v, u) -> None:
    pushed, pulled = jvp(squared_map, x, v)[1], vjp(squared_map, x, u)[1]
    assert jnp.dot(u, pushed) == jnp.dot(pulled, v)  # whole numbers below 2²⁴: exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_jvp_and_vjp_over_dtypes_and_shapes(x64, shape, dtype) -> None:
    x, v = whole(shape, dtype), whole(shape, dtype, seed=1)
    for found in (jvp(lambda x: x * x, x, v), vjp(lambda x: x * x, x, v)):
        exactly(found[0], x * x)
        exactly(found[1], 2 * x * v)


def test_jvp_and_vjp_of_trees() -> None:
    x = {"a": whole((3,)), "b": [whole((3,), seed=1)]}
    v = {"a": whole((3,), seed=2), "b": [whole((3,), seed=3)]}

    def f(t):
        return t["a"] * t["b"][0], {"twice": 2 * t["a"]}

    value, pushed = jvp(f, x, v)
    exactly(value[0], x["a"] * x["b"][0])
    exactly(pushed[0], v["a"] * x["b"][0] + x["a"] * v["b"][0])
    exactly(pushed[1]["twice"], 2 * v["a"])
    value, pulled = vjp(f, x, (v["a"], {"twice": v["b"][0]}))
    exactly(value[1]["twice"], 2 * x["a"])
    exactly(pulled["a"], v["a"] * x["b"][0] + 2 * v["b"][0])
    exactly(pulled["b"][0], v["a"] * x["a"])


def test_the_gradient_is_the_vjp_of_one_and_its_jvp_a_directional_derivative() -> None:
    x, v = whole((3, 4)), whole((3, 4), seed=1)
    of_sum = lambda x: jnp.sum(x * x)  # noqa: E731
    exactly(vjp(of_sum, x, jnp.float32(1.0))[1], grad_with_autograd_grad(x))
    exactly(jvp(of_sum, x, v)[1], jnp.sum(2 * x * v))


def test_what_does_not_depend_on_x_pulls_back_zero() -> None:
    _, pulled = vjp(lambda x: (jnp.ones(2), x * x), whole((3,)), (jnp.ones(2), jnp.ones(3)))
    exactly(pulled, 2 * whole((3,)))
    exactly(vjp(lambda x: jnp.ones(2), whole((3,)), jnp.ones(2))[1], jnp.zeros(3))
    exactly(jvp(lambda x: jnp.ones(2), whole((3,)), jnp.ones(3))[1], jnp.zeros(2))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: jvp(lambda x: x, jnp.ones(2), jnp.ones(3)), r"v must have the shape of x, \(2,\), got \(3,\); make"),
        (lambda: jvp(lambda x: x, jnp.ones(2), jnp.ones(2, jnp.bfloat16)), r"v must have the dtype of x, float32"),
        (lambda: jvp(lambda x: x, {"a": jnp.ones(2)}, [jnp.ones(2)]), "v must be nested as x is"),
        (
            lambda: jvp(lambda x: x, {"a": jnp.ones(2)}, {"a": jnp.ones(1)}),
            r"v\['a'\] must have the shape of x\['a'\], \(2,\)",
        ),
        (lambda: jvp(lambda x: x, jnp.arange(2), jnp.arange(2)), r"x must have a dtype .*int32"),
        (lambda: jvp(lambda x: x > 0, jnp.ones(2), jnp.ones(2)), r"f\(x\) must have a dtype .*bool"),
        (lambda: jvp(lambda x: 1.0, jnp.ones(2), jnp.ones(2)), r"f\(x\) must be an array, got float"),
        (lambda: vjp(jnp.sum, jnp.ones(2), jnp.ones(2)), r"v must have the shape of f\(x\), \(\), got \(2,\)"),
        (lambda: vjp(lambda x: (x, x), jnp.ones(2), jnp.ones(2)), r"v must be nested as f\(x\) is"),
        (lambda: vjp(lambda x: x, jnp.ones(2), 1.0), r"v must be an array, got float"),
        (lambda: vjp(jnp.argmax, jnp.ones(2), jnp.ones(())), r"f\(x\) must have a dtype .*int32"),
    ],
)
def test_jvp_and_vjp_refuse(call, words) -> None:
    with pytest.raises(ValueError, match=words):
        call()


# --- per-example gradients -------------------------------------------------------------------------------------------


def squared_error(params, x, y):
    residual = jnp.sum(params["w"] * x) + params["b"] - y
    return residual * residual


@settings(max_examples=15, deadline=None)
@given(data=st.data(), N=st.integers(1, 4), D=st.integers(0, 3))
def test_per_example_gradients_by_the_formula(data, N, D) -> None:
    w, b, x, y = (data.draw(wholes(shape)) for shape in ((D,), (), (N, D), (N,)))
    found = per_example_grads(squared_error, {"w": w, "b": b}, x, y)
    residual = np.asarray(x @ w + b - y)
    assert sorted(found) == ["b", "w"]
    exactly(found["w"], 2 * residual[:, None] * x)
    exactly(found["b"], 2 * residual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_per_example_gradients_over_dtypes(x64, dtype) -> None:
    x = whole((5,), dtype, seed=1)
    found = per_example_grads(lambda p, x, y: p["w"] * x + p["w"] * y, {"w": whole((), dtype)}, x, x)
    exactly(found["w"], 2 * x)


def test_a_model_example_by_example(x64) -> None:
    """An nnx module between: each row is what its own backward pass gives; their sum is the batch's."""
    model = SwiGLU(4, 6, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    graphdef, params = nnx.split(model, nnx.Param)
    x, y = whole((3, 5, 4), jnp.float64), whole((3, 5, 4), jnp.float64, seed=1)

    def loss(p, x, y):
        return jnp.sum(jnp.square(nnx.merge(graphdef, p)(x) - y))

    found = jax.jit(lambda p: per_example_grads(loss, p, x, y))(params)
    one = jax.jit(lambda p, x, y: value_and_grad(lambda p: loss(p, x, y), p)[1][0])
    alone = [one(params, x[i], y[i]) for i in range(3)]
    batch = one(params, x, y)
    # Sums of at most a few dozen terms, whatever the order: these are other programs for the same numbers.
    bound = 1000 * jnp.finfo(jnp.float64).eps
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for gradient, of_batch, *rows in zip(*map(jax.tree.leaves, (found, batch, *alone)), strict=True):
        stacked = jnp.stack(rows)
        assert gradient.shape == stacked.shape
        assert jnp.max(jnp.abs(gradient - stacked)) <= bound * jnp.max(jnp.abs(stacked))
        assert jnp.max(jnp.abs(gradient.sum(0) - of_batch)) <= bound * jnp.max(jnp.abs(stacked))


def test_a_parameter_that_the_loss_does_not_use() -> None:
    params = {"w": whole((2,)), "unused": whole((3, 2))}
    found = per_example_grads(lambda p, x, y: jnp.sum(p["w"] * x), params, whole((4, 2)), jnp.zeros(4))
    exactly(found["w"], whole((4, 2)))
    exactly(found["unused"], jnp.zeros((4, 3, 2)))
    exactly(per_example_grads(lambda p, x, y: x * y, whole((2,)), jnp.ones(3), jnp.ones(3)), jnp.zeros((3, 2)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"params": {"w": jnp.arange(2), "b": jnp.ones(())}}, r"params\['w'\] must have a dtype .*int32"),
        ({"params": {}}, "params holds no arrays"),
        ({"params": {"w": 1.0}}, r"params\['w'\] must be an array, got float"),
        ({"x": jnp.ones((4, 2))}, "the same number of examples, at least 1, got 4 and 3; pass one target"),
        ({"x": jnp.ones((0, 2)), "y": jnp.ones(0)}, "at least 1, got 0 and 0"),
        ({"y": jnp.array(1.0)}, r"y must be an array with the examples along its first axis, got shape \(\); stack"),
        ({"x": [1.0, 2.0, 3.0]}, "x must be an array with the examples along its first axis, got list"),
        ({"loss_fn": lambda p, x, y: p["w"] * x}, r"loss_fn must return an array of shape \(\), got shape \(2,\)"),
        ({"loss_fn": lambda p, x, y: 0.0}, r"loss_fn must return an array of shape \(\), got float"),
    ],
)
def test_per_example_grads_refuses(change, words) -> None:
    arguments = {
        "loss_fn": squared_error,
        "params": {"w": jnp.ones(2), "b": jnp.ones(())},
        "x": jnp.ones((3, 2)),
        "y": jnp.ones(3),
    }
    with pytest.raises(ValueError, match=words):
        per_example_grads(**(arguments | change))


# --- the module ------------------------------------------------------------------------------------------------------


def test_everything_is_at_the_package_root() -> None:
    for name in omni_jax.autodiff.__all__:
        assert getattr(omni_jax, name) is getattr(omni_jax.autodiff, name)
        assert name in omni_jax.__all__


@pytest.mark.parametrize("x64", [False, True])
def test_the_default_settings_do_as_well(x64) -> None:
    """The tests run under strict promotion of dtypes and ranks; users do not."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.enable_x64(x64):
        a, b = whole((3, 4)), whole((4,), seed=1)
        exactly(grad_with_stopped_target(a), 2 * (a - a * a))
        exactly(grad_wrt_multiple_inputs(a, b)[0], 2 * a + b)
        exactly(per_example_grads(lambda p, x, y: jnp.sum(p * x * y), b, a, a), a * a)
