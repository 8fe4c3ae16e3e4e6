"""AdamW from scratch in JAX: one step by hand, 100 steps beside optax.adamw, a whole tree, the optax transformation.

Run it beside its PyTorch twin, examples/torch/adamw.py: the figures agree but for the last digits. Every line that
begins with "ok" was checked before it was printed.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from omni_jax import (
    adamw,
    adamw_step,
    clip_grad_norm,
    decay_mask,
    init_adamw_state,
    warmup_cosine,
)

HYPER = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
STEPS = 100
EPS = float(jnp.finfo(jnp.float32).eps)


def check(claim: str, true: object) -> None:
    if not true:
        raise SystemExit(f"not true: {claim}")
    print(f"  ok: {claim}")


def rounded(x: jax.Array) -> list[float]:
    """To six digits behind the point: 0.9 for the float32 that prints as 0.8999999761581421."""
    return [round(value, 6) for value in x.tolist()]


def one_step() -> None:
    print("1. One step by hand")
    p = jnp.array([1.0, -2.0, 3.0])
    grad = jnp.array([0.5, -4.0, 0.0])
    state = init_adamw_state(p)
    new, state = adamw_step(p, grad, state, lr=0.1, weight_decay=0.0)
    print(f"  p {rounded(new)}, m {rounded(state.m)}, v {rounded(state.v)}, t {int(state.t)}")
    # m̂ = g and v̂ = g² at the first step, so the update is lr·g/|g|: a gradient of 4 moves no further than one of 0.5.
    check("the first step is lr times the sign of the gradient", jnp.allclose(new, jnp.array([0.9, -1.9, 3.0])))
    # A function of arguments is JAX's habit: p is what it was, and the new parameters are a result.
    check("p was not changed", p.tolist() == [1.0, -2.0, 3.0])
    # What is given away may be overwritten: donated buffers are reused, as torch reuses p's storage.
    step = jax.jit(partial(adamw_step, **HYPER), donate_argnames=("params", "state"))
    again, state = step(new, grad, state, lr=0.1)
    check("donated parameters are gone, their buffer was used again", new.is_deleted() and not again.is_deleted())


def weight_decay() -> None:
    print("2. Weight decay is decoupled")
    moved = {}
    for size in (1.0, 1000.0):
        p = jnp.array([2.0])
        new, _ = adamw_step(p, jnp.array([size]), init_adamw_state(p), lr=0.1, weight_decay=0.5)
        moved[size] = 2.0 - float(new[0])
        print(f"  gradient {size:g}: p moved by {moved[size]:.4f} = 0.1·(1 + 0.5·2)")
    # As an L2 penalty it would be added to the gradient, and be divided by √v̂ with it: nothing next to 1000.
    check("decay does not depend on the gradient's size", math.isclose(moved[1.0], moved[1000.0], rel_tol=10 * EPS))
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.LayerNorm(3, rngs=nnx.Rngs(0)))
    _, params = nnx.split(model, nnx.Param)
    named = {".".join(map(str, path)): p.ndim for path, p in nnx.to_flat_state(params)}
    mask = dict(zip(named, jax.tree.leaves(decay_mask(params)), strict=True))
    print(f"  decay_mask: {mask}")
    check("matrices decay, vectors do not", mask == {name: ndim == 2 for name, ndim in named.items()})


def problem() -> tuple[np.ndarray, np.ndarray]:
    """(parameters (40, 25), gradients (STEPS, 40, 25)): the same numbers in both files."""
    rng = np.random.default_rng(0)
    start = rng.standard_normal((40, 25)).astype(np.float32)
    mean = 0.3 * rng.standard_normal((40, 25))
    return start, (mean + rng.standard_normal((STEPS, 40, 25))).astype(np.float32)


def exact(start: np.ndarray, grads: np.ndarray, lr: float) -> np.ndarray:
    """The displacement by the paper's formula in float64."""
    (beta1, beta2), p = HYPER["betas"], start.astype(np.float64)
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads.astype(np.float64), start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        p = p - lr * (m_hat / (np.sqrt(v_hat) + HYPER["eps"]) + HYPER["weight_decay"] * p)
    return p - start


def a_hundred_steps() -> None:
    print(f"3. {STEPS} steps beside optax.adamw")
    (start, grads), lr = problem(), 1e-3
    p = jnp.asarray(start)
    state = init_adamw_state(p)
    # optax's own default decay is 1e-4, torch's 1e-2: never rely on either.
    library = optax.adamw(lr, b1=0.9, b2=0.999, eps=HYPER["eps"], weight_decay=HYPER["weight_decay"])
    theirs, theirs_state = p, library.init(p)
    step = jax.jit(partial(adamw_step, lr=lr, **HYPER))

    @jax.jit
    def library_step(params, state, grad):
        updates, state = library.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):  # optax promotes its integer count to float32 by itself
        for g in grads:
            p, state = step(p, g, state)
            theirs, theirs_state = library_step(theirs, theirs_state, g)
    want = exact(start, grads, lr)
    errors = {
        name: np.sqrt(np.mean((np.asarray(x, np.float64) - start - want) ** 2) / np.mean(want**2))
        for name, x in (("adamw_step", p), ("optax.adamw", theirs))
    }
    apart = float(jnp.abs(p - theirs).max())
    print(f"  after {int(state.t)} steps the parameters differ by {apart:.1e} at most")
    for name, error in errors.items():
        print(f"  {name}: displacement {error:.1e} from the formula in float64 ({-math.log2(error):.1f} bits)")
    # optax takes 1 − βᵗ in float32: of 1 − 0.999 it keeps 14 bits.
    check("optax is further from the formula", errors["adamw_step"] < errors["optax.adamw"])
    # A step of lr rounds p, which is about 1, to float32.
    check("neither is far", max(errors.values()) < EPS / lr)


def many_parameters() -> None:
    print("4. Many parameters: the tree in JAX, where torch takes a list")
    keys = jax.random.split(jax.random.key(0), 2)
    graphdef, params = nnx.split(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.Param)
    x, y = jax.random.normal(keys[0], (16, 4)), jax.random.normal(keys[1], (16, 2))

    def loss_fn(params):
        return jnp.mean((nnx.merge(graphdef, params)(x) - y) ** 2)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        grads, norm = clip_grad_norm(grads, max_norm=1.0)
        lr = 0.05 * warmup_cosine(state.t, warmup_steps=5, max_steps=50)
        return *adamw_step(params, grads, state, lr, **HYPER), loss, norm, lr

    state, losses = init_adamw_state(params), []
    for i in range(50):
        params, state, loss, norm, lr = step(params, state)
        losses.append(float(loss))
        if i % 10 == 0:
            print(f"  step {i:>2}: loss {losses[-1]:.4f}, gradient norm {float(norm):.3f}, lr {float(lr):.4f}")
    check("the loss fell", losses[-1] < losses[0])
    check("the first update had lr 0", losses[0] == losses[1])
    # Outside jit a NaN is refused as in torch. Inside there is nothing to look at: it goes through, and shows.
    grads = jax.grad(loss_fn)(params)
    grads["bias"] = grads["bias"].replace(grads["bias"][...].at[0].set(math.nan))
    try:
        adamw_step(params, grads, state, 0.05, **HYPER)
    except ValueError as error:
        print(f"  refused: {error}")
    after, _ = jax.jit(partial(adamw_step, **HYPER))(params, grads, state, lr=0.05)
    check("under jit the NaN is in the new parameters", bool(jnp.isnan(after["bias"][...]).any()))
    check("and the old ones are as they were", bool(jnp.isfinite(params["bias"][...]).all()))


def as_an_optimizer() -> None:
    print("5. AdamW as an optimizer: a transformation to chain with optax's")
    keys = jax.random.split(jax.random.key(0), 2)
    graphdef, params = nnx.split(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.Param)
    x, y = jax.random.normal(keys[0], (16, 4)), jax.random.normal(keys[1], (16, 2))
    # The mask does what torch's parameter groups do.
    ours = optax.chain(optax.clip_by_global_norm(1.0), adamw(0.05, **HYPER, mask=decay_mask))

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((nnx.merge(graphdef, p)(x) - y) ** 2))(params)
        updates, state = ours.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = ours.init(params)
    _, _, first = step(params, state)
    for _ in range(50):
        params, state, loss = step(params, state)
    print(f"  loss {float(first):.4f} → {float(loss):.4f}")
    check("the loss fell", float(loss) < float(first))
    check("its state is an AdamWState, at step 50", int(state[1].t) == 50)


def main() -> None:
    one_step()
    weight_decay()
    a_hundred_steps()
    many_parameters()
    as_an_optimizer()


if __name__ == "__main__":
    main()
