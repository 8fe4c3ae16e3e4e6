"""ViTTiny, the encoder of pictures.

Shapes: B batch, H height, W width, N patches, T = 1 + N tokens (CLS first), D model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .attention import _attend_fused, attend
from .layers import RMSNorm, dtype_name
from .vision import check_images, resize_positions

__all__ = ["ViTTiny"]


class _SelfAttention(nn.Module):
    """Multi-head attention of every token to every token, with the parameters of nn.MultiheadAttention.

    Rows of in_proj are q, k, v in this order. They start as torch's do: in_proj Xavier, biases 0.
    """

    def __init__(self, d: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * d, d)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d))
        self.out_proj = nn.Linear(d, d, bias=True)
        nn.init.zeros_(self.out_proj.bias)
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        B, T, D = x_BTD.shape
        projected = F.linear(x_BTD, self.in_proj_weight, self.in_proj_bias)
        q, k, v = (part.reshape(B, T, self.heads, D // self.heads) for part in projected.chunk(3, dim=-1))
        if self.training and self.drop.p > 0.0:
            every_key = torch.ones(1, T, T, dtype=torch.bool, device=x_BTD.device)
            y_BTHd = attend(q, k, v, every_key, dropout=self.drop)
        else:
            y_BTHd = _attend_fused(q, k, v, None)
        return self.out_proj(y_BTHd.reshape(B, T, D))


class _Block(nn.Module):
    """x ← x + drop(self_attn(norm1(x))); x ← x + drop(linear2(drop(gelu(linear1(norm2(x)))))).

    What nn.TransformerEncoderLayer(norm_first=True) computes and how it names its parameters, without its fast path,
    which in evaluation alone is other arithmetic.
    """

    def __init__(self, d: int, heads: int, ff: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = _SelfAttention(d, heads, dropout)
        self.linear1 = nn.Linear(d, ff, bias=True)
        self.linear2 = nn.Linear(ff, d, bias=True)
        self.norm1 = nn.LayerNorm(d, eps=1e-5)  # flax's default is 1e-6
        self.norm2 = nn.LayerNorm(d, eps=1e-5)
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        x_BTD = x_BTD + self.drop(self.self_attn(self.norm1(x_BTD)))
        # "none" is the erf form, x·Φ(x).
        hidden = F.gelu(self.linear1(self.norm2(x_BTD)), approximate="none")
        return x_BTD + self.drop(self.linear2(self.drop(hidden)))


class ViTTiny(nn.Module):
    """Vision transformer: patches by convolution, CLS token, learned positions, pre-norm blocks, RMSNorm.

    Images (B, 3, H, W) in [0, 1] become a vector for the whole picture and one for each patch. Positions are learned
    for img_size × img_size and interpolated (`resize_positions`) for any other size, so one model takes them all.
    Weights start from torch's default initialisation, cls and pos from 0. A new model is in training mode: call
    `model.eval()` before inference, or dropout is on.

    Args:
        img_size: height and width that the positions are learned for, in pixels.
        patch: side of a patch in pixels.
        d, layers, heads, ff, dropout: width, number of blocks, of attention heads, hidden width, dropout.

    Raises:
        ValueError: a number out of range, an img_size that patch does not divide, a d that heads does not divide.

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv 2010.11929.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch: int = 16,
        d: int = 192,
        layers: int = 12,
        heads: int = 3,
        ff: int = 768,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        _check_settings(img_size, patch, d, layers, heads, ff, dropout)
        self.patch = patch
        self.grid = (img_size // patch, img_size // patch)
        self.proj = nn.Conv2d(3, d, kernel_size=patch, stride=patch, padding=0, bias=True)
        self.cls = nn.Parameter(torch.zeros(1, 1, d))
        self.pos = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], d))
        self.blocks = nn.ModuleList(_Block(d, heads, ff, dropout) for _ in range(layers))
        self.norm = RMSNorm(d)

    def forward(self, images_B3HW: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B 1 D"], Float[Tensor, "B N D"]]:
        """Images (B, 3, H, W) to (the CLS token's vector (B, 1, D), the patches' row by row (B, N, D)).

        A NaN in an image makes both NaN.

        Raises:
            ValueError: images of another shape, not floating (levels of 0 … 255 must be divided by 255 first), or of
                sides that patch does not divide.
        """
        check_images(images_B3HW, self.patch)
        if not images_B3HW.is_floating_point():
            raise ValueError(
                f"images have dtype {dtype_name(images_B3HW.dtype)}: must be floating point, in [0, 1]; "
                "pass images / 255"
            )
        patches_BDhw = self.proj(images_B3HW.to(self.proj.weight.dtype))
        pos = resize_positions(self.pos, self.grid, tuple(patches_BDhw.shape[2:]))
        patches_BND = patches_BDhw.flatten(2).transpose(1, 2)
        x_BTD = torch.cat([self.cls.expand(len(patches_BND), -1, -1), patches_BND], dim=1) + pos
        for block in self.blocks:
            x_BTD = block(x_BTD)
        x_BTD = self.norm(x_BTD)
        return x_BTD[:, :1], x_BTD[:, 1:]


def _check_settings(img_size: Any, patch: Any, d: Any, layers: Any, heads: Any, ff: Any, dropout: Any) -> None:
    counts = {"img_size": img_size, "patch": patch, "d": d, "layers": layers, "heads": heads, "ff": ff}
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} = {value!r} must be an integer from 1 up; the family's is in the signature")
    for name, value, divisor, by in (("img_size", img_size, "patch", patch), ("d", d, "heads", heads)):
        if value % by:
            raise ValueError(f"{name} = {value} must be a multiple of {divisor} = {by}; change one of them")
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout = {dropout!r} must be a number from 0 to below 1; give for example 0.1")
