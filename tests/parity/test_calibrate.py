"""parity.calibrate: the thresholds are those that the stored record supports, and the command can make it again."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from parity import calibrate as module
from parity import checks, clean
from parity.calibrate import (
    CEILING,
    DRAWS,
    FEWEST_CONFIGURATIONS,
    FEWEST_DRAWS,
    FOREIGN,
    MARGIN,
    RECORD,
    Calibration,
    Draw,
    Outcome,
    Processes,
    alarm_limit,
    calibrate,
    objections,
    of_check,
    of_findings,
    outcome_of,
    plan,
    supported,
)
from parity.cli import app
from parity.errors import Misuse
from parity.foreign import SHAPES, foreign_pair
from parity.journal import Journal
from parity.precision import PRECISIONS
from parity.report.calibration import markdown, write
from parity.verdict import THRESHOLDS, threshold

DECISION = Path(__file__).parent.parent.parent / "docs" / "decisions" / "0001-noise-units.md"


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


# --- the stored record -----------------------------------------------------------------------------------------------


DOZENS = 24
"""Draws of each check, at least."""
AGAIN = ("recipe", "mel", "ctc")
"""Checks of which a draw is made again: of the cheapest."""


def test_the_record_is_large_enough(record) -> None:
    assert record["draws"] >= FEWEST_DRAWS >= 1000
    assert record["configurations"] >= FEWEST_CONFIGURATIONS >= 50
    assert record["configurations_compiled"] >= 10
    assert all(seen["draws"] >= 50 for seen in record["bugs"].values())
    for item in record["checks"]:
        assert item["draws"] >= DOZENS, item["check"]
        assert item["configurations"] >= 8, item["check"]


def test_the_record_has_every_kind_of_draw(record) -> None:
    assert record["complete"]
    assert [item["check"] for item in record["checks"]] == [*checks.CHECKS, FOREIGN]
    strata = {(item["programs"], item["precision"], item["side"]) for item in record["strata"]}
    assert strata >= {(programs, p, "torch") for programs in ("twins", "foreign") for p in PRECISIONS}
    assert strata >= {("twins", p, "jax") for p in ("float64", "float32", "bfloat16")}
    assert len(record["threads"]) == 4, "one and two threads of torch, one and more of XLA"
    assert min(record["threads"].values()) >= record["draws"] / 10
    assert record["tied"] <= record["draws"] / 20
    assert record["could_not_look"] == []


def test_the_record_was_made_by_the_command_of_today(record) -> None:
    assert record["command"] == f"parity calibrate --draws {DRAWS} --seed 0"
    assert record["draws"] + record["tied"] == DRAWS


@pytest.mark.parametrize("check", ["twins", *AGAIN])
def test_a_draw_made_again_scores_what_the_record_says(record, small, check) -> None:
    """Another processor has other kernels; a noise model that is another by CEILING is not the one of the record."""
    told = {item["label"]: item for item in record["again"]}
    again = small.outcomes
    if check != "twins":
        again = [outcome_of(next(draw for draw in plan() if draw.program == check))]
    for outcome in again:
        item = told[outcome.label]
        assert outcome.alarms == []
        assert sum(entry["tensors"] for entry in outcome.checks.values()) == item["tensors"]
        assert item["largest"] / CEILING <= outcome.largest[0] <= CEILING * item["largest"]
        assert MARGIN * outcome.largest[0] <= THRESHOLDS.z


def test_no_clean_draw_raises_an_alarm(record) -> None:
    assert record["alarm_limit_95"] < 0.0031
    assert record["alarms"] == []
    assert record["draws_alarmed"] == 0
    assert set(record["verdicts"]) <= {"AGREE", "UNDETERMINED"}
    assert all(item["draws_alarmed"] == 0 for item in record["checks"])


def test_the_thresholds_are_what_the_record_supports(record) -> None:
    assert objections(record) == []
    assert all(low <= getattr(THRESHOLDS, name) for name, (low, _) in supported(record).items())
    largest = max(item["largest"][0] for item in record["checks"])
    assert largest == record["largest"][0] >= max(item["max"] for item in record["strata"])
    assert MARGIN * largest <= THRESHOLDS.z <= CEILING * MARGIN * largest


def test_thresholds_without_support_are_objected_to(record) -> None:
    many = dict(record, draws=FEWEST_DRAWS, configurations=FEWEST_CONFIGURATIONS)
    for factor, word in ((10.0, "below"), (0.1, "above")):
        other = dict(many, largest=[record["largest"][0] * factor, ""])
        assert any(word in objection for objection in objections(other))
    few = dict(record, draws=3, largest=[0.01, ""], alarms=[], could_not_look=[])
    assert objections(few) == [], "three draws do not say that a threshold is too wide"
    assert objections(dict(few, could_not_look=["sampling: ValueError"]))
    assert objections(dict(record, alarms=["DIFFER: logits"]))


def test_the_thresholds_have_teeth(record) -> None:
    assert threshold(10**6, 1, 200.0) <= 2.5 * THRESHOLDS.z, "beyond Z, a large tensor leaves little to chance"
    assert set(record["bugs"]) == {"RMSNorm eps 1e-6 for 1e-5", "RoPE theta 10001 for 10000"}
    for bug, seen in record["bugs"].items():
        assert seen["smallest"] > THRESHOLDS.z, f"{bug}: in float32 alone, in every draw"


def test_the_decision_shows_the_record_as_the_command_prints_it(record) -> None:
    assert markdown(record) in DECISION.read_text()


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_no_two_draws_are_equal_and_a_seed_names_them() -> None:
    draws = plan()
    assert len(draws) == len({d.label for d in draws}) == DRAWS, "neither of two draws with other threads alone"
    assert len({d.config for d in draws if d.config is not None}) >= FEWEST_CONFIGURATIONS
    assert draws == plan()
    assert plan(40) == draws[:40]
    assert not set(plan(40, seed=1)) & set(draws)
    seeds = [(d.program, d.seed, d.precision) for d in draws if d.kind != "twins"]
    assert len(seeds) == len(set(seeds))
    kinds = [(d.config.use_moe, d.config.use_gqa, d.config.use_swiglu) for d in draws if d.config is not None]
    assert set(kinds) == {(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)}
    assert all(d.config.num_experts_per_tok >= 2 for d in draws if d.config is not None)


def test_foreign_pairs_cover_both_ends_of_tensor_size_in_every_precision() -> None:
    sizes = {name: math.prod(shape[0]) for name, shape in SHAPES.items()}
    assert min(sizes.values()) == 1
    assert max(sizes.values()) == 10**6
    foreign = {(d.program, d.precision) for d in plan() if d.kind == "foreign"}
    assert foreign == {(name, precision) for name in SHAPES for precision in PRECISIONS}


def test_every_check_has_its_share_of_any_beginning() -> None:
    for draws in (DRAWS, DRAWS // 2):
        seen = [d.program for d in plan(draws) if d.kind == "checks"]
        assert set(seen) | {"logits", "gradients"} == set(checks.CHECKS)
        rounds = len(seen) // sum(clean.RUNS.values())
        for check, runs in clean.RUNS.items():
            assert rounds * runs <= seen.count(check) <= (rounds + 1) * runs, check


def test_no_two_sets_of_constants_are_equal_and_a_seed_names_them() -> None:
    for check in clean.CHECKS:
        drawn = [clean.settings(check, variant) for variant in range(16)]
        plain = [{k: v for k, v in constants.items() if not callable(v)} for constants in drawn]
        same = [{k: v for k, v in clean.settings(check, i).items() if not callable(v)} for i in range(16)]
        assert plain == same
        assert len({repr(x) for x in plain}) >= (16 if any(plain) else 1), check
        assert not any(repr(clean.settings(check, 0, seed=1)) == repr(x) for x in drawn), check


# --- a small calibration ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Calibration:
    seen: list[tuple[int, int, str]] = []
    result = calibrate(3, 0, lambda *progress: seen.append(progress))
    assert [done for done, _, _ in seen] == [0, 1, 2, 3]
    return result


def test_three_draws(small: Calibration, tmp_path: Path) -> None:
    assert (len(small.told), small.alarmed) == (3, 0)
    assert 0 < small.largest < THRESHOLDS.z
    record = small.record()
    assert record["complete"]
    assert objections(record) == []
    assert {item["precision"] for item in record["strata"]} == {"float64", "float32", "bfloat16"}
    assert {item["side"] for item in record["strata"]} == {"jax", "torch", "pair"}
    assert record["bugs"]["RMSNorm eps 1e-6 for 1e-5"]["smallest"] > THRESHOLDS.z
    assert [(item["check"], item["draws"]) for item in record["checks"]] == [("logits", 3), ("gradients", 3)]
    write(record, tmp_path / "record.json")
    assert json.loads((tmp_path / "record.json").read_text()) == json.loads(json.dumps(record))
    assert "| twins | bfloat16 | torch |" in markdown(record)
    assert "| gradients | 3 | 1 |" in markdown(record)


def of_one(outcome: Outcome) -> dict[str, Any]:
    return Calibration(0, 1, [outcome]).record()


def test_a_wrong_pair_is_an_alarm() -> None:
    name = "matmul 1 x 3 x 1"
    pair, weights, inputs = foreign_pair(name, 0)
    right = pair.torch
    pair = dataclasses.replace(pair, torch=lambda p, c: right({**p, "x": p["x"] * (1 + 1e-4)}, c))
    draw = Draw(name, None, "foreign", 0, "float32", True)
    record = of_one(of_findings(draw, module._judge(pair)(weights, inputs, "float32")))
    assert record["draws_alarmed"] == record["checks"][0]["draws_alarmed"] == 1
    assert any("DIFFER: output" in alarm for alarm in record["alarms"])
    assert any("not let pass" in objection for objection in objections(record))


RECIPE = next(draw for draw in plan(400) if draw.program == "recipe")


def test_a_check_that_alarms_is_a_false_alarm_and_its_constants_are_put_back(monkeypatch) -> None:
    import omni_torch.optim
    from parity.checks import recipe

    before, right = (recipe.RECIPE, recipe.problem), omni_torch.optim.warmup_cosine
    monkeypatch.setattr(omni_torch.optim, "warmup_cosine", lambda step, *args, **kw: right(step + 1, *args, **kw))
    outcome = outcome_of(RECIPE)
    assert (recipe.RECIPE, recipe.problem) == before
    assert any("learning rate, float64 of recipe, constants 0" in alarm for alarm in outcome.alarms)
    assert outcome.largest[0] > THRESHOLDS.z
    assert of_one(outcome)["draws_alarmed"] == 1


def test_a_check_that_could_not_look_is_no_clean_draw(monkeypatch) -> None:
    import omni_torch.optim

    def refuse(*args: Any, **kw: Any) -> None:
        raise ValueError("no schedule")

    monkeypatch.setattr(omni_torch.optim, "warmup_cosine", refuse)
    record = of_one(outcome_of(RECIPE))
    assert record["draws"] == 0
    assert "no schedule" in record["could_not_look"][0]
    assert objections(record)


def test_levels_of_significance_are_told_apart_from_noise_units() -> None:
    from parity.result import CheckResult, Row
    from parity.verdict import Verdict

    row = Row("dropout", "", "", "float32", "rate", Verdict.AGREE, "", excess=0.75)
    noisy = dataclasses.replace(row, name="loss", z_same=0.1, excess=0.25)
    exact = dataclasses.replace(row, name="bits", verdict=Verdict.DIFFER, excess=math.inf)
    silent = dataclasses.replace(row, name="optax", excess=3.0, decides=False)
    draw = dataclasses.replace(RECIPE, program="dropout")
    (item,) = of_one(of_check(draw, CheckResult("dropout", [row, noisy, exact, silent])))["checks"]
    assert item["share"][0] == row.excess
    assert item["largest"][0] == 0.25 * THRESHOLDS.z
    assert (item["tensors"], item["draws_alarmed"]) == (3, 1)


# --- threads, and going on -------------------------------------------------------------------------------------------


def test_one_thread_of_xla_is_another_process(monkeypatch) -> None:
    monkeypatch.setenv(module.XLA_THREADS, "2")
    draw = Draw("mean of 3", None, "foreign", 0, "float64", True, xla_threads=1)
    with Processes() as processes:
        outcome = processes(draw)
        assert processes.single.submit(os.getenv, module.XLA_THREADS).result() == "1"
    assert os.environ[module.XLA_THREADS] == "2"
    assert outcome.threads == "torch 1, XLA 1"
    assert outcome.checks[FOREIGN]["tensors"] == outcome_of(draw).checks[FOREIGN]["tensors"] > 0


def test_threads_of_torch_are_those_of_the_draw_and_put_back(monkeypatch) -> None:
    import torch

    seen: list[int] = []
    monkeypatch.setattr(module, "_judge", lambda pair: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    with pytest.raises(TypeError):
        outcome_of(Draw("mean of 3", None, "foreign", 0, "float64", True, torch_threads=2))
    assert seen == [2]
    assert torch.get_num_threads() == before


def test_draws_of_the_journal_are_not_made_again(small: Calibration, monkeypatch, tmp_path) -> None:
    path, made_with = tmp_path / "journal", {"seed": 0, "versions": small.versions}
    journal = Journal(path, made_with)
    for outcome in small.outcomes[:2]:
        journal.add(outcome)
    with path.open("a") as file:
        file.write('{"label": "cut sh')
    made: list[str] = []
    monkeypatch.setattr(module, "outcome_of", lambda draw: made.append(draw.label) or small.outcomes[2])
    again = calibrate(3, 0, journal=path)
    assert made == [small.outcomes[2].label]
    assert again.record() == small.record()
    made.clear()
    assert calibrate(3, 0, journal=path).record() == small.record()
    assert made == []
    with pytest.raises(Misuse, match="were made with"):
        Journal(path, made_with | {"seed": 1})
    path.write_text("something else\n")
    with pytest.raises(Misuse, match="no journal"):
        Journal(path, made_with)


@pytest.mark.parametrize("draws", [1, 59, 300])
def test_the_limit_of_no_alarm_is_the_rule_of_three(draws: int) -> None:
    assert alarm_limit(0, draws) == pytest.approx(1 - 0.05 ** (1 / draws))
    assert alarm_limit(1, draws) > alarm_limit(0, draws)
    assert alarm_limit(draws, draws) == 1.0
    if draws == 300:
        assert alarm_limit(0, draws) == pytest.approx(3 / draws, rel=0.02)


# --- the command -----------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, small: Calibration, *arguments: Any, error: BaseException | None = None):
    def stub(draws, seed, progress, into, journal) -> None:
        into.outcomes, into.versions = small.outcomes, small.versions
        if error is not None:
            raise error

    monkeypatch.setattr(module, "calibrate", stub)
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)])


def test_the_command_prints_and_writes_the_record(monkeypatch, small, tmp_path) -> None:
    file = tmp_path / "record.json"
    ended = command(monkeypatch, small, "--draws", 3, "--json", file)
    assert ended.exit_code == 0, ended.output
    assert "largest look / quantile" in ended.stdout
    assert json.loads(file.read_text())["draws"] == 3


def test_an_interrupted_command_keeps_what_it_has(monkeypatch, small, tmp_path) -> None:
    file = tmp_path / "record.json"
    ended = command(monkeypatch, small, "--draws", 50, "--json", file, error=KeyboardInterrupt())
    assert ended.exit_code == 3
    assert "interrupted after 3 of 50 draws" in ended.stderr
    assert "INTERRUPTED" in ended.stdout
    assert not json.loads(file.read_text())["complete"]


def test_the_command_before_its_first_draw(monkeypatch, tmp_path) -> None:
    assert command(monkeypatch, Calibration(0, 0), error=KeyboardInterrupt()).exit_code == 3
    for option in ("--json", "--resume"):
        ended = command(monkeypatch, Calibration(0, 0), option, tmp_path / "no" / "record.json")
        assert ended.exit_code == 2
        assert f"{option} " in ended.stderr
        assert "does not exist" in ended.stderr


def test_an_alarm_is_exit_code_1(monkeypatch, small) -> None:
    alarmed = Calibration(0, 3, [dataclasses.replace(small.outcomes[0], alarms=["DIFFER: logits"])])
    ended = command(monkeypatch, alarmed)
    assert ended.exit_code == 1
    assert "a correct program was not let pass" in ended.stderr


def test_what_is_not_finite_is_written_as_strict_json() -> None:
    assert module._strict({"a": [np.float64(1.23456789), math.inf]}) == {"a": [1.235, "inf"]}
