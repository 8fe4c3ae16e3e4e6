"""The twins' functions as subjects of the search: what each takes, in shapes few enough to be compiled once.

Shapes: B batch, T time, D model, H heads, K key/value heads, d head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from parity.pair import Pair, pair_of
from parity.search import Example, Subject
from parity.search_inputs import PATTERNS, choice, floats, integers, mask, number

__all__ = ["subjects"]

D, F, V, E = 6, 10, 9, 4
SHAPES = ((1, 1), (1, 3), (2, 5))
"""Batch and time."""
MILD = tuple(pattern for pattern in PATTERNS if pattern != "one large")
_EPS = float(np.finfo(np.float32).eps)


def subjects() -> list[Subject]:
    """Made anew at each call, from the functions as they stand."""
    made = [
        *_norms(), _attention(), _masks(), _rope(), *_mlps(), _moe(), _embedding(), _cross_entropy(),
        _truncated(), _penalty(), _sample(), _adamw(), _clipping(), _schedule(), _mel(), _log_mel(), *_models(),
    ]  # fmt: skip
    return made


# ------------------------------------------------------------------------------------------------ making pairs


def _functions(ours: Callable[..., Any], theirs: Callable[..., Any], name: str) -> Pair:
    """A pair of functions without parameters."""
    return pair_of(
        lambda params, *inputs: ours(*inputs), lambda params, *inputs: theirs(*inputs), {}, torch_shapes={}, name=name
    )


def _modules(ours: Callable[..., Any], theirs: Callable[[], Any], name: str, sloped: bool = True) -> Pair:
    """A pair of modules of one input; with `sloped` the gradient of the input is an output as well."""
    from flax import nnx

    abstract = nnx.eval_shape(lambda: ours(rngs=nnx.Rngs(0)))
    abstract.eval()
    graphdef, template, rest = nnx.split(abstract, nnx.Param, ...)
    run = lambda params, x: nnx.merge(graphdef, params, rest)(x)  # noqa: E731
    if not sloped:
        return pair_of(run, theirs().eval(), template, name=name, taps={})
    return pair_of(
        lambda params, x: _slope(lambda x: run(params, x), x),
        theirs().eval(),
        template,
        torch_call=lambda module, x: _torch_slope(module, x),
        name=name,
        taps={},
    )


def _pull(shape: tuple[int, ...]) -> np.ndarray:
    """Small whole numbers, the same on both sides: what a gradient is pulled with."""
    return ((np.arange(math.prod(shape)) * 7 % 5) - 1.0).reshape(shape)


def _slope(f: Callable[..., Any], *xs: Any) -> dict[str, Any]:
    """f's output and the gradients of its inputs."""
    import jax
    import jax.numpy as jnp

    out, back = jax.vjp(f, *xs)
    gradients = back(jnp.asarray(_pull(out.shape), out.dtype))
    return {"output": out} | {f"slope{i}": g for i, g in enumerate(gradients)}


def _torch_slope(f: Callable[..., Any], *xs: Any) -> dict[str, Any]:
    import torch

    with torch.enable_grad():
        leaves = [x if x.requires_grad else x.detach().requires_grad_(True) for x in xs]
        out = f(*leaves)
        kept = any(x.requires_grad for x in xs)
        gradients = torch.autograd.grad(
            out, leaves, torch.from_numpy(_pull(tuple(out.shape))).to(out.dtype), create_graph=kept
        )
    return {"output": out} | {f"slope{i}": g for i, g in enumerate(gradients)}


def _weights(pair: Pair, number: int) -> dict[str, np.ndarray]:
    """Weights by number: of ordinary size, loud, quiet, and again."""
    rng = np.random.default_rng([number, 5])
    gain = (1.0, 8.0, 1.0 / 64)[number % 3]
    shapes = {name: tuple(value.shape) for name, value in pair.torch.named_parameters()}
    made = {}
    for name, shape in shapes.items():
        if len(shape) == 1 and name.endswith("weight"):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = rng.standard_normal(shape) * gain / math.sqrt(shape[-1])
        made[name] = value.astype(np.float32)
    return made


def _single(
    name: str, make: Callable[[], Pair], weights: Callable[[Pair, int], dict[str, np.ndarray]] = _weights, **how: Any
) -> Subject:
    """A module that takes (B, T, D)."""

    def draw(d: Callable[..., Any]) -> Example:
        shape = (*choice(d, SHAPES), D)
        return Example((floats(d, shape, **how),), weights=number(d, 0, 5))

    return Subject(name, lambda variant: make(), draw, weights, smooth=(0,))


# ------------------------------------------------------------------------------------------------ layers


def _norms() -> list[Subject]:
    import omni_jax.layers
    import omni_jax.vision_encoder
    import omni_torch.layers

    def rms() -> Pair:
        return _modules(
            lambda rngs: omni_jax.layers.RMSNorm(D, rngs=rngs), lambda: omni_torch.layers.RMSNorm(D), "norm"
        )

    def layer() -> Pair:
        import jax.numpy as jnp
        import torch

        kinds: dict[str, Any] = {"dtype": None, "param_dtype": jnp.float32}
        return _modules(
            lambda rngs: omni_jax.vision_encoder._LayerNorm(D, rngs=rngs, **kinds),
            lambda: torch.nn.LayerNorm(D, eps=1e-5),
            "layer-norm",
            # torch's kernel has the gradient as a·dy + b·x + c, which cancels where rows are nearly constant.
            sloped=False,
        )

    return [_single("rms-norm", rms), _single("layer-norm", layer)]


def _attention() -> Subject:
    import omni_jax.attention
    import omni_torch.attention

    def make(sloped: Any) -> Pair:
        ours, theirs = omni_jax.attention.attend, omni_torch.attention.attend
        if not sloped:
            return _functions(ours, theirs, "attention")
        return _functions(
            lambda q, k, v, m: _slope(lambda q, k, v: ours(q, k, v, m), q, k, v),
            lambda q, k, v, m: _torch_slope(lambda q, k, v: theirs(q, k, v, m), q, k, v),
            "attention",
        )

    def draw(d: Callable[..., Any]) -> Example:
        B, T = choice(d, SHAPES)
        H, K, size = 4, choice(d, (4, 2)), 6
        # The gradient of a softmax that has settled on one key is a difference of equal numbers, whoever takes it.
        sloped = choice(d, (False, True))
        how: dict[str, Any] = {"sizes": (-30, 0), "patterns": MILD} if sloped else {"sizes": (-30, 2)}
        q = floats(d, (B, T, H, size), offsets=False, **how)
        k = floats(d, (B, T, K, size), offsets=False, **how)
        v = floats(d, (B, T, K, size), (-30, 4), not sloped)
        keep = mask(d, B, T)[:, None, :] & (np.tril(np.ones((T, T), bool)) | choice(d, (False, True)))
        return Example((q, k, v, keep), variant=sloped)

    return Subject("attention", make, draw, smooth=(0, 1, 2))


def _masks() -> Subject:
    import omni_jax.attention as ours
    import omni_torch.attention as theirs

    def both(library: Any) -> Callable[..., Any]:
        return lambda m: {
            "mask": library.make_attention_mask(*m.shape[:2], m),
            "positions": library.default_positions(m.shape[1], m),
        }

    def draw(d: Callable[..., Any]) -> Example:
        B, T = choice(d, SHAPES)
        kept = mask(d, B, T)
        return Example((kept if choice(d, (True, False)) else kept[:, None, :] & np.tril(np.ones((T, T), bool)),))

    return Subject("masks", lambda v: _functions(both(ours), both(theirs), "masks"), draw, precisions=("float64",))


def _rope() -> Subject:
    import omni_jax.layers as ours
    import omni_torch.layers as theirs

    def make(variant: Any) -> Pair:
        def turn(library: Any) -> Callable[..., Any]:
            def run(x, positions):
                cos, sin = library.rope_frequencies(positions, x.shape[-1], variant, x.dtype)
                return {"cos": cos, "sin": sin, "turned": library.apply_rope(x, cos, sin)}

            return run

        return _functions(turn(ours), turn(theirs), "rope")

    def draw(d: Callable[..., Any]) -> Example:
        B, T = choice(d, SHAPES)
        far = integers(d, (B, T), 0, choice(d, (10, 5000, 1 << 20)))
        return Example((floats(d, (B, T, 2, 6)), far), variant=choice(d, (10000.0, 500000.0)))

    return Subject("rope", make, draw, smooth=(0,))


def _mlps() -> list[Subject]:
    import omni_jax.layers as ours
    import omni_torch.layers as theirs

    def mlp(name: str) -> Callable[[], Pair]:
        left, right = getattr(ours, name), getattr(theirs, name)
        return lambda: _modules(lambda rngs: left(D, F, rngs=rngs), lambda: right(D, F), name)

    # Smaller inputs of a product of two have results below float32's smallest normal number: XLA takes them for zero,
    # which is in the noise but not in the conditioning, so that it is UNSTABLE.
    return [_single("swiglu", mlp("SwiGLU"), sizes=(-12, 2)), _single("gelu", mlp("GELUMLP"))]


def _moe() -> Subject:
    import omni_jax.layers as ours
    import omni_torch.layers as theirs

    def make(variant: Any) -> Pair:
        settings = {"num_experts": E, "num_experts_per_tok": 2, "use_swiglu": variant}
        return _modules(
            lambda rngs: ours.MoE(D, F, **settings, rngs=rngs), lambda: theirs.MoE(D, F, **settings), "moe", False
        )

    def weights(pair: Pair, number: int) -> dict[str, np.ndarray]:
        """Number 0: a router of zeros, so that every expert is exactly as good as any other."""
        made = _weights(pair, number)
        if number == 0:
            made["router.weight"][:] = 0.0
        return made

    def draw(d: Callable[..., Any]) -> Example:
        # Smaller ones have products below float32's smallest normal number. XLA takes them for zero, which is in the
        # noise but not in the conditioning, so that it is UNSTABLE.
        x, number_ = floats(d, (*choice(d, SHAPES), D), (-12, 2)), number(d, 0, 5)
        return Example((x,), weights=number_, variant=choice(d, (True, False)), exact=number_ == 0)

    return Subject("moe", make, draw, weights)


def _embedding() -> Subject:
    import omni_jax.layers as ours
    import omni_torch.layers as theirs

    def make(variant: Any) -> Pair:
        return _modules(
            lambda rngs: ours.TokenEmbedding(V, D, rngs=rngs), lambda: theirs.TokenEmbedding(V, D), "embedding", False
        )

    def draw(d: Callable[..., Any]) -> Example:
        reach = choice(d, (0, 3))
        ids = integers(d, choice(d, SHAPES), -reach, V - 1 + reach)
        return Example((ids,), weights=number(d, 0, 5))

    return Subject("embedding", make, draw, _weights)


# ------------------------------------------------------------------------------------------------ loss, sampling


def _cross_entropy() -> Subject:
    import omni_jax.losses
    import omni_torch.losses

    def make(sloped: Any) -> Pair:
        ours, theirs = omni_jax.losses.cross_entropy, omni_torch.losses.cross_entropy
        if not sloped:
            return _functions(ours, theirs, "cross-entropy")
        return _functions(
            lambda x, t: _slope(lambda x: ours(x, t), x), lambda x, t: _torch_slope(lambda x: theirs(x, t), x), "loss"
        )

    def draw(d: Callable[..., Any]) -> Example:
        shape = choice(d, SHAPES)
        # torch takes the gradient as exp(x - logsumexp), whose exponent it has rounded; JAX's x - max is often exact.
        sloped = choice(d, (False, True))
        logits = floats(d, (*shape, V), (-30, 0), False, MILD) if sloped else floats(d, (*shape, V))
        if choice(d, (False, True)):
            logits[..., number(d, 0, V - 1)] = -np.inf
        reach = choice(d, (0, 0, 0, 3))
        targets = integers(d, shape, -reach, V - 1 + reach)
        return Example((logits, targets), variant=sloped)

    return Subject("cross-entropy", make, draw)


SETTINGS = ((1.0, 3, 1.0), (1.0, 0, 1.0), (0.3, 0, 0.7), (1.7, 5, 0.5), (0.0, 0, 1.0))
"""temperature, top-k, top-p"""


def _truncated() -> Subject:
    import omni_jax.sampling as ours
    import omni_torch.sampling as theirs

    def make(setting: Any) -> Pair:
        return _functions(
            lambda x: ours.truncated_probabilities(x, *setting),
            lambda x: theirs.truncated_probabilities(x, *setting),
            "truncated-probabilities",
        )

    def draw(d: Callable[..., Any]) -> Example:
        import hypothesis

        setting = choice(d, SETTINGS)
        logits = floats(d, (choice(d, (1, 3)), V))
        if choice(d, (False, True)):
            logits[:, number(d, 1, V - 1)] = -np.inf
        temperature, top_k, top_p = setting
        if top_p < 1.0:  # where a sum of rounded numbers is p, another set is as right
            wide = np.sort(logits.astype(np.float64), -1)[:, ::-1][:, : top_k or None]
            sums = np.cumsum(np.exp((wide - wide[:, :1]) / temperature), -1)
            hypothesis.assume(np.abs(sums / sums[:, -1:] - top_p).min() > 4 * V * _EPS)
        return Example((logits,), variant=setting)

    return Subject("truncated-probabilities", make, draw, share=0.7)


def _penalty() -> Subject:
    import omni_jax.sampling as ours
    import omni_torch.sampling as theirs

    def make(penalty: Any) -> Pair:
        return _functions(
            lambda x, seen: ours.apply_repetition_penalty(x, seen, penalty),
            lambda x, seen: theirs.apply_repetition_penalty(x, seen, penalty),
            "repetition-penalty",
        )

    def draw(d: Callable[..., Any]) -> Example:
        logits = floats(d, (choice(d, (1, 3)), V))
        return Example((logits, mask(d, len(logits), V)), variant=choice(d, (1.0, 1.3, 0.8)))

    return Subject("repetition-penalty", make, draw)


def _sample() -> Subject:
    import omni_jax.sampling as ours
    import omni_torch.sampling as theirs

    def draw(d: Callable[..., Any]) -> Example:
        import hypothesis

        B = choice(d, (1, 3))
        p = np.abs(floats(d, (B, V), (-20, 4), False))
        rng = np.random.default_rng(number(d, 0, 99))
        u = np.where(rng.random(B) < 0.2, 0.0, rng.integers(0, 64, B) / 64).astype(np.float32)
        sums = np.cumsum(p.astype(np.float64), -1)
        hypothesis.assume(bool((sums[:, -1] > 0).all()))
        gaps = np.abs(sums / sums[:, -1:] - u[:, None])
        # Where the uniform is the end of an id, the next one is as right; at 0 both take the first that has any.
        hypothesis.assume(bool((gaps > 4 * V * _EPS).all() or (p > 0).all()))
        hypothesis.assume(bool((gaps[u > 0] > 4 * V * _EPS).all()))
        return Example((p, u))

    return Subject("sample", lambda v: _functions(ours.sample, theirs.sample, "sample"), draw, share=0.7)


# ------------------------------------------------------------------------------------------------ optimizer


def _adamw() -> Subject:
    import omni_jax.optim
    import omni_torch.optim

    def ours(p, g, m, v, t):
        new, state = omni_jax.optim.adamw_step(p, g, omni_jax.optim.AdamWState(m, v, t), 0.1)
        return {"p": new, "m": state.m, "v": state.v}

    def theirs(p, g, m, v, t):
        p, state = p.clone(), omni_torch.optim.AdamWState(m.clone(), v.clone(), int(t))
        omni_torch.optim.adamw_step_(p, g, state, 0.1)
        return {"p": p, "m": state.m, "v": state.v}

    def draw(d: Callable[..., Any]) -> Example:
        shape = choice(d, ((1,), (5,), (2, 3)))
        p, g = floats(d, shape), floats(d, shape, (-30, 15), False)
        started = number(d, 0, 3) > 0
        m = floats(d, shape, (-30, 4), False) if started else np.zeros(shape, np.float32)
        v = np.abs(floats(d, shape, (-30, 8), False)) if started else np.zeros(shape, np.float32)
        return Example((p, g, m, v, np.array(number(d, 1, 100000) if started else 0, np.int32)))

    return Subject("adamw", lambda variant: _functions(ours, theirs, "adamw"), draw)


def _clipping() -> Subject:
    import omni_jax.optim
    import omni_torch.optim

    def make(most: Any) -> Pair:
        def ours(a, b):
            (a, b), norm = omni_jax.optim.clip_grad_norm((a, b), most)
            return {"a": a, "b": b, "norm": norm}

        def theirs(a, b):
            a, b = a.clone(), b.clone()
            return {"norm": omni_torch.optim.clip_grad_norm_([a, b], most), "a": a, "b": b}

        return _functions(ours, theirs, "clipping")

    def draw(d: Callable[..., Any]) -> Example:
        return Example((floats(d, (2, 3), (-15, 15)), floats(d, (5,), (-15, 15))), variant=choice(d, (1.0, 0.001)))

    return Subject("clipping", make, draw)


def _schedule() -> Subject:
    import omni_jax.optim
    import omni_torch.optim

    def make(variant: Any) -> Pair:
        import torch

        def theirs(step):
            return torch.tensor(omni_torch.optim.warmup_cosine(int(step), *variant), dtype=torch.float64)

        return _functions(lambda step: omni_jax.optim.warmup_cosine(step, *variant), theirs, "schedule")

    def draw(d: Callable[..., Any]) -> Example:
        variant = choice(d, ((0, 6), (3, 10), (100, 10000)))
        ends = (number(d, 0, variant[1] + 3), *variant, variant[0] + 1, variant[1] - 1, 1 << 30)
        return Example((np.array(choice(d, ends), np.int32),), variant=variant)

    return Subject("schedule", make, draw, precisions=("float64",), share=0.5)


# ------------------------------------------------------------------------------------------------ audio


def _mel() -> Subject:
    import omni_jax.audio
    import omni_torch.audio

    def make(variant: Any) -> Pair:
        pad, power = variant
        settings = {"n_fft": 16, "hop_length": 5, "n_mels": 4, "pad_mode": pad, "power": power}
        return _functions(
            lambda x: omni_jax.audio.mel_spectrogram(x, **settings),
            lambda x: omni_torch.audio.mel_spectrogram(x, **settings),
            "mel",
        )

    def draw(d: Callable[..., Any]) -> Example:
        wave = floats(d, (choice(d, (9, 17, 33)),), (-12, 4))
        return Example((wave,), variant=choice(d, (("reflect", 2.0), ("constant", 1.0))))

    return Subject("mel", make, draw, share=0.7)


def _log_mel() -> Subject:
    import omni_jax.audio as ours
    import omni_torch.audio as theirs

    def draw(d: Callable[..., Any]) -> Example:
        return Example((np.abs(floats(d, choice(d, ((1,), (3, 5))))),))

    return Subject("log-mel", lambda v: _functions(ours.log_mel, theirs.log_mel, "log-mel"), draw)


# ------------------------------------------------------------------------------------------------ whole models


def _models() -> list[Subject]:
    from parity.fixtures import configuration, random_weights, twins

    def model(name: str) -> Subject:
        config = configuration(name)

        def make(variant: Any) -> Pair:
            import dataclasses

            return dataclasses.replace(twins(name).pair, loss=None, taps={})

        def draw(d: Callable[..., Any]) -> Example:
            B, T = choice(d, ((1, 1), (2, 5)))
            kept = mask(d, B, T)
            tokens = integers(d, (B, T), 0, config.vocab_size - 1)
            far = choice(d, (0, 0, 50, 4096))
            positions = np.maximum(np.cumsum(kept, 1) - 1, 0).astype(np.int32) + far
            return Example((tokens, tokens, kept, positions.astype(np.int32)), weights=number(d, 0, 2))

        weights = lambda pair, seed: random_weights(config, seed)  # noqa: E731
        return Subject(f"thinker {name}", make, draw, weights, share=0.3)

    return [model("mha-swiglu"), model("moe-gqa-gelu")]
