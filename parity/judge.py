"""Runs a pair and answers the three questions, in their order.

1. Same function?  Both sides in float64 on the CPU, against each other and against the interpreted float64 reference.
2. Same precision? Each side in its working precision, on its device, against the float64 reference.
3. Where?          The first tap that parts, and the side that left the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from parity.errors import CannotLook
from parity.noise import NoiseModel, Tracer, measure_program
from parity.pair import Pair
from parity.precision import precision as format_of
from parity.precision import unit_roundoff
from parity.result import Row, row_from_judgement
from parity.sides import JaxSide, TorchSide, as_inputs
from parity.verdict import THRESHOLDS, Judgement, Noise, Thresholds, Verdict, judge_tensor

__all__ = ["WATCHERS", "Findings", "Judge"]

WATCHERS: list[Callable[[Judge, Mapping[str, np.ndarray], Sequence[Any], Findings], None]] = []
"""Who is told of every comparison: (judge, weights, inputs, findings). Whoever looks for the cause of a failure."""


@dataclass
class Findings:
    """What one run of a pair gave: judgements of outputs, loss and gradients, and of the taps, by name."""

    precision: str
    device: str
    outputs: dict[str, Judgement]
    taps: dict[str, Judgement]
    shapes: dict[str, tuple[int, ...]]
    notes: list[str]
    ties: int
    values: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, Noise]]
    """name -> (jax, torch, reference, noise): what the negative controls start from."""
    excused: frozenset[str] = frozenset()
    """Names that differ where a choice within the noise may be the reason."""

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """The verdict of every output and tap under the names of `values`."""
        return {k: j.verdict for k, j in self.outputs.items()} | {f"tap {k}": j.verdict for k, j in self.taps.items()}

    @property
    def parted(self) -> str | None:
        """The first tap, in the order of execution, that differs; None when none does."""
        bad = (Verdict.DIFFER, Verdict.PINNED)
        return next((name for name, j in self.taps.items() if j.verdict in bad), None)

    def rows(self, check: str, config: str, regime: str, names: Sequence[str] | None = None) -> list[Row]:
        """Rows of the outputs (and taps, as "tap NAME") whose names are asked for; None asks for all of them."""
        every = {**self.outputs, **{f"tap {k}": v for k, v in self.taps.items()}}
        rows = []
        for name, judgement in every.items():
            if names is not None and name not in names:
                continue
            if judgement.verdict is Verdict.DIFFER and self.parted and name != f"tap {self.parted}":
                judgement = replace(
                    judgement, evidence=f"{judgement.evidence}; the first tap that parts: {self.parted}"
                )
            fields = {"check": check, "config": config, "regime": regime, "precision": self.precision}
            fields |= {"name": name, "device": self.device, "shape": self.shapes[name], "excused": name in self.excused}
            rows.append(row_from_judgement(judgement, **fields))
        return rows


class Judge:
    """A pair made ready: programs are traced and compiled once per precision and shape, and used for many weights."""

    def __init__(
        self,
        pair: Pair,
        *,
        draws: int = 16,
        seed: int = 0,
        devices: tuple[Any, Any] = (None, "cpu"),
        device: str = "cpu",
        limits: Thresholds = THRESHOLDS,
        shares: bool = True,
    ):
        """`shares`: float64 and float32 runs use the same draws; not worth a trace where only one of them is run."""
        self.pair, self.draws, self.seed, self.limits = pair, draws, seed, limits
        self.device, self.shares = device, shares
        self.tracer = Tracer(pair.jax_program())
        self.cpu = JaxSide(pair, self.tracer), TorchSide(pair)
        far = (JaxSide(pair, self.tracer, devices[0]), TorchSide(pair, devices[1]))
        self.far = self.cpu if device == "cpu" else far
        self.shared: tuple[Any, NoiseModel] | None = None

    def noise(self, weights: Mapping[str, np.ndarray], inputs: Sequence[Any], precision: str) -> NoiseModel:
        """The float64 reference and noise of the JAX program on weights rounded to `precision`."""
        dtype = format_of(precision).numpy
        rounded = {k: np.asarray(v).astype(dtype) for k, v in weights.items()}
        args = (self.pair.jax_params(rounded), *as_inputs(inputs, precision))
        program = self.tracer.program(args, precision)
        if not program.uniform:
            return measure_program(program, args, draws=self.draws, seed=self.seed)
        # sigma scales with u: float64 and float32 runs of one program share the draws, if the values fit both types.
        # Drawn for float32 where it can be, because that has the larger smallest number (sigma's floor).
        narrow = self.tracer.program(args, "float32") if precision == "float64" and self.shares else program
        program = narrow if narrow.uniform else program
        if self.shared is None or not _same_values(self.shared[0], args):
            self.shared = (args, measure_program(program, args, draws=self.draws, seed=self.seed))
        return self.shared[1]

    def __call__(
        self,
        weights: Mapping[str, np.ndarray],
        inputs: Sequence[Any],
        precision: str,
        oracle: Mapping[str, np.ndarray] | None = None,
        origin: Mapping[str, np.ndarray] | None = None,
    ) -> Findings:
        """Run both sides and judge every output and every tap that both sides have.

        `oracle` gives outputs computed by somebody else, by name, to stand in for the interpreted reference. `origin`
        gives what outputs are measured from (parameters before the steps): displacements are judged, not positions.
        """
        wide = precision == "float64"
        unit = unit_roundoff(precision)
        model = self.noise(weights, inputs, precision)
        left, right = self.cpu if wide else self.far
        jax_out, jax_taps = left(weights, inputs, precision)
        torch_out, torch_taps = right(weights, inputs, precision)
        reference, noise, pinned = self._named(model)
        self._demand_same_names(jax_out, torch_out)
        if oracle is not None:
            self._demand_same_names(jax_out, oracle)
            reference = {name: np.asarray(value, np.float64) for name, value in oracle.items()}
        unknown = [name for name in origin or {} if name not in jax_out]
        if unknown:
            raise CannotLook(f"origin: {', '.join(unknown)} is not returned; known: {', '.join(jax_out)}")
        rounded = {name: _rms(reference[name]) for name in origin or {}}
        for name, start in (origin or {}).items():
            jax_out[name], torch_out[name] = jax_out[name] - start, torch_out[name] - start
            reference[name] = reference[name] - start

        pins = model.pins + (right.pins if wide else ())
        ties = sum(int(c.ties(unit).sum()) for c in model.choices)
        excused: set[str] = set()
        shapes: dict[str, tuple[int, ...]] = {}
        values: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, Noise]] = {}

        def judged(name, ours, theirs, truth, own_noise, pin) -> Judgement:
            if ours.shape != theirs.shape:
                raise CannotLook(f"{name}: the JAX side returned shape {ours.shape}, the torch side {theirs.shape}")
            if ours.shape != truth.shape:
                raise CannotLook(f"{name}: the sides returned shape {ours.shape}, the reference has {truth.shape}")
            shapes[name] = ours.shape
            values[name] = (ours, theirs, truth, own_noise)
            if pins and pin is None:  # the pin is on the torch side only: its noise is taken as that of float32
                pin = own_noise.scaled(unit_roundoff("float32"))
            judgement = judge_tensor(
                ours, theirs, truth, own_noise, unit, noisy_reference=wide, pins=pins, pinned=pin,
                rounded=rounded.get(name, 0.0), limits=self.limits,
            )  # fmt: skip
            if ties and judgement.verdict is Verdict.DIFFER:
                words = (
                    f"{ties} top-k choices are ties within the noise, another choice is as right; {judgement.evidence}"
                )
                judgement = replace(judgement, verdict=Verdict.UNDETERMINED, evidence=words)
                excused.add(name)
            return judgement

        outputs = {
            name: judged(name, jax_out[name], torch_out[name], reference[name], noise[name], pinned.get(name))
            for name in jax_out
        }
        pairs = self.pair.taps if self.pair.taps is not None else {n: n for n in model.taps}
        absent = [f"{n} (JAX)" for n in pairs if n not in jax_taps] + [
            f"{m} (torch)" for m in pairs.values() if m not in torch_taps
        ]
        if absent and self.pair.taps is not None:
            raise CannotLook(f"taps that did not show: {', '.join(absent)}; JAX has {', '.join(jax_taps) or 'none'}")
        notes = list(model.notes)
        if absent:
            notes.append(f"taps on one side only, not compared: {', '.join(absent)}")
        taps = {}
        for name in [n for n in model.taps if n in pairs]:  # in the order of execution
            module = pairs[name]
            if name in jax_taps and module in torch_taps and jax_taps[name].shape == torch_taps[module].shape:
                pin = model.pinned_taps[name] if model.pinned_taps else None
                taps[name] = judged(
                    f"tap {name}", jax_taps[name], torch_taps[module], model.taps[name], model.tap_noise[name], pin
                )
        if pins:
            notes.append(f"pins (rounded inside a float64 run): {', '.join(pins)}")
        device = "cpu" if wide else self.device
        found = Findings(precision, device, outputs, taps, shapes, notes, ties, values, frozenset(excused))
        for watcher in WATCHERS:
            watcher(self, weights, inputs, found)
        return found

    def _named(self, model: NoiseModel) -> tuple[dict[str, np.ndarray], dict[str, Noise], dict[str, Noise]]:
        import jax

        def names(leaves):
            return self.pair.named(jax.tree.unflatten(model.tree, leaves))

        reference = names(model.reference)
        sigma = names([n.sigma for n in model.noise])
        # dof and kappa are numbers per tensor; carry them as 0-d arrays would lose the layout, so by position.
        order = names([np.full(np.shape(r), float(i)) for i, r in enumerate(model.reference)])
        at = {k: int(v.flat[0]) if v.size else 0 for k, v in order.items()}
        noise = {k: Noise(v, model.noise[at[k]].dof, model.noise[at[k]].kappa) for k, v in sigma.items()}
        pinned = {}
        if model.pinned:
            wide = names([n.sigma for n in model.pinned])
            pinned = {k: Noise(v, model.pinned[at[k]].dof, 0.0) for k, v in wide.items()}
        return reference, noise, pinned

    @staticmethod
    def _demand_same_names(left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
        alone = [f"{n} (JAX only)" for n in left if n not in right] + [
            f"{n} (torch only)" for n in right if n not in left
        ]
        if alone:
            raise CannotLook(
                f"the sides return different things: {', '.join(alone)}; both must return the same structure"
            )
        if not left:
            raise CannotLook("nothing was compared: the functions returned no arrays")


def _rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(array)))) if np.size(array) else 0.0


def _same_values(left: Any, right: Any) -> bool:
    import jax

    a, b = jax.tree.leaves(left), jax.tree.leaves(right)
    return len(a) == len(b) and all(np.shape(x) == np.shape(y) and np.array_equal(x, y) for x, y in zip(a, b))
