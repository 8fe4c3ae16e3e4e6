"""Strict settings for every test: they live here, never in the product's code."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

import pytest

# One thread: sums keep one order, so a rerun prints the same figures; and the models here are too small for two.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Compiling is most of the tests' time, and each program here runs a few times: LLVM's optimiser and XLA's newer
# emitters are off (docs/decisions/0003), in the processes that tests start too. XLA ends the process at a flag that it
# does not know, so only where the flags have been tried. `make parity` compiles as its users do.
try:
    if metadata.version("jaxlib").startswith("0.10."):
        hasty = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
        os.environ["XLA_FLAGS"] = f"{hasty} {os.environ.get('XLA_FLAGS', '')}".strip()
except metadata.PackageNotFoundError:
    pass


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items) -> None:
    """A file stays in one worker (`--dist loadgroup`), and so does the default run with all that look at it: what is
    shared is made once. Examples share nothing: one by one at the end they keep every worker busy."""
    for item in items:
        if item.path.parent.name != "examples":
            group = "default run" if "run_on" in item.fixturenames else str(item.path)
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.path.parent.name == "examples")


def pytest_configure(config) -> None:
    try:
        import jax
    except ImportError:  # the torch-only environment of `make isolation` runs tests/torch without JAX
        return
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # Compiled programs may be cached between runs; results never are.
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
