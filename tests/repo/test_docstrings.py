"""Every public name of the twins says what it does, what shapes it takes, what it refuses and where it comes from.

Read from the sources, so that the rules can be tested on altered sources. The examples in the docstrings (>>>) of the
twins and of parity are run as well.
"""

from __future__ import annotations

import ast
import builtins
import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TWINS = ("omni_torch", "omni_jax")
FILES = sorted(path for package in TWINS for path in (ROOT / package).glob("*.py") if path.name != "__init__.py")
MODULES = sorted(
    path
    for package in (*TWINS, "parity")
    for path in (ROOT / package).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
FEWEST_EXAMPLES = 20

ARRAY = re.compile(r"\b(torch\.Tensor|Tensor|jax\.Array|Array|ArrayLike|np\.ndarray|ndarray)\b")
SHAPED = re.compile(r"\b(Float|Int|Bool|Shaped|Num|Real|Inexact|Integer|UInt32|Key)\[[^\"\[\]]*,\s*[\"'][^\"']*[\"']\]")
OTHERS = re.compile(r"\b(Callable\[\[.*\], .*\]|(dict|Mapping)\[str, [\w.]+\])")
"""Functions, and arrays by name: a state dict's shapes are each key's own."""
SHAPE_WORDS = re.compile(
    r"shape|scalar|0-d|1-?[Dd]\b|2-?[Dd]\b|dimension|\btrees?\b|\blike\b|\([A-Z]\w*(, ?[\w…*./+−-]+)*,?\)|every tensor|"
    r"all tensors|\baxis\b|\baxes\b"
)
FORMULA = re.compile(r"^ {4,}.*( = | ← )", re.MULTILINE)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def exported(tree: ast.Module) -> list[str]:
    return next(
        (
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ),
        [],
    )


def own_nodes(function: Function) -> Iterator[ast.AST]:
    """The nodes of a body, without those of functions and classes defined inside it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


def raised(function: Function, helpers: dict[str, Function], seen: frozenset[str] = frozenset()) -> set[str]:
    """Names of the exceptions that a body raises itself or by a `_check...` helper; "" where the name is not said."""
    found = set()
    for node in own_nodes(function):
        if isinstance(node, ast.Raise) and node.exc is not None:
            what = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = ast.unparse(what).rpartition(".")[2]
            found.add(name if name[:1].isupper() else "")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name.startswith(("_check", "check_")) and name not in seen:
                helper = helpers.get(name)
                found |= raised(helper, helpers, seen | {name}) if helper else {""}
    return found


def parents(name: str, source: ast.Module) -> set[str]:
    """An exception's own name and those it may be announced by: its bases, as far as this file or Python knows."""
    known = {node.name: node for node in source.body if isinstance(node, ast.ClassDef)}
    if name in known:
        return {name}.union(*(parents(ast.unparse(base), source) for base in known[name].bases))
    kind = getattr(builtins, name, None)
    bases = {k.__name__ for k in kind.__mro__} - {"Exception", "BaseException", "object"} if kind else {"ValueError"}
    return {name} | bases


def annotations(function: Function) -> list[str]:
    spec = function.args
    given = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
    return [ast.unparse(a.annotation) for a in given if a.annotation] + (
        [ast.unparse(function.returns)] if function.returns else []
    )


def faults(text: str) -> list[str]:
    """What the docstrings of one file's public names lack, one line each."""
    tree = ast.parse(text)
    names, lines = exported(tree), text.splitlines()
    helpers = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    practised = "Source:" in text
    found = []

    def look(node: Function | ast.ClassDef, where: str, owner: str = "") -> None:
        doc = ast.get_docstring(node) or ""
        first = doc.partition("\n\n")[0].strip()
        if not first:
            found.append(f"{where}: no docstring")
            return
        if not first.endswith((".", ":", ";")):
            found.append(f"{where}: its first paragraph is not a sentence: {first[-40:]!r}")
        if practised and FORMULA.search(doc) and "ource" not in doc + owner:
            found.append(f"{where}: a formula without a source")
        if isinstance(node, ast.ClassDef):
            makers = [
                m for m in node.body if isinstance(m, ast.FunctionDef) and m.name in ("__init__", "__post_init__")
            ]
            for maker in makers:
                demand(raised(maker, helpers), doc + (ast.get_docstring(maker) or ""), where)
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                    look(member, f"{where}.{member.name}", doc)
            return
        demand(raised(node, helpers), doc + owner, where)
        bare = [a for a in annotations(node) if ARRAY.search(OTHERS.sub("", SHAPED.sub("", a)))]
        if bare and not SHAPE_WORDS.search(doc + owner):
            found.append(f"{where}: no word on the shape of {', '.join(dict.fromkeys(bare))}")

    def demand(exceptions: set[str], doc: str, where: str) -> None:
        for name in sorted(exceptions):
            if not re.search(r"\b[Rr]aise[sd]?\b|\brefuse[sd]?\b", doc) or (
                name and not any(re.search(rf"\b{p}\b", doc) for p in parents(name, tree))
            ):
                found.append(f"{where}: does not say that it raises {name or 'what its checks raise'}")

    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name in names:
            look(node, node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            at = tree.body.index(node)
            after = tree.body[at + 1] if at + 1 < len(tree.body) else None
            told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            first = at
            above = lambda: lines[tree.body[first].lineno - 2].strip()  # noqa: E731, B023
            while first and isinstance(tree.body[first - 1], type(node)) and above() and above()[0] != "#":
                first -= 1  # a comment speaks for the lines that follow it without a gap
            commented = "#" in lines[node.lineno - 1] or above().startswith("#")
            if ast.unparse(target) in names and not (told or commented):
                found.append(f"{ast.unparse(target)}: a constant without a word about it")
    if not ast.get_docstring(tree):
        found.append("(file): no docstring")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_public_names_say_what_they_do(path: Path) -> None:
    found = faults(path.read_text(encoding="utf-8"))
    assert not found, "\n".join([f"{path.relative_to(ROOT)}:", *found])


def test_the_lists_are_not_empty() -> None:
    assert {path.parent.name for path in FILES} == set(TWINS)
    named = sum(len(exported(ast.parse(path.read_text(encoding="utf-8")))) for path in FILES)
    assert named >= 100
    for package in TWINS:
        text = (ROOT / package / "__init__.py").read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text))


# --- the examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MODULES, ids=lambda p: ".".join(p.relative_to(ROOT).with_suffix("").parts))
def test_examples_run(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for framework in ("torch", "jax"):
        if name.startswith(f"omni_{framework}") or name.startswith("parity"):
            pytest.importorskip(framework)
    module = importlib.import_module(name)
    failed, tried = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert tried > 0
    assert failed == 0, "the report is above"


def test_there_are_examples() -> None:
    parser = doctest.DocTestParser()
    counts = {path: len(parser.get_examples(path.read_text(encoding="utf-8"))) for path in MODULES}
    assert sum(counts.values()) >= FEWEST_EXAMPLES
    assert {"omni_torch", "omni_jax"} <= {path.parent.name for path in counts}


# --- the test of the test --------------------------------------------------------------------------------------------

GOOD = '''"""A file."""
__all__ = ["LIMIT", "Thing", "scale"]
LIMIT = 3
"""The most."""

class Thing:
    """A thing.

    Raises ValueError for a bad size.
    """

    def __init__(self, size: int):
        if size < 0:
            raise ValueError("size")

    def grow(self, x: torch.Tensor) -> torch.Tensor:
        """Larger by one, of the same shape."""
        return x + 1

def scale(x: Float[Array, "B T"], by: float) -> Float[Array, "B T"]:
    """Multiplied.

        y = by·x

    Raises ValueError for a bad factor.
    Source: a paper.
    """
    _check_factor(by)
    return by * x

def _check_factor(by):
    if by < 0:
        raise ValueError("by")
'''
ALTERATIONS = {
    "no docstring": ('    """Larger by one, of the same shape."""\n', "", "Thing.grow: no docstring"),
    "no sentence": ('"""A thing.\n', '"""A thing\n', "Thing: its first paragraph"),
    "constant": ('"""The most."""', "", "LIMIT: a constant"),
    "constructor raises": (
        "    Raises ValueError for a bad size.\n",
        "",
        "Thing: does not say that it raises ValueError",
    ),
    "helper raises": ("    Raises ValueError for a bad factor.\n", "", "scale: does not say that it raises ValueError"),
    "wrong exception": ("Raises ValueError for a bad factor", "Raises TypeError for a bad factor", "raises ValueError"),
    "source": ("    Source: a paper.\n", "    Idea: a paper.\n", "scale: a formula without a source"),
    "shape": (", of the same shape.", ".", "Thing.grow: no word on the shape of torch.Tensor"),
    "file": ('"""A file."""\n', "", "(file): no docstring"),
}


def test_a_good_file_has_no_faults() -> None:
    assert faults(GOOD) == []


@pytest.mark.parametrize("name", ALTERATIONS)
def test_a_fault_is_noticed(name: str) -> None:
    old, new, line = ALTERATIONS[name]
    assert old in GOOD
    text = GOOD.replace(old, new)
    text = text + '\n# a file that practises "Source:"\n' if name == "source" else text
    assert any(line in fault for fault in faults(text)), faults(text)
