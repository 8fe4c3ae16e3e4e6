"""Guards for a training loop: numbers gone bad, clipping, the schedule for optax, seeds, a run under a magnifier.

A guard looks at values, so it stands outside jit, on what a compiled step has returned. Nothing is ever changed in
place: what raised NumericalError left parameters, moments and gradients as they were.
"""

from __future__ import annotations

import inspect
import itertools
import math
import operator
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from numbers import Real
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, Shaped

from .layers import statistics_dtype
from .optim import clip_grad_norm, warmup_cosine

__all__ = [
    "NumericalError",
    "validate_loss",
    "check_numerical_stability",
    "check_gradient_explosion",
    "clip_gradients",
    "get_lr_scheduler",
    "set_seed",
    "DebugRecord",
    "debug_training",
]

Tree = TypeVar("Tree")

# Where a batch that is a dict keeps its input and its target.
_X_KEYS = ("x", "input_ids", "inputs")
_Y_KEYS = ("y", "target_ids", "targets", "labels")
# How many tensors a message names, the worst first.
_NAMED = 3
_LARGEST_SEED = 2**32 - 1  # numpy's legacy generator takes no more


class NumericalError(RuntimeError):
    """A number went bad while training: NaN, Inf, or outside its bounds."""


def validate_loss(loss: float | Shaped[Array, ""], min_loss: float = -1e6, max_loss: float = 1e6) -> float:
    """The loss as a Python float, once it is known to be finite and within min_loss … max_loss (both allowed).

    `loss` is a number or a scalar array of any real dtype; outside jit, where it has a value.

    Raises:
        NumericalError: NaN, Inf, or outside the bounds; the message names the value, the bounds and what to try.
        ValueError: not a real scalar, a traced one, or bounds that are not in order.

    >>> validate_loss(jnp.asarray(2.5))
    2.5
    """
    if not min_loss <= max_loss:  # NaN fails too
        raise ValueError(f"min_loss must be ≤ max_loss, got {min_loss!r} and {max_loss!r}; swap them")
    value = _real_scalar("loss", loss)
    if not (math.isfinite(value) and min_loss <= value <= max_loss):
        raise NumericalError(
            f"loss is {value}, allowed are finite values from {min_loss:g} to {max_loss:g}; lower the learning rate, "
            "clip the gradients (clip_gradients), or look at this batch (check_numerical_stability)"
        )
    return value


def check_numerical_stability(tensor: Shaped[Array, "*N"], name: str = "tensor") -> Shaped[Array, "*N"]:
    """The array itself, once it is known to hold no NaN and no Inf; `name` is what the message calls it.

    Any shape and dtype; integers and booleans are always finite. Outside jit, where it has values.

    Raises:
        NumericalError: NaN or Inf; the message gives their counts, the first one's index and the range of the rest.
        ValueError: not an array, or a traced one.
    """
    if not isinstance(tensor, jax.Array | np.ndarray):
        raise ValueError(f"{name} must be an array, got {type(tensor).__name__}; convert it with jnp.asarray")
    _check_concrete(name, tensor)
    if not jnp.issubdtype(tensor.dtype, jnp.inexact) or bool(jnp.isfinite(tensor).all()):
        return tensor
    values = np.asarray(tensor)
    finite = np.isfinite(values)
    index = tuple(int(i[0]) for i in np.nonzero(~np.atleast_1d(finite)))[: values.ndim]
    nans = int(np.isnan(values).sum())
    infs = int((~finite).sum()) - nans
    at = f"[{', '.join(map(str, index))}]" if index else ""
    rest = np.abs(values[finite]) if np.iscomplexobj(values) else values[finite]
    known = f"the rest lie in {float(rest.min()):.6g} … {float(rest.max()):.6g}" if rest.size else "none is finite"
    raise NumericalError(
        f"{name} holds {nans} NaN and {infs} Inf among {values.size} values, the first is "
        f"{name}{at} = {values[index].item()}; {known}; look at what computed it: a logarithm or root of 0, a division "
        "by 0, an overflow, or a bad input"
    )


def check_gradient_explosion(
    grads: Any, max_grad_norm: float = 100.0, raise_on_error: bool = True
) -> tuple[float, bool]:
    """(global norm of a tree of gradients, whether it is above max_grad_norm or no number).

    √Σ g² over all elements of all leaves, in promote_types(dtype, float32) and scaled by the largest of them, so that
    the squares neither overflow nor vanish: float32 gradients of 1e30 have a norm. `grads` is any pytree of them, an
    nnx.State or an nnx.Module that jax.grad returned; outside jit, where they have values.

    Raises:
        NumericalError: exploded, and raise_on_error; the message names the leaves with the largest gradients.
        ValueError: no leaves, one that is not floating point, traced ones; a max_grad_norm that is not above 0.
    """
    _check_max_grad_norm(max_grad_norm)
    norms = _norms(_gradients(grads))
    norm = _total(norms)
    exploded = not norm <= max_grad_norm  # NaN is no number to train with
    if exploded and raise_on_error:
        raise NumericalError(
            f"gradient norm is {norm:.6g}, allowed is at most max_grad_norm={max_grad_norm}; worst: {_worst(norms)}; "
            "lower the learning rate, clip the gradients (clip_gradients), or look at this batch"
        )
    return norm, exploded


def clip_gradients(grads: Tree, max_grad_norm: float = 1.0) -> tuple[Tree, Float[Array, ""]]:
    """(gradients scaled to a global norm of at most `max_grad_norm`, the norm before).

        g ← g · min(1, max_grad_norm / (norm + 1e-6))

    `clip_grad_norm`, but for two things: gradients that are NaN or Inf are refused, and finite ones whose squares
    overflow are clipped as the others are. Inside jit neither can be decided: there it is `clip_grad_norm` itself, and
    a norm that is not finite is seen by looking at it outside.

    Raises:
        NumericalError: the norm is not finite (outside jit); the message names the leaves that are to blame.
        ValueError: no leaves, one that is not floating point; a max_grad_norm that is not above 0.
    Source: Pascanu et al., On the difficulty of training recurrent neural networks, arXiv 1211.5063, algorithm 1.
    """
    _check_max_grad_norm(max_grad_norm)
    named = _named_leaves(grads)
    clipped, norm = clip_grad_norm(grads, max_grad_norm)
    if isinstance(norm, Tracer) or math.isfinite(float(norm)):
        return clipped, norm
    norms = _norms(named)
    total = _total(norms)
    if not total <= float(jnp.finfo(norm.dtype).max):
        raise NumericalError(
            f"gradient norm is {total:.6g}, which is no finite {norm.dtype}; worst: {_worst(norms)}; skip this update "
            "(nothing was changed), lower the learning rate, or look at this batch"
        )
    ratio = min(max_grad_norm / total, 1.0)

    def scaled(g: Array) -> Array:
        wide = g.astype(statistics_dtype(g.dtype))
        scale = _binary_scale(jnp.max(jnp.abs(wide), initial=0.0))
        # The factor alone may be too small for the dtype; a power of two on the way costs nothing.
        return (wide * scale * (ratio / float(scale))).astype(g.dtype)

    return jax.tree.map(scaled, grads), jnp.asarray(total, norm.dtype)


def get_lr_scheduler(
    lr: ArrayLike, warmup_steps: int, max_steps: int, min_lr_ratio: float = 0.1
) -> Callable[[ArrayLike], Float[Array, ""]]:
    """Linear warm-up, then a half cosine down to min_lr_ratio, as an optax schedule: step → lr · `warmup_cosine`(step).

    The step is the number of updates made before (so the first update has lr 0), a scalar of an integer dtype or whole
    numbers of a float dtype; it may be traced. Fits every `learning_rate=` of optax, optax.scale_by_learning_rate and
    optax.inject_hyperparams.

    Raises:
        ValueError: an lr that is negative or not finite; warmup_steps or max_steps that is no integer,
            warmup_steps < 0, max_steps ≤ warmup_steps, min_lr_ratio outside [0, 1]; from the schedule, a step that is
            not a whole scalar or is negative (a traced one cannot be looked at).
    Source: Loshchilov & Hutter, SGDR, arXiv 1608.03983, equation 5 (one period, no restart), with a linear start.

    >>> schedule = get_lr_scheduler(0.5, warmup_steps=2, max_steps=10)
    >>> [round(float(schedule(step)), 4) for step in (0, 1, 2, 10)]
    [0.0, 0.25, 0.5, 0.05]
    """
    _check_min_lr_ratio(min_lr_ratio)
    warmup_steps, max_steps = _check_count("warmup_steps", warmup_steps), _check_count("max_steps", max_steps)
    warmup_cosine(0, warmup_steps, max_steps, min_lr_ratio)  # raises now, not at the first step
    if not isinstance(lr, Tracer):
        value = _real_scalar("lr", lr)
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"lr must be finite and ≥ 0, got {lr!r}; pass for example lr=1e-3")

    def schedule(step: ArrayLike) -> Float[Array, ""]:
        factor = warmup_cosine(_whole(step), warmup_steps, max_steps, min_lr_ratio)
        return jnp.asarray(lr, factor.dtype) * factor

    return schedule


def set_seed(seed: int) -> Key[Array, ""]:
    """Seed Python's random and numpy's legacy generator; returns jax.random.key(seed), since JAX has no global state.

    Raises:
        ValueError: not an integer in 0 … 2³² − 1 (what all of them take).
    """
    seed = _check_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    return jax.random.key(np.uint32(seed))  # as an int, 2**31 and up would not fit the default int32


@dataclass(frozen=True)
class DebugRecord:
    """What `debug_training` saw of one batch; a field is None where it stopped before.

    batch: number of the batch, from 0. input_*, target_*, output_*: shape, dtype and (smallest, largest) value of what
    went into the model, of what the loss compares with, and of what came out. loss; grad_norm: global norm of the
    gradients, unclipped; param_norm: that of the parameters before the update; update_norm: that of the change.
    problem: why it stopped here, in a sentence; where: the first bad tensor: "x", "y" or the batch's key,
    "parameters: NAME", "output: MODULE", "output", "loss", "gradients: NAME", "updates: NAME" or "updates".
    """

    batch: int
    input_shape: tuple[int, ...]
    input_dtype: str
    input_range: tuple[float, float]
    target_shape: tuple[int, ...]
    target_dtype: str
    target_range: tuple[float, float]
    output_shape: tuple[int, ...] | None = None
    output_dtype: str | None = None
    output_range: tuple[float, float] | None = None
    loss: float | None = None
    grad_norm: float | None = None
    param_norm: float | None = None
    update_norm: float | None = None
    problem: str | None = None
    where: str | None = None


def debug_training(
    model: nnx.Module,
    dataloader: Iterable[Any],
    loss_fn: Callable[..., Array],
    optimizer: Any,
    max_batches: int = 3,
) -> list[DebugRecord]:
    """Train on the first `max_batches` batches under a magnifier; prints what it sees and returns it, one per batch.

    Per batch: shape, dtype and range of input, target and output, the loss, the gradients' norm, the size of the
    update. Stops at the first bad batch, before that batch's update, and says which tensor was the first bad one: NaN
    or Inf in input or target; a loss that is NaN, Inf or outside ±1e6; a loss that broadcasts the output against a
    floating target of another shape; a gradient norm that is NaN, Inf or above 100. An
    update that turns out NaN or Inf stops it too; so does one that is not 0 and yet changes no parameter. (An update of
    0 does not: an optax schedule may begin with it, or optax.MultiSteps still collect.)

    `optimizer` is an optax.GradientTransformation, started afresh here. The updates are made to a copy: parameters,
    random streams and statistics of `model` stay as they are. Train or eval mode is what the model is in.

    A batch is (x, y) or a dict with x under "x", "input_ids" or "inputs" and y under "y", "target_ids", "targets" or
    "labels"; its "attention_mask" is handed on to a model that takes one. The loss is loss_fn(model(x), y), compiled;
    only to find where a bad one comes from is the forward pass made once more, operation by operation.

    Raises:
        ValueError: a dataloader without a batch, a batch of another form or without values, a loss that is no scalar,
            a model without an nnx.Param, a max_batches below 1.
    """
    _check_max_batches(max_batches)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    if not jax.tree.leaves(params):
        raise ValueError(f"{type(model).__name__} has no nnx.Param; there is nothing to train")
    run = _Run(graphdef, loss_fn, optimizer, optimizer.init(params))
    records = []
    for number, batch in enumerate(itertools.islice(dataloader, max_batches)):
        record, params, rest = run.batch(number, params, rest, batch)
        records.append(record)
        _print_record(record)
        if record.problem:
            break
    if not records:
        raise ValueError("dataloader gave no batch; look at the length of its dataset, and at drop_last")
    return records


class _Run:
    """One training run under the magnifier: everything that stays from batch to batch but parameters and state."""

    def __init__(self, graphdef: Any, loss_fn: Callable[..., Array], optimizer: Any, opt_state: Any) -> None:
        self.graphdef, self.loss_fn, self.optimizer, self.opt_state = graphdef, loss_fn, optimizer, opt_state
        self.gradients = jax.jit(jax.value_and_grad(self.forward, has_aux=True))

    def forward(self, params: Any, rest: Any, x: Array, y: Array, extra: dict[str, Array]) -> tuple[Array, Any]:
        """(loss, (output, random streams and statistics as the pass left them))."""
        model = nnx.merge(self.graphdef, params, rest, copy=True)  # a copy: its counters move inside this trace
        accepts = inspect.signature(type(model).__call__).parameters
        output = model(x, **{name: value for name, value in extra.items() if name in accepts})
        loss = self.loss_fn(output, y)
        if jnp.shape(loss):
            raise ValueError(f"loss must be a scalar, got shape {jnp.shape(loss)}; take its mean or sum first")
        return loss, (output, nnx.state(model, nnx.Not(nnx.Param)))

    def batch(self, number: int, params: Any, rest: Any, batch: Any) -> tuple[DebugRecord, Any, Any]:
        """One batch, up to its update or to the first thing that is bad: (record, parameters, other state)."""
        import optax

        (x_name, x), (y_name, y), extra = _parts(batch, number)
        seen = DebugRecord(number, tuple(x.shape), x.dtype.name, _range(x), tuple(y.shape), y.dtype.name, _range(y))
        for name, value in ((x_name, x), (y_name, y)):
            try:
                check_numerical_stability(value, name)
            except NumericalError as error:
                return replace(seen, problem=str(error), where=name), params, rest

        (loss, (output, new_rest)), grads = self.gradients(params, rest, x, y, extra)
        for shown in jax.tree.leaves(output)[:1]:
            seen = replace(
                seen, output_shape=tuple(shown.shape), output_dtype=shown.dtype.name, output_range=_range(shown)
            )
        seen = replace(seen, loss=_real_scalar("loss", loss))
        try:
            validate_loss(loss)
        except NumericalError as error:
            finite = math.isfinite(cast(float, seen.loss))
            where = "loss" if finite else _bad_parameter(params) or self.first_bad_output(params, rest, x, y, extra)
            return replace(seen, problem=str(error), where=where), params, rest

        problem = _broadcast_problem(output, y, cast(float, seen.loss), self.loss_fn)
        if problem:
            return replace(seen, problem=problem, where="loss"), params, rest

        norms = _norms(_gradients(grads))
        seen = replace(seen, grad_norm=_total(norms))
        try:
            check_gradient_explosion(grads)
        except NumericalError as error:
            return replace(seen, problem=str(error), where=f"gradients: {_first_bad(norms)}"), params, rest

        with jax.numpy_dtype_promotion("standard"):  # optax's own code does not run under "strict"
            updates, self.opt_state = self.optimizer.update(grads, self.opt_state, params)
            new_params = optax.apply_updates(params, updates)
        changes = _norms(_named_leaves(jax.tree.map(jnp.subtract, new_params, params)))
        seen = replace(seen, param_norm=_total(_norms(_named_leaves(params))), update_norm=_total(changes))
        if not math.isfinite(cast(float, seen.update_norm)):
            problem = "the optimizer's update is not finite; look at its lr, eps and state"
            return replace(seen, problem=problem, where=f"updates: {_first_bad(changes)}"), params, rest
        # An optimizer is started on this model's parameters here: it cannot hold another's, as one in torch may.
        if seen.update_norm == 0.0 and _total(_norms(_named_leaves(updates))) > 0.0:
            problem = (
                f"the update changed nothing, at a gradient norm of {seen.grad_norm:.6g}: it is too small for the "
                "parameters' dtype; raise the learning rate, or keep the parameters in float32"
            )
            return replace(seen, problem=problem, where="updates"), params, rest
        return seen, new_params, new_rest

    def first_bad_output(self, params: Any, rest: Any, x: Array, y: Array, extra: dict[str, Array]) -> str:
        """The first sub-module, in the order in which they finish, whose output holds NaN or Inf.

        The same pass again (it is a pure function, dropout included), but operation by operation. A class looks up
        its own `__call__`, so that the classes are wrapped while this lasts, as nnx.capture does.
        """
        model = nnx.merge(self.graphdef, params, rest, copy=True)
        names = {id(module): ".".join(map(str, path)) for path, module in nnx.iter_modules(model)}
        found: list[str] = []

        def watched(call: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(call)
            def look(module: nnx.Module, *args: Any, **kwargs: Any) -> Any:
                output = call(module, *args, **kwargs)
                bad = not all(isinstance(leaf, Tracer) or _all_finite(leaf) for leaf in jax.tree.leaves(output))
                if bad and not found and id(module) in names:
                    found.append(f"output: {names[id(module)]}" if names[id(module)] else "output")
                return output

            return look

        present: set[type[Any]] = {type(module) for _, module in nnx.iter_modules(model)}
        kinds = {kind for kind in present if any("__call__" in base.__dict__ for base in kind.__mro__)}
        own: dict[type[Any], Any] = {kind: kind.__dict__.get("__call__") for kind in kinds}
        calls = {kind: kind.__call__ for kind in kinds}
        try:
            for kind in kinds:
                kind.__call__ = watched(calls[kind])
            accepts = inspect.signature(calls[type(model)]).parameters
            output = model(x, **{name: value for name, value in extra.items() if name in accepts})
        finally:
            for kind in kinds:
                if own[kind] is None:
                    delattr(kind, "__call__")
                else:
                    kind.__call__ = own[kind]
        self.loss_fn(output, y)  # a loss that can look at its targets outside jit says better than we what is wrong
        return found[0] if found else "loss"  # every output was good, so the loss function made it


def _all_finite(value: Any) -> bool:
    return not jnp.issubdtype(jnp.result_type(value), jnp.inexact) or bool(jnp.isfinite(value).all())


def _bad_parameter(params: Any) -> str | None:
    for name, p in _named_leaves(params):
        if not _all_finite(p):
            return f"parameters: {name}"
    return None


def _range(value: Array) -> tuple[float, float]:
    """(smallest, largest), both NaN as soon as one value is."""
    if not value.size:
        return math.nan, math.nan
    value = jnp.abs(value) if jnp.issubdtype(value.dtype, jnp.complexfloating) else value
    return float(jnp.min(value)), float(jnp.max(value))


def _print_record(seen: DebugRecord) -> None:
    print(f"Batch {seen.batch}:")
    print(f"  Input shape: {seen.input_shape}, dtype: {seen.input_dtype}")
    print(f"  Input range: {_show(seen.input_range)}")
    print(f"  Target shape: {seen.target_shape}, dtype: {seen.target_dtype}")
    print(f"  Target range: {_show(seen.target_range)}")
    if seen.output_range is not None:
        print(f"  Output shape: {seen.output_shape}, dtype: {seen.output_dtype}")
        print(f"  Output range: {_show(seen.output_range)}")
    if seen.loss is not None:
        print(f"  Loss: {seen.loss:.6g}")
    if seen.grad_norm is not None:
        print(f"  Gradient norm: {seen.grad_norm:.6g}")
    if seen.update_norm is not None:
        print(f"  Update size: {seen.update_norm:.6g} (parameters: {seen.param_norm:.6g})")
    if seen.problem is not None:
        print(f"  STOP at {seen.where}: {seen.problem}")


def _broadcast_problem(output: Any, y: Array, loss: float, loss_fn: Callable[..., Array]) -> str | None:
    """Why a loss over all pairs of `output` and `y` is none over the examples; None if it is not of that kind.

    Class indices have another shape by right, and so they are left alone; so is a loss that puts the shapes right
    itself. Over all pairs it does not matter, up to rounding, which target stands where, and the loss is another one
    than that of an output which has the target's shape.
    """
    if not isinstance(output, jax.Array) or output.shape == y.shape or not jnp.issubdtype(y.dtype, jnp.floating):
        return None
    try:
        np.broadcast_shapes(tuple(output.shape), tuple(y.shape))
    except ValueError:
        return None
    if output.size == y.size:
        try:
            reshaped, permuted = (
                _real_scalar("loss", loss_fn(*pair))
                for pair in ((output.reshape(y.shape), y), (output, jnp.roll(y, 1)))
            )
        except Exception:  # whatever a loss raises for another shape: it wants this one
            return None
        rounding = float(jnp.finfo(y.dtype).eps) * y.size
        if math.isclose(reshaped, loss, rel_tol=rounding) or not math.isclose(permuted, loss, rel_tol=rounding):
            return None
    return (
        f"the loss broadcasts {tuple(output.shape)} against {tuple(y.shape)}: every output meets every target; give "
        "both one shape, for example y[:, None] or pred.squeeze(-1)"
    )


def _show(pair: tuple[float, float]) -> str:
    return f"[{pair[0]:.6g}, {pair[1]:.6g}]"


def _parts(batch: Any, number: int) -> tuple[tuple[str, Array], tuple[str, Array], dict[str, Array]]:
    """(name, x), (name, y) and what else a model may take, of a batch in one of the forms that are allowed."""
    if isinstance(batch, Mapping):
        names = [next((name for name in allowed if name in batch), None) for allowed in (_X_KEYS, _Y_KEYS)]
        if None in names:
            raise ValueError(
                f"batch {number} has the keys {', '.join(map(str, batch))}; needed are one of {', '.join(_X_KEYS)} and "
                f"one of {', '.join(_Y_KEYS)}; rename them in the collate function"
            )
        x, y = ((str(name), batch[name]) for name in names)
        extra = {name: batch[name] for name in ("attention_mask",) if name in batch}
    elif isinstance(batch, list | tuple) and len(batch) == 2:
        x, y, extra = ("x", batch[0]), ("y", batch[1]), {}
    else:
        raise ValueError(
            f"batch {number} must be (x, y) or a dict with both, got {type(batch).__name__}; pair inputs and targets "
            "in the collate function"
        )
    x, y = ((name, jnp.asarray(v) if isinstance(v, np.ndarray) else v) for name, v in (x, y))
    for name, value in (x, y):
        if not isinstance(value, jax.Array) or not value.size:
            what = f"shape {tuple(value.shape)}" if isinstance(value, jax.Array) else type(value).__name__
            raise ValueError(f"batch {number}: {name} must be an array with at least one value, got {what}")
    return x, y, extra


def _first_bad(norms: dict[str, float]) -> str:
    """The first that is no finite number, else the largest."""
    return next((name for name in norms if not math.isfinite(norms[name])), "") or max(norms, key=lambda n: norms[n])


def _check_max_batches(max_batches: int) -> None:
    if isinstance(max_batches, bool) or not isinstance(max_batches, int) or max_batches < 1:
        raise ValueError(f"max_batches must be an integer ≥ 1, got {max_batches!r}; pass for example max_batches=3")


def _check_concrete(name: str, value: Any) -> None:
    if isinstance(value, Tracer):
        raise ValueError(
            f"{name} is traced: inside jit, grad or vmap there are no values to look at; return it from the compiled "
            "function and look at it outside"
        )


def _real_scalar(name: str, value: Any) -> float:
    _check_concrete(name, value)
    if isinstance(value, jax.Array | np.ndarray):
        if value.ndim:
            raise ValueError(f"{name} must be a scalar, got shape {tuple(value.shape)}; take its mean or sum first")
        value = value.item()
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a real number or a scalar array, got {value!r} ({type(value).__name__})")
    return float(value)


def _whole(step: ArrayLike) -> Any:
    """A count as integers; optax counts in int32, inject_hyperparams may hand on what a user keeps in float32."""
    if isinstance(step, Tracer):
        return jnp.round(step).astype(jnp.int32) if jnp.issubdtype(step.dtype, jnp.floating) else step
    if not jnp.issubdtype(jnp.result_type(step), jnp.floating):
        if isinstance(step, jax.Array) and not step.ndim and int(step) < 0:  # warmup_cosine looks at Python's only
            raise ValueError(f"step must be ≥ 0, got {step}; pass the number of updates made so far")
        return step
    value = _real_scalar("step", step)
    if not value.is_integer():
        raise ValueError(f"step must be a whole number, got {value}; pass the number of updates made so far")
    return int(value)


def _named_leaves(grads: Any) -> list[tuple[str, Array]]:
    """Dotted name and value of every gradient."""
    named = [(_dotted(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(grads)]
    if not named:
        raise ValueError("grads holds no arrays; pass what jax.grad returned, or nnx.state(model, nnx.Param) of it")
    for name, g in named:
        if not isinstance(g, jax.Array | np.ndarray) or not jnp.issubdtype(g.dtype, jnp.floating):
            what = g.dtype if hasattr(g, "dtype") else type(g).__name__
            raise ValueError(f"grads: {name} must be an array of a real floating dtype, got {what}; leave it out")
    return named


def _gradients(grads: Any) -> list[tuple[str, Array]]:
    named = _named_leaves(grads)
    for name, g in named:
        _check_concrete(f"grads: {name}", g)
    return named


def _dotted(path: tuple[Any, ...]) -> str:
    """blocks.0.attn.q.kernel: the keys of the path, without the `value` that an nnx.Variable adds."""
    keys = [str(next(getattr(k, a) for a in ("key", "idx", "name") if hasattr(k, a))) for k in path]
    if len(keys) > 1 and keys[-1] in ("value", "raw_value"):
        keys = keys[:-1]
    return ".".join(keys) or "grads"


def _binary_scale(peak: Array) -> Array:
    """A power of two that takes values up to `peak` to where neither squares nor sums of 2⁴⁰ of them overflow.

    To be multiplied with: XLA turns the division of an array by a scalar into a product with the reciprocal, which is
    0 for a float32 scalar above 2¹²⁶.
    """
    most = jnp.finfo(peak.dtype).maxexp
    down, up = 2.0 ** (-3 * most // 4), 2.0 ** (5 * most // 8)
    small = jnp.where(peak < 2.0 ** (-5 * most // 16), jnp.asarray(up, peak.dtype), jnp.ones_like(peak))
    return jnp.where(peak > 2.0 ** (11 * most // 32), jnp.asarray(down, peak.dtype), small)


@jax.jit
def _scaled_norms(leaves: list[Array]) -> list[tuple[Array, Array]]:
    """(scale, norm of the leaf times it) of each: their quotient cannot overflow in Python's float64."""

    def one(g: Array) -> tuple[Array, Array]:
        wide = g.astype(statistics_dtype(g.dtype))
        scale = _binary_scale(jnp.max(jnp.abs(wide), initial=0.0))
        return scale, jnp.sqrt(jnp.sum(jnp.square(wide * scale)))

    return [one(g) for g in leaves]


def _norms(named: list[tuple[str, Array]]) -> dict[str, float]:
    parts = jax.device_get(_scaled_norms([g for _, g in named]))
    return {name: float(norm) / float(scale) for (name, _), (scale, norm) in zip(named, parts)}


def _total(norms: dict[str, float]) -> float:
    return math.nan if any(map(math.isnan, norms.values())) else math.hypot(*norms.values())


def _worst(norms: dict[str, float]) -> str:
    ranked = sorted(norms, key=lambda name: norms[name] if math.isfinite(norms[name]) else math.inf, reverse=True)
    return ", ".join(f"{name} {norms[name]:.6g}" for name in ranked[:_NAMED])


def _check_max_grad_norm(max_grad_norm: float) -> None:
    if not max_grad_norm > 0.0:  # NaN fails too
        raise ValueError(
            f"max_grad_norm must be > 0 (inf only measures the norm), got {max_grad_norm!r}; pass for example "
            "max_grad_norm=1.0"
        )


def _check_min_lr_ratio(min_lr_ratio: float) -> None:
    if not 0.0 <= min_lr_ratio <= 1.0:
        raise ValueError(
            f"min_lr_ratio must be in [0, 1], got {min_lr_ratio!r}; pass the last factor itself, for example 0.1"
        )


def _check_count(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(
            f"{name} must be an integer, got {value!r} ({type(value).__name__}); pass a number of updates"
        ) from None


def _check_seed(seed: Any) -> int:
    try:
        number = None if isinstance(seed, bool | np.bool_) else operator.index(seed)
    except TypeError:
        number = None
    if number is None or not 0 <= number <= _LARGEST_SEED:
        raise ValueError(
            f"seed must be an integer from 0 to 2**32 - 1 (what numpy's generator takes too), got {seed!r}; pass for "
            "example seed=0"
        )
    return number
