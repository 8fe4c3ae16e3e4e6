"""One training step and whole training runs of both twins over the same named weights: what `trajectory` compares.

Legend of the shape suffixes: R runs, N steps, P numbers in all parameters, B batch, T time.

A step is forward, cross-entropy, gradients, clipping by global norm, the scheduled learning rate and AdamW, each by the
twin's own public function.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from parity.corpus import byte_like_ids
from parity.errors import CannotLook
from parity.pair import Pair
from parity.weights import Link, bind, leaf_names, to_jax, under_torch_names

__all__ = ["BATCH", "CONFIG", "CYCLE", "HYPER", "RECIPE", "Run", "Training", "batches", "perturbed", "start"]

CONFIG: dict[str, Any] = {
    "vocab_size": 29, "n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 24, "dropout": 0.0, "rope_theta": 10000.0,
    "ctx_len": 16,
}  # fmt: skip
BATCH = (4, 10)
"""Rows and the length of a row."""
CYCLE = 6
"""So many batches, over and over: few enough that the loss falls far within one run."""
RECIPE = {"lr": 3e-2, "warmup_steps": 5, "max_steps": 50, "max_norm": 0.8, "min_ratio": 0.1}
"""Gradient norms lie on both sides of max_norm."""
HYPER: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def start(seed: int) -> dict[str, np.ndarray]:
    """Fresh float32 weights under torch names, by omni_torch's default initialisation."""
    import torch

    from omni_torch.config import ThinkerConfig
    from omni_torch.init import default_init_
    from omni_torch.thinker import ThinkerLM

    model = default_init_(ThinkerLM.from_config(ThinkerConfig(**CONFIG)), torch.Generator().manual_seed(seed))
    return {k: v.detach().numpy().copy() for k, v in model.named_parameters()}


def perturbed(weights: Mapping[str, np.ndarray], seed: int, number: int) -> dict[str, np.ndarray]:
    """Every weight moved to the next float32, up or down at random."""
    rng = np.random.default_rng([seed, number, 17])

    def move(x: np.ndarray) -> np.ndarray:
        way = np.where(rng.random(x.shape) < 1 / 2, np.float32(-np.inf), np.float32(np.inf))
        return np.where(x == 0, x, np.nextafter(x, way))

    return {name: move(x) for name, x in weights.items()}


def batches(seed: int, steps: int) -> tuple[Int[np.ndarray, "N B T"], Int[np.ndarray, "N B T"]]:
    """(tokens, targets) of every step; the target is the next token, PAD (which the loss ignores) beyond the end."""
    rows, length = BATCH
    kept = [byte_like_ids(CONFIG["vocab_size"], rows, length + 1, seed, i) for i in range(CYCLE)]
    ids = np.stack([kept[i % CYCLE] for i in range(steps)]).astype(np.int32)
    return ids[:, :, :-1], ids[:, :, 1:]


@dataclass(frozen=True)
class Run:
    """What one training run left: losses before each update, and all parameters before the first and after each."""

    losses_N: Float[np.ndarray, " N"]
    places_NP: Float[np.ndarray, "N+1 P"]
    refused: str = ""
    """What the optimizer said to gradients that were not finite; from that step's update on, all is NaN."""

    @property
    def lost(self) -> int:
        """The first step that left anything not finite; the number of steps if all is finite."""
        good = np.isfinite(self.losses_N) & np.isfinite(self.places_NP[1:]).all(1)
        return len(good) if good.all() else int(np.argmin(good))

    @property
    def moved_NP(self) -> Float[np.ndarray, "N P"]:
        """How far every parameter has come after each update."""
        return self.places_NP[1:] - self.places_NP[0]


class Training:
    """Both twins of CONFIG, ready for steps and for runs. Compiled programs are kept as long as the object is."""

    def __init__(self) -> None:
        from flax import nnx

        import omni_torch.thinker
        from omni_jax.thinker import ThinkerLM
        from omni_torch.config import ThinkerConfig

        import jax  # isort: skip

        self.module = omni_torch.thinker.ThinkerLM.from_config(ThinkerConfig(**CONFIG)).eval()
        abstract = nnx.eval_shape(lambda: ThinkerLM(**CONFIG, rngs=nnx.Rngs(0)))
        abstract.eval()
        self.graphdef, self.template, self.rest = nnx.split(abstract, nnx.Param, ...)
        self.names = [name for name, _ in self.module.named_parameters()]
        leaves = zip(leaf_names(self.template), jax.tree.leaves(self.template))
        shapes = {name: tuple(p.shape) for name, p in self.module.named_parameters()}
        self.links = bind({name: tuple(x.shape) for name, x in leaves}, shapes)
        self._programs: dict[tuple[int, int], Any] = {}
        # Traced once for a step in float32 and for a whole run of them.
        self._jax_step = jax.jit(self.jax_step)

    # -- one step ---------------------------------------------------------------------------------------------
    def jax_step(self, params: Any, m: Any, v: Any, step: Any, tokens: Any, targets: Any) -> tuple[Any, ...]:
        """(loss, norm before clipping, raw gradients, params, m, v) after update number `step` + 1."""
        import jax
        from flax import nnx

        import omni_jax.losses
        import omni_jax.optim as optim

        def objective(p):
            return omni_jax.losses.cross_entropy(nnx.merge(self.graphdef, p, self.rest)(tokens), targets)

        loss, grads = jax.value_and_grad(objective)(params)
        clipped, norm = optim.clip_grad_norm(grads, RECIPE["max_norm"])
        lr = RECIPE["lr"] * optim.warmup_cosine(
            step, RECIPE["warmup_steps"], RECIPE["max_steps"], min_ratio=RECIPE["min_ratio"]
        )
        params, state = optim.adamw_step(params, clipped, optim.AdamWState(m, v, step), lr, **HYPER)
        return loss, norm, grads, params, state.m, state.v

    def torch_gradients(self, module: Any, params: list[Any], tokens: Any, targets: Any) -> tuple[Any, list[Any]]:
        """(loss, gradients)."""
        import torch
        from torch.func import functional_call

        import omni_torch.losses

        with torch.enable_grad():
            logits = functional_call(module, dict(zip(self.names, params)), (tokens,))
            loss = omni_torch.losses.cross_entropy(logits, targets)
            return loss.detach(), list(torch.autograd.grad(loss, list(params)))

    def torch_update(
        self, params: list[Any], grads: list[Any], states: list[Any], step: int, ahead: int = 0
    ) -> tuple[Any, list[Any]]:
        """(norm, states); `params` move and `grads` are clipped in place. `ahead` misreads the schedule."""
        import omni_torch.optim as optim

        norm = optim.clip_grad_norm_(grads, RECIPE["max_norm"])
        lr = RECIPE["lr"] * optim.warmup_cosine(
            step + ahead, RECIPE["warmup_steps"], RECIPE["max_steps"], min_ratio=RECIPE["min_ratio"]
        )
        return norm, optim.adamw_step_many_(params, grads, states, lr, **HYPER)

    def flawed(self) -> Any:
        """The torch module with RMSNorm's eps 1e-6 where 1e-5 is meant."""
        from omni_torch.layers import RMSNorm

        module = copy.deepcopy(self.module)
        for part in module.modules():
            if isinstance(part, RMSNorm):
                part.eps = part.eps / 10
        return module

    def pair(self, module: Any = None) -> Pair:
        """One step as a pair: weights are parameters and both moments ("p.", "m.", "v." and the torch name), inputs
        are (tokens, targets, step); every result goes by its torch name."""
        links = [Link(f"{k}.{x.jax}", f"{k}.{x.torch}", x.axes) for k in "mpv" for x in self.links]
        return Pair(
            jax=self._jax_named,
            torch=lambda named, *inputs: self._torch_named(module or self.module, named, *inputs),
            template={k: self.template for k in "mpv"},
            links=links,
            taps={},
            name="training step",
            hasty=True,
        )

    def _jax_named(self, trees: Mapping[str, Any], tokens: Any, targets: Any, step: Any) -> dict[str, Any]:
        loss, norm, *parts = self._jax_step(trees["p"], trees["m"], trees["v"], step, tokens, targets)
        outputs = {"loss": loss, "gradient norm": norm}
        for what, tree in zip(KINDS, parts):
            outputs |= {f"{name}: {what}": leaf for name, leaf in under_torch_names(self.links, tree).items()}
        return outputs

    def _torch_named(self, module: Any, named: Mapping[str, Any], tokens: Any, targets: Any, step: Any):
        import omni_torch.optim as optim

        step = int(step)
        params = [named[f"p.{name}"].detach().clone().requires_grad_() for name in self.names]
        states = [optim.AdamWState(named[f"m.{x}"].clone(), named[f"v.{x}"].clone(), step) for x in self.names]
        loss, grads = self.torch_gradients(module, params, tokens, targets)
        raw = [g.clone() for g in grads]
        norm, states = self.torch_update(params, grads, states, step)
        parts = (raw, [p.detach() for p in params], [s.m for s in states], [s.v for s in states])
        named = {f"{k}: {what}": x for what, xs in zip(KINDS, parts) for k, x in zip(self.names, xs)}
        return {"loss": loss, "gradient norm": norm} | named

    # -- whole runs -------------------------------------------------------------------------------------------
    def jax_runs(
        self,
        starts: Sequence[Mapping[str, np.ndarray]],
        tokens: Int[np.ndarray, "N B T"],
        targets: Int[np.ndarray, "N B T"],
        device: Any = None,
    ) -> list[Run]:
        """A run from each of the starts in float32: one program, a scan over the steps, mapped over the starts."""
        import jax

        from parity.sides import compiled, compiler_options

        try:
            params = jax.tree.map(lambda *x: np.stack(x), *(to_jax(self.links, w, self.template) for w in starts))
            key = (len(starts), len(tokens))
            with jax.default_device(device or jax.devices("cpu")[0]):
                if key not in self._programs:
                    mapped = jax.jit(jax.vmap(self._jax_run, in_axes=(0, None, None)))
                    options = compiler_options(True, "float32", device or jax.devices("cpu")[0])
                    self._programs[key] = compiled(mapped.lower(params, tokens, targets), options)
                losses, places = (np.asarray(x, np.float64) for x in self._programs[key](params, tokens, targets))
        except Exception as error:
            raise _crash("JAX", error) from error
        first = np.stack([_flat(self.links, w) for w in starts])
        return [Run(x, np.concatenate([f[None], y])) for f, x, y in zip(first, losses, places)]

    def _jax_run(self, params: Any, tokens: Any, targets: Any) -> tuple[Any, Any]:
        import jax
        import jax.numpy as jnp

        def body(carry, xs):
            loss, _, _, *carry = self._jax_step(*carry, *xs)
            return tuple(carry), (loss, jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(carry[0])]))

        zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
        steps = jnp.arange(len(tokens), dtype=jnp.int32)
        return jax.lax.scan(body, (params, zeros(), zeros()), (steps, tokens, targets))[1]

    def torch_run(
        self,
        begin: Mapping[str, np.ndarray],
        tokens: Int[np.ndarray, "N B T"],
        targets: Int[np.ndarray, "N B T"],
        device: Any = "cpu",
        module: Any = None,
        ahead: int = 0,
        noise: int | None = None,
    ) -> Run:
        """The same run in torch, in float32, step by step; `module`, `ahead` and `noise` put a bug into it.

        With `noise`, the seed of it, gradients are noisy by `NOISE` from the middle of the run on. An update that is
        refused because of gradients that are not finite ends the run; what was computed until then stays.
        """
        import torch

        import omni_torch.optim as optim

        module = module or self.module
        move = lambda x: torch.from_numpy(np.array(x)).to(device)  # noqa: E731
        draws = None if noise is None else np.random.default_rng([noise, 29])
        losses, places, refused = np.full(len(tokens), np.nan), [begin], ""
        try:
            params = [move(begin[name]).requires_grad_() for name in self.names]
            states = [optim.init_adamw_state(p) for p in params]
            for i, (ids, wanted) in enumerate(zip(tokens.astype(np.int64), targets.astype(np.int64))):
                loss, grads = self.torch_gradients(module, params, move(ids), move(wanted))
                losses[i] = float(loss)
                if draws is not None and i >= len(tokens) // 2:
                    for g in grads:
                        g.mul_(move(1 + NOISE * draws.standard_normal(tuple(g.shape), np.float32)))
                finite = all(bool(torch.isfinite(g).all()) for g in grads)
                try:
                    _, states = self.torch_update(params, grads, states, i, ahead)
                except Exception as error:
                    if finite:
                        raise
                    refused = _words(error)
                    break
                places.append({k: p.detach().cpu().numpy().copy() for k, p in zip(self.names, params)})
        except Exception as error:
            raise _crash("torch", error) from error
        known = np.stack([_flat(self.links, x) for x in places])
        return Run(losses, np.pad(known, [(0, len(tokens) + 1 - len(known)), (0, 0)], constant_values=np.nan), refused)


NOISE = np.float32(1e-2)
"""Of a noisy run's gradients, relative."""
KINDS = ("gradient", "displacement", "m", "v")
"""What a step returns of each parameter; the displacement is the new parameter until its start is taken away."""


def _flat(links: Sequence[Link], weights: Mapping[str, np.ndarray]) -> Float[np.ndarray, " P"]:
    """All parameters in one row, in the order and layout of the JAX tree."""
    return np.concatenate([link.to_jax(np.asarray(weights[link.torch], np.float64)).reshape(-1) for link in links])


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or "no message"


def _crash(side: str, error: Exception) -> CannotLook:
    return CannotLook(f"the {side} side raised {type(error).__name__} in a free run: {_words(error)}")
