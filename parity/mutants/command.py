"""`parity mutants`: the catalogue under the checks, as a table. No framework is imported before it runs."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["mutants"]


def mutants(
    gate: Annotated[
        str, typer.Option("--gate", metavar="fast|full", help="fast: each check's smallest fixture; full: all of it.")
    ] = "fast",
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="AREA", help="Bugs of this area only; may be repeated.")
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the outcomes to this file as well.")
    ] = None,
) -> int:
    """Put real bugs into the twins, one at a time, and see whether the check that is meant to catches each.

    Beside each: would np.allclose on the float32 logits have seen it? Exit code 0: all were caught; 1: one survived;
    3: a bug could not be put in, or its check could not look.
    """
    import json

    from parity import cache, runner
    from parity.cli import _console, _plain_progress
    from parity.errors import Misuse
    from parity.mutants import catalogue
    from parity.precision import one_of
    from parity.report import json_file as json_report

    one_of("gate", gate, ("fast", "full"))
    areas = [name.strip() for item in only or () for name in item.split(",") if name.strip()]
    if only and not areas:
        raise Misuse("--only: no area named")
    wanted = catalogue(areas)
    if json_file is not None:
        json_report.check_writable(json_file)
    cache.keep_arrays()
    runner.prepare()
    from parity.mutants import table
    from parity.mutants.gate import run

    with _plain_progress() as progress:
        report = run(wanted, gate, progress)
    table.render(report, _console())
    if json_file is not None:
        json_report.write_text(json.dumps(table.plain(report), indent=1, allow_nan=False) + "\n", json_file)
    return report.exit_code
