"""fuse and fuse_chunks of both twins: order, masks, targets, what is cut and what is refused. Every value exactly.

Shapes: B batch, N fused length, D model.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity.checks import Progress, Scope
from parity.checks.image import fault
from parity.result import CheckResult, Control, Row
from parity.verdict import Verdict

__all__ = ["BLIND", "CASES", "CLAIM", "CONTROLS", "REFUSED", "Case", "by_hand", "fused", "inputs", "refusals", "run"]

CLAIM = (
    "Both fuse and fuse_chunks put the same vectors, mask and targets at the same places, where a program of plain "
    "loops puts them: image, audio, text, in this order, for rows that lack a modality (what stands there, NaN too, "
    "is never read), with PAD as the target of all that is not text; they cut each row by the same policy to the "
    "lengths that it would have alone, and refuse the same things in the same words."
)
BLIND = (
    "Lengths beyond {most}; gradients (the omni check looks at them); whether the loss ignores PAD (the data check "
    "does); other dtypes than float32."
)
CONTROLS = {
    "text first": "text, audio, image",
    "mask forgotten": "every position counts as kept",
    "targets one late": "the targets begin one position after their text",
    "targets for all": "0 … in place of PAD for what is not text",
    "masked vectors kept": "what a row lacks is not zeroed",
    "text cut from its beginning": "the end of the text is kept, not its beginning",
    "audio never cut": "the family's quarter of the context is not held",
    "one more of text": "the family's free place at the end is given to the text",
    "cut by the batch": "what a row keeps is counted by the lengths of its batch, not by its own",
    "chunks of all": "every modality is cut into chunks, not the longest alone",
}
PAD, B, D = 0, 3, 2


@dataclass(frozen=True)
class Case:
    """What is fused: lengths of image, audio and text (0: not given), kinds of masks, and how."""

    lengths: tuple[int, int, int]
    masks: tuple[str, str, str] = ("", "", "")
    """Of each: none, by "row", or by "vector"."""
    targets: bool = True
    ctx_len: int | None = None
    policy: str = "family"
    chunks: bool = False

    def __str__(self) -> str:
        parts = [f"{n} of {name}" for name, n in zip(NAMES, self.lengths) if n]
        masks = [f"{name} masked by {kind}" for name, kind in zip(NAMES, self.masks) if kind]
        how = "" if self.ctx_len is None else f"{'chunks' if self.chunks else self.policy}, context {self.ctx_len}"
        return ", ".join([*parts, *masks, *([how] if how else [])])


NAMES = ("image", "audio", "text")
CASES = (
    Case((1, 0, 5)),
    Case((0, 0, 4), targets=False),
    Case((1, 7, 0), targets=False),
    Case((1, 7, 5)),
    Case((1, 7, 5), ("row", "row", "vector")),
    Case((2, 6, 4), ("vector", "vector", "row")),
    Case((1, 7, 9), ("", "vector", "vector"), ctx_len=12),
    # Text alone makes this one wider than a row with everything: one more of its text would have a place.
    Case((1, 2, 9), ("row", "row", ""), ctx_len=9),
    Case((1, 9, 8), ("row", "row", "vector"), ctx_len=9),
    Case((0, 9, 8), ("", "vector", ""), ctx_len=10, policy="longest"),
    Case((1, 7, 3), ctx_len=3),
    Case((0, 7, 0), targets=False, ctx_len=8),
    Case((0, 0, 9), ("", "", "vector"), ctx_len=6),
    Case((1, 7, 7), ("row", "vector", "vector"), ctx_len=10, policy="longest"),
    Case((1, 6, 2), ctx_len=9, policy="error"),
    Case((1, 7, 4), ("row", "vector", "vector"), ctx_len=8, chunks=True),
    Case((1, 2, 9), ("", "row", "vector"), ctx_len=7, chunks=True),
)
BLIND = BLIND.format(most=max(max(case.lengths) for case in CASES))
REFUSED = (
    Case((1, 6, 3), ctx_len=9, policy="error"),
    Case((1, 6, 3), ctx_len=2, policy="longest"),
    Case((1, 6, 3), ctx_len=9, policy="shortest"),
    Case((1, 6, 3), ctx_len=0),
    Case((4, 6, 3), ctx_len=7, chunks=True),
    Case((0, 0, 0), targets=False),
    Case((1, 6, 0), targets=True),
)


def inputs(case: Case, seed: int) -> dict[str, np.ndarray]:
    """The arguments of `fuse` that are arrays; what is masked out is NaN."""
    rng = np.random.default_rng([seed, 107, *case.lengths])
    given: dict[str, np.ndarray] = {}
    for name, length, kind in zip(NAMES, case.lengths, case.masks):
        if not length:
            continue
        given[name] = rng.standard_normal((B, length, D)).astype(np.float32)
        if kind:
            mask = rng.random((B,) if kind == "row" else (B, length)) < 0.6
            mask[0], mask[-1] = True, False  # one row has all of it, one has nothing
            given[f"{name}_mask"] = mask
            given[name][~mask] = np.nan
    if case.targets:
        given["targets"] = rng.integers(0, 9, (B, case.lengths[2] or 3)).astype(np.int32)
    return given


def _chosen(count: Mapping[str, int], case: Case, wrong: str) -> list[dict[str, range]]:
    """Which of its vectors, counted from 0, a row keeps that has so many of each: once, or once for each chunk."""
    count = {name: n for name, n in count.items() if n}
    kept = dict(count)
    if case.ctx_len is None or not count:
        return [{name: range(n) for name, n in count.items()}]
    if case.chunks:
        longest = max(count, key=lambda name: count[name])
        room = case.ctx_len - sum(n for name, n in count.items() if name != longest)
        spans = []
        for start in range(0, count[longest], room):
            every = {name: range(n)[start : start + room] for name, n in count.items()}
            whole = {name: range(n) for name, n in count.items()}
            spans.append(every if wrong == "chunks of all" else whole | {longest: every[longest]})
        return spans
    if case.policy == "longest":
        while sum(kept.values()) > case.ctx_len:
            kept[max(kept, key=lambda name: kept[name])] -= 1
    elif case.policy == "family":
        if "audio" in kept and wrong != "audio never cut":
            kept["audio"] = min(kept["audio"], max(case.ctx_len // 4, 1))
        if "text" in kept:
            others = sum(kept.values()) - kept["text"]
            free = 0 if wrong == "one more of text" or not others else 1
            kept["text"] = min(kept["text"], max(case.ctx_len - others - free, 1))
    span = {name: range(n) for name, n in kept.items()}
    if wrong == "text cut from its beginning" and "text" in kept:
        span["text"] = range(count["text"] - kept["text"], count["text"])
    return [span]


def by_hand(case: Case, given: Mapping[str, np.ndarray], wrong: str = "") -> dict[str, np.ndarray]:
    """What `fuse` must give, by plain loops; `wrong` names a control, whose mistake is made."""
    length = {name: n for name, n in zip(NAMES, case.lengths) if n}
    order = list(length)[::-1] if wrong == "text first" else list(length)
    places = [(name, at) for name in order for at in range(length[name])]
    # As wide as the row that could keep most: one of any number of what is masked, and of all of the rest.
    could = [range(n + 1) if f"{name}_mask" in given else [n] for name, n in length.items()]
    widths: list[int] = []
    for counts in itertools.product(*could):
        for i, span in enumerate(_chosen(dict(zip(length, counts)), case, wrong)):
            widths += [0] * (i + 1 - len(widths))
            widths[i] = max(widths[i], sum(map(len, span.values())))
    found: dict[str, np.ndarray] = {}
    for i, width in enumerate(widths):
        width = width if case.ctx_len is not None else len(places)
        vectors, masks, targets = [], [], []
        for row in range(B):
            own = {}
            for name, n in length.items():
                mask = given.get(f"{name}_mask", np.ones(B, bool))[row]
                own[name] = [at for at in range(n) if (mask if mask.ndim == 0 else mask[at])]
            counts = length if wrong == "cut by the batch" else {name: len(ats) for name, ats in own.items()}
            spans = _chosen(counts, case, wrong)
            span = spans[i] if i < len(spans) else {}
            if wrong == "cut by the batch":
                kept = {(name, at) for name, ats in own.items() for at in ats if at in span.get(name, ())}
            else:
                kept = {(name, own[name][k]) for name, ks in span.items() for k in ks}
            empty = [place for place in places if place not in kept]
            here = [place for place in places if place not in empty[: len(places) - width]][:width]
            zero = wrong != "masked vectors kept"
            vectors.append(
                [given[n][row, at] if (n, at) in kept or not zero else np.zeros(D, np.float32) for n, at in here]
            )
            masks.append([True] * len(here) if wrong == "mask forgotten" else [place in kept for place in here])
            if case.targets:
                late = 1 if wrong == "targets one late" else 0
                pad = PAD + 1 if wrong == "targets for all" else PAD
                line = [given["targets"][row, at] if n == "text" and (n, at) in kept else pad for n, at in here]
                targets.append([pad] * late + line[: len(line) - late])
        label = f"{case}{f': chunk {i}' if case.chunks else ''}"
        found[f"{label}: embeddings"] = np.array(vectors, np.float32)
        found[f"{label}: attention_mask"] = np.array(masks, bool)
        if case.targets:
            found[f"{label}: targets"] = np.array(targets, np.int32)
    return found


# ------------------------------------------------------------------------------------------------ the sides


def _call(module: Any, case: Case, given: Mapping[str, Any]) -> list[Any]:
    given = dict(given)
    first = [given.pop(name, None) for name in NAMES]
    if case.chunks:
        return module.fuse_chunks(*first, **given, ctx_len=case.ctx_len)
    return [module.fuse(*first, **given, ctx_len=case.ctx_len, policy=case.policy)]


def fused(side: str, seed: int) -> dict[str, np.ndarray]:
    """What one twin makes of every case; JAX in one program."""
    given = [inputs(case, seed) for case in CASES]
    if side == "jax":
        import jax

        from omni_jax import fusion

        made = jax.jit(lambda every: [_call(fusion, case, x) for case, x in zip(CASES, every)])(given)
    else:
        import torch

        from omni_torch import fusion

        tensors = [{k: torch.from_numpy(v) for k, v in x.items()} for x in given]
        made = [_call(fusion, case, x) for case, x in zip(CASES, tensors)]
    found: dict[str, np.ndarray] = {}
    for case, parts in zip(CASES, made):
        for i, part in enumerate(parts):
            label = f"{case}{f': chunk {i}' if case.chunks else ''}"
            for name, value in part._asdict().items():
                if value is not None:
                    found[f"{label}: {name}"] = np.asarray(value)
    return found


def refusals(side: str) -> dict[str, str]:
    """What one twin says of each case that it must refuse, outside jit; empty if it takes it."""
    if side == "jax":
        import jax.numpy as jnp

        from omni_jax import fusion

        array = jnp.asarray
    else:
        import torch

        from omni_torch import fusion

        array = torch.from_numpy
    said = {}
    for case in REFUSED:
        said[str(case) or "nothing at all"] = ""
        try:
            _call(fusion, case, {k: array(v) for k, v in inputs(case, 0).items()})
        except ValueError as error:
            said[str(case) or "nothing at all"] = str(error)
    return said


def rows_of(
    jax: Mapping[str, np.ndarray], torch: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]
) -> list[Row]:
    """One row a field of each case: both sides must be equal to the truth in every value and in shape."""
    rows = []
    for name in dict.fromkeys([*truth, *jax, *torch]):
        sides = {"jax": jax, "torch": torch, "the truth": truth}
        faults = [f"{side} has none" for side, found in sides.items() if name not in found]
        if not faults:
            faults = [f"{s}: {w}" for s, x in (("jax", jax), ("torch", torch)) if (w := fault(x[name], truth[name]))]
        verdict, words = Verdict.DIFFER if faults else Verdict.AGREE, "; ".join(faults) or "every value equal"
        shape = truth[name].shape if name in truth else ()
        excess = np.inf if faults else 0.0
        rows.append(Row("fusion", "", "", "exact", name, verdict, words, shape=shape, excess=excess))
    return rows


def _refusal_rows(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[Row]:
    rows = []
    for name, said in ours.items():
        fine = said and said == theirs[name]
        silent = " and ".join(side for side, x in (("jax", said), ("torch", theirs[name])) if not x)
        words = said if fine else f"{silent} took it" if silent else f"in other words: {said!r}, {theirs[name]!r}"
        rows.append(
            Row("fusion", "", "", "exact", f"refused: {name}", Verdict.AGREE if fine else Verdict.DIFFER, words)
        )
    return rows


def _alike(x: np.ndarray, y: np.ndarray) -> bool:
    return x.shape == y.shape and np.array_equal(x, y, equal_nan=x.dtype.kind == "f")


def _controls(seed: int) -> list[Control]:
    found = []
    for name in CONTROLS:
        shown, passed = 0, []
        for case in CASES:
            given = inputs(case, seed)
            right, wrong = by_hand(case, given), by_hand(case, given, name)
            both = {k: wrong.get(k) for k in right}
            if all(x is not None and _alike(x, right[k]) for k, x in both.items()):
                continue  # not a mistake here
            shown += 1
            if not any(x is None or fault(x, right[k]) for k, x in both.items()):
                passed.append(str(case))
        words = f"rejected in {shown - len(passed)} of {shown} cases" + (f"; passed in {passed[0]}" if passed else "")
        found.append(Control(name, shown > 0 and not passed, words))
    return found


def run(scope: Scope, progress: Progress) -> CheckResult:
    """Compare every case, then what is refused."""
    started = time.perf_counter()
    result = CheckResult("fusion")
    truth: dict[str, np.ndarray] = {}
    for case in CASES:
        truth |= by_hand(case, inputs(case, scope.seed))
    progress(0, 2, "what is fused")
    result.rows += rows_of(fused("jax", scope.seed), fused("torch", scope.seed), truth)
    progress(1, 2, "what is refused")
    result.rows += _refusal_rows(refusals("jax"), refusals("torch"))
    if scope.controls:
        result.controls = _controls(scope.seed)
    result.seconds = time.perf_counter() - started
    progress(2, 2, "")
    return result
