"""Each layer against its formula in float64 numpy, and its behaviour in low precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from omni_torch.layers import (
    GELUMLP,
    MoE,
    RMSNorm,
    SwiGLU,
    TokenEmbedding,
    TokenIdError,
    apply_rope,
    check_token_ids,
    rope_frequencies,
    statistics_dtype,
)

ULPS = 64  # sums of at most 64 terms, left to right


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """float64, every parameter drawn afresh: a norm scale of 1 or a bias of 0 would hide its absence."""
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.normal_()
    return module


def assert_close(actual: torch.Tensor, expected: np.ndarray) -> None:
    actual = actual.detach().numpy()
    assert actual.dtype == np.float64
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= ULPS * np.finfo(np.float64).eps * np.abs(expected).max()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def weights(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}


def test_check_token_ids_names_the_first_bad_one() -> None:
    tokens = torch.tensor([[0, 1, 100], [2, 101, -1]])
    for kind in (TokenIdError, ValueError, IndexError):
        with pytest.raises(kind, match=r"tokens\[1, 1\] = 101 .* 0 to 100 \(vocab_size=101\)"):
            check_token_ids(tokens, 101)
    with pytest.raises(TokenIdError, match=r"prompt\[0\] = -1 "):
        check_token_ids(torch.tensor([-1]), 101, "prompt")
    check_token_ids(tokens[:1], 101)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_check_token_ids_wants_integers(dtype) -> None:
    with pytest.raises(ValueError, match="must hold integers, got") as caught:
        check_token_ids(torch.ones(2, dtype=dtype), 5)
    assert not isinstance(caught.value, TokenIdError)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "uint32", "int32", "uint64"])
def test_ids_of_any_integers(dtype) -> None:
    """In their own dtype 300 or 70000 may wrap round to a small number."""
    ids = torch.tensor([5, 44, 127]).to(getattr(torch, dtype))
    table = TokenEmbedding(70_000, 1)
    assert torch.equal(table(ids), table(ids.long()))
    with pytest.raises(TokenIdError, match=r"tokens\[2\] = 127 "):
        check_token_ids(ids, 127)
    with pytest.raises(TokenIdError, match=r"tokens\[0\] = 18446744073709551615 "):
        check_token_ids(torch.tensor([-1]).view(torch.uint64), 70_000)


@pytest.mark.parametrize("tokens", [[1, 2], np.array([1, 2])])
def test_the_embedding_takes_tensors(tokens) -> None:
    with pytest.raises(ValueError, match=r"must be a tensor; pass torch.as_tensor\(tokens\)"):
        TokenEmbedding(7, 4)(tokens)


def test_statistics_dtype() -> None:
    wide = {torch.float64: torch.float64, torch.float32: torch.float32}
    wide |= {torch.bfloat16: torch.float32, torch.float16: torch.float32}
    assert {dtype: statistics_dtype(dtype) for dtype in wide} == wide


def test_embedding_looks_up_rows() -> None:
    embedding = TokenEmbedding(7, 4)
    tokens = torch.tensor([[6, 0], [3, 3]], dtype=torch.int32)
    assert torch.equal(embedding(tokens), embedding.weight[tokens.long()])
    for bad in (7, -1):
        with pytest.raises(TokenIdError):
            embedding(torch.tensor([[bad]]))


def test_embedding_has_no_padding_row() -> None:
    embedding = TokenEmbedding(7, 4)
    embedding(torch.tensor([[0]])).sum().backward()
    assert torch.equal(embedding.weight.grad[0], torch.ones(4))


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e4])
def test_rms_norm(size) -> None:
    norm = randomised(RMSNorm(12))
    x = np.random.default_rng(1).normal(size=(2, 3, 12)) * size
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weights(norm)["weight"]
    assert_close(norm(torch.from_numpy(x)), expected)


def test_rms_norm_rounds_once_in_bfloat16() -> None:
    norm = randomised(RMSNorm(64)).to(torch.bfloat16)
    x = torch.randn(8, 64).to(torch.bfloat16)
    wide = RMSNorm(64)
    wide.weight.data = norm.weight.data.float()
    assert torch.equal(norm(x), wide(x.float()).to(torch.bfloat16))


def test_rope_by_the_formula() -> None:
    d, theta = 6, 100.0
    x = np.random.default_rng(2).normal(size=(2, 4, 3, d))
    positions = np.array([[0, 1, 2, 5000], [7, 7, 0, 1]])
    angle = positions[..., None] * theta ** (-2.0 * np.arange(d // 2) / d)
    as_complex = (x[..., : d // 2] + 1j * x[..., d // 2 :]) * np.exp(1j * angle)[:, :, None]
    expected = np.concatenate([as_complex.real, as_complex.imag], axis=-1)
    cos, sin = rope_frequencies(torch.from_numpy(positions), d, theta, torch.float64)
    turned = apply_rope(torch.from_numpy(x), cos, sin)
    # An angle of 5000 radians is known to 5000 · eps.
    assert np.abs(turned.numpy() - expected).max() <= 5000 * 4 * np.finfo(np.float64).eps
    assert torch.equal(turned[0, 0], torch.from_numpy(x[0, 0]))


def test_rope_angles_stay_wide() -> None:
    positions = torch.arange(300)[None]
    cos, sin = rope_frequencies(positions, 8, dtype=torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.float32
    x = torch.randn(1, 300, 2, 8).to(torch.bfloat16)
    assert torch.equal(apply_rope(x, cos, sin), apply_rope(x.float(), cos, sin).to(torch.bfloat16))


def test_swiglu() -> None:
    mlp = randomised(SwiGLU(8, 12))
    w = weights(mlp)
    x = np.random.default_rng(3).normal(size=(2, 3, 8))
    gate, up = x @ w["gate_proj.weight"].T, x @ w["up_proj.weight"].T
    assert_close(mlp(torch.from_numpy(x)), (gate * sigmoid(gate) * up) @ w["down_proj.weight"].T)


def test_gelu_mlp_is_the_exact_form() -> None:
    mlp = randomised(GELUMLP(8, 12))
    w = weights(mlp)
    x = np.random.default_rng(4).normal(size=(2, 3, 8))
    h = x @ w["fc1.weight"].T + w["fc1.bias"]
    h = h * 0.5 * (1.0 + np.vectorize(math.erf)(h / math.sqrt(2.0)))
    assert_close(mlp(torch.from_numpy(x)), h @ w["fc2.weight"].T + w["fc2.bias"])


@pytest.mark.parametrize("use_swiglu", [True, False])
def test_moe_by_the_formula(use_swiglu) -> None:
    moe = randomised(MoE(8, 12, num_experts=5, num_experts_per_tok=2, use_swiglu=use_swiglu))
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    expected = np.zeros((2, 3, 8))
    for at in np.ndindex(2, 3):
        logits = moe.router.weight.detach().numpy() @ x[at].numpy()
        p = np.exp(logits) / np.exp(logits).sum()
        chosen = np.argsort(-p)[:2]
        for e in chosen:
            expected[at] += p[e] / (p[chosen].sum() + 1e-8) * moe.experts[e](x[at]).detach().numpy()
    assert_close(moe(x), expected)


def test_moe_ties_go_to_the_lowest_index() -> None:
    moe = randomised(MoE(4, 6, num_experts=64, num_experts_per_tok=2))
    moe.router.weight.data.zero_()
    x = torch.randn(1, 1, 4, dtype=torch.float64)
    expected = (moe.experts[0](x) + moe.experts[1](x)) / 2.0
    assert_close(moe(x), expected.detach().numpy() / (1.0 + 32 * 1e-8))


def test_moe_gives_every_parameter_a_gradient() -> None:
    moe = randomised(MoE(4, 6, num_experts=8, num_experts_per_tok=2))
    x = torch.randn(1, 1, 4, dtype=torch.float64)
    moe(x).square().sum().backward()
    used = [bool(expert.gate_proj.weight.grad.any()) for expert in moe.experts]
    assert sum(used) == 2
    assert bool(moe.router.weight.grad.any())


def test_moe_ignores_an_expert_that_overflows_where_it_was_not_chosen() -> None:
    moe = randomised(MoE(4, 6, num_experts=3, num_experts_per_tok=1))
    x = torch.randn(1, 2, 4, dtype=torch.float64)
    moe.router.weight.data.zero_()
    clean = moe(x)
    moe.experts[2].down_proj.weight.data.fill_(math.inf)
    assert torch.equal(moe(x), clean)
