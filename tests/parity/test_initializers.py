"""The initializers check: it passes the twins, and rejects wrong draws by name and side."""

from __future__ import annotations

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
    for name in ("default Embedding", "model tok_emb", "model lm_head", "model blocks.1.mlp.fc2"):
        assert sides[name] == {"jax", "torch", "both"}
    for name in ("zero weight", "zero bias", "model norms", "all pairs of a model's tensors"):
        assert sides[name] == {"jax", "torch"}
    for m in measured:
        assert m.decides != m.name.startswith(THIRD_PARTIES)


def test_every_parameter_of_the_model_is_looked_at():
    from omni_torch.thinker import ThinkerLM

    state = ThinkerLM(**initializers._MODEL).state_dict()
    laws = initializers._laws(initializers.N_DRAWS)
    seen = {name.removeprefix("model ") for name in laws if name.startswith("model ")}
    for key in state:
        path, leaf = key.rsplit(".", 1)
        assert path in seen or leaf == "bias" or "norm" in path, key


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
@pytest.mark.parametrize("name", ["kaiming_relu weight", "model blocks.1.attn.o", "default Linear bias", "zero bias"])
def test_a_fault_is_named_with_its_tensor_and_side(monkeypatch, side, name):
    drawer = f"_draw_{side}"
    clean = getattr(initializers, drawer)(initializers.N_DRAWS, 0)
    wrong = 1.0 if name == "zero bias" else 0.9 * clean[name]
    monkeypatch.setattr(initializers, drawer, lambda *_: {**clean, name: np.zeros_like(clean[name]) + wrong})
    assert {(m.name, m.side) for m in initializers.measure() if m.rejected and m.side != "both"} == {(name, side)}


@pytest.mark.parametrize("side", ["jax", "torch"])
def test_one_key_for_two_layers_is_named(monkeypatch, side):
    drawer = f"_draw_{side}"
    clean = getattr(initializers, drawer)(initializers.N_DRAWS, 0)
    layers = {"model blocks.1.mlp.fc1": clean["model blocks.0.mlp.fc1"]}
    monkeypatch.setattr(initializers, drawer, lambda *_: {**clean, **layers})
    (found,) = [m for m in initializers.measure() if m.rejected]
    assert (found.name, found.side) == ("all pairs of a model's tensors", side)
    assert found.worst.test == "correlation model blocks.0.mlp.fc1 × model blocks.1.mlp.fc1"


def test_a_wrong_gain_in_the_twin_itself_is_seen(monkeypatch):
    import omni_torch.init

    monkeypatch.setitem(omni_torch.init._GAINS, "relu", 1.0)
    initializers._draw_torch.cache_clear()
    try:
        rejected = {(m.name, m.side) for m in initializers.measure() if m.rejected}
    finally:
        initializers._draw_torch.cache_clear()
    assert rejected == {("kaiming_relu weight", "torch"), ("kaiming_relu weight", "both")}


def test_run_makes_rows_and_controls():
    seen = []
    result = initializers.run(Scope(), lambda done, total, label: seen.append((done, total, label)))
    assert result.verdict is Verdict.AGREE
    assert result.exit_code == 0
    assert result.controls
    assert all(control.rejected for control in result.controls)
    assert all(row.smallest_seen is not None for row in result.rows)
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
