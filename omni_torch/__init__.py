"""A small language model and its toolkit in idiomatic PyTorch; the twin of omni_jax, complete without it.

Example:

    import torch
    from omni_torch import ThinkerConfig, ThinkerLM

    config = ThinkerConfig(vocab_size=101, n_layers=2, d_model=32, n_heads=4, d_ff=64)
    logits = ThinkerLM.from_config(config).eval()(torch.tensor([[1, 5, 9]]))
"""

from __future__ import annotations

from .attention import (
    CausalSelfAttention,
    attend,
    default_positions,
    make_attention_mask,
)
from .checkpoint import (
    Checkpoint,
    CheckpointError,
    LoadReport,
    export_weights,
    load_checkpoint,
    load_report,
    load_weights,
    save_checkpoint,
)
from .config import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    ConfigReport,
    ThinkerConfig,
    read_config,
)
from .init import (
    bias_default_,
    default_init_,
    embedding_default_,
    fan_in_fan_out,
    init_linear_,
    kaiming_uniform_,
    linear_default_,
    xavier_uniform_,
)
from .layers import (
    GELUMLP,
    MoE,
    RMSNorm,
    SwiGLU,
    TokenEmbedding,
    TokenIdError,
    apply_rope,
    check_token_ids,
    rope_frequencies,
)
from .losses import (
    cross_entropy,
    next_token_loss,
)
from .optim import (
    AdamWState,
    adamw_step_,
    adamw_step_many_,
    clip_grad_norm_,
    global_norm,
    init_adamw_state,
    warmup_cosine,
)
from .thinker import (
    Block,
    ThinkerLM,
    num_parameters,
)
from .tokenizer import (
    BPETokenizer,
)

__all__ = [
    "PAD_ID",
    "BOS_ID",
    "EOS_ID",
    "ThinkerConfig",
    "ConfigReport",
    "read_config",
    "TokenIdError",
    "check_token_ids",
    "TokenEmbedding",
    "RMSNorm",
    "rope_frequencies",
    "apply_rope",
    "SwiGLU",
    "GELUMLP",
    "MoE",
    "make_attention_mask",
    "default_positions",
    "attend",
    "CausalSelfAttention",
    "Block",
    "ThinkerLM",
    "num_parameters",
    "cross_entropy",
    "next_token_loss",
    "AdamWState",
    "init_adamw_state",
    "adamw_step_",
    "adamw_step_many_",
    "global_norm",
    "clip_grad_norm_",
    "warmup_cosine",
    "fan_in_fan_out",
    "xavier_uniform_",
    "kaiming_uniform_",
    "init_linear_",
    "linear_default_",
    "bias_default_",
    "embedding_default_",
    "default_init_",
    "CheckpointError",
    "Checkpoint",
    "LoadReport",
    "load_checkpoint",
    "load_report",
    "load_weights",
    "export_weights",
    "save_checkpoint",
    "BPETokenizer",
]
