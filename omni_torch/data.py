"""Datasets, padding with its masks, loaders, and token batches that need no loader.

Legend of the shapes: B batch, T time, N items (or ids of a flat stream), L part of a row.

padding_mask is True where there is padding, attention_mask is True where there is a token to keep: each the logical
NOT of the other, and both made from lengths, never from the pad value, which may be a token as well.

`epoch_order`, `token_stream` and `token_batch` are pure functions in numpy and give the same bytes as omni_jax's: a run
that is resumed, here or there, needs to know its seed and its step, nothing else.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    get_worker_info,
)

from .config import BOS_ID

__all__ = [
    "TensorPairDataset",
    "NextTokenDataset",
    "RandomCropSequenceDataset",
    "PaddedBatch",
    "pad_1d_sequences",
    "collate_next_token_batch",
    "make_dataloader",
    "epoch_order",
    "token_stream",
    "token_batch",
]

# What a stream of random numbers is for: no two uses share one.
_ORDER, _BATCH, _CROP, _WORKER = 1, 2, 3, 4


class TensorPairDataset(Dataset):
    """Pairs (x[i], y[i]) of two tensors that share their first axis.

    x: (N, ...), y: (N, ...); items are views. Indices may be negative and of any integer type.

    Raises:
        ValueError: x or y is no tensor or has no first axis, their N are unequal, or there are no items.
        IndexError: an item outside -N … N − 1.

    >>> dataset = TensorPairDataset(torch.tensor([[1.0], [2.0]]), torch.tensor([10, 20]))
    >>> len(dataset), dataset[-1]
    (2, (tensor([2.]), tensor(20)))
    """

    def __init__(self, x: Shaped[Tensor, "..."], y: Shaped[Tensor, "..."]):
        for name, value in (("x", x), ("y", y)):
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} is a {type(value).__name__}, must be a tensor (N, ...); use torch.as_tensor")
            if value.ndim == 0:
                raise ValueError(f"{name} has no axes: must be (N, ...); give one row per item")
        if len(x) != len(y):
            raise ValueError(
                f"x has {len(x)} items, y has {len(y)}: both must have the same N; drop what has no partner"
            )
        if len(x) == 0:
            raise ValueError("x and y have no items: N must be at least 1; an empty dataset has nothing to draw from")
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, idx: int) -> tuple[Tensor, Tensor]:
        i = _position(idx, len(self))
        return self.x[i], self.y[i]


class NextTokenDataset(Dataset):
    """Next-token prediction: item i is (tokens[i, :-1], tokens[i, 1:]), input and target of equal length T − 1.

    tokens: (N, T) integers with T at least 2; their dtype stays, items are 1-D views.

    Raises:
        ValueError: tokens that are not (N, T) integers, N = 0, or T < 2.
        IndexError: an item outside -N … N − 1.

    >>> NextTokenDataset(torch.tensor([[1, 5, 9, 2]]))[0]
    (tensor([1, 5, 9]), tensor([5, 9, 2]))
    """

    def __init__(self, tokens: Int[Tensor, "N T"]):
        self.tokens = _rows(tokens, 2, "a row of one token has no next one")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, idx: int) -> tuple[Int[Tensor, " L"], Int[Tensor, " L"]]:
        row = self.tokens[_position(idx, len(self))]
        return row[:-1], row[1:]


class RandomCropSequenceDataset(Dataset):
    """Random crops: item i is tokens[i, s : s + crop_len] with s uniform on 0 … T − crop_len, drawn at every access.

    tokens: (N, T) integers. With a seed the starts come from a torch.Generator of the dataset's own, so the same
    accesses in the same order give the same crops; without, from torch's global generator.

    A DataLoader gives every worker a copy of the dataset, generator and all, and a new copy in every epoch. Left alone,
    all workers would draw the same starts, the same in every epoch. So in a worker the generator is seeded once more,
    from `seed` and the worker's own seed (torch.utils.data.get_worker_info().seed), which is another one for every
    worker and epoch. Such a run repeats if the loader's seeds do: make_dataloader(seed=...), or torch.manual_seed.

    The same seed gives other crops in omni_jax, told the epoch or not: the starts come from a torch.Generator here, and
    from numpy's bits there. The order in which a seeded loader visits the items is the same in both.

    Raises:
        ValueError: tokens that are not (N, T) integers, N = 0 or T = 0; a crop_len outside 1 … T; a seed outside
            0 … 2**64 − 1.
        IndexError: an item outside -N … N − 1.

    >>> tokens = torch.arange(100).reshape(1, 100)
    >>> a, b = (RandomCropSequenceDataset(tokens, crop_len=3, seed=0) for _ in range(2))
    >>> torch.equal(a[0], b[0]), a[0].shape
    (True, torch.Size([3]))
    """

    def __init__(self, tokens: Int[Tensor, "N T"], crop_len: int, seed: int | None = None):
        self.tokens = _rows(tokens, 1, "there is nothing to crop")
        self.crop_len = _crop_length(crop_len, tokens.shape[1])
        self.seed = None if seed is None else _word("seed", seed)
        self._generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        self._epoch: int | None = None
        self._worker_seed: int | None = None

    def set_epoch(self, epoch: int) -> None:
        """From now on the crop of item i is a pure function of (seed, epoch, i): no order of access, no worker enters.

        make_dataloader with a seed says this to a copy of the dataset, at the start of every epoch. Without a seed of
        the dataset's own it changes nothing.

        Raises ValueError for an epoch outside 0 … 2**64 − 1.
        """
        self._epoch = _word("epoch", epoch)
        if self._generator is not None:
            self._generator = torch.Generator()  # seeded at every access; a shallow copy shares the one it had

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, idx: int) -> Int[Tensor, " L"]:
        i = _position(idx, len(self))
        self._reseed(i)
        room = self.tokens.shape[1] - self.crop_len + 1
        start = int(torch.randint(0, room, (), generator=self._generator))
        return self.tokens[i, start : start + self.crop_len]

    def _reseed(self, i: int) -> None:
        """Seed the generator anew where its state would otherwise be another's, or is not to matter."""
        if self._generator is None or self.seed is None:
            return  # torch seeds the global generator of every worker itself
        worker = get_worker_info()
        if self._epoch is not None:
            self._generator.manual_seed(int(_draws(1, _CROP, seed=self.seed, epoch=self._epoch, idx=i)[0]))
        elif worker is not None and worker.seed != self._worker_seed:
            self._worker_seed = worker.seed
            self._generator.manual_seed(int(_draws(1, _WORKER, seed=self.seed, worker=worker.seed)[0]))


@dataclass(frozen=True)
class PaddedBatch:
    """Sequences of unequal length side by side.

    tokens: long (B, T_max); lengths: long (B,); padding_mask: bool (B, T_max), True where there is padding.
    """

    tokens: Int[Tensor, "B T"]
    lengths: Int[Tensor, " B"]
    padding_mask: Bool[Tensor, "B T"]


def pad_1d_sequences(seqs: list[Tensor], pad_value: int = 0) -> PaddedBatch:
    """Sequences, each (T_b,), as rows of one length: tokens (B, T_max) long, `pad_value` behind each row's end.

        padding_mask[b, t] = t ≥ lengths[b]

    The mask comes from the lengths: a token that equals `pad_value` is a token.

    Raises ValueError if there are no sequences, or one is not a 1-D tensor of integers, has length 0 or holds what long
    cannot; or if `pad_value` is not such an integer.

    >>> batch = pad_1d_sequences([torch.tensor([5, 0, 7]), torch.tensor([8])])
    >>> batch.tokens.tolist(), batch.lengths.tolist(), batch.padding_mask.tolist()
    ([[5, 0, 7], [8, 0, 0]], [3, 1], [[False, False, False], [False, True, True]])
    """
    lengths = _lengths("seqs", seqs)
    device = seqs[0].device
    pad = _integer("pad_value", pad_value)
    if not -(2**63) <= pad < 2**63:
        raise ValueError(f"pad_value={pad} is outside -2**63 … 2**63 - 1; give a token id, such as 0")
    tokens = torch.full((len(seqs), max(lengths)), pad, dtype=torch.long, device=device)
    for i, (row, seq) in enumerate(zip(tokens, seqs)):
        # The cast to long would wrap in silence; what is too large for it has the sign bit.
        if seq.dtype == torch.uint64 and bool((seq.view(torch.int64) < 0).any()):
            raise ValueError(f"seqs[{i}] holds an integer above 2**63 - 1, more than long can; give token ids")
        row[: len(seq)] = seq
    lengths_B = torch.tensor(lengths, dtype=torch.long, device=device)
    padding_mask = torch.arange(tokens.shape[1], device=device) >= lengths_B[:, None]
    return PaddedBatch(tokens, lengths_B, padding_mask)


def collate_next_token_batch(batch: list[tuple[Tensor, Tensor]], pad_value: int = 0) -> dict[str, Tensor]:
    """Items (input_ids, target_ids) of NextTokenDataset, of any lengths, as one padded batch.

    Returns input_ids and target_ids (B, T_max) long, attention_mask (B, T_max) bool, True where a token is to be kept,
    and padding_mask, its logical NOT. Targets are padded with `pad_value` too: with PAD (0), the loss ignores them.

    Raises ValueError if the batch has no items, an item is not a pair, its two halves differ in length, or one is not
    a 1-D tensor of integers or has length 0.

    >>> batch = collate_next_token_batch([(torch.tensor([1, 5]), torch.tensor([5, 9])), (torch.tensor([1]),) * 2])
    >>> batch["target_ids"].tolist(), batch["attention_mask"].tolist()
    ([[5, 9], [1, 0]], [[True, True], [True, False]])
    """
    _check_pairs(batch)
    inputs = pad_1d_sequences([pair[0] for pair in batch], pad_value)
    targets = pad_1d_sequences([pair[1] for pair in batch], pad_value)
    return {
        "input_ids": inputs.tokens,
        "target_ids": targets.tokens,
        "attention_mask": ~inputs.padding_mask,
        "padding_mask": inputs.padding_mask,
    }


class _EpochSampler(Sampler[int]):
    """Indices in the order of epoch_order (or 0 … n − 1); every iteration is the next epoch.

    `epoch` is the one that the next iteration will be; set_epoch(k) goes there, which is how a run is resumed.
    """

    def __init__(self, n: int, seed: int, shuffle: bool):
        self.n, self.seed, self.shuffle, self.epoch = n, seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = _word("epoch", epoch)

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        return iter(epoch_order(self.n, self.seed, epoch).tolist() if self.shuffle else range(self.n))


class _SeededLoader(DataLoader):
    """A DataLoader whose every epoch is a function of (seed, epoch): order, seeds of the workers, random crops.

    Every iterator works for a copy of the loader, with dataset, sampler and generator of its own: the caller's dataset
    is left as it is, and iterators that live side by side do not meet.
    """

    def __iter__(self):
        ours: Any = self.sampler
        epoch, ours.epoch = ours.epoch, ours.epoch + 1  # now: a sampler is asked for its order at the first batch only
        sampler = copy.copy(ours)
        sampler.set_epoch(epoch)
        loader = copy.copy(self)
        # A loader refuses new attributes of these names once it is made; this copy has made nothing yet.
        loader.__dict__.update(
            dataset=_told(self.dataset, epoch),
            sampler=sampler,
            batch_sampler=BatchSampler(sampler, cast(int, self.batch_size), self.drop_last),
            generator=torch.Generator().manual_seed(int(_draws(1, _WORKER, seed=ours.seed, epoch=epoch)[0])),
        )
        return super(_SeededLoader, loader).__iter__()


def _told(dataset: Any, epoch: int) -> Any:
    """A shallow copy of the dataset that knows the epoch; itself, if there is nobody to tell."""
    told = copy.copy(dataset)
    if hasattr(dataset, "set_epoch"):
        told.set_epoch(epoch)
    elif isinstance(dataset, Subset):
        told.dataset = _told(dataset.dataset, epoch)
    elif isinstance(dataset, ConcatDataset):
        told.datasets = [_told(part, epoch) for part in dataset.datasets]
    else:
        return dataset
    return told


def make_dataloader(
    dataset: Dataset,
    batch_size: int,
    shuffle: bool = True,
    drop_last: bool = False,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    num_workers: int = 0,
    seed: int | None = None,
) -> DataLoader:
    """A torch DataLoader; collate_fn=None stacks items as torch does by default (sequences must be of one length).

    With a seed, epoch e visits the items in the order epoch_order(len(dataset), seed, e), the same as omni_jax's
    loader; every iteration over the loader is the next epoch, and `loader.sampler.set_epoch(e)` goes to epoch e. Then
    the seeds of the workers depend on (seed, e) alone, and a dataset with a method `set_epoch` is copied (shallowly)
    for every iteration, and the copy is told e; so are the parts of a Subset and a ConcatDataset. Another wrapper must
    have a set_epoch that hands on what it is told (to a copy). Without a seed the order comes from torch's global
    generator.

    Raises ValueError if batch_size < 1, num_workers < 0, the dataset is empty, drop_last leaves no batch at all, seed
    is outside 0 … 2**64 − 1, or a seed is given with an IterableDataset, whose order is its own.

    >>> loader = make_dataloader(NextTokenDataset(torch.arange(12).reshape(4, 3)), batch_size=2, seed=0)
    >>> [inputs[:, 0].tolist() for inputs, _ in loader]
    [[9, 6], [3, 0]]
    """
    batch_size = _at_least("batch_size", batch_size, 1, "a batch of nothing trains nothing")
    num_workers = _at_least("num_workers", num_workers, 0, "0 loads in this process")
    common: dict[str, Any] = {
        "batch_size": batch_size, "drop_last": drop_last, "collate_fn": collate_fn, "num_workers": num_workers
    }  # fmt: skip
    if isinstance(dataset, IterableDataset):
        if seed is not None:
            raise ValueError("seed: an IterableDataset has an order of its own; leave seed out, or give a Dataset")
        return DataLoader(dataset, shuffle=shuffle, **common)
    if not isinstance(dataset, Sized):
        raise ValueError(f"dataset: {type(dataset).__name__} has no length; give it a __len__, or make it iterable")
    n = _enough_items(len(dataset), batch_size, drop_last)
    if seed is None:
        return DataLoader(dataset, shuffle=shuffle, **common)
    sampler = _EpochSampler(n, _word("seed", seed), shuffle)
    return _SeededLoader(dataset, sampler=sampler, generator=torch.Generator(), **common)


def epoch_order(n: int, seed: int, epoch: int) -> Int[np.ndarray, " n"]:
    """The order in which `n` items are visited in an epoch: a permutation of range(n), pure in its arguments.

    Every item gets a 64-bit draw of a counter-based generator; the order is that of the draws.

    Raises ValueError if n < 1, or if seed or epoch are outside 0 … 2**64 − 1.

    >>> epoch_order(8, seed=0, epoch=3).tolist()
    [2, 0, 3, 6, 4, 5, 7, 1]
    """
    n = _at_least("n", n, 1, "an empty dataset has no order")
    return np.argsort(_draws(n, _ORDER, seed=seed, epoch=epoch), kind="stable")


def token_stream(documents: Iterable[Sequence[int]], bos_id: int, eos_id: int) -> Int[np.ndarray, " N"]:
    """Documents end to end as one int32 array (N,), each as BOS, its ids, EOS.

    Raises ValueError if there is no document, or an id is not an integer in 0 … 2**31 − 1.

    >>> token_stream([[7, 8], [9]], bos_id=1, eos_id=2).tolist()
    [1, 7, 8, 2, 1, 9, 2]
    """
    bos, eos = _ids("bos_id", [bos_id]), _ids("eos_id", [eos_id])
    parts = []
    for i, document in enumerate(documents):
        parts += [bos, _ids(f"documents[{i}]", document), eos]
    if not parts:
        raise ValueError("documents: there is none; give at least one list of ids")
    return np.concatenate(parts)


def token_batch(
    ids: Int[np.ndarray, " N"], batch_size: int, length: int, seed: int, step: int
) -> Int[np.ndarray, "B T"]:
    """Batch number `step` of a token stream, (batch_size, length) int32: a pure function of its arguments.

    Every row starts at a document's BOS (id 1), drawn uniformly and with replacement among those early enough to fill
    a row, and runs on into the next documents; where there is no such BOS, rows start anywhere. Row b does not depend
    on batch_size. A run that resumes needs the step, nothing else.

    Raises ValueError if `ids` is not a 1-D array of integers in 0 … 2**31 − 1 or is shorter than `length`; if
    batch_size or length are below 1; if seed or step are outside 0 … 2**64 − 1.

    >>> ids = token_stream([[7, 8], [9]], bos_id=1, eos_id=2)
    >>> token_batch(ids, batch_size=3, length=3, seed=0, step=1).tolist()
    [[1, 7, 8], [1, 9, 2], [1, 9, 2]]
    """
    ids = np.asarray(ids)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids has shape {ids.shape} and dtype {ids.dtype}: must be 1-D integers; see token_stream")
    batch_size = _at_least("batch_size", batch_size, 1, "a batch of nothing trains nothing")
    length = _at_least("length", length, 1, "a row needs at least one id")
    last = len(ids) - length
    if last < 0:
        raise ValueError(f"length={length} is more than the {len(ids)} ids at hand; shorten the rows or add text")
    starts = np.flatnonzero(ids[: last + 1] == BOS_ID)
    draws = _draws(batch_size, _BATCH, seed=seed, step=step)
    firsts = starts[draws % np.uint64(len(starts))] if len(starts) else (draws % np.uint64(last + 1)).astype(np.int64)
    return _ids("ids", ids[firsts[:, None] + np.arange(length)])


def _draws(count: int, use: int, **key: int) -> Shaped[np.ndarray, " count"]:
    """`count` uniform 64-bit integers, a pure function of the arguments: Philox4x64-10 keyed by (first of `key`, use).

    A counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 4): what
    it gives is a hash of key and counter, so no state has to be replayed. The rest of `key` is words of the counter,
    whose first word counts the draws. Only raw bits are used: numpy promises that these stay from version to version,
    and does not promise it of Generator's methods.
    """
    words = [_word(name, value) for name, value in key.items()]
    counter = np.array([0, *words[1:], 0, 0][:4], np.uint64)
    return np.random.Philox(key=np.array([words[0], use], np.uint64), counter=counter).random_raw(count)


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is a {type(value).__name__}, must be an integer; got {value!r}") from None


def _word(name: str, value: int) -> int:
    """An integer that fits 64 bits without a sign."""
    number = _integer(name, value)
    if not 0 <= number < 2**64:
        raise ValueError(f"{name}={number} is outside 0 … 2**64 - 1; use a non-negative integer of 64 bits")
    return number


def _at_least(name: str, value: int, least: int, fix: str) -> int:
    number = _integer(name, value)
    if number < least:
        raise ValueError(f"{name}={number} must be at least {least}: {fix}")
    return number


def _position(idx: int, n: int) -> int:
    """0 … n − 1 for an index of any integer type that may count from the end."""
    i = operator.index(idx)
    if not -n <= i < n:
        raise IndexError(f"index {i} is outside a dataset of {n} items; use {-n} … {n - 1}")
    return i % n


def _crop_length(crop_len: int, time: int) -> int:
    number = _at_least("crop_len", crop_len, 1, "a crop of nothing holds no token")
    if number > time:
        raise ValueError(f"crop_len={number} is more than the {time} tokens of a sequence; use at most {time}")
    return number


def _enough_items(n: int, batch_size: int, drop_last: bool) -> int:
    if n == 0:
        raise ValueError("dataset: it has no items; an empty dataset has no batches")
    if drop_last and n < batch_size:
        raise ValueError(
            f"drop_last=True with batch_size={batch_size} leaves no batch of {n} items; use a batch_size of at most "
            f"{n}, or drop_last=False"
        )
    return n


def _ids(name: str, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """int32, after a look that nothing is lost by it."""
    array = np.asarray(ids)
    if array.size == 0:
        return np.zeros(array.shape, np.int32)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} holds {array.dtype}, must hold integer ids; encode text first")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= 2**31:
        raise ValueError(f"{name} holds the id {low if low < 0 else high}: ids must be in 0 … 2**31 - 1")
    return array.astype(np.int32)


def _rows(tokens: Tensor, least: int, why: str) -> Int[Tensor, "N T"]:
    if not isinstance(tokens, Tensor):
        raise ValueError(f"tokens is a {type(tokens).__name__}, must be a tensor (N, T) of integers; use torch.tensor")
    if tokens.ndim != 2 or not _is_integer(tokens):
        raise ValueError(f"tokens has shape {tuple(tokens.shape)} and dtype {tokens.dtype}: must be (N, T) integers")
    if tokens.shape[0] == 0:
        raise ValueError("tokens has no rows: N must be at least 1; an empty dataset has nothing to draw from")
    if tokens.shape[1] < least:
        raise ValueError(f"tokens has rows of {tokens.shape[1]}: T must be at least {least}, {why}")
    return tokens


def _lengths(name: str, seqs: Sequence[Tensor]) -> list[int]:
    if not isinstance(seqs, Sequence | Tensor):
        raise ValueError(f"{name} is a {type(seqs).__name__}, must be a list of 1-D tensors of integers")
    if len(seqs) == 0:
        raise ValueError(f"{name} has no sequences; a batch of nothing cannot be padded, give at least one")
    for i, seq in enumerate(seqs):
        if not isinstance(seq, Tensor):
            raise ValueError(f"{name}[{i}] is a {type(seq).__name__}, must be a 1-D tensor of integers")
        if seq.ndim != 1 or not _is_integer(seq):
            raise ValueError(
                f"{name}[{i}] has shape {tuple(seq.shape)} and dtype {seq.dtype}, must be a 1-D tensor of integers"
            )
        if len(seq) == 0:
            raise ValueError(f"{name}[{i}] has length 0: a sequence must have at least one token; leave it out")
    return [len(seq) for seq in seqs]


def _check_pairs(batch: Sequence[Any]) -> None:
    if not isinstance(batch, Sequence):
        raise ValueError(f"batch is a {type(batch).__name__}, must be a list of pairs (input_ids, target_ids)")
    if len(batch) == 0:
        raise ValueError("batch has no items; a batch of nothing cannot be collated, give at least one")
    for i, pair in enumerate(batch):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"batch[{i}] must be a pair (input_ids, target_ids), as NextTokenDataset gives it")
    _lengths("input_ids of batch", [pair[0] for pair in batch])
    _lengths("target_ids of batch", [pair[1] for pair in batch])
    for i, (inputs, targets) in enumerate(batch):
        if len(inputs) != len(targets):
            raise ValueError(
                f"batch[{i}] has {len(inputs)} input_ids and {len(targets)} target_ids: every input has one target; "
                "give both the same length"
            )


def _is_integer(tokens: Tensor) -> bool:
    return not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
