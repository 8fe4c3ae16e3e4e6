"""Make the shipped weights: corpus, tokenizer, ThinkerLM, and the figures beside them. One command, no download:

    python scripts/train_shipped.py

Writes thinker.pt (the family's "full" format, optimizer included), config.json, tokenizer.model and thinker.json (the
figures) into --out, all of them at the very end. Interrupt it at will: the next call with the same arguments goes on
from the last checkpoint in --work, a minute back at most, and ends in the same bits on the same machine. The recipe is
the family's (AdamW with decay 0.1 on every tensor, clipping at norm 1.0, linear warm-up, half a cosine down to a tenth)
with a larger peak learning rate, since the model is small and the run is short.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that a bare checkout serves, installed or not

import numpy as np  # noqa: E402
import sentencepiece  # noqa: E402
import torch  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402

from omni_torch.checkpoint import save_checkpoint  # noqa: E402
from omni_torch.config import ThinkerConfig  # noqa: E402
from omni_torch.losses import cross_entropy  # noqa: E402
from omni_torch.optim import AdamWState, adamw_step_many_, clip_grad_norm_, init_adamw_state, warmup_cosine  # noqa: E402
from omni_torch.thinker import ThinkerLM  # noqa: E402
from omni_torch.tokenizer import BPETokenizer  # noqa: E402
from parity import corpus, shipped  # noqa: E402

CONFIG = ThinkerConfig(
    vocab_size=1024,
    n_layers=4,
    d_model=96,
    n_heads=4,
    d_ff=192,
    dropout=0.0,  # every batch is new text: there is nothing to overfit
    rope_theta=10000.0,
    ctx_len=512,
    use_gqa=True,
    kv_groups=2,
    use_swiglu=True,
)


@dataclass(frozen=True)
class Recipe:
    """What the weights depend on, beside CONFIG and the code."""

    stories: int = 8_000
    docs_every: int = 40
    tokenizer_stories: int = 4_000  # the tokenizer's text: more stories hold no new words
    batch_size: int = 4
    length: int = 256  # tokens that are predicted in each row: the longest story and some of the next
    max_steps: int = 2_400
    warmup_steps: int = 100
    lr: float = 5e-3  # the family's is 3e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    corpus_seed: int = 0
    init_seed: int = 0
    batch_seed: int = 0
    validation_seed: int = 1  # stories of the training split that no batch holds; the best of these losses is recorded
    validation_stories: int = 20
    heldout_seed: int = 0
    heldout_stories: int = 120
    save_every: int = 100  # steps between checkpoints, where the validation loss is taken too
    threads: int = 1  # sums are split by the number of threads: another number, other last bits


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_whole(path: Path, data: bytes) -> None:
    """All of it or nothing: a crash leaves the old file."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def full_checkpoint(model: ThinkerLM, states: list[AdamWState], recipe: Recipe, step: int, best: float) -> dict:
    """{model, optimizer, scheduler, scaler, step, best_val_loss}, laid out as torch.optim's classes lay theirs out."""
    factor = warmup_cosine(step, recipe.warmup_steps, recipe.max_steps)
    # torch's own objects give the layout (which keys a release has); the values are ours.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: factor)
    optimizer_state, scheduler_state = optimizer.state_dict(), scheduler.state_dict()
    optimizer_state["state"] = {
        index: {"step": torch.tensor(float(state.t)), "exp_avg": state.m, "exp_avg_sq": state.v}
        for index, state in enumerate(states)
    }
    scheduler_state.update(last_epoch=step, _step_count=step + 1, _last_lr=[recipe.lr * factor])
    return {
        "model": model.state_dict(),
        "optimizer": optimizer_state,
        "scheduler": scheduler_state,
        "scaler": None,  # no mixed precision
        "step": step,
        "best_val_loss": best,
    }


@torch.no_grad()
def restore(model: ThinkerLM, states: list[AdamWState], saved: dict[str, Any]) -> int:
    """Put a full checkpoint back; returns its step."""
    model.load_state_dict(saved["model"])
    for index, state in enumerate(states):
        entry = saved["optimizer"]["state"][index]
        state.m.copy_(entry["exp_avg"])
        state.v.copy_(entry["exp_avg_sq"])
        state.t = int(entry["step"])
    return saved["step"]


def train(
    recipe: Recipe, ids: np.ndarray, validation: list[list[int]], partial: Path, fingerprint: str, args
) -> tuple[ThinkerLM, dict, list[float]] | None:
    """The model, its full checkpoint and every step's loss; None if --stop-after ended it early."""
    torch.manual_seed(recipe.init_seed)
    model = ThinkerLM.from_config(CONFIG)
    model.train()
    params: list[torch.Tensor] = list(model.parameters())
    states = [init_adamw_state(p) for p in params]
    first, losses, best = 0, [], float("inf")
    if partial.exists():
        saved = torch.load(partial, map_location="cpu", weights_only=True)
        if saved["fingerprint"] == fingerprint:
            first, losses, best = restore(model, states, saved["full"]), saved["losses"], saved["full"]["best_val_loss"]
            print(f"going on from step {first} of {recipe.max_steps}")
        else:
            print("the checkpoint at hand is of another recipe or corpus: starting anew")

    def save(step: int) -> None:
        buffer = io.BytesIO()
        full = full_checkpoint(model, states, recipe, step, best)
        torch.save({"fingerprint": fingerprint, "losses": losses, "full": full}, buffer)
        write_whole(partial, buffer.getvalue())

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tokens/s, left"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    with Progress(*columns, refresh_per_second=2, disable=args.quiet) as progress:
        task = progress.add_task("", total=recipe.max_steps, completed=first, loss=float("nan"), rate=0.0)
        for step in range(first, recipe.max_steps):
            if step == args.stop_after:
                save(step)
                return None
            batch = corpus.token_batches(ids, recipe.batch_size, recipe.length + 1, recipe.batch_seed, step)
            tokens_BT = torch.from_numpy(batch)
            loss = cross_entropy(model(tokens_BT[:, :-1]), tokens_BT[:, 1:])
            grads = list(torch.autograd.grad(loss, params))
            clip_grad_norm_(grads, recipe.max_grad_norm)
            lr = recipe.lr * warmup_cosine(step, recipe.warmup_steps, recipe.max_steps)
            adamw_step_many_(params, grads, states, lr, recipe.betas, recipe.eps, recipe.weight_decay)
            losses.append(loss.item())
            done = step + 1
            if done % recipe.save_every == 0 or done == recipe.max_steps:
                best = min(best, shipped.model_loss(model, corpus.padded_rows(validation)))
                save(done)
            rate = (done - first) * tokens_BT[:, 1:].numel() / (time.monotonic() - started)
            progress.update(task, completed=done, loss=float(np.mean(losses[-20:])), rate=rate)
    return model, full_checkpoint(model, states, recipe, recipe.max_steps, best), losses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "parity" / "assets", help="where the four files go")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "train_shipped", help="where checkpoints go")
    parser.add_argument("--steps", type=int, help="fewer steps, for a trial (default: the recipe's)")
    parser.add_argument("--stories", type=int, help="fewer stories, for a trial (default: the recipe's)")
    parser.add_argument("--stop-after", type=int, help="save at this step and stop, as an interrupt would")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    recipe, sample_tokens = Recipe(), 160
    if args.steps or args.stories:
        sample_tokens = 8
        if args.out.resolve() == parser.get_default("out"):
            parser.error("a trial must not replace the shipped files: give --out another folder")
        steps, count = args.steps or recipe.max_steps, args.stories or recipe.stories
        trial: dict[str, int] = {
            "max_steps": steps,
            "stories": count,
            "warmup_steps": min(recipe.warmup_steps, steps // 2),
            "heldout_stories": min(recipe.heldout_stories, count),
        }
        recipe = Recipe(**{**asdict(recipe), **trial})
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    started = time.process_time()

    text = corpus.training_text(recipe.corpus_seed, recipe.stories, recipe.docs_every)
    few_stories = min(recipe.tokenizer_stories, recipe.stories)
    tokenizer_text = corpus.training_text(recipe.corpus_seed, few_stories, recipe.docs_every)
    docs = corpus.DOCS.read_text(encoding="utf-8")
    source = args.work / "tokenizer.txt"
    source.write_text(tokenizer_text, encoding="utf-8")
    tokenizer = BPETokenizer.train(source, args.work / "tokenizer.model", CONFIG.vocab_size)
    ids = corpus.flat_ids(tokenizer.encode(line) for line in text.splitlines())
    validation = [
        tokenizer.encode(story) for story in corpus.stories(recipe.validation_seed, recipe.validation_stories)
    ]
    print(f"{recipe.stories:,} stories, {len(ids):,} tokens, vocabulary {tokenizer.vocab_size}")

    fingerprint = sha256(repr((asdict(CONFIG), asdict(recipe), sha256(ids.tobytes()), torch.__version__)).encode())
    partial = args.work / "partial.pt"
    trained = train(recipe, ids, validation, partial, fingerprint, args)
    if trained is None:
        print(f"stopped at step {args.stop_after}; the same command without --stop-after goes on")
        return 0
    model, full, losses = trained

    held_out = [
        tokenizer.encode(story)
        for story in corpus.stories(recipe.heldout_seed, recipe.heldout_stories, split="heldout")
    ]
    held_out_ids = corpus.flat_ids(held_out)
    predicted = len(held_out_ids) - len(held_out)
    nats = corpus.choice_nats(recipe.heldout_seed, recipe.heldout_stories, split="heldout")
    story = next(corpus.stories(recipe.heldout_seed, 1, split="heldout"))
    prompt = ". ".join(story.split(". ")[:3]) + "."
    figures = {
        "heldout": shipped.model_loss(model, corpus.padded_rows(held_out)),
        "heldout_bigram": corpus.bigram_loss(ids, held_out_ids),
        "heldout_unigram": corpus.unigram_loss(ids, held_out_ids),
        "heldout_grammar": nats / predicted,
        "training": float(np.mean(losses[-100:])),
        "best_validation": full["best_val_loss"],
    }
    save_checkpoint(args.work / "thinker.pt", **full)
    tokenizer_bytes = (args.work / "tokenizer.model").read_bytes()
    sidecar = {
        "config": asdict(CONFIG),
        "parameters": sum(p.numel() for p in model.parameters()),
        "command": "python scripts/train_shipped.py",
        "recipe": asdict(recipe),
        "steps": recipe.max_steps,
        "tokens": {
            "corpus": len(ids),
            "seen": recipe.max_steps * recipe.batch_size * recipe.length,
            "heldout_predicted": predicted,
        },
        "loss_nats_per_token": {name: round(value, shipped.DIGITS) for name, value in figures.items()},
        "loss_meaning": {
            "heldout": "this model, in float64, on stories of the held-out split; BOS and PAD are not predicted",
            "heldout_bigram": "the best smoothed bigram of the training ids on the same tokens",
            "heldout_unigram": "add-one smoothed frequencies of the training ids on the same tokens",
            "heldout_grammar": "the choices of the story grammar itself: a reader who knows it needs no more",
            "training": "mean over the last 100 steps, while training",
            "best_validation": "best of the measurements at each checkpoint, on unseen stories of the training split",
        },
        "sample": {"prompt": prompt, "continuation": shipped.greedy(model, tokenizer, prompt, sample_tokens)},
        "sha256": {
            "corpus": sha256(text.encode()),
            "docs": sha256(docs.encode()),
            "tokenizer": sha256(tokenizer_bytes),
            "weights": shipped.weights_digest({key: value.numpy() for key, value in full["model"].items()}),
            "file": sha256((args.work / "thinker.pt").read_bytes()),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__.split("+")[0],
            "numpy": np.__version__,
            "sentencepiece": sentencepiece.__version__,
        },
        "cpu_seconds": round(time.process_time() - started),
    }
    write_whole(args.out / "thinker.pt", (args.work / "thinker.pt").read_bytes())
    write_whole(args.out / "tokenizer.model", tokenizer_bytes)
    write_whole(args.out / "config.json", as_json(asdict(CONFIG)))
    write_whole(args.out / "thinker.json", as_json(sidecar))
    for name in ("partial.pt", "thinker.pt", "tokenizer.model", "tokenizer.txt"):
        (args.work / name).unlink(missing_ok=True)
    print(json.dumps({**sidecar["loss_nats_per_token"], "cpu_seconds": sidecar["cpu_seconds"]}, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
