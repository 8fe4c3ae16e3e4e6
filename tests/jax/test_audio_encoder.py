"""AudioEncoderTiny: the reference family's numbers, batches of unequal clips, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni_jax.audio_encoder import AudioEncoderTiny, CTCHead
from omni_jax.checkpoint import CheckpointError, export_weights, load_weights

GOLDEN_RELATIVE = 1e-12
GOLDEN = Path(__file__).parent.parent / "golden" / "audio_x4.npz"
SIZES = {"d": 12, "heads": 3, "ff": 20, "layers": 2, "dropout": 0.0}
ULPS = 256  # sums of up to 64·9 terms and two blocks, in another order for another shape


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def make(factor: int = 4, dtype=jnp.float64, **sizes) -> AudioEncoderTiny:
    """Every parameter drawn afresh: a norm scale of 1 would hide its absence."""
    model = AudioEncoderTiny(**SIZES | sizes, downsample_factor=factor, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.2, dtype), params)
    model = nnx.merge(graphdef, drawn, rest)
    model.eval()
    return model


def draw(B: int, T: int, dtype=jnp.float64) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(B, T, 128)), dtype)


def assert_near(actual, expected, bound: float = ULPS * np.finfo(np.float64).eps) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == np.float64
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    assert np.abs(actual - expected).max() <= bound * np.abs(expected).max()


@pytest.fixture
def golden(x64):
    with np.load(GOLDEN) as file:
        found = {name: file[name] for name in file.files}
    cfg = json.loads(found["cfg"].tobytes())
    names = {"d_model": "d", "n_heads": "heads", "d_ff": "ff", "n_layers": "layers"}
    model = AudioEncoderTiny(**{names.get(key, key): value for key, value in cfg.items()}, rngs=nnx.Rngs(0))
    state = {key[2:]: value for key, value in found.items() if key.startswith("w/")}
    return load_weights(model, state), found


def in_float64(model):
    graphdef, params = nnx.split(model, nnx.Param)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params))


def test_golden(golden) -> None:
    model, found = golden
    assert found["x/out"].dtype == np.float64
    model = in_float64(model)
    graphdef, params = nnx.split(model, nnx.Param)
    out = jax.jit(lambda params, mel: nnx.merge(graphdef, params)(mel))(params, jnp.asarray(found["x/mel"]))
    assert_near(out, found["x/out"], GOLDEN_RELATIVE)
    B, T, _ = found["x/mel"].shape
    out, lengths = model(jnp.asarray(found["x/mel"]), jnp.full((B,), T))
    assert_near(out, found["x/out"], GOLDEN_RELATIVE)
    assert lengths.tolist() == [out.shape[1]] * B


def test_the_bound_sees_a_slightly_wrong_model(golden) -> None:
    model, found = golden
    model = in_float64(model)
    for block in model.blocks:
        block.norm1.epsilon = 1.001e-5
    with pytest.raises(AssertionError):
        assert_near(model(jnp.asarray(found["x/mel"])), found["x/out"], GOLDEN_RELATIVE)


def test_weights_come_back_as_they_went_in(golden) -> None:
    model, found = golden
    exported = export_weights(model)
    assert set(exported) == {key[2:] for key in found if key.startswith("w/")}
    for key, value in exported.items():
        assert np.array_equal(value, found[f"w/{key}"]), key
    state = {key[2:]: value for key, value in found.items() if key.startswith("w/")}
    with pytest.raises(CheckpointError, match=r"down.net.2.weight has shape .*, and the model's"):
        load_weights(model, state | {"down.net.2.weight": state["down.net.2.weight"][:, :32]})


def test_keys_of_the_encoder_by_8(x64) -> None:
    shapes = {key: value.shape for key, value in export_weights(make(8)).items()}
    assert shapes["down.0.net.0.weight"] == (64, 1, 3, 3)
    assert shapes["down.0.net.2.weight"] == shapes["down.1.weight"] == (64, 64, 3, 3)
    assert shapes["down.1.bias"] == (64,)
    assert shapes["proj.weight"] == (12, 64 * 16)
    assert not any(key.startswith("down.net") for key in shapes)
    head = CTCHead(12, 7, rngs=nnx.Rngs(0))
    assert {key: value.shape for key, value in export_weights(head).items()} == {"weight": (7, 12), "bias": (7,)}


@pytest.mark.parametrize("factor", [4, 8])
def test_a_clip_in_a_batch_is_as_it_is_alone(x64, factor) -> None:
    model = make(factor)
    T = 37
    lengths = np.array([37, 36, 17, 8, 1])
    mel = draw(len(lengths), T)
    mel = jnp.where(jnp.arange(T)[None, :, None] < lengths[:, None, None], mel, jnp.nan)  # whatever lies in the padding
    out, kept = model(mel, jnp.asarray(lengths))
    assert out.shape == (len(lengths), -(-T // factor), 12)
    assert kept.tolist() == [-(-length // factor) for length in lengths.tolist()]
    alone = jax.jit(lambda clip: model(clip))
    for i, length in enumerate(lengths.tolist()):
        assert_near(out[i, : kept[i]], alone(mel[i : i + 1, :length])[0])
        assert not out[i, kept[i] :].any()


def test_without_lengths_the_padding_is_heard(x64) -> None:
    """The test above would see a mask that does nothing."""
    model = make()
    mel = draw(1, 20).at[:, 10:].set(0.0)
    alone = model(mel[:, :10])
    assert float(jnp.abs(model(mel)[:, : alone.shape[1]] - alone).max()) > 1e-3


def test_every_parameter_has_a_gradient_and_the_padding_none(x64) -> None:
    model = make(8)
    graphdef, params = nnx.split(model, nnx.Param)
    mel = draw(2, 24).at[1, 9:].set(jnp.nan)

    @jax.jit
    def grads(params, mel, lengths):
        return jax.grad(lambda p, mel: jnp.sum(jnp.sin(nnx.merge(graphdef, p)(mel, lengths)[0])), argnums=(0, 1))(
            params, mel
        )

    of_params, of_mel = grads(params, mel, jnp.asarray([24, 9]))
    for path, leaf in nnx.to_flat_state(of_params):
        assert np.isfinite(leaf[...]).all(), path
        assert np.asarray(leaf[...]).any(), path
    assert not of_mel[1, 9:].any()
    assert of_mel[1, :9].any()


def test_dropout_is_on_in_training_only() -> None:
    model = make(dtype=jnp.float32, dropout=0.5)
    mel = draw(1, 16, jnp.float32)
    assert jnp.array_equal(model(mel), model(mel))
    model.train()
    first, second = model(mel), model(mel)
    assert jnp.isfinite(first).all()
    assert not jnp.array_equal(first, second)


def test_the_parameters_decide_the_dtype() -> None:
    model = make(dtype=jnp.bfloat16)
    assert jax.eval_shape(lambda mel: model(mel), draw(1, 9, jnp.float32)).dtype == jnp.bfloat16
    head = CTCHead(12, 5, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    assert head(jnp.ones((1, 2, 12))).dtype == jnp.bfloat16


def test_lengths_inside_jit_are_cut_to_what_there_is(x64) -> None:
    model = make()
    mel = draw(2, 8)
    out, kept = jax.jit(lambda lengths: model(mel, lengths))(jnp.asarray([99, 0]))
    assert kept.tolist() == [2, 0]
    assert_near(out[:1], model(mel)[:1])
    assert not out[1].any()


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"d": 0}, "d = 0: must be an integer from 1 up"),
        ({"heads": 5}, "heads = 5: must divide d = 12"),
        ({"layers": 1.0}, "layers = 1.0"),
        ({"dropout": 1.0}, r"dropout = 1.0: must be in \[0, 1\)"),
        ({"downsample_factor": 2}, "downsample_factor = 2: must be 4 or 8"),
    ],
)
def test_sizes_that_are_refused(sizes, words) -> None:
    with pytest.raises(ValueError, match=words):
        AudioEncoderTiny(**SIZES | sizes, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="vocab_size = 0"):
        CTCHead(12, 0, rngs=nnx.Rngs(0))


def test_input_that_is_refused() -> None:
    model, mel = make(dtype=jnp.float32), draw(2, 8, jnp.float32)
    for bad in (mel[0], mel[:, :, :80], mel[:, :0], jnp.swapaxes(mel, 1, 2)):
        with pytest.raises(ValueError, match=r"mel has shape .*: must be \(B, T, 128\)"):
            model(bad)
    with pytest.raises(ValueError, match="mel has dtype int32: must be floating"):
        model(mel.astype(jnp.int32))
    for lengths in ([8], [[8, 8]], [8.0, 8.0]):
        with pytest.raises(ValueError, match=r"lengths have shape .*: must be integers of shape \(2,\)"):
            model(mel, jnp.asarray(lengths))
    for length in (0, 9, -1):
        with pytest.raises(ValueError, match=rf"lengths\[1\] = {length}: must be from 1 to the 8 frames"):
            model(mel, jnp.asarray([8, length]))
