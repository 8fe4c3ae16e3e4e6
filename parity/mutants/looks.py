"""What the catalogue looks with: the checks by their names, and looks of its own where no check is.

They compare the twins with a third party: SentencePiece, torch's own files, a rule in words.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from parity import checks

__all__ = ["LOOKS", "load"]

LOOKS = ("tokenizer", "checkpoint", "decay-mask")


def load(name: str) -> Any:
    """A check or a look: something with run(scope, progress) -> CheckResult."""
    if name == "tokenizer":
        from parity.mutants import look_tokenizer as found
    elif name == "checkpoint":
        from parity.mutants import look_checkpoint as found
    elif name == "decay-mask":
        from parity.mutants import look_decay as found
    else:
        return checks.load(name)
    return SimpleNamespace(run=found.run)
