"""The guards of omni_torch: what they let through, what they refuse, and that a refusal changes nothing."""

from __future__ import annotations

import copy
import doctest
import io
import math
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

import omni_torch.training_utils
from omni_torch.config import ThinkerConfig
from omni_torch.losses import cross_entropy
from omni_torch.optim import clip_grad_norm_, warmup_cosine
from omni_torch.progress import TrainingProgress
from omni_torch.pt_archive import CheckpointError
from omni_torch.run_folder import RunFolder
from omni_torch.thinker import ThinkerLM
from omni_torch.training_utils import (
    NumericalError,
    check_gradient_explosion,
    check_numerical_stability,
    clip_gradients,
    debug_training,
    get_lr_scheduler,
    set_seed,
    validate_loss,
)

ROUNDINGS = 8
NAN, INF = math.nan, math.inf
HALF = [torch.float16, torch.bfloat16]
FLOATS = [*HALF, torch.float32, torch.float64]
mse = nn.MSELoss()


def a_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def with_gradients(values, dtype=torch.float32):
    """A model whose parameters' gradients are these lists."""
    model = nn.Module()
    for i, value in enumerate(values):
        p = nn.Parameter(torch.zeros(len(value), dtype=dtype))
        p.grad = torch.tensor(value, dtype=dtype)
        model.register_parameter(f"p{i}", p)
    return model


def batches(n=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 4, generator=g), torch.randn(8, 1, generator=g)) for _ in range(n)]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_numerical_error_is_what_the_family_catches():
    assert issubclass(NumericalError, RuntimeError)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64])
def test_a_good_loss_comes_back_as_a_float(dtype):
    value = validate_loss(torch.tensor(3, dtype=dtype))
    assert type(value) is float
    assert value == 3.0


@pytest.mark.parametrize("loss", [2, 2.0, np.float32(2), np.array(2.0), torch.tensor(2.0, requires_grad=True) * 1])
def test_a_loss_is_any_real_scalar(loss):
    assert validate_loss(loss) == 2.0


@pytest.mark.parametrize("loss", [-1e6, 1e6, 0.0])
def test_the_bounds_are_allowed(loss):
    assert validate_loss(loss) == loss


@pytest.mark.parametrize("loss", [NAN, INF, -INF, 1.1e6, -1.1e6])
@pytest.mark.parametrize("make", [float, torch.tensor])
def test_a_bad_loss_is_refused(loss, make):
    with pytest.raises(NumericalError, match=r"loss is .*-1e\+06 to 1e\+06; lower the learning rate, clip .* batch"):
        validate_loss(make(loss))


@pytest.mark.parametrize("loss", [NAN, INF])
def test_no_bounds_make_nan_or_inf_a_loss(loss):
    with pytest.raises(NumericalError):
        validate_loss(loss, -INF, INF)


@pytest.mark.parametrize(
    "loss", [torch.ones(2), torch.ones(1), torch.ones(0), np.ones(2), "1", None, True, 1j, torch.tensor(1j), [1.0]]
)
def test_what_is_no_scalar_is_no_loss(loss):
    with pytest.raises(ValueError, match="loss must be a"):
        validate_loss(loss)


@pytest.mark.parametrize("bounds", [(1.0, 0.0), (NAN, 1.0), (0.0, NAN)])
def test_loss_bounds_must_be_in_order(bounds):
    with pytest.raises(ValueError, match="min_loss must be ≤ max_loss"):
        validate_loss(0.5, *bounds)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_a_stable_tensor_comes_back_itself(dtype, shape):
    x = torch.ones(shape, dtype=dtype)
    assert check_numerical_stability(x) is x


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_unstable_tensor_is_described(dtype):
    x = torch.tensor([[1.0, 2.0, -3.0], [0.5, INF, NAN], [NAN, 1.0, -INF]], dtype=dtype)
    with pytest.raises(NumericalError, match=r"act holds 2 NaN and 2 Inf among 9 .*act\[1, 1\] = inf.*-3 … 2;"):
        check_numerical_stability(x, "act")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor(NAN), "tensor holds 1 NaN and 0 Inf among 1 values, the first is tensor = nan; none is finite"),
        (torch.tensor([INF]), r"tensor holds 0 NaN and 1 Inf among 1 values, the first is tensor\[0\] = inf; none"),
        (torch.tensor([3 + 4j, complex(NAN, 0)]), r"1 NaN and 0 Inf among 2 .*tensor\[1\].* 5 … 5"),
    ],
)
def test_unstable_corner_cases(x, message):
    with pytest.raises(NumericalError, match=message):
        check_numerical_stability(x)


def test_stability_is_of_tensors():
    with pytest.raises(ValueError, match=r"h must be a torch\.Tensor, got list; convert it"):
        check_numerical_stability([1.0], "h")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_norm_is_that_of_all_gradients(dtype):
    model = with_gradients([[3.0, 0.0], [], [-4.0]], dtype)
    kept = [p.grad.clone() for p in model.parameters()]
    assert check_gradient_explosion(model) == (5.0, False)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), kept))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (6e4, torch.float16),
        (6e-8, torch.float16),
        (1e30, torch.bfloat16),
        (1e30, torch.float32),
        (3e38, torch.float32),
        (1e-30, torch.float32),
        (1e-45, torch.float32),
        (1e300, torch.float64),
        (1e-320, torch.float64),
    ],
)
def test_the_squares_neither_overflow_nor_vanish(value, dtype):
    model = with_gradients([[value] * 2, [value] * 2], dtype)
    want = 2.0 * float(torch.tensor(value, dtype=dtype))
    norm, exploded = check_gradient_explosion(model, raise_on_error=False)
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert abs(norm - want) <= ROUNDINGS * (eps * want + math.ulp(0.0))
    assert exploded == (want > 100.0)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nan_and_inf_have_exploded(value):
    model = with_gradients([[1.0], [2.0, value], [3.0]])
    norm, exploded = check_gradient_explosion(model, raise_on_error=False)
    assert exploded
    assert not math.isfinite(norm)
    assert math.isnan(norm) == math.isnan(value)
    with pytest.raises(NumericalError, match=r"gradient norm is .*worst: p1 (nan|inf), p2 3, p0 1; lower"):
        check_gradient_explosion(model, INF if math.isnan(value) else 100.0)


def test_nan_outweighs_inf():
    assert math.isnan(check_gradient_explosion(with_gradients([[INF], [NAN]]), raise_on_error=False)[0])


def test_the_threshold_is_allowed():
    model = with_gradients([[3.0, 4.0]])
    assert check_gradient_explosion(model, max_grad_norm=5.0) == (5.0, False)
    assert check_gradient_explosion(model, max_grad_norm=4.9, raise_on_error=False) == (5.0, True)
    with pytest.raises(NumericalError, match=r"gradient norm is 5, allowed is at most max_grad_norm=4.9; worst: p0 5;"):
        check_gradient_explosion(model, max_grad_norm=4.9)


def test_parameters_without_a_gradient_do_not_count():
    model = with_gradients([[3.0], [4.0]])
    model.p1.grad = None
    assert check_gradient_explosion(model)[0] == 3.0


def test_sparse_gradients_count_each_row_once():
    model = nn.Embedding(5, 2, sparse=True)
    model(torch.tensor([1, 1, 3])).sum().backward()
    want = math.sqrt(2 * 2.0**2 + 2 * 1.0**2)
    assert abs(check_gradient_explosion(model)[0] - want) <= ROUNDINGS * torch.finfo(torch.float32).eps * want


@pytest.mark.parametrize("guard", [check_gradient_explosion, clip_gradients])
def test_no_gradient_at_all_is_a_mistake(guard):
    with pytest.raises(ValueError, match=r"no parameter of Sequential has a gradient; call loss.backward\(\) first"):
        guard(a_model())


@pytest.mark.parametrize("guard", [check_gradient_explosion, clip_gradients])
@pytest.mark.parametrize("bad", [0.0, -1.0, NAN])
def test_max_grad_norm_is_above_zero(guard, bad):
    with pytest.raises(ValueError, match="max_grad_norm must be > 0"):
        guard(with_gradients([[1.0]]), bad)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("max_norm", [0.5, 5.0, 100.0])
def test_clipping_is_the_recipes(dtype, max_norm):
    ours, theirs = (with_gradients([[3.0, 1.0], [-4.0]], dtype) for _ in range(2))
    norm = clip_gradients(ours, max_norm)
    assert type(norm) is float
    assert norm == float(clip_grad_norm_([p.grad for p in theirs.parameters()], max_norm))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours.parameters(), theirs.parameters()))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_clipping_refuses_what_no_factor_mends(value):
    model = with_gradients([[1.0], [2.0, value]])
    kept = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(NumericalError, match=r"gradient norm is (nan|inf).*worst: p1 .*nothing was changed"):
        clip_gradients(model)
    assert all(torch.equal(p.grad.nan_to_num(7.0), g.nan_to_num(7.0)) for p, g in zip(model.parameters(), kept))


@pytest.mark.parametrize(("value", "max_norm"), [(1e20, 1.0), (1e30, 1.0), (2e38, 1e-3), (1e25, 1e30)])
def test_clipping_where_the_squares_overflow(value, max_norm):
    model = with_gradients([[value, 0.0], [-value], [0.0], []])
    norm = clip_gradients(model, max_norm)
    eps = ROUNDINGS * torch.finfo(torch.float32).eps
    assert abs(norm - value * math.sqrt(2)) <= eps * norm
    after = check_gradient_explosion(model, raise_on_error=False)[0]
    assert abs(after - min(max_norm, norm)) <= eps * after
    assert model.p0.grad[0] == -model.p1.grad[0]


def test_a_norm_beyond_the_dtype_is_no_norm():
    top = float(torch.finfo(torch.float32).max)
    with pytest.raises(NumericalError, match=r"norm is 4\.8.*e\+38, which is no finite float32; worst: p0 3.*p1 3"):
        clip_gradients(with_gradients([[top], [top]]))


def an_optimizer(lr=0.5):
    return torch.optim.SGD(
        [{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 2.0}], lr=lr
    )


def advance(optimizer, scheduler):
    optimizer.step()
    scheduler.step()


@pytest.mark.parametrize(("warmup", "most"), [(0, 1), (0, 7), (3, 10), (9, 10)])
def test_the_scheduler_is_exact_at_every_step(warmup, most):
    optimizer = an_optimizer()
    scheduler = get_lr_scheduler(optimizer, warmup, most, 0.25)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
    for step in range(most + 3):
        factor = warmup_cosine(step, warmup, most, 0.25)
        assert [group["lr"] for group in optimizer.param_groups] == [0.5 * factor, 2.0 * factor]
        assert scheduler.get_last_lr() == [0.5 * factor, 2.0 * factor]
        advance(optimizer, scheduler)
    assert optimizer.param_groups[0]["lr"] == 0.5 * 0.25


@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize("at", [0, 2, 5, 10])
def test_resuming_is_exact_in_either_order(at, optimizer_first):
    optimizer = an_optimizer()
    scheduler = get_lr_scheduler(optimizer, 3, 10)
    for _ in range(at):
        advance(optimizer, scheduler)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    assert saved[1]["lr_lambdas"] == [None, None]  # as in the family's files
    again = an_optimizer()
    if optimizer_first:
        again.load_state_dict(saved[0])
    resumed = get_lr_scheduler(again, 3, 10)
    resumed.load_state_dict(saved[1])
    if not optimizer_first:
        again.load_state_dict(saved[0])
    for step in range(at, 13):
        want = [base * warmup_cosine(step, 3, 10) for base in (0.5, 2.0)]
        assert [group["lr"] for group in again.param_groups] == want
        advance(again, resumed)


def test_resuming_a_tensor_learning_rate_keeps_its_storage():
    optimizer = an_optimizer(torch.tensor(0.5))
    scheduler = get_lr_scheduler(optimizer, 2, 10)
    advance(optimizer, scheduler)
    state = scheduler.state_dict()
    again = an_optimizer(torch.tensor(0.5))
    lr = again.param_groups[0]["lr"]
    get_lr_scheduler(again, 2, 10).load_state_dict(state)
    assert again.param_groups[0]["lr"] is lr
    assert float(lr) == 0.25


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ((-1, 10), "warmup_steps"),
        ((0.5, 10), "warmup_steps must be an integer, got 0.5"),
        ((1, 10.5), "max_steps must be an integer"),
        ((10, 10), "max_steps"),
        ((1, 10, 1.5), "min_lr_ratio"),
        ((1, 10, NAN), "min_lr_ratio"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(arguments, field):
    optimizer = an_optimizer()
    with pytest.raises(ValueError, match=field):
        get_lr_scheduler(optimizer, *arguments)
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.fixture
def generators():
    """The global generators, put back afterwards."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(kept[0])
    np.random.set_state(kept[1])
    torch.set_rng_state(kept[2])


@pytest.mark.usefixtures("generators")
@pytest.mark.parametrize("seed", [0, 1, np.int64(5), 2**31, 2**32 - 1])
def test_a_seed_repeats_every_generator(seed):
    def draw():
        return random.random(), np.random.rand(), float(torch.rand(()))

    set_seed(seed)
    first, next_ = draw(), draw()
    set_seed(seed)
    assert draw() == first
    assert all(a != b for a, b in zip(first, next_))
    set_seed((int(seed) + 1) % 2**32)
    assert all(a != b for a, b in zip(first, draw()))


@pytest.mark.usefixtures("generators")
@pytest.mark.parametrize("seed", [-1, 2**32, True, 1.0, "1", None, NAN])
def test_a_bad_seed_is_refused(seed):
    before = random.getstate()
    with pytest.raises(ValueError, match=r"seed must be an integer from 0 to 2\*\*32 - 1"):
        set_seed(seed)
    assert random.getstate() == before


def test_the_magnifier_sees_what_a_plain_loop_does(capsys):
    model, plain = a_model(), a_model()
    records = debug_training(model, batches(5), mse, torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    eps = ROUNDINGS * torch.finfo(torch.float32).eps
    assert [record.batch for record in records] == [0, 1, 2]
    for (x, y), record in zip(batches(3), records):
        output = plain(x)
        seen = output.detach()
        loss = mse(output, y)
        optimizer.zero_grad()
        loss.backward()
        norm = check_gradient_explosion(plain)[0]
        optimizer.step()
        assert (record.input_shape, record.input_dtype) == ((8, 4), "float32")
        assert record.input_range == (float(x.min()), float(x.max()))
        assert (record.output_shape, record.output_dtype) == ((8, 1), "float32")
        assert record.output_range == (float(seen.min()), float(seen.max()))
        assert (record.loss, record.grad_norm) == (loss.item(), norm)
        assert abs(record.update_norm - 0.1 * norm) <= eps * (0.1 * norm + record.param_norm)
        assert (record.problem, record.where) == (None, None)
    assert same(weights(model), weights(plain))
    printed = capsys.readouterr().out
    for line in ("Batch 2:", "Input shape: (8, 4), dtype: float32", "Input range: [", "Output shape: (8, 1)", "Loss: "):
        assert line in printed
    assert printed.count("Gradient norm: ") == printed.count("Update size: ") == 3
    assert "STOP" not in printed


def stopped(model, data, loss_fn=mse, lr=0.1):
    """The last record of a run that has to stop without making that batch's update."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    good = copy.deepcopy(model)
    if len(data) > 1:
        debug_training(good, data[:-1], loss_fn, torch.optim.SGD(good.parameters(), lr=lr, momentum=0.9))
    records = debug_training(model, [*data, data[0]], loss_fn, optimizer, max_batches=len(data) + 1)
    assert len(records) == len(data)
    assert all(record.problem is None for record in records[:-1])
    assert same(weights(model), weights(good))
    return records[-1]


@pytest.mark.parametrize(("which", "name"), [(0, "x"), (1, "y")])
@pytest.mark.parametrize("value", [NAN, INF])
def test_it_stops_at_a_bad_input(which, name, value, capsys):
    data = batches(2)
    data[1][which][3, 0] = value
    record = stopped(a_model(), data)
    assert record.where == name
    assert f"{name}[3, 0]" in record.problem
    assert record.loss is None
    assert f"STOP at {name}: {name} holds " in capsys.readouterr().out


class Log(nn.Module):
    def forward(self, x):
        return torch.log(x)


def test_it_names_the_first_sub_module_that_is_not_finite():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Tanh(), Log()), nn.Linear(3, 1))
    record = stopped(model, batches(1))
    assert record.where == "output: 1.1"
    assert math.isnan(record.loss)
    assert record.grad_norm is None


def test_it_names_a_bad_parameter_before_what_it_spoils():
    model = a_model()
    with torch.no_grad():
        model[2].bias[0] = NAN
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (record,) = debug_training(model, batches(1), mse, optimizer)
    assert record.where == "parameters: 2.bias"


@pytest.mark.parametrize(
    ("loss_fn", "problem"),
    [
        (lambda pred, y: (pred - y).sum() * NAN, "loss is nan"),
        (lambda pred, y: (pred - y).sum() * 0 + 1e7, "loss is 10000000.0, allowed"),
    ],
)
def test_it_stops_at_a_bad_loss(loss_fn, problem):
    record = stopped(a_model(), batches(1), loss_fn)
    assert record.where == "loss"
    assert problem in record.problem


def test_it_stops_at_an_exploded_gradient():
    record = stopped(a_model(), batches(1), lambda pred, y: 1e3 * (pred - y).square().mean())
    assert record.where in ("gradients: 2.weight", "gradients: 2.bias")
    assert record.grad_norm > 100.0
    assert record.update_norm is None
    assert "max_grad_norm=100.0" in record.problem


def test_it_stops_at_a_gradient_that_is_nan_though_the_loss_is_not():
    record = stopped(a_model(), batches(1), lambda pred, y: (pred - pred).sqrt().sum())
    assert record.loss == 0.0
    assert math.isnan(record.grad_norm)
    assert record.where == "gradients: 0.weight"


def loss_over(pred, y):
    return (pred - y).square().mean()


@pytest.mark.parametrize(("pred_shape", "y_shape"), [((8, 1), (8,)), ((8, 1), (8, 3)), ((8, 1), (1, 8))])
def test_it_stops_at_a_loss_that_broadcasts(pred_shape, y_shape, capsys):
    y = torch.randn(y_shape, generator=torch.Generator().manual_seed(1))
    model = a_model()
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (record,) = debug_training(model, [(batches(1)[0][0], y)], loss_over, optimizer)
    assert record.where == "loss"
    assert f"the loss broadcasts {pred_shape} against {y_shape}" in record.problem
    assert (record.target_shape, record.target_dtype) == (y_shape, "float32")
    assert record.grad_norm is None
    assert same(weights(model), before)
    printed = capsys.readouterr().out
    assert f"Target shape: {y_shape}, dtype: float32" in printed
    assert f"Target range: [{y.min():.6g}, {y.max():.6g}]" in printed


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda pred, y: loss_over(pred.squeeze(-1), y),
        lambda pred, y: loss_over(pred[:, 0], y),
        lambda pred, y: loss_over(pred, y[:, None]),
    ],
)
def test_a_loss_that_puts_the_shapes_right_is_fine(loss_fn):
    model = a_model()
    data = [(x, y[:, 0]) for x, y in batches(3)]
    records = debug_training(model, data, loss_fn, torch.optim.SGD(model.parameters(), lr=0.1))
    assert [record.problem for record in records] == [None] * 3


def test_an_update_that_changes_nothing_is_reported():
    model, other = a_model(), a_model(1)
    (record,) = debug_training(model, batches(1), mse, torch.optim.SGD(other.parameters(), lr=0.1))
    assert record.where == "updates"
    assert "the optimizer does not hold this model's parameters?" in record.problem
    (record,) = debug_training(model, batches(1), mse, torch.optim.SGD(model.parameters(), lr=0.0))
    assert (record.update_norm, record.problem) == (0.0, None)


def test_an_update_that_is_not_finite_is_reported():
    model = a_model()
    (record,) = debug_training(model, batches(1), mse, torch.optim.SGD(model.parameters(), lr=INF))
    assert record.where == "updates: 0.weight"
    assert "has been made" in record.problem


@pytest.mark.parametrize("training", [True, False])
def test_it_leaves_the_mode_and_the_hooks_alone(training):
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 1)).train(training)
    model[0].eval()
    debug_training(model, batches(), mse, torch.optim.SGD(model.parameters(), lr=0.1))
    assert [m.training for m in model.modules()] == [training, False, training, training]
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(RuntimeError):
        debug_training(model, [(torch.ones(2, 5), torch.ones(2, 1))], mse, torch.optim.SGD(model.parameters(), lr=0.1))
    assert not any(m._forward_hooks for m in model.modules())


def test_it_takes_only_the_batches_it_looks_at():
    taken = []

    def loader():
        for batch in batches(5):
            taken.append(None)
            yield batch

    model = a_model()
    debug_training(model, loader(), mse, torch.optim.SGD(model.parameters(), lr=0.1), max_batches=2)
    assert len(taken) == 2


def test_batches_of_a_language_model(capsys):
    torch.manual_seed(0)
    model = ThinkerLM.from_config(ThinkerConfig(vocab_size=31, n_layers=1, d_model=8, n_heads=2, d_ff=16))
    ids = torch.tensor([[1, 4, 5, 2], [1, 3, 0, 0]])
    batch = {"input_ids": ids[:, :-1], "target_ids": ids[:, 1:], "attention_mask": ids[:, :-1] != 0}
    (record,) = debug_training(model, [batch], cross_entropy, torch.optim.AdamW(model.parameters()))
    assert (record.input_dtype, record.input_range) == ("int64", (0.0, 5.0))
    assert record.output_shape == (2, 3, 31)
    assert record.problem is None
    assert "Input range: [0, 5]" in capsys.readouterr().out


def test_a_mask_reaches_only_a_model_that_takes_one():
    seen = []

    class Masked(nn.Linear):
        def forward(self, x, attention_mask=None):
            seen.append(attention_mask)
            return super().forward(x)

    (x, y), mask = batches(1)[0], torch.ones(8, dtype=torch.bool)
    for model in (Masked(4, 1), nn.Linear(4, 1)):
        batch = {"x": x, "y": y, "attention_mask": mask, "padding_mask": ~mask}
        debug_training(model, [batch], mse, torch.optim.SGD(model.parameters(), lr=0.1))
    assert len(seen) == 1
    assert seen[0] is mask


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": torch.ones(2, 4)}, "batch 0 has the keys x; needed are one of x, input_ids, inputs and one of y"),
        (torch.ones(2, 4), r"batch 0 must be \(x, y\) or a dict with both, got Tensor"),
        ((torch.ones(2, 4),), r"batch 0 must be \(x, y\) or a dict with both, got tuple"),
        (
            (torch.ones(0, 4), torch.ones(0, 1)),
            r"batch 0: x must be a tensor with at least one value, got shape \(0, 4\)",
        ),
        ((torch.ones(2, 4), [1.0]), "batch 0: y must be a tensor with at least one value, got list"),
    ],
)
def test_a_batch_of_another_form_is_refused(batch, message):
    model = a_model()
    with pytest.raises(ValueError, match=message):
        debug_training(model, [batch], mse, torch.optim.SGD(model.parameters(), lr=0.1))


def test_other_misuse():
    model = a_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="dataloader gave no batch"):
        debug_training(model, [], mse, optimizer)
    with pytest.raises(ValueError, match="loss must be a scalar, got shape"):
        debug_training(model, batches(), nn.MSELoss(reduction="none"), optimizer)
    for bad in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="max_batches must be an integer ≥ 1"):
            debug_training(model, batches(), mse, optimizer, max_batches=bad)  # type: ignore[arg-type]


def test_the_docstrings_examples():
    assert doctest.testmod(omni_torch.training_utils).failed == 0


# --- the run's folder and the bar ------------------------------------------------------------------------------------


def a_folder(path, **settings):
    folder = RunFolder(path)
    folder.start({"lr": 0.1, "max_steps": 12, "print_freq": 1} | settings, "ids")
    folder.last.write_bytes(b"last")
    return folder


@pytest.mark.parametrize("best", [True, False])
def test_a_run_without_its_last_checkpoint_names_a_way_out(best, tmp_path):
    folder = a_folder(tmp_path)
    folder.last.unlink()
    if best:
        folder.best.write_bytes(b"best")
    messages = []
    for look in (folder.check_free, folder.check_run, lambda: folder.check_same({}, "ids")):
        with pytest.raises(ValueError, match=r"last\.pt is missing") as caught:
            look()
        messages.append(str(caught.value))
    assert len(set(messages)) == 1
    assert ("copy best.pt to last.pt" in messages[0]) == best
    assert "give another folder, or remove this one" in messages[0]
    assert "--resume" not in messages[0]
    if best:
        folder.best.rename(folder.last)
        folder.check_run()


def test_a_part_of_a_run_can_only_go(tmp_path):
    folder = RunFolder(tmp_path)
    folder.check_free()
    with pytest.raises(ValueError, match="holds no run to resume; start one without --resume"):
        folder.check_run()
    folder.best.write_bytes(b"best")
    for look in (folder.check_free, folder.check_run):
        with pytest.raises(ValueError, match=r"run\.json and last\.pt are missing: .* remove this one") as caught:
            look()
        assert "copy" not in str(caught.value)


@pytest.mark.parametrize("best", [True, False])
def test_a_damaged_last_checkpoint_names_a_way_out(best, tmp_path):
    def load(path):
        raise CheckpointError(f"{path.name} is cut off")

    folder = a_folder(tmp_path)
    assert folder.load_last(lambda path: path.read_bytes()) == b"last"
    if best:
        folder.best.write_bytes(b"best")
    with pytest.raises(CheckpointError, match=r"last\.pt is cut off; to go on .* give another folder") as caught:
        folder.load_last(load)
    assert ("copy best.pt to last.pt" in str(caught.value)) == best


def test_a_run_goes_on_with_other_freqs_but_no_other_schedule(tmp_path):
    folder = a_folder(tmp_path)
    same_run = {"lr": 0.1, "max_steps": 12, "print_freq": 5}
    folder.check_same(same_run, "ids")
    folder.check_same(same_run | {"val_freq": 3, "checkpoint_freq": 7}, "ids")
    with pytest.raises(ValueError, match=r"max_steps was 12 and is 24 \(the schedule of the learning rate"):
        folder.check_same(same_run | {"max_steps": 24}, "ids")
    with pytest.raises(ValueError, match=r"lr was 0\.1 and is 0\.2; give") as caught:
        folder.check_same(same_run | {"lr": 0.2}, "ids")
    assert "print_freq" not in str(caught.value)


def test_the_bar_shows_what_is_known(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "200")
    with TrainingProgress(10, 2) as progress:
        task = progress._bar.tasks[0]
        assert (task.completed, task.fields["figures"]) == (2, "loss –  – tokens/s")
        progress.advance(3)
        assert (task.completed, task.fields["figures"]) == (3, "loss –  – tokens/s")
        progress.update(4, 2.5, 1234.0)
        assert (task.completed, task.fields["figures"]) == (4, "loss 2.5000  1,234 tokens/s")
        progress.update(5, 2.25, 1234.0, 3.5)
        progress.update(6, 2.0, 1234.0)
        assert task.fields["figures"] == "loss 2.0000  validation 3.5000  1,234 tokens/s"
    assert "nan" not in sys.stderr.getvalue()
    assert "validation 3.5000" in sys.stderr.getvalue()


@pytest.mark.parametrize("quiet", [True, False])
def test_plain_lines_where_there_is_no_terminal(quiet, capsys):
    with TrainingProgress(10, 0, quiet) as progress:
        progress.advance(1)
        progress.update(2, 2.5, 1234.0, 3.5)
        progress.update(4, 2.25, 1234.0)
    lines = capsys.readouterr().err.splitlines()
    if quiet:
        assert lines == []
    else:
        assert lines[0].startswith("step 2/10  loss 2.5000  validation 3.5000  1,234 tokens/s  left 0:")
        assert lines[1].startswith("step 4/10  loss 2.2500  1,234 tokens/s  left 0:")
        assert len(lines) == 2
