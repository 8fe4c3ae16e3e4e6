"""`parity locate`: where the twins part, which side left, and why. No framework is imported before it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parity.causes import SECONDS

if TYPE_CHECKING:
    from parity.checks import Scope
    from parity.locate import Location
    from parity.mutants import Mutant

__all__ = ["locate", "of_models", "of_mutant"]

Progress = Callable[[int, int, str], None]


def locate(
    config: Annotated[
        list[str] | None,
        typer.Option("--config", metavar="NAME|FILE", help="A shared configuration or a JSON file; may be repeated."),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", metavar="FILE", help="Compare the twins on these trained weights.")
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE", help="Take the tokens from this UTF-8 text.")
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", metavar="NAME", help="float64, float32, bfloat16 or float16.")
    ] = "float64",
    single_step: Annotated[
        bool, typer.Option("--single-step", help="Feed every part the reference's activation: what is its own error?")
    ] = False,
    mutant: Annotated[
        str | None, typer.Option("--mutant", metavar="ID", help="Put this bug of the catalogue in first, to try it.")
    ] = None,
    score: Annotated[
        bool, typer.Option("--score", help="Over the whole catalogue: how many bugs are placed, and explained?")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="AREA", help="Of --score: bugs of this area; may be repeated.")
    ] = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Of --score: bugs made by rule, on which the rules were not tried.")
    ] = False,
    explain: Annotated[
        float, typer.Option("--explain", min=0, metavar="SECONDS", help="Look so long for the cause, for each place.")
    ] = SECONDS,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of weights, inputs and draws.")] = 0,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write everything to this file as well.")
    ] = None,
) -> int:
    """Say where the twins part: the first tap that differs, the side that left, and the cause where one is found.

    Configurations are taken in turn, until one parts. Exit code 0: they agree; 1: they part; 2: misuse; 3: could not
    look.
    """
    import json

    from parity import cache, runner
    from parity.checks import Scope
    from parity.cli import _console, _plain_progress
    from parity.errors import Misuse
    from parity.precision import settings
    from parity.report import json_file as json_report

    scope = Scope(
        configs=tuple(config or ()),
        precisions=(precision,),
        checkpoint=checkpoint,
        text=text,
        seed=seed,
        controls=False,
    )
    if score and (mutant or config or checkpoint or text):
        raise Misuse(
            "--score: it goes over the catalogue, with the catalogue's own inputs; leave the other options out"
        )
    for option in [name for name, given in (("--only", only), ("--held-out", held_out)) if given and not score]:
        raise Misuse(f"{option}: it picks the bugs of --score; add --score, or leave it out")
    if only and held_out:
        raise Misuse("--only: it picks areas of the catalogue, which --held-out does not take; leave one of them out")
    if mutant and (config or checkpoint or text):
        raise Misuse(f"--mutant {mutant}: it brings its own configuration; leave --config, --checkpoint and --text out")
    runner.validate(scope)
    wanted = None if mutant is None else _mutant(mutant)
    if json_file is not None:
        json_report.check_writable(json_file)
    cache.keep_arrays()
    runner.prepare()
    console = _console()
    if score:
        from parity import attribution
        from parity.mutants import catalogue
        from parity.mutants.held_out import held_out as made_by_rule

        areas = [name.strip() for item in only or () for name in item.split(",") if name.strip()]
        with _plain_progress() as progress:
            if held_out:
                mutants, right = made_by_rule(attribution.RIGHT)
                report = attribution.score(mutants, progress, library=False, right=right)
            else:
                report = attribution.score(catalogue(areas), progress)
        attribution.render(report, console)
        record: Any = report.to_dict()
        code = report.exit_code
    else:
        with _plain_progress() as progress, settings("cpu", "default"):
            if wanted is None:
                found = of_models(scope, single_step, explain, progress)
            else:
                found = [of_mutant(wanted, single_step, seconds=explain)]
        render(found, console, single_step)
        record = [location.to_dict() for location in found]
        code = max((location.exit_code for location in found), default=3)
        code = 1 if any(location.exit_code == 1 for location in found) else code
    if json_file is not None:
        from parity.result import _plain

        json_report.write_text(json.dumps(_plain(record), indent=1, allow_nan=False) + "\n", json_file)
    return code


def _mutant(name: str) -> Mutant:
    import difflib

    from parity.errors import Misuse
    from parity.mutants import catalogue

    every = {m.id: m for m in catalogue()}
    if name not in every:
        near = difflib.get_close_matches(name, every, 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; `parity mutants` lists them"
        raise Misuse(f"--mutant: {name!r} is not in the catalogue{hint}")
    return every[name]


def of_models(
    scope: Scope, single: bool = False, seconds: float = SECONDS, progress: Progress | None = None
) -> list[Location]:
    """A Location for each configuration, up to the first that parts."""
    from pathlib import Path

    from parity.checks import _twins
    from parity.fixtures import CONFIGS, calls_batch, loud_weights
    from parity.locate import locate_pair

    named = scope.configs or ((Path(scope.checkpoint).name,) if scope.checkpoint else tuple(CONFIGS))
    regime = "trained" if scope.checkpoint else "randomised"
    found: list[Location] = []
    for done, config in enumerate(named):
        if progress is not None:
            progress(done, len(named), config)
        made = _twins._prepare(scope, config)
        weights, batch = _twins._inputs(scope, config, "trained" if config == "shipped" else regime)
        location = locate_pair(made.judge, weights, batch, scope.precisions[0], single=single, seconds=seconds)
        if not location.parts and scope.precisions[0] == "float64":  # the calls of other shapes
            loud = loud_weights(made.twins.config, weights)
            calls = locate_pair(made.calls, loud, calls_batch(batch[0], batch[2]), "float64", seconds=seconds)
            location = calls if calls.parts else location
        location.label = f"{config}, {'trained' if config == 'shipped' else regime}"
        found.append(location)
        if location.parts:
            break
    return found


def of_mutant(mutant: Mutant, single: bool = False, model: bool = True, seconds: float = SECONDS) -> Location:
    """Where its check parts under a bug of the catalogue. What is clean is recorded first, so that σ is clean too."""
    from parity import checks
    from parity.errors import CannotLook
    from parity.locate import Location, found_in, watched
    from parity.mutants import inject
    from parity.mutants.gate import Gate, changed, quiet
    from parity.mutants.replay import Recording
    from parity.sides import one_thread

    gate, recording = Gate("fast"), Recording()
    scope = gate.scope(mutant)
    check = checks.load(mutant.check)
    with one_thread():
        inject.forget()
        with recording.running(), watched(every=True) as compared:
            clean = check.run(scope, quiet)
            for judge, weights, inputs, findings in list(compared) if single else ():
                _single(judge, weights, inputs, findings)
        with inject.injected(mutant.edits), recording.running(mutant.side):
            with watched() as compared:
                result = check.run(scope, quiet)
            if result.error:
                raise CannotLook(f"{mutant.check}, with {mutant.id}: {result.error}")
            location = found_in(compared, changed(clean, result), single=single, model=model, seconds=seconds)
    label = f"{mutant.id} ({mutant.side}: {mutant.what})"
    if location is None:
        return Location(scope.precisions[0], [], label=label)
    location.label = f"{label}, {location.label}" if location.label else label
    return location


def _single(judge: Any, weights: Any, inputs: Any, findings: Any) -> None:
    """Record what single-step mode asks of the clean side."""
    import contextlib

    from parity.errors import CannotLook
    from parity.locate import single_step

    with contextlib.suppress(CannotLook):
        single_step(judge, weights, inputs, findings, [])


def render(found: Sequence[Location], console: Any, single: bool = False) -> None:
    """The steps of the last location (all that agreed before it in a line each), then the sentence."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    for location in found[:-1]:
        console.print(Text(location.sentence))
    if not found:
        return
    last = found[-1]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("tap", overflow="fold", ratio=1)
    table.add_column("z with\ninherited input" if single else "z", justify="right", no_wrap=True)
    if single:
        table.add_column("z with\nreference input", justify="right", no_wrap=True)
    table.add_column("side", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for step in last.steps:
        mark = "  <- here" if step.name == last.place else ""
        cells = [f"{step.name.removeprefix('tap ')}{mark}", _number(step.z)]
        cells += [_number(step.own_z)] if single else []
        verdict = (
            step.verdict if step.own_verdict in (None, step.verdict) else f"{step.verdict} (alone {step.own_verdict})"
        )
        table.add_row(*(Text(str(cell)) for cell in (*cells, step.side, verdict)))
    console.print(table)
    for note in last.notes:
        console.print(Text(f"note: {note}"))
    console.print(Text(last.sentence, style="bold red" if last.parts else "bold green"))


def _number(z: float | None) -> str:
    if z is None or z != z:
        return "-"
    return f"{z:.2f}" if z < 1000 else f"{z:.1e}"
