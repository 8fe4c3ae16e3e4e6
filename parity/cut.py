"""A pair cut at its taps: every part is fed the reference's activation, so that no part inherits another's error."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from parity.errors import CannotLook
from parity.pair import Pair
from parity.sides import with_taps
from parity.weights import Link

__all__ = ["TAP", "cotangents", "cut"]

TAP = "tap "
"""Before the name of a tap among the parameters of a cut pair."""


def cut(
    pair: Pair, taps: Mapping[str, str], shapes: Mapping[str, Any], arrives: Mapping[str, np.ndarray] | None = None
) -> Pair:
    """A pair whose parameters are the pair's and, as "tap NAME", the activations that stand at its taps.

    It returns what each part makes of them: "taps.NAME" for every tap, and "outputs". `taps` maps the name of a tap to
    the path of its torch sub-module, `shapes` to its shape, `arrives` to the reference's gradient there: with it (and a
    loss) the loss of the cut pair hands exactly that back to every part, so that the gradient of a parameter, or of a
    tap, is what its own part makes of it.
    """
    import jax

    names = list(taps)

    def jax_cut(params: Any, *inputs: Any) -> dict[str, Any]:
        given = dict(zip(names, params["taps"]))
        outputs, seen = _tapped(pair.jax, params["own"], inputs, lambda name, value: given.get(name, value))
        return _together(outputs, {name: seen[name] for name in names})

    template = {
        "own": pair.template,
        "taps": [jax.ShapeDtypeStruct(tuple(shapes[name]), np.float32) for name in names],
    }
    links = [Link(f"own.{link.jax}" if link.jax else "own", link.torch, link.axes) for link in pair.links]
    links += [Link(f"taps.{i}", f"{TAP}{name}") for i, name in enumerate(names)]
    made = copy.copy(pair)
    made.jax, made.template, made.links, made.taps = jax_cut, template, links, {}
    made.torch, made.torch_call = _TorchCut(pair, taps), None
    made.loss = None if pair.loss is None or arrives is None else _losses(pair, names, arrives)
    made.name = f"{pair.name}, cut"
    return made


def _together(outputs: Any, seen: Mapping[str, Any]) -> dict[str, Any]:
    return {"outputs": outputs, "taps": dict(seen)}


def _tapped(
    function: Callable[..., Any], params: Any, inputs: Sequence[Any], behind: Callable[[str, Any], Any]
) -> tuple[Any, dict[str, Any]]:
    """(result, what arrived at each tap) of a JAX function that goes on from `behind(name, value)` at each tap."""
    import jax

    closed, shape = jax.make_jaxpr(function, return_shape=True)(params, *inputs)
    leaves, seen = with_taps(closed, behind)(*jax.tree.leaves((params, *inputs)))
    return jax.tree.unflatten(jax.tree.structure(shape), leaves), seen


class _TorchCut:
    """The torch module as a function of named tensors: a hook behind each tap hands on what is given."""

    def __init__(self, pair: Pair, taps: Mapping[str, str]):
        if not hasattr(pair.torch, "named_modules"):
            raise CannotLook("the torch side is a function: only a module has sub-modules that can be fed one by one")
        self.pair, self.taps = pair, taps
        import torch

        # Made beforehand: in a run in float64, the making would look like a rounding to float32.
        wide = torch.float64, torch.device("cpu")
        self.modules: dict[Any, Any] = {wide: copy.deepcopy(pair.torch).to(wide[1], wide[0])}

    def __call__(self, named: Mapping[str, Any], *inputs: Any) -> dict[str, Any]:
        from torch.nn.utils import stateless

        pair = self.pair
        own = {name: value for name, value in named.items() if not name.startswith(TAP)}
        dtype = next((x.dtype for x in own.values() if x.is_floating_point()), None)
        device = next((x.device for x in named.values()), None)
        if (dtype, device) not in self.modules:
            self.modules[dtype, device] = copy.deepcopy(pair.torch).to(device, dtype)
        module = self.modules[dtype, device]
        seen: dict[str, Any] = {}

        def hook(tap: str) -> Callable[..., Any]:
            def behind(_module: Any, _args: Any, output: Any) -> Any:
                if tap in seen:
                    return None
                seen[tap] = output
                return named[f"{TAP}{tap}"]

            return behind

        handles = [module.get_submodule(path).register_forward_hook(hook(tap)) for tap, path in self.taps.items()]
        entry = pair.torch_call or (lambda module, *inputs: module(*inputs))
        try:
            with stateless._reparametrize_module(module, own):
                outputs = entry(module, *inputs)
        finally:
            for handle in handles:
                handle.remove()
        return _together(outputs, seen)


def _losses(pair: Pair, names: Sequence[str], arrives: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
    """The pair's own loss, and of each tap its product with the gradient that arrives there."""
    assert pair.loss is not None
    own = pair.loss

    def jax_loss(result: Any, *inputs: Any) -> Any:
        import jax.numpy as jnp

        total = own[0](result["outputs"], *inputs)
        for name in names:
            value = result["taps"][name]
            total = total + jnp.sum(value * jnp.asarray(arrives[name], value.dtype))
        return total

    def torch_loss(result: Any, *inputs: Any) -> Any:
        import torch

        total = own[1](result["outputs"], *inputs)
        for name in names:
            value = result["taps"][name]
            total = total + (value * torch.as_tensor(arrives[name], dtype=value.dtype, device=value.device)).sum()
        return total

    return jax_loss, torch_loss


def cotangents(pair: Pair, params: Any, inputs: Sequence[Any], taps: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The gradient of the pair's loss at each tap, by the reference's interpreter in float64."""
    import jax

    from parity.noise import Tracer, _lift, _pools, _Run

    assert pair.loss is not None
    names, loss = list(taps), pair.loss[0]

    def gradient(params: Any, given: Any, *inputs: Any) -> Any:
        def total(added: Any) -> Any:
            extra = dict(zip(names, added))
            behind = lambda name, value: value + extra[name] if name in extra else value  # noqa: E731
            return loss(_tapped(pair.jax, params, inputs, behind)[0], *inputs)

        return jax.grad(total)(given)

    zeros = [np.zeros_like(taps[name]) for name in names]
    args = (params, zeros, *inputs)
    program = Tracer(gradient).program(args, "float64")
    run = _Run("float64")
    with np.errstate(all="ignore"), _pools().limit(limits=1, user_api="blas"):
        consts = [_lift(c) for c in program.values.consts]
        found = run.jaxpr(program.values.jaxpr, program.types.jaxpr, consts, [_lift(x) for x in jax.tree.leaves(args)])
    return dict(zip(names, found))
