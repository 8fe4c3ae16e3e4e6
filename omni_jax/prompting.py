"""What the commands generate and chat share: a model with its tokenizer, and the text of new ids (omni_jax's copy).

The same file stands in both twins.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from .checkpoint_folder import find_checkpoint
from .config import ThinkerConfig
from .files import open_regular_file
from .pt_archive import CheckpointError
from .tokenizer import BPETokenizer

__all__ = ["load_model_and_tokenizer", "continued_text"]

_Path = str | os.PathLike[str]


def load_model_and_tokenizer(
    checkpoint: _Path,
    tokenizer: _Path | None = None,
    config: ThinkerConfig | _Path | None = None,
    n_heads: int | None = None,
    senses: bool = False,
) -> tuple[Any, BPETokenizer, Path]:
    """The model of a checkpoint, its tokenizer, and the path of the tokenizer's file.

    The tokenizer is by default tokenizer.model beside the checkpoint, where a training run has put it; `config` and
    `n_heads` as in infer_config. With `senses` the model is an OmniLM, whose config file tells n_heads.

    Raises:
        CheckpointError: a checkpoint that cannot be used.
        ValueError: another file that cannot be used, or a tokenizer whose vocabulary is not the model's.
    """
    from .fusion import OmniLM
    from .thinker import ThinkerLM

    if senses and n_heads is not None:
        raise ValueError(f"n_heads = {n_heads}: a model that sees or hears has it in its config file; leave it out")
    file = find_checkpoint(checkpoint)
    open_regular_file(file, "checkpoint", CheckpointError).close()  # if it is not there, no other file is to blame
    path = file.with_name("tokenizer.model") if tokenizer is None else Path(tokenizer)
    if tokenizer is None and not path.is_file():
        raise ValueError(
            f"there is no tokenizer.model beside the checkpoint {str(checkpoint)!r}; name the SentencePiece model that "
            "it was trained with: tokenizer= (--tokenizer FILE)"
        )
    vocabulary = BPETokenizer(path)  # before the weights: it is quickly refused
    if senses:
        assert not isinstance(config, ThinkerConfig)
        model: Any = OmniLM.from_checkpoint(checkpoint, config=config)
        thinker = model.thinker
    else:
        model = thinker = ThinkerLM.from_checkpoint(checkpoint, config=config, n_heads=n_heads)
    if vocabulary.vocab_size != thinker.config.vocab_size:
        raise ValueError(
            f"the tokenizer {str(path)!r} has {vocabulary.vocab_size} ids, and the model {str(checkpoint)!r} has "
            f"vocab_size={thinker.config.vocab_size}: must be equal; give the tokenizer that the model was trained with"
        )
    return model, vocabulary, path


def continued_text(tokenizer: BPETokenizer, prompt_ids: Sequence[int], ids: Iterable[int]) -> Iterator[str]:
    """What `ids` add to the text of `prompt_ids`, in pieces, each as soon as it is settled.

    Not the text of `ids` alone: a tokenizer that takes the first space of a text for its own would lose the one
    between the prompt and its continuation.
    """
    left = len(tokenizer.decode(prompt_ids))
    for piece in tokenizer.decode_stream(chain(prompt_ids, ids)):
        if len(piece) > left:
            yield piece[left:]
        left = max(left - len(piece), 0)
