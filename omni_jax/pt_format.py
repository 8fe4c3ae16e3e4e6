"""read_pt and write_pt: the torch.save format, strict, without torch.

Reading: pt_pickle's opcode machine gives a description of every tensor, and the archive its bytes, checked against
their checksums; the arrays are windows on these bytes. Writing: the same few opcodes, so that
torch.load(weights_only=True) reads the file.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from .pt_archive import CheckpointError, PtArchive
from .pt_pickle import TensorRef, read_pickle

__all__ = ["read_pt", "write_pt"]

# The file is little-endian; numpy has no bfloat16 of its own.
_DTYPES = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}
_STORAGE_CLASSES = {
    "float64": b"DoubleStorage",
    "float32": b"FloatStorage",
    "float16": b"HalfStorage",
    "bfloat16": b"BFloat16Storage",
    "int64": b"LongStorage",
    "int32": b"IntStorage",
    "int16": b"ShortStorage",
    "int8": b"CharStorage",
    "uint8": b"ByteStorage",
    "bool": b"BoolStorage",
}
_ALIGNMENT = 64  # bytes, as torch.save aligns its storages
_CHUNK = 1 << 20


def read_pt(stream: BinaryIO) -> Any:
    """The tree of dicts, lists, tuples, plain values and numpy arrays in a torch.save file.

    Raises:
        CheckpointError: anything that torch.save would not have written for a checkpoint, or a wrong checksum.
    """
    archive = PtArchive(stream)
    sizes = {name[5:]: member.size for name, member in archive.members.items() if name.startswith("data/")}
    tree, storages = read_pickle(archive.read("data.pkl"), sizes)
    for name in archive.members:
        if not name.startswith("data/"):
            archive.verify(name)
    buffers = {key: archive.read(f"data/{key}") for key in storages}
    for key, (dtype, _) in storages.items():
        if dtype == "bool" and max(buffers[key], default=0) > 1:
            raise CheckpointError(f"storage data/{key} holds a bool that is neither 0 nor 1; save the file again")
    return _with_arrays(tree, buffers)


def _with_arrays(node: Any, buffers: dict[str, bytearray]) -> Any:
    if isinstance(node, TensorRef):
        step = node.itemsize
        strides = tuple(n * step for n in node.stride)
        offset = node.offset * step if node.size else 0
        return np.ndarray(node.shape, _DTYPES[node.dtype], buffers[node.storage], offset, strides)
    if isinstance(node, dict):
        return {key: _with_arrays(value, buffers) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_with_arrays(value, buffers) for value in node)
    return node


def write_pt(stream: BinaryIO, tree: Any) -> None:
    """Write a tree of dicts, lists, tuples, plain values and numpy arrays as torch.save would.

    Raises:
        CheckpointError: the tree holds something else.
    """
    storages: list[np.ndarray] = []
    pickle = io.BytesIO()
    pickle.write(b"\x80\x02")
    _write_value(pickle, tree, storages)
    pickle.write(b".")
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        _write_member(archive, "archive/data.pkl", pickle.getvalue())
        _write_member(archive, "archive/byteorder", b"little")
        for index, array in enumerate(storages):
            _write_member(archive, f"archive/data/{index}", array.reshape(-1).view(np.uint8).data)
        _write_member(archive, "archive/version", b"3\n")


def _write_member(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """A stored member whose data begins at a multiple of 64 bytes; no date, so that equal trees give equal files."""
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    info.file_size = len(data)
    large = len(data) >= 1 << 31
    start = archive.fp.tell() + 30 + len(name) + (20 if large else 0) + 4  # type: ignore[union-attr]
    padding = -start % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding  # the field that torch pads with
    with archive.open(info, "w", force_zip64=large) as member:
        for at in range(0, len(data), _CHUNK):
            member.write(data[at : at + _CHUNK])


def _write_value(out: io.BytesIO, value: Any, storages: list[np.ndarray]) -> None:
    """The opcodes that build `value`; arrays are collected in `storages`."""
    if isinstance(value, Mapping):
        out.write(b"}(")
        for key, item in value.items():
            if type(key) not in (str, int):
                raise CheckpointError(f"cannot save the dict key {key!r} of type {type(key).__name__}; use str or int")
            _write_value(out, key, storages)
            _write_value(out, item, storages)
        out.write(b"u")
    elif type(value) is list:
        out.write(b"](")
        for item in value:
            _write_value(out, item, storages)
        out.write(b"e")
    elif type(value) is tuple:
        out.write(b"(")
        for item in value:
            _write_value(out, item, storages)
        out.write(b"t")
    elif value is None or type(value) is bool:
        out.write({None: b"N", True: b"\x88", False: b"\x89"}[value])
    elif type(value) is int:
        _write_int(out, value)
    elif type(value) is float:
        out.write(b"G" + struct.pack(">d", value))
    elif type(value) is str:
        raw = value.encode("utf-8")
        out.write(b"X" + struct.pack("<I", len(raw)) + raw)
    elif isinstance(value, np.ndarray):
        _write_array(out, value, storages)
    else:
        raise CheckpointError(
            f"cannot save a value of type {type(value).__name__}; "
            "allowed are dict, list, tuple, str, int, float, bool, None and arrays"
        )


def _write_int(out: io.BytesIO, value: int) -> None:
    if 0 <= value < 1 << 8:
        out.write(b"K" + struct.pack("<B", value))
    elif -(1 << 31) <= value < 1 << 31:
        out.write(b"J" + struct.pack("<i", value))
    elif -(1 << 63) <= value < 1 << 63:
        out.write(b"\x8a\x08" + struct.pack("<q", value))
    else:
        raise CheckpointError(f"cannot save the integer {value}: it does not fit 64 bits")


def _write_array(out: io.BytesIO, array: np.ndarray, storages: list[np.ndarray]) -> None:
    """_rebuild_tensor_v2(storage, 0, shape, contiguous stride, False, OrderedDict())."""
    name = array.dtype.name
    if name not in _STORAGE_CLASSES:
        raise CheckpointError(f"cannot save an array of dtype {name}; allowed are {', '.join(_STORAGE_CLASSES)}")
    array = np.asarray(array, dtype=_DTYPES[name], order="C")  # ascontiguousarray would make 0-d arrays 1-d
    stride = tuple(
        math.prod(max(n, 1) for n in array.shape[i + 1 :]) for i in range(array.ndim)
    )  # torch's, if empty too
    out.write(b"ctorch._utils\n_rebuild_tensor_v2\n((")
    _write_value(out, "storage", storages)
    out.write(b"ctorch\n" + _STORAGE_CLASSES[name] + b"\n")
    _write_value(out, str(len(storages)), storages)
    _write_value(out, "cpu", storages)
    _write_value(out, array.size, storages)
    out.write(b"tQ")
    for part in (0, array.shape, stride, False):
        _write_value(out, part, storages)
    out.write(b"ccollections\nOrderedDict\n)RtR")
    storages.append(array)
