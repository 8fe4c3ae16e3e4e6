"""The checks audio-encoder and vision-encoder: they pass the twins, reject their controls, and see bugs in a twin."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import omni_jax.audio_encoder  # noqa: E402
import omni_jax.vision_encoder  # noqa: E402
import omni_torch.audio_encoder  # noqa: E402
import omni_torch.vision_encoder  # noqa: E402
from parity.checks import Scope, audio_encoder, vision_encoder  # noqa: E402
from parity.checks._encoders import judged, wanted  # noqa: E402
from parity.result import CheckResult  # noqa: E402
from parity.verdict import Verdict  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
CHECKS: dict[str, ModuleType] = {"audio-encoder": audio_encoder, "vision-encoder": vision_encoder}


@pytest.fixture(scope="module")
def results(one_thread) -> dict[str, CheckResult]:
    return {name: check.run(Scope(), lambda *_: None) for name, check in CHECKS.items()}


def verdicts(check: ModuleType, precision: str = "float64") -> dict[str, Verdict]:
    scope = Scope(precisions=(precision,))
    ((_, case),) = judged(check.problems(scope), scope, check.PRECISIONS, lambda *_: None)
    return case.main.verdicts


# --- the checks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKS)
def test_the_run_agrees(results, name) -> None:
    assert results[name].error is None
    assert [row for row in results[name].rows if row.verdict is not Verdict.AGREE] == []
    assert results[name].exit_code == 0


@pytest.mark.parametrize(("name", "control"), [(name, c) for name, check in CHECKS.items() for c in check.CONTROLS])
def test_the_control_is_rejected(results, name, control) -> None:
    (found,) = [c for c in results[name].controls if c.name == control]
    assert found.rejected, found.evidence


@pytest.mark.parametrize("name", CHECKS)
def test_every_control_is_declared(results, name) -> None:
    assert {c.name for c in results[name].controls} == set(CHECKS[name].CONTROLS)


@pytest.mark.parametrize("name", CHECKS)
def test_every_tensor_has_a_gradient_row(results, name) -> None:
    (problem,) = CHECKS[name].problems(Scope())
    for precision in ("float64", "float32"):
        rows = {row.name: row for row in results[name].rows if row.precision == precision}
        for key, value in problem.weights.items():
            assert rows[f"gradient {key}"].shape == value.shape


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_seeds_agree(name, seed) -> None:
    found = CHECKS[name].run(Scope(seed=seed, controls=False), lambda *_: None)
    assert {row.verdict for row in found.rows} == {Verdict.AGREE}


@pytest.mark.long
@pytest.mark.parametrize("name", CHECKS)
def test_the_full_run_agrees_compiled_in_every_precision(name) -> None:
    found = CHECKS[name].run(Scope(full=True), lambda *_: None)
    assert found.exit_code == 0
    assert {row.config for row in found.rows} == set(CHECKS[name].CONFIGS)
    assert {row.regime for row in found.rows} == {"fresh", "randomised"}
    assert {row.precision for row in found.rows} == set(CHECKS[name].PRECISIONS)


def test_precisions_that_are_wanted() -> None:
    known, usual = ("float64", "float32", "bfloat16"), ("float64",)
    assert wanted(Scope(), known, usual) == ["float64"]
    assert wanted(Scope(full=True), known, usual) == list(known)
    assert wanted(Scope(precisions=("bfloat16",)), known, usual) == ["bfloat16"]
    assert wanted(Scope(precisions=("float16",)), known, usual) == []


def test_a_clip_alone_is_judged_by_the_batch(results) -> None:
    rows = [row for row in results["audio-encoder"].rows if row.name == "alone"]
    assert {row.verdict for row in rows} == {Verdict.AGREE}
    assert len(rows) == 2


# --- bugs in the twins -----------------------------------------------------------------------------------------------


def test_a_torch_mask_that_forgets_the_lengths_is_seen(monkeypatch) -> None:
    right = omni_torch.audio_encoder._attend_fused
    monkeypatch.setattr(omni_torch.audio_encoder, "_attend_fused", lambda q, k, v, mask: right(q, k, v, None))
    found = verdicts(audio_encoder)
    assert found["frames"] is found["logits"] is Verdict.DIFFER
    assert found["alone"] is found["lengths"] is Verdict.AGREE


def test_a_jax_cut_that_leaves_what_is_behind_is_seen(monkeypatch) -> None:
    monkeypatch.setattr(omni_jax.audio_encoder, "_cut", lambda x, lengths: x)
    found = verdicts(audio_encoder)
    assert found["frames"] is Verdict.DIFFER
    assert found["alone"] is Verdict.DIFFER, "the batch is no longer what a clip is alone"


def test_lengths_that_are_rounded_down_are_seen(monkeypatch) -> None:
    right = omni_torch.audio_encoder.AudioEncoderTiny.forward

    def forward(self, mel, lengths=None):
        out = right(self, mel, lengths)
        return out if lengths is None else (out[0], lengths // self.downsample_factor)

    monkeypatch.setattr(omni_torch.audio_encoder.AudioEncoderTiny, "forward", forward)
    assert verdicts(audio_encoder)["lengths"] is Verdict.DIFFER


def test_jaxs_own_gelu_is_seen(monkeypatch) -> None:
    monkeypatch.setattr(omni_jax.audio_encoder, "_gelu", jax.nn.gelu)
    assert verdicts(audio_encoder)["frames"] is Verdict.DIFFER
    assert verdicts(audio_encoder, "float32")["frames"] is Verdict.DIFFER


def test_channels_inside_are_seen(monkeypatch) -> None:
    """What a channel-last framework does by itself."""
    right = jnp.swapaxes
    monkeypatch.setattr(
        omni_jax.audio_encoder.jnp, "swapaxes", lambda x, a, b: x if (a, b) == (2, 3) else right(x, a, b)
    )
    assert verdicts(audio_encoder)["frames"] is Verdict.DIFFER


def outputs(found: dict[str, Verdict]) -> dict[str, Verdict]:
    return {name: verdict for name, verdict in found.items() if ":" in name}


def test_flaxs_own_eps_is_seen(monkeypatch) -> None:
    right: Any = omni_jax.vision_encoder._LayerNorm.__init__

    def init(self, *given, **named):
        right(self, *given, **named)
        self.epsilon = 1e-6

    monkeypatch.setattr(omni_jax.vision_encoder._LayerNorm, "__init__", init)
    assert set(outputs(verdicts(vision_encoder)).values()) == {Verdict.DIFFER}


def test_the_first_tap_that_parts_is_named(monkeypatch) -> None:
    right = omni_torch.vision_encoder._attend_fused
    monkeypatch.setattr(omni_torch.vision_encoder, "_attend_fused", lambda q, k, v, mask: right(q, k, v.flip(1), mask))
    scope = Scope(precisions=("float64",))
    ((_, case),) = judged(vision_encoder.problems(scope), scope, vision_encoder.PRECISIONS, lambda *_: None)
    assert case.main.parted == "blocks.0.self_attn"


def test_positions_of_another_picture_alone_part_there(monkeypatch) -> None:
    right = omni_torch.vision_encoder.resize_positions

    def resize(pos, grid, new_grid):
        table = right(pos, grid, new_grid)
        return table if grid == new_grid else table.flip(1)

    monkeypatch.setattr(omni_torch.vision_encoder, "resize_positions", resize)
    found = outputs(verdicts(vision_encoder))
    assert found["12x12:grid"] is Verdict.AGREE
    assert found["8x20:grid"] is Verdict.DIFFER


def test_a_gradient_that_does_not_flow_into_positions_is_seen(monkeypatch) -> None:
    right = omni_torch.vision_encoder.resize_positions
    monkeypatch.setattr(omni_torch.vision_encoder, "resize_positions", lambda pos, *grids: right(pos, *grids).detach())
    found = verdicts(vision_encoder)
    assert set(outputs(found).values()) == {Verdict.AGREE}
    assert found["gradient pos"] is Verdict.DIFFER


def test_a_fast_variance_is_seen_where_the_mean_is_large(monkeypatch) -> None:
    """E[x²] − E[x]²: the same function in float64; in float32 it loses bits."""

    def norm(self, x):
        wide = x.double() if x.dtype == torch.float64 else x.float()
        mean = wide.mean(-1, keepdim=True)
        spread = (wide.square().mean(-1, keepdim=True) - mean.square() + self.eps).rsqrt()
        return (wide - mean) * spread * self.weight + self.bias

    scope = Scope(precisions=("float32",))
    (problem,) = vision_encoder.problems(scope)
    problem.weights["pos"][:] += np.float32(300.0)
    monkeypatch.setattr(torch.nn.LayerNorm, "forward", norm)
    ((_, case),) = judged([problem], scope, vision_encoder.PRECISIONS, lambda *_: None)
    assert set(outputs(case.main.verdicts).values()) <= {Verdict.DIFFER, Verdict.UNSTABLE}
