"""parity.result: what makes a check and a run pass, fail, or be no answer; and strict JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from parity.result import CheckResult, Control, Row, RunResult, row_from_judgement
from parity.verdict import Noise, Verdict, judge_tensor


def row(verdict: Verdict = Verdict.AGREE, name: str = "logits", **fields) -> Row:
    given = {"check": "c", "config": "mha", "regime": "fresh", "precision": "float32", "evidence": "e"} | fields
    return Row(name=name, verdict=verdict, **given)


def run(*checks: CheckResult) -> RunResult:
    return RunResult(list(checks), {"versions": {}}, ["cpu"], seconds=1.0)


@pytest.mark.parametrize(
    ("verdicts", "verdict", "code"),
    [
        ([Verdict.AGREE], Verdict.AGREE, 0),
        ([Verdict.AGREE, Verdict.UNDETERMINED], Verdict.AGREE, 0),
        ([Verdict.UNDETERMINED], Verdict.UNDETERMINED, 3),
        ([Verdict.AGREE, Verdict.PINNED], Verdict.PINNED, 1),
        ([Verdict.PINNED, Verdict.UNSTABLE], Verdict.UNSTABLE, 1),
        ([Verdict.DIFFER, Verdict.UNSTABLE, Verdict.AGREE], Verdict.DIFFER, 1),
        ([Verdict.DIFFER, Verdict.UNDETERMINED], Verdict.DIFFER, 1),
        ([], None, 3),
    ],
)
def test_a_check_is_its_gravest_determined_row(verdicts: list, verdict: Verdict | None, code: int) -> None:
    check = CheckResult("c", [row(v) for v in verdicts])
    assert (check.verdict, check.exit_code) == (verdict, code)


def test_rows_that_only_inform_decide_nothing() -> None:
    informed = CheckResult("c", [row(), row(Verdict.DIFFER, decides=False)])
    assert (informed.verdict, informed.exit_code, informed.undetermined) == (Verdict.AGREE, 0, 0)
    only_informed = CheckResult("c", [row(decides=False)])
    assert (only_informed.verdict, only_informed.exit_code, only_informed.worst) == (None, 3, None)


def test_an_error_is_never_a_pass() -> None:
    assert CheckResult("c", [row()], error="crashed").exit_code == 3


def test_an_accepted_control_is_an_error_of_the_check() -> None:
    controls = [Control("zeros", True, ""), Control("sign", False, "z 0.3")]
    check = CheckResult("c", [row()], controls)
    assert (check.verdict, check.exit_code) == (None, 3)
    assert CheckResult("c", [row()], controls[:1]).exit_code == 0


def test_the_worst_row_is_the_gravest_then_the_nearest_to_its_threshold() -> None:
    rows = [row(name="a", excess=0.2), row(name="b", excess=0.9), row(Verdict.UNDETERMINED, name="u", excess=math.inf)]
    assert CheckResult("c", rows).worst is rows[1]
    assert CheckResult("c", [*rows, graver := row(Verdict.PINNED, name="p")]).worst is graver
    assert CheckResult("c", rows[2:]).worst is rows[2]


@pytest.mark.parametrize(
    ("codes", "whole"),
    [([0], 0), ([0, 3], 3), ([3, 1], 1), ([0, 1], 1), ([], 3), ([0, 0], 0)],
)
def test_a_difference_outranks_what_was_not_seen(codes: list[int], whole: int) -> None:
    make = {
        0: CheckResult("c", [row()]),
        1: CheckResult("c", [row(Verdict.DIFFER)]),
        3: CheckResult("c", error="crashed"),
    }
    assert run(*(make[code] for code in codes)).exit_code == whole


def test_counts() -> None:
    rows = [
        row(name="a"),
        row(name="a", precision="float64"),
        row(Verdict.UNDETERMINED, name="b", config="gqa"),
        row(name="third", decides=False, config="other"),
    ]
    counts = run(CheckResult("c", rows)).counts
    assert counts == {"configurations": 2, "tensors": 2, "comparisons": 3, "undetermined": 1}


def test_json_is_strict_and_whole() -> None:
    rows = [row(z_same=math.inf, excess=math.nan, shape=(2, 3)), row(Verdict.DIFFER, accurate_jax=-math.inf)]
    result = run(CheckResult("c", rows, [Control("zeros", True, "z 9")], ["note"], seconds=0.5))
    loaded = json.loads(result.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (check,) = loaded["checks"]
    assert (loaded["exit_code"], check["verdict"], check["exit_code"]) == (1, "DIFFER", 1)
    assert (check["rows"][0]["z_same"], check["rows"][0]["excess"], check["rows"][0]["shape"]) == ("inf", "nan", [2, 3])
    assert check["rows"][1]["accurate_jax"] == "-inf"
    assert check["controls"] == [{"name": "zeros", "rejected": True, "evidence": "z 9"}]
    assert loaded["counts"]["comparisons"] == 2
    assert loaded["devices"] == ["cpu"]


def test_a_row_carries_the_judgement() -> None:
    values = np.linspace(1.0, 2.0, 12).reshape(3, 4)
    judgement = judge_tensor(values, values, values, Noise(np.ones((3, 4)), 40.0, 1.0), 2.0**-24)
    made = row_from_judgement(judgement, check="c", config="", regime="", precision="float32", name="x", shape=(3, 4))
    assert made.verdict is judgement.verdict is Verdict.AGREE
    assert made.excess == max(judgement.jax.excess, judgement.torch.excess, judgement.same.excess)
    assert replace(made, decides=False).decides is False
