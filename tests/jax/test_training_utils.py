"""The guards of omni_jax: what they let through, what they refuse, and that a refusal changes nothing."""

from __future__ import annotations

import doctest
import io
import math
import random
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import omni_jax.training_utils
from omni_jax.config import ThinkerConfig
from omni_jax.layers import TokenIdError
from omni_jax.losses import cross_entropy
from omni_jax.optim import clip_grad_norm, warmup_cosine
from omni_jax.progress import TrainingProgress
from omni_jax.pt_archive import CheckpointError
from omni_jax.run_folder import RunFolder
from omni_jax.thinker import ThinkerLM
from omni_jax.training_utils import (
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
FLOATS = ["float16", "bfloat16", "float32", "float64"]


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def mse(pred, y):
    return jnp.mean(jnp.square(pred - y))


def a_model(*between, seed=0):
    rngs = nnx.Rngs(seed)
    return nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), *(between or (nnx.tanh,)), nnx.Linear(3, 1, rngs=rngs))


def gradients(values, dtype="float32"):
    return {f"p{i}": jnp.asarray(value, dtype) for i, value in enumerate(values)}


def batches(n=3, seed=0):
    rng = np.random.default_rng(seed)
    return [tuple(rng.normal(size=(8, d)).astype(np.float32) for d in (4, 1)) for _ in range(n)]


def weights(model):
    leaves = nnx.to_flat_state(nnx.state(model))
    return {
        path: np.asarray(jax.random.key_data(v) if _is_key(v) else v) for path, v in ((p, v[...]) for p, v in leaves)
    }


def _is_key(value):
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name], equal_nan=True) for name in a)


def test_numerical_error_is_what_the_family_catches():
    assert issubclass(NumericalError, RuntimeError)


@pytest.mark.parametrize("dtype", [*FLOATS, "int32"])
@pytest.mark.usefixtures("x64")
def test_a_good_loss_comes_back_as_a_float(dtype):
    value = validate_loss(jnp.asarray(3, dtype))
    assert type(value) is float
    assert value == 3.0


@pytest.mark.parametrize("loss", [2, 2.0, np.float32(2), np.array(2.0), jnp.asarray(2.0)])
def test_a_loss_is_any_real_scalar(loss):
    assert validate_loss(loss) == 2.0


@pytest.mark.parametrize("loss", [-1e6, 1e6, 0.0])
def test_the_bounds_are_allowed(loss):
    assert validate_loss(loss) == loss


@pytest.mark.parametrize("loss", [NAN, INF, -INF, 1.1e6, -1.1e6])
@pytest.mark.parametrize("make", [float, jnp.asarray])
def test_a_bad_loss_is_refused(loss, make):
    with pytest.raises(NumericalError, match=r"loss is .*-1e\+06 to 1e\+06; lower the learning rate, clip .* batch"):
        validate_loss(make(loss))


@pytest.mark.parametrize("loss", [NAN, INF])
def test_no_bounds_make_nan_or_inf_a_loss(loss):
    with pytest.raises(NumericalError):
        validate_loss(loss, -INF, INF)


@pytest.mark.parametrize(
    "loss", [jnp.ones(2), jnp.ones(1), jnp.ones(0), np.ones(2), "1", None, True, 1j, jnp.asarray(1j), [1.0]]
)
def test_what_is_no_scalar_is_no_loss(loss):
    with pytest.raises(ValueError, match="loss must be a"):
        validate_loss(loss)


@pytest.mark.parametrize("bounds", [(1.0, 0.0), (NAN, 1.0), (0.0, NAN)])
def test_loss_bounds_must_be_in_order(bounds):
    with pytest.raises(ValueError, match="min_loss must be ≤ max_loss"):
        validate_loss(0.5, *bounds)


@pytest.mark.parametrize("guard", [validate_loss, check_numerical_stability, check_gradient_explosion])
def test_a_guard_inside_jit_says_where_to_put_it(guard):
    with pytest.raises(ValueError, match=r"is traced: inside jit, grad or vmap there are no values .* outside"):
        jax.jit(guard)(jnp.asarray(1.0))


@pytest.mark.parametrize("dtype", [*FLOATS, "complex64", "int32", "bool"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
@pytest.mark.usefixtures("x64")
def test_a_stable_array_comes_back_itself(dtype, shape):
    for x in (jnp.ones(shape, dtype), np.ones(shape, jnp.dtype(dtype))):
        assert check_numerical_stability(x) is x


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.usefixtures("x64")
def test_an_unstable_array_is_described(dtype):
    x = jnp.asarray([[1.0, 2.0, -3.0], [0.5, INF, NAN], [NAN, 1.0, -INF]], dtype)
    with pytest.raises(NumericalError, match=r"act holds 2 NaN and 2 Inf among 9 .*act\[1, 1\] = inf.*-3 … 2;"):
        check_numerical_stability(x, "act")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (NAN, "tensor holds 1 NaN and 0 Inf among 1 values, the first is tensor = nan; none is finite"),
        ([INF], r"tensor holds 0 NaN and 1 Inf among 1 values, the first is tensor\[0\] = inf; none"),
        ([3 + 4j, complex(NAN, 0)], r"1 NaN and 0 Inf among 2 .*tensor\[1\].* 5 … 5"),
    ],
)
def test_unstable_corner_cases(x, message):
    with pytest.raises(NumericalError, match=message):
        check_numerical_stability(jnp.asarray(x))


def test_stability_is_of_arrays():
    with pytest.raises(ValueError, match="h must be an array, got list; convert it"):
        check_numerical_stability([1.0], "h")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.usefixtures("x64")
def test_the_norm_is_that_of_all_gradients(dtype):
    assert check_gradient_explosion(gradients([[3.0, 0.0], [], [-4.0]], dtype)) == (5.0, False)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (6e4, "float16"),
        (6e-8, "float16"),
        (1e30, "bfloat16"),
        (1e30, "float32"),
        (3e38, "float32"),
        (1e20, "float32"),
        (1e-12, "float32"),
        (1e-13, "float32"),
        (1e-30, "float32"),
        (1.2e-38, "float32"),
        (1e300, "float64"),
        (1e150, "float64"),
        (1e-97, "float64"),
        (2.3e-308, "float64"),
    ],
)
@pytest.mark.usefixtures("x64")
def test_the_squares_neither_overflow_nor_vanish(value, dtype):
    want = 2.0 * float(jnp.asarray(value, dtype))
    norm, exploded = check_gradient_explosion(gradients([[value] * 2, [value] * 2], dtype), raise_on_error=False)
    eps = float(jnp.finfo("float64" if dtype == "float64" else "float32").eps)
    assert abs(norm - want) <= ROUNDINGS * eps * want
    assert exploded == (want > 100.0)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nan_and_inf_have_exploded(value):
    grads = gradients([[1.0], [2.0, value], [3.0]])
    norm, exploded = check_gradient_explosion(grads, raise_on_error=False)
    assert exploded
    assert not math.isfinite(norm)
    assert math.isnan(norm) == math.isnan(value)
    with pytest.raises(NumericalError, match=r"gradient norm is .*worst: p1 (nan|inf), p2 3, p0 1; lower"):
        check_gradient_explosion(grads, INF if math.isnan(value) else 100.0)


def test_nan_outweighs_inf():
    assert math.isnan(check_gradient_explosion(gradients([[INF], [NAN]]), raise_on_error=False)[0])


def test_the_threshold_is_allowed():
    grads = gradients([[3.0, 4.0]])
    assert check_gradient_explosion(grads, max_grad_norm=5.0) == (5.0, False)
    assert check_gradient_explosion(grads, max_grad_norm=4.9, raise_on_error=False) == (5.0, True)
    with pytest.raises(NumericalError, match=r"gradient norm is 5, allowed is at most max_grad_norm=4.9; worst: p0 5;"):
        check_gradient_explosion(grads, max_grad_norm=4.9)


def test_every_form_that_gradients_come_in():
    model, (x, y) = a_model(), batches(1)[0]
    graphdef, params = nnx.split(model, nnx.Param)

    def loss_of(params):
        return 1e3 * mse(nnx.merge(graphdef, params)(x), y)

    state = jax.grad(loss_of)(params)
    module = jax.grad(lambda model: 1e3 * mse(model(x), y))(model)
    assert isinstance(state, nnx.State)
    assert isinstance(module, nnx.Module)
    forms = [state, module, nnx.grad(lambda model: 1e3 * mse(model(x), y))(model), nnx.to_pure_dict(state)]
    norms = {check_gradient_explosion(form, raise_on_error=False) for form in [*forms, jax.tree.leaves(state)]}
    assert len(norms) == 1
    for form in forms:
        with pytest.raises(NumericalError, match=r"worst: layers\.\d\.(kernel|bias) \d+\.\d+, layers\."):
            check_gradient_explosion(form)
    assert check_gradient_explosion(jnp.asarray([3.0, 4.0]))[0] == check_gradient_explosion(np.float32([3, 4]))[0] == 5


@pytest.mark.parametrize("guard", [check_gradient_explosion, clip_gradients])
def test_what_are_no_gradients_is_refused(guard):
    with pytest.raises(ValueError, match="grads holds no arrays"):
        guard({"a": []})
    with pytest.raises(ValueError, match="grads: b must be an array of a real floating dtype, got int32"):
        guard({"a": jnp.ones(2), "b": jnp.ones(2, jnp.int32)})
    with pytest.raises(ValueError, match=r"grads: a\.1 must be an array of a real floating dtype, got float"):
        guard({"a": [jnp.ones(2), 1.0]})


@pytest.mark.parametrize("guard", [check_gradient_explosion, clip_gradients])
@pytest.mark.parametrize("bad", [0.0, -1.0, NAN])
def test_max_grad_norm_is_above_zero(guard, bad):
    with pytest.raises(ValueError, match="max_grad_norm must be > 0"):
        guard(gradients([[1.0]]), bad)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("max_norm", [0.5, 5.0, 100.0])
@pytest.mark.usefixtures("x64")
def test_clipping_is_the_recipes(dtype, max_norm):
    grads = gradients([[3.0, 1.0], [-4.0]], dtype)
    for clip, reference in (
        (clip_gradients, clip_grad_norm),
        (jax.jit(clip_gradients, static_argnums=1), jax.jit(clip_grad_norm, static_argnums=1)),
    ):
        (ours, norm), (theirs, wanted) = clip(grads, max_norm), reference(grads, max_norm)
        assert norm == wanted
        assert norm.dtype == wanted.dtype
        assert all(jnp.array_equal(ours[k], theirs[k]) and ours[k].dtype == grads[k].dtype for k in grads)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_clipping_refuses_what_no_factor_mends(value):
    grads = gradients([[1.0], [2.0, value]])
    with pytest.raises(NumericalError, match=r"gradient norm is (nan|inf).*worst: p1 .*nothing was changed"):
        clip_gradients(grads)
    assert not jnp.isfinite(jax.jit(clip_gradients)(grads)[1])  # compiled, the norm tells


@pytest.mark.parametrize(("value", "max_norm"), [(1e20, 1.0), (1e30, 1.0), (2e38, 1e-3), (1e25, 1e30)])
def test_clipping_where_the_squares_overflow(value, max_norm):
    clipped, norm = clip_gradients(gradients([[value, 0.0], [-value], [0.0], []]), max_norm)
    eps = ROUNDINGS * float(jnp.finfo(jnp.float32).eps)
    want = value * math.sqrt(2)
    assert norm.dtype == jnp.float32
    assert abs(float(norm) - want) <= eps * want
    after = check_gradient_explosion(clipped, raise_on_error=False)[0]
    assert abs(after - min(max_norm, want)) <= eps * after
    assert clipped["p0"][0] == -clipped["p1"][0]


def test_a_norm_beyond_the_dtype_is_no_norm():
    top = float(jnp.finfo(jnp.float32).max)
    with pytest.raises(NumericalError, match=r"norm is 4\.8.*e\+38, which is no finite float32; worst: p0 3.*p1 3"):
        clip_gradients(gradients([[top], [top]]))


@pytest.mark.parametrize(("warmup", "most"), [(0, 1), (0, 7), (3, 10), (9, 10)])
@pytest.mark.parametrize("x64", [False, True])
def test_the_schedule_is_exact_at_every_step(warmup, most, x64):
    with jax.enable_x64(x64):
        schedule = get_lr_scheduler(0.5, warmup, most, 0.25)
        traced = jax.jit(schedule)
        for step in range(most + 3):
            want = 0.5 * warmup_cosine(step, warmup, most, 0.25)
            for count in (step, float(step), np.int64(step), np.float32(step), jnp.int32(step), jnp.float32(step)):
                lr = schedule(count)
                assert lr == want
                assert lr.dtype == want.dtype == (jnp.float64 if x64 else jnp.float32)
            eps = ROUNDINGS * float(jnp.finfo(want.dtype).eps)
            for count in (jnp.int32(step), jnp.float32(step)):  # compiled, a product may be fused
                assert abs(traced(count) - want) <= eps * want
        assert schedule(0) == (0.0 if warmup else 0.5)
        assert schedule(most) == schedule(10 * most) == 0.5 * 0.25


@pytest.mark.parametrize("inject", [False, True])
def test_the_schedule_drives_optax(inject):
    schedule = get_lr_scheduler(0.5, 2, 10)
    if inject:
        optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=schedule)
    else:
        optimizer = optax.chain(optax.clip_by_global_norm(1e3), optax.scale_by_learning_rate(schedule))
    params, grads = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
    state = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):
        update = jax.jit(optimizer.update)
        for step in range(12):
            updates, state = update(grads, state, params)
            want = float(schedule(step))
            assert abs(float(updates["w"][0]) + want) <= ROUNDINGS * float(jnp.finfo(jnp.float32).eps) * want


def test_a_traced_learning_rate_is_a_schedule_too():
    lr = jax.jit(lambda base: get_lr_scheduler(base, 2, 10)(1))(jnp.float32(0.5))
    assert lr == 0.25


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ((0.5, -1, 10), "warmup_steps"),
        ((0.5, 0.5, 10), "warmup_steps must be an integer, got 0.5"),
        ((0.5, 1, 10.5), "max_steps must be an integer"),
        ((0.5, 10, 10), "max_steps"),
        ((0.5, 1, 10, 1.5), "min_lr_ratio"),
        ((0.5, 1, 10, NAN), "min_lr_ratio"),
        ((-0.5, 1, 10), "lr must be finite"),
        ((INF, 1, 10), "lr must be finite"),
        ((jnp.ones(2), 1, 10), "lr must be a scalar"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(arguments, field):
    with pytest.raises(ValueError, match=field):
        get_lr_scheduler(*arguments)


@pytest.mark.parametrize("step", [0.5, -1, -1.0, NAN, jnp.array(-1), jnp.ones(2), jnp.ones(2, jnp.int32)])
def test_a_step_is_a_count(step):
    with pytest.raises(ValueError, match="step"):
        get_lr_scheduler(0.5, 1, 10)(step)


@pytest.fixture
def generators():
    """The global generators, put back afterwards."""
    kept = random.getstate(), np.random.get_state()
    yield
    random.setstate(kept[0])
    np.random.set_state(kept[1])


@pytest.mark.usefixtures("generators")
@pytest.mark.parametrize("seed", [0, 1, np.int64(5), 2**31, 2**32 - 1])
@pytest.mark.parametrize("x64", [False, True])
def test_a_seed_repeats_every_generator(seed, x64):
    def draw():
        return random.random(), np.random.rand()

    with jax.enable_x64(x64):
        key = set_seed(seed)
        first, next_ = draw(), draw()
        assert key == set_seed(seed) == jax.random.key(int(seed))
        assert key.shape == ()
        assert draw() == first
        assert all(a != b for a, b in zip(first, next_))
        assert key != set_seed((int(seed) + 1) % 2**32)
        assert all(a != b for a, b in zip(first, draw()))


@pytest.mark.usefixtures("generators")
@pytest.mark.parametrize("seed", [-1, 2**32, True, 1.0, "1", None, NAN])
def test_a_bad_seed_is_refused(seed):
    before = random.getstate()
    with pytest.raises(ValueError, match=r"seed must be an integer from 0 to 2\*\*32 - 1"):
        set_seed(seed)
    assert random.getstate() == before


def test_the_magnifier_sees_what_a_plain_loop_does(capsys):
    model = a_model()
    before = weights(model)
    records = debug_training(model, batches(5), mse, optax.sgd(0.1))
    graphdef, params = nnx.split(model, nnx.Param)
    eps = ROUNDINGS * float(jnp.finfo(jnp.float32).eps)
    assert [record.batch for record in records] == [0, 1, 2]
    for (x, y), record in zip(batches(3), records):

        def forward(params, x=x, y=y):
            output = nnx.merge(graphdef, params)(x)
            return mse(output, y), output

        (loss, output), grads = jax.jit(jax.value_and_grad(forward, has_aux=True))(params)
        norm = check_gradient_explosion(grads)[0]
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        assert (record.input_shape, record.input_dtype) == ((8, 4), "float32")
        assert record.input_range == (float(x.min()), float(x.max()))
        assert (record.output_shape, record.output_dtype) == ((8, 1), "float32")
        assert abs(record.output_range[0] - output.min()) <= eps
        assert abs(record.output_range[1] - output.max()) <= eps
        assert abs(record.loss - loss) <= eps * loss
        assert abs(record.grad_norm - norm) <= eps * norm
        assert abs(record.update_norm - 0.1 * norm) <= eps * (0.1 * norm + record.param_norm)
        assert (record.problem, record.where) == (None, None)
    assert same(weights(model), before)
    printed = capsys.readouterr().out
    for line in ("Batch 2:", "Input shape: (8, 4), dtype: float32", "Input range: [", "Output shape: (8, 1)", "Loss: "):
        assert line in printed
    assert printed.count("Gradient norm: ") == printed.count("Update size: ") == 3
    assert "STOP" not in printed


def stopped(model, data, loss_fn=mse, lr=0.1):
    """The last record of a run that has to stop there; the model is as it was."""
    before = weights(model)
    records = debug_training(model, [*data, data[0]], loss_fn, optax.sgd(lr), max_batches=len(data) + 1)
    assert len(records) == len(data)
    assert all(record.problem is None for record in records[:-1])
    assert same(weights(model), before)
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


class Log(nnx.Module):
    def __call__(self, x):
        return jnp.log(x)


class QuietLog(Log):
    """Takes its `__call__` from its base."""


@pytest.mark.parametrize("log", [Log, QuietLog])
def test_it_names_the_first_sub_module_that_is_not_finite(log):
    calls = {kind: kind.__dict__.get("__call__") for kind in (Log, QuietLog, nnx.Linear, nnx.Sequential)}
    record = stopped(a_model(nnx.Sequential(nnx.tanh, log())), batches(1))
    assert record.where == "output: layers.1.layers.1"
    assert math.isnan(record.loss)
    assert record.grad_norm is None
    assert calls == {kind: kind.__dict__.get("__call__") for kind in calls}


def test_it_names_a_bad_parameter_before_what_it_spoils():
    model = a_model()
    model.layers[2].bias[...] = jnp.asarray([NAN])
    (record,) = debug_training(model, batches(1), mse, optax.sgd(0.1))
    assert record.where == "parameters: layers.2.bias"


@pytest.mark.parametrize(
    ("loss_fn", "problem"),
    [
        (lambda pred, y: jnp.sum(pred - y) * NAN, "loss is nan"),
        (lambda pred, y: jnp.sum(pred - y) * 0 + 1e7, "loss is 10000000.0, allowed"),
    ],
)
def test_it_stops_at_a_bad_loss(loss_fn, problem):
    record = stopped(a_model(), batches(1), loss_fn)
    assert record.where == "loss"
    assert problem in record.problem


def test_it_stops_at_an_exploded_gradient():
    record = stopped(a_model(), batches(1), lambda pred, y: 1e3 * mse(pred, y))
    assert record.where in ("gradients: layers.2.kernel", "gradients: layers.2.bias")
    assert record.grad_norm > 100.0
    assert record.update_norm is None
    assert "max_grad_norm=100.0" in record.problem


def test_it_stops_at_a_gradient_that_is_nan_though_the_loss_is_not():
    record = stopped(a_model(), batches(1), lambda pred, y: jnp.sum(jnp.sqrt(pred * 0.0)))
    assert record.loss == 0.0
    assert math.isnan(record.grad_norm)
    assert record.where == "gradients: layers.0.bias"  # JAX keeps a layer's leaves by name


def loss_over(pred, y):
    return jnp.mean(jnp.square(pred - y))


@pytest.mark.parametrize(("pred_shape", "y_shape"), [((8, 1), (8,)), ((8, 1), (8, 3)), ((8, 1), (1, 8))])
def test_it_stops_at_a_loss_that_broadcasts(pred_shape, y_shape, capsys):
    y = np.random.default_rng(1).normal(size=y_shape).astype(np.float32)
    model = a_model()
    before = weights(model)
    with jax.numpy_rank_promotion("allow"):
        (record,) = debug_training(model, [(batches(1)[0][0], y)], loss_over, optax.sgd(0.1))
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
    data = [(x, y[:, 0]) for x, y in batches(3)]
    with jax.numpy_rank_promotion("allow"):
        records = debug_training(a_model(), data, loss_fn, optax.sgd(0.1))
    assert [record.problem for record in records] == [None] * 3


def test_an_update_that_changes_nothing_is_reported():
    unbiased = nnx.Linear(4, 1, use_bias=False, rngs=nnx.Rngs(0))  # a bias of 0 would take the smallest update
    (record,) = debug_training(unbiased, batches(1), mse, optax.sgd(1e-30))
    assert record.where == "updates"
    assert "the update changed nothing" in record.problem
    for optimizer in (optax.sgd(0.0), optax.sgd(get_lr_scheduler(0.1, 2, 10)), optax.MultiSteps(optax.sgd(0.1), 2)):
        assert debug_training(a_model(), batches(1), mse, optimizer)[0].problem is None


def test_an_update_that_is_not_finite_is_reported():
    record = stopped(a_model(), batches(1), lr=INF)
    assert record.where == "updates: layers.0.bias"
    assert "the optimizer's update is not finite" in record.problem


@pytest.mark.parametrize("training", [True, False])
def test_it_leaves_the_mode_and_the_random_streams_alone(training):
    model = a_model(nnx.Dropout(0.5, rngs=nnx.Rngs(7)))
    model.train() if training else model.eval()
    before = weights(model)
    assert any("rngs" in path for path in before)
    records = [debug_training(model, [batches(1)[0]] * 3, mse, optax.sgd(0.0)) for _ in range(2)]
    assert model.layers[1].deterministic is not training
    assert same(weights(model), before)
    assert records[0] == records[1]
    assert len({record.loss for record in records[0]}) == (3 if training else 1)  # a mask of its own for every batch


def test_dropout_does_not_blur_where_a_bad_loss_comes_from():
    record = stopped(a_model(nnx.Dropout(0.5, rngs=nnx.Rngs(7)), Log()), batches(1))
    assert record.where == "output: layers.2"


def test_it_takes_only_the_batches_it_looks_at():
    taken = []

    def loader():
        for batch in batches(5):
            taken.append(None)
            yield batch

    debug_training(a_model(), loader(), mse, optax.sgd(0.1), max_batches=2)
    assert len(taken) == 2


def test_batches_of_a_language_model(capsys):
    config = ThinkerConfig(vocab_size=31, n_layers=1, d_model=8, n_heads=2, d_ff=16)
    model = ThinkerLM.from_config(config, rngs=nnx.Rngs(0))
    ids = np.array([[1, 4, 5, 2], [1, 3, 0, 0]])
    batch = {"input_ids": ids[:, :-1], "target_ids": ids[:, 1:], "attention_mask": ids[:, :-1] != 0}
    (record,) = debug_training(model, [batch], cross_entropy, optax.adamw(1e-3))
    assert (record.input_dtype, record.input_range) == ("int32", (0.0, 5.0))
    assert record.output_shape == (2, 3, 31)
    assert record.problem is None
    assert "Input range: [0, 5]" in capsys.readouterr().out
    batch["target_ids"] = np.full((2, 3), 31)  # compiled, the loss is NaN; looked at again, it says why
    with pytest.raises(TokenIdError, match=r"targets\[0, 0\] = 31"):
        debug_training(model, [batch], cross_entropy, optax.adamw(1e-3))


def test_a_mask_reaches_only_a_model_that_takes_one():
    seen = []

    class Masked(nnx.Linear):
        def __call__(self, x, attention_mask=None):
            seen.append(attention_mask)
            return super().__call__(x)

    (x, y), mask = batches(1)[0], np.ones(8, bool)
    for kind in (Masked, nnx.Linear):
        batch = {"x": x, "y": y, "attention_mask": mask, "padding_mask": ~mask}
        debug_training(kind(4, 1, rngs=nnx.Rngs(0)), [batch], mse, optax.sgd(0.1))
    assert len(seen) == 1
    assert seen[0].shape == (8,)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": np.ones((2, 4))}, "batch 0 has the keys x; needed are one of x, input_ids, inputs and one of y"),
        (np.ones((2, 4)), r"batch 0 must be \(x, y\) or a dict with both, got ndarray"),
        ((np.ones((2, 4)),), r"batch 0 must be \(x, y\) or a dict with both, got tuple"),
        (
            (np.ones((0, 4)), np.ones((0, 1))),
            r"batch 0: x must be an array with at least one value, got shape \(0, 4\)",
        ),
        ((np.ones((2, 4)), [1.0]), "batch 0: y must be an array with at least one value, got list"),
    ],
)
def test_a_batch_of_another_form_is_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        debug_training(a_model(), [batch], mse, optax.sgd(0.1))


def test_other_misuse():
    with pytest.raises(ValueError, match="dataloader gave no batch"):
        debug_training(a_model(), [], mse, optax.sgd(0.1))
    with pytest.raises(ValueError, match="loss must be a scalar, got shape"):
        debug_training(a_model(), batches(), lambda pred, y: jnp.square(pred - y), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"Log has no nnx\.Param; there is nothing to train"):
        debug_training(Log(), batches(), mse, optax.sgd(0.1))
    for bad in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="max_batches must be an integer ≥ 1"):
            debug_training(a_model(), batches(), mse, optax.sgd(0.1), max_batches=bad)  # type: ignore[arg-type]


def test_the_docstrings_examples():
    assert doctest.testmod(omni_jax.training_utils).failed == 0


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
