"""Runs one side of a pair on real weights and inputs: JAX compiled as it is, torch as it is, results as float64 numpy.

Nothing is judged here. A side that raises is a `CannotLook` in its own words; a "float64" result of another type is
an error, because then nothing was tested.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from parity.errors import CannotLook, Misuse
from parity.noise import Tracer, bodies, inside
from parity.pair import Pair
from parity.precision import precision as format_of
from parity.primitives import bind_equation

__all__ = ["JaxSide", "TorchSide", "as_inputs", "compiled", "compiler_options", "one_thread", "with_taps"]

LOOPS = ("scan", "while", "cond")


def as_inputs(inputs: Sequence[Any], precision: str) -> tuple[np.ndarray, ...]:
    """Float arrays in the precision's type, integers as int32 (the same on both sides), bools as they are."""
    dtype = format_of(precision).numpy
    arrays = []
    for x in inputs:
        array = np.asarray(x)
        if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
            array = array.astype(dtype)
        elif array.dtype.kind in "iu":
            if array.size and (array.max() > np.iinfo(np.int32).max or array.min() < np.iinfo(np.int32).min):
                raise Misuse(
                    f"inputs[{len(arrays)}]: holds integers beyond int32, which JAX would wrap; give smaller ones"
                )
            array = array.astype(np.int32)
        arrays.append(array)
    return tuple(arrays)


def with_taps(
    closed: Any, behind: Callable[[str, Any], Any] = lambda _, value: value
) -> Callable[..., tuple[list[Any], dict[str, Any]]]:
    """A closed jaxpr as a function of its leaves: (output leaves, what arrived at each tap), for whoever traces it.

    It goes on from `behind(name, value)` at each tap. Calls that name something are entered; loops and branches are
    bound whole (what they name stays inside).
    """

    @cache
    def names(jaxpr) -> bool:
        return any(
            eqn.primitive.name == "name" or (eqn.primitive.name not in LOOPS and any(map(names, bodies(eqn))))
            for eqn in jaxpr.eqns
        )

    def run(*leaves):
        taps: dict[str, Any] = {}

        def evaluate(jaxpr, consts, values):
            env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, values))
            read = lambda v: v.val if hasattr(v, "val") else env[v]  # noqa: E731
            for eqn in jaxpr.eqns:
                inputs = [read(v) for v in eqn.invars]
                inner = None if eqn.primitive.name in LOOPS else inside(eqn)
                if inner is not None and names(inner[0]):
                    outputs = evaluate(*inner, inputs)
                elif eqn.primitive.name == "name" and (name := eqn.params["name"]) not in taps:
                    taps[name] = inputs[0]
                    outputs = [behind(name, inputs[0])]
                else:
                    outputs = bind_equation(eqn, eqn.params, inputs)
                env.update(zip(eqn.outvars, outputs))
            return [read(v) for v in jaxpr.outvars]

        return evaluate(closed.jaxpr, closed.consts, leaves), taps

    return run


class JaxSide:
    """The JAX function, compiled once per precision and set of shapes."""

    def __init__(self, pair: Pair, tracer: Tracer, device: Any = None):
        self.pair, self.tracer, self.device = pair, tracer, device
        self.compiled: dict[int, tuple[Any, Any]] = {}

    def __call__(self, weights: Mapping[str, np.ndarray], inputs: Sequence[Any], precision: str):
        """(named results, taps), float64 numpy arrays in torch's names and layout."""
        import jax

        dtype = format_of(precision).numpy
        params = self.pair.jax_params({k: np.asarray(v).astype(dtype) for k, v in weights.items()})
        args = (params, *as_inputs(inputs, precision))
        device = self.device or jax.devices("cpu")[0]
        try:
            with jax.enable_x64(precision == "float64"), jax.default_device(device):
                closed, tree = self.tracer.jaxpr(args, precision)
                if id(closed) not in self.compiled:
                    # The closed jaxpr is kept beside the function so that its id stays its own.
                    lowered = jax.jit(with_taps(closed)).lower(*jax.tree.leaves(args))
                    options = compiler_options(self.pair.hasty or precision != "float32", precision, device)
                    self.compiled[id(closed)] = (compiled(lowered, options), closed)
                leaves, taps = self.compiled[id(closed)][0](*jax.tree.leaves(args))
                if precision == "float64":
                    _demand_float64("jax", [x.dtype for x in leaves])
                named = self.pair.named(jax.tree.unflatten(tree, [np.asarray(x) for x in leaves]))
                return _as_float64(named), _as_float64({k: np.asarray(v) for k, v in taps.items()})
        except CannotLook:
            raise
        except Exception as error:
            raise CannotLook(f"the JAX side raised {type(error).__name__}: {_first_lines(error)}") from error


def compiler_options(hasty: bool, precision: str, device: Any) -> dict[str, Any]:
    """float32 is compiled as users compile it, unless haste is asked for.

    The float64 question is about meaning, and bfloat16 on a CPU is nobody's target: there LLVM's optimiser and XLA's
    newer emitters are off, and compiling is much quicker. In bfloat16 every rounding that the program writes is made
    (XLA may otherwise keep a wider intermediate): what the noise model assumes.
    """
    if device.platform != "cpu" or not hasty:
        return {}
    return {
        "xla_backend_optimization_level": 0,
        "xla_cpu_use_fusion_emitters": False,
        "xla_allow_excess_precision": precision != "bfloat16",
    }


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch with one thread: small models gain nothing from a second, and beside other processes it waits for them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compiled(lowered: Any, options: Mapping[str, Any]) -> Any:
    """`lowered.compile(options)`, without those options that this release of XLA does not know."""
    options = dict(options)
    while True:
        try:
            return lowered.compile(options or None)
        except Exception as error:
            unknown = [name for name in options if "No such compile option" in str(error) and name in str(error)]
            if not unknown:
                raise
            for name in unknown:
                del options[name]


class TorchSide:
    """The torch module or function, in the precision asked for; gradients by autograd."""

    def __init__(self, pair: Pair, device: Any = "cpu"):
        self.pair, self.device = pair, device or "cpu"
        self.pins: tuple[str, ...] = ()
        self.modules: dict[Any, Any] = {}

    def __call__(self, weights: Mapping[str, np.ndarray], inputs: Sequence[Any], precision: str):
        import torch

        pair, dtype = self.pair, getattr(torch, precision)
        tensors = {k: _tensor(v, precision).to(self.device) for k, v in weights.items()}
        arguments = [_tensor(x, precision).to(self.device) for x in as_inputs(inputs, precision)]
        taps: dict[str, Any] = {}
        handles = []
        try:
            if isinstance(pair.torch, torch.nn.Module):
                module = self._module(dtype)
                with torch.no_grad():
                    for name, parameter in module.named_parameters():
                        parameter.copy_(tensors[name])
                named = dict(module.named_parameters())
                for name, child in module.named_modules():
                    handles.append(child.register_forward_hook(_keep(taps, name)))
                entry = pair.torch_call or (lambda module, *inputs: module(*inputs))
                call = lambda: entry(module, *arguments)  # noqa: E731
            else:
                named = {k: v.requires_grad_(pair.loss is not None) for k, v in tensors.items()}
                call = lambda: pair.torch(named, *arguments)  # noqa: E731
            watch = _PinWatch() if precision == "float64" else None
            with torch.set_grad_enabled(pair.loss is not None):
                with watch or contextlib.nullcontext():
                    outputs = call()
                    loss = None if pair.loss is None else pair.loss[1](outputs, *arguments)
                self.pins = tuple(watch.found) if watch else ()
                result = {"output" if k == "" else k: v for k, v in _flatten(outputs).items()}
                if loss is not None:
                    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
                    result["loss"] = loss
                    for (name, parameter), gradient in zip(named.items(), gradients):
                        result[f"gradient {name}"] = torch.zeros_like(parameter) if gradient is None else gradient
        except Exception as error:
            raise CannotLook(f"the torch side raised {type(error).__name__}: {_first_lines(error)}") from error
        finally:
            for handle in handles:
                handle.remove()
        if precision == "float64":
            _demand_float64("torch", [str(x.dtype).removeprefix("torch.") for x in result.values()])
        return _as_float64({k: _numpy(v) for k, v in result.items()}), _as_float64(
            {k: _numpy(v) for k, v in taps.items()}
        )

    def _module(self, dtype: Any) -> Any:
        """A copy of the pair's module; kept for the next weights if it has nothing else that a call could change."""
        made = self.modules.get(dtype)
        if made is None:
            made = copy.deepcopy(self.pair.torch).to(self.device, dtype)
            if not any(True for _ in made.buffers()):
                self.modules[dtype] = made
        return made


def _PinWatch():  # a class made on demand: its base lives in torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class PinWatch(TorchDispatchMode):
        """Names the operations of a float64 run whose results are narrower floats."""

        def __init__(self):
            super().__init__()
            self.found: dict[str, None] = {}

        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False  # else torch imports its compiler, seconds, to keep it away from a run that never compiles

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            import torch

            out = func(*args, **(kwargs or {}))
            for item in out if isinstance(out, (tuple, list)) else (out,):
                narrow = isinstance(item, torch.Tensor) and item.is_floating_point() and item.element_size() < 8
                if narrow and item.numel():
                    self.found.setdefault(f"torch {func}")
            return out

    return PinWatch()


def _keep(taps: dict[str, Any], name: str):
    def hook(module, args, output):
        import torch

        if isinstance(output, torch.Tensor) and output.is_floating_point():
            taps.setdefault(name, output.detach())

    return hook


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Named leaves in the same order and under the same names as jax's pytree of the same structure."""
    if isinstance(tree, Mapping):
        items = [(str(k), tree[k]) for k in sorted(tree)]
    elif isinstance(tree, (tuple, list)):
        items = [(str(i), v) for i, v in enumerate(tree)]
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat.update(_flatten(value, f"{prefix}.{key}" if prefix else key))
    return flat


def _tensor(array: Any, precision: str):
    import torch

    array = np.asarray(array)
    if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(array, np.float64)).to(getattr(torch, precision))
    if array.dtype.kind in "iu":
        return torch.from_numpy(np.array(array, np.int64))
    return torch.from_numpy(np.array(array))


def _numpy(tensor: Any) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()


def _as_float64(named: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    parts = [name for name, v in named.items() if v.dtype.kind == "c"]
    if parts:
        raise CannotLook(f"{', '.join(parts)}: complex; return real and imaginary parts, each is judged by itself")
    return {k: v.astype(np.float64) if v.dtype.kind not in "biu" else v for k, v in named.items()}


def _demand_float64(side: str, dtypes: Sequence[Any]) -> None:
    narrow = {str(d) for d in dtypes if str(d) in ("float32", "float16", "bfloat16")}
    if narrow:
        raise CannotLook(f"the {side} side returned {', '.join(sorted(narrow))} in its float64 run: nothing was tested")


def _first_lines(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or "no message"
