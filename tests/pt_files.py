"""Torch files made by hand, for the tests of both twins: known attacks, and mutants of a good file. Needs no torch."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zipfile

KEY = b"X\x06\x00\x00\x00weight"
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    """The opcode of a string."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """The opcode of an integer of 64 bits."""
    return b"\x8a\x08" + struct.pack("<q", value)


def numbers(values: tuple[int, ...]) -> bytes:
    """The opcodes of a tuple of integers."""
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(
    key: str = "0",
    size: int = 4,
    offset: int = 0,
    shape: tuple[int, ...] = (2, 2),
    stride: tuple[int, ...] = (2, 1),
    kind: str = "FloatStorage",
    device: str = "cpu",
    hooks: bytes = ORDERED_DICT,
) -> bytes:
    """The opcodes of a tensor on storage `key` of `size` elements."""
    storage = b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text(device) + number(size)
    window = number(offset) + numbers(shape) + numbers(stride) + b"\x89" + hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"tQ" + window + b"tR"


def model(value: bytes) -> bytes:
    """The pickle of {"weight": value}."""
    return b"\x80\x02}" + KEY + value + b"s."


def archive(pickle: bytes, storages: dict[str, bytes] | None = None, **more: bytes) -> bytes:
    """A torch.save archive; `more` adds members by name or replaces them."""
    members = {"data.pkl": pickle, "byteorder": b"little"}
    members |= {f"data/{key}": data for key, data in ({"0": bytes(16)} if storages is None else storages).items()}
    return pack(list((members | {"version": b"3\n"} | more).items()))


def pack(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED, folder: str = "archive/") -> bytes:
    """A zip file of these members, in this order, repeated names included."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about repeated names
        with zipfile.ZipFile(out, "w", compression) as file:
            for name, data in members:
                file.writestr(zipfile.ZipInfo(folder + name), data, compression)
    return out.getvalue()


def _patched(data: bytes, old: bytes, new: bytes, which: int) -> bytes:
    """`data` with one occurrence of `old` replaced; `which` as an index into the occurrences."""
    places = [i for i in range(len(data)) if data.startswith(old, i)]
    at = places[which]
    return data[:at] + new + data[at + len(old) :]


def attacks(canary: str) -> dict[str, tuple[bytes, str]]:
    """Known attacks by name: the file, and what the message must say. If code in one ran, `canary` would exist."""
    command = text(f"touch {canary}")
    good = archive(model(tensor()))
    laughs = b"(]q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(30)) + b"t"
    last = good.rindex(b"PK\x01\x02") + 8  # the flags of the last member, in the directory
    flat = [("data.pkl", model(tensor())), ("version", b"3\n"), ("data/0", bytes(16))]
    return {
        "posix.system": (archive(b"\x80\x02cposix\nsystem\n(" + command + b"tR."), "posix.system"),
        "os.system in the model": (archive(model(b"cos\nsystem\n(" + command + b"tR")), "os.system"),
        "builtins.eval": (archive(model(b"cbuiltins\neval\n(" + command + b"tR")), "builtins.eval"),
        "python 2 builtins": (archive(model(b"c__builtin__\nexec\n(" + command + b"tR")), "__builtin__.exec"),
        "getattr": (archive(model(b"cbuiltins\ngetattr\n(" + command + b"tR")), "builtins.getattr"),
        "nested load": (archive(model(b"ctorch.storage\n_load_from_bytes\n(" + command + b"tR")), "_load_from_bytes"),
        "nested pickle": (archive(model(b"c_pickle\nloads\n(" + command + b"tR")), "_pickle.loads"),
        "numpy scalar": (archive(model(b"cnumpy.core.multiarray\nscalar\n(tR")), "numpy.core.multiarray.scalar"),
        "storage called": (archive(model(b"ctorch\nFloatStorage\n(" + command + b"tR")), "calls something"),
        "dict from arguments": (archive(model(b"ccollections\nOrderedDict\n(](]etR")), "with arguments"),
        "build on a dict": (archive(model(b"}}" + text("__class__") + command + b"sb")), "BUILD"),
        "build of attributes": (archive(model(ORDERED_DICT + b"}" + text("update") + command + b"sb")), "BUILD"),
        "build of slots": (archive(model(ORDERED_DICT + b"N}" + text("_metadata") + command + b"s\x86b")), "BUILD"),
        "INST": (archive(model(b"(" + command + b"ios\nsystem\n")), "INST"),
        "OBJ": (archive(model(b"(cos\nsystem\n" + command + b"o")), "os.system"),
        "NEWOBJ": (archive(model(ORDERED_DICT + b")\x81")), "NEWOBJ"),
        "STACK_GLOBAL": (archive(model(text("os") + text("system") + b"\x93")), "STACK_GLOBAL"),
        "extension registry": (archive(model(b"\x82\x01")), "EXT1"),
        "protocol 4": (archive(b"\x80\x04" + model(tensor())[2:]), "protocol 2"),
        "persistent id in text": (archive(model(b"Pstorage\n")), "PERSID"),
        "foreign persistent id": (archive(model(b"(" + text("module") + command + b"tQ")), "no storage"),
        "function left in the tree": (archive(model(b"ccollections\nOrderedDict\n")), "global"),
        "storage left in the tree": (archive(model(STORAGE)), "storage by itself"),
        "hooks": (archive(model(tensor(hooks=ORDERED_DICT + text("a") + command + b"s"))), "hooks"),
        "nested zip": (archive(model(tensor()), **{"inner.zip": good}), "does not belong"),
        "code beside the data": (archive(model(tensor()), **{"run.py": b"import os"}), "does not belong"),
        "path out of the archive": (pack(flat + [("../../evil", b"x")]), "does not belong"),
        "absolute path": (pack(flat, folder="/archive/"), "does not belong"),
        "repeated data.pkl": (pack(flat + flat[:1]), "twice"),
        "repeated storage": (pack(flat + flat[2:]), "twice"),
        "TorchScript": (archive(model(tensor()), **{"code/__torch__.py": b"def f(): pass"}), "TorchScript"),
        "deflate bomb": (pack([*flat[:2], ("data/0", bytes(1 << 22))], zipfile.ZIP_DEFLATED), "compressed"),
        "encrypted": (good[:last] + b"\x01" + good[last + 1 :], "encrypted"),
        "storage marked as a folder": (good[: last + 30] + b"\x10" + good[last + 31 :], "claims to be a folder"),
        "member on another disk": (good[: last + 26] + b"\x01" + good[last + 27 :], "another disk"),
        "serialization id": (archive(model(tensor()), **{".data/serialization_id": b"\xff"}), "not a number"),
        "wrong header name": (_patched(good, b"archive/data/0", b"archive/data/1", 0), "another name"),
        "wrong directory name": (_patched(good, b"archive/data/0", b"archive/data/1", 1), "another name"),
        "wrong checksum": (_patched(good, bytes(16), b"\x01" + bytes(15), 0), "CRC-32"),
        "data in front": (b"#!/bin/sh\n" + good, "neither"),
        "zip in front": (pack(flat) + good, "does not stand"),
        "data behind": (good + b"x", "missing at the end"),
        "no data.pkl": (pack(flat[1:]), "no data.pkl"),
        "future version": (archive(model(tensor()), version=b"4\n"), "version"),
        "big-endian": (archive(model(tensor()), byteorder=b"big"), "byte order"),
        "stride 0": (archive(model(tensor(shape=(1 << 20, 4), stride=(0, 1)))), "more than once"),
        "overlapping view": (archive(model(tensor(shape=(3, 2), stride=(1, 1)))), "more than once"),
        "reads beyond": (archive(model(tensor(shape=(4, 4), stride=(4, 1)))), "outside its storage"),
        "offset beyond": (archive(model(tensor(offset=3))), "outside its storage"),
        "negative offset": (archive(model(tensor(offset=-1))), "impossible"),
        "negative shape": (archive(model(tensor(shape=(-2, -2)))), "impossible"),
        "negative stride": (archive(model(tensor(offset=3, stride=(-2, -1)))), "impossible"),
        "huge empty": (archive(model(tensor(shape=(1 << 40, 0, 1 << 40), stride=(1, 1, 1)))), "too large"),
        "storage too small": (archive(model(tensor(size=1 << 40))), "16 bytes"),
        "storage too large": (archive(model(tensor(size=2, shape=(2, 1)))), "16 bytes"),
        "storage in two ways": (
            archive(b"\x80\x02}(" + KEY + tensor() + text("b") + tensor(kind="IntStorage") + b"u."),
            "two ways",
        ),
        "storage missing": (archive(model(tensor(key="7"))), "missing in the archive"),
        "storage unused": (archive(model(tensor()), {"0": bytes(16), "1": b"xxxx"}), "no tensor"),
        "storage elsewhere": (archive(model(tensor(device="meta"))), "device"),
        "one storage a thousand times": (
            archive(b"\x80\x02}(" + b"".join(text(str(i)) + tensor() for i in range(1000)) + b"u."),
            "storages of 16",
        ),
        "a billion laughs": (archive(model(laughs)), "unfolds"),
        "list in itself": (archive(model(b"]q\x00h\x00a")), "holds itself"),
        "deep nesting": (archive(model(b"]" * 100 + b"a" * 99)), "levels"),
        "endless opcodes": (archive(b"\x80\x02" + b"N" * 2_000_000 + b"."), "opcodes"),
        "huge integer": (archive(model(b"\x8b\x00\x00\x00\x7f")), "LONG4"),
        "long integer": (archive(model(b"\x8a\xff" + bytes(255))), "255 bytes"),
        "string beyond the end": (archive(model(b"X\xff\xff\xff\x7f")), "cut off"),
        "memo of nothing": (archive(model(b"h\x05")), "memo 5"),
        "memo written twice": (archive(model(b"]q\x01q\x01")), "memo 1"),
        "things after the end": (archive(model(tensor()) + b"cos\nsystem\n."), "left over"),
        "no end": (archive(b"\x80\x02}"), "cut off"),
        "empty stack": (archive(b"\x80\x02R."), "empty stack"),
        "key twice": (archive(b"\x80\x02}(" + (KEY + tensor()) * 2 + b"u."), "twice"),
        "key of bytes": (archive(b"\x80\x02}(" + numbers((1,)) + tensor() + b"u."), "key of type"),
        "a bool of 2": (archive(model(tensor(size=16, kind="BoolStorage")), {"0": b"\x02" * 16}), "neither 0 nor 1"),
        "no storages": (pack(flat[:2]), "missing in the archive"),
    }


def byte_mutant(data: bytes, rng: random.Random) -> bytes:
    """`data` with one bit flipped, or a run of bytes overwritten, removed, repeated or cut off at the end."""
    at = rng.randrange(len(data))
    size = rng.choice((1, 2, 4, 16, 200))
    kind = rng.randrange(6)
    if kind < 2:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + rng.randbytes(size) + data[at + size :]
    if kind == 3:
        return data[:at] + data[at + size :]
    if kind == 4:
        return data[:at] + data[at : at + size] + data[at:]
    return data[:at]


def structure_mutant(data: bytes, rng: random.Random) -> bytes:
    """`data` unpacked, one member changed, dropped, repeated, renamed or exchanged, and packed with right checksums."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        members = [(info.filename.partition("/")[2], file.read(info)) for info in file.infolist()]
    at, other = rng.randrange(len(members)), rng.randrange(len(members))
    if rng.random() < 0.5:  # the pickle is where most can go wrong
        at = [name for name, _ in members].index("data.pkl")
    name, value = members[at]
    kind = rng.randrange(8)
    if kind < 4 and value:
        members[at] = (name, byte_mutant(value, rng))
    elif kind == 4:
        del members[at]
    elif kind == 5:
        members.append((name, value))
    elif kind == 6:
        members[at], members[other] = (name, members[other][1]), (members[other][0], value)
    else:
        members[at] = (rng.choice(("data/99", "data/0", "evil", "code/x")), value)
    return pack(members)
