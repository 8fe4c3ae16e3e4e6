"""The pickle inside a torch.save file, read by an opcode machine that can build data and nothing else.

A pickle is a program for a stack machine. This machine knows the opcodes that torch.save writes for a checkpoint, five
names (OrderedDict, _rebuild_tensor_v2 and the storages), and one BUILD (an OrderedDict's `_metadata`). It imports
nothing and calls nothing from the file: what it does not know is refused by name.
"""

from __future__ import annotations

import math
import re
import struct
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from .pt_archive import CheckpointError

__all__ = ["TensorRef", "read_pickle"]

_MOST_OPCODES = 500_000  # a tensor takes some 30
_DEEPEST = 32  # levels of nesting; a checkpoint has 6
_MOST_NODES = 2_000_000  # of the tree, written out: shared parts count each time they stand somewhere
_MOST_DIMENSIONS = 16
_LARGEST_COUNT = 1 << 48  # elements
_LARGEST_SHARING = 8  # bytes of all tensors, over bytes of all storages; tied embeddings make 2 at most

# Storage class in the pickle → (dtype name, bytes an element).
_STORAGES = {
    "torch DoubleStorage": ("float64", 8),
    "torch FloatStorage": ("float32", 4),
    "torch HalfStorage": ("float16", 2),
    "torch BFloat16Storage": ("bfloat16", 2),
    "torch LongStorage": ("int64", 8),
    "torch IntStorage": ("int32", 4),
    "torch ShortStorage": ("int16", 2),
    "torch CharStorage": ("int8", 1),
    "torch ByteStorage": ("uint8", 1),
    "torch BoolStorage": ("bool", 1),
}
_ORDERED_DICT = "collections OrderedDict"
_REBUILD = "torch._utils _rebuild_tensor_v2"
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|xla|hpu)(:[0-9]{1,4})?")
_HINT = (
    "only dicts, lists, tuples, strings, numbers, None and tensors are read; "
    "save the state, not the objects: torch.save({'model': model.state_dict(), ...}, path)"
)
_DAMAGED = "the file is damaged: fetch it or save it again"


@dataclass(frozen=True)
class TensorRef:
    """A tensor as the pickle describes it: a strided window on a storage. Counts in elements."""

    storage: str
    dtype: str
    itemsize: int
    storage_size: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    itemsize: int
    size: int


def read_pickle(data: bytes | bytearray, storage_bytes: dict[str, int]) -> tuple[Any, dict[str, tuple[str, int]]]:
    """The tree that the pickle builds, with TensorRef for tensors, and (dtype, elements) of each storage it names.

    Args:
        data: the bytes of `data.pkl`.
        storage_bytes: size in bytes of every member `data/N`, by N.

    Raises:
        CheckpointError: an opcode, name or structure that a checkpoint does not have; a tensor that reaches outside its
            storage, overlaps itself or expands it; a storage of another size than its member, or that nothing uses.
    """
    machine = _Machine(bytes(data), storage_bytes)
    tree = machine.run()
    _, _, tensor_bytes = _measure(tree, {}, 0)
    unused = sorted(storage_bytes.keys() - machine.storages.keys())
    if unused:
        raise CheckpointError(f"member data/{unused[0]} belongs to no tensor ({len(unused)} such); {_DAMAGED}")
    if tensor_bytes > _LARGEST_SHARING * sum(storage_bytes.values()):
        raise CheckpointError(
            f"its tensors have {tensor_bytes} bytes on storages of {sum(storage_bytes.values())}; "
            "clone the tensors before saving"
        )
    return tree, {key: (storage.dtype, storage.size) for key, storage in machine.storages.items()}


class _Machine:
    """Stack, memo and the opcodes; every opcode checks what it finds on the stack."""

    def __init__(self, data: bytes, storage_bytes: dict[str, int]) -> None:
        self.data = data
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storage_bytes = storage_bytes
        self.storages: dict[str, _Storage] = {}

    def run(self) -> Any:
        if self.data[:2] != b"\x80\x02":
            raise CheckpointError(f"data.pkl does not begin as a pickle of protocol 2; {_HINT}")
        self.at = 2
        for _ in range(_MOST_OPCODES):
            code = self.take(1)[0]
            if code == 0x2E:  # STOP
                if len(self.stack) != 1 or self.marks or self.at != len(self.data):
                    raise CheckpointError(f"data.pkl ends with things left over; {_DAMAGED}")
                return self.stack[0]
            step = _OPCODES.get(code)
            if step is None:
                raise CheckpointError(f"data.pkl has the opcode {_opcode_name(code)}, which is not allowed; {_HINT}")
            step(self)
        raise CheckpointError(f"data.pkl has more than {_MOST_OPCODES} opcodes; this is no checkpoint of a model")

    # Bytes and stack -------------------------------------------------------------------------------------------------

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise CheckpointError(f"data.pkl is cut off; {_DAMAGED}")
        chunk, self.at = self.data[self.at : end], end
        return chunk

    def pop(self) -> Any:
        if not self.stack:
            raise CheckpointError(f"data.pkl takes from an empty stack; {_DAMAGED}")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise CheckpointError(f"data.pkl has a list without a beginning; {_DAMAGED}")
        items, self.stack = self.stack, self.marks.pop()
        return items

    # Opcodes ---------------------------------------------------------------------------------------------------------

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def put(self, index: int) -> None:
        if not self.stack or index in self.memo:
            raise CheckpointError(f"data.pkl writes memo {index} twice or from nothing; {_DAMAGED}")
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise CheckpointError(f"data.pkl reads memo {index}, which was never written; {_DAMAGED}")
        self.stack.append(self.memo[index])

    def text(self) -> None:
        raw = self.take(struct.unpack("<I", self.take(4))[0])
        try:
            self.stack.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            raise CheckpointError(f"data.pkl has a string that is not UTF-8; {_DAMAGED}") from None

    def long(self) -> None:
        size = self.take(1)[0]
        if size > 8:
            raise CheckpointError(f"data.pkl has an integer of {size} bytes, more than 8; {_DAMAGED}")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def look_up(self) -> None:
        end = self.data.find(b"\n", self.data.find(b"\n", self.at) + 1)
        if not 0 < end - self.at < 400:
            raise CheckpointError(f"data.pkl has a broken name; {_DAMAGED}")
        name = self.take(end + 1 - self.at)[:-1].decode("latin-1").replace("\n", " ")
        if name not in _STORAGES and name not in (_ORDERED_DICT, _REBUILD):
            raise CheckpointError(f"data.pkl asks for {name.replace(' ', '.', 1)[:120]!r}, which is refused; {_HINT}")
        self.stack.append(_Global(name))

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def tuple_from_mark(self) -> None:
        items = self.pop_mark()  # first: it changes which stack is the current one
        self.stack.append(tuple(items))

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1] if self.stack else None
        if type(target) is not list:
            raise CheckpointError(f"data.pkl appends to something that is no list; {_DAMAGED}")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target: Any = self.stack[-1] if self.stack else None
        if type(target) not in (dict, OrderedDict) or len(items) % 2:
            raise CheckpointError(f"data.pkl sets an item of something that is no dict; {_DAMAGED}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise CheckpointError(f"a dict has a key of type {type(key).__name__}, not str or int; {_HINT}")
            if key in target:
                raise CheckpointError(f"a dict has the key {str(key)[:80]!r} twice; {_DAMAGED}")
            target[key] = value

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if function == _Global(_ORDERED_DICT):
            if arguments != ():
                raise CheckpointError(f"an OrderedDict is made with arguments; {_HINT}")
            self.stack.append(OrderedDict())
        elif function == _Global(_REBUILD):
            self.stack.append(_tensor(arguments))
        else:
            raise CheckpointError(f"data.pkl calls something that is no function of a checkpoint; {_HINT}")

    def build(self) -> None:
        state = self.pop()
        target = self.stack[-1] if self.stack else None
        metadata = state["_metadata"] if type(state) is dict and list(state) == ["_metadata"] else None
        if type(target) is not OrderedDict or type(metadata) is not OrderedDict:
            raise CheckpointError(f"data.pkl has a BUILD that is not an OrderedDict's _metadata; {_HINT}")
        _measure(metadata, {}, 0)  # torch's notes on layer versions: checked as data, not needed

    def storage(self) -> None:
        record = self.pop()
        if type(record) is not tuple or len(record) != 5 or record[0] != "storage":
            raise CheckpointError(f"data.pkl refers to something outside that is no storage; {_HINT}")
        _, kind, key, device, size = record
        dtype = _STORAGES.get(kind.name) if type(kind) is _Global else None
        if dtype is None or type(key) is not str or type(device) is not str or type(size) is not int:
            raise CheckpointError(f"data.pkl describes a storage wrongly; {_DAMAGED}")
        if not _DEVICE.fullmatch(device):
            raise CheckpointError(
                f"storage {key[:20]!r} lies on the device {device[:20]!r}; move the tensors to the CPU"
            )
        if key not in self.storage_bytes:
            raise CheckpointError(f"storage data/{key[:20]} is missing in the archive; {_DAMAGED}")
        name, itemsize = dtype
        if size < 0 or size * itemsize != self.storage_bytes[key]:
            raise CheckpointError(
                f"storage data/{key} has {self.storage_bytes[key]} bytes, and {size} elements of {name} are declared; "
                f"{_DAMAGED}"
            )
        storage = _Storage(key, name, itemsize, size)
        if self.storages.setdefault(key, storage) != storage:
            raise CheckpointError(f"storage data/{key} is declared in two ways; {_DAMAGED}")
        self.stack.append(storage)


def _counts(value: object) -> bool:
    """Whether `value` is a tuple of plain integers in 0 .. _LARGEST_COUNT."""
    if type(value) is not tuple or len(value) > _MOST_DIMENSIONS:
        return False
    return all(type(n) is int and 0 <= n <= _LARGEST_COUNT for n in value)


def _tensor(arguments: object) -> TensorRef:
    """_rebuild_tensor_v2(storage, offset, shape, stride, requires_grad, hooks), as data."""
    if type(arguments) is not tuple or len(arguments) != 6 or type(arguments[0]) is not _Storage:
        raise CheckpointError(f"a tensor is described wrongly; {_DAMAGED}")
    storage, offset, shape, stride, requires_grad, hooks = arguments
    if not _counts((offset,)) or not _counts(shape) or not _counts(stride) or len(shape) != len(stride):
        raise CheckpointError(f"a tensor has an impossible offset, shape or stride; {_DAMAGED}")
    if type(requires_grad) is not bool or type(hooks) is not OrderedDict or hooks:
        raise CheckpointError(f"a tensor carries hooks; {_HINT}")
    where = f"a tensor of shape {shape}, stride {stride} at {offset}"
    if math.prod(n for n in shape if n) > _LARGEST_COUNT:
        raise CheckpointError(f"{where} is too large; {_DAMAGED}")
    if math.prod(shape) == 0:
        last = offset - 1
    else:
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        used = 1
        for step, n in sorted((step, n) for n, step in zip(shape, stride, strict=True) if n > 1):
            if step < used:
                raise CheckpointError(
                    f"{where} uses an element more than once (an expanded or overlapping view); clone it before saving"
                )
            used = step * n
    if last >= storage.size:
        raise CheckpointError(f"{where} reaches outside its storage of {storage.size} elements; {_DAMAGED}")
    return TensorRef(storage.key, storage.dtype, storage.itemsize, storage.size, offset, shape, stride)


def _measure(node: Any, known: dict[int, tuple[int, int, int]], depth: int) -> tuple[int, int, int]:
    """(height, nodes, tensor bytes) of a tree written out in full; refuses what is no data, cycles and huge trees."""
    if node is None or type(node) in (str, int, float, bool):
        return 0, 1, 0
    if type(node) is TensorRef:
        return 0, 1, node.size * node.itemsize
    if id(node) in known:
        return known[id(node)]
    if type(node) in (dict, OrderedDict):
        children = list(node.values())
    elif type(node) in (list, tuple):
        children = node
    else:
        raise CheckpointError(f"data.pkl holds a {type(node).__name__.strip('_').lower()} by itself; {_HINT}")
    height, nodes, size = 0, 1, 0
    if depth < _DEEPEST:
        for child in children:
            h, n, s = _measure(child, known, depth + 1)
            height, nodes, size = max(height, h), nodes + n, size + s
    if depth >= _DEEPEST or height >= _DEEPEST:
        raise CheckpointError(f"data.pkl nests more than {_DEEPEST} levels, or holds itself; {_HINT}")
    if nodes > _MOST_NODES:
        raise CheckpointError(f"data.pkl unfolds to more than {_MOST_NODES} values; this is no checkpoint of a model")
    known[id(node)] = height + 1, nodes, size
    return known[id(node)]


def _opcode_name(code: int) -> str:
    import pickletools

    return next(
        (f"{info.name} ({code:#04x})" for info in pickletools.opcodes if ord(info.code) == code), f"{code:#04x}"
    )


_OPCODES = {
    0x28: _Machine.mark,  # MARK
    0x29: lambda m: m.stack.append(()),  # EMPTY_TUPLE
    0x47: lambda m: m.stack.append(struct.unpack(">d", m.take(8))[0]),  # BINFLOAT
    0x4A: lambda m: m.stack.append(struct.unpack("<i", m.take(4))[0]),  # BININT
    0x4B: lambda m: m.stack.append(m.take(1)[0]),  # BININT1
    0x4D: lambda m: m.stack.append(struct.unpack("<H", m.take(2))[0]),  # BININT2
    0x4E: lambda m: m.stack.append(None),  # NONE
    0x51: _Machine.storage,  # BINPERSID
    0x52: _Machine.reduce,  # REDUCE
    0x58: _Machine.text,  # BINUNICODE
    0x5D: lambda m: m.stack.append([]),  # EMPTY_LIST
    0x61: lambda m: m.append([m.pop()]),  # APPEND
    0x62: _Machine.build,  # BUILD
    0x63: _Machine.look_up,  # GLOBAL
    0x65: lambda m: m.append(m.pop_mark()),  # APPENDS
    0x68: lambda m: m.get(m.take(1)[0]),  # BINGET
    0x6A: lambda m: m.get(struct.unpack("<I", m.take(4))[0]),  # LONG_BINGET
    0x71: lambda m: m.put(m.take(1)[0]),  # BINPUT
    0x72: lambda m: m.put(struct.unpack("<I", m.take(4))[0]),  # LONG_BINPUT
    0x73: lambda m: m.set_items([m.pop(), m.pop()][::-1]),  # SETITEM
    0x74: _Machine.tuple_from_mark,  # TUPLE
    0x75: lambda m: m.set_items(m.pop_mark()),  # SETITEMS
    0x7D: lambda m: m.stack.append({}),  # EMPTY_DICT
    0x85: lambda m: m.tuple_of(1),  # TUPLE1
    0x86: lambda m: m.tuple_of(2),  # TUPLE2
    0x87: lambda m: m.tuple_of(3),  # TUPLE3
    0x88: lambda m: m.stack.append(True),  # NEWTRUE
    0x89: lambda m: m.stack.append(False),  # NEWFALSE
    0x8A: _Machine.long,  # LONG1
}
