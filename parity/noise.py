"""How much rounding noise a JAX function has: Monte Carlo arithmetic over its jaxpr, evaluated in numpy.

The function is traced, never run: its jaxpr is interpreted in float64. Without noise the interpreter is the float64
reference. With noise, each primitive that rounds adds a relative error of the size that its rule states
(`parity.primitives`), so that the spread of a few draws is the error that the textbook algorithm makes: one noise
unit, per element. First order is enough, so the draws use a tiny roundoff and are scaled to each precision.

    model = measure_noise(fn, args, "float32")
    model.reference, model.sigma          lists of arrays, one per output leaf (sigma per unit roundoff)
    model.taps                            the same for every `jax.ad_checkpoint.checkpoint_name`

Sources: Parker, "Monte Carlo Arithmetic" (1997); Higham & Mary, SIAM J. Sci. Comput. 41 (2019) A2815, for the
probabilistic model of rounding errors.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np

from parity.draws import OverDraws, with_draws
from parity.errors import CannotLook
from parity.precision import precision as format_of
from parity.precision import unit_roundoff
from parity.primitives import DISCRETE, IMPLEMENTATIONS, RULES, by_jax, lifted, lost_products
from parity.verdict import THRESHOLDS, Noise, Thresholds, pool_sigma

__all__ = [
    "Choice",
    "NoiseModel",
    "Program",
    "Tracer",
    "bodies",
    "inside",
    "measure_noise",
    "measure_program",
    "trace",
]

AMPLITUDE = 2.0**-30
"""Roundoff of the draws: small enough to be linear, large enough to stand clear of float64's own rounding."""
SMALLEST_AMPLITUDE = 2.0**-44
TOGETHER = 1 << 21
"""So many numbers may an array have that holds several draws."""
CALLS = {
    "jit", "pjit", "closed_call", "core_closed_call", "core_call", "custom_jvp_call", "custom_vjp_call",
    "custom_vjp_call_jaxpr", "remat", "remat2", "checkpoint", "custom_lin", "run_state", "named_call",
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """A discrete choice between floats (top-k): how clear it was, and how noisy, per unit roundoff."""

    primitive: str
    where: str
    margin: np.ndarray
    noise: np.ndarray

    def ties(self, roundoff: float, limits: Thresholds = THRESHOLDS) -> np.ndarray:
        """True where the margin is within the noise, so that another choice is as right as this one.

        Equal values that carry no noise are not among them: their order is the function's own business.
        """
        return (self.noise > 0) & (self.margin <= limits.tie * self.noise * roundoff)


@dataclass
class NoiseModel:
    """The float64 reference of a function and the noise of each output element, per unit roundoff."""

    reference: list[np.ndarray]
    noise: list[Noise]
    taps: dict[str, np.ndarray]
    tap_noise: dict[str, Noise]
    choices: list[Choice]
    pins: tuple[str, ...]
    """Where a float64 run is rounded to a narrower type, by source line."""
    pinned: list[Noise] | None
    """The absolute noise that the pins bring to each output (float64 only)."""
    pinned_taps: dict[str, Noise] | None
    tree: Any
    notes: list[str] = field(default_factory=list)

    @property
    def sigma(self) -> list[np.ndarray]:
        return [n.sigma for n in self.noise]


@dataclass
class Program:
    """A traced function: the jaxpr that gives the values, and the one whose types say where it rounds."""

    values: Any
    types: Any
    tree: Any
    precision: str
    notes: list[str]
    uniform: bool
    """Every float in it has the working precision, and the values come from the float64 trace: sigma scales with u."""


class Tracer:
    """Traces a function at each precision once per set of shapes."""

    def __init__(self, fn: Callable):
        self.fn = fn
        self.closed: dict[Any, tuple[Any, Any]] = {}
        self.programs: dict[Any, Program] = {}

    def jaxpr(self, args: Sequence[Any], precision: str) -> tuple[Any, Any]:
        """(closed jaxpr, result structure) with float leaves in the precision's type, as a side itself runs it."""
        import jax

        specs = jax.tree.map(lambda x: _spec(x, format_of(precision).numpy), tuple(args))
        key = (precision, jax.tree.structure(specs), tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(specs)))
        if key not in self.closed:
            with jax.enable_x64(precision == "float64"):
                try:
                    closed, out = jax.make_jaxpr(self.fn, return_shape=True)(*specs)
                except Exception as error:
                    words = " ".join(str(error).split())[:400]
                    raise CannotLook(f"the JAX side raised {type(error).__name__}: {words}") from error
            self.closed[key] = closed, jax.tree.structure(out)
        return self.closed[key]

    def program(self, args: Sequence[Any], precision: str) -> Program:
        """The program whose noise is measured.

        Where the float64 and the working trace have the same primitives, constants and values come from the float64
        one (so eps and theta are exact) and types from the working one. Where they differ (a function that casts or
        looks at finfo), the working trace gives both, and a note says so.
        """
        working, tree = self.jaxpr(args, precision)
        key = id(working)
        if key in self.programs:
            return self.programs[key]
        wide = working if precision == "float64" else self.jaxpr(args, "float64")[0]
        if wide is working or _primitives(wide.jaxpr) == _primitives(working.jaxpr):
            program = Program(wide, working, tree, precision, [], _uniform(working, precision))
        else:
            note = f"the {precision} program has other primitives than the float64 one: its own constants were lifted"
            program = Program(working, working, tree, precision, [note], False)
        self.programs[key] = program
        return program


def trace(fn: Callable, args: Sequence[Any], precision: str) -> Program:
    """`Tracer(fn).program(args, precision)`: for a function that is looked at once."""
    return Tracer(fn).program(args, precision)


def _uniform(closed, precision: str) -> bool:
    own = format_of(precision).numpy
    if own.itemsize < 4:  # sums are wider than their operands there: the noise is not one multiple of u
        return False

    def walk(jaxpr) -> bool:
        for eqn in jaxpr.eqns:
            for var in eqn.outvars:
                kind = getattr(var.aval, "dtype", None)
                if kind is not None and _is_float(kind) and np.dtype(kind) != own:
                    return False
            if not all(walk(body) for body in bodies(eqn)):
                return False
        return True

    return walk(closed.jaxpr)


def _spec(x, dtype):
    import jax

    if _is_key(getattr(x, "dtype", "")):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    array = np.asarray(x)
    kind = dtype if _is_float(array.dtype) else (np.dtype(np.int32) if array.dtype.kind in "iu" else array.dtype)
    return jax.ShapeDtypeStruct(array.shape, kind)


@lru_cache(maxsize=256)
def _is_float(dtype) -> bool:
    if _is_key(dtype):
        return False
    dtype = np.dtype(dtype)
    return dtype.kind == "f" or dtype.name.startswith(("bfloat16", "float8"))


@lru_cache(maxsize=256)
def _is_key(dtype) -> bool:
    return "key<" in str(dtype)


def inside(eqn):
    """The jaxpr inside a call-like equation, with its constants."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(key)
        if inner is not None:
            return (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, [])
    return None


def bodies(eqn) -> list:
    """Every jaxpr in the parameters of an equation: bodies of loops, branches, calls."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                found.append(inner)
    return found


def _primitives(jaxpr) -> list:
    """What must be the same in two traces: the primitives, and how many bits are drawn or read as they stand."""

    def bits(eqn):
        if eqn.primitive.name not in ("random_bits", "threefry2x32", "bitcast_convert_type"):
            return ()
        return tuple((v.aval.shape, np.dtype(v.aval.dtype).itemsize) for v in eqn.outvars)

    return [(eqn.primitive.name, bits(eqn), [_primitives(body) for body in bodies(eqn)]) for eqn in jaxpr.eqns]


def _where(eqn) -> str:
    try:
        from jax._src import source_info_util

        return source_info_util.summarize(eqn.source_info)
    except (ImportError, AttributeError):  # a private module: only the wording of a report depends on it
        return "unknown line"


class _Run:
    """One evaluation of a program. The first, the reference, writes a tape; the draws read it."""

    def __init__(self, precision: str, tape: list | None = None, noise: Callable | None = None, shake=None):
        self.unit, self.single = unit_roundoff(precision), unit_roundoff("float32")
        self.reference = tape is None
        self.tape: list[Any] = [] if tape is None else tape
        self.at = 0
        self.noise = noise
        self.shake = shake
        self.taps: dict[str, np.ndarray] = {}
        self.kinds: dict[str, Any] = {}
        """The types of the taps."""
        self.choices: list[tuple[str, str, np.ndarray]] = []
        self.pins: dict[str, None] = {}
        self.precision = precision

    # -- the tape ---------------------------------------------------------------------------------------------
    def recall(self, make: Callable[[], Any]) -> Any:
        """Write `make()` in the reference run, read it back in a draw."""
        if self.reference:
            item = make()
            self.tape.append(item)
            return item
        item = self.tape[self.at]
        self.at += 1
        return item

    # -- evaluation -------------------------------------------------------------------------------------------
    def jaxpr(self, values, types, consts, args):
        env: dict[Any, np.ndarray] = dict(zip(values.constvars, consts))
        env.update(zip(values.invars, args))
        steps, results = _plan(values, types)
        reference, tape, noise = self.reference, self.tape, self.noise
        for eqn, typed, operands, whole, mover, rounds, dead in steps:
            inputs = [env[x] if known is None else known for x, known in operands]
            if whole:
                # Integers and bools are the same in every draw, because every choice is replayed: computed once.
                outputs = self.recall(partial(self.value, eqn, inputs))
            elif mover is None or reference:
                outputs = self.equation(eqn, typed, inputs)
            else:  # a draw repeats a step that the reference has been through: `equation` without its questions
                outputs = mover(inputs)
                if rounds:
                    item = tape[self.at]
                    self.at += 1
                    if item is not None and noise is not None:
                        outputs = noise(outputs, item)
                outputs = outputs if isinstance(outputs, (list, tuple)) else (outputs,)
            if len(outputs) == 1:
                env[eqn.outvars[0]] = outputs[0]
            else:
                env.update(zip(eqn.outvars, outputs))
            for var in dead:
                del env[var]
        return [env[x] if known is None else known for x, known in results]

    def equation(self, eqn, typed, inputs) -> list:
        name = eqn.primitive.name
        if name in CALLS:
            inner, inner_typed = inside(eqn), inside(typed)
            if inner is None or inner_typed is None:
                raise CannotLook(f"primitive {name!r} calls a function that this version of JAX does not show")
            return self.jaxpr(inner[0], inner_typed[0], [_lift(c) for c in inner[1]], inputs)
        if name == "cond":
            return self.cond(eqn, typed, inputs)
        if name == "while":
            return self.loop(eqn, typed, inputs)
        if name == "scan":
            return self.scan(eqn, typed, inputs)
        if name == "top_k":
            return self.top_k(eqn, inputs)
        if name == "sort":
            return self.sort(eqn, inputs)
        if name in CASTS:
            return [self.cast(eqn, typed, inputs[0])]
        if name not in RULES:
            raise CannotLook(
                f"primitive {name!r} ({_where(eqn)}) has no rounding rule; add one to parity/primitives.py: "
                "nothing was assumed about it"
            )
        if name in DISCRETE:  # those with a float result (sign, floor, ceil, round); the others are replayed above
            return self.recall(lambda: self.value(eqn, inputs))
        outputs = self.value(eqn, inputs)
        if name == "name" and eqn.params["name"] not in self.taps:
            self.taps[eqn.params["name"]] = outputs[0]
            self.kinds[eqn.params["name"]] = typed.outvars[0].aval.dtype
        rule = RULES[name]
        if rule is None or outputs[0].dtype.kind not in "fc":
            return outputs
        where = (eqn, inputs, rule)
        return [self.rounded(outputs[0], typed, lambda: rule(eqn, inputs, outputs), where), *outputs[1:]]

    def value(self, eqn, inputs) -> list:
        implementation = IMPLEMENTATIONS.get(eqn.primitive.name)
        try:
            evaluate = implementation or (lambda eqn, inputs: by_jax(eqn, *inputs))
            out = evaluate(eqn, inputs) if self.reference else OverDraws(eqn, evaluate)(inputs)
        except CannotLook as error:
            raise CannotLook(f"primitive {eqn.primitive.name!r} ({_where(eqn)}): {error}") from error
        except Exception as error:
            words = f"could not be evaluated: {type(error).__name__}: {str(error)[:200]}"
            raise CannotLook(f"primitive {eqn.primitive.name!r} ({_where(eqn)}) {words}") from error
        return [o if _is_key(o.dtype) else np.asarray(o) for o in (out if isinstance(out, (list, tuple)) else [out])]

    def rounded(self, out: np.ndarray, typed, variance: Callable[[], np.ndarray], step: Any = None) -> np.ndarray:
        """Add the noise of one rounding; `typed` tells the type that it rounds to.

        `step` is (equation, inputs, rule) where a primitive's own rule gives the variance.
        """

        def deviation():
            var = variance()
            kind = typed.outvars[0].aval.dtype
            own = self.roundoff(kind)
            pinned = own > self.unit and self.precision == "float64"
            if pinned and np.any(var > 0):
                self.pins.setdefault(_where(typed))
            name = typed.primitive.name
            if own > self.single and name in ACCUMULATES:
                # Products of narrow types are summed in float32 and rounded once.
                var = var * self.single**2 + np.square(own * out) / 3
                std = np.sqrt(var) / self.unit
            else:
                std = np.sqrt(var) * (own / self.unit)
                if step is not None:
                    eqn, inputs, rule = step
                    std = lifted(eqn, inputs, rule, out, np.sqrt(var)) * (own / self.unit)
            # Below the smallest normal number the error is absolute: hardware may flush the result to zero.
            tiny = _tiny(kind)
            std = np.where((np.abs(out) < tiny) & (std > 0), np.maximum(std, tiny / self.unit), std)
            within = min(tiny, _tiny("float32"))  # products of narrow types are float32 numbers
            if step is not None and (lost := lost_products(step[0], step[1], within)) is not None:
                std = np.hypot(std, lost / self.unit)
            std = np.where(np.isfinite(std) & np.isfinite(out), std, 0.0)
            return _Rounding(std, pinned) if std.any() else None

        item = self.recall(deviation)
        return out if item is None or self.noise is None else self.noise(out, item)

    def roundoff(self, dtype) -> float:
        dtype = np.dtype(dtype)
        if dtype.kind == "c":
            dtype = np.dtype(f"f{dtype.itemsize // 2}")
        return _eps(dtype) / 2

    def cast(self, eqn, typed, x: np.ndarray) -> np.ndarray:
        if eqn.primitive.name == "reduce_precision":
            relative = 2.0 ** -(eqn.params["mantissa_bits"] + 1) / self.roundoff(typed.outvars[0].aval.dtype)
            return self.rounded(x, typed, lambda: np.square(relative * x) / 3) if relative > 1 else x
        kind = typed.params["new_dtype"]
        if _is_float(kind):
            source = typed.invars[0].aval.dtype
            if not _is_float(source):
                exact = x.astype(np.float64)
                if self.shake is not None:  # an integer that becomes a float is an input too: a position, a count
                    exact = self.shake(exact)
                return self.rounded(exact, typed, lambda: np.where(_fits(exact, kind), 0.0, np.square(exact) / 3))
            if self.roundoff(kind) > self.roundoff(source):
                return self.rounded(x, typed, lambda: np.square(x) / 3)
            return x
        if np.dtype(kind).kind == "c":
            return x.astype(np.complex128)
        if x.dtype.kind == "f":  # to an integer or a bool: a choice
            return self.recall(lambda: _to_integer(x, kind))
        return x.astype(kind)

    # -- choices ----------------------------------------------------------------------------------------------
    def top_k(self, eqn, inputs) -> list:
        x, k = inputs[0], eqn.params["k"]
        kind = eqn.outvars[1].aval.dtype
        order = self.recall(lambda: np.argsort(-x, axis=-1, kind="stable")[..., : k + 1])
        sorted_ = np.take_along_axis(x, order[None] if x.ndim > order.ndim else order, -1)
        if order.shape[-1] > k:  # a tie inside the chosen set only reorders it; one at its edge changes it
            self.choices.append(("top_k", _where(eqn), sorted_[..., k - 1] - sorted_[..., k]))
        return [sorted_[..., :k], order[..., :k].astype(kind)]

    def sort(self, eqn, inputs) -> list:
        axis, keys = eqn.params["dimension"], eqn.params["num_keys"]
        order = self.recall(lambda: np.lexsort([np.asarray(k) for k in reversed(inputs[:keys])], axis=axis))
        return [
            np.take_along_axis(x, order, axis) if x.ndim == order.ndim else np.take_along_axis(x, order[None], axis + 1)
            for x in inputs
        ]

    # -- control flow: decisions are replayed because comparisons are ---------------------------------------------
    def cond(self, eqn, typed, inputs) -> list:
        index, *operands = inputs
        branches, branches_typed = eqn.params["branches"], typed.params["branches"]
        at = int(np.clip(int(index), 0, len(branches) - 1))
        chosen, chosen_typed = branches[at], branches_typed[at]
        return self.jaxpr(chosen.jaxpr, chosen_typed.jaxpr, [_lift(c) for c in chosen.consts], operands)

    def loop(self, eqn, typed, inputs) -> list:
        p, q = eqn.params, typed.params
        nc, nb = p["cond_nconsts"], p["body_nconsts"]
        cond_consts, body_consts, carry = inputs[:nc], inputs[nc : nc + nb], inputs[nc + nb :]

        def call(which, consts):
            closed, closed_typed = p[which], q[which]
            return self.jaxpr(closed.jaxpr, closed_typed.jaxpr, [_lift(c) for c in closed.consts], [*consts, *carry])

        while bool(call("cond_jaxpr", cond_consts)[0]):
            carry = call("body_jaxpr", body_consts)
        return list(carry)

    def scan(self, eqn, typed, inputs) -> list:
        p = eqn.params
        consts, carry = inputs[: p["num_consts"]], inputs[p["num_consts"] : p["num_consts"] + p["num_carry"]]
        columns = inputs[p["num_consts"] + p["num_carry"] :]
        body, body_typed = p["jaxpr"], typed.params["jaxpr"]
        drawn_columns = [x.ndim > len(v.aval.shape) for x, v in zip(columns, eqn.invars[len(inputs) - len(columns) :])]
        stacked: list[list] = []
        steps = range(p["length"])
        for i in reversed(steps) if p["reverse"] else steps:
            args = [*consts, *carry, *(x[:, i] if drawn else x[i] for x, drawn in zip(columns, drawn_columns))]
            out = self.jaxpr(body.jaxpr, body_typed.jaxpr, [_lift(c) for c in body.consts], args)
            carry = out[: p["num_carry"]]
            stacked.append(out[p["num_carry"] :])
        if p["reverse"]:
            stacked.reverse()
        results = eqn.outvars[p["num_carry"] :]
        if not stacked:
            return [*carry, *(np.zeros(v.aval.shape, _lifted_kind(v.aval.dtype)) for v in results)]
        rows = []
        for v, column in zip(results, zip(*stacked)):
            rank = len(v.aval.shape) - 1
            drawn = next((len(x) for x in column if x.ndim > rank), 0)
            rows.append(np.stack([with_draws(x, rank, drawn) for x in column], 1) if drawn else np.stack(column))
        return [*carry, *rows]


CASTS = {"convert_element_type", "reduce_precision"}
ACCUMULATES = {"dot_general", "conv_general_dilated"}
"""Sums of narrow numbers that are no products are not among them: XLA's CPU adds them up as they are. (jnp.sum says
itself that they are to be widened; what JAX makes of a broadcast in the backward pass does not.)"""


@lru_cache(maxsize=64)
def _eps(dtype) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype).eps)


@lru_cache(maxsize=64)
def _tiny(dtype) -> float:
    import ml_dtypes

    dtype = np.dtype(f"f{np.dtype(dtype).itemsize // 2}") if np.dtype(dtype).kind == "c" else np.dtype(dtype)
    return float(ml_dtypes.finfo(dtype).smallest_normal)


def _fits(x: np.ndarray, dtype) -> np.ndarray:
    return x.astype(dtype).astype(np.float64) == x


def _to_integer(x: np.ndarray, dtype) -> np.ndarray:
    if np.dtype(dtype) == bool:
        return x != 0
    info = np.iinfo(dtype)
    # XLA saturates and sends NaN to 0; numpy's own cast is undefined there.
    whole = np.nan_to_num(np.trunc(x), nan=0.0)
    # float(info.max) may be one too large for the type: what reaches it is set, not converted.
    high = whole >= float(info.max)
    return np.where(high, info.max, np.clip(np.where(high, 0, whole), float(info.min), None).astype(dtype)).astype(
        dtype
    )


def _lifted_kind(dtype):
    return np.float64 if _is_float(dtype) else (np.complex128 if np.dtype(dtype).kind == "c" else dtype)


def _lift(x) -> np.ndarray:
    """A constant or argument as float64 (complex128); integers, bools and keys stay what they are."""
    if _is_key(getattr(x, "dtype", "")):
        return x
    array = np.asarray(x)
    return array.astype(_lifted_kind(array.dtype), copy=False)


_PLANS: dict[tuple[int, int], tuple[Any, Any, Any]] = {}


def _plan(values, types) -> tuple[list, list]:
    """What a jaxpr's evaluation needs at every draw, found once.

    Per equation: itself, its typed twin, its operands as (variable, None) or (None, literal), whether it yields only
    integers and bools by an implementation of ours, its evaluation in draws if it makes no choice, whether its one
    float result is rounded, and the variables that die with it (memory is that of live ones).
    """
    key = (id(values), id(types))
    known = _PLANS.get(key)
    if known is not None and known[0] is values and known[1] is types:
        return known[2]

    def operand(atom):
        return (None, _lift(atom.val)) if hasattr(atom, "val") else (atom, None)

    last: dict[Any, int] = {}
    for i, eqn in enumerate(values.eqns):
        last.update((atom, i) for atom in (*eqn.invars, *eqn.outvars) if not hasattr(atom, "val"))
    for atom in values.outvars:
        if not hasattr(atom, "val"):
            last.pop(atom, None)
    dead: dict[int, list] = {}
    for var, i in last.items():
        dead.setdefault(i, []).append(var)
    steps = []
    for i, (eqn, typed) in enumerate(zip(values.eqns, types.eqns)):
        counts = all(not _is_key(v.aval.dtype) and np.dtype(v.aval.dtype).kind in "iub" for v in eqn.outvars)
        whole = counts and RULES.get(eqn.primitive.name, 0) is None
        name = eqn.primitive.name
        rounds = RULES.get(name) is not None
        floats = len(eqn.outvars) == 1 and not counts
        plain = name in RULES and name not in DISCRETE and name != "name" and name not in CALLS
        evaluate = IMPLEMENTATIONS.get(name) if plain and name not in CASTS and (floats or not rounds) else None
        mover = None if evaluate is None else OverDraws(eqn, evaluate)
        steps.append((eqn, typed, [operand(x) for x in eqn.invars], whole, mover, rounds, dead.get(i, ())))
    if len(_PLANS) > 4096:
        _PLANS.clear()
    plan = (steps, [operand(x) for x in values.outvars])
    _PLANS[key] = (values, types, plan)
    return plan


@dataclass
class _Rounding:
    """An entry of the tape: the standard deviation that one rounding adds, per unit roundoff."""

    std: np.ndarray
    pinned: bool


@lru_cache(maxsize=4)
def _block(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size)


class _Pool:
    """Standard normal numbers from one block, cut at random offsets: as good as new ones here, and free."""

    SIZE = 1 << 20

    def __init__(self, seed: int):
        self.rng = np.random.default_rng([seed, 1])
        self.offset = random.Random(seed).random
        self.block = _block(seed, self.SIZE)

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        size = math.prod(shape)
        if size > self.SIZE // 4:
            return self.rng.standard_normal(shape)
        at = int(self.offset() * (self.SIZE - size))
        return self.block[at : at + size].reshape(shape)

    def draws(self, count: int, shape: tuple[int, ...], kind: str) -> np.ndarray:
        """`count` draws of unit noise; a complex number errs in both parts, and its unit is that of the modulus.

        Each is cut by itself: where two steps' cuts overlap, another draw must not have the same overlap.
        """
        if kind == "c":
            return (self.draws(count, shape, "f") + 1j * self.draws(count, shape, "f")) / math.sqrt(2)
        out = np.empty((count, *shape))
        for i in range(count):
            out[i] = self.take(shape)
        return out


@lru_cache(maxsize=1)
def _pools() -> Any:
    """The thread pools of this process; looking for them takes longer than an evaluation."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def measure_noise(fn: Callable, args: Sequence[Any], precision: str, *, draws: int = 16, seed: int = 0) -> NoiseModel:
    """The float64 reference and the noise of `fn(*args)` in `precision`.

    `args` are pytrees of numpy arrays whose float leaves are exactly representable in `precision`. The result's
    arrays follow jax.tree.leaves of the function's result; sigma and kappa are per unit roundoff.
    """
    return measure_program(trace(fn, args, precision), args, draws=draws, seed=seed)


def measure_program(
    program: Program, args: Sequence[Any], *, draws: int = 16, seed: int = 0, kappa: bool = True
) -> NoiseModel:
    """`measure_noise` for a function that is already traced (the same program with other values).

    Without `kappa` the conditioning is left out (0), which saves three evaluations.
    """
    import jax

    if draws < 2:
        raise ValueError(f"draws: {draws} is too few, at least 2 are needed to tell a spread; use 16 or more")
    leaves = [_lift(x) for x in jax.tree.leaves(tuple(args))]
    consts = [_lift(c) for c in program.values.consts]
    precision = program.precision
    together = max(1, TOGETHER // max(_largest(program.values.jaxpr), 1))

    def evaluate(run: _Run, inputs):
        # Small products by several BLAS threads cost several times their work in waiting.
        with np.errstate(all="ignore"), _pools().limit(limits=1, user_api="blas"):
            return run.jaxpr(program.values.jaxpr, program.types.jaxpr, consts, inputs), run.taps

    first = _Run(precision)
    reference, taps = evaluate(first, leaves)
    tape = first.tape
    names = list(taps)
    pool = _Pool(seed)
    amplitude = AMPLITUDE
    widest = widest_roundoff(program)
    if widest > 1 and precision != "float64":
        amplitude = max(AMPLITUDE / widest, SMALLEST_AMPLITUDE)

    def sample(count, scale, noise=None, shake=None):
        """Errors of `count` noisy runs, per unit roundoff: outputs and taps, each (count, *shape); and the choices."""
        rows: list[list[np.ndarray]] = []
        margins: list[list[np.ndarray]] = []
        for at in range(0, count, together):
            now = min(together, count - at)
            run = _Run(precision, tape, noise and partial(noise, now), shake and partial(shake, now))
            out, marks = evaluate(run, leaves if run.shake is None else [run.shake(x) for x in leaves])
            with np.errstate(invalid="ignore"):
                found = zip([*out, *(marks[n] for n in names)], whole)
                rows.append([with_draws(_error(a, b) / scale, b.ndim, now) for a, b in found])
                edges = zip(run.choices, first.choices)
                margins.append([with_draws((c[2] - b[2]) / scale, b[2].ndim, now) for c, b in edges])
        return [np.concatenate(column) for column in zip(*rows)], [np.concatenate(column) for column in zip(*margins)]

    whole = [*reference, *(taps[n] for n in names)]

    for item in tape:
        if isinstance(item, _Rounding):
            item.std *= amplitude

    def rounding(count, out, item):
        return out if item.pinned else out + item.std * pool.draws(count, item.std.shape, out.dtype.kind)

    errors, margins = sample(draws, amplitude, rounding)

    def shake(count, x):
        if _is_key(x.dtype) or x.dtype.kind not in "fc":
            return x
        moved = AMPLITUDE * np.where(np.isfinite(x), x, 0.0) * pool.draws(count, x.shape, x.dtype.kind) / math.sqrt(3)
        return x + moved  # a mask's -inf stays where it is

    moved = sample(min(draws, 3), AMPLITUDE, shake=shake)[0] if kappa else [np.zeros(0)] * len(errors)
    noise = []
    kinds = [*(v.aval.dtype for v in program.types.jaxpr.outvars), *(first.kinds[n] for n in names)]
    for exact, kind, error, move in zip(whole, kinds, errors, moved):
        sigma, dof = pool_sigma(error)
        if _is_float(kind) and first.roundoff(kind) == first.unit:
            sigma = np.where(sigma > 0, np.maximum(sigma, stored_noise(exact)), sigma)
        noise.append(Noise(sigma, dof, float(np.sqrt(np.mean(np.square(move)))) if move.size else 0.0))

    pinned = None
    if first.pins:
        narrow = unit_roundoff("float32")

        def pin_only(count, out, item):
            noise = pool.draws(count, item.std.shape, out.dtype.kind)
            return out + item.std * (first.unit / narrow) * noise if item.pinned else out

        pin_errors, _ = sample(draws, AMPLITUDE / narrow, pin_only)
        pinned = [Noise(*pool_sigma(error), 0.0) for error in pin_errors]

    choices = [
        Choice(name, where, margin, np.sqrt(np.mean(np.square(noisy), axis=0)))
        for (name, where, margin), noisy in zip(first.choices, margins)
    ]
    split = len(reference)
    return NoiseModel(
        reference=reference,
        noise=noise[:split],
        taps=dict(zip(names, whole[split:])),
        tap_noise=dict(zip(names, noise[split:])),
        choices=choices,
        pins=tuple(first.pins),
        pinned=pinned[:split] if pinned else None,
        pinned_taps=dict(zip(names, pinned[split:])) if pinned else None,
        tree=program.tree,
        notes=list(program.notes),
    )


def stored_noise(exact: np.ndarray) -> np.ndarray:
    """Standard deviation, per unit roundoff, of the rounding that every stored number has had: 2^e / √3 for m · 2^e.

    The least that an element which is not exact can have: a smaller figure is the luck of a few draws.
    """
    with np.errstate(invalid="ignore"):
        _, exponent = np.frexp(np.where(np.isfinite(exact), np.abs(exact), 0.0))
        return np.where(exact == 0, 0.0, np.ldexp(1.0, exponent - 1) / math.sqrt(3))


def _error(noisy: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """noisy − exact where both are finite; 0 where they agree that it is not; integers must not move."""
    if exact.dtype.kind not in "fc":
        return np.zeros(exact.shape)
    difference = np.asarray(noisy - exact)
    difference = np.abs(difference) if difference.dtype.kind == "c" else difference
    return np.where(np.isfinite(difference), difference, 0.0)


def _largest(jaxpr) -> int:
    """The number of elements of the largest array that a program makes."""
    sizes = [math.prod(getattr(v.aval, "shape", ())) for eqn in jaxpr.eqns for v in eqn.outvars]
    return max([1, *sizes, *(_largest(body) for eqn in jaxpr.eqns for body in bodies(eqn))])


def widest_roundoff(program: Program) -> float:
    """The largest roundoff of any float in the program, relative to the working one."""
    widest = 1.0

    def walk(jaxpr):
        nonlocal widest
        for eqn in jaxpr.eqns:
            for var in eqn.outvars:
                kind = getattr(var.aval, "dtype", None)
                if kind is not None and _is_float(kind):
                    widest = max(widest, _eps(np.dtype(kind)) / 2 / unit_roundoff(program.precision))
            for body in bodies(eqn):
                walk(body)

    walk(program.types.jaxpr)
    return widest
