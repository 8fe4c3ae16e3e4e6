"""What a calibration has done so far, a draw a line, so that it can be stopped at any time and goes on from there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parity.calibrate import Outcome
from parity.errors import Misuse

__all__ = ["Journal"]


class Journal:
    """Outcomes by the label of their draw; without a path they are kept nowhere.

    The first line says what they were made with. A last line that was cut short (the process was killed) is dropped.
    """

    def __init__(self, path: str | Path | None, made_with: Mapping[str, Any]):
        self.path = None if path is None else Path(path)
        self.done: dict[str, Outcome] = {}
        if self.path is None:
            return
        if self.path.exists() and self.path.stat().st_size:
            self._read(self.path, made_with)
        else:
            self._write([json.dumps(made_with)])

    def add(self, outcome: Outcome) -> None:
        self.done[outcome.label] = outcome
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")

    def _read(self, path: Path, made_with: Mapping[str, Any]) -> None:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        try:
            first = json.loads(whole[0])
            outcomes = [Outcome(**json.loads(line)) for line in whole[1:]]
        except (IndexError, ValueError, TypeError) as error:
            raise Misuse(f"--resume {path}: this is no journal of a calibration; name another file") from error
        if first != dict(made_with):
            raise Misuse(
                f"--resume {path}: its draws were made with {first}, this run has {dict(made_with)}; name another file"
            )
        self.done = {outcome.label: outcome for outcome in outcomes}
        if len(whole) < len(lines):
            self._write([line.rstrip("\n") for line in whole])

    def _write(self, lines: list[str]) -> None:
        from parity.report.json_file import write_text

        assert self.path is not None
        write_text("\n".join(lines) + "\n", self.path)
