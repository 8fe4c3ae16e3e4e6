"""How far training has come: a bar on a terminal, plain lines elsewhere (omni_jax's copy)."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Any

__all__ = ["TrainingProgress"]


class TrainingProgress:
    """Shows step, loss, tokens/s and the time left on stderr, as long as the context is open.

    A bar where stderr is a terminal, a plain line for every `update` where it is not, nothing if `quiet`.
    """

    def __init__(self, total: int, done: int, quiet: bool = False) -> None:
        self._total, self._done, self._quiet = total, done, quiet
        self._bar: Any = None
        self._task: Any = None
        self._since = time.perf_counter()

    def __enter__(self) -> TrainingProgress:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:,.0f} tokens/s, left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                refresh_per_second=2,
            )
            self._task = self._bar.add_task("", total=self._total, completed=self._done, loss=float("nan"), rate=0.0)
            self._bar.start()
        self._since = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float, val_loss: float | None = None) -> None:
        """`step` updates are done; `loss` is the last one's, nats per token."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=loss, rate=tokens_per_second)
            return
        # By the last steps alone: the first of a run are slow, they compile.
        now = time.perf_counter()
        left = (now - self._since) / max(step - self._done, 1) * (self._total - step)
        self._since, self._done = now, step
        validation = "" if val_loss is None else f"  validation {val_loss:.4f}"
        print(
            f"step {step}/{self._total}  loss {loss:.4f}{validation}  {tokens_per_second:,.0f} tokens/s  "
            f"left {timedelta(seconds=round(left))}",
            file=sys.stderr,
            flush=True,
        )
