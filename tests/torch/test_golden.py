"""The reference family's own numbers in float64: logits, greedy decoding, and four steps of its training recipe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from omni_torch.cache import init_cache
from omni_torch.config import ThinkerConfig
from omni_torch.losses import cross_entropy
from omni_torch.optim import adamw_step_many_, clip_grad_norm_, init_adamw_state, warmup_cosine
from omni_torch.thinker import ThinkerLM

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


@pytest.fixture
def model(golden) -> ThinkerLM:
    config = ThinkerConfig.from_dict(json.loads(golden["cfg"].tobytes()))
    model = ThinkerLM.from_config(config).double().eval()
    weights = {name[2:]: torch.from_numpy(w).double() for name, w in golden.items() if name.startswith("w/")}
    model.load_state_dict(weights, strict=True)
    return model


def test_logits(golden, model) -> None:
    with torch.no_grad():
        assert_golden(model(torch.from_numpy(golden["x/tokens"])), golden["x/logits"], "logits")


def test_the_bound_sees_a_slightly_wrong_model(golden, model) -> None:
    for norm in [module for module in model.modules() if hasattr(module, "eps")]:
        norm.eps = 1.001e-5
    with torch.no_grad(), pytest.raises(AssertionError, match="relative error"):
        assert_golden(model(torch.from_numpy(golden["x/tokens"])), golden["x/logits"], "logits")


def test_greedy_by_full_forwards(golden, model) -> None:
    expected = golden["x/greedy"]
    steps = golden["x/greedy_step_logits"]
    tokens = torch.from_numpy(expected)[None, : len(expected) - len(steps)]
    for step in steps:
        with torch.no_grad():
            last = model(tokens)[0, -1]
        assert_golden(last, step, f"logits after {tokens.shape[1]} tokens")
        tokens = torch.cat([tokens, last.argmax()[None, None]], dim=1)
    assert tokens[0].tolist() == expected.tolist()


def test_greedy_by_cached_steps(golden, model) -> None:
    expected = golden["x/greedy"].tolist()
    steps = golden["x/greedy_step_logits"]
    prompt = expected[: len(expected) - len(steps)]
    tokens, fed, cache = [*prompt], 0, init_cache(model, 1, len(expected))
    for step in steps:
        logits, _ = model(torch.tensor([tokens[fed:]]), cache=cache, last_only=True)
        assert_golden(logits[0, 0], step, f"logits after {len(tokens)} tokens")
        fed = len(tokens)
        tokens.append(int(logits[0, 0].argmax()))
    assert tokens == expected


def test_four_steps_of_the_recipe(golden, model) -> None:
    model.train()
    assert model.config.dropout == 0.0
    tokens = torch.from_numpy(golden["x/tokens"])
    names, params = zip(*model.named_parameters(), strict=True)
    states = [init_adamw_state(p) for p in params]
    losses, norms, grad0 = [], [], {}
    for step in range(len(golden["x/losses"])):
        loss = cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        grads = list(torch.autograd.grad(loss, params))
        if step == 0:
            grad0 = {name: grad.clone() for name, grad in zip(names, grads, strict=True)}
        losses.append(loss.item())
        norms.append(clip_grad_norm_(grads, 1.0).item())
        lr = 1e-2 * warmup_cosine(step, warmup_steps=2, max_steps=10)
        states = adamw_step_many_(list(params), grads, states, lr, weight_decay=0.1)
    assert_golden(losses, golden["x/losses"], "losses")
    assert_golden(norms, golden["x/grad_norms"], "grad_norms")
    final = dict(zip(names, params, strict=True))
    compared = 0
    for key, expected in golden.items():
        kind, _, name = key.removeprefix("x/").partition("/")
        if kind in ("grad0", "final"):
            assert_golden((grad0 if kind == "grad0" else final)[name].detach(), expected, key)
            compared += 1
    assert compared == sum(key.startswith(("x/grad0/", "x/final/")) for key in golden) > 0
