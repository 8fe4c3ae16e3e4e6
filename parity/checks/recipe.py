"""The training recipe: clipping by global norm, warm-up and cosine schedule, AdamW; every step's learning rate."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from parity.checks import Progress, Scope
from parity.result import CheckResult, Control, Row
from parity.verdict import THRESHOLDS, Verdict

__all__ = ["BLIND", "CLAIM", "CONTROLS", "RECIPE", "SCHEDULES", "problem", "run"]

CLAIM = (
    "Both twins clip the same gradients to the same values, take the same learning rate at every step from 0 to beyond "
    "the last one (of schedules of 1,000 steps too), and move every parameter by the same displacement, as a third "
    "implementation in extended precision does. In both, matrices and embeddings decay, scales and biases do not."
)
BLIND = (
    "Gradients of a model (they are given here; the gradients check has them); other schedules. The trainers' own "
    "learning rates under accumulation: torch's in the default run, JAX's too with --full."
)
CONTROLS = {
    "no update": "zeros in place of each tensor",
    "sign flipped": "each tensor with its sign flipped",
    "clip without 1e-6": "optax's clipping, which divides by the norm alone (goodfire-ai/spd#643)",
    "schedule one step on": "the learning rate of the next step (torchtitan#1010)",
    "decay_steps with warm-up": "the cosine counted over max_steps instead of max_steps - warm-up (optax#835)",
    "everything decays": "scales and biases decay too",
    "micro-batches counted": "the schedule goes on with every micro-batch (maxtext#3452)",
}
RECIPE = {"lr": 1e-2, "warmup_steps": 3, "max_steps": 10, "max_norm": 1.0}
MIN_RATIO, BETAS, EPS, DECAY = 0.1, (0.9, 0.999), 1e-8, 0.1
STEPS = 12
"""Two beyond max_steps."""
SCHEDULES = {
    "warm-up 100 of 1,000": (100, 1000, 0.1),
    "no warm-up": (0, 1000, 0.1),
    "warm-up up to the last step": (999, 1000, 0.1),
    "down to 0": (100, 1000, 0.0),
    "no descent": (100, 1000, 1.0),
}
"""name -> (warmup_steps, max_steps, min_ratio): judged at every step from 0 to BEYOND steps after the last one."""
BEYOND = 24
PEAK = {"peak": np.asarray(1e-2, np.float32)}
"""The learning rate at a factor of 1, the same number in every precision; no power of two, so that its product rounds:
0.1 itself is rounded in float32, and carries no noise that could excuse it."""
PRECISIONS = ("float64", "float32")
DRAWS = 24
"""All elements of a clipped gradient share one number, the norm's error: a few draws would not tell its size."""


def problem(seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(parameters, gradients (STEPS, *shape)), float32; norms on both sides of max_norm, one step of tiny gradients."""
    rng = np.random.default_rng([seed, 13])
    shapes = {"matrix": (19, 12), "bias": (12,), "scalar": ()}
    start = {k: np.asarray(rng.standard_normal(s), np.float32) for k, s in shapes.items()}
    size = np.array([0.03, 1.0, 0.01, 3.0, 0.05, 1e-5, 0.02, 0.5, 0.04, 10.0, 0.02, 0.2])
    grads = {
        k: np.asarray(size.reshape(-1, *[1] * len(s)) * rng.standard_normal((STEPS, *s)), np.float32)
        for k, s in shapes.items()
    }
    return start, grads


def run(scope: Scope, progress: Progress) -> CheckResult:
    """Judge both twins against the oracle in float64 and float32."""
    from parity import oracle
    from parity.checks._steps import merge, pair_of_steps
    from parity.judge import Judge
    from parity.pair import Pair
    from parity.precision import resolve_device
    from parity.weights import Link

    started = time.perf_counter()
    result = CheckResult("recipe")
    start, grads = problem(scope.seed)
    names = list(start)
    devices = resolve_device(scope.device)
    judge = Judge(
        pair_of_steps(_jax_steps, _torch_steps, start),
        draws=max(scope.draws, DRAWS),
        seed=scope.seed,
        devices=devices,
        device=scope.device,
    )
    schedules = Judge(
        Pair(_jax_schedules, _torch_schedules, PEAK, [Link("peak", "peak")], name="schedules"),
        draws=scope.draws,
        seed=scope.seed,
        devices=devices,
        device=scope.device,
    )
    counts = np.arange(max(end for _, end, _ in SCHEDULES.values()) + 1 + BEYOND, dtype=np.int32)
    by_step = [{k: g[i] for k, g in grads.items()} for i in range(STEPS)]
    states, rates, norms = oracle.recipe(
        start, by_step, **RECIPE, min_ratio=MIN_RATIO, betas=BETAS, eps=EPS, weight_decay=DECAY
    )
    clipped = [oracle.clip(g, RECIPE["max_norm"])[0] for g in by_step]
    truth = _outputs(names, rates, norms, clipped, [state.p for state in states])
    origin = {f"{k}: displacement": np.broadcast_to(v, (STEPS, *v.shape)).astype(np.float64) for k, v in start.items()}
    precisions = [p for p in PRECISIONS if p in scope.precisions]
    inputs = tuple(grads[k] for k in names)
    for done, precision in enumerate(precisions):
        progress(done, len(precisions), precision)
        findings = judge(start, inputs, precision, oracle=_stack(truth), origin=origin)
        result.rows += findings.rows("recipe", "", "synthetic gradients")
        whole = schedules(PEAK, (counts,), precision, oracle=_schedules(counts))
        result.rows += whole.rows("recipe", "", "every step of a schedule")
        if scope.controls:
            result.controls += _controls(findings, by_step, rates, precision)
            result.controls += _schedule_controls(whole, counts, precision)
    progress(1, 1, "")
    if precisions:
        _decay(scope, result)
        _trainers(scope, result)
    if not precisions:
        result.error = f"recipe looks at {' and '.join(PRECISIONS)} only; ask for one of them with --precision"
    result.controls = merge(result.controls)
    result.seconds = time.perf_counter() - started
    return result


def _decay(scope: Scope, result: CheckResult) -> None:
    """Both twins' decay masks of a model against the rule in words."""
    import jax
    from flax import nnx

    import omni_jax.optim
    import omni_jax.thinker
    import omni_torch.optim
    import omni_torch.thinker
    from parity.checks._encoders import merged

    size = {"vocab_size": 11, "n_layers": 1, "d_model": 8, "n_heads": 2, "d_ff": 6, "use_swiglu": False}
    module = omni_torch.thinker.ThinkerLM(**size)
    wanted = {k: "norm" not in k and "bias" not in k for k, _ in module.named_parameters()}
    template, _ = merged(lambda: omni_jax.thinker.ThinkerLM(**size, rngs=nnx.Rngs(0)))
    params = {path: variable.get_value() for path, variable in nnx.to_flat_state(template)}
    leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
    masks = {"torch": omni_torch.optim.decay_mask(module)}
    named = omni_jax.optim.decay_mask({".".join(map(str, path)): value for path, value in params.items()})
    masks["jax"] = {
        f"{name.rpartition('.')[0]}.{leaf[name.rpartition('.')[2]]}": bool(decays)
        for name, decays in jax.tree.map(bool, named).items()
    }

    def wrong(mask: Mapping[str, bool]) -> list[str]:
        return sorted(k for k in wanted | dict(mask) if mask.get(k) is not wanted.get(k))

    for side in ("jax", "torch"):
        found = wrong(masks[side])
        verdict = Verdict.DIFFER if found else Verdict.AGREE
        words = f"{len(found)} of {len(wanted)} tensors wrong, first {found[0]}" if found else f"{len(wanted)} tensors"
        result.rows.append(Row("recipe", "", "decay mask", "", f"decay mask ({side})", verdict, words))
    if scope.controls:
        found = wrong(dict.fromkeys(wanted, True))
        result.controls.append(
            Control("everything decays", bool(found), f"wrong on {len(found)} of {len(wanted)} tensors")
        )


TRAINED = {"lr": 1e-2, "warmup_steps": 1, "max_steps": 6, "batch_size": 2, "gradient_accumulation_steps": 3}
UPDATES = 4


def _trainers(scope: Scope, result: CheckResult) -> None:
    """What a trainer that accumulates says of its first updates: their learning rates, and the tokens in each."""
    import importlib
    import json
    import tempfile
    from pathlib import Path

    from parity import oracle
    from parity.precision import unit_roundoff

    lr, warm, last = TRAINED["lr"], TRAINED["warmup_steps"], TRAINED["max_steps"]
    size: dict[str, Any] = {"vocab_size": 11, "n_layers": 1, "d_model": 4, "n_heads": 2, "d_ff": 4, "ctx_len": 6}
    ids = np.random.default_rng([scope.seed, 97]).integers(3, size["vocab_size"], 400)
    ids[::9] = 1  # documents begin
    tokens = TRAINED["batch_size"] * TRAINED["gradient_accumulation_steps"] * size["ctx_len"]

    def rates(stride: int) -> np.ndarray:
        return np.array([float(lr * oracle.factor(i * stride, warm, last, 0.1)) for i in range(UPDATES)])

    def apart(found: np.ndarray) -> bool:
        # Written down as float32; the peak is what rounding is relative to.
        return bool((np.abs(found - rates(1)) > THRESHOLDS.z * unit_roundoff("float32") * lr).any())

    for side in ("jax", "torch") if scope.full else ("torch",):
        package = importlib.import_module(f"omni_{side}.training")
        with tempfile.TemporaryDirectory() as folder:
            config, train = package.ThinkerConfig(**size), package.TrainConfig(**TRAINED, print_freq=1)
            package.Trainer(config, train, ids, ids[:0], Path(folder) / "run", quiet=True).run(until=UPDATES)
            lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        said = [json.loads(line) for line in lines]
        found, counts = np.array([line["lr"] for line in said]), [line["tokens"] for line in said]
        wrong = found.shape != (UPDATES,) or apart(found) or counts != [tokens] * UPDATES
        words = f"learning rates {', '.join(f'{x:.3g}' for x in found)}; {', '.join(map(str, counts))} tokens"
        words += f"; not {', '.join(f'{x:.3g}' for x in rates(1))} and {tokens} each" if wrong else ""
        verdict, name = Verdict.DIFFER if wrong else Verdict.AGREE, f"learning rate under accumulation ({side})"
        result.rows.append(Row("recipe", "", "trainer", "", name, verdict, words))
    if scope.controls:
        seen = apart(rates(TRAINED["gradient_accumulation_steps"]))
        result.controls.append(Control("micro-batches counted", seen, "rejected" if seen else "passed"))


def _outputs(names: Sequence[str], rates: Any, norms: Any, clipped: Any, params: Any) -> dict[str, Any]:
    """One name for each thing that is compared; the lists run over the steps."""
    return {
        "learning rate": rates,
        "gradient norm": norms,
        **{f"{k}: clipped gradient": [c[k] for c in clipped] for k in names},
        **{f"{k}: displacement": [p[k] for p in params] for k in names},
    }


def _stack(outputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {k: np.asarray(np.stack([np.asarray(x) for x in v]), np.float64) for k, v in outputs.items()}


def _jax_steps(params: Any, grads: Any) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from omni_jax.optim import adamw_step, clip_grad_norm, init_adamw_state, warmup_cosine

    def body(carry, xs):
        (p, state), (step, grad) = carry, xs
        grad, norm = clip_grad_norm(grad, RECIPE["max_norm"])
        lr = RECIPE["lr"] * warmup_cosine(step, RECIPE["warmup_steps"], RECIPE["max_steps"], MIN_RATIO)
        p, state = adamw_step(p, grad, state, lr, betas=BETAS, eps=EPS, weight_decay=DECAY)
        return (p, state), (lr, norm, grad, p)

    steps = jnp.arange(STEPS, dtype=jnp.int32)
    _, (rates, norms, clipped, moved) = jax.lax.scan(body, (params, init_adamw_state(params)), (steps, grads))
    rows = lambda tree: [{k: v[i] for k, v in tree.items()} for i in range(STEPS)]  # noqa: E731
    named = _outputs(list(params), list(rates), list(norms), rows(clipped), rows(moved))
    return {k: jnp.stack(v) for k, v in named.items()}


def _torch_steps(params: Any, grads: Any) -> dict[str, Any]:
    import torch

    from omni_torch.optim import adamw_step_many_, clip_grad_norm_, init_adamw_state, warmup_cosine

    p = [params[k].detach().clone() for k in params]
    states = [init_adamw_state(x) for x in p]
    rates, norms, clipped, moved = [], [], [], []
    for step in range(STEPS):
        grad = [grads[k][step].clone() for k in params]
        norms.append(clip_grad_norm_(grad, RECIPE["max_norm"]))
        lr = RECIPE["lr"] * warmup_cosine(step, RECIPE["warmup_steps"], RECIPE["max_steps"], MIN_RATIO)
        states = adamw_step_many_(p, grad, states, lr, betas=BETAS, eps=EPS, weight_decay=DECAY)
        rates.append(torch.tensor(lr, dtype=p[0].dtype, device=p[0].device))
        clipped.append(dict(zip(params, grad)))
        moved.append({k: x.clone() for k, x in zip(params, p)})
    return {k: torch.stack(v) for k, v in _outputs(list(params), rates, norms, clipped, moved).items()}


def _schedules(counts: np.ndarray, wrong: str = "") -> dict[str, np.ndarray]:
    """Every schedule's learning rates by the oracle, or what one of the controls makes of them."""
    from parity import oracle

    def rate(step: int, warmup: int, end: int, low: float) -> float:
        if wrong == "decay_steps with warm-up" and step >= warmup:
            warmup = 0
        return float(float(PEAK["peak"]) * oracle.factor(step + (wrong == "schedule one step on"), warmup, end, low))

    return {k: np.array([rate(int(step), *numbers) for step in counts]) for k, numbers in SCHEDULES.items()}


def _jax_schedules(params: Any, counts: Any) -> dict[str, Any]:
    import jax

    from omni_jax.optim import warmup_cosine

    return {
        name: params["peak"] * jax.vmap(lambda step, numbers=numbers: warmup_cosine(step, *numbers))(counts)
        for name, numbers in SCHEDULES.items()
    }


def _torch_schedules(params: Any, counts: Any) -> dict[str, Any]:
    import torch

    from omni_torch.optim import warmup_cosine

    peak = params["peak"]
    factors = {k: [warmup_cosine(int(step), *numbers) for step in counts] for k, numbers in SCHEDULES.items()}
    return {k: peak * torch.tensor(v, dtype=peak.dtype, device=peak.device) for k, v in factors.items()}


# ------------------------------------------------------------------------------------------------ controls


def _schedule_controls(findings, counts, precision: str) -> list[Control]:
    """What is wrong with a schedule must be rejected on every schedule that it changes."""
    from parity.checks._steps import rejection
    from parity.precision import unit_roundoff

    unit = unit_roundoff(precision)
    truth = {k: v[2] for k, v in findings.values.items()}
    wrongs = {name: _schedules(counts, name) for name in ("schedule one step on", "decay_steps with warm-up")}
    wrongs |= {"no update": {k: np.zeros_like(v) for k, v in truth.items()}}
    wrongs |= {"sign flipped": {k: -v for k, v in truth.items()}}
    controls = []
    for name, rates in wrongs.items():
        changed = {k: rates[k] for k in truth if not np.array_equal(rates[k], truth[k])}
        controls.append(rejection(name, precision, changed, findings.values, unit, what="schedules"))
    return controls


def _controls(findings, by_step, rates, precision: str) -> list[Control]:
    from parity import oracle
    from parity.checks._steps import rejection
    from parity.precision import unit_roundoff
    from parity.verdict import Verdict

    base, warm, last = RECIPE["lr"], RECIPE["warmup_steps"], RECIPE["max_steps"]
    bare = [float(min(1.0, RECIPE["max_norm"] / oracle.global_norm(g))) for g in by_step]
    long = [
        oracle.factor(s, warm, last, MIN_RATIO) if s < warm else oracle.factor(s, 0, last, MIN_RATIO)
        for s in range(STEPS)
    ]
    wrongs: dict[str, dict[str, Any]] = {
        "clip without 1e-6": {
            f"{k}: clipped gradient": np.stack([np.asarray(g[k], np.float64) * c for g, c in zip(by_step, bare)])
            for k in by_step[0]
        },
        "schedule one step on": {
            "learning rate": np.array([float(base * oracle.factor(s + 1, warm, last, MIN_RATIO)) for s in range(STEPS)])
        },
        "decay_steps with warm-up": {"learning rate": np.array([float(base * x) for x in long])},
    }
    live = {k: v for k, v in findings.outputs.items() if v.verdict is not Verdict.UNDETERMINED}
    wrongs["no update"] = {k: np.zeros_like(findings.values[k][2]) for k in live}
    wrongs["sign flipped"] = {k: -findings.values[k][2] for k in live}
    if precision == "float32":
        # 1e-6 beside a norm near 1 is 17 float32 units; clipping where the norm is larger is fainter: float64's matter.
        del wrongs["clip without 1e-6"]
    unit = unit_roundoff(precision)
    return [rejection(name, precision, tensors, findings.values, unit) for name, tensors in wrongs.items()]
