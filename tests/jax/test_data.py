"""Datasets, padding and masks, loaders, token batches: the promises, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.data import (
    DataLoader,
    NextTokenDataset,
    PaddedBatch,
    RandomCropSequenceDataset,
    TensorPairDataset,
    collate_next_token_batch,
    epoch_order,
    make_dataloader,
    pad_1d_sequences,
    prefetch_to_device,
    token_batch,
    token_stream,
)

INTEGERS = [np.uint8, np.int8, np.int16, np.int32, np.int64]
# The same in tests/torch/test_data.py: what the bytes are, whatever numpy's version.
ORDER_HASH = "c5bac1a28a56df81"
BATCH_HASH = "16c1632c9636a74e"


def short_hash(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:16]


def corpus() -> np.ndarray:
    documents = [[3 + (7 * i * i + j) % 47 for j in range(1 + i % 11)] for i in range(40)]
    return token_stream(documents, bos_id=1, eos_id=2)


def counting(n_rows: int, length: int) -> np.ndarray:
    """Rows 0 … length − 1: the first token of a crop is its start."""
    return np.tile(np.arange(length), (n_rows, 1))


# --- datasets --------------------------------------------------------------------------------------------------------


def test_pairs() -> None:
    x, y = np.random.default_rng(0).normal(size=(5, 2, 3)), np.arange(5)
    dataset = TensorPairDataset(x, y)
    assert len(dataset) == 5
    for i in (0, 4, np.int64(2), jnp.array(3)):
        item = dataset[i]
        assert isinstance(item, tuple)
        assert np.array_equal(item[0], x[int(i)])
        assert np.array_equal(item[1], y[int(i)])
    assert np.array_equal(dataset[-1][0], x[4])
    assert [int(b) for _, b in dataset] == [0, 1, 2, 3, 4]  # ends by IndexError


@pytest.mark.parametrize("idx", [5, -6])
def test_an_index_out_of_range_is_named(idx) -> None:
    for dataset in (
        TensorPairDataset(np.zeros(5), np.zeros(5)),
        NextTokenDataset(counting(5, 4)),
        RandomCropSequenceDataset(counting(5, 4), 2),
    ):
        with pytest.raises(IndexError, match=rf"index {idx} .* 5 items; use -5 … 4"):
            dataset[idx]


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (np.zeros((3, 2)), np.zeros(4), "x has 3 items, y has 4"),
        (np.zeros((0, 2)), np.zeros(0), "no items"),
        (np.array(1.0), np.zeros(1), "x has no axes"),
        (np.zeros(1), np.array(1.0), "y has no axes"),
    ],
)
def test_pairs_that_are_none(x, y, words) -> None:
    with pytest.raises(ValueError, match=words):
        TensorPairDataset(x, y)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_next_token(dtype) -> None:
    tokens = np.array([[1, 5, 9, 2], [1, 7, 0, 0]], dtype=dtype)
    dataset = NextTokenDataset(tokens)
    assert len(dataset) == 2
    inputs, targets = dataset[-1]
    assert inputs.tolist() == [1, 7, 0]
    assert targets.tolist() == [7, 0, 0]
    assert inputs.dtype == targets.dtype == dtype
    assert inputs.shape == targets.shape == (3,)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (np.zeros((3, 4)), "must be .N, T. integers"),
        (np.zeros((3, 4), bool), "must be .N, T. integers"),
        (np.zeros(4, np.int64), "must be .N, T. integers"),
        (np.zeros((0, 4), np.int64), "no rows"),
        (np.zeros((3, 0), np.int64), "T must be at least"),
    ],
)
def test_tokens_that_are_none(tokens, words) -> None:
    for make in (NextTokenDataset, lambda tokens: RandomCropSequenceDataset(tokens, 1)):
        with pytest.raises(ValueError, match=words):
            make(tokens)


def test_one_token_has_no_next() -> None:
    with pytest.raises(ValueError, match="T must be at least 2"):
        NextTokenDataset(np.zeros((3, 1), np.int64))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_a_crop_is_a_piece_of_its_row(dtype) -> None:
    tokens = (np.arange(60).reshape(3, 20) * 2).astype(dtype)
    dataset = RandomCropSequenceDataset(tokens, 7, seed=1)
    assert len(dataset) == 3
    for i in (0, 1, -1):
        crop = dataset[i]
        start = (int(crop[0]) - int(tokens[i, 0])) // 2
        assert crop.dtype == dtype
        assert np.array_equal(crop, tokens[i, start : start + 7])


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("seed", [None, 0])
def test_every_start_is_reached_and_no_other(seed, told) -> None:
    dataset = RandomCropSequenceDataset(counting(1, 9), 4, seed=seed)
    starts = set()
    for access in range(300):
        if told:
            dataset.set_epoch(access)
        crop = dataset[0]
        assert crop.shape == (4,)
        starts.add(int(crop[0]))
    assert starts == {0, 1, 2, 3, 4, 5}


def test_a_crop_of_the_whole() -> None:
    assert RandomCropSequenceDataset(counting(1, 5), 5, seed=0)[0].tolist() == [0, 1, 2, 3, 4]


def test_a_seed_repeats_the_crops() -> None:
    def crops(seed: int) -> list[int]:
        dataset = RandomCropSequenceDataset(counting(4, 100), 3, seed)
        return [int(dataset[i % 4][0]) for i in range(40)]

    assert crops(3) == crops(3)
    assert crops(3) != crops(4)
    assert len(set(crops(3))) > 10  # it advances


def test_told_the_epoch_a_crop_is_a_pure_function() -> None:
    first, second = (RandomCropSequenceDataset(counting(9, 1000), 3, seed=5) for _ in range(2))
    first.set_epoch(2)
    for i in range(9):
        second[i]
    second.set_epoch(2)
    forwards = [int(first[i][0]) for i in range(9)]
    backwards = [int(second[i][0]) for i in reversed(range(9))]
    assert forwards == backwards[::-1] == [int(first[i - 9][0]) for i in range(9)]
    second.set_epoch(3)
    assert [int(second[i][0]) for i in range(9)] != forwards
    assert len(set(forwards)) > 5


@pytest.mark.parametrize(
    ("crop_len", "seed", "words"),
    [
        (6, None, "crop_len=6 is more than the 5 tokens"),
        (0, None, "crop_len=0 must be at least 1"),
        (-1, None, "crop_len=-1 must be at least 1"),
        (2.0, None, "crop_len is a float, must be an integer"),
        (2, -1, "seed=-1 is outside"),
        (2, 2**64, "seed=18446744073709551616 is outside"),
        (2, 1.5, "seed is a float"),
    ],
)
def test_crops_that_are_none(crop_len, seed, words) -> None:
    with pytest.raises(ValueError, match=words):
        RandomCropSequenceDataset(counting(2, 5), crop_len, seed)


# --- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("pad_value", [0, 7, -100])
def test_padding(dtype, pad_value) -> None:
    seqs = [np.array(ids, dtype=dtype) for ids in ([5, 0, 7], [7], [0, 0, 0, 0])]
    batch = pad_1d_sequences(seqs, pad_value)
    assert batch.tokens.tolist() == [[5, 0, 7, pad_value], [7, *[pad_value] * 3], [0, 0, 0, 0]]
    assert batch.lengths.tolist() == [3, 1, 4]
    for b in range(3):  # by the lengths: the zeros and sevens above are tokens
        for t in range(4):
            assert bool(batch.padding_mask[b, t]) == (t >= int(batch.lengths[b]))
    assert (batch.tokens.dtype, batch.lengths.dtype, batch.padding_mask.dtype) == (np.int32, np.int32, np.bool_)
    assert [seq.tolist() for seq in seqs] == [[5, 0, 7], [7], [0, 0, 0, 0]]
    batch.tokens.fill(1)
    assert seqs[2].tolist() == [0, 0, 0, 0]  # its own memory


def test_a_padded_batch_is_frozen() -> None:
    batch = pad_1d_sequences([np.array([1])])
    assert [field.name for field in dataclasses.fields(PaddedBatch)] == ["tokens", "lengths", "padding_mask"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.tokens = batch.lengths  # type: ignore[misc]


@pytest.mark.parametrize(
    ("seqs", "words"),
    [
        ([], "no sequences"),
        ([np.array([1]), np.array([], np.int64)], r"seqs\[1\] has length 0"),
        ([np.array([1.0])], r"seqs\[0\] has shape \(1,\) and dtype float64"),
        ([np.array([True])], "must be a 1-D array of integers"),
        ([np.array([[1]])], r"seqs\[0\] has shape \(1, 1\)"),
        ([np.array(1)], r"seqs\[0\] has shape \(\)"),
        ([[1, 2]], r"seqs\[0\] is a list"),
        (None, "seqs is a NoneType"),
        ([np.array([2**63], np.uint64)], r"seqs\[0\] holds 9223372036854775808"),
        ([np.array([1]), np.array([2**64 - 1], np.uint64)], r"seqs\[1\] holds 18446744073709551615"),
        ([np.array([-(2**31) - 1])], r"seqs\[0\] holds -2147483649"),
    ],
)
def test_sequences_that_are_none(seqs, words) -> None:
    with pytest.raises(ValueError, match=words):
        pad_1d_sequences(seqs)


@pytest.mark.parametrize("pad_value", [2**70, -(2**70)])
def test_a_pad_value_that_does_not_fit_is_refused(pad_value) -> None:
    with pytest.raises(ValueError, match=f"pad_value={pad_value} is outside"):
        pad_1d_sequences([np.array([1])], pad_value)


def test_arrays_on_the_device_are_fetched() -> None:
    seqs = [jnp.array([5, 0, 7]), jnp.array([8], jnp.uint8)]
    host, device = (pad_1d_sequences(which, 9) for which in ([np.asarray(seq) for seq in seqs], seqs))
    assert isinstance(device.tokens, np.ndarray)
    assert device.tokens.tolist() == host.tokens.tolist() == [[5, 0, 7], [8, 9, 9]]
    batch = collate_next_token_batch([(jnp.array([1, 5]), jnp.array([5, 9])), (jnp.array([1]),) * 2])
    assert batch["input_ids"].tolist() == [[1, 5], [1, 0]]
    with pytest.raises(ValueError, match=r"seqs\[0\] has shape \(1,\) and dtype float32"):
        pad_1d_sequences([jnp.array([1.0])])


def test_no_list_of_pairs_is_no_batch() -> None:
    with pytest.raises(ValueError, match="batch is a NoneType"):
        collate_next_token_batch(None)  # type: ignore[arg-type]


def test_lists_are_arrays_here() -> None:
    assert TensorPairDataset([1], [2])[0] == (1, 2)  # type: ignore[arg-type]
    assert [part.tolist() for part in NextTokenDataset([[1, 2]])[0]] == [[1], [2]]  # type: ignore[arg-type]


def test_a_pad_value_is_an_integer() -> None:
    with pytest.raises(ValueError, match="pad_value is a float"):
        pad_1d_sequences([np.array([1])], 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("pad_value", [0, 9])
def test_collate(pad_value) -> None:
    rows = [np.array([[1, 0, 9, 2]], dtype=np.int32), np.array([[1, 9]], dtype=np.int32)]
    batch = collate_next_token_batch([NextTokenDataset(row)[0] for row in rows], pad_value)
    assert list(batch) == ["input_ids", "target_ids", "attention_mask", "padding_mask"]
    assert batch["input_ids"].tolist() == [[1, 0, 9], [1, pad_value, pad_value]]
    assert batch["target_ids"].tolist() == [[0, 9, 2], [9, pad_value, pad_value]]
    assert batch["attention_mask"].tolist() == [[True, True, True], [True, False, False]]
    assert np.array_equal(batch["padding_mask"], ~batch["attention_mask"])
    assert batch["input_ids"].dtype == batch["target_ids"].dtype == np.int32
    assert batch["attention_mask"].dtype == batch["padding_mask"].dtype == np.bool_


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ([], "batch has no items"),
        ([(np.array([1, 2]), np.array([1]))], r"batch\[0\] has 2 input_ids and 1 target_ids"),
        ([(np.array([1]),)], r"batch\[0\] must be a pair"),
        ([np.array([1, 2])], r"batch\[0\] must be a pair"),
        ([(np.array([]), np.array([]))], r"input_ids of batch\[0\]"),
        ([(np.array([1]), np.array([1.0]))], r"target_ids of batch\[0\]"),
        ([(np.zeros(0, np.int64),) * 2], "length 0"),
    ],
)
def test_batches_that_are_none(batch, words) -> None:
    with pytest.raises(ValueError, match=words):
        collate_next_token_batch(batch)


# --- loader ----------------------------------------------------------------------------------------------------------


def numbered(n: int) -> TensorPairDataset:
    return TensorPairDataset(np.arange(n), np.arange(n) * 10)


def visited(loader) -> list[int]:
    return [int(i) for x, _ in loader for i in x]


def test_a_seeded_loader_follows_epoch_order_and_advances() -> None:
    loader = make_dataloader(numbered(11), 4, seed=3)
    assert isinstance(loader, DataLoader)
    assert len(loader) == 3
    for epoch in range(3):
        assert visited(loader) == epoch_order(11, 3, epoch).tolist()
    loader.set_epoch(1)
    for epoch in (1, 2):
        assert visited(loader) == epoch_order(11, 3, epoch).tolist()


def test_batches_are_stacked_leaf_by_leaf() -> None:
    x, y = next(iter(make_dataloader(numbered(4), 3, shuffle=False)))
    assert x.tolist() == [0, 1, 2]
    assert y.tolist() == [0, 10, 20]


@pytest.mark.parametrize("seed", [None, 0])
def test_in_order_and_drop_last(seed) -> None:
    assert visited(make_dataloader(numbered(5), 2, shuffle=False, seed=seed)) == [0, 1, 2, 3, 4]
    loader = make_dataloader(numbered(5), 2, shuffle=False, drop_last=True, seed=seed)
    assert len(loader) == 2
    assert visited(loader) == [0, 1, 2, 3]


def test_a_seeded_loader_tells_the_epoch() -> None:
    loader = make_dataloader(RandomCropSequenceDataset(counting(6, 1000), 3, seed=1), 2, seed=0)
    epochs = [[crop.tolist() for crop in loader] for _ in range(2)]
    assert epochs[0] != epochs[1]
    loader.set_epoch(1)
    assert [crop.tolist() for crop in loader] == epochs[1]


def test_collate_fn_is_used() -> None:
    lengths = [3, 5, 2]
    items = [(np.ones(n, np.int64),) * 2 for n in lengths]
    loader = make_dataloader(items, 3, collate_fn=collate_next_token_batch, seed=0)
    (batch,) = list(loader)
    assert batch["attention_mask"].sum(1).tolist() == [lengths[i] for i in epoch_order(3, 0, 0)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"batch_size": 1.0}, "batch_size is a float"),
        ({"batch_size": 6, "drop_last": True}, "leaves no batch of 5 items"),
        ({"batch_size": 2, "num_workers": -1}, "num_workers=-1 must be at least 0"),
        ({"batch_size": 2, "seed": -1}, "seed=-1 is outside"),
    ],
)
def test_loaders_that_are_none(arguments, words) -> None:
    with pytest.raises(ValueError, match=words):
        make_dataloader(numbered(5), **arguments)


def test_an_empty_dataset_has_no_loader() -> None:
    with pytest.raises(ValueError, match="no items"):
        make_dataloader([], 2)  # type: ignore[arg-type]


def sleepy(items):
    """Later items are ready sooner."""
    time.sleep(0.002 * (10 - len(items)) if items[0][0] % 2 else 0.0)
    return [int(x) for x, _ in items]


@pytest.mark.parametrize("num_workers", [1, 2, 5, 50])
def test_threads_keep_the_order(num_workers) -> None:
    plain = make_dataloader(numbered(23), 4, seed=3, collate_fn=sleepy)
    threaded = make_dataloader(numbered(23), 4, seed=3, collate_fn=sleepy, num_workers=num_workers)
    for _ in range(2):
        assert list(threaded) == list(plain)


def test_a_batch_is_a_pure_function_of_seed_epoch_and_step() -> None:
    crops = RandomCropSequenceDataset(counting(7, 1000), 3, seed=1)
    loader = make_dataloader(crops, 3, seed=5)
    epochs = [[crop.tolist() for crop in loader] for _ in range(3)]
    for num_workers in (0, 3):
        other = DataLoader(crops, 3, seed=5, num_workers=num_workers)
        for epoch in (2, 0):
            for step in (2, 0, 1):
                assert other.batch(epoch, step).tolist() == epochs[epoch][step]
        assert other.epoch == 0
        other.set_epoch(1)
        assert [crop.tolist() for crop in other] == epochs[1]
        assert [crop.tolist() for crop in other] == epochs[2]
    assert epochs[0] != epochs[1]
    before = RandomCropSequenceDataset(counting(7, 1000), 3, seed=1)
    assert [int(crops[i][0]) for i in range(7)] == [int(before[i][0]) for i in range(7)]


@pytest.mark.parametrize("step", [-1, 3])
def test_a_step_out_of_range_is_named(step) -> None:
    with pytest.raises(IndexError, match=f"step={step} is outside an epoch of 3 batches; use 0 … 2"):
        make_dataloader(numbered(7), 3, seed=0).batch(0, step)


def test_without_a_seed_orders_differ_from_loader_to_loader() -> None:
    first, second = (make_dataloader(numbered(50), 7) for _ in range(2))
    orders = [visited(first), visited(first), visited(second)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    first.set_epoch(0)
    assert visited(first) == orders[0]


def test_crops_without_a_seed_differ() -> None:
    starts = [[int(RandomCropSequenceDataset(counting(1, 10**6), 3)[0][0])] for _ in range(3)]
    assert len(set(map(tuple, starts))) == 3


class Failing(TensorPairDataset):
    """Item 5 cannot be read."""

    def __getitem__(self, idx):
        if idx == 5:
            raise OSError("item 5 is gone")
        return super().__getitem__(idx)


@pytest.mark.parametrize("num_workers", [0, 1, 4])
@pytest.mark.parametrize("prefetch", [None, 1, 3])
def test_an_exception_comes_after_the_batches_before_it(num_workers, prefetch) -> None:
    loader = make_dataloader(Failing(np.arange(12), np.arange(12)), 2, shuffle=False, num_workers=num_workers)
    batches = iter(loader) if prefetch is None else prefetch_to_device(loader, prefetch)
    seen = []
    with pytest.raises(OSError, match="item 5 is gone"):
        seen.extend(x.tolist() for x, _ in batches)
    assert seen == [[0, 1], [2, 3]]
    assert list(batches) == []
    assert not threads()


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("DataLoader")]


@pytest.mark.parametrize("prefetch", [False, True])
def test_who_stops_early_leaves_nothing_running(prefetch) -> None:
    loader = make_dataloader(numbered(1000), 1, num_workers=3, seed=0)
    batches = prefetch_to_device(loader) if prefetch else iter(loader)
    next(batches)
    assert threads()
    del batches
    assert not threads()


def test_stacking_keeps_structure_and_refuses_unequal_shapes() -> None:
    items = [{"a": np.full(2, i, np.int8), "b": (i, np.float32(i))} for i in range(3)]
    (batch,) = list(make_dataloader(items, 3, shuffle=False))
    assert batch["a"].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert batch["a"].dtype == np.int8
    assert batch["b"][0].tolist() == [0, 1, 2]
    assert batch["b"][1].dtype == np.float32
    with pytest.raises(ValueError, match="give a collate_fn that pads"):
        list(make_dataloader([np.zeros(2), np.zeros(3)], 2))


# --- the device ------------------------------------------------------------------------------------------------------


def test_prefetch_gives_any_pytree_on_the_device() -> None:
    source = [pad_1d_sequences([np.arange(1, n + 1), np.array([4])]) for n in (1, 2, 3)]
    device = jax.devices()[0]
    for batch, given in zip(prefetch_to_device(source, device=device), source, strict=True):
        assert isinstance(batch, PaddedBatch)
        for name in ("tokens", "lengths", "padding_mask"):
            leaf = getattr(batch, name)
            assert isinstance(leaf, jax.Array)
            assert leaf.devices() == {device}
            assert np.array_equal(leaf, getattr(given, name))
            assert leaf.dtype == getattr(given, name).dtype


@pytest.mark.parametrize("size", [1, 2, 5])
def test_prefetch_runs_so_far_ahead_and_no_farther(size) -> None:
    taken = []
    source = (taken.append(i) or np.array(i) for i in range(20))
    batches = prefetch_to_device(source, size)
    assert taken == []
    for i in range(20):
        assert int(next(batches)) == i
        assert len(taken) == min(20, i + 1 + size)
    assert next(batches, None) is None


def test_prefetch_does_not_share_memory_with_its_source() -> None:
    """jax.device_put keeps an aligned numpy array's own memory on the CPU, may_alias=False or not."""
    buffers = [np.zeros((257, 64), np.float32) for _ in range(8)]

    def source():
        for i in range(40):
            buffer = buffers[i % 8]
            buffer[:] = i
            yield buffer

    for i, batch in enumerate(prefetch_to_device(source(), 3)):
        assert np.array_equal(batch, np.full((257, 64), i, np.float32))


def test_prefetch_leaves_what_is_on_a_device() -> None:
    batch = jnp.arange(3)
    (out,) = prefetch_to_device([batch])
    assert out.unsafe_buffer_pointer() == batch.unsafe_buffer_pointer()


@pytest.mark.parametrize("size", [0, -1, 1.0])
def test_prefetch_of_nothing_is_refused_at_once(size) -> None:
    with pytest.raises(ValueError, match="size"):
        prefetch_to_device([], size)
    assert list(prefetch_to_device([], 1)) == []


def test_ids_beyond_int32_are_refused() -> None:
    for seqs, pad in (
        ([np.array([2**31])], 0),
        ([np.array([1]), np.array([1, 2])], 2**40),
        ([np.array([2**63], np.uint64)], 0),
    ):
        with pytest.raises(ValueError, match="outside -2"):
            pad_1d_sequences(seqs, pad)


# --- orders, streams, batches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
@pytest.mark.parametrize("epoch", [0, 1, 2**63])
def test_an_order_is_a_permutation(n, epoch) -> None:
    order = epoch_order(n, 0, epoch)
    assert sorted(order.tolist()) == list(range(n))
    assert np.array_equal(order, epoch_order(n, 0, epoch))


def test_orders_differ() -> None:
    seen = {tuple(epoch_order(100, seed, epoch)) for seed in (0, 1, 2**64 - 1) for epoch in (0, 1, 2**63)}
    assert len(seen) == 9


def test_a_stream() -> None:
    ids = token_stream([[5, 6], [], (7,), np.array([8], np.int64)], 1, 2)
    assert ids.tolist() == [1, 5, 6, 2, 1, 2, 1, 7, 2, 1, 8, 2]
    assert ids.dtype == np.int32
    assert token_stream(iter([[2**31 - 1]]), 0, 0).tolist() == [0, 2**31 - 1, 0]


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        ([], "documents: there is none"),
        ([[5], [1.5]], r"documents\[1\] holds float64"),
        (["text"], r"documents\[0\] holds <U4"),
        ([[5, -1]], r"documents\[0\] holds the id -1"),
        ([[2**31]], "holds the id 2147483648"),
    ],
)
def test_streams_that_are_none(documents, words) -> None:
    with pytest.raises(ValueError, match=words):
        token_stream(documents, 1, 2)


@pytest.mark.parametrize("step", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_rows_start_at_a_document(step) -> None:
    ids = corpus()
    rows = token_batch(ids, 16, 9, 0, step)
    assert rows.shape == (16, 9)
    assert rows.dtype == np.int32
    assert (rows[:, 0] == 1).all()
    text = ids.tolist()
    pieces = {tuple(text[i : i + 9]) for i in range(len(text) - 8)}
    assert all(tuple(row) in pieces for row in rows.tolist())
    assert np.array_equal(rows[:5], token_batch(ids, 5, 9, 0, step))  # a row does not depend on the others


def test_every_document_is_reached_and_batches_differ() -> None:
    ids = corpus()
    text = ids.tolist()
    pieces = {tuple(text[i : i + 9]) for i in range(len(text) - 8) if text[i] == 1}
    rows = {tuple(row) for step in range(60) for row in token_batch(ids, 8, 9, 0, step).tolist()}
    assert rows == pieces
    seen = {token_batch(ids, 8, 9, seed, step).tobytes() for seed in range(3) for step in (0, 1, 2**63, 2**63 + 1)}
    assert len(seen) == 12


def test_without_an_early_document_rows_start_anywhere() -> None:
    ids = np.arange(3, 40)
    firsts = {int(row[0]) for step in range(40) for row in token_batch(ids, 8, 30, 0, step)}
    assert firsts == set(range(3, 11))
    assert token_batch(ids, 2, len(ids), 0, 0).tolist() == [ids.tolist()] * 2


@pytest.mark.parametrize("dtype", [np.uint16, np.int64, np.int32])
def test_a_batch_is_int32_whatever_the_ids_are(dtype) -> None:
    rows = token_batch(corpus().astype(dtype), 4, 9, 0, 0)
    assert rows.dtype == np.int32
    assert np.array_equal(rows, token_batch(corpus(), 4, 9, 0, 0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"length": 1000}, "length=1000 is more than the .* ids at hand; shorten the rows or add text"),
        ({"length": 0}, "length=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"ids": np.ones(9)}, "must be 1-D integers"),
        ({"ids": np.ones((9, 9), np.int32)}, "must be 1-D integers"),
        ({"ids": np.array([], np.int32)}, "more than the 0 ids"),
        ({"ids": np.array([1, -5])}, "holds the id -5"),
        ({"seed": -1}, "seed=-1 is outside"),
        ({"step": -1}, "step=-1 is outside"),
        ({"step": 2**64}, "step=18446744073709551616 is outside"),
        ({"step": 1.0}, "step is a float"),
    ],
)
def test_token_batches_that_are_none(changes, words) -> None:
    with pytest.raises(ValueError, match=words):
        token_batch(**{"ids": corpus(), "batch_size": 2, "length": 2, "seed": 0, "step": 0, **changes})


@pytest.mark.parametrize(("n", "words"), [(0, "n=0 must be at least 1"), (-1, "n=-1"), (1.0, "n is a float")])
def test_orders_that_are_none(n, words) -> None:
    with pytest.raises(ValueError, match=words):
        epoch_order(n, 0, 0)


def test_the_bytes_are_these() -> None:
    assert short_hash(*(epoch_order(37, s, e) for s in (0, 5) for e in (0, 1, 2**63))) == ORDER_HASH
    assert short_hash(*(token_batch(corpus(), 4, 9, s, t) for s in (0, 5) for t in (0, 1, 2**63))) == BATCH_HASH
