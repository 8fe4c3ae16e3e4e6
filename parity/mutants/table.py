"""The outcomes as a table for the console, as JSON, and as docs/teeth.md.

parity mutants --json teeth.json
python -m parity.mutants.table teeth.json docs/teeth.md            writes the document
python -m parity.mutants.table --check teeth.json docs/teeth.md    says whether it still tells what the run found
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parity.mutants.mutant import AREAS
from parity.mutants.rows import ROWS

__all__ = ["main", "markdown", "plain", "render", "told"]

ORDER = ("survived", "error", "killed")
HEAD = ("mutant", "", "caught by", "z", "located at", "s", "1e-3", "1e-5")


def plain(report: Any) -> dict[str, Any]:
    """The report as strict JSON: what is not finite becomes words."""

    def strict(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strict(v) for k, v in value.items()}
        if isinstance(value, list):
            return [strict(v) for v in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return strict(report.to_dict())


def render(report: Any, console: Any) -> None:
    """One table, survivors first; equivalents apart; the totals."""
    from rich.table import Table
    from rich.text import Text

    record = plain(report)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in HEAD:
        table.add_column(name, justify="right" if name in ("z", "s") else "left", overflow="fold")
    for outcome in _ordered(record["outcomes"]):
        table.add_row(*(Text(cell) for cell in _cells(outcome)))
    console.print(table)
    for outcome in record["outcomes"]:
        if outcome["status"] in ("survived", "error"):
            console.print(Text(f"{outcome['status']}: {outcome['id']}: {outcome['what']}. {outcome['words']}".rstrip()))
    for outcome in record["outcomes"]:
        if outcome["status"] == "equivalent":
            console.print(Text(f"equivalent: {outcome['id']} ({outcome['check']} agrees): {outcome['words']}"))
    for line in _totals(record):
        console.print(Text(line))
    if not report.ended:
        console.print(Text("interrupted by Ctrl-C: the rest of the catalogue was not run"))


def markdown(record: Mapping[str, Any]) -> str:
    """docs/teeth.md, from the JSON of a run."""
    outcomes = record["outcomes"]
    lines = [
        "# What the checks catch",
        "",
        "Written by `python -m parity.mutants.table teeth.json docs/teeth.md` from `parity mutants --json teeth.json`.",
        "",
        f"Gate: {record['gate']}. " + " ".join(f"{line}." for line in _totals(record)),
        "",
        "## How to read it",
        "",
        "Each row is a bug, put into one twin (or into both, where a mistake that they share is the danger) while one",
        "check looks: the one that must catch it. It is caught if that check says DIFFER, PINNED or UNSTABLE where it",
        "said AGREE of the clean code; an exception does not count. z is the largest distance in noise units, σ being",
        "the clean function's. The last two columns are what a familiar test would have said: np.allclose on the",
        "float32 logits of one prefill with fresh weights, at 1e-3 and at 1e-5.",
        "",
        "## Its limits",
        "",
        "* A kill says that these inputs reach this bug. No table can say what other bugs there are: these were chosen",
        "  from public reports of ports, and from what is common, by people who knew the checks.",
        "* Bugs are put in one at a time; two that cancel would not show.",
        "* In the fast gate each bug meets its own check only, on the smallest fixture that has its code, mostly in",
        "  float64; `parity mutants --gate full` runs the whole check. JAX in float64 is evaluated from its program,",
        "  not compiled, so a bug of a compiler is out of reach.",
        "* Where a check compares exactly (tokens, files, kept sets, refusals) there is no z.",
        "* A bug in one twin is caught by comparing; a mistake in both is caught only where a third party stands",
        "  beside them (SentencePiece, torch's files, librosa, an oracle in extended precision), or a frozen number.",
        '* "Located" is the row or tap, not the cause: [causes.md](causes.md) counts for how many bugs the diagnosis',
        "  names the right cause, of the catalogue (`parity locate --score`) and of others (`--held-out`).",
        "* Seconds are those of one run on a CPU; the first bug of a check waits for its clean run too.",
        "",
        "## By area",
        "",
        "| area | bugs | caught | located | equivalent |",
        "|---|---|---|---|---|",
    ]
    for area in AREAS:
        own = [o for o in outcomes if o["area"] == area]
        count = Counter(o["status"] for o in own)
        live = len(own) - count["equivalent"]
        located = sum(o["attributed"] for o in own)
        lines.append(f"| {area} | {live} | {count['killed']} | {located} | {count['equivalent']} |")
    lines += ["", "## Every bug", "", f"| {' | '.join(h or 'what' for h in HEAD)} |", "|" + "---|" * len(HEAD)]
    for outcome in _ordered(outcomes):
        cells = _cells(outcome)
        cells[1] = f"{outcome['what']}{_source(outcome['report'])}"
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", "## Equivalent: nothing can tell them from the right code", ""]
    lines += [f"* {o['id']}: {o['what']}. {o['words']}." for o in outcomes if o["status"] == "equivalent"]
    lines += ["", "## Reports without a bug of their own here", ""]
    lines += [f"* {row.what}: {row.reason}." for row in ROWS.values() if row.reason]
    return "\n".join(lines) + "\n"


def _source(report: str) -> str:
    if report not in ROWS:
        return ""
    return "".join(f" [{i}]({link})" for i, link in enumerate(ROWS[report].links, 1))


def _ordered(outcomes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [o for status in ORDER for o in outcomes if o["status"] == status]


def _cells(outcome: Mapping[str, Any]) -> list[str]:
    z = outcome["z"]
    shown = "" if z is None else z if isinstance(z, str) else f"{z:.1e}"
    place = outcome["located"] + (
        "" if outcome["attributed"] or outcome["status"] != "killed" else " (not where meant)"
    )
    caught = outcome["check"] if outcome["status"] == "killed" else outcome["status"]
    seen = ["yes" if outcome["seen"].get(bound) else "no" for bound in ("0.001", "1e-05")]
    return [outcome["id"], outcome["side"], caught, shown, place, f"{outcome['seconds']:.1f}", *seen]


def _totals(record: Mapping[str, Any]) -> list[str]:
    live, killed = record["live"], record["killed"]
    words = [f"{killed} of {live} bugs caught" + (f" ({killed / live:.1%})" if live else "")]
    words.append(f"{record['attributed']} of {killed} located where they are")
    for bound, count in record["familiar"].items():
        words.append(
            f"np.allclose on float32 logits at {float(bound):.0e} would have seen {count} of {live}, or of the "
            f"{record['prefill']} in code that they come from"
        )
    words.append(f"{record['equivalent']} equivalents, {record['seconds']:.0f} s")
    return words


def told(document: str) -> dict[str, str]:
    """Bug -> by what it is caught ("survived", "equivalent" ...), as a document says; the rest differs between runs."""
    every, _, rest = document.partition("## Every bug")[2].partition("## Equivalent")
    rows = [line.replace("\\|", "").split("|") for line in every.splitlines() if line.startswith("| ")]
    found = {cells[1].strip(): cells[3].strip() for cells in rows if cells[1].strip() != HEAD[0]}
    equivalents = rest.partition("\n## ")[0]
    return found | {name: "equivalent" for name in re.findall(r"^\* ([\w-]+): ", equivalents, re.MULTILINE)}


def main(arguments: Sequence[str]) -> int:
    """[--check] JSON file, Markdown file."""
    check = "--check" in arguments
    files = [Path(name) for name in arguments if name != "--check"]
    if len(files) != 2:
        print("usage: python -m parity.mutants.table [--check] teeth.json docs/teeth.md", file=sys.stderr)
        return 2
    document = markdown(json.loads(files[0].read_text(encoding="utf-8")))
    if not check:
        files[1].write_text(document, encoding="utf-8")
        return 0
    now, then = told(document), told(files[1].read_text(encoding="utf-8"))
    for name in sorted(k for k in now | then if now.get(k) != then.get(k)):
        print(f"{files[1]}: {name}: {then.get(name, 'not there')}; now {now.get(name, 'gone')}", file=sys.stderr)
    return int(now != then)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
