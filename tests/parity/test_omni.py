"""The omni check: it passes the twins, rejects its controls, and sees bugs in a twin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

import omni_jax.fusion  # noqa: E402
import omni_torch.fusion  # noqa: E402
import omni_torch.optim  # noqa: E402
import omni_torch.vision_encoder  # noqa: E402
from parity.checks import Scope, omni  # noqa: E402
from parity.checks._encoders import judged  # noqa: E402
from parity.result import CheckResult  # noqa: E402
from parity.verdict import Verdict  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def result(one_thread) -> CheckResult:
    return omni.run(Scope(), lambda *_: None)


def verdicts(precision: str = "float64") -> dict[str, Verdict]:
    scope = Scope(precisions=(precision,))
    ((_, case),) = judged(omni.problems(scope), scope, omni.PRECISIONS, lambda *_: None)
    return case.main.verdicts


def test_the_run_agrees(result) -> None:
    assert result.error is None
    assert [row for row in result.rows if row.verdict is not Verdict.AGREE] == []
    assert result.exit_code == 0


@pytest.mark.parametrize("control", omni.CONTROLS)
def test_the_control_is_rejected(result, control) -> None:
    (found,) = [c for c in result.controls if c.name == control]
    assert found.rejected, found.evidence


def test_every_control_is_declared(result) -> None:
    assert {c.name for c in result.controls} == set(omni.CONTROLS)


def test_gradients_are_those_of_what_is_trained_and_of_nothing_else(result) -> None:
    (problem,) = omni.problems(Scope())
    trained = {name for name in problem.weights if not name.startswith(omni.FROZEN)}
    assert {name.partition(".")[0] for name in trained} == {"thinker", "proj_a", "proj_v"}
    for precision in ("float64", "float32"):
        names = {row.name for row in result.rows if row.precision == precision}
        taps = {name.removeprefix("tap ") for name in names if name.startswith("tap ")}
        assert names - {f"tap {name}" for name in taps} == {"logits", "loss"} | {f"gradient {name}" for name in trained}
        assert {"thinker.blocks.0", "vision_encoder.blocks.0", "proj_a", "proj_v", "thinker.norm"} <= taps
    after = {row.name for row in result.rows if row.precision == "exact"}
    assert after == {f"{'trained' if name in trained else 'frozen'} {name}, after a step" for name in problem.weights}


def test_the_rows_have_every_mix() -> None:
    assert set(zip(omni.HAS_IMAGE.tolist(), omni.HAS_AUDIO.tolist())) == {(a, b) for a in (0, 1) for b in (0, 1)}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_seeds_agree(seed) -> None:
    found = omni.run(Scope(seed=seed, controls=False), lambda *_: None)
    assert {row.verdict for row in found.rows} == {Verdict.AGREE}


@pytest.mark.long
def test_the_full_run_trains_the_encoders_too_in_every_precision() -> None:
    found = omni.run(Scope(full=True), lambda *_: None)
    assert found.exit_code == 0
    rows = {(row.config, row.precision, row.name): row.verdict for row in found.rows}
    for precision in omni.PRECISIONS:
        for config in omni.CONFIGS:
            assert rows[config, precision, "row alone"] is rows[config, precision, "called"] is Verdict.AGREE
        trained = ("omni, all trained", precision, "gradient vision_encoder.pos") in rows
        assert trained is (precision != "bfloat16")


# --- bugs in the twins -----------------------------------------------------------------------------------------------


def test_a_picture_that_rows_without_one_see_is_seen(monkeypatch) -> None:
    right: Any = omni_torch.fusion.OmniLM._encode

    def encode(self, *given):
        made = right(self, *given)
        return made | {"image_mask": None} if "image_mask" in made else made

    monkeypatch.setattr(omni_torch.fusion.OmniLM, "_encode", encode)
    found = verdicts()
    assert found["logits"] is found["loss"] is Verdict.DIFFER


def test_a_projector_without_its_bias_is_seen(monkeypatch) -> None:
    right = torch.nn.Linear.forward

    def forward(self, x):
        out = right(self, x)
        return out - self.bias if self.in_features == 8 and self.out_features == 16 else out

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    found = verdicts()
    assert found["logits"] is Verdict.DIFFER
    assert found["gradient proj_v.bias"] is Verdict.DIFFER


def test_targets_that_are_one_place_off_are_seen_in_the_loss_alone(monkeypatch) -> None:
    right = omni_torch.fusion.cross_entropy
    monkeypatch.setattr(omni_torch.fusion, "cross_entropy", lambda logits, targets: right(logits, targets.roll(1, 1)))
    found = verdicts()
    assert found["logits"] is Verdict.AGREE
    assert found["loss"] is Verdict.DIFFER
    assert {v for k, v in found.items() if k.startswith("gradient")} == {Verdict.DIFFER}


def test_a_jax_sequence_in_another_order_is_seen(monkeypatch) -> None:
    right = omni_jax.fusion._join

    def join(parts, masks, targets):
        turned = {name: parts[name] for name in ("audio", "image", "text") if name in parts}
        return right(turned, {name: masks[name] for name in turned}, targets)

    monkeypatch.setattr(omni_jax.fusion, "_join", join)
    assert verdicts()["logits"] is Verdict.DIFFER


@pytest.mark.parametrize("side", ["jax", "torch"])
def test_a_frozen_tensor_that_moves_is_seen(monkeypatch, side) -> None:
    twin = {"jax": omni_jax.fusion, "torch": omni_torch.fusion}[side]
    right = twin.split_frozen
    (problem,) = omni.problems(Scope())
    gradients = {k: np.ones_like(v) for k, v in problem.weights.items() if not k.startswith(omni.FROZEN)}
    clean = omni.step_rows(problem, omni.steps(problem, gradients))
    assert {row.verdict for row in clean} == {Verdict.AGREE}
    monkeypatch.setattr(twin, "split_frozen", lambda params, frozen: right(params, ["vision_encoder"]))
    moved = [row for row in omni.step_rows(problem, omni.steps(problem, gradients)) if row.verdict is Verdict.DIFFER]
    assert moved
    assert all(row.name.startswith("frozen audio_encoder") and side in row.evidence for row in moved)


def test_a_trained_tensor_that_does_not_move_is_seen(monkeypatch) -> None:
    right = omni_torch.fusion.split_frozen
    (problem,) = omni.problems(Scope())
    gradients = {k: np.ones_like(v) for k, v in problem.weights.items() if not k.startswith(omni.FROZEN)}
    monkeypatch.setattr(omni_torch.fusion, "split_frozen", lambda p, frozen: right(p, [*frozen, "proj_a"]))
    moved = [row for row in omni.step_rows(problem, omni.steps(problem, gradients)) if row.verdict is Verdict.DIFFER]
    assert [row.name for row in moved] == ["trained proj_a.weight, after a step", "trained proj_a.bias, after a step"]


def test_a_step_of_the_optimizer_is_what_moves_them(monkeypatch) -> None:
    (problem,) = omni.problems(Scope())
    gradients = {k: np.ones_like(v) for k, v in problem.weights.items() if not k.startswith(omni.FROZEN)}
    monkeypatch.setattr(omni_torch.optim.AdamW, "step", lambda self: None)
    rows = omni.step_rows(problem, omni.steps(problem, gradients))
    assert {row.evidence for row in rows if row.name.startswith("trained")} == {"torch: not moved"}
    assert {row.verdict for row in rows if row.name.startswith("frozen")} == {Verdict.AGREE}


def test_the_first_part_that_differs_is_named(monkeypatch) -> None:
    """By the path of the torch module, which of the models' blocks it is too."""
    right = omni_torch.vision_encoder._Block.forward
    monkeypatch.setattr(omni_torch.vision_encoder._Block, "forward", lambda self, x: right(self, x) * 1.01)
    scope = Scope(precisions=("float64",))
    ((_, case),) = judged(omni.problems(scope), scope, omni.PRECISIONS, lambda *_: None)
    assert case.main.parted == "vision_encoder.blocks.0"
