"""OmniLM trained on the toy world from scratch, and what it then knows about what it has never met.

Shapes: B rows, T tokens, H height, W width, S samples.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .checkpoint import export_weights, load_weights, save_checkpoint
from .config import EOS_ID, PAD_ID
from .fusion import OmniLM, fuse
from .generation import generate
from .losses import cross_entropy
from .run_folder import fingerprint_of, write_json
from .tokenizer import BPETokenizer
from .train_config import TrainConfig
from .training import accumulated_gradients
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
    run = _WorldRun(out, world_training(max_steps, seed), difficulty, resume, quiet)
    if not resume:
        run.folder.write_tokenizer(run.tokenizer_file)
    start = time.perf_counter()
    run.run()
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
            weights = {key: value.cpu().numpy() for key, value in export_weights(self.model).items()}
            first = first_weights(config, weights, train_config.seed)
            load_weights(self.model, {key: torch.from_numpy(x) for key, x in (weights | first).items()})

    def _batch(self) -> tuple[WorldRows, WorldRows]:
        """The rows of the next update; those of the one after it are drawn while it is made."""
        step = self.state.step
        drawn = self._drawn.get(step) or self._worker.submit(self._rows, step)
        self._drawn = {step + 1: self._worker.submit(self._rows, step + 1)}
        return drawn.result()

    def _gradients(self, batch: tuple[WorldRows, WorldRows]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        def nats_of(params: Any, part: WorldRows) -> tuple[Tensor, Tensor]:
            given = {
                name: None if x is None else torch.from_numpy(x).to(self._device) for name, x in part._asdict().items()
            }
            return _nats(self.model, given)

        return accumulated_gradients(nats_of, self.state.params, batch)


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
