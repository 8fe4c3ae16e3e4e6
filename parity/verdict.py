"""Distance in noise units -> verdict. The only file of the project that holds a threshold.

A distance is looked at in four ways, because each hides what another shows: the RMS over the tensor (many small
errors), the worst row and column (one bad head, one bad token), the worst element (one bad entry in a million), and
the elements whose noise is exactly zero (they must be bit-equal). The first three are compared with

    Z * quantile(group size, number of groups, degrees of freedom of sigma)

where the quantile is that of a root-mean-square of Student-like ratios (an F quantile), so that a scalar, whose z is
one draw, and a matrix, whose z is an average, are judged by the same constant Z. How Z and the other constants were
calibrated is told in docs/decisions/0001 and reproduced by `parity calibrate`.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

__all__ = [
    "accepts",
    "Distance",
    "Judgement",
    "Noise",
    "Thresholds",
    "Verdict",
    "THRESHOLDS",
    "accurate_bits",
    "determined",
    "effective_bits",
    "judge_tensor",
    "measure",
    "pool_sigma",
    "threshold",
]


class Verdict(enum.StrEnum):
    """What can be said of one tensor, one check or one run; the order is from harmless to grave."""

    AGREE = "AGREE"
    UNDETERMINED = "UNDETERMINED"
    PINNED = "PINNED"
    UNSTABLE = "UNSTABLE"
    DIFFER = "DIFFER"

    @property
    def gravity(self) -> int:
        return list(Verdict).index(self)


@dataclass(frozen=True)
class Thresholds:
    """Every constant of the judgement. They come from `parity calibrate`, not from a wish (docs/decisions/0001)."""

    z: float = 2.25
    """Real kernels against the textbook model: the factor by which a correct result may exceed the unit."""
    level: float = 1e-6
    """Chance of a false alarm per tensor and look, if errors were as the model draws them."""
    independent: int = 8
    """Errors inside a tensor share causes (one norm, one softmax): it counts as at most this many independent ones."""
    unstable_ratio: float = 80.0
    """Error (made, and expected) over what rounded inputs and a rounded result explain: above this, the function loses
    bits that its inputs did not ask for."""
    dwarf_ratio: float = 32.0
    """One side's error this many times the other's: not the same arithmetic, even where both are within noise."""
    tie: float = 4.0
    """A choice whose margin is within this many of its noise units could as well have gone the other way."""
    explained: float = 0.9
    """A cause is named if it leaves noise only, or explains this share of the residual (of its squares)."""


THRESHOLDS = Thresholds()


@dataclass(frozen=True)
class Noise:
    """The measured noise of one tensor, per unit roundoff 1: multiply by u to get absolute errors.

    `sigma` is per element, pooled (see `pool_sigma`), with `dof` degrees of freedom behind each element; `kappa` is
    the change of the output when only inputs and weights move by one unit roundoff.
    """

    sigma: np.ndarray
    dof: float
    kappa: float

    def scaled(self, factor: float) -> Noise:
        return Noise(self.sigma * factor, self.dof, self.kappa * factor)


@dataclass(frozen=True)
class Distance:
    """How far apart two arrays are, in noise units, and how far each look is from its own threshold."""

    rms: float
    line: float
    peak: float
    broken: int
    nonfinite: int
    size: int
    excess: float
    """The largest of (look / its threshold); above 1 the arrays differ."""
    where: str
    """The look that is nearest to (or furthest above) its threshold."""
    looks: tuple[tuple[str, float], ...] = ()
    """(tensor, element, row or column; the worst of that look / its threshold): what calibration counts."""

    @property
    def within(self) -> bool:
        """Every look is within its threshold."""
        return self.excess <= 1.0


@dataclass(frozen=True)
class Judgement:
    """The verdict on one tensor with its evidence: what was measured and the sentence that explains it."""

    verdict: Verdict
    evidence: str
    same: Distance
    jax: Distance
    torch: Distance
    effective_jax: float
    effective_torch: float
    accurate_jax: float
    accurate_torch: float
    smallest_seen: float
    """The smallest relative error (RMS, of this tensor) that this judgement would have called DIFFER."""
    lost: float = 0.0
    """Error made over error owed to the rounding of inputs and result (see `unstable_ratio`)."""
    dwarf: float = 0.0
    """The larger side's error over the smaller one's, for tensors of 64 elements or more."""


def pool_sigma(draws: np.ndarray) -> tuple[np.ndarray, float]:
    """Per-element standard deviation from a few draws, each shrunk towards its row and column.

    `draws` is (M, *shape), errors of zero mean. The raw variance of an element has M degrees of freedom only; how far
    the elements of a tensor really differ from the row-times-column fit is estimated from the spread of log variances
    (empirical Bayes for variances: Smyth, Stat. Appl. Genet. Mol. Biol. 3(1), 2004), and the two are mixed with the
    weights that this spread deserves. Elements that never moved keep sigma 0: they must be bit-equal. Returns (sigma,
    degrees of freedom).
    """
    count = draws.shape[0]
    if not np.all(np.isfinite(draws)):
        raise ValueError(
            "draws: NaN or infinite; give the error 0 where values are not finite, so that it is not judged"
        )
    largest = float(np.max(np.abs(draws), initial=0.0))
    if 0 < largest < 2.0**-400:  # their squares would underflow; a power of two changes no digit
        shift = -math.frexp(largest)[1]
        sigma, dof = pool_sigma(np.ldexp(draws, shift))
        return np.ldexp(sigma, -shift), dof
    # A square may underflow to 0 where the draw did not: that element carries noise all the same.
    moving = np.any(draws != 0, axis=0)
    raw = np.where(moving, np.maximum(np.mean(np.square(draws), axis=0), np.finfo(float).tiny), 0.0)
    if moving.sum() < 2:
        return np.sqrt(raw), float(count)
    from scipy.special import digamma, polygamma

    flat, mask = _as_matrix(raw), _as_matrix(moving)
    total = flat.sum() / mask.sum()
    rows, columns = (mask.sum(axis) > 0 for axis in (1, 0))
    if min(rows.sum(), columns.sum()) > 1:
        by_row = flat.sum(1, keepdims=True) / np.maximum(mask.sum(1, keepdims=True), 1)
        by_column = flat.sum(0, keepdims=True) / np.maximum(mask.sum(0, keepdims=True), 1)
        prior = np.where(mask, by_row * (by_column / total), 1.0)
        used = rows.sum() + columns.sum() - 1
    else:  # one line: a factor per element would be the element itself
        prior, used = np.where(mask, total, 1.0), 1
    ratio = np.where(mask, flat, 1.0) / np.maximum(prior, np.finfo(float).tiny)
    logs = np.log(ratio[mask])
    # The fit swallowed `used` of the elements' freedom; the estimate of the spread itself errs: both widen it.
    free = max(int(mask.sum() - used), 1)
    scatter = float(np.sum(np.square(logs - logs.mean()))) / free
    spread = scatter - float(polygamma(1, count / 2)) + scatter * math.sqrt(2.0 / free)
    prior_dof = min(2.0 * _inverse_trigamma(spread), 200.0) if spread > 1e-3 else 200.0
    # The mean of the logs says how far the fit sits from the centre of the prior.
    centre = math.exp(float(np.mean(logs)) - float(digamma(count / 2)) + math.log(count / 2))
    centre *= math.exp(float(digamma(prior_dof / 2)) - math.log(prior_dof / 2))
    weight = prior_dof / (count + prior_dof)
    mixed = (1.0 - weight) * flat + weight * prior * centre
    sigma = np.sqrt(np.where(mask, mixed, 0.0)).reshape(raw.shape)
    # What is not known of an element's variance: its own scatter, and that of the fit which it is drawn to.
    return sigma, float(1.0 / (1.0 / (count + prior_dof) + weight**2 * used / (count * mask.sum())))


def _as_matrix(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)


def _inverse_trigamma(value: float) -> float:
    """Newton's iteration for trigamma(x) = value (Smyth 2004, appendix)."""
    from scipy.special import polygamma

    x = 0.5 + 1.0 / value
    for _ in range(50):
        tri = float(polygamma(1, x))
        step = tri * (1 - tri / value) / float(polygamma(2, x))
        x += step
        if -step / x < 1e-8:
            break
    return x


def threshold(group: int, groups: int, dof: float, limits: Thresholds = THRESHOLDS) -> float:
    """The largest ordinary RMS z among `groups` groups of `group` elements whose sigma has `dof` degrees of freedom.

    A group's sigma is averaged over its independent elements, so it has that many times the degrees of one.
    `groups` counts up to the next power of two and `dof` down to two digits, so that few quantiles are ever computed.
    """
    independent = max(1, min(group, limits.independent))
    freedom = _two_digits(dof * independent)
    return limits.z * _quantile(limits.level, independent, 1 << (max(groups, 1) - 1).bit_length(), freedom)


def _two_digits(value: float) -> float:
    scale = 10.0 ** (math.floor(math.log10(max(value, 1.0))) - 1)
    return max(math.floor(value / scale) * scale, 1.0)


@lru_cache(maxsize=4096)
def _quantile(level: float, independent: int, groups: int, dof: float) -> float:
    from scipy.special import fdtri

    # f.isf without the weight of scipy.stats: fdtri takes the lower tail.
    return math.sqrt(float(fdtri(independent, dof, 1.0 - level / groups)))


def measure(difference: np.ndarray, sigma: np.ndarray, dof: float, limits: Thresholds = THRESHOLDS) -> Distance:
    """Look at `difference` (already of finite elements or NaN where they disagree) in units of `sigma`."""
    difference, sigma = np.asarray(difference, np.float64), np.asarray(sigma, np.float64)
    live = sigma > 0
    whole = bool(live.all() and np.isfinite(difference).all() and np.isfinite(sigma).all())
    if whole:
        bad, broken = np.zeros((), bool), 0
        with np.errstate(over="ignore"):  # infinitely far apart is an answer
            z = difference / sigma
            squares = np.square(z)
    else:
        # Where there is no unit there is no measure: only equality passes.
        bad = ~np.isfinite(difference) | (~np.isfinite(sigma) & (difference != 0))
        live &= ~bad
        broken = int(np.sum((sigma == 0) & ~bad & (difference != 0)))
        z = np.zeros(difference.shape)
        with np.errstate(over="ignore"):
            np.divide(difference, sigma, out=z, where=live)
            squares = np.square(z)
    count = int(live.sum())
    rms = math.sqrt(float(squares.sum()) / count) if count else 0.0
    peak = max(float(z.max()), -float(z.min())) if count else 0.0
    looks = {"tensor": (rms, threshold(max(count, 1), 1, dof, limits))}
    line = 0.0
    if z.ndim >= 1 and count > 1:
        looks["element"] = (peak, threshold(1, count, dof, limits))
        matrix, lives = _as_matrix(squares), _as_matrix(live)
        for axis, name in ((1, "row"), (0, "column")):
            sizes = np.full(lives.shape[1 - axis], lives.shape[axis]) if whole else lives.sum(axis)
            if lives.shape[axis] < 2 or not sizes.any():
                continue
            means = np.sqrt(matrix.sum(axis) / np.maximum(sizes, 1))
            at = int(np.argmax(means))
            line = max(line, float(means[at]))
            looks[f"{name} {at}"] = (float(means[at]), threshold(int(sizes[at]), int((sizes > 0).sum()), dof, limits))
    ratios = [(name, value / limit) for name, (value, limit) in looks.items()]
    where, excess = max(ratios, key=lambda item: item[1])
    if broken or bad.any():
        where, excess = ("not finite" if bad.any() else "bit-equal elements"), math.inf
    kinds = tuple((name.partition(" ")[0], ratio) for name, ratio in ratios)
    return Distance(rms, line, peak, broken, int(bad.sum()), difference.size, excess, where, kinds)


def subtract(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """left − right, where equal infinities and NaN on both sides count as equal and a one-sided one stays NaN."""
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    if left.shape != right.shape:
        raise ValueError(f"shapes {left.shape} and {right.shape} differ; what is compared must not be broadcast")
    with np.errstate(invalid="ignore", over="ignore"):
        difference = left - right
    if np.isfinite(difference).all():
        return difference
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    return np.where(same, 0.0, np.where(np.isfinite(left) & np.isfinite(right), difference, np.nan))


def accepts(
    candidate: np.ndarray,
    reference: np.ndarray,
    noise: Noise,
    unit_roundoff: float,
    *,
    noisy_reference: bool = False,
    limits: Thresholds = THRESHOLDS,
) -> bool:
    """Would a side that gave `candidate` be taken for the reference? What every negative control asks."""
    scale = unit_roundoff * (math.sqrt(2.0) if noisy_reference else 1.0)
    return measure(subtract(candidate, reference), noise.sigma * scale, noise.dof, limits).within


def effective_bits(z: float, unit_roundoff: float) -> float:
    """−log2(u · z): how many bits the noise leaves, as if the function were perfectly conditioned."""
    return -math.log2(unit_roundoff * z) if z > 0 else -math.log2(unit_roundoff)


def accurate_bits(error: np.ndarray, reference: np.ndarray, unit_roundoff: float) -> float:
    """−log2(error / reference), both as RMS over the tensor; never more than the format holds."""
    reference = np.asarray(reference, np.float64)
    size, wrong = _rms(np.where(np.isfinite(reference), reference, 0.0)), _rms(error)
    most = -math.log2(unit_roundoff)
    if not math.isfinite(wrong):
        return -math.inf
    if wrong == 0 or size == 0:
        return most if wrong == 0 else -math.inf
    return min(most, math.log2(size) - math.log2(wrong))


def _rms(array: np.ndarray) -> float:
    array = np.asarray(array, np.float64)
    with np.errstate(over="ignore"):
        return math.sqrt(float(np.mean(np.square(array)))) if array.size else 0.0


def determined(reference: np.ndarray, noise: Noise, limits: Thresholds = THRESHOLDS) -> bool:
    """Could this tensor's check have rejected zeros? Where the noise is as large as the value, it could not.

    A tensor that is exactly zero with no noise is determined: anything but zero would be rejected. One that has no
    elements is not: nothing was compared.
    """
    reference = np.asarray(reference, np.float64)
    if reference.size == 0:
        return False
    if np.isnan(reference).any():
        return False  # NaN beside NaN agrees about nothing
    finite = np.where(np.isfinite(reference), reference, 0.0)
    if not np.any(finite):
        return not np.any(noise.sigma)
    return not measure(finite, noise.sigma, noise.dof, limits).within


def judge_tensor(
    jax: np.ndarray,
    torch: np.ndarray,
    reference: np.ndarray,
    noise: Noise,
    unit_roundoff: float,
    *,
    noisy_reference: bool = False,
    pins: tuple[str, ...] = (),
    pinned: Noise | None = None,
    rounded: float = 0.0,
    limits: Thresholds = THRESHOLDS,
) -> Judgement:
    """Judge one tensor of both sides against its float64 reference; `noise` is per unit roundoff.

    `noisy_reference` says that the sides run in the reference's own precision, so that the reference errs as they do.
    `pins` names float32 roundings found inside a float64 run, `pinned` the noise (absolute) that they bring.
    `rounded` is the size (RMS) of what the sides rounded, if they rounded something else than what is judged:
    positions, whose displacements these are.
    """
    reference = np.asarray(reference, np.float64)
    error_jax, error_torch, apart = subtract(jax, reference), subtract(torch, reference), subtract(jax, torch)
    sigma = noise.sigma * unit_roundoff
    pair_sigma = sigma * math.sqrt(2.0)
    side_sigma = pair_sigma if noisy_reference else sigma
    same = measure(apart, pair_sigma, noise.dof, limits)
    side_jax = measure(error_jax, side_sigma, noise.dof, limits)
    side_torch = measure(error_torch, side_sigma, noise.dof, limits)

    size = _rms(np.where(np.isfinite(reference), reference, 0.0))
    wrong = sorted((_rms(error_jax), _rms(error_torch)))
    # A good algorithm owes what its inputs' rounding does (kappa) and the rounding of its result. Sigma alone would
    # accuse every long sum, because the unit is a left-to-right one: the error must have been made, too.
    owed = math.hypot(noise.kappa, size / math.sqrt(3.0))
    lost = min(_rms(noise.sigma), wrong[1] / unit_roundoff) / owed if owed > 0 and noise.kappa > 0 else 0.0
    floor = unit_roundoff * max(size, rounded)  # below it an error is as small as it is by luck
    dwarf = max(wrong[1], floor) / max(wrong[0], floor) if apart.size >= 64 and max(wrong[0], floor) > 0 else 0.0

    def ruling() -> tuple[Verdict, str]:
        worst = max((side_jax, "jax"), (side_torch, "torch"), (same, "the pair"), key=lambda item: item[0].excess)
        if not worst[0].within:
            if pins and pinned is not None:
                wide = np.hypot(side_sigma, pinned.sigma)
                looks = ((error_jax, wide), (error_torch, wide), (apart, wide * math.sqrt(2.0)))
                if all(measure(e, unit, noise.dof, limits).within for e, unit in looks):
                    return Verdict.PINNED, f"agrees to 24 bits only: rounded to float32 inside at {', '.join(pins)}"
            return Verdict.DIFFER, _blame(side_jax, side_torch, same, noisy_reference)
        if not determined(reference, noise.scaled(unit_roundoff), limits):
            words = "its noise is as large as its value: zeros would have passed"
            if np.isnan(reference).any():
                words = f"the reference itself is NaN in {int(np.isnan(reference).sum())} elements"
            return Verdict.UNDETERMINED, words if reference.size else "it has no elements: nothing was compared"
        if lost > limits.unstable_ratio:
            return Verdict.UNSTABLE, f"loses {math.log2(lost):.0f} bits that its inputs did not ask for"
        if dwarf > limits.dwarf_ratio:
            side = "jax" if _rms(error_jax) > _rms(error_torch) else "torch"
            return Verdict.UNSTABLE, f"{side} errs {dwarf:.0f} times as much as the other side"
        return Verdict.AGREE, f"nearest to its threshold: {worst[1]}, {worst[0].where}, at {worst[0].excess:.0%} of it"

    verdict, evidence = ruling()
    live = noise.sigma > 0
    unit = _rms(side_sigma[live]) if live.any() else 0.0
    return Judgement(
        verdict=verdict,
        evidence=evidence,
        same=same,
        jax=side_jax,
        torch=side_torch,
        effective_jax=effective_bits(side_jax.rms, unit_roundoff),
        effective_torch=effective_bits(side_torch.rms, unit_roundoff),
        accurate_jax=accurate_bits(error_jax, reference, unit_roundoff),
        accurate_torch=accurate_bits(error_torch, reference, unit_roundoff),
        smallest_seen=threshold(max(int(live.sum()), 1), 1, noise.dof, limits) * unit / size if size else 0.0,
        lost=lost,
        dwarf=dwarf,
    )


def _blame(jax: Distance, torch: Distance, same: Distance, same_function: bool) -> str:
    """Which side left the reference, in a sentence.

    In float64 the reference is what the JAX function means: leaving it says "another function", not who is right.
    """
    sides = [name for name, d in (("jax", jax), ("torch", torch)) if not d.within]
    if same_function:
        who = "not the same function" if "jax" not in sides else "the JAX side left what its own program says"
    else:
        left = f"{' and '.join(sides)} left the float64 reference, the JAX program's meaning"
        who = left if sides else "the two sides part"
    if same.nonfinite or jax.nonfinite or torch.nonfinite:
        return f"{who}: not finite in {max(jax.nonfinite, torch.nonfinite, same.nonfinite)} elements on one side only"
    worst = max((jax, torch, same), key=lambda d: d.excess)
    if worst.broken:
        return f"{who}: {worst.broken} elements that carry no noise are not bit-equal"
    return f"{who}: {worst.where} at {worst.excess:.3g} times its threshold"
