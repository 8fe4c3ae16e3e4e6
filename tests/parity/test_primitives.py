"""parity.primitives: every value is JAX's own, and every rule's unit is the size of the errors that kernels make."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core.primitives as jp
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax
from jax._src import ad_util  # add_any has no public name
from jax.ad_checkpoint import checkpoint_name

from parity.errors import CannotLook
from parity.noise import measure_noise
from parity.precision import unit_roundoff
from parity.primitives import DISCRETE, IMPLEMENTATIONS, RULES, by_jax

SEED = 7
rng = np.random.default_rng(SEED)
CALLS = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
ULPS = 32.0
"""How many units two float64 implementations of one primitive may lie apart: libraries differ by a few ulps."""


def is_key(x: Any) -> bool:
    return "key<" in str(getattr(x, "dtype", ""))


def widened(x: Any) -> Any:
    if is_key(x):
        return x
    x = np.asarray(x)
    return x.astype({"f": np.float64, "c": np.complex128}.get(x.dtype.kind, x.dtype))


def evaluate(fn: Callable, args: Any, precision: str) -> tuple[list[Any], dict[str, Any]]:
    """`fn(*args)` by the tables, traced at `precision`; and the variance of each primitive's rounding by its rule."""
    args = jax.tree.map(lambda x: x if is_key(x) else np.asarray(x), args)
    with jax.enable_x64(precision == "float64"):
        closed = jax.make_jaxpr(fn)(*(jax.tree.map(widened, args) if precision == "float64" else args))
    variances: dict[str, Any] = {}

    def run(jaxpr, consts, values):
        env = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, values))
        read = lambda v: widened(v.val) if hasattr(v, "val") else env[v]  # noqa: E731
        for eqn in jaxpr.eqns:
            inputs, name = [read(v) for v in eqn.invars], eqn.primitive.name
            if name in CALLS:
                inner = eqn.params[CALLS[name]]
                out = run(inner.jaxpr, [widened(c) for c in inner.consts], inputs)
            elif name == "convert_element_type":
                target = eqn.params["new_dtype"]
                out = [inputs[0] if jnp.issubdtype(target, np.floating) else inputs[0].astype(target)]
            else:
                implementation = IMPLEMENTATIONS.get(name)
                out = implementation(eqn, inputs) if implementation else by_jax(eqn, *inputs)
                out = list(out) if isinstance(out, (list, tuple)) else [out]
                out = [o if is_key(o) else np.asarray(o) for o in out]
                rule = RULES[name]
                variances[name] = None if rule is None else rule(eqn, inputs, out)
            env.update(zip(eqn.outvars, out))
        return [read(v) for v in jaxpr.outvars]

    with np.errstate(all="ignore"):
        values = run(
            closed.jaxpr, [widened(c) for c in closed.consts], [widened(a) for a in jax.tree.leaves(tuple(args))]
        )
    return values, variances


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def uniform(low: float, high: float, size: int = 2048) -> np.ndarray:
    return rng.uniform(low, high, size).astype(np.float32)


def logarithmic(low: float, high: float, size: int = 2048) -> np.ndarray:
    return np.exp(rng.uniform(math.log(low), math.log(high), size)).astype(np.float32)


def integers(low: int, high: int, *shape: int, dtype=np.int32) -> np.ndarray:
    return rng.integers(low, high, shape).astype(dtype)


# ------------------------------------------------------------------------------------------------ values

A, B, C = normal(3, 4), normal(3, 4), normal(4, 5)
SPECIAL = np.array([0.0, -0.0, 1.0, -1.5, 2.5, 3.5, -2.5, np.inf, -np.inf, np.nan], np.float32)
I, J = integers(-20, 20, 3, 4), integers(-5, 6, 3, 4)  # J holds zeros: integer division by zero is defined in XLA
UNSIGNED = integers(0, 2**32, 3, 4, dtype=np.uint32)
YES, NO = A > 0, B > 0
KEY = jax.random.key(3)
Z = (normal(3, 4) + 1j * normal(3, 4)).astype(np.complex64)
FULL = {"window_dimensions": (1, 2, 3), "window_strides": (1, 2, 1), "padding": ((0, 0), (1, 0), (1, 1))}
WINDOW = {**FULL, "base_dilation": (1, 1, 1), "window_dilation": (1, 1, 2)}
IMAGE = normal(2, 7, 8)


def bound(primitive: str, **params: Any) -> Callable:
    def call(*args):
        return (getattr(jp, f"{primitive}_p", None) or getattr(ad_util, f"{primitive}_p")).bind(*args, **params)

    return call


def gathers() -> list:
    rows = np.array([0, -1, 2, 7, 3, -9, 3], np.int32)  # negative, out of bounds on both sides, twice the same
    x = normal(5, 6)
    along = integers(0, 5, 3, 6)
    cases = [((lambda x, i, m=mode: x.at[i].get(mode=m)), x, rows) for mode in ("fill", "clip")]
    cases += [((lambda x, i: x.at[i].get(mode="fill", fill_value=-1.0)), x, rows)]
    cases += [((lambda x, i: x.at[i].get(mode="fill")), integers(0, 9, 5, 6, dtype=kind), rows) for kind in "ibIB"]
    cases += [((lambda x, i: x.at[i].get(mode="fill")), x > 0, rows)]
    cases += [(lambda x, i: jnp.take(x, i, axis=0), x, integers(0, 5, 2, 3))]  # an embedding look-up
    cases += [(lambda x, i: jnp.take(x, i, axis=1), x, integers(0, 6, 2, 3))]
    cases += [(lambda x, i: jnp.take_along_axis(x, i, axis=0), x, along)]
    cases += [(lambda x, i, j: x[i, 1:3, j], normal(4, 5, 6), integers(0, 4, 3), integers(0, 6, 3))]
    cases += [(jax.vmap(lambda x, i: x[i], (None, 0)), x, np.array([2, -1, 4], np.int32))]
    cases += [(jax.vmap(lambda x, i: x[i]), normal(4, 5, 3), integers(0, 5, 4, 2))]  # operand_batching_dims
    cases += [(jax.vmap(lambda x, i: lax.dynamic_slice(x, (i, i), (2, 3))), normal(4, 5, 6), integers(-2, 7, 4))]
    return cases


def scatters(method: str) -> list:
    rows = np.array([0, 3, 3, 9, -8, 1], np.int32)
    x = normal(5, 4)
    call = lambda x, i, u, **kw: getattr(x.at[i], method)(u, **kw)  # noqa: E731
    if method == "set":  # which of two writes wins is undefined
        rows = np.array([0, 3, 2, 9, -8, 1], np.int32)
    cases = [((lambda x, i, u, m=mode: call(x, i, u, mode=m)), x, rows, normal(6, 4)) for mode in ("drop", "clip")]
    if method == "set":
        cases = cases[:1]
    cases += [(lambda x, i, u: call(x, (slice(None), i), u), x, np.array([2, 0], np.int32), normal(5, 2))]
    cases += [(jax.vmap(call), normal(3, 5, 4), np.array([[1, 2], [0, 4], [3, 0]], np.int32), normal(3, 2, 4))]
    cases += [(call, integers(0, 9, 5, 4), np.array([4, 1], np.int32), integers(0, 9, 2, 4))]
    return cases


def along(operation: Callable) -> list:
    x = normal(3, 5, 2)
    return [(lambda x, r=reverse: operation(x, axis=1, reverse=r), x) for reverse in (False, True)]


def pads() -> list:
    configs = (((1, 2, 0), (0, 3, 2)), ((-1, 2, 1), (3, -2, 1)), ((-1, -1, 0), (0, -3, 2)), ((0, 0, 0), (0, 0, 0)))
    cases = [((lambda x, c=config: lax.pad(x, jnp.array(7, x.dtype), c)), A) for config in configs]
    return [*cases, ((lambda x: lax.pad(x, jnp.array(1, x.dtype), ((1, 1, 2),))), np.zeros(0, np.float32))]


def dots() -> list:
    numbers = [
        ((((1,), (0,)), ((), ())), (3, 4), (4, 5)),
        ((((2,), (1,)), ((0,), (0,))), (2, 3, 4), (2, 4, 5)),
        ((((1,), (3,)), ((3, 0), (0, 2))), (2, 3, 4, 5), (5, 6, 2, 3)),
        ((((0, 2), (1, 0)), ((), ())), (3, 2, 4), (4, 3, 2)),
        ((((), ()), ((), ())), (2,), (3,)),
        ((((0,), (0,)), ((), ())), (4,), (4,)),
    ]
    dot = lambda d: lambda a, b: lax.dot_general(a, b, d)  # noqa: E731
    return [(dot(d), normal(*a), normal(*b)) for d, a, b in numbers] + [
        (dot(numbers[0][0]), integers(-9, 9, 3, 4), integers(-9, 9, 4, 5)),
        (dot(numbers[0][0]), Z, Z.T.copy()),
        ((lambda a, b: lax.dot(a, b, preferred_element_type=a.dtype)), normal(3, 4), normal(4, 5)),
    ]


def convolutions() -> list:
    def conv(strides, padding, layout, **kw):
        return lambda x, w: lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=layout, **kw)

    nchw, nhwc = ("NCHW", "OIHW", "NCHW"), ("NHWC", "HWIO", "NHWC")
    return [
        (conv((1, 1), "SAME", nchw), normal(2, 3, 7, 5), normal(4, 3, 3, 2)),
        (conv((2, 1), ((1, 0), (2, 2)), nhwc, rhs_dilation=(2, 1)), normal(2, 7, 5, 3), normal(3, 2, 3, 4)),
        (conv((1, 1), "VALID", nchw, feature_group_count=2), normal(2, 4, 7, 5), normal(6, 2, 3, 3)),
        (conv((1, 1), ((2, 2), (1, 1)), nchw, lhs_dilation=(2, 2)), normal(1, 2, 4, 4), normal(3, 2, 3, 3)),
        (conv((2,), "SAME", ("NWC", "WIO", "NWC")), normal(2, 9, 3), normal(3, 3, 4)),
        (conv((1, 2), ((-1, -2), (-3, 2)), nhwc, lhs_dilation=(2, 3)), normal(2, 5, 4, 3), normal(2, 2, 3, 4)),
        (conv((1, 1), ((-2, 0), (0, -1)), nchw, lhs_dilation=(3, 2)), normal(1, 2, 3, 3), normal(3, 2, 2, 2)),
        (conv((1, 1), "VALID", ("CHWN", "IHWO", "HWNC"), batch_group_count=2), normal(3, 5, 6, 4), normal(3, 2, 3, 6)),
        (conv((2,), ((-2, -1),), ("NWC", "WIO", "NWC"), lhs_dilation=(3,)), normal(2, 3, 3), normal(3, 3, 4)),
    ]


def ffts() -> list:
    return [
        (jnp.fft.fft, Z),
        (jnp.fft.ifft, Z),
        (jnp.fft.rfft, normal(3, 9)),
        ((lambda z: jnp.fft.irfft(z, n=7)), Z),
        (jnp.fft.fft2, Z),
    ]


def elementwise(fn: Callable, *inputs: np.ndarray) -> list:
    return [(fn, *inputs)]


def reduced(fn: Callable, x: np.ndarray = A) -> list:
    return [(lambda x, a=axes: fn(x, a), x) for axes in ((0,), (1,), (0, 1))]


def shifts(fn: Callable) -> list:
    by = np.array([0, 1, 31, 32, 40, 5], np.int32)
    return [(fn, np.array([-7, 5, -1, 9, 3, -(2**31)], np.int32), by), (fn, by.astype(np.uint32), by.astype(np.uint32))]


def ties_broken() -> list:
    x = np.array([[3, 1, 3, 2, 3], [0, 0, 0, 0, 0]], np.float32)
    return [(lambda x: lax.argmax(x, 1, np.int32), x), (lambda x: lax.argmax(x, 0, np.int32), x)]


UNIT, POSITIVE = uniform(-0.95, 0.95, 40), logarithmic(0.1, 10, 40)
WIDE = uniform(-6, 6, 40)

CASES: dict[str, list] = {
    # movement and selection
    "reshape": [((lambda x: x.reshape(2, 6)), A), ((lambda x: x.reshape(())), np.ones((1, 1), np.float32))],
    "transpose": [((lambda x: lax.transpose(x, (2, 0, 1))), normal(2, 3, 4))],
    "squeeze": [((lambda x: lax.squeeze(x, (0, 2))), normal(1, 3, 1))],
    "broadcast_in_dim": [((lambda x: lax.broadcast_in_dim(x, (2, 3, 5, 4), (1, 3))), A)],
    "concatenate": [((lambda a, b: lax.concatenate([a, b, a], 1)), A, normal(3, 2))],
    "stack": [((lambda a, b: jnp.stack([a, b], 1)), A, B)],
    "unstack": [((lambda x: list(jnp.unstack(x, axis=1))), A)],
    "tile": [((lambda x: jnp.tile(x, (2, 3))), A), ((lambda x: jnp.tile(x, (2, 1, 3))), A)],
    "split": [((lambda x: lax.split(x, (1, 0, 3), axis=1)), A)],
    "slice": [((lambda x: lax.slice(x, (0, 1), (3, 4), (2, 2))), A), ((lambda x: lax.slice(x, (1, 1), (1, 4))), A)],
    "rev": [((lambda x: lax.rev(x, (0, 2))), normal(2, 3, 4))],
    "pad": pads(),
    "dynamic_slice": [
        ((lambda x, i, j: lax.dynamic_slice(x, (i, j), (2, 3))), normal(4, 5), np.int32(i), np.int32(j))
        for i, j in ((0, 1), (9, -7), (-1, 3))
    ],
    "dynamic_update_slice": [
        (lambda x, u, i, j: lax.dynamic_update_slice(x, u, (i, j)), normal(4, 5), A[:2, :3], np.int32(i), np.int32(j))
        for i, j in ((0, 1), (9, -7), (-1, 3))
    ],
    "gather": gathers(),
    "scatter": scatters("set"),
    "scatter-add": scatters("add"),
    "scatter-sub": [(lambda x, i, u: x.at[i].subtract(u), normal(5, 4), np.array([0, 3, 3, 9]), normal(4, 4))],
    "scatter-mul": scatters("mul"),
    "scatter-min": scatters("min"),
    "scatter-max": scatters("max"),
    "select_n": [
        (lax.select_n, YES, A, B),
        (lax.select_n, np.asarray(True), A, B),
        (lax.select_n, np.abs(I) % 3, A, B, A + 1),
        (lax.select_n, np.int32(2), A, B, A + 1),
    ],
    "clamp": [(lax.clamp, np.float32(-0.5), A, np.float32(0.5)), (lax.clamp, np.float32(-1), SPECIAL, np.float32(1))],
    "copy": [(bound("copy"), A)],
    "device_put": [(jax.device_put, A)],
    "stop_gradient": [(bound("stop_gradient"), A)] if hasattr(jp, "stop_gradient_p") else [],
    "name": [((lambda x: checkpoint_name(x, "tap")), A)],
    "optimization_barrier": [(lax.optimization_barrier, (A, B))],
    "iota": [
        ((lambda x, k=k: x + lax.broadcasted_iota(x.dtype if k else np.int32, (3, 4), k).astype(x.dtype)), A)
        for k in (0, 1)
    ],
    "empty": [((lambda x: 0 * lax.empty((3, 4), x.dtype) + x), A)],
    "bitcast_convert_type": [
        ((lambda x: lax.bitcast_convert_type(x.astype(np.float32), np.int32)), A),
        ((lambda x: lax.bitcast_convert_type(x, np.float32)), integers(0, 2**30, 5)),
    ],
    # comparison and counting
    **{
        name: [(getattr(lax, name), *pair) for pair in ((A, B), (SPECIAL, SPECIAL[::-1].copy()), (I, J))]
        for name in ("eq", "ne", "lt", "le", "gt", "ge", "max", "min")
    },
    "eq_to": [(bound("eq_to"), A, B), (bound("eq_to"), A, A)],
    **{
        name: [(getattr(lax, f"bitwise_{name}"), I, J), (getattr(lax, f"bitwise_{name}"), YES, NO)]
        for name in ("and", "or", "xor")
    },
    "not": [(lax.bitwise_not, I), (lax.bitwise_not, YES)],
    "is_finite": [(lax.is_finite, SPECIAL)],
    "sign": [(lax.sign, SPECIAL), (lax.sign, I)],
    "floor": [(lax.floor, SPECIAL)],
    "ceil": [(lax.ceil, SPECIAL)],
    "round": [((lambda x, m=m: lax.round(x, m)), SPECIAL) for m in lax.RoundingMethod],
    "neg": [(lax.neg, SPECIAL), (lax.neg, I)],
    "rem": [
        (lax.rem, *pair)
        for pair in ((WIDE, UNIT), (SPECIAL, np.full(10, 0.75, np.float32)), (I, J), (UNSIGNED, UNSIGNED // 3))
    ],
    "shift_left": shifts(lax.shift_left),
    "shift_right_logical": shifts(lax.shift_right_logical),
    "shift_right_arithmetic": shifts(lax.shift_right_arithmetic),
    "clz": [(lax.clz, np.abs(I))],
    "population_count": [(lax.population_count, I)],
    "reduce_max": reduced(lambda x, a: bound("reduce_max", axes=a, out_sharding=None)(x)),
    "reduce_min": reduced(lambda x, a: bound("reduce_min", axes=a, out_sharding=None)(x)),
    "reduce_and": reduced(lambda x, a: lax.reduce_and(x, a), YES),
    "reduce_or": reduced(lambda x, a: lax.reduce_or(x, a), YES),
    "reduce_xor": reduced(lambda x, a: lax.reduce_xor(x, a), I),
    "argmax": [*ties_broken(), (lambda x: lax.argmax(x, 0, np.int32), SPECIAL)],
    "argmin": [((lambda x: lax.argmin(x, 1, np.int32)), np.array([[3, 1, 1], [0, 0, 0]], np.float32))],
    "cummax": along(lax.cummax),
    "cummin": along(lax.cummin),
    "reduce_window_max": [(bound("reduce_window_max", **WINDOW), IMAGE)],
    "reduce_window_min": [(bound("reduce_window_min", **WINDOW), IMAGE)],
    "select_and_gather_add": [
        (bound("select_and_gather_add", select_prim=lax.ge_p, **WINDOW), normal(2, 7, 8), normal(2, 7, 8))
    ],
    # random bits: counted, never rounded
    "random_seed": [((lambda i: jax.random.key_data(jax.random.key(i))), np.int32(3))],
    "random_wrap": [
        (lambda d: jax.random.bits(jax.random.wrap_key_data(d), (4,), np.uint32), np.array([1, 2], np.uint32))
    ],
    "random_unwrap": [(jax.random.key_data, KEY)],
    "random_bits": [((lambda k: jax.random.bits(k, (5,), np.uint32)), KEY)],
    "random_fold_in": [((lambda k, i: jax.random.key_data(jax.random.fold_in(k, i))), KEY, np.int32(5))],
    "random_split": [((lambda k: jax.random.key_data(jax.random.split(k, 3))), KEY)],
    "random_clone": [((lambda k: jax.random.key_data(jax.random.clone(k))), KEY)],
    "threefry2x32": [(lambda a: list(bound("threefry2x32")(a, a, a, a)), np.array([1, 2, 3], np.uint32))],
    # complex parts
    "complex": [(lax.complex, A, B)],
    "real": [(lax.real, Z)],
    "imag": [(lax.imag, Z)],
    "conj": [(jnp.conj, Z)],
    # arithmetic
    **{
        name: [(getattr(lax, name), *pair) for pair in ((A, B), (I, J), (Z, Z[::-1].copy()))]
        for name in ("add", "sub", "mul")
    },
    "add_any": [(bound("add_any"), A, B)],
    "div": [(lax.div, A, B), (lax.div, I, J), (lax.div, UNSIGNED, UNSIGNED // 3), (lax.div, Z, Z[::-1].copy())],
    "abs": [(lax.abs, SPECIAL), (lax.abs, I), (lax.abs, Z)],
    "square": [(lax.square, A), (lax.square, I)],
    "integer_pow": [
        *(((lambda x, y=y: lax.integer_pow(x, y)), A) for y in (0, 1, 2, 3, 7, -1, -3)),
        (lambda x: lax.integer_pow(x, 3), I),
    ],
    "pow": [(lax.pow, POSITIVE, WIDE), (lax.pow, A, I)],
    "nextafter": [(lambda x, y: jnp.nextafter(x, y), UNIT, WIDE)],
    **{
        name: elementwise(getattr(lax, name), x)
        for names, x in (
            ("sqrt rsqrt cbrt log digamma lgamma", POSITIVE),
            ("log1p asin acos atanh erf_inv", UNIT),
            ("exp exp2 expm1 tanh logistic erf erfc sin cos tan atan asinh sinh cosh", WIDE),
        )
        for name in names.split()
    },
    "acosh": elementwise(lax.acosh, POSITIVE + 1),
    "atan2": elementwise(lax.atan2, A, B),
    # sums
    "reduce_sum": reduced(lambda x, a: bound("reduce_sum", axes=a, out_sharding=None)(x)),
    "reduce_prod": reduced(lambda x, a: bound("reduce_prod", axes=a, out_sharding=None)(x)),
    "cumsum": along(lax.cumsum),
    "cumprod": along(lax.cumprod),
    "cumlogsumexp": along(lax.cumlogsumexp),
    "dot_general": dots(),
    "conv_general_dilated": convolutions(),
    "reduce_window_sum": [(bound("reduce_window_sum", **WINDOW), IMAGE)],
    "select_and_scatter_add": [
        (jax.grad(lambda x: (lax.reduce_window(x, -jnp.inf, lax.max, (2, 3), (1, 2), "VALID") ** 2).sum()), IMAGE[0])
    ],
    "fft": ffts(),
}  # fmt: skip
"""Of every primitive with a rule: functions and arguments, in float32, whose trace holds it."""


def test_every_primitive_with_a_rule_has_a_case():
    assert sorted(set(RULES) - {name for name, cases in CASES.items() if cases}) == []


@pytest.mark.parametrize("name", sorted(RULES))
def test_values_are_those_of_jax_in_float64(name: str):
    for fn, *args in CASES[name]:
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda x: x if is_key(x) else jnp.asarray(widened(x)), args)
            expected = [np.asarray(x) for x in jax.tree.leaves(jax.jit(fn)(*wide))]
        for precision in ("float64", "float32"):  # a trace of either type can be lifted
            values, variances = evaluate(fn, args, precision)
            assert name in variances, f"the case of {name} traces to {sorted(variances)}"
            assert len(values) == len(expected)
            rounds = any(v is not None and np.any(np.asarray(v) > 0) for v in variances.values())
            for ours, theirs in zip(values, expected):
                assert ours.shape == theirs.shape
                if name in ("nextafter", "bitcast_convert_type") and precision == "float32":
                    continue  # these read the bits of a type
                if not rounds or theirs.dtype.kind not in "fc":
                    np.testing.assert_array_equal(ours, theirs)
                    continue
                variance = variances[name] if RULES[name] is not None and np.shape(variances[name]) == ours.shape else 0
                unit = np.sqrt(variance) + np.abs(np.where(np.isfinite(theirs), theirs, 0))
                unit = ULPS * unit_roundoff("float64") * (unit + (np.abs(theirs).max() if name == "fft" else 0))
                same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
                with np.errstate(invalid="ignore"):
                    assert np.all(same | (np.abs(ours - theirs) <= unit))


def test_discrete_primitives_never_round():
    assert all(RULES[name] is None for name in DISCRETE)


def test_sort_and_top_k_break_ties_as_jax_does():
    x = np.array([[3, 1, 3, 2, 1, 3], [0, 0, -1, 5, 5, 0]], np.float32)
    tags = np.arange(12, dtype=np.int32).reshape(2, 6)
    cases = [
        (lambda x, t: lax.sort((x, t), dimension=1, num_keys=1), (x, tags)),
        (lambda x, t: lax.sort((x, t), dimension=0, num_keys=2), (x, tags)),
        (lambda x: lax.top_k(x, 4), (x,)),
        (lambda x: lax.top_k(x, 6), (x,)),
        (lambda x: jnp.argsort(x, axis=-1), (x,)),
        (lambda x: jnp.sort(x, axis=0, descending=True), (x,)),
    ]
    for fn, args in cases:
        for ours, theirs in zip(measure_noise(fn, args, "float32", draws=2).reference, jax.tree.leaves(fn(*args))):
            np.testing.assert_array_equal(ours, theirs)


def test_casts_to_integers_saturate_as_in_xla():
    x = np.array([1e30, -1e30, np.nan, 2.9, -2.9, np.inf], np.float32)
    (ours,) = measure_noise(lambda x: x.astype(np.int32), (x,), "float32", draws=2).reference
    np.testing.assert_array_equal(ours, jnp.asarray(x).astype(np.int32))


def test_random_numbers_are_those_of_the_working_precision():
    def fn(x):
        return x * jax.random.normal(jax.random.key(5), (4,), x.dtype)

    x = np.arange(1.0, 5.0, dtype=np.float32)
    model = measure_noise(fn, (x,), "float32", draws=2)
    assert np.all(np.abs(model.reference[0] - fn(x)) <= 16 * unit_roundoff("float32") * np.abs(model.reference[0]))


@pytest.mark.parametrize(
    ("name", "fn"),
    [
        ("bessel_i0e", lambda x: lax.bessel_i0e(x)),
        ("cholesky", lambda x: lax.linalg.cholesky(x @ x.T)),
        ("reduce_precision", None),
        ("scatter", lambda x: x.at[1].apply(jnp.sin)),
        ("reduce_window", lambda x: lax.reduce_window(x, 1.0, lax.mul, (2, 2), (1, 1), "VALID")),
    ],
)
def test_what_has_no_rule_is_named_with_its_line(name: str, fn):
    if fn is None:  # has a rule of its own: a cast
        assert np.any(measure_noise(lambda x: lax.reduce_precision(x, 8, 7), (A,), "float32", draws=2).sigma[0] > 0)
        return
    with pytest.raises(CannotLook, match=rf"{name}.*test_primitives\.py:\d+"):
        measure_noise(fn, (normal(4, 4),), "float32", draws=2)


# ------------------------------------------------------------------------------------------------ units


def torch_of(name: str) -> Callable | None:
    known = {"logistic": "sigmoid", "erf_inv": "erfinv"}
    return getattr(torch, known.get(name, name), None)


def signs(*shape: int) -> tuple[tuple[str, np.ndarray], ...]:
    """Sums depend on it: terms of zero mean, and terms that are all positive."""
    x = normal(*shape)
    return ("zero-mean", x), ("positive", np.abs(normal(*shape)))


def units() -> dict[str, tuple[Callable, Callable | None, tuple]]:
    """Label (the primitive first) -> (JAX, torch or None, float32 arguments)."""
    ranges = {
        "sqrt": [logarithmic(1e-3, 1e3)],
        "rsqrt": [logarithmic(1e-3, 1e3)],
        "cbrt": [logarithmic(1e-3, 1e3)],
        "square": [normal(2048)],
        "exp": [uniform(-1, 1), uniform(-20, 20), uniform(-80, 0)],
        "exp2": [uniform(-1, 1), uniform(-20, 20)],
        "log": [logarithmic(1e-3, 1e3), uniform(0.5, 2), uniform(0.99, 1.01)],
        "log1p": [uniform(-0.5, 2), uniform(-0.01, 0.01), logarithmic(1e-3, 1e3)],
        "expm1": [uniform(-1, 1), uniform(-0.01, 0.01), uniform(-10, 10)],
        "tanh": [uniform(-1, 1), uniform(-4, 4), uniform(-0.01, 0.01)],
        "logistic": [uniform(-1, 1), uniform(-8, 8), uniform(-30, 0)],
        "erf": [uniform(-1, 1), uniform(-3, 3), uniform(-0.01, 0.01)],
        "erfc": [uniform(-1, 1), uniform(-2, 3)],
        "erf_inv": [uniform(-0.9, 0.9), uniform(-0.01, 0.01), uniform(0.9, 0.999)],
        "sin": [uniform(-3, 3), uniform(0, 1000), uniform(-0.1, 0.1)],
        "cos": [uniform(-3, 3), uniform(0, 1000), uniform(-0.1, 0.1)],
        "tan": [uniform(-1.5, 1.5), uniform(0, 100)],
        "asin": [uniform(-0.99, 0.99), uniform(-0.1, 0.1)],
        "acos": [uniform(-0.99, 0.99)],
        "atan": [uniform(-5, 5), uniform(-0.1, 0.1)],
        "sinh": [uniform(-3, 3), uniform(-0.1, 0.1)],
        "cosh": [uniform(-3, 3)],
        "asinh": [uniform(-5, 5), uniform(-0.1, 0.1)],
        "acosh": [uniform(1.2, 10), uniform(1.001, 1.1)],
        "atanh": [uniform(-0.95, 0.95), uniform(-0.1, 0.1)],
        "lgamma": [uniform(0.1, 10), uniform(10, 100), uniform(0.9, 1.1)],
        "digamma": [uniform(0.1, 10), uniform(10, 100)],
    }
    table: dict[str, Any] = {}
    for name, inputs in ranges.items():
        for x in inputs:
            table[f"{name} {x.min():.3g}..{x.max():.3g}"] = (getattr(lax, name), torch_of(name), (x,))
    two = (normal(2048), normal(2048))
    for name in ("add", "sub", "mul", "div", "atan2"):
        table[name] = (getattr(lax, name), torch_of(name), two)
    table["add_any"] = (bound("add_any"), torch.add, two)
    table["nextafter"] = (jnp.nextafter, torch.nextafter, two)
    complexes = tuple((normal(2048) + 1j * normal(2048)).astype(np.complex64) for _ in "ab")
    for name in ("add", "mul", "div"):
        table[f"{name} complex"] = (getattr(lax, name), torch_of(name), complexes)
    table["abs complex"] = (lax.abs, torch.abs, complexes[:1])
    table["pow"] = (lax.pow, torch.pow, (logarithmic(0.1, 10), uniform(-3, 3)))
    table["pow theta"] = (lax.pow, torch.pow, (np.full(2048, 10000, np.float32), uniform(-1, 0)))
    table["pow beta"] = (lax.pow, torch.pow, (np.full(2048, 0.999, np.float32), np.arange(1, 2049, dtype=np.float32)))
    for y in (2, 3, 4, 5, 7, 8, -1, -2, -3):
        x = (normal(2048) + 2) * np.sign(normal(2048))
        table[f"integer_pow {y}"] = ((lambda x, y=y: lax.integer_pow(x, y)), (lambda x, y=y: torch.pow(x, y)), (x,))
    nchw = ("NCHW", "OIHW", "NCHW")
    for k in (8, 128, 256):
        last, first = (
            bound("reduce_sum", axes=(1,), out_sharding=None),
            bound("reduce_sum", axes=(0,), out_sharding=None),
        )
        product = bound("reduce_prod", axes=(1,), out_sharding=None)
        window = {"window_dimensions": (1, k), "window_strides": (1, 1), "padding": ((0, 0),) * 2}
        windows = bound("reduce_window_sum", **window, base_dilation=(1, 1), window_dilation=(1, 1))
        pooled = lambda x, k=k: torch.nn.functional.avg_pool1d(x[:, None], k, 1)[:, 0] * k  # noqa: E731
        rows = rng.permutation(np.repeat(np.arange(16, dtype=np.int32), k))
        pick = {"reduce_sum": signs(256, k), "cumsum": signs(64, k), "scatter-add": signs(16 * k, 8)}
        for sign, x in pick["reduce_sum"]:
            table[f"reduce_sum last {k} {sign}"] = (last, lambda x: x.sum(1), (x,))
            table[f"reduce_sum first {k} {sign}"] = (first, lambda x: x.sum(0), (x.T.copy(),))
        for sign, x in pick["cumsum"]:
            table[f"cumsum {k} {sign}"] = (lambda x: lax.cumsum(x, axis=1), lambda x: x.cumsum(1), (x,))
            table[f"cumlogsumexp {k} {sign}"] = (
                (lambda x: lax.cumlogsumexp(x, axis=1)), (lambda x: torch.logcumsumexp(x, 1)), (x,),
            )  # fmt: skip
        for sign, x in pick["scatter-add"]:
            grow = lambda x, i: torch.zeros(16, 8).index_add_(0, i.long(), x)  # noqa: E731
            table[f"scatter-add {k} {sign}"] = (
                (lambda x, i: jnp.zeros((16, 8), x.dtype).at[i].add(x)),
                grow,
                (x, rows),
            )
            shrink = lambda x, i: torch.zeros(16, 8).index_add_(0, i.long(), x, alpha=-1)  # noqa: E731
            table[f"scatter-sub {k} {sign}"] = (
                (lambda x, i: jnp.zeros((16, 8), x.dtype).at[i].subtract(x)), shrink, (x, rows),
            )  # fmt: skip
        for sign, x in signs(8, k + 32):
            table[f"reduce_window_sum {k} {sign}"] = (windows, pooled, (x,))
        near_one = 1 + normal(64, k) / 10
        table[f"cumprod {k}"] = (lambda x: lax.cumprod(x, axis=1), lambda x: x.cumprod(1), (near_one,))
        table[f"reduce_prod {k}"] = (product, lambda x: x.prod(1), (1 + normal(512, k) / 10,))
        for (sign, a), (_, b) in zip(signs(48, k), signs(k, 40)):
            table[f"dot_general {k} {sign}"] = (lax.dot, torch.matmul, (a, b))
        for (sign, a), (_, b) in zip(signs(256, k), signs(256, k)):
            batched = (((1,), (1,)), ((0,), (0,)))
            table[f"dot_general batched {k} {sign}"] = (
                (lambda a, b, d=batched: lax.dot_general(a, b, d)),
                (lambda a, b: torch.einsum("bk,bk->b", a, b)),
                (a, b),
            )
        table[f"fft {k} rfft"] = (jnp.fft.rfft, torch.fft.rfft, (normal(32, k),))
        table[f"fft {k} fft"] = (
            jnp.fft.fft,
            torch.fft.fft,
            ((normal(32, k) + 1j * normal(32, k)).astype(np.complex64),),
        )
        half = (normal(32, k // 2 + 1) + 1j * normal(32, k // 2 + 1)).astype(np.complex64)
        table[f"fft {k} irfft"] = (jnp.fft.irfft, torch.fft.irfft, (half,))
    for depth, channels, size, groups in ((9, 8, 3, 8), (64, 64, 1, 1), (252, 28, 3, 1)):
        shapes = (2, channels, 12, 12), (8, channels // groups, size, size)
        for (sign, x), (_, w) in zip(*(signs(*shape) for shape in shapes)):
            table[f"conv_general_dilated {depth} {sign}"] = (
                (lambda x, w, g=groups: lax.conv_general_dilated(
                    x, w, (1, 1), "VALID", dimension_numbers=nchw, feature_group_count=g)),
                (lambda x, w, g=groups: torch.nn.functional.conv2d(x, w, groups=g)), (x, w),
            )  # fmt: skip
    spread = lambda x, i: jnp.ones((64,), x.dtype).at[i].mul(x)  # noqa: E731
    index = rng.permutation(np.repeat(np.arange(64, dtype=np.int32), 8))
    gather = lambda x, i: torch.ones(64).scatter_reduce_(0, i.long(), x, "prod")  # noqa: E731
    table["scatter-mul 8"] = (spread, gather, (1 + normal(512) / 10, index))
    overlap = lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 16), (1, 1), "VALID")  # noqa: E731
    image, upstream = normal(16, 300), normal(16, 285)
    image[:, ::10] += 9  # the same element is the largest of many windows

    def pooled_gradient(x, g):
        x = x[:, None].detach().requires_grad_()
        return torch.autograd.grad(torch.nn.functional.max_pool1d(x, 16, 1), x, g[:, None])[0][:, 0]

    table["select_and_scatter_add 16"] = (lambda x, g: jax.vjp(overlap, x)[1](g)[0], pooled_gradient, (image, upstream))
    return table


UNITS = units()

ACCURATE: dict[tuple[str, str], tuple[float, str]] = {
    ("jax", "reduce_sum"): (0.08, "sums vectors of lanes, then their lanes"),
    ("torch", "reduce_sum"): (0.1, "a cascade of blocks"),
    ("jax", "dot_general batched"): (0.1, "a fused product and sum, in vectors of lanes"),
    ("torch", "dot_general"): (0.2, "blocks of the contracted axis, for large K"),
    ("jax", "reduce_window_sum"): (0.08, "a wide window is summed as a tree"),
    ("torch", "cumsum"): (0.1, "accumulates float32 in float64 on the CPU"),
    ("torch", "cumprod"): (0.08, "accumulates float32 in float64 on the CPU"),
    ("jax", "cumlogsumexp"): (0.2, "an associative scan: a tree"),
    ("torch", "cumlogsumexp"): (0.1, "accumulates float32 in float64 on the CPU"),
    ("torch", "integer_pow"): (0.1, "pow to within an ulp, where repeated squaring rounds at each step"),
    ("torch", "exp2"): (0.2, "right to an ulp, where XLA's product in the exponent rounds"),
    ("torch", "lgamma"): (0.0, "right to an ulp even at its zeros"),
}  # fmt: skip
"""(framework, start of the label) -> the smallest z allowed, and why this kernel beats the textbook's unit."""


def test_every_rounding_primitive_has_a_unit_test():
    assert {name for name, rule in RULES.items() if rule is not None} == {label.split()[0] for label in UNITS}


@pytest.mark.parametrize("label", list(UNITS))
def test_errors_of_real_kernels_are_about_one_unit(label: str):
    jax_fn, torch_fn, args = UNITS[label]
    (reference,), variances = evaluate(jax_fn, args, "float32")
    sigma = np.broadcast_to(unit_roundoff("float32") * np.sqrt(variances[label.split()[0]]), reference.shape)
    live = sigma > 0
    assert live.any()

    def z(result) -> float:
        error = np.abs(np.asarray(result).astype(reference.dtype) - reference)
        assert not error[~live].any(), "an error where the rule says that nothing rounds"
        return float(np.sqrt(np.mean(np.square(error[live] / sigma[live]))))

    figures = {"jax": z(jax.jit(jax_fn)(*args))}
    if torch_fn is not None:
        figures["torch"] = z(torch_fn(*(torch.from_numpy(a) for a in args)).numpy())
    for framework, figure in figures.items():
        exempt = [low for (who, start), (low, _) in ACCURATE.items() if who == framework and label.startswith(start)]
        assert min(exempt, default=0.3) <= figure <= 2.0, f"{framework}: z = {figure:.3f}"
