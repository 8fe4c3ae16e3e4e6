"""OmniLM of both twins with the same weights in float64: logits, loss, gradients, features, files and greedy tokens."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import omni_jax
import omni_torch
from parity.weights import bind, leaf_names, to_jax, to_torch

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = float(np.finfo(np.float64).eps)
SUM = 200
"""More roundings than one number of this model, or of its gradient, has on its way."""
THINKER = {"vocab_size": 31, "n_layers": 2, "d_model": 24, "n_heads": 4, "d_ff": 20, "dropout": 0.0, "ctx_len": 40}
AUDIO = {"d": 12, "heads": 3, "ff": 16, "layers": 2, "dropout": 0.0, "downsample_factor": 8}
VISION = {"img_size": 16, "patch": 8, "d": 12, "layers": 2, "heads": 2, "ff": 16, "dropout": 0.0}
CONFIG = {"thinker": THINKER | {"use_gqa": True}, "audio": AUDIO, "vision": VISION}


@pytest.fixture(scope="module")
def module() -> omni_torch.OmniLM:
    torch.manual_seed(0)
    model = omni_torch.OmniLM.from_config(omni_torch.OmniConfig.from_dict(CONFIG)).double().eval()
    with torch.no_grad():
        for p in model.parameters():  # away from the ones and zeros that norms and biases start at
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def template() -> tuple[Any, Any]:
    """omni_jax's graphdef and parameters; the values are nobody's."""
    return nnx.split(omni_jax.OmniLM.from_config(omni_jax.OmniConfig.from_dict(CONFIG)))


@pytest.fixture(scope="module")
def links(module, template) -> list[Any]:
    shapes = {
        name: leaf.shape for name, leaf in zip(leaf_names(template[1]), jax.tree.leaves(template[1]), strict=True)
    }
    return bind(shapes, {name: tuple(p.shape) for name, p in module.named_parameters()})


def batch(dtype: type = np.float64) -> dict[str, np.ndarray]:
    """Every mix of picture and clip, padding in the text; what may not be read is NaN."""
    draw = np.random.default_rng(1)
    images, mel = draw.random((4, 3, 16, 16)).astype(dtype), draw.standard_normal((4, 40, 128)).astype(dtype)
    images[[1, 3]] = mel[[0, 3]] = mel[1, 9:] = np.nan
    return {
        "images": images,
        "mel": mel,
        "mel_lengths": np.array([0, 9, 40, 0]),
        "has_image": np.array([True, False, True, False]),
        "has_audio": np.array([False, True, True, False]),
        "attention_mask": np.arange(6)[None] >= np.array([0, 2, 3, 1])[:, None],
    }


def tokens() -> np.ndarray:
    return np.random.default_rng(2).integers(3, 31, (4, 6))


def targets() -> np.ndarray:
    after = np.roll(tokens(), -1, axis=1)
    after[:, -1] = after[~batch()["attention_mask"]] = 0
    return after


def tensors(given: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in given.items()}


def assert_close(found: Any, expected: Any, name: str = "") -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype == np.float64, name
    assert found.shape == expected.shape, name
    worst = np.abs(found - expected).max()
    assert worst <= SUM * EPS * np.abs(expected).max(), f"{name}: {worst}"


def test_logits_loss_and_gradients(module, template, links) -> None:
    weights = {name: p.detach().numpy() for name, p in module.named_parameters()}
    graphdef, params = template

    def program(params, tokens, targets, batch):
        model = nnx.merge(graphdef, params)
        return model.loss(tokens, targets, **batch), model(tokens, **batch)

    with jax.enable_x64(True):
        params = to_jax(links, weights, params)
        run = jax.jit(jax.value_and_grad(program, has_aux=True))
        (loss, logits), gradients = run(params, tokens(), targets(), batch())
        assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(gradients))
        ours = to_torch(links, gradients)

    module.zero_grad()
    expected = module.loss(torch.from_numpy(tokens()), torch.from_numpy(targets()), **tensors(batch()))
    expected.backward()
    assert_close(loss, expected.detach().numpy())
    with torch.no_grad():
        assert_close(logits, module(torch.from_numpy(tokens()), **tensors(batch())).numpy())
    theirs = {name: p.grad for name, p in module.named_parameters()}
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        # A gradient may be 0 but for rounding: the bound is on the scale of the largest of all.
        assert np.abs(ours[name] - gradient.numpy()).max() <= SUM * EPS * largest, name
    module.zero_grad()


@pytest.mark.parametrize("policy", ["family", "longest"])
@pytest.mark.parametrize("ctx_len", [6, 13, 19, 40])
def test_fuse(policy, ctx_len) -> None:
    draw = np.random.default_rng(3)
    parts = {
        name: draw.standard_normal((2, length, 8), np.float32)
        for name, length in (("image", 1), ("audio", 10), ("text", 8))
    }
    masks = {f"{name}_mask": draw.random(part.shape[:2]) < 0.7 for name, part in parts.items()}
    given = parts | masks | {"targets": draw.integers(0, 9, (2, 8), np.int32)}
    ours = omni_jax.fuse(**given, ctx_len=ctx_len, policy=policy)
    theirs = omni_torch.fuse(**tensors(given), ctx_len=ctx_len, policy=policy)
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    if ctx_len > 9:
        chunks = omni_jax.fuse_chunks(**given, ctx_len=ctx_len)
        others = omni_torch.fuse_chunks(**tensors(given), ctx_len=ctx_len)
        for chunk, other in zip(chunks, others, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(chunk, other, strict=True))


def test_features(module, template) -> None:
    wave = np.random.default_rng(4).uniform(-1, 1, (2, 3000)) * np.array([[1.0], [1e-4]])
    with jax.enable_x64(True):
        ours = nnx.merge(*template).features(wave)
        assert_close(ours, module.features(torch.from_numpy(wave)).numpy())


@pytest.mark.parametrize("name", ["omni.pt", "omni.safetensors"])
def test_files_go_from_twin_to_twin_and_say_the_same(module, name, tmp_path) -> None:
    """Saved by one, loaded and saved by the other: the same bits; and then greedy decoding gives the same ids."""
    omni_torch.OmniConfig.from_dict(CONFIG).to_json(tmp_path / "config.json")
    float32 = omni_torch.OmniLM.from_config(omni_torch.OmniConfig.from_dict(CONFIG)).eval()
    float32.load_state_dict({key: value.float() for key, value in module.state_dict().items()})
    omni_torch.save_checkpoint(tmp_path / name, model=float32, step=3)
    model = omni_jax.OmniLM.from_checkpoint(tmp_path)
    (tmp_path / "back").mkdir()
    omni_jax.save_checkpoint(tmp_path / "back" / name, model=model, step=3)
    ours, theirs = (twin.load_checkpoint(tmp_path / "back" / name) for twin in (omni_jax, omni_torch))
    assert (ours.kind, ours.step) == (theirs.kind, theirs.step)
    omni_jax.OmniConfig.from_dict(CONFIG).to_json(tmp_path / "back" / "config.json")
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()
    back = omni_torch.OmniLM.from_checkpoint(tmp_path / "back")
    weights = omni_torch.export_weights(back)
    assert weights.keys() == omni_torch.export_weights(float32).keys()
    assert all(torch.equal(value, weights[key]) for key, value in omni_torch.export_weights(float32).items())
    prompts = [[1, 5, 9], [1, 8], [3, 3, 11, 7]]
    images = [None if row in (1, 3) else batch(np.float32)["images"][row] for row in range(3)]
    mels = [None, batch(np.float32)["mel"][1, :9], batch(np.float32)["mel"][2]]
    said = omni_jax.generate(model, prompts, 8, eos_id=None, images=images, mels=mels)
    assert omni_torch.generate(back, prompts, 8, eos_id=None, images=images, mels=mels).tokens == said.tokens
