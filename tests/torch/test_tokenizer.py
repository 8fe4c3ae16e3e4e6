"""omni_torch.tokenizer: training, round trips, the family's special ids, and files that are no models."""

from __future__ import annotations

import io
import random
import runpy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from omni_torch.layers import TokenIdError
from omni_torch.tokenizer import BPETokenizer

PT = runpy.run_path(str(Path(__file__).parent.parent / "pt_files.py"))
STORY = "".join(f"Once upon a time, {i} foxes ran over the hill,\tand the owl said {i + 1}.\n" for i in range(200))
PIECES = (
    "fox",
    " the ",
    "\n",
    "\t",
    "ß",
    "🦊",
    "🏳️‍🌈",
    "שלום",
    "مرحبا",
    "\u0000",
    "\u202e",
    "e\u0301",
    "<s>",
    "  ",
    "\r",
    "語",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "story.txt").write_text(STORY, encoding="utf-8", newline="")
    BPETokenizer.train(folder / "story.txt", folder / "story.model", 400)
    return folder / "story.model"


@pytest.fixture(scope="module")
def tokenizer(model):
    return BPETokenizer(model)


def test_ids_of_the_family(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (400, 0, 1, 2)
    assert "400" in repr(tokenizer)
    assert not {0, 1, 2, 3} & set(tokenizer.encode("fox 🦊 <s> </s> <pad>"))


def test_training_is_deterministic_and_leaves_no_path(tmp_path, model):
    (tmp_path / "copy.txt").write_text(STORY, encoding="utf-8", newline="")
    BPETokenizer.train(tmp_path / "copy.txt", tmp_path / "copy.model", 400)
    assert (tmp_path / "copy.model").read_bytes() == model.read_bytes()
    assert b"copy.txt" not in model.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.model", "copy.txt"]


def test_text_comes_back(tokenizer):
    rng = random.Random(0)
    texts = ["", " ", "the fox", STORY[:5000]]
    texts += ["".join(rng.choices(PIECES, k=rng.randrange(12))) for _ in range(500)]
    texts += ["".join(chr(rng.randrange(0x20, 0x2500)) for _ in range(20)) for _ in range(500)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert all(type(i) is int and 3 < i < 400 for i in ids)
        assert tokenizer.decode(ids) == text


def test_seen_text_is_short_and_parts_add_up(tokenizer):
    assert len(tokenizer.encode(STORY)) < len(STORY) / 2
    a, b = tokenizer.encode("the fox"), tokenizer.encode(" ran over")
    assert tokenizer.decode(a + b) == "the fox ran over"


def test_a_long_line(tokenizer):
    text = "the fox ran over the hill, " * (1 << 15)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bos_and_eos_are_added_where_asked_for(tokenizer):
    ids = tokenizer.encode("the fox")
    assert tokenizer.encode("the fox", add_bos=True) == [1, *ids]
    assert tokenizer.encode("the fox", add_eos=True) == [*ids, 2]
    assert tokenizer.encode("the fox", True, True) == [1, *ids, 2]
    assert tokenizer.encode("", True, True) == [1, 2]


def test_decode_takes_arrays_and_skips_special_ids(tokenizer):
    ids = [1, *tokenizer.encode("the fox"), 2, 0, 0]
    assert tokenizer.decode(np.array(ids, np.int32)) == "the fox"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("ids", [[400], [-1], [5, 1 << 40], [1.0], [[5]], ["5"], [True], [None]])
def test_decode_refuses_what_is_no_id(tokenizer, ids):
    with pytest.raises(TokenIdError, match=r"ids\[\d\] = "):
        tokenizer.decode(ids)


@pytest.mark.parametrize("text", [b"fox", None, ["fox"], "half \ud83e of a pair"])
def test_encode_refuses_what_is_no_text(tokenizer, text):
    with pytest.raises(ValueError, match="text"):
        tokenizer.encode(text)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"<html></html>", "web page"),
        (b"hello, I am a text file", "not a usable SentencePiece BPE model"),
        (b"\x0a\xff\xff\xff\xff\x0f", "cut off"),
        (bytes(100), "not a usable"),
    ],
)
def test_wrong_files_get_their_own_message(tmp_path, capfd, data, word):
    (tmp_path / "x.model").write_bytes(data)
    with pytest.raises(ValueError, match=word):
        BPETokenizer(tmp_path / "x.model")
    assert capfd.readouterr() == ("", "")


def test_wrong_paths(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        BPETokenizer(tmp_path / "nowhere.model")
    with pytest.raises(ValueError, match="is a folder"):
        BPETokenizer(tmp_path)


def foreign(path, **settings):
    """A model with other settings than ours."""
    import sentencepiece

    written = io.BytesIO()
    settings = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "model_type": "bpe", "vocab_size": 80} | settings
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(STORY.splitlines()), model_writer=written, minloglevel=2, num_threads=1, **settings
    )
    path.write_bytes(written.getvalue())
    return path


def test_the_library_defaults_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="pad_id = -1, and this model family needs 0"):
        BPETokenizer(foreign(tmp_path / "x.model", pad_id=-1, unk_id=0))
    with pytest.raises(ValueError, match="eos_id = 4"):
        BPETokenizer(foreign(tmp_path / "x.model", eos_id=4))
    with pytest.raises(ValueError, match="model type is 1, not BPE"):
        BPETokenizer(foreign(tmp_path / "x.model", model_type="unigram", vocab_size=40))


def test_a_model_with_normalisation_loads(tmp_path):
    tokenizer = BPETokenizer(foreign(tmp_path / "x.model", normalization_rule_name="nmt_nfkc"))
    assert tokenizer.decode(tokenizer.encode("the  \N{FULLWIDTH LATIN SMALL LETTER A}nd ")) == "the and"


def test_a_lying_normalisation_table_is_refused(tmp_path):
    """Every unit of the table is a jump; one that leads outside would be read out of bounds by the C++ code."""
    good = foreign(tmp_path / "x.model", normalization_rule_name="nmt_nfkc").read_bytes()
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(good)
    table = proto.normalizer_spec.precompiled_charsmap
    for wrong in (table[:3], table[:5000], table[:-1] + b"x", table[:8] + b"\xff\xff\xff\x7f" + table[12:]):
        proto.normalizer_spec.precompiled_charsmap = wrong
        (tmp_path / "x.model").write_bytes(proto.SerializeToString())
        with pytest.raises(ValueError, match="normalisation table"):
            BPETokenizer(tmp_path / "x.model")


@pytest.mark.parametrize(
    ("text", "size", "word"),
    [
        (STORY.encode(), 10, "smaller than required_chars"),
        (STORY.encode(), 100_000, "too high"),
        (STORY.encode(), 0, "positive integer"),
        (STORY.encode(), "400", "positive integer"),
        (b"", 400, "is empty"),
        (b"\n \n", 400, "no line of text"),
        (b"fox\xff", 400, "not UTF-8 at byte 3"),
    ],
)
def test_training_refuses_by_name(tmp_path, capfd, text, size, word):
    (tmp_path / "x.txt").write_bytes(text)
    with pytest.raises(ValueError, match=word):
        BPETokenizer.train(tmp_path / "x.txt", tmp_path / "x.model", size)
    assert not (tmp_path / "x.model").exists()
    assert capfd.readouterr().out == ""


def test_mutants_are_refused_or_work(tmp_path, model):
    """500 mutated models: ValueError, or a tokenizer that still encodes and decodes; no other exception, no crash."""
    data, rng = model.read_bytes(), random.Random(3)
    refused = 0
    for _ in range(500):
        (tmp_path / "x.model").write_bytes(PT["byte_mutant"](data, rng))
        try:
            tokenizer = BPETokenizer(tmp_path / "x.model")
        except ValueError:
            refused += 1
        else:
            ids = tokenizer.encode("the fox 🦊\n") + list(range(min(tokenizer.vocab_size, 300)))
            assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids)
    assert refused > 100


# Every way in which SentencePiece makes text of ids: an invented space, trimming, bytes or the unknown piece.
KINDS = {
    "ours": None,
    "library": {},
    "bytes": {"byte_fallback": True, "vocab_size": 400},
    "space and no trimming": {"byte_fallback": True, "vocab_size": 400, "remove_extra_whitespaces": False},
    "trimming and no space": {"byte_fallback": True, "vocab_size": 400, "add_dummy_prefix": False},
    "space at the end": {"byte_fallback": True, "vocab_size": 400, "treat_whitespace_as_suffix": True},
    "unknown": {"unk_surface": "[?]", "remove_extra_whitespaces": False},
    "symbols": {"user_defined_symbols": ["\u2581", "\u2581\u2581", "\n"], "control_symbols": ["<c>"]},
    "denormalised": {"denormalization_rule_tsv": "66 6F 78\t63 61 74\n"},
}


@pytest.fixture(scope="module", params=KINDS)
def any_tokenizer(request, tmp_path_factory, model):
    settings = KINDS[request.param]
    folder = tmp_path_factory.mktemp("kind")
    if settings is not None and "denormalization_rule_tsv" in settings:
        (folder / "rules.tsv").write_text(settings["denormalization_rule_tsv"], encoding="utf-8")
        settings = {"denormalization_rule_tsv": str(folder / "rules.tsv")}
    return BPETokenizer(model if settings is None else foreign(folder / "x.model", **settings))


def byte_ids(tokenizer, data):
    return [tokenizer._processor.piece_to_id(f"<0x{byte:02X}>") for byte in data]


def test_stream_joins_to_decode_for_any_ids(any_tokenizer):
    """Drawn from all ids, from those of one kind, and from characters cut anywhere."""
    rng, size = random.Random(7), any_tokenizer.vocab_size
    spaces = [i for i in range(size) if any_tokenizer._processor.id_to_piece(i).startswith("\u2581")]
    raw = byte_ids(any_tokenizer, range(256))
    for _ in range(3000):
        pool = rng.choice([range(size), range(6), spaces[:8], [*range(4), *spaces[:3]], raw, [*raw, *range(4)]])
        ids = rng.choices(pool, k=rng.randrange(9))
        ids += byte_ids(any_tokenizer, rng.choice("🦊é語ש").encode()[: rng.randrange(1, 5)])
        ids += rng.choices(pool, k=rng.randrange(2))
        pieces = list(any_tokenizer.decode_stream(ids))
        assert "".join(pieces) == any_tokenizer.decode(ids), ids
        assert all(pieces), ids
    for text in PIECES:
        ids = any_tokenizer.encode(text)
        assert "".join(any_tokenizer.decode_stream(ids)) == any_tokenizer.decode(ids)


def settled(tokenizer, data):
    """What of the bytes' text no further byte can change, by trying: a held tail must be able to become a character."""
    for held in range(4):
        tail = data[len(data) - held :]
        # The first and the last character of each length that begin with the tail, if it is the head of any.
        for low, high in ((0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)):
            first, last = chr(low).encode(), chr(high).encode()
            if (
                held
                and len(first) > held
                and first[:held] <= tail <= last[:held]
                and all(b >> 6 == 2 for b in tail[1:])
            ):
                return tokenizer.decode(byte_ids(tokenizer, data[: len(data) - held]))
    return tokenizer.decode(byte_ids(tokenizer, data))


def test_stream_yields_whole_characters_as_early_as_it_can(tokenizer):
    rng = random.Random(11)
    heads = [bytes([a, b]) for a in range(0xC0, 256) for b in (0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC3)]
    texts = [rng.choice("🦊é語ש").encode() + rng.choice(heads) + "🦊".encode()[: rng.randrange(5)] for _ in range(300)]
    for data in heads + texts:
        taken, shown = [], ""

        def one_by_one(data=data, taken=taken):
            for number in byte_ids(tokenizer, data):
                if taken:
                    assert shown == settled(tokenizer, bytes(taken)), (data, taken)  # noqa: B023
                taken.append(data[len(taken)])
                yield number

        for piece in tokenizer.decode_stream(one_by_one()):
            shown += piece
        assert shown == tokenizer.decode(byte_ids(tokenizer, data))


def test_stream_takes_ids_as_it_goes(tokenizer):
    ids = tokenizer.encode("the 🦊\n") * 2
    stream = tokenizer.decode_stream(iter([*ids, 400]))
    assert "".join(next(stream) for _ in range(len(list(tokenizer.decode_stream(ids))))) == "the 🦊\nthe 🦊\n"
    with pytest.raises(TokenIdError, match=rf"ids\[{len(ids)}\] = 400 is not a token id; allowed are 0 to 399"):
        next(stream)
    assert list(tokenizer.decode_stream([])) == list(tokenizer.decode_stream([1, 2, 0])) == []
    assert list(tokenizer.decode_stream(np.array(tokenizer.encode("🦊"), np.int32))) == ["🦊"]


def test_a_stream_asks_once_for_each_id(any_tokenizer):
    """Linear: as many look-ups for the second thousand ids as for the first."""
    calls = []

    class Counting:
        def __init__(self, processor):
            self.processor = processor

        def __getattr__(self, name):
            def counted(ids):
                calls.append(len(ids) if name == "decode" else 1)
                return getattr(self.processor, name)(ids)

            return counted

    rng, counts = random.Random(5), []
    ids = rng.choices(range(any_tokenizer.vocab_size), k=1000)
    real = any_tokenizer._processor
    any_tokenizer._processor = Counting(real)
    try:
        for given in ([], ids, ids * 2):
            before = sum(calls)
            list(any_tokenizer.decode_stream(given))
            counts.append(sum(calls) - before)
    finally:
        any_tokenizer._processor = real
    assert counts[2] == 2 * counts[1] <= 10 * len(ids)
