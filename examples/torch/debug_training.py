"""Debugging a training loop in PyTorch (exercise 10): one good run, then four ways for it to go bad.

`debug_training` prints what it sees of every batch and stops before the first update that would do harm. The records
that it returns say the same to a program.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from omni_torch import DebugRecord, debug_training, set_seed

Batches = list[tuple[torch.Tensor, torch.Tensor]]


class Log(nn.Module):
    """A layer with a trap: the logarithm of what may be negative."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log(x)


def make_model(middle: nn.Module) -> nn.Sequential:
    set_seed(0)
    return nn.Sequential(nn.Linear(10, 8), middle, nn.Linear(8, 1))


def make_batches() -> Batches:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(32, 10, generator=g), torch.randn(32, 1, generator=g)) for _ in range(5)]


def mse(pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (pred - y).square().mean()


def look(model: nn.Module, batches: Batches, loss_fn: Callable[..., torch.Tensor] = mse) -> DebugRecord:
    """Run it, and return the last record."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return debug_training(model, batches, loss_fn, optimizer, max_batches=3)[-1]


def main() -> None:
    print("--- a good run: three batches of five")
    model = make_model(nn.Tanh())
    before = model[0].weight.detach().clone()
    record = look(model, make_batches())
    check(record.problem is None and record.batch == 2, "it goes through")
    check(not torch.equal(model[0].weight, before), "these are real updates of this model")

    print("--- a NaN in the third batch")
    batches = make_batches()
    batches[2][0][7, 3] = float("nan")
    record = look(make_model(nn.Tanh()), batches)
    check((record.batch, record.where) == (2, "x"), "the input is to blame")

    print("--- a layer that takes a logarithm of what is negative")
    model = make_model(Log())
    before = model[0].weight.detach().clone()
    record = look(model, make_batches())
    check((record.batch, record.where) == (0, "output: 1"), "the layer is named, not the loss that showed it")
    check(torch.equal(model[0].weight, before), "the bad step was not made")

    print("--- a loss beyond all bounds")
    record = look(make_model(nn.Tanh()), make_batches(), lambda pred, y: 1e9 * mse(pred, y))
    check(record.where == "loss" and record.grad_norm is None, "no gradients are taken of it")

    print("--- gradients that explode though the loss is within bounds")
    record = look(make_model(nn.Tanh()), make_batches(), lambda pred, y: 1e4 * mse(pred, y))
    check(str(record.where).startswith("gradients: "), "the largest gradient is named")
    check(record.update_norm is None, "no update is made with them")


def check(true: bool, claim: str) -> None:
    if not true:
        raise RuntimeError(f"not so: {claim}")


if __name__ == "__main__":
    main()
