"""OmniLM trained on the toy world from scratch, and what it then knows about what it has never met.

Shapes: B rows, T tokens, H height, W width, S samples.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from .checkpoint import export_weights, load_checkpoint, load_weights, save_checkpoint, torch_key
from .config import EOS_ID, PAD_ID
from .fusion import OmniLM, fuse
from .generation import generate
from .interrupt import Interrupt
from .losses import cross_entropy
from .mel import num_frames
from .omni_config import OmniConfig
from .optim import AdamWState, adamw_step, clip_grad_norm, init_adamw_state, warmup_cosine
from .progress import TrainingProgress
from .run_folder import RunFolder, fingerprint_of, write_json
from .thinker import num_parameters
from .tokenizer import BPETokenizer
from .train_config import TrainConfig
from .training import Metrics, TrainState, must_be_finite, named_parameters, shortest_float
from .training_format import BETAS, EPS, optimizer_dict, saved_moments, scheduler_dict
from .training_utils import NumericalError
from .world_batch import (
    Asked,
    WorldRows,
    first_weights,
    row_levels,
    share_right,
    world_config,
    world_questions,
    world_rows,
    world_tokenizer,
    world_training,
)

__all__ = ["train_world", "evaluate_world"]

_MOST_NEW = 12  # tokens of an answer


def train_world(
    out: str | os.PathLike[str],
    *,
    max_steps: int | None = None,
    seed: int = 0,
    difficulty: int = 1,
    resume: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train a small OmniLM on the toy world, keep the run in the folder `out`, and return how well it did.

    An update takes rows with pictures, with clips, with both, and stories, all drawn anew (see world_batch); only
    answers and stories are predicted. Ctrl-C saves, and `resume` goes on. Where the run is done, the
    model answers questions about held-out compositions (`evaluate_world`).

    The folder gets the files of `Trainer` (config.json, run.json, tokenizer.model, last.pt, metrics.jsonl), and at the
    end model.safetensors and metrics.json, what is returned: {"steps", "seconds" (of this call's updates),
    "parameters", "heldout", "validation"}.

    Args:
        max_steps: updates; the schedule of the learning rate depends on it. None takes the default.
        difficulty: 1 (easy) to 3.

    Raises:
        ValueError: a setting out of range; `out` already holds a run and `resume` is False, or holds none, or one with
            other settings, and `resume` is True.
        CheckpointError: last.pt is damaged or not this model's.
        NumericalError: NaN or Inf came up; last.pt holds the state before it.
        KeyboardInterrupt: after Ctrl-C, once the step is finished and last.pt written (at once after the second).
        OSError: a file cannot be written.
    """
    run = _Run(out, world_training(max_steps, seed), difficulty, resume)
    start = time.perf_counter()
    run.go(quiet)
    seconds = time.perf_counter() - start
    model = run.model
    save_checkpoint(run.folder.path / "model.safetensors", model=model, step=run.state.step, best_val_loss=None)
    found: dict[str, Any] = {"steps": run.state.step, "seconds": round(seconds, 1), "difficulty": difficulty}
    found["parameters"] = num_parameters(model)
    for split in ("heldout", "validation"):
        found[split] = evaluate_world(model, run.tokenizer, seed, split, difficulty=difficulty)
    write_json(run.folder.path / "metrics.json", found)
    return found


def evaluate_world(
    model: OmniLM,
    tokenizer: BPETokenizer,
    seed: int = 0,
    split: str = "heldout",
    count: int = 200,
    difficulty: int = 1,
) -> dict[str, Any]:
    """How many of the world's questions the model answers, by its likeliest tokens, each question as a prompt alone.

    Every question about `count` pictures, and the transcripts of `count` clips: an answer is right if all of its
    words are. Beside them are the chance level, that of the commonest answer to each question, and two controls: the
    same questions about black pictures, and silent clips.

    Returns:
        {"pictures": {"accuracy", "chance", "questions", "by_question", "zeroed"}, "clips": the same}.

    Raises:
        ValueError: a split or difficulty that there is not; a model that cannot see or hear.
    """
    pictures, clips = world_questions(seed, split, count, difficulty)
    found = {}
    for name, asked in (("pictures", pictures), ("clips", clips)):
        found[name] = share_right(asked, _answers(model, tokenizer, name, asked, zeroed=False))
        found[name]["zeroed"] = share_right(asked, _answers(model, tokenizer, name, asked, zeroed=True))["accuracy"]
    return found


def _answers(model: OmniLM, tokenizer: BPETokenizer, name: str, asked: Asked, zeroed: bool) -> list[str]:
    senses = [np.zeros_like(sense) for sense in asked.senses] if zeroed else asked.senses
    given: dict[str, Any] = (
        {"images": [jnp.asarray(x) for x in senses]} if name == "pictures" else {"mels": _mels(model, senses)}
    )
    prompts = [tokenizer.encode(question, add_bos=True) for question in asked.questions]
    made = generate(model, prompts, max_new_tokens=_MOST_NEW, **given)
    return [tokenizer.decode(tokens) for tokens in made.tokens]


def _mels(model: OmniLM, waves: list[np.ndarray]) -> list[Array]:
    """Of each wave alone, without a program for every length: padded by zeros, of which the last frames are then cut.

    The end of a wave is reflected beyond it, as `features` does.
    """
    audio = model.config.audio
    assert audio is not None
    reach, longest = audio.n_fft // 2, max(wave.size for wave in waves)
    padded = np.zeros((len(waves), longest + reach), np.float32)
    for row, wave in zip(padded, waves):
        row[: wave.size] = wave
        row[wave.size : wave.size + reach] = wave[-2 : -reach - 2 : -1]
    mel = np.asarray(model.features(jnp.asarray(padded)))
    return [jnp.asarray(x[: num_frames(w.size, audio.n_fft, audio.hop_length)]) for x, w in zip(mel, waves)]


class _Run:
    """A run in its folder, as Trainer's is for text."""

    def __init__(self, out: str | os.PathLike[str], train_config: TrainConfig, difficulty: int, resume: bool) -> None:
        self.train_config, self.difficulty = train_config, difficulty
        self.config = world_config()
        self.folder = RunFolder(out)
        self.folder.check_run() if resume else self.folder.check_free()
        self.tokenizer, self._tokenizer_file = world_tokenizer()
        self._settings = self.config.to_dict() | train_config.to_dict()
        self._fingerprint = fingerprint_of(*row_levels(self._rows(0)))
        if resume:
            self.folder.check_same(self._settings, self._fingerprint)
        names: list[tuple] = []
        nnx.eval_shape(lambda: named_parameters(OmniLM(self.config, rngs=nnx.Rngs(0)), names))
        self._keys = [torch_key(name) for name in names]
        self._graphdef, params, self._rest = nnx.split(_fresh(self.config, train_config.seed), nnx.Param, ...)
        self.state = TrainState(params, init_adamw_state(params), 0, math.inf)
        self._metrics = Metrics(jnp.array(True), *(jnp.zeros((), jnp.float32) for _ in range(3)))
        self._tokens = 0
        if resume:
            self._restore()
        else:
            self.folder.write_tokenizer(self._tokenizer_file)
            self.folder.start(self._settings, self._fingerprint)
            self._save()

    @property
    def model(self) -> OmniLM:
        """A model with the weights of `state`, in evaluation mode; the next step takes their memory."""
        model = nnx.merge(self._graphdef, self.state.params, self._rest, copy=True)
        model.eval()
        return model

    def go(self, quiet: bool) -> None:
        """All updates that are left; last.pt holds the result."""
        train, state = self.train_config, self.state
        saved = state.step
        with Interrupt() as interrupt, TrainingProgress(train.max_steps, state.step, quiet) as progress:
            clock, tokens = time.perf_counter(), 0
            try:
                for rows in self._ahead():
                    tokens += self._update(rows)
                    progress.advance(state.step)
                    if state.step % train.print_freq == 0 or state.step == train.max_steps:
                        metrics = self._read_metrics()  # waits for the device
                        rate = tokens / (time.perf_counter() - clock)
                        record = {"step": state.step} | metrics | {"tokens_per_second": round(rate, 1)}
                        self.folder.append_metrics(record)
                        progress.update(state.step, record["loss"], rate)
                        clock, tokens = time.perf_counter(), 0
                    if state.step % train.checkpoint_freq == 0:
                        self._save()
                        saved = state.step
                    if interrupt.requested:
                        break
                if saved != state.step:
                    self._save()
            except NumericalError:
                self._save()
                raise
        if interrupt.requested and state.step < train.max_steps:
            raise KeyboardInterrupt

    def _rows(self, step: int) -> tuple[WorldRows, WorldRows]:
        train = self.train_config
        return world_rows(self.config, self.tokenizer, train.seed, "train", step, train.max_steps, self.difficulty)

    def _ahead(self) -> Iterator[tuple[WorldRows, WorldRows]]:
        """The rows of each update that is left, drawn while the one before is made."""
        steps = range(self.state.step, self.train_config.max_steps)
        with ThreadPoolExecutor(max_workers=1) as worker:
            drawn = worker.submit(self._rows, self.state.step)
            for step in steps:
                rows = drawn.result()
                drawn = worker.submit(self._rows, step + 1)
                yield rows

    def _update(self, rows: tuple[WorldRows, WorldRows]) -> int:
        """Hand one step to the device, and return how many tokens it predicts, without waiting."""
        state = self.state
        state.params, state.optimizer, self._metrics = _train_step(
            self._graphdef, self.train_config, state.params, state.optimizer, self._metrics, self._rest, rows
        )
        state.step += 1
        self._tokens = sum(int((part.targets != PAD_ID).sum()) for part in rows)
        return self._tokens

    def _read_metrics(self) -> dict[str, Any]:
        """Loss, lr, grad_norm and tokens of the last step, once it is known that no step went bad."""
        ok, loss, grad_norm, lr = jax.device_get(self._metrics)
        if not ok:
            # From the bad update on, the device changed nothing, and its count of updates stood still.
            self.state.step = int(self.state.optimizer.t)
            self._metrics = self._metrics._replace(ok=jnp.array(True))
            must_be_finite(self.state.step, float(loss), float(grad_norm))
        return {
            "loss": shortest_float(loss),
            "lr": shortest_float(lr),
            "grad_norm": shortest_float(grad_norm),
            "tokens": self._tokens,
        }

    def _save(self) -> None:
        self._read_metrics()  # nothing is written before the updates are known to be good
        state, train = self.state, self.train_config
        lr = shortest_float(train.lr * warmup_cosine(state.step, train.warmup_steps, train.max_steps))
        moments = {"exp_avg": self._in_torch_order(state.optimizer.m)}
        moments["exp_avg_sq"] = self._in_torch_order(state.optimizer.v)
        steps = [np.array(state.step, np.float32) for _ in self._keys]
        save_checkpoint(
            self.folder.last,
            model=self._by_key(state.params),
            optimizer=optimizer_dict(train, lr, steps, moments),
            scheduler=scheduler_dict(train, state.step, lr),
            step=state.step,
        )

    def _by_key(self, tree: Any) -> dict[str, Any]:
        """A tree like the parameters' by torch key and in torch's layout."""
        return export_weights(nnx.merge(self._graphdef, tree, self._rest, copy=True))

    def _in_torch_order(self, tree: Any) -> list[Any]:
        arrays = self._by_key(tree)
        return [arrays[key] for key in self._keys]

    def _restore(self) -> None:
        checkpoint = self.folder.load_last(load_checkpoint)
        step, moments = saved_moments(checkpoint, self._keys)

        def tree_of(arrays: Any) -> Any:
            model = nnx.merge(self._graphdef, self.state.params, self._rest, copy=True)
            return nnx.state(load_weights(model, arrays), nnx.Param)

        m, v = (tree_of(moments[name]) for name in ("exp_avg", "exp_avg_sq"))
        optimizer = AdamWState(m=m, v=v, t=jnp.array(step, jnp.int32))
        self.state = TrainState(tree_of(checkpoint), optimizer, step, math.inf)
        self.folder.drop_metrics_after(step)


def _fresh(config: OmniConfig, seed: int) -> OmniLM:
    """A model with the first weights."""
    model = OmniLM.from_config(config, rngs=nnx.Rngs(seed))
    weights = export_weights(model)
    numbers: dict[str, Any] = dict(weights)
    return load_weights(model, numbers | first_weights(config, numbers, seed))


@partial(jax.jit, static_argnames=("graphdef", "train_config"), donate_argnames=("params", "optimizer", "before"))
def _train_step(
    graphdef: Any,
    train_config: TrainConfig,
    params: Any,
    optimizer: AdamWState,
    before: Metrics,
    rest: Any,
    rows: tuple[WorldRows, WorldRows],
) -> tuple[Any, AdamWState, Metrics]:
    """The update, compiled once for a run: (params, optimizer, metrics), unchanged if it, or one before, went bad."""
    train = train_config

    def loss_of(params: Any) -> Array:
        model = nnx.merge(graphdef, params, rest, copy=True)
        nats, counts = zip(*(_nats(model, part) for part in rows), strict=True)
        return sum(nats[1:], nats[0]) / jnp.maximum(sum(counts[1:], counts[0]), 1).astype(nats[0].dtype)

    loss, grads = jax.value_and_grad(loss_of)(params)
    grads, grad_norm = clip_grad_norm(grads, train.max_grad_norm)
    lr = train.lr * warmup_cosine(optimizer.t, train.warmup_steps, train.max_steps)
    new = adamw_step(params, grads, optimizer, lr, BETAS, EPS, train.wd)
    # The host looks later: a bad update, and all after it, leave the state as it was.
    ok = before.ok & jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    new_params, new_optimizer = jax.tree.map(lambda n, o: jnp.where(ok, n, o), tuple(new), (params, optimizer))
    metrics = Metrics(ok, loss, grad_norm, jnp.asarray(lr, jnp.float32))
    return new_params, new_optimizer, jax.tree.map(lambda n, o: jnp.where(before.ok, n, o), metrics, before)


def _nats(model: OmniLM, part: Any) -> tuple[Array, Array]:
    """(Σ nats over the predicted tokens, their number) of one part of the rows, traced WorldRows.

    Where all rows have pictures alone, the nats of a second task are added: to name each word of the answers from the
    picture's vector by itself, as it comes before the thinker. The encoder then learns early to tell places and shapes;
    through the thinker alone it takes many times the steps.
    """
    senses: dict[str, Any] = {"images": part.images, "has_image": part.has_image}
    if part.waves is not None:
        mel = model.features(part.waves)
        senses |= {"mel": mel, "mel_lengths": part.frames, "has_audio": part.has_audio}
    before_BND, there_BN = model.encode(**senses)
    fused = fuse(before_BND, None, model.thinker.tok_emb(part.tokens), image_mask=there_BN, targets=part.targets)
    assert fused.targets is not None
    logits_BNV = model.thinker(embeddings=fused.embeddings, attention_mask=fused.attention_mask)
    count = jnp.sum(part.targets != PAD_ID, dtype=jnp.int32)
    mean = cross_entropy(logits_BNV, fused.targets)
    nats = mean * jnp.maximum(count, 1).astype(mean.dtype)
    if part.waves is None:
        seen_BV = jax.nn.log_softmax(model.thinker.lm_head(model.thinker.norm(before_BND[:, 0])), axis=-1)
        words_BT = (part.targets != PAD_ID) & (part.targets != EOS_ID)
        named_BT = jnp.take_along_axis(seen_BV, part.targets, axis=1)
        nats = nats - jnp.sum(jnp.where(words_BT, named_BT, 0.0))
    return nats, count
