"""The command generate: the continuation of a prompt on stdout, as text or as JSON (omni_jax's copy).

The same file stands in both twins.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from .prompting import continued_text, load_model_and_tokenizer
from .senses import read_senses
from .tokenizer import BPETokenizer

__all__ = ["run_generate"]

_Path = str | os.PathLike[str]


def run_generate(
    checkpoint: _Path,
    prompt: str,
    *,
    tokenizer: _Path | None = None,
    config: _Path | None = None,
    n_heads: int | None = None,
    as_json: bool = False,
    stream: bool | None = None,
    seed: int = 0,
    num_samples: int = 1,
    image: _Path | None = None,
    audio: _Path | None = None,
    **settings: Any,
) -> None:
    """Print what the model says after `prompt` ("-": after the text on stdin).

    image, audio: files of a picture and of a sound that stand before the prompt, for an OmniLM.
    as_json: one JSON object. stream: print the text while it is made; by default where there is one sample and no
    JSON. The other arguments are load_model_and_tokenizer's and generate's.

    Raises:
        ValueError: an input or a setting that cannot be used.
        NumericalError: the model's logits are NaN or infinite.
    """
    if stream and (as_json or num_samples != 1):
        raise ValueError("--stream shows one text while it grows; leave it out, or leave out --json and --num-samples")
    text = _read_stdin() if prompt == "-" else prompt
    if not text:
        raise ValueError("the prompt is empty: give at least one character of text to go on from")
    files = {name: file for name, file in (("image", image), ("audio", audio)) if file is not None}
    model, vocabulary, path = load_model_and_tokenizer(checkpoint, tokenizer, config, n_heads, bool(files))
    if files:
        settings |= read_senses(model, image, audio)
    prompt_ids = vocabulary.encode(text, add_bos=True)
    settings |= {"seed": seed, "num_samples": num_samples}
    if as_json:
        named = {"checkpoint": os.fspath(checkpoint), "tokenizer": str(path), "prompt": text, "seed": seed}
        named |= {name: os.fspath(file) for name, file in files.items()}
        print(json.dumps(named | _timed_rows(model, vocabulary, prompt_ids, settings)))
    elif stream or (stream is None and num_samples == 1):
        for piece in continued_text(vocabulary, prompt_ids, _streamed(model, prompt_ids, settings)):
            print(piece, end="", flush=True)
        print()
    else:
        for i, row in enumerate(_rows(model, vocabulary, prompt_ids, settings)):
            heading = f"--- {i + 1} of {num_samples}\n" if num_samples > 1 else ""
            print(f"{heading}{row['text']}")


def _streamed(model: Any, prompt_ids: list[int], settings: dict[str, Any]) -> Iterator[int]:
    """The ids of the only row, one by one."""
    from .generation import generate

    for (number,) in generate(model, prompt_ids, stream=True, **settings):
        yield number


def _rows(
    model: Any, vocabulary: BPETokenizer, prompt_ids: list[int], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Text, ids, log-probabilities and the reason of the end, row by row."""
    from .generation import generate

    made = generate(model, prompt_ids, **settings)
    return [
        {
            "text": "".join(continued_text(vocabulary, prompt_ids, tokens)),
            "tokens": tokens,
            "logprobs": logprobs,
            "stop_reason": stop_reason,
        }
        for tokens, logprobs, stop_reason in zip(made.tokens, made.logprobs, made.stop_reasons, strict=True)
    ]


def _timed_rows(
    model: Any, vocabulary: BPETokenizer, prompt_ids: list[int], settings: dict[str, Any]
) -> dict[str, Any]:
    """The rows, and how fast they came: a stream is begun for its first token, then all is made in one go.

    seconds_to_first_token is the first call's, with whatever is compiled or read then. tokens_per_second is a call's
    for which everything is ready: all new tokens, over the time of the prompt and theirs.
    """
    from .generation import generate

    start = time.perf_counter()
    steps = iter(generate(model, prompt_ids, stream=True, **settings))
    first = next(steps, None)
    to_first = time.perf_counter() - start
    next(steps, None)  # in JAX the tokens after the first have a program of their own
    start = time.perf_counter()
    rows = _rows(model, vocabulary, prompt_ids, settings)
    seconds = time.perf_counter() - start
    count = sum(len(row["tokens"]) for row in rows)
    return {
        "rows": rows,
        "tokens_per_second": count / seconds if count else None,
        "seconds_to_first_token": None if first is None else to_first,
    }


def _read_stdin() -> str:
    """The text on stdin, without the end of its last line, which echo and editors add."""
    if sys.stdin is None:
        raise ValueError("stdin is closed, and the prompt - is read from it; give the text to --prompt itself")
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as bad:
        raise ValueError(
            f"the prompt on stdin is not UTF-8 at byte {bad.start}; convert it, for example with `iconv -t UTF-8`"
        ) from None
