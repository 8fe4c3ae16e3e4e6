"""read_safetensors and write_safetensors: the exchange format, by the safetensors library, its header checked first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from .pt_archive import CheckpointError
from .state_tree import dtype_name

__all__ = ["read_safetensors", "write_safetensors"]

_LARGEST_HEADER = 2 << 20  # bytes: some 20,000 tensors
# The file is little-endian; numpy has no bfloat16 of its own.
_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_AGAIN = "the file is damaged or cut off: fetch it or save it again"


def read_safetensors(stream: BinaryIO) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the metadata of a safetensors file.

    Raises:
        CheckpointError: a damaged header, sizes that do not fit, a key that stands twice, a dtype we do not read.

    Source: the format's description in the README of huggingface/safetensors.
    """
    import safetensors

    metadata = _check_header(stream)
    stream.seek(0)
    try:
        # The library's numpy loader does not know bfloat16; its parser gives the bytes of every dtype.
        arrays = {
            name: np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in safetensors.deserialize(stream.read())
        }
    except Exception as bad:  # the library's own errors are of several types
        raise CheckpointError(f"safetensors refuses it: {str(bad)[:200]}; {_AGAIN}") from None
    return dict(sorted(arrays.items())), metadata  # the library's order changes from run to run


def write_safetensors(stream: BinaryIO, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write arrays under their names; equal arrays and metadata give equal files, in either twin.

    Raises:
        CheckpointError: a dtype that the format does not have; nothing has been written then.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    own: list[np.ndarray] = []
    at = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):  # widest first: all stay aligned
        array = tensors[name]
        code = next((code for code, dtype in _DTYPES.items() if dtype == array.dtype), None)
        if code is None:
            raise CheckpointError(
                f"cannot save {name!r} of dtype {dtype_name(array)}; allowed are {', '.join(_DTYPES)}"
            )
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        own.append(np.asarray(array, order="C"))  # ascontiguousarray would make 0-d arrays 1-d
        at += array.nbytes
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    stream.write(len(raw).to_bytes(8, "little") + raw)
    for array in own:
        stream.write(array.reshape(-1).view(np.uint8).data)


def _check_header(stream: BinaryIO) -> dict[str, str]:
    """The header's metadata, once its JSON is sound: the library keeps the last of two entries of one name."""
    size = int.from_bytes(stream.read(8), "little")
    if not 0 < size <= _LARGEST_HEADER:
        raise CheckpointError(f"the safetensors header has {size} bytes, not 1 to {_LARGEST_HEADER}; {_AGAIN}")
    raw = stream.read(size)
    if len(raw) != size:
        raise CheckpointError(f"the safetensors header is cut off; {_AGAIN}")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as bad:
        if isinstance(bad, CheckpointError):
            raise
        raise CheckpointError(f"the safetensors header is not JSON; {_AGAIN}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"the safetensors header is no JSON object; {_AGAIN}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"the safetensors metadata are not strings; {_AGAIN}")
    for name, entry in header.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if dtype not in _DTYPES:
            raise CheckpointError(f"tensor {name[:80]!r} has dtype {dtype!r}; allowed are {', '.join(_DTYPES)}")
    return metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise CheckpointError(f"the safetensors header has a name twice; {_AGAIN}")
    return result
