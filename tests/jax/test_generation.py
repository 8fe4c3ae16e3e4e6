"""Generation against full forwards, its edge cases, what it refuses, and that nothing is compiled twice."""

from __future__ import annotations

import json
import math
from functools import cache, partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni_jax import generation
from omni_jax.checkpoint import save_checkpoint
from omni_jax.config import ThinkerConfig
from omni_jax.fusion import OmniLM
from omni_jax.generation import Generation, generate, simple_inference
from omni_jax.layers import TokenIdError
from omni_jax.omni_config import AudioConfig, OmniConfig, VisionConfig
from omni_jax.sampling import apply_repetition_penalty, sample, truncated_probabilities
from omni_jax.thinker import ThinkerLM
from omni_jax.tokenizer import BPETokenizer
from omni_jax.training_utils import NumericalError

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
    model = ThinkerLM.from_config(ThinkerConfig(**(SIZES | KINDS[kind] | sizes)))
    # Sharper than fresh weights, whose logits lie close together.
    model.lm_head.kernel[...] = model.lm_head.kernel[...] * 4.0
    return model


@partial(jax.jit, static_argnums=0)
def forward(graphdef, params, *args, **kwargs):
    return nnx.merge(graphdef, params)(*args, **kwargs)


def last_logits(model: ThinkerLM, ids: list[int], window: int | None = None) -> jax.Array:
    """Logits (1, V) after `ids` by a full forward, padded on the right to one length; the padding is never seen."""
    T = 48
    padded = np.pad(np.array([ids]), ((0, 0), (0, T - len(ids))))
    near = np.tril(np.ones((T, T), bool)) & ~np.tril(np.ones((T, T), bool), -(window or T))
    graphdef, params = nnx.split(model)
    logits = forward(graphdef, params, padded, attention_mask=near[None], positions=np.arange(T))
    return logits[:, len(ids) - 1]


def assert_greedy(model: ThinkerLM, prompt: list[int], tokens: list[int], logprobs: list[float], window=None) -> None:
    """Each token the likeliest by the full forward, and its log-probability the same but for rounding."""
    ids = list(prompt)
    assert len(tokens) == len(logprobs)
    for token, logprob in zip(tokens, logprobs, strict=True):
        expected = jax.nn.log_softmax(last_logits(model, ids, window)[0])
        assert token == int(jnp.argmax(expected))
        assert abs(logprob - float(expected[token])) <= 200 * EPS * float(jnp.abs(expected).max())
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
    with jax.enable_x64(True):
        model = ThinkerLM.from_config(ThinkerConfig.from_dict(json.loads(golden["cfg"].tobytes())))
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            kind = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(str(path[-1]), str(path[-1]))
            value = golden["w/" + ".".join([*map(str, path[:-1]), kind])].astype(np.float64)
            leaf.set_value(jnp.asarray(value.T if path[-1] == "kernel" else value))
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
    uniforms = np.random.default_rng(5).random((3, 8), np.float32)
    result = generate(model, PROMPTS, max_new_tokens=8, eos_id=None, uniforms=uniforms, **options)
    options = dict(options)
    penalty = options.pop("repetition_penalty", 1.0)
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for step, token in enumerate(result.tokens[row]):
            logits = last_logits(model, ids)
            seen = jnp.zeros(logits.shape, bool).at[0, jnp.array(ids)].set(True).at[0, 0].set(False)
            p = truncated_probabilities(apply_repetition_penalty(logits, seen, penalty), **options)
            assert sample(p, jnp.asarray(uniforms[row, step : step + 1])).tolist() == [token]
            raw = jax.nn.log_softmax(logits[0])
            assert abs(result.logprobs[row][step] - float(raw[token])) <= 200 * EPS * float(jnp.abs(raw).max())
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
    uniforms = np.random.default_rng(0).random((4, 6), np.float32)
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
    before = jax.tree.map(np.asarray, jax.tree.leaves(nnx.state(model, nnx.RngCount)))
    result = generate(model, PROMPTS, max_new_tokens=6)
    assert model.blocks[0].drop.deterministic is False
    assert before == jax.tree.map(np.asarray, jax.tree.leaves(nnx.state(model, nnx.RngCount)))
    model.eval()
    assert generate(model, PROMPTS, max_new_tokens=6) == result


def test_bfloat16_computes() -> None:
    model = make("mha")
    graphdef, params = nnx.split(model)
    half = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    result = generate(half, PROMPTS, max_new_tokens=4, temperature=0.8, top_k=3, eos_id=None)
    assert all(len(tokens) == 4 and all(x <= 0.0 for x in row) for tokens, row in zip(result.tokens, result.logprobs))


def test_arrays_are_prompts_too() -> None:
    model = make("mha")
    expected = generate(model, [PROMPTS[0], PROMPTS[0][::-1]], max_new_tokens=3)
    both = np.array([PROMPTS[0], PROMPTS[0][::-1]])
    assert generate(model, both, max_new_tokens=3) == expected
    assert generate(model, jnp.asarray(both), max_new_tokens=3) == expected
    assert generate(model, both[0], max_new_tokens=3).tokens == expected.tokens[:1]


def test_nothing_is_compiled_twice(monkeypatch) -> None:
    """20 prompts of one bucket, with every setting changing, trace each program once."""
    model = make("mha", vocab_size=37, ctx_len=64)
    chex.clear_trace_counter()
    monkeypatch.setattr(generation, "_choose", chex.assert_max_traces(generation._choose, n=2))
    rng = np.random.default_rng(0)
    for i in range(20):
        prompt = rng.integers(3, 37, size=17 + i % 16 if i % 2 else 32 - i % 16).tolist()
        options = {"temperature": 0.5 + i / 10, "top_k": 1 + i, "top_p": 0.99 - i / 40, "repetition_penalty": 1.1 + i}
        result = generate(model, prompt, max_new_tokens=2 + i, seed=i, eos_id=None if i % 3 else i, **options)
        assert len(result.tokens[0]) == 2 + i or result.stop_reasons == ["eos"]
        list(generate(model, prompt, max_new_tokens=3, seed=i, stream=True, **options))
    model.lm_head.kernel[...] = model.lm_head.kernel[...] + 1.0  # other weights are no other program
    generate(model, prompt, max_new_tokens=5, **options)
    with pytest.raises(AssertionError, match="_choose"):  # the count sees a new bucket
        generate(model, [1, 2, 3], max_new_tokens=5, **options)


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
        ({"uniforms": np.zeros((2, 3))}, r"\(rows, max_new_tokens\) = \(3, 3\)"),
        ({"uniforms": np.zeros((3, 3), int)}, "uniforms have shape"),
        ({"uniforms": np.ones((3, 3))}, r"uniforms\[0, 0\] = 1.0 is not allowed"),
        ({"uniforms": np.full((3, 3), -0.5)}, r"uniforms\[0, 0\] = -0.5"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_settings_it_refuses(options, message, stream) -> None:
    """At the call, before any step of a stream is asked for."""
    with pytest.raises(ValueError, match=message):
        generate(make("mha"), PROMPTS, **({"max_new_tokens": 3, "stream": stream} | options))


def test_numbers_gone_bad() -> None:
    model = nnx.clone(make("mha"))
    free = generate(model, PROMPTS, max_new_tokens=8, temperature=1.0, seed=1, eos_id=None)
    poison = next(token for token in free.tokens[1][:7] if not any(token in prompt for prompt in PROMPTS))
    steps = [tokens.index(poison) + 1 for tokens in free.tokens if poison in tokens[:7]]
    model.tok_emb.embedding[...] = model.tok_emb.embedding[...].at[poison].set(math.nan)
    with pytest.raises(NumericalError, match=rf"the logits of row \d at step {min(steps)} hold NaN or inf"):
        generate(model, PROMPTS, max_new_tokens=8, temperature=1.0, seed=1, eos_id=None)
    stream = generate(model, PROMPTS, max_new_tokens=8, temperature=1.0, seed=1, eos_id=None, stream=True)
    assert [next(stream) for _ in range(min(steps))] == [list(step) for step in zip(*free.tokens)][: min(steps)]
    with pytest.raises(NumericalError, match=f"at step {min(steps)}"):
        next(stream)
    # Where it ends a row, nothing is computed from it.
    ended = generate(model, PROMPTS, max_new_tokens=8, temperature=1.0, seed=1, eos_id=poison)
    assert ended.stop_reasons[1] == "eos"
    model.lm_head.kernel[...] = model.lm_head.kernel[...] * math.inf
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
    (likeliest,) = jnp.argmax(last_logits(model, [1, *tokenizer.encode(prompt)]), axis=-1).tolist()
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
    model = nnx.clone(make("mha"))
    model.tok_emb.embedding[...] = jnp.ones((31, 24))
    for kernel in [linear.kernel for block in model.blocks for linear in (block.attn.o, block.mlp.down_proj)]:
        kernel[...] = jnp.zeros(kernel.shape)
    model.lm_head.kernel[...] = jnp.zeros((24, 31)).at[:, 0].set(2.0 / 24).at[:, 5].set(1.9 / 24)
    result = generate(model, prompt, max_new_tokens=4, repetition_penalty=1.5, eos_id=None)
    assert result.tokens == [[0, 0, 0, 0]]
    assert generate(model, [*prompt, 5], max_new_tokens=1, repetition_penalty=0.5, eos_id=None).tokens == [[5]]


def test_a_uniform_that_rounds_to_1_draws_a_token_that_can_be_drawn() -> None:
    model = make("mha")
    uniforms = np.full((1, 4), 1.0 - 2.0**-53)
    result = generate(model, PROMPTS[0], 4, temperature=1.0, top_k=2, uniforms=uniforms, eos_id=None)
    ids = list(PROMPTS[0])
    for token in result.tokens[0]:
        assert token == int(jax.lax.top_k(last_logits(model, ids), 2)[1].max())
        ids.append(token)


def test_an_integer_of_numpys_is_an_integer() -> None:
    run = partial(generate, make("mha"), PROMPTS, temperature=1.0)
    plain = run(max_new_tokens=3, seed=7, num_samples=2, eos_id=2, top_k=5)
    assert (
        run(**{k: np.int64(v) for k, v in {"max_new_tokens": 3, "seed": 7, "num_samples": 2}.items()}, top_k=5) == plain
    )
    assert run(max_new_tokens=3, seed=7, num_samples=2, eos_id=np.array(2), top_k=np.uint8(5)) == plain


def test_uniforms_in_bfloat16() -> None:
    half = jnp.full((3, 3), 0.5)
    run = partial(generate, make("mha"), PROMPTS, 3, temperature=1.0, eos_id=None)
    assert run(uniforms=half.astype(jnp.bfloat16)) == run(uniforms=half)


def test_greedy_does_not_look_at_uniforms(monkeypatch) -> None:
    model = make("mha", vocab_size=41)
    chex.clear_trace_counter()
    monkeypatch.setattr(generation, "_choose", chex.assert_max_traces(generation._choose, n=2))
    run = partial(generate, model, PROMPTS, 3, eos_id=None)
    assert run() == run(uniforms=np.full((3, 3), 0.5))


def test_rooms_are_powers_of_two() -> None:
    rooms = {generation.power_of_two(limit, generation._LEAST_ROOM) for limit in range(1, 2049)}
    assert sorted(rooms) == [64, 128, 256, 512, 1024, 2048]
    model = make("mha", ctx_len=160)
    draw = partial(generate, model, [1, 5], temperature=1.0, eos_id=None, seed=4)
    assert draw(max_new_tokens=70).tokens[0][:60] == draw(max_new_tokens=60).tokens[0]


# Pictures and clips --------------------------------------------------------------------------------------------------


@cache
def make_omni(ctx_len: int = 40) -> OmniLM:
    thinker = ThinkerConfig(**(SIZES | {"ctx_len": ctx_len, "n_layers": 2}))
    audio = AudioConfig(d=12, heads=3, ff=16, layers=1, dropout=0.0)
    vision = VisionConfig(img_size=16, patch=8, d=12, layers=1, heads=2, ff=16, dropout=0.0)
    model = OmniLM.from_config(OmniConfig(thinker, audio, vision))
    model.thinker.lm_head.kernel[...] = model.thinker.lm_head.kernel[...] * 4.0
    return model


def senses(seed: int = 0) -> tuple[list, list]:
    """For three prompts: a picture, a clip of 13 frames, and both, with one of 30."""
    draw = np.random.default_rng(seed)
    images = [jnp.asarray(draw.random((3, 16, 16), np.float32)) for _ in range(2)]
    mels = [jnp.asarray(draw.standard_normal((frames, 128), np.float32)) for frames in (13, 30)]
    return [images[0], None, images[1]], [None, mels[0], mels[1]]


def omni_logits(model: OmniLM, ids: list[int], image, mel) -> jax.Array:
    """Logits (V,) after `ids` by a full forward, padded on the right to one length."""
    graphdef, params = nnx.split(model)
    given = {"images": None if image is None else image[None], "mel": None if mel is None else mel[None]}
    padded = np.pad(np.array([ids]), ((0, 0), (0, 12 - len(ids))))
    return forward(graphdef, params, padded, **given)[0, len(ids) - 13]


def test_pictures_and_clips_stand_before_their_prompts() -> None:
    """Prompts of unequal length, each with another sense: greedy is the full forwards', and each row is as alone."""
    model, (images, mels) = make_omni(), senses()
    result = generate(model, PROMPTS, 6, eos_id=None, images=images, mels=mels)
    for prompt, image, mel, tokens, logprobs in zip(PROMPTS, images, mels, result.tokens, result.logprobs, strict=True):
        ids = list(prompt)
        for token, logprob in zip(tokens, logprobs, strict=True):
            expected = jax.nn.log_softmax(omni_logits(model, ids, image, mel))
            assert token == int(jnp.argmax(expected))
            assert abs(logprob - float(expected[token])) <= 200 * EPS * float(jnp.abs(expected).max())
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
    dark = generate(model, PROMPTS[0], 4, images=[jnp.zeros((3, 16, 16))], eos_id=None)
    assert seen.logprobs != dark.logprobs


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
    blind = OmniLM.from_config(OmniConfig(ThinkerConfig(**SIZES), AudioConfig(d=12, ff=16, layers=1)))
    with pytest.raises(ValueError, match=r"images are given, .*no section 'vision'"):
        generate(blind, PROMPTS, 3, images=images, mels=mels)
    with pytest.raises(ValueError, match=r"mels are given, .*no section 'audio'"):
        generate(blind.thinker, PROMPTS, 3, mels=mels)


def test_nothing_is_compiled_twice_with_pictures(monkeypatch) -> None:
    """12 calls of one bucket, of text, picture and clip, trace each program once."""
    model = make_omni(64)
    chex.clear_trace_counter()
    monkeypatch.setattr(generation, "_choose", chex.assert_max_traces(generation._choose, n=2))
    rng = np.random.default_rng(0)
    for i in range(12):
        image = rng.random((3, 16, 16), np.float32)
        mel = rng.standard_normal((33 + i, 128), np.float32)
        prompt = rng.integers(3, 31, size=9 + i % 8).tolist()
        result = generate(model, prompt, 2 + i, eos_id=None, images=[image], mels=[mel])
        assert len(result.tokens[0]) == 2 + i
    with pytest.raises(AssertionError, match="_choose"):  # the count sees a program without the clip
        generate(model, prompt, 3, eos_id=None, images=[image])
