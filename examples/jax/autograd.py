"""Gradients in JAX: functions that return gradients, and nothing left behind. Its twin is examples/torch/autograd.py.

Run it with `python examples/jax/autograd.py`; every line that begins with "ok" was checked before it was
printed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from omni_jax import (
    grad_with_autograd_grad,
    grad_with_backward,
    grad_with_stopped_target,
    grad_wrt_multiple_inputs,
    jvp,
    per_example_grads,
    value_and_grad,
    vjp,
)


def show(claim: str, holds: bool) -> None:
    """Print what has just been seen; raise if it was not so."""
    if not holds:
        raise AssertionError(f"not true here: {claim}")
    print(f"  ok: {claim}")


def one_gradient_two_ways() -> None:
    print("f(x) = sum(x^2), df/dx = 2x")
    x = jnp.array([1.0, -2.0, 3.0])
    returned, pulled_back = grad_with_autograd_grad(x), grad_with_backward(x)
    print(f"  jax.grad: {returned.tolist()}, jax.vjp: {pulled_back.tolist()}")
    show("both are 2x", np.array_equal(returned, 2 * x) and np.array_equal(pulled_back, returned))
    show("compiled or not", np.array_equal(jax.jit(grad_with_backward)(x), returned))


def what_accumulates() -> None:
    print("Why no zero_grad()? A gradient is a value that a function returns")
    x = jnp.array([1.0, -2.0, 3.0])
    gradient = jax.grad(lambda x: jnp.sum(x * x))
    seen, total = [], jnp.zeros_like(x)
    for _ in range(3):
        seen.append(gradient(x).tolist())
        total = total + gradient(x)  # to accumulate, add
    print(f"  three calls: {seen}")
    once = 2 * x
    show("the third call gives what the first gave", seen[2] == seen[0] == once.tolist())
    show("their sum, made by hand, is three times the gradient", np.array_equal(total, 3 * once))
    # In torch, backward() adds to x.grad by itself, hence optimizer.zero_grad() before every step.


def several_inputs() -> None:
    print("f(a, b) = sum(a^2 + ab)")
    a, b = jnp.array([1.0, -2.0]), jnp.array([10.0, 20.0])
    df_da, df_db = grad_wrt_multiple_inputs(a, b)  # argnums=(0, 1)
    print(f"  df/da: {df_da.tolist()}, df/db: {df_db.tolist()}")
    show("df/da = 2a + b and df/db = a", np.array_equal(df_da, 2 * a + b) and np.array_equal(df_db, a))
    df_da, df_db = grad_wrt_multiple_inputs(a, a)
    show("the same array twice: partial derivatives, 3a and a", bool(jnp.all(df_da == 3 * a) & jnp.all(df_db == a)))
    value, (gradient,) = value_and_grad(lambda p: jnp.sum(p["a"] ** 2 + p["a"] * p["b"]), {"a": a, "b": b})
    print(f"  value_and_grad of a dict: {value.item()}, { ({k: g.tolist() for k, g in gradient.items()}) }")
    show("a dict goes in, a dict of the same keys comes out", list(gradient) == ["a", "b"])


def nothing_recorded() -> None:
    print("no no_grad: JAX records only while a transformation looks on")
    x = jnp.array([1.0, -2.0])
    plain = jnp.sum(x * x)
    show(
        "the result of a function is a plain array",
        isinstance(plain, jax.Array) and not isinstance(plain, Tracer),
    )
    looked_on = []
    jax.grad(lambda x: (looked_on.append(isinstance(x, Tracer)), jnp.sum(x * x))[1])(x)
    show("inside jax.grad the function gets a tracer in its place", looked_on == [True])
    second = jax.grad(lambda x: jnp.sum(grad_with_autograd_grad(x)))(x)
    show("and a gradient can be differentiated again", np.array_equal(second, [2.0, 2.0]))
    # torch records whatever touches a tensor that requires a gradient; torch.no_grad() switches that off.


def a_target_that_must_not_learn() -> None:
    print("f(x) = sum((x - target)^2) with target = x^2")
    x = jnp.array([3.0, 0.25])
    stopped = grad_with_stopped_target(x)  # jax.lax.stop_gradient
    flowing = jax.grad(lambda x: jnp.sum((x - x * x) ** 2))(x)
    print(f"  with stop_gradient: {stopped.tolist()}, without: {flowing.tolist()}")
    show("with it the gradient is 2(x - x^2)", np.array_equal(stopped, 2 * (x - x * x)))
    show("without it there is a factor 1 - 2x", np.array_equal(flowing, 2 * (x - x * x) * (1 - 2 * x)))
    show("stop_gradient is the identity on values", np.array_equal(jax.lax.stop_gradient(x), x))


def forward_and_reverse() -> None:
    print("y = x^2 elementwise: J = diag(2x), a column by jvp, a row by vjp")
    x = jnp.array([1.0, 3.0, 5.0])
    e = jnp.array([0.0, 1.0, 0.0])
    y, column = jvp(lambda x: x * x, x, e)
    _, row = vjp(lambda x: x * x, x, e)
    print(f"  y: {y.tolist()}, column 1: {column.tolist()}, row 1: {row.tolist()}")
    show("this J is diagonal: its second column is its second row", np.array_equal(column, row))
    _, everything = vjp(lambda x: jnp.sum(x * x), x, jnp.float32(1.0))
    show("the gradient of a scalar is its vjp with 1", np.array_equal(everything, grad_with_backward(x)))


def example_by_example() -> None:
    print("per-example gradients of (w·x + b - y)^2")
    params = {"w": jnp.array([1.0, -1.0]), "b": jnp.float32(0.5)}
    x, y = jnp.array([[1.0, 2.0], [0.0, 1.0], [3.0, 1.0]]), jnp.array([0.0, 1.0, 2.0])

    def loss(params, x, y):
        return (jnp.sum(params["w"] * x) + params["b"] - y) ** 2

    rows = per_example_grads(loss, params, x, y)
    norms = jnp.sqrt(jnp.sum(rows["w"] ** 2, axis=1) + rows["b"] ** 2)
    print(f"  norm of each example's gradient: {[round(n, 4) for n in norms.tolist()]}")
    _, (of_sum,) = value_and_grad(lambda p: jnp.stack([loss(p, x[i], y[i]) for i in range(3)]).sum(), params)
    show("one row for each example", rows["w"].shape == (3, 2) and rows["b"].shape == (3,))
    show("their sum is the gradient of the summed loss", all(np.array_equal(rows[k].sum(0), of_sum[k]) for k in params))
    same = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(params, x, y)
    show("vmap of grad, as JAX writes it, gives the same", all(np.array_equal(rows[k], same[k]) for k in params))


def train_and_eval() -> None:
    print("dropout: train() and eval(), or deterministic=")
    x = jnp.ones(1000)
    layer = nnx.Dropout(rate=0.5, rngs=nnx.Rngs(dropout=0))  # the mask comes from a stream of its own
    layer.train()  # deterministic = False; modules begin in this mode
    noisy = layer(x)
    kept = int(jnp.sum(noisy != 0))
    print(f"  train(): {kept} of 1000 kept, each multiplied by {noisy.max().item()}")
    show("train() zeroes some and divides the rest by 1 - rate", 0 < kept < 1000 and noisy.max().item() == 2.0)
    show("two calls draw two masks", not np.array_equal(layer(x), noisy))
    layer.eval()
    show("eval() is the identity: it sets deterministic", layer.deterministic is True and np.array_equal(layer(x), x))
    show("deterministic=False says it for one call", not np.array_equal(layer(x, deterministic=False), x))
    key = jax.random.key(0)
    one, two = (layer(x, deterministic=False, rngs=key) for _ in range(2))
    show("a key of one's own makes the mask a function of the key", np.array_equal(one, two))
    masked = lambda x: layer(x, deterministic=False, rngs=key)  # noqa: E731
    out, gradient = masked(x), jax.grad(lambda x: jnp.sum(masked(x)))(x)
    show("the gradient goes through the same mask", np.array_equal(gradient, out))


def main() -> None:
    one_gradient_two_ways()
    what_accumulates()
    several_inputs()
    nothing_recorded()
    a_target_that_must_not_learn()
    forward_and_reverse()
    example_by_example()
    train_and_eval()


if __name__ == "__main__":
    main()
