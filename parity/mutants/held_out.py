"""Bugs on which no rule of the diagnosis was tried while it was written: made by rule, with the answer made by rule.

Two kinds, both of the language model. A bug of the catalogue with another number (floats five times as large, integers
one more), for which what is right for the bug is right. And every `STRIDE`-th mutant by rule of the twins' source:
right is whatever explains the difference by the function that was changed (its namesake, where that is torch's).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from parity.checks import OF_MODELS
from parity.mutants import catalogue
from parity.mutants.by_rule import RuleMutant, by_rule
from parity.mutants.mutant import Edit, Mutant

__all__ = ["held_out"]

MODULES = ("attention", "layers", "losses")
STRIDE = 5
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?(?![\w.])")
SAME = {"attend": "attend|_softmax", "_attend_fused": "attend|_softmax"}
"""torch's function -> the JAX functions that do its work; others have a namesake."""
CONFIGS = {"MoE": "moe", "GELUMLP": "mha-gelu"}


def held_out(right: Mapping[str, str]) -> tuple[list[Mutant], dict[str, str]]:
    """Mutants, and by id the regular expression of what is right; `right`: that of the catalogue."""
    made: dict[str, tuple[Mutant, str]] = {}
    for mutant in catalogue():
        expected = right.get(mutant.id, "")
        # What names a number, or a function with a number in it, is not right for another number.
        plain = expected and not re.search(r"\d|GELU", expected)
        if plain and mutant.check in OF_MODELS and not mutant.equivalent:
            edits = tuple(_with_another(edit) for edit in mutant.edits)
            if edits != mutant.edits:
                name = f"{mutant.id}, another number"
                made[name] = replace(mutant, id=name, what=edits[0].new, edits=edits), expected
    changes = [m for m in by_rule(MODULES) if m.side != "both"]
    for change in changes[::STRIDE]:
        made[change.id] = _of_rule(change)
    return [mutant for mutant, _ in made.values()], {name: expected for name, (_, expected) in made.items()}


def _with_another(edit: Edit) -> Edit:
    """The edit with another number, if it brings a single new one."""
    there = NUMBER.findall(edit.old)
    fresh = {x for x in NUMBER.findall(edit.new) if x not in there}
    if len(fresh) != 1:
        return edit
    number = fresh.pop()
    other = str(int(number) + 1) if number.isdigit() else repr(5 * float(number))
    new = NUMBER.sub(lambda found: other if found.group() == number else found.group(), edit.new)
    return replace(edit, new=new)


def _of_rule(change: RuleMutant) -> tuple[Mutant, str]:
    name = change.name.replace(".forward", ".__call__")
    config = CONFIGS.get(change.name.partition(".")[0], "mha-swiglu")
    check = "gradients" if change.module == "losses" or change.rule == "gradient" else "logits"
    scope = {"configs": (config,)}
    mutant = Mutant(change.id, "rule", change.rule, change.what, change.edits, check, scope=scope)
    return mutant, SAME.get(change.name, re.escape(name))
