"""An inference function in JAX (exercise 9), on a small model and tokenizer that are made on the spot.

First the exercise's function written out, one greedy token as text; then the same from the library; then a whole text
as it grows, by `generate` with streaming, where a character is shown only when all of its bytes are there.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp

from omni_jax import (
    BPETokenizer,
    ThinkerConfig,
    ThinkerLM,
    TrainConfig,
    Trainer,
    generate,
    token_stream,
)
from omni_jax import simple_inference as library_inference

LINE = "one two three four five six seven eight nine ten"
VOCAB_SIZE = 320


def make_files(folder: Path) -> tuple[Path, Path]:
    """A tokenizer, and a model that has learned one line by heart: the paths of (checkpoint, tokenizer)."""
    text, tokenizer_path = folder / "text.txt", folder / "tokenizer.model"
    text.write_text(f"{LINE}\n" * 20, encoding="utf-8")
    tokenizer = BPETokenizer.train(text, tokenizer_path, VOCAB_SIZE)
    ids = token_stream([tokenizer.encode(LINE)] * 20, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    config = ThinkerConfig(VOCAB_SIZE, n_layers=2, d_model=32, n_heads=4, d_ff=64, dropout=0.0, ctx_len=32)
    settings = TrainConfig(lr=0.01, max_steps=60, batch_size=4, checkpoint_freq=60)
    run = folder / "run"
    Trainer(config, settings, ids, ids[:0], run, quiet=True).run()
    return run / "last.pt", tokenizer_path


def simple_inference(model_path: str | os.PathLike[str], tokenizer_path: str | os.PathLike[str], prompt: str) -> str:
    """The exercise's function: the text of the token that is likeliest after the prompt."""
    model = ThinkerLM.from_checkpoint(model_path)  # what to build says config.json beside it; in evaluation mode
    tokenizer = BPETokenizer(tokenizer_path)
    tokens = jnp.array([tokenizer.encode(prompt, add_bos=True)])
    logits = model(tokens)
    next_token = int(jnp.argmax(logits[0, -1]))
    return tokenizer.decode([next_token])


def one_token(model_path: Path, tokenizer_path: Path) -> None:
    """The exercise."""
    result = simple_inference(model_path, tokenizer_path, "one two three")
    print(f"  Output: {result!r}")
    check(LINE.startswith("one two three" + result), "it goes on with the line that it was taught")
    again = library_inference(model_path, tokenizer_path, "one two three")
    check(again == result, "the library's simple_inference gives the same text")
    # It also looks whether the two files belong together: ids that mean something else raise no error by themselves.
    other = tokenizer_path.with_name("other.model")
    BPETokenizer.train(tokenizer_path.with_name("text.txt"), other, VOCAB_SIZE - 10)
    try:
        library_inference(model_path, other, "one two three")
        raise RuntimeError("not so: a tokenizer of another vocabulary is refused")
    except ValueError as error:
        check(str(VOCAB_SIZE - 10) in str(error), "the message names both sizes")


def streaming(model_path: Path, tokenizer_path: Path) -> None:
    """A whole text, piece by piece."""
    model, tokenizer = ThinkerLM.from_checkpoint(model_path), BPETokenizer(tokenizer_path)
    prompt_ids = tokenizer.encode("one two", add_bos=True)
    shown = []

    def ids() -> Iterator[int]:
        # One row was asked for, so each step gives one id; EOS ends the row.
        for (token,) in generate(model, prompt_ids, stream=True):
            shown.append(token)
            yield token

    pieces = list(tokenizer.decode_stream(ids()))  # a program would print each with end="", flush=True
    print(f"  pieces: {pieces}")
    whole = generate(model, prompt_ids)
    print(f"  the whole: {'one two' + tokenizer.decode(whole.tokens[0])!r}, ended by {whole.stop_reasons[0]}")
    check("one two" + "".join(pieces) == LINE, "the line, to its end")
    check(whole.tokens[0] == shown and whole.stop_reasons == ["eos"], "in one go the same ids come, EOS the last")
    check(max(whole.logprobs[0]) < 0, "every token's log-probability is known as well")


def characters(model_path: Path, tokenizer_path: Path) -> None:
    """Why the pieces are not the texts of the ids, one by one."""
    tokenizer = BPETokenizer(tokenizer_path)
    text = "naïve 🙂"
    ids = tokenizer.encode(text)
    alone, streamed = [tokenizer.decode([number]) for number in ids], list(tokenizer.decode_stream(ids))
    print(f"  {text!r} has {len(ids)} ids; one by one: {alone}")
    print(f"  as a stream: {streamed}")
    check("\ufffd" in "".join(alone), "a character that training did not see is spelt in bytes: alone they are no text")
    check("".join(streamed) == text == tokenizer.decode(ids), "the stream holds bytes back until a character is whole")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        files = make_files(Path(name))
        for part in (one_token, streaming, characters):
            print(f"{part.__name__}: {part.__doc__}")
            part(*files)


def check(true: bool, claim: str) -> None:
    if not true:
        raise RuntimeError(f"not so: {claim}")


if __name__ == "__main__":
    main()
