"""Gradient accumulation: micro-batches of unequal length give the gradient of one big batch.

    gradient = Σ over micro-batches of ∇(Σ nats) / Σ over micro-batches of counted tokens

divided once, at the end; and clipped once, after that. Shapes: A micro-batches, B rows of one, T time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from parity.checks import Progress, Scope
from parity.errors import CannotLook
from parity.result import CheckResult, Control, Row
from parity.verdict import Verdict

__all__ = [
    "BLIND",
    "CLAIM",
    "CONTROLS",
    "MAX_NORM",
    "MICRO",
    "PRECISIONS",
    "jax_accumulated",
    "run",
    "torch_accumulated",
]

CLAIM = (
    "Nats and gradients summed over micro-batches with unequal numbers of counted tokens and divided once by the sum "
    "of these numbers are the loss and gradient of one big batch, on both sides, before any optimizer could hide their "
    "scale; and so they are after clipping by the global norm, which acts on the accumulated gradient."
)
BLIND = (
    "Dropout (each micro-batch has masks of its own); moving averages and schedules that count micro-batches as steps; "
    "mixed precision; more micro-batches than three; trainers other than this formula (the tests hold the twins' own "
    "trainers to it)."
)
CONTROLS = {
    "mean of means": "the average of the micro-batches' mean losses (transformers#34191)",
    "sum not divided": "the sum of nats, not divided by the tokens (aprender#2123)",
    "last one dropped": "the last micro-batch left out",
    "each one clipped": "clipping after each micro-batch, not once at the end",
}
PRECISIONS = ("float64", "float32")
CONFIG = "small mha-swiglu"
MICRO = 3
"""Micro-batches, of two rows each: 10, 1 and 8 tokens are predicted in them (the dropout check's LENGTHS)."""
MAX_NORM = 0.1
"""Far below the gradient's norm, so that clipping is active."""


def run(scope: Scope, progress: Progress) -> CheckResult:
    """Judge the big batch and the accumulated gradient of both sides; the reference of both is the big batch's."""
    from parity.checks._steps import merge
    from parity.checks.dropout import batch, small, undropped

    started = time.perf_counter()
    result = CheckResult("accumulation")
    precisions = [p for p in PRECISIONS if p in scope.precisions]
    if precisions:
        # The dropout check's pair: one big batch in training mode, with everything kept.
        made = small(CONFIG, scope)
        micro = tuple(x.reshape(MICRO, -1, x.shape[-1]) for x in batch(made.config, scope.seed))
        judge = _judge(scope, made.config)
    for done, precision in enumerate(precisions):
        progress(done, len(precisions), precision)
        whole = undropped(CONFIG, scope, precision)
        names = [name for name in whole.outputs if name != "logits"]
        result.rows += whole.rows("accumulation", CONFIG, "one big batch", names)
        truth = {name: whole.values[name][2] for name in names}
        findings = judge(made.weights, micro, precision, oracle=truth | _clipped(truth))
        result.rows += findings.rows("accumulation", CONFIG, "micro-batches")
        result.rows += _against_own(whole, findings)
        if not _norm(truth) > MAX_NORM:
            raise CannotLook(f"the gradient's norm is not above {MAX_NORM:g}: nothing was clipped")
        if scope.controls:
            result.controls += _controls(made, findings, micro)
    if not precisions:
        result.error = f"accumulation looks at {' and '.join(PRECISIONS)} only; ask for one of them with --precision"
    result.controls = merge(result.controls)
    result.seconds = time.perf_counter() - started
    progress(1, 1, "")
    return result


def _judge(scope: Scope, config: Any) -> Any:
    """The pair (tokens, targets, attention_mask), each (A, B, T) -> accumulated loss and gradients, clipped ones."""
    from flax import nnx

    import omni_jax.thinker
    import omni_torch.thinker
    from omni_torch.config import ThinkerConfig
    from parity.judge import Judge
    from parity.pair import pair_of
    from parity.precision import resolve_device

    config = ThinkerConfig(**(config.to_dict() | {"dropout": 0.0}))
    abstract = nnx.eval_shape(lambda: omni_jax.thinker.ThinkerLM(**config.to_dict(), rngs=nnx.Rngs(0)))
    graphdef, template = nnx.split(abstract)

    def forward(params, tokens, targets, mask):
        loss, grads, norm, clipped = jax_accumulated(graphdef, params, tokens, targets, mask)
        return {
            "loss": loss, "gradient norm": norm, **_torch_layout(pair.links, grads, "gradient"),
            **_torch_layout(pair.links, clipped, "clipped gradient"),
        }  # fmt: skip

    def torch_forward(net, tokens, targets, mask):
        loss, grads, norm, clipped = torch_accumulated(net, tokens, targets, mask)
        return {
            "loss": loss, "gradient norm": norm, **{f"gradient {k}": v for k, v in grads.items()},
            **{f"clipped gradient {k}": v for k, v in clipped.items()},
        }  # fmt: skip

    module = omni_torch.thinker.ThinkerLM.from_config(config).train()
    pair = pair_of(forward, module, template, torch_call=torch_forward, taps={}, name=CONFIG)
    pair.hasty = True
    devices = resolve_device(scope.device)
    return Judge(pair, draws=scope.draws, seed=scope.seed, devices=devices, device=scope.device)


def _torch_layout(links: Sequence[Any], tree: Any, what: str) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from parity.weights import leaf_names

    by_name = dict(zip(leaf_names(tree), jax.tree.leaves(tree)))
    turned = {link.torch: by_name[link.jax] for link in links}
    axes = {link.torch: tuple(np.argsort(link.axes).tolist()) for link in links if link.axes is not None}
    return {f"{what} {k}": jnp.transpose(v, axes[k]) if k in axes else v for k, v in turned.items()}


def jax_accumulated(graphdef: Any, params: Any, tokens: Any, targets: Any, mask: Any) -> tuple[Any, Any, Any, Any]:
    """(loss, gradients, their norm, clipped gradients): a scan over micro-batches, all of one static shape."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from omni_jax.config import PAD_ID
    from omni_jax.losses import cross_entropy
    from omni_jax.optim import clip_grad_norm

    def nats_of(params, tokens, targets, mask):
        count = jnp.sum(targets != PAD_ID, dtype=jnp.int32)
        loss = cross_entropy(nnx.merge(graphdef, params)(tokens, attention_mask=mask), targets)
        return loss * jnp.maximum(count, 1).astype(loss.dtype), count

    def body(carry, batch):
        (nats, count), grads = jax.value_and_grad(nats_of, has_aux=True)(params, *batch)
        return jax.tree.map(jnp.add, carry, (nats, count, grads)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    start = (jnp.zeros((), jax.tree.leaves(params)[0].dtype), jnp.zeros((), jnp.int32), zeros)
    (nats, count, grads), _ = jax.lax.scan(body, start, (tokens, targets, mask))
    total = jnp.maximum(count, 1).astype(nats.dtype)
    grads = jax.tree.map(lambda g: g / total, grads)
    clipped, norm = clip_grad_norm(grads, MAX_NORM)
    return nats / total, grads, norm, clipped


def torch_accumulated(
    net: Any, tokens: Any, targets: Any, mask: Any
) -> tuple[Any, dict[str, Any], Any, dict[str, Any]]:
    """The same: a loop over micro-batches, each cut to its own longest row."""
    import torch

    from omni_torch.config import PAD_ID
    from omni_torch.losses import cross_entropy
    from omni_torch.optim import clip_grad_norm_

    params = dict(net.named_parameters())
    grads = {k: torch.zeros_like(p) for k, p in params.items()}
    nats, count = 0.0, 0
    for tokens_BT, targets_BT, mask_BT in zip(tokens, targets, mask):
        T = int(mask_BT.sum(dim=1).max())
        tokens_BT, targets_BT, mask_BT = tokens_BT[:, :T], targets_BT[:, :T], mask_BT[:, :T]
        counted = int((targets_BT != PAD_ID).sum())
        with torch.enable_grad():
            part = cross_entropy(net(tokens_BT, attention_mask=mask_BT), targets_BT) * max(counted, 1)
            micro = torch.autograd.grad(part, list(params.values()))
        for name, gradient in zip(grads, micro):
            grads[name] += gradient
        nats, count = nats + part.detach(), count + counted
    grads = {k: g / max(count, 1) for k, g in grads.items()}
    clipped = {k: g.clone() for k, g in grads.items()}
    norm = clip_grad_norm_(list(clipped.values()), MAX_NORM)
    return nats / max(count, 1), grads, norm, clipped


def _norm(truth: Mapping[str, np.ndarray]) -> float:
    """The global norm of the gradients among named tensors."""
    from parity import oracle

    return float(oracle.global_norm({k: v for k, v in truth.items() if k.startswith("gradient ")}))


def _clipped(truth: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The norm of named gradients and what clipping makes of them, by a third hand in extended precision."""
    from parity import oracle

    grads = {k: v for k, v in truth.items() if k.startswith("gradient ")}
    clipped, norm = oracle.clip(grads, MAX_NORM)
    named = {f"clipped {k}": np.asarray(v, np.float64) for k, v in clipped.items()}
    return {"gradient norm": np.asarray(norm, np.float64), **named}


def _against_own(whole: Any, findings: Any) -> list[Row]:
    """Each side's accumulated loss and gradients against those of its own big batch: the worst tensor."""
    from parity.precision import unit_roundoff
    from parity.verdict import measure, subtract

    unit = unit_roundoff(findings.precision)
    rows = []
    for i, side in enumerate(("jax", "torch")):
        looks = {}
        for name in set(findings.values) & set(whole.values):
            noise, other = findings.values[name][3], whole.values[name][3]
            apart = subtract(findings.values[name][i], whole.values[name][i])
            looks[name] = measure(apart, np.hypot(noise.sigma, other.sigma) * unit, min(noise.dof, other.dof))
        worst = max(looks, key=lambda name: looks[name].excess)
        distance = looks[worst]
        verdict = Verdict.AGREE if distance.within else Verdict.DIFFER
        words = (
            f"{len(looks)} tensors; nearest to its threshold: {worst}, {distance.where}, at {distance.excess:.0%} of it"
        )
        rows.append(
            Row(
                "accumulation", CONFIG, "against its own big batch", findings.precision, f"loss and gradients ({side})",
                verdict, words, device=findings.device, z_same=distance.rms, excess=distance.excess,
            )
        )  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------------------ controls


def _controls(made: Any, findings: Any, micro: Any) -> list[Control]:
    """Wrong ways to accumulate, made of the torch side's float64 micro-batches; rejected on every determined tensor."""
    from parity import oracle
    from parity.checks.dropout import all_kept
    from parity.precision import unit_roundoff
    from parity.verdict import accepts

    means, counts = [], []
    for batch in zip(*micro):
        outputs, _ = made.judge.cpu[1](made.weights, (*batch, *all_kept(made.config, batch[0])), "float64")
        means.append({k: v for k, v in outputs.items() if k != "logits"})
        counts.append(int(np.sum(batch[1] != 0)))

    def mixed(shares: Sequence[float]) -> dict[str, np.ndarray]:
        return {k: np.asarray(sum(s * m[k] for s, m in zip(shares, means))) for k in means[0]}

    total, last = sum(counts), len(counts) - 1
    so_far = {k: np.zeros_like(v) for k, v in means[0].items() if k != "loss"}
    for n, mean in zip(counts, means):
        so_far, _ = oracle.clip({k: v + n / total * mean[k] for k, v in so_far.items()}, MAX_NORM)
    wrongs = {
        "mean of means": mixed([1 / len(counts)] * len(counts)),
        "sum not divided": mixed(counts),
        "last one dropped": mixed([n / sum(counts[:last]) for n in counts[:last]]),
        "each one clipped": {f"clipped {k}": np.asarray(v, np.float64) for k, v in so_far.items()},
    }
    controls = []
    for control, tensors in wrongs.items():
        live = [k for k in tensors if findings.outputs[k].verdict is not Verdict.UNDETERMINED]
        passed = []
        for key in live:
            _, _, reference, noise = findings.values[key]
            if accepts(tensors[key], reference, noise, unit_roundoff(findings.precision)):
                passed.append(key)
        words = f"{findings.precision}: rejected on {len(live) - len(passed)} of {len(live)} tensors"
        words += f"; passed on {', '.join(passed)}" if passed else ""
        controls.append(Control(control, rejected=bool(live) and not passed, evidence=words))
    return controls
