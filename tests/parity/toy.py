"""A small pair for the tests of locating: the JAX function is right, and the torch module can be given any mistake."""

from __future__ import annotations

import copy
import math
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.ad_checkpoint import checkpoint_name
from torch import nn

from parity.judge import Judge
from parity.pair import Pair, pair_of
from parity.sides import TorchSide

D, F = 8, 12
SHAPE = (3, 6, D)


def jax_toy(params: Any, x: Any, mask: Any) -> Any:
    h = checkpoint_name(x @ params["first"]["kernel"] + params["first"]["bias"][None, None], "first")
    h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-5) * params["norm"]["scale"][None, None]
    h = checkpoint_name(h, "norm")
    scores = h @ jnp.swapaxes(h, 1, 2) * (1.0 / math.sqrt(D))
    weights = jnp.where(mask, jnp.exp(scores), 0.0)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    h = checkpoint_name(weights @ (h @ params["mix"]["value"]["kernel"]), "mix")
    up = h @ params["mlp"]["up"]["kernel"] + params["mlp"]["up"]["bias"][None, None]
    gelu = 0.5 * up * (1.0 + jax.lax.erf(up * math.sqrt(0.5)))
    return checkpoint_name(gelu @ params["mlp"]["down"]["kernel"], "mlp")


class Norm(nn.Module):
    def __init__(self, faults: dict[str, Any]) -> None:
        super().__init__()
        self.weight, self.faults = nn.Parameter(torch.ones(D)), faults

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        root = torch.rsqrt((h * h).mean(-1, keepdim=True) + self.faults.get("eps", 1e-5))
        root = root.detach() if "cut" in self.faults else root
        h = h - h.mean(-1, keepdim=True) if "mean" in self.faults else h
        return h * root * (torch.ones_like(self.weight) if "ones" in self.faults else self.weight)


class Mix(nn.Module):
    def __init__(self, faults: dict[str, Any]) -> None:
        super().__init__()
        self.value, self.faults = nn.Linear(D, D, bias=False), faults

    def forward(self, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q = h.bfloat16().to(h.dtype) if "bfloat16" in self.faults else h
        scores = q @ h.transpose(1, 2) * self.faults.get("scale", 1 / math.sqrt(D))
        weights = scores.exp() * (torch.ones_like(mask) if "mask" in self.faults else mask)
        weights = weights / weights.sum(-1, keepdim=True)
        value = h @ self.value.weight if "transposed" in self.faults else self.value(h)
        return weights @ (value.roll(1, 1) if "shifted" in self.faults else value)


class MLP(nn.Module):
    def __init__(self, faults: dict[str, Any]) -> None:
        super().__init__()
        self.up, self.down, self.faults = nn.Linear(D, F), nn.Linear(F, D, bias=False), faults

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        up = nn.functional.linear(h, self.up.weight) if "bias" in self.faults else self.up(h)
        gelu = nn.functional.gelu(up, approximate="tanh" if "tanh" in self.faults else "none")
        y = self.down(gelu)
        y = y + 0.3 * (gelu @ gelu.transpose(1, 2)).sin().mean(-1, keepdim=True) if "strange" in self.faults else y
        return -y if "sign" in self.faults else y


class Toy(nn.Module):
    def __init__(self, **faults: Any) -> None:
        super().__init__()
        self.first, self.norm, self.mix, self.mlp = nn.Linear(D, D), Norm(faults), Mix(faults), MLP(faults)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.mix(self.norm(self.first(x)), mask))


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {k: rng.standard_normal(v.shape).astype(np.float32) for k, v in Toy().named_parameters()}


def inputs() -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(4).standard_normal(SHAPE).astype(np.float32)
    return x, np.broadcast_to(np.tril(np.ones((SHAPE[1], SHAPE[1]), bool)), (SHAPE[0], SHAPE[1], SHAPE[1])).copy()


def template() -> dict[str, Any]:
    zeros = lambda *shape: np.zeros(shape, np.float32)  # noqa: E731
    return {
        "first": {"kernel": zeros(D, D), "bias": zeros(D)},
        "norm": {"scale": zeros(D)},
        "mix": {"value": {"kernel": zeros(D, D)}},
        "mlp": {"up": {"kernel": zeros(D, F), "bias": zeros(F)}, "down": {"kernel": zeros(F, D)}},
    }


def toy_pair(jax_side: Any = jax_toy, **faults: Any) -> Pair:
    loss = (lambda y, *_: jnp.mean(jnp.square(y)), lambda y, *_: y.square().mean() * faults.get("loss", 1.0))
    return pair_of(jax_side, Toy(**faults), template(), loss=loss, name="toy")


@lru_cache(maxsize=1)
def _judge() -> Judge:
    return Judge(toy_pair(), draws=4)


def judge(**faults: Any) -> Judge:
    """A judge of the pair with these mistakes; what is traced and compiled is shared."""
    made = copy.copy(_judge())
    made.pair = toy_pair(**faults)
    made.cpu = (made.cpu[0], TorchSide(made.pair))
    made.far = made.cpu
    return made
