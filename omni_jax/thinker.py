"""ThinkerLM, the decoder-only language model.

Shapes: B batch, T time, D model, F feed-forward, V vocabulary, E experts, H heads, K key/value heads, C = d/2 channel
pairs of RoPE.

Everything that computes is functional: `graphdef, params, rest = nnx.split(model, nnx.Param, ...)` once, then jax.jit
and jax.grad over plain trees, with nnx.merge(graphdef, params, rest) inside. `rest` is dropout's random state, and
empty at dropout 0.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from .attention import CausalSelfAttention, default_positions, make_attention_mask
from .cache import KVCache, _CachedCall, check_cache
from .config import ThinkerConfig
from .layers import (
    GELUMLP,
    MoE,
    RMSNorm,
    SwiGLU,
    TokenEmbedding,
    check_array,
    make_dropout,
    make_linear,
    rope_frequencies,
)

__all__ = ["Block", "ThinkerLM", "num_parameters"]

Model = TypeVar("Model", bound=nnx.Module)


class Block(nnx.Module):
    """Pre-norm residual block: x ← x + drop(attn(norm1(x))); x ← x + drop(mlp(norm2(x))).

    With config.use_moe the second branch is `moe` instead of `mlp`. The outputs of the branches and of the block are
    named in the trace, `name`.attn, `name`.mlp (or .moe) and `name`, the dotted paths of the modules they come from.

    Source: Xiong et al., On Layer Normalization in the Transformer Architecture, arXiv 2002.04745, figure 1 (b).
    """

    def __init__(
        self,
        config: ThinkerConfig,
        name: str = "block",
        *,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ) -> None:
        kinds = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.name = name
        self.norm1 = RMSNorm(config.d_model, **kinds)
        self.attn = CausalSelfAttention(
            config.d_model, config.n_heads, config.dropout, config.use_gqa, config.kv_groups, **kinds
        )
        self.norm2 = RMSNorm(config.d_model, **kinds)
        self.use_moe = config.use_moe
        if config.use_moe:
            self.moe = MoE(
                config.d_model, config.d_ff, config.num_experts, config.num_experts_per_tok, config.use_swiglu, **kinds
            )
        else:
            self.mlp = (SwiGLU if config.use_swiglu else GELUMLP)(config.d_model, config.d_ff, **kinds)
        self.drop = make_dropout(config.dropout, rngs)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        cos_BTC: Float[Array, "#B T C"],
        sin_BTC: Float[Array, "#B T C"],
        mask_BTS: Bool[Array, "#B T S"],
        cache: Any = None,
    ) -> Float[Array, "B T D"]:
        """x (B, T, D) with both branches added: (B, T, D); cos and sin (#B, T, C), mask (#B, T, S), #B being B or 1.

        `cache` is what CausalSelfAttention takes.
        """
        y_BTD = self.attn(self.norm1(x_BTD), cos_BTC, sin_BTC, mask_BTS, cache)
        x_BTD = x_BTD + self.drop(checkpoint_name(y_BTD, f"{self.name}.attn"))
        branch, feed_forward = ("moe", self.moe) if self.use_moe else ("mlp", self.mlp)
        y_BTD = feed_forward(self.norm2(x_BTD))
        x_BTD = x_BTD + self.drop(checkpoint_name(y_BTD, f"{self.name}.{branch}"))
        return checkpoint_name(x_BTD, self.name)


class ThinkerLM(nnx.Module):
    """Decoder-only language model: embeddings, blocks with RoPE attention, norm, linear head (not tied).

    The arguments are ThinkerConfig's fields; `config` keeps them. Weights start from torch's default initialisation:
    Linear U(±1/√fan_in), Embedding N(0, 1), norms 1; `from_config` draws them much faster. A new model is in
    training mode, as its torch twin is: call `model.eval()` before inference, or dropout is on.

    `dtype` is the compute dtype, None for the parameters' own; `param_dtype` is what the parameters are stored in.
    `name` is the dotted path of this model in one that owns it: what is named in the trace begins with it.

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
        *,
        name: str = "",
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ) -> None:
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
        kinds = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.dtype = dtype
        self.prefix = f"{name}." if name else ""
        self.tok_emb = TokenEmbedding(config.vocab_size, config.d_model, **kinds)
        self.blocks = nnx.List([Block(config, f"{self.prefix}blocks.{i}", **kinds) for i in range(config.n_layers)])
        self.norm = RMSNorm(config.d_model, **kinds)
        self.lm_head = make_linear(config.d_model, config.vocab_size, **kinds)

    @classmethod
    def from_config(
        cls,
        config: ThinkerConfig,
        *,
        rngs: nnx.Rngs | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ) -> ThinkerLM:
        """The model that `config` describes, with fresh weights, cheaply: nothing is compiled.

        The weights follow the constructor's distributions, but are drawn by numpy, seeded from rngs.params(): they are
        other numbers than the constructor's. Inside a trace this is the constructor. `rngs` defaults to nnx.Rngs(0).
        """
        rngs = nnx.Rngs(0) if rngs is None else rngs
        return fresh_model(lambda rngs: cls(**config.to_dict(), rngs=rngs, dtype=dtype, param_dtype=param_dtype), rngs)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        *,
        config: ThinkerConfig | str | os.PathLike[str] | None = None,
        n_heads: int | None = None,
        rngs: nnx.Rngs | None = None,
        dtype: Any = None,
        param_dtype: Any = None,
    ) -> ThinkerLM:
        """The model in a checkpoint file, or in the best one of a folder; in evaluation mode, so that dropout is off.

        Its config is the one given, or that of a file (`config`), or the one beside the checkpoint, or what the shapes
        tell, with `n_heads` as a hint. `param_dtype=None` is the file's own.

        Raises:
            CheckpointError: the file cannot be read, or its weights are not those of such a model.
            ValueError: nothing tells n_heads, the config is that of another model, or the file is in float64, and JAX
                is not.
        """
        from .architecture import read_model
        from .checkpoint import load_weights

        checkpoint, found, stored = read_model(path, config, n_heads)
        param_dtype = loaded_dtype(path, stored, param_dtype)
        weights = checkpoint.model
        if param_dtype.name != stored:
            weights = {key: np.asarray(value).astype(param_dtype) for key, value in weights.items()}
        model = cls.from_config(found.config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        load_weights(model, weights).eval()
        return model

    def __call__(
        self,
        tokens: Int[Array, "B T"] | None = None,
        *,
        embeddings: Float[Array, "B T D"] | None = None,
        attention_mask: Bool[Array, "B T"] | Bool[Array, "B T T"] | None = None,
        positions: Int[Array, "B T"] | Int[Array, " T"] | None = None,
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
                than ctx_len without positions; a cache made for another model or batch, or full (inside jit: NaN,
                and the cache as it was).
            TokenIdError: a token id out of range (inside jit: a row of NaN).
        """
        x_BTD = self._embed(tokens, embeddings)
        B, T, _ = x_BTD.shape
        if cache is not None:
            check_cache(cache, self, B, T, attention_mask)
            call = _CachedCall(cache, T, attention_mask)
            mask_BTS, layers = call.mask(), call.layers
            positions_BT = call.positions_BT if positions is None else self._positions(B, T, None, positions)
        else:
            call, layers = None, [None] * len(self.blocks)
            mask_BTS = make_attention_mask(B, T, attention_mask)
            positions_BT = self._positions(B, T, attention_mask, positions)
        config = self.config
        cos_BTC, sin_BTC = rope_frequencies(positions_BT, config.head_dim, config.rope_theta, x_BTD.dtype)
        for block, layer in zip(self.blocks, layers, strict=True):
            x_BTD = block(x_BTD, cos_BTC, sin_BTC, mask_BTS, layer)
        if last_only:
            x_BTD = x_BTD[:, -1:]
        logits_BTV = self.lm_head(checkpoint_name(self.norm(x_BTD), f"{self.prefix}norm"))
        return logits_BTV if call is None else (call.mark(logits_BTV), call.finish())

    def _embed(self, tokens: Any, embeddings: Any) -> Array:
        if (tokens is None) == (embeddings is None):
            given = "neither" if tokens is None else "both"
            raise ValueError(
                f"tokens and embeddings: got {given}, must be exactly one; pass model(tokens) or embeddings="
            )
        if tokens is not None:
            _check_rank("tokens", tokens, "(B, T)")
            return checkpoint_name(self.tok_emb(tokens), f"{self.prefix}tok_emb")
        _check_rank("embeddings", embeddings, "(B, T, D)")
        if embeddings.shape[-1] != self.config.d_model or not jnp.issubdtype(embeddings.dtype, jnp.floating):
            raise ValueError(
                f"embeddings have shape {tuple(embeddings.shape)} and dtype {embeddings.dtype}: must be "
                f"floating point with last axis d_model={self.config.d_model}; project them to d_model first"
            )
        return jnp.asarray(embeddings, self.tok_emb.embedding.dtype if self.dtype is None else self.dtype)

    def _positions(self, B: int, T: int, attention_mask: Any, positions: Any) -> Array:
        if positions is None:
            if self.config.ctx_len < T:
                raise ValueError(
                    f"the input has {T} tokens, allowed are up to ctx_len={self.config.ctx_len}; cut it, or pass "
                    "positions= to go beyond what the model was trained for"
                )
            return default_positions(T, attention_mask)
        check_array("positions", positions)
        if tuple(positions.shape) not in ((T,), (1, T), (B, T)) or not jnp.issubdtype(positions.dtype, jnp.integer):
            raise ValueError(
                f"positions have shape {tuple(positions.shape)} and dtype {positions.dtype}: must be integers "
                f"of shape {(T,)} or {(B, T)}; give one position per token"
            )
        positions = jnp.asarray(positions)
        return positions if positions.ndim == 2 else positions[None]


def num_parameters(model: nnx.Module) -> int:
    """Number of numbers in all parameters of `model`."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def loaded_dtype(path: str | os.PathLike[str], stored: str, param_dtype: Any) -> Any:
    """What the parameters of a checkpoint are to be held in; None: as they are stored."""
    param_dtype = jnp.dtype(stored if param_dtype is None else param_dtype)
    if param_dtype == jnp.float64 and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            f"checkpoint {os.fspath(path)!r} holds float64, and JAX is set to 32 bits: pass "
            "param_dtype=jnp.float32, or call within jax.enable_x64(True)"
        )
    return param_dtype


def fresh_model(make: Callable[[nnx.Rngs], Model], rngs: nnx.Rngs) -> Model:
    """The model that `make` makes, with weights of its distributions, drawn by numpy; inside a trace make's own."""
    key = rngs.params()
    if isinstance(key, Tracer):
        return make(rngs)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return nnx.merge(graphdef, _draw(state, key, rngs))


def _draw(state: nnx.State, key: Array, rngs: nnx.Rngs) -> nnx.State:
    """Values for a state of shapes: torch's default initialisation (see init.py), and fresh streams for dropout."""
    host = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
    flat = nnx.to_flat_state(state)
    kernels = {path[:-1]: leaf.shape for path, leaf in flat if path[-1] == "kernel"}
    for path, leaf in flat:
        if isinstance(leaf, nnx.RngKey):
            leaf.set_value(rngs.dropout())
            continue
        if isinstance(leaf, nnx.RngCount):
            leaf.set_value(jnp.zeros(leaf.shape, leaf.dtype))
            continue
        wide = np.float64 if leaf.dtype == jnp.float64 else np.float32
        kernel = kernels.get(path[:-1])  # (*window, in, out)
        if path[-1] == "kernel" and path[-2] == "in_proj":  # torch's nn.MultiheadAttention: Xavier
            x = (2.0 * host.random(leaf.shape, wide) - 1.0) * math.sqrt(6.0 / sum(leaf.shape))
        elif path[-1] in ("kernel", "bias") and kernel is not None and not _starts_at_zero(path):
            x = (2.0 * host.random(leaf.shape, wide) - 1.0) * (1.0 / math.sqrt(math.prod(kernel[:-1])))
        elif path[-1] == "embedding":
            x = host.standard_normal(leaf.shape, wide)
        elif path[-1] == "scale":
            x = np.ones(leaf.shape, wide)
        else:
            assert _starts_at_zero(path) or path[-1] == "bias", path
            x = np.zeros(leaf.shape, wide)
        leaf.set_value(jnp.asarray(x, leaf.dtype))
    return nnx.from_flat_state(flat)


def _starts_at_zero(path: tuple[Any, ...]) -> bool:
    """ViTTiny's CLS token and positions, and the biases of its attention."""
    return path[-1] in ("cls", "pos") or ("self_attn" in path and path[-1] == "bias")


def _check_rank(name: str, x: Any, shape: str) -> None:
    check_array(name, x)
    if x.ndim != shape.count(",") + 1 or 0 in x.shape:
        raise ValueError(
            f"{name} have shape {tuple(x.shape)}: must be {shape} with at least one entry on each axis; "
            f"add the missing axis, for example {name}[None]"
        )
