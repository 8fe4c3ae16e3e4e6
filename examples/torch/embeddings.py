"""An embedding layer in PyTorch (exercise 1), and its two questions answered by running them.

1. What is the shape of the embedding? The shape of the ids with embed_dim added at the end: (1, 128) for one id.
2. What happens with token_id = 2000, when vocab_size is 1000? There is no such row: TokenIdError, and the message says
   which ids there are. torch's own layer raises an IndexError that names neither.
"""

from __future__ import annotations

import torch
from torch import nn

from omni_torch import TokenEmbedding, TokenIdError, set_seed

VOCAB_SIZE = 1000
EMBED_DIM = 128


def make_layer() -> TokenEmbedding:
    """A table of VOCAB_SIZE rows, drawn from N(0, 1)."""
    set_seed(0)
    return TokenEmbedding(VOCAB_SIZE, EMBED_DIM)


def look_up() -> None:
    """The exercise."""
    emb = make_layer()
    token_id = torch.tensor([42])
    embedding = emb(token_id)
    print(f"  Token ID: {token_id.item()}")
    print(f"  Embedding shape: {tuple(embedding.shape)}")
    print(f"  Embedding: {[round(value, 4) for value in embedding[0, :5].tolist()]}")
    check(torch.equal(embedding[0], emb.weight[42]), "it is row 42 of the table, number for number")

    # A product with the one-hot row is the same: the layer is a linear one that skips the multiplications by 0.
    one_hot = nn.functional.one_hot(token_id, VOCAB_SIZE).to(emb.weight.dtype)
    check(torch.equal(one_hot @ emb.weight, embedding), "the same as a one-hot row times the table")


def question_1() -> None:
    """What is the shape of the embedding?"""
    emb = make_layer()
    for shape in ((1,), (7,), (2, 5)):
        embedding = emb(torch.full(shape, 42))
        print(f"  ids {shape} -> embedding {tuple(embedding.shape)}")
        check(tuple(embedding.shape) == (*shape, EMBED_DIM), "one row of 128 numbers per id")
    print("  Answer: (1, 128), one token with 128 numbers.")


def question_2() -> None:
    """What happens if you use token_id = 2000? (vocab_size is 1000)"""
    emb, outside = make_layer(), torch.tensor([2000])
    try:
        emb(outside)
        raise RuntimeError("not so: an id out of range is refused")
    except TokenIdError as error:
        print(f"  TokenIdError: {error}")
    try:
        emb(torch.tensor([-1]))
        raise RuntimeError("not so: a negative id does not count from the end")
    except TokenIdError as error:
        print(f"  TokenIdError: {error}")
    in_the_middle()
    try:
        nn.Embedding(VOCAB_SIZE, EMBED_DIM)(outside)
        raise RuntimeError("not so: torch's own layer refuses it too")
    except IndexError as error:
        print(f"  nn.Embedding: {str(error).splitlines()[0]}")
    print("  Answer: an error, as the table has rows 0 to 999 only.")


def in_the_middle() -> None:
    """One bad id among good ones: which one is it?"""
    emb, ids = make_layer(), torch.tensor([[42, 2000, 7]])
    # torch's kernel looks too, but it does not say at what; on a GPU it is an assertion that ends the process.
    try:
        nn.functional.embedding(ids, emb.weight)
        raise RuntimeError("not so: the function refuses it")
    except IndexError as error:
        check("2000" not in str(error), "torch's own message does not say which id it was")
    try:
        emb(ids)
        raise RuntimeError("not so: the layer refuses it")
    except TokenIdError as error:
        check("tokens[0, 1] = 2000" in str(error), "the layer's says which one, and where it stands")


def main() -> None:
    for part in (look_up, question_1, question_2):
        print(f"{part.__name__}: {part.__doc__}")
        part()


def check(true: bool, claim: str) -> None:
    if not true:
        raise RuntimeError(f"not so: {claim}")


if __name__ == "__main__":
    main()
