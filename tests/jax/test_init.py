"""Initial weights of omni_jax: bounds, fans, gains, and their use as Flax initializers.

That the draws have the right distribution is the business of parity's initializers check.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni_jax.init import (
    bias_default,
    embedding_default,
    fan_in_fan_out,
    init_linear,
    kaiming_uniform,
    linear_default,
    xavier_uniform,
)

KEY = jax.random.key(0)
SHAPE = (400, 250)  # fan_in 400, fan_out 250


def reaches(x, bound: float) -> bool:
    """Inside ±bound (rounded to x's dtype), and near it on both sides: 10⁵ draws miss the last 0.1 % with e⁻⁵⁰."""
    x = np.asarray(x)
    return bool(np.all(np.abs(x) <= x.dtype.type(bound))) and x.max() > 0.999 * bound and x.min() < -0.999 * bound


def test_fans():
    assert fan_in_fan_out(jnp.zeros((5, 3))) == (5, 3)
    assert fan_in_fan_out(nnx.Linear(5, 3, rngs=nnx.Rngs(0)).kernel) == (5, 3)
    assert fan_in_fan_out(nnx.Conv(4, 6, (3, 5), rngs=nnx.Rngs(0)).kernel) == (4 * 15, 6 * 15)
    grouped = nnx.Conv(4, 6, (3, 3), feature_group_count=2, rngs=nnx.Rngs(0))
    assert fan_in_fan_out(grouped.kernel) == (2 * 9, 6 * 9)
    assert fan_in_fan_out(nnx.Embed(10, 4, rngs=nnx.Rngs(0)).embedding) == (10, 4)
    for shape in ((), (7,)):
        with pytest.raises(ValueError, match="at least 2 dimensions"):
            fan_in_fan_out(jnp.zeros(shape))


@pytest.mark.parametrize("x64", [False, True])
def test_xavier_bounds(x64):
    with jax.enable_x64(x64):
        dtype = jnp.float64 if x64 else jnp.float32
        weight = xavier_uniform(KEY, SHAPE, dtype)
        assert weight.dtype == dtype
        assert reaches(weight, math.sqrt(6 / 650))
        assert reaches(xavier_uniform(KEY, SHAPE, dtype, gain=3.0), 3 * math.sqrt(6 / 650))
        assert not xavier_uniform(KEY, SHAPE, dtype, gain=0.0).any()


@pytest.mark.parametrize(
    ("nonlinearity", "gain"),
    [
        ("linear", 1.0),
        ("sigmoid", 1.0),
        ("tanh", 5 / 3),
        ("relu", math.sqrt(2)),
        ("leaky_relu", math.sqrt(2 / 1.0001)),
        ("selu", 0.75),
    ],
)
def test_kaiming_bounds_and_gains(nonlinearity, gain):
    assert reaches(kaiming_uniform(KEY, SHAPE, nonlinearity=nonlinearity), gain * math.sqrt(3 / 400))


def test_kaiming_defaults_to_relu_and_refuses_the_unknown():
    assert reaches(kaiming_uniform(KEY, SHAPE), math.sqrt(6 / 400))
    with pytest.raises(ValueError, match=r"nonlinearity must be one of linear, .*got 'swish'"):
        kaiming_uniform(KEY, SHAPE, nonlinearity="swish")


@pytest.mark.parametrize("initialise", [xavier_uniform, kaiming_uniform, linear_default])
def test_what_every_weight_initializer_refuses(initialise):
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        initialise(KEY, (3,))
    with pytest.raises(ValueError, match="real floating dtype"):
        initialise(KEY, (3, 3), jnp.int32)
    assert initialise(KEY, (0, 0)).shape == (0, 0)
    assert initialise(KEY, (0, 3)).shape == (0, 3)


def test_gain_and_fan_in_are_checked():
    for gain in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="gain"):
            xavier_uniform(KEY, (2, 2), gain=gain)
    with pytest.raises(ValueError, match="fan_in"):
        bias_default(-1)
    with pytest.raises(ValueError, match="real floating dtype"):
        bias_default(3)(KEY, (3,), jnp.int32)


@pytest.mark.parametrize("use_bias", [True, False])
def test_init_linear_returns_a_new_layer(use_bias):
    layer = nnx.Linear(*SHAPE, use_bias=use_bias, bias_init=nnx.initializers.ones_init(), rngs=nnx.Rngs(0))
    kept = np.array(layer.kernel[...])
    for scheme, bound in (("xavier", math.sqrt(6 / 650)), ("kaiming_relu", math.sqrt(6 / 400)), ("zero", 0.0)):
        new = init_linear(layer, jax.random.key(1), scheme)
        assert isinstance(new, nnx.Linear)
        assert reaches(new.kernel[...], bound) if bound else not new.kernel[...].any()
        assert new.bias is None if not use_bias else not new.bias[...].any()
        assert np.array_equal(np.asarray(layer.kernel[...]), kept)
        assert not use_bias or bool(layer.bias[...].all())
    default = init_linear(layer, jax.random.key(1))
    assert jnp.array_equal(default.kernel[...], init_linear(layer, jax.random.key(1), "xavier").kernel[...])


def test_init_linear_keeps_the_parameters_dtype_and_works_under_jit():
    layer = nnx.Linear(4, 3, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer, nnx.Param)

    @jax.jit
    def fresh(params, key):
        return nnx.split(init_linear(nnx.merge(graphdef, params), key), nnx.Param)[1]

    new = fresh(params, KEY)
    assert new["kernel"][...].dtype == new["bias"][...].dtype == jnp.bfloat16
    assert not new["bias"][...].any()
    assert jnp.array_equal(new["kernel"][...], init_linear(layer, KEY).kernel[...])


def test_init_linear_refuses():
    with pytest.raises(ValueError, match="scheme must be one of xavier, kaiming_relu, zero, got 'he'"):
        init_linear(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), KEY, "he")
    with pytest.raises(ValueError, match=r"nnx\.Linear"):
        init_linear(nnx.Embed(2, 2, rngs=nnx.Rngs(0)), KEY)  # type: ignore[arg-type]


def test_they_are_flax_initializers():
    layer = nnx.Linear(*SHAPE, kernel_init=linear_default, bias_init=bias_default(400), rngs=nnx.Rngs(0))
    assert reaches(layer.kernel[...], 1 / 20)
    assert layer.bias.shape == (250,)
    assert float(jnp.abs(layer.bias[...]).max()) <= 1 / 20
    assert len(np.unique(layer.bias[...])) > 200
    conv = nnx.Conv(16, 70, (10, 10), kernel_init=linear_default, bias_init=bias_default(1600), rngs=nnx.Rngs(0))
    assert reaches(conv.kernel[...], 1 / 40)
    for init in (xavier_uniform, kaiming_uniform, linear_default):
        assert nnx.Linear(3, 2, kernel_init=init, rngs=nnx.Rngs(0)).kernel.shape == (3, 2)
    embed = nnx.Embed(100, 50, embedding_init=embedding_default, rngs=nnx.Rngs(0))
    assert float(jnp.abs(embed.embedding[...]).max()) > 3


def test_bfloat16_draws_are_float32_draws_rounded():
    for init in (xavier_uniform, kaiming_uniform, linear_default, embedding_default, bias_default(7)):
        narrow = init(KEY, (64, 32), jnp.bfloat16)
        assert narrow.dtype == jnp.bfloat16
        assert jnp.array_equal(narrow, init(KEY, (64, 32)).astype(jnp.bfloat16))


def test_keys_decide():
    for init in (xavier_uniform, kaiming_uniform, linear_default, embedding_default):
        assert jnp.array_equal(init(KEY, (8, 8)), init(KEY, (8, 8)))
        assert not jnp.array_equal(init(KEY, (8, 8)), init(jax.random.key(1), (8, 8)))


def test_what_is_not_clear_is_refused_with_its_name():
    for value in ([], None, 1):
        with pytest.raises(ValueError, match="nonlinearity must be one of linear"):
            kaiming_uniform(KEY, (2, 3), nonlinearity=value)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="scheme must be one of"):
            init_linear(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), KEY, value)  # type: ignore[arg-type]
    for value in (None, "x", [1.0]):
        with pytest.raises(ValueError, match="gain must be finite"):
            xavier_uniform(KEY, (2, 3), gain=value)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="fan_in must be a number"):
            bias_default(value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight must be an array, got list"):
        fan_in_fan_out([1])
