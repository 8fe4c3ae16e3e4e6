"""`parity mutants --by-rule`: the options of mutants made by rule, beside those of the catalogue's command."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

__all__ = ["with_rules"]


def with_rules(command: Callable[..., int]) -> Callable[..., int]:
    """`command` with --by-rule and its options; without --by-rule it is `command`."""
    catalogue, own = inspect.signature(command, eval_str=True), inspect.signature(_by_rule, eval_str=True)
    parameters = {**catalogue.parameters, **{k: p for k, p in own.parameters.items() if k not in catalogue.parameters}}

    @functools.wraps(command)
    def mutants(by_rule: bool = False, **options: Any) -> int:
        if by_rule:
            return _by_rule(**{name: value for name, value in options.items() if name in own.parameters})
        return command(**{name: value for name, value in options.items() if name in catalogue.parameters})

    asked = Annotated[
        bool, typer.Option("--by-rule", help="Instead of real bugs, changes made by rule: +1, <= for <, ...")
    ]
    parameters["by_rule"] = inspect.Parameter(
        "by_rule", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=False, annotation=asked
    )
    mutants.__signature__ = inspect.Signature(list(parameters.values()))  # pyright: ignore[reportAttributeAccessIssue]
    mutants.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return mutants


def _by_rule(
    module: Annotated[
        list[str] | None, typer.Option("--module", metavar="NAME", help="By rule: this module only; may be repeated.")
    ] = None,
    sample: Annotated[
        int | None, typer.Option("--sample", metavar="N", min=1, help="By rule: N of the mutants, drawn at random.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="By rule: seed of the draw.")] = 0,
    ids: Annotated[
        list[str] | None, typer.Option("--id", metavar="ID", help="By rule: this mutant only; may be repeated.")
    ] = None,
    examined: Annotated[
        bool, typer.Option("--examined", help="By rule: judge those again that survived once and were examined.")
    ] = False,
    json_file: str | None = None,
) -> int:
    import json

    from parity import cache, runner
    from parity.cli import _console, _plain_progress
    from parity.mutants.by_rule import by_rule, named
    from parity.mutants.examined import EXAMINED
    from parity.report import json_file as json_report

    every = by_rule([name.strip() for item in module or () for name in item.split(",") if name.strip()])
    if ids is not None:
        every = named(every, ids)
    if examined:
        every = tuple(mutant for mutant in every if mutant.id in EXAMINED)
    if json_file is not None:
        json_report.check_writable(json_file)
    cache.keep_arrays()
    runner.prepare()
    from parity.mutants import by_rule_table
    from parity.mutants.by_rule_gate import run, sampled

    wanted = sampled(every, sample, seed)
    with _plain_progress() as progress:
        report = run(wanted, len(every), seed if len(wanted) < len(every) else None, progress)
    by_rule_table.render(report, _console())
    if json_file is not None:
        json_report.write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n", json_file)
    return report.exit_code
