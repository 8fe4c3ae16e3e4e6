"""The command chat: lines from the user and replies of the model, which share one context (omni_torch's copy).

The same file stands in both twins.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from .config import BOS_ID, EOS_ID
from .prompting import continued_text, load_model_and_tokenizer
from .tokenizer import BPETokenizer

__all__ = ["run_chat"]

_Path = str | os.PathLike[str]
_PROMPT = "you> "
_LONGEST_REPLY = 256  # tokens, unless the user says otherwise


def run_chat(
    checkpoint: _Path,
    *,
    tokenizer: _Path | None = None,
    config: _Path | None = None,
    n_heads: int | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> None:
    """Read lines from stdin and print replies until the input ends or /quit comes.

    max_new_tokens: of one reply; by default 256, or half of ctx_len where that is less. The model sees the last
    ctx_len - max_new_tokens tokens of the conversation. The other arguments are load_model_and_tokenizer's and
    generate's.

    Raises:
        ValueError: an input or a setting that cannot be used.
        NumericalError: the model's logits are NaN or infinite.
    """
    from .generation import generate

    if sys.stdin is None:
        raise ValueError("stdin is closed, and a chat reads its lines from it; start it with stdin open")
    model, vocabulary, _ = load_model_and_tokenizer(checkpoint, tokenizer, config, n_heads)
    ctx_len = model.config.ctx_len
    longest = min(_LONGEST_REPLY, ctx_len // 2) if max_new_tokens is None else max_new_tokens
    if not 1 <= longest <= ctx_len - 2:
        raise ValueError(
            f"max_new_tokens={longest} is not allowed: must be 1 to {ctx_len - 2}, for a context of ctx_len={ctx_len} "
            "holds a reply and at least two tokens before it; give another max_new_tokens (--max-new-tokens)"
        )
    generate(model, [BOS_ID], max_new_tokens=0, seed=seed, **settings)  # refuses bad settings before anything is said
    with suppress(ImportError):  # not on every system; where it is there, lines can be edited
        import readline  # noqa: F401
    conversation = _Conversation(vocabulary, ctx_len - longest)
    while (line := _read_line()) is not None and line != "/quit":
        if line == "/reset":
            conversation = _Conversation(vocabulary, ctx_len - longest)
            print("(forgotten; the conversation begins anew)")
        elif line.startswith("/"):
            print(f"({line} is no command: there are /reset and /quit)")
        elif line:
            try:
                conversation.add_line(line)
            except ValueError as bad:  # a line that is no text ends nothing
                print(f"error: {bad}", file=sys.stderr)
                continue
            # A seed of its own for every turn, or each would draw the same numbers.
            conversation.reply(model, settings | {"max_new_tokens": longest, "seed": seed + conversation.turns - 1})


def _read_line() -> str | None:
    """The next line without space around it; None where the input ends."""
    while True:
        try:
            return input(_PROMPT).strip()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print("\n(Ctrl-D or /quit ends the chat)")


class _Conversation:
    """The tokens said so far, no more than `room` of them: the oldest go, BOS at the front stays."""

    def __init__(self, vocabulary: BPETokenizer, room: int) -> None:
        self.ids: list[int] = []
        self.turns = 0
        self._vocabulary = vocabulary
        self._room = room
        self._slid = False

    def add_line(self, line: str) -> None:
        """The user's line: a text of its own after one that has ended, otherwise the next words of the same text."""
        new = not self.ids or self.ids[-1] == EOS_ID
        self.ids += self._vocabulary.encode(line if new else f" {line}", add_bos=new)
        self.turns += 1
        if len(self.ids) > self._room:
            self.ids = [BOS_ID, *self.ids[len(self.ids) - self._room + 1 :]]
            if not self._slid:
                print(f"(the context is full: from here on the model sees the last {self._room} tokens)")
            self._slid = True

    def reply(self, model: Any, settings: dict[str, Any]) -> None:
        """Print the model's reply while it comes, and keep it; Ctrl-C ends it."""
        taken: list[int] = []
        try:
            for piece in continued_text(self._vocabulary, tuple(self.ids), _taken(model, self.ids, settings, taken)):
                print(piece, end="", flush=True)
            print()
        except KeyboardInterrupt:
            print(" (stopped)")
        self.ids += taken


def _taken(model: Any, ids: list[int], settings: dict[str, Any], taken: list[int]) -> Iterator[int]:
    """The ids of the reply, each noted in `taken` before it is shown."""
    from .generation import generate

    for (number,) in generate(model, ids, stream=True, **settings):
        taken.append(number)
        yield number
