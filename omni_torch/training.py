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
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .config import BOS_ID, EOS_ID, PAD_ID, ThinkerConfig, read_config
from .data import token_batch, token_stream
from .layers import check_token_ids, statistics_dtype
from .losses import cross_entropy
from .run_folder import RunFolder, fingerprint_of
from .thinker import ThinkerLM
from .tokenizer import BPETokenizer
from .train_config import TrainConfig
from .training_run import TrainingRun, TrainState, random_state, shortest_float
from .training_text import counted, document_rows, read_documents, split_documents
from .training_utils import NumericalError

__all__ = ["train_step_mse", "accumulated_gradients", "TrainConfig", "TrainState", "Trainer", "train"]

_DROPOUT = 1  # keeps dropout's random numbers apart from what else the seed draws


def train_step_mse(
    model: nn.Module,
    batch: tuple[torch.Tensor, torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> float:
    """One step of training on the mean squared error, with any torch optimizer; returns the loss before the update.

        loss = mean((model(x) − y)²)

    The model is put into training mode and changed in place. The loss is computed in promote_types(dtype, float32).

    Args:
        batch: (x, y); y has exactly the shape of model(x), whatever that is. Nothing is broadcast.

    Raises:
        ValueError: y has another shape than the prediction, or is empty.
        NumericalError: the loss or a gradient is NaN or Inf.

    No parameter and no state of the optimizer has changed then; the forward pass has (BatchNorm's running statistics).
    """
    x, y = batch
    model.train()
    optimizer.zero_grad()  # .grad adds up over backward passes; JAX returns fresh gradients
    with torch.enable_grad():
        loss = _mean_squared_error(model(x), y)
        loss.backward()
    finite = [torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None]
    if not bool(torch.stack([torch.isfinite(loss), *(flag.to(loss.device) for flag in finite)]).all()):
        raise NumericalError(_NOT_FINITE.format(loss=loss.item()))
    optimizer.step()
    return loss.item()


_NOT_FINITE = (
    "the loss is {loss} or a gradient holds NaN or Inf, all must be finite; no parameter was updated. Look at the "
    "batch (debug_training prints its ranges), or lower the learning rate"
)


def _mean_squared_error(pred: Float[Tensor, "*N"], y: Tensor) -> Float[Tensor, ""]:
    # (B, 1) against (B,) would broadcast to (B, B): a loss that falls, of something else.
    if pred.shape != y.shape or y.numel() == 0:
        raise ValueError(
            f"batch: y has shape {tuple(y.shape)} and model(x) {tuple(pred.shape)}: they must be the same, and not "
            "empty; reshape y, for example y[:, None]"
        )
    wide = statistics_dtype(pred.dtype)
    return (pred.to(wide) - y.to(wide)).square().mean()


def accumulated_gradients(
    nats_of: Callable[[Any, Any], tuple[Float[Tensor, ""], Int[Tensor, ""]]],
    params: Mapping[str, Tensor],
    batches: Iterable[Any],
) -> tuple[Float[Tensor, ""], dict[str, Tensor], Int[Tensor, ""]]:
    """Loss and gradients of one big batch from its micro-batches: (loss, gradients like `params`, counted tokens).

        loss = Σ nats / max(Σ tokens, 1)
        gradients = Σ ∇nats / max(Σ tokens, 1)

    Sums over micro-batches, divided once. The mean of their mean losses is something else wherever they count unequal
    numbers of tokens. A micro-batch that counts none adds nothing; if none counts any, loss and gradients are zero.
    One micro-batch's graph is held at a time. Nats are summed in promote_types(dtype, float32), gradients in their
    parameters' dtype.

    >>> w = torch.tensor(1.0, requires_grad=True)
    >>> rows = torch.tensor([[1.0, 2.0, 3.0], [6.0, 0.0, 0.0]])
    >>> def nats_of(params, row):  # zeros are padding: 3 tokens count, then 1
    ...     return (params["w"] * row).sum(), (row != 0).sum()
    >>> loss, gradients, tokens = accumulated_gradients(nats_of, {"w": w}, rows)
    >>> loss.item(), gradients["w"].item(), tokens.item()  # the mean of the means would be 4.0
    (3.0, 3.0, 4)

    Args:
        nats_of: (params, micro-batch) -> (Σ nats over its counted tokens, their number), both scalars; it is 0, not
            0 / 0, where no token counts.
        params: parameters by name; they require gradients. One that nats_of does not use gets zeros.
        batches: micro-batches of any kind and of any lengths, each handed to nats_of as it is.

    Raises:
        ValueError: no micro-batch.
        RuntimeError: (torch's) nats do not depend on any parameter.

    What the mean of the means did to training: https://github.com/huggingface/transformers/issues/34191.
    """
    tensors = list(params.values())
    # Fresh gradients, not .grad: a parameter without any has zeros, as in JAX.
    gradients = {name: torch.zeros_like(p) for name, p in params.items()}
    nats = tokens = None
    for batch in batches:
        with torch.enable_grad():
            micro_nats, count = nats_of(params, batch)
        micro = torch.autograd.grad(micro_nats, tensors, allow_unused=True, materialize_grads=True)
        for total, gradient in zip(gradients.values(), micro, strict=True):
            total += gradient
        micro_nats = micro_nats.detach().to(statistics_dtype(micro_nats.dtype))
        nats = micro_nats if nats is None else nats + micro_nats
        tokens = count if tokens is None else tokens + count
    if nats is None or tokens is None:
        raise ValueError("batches holds no micro-batch, must hold at least 1; an update needs something to learn from")
    divisor = tokens.clamp(min=1)
    for total in gradients.values():
        total /= divisor.to(total.dtype)
    return nats / divisor.to(nats.dtype), gradients, tokens


class Trainer(TrainingRun[ThinkerLM]):
    """Trains a ThinkerLM on a stream of token ids, and keeps the run in a folder.

    An update takes gradient_accumulation_steps micro-batches of batch_size rows, sums nats and gradients over them,
    and divides once by the number of predicted tokens (Σ nats / Σ tokens, right for unequal counts); then clips by the
    global norm, and makes an AdamW update at lr · warmup_cosine(step). Loss or gradients that are not finite end the
    run before anything is changed.

    The folder gets config.json, run.json (a fingerprint of the ids), last.pt (at the start, every checkpoint_freq
    steps, and whenever a run ends), best.pt (at each lowest validation loss) and metrics.jsonl: step, loss of that
    step, lr, grad_norm before clipping, tokens predicted in the step, tokens_per_second, val_loss where it was taken.

    Runs on the first GPU if there is one, else on the CPU. With use_amp the parameters are cast to bfloat16 for each
    forward pass; validation computes in float32.

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

    def validate(self) -> float:
        """Mean nats per predicted token of the validation documents, in evaluation mode; inf if there are none."""
        counts, nats = counted(self._rows_NBT), []
        if not counts:
            return math.inf
        self._model.eval()
        with torch.no_grad():
            for tokens_BT in self._rows_NBT:
                tokens_BT = torch.from_numpy(tokens_BT).to(self._device)
                nats.append(_nats(self._model, self.state.params, tokens_BT, amp=False)[0].item())
        # Summed in float64: float32 would lose digits over many batches.
        return shortest_float(math.fsum(nats) / counts)

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

    def _gradients(self, batch: Int[np.ndarray, "A B T"]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        train = self.train_config

        def nats_of(params: Any, micro_batch: tuple[int, Int[np.ndarray, "B T"]]) -> tuple[Tensor, Tensor]:
            micro, tokens_BT = micro_batch
            with random_state(self._device, train.seed, _DROPOUT, self.state.step, micro):
                return _nats(self._model, params, torch.from_numpy(tokens_BT).to(self._device), amp=train.use_amp)

        return accumulated_gradients(nats_of, self.state.params, enumerate(batch))


def _nats(
    model: nn.Module, params: Mapping[str, Tensor], tokens_BT: Int[Tensor, "B T"], amp: bool
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """(Σ nats over the predicted tokens, their number)."""
    if amp:  # autograd casts the gradients back to the parameters' float32
        params = {key: p.to(torch.bfloat16) for key, p in params.items()}
    targets_BT = tokens_BT[:, 1:].long()
    mean = cross_entropy(torch.func.functional_call(model, dict(params), (tokens_BT[:, :-1].long(),)), targets_BT)
    count = (targets_BT != PAD_ID).sum()
    return mean * count.clamp(min=1), count


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
    check_token_ids(torch.from_numpy(array.astype(np.int64)), config.vocab_size, name)
    return array.astype(np.int32)
