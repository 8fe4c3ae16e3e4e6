"""Picture files of every kind as tensors, refusals, patches, and positions for other sizes."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from omni_torch.vision import load_image, patchify, resize, resize_positions, unpatchify

COLOURS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[10, 20, 30], [0, 0, 0], [255, 255, 255]]], np.uint8)
WHITE = [255, 255, 255]


def levels(path, size=None) -> np.ndarray:
    """What load_image gives, as levels (H, W, 3); each must be exactly a level divided by 255."""
    image = load_image(path, size)
    assert image.dtype == torch.float32
    image = image.numpy()
    found = np.rint(image * 255).astype(np.uint8)
    assert np.array_equal(image, found.astype(np.float32) / np.float32(255))
    return found.transpose(1, 2, 0)


def png(width: int, height: int, depth: int, kind: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file with a header that claims what it is told to."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    inside = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*item) for item in inside)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.ppm", "a.webp", "a.gif"])
def test_lossless_kinds_give_back_what_was_saved(tmp_path, name) -> None:
    Image.fromarray(COLOURS).save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
    assert np.array_equal(levels(tmp_path / name), COLOURS)
    assert np.array_equal(levels(str(tmp_path / name)), COLOURS)


def test_a_picture_that_pillow_has_opened(tmp_path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(levels(image), COLOURS)
    assert np.array_equal(levels(Image.fromarray(COLOURS)), COLOURS)


def test_jpeg_is_what_pillow_decodes(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (33, 17, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=60)
    with Image.open(tmp_path / "a.jpg") as image:
        assert np.array_equal(levels(tmp_path / "a.jpg"), np.array(image))


def test_grey_palette_and_bits(tmp_path) -> None:
    grey = np.array([[0, 7, 255]], np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(levels(tmp_path / "grey.png"), np.repeat(grey[:, :, None], 3, axis=2))
    Image.fromarray(grey > 100).save(tmp_path / "bits.png")
    assert levels(tmp_path / "bits.png")[0].tolist() == [[0, 0, 0], [0, 0, 0], WHITE]
    palette = Image.new("P", (3, 1))
    palette.putdata([2, 0, 1])
    palette.putpalette([1, 2, 3, 40, 50, 60, 7, 8, 9])
    palette.save(tmp_path / "palette.png")
    assert levels(tmp_path / "palette.png")[0].tolist() == [[7, 8, 9], [1, 2, 3], [40, 50, 60]]


def test_transparency_lies_over_white(tmp_path) -> None:
    rgba = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    # 51 is a fifth: 255 + (200 − 255) / 5, ...
    assert levels(tmp_path / "rgba.png")[0].tolist() == [[200, 100, 0], WHITE, [244, 224, 204]]
    grey_alpha = Image.merge("LA", [Image.fromarray(rgba[:, :, i]) for i in (0, 3)])
    grey_alpha.save(tmp_path / "la.png")
    assert levels(tmp_path / "la.png")[0].tolist() == [[200] * 3, WHITE, [244] * 3]
    palette = Image.new("P", (2, 1))
    palette.putdata([0, 1])
    palette.putpalette([1, 2, 3, 40, 50, 60])
    palette.save(tmp_path / "one.png", transparency=1)
    palette.save(tmp_path / "one.gif", transparency=1)
    palette.save(tmp_path / "each.png", transparency=bytes([255, 0]))
    for name in ("one.png", "one.gif", "each.png"):
        assert levels(tmp_path / name)[0].tolist() == [[1, 2, 3], WHITE], name
    Image.fromarray(COLOURS).save(tmp_path / "rgb.png", transparency=(0, 255, 0))
    assert levels(tmp_path / "rgb.png")[0].tolist() == [[255, 0, 0], WHITE, [0, 0, 255]]


def test_sixteen_bits_keep_the_high_byte(tmp_path) -> None:
    grey = np.array([[0, 255, 256, 0x1234, 65535]], np.uint16)
    expected = [[v >> 8] * 3 for v in grey[0].tolist()]
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(grey).save(tmp_path / name)
        assert levels(tmp_path / name)[0].tolist() == expected
    assert levels(write(tmp_path / "grey.pgm", b"P5 5 1 65535 " + grey.astype(">u2").tobytes()))[0].tolist() == expected
    colours = np.array([0x1234, 0x00FF, 0xFFFF], ">u2").tobytes()
    assert levels(write(tmp_path / "rgb.png", png(1, 1, 16, 2, b"\0" + colours))).tolist() == [[[0x12, 0, 0xFF]]]
    keyed = png(5, 1, 16, 0, b"\0" + grey.astype(">u2").tobytes(), (b"tRNS", struct.pack(">H", 0x1234)))
    assert levels(write(tmp_path / "keyed.png", keyed))[0].tolist() == [*expected[:3], WHITE, expected[4]]


def test_cmyk_by_pillows_formula(tmp_path) -> None:
    for name in ("a.tif", "a.jpg"):
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            assert image.mode == "CMYK"
            assert np.array_equal(levels(tmp_path / name), np.array(image.convert("RGB")))
        assert np.abs(levels(tmp_path / name)[0, 0].astype(int) - [255, 0, 0]).max() <= (3 if name == "a.jpg" else 0)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "I;16"])
def test_exif_turns_the_picture_upright(tmp_path, mode) -> None:
    """Each orientation, by what must be done to the stored rows to see the picture upright (EXIF 2.3, tag 274)."""
    stored = np.arange(0, 60, 10, dtype=np.uint8).reshape(2, 3)
    image = Image.fromarray(stored.astype(np.uint16) << 8) if mode == "I;16" else Image.fromarray(stored).convert(mode)
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.T,
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].T,
        8: np.rot90(stored),
    }
    for orientation, expected in upright.items():
        exif = Image.Exif()
        exif[274] = orientation
        for name in ("a.png", "a.tif"):
            image.save(tmp_path / name, exif=exif)
            assert np.array_equal(levels(tmp_path / name)[:, :, 1], expected), (orientation, name)


@pytest.mark.parametrize("size", [7, (5, 40), (64, 3), 48])
def test_resize_is_pillows_bilinear(tmp_path, size) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (24, 31, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    height, width = (size, size) if isinstance(size, int) else size
    expected = np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    assert np.array_equal(levels(tmp_path / "a.png", size), expected)
    resized = resize(torch.from_numpy(pixels.transpose(2, 0, 1).copy()), size)
    assert resized.dtype == torch.uint8
    assert np.array_equal(resized.numpy().transpose(1, 2, 0), expected)


def test_one_pixel_and_the_default_size(tmp_path) -> None:
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").shape == (3, 224, 224)
    assert np.array_equal(np.unique(levels(tmp_path / "a.png", 224).reshape(-1, 3), axis=0), [[9, 8, 7]])
    assert levels(tmp_path / "a.png").tolist() == [[[9, 8, 7]]]


def test_files_that_are_no_pictures_are_refused(tmp_path) -> None:
    refused = {
        "is empty": b"",
        "not a picture": b"a text, not pixels",
        "PNG, JPEG": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",  # Pillow would start Ghostscript
        "web page": b"<!DOCTYPE html><p>404",
    }
    for words, data in refused.items():
        with pytest.raises(ValueError, match=words):
            load_image(write(tmp_path / "a.png", data))
    with pytest.raises(ValueError, match="does not exist"):
        load_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="is a folder"):
        load_image(tmp_path)
    with pytest.raises(ValueError, match="for an array of pixels use resize"):
        load_image(COLOURS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, kind) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "whole", kind)
    whole = (tmp_path / "whole").read_bytes()
    for length in (1, 7, 40, len(whole) // 2, len(whole) - 40):
        with pytest.raises(ValueError, match=r"cut off|not a picture"):
            load_image(write(tmp_path / "part", whole[:length]))


def test_an_animation_gives_its_first_picture(tmp_path) -> None:
    first, second = (Image.new("RGB", (3, 2), colour) for colour in ((9, 8, 7), (200, 0, 0)))
    for name in ("a.gif", "a.png", "a.webp", "a.tif"):
        lossless = {"lossless": True} if name == "a.webp" else {}
        first.save(tmp_path / name, save_all=True, append_images=[second], **lossless)
        assert np.array_equal(np.unique(levels(tmp_path / name).reshape(-1, 3), axis=0), [[9, 8, 7]]), name


def test_text_beside_the_pixels_does_no_harm(tmp_path) -> None:
    """Garbage where EXIF should be; a comment that unpacks to megabytes, which Pillow refuses."""
    Image.fromarray(COLOURS).save(tmp_path / "a.jpg", exif=b"Exif\0\0garbage")
    assert levels(tmp_path / "a.jpg").shape == COLOURS.shape
    bomb = (b"zTXt", b"k\0\0" + zlib.compress(bytes(2**21)))
    with pytest.raises(ValueError, match="is damaged or cut off"):
        load_image(write(tmp_path / "a.png", png(1, 1, 8, 2, bytes(4), bomb)))


def test_names_do_not_matter_and_other_files_are_refused(tmp_path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    assert np.array_equal(levels(write(tmp_path / "a.wav", (tmp_path / "a.png").read_bytes())), COLOURS)
    with pytest.raises(ValueError, match="is not a picture that can be read"):
        load_image(write(tmp_path / "b.png", b"RIFF\0\0\0\0WAVEfmt " + bytes(100)))
    for path in (None, 3, b"a.png", "a\0b"):
        with pytest.raises(ValueError, match=r"must be a path|not a valid path"):
            load_image(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(9460, 9460), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path, size) -> None:
    path = write(tmp_path / "bomb.png", png(*size, 8, 2, bytes(100)))
    with pytest.raises(ValueError, match="pixels: allowed are up to 89478485"):
        load_image(path)


def test_samples_without_a_known_range_are_refused(tmp_path) -> None:
    for dtype in (np.float32, np.int32):
        Image.fromarray(np.ones((2, 2), dtype)).save(tmp_path / "a.tif")
        with pytest.raises(ValueError, match=r"mode '[FI]': allowed are 8 and 16 bits"):
            load_image(tmp_path / "a.tif")


def test_sizes_may_be_numpys_and_lists_are_told_apart() -> None:
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    assert resize(image, np.int64(4)).shape == (3, 4, 4)
    assert resize(image, (np.int32(4), 5)).shape == (3, 4, 5)
    with pytest.raises(
        ValueError, match=r"size = \[4, 5\] cannot be: .* or a tuple \(height, width\), .*; give \(4, 5\)"
    ):
        resize(image, [4, 5])


def test_colours_that_come_last_are_named() -> None:
    with pytest.raises(ValueError, match=r"image has shape \(5, 4, 3\) .*pass image.permute\(2, 0, 1\)"):
        resize(torch.zeros(5, 4, 3, dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match=r"the colours are last: pass images.permute\(0, 3, 1, 2\)"):
        patchify(torch.zeros((1, 4, 4, 3)), 2)


@pytest.mark.parametrize("size", [0, -1, True, 2.5, "a", (3,), (3, 4, 5), (2, 0), 10**6, np.int64(0), (3, True)])
def test_sizes_that_cannot_be_are_refused(tmp_path, size) -> None:
    with pytest.raises(ValueError, match=r"size = .* cannot be"):
        load_image(tmp_path / "not even looked for", size)
    with pytest.raises(ValueError, match=r"size = .* cannot be"):
        resize(torch.zeros(3, 2, 2, dtype=torch.uint8), size)


def test_resize_wants_levels() -> None:
    with pytest.raises(ValueError, match="must be uint8"):
        resize(torch.zeros(3, 4, 4), 2)
    with pytest.raises(ValueError, match=r"shape \(3, H, W\)"):
        resize(torch.zeros(4, 4, 3, dtype=torch.uint8), 2)


def test_patches_go_row_by_row_and_back() -> None:
    images = torch.arange(2 * 3 * 6 * 4).reshape(2, 3, 6, 4)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    # The fourth patch: second row of patches, second column; pixels row by row, each with its three colours.
    assert torch.equal(patches[1, 3], images[1, :, 2:4, 2:4].permute(1, 2, 0).reshape(-1))
    assert torch.equal(unpatchify(patches, 2, 6, 4), images)
    assert patchify(torch.zeros(1, 3, 224, 224), 16).shape == (1, 196, 768)


def test_patches_by_convolution_are_patches_by_reshape() -> None:
    """Small integers, so that every sum is exact and the two must agree bit for bit."""
    rng = np.random.default_rng(3)
    images = torch.from_numpy(rng.integers(-8, 9, (2, 3, 6, 12)).astype(np.float32))
    weight = torch.from_numpy(rng.integers(-8, 9, (5, 3, 3, 3)).astype(np.float32))
    by_convolution = F.conv2d(images, weight, stride=3).flatten(2).transpose(1, 2)
    by_reshape = patchify(images, 3) @ weight.permute(2, 3, 1, 0).reshape(27, 5)
    assert torch.equal(by_convolution, by_reshape)


def test_patches_refuse_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"30 × 33 pixels do not divide .* of 16 × 16.*for example to 32 and 32"):
        patchify(torch.zeros(1, 3, 30, 33), 16)
    with pytest.raises(ValueError, match="to 16 and 16"):
        patchify(torch.zeros(1, 3, 1, 1), 16)
    with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\)"):
        patchify(torch.zeros(3, 32, 32), 16)
    with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\)"):
        patchify(torch.zeros(1, 32, 32, 3), 16)
    for patch in (0, -2, 2.0, True):
        with pytest.raises(ValueError, match="patch = "):
            patchify(torch.zeros(1, 3, 32, 32), patch)
    with pytest.raises(ValueError, match=r"2 × 1 patches of 4 × 4 .* are \(B, 2, 48\)"):
        unpatchify(torch.zeros(1, 2, 47), 4, 8, 4)


@pytest.mark.parametrize("new", [(2, 2), (3, 5), (7, 4), (16, 16), (1, 1)])
def test_positions_are_torchs_bicubic(new) -> None:
    """In float64, to rounding: a value is a sum of 16 products."""
    pos = torch.from_numpy(np.random.default_rng(4).normal(size=(1, 1 + 4 * 6, 8)))
    resized = resize_positions(pos, (4, 6), new)
    table = pos[:, 1:].reshape(1, 4, 6, 8).permute(0, 3, 1, 2)
    expected = F.interpolate(table, size=new, mode="bicubic", align_corners=False, antialias=False)
    expected = expected.permute(0, 2, 3, 1).reshape(1, -1, 8)
    assert resized.dtype == torch.float64
    assert torch.equal(resized[:, :1], pos[:, :1])
    bound = 64 * np.finfo(np.float64).eps * expected.abs().max()
    assert (resized[:, 1:] - expected).abs().max() <= bound


def test_the_same_grid_gives_the_same_table_and_gradients_flow() -> None:
    pos = torch.randn(1, 7, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert resize_positions(pos, (2, 3), (2, 3)) is pos
    resize_positions(pos, (2, 3), (4, 5)).sum().backward()
    assert pos.grad is not None
    assert bool((pos.grad != 0).all())
    low = resize_positions(pos.detach().bfloat16(), (2, 3), (4, 5))
    assert low.dtype == torch.bfloat16


def test_positions_refuse_another_grid() -> None:
    with pytest.raises(ValueError, match=r"must be \(1, 10, D\)"):
        resize_positions(torch.zeros(1, 9, 4), (3, 3), (2, 2))
    for grid in ((0, 3), (2.0, 3), (3,)):
        with pytest.raises(ValueError, match="two numbers of patches"):
            resize_positions(torch.zeros(1, 10, 4), (3, 3), grid)


def test_unpatchify_and_positions_refuse_other_types() -> None:
    for height in ("4", 4.0, None):
        with pytest.raises(ValueError, match=r"height = .* must be a number of pixels"):
            unpatchify(torch.zeros(1, 4, 12), 2, height, 4)
    with pytest.raises(ValueError, match="new_grid = 3 must be two numbers of patches"):
        resize_positions(torch.zeros(1, 5, 4), (2, 2), 3)
    with pytest.raises(ValueError, match=r"pos has dtype .*int32: must be floating"):
        resize_positions(torch.zeros(1, 5, 4, dtype=torch.int32), (2, 2), (3, 3))


sides = st.integers(1, 5)


@settings(max_examples=40, deadline=None)
@given(sides, sides, sides, sides)
def test_shapes_of_patches(B, patch, rows, columns) -> None:
    images = torch.rand(B, 3, patch * rows, patch * columns)
    patches = patchify(images, patch)
    assert patches.shape == (B, rows * columns, patch * patch * 3)
    assert torch.equal(unpatchify(patches, patch, *images.shape[2:]), images)


@settings(max_examples=40, deadline=None)
@given(sides, sides, sides, sides)
def test_shapes_of_resized_pictures_and_positions(h, w, new_h, new_w) -> None:
    assert resize(torch.zeros(3, h, w, dtype=torch.uint8), (new_h, new_w)).shape == (3, new_h, new_w)
    assert resize_positions(torch.zeros(1, 1 + h * w, 2), (h, w), (new_h, new_w)).shape == (1, 1 + new_h * new_w, 2)
