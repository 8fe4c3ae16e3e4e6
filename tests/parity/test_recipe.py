"""The recipe check: every step of long schedules is judged, and real bugs in a twin's schedule are caught by it."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("jax")

import omni_jax.optim
import omni_torch.optim
from parity.checks import Scope, recipe
from parity.result import CheckResult
from parity.verdict import Verdict


def run(*precisions: str, controls: bool = False) -> CheckResult:
    scope = Scope(precisions=precisions, draws=3, controls=controls)
    return recipe.run(scope, lambda done, total, label: None)


def bad(result: CheckResult) -> set[str]:
    return {row.name for row in result.rows if row.verdict is not Verdict.AGREE}


@pytest.fixture(scope="module")
def clean(one_thread) -> CheckResult:
    return run("float64", "float32", controls=True)


def test_it_agrees_on_every_step_of_every_schedule(clean) -> None:
    assert clean.verdict is Verdict.AGREE
    rows = [row for row in clean.rows if row.regime == "every step of a schedule"]
    assert {(row.precision, row.name) for row in rows} == {
        (precision, name) for precision in recipe.PRECISIONS for name in recipe.SCHEDULES
    }
    assert all(row.shape == (1000 + 1 + recipe.BEYOND,) for row in rows)


def test_the_schedules_reach_the_corners() -> None:
    numbers = set(recipe.SCHEDULES.values())
    assert {end for _, end, _ in numbers} == {1000}
    assert {0, 999} <= {warm for warm, _, _ in numbers}
    assert {0.0, 1.0} <= {low for _, _, low in numbers}


@pytest.mark.parametrize("control", recipe.CONTROLS)
def test_controls_are_rejected(clean, control) -> None:
    (shown,) = [c for c in clean.controls if c.name == control]
    assert shown.rejected, shown.evidence
    if control not in ("clip without 1e-6", "everything decays", "micro-batches counted"):
        assert "schedules" in shown.evidence


def test_both_trainers_count_updates_not_micro_batches() -> None:
    result = CheckResult("recipe")
    recipe._trainers(Scope(full=True, controls=False), result)
    assert [row.name for row in result.rows] == [
        f"learning rate under accumulation ({side})" for side in ("jax", "torch")
    ]
    assert {row.verdict for row in result.rows} == {Verdict.AGREE}


def off_by_one(real: Any) -> Any:
    return lambda step, *numbers: real(step + 1, *numbers)


def cosine_over_all_steps(real: Any) -> Any:
    def wrong(step, warmup_steps, max_steps, min_ratio=0.1):
        if step < warmup_steps:
            return step / warmup_steps
        return real(step, 0, max_steps, min_ratio)

    return wrong


def no_floor_at_the_end(real: Any) -> Any:
    """Beyond max_steps the cosine rises again."""

    def wrong(step, warmup_steps, max_steps, min_ratio=0.1):
        if step <= max_steps:
            return real(step, warmup_steps, max_steps, min_ratio)
        progress = (step - warmup_steps) / (max_steps - warmup_steps)
        return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2

    return wrong


def last_step_early(real: Any) -> Any:
    """Wrong at one step of 1,025 only."""
    return lambda step, *numbers: real(1000 if step == 999 else step, *numbers)


@pytest.mark.parametrize(
    ("bug", "seen"),
    [
        (off_by_one, set(recipe.SCHEDULES)),
        (cosine_over_all_steps, {"warm-up 100 of 1,000", "warm-up up to the last step", "down to 0"}),
        (no_floor_at_the_end, set(recipe.SCHEDULES) - {"no descent"}),
        (last_step_early, set(recipe.SCHEDULES) - {"no descent"}),
    ],
)
def test_bugs_in_torch_are_caught(monkeypatch, one_thread, bug, seen) -> None:
    monkeypatch.setattr(omni_torch.optim, "warmup_cosine", bug(omni_torch.optim.warmup_cosine))
    result = run("float64")
    assert result.verdict is Verdict.DIFFER
    assert bad(result) & set(recipe.SCHEDULES) == seen


def test_a_float32_count_in_jax_is_caught(monkeypatch, one_thread) -> None:
    """The cosine of a progress that was divided in float32 under x64, as optax's linear schedule does."""
    import jax.numpy as jnp

    def wrong(step, warmup_steps, max_steps, min_ratio=0.1):
        step32 = step.astype(jnp.float32)
        progress = jnp.clip((step32 - warmup_steps) / (max_steps - warmup_steps), 0.0, 1.0).astype(
            jnp.result_type(float)
        )
        cosine = min_ratio + (1 - min_ratio) * (1 + jnp.cos(math.pi * progress)) / 2
        warm = step.astype(progress.dtype) / max(warmup_steps, 1)
        return jnp.where(step < warmup_steps, warm, cosine)

    monkeypatch.setattr(omni_jax.optim, "warmup_cosine", wrong)
    result = run("float64")
    assert result.verdict in (Verdict.DIFFER, Verdict.PINNED)
    assert "no warm-up" in bad(result)
