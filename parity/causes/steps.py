"""Another operation where one stands in the source: left out, exchanged, moved, clipped, rounded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from parity.causes.activations import ACTIVATIONS, GATES
from parity.causes.arrays import NARROW, Hypothesis
from parity.causes.flat import COARSE, FINE, MOVES, Change, Flat, Step, value_of, wide_operand
from parity.causes.orders import reshape_orders, split_orders

__all__ = ["alternatives"]

CLIPS = (1.0, 5.0, 6.0, 10.0, 20.0, 30.0, 50.0, 100.0)
"""Bounds that code is written with."""


def alternatives(flat: Flat, group: Sequence[int]) -> Iterator[Hypothesis]:
    first = flat.steps[group[0]]
    for rank, cause, words, change in _alternatives(flat, first):
        try:
            value = flat(dict.fromkeys(group, change))
        except Exception:
            continue
        if value.shape == flat.value.shape:
            yield Hypothesis(cause, f"{first.name} at {first.place}: {words}", value, rank)


def _alternatives(flat: Flat, step: Step) -> Iterator[tuple[int, str, str, Change]]:
    """(rank, cause, words, change) of one step."""
    inputs = [flat.values[s] for s in step.inputs]
    out = flat.values[step.outputs[0]]
    on_value = lambda f: lambda _, out: [f(out[0]), *out[1:]]  # noqa: E731
    on_input = lambda f: lambda inputs, _: [f(inputs[0])]  # noqa: E731
    for cause, words, function in ACTIVATIONS.get(step.name, ()):
        yield 0, cause, words, on_input(function)
    if step.name == "max" and (at := next((i for i, x in enumerate(inputs) if x.size > 1), None)) is not None:
        for cause, words, function in GATES:
            yield 0, cause, words, lambda inputs, _, f=function, at=at: [inputs[at] * f(inputs[at])]
    if step.name == "rsqrt" and (eps := _eps_before(flat, step)) is not None:
        yield (
            0, "eps", f"{eps:g} added outside the root",
            on_input(lambda x: 1.0 / (np.sqrt(x - eps) + eps)),
        )  # fmt: skip
    if step.name == "select_n" and len(inputs) == 3:
        for at in (1, 2):
            if inputs[at].shape == out.shape and inputs[0].size > 1:
                words = f"its {'first' if at == 1 else 'second'} branch everywhere"
                yield 1, "mask missing", words, lambda inputs, _, at=at: [inputs[at]]
    if step.name == "top_k":
        yield 0, "order", "the smallest, not the largest", lambda inputs, _: _smallest(step, inputs)
    if flat.apart < FINE:
        pass
    elif step.name == "split":
        yield from split_orders(step, inputs[0])
    elif step.name == "reshape":
        yield from reshape_orders(inputs[0].shape, out.shape)
    elif step.name == "concatenate" and len(inputs) == 2 and inputs[0].shape == inputs[1].shape:
        yield 2, "order", "its parts change places", lambda inputs, _: [np.concatenate(inputs[::-1], axis=-1)]
    if step.name in ("sub", "div") and inputs[0].shape == inputs[1].shape:
        yield (
            2,
            "operands exchanged",
            "operands exchanged",
            lambda inputs, _: [inputs[1] - inputs[0] if step.name == "sub" else inputs[1] / inputs[0]],
        )
    if step.name in ("add", "sub"):
        flipped = (lambda a, b: a - b) if step.name == "add" else (lambda a, b: a + b)
        yield (
            2,
            "sign flipped",
            f"{'sub' if step.name == 'add' else 'add'} in its place",
            lambda inputs, _: [flipped(*inputs)],
        )
    if out.dtype.kind == "f" and step.name != "broadcast_in_dim" and flat.apart <= COARSE:
        for name, cut in NARROW.items():
            yield 4, "rounded inside", f"rounded to {name}", lambda _, out, cut=cut: [cut(x) for x in out]
    if step.name == "convert_element_type" and inputs[0].dtype.kind == "b" and out.size > 1:
        yield 1, "mask missing", "all True", on_value(np.ones_like)
    if step.name in ("min", "max", "clamp") and out.dtype.kind in "iu":
        yield 0, "left out", "left out", wide_operand(flat, step)
    if step.name in ("reduce_sum", "add", "mul", "div", "square") and out.dtype.kind == "f":
        yield 2, "root missing", "its root in its place", on_value(np.sqrt)
        yield 2, "square missing", "its square in its place", on_value(np.square)
    if step.name in ("mul", "div") and out.size == 1 and out.dtype.kind == "f":
        yield 1, "clipped", "at most 1", on_value(lambda x: np.minimum(x, 1.0))
    if step.name in MOVES or not out.size > 1:
        return
    if step.name in ("mul", "dot_general", "div", "add", "sub") and flat.apart <= COARSE:
        for name, cut in NARROW.items():
            for some in ((0,), (1,), (0, 1)):
                which = "both operands" if len(some) == 2 else f"its operand {some[0] + 1}"
                yield (
                    4,
                    "rounded inside",
                    f"{which} rounded to {name}",
                    lambda x, _, c=cut, some=some: value_of(
                        step, [c(v) if i in some and v.dtype.kind == "f" else v for i, v in enumerate(x)]
                    ),
                )
            yield (
                4,
                "rounded inside",
                f"computed in {name}",
                lambda x, _, c=cut: [c(y) for y in value_of(step, [c(v) if v.dtype.kind == "f" else v for v in x])],
            )
    if step.name in ("logistic", "exp", "tanh"):
        for bound in CLIPS:
            yield (
                0,
                "clipped",
                f"its input clipped at ±{bound:g}",
                lambda inputs, _, c=bound: value_of(step, [np.clip(inputs[0], -c, c)]),
            )
    if step.name in ("mul", "dot_general", "div"):
        for bound in CLIPS:
            yield 1, "clipped", f"clipped at ±{bound:g}", on_value(lambda x, c=bound: np.clip(x, -c, c))
            yield 1, "soft cap", f"capped by {bound:g}·tanh", on_value(lambda x, c=bound: c * np.tanh(x / c))
    if out.dtype.kind == "b":
        yield 1, "mask missing", "all True", on_value(np.ones_like)
        yield 1, "mask inverted", "inverted", on_value(np.logical_not)
        yield 2, "empty rows", "a row without any True is all True", on_value(lambda x: x | ~x.any(-1, keepdims=True))
    if out.dtype.kind in "iu":
        for shift in (1, -1):
            yield 2, "shifted by one", f"{shift:+d}", on_value(lambda x, s=shift: x + s)
    if out.dtype.kind != "f":
        return
    for at, x in enumerate(inputs):
        if len(inputs) <= 2 and x.dtype.kind == "f" and x.ndim and _fits(x.shape, out.shape):
            left = "" if len(inputs) == 1 else f", its operand {at + 1} passes"
            yield (
                3,
                "left out",
                f"left out{left}",
                lambda inputs, out, at=at: [np.broadcast_to(inputs[at], out[0].shape)],
            )
    if flat.apart < FINE:
        return
    for axis, shift in itertools.product(range(out.ndim), (1, -1)):
        if out.shape[axis] > 1:
            yield (
                2, "shifted by one", f"moved by {shift:+d} along axis {axis}",
                on_value(lambda x, s=shift, a=axis: np.roll(x, s, a)),
            )  # fmt: skip
    for a, b in itertools.combinations(range(out.ndim), 2):
        if out.shape[a] == out.shape[b] > 1:
            yield (
                2, "transposed", f"axes {a} and {b} change places",
                on_value(lambda x, a=a, b=b: np.swapaxes(x, a, b)),
            )  # fmt: skip
    if out.ndim and out.shape[-1] > 1:
        yield (
            2,
            "first for all",
            "the first of the last axis for all",
            on_value(lambda x: np.broadcast_to(x[..., :1], x.shape)),
        )
    if out.ndim:
        yield 2, "mean subtracted", "its mean taken off", on_value(lambda x: x - x.mean(-1, keepdims=True))


def _smallest(step: Step, inputs: list[Any]) -> list[Any]:
    values, order = value_of(step, [-inputs[0]])
    return [-values, order]


def _fits(shape: Sequence[int], whole: Sequence[int]) -> bool:
    return len(shape) == len(whole) and all(n in (1, m) for n, m in zip(shape, whole))


def _eps_before(flat: Flat, step: Step) -> float | None:
    made = next((s for s in flat.steps if step.inputs[0] in s.outputs), None)
    if made is None or made.name != "add":
        return None
    return next((float(flat.values[s]) for s in made.inputs if s in flat.literals), None)
