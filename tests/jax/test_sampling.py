"""Sampling: the truncated distribution against a slow oracle, its edge cases, and the draw."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from omni_jax.sampling import apply_repetition_penalty, sample, truncated_probabilities

EPS = float(np.finfo(np.float32).eps)
LOGITS = jnp.array([[0.0, 3.0, -1.0, 3.0, 2.0]])
quarter = st.integers(-24, 24).map(lambda n: n / 4)  # coarse, so that exact ties are common
rows = st.lists(quarter, min_size=1, max_size=12)


def kept(p) -> list[list[int]]:
    return [np.flatnonzero(row).tolist() for row in np.asarray(p)]


def oracle(logits: list[float], temperature: float, top_k: int, top_p: float) -> tuple[list[float], float]:
    """The distribution by one plain loop in float64, and how close a sum came to p without being equal."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if temperature == 0.0:
        return [float(i == order[0]) for i in range(len(logits))], math.inf
    if top_k:
        order = order[:top_k]
    mass = {i: math.exp((logits[i] - logits[order[0]]) / temperature) for i in order}
    total = math.fsum(mass.values())
    chosen, margin = [], math.inf
    for i in order:
        share = math.fsum(mass[j] for j in chosen) / total
        margin = min(margin, abs(share - top_p))
        if chosen and top_p < 1.0 and share >= top_p:
            break
        chosen.append(i)
    total = math.fsum(mass[i] for i in chosen)
    return [mass[i] / total if i in chosen else 0.0 for i in range(len(logits))], margin


@settings(max_examples=300, deadline=None)
@given(
    rows,
    st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    st.integers(0, 14),
    st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)),
)
def test_truncation_is_the_oracles(logits, temperature, top_k, top_p) -> None:
    expected, margin = oracle(logits, temperature, top_k, top_p)
    assume(margin > 4 * len(logits) * EPS or top_p in (0.0, 1.0))
    logits_BV = jnp.array([logits + [-math.inf] * (12 - len(logits))], jnp.float32)  # one shape, compiled once
    p_BV = truncated_probabilities(logits_BV, temperature, top_k, top_p)
    assert kept(p_BV) == kept([expected])
    # exp's argument is up to 24 and rounded once; then a sum of 12 terms.
    assert np.abs(np.asarray(p_BV[0, : len(logits)]) - expected).max() <= (24 + 12) * EPS
    assert abs(float(p_BV.sum()) - 1.0) <= 12 * EPS


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=200).filter(any), st.integers(0, 2**23 - 1))
def test_the_draw_inverts_the_cumulative_distribution(mass, numerator) -> None:
    """Integers below 2^24 and a u of 23 bits, in float64, so that every product and sum is exact."""
    u = numerator / 2**23
    expected = int(np.searchsorted(np.cumsum(mass), u * sum(mass), side="right"))
    with jax.enable_x64(True):
        p_BV = jnp.array([mass + [0] * (200 - len(mass))], jnp.float64)
        assert sample(p_BV, jnp.array([u], jnp.float64)).tolist() == [expected]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(2.0**-60, 1.0, width=32)), min_size=1, max_size=300).filter(any),
    st.sampled_from([0.0, 0.5, 1.0 - 2.0**-24]),
)
def test_a_token_of_probability_0_is_never_drawn(mass, u) -> None:
    p_BV = jnp.array([mass + [0.0] * (300 - len(mass))], jnp.float32)
    (token,) = sample(p_BV, jnp.array([u], jnp.float32)).tolist()
    assert p_BV[0, token] > 0.0


def test_temperature() -> None:
    assert truncated_probabilities(LOGITS, temperature=0.0).tolist() == [[0.0, 1.0, 0.0, 0.0, 0.0]]  # the lowest id
    for tiny in (1e-45, 1e-30):
        assert truncated_probabilities(LOGITS, temperature=tiny).tolist() == [[0.0, 0.5, 0.0, 0.5, 0.0]]
    hot = truncated_probabilities(LOGITS, temperature=1e30)
    assert np.abs(np.asarray(hot) - 0.2).max() <= EPS
    wide = truncated_probabilities(jnp.array([[3e38, -3e38, -math.inf]]))
    assert wide.tolist() == [[1.0, 0.0, 0.0]]


def test_top_k() -> None:
    assert kept(truncated_probabilities(LOGITS, top_k=0)) == [[0, 1, 2, 3, 4]]
    assert kept(truncated_probabilities(LOGITS, top_k=5)) == kept(truncated_probabilities(LOGITS, top_k=2**40))
    assert kept(truncated_probabilities(LOGITS, top_k=1)) == [[1]]
    ties = jnp.array([[1.0, 2.0, 1.0, 1.0], [0.0, -0.0, 0.0, -0.0], [5.0, 5.0, 6.0, 5.0]])
    assert kept(truncated_probabilities(ties, top_k=2)) == [[0, 1], [0, 1], [0, 2]]
    assert kept(truncated_probabilities(jnp.zeros((1, 7)), top_k=3)) == [[0, 1, 2]]


def test_top_p() -> None:
    quarters = jnp.zeros((1, 4))  # every sum is exact
    for p, count in ((0.0, 1), (0.2, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4), (1.0, 4)):
        assert kept(truncated_probabilities(quarters, top_p=p)) == [list(range(count))], p
    halves = jnp.log(jnp.array([[0.125, 0.5, 0.25, 0.125]]))
    assert kept(truncated_probabilities(halves, top_p=0.6)) == [[1, 2]]  # the token that crosses p is in
    assert kept(truncated_probabilities(halves, top_p=0.8)) == [[0, 1, 2]]  # the lower of two equal ids
    # After top-k the shares are those of what it left: 2/3 and 1/3.
    assert kept(truncated_probabilities(halves, top_k=2, top_p=0.6)) == [[1]]
    # 1 keeps what rounding would have dropped: the first token alone sums to 1 in float32.
    steep = jnp.array([[30.0, 0.0, 0.0]])
    assert kept(truncated_probabilities(steep, top_p=1.0)) == [[0, 1, 2]]
    assert kept(truncated_probabilities(steep, top_k=2, top_p=1.0)) == [[0, 1]]


def test_rows_do_not_mix() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 50)), jnp.float32)
    for options in ({"top_k": 7}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.5, "temperature": 0.8}, {"temperature": 0.0}):
        together = truncated_probabilities(logits, **options)
        for i in range(3):
            assert jnp.array_equal(together[i : i + 1], truncated_probabilities(logits[i : i + 1], **options))


def test_order_is_of_the_logits_not_of_their_rounded_quotients() -> None:
    """3e-9 and 4e-9 less 100 are the same float32; top-k still knows which is larger."""
    p = truncated_probabilities(jnp.array([[100.0, 3e-9, 4e-9]]), temperature=50.0, top_k=2)
    assert kept(p) == [[0, 2]]


def test_repetition_penalty() -> None:
    seen = jnp.array([[True, True, True, False, False]])
    penalised = apply_repetition_penalty(jnp.array([[0.0, 3.0, -1.0, 3.0, -2.0]]), seen, 2.0)
    assert penalised.tolist() == [[0.0, 1.5, -2.0, 3.0, -2.0]]
    assert jnp.array_equal(apply_repetition_penalty(LOGITS, seen, 1.0), LOGITS)
    assert apply_repetition_penalty(LOGITS, seen, 0.5)[0, 1] == 6.0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_low_precision_is_widened(dtype) -> None:
    logits = LOGITS.astype(dtype)
    p = truncated_probabilities(logits, 0.7, 3, 0.9)
    assert p.dtype == jnp.float32
    assert apply_repetition_penalty(logits, logits > 0, 1.3).dtype == jnp.float32
    assert jnp.array_equal(p, truncated_probabilities(LOGITS, 0.7, 3, 0.9))
    with jax.enable_x64(True):
        assert truncated_probabilities(jnp.asarray(LOGITS, jnp.float64), 0.7, 3, 0.9).dtype == jnp.float64


def test_inside_jit_it_is_the_same() -> None:
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(4, 300)), jnp.float32)
    u = jnp.array([0.0, 0.3, 0.6, 0.99])

    def draw(logits, u):
        return sample(truncated_probabilities(logits, 0.9, 40, 0.8), u)

    assert jax.jit(draw)(logits, u).tolist() == draw(logits, u).tolist()


def test_frequencies_of_a_large_vocabulary() -> None:
    """Evenly spaced u give every token its share, to one draw."""
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(1, 1000)), jnp.float32)
    p = np.asarray(truncated_probabilities(logits, 0.5, 100, 0.9))[0]
    n = 4096
    ids = sample(jnp.broadcast_to(jnp.asarray(p), (n, 1000)), (jnp.arange(n, dtype=jnp.float32) + 0.5) / n)
    counts = np.bincount(np.asarray(ids), minlength=1000)
    assert np.abs(counts - n * p).max() <= 1.0 + n * 1000 * EPS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 is not allowed"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": "1"}, "temperature='1'"),
        ({"temperature": True}, "temperature=True"),
        ({"temperature": 10**400}, "temperature=1000"),
        ({"top_k": -1}, "top_k=-1 is not allowed"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"top_p": 1.01}, "top_p=1.01 is not allowed: must be a number from 0 to 1"),
        ({"top_p": -0.01}, "top_p=-0.01"),
        ({"top_p": math.nan}, "top_p=nan"),
    ],
)
def test_bad_settings(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        truncated_probabilities(LOGITS, **options)


def test_bad_arrays() -> None:
    for row in ([math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]):
        with pytest.raises(ValueError, match=r"logits_BV\[1\]"):
            truncated_probabilities(jnp.array([[0.0, 1.0], row]))
    for logits in (jnp.zeros(3), jnp.zeros((1, 0)), jnp.zeros((1, 3), jnp.int32)):
        with pytest.raises(ValueError, match="logits_BV have shape"):
            truncated_probabilities(logits)
    p = jnp.array([[0.5, 0.5]])
    for u in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"uniforms_B\[0\]"):
            sample(p, jnp.array([u]))
    with pytest.raises(ValueError, match="uniforms_B have shape"):
        sample(p, jnp.array([0.1, 0.2]))
    for row in ([0.0, 0.0], [-1.0, 2.0], [math.nan, 1.0], [math.inf, 1.0]):
        with pytest.raises(ValueError, match=r"p_BV\[0\] is no distribution"):
            sample(jnp.array([row]), jnp.array([0.5]))
    with pytest.raises(ValueError, match="seen_BV has shape"):
        apply_repetition_penalty(LOGITS, jnp.zeros((1, 5)), 1.2)
    for penalty in (0.0, -1.0, math.nan, 1e-45, 1e39, 10**400):
        with pytest.raises(ValueError, match="repetition_penalty="):
            apply_repetition_penalty(LOGITS, LOGITS > 0, penalty)


def test_a_row_is_named_truthfully() -> None:
    with pytest.raises(ValueError, match=r"logits_BV\[0\] holds nothing but -inf"):
        truncated_probabilities(jnp.array([[-math.inf, -math.inf]]))
    with pytest.raises(ValueError, match=r"logits_BV\[0\] holds nan"):
        truncated_probabilities(jnp.array([[math.nan, -math.inf]]))
    for row in ([3e38, 3e38], [1e-40, 0.0]):  # a sum that overflows, one that is as good as none
        with pytest.raises(ValueError, match=r"p_BV\[0\] is no distribution"):
            sample(jnp.array([row], dtype=jnp.float32), jnp.array([0.5]))


def test_lists_are_refused_by_name() -> None:
    half = jnp.array([[0.5, 0.5]])
    with pytest.raises(ValueError, match="logits_BV is a list, must be a"):
        truncated_probabilities([[0.0, 1.0]])
    with pytest.raises(ValueError, match="p_BV is a list"):
        sample([[0.5, 0.5]], jnp.array([0.5]))
    with pytest.raises(ValueError, match="uniforms_B is a list"):
        sample(half, [0.5])
    with pytest.raises(ValueError, match="seen_BV is a list"):
        apply_repetition_penalty(half, [[True, False]], 1.2)


@pytest.mark.parametrize("penalty", [1e-6, 1e6])
def test_the_penaltys_ends_do_not_overflow(penalty) -> None:
    logits = jnp.array([[-1e4, 1e4]])
    penalised = np.asarray(apply_repetition_penalty(logits, logits == logits, penalty))
    assert np.isfinite(penalised).all()
    assert (penalised != 0.0).all()


@pytest.mark.parametrize(("below", "count"), [(2.0**-26, 3), (2.0**-25, 3), (2.0**-24, 1)])
def test_a_top_p_that_rounds_to_1_is_1(below, count) -> None:
    """In float32, where the first token's share of the sum is 1; float64 tells them apart."""
    steep = jnp.array([[30.0, 0.0, 0.0]], dtype=jnp.float32)
    assert len(kept(truncated_probabilities(steep, top_p=1.0 - below))[0]) == count


@pytest.mark.parametrize("u", [0.67507535, 0.0, 0.25, 1.0 - 2.0**-24])
def test_a_large_vocabulary_with_empty_blocks(u) -> None:
    """XLA's cumulative sum of 1024 blocks falls here and there, and rises at an empty one."""
    rng = np.random.default_rng(2)
    p = np.zeros((1024, 128), np.float32)
    p[:, 0] = rng.random(1024) * (rng.random(1024) < 0.5)
    (token,) = sample(jnp.asarray(p.reshape(1, -1)), jnp.full(1, u, jnp.float32)).tolist()
    assert p.ravel()[token] > 0.0
