"""Runs mutants made by rule, each under the checks that run its code, σ being the clean function's.

Which code a check runs is seen beforehand, line by line, in the clean functions: a mutant on a line that no check runs
is "not reached" without being tried, and never a kill. A kill is a verdict; an exception, a timeout, or values that
are all not finite count as "crashed". What survives every look is examined by hand (parity.mutants.examined).
"""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from parity import checks
from parity.errors import CannotLook
from parity.mutants import inject
from parity.mutants.by_rule import RuleMutant
from parity.mutants.by_rule_looks import Look, looks_of
from parity.mutants.examined import examined
from parity.mutants.gate import bad, exit_code, quiet, row_key
from parity.mutants.replay import Recording
from parity.result import CheckResult, Row
from parity.sides import one_thread

__all__ = ["STATUSES", "RuleGate", "RuleOutcome", "RuleReport", "run", "sampled"]

STATUSES = ("survived", "equivalent", "not reached", "crashed", "killed", "error")
MOST_WORK, LEAST_LIMIT = 5.0, 5.0
"""A look may take so many times the clean one's work, and always so many seconds: then a mutant's loop is endless."""


@dataclass(frozen=True)
class RuleOutcome:
    """What became of one mutant."""

    id: str
    side: str
    module: str
    rule: str
    what: str
    status: str
    check: str = ""
    """The look that killed it, or in which it crashed; of survivors, every look that it survived."""
    words: str = ""
    moved: bool = False
    """Some figure of some row was not the clean one's: it did something, within the noise."""
    seconds: float = 0.0
    reason: str = ""
    """What an examination has found, now or once, when it survived; "" where nobody has looked yet."""


@dataclass
class RuleReport:
    """One run; `of` the mutants there are, some were sampled."""

    outcomes: list[RuleOutcome]
    of: int
    seed: int | None
    seconds: float = 0.0
    ended: bool = True

    def having(self, *status: str) -> list[RuleOutcome]:
        return [outcome for outcome in self.outcomes if outcome.status in status]

    @property
    def unexamined(self) -> list[RuleOutcome]:
        return [outcome for outcome in self.having("survived") if not outcome.reason]

    @property
    def revived(self) -> list[RuleOutcome]:
        """Those that survived once, were examined, and do not survive now."""
        return [outcome for outcome in self.having("killed", "crashed") if outcome.reason]

    @property
    def refuted(self) -> list[RuleOutcome]:
        """Those called equivalent that are not: the argument was wrong."""
        return [outcome for outcome in self.revived if outcome.reason.startswith("equivalent")]

    @property
    def exit_code(self) -> int:
        """0: every survivor is equivalent; 1: something survived, or an equivalent did not; 3: an error, or no run."""
        return exit_code(self, bool(self.having("survived") or self.refuted))

    def to_dict(self) -> dict[str, Any]:
        counts = Counter(outcome.status for outcome in self.outcomes)
        return {
            "seconds": self.seconds,
            "ended": self.ended,
            "exit_code": self.exit_code,
            "mutants": len(self.outcomes),
            "of": self.of,
            "seed": self.seed,
            **{status.replace(" ", "_"): counts[status] for status in STATUSES},
            "unexamined": len(self.unexamined),
            "refuted": len(self.refuted),
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
        }


@dataclass
class _Clean:
    """A look at the clean functions."""

    recording: Recording
    results: list[CheckResult]
    lines: frozenset[tuple[str, int]]
    work: float
    """Seconds of this process's time."""


@dataclass
class RuleGate:
    """The clean runs of the looks, made once each, and mutants judged against them."""

    clean: dict[Look, _Clean] = field(default_factory=dict)

    def __call__(self, mutant: RuleMutant) -> RuleOutcome:
        started = time.perf_counter()
        status, check, words, moved = self._judged(mutant)
        kind, reason = examined(mutant.id)
        if kind == "equivalent" and status == "survived":
            status = kind
        return RuleOutcome(
            mutant.id, mutant.side, mutant.module, mutant.rule, mutant.what, status, check, words, moved,
            time.perf_counter() - started, f"{kind}: {reason}" if reason else "",
        )  # fmt: skip

    def _judged(self, mutant: RuleMutant) -> tuple[str, str, str, bool]:
        """(status, look, words, whether anything moved)."""
        passed, moved = list[str](), False
        for look in looks_of(mutant.module):
            try:
                clean = self.look(look)
            except CannotLook as error:
                return "error", str(look), str(error), moved
            if not any(line in clean.lines for line in mutant.lines):
                continue
            try:
                with inject.injected(mutant.edits) as injection, clean.recording.running(mutant.side):
                    results = self._looked(look, clean)
                    called = not injection.dead
            except inject.DeadAnchor as error:
                return "error", str(look), str(error), moved
            except Exception as error:
                return "crashed", str(look), _told(error), moved
            if not called:
                continue
            before = {row_key(row): row for result in clean.results for row in result.deciding}
            worse = [r for x in results for r in x.deciding if bad(r) and not bad(before.get(row_key(r)))]
            finite = [row for row in worse if "not finite" not in row.evidence]
            if finite:
                return "killed", str(look), f"{finite[0].name}: {finite[0].evidence}", True
            error = next((result.error for result in results if result.error), None)
            if worse or error:
                return "crashed", str(look), error or f"{worse[0].name}: {worse[0].evidence}", True
            passed.append(str(look))
            moved |= [_figures(r) for x in results for r in x.rows] != [
                _figures(r) for x in clean.results for r in x.rows
            ]
        return ("survived", ", ".join(passed), "", moved) if passed else ("not reached", "", "", False)

    def look(self, look: Look) -> _Clean:
        """The clean run of a look: recorded, then run again as mutants are, to see which lines that takes."""
        if look not in self.clean:
            inject.import_everything()
            inject.forget(programs=True)
            recording = Recording()
            with recording.running():
                first = self._run(look)
            inject.forget(programs=True)
            begun = time.process_time()
            with recording.running("both"), _lines() as lines:
                results = self._run(look)
            work = time.process_time() - begun
            for result in (*first, *results):
                wrong = [row.name for row in result.deciding if bad(row)]
                if result.error or wrong:
                    raise CannotLook(f"the clean run of {look} does not agree: {result.error or ', '.join(wrong)}")
            self.clean[look] = _Clean(recording, results, frozenset(lines), work)
        return self.clean[look]

    def _run(self, look: Look) -> list[CheckResult]:
        return [checks.load(name).run(look.scope, quiet) for name in look.checks]

    def _looked(self, look: Look, clean: _Clean) -> list[CheckResult]:
        """The checks one by one; a difference that one has seen saves the next."""
        results = []
        with _limited(max(MOST_WORK * clean.work, LEAST_LIMIT)):
            for name, before in zip(look.checks, clean.results, strict=True):
                results.append(checks.load(name).run(look.scope, quiet))
                if sum(map(bad, results[-1].deciding)) > sum(map(bad, before.deciding)):
                    break
        return results


def sampled(mutants: Sequence[RuleMutant], count: int | None, seed: int) -> list[RuleMutant]:
    """`count` of them, all equally likely, in their order."""
    if count is None or count >= len(mutants):
        return list(mutants)
    return [mutants[i] for i in sorted(random.Random(seed).sample(range(len(mutants)), count))]


def run(
    mutants: Sequence[RuleMutant],
    of: int | None = None,
    seed: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> RuleReport:
    """Every mutant in its turn; Ctrl-C ends the run but not the report."""
    started, gate, report = time.perf_counter(), RuleGate(), RuleReport([], of or len(mutants), seed)
    tell = progress or quiet
    with one_thread():
        try:
            for done, mutant in enumerate(mutants):
                tell(done, len(mutants), mutant.id)
                report.outcomes.append(gate(mutant))
        except KeyboardInterrupt:
            report.ended = False
    report.seconds = time.perf_counter() - started
    return report


@contextlib.contextmanager
def _lines() -> Iterator[set[tuple[str, int]]]:
    """The lines of the twins that are run inside."""
    seen: set[tuple[str, int]] = set()
    own = tuple(path for name in ("omni_jax", "omni_torch") for path in sys.modules[name].__path__)

    def local(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            seen.add((frame.f_code.co_filename, frame.f_lineno))
        return local

    def of_calls(frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(own):
            return None
        seen.add((frame.f_code.co_filename, frame.f_lineno))
        return local

    before = sys.gettrace()
    sys.settrace(of_calls)
    try:
        yield seen
    finally:
        sys.settrace(before)


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """A TimeoutError after so much work of this process; its own time, so that a busy machine changes nothing."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "ITIMER_PROF"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no end after {seconds:g} s of work")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _figures(row: Row) -> tuple[Any, ...]:
    """All that a row measured."""
    return (*row_key(row), row.verdict, row.evidence, row.z_same, row.z_jax, row.z_torch, row.excess)
