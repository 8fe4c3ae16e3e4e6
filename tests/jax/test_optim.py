"""AdamW, clipping and the schedule of omni_jax, against the formulas worked in extended precision."""

from __future__ import annotations

import inspect
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni_jax.optim import (
    AdamWState,
    adamw,
    adamw_step,
    clip_grad_norm,
    decay_mask,
    global_norm,
    init_adamw_state,
    warmup_cosine,
)

SHAPES = [(), (0,), (1,), (5,), (3, 4), (2, 3, 2)]
HYPER = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
# One update is a dozen roundings; the moments' errors are averages of those of the steps before.
ROUNDINGS_PER_STEP = 16

jitted = jax.jit(adamw_step, static_argnames=("betas", "eps", "weight_decay"))


def tree_of(dtype, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return {f"p{i}": jnp.asarray(scale * np.asarray(rng.normal(size=s)), dtype) for i, s in enumerate(SHAPES)}


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


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_adamw_follows_its_formula(x64, scale):
    with jax.enable_x64(x64):
        dtype = jnp.float64 if x64 else jnp.float32
        start = params = tree_of(dtype)
        grads = [tree_of(dtype, seed, scale) for seed in range(1, 11)]
        state = init_adamw_state(params)
        u = float(jnp.finfo(dtype).eps)
        for steps, grad in enumerate(grads, start=1):
            params, state = jitted(params, grad, state, **HYPER)
            if steps not in (1, 10):
                continue
            for name, p in params.items():
                before = np.asarray(start[name])
                want_p, want_m, want_v = extended_adamw(before, [np.asarray(g[name]) for g in grads[:steps]], **HYPER)
                bound = u * steps * (ROUNDINGS_PER_STEP * HYPER["lr"] * (steps**0.5 + 1) + np.abs(before) + 1)
                assert p.dtype == state.m[name].dtype == state.v[name].dtype == dtype
                assert np.all(np.abs(np.asarray(p) - want_p) <= bound)
                assert np.all(np.abs(np.asarray(state.m[name]) - want_m) <= u * ROUNDINGS_PER_STEP * scale * 8)
                assert np.all(np.abs(np.asarray(state.v[name]) - want_v) <= u * ROUNDINGS_PER_STEP * np.abs(want_v))
            assert state.t.dtype == jnp.int32
            assert int(state.t) == steps


def test_the_bias_correction_keeps_its_digits_in_float32():
    # For a constant gradient m̂/√v̂ is its sign at every t; 1 − β₂ᵗ as a float32 difference is 1.3e-5 off at t = 1.
    grad = jnp.asarray([0.3, 1.7, -2.3, 11.0])
    params = jnp.zeros(4)
    state = init_adamw_state(params)
    for _ in range(5):
        before = params
        params, state = jitted(before, grad, state, 1.0, weight_decay=0.0)
        moved = np.abs(np.asarray(before, np.float64) - np.asarray(params, np.float64))
        bound = 8 * float(jnp.finfo(jnp.float32).eps) * max(1.0, float(jnp.abs(params).max()))
        assert np.abs(moved - 1).max() <= bound


def test_zero_betas_make_a_plain_sign_step():
    params = jnp.zeros(3)
    state = init_adamw_state(params)
    for _ in range(3):
        params, state = adamw_step(params, jnp.asarray([1.0, -1.0, 2.0]), state, 1.0, (0.0, 0.0), 0.0, 0.0)
    assert params.tolist() == [-3.0, 3.0, -3.0]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype):
    p, grad = jnp.asarray([1.0, -2.0], dtype), jnp.asarray([0.0, 3.0], dtype)
    wide = p.astype(jnp.float32)
    half, state = adamw_step(p, grad, init_adamw_state(p), **HYPER)
    full, _ = adamw_step(wide, grad.astype(jnp.float32), init_adamw_state(wide), **HYPER)
    assert state.m.dtype == state.v.dtype == half.dtype == dtype
    assert jnp.array_equal(half, full.astype(dtype))  # eps = 1e-8 alone would be 0 in float16, and 0/0 the result


def test_pure_jittable_and_compiled_once():
    params, grads = tree_of(jnp.float32), tree_of(jnp.float32, 1)
    kept = jax.tree.map(np.array, params)
    traces = []

    @jax.jit
    def step(params, grads, state, lr):
        traces.append(None)
        return adamw_step(params, grads, state, lr, weight_decay=0.1)

    state = init_adamw_state(params)
    once, state1 = step(params, grads, state, 1e-2)
    step(once, grads, state1, 5e-3)
    step(once, grads, state1, jnp.float32(5e-3))
    assert len(traces) <= 2  # a Python lr is weakly typed, an array is not; t and the value of lr never retrace
    assert jax.tree.all(jax.tree.map(np.array_equal, kept, jax.tree.map(np.array, params)))
    assert int(state.t) == 0


def test_params_and_state_can_be_donated():
    params, grads = tree_of(jnp.float32), tree_of(jnp.float32, 1)
    want, _ = jitted(params, grads, init_adamw_state(params), **HYPER)
    step = jax.jit(
        adamw_step, static_argnames=("betas", "eps", "weight_decay"), donate_argnames=("params", "state")
    )  # an unusable donation is a warning, and warnings are errors here
    state = init_adamw_state(params)
    got, _ = step(params, grads, state, **HYPER)
    assert params["p4"].is_deleted()
    assert state.m["p4"].is_deleted()
    assert jax.tree.all(jax.tree.map(jnp.array_equal, got, want))


def float_dtypes(jaxpr):
    found = set()
    for eqn in jaxpr.eqns:
        for var in eqn.outvars:
            if jnp.issubdtype(var.aval.dtype, jnp.floating):
                found.add(str(var.aval.dtype))
        for value in eqn.params.values():
            if hasattr(value, "jaxpr"):
                found |= float_dtypes(value.jaxpr)
    return found


def test_nothing_but_float64_in_a_float64_run():
    with jax.enable_x64(True):
        params = tree_of(jnp.float64)

        def recipe(params, grads, state):
            grads, norm = clip_grad_norm(grads, 1.0)
            params, state = adamw_step(params, grads, state, 1e-2 * warmup_cosine(state.t, 2, 10), weight_decay=0.1)
            return params, state, norm

        jaxpr = jax.make_jaxpr(recipe)(params, params, init_adamw_state(params))
    assert float_dtypes(jaxpr.jaxpr) == {"float64"}


def test_trees_of_mixed_dtypes_keep_each_leafs_dtype():
    with jax.enable_x64(True):
        params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.float32), "c": jnp.ones(2, jnp.float64)}
        grads, norm = clip_grad_norm(params, 1.0)
        new, state = adamw_step(params, grads, init_adamw_state(params), **HYPER)
        assert norm.dtype == jnp.float64
        for name, p in params.items():
            assert grads[name].dtype == new[name].dtype == state.m[name].dtype == state.v[name].dtype == p.dtype


def test_an_nnx_state_is_a_tree_too():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    x = jnp.ones((4, 3))

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p)(x) ** 2))(params)
        return adamw_step(params, grads, state, 1e-2)

    new, state = step(params, init_adamw_state(params))
    assert jax.tree.structure(new) == jax.tree.structure(params) == jax.tree.structure(state.m)
    assert nnx.merge(graphdef, new)(x).shape == (4, 2)


def test_a_frozen_part_is_a_missing_leaf():
    params = {"a": jnp.ones(2), "frozen": None}
    new, state = adamw_step(params, {"a": jnp.ones(2), "frozen": None}, init_adamw_state(params), 0.1)
    assert new["frozen"] is None
    assert state.m["frozen"] is None


def test_signature():
    names = ["params", "grads", "state", "lr", "betas", "eps", "weight_decay"]
    parameters = inspect.signature(adamw_step).parameters
    assert list(parameters) == names
    assert [parameters[n].default for n in names[4:]] == [(0.9, 0.999), 1e-8, 0.01]
    assert AdamWState._fields == ("m", "v", "t")


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
        ({"lr": jnp.ones(3)}, "lr must be a scalar"),
        ({"betas": ("a", "b")}, r"betas must be two numbers in \[0, 1\), got \('a', 'b'\)"),
        ({"betas": "ab"}, "betas must be two numbers"),
        ({"betas": None}, "betas must be two numbers"),
        ({"betas": (0.9, None)}, "betas must be two numbers"),
        ({"lr": None}, "lr must be a number, finite and ≥ 0, got None; pass for example lr=1e-3"),
        ({"lr": "x"}, "lr must be a number, finite and ≥ 0, got 'x'"),
        ({"lr": 1j}, "lr must be a number"),
        ({"lr": [0.1]}, "lr must be a number"),
        ({"lr": jnp.array([0.1])}, r"lr must be a scalar, got shape \(1,\)"),
        ({"lr": jnp.array(-0.1)}, "lr must be finite"),
        ({"eps": None}, "eps must be a number"),
        ({"weight_decay": None}, "weight_decay must be a number"),
        ({"weight_decay": jnp.array([0.1])}, "weight_decay must be a scalar"),
        ({"state": {}}, r"state must be an AdamWState \(m, v, t\), got dict"),
        ({"state": None}, "state must be an AdamWState"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"grads": {"w": jnp.zeros(2)}}, r"grads\['w'\] must have the shape"),
        ({"grads": {"w": jnp.zeros(3, jnp.bfloat16)}}, r"grads\['w'\] must have the dtype"),
        ({"grads": {"w": jnp.zeros(3, jnp.int32)}}, "real floating dtype"),
        ({"grads": {"v": jnp.zeros(3)}}, "grads must have the tree structure"),
        ({"grads": {"w": None}}, "grads must have the tree structure"),
        ({"grads": {"w": 1.0}}, "must be an array"),
        ({"params": {"w": jnp.zeros(3, jnp.int32)}}, r"params\['w'\] must have a real floating dtype"),
        ({"params": {"w": jnp.zeros(3, jnp.complex64)}}, "real floating dtype"),
        (
            {"state": AdamWState({"w": jnp.zeros(3)}, {"w": jnp.zeros(4)}, jnp.int32(0))},
            r"state.v\['w'\] must have the shape",
        ),
        ({"state": AdamWState({}, {"w": jnp.zeros(3)}, jnp.int32(0))}, "state.m must have the tree structure"),
        ({"state": AdamWState({"w": jnp.zeros(3)}, {"w": jnp.zeros(3)}, jnp.float32(0))}, "state.t"),
    ],
)
def test_bad_arguments_are_refused_on_the_host(change, message):
    params = {"w": jnp.ones(3)}
    arguments = {"params": params, "grads": {"w": jnp.ones(3)}, "state": init_adamw_state(params), **HYPER, **change}
    with pytest.raises(ValueError, match=message):
        adamw_step(**arguments)


@pytest.mark.parametrize("t", [3, np.int64(3), np.array(3), jnp.int32(3)])
def test_the_count_may_be_any_integer(t):
    params = {"w": jnp.ones(3)}
    start = init_adamw_state(params)
    new, state = adamw_step(params, params, start._replace(t=t), **HYPER)
    want, _ = adamw_step(params, params, start._replace(t=jnp.int32(3)), **HYPER)
    assert jnp.array_equal(new["w"], want["w"])
    assert state.t.dtype == jnp.int32
    assert int(state.t) == 4
    optimizer = adamw(lambda count: 0.1 * count.astype(jnp.float32))
    assert int(optimizer.update(params, start._replace(t=t), params)[1].t) == 4
    assert int(jitted(params, params, start._replace(t=t), **HYPER)[1].t) == 4


@pytest.mark.parametrize("t", [-1, jnp.int32(-1), np.int64(-1), True, 1.0, None, "3", jnp.zeros(2, jnp.int32), 2**40])
def test_other_counts_are_refused(t):
    params = {"w": jnp.ones(3)}
    state = init_adamw_state(params)._replace(t=t)
    with pytest.raises(ValueError, match=r"state\.t must be an integer scalar ≥ 0"):
        adamw_step(params, params, state, **HYPER)
    with pytest.raises(ValueError, match=r"state\.t must be an integer scalar ≥ 0"):
        adamw(lambda count: 0.1).update(params, state, params)


def test_state_of_integers_is_refused():
    with pytest.raises(ValueError, match="real floating dtype"):
        init_adamw_state({"w": jnp.zeros(3, jnp.int32)})


def test_nan_goes_through_and_shows():
    grads, norm = clip_grad_norm({"a": jnp.asarray([1.0, jnp.nan]), "b": jnp.ones(2)}, 1.0)
    assert math.isnan(float(norm))
    assert bool(jnp.isnan(grads["b"]).all())


def test_global_norm():
    assert float(global_norm([jnp.asarray([3.0, 0.0]), jnp.asarray(4.0), jnp.zeros(0)])) == 5.0
    assert float(global_norm([])) == 0.0
    norm = global_norm(jnp.ones(100_000, jnp.bfloat16))  # bfloat16 sums would stop at 256
    assert norm.dtype == jnp.float32
    assert abs(float(norm) - math.sqrt(100_000)) <= 8 * float(jnp.finfo(jnp.float32).eps) * math.sqrt(100_000)
    with pytest.raises(ValueError, match="grads"):
        global_norm({"a": jnp.ones(2, jnp.int32)})


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_clipping_scales_to_the_norm_in_torchs_form(dtype):
    with jax.enable_x64(True):
        grads = {"a": jnp.asarray([3.0, 0.0], dtype), "b": jnp.asarray([[4.0]], dtype)}
        clipped, norm = clip_grad_norm(grads, 1.0)
        assert float(norm) == 5.0
        want = 3.0 / (5.0 + 1e-6)
        got = float(clipped["a"][0])
        assert clipped["a"].dtype == dtype
        assert abs(got - want) <= 4 * float(jnp.finfo(dtype).eps) * want
        if dtype == jnp.float64:  # the 1e-6 is there
            assert abs(got - 0.6) > 1e-7


def test_clipping_below_the_limit_changes_no_bit():
    grads = {"a": jnp.asarray([0.3, -0.4])}
    for limit in (1.0, math.inf):
        clipped, _ = clip_grad_norm(grads, limit)
        assert jnp.array_equal(clipped["a"], grads["a"])
    for limit in (0.0, -1.0, math.nan, None, "x"):
        with pytest.raises(ValueError, match="max_norm"):
            clip_grad_norm(grads, limit)


@pytest.mark.parametrize("x64", [False, True])
def test_schedule_every_step(x64):
    warmup, end, low = 4, 20, 0.1
    with jax.enable_x64(x64):
        schedule = jax.jit(partial(warmup_cosine, warmup_steps=warmup, max_steps=end, min_ratio=low))
        values = [schedule(jnp.int32(step)) for step in range(26)]
        assert all(v.dtype == (jnp.float64 if x64 else jnp.float32) for v in values)
        eps = float(jnp.finfo(values[0].dtype).eps)
        exact_low = float(jnp.asarray(low, values[0].dtype))
    factors = [float(v) for v in values]
    assert factors[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert set(factors[20:]) == {exact_low}
    for step in range(warmup, end):
        cosine = math.cos(math.pi * (step - warmup) / (end - warmup))
        want = low + (1 - low) * 0.5 * (1 + cosine)
        assert abs(factors[step] - want) <= 4 * eps * want
    assert np.all(np.diff(factors[4:21]) < 0)


def test_schedule_takes_python_ints_and_keeps_its_digits_near_the_end():
    assert float(warmup_cosine(0, 0, 3)) == 1.0
    assert float(warmup_cosine(3, 0, 3, 0.0)) == 0.0
    tiny = float(warmup_cosine(10**8 - 1, 0, 10**8, 0.0))  # float32 alone cannot tell these two counts apart
    assert abs(tiny / (math.pi / 2 * 1e-8) ** 2 - 1) <= 8 * float(jnp.finfo(jnp.float32).eps)
    for low in (0.0, 0.25, 1.0):
        assert float(warmup_cosine(7, 7, 9, low)) == 1.0
        assert float(warmup_cosine(9, 7, 9, low)) == low


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 2, 10), "step counts"),
        ((1.5, 2, 10), "integer scalar"),
        ((np.float32(1), 2, 10), "integer scalar"),
        ((0, -1, 10), "warmup_steps"),
        ((0, 10, 10), "max_steps"),
        ((0, 2, 10, 1.5), "min_ratio"),
        ((0, 2, 10, math.nan), "min_ratio"),
    ],
)
def test_schedule_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        warmup_cosine(*arguments)


def test_schedule_refuses_float_and_array_steps():
    for step in (jnp.float32(1.0), jnp.arange(3)):
        with pytest.raises(ValueError, match="integer scalar"):
            warmup_cosine(step, 2, 10)


# --- what happens at the edges of the number range -------------------------------------------------------------------


def test_a_constant_gradient_keeps_its_average():
    """float32's 0.999 and 0.001 add up to 1 − 1.3e-5·0.001: a plain weighted sum would drift away by 6e-6 of g."""
    grad = jnp.asarray([0.3, 1.7, -2.3])

    @jax.jit
    def run(p):
        body = lambda _, carry: adamw_step(carry[0], grad, carry[1], 1e-3, weight_decay=0.0)  # noqa: E731
        return jax.lax.fori_loop(0, 3000, body, (p, init_adamw_state(p)))[1]

    state = run(jnp.zeros(3))
    share, g = 1 - 0.999**3000, np.asarray(grad)
    u = float(jnp.finfo(jnp.float32).eps)
    # A rounding to nearest may stop an average as far away as half an ulp over 1 − β.
    assert np.all(np.abs(np.asarray(state.m) - g) <= u / 0.1 * np.abs(g))
    assert np.all(np.abs(np.asarray(state.v) - share * g**2) <= u / 0.001 / 8 * g**2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_an_overflowing_second_moment_comes_back(dtype):
    p = jnp.zeros(2, dtype)
    state = init_adamw_state(p)
    huge = jnp.full((2,), 6e4 if dtype == jnp.float16 else 1e38, dtype)
    for grad in (huge, huge, jnp.zeros_like(huge)):
        p, state = jitted(p, grad, state, 1e-3)
    assert bool(jnp.isfinite(p).all())
    assert bool(jnp.isfinite(state.v).all())
    assert float(state.v[0]) < float(jnp.finfo(dtype).max)


# --- NaN, donation, trees --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_gradients_are_refused_where_there_are_values(bad):
    params = {"a": jnp.ones(2), "b": jnp.ones((2, 2))}
    grads = {"a": jnp.ones(2), "b": jnp.ones((2, 2)).at[1, 0].set(bad)}
    state = init_adamw_state(params)
    with pytest.raises(ValueError, match=r"grads\['b'\] holds NaN or Inf in 1 entries"):
        adamw_step(params, grads, state, 1e-2)
    assert all(bool((p == 1).all()) for p in params.values())
    assert int(state.t) == 0
    # Inside jit there is nothing to look at: it goes through, and shows.
    new, state = jitted(params, grads, state, 1e-2)
    assert bool(jnp.isfinite(new["a"]).all())
    assert not bool(jnp.isfinite(new["b"]).all())
    constant = grads  # a constant of somebody's program has values
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        jax.jit(lambda p, s: adamw_step(p, constant, s, 1e-2))(params, init_adamw_state(params))


@pytest.mark.parametrize("name", ["betas", "eps", "weight_decay"])
def test_traced_hyperparameters_are_refused_with_the_remedy(name):
    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="static_argnames"):
        jax.jit(adamw_step)(params, params, init_adamw_state(params), 1e-2, **{name: HYPER[name]})


def test_concrete_learning_rates_are_checked_whatever_they_are():
    params = {"w": jnp.ones(2)}
    for lr in (np.float32(-1.0), jnp.float32(-1.0), jnp.float32(math.nan), np.float64(math.inf)):
        with pytest.raises(ValueError, match="lr must be finite"):
            adamw_step(params, params, init_adamw_state(params), lr)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_every_buffer_is_really_donated(dtype):
    with jax.enable_x64(dtype == "float64"):
        params, grads = tree_of(dtype), tree_of(dtype, 1)
        state = init_adamw_state(params)
        step = jax.jit(
            adamw_step, static_argnames=("betas", "eps", "weight_decay"), donate_argnames=("params", "state")
        )
        new, after = step(params, grads, state, **HYPER)
        old = jax.tree.leaves((params, state))
        assert all(x.is_deleted() for x in old if x.size)
        assert not any(x.is_deleted() for x in jax.tree.leaves((new, after, grads)))
        assert {x.dtype for x in jax.tree.leaves((new, after.m, after.v))} == {jnp.dtype(dtype)}


def test_an_nnx_state_can_be_donated():
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model, nnx.Param)
    params = jax.tree.map(jnp.copy, params)
    x = jnp.ones((2, 3))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        grads = jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p)(x) ** 2))(params)
        return adamw_step(params, grads, state, 1e-2)

    new, state = step(params, init_adamw_state(params))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    assert int(step(new, state)[1].t) == 2


def test_jit_and_no_jit_agree_to_the_last_places():
    params, grads = tree_of(jnp.float32), tree_of(jnp.float32, 1)
    eager, _ = adamw_step(params, grads, init_adamw_state(params), **HYPER)
    fused, _ = jitted(params, grads, init_adamw_state(params), **HYPER)
    u = float(jnp.finfo(jnp.float32).eps)
    for name, p in eager.items():  # a fused multiply and add rounds once where two operations round twice
        bound = u * (np.abs(np.asarray(p)) / 2 + 4 * HYPER["lr"])
        assert np.all(np.abs(np.asarray(p) - np.asarray(fused[name])) <= bound)


# --- adamw, for optax ------------------------------------------------------------------------------------------------


def test_decay_mask():
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
    params = nnx.split(model, nnx.Param)[1]
    mask = decay_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    flat = {".".join(map(str, path)): flag for path, flag in nnx.to_flat_state(mask)}
    shapes = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(params)}
    assert {k: bool(jax.tree.leaves(v)[0]) for k, v in flat.items()} == {k: len(s) >= 2 for k, s in shapes.items()}
    assert decay_mask({"a": jnp.ones(()), "b": None, "c": jnp.ones((2, 2, 2))}) == {"a": False, "b": None, "c": True}


def near(before, after):
    """Where a parameter keeps its sign and stays within a factor of two, p − q is exact (Sterbenz)."""
    small, large = np.minimum(np.abs(before), np.abs(after)), np.maximum(np.abs(before), np.abs(after))
    return (np.sign(before) == np.sign(after)) & (large <= 2 * small)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_adamw_is_adamw_step_bit_for_bit_within_a_factor_of_two(dtype):
    import optax

    with jax.enable_x64(dtype == "float64"):
        rng = np.random.default_rng(3)
        p = {"w": jnp.asarray(0.1 * rng.normal(size=4000), dtype), "b": jnp.asarray(rng.normal(size=()), dtype)}
        grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype), p)
        optimizer = adamw(**HYPER)
        updates, state = optimizer.update(grads, optimizer.init(p), p)
        got = optax.apply_updates(p, updates)
        want, wanted_state = adamw_step(p, grads, init_adamw_state(p), **HYPER)
        assert isinstance(state, AdamWState)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, state, wanted_state))
        wide = lambda tree: np.asarray(tree["w"], np.float64)  # noqa: E731
        exact = near(wide(p), wide(want))
        assert 0.8 < exact.mean() < 1.0
        assert np.array_equal(wide(got)[exact], wide(want)[exact])
        # Elsewhere: u is off by half an ulp of itself, and p + u is rounded again.
        eps = float(jnp.finfo(dtype).eps)
        bound = eps * (np.abs(wide(updates)) / 2 + np.abs(wide(want)))
        assert np.all(np.abs(wide(got) - wide(want)) <= bound)
        assert got["w"].dtype == p["w"].dtype


def test_adamw_inside_a_chain_and_jit():
    import optax

    params, grads = tree_of(jnp.float32), tree_of(jnp.float32, 1, 5.0)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw(3e-3, weight_decay=0.1))

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    want, wanted = params, init_adamw_state(params)
    scale = 1 / global_norm(grads)
    clipped = jax.tree.map(lambda g: g * scale, grads)
    for _ in range(3):
        params, state = step(params, state, grads)
        want, wanted = jitted(want, clipped, wanted, 3e-3, weight_decay=0.1)
    assert int(state[1].t) == 3
    u = float(jnp.finfo(jnp.float32).eps)
    for name, p in params.items():
        assert np.all(np.abs(np.asarray(p) - np.asarray(want[name])) <= 3 * u * (np.abs(np.asarray(p)) + 8 * 3e-3))


def test_adamw_takes_a_schedule_of_the_updates_made_before():
    params = {"w": jnp.ones(2)}
    optimizer = adamw(lambda count: 0.5 * warmup_cosine(count, 2, 4), weight_decay=0.0)
    state, moves = optimizer.init(params), []
    for _ in range(5):
        updates, state = jax.jit(optimizer.update)(params, state, params)
        moves.append(-float(updates["w"][0]))
    want = [0.5 * float(warmup_cosine(step, 2, 4)) for step in range(5)]
    assert np.allclose(moves, want, rtol=0, atol=4 * float(jnp.finfo(jnp.float32).eps))
    assert moves[0] == 0.0


@pytest.mark.parametrize("mask", [decay_mask, {"w": True, "b": False}])
def test_adamw_decays_what_the_mask_says(mask):
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer = adamw(0.5, weight_decay=0.5, mask=mask)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert updates["w"].tolist() == [[-0.25, -0.25], [-0.25, -0.25]]
    assert updates["b"].tolist() == [0.0, 0.0]
    every = adamw(0.5, weight_decay=0.5)
    assert every.update(zeros, every.init(params), params)[0]["b"].tolist() == [-0.25, -0.25]


def test_adamw_works_under_optax_wrappers_and_on_nnx_states():
    import optax

    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    part = optax.masked(adamw(0.5), {"w": True, "b": False})
    updates, _ = part.update(params, part.init(params), params)
    assert updates["b"].tolist() == [1.0, 1.0]  # optax hands on what it leaves out
    assert float(updates["w"][0, 0]) < 0
    careful = optax.apply_if_finite(adamw(0.5), max_consecutive_errors=3)
    bad = {"w": jnp.full((2, 2), jnp.nan), "b": jnp.ones(2)}
    with jax.numpy_dtype_promotion("standard"):  # optax's own counters
        updates, state = jax.jit(careful.update)(bad, careful.init(params), params)
    assert not any(bool(u.any()) for u in jax.tree.leaves(updates))
    assert int(state.inner_state.t) == 0
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tree = nnx.split(model, nnx.Param)[1]
    optimizer = adamw(0.1, mask=decay_mask)
    updates, _ = optimizer.update(tree, optimizer.init(tree), tree)
    assert jax.tree.structure(optax.apply_updates(tree, updates)) == jax.tree.structure(tree)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": jnp.ones(2)}, "lr must be a scalar"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": 0.9}, "betas"),
        ({"eps": math.nan}, "eps"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"lr": None}, "lr must be a number"),
        ({"betas": ("a", "b")}, "betas"),
        ({"mask": {"w": True}}, "mask must be a tree of bools with the structure"),
        (
            {"mask": {"w": jnp.array(True), "b": False}},
            r"mask must be a tree of bools, Python's True and False, got \w+ at mask\['w'\]; convert it with bool",
        ),
        ({"mask": {"w": 1, "b": 0}}, "mask must be a tree of bools"),
    ],
)
def test_what_adamw_refuses(change, message):
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match=message):
        adamw(**{"lr": 0.1, **change}).init(params)


def test_what_its_updates_refuse():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    optimizer = adamw(lambda count: -1.0)
    state = optimizer.init(params)
    with pytest.raises(ValueError, match="params must be given"):
        optimizer.update(params, state)
    with pytest.raises(ValueError, match="lr must be finite"):
        optimizer.update(params, state, params)
    with pytest.raises(ValueError, match="state must be an AdamWState"):
        optimizer.update(params, {}, params)
    with pytest.raises(ValueError, match="real floating dtype"):
        adamw(0.1).init({"w": jnp.ones(2, jnp.int32)})


@pytest.mark.parametrize("compiled", [False, True])
def test_adamw_hands_nan_on_so_that_apply_if_finite_can_skip_it(compiled):
    import optax

    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    bad = {"w": jnp.full((2, 2), jnp.nan), "b": jnp.ones(2)}
    plain = adamw(0.5)
    updates, _ = plain.update(bad, plain.init(params), params)
    assert bool(jnp.isnan(updates["w"]).all())
    assert bool(jnp.isfinite(updates["b"]).all())
    careful = optax.apply_if_finite(plain, max_consecutive_errors=3)
    update = jax.jit(careful.update) if compiled else careful.update
    with jax.numpy_dtype_promotion("standard"):  # optax's own counters
        updates, state = update(bad, careful.init(params), params)
        assert not any(bool(u.any()) for u in jax.tree.leaves(updates))
        assert int(state.inner_state.t) == 0
        updates, state = update(params, state, params)
    assert all(bool(u.all()) for u in jax.tree.leaves(updates))
    assert int(state.inner_state.t) == 1


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("static", [(), ("betas", "eps", "weight_decay", "mask")])
def test_adamw_under_inject_hyperparams(compiled, static):
    import optax

    params = {"w": jnp.full((2, 2), 3.0), "b": jnp.ones(2)}
    mask = decay_mask if static else None
    optimizer = optax.inject_hyperparams(adamw, static_args=static)(lr=0.1, weight_decay=0.5, mask=mask)
    update = jax.jit(optimizer.update) if compiled else optimizer.update
    plain = adamw(0.1, weight_decay=0.5, mask=mask)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = update(params, optimizer.init(params), params)
        state.hyperparams["lr"] = jnp.float32(0.0)
        later, _ = update(params, state, params)
    want, _ = (jax.jit(plain.update) if compiled else plain.update)(params, plain.init(params), params)
    u = float(jnp.finfo(jnp.float32).eps)
    for name, x in updates.items():
        bound = 4 * u * np.abs(np.asarray(params[name]))
        assert np.all(np.abs(np.asarray(x) - np.asarray(want[name])) <= bound)
        assert not later[name].any()


def test_traced_betas_and_injected_mask_functions_are_refused_with_the_remedy():
    import optax

    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match=r'static_args=\("betas", "eps", "weight_decay"\)'):
        jax.jit(lambda beta: adamw(0.1, betas=(beta, 0.9)).init(params))(0.5)
    optimizer = optax.inject_hyperparams(adamw)(lr=0.1, mask=decay_mask)  # optax takes the function for a schedule
    with jax.numpy_dtype_promotion("standard"), pytest.raises(ValueError, match="mask must be a tree of bools"):
        optimizer.init(params)
