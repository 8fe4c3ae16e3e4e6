"""Data in JAX: datasets, padding and its masks, loaders, and batches that are functions of a number.

Run it beside its torch twin, examples/torch/data.py: both print the same batches, up to the random crops, which each
framework draws with a generator of its own. Every line that begins with "ok" was checked before it was printed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax import (
    NextTokenDataset,
    RandomCropSequenceDataset,
    TensorPairDataset,
    collate_next_token_batch,
    cross_entropy,
    epoch_order,
    make_dataloader,
    pad_1d_sequences,
    prefetch_to_device,
    token_batch,
    token_stream,
)

PAD, BOS, EOS = 0, 1, 2


def check(claim: str, true: object) -> None:
    if not true:
        raise SystemExit(f"not true: {claim}")
    print(f"  ok: {claim}")


def datasets() -> None:
    print("1. A dataset has a length and items")
    # numpy, not jax.numpy: data stay on the host until a whole batch goes to the device.
    pairs = TensorPairDataset(np.arange(6.0).reshape(3, 2), np.array([10, 20, 30]))
    x, y = pairs[-1]
    print(f"  {len(pairs)} pairs; the last is x = {x.tolist()}, y = {int(y)}")

    # The same row twice, once without its last token and once without its first: the target is what comes next.
    inputs, targets = NextTokenDataset(np.array([[BOS, 5, 9, 7, EOS]]))[0]
    print(f"  inputs  {inputs.tolist()}\n  targets {targets.tolist()}")
    check("targets[t] is inputs[t + 1]", np.array_equal(targets[:-1], inputs[1:]))


def random_crops() -> None:
    print("2. Random crops of a long sequence")
    tokens = np.arange(20)[None]
    first, second = (RandomCropSequenceDataset(tokens, crop_len=5, seed=0) for _ in range(2))
    crops = [first[0].tolist() for _ in range(3)]
    print(f"  {crops}")
    check("the same seed crops alike", crops == [second[0].tolist() for _ in range(3)])
    # Where two would go wrong in JAX: a state that threads share. Here number a of a counter-based generator belongs to
    # access a; and a loader names the epoch, so that a crop is a pure function of (seed, epoch, item).
    starts = {int(first[0][0]) for _ in range(500)}
    check("every start from 0 to 15 comes up, and no other", starts == set(range(16)))


def padding() -> None:
    print("3. Padding: lengths make the mask, the pad value does not")
    batch = pad_1d_sequences([np.array([5, 0, 7, 8]), np.array([6, 4])], pad_value=PAD)
    print(f"  tokens       {batch.tokens.tolist()}\n  lengths      {batch.lengths.tolist()}")
    print(f"  padding_mask {batch.padding_mask.astype(int).tolist()}   (1: padding)")
    check("the 0 inside the first sequence is a token", not batch.padding_mask[0, 1])
    check("a mask made from the values would have lost it", bool((batch.tokens == PAD)[0, 1]))


def two_masks() -> None:
    print("4. Two masks, each the NOT of the other")
    rows = [[BOS, 5, 9, 7, EOS], [BOS, 6, EOS]]
    batch = collate_next_token_batch([NextTokenDataset(np.array([row]))[0] for row in rows], pad_value=PAD)
    for name, value in batch.items():
        print(f"  {name:14} {value.astype(int).tolist()}")
    # attention_mask True: keep this key, attend to it. It is what ThinkerLM and jax.nn.dot_product_attention take.
    # padding_mask True: leave this key out. Passing one for the other raises nothing and attends to padding alone.
    check("attention_mask is the NOT of padding_mask", np.array_equal(batch["attention_mask"], ~batch["padding_mask"]))

    # The loss leaves padded targets out because they are PAD, and divides by the number of those that are left. Shapes
    # are fixed in a compiled function: padding to a few lengths, not to each batch's own, keeps the programs few.
    logits = jnp.zeros((2, 4, 10))  # every token of ten equally likely: log 10 nats each
    loss = float(cross_entropy(logits, jnp.asarray(batch["target_ids"]), ignore_index=PAD))
    kept = int(batch["attention_mask"].sum())
    print(f"  loss {loss:.4f} over {kept} of {batch['target_ids'].size} positions")
    check("the loss is log 10, padded or not", abs(loss - float(np.log(10))) < np.finfo(np.float32).eps * 10)


def loaders() -> None:
    print("5. A loader: shuffled, batched, repeatable")
    rows = [[BOS, *range(3, 3 + n), EOS] for n in (4, 1, 3, 2, 5)]
    items = [NextTokenDataset(np.array([row]))[0] for row in rows]
    # JAX has no loader of its own; this one is omni_jax's. Its batches are numpy until prefetch_to_device takes them.
    loader = make_dataloader(items, batch_size=2, collate_fn=collate_next_token_batch, seed=1)
    epochs = [[batch["attention_mask"].sum(1).tolist() for batch in loader] for _ in range(2)]
    for epoch, lengths in enumerate(epochs):
        print(f"  epoch {epoch}: lengths {lengths}")
        wanted = [len(rows[i]) - 1 for i in epoch_order(len(rows), seed=1, epoch=epoch)]
        check("the order is epoch_order(n, seed, epoch)", [n for part in lengths for n in part] == wanted)
    loader.set_epoch(1)
    again = [batch["attention_mask"].sum(1).tolist() for batch in prefetch_to_device(loader)]
    check("set_epoch(1) gives epoch 1 again, as a resumed run needs it", again == epochs[1])
    # Beyond torch: any batch by its place, without the ones before it; and two of them on their way to the device while
    # the model works on a third.
    check("so does batch(epoch, step)", loader.batch(1, 2)["attention_mask"].sum(1).tolist() == epochs[1][2])
    loader.set_epoch(1)
    first = next(prefetch_to_device(loader, size=2))
    check("a prefetched batch is on the device", all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(first)))


def token_batches() -> None:
    print("6. Token batches: a function of (seed, step), and no loader")
    ids = token_stream([[5, 6, 7], [8, 9], [10, 11, 12, 13]], BOS, EOS)
    print(f"  stream {ids.tolist()}")
    for step in range(2):
        print(f"  step {step}: {token_batch(ids, batch_size=2, length=5, seed=0, step=step).tolist()}")
    late = token_batch(ids, 2, 5, seed=0, step=10**12)  # no need to go through the steps before it
    print(f"  step 10^12: {late.tolist()}")
    check("every row starts with a document", bool((late[:, 0] == BOS).all()))
    check("the same step gives the same bytes", late.tobytes() == token_batch(ids, 2, 5, 0, 10**12).tobytes())
    # numpy on purpose: torch's twin gives the same bytes. A compiled step takes the array as it is.


def main() -> None:
    datasets()
    random_crops()
    padding()
    two_masks()
    loaders()
    token_batches()


if __name__ == "__main__":
    main()
