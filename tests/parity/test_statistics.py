"""The statistics room: its alarms are as rare as it says, and what it says it would have seen, it sees."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from parity import statistics as st

# False alarms are counted at a level that a moderate number of seeds can measure.
LEVEL, SEEDS, N = 0.05, 300, 2000
# The counts of each test must be those of Binomial(SEEDS, LEVEL), all rows below together, at this error level.
SURE = 1e-4

LAWS = {
    "uniform": st.uniform(0.05),
    "normal": st.normal(0.02),
    "truncated normal": st.truncated_normal(0.05),
}
ONE_SAMPLE = {
    "mean": st.mean_test,
    "std": st.std_test,
    "extremes": st.extremes_test,
    "ks": st.ks_test,
    "chi square": st.chi_square_test,
    "lag": st.lag_test,
}


def draw(law: st.Distribution, rng: np.random.Generator, n: int) -> np.ndarray:
    if law.family == "uniform":
        return rng.uniform(-law.scale, law.scale, n)
    if law.family == "normal":
        return rng.normal(0.0, law.scale, n)
    x = rng.normal(0.0, 1.0, 2 * n)
    return law.scale * x[np.abs(x) < law.cut][:n]


def suite(x: np.ndarray, law: st.Distribution, level: float) -> dict[str, st.Outcome]:
    return {name: test(x, law, level) for name, test in ONE_SAMPLE.items()}


def rejected(x: np.ndarray, law: st.Distribution, alpha: float = st.ALPHA) -> set[str]:
    return {name for name, outcome in suite(x, law, st.share(len(ONE_SAMPLE), alpha)).items() if outcome.rejected}


@pytest.mark.parametrize("family", LAWS)
def test_moments_and_cdf_are_those_of_scipy(family):
    law = LAWS[family]
    theirs = {
        "uniform": stats.uniform(-law.scale, 2 * law.scale),
        "normal": stats.norm(0, law.scale),
        "truncated normal": stats.truncnorm(-law.cut, law.cut, 0, law.scale),
    }[family]
    mean, variance, excess = (float(value) for value in theirs.stats("mvk"))
    eps = np.finfo(float).eps
    assert law.mean == mean == 0.0
    assert abs(law.std / math.sqrt(variance) - 1) <= 1e3 * eps  # scipy's own moments of truncnorm cancel
    assert abs(law.kurtosis - excess - 3) <= 1e4 * eps
    x = np.linspace(-1.2, 1.2, 31) * (law.bound if math.isfinite(law.bound) else 4 * law.scale)
    assert np.max(np.abs(law.cdf(x) - theirs.cdf(x))) <= 8 * eps


def test_truncated_normal_has_the_deviation_asked_for():
    law = st.truncated_normal(0.05)
    assert law.std == pytest.approx(0.05, rel=4 * np.finfo(float).eps)
    # JAX's variance scaling writes the factor out as .87962566103423978.
    assert 0.05 / law.scale == pytest.approx(0.87962566103423978, rel=8 * np.finfo(float).eps)


@pytest.mark.parametrize("family", LAWS)
def test_false_alarms_come_at_the_stated_rate(family):
    law = LAWS[family]
    alarms = dict.fromkeys(ONE_SAMPLE, 0)
    for seed in range(SEEDS):
        for name, outcome in suite(draw(law, np.random.default_rng(seed), N), law, LEVEL).items():
            alarms[name] += outcome.rejected
    tail = SURE / (2 * len(ONE_SAMPLE) * len(LAWS))
    low, high = stats.binom.ppf([tail, 1 - tail], SEEDS, LEVEL)
    assert all(low <= count <= high for count in alarms.values()), alarms


def test_false_alarms_of_the_two_sample_and_the_pairs_test():
    alarms = {"two samples": 0, "pairs": 0}
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        x, y, z = rng.normal(size=N), rng.normal(size=N // 2), rng.normal(size=N)
        alarms["two samples"] += st.ks_two_sample_test(x, y, LEVEL).rejected
        alarms["pairs"] += st.pairs_test({"x": x, "y": y, "z": z}, LEVEL).rejected
    low, high = stats.binom.ppf([SURE / 4, 1 - SURE / 4], SEEDS, LEVEL)
    assert all(low <= count <= high for count in alarms.values()), alarms


def test_the_whole_suite_keeps_its_overall_level():
    alarms = sum(
        bool(rejected(draw(law, np.random.default_rng(1000 + seed), N), law, LEVEL))
        for seed in range(100)
        for law in LAWS.values()
    )
    assert alarms <= stats.binom.ppf(1 - SURE, 100 * len(LAWS), LEVEL)


@pytest.mark.parametrize("family", LAWS)
@pytest.mark.parametrize("test", ["mean", "std", "extremes", "ks", "chi square", "lag"])
def test_the_smallest_deviation_is_seen_with_the_stated_power(family, test):
    law, n, runs = LAWS[family], 4000, 60
    level = st.share(10)
    size = ONE_SAMPLE[test](draw(law, np.random.default_rng(0), n), law, level).smallest
    seen = 0
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        x = draw(law, rng, n)
        if test == "mean":
            x = x + size * law.std
        elif test in ("std", "extremes"):
            x = x * (1 + size)
        elif test in ("ks", "chi square"):
            # Move probability between the two halves: the cdfs part by `size` at 0; Cohen's w is 2·(moved).
            moved = size if test == "ks" else size / 2
            x = np.where(rng.uniform(size=n) < 2 * moved, np.abs(x), x)
        else:
            y = np.sqrt(1 - size**2) * x
            y[1:] += size * x[:-1]
            x = y
        seen += ONE_SAMPLE[test](x, law, level).rejected
    assert seen >= stats.binom.ppf(SURE, runs, st.POWER), f"{seen} of {runs} at {size}"


def test_the_smallest_deviation_of_the_two_sample_test_is_seen():
    n, runs, seen = 4000, 60, 0
    size = st.ks_two_sample_test(np.arange(n), np.arange(n), st.ALPHA).smallest
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(size=n), rng.normal(size=n)
        y = np.where(rng.uniform(size=n) < 2 * size, np.abs(y), y)
        seen += st.ks_two_sample_test(x, y, st.ALPHA).rejected
    assert seen >= stats.binom.ppf(SURE, runs, st.POWER)


# What initial weights get wrong in practice, each with a test that must see it in 100,000 draws.
FAN_IN, FAN_OUT = 256, 400
BOUND = 1 / math.sqrt(FAN_IN)
REAL_FAULTS = {
    "lecun normal for torch's default": (lambda r, n: r.normal(0, BOUND, n), "std"),
    "normal with the uniform's deviation": (lambda r, n: r.normal(0, BOUND / math.sqrt(3), n), "ks"),
    "bounds exceeded by a thousandth": (lambda r, n: 1.001 * r.uniform(-BOUND, BOUND, n), "extremes"),
    "bounds short by a thousandth": (lambda r, n: 0.999 * r.uniform(-BOUND, BOUND, n), "extremes"),
    "fan_out for fan_in": (lambda r, n: math.sqrt(FAN_IN / FAN_OUT) * r.uniform(-BOUND, BOUND, n), "std"),
    "two per cent wider": (lambda r, n: 1.02 * r.uniform(-BOUND, BOUND, n), "std"),
    "zeros": (lambda r, n: np.zeros(n), "std"),
    "from zero up": (lambda r, n: r.uniform(0, BOUND, n), "mean"),
    "a lattice of 32 values": (lambda r, n: BOUND * (r.integers(0, 32, n) / 16 - 31 / 32), "chi square"),
    "every draw twice": (lambda r, n: np.repeat(r.uniform(-BOUND, BOUND, n // 2), 2), "lag"),
    "NaN": (lambda r, n: np.append(r.uniform(-BOUND, BOUND, n - 1), np.nan), "mean"),
    "Inf": (lambda r, n: np.append(r.uniform(-BOUND, BOUND, n - 1), np.inf), "std"),
}


@pytest.mark.parametrize("fault", REAL_FAULTS)
def test_real_faults_are_seen(fault):
    sample, by = REAL_FAULTS[fault]
    law, n = st.uniform(BOUND), 100_000
    assert by in rejected(sample(np.random.default_rng(0), n), law)
    assert rejected(np.random.default_rng(0).uniform(-BOUND, BOUND, n), law) == set()


def test_truncation_without_rescaling_is_seen():
    rng = np.random.default_rng(0)
    plain = rng.normal(size=250_000)
    cut = 0.02 * plain[np.abs(plain) < 2][:100_000]  # what truncated_normal(0.02) gives: deviation 0.0176
    assert "std" in rejected(cut, st.truncated_normal(0.02))
    assert rejected(cut, st.Distribution("truncated normal", 0.02, 2.0)) == set()
    assert "extremes" in rejected(0.02 * plain[:100_000], st.truncated_normal(0.02))
    assert "ks" in rejected(0.02 * plain[:100_000], st.truncated_normal(0.02))


def test_one_key_for_two_tensors_is_seen():
    rng = np.random.default_rng(0)
    shared = rng.uniform(-1, 1, 100_000)
    tensors = {"a": shared, "b": 0.1 * rng.normal(size=50_000), "c": 0.3 * shared}
    outcome = st.pairs_test(tensors, st.ALPHA)
    assert outcome.rejected
    assert outcome.test == "correlation a × c"
    assert outcome.estimate == pytest.approx(1.0)
    tensors["c"] = rng.uniform(-1, 1, 100_000)
    assert not st.pairs_test(tensors, st.ALPHA).rejected


def test_two_samples_of_different_laws_are_seen():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, 100_000)
    assert not st.ks_two_sample_test(x, rng.uniform(-1, 1, 50_000), st.ALPHA).rejected
    assert st.ks_two_sample_test(x, rng.normal(0, 1 / math.sqrt(3), 50_000), st.ALPHA).rejected
    assert st.ks_two_sample_test(x, np.full(50_000, np.nan), st.ALPHA).rejected


def test_float32_draws_on_the_bound_are_allowed_and_an_ulp_beyond_is_not():
    bound = np.float32(BOUND * 1.1)
    x = np.random.default_rng(0).uniform(-bound, bound, 100_000).astype(np.float32)
    law = st.uniform(float(bound))
    x[7] = bound
    assert not st.extremes_test(x, law, st.ALPHA).rejected
    x[7] = -np.nextafter(bound, np.float32(1))
    assert st.extremes_test(x, law, st.ALPHA).p == 0.0


def test_constants():
    zero = st.constant(0.0)
    assert not st.constant_test(np.zeros(5), zero, st.ALPHA).rejected
    assert not st.constant_test(np.ones(5), st.constant(1.0), st.ALPHA).rejected
    for x in ([0.0, 1e-30], [0.0, math.nan]):
        assert st.constant_test(x, zero, st.ALPHA).rejected


def test_intervals_hold_the_truth_and_shrink_with_the_sample():
    law = st.uniform(1.0)
    small, large = (np.random.default_rng(0).uniform(-1, 1, n) for n in (1_000, 100_000))
    for test, truth in ((st.mean_test, 0.0), (st.std_test, law.std)):
        widths = []
        for x in (small, large):
            interval = test(x, law, st.ALPHA).interval
            assert interval is not None
            assert interval[0] < truth < interval[1]
            widths.append(interval[1] - interval[0])
        assert 8 < widths[0] / widths[1] < 12


def test_at_100_000_draws_the_reach_is_what_the_initializers_need():
    law, level = st.uniform(1.0), st.share(100)
    x = np.random.default_rng(0).uniform(-1, 1, 100_000)
    smallest = {name: outcome.smallest for name, outcome in suite(x, law, level).items()}
    assert smallest["std"] < 0.02
    assert smallest["extremes"] < 1e-3
    assert smallest["mean"] < 0.03
    assert smallest["ks"] < 0.02


def test_misuse_is_refused():
    x, law = np.zeros(st.MINIMUM), st.normal(1.0)
    for test in ONE_SAMPLE.values():
        with pytest.raises(ValueError, match="at least 1000 draws"):
            test(np.zeros(st.MINIMUM - 1), law, st.ALPHA)
    with pytest.raises(ValueError, match="at least 1000 draws"):
        st.ks_two_sample_test(x, [], st.ALPHA)
    with pytest.raises(ValueError, match="empty"):
        st.constant_test([], st.constant(0.0), st.ALPHA)
    with pytest.raises(ValueError, match="lag"):
        st.lag_test(x, law, st.ALPHA, lag=0)
    with pytest.raises(ValueError, match="two tensors"):
        st.pairs_test({"a": x}, st.ALPHA)
    with pytest.raises(ValueError, match="does not vary"):
        st.pairs_test({"a": x, "b": x}, st.ALPHA)
    with pytest.raises(ValueError, match="at least 1"):
        st.share(0)
    with pytest.raises(ValueError, match="alpha"):
        st.share(3, alpha=1.0)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="finite and > 0"):
            st.normal(bad)


def test_no_framework_and_no_scipy_at_import():
    code = (
        "import sys, parity.statistics; print([m for m in ('jax', 'torch', 'flax', 'optax', 'scipy') if m in "
        "sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
