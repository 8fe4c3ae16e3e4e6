"""Which file of a folder is the checkpoint that was meant (omni_jax's copy).

The same file stands in both twins: it looks at names only.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from .pt_archive import CheckpointError

__all__ = ["checked_path", "find_checkpoint"]

_SUFFIXES = (".pt", ".pth", ".safetensors")
_STEP = re.compile(r"(.*?)(?:(?:^|[_.-])step)?(?:step|[_.-])([0-9]{1,18})")  # the stem without its step, the step
_SHARD = re.compile(r".*-[0-9]{1,9}-of-[0-9]{1,9}")
_WAYS = ("best", "latest")


def find_checkpoint(path: str | os.PathLike[str], which: str = "best") -> Path:
    """The file itself, or the one of a folder: its best or its latest checkpoint, by the names.

    "best": `best*` or `*_best`, else as "latest". "latest": `last`, else the highest step number at the end of the
    name (`thinker_step_1000.pt`), or the file of that name without a number, which a trainer writes at its end
    (`thinker.pt`), else the only checkpoint there is besides best ones, or the only one at all.

    Raises:
        CheckpointError: `which` is neither, or `path` no path; the folder cannot be read, holds no checkpoint, several
            that the names do not tell apart, or only shards.
    """
    if which not in _WAYS:
        raise CheckpointError(f"which = {which!r}: must be one of {', '.join(_WAYS)}; it chooses a file of a folder")
    path = checked_path(path)
    try:
        if not path.is_dir():
            return _whole(path)
        files = sorted(
            file
            for file in path.iterdir()
            if file.suffix in _SUFFIXES and not file.name.startswith(".") and not file.is_dir()
        )
    except OSError as bad:
        raise CheckpointError(
            f"checkpoint folder {str(path)!r} cannot be read: {bad.strerror or bad}; check its permissions"
        ) from None
    if not files:
        raise CheckpointError(
            f"checkpoint {str(path)!r} is a folder without a checkpoint ({', '.join(_SUFFIXES)}); give the path of "
            "the file, or the folder that it is in"
        )
    files = [file for file in files if not _SHARD.fullmatch(file.stem)] or [_whole(file) for file in files]
    best = [file for file in files if file.stem.startswith("best") or file.stem.endswith(("_best", "-best"))]
    if which == "best" and best:
        return _only(best, path, "each may be the best")
    last = [file for file in files if file.stem == "last"]
    if last:
        return _only(last, path, "each is the last")
    steps = {file: (int(found[2]), found[1]) for file in files if (found := _STEP.fullmatch(file.stem))}
    if steps:
        highest = max(step for step, _ in steps.values())
        latest = [file for file, (step, _) in steps.items() if step == highest]
        stems = {steps[file][1].rstrip("_.-") for file in latest}
        final = [file for file in files if file.stem in stems and file not in steps]
        return _only(final or latest, path, "each is the final one" if final else f"each is of step {highest}")
    others = [file for file in files if file not in best]
    return _only(others or files, path, "no name tells which is the latest")


def checked_path(path: str | os.PathLike[str], name: str = "path") -> Path:
    """The argument as a Path.

    Raises:
        CheckpointError: it is no path, or holds a NUL character; the message calls it `name`.
    """
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(
            f"{name} = {path!r} has type {type(path).__name__}: must be a str or os.PathLike; give the path of a file"
        )
    if "\0" in os.fsdecode(path):
        raise CheckpointError(f"{name} = {path!r} is not a valid path: no file name holds a NUL character; remove it")
    return Path(os.fsdecode(path))


def _whole(file: Path) -> Path:
    if _SHARD.fullmatch(file.stem):
        raise CheckpointError(
            f"checkpoint {str(file)!r} is, by its name, one shard of several, and shards are not read; join them into "
            "one file first"
        )
    return file


def _only(files: list[Path], folder: Path, why: str) -> Path:
    if len(files) == 1:
        return files[0]
    shown = ", ".join(file.name for file in files[:5]) + (", ..." if len(files) > 5 else "")
    raise CheckpointError(f"checkpoint folder {str(folder)!r} holds {shown}: {why}; give the path of the file itself")
