"""AdamW, clipping and the schedule of omni_torch, against the formulas worked in extended precision."""

from __future__ import annotations

import copy
import inspect
import math

import numpy as np
import pytest
import torch

from omni_torch.optim import (
    AdamW,
    AdamWState,
    adamw_step_,
    adamw_step_many_,
    clip_grad_norm_,
    decay_mask,
    global_norm,
    init_adamw_state,
    warmup_cosine,
)

SHAPES = [(), (0,), (1,), (5,), (3, 4), (2, 3, 2)]
DTYPES = [torch.float32, torch.float64]
HYPER = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
# One update is a dozen roundings; the moments' errors are averages of those of the steps before.
ROUNDINGS_PER_STEP = 16


def draws(shape, n, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return [scale * np.asarray(rng.normal(size=shape)) for _ in range(n)]


def extended_adamw(p, grads, lr, betas, eps, weight_decay):
    """The formulas as they stand, in numpy's widest float."""
    p = p.astype(np.longdouble)
    m, v = np.zeros_like(p), np.zeros_like(p)
    beta1, beta2 = (np.longdouble(beta) for beta in betas)
    for t, g in enumerate(grads, start=1):
        g = g.astype(np.longdouble)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        p = p - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * p)
    return p, m, v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-9])
@pytest.mark.parametrize("steps", [1, 10])
def test_adamw_follows_its_formula(shape, dtype, scale, steps):
    (start,), grads = draws(shape, 1), [torch.tensor(g, dtype=dtype) for g in draws(shape, steps, 1, scale)]
    p = torch.tensor(start, dtype=dtype)
    before = p.numpy().copy()
    state = init_adamw_state(p)
    for grad in grads:
        state = adamw_step_(p, grad, state, **HYPER)
    want_p, want_m, want_v = extended_adamw(before, [g.numpy() for g in grads], **HYPER)
    u = torch.finfo(dtype).eps
    # Each step moves a parameter by at most about lr·(√steps + decay), and p − update rounds at the size of p.
    bound = u * steps * (ROUNDINGS_PER_STEP * HYPER["lr"] * (steps**0.5 + 1) + np.abs(before) + 1)
    assert np.all(np.abs(p.numpy() - want_p) <= bound)
    assert np.all(np.abs(state.m.numpy() - want_m) <= u * ROUNDINGS_PER_STEP * scale * 8)
    assert np.all(np.abs(state.v.numpy() - want_v) <= u * ROUNDINGS_PER_STEP * np.abs(want_v))
    assert state.t == steps


def test_the_first_step_is_the_sign_of_the_gradient():
    p = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    adamw_step_(p, torch.tensor([0.5, -4.0, 0.0], dtype=torch.float64), init_adamw_state(p), 0.1, weight_decay=0.0)
    want = torch.tensor([1.0 - 0.1, -2.0 + 0.1, 3.0], dtype=torch.float64)
    assert (p - want).abs().max() <= 0.1 * 1e-8 / 0.5 + torch.finfo(p.dtype).eps * 4


def test_the_bias_correction_keeps_its_digits_in_float32():
    # With m̂ = g and v̂ = g² the ratio is g / (|g| + eps) to a few roundings, at every t for a constant gradient.
    p = torch.zeros(4)
    grad = torch.tensor([0.3, 1.7, -2.3, 11.0])
    state = init_adamw_state(p)
    for _ in range(5):
        before = p.clone()
        adamw_step_(p, grad, state, 1.0, weight_decay=0.0)
        moved = (before.double() - p.double()).abs()
        assert (moved - 1).abs().max() <= 8 * torch.finfo(torch.float32).eps * max(1.0, float(p.abs().max()))


def test_zero_betas_make_a_plain_sign_step():
    p = torch.zeros(3, dtype=torch.float64)
    state = init_adamw_state(p)
    for _ in range(3):
        adamw_step_(p, torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64), state, 1.0, (0.0, 0.0), 0.0, 0.0)
    assert p.tolist() == [-3.0, 3.0, -3.0]


def test_update_is_in_place_and_leaves_the_gradient_alone():
    p = torch.nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    kept = grad.clone()
    state = init_adamw_state(p)
    addresses = [x.data_ptr() for x in (p, state.m, state.v)]
    result = adamw_step_(p, grad, state, 1e-2)
    assert result is state
    assert [x.data_ptr() for x in (p, state.m, state.v)] == addresses
    assert torch.equal(grad, kept)
    assert p.requires_grad
    assert p.is_leaf
    assert not state.m.requires_grad
    assert not state.v.requires_grad


def test_a_learning_rate_from_a_checkpoint_may_be_a_tensor():
    ends = []
    for lr in (0.25, torch.tensor(0.25)):
        p = torch.tensor([1.0, -2.0])
        adamw_step_(p, torch.tensor([0.5, 0.25]), init_adamw_state(p), lr)  # type: ignore[arg-type]
        ends.append(p)
    assert torch.equal(*ends)


def test_a_transposed_parameter_equals_its_contiguous_copy():
    base = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    flat, turned = base.clone(), base.t().contiguous().t()
    grad = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for p in (flat, turned):
        adamw_step_(p, grad, init_adamw_state(p), **HYPER)
    assert torch.equal(flat, turned)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype):
    p, grad = torch.tensor([1.0, -2.0], dtype=dtype), torch.tensor([0.0, 3.0], dtype=dtype)
    wide = p.float()
    adamw_step_(p, grad, init_adamw_state(p), **HYPER)
    adamw_step_(wide, grad.float(), init_adamw_state(wide), **HYPER)
    assert torch.equal(p, wide.to(dtype))  # eps = 1e-8 alone would be 0 in float16, and 0/0 the result


def test_the_signatures_are_those_of_the_exercise():
    step = ["p", "grad", "state", "lr", "betas", "eps", "weight_decay"]
    many = ["params", "grads", "states", "lr", "betas", "eps", "weight_decay"]
    for function, names in ((adamw_step_, step), (adamw_step_many_, many)):
        parameters = inspect.signature(function).parameters
        assert list(parameters) == names
        assert [parameters[n].default for n in names[4:]] == [(0.9, 0.999), 1e-8, 0.01]
    assert list(inspect.signature(AdamWState).parameters) == ["m", "v", "t"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"betas": (1.0, 0.999)}, "betas"),
        ({"betas": (0.9, -0.1)}, "betas"),
        ({"betas": (0.9, math.nan)}, "betas"),
        ({"betas": (0.9,)}, "betas"),
        ({"lr": -1e-3}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"lr": math.inf}, "lr"),
        ({"betas": ("a", "b")}, r"betas must be two numbers in \[0, 1\), got \('a', 'b'\)"),
        ({"betas": "ab"}, "betas must be two numbers"),
        ({"betas": None}, "betas must be two numbers"),
        ({"betas": (0.9, None)}, "betas must be two numbers"),
        ({"lr": None}, "lr must be a number, finite and ≥ 0, got None; pass for example lr=1e-3"),
        ({"lr": "x"}, "lr must be a number, finite and ≥ 0, got 'x'"),
        ({"lr": 1j}, "lr must be a number"),
        ({"lr": [0.1]}, "lr must be a number"),
        ({"lr": torch.tensor([0.1])}, r"lr must be a scalar, got shape \(1,\)"),
        ({"lr": torch.tensor(-0.1)}, "lr must be finite"),
        ({"lr": np.ones(3)}, r"lr must be a scalar, got shape \(3,\)"),
        ({"eps": None}, "eps must be a number"),
        ({"weight_decay": None}, "weight_decay must be a number"),
        ({"weight_decay": torch.tensor([0.1])}, "weight_decay must be a scalar"),
        ({"grad": torch.zeros(3, dtype=torch.float8_e4m3fn)}, "grad must have 16 bits or more"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"grad": torch.tensor([0.0, math.nan, 0.0])}, "grad holds NaN or Inf"),
        ({"grad": torch.tensor([0.0, -math.inf, 0.0])}, "grad holds NaN or Inf"),
        ({"grad": torch.zeros(2)}, "grad must have the shape"),
        ({"grad": torch.zeros(1, 3)}, "grad must have the shape"),
        ({"grad": torch.zeros(3, dtype=torch.float64)}, "grad must have the dtype"),
        ({"grad": torch.zeros(3, dtype=torch.int64)}, "grad must have a real floating dtype"),
        ({"grad": torch.zeros(3, device="meta")}, "grad must have the device"),
        ({"grad": torch.zeros(3).to_sparse()}, "grad must be a dense tensor"),
        ({"grad": None}, "grad must be a torch.Tensor"),
        ({"p": torch.zeros(3, dtype=torch.int32)}, "p must have a real floating dtype"),
        ({"p": torch.zeros(3, dtype=torch.complex64)}, "p must have a real floating dtype"),
        ({"state": AdamWState(torch.zeros(3), torch.zeros(4), 0)}, "state.v must have the shape"),
        ({"state": AdamWState(torch.zeros(3, dtype=torch.float64), torch.zeros(3), 0)}, "state.m must have the dtype"),
        ({"state": AdamWState(torch.zeros(3), torch.zeros(3), -1)}, "state.t must be an int"),
    ],
)
def test_bad_arguments_change_nothing(change, message):
    p = torch.tensor([1.0, 2.0, 3.0])
    arguments = {"p": p, "grad": torch.ones(3), "state": init_adamw_state(p), **HYPER, **change}
    state = arguments["state"]
    kept = (arguments["p"].clone(), state.m.clone(), state.v.clone(), state.t)
    with pytest.raises(ValueError, match=message):
        adamw_step_(**arguments)
    assert torch.equal(arguments["p"], kept[0])
    assert torch.equal(state.m, kept[1])
    assert torch.equal(state.v, kept[2])
    assert state.t == kept[3]


def expanded():
    return torch.ones(1).expand(3)


def inference():
    with torch.inference_mode():
        return torch.ones(3)


def windows():
    return torch.ones(4).as_strided((3, 2), (1, 1))


@pytest.mark.parametrize("make", [expanded, inference, windows])
@pytest.mark.parametrize("which", ["p", "m", "v"])
def test_what_cannot_be_written_is_refused_before_anything_is(make, which):
    tensors = {name: make() if name == which else torch.ones_like(make()).clone() for name in ("p", "m", "v")}
    state = AdamWState(tensors["m"], tensors["v"], 0)
    first, first_state = torch.ones(2), AdamWState(torch.zeros(2), torch.zeros(2), 0)
    grad = torch.ones(tensors["p"].shape)
    message = "inference tensor" if make is inference else "memory of its own for every element"
    with pytest.raises(ValueError, match=message):
        adamw_step_(tensors["p"], grad, state, 0.1)
    with pytest.raises(ValueError, match=message):
        adamw_step_many_([first, tensors["p"]], [torch.ones(2), grad], [first_state, state], 0.1)
    assert all(bool((x == 1).all()) for x in (first, *tensors.values()))
    assert not first_state.m.any()
    assert state.t == first_state.t == 0


def test_the_optimizer_refuses_what_cannot_be_written_too():
    for make, message in ((expanded, "memory of its own"), (inference, "inference tensor")):
        first, second = torch.nn.Parameter(torch.ones(2)), make()
        first.grad = torch.ones(2)
        optimizer = AdamW([first, second])
        if make is expanded:
            second.grad = torch.ones(3)
        else:
            with torch.inference_mode():
                second.grad = torch.ones(3)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert bool((first == 1).all())
        assert not optimizer.state


def test_inference_tensors_are_updated_in_inference_mode():
    with torch.inference_mode():
        p = torch.ones(2)
        adamw_step_(p, torch.ones(2), init_adamw_state(p), 0.5, weight_decay=0.0)
        assert p.tolist() == pytest.approx([0.5, 0.5])


def test_a_gradient_is_only_read_and_may_be_expanded_and_shared():
    p, q, wide = torch.ones(3), torch.ones(3), torch.ones(3)
    grad = torch.ones(1).expand(3)  # as autograd.grad gives for a sum
    adamw_step_many_([p, q], [grad, grad], [init_adamw_state(p), init_adamw_state(q)], 0.1)
    adamw_step_(wide, torch.ones(3), init_adamw_state(wide), 0.1)
    assert torch.equal(p, wide)
    assert torch.equal(q, wide)


@pytest.mark.parametrize(
    "fault", ["state twice", "m twice", "m is v", "view", "grad is m", "grad is p", "grad of one, p of another", "part"]
)
def test_shared_memory_is_refused_before_anything_is_changed(fault):
    buffer = torch.ones(9)
    params, grads = [buffer[:3], buffer[3:6]], [torch.ones(3), torch.ones(3)]
    states = [init_adamw_state(p) for p in params]
    if fault == "state twice":
        states[1] = states[0]
    elif fault == "m twice":
        states[1].m = states[0].m
    elif fault == "m is v":
        states[1].v = states[1].m
    elif fault == "view":
        params[1] = params[0].view(3)
    elif fault == "grad is m":
        grads[1] = states[1].m
    elif fault == "grad is p":
        grads[1] = params[1]
    elif fault == "grad of one, p of another":
        grads[0] = params[1]
    else:
        params[1] = buffer[2:5]
    message = "states.1. is the same state as states.0." if fault == "state twice" else "shares memory with"
    with pytest.raises(ValueError, match=message):
        adamw_step_many_(params, grads, states, lr=0.1)
    if fault in ("m is v", "grad is m", "grad is p"):
        with pytest.raises(ValueError, match="shares memory with"):
            adamw_step_(params[1], grads[1], states[1], lr=0.1)
    assert bool((buffer == 1).all())
    assert all(s.t == 0 and not s.m.any() and not s.v.any() for s in states)


def test_slices_of_flat_buffers_are_fine_in_any_order():
    buffer, moments, want = torch.ones(12), torch.zeros(24), torch.ones(4)
    params = [buffer[8:], buffer[:4], buffer[4:8].view(2, 2).t()]
    states = [AdamWState(moments[8 * i : 8 * i + 4].view(p.shape), moments[8 * i + 4 : 8 * i + 8].view(p.shape), 0)
              for i, p in enumerate(params)]  # fmt: skip
    adamw_step_many_(params, [torch.ones(p.shape) for p in params], states, **HYPER)
    adamw_step_(want, torch.ones(4), init_adamw_state(want), **HYPER)
    assert torch.equal(buffer, want.repeat(3))


def test_the_optimizer_refuses_parameters_that_share_memory():
    flat = torch.ones(4)
    first, second = torch.nn.Parameter(flat[:3]), torch.nn.Parameter(flat[1:])
    first.grad = second.grad = torch.ones(3)
    with pytest.raises(ValueError, match="shares memory with"):
        AdamW([first, second]).step()
    assert bool((flat == 1).all())


def test_something_else_than_a_state_is_refused():
    p = torch.ones(3)
    with pytest.raises(ValueError, match=r"state must be an AdamWState \(m, v, t\), got dict"):
        adamw_step_(p, torch.ones(3), {}, 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"states\[0\] must be an AdamWState"):
        adamw_step_many_([p], [torch.ones(3)], [None], 0.1)  # type: ignore[list-item]
    assert bool((p == 1).all())


def test_state_of_an_integer_tensor_is_refused():
    with pytest.raises(ValueError, match="p must have a real floating dtype"):
        init_adamw_state(torch.zeros(3, dtype=torch.int64))


def test_many_is_one_after_the_other():
    singles = [torch.tensor(x) for shape in SHAPES for x in draws(shape, 1)]
    together = [p.clone() for p in singles]
    grads = [torch.tensor(x) for shape in SHAPES for x in draws(shape, 1, seed=7)]
    states = [init_adamw_state(p) for p in together]
    result = adamw_step_many_(together, grads, states, **HYPER)
    for p, grad in zip(singles, grads, strict=True):
        adamw_step_(p, grad, init_adamw_state(p), **HYPER)
    assert all(torch.equal(a, b) for a, b in zip(singles, together, strict=True))
    assert all(a is b for a, b in zip(result, states, strict=True))
    assert [s.t for s in result] == [1] * len(SHAPES)
    assert adamw_step_many_([], [], [], lr=0.1) == []


@pytest.mark.parametrize("fault", ["length", "last gradient", "tied"])
def test_many_is_all_or_nothing(fault):
    params = [torch.ones(2), torch.ones(3)]
    grads = [torch.ones(2), torch.ones(3)]
    states = [init_adamw_state(p) for p in params]
    if fault == "length":
        grads.pop()
    elif fault == "last gradient":
        grads[1][2] = math.nan
    else:
        params[1], grads[1], states[1] = params[0], grads[0], init_adamw_state(params[0])
    match = {"length": "one entry per parameter", "last gradient": r"grads\[1\]", "tied": "the same tensor"}[fault]
    with pytest.raises(ValueError, match=match):
        adamw_step_many_(params, grads, states, lr=0.1)
    assert all(bool((p == 1).all()) for p in params)
    assert all(s.t == 0 and not s.m.any() for s in states)


def test_global_norm():
    grads = [torch.tensor([3.0, 0.0]), torch.tensor(4.0), torch.zeros(0)]
    assert global_norm(grads).item() == 5.0
    assert global_norm([]).item() == 0.0
    half = [torch.full((100_000,), 1.0, dtype=torch.bfloat16)]  # bfloat16 sums would stop at 256
    norm = global_norm(half)
    assert norm.dtype is torch.float32
    assert abs(norm.item() - math.sqrt(100_000)) <= 8 * torch.finfo(torch.float32).eps * math.sqrt(100_000)
    assert global_norm([torch.ones(1), torch.ones(1, dtype=torch.float64)]).dtype is torch.float64
    with pytest.raises(ValueError, match=r"grads\[0\]"):
        global_norm([torch.ones(2, dtype=torch.int64)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_clipping_scales_to_the_norm_in_torchs_form(dtype):
    grads = [torch.tensor([3.0, 0.0], dtype=dtype), torch.tensor([[4.0]], dtype=dtype)]
    addresses = [g.data_ptr() for g in grads]
    norm = clip_grad_norm_(grads, 1.0)
    assert norm.item() == 5.0
    want = 3.0 / (5.0 + 1e-6)
    assert abs(grads[0][0].item() - want) <= 4 * torch.finfo(dtype).eps * want
    assert [g.data_ptr() for g in grads] == addresses
    if dtype is torch.float64:  # the 1e-6 is there
        assert abs(grads[0][0].item() - 0.6) > 1e-7


def test_clipping_equals_torchs_own():
    ours = [torch.tensor(x, requires_grad=True) for shape in SHAPES for x in draws(shape, 1)]
    for p in ours:
        p.grad = p.detach() * 3
    grads = [p.grad.clone() for p in ours if p.grad is not None]
    norm = clip_grad_norm_(grads, 0.01)
    theirs = torch.nn.utils.clip_grad_norm_(ours, 0.01)
    eps = torch.finfo(torch.float64).eps
    assert abs(norm.item() - theirs.item()) <= 4 * eps * theirs.item()
    for g, p in zip(grads, ours, strict=True):
        assert p.grad is not None
        assert bool(((g - p.grad).abs() <= 8 * eps * p.grad.abs()).all())


def test_clipping_below_the_limit_changes_no_bit():
    grads = [torch.tensor([0.3, -0.4])]
    kept = grads[0].clone()
    for limit in (1.0, math.inf):
        clip_grad_norm_(grads, limit)
        assert torch.equal(grads[0], kept)


def test_clipping_shows_nan_and_refuses_bad_limits():
    grads = [torch.tensor([1.0, math.nan]), torch.ones(2)]
    assert math.isnan(clip_grad_norm_(grads, 1.0).item())
    for limit in (0.0, -1.0, math.nan, None, "x"):
        with pytest.raises(ValueError, match="max_norm"):
            clip_grad_norm_([torch.ones(2)], limit)


def test_schedule_every_step():
    warmup, end, low = 4, 20, 0.1
    factors = [warmup_cosine(step, warmup, end, low) for step in range(26)]
    assert factors[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert set(factors[20:]) == {0.1}
    for step in range(warmup, end):
        cosine = math.cos(math.pi * (step - warmup) / (end - warmup))
        assert abs(factors[step] - (low + (1 - low) * 0.5 * (1 + cosine))) <= 4 * np.finfo(float).eps
    assert factors[12] == pytest.approx(0.55, rel=4 * np.finfo(float).eps)
    assert np.all(np.diff(factors[4:21]) < 0)


def test_schedule_without_warmup_and_down_to_zero():
    assert warmup_cosine(0, 0, 3) == 1.0
    assert warmup_cosine(3, 0, 3, 0.0) == 0.0
    # Near its end the cosine falls as (π/2·left)²; 1 + cos would have lost every digit here.
    tiny = warmup_cosine(10**8 - 1, 0, 10**8, 0.0)
    assert abs(tiny / (math.pi / 2 * 1e-8) ** 2 - 1) <= 8 * np.finfo(float).eps
    assert all(warmup_cosine(7, 7, 9, low) == 1.0 and warmup_cosine(9, 7, 9, low) == low for low in (0.0, 0.3, 1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 2, 10), "step counts"),
        ((1.5, 2, 10), "integer scalar"),
        ((0, -1, 10), "warmup_steps"),
        ((0, 10, 10), "max_steps"),
        ((0, 2, 10, 1.5), "min_ratio"),
        ((0, 2, 10, math.nan), "min_ratio"),
    ],
)
def test_schedule_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        warmup_cosine(*arguments)


# --- what happens at the edges of the number range -------------------------------------------------------------------


def test_a_constant_gradient_keeps_its_average():
    """float32's 0.999 and 0.001 add up to 1 − 1.3e-5·0.001: a plain weighted sum would drift away by 6e-6 of g."""
    p, grad = torch.zeros(3), torch.tensor([0.3, 1.7, -2.3])
    state = init_adamw_state(p)
    for _ in range(3000):
        state = adamw_step_(p, grad, state, 1e-3, weight_decay=0.0)
    share = 1 - 0.999**3000
    u = torch.finfo(torch.float32).eps
    # A rounding to nearest may stop an average as far away as half an ulp over 1 − β.
    assert bool(((state.m - grad).abs() <= u / 0.1 * grad.abs()).all())
    assert bool(((state.v - share * grad**2).abs() <= u / 0.001 / 8 * grad**2).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_overflowing_second_moment_comes_back(dtype):
    p = torch.zeros(2, dtype=dtype)
    state = init_adamw_state(p)
    huge = torch.full((2,), 6e4 if dtype is torch.float16 else 1e38, dtype=dtype)
    for grad in (huge, huge, torch.zeros_like(huge)):
        state = adamw_step_(p, grad, state, 1e-3)
    assert bool(torch.isfinite(p).all())
    assert bool(torch.isfinite(state.v).all())
    assert float(state.v[0]) < torch.finfo(dtype).max


def test_bfloat16_keeps_its_dtypes_for_many_steps():
    p = torch.ones(4, dtype=torch.bfloat16)
    state = init_adamw_state(p)
    for _ in range(5):
        state = adamw_step_(p, torch.ones_like(p), state, 0.25)
    assert p.dtype is state.m.dtype is state.v.dtype is torch.bfloat16
    assert bool((p < 0).all())


# --- AdamW, the optimizer --------------------------------------------------------------------------------------------


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2, bias=False))


def backward(model, seed):
    model.zero_grad()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    (model(x) ** 2).mean().backward()


def test_decay_mask():
    model = small_model()
    assert decay_mask(model) == {
        "0.weight": True, "0.bias": False, "1.weight": False, "1.bias": False, "2.weight": True,
    }  # fmt: skip
    tied = torch.nn.ModuleList([model[0], model[0]])
    assert list(decay_mask(tied)) == ["0.weight", "0.bias"]
    assert decay_mask(torch.nn.Embedding(3, 2)) == {"weight": True}


def test_the_optimizer_is_adamw_step():
    ours, want = small_model(), small_model()
    optimizer = AdamW(ours.parameters(), **HYPER)
    states = [init_adamw_state(p) for p in want.parameters()]
    for seed in range(4):
        backward(ours, seed)
        optimizer.step()
        backward(want, seed)
        adamw_step_many_(list(want.parameters()), [p.grad for p in want.parameters()], states, **HYPER)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), want.parameters(), strict=True))
    for p, state in zip(ours.parameters(), states, strict=True):
        saved = optimizer.state[p]
        assert torch.equal(saved["exp_avg"], state.m)
        assert torch.equal(saved["exp_avg_sq"], state.v)
        assert float(saved["step"]) == state.t == 4


def test_groups_have_their_own_hyperparameters():
    model, plain = small_model(), small_model()
    mask = decay_mask(model)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if mask[n]]},
        {"params": [p for n, p in named.items() if not mask[n]], "weight_decay": 0.0, "lr": 2e-2},
    ]
    optimizer = AdamW(groups, **HYPER)
    backward(model, 0)
    optimizer.step()
    backward(plain, 0)
    for name, p in plain.named_parameters():
        hyper = HYPER if mask[name] else {**HYPER, "weight_decay": 0.0, "lr": 2e-2}
        adamw_step_(p, p.grad, init_adamw_state(p), **hyper)
        assert torch.equal(p, named[name]), name


def test_parameters_without_gradient_are_left_out():
    model = small_model()
    optimizer = AdamW(model.parameters(), **HYPER)
    backward(model, 0)
    model[0].bias.grad = None
    kept = model[0].bias.clone()
    optimizer.step()
    assert torch.equal(model[0].bias, kept)
    assert model[0].bias not in optimizer.state
    AdamW(small_model().parameters()).step()  # nothing to do is no error


def test_the_closure_runs_with_gradients_on():
    model = small_model()
    optimizer = AdamW(model.parameters(), **HYPER)

    def closure():
        optimizer.zero_grad()
        loss = (model(torch.ones(2, 4)) ** 2).mean()
        loss.backward()
        return loss

    with torch.no_grad():
        first = optimizer.step(closure)
    assert first.requires_grad
    assert optimizer.step(closure).item() < first.item()
    assert optimizer.step() is None


@pytest.mark.parametrize("fault", ["nan", "inf", "sparse", "lr", "betas", "eps", "weight_decay"])
def test_a_fault_anywhere_refuses_the_whole_step(fault):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters()}]
    optimizer = AdamW(groups, **HYPER)
    backward(model, 0)
    optimizer.step()
    backward(model, 1)
    last = model[1].weight
    bad = {"lr": -1.0, "betas": (0.9, 1.0), "eps": math.nan, "weight_decay": math.inf}
    if fault in bad:
        optimizer.param_groups[1][fault] = bad[fault]
    elif fault == "sparse":
        last.grad = last.grad.to_sparse()
    else:
        last.grad[0, 1] = math.nan if fault == "nan" else math.inf
    kept = [p.clone() for p in model.parameters()]
    saved = [{k: x.clone() for k, x in optimizer.state[p].items()} for p in model.parameters()]
    match = {"nan": r"param_groups\[1\]\['params'\]\[0\].grad holds NaN", "inf": "holds NaN or Inf", "sparse": "dense"}
    with pytest.raises(ValueError, match=match.get(fault, fault)):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), kept, strict=True))
    for p, before in zip(model.parameters(), saved, strict=True):
        assert all(torch.equal(optimizer.state[p][k], x) for k, x in before.items())


def test_names_show_in_messages():
    model = small_model()
    optimizer = AdamW(model.named_parameters())
    backward(model, 0)
    model[2].weight.grad.fill_(math.nan)
    with pytest.raises(ValueError, match=r"2\.weight\.grad holds NaN or Inf in 6 of 6"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1e-3}, "lr"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": 0.9}, "betas"),
        ({"eps": -1.0}, "eps"),
        ({"lr": torch.tensor([0.1])}, "lr must be a scalar"),
        ({"lr": None}, "lr must be a number"),
        ({"betas": ("a", "b")}, "betas"),
        ({"weight_decay": math.nan}, "weight_decay"),
        ({"params": [torch.zeros(2, dtype=torch.int64)]}, "real floating dtype"),
        ({"params": [{"params": [torch.zeros(2)], "lr": -1.0}]}, "lr"),
        ({"params": []}, "empty parameter list"),
    ],
)
def test_what_the_constructor_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdamW(**{"params": [torch.zeros(2)], **arguments})


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    optimizer = AdamW([torch.zeros(2)])
    with pytest.raises(ValueError, match="real floating dtype"):
        optimizer.add_param_group({"params": [torch.zeros(2, dtype=torch.int32)]})
    p = torch.zeros(2)
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="tied weight"):
        optimizer.add_param_group({"params": [p, p]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [p], "weight_decay": 0.0})
    assert optimizer.param_groups[1]["weight_decay"] == 0.0


@pytest.mark.parametrize("direction", ["ours to torch", "torch to ours", "ours to ours"])
def test_state_dicts_are_interchangeable(direction):
    makers = {"ours": AdamW, "torch": torch.optim.AdamW}
    source, _, target = direction.split()
    model = small_model()
    first = makers[source](model.parameters(), **HYPER)
    for seed in range(3):
        backward(model, seed)
        first.step()
    twin = small_model()
    twin.load_state_dict(model.state_dict())
    second = makers[target](twin.parameters(), lr=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # as from a file: torch hands the tensors themselves on
    assert second.param_groups[0]["lr"] == HYPER["lr"]
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert second.state[b].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, x in first.state[a].items():
            assert torch.equal(second.state[b][name], x)
            assert second.state[b][name].dtype is x.dtype
    for seed in range(3, 6):
        backward(model, seed)
        first.step()
        backward(twin, seed)
        second.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        if source == target:
            assert torch.equal(a, b)
        assert bool(((a - b).abs() <= 64 * torch.finfo(torch.float32).eps).all())
        assert float(second.state[b]["step"]) == 6.0


@pytest.mark.parametrize("switch", ["amsgrad", "maximize"])
def test_states_of_another_algorithm_are_refused(switch):
    model = small_model()
    theirs = torch.optim.AdamW(model.parameters(), **{switch: True})
    ours = AdamW(model.parameters(), lr=0.25)
    with pytest.raises(ValueError, match=switch):
        ours.load_state_dict(theirs.state_dict())
    momentum = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    backward(model, 0)
    momentum.step()
    with pytest.raises(ValueError, match="step, exp_avg and exp_avg_sq"):
        ours.load_state_dict(momentum.state_dict())
    assert ours.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("exp_avg", torch.zeros(2, 3), r"exp_avg'\] must have the shape of 2\.weight, \(2, 3\), got"),
        ("exp_avg", torch.zeros(3), r"exp_avg'\] must have the shape"),
        ("exp_avg_sq", torch.zeros(3, 2), r"exp_avg_sq'\] must have the shape"),
        ("exp_avg", [0.0], "must be a torch.Tensor"),
        ("exp_avg", torch.zeros(2, 3, dtype=torch.complex64), "real floating dtype"),
        ("step", torch.tensor([1.0, 2.0]), r"step'\] must be an integer"),
        ("step", torch.tensor(-1.0), r"step'\] must be an integer"),
        ("step", 1.5, r"step'\] must be an integer"),
    ],
)
def test_saved_states_that_do_not_fit_change_nothing(key, value, message):
    model = small_model()
    first = AdamW(model.named_parameters(), lr=0.5)
    backward(model, 0)
    first.step()
    saved = copy.deepcopy(first.state_dict())
    last = max(saved["state"])
    if isinstance(value, torch.Tensor) and key == "exp_avg" and value.shape == (2, 3) and not value.is_complex():
        value = value.t()
    saved["state"][last][key] = value
    second = AdamW(model.named_parameters(), lr=0.25)
    with pytest.raises(ValueError, match=message):
        second.load_state_dict(saved)
    assert not second.state
    assert second.param_groups[0]["lr"] == 0.25
    saved = first.state_dict()
    saved["param_groups"][0]["params"] = saved["param_groups"][0]["params"][:-1]
    with pytest.raises(ValueError, match="size of optimizer's group"):
        second.load_state_dict(saved)


def test_schedulers_work_on_it():
    model = small_model()
    optimizer = AdamW(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, 2, 4))
    rates = []
    for seed in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        backward(model, seed)
        optimizer.step()
        scheduler.step()
    assert rates == [warmup_cosine(step, 2, 4) for step in range(5)]


def test_float64_and_0d_and_empty_parameters():
    params = [torch.nn.Parameter(torch.tensor(x)) for shape in SHAPES for x in draws(shape, 1)]
    optimizer = AdamW(params, **HYPER)
    want = [p.detach().clone() for p in params]
    for p, alone in zip(params, want, strict=True):
        p.grad = torch.ones_like(p)
        adamw_step_(alone, p.grad, init_adamw_state(alone), **HYPER)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, want, strict=True))
