"""PtArchive: the zip archive around a torch.save file, with every claim of its directory checked.

torch.save writes stored (never compressed) members under one folder: `data.pkl`, `data/N`, `version`, `byteorder`,
`.data/serialization_id`, and since torch 2.7 `.format_version` and `.storage_alignment`. Nothing else is let in.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import BinaryIO

__all__ = ["CheckpointError", "PtArchive"]

_LARGEST_DIRECTORY = 2 << 20  # bytes: some 30,000 members
_LARGEST_SMALL_MEMBER = 32 << 20  # bytes of data.pkl; a tensor takes some 150
_SINGLE = {"data.pkl", "version", "byteorder", ".data/serialization_id", ".format_version", ".storage_alignment"}
_NUMBERS = {".data/serialization_id", ".format_version", ".storage_alignment"}
_STORAGE = re.compile(r"data/(0|[1-9][0-9]{0,8})")
_CHUNK = 1 << 20
_AGAIN = "the file is damaged or cut off: fetch it or save it again"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model; the message says why and what to do."""


@dataclass(frozen=True)
class _Member:
    start: int  # first byte of the data in the file
    size: int
    crc: int


class PtArchive:
    """The members of a torch.save file, by their names below the archive's folder.

    Raises:
        CheckpointError: damaged directory, compression, encryption, overlapping or repeated or foreign members,
            TorchScript, or a byte order that is not little-endian.

    Source: PKWARE APPNOTE.TXT 6.3.10, sections 4.3 and 4.4; torch/serialization.py of torch 2.13.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.members: dict[str, _Member] = {}
        self._read_directory()
        for name in ("data.pkl", "version"):
            if name not in self.members:
                raise CheckpointError(f"the archive has no {name}; {_AGAIN}, or it is a zip file of something else")
        if "byteorder" in self.members and self.read("byteorder") != b"little":
            raise CheckpointError("the byte order is not 'little'; save it on a little-endian machine")
        version = bytes(self.read("version")[:20])
        if version != b"3\n":
            raise CheckpointError(
                f"the archive's format version is {version!r}, not b'3\\n'; save it with torch >= 1.6"
            )
        for name in _NUMBERS & self.members.keys():
            if not re.fullmatch(rb"[0-9]{1,64}", self.read(name)):
                raise CheckpointError(f"{name} is not a number; {_AGAIN}")

    def read(self, name: str) -> bytearray:
        """The bytes of a member, in memory of its own, checked against its CRC-32."""
        member = self.members[name]
        if not name.startswith("data/") and member.size > _LARGEST_SMALL_MEMBER:
            raise CheckpointError(
                f"{name} has {member.size} bytes, more than {_LARGEST_SMALL_MEMBER}; this is no model"
            )
        data = bytearray(member.size)  # bounded by the size of the file: members are stored and do not overlap
        self._stream.seek(member.start)
        crc, view = 0, memoryview(data)
        for at in range(0, member.size, _CHUNK):
            part = view[at : at + _CHUNK]
            if self._stream.readinto(part) != len(part):  # type: ignore[attr-defined]
                raise CheckpointError(f"{name} is cut off; {_AGAIN}")
            crc = zlib.crc32(part, crc)
        if crc != member.crc:
            raise CheckpointError(f"{name} does not match its checksum (CRC-32); {_AGAIN}")
        return data

    def verify(self, name: str) -> None:
        """Check the CRC-32 of a member without keeping its bytes."""
        member = self.members[name]
        self._stream.seek(member.start)
        crc, left = 0, member.size
        while left:
            part = self._stream.read(min(left, _CHUNK))
            if not part:
                raise CheckpointError(f"{name} is cut off; {_AGAIN}")
            crc, left = zlib.crc32(part, crc), left - len(part)
        if crc != member.crc:
            raise CheckpointError(f"{name} does not match its checksum (CRC-32); {_AGAIN}")

    def _read_directory(self) -> None:
        count = self._check_end()
        try:
            with zipfile.ZipFile(self._stream) as archive:
                entries, directory = archive.infolist(), archive.start_dir
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, EOFError, RuntimeError, struct.error):
            raise CheckpointError(f"the zip directory cannot be read; {_AGAIN}") from None
        if count not in (len(entries), 0xFFFF):
            raise CheckpointError(f"the zip directory has {len(entries)} members and claims {count}; {_AGAIN}")
        folder = entries[0].orig_filename.partition("/")[0] if entries else ""
        end = 0
        for entry in sorted(entries, key=lambda entry: entry.header_offset):
            top, _, name = entry.orig_filename.partition("/")
            self._check_entry(entry, folder, top, name)
            if entry.header_offset < end or (end == 0 and entry.header_offset != 0):
                raise CheckpointError(f"member {name} overlaps another, or does not stand where it should; {_AGAIN}")
            start = self._check_local_header(entry)
            end = start + entry.file_size
            if end > directory:
                raise CheckpointError(f"member {name} reaches beyond the file's data; {_AGAIN}")
            self.members[name] = _Member(start, entry.file_size, entry.CRC)

    def _check_end(self) -> int:
        """The number of members by the end record, which must be the last thing in the file; 0xFFFF for zip64.

        The directory must be small enough to be read quickly.
        """
        size = self._stream.seek(0, 2)
        self._stream.seek(max(0, size - 98))  # 56 + 20 + 22 bytes: both end records and the locator of zip64
        tail = self._stream.read()
        signature, *disks, here, count, length, offset, comment = struct.unpack("<4s4H2LH", tail[-22:].rjust(22))
        if signature != b"PK\x05\x06" or comment or any(disks) or here != count:
            raise CheckpointError(f"the zip directory is missing at the end of the file; {_AGAIN}")
        if 0xFFFFFFFF in (length, offset) and tail[:4] == b"PK\x06\x06":
            length, offset = struct.unpack("<QQ", tail[40:56])
        if length > _LARGEST_DIRECTORY:
            raise CheckpointError(f"the zip directory has {length} bytes, more than {_LARGEST_DIRECTORY}")
        if offset + length > size:
            raise CheckpointError(f"the zip directory lies beyond the end of the file; {_AGAIN}")
        return count

    def _check_entry(self, entry: zipfile.ZipInfo, folder: str, top: str, name: str) -> None:
        shown = repr(entry.orig_filename[:80])
        if name.startswith("code/") or name == "constants.pkl" or name.startswith("constants/"):
            raise CheckpointError(
                "it is a TorchScript program, which holds code; save the weights alone: "
                "torch.save(model.state_dict(), path)"
            )
        if entry.flag_bits & 0x2041:
            raise CheckpointError(f"member {shown} is encrypted; save the checkpoint without encryption")
        # To torch a member with the attribute of a folder is one: it reads it as bytes that were never written.
        if entry.external_attr & 0xFFFF or entry.volume or entry.comment:
            raise CheckpointError(
                f"member {shown} claims to be a folder or on another disk, or has a comment; {_AGAIN}"
            )
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"member {shown} is compressed, which torch.save never does (a small file could unpack to any size); "
                "unpack it and save it again with torch.save"
            )
        if entry.file_size != entry.compress_size:
            raise CheckpointError(
                f"member {shown} gives two sizes ({entry.file_size}, {entry.compress_size}); {_AGAIN}"
            )
        if top != folder or not folder or (name not in _SINGLE and not _STORAGE.fullmatch(name)):
            raise CheckpointError(f"member {shown} does not belong into a torch.save file; save it with torch.save")
        if name in self.members:
            raise CheckpointError(f"member {shown} stands twice in the archive; save it with torch.save")

    def _check_local_header(self, entry: zipfile.ZipInfo) -> int:
        """Where the data of `entry` begins, after its own header says the same as the directory."""
        self._stream.seek(entry.header_offset)
        header = self._stream.read(30).ljust(30)
        signature, _, flags, method, _, _, _, _, _, name_size, extra_size = struct.unpack("<4s5H3L2H", header)
        name = self._stream.read(name_size)
        if signature != b"PK\x03\x04" or method != entry.compress_type or flags & 0x2041:
            raise CheckpointError(f"the header of member {entry.orig_filename[:80]!r} is wrong; {_AGAIN}")
        if name != entry.orig_filename.encode("utf-8"):
            raise CheckpointError(f"member {entry.orig_filename[:80]!r} has another name in its header; {_AGAIN}")
        return entry.header_offset + 30 + name_size + extra_size
