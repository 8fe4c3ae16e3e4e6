"""The corpus that the shipped weights learn from: stories and the project's own prose, one document a line.

Legend of the shape suffixes: B batch, T time, N documents (or positions of a flat array of ids).

Everything is a pure function of its arguments in plain integer arithmetic: the same bytes in every process, on every
machine, with every version of Python and numpy. Stories come in two splits, "train" and "heldout", which share no
text (see parity/grammar.py). The bigram here is the bar that the shipped model must clear.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int

from parity.grammar import Stream, Tale, mix, tell

__all__ = [
    "BOS",
    "DOCS",
    "EOS",
    "PAD",
    "bigram_loss",
    "byte_like_ids",
    "choice_nats",
    "flat_ids",
    "padded_rows",
    "stories",
    "token_batches",
    "training_text",
    "unigram_loss",
]

PAD, BOS, EOS = 0, 1, 2
DOCS = Path(__file__).parent / "assets" / "docs.txt"

# Characters by how often the corpus uses them: with a tiny vocabulary the frequent ones keep an id of their own.
_ALPHABET = " eathonsdrilw.,ugcfmbpk\"yvTIHOASxWBMFLR:N?ZPJVEKqDCjYGQUXz'-;()!0123456789"
_STORY, _BATCH, _ROW = 1, 2, 3  # what a stream of integers is for: no two uses share one


def _tale(seed: int, index: int, held_out: bool) -> Tale:
    return tell(Stream(_STORY, seed, index, held_out), held_out)


def _tales(seed: int, count: int, split: str) -> Iterator[tuple[str, float]]:
    if split not in ("train", "heldout"):
        raise ValueError(f"split={split!r} is not known; use 'train' or 'heldout'")
    for index in range(count):
        tale = _tale(seed, index, split == "heldout")
        yield tale.text, tale.nats


def stories(seed: int, count: int, split: Literal["train", "heldout"] = "train") -> Iterator[str]:
    """The first `count` stories of a seed, each one line of text; story i does not depend on `count`.

    Raises ValueError on an unknown split.
    """
    return (text for text, _ in _tales(seed, count, split))


def choice_nats(seed: int, count: int, split: Literal["train", "heldout"] = "train") -> float:
    """Nats of all choices made in telling `stories(...)`: the code length of a reader that knows the whole grammar."""
    return sum(nats for _, nats in _tales(seed, count, split))


def training_text(seed: int, count: int = 8_000, docs_every: int = 40) -> str:
    """The training corpus: `count` stories of the training split, with a paragraph of DOCS after every `docs_every`.

    The paragraphs come in order, over and over. One document a line, no empty lines, a newline at the end.
    """
    paragraphs = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.strip()]
    lines = []
    for index, story in enumerate(stories(seed, count), start=1):
        lines.append(story)
        if index % docs_every == 0:
            lines.append(paragraphs[(index // docs_every - 1) % len(paragraphs)])
    return "".join(line + "\n" for line in lines)


def flat_ids(documents: Iterable[Sequence[int]]) -> Int[np.ndarray, " N"]:
    """Documents' ids end to end, each as BOS, its ids, EOS."""
    parts = [np.concatenate(([BOS], np.asarray(ids, np.int64), [EOS])) for ids in documents]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def padded_rows(documents: Iterable[Sequence[int]]) -> Int[np.ndarray, "N T"]:
    """One row a document: BOS, its ids, EOS, then PAD up to the longest."""
    rows = [[BOS, *ids, EOS] for ids in documents]
    width = max((len(row) for row in rows), default=0)
    return np.array([row + [PAD] * (width - len(row)) for row in rows], np.int64).reshape(len(rows), width)


def token_batches(
    ids: Int[np.ndarray, " N"], batch_size: int, length: int, seed: int, step: int
) -> Int[np.ndarray, "B T"]:
    """Batch number `step`: rows of `length` ids that each start at a document's BOS and run on into the next ones.

    A pure function of its arguments, so a resumed run needs only the step. If no document starts early enough to fill
    a row, rows start anywhere.

    Raises ValueError if `ids` is shorter than `length`.
    """
    if len(ids) < length:
        raise ValueError(f"length={length} is more than the {len(ids)} ids at hand; shorten rows or add documents")
    last = len(ids) - length
    starts = np.flatnonzero(ids[: last + 1] == BOS)
    if not len(starts):
        starts = np.arange(last + 1)
    firsts = [int(starts[mix(_BATCH, seed, step, row) % len(starts)]) for row in range(batch_size)]
    return np.stack([ids[first : first + length] for first in firsts]) if firsts else np.zeros((0, length), ids.dtype)


def byte_like_ids(vocab_size: int, batch: int, length: int, seed: int, step: int) -> Int[np.ndarray, "B T"]:
    """A batch of training stories for vocabularies too small for the tokenizer: one id in [3, vocab_size) a character.

    A character's id is 3 + (its rank by frequency mod (vocab_size − 3)). Row: BOS, then a piece of a story that starts
    at a word; every other row stops early, with EOS and then PAD. A pure function of its arguments.

    Raises ValueError if vocab_size < 4 or length < 4.
    """
    if vocab_size < 4:
        raise ValueError(f"vocab_size={vocab_size} has no id beside PAD, BOS and EOS; use at least 4")
    if length < 4:
        raise ValueError(f"length={length} has no room for BOS, text, EOS and PAD; use at least 4")
    rank = {character: index for index, character in enumerate(_ALPHABET)}
    out_BT = np.full((batch, length), PAD, np.int64)
    for row in range(batch):
        stream = Stream(_ROW, seed, step, row)
        text = _tale(seed, stream.between(0, 2**31), held_out=False).text
        words = [index + 1 for index, character in enumerate(text) if character == " " and index + length < len(text)]
        text = text[stream.pick([0, *words]) :]
        size = min(length - 1 if row % 2 == 0 else stream.between(max(1, length // 2 - 2), length - 3), len(text))
        ids = [3 + rank.get(character, len(rank)) % (vocab_size - 3) for character in text[:size]]
        out_BT[row, : size + 1] = [BOS, *ids]
        if size + 1 < length:
            out_BT[row, size + 1] = EOS
    return out_BT


def _pairs(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(previous, next) inside documents: a next BOS starts another document and is nobody's prediction."""
    before, after = ids[:-1], ids[1:]
    keep = (after != BOS) & (after != PAD)
    return before[keep], after[keep]


def _unigram(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Add-one smoothed frequencies of what has to be predicted."""
    counts = np.bincount(_pairs(ids)[1], minlength=vocab_size) + 1.0
    return counts / counts.sum()


def _bigram_nats(
    train_ids: np.ndarray, test_ids: np.ndarray, vocab_size: int, choices: Sequence[tuple[float, bool]]
) -> list[float]:
    """Nats per token of test_ids for each (k, whether to fall back on the unigram)."""
    before, after = _pairs(train_ids)
    counts = np.bincount(before * vocab_size + after, minlength=vocab_size**2).reshape(vocab_size, vocab_size)
    test_before, test_after = _pairs(test_ids)
    seen, total = counts[test_before, test_after], counts.sum(1)[test_before]
    unigram = _unigram(train_ids, vocab_size)[test_after]
    nats = []
    for k, backoff in choices:
        prior = unigram if backoff else 1.0 / vocab_size
        nats.append(float(-np.mean(np.log((seen + k * vocab_size * prior) / (total + k * vocab_size)))))
    return nats


def _vocab_size(train_ids: np.ndarray, heldout_ids: np.ndarray) -> int:
    return int(max(train_ids.max(), heldout_ids.max())) + 1


def unigram_loss(train_ids: Int[np.ndarray, " N"], heldout_ids: Int[np.ndarray, " M"]) -> float:
    """Nats per token of held-out ids under the training ids' add-one smoothed frequencies."""
    frequencies = _unigram(train_ids, _vocab_size(train_ids, heldout_ids))
    return float(-np.mean(np.log(frequencies[_pairs(heldout_ids)[1]])))


def bigram_loss(train_ids: Int[np.ndarray, " N"], heldout_ids: Int[np.ndarray, " M"]) -> float:
    """Nats per token of held-out ids under the best smoothed bigram of the training ids.

    P(b | a) = (c(a, b) + k·V·q(b)) / (c(a) + k·V), which is add-k when q is uniform. The bigram gets its best chance:
    k and q (uniform or the unigram) are those that do best on the last tenth of the training ids when the counts come
    from the rest; then all training ids are counted. Predictions of BOS and PAD are left out, as the model's are.
    """
    vocab_size = _vocab_size(train_ids, heldout_ids)
    cut = len(train_ids) * 9 // 10
    while cut < len(train_ids) - 1 and train_ids[cut] != BOS:  # between two documents
        cut += 1
    choices = [(10.0**exponent, backoff) for exponent in range(-6, 2) for backoff in (False, True)]
    validation = _bigram_nats(train_ids[:cut], train_ids[cut:], vocab_size, choices)
    return _bigram_nats(train_ids, heldout_ids, vocab_size, [choices[int(np.argmin(validation))]])[0]
