"""Gradients against closed forms, and what must not happen to the tensors that they are asked of.

Inputs are small whole numbers, so that every closed form is exact in every dtype and equality can be asked for.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn
from torch.func import functional_call

import omni_torch
from omni_torch import ThinkerConfig, ThinkerLM, next_token_loss
from omni_torch.autodiff import (
    grad_with_autograd_grad,
    grad_with_backward,
    grad_with_stopped_target,
    grad_wrt_multiple_inputs,
    jvp,
    per_example_grads,
    value_and_grad,
    vjp,
)

ROOT = Path(__file__).resolve().parent.parent.parent
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(), (0,), (1,), (5,), (3, 4), (2, 0, 3), (2, 3, 2)]
LARGEST = 7
"""2·(7 + 7²) still fits the 8 bits of bfloat16."""
UNARY = {
    "autograd_grad": (grad_with_autograd_grad, lambda x: 2 * x),
    "backward": (grad_with_backward, lambda x: 2 * x),
    "stopped_target": (grad_with_stopped_target, lambda x: 2 * (x - x * x)),
}
each_unary = pytest.mark.parametrize(("gradient", "closed"), UNARY.values(), ids=UNARY)


def whole(shape, dtype=torch.float32, seed=0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.asarray(rng.integers(-LARGEST, LARGEST + 1, shape), np.float64)).to(dtype)


def wholes(shape) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float64, shape, elements=st.integers(-LARGEST, LARGEST).map(float))


def exactly(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert torch.equal(ours, theirs)


# --- one input -------------------------------------------------------------------------------------------------------


@each_unary
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_closed_form(gradient, closed, shape, dtype) -> None:
    x = whole(shape, dtype)
    exactly(gradient(x), closed(x))


@each_unary
@settings(max_examples=30, deadline=None)
@given(data=st.data(), shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
def test_the_closed_form_over_shapes(gradient, closed, data, shape) -> None:
    x = torch.from_numpy(data.draw(wholes(shape)))
    exactly(gradient(x), closed(x))


@each_unary
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_the_input_is_left_alone(gradient, closed, requires_grad, before) -> None:
    x = whole((3, 4)).requires_grad_(requires_grad)
    kept = torch.full_like(x, 5.0) if before else None
    x.grad = kept
    values, version = x.detach().clone(), x._version
    exactly(gradient(x), closed(values))
    assert x.requires_grad is requires_grad
    assert x.is_leaf
    assert x.grad is kept
    if kept is not None:
        assert torch.equal(kept, torch.full_like(values, 5.0))
    assert x._version == version
    assert torch.equal(x.detach(), values)


@each_unary
def test_repeated_calls_give_the_same(gradient, closed) -> None:
    x = whole((3, 4)).requires_grad_()
    results = [gradient(x) for _ in range(4)]
    for result in results:
        exactly(result, closed(x.detach()))
    assert len({result.data_ptr() for result in results}) == 4


@each_unary
def test_what_comes_back_is_detached_and_ours(gradient, closed) -> None:
    x = whole((3, 4)).requires_grad_()
    found = gradient(x)
    assert not found.requires_grad
    assert found.grad_fn is None
    assert found.is_leaf
    assert type(gradient(nn.Parameter(x.detach()))) is torch.Tensor
    found.mul_(0.0)  # in place: nothing else may feel it
    exactly(gradient(x), closed(x.detach()))


@each_unary
def test_an_input_inside_another_graph(gradient, closed) -> None:
    w = whole((3, 4)).requires_grad_()
    x = w * w
    fired = []
    x.register_hook(fired.append)
    w.register_hook(fired.append)
    found = gradient(x)
    assert fired == []
    assert w.grad is None
    exactly(found, closed((w * w).detach()))
    x.sum().backward()  # that graph is whole still
    assert torch.equal(w.grad, 2 * w.detach())


@each_unary
@pytest.mark.parametrize(
    "view",
    [lambda x: x.T, lambda x: x[::2, 1:], lambda x: x[0].expand(5, 4), lambda x: x.flip(0), lambda x: x[:, :0]],
    ids=["transposed", "strided", "expanded", "flipped", "empty"],
)
def test_views(gradient, closed, view) -> None:
    x = view(whole((4, 4), seed=2))
    exactly(gradient(x), closed(x))


@each_unary
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_whatever_is_switched_off_outside(gradient, closed, mode) -> None:
    outside = whole((3, 4))
    with mode():
        recording, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        inside = outside + 1  # made in inference mode: torch itself refuses to record it
        for x in (outside, inside):
            exactly(gradient(x), closed(x))
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (recording, inference)
    assert not inside.requires_grad


@each_unary
def test_values_that_overflow_or_vanish_when_squared(gradient, closed) -> None:
    """Σ x² is inf or 0 there; 2x is neither."""
    x = torch.tensor([1e30, -1e-30, 0.0])
    assert torch.isinf((x * x).sum())
    if gradient is grad_with_stopped_target:
        x = torch.tensor([1e15, -1e-30, 0.0])
    exactly(gradient(x), closed(x))


@each_unary
def test_nan_stays_where_it_is(gradient, closed) -> None:
    found = gradient(torch.tensor([1.0, float("nan"), 3.0]))
    assert torch.equal(torch.isnan(found), torch.tensor([False, True, False]))


@each_unary
@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.tensor([1, 2]), r"x must have a dtype .*float32.*, got torch\.int64; convert it with \.to\("),
        (torch.tensor([True]), r"got torch\.bool"),
        (torch.tensor([1j]), r"got torch\.complex64"),
        (torch.ones(2).to(torch.float8_e4m3fn), r"got torch\.float8_e4m3fn"),
        ([1.0, 2.0], "x must be a torch.Tensor, got list; convert it"),
        (np.ones(2), "got ndarray"),
        (torch.eye(2).to_sparse(), r"x must be a dense tensor, got layout torch\.sparse_coo; call \.to_dense"),
    ],
    ids=["int", "bool", "complex", "float8", "list", "numpy", "sparse"],
)
def test_what_has_no_gradient_is_refused(gradient, closed, x, words) -> None:
    with pytest.raises(ValueError, match=words):
        gradient(x)


def test_autograd_grad_never_calls_backward(monkeypatch) -> None:
    def never(*args, **kwargs):
        raise AssertionError("backward was called")

    monkeypatch.setattr(torch.Tensor, "backward", never)
    monkeypatch.setattr(torch.autograd, "backward", never)
    x = whole((3, 4)).requires_grad_()
    exactly(grad_with_autograd_grad(x), 2 * x.detach())
    grad_wrt_multiple_inputs(x, x)
    grad_with_stopped_target(x)
    assert x.grad is None
    with pytest.raises(AssertionError, match="backward was called"):
        grad_with_backward(x)


def test_the_target_would_learn_without_detach() -> None:
    x = whole((3, 4)).requires_grad_()
    (through,) = torch.autograd.grad(((x - x * x) ** 2).sum(), x)
    d = x.detach()
    exactly(through, 2 * (d - d * d) * (1 - 2 * d))
    assert not torch.equal(through, grad_with_stopped_target(x))


# --- several inputs --------------------------------------------------------------------------------------------------


def summed_to(gradient: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    lead = gradient.ndim - len(shape)
    axes = tuple(range(lead)) + tuple(lead + i for i, n in enumerate(shape) if n == 1)
    return gradient.sum(axis=axes, keepdims=True).reshape(shape)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    shapes=hnp.mutually_broadcastable_shapes(num_shapes=2, min_dims=0, max_dims=3, min_side=0, max_side=3),
)
def test_two_inputs_over_shapes_that_broadcast(data, shapes) -> None:
    a, b = (data.draw(wholes(shape)) for shape in shapes.input_shapes)
    wide_a, wide_b = np.broadcast_arrays(a, b)
    df_da, df_db = grad_wrt_multiple_inputs(torch.from_numpy(a), torch.from_numpy(b))
    exactly(df_da, torch.from_numpy(np.asarray(summed_to(2 * wide_a + wide_b, a.shape))))
    exactly(df_db, torch.from_numpy(np.asarray(summed_to(np.array(wide_a), b.shape))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_tensor_twice_gives_partial_derivatives(dtype) -> None:
    x = whole((3, 4), dtype).requires_grad_()
    df_da, df_db = grad_wrt_multiple_inputs(x, x)
    exactly(df_da, 3 * x.detach())
    exactly(df_db, x.detach())
    assert x.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_two_inputs_are_left_alone(mode) -> None:
    a, b = whole((3, 4)).requires_grad_(), whole((4,), seed=1)
    with mode():
        for _ in range(2):
            df_da, df_db = grad_wrt_multiple_inputs(a, b)
            exactly(df_da, 2 * a.detach() + b)
            exactly(df_db, a.detach().sum(0))
            assert not df_da.requires_grad
            assert not df_db.requires_grad
    assert (a.requires_grad, b.requires_grad) == (True, False)
    assert a.grad is None
    assert b.grad is None
    df_da.zero_(), df_db.zero_()  # each in memory of its own
    exactly(grad_wrt_multiple_inputs(a, b)[0], 2 * a.detach() + b)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (torch.ones(3), torch.ones(4), r"a and b must have shapes that broadcast, got \(3,\) and \(4,\); make each"),
        (torch.ones(3), torch.ones(3, dtype=torch.int32), r"b must have a dtype .* got torch\.int32"),
        (torch.ones(3, dtype=torch.int64), torch.ones(3), r"a must have a dtype .* got torch\.int64"),
        (torch.ones(3), torch.ones(3).double(), r"b must have the dtype of a, torch\.float32, got torch\.float64"),
        (torch.ones(3), torch.ones(3, device="meta"), "b must have the device of a, cpu, got meta; convert it"),
        (torch.ones(3), 2.0, "b must be a torch.Tensor, got float"),
    ],
)
def test_two_inputs_that_do_not_fit(a, b, words) -> None:
    with pytest.raises(ValueError, match=words):
        grad_wrt_multiple_inputs(a, b)


# --- value_and_grad --------------------------------------------------------------------------------------------------


def test_value_and_gradients_of_every_input() -> None:
    x, y = whole((3, 4)).requires_grad_(), whole((3, 4), seed=1)
    value, gradients = value_and_grad(lambda x, y: (x * x * y).sum(), x, y)
    x = x.detach()
    exactly(value, (x * x * y).sum())
    assert isinstance(gradients, tuple)
    exactly(gradients[0], 2 * x * y)
    exactly(gradients[1], x * x)
    assert not value.requires_grad


def test_a_tree_of_inputs_gives_a_tree_of_gradients() -> None:
    params = {"w": whole((4, 3)), "rest": [whole((3,), seed=1), (whole((), seed=2),)]}
    x = whole((5, 4), seed=3)

    def f(p, x):
        return (x @ p["w"] + p["rest"][0]).sum() * p["rest"][1][0]

    value, (of_params, of_x) = value_and_grad(f, params, x)
    scale = params["rest"][1][0]
    exactly(value, (x @ params["w"] + params["rest"][0]).sum() * scale)
    exactly(of_params["w"], scale * x.sum(0)[:, None].expand(4, 3))
    exactly(of_params["rest"][0], 5 * scale.expand(3))
    exactly(of_params["rest"][1][0], (x @ params["w"] + params["rest"][0]).sum())
    exactly(of_x, (scale * params["w"].sum(1)).expand(5, 4))


@pytest.mark.parametrize(
    "f",
    [
        lambda x, y: (2 * x).sum(),
        lambda x, y: (2 * x).sum() + y.detach().sum(),
        lambda x, y: (2 * x).sum() + (torch.no_grad()(lambda: y.sum())()),
    ],
    ids=["unused", "detached", "under no_grad"],
)
def test_what_the_value_does_not_depend_on_has_gradient_zero(f) -> None:
    x, y = whole((3,)), whole((2, 2), torch.float64)
    _, gradients = value_and_grad(f, x, y.float())
    exactly(gradients[0], torch.full((3,), 2.0))
    exactly(gradients[1], torch.zeros(2, 2))


def test_a_constant_has_gradient_zero() -> None:
    value, (gradient,) = value_and_grad(lambda x: torch.tensor(3.0), whole((2, 3), torch.bfloat16))
    exactly(value, torch.tensor(3.0))
    exactly(gradient, torch.zeros(2, 3, dtype=torch.bfloat16))


def test_gradients_have_memory_of_their_own() -> None:
    """The gradient of a sum is one number with stride 0 inside autograd, and a + b hands one tensor to both."""
    a, b = whole((3, 4)), whole((3, 4), seed=1)
    _, gradients = value_and_grad(lambda a, b: (a + b).sum(), a, b)
    gradients[0].mul_(5.0)
    exactly(gradients[0], torch.full((3, 4), 5.0))
    exactly(gradients[1], torch.ones(3, 4))


def test_what_a_function_closes_over_is_left_alone() -> None:
    weight = nn.Parameter(whole((3, 1), seed=1))
    f = lambda x: x @ weight  # noqa: E731  (jvp of nn.Linear would import torch's compiler)
    _, (gradient,) = value_and_grad(lambda x: f(x).sum(), whole((5, 3)))
    exactly(gradient, weight.detach().T.expand(5, 3))
    for found in (jvp(f, whole((5, 3)), whole((5, 3))), vjp(f, whole((5, 3)), whole((5, 1)))):
        assert not any(x.requires_grad for x in found)
    assert weight.grad is None
    assert weight.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_functions_of_functions_record_in_every_mode(mode) -> None:
    outside = whole((3,))
    with mode():
        for x in (outside, outside + 1):
            exactly(value_and_grad(lambda x: (x * x).sum(), x)[1][0], 2 * x)
            exactly(jvp(lambda x: x * x, x, x)[1], 2 * x * x)
            exactly(vjp(lambda x: x * x, x, x)[1], 2 * x * x)
            exactly(per_example_grads(lambda p, x, y: (p * x * y).sum(), outside, x, x), (x * x)[:, None].expand(3, 3))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: value_and_grad(lambda: torch.ones(())), "inputs: none given; pass at least one"),
        (
            lambda: value_and_grad(lambda x: x, torch.ones(2)),
            r"f must return a tensor of shape \(\), got shape \(2,\); re",
        ),
        (lambda: value_and_grad(lambda x: x, torch.ones(1)), r"got shape \(1,\)"),
        (lambda: value_and_grad(lambda x: x.sum().item(), torch.ones(2)), r"got float; return the loss itself, not"),
        (lambda: value_and_grad(lambda x: None, torch.ones(2)), "got NoneType"),
        (lambda: value_and_grad(lambda x: x.sum().long(), torch.ones(2)), r"the value of f must have a dtype .*int64"),
        (lambda: value_and_grad(lambda x: x.sum(), torch.arange(2)), r"inputs\[0\] must have a dtype .*int64"),
        (
            lambda: value_and_grad(lambda x, p: x.sum(), torch.ones(2), {"w": [torch.arange(2)]}),
            r"inputs\[1\]\['w'\]\[0\] must have a dtype",
        ),
        (lambda: value_and_grad(lambda p: torch.ones(()), {}), r"inputs\[0\] holds no tensors; pass a tensor, or"),
    ],
)
def test_value_and_grad_refuses(call, words) -> None:
    with pytest.raises(ValueError, match=words):
        call()


# --- jvp and vjp -----------------------------------------------------------------------------------------------------

M = whole((4, 3), torch.float64, seed=9)


def squared_map(x: torch.Tensor) -> torch.Tensor:
    """(xM)², whose Jacobian ∂out[j]/∂x[i] = 2·(xM)[j]·M[i, j] is not symmetric."""
    return (x @ M) * (x @ M)


def jacobian(x: torch.Tensor) -> torch.Tensor:
    """(outputs, inputs)."""
    return 2 * (x @ M)[:, None] * M.T


def test_jvp_gives_columns_and_vjp_rows_of_the_jacobian() -> None:
    x = whole((4,), torch.float64)
    for i in range(4):
        value, column = jvp(squared_map, x, torch.eye(4, dtype=torch.float64)[i])
        exactly(value, squared_map(x))
        exactly(column, jacobian(x)[:, i])
    for j in range(3):
        value, row = vjp(squared_map, x, torch.eye(3, dtype=torch.float64)[j])
        exactly(value, squared_map(x))
        exactly(row, jacobian(x)[j])


@settings(max_examples=30, deadline=None)
@given(x=wholes((4,)), v=wholes((4,)), u=wholes((3,)))
def test_pushing_forward_and_pulling_back_are_adjoint(x, v, u) -> None:
    x, v, u = map(torch.from_numpy, (x, v, u))
    pushed, pulled = jvp(squared_map, x, v)[1], vjp(squared_map, x, u)[1]
    assert u @ pushed == pulled @ v  # whole numbers: exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_jvp_and_vjp_over_dtypes_and_shapes(shape, dtype) -> None:
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
    of_sum = lambda x: (x * x).sum()  # noqa: E731
    exactly(vjp(of_sum, x, torch.tensor(1.0))[1], grad_with_autograd_grad(x))
    exactly(jvp(of_sum, x, v)[1], (2 * x * v).sum())


def test_what_does_not_depend_on_x_pulls_back_zero() -> None:
    _, pulled = vjp(lambda x: (torch.ones(2), x * x), whole((3,)), (torch.ones(2), torch.ones(3)))
    exactly(pulled, 2 * whole((3,)))
    exactly(vjp(lambda x: torch.ones(2), whole((3,)), torch.ones(2))[1], torch.zeros(3))
    exactly(jvp(lambda x: torch.ones(2), whole((3,)), torch.ones(3))[1], torch.zeros(2))


@pytest.mark.parametrize("function", [jvp, vjp])
def test_inputs_and_directions_are_left_alone(function) -> None:
    x, v = whole((3,)).requires_grad_(), whole((3,), seed=1).requires_grad_()
    for _ in range(2):
        value, found = function(lambda x: x * x, x, v)
        exactly(found, 2 * (x * v).detach())
        assert not value.requires_grad
        assert not found.requires_grad
    assert x.grad is None
    assert v.grad is None
    value, found = function(lambda x: x, x, v)
    exactly(found, v.detach())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: jvp(lambda x: x, torch.ones(2), torch.ones(3)),
            r"v must have the shape of x, \(2,\), got \(3,\); make",
        ),
        (
            lambda: jvp(lambda x: x, torch.ones(2), torch.ones(2).double()),
            r"v must have the dtype of x, torch\.float32",
        ),
        (lambda: jvp(lambda x: x, {"a": torch.ones(2)}, [torch.ones(2)]), "v must be nested as x is"),
        (
            lambda: jvp(lambda x: x, {"a": torch.ones(2)}, {"a": torch.ones(1)}),
            r"v\['a'\] must have the shape of x\['a'\], \(2,\)",
        ),
        (lambda: jvp(lambda x: x, torch.arange(2), torch.arange(2)), r"x must have a dtype .*int64"),
        (lambda: jvp(lambda x: x > 0, torch.ones(2), torch.ones(2)), r"f\(x\) must have a dtype .*bool"),
        (lambda: jvp(lambda x: 1.0, torch.ones(2), torch.ones(2)), r"f\(x\) must be a torch\.Tensor, got float"),
        (
            lambda: vjp(lambda x: x.sum(), torch.ones(2), torch.ones(2)),
            r"v must have the shape of f\(x\), \(\), got \(2,\)",
        ),
        (lambda: vjp(lambda x: (x, x), torch.ones(2), torch.ones(2)), r"v must be nested as f\(x\) is"),
        (lambda: vjp(lambda x: x, torch.ones(2), 1.0), r"v must be a torch\.Tensor, got float"),
        (lambda: vjp(lambda x: x.argmax(), torch.ones(2), torch.ones(())), r"f\(x\) must have a dtype .*int64"),
    ],
)
def test_jvp_and_vjp_refuse(call, words) -> None:
    with pytest.raises(ValueError, match=words):
        call()


# --- per-example gradients -------------------------------------------------------------------------------------------


def squared_error(params, x, y):
    residual = (params["w"] * x).sum() + params["b"] - y
    return residual * residual


@settings(max_examples=30, deadline=None)
@given(data=st.data(), N=st.integers(1, 5), D=st.integers(0, 4))
def test_per_example_gradients_by_the_formula(data, N, D) -> None:
    w, b, x, y = (torch.from_numpy(data.draw(wholes(shape))) for shape in ((D,), (), (N, D), (N,)))
    found = per_example_grads(squared_error, {"w": w, "b": b}, x, y)
    residual = x @ w + b - y
    assert list(found) == ["w", "b"]
    exactly(found["w"], 2 * residual[:, None] * x)
    exactly(found["b"], 2 * residual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_per_example_gradients_over_dtypes(dtype) -> None:
    x = whole((5,), dtype, seed=1)
    found = per_example_grads(lambda p, x, y: p["w"] * x + p["w"] * y, {"w": whole((), dtype)}, x, x)
    exactly(found["w"], 2 * x)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap over torch's fused CPU attention
def test_a_model_example_by_example() -> None:
    """Tokens in, a ThinkerLM between: each row is what its own backward pass gives; their sum is the batch's."""
    torch.manual_seed(0)
    config = ThinkerConfig(vocab_size=13, n_layers=1, d_model=8, n_heads=2, d_ff=8)
    model = ThinkerLM.from_config(config).double().eval()
    params = dict(model.named_parameters())
    tokens = torch.randint(3, 13, (3, 6))
    mask = torch.ones(3, 6, dtype=torch.bool)

    def loss(p, tokens, mask):
        # Embeddings, because the model looks at token ids on the host, and vmap has none to show.
        embeddings = p["tok_emb.weight"][tokens][None]
        logits = functional_call(model, p, (), {"embeddings": embeddings, "attention_mask": mask[None]})
        return -torch.log_softmax(logits[0, :-1], -1).gather(-1, tokens[1:, None]).sum()

    found = per_example_grads(loss, params, tokens, mask)
    alone = [value_and_grad(lambda p, i=i: loss(p, tokens[i], mask[i]), params)[1][0] for i in range(3)]
    batch = value_and_grad(
        lambda p: next_token_loss(functional_call(model, p, (tokens,), {"attention_mask": mask}), tokens), params
    )[1][0]
    # Sums of at most a few hundred terms, whatever the order: these are other programs for the same numbers.
    bound = 1000 * torch.finfo(torch.float64).eps
    for name, gradient in found.items():
        stacked = torch.stack([one[name] for one in alone])
        assert gradient.shape == stacked.shape == (3, *params[name].shape)
        assert (gradient - stacked).abs().max() <= bound * stacked.abs().max()
        assert (gradient.sum(0) / 15 - batch[name]).abs().max() <= bound * stacked.abs().max()
        assert not gradient.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_it_is_vmap_of_grad() -> None:
    """In torch's own words; ours does not import its compiler."""
    params, x, y = {"w": whole((4,)), "b": whole((), seed=1)}, whole((5, 4), seed=2), whole((5,), seed=3)
    theirs = torch.func.vmap(torch.func.grad(squared_error), in_dims=(None, 0, 0))(params, x, y)
    ours = per_example_grads(squared_error, params, x, y)
    for name in params:
        exactly(ours[name], theirs[name])


def test_a_parameter_that_the_loss_does_not_use() -> None:
    params = {"w": whole((2,)), "unused": whole((3, 2))}
    found = per_example_grads(lambda p, x, y: (p["w"] * x).sum(), params, whole((4, 2)), torch.zeros(4))
    exactly(found["w"], whole((4, 2)))
    exactly(found["unused"], torch.zeros(4, 3, 2))
    exactly(per_example_grads(lambda p, x, y: x * y, whole((2,)), torch.ones(3), torch.ones(3)), torch.zeros(3, 2))


def test_rows_have_memory_of_their_own() -> None:
    found = per_example_grads(lambda p, x, y: p.sum(), whole((2,)), torch.ones(3), torch.ones(3))
    found[0].mul_(5.0)
    exactly(found, torch.tensor([[5.0, 5.0], [1.0, 1.0], [1.0, 1.0]]))


def test_random_numbers_inside_are_refused_by_torch() -> None:
    with pytest.raises(RuntimeError, match="random"):
        per_example_grads(
            lambda p, x, y: nn.functional.dropout(p * x, 0.5).sum(), whole((2,)), torch.ones(3, 2), torch.ones(3)
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"params": {"w": torch.arange(2), "b": torch.ones(())}}, r"params\['w'\] must have a dtype .*int64"),
        ({"params": {}}, "params holds no tensors"),
        ({"params": {"w": None}}, r"params\['w'\] must be a torch\.Tensor, got NoneType"),
        ({"x": torch.ones(4, 2)}, "the same number of examples, at least 1, got 4 and 3; pass one target"),
        ({"x": torch.ones(0, 2), "y": torch.ones(0)}, "at least 1, got 0 and 0"),
        ({"y": torch.tensor(1.0)}, r"y must be a tensor with the examples along its first axis, got shape \(\); stack"),
        ({"x": [1.0, 2.0, 3.0]}, "x must be a tensor with the examples along its first axis, got list"),
        ({"loss_fn": lambda p, x, y: p["w"] * x}, r"loss_fn must return a tensor of shape \(\), got shape \(2,\)"),
        ({"loss_fn": lambda p, x, y: 0.0}, r"loss_fn must return a tensor of shape \(\), got float"),
    ],
)
def test_per_example_grads_refuses(change, words) -> None:
    arguments = {
        "loss_fn": squared_error,
        "params": {"w": torch.ones(2), "b": torch.ones(())},
        "x": torch.ones(3, 2),
        "y": torch.ones(3),
    }
    with pytest.raises(ValueError, match=words):
        per_example_grads(**(arguments | change))


# --- the module ------------------------------------------------------------------------------------------------------


def test_everything_is_at_the_package_root() -> None:
    for name in omni_torch.autodiff.__all__:
        assert getattr(omni_torch, name) is getattr(omni_torch.autodiff, name)
        assert name in omni_torch.__all__


def test_no_gradient_imports_torchs_compiler() -> None:
    code = """
import sys, torch
from omni_torch.autodiff import *
x = torch.ones(3)
f = lambda x: x * x
grad_with_autograd_grad(x), grad_with_backward(x), grad_wrt_multiple_inputs(x, x), grad_with_stopped_target(x)
value_and_grad(lambda x: x.sum(), x), jvp(f, x, x), vjp(f, x, x)
per_example_grads(lambda p, x, y: (p * x).sum(), x, x, x)
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr
