"""Each layer against its formula in float64 numpy, and its behaviour in low precision."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import checkify

from omni_jax.layers import (
    GELUMLP,
    MoE,
    RMSNorm,
    SwiGLU,
    TokenEmbedding,
    TokenIdError,
    apply_rope,
    check_token_ids,
    checked,
    rope_frequencies,
    statistics_dtype,
)

ULPS = 64  # sums of at most 64 terms, left to right


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def randomised(module: nnx.Module) -> nnx.Module:
    """float64, every parameter drawn afresh: a norm scale of 1 or a bias of 0 would hide its absence."""
    rng = np.random.default_rng(0)
    graphdef, params = nnx.split(module, nnx.Param)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params))


def assert_close(actual, expected: np.ndarray) -> None:
    actual = np.asarray(actual)
    assert actual.dtype == np.float64
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= ULPS * np.finfo(np.float64).eps * np.abs(expected).max()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def weights(module: nnx.Module) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(module))}


def test_check_token_ids_names_the_first_bad_one() -> None:
    tokens = np.array([[0, 1, 100], [2, 101, -1]])
    for kind in (TokenIdError, ValueError, IndexError):
        with pytest.raises(kind, match=r"tokens\[1, 1\] = 101 .* 0 to 100 \(vocab_size=101\)"):
            check_token_ids(tokens, 101)
    with pytest.raises(TokenIdError, match=r"prompt\[0\] = -1 "):
        check_token_ids(jnp.array([-1]), 101, "prompt")
    check_token_ids(tokens[:1], 101)


@pytest.mark.parametrize("dtype", [np.float32, np.bool_])
def test_check_token_ids_wants_integers(dtype) -> None:
    with pytest.raises(ValueError, match="must hold integers, got") as caught:
        check_token_ids(np.ones(2, dtype), 5)
    assert not isinstance(caught.value, TokenIdError)


def test_statistics_dtype() -> None:
    wide = {"float64": "float64", "float32": "float32", "bfloat16": "float32", "float16": "float32"}
    assert {dtype: statistics_dtype(jnp.dtype(dtype)).name for dtype in wide} == wide


def test_embedding_looks_up_rows() -> None:
    embedding = TokenEmbedding(7, 4, rngs=nnx.Rngs(0))
    tokens = np.array([[6, 0], [3, 3]])
    assert jnp.array_equal(embedding(tokens), np.asarray(embedding.embedding[...])[tokens])
    for bad in (7, -1, 2**32):
        with pytest.raises(TokenIdError):
            embedding(np.array([[bad]]))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int32])
def test_embedding_inside_jit_gives_nan_rows(dtype) -> None:
    embedding = TokenEmbedding(100, 4, rngs=nnx.Rngs(0))
    bad = [255, 101] if dtype == jnp.uint8 else [-1, -128]
    tokens = jnp.array([bad + [100, 127, 99, 0]]).astype(dtype)
    rows = jax.jit(lambda tokens: embedding(tokens))(tokens)
    assert jnp.isnan(rows).all(axis=-1).tolist() == [[True, True, True, True, False, False]]
    assert jnp.array_equal(rows[0, 4:], embedding.embedding[...][jnp.array([99, 0])])


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int32])
def test_embedding_under_checked_raises(dtype) -> None:
    """Also where the program was compiled without the checks before, in a loop, and for a batch."""
    embedding = TokenEmbedding(200, 4, rngs=nnx.Rngs(0))
    run = jax.jit(lambda tokens: embedding(tokens))
    looped = jax.jit(lambda rows: jax.lax.map(embedding, rows))
    bad = 255 if dtype == jnp.uint8 else -7
    good, tokens = (jnp.array([[3, x], [99, 0]]).astype(dtype) for x in (4, bad))
    assert jnp.isnan(run(tokens)).any()
    for fn in (run, looped, jax.jit(jax.vmap(embedding)), jax.vmap(run)):
        assert jnp.array_equal(checked(fn)(good), run(good))
        with pytest.raises(TokenIdError, match=rf"{bad} is not a token id of this model: allowed are 0 to 199"):
            checked(fn)(tokens)
    assert jnp.isnan(run(tokens)).any()


def test_checked_changes_nothing_else() -> None:
    embedding = TokenEmbedding(7, 4, rngs=nnx.Rngs(0))
    tokens = jnp.array([[6, 0]])

    graphdef, params = nnx.split(embedding, nnx.Param)

    def loss(params, scale):
        return jnp.sum(jnp.square(nnx.merge(graphdef, params)(tokens))) * scale

    plain = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, checked(plain)(params, 3.0), plain(params, 3.0)))
    assert "check" not in str(jax.make_jaxpr(lambda tokens: embedding(tokens))(tokens))

    def own(x):
        checkify.check(x > 0, "not positive: {x}", x=x)
        return x

    with pytest.raises(checkify.JaxRuntimeError, match="not positive: -1"):  # the caller's own checks stay his
        checked(jax.jit(own))(-1)
    with pytest.raises(ValueError, match="must hold integers, got float32"):
        jax.jit(embedding)(jnp.ones((1, 2)))


def test_embedding_has_no_padding_row() -> None:
    embedding = TokenEmbedding(7, 4, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(embedding, nnx.Param)
    grads = jax.grad(lambda params: nnx.merge(graphdef, params)(jnp.array([[0]])).sum())(params)
    assert grads["embedding"][...].tolist()[0] == [1.0] * 4


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e4])
def test_rms_norm(x64, size) -> None:
    norm = randomised(RMSNorm(12, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(1).normal(size=(2, 3, 12)) * size
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weights(norm)["scale"]
    assert_close(norm(jnp.asarray(x)), expected)


def test_rms_norm_rounds_once_in_bfloat16() -> None:
    rng = np.random.default_rng(1)
    scale, x = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((64,), (8, 64)))
    norm = RMSNorm(64, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    norm.scale.set_value(scale)
    wide = RMSNorm(64, rngs=nnx.Rngs(0))
    wide.scale.set_value(scale.astype(jnp.float32))
    assert norm(x).dtype == jnp.bfloat16
    assert jnp.array_equal(norm(x), wide(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_rope_by_the_formula(x64) -> None:
    d, theta = 6, 100.0
    x = np.random.default_rng(2).normal(size=(2, 4, 3, d))
    positions = np.array([[0, 1, 2, 5000], [7, 7, 0, 1]])
    angle = positions[..., None] * theta ** (-2.0 * np.arange(d // 2) / d)
    as_complex = (x[..., : d // 2] + 1j * x[..., d // 2 :]) * np.exp(1j * angle)[:, :, None]
    expected = np.concatenate([as_complex.real, as_complex.imag], axis=-1)
    cos, sin = rope_frequencies(jnp.asarray(positions), d, theta, jnp.float64)
    turned = np.asarray(apply_rope(jnp.asarray(x), cos, sin))
    # An angle of 5000 radians is known to 5000 · eps.
    assert np.abs(turned - expected).max() <= 5000 * 4 * np.finfo(np.float64).eps
    assert np.array_equal(turned[0, 0], x[0, 0])


def test_rope_angles_stay_wide() -> None:
    positions = jnp.arange(300)[None]
    cos, sin = rope_frequencies(positions, 8, dtype=jnp.bfloat16)
    assert cos.dtype == sin.dtype == jnp.float32
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 300, 2, 8)), jnp.bfloat16)
    assert jnp.array_equal(apply_rope(x, cos, sin), apply_rope(x.astype(jnp.float32), cos, sin).astype(jnp.bfloat16))


def test_swiglu(x64) -> None:
    mlp = randomised(SwiGLU(8, 12, rngs=nnx.Rngs(0)))
    w = weights(mlp)
    x = np.random.default_rng(3).normal(size=(2, 3, 8))
    gate, up = x @ w["gate_proj.kernel"], x @ w["up_proj.kernel"]
    assert_close(mlp(jnp.asarray(x)), (gate * sigmoid(gate) * up) @ w["down_proj.kernel"])


def test_gelu_mlp_is_the_exact_form(x64) -> None:
    mlp = randomised(GELUMLP(8, 12, rngs=nnx.Rngs(0)))
    w = weights(mlp)
    x = np.random.default_rng(4).normal(size=(2, 3, 8))
    h = x @ w["fc1.kernel"] + w["fc1.bias"]
    h = h * 0.5 * (1.0 + np.vectorize(math.erf)(h / math.sqrt(2.0)))
    assert_close(mlp(jnp.asarray(x)), h @ w["fc2.kernel"] + w["fc2.bias"])


@pytest.mark.parametrize("use_swiglu", [True, False])
def test_moe_by_the_formula(x64, use_swiglu) -> None:
    moe = randomised(MoE(8, 12, num_experts=5, num_experts_per_tok=2, use_swiglu=use_swiglu, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(5).normal(size=(2, 3, 8))
    expected = np.zeros((2, 3, 8))
    outputs = np.stack([np.asarray(expert(jnp.asarray(x))) for expert in moe.experts])
    for at in np.ndindex(2, 3):
        logits = x[at] @ weights(moe)["router.kernel"]
        p = np.exp(logits) / np.exp(logits).sum()
        chosen = np.argsort(-p)[:2]
        for e in chosen:
            expected[at] += p[e] / (p[chosen].sum() + 1e-8) * outputs[(e, *at)]
    assert_close(moe(jnp.asarray(x)), expected)


def test_moe_ties_go_to_the_lowest_index(x64) -> None:
    moe = randomised(MoE(4, 6, num_experts=8, num_experts_per_tok=2, rngs=nnx.Rngs(0)))
    moe.router.kernel.set_value(jnp.zeros((4, 8)))
    x = jnp.asarray(np.random.default_rng(5).normal(size=(1, 1, 4)))
    expected = (moe.experts[0](x) + moe.experts[1](x)) / 2.0
    assert_close(jax.jit(lambda x: moe(x))(x), np.asarray(expected) / (1.0 + 4 * 1e-8))


def test_moe_gives_every_parameter_a_gradient(x64) -> None:
    moe = randomised(MoE(4, 6, num_experts=8, num_experts_per_tok=2, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(5).normal(size=(1, 1, 4)))
    graphdef, params = nnx.split(moe, nnx.Param)
    grads = jax.jit(jax.grad(lambda params: jnp.square(nnx.merge(graphdef, params)(x)).sum()))(params)
    used = [bool(grads["experts"][e]["gate_proj"]["kernel"][...].any()) for e in range(8)]
    assert sum(used) == 2
    assert bool(grads["router"]["kernel"][...].any())


def test_moe_ignores_an_expert_that_overflows_where_it_was_not_chosen(x64) -> None:
    moe = randomised(MoE(4, 6, num_experts=3, num_experts_per_tok=1, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(5).normal(size=(1, 2, 4)))
    moe.router.kernel.set_value(jnp.zeros((4, 3)))
    clean = moe(x)
    moe.experts[2].down_proj.kernel.set_value(jnp.full((6, 4), jnp.inf))
    assert jnp.array_equal(moe(x), clean)
