"""Picture files that nobody can vouch for, as RGB pixels between 0 and 1: decoded and resized by Pillow.

Shapes: H height, W width.

The pixels are exactly Pillow's, and so the same on both sides of a comparison, but for these rules:
    orientation    as the EXIF tag says, so that up is up;
    palette, grey  their colours as red, green, blue;
    transparency   laid over white;
    16 bits        the high byte, as Pillow itself takes it of 16-bit colours (of grey ones it would clip at 255);
    CMYK           by Pillow's formula; colour profiles are not applied, in no kind of picture;
    animation      the first picture.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from .files import open_regular_file

__all__ = ["read_image", "resize_pixels"]

# Others stay closed: Pillow would start another program for some (Ghostscript for EPS), and few are tested as well.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_MOST_PIXELS = 89_478_485  # where Pillow begins to warn of a decompression bomb: 256 MiB of RGB
_COLOURS = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBA", "RGBa")


def read_image(path: str | os.PathLike[str] | Any, size: int | tuple[int, int] | None) -> Float32[np.ndarray, "3 H W"]:
    """A picture as float32 of shape (3, H, W), each value a level of 0 … 255 divided by 255.

    Args:
        path: a PNG, JPEG, WebP, GIF, BMP, TIFF or PPM file, or a picture that Pillow has opened.
        size: H and W of the result, one number where they are equal, None for the picture's own; see `resize_pixels`.

    Raises:
        ValueError: no such file; 0 bytes, damaged, cut off or of another kind; more than 89,478,485 pixels (a small
            file can claim any number); samples without a known range (32-bit, floating); a size that cannot be.
    """
    if size is not None:
        _check_size(size)
    from PIL import Image

    if isinstance(path, Image.Image):
        pixels = _rgb(path, "the picture")
    elif isinstance(path, (str, os.PathLike)):
        name = f"image {os.fspath(path)!r}"
        with open_regular_file(path, "image") as stream:
            try:
                image = Image.open(stream, formats=_FORMATS)
            except (Image.DecompressionBombError, Image.DecompressionBombWarning):
                raise _too_large(name, "too many") from None
            except Image.UnidentifiedImageError:
                raise ValueError(
                    f"{name} is not a picture that can be read, or its beginning is damaged: known are "
                    f"{', '.join(_FORMATS)}; convert it to PNG, or fetch it again"
                ) from None
            except Exception as bad:  # a damaged file makes a decoder raise anything
                raise _damaged(name, bad) from None
            pixels = _rgb(image, name)
    else:
        raise ValueError(
            f"path is a {type(path).__name__}, must be a path or a Pillow image; for an array of pixels use resize"
        )
    if size is not None:
        pixels = resize_pixels(pixels, size)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32) / np.float32(255.0)


def resize_pixels(pixels: UInt8[np.ndarray, "H W 3"], size: int | tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels (H, W, 3) at another size (h, w), by Pillow's bilinear filter.

    When a side shrinks, the filter widens with it, so that every pixel counts (a resize without that, as of most
    tensor libraries, is up to 120 levels off); the results are rounded to whole levels after each of the two passes.
    The picture is stretched where h / w is not H / W.

    Raises:
        ValueError: pixels of another shape or dtype, none at all, or a size that cannot be.
    """
    from PIL import Image

    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(
            f"pixels have shape {pixels.shape} and dtype {pixels.dtype}: must be uint8 (levels of 0 to 255) for red, "
            "green and blue, at least one pixel; pass for example (255 * pixels).round().astype('uint8')"
        )
    _check_size(size)
    height, width = map(int, size if isinstance(size, tuple) else (size, size))
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.array(image.resize((width, height), Image.Resampling.BILINEAR, box=None, reducing_gap=None))


def _rgb(image: Any, name: str) -> UInt8[np.ndarray, "H W 3"]:
    from PIL import Image, ImageOps

    if image.width * image.height > _MOST_PIXELS:
        raise _too_large(name, f"{image.width} × {image.height}")
    mode = image.mode
    grey_16 = mode.startswith("I;16") or (mode == "I" and image.format == "PPM")  # which Pillow scales to 16 bits
    if not grey_16 and mode not in _COLOURS:
        raise ValueError(
            f"{name} has samples of Pillow's mode {mode!r}: allowed are 8 and 16 bits of grey or colour; save it as an "
            "8-bit PNG"
        )
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
        if grey_16:
            grey = np.array(upright)
            levels = (grey >> 8).astype(np.uint8)
            if isinstance(image.info.get("transparency"), int):  # one grey that stands for transparent
                levels[grey == image.info["transparency"]] = 255
            return np.repeat(levels[:, :, None], 3, axis=2)
        if _is_transparent(upright):
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        return np.array(upright.convert("RGB"))
    except Exception as bad:  # a damaged file makes a decoder raise anything
        raise _damaged(name, bad) from None


def _is_transparent(image: Any) -> bool:
    alpha = image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info
    return alpha or (image.mode == "P" and image.palette.mode.endswith("A"))


def _too_large(name: str, size: str) -> ValueError:
    return ValueError(
        f"{name} has {size} pixels: allowed are up to {_MOST_PIXELS}, since it may be made to fill the memory; if you "
        "trust it, make it smaller with a picture editor first"
    )


def _damaged(name: str, bad: Exception) -> ValueError:
    return ValueError(f"{name} is damaged or cut off ({bad or type(bad).__name__}); fetch it or save it again")


def _check_size(size: Any) -> None:
    sides = size if isinstance(size, tuple) else (size, size)
    whole = all(isinstance(side, int | np.integer) and not isinstance(side, bool) and side >= 1 for side in sides)
    if not (len(sides) == 2 and whole and math.prod(map(int, sides)) <= _MOST_PIXELS):
        fix = f"give {tuple(size)!r}" if isinstance(size, list) and len(size) == 2 else "give for example 224"
        raise ValueError(
            f"size = {size!r} cannot be: must be a number of pixels from 1 up, or a tuple (height, width), with up to "
            f"{_MOST_PIXELS} pixels in all; {fix}"
        )
