"""The initializers check: it passes the twins, and rejects wrong draws by name and side."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest

from parity import statistics as st
from parity.checks import Scope, initializers
from parity.verdict import Verdict

THIRD_PARTIES = ("torch.nn.", "flax.nnx.")


@pytest.fixture(scope="module")
def measured():
    return initializers.measure()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_twins_pass(seed):
    rejected = [(m.name, m.side, m.worst) for m in initializers.measure(seed=seed) if m.rejected]
    assert rejected == []


def test_everything_is_looked_at_on_both_sides(measured):
    sides: dict[str, set[str]] = {}
    for m in measured:
        sides.setdefault(m.name, set()).add(m.side)
    for scheme in ("xavier", "kaiming_relu", "default Linear"):
        assert sides[f"{scheme} weight"] == {"jax", "torch", "both"}
        assert {"jax", "torch"} <= sides[f"{scheme} bias"]
    models = ("dense model tok_emb", "dense model blocks.1.mlp.fc2", "dense model biases / bound")
    models += ("moe model lm_head", "moe model blocks.1.attn.k", "moe model blocks.0.moe.router")
    for name in ("default Embedding", *models):
        assert sides[name] == {"jax", "torch", "both"}
    pairs = [initializers._pairs(label) for label in ("dense", "moe")]
    for name in ("zero weight", "zero bias", "dense model norms", "moe model norms", *pairs):
        assert sides[name] == {"jax", "torch"}
    for m in measured:
        assert m.decides != m.name.startswith(THIRD_PARTIES)


def _kinds(parameters) -> set[str]:
    """Names without the numbers of layers and experts."""
    return {".".join(part for part in name.split(".") if not part.isdigit()) for name in parameters}


def test_every_parameter_of_the_models_is_looked_at():
    from omni_torch.thinker import ThinkerLM

    laws = initializers._laws(initializers.N_DRAWS)
    for label, model in initializers._MODELS.items():
        ours = {name for name in laws if name.startswith(f"{label} model ")}
        for draw in (initializers._draw_jax, initializers._draw_torch):
            assert {name for name in draw(initializers.N_DRAWS, 0) if name.startswith(f"{label} model ")} == ours
        for key in ThinkerLM(**model).state_dict():
            path, leaf = key.rsplit(".", 1)
            assert f"{label} model {path}" in ours or leaf == "bias" or "norm" in path, key


def test_the_models_have_every_kind_of_parameter_between_them():
    """Whatever the switches: the kinds inside the experts are those of a dense MLP."""
    from omni_torch.thinker import ThinkerLM

    sizes = {"vocab_size": 8, "n_layers": 1, "d_model": 8, "n_heads": 2, "d_ff": 4}

    def kinds(model) -> set[str]:
        return {kind.replace("moe.experts.", "mlp.") for kind in _kinds(ThinkerLM(**model).state_dict())}

    drawn = set().union(*(kinds(model) for model in initializers._MODELS.values()))
    for gqa, swiglu, moe in itertools.product([False, True], repeat=3):
        assert kinds({**sizes, "use_gqa": gqa, "use_swiglu": swiglu, "use_moe": moe}) <= drawn


@pytest.mark.parametrize("label", ["dense", "moe"])
def test_the_constructor_of_the_jax_twin_keeps_the_same_laws(monkeypatch, label):
    """It draws with jax.random, from_config with numpy; the check itself leaves it out for its compile time."""
    import jax
    from flax import nnx

    from omni_jax.thinker import ThinkerLM

    def state(key):
        return nnx.state(ThinkerLM(**initializers._MODELS[label], rngs=nnx.Rngs(key)), nnx.Param)

    drawn = jax.jit(state, compiler_options={"xla_backend_optimization_level": 0})(jax.random.key(0))
    leaves = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(drawn)}
    clean = initializers._draw_jax(initializers.N_DRAWS, 0)
    built = initializers._model_samples(label, leaves)
    assert not np.array_equal(built[f"{label} model lm_head"], clean[f"{label} model lm_head"])
    monkeypatch.setattr(initializers, "_draw_jax", lambda *_: {**clean, **built})
    assert [(m.name, m.side, m.worst) for m in initializers.measure() if m.rejected] == []


def test_one_overall_error_level(measured):
    outcomes = [outcome for m in measured for outcome in m.outcomes]
    assert {outcome.level for outcome in outcomes} == {st.share(len(outcomes))}
    assert all(outcome.n >= st.MINIMUM for outcome in outcomes if outcome.unit != "draws that differ")


def test_the_smallest_deviation_seen_is_small(measured):
    for m in measured:
        if m.name.startswith(("xavier", "kaiming", "default")) and m.smallest.test == "std":
            assert m.smallest.smallest < 0.02
            assert m.smallest.n >= initializers.N_DRAWS


def test_every_control_is_rejected():
    controls = initializers.controls()
    assert [control.name for control in controls] == list(initializers.CONTROLS)
    assert all(control.rejected for control in controls), [c for c in controls if not c.rejected]


def test_each_test_alone_sees_what_it_is_there_for():
    level = st.share(250)
    for draw in (initializers._draw_jax, initializers._draw_torch):
        samples = draw(initializers.N_DRAWS, 0)
        law = initializers._laws(initializers.N_DRAWS)["default Linear weight"]
        weight = samples["default Linear weight"].astype(np.float64)
        normal = law.std * samples["default Embedding"].astype(np.float64)
        assert st.std_test(1.02 * weight, law, level).rejected
        assert st.extremes_test(1.001 * weight, law, level).rejected
        assert st.extremes_test(0.999 * weight, law, level).rejected
        assert not st.std_test(normal, law, level).rejected  # this one only the shape gives away
        assert st.ks_test(normal, law, level).rejected
        assert st.chi_square_test(normal, law, level).rejected


@pytest.mark.parametrize("side", ["jax", "torch"])
@pytest.mark.parametrize(
    "name", ["kaiming_relu weight", "dense model blocks.1.attn.o", "default Linear bias", "zero bias"]
)
def test_a_fault_is_named_with_its_tensor_and_side(monkeypatch, side, name):
    drawer = f"_draw_{side}"
    clean = getattr(initializers, drawer)(initializers.N_DRAWS, 0)
    wrong = 1.0 if name == "zero bias" else 0.9 * clean[name]
    monkeypatch.setattr(initializers, drawer, lambda *_: {**clean, name: np.zeros_like(clean[name]) + wrong})
    assert {(m.name, m.side) for m in initializers.measure() if m.rejected and m.side != "both"} == {(name, side)}


@pytest.mark.parametrize("side", ["jax", "torch"])
@pytest.mark.parametrize(("label", "part"), [("dense", "mlp.fc1"), ("moe", "moe.experts.2.up_proj")])
def test_one_key_for_two_layers_is_named(monkeypatch, side, label, part):
    drawer = f"_draw_{side}"
    clean = getattr(initializers, drawer)(initializers.N_DRAWS, 0)
    first, second = (f"{label} model blocks.{i}.{part}" for i in range(2))
    monkeypatch.setattr(initializers, drawer, lambda *_: {**clean, second: clean[first]})
    (found,) = [m for m in initializers.measure() if m.rejected]
    assert (found.name, found.side) == (initializers._pairs(label), side)
    assert found.worst.test == f"correlation {first} × {second}"


@pytest.fixture
def fresh_draws():
    """Faults that are put into the twins themselves must not stay in the cache of draws."""
    drawers = (initializers._draw_jax, initializers._draw_torch)
    for drawer in drawers:
        drawer.cache_clear()
    yield
    for drawer in drawers:
        drawer.cache_clear()


def _wrong_torch_blocks(monkeypatch, before, after):
    import omni_torch.thinker

    class Wrong(omni_torch.thinker.Block):
        def __init__(self, config):
            before()
            super().__init__(config)
            after(self)

    monkeypatch.setattr(omni_torch.thinker, "Block", Wrong)


def _wrong_jax_draws(monkeypatch, change):
    """`change` the drawn leaves, by dotted path."""
    from flax import nnx

    import omni_jax.thinker

    draw = omni_jax.thinker._draw

    def wrong(*args):
        flat = nnx.to_flat_state(draw(*args))
        change({".".join(map(str, path)): leaf for path, leaf in flat})
        return nnx.from_flat_state(flat)

    monkeypatch.setattr(omni_jax.thinker, "_draw", wrong)


@pytest.mark.parametrize("side", ["jax", "torch"])
def test_a_zero_router_in_the_twin_itself_is_seen(monkeypatch, fresh_draws, side):
    def zero(leaves):
        for name, leaf in leaves.items():
            if "router" in name:
                leaf.set_value(0.0 * leaf[...])

    if side == "jax":
        _wrong_jax_draws(monkeypatch, zero)
    else:
        _wrong_torch_blocks(
            monkeypatch, lambda: None, lambda block: block.use_moe and block.moe.router.weight.data.zero_()
        )
    rejected = {(m.name, m.side) for m in initializers.measure() if m.rejected}
    routers = [f"moe model blocks.{i}.moe.router" for i in range(2)]
    assert rejected == {(name, where) for name in routers for where in (side, "both")}


@pytest.mark.parametrize("side", ["jax", "torch"])
def test_one_key_for_all_blocks_in_the_twin_itself_is_seen(monkeypatch, fresh_draws, side):
    def copy(leaves):
        for name, leaf in leaves.items():
            if name.startswith("blocks.1.") and name.endswith("kernel"):
                leaf.set_value(leaves[name.replace("blocks.1.", "blocks.0.")][...])

    if side == "jax":
        _wrong_jax_draws(monkeypatch, copy)
    else:
        import torch

        _wrong_torch_blocks(monkeypatch, lambda: torch.manual_seed(7), lambda block: None)
    rejected = {(m.name, m.side) for m in initializers.measure() if m.rejected}
    labels = ("dense", "moe", "vision") if side == "jax" else ("dense", "moe")  # ViTTiny's layer is torch's own
    assert {(initializers._pairs(label), side) for label in labels} == rejected


def test_a_model_of_zeros_is_rejected_and_not_a_crash(monkeypatch):
    clean = initializers._draw_torch(initializers.N_DRAWS, 0)
    zeros = {name: np.zeros_like(x) for name, x in clean.items() if name.startswith("moe model ")}
    monkeypatch.setattr(initializers, "_draw_torch", lambda *_: {**clean, **zeros})
    rejected = {(m.name, m.side) for m in initializers.measure() if m.rejected and m.side != "both"}
    assert rejected == {(name, "torch") for name in (*zeros, initializers._pairs("moe"))}


def test_a_wrong_gain_in_the_twin_itself_is_seen(monkeypatch, fresh_draws):
    import omni_torch.init

    monkeypatch.setitem(omni_torch.init._GAINS, "relu", 1.0)
    rejected = {(m.name, m.side) for m in initializers.measure() if m.rejected}
    assert rejected == {("kaiming_relu weight", "torch"), ("kaiming_relu weight", "both")}


def test_run_makes_rows_and_controls():
    seen = []
    result = initializers.run(Scope(), lambda done, total, label: seen.append((done, total, label)))
    assert result.verdict is Verdict.AGREE
    assert result.exit_code == 0
    assert result.controls
    assert all(control.rejected for control in result.controls)
    assert all(row.smallest_seen is not None for row in result.rows if row.precision != "float64")
    assert {row.decides for row in result.rows} == {True, False}
    assert seen[-1][0] == seen[-1][1]
    assert "overall error level of 0.0001" in result.notes[0]


def test_too_few_draws_are_refused():
    with pytest.raises(ValueError, match="n_draws must be at least 1000"):
        initializers.measure(n_draws=999)


def test_importing_the_check_imports_no_framework():
    code = "import sys, parity.checks.initializers; print([m for m in ('jax', 'torch', 'flax') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
