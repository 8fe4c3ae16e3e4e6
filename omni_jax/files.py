"""Files that nobody can vouch for: opened or clearly refused; and written so that a crash leaves the old one whole."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

__all__ = ["open_regular_file", "read_text", "write_atomic"]


def open_regular_file(path: str | os.PathLike[str], what: str, error: type[ValueError] = ValueError) -> BinaryIO:
    """Open `path` for reading, or say in one sentence why it cannot be `what`, and what to do about it.

    Raises:
        error: the path is missing, a folder, a device, unreadable, empty, a Git-LFS pointer, or a web page.
    """
    path = Path(path)
    name = f"{what} {str(path)!r}"
    try:
        mode = path.stat().st_mode  # before open(): opening a pipe would wait for a writer for ever
        if stat.S_ISDIR(mode):
            raise error(f"{name} is a folder; give the path of the file inside it")
        if not stat.S_ISREG(mode):
            raise error(f"{name} is not a regular file; copy the data into a file first")
        stream = path.open("rb")
    except FileNotFoundError:
        raise error(f"{name} does not exist; check the path (relative paths start at {os.getcwd()!r})") from None
    except ValueError as bad:
        if isinstance(bad, error) and str(bad).startswith(what):
            raise
        raise error(f"{name} is not a valid path: {bad}") from None  # for example a NUL character
    except OSError as bad:
        raise error(f"{name} cannot be opened: {bad.strerror or bad}; check its permissions") from None
    try:
        head = stream.read(512)
        stream.seek(0)
        reason = _wrong_content(head)
        if reason:
            raise error(f"{name} {reason}")
    except BaseException:
        stream.close()
        raise
    return stream


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """The UTF-8 text of a file.

    Raises:
        ValueError: as `open_regular_file`; or it is not UTF-8 (the message gives the first bad byte's place).
    """
    with open_regular_file(path, what) as stream:
        data = stream.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as bad:
        raise ValueError(
            f"{what} {str(path)!r} is not UTF-8 at byte {bad.start}; convert it, for example with `iconv -t UTF-8`"
        ) from None


def _wrong_content(head: bytes) -> str | None:
    """Why a file that begins with `head` is certainly not what was meant."""
    if not head:
        return "is empty (0 bytes); the copy or the download failed, fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return (
            "is a Git-LFS pointer, not the file itself; run `git lfs install` and `git lfs pull` in the repository "
            "that it came from"
        )
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
        return "is a web page, not the file itself; download the raw file (a link that ends in the file's name)"
    return None


def write_atomic(path: str | os.PathLike[str], write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in the place of `path` in one step.

    Order: temporary file, fsync, rename, fsync of the folder; a reader sees the old file or the new one, never a part,
    also after `kill -9` or a power cut. Permission bits of an existing file are kept. What an earlier, killed save on
    this machine left beside `path` is removed.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; `path` is then as it was.
    """
    path = Path(os.path.realpath(path))  # a link stays a link: what it points to is replaced
    _remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{_host()}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as stream:
            write(stream)
            stream.flush()
            with contextlib.suppress(FileNotFoundError):
                os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _host() -> str:
    return "".join(c for c in socket.gethostname() if c.isalnum()) or "host"


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of `path` whose process, on this machine, no longer lives."""
    prefix = f".{path.name}.{_host()}."
    for left in path.parent.iterdir() if path.parent.is_dir() else ():
        pid = left.name.removeprefix(prefix).removesuffix(".tmp")
        if left.name != f"{prefix}{pid}.tmp" or not pid.isdecimal():
            continue
        if int(pid) != os.getpid():
            try:
                os.kill(int(pid), 0)
                continue  # alive: it is writing now
            except ProcessLookupError:
                pass
            except (OSError, OverflowError):
                continue
        with contextlib.suppress(OSError):
            left.unlink()
