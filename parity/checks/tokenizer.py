"""Both twins' tokenizers against SentencePiece itself: ids, texts, streams, and what must be refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from parity.checks import Progress, Scope
from parity.result import CheckResult, Control, Row
from parity.verdict import Verdict

__all__ = ["BLIND", "CLAIM", "CONTROLS", "run"]

CLAIM = (
    "Both tokenizers give the ids of SentencePiece itself, with BOS and EOS where they are asked for, and its texts of "
    "any ids, whole and as a stream that never breaks a character; they refuse ids that are none."
)
BLIND = (
    "Texts and vocabularies that were not tried: the shipped model, and texts with runs of spaces, white space at the "
    "ends, characters of several bytes and code points, control characters, and what looks like a special token. What "
    "SentencePiece itself gets wrong."
)
CONTROLS = {
    "a space in front": "a space is put before every text",
    "spaces merged": "runs of spaces become one",
    "BOS missing": "BOS is never there",
    "broken characters": "a stream gives each token's text at once",
    "wraps": "an id of -1 is the last one",
}
TEXTS = (
    "", "the fox", " ran  over ", "\n\nan owl\t", "🦊🏳️‍🌈 שלום مرحبا", "e\u0301\u0323\u202e\ufeff", "\0\r\n",
    "<s> and </s>", "<0x41>", "  two  spaces", "語", "Once upon a time, 12 foxes",
)  # fmt: skip
"""Spaces in front, in a row and behind; signs of several characters; what looks like special tokens."""

Answers = Mapping[str, tuple[list[Any], list[Any]]]
"""question -> (what was given, what is right), item by item."""


def run(scope: Scope, progress: Progress) -> CheckResult:
    """A row for each twin and question."""
    import sentencepiece

    import omni_jax.tokenizer
    import omni_torch.tokenizer
    from parity.shipped import TOKENIZER

    started = time.perf_counter()
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
    result = CheckResult("tokenizer")
    for side, module in (("jax", omni_jax.tokenizer), ("torch", omni_torch.tokenizer)):
        tokenizer = module.BPETokenizer(TOKENIZER)
        for name, (gave, wanted) in _answers(tokenizer, oracle).items():
            wrong = [(x, y) for x, y in zip(gave, wanted, strict=True) if x != y]
            words = f"{len(wrong)} of {len(gave)} differ" if wrong else f"{len(gave)} equal"
            words += f", first {wrong[0][0]!r:.80} for {wrong[0][1]!r:.80}" if wrong else ""
            verdict = Verdict.DIFFER if wrong else Verdict.AGREE
            result.rows.append(Row("tokenizer", "", "", "", f"{name} ({side})", verdict, words))
    if scope.controls:
        tokenizer = omni_torch.tokenizer.BPETokenizer(TOKENIZER)
        for name, changes in _wrongs(tokenizer).items():
            answers = _answers(_Changed(tokenizer, changes), oracle)
            seen = [question for question, (gave, wanted) in answers.items() if gave != wanted]
            result.controls.append(Control(name, bool(seen), f"seen in {', '.join(seen) or 'nothing'}"))
    progress(1, 1, "")
    result.seconds = time.perf_counter() - started
    return result


def _answers(tokenizer: Any, oracle: Any) -> Answers:
    spelt = [oracle.encode(text) for text in TEXTS]
    # A single byte of a character, bytes that are none, and special ids in the middle.
    fox = oracle.encode("🦊")
    odd = [fox[:1], fox[:-1] + spelt[1], [1, *spelt[1], 2], [0, 0, *spelt[3], 0], spelt[4] + spelt[2]]
    texts = [oracle.decode(ids) for ids in [*spelt, *odd]]
    return {
        "ids": ([tokenizer.encode(text) for text in TEXTS], spelt),
        "ids with BOS": ([tokenizer.encode(t, add_bos=True) for t in TEXTS], [[oracle.bos_id(), *x] for x in spelt]),
        "ids with EOS": ([tokenizer.encode(t, add_eos=True) for t in TEXTS], [[*x, oracle.eos_id()] for x in spelt]),
        "texts": ([tokenizer.decode(ids) for ids in [*spelt, *odd]], texts),
        "streams": (["".join(tokenizer.decode_stream(ids)) for ids in [*spelt, *odd]], texts),
        "pieces": ([_whole(tokenizer, ids) for ids in spelt], [True for _ in spelt]),
        "refusals": ([_refuses(tokenizer, i) for i in (-1, tokenizer.vocab_size, True)], [True, True, True]),
        "special ids": (
            [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size],
            [oracle.pad_id(), oracle.bos_id(), oracle.eos_id(), oracle.vocab_size()],
        ),
    }


def _whole(tokenizer: Any, ids: list[int]) -> bool:
    """No piece of a sound text holds a broken character, and none is empty."""
    return all(piece and "\ufffd" not in piece for piece in tokenizer.decode_stream(ids))


def _refuses(tokenizer: Any, number: int) -> bool:
    try:
        tokenizer.decode([number])
    except ValueError:
        return True
    return False


# ------------------------------------------------------------------------------------------------ controls


@dataclass(frozen=True)
class _Changed:
    """A tokenizer of which some methods are others."""

    right: Any
    changes: Mapping[str, Callable[..., Any]]

    def __getattr__(self, name: str) -> Any:
        return self.changes[name] if name in self.changes else getattr(self.right, name)


def _wrongs(right: Any) -> dict[str, dict[str, Callable[..., Any]]]:
    """What CONTROLS names: the changed methods."""
    return {
        "a space in front": {"encode": lambda text, **rest: right.encode(" " + text, **rest)},
        "spaces merged": {"encode": lambda text, **rest: right.encode(text.replace("  ", " "), **rest)},
        "BOS missing": {"encode": lambda text, add_bos=False, **rest: right.encode(text, **rest)},
        "broken characters": {"decode_stream": lambda ids: [right.decode([i]) for i in ids]},
        "wraps": {"decode": lambda ids: right.decode([i % right.vocab_size for i in ids])},
    }
