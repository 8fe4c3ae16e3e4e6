"""A small language model and its toolkit in idiomatic PyTorch; the twin of omni_jax, complete without it.

Example:

    import torch
    from omni_torch import ThinkerConfig, ThinkerLM

    config = ThinkerConfig(vocab_size=101, n_layers=2, d_model=32, n_heads=4, d_ff=64)
    logits = ThinkerLM.from_config(config).eval()(torch.tensor([[1, 5, 9]]))
"""

from __future__ import annotations

from .architecture import (
    Architecture,
    find_config,
    infer_config,
)
from .attention import (
    CausalSelfAttention,
    attend,
    default_positions,
    make_attention_mask,
    simple_attention,
)
from .audio import (
    frames_per_second,
    hz_to_mel,
    load_audio,
    log_mel,
    mel_filter_bank,
    mel_spectrogram,
    mel_to_hz,
    num_frames,
    plot_mel,
)
from .audio_encoder import (
    AudioEncoderTiny,
    CTCHead,
)
from .autodiff import (
    grad_with_autograd_grad,
    grad_with_backward,
    grad_with_stopped_target,
    grad_wrt_multiple_inputs,
    jvp,
    per_example_grads,
    value_and_grad,
    vjp,
)
from .cache import (
    KVCache,
    init_cache,
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
from .conversion import (
    Manifest,
    convert_checkpoint,
)
from .ctc import (
    ctc_loss,
)
from .data import (
    NextTokenDataset,
    PaddedBatch,
    RandomCropSequenceDataset,
    TensorPairDataset,
    collate_next_token_batch,
    epoch_order,
    make_dataloader,
    pad_1d_sequences,
    token_batch,
    token_stream,
)
from .fusion import (
    Fused,
    OmniLM,
    fuse,
    fuse_chunks,
    split_frozen,
)
from .generation import (
    Generation,
    generate,
    simple_inference,
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
from .inspection import (
    Inspection,
    inspect_checkpoint,
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
from .omni_config import (
    AudioConfig,
    OmniConfig,
    VisionConfig,
)
from .optim import (
    AdamW,
    AdamWState,
    adamw_step_,
    adamw_step_many_,
    clip_grad_norm_,
    decay_mask,
    global_norm,
    init_adamw_state,
    warmup_cosine,
)
from .sampling import (
    apply_repetition_penalty,
    sample,
    truncated_probabilities,
)
from .thinker import (
    Block,
    ThinkerLM,
    num_parameters,
)
from .tokenizer import (
    BPETokenizer,
)
from .training import (
    TrainConfig,
    Trainer,
    TrainState,
    accumulated_gradients,
    train,
    train_step_mse,
)
from .training_utils import (
    DebugRecord,
    NumericalError,
    check_gradient_explosion,
    check_numerical_stability,
    clip_gradients,
    debug_training,
    get_lr_scheduler,
    set_seed,
    validate_loss,
)
from .vision import (
    load_image,
    patchify,
    resize,
    resize_positions,
    unpatchify,
)
from .vision_encoder import (
    ViTTiny,
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
    "KVCache",
    "init_cache",
    "make_attention_mask",
    "default_positions",
    "attend",
    "simple_attention",
    "CausalSelfAttention",
    "Block",
    "ThinkerLM",
    "num_parameters",
    "load_audio",
    "hz_to_mel",
    "mel_to_hz",
    "mel_filter_bank",
    "mel_spectrogram",
    "log_mel",
    "num_frames",
    "frames_per_second",
    "plot_mel",
    "AudioEncoderTiny",
    "CTCHead",
    "ctc_loss",
    "load_image",
    "resize",
    "patchify",
    "unpatchify",
    "resize_positions",
    "ViTTiny",
    "AudioConfig",
    "VisionConfig",
    "OmniConfig",
    "Fused",
    "fuse",
    "fuse_chunks",
    "OmniLM",
    "split_frozen",
    "apply_repetition_penalty",
    "truncated_probabilities",
    "sample",
    "Generation",
    "generate",
    "simple_inference",
    "cross_entropy",
    "next_token_loss",
    "grad_with_autograd_grad",
    "grad_with_backward",
    "grad_wrt_multiple_inputs",
    "value_and_grad",
    "jvp",
    "vjp",
    "per_example_grads",
    "grad_with_stopped_target",
    "TensorPairDataset",
    "NextTokenDataset",
    "RandomCropSequenceDataset",
    "PaddedBatch",
    "pad_1d_sequences",
    "collate_next_token_batch",
    "make_dataloader",
    "epoch_order",
    "token_stream",
    "token_batch",
    "AdamWState",
    "init_adamw_state",
    "adamw_step_",
    "adamw_step_many_",
    "global_norm",
    "clip_grad_norm_",
    "decay_mask",
    "AdamW",
    "warmup_cosine",
    "fan_in_fan_out",
    "xavier_uniform_",
    "kaiming_uniform_",
    "init_linear_",
    "linear_default_",
    "bias_default_",
    "embedding_default_",
    "default_init_",
    "NumericalError",
    "validate_loss",
    "check_numerical_stability",
    "check_gradient_explosion",
    "clip_gradients",
    "get_lr_scheduler",
    "set_seed",
    "DebugRecord",
    "debug_training",
    "train_step_mse",
    "accumulated_gradients",
    "TrainConfig",
    "TrainState",
    "Trainer",
    "train",
    "CheckpointError",
    "Checkpoint",
    "LoadReport",
    "load_checkpoint",
    "load_report",
    "load_weights",
    "export_weights",
    "save_checkpoint",
    "Architecture",
    "infer_config",
    "find_config",
    "Inspection",
    "inspect_checkpoint",
    "Manifest",
    "convert_checkpoint",
    "BPETokenizer",
]
