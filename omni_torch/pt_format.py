"""read_pt and write_pt: the torch.save format, strict.

Reading takes two readers that must agree: pt_pickle's opcode machine, with the archive's checksums, and
torch.load(weights_only=True), whose tensors are returned. torch alone returns wrong tensors for most damaged files: it
does not check the checksums, and reads a member that is marked as a folder as memory that was never written.
"""

from __future__ import annotations

from typing import Any, BinaryIO

import torch

from .pt_archive import CheckpointError, PtArchive
from .pt_pickle import TensorRef, read_pickle

__all__ = ["read_pt", "write_pt"]


def read_pt(stream: BinaryIO) -> Any:
    """The tree of dicts, lists, tuples, plain values and torch tensors (on the CPU) in a torch.save file.

    Raises:
        CheckpointError: anything that torch.save would not have written for a checkpoint, or a wrong checksum.
    """
    archive = PtArchive(stream)
    sizes = {name[5:]: member.size for name, member in archive.members.items() if name.startswith("data/")}
    tree, storages = read_pickle(archive.read("data.pkl"), sizes)
    for name in archive.members:
        archive.verify(name)
    for key, (dtype, _) in storages.items():
        if dtype == "bool" and max(archive.read(f"data/{key}"), default=0) > 1:
            raise CheckpointError(f"storage data/{key} holds a bool that is neither 0 nor 1; save the file again")
    stream.seek(0)
    try:
        loaded = torch.load(stream, map_location="cpu", weights_only=True, mmap=False)
    except Exception as bad:  # whatever torch raises, the file is refused, and no other way of loading is tried
        reason = str(bad).partition("\n")[0][:200] or repr(bad)
        raise CheckpointError(f"torch.load refuses it: {reason}; save it again with torch.save") from None
    if not _agree(tree, loaded, archive, set()):
        raise CheckpointError("torch.load reads other values than the file holds; it is damaged: save it again")
    return loaded


def _agree(told: Any, loaded: Any, archive: PtArchive, compared: set[str]) -> bool:
    """Whether torch loaded what the pickle describes, bit for bit; each storage is compared once."""
    if isinstance(told, TensorRef):
        if (
            not isinstance(loaded, torch.Tensor)
            or str(loaded.dtype) != f"torch.{told.dtype}"
            or (tuple(loaded.shape), loaded.stride()) != (told.shape, told.stride)
            or loaded.storage_offset() != told.offset
        ):
            return False
        if told.storage not in compared:
            compared.add(told.storage)
            held = torch.empty(0, dtype=torch.uint8).set_(loaded.untyped_storage())
            data = archive.read(f"data/{told.storage}")
            return held.numel() == len(data) and (not data or held.equal(torch.frombuffer(data, dtype=torch.uint8)))
        return True
    if isinstance(told, dict):
        if type(loaded) is not type(told) or list(loaded) != list(told):
            return False
        return all(_agree(value, loaded[key], archive, compared) for key, value in told.items())
    if isinstance(told, list | tuple):
        if type(loaded) is not type(told) or len(loaded) != len(told):
            return False
        return all(_agree(a, b, archive, compared) for a, b in zip(told, loaded, strict=True))
    return type(loaded) is type(told) and (loaded == told or (loaded != loaded and told != told))  # NaN is NaN


def write_pt(stream: BinaryIO, tree: Any) -> None:
    """Write a tree of dicts, lists, tuples, plain values and torch tensors with torch.save."""
    torch.save(tree, stream)
