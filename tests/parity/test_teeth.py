"""The teeth of the default run: real bugs, put into the torch side one at a time, part from what the run measured.

The JAX results, the reference and the noise are those of the default run, so nothing is compiled here. Each bug is
judged as the judge judges (parity.verdict.judge_tensor) on the run's own weights and inputs, with the clean noise.
Beside it stands what a familiar check would have said: np.allclose on the float32 logits of ordinary weights.
`pytest -s tests/parity/test_teeth.py` prints the table.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("jax")

import torch.nn.functional as F  # noqa: E402

import omni_torch.attention  # noqa: E402
import omni_torch.layers  # noqa: E402
import omni_torch.losses  # noqa: E402
import omni_torch.thinker  # noqa: E402
from parity.checks import Scope, _twins  # noqa: E402
from parity.fixtures import CONFIGS, REGIMES, calls_batch, configuration, loud_weights  # noqa: E402
from parity.judge import Findings  # noqa: E402
from parity.precision import unit_roundoff  # noqa: E402
from parity.sides import TorchSide  # noqa: E402
from parity.verdict import Verdict, judge_tensor  # noqa: E402

FAMILIAR = (1e-3, 1e-5)
"""Bounds that ports are usually held to: what they let through is shown, no verdict uses them."""

Patch = pytest.MonkeyPatch
Weights = dict[str, np.ndarray]
Config = Any


# --- bugs ------------------------------------------------------------------------------------------------------------


def everywhere(config: Config) -> bool:
    return True


def grouped(config: Config) -> bool:
    return config.use_gqa


def gated(config: Config) -> bool:
    return config.use_swiglu


def plain(config: Config) -> bool:
    return not config.use_swiglu


def routed(config: Config) -> bool:
    return config.use_moe


def first_attention(config: Config) -> str:
    return "blocks.0.attn"


def first_feed_forward(config: Config) -> str:
    return "blocks.0.moe" if config.use_moe else "blocks.0.mlp"


def last_feed_forward(config: Config) -> str:
    return first_feed_forward(config).replace("0", str(config.n_layers - 1))


def no_tap(config: Config) -> None:
    """The bug lies behind the last tap."""


@dataclass(frozen=True)
class Bug:
    """`inject(patch, module, weights)` changes the torch side only; `module` and `weights` are copies of its own."""

    name: str
    inject: Callable[[Patch, Any, Weights], None]
    applies: Callable[[Config], bool] = everywhere
    tap: Callable[[Config], str | None] = first_attention
    """Where it must part first."""
    harmless: tuple[str, ...] = ()
    """Regimes in which it changes nothing, by the nature of their weights."""


def set_eps(patch: Patch, module: Any, weights: Weights) -> None:
    for part in module.modules():
        if isinstance(part, omni_torch.layers.RMSNorm):
            part.eps = 1e-6


def eps_outside(patch: Patch, module: Any, weights: Weights) -> None:
    def forward(self, x):
        wide = omni_torch.layers.statistics_dtype(x.dtype)
        x_wide = x.to(wide)
        scale = 1.0 / (x_wide.square().mean(dim=-1, keepdim=True).sqrt() + self.eps)
        return (x_wide * scale * self.weight.to(wide)).to(x.dtype)

    patch.setattr(omni_torch.layers.RMSNorm, "forward", forward)


def angles(
    theta: float = 1.0, step: int = 0, limit: int | None = None, rounded: Any = None
) -> Callable[[Patch, Any, Weights], None]:
    """RoPE with another theta, positions moved on or clipped, or cos and sin rounded to another type."""

    def inject(patch: Patch, module: Any, weights: Weights) -> None:
        clean = omni_torch.thinker.rope_frequencies

        def frequencies(positions, head_dim, rope_theta, dtype):
            positions = positions + step if limit is None else positions.clamp(max=limit)
            found = clean(positions, head_dim, rope_theta * theta, dtype)
            return found if rounded is None else tuple(x.to(rounded).to(x.dtype) for x in found)

        patch.setattr(omni_torch.thinker, "rope_frequencies", frequencies)

    return inject


def unpadded_positions(patch: Patch, module: Any, weights: Weights) -> None:
    clean = omni_torch.thinker.default_positions
    patch.setattr(omni_torch.thinker, "default_positions", lambda time, mask, device=None: clean(time, None, device))


def query_one_on(patch: Patch, module: Any, weights: Weights) -> None:
    """The query's position is one too large: it is turned on by the angle of position 1."""
    clean, call = omni_torch.attention.apply_rope, itertools.count()

    def apply_rope(x, cos, sin):
        turned = clean(x, cos, sin)
        if next(call) % 2:  # q comes first, then k
            return turned
        one = torch.ones(1, 1, dtype=torch.int64)
        return clean(turned, *omni_torch.layers.rope_frequencies(one, x.shape[-1], 10000.0, x.dtype))

    patch.setattr(omni_torch.attention, "apply_rope", apply_rope)


def interleaved(patch: Patch, module: Any, weights: Weights) -> None:
    def apply_rope(x, cos, sin):
        cos, sin = cos[:, :, None], sin[:, :, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)

    patch.setattr(omni_torch.attention, "apply_rope", apply_rope)


def attention(
    score: Callable[[Any], Any] = lambda s: s,
    fill: float = -math.inf,
    probabilities: Callable[[Any], Any] = lambda p: p,
    tiled: bool = False,
    scale: Callable[[int], float] = lambda d: 1.0 / math.sqrt(d),
) -> Callable[[Patch, Any, Weights], None]:
    """Attention written out, with a place for each bug; without arguments it has none."""

    def attend(q, k, v, mask):
        groups = q.shape[2] // k.shape[2]
        k, v = (x.repeat(1, 1, groups, 1) if tiled else x.repeat_interleave(groups, dim=2) for x in (k, v))
        scores = score(torch.einsum("bthd,bshd->bhts", q, k) * scale(q.shape[-1]))
        scores = scores.masked_fill(~mask[:, None], fill)
        seen = torch.ones((), dtype=torch.bool) if math.isfinite(fill) else mask.any(-1)[:, None, :, None]
        p = torch.softmax(torch.where(seen, scores, 0.0), dim=-1)
        return torch.einsum("bhts,bshd->bthd", probabilities(p) * seen, v)

    return lambda patch, module, weights: patch.setattr(omni_torch.attention, "_attend_fused", attend)


def sees_ahead(patch: Patch, module: Any, weights: Weights) -> None:
    def mask(batch, time, attention_mask=None, device=None):
        return torch.ones(time, time, dtype=torch.bool).tril(1)[None] & attention_mask[:, None, :]

    patch.setattr(omni_torch.thinker, "make_attention_mask", mask)


def sees_not_itself(patch: Patch, module: Any, weights: Weights) -> None:
    def mask(batch, time, attention_mask=None, device=None):
        return torch.ones(time, time, dtype=torch.bool).tril(-1)[None] & attention_mask[:, None, :]

    patch.setattr(omni_torch.thinker, "make_attention_mask", mask)


def padding_seen(patch: Patch, module: Any, weights: Weights) -> None:
    def mask(batch, time, attention_mask=None, device=None):
        return torch.ones(time, time, dtype=torch.bool).tril()[None]

    patch.setattr(omni_torch.thinker, "make_attention_mask", mask)


def activation(
    gate: Callable[[Any], Any], swapped: bool = False, block: int | None = None
) -> Callable[[Patch, Any, Weights], None]:
    def inject(patch: Patch, module: Any, weights: Weights) -> None:
        chosen = [
            part
            for name, part in module.named_modules()
            if isinstance(part, omni_torch.layers.SwiGLU) and (block is None or name.startswith(f"blocks.{block}."))
        ]
        for part in chosen:
            part.wrong = True
        clean = omni_torch.layers.SwiGLU.forward

        def forward(self, x):
            if not hasattr(self, "wrong"):
                return clean(self, x)
            first, second = self.gate_proj(x), self.up_proj(x)
            first, second = (second, first) if swapped else (first, second)
            return self.down_proj(gate(first) * second)

        patch.setattr(omni_torch.layers.SwiGLU, "forward", forward)

    return inject


def tanh_gelu(patch: Patch, module: Any, weights: Weights) -> None:
    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))

    patch.setattr(omni_torch.layers.GELUMLP, "forward", forward)


def changed(key: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Patch, Any, Weights], None]:
    """Every weight whose name holds `key` is loaded wrongly."""

    def inject(patch: Patch, module: Any, weights: Weights) -> None:
        chosen = [name for name in weights if key in name]
        assert chosen
        for name in chosen:
            weights[name] = np.ascontiguousarray(change(weights[name]))

    return inject


def router(weigh: Callable[[Any, int], tuple[Any, Any]]) -> Callable[[Patch, Any, Weights], None]:
    """MoE whose weights and experts come from `weigh(router logits, k)`."""

    def forward(self, x):
        x_ND = x.reshape(-1, x.shape[-1])
        weights, chosen = weigh(F.linear(x_ND, self.router.weight), self.num_experts_per_tok)
        y_ND = torch.zeros_like(x_ND)
        for e, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == e)
            y_ND = y_ND.index_add(0, rows, weights[rows, slots, None] * expert(x_ND[rows]))
        return y_ND.reshape(x.shape)

    return lambda patch, module, weights: patch.setattr(omni_torch.layers.MoE, "forward", forward)


def not_renormalised(logits: Any, k: int) -> tuple[Any, Any]:
    return tuple(torch.topk(torch.softmax(logits, dim=-1), k, dim=-1))


def softmax_after(logits: Any, k: int) -> tuple[Any, Any]:
    """The same but for the 1e-8 in the divisor."""
    top, chosen = torch.topk(logits, k, dim=-1)
    return torch.softmax(top, dim=-1), chosen


def worst_experts(logits: Any, k: int) -> tuple[Any, Any]:
    p, chosen = torch.topk(torch.softmax(logits, dim=-1), k, dim=-1, largest=False)
    return p / (p.sum(-1, keepdim=True) + 1e-8), chosen


def loss(ignore_index: int | None, mean_over_all: bool, dtype: Any = None) -> Callable[[Patch, Any, Weights], None]:
    def cross_entropy(logits, targets):
        flat, wanted = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
        flat = flat if dtype is None else flat.to(dtype).to(flat.dtype)
        ignored = -100 if ignore_index is None else ignore_index
        total = F.cross_entropy(flat, wanted, ignore_index=ignored, reduction="sum")
        return total / (wanted.numel() if mean_over_all else (wanted != ignored).sum())

    return lambda patch, module, weights: patch.setattr(omni_torch.losses, "cross_entropy", cross_entropy)


def padding_without_gradient(patch: Patch, module: Any, weights: Weights) -> None:
    module.tok_emb.padding_idx = 0
    patch.setattr(
        omni_torch.layers.TokenEmbedding,
        "forward",
        lambda self, tokens: F.embedding(tokens.long(), self.weight, padding_idx=self.padding_idx),
    )


def clipped_silu(x: Any) -> Any:
    return x * torch.sigmoid(x.clamp(-6, 6))


BUGS = [
    # The table of the noise units, with the row of what ordinary inputs never reach (its clamp stands in FAR).
    Bug("eps 1e-6", set_eps),
    Bug("eps outside the root", eps_outside),
    Bug("theta 10001", angles(theta=1.0001)),
    Bug("softmax rounded to bfloat16", attention(probabilities=lambda p: p.to(torch.bfloat16).to(p.dtype))),
    Bug("tanh GELU", tanh_gelu, plain, first_feed_forward),
    Bug("tanh GELU for SiLU", activation(lambda x: F.gelu(x, approximate="tanh")), gated, first_feed_forward),
    Bug("kv heads tiled", attention(tiled=True), grouped),
    Bug("q transposed", changed(".q.weight", np.transpose), grouped),
    Bug("o transposed", changed(".o.weight", np.transpose)),
    Bug("position + 1 of q", query_one_on),
    Bug("mask -1e4", attention(fill=-1e4)),
    Bug("sigmoid clipped at ±6", activation(clipped_silu), gated, first_feed_forward, ("fresh", "trained")),
    # Others that have happened in ports.
    Bug("gate and up swapped", activation(F.silu, swapped=True), gated, first_feed_forward),
    Bug("gate and up swapped in one block", activation(F.silu, True, 1), lambda c: gated(c) and c.n_layers > 1,
        lambda c: "blocks.1.mlp"),
    Bug("norm scales not loaded", changed("norm", np.ones_like), harmless=("fresh",)),
    Bug("last norm's scale not loaded", changed("norm.weight", np.ones_like), everywhere, lambda c: "norm", ("fresh",)),
    Bug("biases not loaded", changed("bias", np.zeros_like), plain, first_feed_forward),
    Bug("sees one token ahead", sees_ahead),
    Bug("does not see itself", sees_not_itself),
    Bug("padding attended to", padding_seen),
    Bug("RoPE interleaved", interleaved),
    Bug("RoPE angles in bfloat16", angles(rounded=torch.bfloat16)),
    Bug("scores over the square root of 2d", attention(scale=lambda d: 1.0 / math.sqrt(2 * d))),
    Bug("experts not renormalised", router(not_renormalised), routed, first_feed_forward),
    Bug("softmax after top-k", router(softmax_after), routed, first_feed_forward),
    Bug("the worst experts", router(worst_experts), routed, first_feed_forward),
    Bug("PAD counted in the loss", loss(None, False), tap=no_tap),
    Bug("mean over all targets", loss(0, True), tap=no_tap),
    Bug("PAD without gradient", padding_without_gradient, tap=no_tap),
]  # fmt: skip
FAR = [
    Bug("scores clamped at ±50", attention(score=lambda s: s.clamp(-50, 50))),
    Bug("positions clipped at 4,095", angles(limit=4095)),
    Bug("positions clipped at ctx_len", angles(limit=63)),
    Bug("default positions count padding", unpadded_positions),
]
"""Bugs that the calls of other shapes are there for."""
PINS = [
    Bug("RoPE angles in float32", angles(rounded=torch.float32)),
    Bug("probabilities in float32", attention(probabilities=lambda p: p.float().to(p.dtype))),
    Bug("loss in float32", loss(0, False, torch.float32), tap=no_tap),
]
"""Right but for a rounding to float32 inside: the same function to 24 bits."""
EQUIVALENT = [
    Bug("attention written out", attention()),
    Bug("position + 1 of q and k", angles(step=1)),
]
"""Changes that are no bugs: the same function in other words. What is turned by one more step on both sides of q·k
cancels."""


# --- the judgement ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mutated(case, one_thread):
    """(bug, configuration, regime, precision) -> (findings, results of the torch side); `calls` asks for the calls of
    other shapes instead of the batch with its gradients."""
    scope, seen = Scope(), {}

    def judge(bug: Bug, config: str, regime: str, precision: str, calls: bool = False):
        key = (bug.name, config, regime, precision, calls)
        if key in seen:
            return seen[key]
        clean, made = case(config, regime, precision), _twins._prepare(scope, config).twins
        clean, pair = (clean.calls, made.calls) if calls else (clean.main, made.pair)
        weights, batch = _twins._inputs(scope, config, regime)
        if calls:
            weights = loud_weights(made.config, weights)
            batch = calls_batch(batch[0], batch[2])
        pair, weights = copy.copy(pair), dict(weights)
        pair.torch = copy.deepcopy(pair.torch)
        with Patch.context() as patch:
            bug.inject(patch, pair.torch, weights)
            side = TorchSide(pair)
            outputs, taps = side(weights, batch, precision)
        seen[key] = _findings(clean, outputs, taps, side.pins), outputs
        return seen[key]

    return judge


def _findings(clean: Findings, outputs: Weights, taps: Weights, pins: tuple[str, ...]) -> Findings:
    """What the judge would have found with these results in the torch side's place."""
    unit, wide = unit_roundoff(clean.precision), clean.precision == "float64"

    def judged(name: str, theirs: np.ndarray):
        ours, _, truth, noise = clean.values[name]
        pinned = noise.scaled(unit_roundoff("float32")) if pins else None
        return judge_tensor(ours, theirs, truth, noise, unit, noisy_reference=wide, pins=pins, pinned=pinned)

    assert outputs.keys() == clean.outputs.keys()
    return Findings(
        clean.precision,
        clean.device,
        {name: judged(name, outputs[name]) for name in clean.outputs},
        {name: judged(f"tap {name}", taps[name]) for name in clean.taps},
        clean.shapes,
        clean.notes,
        clean.ties,
        {},
    )


def differing(found: Findings) -> list[str]:
    return [name for name, judgement in found.outputs.items() if judgement.verdict is Verdict.DIFFER]


def worst(found: Findings) -> float:
    return max(judgement.torch.rms for judgement in found.outputs.values())


def configs(bug: Bug) -> list[str]:
    return [name for name in CONFIGS if bug.applies(configuration(name))]


def each(bugs: list[Bug]) -> Any:
    return pytest.mark.parametrize("bug", bugs, ids=lambda bug: bug.name)


# --- the tests -------------------------------------------------------------------------------------------------------


@each(BUGS)
def test_the_bug_is_caught_in_every_configuration_and_at_its_place(mutated, case, bug: Bug) -> None:
    assert configs(bug)
    for config in configs(bug):
        assert case(config, "randomised", "float64").main.ties == 0
        found, _ = mutated(bug, config, "randomised", "float64")
        assert differing(found), f"{bug.name} passed on {config}"
        assert found.parted == bug.tap(configuration(config)), config


@each(BUGS)
def test_the_bug_is_caught_in_every_regime_that_can_have_it(mutated, bug: Bug) -> None:
    config = configs(bug)[0]
    for regime in REGIMES:
        if regime not in bug.harmless:
            found, _ = mutated(bug, config, regime, "float64")
            assert differing(found), f"{bug.name} passed on {config}, {regime}"


@each(FAR)
def test_the_bug_is_caught_by_the_calls_of_other_shapes(mutated, bug: Bug) -> None:
    for config in configs(bug):
        found, _ = mutated(bug, config, "randomised", "float64", calls=True)
        assert differing(found), f"{bug.name} passed on {config}"


@each(EQUIVALENT)
def test_other_words_for_the_same_function_agree(mutated, bug: Bug) -> None:
    """No false alarm from this file's own code, and none from what only looks like a bug."""
    for config in CONFIGS:
        for precision in ("float64", "float32"):
            found, _ = mutated(bug, config, "randomised", precision)
            verdicts = {j.verdict for j in (*found.outputs.values(), *found.taps.values())}
            assert verdicts <= {Verdict.AGREE, Verdict.UNDETERMINED}, config
            assert found.parted is None


@each(PINS)
def test_a_rounding_to_float32_inside_is_named(mutated, bug: Bug) -> None:
    for config in ("mha-swiglu", "moe-gqa-gelu"):
        found, _ = mutated(bug, config, "randomised", "float64")
        pinned = [j for j in (*found.outputs.values(), *found.taps.values()) if j.verdict is Verdict.PINNED]
        assert pinned
        assert not differing(found)
        assert all("rounded to float32 inside at torch aten._to_copy" in j.evidence for j in pinned)
        assert found.parted == bug.tap(configuration(config))


@each([bug for bug in BUGS if bug.name in ("eps 1e-6", "theta 10001")])
def test_float32_alone_catches_what_is_faint(mutated, bug: Bug) -> None:
    for config in CONFIGS:
        assert any(differing(mutated(bug, config, regime, "float32")[0]) for regime in REGIMES), config


@each([bug for bug in BUGS if bug.name in ("eps 1e-6", "eps outside the root", "theta 10001")])
def test_a_familiar_bound_misses_what_the_run_catches(mutated, case, bug: Bug) -> None:
    assert familiar(mutated, case, bug, "mha-swiglu", max(FAMILIAR))


def familiar(mutated, case, bug: Bug, config: str, bound: float) -> bool:
    """Would np.allclose on the float32 logits of ordinary weights have passed?"""
    logits = mutated(bug, config, "fresh", "float32")[1]["logits"]
    return np.allclose(logits, case(config, "fresh", "float32").main.values["logits"][1], rtol=bound, atol=bound)


def test_the_table(mutated, case, capsys) -> None:
    """Not a claim of its own: each bug's worst z, and what the familiar bounds would have said (`-s` prints it)."""
    lines = [f"{'bug':36}{'configuration':16}{'z64':>9}{'z32':>9}{'seen at 1e-3':>14}{'at 1e-5':>9}"]
    for bug in BUGS:
        config = configs(bug)[0]
        z = [worst(mutated(bug, config, "randomised", precision)[0]) for precision in ("float64", "float32")]
        seen = ["no" if familiar(mutated, case, bug, config, bound) else "yes" for bound in FAMILIAR]
        lines.append(f"{bug.name:36}{config:16}{z[0]:9.1e}{z[1]:9.1e}{seen[0]:>14}{seen[1]:>9}")
        assert z[0] > 1.0
    print("\n" + "\n".join(lines))


def test_a_real_bug_ends_a_whole_run_with_exit_1(monkeypatch):
    """Not only the judgement of a tensor: rows, controls, verdict and exit code of the run as the command makes it."""
    import omni_torch.thinker
    from parity.checks import Scope
    from parity.runner import run

    right = omni_torch.thinker.rope_frequencies
    monkeypatch.setattr(
        omni_torch.thinker, "rope_frequencies", lambda p, d, theta, dtype: right(p, d, theta + 1, dtype)
    )
    scope = Scope(configs=("gqa-swiglu",), regimes=("randomised",), precisions=("float64",))
    result = run(scope, ("logits", "gradients"))
    assert [str(check.verdict) for check in result.checks] == ["DIFFER", "DIFFER"]
    assert result.exit_code == 1
    assert any("the first tap that parts: blocks.0.attn" in row.evidence for row in result.checks[0].rows)
