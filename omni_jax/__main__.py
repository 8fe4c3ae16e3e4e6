"""The command: `python -m omni_jax train --config FILE --text FILE --out DIR`.

Exit codes: 0 done, 1 the numbers went bad, 2 bad input, 130 interrupted (and saved).
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from .training import train as train_run
from .training_utils import NumericalError

__all__ = ["app", "main"]

# The commands, as typer runs them; later ones stand beside `train`.
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def root() -> None:
    """A small language model and its toolkit, in JAX."""


@app.command()
def train(
    config: Annotated[Path, typer.Option("--config", help="Config file (JSON): the model's and the training's keys.")],
    text: Annotated[Path, typer.Option("--text", help="Training text: UTF-8, one document a line.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run: checkpoints, metrics, tokenizer.")],
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="SentencePiece model; left out, one is trained on the text.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, of either twin.")] = False,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Updates, in place of the config's.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed, in place of the config's.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Train a ThinkerLM on a text file; Ctrl-C saves, and --resume goes on."""
    try:
        state = train_run(config, text, out, tokenizer, resume=resume, max_steps=max_steps, seed=seed, quiet=quiet)
    except (ValueError, OSError) as bad:
        _fail(bad, 2)
    except NumericalError as bad:
        _fail(bad, 1)
    except KeyboardInterrupt:
        print(f"interrupted; go on with --resume if {out / 'last.pt'} is there", file=sys.stderr)
        raise typer.Exit(130) from None
    if not quiet:
        best = f", lowest validation loss {state.best_val_loss:.4f}" if math.isfinite(state.best_val_loss) else ""
        print(f"step {state.step} done{best}; see {out}")


def _fail(bad: Exception, code: int) -> None:
    print(f"error: {' '.join(str(bad).split())}", file=sys.stderr)
    raise typer.Exit(code) from None


def main() -> None:
    """Run the command with the arguments of this process."""
    app(prog_name="python -m omni_jax")


if __name__ == "__main__":
    main()
