"""Gradients by each of JAX's interfaces: grad, vjp, argnums, value_and_grad, jvp, vmap of grad, stop_gradient.

A gradient is the value of a function that `jax.grad` makes; there is nothing to reset, detach or switch off. Everything
here can be jitted, mapped and differentiated again. numpy arrays are taken as well (float64 ones become float32 unless
x64 is on, as everywhere in JAX).

Shapes: N examples; A, B any shapes. A tree is an array or a nested dict, list or tuple of arrays (any pytree).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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


def grad_with_autograd_grad(x: Float[Array, "*A"]) -> Float[Array, "*A"]:
    """Gradient of f(x) = Σ x² by jax.grad, which turns f into the function of its gradient.

        ∂f/∂x = 2x

    The name is the twin's: torch.autograd.grad is the interface that returns gradients and writes nothing, which is
    all that JAX ever does. Any shape, also () and empty; the dtype is kept.

    Raises:
        ValueError: `x` is not an array of float16, bfloat16, float32 or float64.

    Source: jax.grad; Griewank & Walther, Evaluating Derivatives (2008), section 3.2 (the reverse mode).

    >>> grad_with_autograd_grad(jnp.array([1.0, -2.0]))
    Array([ 2., -4.], dtype=float32)
    """
    _check_floating("x", x)
    return jax.grad(_sum_of_squares)(jnp.asarray(x))


def grad_with_backward(x: Float[Array, "*A"]) -> Float[Array, "*A"]:
    """Gradient of f(x) = Σ x² by jax.vjp: the forward pass, and the backward pass as a function to be called.

        ∂f/∂x = 2x

    The pullback is what torch calls backward; it returns the gradient instead of adding it to x.grad, so that calling
    it twice gives the same twice, and not 4x.

    Raises:
        ValueError: `x` is not an array of float16, bfloat16, float32 or float64.

    Source: jax.vjp.

    >>> x = jnp.array([1.0, -2.0])
    >>> grad_with_backward(x), grad_with_backward(x)
    (Array([ 2., -4.], dtype=float32), Array([ 2., -4.], dtype=float32))
    """
    _check_floating("x", x)
    value, backward = jax.vjp(_sum_of_squares, jnp.asarray(x))
    (gradient,) = backward(jnp.ones_like(value))
    return gradient


def grad_wrt_multiple_inputs(
    a: Float[Array, "*A"], b: Float[Array, "*B"]
) -> tuple[Float[Array, "*A"], Float[Array, "*B"]]:
    """Gradients of f(a, b) = Σ (a² + ab) with respect to both, by jax.grad with argnums.

        ∂f/∂a = 2a + b        ∂f/∂b = a

    Both are partial derivatives: the same array may be passed twice. Shapes that differ are broadcast, and the sum
    runs over the broadcast shape; a gradient has its own input's shape, summed over what was broadcast.

    Raises:
        ValueError: `a` or `b` is not a floating array, their dtypes differ, or their shapes cannot be broadcast.

    Source: jax.grad, argument argnums.

    >>> grad_wrt_multiple_inputs(jnp.array([1.0, -2.0]), jnp.array([10.0, 20.0]))
    (Array([12., 16.], dtype=float32), Array([ 1., -2.], dtype=float32))
    """
    _check_floating("a", a)
    _check_floating("b", b)
    if a.dtype != b.dtype:
        raise ValueError(f"b must have the dtype of a, {a.dtype}, got {b.dtype}; convert it with b.astype(a.dtype)")
    try:
        shape = jnp.broadcast_shapes(a.shape, b.shape)
    except ValueError:
        raise ValueError(
            f"a and b must have shapes that broadcast, got {tuple(a.shape)} and {tuple(b.shape)}; make each pair of "
            "axes, counted from the last, equal or 1"
        ) from None

    def f(a: Array, b: Array) -> Array:
        # Broadcast in words: JAX can be told to refuse ranks that differ.
        a_wide, b_wide = jnp.broadcast_to(a, shape), jnp.broadcast_to(b, shape)
        return jnp.sum(a_wide * a_wide + a_wide * b_wide)

    return jax.grad(f, argnums=(0, 1))(jnp.asarray(a), jnp.asarray(b))


def value_and_grad(f: Callable[..., Array], *inputs: Any) -> tuple[Float[Array, ""], tuple[Any, ...]]:
    """(f(*inputs), the gradients with respect to every input): one forward and one backward pass.

    Each input is a floating array or a tree of them, and its gradient has its structure, shapes and dtypes. An input
    that f does not use has gradient zero, and so has everything behind jax.lax.stop_gradient.

    Raises:
        ValueError: no inputs; an input that is not floating (close over it: `lambda p: f(p, tokens)`); f does not
            return a floating array of shape ().

    Source: jax.value_and_grad, which takes argnums where this takes all.

    >>> value_and_grad(lambda x: jnp.sum(x * x), jnp.array([1.0, 2.0]))
    (Array(5., dtype=float32), (Array([2., 4.], dtype=float32),))
    """
    if not inputs:
        raise ValueError("inputs: none given; pass at least one floating array after f")
    for i, tree in enumerate(inputs):
        _check_tree(f"inputs[{i}]", tree)

    def checked(*arguments: Any) -> Array:
        value = f(*arguments)
        _check_scalar("f", value)
        return value

    return jax.value_and_grad(checked, argnums=tuple(range(len(inputs))))(*jax.tree.map(jnp.asarray, inputs))


def jvp(f: Callable[[Any], Any], x: Any, v: Any) -> tuple[Any, Any]:
    """(f(x), J·v): the derivative of f at x in the direction v, by forward mode; J is the Jacobian ∂f/∂x.

    `v` has the structure, shapes and dtypes of `x`, the derivative those of f(x). Cost: about that of f, however many
    elements x has; one call gives one column of J when v is a unit vector.

    Raises:
        ValueError: `x`, `v` or f(x) holds something that is not a floating array; `v` does not look like `x`.

    Source: jax.jvp; Griewank & Walther, Evaluating Derivatives (2008), section 3.1 (the forward mode).

    >>> jvp(lambda x: x * x, jnp.array([1.0, 3.0]), jnp.array([1.0, 0.0]))
    (Array([1., 9.], dtype=float32), Array([2., 0.], dtype=float32))
    """
    _check_tree("x", x)
    _check_like("v", v, "x", x)

    def checked(primal: Any) -> Any:
        value = f(primal)
        _check_tree("f(x)", value)
        return value

    return jax.jvp(checked, (jax.tree.map(jnp.asarray, x),), (jax.tree.map(jnp.asarray, v),))


def vjp(f: Callable[[Any], Any], x: Any, v: Any) -> tuple[Any, Any]:
    """(f(x), vᵀ·J): v pulled back through f at x, by reverse mode; J is the Jacobian ∂f/∂x.

    `v` has the structure, shapes and dtypes of f(x), what is returned those of `x`. Cost: a few times that of f,
    however many elements x has; one call gives one row of J when v is a unit vector, and the gradient when f is a
    scalar and v is 1.

    Raises:
        ValueError: `x`, `v` or f(x) holds something that is not a floating array; `v` does not look like f(x).

    Source: jax.vjp.

    >>> vjp(lambda x: x * x, jnp.array([1.0, 3.0]), jnp.array([0.0, 1.0]))
    (Array([1., 9.], dtype=float32), Array([0., 6.], dtype=float32))
    """
    _check_tree("x", x)
    value, backward = jax.vjp(f, jax.tree.map(jnp.asarray, x))
    _check_tree("f(x)", value)
    _check_like("v", v, "f(x)", value)
    (pulled,) = backward(jax.tree.map(jnp.asarray, v))
    return value, pulled


def per_example_grads(loss_fn: Callable[[Any, Array, Array], Array], params: Tree, x: Array, y: Array) -> Tree:
    """The gradient of loss_fn(params, x[i], y[i]) with respect to `params`, for every example i at once.

        g[i] = ∂ loss_fn(params, x[i], y[i]) / ∂params        their mean is the gradient of the mean loss

    x: (N, ...), y: (N, ...), of any dtypes; `params` a tree of floating arrays, often from nnx.split(model, nnx.Param)
    used with nnx.merge. The result has its structure, each leaf with N in front. `loss_fn` sees one example without
    its N axis and returns a floating array of shape (). A random key that it closes over is the same for every
    example (switch dropout off with model.eval()).

    Raises:
        ValueError: `params` holds something that is not a floating array, or nothing; `x` and `y` have no leading
            axis, unequal N, or N = 0; loss_fn does not return a floating array of shape ().

    Source: jax.vmap of jax.grad; Goodfellow, Efficient Per-Example Gradient Computations, arXiv 1510.01799, for what
    they are good for.

    >>> loss = lambda params, x, y: (params["w"] * x - y) ** 2
    >>> per_example_grads(loss, {"w": jnp.float32(2.0)}, jnp.array([1.0, 3.0]), jnp.array([0.0, 5.0]))
    {'w': Array([4., 6.], dtype=float32)}
    """
    _check_tree("params", params)
    _check_examples(x, y)

    def checked(params: Any, x_i: Array, y_i: Array) -> Array:
        value = loss_fn(params, x_i, y_i)
        _check_scalar("loss_fn", value)
        return value

    params = jax.tree.map(jnp.asarray, params)
    return jax.vmap(jax.grad(checked), in_axes=(None, 0, 0))(params, jnp.asarray(x), jnp.asarray(y))


def grad_with_stopped_target(x: Float[Array, "*A"]) -> Float[Array, "*A"]:
    """Gradient of f(x) = Σ (x − stop(x²))², the target x² taken as a constant by jax.lax.stop_gradient.

        ∂f/∂x = 2(x − x²)            with stop_gradient: nothing flows through the target
              ≠ 2(x − x²)(1 − 2x)    without it

    stop_gradient is the identity whose derivative is zero; torch's x.detach() is the twin.

    Raises:
        ValueError: `x` is not an array of float16, bfloat16, float32 or float64.

    Source: jax.lax.stop_gradient; Mnih et al., Human-level control through deep reinforcement learning, Nature 518
    (2015) 529, for targets that must not learn.

    >>> grad_with_stopped_target(jnp.array([3.0, 0.5]))
    Array([-12. ,   0.5], dtype=float32)
    """
    _check_floating("x", x)

    def f(x: Array) -> Array:
        target = jax.lax.stop_gradient(x * x)
        return _sum_of_squares(x - target)

    return jax.grad(f)(jnp.asarray(x))


def _sum_of_squares(x: Array) -> Array:
    return jnp.sum(x * x)


def _check_floating(name: str, x: Any) -> None:
    if not (hasattr(x, "dtype") and hasattr(x, "shape")):
        raise ValueError(f"{name} must be an array, got {type(x).__name__}; convert it with jnp.asarray")
    if str(x.dtype) not in _FLOATS:
        raise ValueError(
            f"{name} must have a dtype that gradients exist for ({', '.join(_FLOATS)}), got {x.dtype}; convert it "
            "with .astype(jnp.float32), or keep it out of what is differentiated"
        )


def _check_tree(name: str, tree: Any) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise ValueError(f"{name} holds no arrays; pass an array, or a dict, list or tuple that holds some")
    for path, leaf in leaves:
        _check_floating(name + jax.tree_util.keystr(path), leaf)


def _check_like(name: str, tree: Any, other_name: str, other: Any) -> None:
    _check_tree(name, tree)
    ours, theirs = jax.tree.structure(tree), jax.tree.structure(other)
    if ours != theirs:
        raise ValueError(
            f"{name} must be nested as {other_name} is, {theirs}, got {ours}; give it the same keys and lengths"
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(other), strict=True)
    for (path, leaf), wanted in pairs:
        where = jax.tree_util.keystr(path)
        for what in ("shape", "dtype"):
            mine, his = getattr(leaf, what), getattr(wanted, what)
            if mine != his:
                raise ValueError(
                    f"{name}{where} must have the {what} of {other_name}{where}, {his}, got {mine}; make it with "
                    f"jnp.zeros_like or jnp.ones_like of {other_name}"
                )


def _check_scalar(name: str, value: Any) -> None:
    if not isinstance(value, jax.Array):
        raise ValueError(
            f"{name} must return an array of shape (), got {type(value).__name__}; return the loss itself, not a "
            "Python number made of it"
        )
    if value.shape != ():
        raise ValueError(
            f"{name} must return an array of shape (), got shape {value.shape}; reduce it with jnp.sum or jnp.mean"
        )
    _check_floating(f"the value of {name}", value)


def _check_examples(x: Any, y: Any) -> int:
    for name, value in (("x", x), ("y", y)):
        shape = getattr(value, "shape", None)
        if not shape:  # None, or ()
            found = type(value).__name__ if shape is None else "shape ()"
            raise ValueError(f"{name} must be an array with the examples along its first axis, got {found}; stack them")
    if x.shape[0] != y.shape[0] or x.shape[0] == 0:
        raise ValueError(
            f"x and y must hold the same number of examples, at least 1, got {x.shape[0]} and {y.shape[0]}; pass one "
            "target per example"
        )
    return x.shape[0]
