"""Pictures as tensors, pictures as patches, and a table of positions for pictures of another size.

Shapes: B batch, H height, W width, P patch side, N patches (H/P · W/P, row by row), F = P·P·3 values of
a patch, D model.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Shaped, UInt8
from torch import Tensor

from .image_file import read_image, resize_pixels
from .layers import check_tensor, dtype_name, statistics_dtype

__all__ = ["load_image", "resize", "patchify", "unpatchify", "resize_positions"]

_CUBIC = -0.75  # Keys' a


def load_image(
    path: str | os.PathLike[str] | Any, size: int | tuple[int, int] | None = 224
) -> Float32[Tensor, "3 H W"]:
    """A picture as float32 of shape (3, H, W) in [0, 1]: red, green, blue, each a level of 0 … 255 divided by 255.

    Palettes and grey become RGB, transparency is laid over white, of 16 bits the high byte is kept, EXIF's orientation
    is followed, colour profiles are not applied; of an animation it is the first picture.

    Args:
        path: a PNG, JPEG, WebP, GIF, BMP, TIFF or PPM file, or a picture that Pillow has opened.
        size: H and W of the result, one number where they are equal (the picture is then stretched to a square), by
            `resize`; None for the picture's own.

    Raises:
        ValueError: no such file; 0 bytes, damaged, cut off or of another kind; more than 89,478,485 pixels; samples
            without a known range (32-bit, floating); a size that cannot be.
    """
    return torch.from_numpy(read_image(path, size))


def resize(image: UInt8[Tensor, "3 H W"], size: int | tuple[int, int]) -> UInt8[Tensor, "3 h w"]:
    """Levels (3, H, W) at another size (3, h, w) by Pillow's bilinear filter, which averages where a side shrinks.

    `size` is (h, w), or one number where they are equal. On the host, without gradients.

    Raises:
        ValueError: an image of another shape or dtype (Pillow resizes levels of 0 to 255), or a size that cannot be.
    """
    check_tensor("image", image)
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        last = image.ndim == 3 and image.shape[2] == 3 and image.shape[0] != 3
        fix = "pass image.permute(2, 0, 1)" if last else "pass for example (255 * image).round() as uint8"
        raise ValueError(
            f"image has shape {tuple(image.shape)} and dtype {dtype_name(image.dtype)}: must be uint8 (levels of 0 to "
            f"255) of shape (3, H, W); {fix}"
        )
    resized = resize_pixels(image.permute(1, 2, 0).cpu().numpy(), size)
    return torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1))).to(image.device)


def patchify(images_B3HW: Shaped[Tensor, "B 3 H W"], patch: int) -> Shaped[Tensor, "B N F"]:
    """Images (B, 3, H, W) cut into squares of P × P pixels: (B, N, F).

    Patches go row by row over the image, and inside a patch the values go row by row, pixel by pixel, colour by colour.

    Raises:
        ValueError: images of another shape, or sides that P does not divide.

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv 2010.11929.
    """
    check_images(images_B3HW, patch)
    B, _, H, W = images_B3HW.shape
    split = images_B3HW.reshape(B, 3, H // patch, patch, W // patch, patch)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, patch * patch * 3)


def unpatchify(patches: Shaped[Tensor, "B N F"], patch: int, height: int, width: int) -> Shaped[Tensor, "B 3 H W"]:
    """The images (B, 3, height, width) that `patchify` cut into these patches (B, N, F).

    Raises:
        ValueError: sides that P does not divide, or patches of another shape than those of such images.
    """
    check_tensor("patches", patches)
    _check_sides(patch, height, width)
    rows, columns = height // patch, width // patch
    if patches.ndim != 3 or tuple(patches.shape[1:]) != (rows * columns, patch * patch * 3):
        raise ValueError(
            f"patches have shape {tuple(patches.shape)}: {rows} × {columns} patches of {patch} × {patch} pixels in 3 "
            f"colours are (B, {rows * columns}, {patch * patch * 3}); give the height and width they were cut from"
        )
    split = patches.reshape(patches.shape[0], rows, columns, patch, patch, 3)
    return split.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], 3, height, width)


def resize_positions(
    pos: Float[Tensor, "1 N1 D"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Tensor, "1 M1 D"]:
    """A table of positions (1, 1 + h·w, D) for a grid of (h, w) patches, at another grid: (1, 1 + h'·w', D).

    The first row is the CLS token's and stays. The others are interpolated along each side by cubic convolution with
    a = −0.75, centre of a patch on centre of a patch, edges continued by their outermost value, without averaging
    where the grid shrinks (torch's bicubic, align_corners=False): rows · table · columnsᵀ, so gradients flow. It is
    computed in promote_types(dtype, float32). The same grid gives the same table.

    Raises:
        ValueError: a table that is not floating or does not have 1 + h·w rows, or a grid without patches.

    Source: Keys, Cubic Convolution Interpolation for Digital Image Processing, IEEE ASSP 29(6), 1981.
    """
    check_tensor("pos", pos)
    _check_grids(tuple(pos.shape), grid, new_grid)
    if not pos.is_floating_point():
        raise ValueError(
            f"pos has dtype {dtype_name(pos.dtype)}: must be floating; give the table that a ViT has learnt"
        )
    if tuple(grid) == tuple(new_grid):
        return pos
    wide = statistics_dtype(pos.dtype)
    rows, columns = (_cubic(old, new).to(pos.device, wide) for old, new in zip(grid, new_grid, strict=True))
    table_hwD = pos[0, 1:].reshape(*grid, -1).to(wide)
    table_hwD = torch.einsum("ah,hwd->awd", rows, table_hwD)
    table_hwD = torch.einsum("bw,awd->abd", columns, table_hwD).to(pos.dtype)
    return torch.cat([pos[:, :1], table_hwD.reshape(1, -1, pos.shape[-1])], dim=1)


def _cubic(old: int, new: int) -> Float[Tensor, "new old"]:
    """Row i: how much each of `old` values along a side gives to value i of `new`. In float64."""
    at_N = (torch.arange(new, dtype=torch.float64) + 0.5) * (old / new) - 0.5
    first_N = at_N.floor()
    weights = torch.zeros(new, old, dtype=torch.float64)
    for tap in range(-1, 3):
        x_N = (at_N - (first_N + tap)).abs()
        # Products, as numpy and torch round a third power each in its own way.
        near_N = (_CUBIC + 2.0) * (x_N * x_N * x_N) - (_CUBIC + 3.0) * x_N**2 + 1.0
        far_N = _CUBIC * (x_N * x_N * x_N - 5.0 * x_N**2 + 8.0 * x_N - 4.0)
        here = (first_N + tap).clamp(0, old - 1)[:, None] == torch.arange(old)
        weights = weights + torch.where(x_N <= 1.0, near_N, far_N)[:, None] * here
    return weights


def check_images(images: Any, patch: int) -> None:
    check_tensor("images", images)
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        fix = "add the missing axis, for example images[None], or move the colours to the front"
        if images.ndim == 4 and images.shape[3] == 3:
            fix = "the colours are last: pass images.permute(0, 3, 1, 2)"
        raise ValueError(f"images have shape {tuple(images.shape)}: must be (B, 3, H, W), red, green and blue; {fix}")
    _check_sides(patch, *images.shape[2:])


def _check_sides(patch: int, height: int, width: int) -> None:
    if type(patch) is not int or patch < 1:
        raise ValueError(f"patch = {patch!r} must be a number of pixels from 1 up; give for example 16")
    for name, side in (("height", height), ("width", width)):
        if not isinstance(side, int):
            raise ValueError(f"{name} = {side!r} must be a number of pixels; give for example {patch}")
    if min(height, width) < 1 or height % patch or width % patch:
        nearest = " and ".join(str(max(1, math.floor(side / patch + 0.5)) * patch) for side in (height, width))
        raise ValueError(
            f"images of {height} × {width} pixels do not divide into patches of {patch} × {patch}: height and width "
            f"must be multiples of {patch}; resize them, for example to {nearest}"
        )


def _check_grids(shape: tuple[int, ...], grid: tuple[int, int], new_grid: tuple[int, int]) -> None:
    for name, sides in (("grid", grid), ("new_grid", new_grid)):
        pair = isinstance(sides, (tuple, list)) and len(sides) == 2
        if not pair or any(type(side) is not int or side < 1 for side in sides):
            raise ValueError(f"{name} = {sides!r} must be two numbers of patches from 1 up; give (rows, columns)")
    rows = 1 + math.prod(grid)
    if len(shape) != 3 or shape[:2] != (1, rows):
        raise ValueError(
            f"pos has shape {shape}: for the CLS token and a grid of {grid[0]} × {grid[1]} it must be (1, {rows}, D); "
            "give the grid that the table was made for"
        )
