"""Who computes AdamW best: 1,000 float32 steps of both twins, torch.optim and optax against an oracle, with the causes.

    parity optimizers [--steps 1000] [--lr 1e-3] [--seed 0] [--json FILE]

The oracle (parity.oracle.adamw) works in numpy's widest float. The floor is the same, except that parameters and
moments are rounded to float32 after every step: what nobody who stores float32 can avoid, and so the noise unit here.
Displacements are compared, because parameters hardly move. Why a library stands where it stands is found by emulating
its arithmetic and taking one cause away at a time. Informs only: no verdict depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

import numpy as np

from parity import oracle
from parity.errors import Misuse
from parity.oracle import Tree

__all__ = ["FLOOR", "HYPER", "NEAREST", "OURS", "PARTIES", "Problem", "Standing", "compare", "lines", "note", "problem"]

HYPER = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
OURS = ("omni_torch.AdamW", "omni_jax.adamw_step", "omni_jax.adamw in optax")
FLOOR = "the floor: only storing rounds"
NEAREST = "ours are the nearest"
"""What `note` says where it is so."""


@dataclass(frozen=True)
class Problem:
    """Parameters to start from, a gradient tree per step (float32 all), and the learning rate."""

    start: dict[str, np.ndarray]
    grads: list[dict[str, np.ndarray]]
    lr: float

    @property
    def rates(self) -> list[float]:
        """The learning rate of each step."""
        return [self.lr] * len(self.grads)


@dataclass(frozen=True)
class Standing:
    """One party's distance from the oracle after the last step."""

    party: str
    rank: int
    """1 is the nearest; 0 is the floor."""
    bits: float
    """−log2 of the error over the displacement: RMS over each tensor, then over the tensors."""
    by_tensor: dict[str, float]
    """The same for each tensor."""
    noise_units: float
    """The error over the floor's, RMS over each tensor, then over the tensors."""
    ulps: tuple[float, float, float]
    """Median, 99th percentile and worst of the elements' errors, in float32 units in the last place of the RMS
    displacement of their tensor."""
    cause: str
    without: dict[str, float]
    """Bits of this party's emulation with causes taken away, by their names (joined by "; "); "" is with all."""
    explained: float | None
    """The share of the party's deviation that its emulation accounts for; None where there is no emulation."""


def problem(steps: int = 1000, lr: float = 1e-3, seed: int = 0) -> Problem:
    """A matrix, an embedding with rare rows, a norm scale, a bias, and a tensor whose gradients are near eps.

    Gradients are drawn about a fixed mean of 0.3 of their spread, so that parameters move; an embedding row has a
    gradient at one step in four. Raises Misuse for fewer than one step.
    """
    if steps < 1:
        raise Misuse(f"steps: must be at least 1, got {steps}")
    if not 0.0 < lr < math.inf:
        raise Misuse(f"lr: must be finite and above 0 (nothing moves else), got {lr}")
    rng = np.random.default_rng([seed, 17])
    shapes = {"matrix": (48, 24), "embedding": (40, 16), "scale": (48,), "bias": (48,), "tiny gradients": (24, 16)}
    first = {"matrix": 0.1, "embedding": 1.0, "bias": 0.0, "tiny gradients": 0.1}
    spread = {"matrix": 0.1, "embedding": 1e-3, "scale": 0.3, "bias": 1.0, "tiny gradients": 1e-9}
    start = {k: first[k] * rng.standard_normal(s) if k in first else np.ones(s) for k, s in shapes.items()}
    mean = {k: 0.3 * rng.standard_normal(s) for k, s in shapes.items()}

    def gradient(name: str) -> np.ndarray:
        g = spread[name] * (mean[name] + rng.standard_normal(shapes[name]))
        return g * (rng.random((shapes[name][0], 1)) < 0.25) if name == "embedding" else g

    narrow = lambda tree: {k: np.asarray(v, np.float32) for k, v in tree.items()}  # noqa: E731
    return Problem(narrow(start), [narrow({k: gradient(k) for k in shapes}) for _ in range(steps)], lr)


# --- the parties: Problem -> parameters after the last step ----------------------------------------------------------


def _torch_optimizer(make: Callable[[list[Any], float], Any]) -> Callable[[Problem], dict[str, np.ndarray]]:
    def run(given: Problem) -> dict[str, np.ndarray]:
        import torch

        params = {k: torch.nn.Parameter(torch.from_numpy(v.copy())) for k, v in given.start.items()}
        optimizer = make(list(params.values()), given.lr)
        for grads in given.grads:
            for name, p in params.items():
                p.grad = torch.from_numpy(grads[name])
            optimizer.step()
        return {k: p.detach().numpy() for k, p in params.items()}

    return run


def _omni_torch(params: list[Any], lr: float) -> Any:
    from omni_torch.optim import AdamW

    return AdamW(params, lr=lr, **HYPER)


def _torch_optim(**switches: Any) -> Callable[[list[Any], float], Any]:
    def make(params: list[Any], lr: float) -> Any:
        import torch

        return torch.optim.AdamW(params, lr=lr, **HYPER, **switches)

    return make


def _omni_jax(given: Problem) -> dict[str, np.ndarray]:
    import jax

    from omni_jax.optim import adamw_step, init_adamw_state

    step = jax.jit(lambda p, s, g: adamw_step(p, g, s, given.lr, **HYPER), donate_argnums=(0, 1))
    params = {k: jax.numpy.array(v) for k, v in given.start.items()}
    state = init_adamw_state(params)
    for grads in given.grads:
        params, state = step(params, state, grads)
    return {k: np.asarray(v) for k, v in params.items()}


def _optax(make: Callable[[float], Any]) -> Callable[[Problem], dict[str, np.ndarray]]:
    def run(given: Problem) -> dict[str, np.ndarray]:
        import jax
        import optax

        optimizer = make(given.lr)

        def advance(params: Any, state: Any, grads: Any) -> Any:
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        # optax promotes its int32 count to float32 on its own: strict promotion is for our code.
        with jax.numpy_dtype_promotion("standard"):
            step = jax.jit(advance, donate_argnums=(0, 1))
            params = {k: jax.numpy.array(v) for k, v in given.start.items()}
            state = optimizer.init(params)
            for grads in given.grads:
                params, state = step(params, state, grads)
        return {k: np.asarray(v) for k, v in params.items()}

    return run


def _omni_adamw(lr: float) -> Any:
    from omni_jax.optim import adamw

    return adamw(lr, **HYPER)


def _optax_adamw(lr: float) -> Any:
    import optax

    b1, b2 = HYPER["betas"]
    return optax.adamw(lr, b1=b1, b2=b2, eps=HYPER["eps"], weight_decay=HYPER["weight_decay"])


PARTIES: dict[str, Callable[[Problem], dict[str, np.ndarray]]] = {
    "omni_torch.AdamW": _torch_optimizer(_omni_torch),
    "omni_jax.adamw_step": _omni_jax,
    "omni_jax.adamw in optax": _optax(_omni_adamw),
    "torch.optim.AdamW, for-loop": _torch_optimizer(_torch_optim(foreach=False, fused=False)),
    "torch.optim.AdamW, foreach": _torch_optimizer(_torch_optim(foreach=True, fused=False)),
    "torch.optim.AdamW, fused": _torch_optimizer(_torch_optim(foreach=False, fused=True)),
    "optax.adamw": _optax(_optax_adamw),
}
"""Who is compared: each runs a problem in float32 on the CPU, as its users do (JAX: jitted and donated)."""

_TORCH = (oracle.TORCH_CAUSE, oracle.AVERAGE_CAUSE)
_OPTAX = (oracle.OPTAX_CAUSE, oracle.AVERAGE_CAUSE)


def _emulation(party: str) -> tuple[str, Callable[..., Tree], tuple[str, ...]] | None:
    """(whose arithmetic it is, its emulation, the causes that it knows) of a party that has one."""

    def last(emulate: Callable[..., list[oracle.Step]], **fixed: Any) -> Callable[..., Tree]:
        def run(given: Problem, without: Collection[str]) -> Tree:
            return emulate(given.start, given.grads, given.rates, **HYPER, without=without, **fixed)[-1].p

        return run

    if party.startswith("torch.optim"):
        return "torch", last(oracle.torch_adamw), _TORCH
    if party.startswith("optax"):
        return "optax", last(oracle.optax_adamw, jitted=True), _OPTAX
    return None


# --- the comparison --------------------------------------------------------------------------------------------------


def compare(
    given: Problem,
    parties: Sequence[str] = tuple(PARTIES),
    progress: Callable[[int, int, str], None] = lambda done, total, label: None,
) -> list[Standing]:
    """Run the parties and the oracle on one problem: the floor first, then the parties from near to far.

    Raises Misuse for a party that does not exist.
    """
    unknown = [party for party in parties if party not in PARTIES]
    if unknown:
        raise Misuse(f"party: {', '.join(unknown)} is not known (known: {', '.join(PARTIES)})")
    kinds = {e[0]: e for e in map(_emulation, parties) if e is not None}
    total, done = 2 + len(parties) + sum(2 ** len(causes) for _, _, causes in kinds.values()), 0

    def working(label: str) -> None:
        nonlocal done
        progress(done, total, label)
        done += 1

    working("the oracle")
    arguments = (given.start, given.grads, given.rates)
    truth = _moved(oracle.adamw(*arguments, **HYPER)[-1].p, given)
    working(FLOOR)
    floor = _moved(oracle.stored_adamw(*arguments, **HYPER)[-1].p, given)
    ends = {}
    for party in parties:
        working(party)
        ends[party] = _moved(PARTIES[party](given), given)
    emulated: dict[str, dict[str, Tree]] = {}
    for kind, emulate, causes in kinds.values():
        emulated[kind] = {}
        for taken in chain.from_iterable(combinations(causes, n) for n in range(len(causes) + 1)):
            working(f"why: {kind} without {'; '.join(taken)}" if taken else f"why: {kind}")
            emulated[kind]["; ".join(taken)] = _moved(emulate(given, taken), given)
    progress(total, total, "")

    order = sorted(ends, key=lambda party: _relative(ends[party], truth))
    standings = [_standing(FLOOR, 0, floor, floor, truth, "storing float32, which all must", {}, None)]
    for rank, party in enumerate(order, 1):
        kind = _emulation(party)
        runs = emulated[kind[0]] if kind else {}
        without = {k: _bits(_relative(v, truth)) for k, v in runs.items()}
        share = oracle.explained(ends[party], runs[""], truth) if kind else None
        cause = _main_cause(without) if kind else "storing float32, as the floor does"
        standings.append(_standing(party, rank, ends[party], floor, truth, cause, without, share))
    return standings


def _moved(end: Tree, given: Problem) -> dict[str, np.ndarray]:
    return {k: v.astype(np.longdouble) - given.start[k].astype(np.longdouble) for k, v in end.items()}


def _rms(x: np.ndarray) -> float:
    return math.sqrt(float(np.mean(np.square(x))))


def _relative(moved: Tree, truth: Tree) -> float:
    return math.sqrt(float(np.mean([(_rms(moved[k] - x) / _rms(x)) ** 2 for k, x in truth.items()])))


def _bits(relative: float) -> float:
    return -math.log2(relative) if relative else math.inf


def _main_cause(without: Mapping[str, float]) -> str:
    """The fewest causes whose absence brings the emulation more than half of the way to where all are taken away."""
    most = max(without.values())
    for taken in sorted(without, key=lambda k: (k.count(";") + bool(k), -without[k])):
        if taken and without[taken] - without[""] > (most - without[""]) / 2:
            return f"{' and '.join(taken.split('; '))}: {without[taken]:.1f} bits without"
    return "unexplained"


def _standing(party: str, rank: int, moved: Tree, floor: Tree, truth: Tree, cause: str, without, share) -> Standing:
    errors = {k: np.abs(moved[k] - x) for k, x in truth.items()}
    ulps = np.concatenate([(e / np.spacing(np.float32(_rms(truth[k])))).ravel() for k, e in errors.items()])
    units = [(_rms(errors[k]) / _rms(floor[k] - x)) ** 2 for k, x in truth.items() if np.any(floor[k] != x)]
    return Standing(
        party=party,
        rank=rank,
        bits=_bits(_relative(moved, truth)),
        by_tensor={k: _bits(_rms(e) / _rms(truth[k])) for k, e in errors.items()},
        noise_units=math.sqrt(float(np.mean(units))) if units else math.nan,
        ulps=(float(np.median(ulps)), float(np.quantile(ulps.astype(np.float64), 0.99)), float(ulps.max())),
        cause=cause,
        without=without,
        explained=share,
    )


# --- the table -------------------------------------------------------------------------------------------------------


def note(standings: Sequence[Standing]) -> str:
    """One sentence: ours are the nearest, or which party is nearer than which of ours."""
    ranks = {s.party: s.rank for s in standings}
    ours = [ranks[party] for party in OURS if party in ranks]
    theirs = {party: rank for party, rank in ranks.items() if rank and party not in OURS}
    nearer = [party for party, rank in theirs.items() if ours and rank < max(ours)]
    if not ours or not theirs:
        return "nothing of ours, or nothing to compare it with"
    return f"not the nearest: {', '.join(nearer)} before one of ours" if nearer else NEAREST


def lines(standings: Sequence[Standing]) -> list[str]:
    """The table as text, one line per party, the causes below it."""
    width = max(len(s.party) for s in standings)
    head = (
        f"{'rank':>4}  {'':<{width}}  {'bits':>5}  {'noise units':>11}  {'ulps: median':>12} {'99 %':>9} {'worst':>9}"
    )
    rows = [
        f"{s.rank or '':>4}  {s.party:<{width}}  {s.bits:>5.2f}  {s.noise_units:>11.2f}  {s.ulps[0]:>12.2f}"
        f" {s.ulps[1]:>9.1f} {s.ulps[2]:>9.1f}"
        for s in standings
    ]
    causes: dict[str, list[str]] = {}
    for s in standings:
        if s.rank:
            told = "" if s.explained is None else f" (the emulation explains {s.explained:.0%} of the deviation)"
            causes.setdefault(s.cause + told, []).append(s.party)
    return [head, *rows, "", *(f"{'; '.join(who)}: {why}" for why, who in causes.items()), note(standings)]
