"""parity.precision: what a run was computed with, and what of it should worry somebody."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from parity import precision
from parity.errors import CannotLook, Misuse

ROOT = Path(__file__).parent.parent.parent
DIGITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
"""Significant bits by IEEE 754 (and bfloat16's definition); u is 2 to minus this."""


@pytest.mark.parametrize("name", precision.PRECISIONS)
def test_unit_roundoff_is_the_formats(name: str) -> None:
    u = precision.unit_roundoff(name)
    assert u == 2.0 ** -DIGITS[name]
    one = np.ones((), precision.precision(name).numpy)
    assert one + one.dtype.type(u) == one, "half a gap rounds back to even"
    assert one + one.dtype.type(2 * u) > one


def test_tf32_has_the_roundoff_of_float16() -> None:
    assert precision.unit_roundoff("tf32") == precision.unit_roundoff("float16")


@pytest.mark.parametrize("name", precision.PRECISIONS)
def test_one_format_in_three_libraries(name: str) -> None:
    import jax.numpy as jnp
    import torch

    format_ = precision.precision(name)
    assert jnp.dtype(format_.jax) == format_.numpy
    assert float(torch.finfo(format_.torch).eps) == 2 * format_.unit_roundoff


def test_unknown_names_are_misuse_with_the_nearest() -> None:
    with pytest.raises(Misuse, match="did you mean 'bfloat16'"):
        precision.precision("bflaot16")
    with pytest.raises(Misuse, match=r"did you mean 'cuda'.*known: cpu, cuda, tpu"):
        precision.resolve_device("cudda")
    with pytest.raises(Misuse, match="did you mean 'highest'"), precision.settings("cpu", "hihgest"):
        raise AssertionError("not reached")


def test_cpu_is_always_there() -> None:
    jax_device, torch_device = precision.resolve_device("cpu")
    assert (jax_device.platform, torch_device.type) == ("cpu", "cpu")
    assert precision.device_names("cpu") == ["cpu"]


@pytest.mark.parametrize(("name", "extra"), [("cuda", "cuda13"), ("tpu", "tpu")])
def test_a_missing_device_says_what_to_do(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = precision._jax_devices("cpu")
    monkeypatch.setattr(precision, "_jax_devices", lambda kind: [] if kind in ("cuda", "tpu") else cpu)
    with pytest.raises(CannotLook, match=rf"JAX sees no .*omni-parity\[{extra}\].*--device cpu"):
        precision.resolve_device(name)


def test_a_torch_without_cuda_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CannotLook, match=r"PyTorch sees no CUDA GPU .*install a CUDA build of torch"):
        precision.resolve_device("cuda")


def test_missing_frameworks_cannot_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_installed", lambda name: name != "torch")
    with pytest.raises(CannotLook, match="torch not installed: pip install"):
        precision.resolve_device("cpu")


def _flags() -> dict[str, object]:
    import jax
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return {
        "jax": jax.config.jax_default_matmul_precision,  # pyright: ignore[reportAttributeAccessIssue]
        "torch": precision._read(torch.get_float32_matmul_precision),
        "cudnn": precision._read(lambda: cudnn.allow_tf32),
        "bf16": matmul.allow_bf16_reduced_precision_reduction,
        "fp16": matmul.allow_fp16_reduced_precision_reduction,
        "new": [matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision],
        "mkldnn": torch.backends.mkldnn.matmul.fp32_precision,
    }


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_settings_are_set_and_come_back(before: str) -> None:
    import torch

    kept = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(before)
        outside = _flags()

        def fail_inside() -> None:
            with precision.settings("cpu", "highest") as (jax_device, torch_device):
                assert (jax_device.platform, torch_device.type) == ("cpu", "cpu")
                inside = _flags()
                assert (inside["jax"], inside["torch"], inside["cudnn"]) == ("highest", "highest", False)
                assert (inside["bf16"], inside["fp16"]) == (False, False)
                raise KeyError

        with pytest.raises(KeyError):
            fail_inside()
        assert _flags() == outside
        with precision.settings("cpu", "default"):
            assert _flags() == outside
    finally:
        torch.set_float32_matmul_precision(kept)


def test_settings_come_back_where_torchs_old_names_refuse() -> None:
    """Torch's two ways to say TF32 may disagree, and then the old one raises when it is read."""
    script = (
        "import torch\n"
        "from parity.precision import settings, manifest\n"
        "m, c = torch.backends.cuda.matmul, torch.backends.cudnn.conv\n"
        "m.fp32_precision, c.fp32_precision = 'tf32', 'ieee'\n"
        "with settings('cpu', 'highest'):\n"
        "    assert (m.fp32_precision, c.fp32_precision) != ('tf32', 'tf32'), (m.fp32_precision, c.fp32_precision)\n"
        "    assert m.fp32_precision != 'tf32'\n"
        "assert (m.fp32_precision, c.fp32_precision) == ('tf32', 'ieee'), (m.fp32_precision, c.fp32_precision)\n"
        "assert manifest()['torch']['tf32_matmul'] is True\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_manifest_is_plain_and_complete() -> None:
    seen = precision.manifest()
    assert json.loads(json.dumps(seen, allow_nan=False)) == seen
    assert set(precision.PACKAGES) | {"python", "parity"} == set(seen["versions"])
    assert seen["versions"]["numpy"] == np.__version__
    assert {"model", "cores", "usable_cores"} <= set(seen["cpu"])
    assert {"devices", "enable_x64", "default_matmul_precision"} <= set(seen["jax"])
    assert {"float32_matmul_precision", "tf32_matmul", "tf32_cudnn", "deterministic_algorithms", "threads"} <= set(
        seen["torch"]
    )
    assert seen["unit_roundoff"]["tf32"] == precision.unit_roundoff("tf32")


def _healthy() -> dict:
    """A manifest of a machine with nothing to say against it."""
    return {
        "versions": {name: "1.0" for name in precision.PACKAGES} | {n: low for n, (low, _) in precision.TESTED.items()},
        "environment": {},
        "jax": {"devices": ["gpu:0 H"], "enable_x64": False, "default_matmul_precision": "highest"},
        "torch": {
            "devices": ["cpu", "cuda:0 H"],
            "float32_matmul_precision": "highest",
            "tf32_matmul": False,
            "tf32_cudnn": False,
            "bf16_reduced_precision_reduction": False,
        },
    }


def test_doctor_has_nothing_to_say_against_health() -> None:
    assert precision.warnings(_healthy()) == []


@pytest.mark.parametrize(
    ("place", "value", "level", "word"),
    [
        ("versions.torch", None, "error", "torch is not installed"),
        ("versions.scipy", None, "error", "scipy is not installed"),
        ("versions.sentencepiece", None, "note", "sentencepiece is not installed"),
        ("versions.jax", "0.13.0", "warning", "jax 0.13.0 is outside the tested range"),
        ("versions.flax", "0.12.6", "warning", "flax 0.12.6 is outside"),
        ("versions.torch", "2.9.1+cu128", "warning", "torch 2.9.1"),
        ("jax.enable_x64", True, "warning", "jax_enable_x64"),
        ("jax.default_matmul_precision", "bfloat16", "warning", "jax_default_matmul_precision is 'bfloat16'"),
        ("jax.default_matmul_precision", None, "warning", "default precision of matrix products"),
        ("torch.tf32_matmul", True, "warning", "float32 products"),
        ("torch.float32_matmul_precision", "medium", "warning", "'medium'"),
        ("torch.tf32_cudnn", True, "warning", "cuDNN"),
        ("torch.bf16_reduced_precision_reduction", True, "note", "bfloat16"),
        ("environment.XLA_FLAGS", "--xla_cpu_enable_fast_math=true", "warning", "XLA_FLAGS"),
    ],
)
def test_doctor_finds(place: str, value: object, level: str, word: str) -> None:
    seen = _healthy()
    part, name = place.split(".")
    seen[part][name] = value
    (finding,) = precision.warnings(seen)
    assert finding.level == level
    assert word in finding.what
    assert finding.meaning
    assert finding.fix


def test_doctor_says_cpu_only_and_puts_errors_first() -> None:
    seen = _healthy()
    seen["jax"]["devices"], seen["torch"]["devices"] = ["cpu:0 cpu"], ["cpu"]
    seen["versions"]["optax"] = None
    levels = [finding.level for finding in precision.warnings(seen)]
    assert levels == ["error", "note"]
    assert "CPU only" in precision.warnings(seen)[1].what


def test_doctor_survives_a_broken_framework() -> None:
    seen = _healthy()
    seen["jax"] = {"broken": "ImportError: no"}
    assert precision.warnings(seen)[0].what.startswith("jax cannot be imported")


def test_tested_ranges_are_those_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, (low, high) in precision.TESTED.items():
        wanted = next(line for line in extras["jax"] + extras["torch"] if line.startswith(f"{name}>="))
        assert wanted in (f"{name}>={low},<{high}", f"{name}>={low}")


def test_versions_are_compared_as_numbers() -> None:
    assert precision._numbers("0.9.2") < precision._numbers("0.10") < precision._numbers("0.10.2rc1")
    assert precision._numbers("2.13.0+cpu") == (2, 13, 0)
    assert precision._numbers("dev") == ()
