"""Attention in JAX (exercise 2), and its two questions answered by running them.

1. Why do we divide by sqrt(d)? A score is a sum of d products, so its spread grows like sqrt(d). Undivided, the largest
   score takes all of the softmax, and no gradient comes back through it; divided, the spread is 1 for every d.
2. What does the attention weights matrix represent? Row t says how much position t takes from every position s: a
   distribution over positions. A row with a single 1 is a look-up, and a matrix of such rows a permutation.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from omni_jax import simple_attention

SEQ_LEN = 10
SIZES = (4, 64, 1024)


def make_inputs(d: int, seq_len: int = SEQ_LEN) -> tuple[jax.Array, jax.Array, jax.Array]:
    """query, key and value, (1, seq_len, d) each, of N(0, 1) numbers."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, seq_len, d))
    return q, k, v


def attention_by_hand(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The exercise's three lines."""
    scores = jnp.matmul(query, jnp.swapaxes(key, -2, -1)) / math.sqrt(query.shape[-1])
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.matmul(weights, value), weights


def entropy(weights: jax.Array) -> float:
    """Mean entropy of the rows in nats: 0 for a single 1, log(n) for n equal weights."""
    return float(jax.scipy.special.entr(weights).sum(axis=-1).mean())


def attend_once() -> None:
    """The exercise."""
    q, k, v = make_inputs(64)
    output, weights = simple_attention(q, k, v)
    print(f"  Output shape: {output.shape}")
    print(f"  Attention weights shape: {weights.shape}")
    print(f"  Attention weights sum: {[round(x, 4) for x in weights.sum(axis=-1)[0].tolist()]}")
    eps = float(jnp.finfo(weights.dtype).eps)
    check(float(jnp.abs(weights.sum(axis=-1) - 1).max()) <= SEQ_LEN * eps, "each row of weights sums to 1")
    apart = max(float(jnp.abs(a - b).max()) for a, b in zip(attention_by_hand(q, k, v), (output, weights)))
    check(apart <= 64 * eps, "the library's function is the three lines")
    # JAX's own wants an axis of heads after the positions.
    library = jax.nn.dot_product_attention(q[:, :, None], k[:, :, None], v[:, :, None])[:, :, 0]
    check(float(jnp.abs(library - output).max()) <= 64 * eps, "and JAX's own attention, which hides the weights")


def question_1() -> None:
    """Why do we divide by sqrt(d)?"""
    keys = 256
    even = math.log(keys)
    print(f"  {keys} keys; all weights equal would have an entropy of {even:.2f} nats")
    print("       d  spread of q·k  of q·k/√d  entropy with q·k  with q·k/√d  gradient with q·k  with q·k/√d")
    told = {}
    # What a score can still change: the gradient of the softmax at one weight of each row, its largest.
    gradient_of = jax.jit(jax.grad(lambda x: jax.nn.softmax(x, axis=-1).max(axis=-1).sum()))
    for d in SIZES:
        q, k, _ = make_inputs(d, keys)
        scores = q @ jnp.swapaxes(k, -2, -1)
        row = []
        for x in (scores, scores / math.sqrt(d)):
            weights = jax.nn.softmax(x, axis=-1)
            gradient = gradient_of(x)
            row.append((float(x.std()), entropy(weights), float(jnp.median(jnp.abs(gradient).sum(axis=-1)))))
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
    k = jnp.eye(SEQ_LEN)[None]
    order = jnp.array([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    q = 1000.0 * k[:, order]
    output, weights = simple_attention(q, k, v)
    print(f"  asked for positions {order.tolist()}")
    print(f"  largest weight of each row at {weights.argmax(axis=-1)[0].tolist()}")
    asked = jnp.eye(SEQ_LEN)[order]
    check(bool(jnp.array_equal(weights[0], asked)), "the weights are the permutation matrix that was asked for")
    check(bool(jnp.array_equal(output, v[:, order])), "and the output is the values in that order")

    # A query that asks for two positions alike takes the mean of their values.
    output, weights = simple_attention(1000.0 * (k[:, 2] + k[:, 5])[:, None], k, v)
    print(f"  asked for 2 and 5 alike: {[round(x, 3) for x in weights[0, 0].tolist()]}")
    check(weights[0, 0, jnp.array([2, 5])].tolist() == [0.5, 0.5], "half from each")
    check(bool(jnp.array_equal(output[:, 0], 0.5 * v[:, 2] + 0.5 * v[:, 5])), "the output is their mean")

    # Nothing in it knows the order of the keys: shuffled keys with their values give the same output.
    q, k, v = make_inputs(64)
    output, weights = simple_attention(q, k, v)
    shuffled, shuffled_weights = simple_attention(q, k[:, order], v[:, order])
    eps = float(jnp.finfo(v.dtype).eps)
    check(float(jnp.abs(shuffled - output).max()) <= 64 * eps, "shuffling keys with their values changes no output")
    apart = float(jnp.abs(shuffled_weights - weights[:, :, order]).max())
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
