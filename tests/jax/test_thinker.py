"""ThinkerLM: names, inputs it refuses, causality, padding, positions, dtypes."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni_jax.config import ThinkerConfig
from omni_jax.layers import TokenIdError
from omni_jax.losses import next_token_loss
from omni_jax.thinker import ThinkerLM, num_parameters

SIZES = {"vocab_size": 31, "n_layers": 2, "d_model": 24, "n_heads": 4, "d_ff": 20, "dropout": 0.0, "ctx_len": 16}
KINDS = {
    "mha-swiglu": {},
    "gqa-swiglu": {"use_gqa": True},
    "mha-gelu": {"use_swiglu": False},
    "moe": {"use_moe": True, "num_experts": 3},
    "moe-gqa-gelu": {"use_moe": True, "num_experts": 3, "use_gqa": True, "kv_groups": 1, "use_swiglu": False},
}
TOKENS = np.array([[1, 5, 9, 30, 2, 7], [1, 8, 8, 3, 11, 0]])
EPS = np.finfo(np.float64).eps


@cache
def split(kind: str = "mha-swiglu"):
    """(graphdef, parameters) of a float32 model; at dropout 0 nothing else is in it."""
    return nnx.split(ThinkerLM.from_config(ThinkerConfig(**(SIZES | KINDS[kind]))), nnx.Param)


def cast(params, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


@partial(jax.jit, static_argnums=0)
def forward(graphdef, params, *args, **kwargs):
    return nnx.merge(graphdef, params)(*args, **kwargs)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["gqa-swiglu", "moe-gqa-gelu"])
def run(request, x64):
    graphdef, params = split(request.param)
    return partial(forward, graphdef, cast(params, jnp.float64))


def assert_same(a: jax.Array, b: jax.Array) -> None:
    """Equal up to the rounding of two layers: sums of at most 24 terms, some ten of them in a row."""
    assert a.dtype == b.dtype == jnp.float64
    assert float(jnp.abs(a - b).max()) <= 10 * 24 * EPS * float(jnp.abs(b).max())


def test_leaves_and_shapes() -> None:
    common = {"tok_emb.embedding": (31, 24), "norm.scale": (24,), "lm_head.kernel": (24, 31)}
    common |= {f"blocks.{i}.norm{j}.scale": (24,) for i in range(2) for j in (1, 2)}
    common |= {f"blocks.{i}.attn.o.kernel": (24, 24) for i in range(2)}
    moe = {"moe.router.kernel": (24, 3)}
    for e in range(3):
        moe |= {f"moe.experts.{e}.fc1.kernel": (24, 20), f"moe.experts.{e}.fc1.bias": (20,)}
        moe |= {f"moe.experts.{e}.fc2.kernel": (20, 24), f"moe.experts.{e}.fc2.bias": (24,)}
    swiglu = {"mlp.gate_proj.kernel": (24, 20), "mlp.up_proj.kernel": (24, 20), "mlp.down_proj.kernel": (20, 24)}
    for kind, own in (
        ("mha-swiglu", {"attn.qkv.kernel": (24, 72)} | swiglu),
        ("gqa-swiglu", {"attn.q.kernel": (24, 24), "attn.k.kernel": (24, 12), "attn.v.kernel": (24, 12)} | swiglu),
        ("moe-gqa-gelu", {"attn.q.kernel": (24, 24), "attn.k.kernel": (24, 6), "attn.v.kernel": (24, 6)} | moe),
    ):
        expected = common | {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in own.items()}
        graphdef, params = split(kind)
        assert {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(params)} == expected
        assert num_parameters(nnx.merge(graphdef, params)) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_from_config_and_the_constructor_make_the_same_model() -> None:
    config = ThinkerConfig(**(SIZES | {"n_layers": 1, "dropout": 0.5}))
    one = ThinkerLM.from_config(config, rngs=nnx.Rngs(3))
    traced = nnx.eval_shape(lambda: ThinkerLM.from_config(config, rngs=nnx.Rngs(3)))
    assert one.config == traced.config == config
    assert nnx.graphdef(one) == nnx.graphdef(traced)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), nnx.state(one)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), nnx.state(traced)
    )
    again, other = (ThinkerLM.from_config(config, rngs=nnx.Rngs(seed)).lm_head.kernel[...] for seed in (3, 4))
    assert jnp.array_equal(again, one.lm_head.kernel[...])
    assert not jnp.array_equal(other, one.lm_head.kernel[...])


@pytest.mark.parametrize("build", [ThinkerLM.from_config, None])
def test_default_initialisation(build) -> None:
    """Linear within ±1/√fan_in and reaching out to it, Embedding of unit variance, norms 1; nothing drawn twice."""
    seen = set()
    config = ThinkerConfig(**(SIZES | KINDS["moe-gqa-gelu"] | {"n_layers": 1}))
    model = build(config) if build else ThinkerLM(**config.to_dict(), rngs=nnx.Rngs(0))
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        x = np.asarray(leaf[...])
        if path[-1] == "scale":
            assert (x == 1.0).all()
            continue
        if path[-1] == "embedding":
            assert abs(x.std() - 1.0) < 5.0 / np.sqrt(2 * x.size)
        else:
            fan_in = {"fc1": 24, "fc2": 20}.get(path[-2], x.shape[0])
            assert np.abs(x).max() <= 1.0 / np.sqrt(fan_in)
            assert np.abs(x).max() >= 0.6 / np.sqrt(fan_in)
        assert x.ravel()[:4].tobytes() not in seen
        seen.add(x.ravel()[:4].tobytes())


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="kv_groups=3 is not allowed"):
        ThinkerLM(**SIZES, use_gqa=True, kv_groups=3, rngs=nnx.Rngs(0))


def test_causality_by_gradients(x64) -> None:
    """Logits t depend on every input ≤ t (1), on none after it, exactly (2), and on itself (3)."""
    for kind in ("mha-swiglu", "moe-gqa-gelu"):
        graphdef, params = split(kind)
        model = nnx.merge(graphdef, cast(params, jnp.float64))
        embeddings = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 24)))
        jacobian = jax.jit(jax.jacrev(lambda x, model=model: jnp.square(model(embeddings=x)).sum(axis=(0, 2))))(
            embeddings
        )
        depends = np.abs(jacobian).sum(axis=-1) > 0
        assert np.array_equal(depends, np.broadcast_to(np.tril(np.ones((6, 6), bool))[:, None], (6, 2, 6))), kind


def test_embeddings_stand_for_tokens(run) -> None:
    embeddings = run.args[1]["tok_emb"]["embedding"][...][TOKENS]
    assert_same(run(embeddings=embeddings), run(TOKENS))
    assert run(embeddings=embeddings.astype(jnp.float32)).dtype == jnp.float64


def test_left_padding_changes_nothing(run) -> None:
    padded = np.concatenate([np.zeros((2, 3), int), TOKENS], axis=1)
    mask = np.broadcast_to(np.arange(9) >= 3, (2, 9))
    alone = run(TOKENS)
    assert_same(run(padded, attention_mask=mask)[:, 3:], alone)
    assert_same(run(padded, attention_mask=np.broadcast_to(mask[:, None, :], (2, 9, 9)))[:, 3:], alone)
    assert jnp.isfinite(run(padded, attention_mask=np.zeros((2, 9), bool))).all()


def test_positions(run) -> None:
    given = np.arange(6)
    default = run(TOKENS)
    for positions in (given, given[None], np.broadcast_to(given, (2, 6))):
        assert_same(run(TOKENS, positions=positions), default)
    far = run(TOKENS, positions=given + 5000)  # beyond ctx_len; RoPE knows differences of positions only
    assert float(jnp.abs(far - default).max()) <= 5006 * 24 * EPS * float(jnp.abs(default).max())
    assert not jnp.array_equal(run(TOKENS, positions=given * 2), default)


def test_longer_than_ctx_len_needs_positions() -> None:
    graphdef, params = split()
    tokens = np.ones((1, 17), int)
    with pytest.raises(ValueError, match="17 tokens, allowed are up to ctx_len=16"):
        forward(graphdef, params, tokens)
    assert forward(graphdef, params, tokens, positions=np.arange(17)).shape == (1, 17, 31)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "got neither"),
        ({"tokens": TOKENS, "embeddings": np.ones((2, 6, 24))}, "got both"),
        ({"tokens": TOKENS[0]}, r"tokens have shape \(6,\): must be \(B, T\)"),
        ({"tokens": TOKENS[:, :0]}, r"shape \(2, 0\)"),
        ({"embeddings": np.ones((6, 24))}, r"must be \(B, T, D\)"),
        ({"embeddings": np.ones((2, 6, 23))}, "d_model=24"),
        ({"embeddings": np.ones((2, 6, 24), int)}, "floating point"),
        ({"tokens": TOKENS.astype(float)}, "must hold integers, got float64"),
        ({"tokens": TOKENS, "positions": np.arange(5)}, r"positions have shape \(5,\)"),
        ({"tokens": TOKENS, "positions": np.arange(6.0)}, "must be integers"),
        ({"tokens": TOKENS, "attention_mask": np.ones((2, 5), bool)}, "attention_mask has shape"),
    ],
)
def test_bad_inputs(arguments, words) -> None:
    with pytest.raises(ValueError, match=words):
        nnx.merge(*split())(**arguments)


@pytest.mark.parametrize("bad", [-1, 31])
def test_token_ids_are_checked_on_the_host_and_nan_inside_jit(bad) -> None:
    tokens = TOKENS.copy()
    tokens[1, 2] = bad
    with pytest.raises(TokenIdError, match=rf"tokens\[1, 2\] = {bad} "):
        nnx.merge(*split())(tokens)
    nan = jnp.isnan(forward(*split(), tokens))
    assert not nan[0].any()
    assert nan[1].all()  # a row of NaN among the values of attention reaches every query of its sequence


def intermediates(jaxpr):
    """Every value of a jaxpr and of the jaxprs inside it."""
    for eqn in jaxpr.eqns:
        yield from ((eqn.primitive.name, var.aval) for var in eqn.outvars)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from intermediates(inner)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_stays_float64_everywhere(x64, kind) -> None:
    graphdef, params = split(kind)

    def loss(params, tokens):
        return next_token_loss(nnx.merge(graphdef, params)(tokens, attention_mask=tokens != 0), tokens)

    for dtype, expected in ((jnp.float64, {"float64"}), (jnp.float32, {"float32"})):
        jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(cast(params, dtype), TOKENS).jaxpr
        floating = {aval.dtype.name for _, aval in intermediates(jaxpr) if jnp.issubdtype(aval.dtype, jnp.floating)}
        assert floating == expected


def test_taps_carry_the_names_of_the_torch_modules() -> None:
    for kind, branch in (("mha-swiglu", "mlp"), ("moe-gqa-gelu", "moe")):
        graphdef, params = split(kind)
        jaxpr = jax.make_jaxpr(partial(forward, graphdef))(params, TOKENS)
        inner = jaxpr.jaxpr.eqns[0].params["jaxpr"].jaxpr
        names = [eqn.params["name"] for eqn in inner.eqns if eqn.primitive.name == "name"]
        blocks = [f"blocks.{i}{part}" for i in range(2) for part in (".attn", f".{branch}", "")]
        assert names == ["tok_emb", *blocks, "norm"]


@pytest.mark.parametrize("kind", ["gqa-swiglu", "moe-gqa-gelu"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_near_float64_and_keeps_its_dtype(kind, dtype) -> None:
    graphdef, params = split(kind)
    low = cast(params, dtype)
    loss = jax.jit(lambda params: next_token_loss(nnx.merge(graphdef, params)(TOKENS), TOKENS))
    logits = forward(graphdef, low, TOKENS)
    assert logits.dtype == dtype
    assert loss(low).dtype == jnp.float32
    grads = jax.tree.leaves(jax.jit(jax.grad(loss))(low))
    assert all(grad.dtype == dtype and bool(jnp.isfinite(grad).all()) for grad in grads)
    with jax.enable_x64(True):
        exact = forward(graphdef, cast(low, jnp.float64), TOKENS)
        error = jnp.abs(logits.astype(jnp.float64) - exact).max() / jnp.abs(exact).max()
    assert 0.0 < float(error) <= 16 * float(jnp.finfo(dtype).eps)


def test_mixed_precision_computes_in_dtype_and_stores_in_param_dtype() -> None:
    config = ThinkerConfig(**(SIZES | {"n_layers": 1}), use_gqa=True)
    model = ThinkerLM.from_config(config, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.float32)}
    assert model(TOKENS).dtype == jnp.bfloat16
    assert model(embeddings=jnp.ones((1, 2, 24))).dtype == jnp.bfloat16


@pytest.mark.parametrize("graph", [True, False])
def test_both_graph_modes_of_nnx(graph) -> None:
    with nnx.set_graph_mode(graph):
        model = ThinkerLM.from_config(ThinkerConfig(**(SIZES | {"n_layers": 1, "dropout": 0.5})))
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        assert jax.tree.leaves(rest)

        def logits(params, rest):
            return nnx.merge(graphdef, params, rest)(TOKENS)

        assert jnp.isfinite(jax.jit(logits)(params, rest)).all()
        model.eval()
        assert jnp.array_equal(model(TOKENS), model(TOKENS))
        model.train()
        assert not jnp.array_equal(model(TOKENS), model(TOKENS))


def test_lists_and_other_positions_are_refused_by_name() -> None:
    model = ThinkerLM(vocab_size=11, n_layers=1, d_model=8, n_heads=2, d_ff=8, dropout=0.0, rngs=nnx.Rngs(0))
    tokens = jnp.array([[1, 2]])
    with pytest.raises(ValueError, match="tokens is a list, must be an array"):
        model([[1, 2]])
    with pytest.raises(ValueError, match="positions is a list"):
        model(tokens, positions=[0, 1])
    for dtype in (jnp.bool_, jnp.complex64, jnp.float32):
        with pytest.raises(ValueError, match=r"positions have shape .* must be integers"):
            model(tokens, positions=jnp.zeros(2, dtype))
