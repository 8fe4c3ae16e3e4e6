"""The fusion check: it passes the twins, rejects its controls, and sees bugs in a twin."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

import omni_jax.fusion  # noqa: E402
import omni_torch.fusion  # noqa: E402
from parity.checks import Scope, fusion  # noqa: E402
from parity.result import CheckResult  # noqa: E402
from parity.verdict import Verdict  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def result(one_thread) -> CheckResult:
    return fusion.run(Scope(), lambda *_: None)


def differing() -> list[str]:
    found = fusion.run(Scope(controls=False), lambda *_: None)
    return [row.name for row in found.rows if row.verdict is not Verdict.AGREE]


def test_the_run_agrees(result) -> None:
    assert [row for row in result.rows if row.verdict is not Verdict.AGREE] == []
    assert result.exit_code == 0


@pytest.mark.parametrize("control", fusion.CONTROLS)
def test_the_control_is_rejected(result, control) -> None:
    (found,) = [c for c in result.controls if c.name == control]
    assert found.rejected, found.evidence


def test_every_control_is_declared(result) -> None:
    assert {c.name for c in result.controls} == set(fusion.CONTROLS)


def test_every_case_and_refusal_has_its_rows(result) -> None:
    names = [row.name for row in result.rows]
    assert len(set(names)) == len(names)
    for case in fusion.CASES:
        assert sum(name.startswith(f"{case}: ") for name in names) >= 2
    assert sum(name.startswith("refused") for name in names) == len(fusion.REFUSED)


def test_the_exercises_shapes_by_hand() -> None:
    case = fusion.Case((1, 10, 5), targets=False)
    found = fusion.by_hand(case, fusion.inputs(case, 0))
    assert found[f"{case}: embeddings"].shape == (fusion.B, 16, fusion.D)


def test_what_is_masked_out_is_nan_before_and_zero_after() -> None:
    case = fusion.CASES[4]
    given = fusion.inputs(case, 0)
    assert all(np.isnan(given[name]).any() for name in fusion.NAMES)
    assert np.isfinite(fusion.by_hand(case, given)[f"{case}: embeddings"]).all()


@pytest.mark.parametrize("seed", [1, 2])
def test_other_seeds_agree(seed) -> None:
    assert fusion.run(Scope(seed=seed), lambda *_: None).exit_code == 0


def test_another_dtype_of_equal_values_is_seen() -> None:
    right = {"a": np.arange(3, dtype=np.int32)}
    (row,) = fusion.rows_of(right, {"a": np.arange(3)}, right)
    assert row.verdict is Verdict.DIFFER
    assert "torch: int64 (3,) for int32 (3,)" in row.evidence


# --- bugs in the twins -----------------------------------------------------------------------------------------------


def test_a_product_with_the_mask_is_seen(monkeypatch) -> None:
    """NaN · 0 is NaN: what a row lacks would come through."""
    right = omni_torch.fusion._join

    def join(parts, masks, targets):
        fused = right(parts, masks, targets)
        return fused._replace(embeddings=torch.cat([*parts.values()], dim=1) * fused.attention_mask[..., None])

    monkeypatch.setattr(omni_torch.fusion, "_join", join)
    found = differing()
    assert found
    assert all(name.endswith("embeddings") and "masked" in name for name in found)


def test_a_jax_pad_that_is_another_token_is_seen(monkeypatch) -> None:
    monkeypatch.setattr(omni_jax.fusion, "PAD_ID", 1)
    found = differing()
    assert found
    assert all(name.endswith("targets") for name in found)


def test_a_policy_that_counts_otherwise_is_seen(monkeypatch) -> None:
    for name in ("_most", "_cut"):
        right = getattr(omni_torch.fusion, name)
        monkeypatch.setattr(
            omni_torch.fusion, name, lambda x, ctx_len, *given, right=right: right(x, ctx_len + 1, *given)
        )
    assert any("family" in name for name in differing())
    assert any("longest" in name for name in differing())
    assert any(name.startswith("refused") for name in differing())


def test_a_twin_that_takes_what_the_other_refuses_is_seen(monkeypatch) -> None:
    right = omni_torch.fusion._check_ctx_len
    monkeypatch.setattr(omni_torch.fusion, "_check_ctx_len", lambda ctx_len: right(max(ctx_len, 1)))
    assert [name for name in differing() if "context 0" in name] == [
        "refused: 1 of image, 6 of audio, 3 of text, family, context 0"
    ]


def test_a_field_that_one_twin_lacks_is_seen(monkeypatch) -> None:
    right = omni_torch.fusion._join
    monkeypatch.setattr(omni_torch.fusion, "_join", lambda *given: right(*given)._replace(targets=None))
    assert all(name.endswith("targets") for name in differing())
    assert differing()
