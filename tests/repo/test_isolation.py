"""Neither twin needs the other, its framework, or the judge: by the sources, and by importing with the rest blocked."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FORBIDDEN = {
    "omni_torch": {"jax", "jaxlib", "flax", "optax", "omni_jax", "parity", "tests", "examples"},
    "omni_jax": {"torch", "omni_torch", "parity", "tests", "examples"},
}
# What the modules may import while they are being imported; anything else belongs inside the function that needs it.
AT_IMPORT = {
    "omni_torch": {"torch", "numpy", "jaxtyping", "omni_torch"},
    "omni_jax": {"jax", "flax", "numpy", "jaxtyping", "ml_dtypes", "omni_jax"},  # ml_dtypes comes with jax
}

# Refuses what our own modules import, and lets third parties import what they like (jaxtyping asks for jax by itself).
BLOCKER = """
import builtins, importlib, pkgutil, sys
package, blocked, allowed = sys.argv[1], set(sys.argv[2].split(",")), set(sys.argv[3].split(","))
real = builtins.__import__

def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    top = name.partition(".")[0]
    importer = ((globals or {}).get("__name__") or "").partition(".")[0]
    if level == 0 and importer == package and top not in allowed and top not in sys.stdlib_module_names:
        raise ImportError(f"{globals['__name__']} imports {name}, which is not allowed while it is imported")
    return real(name, globals, locals, fromlist, level)

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

builtins.__import__ = guarded
sys.meta_path.insert(0, Blocker())
module = importlib.import_module(package)
for found in pkgutil.walk_packages(module.__path__, package + "."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
loaded = blocked & {name.partition(".")[0] for name in sys.modules}
assert not loaded, loaded
missing = [name for name in module.__all__ if not hasattr(module, name)]
assert not missing, missing
print("ok", len(module.__all__))
"""


def imports(tree: ast.AST) -> set[str]:
    """Top-level packages of every import statement, wherever it stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "__import__",
            "importlib.import_module",
            "import_module",
        ):
            found |= {
                a.value.partition(".")[0] for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
            }
    return found


def run_blocked(package: str, blocked: set[str], allowed: set[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", BLOCKER, package, ",".join(sorted(blocked)), ",".join(sorted(allowed))]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_sources_import_nothing_forbidden(package) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) >= 8
    for path in files:
        found = imports(ast.parse(path.read_text(encoding="utf-8"))) & FORBIDDEN[package]
        assert not found, f"{path.relative_to(ROOT)} imports {sorted(found)}"


def test_the_scan_sees_hidden_imports() -> None:
    source = "def f():\n    import torch.nn as nn\n    from jax import numpy\n    importlib.import_module('flax.nnx')\n"
    assert imports(ast.parse(source)) == {"torch", "jax", "flax"}
    assert imports(ast.parse("from .torch import x")) == set()


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_with_everything_else_blocked(package) -> None:
    result = run_blocked(package, FORBIDDEN[package], AT_IMPORT[package])
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ok ")


def test_the_blocker_blocks() -> None:
    result = run_blocked("omni_jax", {"flax"}, AT_IMPORT["omni_jax"])
    assert result.returncode != 0
    assert "flax is blocked" in result.stderr
    result = run_blocked("omni_jax", {"torch"}, AT_IMPORT["omni_jax"] - {"numpy"})
    assert result.returncode != 0
    assert "imports numpy" in result.stderr
