"""The public face: compare a JAX function with a torch module, or assert in a test that they agree."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from parity.errors import CannotLook, Misuse
from parity.result import CheckResult, RunResult

__all__ = ["assert_agree", "compare"]


def compare(
    jax: Callable[..., Any],
    torch: Any,
    params: Any,
    inputs: Sequence[Any],
    *,
    loss: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
    rename: Mapping[str, str] | None = None,
    axes: Mapping[str, tuple[int, ...]] | None = None,
    torch_shapes: Mapping[str, Sequence[int]] | None = None,
    precisions: Sequence[str] = ("float64", "float32"),
    device: str = "cpu",
    draws: int = 16,
    seed: int = 0,
) -> RunResult:
    """Is `jax(params, *inputs)` the function that the torch module computes?

    jax:        a function of (params, *inputs) that JAX can trace; it returns an array or a pytree of arrays.
    torch:      an nn.Module in eval mode, called with *inputs; it returns the same structure of tensors. Or a function
                of (dict of tensors, *inputs), with `weights` and `torch_shapes` {name: shape}.
    params:     the JAX parameters, any pytree; only names and shapes are used. Names pair by the rules of
                parity.weights (kernel, scale, embedding <-> weight; Dense and Conv layouts), `rename` maps the JAX
                names that do not, `axes` gives the permutation torch -> JAX of other layouts.
    inputs:     numpy arrays; floats should be exactly representable in the narrowest precision.
    weights:    torch-named values; the module's own when not given.
    loss:       (jax_loss(outputs, *inputs), torch_loss(outputs, *inputs)): also compares every gradient.
    precisions: "float64" asks whether they are the same function, the others whether each side is as accurate as
                its precision allows, on `device`.

    Returns a RunResult: `.exit_code` (0 agree, 1 not, 3 could not look), `.checks[0].rows`, `.to_json()`.
    Raises parity.errors.Misuse for weights that do not bind. Taps: name intermediates in JAX with
    jax.ad_checkpoint.checkpoint_name(x, "path.of.the.torch.submodule"), and the first one that parts is told.
    """
    from parity.judge import Judge
    from parity.pair import pair_of
    from parity.precision import device_names, manifest, resolve_device

    started, cpu = time.perf_counter(), time.process_time()
    if not isinstance(inputs, (list, tuple)):
        raise Misuse(f"inputs: got {type(inputs).__name__}, must be a list or tuple of arrays; wrap a single one: [x]")
    precisions = (precisions,) if isinstance(precisions, str) else tuple(precisions)
    if not precisions:
        raise Misuse("precisions: none given; name at least one, for example ('float64', 'float32')")
    pair = pair_of(
        jax, torch, params, loss=loss, rename=rename, axes=axes, torch_shapes=torch_shapes, name="compare"
    )  # fmt: skip
    weights = pair.weights(weights)
    judge = Judge(pair, draws=draws, seed=seed, devices=resolve_device(device), device=device)
    inputs = tuple(np.asarray(x) for x in inputs)
    result = CheckResult("compare")
    try:
        for precision in precisions:
            findings = judge(weights, inputs, precision)
            result.rows += findings.rows("compare", "", "", None)
            result.notes += [f"{precision}: {note}" for note in findings.notes]
    except CannotLook as error:
        result.error = str(error)
    result.seconds = time.perf_counter() - started
    return RunResult([result], manifest(), device_names(device), result.seconds, time.process_time() - cpu)


def assert_agree(*args: Any, **kwargs: Any) -> RunResult:
    """`compare`, and an AssertionError with the table's words unless the pair agrees in every tensor."""
    result = compare(*args, **kwargs)
    if result.exit_code != 0:
        check = result.checks[0]
        bad = [row for row in check.rows if row.verdict != "AGREE"]
        lines = [f"{row.precision} {row.name}: {row.verdict}, {row.evidence}" for row in bad[:10]]
        more = [f"... and {len(bad) - 10} more"] if len(bad) > 10 else []
        raise AssertionError("\n".join([check.error or "the pair does not agree:", *lines, *more]))
    return result
