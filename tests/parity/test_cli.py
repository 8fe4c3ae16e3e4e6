"""The `parity` command and its runner: exit codes, messages, what bad input and crashed checks lead to.

Real checks cost minutes; here stubs stand in for them, and what is tested is everything around.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from parity import checks, runner
from parity.checks import Scope
from parity.cli import app
from parity.errors import CannotLook, Misuse
from parity.result import CheckResult, Control, Row
from parity.verdict import Verdict

ROOT = Path(__file__).parent.parent.parent


def row(check: str, verdict: Verdict = Verdict.AGREE, **fields: Any) -> Row:
    given = {"config": "mha-swiglu", "regime": "fresh", "precision": "float32", "evidence": "because"}
    return Row(check=check, name="logits", verdict=verdict, **(given | fields))


Stubs = dict[str, Callable[[Scope, Any], Any]]


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> Stubs:
    """Checks by name -> their run; every check agrees until a test says otherwise."""
    runs: Stubs = {name: lambda scope, progress, name=name: CheckResult(name, [row(name)]) for name in checks.CHECKS}
    real = checks.load

    def load(name: str) -> Any:
        if name not in runs:
            return real(name)
        controls = {"zeros": "all outputs are zero"}
        return SimpleNamespace(CLAIM=f"{name} are\n    the same", BLIND="much [sic]", CONTROLS=controls, run=runs[name])

    monkeypatch.setattr(checks, "load", load)
    return runs


@pytest.fixture
def parity(stubs: Stubs) -> Callable[..., Result]:
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120"})


def raising(error: BaseException) -> Callable[[Scope, Any], Any]:
    def run(scope: Scope, progress: Any) -> Any:
        raise error

    return run


def words(text: str) -> str:
    return " ".join(text.split())


# --- exit codes ------------------------------------------------------------------------------------------------------


def test_all_agree_is_0(parity) -> None:
    ended = parity("run")
    assert ended.exit_code == 0, ended.output
    assert "devices: CPU only" in words(ended.stdout)
    assert ended.stderr == ""


@pytest.mark.parametrize("verdict", [Verdict.DIFFER, Verdict.UNSTABLE, Verdict.PINNED])
def test_any_disagreement_is_1(parity, stubs, verdict: Verdict) -> None:
    stubs["adamw"] = lambda scope, progress: CheckResult("adamw", [row("adamw"), row("adamw", verdict)])
    stubs["recipe"] = raising(RuntimeError("boom"))
    ended = parity("run")
    assert ended.exit_code == 1
    assert f"adamw: {verdict}: 1 of 2 comparisons" in words(ended.stdout)


@pytest.mark.parametrize(
    "answer",
    [
        CheckResult("recipe"),
        CheckResult("recipe", [row("recipe", Verdict.UNDETERMINED)]),
        CheckResult("recipe", [row("recipe", decides=False)]),
        CheckResult("recipe", [row("recipe")], [Control("zeros", False, "z 0.2")]),
        CheckResult("recipe", [row("recipe")], error="the torch side crashed"),
        None,
        "fine",
    ],
)
def test_no_answer_is_3(parity, stubs, answer: object) -> None:
    stubs["recipe"] = lambda scope, progress: answer
    ended = parity("run")
    assert ended.exit_code == 3
    assert "could not look: recipe (exit code 3)" in words(ended.stdout)


@pytest.mark.parametrize(
    "error", [ValueError("a\nlong story"), AssertionError(), MemoryError("no room"), OSError(5, "bad disk")]
)
def test_a_crashed_check_is_3_without_a_traceback_and_the_others_run(parity, stubs, error: Exception) -> None:
    stubs["gradients"] = raising(error)
    ended = parity("run")
    assert ended.exit_code == 3
    assert "Traceback" not in ended.output
    said = words(ended.stdout)
    assert f"gradients: could not look: {type(error).__name__}: {words(str(error))}" in said
    assert "set PARITY_DEBUG=1 for the traceback" in said
    assert said.count("AGREE") == len(checks.CHECKS) - 1


def test_debugging_raises(parity, stubs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARITY_DEBUG", "1")
    stubs["gradients"] = raising(KeyError("lost"))
    assert isinstance(parity("run").exception, KeyError)


def test_a_check_that_cannot_look_says_why_in_its_own_words(parity, stubs) -> None:
    stubs["gradients"] = raising(CannotLook("primitive 'foo' has no rule"))
    ended = parity("run")
    assert ended.exit_code == 3
    assert "gradients: could not look: primitive 'foo' has no rule" in words(ended.stdout)
    assert "PARITY_DEBUG" not in ended.stdout


def test_misuse_inside_a_check_is_2(parity, stubs) -> None:
    stubs["gradients"] = raising(Misuse("config: 'x' is no configuration"))
    ended = parity("run")
    assert (ended.exit_code, ended.stderr.strip()) == (2, "parity: config: 'x' is no configuration")


def test_a_crash_outside_of_checks_is_3_without_a_traceback(parity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "manifest", raising_plain(ZeroDivisionError("odd")))
    ended = parity("run")
    assert ended.exit_code == 3
    assert "could not look: ZeroDivisionError: odd (set PARITY_DEBUG=1" in ended.stderr
    assert "Traceback" not in ended.output


def raising_plain(error: Exception) -> Callable[..., Any]:
    def call(*_: Any) -> Any:
        raise error

    return call


def test_missing_frameworks_are_3(parity, monkeypatch: pytest.MonkeyPatch) -> None:
    from parity import precision

    monkeypatch.setattr(precision, "_installed", lambda name: name != "torch")
    ended = parity("run")
    assert ended.exit_code == 3
    assert "torch not installed: pip install 'omni-parity[parity]'" in ended.stderr


@pytest.mark.parametrize("device", ["cuda", "tpu"])
def test_a_missing_device_is_3(parity, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from parity import precision

    monkeypatch.setattr(precision, "_jax_devices", lambda kind: [])
    ended = parity("run", "--device", device)
    assert ended.exit_code == 3
    assert f"parity: could not look: device {device}: JAX sees no" in ended.stderr


# --- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "lgits"], "check: 'lgits' is not known; did you mean 'logits'?"),
        (["--precision", "float33"], "precision: 'float33' is not known; did you mean 'float32'?"),
        (["--precision", ","], "precision: none named"),
        (["--device", "cdua"], "device: 'cdua' is not known; did you mean 'cuda'?"),
        (["--matmul", "high"], "matmul: 'high' is not known; did you mean 'highest'?"),
        (["--config", "mha-swigul"], "did you mean 'mha-swiglu'?"),
        (["--config", "nowhere/x.json"], "--config nowhere/x.json: no such file"),
        (["--checkpoint", "nowhere.pt"], "--checkpoint nowhere.pt: no such file"),
        (["--text", "nowhere.txt"], "--text nowhere.txt: no such file"),
        (["--text", "."], "--text .: this is a folder"),
        (["--json", "nowhere/out.json"], "--json nowhere/out.json: the folder nowhere does not exist"),
        (["--json", "."], "--json .: this is a folder"),
    ],
)
def test_wrong_questions_are_2_with_what_to_do(parity, stubs, arguments: list[str], message: str) -> None:
    for name in stubs:
        stubs[name] = raising(AssertionError("ran all the same"))
    ended = parity("run", *arguments)
    assert ended.exit_code == 2, ended.output
    assert message in ended.stderr
    assert ended.stderr.startswith("parity: ")
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good\nna\xefve", "not UTF-8 at byte 7 (line 2, value 0xef); convert it first"),
        (b"\xff\xfea\x00", "not UTF-8 at byte 0"),
        (b" \n\n", "holds no text"),
        (b"", "holds no text"),
    ],
)
def test_a_text_that_is_no_text_is_2(parity, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    ended = parity("run", "--text", path)
    assert ended.exit_code == 2
    assert message in ended.stderr


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234567\n"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", LFS, b"<html>not found</html>", b"\x80\x02."])
def test_a_file_that_is_no_checkpoint_is_2(parity, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    ended = parity("run", "--checkpoint", path)
    assert ended.exit_code == 2, ended.output
    assert str(path) in ended.stderr
    assert "Traceback" not in ended.output


def test_a_checkpoint_with_nan_is_2(parity, tmp_path: Path) -> None:
    import torch

    path = tmp_path / "model.pt"
    torch.save({"norm.weight": torch.tensor([1.0, float("nan"), 2.0])}, path)
    ended = parity("run", "--checkpoint", path)
    assert ended.exit_code == 2, ended.output
    assert "tensor 'norm.weight' holds 1 of 3 values that are not finite" in ended.stderr


def test_a_checkpoint_error_inside_a_check_is_2(parity, stubs, tmp_path: Path) -> None:
    import torch

    from omni_torch.checkpoint import CheckpointError

    path = tmp_path / "model.pt"
    torch.save({"norm.weight": torch.ones(3)}, path)
    stubs["logits"] = raising(CheckpointError("missing: tok_emb.weight"))
    ended = parity("run", "--checkpoint", path)
    assert ended.exit_code == 2
    assert f"--checkpoint {path}: missing: tok_emb.weight" in ended.stderr
    assert parity("run").exit_code == 3, "without a file of the user it is a crashed check"


def test_a_bad_configuration_file_is_2(parity, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text('{"vocab_size": 61, "n_layers": 1, "d_model": 30, "n_heads": 4, "d_ff": 16}')
    ended = parity("run", "--config", path)
    assert ended.exit_code == 2, ended.output
    assert "d_model" in ended.stderr


@pytest.mark.parametrize("arguments", [["run", "--sed", "1"], ["run", "--seed", "x"], ["rum"], ["explain"]])
def test_usage_errors_are_2(parity, arguments: list[str]) -> None:
    assert parity(*arguments).exit_code == 2


# --- scope and progress ----------------------------------------------------------------------------------------------


def test_options_reach_the_checks(parity, stubs, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Grüße\n", encoding="utf-8")
    seen: list[Scope] = []

    def run(scope: Scope, progress: Any) -> CheckResult:
        import jax

        seen.append(scope)
        assert jax.config.jax_default_matmul_precision == "highest"  # pyright: ignore[reportAttributeAccessIssue]
        return CheckResult("logits", [row("logits")])

    stubs["logits"] = run
    ended = parity(
        *("run", "--only", "logits", "--config", "mha-swiglu", "--config", "moe", "--text", text, "--seed", 7),
        *("--precision", "float32, float16,float32", "--matmul", "highest", "--device", "cpu", "--full"),
    )
    assert ended.exit_code == 0, ended.output
    wanted = Scope(configs=("mha-swiglu", "moe"), precisions=("float32", "float16"), text=str(text), seed=7, full=True)
    assert seen == [wanted]
    said = words(ended.stdout)
    rest = ", ".join(name for name in checks.CHECKS if name != "logits")
    assert f"not looked at: checks {rest}; precisions float64, bfloat16" in said


def test_checks_run_in_their_order_and_once(parity, stubs) -> None:
    ran: list[str] = []
    for name in stubs:
        stubs[name] = lambda scope, progress, name=name: (ran.append(name), CheckResult(name, [row(name)]))[1]
    assert parity("run", "--only", "recipe", "--only", "logits,recipe").exit_code == 0
    assert ran == ["logits", "recipe"]


def test_json_holds_the_run(parity, stubs, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    stubs["recipe"] = raising(RuntimeError("boom"))
    assert parity("run", "--json", path).exit_code == 3
    loaded = json.loads(path.read_text())
    assert loaded["exit_code"] == 3
    assert [check["name"] for check in loaded["checks"]] == list(checks.CHECKS)
    assert {"versions", "cpu", "jax", "torch", "scope"} <= set(loaded["manifest"])
    assert loaded["manifest"]["scope"]["matmul"] == "default"
    assert loaded["seconds"] > 0


def test_figures_are_drawn_where_there_are_curves(parity, stubs, tmp_path: Path) -> None:
    from parity.report.trajectory import CURVES

    series = {name: [1.0, 2.0, 4.0] for name in CURVES}
    stubs["trajectory"] = lambda scope, progress: CheckResult("trajectory", [row("trajectory")], series=series)
    assert parity("run", "--only", "trajectory", "--figures", tmp_path / "new" / "pictures").exit_code == 0
    picture = (tmp_path / "new" / "pictures" / "trajectory.svg").read_text(encoding="utf-8")
    assert "omni_torch" in picture


def test_figures_need_a_folder_that_can_be_made(parity, stubs, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = parity("run", "--figures", tmp_path / "file")
    assert ended.exit_code == 2
    assert "--figures" in ended.output


def test_progress_is_told(stubs) -> None:
    def run(scope: Scope, progress: Any) -> CheckResult:
        progress(1, 2, "mha-swiglu")
        return CheckResult("logits", [row("logits")])

    stubs["logits"] = run
    told: list[tuple] = []
    runner.run(Scope(), ["logits"], lambda *step: told.append(step))
    assert told == [("logits", 0, 0, ""), ("logits", 1, 2, "mha-swiglu")]


def test_a_run_measures_each_check(stubs) -> None:
    stubs["logits"] = lambda scope, progress: (time.sleep(0.05), CheckResult("logits", [row("logits")]))[1]
    result = runner.run(Scope(), ["logits"])
    assert 0.05 <= result.checks[0].seconds <= result.seconds


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_says_what_was_finished(parity, stubs, tmp_path: Path) -> None:
    stubs["adamw"] = raising(KeyboardInterrupt())
    ended = parity("run", "--json", tmp_path / "out.json")
    assert ended.exit_code == 3
    said = words(ended.stdout)
    assert "interrupted by Ctrl-C; finished before that: logits, gradients" in said
    assert "adamw: could not look: interrupted by Ctrl-C before it ended" in said
    assert "recipe: could not look: interrupted by Ctrl-C before it began" in said
    assert json.loads((tmp_path / "out.json").read_text())["exit_code"] == 3


def test_ctrl_c_before_the_first_check(parity, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "prepare", interrupted)
    ended = parity("run")
    assert (ended.exit_code, ended.stderr) == (3, "parity: interrupted by Ctrl-C before any check had begun\n")


STUBBED = """
import sys, time, types
from parity import checks
from parity.result import CheckResult, Row
from parity.verdict import Verdict
def run(scope, progress):
    {body}
    return CheckResult("logits", [Row("logits", "mha", "fresh", "float32", "x", Verdict.{verdict}, "e")])
checks.load = lambda name: types.SimpleNamespace(CLAIM="c", BLIND="b", CONTROLS={{}}, run=run)
sys.argv = ["parity", "run", "--only", "logits"]
from parity.cli import main
main()
"""


def process(body: str = "pass", verdict: str = "AGREE") -> subprocess.Popen[str]:
    script = STUBBED.format(body=body, verdict=verdict)
    environment = os.environ | {"PARITY_CACHE": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment, text=True, **pipes)


def test_exit_code_of_a_process() -> None:
    ended = process(verdict="DIFFER")
    out, err = ended.communicate(timeout=120)
    assert ended.returncode == 1, out + err
    assert "exit code 1" in out
    assert err == "", "no terminal, no bar, no chatter"


def test_ctrl_c_in_a_process() -> None:
    running = process("print('READY', flush=True); time.sleep(100)")
    assert running.stdout is not None
    assert running.stdout.readline() == "READY\n"
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 3
    assert "finished before that: no check" in out
    assert "Traceback" not in out + err


def test_a_closed_pipe_does_not_change_the_exit_code() -> None:
    running = process("print('READY', flush=True); time.sleep(1)")
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.readline()
    running.stdout.close()
    assert running.wait(timeout=60) == 0
    assert running.stderr.read() == ""
    running.stderr.close()


# --- list, explain, doctor -------------------------------------------------------------------------------------------


def test_list_names_every_check_with_its_claim(parity) -> None:
    ended = parity("list")
    assert ended.exit_code == 0
    for name in checks.CHECKS:
        assert f"{name} {name} are the same" in words(ended.stdout)


def test_explain_says_claim_blindness_and_controls(parity) -> None:
    ended = parity("explain", "logits")
    assert ended.exit_code == 0
    said = words(ended.stdout)
    assert "logits claims logits are the same" in said
    assert "logits cannot see much [sic]" in said
    assert "zeros: all outputs are zero" in said


def test_explain_of_an_unknown_check_is_2(parity) -> None:
    ended = parity("explain", "logit")
    assert ended.exit_code == 2
    assert "did you mean 'logits'?" in ended.stderr


def test_doctor(parity, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = parity("doctor")
    assert ended.exit_code == 0, ended.output
    assert {"versions", "cpu", "jax", "torch"} <= set(ended.stdout.split())
    loaded = json.loads(parity("doctor", "--json").stdout)
    assert set(loaded) == {"manifest", "findings"}
    from parity import precision

    monkeypatch.setattr(precision, "_installed", lambda name: name != "optax")
    broken = parity("doctor")
    assert broken.exit_code == 3
    assert "error: optax is not installed" in words(broken.stdout)


# --- surroundings ----------------------------------------------------------------------------------------------------


def test_a_process_gets_the_cache_and_keeps_one_that_it_has(tmp_path: Path) -> None:
    script = (
        "import sys, jax\n"
        "if len(sys.argv) > 1: jax.config.update('jax_compilation_cache_dir', sys.argv[1])\n"
        "from parity import runner; runner.prepare()\n"
        "print(jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_entry_size_bytes)"
    )
    environment = os.environ | {"PARITY_CACHE": str(tmp_path)}
    for own, wanted in (([], [str(tmp_path), "-1"]), (["/elsewhere"], ["/elsewhere", "0"])):
        out = subprocess.check_output([sys.executable, "-c", script, *own], cwd=ROOT, env=environment, text=True)
        folder, size = out.split()
        assert folder.startswith(wanted[0])
        assert size == wanted[1]
