"""Tokenizers. The twins have the file alike: most mistakes are put into both."""

from __future__ import annotations

from parity.mutants.mutant import Edit, Mutant, in_both

__all__ = ["MUTANTS"]

TOKENIZER = "BPETokenizer"
LAST = "[_BOS] * bool(add_bos) + list(self._processor.encode(text)) + [_EOS] * bool(add_eos)"


def _mutant(name: str, report: str, what: str, *edits: Edit, where: str = "", needs: str = "") -> Mutant:
    return Mutant(f"tokenizer-{name}", "tokenizer", report, what, edits, "tokenizer", where, {}, needs)


def _encode(new: str) -> tuple[Edit, Edit]:
    return in_both("tokenizer", f"{TOKENIZER}.encode", LAST, new)


MUTANTS = (
    _mutant("bos-twice", "T01", "BOS stands there twice: in both twins", *_encode(LAST.replace("[_BOS]",
        "[_BOS, _BOS]")),
            where="BOS"),
    _mutant("bos-missing", "T02", "BOS is never there: in both twins", *_encode(LAST.replace("bool(add_bos)", "0")),
        where="BOS"),
    _mutant("eos-for-pad", "X06", "PAD ends a text, not EOS: in both twins", *_encode(LAST.replace("[_EOS]", "[_PAD]")),
        where="EOS"),
    _mutant("dummy-prefix", "T03", "a space is put before every text", Edit("omni_torch.tokenizer",
        f"{TOKENIZER}.encode",
            "self._processor.encode(text)", 'self._processor.encode(" " + text)'), where="ids"),
    _mutant("spaces-merged", "T03", "runs of spaces become one: in both twins",
            *_encode(LAST.replace("encode(text)", 'encode(" ".join(text.split(" ")).replace("  ", " "))')), where="ids",
            needs="a run of spaces"),
    _mutant("specials-parsed", "T03", "<s> in a text is taken for BOS: in both twins",
            *_encode('[_BOS] * bool(add_bos) + [i for n, part in enumerate(text.split("<s>")) for i in'
                     " [_BOS] * bool(n) + list(self._processor.encode(part))] + [_EOS] * bool(add_eos)"), where="ids",
            needs="a text that looks like a special token"),
    _mutant("stripped", "T03", "texts are stripped: in both twins", *_encode(LAST.replace("encode(text)",
        "encode(text.strip())")),
            where="ids", needs="white space at the ends"),
    _mutant("stream-bytes", "T03", "a stream gives every byte at once, broken characters too: in both twins",
            *in_both("tokenizer", "_ByteRun.add", "self._utf8.decode(bytes([byte]))",
                "self._utf8.decode(bytes([byte]), final=True)"),
            where="streams|pieces", needs="characters of several bytes"),
    _mutant("wraps", "E06", "an id of −1 is the last piece: in both twins",
            *in_both("tokenizer", f"{TOKENIZER}._checked", "if not 0 <= number < self._facts.pieces:",
                     "if (number := number % self._facts.pieces) < 0:"), where="refusals"),
)  # fmt: skip
