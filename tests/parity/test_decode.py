"""The decode check: it passes the twins, rejects its controls, and sees bugs that are put into a twin's cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

import omni_jax.cache  # noqa: E402
import omni_torch.attention  # noqa: E402
import omni_torch.cache  # noqa: E402
from parity.checks import Scope, decode  # noqa: E402
from parity.result import CheckResult, Row  # noqa: E402
from parity.verdict import Verdict  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

PADDED, STEPS, PAIRS, EXPERTS, WINDOW = decode.CASES
# Nothing is compiled where JAX's program is evaluated instead.
PADDED = dataclasses.replace(PADDED, compiled=False)


@pytest.fixture(scope="module")
def result(one_thread) -> CheckResult:
    return decode.run(Scope(), lambda *_: None)


def rows(case: decode.Case, precision: str = "float64") -> dict[str, Row]:
    return {row.name: row for row in decode.decode(case, precision, Scope(draws=5)).rows()}


# --- the twins -------------------------------------------------------------------------------------------------------


def test_the_run_agrees(result) -> None:
    assert result.error is None
    assert [row for row in result.rows if row.verdict is not Verdict.AGREE] == []
    assert result.exit_code == 0


@pytest.mark.long
def test_every_case_agrees_compiled_in_every_precision() -> None:
    found = decode.run(Scope(full=True), lambda *_: None)
    assert found.exit_code == 0
    assert {row.regime for row in found.rows} >= {case.regime for case in (*decode.CASES, *decode.MORE)}
    assert all(control.rejected for control in found.controls)


@pytest.mark.parametrize("control", decode.CONTROLS)
def test_the_control_is_rejected(result, control) -> None:
    (found,) = [c for c in result.controls if c.name == control]
    assert found.rejected, found.evidence


def test_every_control_is_declared(result) -> None:
    assert {c.name for c in result.controls} == set(decode.CONTROLS)


def test_every_position_of_every_row_is_judged(result) -> None:
    for case in decode.CASES:
        for precision in case.precisions:
            (row,) = [
                r
                for r in result.rows
                if (r.config, r.regime, r.precision, r.name) == (case.config, case.regime, precision, "logits")
            ]
            assert row.shape == (len(case.pads), decode.T, decode.CONFIGS[case.config]["vocab_size"])
            assert not row.excused


def test_the_last_token_takes_the_last_position() -> None:
    for case in decode.CASES:
        ctx_len = decode.CONFIGS[case.config]["ctx_len"]
        assert ctx_len < decode.T if case.window else ctx_len == decode.T
    assert {case.chunk for case in (*decode.CASES, *decode.MORE)} == {1, 2, 3, 7}
    assert {len(case.pads) for case in decode.CASES} == {1, 3}


@pytest.mark.parametrize("case", decode.MORE, ids=lambda case: f"{case.config}, {case.regime}")
def test_the_other_cases_agree_in_float64(case) -> None:
    assert {row.verdict for row in rows(case).values()} == {Verdict.AGREE}


@pytest.mark.parametrize("seed", [1, 2])
def test_other_seeds_agree(seed) -> None:
    for case in (PADDED, PAIRS, EXPERTS, WINDOW):
        found = decode.decode(case, "float64", Scope(seed=seed, draws=5)).rows()
        assert {row.verdict for row in found} == {Verdict.AGREE}


def test_experts_within_the_noise_are_not_called_a_difference() -> None:
    found = decode.decode(EXPERTS, "float64", Scope(draws=5))
    wrong = {**found.jax, "logits": found.jax["logits"] + 1.0}
    apart = dataclasses.replace(found, jax=wrong)
    assert apart.rows()[0].verdict is Verdict.DIFFER
    tied = dataclasses.replace(apart, ties=1).rows()[0]
    assert tied.verdict is Verdict.UNDETERMINED
    assert tied.excused


def test_a_precision_that_it_does_not_know_is_no_pass() -> None:
    narrow = decode.run(Scope(precisions=("float16",)), lambda *_: None)
    assert narrow.exit_code == 3
    assert narrow.error is not None
    assert "float64" in narrow.error


# --- bugs in the twins -----------------------------------------------------------------------------------------------


def test_a_torch_mask_that_forgets_padding_is_seen(monkeypatch) -> None:
    clean = omni_torch.cache._CachedCall.mask

    def mask(self):
        found = clean(self)
        return torch.ones_like(found) if self._time == 1 else found

    monkeypatch.setattr(omni_torch.cache._CachedCall, "mask", mask)
    assert rows(PADDED)["logits"].verdict is Verdict.DIFFER


def test_torch_positions_that_count_padding_are_seen(monkeypatch) -> None:
    clean = omni_torch.cache._CachedCall.__init__

    def init(self, cache, time, attention_mask):
        clean(self, cache, time, attention_mask)
        if time == 1:
            self.positions_BT = torch.full_like(self.positions_BT, cache.length)

    monkeypatch.setattr(omni_torch.cache._CachedCall, "__init__", init)
    row = rows(PADDED)["logits"]
    assert row.verdict is Verdict.DIFFER
    assert "not the same function" in row.evidence


def test_is_causal_for_a_single_query_is_seen(monkeypatch) -> None:
    """The reference family's own bug: torch aligns the causal mask of one query at the top left."""
    clean = omni_torch.attention._attend_fused

    def fused(q, k, v, mask):
        if q.shape[1] == 1 and k.shape[1] > 1:
            mask = (torch.arange(k.shape[1]) == 0).expand(q.shape[0], 1, -1)
        return clean(q, k, v, mask)

    monkeypatch.setattr(omni_torch.attention, "_attend_fused", fused)
    for case in (PADDED, EXPERTS, WINDOW):
        assert rows(case)["logits"].verdict is Verdict.DIFFER


def test_a_torch_window_that_keeps_one_more_is_seen(monkeypatch) -> None:
    clean = omni_torch.cache._CachedCall.mask

    def mask(self):
        found = clean(self)
        if self._wraps:  # a chunk's later queries see the token that they push out
            found = found.clone()
            found[:, :, : found.shape[2] - self._time] = True
        return found

    monkeypatch.setattr(omni_torch.cache._CachedCall, "mask", mask)
    assert rows(WINDOW)["logits"].verdict is Verdict.DIFFER


def test_a_torch_cache_that_overwrites_when_full_is_seen(monkeypatch) -> None:
    clean = omni_torch.cache._CachedCall.__init__

    def init(self, cache, time, attention_mask):
        if cache.length + time > cache.kept.shape[1]:
            cache.length = cache.kept.shape[1] - time
        clean(self, cache, time, attention_mask)

    monkeypatch.setattr(omni_torch.cache._CachedCall, "__init__", init)
    found = rows(PADDED)
    assert found["logits"].verdict is Verdict.AGREE
    assert found["a full cache"].verdict is Verdict.DIFFER
    assert "torch gave logits for it; torch changed the cache" in found["a full cache"].evidence


def test_a_jax_cache_that_is_not_marked_when_full_is_seen(monkeypatch) -> None:
    monkeypatch.setattr(omni_jax.cache._CachedCall, "mark", lambda self, logits: logits)
    found = rows(PADDED)
    assert found["a full cache"].verdict is Verdict.DIFFER
    assert "jax gave logits for it" in found["a full cache"].evidence


def test_a_jax_chunk_whose_tokens_see_no_newer_ones_than_the_first_is_seen(monkeypatch) -> None:
    clean = omni_jax.cache._CachedCall.mask
    monkeypatch.setattr(
        omni_jax.cache._CachedCall, "mask", lambda self: jax.numpy.broadcast_to(clean(self)[:, :1], clean(self).shape)
    )
    assert rows(PADDED)["logits"].verdict is Verdict.DIFFER
    assert rows(EXPERTS)["logits"].verdict is Verdict.AGREE, "one by one there is only the first"


def test_a_jax_cache_with_stale_keys_is_seen_compiled_and_evaluated(monkeypatch) -> None:
    clean: Any = omni_jax.cache._LayerCache.store

    def store(self, k, v):
        old = self.k_BSKd
        seen = clean(self, k, v)
        if k.shape[1] == 1:
            self.k_BSKd = old
        return seen

    monkeypatch.setattr(omni_jax.cache._LayerCache, "store", store)
    for case, precision in ((PADDED, "float64"), (EXPERTS, "float64"), (STEPS, "bfloat16")):
        row = rows(case, precision)["logits"]
        assert row.verdict is Verdict.DIFFER
        assert "jax" in row.evidence.lower()


def test_what_is_compiled_is_what_is_evaluated() -> None:
    """The interpreter that stands for JAX in the default run gives what the compiled program gives, up to rounding."""
    from parity.verdict import accepts

    case = dataclasses.replace(EXPERTS, chunk=3, prompt=6)
    evaluated = decode.decode(case, "float64", Scope(draws=5))
    compiled = decode.decode(dataclasses.replace(case, compiled=True), "float64", Scope(draws=5))
    unit = float(np.finfo(np.float64).eps) / 2
    logits = [found.jax["logits"] for found in (evaluated, compiled)]
    assert accepts(logits[0], logits[1], compiled.noise, unit, noisy_reference=True)
    assert not np.array_equal(logits[0], logits[1]), "they would not be two computations"
