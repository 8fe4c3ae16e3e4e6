"""ViTTiny against the reference family's own numbers in float64, its gradients, dropout, other sizes, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni_jax.checkpoint import CheckpointError, export_weights, load_checkpoint, load_weights, save_checkpoint
from omni_jax.thinker import num_parameters
from omni_jax.vision_encoder import ViTTiny

GOLDEN_RELATIVE = 1e-12
GOLDEN = Path(__file__).parent.parent / "golden" / "vit.npz"
SIZES = {"img_size": 32, "patch": 8, "d": 24, "layers": 2, "heads": 3, "ff": 40}


def assert_golden(actual, expected, what: str) -> None:
    """Largest difference relative to the largest value of the tensor."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == np.float64 == expected.dtype, what  # a "float64" test in float32 would be void
    assert actual.shape == expected.shape, what
    assert np.isfinite(actual).all(), what
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= GOLDEN_RELATIVE, f"{what}: relative error {error:.2e}"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def weights(golden) -> dict[str, np.ndarray]:
    return {name[2:]: w.astype(np.float64) for name, w in golden.items() if name.startswith("w/")}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def model(golden, weights, x64) -> ViTTiny:
    names = {"d_model": "d", "n_layers": "layers", "n_heads": "heads", "d_ff": "ff"}
    config = json.loads(golden["cfg"].tobytes())
    config = {names.get(name, name): value for name, value in config.items()}
    model = nnx.eval_shape(lambda: ViTTiny(**config, rngs=nnx.Rngs(0), param_dtype=jnp.float64))  # draws nothing
    model.eval()
    return load_weights(model, weights)


@jax.jit
def forward(model, images):
    return model(images)


def images(height: int = 32, width: int = 32, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).random((2, 3, height, width)))


def test_the_keys_are_the_familys(golden, model) -> None:
    assert set(export_weights(model)) == {name[2:] for name in golden if name.startswith("w/")}
    for key, value in export_weights(model).items():
        assert np.array_equal(value, golden[f"w/{key}"]), key


def test_outputs_are_the_references(golden, model) -> None:
    cls, grid = forward(model, jnp.asarray(golden["x/image"]))  # float32 pixels, float64 weights
    assert_golden(cls, golden["x/cls"], "cls")
    assert_golden(grid, golden["x/grid"], "grid")


def test_parameters_decide_the_dtype_of_one_graph(golden, weights) -> None:
    """Built in float32, merged with float64 leaves."""
    model = nnx.eval_shape(lambda: ViTTiny(**SIZES, dropout=0.0, rngs=nnx.Rngs(0)))
    load_weights(model, {key: value.astype(np.float32) for key, value in weights.items()})
    with jax.enable_x64(True):
        graphdef, params = nnx.split(model, nnx.Param)
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        run = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))
        assert_golden(run(wide, jnp.asarray(golden["x/image"]))[1], golden["x/grid"], "grid")
        lines = str(jax.make_jaxpr(run)(wide, jnp.asarray(golden["x/image"], jnp.float64)))
        assert not re.search(r":(f|bf)(16|32)\[", lines)


def test_values_have_the_names_of_the_torch_modules(model) -> None:
    names = set(re.findall(r"name=([\w.]+)\]", str(jax.make_jaxpr(lambda x: model(x))(images()))))
    blocks = {f"blocks.{i}{part}" for i in range(2) for part in ("", ".self_attn", ".linear2")}
    assert blocks | {"norm"} <= names


def test_the_bound_sees_a_slightly_wrong_model(golden, model) -> None:
    for _, norm in nnx.iter_modules(model):
        if hasattr(norm, "epsilon"):
            norm.epsilon = 1.001e-5
    with pytest.raises(AssertionError, match="relative error"):
        assert_golden(forward(model, jnp.asarray(golden["x/image"]))[0], golden["x/cls"], "cls")


def test_gradients_are_finite_differences(model) -> None:
    """Along one direction through all parameters: central differences with step h err by h² and eps / h."""
    graphdef, params = nnx.split(model, nnx.Param)
    x, rng = images(), np.random.default_rng(1)
    params = jax.tree.map(np.asarray, params)  # numpy does the sums here without compiling them
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)

    @jax.jit
    def loss(params):
        cls, grid = nnx.merge(graphdef, params)(x)
        return jnp.sum(jnp.sin(cls)) + jnp.sum(jnp.cos(grid))

    grads = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params))
    assert all(leaf.any() for leaf in jax.tree.leaves(grads))
    slope = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True))
    step = float(np.finfo(np.float64).eps ** (1 / 3))
    there = float(loss(jax.tree.map(lambda p, d: p + step * d, params, direction)))
    back = float(loss(jax.tree.map(lambda p, d: p - step * d, params, direction)))
    assert abs((there - back) / (2 * step) - slope) <= 1000 * step**2 * abs(float(loss(params)))


def test_other_sizes_resize_the_positions(model) -> None:
    cls, grid = forward(model, images(40, 16))
    assert cls.shape == (2, 1, 24)
    assert grid.shape == (2, 10, 24)
    # Positions that are all alike stay so, and a picture of one colour then gives every patch the same vector.
    pos = model.pos[...]
    model.pos.set_value(pos.at[:, 1:].set(pos[:, 1:2]))
    _, grid = forward(model, jnp.broadcast_to(images(40, 16)[:, :, :1, :1], (2, 3, 40, 16)))
    spread = jnp.abs(grid - grid[:, :1]).max()
    assert spread <= 256 * np.finfo(np.float64).eps * jnp.abs(grid).max()
    graphdef, params = nnx.split(model, nnx.Param)
    x = images(8, 24)
    grads = jax.jit(jax.grad(lambda params: nnx.merge(graphdef, params)(x)[1].sum()))(params)
    assert bool((jnp.abs(grads["pos"][...]).sum(axis=-1) > 0).all())


def test_pictures_of_a_batch_do_not_see_each_other(model) -> None:
    together = forward(model, images())[0]
    for i in range(2):
        assert_golden(forward(model, images()[i : i + 1])[0], together[i : i + 1], f"picture {i}")
    one_by_one = jax.jit(jax.vmap(lambda image: model(image[None])[0][0]))(images())
    assert_golden(one_by_one, together, "vmap")


def test_dropout_is_on_in_training_alone() -> None:
    model = ViTTiny(**(SIZES | {"layers": 1}), dropout=0.5, rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    model.eval()
    x, resting = images(), nnx.graphdef(model)

    @jax.jit(static_argnums=0)
    def run(graphdef, rest):
        model = nnx.merge(graphdef, params, rest)
        return model(x)[0], nnx.split(model, nnx.Param, ...)[2]

    first, later = run(graphdef, rest)
    assert jnp.array_equal(first, run(graphdef, rest)[0])
    assert not jnp.array_equal(first, run(graphdef, later)[0])
    assert jnp.array_equal(run(resting, rest)[0], run(resting, later)[0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_parameters_dtype_is_the_computes(model, dtype) -> None:
    expected = np.asarray(forward(model, images())[0])
    graphdef, params = nnx.split(model, nnx.Param)
    cls, grid = forward(nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(dtype), params)), images())
    assert cls.dtype == grid.dtype == dtype
    # Some 40 roundings one after the other, each of at most one eps of a value of order 1.
    error = np.abs(np.asarray(cls).astype(np.float64) - expected).max()
    assert error <= 40 * float(jnp.finfo(dtype).eps) * np.abs(expected).max()


def test_a_compute_dtype_beside_float32_parameters() -> None:
    model = nnx.eval_shape(lambda: ViTTiny(**SIZES, dropout=0.0, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {"float32"}
    assert [part.dtype.name for part in jax.eval_shape(forward, model, images(40, 16))] == ["bfloat16"] * 2


def test_weights_start_as_torchs() -> None:
    model = ViTTiny(img_size=32, patch=4, d=96, layers=1, heads=3, ff=128, rngs=nnx.Rngs(0))
    bounds = {"proj.weight": 48**-0.5, "blocks.0.linear1.weight": 96**-0.5, "blocks.0.linear2.bias": 128**-0.5}
    bounds |= {"blocks.0.self_attn.out_proj.weight": 96**-0.5, "blocks.0.self_attn.in_proj_weight": (6 / 384) ** 0.5}
    state = export_weights(model)
    for name, bound in bounds.items():
        largest = float(np.abs(state[name]).max())
        assert 0.9 * bound < largest <= bound, name
    for name in ("cls", "pos", "blocks.0.self_attn.in_proj_bias", "blocks.0.self_attn.out_proj.bias"):
        assert not state[name].any(), name
    assert (state["norm.weight"] == 1).all()
    whole = nnx.eval_shape(lambda: ViTTiny(rngs=nnx.Rngs(0)))
    assert num_parameters(whole) == 12 * 444_864 + 147_648 + 192 + 37_824 + 192


def test_weights_go_out_and_come_back(model, tmp_path) -> None:
    for name in ("vit.pt", "vit.safetensors"):
        save_checkpoint(tmp_path / name, model={}, parts={"vit": export_weights(model)})
        fresh = nnx.eval_shape(lambda: ViTTiny(**SIZES, rngs=nnx.Rngs(1), param_dtype=jnp.float64))
        state = export_weights(load_weights(fresh, load_checkpoint(tmp_path / name).parts["vit"]))
        assert all(np.array_equal(value, state[key]) for key, value in export_weights(model).items())


def test_a_kernel_of_another_layout_is_refused(model, weights) -> None:
    """A picture side is not a colour: the weight of JAX's own layout has the right number of values."""
    turned = weights | {"proj.weight": weights["proj.weight"].transpose(2, 3, 1, 0)}
    with pytest.raises(CheckpointError, match=r"proj\.weight"):
        load_weights(model, turned)


def test_images_that_do_not_fit_are_refused(model) -> None:
    with pytest.raises(ValueError, match="36 × 32 pixels do not divide into patches of 8 × 8"):
        model(images(36, 32))
    with pytest.raises(ValueError, match="1 × 1 pixels do not divide"):
        model(images(1, 1))
    with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\)"):
        model(images()[0])
    with pytest.raises(ValueError, match="must be floating point, in"):
        model((images() * 255).astype(jnp.uint8))
    with pytest.raises(ValueError, match="images is a list"):
        model(images().tolist())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"img_size": 33}, "img_size = 33 must be a multiple of patch = 8"),
        ({"heads": 5}, "d = 24 must be a multiple of heads = 5"),
        ({"layers": 0}, "layers = 0 must be an integer from 1 up"),
        ({"ff": 2.5}, "ff = 2.5 must be"),
        ({"patch": True}, "patch = True must be"),
        ({"dropout": 1.0}, "dropout = 1.0 must be a number from 0 to below 1"),
    ],
)
def test_settings_out_of_range_are_refused(change, words) -> None:
    with pytest.raises(ValueError, match=words):
        ViTTiny(**(SIZES | change), rngs=nnx.Rngs(0))
