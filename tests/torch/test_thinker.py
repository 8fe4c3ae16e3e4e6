"""ThinkerLM: names, inputs it refuses, causality, padding, positions, dtypes."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from omni_torch.config import ThinkerConfig
from omni_torch.layers import TokenIdError
from omni_torch.losses import next_token_loss
from omni_torch.thinker import ThinkerLM, num_parameters

SIZES = {"vocab_size": 31, "n_layers": 2, "d_model": 24, "n_heads": 4, "d_ff": 20, "dropout": 0.0, "ctx_len": 16}
KINDS = {
    "mha-swiglu": {},
    "gqa-swiglu": {"use_gqa": True},
    "mha-gelu": {"use_swiglu": False},
    "moe": {"use_moe": True, "num_experts": 3},
    "moe-gqa-gelu": {"use_moe": True, "num_experts": 3, "use_gqa": True, "kv_groups": 1, "use_swiglu": False},
}
TOKENS = torch.tensor([[1, 5, 9, 30, 2, 7], [1, 8, 8, 3, 11, 0]])
EPS = torch.finfo(torch.float64).eps


@pytest.fixture(params=KINDS)
def model(request) -> ThinkerLM:
    return build(**KINDS[request.param])


def build(**kinds) -> ThinkerLM:
    torch.manual_seed(0)
    return ThinkerLM(**(SIZES | kinds)).double().eval()


def run(model: ThinkerLM, *args, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(*args, **kwargs)


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal up to the rounding of two layers: sums of at most 24 terms, some ten of them in a row."""
    assert float((a - b).abs().max()) <= 10 * 24 * EPS * float(b.abs().max())


def test_keys_and_shapes() -> None:
    common = {"tok_emb.weight": (31, 24), "norm.weight": (24,), "lm_head.weight": (31, 24)}
    common |= {f"blocks.{i}.norm{j}.weight": (24,) for i in range(2) for j in (1, 2)}
    common |= {f"blocks.{i}.attn.o.weight": (24, 24) for i in range(2)}
    moe = {"moe.router.weight": (3, 24)}
    for e in range(3):
        moe |= {f"moe.experts.{e}.fc1.weight": (20, 24), f"moe.experts.{e}.fc1.bias": (20,)}
        moe |= {f"moe.experts.{e}.fc2.weight": (24, 20), f"moe.experts.{e}.fc2.bias": (24,)}
    swiglu = {"mlp.gate_proj.weight": (20, 24), "mlp.up_proj.weight": (20, 24), "mlp.down_proj.weight": (24, 20)}
    for kind, own in (
        ("mha-swiglu", {"attn.qkv.weight": (72, 24)} | swiglu),
        ("gqa-swiglu", {"attn.q.weight": (24, 24), "attn.k.weight": (12, 24), "attn.v.weight": (12, 24)} | swiglu),
        ("moe-gqa-gelu", {"attn.q.weight": (24, 24), "attn.k.weight": (6, 24), "attn.v.weight": (6, 24)} | moe),
    ):
        expected = common | {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in own.items()}
        model = build(**KINDS[kind])
        assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == expected
        assert num_parameters(model) == sum(p.numel() for p in model.parameters())


def test_from_config_and_the_constructor_draw_the_same() -> None:
    config = ThinkerConfig(**SIZES, use_gqa=True)
    torch.manual_seed(0)
    from_config = ThinkerLM.from_config(config)
    assert from_config.config == config
    assert from_config.training
    expected = build(use_gqa=True).state_dict()
    assert all(torch.equal(p.double(), expected[name]) for name, p in from_config.state_dict().items())
    assert from_config.lm_head.weight is not from_config.tok_emb.weight


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="kv_groups=3 is not allowed"):
        build(use_gqa=True, kv_groups=3)


def test_causality_by_gradients(model) -> None:
    """Logits t depend on every input ≤ t (1), on none after it, exactly (2), and on itself (3)."""
    embeddings = torch.randn(2, 6, 24, dtype=torch.float64, requires_grad=True)
    logits = model(embeddings=embeddings)
    for t in range(6):
        (grad,) = torch.autograd.grad(logits[:, t].square().sum(), embeddings, retain_graph=True)
        depends = grad.abs().sum(dim=-1) > 0
        assert depends[:, : t + 1].all()
        assert not depends[:, t + 1 :].any()


def test_embeddings_stand_for_tokens(model) -> None:
    embeddings = model.tok_emb(TOKENS)
    assert torch.equal(run(model, embeddings=embeddings), run(model, TOKENS))
    assert run(model, embeddings=embeddings.float()).dtype == torch.float64


def test_left_padding_changes_nothing(model) -> None:
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), TOKENS], dim=1)
    mask = torch.arange(9).ge(3).expand(2, 9)
    alone = run(model, TOKENS)
    assert_same(run(model, padded, attention_mask=mask)[:, 3:], alone)
    square = mask[:, None, :].expand(2, 9, 9)
    assert_same(run(model, padded, attention_mask=square)[:, 3:], alone)
    assert torch.isfinite(run(model, padded, attention_mask=torch.zeros(2, 9, dtype=torch.bool))).all()


def test_positions(model) -> None:
    given = torch.arange(6)
    default = run(model, TOKENS)
    for positions in (given, given[None], given.expand(2, 6), given.int()):
        assert torch.equal(run(model, TOKENS, positions=positions), default)
    far = run(model, TOKENS, positions=given + 5000)  # beyond ctx_len; RoPE knows differences of positions only
    assert float((far - default).abs().max()) <= 5006 * 24 * EPS * float(default.abs().max())
    assert not torch.equal(run(model, TOKENS, positions=given * 2), default)


def test_longer_than_ctx_len_needs_positions() -> None:
    model = build()
    tokens = torch.ones(1, 17, dtype=torch.int64)
    with pytest.raises(ValueError, match="17 tokens, allowed are up to ctx_len=16"):
        model(tokens)
    assert run(model, tokens, positions=torch.arange(17)).shape == (1, 17, 31)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "got neither"),
        ({"tokens": TOKENS, "embeddings": torch.ones(2, 6, 24)}, "got both"),
        ({"tokens": TOKENS[0]}, r"tokens have shape \(6,\): must be \(B, T\)"),
        ({"tokens": TOKENS[:, :0]}, r"shape \(2, 0\)"),
        ({"embeddings": torch.ones(6, 24)}, r"must be \(B, T, D\)"),
        ({"embeddings": torch.ones(2, 6, 23)}, "d_model=24"),
        ({"embeddings": torch.ones(2, 6, 24, dtype=torch.int64)}, "floating point"),
        ({"tokens": TOKENS.double()}, "must hold integers, got float64"),
        ({"tokens": TOKENS, "positions": torch.arange(5)}, r"positions have shape \(5,\)"),
        ({"tokens": TOKENS, "positions": torch.arange(6.0)}, "must be integers"),
        ({"tokens": TOKENS, "attention_mask": torch.ones(2, 5, dtype=torch.bool)}, "attention_mask has shape"),
    ],
)
def test_bad_inputs(arguments, words) -> None:
    with pytest.raises(ValueError, match=words):
        build()(**arguments)


@pytest.mark.parametrize("bad", [-1, 31])
def test_token_ids_are_checked(bad) -> None:
    tokens = TOKENS.clone()
    tokens[1, 2] = bad
    with pytest.raises(TokenIdError, match=rf"tokens\[1, 2\] = {bad} "):
        build()(tokens)


class OnlyFloat64(TorchDispatchMode):
    """Fails on the first operation that makes a floating tensor of another dtype."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                assert x.dtype == torch.float64, func
        return out


def test_float64_stays_float64_everywhere(model) -> None:
    mask = TOKENS != 0
    with OnlyFloat64():
        next_token_loss(model(TOKENS, attention_mask=mask), TOKENS).backward()
    with pytest.raises(AssertionError), OnlyFloat64():  # the detector detects
        model.float()(TOKENS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_near_float64_and_keeps_its_dtype(model, dtype) -> None:
    low = build_like(model).to(dtype)
    exact = build_like(low)
    logits = run(low, TOKENS)
    assert logits.dtype == dtype
    error = (logits.double() - run(exact, TOKENS)).abs().max() / run(exact, TOKENS).abs().max()
    assert 0.0 < float(error) <= 16 * torch.finfo(dtype).eps
    next_token_loss(low(TOKENS), TOKENS).backward()
    assert all(p.grad.dtype == dtype and bool(p.grad.isfinite().all()) for p in low.parameters())


def build_like(model: ThinkerLM) -> ThinkerLM:
    copy = ThinkerLM.from_config(model.config).double().eval()
    copy.load_state_dict({name: p.double() for name, p in model.state_dict().items()})
    return copy


def test_dropout_is_on_in_training_only() -> None:
    model = build(dropout=0.5)
    assert torch.equal(run(model, TOKENS), run(model, TOKENS))
    model.train()
    assert not torch.equal(run(model, TOKENS), run(model, TOKENS))


def test_forward_hooks_see_what_the_twin_names() -> None:
    model = build()
    names = ["tok_emb", "norm", *(f"blocks.{i}{part}" for i in range(2) for part in ("", ".attn", ".mlp"))]
    seen = {}
    for name in names:
        # update() returns None: a hook that returns something replaces the output
        model.get_submodule(name).register_forward_hook(lambda *args, name=name: seen.update({name: args[-1].shape}))
    run(model, TOKENS)
    assert seen == dict.fromkeys(names, (2, 6, 24))


def test_lists_and_other_positions_are_refused_by_name() -> None:
    model = ThinkerLM(vocab_size=11, n_layers=1, d_model=8, n_heads=2, d_ff=8, dropout=0.0).eval()
    tokens = torch.tensor([[1, 2]])
    for wrong, name in (([[1, 2]], "tokens"), (tokens.numpy(), "tokens")):
        with pytest.raises(ValueError, match=rf"{name} is a .*, must be a tensor; pass torch.as_tensor"):
            model(wrong)
    with pytest.raises(ValueError, match="positions is a list"):
        model(tokens, positions=[0, 1])
    with pytest.raises(ValueError, match="attention_mask is a list"):
        model(tokens, attention_mask=[[True, True]])
    for dtype in (torch.bool, torch.complex64, torch.float32):
        with pytest.raises(ValueError, match=r"positions have shape .* must be integers"):
            model(tokens, positions=torch.zeros(2, dtype=dtype))
