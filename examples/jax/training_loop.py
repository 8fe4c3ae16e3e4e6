"""A minimal training loop in JAX (exercise 6), and its two questions answered by running them.

1. Why do we call optimizer.zero_grad()? The question does not arise: gradients are a value that jax.grad returns, and
   nothing adds up. The mistake that takes its place: not keeping the new opt_state, so that every step is a first one.
2. What happens if we don't call loss.backward()? There is none: the gradients come with the loss. The mistake that
   takes its place: not keeping the new parameters, so that nothing is learned.
"""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from omni_jax import bias_default, linear_default, set_seed, validate_loss

EPOCHS = 10


def make_data() -> tuple[jax.Array, jax.Array]:
    """32 points with 10 features and a target each, all noise: what can be learned is little, but it is some."""
    key_x, key_y = jax.random.split(jax.random.key(0))  # a key is used once; torch's generator moves on by itself
    return jax.random.normal(key_x, (32, 10)), jax.random.normal(key_y, (32, 1))


def make_model() -> nnx.Linear:
    # torch's default weights and biases, U(±1/√fan_in); flax's own defaults differ.
    return nnx.Linear(10, 1, kernel_init=linear_default, bias_init=bias_default(10), rngs=nnx.Rngs(params=set_seed(0)))


def train(epochs: int, forget: str = "") -> list[float]:
    """The losses of a run; `forget` is the result that is not kept."""
    X, y = make_data()
    graphdef, params = nnx.split(make_model(), nnx.Param)
    optimizer = optax.adam(0.01)
    opt_state = optimizer.init(params)

    def loss_fn(params: nnx.State) -> jax.Array:
        pred = nnx.merge(graphdef, params)(X)
        return jnp.mean(jnp.square(pred - y))

    @jax.jit
    def step(params: nnx.State, opt_state: optax.OptState) -> tuple[nnx.State, optax.OptState, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    losses = []
    for _ in range(epochs):
        new_params, new_opt_state, loss = step(params, opt_state)
        losses.append(validate_loss(loss))  # outside jit: only there the loss has a value that can be looked at
        if forget != "params":
            params = new_params
        if forget != "opt_state":
            opt_state = new_opt_state
    return losses


def rises(losses: list[float]) -> int:
    """In how many epochs the loss went up."""
    return sum(b > a for a, b in pairwise(losses))


def question_1() -> None:
    """Why do we call optimizer.zero_grad()?"""
    X, y = make_data()
    graphdef, params = nnx.split(make_model(), nnx.Param)
    gradient = jax.jit(jax.grad(lambda params: jnp.mean(jnp.square(nnx.merge(graphdef, params)(X) - y))))
    once, twice = (gradient(params)["kernel"][...] for _ in range(2))
    norms = [float(jnp.linalg.norm(g)) for g in (once, twice)]
    print(f"  norm of the gradient at the first call: {norms[0]:.4f}, at the second: {norms[1]:.4f}")
    check(bool(jnp.array_equal(once, twice)), "nothing adds up: the same arguments give the same gradients")

    # Adam's first step moves every weight by ±lr whatever the gradient: without its memory every step does that.
    right, wrong = train(500), train(500, forget="opt_state")
    print(f"  loss after 500 epochs, keeping opt_state: {right[-1]:.6f}, not keeping it: {wrong[-1]:.6f}")
    check(right[:2] == wrong[:2] and right[-1] < wrong[-1], "only the first step is the same, and it never settles")
    print(f"  epochs in which the loss rose: {rises(right)} and {rises(wrong)}")
    check(rises(wrong) > rises(right), "full steps overshoot")
    print("  Answer: nothing has to be cleared; what must not be forgotten is to pass opt_state on.")


def question_2() -> None:
    """What happens if we don't call loss.backward()?"""
    losses = train(EPOCHS, forget="params")
    print(f"  loss without keeping the parameters, first and last epoch: {losses[0]:.4f}, {losses[-1]:.4f}")
    check(len(set(losses)) == 1, "a step that is not kept has not happened")

    X, y = make_data()
    graphdef, params = nnx.split(make_model(), nnx.Param)
    optimizer = optax.sgd(0.01)
    grads = jax.grad(lambda params: jnp.mean(jnp.square(nnx.merge(graphdef, params)(X) - y)))(params)
    opt_state, moved = optimizer.init(params), params
    for _ in range(2):  # the same `grads` twice: here it can be seen in the code that they are old
        updates, opt_state = optimizer.update(grads, opt_state, moved)
        moved = optax.apply_updates(moved, updates)
    change = params["kernel"][...] - moved["kernel"][...]
    ratio = float(jnp.linalg.norm(change) / (0.01 * jnp.linalg.norm(grads["kernel"][...])))
    print(f"  two steps on one gradient move the weights by {ratio:.4f} gradients")
    check(round(ratio, 4) == 2.0, "a gradient that is passed again is used again")
    print("  Answer: the gradients come with the loss; what must not be forgotten is to keep the new parameters.")


def main() -> None:
    losses = train(EPOCHS)
    for epoch, loss in enumerate(losses):
        print(f"Epoch {epoch}, Loss: {loss:.4f}")
    check(all(b < a for a, b in pairwise(losses)), "the loss falls in every epoch")
    for question in (question_1, question_2):
        print(f"{question.__name__}: {question.__doc__}")
        question()


def check(true: bool, claim: str) -> None:
    if not true:
        raise RuntimeError(f"not so: {claim}")


if __name__ == "__main__":
    main()
