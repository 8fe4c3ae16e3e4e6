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
        self._loss: float | None = None
        self._rate: float | None = None
        self._val_loss: float | None = None
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
                TextColumn("{task.fields[figures]}, left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                refresh_per_second=2,
            )
            self._task = self._bar.add_task("", total=self._total, completed=self._done, figures=self._figures())
            self._bar.start()
        self._since = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """`step` updates are done, and nothing else is known of them: moves the bar, prints no line."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def update(self, step: int, loss: float, tokens_per_second: float, val_loss: float | None = None) -> None:
        """`step` updates are done; `loss` is the last one's, nats per token."""
        if self._quiet:
            return
        self._loss, self._rate = loss, tokens_per_second
        if self._bar is not None:
            self._val_loss = self._val_loss if val_loss is None else val_loss  # the bar keeps showing the last one
            self._bar.update(self._task, completed=step, figures=self._figures())
            return
        self._val_loss = val_loss
        # By the last steps alone: the first of a run are slow, they compile.
        now = time.perf_counter()
        left = (now - self._since) / max(step - self._done, 1) * (self._total - step)
        self._since, self._done = now, step
        print(
            f"step {step}/{self._total}  {self._figures()}  left {timedelta(seconds=round(left))}",
            file=sys.stderr,
            flush=True,
        )

    def _figures(self) -> str:
        """Loss, validation loss once it was taken, tokens/s; a dash for what is not known yet."""
        loss = "–" if self._loss is None else f"{self._loss:.4f}"
        rate = "–" if self._rate is None else f"{self._rate:,.0f}"
        validation = "" if self._val_loss is None else f"  validation {self._val_loss:.4f}"
        return f"loss {loss}{validation}  {rate} tokens/s"
