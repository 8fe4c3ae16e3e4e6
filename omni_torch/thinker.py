"""ThinkerLM, the decoder-only language model.

Shapes: B batch, T time, D model, F feed-forward, V vocabulary, E experts, H heads, K key/value heads, C = d/2 channel
pairs of RoPE.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .attention import CausalSelfAttention, default_positions, make_attention_mask
from .cache import KVCache, _CachedCall, check_cache
from .config import ThinkerConfig
from .layers import GELUMLP, MoE, RMSNorm, SwiGLU, TokenEmbedding, check_tensor, dtype_name, rope_frequencies

__all__ = ["Block", "ThinkerLM", "num_parameters"]


class Block(nn.Module):
    """Pre-norm residual block: x ← x + drop(attn(norm1(x))); x ← x + drop(mlp(norm2(x))).

    With config.use_moe the second branch is `moe` instead of `mlp`.

    Source: Xiong et al., On Layer Normalization in the Transformer Architecture, arXiv 2002.04745, figure 1 (b).
    """

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.d_model)
        self.attn = CausalSelfAttention(
            config.d_model, config.n_heads, config.dropout, config.use_gqa, config.kv_groups
        )
        self.norm2 = RMSNorm(config.d_model)
        self.use_moe = config.use_moe
        if config.use_moe:
            self.moe = MoE(
                config.d_model, config.d_ff, config.num_experts, config.num_experts_per_tok, config.use_swiglu
            )
        else:
            self.mlp = (
                SwiGLU(config.d_model, config.d_ff) if config.use_swiglu else GELUMLP(config.d_model, config.d_ff)
            )
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        cos_BTC: Float[Tensor, "#B T C"],
        sin_BTC: Float[Tensor, "#B T C"],
        mask_BTS: Bool[Tensor, "#B T S"] | None,
        cache: Any = None,
    ) -> Float[Tensor, "B T D"]:
        """x (B, T, D) with both branches added: (B, T, D); cos and sin (#B, T, C), mask (#B, T, S), #B being B or 1.

        `mask_BTS` and `cache` are what CausalSelfAttention takes.
        """
        x_BTD = x_BTD + self.drop(self.attn(self.norm1(x_BTD), cos_BTC, sin_BTC, mask_BTS, cache))
        feed_forward = self.moe if self.use_moe else self.mlp
        return x_BTD + self.drop(feed_forward(self.norm2(x_BTD)))


class ThinkerLM(nn.Module):
    """Decoder-only language model: embeddings, blocks with RoPE attention, norm, linear head (not tied).

    The arguments are ThinkerConfig's fields; `config` keeps them. Weights start from torch's default initialisation:
    Linear U(±1/√fan_in), Embedding N(0, 1), norms 1. A new model is in training mode, as every torch module is: call
    `model.eval()` before inference, or dropout is on.

    Raises:
        ValueError: what ThinkerConfig refuses.
    """

    def __init__(
        self,
        vocab_size: int,
        n_layers: int,
        d_model: int,
        n_heads: int,
        d_ff: int,
        dropout: float = 0.1,
        rope_theta: float = 10000.0,
        ctx_len: int = 512,
        use_gqa: bool = False,
        kv_groups: int | None = None,
        use_swiglu: bool = True,
        use_moe: bool = False,
        num_experts: int = 8,
        num_experts_per_tok: int = 2,
    ) -> None:
        super().__init__()
        config = ThinkerConfig(
            vocab_size,
            n_layers,
            d_model,
            n_heads,
            d_ff,
            dropout,
            rope_theta,
            ctx_len,
            use_gqa,
            kv_groups,
            use_swiglu,
            use_moe,
            num_experts,
            num_experts_per_tok,
        )
        self.config = config
        self.tok_emb = TokenEmbedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    @classmethod
    def from_config(cls, config: ThinkerConfig) -> ThinkerLM:
        """The model that `config` describes, with fresh weights."""
        return cls(**config.to_dict())

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        *,
        config: ThinkerConfig | str | os.PathLike[str] | None = None,
        n_heads: int | None = None,
    ) -> ThinkerLM:
        """The model in a checkpoint file, or in the best one of a folder; in evaluation mode, so that dropout is off.

        Its config is the one given, or that of a file (`config`), or the one beside the checkpoint, or what the shapes
        tell, with `n_heads` as a hint. It has the file's dtype, and is on the CPU.

        Raises:
            CheckpointError: the file cannot be read, or its weights are not those of such a model.
            ValueError: nothing tells n_heads, or the config is that of another model.
        """
        from .architecture import read_model
        from .checkpoint import load_weights

        checkpoint, found, stored = read_model(path, config, n_heads)
        # The first weights are thrown away, so nobody's random numbers are used up. (Without values, on the device
        # "meta", it would take longer: torch then imports sympy.)
        with torch.random.fork_rng(devices=[]):
            model = cls.from_config(found.config)
        return load_weights(model.to(getattr(torch, stored)), checkpoint).eval()

    def forward(
        self,
        tokens: Int[Tensor, "B T"] | None = None,
        *,
        embeddings: Float[Tensor, "B T D"] | None = None,
        attention_mask: Bool[Tensor, "B T"] | Bool[Tensor, "B T T"] | None = None,
        positions: Int[Tensor, "B T"] | Int[Tensor, " T"] | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Any:
        """Logits (B, T, V) for the token after each position; with `cache`, (logits, cache).

        Takes token ids, or instead embeddings (B, T, D), which stand for the output of `tok_emb`. `attention_mask` is
        True where a key may be seen, always combined with the causal mask. `positions` default to the number of kept
        tokens before each token; given ones may lie beyond ctx_len.

        `cache` (see init_cache) holds the tokens before these, which then see them too, and comes back with these in
        it: a text may come in chunks of any length. `attention_mask` is then (B, T), and marks padding among the new
        tokens. `last_only` gives the logits of the last position alone, (B, 1, V).

        Raises:
            ValueError: both or neither of tokens and embeddings; wrong rank, width, dtype or mask shape; more tokens
                than ctx_len without positions; a cache made for another model or batch, or full.
            TokenIdError: a token id out of range.
        """
        x_BTD = self._embed(tokens, embeddings)
        B, T, _ = x_BTD.shape
        if cache is not None:
            check_cache(cache, self, B, T, attention_mask)
            call = _CachedCall(cache, T, attention_mask)
            mask_BTS, layers = call.mask(), call.layers
            # A mask costs a CPU's kernels more than one look here, for which other devices would have to be waited for;
            # its values are not known inside torch.compile.
            looks = T == 1 and not self.training and mask_BTS.device.type == "cpu"
            if looks and not torch.compiler.is_compiling() and bool(mask_BTS.all()):
                mask_BTS = None
            if positions is None:
                positions_BT = call.positions_BT
            else:
                positions_BT = self._positions(B, T, None, positions, x_BTD.device)
        else:
            call, layers = None, [None] * len(self.blocks)
            mask_BTS = make_attention_mask(B, T, attention_mask, device=x_BTD.device)
            positions_BT = self._positions(B, T, attention_mask, positions, x_BTD.device)
        config = self.config
        cos_BTC, sin_BTC = rope_frequencies(positions_BT, config.head_dim, config.rope_theta, x_BTD.dtype)
        with torch.set_grad_enabled(call is None and torch.is_grad_enabled()):  # none through a cache
            for block, layer in zip(self.blocks, layers, strict=True):
                x_BTD = block(x_BTD, cos_BTC, sin_BTC, mask_BTS, layer)
            if last_only:
                x_BTD = x_BTD[:, -1:]
            logits_BTV = self.lm_head(self.norm(x_BTD))
        return logits_BTV if call is None else (logits_BTV, call.finish())

    def _embed(self, tokens: Tensor | None, embeddings: Tensor | None) -> Tensor:
        if (tokens is None) == (embeddings is None):
            given = "neither" if tokens is None else "both"
            raise ValueError(
                f"tokens and embeddings: got {given}, must be exactly one; pass model(tokens) or embeddings="
            )
        if tokens is not None:
            _check_rank("tokens", tokens, "(B, T)")
            return self.tok_emb(tokens)
        assert embeddings is not None
        _check_rank("embeddings", embeddings, "(B, T, D)")
        if embeddings.shape[-1] != self.config.d_model or not embeddings.is_floating_point():
            raise ValueError(
                f"embeddings have shape {tuple(embeddings.shape)} and dtype {dtype_name(embeddings.dtype)}: must be "
                f"floating point with last axis d_model={self.config.d_model}; project them to d_model first"
            )
        return embeddings.to(self.tok_emb.weight.dtype)

    def _positions(
        self, B: int, T: int, attention_mask: Tensor | None, positions: Tensor | None, device: torch.device
    ) -> Tensor:
        if positions is None:
            if self.config.ctx_len < T:
                raise ValueError(
                    f"the input has {T} tokens, allowed are up to ctx_len={self.config.ctx_len}; cut it, or pass "
                    "positions= to go beyond what the model was trained for"
                )
            return default_positions(T, attention_mask, device=device)
        check_tensor("positions", positions)
        integers = not (positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool)
        if tuple(positions.shape) not in ((T,), (1, T), (B, T)) or not integers:
            raise ValueError(
                f"positions have shape {tuple(positions.shape)} and dtype {dtype_name(positions.dtype)}: must be "
                f"integers of shape {(T,)} or {(B, T)}; give one position per token"
            )
        return positions if positions.ndim == 2 else positions[None]


def num_parameters(model: nn.Module) -> int:
    """Number of numbers in all parameters of `model`."""
    return sum(parameter.numel() for parameter in model.parameters())


def _check_rank(name: str, x: Tensor, shape: str) -> None:
    check_tensor(name, x)
    if x.ndim != shape.count(",") + 1 or 0 in x.shape:
        raise ValueError(
            f"{name} have shape {tuple(x.shape)}: must be {shape} with at least one entry on each axis; "
            f"add the missing axis, for example {name}[None]"
        )
