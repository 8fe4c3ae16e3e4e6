"""The `parity` command.

Exit codes: 0 they agree, 1 they do not, 2 misuse, 3 could not look (a missing device, a crashed side, nothing compared,
interrupted by Ctrl-C). No framework is imported before a run starts: `list` and `explain` work without any.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from parity import cache, checks
from parity.causes import SECONDS
from parity.errors import CannotLook, Misuse
from parity.locate_command import locate
from parity.mutants.by_rule_command import with_rules
from parity.mutants.command import mutants

if TYPE_CHECKING:
    from rich.console import Console

    from parity.runner import RunProgress

__all__ = ["AGREE", "CANNOT_LOOK", "DISAGREE", "MISUSE", "app", "main"]

AGREE, DISAGREE, MISUSE, CANNOT_LOOK = 0, 1, 2, 3

app = typer.Typer(
    name="parity",
    help="Are a JAX function and a PyTorch function the same function, to how many bits,"
    " and if not, where do they part?\n\n"
    "Exit codes: 0 they agree, 1 they do not, 2 misuse, 3 could not look.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Command = TypeVar("Command", bound=Callable[..., int])


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="parity")


def _guarded(command: Command) -> Command:
    """Turn what a command returns or raises into an exit code; a traceback only under PARITY_DEBUG=1."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            code = command(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            code = _complain("interrupted by Ctrl-C before any check had begun", CANNOT_LOOK)
        except Misuse as error:
            code = _complain(str(error), MISUSE)
        except CannotLook as error:
            code = _complain(f"could not look: {error}", CANNOT_LOOK)
        except Exception as error:
            from parity.runner import DEBUG_HINT, debugging

            if debugging():
                raise
            code = _complain(f"could not look: {type(error).__name__}: {error} ({DEBUG_HINT})", CANNOT_LOOK)
        raise typer.Exit(code)

    return guarded  # pyright: ignore[reportReturnType]


def _complain(message: str, code: int) -> int:
    print(f"parity: {message}", file=sys.stderr)
    return code


# --- run -------------------------------------------------------------------------------------------------------------


@app.command()
@_guarded
def run(
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="CHECK", help="Run this check only; may be repeated.")
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option("--config", metavar="NAME|FILE", help="A shared configuration or a JSON file; may be repeated."),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", metavar="FILE", help="Judge the twins on these trained weights.")
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE", help="Take the tokens from this UTF-8 text.")
    ] = None,
    audio: Annotated[
        str | None, typer.Option("--audio", metavar="FILE", help="Read this sound file in both twins (check mel).")
    ] = None,
    image: Annotated[
        str | None, typer.Option("--image", metavar="FILE", help="Read this picture in both twins (check image).")
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", metavar="LIST", help="Of float64, float32, bfloat16, float16, by commas.")
    ] = "float64,float32,bfloat16",
    device: Annotated[
        str, typer.Option("--device", metavar="cpu|cuda|tpu", help="Where each side runs in its working precision.")
    ] = "cpu",
    matmul: Annotated[
        str,
        typer.Option(
            "--matmul", metavar="default|highest", help="highest: no TF32 or bfloat16 inside float32 products."
        ),
    ] = "default",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of weights, inputs and draws.")] = 0,
    full: Annotated[
        bool, typer.Option("--full", help="Training runs in full length and over ten seeds; minutes, not seconds.")
    ] = False,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the whole result to this file as well.")
    ] = None,
    figures: Annotated[
        str | None, typer.Option("--figures", metavar="DIR", help="Draw the training runs into this folder, as SVG.")
    ] = None,
    explain: Annotated[
        float,
        typer.Option("--explain", min=0, metavar="SECONDS", help="Of a failure: look so long for causes, in all."),
    ] = SECONDS,
    search: Annotated[
        bool,
        typer.Option(
            "--search", help="Look for inputs on which functions of the twins part; --only then names functions."
        ),
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option("--budget", metavar="N|Ns", help="With --search: evaluations per function, or seconds in all."),
    ] = None,
) -> int:
    """Judge the twins and print one table.

    Exit code 0: they agree; 1: they do not; 2: misuse; 3: could not look (Ctrl-C too).
    """
    from parity import runner
    from parity.report import json_file as json_report

    only_names = tuple(name for item in only or () for name in _split(item))
    if search:
        given = {"config": config, "checkpoint": checkpoint, "text": text, "audio": audio, "image": image}
        given |= {"device": device != "cpu", "matmul": matmul != "default", "full": full, "figures": figures}
        for name in [name for name, value in given.items() if value]:
            raise Misuse(f"--{name}: not with --search, which makes its own inputs on the CPU; leave it out")
        from parity import search_command

        return search_command.run(only_names, budget, seed, _split(precision), json_file)
    if budget is not None:
        raise Misuse(f"--budget {budget}: only a search has one; add --search or leave it out")
    scope = checks.Scope(
        configs=tuple(config or ()),
        precisions=_split(precision),
        device=device,
        checkpoint=checkpoint,
        text=text,
        audio=audio,
        image=image,
        seed=seed,
        full=full,
    )
    runner.validate(scope, only_names, matmul)
    if json_file is not None:
        json_report.check_writable(json_file)
    if figures is not None:
        _make_folder(figures)
    cache.keep_arrays()
    with _progress(len(set(only_names)) or len(checks.CHECKS)) as progress:
        result = runner.run(scope, only_names, progress, matmul=matmul, explain=explain)
    from parity.report import console as console_report

    console_report.render(result, _console())
    if json_file is not None:
        json_report.write(result, json_file)
    if figures is not None:
        from parity.report import trajectory

        drawn = False
        for check in result.checks:
            if check.series:
                path, drawn = os.path.join(figures, f"{check.name}.svg"), True
                try:
                    trajectory.write(check, path)
                    print(f"drawn: {path}", file=sys.stderr)
                except (OSError, CannotLook) as error:  # the verdict outranks its picture
                    print(f"parity: not drawn: {path}: {error}", file=sys.stderr)
        if not drawn:
            print("parity: nothing to draw: only the trajectory check has curves", file=sys.stderr)
    return result.exit_code


def _make_folder(path: str) -> None:
    """A `Misuse` or `CannotLook` now rather than lost pictures after the run."""
    if importlib.util.find_spec("matplotlib") is None:
        raise CannotLook("--figures needs matplotlib, which is not installed: pip install matplotlib")
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise Misuse(f"--figures {path}: cannot make this folder ({error.strerror}); name another") from error


def _split(names: str) -> tuple[str, ...]:
    """ "a, b,a" -> ("a", "b")."""
    return tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))


@contextlib.contextmanager
def _progress(count: int) -> Iterator[RunProgress]:
    """A bar on stderr: current check, done of total, elapsed, time left (as if all checks were of one length)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda *_: None
        return
    started = time.monotonic()
    begun: list[str] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[units]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1.0, units="", left="")

        def progress(check: str, done: int, total: int, label: str) -> None:
            if check not in begun:
                begun.append(check)
            share = (len(begun) - 1 + (min(done / total, 1.0) if total else 0.0)) / count
            left = (time.monotonic() - started) * (1 / share - 1) if share else None
            bar.update(
                task,
                completed=share,
                description=f"{check} ({len(begun)} of {count})",
                units=f"{done}/{total} {label}"[: max(10, console.width - 70)] if total else label,
                left=f"about {left:.0f} s left" if left is not None else "",
            )

        yield progress


def _console() -> Console:
    """Stdout; a closed pipe (`parity run | head`) ends the printing but not the exit code."""
    from rich.console import Console

    class Quiet(Console):
        def on_broken_pipe(self) -> None:
            self.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return Quiet(highlight=False)


# --- list, explain, doctor -------------------------------------------------------------------------------------------


@app.command("list")
@_guarded
def list_checks() -> int:
    """List the checks and what each claims."""
    from rich.padding import Padding

    console = _console()
    for name in checks.CHECKS:
        console.print(name, style="bold", markup=False)
        console.print(Padding(_plain(checks.load(name).CLAIM), (0, 0, 0, 2), expand=False))
    return AGREE


@app.command()
@_guarded
def explain(check: Annotated[str, typer.Argument(metavar="CHECK", help="A name from `parity list`.")]) -> int:
    """Say what a check claims, what it cannot see, and which wrong things it must reject."""
    from rich.padding import Padding

    module, console = checks.load(check), _console()
    for title, text in (("claims", module.CLAIM), ("cannot see", module.BLIND)):
        console.print(f"{check} {title}", style="bold", markup=False)
        console.print(Padding(_plain(text), (0, 0, 1, 2), expand=False))
    console.print(f"{check} must reject (its negative controls)", style="bold", markup=False)
    for name, what in module.CONTROLS.items():
        console.print(Padding(_plain(f"{name}: {what}"), (0, 0, 0, 2), expand=False))
    return AGREE


def _plain(text: str) -> Any:
    """Text as it stands, without the line breaks of the source: no markup is read in it."""
    from rich.text import Text

    return Text(" ".join(text.split()))


@app.command()
@_guarded
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest and the findings as JSON.")] = False,
) -> int:
    """Say what this machine has, and what of it would spoil or limit a run.

    Exit code 0: a run is possible; 3: it is not.
    """
    import dataclasses

    from parity import precision, runner

    runner.prepare()
    seen = precision.manifest()
    findings = precision.warnings(seen)
    if as_json:
        plain = {"manifest": seen, "findings": [dataclasses.asdict(finding) for finding in findings]}
        print(json.dumps(plain, indent=1))
    else:
        _print_doctor(seen, findings)
    return CANNOT_LOOK if any(finding.level == "error" for finding in findings) else AGREE


def _print_doctor(seen: dict[str, Any], findings: list[Any]) -> None:
    from rich.padding import Padding

    console = _console()
    console.print("versions", style="bold")
    versions = ", ".join(f"{name} {version or '(not installed)'}" for name, version in seen["versions"].items())
    console.print(Padding(_plain(versions), (0, 0, 0, 2), expand=False))
    for part in ("cpu", "jax", "torch", "environment"):
        console.print(part, style="bold")
        facts = seen[part] or {"nothing to tell": ""}
        text = ", ".join(f"{name} {_say(value)}".strip() for name, value in facts.items())
        console.print(Padding(_plain(text), (0, 0, 0, 2), expand=False))
    for finding in findings:
        console.print(_plain(f"{finding.level}: {finding.what}"), style="bold")
        console.print(Padding(_plain(f"means: {finding.meaning}"), (0, 0, 0, 2), expand=False))
        console.print(Padding(_plain(f"fix: {finding.fix}"), (0, 0, 0, 2), expand=False))
    if not findings:
        console.print("nothing to say against this machine")


def _say(value: Any) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


# --- calibrate -------------------------------------------------------------------------------------------------------


@app.command("calibrate")
@_guarded
def calibrate_thresholds(
    draws: Annotated[
        int | None,
        typer.Option("--draws", metavar="N", min=1, help="How many clean draws; as in the record if left out."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of configurations, weights, inputs.")] = 0,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the record to this file as well.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="FILE", help="Keep every draw in this file, and go on from those it holds."),
    ] = None,
) -> int:
    """Measure what correct programs score in noise units, and what the thresholds may therefore be.

    Exit code 0: the thresholds in force stand; 1: a draw speaks against them; 3: interrupted (what was drawn is shown).
    """
    from parity import calibrate
    from parity.report import calibration as report
    from parity.report import json_file as json_report

    if json_file is not None:
        json_report.check_writable(json_file)
    if resume is not None:
        json_report.check_writable(resume, "--resume")
    wanted = calibrate.DRAWS if draws is None else draws
    result, ended = calibrate.Calibration(seed, wanted), True
    try:
        with _plain_progress() as progress:
            calibrate.calibrate(wanted, seed, progress, result, resume)
    except KeyboardInterrupt:
        ended = False
    if not result.told:
        return _complain("could not look: no draw was finished", CANNOT_LOOK)
    record = result.record()
    # Not through the console: its line breaks would spoil the tables.
    print(report.markdown(record))
    if json_file is not None:
        report.write(record, json_file)
    objections = calibrate.objections(record)
    for objection in objections:
        print(f"parity: {objection}", file=sys.stderr)
    if not ended:
        print(f"parity: interrupted after {len(result.outcomes)} of {wanted} draws", file=sys.stderr)
    return DISAGREE if objections else AGREE if ended else CANNOT_LOOK


# --- optimizers ------------------------------------------------------------------------------------------------------


@app.command()
@_guarded
def optimizers(
    steps: Annotated[int, typer.Option("--steps", min=1, help="Updates to make.")] = 1000,
    lr: Annotated[float, typer.Option("--lr", min=0.0, help="Learning rate of every step.")] = 1e-3,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of parameters and gradients.")] = 0,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the figures to this file as well.")
    ] = None,
) -> int:
    """AdamW over many float32 steps: both twins, torch.optim and optax against an extended-precision oracle.

    Exit code 0: ours are the nearest; 1: they are not.
    """
    from dataclasses import asdict

    from parity import optimizers as table
    from parity.report import json_file as json_report
    from parity.runner import prepare

    if json_file is not None:
        json_report.check_writable(json_file)
    prepare()
    with _plain_progress() as progress:
        standings = table.compare(table.problem(steps, lr, seed), progress=progress)
    print(f"AdamW, {steps} steps in float32, lr {lr:g}, weight decay {table.HYPER['weight_decay']:g}, seed {seed}")
    print("\n".join(table.lines(standings)))
    told = table.note(standings)
    if json_file is not None:
        record = {"steps": steps, "lr": lr, "seed": seed, "hyper": table.HYPER, "note": told}
        record |= {"standings": [asdict(s) for s in standings]}
        json_report.write_text(json.dumps(record, indent=1) + "\n", json_file)
    return AGREE if told == table.NEAREST else DISAGREE


@contextlib.contextmanager
def _plain_progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr for work whose units are of about one length."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda *_: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def progress(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, description=label[: max(10, console.width - 80)])

        yield progress


app.command()(_guarded(with_rules(mutants)))
app.command()(_guarded(locate))


def _version(asked: bool) -> None:
    if asked:
        from parity.precision import own_version

        print(f"parity {own_version()}")
        raise typer.Exit(AGREE)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass
