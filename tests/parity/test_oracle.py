"""The oracle against known values and both libraries in float64; the emulations against the libraries in float32."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from parity import oracle

HYPER = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
STEPS = 100
# An ordinary tensor, one with equal entries (norm scales), one with gradients near 1e-9, one with none.
SCALES = {"matrix": 1.0, "ones": 0.1, "tiny": 1e-9, "zero": 0.0}
SHARE = 0.9


def material(dtype=np.float32):
    rng = np.random.default_rng(0)
    start = {
        "matrix": rng.normal(size=(64, 48)),
        "ones": np.ones(200),
        "tiny": 0.1 * rng.normal(size=(40, 20)),
        "zero": rng.normal(size=30),
    }
    grads = [{k: (SCALES[k] * rng.normal(size=x.shape)).astype(dtype) for k, x in start.items()} for _ in range(STEPS)]
    return {k: x.astype(dtype) for k, x in start.items()}, grads


def run_torch(start, grads, lr):
    import torch

    params = {k: torch.nn.Parameter(torch.tensor(x)) for k, x in start.items()}
    optimizer = torch.optim.AdamW(params.values(), lr=lr, **HYPER)
    steps = []
    for t, grad in enumerate(grads, start=1):
        for k, p in params.items():
            p.grad = torch.tensor(grad[k])
        optimizer.step()
        p, m, v = (
            {k: x.detach().numpy().copy() for k, x in tree.items()}
            for tree in (
                params,
                {k: optimizer.state[p]["exp_avg"] for k, p in params.items()},
                {k: optimizer.state[p]["exp_avg_sq"] for k, p in params.items()},
            )
        )
        steps.append(oracle.Step(p, m, v, t))
    return steps


def run_optax(start, grads, lr, jitted):
    import jax
    import jax.numpy as jnp
    import optax

    # In float32 by default: optax relies on implicit promotion of its int32 count, which strict mode refuses.
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(start["matrix"].dtype == np.float64):
        optimizer = optax.adamw(lr, b1=HYPER["betas"][0], b2=HYPER["betas"][1], eps=1e-8, weight_decay=0.1)
        params = {k: jnp.asarray(x) for k, x in start.items()}
        state = optimizer.init(params)

        def update(params, state, grad):
            updates, state = optimizer.update(grad, state, params)
            return optax.apply_updates(params, updates), state

        update = jax.jit(update) if jitted else update
        steps = []
        for t, grad in enumerate(grads, start=1):
            params, state = update(params, state, {k: jnp.asarray(g) for k, g in grad.items()})
            p, m, v = ({k: np.array(x) for k, x in tree.items()} for tree in (params, state[0].mu, state[0].nu))  # type: ignore[union-attr]
            steps.append(oracle.Step(p, m, v, t))
        return steps


def test_one_step_in_exact_fractions():
    # eps = 0 and a square gradient keep the first step rational: m̂ = g, √v̂ = |g|.
    (step,) = oracle.adamw({"w": np.array([3.0])}, [{"w": np.array([-0.25])}], [0.125], (0.5, 0.75), 0.0, 0.5)
    want = Fraction(3) - Fraction(1, 8) * (-1 + Fraction(1, 2) * 3)
    assert step.p["w"][0] == float(want)
    assert step.m["w"][0] == -0.125
    assert step.v["w"][0] == 0.25 * 0.0625
    assert step.t == 1


def test_bias_corrections_are_exact():
    for beta in (0.9, 0.999, 0.0):
        for t in (1, 2, 100):
            want = 1 - Fraction(beta) ** t
            got = oracle._one_less_power(beta, t, np.longdouble)
            error = Fraction(*got.as_integer_ratio()) - want
            assert abs(error) <= abs(want) * Fraction(float(np.finfo(np.longdouble).eps))


@pytest.mark.parametrize("run", [run_torch, lambda *a: run_optax(*a, jitted=True)], ids=["torch", "optax"])
def test_in_float64_the_libraries_are_the_oracle(run):
    start, grads = material(np.float64)
    theirs, ours = run(start, grads, 1e-2), oracle.adamw(start, grads, [1e-2] * STEPS, **HYPER)
    # Both libraries take 1 − βᵗ as a difference in float64: 1000 ulps are gone where β = 0.999.
    u = np.finfo(np.float64).eps
    for n in (1, 10, STEPS):
        moved, want = oracle.displacement(theirs[n - 1], start), oracle.displacement(ours[n - 1], start)
        for name in start:
            bound = u * (1000 * np.abs(want[name]) + 4 * n * (np.abs(start[name]) + 1e-2 * n))
            assert np.all(np.abs(moved[name] - want[name]) <= bound)
            assert np.all(np.abs(theirs[n - 1].m[name] - ours[n - 1].m[name]) <= 32 * u * SCALES[name] * 8)
            assert np.all(np.abs(theirs[n - 1].v[name] - ours[n - 1].v[name]) <= 1000 * u * ours[n - 1].v[name])


@pytest.mark.parametrize("lr", [1e-2, 3e-4])
@pytest.mark.parametrize("library", ["torch", "optax", "optax jitted"])
def test_the_named_cause_explains_the_deviation(library, lr):
    start, grads = material()
    lrs = [lr] * STEPS
    exact = oracle.adamw(start, grads, lrs, **HYPER)
    if library == "torch":
        theirs = run_torch(start, grads, lr)
        cause = {oracle.TORCH_CAUSE}
        with_cause, without = (oracle.torch_adamw(start, grads, lrs, **HYPER, without=c) for c in ((), cause))
    else:
        jitted = library == "optax jitted"
        theirs = run_optax(start, grads, lr, jitted)
        with_cause, without = (
            oracle.optax_adamw(start, grads, lrs, **HYPER, without=c, jitted=jitted) for c in ((), {oracle.OPTAX_CAUSE})
        )
    for n in (1, 10, STEPS):
        library_, emulated, bare, want = (
            oracle.displacement(steps[n - 1], start) for steps in (theirs, with_cause, without, exact)
        )
        assert oracle.explained(library_, emulated, want) >= SHARE
        assert oracle.explained(library_, bare, want) < SHARE  # take the cause away, and the explanation goes


def test_the_causes_have_the_sizes_they_are_said_to_have():
    start, grads = material()
    lrs = [1e-2] * STEPS
    exact = oracle.adamw(start, grads, lrs, **HYPER)

    def relative(steps, n):
        moved, want = (oracle.displacement(s[n - 1], start)["matrix"] for s in (steps, exact))
        return float(np.sqrt(np.mean((moved - want) ** 2) / np.mean(want**2)))

    correction = np.float32(1) - np.float32(0.999)
    assert abs(float(correction) / (1 - 0.999) - 1) == pytest.approx(1.3e-5, rel=0.05)
    optax, torch = oracle.optax_adamw(start, grads, lrs, **HYPER), oracle.torch_adamw(start, grads, lrs, **HYPER)
    assert 5e-6 < relative(optax, 1) < 1e-5
    # Torch's factor is the same error every step: it grows with the steps, where rounding grows with their root.
    assert relative(torch, STEPS) > 3 * relative(
        oracle.torch_adamw(start, grads, lrs, **HYPER, without={oracle.TORCH_CAUSE}), STEPS
    )


def test_rounded_betas_no_longer_add_up_to_one():
    beta, rest = np.float32(0.999), np.float32(1 - 0.999)
    assert abs(float(rest) / (1 - float(beta)) - 1) == pytest.approx(1.3e-5, rel=0.05)
    # A constant gradient: the average should be (1 - beta2^t)*g*g.
    start, steps = {"w": np.zeros(4, np.float32)}, 300
    grads = [{"w": np.array([0.3, 1.7, -2.3, 11.0], np.float32)}] * steps
    want = oracle.adamw(start, grads, [1e-3] * steps)[-1].v["w"]
    for emulation in (oracle.torch_adamw, oracle.optax_adamw):
        with_cause, without = (
            np.abs(emulation(start, grads, [1e-3] * steps, without=c)[-1].v["w"] / want - 1).max()
            for c in ((), {oracle.AVERAGE_CAUSE})
        )
        assert with_cause > 1.5e-6
        assert without < with_cause / 2


def test_the_floor_is_below_every_emulation():
    start, grads = material()
    lrs = [1e-2] * STEPS
    exact = oracle.displacement(oracle.adamw(start, grads, lrs, **HYPER)[-1], start)

    def error(steps):
        moved = oracle.displacement(steps[-1], start)
        return math.sqrt(np.mean([np.mean((moved[k] - exact[k]) ** 2) for k in start]))

    floor = error(oracle.stored_adamw(start, grads, lrs, **HYPER))
    assert 0 < floor < error(oracle.torch_adamw(start, grads, lrs, **HYPER))
    assert floor < error(oracle.optax_adamw(start, grads, lrs, **HYPER))
    assert error(oracle.stored_adamw(start, grads, lrs, **HYPER, dtype=np.longdouble)) == 0


@pytest.mark.parametrize("emulation", [oracle.torch_adamw, oracle.optax_adamw, oracle.stored_adamw])
def test_the_emulations_are_adamw(emulation):
    start, grads = material(np.float64)
    lrs = [1e-2 * (i + 1) / STEPS for i in range(STEPS)]
    ours, exact = (f(start, grads, lrs, **HYPER, dtype=np.float64) for f in (emulation, oracle.adamw))
    u = np.finfo(np.float64).eps
    for n in (1, STEPS):
        moved, want = (oracle.displacement(s[n - 1], start) for s in (ours, exact))
        for name in start:
            bound = u * (1000 * np.abs(want[name]) + 4 * n * (np.abs(start[name]) + 1e-2 * n))
            assert np.all(np.abs(moved[name] - want[name]) <= bound)


def test_the_schedule_and_clipping():
    assert [float(oracle.factor(i, 4, 12)) for i in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert float(oracle.factor(8, 4, 12)) == pytest.approx(0.55, rel=2 * np.finfo(float).eps)
    assert float(oracle.factor(12, 4, 12)) == float(oracle.factor(99, 4, 12)) == 0.1
    assert float(oracle.factor(0, 0, 5)) == 1.0
    grads = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
    clipped, norm = oracle.clip(grads, 1.0)
    assert norm == 5
    assert float(clipped["b"][0, 0]) == 4 / (5 + 1e-6)
    same, _ = oracle.clip(grads, 100.0)
    assert all(np.array_equal(same[k], grads[k]) for k in grads)
    assert oracle.global_norm({}) == 0


def test_the_recipe_starts_with_a_learning_rate_of_zero():
    start, grads = material(np.float64)
    states, rates, norms = oracle.recipe(start, grads[:4], 1e-2, warmup_steps=2, max_steps=10)
    assert [float(r) for r in rates[:3]] == [0.0, 0.005, 0.01]
    assert all(norm > 1 for norm in norms)
    assert all(np.array_equal(states[0].p[k], start[k]) for k in start)
    assert states[0].m["matrix"].any()
    scale = 1 / (float(norms[0]) + 1e-6)
    assert np.max(np.abs(states[0].m["matrix"] - 0.1 * scale * grads[0]["matrix"])) <= np.finfo(float).eps


def test_the_twins_meet_the_oracle():
    import jax
    import jax.numpy as jnp
    import torch

    from omni_jax import optim as ours_jax
    from omni_torch import optim as ours_torch

    start, grads = material(np.float64)
    grads = grads[:10]
    states, rates, _ = oracle.recipe(start, grads, 1e-2, warmup_steps=3, max_steps=12)
    p = {k: torch.tensor(x) for k, x in start.items()}
    memory = [ours_torch.init_adamw_state(x) for x in p.values()]
    for i, grad in enumerate(grads):
        g = [torch.tensor(grad[k]) for k in p]
        ours_torch.clip_grad_norm_(g, 1.0)
        lr = 1e-2 * ours_torch.warmup_cosine(i, 3, 12)
        assert abs(lr - rates[i]) <= 2 * np.finfo(float).eps * rates[i]
        ours_torch.adamw_step_many_(list(p.values()), g, memory, lr, weight_decay=0.1)
    with jax.enable_x64(True):

        @jax.jit
        def step(params, state, grad):
            grad, _ = ours_jax.clip_grad_norm(grad, 1.0)
            lr = 1e-2 * ours_jax.warmup_cosine(state.t, 3, 12)
            return ours_jax.adamw_step(params, grad, state, lr, weight_decay=0.1)

        params = {k: jnp.asarray(x) for k, x in start.items()}
        state = ours_jax.init_adamw_state(params)
        for grad in grads:
            params, state = step(params, state, {k: jnp.asarray(g) for k, g in grad.items()})
        jax_end = {k: np.array(x) for k, x in params.items()}
    want = oracle.displacement(states[-1], start)
    u = np.finfo(np.float64).eps
    for end in ({k: x.numpy() for k, x in p.items()}, jax_end):
        for name in start:
            bound = u * len(grads) * (16 * 1e-2 * len(grads) + np.abs(start[name]))
            assert np.all(np.abs(end[name].astype(np.longdouble) - start[name] - want[name]) <= bound)


def test_explained():
    a, b, c = ({"w": np.array([x])} for x in (1.0, 1.5, 5.0))
    assert oracle.explained(a, a, c) == 1.0
    assert oracle.explained(a, b, c) == 1 - 0.5 / 4
    assert oracle.explained(a, c, c) == 0.0
    assert oracle.explained(a, a, a) == 1.0
    assert oracle.explained(a, b, a) == -math.inf


def test_one_learning_rate_per_step():
    start, grads = material()
    for function in (oracle.adamw, oracle.torch_adamw, oracle.optax_adamw, oracle.stored_adamw):
        with pytest.raises(ValueError, match="one entry per step"):
            function(start, grads, [1e-2])


def test_no_framework_at_import():
    code = "import sys, parity.oracle; print([m for m in ('jax', 'torch', 'optax', 'scipy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
