"""One training step in JAX: written out, and by train_step_mse.

A step is: training mode, forward and loss as one function, its gradients, update. Nothing changes in place: model and
optimizer state go in, new ones come out, and whoever calls keeps them. There are no gradients to zero.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from omni_jax import bias_default, linear_default, set_seed, train_step_mse

STEPS = 200


def make_model() -> nnx.Sequential:
    """A small network. Its dropout has rate 0, so that two steps can be compared; it is there to show the mode."""
    rngs = nnx.Rngs(params=set_seed(0), dropout=1)  # no global generator: the layers are handed their keys

    def linear(d_in: int, d_out: int) -> nnx.Linear:
        # torch's default weights, U(±1/√fan_in); flax's own are wider, and its biases 0.
        return nnx.Linear(d_in, d_out, kernel_init=linear_default, bias_init=bias_default(d_in), rngs=rngs)

    return nnx.Sequential(linear(4, 16), nnx.tanh, nnx.Dropout(0.0, rngs=rngs), linear(16, 1))


def make_batch() -> tuple[jax.Array, jax.Array]:
    """A target that a small network can learn: y = sin(x₀) + x₁·x₂, for 64 points."""
    x = jax.random.normal(jax.random.key(1), (64, 4))
    return x, (jnp.sin(x[:, 0]) + x[:, 1] * x[:, 2])[:, None]


def step_by_hand(
    model: nnx.Module,
    batch: tuple[jax.Array, jax.Array],
    optimizer: optax.GradientTransformation,
    opt_state: optax.OptState,
) -> tuple[nnx.Module, optax.OptState, float]:
    """The same six parts; the second is not needed."""
    x, y = batch
    model = nnx.clone(model)
    model.train()  # 1. dropout draws masks
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)  # what is trained, and what is not

    # 2. nothing to set to zero: gradients are a result, not a place.
    def loss_of(params: nnx.State) -> jax.Array:
        pred = nnx.merge(graphdef, params, rest, copy=True)(x)  # 3. forward
        return jnp.mean(jnp.square(pred - y))  # 4. one number

    loss, grads = jax.value_and_grad(loss_of)(params)  # 5. the function's derivative, at params
    updates, opt_state = optimizer.update(grads, opt_state, params)  # 6. state in, state out
    params = optax.apply_updates(params, updates)
    return nnx.merge(graphdef, params, rest), opt_state, float(loss)


def main() -> None:
    batch = make_batch()

    by_hand, by_name = make_model(), make_model()
    sgd = optax.sgd(0.1)  # a pair of functions without state: one serves both models
    state_by_hand, state_by_name = (sgd.init(nnx.state(model, nnx.Param)) for model in (by_hand, by_name))
    by_hand, state_by_hand, loss_by_hand = step_by_hand(by_hand, batch, sgd, state_by_hand)
    by_name, state_by_name, loss_by_name = train_step_mse(by_name, batch, sgd, state_by_name)
    pairs = zip(*(jax.tree.leaves(nnx.state(model, nnx.Param)) for model in (by_hand, by_name)))
    apart = max(float(jnp.max(jnp.abs(p - q))) for p, q in pairs)
    print(f"first loss, by hand: {loss_by_hand:.6f}, by train_step_mse: {loss_by_name:.6f}")
    print(f"parameters after the step: at most {apart:.1e} apart")
    # The compiled step rounds in another order than the one that was run operation by operation.
    check(apart <= 8 * float(jnp.finfo(jnp.float32).eps), "both make the same step")

    model = given = make_model()
    model.eval()
    before = np.asarray(given.layers[0].kernel)
    adam = optax.adam(0.01)
    opt_state, losses = adam.init(nnx.state(model, nnx.Param)), []
    for _ in range(STEPS):
        model, opt_state, loss = train_step_mse(model, batch, adam, opt_state)  # keep both, or nothing is learned
        losses.append(loss)
    print(f"loss over {STEPS} steps of Adam: {losses[0]:.6f} -> {losses[-1]:.6f}")
    check(losses[-1] < 0.05 * losses[0], "training lowers the loss")

    moved = float(np.max(np.abs(np.asarray(model.layers[0].kernel) - before)))
    unchanged = bool(np.array_equal(given.layers[0].kernel, before))
    print(f"first layer's weights moved by up to {moved:.4f}, the given model is as it was: {unchanged}")
    check(unchanged and moved > 0.0, "the step returns a new model")
    print(f"mode after the step: {'eval' if model.layers[2].deterministic else 'train'}")
    check(not model.layers[2].deterministic, "the step puts the new model into training mode")
    print(f"what the optimizer keeps for all parameters: {', '.join(opt_state[0]._fields)}")


def check(true: bool, claim: str) -> None:
    if not true:
        raise RuntimeError(f"not so: {claim}")


if __name__ == "__main__":
    main()
