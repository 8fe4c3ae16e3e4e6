"""The KV cache: equal to the full forward in chunks of any length, padded or not, up to the last slot, and past it."""

from __future__ import annotations

import dataclasses
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_jax.cache import KVCache, init_cache
from omni_jax.config import ThinkerConfig
from omni_jax.layers import TokenIdError, checked
from omni_jax.thinker import ThinkerLM

SIZES = {"vocab_size": 31, "n_layers": 2, "d_model": 24, "n_heads": 4, "d_ff": 20, "dropout": 0.0, "ctx_len": 16}
KINDS = {
    "mha-swiglu": {},
    "gqa-swiglu": {"use_gqa": True},
    "moe-gqa-gelu": {"use_moe": True, "num_experts": 3, "use_gqa": True, "kv_groups": 1, "use_swiglu": False},
}
EPS = np.finfo(np.float64).eps


@cache
def build(kind: str = "gqa-swiglu", **changes) -> ThinkerLM:
    model = ThinkerLM.from_config(ThinkerConfig(**(SIZES | KINDS[kind] | changes)))
    model.eval()
    return model


def cast(model: ThinkerLM, dtype) -> ThinkerLM:
    graphdef, params = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(dtype), params))


@partial(jax.jit, static_argnums=0)
def _run(graphdef, params, *args, **kwargs):
    return nnx.merge(graphdef, params)(*args, **kwargs)


def jitted(model: ThinkerLM):
    graphdef, params = nnx.split(model)
    return partial(_run, graphdef, params)


def draw(batch: int, time: int, padding: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and a mask that leaves out the first `padding[row]` ones."""
    tokens = np.random.default_rng(time).integers(1, 31, (batch, time))
    left = np.array([*padding, *[0] * batch])[:batch]
    return tokens, np.arange(time)[None] >= left[:, None]


def in_chunks(run, tokens, chunk, cache, mask) -> tuple[jax.Array, KVCache]:
    parts = []
    for at in range(0, tokens.shape[1], chunk):
        here = slice(at, at + chunk)
        logits, cache = run(tokens[:, here], cache=cache, attention_mask=mask[:, here])
        parts.append(logits)
    return jnp.concatenate(parts, axis=1), cache


def banded(mask: np.ndarray, width: int) -> np.ndarray:
    """(B, T, T): each query sees the last `width` tokens, itself included, that the mask keeps."""
    step = np.arange(mask.shape[1])
    return (step[None] > step[:, None] - width) & mask[:, None]


def positions_of(mask: np.ndarray) -> np.ndarray:
    return np.maximum(np.cumsum(mask, axis=1) - 1, 0)


def assert_same(a: jax.Array, b: jax.Array) -> None:
    """Equal up to the rounding of two layers: sums of at most 24 terms, some ten of them in a row."""
    assert a.dtype == b.dtype == jnp.float64
    assert a.shape == b.shape
    assert float(jnp.abs(a - b).max()) <= 10 * 24 * EPS * float(jnp.abs(b).max())


def assert_unchanged(a: KVCache, b: KVCache) -> None:
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_full_forward_up_to_the_last_slot(x64, kind) -> None:
    model = cast(build(kind), jnp.float64)
    run = jitted(model)
    tokens, padded = draw(3, 16, (5, 0, 16))  # the third row is all padding
    for mask, chunks in ((np.ones_like(padded), (3,)), (padded, (1, 3, 7, 16))):
        full = run(tokens, attention_mask=mask)
        for chunk in chunks:
            logits, cache = in_chunks(run, tokens, chunk, init_cache(model, 3), mask)
            assert_same(logits, full)
            assert int(cache.length) == 16
            assert cache.count.tolist() == mask.sum(axis=1).tolist()


def test_outside_jit_and_without_a_mask(x64) -> None:
    model = cast(build(), jnp.float64)
    tokens, _ = draw(2, 7)
    logits, cache = model(tokens[:, :6], cache=init_cache(model, 2))
    last, cache = model(tokens[:, 6:], cache=cache)
    assert_same(jnp.concatenate([logits, last], axis=1), jitted(model)(tokens))


def test_unequal_prompts_decode_as_each_alone(x64) -> None:
    model = cast(build(), jnp.float64)
    run = jitted(model)
    tokens, mask = draw(2, 12, (5, 0))
    both, _ = in_chunks(run, tokens, 4, init_cache(model, 2), mask)
    assert_same(both[:1, 5:], run(tokens[:1, 5:]))
    assert_same(both[1:], run(tokens[1:]))


@settings(max_examples=8, deadline=None)
@given(
    chunks=st.lists(st.sampled_from([1, 2, 5]), min_size=1, max_size=6),
    window=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_chunks_any_holes(chunks, window, seed) -> None:
    """Few shapes, since each is compiled: the last chunk's end is padded for the full forward."""
    with jax.enable_x64(True):
        model, time, most = cast(build(), jnp.float64), sum(chunks), 30
        run = jitted(model)
        slots = 6 if window else most
        tokens, _ = draw(2, most)
        mask = np.random.default_rng(seed).random((2, most)) > 0.3
        cache, parts, at = init_cache(model, 2, slots, window), [], 0
        for chunk in chunks:
            here = slice(at, at + chunk)
            logits, cache = run(tokens[:, here], attention_mask=mask[:, here], cache=cache)
            parts.append(logits)
            at += chunk
        full = run(tokens, attention_mask=banded(mask, slots), positions=positions_of(mask))
        assert_same(jnp.concatenate(parts, axis=1), full[:, :time])


@pytest.mark.parametrize("chunk", [1, 5, 7])
def test_window_sees_the_last_slots_and_goes_on_for_ever(x64, chunk) -> None:
    model = cast(build(), jnp.float64)
    run = jitted(model)
    tokens, mask = draw(2, 40, (9, 0))  # 9: a window of nothing but padding
    logits, cache = in_chunks(run, tokens, chunk, init_cache(model, 2, 7, window=True), mask)
    full = run(tokens, attention_mask=banded(mask, 7), positions=positions_of(mask))
    assert_same(logits, full)
    assert int(cache.length) == 40
    assert not jnp.array_equal(full, run(tokens, attention_mask=mask, positions=positions_of(mask)))


def test_chunk_longer_than_the_window() -> None:
    with pytest.raises(ValueError, match="8 tokens in one call are more than the window's max_length=7 slots"):
        jitted(build())(draw(1, 8)[0], cache=init_cache(build(), 1, 7, window=True))


def test_a_full_cache_is_an_error_and_inside_jit_nan_and_nothing_is_overwritten() -> None:
    model = build()
    run = jitted(model)
    tokens, _ = draw(2, 16)
    _, cache = run(tokens[:, :15], cache=init_cache(model, 2))
    words = r"holds 15 tokens, and 2 more do not fit into max_length=16.*window=True"
    with pytest.raises(ValueError, match=words):
        model(tokens[:, :2], cache=cache)
    logits, after = run(tokens[:, :2], cache=cache)
    assert logits.shape == (2, 2, 31)
    assert np.isnan(logits).all()
    assert_unchanged(after, cache)
    with pytest.raises(ValueError, match=words) as caught:
        checked(run)(tokens[:, :2], cache=cache)
    assert not isinstance(caught.value, TokenIdError)
    logits, after = checked(run)(tokens[:, 15:], cache=cache)  # the last slot
    assert np.array_equal(logits, run(tokens[:, 15:], cache=cache)[0])
    assert int(after.length) == 16
    with pytest.raises(ValueError, match="holds 0 tokens, and 17 more do not fit"):  # known without a value
        run(np.ones((2, 17), int), cache=init_cache(model, 2))


def test_a_loop_that_runs_over_the_end_is_found() -> None:
    model = build(n_layers=1)

    @jax.jit
    def decode(tokens, steps):
        def body(i, state):
            logits, cache = model(state[0], cache=state[1])
            return jnp.argmax(logits[:, -1:], axis=-1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, steps, body, (tokens, init_cache(model, 1, 4)))

    start = jnp.ones((1, 1), jnp.int32)
    assert int(checked(decode)(start, 4)[1].length) == 4
    with pytest.raises(ValueError, match="holds 4 tokens, and 1 more do not fit into max_length=4"):
        checked(decode)(start, 5)


def test_embeddings_positions_and_last_only(x64) -> None:
    model = cast(build(), jnp.float64)
    tokens, _ = draw(2, 9)
    positions = np.arange(9) * 3
    run, last = jitted(model), jax.jit(partial(model, last_only=True))
    full = run(tokens, positions=positions)
    _, cache = run(embeddings=model.tok_emb(tokens[:, :5]), positions=positions[:5], cache=init_cache(model, 2))
    assert_same(last(tokens[:, 5:], positions=positions[5:], cache=cache)[0], full[:, -1:])
    assert_same(last(tokens, positions=positions), full[:, -1:])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_cache_has_the_models_dtype_and_unrepeated_heads(dtype) -> None:
    model = cast(build("moe-gqa-gelu"), dtype)
    cache = init_cache(model, 3, 5)
    assert [f.name for f in dataclasses.fields(cache)] == ["k", "v", "kept", "count", "length", "window"]
    assert all(x.dtype == dtype and x.shape == (3, 5, 1, 6) for x in (*cache.k, *cache.v))
    logits, after = jitted(model)(draw(3, 4)[0], cache=cache)
    assert logits.dtype == dtype
    assert jax.tree.structure(after) == jax.tree.structure(cache)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(cache), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
    mixed = ThinkerLM.from_config(model.config, dtype=jnp.bfloat16)
    assert init_cache(mixed, 1).k[0].dtype == jnp.bfloat16


def test_steps_are_not_traced_again_and_reuse_the_buffers() -> None:
    chex.clear_trace_counter()
    graphdef, params = nnx.split(build())

    @partial(jax.jit, donate_argnames="cache")
    @chex.assert_max_traces(n=1)
    def step(params, token, cache):
        logits, cache = nnx.merge(graphdef, params)(token, cache=cache, last_only=True)
        return jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32)[:, None], cache

    token, cache = jnp.ones((2, 1), jnp.int32), init_cache(build(), 2)
    where = None
    for _ in range(5):
        token, cache = step(params, token, cache)
        now = sorted(x.unsafe_buffer_pointer() for x in (*cache.k, *cache.v))
        assert where in (None, now)
        where = now
    assert int(cache.length) == 5


@pytest.mark.parametrize("batch_size", [0, -1, True, 1.0])
def test_sizes_are_checked(batch_size) -> None:
    with pytest.raises(ValueError, match=r"batch_size = .* must be an integer of at least 1"):
        init_cache(build(), batch_size)
    with pytest.raises(ValueError, match=r"max_length = .* must be an integer of at least 1"):
        init_cache(build(), 1, batch_size)


@pytest.mark.parametrize(
    ("changes", "batch"),
    [({}, 3), ({"n_layers": 1}, 2), ({"n_heads": 2, "kv_groups": 1}, 2), ({"kv_groups": 1}, 2)],
    ids=["batch", "layers", "head size", "heads"],
)
def test_a_cache_of_another_model_or_batch_is_refused(changes, batch) -> None:
    cache = init_cache(build(**changes), batch)
    with pytest.raises(ValueError, match=r"make one with init_cache\(model, batch_size=2\)"):
        build()(draw(2, 4)[0], cache=cache)


def test_other_caches_and_masks_are_refused() -> None:
    model = build()
    tokens, mask = draw(2, 4)
    with pytest.raises(ValueError, match=r"in float32, this model and input need .* in bfloat16"):
        cast(model, jnp.bfloat16)(tokens, cache=init_cache(model, 2))
    with pytest.raises(ValueError, match="cache is a dict, must be a KVCache"):
        model(tokens, cache={})
    for bad in (mask.astype(int), mask[:, :3], np.ones((2, 4, 4), bool)):
        with pytest.raises(ValueError, match=r"with a cache it must be boolean of shape \(B, T\) = \(2, 4\)"):
            model(tokens, cache=init_cache(model, 2), attention_mask=bad)
    with pytest.raises(ValueError, match="positions have shape"):
        model(tokens, cache=init_cache(model, 2), positions=np.arange(5))


@pytest.mark.parametrize("bad", [-1, 31])
def test_token_ids_out_of_range(bad) -> None:
    model = build()
    tokens, cache = np.array([[1, bad], [4, 5]]), init_cache(model, 2)
    with pytest.raises(TokenIdError, match=rf"tokens\[0, 1\] = {bad} is not a token id"):
        model(tokens, cache=cache)
    logits, _ = jitted(model)(tokens, cache=cache)
    assert np.isnan(logits[0, 1]).all()
    assert np.isfinite(logits[1]).all()
    with pytest.raises(TokenIdError, match=f"{bad} is not a token id of this model: allowed are 0 to 30"):
        checked(jitted(model))(tokens, cache=cache)


def test_gradients_flow_through_a_cache(x64) -> None:
    """Unlike in torch, where the buffers are written in place."""
    model = cast(build(n_layers=1), jnp.float64)
    tokens, _ = draw(1, 5)

    def loss(table, chunked):
        embeddings = table[tokens]
        if not chunked:
            return jnp.sum(jnp.square(model(embeddings=embeddings)[:, 3:]))
        _, cache = model(embeddings=embeddings[:, :3], cache=init_cache(model, 1))
        return jnp.sum(jnp.square(model(embeddings=embeddings[:, 3:], cache=cache)[0]))

    chunked, full = (jax.jit(jax.grad(loss), static_argnums=1)(model.tok_emb.embedding[...], c) for c in (True, False))
    assert_same(chunked, full)


@pytest.mark.parametrize("window", [1, None, "yes"])
def test_the_window_is_true_or_false(window) -> None:
    with pytest.raises(ValueError, match=r"window=.* is not allowed: must be True or False"):
        init_cache(build(), 1, window=window)


def test_a_list_is_no_mask() -> None:
    model = build()
    with pytest.raises(ValueError, match="attention_mask is a list, must be a"):
        model(draw(1, 2)[0], cache=init_cache(model, 1), attention_mask=[[True, True]])
