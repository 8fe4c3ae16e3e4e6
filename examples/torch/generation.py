"""Text generation in PyTorch (exercise 5), and its two questions answered by running them.

1. What is "greedy" decoding? Every step takes the token with the largest logit. Nothing is drawn: the same prompt gives
   the same text, and what the model thinks of the other tokens is thrown away.
2. How could you make it less deterministic? Draw the token from the model's probabilities instead: temperature makes
   them flatter or sharper, top-k and top-p cut off the unlikely ones before the draw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from omni_torch import ThinkerConfig, ThinkerLM, sample, set_seed, truncated_probabilities
from omni_torch import generate as generate_text

VOCAB_SIZE = 12
PROMPT = [1, 5, 9]
DRAWS = 4000
SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.25},
    {"temperature": 4.0},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.0, "top_p": 0.5},
)


class SimpleModel:
    """The exercise's: random logits, where a real model has its predictions."""

    def __init__(self, vocab_size: int = 1000) -> None:
        self.vocab_size = vocab_size
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, tokens: list[int]) -> torch.Tensor:
        return torch.randn(len(tokens), self.vocab_size, generator=self.generator)


model = SimpleModel()


def generate(
    prompt_tokens: list[int], max_new: int = 10, model: Callable[[list[int]], torch.Tensor] = model
) -> list[int]:
    """The exercise's loop: the whole text goes through the model for every new token."""
    tokens = prompt_tokens.copy()
    for _ in range(max_new):
        logits = model(tokens)  # (time, vocab_size): what comes after each of the tokens
        next_token = int(torch.argmax(logits[-1]))
        tokens.append(next_token)
        if next_token == 2:  # EOS
            break
    return tokens


def make_thinker() -> ThinkerLM:
    """A real language model, though a small and untrained one."""
    set_seed(3)
    config = ThinkerConfig(vocab_size=VOCAB_SIZE, n_layers=2, d_model=32, n_heads=4, d_ff=64, dropout=0.0, ctx_len=64)
    return ThinkerLM.from_config(config).eval()


def loop() -> None:
    """The exercise."""
    prompt = [1, 100, 200]  # [BOS, token1, token2]
    generated = generate(prompt, max_new=5)
    print(f"  Prompt: {prompt}")
    print(f"  Generated: {generated}")
    check(generated[:3] == prompt and len(generated) == 8, "the prompt, and five new tokens")
    check(prompt == [1, 100, 200], "the caller's list is as it was")
    ended = generate(prompt, 1000, SimpleModel(vocab_size=10))  # with ten ids it comes soon
    print(f"  With EOS: {ended}")
    check(ended.index(2) == len(ended) - 1, "EOS ends a text, and is its last token")


def question_1() -> None:
    """What is "greedy" decoding?"""
    thinker = make_thinker()
    with torch.inference_mode():
        by_loop = generate(PROMPT, 10, lambda tokens: thinker(torch.tensor([tokens]))[0])
        again = generate(PROMPT, 10, lambda tokens: thinker(torch.tensor([tokens]))[0])
        logits = thinker(torch.tensor([by_loop]))[0]
    print(f"  a real model's text: {by_loop}")
    check(by_loop == again, "the same prompt gives the same text")
    largest = logits.argmax(dim=-1).tolist()
    check(
        largest[len(PROMPT) - 1 : -1] == by_loop[len(PROMPT) :], "each token is the largest logit after the ones before"
    )
    # The library's loop keeps the keys and values of the tokens before, and feeds only the new one.
    made = generate_text(thinker, PROMPT, max_new_tokens=10)
    check(made.tokens[0] == by_loop[len(PROMPT) :], "the library's generate takes the same tokens, with a cache")
    shares = [round(float(torch.tensor(x).exp()), 2) for x in made.logprobs[0]]
    print(f"  the model's probability of each token taken: {shares}")
    check(max(shares) < 1, "none of them was certain: greedy does not show what else was possible")
    print("  Answer: always the token with the highest probability; nothing is random.")


def question_2() -> None:
    """How could you make it less deterministic?"""
    thinker = make_thinker()
    with torch.inference_mode():
        logits = thinker(torch.tensor([PROMPT]), last_only=True)[:, 0]
    plain = truncated_probabilities(logits)[0]
    likeliest = int(plain.argmax())
    print(f"  probabilities after the prompt, and counts in {DRAWS} draws (* = cut off):")
    for settings in SETTINGS:
        p = truncated_probabilities(logits, **settings)[0]
        made = generate_text(thinker, PROMPT, max_new_tokens=1, num_samples=DRAWS, **settings)
        counts = torch.bincount(torch.tensor(made.tokens)[:, 0], minlength=VOCAB_SIZE)
        name = ", ".join(f"{key} {value:g}" for key, value in settings.items())
        print(f"  {name}")
        print("    " + " ".join(f"{x:6.3f}" if x > 0 else "     *" for x in p.tolist()))
        print("    " + " ".join(f"{count:6d}" for count in counts.tolist()))
        kept = p > 0
        check(int(counts[~kept].sum()) == 0, f"{name}: what was cut off is never drawn")
        chi_square = float(((counts - DRAWS * p)[kept].square() / (DRAWS * p)[kept]).sum())
        freedom = int(kept.sum()) - 1
        check(abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5, f"{name}: the counts are those probabilities'")
        check(int(p.argmax()) == likeliest, f"{name}: no setting changes which token is the likeliest")

    sharp, flat = (truncated_probabilities(logits, temperature=t)[0] for t in (0.25, 4.0))
    check(float(flat.max()) < float(plain.max()) < float(sharp.max()), "temperature above 1 flattens, below 1 sharpens")
    frozen = truncated_probabilities(logits, temperature=0.0)[0]
    check(frozen.tolist() == [float(i == likeliest) for i in range(VOCAB_SIZE)], "temperature 0 is greedy")
    top = plain.topk(3).indices.sort().values
    check(truncated_probabilities(logits, top_k=3)[0].nonzero()[:, 0].equal(top), "top-k keeps the k likeliest")
    nucleus = truncated_probabilities(logits, top_p=0.5)[0] > 0
    mass, least = float(plain[nucleus].sum()), float(plain[nucleus].min())
    print(f"  top_p 0.5 keeps {int(nucleus.sum())} tokens with {mass:.3f} of the probability")
    check(mass >= 0.5 > mass - least, "top-p keeps as few tokens as reach p: without the last one it is missed")

    # A draw is one uniform number: the first token whose cumulative probability exceeds it.
    below, above = torch.tensor([0.0]), torch.tensor([0.999999])
    first, last = (int(sample(frozen[None], u)[0]) for u in (below, above))
    check(first == last == likeliest, "with all of the probability on one token every draw gives that one")

    texts = [
        generate_text(thinker, PROMPT, max_new_tokens=8, temperature=1.0, seed=seed, eos_id=None).tokens[0]
        for seed in (0, 0, 1)
    ]
    for text in texts:
        print(f"  drawn: {text}")
    check(texts[0] == texts[1] != texts[2], "a seed gives the same text again, another seed another text")
    print("  Answer: draw the token: temperature for how freely, top-k and top-p for what is out of the question.")


def main() -> None:
    for part in (loop, question_1, question_2):
        print(f"{part.__name__}: {part.__doc__}")
        part()


def check(true: bool, claim: str) -> None:
    if not true:
        raise RuntimeError(f"not so: {claim}")


if __name__ == "__main__":
    main()
