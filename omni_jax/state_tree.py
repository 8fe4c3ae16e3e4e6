"""Trees of dicts, lists, tuples, plain values and arrays: made plain for a file, and digested."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Shaped

from .pt_archive import CheckpointError

__all__ = [
    "is_array",
    "dtype_name",
    "count_not_finite",
    "concatenate",
    "plain_number",
    "plain_tree",
    "tree_digest",
    "array_digest",
]

Array = Shaped[np.ndarray, "..."] | Shaped[jax.Array, "..."]


def is_array(value: object) -> bool:
    """Whether `value` is an array of numpy or JAX."""
    return isinstance(value, np.ndarray | jax.Array)


def dtype_name(value: Array) -> str:
    """The dtype's name of an array of any shape, the same in both twins: float32, bfloat16, int64, bool ..."""
    return value.dtype.name


def count_not_finite(value: Array) -> int:
    """How many entries, in an array of any shape, are NaN or infinite."""
    array = np.asarray(value)
    return int((~np.isfinite(array)).sum()) if jnp.issubdtype(array.dtype, jnp.inexact) else 0


def concatenate(parts: list[Array]) -> Shaped[np.ndarray, "N ..."]:
    """Arrays of equal shape but for the first axis, one after the other along it."""
    return np.concatenate([np.asarray(part) for part in parts], axis=0)


def plain_number(value: Any) -> Any:
    """A plain number for a 0-d array, anything else unchanged."""
    return value.item() if (is_array(value) and value.ndim == 0) or isinstance(value, np.generic) else value


def plain_tree(value: Any, name: str) -> Any:
    """The value as dicts, lists, tuples, numbers, strings, None and arrays; an object by its state_dict or fields.

    Raises:
        CheckpointError: something else is in it; `name` says where.
    """
    if isinstance(value, nnx.Variable):
        value = value.get_value()
    if is_array(value):
        return np.asarray(value)
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "state_dict"):
        return plain_tree(value.state_dict(), name)
    if hasattr(value, "_asdict"):  # a NamedTuple
        return plain_tree(value._asdict(), name)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain_tree(getattr(value, f.name), f"{name}.{f.name}") for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        made = OrderedDict if isinstance(value, OrderedDict) else dict
        return made((_key(key, name), plain_tree(item, f"{name}.{key}")) for key, item in value.items())
    if isinstance(value, list | tuple):
        items = [plain_tree(item, f"{name}.{i}") for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise CheckpointError(
        f"cannot save {name} of type {type(value).__name__}; "
        "allowed are dict, list, tuple, str, int, float, bool, None, arrays, and what has a state_dict"
    )


def _key(key: Any, name: str) -> str | int:
    if type(key) in (str, int):
        return key
    raise CheckpointError(f"cannot save the key {key!r} of {name}: it is a {type(key).__name__}, not str or int")


def tree_digest(tree: Any) -> str:
    """SHA-256 of a tree: every value with its place, type and shape, dicts in the order of their keys."""
    digest = hashlib.sha256()
    _feed(digest, "", tree)
    return digest.hexdigest()


def array_digest(value: Array) -> str:
    """SHA-256 of the values of an array of any shape: its bytes in C order, little-endian."""
    return hashlib.sha256(_array_bytes(value)).hexdigest()


def _feed(digest: Any, place: str, value: Any) -> None:
    if is_array(value):
        shape = "x".join(map(str, value.shape))
        digest.update(f"{place}:{dtype_name(value)}:{shape}\n".encode())
        digest.update(_array_bytes(value))
    elif isinstance(value, Mapping):
        digest.update(f"{place}:dict:{len(value)}\n".encode())
        for key in sorted(value, key=lambda key: (type(key).__name__, key)):
            _feed(digest, f"{place}/{key!r}", value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"{place}:{type(value).__name__}:{len(value)}\n".encode())
        for i, item in enumerate(value):
            _feed(digest, f"{place}/{i}", item)
    else:
        shown = value.hex() if isinstance(value, float) else repr(value)
        digest.update(f"{place}:{type(value).__name__}:{shown}\n".encode())


def _array_bytes(value: Array) -> memoryview:
    # ascontiguousarray would make 0-d arrays 1-d, which reshape(-1) does anyway
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
