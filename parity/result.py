"""The one result object that every report reads: rows, checks, runs. Plain data, no framework, JSON in and out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from parity.verdict import Judgement, Verdict

__all__ = ["CheckResult", "Control", "Row", "RunResult", "row_from_judgement"]


@dataclass(frozen=True)
class Row:
    """One comparison: one tensor (or one statistic) of one case, in one precision on one device."""

    check: str
    config: str
    regime: str
    precision: str
    name: str
    verdict: Verdict
    evidence: str
    device: str = "cpu"
    shape: tuple[int, ...] = ()
    z_same: float | None = None
    z_jax: float | None = None
    z_torch: float | None = None
    excess: float | None = None
    effective_jax: float | None = None
    effective_torch: float | None = None
    accurate_jax: float | None = None
    accurate_torch: float | None = None
    smallest_seen: float | None = None
    excused: bool = False
    """It differs, but a choice within the noise may be why: nobody can tell, so the check cannot agree."""
    decides: bool = True
    """False for rows that inform only: third-party optimizers, framework defaults."""


@dataclass(frozen=True)
class Control:
    """A negative control: something wrong that the check was shown, and whether it rejected it."""

    name: str
    rejected: bool
    evidence: str


@dataclass
class CheckResult:
    """All rows of one check, its controls, and what it could not look at."""

    name: str
    rows: list[Row] = field(default_factory=list)
    controls: list[Control] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    """Why the check could not look (a crashed side, nothing compared); None when it did."""
    seconds: float = 0.0
    located: str = ""
    """Of a failed check: where the sides part, which one left the reference, and why, as far as that was found."""
    series: dict[str, list[float]] = field(default_factory=dict)
    """Curves for a picture, by name, all over the same steps: what the trajectory check saw, and its envelope."""

    @property
    def deciding(self) -> list[Row]:
        return [row for row in self.rows if row.decides]

    @property
    def undetermined(self) -> int:
        return sum(row.verdict is Verdict.UNDETERMINED for row in self.deciding)

    @property
    def worst(self) -> Row | None:
        """The gravest row; among equals the one nearest to its threshold."""
        key = lambda row: (row.verdict.gravity, row.excess if row.excess is not None else -1.0)  # noqa: E731
        determined = [row for row in self.deciding if row.verdict is not Verdict.UNDETERMINED]
        return max(determined or self.deciding, key=key, default=None)

    @property
    def verdict(self) -> Verdict | None:
        """None when the check could not look; UNDETERMINED when nothing that it looked at was determined."""
        worst = self.worst
        if worst is not None and worst.verdict.gravity >= Verdict.PINNED.gravity:
            return worst.verdict  # a difference was seen, whatever else went wrong
        if self.error is not None or worst is None or any(not control.rejected for control in self.controls):
            return None
        return Verdict.UNDETERMINED if any(row.excused for row in self.deciding) else worst.verdict

    @property
    def exit_code(self) -> int:
        """0 agrees, 1 does not, 3 could not look (nothing determined counts as not looked)."""
        verdict = self.verdict
        if verdict is None or verdict is Verdict.UNDETERMINED:
            return 3
        return 0 if verdict is Verdict.AGREE else 1


@dataclass
class RunResult:
    """A whole run: checks, the manifest of versions and flags, and what was not looked at."""

    checks: list[CheckResult]
    manifest: dict[str, Any]
    devices: list[str]
    seconds: float
    cpu_seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> Iterable[Row]:
        return (row for check in self.checks for row in check.rows)

    @property
    def counts(self) -> dict[str, int]:
        rows = [row for row in self.rows if row.decides]
        return {
            "configurations": len({row.config for row in rows if row.config}),
            "tensors": len({(row.check, row.config, row.regime, row.name) for row in rows}),
            "comparisons": len(rows),
            "undetermined": sum(row.verdict is Verdict.UNDETERMINED for row in rows),
        }

    @property
    def exit_code(self) -> int:
        """1 outranks 3 (a difference was seen), 3 outranks 0 (something was not looked at)."""
        codes = [check.exit_code for check in self.checks] or [3]
        return 1 if 1 in codes else max(codes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only; infinities and NaN become strings so that the file is strict JSON."""
        checks = []
        for check in self.checks:
            plain = asdict(check)
            plain["verdict"], plain["exit_code"] = check.verdict, check.exit_code
            checks.append(plain)
        whole = {
            "exit_code": self.exit_code,
            "counts": self.counts,
            "devices": self.devices,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "notes": self.notes,
            "manifest": self.manifest,
            "checks": checks,
        }
        return _plain(whole)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)


def row_from_judgement(judgement: Judgement, **fields: Any) -> Row:
    """A row of a tensor comparison; `fields` are check, config, regime, precision, name, device, shape, decides."""
    worst = max(judgement.jax.excess, judgement.torch.excess, judgement.same.excess)
    return Row(
        verdict=judgement.verdict,
        evidence=judgement.evidence,
        z_same=judgement.same.rms,
        z_jax=judgement.jax.rms,
        z_torch=judgement.torch.rms,
        excess=worst,
        effective_jax=judgement.effective_jax,
        effective_torch=judgement.effective_torch,
        accurate_jax=judgement.accurate_jax,
        accurate_torch=judgement.accurate_torch,
        smallest_seen=judgement.smallest_seen,
        **fields,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
