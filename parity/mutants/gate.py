"""Runs the catalogue: each mutant under the check that must catch it, and beside it what a familiar bound sees."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from parity import checks
from parity.checks import Scope
from parity.errors import CannotLook, Misuse
from parity.mutants import inject
from parity.mutants.familiar import BOUNDS, Familiar, concerned
from parity.mutants.mutant import AREAS, Mutant
from parity.mutants.replay import Recording
from parity.result import CheckResult, Row
from parity.sides import one_thread
from parity.verdict import Verdict

__all__ = ["GATES", "Gate", "Outcome", "Report", "bad", "changed", "exit_code", "quiet", "row_key", "run"]

GATES = ("fast", "full")


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant."""

    id: str
    area: str
    report: str
    side: str
    what: str
    check: str
    status: str
    """killed, survived, equivalent (it agrees, as it must) or error."""
    z: float | None = None
    located: str = ""
    attributed: bool = False
    """Located where the catalogue says."""
    seconds: float = 0.0
    seen: dict[str, bool] = field(default_factory=dict)
    """bound -> np.allclose on float32 logits would have seen it."""
    words: str = ""
    prefill: bool = False
    """Whether the prefill of the familiar test runs code that the bug is in."""


@dataclass
class Report:
    """One run over the catalogue."""

    gate: str
    outcomes: list[Outcome]
    seconds: float
    ended: bool = True

    def of(self, *status: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status in status]

    @property
    def rate(self) -> float:
        """Killed of all that are not equivalent; errors count as not killed."""
        live = len(self.of("killed", "survived", "error"))
        return len(self.of("killed")) / live if live else 0.0

    @property
    def exit_code(self) -> int:
        """0: everything was killed; 1: something survived; 3: an error, or nothing was run."""
        return exit_code(self, bool(self.of("survived")))

    def to_dict(self) -> dict[str, Any]:
        live = self.of("killed", "survived", "error")
        return {
            "gate": self.gate,
            "seconds": self.seconds,
            "ended": self.ended,
            "exit_code": self.exit_code,
            "mutants": len(self.outcomes),
            "live": len(live),
            "killed": len(self.of("killed")),
            "equivalent": len(self.of("equivalent")),
            "attributed": sum(outcome.attributed for outcome in self.of("killed")),
            "prefill": sum(outcome.prefill for outcome in live),
            "familiar": {str(b): sum(outcome.seen.get(str(b), False) for outcome in live) for b in BOUNDS},
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
        }


class Gate:
    """The clean runs of the checks, made once each, and mutants judged against them."""

    def __init__(self, gate: str = "fast"):
        if gate not in GATES:
            raise Misuse(f"--gate {gate}: must be one of {', '.join(GATES)}")
        self.gate, self.clean, self.familiar = gate, {}, Familiar()

    def scope(self, mutant: Mutant) -> Scope:
        """What of its check is run: a case of its own in the fast gate, everything in the full one."""
        if self.gate == "full":
            return Scope(controls=False)
        given: dict[str, Any] = {"precisions": ("float64",)}
        if mutant.check in checks.OF_MODELS:
            given |= {"configs": ("mha-swiglu",), "regimes": ("randomised",)}
        return Scope(**{**given, **mutant.scope, "controls": False})

    def __call__(self, mutant: Mutant) -> Outcome:
        """Put the bug in, run its check, take it out."""
        started = time.perf_counter()
        scope = self.scope(mutant)
        status, words, rows, z, located, seen = "error", "", [], None, "", {}
        try:
            clean, recording = self.clean_run(mutant.check, scope)
            self.familiar.prepare(mutant, scope)
            with inject.injected(mutant.edits) as injection:
                result, words = self._look(mutant, scope, recording)
                reached = injection.dead
                seen = self.familiar(mutant, scope)
            if reached and (result is not None or not mutant.symptom):
                raise inject.DeadAnchor(f"nobody called {', '.join(reached)} while the check looked: a dead anchor")
            if result is not None:
                rows = changed(clean, result)
                z, located = _worst(rows), _place(rows)
                status = "killed" if rows else "error" if result.error else "survived"
                words = rows[0].evidence if rows else result.error or ""
            elif mutant.symptom and re.search(mutant.symptom, words):
                status, located = "killed", words.partition(":")[0]
            if mutant.equivalent:
                agrees = status == "survived"
                words = mutant.equivalent if agrees else f"called equivalent, but not: {words}"
                status = "equivalent" if agrees else "error"
        except CannotLook as error:
            words = str(error)
        attributed = status == "killed" and bool(re.search(mutant.where, located))
        return Outcome(
            mutant.id, mutant.area, mutant.report, mutant.side, mutant.what, mutant.check, status, z, located,
            attributed, time.perf_counter() - started, seen, words, concerned(mutant),
        )  # fmt: skip

    def clean_run(self, check: str, scope: Scope) -> tuple[CheckResult, Recording]:
        if (check, scope) not in self.clean:
            recording = Recording()
            inject.forget()
            with recording.running():
                result = checks.load(check).run(scope, quiet)
            if result.error or any(bad(row) for row in result.deciding):
                raise CannotLook(f"the clean run of {check} does not agree: {result.error or _bad_names(result)}")
            self.clean[check, scope] = result, recording
        return self.clean[check, scope]

    def _look(self, mutant: Mutant, scope: Scope, recording: Recording) -> tuple[CheckResult | None, str]:
        """The check's result under the bug; None and the words of the exception where it raised."""
        try:
            with recording.running(mutant.side):
                return checks.load(mutant.check).run(scope, quiet), ""
        except Exception as error:
            return None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def run(
    mutants: Sequence[Mutant], gate: str = "fast", progress: Callable[[int, int, str], None] | None = None
) -> Report:
    """Every mutant in its turn; Ctrl-C ends the run but not the report."""
    started, made, report = time.perf_counter(), Gate(gate), Report(gate, [], 0.0)
    tell = progress or quiet
    with one_thread():
        try:
            # Mutants of one check share its clean run, whatever their area.
            for done, mutant in enumerate(sorted(mutants, key=lambda m: m.check)):
                tell(done, len(mutants), mutant.id)
                report.outcomes.append(made(mutant))
        except KeyboardInterrupt:
            report.ended = False
    report.outcomes.sort(key=lambda outcome: AREAS.index(outcome.area))
    report.seconds = time.perf_counter() - started
    return report


def exit_code(report: Any, survived: bool) -> int:
    """Of a report on mutants: 1: something survived; 3: an error, or nothing was run; else 0."""
    if survived:
        return 1
    return 3 if any(o.status == "error" for o in report.outcomes) or not report.outcomes or not report.ended else 0


def quiet(*_: Any) -> None:
    """The progress that nobody looks at."""


def bad(row: Row | None) -> bool:
    """Whether a row is there, and says that something is wrong."""
    return row is not None and row.verdict.gravity >= Verdict.PINNED.gravity


def _bad_names(result: CheckResult) -> str:
    return ", ".join(row.name for row in result.deciding if bad(row))


def row_key(row: Row) -> tuple[str, ...]:
    """What names a row among those of all checks."""
    return row.check, row.config, row.regime, row.precision, row.name


def changed(clean: CheckResult, result: CheckResult) -> list[Row]:
    """The rows that fail now and did not, in their order."""
    before = {row_key(row): row.verdict for row in clean.deciding}
    return [row for row in result.deciding if bad(row) and row.verdict != before.get(row_key(row))]


def _worst(rows: Iterable[Row]) -> float | None:
    found = [z for row in rows for z in (row.z_same, row.z_jax, row.z_torch) if z is not None]
    return max(found or [row.excess for row in rows if row.excess is not None], default=None)


def _place(rows: Sequence[Row]) -> str:
    """The first tap that parts; of gradients alone the last one, where the backward pass begins; or the first row."""
    taps = [row.name.removeprefix("tap ") for row in rows if row.name.startswith("tap ")]
    if taps or not rows:
        return taps[0] if taps else ""
    names = [row.name for row in rows]
    return max(names, key=_stage) if all(name.startswith("gradient ") for name in names) else names[0]


_STAGES = ("norm1", "attn.q", "attn.k", "attn.v", "attn.o", "norm2")


def _stage(name: str) -> tuple[int, int]:
    """Where in the forward pass the parameter of a gradient is used."""
    parts = name.removeprefix("gradient ").split(".", 2)
    if parts[0] != "blocks":
        return {"tok_emb": (-1, 0), "norm": (10_000, 0), "lm_head": (10_000, 1)}.get(parts[0], (0, 0))
    rest = parts[2]
    return int(parts[1]), next((i for i, part in enumerate(_STAGES) if rest.startswith(part)), len(_STAGES))
