"""The layers between the embeddings and the logits, attention aside.

Shapes: B batch, T time, D model, H heads, d head size, C = d/2 channel pairs of RoPE, F feed-forward, V vocabulary,
E experts, N any number of tokens.

The compute dtype is the dtype of the parameters (`model.to(torch.bfloat16)`). Norm statistics, RoPE's angles and the
router's softmax stay in promote_types(dtype, float32), whatever that dtype is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = [
    "TokenIdError",
    "check_token_ids",
    "statistics_dtype",
    "TokenEmbedding",
    "RMSNorm",
    "rope_frequencies",
    "apply_rope",
    "SwiGLU",
    "GELUMLP",
    "MoE",
]


class TokenIdError(ValueError, IndexError):
    """A token id outside 0 … vocab_size − 1."""


def check_token_ids(tokens: Int[Tensor, "*N"], vocab_size: int, name: str = "tokens") -> None:
    """Look at every id on the host; `name` is what the message calls them.

    Raises:
        TokenIdError: an id below 0 or from vocab_size up; the message gives the first one's place and value.
        ValueError: the ids are not integers.
    """
    ids = torch.as_tensor(tokens)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
        raise ValueError(f"{name} must hold integers, got {dtype_name(ids.dtype)}; pass token ids")
    wide = ids.long()  # vocab_size may not fit into a narrower dtype; a uint64 that does not fit here is negative
    bad = (wide < 0) | (wide >= vocab_size)
    if bool(bad.any()):
        at = bad.nonzero()[0].tolist()
        place = f"[{', '.join(map(str, at))}]" if at else ""
        raise TokenIdError(
            f"{name}{place} = {ids[tuple(at)].tolist()} is not a token id of this model: allowed are 0 to "
            f"{vocab_size - 1} (vocab_size={vocab_size}); encode with the tokenizer that belongs to the model"
        )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}, must be a tensor; pass torch.as_tensor({name})")


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums that must not lose digits: promote_types(dtype, float32)."""
    return torch.promote_types(dtype, torch.float32)


class TokenEmbedding(nn.Embedding):
    """Rows of a (V, D) table by token id.

    Raises:
        TokenIdError: an id out of range (CUDA would answer with an assert that ends the process).
    """

    _checks = True  # the copy that decodes leaves it out: each look waits for the device

    def __init__(self, vocab_size: int, d_model: int) -> None:
        # No padding_idx: the family's PAD row is an ordinary row.
        super().__init__(vocab_size, d_model, padding_idx=None)

    def forward(self, tokens: Int[Tensor, "*B T"]) -> Float[Tensor, "*B T D"]:
        """Ids (*B, T) to their rows of the table: (*B, T, D).

        Raises:
            TokenIdError, ValueError: an id out of range; ids that are not integers.
        """
        check_tensor("tokens", tokens)
        # Inside torch.compile the values are not known; F.embedding's own bounds check remains.
        if self._checks and not torch.compiler.is_compiling():
            check_token_ids(tokens, self.num_embeddings)
        return F.embedding(tokens.long(), self.weight)


class RMSNorm(nn.Module):
    """x · rsqrt(mean(x²) + eps) · weight over the last axis.

    The statistics and the scale are applied before the cast back to x's dtype. eps is written out: torch's own
    default is finfo(dtype).eps, flax's is 1e-6.

    Source: Zhang & Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467, equation 4.
    """

    def __init__(self, d_model: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """x (*B, D), normalised over its last axis: (*B, D)."""
        wide = statistics_dtype(x.dtype)
        x_wide = x.to(wide)
        rms = torch.rsqrt(x_wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (x_wide * rms * self.weight.to(wide)).to(x.dtype)


def rope_frequencies(
    positions: Int[Tensor, "*B T"], head_dim: int, rope_theta: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Float[Tensor, "*B T C"], Float[Tensor, "*B T C"]]:
    """cos and sin of position · theta^(−2j/d) for the pairs j = 0 … d/2 − 1.

    Computed in promote_types(dtype, float32), for any position: there is no table to run out of.

    Source: Su et al., RoFormer, arXiv 2104.09864, section 3.2.2.
    """
    wide = statistics_dtype(dtype)
    exponent_C = torch.arange(0, head_dim, 2, dtype=wide, device=positions.device) / head_dim
    inv_freq_C = torch.pow(rope_theta, -exponent_C)
    angle_BTC = positions[..., None].to(wide) * inv_freq_C
    return torch.cos(angle_BTC), torch.sin(angle_BTC)


def apply_rope(
    x_BTHd: Float[Tensor, "B T H d"], cos_BTC: Float[Tensor, "#B T C"], sin_BTC: Float[Tensor, "#B T C"]
) -> Float[Tensor, "B T H d"]:
    """Turn channel j and channel j + d/2 of every head by the angle of pair j (half-split, not interleaved).

    The product is taken in the dtype of the angles and rounded once to x's.
    """
    first, second = x_BTHd.to(cos_BTC.dtype).chunk(2, dim=-1)
    cos, sin = cos_BTC[:, :, None, :], sin_BTC[:, :, None, :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BTHd.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), without biases.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202, equation 6.
    """

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """x (*B, D), through F hidden channels and back: (*B, D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GELUMLP(nn.Module):
    """fc2(gelu(fc1(x))), with biases and the exact GELU x·Φ(x).

    Source: Hendrycks & Gimpel, Gaussian Error Linear Units, arXiv 1606.08415, section 2.
    """

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, d_ff, bias=True)
        self.fc2 = nn.Linear(d_ff, d_model, bias=True)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """x (*B, D), through F hidden channels and back: (*B, D)."""
        # "none" is the erf form; jax.nn.gelu's default is the tanh approximation, 4.7e-4 off.
        return self.fc2(F.gelu(self.fc1(x), approximate="none"))


class MoE(nn.Module):
    """Σ over the k best experts of weight · expert(x), weights from a softmax over all experts.

    p = softmax(router(x)); the k largest p, divided by (their sum + 1e-8). Among equal p the lowest index wins.
    Router, weights and sum stay in promote_types(dtype, float32).

    Source: Shazeer et al., Outrageously Large Neural Networks, arXiv 1701.06538, equation 1; softmax before top-k and
    renormalised as in Mixtral (Jiang et al., arXiv 2401.04088, section 2.1), but for the 1e-8.
    """

    def __init__(
        self, d_model: int, d_ff: int, num_experts: int = 8, num_experts_per_tok: int = 2, use_swiglu: bool = True
    ) -> None:
        super().__init__()
        self.num_experts_per_tok = num_experts_per_tok
        self.router = nn.Linear(d_model, num_experts, bias=False)
        mlp = SwiGLU if use_swiglu else GELUMLP
        self.experts = nn.ModuleList(mlp(d_model, d_ff) for _ in range(num_experts))

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """x (B, T, D), each token through its chosen experts: (B, T, D)."""
        wide = statistics_dtype(x.dtype)
        x_ND = x.reshape(-1, x.shape[-1])
        p_NE = torch.softmax(F.linear(x_ND.to(wide), self.router.weight.to(wide)), dim=-1)
        # A stable sort, since torch.topk leaves the order of equal values open; lax.top_k takes the lowest index.
        ordered, experts = torch.sort(p_NE, dim=-1, descending=True, stable=True)
        weights, chosen = ordered[:, : self.num_experts_per_tok], experts[:, : self.num_experts_per_tok]
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-8)
        y_ND = torch.zeros_like(x_ND, dtype=wide)
        for e, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == e)
            y_ND = y_ND.index_add(0, rows, weights[rows, slots, None] * expert(x_ND[rows]).to(wide))
        return y_ND.to(x.dtype).reshape(x.shape)
