"""parity.calibrate: the thresholds are those that the stored record supports, and the command can make it again."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from parity import calibrate as module
from parity.calibrate import (
    CEILING,
    DRAWS,
    FEWEST_CONFIGURATIONS,
    FEWEST_DRAWS,
    MARGIN,
    RECORD,
    Calibration,
    Draw,
    alarm_limit,
    calibrate,
    foreign_pairs,
    objections,
    plan,
    supported,
)
from parity.cli import app
from parity.precision import PRECISIONS
from parity.report.calibration import markdown, write
from parity.verdict import THRESHOLDS, threshold

DECISION = Path(__file__).parent.parent.parent / "docs" / "decisions" / "0001-noise-units.md"


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


# --- the stored record -----------------------------------------------------------------------------------------------


def test_the_record_is_large_enough(record) -> None:
    assert record["complete"]
    assert record["draws"] >= FEWEST_DRAWS >= 200
    assert record["configurations"] >= FEWEST_CONFIGURATIONS >= 50
    assert record["configurations_compiled"] >= 10
    strata = {(item["programs"], item["precision"], item["side"]) for item in record["strata"]}
    assert strata >= {(programs, p, "torch") for programs in ("twins", "foreign") for p in PRECISIONS}
    assert strata >= {("twins", p, "jax") for p in ("float64", "float32", "bfloat16")}
    assert record["tied"] <= record["draws"] / 20


def test_the_record_was_made_by_the_command_of_today(record) -> None:
    assert record["command"] == f"parity calibrate --draws {DRAWS} --seed 0"
    assert record["draws"] + record["tied"] == DRAWS


def test_no_clean_draw_raises_an_alarm(record) -> None:
    assert record["alarms"] == []
    assert record["draws_alarmed"] == 0
    assert set(record["verdicts"]) <= {"AGREE", "UNDETERMINED"}
    assert record["alarm_limit_95"] < 0.015


def test_the_thresholds_are_what_the_record_supports(record) -> None:
    assert objections(record) == []
    for name, (low, high) in supported(record).items():
        assert low <= getattr(THRESHOLDS, name) <= high, name
    largest = max(item["max"] for item in record["strata"])
    assert largest == record["largest"][0]
    assert MARGIN * largest <= THRESHOLDS.z <= CEILING * MARGIN * largest


def test_thresholds_without_support_are_objected_to(record) -> None:
    for factor, word in ((10.0, "below"), (0.1, "above")):
        other = dict(record, largest=[record["largest"][0] * factor, ""])
        assert any(word in objection for objection in objections(other))
    few = dict(record, draws=3, largest=[0.01, ""])
    assert objections(few) == [], "three draws do not say that a threshold is too wide"
    assert objections(dict(record, alarms=["DIFFER: logits"]))


def test_the_thresholds_have_teeth(record) -> None:
    assert threshold(10**6, 1, 200.0) <= 5.0, "the RMS of a large tensor with a well known sigma"
    assert set(record["bugs"]) == {"RMSNorm eps 1e-6 for 1e-5", "RoPE theta 10001 for 10000"}
    for bug, seen in record["bugs"].items():
        assert seen["draws"] >= 50, bug
        assert seen["smallest"] > THRESHOLDS.z, f"{bug}: in float32 alone, in every draw"


def test_the_decision_shows_the_record_as_the_command_prints_it(record) -> None:
    assert markdown(record) in DECISION.read_text()


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_no_two_draws_are_equal_and_a_seed_names_them() -> None:
    draws = plan()
    assert len(draws) == len(set(draws)) == DRAWS
    assert len({d.config for d in draws if d.config is not None}) >= FEWEST_CONFIGURATIONS
    assert draws == plan()
    assert plan(40) == draws[:40]
    assert not set(plan(40, seed=1)) & set(draws)
    kinds = [(d.config.use_moe, d.config.use_gqa, d.config.use_swiglu) for d in draws if d.config is not None]
    assert set(kinds) == {(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)}
    assert all(d.config.num_experts_per_tok >= 2 for d in draws if d.config is not None)


def test_foreign_pairs_cover_both_ends_of_tensor_size_in_every_precision() -> None:
    shapes = foreign_pairs(0, sizes_only=True)
    sizes = {name: math.prod(shape[0]) for name, shape in shapes.items()}
    assert min(sizes.values()) == 1
    assert max(sizes.values()) == 10**6
    foreign = {(d.program, d.precision) for d in plan() if d.config is None}
    assert foreign == {(name, precision) for name in shapes for precision in PRECISIONS}


# --- a small calibration ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Calibration:
    seen: list[tuple[int, int, str]] = []
    result = calibrate(3, 0, lambda *progress: seen.append(progress))
    assert [done for done, _, _ in seen] == [0, 1, 2, 3]
    return result


def test_three_draws(small: Calibration, tmp_path: Path) -> None:
    assert (len(small.draws), len(small.configurations), small.alarmed, small.tied) == (3, 1, 0, [])
    assert 0 < small.largest < THRESHOLDS.z
    record = small.record()
    assert record["complete"]
    assert objections(record) == []
    assert {item["precision"] for item in record["strata"]} == {"float64", "float32", "bfloat16"}
    assert {item["side"] for item in record["strata"]} == {"jax", "torch", "pair"}
    assert record["bugs"]["RMSNorm eps 1e-6 for 1e-5"]["smallest"] > THRESHOLDS.z
    write(record, tmp_path / "record.json")
    assert json.loads((tmp_path / "record.json").read_text()) == json.loads(json.dumps(record))
    assert "| twins | bfloat16 | torch |" in markdown(record)


def test_a_wrong_pair_is_an_alarm() -> None:
    name = "matmul 1 x 3 x 1"
    pair, weights, inputs = foreign_pairs(0, name)[name]
    right = pair.torch
    pair = dataclasses.replace(pair, torch=lambda p, c: right({**p, "x": p["x"] * (1 + 1e-4)}, c))
    result = Calibration(0, 1)
    result.take(Draw(name, None, "foreign", 0, "float32", True), module._judge(pair)(weights, inputs, "float32"))
    assert result.alarmed == 1
    assert any("DIFFER: output" in alarm for alarm in result.alarms)
    assert any("not let pass" in objection for objection in objections(result.record()))


@pytest.mark.parametrize("draws", [1, 59, 300])
def test_the_limit_of_no_alarm_is_the_rule_of_three(draws: int) -> None:
    assert alarm_limit(0, draws) == pytest.approx(1 - 0.05 ** (1 / draws))
    assert alarm_limit(1, draws) > alarm_limit(0, draws)
    assert alarm_limit(draws, draws) == 1.0
    if draws == 300:
        assert alarm_limit(0, draws) == pytest.approx(3 / draws, rel=0.02)


# --- the command -----------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, small: Calibration, *arguments: Any, error: BaseException | None = None):
    def stub(draws, seed, progress, into) -> None:
        for field in dataclasses.fields(small):
            if field.name not in ("seed", "planned"):
                setattr(into, field.name, getattr(small, field.name))
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
    ended = command(monkeypatch, Calibration(0, 0), "--json", tmp_path / "no" / "record.json")
    assert ended.exit_code == 2
    assert "does not exist" in ended.stderr


def test_an_alarm_is_exit_code_1(monkeypatch, small) -> None:
    alarmed = dataclasses.replace(small, alarms=["DIFFER: logits"], alarmed=1)
    ended = command(monkeypatch, alarmed)
    assert ended.exit_code == 1
    assert "a correct program was not let pass" in ended.stderr


def test_what_is_not_finite_is_written_as_strict_json() -> None:
    assert module._strict({"a": [np.float64(1.23456789), math.inf]}) == {"a": [1.235, "inf"]}
