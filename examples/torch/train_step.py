"""One training step in PyTorch: written out, and by train_step_mse.

A step is: training mode, gradients to zero, forward, loss, backward, update. The model and the optimizer are objects
that change in place. The JAX file beside this one does the same with values: what goes in stays as it was.
"""

from __future__ import annotations

import torch
from torch import nn

from omni_torch import set_seed, train_step_mse

STEPS = 200


def make_model() -> nn.Sequential:
    """A small network. Its dropout has rate 0, so that two steps can be compared; it is there to show the mode."""
    set_seed(0)  # the layers draw their weights from torch's global generator
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.0), nn.Linear(16, 1))


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """A target that a small network can learn: y = sin(x₀) + x₁·x₂, for 64 points."""
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    return x, (torch.sin(x[:, 0]) + x[:, 1] * x[:, 2])[:, None]


def step_by_hand(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], optimizer: torch.optim.Optimizer) -> float:
    """The six parts of a step, each on its line."""
    x, y = batch
    model.train()  # 1. dropout draws masks
    optimizer.zero_grad()  # 2. .grad adds up over backward passes
    pred = model(x)  # 3. forward: records the graph
    loss = (pred - y).square().mean()  # 4. one number
    loss.backward()  # 5. walks the graph back and fills .grad
    optimizer.step()  # 6. reads .grad, writes the parameters
    return loss.item()


def main() -> None:
    batch = make_batch()

    by_hand, by_name = make_model(), make_model()
    sgd_by_hand, sgd_by_name = (torch.optim.SGD(model.parameters(), lr=0.1) for model in (by_hand, by_name))
    loss_by_hand = step_by_hand(by_hand, batch, sgd_by_hand)
    loss_by_name = train_step_mse(by_name, batch, sgd_by_name)
    apart = max(float((p - q).detach().abs().max()) for p, q in zip(by_hand.parameters(), by_name.parameters()))
    print(f"first loss, by hand: {loss_by_hand:.6f}, by train_step_mse: {loss_by_name:.6f}")
    print(f"parameters after the step: at most {apart:.1e} apart")
    check(apart <= torch.finfo(torch.float32).eps, "both make the same step")

    model = make_model().eval()
    weight = model[0].weight
    address, before = weight.data_ptr(), weight.detach().clone()
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = [train_step_mse(model, batch, adam) for _ in range(STEPS)]
    print(f"loss over {STEPS} steps of Adam: {losses[0]:.6f} -> {losses[-1]:.6f}")
    check(losses[-1] < 0.05 * losses[0], "training lowers the loss")

    moved = float((weight.detach() - before).abs().max())
    print(f"first layer's weights moved by up to {moved:.4f}, in place: {weight.data_ptr() == address}")
    check(weight.data_ptr() == address and moved > 0.0, "the step writes into the same storage")
    print(f"mode after the step: {'train' if model.training else 'eval'}")
    check(model.training, "the step puts the model into training mode")
    print(f"what the optimizer keeps per parameter: {', '.join(adam.state[weight])}")


def check(true: bool, claim: str) -> None:
    if not true:
        raise RuntimeError(f"not so: {claim}")


if __name__ == "__main__":
    main()
