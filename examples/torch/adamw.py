"""AdamW from scratch in PyTorch: one step by hand, many parameters, 100 steps beside torch.optim.AdamW, the optimizer.

Run it beside its JAX twin, examples/jax/adamw.py: the figures agree but for the last digits. Every line that begins
with "ok" was checked before it was printed.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from omni_torch import (
    AdamW,
    adamw_step_,
    adamw_step_many_,
    clip_grad_norm_,
    decay_mask,
    init_adamw_state,
    warmup_cosine,
)

HYPER = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
STEPS = 100
EPS = torch.finfo(torch.float32).eps


def check(claim: str, true: object) -> None:
    if not true:
        raise SystemExit(f"not true: {claim}")
    print(f"  ok: {claim}")


def rounded(x: torch.Tensor) -> list[float]:
    """To six digits behind the point: 0.9 for the float32 that prints as 0.8999999761581421."""
    return [round(value, 6) for value in x.tolist()]


def one_step() -> None:
    print("1. One step by hand")
    p = torch.tensor([1.0, -2.0, 3.0])
    grad = torch.tensor([0.5, -4.0, 0.0])
    state = init_adamw_state(p)
    storage, kept = p.data_ptr(), grad.clone()
    state = adamw_step_(p, grad, state, lr=0.1, weight_decay=0.0)
    print(f"  p {rounded(p)}, m {rounded(state.m)}, v {rounded(state.v)}, t {state.t}")
    # m̂ = g and v̂ = g² at the first step, so the update is lr·g/|g|: a gradient of 4 moves no further than one of 0.5.
    check("the first step is lr times the sign of the gradient", torch.allclose(p, torch.tensor([0.9, -1.9, 3.0])))
    # In place is torch's habit: p keeps its storage (and its place in the model), the gradient is only read.
    check("p was changed in its own storage, the gradient was not", p.data_ptr() == storage and torch.equal(grad, kept))
    check("the state carries no gradient", not state.m.requires_grad and not state.v.requires_grad)


def weight_decay() -> None:
    print("2. Weight decay is decoupled")
    moved = {}
    for size in (1.0, 1000.0):
        p = torch.tensor([2.0])
        adamw_step_(p, torch.tensor([size]), init_adamw_state(p), lr=0.1, weight_decay=0.5)
        moved[size] = 2.0 - float(p)
        print(f"  gradient {size:g}: p moved by {moved[size]:.4f} = 0.1·(1 + 0.5·2)")
    # As an L2 penalty it would be added to the gradient, and be divided by √v̂ with it: nothing next to 1000.
    check("decay does not depend on the gradient's size", math.isclose(moved[1.0], moved[1000.0], rel_tol=10 * EPS))
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    print(f"  decay_mask: {decay_mask(model)}")
    check("matrices decay, vectors do not", [*decay_mask(model).values()] == [True, False, False, False])


def problem() -> tuple[np.ndarray, np.ndarray]:
    """(parameters (40, 25), gradients (STEPS, 40, 25)): the same numbers in both files."""
    rng = np.random.default_rng(0)
    start = rng.standard_normal((40, 25)).astype(np.float32)
    mean = 0.3 * rng.standard_normal((40, 25))
    return start, (mean + rng.standard_normal((STEPS, 40, 25))).astype(np.float32)


def exact(start: np.ndarray, grads: np.ndarray, lr: float) -> np.ndarray:
    """The displacement by the paper's formula in float64."""
    (beta1, beta2), p = HYPER["betas"], start.astype(np.float64)
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads.astype(np.float64), start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        p = p - lr * (m_hat / (np.sqrt(v_hat) + HYPER["eps"]) + HYPER["weight_decay"] * p)
    return p - start


def a_hundred_steps() -> None:
    print(f"3. {STEPS} steps beside torch.optim.AdamW")
    (start, grads), lr = problem(), 1e-3
    p = torch.tensor(start)
    state = init_adamw_state(p)
    theirs = nn.Parameter(torch.tensor(start))
    library = torch.optim.AdamW([theirs], lr=lr, **HYPER)
    for g in grads:
        state = adamw_step_(p, torch.tensor(g), state, lr, **HYPER)
        theirs.grad = torch.tensor(g)
        library.step()
    want = exact(start, grads, lr)
    errors = {
        name: np.sqrt(np.mean((x.astype(np.float64) - start - want) ** 2) / np.mean(want**2))
        for name, x in (("adamw_step_", p.numpy()), ("torch.optim.AdamW", theirs.detach().numpy()))
    }
    apart = float((p - theirs.detach()).abs().max())
    print(f"  after {state.t} steps the parameters differ by {apart:.1e} at most")
    for name, error in errors.items():
        print(f"  {name}: displacement {error:.1e} from the formula in float64 ({-math.log2(error):.1f} bits)")
    # torch multiplies p by 1 − lr·decay first. In float32 that factor is rounded, the same way at every step.
    check("torch.optim is further from the formula", errors["adamw_step_"] < errors["torch.optim.AdamW"])
    # A step of lr rounds p, which is about 1, to float32.
    check("neither is far", max(errors.values()) < EPS / lr)


def many_parameters() -> None:
    print("4. Many parameters: a list in torch, where JAX takes the tree")
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    x, y = torch.randn(16, 4), torch.randn(16, 2)
    params = list(model.parameters())
    states = [init_adamw_state(p) for p in params]
    losses = []
    for step in range(50):
        loss = ((model(x) - y) ** 2).mean()
        grads = list(torch.autograd.grad(loss, params))
        norm = clip_grad_norm_(grads, max_norm=1.0)
        lr = 0.05 * warmup_cosine(step, warmup_steps=5, max_steps=50)
        states = adamw_step_many_(params, grads, states, lr, **HYPER)
        losses.append(float(loss.detach()))
        if step % 10 == 0:
            print(f"  step {step:>2}: loss {losses[-1]:.4f}, gradient norm {float(norm):.3f}, lr {lr:.4f}")
    check("the loss fell", losses[-1] < losses[0])
    check("the first update had lr 0", losses[0] == losses[1])
    # Everything is checked before anything is changed: one NaN, and no parameter moves.
    before = [p.detach().clone() for p in params]
    grads[-1][0] = math.nan
    try:
        adamw_step_many_(params, grads, states, lr, **HYPER)
    except ValueError as error:
        print(f"  refused: {error}")
    check("a NaN gradient changed nothing", all(torch.equal(a, b) for a, b in zip(params, before, strict=True)))


def as_an_optimizer() -> None:
    print("5. AdamW as an optimizer: drop-in for torch.optim.AdamW")
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    x, y = torch.randn(16, 4), torch.randn(16, 2)
    mask, named = decay_mask(model), dict(model.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if mask[name]]},
        {"params": [p for name, p in named.items() if not mask[name]], "weight_decay": 0.0},
    ]
    ours = AdamW(groups, lr=0.05, **HYPER)
    first = float(((model(x) - y) ** 2).mean().detach())
    for _ in range(50):
        ours.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        ours.step()
    print(f"  loss {first:.4f} → {float(loss.detach()):.4f}")
    check("the loss fell", float(loss.detach()) < first)
    # The same layout of state, so a run may go on with the other optimizer.
    library = torch.optim.AdamW(groups, lr=0.05, **HYPER)
    library.load_state_dict(ours.state_dict())
    steps = {float(state["step"]) for state in library.state.values()}
    check("torch.optim.AdamW goes on from our state_dict, at step 50", steps == {50.0})


def main() -> None:
    one_step()
    weight_decay()
    a_hundred_steps()
    many_parameters()
    as_an_optimizer()


if __name__ == "__main__":
    main()
