"""Gradients by each of torch's interfaces: autograd.grad, backward, jvp, vjp, per-example gradients, detach.

Every function here is pure, as its JAX twin is: it records on fresh leaves that share the inputs' storage, so that the
inputs' own `.grad`, `requires_grad`, hooks and graphs are left alone, and what it returns is detached. It records
whatever the caller switched off, under `torch.no_grad()` and `torch.inference_mode()` as well. The price: unlike JAX's,
these functions cannot be transformed again (`torch.func.grad` and `torch.func.vmap` of them are refused by torch).

Shapes: N examples; A, B any shapes. A tree is a tensor or a nested dict, list or tuple of tensors.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree  # what torch.func itself takes trees apart with; there is no public name for it
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "grad_with_autograd_grad",
    "grad_with_backward",
    "grad_wrt_multiple_inputs",
    "value_and_grad",
    "jvp",
    "vjp",
    "per_example_grads",
    "grad_with_stopped_target",
]

Tree = TypeVar("Tree")

_FLOATS = ("float16", "bfloat16", "float32", "float64")


def grad_with_autograd_grad(x: Float[Tensor, "*A"]) -> Float[Tensor, "*A"]:
    """Gradient of f(x) = Σ x² by torch.autograd.grad, which returns it and writes nothing.

        ∂f/∂x = 2x

    `x` need not require a gradient, and `x.grad` is never written. Any shape, also () and empty; the dtype is kept.

    Raises:
        ValueError: `x` is not a dense tensor of float16, bfloat16, float32 or float64.

    Source: torch.autograd.grad; Griewank & Walther, Evaluating Derivatives (2008), section 3.2 (the reverse mode).

    >>> grad_with_autograd_grad(torch.tensor([1.0, -2.0]))
    tensor([ 2., -4.])
    """
    _check_floating("x", x)
    with _recording():
        leaf = _leaf(x)
        (gradient,) = torch.autograd.grad(_sum_of_squares(leaf), leaf)
    return gradient


def grad_with_backward(x: Float[Tensor, "*A"]) -> Float[Tensor, "*A"]:
    """Gradient of f(x) = Σ x² by .backward(), which adds to the `.grad` of every leaf that it reaches.

        ∂f/∂x = 2x

    The leaf is a fresh one in each call: on `x` itself a second call would give 4x, because `.grad` accumulates.

    Raises:
        ValueError: `x` is not a dense tensor of float16, bfloat16, float32 or float64.

    Source: torch.Tensor.backward.

    >>> x = torch.tensor([1.0, -2.0], requires_grad=True)
    >>> grad_with_backward(x), grad_with_backward(x), x.grad
    (tensor([ 2., -4.]), tensor([ 2., -4.]), None)
    """
    _check_floating("x", x)
    with _recording():
        leaf = _leaf(x)
        _sum_of_squares(leaf).backward()
    return _gradient(leaf)


def grad_wrt_multiple_inputs(
    a: Float[Tensor, "*A"], b: Float[Tensor, "*B"]
) -> tuple[Float[Tensor, "*A"], Float[Tensor, "*B"]]:
    """Gradients of f(a, b) = Σ (a² + ab) with respect to both, by torch.autograd.grad.

        ∂f/∂a = 2a + b        ∂f/∂b = a

    Both are partial derivatives: the same tensor may be passed twice. Shapes that differ are broadcast, and the sum
    runs over the broadcast shape; a gradient has its own input's shape, summed over what was broadcast.

    Raises:
        ValueError: `a` or `b` is not a dense floating tensor, their dtypes or devices differ, or their shapes cannot
            be broadcast.

    Source: torch.autograd.grad.

    >>> grad_wrt_multiple_inputs(torch.tensor([1.0, -2.0]), torch.tensor([10.0, 20.0]))
    (tensor([12., 16.]), tensor([ 1., -2.]))
    """
    _check_floating("a", a)
    _check_floating("b", b)
    for what in ("dtype", "device"):
        ours, theirs = getattr(a, what), getattr(b, what)
        if ours != theirs:
            raise ValueError(f"b must have the {what} of a, {ours}, got {theirs}; convert it with b.to(a.{what})")
    with _recording():
        a_leaf, b_leaf = _leaf(a), _leaf(b)
        try:
            a_wide, b_wide = torch.broadcast_tensors(a_leaf, b_leaf)
        except RuntimeError:
            raise ValueError(
                f"a and b must have shapes that broadcast, got {tuple(a.shape)} and {tuple(b.shape)}; make each pair "
                "of axes, counted from the last, equal or 1"
            ) from None
        grad_a, grad_b = torch.autograd.grad((a_wide * a_wide + a_wide * b_wide).sum(), (a_leaf, b_leaf))
    return grad_a, grad_b


def value_and_grad(f: Callable[..., Tensor], *inputs: Any) -> tuple[Float[Tensor, ""], tuple[Any, ...]]:
    """(f(*inputs), the gradients with respect to every input): one forward and one backward pass.

    Each input is a floating tensor or a tree of them, and its gradient has its structure, shapes and dtypes. An input
    that f does not use has gradient zero, and so has everything that f detaches. Value and gradients are detached.

    Raises:
        ValueError: no inputs; an input that is not floating (close over it: `lambda p: f(p, tokens)`); f does not
            return a floating tensor of shape ().

    Source: torch.autograd.backward; jax.value_and_grad is the twin.

    >>> value_and_grad(lambda x, y: (x * x * y).sum(), torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    (tensor(19.), (tensor([ 6., 16.]), tensor([1., 4.])))
    """
    if not inputs:
        raise ValueError("inputs: none given; pass at least one floating tensor after f")
    for i, tree in enumerate(inputs):
        _check_tree(f"inputs[{i}]", tree)
    with _recording():
        leaves = _leaves(inputs)
        value = f(*leaves)
        _check_scalar("f", value)
        if value.requires_grad:  # else nothing of it depends on the inputs: zeros, as in JAX
            torch.autograd.backward(value, inputs=pytree.tree_leaves(leaves))
    return value.detach(), pytree.tree_map(_gradient, leaves)


def jvp(f: Callable[[Any], Any], x: Any, v: Any) -> tuple[Any, Any]:
    """(f(x), J·v): the derivative of f at x in the direction v, by forward mode; J is the Jacobian ∂f/∂x.

    `v` has the structure, shapes and dtypes of `x`, the derivative those of f(x). Cost: about that of f, however many
    elements x has; one call gives one column of J when v is a unit vector.

    Raises:
        ValueError: `x`, `v` or f(x) holds something that is not a floating tensor; `v` does not look like `x`.

    Source: torch.func.jvp; Griewank & Walther, Evaluating Derivatives (2008), section 3.1 (the forward mode).

    >>> jvp(lambda x: x * x, torch.tensor([1.0, 3.0]), torch.tensor([1.0, 0.0]))
    (tensor([1., 9.]), tensor([2., 0.]))
    """
    _check_tree("x", x)
    _check_like("v", v, "x", x)

    def checked(primal: Any) -> Any:
        value = f(primal)
        _check_tree("f(x)", value)
        return value

    # Without no_grad the results would hang on graphs of what f closes over; forward mode does not need them.
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        # torch's own, when it loads its forward-mode formulas.
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        result = torch.func.jvp(checked, (pytree.tree_map(_plain, x),), (pytree.tree_map(_plain, v),))
    return pytree.tree_map(Tensor.detach, result[0]), pytree.tree_map(Tensor.detach, result[1])


def vjp(f: Callable[[Any], Any], x: Any, v: Any) -> tuple[Any, Any]:
    """(f(x), vᵀ·J): v pulled back through f at x, by reverse mode; J is the Jacobian ∂f/∂x.

    `v` has the structure, shapes and dtypes of f(x), what is returned those of `x`. Cost: a few times that of f,
    however many elements x has; one call gives one row of J when v is a unit vector, and the gradient when f is a
    scalar and v is 1.

    Raises:
        ValueError: `x`, `v` or f(x) holds something that is not a floating tensor; `v` does not look like f(x).

    Source: torch.func.vjp, which gives the same but imports torch's compiler; jax.vjp is the twin.

    >>> vjp(lambda x: x * x, torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0]))
    (tensor([1., 9.]), tensor([0., 6.]))
    """
    _check_tree("x", x)
    with _recording():
        leaves = _leaves(x)
        value = f(leaves)
        _check_tree("f(x)", value)
        _check_like("v", v, "f(x)", value)
        # v enters as a factor, ∂Σ(out·v)/∂out = v to the bit: as backward's own argument it costs half a second, once,
        # for what torch imports to compare shapes.
        pulled = [
            (output * _plain(weight)).sum()
            for output, weight in zip(pytree.tree_leaves(value), pytree.tree_leaves(v), strict=True)
            if output.requires_grad  # the others do not depend on x
        ]
        if pulled:
            torch.autograd.backward(pulled, inputs=pytree.tree_leaves(leaves))
    return pytree.tree_map(Tensor.detach, value), pytree.tree_map(_gradient, leaves)


def per_example_grads(loss_fn: Callable[[Any, Tensor, Tensor], Tensor], params: Tree, x: Tensor, y: Tensor) -> Tree:
    """The gradient of loss_fn(params, x[i], y[i]) with respect to `params`, for every example i at once.

        g[i] = ∂ loss_fn(params, x[i], y[i]) / ∂params        their mean is the gradient of the mean loss

    x: (N, ...), y: (N, ...), of any dtypes; `params` a tree of floating tensors, often dict(model.named_parameters())
    used with torch.func.functional_call. The result has its structure, each leaf with N in front. `loss_fn` sees one
    example without its N axis and returns a floating tensor of shape (). torch refuses two things inside vmap: random
    numbers (switch dropout off with model.eval()), and looking at values, as a ThinkerLM does at token ids (hand it
    embeddings=params["tok_emb.weight"][x_i][None] instead).

    Every example gets the parameters as rows of its own (expanded, not copied), and the sum of all losses is pulled
    back to those rows. torch.func.vmap(torch.func.grad(loss_fn), in_dims=(None, 0, 0)) gives the same in the same
    time, but its first use imports torch's compiler, which takes seconds.

    Raises:
        ValueError: `params` holds something that is not a floating tensor, or nothing; `x` and `y` have no leading
            axis, unequal N, or N = 0; loss_fn does not return a floating tensor of shape ().

    Source: torch.func.vmap; Goodfellow, Efficient Per-Example Gradient Computations, arXiv 1510.01799, for what they
    are good for.

    >>> loss = lambda params, x, y: (params["w"] * x - y) ** 2
    >>> per_example_grads(loss, {"w": torch.tensor(2.0)}, torch.tensor([1.0, 3.0]), torch.tensor([0.0, 5.0]))
    {'w': tensor([4., 6.])}
    """
    _check_tree("params", params)
    N = _check_examples(x, y)

    def checked(rows: Any, x_i: Tensor, y_i: Tensor) -> Tensor:
        value = loss_fn(rows, x_i, y_i)
        _check_scalar("loss_fn", value)
        return value

    with _recording():
        rows = pytree.tree_map(lambda p: _plain(p).expand(N, *p.shape).requires_grad_(True), params)
        losses_N = torch.func.vmap(checked)(rows, _plain(x), _plain(y))
        if losses_N.requires_grad:
            torch.autograd.backward(losses_N.sum(), inputs=pytree.tree_leaves(rows))
    return pytree.tree_map(_gradient, rows)


def grad_with_stopped_target(x: Float[Tensor, "*A"]) -> Float[Tensor, "*A"]:
    """Gradient of f(x) = Σ (x − stop(x²))², the target x² taken as a constant by detach().

        ∂f/∂x = 2(x − x²)            with detach: nothing flows through the target
              ≠ 2(x − x²)(1 − 2x)    without it

    `x.detach()` shares data with x but hangs on no graph; jax.lax.stop_gradient is the twin.

    Raises:
        ValueError: `x` is not a dense tensor of float16, bfloat16, float32 or float64.

    Source: torch.Tensor.detach; Mnih et al., Human-level control through deep reinforcement learning, Nature 518
    (2015) 529, for targets that must not learn.

    >>> grad_with_stopped_target(torch.tensor([3.0, 0.5]))
    tensor([-12.0000,   0.5000])
    """
    _check_floating("x", x)
    with _recording():
        leaf = _leaf(x)
        target = (leaf * leaf).detach()
        (gradient,) = torch.autograd.grad(_sum_of_squares(leaf - target), leaf)
    return gradient


def _sum_of_squares(x: Tensor) -> Tensor:
    return (x * x).sum()


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Record a graph here, whatever the caller switched off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _plain(x: Tensor) -> Tensor:
    """The same values outside every graph. A tensor made in inference mode cannot be recorded: that one is copied."""
    return x.detach().clone() if x.is_inference() else x.detach()


def _leaf(x: Tensor) -> Tensor:
    return _plain(x).requires_grad_(True)


def _leaves(tree: Tree) -> Tree:
    return pytree.tree_map(_leaf, tree)


def _gradient(leaf: Tensor) -> Tensor:
    """What backward left there, in memory of its own; zeros where it never came."""
    return torch.zeros_like(leaf, requires_grad=False) if leaf.grad is None else leaf.grad


def _check_floating(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(x).__name__}; convert it with torch.as_tensor")
    if str(x.dtype).removeprefix("torch.") not in _FLOATS:
        raise ValueError(
            f"{name} must have a dtype that gradients exist for ({', '.join(_FLOATS)}), got {x.dtype}; convert it "
            "with .to(torch.float32), or keep it out of what is differentiated"
        )
    if x.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {x.layout}; call .to_dense() first")


def _check_tree(name: str, tree: Any) -> None:
    leaves = pytree.tree_flatten_with_path(tree)[0]
    if not leaves:
        raise ValueError(f"{name} holds no tensors; pass a tensor, or a dict, list or tuple that holds some")
    for path, leaf in leaves:
        _check_floating(name + pytree.keystr(path), leaf)


def _check_like(name: str, tree: Any, other_name: str, other: Any) -> None:
    _check_tree(name, tree)
    ours, theirs = pytree.tree_structure(tree), pytree.tree_structure(other)
    if ours != theirs:
        raise ValueError(
            f"{name} must be nested as {other_name} is, {theirs}, got {ours}; give it the same keys and lengths"
        )
    pairs = zip(pytree.tree_flatten_with_path(tree)[0], pytree.tree_leaves(other), strict=True)
    for (path, leaf), wanted in pairs:
        where = pytree.keystr(path)
        for what in ("shape", "dtype"):
            mine, his = getattr(leaf, what), getattr(wanted, what)
            if mine != his:
                raise ValueError(
                    f"{name}{where} must have the {what} of {other_name}{where}, {_say(his)}, got {_say(mine)}; make "
                    f"it with torch.zeros_like or torch.ones_like of {other_name}"
                )


def _check_scalar(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name} must return a tensor of shape (), got {type(value).__name__}; return the loss itself, not "
            ".item() of it"
        )
    if tuple(value.shape) != ():
        raise ValueError(
            f"{name} must return a tensor of shape (), got shape {tuple(value.shape)}; reduce it with .sum() or .mean()"
        )
    _check_floating(f"the value of {name}", value)


def _check_examples(x: Any, y: Any) -> int:
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor) or value.ndim == 0:
            found = "shape ()" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} must be a tensor with the examples along its first axis, got {found}; stack them")
    if x.shape[0] != y.shape[0] or x.shape[0] == 0:
        raise ValueError(
            f"x and y must hold the same number of examples, at least 1, got {x.shape[0]} and {y.shape[0]}; pass one "
            "target per example"
        )
    return x.shape[0]


def _say(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)
