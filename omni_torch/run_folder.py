"""The folder of a training run: which files it has, and when a run may start or go on in it (omni_torch's copy)."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int

from .files import open_regular_file, write_atomic
from .pt_archive import CheckpointError

__all__ = ["RunFolder"]

_Read = TypeVar("_Read")
# They say when something is looked at or written, never what the weights become.
_MAY_CHANGE = ("val_freq", "checkpoint_freq", "print_freq")
_WHY = {"max_steps": " (the schedule of the learning rate depends on it, from the first update on)"}


class RunFolder:
    """Names and rules of a run's files.

    config.json: the model's and the training's keys, flat, as the run was started; run.json: a fingerprint of the data;
    tokenizer.model; last.pt and best.pt: full checkpoints; metrics.jsonl: one JSON object a line. Every file is
    replaced whole, but metrics.jsonl, which grows by whole lines.

    Raises:
        ValueError: `path` exists and is no folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out = {str(path)!r} is a file: must be a folder, or a name that is free; give another")
        self.config = self.path / "config.json"
        self.data = self.path / "run.json"
        self.tokenizer = self.path / "tokenizer.model"
        self.last = self.path / "last.pt"
        self.best = self.path / "best.pt"
        self.metrics = self.path / "metrics.jsonl"

    def check_free(self) -> None:
        """Refuse a folder in which a run, or a part of one, is already.

        Raises:
            ValueError: it holds one of the run's files.
        """
        found = self._found()
        if found:
            self._check_whole(found)
            raise ValueError(
                f"out = {str(self.path)!r} already holds a run ({', '.join(found)}): nothing is overwritten; go on "
                "with it by --resume (resume=True), or give another folder"
            )

    def check_run(self) -> None:
        """Refuse a folder that holds no run to go on with.

        Raises:
            ValueError: config.json, run.json or last.pt is missing.
        """
        found = self._found()
        if not found:
            raise ValueError(
                f"out = {str(self.path)!r} holds no run to resume; start one without --resume (resume=False)"
            )
        self._check_whole(found)

    def check_same(self, config: Mapping[str, Any], fingerprint: str) -> None:
        """Refuse to go on unless the run in the folder was started with this configuration and data.

        val_freq, checkpoint_freq and print_freq may differ: no weight depends on them.

        Raises:
            ValueError: as `check_run`; its configuration or data differ, and the message names what.
        """
        self.check_run()
        started = _read_object(self.config)
        wanted = json.loads(json.dumps(dict(config)))
        differ = [
            f"{key} was {json.dumps(started.get(key))} and is {json.dumps(wanted.get(key))}{_WHY.get(key, '')}"
            for key in dict.fromkeys([*started, *wanted])
            if started.get(key) != wanted.get(key) and key not in _MAY_CHANGE
        ]
        if _read_object(self.data).get("ids_sha256") != fingerprint:
            differ.append("the text is another one (its token ids have another SHA-256)")
        if differ:
            raise ValueError(
                f"the run in {str(self.path)!r} cannot be resumed with other settings: {'; '.join(differ)}; give what "
                "it was started with, or start anew in another folder"
            )

    def load_last(self, load: Callable[[Path], _Read]) -> _Read:
        """load(last.pt); where it is refused as damaged, the message says what may help.

        Raises:
            CheckpointError: as `load`.
        """
        try:
            return load(self.last)
        except CheckpointError as bad:
            raise CheckpointError(f"{bad}; to go on with the run in this folder, {self._way_out()}") from bad

    def _found(self) -> list[str]:
        """The run's files that are there."""
        files = (self.config, self.data, self.last, self.best, self.metrics)
        return [file.name for file in files if file.exists()]

    def _check_whole(self, found: list[str]) -> None:
        """Refuse a part of a run, which can be neither resumed nor started over."""
        missing = [file.name for file in (self.config, self.data, self.last) if file.name not in found]
        if missing:
            way_out = self._way_out() if missing == [self.last.name] else "give another folder, or remove this one"
            raise ValueError(
                f"out = {str(self.path)!r} holds a part of a run ({', '.join(found)}), but {' and '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing: it can be neither resumed nor started over; {way_out}"
            )

    def _way_out(self) -> str:
        """What to do without last.pt."""
        copy = "copy best.pt to last.pt (the steps after it are made again); or " if self.best.exists() else ""
        return f"{copy}give another folder, or remove this one"

    def start(self, config: Mapping[str, Any], fingerprint: str) -> None:
        """Write config.json and run.json of a new run, and make the folder if there is none."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.data, {"ids_sha256": fingerprint})
        write_json(self.config, config)

    def write_tokenizer(self, model: bytes) -> None:
        """Write tokenizer.model."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_bytes(self.tokenizer, model)

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl; all of its numbers are finite."""
        line = json.dumps(dict(record), allow_nan=False) + "\n"
        with self.metrics.open("ab") as file:  # one write: a line is there, or not
            file.write(line.encode())

    def drop_metrics_after(self, step: int) -> None:
        """Leave out the lines beyond `step`, and a line that a crash cut off: those steps will be made again."""
        if not self.metrics.exists():
            return
        old = self.metrics.read_bytes()
        new = b"".join(line for line in old.splitlines(keepends=True) if _step_of(line) <= step)
        if new != old:
            write_bytes(self.metrics, new)


def fingerprint_of(*streams: Int[np.ndarray, " N"]) -> str:
    """SHA-256 of streams of ids: the same for the same ids, on any machine and in either twin."""
    digest = hashlib.sha256()
    for ids in streams:
        digest.update(len(ids).to_bytes(8, "little") + np.ascontiguousarray(ids, "<i8").tobytes())
    return digest.hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """All of `data` into `path`, or nothing."""

    def write(stream: Any) -> None:
        stream.write(data)

    write_atomic(path, write)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """One JSON object, indented, in UTF-8."""
    write_bytes(path, (json.dumps(dict(value), indent=2) + "\n").encode())


def _read_object(path: Path) -> dict[str, Any]:
    with open_regular_file(path, path.name) as file:
        raw = file.read()
    try:
        value = json.loads(raw)
    except ValueError as bad:
        raise ValueError(f"{path.name} {str(path)!r} is not JSON: {bad}; the run in this folder is damaged") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} {str(path)!r} holds no JSON object; the run in this folder is damaged")
    return value


def _step_of(line: bytes) -> float:
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        step = None
    return float(step) if isinstance(step, int) else math.inf
