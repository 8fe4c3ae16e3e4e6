"""Guards for a training loop: numbers gone bad, clipping, the schedule as a scheduler, seeds, a run under a magnifier.

What a guard refuses it refuses before anything is changed: NumericalError means that parameters, moments and gradients
are as they were.
"""

from __future__ import annotations

import inspect
import itertools
import math
import operator
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .layers import statistics_dtype
from .optim import clip_grad_norm_, global_norm, warmup_cosine

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

# Where a batch that is a dict keeps its input and its target.
_X_KEYS = ("x", "input_ids", "inputs")
_Y_KEYS = ("y", "target_ids", "targets", "labels")
# How many tensors a message names, the worst first.
_NAMED = 3
_LARGEST_SEED = 2**32 - 1  # numpy's legacy generator takes no more


class NumericalError(RuntimeError):
    """A number went bad while training: NaN, Inf, or outside its bounds."""


def validate_loss(loss: float | Shaped[Tensor, ""], min_loss: float = -1e6, max_loss: float = 1e6) -> float:
    """The loss as a Python float, once it is known to be finite and within min_loss … max_loss (both allowed).

    `loss` is a number or a scalar tensor of any real dtype.

    Raises:
        NumericalError: NaN, Inf, or outside the bounds; the message names the value, the bounds and what to try.
        ValueError: not a real scalar, or bounds that are not in order.

    >>> validate_loss(torch.tensor(2.5))
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


def check_numerical_stability(tensor: Shaped[Tensor, "*N"], name: str = "tensor") -> Shaped[Tensor, "*N"]:
    """The tensor itself, once it is known to hold no NaN and no Inf; `name` is what the message calls it.

    Any shape and dtype; integers and booleans are always finite.

    Raises:
        NumericalError: NaN or Inf; the message gives their counts, the first one's index and the range of the rest.
        ValueError: not a tensor.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}; convert it with torch.as_tensor")
    values = tensor.detach()
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return tensor
    index = (~finite).nonzero()[0].tolist()
    nans = int(torch.isnan(values).sum())
    infs = int((~finite).sum()) - nans
    at = f"[{', '.join(map(str, index))}]" if index else ""
    rest = values[finite].abs() if values.is_complex() else values[finite]
    known = f"the rest lie in {float(rest.min()):.6g} … {float(rest.max()):.6g}" if rest.numel() else "none is finite"
    raise NumericalError(
        f"{name} holds {nans} NaN and {infs} Inf among {values.numel()} values, the first is "
        f"{name}{at} = {values[tuple(index)].item()}; {known}; look at what computed it: a logarithm or root of 0, a "
        "division by 0, an overflow, or a bad input"
    )


def check_gradient_explosion(
    model: nn.Module, max_grad_norm: float = 100.0, raise_on_error: bool = True
) -> tuple[float, bool]:
    """(global norm of the gradients that `backward` left in the model, whether it is above max_grad_norm or no number).

    √Σ g² over all elements of all gradients, in promote_types(dtype, float32) and scaled by the largest of them, so
    that the squares neither overflow nor vanish: float32 gradients of 1e30 have a norm. The gradients are left alone.

    Raises:
        NumericalError: exploded, and raise_on_error; the message names the tensors with the largest gradients.
        ValueError: no parameter has a gradient; a max_grad_norm that is not above 0.
    """
    _check_max_grad_norm(max_grad_norm)
    norms = _norms(_gradients(model))
    norm = _total(norms)
    exploded = not norm <= max_grad_norm  # NaN is no number to train with
    if exploded and raise_on_error:
        raise NumericalError(
            f"gradient norm is {norm:.6g}, allowed is at most max_grad_norm={max_grad_norm}; worst: {_worst(norms)}; "
            "lower the learning rate, clip the gradients (clip_gradients), or look at this batch"
        )
    return norm, exploded


def clip_gradients(model: nn.Module, max_grad_norm: float = 1.0) -> float:
    """Scale the model's gradients in place to a global norm of at most `max_grad_norm`; returns the norm before.

        g ← g · min(1, max_grad_norm / (norm + 1e-6))

    `clip_grad_norm_`, but for two things: gradients that are NaN or Inf are refused before anything is changed, and
    finite ones whose squares overflow are clipped as the others are.

    Raises:
        NumericalError: the norm is not finite; the message names the tensors that are to blame.
        ValueError: no parameter has a gradient; a max_grad_norm that is not above 0.
    Source: Pascanu et al., On the difficulty of training recurrent neural networks, arXiv 1211.5063, algorithm 1.
    """
    _check_max_grad_norm(max_grad_norm)
    named = _gradients(model)
    plain = global_norm(g for _, g in named)
    if bool(torch.isfinite(plain)):
        return float(clip_grad_norm_((g for _, g in named), max_grad_norm))
    norms = _norms(named)
    norm = _total(norms)
    if not norm <= torch.finfo(plain.dtype).max:
        raise NumericalError(
            f"gradient norm is {norm:.6g}, which is no finite {str(plain.dtype).removeprefix('torch.')}; worst: "
            f"{_worst(norms)}; skip this update (nothing was changed), lower the learning rate, or look at this batch"
        )
    if norm > max_grad_norm:
        with torch.no_grad():
            for _, g in named:
                wide = g.to(statistics_dtype(g.dtype))
                # The factor alone may be too small for the dtype: first to at most 1, then to its share of max_norm.
                peak = float(wide.abs().max()) if g.numel() else 0.0
                if peak > 0.0:
                    g.copy_(wide.div(peak).mul_(max_grad_norm * (peak / norm)))
    return norm


def get_lr_scheduler(optimizer: Optimizer, warmup_steps: int, max_steps: int, min_lr_ratio: float = 0.1) -> LambdaLR:
    """Linear warm-up, then a half cosine down to min_lr_ratio, as a scheduler: lr = base lr · `warmup_cosine`(step).

    Call `scheduler.step()` after every `optimizer.step()`; the first update has lr 0. Loading a state_dict sets the
    optimizer's lr for that step again (torch's own LambdaLR leaves it at step 0's until the next call of `step`, unless
    the optimizer is loaded after the scheduler was made).

    Raises:
        ValueError: warmup_steps or max_steps that is no integer; as `warmup_cosine` (warmup_steps < 0,
            max_steps ≤ warmup_steps, min_lr_ratio outside [0, 1]).
    Source: Loshchilov & Hutter, SGDR, arXiv 1608.03983, equation 5 (one period, no restart), with a linear start.
    """
    _check_min_lr_ratio(min_lr_ratio)
    warmup_steps, max_steps = _check_count("warmup_steps", warmup_steps), _check_count("max_steps", max_steps)
    warmup_cosine(0, warmup_steps, max_steps, min_lr_ratio)  # raises now, not inside torch's constructor
    # A plain function: LambdaLR keeps it out of its state_dict, where the family's checkpoints have None.
    return _WarmupCosineLR(optimizer, lambda step: warmup_cosine(step, warmup_steps, max_steps, min_lr_ratio))


def set_seed(seed: int) -> None:
    """Seed Python's random, numpy's legacy generator and torch's generators on every device.

    Raises:
        ValueError: not an integer in 0 … 2³² − 1 (what all of them take).
    """
    seed = _check_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # every CUDA device's too, also before CUDA has started


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
    model: nn.Module,
    dataloader: Iterable[Any],
    loss_fn: Callable[..., Tensor],
    optimizer: Optimizer,
    max_batches: int = 3,
) -> list[DebugRecord]:
    """Train on the first `max_batches` batches under a magnifier; prints what it sees and returns it, one per batch.

    Per batch: shape, dtype and range of input, target and output, the loss, the gradients' norm, the size of the
    update. Stops at the first bad batch, before that batch's update, and says which tensor was the first bad one: NaN
    or Inf in input or target; a loss that is NaN, Inf or outside ±1e6; a loss that broadcasts the output against a
    floating target of another shape; a gradient norm that is NaN, Inf or above 100. An
    update that turns out NaN or Inf stops it too, but has been made by then; so does one that changes nothing though
    there is a gradient and the learning rate is not 0.

    These are real updates of `model` through `optimizer`, whose state goes on from where it was; the last batch's
    gradients stay in `.grad`. Train or eval mode is not touched.

    A batch is (x, y) or a dict with x under "x", "input_ids" or "inputs" and y under "y", "target_ids", "targets" or
    "labels"; its "attention_mask" is handed on to a model that takes one. The loss is loss_fn(model(x), y).

    Raises:
        ValueError: a dataloader without a batch, a batch of another form or without values, a loss that is no scalar,
            a model whose parameters all are frozen, a max_batches below 1.
    """
    _check_max_batches(max_batches)
    records = []
    for number, batch in enumerate(itertools.islice(dataloader, max_batches)):
        records.append(_debug_batch(number, model, batch, loss_fn, optimizer))
        _print_record(records[-1])
        if records[-1].problem:
            break
    if not records:
        raise ValueError("dataloader gave no batch; look at the length of its dataset, and at drop_last")
    return records


class _WarmupCosineLR(LambdaLR):
    """LambdaLR whose load_state_dict leaves the optimizer with the loaded step's learning rate."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group, base, factor in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            lr = base * factor(self.last_epoch)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = float(lr)


def _debug_batch(
    number: int, model: nn.Module, batch: Any, loss_fn: Callable[..., Tensor], optimizer: Optimizer
) -> DebugRecord:
    """One batch, up to its update or to the first thing that is bad."""
    (x_name, x), (y_name, y), extra = _parts(batch, number)
    seen = DebugRecord(number, tuple(x.shape), _dtype_name(x), _range(x), tuple(y.shape), _dtype_name(y), _range(y))
    for name, value in ((x_name, x), (y_name, y)):
        try:
            check_numerical_stability(value, name)
        except NumericalError as error:
            return replace(seen, problem=str(error), where=name)

    with _FirstBadOutput(model) as watch:
        accepts = inspect.signature(model.forward).parameters
        output = model(x, **{name: value for name, value in extra.items() if name in accepts})
    loss = loss_fn(output, y)
    for shown in itertools.islice(_tensors(output), 1):
        seen = replace(
            seen, output_shape=tuple(shown.shape), output_dtype=_dtype_name(shown), output_range=_range(shown)
        )
    seen = replace(seen, loss=_real_scalar("loss", loss.detach() if isinstance(loss, Tensor) else loss))
    try:
        validate_loss(loss)
    except NumericalError as error:
        finite = math.isfinite(cast(float, seen.loss))
        return replace(seen, problem=str(error), where="loss" if finite else _bad_parameter(model) or watch.found)

    problem = _broadcast_problem(
        output.detach() if isinstance(output, Tensor) else output, y, cast(float, seen.loss), loss_fn
    )
    if problem:
        return replace(seen, problem=problem, where="loss")

    optimizer.zero_grad()
    loss.backward()
    norms = _norms(_gradients(model))
    seen = replace(seen, grad_norm=_total(norms))
    try:
        check_gradient_explosion(model)
    except NumericalError as error:
        return replace(seen, problem=str(error), where=f"gradients: {_first_bad(norms)}")

    rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    changes = _norms([(name, p.detach() - before[name]) for name, p in model.named_parameters()])
    seen = replace(seen, param_norm=_total(_norms([*before.items()])), update_norm=_total(changes))
    if not math.isfinite(cast(float, seen.update_norm)):
        problem = "the optimizer's update is not finite and has been made; look at its lr, eps and state"
        return replace(seen, problem=problem, where=f"updates: {_first_bad(changes)}")
    if seen.update_norm == 0.0 and cast(float, seen.grad_norm) > 0.0 and any(rates):
        problem = (
            f"the update changed nothing, at a gradient norm of {seen.grad_norm:.6g} and lr={max(rates):g}: the "
            "optimizer does not hold this model's parameters? Make it from model.parameters() (or lr is too small for "
            "the parameters' dtype)"
        )
        return replace(seen, problem=problem, where="updates")
    return seen


class _FirstBadOutput:
    """While open: the first sub-module, in the order in which they finish, whose output holds NaN or Inf."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found = "loss"  # every output was good, so the loss function made it
        self._handles: list[Any] = []

    def __enter__(self) -> _FirstBadOutput:
        for name, module in self.model.named_modules():
            self._handles.append(module.register_forward_hook(partial(self._look, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _look(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.found == "loss" and not all(bool(torch.isfinite(t).all()) for t in _tensors(output)):
            self.found = f"output: {name}" if name else "output"


def _bad_parameter(model: nn.Module) -> str | None:
    for name, p in model.named_parameters():
        if not bool(torch.isfinite(p).all()):
            return f"parameters: {name}"
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _dtype_name(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _range(value: Tensor) -> tuple[float, float]:
    """(smallest, largest), both NaN as soon as one value is."""
    if not value.numel():
        return math.nan, math.nan
    value = value.detach()
    value = value.abs() if value.is_complex() else value.to(torch.uint8) if value.dtype is torch.bool else value
    return float(value.min()), float(value.max())


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


def _broadcast_problem(output: Any, y: Tensor, loss: float, loss_fn: Callable[..., Tensor]) -> str | None:
    """Why a loss over all pairs of `output` and `y` is none over the examples; None if it is not of that kind.

    Class indices have another shape by right, and so they are left alone; so is a loss that puts the shapes right
    itself. Over all pairs it does not matter, up to rounding, which target stands where, and the loss is another one
    than that of an output which has the target's shape.
    """
    if not isinstance(output, Tensor) or output.shape == y.shape or not y.is_floating_point():
        return None
    try:
        np.broadcast_shapes(tuple(output.shape), tuple(y.shape))
    except ValueError:
        return None
    if output.numel() == y.numel():
        try:
            reshaped, permuted = (
                _real_scalar("loss", loss_fn(*pair)) for pair in ((output.reshape(y.shape), y), (output, y.roll(1)))
            )
        except Exception:  # whatever a loss raises for another shape: it wants this one
            return None
        rounding = torch.finfo(y.dtype).eps * y.numel()
        if math.isclose(reshaped, loss, rel_tol=rounding) or not math.isclose(permuted, loss, rel_tol=rounding):
            return None
    return (
        f"the loss broadcasts {tuple(output.shape)} against {tuple(y.shape)}: every output meets every target; give "
        "both one shape, for example y[:, None] or pred.squeeze(-1)"
    )


def _show(pair: tuple[float, float]) -> str:
    return f"[{pair[0]:.6g}, {pair[1]:.6g}]"


def _parts(batch: Any, number: int) -> tuple[tuple[str, Tensor], tuple[str, Tensor], dict[str, Tensor]]:
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
    for name, value in (x, y):
        if not isinstance(value, Tensor) or not value.numel():
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"batch {number}: {name} must be a tensor with at least one value, got {what}")
    return x, y, extra


def _first_bad(norms: dict[str, float]) -> str:
    """The first that is no finite number, else the largest."""
    return next((name for name in norms if not math.isfinite(norms[name])), "") or max(norms, key=lambda n: norms[n])


def _check_max_batches(max_batches: int) -> None:
    if isinstance(max_batches, bool) or not isinstance(max_batches, int) or max_batches < 1:
        raise ValueError(f"max_batches must be an integer ≥ 1, got {max_batches!r}; pass for example max_batches=3")


def _real_scalar(name: str, value: Any) -> float:
    if isinstance(value, Tensor | np.ndarray):
        if value.ndim:
            raise ValueError(f"{name} must be a scalar, got shape {tuple(value.shape)}; take its mean or sum first")
        value = value.item()
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a real number or a scalar tensor, got {value!r} ({type(value).__name__})")
    return float(value)


def _gradients(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Name and gradient of every parameter that has one; a sparse gradient by its values."""
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    if not named:
        raise ValueError(
            f"no parameter of {type(model).__name__} has a gradient; call loss.backward() first, and look before "
            "optimizer.zero_grad()"
        )
    return [(name, g.coalesce().values() if g.is_sparse else g) for name, g in named]


def _norms(named: list[tuple[str, Tensor]]) -> dict[str, float]:
    """The norm of each gradient: its largest value times the norm of the quotients, which cannot overflow."""
    parts = []
    with torch.no_grad():
        for _, g in named:
            if not g.numel():
                parts += [torch.zeros(()), torch.zeros(())]
                continue
            wide = g.to(statistics_dtype(g.dtype))
            peak = torch.linalg.vector_norm(wide, ord=math.inf)
            unit = torch.where(torch.isfinite(peak) & (peak > 0), peak, torch.ones_like(peak))
            parts += [unit, torch.linalg.vector_norm(wide / unit)]
    # One transfer for all of them; the product is made in Python's float64, which holds it.
    flat = torch.stack([part.to("cpu", torch.float64) for part in parts]).tolist()
    return {name: unit * rest for (name, _), unit, rest in zip(named, flat[::2], flat[1::2], strict=True)}


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
