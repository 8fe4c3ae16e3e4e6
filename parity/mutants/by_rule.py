"""Mutants made by rule from the source of the twins' functions, beside those of the catalogue, which are real bugs.

An id names the side, module, function, rule and change, "#2" the second time that the same change occurs in a
function: it survives edits elsewhere. A module that both twins have letter for letter is changed in both: what they
copied from each other, comparing them cannot tell.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from parity.errors import Misuse
from parity.mutants.by_rule_sites import Site, sites
from parity.mutants.mutant import Edit

__all__ = ["MODULES", "RuleMutant", "by_rule", "named"]

MODULES = (
    "attention", "layers", "thinker", "losses", "optim", "init", "sampling", "mel", "audio", "audio_encoder", "ctc",
    "vision", "vision_encoder", "fusion", "cache", "generation", "autodiff", "data", "training", "training_run",
    "training_utils", "image_file", "audio_file",
)  # fmt: skip
"""Those that compute; files, commands and settings are not mutated."""
SPECIAL = ("__call__", "__getitem__", "__len__", "__iter__")
"""Of the methods with such names; a constructor makes shapes, which the twins' pairs fix before any bug is in."""
PREFIXES = ("check", "_check", "validate", "_validate", "save", "load", "_save", "_load", "from_", "_not_", "plot")
"""Functions that check, read and write files, or draw."""

ENDLESS = ("while_loop",)
"""A function that calls these is let alone: a compiled loop that has become endless cannot be cut off."""


@dataclass(frozen=True)
class RuleMutant:
    """One change of one function, on one side or in both."""

    id: str
    side: str
    module: str
    name: str
    rule: str
    old: str
    new: str
    edits: tuple[Edit, ...]
    lines: tuple[tuple[str, int], ...]
    """(file, line) of what is changed, in the unchanged code; one that is run suffices."""

    @property
    def what(self) -> str:
        return f"{self.old} → {self.new}"


def by_rule(modules: Sequence[str] = ()) -> tuple[RuleMutant, ...]:
    """Every mutant of the modules (of all, if none are named), module by module, side by side."""
    for module in modules:
        if module not in MODULES:
            raise Misuse(f"--module {module}: must be one of {', '.join(MODULES)}")
    return tuple(mutant for module in MODULES if module in modules or not modules for mutant in _of(module))


def named(mutants: Sequence[RuleMutant], ids: Sequence[str]) -> tuple[RuleMutant, ...]:
    """Those of the mutants that have these ids, in the mutants' order."""
    for name in ids:
        if not any(mutant.id == name for mutant in mutants):
            near = difflib.get_close_matches(name, [mutant.id for mutant in mutants], 1)
            raise Misuse(f"--id {name}: no such mutant" + (f"; did you mean {near[0]}?" if near else ""))
    return tuple(mutant for mutant in mutants if mutant.id in ids)


@functools.cache
def _of(module: str) -> tuple[RuleMutant, ...]:
    files = {side: _file(side, module) for side in ("jax", "torch")}
    texts = {side: file.read_text(encoding="utf-8") for side, file in files.items()}
    if texts["jax"] == texts["torch"]:
        return tuple(_made("both", module, texts["jax"], tuple(files.values())))
    return tuple(mutant for side, file in files.items() for mutant in _made(side, module, texts[side], (file,)))


def _file(side: str, module: str) -> Path:
    # find_spec of the package alone: it need not be imported to be read.
    spec = importlib.util.find_spec(f"omni_{side}")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / f"{module}.py"


def _made(side: str, module: str, text: str, files: tuple[Path, ...]) -> Iterator[RuleMutant]:
    lines = text.splitlines(keepends=True)
    for name, function in _functions(ast.parse(text)):
        first = min([function.lineno, *(d.lineno for d in function.decorator_list)])
        source = textwrap.dedent("".join(lines[first - 1 : function.end_lineno]))
        count: Counter[tuple[str, str, str]] = Counter()
        for site in sites(source):
            change = site.rule, site.old, site.short
            count[change] += 1
            again = f"#{count[change]}" if count[change] > 1 else ""
            yield RuleMutant(
                f"rule:{side}.{module}.{name}:{site.rule}:{site.old}→{site.short}{again}",
                side, module, name, site.rule, site.old, site.short,
                tuple(Edit(f"omni_{s}.{module}", name, source, _changed(source, site))
                      for s in (("jax", "torch") if side == "both" else (side,))),
                tuple((str(file), first - 1 + line) for file in files for line in range(site.first, site.last + 1)),
            )  # fmt: skip


def _changed(source: str, site: Site) -> str:
    whole = source.encode()
    return (whole[: site.start] + site.new.encode() + whole[site.end :]).decode()


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """(name within the module, function) of what computes."""
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        for function in inner:
            if isinstance(function, ast.FunctionDef) and _computes(function):
                yield f"{node.name}.{function.name}" if isinstance(node, ast.ClassDef) else function.name, function


def _computes(function: ast.FunctionDef) -> bool:
    name, returned = function.name, function.returns
    if name.startswith("__"):
        return name in SPECIAL
    words = isinstance(returned, ast.Name) and returned.id == "str"
    setter = any(isinstance(d, ast.Attribute) for d in function.decorator_list if getattr(d, "attr", "") == "setter")
    calls = {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    return not name.startswith(PREFIXES) and not words and not setter and not calls & set(ENDLESS)
