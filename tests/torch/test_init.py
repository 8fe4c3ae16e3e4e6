"""Initial weights of omni_torch: bounds, fans, gains, and the default bit for bit against torch's constructors.

That the draws have the right distribution is the business of parity's initializers check.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from omni_torch.init import (
    bias_default_,
    default_init_,
    embedding_default_,
    fan_in_fan_out,
    init_linear_,
    kaiming_uniform_,
    linear_default_,
    xavier_uniform_,
)


def reaches(x: torch.Tensor, bound: float) -> bool:
    """Inside ±bound (rounded to x's dtype), and near it on both sides: 10⁵ draws miss the last 0.1 % with e⁻⁵⁰."""
    limit = torch.tensor(bound, dtype=x.dtype)
    inside = bool((x.abs() <= limit).all())
    return inside and x.max().item() > 0.999 * bound and x.min().item() < -0.999 * bound


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_fans():
    assert fan_in_fan_out(torch.empty(3, 5)) == (5, 3)
    assert fan_in_fan_out(nn.Linear(5, 3).weight) == (5, 3)
    assert fan_in_fan_out(nn.Conv2d(4, 6, (3, 5)).weight) == (4 * 15, 6 * 15)
    assert fan_in_fan_out(nn.Conv2d(4, 6, 3, groups=2).weight) == (2 * 9, 6 * 9)
    assert fan_in_fan_out(nn.Embedding(10, 4).weight) == (4, 10)
    for shape in ((), (7,)):
        with pytest.raises(ValueError, match="at least 2 dimensions"):
            fan_in_fan_out(torch.empty(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_xavier_bounds(dtype):
    weight = torch.empty(250, 400, dtype=dtype)
    assert xavier_uniform_(weight) is weight
    assert reaches(weight, math.sqrt(6 / 650))
    assert reaches(xavier_uniform_(weight, gain=3.0), 3 * math.sqrt(6 / 650))
    assert not xavier_uniform_(weight, gain=0.0).any()


@pytest.mark.parametrize(
    ("nonlinearity", "gain"),
    [
        ("linear", 1.0),
        ("sigmoid", 1.0),
        ("tanh", 5 / 3),
        ("relu", math.sqrt(2)),
        ("leaky_relu", math.sqrt(2 / 1.0001)),
        ("selu", 0.75),
    ],
)
def test_kaiming_bounds_and_gains(nonlinearity, gain):
    weight = torch.empty(250, 400)
    assert kaiming_uniform_(weight, nonlinearity=nonlinearity) is weight
    assert reaches(weight, gain * math.sqrt(3 / 400))
    assert abs(gain - nn.init.calculate_gain(nonlinearity)) <= 2 * torch.finfo(torch.float64).eps


def test_kaiming_defaults_to_relu_and_refuses_the_unknown():
    assert reaches(kaiming_uniform_(torch.empty(250, 400)), math.sqrt(6 / 400))
    weight = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"nonlinearity must be one of linear, .*got 'swish'"):
        kaiming_uniform_(weight, "swish")
    assert bool((weight == 1).all())


@pytest.mark.parametrize("initialise", [xavier_uniform_, kaiming_uniform_, linear_default_])
def test_what_every_weight_initializer_refuses(initialise):
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        initialise(torch.empty(3))
    with pytest.raises(ValueError, match="real floating dtype"):
        initialise(torch.zeros(3, 3, dtype=torch.int64))
    assert initialise(torch.empty(0, 0)).shape == (0, 0)
    assert initialise(torch.empty(3, 0)).shape == (3, 0)


def test_gain_and_fan_in_are_checked():
    for gain in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="gain"):
            xavier_uniform_(torch.empty(2, 2), gain)
    with pytest.raises(ValueError, match="fan_in"):
        bias_default_(torch.empty(2), -1)


def test_parameters_stay_leaves_that_require_gradients():
    layer = nn.Linear(4, 3)
    for draw in (xavier_uniform_, kaiming_uniform_, linear_default_, embedding_default_):
        assert draw(layer.weight) is layer.weight
        assert layer.weight.is_leaf
        assert layer.weight.requires_grad


@pytest.mark.parametrize("bias", [True, False])
def test_init_linear(bias):
    layer = nn.Linear(400, 250, bias=bias)
    assert init_linear_(layer) is layer
    assert reaches(layer.weight.detach(), math.sqrt(6 / 650))
    assert layer.bias is None or not layer.bias.any()
    nn.init.ones_(layer.bias) if bias else None
    init_linear_(layer, "kaiming_relu")
    assert reaches(layer.weight.detach(), math.sqrt(6 / 400))
    assert layer.bias is None or not layer.bias.any()
    nn.init.ones_(layer.bias) if bias else None
    init_linear_(layer, scheme="zero")
    assert not layer.weight.any()
    assert layer.bias is None or not layer.bias.any()


def test_init_linear_refuses():
    layer = nn.Linear(2, 2)
    kept = layer.weight.clone()
    with pytest.raises(ValueError, match="scheme must be one of xavier, kaiming_relu, zero, got 'he'"):
        init_linear_(layer, "he")
    assert torch.equal(layer.weight, kept)
    with pytest.raises(ValueError, match=r"nn\.Linear"):
        init_linear_(nn.Conv2d(1, 1, 1))  # type: ignore[arg-type]


def test_the_signatures_are_those_of_the_exercise():
    def names(function):
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    nothing = inspect.Parameter.empty
    assert names(fan_in_fan_out) == [("weight", nothing)]
    assert names(xavier_uniform_) == [("weight", nothing), ("gain", 1.0)]
    assert names(kaiming_uniform_) == [("weight", nothing), ("nonlinearity", "relu")]
    assert names(init_linear_) == [("layer", nothing), ("scheme", "xavier")]


def test_defaults_are_torchs_own_bit_for_bit():
    def build():
        return nn.Sequential(
            nn.Linear(16, 8),
            nn.Linear(8, 24, bias=False),
            nn.Embedding(10, 4),
            nn.Embedding(10, 4, padding_idx=0),
            nn.LayerNorm(4),
            nn.RMSNorm(4, eps=1e-5),
            nn.Conv2d(4, 4, (3, 5), groups=2),
            nn.Sequential(nn.Linear(4, 4)),
        )

    torch.manual_seed(3)
    theirs = build()
    ours = build()
    assert not torch.equal(ours[0].weight, theirs[0].weight)
    torch.manual_seed(3)
    assert default_init_(ours) is ours
    for (name, mine), their in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, their), name


@pytest.mark.parametrize("variant", [{"use_swiglu": False}, {"use_gqa": True, "use_moe": True, "num_experts": 3}])
def test_the_whole_model_is_drawn_as_its_constructor_draws_it(variant):
    from omni_torch.thinker import ThinkerLM

    models = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        models.append(ThinkerLM(vocab_size=20, n_layers=2, d_model=16, n_heads=4, d_ff=24, **variant))
    torch.manual_seed(3)
    default_init_(models[1])
    for (name, their), mine in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine, their), name


def test_the_generator_alone_decides():
    layers = [nn.Linear(4, 4) for _ in range(2)]
    for layer in layers:
        default_init_(layer, generator=torch.Generator().manual_seed(5))
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert torch.equal(layers[0].bias, layers[1].bias)


def test_default_init_of_something_unknown_draws_nothing():
    model = nn.Sequential(nn.Linear(2, 2), nn.PReLU())
    kept = model[0].weight.clone()
    with pytest.raises(ValueError, match="does not know how to draw weight of PReLU"):
        default_init_(model)
    assert torch.equal(model[0].weight, kept)


def test_bfloat16_draws_are_float32_draws_rounded():
    for draw in (xavier_uniform_, kaiming_uniform_, linear_default_, embedding_default_):
        torch.manual_seed(1)
        wide = draw(torch.empty(64, 32))
        torch.manual_seed(1)
        assert torch.equal(draw(torch.empty(64, 32, dtype=torch.bfloat16)), wide.bfloat16())
    with pytest.raises(ValueError, match="real floating dtype"):
        embedding_default_(torch.zeros(2, 2, dtype=torch.int32))


def test_what_is_not_clear_is_refused_with_its_name():
    weight = torch.zeros(3, 2)
    for value in ([], None, 1):
        with pytest.raises(ValueError, match="nonlinearity must be one of linear"):
            kaiming_uniform_(weight, nonlinearity=value)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="scheme must be one of"):
            init_linear_(nn.Linear(2, 3), value)  # type: ignore[arg-type]
    for value in (None, "x", [1.0]):
        with pytest.raises(ValueError, match="gain must be finite"):
            xavier_uniform_(weight, gain=value)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="fan_in must be a number"):
            bias_default_(weight[0], value)  # type: ignore[arg-type]
    for initialise in (fan_in_fan_out, xavier_uniform_, kaiming_uniform_, linear_default_, embedding_default_):
        with pytest.raises(ValueError, match=r"weight must be a torch\.Tensor, got list"):
            initialise([1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight must be a torch\.Tensor, got list"):
        bias_default_([1], 2)  # type: ignore[arg-type]
    assert not weight.any()


def pruned(layer):
    with torch.no_grad():
        mask = torch.ones_like(layer.weight)
    return prune.custom_from_mask(layer, "weight", mask)


def bias_parametrized(layer):
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Identity())
    return layer


@pytest.mark.parametrize(
    ("parametrize", "name"),
    [
        (nn.utils.parametrizations.weight_norm, "weight"),
        (nn.utils.parametrizations.spectral_norm, "weight"),
        (pruned, "weight"),
        (bias_parametrized, "bias"),
    ],
)
@pytest.mark.parametrize("scheme", ["xavier", "kaiming_relu", "zero"])
def test_computed_weights_are_refused_before_anything_is_drawn(parametrize, name, scheme):
    layer = parametrize(nn.Linear(3, 2))
    kept = [p.clone() for p in layer.parameters()]
    with pytest.raises(ValueError, match=rf"layer\.{name} must be a parameter, got one computed from others"):
        init_linear_(layer, scheme)
    with pytest.raises(ValueError, match="does not know how to draw"):
        default_init_(layer)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), kept, strict=True))


def test_lazy_layers_are_refused_until_they_have_a_shape():
    layer = nn.LazyLinear(2)
    with pytest.raises(ValueError, match=r"layer\.weight must have a shape, got an uninitialized parameter"):
        init_linear_(layer)
    first = nn.Linear(3, 3)
    kept = first.weight.clone()
    with pytest.raises(ValueError, match="weight of LazyLinear must have a shape"):
        default_init_(nn.Sequential(first, layer))
    assert torch.equal(first.weight, kept)
    with pytest.raises(ValueError, match="weight must have a shape"):
        fan_in_fan_out(layer.weight)
    layer(torch.zeros(1, 3))
    assert init_linear_(layer, "zero") is layer
