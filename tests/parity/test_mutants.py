"""The catalogue of bugs: it applies to the code as it is, it leaves nothing behind, and its kills are kills."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("jax")

from rich.console import Console  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from parity import checks  # noqa: E402
from parity.cli import app  # noqa: E402
from parity.errors import Misuse  # noqa: E402
from parity.mutants import AREAS, Edit, Mutant, catalogue, inject, table  # noqa: E402
from parity.mutants import gate as gates  # noqa: E402
from parity.mutants.inject import DeadAnchor, injected  # noqa: E402
from parity.mutants.rows import ROWS  # noqa: E402

NORM = ("omni_torch.layers", "RMSNorm.forward")
JAX_NORM = ("omni_jax.layers", "RMSNorm.__call__")
EPS = Edit(*NORM, "+ self.eps", "+ 1e-6")


def mutant(*edits: Edit, check: str = "logits", **more: Any) -> Mutant:
    return Mutant("trial", "norm", "N01", "a trial", edits, check, **more)


def named(name: str) -> Mutant:
    return next(m for m in catalogue() if m.id == name)


@pytest.fixture(scope="module")
def gate(one_thread) -> gates.Gate:
    return gates.Gate("fast")


# --- the catalogue ---------------------------------------------------------------------------------------------------


def test_every_mutant_is_well_formed() -> None:
    every = catalogue()
    assert len({m.id for m in every}) == len(every)
    for m in every:
        assert m.check in checks.CHECKS, m.id
        assert m.id.startswith(f"{m.area}-")
        assert m.edits, m.id
        assert m.what.rstrip(".") == m.what != "", m.id
        assert m.report in ROWS or m.report.startswith("common: "), m.id
        assert m.side in ("jax", "torch", "both")
        assert not set(m.scope) - set(checks.Scope.__dataclass_fields__), m.id
        re.compile(m.where)
        re.compile(m.symptom)


def test_there_are_enough_in_every_area_and_few_equivalents() -> None:
    every = catalogue()
    live = [m for m in every if not m.equivalent]
    assert len(live) >= 100
    for area in AREAS:
        assert sum(m.area == area for m in live) >= 3, area
    assert len(every) - len(live) <= len(every) / 10


def test_every_report_has_a_mutant_or_a_reason() -> None:
    used = {m.report for m in catalogue()}
    assert len(ROWS) >= 120
    for name, row in ROWS.items():
        assert bool(row.reason) != (name in used), name
        assert row.what, name
        assert all(link.startswith("https://") for link in row.links), name


@pytest.mark.parametrize("area", AREAS)
def test_every_anchor_stands_in_the_code(area: str) -> None:
    for m in catalogue([area]):
        for _, _, found, made in inject.edited(m.edits):
            assert made is not found


def test_an_unknown_area_is_a_misuse() -> None:
    with pytest.raises(Misuse, match=r"norms.*norm, attention"):
        catalogue(["norms"])


# --- the injection ---------------------------------------------------------------------------------------------------

KINDS = {
    "method": EPS,
    "function that others import by name": Edit("omni_jax.layers", "apply_rope", "second * cos", "second * -cos"),
    "jitted": Edit("omni_jax.sampling", "_draw", "within_B1)[:, 0]", "within_B1 + 1)[:, 0]"),
    "cached": Edit("omni_torch.mel", "hann_window", "0.5 - 0.5", "0.5 - 0.4"),
    "class method": Edit("omni_jax.thinker", "ThinkerLM.from_config", "nnx.Rngs(0) if", "nnx.Rngs(1) if"),
    "property": Edit("omni_torch.tokenizer", "BPETokenizer.vocab_size", "pieces", "pieces + 1"),
    "with super()": Edit("omni_torch.optim", "AdamW.load_state_dict", '"maximize")', '"minimize")'),
}


def everything() -> dict[str, Any]:
    """What every name of the packages stands for, classes included."""
    found: dict[str, Any] = {}
    for module in inject._modules():
        for name, value in vars(module).items():
            found[f"{module.__name__}.{name}"] = value
            if isinstance(value, type) and value.__module__ == module.__name__:
                found |= {f"{module.__name__}.{name}.{key}": inner for key, inner in vars(value).items()}
    return found


def mutants_left() -> list[str]:
    functions = {name: getattr(value, "__wrapped__", value) for name, value in everything().items()}
    codes = {name: getattr(value, "__code__", None) for name, value in functions.items()}
    return [name for name, code in codes.items() if code is not None and code.co_filename.startswith("<mutant")]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_put_in_is_taken_out_again(kind: str) -> None:
    inject.import_everything()
    before = everything()
    with injected([KINDS[kind]]) as injection:
        during = everything()
        changed = [name for name, value in before.items() if during[name] is not value]
        assert changed
        assert injection.dead
    after = everything()
    assert all(after[name] is value for name, value in before.items())
    assert not mutants_left()


def _stop_inside(stop: type[BaseException]) -> None:
    with injected([EPS]):
        raise stop


def test_it_is_taken_out_whatever_happens() -> None:
    import omni_torch.layers

    right = omni_torch.layers.RMSNorm.forward
    for stop in (ValueError, KeyboardInterrupt):
        with pytest.raises(stop):
            _stop_inside(stop)
        assert omni_torch.layers.RMSNorm.forward is right
    with pytest.raises(DeadAnchor), injected([EPS, Edit(*JAX_NORM, "not there", "")]):
        pass
    assert omni_torch.layers.RMSNorm.forward is right
    assert not mutants_left()


def test_every_reference_is_turned_and_calls_are_counted() -> None:
    import omni_jax.attention
    import omni_jax.layers

    with injected([KINDS["function that others import by name"]]) as injection:
        assert omni_jax.attention.apply_rope is omni_jax.layers.apply_rope
        one = omni_jax.layers.jnp.ones((1, 1, 1, 2))
        turned = omni_jax.attention.apply_rope(one, one[..., 0, :1], one[..., 0, :1] * 0)
        assert turned.ravel().tolist() == [1.0, -1.0]
        assert injection.calls == {"omni_jax.layers.apply_rope": 1}


def test_what_was_cached_before_is_computed_anew_and_not_kept() -> None:
    import omni_torch.mel

    right = omni_torch.mel.hann_window(8).tolist()
    with injected([KINDS["cached"]]):
        assert omni_torch.mel.hann_window(8).tolist() != right
    assert omni_torch.mel.hann_window(8).tolist() == right


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Edit(*NORM, "+ self.epsilon", "+ 1e-6"), "occurs 0 times"),
        (Edit(*NORM, "x_wide", "y", 2), "not 2"),
        (Edit("omni_torch.layers", "LayerNorm.forward", "eps", "0"), "no such function"),
        (Edit(*NORM, "+ self.eps)", "+ self.eps"), "no Python"),
    ],
)
def test_an_edit_that_does_not_apply_is_a_dead_anchor(edit: Edit, words: str) -> None:
    with pytest.raises(DeadAnchor, match=words), injected([edit]):
        pass


# --- the gate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "norm-eps-torch",
        "norm-eps-jax",
        "attention-softmax-bfloat16",  # a narrowing cast, which the interpreter would take for noise
        "rope-table-end",
        "moe-router-detached",
        "gradients-residual-cut",
        "optimizer-eps-inside-jax",
        "clipping-eps-missing",
        "mel-window-symmetric",  # in both twins
        "cache-full-overwrites",
        "tokenizer-wraps",
        "norm-fast-variance",  # needs an offset
        "moe-tie-order",  # needs experts that are tied to the bit
        "embedding-clamped",  # needs an id out of range inside jit
        "loss-zero-ignored",  # needs EOS among the targets
        "dtype-statistics-narrow",  # needs to be asked how often it rounds
        "dtype-norm-late-cast",
        "sampling-draw-unscaled",  # needs a sum that is not 1
        "optimizer-mask-frozen",
        "schedule-micro-steps",
        "checkpoint-orig-mod",  # its own symptom is the reader's refusal
    ],
)
def test_a_real_bug_is_killed_and_located(gate: gates.Gate, name: str) -> None:
    outcome = gate(named(name))
    assert outcome.status == "killed", outcome.words
    assert outcome.attributed, outcome.located


@pytest.mark.parametrize("name", ["rope-offset", "attention-top-gradient"])
def test_an_equivalent_agrees(gate: gates.Gate, name: str) -> None:
    outcome = gate(named(name))
    assert outcome.status == "equivalent", outcome.words
    assert not any(outcome.seen.values())


@pytest.mark.parametrize(
    ("check", "edit"),
    [
        ("logits", Edit(*NORM, "wide = statistics", "wide = None; wide = statistics")),
        ("gradients", Edit(*JAX_NORM, "wide = statistics", "wide = None; wide = statistics")),
        ("dropout", Edit("omni_jax.attention", "attend", "K = k_BSKd", "K = None; K = k_BSKd")),
        ("decode", Edit("omni_jax.cache", "_CachedCall.mask", "length, S =", "S = None; length, S =")),
        ("trajectory", Edit("omni_jax.optim", "_update", "t = count + 1", "t = 1 + count")),
        (
            "vision-encoder",
            Edit("omni_jax.vision_encoder", "_LayerNorm.__call__", "spread =", "spread = None; spread ="),
        ),
    ],
)
def test_a_change_that_changes_nothing_survives(gate: gates.Gate, check: str, edit: Edit) -> None:
    """No kill comes from the machinery: neither from what is evaluated, nor from what is answered by the record."""
    found = gate(mutant(edit, check=check))
    assert found.status == "survived", found.words


def test_a_clean_run_after_a_kill_agrees(gate: gates.Gate) -> None:
    for name in ("norm-eps-torch", "norm-eps-jax"):
        assert gate(named(name)).status == "killed"
    fresh = gates.Gate("fast")
    clean, _ = fresh.clean_run("logits", fresh.scope(named("norm-eps-jax")))
    assert not [row.name for row in clean.rows if gates.bad(row)]


def test_code_that_the_check_does_not_run_is_a_dead_anchor(gate: gates.Gate) -> None:
    outcome = gate(mutant(Edit("omni_torch.layers", "GELUMLP.forward", 'approximate="none"', 'approximate="tanh"')))
    assert outcome.status == "error"
    assert "nobody called omni_torch.layers.GELUMLP.forward" in outcome.words


def test_a_crash_is_no_kill(gate: gates.Gate) -> None:
    for edit in (Edit(*NORM, "+ self.eps", "+ self.nothing"), Edit(*NORM, "dim=-1", "dim=7")):
        outcome = gate(mutant(edit))
        assert outcome.status == "error"
        assert "the torch side raised" in outcome.words


def test_what_is_called_equivalent_and_is_not_is_an_error(gate: gates.Gate) -> None:
    outcome = gate(mutant(EPS, equivalent="somebody thought so"))
    assert outcome.status == "error"
    assert "called equivalent, but not" in outcome.words


def test_the_familiar_bound_misses_a_kill_and_sees_a_coarse_one(gate: gates.Gate) -> None:
    assert gate(named("norm-eps-torch")).seen == {"0.001": False, "1e-05": False}
    assert gate(named("attention-qkv-order")).seen == {"0.001": True, "1e-05": True}


def test_the_wrong_gate_is_a_misuse() -> None:
    with pytest.raises(Misuse, match="fast, full"):
        gates.Gate("slow")


def test_ctrl_c_keeps_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def judge(self: gates.Gate, m: Mutant) -> gates.Outcome:
        if calls:
            raise KeyboardInterrupt
        calls.append(m.id)
        return outcome()

    monkeypatch.setattr(gates.Gate, "__call__", judge)
    report = gates.run(catalogue(["norm"]))
    assert (len(report.outcomes), report.ended, report.exit_code) == (1, False, 3)


@pytest.mark.long
def test_equivalents_agree_over_all_configurations_and_regimes(gate: gates.Gate) -> None:
    for m in (m for m in catalogue() if m.equivalent):
        found = gate(replace(m, scope={"configs": (), "regimes": ()}))
        assert found.status == "equivalent", (m.id, found.words)


@pytest.mark.long
def test_the_fast_gate_kills_nearly_all(one_thread) -> None:
    report = gates.run(catalogue())
    assert not report.of("error"), [o.words for o in report.of("error")]
    assert report.rate >= 0.95, [o.id for o in report.of("survived")]
    killed = report.of("killed")
    assert sum(o.attributed for o in killed) >= 0.9 * len(killed)
    assert not mutants_left()


# --- table, file, command --------------------------------------------------------------------------------------------


def outcome(name: str = "norm-a", status: str = "killed", **more: Any) -> gates.Outcome:
    given: dict[str, Any] = {"z": 8.6e9, "located": "blocks.0.attn", "attributed": True, "seconds": 0.25}
    given |= {"seen": {"0.001": False, "1e-05": True}, "words": "because", "prefill": True}
    return gates.Outcome(name, "norm", "N01", "jax", "another | eps", "logits", status, **(given | more))


def report() -> gates.Report:
    return gates.Report(
        "fast",
        [
            outcome(),
            outcome("norm-b", "survived", z=None, located="", attributed=False),
            outcome("norm-c", "equivalent", z=None, located="", attributed=False, words="it cancels"),
            outcome("norm-d", z=float("inf"), attributed=False),
        ],
        3.0,
    )


def test_the_exit_code_says_what_happened() -> None:
    assert report().exit_code == 1
    assert gates.Report("fast", [outcome()], 1.0).exit_code == 0
    assert gates.Report("fast", [outcome(status="error")], 1.0).exit_code == 3
    assert gates.Report("fast", [], 1.0).exit_code == 3
    assert report().rate == pytest.approx(2 / 3)


def test_survivors_come_first_and_equivalents_apart() -> None:
    stream = io.StringIO()
    table.render(report(), Console(file=stream, width=120, highlight=False))
    text = stream.getvalue()
    assert text.index("norm-b") < text.index("norm-a") < text.index("norm-d")
    assert "equivalent: norm-c (logits agrees): it cancels" in text
    assert "2 of 3 bugs caught (66.7%)" in text
    assert "1 of 2 located where they are" in text
    assert "at 1e-05 would have seen 3 of 3" in " ".join(text.split())
    assert "not where meant" in " ".join(text.split())


def test_the_file_is_strict_json_and_makes_the_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = table.plain(report())
    text = json.dumps(record, allow_nan=False)
    assert json.loads(text)["outcomes"][3]["z"] == "inf"
    (tmp_path / "teeth.json").write_text(text, encoding="utf-8")
    assert table.main([str(tmp_path / "teeth.json"), str(tmp_path / "teeth.md")]) == 0
    document = (tmp_path / "teeth.md").read_text(encoding="utf-8")
    assert document == table.markdown(json.loads(text))
    assert "| norm | 3 | 2 | 1 | 1 |" in document
    assert "another \\| eps [1](https://github.com/" in document
    assert "* norm-c: another | eps. it cancels." in document
    assert ROWS["N11"].reason in document
    assert table.main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_a_document_that_tells_something_else_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, files = table.plain(report()), [str(tmp_path / "teeth.json"), str(tmp_path / "teeth.md")]
    Path(files[0]).write_text(json.dumps(record), encoding="utf-8")
    table.main(files)
    document = Path(files[1]).read_text(encoding="utf-8")
    wanted = {"norm-a": "logits", "norm-b": "survived", "norm-c": "equivalent", "norm-d": "logits"}
    assert table.told(document) == wanted
    assert table.main(["--check", *files]) == 0
    Path(files[1]).write_text(document.replace("8.6e+09", "8.7e+09").replace("| 0.2 |", "| 0.3 |"), encoding="utf-8")
    assert table.main(["--check", *files]) == 0, "digits differ between runs"
    record["outcomes"][0]["status"] = "survived"
    Path(files[0]).write_text(json.dumps(record), encoding="utf-8")
    assert table.main(["--check", *files]) == 1
    assert "norm-a: logits; now survived" in capsys.readouterr().err


def test_the_document_is_of_this_catalogue() -> None:
    document = (Path(__file__).parents[2] / "docs" / "teeth.md").read_text(encoding="utf-8")
    found = table.told(document)
    every = {m.id: m for m in catalogue()}
    assert found.keys() == every.keys()
    for name, m in every.items():
        assert found[name] in (("equivalent",) if m.equivalent else (m.check, "survived")), name
        assert m.what.replace("|", "\\|") in document, name
    missed = [name for name, by in found.items() if by == "survived"]
    assert len(missed) <= 0.05 * sum(not m.equivalent for m in every.values()), missed
    for row in ROWS.values():
        assert not row.reason or row.reason in document


def test_the_command_runs_an_area_and_writes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def run(wanted: Any, gate: str, progress: Any) -> gates.Report:
        seen.append(([m.area for m in wanted], gate))
        return report()

    monkeypatch.setattr(gates, "run", run)
    target = tmp_path / "teeth.json"
    result = CliRunner().invoke(app, ["mutants", "--only", "norm,rope", "--json", str(target)], env={"COLUMNS": "120"})
    assert result.exit_code == 1, result.output
    areas, gate = seen[0]
    assert set(areas) == {"norm", "rope"}
    assert gate == "fast"
    assert json.loads(target.read_text(encoding="utf-8"))["live"] == 3


@pytest.mark.parametrize("wrong", [["--only", "norms"], ["--gate", "slow"], ["--only", ","]])
def test_the_command_refuses_what_it_does_not_know(wrong: list[str]) -> None:
    result = CliRunner().invoke(app, ["mutants", *wrong])
    assert result.exit_code == 2
