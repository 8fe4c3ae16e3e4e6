"""Bugs on purpose: what the checks would have caught, shown one bug at a time (`parity mutants`)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from parity.errors import Misuse
from parity.mutants.mutant import AREAS, Edit, Mutant

__all__ = ["AREAS", "Edit", "Mutant", "catalogue"]


def catalogue(areas: Sequence[str] = ()) -> tuple[Mutant, ...]:
    """Every mutant of the areas (of all, if none are named), area by area."""
    for area in areas:
        if area not in AREAS:
            raise Misuse(f"area: {area!r} is not one of {', '.join(AREAS)}")
    wanted = [area for area in AREAS if area in areas or not areas]
    return tuple(mutant for area in wanted for mutant in importlib.import_module(f"parity.mutants.{area}").MUTANTS)
