"""The result for a reader at a terminal: one table, a line for whatever does not agree, a line of totals.

Words carry the meaning, colours only repeat it; without a terminal there are none.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from parity.report.trajectory import console_lines
from parity.result import CheckResult, Row, RunResult
from parity.verdict import Verdict

__all__ = ["FEW", "render", "summary"]

FEW = 3
"""So many names of a kind on the screen; the JSON file has them all."""

WIDE = 100
"""Columns from which the table spells its headings out."""

LEGEND = (
    "effective bits: what the noise leaves; accurate bits: what the answer has;\n"
    "z: how far the two sides are apart, in noise units"
)

STYLES = {
    Verdict.AGREE: "green",
    Verdict.UNDETERMINED: "cyan",
    Verdict.PINNED: "yellow",
    Verdict.UNSTABLE: "yellow",
    Verdict.DIFFER: "bold red",
    None: "bold magenta",
}
NO_ANSWER = "NO ANSWER"
"""In the verdict column of a check that could not look; the line below the table says why."""


def render(result: RunResult, console: Console) -> None:
    """Print `result` on `console`."""
    wide = console.width >= WIDE
    console.print(_table(result, wide))
    console.print(Text(LEGEND, style="dim"))
    for check in result.checks:
        for block in _details(check):
            console.print(block)
    for note in result.notes:
        console.print(Text(f"note: {note}"))
    console.print(Text(summary(result)))
    console.print(_outcome(result))


def summary(result: RunResult) -> str:
    """The line of totals: what was looked at, how long it took, on which devices."""
    counts = result.counts
    devices = "CPU only" if result.devices == ["cpu"] else "; ".join(result.devices) or "none"
    return (
        f"{_count(counts['configurations'], 'configuration')}, {_count(counts['tensors'], 'tensor')}, "
        f"{_count(counts['comparisons'], 'comparison')}, {counts['undetermined']} undetermined, "
        f"{result.seconds:.1f} s ({result.cpu_seconds:.1f} s of CPU time), devices: {devices}"
    )


def _table(result: RunResult, wide: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("tensors", justify="right", no_wrap=True)
    table.add_column("worst tensor", overflow="fold", ratio=1)
    table.add_column("side", no_wrap=True)
    table.add_column("effective\nbits" if wide else "eff.\nbits", justify="right", no_wrap=True)
    table.add_column("accurate\nbits" if wide else "acc.\nbits", justify="right", no_wrap=True)
    table.add_column("z of same\nfunction" if wide else "z\nsame", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for check in result.checks:
        worst, verdict = check.worst, check.verdict
        bits = _bits(worst)
        table.add_row(
            check.name,
            str(len({(row.config, row.regime, row.name) for row in check.deciding})),
            Text(_name(worst, "\n", wide) if worst else "none"),
            "jax\ntorch" if bits else "",
            "\n".join(bits[:2]),
            "\n".join(bits[2:]),
            _number(worst.z_same, 2) if worst else "",
            Text(verdict or NO_ANSWER, style=STYLES[verdict]),
        )
    return table


def _bits(row: Row | None) -> list[str]:
    """Effective bits of jax and torch, then accurate bits; nothing for a row that has no bits (a statistic)."""
    if row is None:
        return []
    values = [row.effective_jax, row.effective_torch, row.accurate_jax, row.accurate_torch]
    return [_number(value, 1) for value in values] if any(value is not None for value in values) else []


def _details(check: CheckResult) -> Iterable[RenderableType]:
    """What the table could not say of a check, gravest first."""
    if check.error is not None:
        yield _line(check.name, "could not look", check.error, None)
    for control in check.controls:
        if not control.rejected:
            evidence = f"it accepted what it must reject, {control.name!r}: {control.evidence}"
            yield _line(check.name, "the check itself is wrong", evidence, None)
    if check.error is None and not check.deciding:
        yield _line(check.name, "could not look", "nothing was compared", None)
    counts = Counter(row.verdict for row in check.deciding)
    for verdict in (Verdict.DIFFER, Verdict.UNSTABLE, Verdict.PINNED):
        if counts[verdict]:
            yield from _rows(check, verdict, counts[verdict])
    if check.located:
        yield _line(check.name, "located", check.located, Verdict.DIFFER)
    if counts[Verdict.UNDETERMINED]:
        yield from _undetermined(check, counts[Verdict.UNDETERMINED])
    for note in check.notes:
        yield Text(f"{check.name}: {note}")
    if check.series:
        yield Text("\n".join([f"{check.name}:", *console_lines(check)]))
    third = [row for row in check.rows if not row.decides]
    if third:
        yield _third_parties(check.name, third)


def _rows(check: CheckResult, verdict: Verdict, count: int) -> Iterable[RenderableType]:
    rows = [row for row in check.deciding if row.verdict is verdict]
    rows.sort(key=lambda row: row.excess if row.excess is not None else 0.0, reverse=True)
    yield _line(check.name, str(verdict), f"{count} of {_count(len(check.deciding), 'comparison')}", verdict)
    for row in rows[:FEW]:
        yield Padding(Text(f"{_name(row)}: {row.evidence}"), (0, 0, 0, 2), expand=False)
    if count > FEW:
        yield Padding(Text(f"and {count - FEW} more (--json FILE lists all)"), (0, 0, 0, 2), expand=False)


def _undetermined(check: CheckResult, count: int) -> Iterable[RenderableType]:
    rows = [row for row in check.deciding if row.verdict is Verdict.UNDETERMINED]
    names = ", ".join(_name(row) for row in rows[:FEW])
    more = f", and {count - FEW} more (--json FILE lists all)" if count > FEW else ""
    what = f"{count} of {_count(len(check.deciding), 'comparison')}, neither agreed nor not"
    yield _line(check.name, "UNDETERMINED", f"{what}: {names}{more}", Verdict.UNDETERMINED)


def _third_parties(name: str, rows: list[Row]) -> RenderableType:
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        show_edge=False,
        title=f"{name}: third parties, for information (they decide nothing)",
        title_justify="left",
        title_style="",
    )
    table.add_column("what", overflow="fold")
    table.add_column("z", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("cause", overflow="fold", ratio=1)
    for row in rows:
        distances = [z for z in (row.z_jax, row.z_torch, row.z_same) if z is not None]
        distance = _number(max(distances, key=lambda z: math.inf if math.isnan(z) else z) if distances else None, 3)
        table.add_row(
            Text(", ".join(part for part in (row.name, row.regime, row.precision) if part)),
            distance,
            Text(row.verdict, style=STYLES[row.verdict]),
            # What agrees needs no proof on the screen; the JSON file has it.
            Text(row.evidence.split(": ")[0] if row.verdict is Verdict.AGREE else row.evidence),
        )
    return Padding(table, (0, 0, 1, 2))


def _outcome(result: RunResult) -> Text:
    if result.exit_code == 0:
        return Text("AGREE: the same function wherever it was looked at (exit code 0)", style="bold green")
    by_code = {code: [check.name for check in result.checks if check.exit_code == code] for code in (1, 3)}
    parts = [f"does not agree: {', '.join(by_code[1])}"] if by_code[1] else []
    parts += [f"could not look: {', '.join(by_code[3])}"] if by_code[3] else []
    parts = parts or ["could not look: no check ran"]
    return Text(f"{'; '.join(parts)} (exit code {result.exit_code})", style="bold red")


def _line(check: str, head: str, text: str, verdict: Verdict | None) -> Text:
    return Text.assemble(f"{check}: ", (head, STYLES[verdict]), f": {text}")


def _name(row: Row, separator: str = " ", wide: bool = True) -> str:
    """Configuration, regime, precision and device (if it says something), then the tensor."""
    place = [row.config, " ".join(filter(None, [row.regime, row.precision, row.device if row.device != "cpu" else ""]))]
    lines = [" ".join(filter(None, place))] if wide else place
    return separator.join(line for line in (*lines, row.name) if line)


def _number(value: float | None, digits: int) -> str:
    """Fixed digits while it is small, three significant ones when not; `-` for nothing."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.2e}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
