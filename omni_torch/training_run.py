"""A training run in its folder, whatever it trains: updates, metrics, checkpoints, resume, validation, Ctrl-C."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .checkpoint import export_weights, load_checkpoint, load_weights, save_checkpoint
from .interrupt import Interrupt
from .optim import AdamWState, adamw_step_many_, clip_grad_norm_, init_adamw_state, warmup_cosine
from .progress import TrainingProgress
from .run_folder import RunFolder
from .train_config import TrainConfig
from .training_format import BETAS, EPS, optimizer_dict, saved_moments, scheduler_dict
from .training_utils import NumericalError, validate_loss

__all__ = ["TrainState", "TrainingRun"]

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class TrainState:
    """Where a run is: all that its next step depends on beside the configuration and the text.

    params: parameters by torch key, the model's own (they change in place); optimizer: AdamW's moments, in the same
    order; step: updates made; best_val_loss: the lowest validation loss so far, nats per token, inf before the first.
    """

    params: dict[str, nn.Parameter]
    optimizer: list[AdamWState]
    step: int
    best_val_loss: float


class TrainingRun(Generic[Model]):
    """A run in its folder: all but what is learnt from; see `Trainer`, which learns from text.

    A subclass says that by `_batch` and `_gradients`, and validates by `validate` where it sets `_validates`.

    Args:
        kind: the model's class; its from_config takes `config`.
        fingerprint: of the data; a run goes on only with the same.
        out: the folder; its parents are made, and nothing is written before `run`.
        resume: go on with the run in `out`, whichever twin began it.
        quiet: show nothing on stderr.

    Raises:
        ValueError: `out` already holds a run and `resume` is False, or holds none, or one with other settings or data,
            and `resume` is True.
        CheckpointError: last.pt is damaged or not this model's.
    """

    _validates = False

    def __init__(
        self,
        kind: type[Model],
        config: Any,
        train_config: TrainConfig,
        fingerprint: str,
        out: str | os.PathLike[str],
        resume: bool = False,
        quiet: bool = False,
    ) -> None:
        self.config, self.train_config, self.quiet = config, train_config, quiet
        self.folder = RunFolder(out)
        self._settings, self._fingerprint = config.to_dict() | train_config.to_dict(), fingerprint
        self.folder.check_same(self._settings, fingerprint) if resume else self.folder.check_free()
        self._started = resume
        self._device = torch.device("cuda") if torch.cuda.is_available() else torch.get_default_device()
        make: Any = kind
        with random_state(self._device, train_config.seed):
            self._model: Model = make.from_config(config).to(self._device)
        params = dict(self._model.named_parameters())
        self.state = TrainState(params, [init_adamw_state(p) for p in params.values()], 0, math.inf)
        if resume:
            self._restore()

    @property
    def model(self) -> Model:
        """The model with the weights of `state`; they change with every step."""
        return self._model

    def run(self, until: int | None = None) -> TrainState:
        """Train up to max_steps, or up to step `until`, from where the run is; last.pt holds the result.

        Raises:
            NumericalError: NaN or Inf came up; last.pt holds the state before it.
            KeyboardInterrupt: after Ctrl-C, once the step is finished and last.pt written (at once after the second).
            ValueError: `until` is below the run's step or above max_steps.
            OSError: a file cannot be written.
        """
        train, state = self.train_config, self.state
        until = train.max_steps if until is None else until
        if not state.step <= until <= train.max_steps:
            raise ValueError(
                f"until={until} is not allowed: must be {state.step} (the run's step) to {train.max_steps}"
            )
        if not self._started:
            self.folder.start(self._settings, self._fingerprint)
            self._save()
            self._started = True
        saved = state.step
        with Interrupt() as interrupt, TrainingProgress(train.max_steps, state.step, self.quiet) as progress:
            clock, tokens = time.perf_counter(), 0
            try:
                while state.step < until and not interrupt.requested:
                    metrics = self._update()
                    progress.advance(state.step)
                    tokens += metrics["tokens"]
                    ended = state.step == train.max_steps
                    validated = self._validates and (state.step % train.val_freq == 0 or ended)
                    if state.step % train.print_freq == 0 or validated or ended:
                        rate = tokens / (time.perf_counter() - clock)
                        record = {"step": state.step} | metrics | {"tokens_per_second": round(rate, 1)}
                        if validated:
                            record["val_loss"] = self._validated()
                        self.folder.append_metrics(record)
                        progress.update(state.step, record["loss"], rate, record.get("val_loss"))
                        clock, tokens = time.perf_counter(), 0
                    if state.step % train.checkpoint_freq == 0:
                        self._save()
                        saved = state.step
                # Not in a finally: another error may have come between two tensors of an update.
                if saved != state.step:
                    self._save()
            except NumericalError:
                self._save()
                raise
        if interrupt.requested:
            raise KeyboardInterrupt
        return state

    def validate(self) -> float:
        """The loss on what is held out; inf if nothing is."""
        return math.inf

    def _batch(self) -> Any:
        """What the next update learns from."""
        raise NotImplementedError

    def _gradients(self, batch: Any) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """(mean nats, gradients by parameter, predicted tokens) of a batch."""
        raise NotImplementedError

    def _update(self) -> dict[str, Any]:
        """One step; loss, lr, grad_norm and tokens of it."""
        state, train = self.state, self.train_config
        self._model.train()
        mean, gradients, tokens = self._gradients(self._batch())
        params: list[Tensor] = list(state.params.values())
        grads, loss = list(gradients.values()), mean.item()
        grad_norm = clip_grad_norm_(grads, train.max_grad_norm).item()
        _must_be_finite(state.step, loss, grad_norm)
        lr = train.lr * warmup_cosine(state.step, train.warmup_steps, train.max_steps)
        adamw_step_many_(params, grads, state.optimizer, lr, BETAS, EPS, train.wd)
        state.step += 1
        return {
            "loss": shortest_float(loss),
            "lr": shortest_float(lr),
            "grad_norm": shortest_float(grad_norm),
            "tokens": int(tokens),
        }

    def _validated(self) -> float:
        """The validation loss, and best.pt if it is the lowest."""
        loss = validate_loss(self.validate())
        if loss < self.state.best_val_loss:
            self.state.best_val_loss = loss
            self._save(self.folder.best)
        return loss

    def _save(self, path: Path | None = None) -> None:
        state, train = self.state, self.train_config
        lr = train.lr * warmup_cosine(state.step, train.warmup_steps, train.max_steps)
        moments = {"exp_avg": [s.m for s in state.optimizer], "exp_avg_sq": [s.v for s in state.optimizer]}
        steps = [torch.tensor(float(s.t)) for s in state.optimizer]
        save_checkpoint(
            self.folder.last if path is None else path,
            model=export_weights(self._model),
            optimizer=optimizer_dict(train, lr, steps, moments),
            scheduler=scheduler_dict(train, state.step, lr),
            scaler=None,  # bfloat16 has float32's range: nothing has to be scaled
            step=state.step,
            best_val_loss=state.best_val_loss,
        )

    @torch.no_grad()
    def _restore(self) -> None:
        checkpoint = self.folder.load_last(load_checkpoint)
        step, moments = saved_moments(checkpoint, list(self.state.params))
        load_weights(self._model, checkpoint)
        for key, entry in zip(self.state.params, self.state.optimizer):
            entry.m.copy_(moments["exp_avg"][key])
            entry.v.copy_(moments["exp_avg_sq"][key])
            entry.t = step
        best = checkpoint.best_val_loss
        self.state.step, self.state.best_val_loss = step, math.inf if best is None else best
        self.folder.drop_metrics_after(step)


def shortest_float(x: float) -> float:
    """A float32 as the shortest decimal that is still it: 0.0003, not 0.0003000000142492354."""
    return float(str(np.float32(x)))


def _must_be_finite(step: int, loss: float, grad_norm: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NumericalError(
            f"update {step + 1}: the loss is {loss} and the gradients' norm {grad_norm}, both must be finite; nothing "
            f"was updated, and last.pt holds the state after {step} updates. Lower lr, lengthen warmup_steps, or look "
            "at the data"
        )


@contextlib.contextmanager
def random_state(device: torch.device, *words: int) -> Iterator[None]:
    """torch's generators seeded from `words` alone; as they were again afterwards."""
    seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
