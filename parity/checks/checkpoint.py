"""Both twins' checkpoints against torch's own files: names, layouts, bits, and what must be refused."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from parity.checks import Progress, Scope
from parity.result import CheckResult, Control, Row
from parity.verdict import Verdict

__all__ = ["BLIND", "CLAIM", "CONTROLS", "run"]

CLAIM = (
    "Both twins read a file that torch.save wrote, fill a model with exactly its bits, each tensor in its place and "
    "layout, and write files that torch and safetensors read back to the same bits; what is missing, too much, not "
    "finite or damaged is refused, and the model stays as it was."
)
BLIND = (
    "Files and folders of other kinds (optimizer states, parts beside the model, the choice of a file in a folder): "
    "tests/jax and tests/torch look at those. Models beyond two layers."
)
CONTROLS = {
    "not transposed": "square weights the other way round",
    "layers exchanged": "the tensors of one layer in the other's place",
    "rounded": "tensors rounded to bfloat16",
    "a key lost": "the last norm's scale left out",
    "q, k, v in another order": "the rows of the fused projection as q, v, k",
}

SIZE = {"vocab_size": 11, "n_layers": 2, "d_model": 16, "n_heads": 4, "d_ff": 16, "dropout": 0.0, "ctx_len": 8}
"""Square wherever it may be: a weight that is not transposed keeps its shape."""
KINDS: dict[str, dict[str, Any]] = {
    "fused": {},
    "grouped, experts": {"use_gqa": True, "kv_groups": 2, "use_moe": True, "num_experts": 2},
}


def run(scope: Scope, progress: Progress) -> CheckResult:
    """A row for each twin, kind of model and question."""
    started = time.perf_counter()
    result = CheckResult("checkpoint")
    with tempfile.TemporaryDirectory() as folder:
        for done, side in enumerate(("jax", "torch")):
            progress(done, 2, side)
            for name, (gave, wanted) in _answers(side, Path(folder)).items():
                wrong = _apart(gave, wanted)
                verdict = Verdict.DIFFER if wrong else Verdict.AGREE
                result.rows.append(Row("checkpoint", "", "", "", f"{name} ({side})", verdict, wrong or "equal bits"))
    if scope.controls:
        right = _weights({})
        for name, wrong in _wrongs(right).items():
            words = _apart(wrong, right)
            result.controls.append(Control(name, bool(words), words or "passed for equal bits"))
    progress(1, 1, "")
    result.seconds = time.perf_counter() - started
    return result


def _answers(side: str, folder: Path) -> dict[str, tuple[Any, Any]]:
    import torch

    import omni_jax
    import omni_torch

    api: Any = {"jax": omni_jax, "torch": omni_torch}[side]
    found: dict[str, tuple[Any, Any]] = {}
    models: dict[str, Any] = {}
    for kind, more in KINDS.items():
        truth = _weights(more)
        tensors = {k: torch.from_numpy(v) for k, v in truth.items()}
        path = folder / f"{kind}.pt"
        torch.save({"model": {f"_orig_mod.{k}": v for k, v in tensors.items()}, "step": 7, "best_val_loss": 1.25}, path)
        held = api.load_checkpoint(path)
        found[f"{kind}: read"] = _plain(held.model), truth
        found[f"{kind}: step"] = (held.step, held.best_val_loss), (7, 1.25)
        model = models[kind] = api.load_weights(_model(side, more), held)
        found[f"{kind}: loaded"] = _plain(api.export_weights(model)), truth
        found[f"{kind}: in place"] = _leaves(side, model), truth
        for suffix in (".pt", ".safetensors"):
            written = folder / f"{kind}-{side}{suffix}"
            api.save_checkpoint(written, model=model, step=7)
            found[f"{kind}: written {suffix}"] = _read(written), truth
        short = {k: v for k, v in held.model.items() if k != "norm.weight"}
        load: Callable[[Any], Any] = lambda state, model=model: api.load_weights(model, state)  # noqa: E731
        found[f"{kind}: a key is missing"] = _refused(load, short), True
        found[f"{kind}: a key too many"] = _refused(load, {**held.model, "phantom": held.model["norm.weight"]}), True
        spoilt = {**{k: 0 * v for k, v in held.model.items()}, "norm.weight": held.model["norm.weight"] * np.nan}
        found[f"{kind}: NaN"] = _refused(load, spoilt), True
        found[f"{kind}: unchanged by what was refused"] = _leaves(side, model), truth
    # Into a model that holds something else: zeros.
    fused = api.load_weights(models["fused"], {k: 0 * v for k, v in api.export_weights(models["fused"]).items()})
    apart = _weights({})
    for name in list(apart):
        if name.endswith("qkv.weight"):
            whole = apart.pop(name)
            apart |= {name.replace("qkv", part): rows for part, rows in zip("qkv", np.split(whole, 3))}
    path = folder / "apart.pt"
    torch.save({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in apart.items()}, path)
    joined = api.load_weights(fused, api.load_checkpoint(path))
    found["q, k and v joined"] = _plain(api.export_weights(joined)), _weights({})
    held = api.load_checkpoint(_odd(folder))
    found["odd types"] = {k: str(v.dtype).removeprefix("torch.") for k, v in held.model.items()}, _TYPES
    damaged = folder / f"damaged-{side}.safetensors"
    raw = bytearray((folder / f"fused-{side}.safetensors").read_bytes())
    raw[-5] ^= 16
    damaged.write_bytes(bytes(raw))
    found["a flipped bit"] = _refused(api.load_checkpoint, damaged), True
    return found


_TYPES = {"bf16.weight": "bfloat16", "f16.weight": "float16", "f32.weight": "float32"}


def _odd(folder: Path) -> Path:
    import torch

    path = folder / "odd.pt"
    torch.save({k: torch.ones(2, 3, dtype=getattr(torch, name)) for k, name in _TYPES.items()}, path)
    return path


def _weights(more: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every tensor another: no two layers are alike, no scale is 1."""
    import omni_torch

    rng = np.random.default_rng(3)
    state = omni_torch.ThinkerLM(**SIZE, **more).state_dict()
    return {k: rng.standard_normal(tuple(v.shape)).astype(np.float32) for k, v in state.items()}


def _model(side: str, more: dict[str, Any]) -> Any:
    import omni_jax
    import omni_torch

    if side == "torch":
        return omni_torch.ThinkerLM(**SIZE, **more)
    return omni_jax.ThinkerLM.from_config(omni_jax.ThinkerConfig(**SIZE, **more))


def _leaves(side: str, model: Any) -> dict[str, np.ndarray]:
    """What the model itself holds, by this file's own reading of the layouts."""
    if side == "torch":
        return {k: v.detach().numpy().copy() for k, v in model.named_parameters()}
    from flax import nnx

    names, found = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}, {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = np.asarray(variable.get_value())
        key = ".".join([*map(str, path[:-1]), names[str(path[-1])]])
        found[key] = value.T if path[-1] == "kernel" else value
    return found


def _read(path: Path) -> dict[str, np.ndarray]:
    import torch
    from safetensors.numpy import load_file

    if path.suffix == ".safetensors":
        return load_file(path)
    held = torch.load(path, weights_only=True)
    return {k: v.numpy() for k, v in held["model"].items()}


def _plain(state: Any) -> dict[str, np.ndarray]:
    return {k: v.detach().numpy().copy() if hasattr(v, "detach") else np.array(v) for k, v in state.items()}


def _refused(load: Callable[[Any], Any], what: Any) -> bool:
    try:
        load(what)
    except ValueError:
        return True
    return False


def _apart(gave: Any, wanted: Any) -> str:
    if not isinstance(wanted, dict) or any(isinstance(x, str) for x in wanted.values()):
        return "" if gave == wanted else f"{gave!r:.200} for {wanted!r:.200}"
    if gave.keys() != wanted.keys():
        return f"other names: {', '.join(sorted(gave.keys() ^ wanted.keys()))[:200]}"
    bad = [
        k for k, x in wanted.items() if gave[k].shape != x.shape or gave[k].dtype != x.dtype or not (gave[k] == x).all()
    ]
    return f"other bits in {len(bad)} of {len(wanted)} tensors, first {bad[0]}" if bad else ""


# ------------------------------------------------------------------------------------------------ controls


def _wrongs(right: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """What CONTROLS names, made of the right tensors."""
    import ml_dtypes

    def other_layer(name: str) -> str:
        return (
            name.replace("blocks.0.", "blocks.x.").replace("blocks.1.", "blocks.0.").replace("blocks.x.", "blocks.1.")
        )

    def reordered(rows: np.ndarray) -> np.ndarray:
        q, k, v = np.split(rows, 3)
        return np.concatenate([q, v, k])

    square = {k: x.ndim == 2 and x.shape[0] == x.shape[1] for k, x in right.items()}
    return {
        "not transposed": {k: x.T if square[k] else x for k, x in right.items()},
        "layers exchanged": {k: right[other_layer(k)] for k in right},
        "rounded": {k: x.astype(ml_dtypes.bfloat16).astype(x.dtype) for k, x in right.items()},
        "a key lost": {k: x for k, x in right.items() if k != "norm.weight"},
        "q, k, v in another order": {k: reordered(x) if k.endswith("qkv.weight") else x for k, x in right.items()},
    }
