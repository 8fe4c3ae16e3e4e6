"""The table of optimizers: ours are the nearest to the oracle, and each library's distance has its cause."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("jax")

import omni_jax.optim  # noqa: E402
import omni_torch.optim  # noqa: E402
from parity import optimizers, oracle  # noqa: E402
from parity.cli import app  # noqa: E402
from parity.errors import Misuse  # noqa: E402
from parity.optimizers import FLOOR, NEAREST, OURS, PARTIES, compare, lines, note, problem  # noqa: E402

STEPS = 50
THEIRS = [party for party in PARTIES if party not in OURS]


@pytest.fixture(scope="module")
def standings(one_thread):
    seen = []
    result = compare(problem(STEPS), progress=lambda done, total, label: seen.append((done, total, label)))
    assert [done for done, _, _ in seen] == list(range(len(seen)))
    assert seen[-1][0] == seen[-1][1]
    return {s.party: s for s in result}


def test_everybody_is_in_the_table(standings) -> None:
    assert next(iter(standings)) == FLOOR
    assert set(standings) == {FLOOR, *PARTIES}
    assert [s.rank for s in standings.values()] == list(range(len(PARTIES) + 1))
    bits = [s.bits for s in standings.values() if s.rank]
    assert bits == sorted(bits, reverse=True)


def test_ours_are_at_the_floor_and_before_all_others(standings) -> None:
    assert {standings[party].rank for party in OURS} == {1, 2, 3}
    assert note(list(standings.values())) == "ours are the nearest"
    for party in OURS:
        assert standings[party].noise_units < 2 < min(standings[other].noise_units for other in THEIRS)


def test_every_figure_is_a_figure(standings) -> None:
    for s in standings.values():
        assert math.isfinite(s.bits)
        assert s.by_tensor.keys() == problem(1).start.keys()
        assert 0 < s.ulps[0] < s.ulps[1] < s.ulps[2]
    assert standings[FLOOR].noise_units == 1.0


@pytest.mark.parametrize("party", THEIRS)
def test_each_library_has_its_cause(standings, party) -> None:
    s = standings[party]
    assert s.explained > 0.9
    assert (oracle.OPTAX_CAUSE if party.startswith("optax") else oracle.TORCH_CAUSE) in s.cause
    assert abs(s.without[""] - s.bits) < 0.1  # the emulation stands where the library stands
    every = s.without[next(k for k in s.without if ";" in k)]
    assert abs(every - standings[FLOOR].bits) < 0.1  # and without its causes it is at the floor


def test_the_table_says_it_all(standings) -> None:
    text = "\n".join(lines(list(standings.values())))
    for party in (FLOOR, *PARTIES):
        assert party in text
    assert "rounding the factor 1 - lr*weight_decay" in text
    assert text.endswith("ours are the nearest")


def test_a_worse_adamw_of_ours_is_not_called_the_nearest(monkeypatch, one_thread) -> None:
    """The old way to average, and a decay of its own: each costs the twin its place, and the note says so."""

    def weighted_sum(mean, x, beta):
        return mean.mul_(beta).add_(x, alpha=1.0 - beta)

    def decay_first(p, grad, state, lr, betas, eps, weight_decay):
        p.data.mul_(1 - lr * weight_decay)
        return real(p, grad, state, lr, betas, eps, 0.0)

    real = omni_torch.optim._update_
    parties = ["omni_torch.AdamW", "optax.adamw"]
    with monkeypatch.context() as patch:
        patch.setattr(omni_torch.optim, "_update_", decay_first)
        assert "not the nearest: optax.adamw" in note(compare(problem(STEPS), parties))
    given = problem(300, lr=1e-2)  # the average errs a little more at every step
    clean = compare(given, parties[:1])
    with monkeypatch.context() as patch:
        patch.setattr(omni_torch.optim, "_average_", weighted_sum)
        spoilt = compare(given, parties[:1])
    assert spoilt[1].noise_units > 2 * clean[1].noise_units


def test_a_worse_bias_correction_in_jax_is_seen(monkeypatch, one_thread) -> None:
    import jax.numpy as jnp

    late = lambda beta, t, dtype: 1 - jnp.asarray(beta, dtype) ** t.astype(dtype)  # noqa: E731
    monkeypatch.setattr(omni_jax.optim, "_bias_correction", late)
    (_, ours) = compare(problem(STEPS), ["omni_jax.adamw_step"])
    assert ours.noise_units > 2


def test_problems_are_pure_and_bad_ones_refused() -> None:
    first, second, other = problem(3, seed=4), problem(3, seed=4), problem(3, seed=5)
    assert all(np.array_equal(first.grads[2][k], second.grads[2][k]) for k in first.start)
    assert not np.array_equal(first.grads[2]["matrix"], other.grads[2]["matrix"])
    assert {x.dtype for x in first.start.values()} == {np.dtype(np.float32)}
    with pytest.raises(Misuse, match="steps"):
        problem(0)
    with pytest.raises(Misuse, match="sgd is not known"):
        compare(problem(1), ["sgd"])


def test_no_framework_at_import() -> None:
    code = "import sys, parity.optimizers; print([m for m in ('jax', 'torch', 'optax', 'scipy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(("told", "code"), [(NEAREST, 0), ("not the nearest: optax.adamw before one of ours", 1)])
def test_the_command_prints_and_writes(standings, told, code, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(optimizers, "compare", lambda given, progress: list(standings.values()))
    monkeypatch.setattr(optimizers, "note", lambda standings: told)
    file = tmp_path / "table.json"
    ran = CliRunner().invoke(app, ["optimizers", "--steps", str(STEPS), "--json", str(file)])
    assert ran.exit_code == code
    assert told in ran.output
    record = json.loads(file.read_text())
    assert [s["party"] for s in record["standings"]] == list(standings)
    assert (record["steps"], record["note"]) == (STEPS, told)


@pytest.mark.long
@pytest.mark.parametrize("lr", [1e-3, 3e-4])
def test_the_ranking_after_a_thousand_steps(lr, one_thread, capsys) -> None:
    standings = compare(problem(1000, lr))
    ranks = {s.party: s.rank for s in standings}
    with capsys.disabled():
        print("\n" + "\n".join(lines(standings)))
    assert {ranks[party] for party in OURS} == {1, 2, 3}
    assert ranks["optax.adamw"] == 4  # then torch, whose factor errs the same way at every step
    by_name = {s.party: s for s in standings}
    assert all(by_name[party].bits > by_name[FLOOR].bits - 0.1 for party in OURS)
    assert all(by_name[party].explained > 0.9 for party in THEIRS)
    assert all(by_name[party].bits < by_name[FLOOR].bits - 3 for party in THEIRS if party.startswith("torch"))
