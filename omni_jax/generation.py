"""Text from a ThinkerLM or OmniLM: prompts in, ids with their log-probabilities out, token by token over a KV cache.

Shapes: B rows (prompts times samples), P prompts, T prompt time, N new tokens, V vocabulary.

A call runs two compiled programs: the prompts up to the first new token, and the loop over all others. Both are
compiled once for a range of calls: prompts and clips are padded to a power of two, the room for new tokens is one from
64 up, and what may differ from call to call (weights, seed, limits, sampling settings) is an argument.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .cache import KVCache, check_window, init_cache
from .config import EOS_ID, PAD_ID, ThinkerConfig
from .layers import check_token_ids, statistics_dtype
from .sampling import (
    _check_integer,
    _check_penalty,
    _check_settings,
    _check_uniform_values,
    _draw,
    _likeliest,
    _penalise,
    _probabilities,
    _truncates,
)
from .senses import power_of_two, senses_of
from .training_utils import NumericalError

__all__ = ["Generation", "generate", "simple_inference"]

_SHORTEST_PROMPT = 16
_LEAST_ROOM = 64
_LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Generation:
    """What `generate` made, row by row.

    tokens: the new ids, without the prompt; the end-of-text id is included where it ended the row. logprobs: the
    log-probability of each under the model itself, that is log_softmax of its logits before penalty, temperature and
    truncation. stop_reasons: "eos", or "length" for a row that reached max_new_tokens.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    stop_reasons: list[Literal["eos", "length"]]


def generate(
    model: Any,
    prompt_ids: Sequence[int] | Sequence[Sequence[int]],
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    num_samples: int = 1,
    eos_id: int | None = EOS_ID,
    seed: int = 0,
    uniforms: Float[Array | np.ndarray, "B N"] | None = None,
    window: bool = False,
    stream: bool = False,
    images: Sequence[Float[Array | np.ndarray, "3 H W"] | None] | None = None,
    mels: Sequence[Float[Array | np.ndarray, "F M"] | None] | None = None,
) -> Any:
    """Continue one prompt or several; every prompt gives num_samples rows, those of the first prompt first.

    prompt_ids: a list of ids, or a list of such lists, of any lengths; each row continues as if it were alone.
    max_new_tokens: None goes on to the model's ctx_len. With `window` there is no such end: every token then sees the
    last ctx_len tokens.
    images, mels: for an OmniLM, before each prompt a picture (3, H, W), all of one size, and a clip (frames, 128) as
    OmniLM.features gives it, None where there is none; they take 1, and frames over downsample_factor, of ctx_len.
    temperature 0 takes the likeliest token; otherwise see truncated_probabilities, and apply_repetition_penalty for
    the ids of the prompt and of what was generated, padding excepted. eos_id None: no id ends a row.
    seed, uniforms: randomness is jax.random.key(seed)'s, or row i takes its token j by uniforms[i, j] in [0, 1), for
    `uniforms` of shape (rows, max_new_tokens); given the same ones the torch twin draws the same ids.

    Returns a Generation, or with `stream` an iterator that yields at each step a list with the new id of every row,
    None for a row that has ended; the model's weights must not change while a stream is open. Dropout is off; the
    model itself is not changed.

    Raises:
        ValueError: an empty prompt, one longer than ctx_len, more new tokens than fit, or a setting out of range; a
            picture or clip that the model cannot read, or a clip of more than ctx_len // 4 vectors, the family's most;
            before any work.
        TokenIdError: a prompt id out of range, likewise.
        NumericalError: the model's logits are NaN or infinite; the message names row and step.
    """
    config: ThinkerConfig = getattr(model, "thinker", model).config
    prompts = _read_prompts(prompt_ids, config.vocab_size)
    senses, counts = senses_of(model, images, mels, len(prompts))
    _check_settings(temperature, top_k, top_p)
    _check_penalty(repetition_penalty)
    check_window(window)
    num_samples = _check_integer("num_samples", num_samples, 1, "use 1 for one continuation of each prompt")
    seed = _check_integer("seed", seed, 0, "give a seed from 0 up")
    if seed > _LARGEST_SEED:
        raise ValueError(f"seed={seed} is not allowed: must be at most {_LARGEST_SEED}; give a smaller seed")
    if eos_id is not None:
        eos_id = _check_integer("eos_id", eos_id, 0, "use None to end no row")
        check_token_ids(np.asarray(eos_id), config.vocab_size, "eos_id")
    rows = len(prompts) * num_samples
    longest = max(before + len(prompt) for before, prompt in zip(counts, prompts, strict=True))
    limit = _new_tokens(longest, max_new_tokens, config.ctx_len, window, senses is not None)
    uniforms_BN = None if uniforms is None else _read_uniforms(uniforms, rows, limit)
    if limit == 0:
        return (
            iter(()) if stream else Generation([[] for _ in range(rows)], [[] for _ in range(rows)], ["length"] * rows)
        )

    vocab_size, ctx_len = config.vocab_size, config.ctx_len
    time = min(ctx_len, power_of_two(longest, _SHORTEST_PROMPT))
    text_time = min(ctx_len, power_of_two(max(map(len, prompts)), _SHORTEST_PROMPT))
    room = power_of_two(ctx_len if max_new_tokens is None else limit, _LEAST_ROOM)
    plan = _Plan(
        slots=ctx_len if window else min(ctx_len, time + room),
        room=room,
        copies=num_samples,
        window=window,
        greedy=temperature == 0.0,
        truncating=_truncates(top_k, top_p, vocab_size),
        penalised=repetition_penalty != 1.0,
    )
    settings = _Settings(
        limit=limit,
        eos_id=-1 if eos_id is None else eos_id,
        temperature=float(temperature),
        top_k=min(int(top_k), vocab_size),
        top_p=float(top_p),
        repetition_penalty=float(repetition_penalty),
    )
    tokens_PT = np.full((len(prompts), text_time), PAD_ID, np.int32)
    for row, prompt in zip(tokens_PT, prompts, strict=True):
        row[text_time - len(prompt) :] = prompt
    starts_P = np.array([text_time - len(prompt) for prompt in prompts], np.int32)
    given = None if uniforms_BN is None or plan.greedy else np.pad(uniforms_BN, ((0, 0), (0, room - limit)))
    # As a tree: nnx.split, and hashing its graphdef at every call of a program, would cost many times as much.
    thinker = getattr(model, "thinker", model)
    weights, structure = jax.tree.flatten(thinker)
    drawn = (given, np.uint32(seed), settings, plan)
    begin = partial(_prefill, structure, weights, tokens_PT, starts_P, *drawn)
    if senses is not None:
        leaves, whole = jax.tree.flatten(model)
        begin = partial(_prefill, whole, leaves, tokens_PT, starts_P, *drawn, senses, time)
    go_on = partial(_decode, structure, weights)
    if stream:
        return _stream(begin, go_on, settings, plan)
    state = go_on(begin(), settings, plan)
    tokens_BN, logprobs_BN, steps, bad_B = jax.device_get((state.tokens_BN, state.logprobs_BN, state.step, state.bad_B))
    _check_numbers(bad_B, int(steps))
    result = Generation([], [], [])
    for tokens, logprobs in zip(tokens_BN[:, :steps].tolist(), logprobs_BN.tolist(), strict=True):
        ended = eos_id in tokens
        kept = tokens[: tokens.index(eos_id) + 1] if ended else tokens
        result.tokens.append(kept)
        result.logprobs.append(logprobs[: len(kept)])
        result.stop_reasons.append("eos" if ended else "length")
    return result


def simple_inference(
    model_path: str | os.PathLike[str],
    tokenizer_path: str | os.PathLike[str],
    prompt: str,
    *,
    config: ThinkerConfig | str | os.PathLike[str] | None = None,
    n_heads: int | None = None,
) -> str:
    """The text of the likeliest token after `prompt`, from a checkpoint and its tokenizer's model file.

    `config` and `n_heads` as in infer_config, where no config lies beside the checkpoint.

    Raises:
        ValueError: a file that cannot be used, a tokenizer whose vocabulary is not the model's, or a prompt longer
            than the model's ctx_len.
    """
    from .prompting import load_model_and_tokenizer

    model, tokenizer, _ = load_model_and_tokenizer(model_path, tokenizer_path, config, n_heads)
    result = generate(model, tokenizer.encode(prompt, add_bos=True), max_new_tokens=1)
    return tokenizer.decode(result.tokens[0])


class _Plan(NamedTuple):
    """What a program is compiled for."""

    slots: int
    room: int
    copies: int
    window: bool
    greedy: bool
    truncating: bool
    penalised: bool


class _Settings(NamedTuple):
    """What may differ between calls of one program."""

    limit: Any
    eos_id: Any
    temperature: Any
    top_k: Any
    top_p: Any
    repetition_penalty: Any


class _State(NamedTuple):
    """The loop's state after `step` tokens."""

    cache: KVCache
    step: Int[Array, ""]
    token_B: Int[Array, " B"]
    ended_B: Bool[Array, " B"]
    bad_B: Bool[Array, " B"]
    tokens_BN: Int[Array, "B N"]
    logprobs_BN: Float[Array, "B N"]
    uniforms_BN: Float[Array, "B N"] | None
    seen_BV: Bool[Array, "B V"] | None


@partial(jax.jit, static_argnames=("structure", "plan", "time"))
def _prefill(
    structure: Any,
    weights: Any,
    tokens_PT: Array,
    starts_P: Array,
    uniforms_BN: Array | None,
    seed: Array,
    settings: _Settings,
    plan: _Plan,
    senses: dict[str, Array] | None = None,
    time: int = 0,
) -> _State:
    """The state after the prompts and the first new token. Prompts stand at the right, from `starts_P` on.

    `senses` are OmniLM.encode's arguments: what stands before the prompts. Of it all, `time` places are enough.
    """
    model = _rebuild(structure, weights)
    thinker = getattr(model, "thinker", model)
    P, T = tokens_PT.shape
    kept_PT = jnp.arange(T, dtype=starts_P.dtype)[None] >= starts_P[:, None]
    inputs: dict[str, Any] = {"tokens": tokens_PT}
    if senses is not None:
        before_PND, there_PN = model.encode(**senses)
        x_PTD = jnp.concatenate([before_PND, thinker.tok_emb(tokens_PT)], axis=1)
        kept_PT = jnp.concatenate([there_PN, kept_PT], axis=1)
        # Padding goes to the left, the rest keeps its order: from here on a row is as a prompt of tokens.
        order_PT = jnp.argsort(kept_PT, axis=1, stable=True)[:, -time:]
        kept_PT = jnp.take_along_axis(kept_PT, order_PT, axis=1)
        inputs = {"embeddings": jnp.take_along_axis(x_PTD, order_PT[:, :, None], axis=1)}
        starts_P = jnp.sum(~kept_PT, axis=1, dtype=starts_P.dtype)
    cache = init_cache(thinker, P, plan.slots, plan.window)
    logits_P1V, cache = thinker(**inputs, attention_mask=kept_PT, cache=cache, last_only=True)
    # The padding that every row has gives its slots back: they are rolled to the end, where the next tokens go.
    padding = jnp.min(starts_P)
    k, v, kept_PS = jax.tree.map(lambda x: jnp.roll(x, -padding, axis=1), (cache.k, cache.v, cache.kept))
    cache = replace(cache, k=k, v=v, kept=kept_PS, length=cache.length - padding)
    seen_PV = None
    if plan.penalised:
        seen_PV = (
            jnp.zeros((P, logits_P1V.shape[2]), jnp.bool_)
            .at[jnp.arange(P, dtype=tokens_PT.dtype)[:, None], tokens_PT]
            .set(True)
        )
        seen_PV = seen_PV.at[:, PAD_ID].set(False)
    logits_PV, k, v, kept_PS, count_P, seen_PV = jax.tree.map(
        lambda x: jnp.repeat(x, plan.copies, axis=0),
        (logits_P1V[:, 0], cache.k, cache.v, cache.kept, cache.count, seen_PV),
    )
    B, dtype = P * plan.copies, statistics_dtype(logits_PV.dtype)
    if plan.greedy:
        uniforms_BN = None
    elif uniforms_BN is None:
        # Step by step, so that a larger room draws the same first numbers.
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(plan.room, dtype=jnp.uint32))
        uniforms_BN = jax.vmap(lambda key: jax.random.uniform(key, (B,), jnp.float32), out_axes=1)(keys)
    state = _State(
        cache=replace(cache, k=k, v=v, kept=kept_PS, count=count_P),
        step=jnp.zeros((), jnp.int32),
        token_B=jnp.zeros((B,), jnp.int32),
        ended_B=jnp.zeros((B,), jnp.bool_),
        bad_B=jnp.zeros((B,), jnp.bool_),
        tokens_BN=jnp.full((B, plan.room), PAD_ID, jnp.int32),
        logprobs_BN=jnp.zeros((B, plan.room), dtype),
        uniforms_BN=None if uniforms_BN is None else uniforms_BN.astype(dtype),
        seen_BV=seen_PV,
    )
    return _choose(logits_PV, state, settings, plan)


@partial(jax.jit, static_argnames=("structure", "plan"), donate_argnames="state")
def _decode(structure: Any, weights: Any, state: _State, settings: _Settings, plan: _Plan) -> _State:
    """The state after `settings.limit` tokens, or where every row has ended or one went bad."""
    model = _rebuild(structure, weights)

    def goes_on(state: _State) -> Array:
        return (state.step < settings.limit) & ~jnp.all(state.ended_B) & ~jnp.any(state.bad_B)

    def advance(state: _State) -> _State:
        logits_B1V, cache = model(state.token_B[:, None], cache=state.cache, last_only=True)
        return _choose(logits_B1V[:, 0], state._replace(cache=cache), settings, plan)

    return lax.while_loop(goes_on, advance, state)


def _choose(logits_BV: Array, state: _State, settings: _Settings, plan: _Plan) -> _State:
    """The state with one more token in every row; PAD in those that have ended."""
    logits_BV = logits_BV.astype(state.logprobs_BN.dtype)
    largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    log_sum_B1 = jnp.log(jnp.sum(jnp.exp(logits_BV - largest_B1), axis=-1, keepdims=True))
    shaped_BV, seen_BV = logits_BV, state.seen_BV
    if seen_BV is not None:
        shaped_BV = _penalise(logits_BV, seen_BV, settings.repetition_penalty)
    if state.uniforms_BN is None:
        token_B = _likeliest(shaped_BV)
    else:
        p_BV = _probabilities(shaped_BV, settings.temperature, settings.top_k, settings.top_p, plan.truncating)
        token_B = _draw(p_BV, lax.dynamic_index_in_dim(state.uniforms_BN, state.step, axis=1, keepdims=False))
    logprob_B1 = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1) - largest_B1 - log_sum_B1
    token_B = jnp.where(state.ended_B, PAD_ID, token_B)
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(token_B), dtype=token_B.dtype), token_B].set(token_B != PAD_ID)
    at = (jnp.zeros_like(state.step), state.step)
    return state._replace(
        step=state.step + 1,
        token_B=token_B,
        ended_B=state.ended_B | (token_B == settings.eos_id),
        # The sum is not finite exactly if a logit is NaN or +inf, or all are −inf.
        bad_B=~state.ended_B & ~jnp.isfinite(largest_B1 + log_sum_B1)[:, 0],
        tokens_BN=lax.dynamic_update_slice(state.tokens_BN, token_B[:, None], at),
        logprobs_BN=lax.dynamic_update_slice(state.logprobs_BN, logprob_B1, at),
        seen_BV=seen_BV,
    )


def _stream(begin: Any, go_on: Any, settings: _Settings, plan: _Plan) -> Iterator[list[int | None]]:
    """The same two programs, the second with a limit that moves on token by token."""
    state, ended = begin(), None
    for step in range(1, settings.limit + 1):
        if step > 1:
            state = go_on(state, settings._replace(limit=step), plan)
        token_B, ended_B, bad_B = jax.device_get((state.token_B, state.ended_B, state.bad_B))
        _check_numbers(bad_B, step)
        yield [None if ended is not None and ended[i] else token for i, token in enumerate(token_B.tolist())]
        ended = ended_B
        if ended.all():
            return


def _rebuild(structure: Any, weights: Any) -> Any:
    """The model inside a program: a copy, in evaluation mode whatever mode it was given in."""
    model = jax.tree.unflatten(structure, weights)
    model.eval()
    return model


def _read_prompts(prompt_ids: Any, vocab_size: int) -> list[np.ndarray]:
    try:
        nested = len(prompt_ids) > 0 and np.ndim(prompt_ids[0]) > 0
    except (TypeError, KeyError, ValueError):  # no sequence, or lists of different depth
        nested = False
    prompts = []
    for i, prompt in enumerate(prompt_ids if nested else [prompt_ids]):
        name = f"prompt_ids[{i}]" if nested else "prompt_ids"
        try:
            ids = np.asarray(prompt)
        except (TypeError, ValueError):  # numpy cannot make an array of it
            ids = np.empty(0)
        if ids.ndim != 1 or len(ids) == 0 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"{name} must be a list of at least one token id, all integers, got {prompt!r:.60}; begin with the "
                "tokenizer's BOS"
            )
        check_token_ids(ids, vocab_size, name)
        prompts.append(ids)
    return prompts


def _new_tokens(longest: int, max_new_tokens: int | None, ctx_len: int, window: bool, senses: bool) -> int:
    what = "a prompt, with its picture and clip," if senses else "a prompt"
    if longest > ctx_len:
        fix = "give less of them" if senses else f"cut it, for example to its last {ctx_len}"
        raise ValueError(
            f"the{what.removeprefix('a')} has {longest} tokens, allowed are up to ctx_len={ctx_len}; {fix}"
        )
    if max_new_tokens is None:
        return ctx_len - longest
    max_new_tokens = _check_integer("max_new_tokens", max_new_tokens, 0, "leave it out to go on to the model's ctx_len")
    if longest + max_new_tokens > ctx_len and not window:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} after {what} of {longest} tokens goes beyond ctx_len={ctx_len}: must "
            f"be at most {ctx_len - longest}; ask for fewer, or pass window=True to let the oldest tokens go"
        )
    return max_new_tokens


def _read_uniforms(uniforms: Any, rows: int, limit: int) -> np.ndarray:
    try:
        uniforms_BN = np.asarray(uniforms)
    except (TypeError, ValueError):
        raise ValueError(
            f"uniforms are a {type(uniforms).__name__} that is no array of numbers; pass an array"
        ) from None
    if uniforms_BN.shape != (rows, limit) or not jnp.issubdtype(uniforms_BN.dtype, jnp.floating):
        raise ValueError(
            f"uniforms have shape {uniforms_BN.shape} and dtype {uniforms_BN.dtype}: must be floating point "
            f"of shape (rows, max_new_tokens) = {(rows, limit)}; give one number per new token"
        )
    _check_uniform_values("uniforms", uniforms_BN)
    return uniforms_BN


def _check_numbers(bad_B: np.ndarray, steps: int) -> None:
    if bad_B.any():
        raise NumericalError(
            f"the logits of row {int(np.flatnonzero(bad_B)[0])} at step {steps - 1} hold NaN or inf, or nothing but "
            "-inf; look at the model's weights (check_numerical_stability finds the first bad one)"
        )
