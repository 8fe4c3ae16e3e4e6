"""docs/causes.md, from the JSON of two scores: of the catalogue, and of bugs that were held out.

parity locate --score --json causes.json
parity locate --score --held-out --json held_out.json
python -m parity.mutants.causes_table causes.json held_out.json docs/causes.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["main", "markdown"]

HEAD = """# Are bugs placed, and is their cause named?

Written by

    parity locate --score --json causes.json
    parity locate --score --held-out --json held_out.json
    python -m parity.mutants.causes_table causes.json held_out.json docs/causes.md

Each bug of the catalogue is put in, its check is run in the scope of the fast gate, and where that fails the place and
the cause are read off. By rule: from hypotheses that know no bug. With the library: AdamW's formulas with one thing
otherwise, and bugs of the catalogue itself, put into the other twin. What counts as right is written down in
parity/attribution.py, bug by bug; a bug that is not in that list counts as not explained, whatever is named.

## Limits

* The rules were extended with this catalogue in view, so its figures are optimistic. The held-out bugs below are made
  by rule, with the answer made by rule; no rule of the diagnosis was made for them.
* Only what two programs compute as arrays can be diagnosed. Where a check compares exactly (tokens, files, kept sets,
  refusals), judges what is drawn by statistics, or steps through a cache, its row is the place, and nothing is said of
  the cause.
* A held-out mutant by rule counts as right if what is named explains the difference and stands in the function that was
  changed; that it is the very operation is not asked.
"""


def markdown(scored: Mapping[str, Any], held: Mapping[str, Any]) -> str:
    """The document."""
    outcomes = [o for o in scored["outcomes"] if o["seen"]]
    lines = [HEAD, "## The catalogue", "", *(f"* {line}" for line in scored["lines"]), ""]
    lines += ["| check | bugs | placed | right cause by rule | with the library |", "|---|---|---|---|---|"]
    for check in sorted({o["check"] for o in outcomes}):
        own = [o for o in outcomes if o["check"] == check]
        count = [sum(o[name] for o in own) for name in ("placed", "right")]
        more = count[1] + sum(o["library_right"] for o in own)
        lines.append(f"| {check} | {len(own)} | {count[0]} | {count[1]} | {more} |")
    kinds = {"the catalogue with another number": [], "mutants by rule": []}
    for o in held["outcomes"]:
        kinds["mutants by rule" if o["id"].startswith("rule:") else "the catalogue with another number"].append(o)
    lines += ["", "## Held out", "", "| bugs | made | seen | a cause is named | rightly |", "|---|---|---|---|---|"]
    for kind, own in kinds.items():
        seen = [o for o in own if o["seen"]]
        named, right = sum(bool(o["cause"]) for o in seen), sum(o["right"] for o in seen)
        lines.append(f"| {kind} | {len(own)} | {len(seen)} | {named} | {right} |")
    lines += ["", "## Not explained, or otherwise than meant", ""]
    for o in sorted(outcomes, key=lambda o: o["check"]):
        if not o["right"] and not o["library_right"]:
            named = o["cause"] or o["library"]
            lines.append(f"* {o['check']}, {o['id']}: {o['what']}" + (f" (named: {named})" if named else ""))
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Two JSON files, Markdown file."""
    if len(arguments) != 3:
        print(f"usage: {(__doc__ or '').strip().splitlines()[-1]}", file=sys.stderr)
        return 2
    scored, held = (json.loads(Path(name).read_text(encoding="utf-8")) for name in arguments[:2])
    Path(arguments[2]).write_text(markdown(scored, held), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
