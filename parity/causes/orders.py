"""Another order of what is cut apart, joined or reshaped: heads tiled, channels interleaved, parts exchanged."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from parity.causes.arrays import Hypothesis
from parity.causes.flat import Change, Flat, Step

__all__ = ["pairs", "reshape_orders", "split_orders"]


def split_orders(step: Step, x: np.ndarray) -> Iterator[tuple[int, str, str, Change]]:
    sizes, axis = step.eqn.params["sizes"], step.eqn.params["axis"]
    if len(set(sizes)) > 1 or len(sizes) > 3:
        return
    count = len(sizes)
    for order in itertools.product(range(count), repeat=count):
        if order != tuple(range(count)):
            words = f"parts taken as {', '.join(str(i + 1) for i in order)}"
            yield 1, "order of parts", words, lambda _, out, order=order: [out[i] for i in order]
    for block in range(1, sizes[0]):
        if sizes[0] % block == 0:
            words = "neighbours are cut apart, not halves" if block == 1 else f"cut by blocks of {block}"
            yield 1, "interleaved", words, lambda inputs, _, b=block: by_blocks(inputs[0], axis, count, b)


def by_blocks(x: np.ndarray, axis: int, count: int, block: int) -> list[np.ndarray]:
    moved = np.moveaxis(x, axis, -1)
    parts = moved.reshape(*moved.shape[:-1], -1, count, block)
    return [np.moveaxis(parts[..., i, :].reshape(*moved.shape[:-1], -1), -1, axis) for i in range(count)]


def reshape_orders(old: tuple[int, ...], new: tuple[int, ...]) -> Iterator[tuple[int, str, str, Change]]:
    """An axis that is cut in two, or two that become one, in the other order."""
    short, long = sorted((old, new), key=len)
    if len(long) != len(short) + 1:
        return
    for p in range(len(short)):
        a, b = long[p], long[p + 1]
        if short[:p] == long[:p] and short[p] == a * b and short[p + 1 :] == long[p + 2 :] and min(a, b) > 1:
            if old is short:
                turned = (*long[:p], b, a, *long[p + 2 :])
                change: Change = lambda x, _, t=turned, p=p: [np.swapaxes(x[0].reshape(t), p, p + 1)]  # noqa: E731
            else:
                change = lambda x, _, p=p: [np.swapaxes(x[0], p, p + 1).reshape(new)]  # noqa: E731
            yield 1, "order", f"{a} by {b} taken as {b} by {a}", change


def pairs(flat: Flat) -> Iterator[Hypothesis]:
    """Two changes that undo each other's order: heads tiled, channels interleaved and put back."""
    cuts: list[tuple[list[int], str, Change, str]] = []
    joins: list[tuple[list[int], str, Change, str]] = []
    for group in flat.groups():
        step = flat.steps[group[0]]
        if step.name == "reshape":
            old, new = (flat.values[s[0]].shape for s in (step.inputs, step.outputs))
            for _, _, words, change in reshape_orders(old, new):
                (cuts if len(new) > len(old) else joins).append((group, words, change, "heads tiled"))
        elif step.name == "split" and len(step.outputs) == 2:
            half = lambda inputs, _, s=step: by_blocks(inputs[0], s.eqn.params["axis"], 2, 1)  # noqa: E731
            cuts.append((group, "neighbours are pairs", half, "interleaved RoPE"))
        elif step.name == "concatenate" and len(step.inputs) == 2:
            back = lambda inputs, _: [np.stack(inputs, -1).reshape(*inputs[0].shape[:-1], -1)]  # noqa: E731
            joins.append((group, "put back beside each other", back, "interleaved RoPE"))
    for (one, words, cut, cause), (two, also, join, other) in itertools.product(cuts, joins):
        if cause != other or set(one) & set(two):
            continue
        try:
            value = flat({**dict.fromkeys(one, cut), **dict.fromkeys(two, join)})
        except Exception:
            continue
        if value.shape == flat.value.shape:
            yield Hypothesis(cause, f"{words} at {flat.steps[one[0]].place}, {also}", value, 0)
