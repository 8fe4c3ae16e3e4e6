"""Known causes of a difference, by family: what was done to the array, or is otherwise in the program."""

__all__ = ["SECONDS"]

SECONDS = 60.0
"""So long a failed run looks for causes, unless it is told otherwise."""
