"""The trajectory check: it passes the twins, sees bugs put into either of them, and draws what it saw."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jnp = pytest.importorskip("jax.numpy")

import omni_jax.losses  # noqa: E402
import omni_jax.optim  # noqa: E402
import omni_torch.losses  # noqa: E402
import omni_torch.optim  # noqa: E402
from parity.checks import Scope, trajectory  # noqa: E402
from parity.checks._training import HYPER, Run, Training, batches, perturbed, start  # noqa: E402
from parity.errors import CannotLook, Misuse  # noqa: E402
from parity.report import trajectory as picture  # noqa: E402
from parity.result import CheckResult, RunResult  # noqa: E402
from parity.verdict import Noise, Verdict, judge_tensor  # noqa: E402

Patch = pytest.MonkeyPatch

pytestmark = pytest.mark.usefixtures("one_thread")


def silent(done: int, total: int, label: str) -> None:
    pass


@pytest.fixture(scope="module")
def clean() -> CheckResult:
    return trajectory.run(Scope(), silent)


# --- the twins -------------------------------------------------------------------------------------------------------


def test_the_twins_agree(clean: CheckResult) -> None:
    assert clean.error is None
    assert [row for row in clean.rows if row.verdict is not Verdict.AGREE] == []
    assert clean.verdict is Verdict.AGREE


def test_every_control_is_shown_once_and_rejected(clean: CheckResult) -> None:
    assert sorted(control.name for control in clean.controls) == sorted(trajectory.CONTROLS)
    for control in clean.controls:
        assert control.rejected, control


def test_every_tensor_is_judged_at_every_step(clean: CheckResult) -> None:
    names = {f"{k}: {what}" for k in start(0) for what in ("gradient", "displacement", "m", "v")}
    names |= {"loss", "gradient norm"}
    for precision, number in itertools.product(trajectory.PRECISIONS, trajectory.JUDGED):
        rows = [r.name for r in clean.rows if r.precision == precision and r.regime == f"step {number}"]
        assert sorted(rows) == sorted(names)


def test_the_distances_are_those_of_two_implementations(clean: CheckResult) -> None:
    """Neither zero, as when something is compared with itself, nor near the edge."""
    free = {row.name: row for row in clean.rows if row.regime.startswith("free")}
    twice = {f"one start twice: {side}" for side in ("JAX", "torch")}
    assert set(free) == {"parameters of a free run", "loss of a free run"} | twice
    for row in (free[name] for name in set(free) - twice):
        assert row.excess is not None
        assert 0.1 < row.excess < 0.9
        assert f"all {trajectory.FREE_STEPS} steps" in row.evidence
    apart = np.array(clean.series["distance"][1:])
    assert np.all(apart > 0)
    assert np.all(apart < clean.series["distance, edge"][1:])


def test_it_learns() -> None:
    tokens, targets = batches(0, trajectory.STEPS)
    run = Training().torch_run(start(0), tokens, targets)
    assert run.losses_N[-5:].mean() < run.losses_N[:5].mean() / 2


@pytest.mark.long
def test_the_whole_run_agrees() -> None:
    """50 steps in float64 and float32 in every tensor, and ten free runs of 50 steps in float32."""
    result = trajectory.run(Scope(full=True), silent)
    assert [row for row in result.rows if row.verdict is not Verdict.AGREE] == []
    assert result.verdict is Verdict.AGREE
    steps = [row.regime for row in result.rows if row.name == "loss" and row.precision == "float64"]
    assert steps == [f"step {i}" for i in range(50)]
    free = [row for row in result.rows if row.name == "parameters of a free run"]
    assert [row.regime for row in free] == [f"free run, seed {i}" for i in range(10)]
    assert all("all 50 steps" in row.evidence for row in free)
    worst = {p: max(r.excess or 0.0 for r in result.rows if r.precision == p) for p in trajectory.PRECISIONS}
    print(f"\nnearest to a threshold: {worst}")
    for control in result.controls:
        print(f"{control.name}: {control.evidence}")


# --- bugs ------------------------------------------------------------------------------------------------------------


def decay_steps_with_warmup(patch: Patch) -> None:
    clean = omni_torch.optim.warmup_cosine

    def schedule(step, warmup_steps, max_steps, min_ratio=0.1):
        later = step < warmup_steps
        return clean(step, warmup_steps, max_steps, min_ratio) if later else clean(step, 0, max_steps, min_ratio)

    patch.setattr(omni_torch.optim, "warmup_cosine", schedule)


def clip_by_the_norm_alone(patch: Patch) -> None:
    def clip(grads, max_norm):
        norm = omni_torch.optim.global_norm(grads)
        for g in grads:
            g.mul_(torch.clamp(max_norm / norm, max=1.0))
        return norm

    patch.setattr(omni_torch.optim, "clip_grad_norm_", clip)


def mean_over_padding(patch: Patch) -> None:
    clean = omni_torch.losses.cross_entropy
    patch.setattr(
        omni_torch.losses, "cross_entropy", lambda x, y: clean(x, y) * (y != 0).sum().clamp(min=1) / y.numel()
    )


def moments_that_are_not_kept(patch: Patch) -> None:
    clean = omni_torch.optim.adamw_step_many_

    def step(params, grads, states, lr, **rest):
        fresh = [omni_torch.optim.init_adamw_state(p) for p in params]
        for old, new in zip(states, fresh):
            new.t = old.t
        return clean(params, grads, fresh, lr, **rest)

    patch.setattr(omni_torch.optim, "adamw_step_many_", step)


def eps_inside_the_root(patch: Patch) -> None:
    """m̂ / √(v̂ + eps), in JAX."""
    from jax import tree

    def step(params, grads, state, lr, betas, eps, weight_decay):
        beta1, beta2 = betas
        t = state.t + 1
        m = tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.m, grads)
        v = tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state.v, grads)

        def move(p, m, v):
            correct = [1 - beta ** t.astype(p.dtype) for beta in betas]
            return p - lr * (m / correct[0] / jnp.sqrt(v / correct[1] + eps) + weight_decay * p)

        return tree.map(move, params, m, v), omni_jax.optim.AdamWState(m, v, t)

    patch.setattr(omni_jax.optim, "adamw_step", step)


def targets_one_off(patch: Patch) -> None:
    clean = omni_jax.losses.cross_entropy
    patch.setattr(omni_jax.losses, "cross_entropy", lambda x, y: clean(x, jnp.roll(y, 1, axis=1)))


BUGS: dict[str, tuple[Callable[[Patch], None], bool]] = {
    "cosine over max_steps": (decay_steps_with_warmup, True),
    "clip without 1e-6": (clip_by_the_norm_alone, False),
    "loss averaged over padding": (mean_over_padding, True),
    "moments not kept": (moments_that_are_not_kept, True),
    "eps inside the root": (eps_inside_the_root, True),
    "targets one off": (targets_one_off, True),
}
"""Bug -> (how it is put in, whether free runs must show it as well; a millionth of a clipped norm they cannot)."""


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_seen(bug: str, monkeypatch: Patch) -> None:
    inject, free = BUGS[bug]
    inject(monkeypatch)
    result = trajectory.run(Scope(controls=False), silent)
    assert result.verdict is Verdict.DIFFER
    differ = [row for row in result.rows if row.verdict is Verdict.DIFFER]
    assert any(row.precision == "float64" and row.regime.startswith("step") for row in differ)
    left = [row for row in differ if row.name == "parameters of a free run"]
    assert left or not free, [row.evidence for row in result.rows if row.regime.startswith("free")]
    assert all("left the envelope at step" in row.evidence for row in left)


def test_a_side_that_crashes_is_no_answer_and_a_nan_is_a_difference(monkeypatch: Patch) -> None:
    training = Training()
    clean = training.torch_run

    def crash(*args, **rest):
        raise CannotLook("the torch side raised")

    monkeypatch.setattr(training, "torch_run", crash)
    with pytest.raises(CannotLook, match="torch side raised"):
        trajectory.free_runs(Scope(controls=False), training, CheckResult("x"), silent, 3)

    calls = itertools.count()

    def spoiled(*args, **rest):
        run = clean(*args, **rest)
        return run if next(calls) else replace(run, losses_N=run.losses_N * math.nan)

    monkeypatch.setattr(training, "torch_run", spoiled)
    result = CheckResult("x")
    trajectory.free_runs(Scope(controls=False), training, result, silent, 3)
    assert [row.verdict for row in result.rows if row.name.startswith("loss")] == [Verdict.DIFFER]


# --- bugs that begin late, in free runs only --------------------------------------------------------------------------


def free_with(patch: Patch, late: Callable[[Patch, Callable[[], bool]], None]) -> CheckResult:
    """Free runs with a bug in torch that begins after 12 updates of a run."""
    updates = [0]
    step, fresh = omni_torch.optim.adamw_step_many_, omni_torch.optim.init_adamw_state

    def counted(*args, **rest):
        states = step(*args, **rest)
        updates[0] = states[0].t
        return states

    def begun(p):
        updates[0] = 0
        return fresh(p)

    patch.setattr(omni_torch.optim, "adamw_step_many_", counted)
    patch.setattr(omni_torch.optim, "init_adamw_state", begun)
    late(patch, lambda: updates[0] > 12)
    result = CheckResult("trajectory")
    trajectory.free_runs(Scope(controls=False), Training(), result, silent)
    return result


def noisy_gradients(patch: Patch, late: Callable[[], bool]) -> None:
    clip = omni_torch.optim.clip_grad_norm_

    def noisy(grads, max_norm):
        if late():
            for g in grads:
                g.mul_(1 + 1e-2 * torch.randn_like(g))
        return clip(grads, max_norm)

    patch.setattr(omni_torch.optim, "clip_grad_norm_", noisy)


def dropped_logits(patch: Patch, late: Callable[[], bool]) -> None:
    loss = omni_torch.losses.cross_entropy
    drop = torch.nn.functional.dropout
    patch.setattr(omni_torch.losses, "cross_entropy", lambda x, y: loss(drop(x, 0.1) if late() else x, y))


def nan_loss(patch: Patch, late: Callable[[], bool]) -> None:
    loss = omni_torch.losses.cross_entropy
    patch.setattr(omni_torch.losses, "cross_entropy", lambda x, y: loss(x, y) * (math.nan if late() else 1.0))


@pytest.mark.parametrize("late", [noisy_gradients, dropped_logits])
def test_noise_that_begins_late_does_not_excuse_itself(late, monkeypatch: Patch) -> None:
    torch.manual_seed(0)
    rows = {row.name: row for row in free_with(monkeypatch, late).rows}
    assert rows["parameters of a free run"].verdict is Verdict.DIFFER
    assert "left the envelope at step 13" in rows["parameters of a free run"].evidence
    assert rows["one start twice: torch"].verdict is Verdict.UNSTABLE
    assert "torch runs from one start part at step 13" in rows["one start twice: torch"].evidence
    assert rows["one start twice: JAX"].verdict is Verdict.AGREE


def test_gradients_that_torch_refuses_are_a_difference(monkeypatch: Patch) -> None:
    result = free_with(monkeypatch, nan_loss)
    assert result.exit_code == 1
    for row in (row for row in result.rows if "of a free run" in row.name):
        assert row.verdict is Verdict.DIFFER
        assert "torch is NaN or infinite from step 13 on, where JAX is finite" in row.evidence
        assert "refused the gradients: grads[0] holds NaN" in row.evidence


def test_nan_on_both_sides_is_no_answer_but_what_was_before_is_kept(monkeypatch: Patch) -> None:
    training = Training()
    ours, theirs = training.jax_runs, training.torch_run

    def lose(run: Run) -> Run:
        losses = run.losses_N.copy()
        losses[2:] = math.nan
        return replace(run, losses_N=losses)

    monkeypatch.setattr(training, "jax_runs", lambda *args: [lose(run) for run in ours(*args)])
    monkeypatch.setattr(training, "torch_run", lambda *args, **rest: lose(theirs(*args, **rest)))
    result = CheckResult("x")
    with pytest.raises(CannotLook, match="both free runs became NaN or infinite at step 2"):
        trajectory.free_runs(Scope(controls=False), training, result, silent, 4)
    assert {row.verdict for row in result.rows} == {Verdict.AGREE}
    assert any("all 2 steps" in row.evidence for row in result.rows)


@pytest.mark.parametrize("ahead", [0, 1])
def test_twins_that_part_without_an_envelope_are_told(ahead: int, monkeypatch: Patch) -> None:
    """Perturbed runs that are the run itself: nothing is measured, and the verdict is not lost."""
    monkeypatch.setattr("parity.checks._training.perturbed", lambda weights, *_: weights)
    training = Training()
    clean = training.torch_run
    monkeypatch.setattr(training, "torch_run", lambda *args: clean(*args, ahead=ahead))
    result = CheckResult("x")
    trajectory.free_runs(Scope(controls=False), training, result, silent, 4)
    row = next(row for row in result.rows if row.name == "parameters of a free run")
    assert row.verdict is (Verdict.DIFFER if ahead else Verdict.UNDETERMINED)
    assert f"no envelope at step {1 - ahead}, for neither" in row.evidence
    assert ("roundings per update explain" in row.evidence) is bool(ahead)


def test_the_scope_is_told() -> None:
    alone = trajectory.run(Scope(precisions=("bfloat16",)), silent)
    assert alone.verdict is None
    assert "float64 and float32 only" in str(alone.error)
    wide = trajectory.run(Scope(precisions=("float64",)), silent)
    assert wide.verdict is Verdict.AGREE
    assert {row.precision for row in wide.rows} == {"float64"}
    assert any("free runs" in note for note in wide.notes)
    narrow = trajectory.run(Scope(precisions=("float32",)), silent)
    assert narrow.verdict is Verdict.AGREE
    assert any('"eps 1e-6"' in note for note in narrow.notes)


# --- updates whose sign is noise -------------------------------------------------------------------------------------


def test_an_update_is_undetermined_where_its_gradient_is_noise() -> None:
    _, beta2 = HYPER["betas"]
    grad = np.array([1.0, 1e-3, 1e-7, 0.0])
    second = (1 - beta2) * grad**2
    noise = np.array([1e-6, 1e-6, 1e-6, 0.0])
    assert trajectory.undetermined_moves(second, noise, 1).tolist() == [False, False, True, False]


def test_what_is_undetermined_is_counted_and_still_bounded() -> None:
    reference = np.full((8, 8), 1e-3)
    noise = Noise(np.full((8, 8), 1e-3), 8.0, 1e-3)
    judgement = judge_tensor(reference, reference, reference, noise, 2.0**-24)
    open_ = np.zeros((8, 8), bool)
    assert trajectory._with_open(judgement, open_, [reference, reference], reference, 5) is judgement
    open_[0, :2] = True
    flipped = np.where(open_, -reference, reference)
    told = trajectory._with_open(judgement, open_, [reference, flipped], reference, 5)
    assert told.verdict is Verdict.AGREE
    assert "2 of 64 elements undetermined" in told.evidence
    for wild in (1.0, math.nan):
        far = np.where(open_, wild, reference)
        told = trajectory._with_open(judgement, open_, [far, reference], reference, 5)
        assert told.verdict is Verdict.DIFFER
    told = trajectory._with_open(judgement, ~np.zeros((8, 8), bool), [reference, flipped], reference, 5)
    assert told.verdict is Verdict.UNDETERMINED


def test_no_history_of_gradients_moves_further_than_the_bound() -> None:
    """The bound is Cauchy–Schwarz's, so the gradients proportional to its weights reach it."""
    rng = np.random.default_rng(0)
    for number in (1, 4, 19):
        (beta1, beta2), age = HYPER["betas"], np.arange(number + 1)[::-1]
        weights = (1 - beta1) * beta1**age
        squares = (1 - beta2) * beta2**age
        worst = weights / squares
        zeros = {f"{k}.x": np.zeros(101) for k in "pmv"}
        histories = np.vstack([rng.standard_normal((100, number + 1)), worst])
        for i in range(number + 1):  # clipping would rescale each step's gradients: leave it out
            m = (1 - beta1) * histories[:, i] + beta1 * zeros["m.x"]
            v = (1 - beta2) * histories[:, i] ** 2 + beta2 * zeros["v.x"]
            zeros |= {"m.x": m, "v.x": v}
        corrected = zeros["m.x"] / (1 - beta1 ** (number + 1))
        moves = np.abs(corrected) / np.sqrt(zeros["v.x"] / (1 - beta2 ** (number + 1)))
        from parity import oracle
        from parity.checks._training import RECIPE

        rate = RECIPE["lr"] * float(
            oracle.factor(number, RECIPE["warmup_steps"], RECIPE["max_steps"], RECIPE["min_ratio"])
        )
        most = trajectory._largest_move(number) / rate
        assert np.all(moves <= most * (1 + 64 * np.finfo(float).eps))
        assert moves[-1] == pytest.approx(most)


# --- the envelope ----------------------------------------------------------------------------------------------------


def test_the_prediction_bound_holds_as_often_as_it_says() -> None:
    rng, level = np.random.default_rng(1), 0.05
    groups = [np.exp(rng.standard_normal((8, 20_000))) for _ in range(2)]
    new = np.exp(rng.standard_normal(20_000))
    outside = np.mean(new > trajectory.prediction_bound(groups, level))
    assert outside <= level  # the larger of two means is on the safe side
    one = np.mean(new > trajectory.prediction_bound(groups[:1], level))
    assert abs(one - level) < 5 * math.sqrt(level / 20_000)


def run_of(places: np.ndarray, losses: np.ndarray | None = None) -> Run:
    return Run(np.ones(len(places) - 1) if losses is None else losses, places)


def test_the_distance_is_that_of_displacements() -> None:
    places = np.array([[1.0, 2.0], [1.0, 2.0], [4.0, 6.0]])
    shifted = run_of(places + 0.5)
    assert trajectory.distance(shifted, run_of(places)).tolist() == [0.0, 0.0]
    further = places.copy()
    further[2] += [0.0, 1.0]
    assert trajectory.distance(run_of(further), run_of(places)).tolist() == [0.0, 1 / 5]


def test_the_quieter_framework_makes_the_edge() -> None:
    rng = np.random.default_rng(2)
    middle = np.cumsum(rng.standard_normal((5, 64)), axis=0)

    def runs(noise: float) -> list[Run]:
        sizes = noise * np.exp(rng.standard_normal((9, 1, 1)) / 4)
        near = [run_of(middle + s * rng.standard_normal((5, 64)), np.ones(4) + s[0]) for s in sizes]
        return [run_of(middle, np.ones(4)), *near]

    calm, wild, level = runs(1e-6), runs(1.0), 1e-6
    own = trajectory.envelope(calm, calm, level, 2.0**-24)
    for one, other in ((calm, wild), (wild, calm)):
        made = trajectory.envelope(one, other, level, 2.0**-24)
        assert np.all(made.distance_edge > made.distance_typical)
        assert np.all(made.distance_typical <= own.distance_typical)
        assert np.all(made.distance_edge < trajectory.distance(wild[1], calm[0]))
        assert np.all(made.loss_edge < np.abs(wild[1].losses_N - 1))


def test_runs_that_do_not_part_make_no_envelope() -> None:
    rng = np.random.default_rng(2)
    runs = [run_of(np.cumsum(rng.standard_normal((5, 4)), axis=0)) for _ in range(4)]
    made = trajectory.envelope(runs, runs, 1e-3, 2.0**-24)
    assert np.all(made.distance_edge > made.distance_typical)
    assert np.all(made.loss_edge > made.loss_typical)
    still = [runs[0]] * 4
    assert np.isfinite(trajectory.envelope(still, runs, 1e-3, 2.0**-24).distance_edge).all()
    assert np.isnan(trajectory.envelope(still, still, 1e-3, 2.0**-24).distance_edge).all()


def test_perturbed_weights_are_neighbours() -> None:
    begin = start(3)
    moved = perturbed(begin, 3, 0)
    again = perturbed(begin, 3, 0)
    other = perturbed(begin, 3, 1)
    for name, x in begin.items():
        assert moved[name].dtype == np.float32
        np.testing.assert_array_equal(np.abs(moved[name].view(np.int32) - x.view(np.int32)), 1)
        np.testing.assert_array_equal(moved[name], again[name])
    assert any(not np.array_equal(moved[name], other[name]) for name in begin)


# --- the picture -----------------------------------------------------------------------------------------------------


def test_the_curves_are_in_the_result_file(clean: CheckResult) -> None:
    whole = RunResult([clean], {}, ["cpu"], 1.0)
    series = json.loads(whole.to_json())["checks"][0]["series"]
    assert set(series) == set(picture.CURVES)
    assert {len(curve) for curve in series.values()} == {trajectory.FREE_STEPS}


def test_the_picture_is_svg_and_names_what_it_shows(clean: CheckResult) -> None:
    text = picture.draw(clean.series)
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    for words in ("omni_jax", "omni_torch", "envelope", "twins", "loss (nats)", "step"):
        assert words in text


def test_two_pictures_of_the_same_curves_are_equal(clean: CheckResult) -> None:
    assert picture.draw(clean.series) == picture.draw(clean.series)


def test_the_picture_bears_zeros_and_what_is_not_finite(clean: CheckResult) -> None:
    steps = len(clean.series["step"])
    for value in (0.0, math.inf, math.nan):
        spoiled = clean.series | {"distance": [value] * steps}
        assert "</svg>" in picture.draw(spoiled)
        assert picture.console_lines(replace(clean, series=spoiled))


def test_the_lines_for_the_console(clean: CheckResult) -> None:
    lines = picture.console_lines(clean)
    print("\n" + "\n".join(lines))
    assert len(lines) == 7
    assert all(len(line) <= 100 for line in lines)
    assert picture.console_lines(CheckResult("adamw")) == []


def test_what_cannot_be_drawn_is_told(clean: CheckResult, monkeypatch: Patch) -> None:
    with pytest.raises(Misuse, match="distance, edge"):
        picture.draw({k: v for k, v in clean.series.items() if k != "distance, edge"})
    with pytest.raises(Misuse, match="one length"):
        picture.draw(clean.series | {"step": [0.0]})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CannotLook, match="pip install"):
        picture.draw(clean.series)


def test_the_command_draws_into_the_file_that_is_named(tmp_path, monkeypatch: Patch, capsys) -> None:
    monkeypatch.setattr(trajectory, "STEPS", 3)
    target = tmp_path / "run.svg"
    assert picture.main([str(target)]) == 0
    assert "</svg>" in target.read_text(encoding="utf-8")
    assert "inside the envelope" in capsys.readouterr().out
    assert picture.main([]) == 2
