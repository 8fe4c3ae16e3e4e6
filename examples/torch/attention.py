"""Attention in PyTorch (exercise 2), and its two questions answered by running them.

1. Why do we divide by sqrt(d)? A score is a sum of d products, so its spread grows like sqrt(d). Undivided, the largest
   score takes all of the softmax, and no gradient comes back through it; divided, the spread is 1 for every d.
2. What does the attention weights matrix represent? Row t says how much position t takes from every position s: a
   distribution over positions. A row with a single 1 is a look-up, and a matrix of such rows a permutation.
"""

from __future__ import annotations

import math

import torch

from omni_torch import simple_attention

SEQ_LEN = 10
SIZES = (4, 64, 1024)


def make_inputs(d: int, seq_len: int = SEQ_LEN) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query, key and value, (1, seq_len, d) each, of N(0, 1) numbers."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, seq_len, d, generator=g) for _ in range(3))
    return q, k, v


def attention_by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The exercise's three lines."""
    scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(query.shape[-1])
    weights = torch.softmax(scores, dim=-1)
    return torch.matmul(weights, value), weights


def entropy(weights: torch.Tensor) -> float:
    """Mean entropy of the rows in nats: 0 for a single 1, log(n) for n equal weights."""
    return float(torch.special.entr(weights).sum(dim=-1).mean())


def attend_once() -> None:
    """The exercise."""
    q, k, v = make_inputs(64)
    output, weights = simple_attention(q, k, v)
    print(f"  Output shape: {tuple(output.shape)}")
    print(f"  Attention weights shape: {tuple(weights.shape)}")
    print(f"  Attention weights sum: {[round(x, 4) for x in weights.sum(dim=-1)[0].tolist()]}")
    eps = torch.finfo(weights.dtype).eps
    check(float((weights.sum(dim=-1) - 1).abs().max()) <= SEQ_LEN * eps, "each row of weights sums to 1")
    apart = max(float((a - b).abs().max()) for a, b in zip(attention_by_hand(q, k, v), (output, weights)))
    check(apart <= 64 * eps, "the library's function is the three lines")
    library = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    check(float((library - output).abs().max()) <= 64 * eps, "and torch's own attention, which hides the weights")


def question_1() -> None:
    """Why do we divide by sqrt(d)?"""
    keys = 256
    even = math.log(keys)
    print(f"  {keys} keys; all weights equal would have an entropy of {even:.2f} nats")
    print("       d  spread of q·k  of q·k/√d  entropy with q·k  with q·k/√d  gradient with q·k  with q·k/√d")
    told = {}
    for d in SIZES:
        q, k, _ = make_inputs(d, keys)
        scores = q @ k.transpose(-2, -1)
        row = []
        for x in (scores, scores / math.sqrt(d)):
            x = x.requires_grad_()
            weights = torch.softmax(x, dim=-1)
            # What a score can still change: the gradient of the softmax at one weight of each row, its largest.
            (gradient,) = torch.autograd.grad(weights.max(dim=-1).values.sum(), x)
            row.append((float(x.detach().std()), entropy(weights.detach()), float(gradient.abs().sum(dim=-1).median())))
        told[d] = row
        (spread, sharp, dead), (scaled_spread, soft, alive) = row
        print(
            f"  {d:>6}  {spread:>13.2f}  {scaled_spread:>9.2f}  {sharp:>16.3f}  {soft:>11.3f}  "
            f"{dead:>17.1e}  {alive:>11.1e}"
        )
    for d, ((spread, sharp, _), (scaled_spread, soft, _)) in told.items():
        check(abs(spread / math.sqrt(d) - 1) < 0.1, f"d = {d}: the spread of q·k is √d = {math.sqrt(d):g}")
        check(abs(scaled_spread - 1) < 0.1, f"d = {d}: divided by √d it is 1")
        check(soft > 0.85 * even and soft > sharp, f"d = {d}: every query then still looks at many keys")
    (_, sharp, dead), (_, _, alive) = told[1024]
    check(sharp < 0.05 * even, "undivided, at d = 1024 nearly every query looks at one key only")
    check(dead < 0.05 * alive, "and half of the rows have next to no gradient left to learn from")
    print("  Answer: it keeps the scores' spread at 1, so that the softmax stays soft and can learn, for any d.")


def question_2() -> None:
    """What does the attention weights matrix represent?"""
    _, _, v = make_inputs(SEQ_LEN)
    # One-hot keys: key s is a name tag, and a query with a large number at s asks for position s.
    k = torch.eye(SEQ_LEN)[None]
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    q = 1000.0 * k[:, order]
    output, weights = simple_attention(q, k, v)
    print(f"  asked for positions {order.tolist()}")
    print(f"  largest weight of each row at {weights.argmax(dim=-1)[0].tolist()}")
    check(
        torch.equal(weights[0], torch.eye(SEQ_LEN)[order]), "the weights are the permutation matrix that was asked for"
    )
    check(torch.equal(output, v[:, order]), "and the output is the values in that order")

    # A query that asks for two positions alike takes the mean of their values.
    output, weights = simple_attention(1000.0 * (k[:, 2] + k[:, 5])[:, None], k, v)
    print(f"  asked for 2 and 5 alike: {[round(x, 3) for x in weights[0, 0].tolist()]}")
    check(weights[0, 0, [2, 5]].tolist() == [0.5, 0.5], "half from each")
    check(torch.equal(output[:, 0], 0.5 * v[:, 2] + 0.5 * v[:, 5]), "the output is their mean")

    # Nothing in it knows the order of the keys: shuffled keys with their values give the same output.
    q, k, v = make_inputs(64)
    output, weights = simple_attention(q, k, v)
    shuffled, shuffled_weights = simple_attention(q, k[:, order], v[:, order])
    eps = torch.finfo(v.dtype).eps
    check(float((shuffled - output).abs().max()) <= 64 * eps, "shuffling keys with their values changes no output")
    apart = float((shuffled_weights - weights[:, :, order]).abs().max())
    check(apart <= 64 * eps, "only the columns of the weights move: column s is position s, wherever it stands")
    print("  Answer: row t is how much position t attends to each other position; the output is that mean of values.")


def main() -> None:
    for part in (attend_once, question_1, question_2):
        print(f"{part.__name__}: {part.__doc__}")
        part()


def check(true: bool, claim: str) -> None:
    if not true:
        raise RuntimeError(f"not so: {claim}")


if __name__ == "__main__":
    main()
