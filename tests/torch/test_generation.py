"""Generation against full forwards, its edge cases, what it refuses, and that the model stays as it was."""

from __future__ import annotations

import json
import math
import warnings
from copy import deepcopy
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrizations, prune, weight_norm

from omni_torch import layers
from omni_torch.checkpoint import save_checkpoint
from omni_torch.config import ThinkerConfig
from omni_torch.fusion import OmniLM
from omni_torch.generation import Generation, generate, simple_inference
from omni_torch.layers import TokenIdError
from omni_torch.omni_config import AudioConfig, OmniConfig, VisionConfig
from omni_torch.sampling import apply_repetition_penalty, sample, truncated_probabilities
from omni_torch.thinker import ThinkerLM
from omni_torch.tokenizer import BPETokenizer
from omni_torch.training_utils import NumericalError

SIZES = {"vocab_size": 31, "n_layers": 1, "d_model": 24, "n_heads": 4, "d_ff": 20, "dropout": 0.0, "ctx_len": 24}
KINDS = {
    "mha": {},
    "gqa": {"use_gqa": True, "n_layers": 2},
    "moe": {"use_moe": True, "num_experts": 3, "use_gqa": True, "kv_groups": 1, "use_swiglu": False},
}
PROMPTS = [[1, 5, 9, 30, 2, 7], [1, 8], [3, 3, 11, 0]]
EPS = float(np.finfo(np.float32).eps)
GOLDEN = Path(__file__).parent.parent / "golden"
RELATIVE = 1e-12
"""What the frozen numbers are met to, in float64."""


@cache
def make(kind: str = "gqa", **sizes) -> ThinkerLM:
    torch.manual_seed(0)
    model = ThinkerLM.from_config(ThinkerConfig(**(SIZES | KINDS[kind] | sizes))).eval()
    # Sharper than fresh weights, whose logits lie close together.
    model.lm_head.weight.data *= 4.0
    return model


@torch.no_grad()
def last_logits(model: ThinkerLM, ids: list[int], window: int | None = None) -> torch.Tensor:
    """Logits (1, V) after `ids` by a full forward."""
    T = len(ids)
    near = np.tril(np.ones((T, T), bool)) & ~np.tril(np.ones((T, T), bool), -(window or T))
    return model(torch.tensor([ids]), attention_mask=torch.from_numpy(near)[None], positions=torch.arange(T))[:, -1]


def assert_greedy(model: ThinkerLM, prompt: list[int], tokens: list[int], logprobs: list[float], window=None) -> None:
    """Each token the likeliest by the full forward, and its log-probability the same but for rounding."""
    ids = list(prompt)
    assert len(tokens) == len(logprobs)
    for token, logprob in zip(tokens, logprobs, strict=True):
        expected = torch.log_softmax(last_logits(model, ids, window)[0], dim=-1)
        assert token == int(expected.argmax())
        assert abs(logprob - float(expected[token])) <= 200 * EPS * float(expected.abs().max())
        ids.append(token)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_the_full_forwards(kind) -> None:
    model = make(kind)
    result = generate(model, PROMPTS, max_new_tokens=9, eos_id=None)
    assert isinstance(result, Generation)
    assert result.stop_reasons == ["length"] * 3
    for prompt, tokens, logprobs in zip(PROMPTS, result.tokens, result.logprobs, strict=True):
        assert len(tokens) == 9
        assert all(type(token) is int for token in tokens)
        assert_greedy(model, prompt, tokens, logprobs)
        assert generate(model, prompt, max_new_tokens=9, eos_id=None).tokens == [tokens]


def test_up_to_the_last_position() -> None:
    model = make()
    result = generate(model, PROMPTS[0], eos_id=None)
    assert len(result.tokens[0]) == SIZES["ctx_len"] - len(PROMPTS[0])
    assert_greedy(model, PROMPTS[0], result.tokens[0], result.logprobs[0])
    full = [1, *range(3, 3 + SIZES["ctx_len"] - 2)]
    assert len(generate(model, full, eos_id=None).tokens[0]) == 1
    assert generate(model, [*full, 4], eos_id=None) == Generation([[]], [[]], ["length"])


def test_window_goes_on_beyond_ctx_len() -> None:
    model = make("mha", ctx_len=8)
    prompts = [[1, 5, 9, 30, 2, 7], [1, 8]]
    result = generate(model, prompts, max_new_tokens=30, eos_id=None, window=True)
    for prompt, tokens, logprobs in zip(prompts, result.tokens, result.logprobs, strict=True):
        assert len(tokens) == 30
        assert_greedy(model, prompt, tokens, logprobs, window=8)
    short = generate(model, prompts[1], max_new_tokens=6, eos_id=None)
    assert generate(model, prompts[1], max_new_tokens=6, eos_id=None, window=True).tokens == short.tokens


@pytest.mark.parametrize("name", ["thinker_gqa", "thinker_mha_swiglu"])
def test_golden_greedy(name) -> None:
    with np.load(GOLDEN / f"{name}.npz") as file:
        golden = {key: file[key] for key in file.files}
    model = ThinkerLM.from_config(ThinkerConfig.from_dict(json.loads(golden["cfg"].tobytes()))).double()
    weights = {key[2:]: torch.from_numpy(w).double() for key, w in golden.items() if key.startswith("w/")}
    model.load_state_dict(weights)
    expected, steps = golden["x/greedy"].tolist(), len(golden["x/greedy_step_logits"])
    result = generate(model, expected[:-steps], max_new_tokens=steps, eos_id=None)
    assert result.tokens == [expected[-steps:]]
    for token, logprob, logits in zip(
        result.tokens[0], result.logprobs[0], golden["x/greedy_step_logits"], strict=True
    ):
        exact = logits[token] - logits.max() - math.log(np.exp(logits - logits.max()).sum())
        assert abs(logprob - exact) <= RELATIVE * np.abs(logits).max()


SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.7},
    {"temperature": 0.0, "repetition_penalty": 3.0},
]


@pytest.mark.parametrize("options", SETTINGS)
def test_given_uniforms_decide_every_token(options) -> None:
    model = make("mha")
    uniforms = torch.rand(3, 8, generator=torch.Generator().manual_seed(5))
    result = generate(model, PROMPTS, max_new_tokens=8, eos_id=None, uniforms=uniforms, **options)
    options = dict(options)
    penalty = options.pop("repetition_penalty", 1.0)
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for step, token in enumerate(result.tokens[row]):
            logits = last_logits(model, ids)
            seen = torch.zeros(logits.shape, dtype=torch.bool)
            seen[0, ids] = True
            seen[0, 0] = False
            p = truncated_probabilities(apply_repetition_penalty(logits, seen, penalty), **options)
            assert sample(p, uniforms[row, step : step + 1]).tolist() == [token]
            raw = torch.log_softmax(logits[0], dim=-1)
            assert abs(result.logprobs[row][step] - float(raw[token])) <= 200 * EPS * float(raw.abs().max())
            ids.append(token)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 4}, {"repetition_penalty": 2.0}])
def test_a_stream_is_the_same_in_steps(options) -> None:
    model = make("mha")
    free = generate(model, PROMPTS, max_new_tokens=12, eos_id=None, **options)
    for eos in (None, free.tokens[1][4]):
        whole = generate(model, PROMPTS, max_new_tokens=12, eos_id=eos, **options)
        steps = list(generate(model, PROMPTS, max_new_tokens=12, eos_id=eos, stream=True, **options))
        assert all(len(step) == 3 for step in steps)
        joined = [[step[row] for step in steps if step[row] is not None] for row in range(3)]
        assert joined == whole.tokens
        for row in range(3):  # None only at the end
            ids = [step[row] for step in steps]
            assert None not in ids[: len(whole.tokens[row])]
    assert list(generate(model, PROMPTS, max_new_tokens=0, stream=True)) == []


def test_each_row_ends_at_its_eos() -> None:
    model = make("mha")
    free = generate(model, PROMPTS, max_new_tokens=12, temperature=1.0, eos_id=None, seed=3)
    eos = free.tokens[0][2]
    ended = generate(model, PROMPTS, max_new_tokens=12, temperature=1.0, eos_id=eos, seed=3)
    for row, tokens in enumerate(free.tokens):
        there = eos in tokens
        assert ended.stop_reasons[row] == ("eos" if there else "length")
        assert ended.tokens[row] == (tokens[: tokens.index(eos) + 1] if there else tokens)
        assert len(ended.logprobs[row]) == len(ended.tokens[row])
    assert len(ended.tokens[0]) <= 3
    greedy = generate(model, PROMPTS, max_new_tokens=12, eos_id=None)
    at_once = generate(model, PROMPTS, max_new_tokens=12, eos_id=greedy.tokens[1][0])
    assert at_once.tokens[1] == greedy.tokens[1][:1]
    assert at_once.stop_reasons[1] == "eos"


def test_samples_of_a_prompt_lie_together() -> None:
    model = make("mha")
    uniforms = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    draw = partial(generate, model, max_new_tokens=6, temperature=2.0, eos_id=None)
    four = draw(PROMPTS[:2], num_samples=2, uniforms=uniforms)
    assert len({tuple(tokens) for tokens in four.tokens}) == 4
    for row in range(4):
        one = draw(PROMPTS[row // 2], uniforms=uniforms[row : row + 1])
        assert one.tokens == [four.tokens[row]]


def test_the_seed_decides() -> None:
    model = make("mha")
    draw = partial(generate, model, PROMPTS, max_new_tokens=10, temperature=1.5, eos_id=None)
    assert draw(seed=7) == draw(seed=7)
    assert draw(seed=7) != draw(seed=8)
    longer = draw(seed=7, max_new_tokens=15)
    assert [tokens[:10] for tokens in longer.tokens] == draw(seed=7).tokens
    assert draw(seed=2**32 - 1).tokens


def test_a_model_in_training_mode_stays_so_and_drops_nothing() -> None:
    model = ThinkerLM.from_config(ThinkerConfig(**(SIZES | {"dropout": 0.5})))
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    layouts = {name: weight.stride() for name, weight in model.named_parameters()}
    random = torch.get_rng_state()
    result = generate(model, PROMPTS, max_new_tokens=6)
    stream = generate(model, PROMPTS, max_new_tokens=6, stream=True)
    next(stream)
    assert [module.training for module in model.modules()] == modes
    assert {name: weight.stride() for name, weight in model.named_parameters()} == layouts
    assert torch.equal(torch.get_rng_state(), random)
    assert not torch.is_inference_mode_enabled()
    assert generate(model.eval(), PROMPTS, max_new_tokens=6) == result


@pytest.mark.parametrize("wrap", [True, False])
def test_a_compiled_model(wrap) -> None:
    model = deepcopy(make("mha"))
    expected = generate(model, PROMPTS, max_new_tokens=6, eos_id=None)
    if wrap:
        compiled = torch.compile(model, fullgraph=True, backend="eager")
    else:
        compiled = model
        compiled.compile(fullgraph=True, backend="eager")
    assert generate(compiled, PROMPTS, max_new_tokens=6, eos_id=None).tokens == expected.tokens
    with pytest.raises(ValueError, match="the compiled model is in training mode, or a part"):
        generate(compiled.train(), PROMPTS, max_new_tokens=6)


def test_many_tokens_are_computed_from_weights_laid_out_anew() -> None:
    """From 32 tokens on; the model's own weights are the same objects in the same order."""
    model = make("gqa", ctx_len=48)
    result = generate(model, PROMPTS[:2], max_new_tokens=34, eos_id=None)
    for prompt, tokens, logprobs in zip(PROMPTS, result.tokens, result.logprobs, strict=False):
        assert_greedy(model, prompt, tokens, logprobs)
    assert all(weight.is_contiguous() for weight in model.parameters())


def test_bfloat16_computes() -> None:
    model = make("mha")
    half = deepcopy(model).to(torch.bfloat16)
    result = generate(half, PROMPTS, max_new_tokens=4, temperature=0.8, top_k=3, eos_id=None)
    assert all(len(tokens) == 4 and all(x <= 0.0 for x in row) for tokens, row in zip(result.tokens, result.logprobs))


def test_arrays_are_prompts_too() -> None:
    model = make("mha")
    expected = generate(model, [PROMPTS[0], PROMPTS[0][::-1]], max_new_tokens=3)
    both = np.array([PROMPTS[0], PROMPTS[0][::-1]])
    assert generate(model, both, max_new_tokens=3) == expected
    assert generate(model, torch.from_numpy(both), max_new_tokens=3) == expected
    assert generate(model, both[0], max_new_tokens=3).tokens == expected.tokens[:1]


def test_nothing_to_do() -> None:
    nothing = generate(make("mha"), PROMPTS, max_new_tokens=0, num_samples=2, temperature=1.0)
    assert nothing == Generation([[]] * 6, [[]] * 6, ["length"] * 6)


def test_a_prompt_it_refuses() -> None:
    run = partial(generate, make("mha"), max_new_tokens=2)
    for empty, name in (([], "prompt_ids"), ([[1], []], r"prompt_ids\[1\]"), ([[]], r"prompt_ids\[0\]")):
        with pytest.raises(ValueError, match=f"{name} must be a list of at least one token id"):
            run(empty)
    for other in (None, 3, {1, 2}, {1: 2}, iter([1, 2]), np.array(3), "12", [1, [2, 3]], [[1, [2]], [3]], [[1], 2]):
        with pytest.raises(ValueError, match="must be a list of at least one token id"):
            run(other)
    for floats in ([1.0, 2.0], [[1, 2], [1.5]], [True, False], ["a", "b"]):
        with pytest.raises(ValueError, match="all integers"):
            run(floats)
    for wrong, place in (([1, 31], r"prompt_ids\[1\] = 31"), ([[1, 2], [-1]], r"prompt_ids\[1\]\[0\] = -1")):
        with pytest.raises(TokenIdError, match=place):
            run(wrong)
    with pytest.raises(ValueError, match="prompt has 25 tokens, allowed are up to ctx_len=24"):
        run([1] * 25)
    with pytest.raises(ValueError, match="prompt has 25 tokens"):
        run([[1], [1] * 25], window=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens=-1 is not allowed"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"max_new_tokens": 19}, "must be at most 18; ask for fewer, or pass window=True"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": -0.5}, "top_p=-0.5"),
        ({"top_k": -2}, "top_k=-2"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"seed": "1"}, "seed='1'"),
        ({"temperature": 10**400}, "temperature=1000"),
        ({"repetition_penalty": 1e-45}, "repetition_penalty=1e-45 is not allowed: must be a number from 1e-06 to 1e"),
        ({"window": 1}, "window=1 is not allowed: must be True or False"),
        ({"eos_id": 31}, "eos_id = 31 is not a token id"),
        ({"eos_id": -1}, "eos_id=-1 is not allowed"),
        ({"eos_id": [2]}, r"eos_id=\[2\] is not allowed: must be an integer"),
        ({"eos_id": "2"}, "eos_id='2'"),
        ({"eos_id": np.array([2, 3])}, "eos_id=array"),
        ({"eos_id": 2.0}, "eos_id=2.0"),
        ({"uniforms": "half"}, "uniforms"),
        ({"uniforms": [[0.5], [0.5, 0.5]]}, "uniforms are a list that is no array of numbers"),
        ({"uniforms": None, "max_new_tokens": [3]}, r"max_new_tokens=\[3\]"),
        ({"uniforms": torch.zeros(2, 3)}, r"\(rows, max_new_tokens\) = \(3, 3\)"),
        ({"uniforms": torch.zeros(3, 3, dtype=torch.int)}, "uniforms have shape"),
        ({"uniforms": torch.ones(3, 3)}, r"uniforms\[0, 0\] = 1.0 is not allowed"),
        ({"uniforms": torch.full((3, 3), -0.5)}, r"uniforms\[0, 0\] = -0.5"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_settings_it_refuses(options, message, stream) -> None:
    """At the call, before any step of a stream is asked for."""
    with pytest.raises(ValueError, match=message):
        generate(make("mha"), PROMPTS, **({"max_new_tokens": 3, "stream": stream} | options))


def test_numbers_gone_bad() -> None:
    model = deepcopy(make("mha"))
    free = generate(model, PROMPTS, max_new_tokens=8, temperature=1.0, seed=1, eos_id=None)
    poison = next(token for token in free.tokens[1][:7] if not any(token in prompt for prompt in PROMPTS))
    steps = [tokens.index(poison) + 1 for tokens in free.tokens if poison in tokens[:7]]
    model.tok_emb.weight.data[poison] = math.nan
    with pytest.raises(NumericalError, match=rf"the logits of row \d at step {min(steps)} hold NaN or inf"):
        generate(model, PROMPTS, max_new_tokens=8, temperature=1.0, seed=1, eos_id=None)
    stream = generate(model, PROMPTS, max_new_tokens=8, temperature=1.0, seed=1, eos_id=None, stream=True)
    assert [next(stream) for _ in range(min(steps))] == [list(step) for step in zip(*free.tokens)][: min(steps)]
    with pytest.raises(NumericalError, match=f"at step {min(steps)}"):
        next(stream)
    # Where it ends a row, nothing is computed from it.
    ended = generate(model, PROMPTS, max_new_tokens=8, temperature=1.0, seed=1, eos_id=poison)
    assert ended.stop_reasons[1] == "eos"
    model.lm_head.weight.data *= math.inf
    for options in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.5}):
        with pytest.raises(NumericalError, match="row 0 at step 0"):
            generate(model, PROMPTS, max_new_tokens=3, **options)


def test_simple_inference(tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog ran to the cat\n" * 20, encoding="utf-8")
    BPETokenizer.train(text, tmp_path / "tokenizer.model", vocab_size=300)
    tokenizer = BPETokenizer(tmp_path / "tokenizer.model")
    model = make("mha", vocab_size=tokenizer.vocab_size, ctx_len=64)
    model.config.to_json(tmp_path / "config.json")
    save_checkpoint(tmp_path / "thinker.pt", model=model)
    prompt = "the cat"
    (likeliest,) = last_logits(model, [1, *tokenizer.encode(prompt)]).argmax(dim=-1).tolist()
    output = simple_inference(tmp_path / "thinker.pt", tmp_path / "tokenizer.model", prompt)
    assert output == tokenizer.decode([likeliest])
    config = (tmp_path / "config.json").rename(tmp_path / "other.json")
    for given in ({"n_heads": 4}, {"config": config}):
        assert simple_inference(tmp_path / "thinker.pt", tmp_path / "tokenizer.model", prompt, **given) == output
    other = make("mha")
    other.config.to_json(tmp_path / "config.json")
    save_checkpoint(tmp_path / "thinker.pt", model=other)
    with pytest.raises(ValueError, match="vocab_size=31: must be equal"):
        simple_inference(tmp_path / "thinker.pt", tmp_path / "tokenizer.model", prompt)


@pytest.mark.parametrize("prompt", [[1, 0, 3], [1, 3]])
def test_padding_is_never_penalised(prompt) -> None:
    """Neither that of the prompt nor that which was generated: the model's logits are 2 for id 0, 1.9 for id 5."""
    model = deepcopy(make("mha"))
    model.tok_emb.weight.data.fill_(1.0)
    for block in model.blocks:
        block.attn.o.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    model.lm_head.weight.data = torch.tensor([2.0, *[0.0] * 4, 1.9, *[0.0] * 25])[:, None].expand(31, 24) / 24
    result = generate(model, prompt, max_new_tokens=4, repetition_penalty=1.5, eos_id=None)
    assert result.tokens == [[0, 0, 0, 0]]
    assert generate(model, [*prompt, 5], max_new_tokens=1, repetition_penalty=0.5, eos_id=None).tokens == [[5]]


def test_a_uniform_that_rounds_to_1_draws_a_token_that_can_be_drawn() -> None:
    model = make("mha")
    uniforms = torch.full((1, 4), 1.0 - 2.0**-53, dtype=torch.float64)
    result = generate(model, PROMPTS[0], 4, temperature=1.0, top_k=2, uniforms=uniforms, eos_id=None)
    ids = list(PROMPTS[0])
    for token in result.tokens[0]:
        assert token == int(last_logits(model, ids).topk(2).indices.max())
        ids.append(token)


def test_an_integer_of_numpys_is_an_integer() -> None:
    run = partial(generate, make("mha"), PROMPTS, temperature=1.0)
    plain = run(max_new_tokens=3, seed=7, num_samples=2, eos_id=2, top_k=5)
    assert (
        run(**{k: np.int64(v) for k, v in {"max_new_tokens": 3, "seed": 7, "num_samples": 2}.items()}, top_k=5) == plain
    )
    assert run(max_new_tokens=3, seed=7, num_samples=2, eos_id=np.array(2), top_k=np.uint8(5)) == plain


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.uint64])
def test_prompts_of_any_integers(dtype) -> None:
    model = make("mha", vocab_size=70_000)
    prompt = np.array([1, 5, 127], dtype)
    expected = generate(model, prompt.tolist(), max_new_tokens=2)
    assert generate(model, prompt, max_new_tokens=2) == expected
    assert generate(model, torch.from_numpy(prompt), max_new_tokens=2) == expected


def test_uniforms_in_bfloat16() -> None:
    half = torch.full((3, 3), 0.5)
    run = partial(generate, make("mha"), PROMPTS, 3, temperature=1.0, eos_id=None)
    assert run(uniforms=half.to(torch.bfloat16)) == run(uniforms=half)


def pruned(linear: torch.nn.Linear) -> None:
    prune.l1_unstructured(linear, "weight", 0.5)


HOOKED = {
    "pruning": pruned,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
}


@pytest.mark.parametrize("kind", [*HOOKED, "old weight_norm"])
def test_weights_that_are_computed(kind) -> None:
    """By hooks or parametrizations; also where enough tokens follow to lay the others out anew."""
    model = deepcopy(make("mha", ctx_len=48))
    change = HOOKED.get(kind, old_weight_norm)
    for linear in (model.lm_head, model.blocks[0].attn.qkv, model.blocks[0].mlp.up_proj):
        change(linear)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    result = generate(model, PROMPTS[0], max_new_tokens=34, eos_id=None)
    assert_greedy(model, PROMPTS[0], result.tokens[0], result.logprobs[0])
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def old_weight_norm(linear: torch.nn.Linear) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        weight_norm(linear)


@pytest.mark.parametrize("options", [{}, {"window": True, "max_new_tokens": 30}])
@pytest.mark.parametrize("num_samples", [1, 2])
def test_a_compiled_model_is_compiled_a_few_times(options, num_samples) -> None:
    """The prompt, the steps, and the steps on a full ring, in which the slots go round three times."""
    torch._dynamo.reset()
    model = deepcopy(make("mha", ctx_len=10))
    options = {"max_new_tokens": 7, "eos_id": None, "num_samples": num_samples} | options
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    assert generate(compiled, [1, 5, 9], **options).tokens == generate(model, [1, 5, 9], **options).tokens
    assert counter.frame_count <= 4


def test_a_part_in_training_mode_or_compiled() -> None:
    model = deepcopy(make("mha"))
    expected = generate(model, PROMPTS, max_new_tokens=2)
    model.blocks[0].compile(backend="eager")
    assert generate(model, PROMPTS, max_new_tokens=2).tokens == expected.tokens
    model.blocks[0].drop.train()
    with pytest.raises(ValueError, match="the compiled model is in training mode, or a part of it"):
        generate(model, PROMPTS, max_new_tokens=2)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 3, "top_p": 0.9, "repetition_penalty": 1.2}])
def test_one_transfer_in_a_step(options, monkeypatch) -> None:
    """Of ids, sums and log-probabilities; the ids that were drawn are not looked at once more."""
    seen = []
    to_cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: seen.append(x.shape) or to_cpu(x))
    monkeypatch.setattr(layers, "check_token_ids", lambda *args: seen.append("a look"))
    generate(make("mha"), PROMPTS, max_new_tokens=5, eos_id=None, **options)
    assert seen == [(3, 3)] * 5


# Pictures and clips --------------------------------------------------------------------------------------------------


@cache
def make_omni(ctx_len: int = 40) -> OmniLM:
    torch.manual_seed(0)
    thinker = ThinkerConfig(**(SIZES | {"ctx_len": ctx_len, "n_layers": 2}))
    audio = AudioConfig(d=12, heads=3, ff=16, layers=1, dropout=0.0)
    vision = VisionConfig(img_size=16, patch=8, d=12, layers=1, heads=2, ff=16, dropout=0.0)
    model = OmniLM.from_config(OmniConfig(thinker, audio, vision)).eval()
    model.thinker.lm_head.weight.data *= 4.0
    return model


def senses(seed: int = 0) -> tuple[list, list]:
    """For three prompts: a picture, a clip of 13 frames, and both, with one of 30."""
    draw = np.random.default_rng(seed)
    images = [torch.from_numpy(draw.random((3, 16, 16), np.float32)) for _ in range(2)]
    mels = [torch.from_numpy(draw.standard_normal((frames, 128), np.float32)) for frames in (13, 30)]
    return [images[0], None, images[1]], [None, mels[0], mels[1]]


@torch.no_grad()
def omni_logits(model: OmniLM, ids: list[int], image, mel) -> torch.Tensor:
    """Logits (V,) after `ids` by a full forward."""
    given = {"images": None if image is None else image[None], "mel": None if mel is None else mel[None]}
    return model(torch.tensor([ids]), **given)[0, -1]


def test_pictures_and_clips_stand_before_their_prompts() -> None:
    """Prompts of unequal length, each with another sense: greedy is the full forwards', and each row is as alone."""
    model, (images, mels) = make_omni(), senses()
    result = generate(model, PROMPTS, 6, eos_id=None, images=images, mels=mels)
    for prompt, image, mel, tokens, logprobs in zip(PROMPTS, images, mels, result.tokens, result.logprobs, strict=True):
        ids = list(prompt)
        for token, logprob in zip(tokens, logprobs, strict=True):
            expected = omni_logits(model, ids, image, mel).log_softmax(dim=0)
            assert token == int(expected.argmax())
            assert abs(logprob - float(expected[token])) <= 200 * EPS * float(expected.abs().max())
            ids.append(token)
        assert generate(model, prompt, 6, eos_id=None, images=[image], mels=[mel]).tokens == [tokens]
    streamed = list(generate(model, PROMPTS, 6, eos_id=None, images=images, mels=mels, stream=True))
    assert [list(row) for row in zip(*streamed, strict=True)] == result.tokens
    sampled = generate(model, PROMPTS, 3, 1.0, num_samples=2, repetition_penalty=1.5, images=images, mels=mels)
    assert len(sampled.tokens) == 6


def test_an_omni_without_anything_to_see_is_its_thinker() -> None:
    model = make_omni()
    expected = generate(model.thinker, PROMPTS, 6, eos_id=None)
    assert generate(model, PROMPTS, 6, eos_id=None) == expected
    assert generate(model, PROMPTS, 6, eos_id=None, images=[None] * 3, mels=[None] * 3) == expected


def test_a_picture_changes_what_is_said() -> None:
    model, (images, _) = make_omni(), senses()
    seen = generate(model, PROMPTS[0], 4, images=images[:1], eos_id=None)
    assert seen.logprobs != generate(model, PROMPTS[0], 4, eos_id=None).logprobs
    dark = generate(model, PROMPTS[0], 4, images=[torch.zeros(3, 16, 16)], eos_id=None)
    assert seen.logprobs != dark.logprobs


def test_a_compiled_omni() -> None:
    model, (images, mels) = make_omni(), senses()
    given = {"images": images, "mels": mels, "eos_id": None}
    compiled = torch.compile(model, backend="eager")
    assert generate(compiled, PROMPTS, 4, **given).tokens == generate(model, PROMPTS, 4, **given).tokens


def test_up_to_the_last_position_with_pictures() -> None:
    """6 tokens after 1 vector of a picture and 8 of 30 frames leave 25 of 40."""
    model, (images, mels) = make_omni(), senses()
    given = {"images": images[2:], "mels": mels[2:], "eos_id": None}
    assert len(generate(model, PROMPTS[0], **given).tokens[0]) == 25
    with pytest.raises(ValueError, match="with its picture and clip, of 15 tokens goes beyond ctx_len=40"):
        generate(model, PROMPTS[0], 26, **given)
    with pytest.raises(ValueError, match="with its picture and clip, has 42 tokens"):
        generate(model, list(range(31)) + [3, 4], **given)
    assert len(generate(model, PROMPTS[0], 60, window=True, **given).tokens[0]) == 60


BAD_SENSES = {
    "too few": ({"images": [None]}, "images is 1 entries: must be a list with one entry for each of 2"),
    "no list": ({"mels": np.zeros((2, 20, 128), np.float32)}, "mels is a ndarray"),
    "sizes": (
        {"images": [np.zeros((3, 16, 16)), np.zeros((3, 8, 8))]},
        r"\(3, 8, 8\), \(3, 16, 16\): .*the same for all",
    ),
    "a batch": ({"images": [np.zeros((1, 3, 16, 16)), None]}, r"\(1, 3, 16, 16\): must be \(3, H, W\)"),
    "patches": ({"images": [np.zeros((3, 12, 16)), None]}, "12 × 16"),
    "levels": ({"images": [None, np.zeros((3, 16, 16), np.uint8)]}, r"images\[1\] has dtype uint8"),
    "a path": ({"images": ["a.png", None]}, r"images\[0\] = 'a.png' is a path: .*give load_image\(path\)"),
    "a path of a clip": ({"mels": [None, Path("a.wav")]}, r"mels\[1\] = 'a.wav' is a path: .*load_audio\(path\)"),
    "colours last": ({"images": [np.zeros((16, 16, 3)), None]}, r"\(16, 16, 3\): must be \(3, H, W\), .*moves the col"),
    "clips of two dtypes": (
        {"mels": [np.zeros((9, 128), np.float32), np.zeros((9, 128), np.float16)]},
        "mels have the dtypes float16, float32: must be one for all",
    ),
    "pictures of two dtypes": (
        {"images": [np.zeros((3, 16, 16), np.float32), np.zeros((3, 16, 16))]},
        "images have the dtypes float32, float64: must be one for all",
    ),
    "NaN": ({"images": [None, np.full((3, 16, 16), np.nan)]}, "images holds NaN"),
    "NaN in a clip": ({"mels": [None, np.full((9, 128), np.nan)]}, "mel holds NaN"),
    "bands": ({"mels": [None, np.zeros((20, 80))]}, r"mels\[1\] has shape \(20, 80\)"),
    "no frames": ({"mels": [None, np.zeros((0, 128))]}, r"mels\[1\] has shape \(0, 128\)"),
    "too long": (
        {"mels": [np.zeros((41, 128)), None]},
        r"mels\[0\] has 41 frames, .*= 10, that is 40 frames or 0\.39 s",
    ),
}


@pytest.mark.parametrize("name", BAD_SENSES)
def test_senses_it_refuses(name, monkeypatch) -> None:
    given, message = BAD_SENSES[name]
    monkeypatch.setattr(OmniLM, "encode", None)  # no work before
    with pytest.raises(ValueError, match=message):
        generate(make_omni(), PROMPTS[:2], 3, stream=True, **given)


def test_models_that_cannot_see_or_hear() -> None:
    images, mels = senses()
    with pytest.raises(ValueError, match=r"images are given, .*no section 'vision'"):
        generate(make(), PROMPTS, 3, images=images)
    blind = OmniLM.from_config(OmniConfig(ThinkerConfig(**SIZES), AudioConfig(d=12, ff=16, layers=1))).eval()
    with pytest.raises(ValueError, match=r"images are given, .*no section 'vision'"):
        generate(blind, PROMPTS, 3, images=images, mels=mels)
    with pytest.raises(ValueError, match=r"mels are given, .*no section 'audio'"):
        generate(blind.thinker, PROMPTS, 3, mels=mels)
