"""AdamW, clipping and the schedule from their formulas alone, in plain numpy, and what torch and optax do instead.

The oracle is the third witness of the optimizer checks: it is written from the formulas, shares no line with either
twin and works in numpy's widest float. The two emulations repeat a library's float32 arithmetic in its own order, so
that its distance from the oracle is not just seen but accounted for: `without` takes named causes away.

Trees are mappings from names to arrays; a run starts from parameters and takes one gradient tree and one learning
rate per step.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

__all__ = [
    "AVERAGE_CAUSE",
    "OPTAX_CAUSE",
    "TORCH_CAUSE",
    "Step",
    "Tree",
    "adamw",
    "clip",
    "displacement",
    "explained",
    "factor",
    "global_norm",
    "optax_adamw",
    "recipe",
    "stored_adamw",
    "torch_adamw",
]

Tree = Mapping[str, np.ndarray]

TORCH_CAUSE = "rounding the factor 1 - lr*weight_decay"
OPTAX_CAUSE = "subtracting 1 - beta^t in the working precision"
AVERAGE_CAUSE = "averaging with rounded beta2 and 1 - beta2, which no longer add up to 1"
"""Why the libraries leave the oracle, in words; their emulations below prove them."""


@dataclass(frozen=True)
class Step:
    """The state after a step: parameters, first and second moments, and how many steps were made."""

    p: dict[str, np.ndarray]
    m: dict[str, np.ndarray]
    v: dict[str, np.ndarray]
    t: int


def adamw(
    start: Tree,
    grads: Sequence[Tree],
    lrs: Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    dtype: type[np.floating] = np.longdouble,
) -> list[Step]:
    """The states after each step of AdamW, term by term as the paper has it.

    Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101, algorithm 2.
    """
    beta1, beta2, eps_, decay = (dtype(x) for x in (*betas, eps, weight_decay))
    one = dtype(1)
    p = {name: x.astype(dtype) for name, x in start.items()}
    m = {name: np.zeros_like(x) for name, x in p.items()}
    v = {name: np.zeros_like(x) for name, x in p.items()}
    steps = []
    for t, (grad, lr) in enumerate(_paired(grads, lrs), start=1):
        p, m, v = dict(p), dict(m), dict(v)
        correction1, correction2 = (_one_less_power(beta, t, dtype) for beta in betas)
        for name in p:
            g = grad[name].astype(dtype)
            m[name] = beta1 * m[name] + (one - beta1) * g
            v[name] = beta2 * v[name] + (one - beta2) * g * g
            m_hat, v_hat = m[name] / correction1, v[name] / correction2
            p[name] = p[name] - dtype(lr) * (m_hat / (np.sqrt(v_hat) + eps_) + decay * p[name])
        steps.append(Step(p, m, v, t))
    return steps


def global_norm(grads: Tree, dtype: type[np.floating] = np.longdouble) -> np.floating:
    """√Σ g² over all tensors."""
    return np.sqrt(sum((np.sum(np.square(g.astype(dtype))) for g in grads.values()), start=dtype(0)))


def clip(
    grads: Tree, max_norm: float, dtype: type[np.floating] = np.longdouble
) -> tuple[dict[str, np.ndarray], np.floating]:
    """(g·min(1, max_norm / (norm + 1e-6)), norm): torch's form."""
    norm = global_norm(grads, dtype)
    scale = min(dtype(1), dtype(max_norm) / (norm + dtype(1e-6)))
    return {name: g.astype(dtype) * scale for name, g in grads.items()}, norm


def factor(
    step: int, warmup_steps: int, max_steps: int, min_ratio: float = 0.1, dtype: type[np.floating] = np.longdouble
) -> np.floating:
    """The learning rate's factor: step / warmup, then ½(1 + cos π·progress) from 1 to min_ratio, then min_ratio."""
    if step < warmup_steps:
        return dtype(step) / dtype(warmup_steps)
    progress = min(dtype(1), dtype(step - warmup_steps) / dtype(max_steps - warmup_steps))
    pi = np.arccos(dtype(-1))
    low = dtype(min_ratio)
    return low + (dtype(1) - low) * (dtype(1) + np.cos(pi * progress)) / dtype(2)


def recipe(
    start: Tree,
    grads: Sequence[Tree],
    lr: float,
    warmup_steps: int,
    max_steps: int,
    max_norm: float = 1.0,
    min_ratio: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    dtype: type[np.floating] = np.longdouble,
) -> tuple[list[Step], list[np.floating], list[np.floating]]:
    """Clip, schedule and AdamW together on given gradients: (states, learning rates, norms before clipping).

    The factor is taken at the number of steps made before, so the first update has learning rate 0 after a warm-up.
    """
    rates = [dtype(lr) * factor(i, warmup_steps, max_steps, min_ratio, dtype) for i in range(len(grads))]
    clipped = [clip(g, max_norm, dtype) for g in grads]
    states = adamw(start, [g for g, _ in clipped], rates, betas, eps, weight_decay, dtype)  # type: ignore[arg-type]
    return states, rates, [norm for _, norm in clipped]


def torch_adamw(
    start: Tree,
    grads: Sequence[Tree],
    lrs: Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    dtype: type[np.floating] = np.float32,
    without: Collection[str] = (),
) -> list[Step]:
    """torch.optim.AdamW's arithmetic in `dtype`, operation by operation; TORCH_CAUSE and AVERAGE_CAUSE set it apart.

    lerp and addcmul fuse their last multiplication and addition; scalars are computed in float64 and rounded when
    they meet a tensor. Not repeated: the last bit of its vectorised square root, which some builds round wrongly.
    Without TORCH_CAUSE it decays without rounding the factor and the decayed parameter; without AVERAGE_CAUSE the
    second moment moves by (1 - beta2)*(g*g - v).
    """
    beta1, beta2 = betas
    p = {name: x.astype(dtype) for name, x in start.items()}
    m = {name: np.zeros_like(x) for name, x in p.items()}
    v = {name: np.zeros_like(x) for name, x in p.items()}
    steps = []
    for t, (grad, lr) in enumerate(_paired(grads, lrs), start=1):
        p, m, v = dict(p), dict(m), dict(v)
        step_size = dtype(-float(lr) / (1 - beta1**t))
        correction = dtype((1 - beta2**t) ** 0.5)
        keep = 1 - float(lr) * weight_decay
        for name in p:
            g = grad[name].astype(dtype)
            m[name] = _fused(dtype(1 - beta1), g - m[name], m[name])  # lerp
            if AVERAGE_CAUSE in without:
                v[name] = _fused(dtype(1 - beta2), g * g - v[name], v[name])
            else:
                v[name] = _fused(dtype(1 - beta2) * g, g, dtype(beta2) * v[name])  # addcmul
            denominator = np.sqrt(v[name]) / correction + dtype(eps)
            move = step_size * m[name] / denominator  # addcdiv
            if TORCH_CAUSE in without:
                p[name] = (np.longdouble(keep) * p[name] + move).astype(dtype)
            else:
                p[name] = dtype(keep) * p[name] + move
        steps.append(Step(p, m, v, t))
    return steps


def optax_adamw(
    start: Tree,
    grads: Sequence[Tree],
    lrs: Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    dtype: type[np.floating] = np.float32,
    without: Collection[str] = (),
    jitted: bool = False,
) -> list[Step]:
    """optax.adamw's arithmetic in `dtype`, operation by operation; OPTAX_CAUSE and AVERAGE_CAUSE set it apart.

    Both come of beta2 rounded to `dtype`, and together they amount to a constant factor on the second moment. Without
    OPTAX_CAUSE the bias corrections are taken in float64 and rounded once; without AVERAGE_CAUSE the moments move by
    (1 - beta)*(g - m) and (1 - beta2)*(g*g - v). jitted=True is the same inside jax.jit on
    a CPU, whose compiler fuses multiplications with the additions that follow them.
    """
    multiply_add = _fused if jitted else lambda a, b, c: a * b + c
    beta1, beta2 = (dtype(beta) for beta in betas)
    p = {name: x.astype(dtype) for name, x in start.items()}
    m = {name: np.zeros_like(x) for name, x in p.items()}
    v = {name: np.zeros_like(x) for name, x in p.items()}
    steps = []
    for t, (grad, lr) in enumerate(_paired(grads, lrs), start=1):
        p, m, v = dict(p), dict(m), dict(v)
        if OPTAX_CAUSE not in without:
            # Each power is rounded to dtype before it is taken from 1: what is left of 1 - 0.999 has 14 bits.
            corrections = [dtype(1) - dtype(float(beta) ** t) for beta in (beta1, beta2)]
        else:
            corrections = [dtype(-math.expm1(t * math.log(beta))) for beta in betas]
        for name in p:
            g = grad[name].astype(dtype)
            if AVERAGE_CAUSE in without:
                m[name] = multiply_add(dtype(1 - betas[0]), g - m[name], m[name])
                v[name] = multiply_add(dtype(1 - betas[1]), g * g - v[name], v[name])
            else:
                m[name] = multiply_add(dtype(1 - betas[0]), g, beta1 * m[name])
                v[name] = multiply_add(dtype(1 - betas[1]), g * g, beta2 * v[name])
            root = np.sqrt(v[name] / corrections[1]) + dtype(eps)
            direction = m[name] / (corrections[0] * root) if jitted else (m[name] / corrections[0]) / root
            update = multiply_add(dtype(weight_decay), p[name], direction)
            p[name] = multiply_add(dtype(-float(lr)), update, p[name])
        steps.append(Step(p, m, v, t))
    return steps


def stored_adamw(
    start: Tree,
    grads: Sequence[Tree],
    lrs: Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    dtype: type[np.floating] = np.float32,
) -> list[Step]:
    """AdamW in the widest float, but parameters and moments are rounded to `dtype` after every step.

    What an implementation that stores them in `dtype` cannot avoid: the floor of the errors.
    """
    wide = np.longdouble
    beta1, beta2, eps_, decay, one = (wide(x) for x in (*betas, eps, weight_decay, 1))
    p = {name: x.astype(dtype) for name, x in start.items()}
    m = {name: np.zeros_like(x) for name, x in p.items()}
    v = {name: np.zeros_like(x) for name, x in p.items()}
    steps = []
    for t, (grad, lr) in enumerate(_paired(grads, lrs), start=1):
        p, m, v = dict(p), dict(m), dict(v)
        correction1, correction2 = (_one_less_power(beta, t, wide) for beta in betas)
        for name in p:
            g, old = grad[name].astype(wide), p[name].astype(wide)
            m[name] = (beta1 * m[name] + (one - beta1) * g).astype(dtype)
            v[name] = (beta2 * v[name] + (one - beta2) * g * g).astype(dtype)
            m_hat, v_hat = m[name].astype(wide) / correction1, v[name].astype(wide) / correction2
            p[name] = (old - wide(lr) * (m_hat / (np.sqrt(v_hat) + eps_) + decay * old)).astype(dtype)
        steps.append(Step(p, m, v, t))
    return steps


def displacement(step: Step, start: Tree) -> dict[str, np.ndarray]:
    """How far each parameter has come, in the widest float: what is compared, because parameters hardly move."""
    return {name: x.astype(np.longdouble) - start[name].astype(np.longdouble) for name, x in step.p.items()}


def explained(library: Tree, emulation: Tree, oracle: Tree) -> float:
    """The share of a library's deviation that the emulation accounts for: 1 − RMS(library − emulation) /
    RMS(library − oracle), over all tensors. 1 is everything; 0 or less is nothing.

    Where the library does not deviate at all there is nothing to explain, and the share is 1 only for an emulation
    that does not either.
    """

    def square_sum(a: Tree, b: Tree) -> float:
        return float(sum(np.sum(np.square(a[k].astype(np.longdouble) - b[k].astype(np.longdouble))) for k in a))

    unexplained, deviation = square_sum(library, emulation), square_sum(library, oracle)
    if deviation == 0.0:
        return 1.0 if unexplained == 0.0 else -math.inf
    return 1.0 - math.sqrt(unexplained / deviation)


def _one_less_power(beta: float, t: int, dtype: type[np.floating]) -> np.floating:
    """1 − βᵗ without an error: in fractions of integers, then rounded (twice 53 bits serve the widest float)."""
    exact = 1 - Fraction(beta) ** t
    high = float(exact)
    return dtype(high) + dtype(float(exact - Fraction(high)))


def _fused(a: np.ndarray | np.floating, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a·b + c rounded once, in the dtype of c (exact products of float32 fit into float64)."""
    wide = np.float64 if c.dtype == np.float32 else np.longdouble
    return (wide(a) * b.astype(wide) + c.astype(wide)).astype(c.dtype)


def _paired(grads: Sequence[Tree], lrs: Sequence[float]) -> zip[tuple[Tree, float]]:
    if len(grads) != len(lrs):
        raise ValueError(f"grads and lrs must have one entry per step, got {len(grads)} and {len(lrs)}")
    return zip(grads, lrs, strict=True)
