"""Every example runs in a process of its own, without the other framework; and the two folders mirror each other."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples"
FOREIGN = {
    "torch": ["jax", "jaxlib", "flax", "optax", "omni_jax", "parity", "tests"],
    "jax": ["torch", "omni_torch", "parity", "tests"],
}
FILES = [f"{kind}/{path.name}" for kind in FOREIGN for path in sorted((EXAMPLES / kind).glob("*.py"))]
NAMES = sorted({Path(name).stem for name in FILES})

# Runs a file as a script while some packages cannot be imported, and looks afterwards that none of them was.
RUNNER = """
import runpy, sys
blocked = set(sys.argv[2].split(","))

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
file = sys.argv[1]
sys.argv = [file]
runpy.run_path(file, run_name="__main__")
loaded = blocked & {name.partition(".")[0] for name in sys.modules}
if loaded:
    raise SystemExit(f"{file} imported {sorted(loaded)}")
"""


def run(file: Path, blocked: list[str], folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONIOENCODING": "utf-8",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),  # programs only; results are computed every time
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-c", RUNNER, str(file), ",".join(blocked)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def tree_of(name: str) -> ast.Module:
    return ast.parse((EXAMPLES / name).read_text(encoding="utf-8"))


def definitions(tree: ast.Module) -> list[str]:
    """Names of functions and classes, and of the classes' methods (`forward` is torch's `__call__`), in order.

    What one framework alone needs (a jitted piece, say) has an underscore in front.
    """
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found.append(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
            found += [f"{node.name}.{'__call__' if name == 'forward' else name}" for name in methods]
    return found


@pytest.mark.parametrize("name", FILES)
def test_it_runs_and_prints(name, tmp_path) -> None:
    done = run(EXAMPLES / name, FOREIGN[name.partition("/")[0]], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
    assert not done.stderr.strip(), done.stderr
    assert "Traceback" not in done.stdout
    assert not any(tmp_path.iterdir()), "an example leaves nothing behind"


def test_both_folders_hold_the_same_files() -> None:
    torch, jax = ([name.partition("/")[2] for name in FILES if name.startswith(kind)] for kind in FOREIGN)
    assert torch
    assert torch == jax


@pytest.mark.parametrize("stem", NAMES)
def test_a_pair_defines_the_same_names_in_the_same_order(stem) -> None:
    assert definitions(tree_of(f"torch/{stem}.py")) == definitions(tree_of(f"jax/{stem}.py"))


@pytest.mark.parametrize("name", FILES)
def test_it_explains_itself_and_checks_what_it_claims(name) -> None:
    tree = tree_of(name)
    assert ast.get_docstring(tree)
    assert "main" in definitions(tree)
    assert ast.unparse(tree.body[-1]) == "if __name__ == '__main__':\n    main()"
    assert any(isinstance(node, ast.Raise) for node in ast.walk(tree)), "an example raises when a claim is not so"
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree)), "python -O would drop an assert"


@pytest.mark.parametrize("name", FILES)
def test_it_uses_the_public_names_of_its_own_twin(name) -> None:
    kind = name.partition("/")[0]
    used = [
        (node.module or "", [alias.name for alias in node.names])
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("omni_")
    ]
    assert {module for module, _ in used} == {f"omni_{kind}"}
    assert not any(name.startswith("_") or name == "*" for _, names in used for name in names)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import torch", "torch is blocked"),
        ("print('x')\nraise RuntimeError('not so')", "not so"),
        ("import sys\nsys.modules['torch'] = sys", "imported ['torch']"),
    ],
)
def test_the_runner_notices(source, message, tmp_path) -> None:
    file = tmp_path / "example.py"
    file.write_text(source)
    done = run(file, FOREIGN["jax"], tmp_path)
    assert done.returncode != 0
    assert message in done.stderr
