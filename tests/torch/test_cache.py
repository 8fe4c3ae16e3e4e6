"""The KV cache: equal to the full forward in chunks of any length, padded or not, up to the last slot, and past it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from omni_torch.cache import KVCache, init_cache
from omni_torch.layers import TokenIdError
from omni_torch.thinker import ThinkerLM

SIZES = {"vocab_size": 31, "n_layers": 2, "d_model": 24, "n_heads": 4, "d_ff": 20, "dropout": 0.0, "ctx_len": 16}
KINDS = {
    "mha-swiglu": {},
    "gqa-swiglu": {"use_gqa": True},
    "moe-gqa-gelu": {"use_moe": True, "num_experts": 3, "use_gqa": True, "kv_groups": 1, "use_swiglu": False},
}
EPS = torch.finfo(torch.float64).eps


def build(kind: str = "gqa-swiglu", **changes) -> ThinkerLM:
    torch.manual_seed(0)
    return ThinkerLM(**(SIZES | KINDS[kind] | changes)).double().eval()


def draw(batch: int, time: int, padding: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and a mask that leaves out the first `padding[row]` ones."""
    tokens = torch.randint(1, 31, (batch, time), generator=torch.Generator().manual_seed(time))
    left = torch.tensor([*padding, *[0] * batch])[:batch]
    return tokens, torch.arange(time)[None] >= left[:, None]


def in_chunks(model, tokens, chunk, cache, mask=None, **kwargs) -> torch.Tensor:
    parts = []
    for at in range(0, tokens.shape[1], chunk):
        here = slice(at, at + chunk)
        more = {} if mask is None else {"attention_mask": mask[:, here]}
        logits, same = model(tokens[:, here], cache=cache, **more, **kwargs)
        assert same is cache
        parts.append(logits)
    return torch.cat(parts, dim=1)


def banded(mask: torch.Tensor, width: int) -> torch.Tensor:
    """(B, T, T): each query sees the last `width` tokens, itself included, that the mask keeps."""
    step = torch.arange(mask.shape[1])
    return (step[None] > step[:, None] - width) & mask[:, None]


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal up to the rounding of two layers: sums of at most 24 terms, some ten of them in a row."""
    assert a.dtype == b.dtype == torch.float64
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= 10 * 24 * EPS * float(b.abs().max())


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 3, 7, 16])
@pytest.mark.parametrize("padding", [None, (5, 0, 16)])  # the third row is all padding
def test_equals_the_full_forward_up_to_the_last_slot(kind, chunk, padding) -> None:
    model = build(kind)
    tokens, mask = draw(3, 16, padding or ())
    mask = None if padding is None else mask
    cache = init_cache(model, 3)
    assert_same(in_chunks(model, tokens, chunk, cache, mask), model(tokens, attention_mask=mask))
    assert cache.length == 16
    assert cache.count.tolist() == ([16, 16, 16] if mask is None else [11, 16, 0])


def test_unequal_prompts_decode_as_each_alone() -> None:
    model = build()
    tokens, mask = draw(2, 12, (5, 0))
    cache = init_cache(model, 2)
    both = torch.cat(
        [model(tokens[:, :8], attention_mask=mask[:, :8], cache=cache)[0], in_chunks(model, tokens[:, 8:], 1, cache)],
        dim=1,
    )
    assert_same(both[:1, 5:], model(tokens[:1, 5:]))
    assert_same(both[1:], model(tokens[1:]))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    chunks=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    slots=st.integers(6, 12),
    window=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_chunks_any_holes(batch, chunks, slots, window, seed) -> None:
    model, time = build(), sum(chunks)
    slots = slots if window else max(slots, time)
    tokens, _ = draw(batch, time)
    mask = torch.rand(batch, time, generator=torch.Generator().manual_seed(seed)) > 0.3
    cache, parts, at = init_cache(model, batch, slots, window), [], 0
    for chunk in chunks:
        here = slice(at, at + chunk)
        parts.append(model(tokens[:, here], attention_mask=mask[:, here], cache=cache)[0])
        at += chunk
    full = model(tokens, attention_mask=banded(mask, slots), positions=positions_of(mask))
    assert_same(torch.cat(parts, dim=1), full)


@pytest.mark.parametrize("chunk", [1, 2, 5, 7])
def test_window_sees_the_last_slots_and_goes_on_for_ever(chunk) -> None:
    model = build()
    tokens, mask = draw(2, 40, (9, 0))  # 9: a window of nothing but padding
    cache = init_cache(model, 2, 7, window=True)
    full = model(tokens, attention_mask=banded(mask, 7), positions=positions_of(mask))
    assert_same(in_chunks(model, tokens, chunk, cache, mask), full)
    assert cache.length == 40
    assert not torch.equal(full, model(tokens, attention_mask=mask, positions=positions_of(mask)))


def test_chunk_longer_than_the_window() -> None:
    model = build()
    with pytest.raises(ValueError, match="8 tokens in one call are more than the window's max_length=7 slots"):
        model(draw(1, 8)[0], cache=init_cache(model, 1, 7, window=True))


def test_a_full_cache_is_an_error_and_stays_as_it_was() -> None:
    model = build()
    tokens, _ = draw(2, 16)
    cache = init_cache(model, 2)
    model(tokens[:, :15], cache=cache)
    before = [x.clone() for x in (*cache.k, *cache.v, cache.kept, cache.count)]
    with pytest.raises(ValueError, match=r"holds 15 tokens, and 2 more do not fit into max_length=16.*window=True"):
        model(tokens[:, :2], cache=cache)
    assert cache.length == 15
    assert all(map(torch.equal, before, (*cache.k, *cache.v, cache.kept, cache.count)))
    assert_same(model(tokens[:, 15:], cache=cache)[0], model(tokens)[:, 15:])
    with pytest.raises(ValueError, match="holds 16 tokens"):
        model(tokens[:, :1], cache=cache)


def test_a_longer_cache_goes_beyond_ctx_len() -> None:
    model = build()
    tokens, _ = draw(1, 21)
    full = model(tokens, positions=torch.arange(21))
    assert_same(in_chunks(model, tokens, 4, init_cache(model, 1, 21)), full)


def test_embeddings_positions_and_last_only() -> None:
    model = build()
    tokens, _ = draw(2, 9)
    positions = torch.arange(9) * 3
    full = model(tokens, positions=positions)
    cache = init_cache(model, 2)
    model(embeddings=model.tok_emb(tokens[:, :5]), positions=positions[:5], cache=cache)
    last, _ = model(tokens[:, 5:], positions=positions[5:], cache=cache, last_only=True)
    assert_same(last, full[:, -1:])
    assert_same(model(tokens, positions=positions, last_only=True), full[:, -1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_has_the_models_dtype_and_unrepeated_heads(dtype) -> None:
    model = build("moe-gqa-gelu").to(dtype)
    cache = init_cache(model, 3, 5)
    assert [f.name for f in dataclasses.fields(cache)] == ["k", "v", "kept", "count", "length", "window"]
    assert all(x.dtype == dtype and x.shape == (3, 5, 1, 6) for x in (*cache.k, *cache.v))
    buffers = [x.data_ptr() for x in (*cache.k, *cache.v)]
    logits, _ = model(draw(3, 4)[0], cache=cache)
    assert logits.dtype == dtype
    assert [x.data_ptr() for x in (*cache.k, *cache.v)] == buffers  # written in place


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
    with pytest.raises(ValueError, match=r"in float64 on cpu, this model and input need .* in float32"):
        build().float()(tokens, cache=init_cache(model, 2))
    with pytest.raises(ValueError, match="cache is a dict, must be a KVCache"):
        model(tokens, cache={})
    for bad in (mask.int(), mask[:, :3], mask[:, None].expand(2, 4, 4)):
        with pytest.raises(ValueError, match=r"with a cache it must be boolean of shape \(B, T\) = \(2, 4\)"):
            model(tokens, cache=init_cache(model, 2), attention_mask=bad)
    with pytest.raises(ValueError, match="positions have shape"):
        model(tokens, cache=init_cache(model, 2), positions=torch.arange(5))


@pytest.mark.parametrize("bad", [-1, 31])
def test_token_ids_are_checked_before_anything_is_written(bad) -> None:
    model = build()
    cache = init_cache(model, 1)
    with pytest.raises(TokenIdError, match=rf"tokens\[0, 1\] = {bad} is not a token id"):
        model(torch.tensor([[1, bad]]), cache=cache)
    assert cache.length == 0


def test_no_gradient_and_inference_mode() -> None:
    model = build()
    tokens, _ = draw(1, 6)
    with torch.inference_mode():
        cache = init_cache(model, 1)
        model(tokens[:, :3], cache=cache)
    with torch.enable_grad():  # the same buffers outside it
        logits, _ = model(tokens[:, 3:], cache=cache)
        full = model(tokens)
    assert not logits.requires_grad
    assert full.requires_grad
    assert not any(x.requires_grad for x in (*cache.k, *cache.v))
    assert_same(logits, full.detach()[:, 3:])


def test_dropout_in_training_works_with_a_cache() -> None:
    model = build(dropout=0.5)
    tokens, _ = draw(1, 6)
    quiet = in_chunks(model, tokens, 1, init_cache(model, 1))
    model.train()
    assert not torch.equal(in_chunks(model, tokens, 1, init_cache(model, 1)), quiet)


def test_a_decode_step_compiles_as_one_graph() -> None:
    model = build()
    tokens, mask = draw(2, 10, (3, 0))
    step = torch.compile(
        lambda tokens, cache: model(tokens, cache=cache, last_only=True), fullgraph=True, backend="eager"
    )
    caches = init_cache(model, 2), init_cache(model, 2)
    for cache in caches:
        model(tokens[:, :5], attention_mask=mask[:, :5], cache=cache)
    for at in range(5, 10):
        logits, cache = step(tokens[:, at : at + 1], caches[0])
        assert cache is caches[0]
        assert_same(logits, model(tokens[:, at : at + 1], cache=caches[1])[0])
    assert isinstance(caches[0], KVCache)
    assert caches[0].length == 10


@pytest.mark.parametrize("window", [1, None, "yes"])
def test_the_window_is_true_or_false(window) -> None:
    with pytest.raises(ValueError, match=r"window=.* is not allowed: must be True or False"):
        init_cache(build(), 1, window=window)


def test_a_list_is_no_mask() -> None:
    model = build()
    with pytest.raises(ValueError, match="attention_mask is a list, must be a"):
        model(draw(1, 2)[0], cache=init_cache(model, 1), attention_mask=[[True, True]])


def test_a_ring_compiles_a_few_times() -> None:
    """Not once for each slot: the steps until it is full, and those after."""
    torch._dynamo.reset()
    model, counter = build(), CompileCounter()
    step = torch.compile(lambda tokens, cache: model(tokens, cache=cache), fullgraph=True, backend=counter)
    tokens, mask = draw(2, 25)
    cache, parts = init_cache(model, 2, 6, window=True), []
    for at in range(25):
        parts.append(step(tokens[:, at : at + 1], cache)[0])
    assert_same(torch.cat(parts, dim=1), model(tokens, attention_mask=banded(mask, 6), positions=torch.arange(25)))
    assert counter.frame_count <= 4
