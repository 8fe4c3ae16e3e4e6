"""The command `python -m omni_torch`: train, generate, chat, inspect, convert.

Exit codes: 0 done, 1 the numbers went bad, 2 bad input, 130 interrupted (by Ctrl-C; train saves first).
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from .training_utils import NumericalError

__all__ = ["app", "main"]

# The commands, as typer runs them.
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

# What several commands ask for.
_Checkpoint = Annotated[
    Path, typer.Option("--checkpoint", help="Checkpoint file, or a folder, whose best checkpoint is taken.")
]
_Tokenizer = Annotated[
    Path | None, typer.Option("--tokenizer", help="SentencePiece model; by default tokenizer.model beside it.")
]
_Config = Annotated[
    Path | None, typer.Option("--config", help="Config file of the model, where none lies beside the checkpoint.")
]
_Heads = Annotated[
    int | None, typer.Option("--n-heads", help="Attention heads, where neither a config nor the shapes tell.")
]
_Temperature = Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token every time.")]
_TopK = Annotated[int, typer.Option("--top-k", help="Draw from this many of the likeliest tokens; 0: from all.")]
_TopP = Annotated[float, typer.Option("--top-p", help="Draw from the likeliest tokens that reach this probability.")]
_Penalty = Annotated[
    float, typer.Option("--repetition-penalty", help="Above 1, tokens that were there already become less likely.")
]
_Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        help="Seed of what is drawn. Each twin has its own random numbers: above temperature 0 their texts differ.",
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.callback()
def root() -> None:
    """A small language model and its toolkit, in PyTorch."""


@app.command()
def train(
    out: Annotated[Path, typer.Option("--out", help="Folder of the run: checkpoints, metrics, tokenizer.")],
    task: Annotated[
        str, typer.Option("--task", help="text: ThinkerLM on a text file; world: OmniLM on the toy world.")
    ] = "text",
    config: Annotated[
        Path | None, typer.Option("--config", help="For text: config file (JSON), the model's and the training's keys.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="For text: the training text, UTF-8, one document a line.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", help="For text: SentencePiece model; left out, one is trained on the text."),
    ] = None,
    difficulty: Annotated[int, typer.Option("--difficulty", help="For world: 1 (easy) to 3.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, of either twin.")] = False,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Updates, in place of the config's.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed, in place of the config's.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Train a model on a text file, or on the toy world; Ctrl-C saves, and --resume goes on."""
    with _exit_codes(f"interrupted; go on with --resume if {out / 'last.pt'} is there"):
        if task == "world":
            from .world_train import train_world

            if config is not None or text is not None or tokenizer is not None:
                raise ValueError("--config, --text and --tokenizer are for --task text; the world has its own")
            found = train_world(
                out, max_steps=max_steps, seed=seed or 0, difficulty=difficulty, resume=resume, quiet=quiet
            )
            print(json.dumps(found, indent=2))
            return
        if task != "text":
            raise ValueError(f"--task {task} is not allowed: must be text or world")
        if config is None or text is None:
            raise ValueError("--task text needs --config FILE and --text FILE; give them, or --task world")
        from .training import train as train_run

        state = train_run(config, text, out, tokenizer, resume=resume, max_steps=max_steps, seed=seed, quiet=quiet)
    if not quiet:
        best = f", lowest validation loss {state.best_val_loss:.4f}" if math.isfinite(state.best_val_loss) else ""
        print(f"step {state.step} done{best}; see {out}")


@app.command()
def generate(
    checkpoint: _Checkpoint,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to go on from; - reads it from stdin.")],
    image: Annotated[Path | None, typer.Option("--image", help="Picture to look at, for a model with eyes.")] = None,
    audio: Annotated[Path | None, typer.Option("--audio", help="Sound to listen to, for a model with ears.")] = None,
    tokenizer: _Tokenizer = None,
    config: _Config = None,
    n_heads: _Heads = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Tokens at most; by default as many as the context holds.")
    ] = None,
    temperature: _Temperature = 0.0,
    top_k: _TopK = 0,
    top_p: _TopP = 1.0,
    repetition_penalty: _Penalty = 1.0,
    num_samples: Annotated[int, typer.Option("--num-samples", help="Continuations of the prompt.")] = 1,
    seed: _Seed = 0,
    window: Annotated[
        bool, typer.Option("--window", help="Go beyond the context: every token sees the last ones that fit.")
    ] = False,
    as_json: _Json = False,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Show the text while it is made, or when it is done.")
    ] = None,
) -> None:
    """Print what a model says after a prompt, without the prompt."""
    from .generate_command import run_generate

    with _exit_codes("interrupted"):
        run_generate(
            checkpoint,
            prompt,
            image=image,
            audio=audio,
            tokenizer=tokenizer,
            config=config,
            n_heads=n_heads,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            num_samples=num_samples,
            seed=seed,
            window=window,
            as_json=as_json,
            stream=stream,
        )


@app.command()
def chat(
    checkpoint: _Checkpoint,
    tokenizer: _Tokenizer = None,
    config: _Config = None,
    n_heads: _Heads = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", help="Tokens of a reply at most; by default 256, or half of the context."),
    ] = None,
    temperature: _Temperature = 0.8,
    top_k: _TopK = 0,
    top_p: _TopP = 0.95,
    repetition_penalty: _Penalty = 1.0,
    seed: _Seed = 0,
) -> None:
    """Talk with a model, which goes on from what was said.

    /reset forgets what was said, Ctrl-C ends a reply, /quit or Ctrl-D ends the chat.
    """
    from .chat_command import run_chat

    with _exit_codes("interrupted"):
        run_chat(
            checkpoint,
            tokenizer=tokenizer,
            config=config,
            n_heads=n_heads,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint file, or a folder, whose best checkpoint is taken.")],
    config: _Config = None,
    n_heads: _Heads = None,
    as_json: _Json = False,
) -> None:
    """Say what a checkpoint holds: architecture, parameters, training state."""
    from .inspection import inspect_checkpoint

    with _exit_codes("interrupted"):
        found = inspect_checkpoint(checkpoint, config=config, n_heads=n_heads)
        print(json.dumps(found.to_dict()) if as_json else found)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint file, or a folder, whose best checkpoint is taken.")],
    target: Annotated[Path, typer.Argument(help="File to write; its manifest comes beside it.")],
    kind: Annotated[
        str | None,
        typer.Option("--kind", help="full, legacy, safetensors or multimodal; by default by the name and the source."),
    ] = None,
    split_qkv: Annotated[
        bool | None, typer.Option("--split-qkv/--fuse-qkv", help="Write q, k and v apart, or as one; else as they are.")
    ] = None,
    config: _Config = None,
    n_heads: _Heads = None,
    as_json: _Json = False,
) -> None:
    """Write a checkpoint as another kind, bit for bit, with a manifest of SHA-256 sums."""
    from .conversion import convert_checkpoint

    with _exit_codes("interrupted; the target is as it was"):
        made = convert_checkpoint(source, target, kind, split_qkv=split_qkv, config=config, n_heads=n_heads)
        if as_json:
            print(json.dumps(json.loads(made.to_json())))
            return
        kinds = f"{source} ({made.source_kind}) -> {target} ({made.target_kind})"
        print(f"{kinds}: {len(made.target_arrays)} arrays, no bit changed")
        for name, reason in made.dropped.items():
            print(f"left out: {name} ({reason})")
        for note in made.notes:
            print(note)


@contextmanager
def _exit_codes(interrupted: str) -> Iterator[None]:
    """Turn what a command raises into one line on stderr and an exit code."""
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of stdout has gone: typer ends quietly
    except (ValueError, OSError) as bad:
        words = " ".join(str(bad).split()).replace("window=True", "--window")  # generate has the argument's name
        _fail(f"error: {words}", 2)
    except NumericalError as bad:
        _fail(f"error: {' '.join(str(bad).split())}", 1)
    except KeyboardInterrupt:
        _fail("\n" * sys.stderr.isatty() + interrupted, 130)  # not on the line that it broke off


def _fail(message: str, code: int) -> NoReturn:
    sys.stdout.flush()
    print(message, file=sys.stderr)
    raise typer.Exit(code) from None


def main() -> None:
    """Run the command with the arguments of this process."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stdin, "surrogateescape")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)  # a character or byte that the terminal's encoding has not ends nothing
    app(prog_name="python -m omni_torch")


if __name__ == "__main__":
    main()
