"""The ctc check: it passes the twins and the third parties, rejects its controls, and sees bugs in a twin."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import omni_jax.ctc  # noqa: E402
import omni_torch.ctc  # noqa: E402
from parity.checks import Scope, ctc  # noqa: E402
from parity.checks._encoders import judged  # noqa: E402
from parity.result import CheckResult  # noqa: E402
from parity.verdict import Verdict  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
OURS = (*ctc.BLANKS, "gradient logits")


@pytest.fixture(scope="module")
def result(one_thread) -> CheckResult:
    return ctc.run(Scope(), lambda *_: None)


def verdicts(precision: str = "float64") -> dict[str, Verdict]:
    ((_, case),) = judged([ctc.problem(0)], Scope(precisions=(precision,)), ctc.PRECISIONS, lambda *_: None)
    return case.main.verdicts


def test_the_run_agrees(result) -> None:
    assert result.error is None
    assert [row for row in result.rows if row.verdict is not Verdict.AGREE] == []
    assert result.exit_code == 0


@pytest.mark.parametrize("control", ctc.CONTROLS)
def test_the_control_is_rejected(result, control) -> None:
    (found,) = [c for c in result.controls if c.name == control]
    assert found.rejected, found.evidence


def test_every_control_is_declared(result) -> None:
    assert {c.name for c in result.controls} == set(ctc.CONTROLS)


def test_third_parties_are_asked_for_everything(result) -> None:
    names = {row.name for row in result.rows if row.precision == "float64"}
    for party in ("torch.nn.functional.ctc_loss", "optax.ctc_loss"):
        assert {f"{party}: {name}" for name in OURS} <= names


@pytest.mark.parametrize("seed", range(1, 5))
def test_other_seeds_agree(seed) -> None:
    found = ctc.run(Scope(seed=seed, controls=False), lambda *_: None)
    assert {row.verdict for row in found.rows} == {Verdict.AGREE}


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 5])
def test_the_full_run_compiles(seed) -> None:
    assert ctc.run(Scope(full=True, seed=seed), lambda *_: None).exit_code == 0


def test_what_cannot_be_spelt_is_infinite_and_has_no_gradient() -> None:
    ((_, case),) = judged([ctc.problem(0)], Scope(precisions=("float32",)), ctc.PRECISIONS, lambda *_: None)
    for name in ctc.BLANKS:
        for side in case.main.values[name][:2]:
            assert np.isinf(side[ctc.UNSPELT])
            assert np.isfinite(side[: ctc.UNSPELT]).all()
    for side in case.main.values["gradient logits"][:2]:
        assert not side[ctc.UNSPELT].any()
        assert side[: ctc.UNSPELT].any(axis=(1, 2)).all()


# --- bugs in the twins -----------------------------------------------------------------------------------------------


def test_a_jax_path_that_skips_blanks_between_equals_is_seen(monkeypatch) -> None:
    right = omni_jax.ctc._shift

    def shift(x, by, fill):
        return jnp.full_like(x, fill) if by == 2 and x.dtype == jnp.int32 else right(x, by, fill)

    monkeypatch.setattr(omni_jax.ctc, "_shift", shift)
    assert {verdicts()[name] for name in OURS} == {Verdict.DIFFER}


def test_a_torch_loss_of_1e5_for_what_cannot_be_spelt_is_seen(monkeypatch) -> None:
    """What optax gives: its log_epsilon is −1e5."""
    monkeypatch.setattr(omni_torch.ctc, "math", SimpleNamespace(inf=1e5, nan=math.nan))
    found = verdicts()
    assert {found[name] for name in ctc.BLANKS} == {Verdict.DIFFER}


def test_a_shared_mistake_is_seen_by_third_parties(monkeypatch) -> None:
    for module in (omni_jax.ctc, omni_torch.ctc):
        right: Any = module.ctc_loss
        monkeypatch.setattr(
            module, "ctc_loss", lambda *given, blank=0, right=right: right(*given, blank=ctc.V - 1 - blank)
        )
    found = ctc.run(Scope(precisions=("float64",), controls=False), lambda *_: None)
    verdict = {row.name: row.verdict for row in found.rows}
    assert {verdict[name] for name in OURS} == {Verdict.AGREE}
    assert {v for name, v in verdict.items() if name.startswith(("torch.nn", "optax"))} == {Verdict.DIFFER}


def test_a_loss_in_half_the_bits_is_seen(monkeypatch) -> None:
    right = omni_torch.ctc.statistics_dtype
    monkeypatch.setattr(omni_torch.ctc, "statistics_dtype", lambda dtype: torch.bfloat16)
    assert verdicts("float32")["blank:first"] is Verdict.DIFFER
    monkeypatch.setattr(omni_torch.ctc, "statistics_dtype", right)
    assert verdicts("float32")["blank:first"] is Verdict.AGREE


def test_a_twin_that_takes_what_does_not_fit_is_seen(monkeypatch) -> None:
    monkeypatch.setattr(omni_torch.ctc, "_check_values", lambda *given: None)
    row = ctc._refusal_row(ctc.refusals())
    assert row.verdict is Verdict.DIFFER
    assert "torch" in row.evidence
