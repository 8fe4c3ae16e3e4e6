"""The dropout check: it passes the twins, and rejects bugs put into them by name of row and side."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

from flax import nnx  # noqa: E402

import omni_jax.attention  # noqa: E402
import omni_jax.thinker  # noqa: E402
import omni_torch.attention  # noqa: E402
import omni_torch.thinker  # noqa: E402
from parity import statistics as st  # noqa: E402
from parity.checks import Scope, dropout  # noqa: E402
from parity.result import CheckResult, Row  # noqa: E402
from parity.verdict import Verdict  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ("small mha-swiglu", "small gqa-moe")
LEVEL = 1e-6
SAME = float(np.sqrt(np.finfo(np.float64).eps))
"""Relative: of two float64 algorithms for one number half the digits agree."""


@pytest.fixture(scope="module")
def result() -> CheckResult:
    return dropout.run(Scope(), lambda *_: None)


@pytest.fixture(scope="module")
def drawn() -> dict[str, dropout.Draws]:
    return {"jax": dropout._draw_jax(Scope()), "torch": dropout._draw_torch(Scope())}


def rejected(measured: list[dropout.Measured]) -> set[str]:
    return {m.topic.name for m in measured if m.rejected}


# --- the twins -------------------------------------------------------------------------------------------------------


def test_the_run_agrees(result):
    assert result.error is None
    assert [row for row in result.rows if row.verdict is not Verdict.AGREE] == []
    assert result.exit_code == 0


@pytest.mark.parametrize("control", dropout.CONTROLS)
def test_the_control_is_rejected(result, control):
    (found,) = [c for c in result.controls if c.name == control]
    assert found.rejected, found.evidence


def test_every_control_is_declared(result):
    assert [c.name for c in result.controls] == list(dropout.CONTROLS)


@pytest.mark.parametrize(("config", "precision"), [(SMALL[0], "float64"), (SMALL[0], "float32"), (SMALL[1], "float64")])
def test_logits_and_every_gradient_are_compared_with_and_without_masks(result, config, precision):
    parameters = dropout.small(config, Scope()).judge.pair.links
    wanted = {"logits", "loss", *(f"gradient {link.torch}" for link in parameters)}
    rows = [row for row in result.rows if (row.config, row.precision) == (config, precision)]
    dropped = {row.name for row in rows if row.regime == f"rate {dropout.GIVEN_RATE:g}"}
    kept = {row.name for row in rows if row.regime == "all kept"}
    assert dropped >= wanted
    assert kept >= wanted | {f"{name}, torch in evaluation" for name in wanted}
    additive = [row for row in rows if row.name == "attention, not renormalised"]
    assert len(additive) == (precision == "float64")


def test_own_masks_have_a_row_for_every_claim_and_side(result):
    rows = [row for row in result.rows if row.regime == "own masks"]
    names = {row.name.rpartition(" (")[0] for row in rows}
    places = dropout._places(2)
    assert len(places) == 6
    axes = ("step", "row", "head", "position", "channel")
    wanted = {f"rate, {place}" for place in places} | {f"independence between {axis}s" for axis in axes}
    wanted |= {"independence between places and layers", "scale of what is kept", "evaluation drops nothing"}
    wanted |= {"the same seed, the same masks", "another seed, other masks", "attention drops probabilities"}
    wanted |= {"places that drop"}
    assert names == wanted
    assert len(rows) == 2 * len(wanted)
    for row in rows:
        if row.name.startswith("rate"):
            assert " in [" in row.evidence
            assert row.smallest_seen is not None
            assert row.smallest_seen < 0.1 * dropout.RATE


def test_one_overall_error_level(drawn):
    outcomes = [outcome for m in dropout.measure(drawn) for outcome in m.outcomes]
    assert {outcome.level for outcome in outcomes} == {st.share(len(outcomes))}
    assert all(outcome.n >= st.MINIMUM for outcome in outcomes)


@pytest.mark.parametrize("seed", [1, 2])
def test_other_seeds_pass(seed):
    for side, draw in (("jax", dropout._draw_jax), ("torch", dropout._draw_torch)):
        assert rejected(dropout.measure({side: draw(Scope(seed=seed))})) == set()


def test_only_float32_looks_at_own_masks():
    narrow = dropout.run(Scope(precisions=("bfloat16",)), lambda *_: None)
    assert narrow.exit_code == 3
    assert narrow.error is not None
    assert "float64 and float32" in narrow.error


def test_the_same_seed_builds_the_same_streams_and_another_one_others():
    def streams(seed: int) -> list[np.ndarray]:
        rest = nnx.split(omni_jax.thinker.ThinkerLM.from_config(config, rngs=nnx.Rngs(seed)), nnx.Param, ...)[2]
        return [
            np.asarray(jax.random.key_data(x))
            for x in jax.tree.leaves(rest)
            if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        ]

    config = omni_jax.thinker.ThinkerConfig(**dropout._OWN)
    first, again, other = streams(3), streams(3), streams(4)
    assert len(first) == 4  # attention and block of two layers
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert len({key.tobytes() for key in first + other}) == 8


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5])
def test_the_scale_at_other_rates_is_the_rounded_quotient(rate):
    """float32's 1 / (1 − rate), on both sides: neither the float64 quotient cast twice nor its reciprocal's."""
    ones = np.ones(2000, np.float32)
    ours = np.asarray(omni_jax.layers.make_dropout(rate, nnx.Rngs(0))(jax.numpy.asarray(ones)))
    theirs = torch.nn.Dropout(rate)(torch.from_numpy(ones)).numpy()
    exact = np.float32(1.0) / np.float32(1.0 - rate)
    assert set(np.unique(ours)) == set(np.unique(theirs)) == {np.float32(0.0), exact}


# --- bugs in the twins, given masks ----------------------------------------------------------------------------------


def given(config: str, small: dropout.Small | None = None, precision: str = "float64") -> dict[str, Row]:
    """Rows of given masks, judged anew on the torch side (and on the JAX side, if another pair is given)."""
    made = small or dropout.small(config, Scope())
    inputs, keeps = dropout.batch(made.config, 0), dropout._keeps(made.config, 0)
    dropped = made.judge(made.weights, (*inputs, *dropout._masks(keeps)), precision)
    kept = made.judge(made.weights, (*inputs, *dropout.all_kept(made.config, inputs[0])), precision)
    rows = {row.name: row for row in dropped.rows("dropout", config, "")}
    rows["additive"] = dropout._additive(made, dropped, kept, inputs, keeps)
    return rows


def differing(rows: dict[str, Row]) -> set[str]:
    return {name for name, row in rows.items() if row.verdict is Verdict.DIFFER}


def _torch_attend(after: Callable[..., Any]) -> Callable[..., Any]:
    """attend whose dropout is followed by something."""
    clean = omni_torch.attention.attend

    def attend(q, k, v, mask, *, dropout=None):
        return clean(q, k, v, mask, dropout=dropout and (lambda p: after(dropout, p)))

    return attend


@pytest.mark.parametrize("config", SMALL)
def test_renormalised_probabilities_are_seen_on_the_torch_side(monkeypatch, config):
    def renormalised(drop, p):
        y = drop(p)
        total = y.sum(dim=-1, keepdim=True)
        return y / total.masked_fill(total == 0.0, 1.0)

    monkeypatch.setattr(omni_torch.attention, "attend", _torch_attend(renormalised))
    assert {"logits", "loss", "additive", "tap blocks.0.attn"} <= differing(given(config))


def test_renormalised_probabilities_are_seen_on_the_jax_side(monkeypatch):
    clean = omni_jax.attention.attend

    def attend(q, k, v, mask, *, dropout=None):
        def renormalised(p):
            assert dropout is not None
            y = dropout(p)
            total = jax.numpy.sum(y, axis=-1, keepdims=True)
            return y / jax.numpy.where(total == 0.0, 1.0, total)

        return clean(q, k, v, mask, dropout=renormalised)

    monkeypatch.setattr(omni_jax.attention, "attend", attend)
    rows = given("small mha-swiglu", dropout.small.__wrapped__("small mha-swiglu", Scope(draws=5)))
    assert {"logits", "loss", "tap blocks.0.attn", "additive"} <= differing(rows)


@pytest.mark.parametrize("config", SMALL)
def test_attention_without_dropout_is_seen(monkeypatch, config):
    monkeypatch.setattr(omni_torch.attention, "attend", _torch_attend(lambda drop, p: p))
    for precision in dropout.PRECISIONS:
        made = dropout.small(config, Scope())
        inputs, keeps = dropout.batch(made.config, 0), dropout._keeps(made.config, 0)
        found = made.judge(made.weights, (*inputs, *dropout._masks(keeps)), precision)
        assert found.outputs["logits"].verdict is Verdict.DIFFER


@pytest.mark.parametrize("config", SMALL)
def test_a_branch_without_dropout_is_seen_and_where_it_parts(monkeypatch, config):
    def forward(self, x, cos, sin, mask, cache=None):
        x = x + self.drop(self.attn(self.norm1(x), cos, sin, mask))
        return x + (self.moe if self.use_moe else self.mlp)(self.norm2(x))

    monkeypatch.setattr(omni_torch.thinker.Block, "forward", forward)
    rows = given(config)
    assert "logits" in differing(rows)
    assert "tap blocks.0.attn" not in differing(rows)
    assert "the first tap that parts: blocks.0" in rows["logits"].evidence


def test_dropout_of_the_stream_instead_of_the_branch_is_seen(monkeypatch):
    def forward(self, x, cos, sin, mask, cache=None):
        x = self.drop(x + self.attn(self.norm1(x), cos, sin, mask))
        return self.drop(x + self.mlp(self.norm2(x)))

    monkeypatch.setattr(omni_torch.thinker.Block, "forward", forward)
    assert {"logits", "loss", "gradient tok_emb.weight"} <= differing(given("small mha-swiglu"))


# --- bugs in the twins, own masks ------------------------------------------------------------------------------------


def own(side: str) -> set[str]:
    draw = dropout._draw_jax if side == "jax" else dropout._draw_torch
    return rejected(dropout.measure({side: draw(Scope())}))


RATES = {f"rate, {place}" for place in dropout._places(2)}


def _torch_dropout(monkeypatch, forward: Callable[[Any, Any], Any]) -> None:
    monkeypatch.setattr(torch.nn.Dropout, "forward", forward)


def _bernoulli(self, shape) -> Any:
    return torch.rand(shape) >= self.p


def test_missing_scale_on_the_torch_side(monkeypatch):
    _torch_dropout(monkeypatch, lambda self, x: x * _bernoulli(self, x.shape) if self.training else x)
    assert own("torch") == {"scale of what is kept"}


def test_scale_at_test_time_instead_on_the_torch_side(monkeypatch):
    """The first paper's form: training as it is, evaluation times 1 − rate."""
    _torch_dropout(monkeypatch, lambda self, x: x * _bernoulli(self, x.shape) if self.training else x * (1.0 - self.p))
    assert own("torch") == {"scale of what is kept", "evaluation drops nothing"}


def test_kept_with_the_probability_of_dropping_on_the_torch_side(monkeypatch):
    def forward(self, x):
        return x * (torch.rand(x.shape) < self.p) / (1.0 - self.p) if self.training else x

    _torch_dropout(monkeypatch, forward)
    assert own("torch") >= RATES


def test_nine_tenths_of_the_rate_on_the_torch_side(monkeypatch):
    def forward(self, x):
        return x * (torch.rand(x.shape) >= 0.9 * self.p) / (1.0 - self.p) if self.training else x

    _torch_dropout(monkeypatch, forward)
    assert own("torch") >= RATES


@pytest.mark.parametrize(("axis", "what"), [(0, "row"), (1, "head"), (2, "position"), (3, "channel")])
def test_one_mask_along_an_axis_on_the_torch_side(monkeypatch, axis, what):
    """Attention has heads as its second and third axis, the branches have positions and channels."""

    def forward(self, x):
        if not self.training:
            return x
        shape = list(x.shape)
        at = {"row": 0, "head": 2, "position": 1, "channel": 2}[what]
        if (x.ndim == 5) == (what == "head") or what == "row":
            shape[at] = 1
        return x * _bernoulli(self, shape) / (1.0 - self.p)

    _torch_dropout(monkeypatch, forward)
    found = own("torch")
    assert f"independence between {what}s" in found
    assert not any("scale" in name or "seed" in name or "evaluation" in name for name in found)


def test_left_on_in_evaluation_on_the_torch_side(monkeypatch):
    _torch_dropout(monkeypatch, lambda self, x: torch.nn.functional.dropout(x, self.p, True))
    assert own("torch") == {"evaluation drops nothing"}


def test_a_generator_reset_at_every_call_on_the_torch_side(monkeypatch):
    clean = omni_torch.thinker.ThinkerLM.forward

    def forward(self, *args, **kwargs):
        torch.manual_seed(5)
        return clean(self, *args, **kwargs)

    monkeypatch.setattr(omni_torch.thinker.ThinkerLM, "forward", forward)
    # Steps that repeat each other are no further draws: other rows may be rejected for too small a sample.
    assert own("torch") >= {"independence between steps", "another seed, other masks"}


def test_a_place_that_does_not_drop_is_a_difference(monkeypatch):
    monkeypatch.setattr(omni_torch.attention, "attend", _torch_attend(lambda drop, p: p))
    found = dropout.run(Scope(precisions=("float32",), controls=False), lambda *_: None)
    (row,) = [row for row in found.rows if row.name == "places that drop (torch)"]
    assert row.verdict is Verdict.DIFFER
    assert row.evidence.startswith("4 places dropped something, expected 6")
    assert found.exit_code == 1


def _jax_dropout(monkeypatch, change: Callable[[nnx.Dropout], None]) -> None:
    clean = omni_jax.thinker.make_dropout

    def make(rate, rngs):
        made = clean(rate, rngs)
        change(made)
        return made

    for module in (omni_jax.attention, omni_jax.thinker):
        monkeypatch.setattr(module, "make_dropout", make)


def test_one_key_for_all_layers_on_the_jax_side(monkeypatch):
    clean = omni_jax.thinker._draw

    def draw(*args):
        flat = nnx.to_flat_state(clean(*args))
        keys = [leaf for _, leaf in flat if isinstance(leaf, nnx.RngKey)]
        for leaf in keys:
            leaf.set_value(keys[0].get_value())
        return nnx.from_flat_state(flat)

    monkeypatch.setattr(omni_jax.thinker, "_draw", draw)
    assert own("jax") == {"independence between places and layers"}


def test_a_mask_shared_by_heads_and_channels_on_the_jax_side(monkeypatch):
    _jax_dropout(monkeypatch, lambda drop: setattr(drop, "broadcast_dims", (2,)))
    found = own("jax")
    assert {"independence between heads", "independence between channels"} <= found
    assert "scale of what is kept" not in found


def test_nine_tenths_of_the_rate_on_the_jax_side(monkeypatch):
    _jax_dropout(monkeypatch, lambda drop: setattr(drop, "rate", 0.9 * drop.rate))
    assert own("jax") >= RATES | {"scale of what is kept"}


def test_left_on_in_evaluation_on_the_jax_side(monkeypatch):
    clean = nnx.Dropout.__call__
    monkeypatch.setattr(nnx.Dropout, "__call__", lambda self, x: clean(self, x, deterministic=False))
    assert own("jax") == {"evaluation drops nothing"}


def test_counters_that_do_not_move_on_the_jax_side(monkeypatch):
    clean = nnx.Dropout.__call__

    def call(self, x, **kwargs):
        stream = self.rngs
        before = stream.count.get_value()
        y = clean(self, x, **kwargs)
        stream.count.set_value(before)
        return y

    monkeypatch.setattr(nnx.Dropout, "__call__", call)
    # The two branches of a block call the same module.
    assert own("jax") >= {"independence between steps", "independence between places and layers"}


# --- the tests of masks ----------------------------------------------------------------------------------------------


def test_the_rate_test_is_the_exact_binomial_one():
    from scipy.stats import binomtest

    rng = np.random.default_rng(0)
    for n in (1000, 2001):
        kept = rng.random(n) >= dropout.RATE
        found, exact = dropout._rate_test(kept, 0.01), binomtest(int(n - kept.sum()), n, dropout.RATE)
        interval = exact.proportion_ci(0.99, method="exact")
        assert found.interval is not None
        assert math.isclose(found.interval[0], interval.low, rel_tol=SAME)
        assert math.isclose(found.interval[1], interval.high, rel_tol=SAME)
        # Twice the smaller tail, where scipy adds up both tails' outcomes that are as unlikely: near, and not smaller
        # than the smaller tail.
        assert exact.pvalue / 2 < found.p < 2 * exact.pvalue


def test_the_hypergeometric_tail_is_exact():
    from scipy.stats import hypergeom

    for both, first, second, n in ((60, 250, 260, 1000), (90, 250, 260, 1000), (0, 400, 300, 1000)):
        law = hypergeom(n, first, second)
        assert math.isclose(dropout._hypergeometric(both, first, second, n, upper=True), law.sf(both - 1), rel_tol=SAME)
        assert math.isclose(dropout._hypergeometric(both, first, second, n, upper=False), law.cdf(both), rel_tol=SAME)


def test_right_masks_pass_at_the_stated_rate():
    """p-values of right masks are at least as large as they should be: at 5 %, of 400 tests about 20."""
    rng = np.random.default_rng(1)
    alarms = dict.fromkeys(("rate", "even", "pairs"), 0)
    for _ in range(400):
        kept = rng.random((8, 1000)) >= dropout.RATE
        alarms["rate"] += dropout._rate_test(kept, 0.05).rejected
        alarms["even"] += dropout._even_test(kept, "x", 0.05).rejected
        alarms["pairs"] += dropout._pairs_test(kept, "x", 0.05).rejected
    # Five standard deviations above 20.
    assert max(alarms.values()) < 20 + 5 * math.sqrt(19), alarms
    assert min(alarms.values()) > 0


def test_the_smallest_deviation_is_seen_as_often_as_stated():
    rng = np.random.default_rng(2)
    n, seen = 4000, 0
    smallest = dropout._rate_test(rng.random(n) >= dropout.RATE, LEVEL).smallest
    for _ in range(300):
        seen += dropout._rate_test(rng.random(n) >= dropout.RATE - smallest, LEVEL).rejected
    spread = math.sqrt(st.POWER * (1 - st.POWER) / 300)
    assert abs(seen / 300 - st.POWER) < 5 * spread


def test_masks_that_do_not_vary_are_rejected():
    outcome = dropout._pairs_test(np.ones((4, 1000), bool), "steps", LEVEL)
    assert outcome.rejected


def test_probabilities_that_are_none_are_named(drawn):
    draws = drawn["torch"]
    name = dropout._places(2)[0]
    bad = replace(draws, given={**draws.given, name: 2 * draws.given[name]})
    assert "are no probabilities" in dropout._probabilities(bad)
    assert dropout._probabilities(draws) == ""
