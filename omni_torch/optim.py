"""AdamW from scratch, as functions and as an optimizer; clipping by global norm; the warm-up + cosine schedule.

Every update happens in place under `torch.no_grad()`, and every argument is checked before anything is changed.
Arithmetic runs in promote_types(dtype, float32) and is rounded once into storage: float16 alone would turn eps = 1e-8
into zero, and the update of a zero gradient into 0/0.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import nn

__all__ = [
    "AdamWState",
    "init_adamw_state",
    "adamw_step_",
    "adamw_step_many_",
    "global_norm",
    "clip_grad_norm_",
    "decay_mask",
    "AdamW",
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
    """Zero moments like `p` (of any shape, 0-d and empty too) and t = 0; they carry no gradient.

    Raises ValueError if `p` is not a dense tensor of a real floating dtype.

    >>> state = init_adamw_state(torch.ones(2, 3))
    >>> tuple(state.m.shape), state.v.dtype, state.t
    ((2, 3), torch.float32, 0)
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

    p, grad, state.m, state.v: one shape, dtype and device, any of them. The decay is decoupled: it never enters the
    moments. torch.optim.AdamW multiplies p by 1 − lr·weight_decay first, which is the same in exact arithmetic; in
    float32 its rounded factor moves a parameter that should stay. A second moment too large for its dtype is held at
    the largest number.

    Raises ValueError, before anything is changed, for a parameter that is not floating point; for shapes, dtypes or
    devices that differ between p, grad, m and v; for NaN or Inf in `grad`; for betas outside [0, 1); for an lr, eps
    or weight_decay that is not one number, negative or not finite; for a p, m or v that cannot be written to element
    by element (expanded, or an inference tensor outside torch.inference_mode); for a p, m or v whose stretch of memory
    overlaps that of another of the four tensors.
    Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101, algorithm 2.

    >>> p = torch.tensor([1.0, -2.0])
    >>> state = adamw_step_(p, torch.tensor([0.5, 4.0]), init_adamw_state(p), lr=0.1, weight_decay=0.0)
    >>> p, state.t  # the first step is the gradient's sign
    (tensor([ 0.9000, -2.1000]), 1)
    """
    hyper = _check_hyperparameters(lr, betas, eps, weight_decay)
    _check_update("p", "grad", "state", p, grad, state)
    _check_apart([("p", "grad", "state", p, grad, state)])
    _check_finite({"grad": grad})
    return _update_(p, grad, state, *hyper)


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

    Lists of any length, tensors of any shapes. All or nothing: the lists' lengths and every single tensor are checked
    before the first one is changed. Slices of one flat buffer are parameters like others, as long as they lie apart.

    Raises ValueError as `adamw_step_` does, for lists of unequal length, and for a parameter or a state that stands in
    its list twice or shares memory with another (a tied weight takes one update with the sum of its gradients).
    """
    params, grads, states = list(params), list(grads), list(states)
    if not len(params) == len(grads) == len(states):
        raise ValueError(
            f"params, grads and states must have one entry per parameter, got {len(params)}, {len(grads)} and "
            f"{len(states)} entries; pass three lists of the same length and order"
        )
    hyper = _check_hyperparameters(lr, betas, eps, weight_decay)
    updates = [
        (f"params[{i}]", f"grads[{i}]", f"states[{i}]", p, grad, state)
        for i, (p, grad, state) in enumerate(zip(params, grads, states, strict=True))
    ]
    for update in updates:
        _check_update(*update)
    _check_apart(updates)
    _check_finite({f"grads[{i}]": grad for i, grad in enumerate(grads)})
    return [_update_(p, grad, state, *hyper) for p, grad, state in zip(params, grads, states, strict=True)]


def global_norm(grads: Iterable[torch.Tensor]) -> Float[torch.Tensor, ""]:
    """√Σ g² over all elements of all tensors, in the widest of their dtypes and float32; 0 for no tensors.

    Raises ValueError for a tensor that is not floating point.

    >>> global_norm([torch.tensor([3.0, 0.0]), torch.tensor(4.0)])
    tensor(5.)
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

    Tensors of any shapes; the norm is a scalar. torch's form (torch.nn.utils.clip_grad_norm_): the 1e-6 stands beside
    the norm. A NaN or Inf gradient makes NaN of what it touches and shows in the returned norm.

    Raises ValueError for a max_norm that is not a number above 0 and for a tensor that is not floating point.
    Source: Pascanu, Mikolov & Bengio, On the difficulty of training recurrent neural networks, arXiv 1211.5063,
    algorithm 1.
    """
    grads = list(grads)
    max_norm = _check_max_norm(max_norm)
    norm = global_norm(grads)
    scale = torch.clamp(max_norm / (norm + _CLIP_EPS), max=1.0)  # clamp hands NaN on
    with torch.no_grad():
        for g in grads:
            wide = torch.promote_types(g.dtype, torch.float32)
            # For float32 and float64 `.to` returns g itself, and the copy is of a tensor onto itself.
            g.copy_(g.to(wide).mul_(scale.to(device=g.device, dtype=wide)))
    return norm


def decay_mask(model: nn.Module) -> dict[str, bool]:
    """Which parameters weight decay is for, by name: those of two or more dimensions.

    Matrices, convolutions and embeddings decay; norm scales and biases, which are pulled towards 0 for nothing, do
    not. A parameter that two modules share stands there once, under its first name.

    Source: karpathy/nanoGPT, model.py, configure_optimizers.

    >>> decay_mask(nn.Linear(3, 2))
    {'weight': True, 'bias': False}
    """
    return {name: p.ndim >= 2 for name, p in model.named_parameters()}


class AdamW(torch.optim.Optimizer):
    """`adamw_step_` for all parameters of a model, as a torch optimizer with torch.optim.AdamW's state_dict.

    params: tensors, (name, tensor) pairs, or groups: dicts with "params" and, where they differ, their own lr, betas,
    eps, weight_decay. To leave norms and biases undecayed:

        mask = decay_mask(model)
        groups = [{"params": [p for n, p in model.named_parameters() if mask[n]]},
                  {"params": [p for n, p in model.named_parameters() if not mask[n]], "weight_decay": 0.0}]

    The state of a parameter is {step, exp_avg, exp_avg_sq}, made at its first update, so that either optimizer goes on
    from the other's state_dict (one with amsgrad or maximize is refused). Learning-rate schedulers work on it.

    Raises ValueError for parameters that are not dense tensors of a real floating dtype, for one that stands in a
    group twice, and for hyperparameters as `adamw_step_` does.
    Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101, algorithm 2.

    >>> p = nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = AdamW([p], lr=0.1, weight_decay=0.0)
    >>> (p**2).sum().backward()
    >>> optimizer.step()
    >>> p.data
    tensor([ 0.9000, -1.9000])
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        _check_hyperparameters(lr, betas, eps, weight_decay)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take further parameters on, with hyperparameters of their own where the group names them.

        Raises ValueError as the constructor does; the optimizer is then as it was.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_hyperparameters(*_hyperparameters(group))
            for name, p in zip(_names(len(self.param_groups) - 1, group), group["params"], strict=True):
                _check_floating(name, p)
            if len({id(p) for p in group["params"]}) != len(group["params"]):
                raise ValueError("a parameter stands in the group twice: pass a tied weight once")
        except ValueError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()` of this optimizer or of torch.optim.AdamW over the same parameters.

        Raises ValueError, before anything is changed, for amsgrad or maximize, for a parameter's state that is not
        {step, exp_avg, exp_avg_sq} with moments of the parameter's shape, and (torch's own check) for groups of other
        sizes.
        """
        for group in state_dict["param_groups"]:
            for switch in ("amsgrad", "maximize"):
                if group.get(switch):
                    raise ValueError(f"{switch} must be off, got {group[switch]!r}; this AdamW is the plain algorithm")
        mine = [item for i, g in enumerate(self.param_groups) for item in zip(_names(i, g), g["params"], strict=True)]
        theirs = [i for group in state_dict["param_groups"] for i in group["params"]]
        owners = dict(zip(theirs, mine, strict=False))  # of other lengths: refused by torch below
        for i, state in state_dict["state"].items():
            if state and state.keys() != {"step", "exp_avg", "exp_avg_sq"}:
                raise ValueError(
                    f"state[{i}] must hold step, exp_avg and exp_avg_sq, got {', '.join(state)}; pass the "
                    "state_dict of an AdamW"
                )
            if state and i in owners and len(theirs) == len(mine):
                _check_saved(i, state, *owners[i])
        super().load_state_dict(state_dict)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient; returns what `closure` (which may recompute them) returned.

        All or nothing over all groups: NaN, Inf, a sparse gradient or a bad hyperparameter anywhere is seen before
        the first parameter moves.

        Raises ValueError as `adamw_step_` does.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates, hypers = [], []
        for i, group in enumerate(self.param_groups):
            hyper = _check_hyperparameters(*_hyperparameters(group))
            for name, p in zip(_names(i, group), group["params"], strict=True):
                if p.grad is None:
                    continue
                saved = self.state.get(p)
                state = (
                    AdamWState(saved["exp_avg"], saved["exp_avg_sq"], int(saved["step"]))
                    if saved
                    else init_adamw_state(p)
                )
                updates.append((name, f"{name}.grad", f"state of {name}", p, p.grad, state))
                hypers.append(hyper)
                _check_update(*updates[-1])
        _check_apart(updates)
        _check_finite({grad_name: grad for _, grad_name, _, _, grad, _ in updates})
        for (_, _, _, p, grad, state), hyper in zip(updates, hypers, strict=True):
            _update_(p, grad, state, *hyper)
            saved = self.state[p]
            # torch counts in a 0-d float32 tensor on the CPU.
            saved.setdefault("step", torch.tensor(0.0, dtype=torch.float32)).fill_(float(state.t))
            saved["exp_avg"], saved["exp_avg_sq"] = state.m, state.v
        return loss


def warmup_cosine(step: int, warmup_steps: int, max_steps: int, min_ratio: float = 0.1) -> float:
    """Factor on the learning rate at `step` (the number of updates made before): linear warm-up, then a half cosine.

        step < warmup_steps:   step / warmup_steps                        (so the very first factor is 0)
        after that:            min_ratio + (1 − min_ratio)·(1 + cos(π·progress)) / 2
                               progress = (step − warmup_steps) / (max_steps − warmup_steps), at most 1

    Exactly 1 at step = warmup_steps and exactly min_ratio from max_steps on. A Python float, computed on the host.

    Raises ValueError for a step that is not an integer or negative, for a negative warmup_steps, for
    max_steps ≤ warmup_steps, for min_ratio outside [0, 1].
    Source: Loshchilov & Hutter, SGDR, arXiv 1608.03983, equation 5 (one period, no restart), with a linear start.

    >>> [round(warmup_cosine(step, warmup_steps=2, max_steps=6), 3) for step in range(8)]
    [0.0, 0.5, 1.0, 0.868, 0.55, 0.232, 0.1, 0.1]
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
        _average_(m, g, beta1)
        _average_(v, g * g, beta2).clamp_(max=torch.finfo(p.dtype).max)  # an infinite v would never come back
        denominator = v.div(_bias_correction(beta2, t)).sqrt_().add_(eps)
        update = m.div(_bias_correction(beta1, t)).div_(denominator).add_(x, alpha=weight_decay)
        x.sub_(update, alpha=lr)
        p.copy_(x)
        state.m.copy_(m)
        state.v.copy_(v)
    state.t = t
    return state


def _average_(mean: torch.Tensor, x: torch.Tensor, beta: float) -> torch.Tensor:
    """mean ← β·mean + (1 − β)·x in place.

    Written as mean + (1 − β)·(x − mean) where β is large: float32's 0.999 and 0.001 do not add up to 1, and β·mean +
    (1 − β)·x drifts by 1.3e-5 of its value in the end.
    """
    return mean.lerp_(x, 1.0 - beta) if beta >= 0.5 else mean.mul_(beta).add_(x, alpha=1.0 - beta)


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
    if x.dtype.itemsize < 2:
        raise ValueError(
            f"{name} must have 16 bits or more per number, got {x.dtype}; cast it with .to(torch.bfloat16)"
        )


def _check_update(
    p_name: str, grad_name: str, state_name: str, p: torch.Tensor, grad: torch.Tensor, state: AdamWState
) -> None:
    """What could go wrong with one parameter's tensors (but for their values), before any of them is changed."""
    _check_floating(p_name, p)
    if not isinstance(state, AdamWState):
        raise ValueError(
            f"{state_name} must be an AdamWState (m, v, t), got {type(state).__name__}; start from "
            f"init_adamw_state({p_name})"
        )
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
    for name, x in ((p_name, p), (f"{state_name}.m", state.m), (f"{state_name}.v", state.v)):
        _check_writable(name, x)


def _check_writable(name: str, x: torch.Tensor) -> None:
    """Refuse what torch would refuse in the midst of an update, or would write twice to."""
    if x.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name} must be a tensor that may be changed, got an inference tensor outside torch.inference_mode(); "
            "pass a clone of it made outside that mode"
        )
    if x.is_contiguous():
        return
    reach = 0  # how far the dimensions of smaller strides go; the next stride has to step over it
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(
                f"{name} must have memory of its own for every element, got shape {_say(x.shape)} over strides "
                f"{x.stride()}; pass {name}.contiguous()"
            )
        reach += (size - 1) * stride


def _check_apart(updates: list[tuple[str, str, str, torch.Tensor, torch.Tensor, AdamWState]]) -> None:
    """Refuse memory that is written to for two purposes, or written to and read; gradients may share theirs.

    What is compared is the stretch from the first to the last byte of each tensor, on the host, after one sort.
    """
    owners: dict[int, str] = {}
    stretches: list[tuple[str, int, int, bool, str]] = []
    for p_name, grad_name, state_name, p, grad, state in updates:
        for what, name, x in (("tensor", p_name, p), ("state", state_name, state)):
            if owners.setdefault(id(x), name) is not name:
                _raise_shared(name, owners[id(x)], f"is the same {what} as")
        device = str(p.device)
        for written, name, part, x in (
            (True, p_name, "", p),
            (True, state_name, ".m", state.m),
            (True, state_name, ".v", state.v),
            (False, grad_name, "", grad),
        ):
            if n := x.numel():
                if not x.is_contiguous():
                    n = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
                start = x.data_ptr()
                stretches.append((device, start, start + n * x.element_size(), written, name + part))
    stretches.sort()
    last, last_written = ("", 0, 0, False, ""), ("", 0, 0, False, "")  # those that have reached furthest so far
    for stretch in stretches:
        device, start, end, written, name = stretch
        before = last if written else last_written
        if before[0] == device and start < before[2]:
            _raise_shared(name, before[4], "shares memory with")
        if last[0] != device or end > last[2]:
            last = stretch
        if written and (last_written[0] != device or end > last_written[2]):
            last_written = stretch


def _raise_shared(name: str, other: str, how: str) -> None:
    raise ValueError(
        f"{name} {how} {other}, but what an update writes must have memory of its own; pass a tied weight once, with "
        "the sum of its gradients, a state from init_adamw_state for each parameter, and clones of other shared tensors"
    )


def _check_saved(i: int, state: dict[str, Any], name: str, p: torch.Tensor) -> None:
    """One parameter's entry of a state_dict, whose keys are right."""
    for key in ("exp_avg", "exp_avg_sq"):
        _check_floating(f"state[{i}]['{key}']", state[key])
        if state[key].shape != p.shape:
            raise ValueError(
                f"state[{i}]['{key}'] must have the shape of {name}, {_say(p.shape)}, got {_say(state[key].shape)}; "
                "pass the state_dict of an optimizer over the same parameters in the same order"
            )
    step = _number(state["step"])
    if step is None or not (step >= 0 and step.is_integer()):
        raise ValueError(
            f"state[{i}]['step'] must be an integer ≥ 0 (the number of updates made), got {state['step']!r}; pass the "
            "state_dict of an AdamW"
        )


def _check_finite(grads: dict[str, torch.Tensor]) -> None:
    """Refuse NaN and Inf; the device is waited for once, not once per tensor."""
    if not grads:
        return
    device = next(iter(grads.values())).device
    fine = torch.stack([torch.isfinite(grad).all().to(device) for grad in grads.values()])
    if bool(fine.all()):
        return
    name, grad = next(item for item, good in zip(grads.items(), fine.tolist(), strict=True) if not good)
    bad = int((~torch.isfinite(grad)).sum())
    raise ValueError(
        f"{name} holds NaN or Inf in {bad} of {grad.numel()} entries, all must be finite; skip this update "
        "(nothing was changed)"
    )


def _hyperparameters(group: dict[str, Any]) -> tuple[float, tuple[float, float], float, float]:
    return group["lr"], group["betas"], group["eps"], group["weight_decay"]


def _names(i: int, group: dict[str, Any]) -> list[str]:
    """What to call a group's parameters in a message: their names, where the optimizer was given them."""
    return group.get("param_names") or [f"param_groups[{i}]['params'][{j}]" for j in range(len(group["params"]))]


def _say(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)


def _number(value: Any) -> float | None:
    """A real number, or a 0-d tensor of one (checkpoints and torch's own optimizers hold such), as a float."""
    if isinstance(value, torch.Tensor):
        if value.ndim or value.is_complex() or value.dtype is torch.bool:
            return None
        return float(value.detach())
    if not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _check_hyperparameters(
    lr: float, betas: Sequence[float], eps: float, weight_decay: float
) -> tuple[float, tuple[float, float], float, float]:
    """The same as Python floats: no tensor among them makes the update wait for its device."""
    pair = [_number(beta) for beta in betas] if isinstance(betas, Sequence) else []
    if len(pair) != 2 or not all(beta is not None and 0.0 <= beta < 1.0 for beta in pair):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}; pass for example betas=(0.9, 0.999)")
    values = []
    for name, value, example in (("lr", lr, "1e-3"), ("eps", eps, "1e-8"), ("weight_decay", weight_decay, "0.01")):
        shape = getattr(value, "shape", ())
        if len(shape):
            raise ValueError(f"{name} must be a scalar, got shape {_say(shape)}; pass one number for all of params")
        number = _number(value)
        if number is None or not (math.isfinite(number) and number >= 0.0):
            what = "a number, finite and ≥ 0" if number is None else "finite and ≥ 0"
            raise ValueError(f"{name} must be {what}, got {value!r}; pass for example {name}={example}")
        values.append(number)
    return values[0], (pair[0], pair[1]), values[1], values[2]  # pyright: ignore[reportReturnType]  (None is out)


def _check_max_norm(max_norm: float) -> float:
    number = _number(max_norm)
    if number is None or not number > 0.0:  # NaN fails too
        raise ValueError(
            f"max_norm must be > 0 (inf only measures the norm), got {max_norm!r}; pass for example max_norm=1.0"
        )
    return number


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
