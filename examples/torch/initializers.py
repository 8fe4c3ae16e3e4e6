"""Initial weights in PyTorch: fans, Xavier and Kaiming against their theory, and what they do to a deep network.

Run it beside its JAX twin, examples/jax/initializers.py: each draws with its own generator, so figures agree to a few
percent. Every line that begins with "ok" was checked before it was printed.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from omni_torch import (
    embedding_default_,
    fan_in_fan_out,
    init_linear_,
    kaiming_uniform_,
    linear_default_,
    xavier_uniform_,
)

WIDTH, DEPTH, BATCH = 256, 30, 200


def check(claim: str, true: object) -> None:
    if not true:
        raise SystemExit(f"not true: {claim}")
    print(f"  ok: {claim}")


def fans() -> None:
    print("1. Fan-in and fan-out: connections into a unit, and out of it")
    # torch stores (out, in, *taps): the input is axis 1. JAX stores (*taps, in, out).
    shown = {
        "Linear(400, 200)": nn.Linear(400, 200).weight,
        "Conv2d(4, 6, 3×3)": nn.Conv2d(4, 6, 3).weight,
        "Embedding(10, 4)": nn.Embedding(10, 4).weight,
    }
    for name, weight in shown.items():
        print(f"  {name}: weight {tuple(weight.shape)}, (fan_in, fan_out) = {fan_in_fan_out(weight)}")
    check("a convolution counts every tap of its kernel", fan_in_fan_out(shown["Conv2d(4, 6, 3×3)"]) == (36, 54))
    try:
        fan_in_fan_out(torch.zeros(7))
    except ValueError as error:
        print(f"  refused: {error}")


def against_theory() -> None:
    print("2. Drawn against theory: Linear(400, 200), 80,000 draws")
    weight = torch.empty(200, 400)
    bounds = {
        "xavier": (xavier_uniform_, math.sqrt(6 / (400 + 200))),
        "xavier, gain 5/3": (lambda w: xavier_uniform_(w, gain=5 / 3), 5 / 3 * math.sqrt(6 / (400 + 200))),
        "kaiming, relu": (kaiming_uniform_, math.sqrt(2) * math.sqrt(3 / 400)),
        "kaiming, tanh": (lambda w: kaiming_uniform_(w, nonlinearity="tanh"), 5 / 3 * math.sqrt(3 / 400)),
        "torch's default": (linear_default_, 1 / math.sqrt(400)),
    }
    for name, (draw, bound) in bounds.items():
        draw(weight)
        mean, std, most = float(weight.mean()), float(weight.std()), float(weight.abs().max())
        theory = bound / math.sqrt(3)
        print(f"  {name:<16} mean {mean:+.5f} (0), std {std:.5f} ({theory:.5f}), most {most:.5f} ({bound:.5f})")
        # A uniform distribution on ±b has std b/√3. Of 80,000 draws the mean errs by std/√80,000, seldom 5 times that.
        n = weight.numel()
        fine = abs(mean) < 5 * std / math.sqrt(n) and abs(std / theory - 1) < 5 / math.sqrt(n)
        check(
            f"{name}: within the scatter of {n:,} draws, never outside ±bound", fine and 0.999 * bound < most <= bound
        )
    embedding_default_(weight)
    print(f"  embedding        mean {float(weight.mean()):+.5f} (0), std {float(weight.std()):.5f} (1)")


def a_linear_layer() -> None:
    print("3. init_linear_: the layer itself, in place; the bias is always zeroed")
    layer = nn.Linear(400, 200)
    for scheme in ("xavier", "kaiming_relu", "zero"):
        init_linear_(layer, scheme)
        std, bias = layer.weight.detach().std(), layer.bias.detach().abs().sum()
        print(f"  {scheme}: weight std {float(std):.4f}, bias {float(bias)}")
        check("the bias is zero", not layer.bias.any())
    try:
        init_linear_(layer, "he")
    except ValueError as error:
        print(f"  refused: {error}")


def forward(scheme: str, activation, gain: float = 1.0) -> tuple[list[torch.Tensor], float]:
    """(the activations after every layer, the norm of the loss's gradient in the first layer) of a deep network."""
    torch.manual_seed(0)
    layers = [init_linear_(nn.Linear(WIDTH, WIDTH), scheme) for _ in range(DEPTH)]
    x, seen = torch.randn(BATCH, WIDTH), []
    for layer in layers:
        with torch.no_grad():
            layer.weight.mul_(gain)
        x = activation(layer(x))
        seen.append(x.detach())
    (x**2).mean().backward()
    return seen, float(layers[0].weight.grad.norm())


def sizes(seen: list[torch.Tensor]) -> str:
    return ", ".join(f"{i + 1}: {float(seen[i].square().mean().sqrt()):.1e}" for i in (0, 9, 19, DEPTH - 1))


def a_deep_network() -> None:
    print(f"4. Root mean square of the activations in {DEPTH} layers of {WIDTH} units")
    last = {}
    for scheme, name, activation in (
        ("zero", "relu", torch.relu),
        ("xavier", "relu", torch.relu),
        ("kaiming_relu", "relu", torch.relu),
        ("xavier", "tanh", torch.tanh),
    ):
        seen, gradient = forward(scheme, activation)
        last[scheme, name] = float(seen[-1].square().mean().sqrt())
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
        seen, _ = forward("xavier", torch.tanh, gain)
        shares[gain] = float((seen[-1].abs() > 0.99).float().mean())
        print(f"  xavier × {gain:g}: {shares[gain]:.1%} of the last layer is beyond ±0.99, where tanh' < 0.02")
    check("large weights saturate tanh, xavier's do not", shares[5.0] > 0.3 > 0.01 > shares[1.0])


def main() -> None:
    torch.manual_seed(0)
    fans()
    against_theory()
    a_linear_layer()
    a_deep_network()
    saturation()


if __name__ == "__main__":
    main()
