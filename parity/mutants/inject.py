"""Puts a bug into running code from outside, and takes it out again whatever happens.

The source of a function is taken, edited and compiled anew in its own module; every reference to the function in the
twins and in this package is turned to the new one, and back. The product knows nothing of it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import pkgutil
import sys
import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from parity.errors import CannotLook
from parity.mutants.mutant import Edit

__all__ = ["DeadAnchor", "Injection", "edited", "forget", "import_everything", "injected"]

PACKAGES = ("omni_jax", "omni_torch", "parity")


class DeadAnchor(CannotLook):
    """A mutant that did not change what it meant to change: an error of the catalogue, not a kill."""


@dataclass
class Injection:
    """What was put in; `calls` counts how often each changed function ran."""

    calls: dict[str, int] = field(default_factory=dict)

    @property
    def dead(self) -> list[str]:
        """The changed functions that nobody called."""
        return [target for target, count in self.calls.items() if not count]


@contextlib.contextmanager
def injected(edits: Sequence[Edit]) -> Iterator[Injection]:
    """The edits are in force inside; a `DeadAnchor` before anything is changed where one does not apply."""
    import_everything()
    injection, replacements = Injection(), []
    for target, owner, found, made in edited(edits):
        injection.calls[target] = 0
        replacements.append((owner, found, _counted(made, target, injection)))
    undo: list[tuple[Any, str, Any]] = []
    uses_jax = any(edit.module.startswith("omni_jax") for edit in edits)
    try:
        for owner, found, new in replacements:
            for place in [owner] if isinstance(owner, type) else _holders(found):
                for held in [k for k, v in vars(place).items() if v is found]:
                    undo.append((place, held, found))
                    setattr(place, held, new)
        forget(uses_jax)
        yield injection
    finally:
        for place, held, found in reversed(undo):
            setattr(place, held, found)
        forget(uses_jax)


def edited(edits: Sequence[Edit]) -> list[tuple[str, Any, Any, Any]]:
    """(name, owner, function, edited function) of each function; nothing is changed.

    Raises:
        DeadAnchor: an edit that does not apply.
    """
    grouped: dict[str, list[Edit]] = {}
    for edit in edits:
        grouped.setdefault(edit.target, []).append(edit)
    made = []
    for target, group in grouped.items():
        owner, found = _find(group[0])
        made.append((target, owner, found, _edited(owner, found, group)))
    return made


def _find(edit: Edit) -> tuple[Any, Any]:
    """(module or class, what stands there)."""
    owner: Any = importlib.import_module(edit.module)
    *path, name = edit.name.split(".")
    for part in path:
        owner = getattr(owner, part, None)
    if owner is None or name not in vars(owner):
        raise DeadAnchor(f"{edit.target}: there is no such function; the catalogue is older than the code")
    return owner, vars(owner)[name]


def _edited(owner: Any, found: Any, edits: Sequence[Edit]) -> Any:
    """`found`, compiled from its edited source, decorators and all, in its own module."""
    function: Any = found.fget if isinstance(found, property) else found
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(getattr(function, "__func__", function))))
    for edit in edits:
        seen = source.count(edit.old)
        if seen != edit.count:
            raise DeadAnchor(f"{edit.target}: {edit.old!r} occurs {seen} times in it, not {edit.count}")
        source = source.replace(edit.old, edit.new)
    name = edits[0].name.rpartition(".")[2]
    module = sys.modules[edits[0].module]
    # A method may say super(), which looks for the cell __class__ around it.
    text = f"def made(__class__):\n{textwrap.indent(source, '    ')}\n    return {name}\n"
    scratch: dict[str, Any] = {}
    try:
        code = compile(text, f"<mutant of {edits[0].target}>", "exec", annotations.compiler_flag, True)
    except SyntaxError as error:
        raise DeadAnchor(f"{edits[0].target}: what it becomes is no Python: {error}") from error
    exec(code, vars(module), scratch)  # the catalogue's own text
    return scratch["made"](owner)


def _counted(made: Any, target: str, injection: Injection) -> Any:
    if isinstance(made, (classmethod, staticmethod)):
        return type(made)(_counted(made.__func__, target, injection))
    if isinstance(made, property):
        return property(_counted(made.fget, target, injection))

    @functools.wraps(made, updated=())
    def counted(*args: Any, **kwargs: Any) -> Any:
        injection.calls[target] += 1
        return made(*args, **kwargs)

    for extra in ("cache_clear", "cache_info", "clear_cache", "lower", "trace", "eval_shape"):
        if hasattr(made, extra):
            setattr(counted, extra, getattr(made, extra))
    return counted


def _modules() -> list[types.ModuleType]:
    own = tuple(f"{name}." for name in PACKAGES)
    return [m for name, m in list(sys.modules.items()) if m is not None and (name in PACKAGES or name.startswith(own))]


def _holders(found: Any) -> list[types.ModuleType]:
    return [module for module in _modules() if any(v is found for v in vars(module).values())]


@functools.cache
def import_everything() -> None:
    """A module that is first imported while a bug is in would keep it for ever."""
    for name in PACKAGES:
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            if not module.name.endswith("__main__"):
                with contextlib.suppress(ImportError):
                    importlib.import_module(module.name)


def forget(programs: bool = False) -> None:
    """Forget what was computed or traced through the functions that have just been exchanged."""
    for module in _modules():
        if module.__name__.startswith(("omni_", "parity.checks")):
            for value in list(vars(module).values()):
                clear = getattr(value, "cache_clear", None)
                if clear is not None and getattr(value, "__module__", "").startswith(("omni_", "parity.")):
                    clear()
    from parity.checks import _twins

    _twins._CASES.clear()
    if programs:
        import jax

        jax.clear_caches()
