"""The sampling check: it passes the twins, rejects its controls, and sees bugs that are put into a twin."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

import omni_jax.sampling  # noqa: E402
import omni_torch.generation  # noqa: E402
import omni_torch.sampling  # noqa: E402
from parity import statistics as st  # noqa: E402
from parity.checks import Scope, sampling  # noqa: E402
from parity.checks.sampling import SETTINGS, Setting, oracle  # noqa: E402
from parity.result import CheckResult  # noqa: E402
from parity.verdict import Verdict  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

LEVEL = 1e-6


@pytest.fixture(scope="module")
def result(one_thread) -> CheckResult:
    return sampling.run(Scope(), lambda *_: None)


@pytest.fixture
def fresh_traces() -> Iterator[None]:
    """JAX keeps what it traced: a bug inside a jitted function would not be looked at, or would stay."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def names(result: CheckResult) -> set[str]:
    """Rows that differ, as regime: name."""
    return {f"{row.regime}: {row.name}" for row in result.rows if row.verdict is not Verdict.AGREE}


def judged(precision: str = "float32", generate: bool = False) -> set[str]:
    """What differs, judged anew: distributions and draws by given uniforms, or generate()."""
    scope, found = Scope(precisions=(precision,), controls=False), CheckResult("sampling")
    if generate:
        sampling._generated(scope, found)
    else:
        both = sampling.sides(scope)
        sampling._distributions(scope, both, precision, found)
        sampling._given_uniforms(scope, both, precision, found)
    return names(found)


# --- the twins -------------------------------------------------------------------------------------------------------


def test_the_run_agrees(result) -> None:
    assert result.error is None
    assert [row for row in result.rows if row.verdict is not Verdict.AGREE] == []
    assert result.exit_code == 0


@pytest.mark.parametrize("control", sampling.CONTROLS)
def test_the_control_is_rejected(result, control) -> None:
    (found,) = [c for c in result.controls if c.name == control]
    assert found.rejected, found.evidence


def test_every_control_is_declared_and_shown_in_its_order(result) -> None:
    assert [c.name for c in result.controls] == list(sampling.CONTROLS)


def test_every_precision_and_both_generators_have_their_rows(result) -> None:
    found = {(row.precision, row.regime, row.name.partition(",")[0]) for row in result.rows}
    for precision in sampling.PRECISIONS:
        assert {(precision, "drawn logits", name) for name in ("kept sets", "probabilities")} <= found
    for side in ("jax", "torch"):
        own = [row for row in result.rows if row.regime == "own generator" and row.name.endswith(f"({side})")]
        assert len(own) == 2 * len(sampling.OWN) + 2
        for row in own:
            assert (row.smallest_seen is not None) == row.name.startswith(("distribution", "neighbouring"))
            assert row.smallest_seen is None or row.smallest_seen < 0.3


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_seeds_agree(seed) -> None:
    both = sampling.sides(Scope(seed=seed))
    for precision in sampling.PRECISIONS:
        scope, found = Scope(seed=seed, precisions=(precision,)), CheckResult("sampling")
        sampling._distributions(scope, both, precision, found)
        if precision != "bfloat16":
            sampling._given_uniforms(scope, both, precision, found)
        assert names(found) == set()
        assert all(control.rejected for control in found.controls)


def test_only_known_precisions() -> None:
    narrow = sampling.run(Scope(precisions=("float16",)), lambda *_: None)
    assert narrow.exit_code == 3
    assert narrow.error is not None
    assert "float64" in narrow.error


# --- the oracle ------------------------------------------------------------------------------------------------------


def by_definition(logits: np.ndarray, setting: Setting) -> set[int]:
    """What is kept of one row: the first prefix, in the order of likelihood, that does what was asked."""
    order = sorted(np.flatnonzero(np.isfinite(logits)).tolist(), key=lambda i: (-logits[i], i))
    if setting.temperature == 0.0:
        return {order[0]}
    order = order[: setting.top_k or len(order)]
    mass = [math.exp((logits[i] - logits[order[0]]) / setting.temperature) for i in order]
    if setting.top_p == 1.0:
        return set(order)
    total = math.fsum(mass)
    end = next(n for n in range(1, len(order) + 1) if math.fsum(mass[:n]) >= setting.top_p * total)
    return set(order[:end])


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.penalty == 1.0], ids=str)
def test_the_oracle_keeps_what_the_definition_says(setting) -> None:
    logits = sampling.problem(5)[0].astype(np.float64)
    p, kept, *_ = oracle(logits, setting)
    for row in range(len(logits)):
        assert set(np.flatnonzero(kept[row]).tolist()) == by_definition(logits[row], setting), row
        assert set(np.flatnonzero(p[row]).tolist()) <= set(np.flatnonzero(kept[row]).tolist())
    assert np.abs(p.sum(1) - 1).max() <= sampling.V * np.finfo(np.float64).eps


def test_the_oracle_penalises_towards_less() -> None:
    logits, seen = np.array([[2.0, -2.0, 1.0, 0.0]]), np.array([[True, True, False, True]])
    p = oracle(logits, Setting(penalty=2.0), seen)[0]
    wanted = np.exp([1.0, -4.0, 1.0, 0.0])
    assert np.abs(p[0] - wanted / wanted.sum()).max() <= 4 * np.finfo(np.float64).eps


def test_the_problem_reaches_the_corners() -> None:
    logits, _, exact = sampling.problem(0)
    assert np.isneginf(logits).any()
    assert (np.sort(logits[1])[1:] == np.sort(logits[1])[:-1]).any()
    assert (np.isfinite(logits[exact]).sum(1) == [sampling.FLAT, sampling.FLAT, 1]).all()
    assert (logits[6] < 0).all()
    settings = {(s.top_k, s.top_p, s.temperature) for s in SETTINGS}
    assert {0, 1, sampling.V} <= {k for k, *_ in settings}
    assert max(k for k, *_ in settings) > sampling.V
    assert {0.0, 1.0} <= {p for _, p, _ in settings}
    assert 0.0 in {t for *_, t in settings}


# --- bugs in the twins -----------------------------------------------------------------------------------------------


def test_a_crossing_token_that_torch_drops_is_seen(monkeypatch) -> None:
    clean = omni_torch.sampling.truncated_probabilities

    def dropped(logits, temperature=1.0, top_k=0, top_p=1.0):
        p = clean(logits, temperature, top_k, top_p)
        if top_p == 1.0:
            return p
        least = p.masked_fill(p == 0, 2.0).argmin(dim=-1, keepdim=True)
        several = (p > 0).sum(dim=-1, keepdim=True) > 1
        p = torch.where(several, p.scatter(1, least, 0.0), p)
        return p / p.sum(dim=-1, keepdim=True)

    monkeypatch.setattr(omni_torch.sampling, "truncated_probabilities", dropped)
    for precision in ("float64", "float32"):
        assert judged(precision) >= {"drawn logits: kept sets", "drawn logits: probabilities"}


def test_ties_that_torch_leaves_to_topk_are_seen(monkeypatch) -> None:
    """The highest ids of equal logits, as an unstable selection may keep them."""
    clean = omni_torch.sampling._top_ids
    monkeypatch.setattr(
        omni_torch.sampling,
        "_top_ids",
        lambda x, count: (x.shape[1] - 1 - clean(x.flip(1), count)).flip(1),
    )
    assert "drawn logits: kept sets" in judged()


def test_top_p_of_the_whole_vocabulary_is_seen(monkeypatch) -> None:
    clean = omni_torch.sampling._probabilities

    def wrong(logits, temperature, top_k, top_p):
        p = clean(logits, temperature, 0, top_p) * (clean(logits, temperature, top_k, 1.0) > 0)
        return p / p.sum(dim=-1, keepdim=True)

    monkeypatch.setattr(omni_torch.sampling, "_probabilities", wrong)
    assert "drawn logits: kept sets" in judged("float64")


def test_temperature_after_top_p_is_seen_in_jax(monkeypatch) -> None:
    clean = omni_jax.sampling.truncated_probabilities

    def wrong(logits, temperature=1.0, top_k=0, top_p=1.0):
        if temperature in (0.0, 1.0):
            return clean(logits, temperature, top_k, top_p)
        kept = clean(logits, 1.0, top_k, top_p) > 0
        p = jax.numpy.where(kept, clean(logits, temperature), 0.0)
        return p / jax.numpy.sum(p, axis=-1, keepdims=True)

    monkeypatch.setattr(omni_jax.sampling, "truncated_probabilities", wrong)
    assert judged() >= {"drawn logits: kept sets", "drawn logits: probabilities"}


def test_a_penalty_that_multiplies_is_seen_in_jax(monkeypatch) -> None:
    monkeypatch.setattr(
        omni_jax.sampling,
        "apply_repetition_penalty",
        lambda logits, seen, penalty: jax.numpy.where(seen, logits * penalty, logits),
    )
    assert "drawn logits: probabilities" in judged()


def test_a_softmax_in_bfloat16_is_seen(monkeypatch) -> None:
    clean = omni_torch.sampling._probabilities
    monkeypatch.setattr(omni_torch.sampling, "_probabilities", lambda *a: clean(*a).to(torch.bfloat16).to(a[0].dtype))
    assert judged() == {"drawn logits: probabilities"}


def test_a_draw_that_includes_its_boundary_is_seen(monkeypatch) -> None:
    """sums >= u where sums > u is meant: wrong on exact boundaries, and a masked token at u = 0."""
    monkeypatch.setattr(
        omni_torch.sampling,
        "_draw",
        lambda p, u: torch.searchsorted(p.cumsum(-1), u[:, None] * p.sum(-1, keepdim=True))[:, 0],
    )
    assert judged() == {"given uniforms: ids"}


def test_uniforms_of_another_row_are_seen_in_jax(monkeypatch) -> None:
    clean = omni_jax.sampling._draw
    monkeypatch.setattr(omni_jax.sampling, "_draw", lambda p, u: clean(p, jax.numpy.roll(u, 1)))
    assert judged() == {"given uniforms: ids"}


def test_repetitions_that_torch_does_not_mark_are_seen_in_generate(monkeypatch) -> None:
    clean = omni_torch.generation._penalise
    prompts: list[Any] = []

    def penalise(logits, seen, penalty):
        prompts.append(seen.clone())
        return clean(logits, prompts[0], penalty)

    monkeypatch.setattr(omni_torch.generation, "_penalise", penalise)
    assert judged(generate=True) == {"generate, shared uniforms: ids"}


def test_a_generator_of_torch_that_leans_is_seen(monkeypatch) -> None:
    clean = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **k: clean(*a, **k) ** 1.5)
    found = judged(generate=True)
    assert {f"own generator: distribution, {setting} (torch)" for setting in sampling.OWN} <= found
    assert not any("(jax)" in name or "seed" in name for name in found)


def test_one_uniform_for_two_rows_is_seen_in_jax(monkeypatch, fresh_traces) -> None:
    clean = jax.random.uniform
    monkeypatch.setattr(
        jax.random, "uniform", lambda key, shape, dtype: jax.numpy.repeat(clean(key, (shape[0] // 2,), dtype), 2)
    )
    found = judged(generate=True)
    assert {f"own generator: neighbouring rows, {setting} (jax)" for setting in sampling.OWN} <= found
    assert not any("(torch)" in name for name in found)


def test_a_seed_that_is_not_used_is_seen_in_jax(monkeypatch, fresh_traces) -> None:
    clean = jax.random.key
    monkeypatch.setattr(jax.random, "key", lambda seed: clean(7))
    assert judged(generate=True) == {"own generator: another seed, other ids (jax)"}


# --- the test of categories ------------------------------------------------------------------------------------------

P = np.array([0.5, 0.25, 0.125, 0.1, 0.02, 0.005, 0.0])


def test_right_draws_pass_at_the_stated_rate() -> None:
    rng = np.random.default_rng(0)
    alarms = sum(st.categorical_test(rng.choice(len(P), 2000, p=P), P, 0.05).rejected for _ in range(400))
    # Five standard deviations about 20.
    assert abs(alarms - 20) < 5 * math.sqrt(19)


def test_the_smallest_deviation_is_seen_as_often_as_stated() -> None:
    rng, n, seen = np.random.default_rng(1), 4000, 0
    smallest = st.categorical_test(rng.choice(len(P), n, p=P), P, LEVEL).smallest
    # q − p along the first two cells, of size w: w² = d²/p₀ + d²/p₁.
    shift = smallest / math.sqrt(1 / P[0] + 1 / P[1])
    wrong = P + np.array([shift, -shift, 0, 0, 0, 0, 0])
    for _ in range(300):
        seen += st.categorical_test(rng.choice(len(P), n, p=wrong), P, LEVEL).rejected
    # The χ² of wrong cells is not exactly a non-central one: the variances are those of q.
    assert abs(seen / 300 - st.POWER) < 0.1


@pytest.mark.parametrize("stray", [6, 7, -1, 2.5])
def test_an_id_that_cannot_be_is_rejected(stray) -> None:
    ids = np.random.default_rng(2).choice(len(P), 2000, p=P).astype(float)
    assert not st.categorical_test(ids, P, LEVEL).rejected
    ids[17] = stray
    assert st.categorical_test(ids, P, LEVEL).rejected


@pytest.mark.parametrize("p", [[1.0], [0.5, 0.4], [1.5, -0.5], [math.nan, 1.0]])
def test_what_is_no_distribution_is_refused(p) -> None:
    with pytest.raises(ValueError, match=r"sum of|leave 1 cell"):
        st.categorical_test(np.zeros(2000), p, LEVEL)


def test_neighbours_that_are_alike_are_rejected() -> None:
    ids = np.random.default_rng(3).choice(len(P), 2000, p=P)
    assert not sampling.neighbours_test(ids, P, LEVEL).rejected
    assert sampling.neighbours_test(np.repeat(ids[:1000], 2), P, LEVEL).rejected
