"""Debugging a training loop in JAX (exercise 10): one good run, then four ways for it to go bad.

`debug_training` prints what it sees of every batch and stops before the first update that would do harm. The records
that it returns say the same to a program. It trains a copy: the model that it is given stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from omni_jax import DebugRecord, bias_default, debug_training, linear_default, set_seed

Batches = list[tuple[np.ndarray, np.ndarray]]


class Log(nnx.Module):
    """A layer with a trap: the logarithm of what may be negative."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.log(x)


def make_model(middle: Callable[..., Any]) -> nnx.Sequential:
    rngs = nnx.Rngs(params=set_seed(0))

    def linear(d_in: int, d_out: int) -> nnx.Linear:
        return nnx.Linear(d_in, d_out, kernel_init=linear_default, bias_init=bias_default(d_in), rngs=rngs)

    return nnx.Sequential(linear(10, 8), middle, linear(8, 1))


def make_batches() -> Batches:
    rng = np.random.default_rng(0)  # batches come from the host, as numpy arrays
    return [tuple(rng.normal(size=(32, d)).astype(np.float32) for d in (10, 1)) for _ in range(5)]


def mse(pred: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(pred - y))


def look(model: nnx.Module, batches: Batches, loss_fn: Callable[..., jax.Array] = mse) -> DebugRecord:
    """Run it, and return the last record."""
    optimizer = optax.sgd(0.1)
    return debug_training(model, batches, loss_fn, optimizer, max_batches=3)[-1]


def main() -> None:
    print("--- a good run: three batches of five")
    model = make_model(nnx.tanh)
    before = np.asarray(model.layers[0].kernel)
    record = look(model, make_batches())
    check(record.problem is None and record.batch == 2, "it goes through")
    check(np.array_equal(model.layers[0].kernel, before), "the updates were made to a copy")

    print("--- a NaN in the third batch")
    batches = make_batches()
    batches[2][0][7, 3] = float("nan")
    record = look(make_model(nnx.tanh), batches)
    check((record.batch, record.where) == (2, "x"), "the input is to blame")

    print("--- a layer that takes a logarithm of what is negative")
    model = make_model(Log())
    before = np.asarray(model.layers[0].kernel)
    record = look(model, make_batches())
    # nnx.Sequential keeps its layers in a list of that name; torch's keys are the bare numbers.
    check((record.batch, record.where) == (0, "output: layers.1"), "the layer is named, not the loss that showed it")
    check(np.array_equal(model.layers[0].kernel, before), "the model is as it was")

    print("--- a loss beyond all bounds")
    record = look(make_model(nnx.tanh), make_batches(), lambda pred, y: 1e9 * mse(pred, y))
    check(record.where == "loss" and record.grad_norm is None, "its gradients are not looked at")

    print("--- gradients that explode though the loss is within bounds")
    record = look(make_model(nnx.tanh), make_batches(), lambda pred, y: 1e4 * mse(pred, y))
    check(str(record.where).startswith("gradients: "), "the largest gradient is named")
    check(record.update_norm is None, "no update is made with them")


def check(true: bool, claim: str) -> None:
    if not true:
        raise RuntimeError(f"not so: {claim}")


if __name__ == "__main__":
    main()
