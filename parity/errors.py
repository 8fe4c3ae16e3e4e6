"""The two ways in which a question cannot be answered; both carry a message for the person who asked."""

from __future__ import annotations

__all__ = ["CannotLook", "Misuse"]


class Misuse(ValueError):
    """The question itself is wrong: an unknown check, a file that is not a checkpoint. Exit code 2."""


class CannotLook(RuntimeError):
    """The question is right but could not be looked at: a missing device, a crashed side. Exit code 3."""
