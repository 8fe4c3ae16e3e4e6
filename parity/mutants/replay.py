"""The clean run of a check, kept: noise and the untouched side come from it while a bug is in the other side.

σ is the clean function's in every judgement, and only what the bug touches runs again. JAX in float64 is evaluated by
the noise model's interpreter, from a fresh trace: nothing is compiled for a bug.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from parity.checks import _encoders
from parity.judge import Judge
from parity.noise import Tracer, _lift, _pools, _Run
from parity.precision import precision as format_of
from parity.sides import JaxSide, TorchSide, as_inputs

__all__ = ["Recording", "evaluated"]


@dataclass
class Recording:
    """What one check's clean run measured: noise models, and what each side gave, by the question's content."""

    kept: dict[Any, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def running(self, touched: str = "") -> Iterator[None]:
        """Record (`touched` is ""), or answer from the record whatever the `touched` side ("both") does not decide."""
        asked: Counter[Any] = Counter()
        clean = Judge.noise, JaxSide.__call__, TorchSide.__call__

        def answered(own: str, side: Any, weights: Any, inputs: Any, precision: str, ask: Any) -> Any:
            key = (own, side.pair.name, precision, _digest(weights, inputs))
            asked[key] += 1
            key = (*key, asked[key])
            if own in touched or (touched == "both" and own != "noise"):
                return ask()
            if key not in self.kept:
                answer = ask()
                if touched:  # a bug has changed the question: its answer is nobody else's
                    return answer
                pins = side.pins if isinstance(side, TorchSide) else ()
                self.kept[key] = answer, pins
            answer, pins = self.kept[key]
            if isinstance(side, TorchSide):
                side.pins = pins
            if own == "noise":
                return answer
            return tuple({name: np.array(x) for name, x in part.items()} for part in answer)

        def noise(self: Judge, weights: Any, inputs: Any, precision: str) -> Any:
            return answered(
                "noise", self, weights, inputs, precision, lambda: clean[0](self, weights, inputs, precision)
            )

        def jax_side(self: JaxSide, weights: Any, inputs: Any, precision: str) -> Any:
            def ask() -> Any:
                if precision == "float64":
                    named, taps, narrow = evaluated(self.pair, weights, inputs, precision)
                    if not narrow:  # the interpreter takes a narrowing cast for noise: it has to be run
                        return named, taps
                fresh = JaxSide(self.pair, Tracer(self.pair.jax_program()), self.device)
                return clean[1](fresh, weights, inputs, precision)

            return answered("jax", self, weights, inputs, precision, ask)

        def torch_side(self: TorchSide, weights: Any, inputs: Any, precision: str) -> Any:
            return answered(
                "torch", self, weights, inputs, precision, lambda: clean[2](self, weights, inputs, precision)
            )

        def in_place(self: Any, weights: Any, inputs: Any, precision: str) -> Any:
            def ask() -> Any:
                return evaluated(self.judge.pair, weights, inputs, precision)[:2]

            return answered("jax", self.judge, weights, inputs, precision, ask)

        judges, stand_in = _judges(), _encoders._Evaluated.__call__
        try:
            _encoders._Evaluated.__call__ = in_place
            Judge.noise, JaxSide.__call__, TorchSide.__call__ = noise, jax_side, torch_side
            for module, right in judges:
                module.judge_tensor = _without_dwarfs(right)
            yield
        finally:
            _encoders._Evaluated.__call__ = stand_in
            Judge.noise, JaxSide.__call__, TorchSide.__call__ = clean
            for module, right in judges:
                module.judge_tensor = right


def evaluated(pair: Any, weights: Mapping[str, np.ndarray], inputs: Sequence[Any], precision: str) -> Any:
    """What the JAX side of a pair means, traced anew, in float64: (named results, taps, whether it casts to less)."""
    import jax

    dtype = format_of(precision).numpy
    args = (
        pair.jax_params({k: np.asarray(v).astype(dtype) for k, v in weights.items()}),
        *as_inputs(inputs, precision),
    )
    program = Tracer(pair.jax_program()).program(args, precision)
    run = _Run(precision)
    with np.errstate(all="ignore"), _pools().limit(limits=1, user_api="blas"):
        consts = [_lift(c) for c in program.values.consts]
        leaves = [_lift(x) for x in jax.tree.leaves(args)]
        found = run.jaxpr(program.values.jaxpr, program.types.jaxpr, consts, leaves)
    named = pair.named(jax.tree.unflatten(program.tree, found))
    return named, {name: np.asarray(x) for name, x in run.taps.items()}, bool(run.pins)


def _digest(weights: Any, inputs: Any) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        array = np.ascontiguousarray(weights[name])
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    for value in inputs:
        array = np.ascontiguousarray(value)
        found.update(f"{array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def _judges() -> list[tuple[Any, Any]]:
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("parity.") and m is not None]
    return [(module, vars(module)["judge_tensor"]) for module in modules if "judge_tensor" in vars(module)]


def _without_dwarfs(right: Any) -> Any:
    """What is evaluated does not err at all: that the other side errs more says nothing in float64."""

    def judge_tensor(*args: Any, **rest: Any) -> Any:
        from parity.verdict import THRESHOLDS

        if rest.get("noisy_reference"):
            rest["limits"] = replace(rest.get("limits", THRESHOLDS), dwarf_ratio=math.inf)
        return right(*args, **rest)

    return judge_tensor
