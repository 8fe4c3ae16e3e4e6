"""Tests for distributions: is this sample drawn from that law, are two samples from one law, are two independent?

Used for initial weights, dropout masks and sampling: whatever is random, and so cannot be compared bit by bit.

Error level: a check that makes n tests gives each of them the level `share(n)` = ALPHA / n (Bonferroni), so that a
check of correct code alarms with probability at most ALPHA, however its tests depend on each other. Every outcome
says what it would have missed: `smallest` is the smallest deviation that this sample size rejects with probability
POWER at that level. Sums of squares are referred to a χ² with matched variance, means and correlations to a normal:
from MINIMUM draws on both are right far into the tails, and a smaller sample is refused.

Anderson–Darling is left out: its published approximations end at 1e-6 absolute, above the levels used here; what it
would add over Kolmogorov–Smirnov, the tails, is seen by `extremes_test`.

No framework is imported here, and scipy only inside the functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

__all__ = [
    "ALPHA",
    "POWER",
    "MINIMUM",
    "Distribution",
    "Outcome",
    "uniform",
    "normal",
    "truncated_normal",
    "constant",
    "share",
    "mean_test",
    "std_test",
    "extremes_test",
    "ks_test",
    "ks_two_sample_test",
    "chi_square_test",
    "categorical_test",
    "constant_test",
    "lag_test",
    "pairs_test",
]

# The probability that one check, all its tests together, alarms on correct code. The one place that says so.
ALPHA = 1e-4
# The probability with which a deviation of size `smallest` is rejected.
POWER = 0.9
# Fewer draws than this, and the tails of the approximations are not worth their name.
MINIMUM = 1000
# Equal-probability cells of the χ² test.
_CELLS = 64
# Cells of which fewer draws are expected are taken together: below it a count is no normal number.
_EXPECTED = 20


@dataclass(frozen=True)
class Distribution:
    """A law that a sample is held against: "uniform", "normal", "truncated normal" or "constant".

    scale: the bound of a uniform, the standard deviation of the normal (before it was truncated), the value of a
    constant; cut: where a normal is truncated, in units of scale.
    """

    family: str
    scale: float
    cut: float = math.inf

    @property
    def mean(self) -> float:
        return self.scale if self.family == "constant" else 0.0

    @property
    def std(self) -> float:
        return math.sqrt(self._moment(2)) * self.scale

    @property
    def kurtosis(self) -> float:
        """E[x⁴] / E[x²]²: 1.8 for a uniform, 3 for a normal."""
        return self._moment(4) / self._moment(2) ** 2

    @property
    def bound(self) -> float:
        """No draw lies outside ±bound."""
        return {"uniform": self.scale, "constant": abs(self.scale)}.get(self.family, self.cut * self.scale)

    def cdf(self, x: ArrayLike) -> Float[np.ndarray, "*shape"]:
        """P(X ≤ x)."""
        from scipy.special import ndtr

        x = np.asarray(x, dtype=np.float64)
        if self.family == "constant":
            return (x >= self.scale).astype(np.float64)
        if self.family == "uniform":
            return np.clip((x / self.scale + 1.0) / 2.0, 0.0, 1.0)
        outside = ndtr(-self.cut)
        return np.clip((ndtr(x / self.scale) - outside) / (1.0 - 2.0 * outside), 0.0, 1.0)

    def _moment(self, k: int) -> float:
        """E[x²] or E[x⁴] at scale 1."""
        if self.family == "constant":
            return 0.0
        if self.family == "uniform":
            return 1.0 / (k + 1)
        if math.isinf(self.cut):
            return {2: 1.0, 4: 3.0}[k]
        # By parts, with the density and mass of the normal inside ±cut.
        density = math.exp(-(self.cut**2) / 2) / math.sqrt(2 * math.pi)
        mass = math.erf(self.cut / math.sqrt(2))
        second = 1.0 - 2.0 * self.cut * density / mass
        return second if k == 2 else 3.0 * second - 2.0 * self.cut**3 * density / mass

    def __str__(self) -> str:
        letter = {"uniform": "U(±{:.6g})", "normal": "N(0, {:.6g}²)", "constant": "all {:.6g}"}
        text = letter.get(self.family, "N(0, {:.6g}²) cut at ").format(self.scale)
        return text + (f"±{self.cut:g}σ" if self.family == "truncated normal" else "")


def uniform(bound: float) -> Distribution:
    """U(−bound, bound). Draws may touch ±bound: pass the bound as the sample's dtype rounds it."""
    return Distribution("uniform", _positive("bound", bound))


def normal(std: float) -> Distribution:
    """N(0, std²)."""
    return Distribution("normal", _positive("std", std))


def truncated_normal(std: float, cut: float = 2.0) -> Distribution:
    """The normal whose part inside ±cut·s is kept, with s chosen so that the *result* has standard deviation `std`.

    This is how JAX's variance scaling truncates: a plain truncation at 2 would leave 0.8796 of the deviation.
    """
    shape = Distribution("truncated normal", 1.0, _positive("cut", cut))
    return Distribution("truncated normal", _positive("std", std) / shape.std, cut)


def constant(value: float) -> Distribution:
    """Every draw is `value`."""
    return Distribution("constant", float(value))


@dataclass(frozen=True)
class Outcome:
    """One test's result.

    test: its name; n: draws; estimate and expected: what was measured and what the law says; interval: where the true
    value lies at confidence 1 − level (or None); p: probability of something at least as far off under the law;
    level: what p is held against; smallest: the smallest deviation rejected with probability POWER, in the words of
    `unit`.
    """

    test: str
    n: int
    estimate: float
    expected: float
    interval: tuple[float, float] | None
    p: float
    level: float
    smallest: float
    unit: str

    @property
    def rejected(self) -> bool:
        """Not from this law. A sample that holds NaN or Inf always is."""
        return not self.p >= self.level


def share(n_tests: int, alpha: float = ALPHA) -> float:
    """The level of each of `n_tests` tests whose overall error level is `alpha` (Bonferroni).

    Raises ValueError for fewer than one test and for an alpha outside (0, 1).
    """
    if n_tests < 1:
        raise ValueError(f"n_tests must be at least 1, got {n_tests}: a check that tests nothing proves nothing")
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha must be in (0, 1), got {alpha!r}")
    return alpha / n_tests


def mean_test(x: ArrayLike, law: Distribution, level: float) -> Outcome:
    """z-test of the mean, σ known: z = (x̄ − μ)·√n / σ. Deviations in standard deviations of one draw."""
    x, n = _sample(x)
    estimate, width = _finite_mean(x), law.std / math.sqrt(n)
    p = _two_sided((estimate - law.mean) / width)
    half = _quantile(level) * width
    interval = (estimate - half, estimate + half)
    return Outcome("mean", n, estimate, law.mean, interval, p, level, _reach(level) / math.sqrt(n), "shift of mean/std")


def std_test(x: ArrayLike, law: Distribution, level: float) -> Outcome:
    """Test of the standard deviation about the known mean: n·s²/σ² against a χ² of its variance.

    var(s²) = σ⁴·(kurtosis − 1)/n, so ν = 2n/(kurtosis − 1) degrees of freedom: exact for a normal. Deviations as
    ratio of standard deviations, less one.
    """
    from scipy.stats import chi2

    x, n = _sample(x)
    estimate = math.sqrt(_finite_mean((x - law.mean) ** 2))
    freedom = 2.0 * n / (law.kurtosis - 1.0)
    statistic = freedom * (estimate / law.std) ** 2
    p = min(1.0, 2.0 * min(chi2.cdf(statistic, freedom), chi2.sf(statistic, freedom))) if statistic < math.inf else 0.0
    low, high, weak, strong = _chi_quantiles(freedom, level)
    interval = (estimate * math.sqrt(freedom / high), estimate * math.sqrt(freedom / low))
    # The wider of the two sides: a sample of deviation r·σ stays above its own (1 − POWER) quantile.
    smallest = max(math.sqrt(high / weak) - 1.0, 1.0 - math.sqrt(low / strong))
    return Outcome("std", n, estimate, law.std, interval, float(p), level, smallest, "ratio of std, less 1")


def extremes_test(x: ArrayLike, law: Distribution, level: float) -> Outcome:
    """Is the largest |x| where that of n draws must be? Exact: P(max |x| ≤ a) = P(|x| ≤ a)ⁿ.

    Outside the bounds of a bounded law nothing is allowed, not even an ulp (p = 0); too far inside is as wrong.
    Deviations as ratio of scales, less one.
    """
    x, n = _sample(x)
    largest = float(np.max(np.abs(x)))
    p = _p_of_largest(law, largest, n)
    # P(max ≤ a) = q at a = the inverse of P(|x| ≤ a) = q^(1/n); a scale off by 1 + d moves the maximum by as much.
    at = {q: _quantile_of_abs(law, q ** (1.0 / n)) for q in (1.0 - POWER, POWER, level / 2, 1.0 - level / 2)}
    ceiling = law.bound if math.isfinite(law.bound) else at[1.0 - level / 2]
    smallest = max(ceiling / at[1.0 - POWER] - 1.0, 1.0 - at[level / 2] / at[POWER])
    return Outcome("extremes", n, largest, law.bound, None, p, level, smallest, "ratio of bounds, less 1")


def ks_test(x: ArrayLike, law: Distribution, level: float) -> Outcome:
    """Kolmogorov–Smirnov: D = sup |F_n − F| against the exact cdf. Deviations as distance of the cdfs."""
    from scipy.stats import kstwo

    x, n = _sample(x)
    if not np.isfinite(x).all():
        return _not_finite("ks", n, level)
    below = law.cdf(np.sort(x))
    ranks = np.arange(n + 1) / n
    distance = float(max(np.max(ranks[1:] - below), np.max(below - ranks[:-1])))
    # Where the cdfs are d apart, F_n strays from its own mean by at most 1/(2√n) standard deviations.
    smallest = _ks_critical(n, level) + _power_margin() / (2.0 * math.sqrt(n))
    return Outcome("ks", n, distance, 0.0, None, float(kstwo.sf(distance, n)), level, smallest, "distance of cdfs")


def ks_two_sample_test(x: ArrayLike, y: ArrayLike, level: float) -> Outcome:
    """Kolmogorov–Smirnov between two samples, at the effective size n·m/(n + m). Deviations as distance of the cdfs."""
    from scipy.stats import kstwo

    (x, n), (y, m) = _sample(x), _sample(y)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return _not_finite("two-sample ks", n + m, level)
    x, y = np.sort(x), np.sort(y)
    both = np.concatenate([x, y])
    distance = float(
        np.max(np.abs(np.searchsorted(x, both, side="right") / n - np.searchsorted(y, both, side="right") / m))
    )
    size = n * m // (n + m)
    smallest = _ks_critical(size, level) + _power_margin() * math.sqrt(1.0 / n + 1.0 / m) / 2.0
    p = float(kstwo.sf(distance, size))
    return Outcome("two-sample ks", n + m, distance, 0.0, None, p, level, smallest, "distance of cdfs")


def chi_square_test(x: ArrayLike, law: Distribution, level: float, cells: int = _CELLS) -> Outcome:
    """χ² over equally likely cells: sees lattices, gaps and lumps that a cdf smooths over.

    Deviations as Cohen's w = √Σ (q − 1/cells)²·cells, with q the true probabilities of the cells.
    """
    from scipy.stats import chi2

    x, n = _sample(x)
    if not np.isfinite(x).all():
        return _not_finite("chi square", n, level)
    counts = np.bincount(np.minimum((law.cdf(x) * cells).astype(np.int64), cells - 1), minlength=cells)
    statistic = float(np.sum((counts - n / cells) ** 2) / (n / cells))
    freedom = cells - 1
    smallest = math.sqrt(_chi_square_reach(freedom, level) / n)
    p = float(chi2.sf(statistic, freedom))
    return Outcome("chi square", n, math.sqrt(statistic / n), 0.0, None, p, level, smallest, "Cohen's w")


def categorical_test(ids: ArrayLike, p: ArrayLike, level: float) -> Outcome:
    """χ² of drawn ids against their probabilities; what is expected fewer than _EXPECTED times is one cell together.

    An id of probability 0, or one that p does not have, is never allowed (p-value 0). Deviations as Cohen's
    w = √Σ (q − p)²/p, with q the true probabilities of the cells.

    Raises:
        ValueError: p is no distribution, or has fewer than two cells for so small a sample.
    """
    from scipy.stats import chi2

    x, n = _sample(ids)
    p = np.asarray(p, np.float64).reshape(-1)
    if not (np.isfinite(p).all() and (p >= 0.0).all() and math.isclose(float(p.sum()), 1.0)):
        raise ValueError(f"p must be finite, at least 0 and of sum 1, got a sum of {p.sum()!r}")
    rare = n * p < _EXPECTED
    cells = int((~rare).sum()) + bool(p[rare].sum() > 0.0)
    if cells < 2:
        raise ValueError(f"{n} draws from p leave {cells} cell of {_EXPECTED} and more: draw more, or give another p")
    freedom = cells - 1
    smallest = math.sqrt(_chi_square_reach(freedom, level) / n)
    inside = (x == np.floor(x)) & (x >= 0) & (x < p.size)
    if not inside.all() or (p[x.astype(np.int64)] == 0.0).any():
        return Outcome("categorical", n, math.inf, 0.0, None, 0.0, level, smallest, "Cohen's w")
    counts = np.bincount(x.astype(np.int64), minlength=p.size)
    seen, expected = counts[~rare].astype(np.float64), n * p[~rare]
    if p[rare].sum() > 0.0:
        seen, expected = np.append(seen, counts[rare].sum()), np.append(expected, n * p[rare].sum())
    statistic = float(np.sum(np.square(seen - expected) / expected))
    p_value = float(chi2.sf(statistic, freedom))
    return Outcome("categorical", n, math.sqrt(statistic / n), 0.0, None, p_value, level, smallest, "Cohen's w")


def constant_test(x: ArrayLike, law: Distribution, level: float) -> Outcome:
    """Is every draw the constant, to the last bit? One that is not is enough."""
    x = np.asarray(x, dtype=np.float64).reshape(-1)
    if x.size == 0:
        raise ValueError("the sample is empty: nothing was drawn, so nothing can be said")
    wrong = float(np.count_nonzero(x != law.scale))
    return Outcome("constant", x.size, wrong, 0.0, None, float(wrong == 0), level, 1.0, "draws that differ")


def lag_test(x: ArrayLike, law: Distribution, level: float, lag: int = 1) -> Outcome:
    """Correlation of the sample, in memory order, with itself `lag` places on: z = r·√(n − lag)."""
    x, n = _sample(x)
    if not 1 <= lag < n - MINIMUM:
        raise ValueError(f"lag must be at least 1 and leave {MINIMUM} pairs of {n} draws, got {lag}")
    y = (x - law.mean) / law.std
    return _correlation(f"lag {lag}", float(np.mean(y[:-lag] * y[lag:])), n - lag, level)


def pairs_test(tensors: Mapping[str, ArrayLike], level: float) -> Outcome:
    """The largest |correlation| between any two of the tensors, over as many draws as the smaller one has.

    One key for all layers gives 1. The test names the pair; its p is the worst pair's times the number of pairs.

    Raises ValueError for fewer than two tensors and for one that does not vary.
    """
    if len(tensors) < 2:
        raise ValueError(f"pairs_test needs at least two tensors, got {len(tensors)}")
    samples = {name: _sample(x)[0] for name, x in tensors.items()}
    for name, x in samples.items():
        if not np.isfinite(x).all():
            return _not_finite(f"correlation with {name}", x.size, level)
    pairs = list(combinations(samples, 2))
    worst: tuple[float, float, int, str] | None = None
    for a, b in pairs:
        n = min(samples[a].size, samples[b].size)
        x, y = (samples[name][:n] - samples[name][:n].mean() for name in (a, b))
        size = math.sqrt(float(np.sum(x * x)) * float(np.sum(y * y)))
        if size == 0.0:
            raise ValueError(f"{a} or {b} does not vary: leave constants out of pairs_test")
        r = float(np.sum(x * y)) / size
        z = abs(r) * math.sqrt(n)
        if worst is None or z > worst[0]:
            worst = (z, r, n, f"correlation {a} × {b}")
    assert worst is not None
    _, r, n, name = worst
    one = _correlation(name, r, n, level / len(pairs))
    return Outcome(name, n, r, 0.0, one.interval, min(1.0, one.p * len(pairs)), level, one.smallest, one.unit)


def _correlation(name: str, r: float, n: int, level: float) -> Outcome:
    half = _quantile(level) / math.sqrt(n)
    p = _two_sided(r * math.sqrt(n))
    return Outcome(name, n, r, 0.0, (r - half, r + half), p, level, _reach(level) / math.sqrt(n), "correlation")


def _p_of_largest(law: Distribution, largest: float, n: int) -> float:
    if not math.isfinite(largest) or largest > law.bound:
        return 0.0
    inside = float(law.cdf(largest) - law.cdf(-largest))
    if inside <= 0.0:
        return 0.0
    below = math.exp(n * math.log(inside))
    if math.isfinite(law.bound):
        return below  # one-sided: the other side is the bound itself
    return min(1.0, 2.0 * min(below, -math.expm1(n * math.log(inside))))


def _quantile_of_abs(law: Distribution, inside: float) -> float:
    """The a with P(|x| ≤ a) = inside."""
    from scipy.special import ndtri

    if law.family == "uniform":
        return law.scale * inside
    whole = 1.0 - 2.0 * _lower_tail(law.cut)
    # 1 − inside is kept, not inside: close to 1 the digits are in the difference.
    return -law.scale * float(ndtri((1.0 - inside * whole) / 2.0))


def _lower_tail(z: float) -> float:
    from scipy.special import ndtr

    return float(ndtr(-z))


def _two_sided(z: float) -> float:
    return 2.0 * _lower_tail(abs(z)) if math.isfinite(z) else 0.0


def _quantile(level: float) -> float:
    """The |z| that a standard normal exceeds with probability `level`."""
    from scipy.special import ndtri

    return -float(ndtri(level / 2.0))


def _power_margin() -> float:
    from scipy.special import ndtri

    return float(ndtri(POWER))


def _reach(level: float) -> float:
    """The shift of a z-statistic that is rejected with probability POWER."""
    return _quantile(level) + _power_margin()


# Quantiles are found by iteration and depend on the sample's size alone: kept between tests.
@cache
def _chi_quantiles(freedom: float, level: float) -> tuple[float, float, float, float]:
    """χ² quantiles at level / 2, 1 − level / 2, 1 − POWER and POWER, in this order."""
    from scipy.stats import chi2

    low, weak, strong = (float(chi2.ppf(q, freedom)) for q in (level / 2, 1.0 - POWER, POWER))
    return low, float(chi2.isf(level / 2, freedom)), weak, strong


@cache
def _chi_square_reach(freedom: int, level: float) -> float:
    """The non-centrality at which a χ² statistic is rejected with probability POWER."""
    from scipy.optimize import brentq
    from scipy.stats import chi2, ncx2

    critical = float(chi2.isf(level, freedom))
    shift = brentq(lambda shift: ncx2.sf(critical, freedom, shift) - POWER, 1e-6, 10.0 * critical)
    return float(shift)  # type: ignore[arg-type]


@cache
def _ks_critical(n: int, level: float) -> float:
    from scipy.stats import kstwo

    return float(kstwo.isf(level, n))


def _not_finite(test: str, n: int, level: float) -> Outcome:
    return Outcome(test, n, math.nan, 0.0, None, 0.0, level, math.nan, "the sample holds NaN or Inf")


def _sample(x: ArrayLike) -> tuple[np.ndarray, int]:
    x = np.asarray(x, dtype=np.float64).reshape(-1)
    if x.size < MINIMUM:
        raise ValueError(f"a sample needs at least {MINIMUM} draws for the tails to hold, got {x.size}: draw more")
    return x, x.size


def _finite_mean(x: np.ndarray) -> float:
    """The mean, or Inf where anything in it is not finite (numpy would warn on Inf − Inf)."""
    return float(np.mean(x)) if np.isfinite(x).all() else math.inf


def _positive(name: str, value: float) -> float:
    value = float(value)
    if not (math.isfinite(value) and value > 0.0):
        raise ValueError(f"{name} must be finite and > 0, got {value!r}")
    return value
