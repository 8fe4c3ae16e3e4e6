"""What the shared fixtures claim to reach, they reach: each fact is recomputed here from weights and inputs."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("jax")

from omni_torch.attention import CausalSelfAttention  # noqa: E402
from omni_torch.checkpoint import save_checkpoint  # noqa: E402
from omni_torch.config import ThinkerConfig  # noqa: E402
from omni_torch.layers import GELUMLP, MoE, RMSNorm, SwiGLU, apply_rope  # noqa: E402
from omni_torch.losses import cross_entropy  # noqa: E402
from omni_torch.thinker import ThinkerLM  # noqa: E402
from parity import fixtures  # noqa: E402
from parity.checks import Scope, _twins  # noqa: E402
from parity.corpus import byte_like_ids  # noqa: E402
from parity.errors import Misuse  # noqa: E402
from parity.fixtures import ASSETS, CONFIGS, REGIMES, SHAPE, STEPS  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
each_config = pytest.mark.parametrize("name", CONFIGS)
PLAIN, LEFT, RIGHT, NOTHING, GAPS, SINGLE = range(SHAPE[0])
"""The rows of the stress batch."""


def inputs(name: str, regime: str) -> tuple[dict[str, np.ndarray], tuple[np.ndarray, ...]]:
    """Weights and batch as the default run has them."""
    return _twins._inputs(Scope(), name, regime)  # pyright: ignore[reportReturnType]


def model_of(name: str, weights: dict[str, np.ndarray]) -> Any:
    model = ThinkerLM.from_config(fixtures.configuration(name)).double().eval()
    model.load_state_dict({key: torch.from_numpy(value).double() for key, value in weights.items()})
    return model


def seen_by(model: Any, kind: Any, batch: tuple[np.ndarray, ...]) -> list[tuple[Any, ...]]:
    """(module, *inputs) of every module of `kind` when the batch goes through."""
    seen: list[tuple[Any, ...]] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: seen.append((module, *args)))
        for module in model.modules()
        if isinstance(module, kind)
    ]
    tokens, _, mask, positions = (torch.from_numpy(x) for x in batch)
    model.requires_grad_(False)
    with torch.no_grad():
        model(tokens, attention_mask=mask, positions=positions)
    for hook in hooks:
        hook.remove()
    return seen


def scores(module: CausalSelfAttention, x, cos, sin, mask, cache=None) -> Any:
    """q·k/√d where the key may be seen."""
    B, T, _ = x.shape
    q, k, _ = (module.q(x), module.k(x), None) if module.use_gqa else module.qkv(x).chunk(3, dim=-1)
    q = apply_rope(q.reshape(B, T, module.n_heads, -1), cos, sin)
    k = apply_rope(k.reshape(B, T, module.kv_heads, -1), cos, sin)
    k = k.repeat_interleave(module.n_heads // module.kv_heads, dim=2)
    every = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(module.head_dim)
    return every.masked_select(mask[:, None].expand_as(every))


# --- configurations --------------------------------------------------------------------------------------------------


def test_the_configurations_cover_what_they_claim() -> None:
    every = {name: fixtures.configuration(name) for name in CONFIGS}
    assert list(every) == ["mha-swiglu", "gqa-swiglu", "mha-gelu", "moe", "moe-gqa-gelu", "shipped"]
    sizes = {config.vocab_size for config in every.values()}
    assert min(sizes) < 100 < max(sizes)
    assert sorted({config.head_dim for config in every.values()})[:3] == [6, 8, 12]
    for flag in ("use_gqa", "use_swiglu", "use_moe"):
        assert {getattr(config, flag) for config in every.values()} == {True, False}
    for name, config in every.items():
        if config.use_gqa:
            kv = config.n_heads // 2 if config.kv_groups is None else config.kv_groups
            assert 1 < kv < config.n_heads, "tiled and repeated heads must differ"
        if config.use_moe:
            assert 1 < config.num_experts_per_tok < config.num_experts
        # Nothing hides in two axes of one size, and the default run's batch fits.
        assert len({*SHAPE, config.d_model, config.d_ff, config.vocab_size}) == 5, name
        assert SHAPE[1] not in (config.n_heads, config.head_dim), name
        assert SHAPE[1] <= config.ctx_len


def test_a_configuration_by_file(tmp_path) -> None:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(fixtures.configuration("moe").to_dict()))
    assert fixtures.configuration(str(path)) == fixtures.configuration("moe")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mha-swiglo", "did you mean 'mha-swiglu'?"),
        ("nothing like it", "neither a shared configuration (mha-swiglu, "),
        ("there/is/none.json", "nor a file"),
    ],
)
def test_an_unknown_configuration_is_misuse(name: str, words: str) -> None:
    with pytest.raises(Misuse) as raised:
        fixtures.configuration(name)
    assert words in str(raised.value)


def test_an_unknown_regime_is_misuse() -> None:
    with pytest.raises(Misuse, match=r"regime: 'stale' is not one of fresh, randomised, trained"):
        fixtures.weights_of("moe", "stale")


# --- weights ---------------------------------------------------------------------------------------------------------


@each_config
@pytest.mark.parametrize("regime", REGIMES)
def test_weights_are_complete_float32_and_the_same_each_time(name: str, regime: str) -> None:
    weights = fixtures.weights_of(name, regime)
    model = ThinkerLM.from_config(fixtures.configuration(name))
    assert {k: v.shape for k, v in weights.items()} == {k: tuple(v.shape) for k, v in model.named_parameters()}
    assert {value.dtype for value in weights.values()} == {np.dtype(np.float32)}
    assert all(np.isfinite(value).all() for value in weights.values())
    fixtures._trained.cache_clear()
    again = fixtures.weights_of(name, regime)
    assert all(np.array_equal(weights[key], again[key]) for key in weights)
    if not (name == "shipped" and regime == "trained"):
        other = fixtures.weights_of(name, regime, seed=1)
        assert not np.array_equal(weights["lm_head.weight"], other["lm_head.weight"])


@each_config
def test_randomised_weights_are_nowhere_at_their_initial_value(name: str) -> None:
    fresh, weights = fixtures.weights_of(name, "fresh"), fixtures.weights_of(name, "randomised")
    for key, value in weights.items():
        assert np.mean(value != fresh[key]) > 0.99, key
        if value.ndim == 1:
            initial = 1.0 if "norm" in key else 0.0
            assert np.abs(value - initial).max() > 0.1, key
            assert np.unique(value).size == value.size, key
            assert not np.any(value == initial), key
        else:
            assert np.linalg.matrix_rank(value) == min(value.shape), key


@each_config
def test_trained_weights_have_learned(name: str) -> None:
    """Not fresh ones, and better by far than those on text that neither has seen."""
    fresh, weights = fixtures.weights_of(name, "fresh"), fixtures.weights_of(name, "trained")
    config = fixtures.configuration(name)
    if name == "shipped":
        from omni_torch.tokenizer import BPETokenizer
        from parity import corpus, shipped

        tokenizer = BPETokenizer(shipped.TOKENIZER)
        held_out = [tokenizer.encode(story)[:64] for story in corpus.stories(99, 4, "heldout")]
        ids = torch.from_numpy(corpus.padded_rows(held_out).astype(np.int64))
    else:
        ids = torch.from_numpy(byte_like_ids(config.vocab_size, 8, 33, 0, STEPS + 7).astype(np.int64))

    def loss(state: dict[str, np.ndarray]) -> float:
        with torch.no_grad():
            return float(cross_entropy(model_of(name, state)(ids[:, :-1]), ids[:, 1:]))

    assert loss(weights) < 0.9 * loss(fresh)
    for key, value in weights.items():
        assert not np.array_equal(value, fresh[key]), key


# --- inputs ----------------------------------------------------------------------------------------------------------


@each_config
@pytest.mark.parametrize("regime", REGIMES)
def test_each_row_of_the_batch_is_of_its_kind(name: str, regime: str) -> None:
    tokens, targets, mask, positions = inputs(name, regime)[1]
    B, T = SHAPE
    assert B > 1
    assert all(x.shape == SHAPE for x in (tokens, targets, mask, positions))
    assert mask[PLAIN].all()
    assert not mask[LEFT, :3].any()
    assert mask[LEFT, 3:].all()
    assert not mask[RIGHT, -4:].any()
    assert mask[RIGHT, :-4].all()
    assert not mask[NOTHING].any()
    assert mask[GAPS].all()
    assert mask[SINGLE].tolist() == [True] + [False] * (T - 1)
    # Positions: left padding shifts nothing, gaps have gaps.
    assert positions[LEFT].tolist() == [0, 0, 0, *range(T - 3)]
    assert len(set(np.diff(positions[GAPS]))) > 2
    # Ids: within the vocabulary, varied, one PAD that is attended to.
    assert 0 <= tokens.min() < tokens.max() < fixtures.configuration(name).vocab_size
    assert np.unique(tokens).size > T
    assert (tokens[mask] == 0).any()
    # Two documents in one row, and BOS and EOS among the targets.
    if not fixtures.configuration(name).use_moe:  # there their experts may be tied
        assert tokens[PLAIN, 7:9].tolist() == [2, 1]
        assert {0, 1, 2} < set(targets[PLAIN].tolist())
    assert (tokens[NOTHING] != 0).any()


@each_config
def test_targets_are_the_next_kept_tokens(name: str) -> None:
    tokens, targets, mask, _ = inputs(name, "fresh")[1]
    for b, t in np.ndindex(SHAPE):
        follows = t + 1 < SHAPE[1] and mask[b, t] and mask[b, t + 1]
        assert targets[b, t] == (tokens[b, t + 1] if follows else 0)
    assert 0.3 < np.mean(targets != 0) < 0.7, "ignored and kept targets must both be many"


def test_far_positions_reach_beyond_4000() -> None:
    far = fixtures.far_positions()
    assert far.shape == SHAPE
    assert far.max() > 4000
    assert (far[1] > 4000).all(), "a row that begins there"
    assert (np.diff(far) > 0).all()


@each_config
def test_scores_pass_50_on_both_sides(name: str) -> None:
    """In the calls of the randomised regime: what a clamp at ±50 would change."""
    weights, batch = inputs(name, "randomised")
    loud = fixtures.loud_weights(fixtures.configuration(name), weights)
    assert {key for key in weights if not np.array_equal(weights[key], loud[key])} == {
        "tok_emb.weight",
        *(key for key in weights if key in ("blocks.0.attn.qkv.weight", "blocks.0.attn.q.weight")),
    }
    tokens, targets, mask, _ = batch
    batch = (tokens, targets, mask, np.maximum(np.cumsum(mask, 1) - 1, 0))  # the default positions
    every = torch.cat([scores(*seen) for seen in seen_by(model_of(name, loud), CausalSelfAttention, batch)])
    assert every.max() > 50
    assert every.min() < -50
    # And ordinary ones beside them, or softmax would be a choice everywhere.
    assert 0.2 < (every.abs() < 5).double().mean() < 1.0


@each_config
def test_activations_are_of_every_size(name: str) -> None:
    """What reaches the first norm in the calls: zeros, values next to which eps is large, huge ones, offsets."""
    weights, batch = inputs(name, "randomised")
    model = model_of(name, fixtures.loud_weights(fixtures.configuration(name), weights))
    norm, x = next(seen for seen in seen_by(model, RMSNorm, batch))
    assert norm is model.blocks[0].norm1
    square, mean = x.square().mean(-1), x.mean(-1)
    assert (square == 0).any() or fixtures.configuration(name).use_moe
    assert ((square > 0) & (square < norm.eps)).any()
    assert (square.sqrt() > 1e3).any()
    assert (mean.abs() > 10 * x.std(-1)).any()
    assert ((square.sqrt() > 0.1) & (square.sqrt() < 10)).any(), "and ordinary ones"


@pytest.mark.parametrize("name", [name for name in CONFIGS if "moe" in name])
def test_experts_are_tied_to_the_bit(name: str) -> None:
    weights, batch = inputs(name, "randomised")
    for module, x in seen_by(model_of(name, fixtures.tied_weights(weights)), MoE, batch):
        p = torch.softmax(module.router(x), dim=-1)
        assert (p == p[..., :1]).all()


STRESS = {
    "scores beyond ±50": test_scores_pass_50_on_both_sides,
    "fully masked rows": test_each_row_of_the_batch_is_of_its_kind,
    "left and right padding": test_each_row_of_the_batch_is_of_its_kind,
    "long positions": test_far_positions_reach_beyond_4000,
    "T = 1": "T = 1",
    "ties": test_experts_are_tied_to_the_bit,
    "zeros": test_activations_are_of_every_size,
    "tiny activations": test_activations_are_of_every_size,
    "huge activations": test_activations_are_of_every_size,
    "offsets": test_activations_are_of_every_size,
    "packed documents": test_each_row_of_the_batch_is_of_its_kind,
    "odd shapes": test_the_configurations_cover_what_they_claim,
    "vocabularies beyond and below 100": test_the_configurations_cover_what_they_claim,
}
"""What bugs hide from, and the test here that recomputes it; a name of one of the calls stands for itself."""


def test_every_stress_input_is_looked_at(case) -> None:
    found = case("moe-gqa-gelu", "randomised", "float64")
    for what, held in STRESS.items():
        assert callable(held) or held in found.calls.outputs, what
    assert found.calls.outputs["T = 1"].verdict == "AGREE"
    assert found.calls.shapes["T = 1"][1] == 1
    assert found.tied.verdict == "AGREE"
    assert found.calls.ties == 0, "a tie within the noise would excuse what differs"


@each_config
def test_activations_pass_6_on_both_sides(name: str) -> None:
    """In the randomised regime: what a clipped sigmoid would change."""
    weights, batch = inputs(name, "randomised")
    for kind, entry in ((SwiGLU, "gate_proj"), (GELUMLP, "fc1")):
        seen = seen_by(model_of(name, weights), kind, batch)
        if seen:
            every = torch.cat([getattr(module, entry)(x).flatten() for module, x in seen])
            assert every.max() > 6
            assert every.min() < -6
            return
    pytest.fail("no activation was met")


@pytest.mark.parametrize("name", [name for name in CONFIGS if "moe" in name])
@pytest.mark.parametrize("regime", REGIMES)
def test_no_expert_is_chosen_within_noise(name: str, regime: str, case) -> None:
    """No margin between the last chosen and the first left out is within its noise, in any precision."""
    weights, batch = inputs(name, regime)
    for precision in ("float64", "float32", "bfloat16"):
        assert case(name, regime, precision).main.ties == 0
    used = set()
    for module, x in seen_by(model_of(name, weights), MoE, batch):
        p, order = torch.softmax(module.router(x.flatten(0, 1)), dim=-1).sort(dim=-1, descending=True)
        k = module.num_experts_per_tok
        assert (p[:, k - 1] - p[:, k]).min() > 0.0
        used |= set(order[:, :k].flatten().tolist())
    assert used == set(range(fixtures.configuration(name).num_experts)), "an expert without a token has no gradient"


def test_rows_that_are_not_clear_are_drawn_again() -> None:
    config, calls = fixtures.configuration("moe"), []

    def clear(batch):
        calls.append(batch[0].copy())
        return np.arange(SHAPE[0]) != 2 if len(calls) < 3 else np.ones(SHAPE[0], bool)

    tokens = fixtures.stress_batch(config, clear=clear)[0]
    first = calls[0]
    kept = np.arange(SHAPE[0]) != 2
    assert len(calls) == 3
    assert np.array_equal(tokens[kept], first[kept])
    assert not np.array_equal(tokens[2], first[2])


def test_a_text_gives_the_tokens() -> None:
    config = fixtures.configuration("gqa-swiglu")
    one, two = (fixtures.stress_batch(config, text=text)[0] for text in ("a story of some length" * 3, "zzzz"))
    assert not np.array_equal(one, two)
    letter = ord("z") % (config.vocab_size - 3) + 3
    assert set(np.unique(two)) <= {0, 1, 2, letter}


# --- checkpoints -----------------------------------------------------------------------------------------------------


def checkpoint(folder, name: str = "moe") -> tuple[str, dict[str, np.ndarray]]:
    torch.manual_seed(3)
    model = ThinkerLM.from_config(fixtures.configuration(name))
    path = folder / "own.pt"
    save_checkpoint(path, model=model)
    return str(path), {key: value.detach().numpy() for key, value in model.named_parameters()}


def test_a_checkpoint_gives_the_trained_weights(tmp_path) -> None:
    path, truth = checkpoint(tmp_path)
    weights = fixtures.weights_of("moe", "trained", checkpoint=path)
    assert weights.keys() == truth.keys()
    assert all(np.array_equal(weights[key], truth[key]) for key in truth)


@pytest.mark.parametrize("beside", ["config.json", "own.json"])
def test_the_configuration_beside_a_checkpoint_is_found(tmp_path, beside: str) -> None:
    path, _ = checkpoint(tmp_path)
    (tmp_path / beside).write_text(json.dumps(fixtures.configuration("moe").to_dict()))
    assert _twins.checkpoint_config(path) == fixtures.configuration("moe")
    assert _twins.checkpoint_config(path, "mha-gelu") == fixtures.configuration("mha-gelu")


def test_a_checkpoint_without_a_configuration_is_misuse(tmp_path) -> None:
    path, _ = checkpoint(tmp_path)
    with pytest.raises(Misuse, match=r"no configuration beside .*--config"):
        _twins.checkpoint_config(path)


def test_the_shipped_configuration_is_that_of_the_shipped_weights() -> None:
    config = fixtures.configuration("shipped")
    assert (
        config
        == ThinkerConfig.from_json(ASSETS / "config.json")
        == _twins.checkpoint_config(str(ASSETS / "thinker.pt"))
    )
