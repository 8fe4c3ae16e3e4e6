"""parity.report: what stands on the screen and in the file, as facts; nobody's layout is frozen here."""

from __future__ import annotations

import io
import json
import math
import stat
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from parity.errors import Misuse
from parity.report import console, json_file
from parity.result import CheckResult, Control, Row, RunResult
from parity.verdict import Verdict

BITS = {"effective_jax": 23.41, "effective_torch": 23.52, "accurate_jax": 21.13, "accurate_torch": 21.24}
LONG = "blocks.11.moe.experts.3.gate_proj.weight"


def row(check: str, name: str, verdict: Verdict = Verdict.AGREE, **fields) -> Row:
    given = {
        "config": "moe-gqa-gelu",
        "regime": "randomised",
        "precision": "bfloat16",
        "evidence": f"why of {name}",
        "z_same": 0.612,
        "excess": 0.5,
        **BITS,
    }
    return Row(check=check, name=name, verdict=verdict, **(given | fields))


def result(*checks: CheckResult, **fields) -> RunResult:
    return RunResult(list(checks), {}, **({"devices": ["cpu"], "seconds": 38.24, "cpu_seconds": 60.1} | fields))


def everything() -> RunResult:
    gradients = [row("gradients", f"g{i}", Verdict.DIFFER, excess=2.0 + i) for i in range(8)]
    gradients += [row("gradients", f"u{i}", Verdict.UNDETERMINED) for i in range(9)]
    gradients += [row("gradients", "p0", Verdict.PINNED), row("gradients", "s0", Verdict.UNSTABLE)]
    third = row("adamw", "torch.optim.AdamW", Verdict.DIFFER, decides=False, z_same=8.1e5, evidence="a named cause")
    return result(
        CheckResult("logits", [row("logits", LONG)]),
        CheckResult("gradients", gradients, notes=["a note of the check"]),
        CheckResult("adamw", [row("adamw", "exp_avg"), third], [Control("zeros", False, "z 0.3")]),
        CheckResult("recipe", error="RuntimeError: boom [red] (set PARITY_DEBUG=1 for the traceback)"),
        CheckResult("initializers", [row("initializers", "xavier", z_same=None, **dict.fromkeys(BITS))]),
        notes=["a note of the run"],
    )


def screen(run: RunResult, width: int = 120, **options) -> str:
    out = io.StringIO()
    console.render(run, Console(file=out, width=width, highlight=False, **options))
    return out.getvalue()


def joined(text: str) -> str:
    """Words as they follow each other, wherever lines were broken."""
    return " ".join(text.split())


@pytest.mark.parametrize("width", [80, 120])
def test_plain_text_fits_the_screen(width: int) -> None:
    text = screen(everything(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text, "no terminal, no colours"
    assert "…" not in text, "nothing is cut off"


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_has_every_column_of_every_check(width: int) -> None:
    lines = screen(everything(), width).splitlines()
    assert {"check", "tensors", "worst", "side", "verdict"} <= set(" ".join(lines[:3]).split())
    by_check = {line.split()[0]: line for line in reversed(lines) if line and not line.startswith(" ")}
    for word in ("1", "moe-gqa-gelu", "jax", "23.4", "21.1", "0.61", "AGREE"):
        assert word in by_check["logits"].split()
    below = lines[lines.index(by_check["logits"]) + 1]
    assert {"torch", "23.5", "21.2"} <= set(below.split())
    assert any(line.startswith("recipe") and "NO ANSWER" in line for line in lines)


def test_a_long_name_is_whole_where_there_is_room() -> None:
    assert LONG in screen(everything(), 120)


@pytest.mark.parametrize("width", [80, 120])
def test_what_does_not_agree_is_said_with_evidence(width: int) -> None:
    text = joined(screen(everything(), width))
    assert "gradients: DIFFER: 8 of 19 comparisons" in text
    assert "moe-gqa-gelu randomised bfloat16 g7: why of g7" in text, "the worst first"
    assert "g0: why of g0" not in text
    assert "and 5 more (--json FILE lists all)" in text
    assert "gradients: PINNED: 1 of 19" in text
    assert "why of p0" in text
    assert "gradients: UNSTABLE: 1 of 19" in text
    assert "why of s0" in text
    assert "gradients: UNDETERMINED: 9 of 19 comparisons" in text
    assert "bfloat16 u0, " in text
    assert "and 6 more" in text
    assert "gradients: a note of the check" in text
    assert "note: a note of the run" in text


def test_errors_and_accepted_controls_are_errors_of_the_check() -> None:
    text = joined(screen(everything()))
    assert "recipe: could not look: RuntimeError: boom [red] (set PARITY_DEBUG=1 for the traceback)" in text
    assert "adamw: the check itself is wrong: it accepted what it must reject, 'zeros': z 0.3" in text
    assert "does not agree: gradients; could not look: adamw, recipe (exit code 1)" in text


def test_third_parties_have_a_table_of_their_own() -> None:
    text = screen(everything())
    below = text[text.index("third parties") :]
    assert "torch.optim.AdamW" in below
    assert "8.10e+05" in below
    assert "a named cause" in below
    assert "torch.optim.AdamW" not in text[: text.index("third parties")]


def test_totals() -> None:
    line = console.summary(everything())
    assert line == (
        "1 configuration, 22 tensors, 22 comparisons, 9 undetermined, 38.2 s (60.1 s of CPU time), devices: CPU only"
    )
    there = result(CheckResult("logits", [row("logits", "a")]), devices=["jax on cuda:0 (H)", "torch on cuda:0 (H)"])
    assert "CPU only" not in console.summary(there)
    assert "jax on cuda:0 (H); torch on cuda:0 (H)" in console.summary(there)


def test_a_green_run_says_so_in_words() -> None:
    text = screen(result(CheckResult("logits", [row("logits", "a")])))
    assert "AGREE: the same function wherever it was looked at (exit code 0)" in joined(text)
    assert "could not look" not in text


def test_nothing_compared_is_said() -> None:
    text = joined(screen(result(CheckResult("logits"))))
    assert "logits: could not look: nothing was compared" in text
    assert "(exit code 3)" in text
    assert "could not look: no check ran (exit code 3)" in joined(screen(result()))


def test_colours_repeat_the_words_only() -> None:
    run = everything()
    coloured = screen(run, force_terminal=True, color_system="standard")
    assert "\x1b[" in coloured
    assert joined(Text.from_ansi(coloured).plain) == joined(screen(run))


def test_figures_that_are_not_finite_are_printed() -> None:
    bad = row("logits", "a", Verdict.DIFFER, z_same=math.inf, accurate_jax=-math.inf, accurate_torch=math.nan)
    text = screen(result(CheckResult("logits", [bad])))
    assert {"inf", "-inf", "nan"} <= set(text.split())


def test_devices_other_than_the_cpu_are_named_with_the_tensor() -> None:
    there = row("logits", "a", Verdict.DIFFER, device="cuda")
    assert "bfloat16 cuda a: why" in joined(screen(result(CheckResult("logits", [there]))))


# --- json ------------------------------------------------------------------------------------------------------------


def test_json_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    json_file.check_writable(path)
    assert list(tmp_path.iterdir()) == [], "asking leaves nothing behind"
    json_file.write(everything(), path)
    assert json.loads(path.read_text())["exit_code"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"]
    path.chmod(0o604)
    json_file.write(result(), path)
    assert json.loads(path.read_text())["exit_code"] == 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o604, "a file keeps its mode"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        json_file.write(everything(), path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"]


def test_an_unwritable_place_is_misuse(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Misuse, match="this is a folder"):
        json_file.check_writable(tmp_path)
    for place in (tmp_path / "no" / "x.json", tmp_path / "file" / "x.json"):
        with pytest.raises(Misuse, match="does not exist"):
            json_file.check_writable(place)


def test_a_read_only_folder_is_misuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(Misuse, match=r"cannot write into .*Permission denied"):
        json_file.check_writable(tmp_path / "x.json")
