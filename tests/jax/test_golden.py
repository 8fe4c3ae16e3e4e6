"""The reference family's own numbers in float64: logits, greedy decoding, and four steps of its training recipe."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni_jax.cache import init_cache
from omni_jax.config import ThinkerConfig
from omni_jax.losses import cross_entropy
from omni_jax.optim import adamw_step, clip_grad_norm, init_adamw_state, warmup_cosine
from omni_jax.thinker import ThinkerLM

GOLDEN_RELATIVE = 1e-12
GOLDEN = Path(__file__).parent.parent / "golden"
FILES = ("thinker_gqa", "thinker_mha_swiglu")


def assert_golden(actual, expected: np.ndarray, what: str) -> None:
    """Largest difference relative to the largest value of the tensor; exact zeros stay exact."""
    actual = np.asarray(actual)
    assert actual.dtype == np.float64 == expected.dtype, what  # a "float64" test in float32 would be void
    assert actual.shape == expected.shape, what
    assert np.isfinite(actual).all(), what
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= GOLDEN_RELATIVE, f"{what}: relative error {error:.2e}"


@pytest.fixture(scope="module", params=FILES)
def golden(request) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def to_leaf_name(key: str) -> str:
    """The torch key as this twin's leaf: weight is kernel, scale or embedding by its module."""
    module, _, kind = key.rpartition(".")
    if kind == "weight":
        last = module.rpartition(".")[2]
        kind = "embedding" if last == "tok_emb" else "scale" if last.startswith("norm") else "kernel"
    return f"{module}.{kind}"


def in_torch_layout(leaf: str, value):
    return np.asarray(value).T if leaf.endswith(".kernel") else np.asarray(value)


@pytest.fixture
def model(golden, _float64):
    """(graphdef, parameters): built in float32 and merged with float64 leaves, which decide the compute dtype."""
    config = ThinkerConfig.from_dict(json.loads(golden["cfg"].tobytes()))
    graphdef, params = nnx.split(ThinkerLM.from_config(config), nnx.Param)
    weights = {to_leaf_name(name[2:]): w.astype(np.float64) for name, w in golden.items() if name.startswith("w/")}
    flat = nnx.to_flat_state(params)
    assert {".".join(map(str, path)) for path, _ in flat} == set(weights)
    for path, leaf in flat:
        name = ".".join(map(str, path))
        leaf.set_value(jnp.asarray(in_torch_layout(name, weights[name])))
    return graphdef, nnx.from_flat_state(flat)


def forward(model, tokens):
    graphdef, params = model
    return jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))(params, tokens)


def test_logits(golden, model) -> None:
    assert_golden(forward(model, golden["x/tokens"]), golden["x/logits"], "logits")


def test_the_bound_sees_a_slightly_wrong_model(golden, model) -> None:
    graphdef, params = model
    module = nnx.merge(graphdef, params)
    for norm in (module.norm, *(block.norm1 for block in module.blocks), *(block.norm2 for block in module.blocks)):
        norm.epsilon = 1.001e-5
    with pytest.raises(AssertionError, match="relative error"):
        assert_golden(module(golden["x/tokens"]), golden["x/logits"], "logits")


def test_greedy_by_full_forwards(golden, model) -> None:
    expected = golden["x/greedy"]
    steps = golden["x/greedy_step_logits"]
    tokens = expected[None, : len(expected) - len(steps)]
    for step in steps:
        # Padded on the right to one length, so that one program serves every step; causality hides the padding.
        padded = np.pad(tokens, ((0, 0), (0, len(expected) - tokens.shape[1])))
        last = forward(model, padded)[0, tokens.shape[1] - 1]
        assert_golden(last, step, f"logits after {tokens.shape[1]} tokens")
        tokens = np.append(tokens, [[int(jnp.argmax(last))]], axis=1)
    assert tokens[0].tolist() == expected.tolist()


def test_greedy_by_cached_steps(golden, model) -> None:
    graphdef, params = model
    run = jax.jit(lambda params, tokens, cache: nnx.merge(graphdef, params)(tokens, cache=cache, last_only=True))
    expected = golden["x/greedy"].tolist()
    steps = golden["x/greedy_step_logits"]
    prompt = expected[: len(expected) - len(steps)]
    tokens, fed, cache = [*prompt], 0, init_cache(nnx.merge(graphdef, params), 1, len(expected))
    for step in steps:
        logits, cache = run(params, jnp.asarray([tokens[fed:]]), cache)
        assert_golden(logits[0, 0], step, f"logits after {len(tokens)} tokens")
        fed = len(tokens)
        tokens.append(int(jnp.argmax(logits[0, 0])))
    assert tokens == expected


def test_four_steps_of_the_recipe(golden, model) -> None:
    graphdef, params = model
    tokens = jnp.asarray(golden["x/tokens"])

    @jax.jit
    def train_step(params, state):
        def loss_of(params):
            return cross_entropy(nnx.merge(graphdef, params)(tokens[:, :-1]), tokens[:, 1:])

        loss, grads = jax.value_and_grad(loss_of)(params)
        clipped, norm = clip_grad_norm(grads, 1.0)
        lr = 1e-2 * warmup_cosine(state.t, warmup_steps=2, max_steps=10)
        params, state = adamw_step(params, clipped, state, lr, weight_decay=0.1)
        return params, state, loss, norm, grads

    state = init_adamw_state(params)
    losses, norms, grad0 = [], [], None
    for _ in golden["x/losses"]:
        params, state, loss, norm, grads = train_step(params, state)
        grad0 = grads if grad0 is None else grad0
        losses.append(loss)
        norms.append(norm)
    assert_golden(jnp.stack(losses), golden["x/losses"], "losses")
    assert_golden(jnp.stack(norms), golden["x/grad_norms"], "grad_norms")
    trees = {
        kind: {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(tree)}
        for kind, tree in (("grad0", grad0), ("final", params))
    }
    compared = 0
    for key, expected in golden.items():
        kind, _, name = key.removeprefix("x/").partition("/")
        if kind in trees:
            leaf = to_leaf_name(name)
            assert_golden(in_torch_layout(leaf, trees[kind][leaf]), expected, key)
            compared += 1
    assert compared == sum(key.startswith(("x/grad0/", "x/final/")) for key in golden) > 0
