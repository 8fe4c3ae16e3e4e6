"""An embedding layer in JAX (exercise 1), and its two questions answered by running them.

1. What is the shape of the embedding? The shape of the ids with embed_dim added at the end: (1, 128) for one id.
2. What happens with token_id = 2000, when vocab_size is 1000? There is no such row: TokenIdError, and the message says
   which ids there are. Inside jit nothing can be raised: the row is NaN, and `checked` turns that into the error.
   nnx.Embed alone gives NaN too, and for −1 quietly the last row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni_jax import TokenEmbedding, TokenIdError, checked, set_seed

VOCAB_SIZE = 1000
EMBED_DIM = 128


def make_layer() -> TokenEmbedding:
    """A table of VOCAB_SIZE rows, drawn from N(0, 1)."""
    return TokenEmbedding(VOCAB_SIZE, EMBED_DIM, rngs=nnx.Rngs(params=set_seed(0)))


def look_up() -> None:
    """The exercise."""
    emb = make_layer()
    token_id = jnp.array([42])
    embedding = emb(token_id)
    print(f"  Token ID: {token_id.item()}")
    print(f"  Embedding shape: {embedding.shape}")
    print(f"  Embedding: {[round(value, 4) for value in embedding[0, :5].tolist()]}")
    check(bool(jnp.array_equal(embedding[0], emb.embedding[42])), "it is row 42 of the table, number for number")

    # A product with the one-hot row is the same: the layer is a linear one that skips the multiplications by 0. With
    # "highest", as JAX rounds the factors of a float32 product on some accelerators.
    one_hot = jax.nn.one_hot(token_id, VOCAB_SIZE, dtype=emb.embedding.dtype)
    product = jnp.matmul(one_hot, emb.embedding[...], precision="highest")
    check(bool(jnp.array_equal(product, embedding)), "the same as a one-hot row times the table")


def question_1() -> None:
    """What is the shape of the embedding?"""
    emb = make_layer()
    for shape in ((1,), (7,), (2, 5)):
        embedding = emb(jnp.full(shape, 42))
        print(f"  ids {shape} -> embedding {embedding.shape}")
        check(embedding.shape == (*shape, EMBED_DIM), "one row of 128 numbers per id")
    print("  Answer: (1, 128), one token with 128 numbers.")


def question_2() -> None:
    """What happens if you use token_id = 2000? (vocab_size is 1000)"""
    emb, outside = make_layer(), jnp.array([2000])
    try:
        emb(outside)
        raise RuntimeError("not so: an id out of range is refused")
    except TokenIdError as error:
        print(f"  TokenIdError: {error}")
    try:
        emb(jnp.array([-1]))
        raise RuntimeError("not so: a negative id does not count from the end")
    except TokenIdError as error:
        print(f"  TokenIdError: {error}")
    in_the_middle()
    theirs = nnx.Embed(VOCAB_SIZE, EMBED_DIM, rngs=nnx.Rngs(0))
    beyond, before = theirs(outside)[0], theirs(jnp.array([-1]))[0]
    print(f"  nnx.Embed: all NaN for 2000: {bool(jnp.isnan(beyond).all())}, and for -1 {before[:3]}, the last row")
    check(bool(jnp.isnan(beyond).all()), "flax's own layer says nothing")
    check(bool(jnp.array_equal(before, theirs.embedding[-1])), "and takes -1 for the last row")
    print("  Answer: an error, as the table has rows 0 to 999 only; NaN inside jit, where no error can be raised.")


def in_the_middle() -> None:
    """One bad id among good ones, inside jit, without and with `checked`."""
    emb, ids = make_layer(), jnp.array([[42, 2000, -1]])
    look = jax.jit(emb)
    # A compiled program has no way to raise: the rows that do not exist are NaN, and the others are as they were.
    rows = np.asarray(look(ids)[0])
    print(f"  inside jit, NaN or not: {np.isnan(rows).all(axis=1).tolist()} for the ids {ids[0].tolist()}")
    check(bool(np.isnan(rows[1:]).all()), "rows that do not exist are NaN, -1 is not the last row")
    check(np.array_equal(rows[0], np.asarray(emb.embedding[42])), "the good row is right")
    try:
        checked(look)(ids)
        raise RuntimeError("not so: the checked function refuses it")
    except TokenIdError as error:
        check("2000" in str(error), "under `checked` the program hands the fault out, and it is raised afterwards")


def main() -> None:
    for part in (look_up, question_1, question_2):
        print(f"{part.__name__}: {part.__doc__}")
        part()


def check(true: bool, claim: str) -> None:
    if not true:
        raise RuntimeError(f"not so: {claim}")


if __name__ == "__main__":
    main()
