"""The result as a JSON file: written whole or not at all, and known to be writable before the run starts."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from parity.errors import Misuse
from parity.result import RunResult

__all__ = ["check_writable", "write", "write_text"]


def check_writable(path: str | Path, option: str = "--json") -> None:
    """A `Misuse` now rather than a lost result after the run."""
    path = Path(path)
    if path.is_dir():
        raise Misuse(f"{option} {path}: this is a folder; name a file in it, such as {path / 'parity.json'}")
    if not path.parent.is_dir():
        raise Misuse(f"{option} {path}: the folder {path.parent} does not exist; make it first (mkdir -p)")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise Misuse(
            f"{option} {path}: cannot write into {path.parent} ({error.strerror}); choose another file"
        ) from error
    os.close(handle)
    os.unlink(name)


def write(result: RunResult, path: str | Path) -> None:
    """Write `result.to_json()`, whole or not at all."""
    write_text(result.to_json() + "\n", path)


def write_text(text: str, path: str | Path) -> None:
    """Write a report: to a file beside it first, so that no reader ever sees half of it."""
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a report is as readable as any other new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
