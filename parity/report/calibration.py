"""A calibration record as Markdown (for the console and docs/decisions/0001) and as a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from parity.calibrate import CEILING, MARGIN, supported
from parity.precision import PRECISIONS
from parity.report.json_file import write_text
from parity.verdict import THRESHOLDS

__all__ = ["markdown", "write"]

LOOKS = {"tensor": ("tensor",), "row, column": ("row", "column"), "element": ("element",)}


def markdown(record: Mapping[str, Any]) -> str:
    """What was drawn, what each check scored, the distribution of look / quantile, the thresholds, and the power."""
    parts = (_drawn, _checks, _ranges, _distribution, _bugs, _power)
    return "\n\n".join(part(record) for part in parts) + "\n"


def _drawn(record: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    tied = f", {record['tied']} more set aside for an expert choice inside the noise" if record["tied"] else ""
    counts = ", ".join(f"{count:,} {verdict}" for verdict, count in record["verdicts"].items()) or "none"
    lines = [
        f"`{record['command']}`, {record['date']}, on the CPU; {versions}"
        + ("" if record["complete"] else "; INTERRUPTED before its end"),
        "",
        f"* {record['draws']:,} draws{tied}; {record['configurations']} configurations of the twins (JAX compiled for "
        f"{record['configurations_compiled']}), {record['constants']} sets of constants of the checks; "
        f"{record['tensors']:,} tensors and other rows",
        f"* draws by threads: {'; '.join(f'{name}: {count:,}' for name, count in record['threads'].items())}",
        f"* verdicts: {counts}; false alarms in {record['draws_alarmed']} draws, so below "
        f"{record['alarm_limit_95']:.2%} of draws with 95 % confidence",
        f"* largest look / quantile: {record['largest'][0]} ({record['largest'][1]}); of the draws' largest: median "
        f"{record['largest_per_draw']['median']}, 99 % {record['largest_per_draw']['p99']}",
    ]
    lines += [f"* false alarm: {alarm}" for alarm in record["alarms"]]
    lines += [f"* could not look: {words}" for words in record["could_not_look"]]
    return "\n".join(lines)


def _checks(record: Mapping[str, Any]) -> str:
    rows = []
    for item in record["checks"]:
        (largest, where), (share, _) = item["largest"], item["share"]
        rows.append(
            [item["check"], item["draws"], item["configurations"], f"{item['tensors']:,}"]
            + [item["verdicts"].get("UNDETERMINED", 0), largest or "", f"{share:.0%}" if share else ""]
            + [item["draws_alarmed"], f"{item['alarm_limit_95']:.2%}", where if largest else ""]
        )
    head = ["check", "draws", "configurations", "rows", "undetermined", "largest look / quantile", "of other bounds"]
    return _table([*head, "false alarms", "95 % limit", "where"], rows)


def _distribution(record: Mapping[str, Any]) -> str:
    strata: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for item in record["strata"]:
        strata.setdefault((item["programs"], item["precision"], item["side"]), {})[item["look"]] = item
    order = list(PRECISIONS)
    rows = []
    for key, looks in sorted(
        strata.items(), key=lambda item: (item[0][0] != "twins", order.index(item[0][1]), item[0])
    ):
        row: list[Any] = [*key, f"{sum(look['count'] for look in looks.values()):,}", looks["tensor"]["median"]]
        for kinds in LOOKS.values():
            seen = [looks[kind] for kind in kinds if kind in looks]
            row += [max(look[which] for look in seen) if seen else "" for which in ("p99", "max")]
        rows.append(row)
    head = ["programs", "precision", "side", "looks", "tensor, median"]
    head += [f"{look}, {which}" for look in LOOKS for which in ("99 %", "max")]
    return _table(head, rows)


def _ranges(record: Mapping[str, Any]) -> str:
    largest = {
        "z": record["largest"][0],
        "unstable_ratio": max(entry["max"] for entry in record["lost"].values()),
        "dwarf_ratio": record["dwarf"]["max"],
    }
    rows = [
        [name, largest[name], _short(low), _short(high), getattr(THRESHOLDS, name)]
        for name, (low, high) in supported(record).items()
    ]
    table = _table(["threshold", "largest clean value", "at least", "at most", "in force"], rows)
    return f"{table}\n\nZ: at least {MARGIN} times the largest clean value, at most {CEILING} times that."


def _bugs(record: Mapping[str, Any]) -> str:
    if not record["bugs"]:
        return "No float32 draw of the twins, so no known bug was shown."
    rows = [
        [bug, seen["draws"], seen["smallest"], seen["median"], _short(seen["smallest"] / THRESHOLDS.z)]
        for bug, seen in record["bugs"].items()
    ]
    head = ["bug, in float32 alone", "draws", "smallest look / quantile", "median", "smallest over Z"]
    return _table(head, rows)


def _power(record: Mapping[str, Any]) -> str:
    kinds: dict[str, dict[str, Mapping[str, Any]]] = {}
    for item in record["smallest_error_per_z"]:
        kinds.setdefault(item["tensor"], {})[item["precision"]] = item
    seen = [name for name in PRECISIONS if any(name in item for item in kinds.values())]
    rows = []
    for kind, item in sorted(kinds.items(), key=lambda pair: (pair[0].startswith("foreign"), pair[0])):
        cells = [item.get(name) for name in seen]
        pairs = [
            f"{c['median'] * THRESHOLDS.z:.1e} ({c['max'] * THRESHOLDS.z:.0e})" if c is not None else "" for c in cells
        ]
        rows.append([kind, *pairs])
    table = _table(["tensor", *seen], rows)
    return (
        f"Smallest relative error (RMS of the tensor) that is called DIFFER: median over the draws (worst)\n\n{table}"
    )


def _short(value: float) -> str:
    return f"{value:.3g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def write(record: Mapping[str, Any], path: str | Path) -> None:
    """Strict JSON, one stratum a line, so that the difference between two records can be read."""
    lines = []
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            inner = ",\n  ".join(json.dumps(item, allow_nan=False) for item in value)
            lines.append(f' "{key}": [\n  {inner}\n ]')
        else:
            lines.append(f' "{key}": {json.dumps(value, allow_nan=False)}')
    write_text("{\n" + ",\n".join(lines) + "\n}\n", path)
