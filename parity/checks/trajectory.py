"""Whole training runs: every step judged from a common state, and two free runs held against an envelope.

Re-synchronised: both sides start each step from the same state, that of the JAX program's run in float64 (rounded to
float32, which every precision looked at can hold), make one step, and everything that it leaves is judged in noise
units against a third optimizer in extended precision, fed the reference's gradients.

Free: both sides run from the same weights without looking at each other, in float32. Rounding alone drives them apart,
and where training is chaotic exponentially so; how far is measured, not assumed: each framework runs from weights that
are one unit roundoff away, too, and the envelope is a prediction bound for one more such distance. At every step the
quieter framework's bound counts, so that a side which became noisy does not excuse itself by its own noise; and each
side runs twice from one start, which on a CPU must leave the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from parity.checks import Progress, Scope
from parity.errors import CannotLook
from parity.result import CheckResult, Control, Row
from parity.verdict import Judgement, Noise, Verdict

if TYPE_CHECKING:
    from parity.checks._training import Run, Training
    from parity.judge import Judge

__all__ = [
    "BLIND",
    "CLAIM",
    "CONTROLS",
    "FREE_STEPS",
    "JUDGED",
    "PERTURBED",
    "PRECISIONS",
    "SEEDS",
    "STEPS",
    "Envelope",
    "distance",
    "envelope",
    "free_runs",
    "prediction_bound",
    "run",
    "undetermined_moves",
]

CLAIM = (
    "From the same weights and batches both twins train alike: every step from a common state moves every parameter "
    "and both moments by the same amounts, and two free runs stay as near to each other as runs of one framework do "
    "whose weights differ by one unit roundoff."
)
BLIND = (
    "Other recipes, models, batches and more steps than those run; dropout and accumulation (their own checks); in a "
    "free run whatever is fainter than the envelope (clipping without its 1e-6, which the single steps see); the sign "
    "of an update whose gradient is zero up to rounding (such are counted)."
)
CONTROLS = {
    "zeros": "zeros in place of loss, gradient norm and gradients",
    "no update": "zeros in place of a displacement, the old moments in place of the new",
    "sign flipped": "loss, norm and each tensor with its sign flipped",
    "another tensor": "what the next tensor of the same shape and kind has; the norm in place of the loss",
    "decay in the gradient": "weight decay as L2, added to the gradient and so to both moments",
    "beta2 0.99": "another second beta, which moves nothing at the first update",
    "no bias correction": "moments used as they are",
    "rate one step on": "the learning rate of the next step",
    "eps 1e-6": "RMSNorm's eps 1e-6 where 1e-5 is meant, in float64; beside it, whether np.allclose at 1e-3 sees it",
    "free run: rate one step on": "a whole torch run with the learning rate of the next step",
    "free run: eps 1e-6": "a whole torch run with RMSNorm's eps 1e-6",
    "free run: noisy later": "torch gradients noisy by 1e-2 from the middle on, in the perturbed runs as well",
    "free run: one start twice": "the same noise, drawn anew: two runs from one start",
}
PRECISIONS = ("float64", "float32")
STEPS = 50
"""Of a whole run; the default run looks at its beginning."""
FREE_STEPS = 20
JUDGED = (0, 1, 12)
"""The steps that the default run judges: nothing but moments moves at 0 (the warm-up's rate is 0), at 12 it learns."""
SEEDS = 10
"""Free runs of a full look."""
PERTURBED = 8
"""Runs of each framework from weights one unit roundoff away."""
NOISY = 3
"""So many of them in the control whose torch side is noisy."""
DRAWS = 7


def run(scope: Scope, progress: Progress) -> CheckResult:
    """Both modes; `scope.full` asks for every step of the whole run and ten free runs."""
    from parity.checks._steps import merge
    from parity.checks._training import Training

    started = time.perf_counter()
    result = CheckResult("trajectory")
    precisions = [p for p in PRECISIONS if p in scope.precisions]
    if not precisions:
        result.error = f"trajectory looks at {' and '.join(PRECISIONS)} only; ask for one of them with --precision"
        return result
    training = Training()
    if scope.controls and "float64" not in precisions:
        result.notes.append('control "eps 1e-6" of single steps needs float64 and was left out')
    parts: list[Any] = [lambda: _resynchronised(scope, training, precisions, result, progress)]
    if "float32" in precisions:
        parts.append(lambda: free_runs(scope, training, result, progress))
    else:
        result.notes.append("free runs are made in float32 and were left out")
    for part in parts:
        try:
            part()
        except CannotLook as error:  # what was seen until then, and by the other part, stays
            result.error = str(error) if result.error is None else f"{result.error}; {error}"
    progress(1, 1, "")
    result.controls = merge(result.controls)
    result.seconds = time.perf_counter() - started
    return result


# ------------------------------------------------------------------------------------------------ step by step


@dataclass(frozen=True)
class _Step:
    """A step as it was judged: what went in, what should have come out, and what each tensor's verdict was."""

    number: int
    precision: str
    state: Mapping[str, np.ndarray]
    gradients: Mapping[str, np.ndarray]
    truth: Mapping[str, np.ndarray]
    noise: Mapping[str, Noise]
    verdicts: Mapping[str, Verdict]


def _resynchronised(
    scope: Scope, training: Training, precisions: Sequence[str], result: CheckResult, progress: Progress
) -> None:
    from parity.checks._training import batches, start
    from parity.judge import Judge
    from parity.precision import resolve_device

    judged = tuple(range(STEPS)) if scope.full else JUDGED
    tokens, targets = batches(scope.seed, STEPS)
    devices = resolve_device(scope.device)
    pair = training.pair()
    pair.hasty = True
    judge = Judge(pair, draws=DRAWS, seed=scope.seed, devices=devices, device=scope.device)
    weights = start(scope.seed)
    state = {f"p.{name}": x.astype(np.float64) for name, x in weights.items()}
    state |= {f"{k}.{name}": np.zeros(x.shape) for k in "mv" for name, x in weights.items()}
    shown: dict[str, list[_Shown]] = {}
    for number in range(judged[-1] + 1):
        inputs = (tokens[number], targets[number], np.int32(number))
        if number in judged:
            # The same numbers for both precisions: they share one reference and one set of draws.
            common = {k: x.astype(np.float32).astype(np.float64) for k, x in state.items()}
            for precision in precisions:
                progress(judged.index(number), len(judged), f"step {number}, {precision}")
                step = _judged(judge, common, number, inputs, precision, result)
                if scope.controls:
                    wrongs = _wrongs(step, training, inputs)
                    for name, tensors in wrongs.items():
                        shown.setdefault(name, []).append(_rejected(tensors, step))
        if number < judged[-1]:
            named, _ = judge.cpu[0](state, inputs, "float64")
            state = {f"{k}.{x}": named[f"{x}: {_WHAT[k]}"] for k in "pmv" for x in weights}
    for name in CONTROLS:
        if name in shown:
            result.controls.append(_summed(name, shown[name]))


_WHAT = {"p": "displacement", "m": "m", "v": "v"}


def _judged(
    judge: Judge,
    state: Mapping[str, np.ndarray],
    number: int,
    inputs: tuple[Any, ...],
    precision: str,
    result: CheckResult,
) -> _Step:
    """Judge everything that one step left; the optimizer's part against `_update`, fed the reference's gradients."""
    import jax

    from parity.precision import unit_roundoff
    from parity.result import row_from_judgement
    from parity.verdict import judge_tensor, threshold

    unit, wide = unit_roundoff(precision), precision == "float64"
    model = judge.noise(state, inputs, precision)
    left, right = judge.cpu if wide else judge.far
    ours, theirs = left(state, inputs, precision)[0], right(state, inputs, precision)[0]
    truth = judge.pair.named({"outputs": jax.tree.unflatten(model.tree, model.reference)["outputs"]})
    noise = dict(zip(truth, model.noise))
    gradients = {k.removesuffix(": gradient"): x for k, x in truth.items() if k.endswith(": gradient")}
    truth |= _update(state, gradients, number)
    if not set(ours) == set(theirs) == set(truth):
        raise CannotLook(f"the sides' steps leave different things: {', '.join(sorted(set(ours) ^ set(theirs)))}")
    pins = model.pins + (right.pins if wide else ())
    verdicts = {}
    for name, reference in truth.items():
        tensor, _, what = name.partition(": ")
        sides, own, rounded = [ours[name], theirs[name]], noise[name], 0.0
        open_ = np.zeros(reference.shape, bool)
        if what == "displacement":
            start = state[f"p.{tensor}"]
            sides, rounded = [x - start for x in sides], float(np.sqrt(np.mean(np.square(start))))
            grad = noise[f"{tensor}: gradient"]
            reach = threshold(1, max(reference.size, 1), grad.dof)
            open_ = undetermined_moves(truth[f"{tensor}: v"], grad.sigma * unit * reach, number + 1)
        # Where the sign of an update is its noise's, no distance says anything; the rest is judged as ever.
        clear = [np.where(open_, reference, x) for x in sides]
        narrow = own.scaled(unit_roundoff("float32")) if pins else None
        judgement = judge_tensor(
            clear[0], clear[1], reference, own, unit, noisy_reference=wide, pins=pins, pinned=narrow, rounded=rounded
        )
        judgement = _with_open(judgement, open_, sides, reference, number)
        verdicts[name] = judgement.verdict
        result.rows.append(
            row_from_judgement(
                judgement, check="trajectory", config="", regime=f"step {number}", precision=precision, name=name,
                device="cpu" if wide else judge.device, shape=reference.shape,
            )
        )  # fmt: skip
    return _Step(number, precision, state, gradients, truth, noise, verdicts)


def undetermined_moves(second: np.ndarray, noise: np.ndarray, updates: int) -> np.ndarray:
    """Where an update's size and sign are those of rounding noise: √v̂ + eps is within the gradient's `noise`.

    AdamW divides by the gradient's own size, so that a gradient which is zero up to rounding moves its parameter by a
    whole step, either way. `second` is v after the update, `noise` the largest ordinary error of the gradient.
    """
    from parity.checks._training import HYPER

    _, beta2 = HYPER["betas"]
    return np.sqrt(second / -np.expm1(updates * np.log(beta2))) + HYPER["eps"] <= noise


def _with_open(
    judgement: Judgement, open_: np.ndarray, sides: Sequence[np.ndarray], reference: np.ndarray, number: int
) -> Judgement:
    """The judgement with its undetermined elements counted; even those may not move further than AdamW can."""
    if not open_.any():
        return judgement
    most = 2.0 * _largest_move(number)  # the reference may lie at the other end
    words = f"{int(open_.sum())} of {open_.size} elements undetermined: gradients zero up to rounding, so either sign"
    if any(not np.all(np.abs(x - reference)[open_] <= most) for x in sides):
        return replace(judgement, verdict=Verdict.DIFFER, evidence=f"{words}, but one moved further than AdamW can")
    verdict = judgement.verdict
    if open_.all() and verdict is Verdict.AGREE:
        verdict = Verdict.UNDETERMINED
    return replace(judgement, verdict=verdict, evidence=f"{judgement.evidence}; {words}")


def _largest_move(number: int) -> float:
    """The most by which AdamW's m̂/√v̂ can move a parameter at a step, whatever the gradients (Cauchy–Schwarz)."""
    from parity import oracle
    from parity.checks._training import HYPER, RECIPE

    (beta1, beta2), updates = HYPER["betas"], number + 1
    age = np.arange(updates)
    ratio = np.square((1 - beta1) * beta1**age) / ((1 - beta2) * beta2**age)
    corrected = np.sqrt(ratio.sum() * -np.expm1(updates * np.log(beta2))) / -np.expm1(updates * np.log(beta1))
    factor = oracle.factor(number, RECIPE["warmup_steps"], RECIPE["max_steps"], RECIPE["min_ratio"])
    return float(RECIPE["lr"] * factor * corrected)


def _update(
    state: Mapping[str, np.ndarray],
    gradients: Mapping[str, np.ndarray],
    number: int,
    *,
    beta2: float | None = None,
    decay_in_gradient: bool = False,
    corrected: bool = True,
    ahead: int = 0,
) -> dict[str, np.ndarray]:
    """What one step leaves of given gradients, from the formulas, in numpy's widest float; the options are bugs."""
    from parity import oracle
    from parity.checks._training import HYPER, RECIPE

    wide = np.longdouble
    clipped, norm = oracle.clip(gradients, RECIPE["max_norm"])
    rate = wide(RECIPE["lr"]) * oracle.factor(
        number + ahead, RECIPE["warmup_steps"], RECIPE["max_steps"], RECIPE["min_ratio"]
    )
    betas = wide(HYPER["betas"][0]), wide(HYPER["betas"][1] if beta2 is None else beta2)
    eps, decay = wide(HYPER["eps"]), wide(HYPER["weight_decay"])
    correct1, correct2 = (-np.expm1((number + 1) * np.log(b)) if corrected else wide(1) for b in betas)
    left: dict[str, np.ndarray] = {"gradient norm": np.asarray(norm, np.float64)}
    for name, g in clipped.items():
        p, m, v = (state[f"{k}.{name}"].astype(wide) for k in "pmv")
        g = g + decay * p if decay_in_gradient else g
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        step = (m / correct1) / (np.sqrt(v / correct2) + eps) + (0 if decay_in_gradient else decay * p)
        parts = {"displacement": -rate * step, "m": m, "v": v}
        left |= {f"{name}: {what}": np.asarray(x, np.float64) for what, x in parts.items()}
    return left


# ------------------------------------------------------------------------------------------------ controls of steps


def _wrongs(step: _Step, training: Training, inputs: tuple[Any, ...]) -> dict[str, dict[str, np.ndarray]]:
    """By control, the tensors that it changes, as it would have them."""
    number, truth = step.number, step.truth
    moves, kept, seen = [], [], []
    for name in truth:
        tensor, _, what = name.partition(": ")
        if what == "displacement":
            moves.append(name)
        elif what in ("m", "v"):
            kept.append((name, f"{what}.{tensor}"))
        else:
            seen.append(name)
    only = lambda found, names: {k: found[k] for k in names}  # noqa: E731
    update = lambda **bug: _update(step.state, step.gradients, number, **bug)  # noqa: E731
    seconds = [k for k, _ in kept if k.endswith(": v")]
    wrongs = {
        "zeros": {k: np.zeros_like(truth[k]) for k in seen},
        "no update": {k: step.state[before] for k, before in kept},
        "sign flipped": {k: -truth[k] for k in (*seen, *(k for k, _ in kept))},
        "another tensor": _exchanged(truth),
        "decay in the gradient": only(update(decay_in_gradient=True), [k for k, _ in kept]),
        "beta2 0.99": only(update(beta2=0.99), seconds),
        "no bias correction": {},
        "rate one step on": only(update(ahead=1), moves),
    }
    if number:  # at step 0 the rate is 0, and only a wrong rate moves anything
        wrongs["no update"] |= {k: np.zeros_like(truth[k]) for k in moves}
        wrongs["sign flipped"] |= {k: -truth[k] for k in moves}
        wrongs["decay in the gradient"] |= only(update(decay_in_gradient=True), moves)
        wrongs["beta2 0.99"] |= only(update(beta2=0.99), moves)
        wrongs["no bias correction"] = only(update(corrected=False), moves)
    if step.precision == "float64":
        from parity.sides import TorchSide

        bad, _ = TorchSide(training.pair(training.flawed()))(step.state, inputs, step.precision)
        wrongs["eps 1e-6"] = {k: bad[k] for k in (*seen, *(k for k, _ in kept))}
        if number:
            wrongs["eps 1e-6"] |= {k: bad[k] - step.state[f"p.{k.partition(': ')[0]}"] for k in moves}
    return {k: v for k, v in wrongs.items() if v}


def _exchanged(truth: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each as the next one of its kind and shape has it; loss and norm are of one kind."""
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, x in truth.items():
        groups.setdefault((name.partition(": ")[2], x.shape), []).append(name)
    return {k: truth[other] for names in groups.values() for k, other in zip(names, names[1:] + names[:1])}


@dataclass(frozen=True)
class _Shown:
    """How many tensors of a step a control changed, how many were taken all the same, and what allclose would say."""

    count: int
    passed: tuple[str, ...]
    familiar: int
    where: str


def _rejected(tensors: Mapping[str, np.ndarray], step: _Step) -> _Shown:
    """Every determined tensor that the control changes has to be rejected."""
    from parity.checks._twins import FAMILIAR_BOUND
    from parity.precision import unit_roundoff
    from parity.verdict import accepts

    unit, wide = unit_roundoff(step.precision), step.precision == "float64"
    # A tensor that no gradient reached, a moment that is still zero: a control that leaves the truth shows nothing.
    names = [
        k for k, wrong in tensors.items()
        if step.verdicts[k] is not Verdict.UNDETERMINED and not np.array_equal(wrong, step.truth[k])
    ]  # fmt: skip
    passed = [k for k in names if accepts(tensors[k], step.truth[k], step.noise[k], unit, noisy_reference=wide)]
    single = lambda x: np.asarray(x, np.float32)  # noqa: E731
    familiar = sum(
        np.allclose(single(tensors[k]), single(step.truth[k]), rtol=FAMILIAR_BOUND, atol=FAMILIAR_BOUND) for k in names
    )
    return _Shown(len(names), tuple(passed), familiar, f"{step.precision}, step {step.number}")


def _summed(control: str, parts: Sequence[_Shown]) -> Control:
    from parity.checks._twins import FAMILIAR_BOUND

    shown, passed = sum(part.count for part in parts), sum(len(part.passed) for part in parts)
    words = f"rejected on {shown - passed} of {shown} tensors of {len(parts)} steps"
    first = next((part for part in parts if part.passed), None)
    words += f"; passed on {first.where}: {', '.join(first.passed)}" if first else ""
    if control == "eps 1e-6":
        let = sum(part.familiar for part in parts)
        words += f"; np.allclose at {FAMILIAR_BOUND:g} on the float32 values lets {let} of {shown} through"
    return Control(control, all(part.count and not part.passed for part in parts), words)


# ------------------------------------------------------------------------------------------------ free runs


@dataclass(frozen=True)
class Envelope:
    """How far apart rounding alone brings two runs, after each step; `typical` is the middle, `edge` the bound.

    An edge is NaN where nothing was measured: perturbed runs without any spread, or not finite, on both sides.
    """

    distance_typical: np.ndarray
    distance_edge: np.ndarray
    loss_typical: np.ndarray
    loss_edge: np.ndarray


def distance(one: Run, other: Run) -> np.ndarray:
    """‖Δ − Δ′‖ / ‖Δ′‖ after each step, Δ being how far all parameters have come from the run's own start.

    Displacements, because a parameter hides its update; and a perturbed start is no distance of its own. Zero where
    neither has moved, NaN where one is not finite.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        gap = np.linalg.norm(one.moved_NP - other.moved_NP, axis=1)
        way = np.linalg.norm(other.moved_NP, axis=1)
        return np.where(gap == 0, 0.0, gap / way)


def prediction_bound(groups: Sequence[np.ndarray], level: float) -> np.ndarray:
    """Where one more distance lies with probability 1 − level, at each step, if logs of distances are normal.

        exp(max of the groups' mean logs + t·s·√(1 + 1/K))

    Distances grow by factors, so their logs are what scatters evenly. Each group is (K runs, steps), one framework's;
    s is the spread within groups, with all their K − 1 degrees of freedom together, t Student's one-sided quantile.
    NaN where a distance is zero or not finite, or nothing scatters.
    """
    from scipy.special import stdtrit

    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        logs = [np.log(group) for group in groups]
        freedom = sum(len(x) - 1 for x in logs)
        spread = np.sqrt(sum(np.square(x - x.mean(0)).sum(0) for x in logs) / freedom)
        fewest = min(len(x) for x in logs)
        reach = -float(stdtrit(freedom, level)) * np.sqrt(1.0 + 1.0 / fewest)
        bound = np.exp(np.max([x.mean(0) for x in logs], axis=0) + reach * spread)
        return np.where(spread > 0, bound, np.nan)


def envelope(jax: Sequence[Run], torch: Sequence[Run], level: float, unit: float) -> Envelope:
    """Each framework's perturbed runs against its own first run; at every step the smallest of three bounds counts.

    They are JAX's own, torch's own and that of both together, each at a third of `level`. While both frameworks scatter
    alike the common one is the sharpest, for it knows the spread best; where one of them is the noisier, the other's.

    The loss has a sign and passes through zero differences, so its bound is Student's quantile times the RMS of the
    perturbed runs' differences, to which the rounding of the two losses that are subtracted is added.
    """
    from scipy.special import stdtrit

    sides = [jax, torch]
    groups = [np.stack([distance(x, runs[0]) for x in runs[1:]]) for runs in sides]
    moved = np.any([np.linalg.norm(runs[0].moved_NP, axis=1) != 0 for runs in sides], axis=0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        typical = np.fmin.reduce([np.exp(np.log(x).mean(0)) for x in groups])
        edge = np.fmin.reduce([prediction_bound(x, level / 3) for x in ([groups[0]], [groups[1]], groups)])
        apart = [np.stack([x.losses_N - runs[0].losses_N for x in runs[1:]]) for runs in sides]
        rounding = unit * np.sqrt(2) * np.fmin(np.abs(jax[0].losses_N), np.abs(torch[0].losses_N))
        looks = [np.concatenate(x) for x in ([apart[0]], [apart[1]], apart)]
        sizes = [np.hypot(np.sqrt(np.mean(np.square(x), axis=0)), rounding) for x in looks]
        bounds = [-float(stdtrit(len(x), level / 6)) * size for x, size in zip(looks, sizes)]
    return Envelope(
        np.where(moved, typical, 0.0), np.where(moved, edge, 0.0), np.fmin.reduce(sizes), np.fmin.reduce(bounds)
    )


def free_runs(
    scope: Scope, training: Training, result: CheckResult, progress: Progress, steps: int | None = None
) -> None:
    """Add rows, controls and curves of the free runs to `result`: one seed, or `SEEDS` of them if `scope.full`."""
    from parity.checks._training import batches, perturbed, start
    from parity.precision import resolve_device, unit_roundoff
    from parity.statistics import share

    steps = steps or (STEPS if scope.full else FREE_STEPS)
    seeds = range(scope.seed, scope.seed + (SEEDS if scope.full else 1))
    far_jax, far_torch = resolve_device(scope.device)
    unit = unit_roundoff("float32")
    level = share(2 * steps * len(seeds))  # parameters and loss, every step of every run
    parts: dict[str, list[np.ndarray]] = {}
    twice: list[Control] = []
    for seed in seeds:
        progress(seed - scope.seed, len(seeds), f"free run, seed {seed}")
        begin = start(seed)
        starts = [begin, *(perturbed(begin, seed, k) for k in range(PERTURBED))]
        tokens, targets = batches(seed, steps)
        left = training.jax_runs(starts, tokens, targets, far_jax)
        right = [training.torch_run(x, tokens, targets, far_torch) for x in starts]
        bounds = envelope(left, right, level, unit)
        apart, losses = distance(right[0], left[0]), _apart(right[0].losses_N, left[0].losses_N)
        where: dict[str, Any] = {"regime": f"free run, seed {seed}", "device": scope.device, "until": steps}
        where["lost"] = _lost(left[0], right[0])
        both = left[0].lost == right[0].lost < steps
        if both:  # NaN beside NaN agrees about nothing, but what was before can be told
            where |= {"until": left[0].lost, "lost": ""}
        result.rows.append(_row("parameters of a free run", apart, bounds.distance_edge, **where))
        result.rows.append(_row("loss of a free run", losses, bounds.loss_edge, size=left[0].losses_N, **where))
        again = {
            "JAX": (left[0], training.jax_runs(starts, tokens, targets, far_jax)[0]),
            "torch": (right[0], training.torch_run(begin, tokens, targets, far_torch)),
        }
        for side, runs in again.items():
            row = _repeated(side, *runs, bounds.distance_edge, _exact(side, scope.device))
            result.rows.append(replace(row, regime=where["regime"], device=scope.device))
        if seed == scope.seed:
            result.series = _series(left[0], right[0], apart, losses, bounds)
        if both:
            raise CannotLook(
                f"both free runs became NaN or infinite at step {left[0].lost}: NaN beside NaN agrees about nothing"
            )
        if scope.controls:
            wrong_run = partial(training.torch_run, tokens=tokens, targets=targets, device=far_torch)
            bugs: dict[str, Any] = {
                "free run: rate one step on": {"ahead": 1},
                "free run: eps 1e-6": {"module": training.flawed()},
            }
            for name, bug in bugs.items():
                wrong = distance(wrong_run(begin, **bug), left[0])
                parts.setdefault(name, []).append(_share(wrong, bounds.distance_edge))
            # Noise that came late is in every run of the noisy side, those that measure its envelope included.
            noisy = [wrong_run(x, noise=k) for k, x in enumerate(starts[: NOISY + 1])]
            edge = envelope(left, noisy, level, unit).distance_edge
            parts.setdefault("free run: noisy later", []).append(_share(distance(noisy[0], left[0]), edge))
            row = _repeated("noisy", noisy[0], wrong_run(begin, noise=len(noisy)), edge, exact=True)
            twice.append(Control("", row.verdict is Verdict.UNSTABLE, row.evidence))
    for name, shown in parts.items():
        if shown:
            result.controls.append(_told(name, shown))
    if twice:
        rejected = sum(control.rejected for control in twice)
        words = f"rejected in {rejected} of {len(twice)} runs: {twice[0].evidence}"
        result.controls.append(Control("free run: one start twice", rejected == len(twice), words))


def _apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        return np.abs(one - other)


def _lost(left: Run, right: Run) -> str:
    """Which side was the first to be not finite, and where; empty if both are finite throughout."""
    runs = {"JAX": left, "torch": right}
    side, other = sorted(runs, key=lambda k: runs[k].lost)
    run, step = runs[side], runs[side].lost
    if step == len(run.losses_N):
        return ""
    words = f"{side} is NaN or infinite from step {step} on, where {other} is finite"
    return f"{words}; its optimizer refused the gradients: {run.refused}" if run.refused else words


def _row(
    name: str,
    found: np.ndarray,
    edge: np.ndarray,
    *,
    regime: str,
    device: str,
    until: int,
    lost: str,
    size: np.ndarray | float = 1.0,
) -> Row:
    """AGREE if `found` stays within `edge` at every step before `until`; NaN is outside.

    Where there is no edge, more than `unstable_ratio` roundings per update is a difference, less is undetermined.
    `size` makes what would be seen relative.
    """
    from parity.precision import unit_roundoff
    from parity.verdict import THRESHOLDS

    size = np.broadcast_to(size, found.shape)[:until]
    found, edge = found[:until], edge[:until]
    if not found.size:
        return Row("trajectory", "", regime, "float32", name, Verdict.UNDETERMINED, "nothing is finite", device=device)
    bare = np.isnan(edge) & ~(found == 0)
    crude = THRESHOLDS.unstable_ratio * unit_roundoff("float32") * np.arange(1, len(found) + 1) * np.abs(size)
    share = _share(found, np.where(bare, crude, edge))
    outside = np.flatnonzero(~(share <= 1))
    worst = int(np.argmax(share))
    inside = f"inside the envelope for all {len(found)} steps, nearest to its edge after step {worst}, at"
    verdict, words = Verdict.AGREE, f"{inside} {share[worst]:.0%} of it"
    none = "no envelope at step {}, for neither framework's perturbed runs scatter, and the twins are {:.3g} apart"
    if outside.size:
        first = int(outside[0])
        verdict = Verdict.DIFFER
        if np.isnan(found[first]):
            words = lost or f"not finite at step {first}"
        elif bare[first]:
            words = none.format(first, found[first])
            words += f", {share[first]:.3g} times what {THRESHOLDS.unstable_ratio:g} roundings per update explain"
        else:
            words = f"left the envelope at step {first}: {found[first]:.3g} where {edge[first]:.3g} is its edge"
        known = share[np.isfinite(share)]
        words += f"; outside at {outside.size} of {len(found)} steps, at most {np.max(known, initial=0.0):.3g} times"
        words += " the edge where it is finite" if len(known) < len(share) else " the edge"
        if lost and not np.isnan(found[first]):
            words += f"; {lost}"
    elif bare.any():
        first = int(np.argmax(bare))
        verdict, words = Verdict.UNDETERMINED, none.format(first, found[first])
    return Row(
        "trajectory", "", regime, "float32", name, verdict, words, device=device,
        shape=(len(found),), excess=float(share[worst]), smallest_seen=_smallest(edge / size),
    )  # fmt: skip


def _exact(side: str, device: str) -> bool:
    """Must two runs leave the same bits? On a CPU, and in torch on one core: more of them may sum in any order."""
    import torch

    return device == "cpu" and (side == "JAX" or torch.get_num_threads() == 1)


def _differs(one: Run, other: Run) -> np.ndarray:
    """At which steps two runs differ in any bit; NaN equals NaN."""
    equal = lambda x, y: (x == y) | (np.isnan(x) & np.isnan(y))  # noqa: E731
    places = equal(one.places_NP[1:], other.places_NP[1:]).all(1)
    return ~(places & equal(one.losses_N, other.losses_N))


def _repeated(side: str, one: Run, other: Run, edge: np.ndarray, exact: bool) -> Row:
    """UNSTABLE if two runs of one side from one start are not the same; unless `exact`, if they leave the envelope."""
    parted = _differs(one, other)
    gap = distance(other, one)
    shares = np.where(parted, _share(np.where(np.isnan(one.moved_NP).any(1), 0.0, gap), edge), 0.0)
    verdict, words = Verdict.AGREE, f"two {side} runs from one start leave the same bits for all {len(parted)} steps"
    if parted.any():
        first = int(np.argmax(parted))
        words = f"two {side} runs from one start part at step {first}, by {np.nanmax(gap, initial=0.0):.3g} at most"
        bad = exact or not np.all(shares <= 1)
        verdict = Verdict.UNSTABLE if bad else Verdict.AGREE
        words += f": the {side} side is not deterministic" if bad else ", inside the envelope"
    return Row(
        "trajectory", "", "", "float32", f"one start twice: {side}", verdict, words,
        shape=(len(parted),), excess=float(np.max(shares)),
    )  # fmt: skip


def _smallest(edge: np.ndarray) -> float | None:
    live = edge[np.isfinite(edge) & (edge > 0)]
    return float(np.min(live)) if live.size else None


def _share(found: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """found / edge, 0 where both are 0 and infinite where only the edge is, or where `found` is no number."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(found == 0, 0.0, found / edge)
    return np.where(np.isnan(share), np.inf, share)


def _told(name: str, shares: Sequence[np.ndarray]) -> Control:
    """A bug in a free run is rejected if every run that had it left the envelope; `shares` are distances per edge."""
    first = [int(np.argmax(~(share <= 1))) for share in shares if not np.all(share <= 1)]
    words = f"{len(first)} of {len(shares)} runs left the envelope"
    if first:
        largest = [float(np.max(share[np.isfinite(share)], initial=0.0)) for share in shares]
        words += f", by step {max(first)} at the latest; {min(largest):.3g} times the edge or more"
    return Control(name, rejected=len(first) == len(shares), evidence=words)


def _series(left: Run, right: Run, apart: np.ndarray, losses: np.ndarray, bounds: Envelope) -> dict[str, list[float]]:
    curves = {
        "step": np.arange(len(apart)),
        "loss jax": left.losses_N,
        "loss torch": right.losses_N,
        "loss difference": losses,
        "loss difference, typical": bounds.loss_typical,
        "loss difference, edge": bounds.loss_edge,
        "distance": apart,
        "distance, typical": bounds.distance_typical,
        "distance, edge": bounds.distance_edge,
    }
    return {name: [float(x) for x in curve] for name, curve in curves.items()}
