"""A training run in its folder, whatever it trains: updates, metrics, checkpoints, resume, validation, Ctrl-C."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from .checkpoint import export_weights, load_checkpoint, load_weights, save_checkpoint, torch_key
from .interrupt import Interrupt
from .optim import AdamWState, adamw_step, clip_grad_norm, init_adamw_state, warmup_cosine
from .progress import TrainingProgress
from .run_folder import RunFolder
from .train_config import TrainConfig
from .training_format import BETAS, EPS, optimizer_dict, saved_moments, scheduler_dict
from .training_utils import NumericalError, validate_loss

__all__ = ["TrainState", "TrainingRun"]

Model = TypeVar("Model", bound=nnx.Module)


@dataclass
class TrainState:
    """Where a run is: all that its next step depends on beside the configuration and the text.

    params: parameters, a tree as nnx.split gives it (donated to the next step: copy what must outlive it); optimizer:
    AdamW's moments, trees alike; step: updates made; best_val_loss: the lowest validation loss so far, nats per token,
    inf before the first.
    """

    params: Any
    optimizer: AdamWState
    step: int
    best_val_loss: float


class _Metrics(NamedTuple):
    """What an update leaves on the device beside the state; from the first bad update on, that one's."""

    ok: Array
    loss: Array
    grad_norm: Array
    lr: Array


class TrainingRun(Generic[Model]):
    """A run in its folder: all but what is learnt from; see `Trainer`, which learns from text.

    A subclass says that by `_batch`, `_gradients` and `_counted`, and validates by `validate` where it sets
    `_validates`. The update is one compiled program with donated state, and the host waits for it only where a line of
    metrics, a validation or a checkpoint is due.

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
        make: Any = kind  # its from_config is the constructor in a trace, so that the names come in their order
        names: list[tuple] = []
        nnx.eval_shape(lambda: _named_parameters(make.from_config(config, rngs=nnx.Rngs(0)), names))
        self._keys = [torch_key(name) for name in names]
        model: Model = make.from_config(config, rngs=nnx.Rngs(train_config.seed))
        model.train()
        self._graphdef, params, self._rest = nnx.split(model, nnx.Param, ...)
        self.state = TrainState(params, init_adamw_state(params), 0, math.inf)
        if resume:
            self._restore()
        self._metrics = _Metrics(jnp.array(True), *(jnp.zeros((), jnp.float32) for _ in range(3)))
        self._tokens = 0

    @property
    def model(self) -> Model:
        """A model with the weights of `state`, in training mode; the next step takes their memory."""
        return nnx.merge(self._graphdef, self.state.params, self._rest, copy=True)

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
                    tokens += self._update()
                    progress.advance(state.step)
                    ended = state.step == train.max_steps
                    validated = self._validates and (state.step % train.val_freq == 0 or ended)
                    if state.step % train.print_freq == 0 or validated or ended:
                        metrics = self._read_metrics()  # waits for the device
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
        """What the next update learns from, arrays of the same shapes every time."""
        raise NotImplementedError

    @staticmethod
    def _gradients(
        graphdef: Any, train_config: TrainConfig, params: Any, rest: Any, step: Array, batch: Any
    ) -> tuple[Array, Any]:
        """(mean nats, gradients) of a batch; a part of the compiled program."""
        raise NotImplementedError

    def _counted(self, batch: Any) -> int:
        """How many tokens a batch predicts."""
        raise NotImplementedError

    def _update(self) -> int:
        """Hand one step to the device, and return how many tokens it predicts, without waiting."""
        state, batch = self.state, self._batch()
        state.params, state.optimizer, self._metrics = _train_step(
            self._gradients, self._graphdef, self.train_config, state.params, state.optimizer, self._metrics,
            self._rest, batch,
        )  # fmt: skip
        state.step += 1
        self._tokens = self._counted(batch)
        return self._tokens

    def _read_metrics(self) -> dict[str, Any]:
        """Loss, lr, grad_norm and tokens of the last step, once it is known that no step went bad."""
        ok, loss, grad_norm, lr = jax.device_get(self._metrics)
        if not ok:
            # From the bad update on, the device changed nothing, and its count of updates stood still.
            self.state.step = int(self.state.optimizer.t)
            self._metrics = self._metrics._replace(ok=jnp.array(True))
            _must_be_finite(self.state.step, float(loss), float(grad_norm))
        return {
            "loss": shortest_float(loss),
            "lr": shortest_float(lr),
            "grad_norm": shortest_float(grad_norm),
            "tokens": self._tokens,
        }

    def _validated(self) -> float:
        """The validation loss, and best.pt if it is the lowest."""
        loss = validate_loss(self.validate())
        if loss < self.state.best_val_loss:
            self.state.best_val_loss = loss
            self._save(self.folder.best)
        return loss

    def _save(self, path: Path | None = None) -> None:
        self._read_metrics()  # nothing is written before the updates are known to be good
        state, train = self.state, self.train_config
        lr = shortest_float(train.lr * warmup_cosine(state.step, train.warmup_steps, train.max_steps))
        moments = {"exp_avg": self._in_torch_order(state.optimizer.m)}
        moments["exp_avg_sq"] = self._in_torch_order(state.optimizer.v)
        steps = [np.array(state.step, np.float32) for _ in self._keys]
        save_checkpoint(
            self.folder.last if path is None else path,
            model=self._by_key(state.params),
            optimizer=optimizer_dict(train, lr, steps, moments),
            scheduler=scheduler_dict(train, state.step, lr),
            scaler=None,  # bfloat16 has float32's range: nothing has to be scaled
            step=state.step,
            best_val_loss=state.best_val_loss,
        )

    def _by_key(self, tree: Any) -> dict[str, Any]:
        """A tree like the parameters' by torch key and in torch's layout."""
        return export_weights(nnx.merge(self._graphdef, tree, self._rest))

    def _in_torch_order(self, tree: Any) -> list[Any]:
        arrays = self._by_key(tree)
        return [arrays[key] for key in self._keys]

    def _restore(self) -> None:
        checkpoint = self.folder.load_last(load_checkpoint)
        step, moments = saved_moments(checkpoint, self._keys)
        m, v = (self._as_params(moments[name]) for name in ("exp_avg", "exp_avg_sq"))
        best = checkpoint.best_val_loss
        self.state = TrainState(
            params=self._as_params(checkpoint),
            optimizer=AdamWState(m=m, v=v, t=jnp.array(step, jnp.int32)),
            step=step,
            best_val_loss=math.inf if best is None else best,
        )
        self.folder.drop_metrics_after(step)

    def _as_params(self, arrays: Any) -> Any:
        """A tree like the parameters' from arrays by torch key and in torch's layout."""
        return nnx.state(load_weights(self.model, arrays), nnx.Param)


@partial(
    jax.jit,
    static_argnames=("gradients_of", "graphdef", "train_config"),
    donate_argnames=("params", "optimizer", "before"),
)
def _train_step(
    gradients_of: Any,
    graphdef: Any,
    train_config: TrainConfig,
    params: Any,
    optimizer: AdamWState,
    before: _Metrics,
    rest: Any,
    batch: Any,
) -> tuple[Any, AdamWState, _Metrics]:
    """The update, compiled once for a run: (params, optimizer, metrics), unchanged if it, or one before, went bad."""
    train = train_config
    loss, grads = gradients_of(graphdef, train, params, rest, optimizer.t, batch)
    grads, grad_norm = clip_grad_norm(grads, train.max_grad_norm)
    lr = train.lr * warmup_cosine(optimizer.t, train.warmup_steps, train.max_steps)
    new_params, new_optimizer = adamw_step(params, grads, optimizer, lr, BETAS, EPS, train.wd)
    # The host looks later: a bad update, and all after it, leave the state as it was.
    ok = before.ok & jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    new = (new_params, new_optimizer)
    new_params, new_optimizer = jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, (params, optimizer))
    metrics = _Metrics(ok, loss, grad_norm, jnp.asarray(lr, jnp.float32))
    return new_params, new_optimizer, jax.tree.map(lambda n, o: jnp.where(before.ok, n, o), metrics, before)


def _named_parameters(model: nnx.Module, names: list[tuple], path: tuple = ()) -> nnx.Module:
    """Append the paths of the parameters to `names` in the order of their definition, torch's; returns the model."""
    for name, value in vars(model).items():
        if isinstance(value, nnx.Param):
            names.append((*path, name))
        elif isinstance(value, nnx.Module):
            _named_parameters(value, names, (*path, name))
    return model


def shortest_float(x: Any) -> float:
    """A float32 as the shortest decimal that is still it: 0.0003, not 0.0003000000142492354."""
    return float(str(np.float32(x)))


def _must_be_finite(step: int, loss: float, grad_norm: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NumericalError(
            f"update {step + 1}: the loss is {loss} and the gradients' norm {grad_norm}, both must be finite; nothing "
            f"was updated, and last.pt holds the state after {step} updates. Lower lr, lengthen warmup_steps, or look "
            "at the data"
        )
