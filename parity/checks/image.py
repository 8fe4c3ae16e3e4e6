"""Pictures: the pixels that both twins read of a file, resized ones, patches of them, and positions of another grid.

Shapes: B batch, H height, W width, P patch side, N patches, D model.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parity.checks import Progress, Scope
from parity.checks._encoders import SIMPLE
from parity.result import CheckResult, Control, Row
from parity.verdict import Verdict

__all__ = ["BLIND", "CLAIM", "CONTROLS", "KINDS", "PRECISIONS", "by_pillow", "pictures", "positions", "run"]

CLAIM = (
    "Both twins read exactly the pixels that Pillow reads (palette, grey, transparency over white, the high byte of 16 "
    "bits, CMYK, EXIF's orientation), resize them as Pillow's bilinear filter does, and cut them into patches and put "
    "these together again without changing a bit; the table of positions for another grid is torch's bicubic "
    "interpolation in both, and so is its gradient."
)
BLIND = (
    "Files beyond those made here, unless you name one (--image): WebP, GIF, TIFF and PPM, larger pictures, damaged "
    "ones (the twins' tests look at those). Whether Pillow is right. In the default run the table of positions by "
    "JAX compiled in float64 (its program is evaluated; --full compiles it)."
)
PRECISIONS = ("float64", "float32")
SIZE = (7, 11)
"""H and W that pictures are resized to: one side shrinks, the other one may grow."""
GRID, GRIDS = (3, 2), ((5, 4), (2, 7), (1, 1))
TRANSPARENT = 3
"""The level of the palette that is."""
PATCHES = ((2, 6, 9, 3), (1, 8, 4, 2))
"""B, H, W, P."""


def _png(image: Any, path: Path, **how: Any) -> None:
    image.save(path, "PNG", **how)


def _jpeg(image: Any, path: Path, **how: Any) -> None:
    image.save(path, "JPEG", quality=90, **how)


def _rotated(image: Any, path: Path) -> None:
    exif = image.getexif()
    exif[274] = 6  # to be turned by a quarter
    _jpeg(image, path, exif=exif)


KINDS: dict[str, tuple[str, Callable[..., None]]] = {
    "colours.png": ("RGB", _png),
    "alpha.png": ("RGBA", _png),
    "palette.png": ("P", lambda image, path: _png(image, path, transparency=TRANSPARENT)),
    "grey.png": ("L", _png),
    "grey with alpha.png": ("LA", _png),
    "16 bits.png": ("I;16", _png),
    "black and white.png": ("1", _png),
    "photo.jpg": ("RGB", _jpeg),
    "turned.jpg": ("RGB", _rotated),
    "print.jpg": ("CMYK", _jpeg),
}
"""Name of the file -> Pillow's mode, and how it is written."""


def pictures(folder: Path, seed: int) -> list[Path]:
    """A file of each of KINDS, 13 by 9 pixels of noise with a bright corner."""
    from PIL import Image

    rng = np.random.default_rng([seed, 97])
    paths = []
    for name, (mode, save) in KINDS.items():
        bands = len(Image.new(mode, (1, 1)).getbands())
        levels = rng.integers(0, 65536 if mode == "I;16" else 256, (13, 9, bands))
        levels[:5, :4] = levels.max()
        if mode == "I;16":
            image = Image.fromarray(levels[:, :, 0].astype(np.uint16))
        elif mode == "P":
            levels = levels % 16
            levels[0] = TRANSPARENT
            image = Image.fromarray(levels[:, :, 0].astype(np.uint8), "P")
            image.putpalette(rng.integers(0, 256, 48).tolist())
        elif mode == "1":
            image = Image.fromarray((levels[:, :, 0] % 2 * 255).astype(np.uint8)).convert("1")
        else:
            parts = [Image.fromarray(levels[:, :, i].astype(np.uint8)) for i in range(bands)]
            image = Image.merge(mode, parts) if bands > 1 else parts[0]
        paths.append(folder / name)
        save(image, paths[-1])
    return paths


def by_pillow(path: Path | str, size: tuple[int, int] | None = None, wrong: str = "") -> np.ndarray:
    """(3, H, W) in [0, 1] by Pillow's own operations; `wrong` names a control, whose mistake is made."""
    from PIL import Image, ImageOps

    with open(path, "rb") as stream, Image.open(stream) as image:
        image.load()
        upright = image.copy() if wrong == "orientation ignored" else ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        levels = np.array(upright)
        levels = np.minimum(levels, 255) if wrong == "16 bits clipped" else levels // 256
        upright = Image.fromarray(levels.astype(np.uint8))
    elif "A" in upright.mode or "transparency" in upright.info:
        ground = "black" if wrong == "over black" else "white"
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, ground), upright.convert("RGBA"))
    upright = upright.convert("RGB")
    if size is not None:
        kind = Image.Resampling.NEAREST if wrong == "nearest pixel" else Image.Resampling.BILINEAR
        if wrong == "not averaged":
            return _by_tensors(np.array(upright), size)
        upright = upright.resize((size[1], size[0]), kind)
    pixels = np.array(upright).transpose(2, 0, 1)
    return (pixels[::-1] if wrong == "colours reversed" else pixels).astype(np.float32) / np.float32(255)


def _by_tensors(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    import torch

    x = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None].float()
    x = torch.nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False)[0].round()
    return (x / 255).numpy()


def by_loops(images: np.ndarray, patch: int, wrong: str = "") -> np.ndarray:
    """Patches cut out one by one: rows of patches, and inside each rows of pixels, each pixel's three colours."""
    _, _, H, W = images.shape
    places = [(i, j) for i in range(0, H, patch) for j in range(0, W, patch)]
    places = sorted(places, key=lambda place: place[::-1]) if wrong == "patches by columns" else places
    axes = {"colour by colour": (0, 1, 2, 3), "pixels by columns": (0, 3, 2, 1)}.get(wrong, (0, 2, 3, 1))
    cut = [images[:, :, i : i + patch, j : j + patch].transpose(axes) for i, j in places]
    return np.stack([x.reshape(len(images), -1) for x in cut], axis=1)


# ------------------------------------------------------------------------------------------------ exact


Arrays = Mapping[str, np.ndarray]


def _read(side: str, paths: Sequence[Path]) -> dict[str, np.ndarray]:
    import importlib

    load_image = importlib.import_module(f"omni_{side}.vision").load_image
    sizes = {"": None, ", resized": SIZE}
    return {f"{p.name}{more}": np.asarray(load_image(p, size)) for p in paths for more, size in sizes.items()}


def _truth(paths: Sequence[Path], wrong: str = "") -> dict[str, np.ndarray]:
    sizes = {"": None, ", resized": SIZE}
    return {f"{p.name}{more}": by_pillow(p, size, wrong) for p in paths for more, size in sizes.items()}


def _images(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng([seed, 101])
    return [rng.random((B, 3, H, W)).astype(np.float32) for B, H, W, _ in PATCHES]


def _cut(side: str, seed: int) -> dict[str, np.ndarray]:
    """Patches, the images that they make, and resized levels, by one twin."""
    import importlib

    found: dict[str, np.ndarray] = {}
    vision = importlib.import_module(f"omni_{side}.vision")
    if side == "jax":
        import jax

        array, call = np.asarray, jax.jit  # one program, not one for each step
    else:
        import torch

        array, call = torch.from_numpy, lambda fn: fn

    def program(images):
        patches = [vision.patchify(x, P) for x, (_, _, _, P) in zip(images, PATCHES)]
        back = [vision.unpatchify(x, P, H, W) for x, (_, H, W, P) in zip(patches, PATCHES)]
        return patches, back

    patches, back = call(program)([array(x) for x in _images(seed)])
    for shape, x, y in zip(PATCHES, patches, back):
        found[f"patchify {shape}"], found[f"unpatchify {shape}"] = np.asarray(x), np.asarray(y)
    levels = (255 * _images(seed)[0][0]).astype(np.uint8)
    found["resize"] = np.asarray(vision.resize(array(levels), SIZE))
    return found


def _whole(seed: int, wrong: str = "") -> dict[str, np.ndarray]:
    from PIL import Image

    found: dict[str, np.ndarray] = {}
    for shape, x in zip(PATCHES, _images(seed)):
        found[f"patchify {shape}"], found[f"unpatchify {shape}"] = by_loops(x, shape[3], wrong), x
    levels = (255 * _images(seed)[0][0]).astype(np.uint8)
    small = Image.fromarray(levels.transpose(1, 2, 0).copy()).resize((SIZE[1], SIZE[0]), Image.Resampling.BILINEAR)
    found["resize"] = np.array(small).transpose(2, 0, 1)
    return found


def fault(x: np.ndarray, y: np.ndarray) -> str:
    """How `x` is not `y`, in words; empty if every bit is the same: −0 is not 0, and a NaN only itself."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return f"{x.dtype} {x.shape} for {y.dtype} {y.shape}"
    bits = [np.ascontiguousarray(z).view(f"u{z.itemsize}").reshape(z.shape) for z in (x, y)]
    wrong = np.argwhere(bits[0] != bits[1])
    return f"{len(wrong)} of {x.size} values differ, the first at {wrong[0].tolist()}" if len(wrong) else ""


def exact_rows(jax: Arrays, torch: Arrays, truth: Arrays) -> list[Row]:
    rows = []
    for name, right in truth.items():
        faults = [
            f"{side}: {words}" for side, x in (("jax", jax), ("torch", torch)) if (words := fault(x[name], right))
        ]
        verdict = Verdict.DIFFER if faults else Verdict.AGREE
        words = "; ".join(faults) or f"all {right.size} values equal"
        excess = np.inf if faults else 0.0
        rows.append(Row("image", "", "", "exact", name, verdict, words, shape=right.shape, excess=excess))
    return rows


# ------------------------------------------------------------------------------------------------ positions


def positions(seed: int) -> Any:
    """resize_positions to several grids, with the table as the parameter."""
    import omni_jax.vision
    import omni_torch.vision
    from parity.checks._encoders import Problem
    from parity.pair import Pair
    from parity.weights import Link

    def outputs(vision, params):
        return {_label(grid): vision.resize_positions(params["pos"], GRID, grid) for grid in GRIDS}

    def loss(out, *weights):
        return sum((out[_label(grid)] * weight).sum() for grid, weight in zip(GRIDS, weights))

    rng = np.random.default_rng([seed, 103])
    table = rng.standard_normal((1, 1 + GRID[0] * GRID[1], 6)).astype(np.float32)
    weights = [rng.standard_normal((1, 1 + h * w, 6)).astype(np.float32) for h, w in GRIDS]
    pair = Pair(
        jax=lambda params, *weights: outputs(omni_jax.vision, params),
        torch=lambda params, *weights: outputs(omni_torch.vision, params),
        template={"pos": table},
        links=[Link("pos", "pos")],
        loss=(loss, loss),
        taps={},
        name="positions",
        hasty=True,
    )
    return Problem("positions", "", pair, {"pos": table}, weights, {}, PRECISIONS)


def _label(grid: tuple[int, int]) -> str:
    return f"{GRID[0]}x{GRID[1]}->{grid[0]}x{grid[1]}"


def by_interpolation(table: np.ndarray, grid: tuple[int, int], mode: str = "bicubic", **how: Any) -> np.ndarray:
    """torch.nn.functional.interpolate of the table in float64, its first row kept."""
    import torch

    x = torch.from_numpy(table.astype(np.float64))
    patches = x[:, 1:].reshape(1, *GRID, -1).permute(0, 3, 1, 2)
    how = {"align_corners": False} | how if mode != "nearest" else how
    patches = torch.nn.functional.interpolate(patches, size=grid, mode=mode, **how)
    return torch.cat([x[:, :1], patches.flatten(2).transpose(1, 2)], dim=1).numpy()


def noise_of_weights(table: np.ndarray, grid: tuple[int, int], draws: int) -> Any:
    """The noise of an interpolation that computes its weights as it goes, as torch's does; ours has them in float64."""
    from parity.noise import measure_noise

    def program(table):
        import jax.numpy as jnp

        def weights(old, new):
            at = (jnp.arange(new).astype(table.dtype) + 0.5) * (old / new) - 0.5
            first, total = jnp.floor(at), 0.0
            for tap in range(-1, 3):
                x, a = jnp.abs(at - (first + tap)), -0.75
                near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
                far = ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a
                place = jnp.clip(first + tap, 0, old - 1)[:, None] == jnp.arange(old)[None].astype(table.dtype)
                total = total + jnp.where(place, jnp.where(x <= 1.0, near, far)[:, None], 0.0)
            return total

        rows, columns = (weights(old, new) for old, new in zip(GRID, grid))
        out = jnp.einsum("ah,bw,hwd->abd", rows, columns, table[0, 1:].reshape(*GRID, -1))
        return jnp.concatenate([table[:, :1], out.reshape(1, -1, table.shape[-1])], axis=1)

    return measure_noise(program, (table.astype(np.float64),), "float64", draws=draws).noise[0]


# ------------------------------------------------------------------------------------------------ controls

OF_FILES = {
    "over black": "transparency laid over black",
    "orientation ignored": "EXIF's orientation not followed",
    "16 bits clipped": "16 bits of grey clipped at 255, as Pillow's convert does",
    "colours reversed": "blue, green, red",
    "nearest pixel": "resized to the nearest pixel",
    "not averaged": "resized as tensor libraries do: bilinear, but blind to most pixels where a side shrinks",
}
OF_PATCHES = {
    "colour by colour": "a patch is all its red, then all its green, then all its blue",
    "pixels by columns": "rows and columns of a patch exchanged",
    "patches by columns": "patches go down the picture, not across",
}
OF_POSITIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear positions": ("positions interpolated linearly", {"mode": "bilinear"}),
    "nearest positions": ("positions of the nearest patch", {"mode": "nearest"}),
    "corners aligned": ("positions with align_corners=True", {"align_corners": True}),
    "positions averaged": ("positions averaged where a side shrinks (antialias)", {"antialias": True}),
}
SHOWN = ("zeros", "sign flipped")
CONTROLS = {
    **{name: SIMPLE[name] for name in SHOWN},
    **OF_FILES,
    **OF_PATCHES,
    **{name: words for name, (words, _) in OF_POSITIONS.items()},
}


def _exact_controls(paths: Sequence[Path], truth: Arrays, seed: int) -> list[Control]:
    found = []
    for name in OF_FILES:
        wrong = _truth(paths, name)
        seen = [k for k in truth if fault(wrong[k], truth[k])]
        resized = name in ("nearest pixel", "not averaged")
        meant = {
            "over black": [p.name for p in paths if "alpha" in p.name or "palette" in p.name],
            "orientation ignored": ["turned.jpg"],
            "16 bits clipped": ["16 bits.png"],
        }.get(name, [p.name for p in paths if "grey" not in p.name and "bits" not in p.name and "black" not in p.name])
        keys = [f"{key}, resized" for key in meant] + ([] if resized else meant)
        passed = [key for key in keys if key not in seen]
        words = f"rejected on {len(keys) - len(passed)} of {len(keys)} files" + (
            f"; passed on {', '.join(passed)}" if passed else ""
        )
        found.append(Control(name, bool(keys) and not passed, words))
    right = _whole(seed)
    for name in OF_PATCHES:
        wrong, keys = _whole(seed, name), [k for k in right if k.startswith("patchify")]
        passed = [k for k in keys if not fault(wrong[k], right[k])]
        found.append(Control(name, not passed, f"rejected on {len(keys) - len(passed)} of {len(keys)} shapes"))
    return found


def _position_controls(table: np.ndarray, case: Any) -> list[Control]:
    from parity.checks._steps import rejection
    from parity.precision import unit_roundoff

    wide, unit = case.precision == "float64", unit_roundoff(case.precision)
    found = []
    for name, (_, how) in OF_POSITIONS.items():
        # Where both sides grow, nothing is averaged; of a single patch all are the same but for rounding.
        grids = [(2, 7)] if name == "positions averaged" else list(GRIDS[:2])
        wrong = {_label(grid): by_interpolation(table, grid, **how) for grid in grids}
        found.append(rejection(name, case.precision, wrong, case.main.values, unit, noisy_reference=wide))
    return found


def run(scope: Scope, progress: Progress) -> CheckResult:
    """Compare pixels and patches bit by bit; judge positions in noise units; then the user's own picture."""
    from parity.checks._encoders import judged, row_of
    from parity.checks._steps import merge
    from parity.checks._twins import simple_controls

    started = time.perf_counter()
    result, seen = CheckResult("image"), []
    with tempfile.TemporaryDirectory() as folder:
        paths = pictures(Path(folder), scope.seed)
        truth = _truth(paths)
        result.rows += exact_rows(_read("jax", paths), _read("torch", paths), truth)
        if scope.controls:
            result.controls += _exact_controls(paths, truth, scope.seed)
    result.rows += exact_rows(_cut("jax", scope.seed), _cut("torch", scope.seed), _whole(scope.seed))
    if scope.image is not None:
        own = [Path(scope.image)]
        result.rows += exact_rows(_read("jax", own), _read("torch", own), _truth(own))
    made = positions(scope.seed)
    table = made.weights["pos"]
    for _, case in judged([made], scope, PRECISIONS, progress):
        seen.append(case)
        result.rows += case.main.rows("image", case.config, case.regime)
        if case.precision == "float64":
            for grid in GRIDS:
                reference, noise = case.main.values[_label(grid)][2], noise_of_weights(table, grid, scope.draws)
                name, theirs = f"torch's interpolate: {_label(grid)}", by_interpolation(table, grid)
                result.rows.append(row_of("image", name, theirs, reference, noise, "float64", config=case.config))
        if scope.controls:
            result.controls += _position_controls(table, case)
    if scope.controls:
        result.controls = merge([*simple_controls(seen, SHOWN, lambda name: True), *result.controls])
    result.seconds = time.perf_counter() - started
    return result
