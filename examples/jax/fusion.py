"""Multimodal fusion in JAX (exercise 7), and its two questions answered by running them.

1. What is the total context length used? 1 + 10 + 5 = 16: one position per vector, whatever it came from.
2. How would you handle if total exceeds context limit? Cut, or come in several parts. The family's rule keeps audio to
   a quarter of the context, and then cuts the text; "longest" cuts the longest modality only as far as it must; chunks
   drop nothing, but the model reads each without what the other chunks hold. "error" leaves it to the caller.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from omni_jax import PAD_ID, fuse, fuse_chunks

D = 256
LENGTHS = {"image": 1, "audio": 10, "text": 5}


def make_inputs(**lengths: int) -> dict[str, jax.Array]:
    """Embeddings (1, length, 256) of each modality, as encoders and projectors would give them; LENGTHS if not told."""
    lengths = LENGTHS | lengths
    keys = jax.random.split(jax.random.key(0), len(lengths))
    return {name: jax.random.normal(key, (1, length, D)) for key, (name, length) in zip(keys, lengths.items())}


def kept(fused: jax.Array, parts: dict[str, jax.Array]) -> dict[str, int]:
    """How many vectors of each modality, from its first on, stand in the fused sequence, which has nothing else."""
    found, at = {}, 0
    for name, part in parts.items():
        same = jnp.all(fused[0, at : at + part.shape[1]] == part[0, : fused.shape[1] - at], axis=1).tolist()
        found[name] = (same + [False]).index(False)
        at += found[name]
    check(at == fused.shape[1], "image, audio, text, in this order, and nothing between them")
    return found


def combine() -> None:
    """The exercise."""
    parts = make_inputs()
    fused = jnp.concatenate(list(parts.values()), axis=1)
    print(f"  Fused shape: {fused.shape}")
    total_tokens = sum(part.shape[1] for part in parts.values())
    print(f"  Total tokens: {total_tokens}")
    result = fuse(**parts)
    check(fused.shape == (1, total_tokens, D), "one after the other")
    check(bool(jnp.array_equal(result.embeddings, fused)), "the library's function concatenates, too")
    check(bool(result.attention_mask.all()), "and says which positions hold something: here all")

    # What concatenation alone cannot do: a batch in which one row has no picture, and targets for the loss.
    two = {name: jnp.concatenate([part, part]) for name, part in parts.items()}
    targets = jnp.arange(3, 13).reshape(2, 5)
    result = fuse(**two, image_mask=jnp.array([True, False]), targets=targets)
    print(f"  without a picture in row 1, its mask begins {result.attention_mask[1, :3].tolist()}")
    check(result.attention_mask.sum(axis=1).tolist() == [16, 15], "that position is attended by nobody")
    check(result.targets is not None, "targets come out when they went in")
    print(f"  targets of row 0: {result.targets[0].tolist()}")
    check(bool((result.targets[:, :11] == PAD_ID).all()), "PAD before pictures and sound: nothing to predict there")
    check(bool(jnp.array_equal(result.targets[:, 11:], targets)), "the text's stay")


def question_1() -> None:
    """What is the total context length used?"""
    used = fuse(**make_inputs()).embeddings.shape[1]
    print(f"  {' + '.join(map(str, LENGTHS.values()))} = {used}")
    check(used == sum(LENGTHS.values()), "a position for each vector")
    for ctx_len in (512, 64):
        check(fuse(**make_inputs(), ctx_len=ctx_len).embeddings.shape[1] == used, "what fits is not changed")
    print(f"  Answer: {used} tokens.")


def question_2() -> None:
    """How would you handle if total exceeds context limit?"""
    ctx_len, parts = 32, make_inputs(audio=40, text=9)
    print(f"  { ({name: part.shape[1] for name, part in parts.items()}) } into {ctx_len} positions")
    for policy in ("family", "longest"):
        found = kept(fuse(**parts, ctx_len=ctx_len, policy=policy).embeddings, parts)
        print(f"  {policy!r} keeps {found}: {sum(found.values())} in all")
        check(sum(found.values()) <= ctx_len and found["image"] == 1, "it fits, and nothing is lost from the front")
        wanted = {"family": (ctx_len // 4, 9), "longest": (ctx_len - 1 - 9, 9)}[policy]
        check((found["audio"], found["text"]) == wanted, "cut at their ends, as the policy has it")
    short = kept(fuse(**parts, ctx_len=12).embeddings, parts)
    print(f"  'family' in 12 positions keeps {short}")
    check(
        short == {"image": 1, "audio": 3, "text": 12 - 4 - 1}, "then the text, too, so that one more token has a place"
    )
    try:
        fuse(**parts, ctx_len=ctx_len, policy="error")
        raise RuntimeError("not so: what does not fit is refused")
    except ValueError as error:
        print(f"  'error' gives ValueError: {error}")

    chunks = fuse_chunks(**parts, ctx_len=ctx_len)
    print(f"  chunks of {[chunk.embeddings.shape[1] for chunk in chunks]}: all the audio, a part in each")
    audio = jnp.concatenate([chunk.embeddings[:, 1:-9] for chunk in chunks], axis=1)
    check(bool(jnp.array_equal(audio, parts["audio"])), "put together they are the whole clip")
    for chunk in chunks:
        check(bool(jnp.array_equal(chunk.embeddings[:, :1], parts["image"])), "every chunk has the picture")
        check(bool(jnp.array_equal(chunk.embeddings[:, -9:], parts["text"])), "and the text")
    print("  Answer: truncate the longest modality, or all by a fixed rule; or chunk it and repeat the others.")


def main() -> None:
    for part in (combine, question_1, question_2):
        print(f"{part.__name__}: {part.__doc__}")
        part()


def check(true: bool, claim: str) -> None:
    if not true:
        raise RuntimeError(f"not so: {claim}")


if __name__ == "__main__":
    main()
