"""Pairs of a few primitives, each written with its framework's own functions: programs that are not the twins.

The gradient with respect to the weights is judged as well, of the sum of output times a random cotangent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from parity.pair import Pair

__all__ = ["SHAPES", "foreign_pair"]

SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "scalar chain": ((),),
    "mean of 1e6": ((1000, 1000),),
    "mean of 3": ((3,),),
    "elementwise 250 x 1000": ((250, 1000),),
    "elementwise 1": ((1,),),
    "softmax 700 x 900": ((700, 900),),
    "softmax 2": ((1, 2),),
    "layer norm 700 x 900": ((700, 900),),
    "layer norm 1 x 7": ((1, 7),),
    "matmul 300 x 1000 x 500": ((300, 1000), (1000, 500)),
    "matmul 1 x 3 x 1": ((1, 3), (3, 1)),
    "logsumexp 700 x 900": ((700, 900),),
    "look-up 5000 of 50": ((50, 21),),
    "running sum 40 x 500": ((40, 500),),
}
"""Name -> shapes of the weights, from one element to a million."""


def foreign_pair(name: str, seed: int) -> tuple[Pair, dict[str, np.ndarray], tuple[np.ndarray, ...]]:
    """(pair, weights, inputs) of one of SHAPES."""
    import jax
    import jax.numpy as jnp
    import torch

    from parity.pair import pair_of

    rng = np.random.default_rng([seed, len(name), sum(map(ord, name))])
    weights = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in zip("xy", SHAPES[name])}
    ids = rng.integers(0, 50, 5000).astype(np.int32)
    eps = 1e-5
    functional = torch.nn.functional

    def norm(x):
        centred = x - jnp.mean(x, -1, keepdims=True)
        return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + eps)

    def torch_norm(x):
        return functional.layer_norm(x, x.shape[-1:], eps=eps)

    def gelu(x):
        # torch's formula. jax.nn.gelu goes by erfc, which does not cancel in the left tail: not the same arithmetic.
        return 0.5 * x * (1 + jax.lax.erf(x / math.sqrt(2.0))) + jnp.tanh(x) * jnp.exp(-x * x)

    def torch_gelu(x):
        return functional.gelu(x) + torch.tanh(x) * torch.exp(-x * x)

    operations: dict[str, tuple[Callable, Callable]] = {
        "scalar": (lambda p: jnp.sin(p["x"]) * jnp.exp(p["x"]), lambda p: torch.sin(p["x"]) * torch.exp(p["x"])),
        "mean": (lambda p: jnp.mean(jnp.square(p["x"])), lambda p: torch.mean(torch.square(p["x"]))),
        "elementwise": (lambda p: gelu(p["x"]), lambda p: torch_gelu(p["x"])),
        "softmax": (lambda p: jax.nn.softmax(p["x"], -1), lambda p: torch.softmax(p["x"], -1)),
        "layer": (lambda p: norm(p["x"]), lambda p: torch_norm(p["x"])),
        "matmul": (lambda p: p["x"] @ p["y"], lambda p: p["x"] @ p["y"]),
        "logsumexp": (lambda p: jax.nn.logsumexp(p["x"], -1), lambda p: torch.logsumexp(p["x"], -1)),
        "look-up": (lambda p: jnp.take(p["x"], ids, 0), lambda p: p["x"][torch.from_numpy(ids.astype(np.int64))]),
        "running": (lambda p: jnp.cumsum(p["x"], -1), lambda p: torch.cumsum(p["x"], -1)),
    }
    ours, theirs = operations[name.split(" ")[0]]
    out = jax.eval_shape(ours, {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in weights.items()})
    cotangent = rng.standard_normal(out.shape).astype(np.float32)
    pair = pair_of(
        lambda p, c: ours(p),
        lambda p, c: theirs(p),
        weights,
        torch_shapes={k: v.shape for k, v in weights.items()},
        loss=(lambda o, c: jnp.sum(o * c), lambda o, c: torch.sum(o * c)),
        name=name,
    )
    return pair, weights, (cotangent,)
