"""`parity run --search`: every function of the twins searched, a table, and a snippet for whatever parts."""

from __future__ import annotations

import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Sequence

from parity.errors import Misuse
from parity.search import EVALUATIONS, PRECISIONS, Found, Subject, search, snippet

__all__ = ["budget_of", "lines", "run", "search_all"]


def budget_of(text: str | None) -> tuple[int, float | None]:
    """(evaluations of each function, seconds in all): "200" or "90s"."""
    if text is None:
        return EVALUATIONS, None
    found = re.fullmatch(r"([1-9]\d*)(s?)", text.strip())
    if found is None:
        raise Misuse(f"--budget {text}: must be evaluations of each function (200) or seconds in all (90s)")
    number = int(found[1])
    return (1 << 30, float(number)) if found[2] else (number, None)


def search_all(
    subjects: Sequence[Subject],
    evaluations: int = EVALUATIONS,
    seconds: float | None = None,
    seed: int = 0,
    precisions: Sequence[str] = PRECISIONS,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> tuple[list[Found], bool]:
    """What was found of each subject, and whether all of them were searched (False: Ctrl-C)."""
    results: list[Found] = []
    started = time.perf_counter()
    done = 0
    wanted = [s for s in subjects if set(s.precisions) & set(precisions)]
    for at, subject in enumerate(wanted):
        found = Found(subject.name)

        def tell(found: Found, at: int = at, done: int = done) -> None:
            rate = (done + found.evaluations) / max(time.perf_counter() - started, 1e-9)
            progress(at, len(wanted), f"{found.name}: {found.evaluations}, z {found.z:.3g}, {rate:.0f} evaluations/s")

        left = None
        if seconds is not None:  # what a function leaves over, the next ones have
            shares = sum(s.share for s in wanted[at:])
            left = max(0.0, seconds - (time.perf_counter() - started)) * subject.share / shares
        try:
            progress(at, len(wanted), subject.name)
            search(subject, max(1, round(evaluations * subject.share)), left, seed, tell, precisions, found)
        except KeyboardInterrupt:
            found.ended = False
        results.append(found)
        done += found.evaluations
        if not found.ended:
            return results, False
    return results, True


def lines(results: Sequence[Found]) -> list[str]:
    """The table, and below it whatever parts or could not be looked at."""
    width = max([len("function"), *(len(f.name) for f in results)])
    head = f"{'function':<{width}}  evaluations  undetermined  refused  largest z  of threshold  seconds  verdict"
    table = [head, "-" * len(head)]
    for f in results:
        said = "NO ANSWER" if f.error or f.verdict is None else str(f.verdict)
        share = f"{f.score:.0%}" if f.score < 10 else f"{f.score:.2g} x" if math.isfinite(f.score) else "inf"
        table.append(
            f"{f.name:<{width}}  {f.evaluations:>11}  {f.undetermined:>12}  {f.refused:>7}  {f.z:>9.3g}  "
            f"{share:>12}  {f.seconds:>7.1f}  {said}"
        )
    for f in results:
        if f.error:
            table += ["", f"{f.name}: could not look: {f.error}"]
        if f.example is not None:
            table += ["", f"{f.name}: {f.verdict}: {f.evidence}", "", snippet(f.name, f.example)]
    return table


def run(only: Sequence[str], budget: str | None, seed: int, precisions: Sequence[str], json_file: str | None) -> int:
    """Exit code 0: nothing parts; 1: something does; 3: something could not be looked at, or Ctrl-C."""
    from parity import cache, runner
    from parity.cli import AGREE, CANNOT_LOOK, DISAGREE, _plain_progress
    from parity.errors import CannotLook
    from parity.precision import one_of
    from parity.report import json_file as json_report

    evaluations, seconds = budget_of(budget)
    asked = [p for p in precisions if p in PRECISIONS]
    if not asked:
        raise Misuse(f"--precision: a search looks at {', '.join(PRECISIONS)}; name one of them")
    if json_file is not None:
        json_report.check_writable(json_file)
    cache.keep_arrays()
    runner.prepare()
    try:
        import hypothesis.configuration
    except ImportError as error:
        raise CannotLook("--search needs hypothesis, which is not installed: pip install hypothesis") from error
    from parity.search_subjects import subjects

    known = {subject.name: subject for subject in subjects()}
    for name in only:
        one_of("function", name, tuple(known))
    wanted = [subject for name, subject in known.items() if not only or name in only]
    # Hypothesis keeps what it read of the sources in a folder: not in the user's working directory.
    with tempfile.TemporaryDirectory() as folder, _plain_progress() as progress:
        hypothesis.configuration.set_hypothesis_home_dir(folder)
        results, ended = search_all(wanted, evaluations, seconds, seed, asked, progress)
    print("\n".join(lines(results)))
    parted = any(f.example is not None for f in results)
    failed = not ended or any(f.error or f.verdict is None for f in results)
    code = DISAGREE if parted else CANNOT_LOOK if failed else AGREE
    if not ended:
        print(f"interrupted by Ctrl-C in function {len(results)} of {len(wanted)}")
    if json_file is not None:
        record = {"seed": seed, "evaluations": None if seconds else evaluations, "seconds": seconds, "ended": ended}
        record |= {"exit_code": code, "functions": [f.to_dict() for f in results]}
        json_report.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", json_file)
    return code
