"""The image check: it passes the twins, rejects its controls, and sees bugs in a twin."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
pytest.importorskip("PIL")

import omni_jax.vision  # noqa: E402
import omni_torch.image_file  # noqa: E402
import omni_torch.vision  # noqa: E402
from parity.checks import Scope, image  # noqa: E402
from parity.result import CheckResult  # noqa: E402
from parity.verdict import Verdict  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def result(one_thread) -> CheckResult:
    return image.run(Scope(), lambda *_: None)


def differing(**scope) -> set[str]:
    found = image.run(Scope(**scope, controls=False), lambda *_: None)
    return {row.name for row in found.rows if row.verdict is not Verdict.AGREE}


def test_the_run_agrees(result) -> None:
    assert result.error is None
    assert [row for row in result.rows if row.verdict is not Verdict.AGREE] == []
    assert result.exit_code == 0


@pytest.mark.parametrize("control", image.CONTROLS)
def test_the_control_is_rejected(result, control) -> None:
    (found,) = [c for c in result.controls if c.name == control]
    assert found.rejected, found.evidence


def test_every_control_is_declared(result) -> None:
    assert {c.name for c in result.controls} == set(image.CONTROLS)


def test_every_kind_is_read_as_it_is_and_resized(result) -> None:
    shapes = {row.name: row.shape for row in result.rows}
    for name in image.KINDS:
        assert shapes[name] == ((3, 9, 13) if name == "turned.jpg" else (3, 13, 9))
        assert shapes[f"{name}, resized"] == (3, *image.SIZE)


def test_pictures_are_not_all_alike(tmp_path) -> None:
    truth = [image.by_pillow(path, image.SIZE) for path in image.pictures(tmp_path, 0)]
    assert len({x.tobytes() for x in truth}) == len(truth)


def test_bits_are_compared() -> None:
    zero = np.zeros((2, 1), np.float32)
    assert image.fault(zero, zero) == ""
    assert image.fault(-zero, zero) == "2 of 2 values differ, the first at [0, 0]"
    assert image.fault(zero * np.nan, zero * np.nan) == ""
    assert image.fault(np.ones(2, bool), np.ones(2, bool)) == ""
    assert image.fault(zero.astype(np.float64), zero) == "float64 (2, 1) for float32 (2, 1)"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_seeds_agree(seed) -> None:
    assert differing(seed=seed) == set()


@pytest.mark.long
def test_the_full_run_compiles() -> None:
    assert image.run(Scope(full=True), lambda *_: None).exit_code == 0


# --- bugs in the twins -----------------------------------------------------------------------------------------------


def test_a_patch_that_is_cut_colour_by_colour_is_seen(monkeypatch) -> None:
    def patchify(images, patch):
        B, _, H, W = images.shape
        split = images.reshape(B, 3, H // patch, patch, W // patch, patch)
        return split.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, patch * patch * 3)

    monkeypatch.setattr(omni_torch.vision, "patchify", patchify)
    assert {name for name in differing() if name.startswith("patchify")} == {
        f"patchify {shape}" for shape in image.PATCHES
    }


def test_a_rounded_patch_is_seen(monkeypatch) -> None:
    right = omni_jax.vision.patchify
    last = np.float32(1 + 2**-23)
    monkeypatch.setattr(omni_jax.vision, "patchify", lambda x, patch: right(x, patch) * last)
    assert any(name.startswith("patchify") for name in differing())


def test_a_reader_that_forgets_transparency_is_seen(monkeypatch) -> None:
    monkeypatch.setattr(omni_torch.image_file, "_is_transparent", lambda picture: False)
    assert {name.partition(",")[0] for name in differing()} == {"alpha.png", "palette.png", "grey with alpha.png"}


def test_a_resize_that_is_not_pillows_is_seen(monkeypatch) -> None:
    def resize(pixels, size):
        return (255 * image._by_tensors(pixels, size)).round().astype(np.uint8).transpose(1, 2, 0)

    monkeypatch.setattr(omni_torch.image_file, "resize_pixels", resize)
    assert {name for name in differing() if "resized" in name} == {f"{name}, resized" for name in image.KINDS}


@pytest.mark.parametrize("twin", [omni_jax.vision, omni_torch.vision])
def test_another_cubic_is_seen(monkeypatch, twin) -> None:
    """Keys' a = −0.5, which most image libraries take."""
    monkeypatch.setattr(twin, "_CUBIC", -0.5)
    found = differing(precisions=("float64",))
    assert {"3x2->5x4", "3x2->2x7", "gradient pos"} <= found


def test_a_cubic_that_both_have_wrong_is_seen_by_torchs_own(monkeypatch) -> None:
    for twin in (omni_jax.vision, omni_torch.vision):
        monkeypatch.setattr(twin, "_CUBIC", -0.5)
    found = differing(precisions=("float64",))
    # One patch of all is their middle, whatever a is.
    assert found == {"torch's interpolate: 3x2->5x4", "torch's interpolate: 3x2->2x7"}


# --- your own picture ------------------------------------------------------------------------------------------------


def test_a_picture_of_the_users_is_read(tmp_path) -> None:
    path = image.pictures(tmp_path, 5)[1]
    found = image.run(Scope(image=str(path), controls=False), lambda *_: None)
    assert sum(row.name.startswith("alpha.png") for row in found.rows) == 4
    assert found.exit_code == 0
