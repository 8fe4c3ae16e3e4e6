"""OmniLM trained on the toy world from scratch, and what it then knows about what it has never met.

Shapes: B rows, T tokens, H height, W width, S samples.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .checkpoint import export_weights, load_checkpoint, load_weights, save_checkpoint
from .config import EOS_ID, PAD_ID
from .fusion import OmniLM, fuse
from .generation import generate
from .interrupt import Interrupt
from .losses import cross_entropy
from .omni_config import OmniConfig
from .optim import adamw_step_many_, clip_grad_norm_, init_adamw_state, warmup_cosine
from .progress import TrainingProgress
from .run_folder import RunFolder, fingerprint_of, write_json
from .tokenizer import BPETokenizer
from .train_config import TrainConfig
from .training import TrainState, accumulated_gradients, must_be_finite, random_state, shortest_float
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
    answers and stories are predicted. Ctrl-C saves, and `resume` goes on to the same bits. Where the run is done, the
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
    run.model.eval()
    save_checkpoint(run.folder.path / "model.safetensors", model=run.model, step=run.state.step, best_val_loss=None)
    found: dict[str, Any] = {"steps": run.state.step, "seconds": round(seconds, 1), "difficulty": difficulty}
    found["parameters"] = sum(p.numel() for p in run.state.params.values())
    for split in ("heldout", "validation"):
        found[split] = evaluate_world(run.model, run.tokenizer, seed, split, difficulty=difficulty)
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


@torch.no_grad()
def _answers(model: OmniLM, tokenizer: BPETokenizer, name: str, asked: Asked, zeroed: bool) -> list[str]:
    device = model.thinker.tok_emb.weight.device
    senses: list[Any] = [torch.from_numpy(sense).to(device) for sense in asked.senses]
    senses = [torch.zeros_like(sense) for sense in senses] if zeroed else senses
    given: dict[str, Any] = (
        {"images": senses} if name == "pictures" else {"mels": [model.features(wave) for wave in senses]}
    )
    prompts = [tokenizer.encode(question, add_bos=True) for question in asked.questions]
    made = generate(model, prompts, max_new_tokens=_MOST_NEW, **given)
    return [tokenizer.decode(tokens) for tokens in made.tokens]


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
        self._device = torch.device("cuda") if torch.cuda.is_available() else torch.get_default_device()
        with random_state(self._device, train_config.seed):
            self.model = _fresh(self.config, train_config.seed).to(self._device)
        params = dict(self.model.named_parameters())
        self.state = TrainState(params, [init_adamw_state(p) for p in params.values()], 0, math.inf)
        if resume:
            self._restore()
        else:
            self.folder.write_tokenizer(self._tokenizer_file)
            self.folder.start(self._settings, self._fingerprint)
            self._save()

    def go(self, quiet: bool) -> None:
        """All updates that are left; last.pt holds the result."""
        train, state = self.train_config, self.state
        saved = state.step
        with Interrupt() as interrupt, TrainingProgress(train.max_steps, state.step, quiet) as progress:
            clock, tokens = time.perf_counter(), 0
            try:
                for rows in self._ahead():
                    metrics = self._update(rows)
                    progress.advance(state.step)
                    tokens += metrics["tokens"]
                    if state.step % train.print_freq == 0 or state.step == train.max_steps:
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

    def _update(self, rows: tuple[WorldRows, WorldRows]) -> dict[str, Any]:
        """One step; loss, lr, grad_norm and tokens of it."""
        state, train = self.state, self.train_config
        self.model.train()

        def nats_of(params: Any, part: WorldRows) -> tuple[Tensor, Tensor]:
            given = {
                name: None if x is None else torch.from_numpy(x).to(self._device) for name, x in part._asdict().items()
            }
            return _nats(self.model, given)

        mean, gradients, count = accumulated_gradients(nats_of, state.params, rows)
        grads, loss = list(gradients.values()), mean.item()
        grad_norm = clip_grad_norm_(grads, train.max_grad_norm).item()
        must_be_finite(state.step, loss, grad_norm)
        lr = train.lr * warmup_cosine(state.step, train.warmup_steps, train.max_steps)
        params: list[Tensor] = list(state.params.values())
        adamw_step_many_(params, grads, state.optimizer, lr, BETAS, EPS, train.wd)
        state.step += 1
        return {
            "loss": shortest_float(loss),
            "lr": shortest_float(lr),
            "grad_norm": shortest_float(grad_norm),
            "tokens": int(count),
        }

    def _save(self) -> None:
        state, train = self.state, self.train_config
        lr = train.lr * warmup_cosine(state.step, train.warmup_steps, train.max_steps)
        moments = {"exp_avg": [s.m for s in state.optimizer], "exp_avg_sq": [s.v for s in state.optimizer]}
        steps = [torch.tensor(float(s.t)) for s in state.optimizer]
        save_checkpoint(
            self.folder.last,
            model=export_weights(self.model),
            optimizer=optimizer_dict(train, lr, steps, moments),
            scheduler=scheduler_dict(train, state.step, lr),
            step=state.step,
        )

    @torch.no_grad()
    def _restore(self) -> None:
        checkpoint = self.folder.load_last(load_checkpoint)
        step, moments = saved_moments(checkpoint, list(self.state.params))
        load_weights(self.model, checkpoint)
        for key, entry in zip(self.state.params, self.state.optimizer):
            entry.m.copy_(moments["exp_avg"][key])
            entry.v.copy_(moments["exp_avg_sq"][key])
            entry.t = step
        self.state.step = step
        self.folder.drop_metrics_after(step)


def _fresh(config: OmniConfig, seed: int) -> OmniLM:
    """A model with the first weights."""
    model = OmniLM.from_config(config)
    weights = export_weights(model)
    numbers = {key: value.numpy() for key, value in weights.items()}
    start = {key: torch.from_numpy(value) for key, value in first_weights(config, numbers, seed).items()}
    return load_weights(model, weights | start)


def _nats(model: OmniLM, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(Σ nats over the predicted tokens, their number) of one part of the rows.

    Where all rows have pictures alone, the nats of a second task are added: to name each word of the answers from the
    picture's vector by itself, as it comes before the thinker. The encoder then learns early to tell places and shapes;
    through the thinker alone it takes many times the steps.
    """
    tokens, targets, waves = given["tokens"].long(), given["targets"].long(), given["waves"]
    senses = {"images": given["images"], "has_image": given["has_image"]}
    if waves is not None:
        senses |= {"mel": model.features(waves), "mel_lengths": given["frames"], "has_audio": given["has_audio"]}
    before_BND, there_BN = model.encode(**senses)
    fused = fuse(before_BND, None, model.thinker.tok_emb(tokens), image_mask=there_BN, targets=targets)
    assert fused.targets is not None
    logits_BNV = model.thinker(embeddings=fused.embeddings, attention_mask=fused.attention_mask)
    count = (targets != PAD_ID).sum()
    nats = cross_entropy(logits_BNV, fused.targets) * count.clamp(min=1)
    if waves is None:
        seen_BV = model.thinker.lm_head(model.thinker.norm(before_BND[:, 0])).log_softmax(dim=-1)
        words_BT = (targets != PAD_ID) & (targets != EOS_ID)
        nats = nats - (seen_BV.gather(1, targets) * words_BT).sum()
    return nats, count
