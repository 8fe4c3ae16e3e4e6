"""parity.compare and parity.assert_agree: a pair that is not ours, as a user writes it."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

import parity  # noqa: E402
from parity.errors import Misuse  # noqa: E402


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = torch.nn.Linear(16, 32)
        self.out = torch.nn.Linear(32, 4)

    def forward(self, x):
        return self.out(torch.nn.functional.gelu(self.hidden(x), approximate="none"))


def net(params, x, approximate=False, name="hidden"):
    h = x @ params[name]["kernel"] + params[name]["bias"]
    return jax.nn.gelu(h, approximate=approximate) @ params["out"]["kernel"] + params["out"]["bias"]


PARAMS = {
    "hidden": {"kernel": np.zeros((16, 32)), "bias": np.zeros(32)},
    "out": {"kernel": np.zeros((32, 4)), "bias": np.zeros(4)},
}


@pytest.fixture(scope="module")
def module():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)


@pytest.fixture(autouse=True)
def _a_users_own_settings():
    """A user's function may promote ranks; strict settings are for our code."""
    with jax.numpy_rank_promotion("allow"):
        yield


def square(outputs, x):
    return (outputs**2).mean()


def test_a_right_port_agrees_with_its_gradients(module, x):
    result = parity.assert_agree(net, module, PARAMS, [x], loss=(square, square))
    names = {row.name for row in result.checks[0].rows}
    assert {"output", "loss", "gradient hidden.weight", "gradient out.bias"} <= names
    assert result.exit_code == 0


def test_the_default_gelu_of_jax_is_another_function(module, x):
    result = parity.compare(partial(net, approximate=True), module, PARAMS, [x])
    assert result.exit_code == 1
    assert all(row.verdict == "DIFFER" for row in result.checks[0].rows)
    with pytest.raises(AssertionError, match="not the same function"):
        parity.assert_agree(partial(net, approximate=True), module, PARAMS, [x])


def test_parameters_that_do_not_pair_are_all_named(module, x):
    wrong = {"hiden": PARAMS["hidden"], "out": {"kernel": np.zeros((4, 32)), "bias": np.zeros(4)}}
    with pytest.raises(Misuse) as caught:
        parity.compare(net, module, wrong, [x])
    for word in ("hiden.kernel", "out.kernel", "hidden.weight"):
        assert word in str(caught.value)


def test_rename_pairs_other_names(module, x):
    renamed = {"first": PARAMS["hidden"], "out": PARAMS["out"]}
    rename = {"first.kernel": "hidden.weight", "first.bias": "hidden.bias"}
    assert parity.compare(partial(net, name="first"), module, renamed, [x], rename=rename).exit_code == 0


def test_a_side_that_raises_could_not_be_looked_at(module, x):
    result = parity.compare(lambda params, x: net(params, x) + torch.zeros(1), module, PARAMS, [x])
    assert result.exit_code == 3
    assert result.checks[0].error


def test_nan_on_both_sides_agrees_about_nothing(module, x):
    """Weights or inputs that are NaN are no agreement, whatever both sides make of them."""
    result = parity.compare(net, module, PARAMS, [np.full_like(x, np.nan)])
    assert result.exit_code == 3
    assert {row.verdict for row in result.checks[0].rows} == {"UNDETERMINED"}


def test_a_tie_elsewhere_excuses_nothing_that_is_counted_as_agreement(x):
    """An output that differs beside a tied top-k may be excused, but then the run has no answer."""

    class Pick(torch.nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return {"top": torch.topk(x, 2).values, "other": self.factor * x}

    def pick(params, x):
        return {"top": jax.lax.top_k(x, 2)[0], "other": 1.0 * x}

    near = np.array([[1.0, 1.0 + 2.0**-52 * 4, 0.5, 1.0 - 2.0**-52]])
    exact = np.array([[1.0, 1.0, 1.0, 0.5]])
    for values in (near, exact):
        for factor, codes in ((1.01, (1, 3)), (1.0, (0,))):
            found = parity.compare(pick, Pick(factor), {}, [values], weights={}, precisions="float64")
            assert found.exit_code in codes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": "x"}, "wrap a single one"),
        ({"precisions": ()}, "none given"),
        ({"precisions": ("float65",)}, "float65"),
    ],
)
def test_a_wrong_call_is_told_what_to_do(module, x, change, words):
    arguments = {"inputs": [x], **change}
    with pytest.raises(Misuse, match=words):
        parity.compare(net, module, PARAMS, **arguments)


def test_integers_that_jax_would_wrap_are_refused():
    embed = torch.nn.Embedding(4, 3)
    with pytest.raises(Misuse, match="beyond int32"):
        parity.compare(lambda p, i: p["embedding"][i], embed, {"embedding": np.zeros((4, 3))}, [np.array([2**40])])
