"""What is compared: a JAX function and a torch module or function, one set of weights, inputs, and named taps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity.errors import Misuse
from parity.weights import Link, bind, leaf_names, to_jax, to_torch

__all__ = ["Pair", "pair_of"]


@dataclass
class Pair:
    """Two functions that claim to be one.

    jax:    f(params, *inputs) -> pytree of arrays; params is a pytree like `template`.
    torch:  an nn.Module, called with *inputs (or as `torch_call(module, *inputs)` says), or g(params, *inputs) with
            params a dict of tensors by name.
    links:  the partner and the layout of every parameter (parity.weights.bind).
    loss:   (jax_loss(outputs, *inputs), torch_loss(outputs, *inputs)) -> scalar each; with it, the gradient of every
            parameter is compared as well.
    taps:   names that jax.ad_checkpoint.checkpoint_name gives and that are torch sub-modules: None means all of them.
    """

    jax: Callable[..., Any]
    torch: Any
    template: Any
    links: Sequence[Link]
    loss: tuple[Callable[..., Any], Callable[..., Any]] | None = None
    taps: Mapping[str, str] | None = None
    name: str = "pair"
    torch_call: Callable[..., Any] | None = None
    hasty: bool = False
    """Compile for the CPU in haste in every precision (docs/decisions/0003)."""

    def jax_program(self) -> Callable[..., dict[str, Any]]:
        """The function whose noise is measured and which is compiled: outputs, and loss and gradients if asked for."""
        if self.loss is None:
            return lambda params, *inputs: {"outputs": self.jax(params, *inputs)}
        jax_loss = self.loss[0]

        def program(params, *inputs):
            import jax

            def objective(p):
                outputs = self.jax(p, *inputs)
                return jax_loss(outputs, *inputs), outputs

            (value, outputs), gradients = jax.value_and_grad(objective, has_aux=True)(params)
            return {"outputs": outputs, "loss": value, "gradients": gradients}

        return program

    def jax_params(self, weights: Mapping[str, np.ndarray]) -> Any:
        return to_jax(self.links, weights, self.template)

    def weights(self, given: Mapping[str, np.ndarray] | None = None) -> Mapping[str, np.ndarray]:
        """Those given, by torch's names, or else the torch module's own."""
        if given is not None:
            return given
        if not hasattr(self.torch, "named_parameters"):
            raise Misuse("weights: a torch function has none of its own; pass weights={name: array}")
        return {name: value.detach().cpu().double().numpy() for name, value in self.torch.named_parameters()}

    def named(self, result: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """A result of `jax_program` (arrays of any kind) as flat names in torch's names and layout."""
        import jax

        flat: dict[str, np.ndarray] = {}
        leaves = jax.tree.leaves(result["outputs"])
        for name, leaf in zip(leaf_names(result["outputs"]), leaves):
            flat[name or "output"] = np.asarray(leaf)
        if "loss" in result:
            taken = [name for name in flat if name == "loss" or name.startswith("gradient ")]
            if taken:
                raise Misuse(f"outputs: {', '.join(taken)} is the name of a result of the loss; return it by another")
            flat["loss"] = np.asarray(result["loss"])
            gradients = to_torch(self.links, result["gradients"])
            flat.update({f"gradient {name}": value for name, value in gradients.items()})
        return flat


def pair_of(
    jax: Callable[..., Any],
    torch: Any,
    template: Any,
    *,
    loss: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    rename: Mapping[str, str] | None = None,
    axes: Mapping[str, tuple[int, ...]] | None = None,
    torch_shapes: Mapping[str, Sequence[int]] | None = None,
    taps: Mapping[str, str] | None = None,
    name: str = "pair",
    torch_call: Callable[..., Any] | None = None,
) -> Pair:
    """Bind a JAX function and a torch module (or a function with `torch_shapes`) by the name rules; fail-closed."""
    import jax as jax_

    jax_shapes = dict(zip(leaf_names(template), (tuple(np.shape(x)) for x in jax_.tree.leaves(template))))
    if torch_shapes is None:
        if not hasattr(torch, "named_parameters"):
            raise Misuse("torch_shapes: a torch function does not tell its parameters; pass {name: shape}")
        torch_shapes = {key: tuple(value.shape) for key, value in torch.named_parameters()}
    links = bind(jax_shapes, torch_shapes, rename=rename, axes=axes)
    return Pair(
        jax=jax, torch=torch, template=template, links=links, loss=loss, taps=taps, name=name, torch_call=torch_call
    )
