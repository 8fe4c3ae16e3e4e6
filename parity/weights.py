"""Names and layouts: which JAX leaf is which torch tensor, and how to move values between them without changing a bit.

A JAX leaf and a torch key share one dotted path, up to the rules below. Binding is fail-closed: everything that has no
partner, two partners or another shape is listed at once, and nothing is bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity.errors import Misuse

__all__ = ["RULES", "Link", "bind", "leaf_names", "to_jax", "to_torch", "under_torch_names"]

RULES: dict[str, str] = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
"""Last part of a JAX name -> last part of the torch name. Everything else keeps its name."""

FUSED = "in_proj"
"""torch's fused attention owns the parameters of this projection itself: in_proj.kernel is its in_proj_weight."""

CONVOLUTION = {3: (2, 1, 0), 4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0)}
"""torch (out, in, *window) -> JAX (*window, in, out), by rank."""


@dataclass(frozen=True)
class Link:
    """One parameter on both sides; `axes` permutes the torch array into the JAX layout."""

    jax: str
    torch: str
    axes: tuple[int, ...] | None = None

    def to_jax(self, array: np.ndarray) -> np.ndarray:
        return array if self.axes is None else array.transpose(self.axes)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        return array if self.axes is None else array.transpose(tuple(np.argsort(self.axes).tolist()))


def leaf_names(tree: Any) -> list[str]:
    """Dotted names of a pytree's leaves in jax.tree order; NNX's variable wrappers leave no trace in them."""
    import jax

    names = []
    for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = [str(next(getattr(k, a) for a in ("key", "idx", "name") if hasattr(k, a))) for k in path]
        # A variable shows its array as an attribute; a parameter that is itself called so is a key before it.
        if path and hasattr(path[-1], "name") and parts[-1] in ("value", "raw_value", "get_value"):
            parts.pop()
        names.append(".".join(parts))
    return names


def _torch_name(jax_name: str, rules: Mapping[str, str]) -> str:
    head, dot, last = jax_name.rpartition(".")
    if head.rpartition(".")[2] == FUSED:
        dot = "_"
    return head + dot + rules.get(last, last)


def _axes(jax_name: str, rank: int) -> tuple[int, ...] | None:
    """Only `kernel` changes its layout: Dense (in, out) and convolutions (*window, in, out)."""
    if jax_name.rpartition(".")[2] != "kernel" or rank < 2:
        return None
    return (1, 0) if rank == 2 else CONVOLUTION.get(rank)


def bind(
    jax_shapes: Mapping[str, Sequence[int]],
    torch_shapes: Mapping[str, Sequence[int]],
    *,
    rename: Mapping[str, str] | None = None,
    axes: Mapping[str, tuple[int, ...]] | None = None,
    rules: Mapping[str, str] = RULES,
) -> list[Link]:
    """Links for every parameter of both sides, in the order of `jax_shapes`.

    `rename` maps JAX names to torch names where the rules do not, `axes` gives the permutation torch -> JAX of a JAX
    name. Raises `Misuse` that lists every parameter without a partner, with two, or with another shape.
    """
    rename, axes = dict(rename or {}), dict(axes or {})
    problems = [f"rename: {name!r} is not a JAX parameter" for name in rename if name not in jax_shapes]
    problems += [f"axes: {name!r} is not a JAX parameter" for name in axes if name not in jax_shapes]
    links, taken = [], {}
    for name, shape in jax_shapes.items():
        partner = rename.get(name, _torch_name(name, rules))
        if partner not in torch_shapes:
            problems.append(f"{name} {tuple(shape)}: no torch parameter {partner!r}")
            continue
        if partner in taken:
            problems.append(f"{name}: torch parameter {partner!r} is already the partner of {taken[partner]}")
            continue
        taken[partner] = name
        link = Link(name, partner, axes.get(name, _axes(name, len(shape))))
        there = tuple(torch_shapes[partner])
        if name in axes and sorted(axes[name]) != list(range(len(there))):
            problems.append(f"axes: {axes[name]} of {name} is no permutation of the {len(there)} axes of {partner}")
            continue
        if link.axes is None and name.rpartition(".")[2] == "kernel" and len(shape) > max(CONVOLUTION):
            problems.append(f"{name} {tuple(shape)}: no layout is known for a kernel of {len(shape)} axes; pass axes=")
            continue
        seen = tuple(there[a] for a in link.axes) if link.axes is not None and len(link.axes) == len(there) else there
        if seen != tuple(shape):
            problems.append(f"{name} {tuple(shape)}: torch {partner} is {there}, as JAX would lay it out {seen}")
        links.append(link)
    problems += [f"torch {name} {tuple(s)}: no JAX parameter" for name, s in torch_shapes.items() if name not in taken]
    if problems:
        raise Misuse("weights do not bind:\n  " + "\n  ".join(problems) + "\npass rename= or axes= for other layouts")
    return links


def to_jax(links: Sequence[Link], weights: Mapping[str, np.ndarray], template: Any) -> Any:
    """A pytree like `template` whose leaves are the torch-named `weights`, as numpy arrays in the JAX layout.

    Raises `Misuse` that lists every leaf without a link, every value that is missing, left over or of another shape.
    """
    import jax

    by_name = {link.jax: link for link in links}
    names, shapes = leaf_names(template), [tuple(np.shape(x)) for x in jax.tree.leaves(template)]
    problems = _unlinked(names, by_name)
    known = {link.torch for link in links}
    problems += [f"{name}: a value for no parameter" for name in weights if name not in known]
    leaves = []
    for name, shape in zip(names, shapes):
        link = by_name.get(name)
        if link is None:
            continue
        if link.torch not in weights:
            problems.append(f"{link.torch}: no value for {name}")
            continue
        array = weights[link.torch]
        leaf = link.to_jax(array) if link.axes is None or len(link.axes) == np.ndim(array) else np.asarray(array)
        if leaf.shape != shape:
            problems.append(f"{link.torch}: a value of shape {np.shape(array)} does not become {name} {shape}")
        leaves.append(leaf)
    if problems:
        raise Misuse("weights do not fit what was bound:\n  " + "\n  ".join(problems))
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def to_torch(links: Sequence[Link], tree: Any) -> dict[str, np.ndarray]:
    """`under_torch_names` as numpy arrays."""
    return {name: np.asarray(leaf) for name, leaf in under_torch_names(links, tree).items()}


def under_torch_names(links: Sequence[Link], tree: Any) -> dict[str, Any]:
    """The leaves of a JAX pytree, traced ones too, under their torch names and in torch's layout.

    Raises `Misuse` for a leaf without a link.
    """
    import jax

    by_name = {link.jax: link for link in links}
    names = leaf_names(tree)
    problems = _unlinked(names, by_name)
    if problems:
        raise Misuse("weights do not fit what was bound:\n  " + "\n  ".join(problems))
    return {by_name[n].torch: by_name[n].to_torch(leaf) for n, leaf in zip(names, jax.tree.leaves(tree))}


def _unlinked(names: Sequence[str], links: Mapping[str, Link]) -> list[str]:
    return [f"{name}: not bound to any torch parameter" for name in names if name not in links] + [
        f"{name}: bound, but not in this tree" for name in links if name not in names
    ]
