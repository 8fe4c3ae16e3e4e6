"""parity.judge on a pair that is not ours: a small torch network and the same function written plainly in JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from torch import nn

from parity.errors import CannotLook
from parity.judge import Findings, Judge
from parity.pair import Pair, pair_of
from parity.precision import unit_roundoff
from parity.verdict import Verdict, judge_tensor

C, T, D = 4, 9, 6
DRAWS = 16


# ------------------------------------------------------------------------------------------------ the pair


class Net(nn.Module):
    """conv (over time) -> layer norm -> square linear -> exact GELU -> linear."""

    def __init__(self, eps: float = 1e-5, approximate: str = "none"):
        super().__init__()
        self.conv = nn.Conv1d(C, D, 3, padding=1)
        self.norm = nn.LayerNorm(D, eps=eps)
        self.fc1 = nn.Linear(D, D)
        self.act = nn.GELU(approximate=approximate)
        self.fc2 = nn.Linear(D, 3)

    def forward(self, x):
        h = self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2))
        return self.fc2(self.act(self.fc1(h)))


def net(p: Any, x):
    """The same in JAX: x (B, T, C), the convolution in NWC."""
    y = lax.conv_general_dilated(x, p["conv"]["kernel"], (1,), ((1, 1),), dimension_numbers=("NWC", "WIO", "NWC"))
    h = y + p["conv"]["bias"][None, None]
    mean = h.mean(-1, keepdims=True)
    variance = jnp.square(h - mean).mean(-1, keepdims=True)
    h = (h - mean) * lax.rsqrt(variance + 1e-5) * p["norm"]["scale"][None, None] + p["norm"]["bias"][None, None]
    h = checkpoint_name(h, "norm")
    h = checkpoint_name(h @ p["fc1"]["kernel"] + p["fc1"]["bias"][None, None], "fc1")
    h = checkpoint_name(jax.nn.gelu(h, approximate=False), "act")
    return checkpoint_name(h @ p["fc2"]["kernel"] + p["fc2"]["bias"][None, None], "fc2")


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


TEMPLATE = {
    "conv": {"kernel": zeros(3, C, D), "bias": zeros(D)},
    "norm": {"scale": zeros(D), "bias": zeros(D)},
    "fc1": {"kernel": zeros(D, D), "bias": zeros(D)},
    "fc2": {"kernel": zeros(D, 3), "bias": zeros(3)},
}
LOSS = (lambda y, x: jnp.square(y).mean(), lambda y, x: y.square().mean())
RNG = np.random.default_rng(5)
WEIGHTS = {
    name: RNG.standard_normal(tuple(p.shape)).astype(np.float32) / np.float32(np.sqrt(max(p[0].numel(), 1)))
    for name, p in Net().named_parameters()
}
INPUTS = (RNG.standard_normal((2, T, C)).astype(np.float32),)


def judged(precision: str = "float64", torch_side: Any = None, function: Callable = net, **kw: Any) -> Findings:
    pair = pair_of(function, Net() if torch_side is None else torch_side, TEMPLATE, **kw)
    return Judge(pair, draws=DRAWS)(WEIGHTS, INPUTS, precision)


def verdicts(findings: Findings) -> set[Verdict]:
    return {j.verdict for j in (*findings.outputs.values(), *findings.taps.values())}


@pytest.fixture(scope="module")
def clean() -> Judge:
    return Judge(pair_of(net, Net(), TEMPLATE, loss=LOSS), draws=DRAWS)


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
def test_the_clean_pair_agrees(clean: Judge, precision: str):
    findings = clean(WEIGHTS, INPUTS, precision)
    assert set(findings.outputs) == {"output", "loss"} | {f"gradient {name}" for name in WEIGHTS}
    assert list(findings.taps) == ["norm", "fc1", "act", "fc2"]
    assert verdicts(findings) == {Verdict.AGREE}
    assert findings.parted is None
    for name, judgement in findings.outputs.items():
        assert 0 < judgement.smallest_seen < 1e3 * unit_roundoff(precision), name
    rows = findings.rows("forward", "net", "ordinary", ["output", "tap norm"])
    assert [(r.name, r.precision, r.shape) for r in rows] == [
        ("output", precision, (2, T, 3)),
        ("tap norm", precision, (2, T, D)),
    ]


def test_shared_draws_do_not_share_rounded_weights(clean: Judge):
    fine = {k: v + np.random.default_rng(1).standard_normal(v.shape) / 3 for k, v in WEIGHTS.items()}  # float64 values
    wide = clean(fine, INPUTS, "float64").outputs["output"]
    after = clean(fine, INPUTS, "float32").outputs["output"]
    fresh = Judge(clean.pair, draws=DRAWS)(fine, INPUTS, "float32").outputs["output"]
    assert wide.verdict is after.verdict is Verdict.AGREE
    assert after == fresh


# ------------------------------------------------------------------------------------------------ bugs


BUGS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "eps": (lambda: Net(eps=1e-6), {}, "norm"),
    "gelu": (lambda: Net(approximate="tanh"), {}, "act"),
    "transposed square weight": (Net, {"axes": {"fc1.kernel": (0, 1)}}, "fc1"),
    "swapped names": (Net, {"rename": {"norm.bias": "fc1.bias", "fc1.bias": "norm.bias"}}, "norm"),
}


@pytest.mark.parametrize("bug", list(BUGS))
def test_a_bug_differs_and_is_located(bug: str):
    make, layout, first = BUGS[bug]
    findings = judged(torch_side=make(), **layout)
    assert findings.outputs["output"].verdict is Verdict.DIFFER
    assert "not the same function" in findings.outputs["output"].evidence
    assert findings.parted == first
    (row,) = findings.rows("forward", "net", "ordinary", ["output"])
    assert f"the first tap that parts: {first}" in row.evidence


def test_a_small_bug_is_seen_in_gradients_too():
    findings = judged(torch_side=Net(eps=1e-6), loss=LOSS)
    gradients = {name: j.verdict for name, j in findings.outputs.items() if name.startswith("gradient")}
    assert set(gradients.values()) == {Verdict.DIFFER} or gradients["gradient conv.weight"] is Verdict.DIFFER


def test_low_precision_is_told_from_another_function():
    class Coarse(Net):
        def forward(self, x):
            h = self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2))
            coarse = self.fc1(h).to(torch.bfloat16).to(h.dtype) if h.dtype == torch.float32 else self.fc1(h)
            return self.fc2(self.act(coarse))

    assert judged(torch_side=Coarse()).outputs["output"].verdict is Verdict.AGREE
    coarse = judged("float32", torch_side=Coarse()).outputs["output"]
    assert coarse.verdict is Verdict.DIFFER
    assert coarse.evidence.startswith("torch left the float64 reference")


def test_nan_on_one_side_differs():
    class Broken(Net):
        def forward(self, x):
            y = super().forward(x)
            return torch.where(y > y.max() - 1e-9, torch.nan, y)

    found = judged(torch_side=Broken()).outputs["output"]
    assert found.verdict is Verdict.DIFFER
    assert "not finite in 1 elements on one side only" in found.evidence


# ------------------------------------------------------------------------------------------------ could not look


def test_a_crashed_torch_side_speaks_for_itself():
    class Crash(Net):
        def forward(self, x):
            raise RuntimeError("no such kernel")

    with pytest.raises(CannotLook, match="the torch side raised RuntimeError: no such kernel"):
        judged(torch_side=Crash())


def test_a_crashed_jax_side_speaks_for_itself():
    def crash(p, x):
        raise KeyError("fc9")

    with pytest.raises(CannotLook, match=r"the JAX side raised KeyError.*fc9"):
        judged(function=crash)


def test_results_of_another_structure_cannot_be_compared():
    with pytest.raises(CannotLook, match=r"a \(JAX only\), output \(torch only\)"):
        judged(function=lambda p, x: {"a": net(p, x)})
    with pytest.raises(CannotLook, match="nothing was compared"):
        judged(function=lambda p, x: (), torch_side=_Returning(lambda y: ()))


def test_results_of_another_shape_cannot_be_compared():
    with pytest.raises(CannotLook, match=r"shape \(2, 9, 3\), the torch side \(2, 9, 1\)"):
        judged(torch_side=_Returning(lambda y: y[..., :1]))


class _Returning(Net):
    def __init__(self, change: Callable[[Any], Any]):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(super().forward(x))


def test_a_float64_run_that_returns_float32_was_no_test():
    with pytest.raises(CannotLook, match="the torch side returned float32 in its float64 run"):
        judged(torch_side=_Returning(lambda y: y.float()))
    with pytest.raises(CannotLook, match="the jax side returned float32 in its float64 run"):
        judged(function=lambda p, x: net(p, x).astype(jnp.float32))


def test_complex_results_are_not_cut_to_their_real_part():
    with pytest.raises(CannotLook, match="complex"):
        judged(function=lambda p, x: jnp.fft.fft(net(p, x)), torch_side=_Returning(torch.fft.fft))


def test_taps_that_were_asked_for_must_show():
    with pytest.raises(CannotLook, match=r"fc7 \(JAX\).*fc8 \(torch\)"):
        judged(taps={"norm": "norm", "fc7": "fc8"})
    assert list(judged(taps={"act": "act", "norm": "norm"}).taps) == ["norm", "act"]  # in the order of execution
    assert judged(taps={}).taps == {}


# ------------------------------------------------------------------------------------------------ pins, instability


def narrowed(y):
    return y.to(torch.float32).to(y.dtype)


def test_a_pin_on_one_side_is_pinned_not_different():
    there = judged(torch_side=_Returning(narrowed))
    assert there.outputs["output"].verdict is Verdict.PINNED
    assert any("torch aten._to_copy" in note for note in there.notes)

    here = judged(function=lambda p, x: net(p, x).astype(jnp.float32).astype(x.dtype))
    assert here.outputs["output"].verdict is Verdict.PINNED
    assert any("test_judge.py" in note for note in here.notes)
    assert here.parted is None  # the taps lie before the pin


def test_a_pin_in_the_loss_is_seen():
    findings = judged(loss=(LOSS[0], lambda y, x: narrowed(y).square().mean()))
    assert findings.outputs["output"].verdict is Verdict.AGREE
    assert findings.outputs["loss"].verdict is Verdict.PINNED


def test_a_pin_does_not_excuse_a_bug():
    class Both(Net):
        def forward(self, x):
            return narrowed(super().forward(x))

    found = judged(torch_side=Both(eps=1e-3))
    assert found.outputs["output"].verdict is Verdict.DIFFER


def test_a_function_that_loses_bits_is_unstable():
    def good(p, x):
        mean = x.mean(-1, keepdims=True)
        return (x - mean) * lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-5)

    def fast(p, x):
        mean = x.mean(-1, keepdims=True)
        return (x - mean) * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean) + 1e-5)

    def as_good(params, x):
        mean = x.mean(-1, keepdim=True)
        return (x - mean) * torch.rsqrt((x - mean).square().mean(-1, keepdim=True) + 1e-5)

    def as_fast(params, x):
        mean = x.mean(-1, keepdim=True)
        return (x - mean) * torch.rsqrt(x.square().mean(-1, keepdim=True) - mean.square() + 1e-5)

    inputs = (np.random.default_rng(4).standard_normal((8, 64)) + 1e4,)
    for ours, theirs, expected in ((good, as_good, Verdict.AGREE), (fast, as_fast, Verdict.UNSTABLE)):
        judge = Judge(Pair(ours, theirs, {}, []), draws=DRAWS)
        assert judge({}, inputs, "float64").outputs["output"].verdict is expected


def test_values_below_the_smallest_normal_number_are_not_judged_by_the_bit():
    pair = Pair(lambda p, x: jnp.exp(x), lambda p, x: torch.exp(x), {}, [])
    judge = Judge(pair, draws=DRAWS)
    inputs = (np.linspace(-103, 1, 300).astype(np.float32),)
    for precision in ("float64", "float32"):
        assert judge({}, inputs, precision).outputs["output"].verdict is Verdict.AGREE


def test_experts_tied_within_the_noise_are_undetermined():
    def routed(p, x):
        scores, chosen = lax.top_k(0.3 * x, 1)  # rounded: equal values that carry noise
        return jnp.take_along_axis(jnp.cos(jnp.arange(3, dtype=x.dtype))[None], chosen, 1) * jnp.exp(scores)

    def same(params, x):
        scores, chosen = torch.topk((0.3 * x).flip(-1), 1)  # another order of looking: the other of two equals wins
        return torch.cos(torch.arange(3, dtype=x.dtype))[2 - chosen] * torch.exp(scores)

    tied = np.tile(np.array([[0.7, 0.7, -1.0]], np.float32), (80, 1))
    judge = Judge(Pair(routed, same, {}, []), draws=DRAWS)
    found = judge({}, (tied,), "float32")
    assert found.ties == 80
    assert found.outputs["output"].verdict is Verdict.UNDETERMINED
    clear = np.tile(np.array([[0.5, 0.1, -1.0]], np.float32), (80, 1))
    assert judge({}, (clear,), "float32").outputs["output"].verdict is Verdict.AGREE


# ------------------------------------------------------------------------------------------------ other references


def test_an_oracle_stands_in_for_the_reference(clean: Judge):
    good = {name: v[2] for name, v in clean(WEIGHTS, INPUTS, "float32").values.items() if not name.startswith("tap ")}
    assert verdicts(clean(WEIGHTS, INPUTS, "float32", oracle=good)) == {Verdict.AGREE}
    bad = good | {"output": good["output"] * (1 + 1e-4)}
    found = clean(WEIGHTS, INPUTS, "float32", oracle=bad).outputs
    assert found["output"].verdict is Verdict.DIFFER
    assert found["output"].evidence.startswith("jax and torch left")
    assert found["loss"].verdict is Verdict.AGREE
    with pytest.raises(CannotLook, match="loss"):
        clean(WEIGHTS, INPUTS, "float32", oracle={k: v for k, v in good.items() if k != "loss"})
    with pytest.raises(CannotLook, match=r"output: .* reference has \(3,\)"):
        clean(WEIGHTS, INPUTS, "float32", oracle=good | {"output": np.zeros(3)})


def test_an_origin_turns_positions_into_displacements():
    def step(p, x):
        return {"w": p["w"] - 1e-6 * x}

    def nothing(params, x):
        return {"w": params["w"] + 0 * x}

    def right(params, x):
        return {"w": params["w"] - 1e-6 * x}

    start = {"w": np.random.default_rng(2).standard_normal(100).astype(np.float32)}
    x = (np.random.default_rng(3).standard_normal(100).astype(np.float32),)
    for torch_side, expected in ((right, Verdict.AGREE), (nothing, Verdict.DIFFER)):
        pair = pair_of(step, torch_side, {"w": start["w"]}, torch_shapes={"w": (100,)})
        judgement = Judge(pair, draws=DRAWS)(start, x, "float64", origin=start)
        assert judgement.outputs["w"].verdict is expected
    with pytest.raises(CannotLook, match="origin: v is not returned"):
        Judge(pair, draws=DRAWS)(start, x, "float64", origin={"v": start["w"]})


# ------------------------------------------------------------------------------------------------ other kinds of sides


def test_two_functions_and_structures_of_outputs():
    def ours(p, x):
        h = jnp.tanh(x @ p["layers"][0]["kernel"])
        return {"hidden": h, "both": (h.sum(-1), h.max(-1) > 0)}

    def theirs(params, x):
        h = torch.tanh(x @ params["layers.0.weight"].T)
        return {"both": [h.sum(-1), h.max(-1).values > 0], "hidden": h}

    pair = pair_of(
        ours,
        theirs,
        {"layers": [{"kernel": zeros(C, D)}]},
        torch_shapes={"layers.0.weight": (D, C)},
        loss=(lambda o, x: o["hidden"].sum(), lambda o, x: o["hidden"].sum()),
    )
    findings = Judge(pair, draws=DRAWS)(
        {"layers.0.weight": RNG.standard_normal((D, C)).astype(np.float32)}, INPUTS, "float64"
    )
    assert set(findings.outputs) == {"hidden", "both.0", "both.1", "loss", "gradient layers.0.weight"}
    assert verdicts(findings) == {Verdict.AGREE}


def test_an_nnx_module_is_a_jax_side():
    class Small(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norm = nnx.LayerNorm(C, epsilon=1e-5, use_fast_variance=False, rngs=rngs, param_dtype=jnp.float32)
            self.fc = nnx.Linear(C, D, rngs=rngs)

        def __call__(self, x):
            return self.fc(self.norm(x))

    class There(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(C, eps=1e-5), nn.Linear(C, D)

        def forward(self, x):
            return self.fc(self.norm(x))

    graphdef, state = nnx.split(Small(nnx.Rngs(0)))
    pair = pair_of(lambda p, x: nnx.merge(graphdef, p)(x), There(), state, loss=LOSS)
    weights = {k: RNG.standard_normal(tuple(p.shape)).astype(np.float32) for k, p in There().named_parameters()}
    judge = Judge(pair, draws=DRAWS)
    for precision in ("float64", "float32"):
        with jax.numpy_dtype_promotion("standard"):  # the library's own code asks for it
            findings = judge(weights, INPUTS, precision)
        assert verdicts(findings) == {Verdict.AGREE}
        assert set(findings.outputs) == {"output", "loss"} | {f"gradient {name}" for name in weights}


# ------------------------------------------------------------------------------------------------ controls


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_no_tensor_would_have_let_a_control_pass(clean: Judge, precision: str):
    findings = clean(WEIGHTS, INPUTS, precision)
    unit = unit_roundoff(precision)
    wrongs = {
        "zeros": np.zeros_like,
        "sign flipped": np.negative,
        "shuffled": lambda x: np.roll(x.ravel(), 1).reshape(x.shape),
    }
    for name, (ours, _, reference, noise) in findings.values.items():
        for wrong, change in wrongs.items():
            if ours.size == 1 and wrong == "shuffled":
                continue
            judgement = judge_tensor(ours, change(ours), reference, noise, unit, noisy_reference=precision == "float64")
            assert judgement.verdict is Verdict.DIFFER, f"{name}: {wrong}"
