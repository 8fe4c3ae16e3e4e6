"""Which file of a folder is the checkpoint that was meant (omni_torch's copy).

The same file stands in both twins: it looks at names only.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from .pt_archive import CheckpointError

__all__ = ["find_checkpoint"]

_SUFFIXES = (".pt", ".pth", ".safetensors")
_STEP = re.compile(r"(?:step|[_.-])([0-9]{1,18})$")
_WAYS = ("best", "latest")


def find_checkpoint(path: str | os.PathLike[str], which: str = "best") -> Path:
    """The file itself, or the one of a folder: its best or its latest checkpoint, by the names.

    "best": `best*` or `*_best`, else as "latest". "latest": `last`, else the highest step number at the end of the
    name (`thinker_step_1000.pt`), else the only checkpoint there is besides best ones, or the only one at all.

    Raises:
        CheckpointError: `which` is neither; the folder cannot be read, holds no checkpoint, or several that the names
            do not tell apart.
    """
    if which not in _WAYS:
        raise CheckpointError(f"which = {which!r}: must be one of {', '.join(_WAYS)}; it chooses a file of a folder")
    path = Path(path)
    try:
        if not path.is_dir():
            return path
        files = sorted(
            file
            for file in path.iterdir()
            if file.suffix in _SUFFIXES and not file.name.startswith(".") and not file.is_dir()
        )
    except ValueError:  # a NUL character: refused, with its reason, where the file is opened
        return path
    except OSError as bad:
        raise CheckpointError(
            f"checkpoint folder {str(path)!r} cannot be read: {bad.strerror or bad}; check its permissions"
        ) from None
    if not files:
        raise CheckpointError(
            f"checkpoint {str(path)!r} is a folder without a checkpoint ({', '.join(_SUFFIXES)}); give the path of "
            "the file, or the folder that it is in"
        )
    best = [file for file in files if file.stem.startswith("best") or file.stem.endswith(("_best", "-best"))]
    if which == "best" and best:
        return _only(best, path, "each may be the best")
    last = [file for file in files if file.stem == "last"]
    if last:
        return _only(last, path, "each is the last")
    steps = {file: int(found[1]) for file in files if (found := _STEP.search(file.stem))}
    if steps:
        highest = max(steps.values())
        return _only([file for file in files if steps.get(file) == highest], path, f"each is of step {highest}")
    others = [file for file in files if file not in best]
    return _only(others or files, path, "no name tells which is the latest")


def _only(files: list[Path], folder: Path, why: str) -> Path:
    if len(files) == 1:
        return files[0]
    shown = ", ".join(file.name for file in files[:5]) + (", ..." if len(files) > 5 else "")
    raise CheckpointError(f"checkpoint folder {str(folder)!r} holds {shown}: {why}; give the path of the file itself")
