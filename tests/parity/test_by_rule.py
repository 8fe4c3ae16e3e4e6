"""Mutants by rule: what is changed and what is let alone, who is killed and who is not, and that nothing stays."""

from __future__ import annotations

import json
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("jax")

from typer.testing import CliRunner  # noqa: E402

import omni_torch.attention  # noqa: E402
from parity.checks import Progress, Scope  # noqa: E402
from parity.cli import app  # noqa: E402
from parity.errors import Misuse  # noqa: E402
from parity.mutants import by_rule as rules  # noqa: E402
from parity.mutants import by_rule_gate as gates  # noqa: E402
from parity.mutants import by_rule_table, inject  # noqa: E402
from parity.mutants.by_rule import MODULES, RuleMutant, by_rule  # noqa: E402
from parity.mutants.by_rule_looks import Look, looks_of  # noqa: E402
from parity.mutants.by_rule_sites import RULES, sites  # noqa: E402
from parity.mutants.examined import EXAMINED, KINDS  # noqa: E402
from parity.result import CheckResult, Row  # noqa: E402
from parity.verdict import Verdict  # noqa: E402

# --- what a rule changes ---------------------------------------------------------------------------------------------

CHANGES = [
    ("a + b * c", "arithmetic", {"a + ((b) / (c))", "((a) - (b * c))"}),
    ("m @ n", "operands", {"((n) @ (m))"}),
    ("a < b", "compare", {"((a) <= (b))", "((a) > (b))"}),
    ("a == b != c", "compare", {"((a) != (b) != (c))", "((a) == (b) == (c))"}),
    ("a and b", "boolean", {"((a) or (b))"}),
    ("~a | b", "boolean", {"(a) | b", "((~a) & (b))"}),
    ("f(2.5)", "constant", {"f((3.5))", "f((1.5))", "f((5.0))", "f((0.0))"}),
    ("f(1)", "constant", {"f((2))", "f((0))"}),
    ("f(x, on=True)", "flag", {"f(x, on=False)"}),
    ("f(x, axis=-1)", "axis", {"f(x, axis=(-2))"}),
    ("jnp.transpose(x, (0, 2, 1))", "axis", {"jnp.transpose(x, (2, 0, 1))", "jnp.transpose(x, (0, 1, 2))"}),
    ("x.permute(0, 2, 1)", "axis", {"x.permute(2, 0, 1)", "x.permute(0, 1, 2)"}),
    ("x.transpose(1, 2)", "transpose", {"(x)"}),
    ("x[a:5]", "slice", {"x[(a) + 1:5]", "x[(a) - 1:5]", "x[a:6]", "x[a:4]"}),
    ("x[:-1]", "slice", {"x[:-2]", "x[1:-1]"}),
    ("x[0]", "index", {"x[(1)]"}),
    ("range(n)", "range", {"range((n) + 1)", "range((n) - 1)"}),
    ("-x", "negation", {"(x)"}),
    ("x.astype(wide)", "cast", {"(x)"}),
    ("lax.stop_gradient(x)", "gradient", {"(x)"}),
    ("jnp.where(c, a, b)", "operands", {"jnp.where(c, b, a)"}),
    ("x.max()", "function", {"x.min()"}),
]


def made(source: str) -> list[tuple[str, str]]:
    """(rule, whole source after the change)."""
    return [(site.rule, rules._changed(source, site)) for site in sites(source)]


@pytest.mark.parametrize(("text", "rule", "expected"), CHANGES, ids=[f"{r}: {t}" for t, r, _ in CHANGES])
def test_each_rule_changes_what_it_says(text: str, rule: str, expected: set[str]) -> None:
    found = made(f"def f(σ):\n    return {text}\n")
    assert {new.partition("return ")[2].strip() for kind, new in found if kind == rule} == expected


def test_the_list_shows_every_rule() -> None:
    assert {rule for _, rule, _ in CHANGES} == set(RULES)


def test_words_checks_and_types_are_let_alone() -> None:
    source = textwrap.dedent('''
        @cache(1)
        def f(x: "Float[2]", eps: float = 1e-5) -> "tuple[int, 3]":
            """x + 1."""
            assert x > 0
            y: "list[7]" = x
            if x < 0 or y > 3:
                raise ValueError(f"{x + 1}" + "2")
            _check_array(x + 1, 3)
            try:
                return y
            except ValueError:
                return 0
    ''').strip()
    assert made(source) == []


def test_an_in_place_operator_is_changed_too() -> None:
    assert made("def f(x):\n    x += y\n") == [("arithmetic", "def f(x):\n    x -= y\n")]


# --- the mutants of the twins ----------------------------------------------------------------------------------------


def test_every_change_is_python_and_another_function() -> None:
    every = by_rule()
    assert len({mutant.id for mutant in every}) == len(every)
    for mutant in every:
        assert all(edit.new != edit.old for edit in mutant.edits), mutant.id
    for mutant in every[::7]:
        compile(mutant.edits[0].new, mutant.id, "exec", dont_inherit=True)


@pytest.mark.parametrize("module", MODULES)
def test_every_function_is_found_where_it_is_put_in(module: str) -> None:
    firsts = {mutant.edits[0].target: mutant for mutant in by_rule([module])}
    assert firsts
    assert looks_of(module)
    for mutant in firsts.values():
        for _, _, found, new in inject.edited(mutant.edits):
            assert new is not found


def test_an_id_does_not_move_with_the_lines() -> None:
    text = "def f(x):\n    return x + 1\n\ndef g(x):\n    return x[1:]\n"
    moved = "import math\n\n" + text.replace("return x + 1", "y = x + 1\n    return y")
    before, after = ([m.id for m in rules._made("jax", "m", t, ())] for t in (text, moved))
    assert before == after
    assert len(before) > 5


def test_what_the_twins_share_is_changed_in_both() -> None:
    sides = {module: {mutant.side for mutant in by_rule([module])} for module in ("mel", "layers")}
    assert sides == {"mel": {"both"}, "layers": {"jax", "torch"}}
    assert all(len(mutant.edits) == 2 for mutant in by_rule(["mel"]))


def test_an_unknown_module_is_a_misuse() -> None:
    with pytest.raises(Misuse, match=r"atention.*attention, layers"):
        by_rule(["atention"])


def test_a_sample_is_the_same_again_and_in_order() -> None:
    every = by_rule(["losses"])
    drawn = gates.sampled(every, 7, 3)
    assert drawn == gates.sampled(every, 7, 3) != gates.sampled(every, 7, 4)
    assert sorted(drawn, key=every.index) == drawn
    assert gates.sampled(every, None, 0) == gates.sampled(every, len(every) + 1, 0) == list(every)


def test_every_examined_survivor_is_still_a_mutant() -> None:
    known = {mutant.id for mutant in by_rule()}
    for name, (kind, reason) in EXAMINED.items():
        assert name in known, f"{name}: the code has changed; look at it again"
        assert kind in KINDS
        assert reason


# --- who is killed ---------------------------------------------------------------------------------------------------


def positions(scope: Scope, progress: Progress) -> CheckResult:
    """A check of one function: right-padded positions by torch, against what they are."""
    kept = torch.tensor([[False, True, True], [True, True, False]])
    found = omni_torch.attention.default_positions(3, kept)
    right = torch.tensor([[0, 0, 1], [0, 1, 1]])
    words = "as it must be" if torch.equal(found, right) else "not as it must be"
    if not torch.isfinite(found).all():
        words = "not finite in some elements"
    verdict = Verdict.AGREE if words == "as it must be" else Verdict.DIFFER
    return CheckResult("positions", [Row("positions", "", "", "", "positions", verdict, words)])


@pytest.fixture
def look(monkeypatch) -> Look:
    only = Look(("positions",))
    monkeypatch.setattr(gates, "looks_of", lambda module: (only,))
    monkeypatch.setattr(gates, "checks", SimpleNamespace(load=lambda name: SimpleNamespace(run=positions)))
    return only


def named(change: str, function: str = "default_positions") -> RuleMutant:
    wanted = f"rule:torch.attention.{function}:{change}"
    return next(mutant for mutant in by_rule(["attention"]) if mutant.id == wanted)


STATUS = {
    "arithmetic:-→+": "killed",
    "axis:dim=1→dim=0": "killed",
    "constant:0→-1": "killed",
    "compare:==→!=": "crashed",
    "axis:dim1=1→dim1=0": "survived",  # on a line that is run, in a branch that is not
}


@pytest.mark.parametrize(("change", "status"), STATUS.items())
def test_a_verdict_kills_and_an_exception_does_not(look: Look, change: str, status: str) -> None:
    before = omni_torch.attention.default_positions
    outcome = gates.RuleGate()(named(change))
    assert (outcome.status, outcome.check) == (status, "positions")
    assert omni_torch.attention.default_positions is before
    assert all(row.verdict is Verdict.AGREE for row in positions(Scope(), lambda *_: None).rows)


def test_what_no_check_runs_is_not_reached(look: Look) -> None:
    outcome = gates.RuleGate()(named("axis:dim=-1→dim=-2", "simple_attention"))
    assert (outcome.status, outcome.check) == ("not reached", "")


def test_values_that_are_not_finite_are_no_kill(look: Look, monkeypatch) -> None:
    wild = named("arithmetic:-→+")
    edit = wild.edits[0]
    nan = RuleMutant(**{**vars(wild), "edits": (type(edit)(edit.module, edit.name, edit.old, edit.new.replace(
        "return ((", "return float('nan') * (("
    )),)})  # fmt: skip
    assert nan.edits[0].new != edit.new
    outcome = gates.RuleGate()(nan)
    assert outcome.status == "crashed"
    assert "not finite" in outcome.words


def test_a_clean_run_that_disagrees_is_an_error(look: Look, monkeypatch) -> None:
    monkeypatch.setattr(gates, "checks", SimpleNamespace(load=lambda name: SimpleNamespace(run=wrong)))
    outcome = gates.RuleGate()(named("arithmetic:-→+"))
    assert outcome.status == "error"
    assert "does not agree" in outcome.words


def wrong(scope: Scope, progress: Progress) -> CheckResult:
    return CheckResult("positions", [Row("positions", "", "", "", "positions", Verdict.DIFFER, "always")])


def test_an_equivalent_is_no_survivor(look: Look, monkeypatch) -> None:
    mutant = named("axis:dim1=1→dim1=0")
    monkeypatch.setattr(gates, "examined", lambda name: ("equivalent", "for this test"))
    outcome = gates.RuleGate()(mutant)
    assert (outcome.status, outcome.reason) == ("equivalent", "equivalent: for this test")
    monkeypatch.setattr(gates, "examined", lambda name: ("gap", "for this test"))
    assert gates.RuleGate()(mutant).status == "survived"
    # A kill outranks what was written down before.
    monkeypatch.setattr(gates, "examined", lambda name: ("equivalent", "wrongly"))
    assert gates.RuleGate()(named("arithmetic:-→+")).status == "killed"


def test_an_endless_loop_is_cut_off() -> None:
    def forever() -> None:
        while True:
            pass

    with pytest.raises(TimeoutError, match="no end"), gates._limited(0.05):
        forever()


def test_an_equivalent_that_is_killed_is_said_to_be_none(look: Look, monkeypatch) -> None:
    monkeypatch.setattr(gates, "examined", lambda name: ("equivalent", "wrongly"))
    outcome = gates.RuleGate()(named("arithmetic:-→+"))
    report = gates.RuleReport([outcome], 1, None)
    assert report.refuted == report.revived == [outcome]
    assert report.exit_code == 1
    assert "1 called equivalent that are not" in by_rule_table.totals(report)
    monkeypatch.setattr(gates, "examined", lambda name: ("tests", "seen by this test only"))
    report = gates.RuleReport([gates.RuleGate()(named("arithmetic:-→+"))], 1, None)
    assert (len(report.revived), report.refuted, report.exit_code) == (1, [], 0)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_shows_survivors_first_and_counts(look: Look, tmp_path, monkeypatch) -> None:
    wanted = [named(change) for change in STATUS]
    monkeypatch.setattr(rules, "by_rule", lambda modules: wanted)
    result = CliRunner().invoke(app, ["mutants", "--by-rule", "--module", "attention", "--json", str(tmp_path / "f")])
    assert result.exit_code == 1, result.output
    assert result.output.startswith("survived: rule:torch.attention.default_positions:axis:dim1=1→dim1=0")
    assert "not examined" in result.output
    record: dict[str, Any] = json.loads((tmp_path / "f").read_text())
    assert (record["killed"], record["crashed"], record["survived"], record["unexamined"]) == (3, 1, 1, 1)
    assert record["of"] == record["mutants"] == 5


def test_the_command_judges_one_mutant_or_those_examined(look: Look, tmp_path, monkeypatch) -> None:
    right, wrong = named("constant:0→-1"), named("arithmetic:-→+")
    monkeypatch.setattr(rules, "by_rule", lambda modules: (right, wrong))
    given = ["mutants", "--by-rule", "--json", str(tmp_path / "f")]
    for options, wanted in ((["--id", wrong.id], wrong), (["--examined"], right)):
        CliRunner().invoke(app, [*given, *options])
        assert [outcome["id"] for outcome in json.loads((tmp_path / "f").read_text())["outcomes"]] == [wanted.id]
    result = CliRunner().invoke(app, [*given, "--id", wrong.id[:-1]])
    assert result.exit_code == 2
    assert "did you mean" in result.output


def test_the_command_names_an_unknown_module() -> None:
    result = CliRunner().invoke(app, ["mutants", "--by-rule", "--module", "atention"])
    assert result.exit_code == 2
    assert "must be one of" in result.output


def test_the_catalogue_keeps_its_command() -> None:
    result = CliRunner().invoke(app, ["mutants", "--only", "nothing"])
    assert result.exit_code == 2
    assert "norm, attention" in result.output
