"""read_safetensors and write_safetensors: the exchange format, by the safetensors library, its header checked first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch

from .pt_archive import CheckpointError
from .state_tree import dtype_name

__all__ = ["read_safetensors", "write_safetensors"]

_LARGEST_HEADER = 2 << 20  # bytes: some 20,000 tensors
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_AGAIN = "the file is damaged or cut off: fetch it or save it again"


def read_safetensors(stream: BinaryIO) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors (on the CPU) and the metadata of a safetensors file.

    Raises:
        CheckpointError: a damaged header, sizes that do not fit, a key that stands twice, a dtype we do not read.

    Source: the format's description in the README of huggingface/safetensors.
    """
    import safetensors.torch

    metadata = _check_header(stream)
    stream.seek(0)
    try:
        tensors = safetensors.torch.load(stream.read())
    except Exception as bad:  # the library's own errors are of several types
        raise CheckpointError(f"safetensors refuses it: {str(bad)[:200]}; {_AGAIN}") from None
    return dict(sorted(tensors.items())), metadata  # the library's order changes from run to run


def write_safetensors(stream: BinaryIO, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors under their names; equal tensors and metadata give equal files, in either twin.

    Not by the library, whose metadata come in another order from run to run.

    Raises:
        CheckpointError: a dtype that the format does not have; nothing has been written then.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    own: list[torch.Tensor] = []
    at = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):  # widest first: all stay aligned
        tensor = tensors[name]
        code = next((code for code, dtype in _DTYPES.items() if dtype == tensor.dtype), None)
        if code is None:
            allowed = ", ".join(_DTYPES)
            raise CheckpointError(f"cannot save {name!r} of dtype {dtype_name(tensor)}; allowed are {allowed}")
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        own.append(tensor.detach())
        at += tensor.nbytes
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    stream.write(len(raw).to_bytes(8, "little") + raw)
    for tensor in own:
        stream.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


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
