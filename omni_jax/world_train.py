"""OmniLM trained on the toy world from scratch, and what it then knows about what it has never met.

Shapes: B rows, T tokens, H height, W width, S samples.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from .checkpoint import save_checkpoint
from .config import EOS_ID, PAD_ID
from .fusion import OmniLM, fuse
from .generation import generate
from .losses import cross_entropy
from .mel import num_frames
from .run_folder import fingerprint_of, write_json
from .thinker import num_parameters
from .tokenizer import BPETokenizer
from .train_config import TrainConfig
from .training_run import TrainingRun
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
    run = _WorldRun(out, world_training(max_steps, seed), difficulty, resume, quiet)
    if not resume:
        run.folder.write_tokenizer(run.tokenizer_file)
    start = time.perf_counter()
    run.run()
    seconds = time.perf_counter() - start
    model = run.model
    model.eval()
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


class _WorldRun(TrainingRun[OmniLM]):
    """A run on the toy world, whose rows are drawn ahead."""

    def __init__(
        self, out: str | os.PathLike[str], train_config: TrainConfig, difficulty: int, resume: bool, quiet: bool
    ) -> None:
        config = world_config()
        self.tokenizer, self.tokenizer_file = world_tokenizer()
        self._rows = partial(
            world_rows,
            config,
            self.tokenizer,
            train_config.seed,
            "train",
            max_steps=train_config.max_steps,
            difficulty=difficulty,
        )
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._drawn: dict[int, Future[tuple[WorldRows, WorldRows]]] = {}
        super().__init__(OmniLM, config, train_config, fingerprint_of(*row_levels(self._rows(0))), out, resume, quiet)
        if not resume:
            weights = self._by_key(self.state.params)
            self.state.params = self._as_params(weights | first_weights(config, weights, train_config.seed))

    def _batch(self) -> tuple[WorldRows, WorldRows]:
        """The rows of the next update; those of the one after it are drawn while it is made."""
        step = self.state.step
        drawn = self._drawn.get(step) or self._worker.submit(self._rows, step)
        self._drawn = {step + 1: self._worker.submit(self._rows, step + 1)}
        return drawn.result()

    @staticmethod
    def _gradients(
        graphdef: Any, train_config: TrainConfig, params: Any, rest: Any, step: Array, batch: Any
    ) -> tuple[Array, Any]:
        def loss_of(params: Any) -> Array:
            model = nnx.merge(graphdef, params, rest, copy=True)
            nats, counts = zip(*(_nats(model, part) for part in batch), strict=True)
            return sum(nats[1:], nats[0]) / jnp.maximum(sum(counts[1:], counts[0]), 1).astype(nats[0].dtype)

        return jax.value_and_grad(loss_of)(params)

    def _counted(self, batch: tuple[WorldRows, WorldRows]) -> int:
        return sum(int((part.targets != PAD_ID).sum()) for part in batch)


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
