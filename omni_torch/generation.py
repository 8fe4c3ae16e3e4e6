"""Text from a ThinkerLM or OmniLM: prompts in, ids with their log-probabilities out, token by token over a KV cache.

Shapes: B rows (prompts times samples), P prompts, T prompt time, N new tokens, D model, V vocabulary.

The prompts go through the model in one call, and each token after the first in one more, on the same buffers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from .cache import KVCache, check_window, init_cache
from .config import EOS_ID, PAD_ID, ThinkerConfig
from .layers import TokenEmbedding, check_token_ids, dtype_name, statistics_dtype
from .sampling import (
    _check_integer,
    _check_penalty,
    _check_settings,
    _check_uniform_values,
    _draw,
    _likeliest,
    _penalise,
    _probabilities,
)
from .senses import senses_of
from .training_utils import NumericalError

__all__ = ["Generation", "generate", "simple_inference"]

_LARGEST_SEED = 2**32 - 1
_STEPS_THAT_PAY = 32


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
    uniforms: Float[Tensor, "B N"] | None = None,
    window: bool = False,
    stream: bool = False,
    images: Sequence[Float[Tensor, "3 H W"] | None] | None = None,
    mels: Sequence[Float[Tensor, "F M"] | None] | None = None,
) -> Any:
    """Continue one prompt or several; every prompt gives num_samples rows, those of the first prompt first.

    prompt_ids: a list of ids, or a list of such lists, of any lengths; each row continues as if it were alone.
    max_new_tokens: None goes on to the model's ctx_len. With `window` there is no such end: every token then sees the
    last ctx_len tokens.
    images, mels: for an OmniLM, before each prompt a picture (3, H, W), all of one size, and a clip (frames, 128) as
    OmniLM.features gives it, None where there is none; they take 1, and frames over downsample_factor, of ctx_len.
    temperature 0 takes the likeliest token; otherwise see truncated_probabilities, and apply_repetition_penalty for
    the ids of the prompt and of what was generated, padding excepted. eos_id None: no id ends a row.
    seed, uniforms: randomness is that of a torch.Generator with this seed, or row i takes its token j by
    uniforms[i, j] in [0, 1), for `uniforms` of shape (rows, max_new_tokens); given the same ones the JAX twin draws
    the same ids.

    Returns a Generation, or with `stream` an iterator that yields at each step a list with the new id of every row,
    None for a row that has ended; the model's weights must not change while a stream is open. Dropout is off; the
    model itself is not changed. A model from torch.compile is called as it is.

    Raises:
        ValueError: an empty prompt, one longer than ctx_len, more new tokens than fit, a setting out of range, or a
            compiled model in training mode; a picture or clip that the model cannot read, or a clip of more than
            ctx_len // 4 vectors, the family's most; before any work.
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
        check_token_ids(torch.tensor(eos_id), config.vocab_size, "eos_id")
    rows = len(prompts) * num_samples
    longest = max(before + len(prompt) for before, prompt in zip(counts, prompts, strict=True))
    limit = _new_tokens(longest, max_new_tokens, config.ctx_len, window, senses is not None)
    uniforms_BN = None if uniforms is None else _read_uniforms(uniforms, rows, limit)
    _check_mode(model)
    job = _Job(
        omni=None if senses is None else model,
        senses=senses,
        prompts=prompts,
        limit=limit,
        temperature=float(temperature),
        top_k=int(top_k),
        top_p=float(top_p),
        repetition_penalty=float(repetition_penalty),
        num_samples=num_samples,
        eos_id=eos_id,
        seed=seed,
        uniforms_BN=uniforms_BN,
        window=window,
    )
    model = getattr(model, "thinker", model)
    if stream:
        return (tokens for tokens, _ in _steps(model, job))
    result = Generation([[] for _ in range(rows)], [[] for _ in range(rows)], ["length"] * rows)
    for tokens, logprobs in _steps(model, job):
        for row, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            if token is not None:
                result.tokens[row].append(token)
                result.logprobs[row].append(logprob)
                if token == eos_id:
                    result.stop_reasons[row] = "eos"
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


@dataclass(frozen=True)
class _Job:
    """A call of `generate`, checked; `senses` is what `omni` encodes before the prompts."""

    omni: Any
    senses: dict[str, Any] | None
    prompts: list[np.ndarray]
    limit: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    num_samples: int
    eos_id: int | None
    seed: int
    uniforms_BN: Tensor | None
    window: bool


def _steps(model: Any, job: _Job) -> Iterator[tuple[list[int | None], list[float]]]:
    """The ids and log-probabilities of each step."""
    # inference_mode is left at every yield: it would reach into the caller's code.
    if job.limit == 0:
        return
    with torch.inference_mode():
        model = _for_decoding(model, job.limit)
        logits_BV, cache, seen_BV = _prefill(model, job)
        uniforms_BN = _uniforms(job, logits_BV)
        ended_B = torch.zeros(len(logits_BV), dtype=torch.bool, device=logits_BV.device)
    ended = [False] * len(logits_BV)
    for step in range(job.limit):
        with torch.inference_mode():
            if step > 0:
                logits_B1V, cache = model(token_B[:, None], cache=cache, last_only=True)
                logits_BV = logits_B1V[:, 0]
            logits_BV = logits_BV.to(statistics_dtype(logits_BV.dtype))
            if any(ended):  # what such a row computes from its padding is nobody's business
                logits_BV = logits_BV.masked_fill(ended_B[:, None], 0.0)
            log_sum_B = logits_BV.logsumexp(dim=-1)
            token_B = _choose(logits_BV, seen_BV, uniforms_BN, step, job).masked_fill(ended_B, PAD_ID)
            logprob_B = logits_BV.gather(1, token_B[:, None])[:, 0] - log_sum_B
            log_sums, logprobs, tokens = _to_host(log_sum_B, logprob_B, token_B)
            _check_numbers(log_sums, step)
            if job.eos_id is not None:
                ended_B |= token_B == job.eos_id
        yield [None if end else token for end, token in zip(ended, tokens, strict=True)], logprobs
        ended = [end or token == job.eos_id for end, token in zip(ended, tokens, strict=True)]
        if all(ended):
            return


def _prefill(model: Any, job: _Job) -> tuple[Tensor, KVCache, Tensor | None]:
    """Logits (B, V) after the prompts, the cache, and which ids (B, V) the prompts hold, if that matters."""
    device, copies = model.tok_emb.weight.device, job.num_samples
    P, T = len(job.prompts), max(map(len, job.prompts))
    tokens_PT = torch.full((P, T), PAD_ID)
    kept_PT = torch.zeros(P, T, dtype=torch.bool)
    for row, prompt in enumerate(job.prompts):
        tokens_PT[row, T - len(prompt) :] = torch.from_numpy(prompt)
        kept_PT[row, T - len(prompt) :] = True
    tokens_PT, kept_PT = tokens_PT.to(device), kept_PT.to(device)
    inputs: dict[str, Any] = {"tokens": tokens_PT, "attention_mask": kept_PT}
    if job.senses is not None:
        inputs = _fused_prompts(model, job, tokens_PT, kept_PT)
        T = inputs["attention_mask"].shape[1]
    ctx_len = model.config.ctx_len
    cache = init_cache(model, P, ctx_len if job.window else min(ctx_len, T + job.limit), job.window)
    logits_P1V, cache = model(**inputs, cache=cache, last_only=True)
    logits_PV, seen_PV = logits_P1V[:, 0], None
    if job.repetition_penalty != 1.0:
        seen_PV = torch.zeros_like(logits_PV, dtype=torch.bool).scatter_(1, tokens_PT, True)
        seen_PV[:, PAD_ID] = False
    if copies == 1:
        return logits_PV, cache, seen_PV

    def repeat(x: Tensor) -> Tensor:
        return x.repeat_interleave(copies, dim=0)

    with torch.inference_mode(False):  # as init_cache makes them: a compiled model tells the two apart
        k, v = tuple(map(repeat, cache.k)), tuple(map(repeat, cache.v))
        cache = replace(cache, k=k, v=v, kept=repeat(cache.kept), count=repeat(cache.count))
    return repeat(logits_PV), cache, None if seen_PV is None else repeat(seen_PV)


def _fused_prompts(model: Any, job: _Job, tokens_PT: Tensor, kept_PT: Tensor) -> dict[str, Tensor]:
    """What the thinker takes in place of tokens and their mask: image, audio and prompt of each row, at the right."""
    senses = {name: value.to(tokens_PT.device) for name, value in (job.senses or {}).items()}
    omni: Any = job.omni if _is_compiled(job.omni) else _copy_modules(job.omni, False)
    before_PND, there_PN = omni.encode(**senses)
    x_PND = torch.cat([before_PND, model.tok_emb(tokens_PT)], dim=1)
    kept_PN = torch.cat([there_PN, kept_PT], dim=1)
    # Padding goes to the left, the rest keeps its order: from here on a row is as a prompt of tokens.
    order_PN = kept_PN.to(torch.int8).argsort(dim=1, stable=True)[:, -int(kept_PN.sum(dim=1).max()) :]
    x_PND = x_PND.gather(1, order_PN[:, :, None].expand(-1, -1, x_PND.shape[2]))
    return {"embeddings": x_PND, "attention_mask": kept_PN.gather(1, order_PN)}


def _uniforms(job: _Job, logits_BV: Tensor) -> Tensor | None:
    """All of them (B, N) at once, on the device of the logits."""
    if job.temperature == 0.0:
        return None
    uniforms_BN = job.uniforms_BN
    if uniforms_BN is None:
        # Step by step, so that a larger limit draws the same first numbers.
        generator = torch.Generator().manual_seed(job.seed)
        uniforms_BN = torch.rand(job.limit, len(logits_BV), generator=generator, dtype=torch.float32).t()
    return uniforms_BN.to(logits_BV.device, statistics_dtype(logits_BV.dtype))


def _to_host(log_sum_B: Tensor, logprob_B: Tensor, token_B: Tensor) -> tuple[list[float], list[float], list[int]]:
    """All three by one transfer, the floats as the integers of their bits."""
    integer = torch.int64 if log_sum_B.dtype == torch.float64 else torch.int32
    bits = torch.stack([log_sum_B.view(integer), logprob_B.view(integer), token_B.to(integer)]).cpu()
    log_sums, logprobs = bits[:2].view(log_sum_B.dtype).tolist()
    return log_sums, logprobs, bits[2].tolist()


def _choose(logits_BV: Tensor, seen_BV: Tensor | None, uniforms_BN: Tensor | None, step: int, job: _Job) -> Tensor:
    """The next ids (B,), which are marked in `seen_BV`."""
    if seen_BV is not None:
        logits_BV = _penalise(logits_BV, seen_BV, job.repetition_penalty)
    if uniforms_BN is None:
        token_B = _likeliest(logits_BV)
    else:
        p_BV = _probabilities(logits_BV, job.temperature, job.top_k, job.top_p)
        token_B = _draw(p_BV, uniforms_BN[:, step])
    if seen_BV is not None:
        seen_BV.scatter_(1, token_B[:, None], True)
        seen_BV[:, PAD_ID] = False
    return token_B


def _for_decoding(model: Any, limit: int) -> Any:
    """The model in evaluation mode, as a copy of its modules that shares the weights: the model stays as it is.

    When enough tokens follow to pay for it, the copy's linear layers hold their weights as (in, out) in memory: with
    one row on a CPU, a product with nn.Linear's (out, in) takes much longer.
    """
    if _is_compiled(model):
        return model
    weight = model.lm_head.weight
    turns = limit >= _STEPS_THAT_PAY and weight.device.type == "cpu" and weight.dtype == torch.float32
    return _copy_modules(model, turns)


def _copy_modules(module: nn.Module, turns: bool) -> nn.Module:
    # Not copy.copy, which pickles: a module with parametrizations refuses that.
    twin = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.training = False
    twin._modules = {name: child and _copy_modules(child, turns) for name, child in module._modules.items()}
    if isinstance(twin, TokenEmbedding):
        twin._checks = False  # the prompts are checked, and what is drawn is an id
    # A weight that hooks compute, as pruning and weight_norm have it, is no parameter of that name.
    if turns and type(twin) is nn.Linear and "weight" in twin._parameters and not twin._forward_pre_hooks:
        turned = nn.Parameter(twin.weight.t().contiguous().t(), requires_grad=False)
        twin._parameters = {**twin._parameters, "weight": turned}
    return twin


def _is_compiled(model: Any) -> bool:
    """The model, or a part of it, which a copy would call as it was compiled."""
    return any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in model.modules())


def _check_mode(model: Any) -> None:
    if _is_compiled(model) and any(part.training for part in model.modules()):
        raise ValueError(
            "the compiled model is in training mode, or a part of it: all must be in evaluation mode; call "
            "model.eval() first"
        )


def _read_prompts(prompt_ids: Any, vocab_size: int) -> list[np.ndarray]:
    try:
        nested = len(prompt_ids) > 0 and np.ndim(prompt_ids[0]) > 0
    except (TypeError, KeyError, ValueError, RuntimeError):  # no sequence, or lists of different depth
        nested = False
    prompts = []
    for i, prompt in enumerate(prompt_ids if nested else [prompt_ids]):
        name = f"prompt_ids[{i}]" if nested else "prompt_ids"
        try:
            ids = np.asarray(prompt.cpu() if isinstance(prompt, Tensor) else prompt)
        except (TypeError, ValueError, RuntimeError):  # numpy cannot make an array of it
            ids = np.empty(0)
        if ids.ndim != 1 or len(ids) == 0 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"{name} must be a list of at least one token id, all integers, got {prompt!r:.60}; begin with the "
                "tokenizer's BOS"
            )
        check_token_ids(torch.from_numpy(ids), vocab_size, name)
        prompts.append(ids.astype(np.int64))
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


def _read_uniforms(uniforms: Any, rows: int, limit: int) -> Tensor:
    try:
        uniforms_BN = torch.as_tensor(uniforms)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"uniforms are a {type(uniforms).__name__} that is no array of numbers; pass a tensor"
        ) from None
    if tuple(uniforms_BN.shape) != (rows, limit) or not uniforms_BN.is_floating_point():
        raise ValueError(
            f"uniforms have shape {tuple(uniforms_BN.shape)} and dtype {dtype_name(uniforms_BN.dtype)}: must be "
            f"floating point of shape (rows, max_new_tokens) = {(rows, limit)}; give one number per new token"
        )
    _check_uniform_values("uniforms", uniforms_BN)
    return uniforms_BN


def _check_numbers(log_sums: list[float], step: int) -> None:
    for row, log_sum in enumerate(log_sums):
        # Not finite exactly if a logit of the row is NaN or +inf, or all are −inf.
        if not math.isfinite(log_sum):
            raise NumericalError(
                f"the logits of row {row} at step {step} hold NaN or inf, or nothing but -inf; look at the model's "
                "weights (check_numerical_stability finds the first bad one)"
            )
