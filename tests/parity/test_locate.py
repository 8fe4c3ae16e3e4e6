"""Where two sides part: the tap, the side, the single steps, the command; and that a failed run says so."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("jax")

import toy
from typer.testing import CliRunner

from parity import attribution, checks, cut, locate_command
from parity.checks import Scope
from parity.cli import app
from parity.errors import CannotLook
from parity.locate import Location, Step, found_in, locate, locate_pair, watched
from parity.mutants import catalogue, causes_table, inject
from parity.mutants.held_out import held_out
from parity.result import CheckResult, Row
from parity.verdict import Verdict


def found(precision: str = "float64", single: bool = False, seconds: float = 0.0, **faults: Any) -> Location:
    judge = toy.judge(**faults)
    return locate_pair(judge, toy.weights(), toy.inputs(), precision, single=single, seconds=seconds)


def named(location: Location) -> dict[str, Step]:
    return {step.name: step for step in location.steps}


# --- the place -------------------------------------------------------------------------------------------------------


def test_a_clean_pair_parts_nowhere(one_thread) -> None:
    clean = found()
    assert (clean.place, clean.side, clean.exit_code, clean.diagnosis) == ("", "", 0, None)
    assert clean.sentence == "float64: the sides part nowhere"


@pytest.mark.parametrize(
    ("fault", "place"),
    [
        ({"eps": 1e-6}, "tap norm"),
        ({"scale": 1.0}, "tap mix"),
        ({"tanh": True}, "tap mlp"),
        ({"loss": 2.0}, "loss"),
        ({"cut": True}, "gradient first.weight"),
    ],
)
def test_the_first_tensor_that_parts_is_the_place(fault: dict[str, Any], place: str, one_thread) -> None:
    location = found(**fault)
    if "cut" in fault:  # the norm's own scale is not behind its root
        assert location.place.startswith("gradient first.")
    else:
        assert location.place == place
    assert location.side == "torch"
    assert location.exit_code == 1
    assert f"the sides part at {location.place.removeprefix('tap ')}; torch left the float64" in location.sentence


def test_the_last_gradient_is_the_place_because_the_backward_pass_begins_there(one_thread) -> None:
    location = found(cut=True)
    order = [step.name for step in location.steps if step.name.startswith("gradient ")]
    bad = [name for name in order if named(location)[name].verdict is Verdict.DIFFER]
    assert location.place == bad[0]
    assert order.index("gradient mlp.down.weight") < order.index("gradient first.weight")


def test_in_float32_the_side_that_left_is_told_apart(one_thread) -> None:
    location = found("float32", bfloat16=True)
    assert (location.place, location.side) == ("tap mix", "torch")
    judge = toy.judge()
    clean, (left, right) = judge.far, judge.far
    judge.far = (lambda *a: _spoiled(left(*a)), right)  # pyright: ignore[reportAttributeAccessIssue]
    other = locate_pair(judge, toy.weights(), toy.inputs(), "float32", seconds=0)
    assert clean is not judge.far
    assert (other.place, other.side) == ("tap mix", "jax")


def _spoiled(result: tuple[dict[str, Any], dict[str, Any]]) -> Any:
    named_, taps = result
    return named_, {**taps, "mix": taps["mix"] * (1 + 2.0**-8)}


# --- single steps ----------------------------------------------------------------------------------------------------


def test_single_steps_tell_own_errors_from_inherited_ones(one_thread) -> None:
    location = found(single=True, scale=1.0)
    steps = named(location)
    for name in ("tap mlp", "output", "gradient mlp.down.weight"):
        assert steps[name].verdict is Verdict.DIFFER
        assert steps[name].own_verdict is Verdict.AGREE, name
        assert steps[name].side == ""
    assert steps["tap mix"].own_verdict is Verdict.DIFFER
    assert steps["tap mix"].side == "torch"
    assert steps["gradient mix.value.weight"].own_verdict is Verdict.DIFFER
    assert steps["loss"].own_verdict is None
    # The gradient that arrives at the norm comes through the part that is wrong, that at the mixture does not.
    assert steps["gradient tap norm"].own_verdict is Verdict.DIFFER
    assert steps["gradient tap mix"].own_verdict is Verdict.AGREE


def test_single_steps_of_a_clean_pair_all_agree(one_thread) -> None:
    steps = found(single=True).steps
    assert {step.own_verdict for step in steps if step.name != "loss"} == {Verdict.AGREE}
    assert sum(step.name.startswith("gradient tap ") for step in steps) == 4


def test_two_mistakes_are_both_seen_alone(one_thread) -> None:
    location = found(single=True, eps=1e-6, tanh=True)
    own = [s.name for s in location.steps if s.name.startswith("tap ") and s.own_verdict is Verdict.DIFFER]
    assert location.place == "tap norm"
    assert own == ["tap norm", "tap mlp"]


def test_a_torch_function_has_no_single_steps() -> None:
    pair = toy.toy_pair()
    pair.torch = lambda params, *inputs: None
    with pytest.raises(CannotLook, match="only a module has sub-modules"):
        cut.cut(pair, {"first": "first"}, {"first": (3, 6, 8)})


def test_the_reference_hands_its_gradient_to_each_tap(one_thread) -> None:
    """At the last tap the loss is the mean of squares: its gradient is 2 y / n, and no other library says it."""
    pair, judge = toy.toy_pair(), toy.judge()
    findings = judge(toy.weights(), toy.inputs(), "float64")
    taps = {k.removeprefix("tap "): v[2] for k, v in findings.values.items() if k.startswith("tap ")}
    arrives = cut.cotangents(pair, pair.jax_params(toy.weights()), toy.inputs(), taps)
    y = taps["mlp"]
    assert np.abs(arrives["mlp"] - 2 * y / y.size).max() <= 4 * np.finfo(float).eps * np.abs(arrives["mlp"]).max()
    assert set(arrives) == {"first", "norm", "mix", "mlp"}


# --- anybody's pair --------------------------------------------------------------------------------------------------


def test_anybody_can_ask_where_a_pair_parts(one_thread) -> None:
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(self.first(x)) / math.sqrt(5))

    def function(params: Any, x: Any) -> Any:
        from jax import numpy as jnp
        from jax.ad_checkpoint import checkpoint_name

        dense = lambda p, x: x @ p["kernel"] + p["bias"][None]  # noqa: E731
        return dense(params["last"], jnp.tanh(checkpoint_name(dense(params["first"], x), "first")))

    zeros = lambda a, b: {"kernel": np.zeros((a, b), np.float32), "bias": np.zeros(b, np.float32)}  # noqa: E731
    x = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
    location = locate(function, Net(), {"first": zeros(4, 5), "last": zeros(5, 3)}, [x], draws=4)
    assert location.place == "output"
    assert location.diagnosis is not None
    assert location.diagnosis.cause == "scale factor"
    assert "1 / √5" in str(location.diagnosis)


# --- a failed run ----------------------------------------------------------------------------------------------------


def row(name: str, verdict: Verdict, **more: Any) -> Row:
    return Row("some", "mha-swiglu", "fresh", "float32", name, verdict, "torch left the float64 reference: why", **more)


def test_a_failed_check_without_comparisons_is_placed_by_its_rows() -> None:
    rows = [row("a", Verdict.AGREE), row("b", Verdict.DIFFER, decides=False), row("c", Verdict.DIFFER)]
    location = found_in([], rows)
    assert location is not None
    assert (location.place, location.side, location.label) == ("c", "torch", "mha-swiglu, fresh")
    assert found_in([], rows[:1]) is None


def test_comparisons_are_watched_only_inside(one_thread) -> None:
    with watched() as seen:
        toy.judge()(toy.weights(), toy.inputs(), "float64")
        assert not seen
        toy.judge(eps=1e-6)(toy.weights(), toy.inputs(), "float64")
    toy.judge(eps=1e-6)(toy.weights(), toy.inputs(), "float64")
    assert len(seen) == 1


def test_a_control_that_parts_is_not_taken_for_the_failure(one_thread) -> None:
    with watched() as seen:
        toy.judge(tanh=True)(toy.weights(), toy.inputs(), "float64")
        findings = toy.judge(eps=1e-6)(toy.weights(), toy.inputs(), "float64")
    assert len(seen) == 2
    location = found_in(seen, findings.rows("logits", "toy", "fresh", None), model=False)
    assert location is not None
    assert location.place == "tap norm"


def test_a_failed_run_says_where_which_side_and_why(monkeypatch: pytest.MonkeyPatch, one_thread) -> None:
    def run(scope: Scope, progress: Any) -> CheckResult:
        findings = toy.judge(eps=1e-6)(toy.weights(), toy.inputs(), "float64")
        return CheckResult("logits", findings.rows("logits", "toy", "fresh", None))

    module = SimpleNamespace(CLAIM="c", BLIND="b", CONTROLS={}, run=run)
    monkeypatch.setattr(checks, "load", lambda name: module)
    ended = CliRunner().invoke(app, ["run", "--only", "logits"], env={"COLUMNS": "120"})
    assert ended.exit_code == 1
    text = " ".join(ended.stdout.split())
    assert "logits: located: toy, fresh, float64: the sides part at norm; torch left the float64 reference" in text
    assert "diagnosis of tap norm: eps: 1e-06 in the place of 1e-05" in text


def test_all_checks_of_a_run_share_the_time_for_causes(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    import parity.locate

    clock, given = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def looked(compared: Any, rows: Any, *, model: bool, seconds: float) -> None:
        given.append(seconds)
        clock[0] += 7.0

    monkeypatch.setattr(parity.locate, "found_in", looked)
    result = CheckResult("logits", [row("a", Verdict.DIFFER)])
    module = SimpleNamespace(CLAIM="c", BLIND="b", CONTROLS={}, run=lambda scope, progress: copy.deepcopy(result))
    monkeypatch.setattr(checks, "load", lambda name: module)
    names = ["logits", "gradients", "mel"]
    arguments = [word for name in names for word in ("--only", name)]
    ended = CliRunner().invoke(app, ["run", *arguments, "--explain", "10"])
    assert ended.exit_code == 1, ended.output
    assert given == [10.0, 3.0, 0.0]


def test_a_clean_run_does_not_look_for_causes(monkeypatch: pytest.MonkeyPatch) -> None:
    import parity.locate

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing failed")

    monkeypatch.setattr(parity.locate, "found_in", never)
    result = CheckResult("logits", [row("a", Verdict.AGREE)])
    module = SimpleNamespace(CLAIM="c", BLIND="b", CONTROLS={}, run=lambda scope, progress: result)
    monkeypatch.setattr(checks, "load", lambda name: module)
    ended = CliRunner().invoke(app, ["run", "--only", "logits"])
    assert ended.exit_code == 0, ended.output
    assert "located" not in ended.stdout


def test_an_explanation_that_fails_is_no_failure_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import parity.locate

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of ideas")

    monkeypatch.setattr(parity.locate, "found_in", broken)
    result = CheckResult("logits", [row("a", Verdict.DIFFER)])
    module = SimpleNamespace(CLAIM="c", BLIND="b", CONTROLS={}, run=lambda scope, progress: result)
    monkeypatch.setattr(checks, "load", lambda name: module)
    ended = CliRunner().invoke(app, ["run", "--only", "logits"], env={"COLUMNS": "120"})
    assert ended.exit_code == 1
    assert "no cause was looked for: RuntimeError: out of ideas" in " ".join(ended.stdout.split())


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_shows_a_bug_of_the_catalogue(tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    arguments = ["locate", "--mutant", "norm-eps-torch", "--single-step", "--json", str(target)]
    ended = CliRunner().invoke(app, arguments, env={"COLUMNS": "140"})
    assert ended.exit_code == 1, ended.output
    text = " ".join(ended.stdout.split())
    assert "blocks.0.attn <- here" in text
    assert "the sides part at blocks.0.attn; torch left the float64 reference" in text
    assert "eps: 1e-06 in the place of 1e-05 at omni_jax/layers.py" in text
    (record,) = json.loads(target.read_text(encoding="utf-8"))
    assert record["place"] == "tap blocks.0.attn"
    assert record["diagnosis"]["named"] is True
    alone = {step["name"]: step["own_verdict"] for step in record["steps"]}
    assert alone["tap blocks.0.attn"] == "DIFFER"
    assert alone["logits"] == "AGREE"


def test_the_command_agrees_about_the_twins(one_thread) -> None:
    ended = CliRunner().invoke(app, ["locate", "--config", "mha-gelu"])
    assert ended.exit_code == 0, ended.output
    assert "the sides part nowhere" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mutant", "norm-epz"], "did you mean norm-post or norm-eps"),
        (["--mutant", "norm-eps-torch", "--config", "moe"], "it brings its own configuration"),
        (["--score", "--mutant", "norm-eps-torch"], "leave the other options out"),
        (["--only", "norm"], "add --score"),
        (["--held-out"], "add --score"),
        (["--score", "--held-out", "--only", "norm"], "leave one of them out"),
        (["--explain", "-1"], "--explain"),
        (["--precision", "float63"], "float64"),
    ],
)
def test_a_wrong_question_is_a_misuse(arguments: list[str], words: str) -> None:
    ended = CliRunner().invoke(app, ["locate", *arguments])
    assert ended.exit_code == 2
    assert words in " ".join(ended.stderr.split())


# --- the score -------------------------------------------------------------------------------------------------------


def test_every_right_answer_is_of_a_bug_that_is_there() -> None:
    assert not set(attribution.RIGHT) - {m.id for m in catalogue()}


EXAMPLES = {
    "norm-eps-jax": "blocks.0.attn",
    "norm-scale-missing": "blocks.0.attn",
    "attention-heads-tiled": "blocks.0.attn",
    "attention-qkv-order": "blocks.0.attn",
    "mlp-gelu-tanh": "blocks.0.mlp",
    "embedding-scaled": "tok_emb",
    "loss-sum": "loss",
    "gradients-norm-cut": "gradient blocks.1.mlp",
    "loss-smoothing": "loss",
    "attention-empty-mean": "blocks.0.attn",
    "attention-softmax-axis": "blocks.0.attn",
    "rope-values-turned": "blocks.0.attn",
    "dtype-norm-float32": "blocks.0.attn",
    "clipping-eps-missing": "bias: clipped gradient",
}


def test_bugs_of_the_catalogue_are_placed_and_explained_by_rule() -> None:
    report = attribution.score([m for m in catalogue() if m.id in EXAMPLES], library=False)
    for outcome in report.outcomes:
        assert outcome.place.startswith(EXAMPLES[outcome.id]) or outcome.placed, outcome
        assert outcome.right, outcome
    assert len(report.outcomes) == len(EXAMPLES)


def test_the_totals_keep_what_is_held_out_apart() -> None:
    told = {"side": "jax", "what": "w", "seen": True, "placed": True, "check": "logits"}
    report = attribution.Report(
        [
            attribution.Attributed("a", **told, cause="eps: x", right=True),
            attribution.Attributed("b", **told, library="norm: x [c]", library_right=True),
            attribution.Attributed("c", **{**told, "check": "mel"}),
            attribution.Attributed("d", **told, cause="order: x"),
        ]
    )
    text = "\n".join(report.lines)
    assert "right cause named by rule: 1 of 4 (25.0%); of the language model's: 1 of 3" in text
    assert "named by rule at all: 2, of these rightly: 1 of 2" in text
    assert "with the library as well: 2 of 4 (50.0%); of the language model's: 2 of 3" in text


@pytest.mark.long
def test_most_of_the_catalogue_is_placed_and_explained() -> None:
    wanted = [m for m in catalogue() if m.check in checks.OF_MODELS and not m.equivalent]
    report = attribution.score(wanted, library=False)
    assert report.count(seen=True) == len(wanted), report.lines
    assert report.count(placed=True, right=True) >= 0.9 * len(wanted), report.lines


def test_held_out_bugs_are_other_bugs_and_each_has_an_answer() -> None:
    mutants, right = held_out(attribution.RIGHT)
    known = {m.edits for m in catalogue()}
    assert {m.id for m in mutants} == set(right)
    assert len(right) == len(mutants)
    assert not [m.id for m in mutants if m.edits in known]
    others = [m for m in mutants if not m.id.startswith("rule:")]
    assert 0 < len(others) < len(mutants)
    for mutant in others:
        inject.edited(mutant.edits)  # raises for an edit that does not apply


def test_the_document_counts_what_was_scored() -> None:
    told = {"side": "jax", "what": "w", "check": "logits", "seen": True, "placed": True}
    scored = attribution.Report(
        [
            attribution.Attributed("a", **told, cause="eps: x", right=True),
            attribution.Attributed("b", **told, library="norm: x [c]", library_right=True),
            attribution.Attributed("c", **{**told, "what": "another thing"}, cause="order: x"),
        ]
    )
    held = attribution.Report(
        [
            attribution.Attributed("rule:d", **told, cause="eps: x", right=True),
            attribution.Attributed("rule:e", **{**told, "seen": False}),
            attribution.Attributed("a, another number", **told, cause="eps: x"),
        ]
    )
    text = causes_table.markdown(scored.to_dict(), held.to_dict())
    assert "| logits | 3 | 3 | 1 | 2 |" in text
    assert "| mutants by rule | 2 | 1 | 1 | 1 |" in text
    assert "| the catalogue with another number | 1 | 1 | 1 | 0 |" in text
    assert "* logits, c: another thing (named: order: x)" in text
    assert "* logits, a:" not in text


def test_the_library_explains_a_bug_by_its_counterpart(one_thread) -> None:
    """The eps of the torch twin, by the bug of the JAX twin: other code, the same mistake."""
    from dataclasses import replace

    from parity import diagnosis
    from parity.causes import model

    bug = next(m for m in catalogue(["norm"]) if m.id == "norm-eps-torch")
    asked: list[diagnosis.Question] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnosis, "diagnose", lambda question, model: asked.append(question))
        patch.setattr("parity.locate.diagnose", lambda question, model: asked.append(question))
        locate_command.of_mutant(bug)
    with inject.injected(bug.edits):
        known = model.candidates(asked[0].tensor)
        patch = pytest.MonkeyPatch()
        patch.setattr(model, "candidates", lambda tensor: [m for m in known if m.id in ("norm-eps-jax", bug.id)])
        try:
            explained = model.diagnose(replace(asked[0]))
        finally:
            patch.undo()
    assert explained is not None
    assert explained.within
    assert "[norm-eps-jax]" in explained.words
