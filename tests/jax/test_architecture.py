"""omni_jax.architecture: what shapes tell and what they cannot, config files found, and models made from files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from omni_jax.architecture import Architecture, find_config, infer_config  # noqa: E402
from omni_jax.checkpoint import (  # noqa: E402
    CheckpointError,
    export_weights,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from omni_jax.config import ThinkerConfig  # noqa: E402
from omni_jax.thinker import ThinkerLM  # noqa: E402

SHIPPED = Path(__file__).parent.parent.parent / "parity" / "assets"
SIZE = dict(vocab_size=11, n_layers=2, d_model=16, n_heads=4, d_ff=12, dropout=0.0, rope_theta=1e4, ctx_len=8)
KINDS = {
    "mha": {},
    "gqa": {"use_gqa": True},
    "one group": {"use_gqa": True, "kv_groups": 1},
    "all groups": {"use_gqa": True, "kv_groups": 4},
    "gelu": {"use_swiglu": False},
    "moe": {"use_moe": True, "num_experts": 3},
    "moe of gelu and gqa": {"use_moe": True, "num_experts": 2, "use_swiglu": False, "use_gqa": True},
    "one expert": {"use_moe": True, "num_experts": 1, "num_experts_per_tok": 1},
}
ASSUMED = ("dropout", "rope_theta", "ctx_len", "num_experts_per_tok")


def make_model(seed=0, **more):
    return ThinkerLM(**(SIZE | more), rngs=nnx.Rngs(seed))


def make_weights(**more):
    return {key: value.copy() for key, value in export_weights(make_model(**more)).items()}


def zeros(*shape):
    return np.zeros(shape, np.float32)


def thirds(value):
    return np.split(value, 3)


def split_apart(weights):
    """q, k and v in place of qkv."""
    made = {}
    for key, value in weights.items():
        if ".qkv." in key:
            made |= {key.replace("qkv", part): rows for part, rows in zip("qkv", thirds(value), strict=True)}
        else:
            made[key] = value
    return made


def equal(a, b):
    return list(a) == list(b) and all(np.array_equal(a[key], b[key]) for key in a)


def logits(model):
    model.eval()
    return np.asarray(model(jnp.asarray([[1, 5, 7]])))


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_a_hint_tell_the_model(kind):
    weights = make_weights(**KINDS[kind])
    found = infer_config(weights, n_heads=4)
    wanted = ThinkerConfig(**(SIZE | KINDS[kind]))
    assert isinstance(found, Architecture)
    for name, value in wanted.to_dict().items():
        if kind == "all groups" and name in ("use_gqa", "kv_groups"):
            assert not getattr(found.config, name)  # the same function: q, k and v of equal shape
        elif name == "kv_groups":
            assert getattr(found.config, name) == (wanted.kv_heads if wanted.use_gqa else None)
        elif name not in ASSUMED:
            moe = wanted.use_moe or name != "num_experts"
            assert getattr(found.config, name) == value
            assert found.told[name] == ("hint" if name == "n_heads" else "shapes" if moe else "assumed")
        else:
            assert found.told[name] == "assumed"
    assert list(found.told) == list(wanted.to_dict())
    load_weights(ThinkerLM.from_config(found.config), weights)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_that_agrees_is_taken_as_it_is(tmp_path, kind):
    wanted = ThinkerConfig(**(SIZE | KINDS[kind]))
    wanted.to_json(tmp_path / "c.json")
    for config in (wanted, tmp_path / "c.json", str(tmp_path / "c.json")):
        for n_heads in (None, 4):
            found = infer_config(make_weights(**KINDS[kind]), config=config, n_heads=n_heads)
            assert found.config == wanted
            assert found.told["ctx_len"] == "config file"
            assert found.told["n_heads"] == ("config file" if n_heads is None else "hint")
            assert found.told["d_ff"] == "shapes"


def test_heads_that_shapes_do_not_tell_are_asked_for():
    with pytest.raises(ValueError, match=r"do not tell n_heads: must be one of 1, 2, 4, 8, .*config=.*n_heads="):
        infer_config(make_weights())
    with pytest.raises(ValueError, match=r"must be one of 2, 4, 8, "):
        infer_config(make_weights(use_gqa=True))
    with pytest.raises(ValueError, match=r"must be one of 4, 8, "):
        infer_config(make_weights(use_gqa=True, kv_groups=1))
    for wrong in (3, 16, 0, -4, True, 4.5, "4"):
        with pytest.raises(ValueError, match=r"n_heads=.* does not fit the checkpoint's shapes: must be one of 1, 2"):
            infer_config(make_weights(), n_heads=wrong)


def test_heads_that_shapes_tell_need_no_hint():
    found = infer_config(make_weights(d_model=2, n_heads=1))
    assert (found.config.n_heads, found.told["n_heads"]) == (1, "shapes")
    assert infer_config(make_weights(d_model=6, n_heads=3, use_gqa=True, kv_groups=1)).config.n_heads == 3


def test_split_attention_reads_as_not_grouped():
    state = split_apart(make_weights())
    found = infer_config(state, n_heads=4).config
    assert (found.use_gqa, found.kv_groups) == (False, None)
    load_weights(ThinkerLM.from_config(found), state)


CONTRADICTIONS = {
    "layers": ({}, {"n_layers": 3}, "n_layers=3, and the shapes say 2"),
    "vocabulary": ({}, {"vocab_size": 12}, "vocab_size=12, and the shapes say 11"),
    "width": ({}, {"d_model": 32}, "d_model=32, and the shapes say 16"),
    "grouped": ({}, {"use_gqa": True}, "use_gqa=True, and the shapes say False"),
    "groups": ({"use_gqa": True}, {"use_gqa": True, "kv_groups": 1}, "1 key/value heads"),
    "other heads": ({"use_gqa": True}, {"use_gqa": True, "n_heads": 2, "kv_groups": 2}, "2 key/value heads"),
    "branch": ({"use_swiglu": False}, {}, "use_swiglu=True, and the shapes say False"),
    "experts": ({"use_moe": True, "num_experts": 3}, {"use_moe": True}, "num_experts=8, and the shapes say 3"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_config_of_another_model_is_refused(name):
    model, config, word = CONTRADICTIONS[name]
    with pytest.raises(ValueError, match=word):
        infer_config(make_weights(**model), config=ThinkerConfig(**(SIZE | config)))
    with pytest.raises(ValueError, match=r"n_heads=2 and the config's n_heads=4 contradict"):
        infer_config(make_weights(), config=ThinkerConfig(**SIZE), n_heads=2)


DAMAGED = {
    "another model": (lambda s: (s.clear(), s.update({"transformer.h.0.w": zeros(3)})), "tok_emb.weight is missing"),
    "flat embedding": (lambda s: s.update({"tok_emb.weight": zeros(3)}), r"tok_emb.weight has shape \(3,\)"),
    "empty embedding": (lambda s: s.update({"tok_emb.weight": zeros(0, 16)}), r"has shape \(0, 16\)"),
    "a block gone": (lambda s: [s.pop(key) for key in list(s) if key.startswith("blocks.0.")], r"blocks are \[1\]"),
    "no blocks": (lambda s: [s.pop(key) for key in list(s) if key.startswith("blocks.")], r"blocks are \[\]"),
    "a far block": (lambda s: s.update({"blocks.99999.norm1.weight": zeros(16)}), r"blocks are \[0, 1, 99999\]"),
    "no branch": (lambda s: s.pop("blocks.0.mlp.gate_proj.weight"), "has neither mlp.gate_proj.weight nor"),
    "a key gone": (lambda s: s.pop("blocks.1.norm2.weight"), "blocks.1.norm2.weight is missing"),
    "a key more": (lambda s: s.update({"extra.weight": zeros(1)}), "extra.weight is unexpected"),
    "a 0-d key": (lambda s: s.update({"norm.weight": zeros()}), r"norm.weight has shape \(\), not \(16,\)"),
    "a wrong shape": (lambda s: s.update({"lm_head.weight": zeros(11, 15)}), r"lm_head.weight has shape \(11, 15\)"),
    "odd width": (lambda s: s.update({"tok_emb.weight": zeros(11, 15)}), "no n_heads fits d_model=15"),
    "many experts": (
        lambda s: s.update({f"blocks.0.moe.experts.{i}.fc1.weight": zeros(1, 1) for i in range(2000)}),
        "is missing",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_state_is_refused(name):
    weights = make_weights()
    change, word = DAMAGED[name]
    change(weights)
    with pytest.raises(CheckpointError, match=word):
        infer_config(weights, n_heads=4)


def test_a_file_without_a_thinker_says_so(tmp_path):
    save_checkpoint(tmp_path / "v.pt", model={}, parts={"vit": {"cls": zeros(1, 1, 4)}})
    (tmp_path / "config.json").write_text("no JSON")  # is not even looked at
    for read in (lambda p: infer_config(load_checkpoint(p)), ThinkerLM.from_checkpoint):
        with pytest.raises(CheckpointError, match=r"no weights of ThinkerLM, only of vit \(kind vision\)"):
            read(tmp_path / "v.pt")


def test_configs_are_found_where_the_family_has_them(tmp_path):
    config = ThinkerConfig(**SIZE)
    file = tmp_path / "thinker_best.pt"
    save_checkpoint(file, model=make_model())
    assert find_config(file) is None
    assert find_config(tmp_path) is None
    (tmp_path / "thinker_best.json").write_text(json.dumps({"loss": 3}))  # of something else
    assert find_config(file) is None
    config.to_json(tmp_path / "config.json")
    assert find_config(file) == find_config(tmp_path) == tmp_path / "config.json"
    flat = config.to_dict()
    for beside in (flat, {"thinker": flat, "lr": 1e-3}, {"config": flat, "steps": 3}):
        (tmp_path / "thinker_best.json").write_text(json.dumps(beside))
        assert find_config(file) == tmp_path / "thinker_best.json"
        assert infer_config(load_checkpoint(file), config=find_config(file)).config == config
    (tmp_path / "thinker_best.json").write_text(json.dumps({"config": flat | {"d_model": 15}}))
    with pytest.raises(ValueError, match=r"thinker_best.json', under 'config': .*d_model=15"):
        ThinkerLM.from_checkpoint(file)
    (tmp_path / "thinker_best.json").unlink()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"checkpoint .*thinker_best.pt': config file .*config.json: not JSON"):
        ThinkerLM.from_checkpoint(file)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_from_a_file_computes_the_same(tmp_path, kind):
    model = make_model(**KINDS[kind])
    save_checkpoint(tmp_path / "best.pt", model=model)
    made = ThinkerLM.from_checkpoint(tmp_path / "best.pt", n_heads=4)
    assert made.config.ctx_len == 512
    with pytest.raises(ValueError, match=r"best.pt': the checkpoint's shapes do not tell n_heads"):
        ThinkerLM.from_checkpoint(tmp_path / "best.pt")
    model.config.to_json(tmp_path / "config.json")
    made = ThinkerLM.from_checkpoint(tmp_path)
    assert made.config == model.config
    assert equal(export_weights(made), export_weights(model))
    if kind == "gqa":
        assert np.array_equal(logits(made), logits(model))
    assert ThinkerLM.from_checkpoint(tmp_path, config=model.config).config == model.config


def test_dropout_of_a_loaded_model_is_off(tmp_path):
    model = make_model(dropout=0.5)
    save_checkpoint(tmp_path / "a.pt", model=model)
    made = ThinkerLM.from_checkpoint(tmp_path / "a.pt", config=model.config)
    tokens = jnp.asarray([[1, 5, 7]])
    assert np.array_equal(np.asarray(made(tokens)), logits(model))


def test_a_loaded_model_has_the_dtype_of_its_file(tmp_path):
    model = make_model(param_dtype=jnp.bfloat16)
    save_checkpoint(tmp_path / "b.pt", model=model)
    made = ThinkerLM.from_checkpoint(tmp_path / "b.pt", n_heads=4)
    assert equal(export_weights(made), export_weights(model))
    assert made(jnp.asarray([[1, 2]])).dtype == jnp.bfloat16
    wide = ThinkerLM.from_checkpoint(tmp_path / "b.pt", n_heads=4, param_dtype=jnp.float32)
    assert wide.norm.scale.get_value().dtype == jnp.float32
    mixed = make_weights() | {"norm.weight": np.ones(16, np.float16)}
    save_checkpoint(tmp_path / "m.pt", model=mixed)
    with pytest.raises(CheckpointError, match=r"m.pt': its weights have the dtypes float16, float32"):
        ThinkerLM.from_checkpoint(tmp_path / "m.pt", n_heads=4)
    save_checkpoint(tmp_path / "n.pt", model=make_weights() | {"norm.weight": np.full(16, np.nan, np.float32)})
    with pytest.raises(
        CheckpointError, match=r"n.pt.: its weights hold values that are NaN or Inf \(16 in norm.weight\); take an"
    ):
        ThinkerLM.from_checkpoint(tmp_path / "n.pt", n_heads=4)


def test_a_float64_file_needs_a_word(tmp_path):
    save_checkpoint(tmp_path / "d.pt", model={key: value.astype(np.float64) for key, value in make_weights().items()})
    with pytest.raises(ValueError, match=r"float64.*param_dtype=jnp.float32"):
        ThinkerLM.from_checkpoint(tmp_path / "d.pt", n_heads=4)
    made = ThinkerLM.from_checkpoint(tmp_path / "d.pt", n_heads=4, param_dtype=jnp.float32)
    assert equal(export_weights(made), make_weights())


def test_the_shipped_model_is_read_from_its_file():
    made = ThinkerLM.from_checkpoint(SHIPPED / "thinker.pt")
    described = json.loads((SHIPPED / "thinker.json").read_text())
    assert made.config.to_dict() == described["config"]
    found = infer_config(load_checkpoint(SHIPPED / "thinker.pt"), n_heads=4)
    told = {name for name, source in found.told.items() if source == "shapes"}
    assert {"vocab_size", "n_layers", "d_model", "d_ff", "use_gqa", "kv_groups", "use_swiglu", "use_moe"} <= told
    assert {name: found.config.to_dict()[name] for name in told} == {n: described["config"][n] for n in told}


def test_a_config_may_be_a_dict_and_must_be_a_config():
    flat = ThinkerConfig(**SIZE).to_dict()
    del flat["ctx_len"]
    found = infer_config(make_weights(), config={"thinker": flat, "lr": 1e-3})
    assert found.config == ThinkerConfig(**(SIZE | {"ctx_len": 512}))
    assert (found.told["rope_theta"], found.told["ctx_len"]) == ("config file", "assumed")
    assert found.assumed == {"ctx_len": 512}  # not the numbers of experts: there are none
    with pytest.raises(ValueError, match="unknown key 'heads'"):
        infer_config(make_weights(), config={"heads": 4})
    with pytest.raises(ValueError, match="config is a int: must be a ThinkerConfig, a dict of its fields, or the path"):
        infer_config(make_weights(), config=3)
    assert "num_experts" in infer_config(make_weights(use_moe=True, num_experts=2), n_heads=4).told
    assert infer_config(make_weights(use_moe=True), n_heads=4).assumed["num_experts_per_tok"] == 2


def test_what_a_config_file_leaves_out_is_assumed(tmp_path):
    flat = ThinkerConfig(**SIZE).to_dict()
    del flat["dropout"]
    (tmp_path / "config.json").write_text(json.dumps(flat))
    found = infer_config(make_weights(), config=tmp_path / "config.json")
    assert found.assumed == {"dropout": 0.1}
    assert found.told["ctx_len"] == "config file"


def test_frequencies_of_another_model_are_named():
    with pytest.raises(CheckpointError, match="inv_freq are RoPE's frequencies, which other models save"):
        infer_config(make_weights() | {"blocks.0.attn.rotary.inv_freq": zeros(2)}, n_heads=4)
