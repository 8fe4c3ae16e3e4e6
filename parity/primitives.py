"""What each JAX primitive computes (in numpy, float64) and how much it rounds: the two tables of the noise engine.

`RULES` maps a primitive's name to a rule `rule(eqn, inputs, outputs) -> variance`, the variance of its rounding error
in units of u squared, per element (u = unit roundoff of the result's type), or to None when the primitive moves,
selects or counts and never rounds. A primitive without a rule is an error: a default would be a guess.

Sums are modelled as left-to-right accumulation of K terms t_k with sum S:
    var = (u^2 / 3) * [ K S^2 / 3 + (K / 6) * sum t_k^2 ]
which is the expected square of the partial sums' rounding errors when the terms come in random order. An elementary
function errs by `ulps` units: var = ulps^2 * out^2 / 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from parity.convolution import convolve
from parity.errors import CannotLook

__all__ = [
    "DISCRETE",
    "ELEMENTWISE",
    "IMPLEMENTATIONS",
    "RULES",
    "bind_equation",
    "by_jax",
    "dot_general",
    "lifted",
    "lost_products",
]

Rule = Callable[[Any, list[np.ndarray], list[np.ndarray]], Any]

# ------------------------------------------------------------------------------------------------ rules


def _squared(x: np.ndarray) -> np.ndarray:
    """|x|^2; of a complex number both parts err, and the variance is that of their distance."""
    return np.square(x) if x.dtype.kind != "c" else np.square(np.real(x)) + np.square(np.imag(x))


def _once(eqn, inputs, outputs):
    return _squared(outputs[0]) / 3


def _elementary(ulps: float) -> Rule:
    return lambda eqn, inputs, outputs: ulps**2 * _squared(outputs[0]) / 3


def _power_of_two(x: np.ndarray) -> np.ndarray:
    return np.abs(np.frexp(x)[0]) == 0.5 if x.dtype.kind != "c" else np.zeros(x.shape, bool)


def _add(eqn, inputs, outputs):
    a, b = inputs
    return np.where((a == 0) | (b == 0), 0.0, _squared(outputs[0]) / 3)


def _multiply(eqn, inputs, outputs):
    a, b = inputs
    if outputs[0].dtype.kind == "c":  # four products and two sums
        return 2 * _squared(outputs[0]) / 3
    x, y = (_rounded_literal(atom) for atom in eqn.invars)
    exact = (_power_of_two(a) & (not y)) | (_power_of_two(b) & (not x))
    return np.where(exact, 0.0, np.square(outputs[0]) / 3)


def _rounded_literal(atom) -> bool:
    """A constant in the source that float32 cannot hold: 0.1 has been rounded before 0.1 · 2 is taken."""
    value = getattr(atom, "val", None)
    return value is not None and np.ndim(value) == 0 and float(np.float32(value)) != float(value)


def _divide(eqn, inputs, outputs):
    if outputs[0].dtype.kind == "c":  # a product with the conjugate, a square of the modulus, two divisions
        return 4 * _squared(outputs[0]) / 3
    return np.where(_power_of_two(inputs[1]), 0.0, np.square(outputs[0]) / 3)


def _integer_power(eqn, inputs, outputs):
    # Repeated squaring: each product rounds once and carries the errors of its factors with it.
    y = abs(int(eqn.params["y"]))
    roundings = sum(4**i for i in range(max(y.bit_length() - 1, 0))) + (bin(y).count("1") - 1) + (eqn.params["y"] < 0)
    exact = _power_of_two(inputs[0])
    return np.where(exact, 0.0, roundings * _squared(outputs[0]) / 3)


def _modulus(eqn, inputs, outputs):
    # Of a real number exact; of a complex one two squares, their sum and a root.
    return 2 * np.square(outputs[0]) / 3 if inputs[0].dtype.kind == "c" else np.zeros(outputs[0].shape)


def _next(eqn, inputs, outputs):
    # The neighbour depends on the type: in a narrower one it is up to two units away from where float64 has it.
    return 4 * np.square(outputs[0]) / 3


def _exp2(eqn, inputs, outputs):
    # XLA computes exp(x log 2), and the rounded product is an error of the exponent; torch's exp2 is exact to one ulp.
    return (1 + np.square(math.log(2) * inputs[0])) * np.square(outputs[0]) / 3


def _lgamma(eqn, inputs, outputs):
    # Lanczos: a difference of terms like (x + 7) log(x + 7) and x + 7, so absolute near the zeros at 1 and 2. Torch is
    # right to an ulp even there.
    return (4 * np.square(outputs[0]) + 64 + np.square(4 * inputs[0])) / 3


def _digamma(eqn, inputs, outputs):
    # A recurrence up to large x, then an asymptotic series: absolute near the zero at 1.46, in both frameworks.
    return (4 * np.square(outputs[0]) + 36) / 3


def _root(eqn, inputs, outputs):
    # 1/sqrt is one or two roundings in the kernels read (hardware root then division, or a Newton step).
    return 2 * _squared(outputs[0]) / 3


def _sum_of(count, total, squares):
    """The model of left-to-right sums; a single term is copied, not rounded."""
    return np.where(count > 1, (count * _squared(total) / 3 + count / 6 * squares) / 3, 0.0)


def _reduce_sum(eqn, inputs, outputs):
    axes = tuple(eqn.params["axes"])
    terms = inputs[0]
    return _sum_of(np.count_nonzero(terms, axis=axes), outputs[0], _squared(terms).sum(axis=axes))


def _reduce_product(eqn, inputs, outputs):
    count = math.prod(inputs[0].shape[a] for a in eqn.params["axes"])
    return max(count - 1, 0) * _squared(outputs[0]) / 3


def _cumulative(eqn, inputs, outputs):
    axis, reverse = eqn.params["axis"], eqn.params.get("reverse", False)
    terms = np.flip(inputs[0], axis) if reverse else inputs[0]
    squares, count = np.cumsum(_squared(terms), axis), np.cumsum(terms != 0, axis)
    if reverse:
        squares, count = np.flip(squares, axis), np.flip(count, axis)
    return _sum_of(count, outputs[0], squares)


def _cumulative_product(eqn, inputs, outputs):
    axis = eqn.params["axis"]
    steps = np.arange(inputs[0].shape[axis]).reshape([-1 if i == axis else 1 for i in range(inputs[0].ndim)])
    steps = np.flip(steps, axis) if eqn.params.get("reverse", False) else steps
    return steps * np.square(outputs[0]) / 3


def _cumulative_logsumexp(eqn, inputs, outputs):
    # y_k = log(exp y_{k-1} + exp x_k): an error of y_{k-1} goes on with weight exp(y_{k-1} - y_k), and the step rounds
    # a sum of the size of y_k and a logarithm below 1.
    axis, reverse = eqn.params["axis"], eqn.params.get("reverse", False)
    y = np.moveaxis(np.flip(outputs[0], axis) if reverse else outputs[0], axis, 0)
    variance = np.zeros(y.shape)
    with np.errstate(invalid="ignore"):
        for k in range(1, len(y)):
            carried = np.nan_to_num(np.exp(2 * (y[k - 1] - y[k])))
            variance[k] = carried * variance[k - 1] + (np.square(y[k]) + 0.5) / 3
    variance = np.moveaxis(variance, 0, axis)
    return np.flip(variance, axis) if reverse else variance


def _dot(eqn, inputs, outputs):
    left, right = inputs
    numbers = eqn.params["dimension_numbers"]
    squares = dot_general(_squared(left), _squared(right), numbers)
    count = dot_general((left != 0).astype(np.float64), (right != 0).astype(np.float64), numbers)
    # The products round too where they are not fused with the sum.
    return _sum_of(count, outputs[0], squares) + squares / 3


def _convolution(eqn, inputs, outputs):
    left, right = inputs
    squares = convolve(_squared(left), _squared(right), eqn.params)
    count = convolve((left != 0).astype(np.float64), (right != 0).astype(np.float64), eqn.params)
    return _sum_of(np.rint(count), outputs[0], squares) + squares / 3


def _window_sum(eqn, inputs, outputs):
    count = by_jax(eqn, (inputs[0] != 0).astype(np.float64))
    return _sum_of(np.rint(count), outputs[0], by_jax(eqn, np.square(inputs[0])))


def _selected_sum(eqn, inputs, outputs):
    # The gradient of max-pooling: where windows overlap, an element may be the largest of several.
    source, operand = inputs
    count = by_jax(eqn, (source != 0).astype(np.float64), operand)
    return _sum_of(np.rint(count), outputs[0], by_jax(eqn, np.square(source), operand))


def _fft(eqn, inputs, outputs):
    # Higham, Accuracy and Stability (2nd ed.), section 24.1: the relative error in the 2-norm grows with log2 N; each
    # of the log2 N stages rounds a product and a sum of numbers whose mean square is that of the output.
    lengths = eqn.params["fft_lengths"]
    stages = math.log2(max(math.prod(lengths), 2))
    axes = tuple(range(-len(lengths), 0))
    power = np.mean(np.square(np.abs(outputs[0])), axis=axes, keepdims=True)
    return np.broadcast_to(stages * power * 2 / 3, outputs[0].shape)


def _scatter_sum(eqn, inputs, outputs):
    operand, _, updates = inputs
    squares = _scatter(eqn, [_squared(operand), inputs[1], _squared(updates)], np.add)
    count = _scatter(eqn, [(operand != 0) * 1.0, inputs[1], (updates != 0) * 1.0], np.add)
    return _sum_of(count, outputs[0], squares)


def _scatter_product(eqn, inputs, outputs):
    count = _scatter(eqn, [np.zeros(inputs[0].shape), inputs[1], np.ones(inputs[2].shape)], np.add)
    return count * _squared(outputs[0]) / 3


FAINT = 2.0**-480
"""Below it squares are no longer exact enough in float64, or are 0."""
LIFT = 900
"""Binary orders of magnitude that bring such numbers near 1, and keep the largest of them finite when squared."""


def lifted(eqn: Any, inputs: list[np.ndarray], rule: Rule, out: np.ndarray, std: np.ndarray) -> np.ndarray:
    """`std`, the root of what `rule` gave, where the squares in that rule underflow: from numbers scaled up.

    Every rule is of the second degree in what it sums or returns, so a power of two goes through it unchanged. An
    elementary function's variance follows from its result; that of a sum from its terms too, which are then scaled
    together: only where all of them are so small.
    """
    name = eqn.primitive.name
    faint = (np.abs(out) < FAINT) & (out != 0)
    if not faint.any() or out.dtype.kind == "c":
        return std
    if name in ELEMENTWISE and name not in _OF_INPUTS:
        raised = np.sqrt(rule(eqn, inputs, [np.where(faint, np.ldexp(out, LIFT), 0.0)]))
        return np.where(faint, np.ldexp(raised, -LIFT), std)
    if name not in SUMS:
        return std
    terms, total = list(inputs), 0
    for at in SUMS[name]:
        size = np.max(np.abs(terms[at]), initial=0.0)
        if size > 0 and np.isfinite(size):
            shift = -int(np.frexp(size)[1])
            terms[at], total = np.ldexp(terms[at], shift), total + shift
    if len(SUMS[name]) == 1:
        largest = np.max(np.abs(inputs[SUMS[name][0]]), initial=0.0)
    else:
        largest = np.ldexp(1.0, -total)
    if not largest < FAINT:
        return std
    return np.ldexp(np.sqrt(rule(eqn, terms, [np.ldexp(out, total)])), -total)


SUMS = {"reduce_sum": (0,), "cumsum": (0,), "fft": (0,), "dot_general": (0, 1), "conv_general_dilated": (0, 1)}
"""Sums, and which of their operands are scaled."""
_OF_INPUTS = {"lgamma", "digamma"}
"""Elementary functions whose error is absolute."""


def lost_products(eqn: Any, inputs: list[np.ndarray], tiny: float) -> np.ndarray | None:
    """What a sum of products loses where products lie below the smallest normal number, `tiny`; None where none do.

    XLA's CPU code takes such a product, and any partial sum of that size, for zero; others round it to a multiple of
    the smallest subnormal. All of them err the same way, so what is lost is at most their sum, and at most `tiny` each.
    """
    if eqn.primitive.name != "dot_general":
        return None
    left, right = (np.abs(x) for x in inputs)
    least = [np.min(x, initial=np.inf, where=x > 0) for x in (left, right)]
    if not least[0] * least[1] < tiny:  # two looks at the operands, not one at every product
        return None
    numbers = eqn.params["dimension_numbers"]
    count = dot_general((left > 0) * 1.0, (right > 0) * 1.0, numbers)
    # A sum that is far above what could be lost in it has an error of its own that hides it.
    return np.minimum(dot_general(left, right, numbers), tiny * count)


_EXACT = """
and argmax argmin bitcast_convert_type broadcast_in_dim ceil clamp clz complex concatenate conj copy cummax
cummin device_put dynamic_slice dynamic_update_slice empty eq eq_to floor gather ge gt imag iota is_finite le lt max
min name ne neg not optimization_barrier or pad population_count real reduce_and reduce_max reduce_min
reduce_or reduce_xor reduce_window_max reduce_window_min reshape rev round scatter scatter-max scatter-min
select_and_gather_add select_n stack tile unstack shift_left shift_right_arithmetic shift_right_logical sign slice
split squeeze stop_gradient transpose xor random_bits random_seed random_wrap random_unwrap random_fold_in
random_split random_clone threefry2x32 rem
""".split()  # noqa: SIM905
"""Movement, selection, comparison, counting; rem is here because fmod is exact."""

RULES: dict[str, Rule | None] = dict.fromkeys(_EXACT) | {
    "abs": _modulus,
    "nextafter": _next,
    "add": _add,
    "add_any": _add,
    "sub": _add,
    "mul": _multiply,
    "div": _divide,
    "square": _once,
    "sqrt": _once,
    "rsqrt": _root,
    "cbrt": _elementary(2),
    "integer_pow": _integer_power,
    "pow": _elementary(2),
    "exp": _elementary(1),
    "exp2": _exp2,
    "log": _elementary(1),
    "log1p": _elementary(1.5),
    "expm1": _elementary(2),
    "tanh": _elementary(1.75),
    "logistic": _elementary(2),
    "erf": _elementary(1.75),
    "erfc": _elementary(2),
    "erf_inv": _elementary(2),
    "sin": _elementary(1),
    "cos": _elementary(1),
    "tan": _elementary(2),
    "asin": _elementary(2),
    "acos": _elementary(2),
    "atan": _elementary(2),
    "atan2": _elementary(2),
    "sinh": _elementary(2),
    "cosh": _elementary(2),
    "asinh": _elementary(2),
    "acosh": _elementary(2),
    "atanh": _elementary(2),
    "lgamma": _lgamma,
    "digamma": _digamma,
    "reduce_sum": _reduce_sum,
    "reduce_prod": _reduce_product,
    "cumsum": _cumulative,
    "cumprod": _cumulative_product,
    "cumlogsumexp": _cumulative_logsumexp,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "reduce_window_sum": _window_sum,
    "fft": _fft,
    "scatter-add": _scatter_sum,
    "scatter-sub": _scatter_sum,
    "scatter-mul": _scatter_product,
    "select_and_scatter_add": _selected_sum,
}

# ------------------------------------------------------------------------------------------------ values


def dot_general(left: np.ndarray, right: np.ndarray, dimension_numbers) -> np.ndarray:
    """lax.dot_general by transposing to (batch, free, contract) @ (batch, contract, free)."""
    (contract_l, contract_r), (batch_l, batch_r) = dimension_numbers
    free_l = [i for i in range(left.ndim) if i not in (*contract_l, *batch_l)]
    free_r = [i for i in range(right.ndim) if i not in (*contract_r, *batch_r)]
    size = lambda x, axes: math.prod(x.shape[a] for a in axes)  # noqa: E731
    batch = [left.shape[a] for a in batch_l]
    a = left.transpose([*batch_l, *free_l, *contract_l]).reshape(*batch, size(left, free_l), size(left, contract_l))
    b = right.transpose([*batch_r, *contract_r, *free_r]).reshape(*batch, size(right, contract_r), size(right, free_r))
    shape = [*batch, *(left.shape[i] for i in free_l), *(right.shape[i] for i in free_r)]
    return np.matmul(a, b).reshape(shape)


def _indices(
    numbers, indices: np.ndarray, operand_shape, slice_sizes, collapsed, window_dims, batching, index_batching
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Index arrays, one per operand dimension, that a gather reads or a scatter writes, with a validity mask.

    Written from the definition of XLA's Gather: an operand index is (clamped or checked) start + batch index + offset.
    """
    batch_shape = indices.shape[:-1]
    offset_operand = [d for d in range(len(operand_shape)) if d not in collapsed and d not in batching]
    rank = len(batch_shape) + len(offset_operand)
    batch_axes = [d for d in range(rank) if d not in window_dims]

    def along(values: np.ndarray, axes: list[int]) -> np.ndarray:
        shape = [1] * rank
        for size, axis in zip(values.shape, axes):
            shape[axis] = size
        return values.reshape(shape)

    result, valid = [], np.ones([1] * rank, bool)
    for d in range(len(operand_shape)):
        index = np.zeros([1] * rank, np.int64)
        if d in numbers:
            start = along(indices[..., numbers.index(d)].astype(np.int64), batch_axes)
            valid = valid & (start >= 0) & (start <= operand_shape[d] - slice_sizes[d])
            index = index + np.clip(start, 0, operand_shape[d] - slice_sizes[d])
        if d in batching:
            axis = index_batching[list(batching).index(d)]
            index = index + along(np.arange(operand_shape[d]), [batch_axes[axis]])
        if d in offset_operand:
            index = index + along(np.arange(slice_sizes[d]), [window_dims[offset_operand.index(d)]])
        result.append(index)
    return tuple(result), valid


def _gather(eqn, inputs):
    operand, indices = inputs
    n, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    index, valid = _indices(
        n.start_index_map, indices, operand.shape, sizes, n.collapsed_slice_dims, n.offset_dims,
        n.operand_batching_dims, n.start_indices_batching_dims,
    )  # fmt: skip
    out = operand[index] if index else operand
    out = np.broadcast_to(out, eqn.outvars[0].aval.shape)
    if "fill" in str(eqn.params["mode"]).lower():
        fill = eqn.params.get("fill_value")
        if fill is None:
            kind = operand.dtype.kind
            if kind in "iu":
                fill = np.iinfo(operand.dtype).min if kind == "i" else np.iinfo(operand.dtype).max
            else:
                fill = np.nan if kind in "fc" else True
        out = np.where(np.broadcast_to(valid, out.shape), out, np.asarray(fill, operand.dtype))
    return out


def _scatter(eqn, inputs, combine) -> np.ndarray:
    operand, indices, updates = inputs
    update = eqn.params.get("update_jaxpr")
    if eqn.primitive.name == "scatter" and update is not None and update.eqns:
        raise CannotLook("scatter applies a function of its own (x.at[i].apply); its rounding has no rule")
    n = eqn.params["dimension_numbers"]
    hidden = (*n.inserted_window_dims, *n.operand_batching_dims)
    window = iter(n.update_window_dims)
    sizes = [1 if d in hidden else updates.shape[next(window)] for d in range(operand.ndim)]
    index, valid = _indices(
        n.scatter_dims_to_operand_dims, indices, operand.shape, sizes, n.inserted_window_dims, n.update_window_dims,
        n.operand_batching_dims, n.scatter_indices_batching_dims,
    )  # fmt: skip
    out = np.array(operand)
    keep = np.broadcast_to(valid, updates.shape)
    if "clip" in str(eqn.params["mode"]).lower():
        keep = np.ones(updates.shape, bool)
    where = tuple(np.broadcast_to(i, updates.shape)[keep] for i in index)
    if combine is None:
        out[where] = updates[keep]
    else:
        combine.at(out, where, updates[keep])
    return out


def _broadcast_in_dim(eqn, inputs):
    x, shape = inputs[0], eqn.params["shape"]
    view = [1] * len(shape)
    for size, axis in zip(x.shape, eqn.params["broadcast_dimensions"]):
        view[axis] = size
    return np.broadcast_to(x.reshape(view), shape)


def _pad(eqn, inputs):
    x, value = inputs
    config = eqn.params["padding_config"]
    shape = [lo + hi + (n + (n - 1) * inner if n else 0) for n, (lo, hi, inner) in zip(x.shape, config)]
    out = np.full(shape, value, x.dtype)
    # Negative padding cuts: place what is left.
    target, source = [], []
    for n, (lo, _, inner), size in zip(x.shape, config, shape):
        at = lo + np.arange(n) * (inner + 1)
        inside = (at >= 0) & (at < size)
        target.append(at[inside])
        source.append(np.arange(n)[inside])
    out[np.ix_(*target)] = x[np.ix_(*source)]
    return out


def _slice(eqn, inputs):
    p = eqn.params
    strides = p["strides"] or (1,) * len(p["start_indices"])
    return inputs[0][tuple(slice(a, b, s) for a, b, s in zip(p["start_indices"], p["limit_indices"], strides))]


def _starts(operand, sizes, starts):
    return [int(np.clip(int(s), 0, n - k)) for s, n, k in zip(starts, operand.shape, sizes)]


def _dynamic_slice(eqn, inputs):
    sizes = eqn.params["slice_sizes"]
    at = _starts(inputs[0], sizes, inputs[1:])
    return inputs[0][tuple(slice(a, a + k) for a, k in zip(at, sizes))]


def _dynamic_update_slice(eqn, inputs):
    operand, update, *starts = inputs
    at = _starts(operand, update.shape, starts)
    out = np.array(operand)
    out[tuple(slice(a, a + k) for a, k in zip(at, update.shape))] = update
    return out


def _select(eqn, inputs):
    which, *cases = inputs
    if which.dtype == bool:
        return np.where(which, cases[1], cases[0])
    out = cases[0]
    for i, case in enumerate(cases[1:], 1):
        out = np.where(which == i, case, out)
    return out


def _integer_pow(eqn, inputs):
    x, y = inputs[0], eqn.params["y"]
    return 1.0 / x ** (-y) if y < 0 else x**y


def _iota(eqn, inputs):
    p = eqn.params
    values = np.arange(p["shape"][p["dimension"]])
    view = [1] * len(p["shape"])
    view[p["dimension"]] = -1
    kind = np.float64 if np.dtype(p["dtype"]).kind not in "iub" else p["dtype"]
    return np.broadcast_to(values.reshape(view), p["shape"]).astype(kind)


def _bitcast(eqn, inputs):
    # Bits have a meaning in the program's own type only.
    import jax

    source, target = (v.aval.dtype for v in (eqn.invars[0], eqn.outvars[0]))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        out = np.asarray(jax.lax.bitcast_convert_type(jax.numpy.asarray(inputs[0].astype(source)), target))
    return out.astype(np.float64) if jax.numpy.issubdtype(target, np.floating) else out


def _remainder(eqn, inputs):
    a, b = inputs  # lax: the remainder by the integer 0 is the dividend
    return np.fmod(a, b) if a.dtype.kind == "f" else np.where(b == 0, a, np.fmod(a, np.where(b == 0, 1, b)))


def _integer_division(a, b):
    safe = np.where(b == 0, 1, b)
    return np.where(b == 0, -1, np.sign(a) * np.sign(safe) * (np.abs(a) // np.abs(safe))).astype(a.dtype)


def _div(eqn, inputs):
    a, b = inputs
    return np.divide(a, b) if a.dtype.kind in "fc" else _integer_division(a, b)


def _round(eqn, inputs):
    x = inputs[0]
    to_even = "EVEN" in str(eqn.params["rounding_method"]) or eqn.params["rounding_method"] == 1
    return np.rint(x) if to_even else np.trunc(x + np.copysign(0.5, x))


def _special(name: str):
    def evaluate(eqn, inputs):
        from scipy import special

        return getattr(special, name)(inputs[0])

    return evaluate


def _shift(operation):
    return lambda eqn, inputs: operation(inputs[0], inputs[1])


def _logical_right(x, s):
    unsigned = x.view(np.dtype(f"u{x.dtype.itemsize}")) if x.dtype.kind == "i" else x
    bits = 8 * x.dtype.itemsize
    return np.where(s >= bits, 0, unsigned >> np.minimum(s, bits - 1).astype(unsigned.dtype)).astype(x.dtype)


def _left(x, s):
    bits = 8 * x.dtype.itemsize
    return np.where(s >= bits, 0, x << np.minimum(s, bits - 1).astype(x.dtype)).astype(x.dtype)


def _cum(operation):
    def evaluate(eqn, inputs):
        axis = eqn.params["axis"]
        if eqn.params.get("reverse", False):
            return np.flip(operation(np.flip(inputs[0], axis), axis=axis), axis)
        return operation(inputs[0], axis=axis)

    return evaluate


def _fft_value(eqn, inputs):
    kind, lengths = str(eqn.params["fft_type"]).rpartition(".")[2].lower(), tuple(eqn.params["fft_lengths"])
    kind = {"0": "fft", "1": "ifft", "2": "rfft", "3": "irfft"}.get(kind, kind)
    return getattr(np.fft, f"{kind}n")(inputs[0], s=lengths, axes=tuple(range(-len(lengths), 0)))


def _split(eqn, inputs):
    edges = np.cumsum(eqn.params["sizes"])[:-1]
    return np.split(inputs[0], edges, axis=eqn.params["axis"])


def bind_equation(eqn, params, values) -> list:
    """Run one equation on JAX values. Before jax 0.10, get_bind_params also gave the sub-functions apart."""
    bound = eqn.primitive.get_bind_params(params)
    subfuns, params = bound if isinstance(bound, tuple) else ((), bound)
    out = eqn.primitive.bind(*subfuns, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def by_jax(eqn, *inputs) -> Any:
    """Evaluate with JAX itself, in float64 on the CPU: for the primitives that numpy does not have."""
    import jax
    import jax.numpy as jnp

    params = dict(eqn.params)
    for key in ("preferred_element_type", "dtype", "new_dtype"):
        if params.get(key) is not None and jnp.issubdtype(params[key], jnp.floating):
            params[key] = np.dtype(np.float64)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        # np.array, not ascontiguousarray: the latter turns 0-d arrays into vectors. Random keys are JAX's alone.
        key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
        values = [x if key(x) else jnp.asarray(np.array(x)) for x in inputs]
        out = [o if key(o) else np.asarray(o) for o in bind_equation(eqn, params, values)]
        return out if eqn.primitive.multiple_results else out[0]


def _elementwise(function):
    return lambda eqn, inputs: function(*inputs)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative,
    "abs": np.abs, "exp": np.exp, "exp2": np.exp2, "log": np.log, "log1p": np.log1p, "expm1": np.expm1,
    "tanh": np.tanh, "sin": np.sin, "cos": np.cos, "tan": np.tan, "asin": np.arcsin, "acos": np.arccos,
    "atan": np.arctan, "atan2": np.arctan2, "sinh": np.sinh, "cosh": np.cosh, "asinh": np.arcsinh,
    "acosh": np.arccosh, "atanh": np.arctanh, "sqrt": np.sqrt, "cbrt": np.cbrt, "square": np.square,
    "rsqrt": lambda x: 1.0 / np.sqrt(x), "pow": np.power, "max": np.maximum, "min": np.minimum,
    "floor": np.floor, "ceil": np.ceil, "sign": np.sign, "is_finite": np.isfinite,
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "not": np.invert, "real": np.real, "imag": np.imag, "conj": np.conj, "complex": lambda a, b: a + 1j * b,
    "copy": np.asarray, "stop_gradient": np.asarray, "name": np.asarray,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
}  # fmt: skip

IMPLEMENTATIONS: dict[str, Callable[[Any, list[np.ndarray]], Any]] = {
    **{name: _elementwise(function) for name, function in _FUNCTIONS.items()},
    "logistic": _special("expit"),
    "erf": _special("erf"),
    "erfc": _special("erfc"),
    "erf_inv": _special("erfinv"),
    "lgamma": _special("gammaln"),
    "digamma": _special("digamma"),
    "div": _div,
    "rem": _remainder,
    "bitcast_convert_type": _bitcast,
    "device_put": lambda eqn, inputs: list(inputs),
    "integer_pow": _integer_pow,
    "round": _round,
    "select_n": _select,
    "iota": _iota,
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": lambda eqn, inputs: inputs[0].reshape(eqn.params["new_sizes"]),
    "transpose": lambda eqn, inputs: inputs[0].transpose(eqn.params["permutation"]),
    "squeeze": lambda eqn, inputs: inputs[0].reshape(eqn.outvars[0].aval.shape),
    "concatenate": lambda eqn, inputs: np.concatenate(inputs, axis=eqn.params["dimension"]),
    "rev": lambda eqn, inputs: np.flip(inputs[0], eqn.params["dimensions"]),
    "pad": _pad,
    "slice": _slice,
    "split": _split,
    "stack": lambda eqn, inputs: np.stack(inputs, axis=eqn.params["axis"]),
    "unstack": lambda eqn, inputs: [np.asarray(x) for x in np.moveaxis(inputs[0], eqn.params["axis"], 0)],
    "tile": lambda eqn, inputs: np.tile(inputs[0], eqn.params["reps"]),
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "scatter": lambda eqn, inputs: _scatter(eqn, inputs, None),
    "scatter-add": lambda eqn, inputs: _scatter(eqn, inputs, np.add),
    "scatter-sub": lambda eqn, inputs: _scatter(eqn, inputs, np.subtract),
    "scatter-mul": lambda eqn, inputs: _scatter(eqn, inputs, np.multiply),
    "scatter-min": lambda eqn, inputs: _scatter(eqn, inputs, np.minimum),
    "scatter-max": lambda eqn, inputs: _scatter(eqn, inputs, np.maximum),
    "dot_general": lambda eqn, inputs: dot_general(inputs[0], inputs[1], eqn.params["dimension_numbers"]),
    "conv_general_dilated": lambda eqn, inputs: convolve(inputs[0], inputs[1], eqn.params),
    "fft": _fft_value,
    "reduce_sum": lambda eqn, inputs: inputs[0].sum(axis=tuple(eqn.params["axes"])),
    "reduce_prod": lambda eqn, inputs: inputs[0].prod(axis=tuple(eqn.params["axes"])),
    "reduce_max": lambda eqn, inputs: inputs[0].max(axis=tuple(eqn.params["axes"])),
    "reduce_min": lambda eqn, inputs: inputs[0].min(axis=tuple(eqn.params["axes"])),
    "reduce_and": lambda eqn, inputs: np.bitwise_and.reduce(inputs[0], axis=tuple(eqn.params["axes"])),
    "reduce_or": lambda eqn, inputs: np.bitwise_or.reduce(inputs[0], axis=tuple(eqn.params["axes"])),
    "reduce_xor": lambda eqn, inputs: np.bitwise_xor.reduce(inputs[0], axis=tuple(eqn.params["axes"])),
    "argmax": lambda eqn, inputs: np.argmax(inputs[0], axis=eqn.params["axes"][0]).astype(eqn.params["index_dtype"]),
    "argmin": lambda eqn, inputs: np.argmin(inputs[0], axis=eqn.params["axes"][0]).astype(eqn.params["index_dtype"]),
    "cumsum": _cum(np.cumsum),
    "cumprod": _cum(np.cumprod),
    "cummax": _cum(np.maximum.accumulate),
    "cummin": _cum(np.minimum.accumulate),
    "cumlogsumexp": _cum(np.logaddexp.accumulate),
    "shift_left": _shift(_left),
    "shift_right_logical": _shift(_logical_right),
    "shift_right_arithmetic": _shift(lambda x, s: x >> np.minimum(s, 8 * x.dtype.itemsize - 1).astype(x.dtype)),
    "optimization_barrier": lambda eqn, inputs: list(inputs),
}  # fmt: skip
"""Primitives that numpy evaluates; every other one with a rule is evaluated by `by_jax`."""

ELEMENTWISE = {
    *_FUNCTIONS, "logistic", "erf", "erfc", "erf_inv", "lgamma", "digamma", "div", "rem", "integer_pow", "round",
    "select_n", "device_put", "optimization_barrier", "shift_left", "shift_right_logical", "shift_right_arithmetic",
    "convert_element_type", "reduce_precision",
}  # fmt: skip
"""Primitives that treat every element alike: any axis may be added in front."""


DISCRETE = {"eq", "ne", "lt", "le", "gt", "ge", "is_finite", "sign", "floor", "ceil", "round", "argmax", "argmin"}
"""Primitives that turn floats into a choice. Choices are made once, in the reference, and replayed in the draws."""
