"""The default run, once per session and device: programs cost seconds to compile, so everybody asserts on this one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from parity.checks import Scope
from parity.errors import CannotLook
from parity.result import RunResult

sys.path.append(str(Path(__file__).parent))  # for toy.py, which several tests share


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    from parity import sides

    with sides.one_thread():
        yield


@pytest.fixture(scope="session")
def run_on() -> Callable[[str], RunResult]:
    """The default run on a device, by its name; skips with the reason where there is no such device."""
    from parity import runner, sides
    from parity.precision import resolve_device

    runs: dict[str, RunResult] = {}

    def run(device: str) -> RunResult:
        if device not in runs:
            try:
                resolve_device(device)
            except CannotLook as error:
                pytest.skip(str(error))
            # By default an accelerator rounds inside float32 products (TF32, bfloat16 passes): another arithmetic, and
            # rightly not AGREE.
            matmul = "default" if device == "cpu" else "highest"
            with sides.one_thread():
                runs[device] = runner.run(Scope(device=device), matmul=matmul)
        return runs[device]

    return run


@pytest.fixture(scope="session")
def case(run_on):
    """(configuration, regime, precision) -> that case of the default run on the CPU, with everything it measured."""
    run_on("cpu")
    from parity.checks import _twins

    return lambda config, regime, precision: _twins._case(Scope(), config, regime, precision)
