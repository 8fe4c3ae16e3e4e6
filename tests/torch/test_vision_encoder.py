"""ViTTiny against the reference family's own numbers in float64, its gradients, dropout, other sizes, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from omni_torch.checkpoint import export_weights, load_checkpoint, load_weights, save_checkpoint
from omni_torch.vision_encoder import ViTTiny

GOLDEN_RELATIVE = 1e-12
GOLDEN = Path(__file__).parent.parent / "golden" / "vit.npz"
SIZES = {"img_size": 32, "patch": 8, "d": 24, "layers": 2, "heads": 3, "ff": 40}


def assert_golden(actual: torch.Tensor, expected: np.ndarray, what: str) -> None:
    """Largest difference relative to the largest value of the tensor."""
    actual = actual.detach().numpy()
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
def weights(golden) -> dict[str, torch.Tensor]:
    return {name[2:]: torch.from_numpy(w).double() for name, w in golden.items() if name.startswith("w/")}


@pytest.fixture
def model(golden, weights) -> ViTTiny:
    names = {"d_model": "d", "n_layers": "layers", "n_heads": "heads", "d_ff": "ff"}
    config = json.loads(golden["cfg"].tobytes())
    model = ViTTiny(**{names.get(name, name): value for name, value in config.items()}).double().eval()
    return load_weights(model, weights)


def images(height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((2, 3, height, width)))


def test_the_keys_are_the_familys(golden, model) -> None:
    assert list(model.state_dict()) == [name[2:] for name in golden if name.startswith("w/")]


def test_outputs_are_the_references(golden, model) -> None:
    cls, grid = model(torch.from_numpy(golden["x/image"]))  # float32 pixels, float64 weights
    assert_golden(cls, golden["x/cls"], "cls")
    assert_golden(grid, golden["x/grid"], "grid")


def test_the_bound_sees_a_slightly_wrong_model(golden, model) -> None:
    for norm in [module for module in model.modules() if hasattr(module, "eps")]:
        norm.eps = 1.001e-5
    with pytest.raises(AssertionError, match="relative error"):
        assert_golden(model(torch.from_numpy(golden["x/image"]))[0], golden["x/cls"], "cls")


@pytest.mark.parametrize("training", [False, True])
def test_blocks_are_torchs_encoder_layers(model, weights, training) -> None:
    """Values and gradients; a block's parameters have the keys of nn.TransformerEncoderLayer."""
    settings = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True, "layer_norm_eps": 1e-5}
    theirs = nn.TransformerEncoderLayer(24, 3, 40, **settings).double().train(training)
    ours = model.blocks[1].train(training)
    theirs.load_state_dict({k.removeprefix("blocks.1."): v for k, v in weights.items() if k.startswith("blocks.1.")})
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 7, 24)))
    outputs = [block(x) for block in (ours, theirs)]
    assert_golden(outputs[0], outputs[1].detach().numpy(), "block")
    direction = torch.from_numpy(np.random.default_rng(2).normal(size=x.shape))
    for output in outputs:
        (output * direction).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_golden(parameter.grad, expected[name].grad.numpy(), name)


def test_other_sizes_resize_the_positions(model) -> None:
    cls, grid = model(images(40, 16))
    assert cls.shape == (2, 1, 24)
    assert grid.shape == (2, 10, 24)
    # Positions that are all alike stay so, and a picture of one colour then gives every patch the same vector.
    with torch.no_grad():
        model.pos[:, 1:] = model.pos[:, 1:2].clone()
    _, grid = model(images(40, 16)[:, :, :1, :1].expand(2, 3, 40, 16))
    spread = (grid - grid[:, :1]).abs().max()
    assert spread <= 256 * np.finfo(np.float64).eps * grid.abs().max()
    model(images(8, 24))[1].sum().backward()
    assert model.pos.grad is not None
    assert bool((model.pos.grad.abs().sum(dim=-1) > 0).all())


def test_pictures_of_a_batch_do_not_see_each_other(model) -> None:
    together = model(images())[0]
    for i in range(2):
        assert_golden(model(images()[i : i + 1])[0], together[i : i + 1].detach().numpy(), f"picture {i}")


def test_dropout_is_on_in_training_alone() -> None:
    torch.manual_seed(0)
    model = ViTTiny(**SIZES, dropout=0.5)
    x = images().float()
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


def test_the_written_out_attention_is_the_fused_one(model) -> None:
    """With a dropout too small to ever drop, training takes the other path to the same numbers, but for its scale."""
    fused = model(images())[0].detach().numpy()
    model.train()
    for drop in [module for module in model.modules() if isinstance(module, nn.Dropout)]:
        drop.p = 1e-300
    assert_golden(model(images())[0], fused, "cls")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_parameters_dtype_is_the_computes(model, dtype) -> None:
    expected = model(images())[0]
    cls, grid = model.to(dtype)(images())
    assert cls.dtype == grid.dtype == dtype
    # Some 40 roundings one after the other, each of at most one eps of a value of order 1.
    assert (cls.double() - expected).abs().max() <= 40 * torch.finfo(dtype).eps * expected.abs().max()


def test_weights_start_as_torchs() -> None:
    torch.manual_seed(0)
    model = ViTTiny(img_size=32, patch=4, d=96, layers=1, heads=3, ff=128)
    bounds = {"proj.weight": 48**-0.5, "blocks.0.linear1.weight": 96**-0.5, "blocks.0.linear2.bias": 128**-0.5}
    bounds |= {"blocks.0.self_attn.out_proj.weight": 96**-0.5, "blocks.0.self_attn.in_proj_weight": (6 / 384) ** 0.5}
    state = model.state_dict()
    for name, bound in bounds.items():
        largest = float(state[name].abs().max())
        assert 0.9 * bound < largest <= bound, name
    for name in ("cls", "pos", "blocks.0.self_attn.in_proj_bias", "blocks.0.self_attn.out_proj.bias"):
        assert not state[name].any(), name
    assert bool((state["norm.weight"] == 1).all())
    assert sum(p.numel() for p in ViTTiny().parameters()) == 12 * 444_864 + 147_648 + 192 + 37_824 + 192


def test_weights_go_out_and_come_back(model, tmp_path) -> None:
    for name in ("vit.pt", "vit.safetensors"):
        save_checkpoint(tmp_path / name, model={}, parts={"vit": export_weights(model)})
        back = load_weights(ViTTiny(**SIZES).double(), load_checkpoint(tmp_path / name).parts["vit"])
        state = back.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_images_that_do_not_fit_are_refused(model) -> None:
    with pytest.raises(ValueError, match="36 × 32 pixels do not divide into patches of 8 × 8"):
        model(images(36, 32))
    with pytest.raises(ValueError, match="1 × 1 pixels do not divide"):
        model(images(1, 1))
    with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\)"):
        model(images()[0])
    with pytest.raises(ValueError, match="must be floating point, in"):
        model((images() * 255).byte())
    with pytest.raises(ValueError, match="images is a ndarray"):
        model(images().numpy())


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
        ViTTiny(**(SIZES | change))


def test_other_sizes_compile_whole() -> None:
    model = ViTTiny(16, 8, 8, 1, 2, 16, 0.0).eval()
    images = torch.rand(1, 3, 24, 16, generator=torch.Generator().manual_seed(0))
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    for got, want in zip(whole(images), model(images), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
