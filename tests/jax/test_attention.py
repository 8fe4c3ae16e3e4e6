"""Attention: masks, positions, grouped heads, rows without a key, and its cost in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import omni_jax.attention
from omni_jax.attention import (
    CausalSelfAttention,
    _attend_causal,
    _attend_one,
    attend,
    default_positions,
    make_attention_mask,
    simple_attention,
)
from omni_jax.layers import rope_frequencies

B, T, H, D = 2, 7, 6, 4
CAUSAL = np.tril(np.ones((T, T), bool))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def draw(kv_heads: int = 3, dtype=jnp.float64, size: float = 1.0) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = [(B, T, H, D), (B, T, kv_heads, D), (B, T, kv_heads, D)]
    return [jnp.asarray(rng.normal(size=shape) * size, dtype) for shape in shapes]


def holes() -> np.ndarray:
    """Left padding in row 0 (so that its first queries see nothing), a hole in row 1."""
    mask = np.ones((B, T), bool)
    mask[0, :3] = False
    mask[1, 4] = False
    return mask


def by_the_formula(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One query at a time, in float64; query head h reads key/value head h // (H / K)."""
    y = np.zeros_like(q)
    for b, t, h in np.ndindex(*q.shape[:3]):
        g = h * k.shape[2] // q.shape[2]
        seen = np.flatnonzero(mask[min(b, len(mask) - 1), t])
        if len(seen):
            score = k[b, seen, g] @ q[b, t, h] / np.sqrt(q.shape[3])
            p = np.exp(score - score.max())
            y[b, t, h] = (p / p.sum()) @ v[b, seen, g]
    return y


def test_mask_is_causal_and_keeps_what_it_is_told() -> None:
    assert make_attention_mask(B, T).tolist() == [CAUSAL.tolist()]
    assert np.array_equal(make_attention_mask(B, T, holes()), CAUSAL & holes()[:, None, :])
    square = np.random.default_rng(0).random((B, T, T)) > 0.5
    assert np.array_equal(make_attention_mask(B, T, jnp.asarray(square)), CAUSAL & square)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.ones((B, T), np.float32), "must be boolean .* got float32"),
        (np.ones((B, T), np.int64), "must be boolean .* got int64"),
        (np.ones((B, T + 1), bool), r"shape \(2, 8\): must be \(B, T\) = \(2, 7\)"),
        (np.ones((T, T), bool), r"\(B, T, T\) = \(2, 7, 7\)"),
        (np.ones((1, T, T), bool), r"shape \(1, 7, 7\)"),
    ],
)
def test_bad_masks(mask, words) -> None:
    with pytest.raises(ValueError, match=words):
        make_attention_mask(B, T, mask)


def test_default_positions_count_kept_tokens() -> None:
    assert default_positions(4).tolist() == [[0, 1, 2, 3]]
    assert default_positions(T, holes()).tolist() == [[0, 0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 3, 4, 5]]
    assert np.array_equal(default_positions(T, make_attention_mask(B, T, holes())), default_positions(T, holes()))


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_attention_by_the_formula(x64, kv_heads) -> None:
    q, k, v = draw(kv_heads)
    for mask in (make_attention_mask(B, T), make_attention_mask(B, T, holes())):
        y = np.asarray(attend(q, k, v, mask))
        assert y.dtype == np.float64
        expected = by_the_formula(*map(np.asarray, (q, k, v, mask)))
        assert np.abs(y - expected).max() <= 4 * (D + T) * np.finfo(np.float64).eps * np.abs(v).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("size", [1.0, 15.0])  # 15: scores far beyond ±50
def test_low_precision_against_float64(dtype, size) -> None:
    """In units of the dtype's rounding: a score of size s is known to s · eps of float32, whatever the dtype."""
    q, k, v = draw(dtype=dtype, size=size)
    mask = make_attention_mask(B, T, holes())
    y = attend(q, k, v, mask)
    assert y.dtype == dtype
    expected = by_the_formula(*(np.asarray(x, np.float64) for x in (q, k, v)), np.asarray(mask))
    wide_eps = float(jnp.finfo(jnp.float32).eps)
    bound = 8 * (float(jnp.finfo(dtype).eps) + wide_eps * size * size) * size
    assert np.abs(np.asarray(y, np.float64) - expected).max() <= bound


def test_a_row_without_a_key_gives_zeros_forward_and_backward(x64) -> None:
    q, k, v = draw()
    mask = make_attention_mask(B, T, holes())
    y = attend(q, k, v, mask)
    grads = jax.jit(jax.grad(lambda q, k, v: attend(q, k, v, mask).sum(), argnums=(0, 1, 2)))(q, k, v)
    assert not y[0, :3].any()
    assert not any(grad[0, :3].any() for grad in grads)
    assert y[0, 3:].all()
    assert all(bool(jnp.isfinite(grad).all()) for grad in grads)
    assert not attend(q, k, v, jnp.zeros((1, T, T), jnp.bool_)).any()


def test_grouped_heads_are_never_repeated_in_memory(x64) -> None:
    """No intermediate holds keys or values once per query head."""
    q, k, v = draw(kv_heads=1)
    jaxpr = jax.make_jaxpr(attend)(q, k, v, make_attention_mask(B, T))
    sizes = [sorted(var.aval.shape) for eqn in jaxpr.jaxpr.eqns for var in eqn.outvars if "transpose" not in str(eqn)]
    assert sum(size == sorted((B, T, H, D)) for size in sizes) <= 1  # the result itself


def make(**kinds):
    rng = np.random.default_rng(0)
    module = CausalSelfAttention(24, 6, 0.0, **kinds, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(module, nnx.Param)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 5.0), params)
    cos, sin = rope_frequencies(jnp.arange(T)[None], 4, dtype=jnp.float64)
    return nnx.merge(graphdef, params), jnp.asarray(rng.normal(size=(B, T, 24))), cos, sin


@pytest.mark.parametrize("kinds", [{}, {"use_gqa": True}, {"use_gqa": True, "kv_groups": 1}])
def test_causality_by_gradients(x64, kinds) -> None:
    """Output t depends on every input ≤ t (1), on none after it, exactly (2), and on itself (3)."""
    module, x, cos, sin = make(**kinds)

    def outputs(x):
        return jnp.square(module(x, cos, sin, make_attention_mask(B, T))).sum(axis=(0, 2))

    depends = jnp.abs(jax.jit(jax.jacrev(outputs))(x)).sum(axis=-1) > 0
    assert np.array_equal(depends, np.broadcast_to(CAUSAL[:, None], (T, B, T)))


def test_names_and_shapes_of_the_projections() -> None:
    for kinds, expected in (
        ({}, {"qkv.kernel": (24, 72), "o.kernel": (24, 24)}),
        (
            {"use_gqa": True, "kv_groups": 2},
            {"q.kernel": (24, 24), "k.kernel": (24, 8), "v.kernel": (24, 8), "o.kernel": (24, 24)},
        ),
    ):
        state = nnx.state(CausalSelfAttention(24, 6, 0.0, **kinds, rngs=nnx.Rngs(0)))
        assert {".".join(path): leaf.shape for path, leaf in nnx.to_flat_state(state)} == expected


def test_as_many_groups_as_heads_is_multi_head(x64) -> None:
    grouped, x, cos, sin = make(use_gqa=True, kv_groups=6)
    fused, *_ = make()
    kernels = [grouped.q.kernel[...], grouped.k.kernel[...], grouped.v.kernel[...]]
    fused.qkv.kernel.set_value(jnp.concatenate(kernels, axis=1))
    fused.o.kernel.set_value(grouped.o.kernel[...])
    mask = make_attention_mask(B, T, holes())
    difference = jnp.abs(grouped(x, cos, sin, mask) - fused(x, cos, sin, mask)).max()
    assert float(difference) <= 48 * np.finfo(np.float64).eps


def test_dropout_only_in_training_and_on_the_probabilities() -> None:
    module = CausalSelfAttention(24, 6, 0.5, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, 24)), jnp.float32)
    cos, sin = rope_frequencies(jnp.arange(T)[None], 4)
    mask = make_attention_mask(B, T)
    first, second = module(x, cos, sin, mask), module(x, cos, sin, mask)
    assert not jnp.array_equal(first, second)
    module.eval()
    assert jnp.array_equal(module(x, cos, sin, mask), module(x, cos, sin, mask))
    seen = []
    q, k, v = draw(dtype=jnp.float32)
    attend(q, k, v, mask, dropout=lambda p: seen.append((p.shape, float(p.sum(-1).max()))) or p)
    assert seen[0][0] == (B, 3, 2, T, T)


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_simple_attention(x64, leading) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(*leading, n, width)) for n, width in ((5, 8), (7, 8), (7, 3)))
    output, weights = simple_attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v))
    assert output.shape == (*leading, 5, 3)
    assert weights.shape == (*leading, 5, 7)
    e = np.exp(q @ np.swapaxes(k, -2, -1) / np.sqrt(8))
    expected = e / e.sum(axis=-1, keepdims=True)
    eps = np.finfo(np.float64).eps
    assert np.abs(np.asarray(weights).sum(axis=-1) - 1).max() <= 7 * eps
    assert np.abs(weights - expected).max() <= 8 * 4 * eps
    assert np.abs(output - expected @ v).max() <= 8 * 7 * eps * np.abs(v).max()


def test_one_query_is_the_same_by_products_and_sums(x64) -> None:
    """With a hole, a row without a key, and a score whose exponential would overflow."""
    mask = holes()[:, None]
    mask[0] = False
    for kv_heads, size in ((1, 1.0), (3, 30.0)):
        q, k, v = draw(kv_heads, size=size)
        one, all_at_once = (f(q[:, -1:], k, v, jnp.asarray(mask)) for f in (_attend_one, attend))
        assert not one[0].any()
        eps = float(jnp.finfo(jnp.float64).eps)
        # exp turns the rounding of a score, sums of D terms of up to size², into a relative error.
        bound = (D + T) * eps * float(jnp.abs(v).max()) * max(1.0, float(jnp.abs(q).max() * jnp.abs(k).max()) * D)
        assert float(jnp.abs(one - all_at_once).max()) <= bound
    q, k, v = draw(3, jnp.bfloat16)
    assert _attend_one(q[:, -1:], k, v, jnp.asarray(mask)).dtype == jnp.bfloat16


@pytest.mark.parametrize("kv_heads", [1, 3])
def test_blocks_of_queries_are_the_causal_attention(x64, monkeypatch, kv_heads) -> None:
    monkeypatch.setattr(omni_jax.attention, "_SMALLEST_BLOCK", 2)
    q, k, v = draw(kv_heads)
    mask = jnp.asarray(holes())[:, None] & jnp.tril(jnp.ones((T, T), jnp.bool_))[None]
    blocks, whole = _attend_causal(q, k, v, mask), attend(q, k, v, mask)
    assert float(jnp.abs(blocks - whole).max()) <= (D + T) * float(jnp.finfo(jnp.float64).eps) * float(jnp.abs(v).max())


@pytest.mark.parametrize(
    "shapes",
    [
        ((3,), (3,), (3,)),
        ((2, 3), (4, 3), (5, 3)),
        ((2, 3), (4, 2), (4, 3)),
        ((2, 0), (4, 0), (4, 3)),
        ((2, 3), (0, 3), (0, 3)),
    ],
)
def test_simple_attention_refuses_shapes_that_do_not_belong_together(shapes) -> None:
    with pytest.raises(ValueError, match="query, key, value have shapes"):
        simple_attention(*map(jnp.zeros, shapes))


def test_a_list_is_no_mask() -> None:
    with pytest.raises(ValueError, match="attention_mask is a list, must be an array"):
        make_attention_mask(1, 2, [[True, True]])
