"""parity.pair: what is compared is bound by name, and results have one set of names on both sides."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch

from parity.errors import Misuse
from parity.pair import Pair, pair_of

TEMPLATE = {"fc": {"kernel": np.zeros((3, 2), np.float32), "bias": np.zeros(2, np.float32)}}


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(x)


def function(params, x):
    return x @ params["fc"]["kernel"] + params["fc"]["bias"][None]


def squared(outputs, x):
    return (outputs**2).sum()


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"fc.weight": rng.standard_normal((2, 3)), "fc.bias": rng.standard_normal(2)}


def test_a_module_tells_its_own_parameters():
    pair = pair_of(function, Module(), TEMPLATE)
    assert {link.jax: link.torch for link in pair.links} == {"fc.bias": "fc.bias", "fc.kernel": "fc.weight"}
    params = pair.jax_params(weights())
    assert params["fc"]["kernel"].shape == (3, 2)
    np.testing.assert_array_equal(params["fc"]["kernel"], weights()["fc.weight"].T)


def test_abstract_templates_are_enough():
    template = jax.eval_shape(lambda: jax.tree.map(jax.numpy.asarray, TEMPLATE))
    pair = pair_of(function, Module(), template)
    np.testing.assert_array_equal(pair.jax_params(weights())["fc"]["bias"], weights()["fc.bias"])


def test_what_does_not_bind_is_refused():
    with pytest.raises(Misuse, match=r"fc\.bias \(2,\): no torch parameter"):
        pair_of(function, torch.nn.Sequential(torch.nn.Linear(3, 2)), TEMPLATE)
    pair = pair_of(
        function,
        torch.nn.Sequential(torch.nn.Linear(3, 2)),
        TEMPLATE,
        rename={"fc.kernel": "0.weight", "fc.bias": "0.bias"},
    )
    assert [link.torch for link in pair.links] == ["0.bias", "0.weight"]


def test_a_torch_function_must_tell_its_shapes():
    def call(params, x):
        return x @ params["fc.weight"].T + params["fc.bias"]

    with pytest.raises(Misuse, match="torch_shapes"):
        pair_of(function, call, TEMPLATE)
    pair = pair_of(function, call, TEMPLATE, torch_shapes={"fc.weight": (2, 3), "fc.bias": (2,)}, name="plain")
    assert pair.name == "plain"
    assert len(pair.links) == 2


def test_without_a_loss_the_program_gives_outputs_only():
    pair = pair_of(function, Module(), TEMPLATE)
    x = np.ones((4, 3))
    result = pair.jax_program()(pair.jax_params(weights()), x)
    named = pair.named(result)
    assert list(named) == ["output"]
    assert named["output"].shape == (4, 2)


def test_with_a_loss_gradients_have_torch_names_and_layout():
    pair = pair_of(function, Module(), TEMPLATE, loss=(squared, squared))
    x = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
    held = {k: v.astype(np.float32) for k, v in weights().items()}
    named = pair.named(pair.jax_program()(pair.jax_params(held), x))
    assert set(named) == {"output", "loss", "gradient fc.weight", "gradient fc.bias"}
    np.testing.assert_allclose(
        named["gradient fc.weight"], 2 * named["output"].T @ x, rtol=64 * float(np.finfo(np.float32).eps)
    )
    assert named["loss"].shape == ()


def test_nested_outputs_have_dotted_names():
    pair = Pair(lambda p, x: {"b": (x, x), "a": x}, None, {}, [])
    named = pair.named(pair.jax_program()({}, np.ones(2)))
    assert list(named) == ["a", "b.0", "b.1"]


def test_equal_names_of_outputs_and_results_are_refused():
    pair = Pair(lambda p, x: {"loss": x}, None, {}, [], loss=(lambda o, x: o["loss"].sum(), None))
    with pytest.raises(Misuse, match="loss"):
        pair.named(pair.jax_program()({}, np.ones(2, np.float32)))
