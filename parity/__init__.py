"""parity: are a JAX function and a PyTorch function the same function, to how many bits, and where do they part."""

from __future__ import annotations

from typing import Any

__all__ = ["Pair", "assert_agree", "compare", "load_twins"]

_HOMES = {
    "Pair": "parity.pair",
    "assert_agree": "parity.agreement",
    "compare": "parity.agreement",
    "load_twins": "parity.fixtures",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when they are asked for: `parity list` needs no framework."""
    if name not in _HOMES:
        raise AttributeError(f"module 'parity' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
