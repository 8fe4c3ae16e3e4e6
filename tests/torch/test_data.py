"""Datasets, padding and masks, loaders, token batches: the promises, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset

from omni_torch.data import (
    NextTokenDataset,
    PaddedBatch,
    RandomCropSequenceDataset,
    TensorPairDataset,
    collate_next_token_batch,
    epoch_order,
    make_dataloader,
    pad_1d_sequences,
    token_batch,
    token_stream,
)

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
# The same in tests/jax/test_data.py: what the bytes are, whatever numpy's version.
ORDER_HASH = "c5bac1a28a56df81"
BATCH_HASH = "16c1632c9636a74e"


def short_hash(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:16]


def corpus() -> np.ndarray:
    documents = [[3 + (7 * i * i + j) % 47 for j in range(1 + i % 11)] for i in range(40)]
    return token_stream(documents, bos_id=1, eos_id=2)


def counting(n_rows: int, length: int) -> torch.Tensor:
    """Rows 0 … length − 1: the first token of a crop is its start."""
    return torch.arange(length).repeat(n_rows, 1)


# --- datasets --------------------------------------------------------------------------------------------------------


def test_pairs() -> None:
    x, y = torch.randn(5, 2, 3), torch.arange(5)
    dataset = TensorPairDataset(x, y)
    assert len(dataset) == 5
    for i in (0, 4, np.int64(2), torch.tensor(3)):
        item = dataset[i]
        assert isinstance(item, tuple)
        assert torch.equal(item[0], x[int(i)])
        assert torch.equal(item[1], y[int(i)])
    assert torch.equal(dataset[-1][0], x[4])
    assert [int(b) for _, b in dataset] == [0, 1, 2, 3, 4]  # ends by IndexError


@pytest.mark.parametrize("idx", [5, -6])
def test_an_index_out_of_range_is_named(idx) -> None:
    for dataset in (
        TensorPairDataset(torch.zeros(5), torch.zeros(5)),
        NextTokenDataset(counting(5, 4)),
        RandomCropSequenceDataset(counting(5, 4), 2),
    ):
        with pytest.raises(IndexError, match=rf"index {idx} .* 5 items; use -5 … 4"):
            dataset[idx]


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.zeros(3, 2), torch.zeros(4), "x has 3 items, y has 4"),
        (torch.zeros(0, 2), torch.zeros(0), "no items"),
        (torch.tensor(1.0), torch.zeros(1), "x has no axes"),
        (torch.zeros(1), torch.tensor(1.0), "y has no axes"),
    ],
)
def test_pairs_that_are_none(x, y, words) -> None:
    with pytest.raises(ValueError, match=words):
        TensorPairDataset(x, y)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_next_token(dtype) -> None:
    tokens = torch.tensor([[1, 5, 9, 2], [1, 7, 0, 0]], dtype=dtype)
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
        (torch.zeros(3, 4), "must be .N, T. integers"),
        (torch.zeros(3, 4, dtype=torch.bool), "must be .N, T. integers"),
        (torch.zeros(4, dtype=torch.long), "must be .N, T. integers"),
        (torch.zeros(0, 4, dtype=torch.long), "no rows"),
        (torch.zeros(3, 0, dtype=torch.long), "T must be at least"),
    ],
)
def test_tokens_that_are_none(tokens, words) -> None:
    for make in (NextTokenDataset, lambda tokens: RandomCropSequenceDataset(tokens, 1)):
        with pytest.raises(ValueError, match=words):
            make(tokens)


def test_one_token_has_no_next() -> None:
    with pytest.raises(ValueError, match="T must be at least 2"):
        NextTokenDataset(torch.zeros(3, 1, dtype=torch.long))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_a_crop_is_a_piece_of_its_row(dtype) -> None:
    tokens = (torch.arange(60).reshape(3, 20) * 2).to(dtype)
    dataset = RandomCropSequenceDataset(tokens, 7, seed=1)
    assert len(dataset) == 3
    for i in (0, 1, -1):
        crop = dataset[i]
        start = (int(crop[0]) - int(tokens[i, 0])) // 2
        assert crop.dtype == dtype
        assert torch.equal(crop, tokens[i, start : start + 7])


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("seed", [None, 0])
def test_every_start_is_reached_and_no_other(seed, told) -> None:
    torch.manual_seed(0)
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


def test_no_other_generator_is_touched() -> None:
    python, theirs = random.getstate(), torch.get_rng_state()
    dataset = RandomCropSequenceDataset(counting(2, 50), 3, seed=0)
    before = [int(dataset[0][0]) for _ in range(5)]
    assert torch.equal(torch.get_rng_state(), theirs)
    again = RandomCropSequenceDataset(counting(2, 50), 3, seed=0)
    crops = []
    for i in range(5):
        random.seed(i), torch.manual_seed(i)
        crops.append(int(again[0][0]))
    assert crops == before
    random.setstate(python)


def test_without_a_seed_the_global_generator_decides() -> None:
    dataset = RandomCropSequenceDataset(counting(1, 1000), 3)
    seen = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        seen.append([int(dataset[0][0]) for _ in range(4)])
    assert seen[0] == seen[1] != seen[2]


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


# In a process of its own: JAX, which other tests load, does not like its process forked.
WORKERS = """
import json, torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, get_worker_info
from omni_torch.data import RandomCropSequenceDataset, make_dataloader

class Crops(RandomCropSequenceDataset):
    def __getitem__(self, idx):
        info = get_worker_info()
        return int(super().__getitem__(idx)[0]), -1 if info is None else info.id, idx

def tell(rows):
    starts, workers, items = (sum((part.tolist() for part in column), []) for column in zip(*rows))
    return {"starts": starts, "workers": workers, "items": items}

tokens = torch.arange(100_000).repeat(12, 1)

def plain(data_seed, num_workers=2):
    torch.manual_seed(7)
    loader = DataLoader(Crops(tokens, 5, data_seed), batch_size=3, num_workers=num_workers)
    return [tell(loader) for _ in range(2)]

def seeded(num_workers, start=0):
    loader = make_dataloader(Crops(tokens, 5, 3), 3, num_workers=num_workers, seed=11)
    loader.sampler.set_epoch(start)
    return [tell(loader) for _ in range(3 - start)]

def parts(num_workers):
    crops = Crops(tokens, 5, 3)
    dataset = ConcatDataset([Subset(crops, [0, 2, 4]), Subset(Subset(crops, range(6)), [1, 5])])
    loader = make_dataloader(dataset, 3, num_workers=num_workers, seed=11)
    return [tell(loader) for _ in range(2)]

if __name__ == "__main__":
    print(json.dumps({
        "plain": plain(1), "again": plain(1), "unseeded": plain(None),
        "seeded 2": seeded(2), "seeded 0": seeded(0), "seeded 3, resumed": seeded(3, 2),
        "parts 2": parts(2), "parts 0": parts(0),
    }))
"""


@pytest.fixture(scope="module")
def workers() -> dict[str, list[dict[str, list[int]]]]:
    done = subprocess.run([sys.executable, "-c", WORKERS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("run", ["plain", "unseeded", "seeded 2"])
def test_workers_draw_their_own_crops_anew_in_every_epoch(workers, run) -> None:
    starts = [start for epoch in workers[run] for start in epoch["starts"]]
    assert set(workers[run][0]["workers"]) == {0, 1}
    assert len(set(starts)) == len(starts)  # of 100,000: chance makes two equal once in a hundred seeds


def test_workers_repeat_what_their_seeds_say(workers) -> None:
    assert workers["plain"] == workers["again"]


def test_a_seeded_loader_crops_alike_with_any_number_of_workers_and_when_resumed(workers) -> None:
    for key in ("starts", "items"):
        assert [e[key] for e in workers["seeded 2"]] == [e[key] for e in workers["seeded 0"]]
        assert [e[key] for e in workers["parts 2"]] == [e[key] for e in workers["parts 0"]]
        assert workers["parts 0"][0][key] != workers["parts 0"][1][key]
        assert workers["seeded 3, resumed"][0][key] == workers["seeded 0"][2][key]


# --- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("pad_value", [0, 7, -100])
def test_padding(dtype, pad_value) -> None:
    seqs = [torch.tensor(ids, dtype=dtype) for ids in ([5, 0, 7], [7], [0, 0, 0, 0])]
    batch = pad_1d_sequences(seqs, pad_value)
    assert batch.tokens.tolist() == [[5, 0, 7, pad_value], [7, *[pad_value] * 3], [0, 0, 0, 0]]
    assert batch.lengths.tolist() == [3, 1, 4]
    for b in range(3):  # by the lengths: the zeros and sevens above are tokens
        for t in range(4):
            assert bool(batch.padding_mask[b, t]) == (t >= int(batch.lengths[b]))
    assert (batch.tokens.dtype, batch.lengths.dtype, batch.padding_mask.dtype) == (torch.long, torch.long, torch.bool)
    assert [seq.tolist() for seq in seqs] == [[5, 0, 7], [7], [0, 0, 0, 0]]
    batch.tokens.fill_(1)
    assert seqs[2].tolist() == [0, 0, 0, 0]  # its own memory


def test_a_padded_batch_is_frozen() -> None:
    batch = pad_1d_sequences([torch.tensor([1])])
    assert [field.name for field in dataclasses.fields(PaddedBatch)] == ["tokens", "lengths", "padding_mask"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.tokens = batch.lengths  # type: ignore[misc]


@pytest.mark.parametrize(
    ("seqs", "words"),
    [
        ([], "no sequences"),
        ([torch.tensor([1]), torch.tensor([], dtype=torch.long)], r"seqs\[1\] has length 0"),
        ([torch.tensor([1.0])], r"seqs\[0\] has shape \(1,\) and dtype torch.float32"),
        ([torch.tensor([True])], "must be a 1-D tensor of integers"),
        ([torch.tensor([[1]])], r"seqs\[0\] has shape \(1, 1\)"),
        ([torch.tensor(1)], r"seqs\[0\] has shape \(\)"),
        ([[1, 2]], r"seqs\[0\] is a list"),
        (None, "seqs is a NoneType"),
        ([torch.tensor([2**63], dtype=torch.uint64)], r"seqs\[0\] holds an integer above 2\*\*63 - 1"),
    ],
)
def test_sequences_that_are_none(seqs, words) -> None:
    with pytest.raises(ValueError, match=words):
        pad_1d_sequences(seqs)


@pytest.mark.parametrize("pad_value", [2**70, -(2**70)])
def test_a_pad_value_that_does_not_fit_is_refused(pad_value) -> None:
    with pytest.raises(ValueError, match=f"pad_value={pad_value} is outside"):
        pad_1d_sequences([torch.tensor([1])], pad_value)


def test_large_unsigned_ids_are_taken() -> None:
    ids = torch.tensor([2**63 - 1, 0], dtype=torch.uint64)
    assert pad_1d_sequences([ids, ids[:1]]).tokens.tolist() == [[2**63 - 1, 0], [2**63 - 1, 0]]


def test_no_list_of_pairs_is_no_batch() -> None:
    with pytest.raises(ValueError, match="batch is a NoneType"):
        collate_next_token_batch(None)  # type: ignore[arg-type]


def test_lists_are_no_tensors() -> None:
    with pytest.raises(ValueError, match="x is a list, must be a tensor"):
        TensorPairDataset([1], [2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokens is a list, must be a tensor"):
        NextTokenDataset([[1, 2]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokens is a list, must be a tensor"):
        RandomCropSequenceDataset([[1, 2]], 1)  # type: ignore[arg-type]


def test_a_pad_value_is_an_integer() -> None:
    with pytest.raises(ValueError, match="pad_value is a float"):
        pad_1d_sequences([torch.tensor([1])], 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("pad_value", [0, 9])
def test_collate(pad_value) -> None:
    rows = [torch.tensor([[1, 0, 9, 2]], dtype=torch.int32), torch.tensor([[1, 9]], dtype=torch.int32)]
    batch = collate_next_token_batch([NextTokenDataset(row)[0] for row in rows], pad_value)
    assert list(batch) == ["input_ids", "target_ids", "attention_mask", "padding_mask"]
    assert batch["input_ids"].tolist() == [[1, 0, 9], [1, pad_value, pad_value]]
    assert batch["target_ids"].tolist() == [[0, 9, 2], [9, pad_value, pad_value]]
    assert batch["attention_mask"].tolist() == [[True, True, True], [True, False, False]]
    assert torch.equal(batch["padding_mask"], ~batch["attention_mask"])
    assert batch["input_ids"].dtype == batch["target_ids"].dtype == torch.long
    assert batch["attention_mask"].dtype == batch["padding_mask"].dtype == torch.bool


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ([], "batch has no items"),
        ([(torch.tensor([1, 2]), torch.tensor([1]))], r"batch\[0\] has 2 input_ids and 1 target_ids"),
        ([(torch.tensor([1]),)], r"batch\[0\] must be a pair"),
        ([torch.tensor([1, 2])], r"batch\[0\] must be a pair"),
        ([(torch.tensor([]), torch.tensor([]))], r"input_ids of batch\[0\]"),
        ([(torch.tensor([1]), torch.tensor([1.0]))], r"target_ids of batch\[0\]"),
        ([(torch.zeros(0, dtype=torch.long),) * 2], "length 0"),
    ],
)
def test_batches_that_are_none(batch, words) -> None:
    with pytest.raises(ValueError, match=words):
        collate_next_token_batch(batch)


# --- loader ----------------------------------------------------------------------------------------------------------


def numbered(n: int) -> TensorPairDataset:
    return TensorPairDataset(torch.arange(n), torch.arange(n) * 10)


def visited(loader) -> list[int]:
    return [int(i) for x, _ in loader for i in x]


def test_a_seeded_loader_follows_epoch_order_and_advances() -> None:
    loader = make_dataloader(numbered(11), 4, seed=3)
    assert isinstance(loader, DataLoader)
    assert len(loader) == 3
    for epoch in range(3):
        assert visited(loader) == epoch_order(11, 3, epoch).tolist()
    loader.sampler.set_epoch(1)  # type: ignore[attr-defined]
    for epoch in (1, 2):
        assert visited(loader) == epoch_order(11, 3, epoch).tolist()


def test_batches_are_stacked_as_torch_does() -> None:
    x, y = next(iter(make_dataloader(numbered(4), 3, shuffle=False)))
    assert x.tolist() == [0, 1, 2]
    assert y.tolist() == [0, 10, 20]


@pytest.mark.parametrize("seed", [None, 0])
def test_in_order_and_drop_last(seed) -> None:
    assert visited(make_dataloader(numbered(5), 2, shuffle=False, seed=seed)) == [0, 1, 2, 3, 4]
    loader = make_dataloader(numbered(5), 2, shuffle=False, drop_last=True, seed=seed)
    assert len(loader) == 2
    assert visited(loader) == [0, 1, 2, 3]


def test_without_a_seed_torch_decides() -> None:
    loader = make_dataloader(numbered(50), 7)
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        orders.append(visited(loader))
    assert sorted(orders[0]) == list(range(50))
    assert orders[0] == orders[1] != orders[2]


def test_a_seeded_loader_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    visited(make_dataloader(numbered(5), 2, seed=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_seeded_loader_tells_the_epoch() -> None:
    loader = make_dataloader(RandomCropSequenceDataset(counting(6, 1000), 3, seed=1), 2, seed=0)
    epochs = [[crop.tolist() for crop in loader] for _ in range(2)]
    assert epochs[0] != epochs[1]
    loader.sampler.set_epoch(1)  # type: ignore[attr-defined]
    assert [crop.tolist() for crop in loader] == epochs[1]


def test_a_seeded_loader_leaves_the_callers_dataset_alone() -> None:
    ours, plain = (RandomCropSequenceDataset(counting(6, 1000), 3, seed=1) for _ in range(2))
    loader = make_dataloader(ours, 2, seed=0)
    first = [crop.tolist() for crop in loader]
    drawn = [ours[0].tolist() for _ in range(5)]
    assert drawn == [plain[0].tolist() for _ in range(5)]
    assert len({tuple(crop) for crop in drawn}) > 1
    assert loader.dataset is ours
    loader.sampler.set_epoch(0)  # type: ignore[attr-defined]
    assert [crop.tolist() for crop in loader] == first


def test_iterators_side_by_side_do_not_meet() -> None:
    def loader():
        return make_dataloader(RandomCropSequenceDataset(counting(6, 1000), 3, seed=1), 2, seed=0)

    alone, both = loader(), loader()
    want = [[crop.tolist() for crop in alone] for _ in range(2)]
    one, two = iter(both), iter(both)  # both, before either is asked for a batch
    got = [(a.tolist(), b.tolist()) for a, b in zip(one, two, strict=True)]
    assert [[a for a, _ in got], [b for _, b in got]] == want
    assert both.sampler.epoch == 2  # type: ignore[attr-defined]


def test_parts_of_a_dataset_are_told_by_a_copy() -> None:
    crops = RandomCropSequenceDataset(counting(6, 1000), 3, seed=1)
    dataset = ConcatDataset([Subset(crops, [0, 2, 4]), Subset(Subset(crops, range(6)), [1, 5])])
    epochs = [[crop.tolist() for crop in make_dataloader(dataset, 2, seed=0)] for _ in range(2)]
    assert epochs[0] == epochs[1]
    assert crops._epoch is None


def test_collate_fn_is_used() -> None:
    lengths = [3, 5, 2]
    items = [(torch.ones(n, dtype=torch.long),) * 2 for n in lengths]
    loader = make_dataloader(items, 3, collate_fn=collate_next_token_batch, seed=0)  # type: ignore[arg-type]
    (batch,) = list(loader)
    assert batch["attention_mask"].sum(1).tolist() == [lengths[i] for i in epoch_order(3, 0, 0)]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(5))


def test_an_iterable_dataset_keeps_its_order() -> None:
    assert [b.tolist() for b in make_dataloader(Stream(), 2, shuffle=False)] == [[0, 1], [2, 3], [4]]
    with pytest.raises(ValueError, match="IterableDataset"):
        make_dataloader(Stream(), 2, shuffle=False, seed=0)


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
    with pytest.raises(ValueError, match="no length"):
        make_dataloader(object(), 2)  # type: ignore[arg-type]


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
