"""Image patches in JAX (exercise 4), and its two questions answered by running them.

1. How many patches are there? 224 / 16 = 14 along each side, 14 · 14 = 196.
2. What does each patch represent? A square of 16 × 16 pixels, 16·16·3 = 768 numbers. The convolution makes a vector of
   128 of them, by one and the same matrix for every patch: an embedding of that square, which sees nothing else.

The exercise's torch.tensor(img) does not work: torch takes numbers, sequences of them and numpy's arrays, and a PIL
image is none of these. Its __array_interface__ is for numpy, and JAX looks there too: jnp.asarray(img) works. But only
an RGB file has three colours to transpose; of a grey, palette or transparent one that line fails, or gives something
else. load_image makes RGB of all, channel first, in [0, 1].

    python examples/jax/image_patches.py [FIGURE.png]    # keeps a figure of the picture and its patches there
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from omni_jax import load_image, patchify, unpatchify

SAMPLE = Path(__file__).resolve().parent.parent / "sample_image.png"
SIDE, PATCH, EMBED = 224, 16, 128


def patch_emb(images: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    """The exercise's Conv2d: (B, 3, H, W) to (B, 128, H / 16, W / 16)."""
    layout = ("NCHW", "OIHW", "NCHW")
    maps = jax.lax.conv_general_dilated(images, weight, (PATCH, PATCH), "VALID", dimension_numbers=layout)
    return maps + bias[None, :, None, None]


def make_layer() -> tuple[jax.Array, jax.Array]:
    """Its weight (128, 3, 16, 16) and bias (128,), drawn as torch draws them: evenly within ± 1 / √(3·16·16)."""
    keys = jax.random.split(jax.random.key(0))
    shapes, bound = ((EMBED, 3, PATCH, PATCH), (EMBED,)), (3 * PATCH * PATCH) ** -0.5
    weight, bias = (jax.random.uniform(k, shape, minval=-bound, maxval=bound) for k, shape in zip(keys, shapes))
    return weight, bias


def draw(figure: Path, image: jax.Array, patches: jax.Array) -> None:
    """The picture, and its patches pulled apart."""
    from matplotlib.figure import Figure

    squares = np.asarray(patches[0]).reshape(SIDE // PATCH, SIDE // PATCH, PATCH, PATCH, 3)
    apart = np.ones((SIDE // PATCH, PATCH + 3, SIDE // PATCH, PATCH + 3, 3), np.float32)
    apart[:, 3:, :, 3:] = squares.transpose(0, 2, 1, 3, 4)
    side = SIDE // PATCH * (PATCH + 3)
    page = Figure(figsize=(8.0, 4.2), layout="constrained")
    left, right = page.subplots(1, 2)
    left.imshow(np.asarray(image).transpose(1, 2, 0), extent=(0, SIDE, SIDE, 0))
    left.set(title=f"{SAMPLE.name}, {SIDE} × {SIDE}", xlabel="column (pixels)", ylabel="row (pixels)")
    right.imshow(apart.reshape(side, side, 3)[3:, 3:], extent=(0, SIDE // PATCH, SIDE // PATCH, 0))
    right.set(
        title=f"{patches.shape[1]} patches of {PATCH} × {PATCH}", xlabel="column (patches)", ylabel="row (patches)"
    )
    left.set_xticks(range(0, SIDE + 1, 2 * PATCH))
    left.set_yticks(range(0, SIDE + 1, 2 * PATCH))
    page.savefig(figure, dpi=150)


def split_it(figure: Path) -> None:
    """The exercise."""
    image = load_image(SAMPLE, SIDE)
    print(f"  Image shape: {image.shape}")
    with Image.open(SAMPLE) as img:
        by_hand = jnp.asarray(np.asarray(img)).transpose(2, 0, 1).astype(jnp.float32) / 255.0
    apart = float(jnp.abs(by_hand - image).max())
    check(apart <= float(jnp.finfo(image.dtype).eps), "of an RGB file of the right size, the exercise's own line")
    weight, bias = make_layer()
    patches = patch_emb(image[None], weight, bias)
    print(f"  Patches shape: {patches.shape}")
    B, C, H, W = patches.shape
    patches = jnp.swapaxes(patches.reshape(B, C, H * W), 1, 2)
    print(f"  Patches as sequence: {patches.shape}")
    check(patches.shape == (1, 196, EMBED), "a row of 128 numbers per patch")

    # Cut first, then one product: a patch's values go pixel by pixel, colour by colour, and so must the weight's.
    cut = patchify(image[None], PATCH)
    product = cut @ weight.transpose(2, 3, 1, 0).reshape(-1, EMBED) + bias[None, None]
    apart = float(jnp.abs(product - patches).max() / jnp.abs(patches).max())
    check(apart <= 64 * float(jnp.finfo(patches.dtype).eps), "the convolution is one matrix for every patch")
    draw(figure, image, cut)
    check(figure.stat().st_size > 0, "the figure is written")


def why_not_tensor() -> None:
    """The exercise's conversion of a PIL image."""
    with Image.open(SAMPLE) as img:
        array = jnp.asarray(img)
        print(f"  JAX reads the {img.mode} picture as numpy does: {array.shape}, {array.dtype}")
        grey = np.asarray(img.convert("L"))
    check(array.shape == (SIDE, SIDE, 3), "height, width, colour")
    check(grey.shape == (SIDE, SIDE), "but a grey picture has no axis of colours to move")
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "grey.png"
        Image.fromarray(grey).save(path)
        loaded = load_image(path, None)
    check(loaded.shape == (3, SIDE, SIDE), "load_image makes RGB of it")
    check(bool((jnp.rint(255 * loaded) == grey[None]).all()), "with three equal colours")


def question_1() -> None:
    """How many patches are there? (224×224 image, 16×16 patches)"""
    count = patchify(load_image(SAMPLE, SIDE)[None], PATCH).shape[1]
    print(f"  {SIDE} / {PATCH} = {SIDE // PATCH} along each side; {count} in all")
    check(count == (SIDE // PATCH) ** 2, "a grid without gaps and without overlap")
    try:
        patchify(load_image(SAMPLE, 230)[None], PATCH)
        raise RuntimeError("not so: sides that 16 does not divide are refused")
    except ValueError as error:
        print(f"  ValueError: {error}")  # a convolution with stride 16 leaves the last 6 rows and columns out, silently
    print(f"  Answer: {SIDE // PATCH} × {SIDE // PATCH} = {count} patches.")


def question_2() -> None:
    """What does each patch represent?"""
    image = load_image(SAMPLE, SIDE)[None]
    cut = patchify(image, PATCH)
    row, column = 4, 10  # inside the green square
    number = row * (SIDE // PATCH) + column
    top, left = row * PATCH, column * PATCH
    region = image[0, :, top : top + PATCH, left : left + PATCH]
    check(bool(jnp.array_equal(cut[0, number], region.transpose(1, 2, 0).reshape(-1))), "its pixels, nothing else")
    colour = jnp.rint(255 * region.mean(axis=(1, 2))).astype(int).tolist()
    print(f"  patch {number}: rows {top} to {top + PATCH - 1}, columns {left} to {left + PATCH - 1}, mean RGB {colour}")
    check(bool(jnp.array_equal(unpatchify(cut, PATCH, SIDE, SIDE), image)), "all of them are the picture again")

    weight, bias = make_layer()
    before = patch_emb(image, weight, bias)
    after = patch_emb(image.at[0, :, top, left].set(0.0), weight, bias)
    changed = jnp.argwhere(jnp.abs(after - before).max(axis=(0, 1)) > 0).tolist()
    print(f"  with the pixel ({top}, {left}) black, the vectors at {changed} of the grid change")
    check(changed == [[row, column]], "a pixel is seen by its own patch only: attention must bring patches together")
    print(f"  Answer: a region of {PATCH} × {PATCH} pixels, {cut.shape[2]} numbers, here as a vector of {EMBED}.")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        figure = Path(sys.argv[1] if len(sys.argv) > 1 else f"{name}/patches.png")
        print(f"split_it: {split_it.__doc__}")
        split_it(figure)
    for part in (why_not_tensor, question_1, question_2):
        print(f"{part.__name__}: {part.__doc__}")
        part()


def check(true: bool, claim: str) -> None:
    if not true:
        raise RuntimeError(f"not so: {claim}")


if __name__ == "__main__":
    main()
