"""Datasets, padding with its masks, loaders, and token batches that need no loader.

Legend of the shapes: B batch, T time, N items (or ids of a flat stream), L part of a row.

padding_mask is True where there is padding, attention_mask is True where there is a token to keep: each the logical
NOT of the other, and both made from lengths, never from the pad value, which may be a token as well.

Data live on the host: everything here is numpy, until `prefetch_to_device` hands it over. Batches are pure functions of
(seed, epoch, step). `epoch_order`, `token_stream` and `token_batch` give the same bytes as omni_torch's: a run that is
resumed, here or there, needs to know its seed and its step, nothing else.
"""

from __future__ import annotations

import copy
import itertools
import operator
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int, Shaped

from .config import BOS_ID

__all__ = [
    "TensorPairDataset",
    "NextTokenDataset",
    "RandomCropSequenceDataset",
    "PaddedBatch",
    "pad_1d_sequences",
    "collate_next_token_batch",
    "DataLoader",
    "make_dataloader",
    "epoch_order",
    "token_stream",
    "token_batch",
    "prefetch_to_device",
]

# What a stream of random numbers is for: no two uses share one.
_ORDER, _BATCH, _CROP, _ACCESS = 1, 2, 3, 5


class TensorPairDataset:
    """Pairs (x[i], y[i]) of two arrays that share their first axis.

    x: (N, ...), y: (N, ...); items are views. Indices may be negative and of any integer type.

    Raises:
        ValueError: x and y of unequal N, without a first axis, or with no items.
        IndexError: an item outside -N … N − 1.

    >>> dataset = TensorPairDataset(np.array([[1.0], [2.0]]), np.array([10, 20]))
    >>> len(dataset), [part.tolist() for part in dataset[-1]]
    (2, [[2.0], 20])
    """

    def __init__(self, x: Shaped[np.ndarray, "..."], y: Shaped[np.ndarray, "..."]):
        x, y = np.asarray(x), np.asarray(y)
        for name, value in (("x", x), ("y", y)):
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

    def __getitem__(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        i = _position(idx, len(self))
        return np.asarray(self.x[i]), np.asarray(self.y[i])


class NextTokenDataset:
    """Next-token prediction: item i is (tokens[i, :-1], tokens[i, 1:]), input and target of equal length T − 1.

    tokens: (N, T) integers with T at least 2; their dtype stays, items are 1-D views.

    Raises:
        ValueError: tokens that are not (N, T) integers, N = 0, or T < 2.
        IndexError: an item outside -N … N − 1.

    >>> [part.tolist() for part in NextTokenDataset(np.array([[1, 5, 9, 2]]))[0]]
    [[1, 5, 9], [5, 9, 2]]
    """

    def __init__(self, tokens: Int[np.ndarray, "N T"]):
        self.tokens = _rows(tokens, 2, "a row of one token has no next one")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, idx: int) -> tuple[Int[np.ndarray, " L"], Int[np.ndarray, " L"]]:
        row = self.tokens[_position(idx, len(self))]
        return row[:-1], row[1:]


class RandomCropSequenceDataset:
    """Random crops: item i is tokens[i, s : s + crop_len] with s uniform on 0 … T − crop_len, drawn at every access.

    tokens: (N, T) integers. With a seed, the same accesses in the same order give the same crops: access number a draws
    number a of a counter-based generator. Without, the seed is drawn from the system's entropy.

    A DataLoader of this file says which epoch it is in, and then the crop of item i is a pure function of
    (seed, epoch, i), whichever thread asks for it and however often.

    The same seed gives other crops in omni_torch, told the epoch or not: the starts come from numpy's bits here, and
    from a torch.Generator there. The order in which a seeded loader visits the items is the same in both.

    Raises:
        ValueError: tokens that are not (N, T) integers, N = 0 or T = 0; a crop_len outside 1 … T; a seed outside
            0 … 2**64 − 1.
        IndexError: an item outside -N … N − 1.

    >>> tokens = np.arange(100).reshape(1, 100)
    >>> a, b = (RandomCropSequenceDataset(tokens, crop_len=3, seed=0) for _ in range(2))
    >>> np.array_equal(a[0], b[0]), a[0].shape
    (True, (3,))
    """

    def __init__(self, tokens: Int[np.ndarray, "N T"], crop_len: int, seed: int | None = None):
        self.tokens = _rows(tokens, 1, "there is nothing to crop")
        self.crop_len = _crop_length(crop_len, self.tokens.shape[1])
        self.seed = secrets.randbits(64) if seed is None else _word("seed", seed)
        self._epoch: int | None = None
        self._accesses = itertools.count()  # next() is one step of the interpreter: threads cannot share a number

    def set_epoch(self, epoch: int) -> None:
        """From now on the crop of item i is a pure function of (seed, epoch, i): no order of access enters.

        The DataLoader says this to a copy of the dataset, for every batch.

        Raises ValueError for an epoch outside 0 … 2**64 − 1.
        """
        self._epoch = _word("epoch", epoch)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, idx: int) -> Int[np.ndarray, " L"]:
        i = _position(idx, len(self))
        room = self.tokens.shape[1] - self.crop_len + 1
        if self._epoch is None:
            draw = _draws(1, _ACCESS, seed=self.seed, access=next(self._accesses))
        else:
            draw = _draws(1, _CROP, seed=self.seed, epoch=self._epoch, idx=i)
        start = int(draw[0]) % room
        return self.tokens[i, start : start + self.crop_len]


# A pytree, so that a batch can be an argument of a compiled function and travel to the device whole.
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PaddedBatch:
    """Sequences of unequal length side by side; a pytree, in numpy until it goes to the device.

    tokens: int32 (B, T_max); lengths: int32 (B,); padding_mask: bool (B, T_max), True where there is padding.
    """

    tokens: Int[np.ndarray | jax.Array, "B T"]
    lengths: Int[np.ndarray | jax.Array, " B"]
    padding_mask: Bool[np.ndarray | jax.Array, "B T"]


def pad_1d_sequences(seqs: Sequence[np.ndarray | jax.Array], pad_value: int = 0) -> PaddedBatch:
    """Sequences, each (T_b,), as rows of one length: tokens (B, T_max) int32, `pad_value` behind each row's end.

        padding_mask[b, t] = t ≥ lengths[b]

    The mask comes from the lengths: a token that equals `pad_value` is a token. int32 where torch has long, because
    that is what JAX computes with. Sequences may be on the device: they are fetched.

    Raises ValueError if there are no sequences, or one is not a 1-D array of integers, has length 0 or holds what int32
    cannot; or if `pad_value` is not such an integer.

    >>> batch = pad_1d_sequences([np.array([5, 0, 7]), np.array([8])])
    >>> batch.tokens.tolist(), batch.lengths.tolist(), batch.padding_mask.tolist()
    ([[5, 0, 7], [8, 0, 0]], [3, 1], [[False, False, False], [False, True, True]])
    """
    lengths = _lengths("seqs", seqs)
    pad = _integer("pad_value", pad_value)
    if not -(2**31) <= pad < 2**31:
        raise ValueError(f"pad_value={pad} is outside -2**31 … 2**31 - 1; give a token id, such as 0")
    tokens = np.full((len(seqs), max(lengths)), pad, np.int32)
    for i, (row, seq) in enumerate(zip(tokens, map(np.asarray, seqs))):
        low, high = int(seq.min()), int(seq.max())  # before the cast, which would wrap in silence
        if low < -(2**31) or high >= 2**31:
            bad = low if low < -(2**31) else high
            raise ValueError(f"seqs[{i}] holds {bad}, which is outside -2**31 … 2**31 - 1; give token ids")
        row[: len(seq)] = seq
    lengths_B = np.array(lengths, np.int32)
    padding_mask = np.arange(tokens.shape[1]) >= lengths_B[:, None]
    return PaddedBatch(tokens, lengths_B, padding_mask)


def collate_next_token_batch(
    batch: Sequence[tuple[np.ndarray | jax.Array, np.ndarray | jax.Array]], pad_value: int = 0
) -> dict[str, np.ndarray | jax.Array]:
    """Items (input_ids, target_ids) of NextTokenDataset, of any lengths, as one padded batch.

    Returns input_ids and target_ids (B, T_max) int32, attention_mask (B, T_max) bool, True where a token is to be kept,
    and padding_mask, its logical NOT. Targets are padded with `pad_value` too: with PAD (0), the loss ignores them.

    Raises ValueError if the batch has no items, an item is not a pair, its two halves differ in length, or one is not
    a 1-D array of integers or has length 0.

    >>> batch = collate_next_token_batch([(np.array([1, 5]), np.array([5, 9])), (np.array([1]),) * 2])
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


class DataLoader:
    """Batches of a dataset (anything with a length and items): batch `step` of an epoch is a pure function of
    (seed, epoch, step).

    Iterating gives the batches of one epoch, and the next iteration is the next epoch; `epoch` is the one that comes
    next and `set_epoch` goes elsewhere. Epoch e visits the items in the order epoch_order(len(dataset), seed, e), or
    in their own if not `shuffle`; seed=None draws a seed from the system's entropy. A dataset with a method `set_epoch`
    is copied (shallowly) for every batch, and the copy is told the epoch.

    collate_fn: list of items -> batch; None stacks them leaf by leaf: items are pytrees of equal structure and shapes.
    num_workers: threads that make batches ahead, in order; 0 makes each when it is asked for. Threads help where making
    an item waits (files) or works outside Python (numpy). A dataset whose items depend on the order of access, and that
    has no set_epoch, is repeatable with at most one thread.

    Raises ValueError if batch_size < 1, num_workers < 0, the dataset is empty, drop_last leaves no batch at all, or
    seed is outside 0 … 2**64 − 1.

    >>> loader = DataLoader(NextTokenDataset(np.arange(12).reshape(4, 3)), batch_size=2, seed=0)
    >>> [inputs[:, 0].tolist() for inputs, _ in loader]
    [[9, 6], [3, 0]]
    >>> loader.batch(epoch=0, step=1)[0][:, 0].tolist()
    [3, 0]
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        shuffle: bool = True,
        drop_last: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ):
        self.dataset = dataset
        self.batch_size = _at_least("batch_size", batch_size, 1, "a batch of nothing trains nothing")
        self.num_workers = _at_least("num_workers", num_workers, 0, "0 makes batches in this thread")
        self.shuffle, self.drop_last = shuffle, drop_last
        self.collate_fn = _stack if collate_fn is None else collate_fn
        self.seed = secrets.randbits(64) if seed is None else _word("seed", seed)
        self.epoch = 0
        self._n = _enough_items(len(dataset), self.batch_size, drop_last)
        self._order = (-1, np.arange(self._n))  # of the epoch that was asked for last

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._n // self.batch_size if self.drop_last else -(-self._n // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration will be this epoch. Raises ValueError outside 0 … 2**64 − 1."""
        self.epoch = _word("epoch", epoch)

    def batch(self, epoch: int, step: int) -> Any:
        """Batch number `step` of an epoch, whatever else was asked for before: how a run is resumed.

        Raises IndexError for a step outside 0 … len(self) − 1.
        """
        if not 0 <= step < len(self):
            raise IndexError(f"step={step} is outside an epoch of {len(self)} batches; use 0 … {len(self) - 1}")
        order = self._order_of(_word("epoch", epoch))
        dataset = self.dataset
        if hasattr(dataset, "set_epoch"):
            dataset = copy.copy(dataset)  # so that neither the caller's object nor another thread's sees it
            dataset.set_epoch(epoch)
        return self.collate_fn([dataset[i] for i in order[step * self.batch_size :][: self.batch_size].tolist()])

    def __iter__(self) -> Iterator[Any]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self._here(epoch) if self.num_workers == 0 else self._by_threads(epoch)

    def _here(self, epoch: int) -> Iterator[Any]:
        for step in range(len(self)):
            yield self.batch(epoch, step)

    def _by_threads(self, epoch: int) -> Iterator[Any]:
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="DataLoader")
        try:
            todo = iter(range(len(self)))
            # Two batches a thread: one in the making, one waiting; results are taken in the order of the steps.
            pending = deque(pool.submit(self.batch, epoch, i) for i in itertools.islice(todo, 2 * self.num_workers))
            while pending:
                batch = pending.popleft().result()  # raises here what making this batch raised
                pending.extend(pool.submit(self.batch, epoch, i) for i in itertools.islice(todo, 1))
                yield batch
        finally:  # also when the caller stops early
            pool.shutdown(wait=True, cancel_futures=True)

    def _order_of(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return self._order[1]
        known, order = self._order  # one read: another thread may put another epoch there
        if known != epoch:
            order = epoch_order(self._n, self.seed, epoch)
            self._order = (epoch, order)
        return order


def make_dataloader(
    dataset: Any,
    batch_size: int,
    shuffle: bool = True,
    drop_last: bool = False,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    num_workers: int = 0,
    seed: int | None = None,
) -> DataLoader:
    """A DataLoader of this file, under the name and with the arguments of its torch twin.

    With a seed, both visit the same items in the same order at the same epoch.

    Raises ValueError as DataLoader does.
    """
    return DataLoader(dataset, batch_size, shuffle, drop_last, collate_fn, num_workers, seed)


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


def prefetch_to_device(iterator: Iterable[Any], size: int = 2, device: Any = None) -> Iterator[Any]:
    """The batches of `iterator` on the device, `size` of them on their way while the caller works on one.

    A batch is any pytree of arrays. jax.device_put returns before the copy is done, so copies run beside the
    computation; no thread is started (DataLoader's num_workers makes batches ahead on the host). `device` is a
    jax.Device or a Sharding; None is the default device. Arrays are copied: the source may fill its buffers anew.

    What the source raises is raised after the batches that came before it; a caller that stops early leaves nothing
    running.

    Raises ValueError if size < 1, at once.

    >>> [batch["x"].tolist() for batch in prefetch_to_device({"x": np.full(2, i)} for i in range(3))]
    [[0, 0], [1, 1], [2, 2]]
    """
    size = _at_least("size", size, 1, "with nothing in flight there is nothing to prefetch")
    return _prefetch(iter(iterator), size, device)


def _prefetch(source: Iterator[Any], size: int, device: Any) -> Iterator[Any]:
    queue: deque[Any] = deque()
    failure: BaseException | None = None
    ended = False
    while True:
        while not ended and len(queue) <= size:  # the one to hand out, and `size` behind it
            try:
                queue.append(jax.device_put(jax.tree.map(_own, next(source)), device))
            except StopIteration:
                ended = True
            except Exception as error:
                failure, ended = error, True
        if not queue:
            break
        yield queue.popleft()
    if failure is not None:
        raise failure


def _own(leaf: Any) -> Any:
    """A copy of what lives on the host: on the CPU jax.device_put may keep the very memory of a numpy array."""
    return leaf if isinstance(leaf, jax.Array) else np.array(leaf)


def _stack(items: list[Any]) -> Any:
    """Items, pytrees of one structure, stacked leaf by leaf along a new first axis."""

    def stack(*leaves: Any) -> np.ndarray:
        arrays = [np.asarray(leaf) for leaf in leaves]
        shapes = {array.shape for array in arrays}
        if len(shapes) > 1:
            raise ValueError(
                f"items of shapes {sorted(shapes)} cannot be stacked; give a collate_fn that pads, such as "
                "collate_next_token_batch"
            )
        return np.stack(arrays)

    return jax.tree.map(stack, *items)


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


def _rows(tokens: Any, least: int, why: str) -> Int[np.ndarray, "N T"]:
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not _is_integer(tokens):
        raise ValueError(f"tokens has shape {tuple(tokens.shape)} and dtype {tokens.dtype}: must be (N, T) integers")
    if tokens.shape[0] == 0:
        raise ValueError("tokens has no rows: N must be at least 1; an empty dataset has nothing to draw from")
    if tokens.shape[1] < least:
        raise ValueError(f"tokens has rows of {tokens.shape[1]}: T must be at least {least}, {why}")
    return tokens


def _lengths(name: str, seqs: Sequence[Any]) -> list[int]:
    if not isinstance(seqs, Sequence | np.ndarray | jax.Array):
        raise ValueError(f"{name} is a {type(seqs).__name__}, must be a list of 1-D arrays of integers")
    if len(seqs) == 0:
        raise ValueError(f"{name} has no sequences; a batch of nothing cannot be padded, give at least one")
    for i, seq in enumerate(seqs):
        if not isinstance(seq, np.ndarray | jax.Array):
            raise ValueError(f"{name}[{i}] is a {type(seq).__name__}, must be a 1-D array of integers")
        if seq.ndim != 1 or not _is_integer(seq):
            raise ValueError(
                f"{name}[{i}] has shape {tuple(seq.shape)} and dtype {seq.dtype}, must be a 1-D array of integers"
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


def _is_integer(tokens: np.ndarray | jax.Array) -> bool:
    return bool(np.issubdtype(tokens.dtype, np.integer))  # bool is no integer
