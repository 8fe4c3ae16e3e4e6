"""Mutants by rule that are called equivalent: the changed function gives the same bits, on inputs made to part them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

import omni_jax.config  # noqa: E402
import omni_jax.init  # noqa: E402
import omni_jax.layers  # noqa: E402
import omni_jax.losses  # noqa: E402
import omni_jax.thinker  # noqa: E402
import omni_jax.vision  # noqa: E402
import omni_torch.attention  # noqa: E402
import omni_torch.cache  # noqa: E402
import omni_torch.thinker  # noqa: E402
import omni_torch.vision  # noqa: E402
from parity.mutants import inject  # noqa: E402
from parity.mutants.by_rule import by_rule  # noqa: E402
from parity.mutants.examined import EXAMINED  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

V, T = 7, 6
SETTINGS: dict[str, Any] = {
    "vocab_size": V, "n_layers": 2, "d_model": 16, "n_heads": 4, "d_ff": 12, "dropout": 0.0, "use_gqa": True,
    "kv_groups": 2, "ctx_len": T,
}  # fmt: skip


def attention() -> list[Any]:
    """Forward and gradient of written-out attention, with rows that see nothing."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 5, 4, 6, generator=draw, requires_grad=True) for _ in range(3))
    mask = torch.rand(2, 5, 5, generator=draw) < 0.5
    mask[0], mask[1, 2] = False, False
    y = omni_torch.attention.attend(q, k, v, mask)
    return [y, *torch.autograd.grad(y.square().sum(), [q, k, v])]


def angles() -> list[Any]:
    positions = jnp.asarray([[0, 1, 2, 300, 4096, 2**24 + 1]], jnp.int32)
    return [
        x for kind in (jnp.float32, jnp.bfloat16) for x in omni_jax.layers.rope_frequencies(positions, 8, 1e4, kind)
    ]


def fresh() -> list[Any]:
    config = omni_jax.config.ThinkerConfig(**{**SETTINGS, "dropout": 0.1})
    model = omni_jax.thinker.ThinkerLM.from_config(config, rngs=nnx.Rngs(3))
    leaves = [leaf[...] for _, leaf in nnx.to_flat_state(nnx.state(model))]
    return [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in leaves]


def decoded() -> list[Any]:
    """Logits over a cache: a prompt and single tokens, with and without padding, evaluating and training."""
    found = []
    tokens = torch.randint(1, V, (2, T), generator=torch.Generator().manual_seed(1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = omni_torch.thinker.ThinkerLM(**SETTINGS)
    for training in (False, True):
        for pads in (0, 2):
            model.train(training)
            mask = torch.arange(T) >= torch.tensor([[0], [pads]])
            cache = omni_torch.cache.init_cache(model, 2, T)
            for start, end in ((0, 3), (3, 4), (4, 5), (5, 6)):
                logits, cache = model(tokens[:, start:end], attention_mask=mask[:, start:end], cache=cache)
                found.append(logits)
    return found


def losses() -> list[Any]:
    """Loss and gradient for every target, out of range too, alone and beside others, in two dtypes."""
    logits = jax.random.normal(jax.random.key(0), (3, V))
    found = []
    loss = jax.jit(jax.value_and_grad(omni_jax.losses.cross_entropy))  # inside jit no target is refused
    for dtype in (jnp.float32, jnp.bfloat16):
        for targets in ([1, 2, 0], [V, 1, 2], [-1, 1, 0], [V + 1, 0, 0], [0, 0, 0], [V - 1, -V, V]):
            found += loss(logits.astype(dtype), jnp.asarray(targets))
    for ignored in (-1, V, V - 1):
        loss = jax.jit(jax.value_and_grad(partial(omni_jax.losses.cross_entropy, ignore_index=ignored)))
        found += loss(logits, jnp.asarray([V - 1, ignored, V]))
    return found


def kinds() -> list[Any]:
    return [str(omni_jax.init._wide(kind)) for kind in (jnp.float16, jnp.bfloat16, jnp.float32, np.float64)]


def resized_jax() -> list[Any]:
    table = jax.random.normal(jax.random.key(0), (1, 1 + 12, 5))
    sizes = ((5, 2), (2, 7), (3, 4), (1, 1))
    resize = omni_jax.vision.resize_positions
    return [resize(table.astype(kind), (3, 4), size) for size in sizes for kind in (jnp.float32, jnp.bfloat16)]


def resized_torch() -> list[Any]:
    table = torch.randn(1, 1 + 12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = ((5, 2), (2, 7), (3, 4), (1, 1), (31, 17))
    return [omni_torch.vision.resize_positions(table, (3, 4), size) for size in sizes]


PROOFS: dict[str, Callable[[], list[Any]]] = {
    "torch.attention.attend": attention,
    "jax.layers.rope_frequencies": angles,
    "jax.thinker.fresh_model": fresh,
    "torch.thinker.ThinkerLM.forward": decoded,
    "jax.losses.cross_entropy": losses,
    "jax.init._wide": kinds,
    "jax.vision.resize_positions": resized_jax,
    "torch.vision._cubic": resized_torch,
}
"""By function: what shows a change of it."""
OTHER_NUMBERS = ("rule:jax.thinker._draw:function:zeros→ones",)
"""Equivalent in law alone."""

EQUIVALENT = tuple(name for name, (kind, _) in EXAMINED.items() if kind == "equivalent" and name not in OTHER_NUMBERS)
KILLED = (
    "rule:torch.attention.attend:constant:1.0→0.0#2",
    "rule:jax.layers.rope_frequencies:function:cos→sin",
    "rule:torch.thinker.ThinkerLM.forward:boolean:and→or#2",
    "rule:jax.losses.cross_entropy:constant:1→2",
    "rule:jax.init._wide:constant:32→64",
    "rule:jax.vision.resize_positions:cast:.astype(pos.dtype)→",
    "rule:torch.vision._cubic:arithmetic:+→-",
)
"""Others of the same functions, that the same inputs must show."""


def bits(name: str) -> list[tuple[str, bytes]]:
    """What its function gives, as dtype and bytes."""
    with jax.numpy_dtype_promotion("standard"):  # strict promotion refuses casts that change no number
        found = PROOFS[function_of(name)]()
    if all(isinstance(x, str) for x in found):
        return [(x, b"") for x in found]
    arrays = [x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for x in found]
    return [(f"{x.dtype} {x.shape}", x.tobytes()) for x in arrays]


def function_of(name: str) -> str:
    return name.split(":")[1]


def both(name: str) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]]:
    """(bits, bits under the mutant)."""
    mutant = next(mutant for mutant in by_rule([function_of(name).split(".")[1]]) if mutant.id == name)
    inject.forget(programs=True)
    before = bits(name)
    with inject.injected(mutant.edits) as injection:
        after = bits(name)
        assert not injection.dead
    return before, after


@pytest.mark.parametrize("name", EQUIVALENT)
def test_an_equivalent_gives_the_same_bits(name: str) -> None:
    before, after = both(name)
    assert before == after


@pytest.mark.parametrize("name", KILLED)
def test_the_inputs_can_tell(name: str) -> None:
    before, after = both(name)
    assert before != after
