"""Outcomes of mutants made by rule, for the console: survivors first, then the counts by rule and by module."""

from __future__ import annotations

from collections import Counter
from typing import Any

from parity.mutants.by_rule_sites import RULES

__all__ = ["render", "totals"]

COLUMNS = ("killed", "crashed", "not reached", "survived", "equivalent")


def render(report: Any, console: Any) -> None:
    """The survivors one by one, the tables, the totals."""
    from rich.table import Table
    from rich.text import Text

    for outcome in sorted(report.having("survived", "error"), key=lambda o: (o.reason != "", o.id)):
        effect = "moves, within the noise" if outcome.moved else "moves nothing"
        console.print(Text(f"{outcome.status}: {outcome.id}: {effect}: {outcome.check} {outcome.words}".rstrip()))
        if outcome.status == "survived":
            console.print(Text(f"    {outcome.reason or 'not examined'}"))
    for outcome in report.having("equivalent"):
        effect = " (moves, within the noise)" if outcome.moved else ""
        console.print(Text(f"{outcome.id}{effect}: {outcome.reason}"))
    for outcome in report.revived:
        words = f"{outcome.status} by {outcome.check} although examined: {outcome.id}: {outcome.reason}"
        console.print(Text(words + (": the argument is wrong" if outcome in report.refuted else "")))
    for kind, names in (("rule", RULES), ("module", tuple(dict.fromkeys(o.module for o in report.outcomes)))):
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(kind)
        for name in ("mutants", *COLUMNS):
            table.add_column(name, justify="right")
        for name in names:
            count = Counter(o.status for o in report.outcomes if getattr(o, kind) == name)
            if count:
                table.add_row(name, str(sum(count.values())), *(str(count[status]) for status in COLUMNS))
        console.print(table)
    for line in totals(report):
        console.print(Text(line))


def totals(report: Any) -> list[str]:
    """What the run says in sentences."""
    count = Counter(outcome.status for outcome in report.outcomes)
    judged = count["killed"] + count["survived"]
    share = f" ({count['killed'] / judged:.1%})" if judged else ""
    drawn = f", drawn with seed {report.seed} from {report.of}" if report.seed is not None else ""
    lines = [
        f"{len(report.outcomes)} mutants by rule{drawn}; {report.seconds:.0f} s",
        f"{count['killed']} of {judged} that were judged and are not equivalent killed{share}",
        f"no kills: {count['crashed']} crashed, {count['not reached']} on lines that these checks do not run",
        f"{count['survived']} survived, {len(report.unexamined)} of them not examined",
        f"{count['equivalent']} equivalent",
    ]
    if report.refuted:
        lines.append(f"{len(report.refuted)} called equivalent that are not")
    if count["error"]:
        lines.append(f"{count['error']} could not be judged")
    if not report.ended:
        lines.append("interrupted by Ctrl-C: the rest was not run")
    return lines
