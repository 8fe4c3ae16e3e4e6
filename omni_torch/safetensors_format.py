"""read_safetensors and write_safetensors: the exchange format, by the safetensors library, its header checked first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch

from .pt_archive import CheckpointError

__all__ = ["read_safetensors", "write_safetensors"]

_LARGEST_HEADER = 2 << 20  # bytes: some 20,000 tensors
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
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
    """Write tensors under their names, in the order of the names; equal tensors give equal files."""
    import safetensors.torch

    seen: set[int] = set()
    own: dict[str, torch.Tensor] = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        own[name] = tensor.clone() if tensor.data_ptr() in seen else tensor  # the format has no shared tensors
        seen.add(tensor.data_ptr())
    stream.write(safetensors.torch.save(own, dict(metadata)))


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
