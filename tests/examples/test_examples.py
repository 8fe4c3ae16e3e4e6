"""Every example runs in a process of its own, without the other framework; and the two folders mirror each other."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from contextlib import ExitStack
from functools import cache
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

# Imports a package while some others cannot be imported. Then, for every line "file<tab>folder<tab>prints" that it
# reads, a fork runs the file as a script in the folder, and looks afterwards that no blocked package was imported:
# each in a process of its own, and the framework's import, which takes longer than most examples, is paid once.
RUNNER = """
import os, runpy, signal, sys
twin, blocked = sys.argv[1], set(sys.argv[2].split(","))

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
__import__(twin)

def run(file, folder, prints):
    signal.alarm(300)  # one that hangs dies
    os.chdir(folder)
    for stream, name in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(prints + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv, sys.path[0] = [file], os.path.dirname(file)
    runpy.run_path(file, run_name="__main__")
    loaded = blocked & {name.partition(".")[0] for name in sys.modules}
    if loaded:
        raise SystemExit(f"{file} imported {sorted(loaded)}")

for line in sys.stdin:
    child = os.fork()
    if not child:
        run(*line.rstrip("\\n").split("\\t"))
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(file, "torch" or "jax", folder) -> how it ended, and what it printed."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONIOENCODING": "utf-8",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),  # programs only; results are computed every time
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    prints = str(tmp_path_factory.mktemp("prints") / "example")

    @cache
    def runner(kind: str) -> subprocess.Popen:
        command = [sys.executable, "-c", RUNNER, f"omni_{kind}", ",".join(FOREIGN[kind])]
        return stack.enter_context(
            subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )

    def run(file: Path, kind: str, folder: Path) -> subprocess.CompletedProcess:
        stdin, stdout = runner(kind).stdin, runner(kind).stdout
        assert stdin
        assert stdout
        print(file, folder, prints, sep="\t", file=stdin, flush=True)
        code = int(stdout.readline())
        out, err = (Path(prints + name).read_text(encoding="utf-8") for name in (".out", ".err"))
        return subprocess.CompletedProcess([str(file)], code, out, err)

    with ExitStack() as stack:
        yield run


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
def test_it_runs_and_prints(run, name, tmp_path) -> None:
    done = run(EXAMPLES / name, name.partition("/")[0], tmp_path)
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
def test_the_runner_notices(run, source, message, tmp_path) -> None:
    file = tmp_path / "example.py"
    file.write_text(source)
    done = run(file, "jax", tmp_path)
    assert done.returncode != 0
    assert message in done.stderr
