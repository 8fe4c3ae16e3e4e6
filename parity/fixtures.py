"""The shared fixtures: configurations, weights in three regimes, and batches that reach what usual inputs do not.

This is the only room that builds our twins. Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parity.cache import kept_arrays
from parity.errors import Misuse
from parity.pair import Pair, pair_of

__all__ = [
    "ASSETS",
    "CONFIGS",
    "REGIMES",
    "SHAPE",
    "Twins",
    "calls_batch",
    "clear_experts",
    "configuration",
    "far_positions",
    "load_twins",
    "loud_weights",
    "random_weights",
    "stress_batch",
    "tied_weights",
    "twins",
    "weights_of",
]

ASSETS = Path(__file__).parent / "assets"
REGIMES = ("fresh", "randomised", "trained")
"""fresh: the default initialisation. randomised: no norm scale is 1, no bias 0, large scores. trained: some
50 steps of the recipe (the shipped model: as shipped)."""
SHAPE = (6, 11)
"""Batch and length of the stress batch; the length is unlike every other size of the models."""
STEPS = 50
TINY, HUGE, OFFSET = np.float32(1e-3), np.float32(1e4), np.float32(100.0)
"""What `loud_weights` does to embeddings: far below the root of eps, far beyond every branch, far from a mean of 0."""

_SMALL = {"n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 40, "dropout": 0.1, "rope_theta": 10000.0, "ctx_len": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "mha-swiglu": {"vocab_size": 61, **_SMALL},
    "gqa-swiglu": {"vocab_size": 131, **_SMALL, "use_gqa": True, "kv_groups": 2},
    "mha-gelu": {
        "vocab_size": 131, **_SMALL, "n_layers": 1, "n_heads": 2, "d_model": 24, "rope_theta": 5e5, "use_swiglu": False,
    },
    "moe": {"vocab_size": 61, **_SMALL, "n_layers": 1, "use_moe": True, "num_experts": 4, "num_experts_per_tok": 3},
    "moe-gqa-gelu": {
        "vocab_size": 61, **_SMALL, "n_layers": 1, "n_heads": 6, "d_model": 36, "use_gqa": True, "kv_groups": 2,
        "use_swiglu": False, "use_moe": True, "num_experts": 3, "num_experts_per_tok": 2,
    },
    "shipped": {},
}  # fmt: skip
"""Vocabularies below and beyond 100, head sizes 6, 8 and 12, odd widths. "shipped" is read from its own file."""


@dataclass(frozen=True)
class Twins:
    """Both models of one configuration as a pair, and the pair of the calls that have other shapes."""

    name: str
    config: Any
    pair: Pair
    """(tokens, targets, attention_mask, positions) -> logits, with the loss and so the gradients."""
    calls: Pair
    """(tokens, attention_mask, far) -> logits at T = 1, at default positions, from embeddings at far positions; and
    the embeddings themselves."""

    @functools.cached_property
    def forward(self) -> Any:
        """A Tracer of the forward pass alone."""
        from parity.noise import Tracer

        return Tracer(self.pair.jax)


def configuration(name: str) -> Any:
    """A ThinkerConfig by the name of a shared configuration or the path of a JSON file."""
    from omni_torch.config import ThinkerConfig

    if name == "shipped":
        return ThinkerConfig.from_json(ASSETS / "config.json")
    if name in CONFIGS:
        return ThinkerConfig(**CONFIGS[name])
    if Path(name).exists():
        return ThinkerConfig.from_json(name)
    import difflib

    near = difflib.get_close_matches(name, CONFIGS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise Misuse(f"config: {name!r} is neither a shared configuration ({', '.join(CONFIGS)}) nor a file{hint}")


def twins(name: str, config: Any = None) -> Twins:
    """Both models of a configuration, bound by name; their own weights are placeholders."""
    import jax
    import torch
    from flax import nnx

    import omni_jax.losses
    import omni_jax.thinker
    import omni_torch.losses
    import omni_torch.thinker
    from omni_jax.config import ThinkerConfig as JaxConfig

    config = configuration(name) if config is None else config
    if config.ctx_len < SHAPE[1]:
        raise Misuse(f"config {name}: ctx_len={config.ctx_len} is below {SHAPE[1]}, the length of the stress batch")
    with torch.device("cpu"):
        module = omni_torch.thinker.ThinkerLM.from_config(config).eval()
    abstract = nnx.eval_shape(
        lambda: omni_jax.thinker.ThinkerLM(**JaxConfig(**config.to_dict()).to_dict(), rngs=nnx.Rngs(0))
    )
    abstract.eval()
    graphdef, template, rest = nnx.split(abstract, nnx.Param, ...)
    # The random state of dropout stays abstract: an evaluation never touches it.

    def model(params):
        return nnx.merge(graphdef, params, rest)

    def forward(params, tokens, targets, mask, positions):
        return {"logits": model(params)(tokens, attention_mask=mask, positions=positions)}

    def torch_forward(net, tokens, targets, mask, positions):
        return {"logits": net(tokens, attention_mask=mask, positions=positions)}

    loss = (
        lambda out, tokens, targets, mask, positions: omni_jax.losses.cross_entropy(out["logits"], targets),
        lambda out, tokens, targets, mask, positions: omni_torch.losses.cross_entropy(out["logits"], targets),
    )

    def calls(params, tokens, mask, far):
        net = model(params)
        embeddings = jax.lax.stop_gradient(net.tok_emb(tokens))
        return {
            "T = 1": net(tokens[:, :1]),
            "default positions": net(tokens, attention_mask=mask),
            "far positions": net(embeddings=embeddings, positions=far),
            "embeddings": embeddings,
        }

    def torch_calls(net, tokens, mask, far):
        embeddings = net.tok_emb(tokens).detach()
        return {
            "T = 1": net(tokens[:, :1]),
            "default positions": net(tokens, attention_mask=mask),
            "far positions": net(embeddings=embeddings, positions=far),
            "embeddings": embeddings,
        }

    shared: dict[str, Any] = {"name": name}
    main = pair_of(forward, module, template, loss=loss, torch_call=torch_forward, **shared)
    # The shipped model, and whatever a user names, is compiled as users compile it.
    main.hasty = name in CONFIGS and name != "shipped"
    return Twins(
        name,
        config,
        main,
        pair_of(calls, module, template, torch_call=torch_calls, taps={}, **shared),
    )


def load_twins(checkpoint: str | Path, config: Any = None) -> tuple[Any, Any]:
    """(omni_jax model, omni_torch model) with the weights of one checkpoint, each through its own reader, in eval mode.

    `config` is a ThinkerConfig or the path of a JSON file; by default the config.json beside the checkpoint.
    """
    from flax import nnx

    import omni_jax.checkpoint
    import omni_jax.thinker
    import omni_torch.checkpoint
    import omni_torch.thinker
    from omni_jax.config import ThinkerConfig

    path = Path(checkpoint)
    if config is None or isinstance(config, (str, Path)):
        config = ThinkerConfig.from_json(path.parent / "config.json" if config is None else config)
    fields = config.to_dict()
    left = omni_jax.thinker.ThinkerLM(**fields, rngs=nnx.Rngs(0))
    right = omni_torch.thinker.ThinkerLM(**fields)
    omni_jax.checkpoint.load_weights(left, omni_jax.checkpoint.load_checkpoint(path))
    omni_torch.checkpoint.load_weights(right, omni_torch.checkpoint.load_checkpoint(path))
    left.eval()
    return left, right.eval()


# ------------------------------------------------------------------------------------------------ weights


def weights_of(
    name: str, regime: str, seed: int = 0, checkpoint: str | None = None, config: Any = None
) -> dict[str, np.ndarray]:
    """float32 weights of a configuration under torch names; "trained" is `STEPS` of the recipe, or the file."""
    if regime not in REGIMES:
        raise Misuse(f"regime: {regime!r} is not one of {', '.join(REGIMES)}")
    config = configuration(name) if config is None else config
    if regime == "fresh":
        return _fresh(config, seed)
    if regime == "randomised":
        return random_weights(config, seed)
    if checkpoint is not None or name == "shipped":
        return _from_file(config, checkpoint or str(ASSETS / "thinker.pt"))
    return _trained(name, seed)


def _fresh(config: Any, seed: int) -> dict[str, np.ndarray]:
    import torch

    from omni_torch.init import default_init_
    from omni_torch.thinker import ThinkerLM

    model = default_init_(ThinkerLM.from_config(config), torch.Generator().manual_seed(seed))
    return {k: v.detach().numpy().copy() for k, v in model.named_parameters()}


def random_weights(config: Any, seed: int) -> dict[str, np.ndarray]:
    """Every tensor away from its initial value: scales in [0.5, 1.5], biases and embeddings normal, large scores.

    A quarter of each activation's inputs is scaled so that they pass ±6, where a clipped sigmoid would show.
    """
    rng = np.random.default_rng([seed, 7])
    weights = {}
    for key, value in _fresh(config, seed).items():
        if value.ndim == 1 and "norm" in key:
            value = rng.uniform(0.5, 1.5, value.shape)
        elif value.ndim == 1 or key == "tok_emb.weight":
            value = rng.standard_normal(value.shape)
        else:
            value = rng.standard_normal(value.shape) * 1.2 / np.sqrt(value.shape[1])
        if key in ("blocks.0.attn.qkv.weight", "blocks.0.attn.q.weight"):
            value[: config.head_dim] *= 4.0
        if key.endswith(("gate_proj.weight", "fc1.weight")):
            value[: len(value) // 4] *= 3.0
        weights[key] = value.astype(np.float32)
    return weights


def loud_weights(config: Any, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The first head of the first block louder still: scores pass ±50, where a clamp would show.

    And embeddings of every size: PAD's are 0 (not where there are experts), and of the other ids each in turn has tiny
    ones (next to which eps is large), huge ones, ones with an offset, and ordinary ones.

    For calls in float64 only: in bfloat16 a softmax with such scores is as good as a choice, and the backward pass of
    torch's fused attention (which recomputes p from the log-sum-exp) errs by u·|score| there, not by u.
    """
    loud = dict(weights)
    table = weights["tok_emb.weight"].copy()
    if not config.use_moe:  # an expert's share of nothing is a tie within the noise, which would excuse a difference
        table[0] = 0.0
    table[1::4] *= TINY
    table[2::4] *= HUGE
    table[3::4] += OFFSET
    loud["tok_emb.weight"] = table
    key = next(k for k in ("blocks.0.attn.qkv.weight", "blocks.0.attn.q.weight") if k in weights)
    loud[key] = weights[key].copy()
    loud[key][: config.head_dim] *= 16.0
    return loud


def tied_weights(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every router's weights 0: all experts are tied exactly, for every token."""
    return {k: np.zeros_like(v) if "router" in k else v for k, v in weights.items()}


@functools.lru_cache(maxsize=16)
def _trained(name: str, seed: int) -> dict[str, np.ndarray]:
    import torch

    import omni_torch

    sources = [*sorted(Path(omni_torch.__file__).parent.glob("*.py")), *sorted(Path(__file__).parent.glob("*.py"))]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    return kept_arrays(f"trained-{name}", f"{seed} {torch.__version__} {text}", lambda: _train(name, seed))


def _train(name: str, seed: int) -> dict[str, np.ndarray]:
    import torch

    from omni_torch.init import default_init_
    from omni_torch.losses import cross_entropy
    from omni_torch.optim import adamw_step_many_, clip_grad_norm_, init_adamw_state, warmup_cosine
    from omni_torch.thinker import ThinkerLM
    from parity.corpus import byte_like_ids

    config = configuration(name)
    model = default_init_(ThinkerLM.from_config(config), torch.Generator().manual_seed(seed)).eval()
    params: list[torch.Tensor] = list(model.parameters())
    states = [init_adamw_state(p) for p in params]
    for step in range(STEPS):
        ids = torch.from_numpy(byte_like_ids(config.vocab_size, 4, 33, seed, step).astype(np.int64))
        loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
        grads = list(torch.autograd.grad(loss, params, allow_unused=True))
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads)]
        clip_grad_norm_(grads, 1.0)
        lr = 3e-3 * warmup_cosine(step, 5, STEPS)
        states = adamw_step_many_(params, grads, states, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    return {k: v.detach().numpy().copy() for k, v in model.named_parameters()}


def _from_file(config: Any, path: str) -> dict[str, np.ndarray]:
    import torch

    from omni_torch.checkpoint import load_checkpoint, load_weights
    from omni_torch.thinker import ThinkerLM

    model = ThinkerLM.from_config(config)
    load_weights(model, load_checkpoint(path).model)
    return {k: v.detach().to(torch.float32).numpy().copy() for k, v in model.named_parameters()}


# ------------------------------------------------------------------------------------------------ inputs


def stress_batch(
    config: Any,
    seed: int = 0,
    text: str | None = None,
    clear: Callable[[tuple[np.ndarray, ...]], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, targets, attention_mask, positions), each (B, T); one kind of row for each thing that bugs hide from.

    Rows: plain, left-padded, right-padded, fully masked, positions with gaps, a single kept token. (Positions beyond
    4,000 stand in `far_positions`: their angles are so noisy in float32 that they would blunt every gradient.)
    Targets are the next kept token, PAD where there is none. `clear(batch)` tells per row whether its discrete choices
    (experts) are clear; rows that are not are drawn again.
    """
    B, T = SHAPE
    mask = np.ones((B, T), bool)
    mask[1, :3] = False
    mask[2, T - 4 :] = False
    mask[3] = False
    mask[5, 1:] = False
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32)
    positions[4] = [0, 1, 2, 5, 6, 11, 17, 18, 33, 50, 63]
    draws = np.zeros(B, int)
    for _ in range(40):
        tokens = np.stack([_row(config.vocab_size, T, seed, b, int(n), text) for b, n in enumerate(draws)])
        tokens = np.where(mask | (np.arange(B) == 3)[:, None], tokens, 0).astype(np.int32)
        # A PAD that is attended to is an ordinary token, with a gradient of its own; as a target it is ignored.
        tokens[0, 5] = 0
        # So are EOS and BOS, as inputs and as targets: a document ends in the row, and the next one begins. One whose
        # experts are tied, whatever stands before it, is left out again.
        if draws[0] % 4 < 2:
            tokens[0, 7] = min(2, config.vocab_size - 1)
        if draws[0] % 4 in (0, 2):
            tokens[0, 8] = min(1, config.vocab_size - 1)
        targets = np.zeros_like(tokens)
        targets[:, :-1] = np.where(mask[:, :-1] & mask[:, 1:], tokens[:, 1:], 0)
        batch = (tokens, targets, mask, positions)
        settled = np.ones(B, bool) if clear is None else clear(batch)
        if settled.all():
            break
        draws = draws + ~settled
    return batch


def calls_batch(tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, attention mask, far positions) of the calls of other shapes; their mask has gaps as well.

    Padding at an end moves all positions by the same step, which RoPE does not feel; a gap between tokens it does.
    """
    gaps = mask.copy()
    gaps[4, [2, 6]] = False
    return tokens, gaps, far_positions()


def far_positions() -> np.ndarray:
    """(B, T) positions with growing gaps, to beyond 4,000, and a row that begins there."""
    far = np.tile(np.array([0, 1, 5, 17, 64, 300, 1000, 2000, 4001, 4090, 5003], np.int32), (SHAPE[0], 1))
    far[1] = 4096 + np.arange(SHAPE[1])
    return far


@functools.lru_cache(maxsize=8)
def _text_ids(text: str, vocab_size: int) -> list[int]:
    """Ids of a text: the shipped tokenizer's where the vocabulary is the shipped one, else its bytes, wrapped."""
    from parity.shipped import TOKENIZER

    if vocab_size == configuration("shipped").vocab_size:
        from omni_torch.tokenizer import BPETokenizer

        return BPETokenizer(TOKENIZER).encode(text)
    span = max(vocab_size - 3, 1)
    return [min(byte % span + 3, vocab_size - 1) for byte in text.encode()]


def _row(vocab_size: int, length: int, seed: int, row: int, draw: int, text: str | None) -> np.ndarray:
    rng = np.random.default_rng([seed, row, draw])
    if text is None:
        return rng.integers(min(3, vocab_size - 1), vocab_size, length)
    ids = np.asarray(_text_ids(text, vocab_size))
    start = int(rng.integers(0, max(1, len(ids) - length)))
    return np.resize(ids[start : start + length], length)


def clear_experts(tw: Twins, weights: Mapping[str, np.ndarray], precision: str) -> Callable[..., np.ndarray] | None:
    """A `clear` for `stress_batch`: which rows have no expert choice within the noise of `precision`."""
    if not tw.config.use_moe:
        return None
    from parity.noise import measure_program
    from parity.precision import precision as format_of
    from parity.precision import unit_roundoff

    dtype = format_of(precision).numpy
    params = tw.pair.jax_params({k: v.astype(dtype) for k, v in weights.items()})

    def clear(batch):
        args = (params, *batch)
        model = measure_program(tw.forward.program(args, precision), args, draws=6, kappa=False)
        rows = np.ones(SHAPE[0], bool)
        for choice in model.choices:
            # Twice the noise, because it is estimated from few draws here.
            rows &= ~choice.ties(2 * unit_roundoff(precision)).reshape(SHAPE[0], -1).any(1)
        return rows

    return clear
