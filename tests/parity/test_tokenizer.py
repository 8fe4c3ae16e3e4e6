"""Both twins' tokenizers give the same ids, texts, streams and refusals: strings from every corner of Unicode."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import omni_jax.tokenizer
import omni_torch.tokenizer

SHIPPED = Path(__file__).parent.parent.parent / "parity" / "assets" / "tokenizer.model"
TWINS = (omni_jax.tokenizer.BPETokenizer, omni_torch.tokenizer.BPETokenizer)
STORY = "".join(f"Once upon a time, {i} foxes ran over the hill,\tand the owl said {i + 1}.\n" for i in range(200))
STRINGS = 2000
PARTS = (
    "the fox",
    " ran ",
    "🦊",
    "🏳️‍🌈",  # one sign, four characters
    "👩🏽‍🚀",
    "שלום",
    "مرحبا",
    "\u202e",  # right to left from here on
    "e\u0301\u0323",  # a letter with two marks
    "ก็",
    "\0",
    "\n",
    "\r\n",
    "\t",
    "  ",
    "\u00a0",
    "\u2028",
    "\ufeff",
    "\ufffd",
    "\U0010ffff",
    "語",
    "<s>",
    "</s>",
    "<0x41>",
)
LONG_LINE = 1_000_000  # bytes of UTF-8


def strings() -> list[str]:
    """A third from the parts, a third of characters from the whole of Unicode, a third of both."""
    rng = random.Random(2026)

    def anywhere() -> str:
        point = rng.choice((rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0xE000, 0x110000)))
        return chr(point)

    sources = (lambda: rng.choice(PARTS), anywhere, lambda: rng.choice((rng.choice(PARTS), anywhere())))
    return ["".join(sources[i % 3]() for _ in range(rng.randrange(20))) for i in range(STRINGS)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Each pair read from one file: the shipped model, a model that each twin trained, and the library's defaults."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "story.txt").write_text(STORY, encoding="utf-8", newline="")
    files = [SHIPPED]
    for twin in TWINS:
        files.append(folder / f"{twin.__module__}.model")
        twin.train(folder / "story.txt", files[-1], 400)
    files.append(folder / "prefix.model")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "story.txt"),
        model_prefix=str(folder / "prefix"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    assert files[1].read_bytes() == files[2].read_bytes()
    return [tuple(twin(file) for twin in TWINS) for file in files]


def test_the_same_ids_and_texts(pairs) -> None:
    for j, t in pairs:
        for text in strings():
            ids = j.encode(text, add_bos=True, add_eos=True)
            assert ids == t.encode(text, add_bos=True, add_eos=True), text
            assert j.decode(ids) == t.decode(ids), text
            assert list(j.decode_stream(ids)) == list(t.decode_stream(ids)), text
            assert "".join(j.decode_stream(ids)) == j.decode(ids), text
    for j, _ in pairs[:3]:  # the library's defaults normalise the text; ours give every text back
        assert all(j.decode(j.encode(text)) == text for text in strings() if "\u2581" not in text)


@pytest.mark.long
def test_the_same_for_a_line_of_a_megabyte(pairs) -> None:
    line = "".join(" ".join(strings()).split("\n"))
    text = line * (LONG_LINE // len(line.encode()) + 1)
    assert len(text.encode()) >= LONG_LINE
    j, t = pairs[0]
    ids = j.encode(text)
    assert ids == t.encode(text)
    assert j.decode(ids) == t.decode(ids) == text
    assert "".join(j.decode_stream(ids)) == "".join(t.decode_stream(ids)) == text


def test_the_same_for_ids_that_no_text_gives(pairs) -> None:
    rng = random.Random(1)
    for j, t in pairs:
        for _ in range(500):
            ids = rng.choices(range(j.vocab_size if rng.random() < 0.5 else 260), k=rng.randrange(12))
            assert j.decode(ids) == t.decode(ids) == "".join(j.decode_stream(ids)), ids
            assert list(j.decode_stream(ids)) == list(t.decode_stream(ids)), ids


@pytest.mark.parametrize(
    "call",
    [
        lambda tokenizer: tokenizer.encode(b"fox"),
        lambda tokenizer: tokenizer.encode("half \ud83e of a pair"),
        lambda tokenizer: tokenizer.decode([5, 1 << 20]),
        lambda tokenizer: tokenizer.decode([5.0]),
        lambda tokenizer: list(tokenizer.decode_stream([5, -1])),
        lambda tokenizer: type(tokenizer)("/nowhere/tokenizer.model"),
    ],
)
def test_the_same_refusals(pairs, call) -> None:
    said = []
    for tokenizer in pairs[0]:
        with pytest.raises(ValueError) as refused:
            call(tokenizer)
        said.append((type(refused.value).__name__, str(refused.value)))
    assert said[0] == said[1]
