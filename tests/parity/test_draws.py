"""One step for all draws is the same step for each of them."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from parity.draws import SHIFTED, OverDraws, with_draws
from parity.primitives import ELEMENTWISE, IMPLEMENTATIONS

COUNT = 3
A, B, C = (2, 3, 4), (2, 3, 4), (4, 5)

FUNCTIONS = {
    "broadcast_in_dim": (lambda x: lax.broadcast_in_dim(x, (5, 2, 3, 4), (1, 2, 3)), [A]),
    "concatenate": (lambda x, y: lax.concatenate([x, y], 1), [A, B]),
    "cumlogsumexp": (lambda x: lax.cumlogsumexp(x, 1), [A]),
    "cummax": (lambda x: lax.cummax(x, 2, reverse=True), [A]),
    "cummin": (lambda x: lax.cummin(x, 0), [A]),
    "cumprod": (lambda x: lax.cumprod(x, 1), [A]),
    "cumsum": (lambda x: lax.cumsum(x, 2), [A]),
    "reduce_max": (lambda x: lax.reduce_max_p.bind(x, axes=(1,), out_sharding=None), [A]),
    "reduce_min": (lambda x: jnp.min(x, axis=(0, 2)), [A]),
    "reduce_prod": (lambda x: jnp.prod(x, axis=2), [A]),
    "reduce_sum": (lambda x: jnp.sum(x), [A]),
    "reshape": (lambda x: lax.reshape(x, (6, 4)), [A]),
    "rev": (lambda x: lax.rev(x, (0, 2)), [A]),
    "slice": (lambda x: lax.slice(x, (0, 1, 0), (2, 3, 4), (1, 1, 2)), [A]),
    "split": (lambda x: lax.split(x, (1, 3), axis=2), [A]),
    "stack": (lambda x, y: jnp.stack([x, y], 1), [A, B]),
    "tile": (lambda x: jnp.tile(x, (2, 1, 3)), [A]),
    "transpose": (lambda x: lax.transpose(x, (2, 0, 1)), [A]),
    "unstack": (lambda x: jnp.unstack(x, axis=1), [A]),
    "squeeze": (lambda x: lax.squeeze(x, (1,)), [(2, 1, 4)]),
    "dot_general": (lambda x, y: lax.dot_general(x, y, (((2,), (0,)), ((), ()))), [A, C]),
    "dot_general, batched": (lambda x, y: lax.dot_general(x, y, (((2,), (2,)), ((0,), (0,)))), [A, B]),
    "dot_general, batch inside": (lambda x, y: lax.dot_general(x, y, (((0,), (0,)), ((2,), (2,)))), [A, B]),
    "a scalar beside an array": (lambda x, y: lax.clamp(x, y, 2.0), [(), A]),
    "gather": (lambda x: x[:, jnp.array([2, 0, 2])], [A]),
    "scatter-add": (lambda x, y: x.at[jnp.array([1, 1])].add(y), [A, B]),
    "dynamic_slice": (lambda x: lax.dynamic_slice(x, (0, 1, 1), (2, 2, 2)), [A]),
    "fft": (lambda x: jnp.fft.irfft(jnp.fft.rfft(x), n=6), [A]),
    "conv_general_dilated": (
        lambda x, w: lax.conv_general_dilated(x, w, (2,), ((1, 1),), dimension_numbers=("NWC", "WIO", "NWC")),
        [(2, 5, 3), (3, 3, 4)],
    ),
    "conv_general_dilated, batch inside": (
        lambda x, w: lax.conv_general_dilated(x, w, (1,), ((1, 2),), dimension_numbers=("CWN", "IWO", "WNC")),
        [(3, 5, 2), (3, 3, 4)],
    ),
    "conv_general_dilated, groups of the batch": (
        lambda x, w: lax.conv_general_dilated(
            x, w, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), batch_group_count=2
        ),
        [(4, 5, 3), (3, 3, 4)],
    ),
    "select_n": (lambda x, y: lax.select_n(jnp.arange(4) < 2, x, y), [(4,), (4,)]),
}


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        inner = eqn.params.get("jaxpr")
        if inner is not None:
            yield from equations(getattr(inner, "jaxpr", inner))
        else:
            yield eqn


@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_draws_at_once(name: str) -> None:
    fn, shapes = FUNCTIONS[name]
    rng = np.random.default_rng(0)
    looked_at = 0
    for eqn in equations(jax.make_jaxpr(fn)(*(jnp.ones(s) for s in shapes)).jaxpr):
        evaluate = IMPLEMENTATIONS.get(eqn.primitive.name)
        kinds = [np.dtype(v.aval.dtype).kind for v in eqn.invars]
        if evaluate is None or not {*kinds} <= {"f", "i", "b"} or "f" not in kinds:
            continue
        looked_at += 1
        at_once = OverDraws(eqn, evaluate)
        plain = [np.zeros(v.aval.shape, v.aval.dtype) if k != "f" else None for v, k in zip(eqn.invars, kinds)]
        floats = [i for i, k in enumerate(kinds) if k == "f"]
        for drawn in itertools.product((True, False), repeat=len(floats)):
            inputs = list(plain)
            for i, has in zip(floats, drawn):
                inputs[i] = rng.standard_normal((COUNT, *eqn.invars[i].aval.shape)[0 if has else 1 :])
            found = at_once(inputs)
            singles = []
            for draw in range(COUNT):
                own = [x[draw] if x.ndim > len(v.aval.shape) else x for x, v in zip(inputs, eqn.invars)]
                singles.append(evaluate(eqn, own))
            single = isinstance(found, np.ndarray) or np.isscalar(found)
            columns = [singles] if single else list(zip(*singles))
            for result, column, var in zip([found] if single else found, columns, eqn.outvars):
                result = with_draws(np.asarray(result), len(var.aval.shape), COUNT)
                assert result.shape == (COUNT, *var.aval.shape)
                # BLAS may add in another order for another shape: 4 terms.
                bound = 4 * np.finfo(np.float64).eps * np.abs(np.stack(column)).max()
                assert np.abs(result - np.stack(column)).max() <= bound
    assert looked_at


def test_every_shifted_primitive_is_tried() -> None:
    assert {*SHIFTED} <= {*FUNCTIONS}
    assert not {*SHIFTED} & ELEMENTWISE
