"""BPETokenizer: text to token ids and back, over a SentencePiece BPE model file.

The model file is checked here, field by field, before SentencePiece's C++ sees it: that library trusts the tables
inside and walks out of bounds where they lie.
"""

from __future__ import annotations

import codecs
import io
import math
import operator
import os
import struct
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from .files import open_regular_file, read_text, write_atomic
from .layers import TokenIdError

__all__ = ["BPETokenizer"]

_PAD, _BOS, _EOS, _UNK = 0, 1, 2, 3  # the family's ids; SentencePiece's own defaults are -1, 1, 2, 0
_LARGEST_FILE = 64 << 20  # bytes; a model of 256,000 pieces has 5 MB
_LONGEST_LINE = 1 << 30  # bytes; SentencePiece silently skips training lines beyond its default of 4,192
_SPACE = "\u2581"  # how a piece writes the space


class BPETokenizer:
    """SentencePiece BPE tokenizer with the family's special ids: PAD 0, BOS 1, EOS 2.

    Args:
        path: a SentencePiece `.model` file of type BPE.

    Raises:
        ValueError: the file is missing, empty, a Git-LFS pointer, damaged, of another type, or has other special ids.

    Source: Kudo and Richardson, "SentencePiece", EMNLP 2018, section 3; Sennrich et al., ACL 2016 (BPE).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        name = f"tokenizer model {str(path)!r}"
        with open_regular_file(path, "tokenizer model") as stream:
            model = stream.read(_LARGEST_FILE + 1)
        if len(model) > _LARGEST_FILE:
            raise ValueError(f"{name} is larger than {_LARGEST_FILE} bytes; give a SentencePiece .model file")
        try:
            self._facts = _check_model(model)
            self._processor = _load_processor(model)
            if self._processor.vocab_size() != self._facts.pieces:
                raise _BadModel(f"{self._facts.pieces} pieces were read as {self._processor.vocab_size()}")
        except _BadModel as bad:
            raise ValueError(
                f"{name} is not a usable SentencePiece BPE model: {bad}; "
                "train one with BPETokenizer.train or fetch the file again"
            ) from None
        for field, want in (("pad_id", _PAD), ("bos_id", _BOS), ("eos_id", _EOS)):
            have = getattr(self._processor, field)()
            if have != want:
                raise ValueError(
                    f"{name} has {field} = {have}, and this model family needs {want}; "
                    "train it with pad_id=0, bos_id=1, eos_id=2 (BPETokenizer.train does)"
                )

    @property
    def vocab_size(self) -> int:
        """Number of token ids; valid ids are 0 to vocab_size - 1."""
        return self._facts.pieces

    @property
    def pad_id(self) -> int:
        """The id of padding, 0."""
        return _PAD

    @property
    def bos_id(self) -> int:
        """The id that begins a text, 1."""
        return _BOS

    @property
    def eos_id(self) -> int:
        """The id that ends a text, 2."""
        return _EOS

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Token ids of `text`; `add_bos` puts BOS before them, `add_eos` EOS after them.

        The text itself never gives a special id: "<s>" in it is spelt as any three characters.

        Raises:
            ValueError: `text` is not a str, or holds half of a surrogate pair, which UTF-8 cannot express.
        """
        if not isinstance(text, str):
            raise ValueError(f"text must be a str, not {type(text).__name__}; decode bytes as UTF-8 first")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as bad:
            raise ValueError(
                f"text[{bad.start}] is the lone surrogate {text[bad.start]!r}, which is no character; "
                "read the text as UTF-8, or replace it with text.encode('utf-8', 'replace')"
            ) from None
        return [_BOS] * bool(add_bos) + list(self._processor.encode(text)) + [_EOS] * bool(add_eos)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the token ids; PAD, BOS and EOS add nothing, bytes that are not UTF-8 become U+FFFD.

        With a model of `BPETokenizer.train`, `decode(encode(text)) == text` for every text without U+2581, the mark
        that SentencePiece keeps for the space.

        Raises:
            TokenIdError: an id is not an integer in 0 .. vocab_size - 1.
        """
        checked = list(self._checked(ids))
        return self._processor.decode(checked) if checked else ""

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of `decode(ids)` in pieces, each as soon as the ids taken so far settle it.

        The pieces are not empty, never hold a part of a character (a Unicode code point), and join to exactly
        decode(ids), whatever the ids. A byte is held back only while it may still begin a character. Ids are taken one
        at a time; the cost is linear in their number. A model with a denormalisation table, which may rewrite text
        over any distance, gives everything at the end.

        Raises:
            TokenIdError: as `decode`, when the wrong id is reached.
        """
        if self._facts.denormalizes:
            pieces = (self.decode(given) for given in [ids])  # not before the first piece is asked for
        else:
            pieces = self._pieces(self._checked(ids))
        return (piece for piece in pieces if piece)

    def _pieces(self, ids: Iterator[int]) -> Iterator[str]:
        """What each id adds to the text, by the rules of SentencePiece's Decode."""
        processor, facts = self._processor, self._facts
        run = _ByteRun()
        # Such a model begins every text with a space of its own, which does not belong to the text.
        at_start = facts.adds_space or facts.trims_spaces
        for number in ids:
            if processor.is_byte(number):
                at_start = False
                yield run.add(int(processor.id_to_piece(number)[1:5], 16))  # "<0xE2>"
                continue
            yield run.end()
            if processor.is_control(number):
                continue
            if processor.is_unknown(number):
                text, dropped = processor.decode([number]), False
            else:
                piece = processor.id_to_piece(number)
                dropped = at_start and piece.startswith(_SPACE)
                text = piece[dropped:].replace(_SPACE, " ")
            yield text
            # Trimming goes on up to the first text; a space that was added is only one.
            at_start = at_start and not text and not (dropped and not facts.trims_spaces)
        yield run.end()

    def _checked(self, ids: Iterable[int]) -> Iterator[int]:
        """`ids` as integers, each looked at when it is taken."""
        for position, value in enumerate(ids):
            try:
                number = None if isinstance(value, bool | np.bool_) else operator.index(value)
            except TypeError:
                number = None
            if number is None:
                raise TokenIdError(f"ids[{position}] = {value!r} is not an integer; give one flat list of token ids")
            if not 0 <= number < self._facts.pieces:
                raise TokenIdError(
                    f"ids[{position}] = {number} is not a token id; allowed are 0 to {self._facts.pieces - 1}; "
                    "use the tokenizer that the ids were made with"
                )
            yield number

    @classmethod
    def train(
        cls, text_path: str | os.PathLike[str], out_model: str | os.PathLike[str], vocab_size: int
    ) -> BPETokenizer:
        """Train a BPE model on a UTF-8 text file, one sentence a line, write it to `out_model`, and load it.

        The same text and vocab_size give the same bytes: one thread, no sampling, no path or date in the file. No
        normalisation and no invented space, so that decoding gives the text back; a character that training did not
        see is spelt in bytes (256 pieces); the end of a line is a piece of its own.

        Raises:
            ValueError: the text is missing, empty or not UTF-8, or vocab_size does not fit it.
            OSError: `out_model` cannot be written.
        """
        import sentencepiece

        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 1:
            raise ValueError(f"vocab_size must be a positive integer, not {vocab_size!r}")
        text = read_text(text_path, "training text")
        lines = text.split("\n")
        if "\0" in text or not text.strip():
            raise ValueError(f"training text {str(text_path)!r} has no line of text, or holds NUL; give plain text")
        written = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(line for line in lines if line),  # an iterator, or the path lands in the file
                model_writer=written,
                model_type="bpe",
                vocab_size=vocab_size,
                hard_vocab_limit=True,
                pad_id=_PAD,
                bos_id=_BOS,
                eos_id=_EOS,
                unk_id=_UNK,
                byte_fallback=True,
                user_defined_symbols=["\n"],
                character_coverage=1.0,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                split_digits=False,
                max_sentencepiece_length=16,
                max_sentence_length=_LONGEST_LINE,
                input_sentence_size=0,
                shuffle_input_sentence=False,
                num_threads=1,
                minloglevel=2,  # errors come back as exceptions
            )
        except RuntimeError as bad:
            reason = str(bad).rsplit("] ", 1)[-1].split(" Increase ")[0]
            raise ValueError(
                f"no tokenizer of vocab_size = {vocab_size} for {str(text_path)!r}: {reason} "
                "(special ids, bytes and the line end take 261 of them)"
            ) from None
        write_atomic(out_model, lambda stream: _write(stream, written.getvalue()))
        return cls(out_model)

    def __repr__(self) -> str:
        return f"BPETokenizer(vocab_size={self.vocab_size})"


class _ByteRun:
    """The characters of bytes that come one at a time; U+FFFD for each byte that is part of none."""

    def __init__(self) -> None:
        # "surrogateescape" gives one character for each wrong byte ("replace" may give one for several).
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def add(self, byte: int) -> str:
        """What this byte settles."""
        text = self._utf8.decode(bytes([byte]))
        # Python waits for the third byte of a surrogate, which would be as wrong.
        return self._replaced(text) + (self.end() if b"\xed\xa0" <= self._utf8.getstate()[0] < b"\xee" else "")

    def end(self) -> str:
        """What the bytes held back are when no other follows."""
        return self._replaced(self._utf8.decode(b"", final=True))

    @staticmethod
    def _replaced(text: str) -> str:
        return "".join("\ufffd" if "\udc80" <= c <= "\udcff" else c for c in text)


def _write(stream: BinaryIO, data: bytes) -> None:
    stream.write(data)


class _BadModel(Exception):
    """What is wrong with a model file."""


def _load_processor(model: bytes):
    """SentencePiece's processor over the checked bytes."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except (RuntimeError, ValueError, OSError) as bad:
        raise _BadModel(str(bad).rsplit("] ", 1)[-1].strip() or "SentencePiece refuses it") from None
    return processor


# The fields of sentencepiece_model.proto that decide what the C++ code reads where.
_PIECES, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5
_MODEL_TYPE_BPE = 2
_CHARSMAP, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES = 2, 3, 4  # in the two normalisers
_UNKNOWN, _CONTROL, _BYTE = 2, 3, 6  # piece types; 1 normal, 4 user-defined, 5 unused


class _Facts(NamedTuple):
    """What decoding needs to know of a model."""

    pieces: int
    adds_space: bool  # a space before every text ("dummy prefix")
    trims_spaces: bool
    denormalizes: bool


def _check_model(model: bytes) -> _Facts:
    """What the model is; raises _BadModel unless the protocol buffer is a well-formed BPE model."""
    seen: set[bytes] = set()
    types: dict[int, int] = {}
    model_type: int | None = None
    flags = {_ADD_DUMMY_PREFIX: True, _REMOVE_EXTRA_WHITESPACES: True}  # where the file does not say
    denormalizes = False
    for field, value in _fields(model):
        if field not in range(1, 6) or not isinstance(value, bytes):
            raise _BadModel(f"it has the unknown field {field}")
        if field == _PIECES:
            index = len(seen)
            piece, kind = _check_piece(index, value)
            if piece in seen:
                raise _BadModel(f"piece {index} ({piece!r}) stands there twice")
            seen.add(piece)
            types[kind] = types.get(kind, 0) + 1
        elif field == _TRAINER:
            for inner, number in _fields(value):
                if inner == 3:  # model_type
                    model_type = number if isinstance(number, int) else None
        elif field in (_NORMALIZER, _DENORMALIZER):
            for inner, setting in _fields(value):
                if inner == _CHARSMAP:
                    _check_charsmap(setting)
                    denormalizes = bool(setting) if field == _DENORMALIZER else denormalizes
                elif field == _NORMALIZER and inner in flags and isinstance(setting, int):
                    flags[inner] = bool(setting)
    if not seen:
        raise _BadModel("it has no pieces")
    if model_type != _MODEL_TYPE_BPE:
        raise _BadModel(f"its model type is {model_type}, not BPE ({_MODEL_TYPE_BPE})")
    if types.get(_UNKNOWN, 0) != 1:
        raise _BadModel(f"it has {types.get(_UNKNOWN, 0)} unknown pieces instead of 1")
    if types.get(_BYTE, 0) not in (0, 256):
        raise _BadModel(f"it has {types.get(_BYTE, 0)} byte pieces instead of 0 or 256")
    return _Facts(len(seen), flags[_ADD_DUMMY_PREFIX], flags[_REMOVE_EXTRA_WHITESPACES], denormalizes)


def _check_piece(index: int, message: bytes) -> tuple[bytes, int]:
    """The text and the type of one piece."""
    piece, kind = b"", 1
    for field, value in _fields(message):
        if field == 1 and isinstance(value, bytes):
            piece = value
        elif field == 2 and isinstance(value, float):
            if not math.isfinite(value):
                raise _BadModel(f"the score of piece {index} is {value}")
        elif field == 3 and isinstance(value, int) and 1 <= value <= 6:
            kind = value
        else:
            raise _BadModel(f"piece {index} has a wrong field {field}")
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError:
        raise _BadModel(f"piece {index} is not UTF-8") from None
    if not piece or b"\0" in piece:
        raise _BadModel(f"piece {index} is empty or holds NUL")
    return piece, kind


def _check_charsmap(table: object) -> None:
    """The normaliser's table: size, double-array trie (darts-clone), NUL-terminated replacements."""
    if table == b"":
        return
    if not isinstance(table, bytes) or len(table) < 4:
        raise _BadModel("its normalisation table is cut off")
    size = int.from_bytes(table[:4], "little")
    texts = table[4 + size :]
    if size == 0 or size % 1024 or not texts or texts[-1] != 0:
        raise _BadModel("its normalisation table is damaged")
    unit = np.frombuffer(table, dtype="<u4", count=size // 4, offset=4).astype(np.int64)
    is_value = unit >> 31 == 1
    child = np.arange(unit.size) ^ ((unit >> 10) << ((unit & (1 << 9)) >> 6))
    # Every step of a look-up goes to child ^ byte; it must stay inside. A value is an offset into the texts.
    if np.any(~is_value & ((child | 255) >= unit.size)) or np.any(is_value & ((unit & 0x7FFFFFFF) >= len(texts))):
        raise _BadModel("its normalisation table points outside itself")


def _fields(message: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """(number, value) of each field of a protocol buffer message: varint, fixed32 as float, or bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise _BadModel(f"it is no protocol buffer (wire type {wire} at byte {at})")
        if number == 0 or at + size > len(message):
            raise _BadModel("it is cut off or no protocol buffer")
        chunk = message[at : at + size]
        yield number, struct.unpack("<f", chunk)[0] if wire == 5 else chunk
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise _BadModel("it is cut off or no protocol buffer")
