"""The command's surface is a promise: options may be added on purpose (here), never lost by accident."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from parity import checks
from parity.cli import app

ROOT = Path(__file__).parent.parent.parent

SURFACE = {
    "run": {
        "--only",
        "--config",
        "--checkpoint",
        "--text",
        "--audio",
        "--image",
        "--precision",
        "--device",
        "--matmul",
        "--seed",
        "--full",
        "--json",
        "--figures",
        "--explain",
        "--search",
        "--budget",
    },
    "list": set(),
    "explain": {"check"},
    "doctor": {"--json"},
    "calibrate": {"--draws", "--seed", "--resume", "--json"},
    "locate": {
        "--config",
        "--checkpoint",
        "--text",
        "--precision",
        "--single-step",
        "--mutant",
        "--score",
        "--only",
        "--held-out",
        "--explain",
        "--seed",
        "--json",
    },
    "optimizers": {"--steps", "--lr", "--seed", "--json"},
    "mutants": {"--gate", "--only", "--by-rule", "--examined", "--id", "--module", "--sample", "--seed", "--json"},
}

BLOCKER = """
import sys
BLOCKED = {blocked!r}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked by the test)", name=name)
sys.meta_path.insert(0, Blocker())
sys.argv = ["parity", *{arguments!r}]
from parity.cli import main
main()
"""
FRAMEWORKS = ("jax", "jaxlib", "flax", "optax", "torch")


def parity(*arguments: str, blocked: tuple[str, ...] = FRAMEWORKS) -> subprocess.CompletedProcess[str]:
    script = BLOCKER.format(blocked=blocked, arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_commands_and_options_are_those_written_here() -> None:
    found = {
        name: {option for parameter in command.params for option in parameter.opts} - {"--help"}
        for name, command in typer.main.get_command(app).commands.items()
    }
    assert found == SURFACE


def test_defaults_of_run() -> None:
    run = next(c.callback for c in app.registered_commands if c.callback and c.callback.__name__ == "run")
    defaults = {name: p.default for name, p in inspect.signature(run).parameters.items() if p.default is not None}
    wanted = {
        "precision": "float64,float32,bfloat16",
        "device": "cpu",
        "matmul": "default",
        "seed": 0,
        "full": False,
        "explain": 60.0,
        "search": False,
    }
    assert defaults == wanted


@pytest.mark.parametrize("name", checks.CHECKS)
def test_every_check_says_what_it_is(name: str) -> None:
    module = checks.load(name)
    assert len(module.CLAIM) > 20
    assert len(module.BLIND) > 20
    assert module.CONTROLS
    assert all(key and text for key, text in module.CONTROLS.items())
    assert callable(module.run)


def test_list_works_with_neither_framework() -> None:
    ended = parity("list")
    assert ended.returncode == 0, ended.stderr
    for name in checks.CHECKS:
        assert name in ended.stdout


@pytest.mark.parametrize("name", checks.CHECKS)
def test_explain_works_with_neither_framework(name: str) -> None:
    ended = parity("explain", name)
    assert ended.returncode == 0, ended.stderr
    for heading in ("claims", "cannot see", "must reject"):
        assert f"{name} {heading}" in ended.stdout


def test_a_run_without_frameworks_says_what_is_missing() -> None:
    ended = parity("run")
    assert ended.returncode == 3
    assert "jax and torch not installed: pip install 'omni-parity[parity]'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_doctor_works_with_neither_framework() -> None:
    ended = parity("doctor")
    assert ended.returncode == 3
    assert "error: torch is not installed" in ended.stdout
    assert "Traceback" not in ended.stderr


def test_python_m_parity_is_the_command() -> None:
    ended = subprocess.run([sys.executable, "-m", "parity", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0
    for name in SURFACE:
        assert f"  {name} " in ended.stdout
