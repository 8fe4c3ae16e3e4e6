"""What a run keeps for later ones: compiled code, and inputs that take long to make. Never σ, never a verdict."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

__all__ = ["cache_folder", "keep_arrays", "kept_arrays"]

_KEEPS = False
_DIGEST = "made of"


def keep_arrays() -> None:
    """Let `kept_arrays` use the folder from now on. Off in tests, where a bug may stand in what makes the arrays."""
    global _KEEPS
    _KEEPS = True


def kept_arrays(name: str, made_of: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """make(), or what it gave in the last run, if `made_of` (whatever the arrays depend on) was the same."""
    folder = cache_folder() if _KEEPS else None
    if folder is None:
        return make()
    path, digest = folder / f"{name}.npz", hashlib.sha256(made_of.encode()).hexdigest()
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            if str(kept[_DIGEST]) == digest:
                return {key: kept[key] for key in kept.files if key != _DIGEST}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # not there, or damaged
        pass
    arrays = make()
    with contextlib.suppress(OSError):  # a full disk
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as file:
            np.savez(file, allow_pickle=False, **{_DIGEST: np.array(digest)}, **arrays)
        os.replace(file.name, path)
    return arrays


def cache_folder() -> Path | None:
    """Where compiled code is kept: PARITY_CACHE (empty: nowhere), else the user's cache folder; None if unwritable.

    One folder per kind of processor: code compiled for one may not run on another that shares the home folder.
    """
    named = os.environ.get("PARITY_CACHE")
    if named == "":
        return None
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "omni-parity" / "jax"
        folder = (Path(named) if named else base) / _processor()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return None
    return folder if os.access(folder, os.W_OK) else None


def _processor() -> str:
    features = platform.processor()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            features = next((line for line in lines if line.startswith(("flags", "Features"))), features)
    except OSError:
        pass
    return f"{sys.platform}-{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
