"""parity.noise: the interpreted reference is JAX's own float64 value, and sigma is the size of real rounding errors."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from parity import noise
from parity.errors import CannotLook
from parity.noise import Tracer, measure_noise, trace
from parity.precision import unit_roundoff
from parity.verdict import THRESHOLDS

SIGMAS = 8.0
"""An error beyond this many noise units is no rounding error: a handful of elements, 16 draws behind each sigma."""
rng = np.random.default_rng(11)

EPS = float(np.finfo(np.float64).eps)
THREE_DIGITS = 1e-3
"""Sigma over u is the same from precision to precision to three digits: what the noise model promises."""


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def in_float64(fn, *args):
    with jax.enable_x64(True):
        wide = [np.asarray(a, np.float64) if np.asarray(a).dtype.kind == "f" else a for a in args]
        return [np.asarray(x, np.float64) for x in jax.tree.leaves(jax.jit(fn)(*wide))]


def layer_norm(x, fast: bool = False):
    mean = x.mean(-1, keepdims=True)
    variance = (x * x).mean(-1, keepdims=True) - mean * mean if fast else ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-5)


def softmax(x):
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@jax.custom_jvp
def by_jvp(x):
    return jnp.tanh(x)


@by_jvp.defjvp
def _(primals, tangents):
    return by_jvp(*primals), (1 - jnp.tanh(primals[0]) ** 2) * tangents[0]


@jax.custom_vjp
def by_vjp(x):
    return jnp.exp(x)


by_vjp.defvjp(lambda x: (jnp.exp(x), x), lambda x, g: (g * jnp.exp(x),))


def scanned(x):
    def step(carry, row):
        carry = jnp.tanh(carry + row)
        return carry, carry * row

    last, rows = lax.scan(step, jnp.zeros(x.shape[1:], x.dtype), x)
    _, back = lax.scan(step, last, x, reverse=True)
    return last, rows, back


def looped(x):
    return lax.while_loop(lambda s: s[0] < 4, lambda s: (s[0] + 1, jnp.sin(s[1]) + x), (jnp.int32(0), x))[1]


def halved(x):  # the number of steps depends on floats: the decisions are those of the reference
    return lax.while_loop(lambda y: y.sum() > 1, lambda y: y * 0.7, jnp.abs(x) + 1)


X, W = normal(5, 4), normal(4, 4)
PROGRAMS = {
    "jit": (jax.jit(lambda x, w: jax.jit(lambda a: a @ w)(x) + 1), X, W),
    "custom_jvp": (lambda x: by_jvp(x) * 2.5, X),
    "custom_jvp gradient": (jax.grad(lambda x: (by_jvp(x) ** 2).sum()), X),
    "custom_vjp": (by_vjp, X),
    "custom_vjp gradient": (jax.grad(lambda x: (by_vjp(x) ** 2).sum()), X),
    "library functions": (lambda x: (jax.nn.silu(x), jax.nn.softmax(x), jax.nn.gelu(x), jax.nn.logsumexp(x, -1)), X),
    "remat": (jax.grad(lambda x, w: jax.checkpoint(lambda a: jnp.sin(a @ w))(x).sum()), X, W),
    "scan": (scanned, X),
    "scan gradient": (jax.grad(lambda x: sum(y.sum() for y in scanned(x))), X),
    "scan of nothing": (lambda x: lax.scan(lambda c, r: (c + r.sum(), c), x.sum(), x[:0]), X),
    "while": (looped, X),
    "while on floats": (halved, X),
    "fori": (lambda x: lax.fori_loop(0, 3, lambda i, y: y * jnp.cos(y + i), x), X),
    "cond": (lambda x: lax.cond(x.sum() > 0, jnp.sin, lambda y: y * 3, x), X),
    "switch": (lambda x, i: lax.switch(i, [jnp.sin, jnp.cos, jnp.tanh], x), X, np.int32(7)),
    "vmap": (jax.vmap(lambda x, w: jax.vmap(jnp.dot, (None, 0))(x, w), (0, None)), X, W),
    "vmap of cond": (jax.vmap(lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.exp, x)), X),
    "gradient of gradient": (jax.grad(lambda x: (jax.grad(lambda y: jnp.tanh(y @ y.T).sum())(x) ** 2).sum()), X),
    "jacobian": (jax.jacfwd(lambda x: softmax(x)), X[0]),
    "nested results": (lambda x: {"b": (x * 1.1, None), "a": [x.sum()]}, X),
    "layer norm": (layer_norm, X + 3),
    "complex": (lambda x: jnp.abs(jnp.fft.fft(x) * jnp.exp(lax.complex(x * 0, x))), X),
}


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_the_reference_is_the_float64_value(name: str):
    fn, *args = PROGRAMS[name]
    model = measure_noise(fn, args, "float64")
    unit = unit_roundoff("float64")
    for ours, sigma, theirs in zip(model.reference, model.sigma, in_float64(fn, *args)):
        assert ours.shape == sigma.shape == theirs.shape
        assert np.all(np.abs(ours - theirs) <= SIGMAS * np.sqrt(2) * sigma * unit)
    assert len(model.reference) == len(in_float64(fn, *args))
    assert model.pins == ()
    assert not model.notes


FLOAT32 = {
    "layer norm": (layer_norm, normal(64, 96) + 2),
    "softmax": (softmax, normal(64, 40) * 4),
    "products": (lambda x, w: jnp.tanh(x @ w) @ w, normal(64, 48), normal(48, 48) / 7),
    "gradient": (jax.grad(lambda x, w: softmax(layer_norm(x) @ w)[:, 0].sum()), normal(64, 48), normal(48, 30)),
    "scan": (lambda x: scanned(x)[1], normal(30, 16)),
    "embedding": (lambda t, i: layer_norm(t[i]), normal(20, 32), rng.integers(0, 20, 50).astype(np.int32)),
    "rope": (
        lambda x, p: x * jnp.cos(p.astype(x.dtype)[:, None] * 10000.0 ** (-jnp.arange(8, dtype=x.dtype)[None] / 8)),
        normal(60, 8),
        np.arange(60, dtype=np.int32),
    ),
}


@pytest.mark.parametrize("name", list(FLOAT32))
def test_sigma_is_the_size_of_float32_errors(name: str):
    fn, *args = FLOAT32[name]
    model = measure_noise(fn, args, "float32")
    error = np.asarray(jax.jit(fn)(*args), np.float64) - model.reference[0]
    live = model.sigma[0] > 0
    assert not error[~live].any()
    z = rms(error[live] / (model.sigma[0][live] * unit_roundoff("float32")))
    assert 0.2 <= z <= THRESHOLDS.z, z


def test_sigma_scales_with_the_unit_roundoff(monkeypatch):
    fn, *args = FLOAT32["gradient"]
    wide, narrow = (measure_noise(fn, args, p) for p in ("float64", "float32"))
    np.testing.assert_array_equal(wide.reference[0], narrow.reference[0])
    assert np.allclose(wide.sigma[0], narrow.sigma[0], rtol=THREE_DIGITS, atol=0)
    assert wide.noise[0].dof == pytest.approx(narrow.noise[0].dof, rel=THREE_DIGITS)
    for amplitude in (2.0**-38, 2.0**-16):
        monkeypatch.setattr(noise, "AMPLITUDE", amplitude)
        other = measure_noise(fn, args, "float32")
        assert rms(other.sigma[0]) == pytest.approx(rms(narrow.sigma[0]), rel=THREE_DIGITS)


def test_only_a_program_in_one_precision_shares_its_draws():
    fn, *args = FLOAT32["products"]
    assert trace(fn, args, "float32").uniform
    assert trace(fn, args, "float64").uniform
    assert not trace(fn, args, "bfloat16").uniform  # its sums are wider than its numbers
    assert not trace(lambda x: x.astype(jnp.bfloat16), args[:1], "float32").uniform


# ------------------------------------------------------------------------------------------------ precisions


def test_bfloat16_products_are_summed_in_float32():
    a, b = (normal(32, 256).astype(jnp.bfloat16), normal(256, 24).astype(jnp.bfloat16))
    model = measure_noise(jnp.matmul, (a, b), "bfloat16")
    one_rounding = np.abs(model.reference[0]) / np.sqrt(3)
    assert rms(model.sigma[0]) == pytest.approx(rms(one_rounding), rel=0.05)
    error = np.asarray(jax.jit(jnp.matmul)(a, b)).astype(np.float64) - model.reference[0]
    assert 0.3 <= rms(error / (model.sigma[0] * unit_roundoff("bfloat16"))) <= 2


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_narrow_numbers_that_are_no_products_are_summed_as_they_are(precision):
    """The gradient of what was broadcast: XLA's CPU adds 156 numbers up in the narrow type, jnp.sum would not."""
    fn = jax.jit(lambda x: jax.lax.reduce_sum(x, (0, 1)))
    z = []
    for x in (1.7 + normal(32, 12, 13)).astype(precision):
        model = measure_noise(fn, (x,), precision)
        error = float(fn(x)) - model.reference[0]
        z.append(error / (model.sigma[0] * unit_roundoff(precision)))
    assert 0.3 <= rms(np.array(z)) <= 2


def test_a_narrowing_cast_brings_the_narrow_type_s_noise():
    x = normal(400)
    model = measure_noise(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), (x,), "float32")
    in_units = rms(model.sigma[0]) * unit_roundoff("float32") / (rms(x) * unit_roundoff("bfloat16"))
    assert in_units == pytest.approx(1 / np.sqrt(3), rel=0.05)
    exact = measure_noise(lambda x: x.astype(jnp.float32), (x,), "float32")
    assert not exact.sigma[0].any()


def test_an_integer_that_fits_becomes_a_float_exactly():
    counts = np.array([3, 2**24 + 1], np.int32)
    model = measure_noise(lambda n: n.astype(jnp.float32), (counts,), "float32")
    assert model.sigma[0][0] == 0
    assert model.sigma[0][1] > 0


def test_a_pin_is_named_by_its_line():
    model = measure_noise(lambda x: jnp.sin(x).astype(jnp.float32).astype(x.dtype) * 2, (normal(30) + 1.1,), "float64")
    assert len(model.pins) == 1
    assert re.search(r"test_noise\.py:\d+", model.pins[0])
    assert model.pinned is not None
    ratio = rms(model.pinned[0].sigma) / (rms(model.reference[0]) * unit_roundoff("float32"))
    assert ratio == pytest.approx(1 / np.sqrt(3), rel=0.2)
    assert rms(model.sigma[0]) < 10 * rms(model.reference[0])  # the pin is kept apart from the float64 noise


def test_constants_keep_their_float64_values():
    x = normal(6, 8) / 1000
    model = measure_noise(lambda x: x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5), (x,), "float32")
    wide = x.astype(np.float64)
    expected = wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(model.reference[0], expected, rtol=64 * EPS)
    angles = measure_noise(lambda p: 10000.0 ** (-p / 7), (np.arange(7, dtype=np.float32),), "float32")
    np.testing.assert_allclose(angles.reference[0], 10000.0 ** (-np.arange(7) / 7), rtol=64 * EPS)


def test_a_program_that_looks_at_its_precision_is_lifted_as_it_is():
    def fn(x):
        return jnp.sin(x) if x.dtype == np.float32 else jnp.cos(x) + 1

    x = normal(4)
    model = measure_noise(fn, (x,), "float32")
    assert any("float32 program" in note for note in model.notes)
    np.testing.assert_allclose(model.reference[0], np.sin(x.astype(np.float64)), rtol=64 * EPS)


# ------------------------------------------------------------------------------------------------ edges


def test_kappa_tells_a_bad_layer_norm_from_a_good_one():
    for offset in (0, 100, 10_000):
        x = normal(8, 64) + np.float32(offset)
        good, bad = (measure_noise(lambda x, f=f: layer_norm(x, f), (x,), "float32").noise[0] for f in (False, True))
        assert rms(good.sigma) / good.kappa < 10
    assert rms(bad.sigma) / bad.kappa > THRESHOLDS.unstable_ratio


def test_masks_of_minus_infinity_carry_no_noise():
    scores = normal(6, 6)
    mask = np.where(np.tri(6), 0, -np.inf).astype(np.float32)
    model = measure_noise(lambda s, m: (softmax(s + m), s + m), (scores, mask), "float32")
    probabilities, masked = model.noise
    assert np.all(np.isfinite(probabilities.sigma))
    assert not probabilities.sigma[mask < 0].any()
    assert np.all(probabilities.sigma[(mask == 0) & (np.arange(6)[:, None] > 0)] > 0)
    assert not masked.sigma[mask < 0].any()
    assert probabilities.kappa > 0  # the mask is an input: moving it must not turn the row into NaN
    assert masked.kappa > 0


def test_below_the_smallest_normal_number_errors_are_absolute():
    x = np.linspace(-100, -86, 50).astype(np.float32)
    model = measure_noise(jnp.exp, (x,), "float32")
    error = np.abs(np.asarray(jax.jit(jnp.exp)(x), np.float64) - model.reference[0])
    assert np.all(error <= SIGMAS * model.sigma[0] * unit_roundoff("float32"))
    assert np.all(model.sigma[0][x < -90] * unit_roundoff("float32") < np.finfo(np.float32).tiny * 4)


def test_exact_operations_leave_no_noise():
    x = normal(6, 6)
    model = measure_noise(
        lambda x: (jax.nn.relu(jnp.sin(x)), x * 0.0, x * 4.0, x.T[::-1], -x, x / 8, x.max()), (x,), "float32"
    )
    rectified, *exact = model.sigma
    assert np.array_equal(rectified > 0, np.sin(x) > 0)
    assert not any(sigma.any() for sigma in exact)


def test_choices_are_replayed_and_their_margins_told():
    def route(x, w):
        values, chosen = lax.top_k(x @ w, 2)
        return jax.nn.softmax(values), chosen

    x, w = normal(3, 16), normal(16, 5)
    w[:, 1] = w[:, 0]
    w[0, 1] += np.float32(1e-7) * np.abs(w[0, 1])
    w[:, 2:] -= 9 * np.sign(x[0])[:, None] * np.ones(3, np.float32)
    w[:, 2] += 18 * np.sign(x[0])
    model = measure_noise(route, (x, w), "float32")
    (choice,) = model.choices
    assert choice.primitive == "top_k"
    assert re.search(r"test_noise\.py:\d+", choice.where)
    assert choice.ties(unit_roundoff("float32"))[0]  # the second of the first row: experts 0 and 1, tied to 1e-8
    assert not choice.ties(2.0**-53 / 2**20)[1:].any()
    assert model.sigma[0].any()
    assert not model.sigma[1].any()
    np.testing.assert_array_equal(model.reference[1], np.argsort(-(x.astype(float) @ w), axis=1, kind="stable")[:, :2])


def test_taps_are_kept_by_name_also_inside_calls():
    def block(x):
        return checkpoint_name(jnp.tanh(x), "inner")

    model = measure_noise(lambda x: checkpoint_name(jax.jit(block)(x) * 3, "outer").sum(), (X,), "float32")
    assert list(model.taps) == list(model.tap_noise) == ["inner", "outer"]
    np.testing.assert_allclose(model.taps["inner"], np.tanh(X.astype(float)), rtol=64 * EPS)
    assert np.all(model.tap_noise["outer"].sigma > 0)


@pytest.mark.parametrize("draws", [0, 1])
def test_too_few_draws_are_refused(draws: int):
    with pytest.raises(ValueError, match=f"draws: {draws} is too few"):
        measure_noise(jnp.sin, (X,), "float32", draws=draws)


def test_the_same_seed_gives_the_same_numbers():
    once, again, other = (measure_noise(softmax, (X,), "float32", seed=s).noise[0] for s in (1, 1, 2))
    np.testing.assert_array_equal(once.sigma, again.sigma)
    assert once.kappa == again.kappa
    assert not np.array_equal(once.sigma, other.sigma)


def test_a_program_is_traced_once_per_shape():
    calls = []
    tracer = Tracer(lambda x: (calls.append(x.shape), x * 2)[1])
    for shape in ((2,), (2,), (3,)):
        tracer.program((np.ones(shape, np.float32),), "float64")
    assert calls == [(2,), (3,)]


def test_a_broken_evaluation_is_told_in_words():
    def fn(x):
        return jax.pure_callback(lambda a: a, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with pytest.raises(CannotLook, match=r"pure_callback.*test_noise\.py:\d+.*no rounding rule"):
        measure_noise(fn, (X,), "float32")


@settings(max_examples=12, deadline=None)
@given(st.integers(2, 300), st.integers(0, 2**31))
def test_the_noise_of_a_sum_grows_like_the_root_of_its_length(terms: int, seed: int):
    x = np.random.default_rng(seed).standard_normal((128, terms)).astype(np.float32)
    model = measure_noise(lambda x: x.sum(1), (x,), "float32")
    # Zero-mean terms: S^2 is about the sum of t^2, so var = (K / 6) sum t^2.
    expected = np.sqrt(terms / 6) * rms(np.sqrt(np.square(x).sum(1)))
    assert rms(model.sigma[0]) / expected == pytest.approx(1, abs=0.35)


def test_no_stored_element_is_less_noisy_than_its_own_rounding(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((300, 40)).astype(np.float32) for _ in range(2))
    product = lambda x, y: {"rounded": x * y, "as it was": x}  # noqa: E731
    made = noise.measure_noise(product, (x, y), "float32", draws=3)
    floor = noise.stored_noise(np.float64(x) * y)
    assert (made.noise[1].sigma >= floor).all()
    assert not made.noise[0].sigma.any()  # what was not computed is bit-equal
    monkeypatch.setattr(noise, "stored_noise", np.zeros_like)
    bare = noise.measure_noise(product, (x, y), "float32", draws=3).noise[1].sigma
    assert (bare < floor).any()


def test_what_is_stored_in_a_wider_type_has_no_such_floor() -> None:
    x = np.linspace(1.0, 2.0, 50).astype(ml_dtypes.bfloat16)
    widened = lambda x: jnp.sqrt(x.astype(jnp.float32))  # noqa: E731
    made = noise.measure_noise(widened, (x,), "bfloat16")
    assert (made.noise[0].sigma < noise.stored_noise(np.sqrt(x.astype(float)))).all()


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_products_below_the_smallest_normal_number_may_be_lost_whole(precision: str) -> None:
    kind = np.dtype(precision)
    tiny = float(np.finfo(kind).smallest_normal)
    x = np.full((3, 40), 0.3 * np.sqrt(tiny), kind)  # forty products of 0.09 tiny: their sum is a normal number
    model = noise.measure_noise(lambda x: x @ x.T, (x,), precision)
    with jax.enable_x64(precision == "float64"):
        made = np.asarray(jax.jit(lambda x: x @ x.T)(x), np.float64)
    assert (model.reference[0] > tiny).all()
    assert (model.sigma[0] * unit_roundoff(precision) * THRESHOLDS.z > np.abs(made - model.reference[0])).all()


def test_products_of_ordinary_size_have_no_such_noise() -> None:
    x = np.full((3, 40), 1e-12, np.float32)
    x[0, 0] = 1e-30  # one product below the smallest normal number, in a sum that is far above it
    model = noise.measure_noise(lambda x: x @ x.T, (x,), "float32")
    assert (model.sigma[0] < 40 * model.reference[0]).all()


@pytest.mark.parametrize("size", [-300.0, -600.0, -700.0])
def test_faint_numbers_of_float64_have_the_noise_of_any_other(size: float) -> None:
    x = np.linspace(size, size - 1.0, 50)
    made = noise.measure_noise(lambda x: jnp.exp(x) * 3.0, (x,), "float64")
    plain = noise.measure_noise(lambda x: jnp.exp(x) * 3.0, (x - size,), "float64")
    ratio = (made.sigma[0] / made.reference[0]) / (plain.sigma[0] / plain.reference[0])
    assert (np.abs(np.log2(ratio)) < 1).all()


def test_results_below_the_smallest_normal_number_have_it_as_their_noise() -> None:
    made = noise.measure_noise(jnp.exp, (np.linspace(-735.0, -740.0, 20),), "float64")
    ratio = made.sigma[0] * unit_roundoff("float64") / np.finfo(float).smallest_normal
    assert ((ratio > 1 / 4) & (ratio < 4)).all()
