"""Where two sides part: the first tap whose inputs agree and whose output does not, and the side that left.

Forward, that is the first tap in the order of execution that differs. Of gradients, whose forward pass agrees, it is
the last parameter in that order: the backward pass comes by there first. Single-step mode feeds every part of the
program the reference's activation (and, backwards, the reference's gradient), so that each tensor shows what its own
part does to it and nothing that was inherited.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from parity.causes import SECONDS, optimizer
from parity.diagnosis import Diagnosis, Question, diagnose
from parity.errors import CannotLook
from parity.judge import WATCHERS, Findings, Judge
from parity.pair import Pair
from parity.result import Row
from parity.verdict import Judgement, Verdict

__all__ = ["Location", "Step", "found_in", "locate", "locate_pair", "place_of", "single_step", "watched"]

TAP, GRADIENT = "tap ", "gradient "
MOST = 64
"""So many comparisons that part are kept while a check runs."""


@dataclass(frozen=True)
class Step:
    """One tensor on the way: a tap, an output, the loss or a gradient."""

    name: str
    verdict: Verdict
    z: float
    """How far the sides are apart, each having gone the whole way by itself."""
    side: str
    """Which side left the reference: jax, torch, both, "" for none."""
    own_verdict: Verdict | None = None
    own_z: float | None = None
    """The same where this part alone ran, on the reference's activation; None where it was not run so."""


@dataclass
class Location:
    """Where the sides of one pair part, in one precision."""

    precision: str
    steps: list[Step]
    place: str = ""
    """The tensor at which they part; "" where they do not."""
    side: str = ""
    evidence: str = ""
    diagnosis: Diagnosis | None = None
    notes: list[str] = field(default_factory=list)
    label: str = ""
    """The configuration and regime, where there are several."""

    @property
    def parts(self) -> bool:
        return bool(self.place)

    @property
    def exit_code(self) -> int:
        """0 they agree, 1 they part, 3 nothing was determined."""
        if self.parts:
            return 1
        return 0 if any(step.verdict is Verdict.AGREE for step in self.steps) else 3

    @property
    def sentence(self) -> str:
        """Where, which side, and why, in a line."""
        where = ", ".join(part for part in (self.label, self.precision) if part)
        if not self.parts:
            return f"{where}: the sides part nowhere"
        text = f"{where}: the sides part at {_plain(self.place)}"
        text += f"; {_blame(self.side, self.precision)}" if self.side else ""
        return text if self.diagnosis is None else f"{text}; diagnosis of {self.diagnosis.tensor}: {self.diagnosis}"

    def to_dict(self) -> dict[str, Any]:
        made = asdict(self) | {"exit_code": self.exit_code, "sentence": self.sentence}
        if self.diagnosis is not None:
            made["diagnosis"]["named"] = self.diagnosis.named
        return made


def locate(
    jax: Callable[..., Any],
    torch: Any,
    params: Any,
    inputs: Sequence[Any],
    *,
    loss: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
    rename: Mapping[str, str] | None = None,
    axes: Mapping[str, tuple[int, ...]] | None = None,
    torch_shapes: Mapping[str, Sequence[int]] | None = None,
    precision: str = "float64",
    single: bool = False,
    seconds: float = SECONDS,
    draws: int = 16,
    seed: int = 0,
) -> Location:
    """Where do a JAX function and a torch module part? The arguments are those of `parity.compare`.

    Name intermediates in JAX with jax.ad_checkpoint.checkpoint_name(x, "path.of.the.torch.submodule"): those are the
    taps that can be named. `single`: single-step mode as well. `seconds`: so long the cause is looked for (0: not at
    all).

    Returns a Location: `.place`, `.side`, `.diagnosis`, `.steps`, `.sentence`.
    Raises parity.errors.Misuse for weights that do not bind, CannotLook for a side that raises.
    """
    from parity.pair import pair_of

    pair = pair_of(jax, torch, params, loss=loss, rename=rename, axes=axes, torch_shapes=torch_shapes, name="locate")
    arrays = tuple(np.asarray(x) for x in inputs)
    judge = Judge(pair, draws=draws, seed=seed)
    return locate_pair(judge, pair.weights(weights), arrays, precision, single=single, seconds=seconds)


def locate_pair(
    judge: Judge,
    weights: Mapping[str, np.ndarray],
    inputs: Sequence[Any],
    precision: str,
    *,
    single: bool = False,
    model: bool = True,
    seconds: float = math.inf,
    findings: Findings | None = None,
) -> Location:
    """The place at which a judge's pair parts.

    `model`: the library of our own models' bugs is asked as well. `seconds`: so long the cause is looked for (0: not at
    all). `findings`: those of a run that was made already.
    """
    findings = judge(weights, inputs, precision) if findings is None else findings
    order = {link.torch: i for i, link in enumerate(judge.pair.links)}
    if hasattr(judge.pair.torch, "named_parameters"):
        order = {name: i for i, (name, _) in enumerate(judge.pair.torch.named_parameters())}
    found = Location(precision, _steps(findings, order), notes=list(findings.notes))
    if single:
        try:
            found.steps = single_step(judge, weights, inputs, findings, found.steps)
        except CannotLook as error:
            found.notes.append(f"no single steps: {error}")
    found.place = place_of(findings, order)
    if found.parts:
        judgement = _judgements(findings)[found.place]
        found.side, found.evidence = _side(judgement), judgement.evidence
        alike = findings.precision == "float64" and judgement.same.within and not optimizer.fits(found.place)
        if alike:
            found.notes.append(
                "both sides do the same: no difference between them explains why they left the reference"
            )
        elif judgement.verdict is Verdict.UNSTABLE:
            found.notes.append(f"{_plain(found.place)} loses bits: what rounding makes of it is no evidence of a cause")
        elif not seconds > 0:
            found.notes.append("no cause was looked for: --explain gives it no time (any more)")
        else:
            found.diagnosis = _why(judge.pair, weights, inputs, findings, found, model, seconds)
    return found


def place_of(findings: Findings, order: Mapping[str, int] | None = None) -> str:
    """The name of the tensor at which the sides part, as in Findings.values; "" if they do not."""
    if findings.parted:
        return f"{TAP}{findings.parted}"
    bad = [name for name, j in findings.outputs.items() if _parted(j)]
    forward = [name for name in bad if not name.startswith(GRADIENT) and name != "loss"]
    if forward or not bad:
        return forward[0] if forward else ""
    if "loss" in bad:
        return "loss"
    names = list(findings.outputs)
    return max(bad, key=lambda name: (order or {}).get(name.removeprefix(GRADIENT), names.index(name)))


Compared = tuple[Judge, Mapping[str, np.ndarray], Sequence[Any], Findings]


@contextlib.contextmanager
def watched(every: bool = False) -> Iterator[list[Compared]]:
    """The comparisons that are made inside: those that part (controls, which must, among them), or every one."""
    seen: list[Compared] = []

    def watch(judge: Judge, weights: Mapping[str, np.ndarray], inputs: Sequence[Any], findings: Findings) -> None:
        if every or (len(seen) < MOST and any(_parted(j) for j in _judgements(findings).values())):
            seen.append((judge, weights, inputs, findings))

    WATCHERS.append(watch)
    try:
        yield seen
    finally:
        WATCHERS.remove(watch)


def found_in(
    compared: Sequence[Compared],
    rows: Sequence[Row],
    *,
    single: bool = False,
    model: bool = True,
    seconds: float = math.inf,
) -> Location | None:
    """Where a failed check parts, and why: from the first comparison that does, else from the rows alone."""
    bad = [row for row in rows if row.decides and row.verdict.gravity >= Verdict.PINNED.gravity]
    if not bad:
        return None
    for judge, weights, inputs, one in compared:
        row = next((row for row in bad if _is_of(row, one)), None)
        if row is not None:
            found = locate_pair(
                judge, weights, inputs, one.precision, single=single, model=model, seconds=seconds, findings=one
            )
            found.label = _label(row)
            return found
    first = bad[0]
    step = Step(first.name, first.verdict, first.z_same or float("nan"), _side_of(first))
    return Location(first.precision, [step], first.name, step.side, first.evidence, label=_label(first))


def _is_of(row: Row, findings: Findings) -> bool:
    """Whether a row tells of these findings: a check's controls are compared, and part, as well."""
    return row.precision == findings.precision and any(
        _parted(j) and j.same.rms == row.z_same for j in _judgements(findings).values()
    )


def _label(row: Row) -> str:
    return ", ".join(part for part in (row.config, row.regime) if part)


def _side_of(row: Row) -> str:
    """The side that a row's evidence names."""
    sides = [side for side in ("jax", "torch") if f"{side} left" in row.evidence or f"{side} errs" in row.evidence]
    return "both" if "jax and torch left" in row.evidence else sides[0] if sides else ""


def _judgements(findings: Findings) -> dict[str, Judgement]:
    return {f"{TAP}{k}": j for k, j in findings.taps.items()} | findings.outputs


def _parted(judgement: Judgement) -> bool:
    return judgement.verdict.gravity >= Verdict.PINNED.gravity


def _steps(findings: Findings, order: Mapping[str, int]) -> list[Step]:
    """Taps in the order of execution, outputs, then gradients as the backward pass comes by."""
    every = _judgements(findings)
    gradients = [name for name in every if name.startswith(GRADIENT)]
    gradients.sort(key=lambda name: -order.get(name.removeprefix(GRADIENT), 0))
    names = [name for name in every if not name.startswith(GRADIENT)] + gradients
    return [Step(name, every[name].verdict, every[name].same.rms, _side(every[name])) for name in names]


def _side(judgement: Judgement) -> str:
    left = [name for name, d in (("jax", judgement.jax), ("torch", judgement.torch)) if not d.within]
    if len(left) == 2:
        return "both"
    if left:
        return left[0]
    if judgement.verdict is Verdict.UNSTABLE:
        return "torch" if judgement.accurate_torch < judgement.accurate_jax else "jax"
    return "both" if _parted(judgement) else ""


def _blame(side: str, precision: str) -> str:
    if precision == "float64" and side == "torch":
        return "torch left the float64 reference, which is what the JAX program says: one of the two is wrong"
    if precision == "float64" and side == "jax":
        return "the JAX side left the float64 reference"
    return "both sides left the float64 reference" if side == "both" else f"the {side} side left the float64 reference"


def _plain(name: str) -> str:
    return name.removeprefix(TAP)


def _why(
    pair: Pair,
    weights: Mapping[str, Any],
    inputs: Sequence[Any],
    findings: Findings,
    found: Location,
    model: bool,
    seconds: float,
) -> Diagnosis | None:
    wide = findings.precision == "float64"
    # In float64 the two programs are compared; in less, the side that left the reference with the reference.
    # An optimizer has an oracle that is neither program: there, too, the side that left it.
    wide = wide and not optimizer.fits(found.place)
    jax_left = found.side == "jax" and not wide
    ours = {k: v[0] if wide else v[2] for k, v in findings.values.items()}
    theirs = {k: v[0] if jax_left else v[1] for k, v in findings.values.items()}
    noise = {k: v[3] for k, v in findings.values.items()}
    # A tensor that loses bits is apart by rounding alone, one that is undetermined by a choice: neither is evidence.
    told = (Verdict.PINNED, Verdict.DIFFER)
    bad = frozenset(name for name, j in _judgements(findings).items() if j.verdict in told)
    until = time.monotonic() + seconds
    try:
        return diagnose(
            Question(pair, weights, inputs, findings.precision, found.place, ours, theirs, noise, bad, until), model
        )
    except CannotLook as error:
        found.notes.append(f"no diagnosis: {error}")
        return None


# ------------------------------------------------------------------------------------------------ single steps


def single_step(
    judge: Judge, weights: Mapping[str, np.ndarray], inputs: Sequence[Any], findings: Findings, steps: list[Step]
) -> list[Step]:
    """The steps with what each part does by itself; gradients at taps are added, which no whole run shows.

    Raises:
        CannotLook: there are no taps, or the torch side has no sub-modules.
    """
    from parity.cut import TAP as PREFIX
    from parity.cut import cotangents, cut

    pair = judge.pair
    values = {k.removeprefix(TAP): v[2] for k, v in findings.values.items() if k.startswith(TAP)}
    if not values:
        raise CannotLook("the pair has no taps; name intermediates with jax.ad_checkpoint.checkpoint_name")
    paths = {name: (pair.taps or {}).get(name, name) for name in values}
    given = {f"{PREFIX}{name}": value for name, value in values.items()}
    arrives = None
    if pair.loss is not None:
        arrives = cotangents(pair, pair.jax_params(weights), inputs, values)
    made = cut(pair, paths, {name: value.shape for name, value in values.items()}, arrives)
    judge_alone = Judge(
        made,
        draws=judge.draws,
        seed=judge.seed,
        devices=(judge.far[0].device, judge.far[1].device),
        device=judge.device,
        limits=judge.limits,
        shares=judge.shares,
    )
    alone = _judgements(judge_alone({**weights, **given}, inputs, findings.precision))
    alone.pop("loss", None)  # what it adds up is not the pair's loss
    named = {_own_name(name): judgement for name, judgement in alone.items()}
    every = []
    for step in steps:
        own = named.get(step.name)
        if own is not None:
            step = replace(step, own_verdict=own.verdict, own_z=own.same.rms, side=_side(own))
        every.append(step)
    known = {step.name for step in steps}
    extra = [name for name in named if name.startswith(f"{GRADIENT}{TAP}") and name not in known]
    order = list(values)
    extra.sort(key=lambda name: -order.index(name.removeprefix(f"{GRADIENT}{TAP}")))
    return every + [
        Step(name, named[name].verdict, float("nan"), _side(named[name]), named[name].verdict, named[name].same.rms)
        for name in extra
    ]


def _own_name(name: str) -> str:
    """The name in a cut pair's findings -> the name in those of the pair."""
    if name.startswith("taps."):
        return f"{TAP}{name.removeprefix('taps.')}"
    return name.removeprefix("outputs.") if name != "outputs" else "output"
