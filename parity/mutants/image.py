"""Pictures, patches, vision."""

from __future__ import annotations

from parity.mutants.mutant import Edit, Mutant, in_both

__all__ = ["MUTANTS"]

RGB = ("image_file", "_rgb")
PATCH, JAX_PATCH = ("omni_torch.vision", "patchify"), ("omni_jax.vision", "patchify")
BOTH = "permute(0, 2, 4, 3, 5, 1)"
VIT, JAX_VIT = ("omni_torch.vision_encoder", "ViTTiny.forward"), ("omni_jax.vision_encoder", "ViTTiny.__call__")
RESIZE = "image.resize((width, height), Image.Resampling.BILINEAR, box=None, reducing_gap=None)"


def _mutant(
    name: str, report: str, what: str, *edits: Edit, check: str = "image", needs: str = "", where: str = ""
) -> Mutant:
    return Mutant(f"image-{name}", "image", report, what, edits, check, where, {}, needs)


MUTANTS = (
    _mutant("no-antialias", "V01", "every pixel of a smaller picture is one pixel of the larger: in both twins",
            *in_both("image_file", "resize_pixels", RESIZE, RESIZE.replace("BILINEAR", "NEAREST"))),
    _mutant("bicubic", "V02", "Pillow's bicubic filter for its bilinear one: in both twins",
            *in_both("image_file", "resize_pixels", RESIZE, RESIZE.replace("BILINEAR", "BICUBIC"))),
    _mutant("bicubic-half", "V02", "a = −0.5 for −0.75 in the table of positions: in both twins",
            *(Edit(f"omni_{side}.vision", "_cubic", "_CUBIC", "-0.5", 3) for side in ("jax", "torch"))),
    _mutant("positions-linear", "V07", "positions are interpolated linearly",
            Edit("omni_torch.vision", "_cubic", "torch.where(x_N <= 1.0, near_N, far_N)", "(1.0 - x_N).clamp(min=0.0)"),
            needs="another grid than the learnt one"),
    _mutant("positions-turned", "V07", "rows and columns of the grid change places",
            Edit("omni_jax.vision", "resize_positions", "jnp.reshape(pos[0, 1:], (*grid, -1))",
                 "jnp.swapaxes(jnp.reshape(pos[0, 1:], (*grid[::-1], -1)), 0, 1)"), needs="a grid that is not square"),
    _mutant("patch-order", "V04", "inside a patch colour by colour, not pixel by pixel",
            Edit(*PATCH, "permute(0, 2, 4, 3, 5, 1)", "permute(0, 2, 4, 1, 3, 5)")),
    _mutant("patch-columns", "V04", "patches go column by column",
            Edit(*JAX_PATCH, "(0, 2, 4, 3, 5, 1)", "(0, 4, 2, 3, 5, 1)"), needs="a picture that is not square"),
    _mutant("patch-turned", "V05", "rows and columns inside a patch change places",
            Edit(*PATCH, "permute(0, 2, 4, 3, 5, 1)", "permute(0, 2, 4, 5, 3, 1)")),
    _mutant("bgr", "V09", "blue, green, red: in both twins",
            *in_both(*RGB, 'return np.array(upright.convert("RGB"))',
                'return np.array(upright.convert("RGB"))[..., ::-1]')),
    _mutant("rescaled-twice", "V09", "levels are divided by 255 twice: in both twins",
            *in_both("image_file", "read_image", "np.float32(255.0)", "np.float32(255.0 * 255.0)")),
    _mutant("wraps", "D07", "16 bits lose their high byte: in both twins",
            *in_both(*RGB, "(grey >> 8).astype(np.uint8)", "(grey & 255).astype(np.uint8)"),
                needs="a picture of 16 bits"),
    _mutant("exif", "V09", "EXIF's orientation is not followed: in both twins",
            *in_both(*RGB, "ImageOps.exif_transpose(image)", "image"), needs="a picture that lies on its side"),
    _mutant("transparent-black", "V09", "transparency over black, not white: in both twins",
            *in_both(*RGB, 'upright.size, "white")', 'upright.size, "black")'), needs="transparency"),
    _mutant("kernel-turned", "V05", "the picture's rows and columns change places before the convolution",
            Edit(*JAX_VIT, "(0, 2, 3, 1)", "(0, 3, 2, 1)"), check="vision-encoder", needs="square pictures too"),
    _mutant("cls-last", "V04", "the CLS token stands behind the patches",
            Edit(*VIT, "torch.cat([self.cls.expand(len(patches_BND), -1, -1), patches_BND], dim=1)",
                 "torch.cat([patches_BND, self.cls.expand(len(patches_BND), -1, -1)], dim=1)"), check="vision-encoder"),
    _mutant("same-padding", "V06", "SAME pads even sides at their end alone",
            Edit("omni_torch.audio_encoder", "AudioEncoderTiny.forward",
                "x_BCTF = layer(_cut(x_BCTF, lengths, axis=2))",
                 "x_BCTF = torch.nn.functional.conv2d(torch.nn.functional.pad(_cut(x_BCTF, lengths, axis=2),"
                 " (x_BCTF.shape[3] % 2, 1, x_BCTF.shape[2] % 2, 1)),"
                 " layer.weight, layer.bias, 2)"),
            check="audio-encoder", needs="even sides"),
)  # fmt: skip
