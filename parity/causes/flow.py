"""Hypotheses about gradients whose forward pass agrees: at which place of the program is the gradient's flow another?

Behind each step of the JAX program a gate is put that leaves the value and multiplies the gradient. A gradient is
linear in each gate, so one derivative per place tells what flows through it, and a fit tells the gate's setting: 0
is a stopped gradient, 2 one that is counted twice, 1 / B a mean taken once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from parity.causes.arrays import name_constant
from parity.precision import unit_roundoff
from parity.verdict import THRESHOLDS, subtract

if TYPE_CHECKING:
    from parity.diagnosis import Diagnosis, Question

__all__ = ["diagnose", "flows"]

Gradient = Callable[[Sequence[int], float], dict[str, np.ndarray]]

MOST = 1 << 27
"""Places times parameters: beyond this it would take minutes."""


def diagnose(question: Question) -> Diagnosis | None:
    """The place whose gate explains most of what all gradients are apart; None where there is no program to look at."""
    from parity.diagnosis import Diagnosis, part
    from parity.errors import CannotLook

    if question.pair.loss is None:
        return None
    names = [n for n in question.theirs if n.startswith("gradient ")]
    try:
        flat = part(_about_loss(question))
    except CannotLook:
        return None
    found = flows(question, flat)
    if not found:
        return None
    unit = unit_roundoff(question.precision) * np.sqrt(2.0)
    sigma = {n: np.where(question.noise[n].sigma > 0, question.noise[n].sigma, np.inf) * unit for n in names}
    weigh = lambda values: np.concatenate([(values[n] / sigma[n]).ravel() for n in names])  # noqa: E731
    residual = weigh({n: subtract(question.theirs[n], question.ours[n]) for n in names})
    whole = float(residual @ residual)
    winner, key = None, None
    distance = lambda n, values: replace(question, tensor=n).left(values[n])  # noqa: E731
    for place, gate, at, gradient in found:
        # What a gate lets through enters in proportion, as long as no path passes by it twice.
        other = gradient(at, 1.0 - gate)
        slope = weigh({n: other[n] - question.ours[n] for n in names}) / (1.0 - 2.0 * gate)
        size = float(slope @ slope)
        if not size > 0 or not np.isfinite(whole):
            continue
        setting = gate + float(slope @ residual) / size
        setting = float(np.round(setting)) if abs(setting - np.round(setting)) < 1 / 8 else setting
        values = gradient(at, setting)
        left = residual - weigh({n: values[n] - question.ours[n] for n in names})
        much = 1.0 - float(left @ left) / whole if whole > 0 else 0.0
        within = much > 1.0 - THRESHOLDS.explained and all(distance(n, values).within for n in names)
        if key is None or (within, much) > key:
            cause, words = _words(gate, setting, place)
            key = within, much
            rms = max(distance(n, values).rms for n in names)
            named = within or much >= THRESHOLDS.explained
            winner = Diagnosis(question.tensor, cause, words, much, rms, within, named, "flow", len(found))
    return winner if winner is None or winner.share > 1.0 - THRESHOLDS.explained else None


def _about_loss(question: Question) -> Question:
    return replace(question, tensor="loss", theirs={})


def _words(gate: float, setting: float, place: str) -> tuple[str, str]:
    near = lambda x: np.isclose(setting, x, rtol=unit_roundoff("bfloat16"), atol=unit_roundoff("bfloat16"))  # noqa: E731
    if gate == 0.0:
        return "gradient stopped", f"the JAX program stops the gradient of {place}, the other side lets it through"
    if near(0.0):
        return "gradient stopped", f"no gradient flows through {place}"
    if near(2.0):
        return "gradient counted twice", f"the gradient through {place} is counted twice"
    return "scale of gradients", f"the gradient through {place} is multiplied by {name_constant(setting)}"


def flows(question: Question, flat: Any) -> list[tuple[str, float, Sequence[int], Gradient]]:
    """(place, setting of its gates, their steps, the gradients with these gates set otherwise)."""
    import jax

    from parity.sides import compiled, compiler_options

    pair, args = question.pair, question.args
    params = [np.asarray(x, np.float64) for x in jax.tree.leaves(args[0])]
    float_step = lambda s: np.asarray(flat.values[s.outputs[0]]).dtype.kind == "f"  # noqa: E731
    groups = [g for g in flat.groups() if all(float_step(flat.steps[i]) for i in g)]
    if len(groups) * sum(x.size for x in params) > MOST or not groups:
        return []
    start = np.array([0.0 if step.name == "stop_gradient" else 1.0 for step in flat.steps])

    @jax.custom_jvp
    def gate(y: Any, setting: Any) -> Any:
        return y

    @gate.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return primals[0], tangents[0] * primals[1]

    def loss(params: Any, gates: Any) -> Any:
        env: dict[int, Any] = dict(zip(range(len(params)), params))
        read = lambda slot: env[slot] if slot in env else flat.values[slot]  # noqa: E731
        for i, step in enumerate(flat.steps):
            inputs = [read(slot) for slot in step.inputs]
            if not any(slot in env for slot in step.inputs):
                out = [flat.values[slot] for slot in step.outputs]
            else:
                out = _bound(step, inputs)
                if float_step(step):
                    out = [gate(y, gates[i]) for y in (inputs if step.name == "stop_gradient" else out)]
            env.update(zip(step.outputs, out))
        return env[flat.target]

    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        lowered = jax.jit(jax.grad(loss)).lower(params, start)
        run = compiled(lowered, compiler_options(True, "float64", jax.devices("cpu")[0]))

    def gradient(group: Sequence[int], setting: float) -> dict[str, np.ndarray]:
        gates = start.copy()
        gates[list(group)] = setting
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            leaves = [np.asarray(x) for x in run(params, gates)]
        tree = jax.tree.unflatten(jax.tree.structure(args[0]), leaves)
        named = pair.named({"outputs": [np.zeros(())], "loss": np.zeros(()), "gradients": tree})
        return {name: value for name, value in named.items() if name.startswith("gradient ")}

    places = [f"{flat.steps[g[0]].name} at {flat.steps[g[0]].place}" for g in groups]
    return [(place, float(start[group[0]]), group, gradient) for group, place in zip(groups, places)]


def _bound(step: Any, inputs: Sequence[Any]) -> list[Any]:
    """A step on JAX values."""
    import jax.numpy as jnp

    from parity.primitives import bind_equation

    if step.name in ("turn", "turns"):
        return [inputs[0][step.eqn.params["at"]] if step.name == "turn" else jnp.stack(inputs)]
    return bind_equation(step.eqn, step.eqn.params, [_typed(x, v) for x, v in zip(inputs, step.eqn.invars)])


def _typed(value: Any, variable: Any) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(value, getattr(variable.aval, "dtype", None))
