"""Gradient accumulation: micro-batches of unequal length give the gradient of one big batch.

    gradient = Σ over micro-batches of ∇(Σ nats) / Σ over micro-batches of counted tokens

divided once, at the end; and clipped once, after that. What runs is what the twins' own trainers run:
training.accumulated_gradients over the trainers' own nats. Shapes: A micro-batches, B rows of one, T time.
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
    "micro_batches",
    "run",
]

CLAIM = (
    "What each twin's trainer accumulates (accumulated_gradients over its own nats) over micro-batches with unequal "
    "numbers of counted tokens, one of them without any, is the loss and gradient of one big batch, before any "
    "optimizer could hide their scale; and so it is after clipping by the global norm, which acts on the accumulated "
    "gradient. Where no token counts at all, loss and gradients are zero, not NaN."
)
BLIND = (
    "Dropout (each micro-batch has masks of its own); moving averages and schedules that count micro-batches as steps; "
    "mixed precision; more micro-batches than four; what a trainer does around its accumulation (the tests let both "
    "trainers make an update)."
)
CONTROLS = {
    "mean of means": "the average of the micro-batches' mean losses (transformers#34191)",
    "sum not divided": "the sum of nats, not divided by the tokens (aprender#2123)",
    "last one dropped": "the last micro-batch left out",
    "each one clipped": "clipping after each micro-batch, not once at the end",
    "zeros": "zeros in the place of each tensor",
    "sign flipped": "each tensor with its sign flipped",
    "another tensor": "another tensor of the same shape",
}
PRECISIONS = ("float64", "float32")
CONFIG = "small mha-swiglu"
MICRO = (10, 1, 0, 8)
"""Tokens predicted in each micro-batch: rows of the dropout check's LENGTHS, two by two, and two rows of PAD alone."""
_EMPTY = MICRO.index(0)
MAX_NORM = 0.1
"""Far below the gradient's norm, so that clipping is active."""


def run(scope: Scope, progress: Progress) -> CheckResult:
    """Judge the big batch and the accumulated gradient of both sides; the reference of both is the big batch's."""
    from parity.checks._steps import merge
    from parity.checks._twins import Case, simple_controls
    from parity.checks.dropout import small, undropped

    started = time.perf_counter()
    result = CheckResult("accumulation")
    precisions = [p for p in PRECISIONS if p in scope.precisions]
    cases = []
    if precisions:
        # The dropout check's pair: one big batch in training mode, with everything kept.
        made = small(CONFIG, scope)
        rows = micro_batches(made.config, scope.seed)
        judge = _judge(scope, made.config)
    for done, precision in enumerate(precisions):
        progress(done, len(precisions), precision)
        whole = undropped(CONFIG, scope, precision)
        names = [name for name in whole.outputs if name != "logits"]
        result.rows += whole.rows("accumulation", CONFIG, "one big batch", names)
        truth = {name: whole.values[name][2] for name in names}
        findings = judge(made.weights, (rows,), precision, oracle=truth | _clipped(truth))
        result.rows += findings.rows("accumulation", CONFIG, "micro-batches")
        result.rows += _against_own(whole, findings)
        result.rows += _nothing_counted(judge, made.weights, rows, precision)
        if not _norm(truth) > MAX_NORM:
            raise CannotLook(f"the gradient's norm is not above {MAX_NORM:g}: nothing was clipped")
        cases.append(Case(CONFIG, "micro-batches", precision, findings, None))
        if scope.controls:
            result.controls += _controls(made, findings, scope.seed)
    if not precisions:
        result.error = f"accumulation looks at {' and '.join(PRECISIONS)} only; ask for one of them with --precision"
    result.controls = merge(result.controls)
    if scope.controls and cases:
        result.controls += simple_controls(cases, ("zeros", "sign flipped", "another tensor"), lambda name: True)
    result.seconds = time.perf_counter() - started
    progress(1, 1, "")
    return result


def micro_batches(config: Any, seed: int) -> np.ndarray:
    """(A, B, T + 1): the big batch's rows as micro-batches, PAD after each row, and one micro-batch of PAD alone."""
    from parity.checks.dropout import batch

    tokens = batch(config, seed)[0]
    rows = np.pad(tokens, ((0, 0), (0, 1))).reshape(len(MICRO) - 1, -1, tokens.shape[1] + 1)
    return np.insert(rows, _EMPTY, 0, axis=0)


def _judge(scope: Scope, config: Any) -> Any:
    """The pair: rows (A, B, T + 1) -> accumulated loss and gradients, their norm, clipped gradients.

    JAX scans over micro-batches of one static shape; torch loops over micro-batches cut to their own longest row.
    """
    from flax import nnx

    import omni_jax.optim
    import omni_jax.thinker
    import omni_jax.training
    import omni_torch.optim
    import omni_torch.thinker
    import omni_torch.training
    from omni_torch.config import ThinkerConfig
    from parity.judge import Judge
    from parity.pair import pair_of
    from parity.precision import resolve_device
    from parity.weights import under_torch_names

    config = ThinkerConfig(**(config.to_dict() | {"dropout": 0.0}))
    abstract = nnx.eval_shape(lambda: omni_jax.thinker.ThinkerLM(**config.to_dict(), rngs=nnx.Rngs(0)))
    graphdef, template, rest = nnx.split(abstract, nnx.Param, ...)

    def forward(params, rows):
        def nats_of(params, rows_BT):
            return omni_jax.training._nats(graphdef, params, rest, rows_BT, amp=False)

        loss, grads, tokens = omni_jax.training.accumulated_gradients(nats_of, params, rows)
        clipped, norm = omni_jax.optim.clip_grad_norm(grads, MAX_NORM)
        named = {"gradient": under_torch_names(pair.links, grads)}
        named["clipped gradient"] = under_torch_names(pair.links, clipped)
        return {
            "loss": loss, "counted tokens": tokens.astype(loss.dtype), "gradient norm": norm,
            **{f"{what} {k}": v for what, tree in named.items() for k, v in tree.items()},
        }  # fmt: skip

    def torch_forward(net, rows):
        def nats_of(params, rows_BT):
            return omni_torch.training._nats(net, params, rows_BT, amp=False)

        batches = [_cut(rows_BT) for rows_BT in rows]
        loss, grads, tokens = omni_torch.training.accumulated_gradients(nats_of, dict(net.named_parameters()), batches)
        clipped = {k: g.clone() for k, g in grads.items()}
        norm = omni_torch.optim.clip_grad_norm_(list(clipped.values()), MAX_NORM)
        return {
            "loss": loss, "counted tokens": tokens.to(loss.dtype), "gradient norm": norm,
            **{f"gradient {k}": v for k, v in grads.items()},
            **{f"clipped gradient {k}": v for k, v in clipped.items()},
        }  # fmt: skip

    module = omni_torch.thinker.ThinkerLM.from_config(config).train()
    pair = pair_of(forward, module, template, torch_call=torch_forward, taps={}, name=CONFIG)
    pair.hasty = True
    devices = resolve_device(scope.device)
    return Judge(pair, draws=scope.draws, seed=scope.seed, devices=devices, device=scope.device)


def _cut(rows_BT: Any) -> Any:
    """Without the columns that hold PAD alone, but for the last one's target and one token of a batch without any."""
    seen = rows_BT.ne(0).any(dim=0).nonzero()
    return rows_BT[:, : (int(seen.max()) if len(seen) else 0) + 2]


def _nothing_counted(judge: Any, weights: Mapping[str, np.ndarray], rows: np.ndarray, precision: str) -> list[Row]:
    """An update whose every micro-batch is PAD alone: exactly zero, by the same programs."""
    sides = judge.cpu if precision == "float64" else judge.far
    found = []
    for side, name in zip(sides, ("jax", "torch")):
        outputs, _ = side(weights, (np.zeros_like(rows),), precision)
        wrong = [key for key, value in outputs.items() if not np.all(value == 0)]  # NaN is not 0
        words = f"{len(outputs) - len(wrong)} of {len(outputs)} tensors are zero"
        words += f"; not {', '.join(wrong)}" if wrong else ""
        device = "cpu" if precision == "float64" else judge.device
        found.append(
            Row(
                "accumulation", CONFIG, "no token counts", precision, f"loss and gradients ({name})",
                Verdict.DIFFER if wrong else Verdict.AGREE, words, device=device,
            )
        )  # fmt: skip
    return found


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
    return {
        "counted tokens": np.asarray(sum(MICRO), np.float64),
        "gradient norm": np.asarray(norm, np.float64),
        **named,
    }


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


def _controls(made: Any, findings: Any, seed: int) -> list[Control]:
    """Wrong ways to accumulate, made of the torch side's float64 micro-batches; rejected on every determined tensor."""
    from parity import oracle
    from parity.checks._steps import rejection
    from parity.checks.dropout import all_kept, batch
    from parity.precision import unit_roundoff

    means, counts = [], MICRO
    for part in zip(*(x.reshape(len(MICRO) - 1, -1, x.shape[-1]) for x in batch(made.config, seed))):
        outputs, _ = made.judge.cpu[1](made.weights, (*part, *all_kept(made.config, part[0])), "float64")
        means.append({k: v for k, v in outputs.items() if k != "logits"})
    means.insert(_EMPTY, {k: np.zeros_like(v) for k, v in means[0].items()})

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
        live = {k: v for k, v in tensors.items() if findings.outputs[k].verdict is not Verdict.UNDETERMINED}
        unit = unit_roundoff(findings.precision)
        controls.append(rejection(control, findings.precision, live, findings.values, unit))
    return controls
