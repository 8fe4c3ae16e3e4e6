"""Initial weights in JAX: fans, Xavier and Kaiming against their theory, and what they do to a deep network.

Run it beside its PyTorch twin, examples/torch/initializers.py: each draws with its own generator, so figures agree to a
few percent. Every line that begins with "ok" was checked before it was printed.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from omni_jax import embedding_default, fan_in_fan_out, init_linear, kaiming_uniform, linear_default, xavier_uniform

WIDTH, DEPTH, BATCH = 256, 30, 200


def check(claim: str, true: object) -> None:
    if not true:
        raise SystemExit(f"not true: {claim}")
    print(f"  ok: {claim}")


def fans() -> None:
    print("1. Fan-in and fan-out: connections into a unit, and out of it")
    # Flax stores (*taps, in, out): the input is the last axis but one. torch stores (out, in, *taps).
    rngs = nnx.Rngs(0)
    shown = {
        "Linear(400, 200)": nnx.Linear(400, 200, rngs=rngs).kernel,
        "Conv(4, 6, 3×3)": nnx.Conv(4, 6, (3, 3), rngs=rngs).kernel,
        "Embed(10, 4)": nnx.Embed(10, 4, rngs=rngs).embedding,
    }
    for name, weight in shown.items():
        print(f"  {name}: weight {tuple(weight.shape)}, (fan_in, fan_out) = {fan_in_fan_out(weight)}")
    check("a convolution counts every tap of its kernel", fan_in_fan_out(shown["Conv(4, 6, 3×3)"]) == (36, 54))
    try:
        fan_in_fan_out(jnp.zeros(7))
    except ValueError as error:
        print(f"  refused: {error}")


def against_theory() -> None:
    print("2. Drawn against theory: Linear(400, 200), 80,000 draws")
    shape = (400, 200)
    bounds = {
        "xavier": (xavier_uniform, math.sqrt(6 / (400 + 200))),
        "xavier, gain 5/3": (partial(xavier_uniform, gain=5 / 3), 5 / 3 * math.sqrt(6 / (400 + 200))),
        "kaiming, relu": (kaiming_uniform, math.sqrt(2) * math.sqrt(3 / 400)),
        "kaiming, tanh": (partial(kaiming_uniform, nonlinearity="tanh"), 5 / 3 * math.sqrt(3 / 400)),
        "torch's default": (linear_default, 1 / math.sqrt(400)),
    }
    keys = jax.random.split(jax.random.key(0), len(bounds) + 1)  # no global state: every draw names its key
    for key, (name, (draw, bound)) in zip(keys, bounds.items()):
        weight = draw(key, shape)
        mean, std, most = float(weight.mean()), float(weight.std()), float(jnp.abs(weight).max())
        theory = bound / math.sqrt(3)
        print(f"  {name:<16} mean {mean:+.5f} (0), std {std:.5f} ({theory:.5f}), most {most:.5f} ({bound:.5f})")
        # A uniform distribution on ±b has std b/√3. Of 80,000 draws the mean errs by std/√80,000, seldom 5 times that.
        n = weight.size
        fine = abs(mean) < 5 * std / math.sqrt(n) and abs(std / theory - 1) < 5 / math.sqrt(n)
        check(
            f"{name}: within the scatter of {n:,} draws, never outside ±bound", fine and 0.999 * bound < most <= bound
        )
    weight = embedding_default(keys[-1], shape)
    print(f"  embedding        mean {float(weight.mean()):+.5f} (0), std {float(weight.std()):.5f} (1)")


def a_linear_layer() -> None:
    print("3. init_linear: a new layer, and the old one as it was; the bias is always zeroed")
    layer = nnx.Linear(400, 200, rngs=nnx.Rngs(0))
    for scheme in ("xavier", "kaiming_relu", "zero"):
        new = init_linear(layer, jax.random.key(1), scheme)
        std, bias = new.kernel[...].std(), jnp.abs(new.bias[...]).sum()
        print(f"  {scheme}: weight std {float(std):.4f}, bias {float(bias)}")
        check("the bias is zero", not new.bias[...].any())
    try:
        init_linear(layer, jax.random.key(1), "he")
    except ValueError as error:
        print(f"  refused: {error}")


@partial(jax.jit, static_argnames="scheme")
def _stacked_kernels(keys, scheme: str):
    """The kernels of DEPTH layers as one array: one draw, mapped over the keys."""
    layer = nnx.Linear(WIDTH, WIDTH, kernel_init=nnx.initializers.zeros_init(), rngs=nnx.Rngs(0))
    return jax.vmap(lambda key: init_linear(layer, key, scheme).kernel[...])(keys)


@partial(jax.jit, static_argnames="activation")
def _network(kernels, x, activation):
    """(the gradient of the mean square of the last layer, all activations); the biases are 0 and left out."""

    def one(x, kernel):
        x = activation(x @ kernel)
        return x, x

    def loss(kernels):
        # The layers are alike, so one compiled layer is scanned over them; torch runs them one by one.
        last, seen = jax.lax.scan(one, x, kernels)
        return jnp.mean(last**2), seen

    return jax.grad(loss, has_aux=True)(kernels)


def forward(scheme: str, activation, gain: float = 1.0) -> tuple[list[jax.Array], float]:
    """(the activations after every layer, the norm of the loss's gradient in the first layer) of a deep network."""
    keys = jax.random.split(jax.random.key(0), DEPTH + 1)
    x = jax.random.normal(keys[0], (BATCH, WIDTH))
    grads, seen = _network(gain * _stacked_kernels(keys[1:], scheme), x, activation)
    return list(seen), float(jnp.linalg.norm(grads[0]))


def sizes(seen: list[jax.Array]) -> str:
    return ", ".join(f"{i + 1}: {float(jnp.sqrt(jnp.mean(seen[i] ** 2))):.1e}" for i in (0, 9, 19, DEPTH - 1))


def a_deep_network() -> None:
    print(f"4. Root mean square of the activations in {DEPTH} layers of {WIDTH} units")
    last = {}
    for scheme, name, activation in (
        ("zero", "relu", jax.nn.relu),
        ("xavier", "relu", jax.nn.relu),
        ("kaiming_relu", "relu", jax.nn.relu),
        ("xavier", "tanh", jnp.tanh),
    ):
        seen, gradient = forward(scheme, activation)
        last[scheme, name] = float(jnp.sqrt(jnp.mean(seen[-1] ** 2)))
        print(f"  {scheme} and {name}: layer {sizes(seen)}; gradient in the first layer {gradient:.1e}")
        if scheme == "zero":
            # All units of a layer compute the same, and nothing comes back: such a network never learns.
            check(
                "with zero weights no signal comes through, and no gradient comes back",
                gradient == 0 == last["zero", "relu"],
            )
    # ReLU throws half of the second moment away; Xavier does not make up for it: (1/2)^(30/2) = 3e-5 is left.
    check("xavier fades behind relu", last["xavier", "relu"] < 1e-3)
    check("kaiming_relu holds the signal", 0.1 < last["kaiming_relu", "relu"] < 10)
    check("xavier does well by tanh", last["xavier", "tanh"] > 0.05)


def saturation() -> None:
    print("5. Saturation: tanh with weights that are too large")
    shares = {}
    for gain in (1.0, 5.0):
        seen, _ = forward("xavier", jnp.tanh, gain)
        shares[gain] = float(jnp.mean(jnp.abs(seen[-1]) > 0.99))
        print(f"  xavier × {gain:g}: {shares[gain]:.1%} of the last layer is beyond ±0.99, where tanh' < 0.02")
    check("large weights saturate tanh, xavier's do not", shares[5.0] > 0.3 > 0.01 > shares[1.0])


def main() -> None:
    fans()
    against_theory()
    a_linear_layer()
    a_deep_network()
    saturation()


if __name__ == "__main__":
    main()
