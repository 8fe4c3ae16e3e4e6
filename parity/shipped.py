"""The shipped weights: where they lie, and how the figures beside them are found.

Legend of the shape suffixes: N documents, T time, V vocabulary.

`scripts/train_shipped.py` writes the figures with these functions, and the tests find them anew with the same ones.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from parity.corpus import BOS, EOS, PAD

if TYPE_CHECKING:
    from omni_torch.thinker import ThinkerLM
    from omni_torch.tokenizer import BPETokenizer

__all__ = [
    "CONFIG",
    "DIGITS",
    "SIDECAR",
    "TOKENIZER",
    "WEIGHTS",
    "greedy",
    "model_loss",
    "read_sidecar",
    "weights_digest",
]

_ASSETS = Path(__file__).parent / "assets"
CONFIG = _ASSETS / "config.json"
WEIGHTS = _ASSETS / "thinker.pt"
TOKENIZER = _ASSETS / "tokenizer.model"
SIDECAR = _ASSETS / "thinker.json"

DIGITS = 6  # decimals of a loss in the sidecar; float64 losses agree on any machine far beyond that


def read_sidecar() -> dict[str, Any]:
    """The figures of the shipped weights: config, recipe, seeds, versions, losses, hashes."""
    return json.loads(SIDECAR.read_text(encoding="utf-8"))


def weights_digest(state: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, dtypes, shapes and little-endian bytes of all tensors, sorted by name.

    Of the numbers alone, whatever file format carries them.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        array = np.asarray(state[name])
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def model_loss(model: ThinkerLM, rows_NT: Int[np.ndarray, "N T"]) -> float:
    """Nats per token of the torch model in float64 on padded documents; PAD is not predicted, every EOS is.

    In float64 the figure is the same on every machine to some 12 digits. The model itself is left as it was.
    """
    import torch

    wide = copy.deepcopy(model).to(torch.float64).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for first in range(0, len(rows_NT), 16):
            rows = torch.from_numpy(np.ascontiguousarray(rows_NT[first : first + 16]))
            targets = rows[:, 1:]
            logits_NTV = wide(rows[:, :-1])  # PAD stands right of all that counts, where causality hides it
            nats = torch.logsumexp(logits_NTV, -1) - logits_NTV.gather(-1, targets[..., None])[..., 0]
            keep = targets != PAD
            total += float(nats[keep].sum())
            count += int(keep.sum())
    return total / count


def greedy(model: ThinkerLM, tokenizer: BPETokenizer, prompt: str, max_new_tokens: int) -> str:
    """The model's most likely continuation of a text, by full forwards in float64, until EOS."""
    import torch

    wide = copy.deepcopy(model).to(torch.float64).eval()
    ids = [BOS, *tokenizer.encode(prompt)]
    start = len(ids)
    with torch.no_grad():
        while len(ids) - start < max_new_tokens and ids[-1] != EOS:
            ids.append(int(wide(torch.tensor([ids]))[0, -1].argmax()))
    return tokenizer.decode([token for token in ids[start:] if token != EOS])
