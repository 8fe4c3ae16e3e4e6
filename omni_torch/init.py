"""Initial weights: Xavier, Kaiming, zero, and the default that both twins share (torch's own, written out).

Every uniform draw is half-open, U[−bound, bound): rounding may place a draw on −bound, never outside ±bound. Draws are
made in promote_types(dtype, float32) and rounded once (so a bfloat16 draw can touch both bounds): torch's own bfloat16
uniform has 256 levels, and a mean that is visibly off.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

__all__ = [
    "fan_in_fan_out",
    "xavier_uniform_",
    "kaiming_uniform_",
    "init_linear_",
    "linear_default_",
    "bias_default_",
    "embedding_default_",
    "default_init_",
]

# torch.nn.init.calculate_gain's table; leaky_relu with its default slope 0.01.
_GAINS = {
    "linear": 1.0,
    "sigmoid": 1.0,
    "tanh": 5.0 / 3.0,
    "relu": math.sqrt(2.0),
    "leaky_relu": math.sqrt(2.0 / (1.0 + 0.01**2)),
    "selu": 0.75,
}
_SCHEMES = ("xavier", "kaiming_relu", "zero")


def fan_in_fan_out(weight: torch.Tensor) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight in torch's layout: axis 0 is the output, axis 1 the input.

    Linear (out, in); Conv (out, in / groups, *kernel): both fans count every tap of the kernel; Embedding (V, D): D
    and V, by the same rule.

    Raises ValueError below two dimensions, and for what is not a tensor or has no shape yet (a lazy layer's weight).

    >>> fan_in_fan_out(torch.empty(3, 5)), fan_in_fan_out(nn.Conv2d(4, 6, kernel_size=3).weight)
    ((5, 3), (36, 54))
    """
    _check_tensor(weight)
    if weight.ndim < 2:
        raise ValueError(
            f"weight must have at least 2 dimensions (out, in, ...), got shape {tuple(weight.shape)}; for a bias use "
            "bias_default_, for a norm ones"
        )
    taps = math.prod(weight.shape[2:])
    return weight.shape[1] * taps, weight.shape[0] * taps


def xavier_uniform_(weight: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
    """U(±gain·√(6 / (fan_in + fan_out))) in place; variance gain²·2 / (fan_in + fan_out). Returns `weight`.

    weight: (out, in, ...). Keeps the variance of signals forward and of gradients backward through linear layers, as
    well as one number can do both.

    Raises ValueError below two dimensions, for a dtype that is not floating, for a gain that is negative or not finite.
    Source: Glorot & Bengio, AISTATS 2010, equation 16.

    >>> weight = xavier_uniform_(torch.empty(200, 400))
    >>> bool(weight.abs().max() <= (6 / 600) ** 0.5), round(float(weight.std()), 2)  # √(2 / 600) = 0.058
    (True, 0.06)
    """
    if not (isinstance(gain, numbers.Real) and math.isfinite(gain) and gain >= 0.0):
        raise ValueError(f"gain must be finite and ≥ 0, got {gain!r}; pass for example gain=1.0")
    fans = sum(fan_in_fan_out(weight))
    return _uniform_(weight, gain * math.sqrt(6.0 / fans) if fans else 0.0)


def kaiming_uniform_(weight: torch.Tensor, nonlinearity: str = "relu") -> torch.Tensor:
    """U(±gain·√(3 / fan_in)) in place; variance gain² / fan_in. Returns `weight`.

    weight: (out, in, ...). Keeps the second moment of signals through layers of that nonlinearity. Gains: linear 1,
    sigmoid 1, tanh 5/3, relu √2, leaky_relu √(2 / (1 + 0.01²)), selu 3/4.

    Raises ValueError below two dimensions, for a dtype that is not floating, for an unknown nonlinearity.
    Source: He et al., arXiv 1502.01852, equation 10 (fan_in mode).
    """
    gain = _gain(nonlinearity)
    fan_in, _ = fan_in_fan_out(weight)
    return _uniform_(weight, gain * math.sqrt(3.0 / fan_in) if fan_in else 0.0)


def init_linear_(layer: nn.Linear, scheme: str = "xavier") -> nn.Linear:
    """Initialise a Linear layer in place: weight by `scheme`, bias (if there is one) always zero. Returns `layer`.

    scheme: "xavier", "kaiming_relu" or "zero" (weights too: its outputs, and the gradients behind it, are then 0).

    Raises ValueError, before anything is drawn, for an unknown scheme, for anything that is not an nn.Linear, for one
    whose weight or bias is computed from other parameters (weight_norm, pruning), and for a LazyLinear without shape.

    >>> init_linear_(nn.Linear(3, 2), "xavier").bias.data
    tensor([0., 0.])
    """
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"layer must be an nn.Linear, got {type(layer).__name__}; for a bare weight use xavier_uniform_ or "
            "kaiming_uniform_"
        )
    if scheme not in _SCHEMES:
        raise ValueError(
            f"scheme must be one of {', '.join(_SCHEMES)}, got {scheme!r}; pass one of these, for example 'xavier'"
        )
    own = dict(layer.named_parameters(recurse=False))
    for name in ("weight", "bias"):
        if name not in own and (name == "weight" or layer.bias is not None):
            raise ValueError(
                f"layer.{name} must be a parameter, got one computed from others (parametrized or pruned), where what "
                "is written is lost; initialise the layer first, and parametrize it after"
            )
    _check_tensor(layer.weight, "layer.weight")
    with torch.no_grad():
        if scheme == "xavier":
            xavier_uniform_(layer.weight)
        elif scheme == "kaiming_relu":
            kaiming_uniform_(layer.weight, nonlinearity="relu")
        else:
            layer.weight.zero_()
        if layer.bias is not None:
            layer.bias.zero_()
    return layer


def linear_default_(weight: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """U(±1/√fan_in) in place: what torch gives Linear and Conv weights (it writes Kaiming with a = √5).

    weight: (out, in, ...). Returns it.

    Raises ValueError below two dimensions and for a dtype that is not floating.
    """
    fan_in, _ = fan_in_fan_out(weight)
    return _uniform_(weight, 1.0 / math.sqrt(fan_in) if fan_in else 0.0, generator)


def bias_default_(bias: torch.Tensor, fan_in: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """U(±1/√fan_in) in place, with the fan_in of the weight that the bias belongs to: torch's Linear and Conv biases.

    bias: of any shape. Returns it.

    Raises ValueError for a negative fan_in and for a dtype that is not floating.
    """
    if not (isinstance(fan_in, numbers.Real) and fan_in >= 0):
        raise ValueError(
            f"fan_in must be a number ≥ 0, got {fan_in!r}; pass fan_in_fan_out(weight)[0] of the bias's weight"
        )
    return _uniform_(bias, 1.0 / math.sqrt(fan_in) if fan_in else 0.0, generator)


def embedding_default_(weight: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """N(0, 1) in place: torch's Embedding.

    weight: of any shape, (V, D) for an embedding. Returns it.

    Raises ValueError for a dtype that is not floating.
    """
    _check_floating(weight)
    with torch.no_grad():
        wide = torch.promote_types(weight.dtype, torch.float32)
        if wide is weight.dtype:
            return weight.normal_(0.0, 1.0, generator=generator)
        return weight.copy_(torch.empty_like(weight, dtype=wide).normal_(0.0, 1.0, generator=generator))


def default_init_(module: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """Draw every parameter of `module` afresh as torch's constructors do; returns `module`.

    Linear, Conv: weight and bias U(±1/√fan_in). Embedding: N(0, 1), zeros in the row of padding_idx. Norms: weight 1,
    bias 0. With the same generator state it draws what the constructors drew, in their order.

    Raises ValueError, before anything is drawn, for a parameter that belongs to none of these (one of a weight_norm
    too), and for a lazy one without shape.
    """
    convs = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    owners = list(module.modules())
    for owner in owners:
        own = [name for name, _ in owner.named_parameters(recurse=False)]
        known = isinstance(owner, (nn.Linear, nn.Embedding, *convs)) and set(own) <= {"weight", "bias"}
        if own and not known and not _is_norm(owner):
            raise ValueError(
                f"default_init_ does not know how to draw {', '.join(own)} of {type(owner).__name__}: it knows Linear, "
                "Conv, Embedding and norms; initialise that module yourself"
            )
        for name, parameter in owner.named_parameters(recurse=False):
            _check_tensor(parameter, f"{name} of {type(owner).__name__}")
    with torch.no_grad():
        for owner in owners:
            if isinstance(owner, (nn.Linear, *convs)):
                linear_default_(owner.weight, generator)
                if owner.bias is not None:
                    bias_default_(owner.bias, fan_in_fan_out(owner.weight)[0], generator)
            elif isinstance(owner, nn.Embedding):
                embedding_default_(owner.weight, generator)
                if owner.padding_idx is not None:
                    owner.weight[owner.padding_idx].zero_()
            elif _is_norm(owner):
                for name, parameter in owner.named_parameters(recurse=False):
                    parameter.fill_(0.0 if name == "bias" else 1.0)
    return module


def _is_norm(module: nn.Module) -> bool:
    """A norm by its class name (ours, torch's and a user's alike) with nothing but weight and bias vectors to draw."""
    own = dict(module.named_parameters(recurse=False))
    return type(module).__name__.endswith("Norm") and own.keys() <= {"weight", "bias"}


def _uniform_(x: torch.Tensor, bound: float, generator: torch.Generator | None = None) -> torch.Tensor:
    _check_floating(x)
    with torch.no_grad():
        wide = torch.promote_types(x.dtype, torch.float32)
        if wide is x.dtype:
            return x.uniform_(-bound, bound, generator=generator)
        return x.copy_(torch.empty_like(x, dtype=wide).uniform_(-bound, bound, generator=generator))


def _gain(nonlinearity: str) -> float:
    if not isinstance(nonlinearity, str) or nonlinearity not in _GAINS:
        raise ValueError(
            f"nonlinearity must be one of {', '.join(_GAINS)}, got {nonlinearity!r}; pass the nearest of these"
        )
    return _GAINS[nonlinearity]


def _check_tensor(x: Any, name: str = "weight") -> None:
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(x).__name__}; pass the weight itself")
    if is_lazy(x):
        raise ValueError(
            f"{name} must have a shape, got an uninitialized parameter of a lazy layer; run a forward pass first"
        )


def _check_floating(x: torch.Tensor) -> None:
    _check_tensor(x)
    if not x.is_floating_point():
        raise ValueError(
            f"an initial weight must have a real floating dtype, got {x.dtype}; make it torch.float32 first"
        )
