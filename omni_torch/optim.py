"""AdamW from scratch, clipping by global norm, and the warm-up + cosine schedule.

Every update happens in place under `torch.no_grad()`, and every argument is checked before anything is changed.
Arithmetic runs in promote_types(dtype, float32) and is rounded once into storage: float16 alone would turn eps = 1e-8
into zero, and the update of a zero gradient into 0/0.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

__all__ = [
    "AdamWState",
    "init_adamw_state",
    "adamw_step_",
    "adamw_step_many_",
    "global_norm",
    "clip_grad_norm_",
    "warmup_cosine",
]

# What torch.nn.utils.clip_grad_norm_ adds to the norm before it divides; optax.clip_by_global_norm adds nothing.
_CLIP_EPS = 1e-6


@dataclass
class AdamWState:
    """AdamW's memory of one parameter.

    m: first moment, v: second moment (both of the parameter's shape, dtype and device); t: number of updates made.
    """

    m: torch.Tensor
    v: torch.Tensor
    t: int


def init_adamw_state(p: torch.Tensor) -> AdamWState:
    """Zero moments like `p` and t = 0.

    Raises ValueError if `p` is not a dense tensor of a real floating dtype.
    """
    _check_floating("p", p)
    with torch.no_grad():
        # preserve_format keeps a transposed parameter's strides, so that the update runs over equal layouts.
        return AdamWState(m=torch.zeros_like(p), v=torch.zeros_like(p), t=0)


def adamw_step_(
    p: torch.Tensor,
    grad: torch.Tensor,
    state: AdamWState,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> AdamWState:
    """One AdamW update of `p` in place; returns `state`, advanced in place too. `grad` is left alone.

        t ← t + 1
        m ← β₁·m + (1 − β₁)·g          m̂ = m / (1 − β₁ᵗ)
        v ← β₂·v + (1 − β₂)·g²         v̂ = v / (1 − β₂ᵗ)
        p ← p − lr·(m̂ / (√v̂ + eps) + weight_decay·p)

    The decay is decoupled: it never enters the moments. torch.optim.AdamW multiplies p by 1 − lr·weight_decay first,
    which is the same in exact arithmetic.

    Raises ValueError, before anything is changed, for a parameter that is not floating point; for shapes, dtypes or
    devices that differ between p, grad, m and v; for NaN or Inf in `grad`; for betas outside [0, 1); for an lr, eps
    or weight_decay that is negative or not finite.
    Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101, algorithm 2.
    """
    _check_hyperparameters(lr, betas, eps, weight_decay)
    _check_update("", p, grad, state)
    return _update_(p, grad, state, lr, betas, eps, weight_decay)


def adamw_step_many_(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    states: list[AdamWState],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> list[AdamWState]:
    """`adamw_step_` for every parameter in turn; returns the list of advanced states.

    All or nothing: the lists' lengths and every single tensor are checked before the first one is changed.

    Raises ValueError as `adamw_step_` does, for lists of unequal length, and for a parameter that stands in the list
    twice (a tied weight takes one update with the sum of its gradients).
    """
    params, grads, states = list(params), list(grads), list(states)
    if not len(params) == len(grads) == len(states):
        raise ValueError(
            f"params, grads and states must have one entry per parameter, got {len(params)}, {len(grads)} and "
            f"{len(states)} entries; pass three lists of the same length and order"
        )
    _check_hyperparameters(lr, betas, eps, weight_decay)
    first_seen: dict[int, int] = {}
    for i, (p, grad, state) in enumerate(zip(params, grads, states, strict=True)):
        _check_update(f"[{i}]", p, grad, state)
        if first_seen.setdefault(id(p), i) != i:
            raise ValueError(
                f"params[{i}] is the same tensor as params[{first_seen[id(p)]}]: pass a tied weight once, with the "
                "sum of its gradients"
            )
    return [
        _update_(p, grad, state, lr, betas, eps, weight_decay)
        for p, grad, state in zip(params, grads, states, strict=True)
    ]


def global_norm(grads: Iterable[torch.Tensor]) -> Float[torch.Tensor, ""]:
    """√Σ g² over all elements of all tensors, in the widest of their dtypes and float32; 0 for no tensors.

    Raises ValueError for a tensor that is not floating point.
    """
    grads = list(grads)
    wide = torch.float32
    for i, g in enumerate(grads):
        _check_floating(f"grads[{i}]", g)
        wide = torch.promote_types(wide, g.dtype)
    if not grads:
        return torch.zeros((), dtype=wide)
    with torch.no_grad():
        norms = [torch.linalg.vector_norm(g, dtype=wide).to(grads[0].device) for g in grads]
        return torch.linalg.vector_norm(torch.stack(norms))


def clip_grad_norm_(grads: Iterable[torch.Tensor], max_norm: float) -> Float[torch.Tensor, ""]:
    """Scale gradients in place so that their global norm is at most `max_norm`; returns the norm before.

        g ← g · min(1, max_norm / (norm + 1e-6))

    torch's form (torch.nn.utils.clip_grad_norm_): the 1e-6 stands beside the norm. A NaN or Inf gradient makes NaN of
    what it touches and shows in the returned norm.

    Raises ValueError for a max_norm that is not above 0 and for a tensor that is not floating point.
    """
    grads = list(grads)
    _check_max_norm(max_norm)
    norm = global_norm(grads)
    scale = torch.clamp(max_norm / (norm + _CLIP_EPS), max=1.0)  # clamp hands NaN on
    with torch.no_grad():
        for g in grads:
            wide = torch.promote_types(g.dtype, torch.float32)
            # For float32 and float64 `.to` returns g itself, and the copy is of a tensor onto itself.
            g.copy_(g.to(wide).mul_(scale.to(device=g.device, dtype=wide)))
    return norm


def warmup_cosine(step: int, warmup_steps: int, max_steps: int, min_ratio: float = 0.1) -> float:
    """Factor on the learning rate at `step` (the number of updates made before): linear warm-up, then a half cosine.

        step < warmup_steps:   step / warmup_steps                        (so the very first factor is 0)
        after that:            min_ratio + (1 − min_ratio)·(1 + cos(π·progress)) / 2
                               progress = (step − warmup_steps) / (max_steps − warmup_steps), at most 1

    Exactly 1 at step = warmup_steps and exactly min_ratio from max_steps on. A Python float, computed on the host.

    Raises ValueError for a step that is not an integer or negative, for a negative warmup_steps, for
    max_steps ≤ warmup_steps, for min_ratio outside [0, 1].
    Source: Loshchilov & Hutter, SGDR, arXiv 1608.03983, equation 5 (one period, no restart), with a linear start.
    """
    _check_schedule(warmup_steps, max_steps, min_ratio)
    step = _check_step(step)
    if step < warmup_steps:
        return step / warmup_steps
    # (1 + cos π·progress) / 2 = sin²(π/2·left), where nothing cancels as the cosine nears its end.
    left = max(max_steps - step, 0) / (max_steps - warmup_steps)
    share = math.sin(0.5 * math.pi * left) ** 2
    return share + (1.0 - share) * min_ratio


def _update_(
    p: torch.Tensor,
    grad: torch.Tensor,
    state: AdamWState,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> AdamWState:
    """The update itself, on arguments that have been checked."""
    beta1, beta2 = betas
    t = state.t + 1
    with torch.no_grad():
        wide = torch.promote_types(p.dtype, torch.float32)
        # For float32 and float64 `.to` returns the tensor itself: these are in-place updates, and the copies at the
        # end are of tensors onto themselves.
        x, g, m, v = p.to(wide), grad.to(wide), state.m.to(wide), state.v.to(wide)
        m.mul_(beta1).add_(g, alpha=1.0 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        denominator = v.div(_bias_correction(beta2, t)).sqrt_().add_(eps)
        update = m.div(_bias_correction(beta1, t)).div_(denominator).add_(x, alpha=weight_decay)
        x.sub_(update, alpha=float(lr))  # checkpoints hold lr as a 0-d tensor at times
        p.copy_(x)
        state.m.copy_(m)
        state.v.copy_(v)
    state.t = t
    return state


def _bias_correction(beta: float, t: int) -> float:
    """1 − βᵗ to the last bit: written as a difference it loses 1/(1 − β) ulps, three digits at β₂ = 0.999."""
    return -math.expm1(t * math.log(beta)) if beta > 0.0 else 1.0


def _check_floating(name: str, x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor):
        raise ValueError(
            f"{name} must be a torch.Tensor, got {type(x).__name__}; leave out parameters that have no gradient"
        )
    if not x.is_floating_point():
        raise ValueError(
            f"{name} must have a real floating dtype (float32, float64, ...), got {x.dtype}; cast it with "
            ".to(torch.float32), or leave it out"
        )
    if x.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {x.layout}; call .to_dense() first")


def _check_update(at: str, p: torch.Tensor, grad: torch.Tensor, state: AdamWState) -> None:
    """Everything that could go wrong with one parameter's tensors, before any of them is changed."""
    p_name, grad_name, state_name = ("p", "grad", "state") if not at else (f"params{at}", f"grads{at}", f"states{at}")
    _check_floating(p_name, p)
    for name, x in ((grad_name, grad), (f"{state_name}.m", state.m), (f"{state_name}.v", state.v)):
        _check_floating(name, x)
        for what in ("shape", "dtype", "device"):
            mine, theirs = getattr(x, what), getattr(p, what)
            if mine != theirs:
                raise ValueError(
                    f"{name} must have the {what} of {p_name}, {_say(theirs)}, got {_say(mine)}; pass the gradient of "
                    f"{p_name} itself, and a state from init_adamw_state({p_name})"
                )
    if isinstance(state.t, bool) or not isinstance(state.t, int) or state.t < 0:
        raise ValueError(
            f"{state_name}.t must be an int ≥ 0 (the number of updates made), got {state.t!r}; start from "
            f"init_adamw_state({p_name}), where it is 0"
        )
    if not bool(torch.isfinite(grad).all()):
        bad = int((~torch.isfinite(grad)).sum())
        raise ValueError(
            f"{grad_name} holds NaN or Inf in {bad} of {grad.numel()} entries, all must be finite; skip this update "
            "(nothing was changed)"
        )


def _say(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)


def _check_hyperparameters(lr: float, betas: Sequence[float], eps: float, weight_decay: float) -> None:
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}; pass for example betas=(0.9, 0.999)")
    named = [("lr", lr, "1e-3"), ("eps", eps, "1e-8"), ("weight_decay", weight_decay, "0.01")]
    for name, value, example in named:
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"{name} must be finite and ≥ 0, got {value!r}; pass for example {name}={example}")


def _check_max_norm(max_norm: float) -> None:
    if not max_norm > 0.0:  # NaN fails too
        raise ValueError(
            f"max_norm must be > 0 (inf only measures the norm), got {max_norm!r}; pass for example max_norm=1.0"
        )


def _check_schedule(warmup_steps: int, max_steps: int, min_ratio: float) -> None:
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must be ≥ 0, got {warmup_steps}; pass warmup_steps=0 for no warm-up")
    if max_steps <= warmup_steps:
        raise ValueError(
            f"max_steps must be above warmup_steps ({warmup_steps}), got {max_steps}; raise it, or lower warmup_steps"
        )
    if not 0.0 <= min_ratio <= 1.0:
        raise ValueError(
            f"min_ratio must be in [0, 1], got {min_ratio!r}; pass the last factor itself, for example min_ratio=0.1"
        )


def _check_step(step: Any) -> int:
    try:
        step = operator.index(step)
    except TypeError:
        raise ValueError(
            f"step must be an integer scalar, got {step!r}; pass the number of updates made so far"
        ) from None
    if step < 0:
        raise ValueError(f"step counts the updates made so far and must be ≥ 0, got {step}; start from step=0")
    return step
