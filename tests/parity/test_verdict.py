"""parity.verdict: the judgement keeps its own promises, on errors drawn from its own model and on planted wrongs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import binom

from parity.verdict import (
    THRESHOLDS,
    Noise,
    Thresholds,
    Verdict,
    accurate_bits,
    determined,
    effective_bits,
    judge_tensor,
    measure,
    pool_sigma,
    subtract,
    threshold,
)

U = 2.0**-24
DRAWS = 16
SHAPES = [(), (1,), (5,), (200,), (8, 6), (3, 4, 10), (40, 30)]
quick = settings(max_examples=50, deadline=None)


def field(rng: np.random.Generator, shape: tuple[int, ...], roughness: float = 0.0) -> np.ndarray:
    """A true sigma: one factor per row, one per column, and some scatter that neither explains."""
    rows, columns = (*shape[:-1], 1), (*(1 for _ in shape[:-1]), *shape[-1:])
    factors = np.exp(rng.normal(size=rows)) * np.exp(rng.normal(size=columns)) if len(shape) > 1 else 1.0
    return np.asarray(factors * np.exp(rng.normal(0.0, roughness, shape)))


def noise_of(rng: np.random.Generator, sigma: np.ndarray, draws: int = DRAWS) -> Noise:
    pooled, dof = pool_sigma(rng.normal(size=(draws, *sigma.shape)) * sigma)
    return Noise(pooled, dof, float(np.sqrt(np.mean(np.square(sigma)))))


# --- thresholds ------------------------------------------------------------------------------------------------------


@quick
@given(st.integers(1, 10_000), st.integers(1, 10_000), st.floats(8, 300))
def test_threshold_is_monotone(group: int, groups: int, dof: float) -> None:
    here = threshold(group, groups, dof)
    assert math.isfinite(here)
    assert here > THRESHOLDS.z
    assert threshold(group + 1, groups, dof) <= here, "an average of more varies less"
    assert threshold(group, groups + 1, dof) >= here, "the largest of more is larger"
    assert threshold(group, groups, dof + 1) <= here, "a better known sigma is a sharper one"


# --- measure ---------------------------------------------------------------------------------------------------------


@quick
@given(
    hnp.arrays(np.float64, st.sampled_from(SHAPES), elements=st.floats(-3, 3)),
    st.floats(1.0, 1e6),
    st.integers(0, 10**9),
)
def test_a_larger_error_is_never_nearer(difference: np.ndarray, factor: float, seed: int) -> None:
    sigma = field(np.random.default_rng(seed), difference.shape)
    near, far = measure(difference, sigma, 30.0), measure(difference * factor, sigma, 30.0)
    assert far.excess >= near.excess
    assert far.rms >= near.rms
    one_more = difference.copy()
    one_more.flat[0] += math.copysign(1.0, one_more.flat[0])
    assert measure(one_more, sigma, 30.0).excess >= near.excess


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("roughness", [0.0, 0.5, 1.0])
def test_false_alarms_of_its_own_model_stay_below_the_level(shape: tuple[int, ...], roughness: float) -> None:
    """Errors as the model draws them, a level that can be counted: at most one alarm in 1/level looks, four looks."""
    limits = Thresholds(z=1.0, level=0.02)
    rng = np.random.default_rng([7, *shape, int(10 * roughness)])
    tries, alarms = 150, 0
    for _ in range(tries):
        sigma = field(rng, shape, roughness)
        noise = noise_of(rng, sigma)
        alarms += measure(rng.normal(size=shape) * sigma, noise.sigma, noise.dof, limits).excess > 1.0
    assert alarms <= binom.ppf(0.999, tries, 4 * limits.level)


def test_one_bad_element_row_or_column_is_found_where_the_average_hides_it() -> None:
    rng = np.random.default_rng(3)
    clean = rng.normal(size=(300, 200))
    sigma = np.ones_like(clean)
    assert measure(clean, sigma, 200.0).excess < 1.0
    for place, look in (((17, 5), "element"), ((17, slice(None)), "row 17"), ((slice(None), 5), "column 5")):
        bad = clean.copy()
        bad[place] = bad[place] * 2 + (20.0 if look == "element" else 6.0)
        seen = measure(bad, sigma, 200.0)
        assert seen.rms < THRESHOLDS.z
        assert seen.excess > 1.0
        if look != "element":
            assert max(seen.line, seen.peak) > threshold(200, 300, 200.0)
    bad = clean.copy()
    bad[17] = 7.0
    assert measure(bad, sigma, 200.0).where == "row 17"


def test_elements_without_noise_must_be_bit_equal() -> None:
    sigma = np.array([0.0, 1.0, 0.0])
    assert measure(np.array([0.0, 0.5, 0.0]), sigma, 30.0).excess < 1.0
    broken = measure(np.array([0.0, 0.5, np.finfo(float).tiny]), sigma, 30.0)
    assert (broken.broken, broken.excess, broken.where) == (1, math.inf, "bit-equal elements")


def test_an_element_without_a_unit_passes_only_when_equal() -> None:
    for unknown in (math.nan, math.inf):
        sigma = np.array([unknown, 1.0])
        assert measure(np.array([0.0, 0.5]), sigma, 30.0).excess < 1.0
        assert measure(np.array([1e-9, 0.5]), sigma, 30.0).excess == math.inf


def test_far_apart_is_an_answer_not_a_warning() -> None:
    assert measure(np.array([1.0, 1e300]), np.array([5e-324, 1e-300]), 30.0).excess == math.inf


# --- subtract, bits --------------------------------------------------------------------------------------------------


def test_equal_non_finite_values_are_equal_and_one_sided_ones_are_not() -> None:
    left = np.array([np.inf, -np.inf, np.nan, np.inf, np.nan, 1.0, 2.0])
    right = np.array([np.inf, -np.inf, np.nan, -np.inf, 1.0, np.inf, 1.0])
    np.testing.assert_array_equal(subtract(left, right), [0, 0, 0, np.nan, np.nan, np.nan, 1.0])


def test_nothing_is_broadcast() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        subtract(np.ones((1, 3)), np.ones(3))
    with pytest.raises(ValueError, match="broadcast"):
        subtract(np.float64(1.0), np.ones(3))


@given(st.floats(1e-3, 1e30))
def test_effective_bits_fall_with_z(z: float) -> None:
    assert effective_bits(1.0, U) == 24.0
    assert effective_bits(2 * z, U) == pytest.approx(effective_bits(z, U) - 1)


def test_accurate_bits() -> None:
    reference = np.array([3.0, -4.0, -np.inf])
    assert accurate_bits(np.zeros(3), reference, U) == 24.0
    assert accurate_bits(np.array([3.0, -4.0, 0.0]) / 8, reference, U) == 3.0
    assert accurate_bits(np.full(3, 1e-30), reference, U) == 24.0, "never more than the format holds"
    assert accurate_bits(np.array([np.nan, 0.0, 0.0]), reference, U) == -math.inf
    assert accurate_bits(np.ones(3), np.zeros(3), U) == -math.inf
    assert accurate_bits(np.zeros(0), np.zeros(0), U) == 24.0


# --- pool_sigma ------------------------------------------------------------------------------------------------------


def test_pooling_recovers_a_sigma_of_rows_and_columns() -> None:
    """Nearer to the truth than the raw estimate, whose logarithm scatters by 1/sqrt(2 draws)."""
    rng = np.random.default_rng(11)
    true = field(rng, (40, 30))
    sigma, dof = pool_sigma(rng.normal(size=(DRAWS, 40, 30)) * true)
    raw = 1.0 / math.sqrt(2 * DRAWS)
    assert np.std(np.log(sigma / true)) < 0.75 * raw
    assert abs(np.mean(np.log(sigma / true))) < raw / 4
    assert dof > 2 * DRAWS


def test_pooling_keeps_to_the_draws_where_rows_and_columns_explain_nothing() -> None:
    rng = np.random.default_rng(12)
    true = field(rng, (40, 30), roughness=2.0)
    sigma, dof = pool_sigma(rng.normal(size=(DRAWS, 40, 30)) * true)
    assert DRAWS < dof < 1.5 * DRAWS
    assert np.std(np.log(sigma / true)) < 3.0 / math.sqrt(2 * DRAWS), "the scatter of the truth is 2"


def test_a_line_of_equal_elements_is_pooled_and_its_freedom_not_overstated() -> None:
    """One line has no second axis to share with: a fit per element would be the element itself."""
    rng = np.random.default_rng(13)
    even, even_dof = pool_sigma(rng.normal(size=(DRAWS, 200)))
    assert np.std(np.log(even)) < 1.0 / math.sqrt(2 * DRAWS) / 2
    assert even_dof > 4 * DRAWS
    _, rough_dof = pool_sigma(rng.normal(size=(DRAWS, 200)) * field(rng, (200,), 1.0))
    assert rough_dof < 1.5 * DRAWS


def test_a_smaller_row_keeps_its_smaller_sigma() -> None:
    rng = np.random.default_rng(14)
    true = np.ones((50, 20))
    true[7] = 1e-4
    sigma, _ = pool_sigma(rng.normal(size=(DRAWS, 50, 20)) * true)
    assert 0.5e-4 < sigma[7].min() <= sigma[7].max() < 2e-4


def test_what_never_moved_has_no_noise_and_what_moved_a_little_has() -> None:
    rng = np.random.default_rng(15)
    draws = rng.normal(size=(DRAWS, 4, 6))
    draws[:, 2] = 0.0
    draws[:, 1, 3] *= 1e-200
    sigma, _ = pool_sigma(draws)
    assert not sigma[2].any()
    assert (sigma[[0, 1, 3]] > 0).all()
    assert not pool_sigma(np.zeros((DRAWS, 3)))[0].any()
    assert pool_sigma(np.zeros((DRAWS, 0)))[0].shape == (0,)
    single, dof = pool_sigma(np.full((DRAWS,), 2.0))
    assert (float(single), dof) == (2.0, DRAWS)


def test_draws_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not judged"):
        pool_sigma(np.array([[np.nan, 1.0], [1.0, 2.0]]))


@quick
@given(st.sampled_from(SHAPES), st.floats(1e-30, 1e30), st.integers(0, 10**9))
def test_pooling_scales_with_the_draws(shape: tuple[int, ...], factor: float, seed: int) -> None:
    draws = np.random.default_rng(seed).normal(size=(DRAWS, *shape))
    sigma, dof = pool_sigma(draws)
    scaled, scaled_dof = pool_sigma(draws * factor)
    np.testing.assert_allclose(scaled, sigma * factor, rtol=1e6 * np.finfo(float).eps)
    assert scaled_dof == pytest.approx(dof)


# --- judge_tensor ----------------------------------------------------------------------------------------------------


class Case:
    """A tensor with known noise, judged in float32, and two right sides."""

    def __init__(self, seed: int = 0, shape: tuple[int, ...] = (12, 16)) -> None:
        self.rng = np.random.default_rng(seed)
        self.reference = self.rng.normal(size=shape)
        self.sigma = np.abs(self.reference) * 2 + 0.1
        self.noise = noise_of(self.rng, self.sigma)

    def side(self, size: float = 0.6) -> np.ndarray:
        return self.reference + size * U * self.sigma * self.rng.normal(size=self.reference.shape)

    def judge(self, jax: np.ndarray, torch: np.ndarray, **options):
        return judge_tensor(jax, torch, self.reference, self.noise, U, **options)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("shape", [(), (7,), (12, 16), (2, 5, 9)])
def test_right_sides_agree(seed: int, shape: tuple[int, ...]) -> None:
    case = Case(seed, shape)
    judgement = case.judge(case.side(), case.side())
    assert judgement.verdict is Verdict.AGREE, judgement.evidence
    assert "threshold" in judgement.evidence
    assert judgement.effective_jax > 22
    assert 0 < judgement.smallest_seen < 2.0**-10


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("side", ["jax", "torch", "both"])
@pytest.mark.parametrize("wrong", ["zeros", "sign", "other", "row", "nan", "inf", "smallest"])
def test_a_wrong_side_differs_and_is_named(seed: int, side: str, wrong: str) -> None:
    case = Case(seed)
    right = case.side()

    def spoilt() -> np.ndarray:
        value = case.side()
        if wrong == "row":
            value[3] = value[4]
        elif wrong in ("nan", "inf"):
            value[2, 2] = float(wrong)
        elif wrong == "smallest":  # what it says that it would have seen
            value = value * (1 + 2 * case.judge(value, value).smallest_seen)
        else:
            other = case.rng.normal(size=value.shape)
            value = {"zeros": np.zeros_like(value), "sign": -value, "other": other}[wrong]
        return value

    jax = right if side == "torch" else spoilt()
    torch = right if side == "jax" else spoilt()
    judgement = case.judge(jax, torch)
    assert judgement.verdict is Verdict.DIFFER, judgement.evidence
    for name in ("jax", "torch"):
        assert (name in judgement.evidence) == (side in (name, "both")), judgement.evidence


def test_no_update_is_rejected() -> None:
    """Displacements are compared, so "no update" is a displacement of zero."""
    case = Case(5)
    assert case.judge(np.zeros_like(case.reference), np.zeros_like(case.reference)).verdict is Verdict.DIFFER


def test_bits_of_exact_sides_are_all_that_the_format_has() -> None:
    case = Case()
    judgement = case.judge(case.reference, case.reference)
    assert (judgement.verdict, judgement.accurate_jax, judgement.effective_torch) == (Verdict.AGREE, 24.0, 24.0)


def test_exact_zeros_stay_judged() -> None:
    zeros, noise = np.zeros((4, 8)), Noise(np.zeros((4, 8)), 30.0, 0.0)
    assert judge_tensor(zeros, zeros, zeros, noise, U).verdict is Verdict.AGREE
    moved = zeros.copy()
    moved[1, 2] = 1e-30
    assert judge_tensor(zeros, moved, zeros, noise, U).verdict is Verdict.DIFFER


def test_noise_as_large_as_the_value_is_undetermined() -> None:
    case = Case()
    tiny = U * case.sigma * case.rng.normal(size=case.reference.shape) / 4
    judgement = judge_tensor(tiny * 1.1, tiny * 0.9, tiny, case.noise, U)
    assert judgement.verdict is Verdict.UNDETERMINED
    assert not determined(tiny, case.noise.scaled(U))
    assert determined(case.reference, case.noise.scaled(U))


def test_nothing_compared_is_not_agreed() -> None:
    empty = np.zeros((0, 4))
    judgement = judge_tensor(empty, empty, empty, Noise(empty, 30.0, 1.0), U)
    assert judgement.verdict is Verdict.UNDETERMINED
    assert "nothing was compared" in judgement.evidence


def test_masked_rows_of_the_reference_are_compared_as_they_are() -> None:
    case = Case()
    case.reference[3] = -np.inf
    case.noise = Noise(np.where(np.isfinite(case.reference), case.noise.sigma, 0.0), case.noise.dof, 1.0)
    with np.errstate(invalid="ignore"):
        right = case.side()
    assert case.judge(right, right).verdict is Verdict.AGREE
    wrong = right.copy()
    wrong[3, 1] = np.finfo(np.float32).min
    assert case.judge(right, wrong).verdict is Verdict.DIFFER


def test_a_function_that_loses_bits_of_its_own_is_unstable() -> None:
    case = Case()
    loss = 10 * THRESHOLDS.unstable_ratio
    case.noise = Noise(case.noise.sigma * loss, case.noise.dof, case.noise.kappa)
    judgement = case.judge(case.side(loss), case.side(loss))
    assert judgement.verdict is Verdict.UNSTABLE
    assert "bits that its inputs did not ask for" in judgement.evidence
    # A long sum has such a sigma, because the unit is that of a left-to-right one, but kernels do not err so.
    assert case.judge(case.side(), case.side()).verdict is Verdict.AGREE


@pytest.mark.parametrize("side", ["jax", "torch"])
def test_a_side_whose_error_dwarfs_the_other_is_unstable_and_named(side: str) -> None:
    case = Case()
    wide = Noise(case.noise.sigma * 1e4, case.noise.dof, case.noise.kappa * 1e4)
    good, bad = case.side(), case.side(1e4)
    jax, torch = (bad, good) if side == "jax" else (good, bad)
    judgement = judge_tensor(jax, torch, case.reference, wide, U)
    assert judgement.verdict is Verdict.UNSTABLE
    assert judgement.evidence.startswith(side)


def test_a_displacement_may_err_by_the_last_bits_of_its_positions() -> None:
    """One side's positions are the oracle's but for the smallest, the other's are one bit off in two: luck."""
    displacement = np.full((2, 57), 2.5e-3)
    noise = Noise(np.full(displacement.shape, 0.5), 200.0, 0.6)
    left, right = displacement.copy(), displacement.copy()
    left[0, :2] += 2 * U
    right[1, 3] += U / 64
    rounded = judge_tensor(left, right, displacement, noise, U, rounded=1.0)
    assert rounded.verdict is Verdict.AGREE
    assert judge_tensor(left, right, displacement, noise, U).verdict is Verdict.UNSTABLE
    # An error beyond the positions' rounding still tells.
    wide = Noise(noise.sigma * 1e3, noise.dof, noise.kappa * 1e3)
    left[:] += 100 * U
    assert judge_tensor(left, right, displacement, wide, U, rounded=1.0).verdict is Verdict.UNSTABLE


@pytest.mark.parametrize("sides", ["torch", "both"])
@pytest.mark.parametrize("seed", range(5))
def test_a_float32_rounding_inside_float64_is_pinned(sides: str, seed: int) -> None:
    case = Case(seed)
    u64 = float(np.finfo(np.float64).eps) / 2
    pinned = case.noise.scaled(U)

    def pinned_side() -> np.ndarray:
        return case.reference + U * case.sigma * case.rng.normal(size=case.reference.shape)

    torch = pinned_side()
    jax = pinned_side() if sides == "both" else case.reference
    options = {"noisy_reference": True, "pins": ("rope",), "pinned": pinned}
    judgement = judge_tensor(jax, torch, case.reference, case.noise, u64, **options)
    assert judgement.verdict is Verdict.PINNED, judgement.evidence
    assert "rope" in judgement.evidence
    without = judge_tensor(jax, torch, case.reference, case.noise, u64, noisy_reference=True)
    assert without.verdict is Verdict.DIFFER
    wrong = judge_tensor(jax, -torch, case.reference, case.noise, u64, **options)
    assert wrong.verdict is Verdict.DIFFER, "a pin excuses 24 bits, no more"


def test_in_the_references_own_precision_the_reference_errs_too() -> None:
    case = Case()
    jax, torch = case.side(), case.side()
    narrow, wide = case.judge(jax, torch), case.judge(jax, torch, noisy_reference=True)
    assert wide.jax.rms == pytest.approx(narrow.jax.rms / math.sqrt(2))
    assert wide.same.rms == narrow.same.rms


def test_verdicts_are_ordered_from_harmless_to_grave() -> None:
    assert sorted(Verdict, key=lambda v: v.gravity) == list(Verdict)
    assert Verdict.AGREE.gravity == 0
    assert Verdict.DIFFER.gravity == max(v.gravity for v in Verdict)
