"""Gradients in PyTorch: who asks, where the answer goes, and what is left behind. Its twin is examples/jax/autograd.py.

Run it with `python examples/torch/autograd.py`; every line that begins with "ok" was checked before it was
printed.
"""

from __future__ import annotations

import torch
from torch import nn

from omni_torch import (
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
    x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    returned, accumulated = grad_with_autograd_grad(x), grad_with_backward(x)
    print(f"  autograd.grad: {returned.tolist()}, backward: {accumulated.tolist()}")
    show("both are 2x", torch.equal(returned, 2 * x.detach()) and torch.equal(accumulated, returned))
    show("x.grad is None still: neither function writes to its input", x.grad is None)


def what_accumulates() -> None:
    print("Why zero_grad()? backward adds to .grad")
    x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)

    def after_backward() -> list[float]:
        (x * x).sum().backward()
        return x.grad.tolist()

    seen = [after_backward() for _ in range(3)]  # no x.grad = None in between
    print(f"  x.grad after one, two, three calls: {seen}")
    once = 2 * x.detach()
    show("without a reset the third call leaves three times the gradient", seen[2] == (3 * once).tolist())
    x.grad = None  # what optimizer.zero_grad() does to every parameter
    show("after a reset it is the gradient again", after_backward() == once.tolist())
    # In JAX a gradient is a value that a function returns; there is nothing to reset. To accumulate, add.


def several_inputs() -> None:
    print("f(a, b) = sum(a^2 + ab)")
    a, b = torch.tensor([1.0, -2.0]), torch.tensor([10.0, 20.0])
    df_da, df_db = grad_wrt_multiple_inputs(a, b)
    print(f"  df/da: {df_da.tolist()}, df/db: {df_db.tolist()}")
    show("df/da = 2a + b and df/db = a", torch.equal(df_da, 2 * a + b) and torch.equal(df_db, a))
    df_da, df_db = grad_wrt_multiple_inputs(a, a)
    show("the same tensor twice: partial derivatives, 3a and a", torch.equal(df_da, 3 * a) and torch.equal(df_db, a))
    value, (gradient,) = value_and_grad(lambda p: (p["a"] ** 2 + p["a"] * p["b"]).sum(), {"a": a, "b": b})
    print(f"  value_and_grad of a dict: {value.item()}, { ({k: g.tolist() for k, g in gradient.items()}) }")
    show("a dict goes in, a dict of the same keys comes out", list(gradient) == ["a", "b"])


def nothing_recorded() -> None:
    print("no_grad: no graph, no memory for one")
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    recorded = (x * x).sum()
    with torch.no_grad():
        plain = (x * x).sum()
        inside = grad_with_autograd_grad(x)  # our functions switch recording on where they need it
    show("outside, the result hangs on a graph", recorded.grad_fn is not None)
    show("inside no_grad it does not", plain.grad_fn is None and not plain.requires_grad)
    show("grad_with_autograd_grad works there all the same", torch.equal(inside, 2 * x.detach()))
    # JAX records only while jax.grad looks on: there is nothing to switch off.


def a_target_that_must_not_learn() -> None:
    print("f(x) = sum((x - target)^2) with target = x^2")
    x = torch.tensor([3.0, 0.25], requires_grad=True)
    stopped = grad_with_stopped_target(x)  # detach()
    (flowing,) = torch.autograd.grad(((x - x * x) ** 2).sum(), x)
    d = x.detach()
    print(f"  with detach(): {stopped.tolist()}, without: {flowing.tolist()}")
    show("with it the gradient is 2(x - x^2)", torch.equal(stopped, 2 * (d - d * d)))
    show("without it there is a factor 1 - 2x", torch.equal(flowing, 2 * (d - d * d) * (1 - 2 * d)))
    show("detach() shares the data", d.data_ptr() == x.data_ptr())  # JAX arrays never change: sharing cannot be seen


def forward_and_reverse() -> None:
    print("y = x^2 elementwise: J = diag(2x), a column by jvp, a row by vjp")
    x = torch.tensor([1.0, 3.0, 5.0])
    e = torch.tensor([0.0, 1.0, 0.0])
    y, column = jvp(lambda x: x * x, x, e)
    _, row = vjp(lambda x: x * x, x, e)
    print(f"  y: {y.tolist()}, column 1: {column.tolist()}, row 1: {row.tolist()}")
    show("this J is diagonal: its second column is its second row", torch.equal(column, row))
    _, everything = vjp(lambda x: (x * x).sum(), x, torch.tensor(1.0))
    show("the gradient of a scalar is its vjp with 1", torch.equal(everything, grad_with_backward(x)))


def example_by_example() -> None:
    print("per-example gradients of (w·x + b - y)^2")
    params = {"w": torch.tensor([1.0, -1.0]), "b": torch.tensor(0.5)}
    x, y = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 1.0]]), torch.tensor([0.0, 1.0, 2.0])

    def loss(params, x, y):
        return ((params["w"] * x).sum() + params["b"] - y) ** 2

    rows = per_example_grads(loss, params, x, y)
    norms = rows["w"].square().sum(1).add(rows["b"].square()).sqrt()
    print(f"  norm of each example's gradient: {[round(n, 4) for n in norms.tolist()]}")
    _, (of_sum,) = value_and_grad(lambda p: torch.stack([loss(p, x[i], y[i]) for i in range(3)]).sum(), params)
    show("one row for each example", rows["w"].shape == (3, 2) and rows["b"].shape == (3,))
    show("their sum is the gradient of the summed loss", all(torch.equal(rows[k].sum(0), of_sum[k]) for k in params))
    same = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, x, y)
    show("vmap of grad, as JAX writes it, gives the same", all(torch.equal(rows[k], same[k]) for k in params))


def train_and_eval() -> None:
    print("dropout: train() and eval()")
    torch.manual_seed(0)  # the mask comes from torch's global generator
    x = torch.ones(1000)
    layer = nn.Dropout(p=0.5)
    layer.train()  # modules begin in this mode
    noisy = layer(x)
    kept = int((noisy != 0).sum())
    print(f"  train(): {kept} of 1000 kept, each multiplied by {noisy.max().item()}")
    show("train() zeroes some and divides the rest by 1 - p", 0 < kept < 1000 and noisy.max().item() == 2.0)
    show("two calls draw two masks", not torch.equal(layer(x), noisy))
    layer.eval()
    show("eval() is the identity", torch.equal(layer(x), x))
    # There is no argument for a single call: nn.functional.dropout(x, p, training=...) is the function that has one.
    again = nn.functional.dropout(x, 0.5, training=False)
    show("training=False says it for one call", torch.equal(again, x))
    layer.train()
    leaf = x.clone().requires_grad_()
    out = layer(leaf)
    out.sum().backward()
    show("the gradient goes through the same mask", leaf.grad is not None and torch.equal(leaf.grad, out.detach()))


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
