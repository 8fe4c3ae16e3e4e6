"""AdamW from scratch, also for optax; clipping by global norm; the warm-up + cosine schedule: pure, over pytrees.

Everything can be jitted, and params and state can be donated:

    step = jax.jit(adamw_step, static_argnames=("betas", "eps", "weight_decay"), donate_argnames=("params", "state"))

Arithmetic runs in promote_types(dtype, float32) and is rounded once into storage: float16 alone would turn eps = 1e-8
into zero, and the update of a zero gradient into 0/0. What depends on values (NaN in a gradient) cannot raise inside a
compiled program, only outside: there it shows in the norm that `clip_grad_norm` returns.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

if TYPE_CHECKING:
    import optax

__all__ = [
    "AdamWState",
    "init_adamw_state",
    "adamw_step",
    "global_norm",
    "clip_grad_norm",
    "decay_mask",
    "adamw",
    "warmup_cosine",
]

Tree = TypeVar("Tree")

# What torch.nn.utils.clip_grad_norm_ adds to the norm before it divides; optax.clip_by_global_norm adds nothing.
_CLIP_EPS = 1e-6


class AdamWState(NamedTuple):
    """AdamW's memory of a tree of parameters.

    m: first moments, v: second moments (both trees like the parameters'); t: number of updates made, int32 (a Python
    int does too).
    """

    m: Any
    v: Any
    t: Int[Array, ""]


def init_adamw_state(params: Any) -> AdamWState:
    """Zero moments like every leaf of `params` (of any shape, 0-d and empty too) and t = 0.

    Raises ValueError if a leaf is not of a real floating dtype.

    >>> state = init_adamw_state({"w": jnp.ones((2, 3))})
    >>> state.m["w"].shape, str(state.v["w"].dtype), int(state.t)
    ((2, 3), 'float32', 0)
    """
    _check_floating("params", params)
    # Two separate trees: donating one buffer twice is an error.
    return AdamWState(
        m=jax.tree.map(jnp.zeros_like, params),
        v=jax.tree.map(jnp.zeros_like, params),
        t=jnp.zeros((), jnp.int32),
    )


def adamw_step(
    params: Tree,
    grads: Tree,
    state: AdamWState,
    lr: ArrayLike,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[Tree, AdamWState]:
    """One AdamW update of a tree of parameters (a single array is a tree too): (new params, new state).

        t ← t + 1
        m ← β₁·m + (1 − β₁)·g          m̂ = m / (1 − β₁ᵗ)
        v ← β₂·v + (1 − β₂)·g²         v̂ = v / (1 − β₂ᵗ)
        p ← p − lr·(m̂ / (√v̂ + eps) + weight_decay·p)

    grads, state.m, state.v: trees like params, of leaves of any shape. The decay is decoupled: it never enters the
    moments. `lr` may be traced; betas, eps and weight_decay are Python numbers. A second moment too large for its
    dtype is held at the largest number.

    Raises ValueError for leaves that are not floating point; for trees, shapes or dtypes that differ between params,
    grads, m and v; for a t that is not an integer or negative; for betas outside [0, 1); for an lr, eps or weight_decay
    that is not one number, negative or not finite; for NaN or Inf in a gradient. What is traced has no values to look
    at: inside jax.jit NaN and Inf go through, into everything they touch; keep the old trees until the gradients' norm
    has been seen, or wrap `adamw` in optax.apply_if_finite.
    Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101, algorithm 2.

    >>> p = jnp.array([1.0, -2.0])
    >>> p, state = adamw_step(p, jnp.array([0.5, 4.0]), init_adamw_state(p), lr=0.1, weight_decay=0.0)
    >>> [round(float(x), 4) for x in p], int(state.t)  # the first step is the gradient's sign
    ([0.9, -2.1], 1)
    """
    _check_hyperparameters(lr, betas, eps, weight_decay)
    decays = [weight_decay] * len(jax.tree.leaves(params))
    return _update(params, grads, state, lr, betas, eps, decays, finite=True)


def _update(
    params: Tree,
    grads: Tree,
    state: AdamWState,
    lr: ArrayLike,
    betas: tuple[float, float],
    eps: ArrayLike,
    decays: Sequence[ArrayLike],
    finite: bool,
) -> tuple[Tree, AdamWState]:
    """`adamw_step` with one weight decay per leaf, on hyperparameters that have been checked.

    finite: whether NaN and Inf in the gradients are refused where they can be seen.
    """
    _check_floating("params", params)
    _check_state(state)
    for name, tree in (("grads", grads), ("state.m", state.m), ("state.v", state.v)):
        _check_like_params(name, tree, params)
    count = _check_count(state.t)
    if finite:
        _check_finite(grads)
    beta1, beta2 = betas
    t = count + 1
    # One correction per working dtype, shared by all leaves.
    wides = {_wide(p.dtype) for p in jax.tree.leaves(params)}
    corrections = {wide: (_bias_correction(beta1, t, wide), _bias_correction(beta2, t, wide)) for wide in wides}

    def update(p: Array, g: Array, m: Array, v: Array, weight_decay: ArrayLike) -> tuple[Array, Array, Array]:
        dtype, wide = p.dtype, _wide(p.dtype)
        correction1, correction2 = corrections[wide]
        p, g, m, v = p.astype(wide), g.astype(wide), m.astype(wide), v.astype(wide)
        m = _average(m, g, beta1)
        v = jnp.minimum(_average(v, g * g, beta2), float(jnp.finfo(dtype).max))  # an infinite v would never come back
        rate, tiny, decay = (jnp.asarray(x, wide) for x in (lr, eps, weight_decay))
        direction = (m / correction1) / (jnp.sqrt(v / correction2) + tiny) + decay * p
        p = p - rate * direction
        return p.astype(dtype), m.astype(dtype), v.astype(dtype)

    leaves, treedef = jax.tree.flatten(params)
    rest = (jax.tree.leaves(tree) for tree in (grads, state.m, state.v))
    updated = [update(*leaf) for leaf in zip(leaves, *rest, decays, strict=True)]
    new_p, new_m, new_v = (treedef.unflatten([row[i] for row in updated]) for i in range(3))
    return new_p, AdamWState(m=new_m, v=new_v, t=t)


def global_norm(grads: Any) -> Float[Array, ""]:
    """√Σ g² over all elements of all leaves, in the widest of their dtypes and float32; 0 for an empty tree.

    Raises ValueError for a leaf that is not floating point.

    >>> float(global_norm([jnp.array([3.0, 0.0]), jnp.array(4.0)]))
    5.0
    """
    _check_floating("grads", grads)
    leaves = jax.tree.leaves(grads)
    wide = reduce(_wider, (g.dtype for g in leaves), jnp.dtype(jnp.float32))
    return jnp.sqrt(sum((jnp.sum(jnp.square(g.astype(wide))) for g in leaves), start=jnp.zeros((), wide)))


def clip_grad_norm(grads: Tree, max_norm: float) -> tuple[Tree, Float[Array, ""]]:
    """(gradients scaled so that their global norm is at most `max_norm`, the norm before).

        g ← g · min(1, max_norm / (norm + 1e-6))

    torch's form: the 1e-6 stands beside the norm (optax.clip_by_global_norm has none). A NaN or Inf gradient makes NaN
    of what it touches and shows in the returned norm.

    Raises ValueError for a max_norm that is not a number above 0 and for a leaf that is not floating point.
    Source: Pascanu, Mikolov & Bengio, On the difficulty of training recurrent neural networks, arXiv 1211.5063,
    algorithm 1.
    """
    max_norm = _check_max_norm(max_norm)
    norm = global_norm(grads)
    scale = jnp.minimum(max_norm / (norm + _CLIP_EPS), 1.0)  # minimum hands NaN on

    def scaled(g: Array) -> Array:
        wide = _wide(g.dtype)
        return (g.astype(wide) * scale.astype(wide)).astype(g.dtype)

    return jax.tree.map(scaled, grads), norm


def decay_mask(params: Tree) -> Tree:
    """Which parameters weight decay is for, as a tree of bools like `params`: leaves of two or more dimensions.

    Matrices, convolutions and embeddings decay; norm scales and biases, which are pulled towards 0 for nothing, do
    not. Kernels have as many dimensions as torch's weights, so both twins decay the same parameters.

    Source: karpathy/nanoGPT, model.py, configure_optimizers.

    >>> decay_mask({"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)})
    {'bias': False, 'kernel': True}
    """
    return jax.tree.map(lambda p: jnp.ndim(p) >= 2, params)


def adamw(
    lr: ArrayLike | Callable[[Int[Array, ""]], ArrayLike],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    mask: Any = None,
) -> optax.GradientTransformation:
    """`adamw_step` as an optax transformation, to be chained: optax.chain(optax.clip_by_global_norm(1.0), adamw(3e-4)).

    lr: a number, or a schedule of the number of updates made before (0 at the first). mask: a tree of bools like the
    parameters, or a function from parameters to one (`decay_mask`); what is False does not decay; None decays all.
    The state is an `AdamWState`. NaN and Inf in a gradient go through, as in optax's own transformations (adamw_step
    refuses them): optax.apply_if_finite around it skips such an update. lr, eps and weight_decay may be traced, so that
    optax.inject_hyperparams(adamw)(lr=0.1) works; a mask that is a function needs static_args=("mask",) there, and all
    but lr stay Python numbers with static_args=("betas", "eps", "weight_decay", "mask"). Put it last in a chain: what
    it returns are finished updates, learning rate and all.

    optax wants updates u with p_new = p + u, so u = p_new − p. Where p and p_new are within a factor of two of each
    other (nearly always) that difference is exact, and optax.apply_updates gives adamw_step's p_new to the last bit.
    Elsewhere (a parameter near zero) u is rounded to half a unit in its own last place and p + u once more, so that the
    last bit of p_new may differ. adamw_step has no such rounding, because it hands on the parameters and no difference;
    use it (donated) where nothing else of optax is wanted.

    Raises ValueError as `adamw_step` does, but for NaN and Inf in a gradient; for an update without params; for a mask
    of another structure, or of other things than Python bools.
    Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101, algorithm 2.

    >>> import optax
    >>> p = jnp.array([1.0, -2.0])
    >>> optimizer = adamw(lambda count: 0.1 * warmup_cosine(count, 0, 6), weight_decay=0.0)
    >>> updates, state = optimizer.update(jnp.array([0.5, 4.0]), optimizer.init(p), p)
    >>> [round(float(x), 4) for x in optax.apply_updates(p, updates)], int(state.t)
    ([0.9, -2.1], 1)
    """
    import optax

    _check_hyperparameters(0.0 if callable(lr) else lr, betas, eps, weight_decay, traced=True)

    def decays(params: Any) -> list[ArrayLike]:
        tree = mask(params) if callable(mask) else mask
        if tree is None:
            return [weight_decay] * len(jax.tree.leaves(params))
        ours, theirs = jax.tree.structure(tree), jax.tree.structure(params)
        if ours != theirs:
            raise ValueError(
                f"mask must be a tree of bools with the structure of params, {theirs}, got {ours}; pass decay_mask"
            )
        flags = jax.tree_util.tree_leaves_with_path(tree)
        for path, flag in flags:
            if not isinstance(flag, (bool, np.bool_)):
                raise ValueError(
                    f"mask must be a tree of bools, Python's True and False, got {type(flag).__name__} at mask"
                    f"{jax.tree_util.keystr(path)}; convert it with bool(), or pass decay_mask (under "
                    'optax.inject_hyperparams with static_args=("mask",))'
                )
        return [weight_decay if flag else 0.0 for _, flag in flags]

    def init(params: Any) -> AdamWState:
        decays(params)
        return init_adamw_state(params)

    def update(updates: Any, state: AdamWState, params: Any = None) -> tuple[Any, AdamWState]:
        if params is None:
            raise ValueError("params must be given, got None; call update(grads, state, params)")
        _check_state(state)
        rate = lr(_check_count(state.t)) if callable(lr) else lr
        _check_hyperparameters(rate, betas, eps, weight_decay, traced=True)
        new, state = _update(params, updates, state, rate, betas, eps, decays(params), finite=False)
        return jax.tree.map(jnp.subtract, new, params), state

    # optax's TransformInitFn and TransformUpdateFn are protocols with **extra arguments in some versions.
    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def warmup_cosine(
    step: int | Int[ArrayLike, ""], warmup_steps: int, max_steps: int, min_ratio: float = 0.1
) -> Float[Array, ""]:
    """Factor on the learning rate at `step` (the number of updates made before): linear warm-up, then a half cosine.

        step < warmup_steps:   step / warmup_steps                        (so the very first factor is 0)
        after that:            min_ratio + (1 − min_ratio)·(1 + cos(π·progress)) / 2
                               progress = (step − warmup_steps) / (max_steps − warmup_steps), at most 1

    Exactly 1 at step = warmup_steps and exactly min_ratio from max_steps on. A scalar of JAX's default float dtype;
    `step` may be traced, the rest are Python numbers.

    Raises ValueError for a step that is not an integer scalar or (as a Python number) negative, for a negative
    warmup_steps, for max_steps ≤ warmup_steps, for min_ratio outside [0, 1].
    Source: Loshchilov & Hutter, SGDR, arXiv 1608.03983, equation 5 (one period, no restart), with a linear start.

    >>> [round(float(warmup_cosine(step, warmup_steps=2, max_steps=6)), 3) for step in range(8)]
    [0.0, 0.5, 1.0, 0.868, 0.55, 0.232, 0.1, 0.1]
    """
    _check_schedule(warmup_steps, max_steps, min_ratio)
    if not isinstance(step, jax.Array):
        step = _check_step(step)
    step = jnp.asarray(step)
    if not jnp.issubdtype(step.dtype, jnp.integer) or step.ndim:
        raise ValueError(
            f"step must be an integer scalar, got {step.dtype} of shape {step.shape}; pass the number of updates made "
            "so far"
        )
    dtype = jnp.result_type(float)  # float32, or float64 under x64
    warm = step.astype(dtype) / max(warmup_steps, 1)
    # (1 + cos π·progress) / 2 = sin²(π/2·left), where nothing cancels as the cosine nears its end. The difference is
    # taken in integers, where it is exact.
    left = jnp.clip(max_steps - step, 0, max_steps - warmup_steps).astype(dtype) / (max_steps - warmup_steps)
    share = jnp.square(jnp.sin(0.5 * math.pi * left))
    return jnp.where(step < warmup_steps, warm, share + (1.0 - share) * min_ratio)


def _average(mean: Array, x: Array, beta: float) -> Array:
    """β·mean + (1 − β)·x.

    Written as mean + (1 − β)·(x − mean) where β is large: float32's 0.999 and 0.001 do not add up to 1, and β·mean +
    (1 − β)·x drifts by 1.3e-5 of its value in the end.
    """
    return mean + (1.0 - beta) * (x - mean) if beta >= 0.5 else beta * mean + (1.0 - beta) * x


def _bias_correction(beta: float, t: Int[Array, ""], dtype: jnp.dtype) -> Float[Array, ""]:
    """1 − βᵗ to the last bits: as a difference it is 1.3e-5 off in float32 at t = 1. log β is taken on the host."""
    if beta == 0.0:
        return jnp.ones((), dtype)
    return -jnp.expm1(t.astype(dtype) * math.log(beta))


def _wide(dtype: Any) -> jnp.dtype:
    """promote_types(dtype, float32), which strict dtype promotion refuses to say for bfloat16."""
    return _wider(jnp.dtype(jnp.float32), dtype)


def _wider(a: jnp.dtype, b: Any) -> jnp.dtype:
    return jnp.dtype(b) if jnp.finfo(b).bits > jnp.finfo(a).bits else a


def _check_floating(name: str, tree: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        where = name + jax.tree_util.keystr(path)
        if not hasattr(leaf, "dtype"):
            raise ValueError(f"{where} must be an array, got {type(leaf).__name__}; convert it with jnp.asarray")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"{where} must have a real floating dtype (float32, float64, ...), got {leaf.dtype}; cast it with "
                ".astype(jnp.float32), or leave it out"
            )


def _check_like_params(name: str, tree: Any, params: Any) -> None:
    ours, theirs = jax.tree.structure(tree), jax.tree.structure(params)
    if ours != theirs:
        raise ValueError(
            f"{name} must have the tree structure of params, {theirs}, got {ours}; pass the gradients of params "
            "itself, and a state from init_adamw_state(params)"
        )
    _check_floating(name, tree)
    pairs = zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(params), strict=True)
    for (path, leaf), p in pairs:
        for what in ("shape", "dtype"):
            mine, wanted = getattr(leaf, what), getattr(p, what)
            if mine != wanted:
                where = jax.tree_util.keystr(path)
                raise ValueError(
                    f"{name}{where} must have the {what} of params{where}, {wanted}, got {mine}; pass the gradients "
                    "of params itself, and a state from init_adamw_state(params)"
                )


def _check_state(state: Any) -> None:
    if not isinstance(state, AdamWState):
        raise ValueError(
            f"state must be an AdamWState (m, v, t), got {type(state).__name__}; start from init_adamw_state(params)"
        )


def _check_count(t: Any) -> Int[Array, ""]:
    """The count as an array; a concrete one is looked at."""
    integer = isinstance(t, (int, np.generic, np.ndarray, jax.Array)) and not isinstance(t, bool)
    if integer and np.shape(t) == () and jnp.issubdtype(jnp.result_type(t), jnp.integer):
        if isinstance(t, Tracer):
            return t
        if 0 <= int(t) < jnp.iinfo(jnp.int32).max:
            return t if isinstance(t, jax.Array) else jnp.asarray(int(t), jnp.int32)
    raise ValueError(
        f"state.t must be an integer scalar ≥ 0 (the number of updates made), got {t!r}; start from "
        "init_adamw_state(params), where it is 0"
    )


def _check_finite(grads: Any) -> None:
    """Refuse NaN and Inf where there are values to look at, outside a trace; they are fetched together."""
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    concrete = [(path, g) for path, g in leaves if not isinstance(g, Tracer)]
    with jax.ensure_compile_time_eval():  # a gradient may be a constant of somebody's traced program
        counts = jax.device_get([jnp.sum(~jnp.isfinite(g)) for _, g in concrete])
    bad = {jax.tree_util.keystr(path): int(n) for (path, _), n in zip(concrete, counts, strict=True)}
    for where, count in bad.items():
        if count:
            raise ValueError(
                f"grads{where} holds NaN or Inf in {count} entries, all must be finite; skip this update (nothing was "
                "changed)"
            )


def _number(value: Any) -> float | None:
    """A concrete real number, or a 0-d array of one, as a float."""
    if isinstance(value, (jax.Array, np.ndarray)):
        real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
        return float(np.asarray(value)) if real and not value.ndim else None
    if not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _check_hyperparameters(
    lr: ArrayLike, betas: Sequence[float], eps: ArrayLike, weight_decay: ArrayLike, traced: bool = False
) -> None:
    """traced: whether eps and weight_decay may be, as lr always may."""
    if any(isinstance(x, Tracer) for x in (*(() if traced else (eps, weight_decay)), *jax.tree.leaves(betas))):
        raise ValueError(
            "betas, eps and weight_decay must be Python numbers, got traced ones; pass "
            'static_argnames=("betas", "eps", "weight_decay") to jax.jit, or to optax.inject_hyperparams '
            'static_args=("betas", "eps", "weight_decay")'
        )
    pair = [_number(beta) for beta in betas] if isinstance(betas, Sequence) else []
    if len(pair) != 2 or not all(beta is not None and 0.0 <= beta < 1.0 for beta in pair):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}; pass for example betas=(0.9, 0.999)")
    for name, value, example in (("lr", lr, "1e-3"), ("eps", eps, "1e-8"), ("weight_decay", weight_decay, "0.01")):
        shape = getattr(value, "shape", ())
        if len(shape):
            raise ValueError(f"{name} must be a scalar, got shape {shape}; pass one number for all of params")
        if isinstance(value, Tracer):
            continue
        number = _number(value)
        if number is None or not (math.isfinite(number) and number >= 0.0):
            what = "a number, finite and ≥ 0" if number is None else "finite and ≥ 0"
            raise ValueError(f"{name} must be {what}, got {value!r}; pass for example {name}={example}")


def _check_max_norm(max_norm: float) -> float:
    number = None if isinstance(max_norm, Tracer) else _number(max_norm)
    if number is None or not number > 0.0:  # NaN fails too
        raise ValueError(
            f"max_norm must be > 0 (inf only measures the norm), got {max_norm!r}; pass for example max_norm=1.0"
        )
    return number


def _check_schedule(warmup_steps: int, max_steps: int, min_ratio: float) -> None:
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must be ≥ 0, got {warmup_steps}; pass warmup_steps=0 for no warm-up")
    if max_steps <= warmup_steps:
        raise ValueError(
            f"max_steps must be above warmup_steps ({warmup_steps}), got {max_steps}; raise it, or lower warmup_steps"
        )
    if not 0.0 <= min_ratio <= 1.0:
        raise ValueError(
            f"min_ratio must be in [0, 1], got {min_ratio!r}; pass the last factor itself, for example min_ratio=0.1"
        )


def _check_step(step: Any) -> int:
    try:
        step = operator.index(step)
    except TypeError:
        raise ValueError(
            f"step must be an integer scalar, got {step!r}; pass the number of updates made so far"
        ) from None
    if step < 0:
        raise ValueError(f"step counts the updates made so far and must be ≥ 0, got {step}; start from step=0")
    return step
