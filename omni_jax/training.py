"""Train steps, and the trainer of ThinkerLM with everything a long run needs: checkpoints, resume, validation, Ctrl-C.

What an update does is a pure function of (weights, moments, seed, step): batches and dropout are drawn from the seed
and the step alone. So a run that was interrupted goes on as if it had not been, in this twin to the last bit, and a
run that the other twin began goes on from its files (dropout's masks differ there: each framework has its generator).

Shapes: A micro-batches of an update, B batch, T time, N any.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from .config import BOS_ID, EOS_ID, PAD_ID, ThinkerConfig, read_config
from .data import token_batch, token_stream
from .layers import check_token_ids, statistics_dtype
from .losses import cross_entropy
from .run_folder import RunFolder, fingerprint_of
from .thinker import ThinkerLM
from .tokenizer import BPETokenizer
from .train_config import TrainConfig
from .training_run import TrainingRun, TrainState, shortest_float
from .training_text import counted, document_rows, read_documents, split_documents
from .training_utils import NumericalError

__all__ = ["train_step_mse", "accumulated_gradients", "TrainConfig", "TrainState", "Trainer", "train"]

Model = TypeVar("Model", bound=nnx.Module)

_DROPOUT = 1  # keeps dropout's random numbers apart from what else the seed draws


def train_step_mse(
    model: Model,
    batch: tuple[Any, Any],
    optimizer: Any,
    opt_state: Any,
) -> tuple[Model, Any, float]:
    """One step of training on the mean squared error, with any optax optimizer; (new model, new state, loss before).

        loss = mean((model(x) − y)²)

    Pure: the given model stays as it was, and the new one is in training mode. Compiled once per structure of the
    model, optimizer and shapes. The loss is computed in promote_types(dtype, float32).

    Args:
        batch: (x, y), arrays of JAX or numpy; y has exactly the shape of model(x), whatever that is. Nothing is
            broadcast.
        optimizer: an optax.GradientTransformation; keep the object, since another one is compiled anew.
        opt_state: at first optimizer.init(nnx.state(model, nnx.Param)), then what the step before returned.

    Raises:
        ValueError: y has another shape than the prediction, or is empty.
        NumericalError: the loss or a gradient is NaN or Inf; model and opt_state are as they were.
    """
    x, y = (jnp.asarray(part) for part in batch)
    new = nnx.clone(model)
    new.train()  # part of the graphdef: one program, whichever mode the given model was in
    graphdef, params, rest = nnx.split(new, nnx.Param, ...)
    params, rest, opt_state, loss, finite = _mse_step(graphdef, optimizer, params, rest, opt_state, x, y)
    if not finite:
        raise NumericalError(_NOT_FINITE.format(loss=float(loss)))
    return nnx.merge(graphdef, params, rest), opt_state, float(loss)


_NOT_FINITE = (
    "the loss is {loss} or a gradient holds NaN or Inf, all must be finite; no parameter was updated. Look at the "
    "batch (debug_training prints its ranges), or lower the learning rate"
)


@partial(jax.jit, static_argnames=("graphdef", "optimizer"))
def _mse_step(graphdef: Any, optimizer: Any, params: Any, rest: Any, opt_state: Any, x: Array, y: Array) -> tuple:
    import optax

    def loss_of(params: Any) -> tuple[Array, Any]:
        model = nnx.merge(graphdef, params, rest, copy=True)  # a copy: its counters move inside this trace
        loss = _mean_squared_error(model(x), y)
        return loss, nnx.split(model, nnx.Param, ...)[2]  # what is no parameter moves too: dropout's counters

    (loss, rest), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    with jax.numpy_dtype_promotion("standard"):  # optax's own code does not run under "strict"
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    finite = jnp.stack([jnp.isfinite(x).all() for x in (loss, *jax.tree.leaves(grads))]).all()
    return params, rest, opt_state, loss, finite


def _mean_squared_error(pred: Float[Array, "*N"], y: Array) -> Float[Array, ""]:
    # (B, 1) against (B,) would broadcast to (B, B): a loss that falls, of something else.
    if pred.shape != y.shape or y.size == 0:
        raise ValueError(
            f"batch: y has shape {tuple(y.shape)} and model(x) {tuple(pred.shape)}: they must be the same, and not "
            "empty; reshape y, for example y[:, None]"
        )
    wide = statistics_dtype(pred.dtype)
    return jnp.mean(jnp.square(pred.astype(wide) - y.astype(wide)))


def accumulated_gradients(
    nats_of: Callable[[Any, Any], tuple[Float[Array, ""], Int[Array, ""]]],
    params: Any,
    batches: Any,
) -> tuple[Float[Array, ""], Any, Int[Array, ""]]:
    """Loss and gradients of one big batch from its micro-batches: (loss, gradients like `params`, counted tokens).

        loss = Σ nats / max(Σ tokens, 1)
        gradients = Σ ∇nats / max(Σ tokens, 1)

    Sums over micro-batches, divided once. The mean of their mean losses is something else wherever they count unequal
    numbers of tokens. A micro-batch that counts none adds nothing; if none counts any, loss and gradients are zero.
    One micro-batch's intermediates are held at a time (lax.scan), and nats_of is traced once however many there are.
    Pure, so that it can stand in a larger program under jit. Nats are summed in promote_types(dtype, float32),
    gradients in their parameters' dtype.

    >>> rows = jnp.array([[1.0, 2.0, 3.0], [6.0, 0.0, 0.0]])
    >>> def nats_of(params, row):  # zeros are padding: 3 tokens count, then 1
    ...     return jnp.sum(params["w"] * row), jnp.sum(row != 0, dtype=jnp.int32)
    >>> loss, gradients, tokens = accumulated_gradients(nats_of, {"w": jnp.array(1.0)}, rows)
    >>> loss.item(), gradients["w"].item(), tokens.item()  # the mean of the means would be 4.0
    (3.0, 3.0, 4)

    Args:
        nats_of: (params, micro-batch) -> (Σ nats over its counted tokens, their number), both scalars; it is 0, not
            0 / 0, where no token counts.
        params: parameters, a tree of arrays. One that nats_of does not use gets zeros.
        batches: micro-batches stacked on a leading axis of every array, any tree; unequal lengths are padded.

    Raises:
        ValueError: no micro-batch, or arrays in `batches` that hold unequal numbers of them.

    What the mean of the means did to training: https://github.com/huggingface/transformers/issues/34191.
    """
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(batches)}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        raise ValueError(
            f"batches has leading axes {sorted(lengths)}, must have the same one everywhere, of length at least 1; "
            "stack the micro-batches"
        )

    def add_micro_batch(totals: tuple, batch: Any) -> tuple[tuple, None]:
        (nats, count), gradients = jax.value_and_grad(nats_of, has_aux=True)(params, batch)
        micro = (nats.astype(wide), jnp.asarray(count, jnp.int32), gradients)
        return jax.tree.map(jnp.add, totals, micro), None

    wide = statistics_dtype(jax.tree.leaves(params)[0].dtype)
    zeros = (jnp.zeros((), wide), jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))
    (nats, tokens, gradients), _ = jax.lax.scan(add_micro_batch, zeros, batches)
    divisor = jnp.maximum(tokens, 1)
    gradients = jax.tree.map(lambda g: g / divisor.astype(g.dtype), gradients)
    return nats / divisor.astype(wide), gradients, tokens


class Trainer(TrainingRun[ThinkerLM]):
    """Trains a ThinkerLM on a stream of token ids, and keeps the run in a folder.

    An update takes gradient_accumulation_steps micro-batches of batch_size rows, sums nats and gradients over them,
    and divides once by the number of predicted tokens (Σ nats / Σ tokens, right for unequal counts); then clips by the
    global norm, and makes an AdamW update at lr · warmup_cosine(step). Loss or gradients that are not finite end the
    run before anything is changed.

    The folder gets config.json, run.json (a fingerprint of the ids), last.pt (at the start, every checkpoint_freq
    steps, and whenever a run ends), best.pt (at each lowest validation loss) and metrics.jsonl: step, loss of that
    step, lr, grad_norm before clipping, tokens predicted in the step, tokens_per_second, val_loss where it was taken.

    Runs on JAX's default device. The update is one compiled program with donated state, and the host waits for it only
    where a line of metrics, a validation or a checkpoint is due. With use_amp the parameters are cast to bfloat16 for
    each forward pass; validation computes in float32.

    Args:
        ids: the training documents end to end, as `token_stream` gives them.
        val_ids: the validation documents likewise; empty for no validation.
        out: the folder; its parents are made.
        resume: go on with the run in `out`, whichever twin began it.
        quiet: show nothing on stderr.

    Raises:
        ValueError: ids that are no ids of the model or fewer than a row (ctx_len + 1); `out` already holds a run and
            `resume` is False, or holds none, or one with other settings or ids, and `resume` is True.
        CheckpointError: last.pt is damaged or not this model's.
    """

    def __init__(
        self,
        config: ThinkerConfig,
        train_config: TrainConfig,
        ids: Int[np.ndarray, " N"],
        val_ids: Int[np.ndarray, " M"],
        out: str | os.PathLike[str],
        resume: bool = False,
        quiet: bool = False,
    ) -> None:
        ids, val_ids = _checked_ids("ids", ids, config), _checked_ids("val_ids", val_ids, config)
        if len(ids) <= config.ctx_len:
            raise ValueError(
                f"ids has {len(ids)} tokens, must have at least ctx_len + 1 = {config.ctx_len + 1}; give more "
                "text, or lower ctx_len"
            )
        self._ids, self._rows_NBT = ids, document_rows(val_ids, config.ctx_len, train_config.batch_size)
        self._validates = len(self._rows_NBT) > 0
        super().__init__(ThinkerLM, config, train_config, fingerprint_of(ids, val_ids), out, resume, quiet)
        model = self.model
        model.eval()
        self._eval_graphdef = nnx.graphdef(model)

    def validate(self) -> float:
        """Mean nats per predicted token of the validation documents, in evaluation mode; inf if there are none."""
        counts = counted(self._rows_NBT)
        if not counts:
            return math.inf
        nats = _validation(self._eval_graphdef, self.state.params, self._rest, self._rows_NBT)
        # Summed in float64: float32 would lose digits over many batches.
        return shortest_float(math.fsum(np.asarray(nats).tolist()) / counts)

    def _batch(self) -> Int[np.ndarray, "A B T"]:
        """The micro-batches of the next update."""
        train = self.train_config
        first = self.state.step * train.gradient_accumulation_steps
        return np.stack(
            [
                token_batch(self._ids, train.batch_size, self.config.ctx_len + 1, train.seed, first + micro)
                for micro in range(train.gradient_accumulation_steps)
            ]
        )

    @staticmethod
    def _gradients(
        graphdef: Any, train_config: TrainConfig, params: Any, rest: Any, step: Array, batch: Int[Array, "A B T"]
    ) -> tuple[Array, Any]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(train_config.seed), _DROPOUT), step)

        def nats_of(params: Any, micro_batch: tuple[Array, Array]) -> tuple[Array, Array]:
            tokens_BT, micro = micro_batch
            streams = _reseeded(rest, jax.random.fold_in(key, micro))
            return _nats(graphdef, params, streams, tokens_BT, train_config.use_amp)

        batches = (batch, jnp.arange(batch.shape[0], dtype=jnp.int32))
        return accumulated_gradients(nats_of, params, batches)[:2]

    def _counted(self, batch: Int[np.ndarray, "A B T"]) -> int:
        return counted(batch)


@partial(jax.jit, static_argnames="graphdef")
def _validation(graphdef: Any, params: Any, rest: Any, rows_NBT: Int[Array, "N B T"]) -> Float[Array, " N"]:
    """Σ nats of each batch, in one program."""
    return jax.lax.map(lambda tokens_BT: _nats(graphdef, params, rest, tokens_BT, amp=False)[0], rows_NBT)


def _nats(
    graphdef: Any, params: Any, rest: Any, tokens_BT: Int[Array, "B T"], amp: bool
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """(Σ nats over the predicted tokens, their number)."""
    if amp:  # the derivative of the cast casts the gradients back to the parameters' float32
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    model = nnx.merge(graphdef, params, rest, copy=True)  # a copy: dropout's counters move inside this trace
    targets_BT = tokens_BT[:, 1:]
    mean = cross_entropy(model(tokens_BT[:, :-1]), targets_BT)
    count = jnp.sum(targets_BT != PAD_ID, dtype=jnp.int32)
    return mean * jnp.maximum(count, 1).astype(mean.dtype), count


def _reseeded(rest: Any, key: Array) -> Any:
    """Dropout's streams, each with a key of its own made from `key`, and their counters at 0."""
    flat = nnx.to_flat_state(rest)
    streams = []
    for i, (path, variable) in enumerate(flat):
        if isinstance(variable, nnx.RngKey):
            value = jax.random.fold_in(key, i)
        else:
            assert isinstance(variable, nnx.RngCount), path  # all state of a ThinkerLM but its parameters
            value = jnp.zeros_like(variable.get_value())
        streams.append((path, variable.replace(value)))
    return nnx.from_flat_state(streams)


def train(
    config_path: str | os.PathLike[str],
    text_path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    tokenizer_path: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    max_steps: int | None = None,
    seed: int | None = None,
    quiet: bool = False,
) -> TrainState:
    """Train by a config file on a text file, and keep the run in the folder `out`: what `train` on the command line is.

    The text is UTF-8, one document a line; blank lines are skipped. A share val_split of the documents, spread evenly
    over the text, is kept for validation. See `Trainer` for the files in `out`; tokenizer.model is there besides.

    Args:
        config_path: a config file with the model's keys, and the training's (those left out get their defaults).
        tokenizer_path: a SentencePiece model of vocab_size pieces; None trains one on the text.
        resume: go on with the run in `out`, whichever twin began it.
        max_steps, seed: take the place of the config file's.

    Raises:
        ValueError: a file that is missing or not what it must be, settings that contradict each other or the text,
            and what `Trainer` refuses; nothing has been written then.
        NumericalError, KeyboardInterrupt, OSError: as `Trainer.run`.
    """
    config_path = Path(config_path)
    report = read_config(config_path)
    config, train_config = report.config, TrainConfig.from_json(config_path)
    given = {"max_steps": max_steps, "seed": seed}
    train_config = dataclasses.replace(
        train_config, **{key: value for key, value in given.items() if value is not None}
    )
    folder = RunFolder(out)
    folder.check_run() if resume else folder.check_free()
    documents = read_documents(text_path)
    tokenizer, model = _tokenizer(folder, config, text_path, tokenizer_path, resume)
    kept, held_out = split_documents([tokenizer.encode(text) for text in documents], train_config.val_split)
    ids = token_stream(kept, BOS_ID, EOS_ID)
    val_ids = token_stream(held_out, BOS_ID, EOS_ID) if held_out else np.zeros(0, np.int32)
    trainer = Trainer(config, train_config, ids, val_ids, out, resume, quiet)
    if model is not None:
        folder.write_tokenizer(model)
    unused = [key for key in report.ignored if key.removeprefix("thinker.") not in train_config.to_dict()]
    if unused and not quiet:
        print(f"{config_path}: not used here: {', '.join(unused)}", file=sys.stderr)
    return trainer.run()


def _tokenizer(
    folder: RunFolder,
    config: ThinkerConfig,
    text_path: str | os.PathLike[str],
    tokenizer_path: str | os.PathLike[str] | None,
    resume: bool,
) -> tuple[BPETokenizer, bytes | None]:
    """The tokenizer of a run, and its file's bytes where they are not in the folder yet."""
    model: bytes | None = None
    path = folder.tokenizer if tokenizer_path is None else Path(tokenizer_path)
    if resume:
        tokenizer = BPETokenizer(folder.tokenizer)
        if path.read_bytes() != folder.tokenizer.read_bytes():
            raise ValueError(
                f"the run in {str(folder.path)!r} cannot be resumed with another tokenizer ({str(path)!r} is not its "
                "tokenizer.model); leave --tokenizer out"
            )
    elif tokenizer_path is not None:
        tokenizer = BPETokenizer(path)
        model = path.read_bytes()
        if folder.tokenizer.exists() and folder.tokenizer.read_bytes() != model:
            raise ValueError(f"{str(folder.tokenizer)!r} is another tokenizer, and not overwritten; remove it first")
    elif folder.tokenizer.exists():
        raise ValueError(
            f"{str(folder.tokenizer)!r} is there already, and not overwritten; give it by --tokenizer, or remove it"
        )
    else:
        with tempfile.TemporaryDirectory() as room:
            path = Path(room) / "tokenizer.model"
            tokenizer = BPETokenizer.train(text_path, path, config.vocab_size)
            model = path.read_bytes()
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"vocab_size={config.vocab_size} is not allowed: must be the tokenizer's {tokenizer.vocab_size} pieces; "
            "change vocab_size in the config, or give another tokenizer"
        )
    return tokenizer, model


def _checked_ids(name: str, ids: Any, config: ThinkerConfig) -> Int[np.ndarray, " N"]:
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{name} has shape {array.shape}, dtype {array.dtype}: must be 1-D integers; see token_stream")
    check_token_ids(array.astype(np.int64), config.vocab_size, name)
    return array.astype(np.int32)
