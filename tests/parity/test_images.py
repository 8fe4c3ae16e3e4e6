"""Both twins read the same pixels, which are Pillow's, cut the same patches, and see the same in them."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image, ImageOps

import omni_jax
import omni_torch

DRAWS = 60
GOLDEN_RELATIVE = 1e-12
KINDS = {
    "png": ("RGB", "L", "1", "P", "RGBA", "LA", "I;16"),
    "jpg": ("RGB", "L", "CMYK"),
    "tif": ("RGB", "L", "CMYK", "RGBA", "I;16"),
    "webp": ("RGB", "RGBA"),
    "gif": ("P", "L"),
    "bmp": ("RGB", "L", "1"),
    "ppm": ("RGB", "L", "1"),
}
EXIF = ("png", "jpg", "tif", "webp")


def picture(rng: np.random.Generator, mode: str, height: int, width: int) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    bands = 4 if mode in ("RGBA", "CMYK") else 2 if mode == "LA" else 3
    pixels = [Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)) for _ in range(bands)]
    if bands == 3:
        return Image.merge("RGB", pixels).convert(mode)
    return Image.merge(mode, pixels)


def by_pillow(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    """The rules once more, by Pillow's own operations alone: levels (H, W, 3)."""
    with path.open("rb") as stream, Image.open(stream) as image:  # by its path, Pillow garbles a turned grey TIFF
        upright = ImageOps.exif_transpose(image)
    if upright.mode == "I;16":
        upright = Image.fromarray((np.array(upright) // 256).astype(np.uint8))
    if "A" in upright.mode:
        below = Image.new("RGBA", upright.size, (255, 255, 255, 255))
        below.alpha_composite(upright.convert("RGBA"))
        upright = below
    upright = upright.convert("RGB")
    return np.array(upright if size is None else upright.resize(size[::-1], Image.Resampling.BILINEAR))


def drawn() -> list[tuple[int, str, str]]:
    every = [(kind, mode) for kind, modes in KINDS.items() for mode in modes]
    return [(i, *every[i % len(every)]) for i in range(DRAWS)]


@pytest.mark.parametrize(("seed", "kind", "mode"), drawn())
def test_pixels_are_pillows_and_equal_bit_by_bit(tmp_path, seed, kind, mode) -> None:
    rng = np.random.default_rng(seed)
    height, width, *size = (int(n) for n in rng.integers(1, 50, 4))
    size = tuple(size) if seed % 3 else None
    settings = {}
    if kind in EXIF:
        settings["exif"] = Image.Exif()
        settings["exif"][274] = int(rng.integers(1, 9))
    path = tmp_path / f"a.{kind}"
    picture(rng, mode, height, width).save(path, **settings)
    ours = [np.asarray(twin.load_image(path, size)) for twin in (omni_torch, omni_jax)]
    assert ours[0].dtype == ours[1].dtype == np.float32
    assert ours[0].tobytes() == ours[1].tobytes()
    assert ours[0].shape == ours[1].shape
    levels = by_pillow(path, size)
    assert np.array_equal(ours[0], levels.transpose(2, 0, 1).astype(np.float32) / np.float32(255))
    given = levels.transpose(2, 0, 1).copy()
    resized = omni_torch.resize(torch.from_numpy(given), (9, 4)), omni_jax.resize(given, (9, 4))
    assert np.array_equal(resized[0].numpy(), resized[1])


def test_the_comparison_sees_a_tensor_librarys_resize(tmp_path) -> None:
    """The negative control: without widening the filter, a shrunk photo of noise is far off."""
    rng = np.random.default_rng(0)
    picture(rng, "RGB", 40, 40).save(tmp_path / "a.png")
    whole = omni_torch.load_image(tmp_path / "a.png", None)
    naive = torch.nn.functional.interpolate(whole[None], size=(7, 7), mode="bilinear", align_corners=False)[0]
    levels_off = (naive - omni_torch.load_image(tmp_path / "a.png", 7)).abs().max() * 255
    assert levels_off > 50


@pytest.mark.parametrize(("height", "width", "patch"), [(32, 32, 8), (6, 15, 3), (5, 5, 1), (16, 48, 16)])
def test_patches_are_equal_bit_by_bit(height, width, patch) -> None:
    images = np.random.default_rng(0).random((2, 3, height, width), np.float32)
    in_torch = omni_torch.patchify(torch.from_numpy(images), patch)
    in_jax = omni_jax.patchify(jnp.asarray(images), patch)
    assert np.array_equal(in_torch.numpy(), in_jax)
    assert np.array_equal(omni_torch.unpatchify(in_torch, patch, height, width).numpy(), images)
    assert np.array_equal(omni_jax.unpatchify(in_jax, patch, height, width), images)


def test_positions_are_resized_by_the_same_weights_bit_by_bit() -> None:
    """A third power by each framework's own function would differ in the last bit for most grids."""
    for old in range(1, 30):
        for new in range(1, 30):
            assert np.array_equal(omni_jax.vision._cubic(old, new), omni_torch.vision._cubic(old, new).numpy())


def test_refusals_say_the_same(tmp_path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no pixels")
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.bmp")
    (tmp_path / "part.bmp").write_bytes((tmp_path / "whole.bmp").read_bytes()[:500])
    images = np.zeros((1, 3, 30, 32), np.float32)
    calls = [
        lambda twin, _, name=name: twin.load_image(tmp_path / name) for name in ("empty.png", "text.png", "part.bmp")
    ]
    calls += [
        lambda twin, _: twin.load_image(tmp_path / "whole.bmp", 0),
        lambda twin, array: twin.resize(array(images[0]), 4),
        lambda twin, array: twin.patchify(array(images), 16),
        lambda twin, array: twin.unpatchify(array(images[0]), 2, 4, 4),
        lambda twin, array: twin.resize_positions(array(images[0]), (2, 2), (3, 3)),
    ]
    for call in calls:
        said = []
        for twin, array in ((omni_torch, torch.from_numpy), (omni_jax, jnp.asarray)):
            with pytest.raises(ValueError) as caught:
                call(twin, array)
            said.append(str(caught.value))
        assert said[0] == said[1]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40), (8, 8)])
def test_encoders_agree_in_float64_and_exchange_files(tmp_path, height, width) -> None:
    """One set of random weights, through a file of each twin; a picture side is not the positions' side."""
    settings = {"img_size": 32, "patch": 8, "d": 24, "layers": 2, "heads": 3, "ff": 40}
    rng = np.random.default_rng(0)
    in_torch = omni_torch.ViTTiny(**settings).double().eval()
    with torch.no_grad():
        for parameter in in_torch.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(size=parameter.shape) * 0.3))
    torch.save({"vit": in_torch.state_dict()}, tmp_path / "vit.pt")
    found = omni_jax.load_checkpoint(tmp_path / "vit.pt")
    assert found.kind == "vision"
    images = rng.random((2, 3, height, width))
    with jax.enable_x64(True):
        in_jax = nnx.eval_shape(lambda: omni_jax.ViTTiny(**settings, rngs=nnx.Rngs(0), param_dtype=jnp.float64))
        in_jax.eval()
        omni_jax.load_weights(in_jax, found.parts["vit"])
        omni_jax.save_checkpoint(tmp_path / "back.pt", model={}, parts={"vit": omni_jax.export_weights(in_jax)})
        outputs = jax.jit(lambda model, x: model(x))(in_jax, jnp.asarray(images))
    back = omni_torch.load_checkpoint(tmp_path / "back.pt").parts["vit"]
    assert list(back) == [key for key in back if torch.equal(back[key], in_torch.state_dict()[key])]
    assert set(back) == set(in_torch.state_dict())
    for ours, theirs in zip(in_torch(torch.from_numpy(images)), outputs, strict=True):
        ours, theirs = ours.detach().numpy(), np.asarray(theirs)
        assert ours.dtype == theirs.dtype == np.float64
        assert np.abs(ours - theirs).max() <= GOLDEN_RELATIVE * np.abs(ours).max()
