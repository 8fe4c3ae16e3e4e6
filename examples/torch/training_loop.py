"""A minimal training loop in PyTorch (exercise 6), and its two questions answered by running them.

1. Why do we call optimizer.zero_grad()? `backward` adds to .grad: without it every step uses the sum of all gradients
   so far.
2. What happens if we don't call loss.backward()? Nothing is in .grad, and optimizer.step() changes nothing; or an old
   gradient is still there, and the step is made with that.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from omni_torch import set_seed, validate_loss

EPOCHS = 10


def make_data() -> tuple[torch.Tensor, torch.Tensor]:
    """32 points with 10 features and a target each, all noise: what can be learned is little, but it is some."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(32, 10, generator=g), torch.randn(32, 1, generator=g)


def make_model() -> nn.Linear:
    set_seed(0)
    return nn.Linear(10, 1)


def train(epochs: int, forget: str = "") -> list[float]:
    """The losses of a run; `forget` is the line that is left out."""
    X, y = make_data()
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loss_fn = nn.MSELoss()
    losses = []
    for _ in range(epochs):
        pred = model(X)
        loss = loss_fn(pred, y)
        losses.append(validate_loss(loss))  # a float, or an error that says what is wrong with it
        if forget != "zero_grad":
            optimizer.zero_grad()
        if forget != "backward":
            loss.backward()
        optimizer.step()
    return losses


def rises(losses: list[float]) -> int:
    """In how many epochs the loss went up."""
    return sum(b > a for a, b in pairwise(losses))


def question_1() -> None:
    """Why do we call optimizer.zero_grad()?"""
    X, y = make_data()
    model, loss_fn = make_model(), nn.MSELoss()
    loss_fn(model(X), y).backward()
    once = model.weight.grad.clone()
    loss_fn(model(X), y).backward()
    twice = model.weight.grad
    print(f"  norm of the gradient after one backward: {float(once.norm()):.4f}, after two: {float(twice.norm()):.4f}")
    check(torch.equal(twice, 2 * once), "the gradients add")

    # The first step is right; from the second on the old gradients push on, even past the minimum.
    right, wrong = train(500), train(500, forget="zero_grad")
    print(f"  loss after 500 epochs, with zero_grad: {right[-1]:.6f}, without: {wrong[-1]:.6f}")
    check(right[:2] == wrong[:2] and right[-1] < wrong[-1], "only the first step is the same, and it never settles")
    print(f"  epochs in which the loss rose: {rises(right)} and {rises(wrong)}")
    check(rises(wrong) > rises(right), "old gradients overshoot")
    print("  Answer: it clears the previous gradients, which accumulate otherwise.")


def question_2() -> None:
    """What happens if we don't call loss.backward()?"""
    losses = train(EPOCHS, forget="backward")
    print(f"  loss without backward, first and last epoch: {losses[0]:.4f}, {losses[-1]:.4f}")
    check(len(set(losses)) == 1, "without gradients step() does nothing")

    X, y = make_data()
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    nn.MSELoss()(model(X), y).backward()
    before = model.weight.detach().clone()
    optimizer.step()
    optimizer.step()  # neither zero_grad nor backward in between: the old gradient moves the weights a second time
    moved = before - model.weight.detach()
    ratio = float(moved.norm() / (0.01 * model.weight.grad.norm()))
    print(f"  two steps on one gradient move the weights by {ratio:.4f} gradients")
    check(round(ratio, 4) == 2.0, "a gradient that is still there is used again")
    print("  Answer: no gradients are computed, and optimizer.step() does nothing (or repeats an old one).")


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
