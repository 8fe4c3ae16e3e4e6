"""The shipped model continues 100 prompts: both twins give the same ids, greedily and by shared uniforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

import omni_jax.generation  # noqa: E402
import omni_torch.generation  # noqa: E402
from omni_torch.tokenizer import BPETokenizer  # noqa: E402
from parity.checks import sampling  # noqa: E402
from parity.checks.sampling import Setting  # noqa: E402
from parity.corpus import BOS, stories  # noqa: E402
from parity.fixtures import load_twins  # noqa: E402
from parity.shipped import TOKENIZER, WEIGHTS  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = 100
GREEDY_TOKENS = 256
SAMPLED_TOKENS = 64
SETTINGS = (
    Setting(temperature=0.8, top_p=0.95),
    Setting(temperature=1.2, top_k=40),
    Setting(temperature=0.9, top_k=50, top_p=0.9),
)
"""All of one compiled program; the sampling check has the one without truncation."""


@pytest.fixture(scope="module")
def twins() -> tuple[Any, Any]:
    return load_twins(WEIGHTS)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """The first words of held-out stories, of 4 to 16 tokens."""
    tokenizer = BPETokenizer(TOKENIZER)
    return [[BOS, *tokenizer.encode(text)[: 3 + i % 13]] for i, text in enumerate(stories(0, PROMPTS, "heldout"))]


@pytest.fixture(scope="module")
def greedy(twins, prompts) -> tuple[Any, Any]:
    model, module = twins
    return (
        omni_jax.generation.generate(model, prompts, GREEDY_TOKENS, eos_id=None),
        omni_torch.generation.generate(module, prompts, GREEDY_TOKENS, eos_id=None),
    )


def parted(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> dict[int, int]:
    """row -> the first step at which its ids differ."""
    assert [len(row) for row in ours] == [len(row) for row in theirs]
    steps = {row: [a != b for a, b in zip(x, y)] for row, (x, y) in enumerate(zip(ours, theirs))}
    return {row: differs.index(True) for row, differs in steps.items() if any(differs)}


def assert_ties(module: Any, prompts: Any, setting: Setting, uniforms: Any, ours: Any, theirs: Any) -> None:
    """Whatever differs first in a row must be a tie within the noise there; what follows it does not count."""
    for row, step in parted(ours, theirs).items():
        uniform = None if uniforms is None else float(uniforms[row, step])
        text = [*prompts[row], *ours[row][:step]]
        print(f"\nrow {row} parts at step {step}")
        assert sampling.tied(module, text, setting, uniform, ours[row][step], theirs[row][step]), (row, step)


def test_greedy_gives_the_same_ids(twins, prompts, greedy) -> None:
    ours, theirs = greedy
    assert len(ours.tokens) == PROMPTS
    assert all(len(row) == GREEDY_TOKENS for row in ours.tokens)
    assert_ties(twins[1], prompts, Setting(temperature=0.0), None, ours.tokens, theirs.tokens)
    # Ties are the exception.
    assert len(parted(ours.tokens, theirs.tokens)) < PROMPTS // 10


def test_greedy_texts_are_no_constant(greedy) -> None:
    """A model that says one thing would make the comparison an empty one."""
    texts = {tuple(row) for row in greedy[0].tokens}
    assert len(texts) > PROMPTS // 2
    assert all(len(set(row)) > 20 for row in texts)


def test_log_probabilities_agree_up_to_the_noise_of_a_logit(twins, prompts, greedy) -> None:
    ours, theirs = greedy
    equal = [row for row in range(PROMPTS) if row not in parted(ours.tokens, theirs.tokens)]
    row = equal[0]
    for step in (0, 17, 40):
        logits, spread = sampling.noisy_logits(twins[1], [*prompts[row], *ours.tokens[row][:step]])
        truth = logits - np.logaddexp.reduce(logits)
        chosen = ours.tokens[row][step]
        # The log-sum errs by no more than the worst logit; beside it the result is rounded.
        unit = spread[chosen] + spread.max() + np.finfo(np.float32).eps * abs(truth[chosen])
        for found in (ours.logprobs[row][step], theirs.logprobs[row][step]):
            assert abs(found - truth[chosen]) < sampling.THRESHOLDS.tie * unit


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_shared_uniforms_give_the_same_ids(twins, prompts, setting) -> None:
    model, module = twins
    uniforms = np.random.default_rng(3).random((PROMPTS, SAMPLED_TOKENS), np.float32)
    arguments = {"temperature": setting.temperature, "top_k": setting.top_k, "top_p": setting.top_p}
    arguments |= {"uniforms": uniforms, "eos_id": None}
    ours = omni_jax.generation.generate(model, prompts, SAMPLED_TOKENS, **arguments).tokens
    theirs = omni_torch.generation.generate(module, prompts, SAMPLED_TOKENS, **arguments).tokens
    assert len({tuple(row) for row in ours}) == PROMPTS
    assert_ties(module, prompts, setting, uniforms, ours, theirs)
    assert len(parted(ours, theirs)) < PROMPTS // 10


def test_cached_greedy_is_greedy_by_full_forwards(twins, prompts, greedy) -> None:
    """By induction: in one full forward over prompt and continuation, each token is the likeliest after those before.

    Four rows of one length, without padding, up to the last token.
    """
    model, module = twins
    length = len(prompts[12])
    rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length][:4]
    assert len(rows) == 4
    forwards = {
        "jax": lambda ids: np.asarray(jax.jit(lambda net, x: net(x))(model, ids)),
        "torch": lambda ids: module(torch.from_numpy(ids).long()).detach().numpy(),
    }
    for result, (side, forward) in zip(greedy, forwards.items()):
        texts = [[*prompts[row], *result.tokens[row]] for row in rows]
        likeliest = forward(np.asarray(texts, np.int32)[:, :-1]).argmax(-1)[:, length - 1 :].tolist()
        chosen = [result.tokens[row] for row in rows]
        print(side, parted(likeliest, chosen))
        for at, step in parted(likeliest, chosen).items():
            ids = texts[at][: length + step]
            assert sampling.tied(module, ids, Setting(temperature=0.0), None, likeliest[at][step], chosen[at][step])


def test_what_is_no_tie_is_refused(twins, prompts, greedy) -> None:
    """The second likeliest token, and what another uniform would draw, are not within the noise."""
    module, first = twins[1], greedy[0].tokens[0][0]
    logits, spread = sampling.noisy_logits(module, prompts[0])
    second = int(np.argsort(-logits)[1])
    assert logits.argmax() == first
    assert sampling.possible_ids(logits, spread, Setting(temperature=0.0), None) == {first}
    assert not sampling.tied(module, prompts[0], Setting(temperature=0.0), None, first, second)
    even = logits.copy()
    even[second] = even[first] - spread[first]
    assert sampling.possible_ids(even, spread, Setting(temperature=0.0), None) == {first, second}
    assert len(sampling.possible_ids(logits, spread, Setting(), 0.4321)) == 1
