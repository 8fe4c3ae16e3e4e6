"""What a run was computed with: precisions, devices, versions and flags; and what of that should worry you.

No framework is imported with this module: `parity doctor` must be able to say that one is missing.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from parity.errors import CannotLook, Misuse

__all__ = [
    "DEVICES",
    "MATMULS",
    "PRECISIONS",
    "TESTED",
    "TF32_ROUNDOFF",
    "Finding",
    "Precision",
    "device_names",
    "manifest",
    "one_of",
    "own_version",
    "precision",
    "resolve_device",
    "settings",
    "unit_roundoff",
    "warnings",
]

DEVICES = ("cpu", "cuda", "tpu")
MATMULS = ("default", "highest")
"""What matrix products may do: as the process has it, or nothing below the dtype of their operands."""

TESTED = {"jax": ("0.10", "0.13"), "flax": ("0.12.7", "0.13"), "torch": ("2.10", "3")}
"""Versions from (included) to (excluded), as pyproject.toml has them."""

TF32_ROUNDOFF = 2.0 ** -(10 + 1)
"""NVIDIA's TF32 keeps 10 fraction bits of each factor: u = 2^-(10 + 1), as for float16. No dtype, so no finfo."""

PACKAGES = ("numpy", "scipy", "jax", "jaxlib", "flax", "optax", "torch", "ml_dtypes", "safetensors", "sentencepiece")
VARIABLES = (
    "XLA_FLAGS",
    "JAX_PLATFORMS",
    "JAX_ENABLE_X64",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
)


@dataclass(frozen=True)
class Precision:
    """A floating-point format under the names that numpy, JAX and PyTorch have for it."""

    name: str

    @property
    def numpy(self) -> Any:
        """The numpy dtype; bfloat16 is ml_dtypes', which comes with JAX."""
        import numpy as np

        if self.name != "bfloat16":
            return np.dtype(self.name)
        try:
            import ml_dtypes
        except ImportError as error:
            raise CannotLook("bfloat16 needs the package ml_dtypes: pip install 'omni-parity[parity]'") from error
        return np.dtype(ml_dtypes.bfloat16)

    @property
    def jax(self) -> Any:
        import jax.numpy as jnp

        return getattr(jnp, self.name)

    @property
    def torch(self) -> Any:
        import torch

        return getattr(torch, self.name)

    @property
    def unit_roundoff(self) -> float:
        """Half the gap between 1 and the next number, from finfo."""
        dtype = self.numpy
        if self.name == "bfloat16":
            import ml_dtypes

            return float(ml_dtypes.finfo(dtype).eps) / 2
        import numpy as np

        return float(np.finfo(dtype).eps) / 2


PRECISIONS = {name: Precision(name) for name in ("float64", "float32", "bfloat16", "float16")}


def one_of(what: str, value: str, known: tuple[str, ...]) -> str:
    """`value` if it is known; else a `Misuse` that names the nearest and lists all."""
    if value in known:
        return value
    near = difflib.get_close_matches(value, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise Misuse(f"{what}: {value!r} is not known{hint} (known: {', '.join(known)})")


def precision(name: str) -> Precision:
    return PRECISIONS[one_of("precision", name, tuple(PRECISIONS))]


def unit_roundoff(name: str) -> float:
    """u of a format by its name; also "tf32", which is no dtype."""
    return TF32_ROUNDOFF if name == "tf32" else precision(name).unit_roundoff


# --- devices ---------------------------------------------------------------------------------------------------------


def resolve_device(name: str) -> tuple[Any, Any]:
    """(jax device, torch device) of "cpu", "cuda" or "tpu"; `CannotLook` says what is missing and what to do.

    On "tpu" the torch side stays on the CPU, unless torch_xla is installed.
    """
    one_of("device", name, DEVICES)
    _need("jax", "torch")
    import torch

    if name == "cpu":
        return _jax_devices("cpu")[0], torch.device("cpu")
    if name == "cuda":
        missing, found = [], _jax_devices("cuda")
        if not found:
            missing.append(
                f"JAX sees no CUDA GPU (jaxlib {_version('jaxlib')} sees: {_jax_platforms()}); install "
                "'omni-parity[cuda13]' or 'omni-parity[cuda12]', whichever fits the driver"
            )
        if not torch.cuda.is_available():
            missing.append(
                f"PyTorch sees no CUDA GPU (torch {torch.__version__}, built for CUDA: {torch.version.cuda or 'no'}); "
                "install a CUDA build of torch and a driver that it can use"
            )
        if missing:
            raise CannotLook(f"device cuda: {'; '.join(missing)}. Or run with --device cpu")
        return found[0], torch.device("cuda", 0)
    found = _jax_devices("tpu")
    if not found:
        raise CannotLook(
            f"device tpu: JAX sees no TPU (jaxlib {_version('jaxlib')} sees: {_jax_platforms()}); run on a TPU machine "
            "with 'omni-parity[tpu]' installed, or with --device cpu"
        )
    if importlib.util.find_spec("torch_xla") is not None:
        import torch_xla  # pyright: ignore[reportMissingImports]

        return found[0], torch_xla.device()
    return found[0], torch.device("cpu")


def device_names(name: str) -> list[str]:
    """What the two sides run on, for people; plain ["cpu"] when no side leaves the CPU."""
    jax_device, torch_device = resolve_device(name)
    if name == "cpu":
        return ["cpu"]
    import torch

    kind = torch.cuda.get_device_name(torch_device) if torch_device.type == "cuda" else "CPU"
    return [
        f"jax on {jax_device.platform}:{jax_device.id} ({jax_device.device_kind})",
        f"torch on {torch_device} ({kind})",
        "float64 reference on cpu",
    ]


@contextlib.contextmanager
def settings(device: str, matmul: str = "default") -> Iterator[tuple[Any, Any]]:
    """Inside, matrix products of both frameworks are as `matmul` says; the old settings come back, whatever happens.

    "default" leaves the process's own settings; "highest" asks JAX for the highest precision and turns off, in torch,
    TF32 (products, cuDNN) and sums in less than float32 over bfloat16 and float16. Yields `resolve_device(device)`.
    """
    one_of("matmul", matmul, MATMULS)
    devices = resolve_device(device)
    if matmul == "default":
        yield devices
        return
    import jax
    import torch

    restore = _torch_restorer(torch)
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        with jax.default_matmul_precision("highest"):
            yield devices
    finally:
        restore()


def _torch_restorer(torch: Any) -> Callable[[], None]:
    """Torch keeps each flag twice (allow_tf32, fp32_precision); its old names raise when the two disagree.

    So the old names are read if they can be, and both are put back, the old ones first.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    new = [(matmul, "fp32_precision"), (cudnn.conv, "fp32_precision"), (cudnn.rnn, "fp32_precision")]
    new += [(torch.backends.mkldnn.matmul, "fp32_precision")] if hasattr(torch.backends.mkldnn, "matmul") else []
    flags = [(matmul, f"allow_{kind}_reduced_precision_reduction") for kind in ("bf16", "fp16")]
    kept = [(owner, name, getattr(owner, name)) for owner, name in [*flags, *new] if hasattr(owner, name)]
    old_matmul = _read(torch.get_float32_matmul_precision)
    old_cudnn = _read(lambda: cudnn.allow_tf32)

    def restore() -> None:
        if old_matmul in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(old_matmul)
        if isinstance(old_cudnn, bool):
            cudnn.allow_tf32 = old_cudnn
        for owner, name, value in kept:
            setattr(owner, name, value)

    return restore


# --- the manifest ----------------------------------------------------------------------------------------------------


def manifest() -> dict[str, Any]:
    """Everything that could explain a figure: versions, machine, devices, flags. Plain JSON types only."""
    return {
        "versions": {"python": platform.python_version(), "parity": own_version()}
        | {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "jax": _jax_manifest(),
        "torch": _torch_manifest(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "unit_roundoff": {name: _read(lambda name=name: unit_roundoff(name)) for name in (*PRECISIONS, "tf32")},
    }


def _cpu() -> dict[str, Any]:
    model = platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"model": model, "machine": platform.machine(), "cores": os.cpu_count(), "usable_cores": usable}


def _jax_manifest() -> dict[str, Any] | None:
    if not _installed("jax"):
        return None
    try:
        import jax
    except Exception as error:
        return {"broken": f"{type(error).__name__}: {error}"}
    return {
        "devices": [f"{d.platform}:{d.id} {d.device_kind}" for d in _jax_devices(None)],
        "enable_x64": _read(lambda: bool(jax.config.jax_enable_x64)),  # pyright: ignore[reportAttributeAccessIssue]
        "default_matmul_precision": _read(lambda: jax.config.jax_default_matmul_precision),  # pyright: ignore[reportAttributeAccessIssue]
    }


def _torch_manifest() -> dict[str, Any] | None:
    if not _installed("torch"):
        return None
    try:
        import torch
    except Exception as error:
        return {"broken": f"{type(error).__name__}: {error}"}
    cuda = torch.backends.cuda
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "devices": ["cpu"] + [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(count)],
        "cuda": torch.version.cuda,
        "cudnn": _read(torch.backends.cudnn.version),
        "float32_matmul_precision": _read(torch.get_float32_matmul_precision),
        "tf32_matmul": _tf32(torch, "matmul"),
        "tf32_cudnn": _tf32(torch, "cudnn"),
        "bf16_reduced_precision_reduction": _read(lambda: bool(cuda.matmul.allow_bf16_reduced_precision_reduction)),
        "fp16_reduced_precision_reduction": _read(lambda: bool(cuda.matmul.allow_fp16_reduced_precision_reduction)),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": _read(lambda: bool(torch.backends.cudnn.deterministic)),
        "cudnn_benchmark": _read(lambda: bool(torch.backends.cudnn.benchmark)),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
    }


def _tf32(torch: Any, part: str) -> bool:
    """Is TF32 on? By the newer flag where the older one refuses to be read."""
    backend = torch.backends.cuda.matmul if part == "matmul" else torch.backends.cudnn
    old = _read(lambda: backend.allow_tf32)
    if isinstance(old, bool):
        return old
    newer = backend if part == "matmul" else backend.conv
    return getattr(newer, "fp32_precision", "") == "tf32"


# --- doctor ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One thing that `parity doctor` noticed. Levels: "error" (no run is possible), "warning", "note"."""

    level: str
    what: str
    meaning: str
    fix: str


def warnings(manifest_: dict[str, Any] | None = None) -> list[Finding]:
    """What about this machine and these settings would spoil, limit or change a run; errors first."""
    seen = manifest() if manifest_ is None else manifest_
    found = [*_missing(seen["versions"]), *_range(seen["versions"]), *_jax_findings(seen), *_torch_findings(seen)]
    if seen["jax"] and seen["torch"] and not _accelerated(seen):
        found.append(
            Finding(
                "note",
                "both frameworks see the CPU only",
                "a green run says nothing about GPU or TPU kernels; reports say 'CPU only'",
                "pip install 'omni-parity[cuda13]' (or [cuda12], [tpu]), then --device cuda (or tpu)",
            )
        )
    return sorted(found, key=lambda finding: ("error", "warning", "note").index(finding.level))


def _missing(versions: dict[str, Any]) -> Iterator[Finding]:
    needed = {"jax": "[jax]", "flax": "[jax]", "optax": "[jax]", "torch": "[torch]", "scipy": "[parity]"}
    for name, extra in needed.items():
        if versions.get(name) is None:
            yield Finding(
                "error",
                f"{name} is not installed",
                "`parity run` needs both frameworks; `parity list` and `parity explain` work without",
                f"pip install 'omni-parity[parity]' (the extra {extra} alone brings {name})",
            )
    for name, use in {"safetensors": ".safetensors checkpoints", "sentencepiece": "--text and tokenizers"}.items():
        if versions.get(name) is None:
            yield Finding("note", f"{name} is not installed", f"needed for {use}", f"pip install {name}")


def _range(versions: dict[str, Any]) -> Iterator[Finding]:
    for name, (low, high) in TESTED.items():
        version = versions.get(name)
        if version is not None and not _numbers(low) <= _numbers(version) < _numbers(high):
            yield Finding(
                "warning",
                f"{name} {version} is outside the tested range",
                f"tested from {low} up to, not including, {high}: a primitive may be new, a default may have moved",
                f"pip install -c constraints.txt '{name}>={low},<{high}'",
            )


def _jax_findings(seen: dict[str, Any]) -> Iterator[Finding]:
    jax = seen["jax"]
    if not jax:
        return
    if "broken" in jax:
        yield Finding("error", f"jax cannot be imported: {jax['broken']}", "no run is possible", "reinstall jax")
        return
    if jax["enable_x64"] is True:
        yield Finding(
            "warning",
            "jax_enable_x64 is set for the whole process",
            "functions under test may run in float64 where their users run float32; parity sets x64 where it needs it",
            "unset JAX_ENABLE_X64 (or the jax.config.update that sets it)",
        )
    if jax["default_matmul_precision"] not in (None, "highest", "float32"):
        yield Finding(
            "warning",
            f"jax_default_matmul_precision is {jax['default_matmul_precision']!r}",
            "matrix products may round their factors below float32",
            "run with --matmul highest, or unset JAX_DEFAULT_MATMUL_PRECISION",
        )
    if jax["default_matmul_precision"] is None and any(not d.startswith("cpu") for d in jax["devices"]):
        yield Finding(
            "warning",
            "JAX's default precision of matrix products is in force on an accelerator",
            f"on recent NVIDIA GPUs that is TF32 (u = {TF32_ROUNDOFF:.3g}), on TPUs bfloat16: float32 results DIFFER",
            "run with --matmul highest to compare in full float32; without it the report shows what the default costs",
        )
    if "fast" in seen["environment"].get("XLA_FLAGS", ""):
        yield Finding(
            "warning",
            f"XLA_FLAGS is {seen['environment']['XLA_FLAGS']!r}",
            "fast-math flags let XLA reorder and approximate beyond what the noise model allows",
            "unset XLA_FLAGS",
        )


def _torch_findings(seen: dict[str, Any]) -> Iterator[Finding]:
    torch = seen["torch"]
    if not torch:
        return
    if "broken" in torch:
        yield Finding("error", f"torch cannot be imported: {torch['broken']}", "no run is possible", "reinstall torch")
        return
    cuda = len(torch["devices"]) > 1
    if torch["tf32_matmul"] or torch["float32_matmul_precision"] in ("high", "medium"):
        yield Finding(
            "warning",
            f"torch may round the factors of float32 products (precision {torch['float32_matmul_precision']!r})",
            f"u = {TF32_ROUNDOFF:.3g} (TF32) or coarser instead of 2^-24: float32 results may DIFFER",
            "run with --matmul highest, or torch.set_float32_matmul_precision('highest')",
        )
    if cuda and torch["tf32_cudnn"]:
        yield Finding(
            "warning",
            "TF32 is on for cuDNN (torch's own default)",
            "float32 convolutions round their factors to TF32",
            "run with --matmul highest, or torch.backends.cudnn.allow_tf32 = False",
        )
    if cuda and torch["bf16_reduced_precision_reduction"] is True:
        yield Finding(
            "note",
            "torch may sum bfloat16 products in bfloat16 (torch's own default)",
            "split sums may carry more noise than sums in float32",
            "run with --matmul highest, or allow_bf16_reduced_precision_reduction = False",
        )


# --- small helpers ---------------------------------------------------------------------------------------------------


def _accelerated(seen: dict[str, Any]) -> bool:
    names = [*seen["jax"].get("devices", []), *seen["torch"].get("devices", [])]
    return any(not name.startswith("cpu") for name in names)


def _read(reader: Callable[[], Any]) -> Any:
    """A flag that a build does not have, or refuses to tell, must not end the run that wants to report it."""
    try:
        return reader()
    except Exception as error:
        return f"unreadable: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def _need(*names: str) -> None:
    missing = [name for name in names if not _installed(name)]
    if missing:
        raise CannotLook(
            f"{' and '.join(missing)} not installed: pip install 'omni-parity[parity]' (see `parity doctor`)"
        )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # blocked, or a stub without a spec
        return name in sys.modules


def _version(name: str) -> str | None:
    if not _installed(name):
        return None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def own_version() -> str:
    """The version of omni-parity, or words for a source tree that was never installed."""
    try:
        return importlib.metadata.version("omni-parity")
    except importlib.metadata.PackageNotFoundError:
        return "not installed (run from a source tree)"


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" -> (2, 13, 0); compared piece by piece."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(piece) for piece in match.group().split(".")) if match else ()


def _jax_devices(kind: str | None) -> list[Any]:
    import jax

    try:
        return list(jax.devices(kind)) if kind else list(jax.devices())
    except RuntimeError:
        return []


def _jax_platforms() -> str:
    return ", ".join(sorted({device.platform for device in _jax_devices(None)})) or "nothing"
