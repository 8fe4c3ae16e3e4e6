"""From a text file to what a language model is trained and validated on (omni_torch's copy).

Shapes: N any, B batch, T time.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from jaxtyping import Int

from .config import BOS_ID, PAD_ID
from .files import read_text

__all__ = ["read_documents", "split_documents", "document_rows", "counted"]


def read_documents(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a UTF-8 text file that are not blank: one document each.

    Raises:
        ValueError: the file cannot be read, is not UTF-8 (the message gives the first bad byte's place), or is blank.
    """
    text = read_text(path, "training text")
    documents = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not documents:
        raise ValueError(f"training text {str(path)!r} has no line that is not blank; give one document a line")
    return documents


def split_documents(documents: list[Any], share: float) -> tuple[list[Any], list[Any]]:
    """(for training, for validation): validation takes documents spread evenly over the text, at least one.

    Raises:
        ValueError: `share` is not 0, and no document would be left for training.
    """
    if share == 0.0:
        return documents, []
    count = max(round(len(documents) * share), 1)
    if count >= len(documents):
        raise ValueError(
            f"val_split={share} takes {count} of the text's {len(documents)} documents, and leaves none for training; "
            "give more lines of text, or set val_split to 0"
        )
    ends = [(i + 1) * count // len(documents) > i * count // len(documents) for i in range(len(documents))]
    return [d for d, end in zip(documents, ends) if not end], [d for d, end in zip(documents, ends) if end]


def document_rows(ids: Int[np.ndarray, " M"], length: int, batch_size: int) -> Int[np.ndarray, "N B T"]:
    """A stream's documents in batches of rows, padded with PAD: each predicted token stands in exactly one row.

    A document longer than a row goes on in the next one, which begins with the last token of the one before.
    """
    starts = np.flatnonzero(ids == BOS_ID)
    pieces = []
    for document in np.split(ids, starts[starts > 0]):
        pieces += [document[at : at + length + 1] for at in range(0, len(document) - 1, length)]
    width = max((len(piece) for piece in pieces), default=2)
    batches = -(-len(pieces) // batch_size)
    rows = np.full((batches * batch_size, width), PAD_ID, np.int32)
    for row, piece in zip(rows, pieces):
        row[: len(piece)] = piece
    return rows.reshape(batches, batch_size, width)


def counted(tokens: Int[np.ndarray, "*N T"]) -> int:
    """How many tokens are predicted: all but the first of each row and PAD."""
    return int((tokens[..., 1:] != PAD_ID).sum())
