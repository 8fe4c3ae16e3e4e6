"""Each twin in a real bare environment, without the other's framework: what `make isolation` runs.

Builds the wheel, installs it three times under .venvs/ (with the extra jax, with the extra torch, with none) by
constraints.txt, and runs a probe in each from an empty folder, so that nothing is imported from the source tree.
The environments are reused as long as pyproject.toml and constraints.txt stay; the wheel is built anew every time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ROOMS = ROOT / ".venvs"
FOREIGN = {
    "jax": ["torch"],
    "torch": ["jax", "jaxlib", "flax", "optax"],
    "none": ["jax", "jaxlib", "flax", "optax", "torch"],
}

PROBE = """
import importlib, importlib.util, json, pkgutil, sys
from importlib.resources import files
from pathlib import Path

kind, foreign, root = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
for name in foreign:
    assert importlib.util.find_spec(name) is None, f"{name} is importable: this environment is not bare"

if kind == "none":
    import parity.checks
    from parity.cli import main
    for arguments in (["list"], ["explain", parity.checks.CHECKS[0]], ["doctor"], ["run"]):
        sys.argv = ["parity", *arguments]
        try:
            main()
        except SystemExit as end:
            wanted = 0 if arguments[0] in ("list", "explain") else 3
            assert end.code == wanted, f"parity {' '.join(arguments)}: exit code {end.code} instead of {wanted}"
    print("ok: parity list, explain, doctor, run without a framework")
    sys.exit()

twin = importlib.import_module(f"omni_{kind}")
home = str(Path(twin.__path__[0]).resolve())
assert not home.startswith(root + "/omni_"), f"imported from the source: {home}"
modules = [module.name for module in pkgutil.walk_packages(twin.__path__, twin.__name__ + ".")]
for name in modules:
    if not name.endswith("__main__"):
        importlib.import_module(name)
loaded = [name for name in foreign + ["parity"] if name in sys.modules]
assert not loaded, f"omni_{kind} imported {loaded}"

import numpy as np
from importlib import import_module
ThinkerConfig = import_module(f"omni_{kind}.config").ThinkerConfig
ThinkerLM = import_module(f"omni_{kind}.thinker").ThinkerLM
checkpoint = import_module(f"omni_{kind}.checkpoint")

assets = files("parity") / "assets"
shipped = assets / "thinker.pt"
configs = [entry for entry in assets.iterdir() if entry.name.endswith("config.json")]
if shipped.is_file() and configs:
    config = ThinkerConfig.from_json(str(configs[0]))
else:
    config = ThinkerConfig(vocab_size=11, n_layers=1, d_model=8, n_heads=2, d_ff=16, dropout=0.0, ctx_len=16)
tokens = np.array([[1, 3, 4, 5, 6]])
if kind == "jax":
    from flax import nnx
    import jax.numpy as jnp
    model = ThinkerLM.from_config(config, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(tokens)
else:
    import torch
    model = ThinkerLM.from_config(config).eval()
    tokens = torch.from_numpy(tokens)
if shipped.is_file():
    state = checkpoint.load_checkpoint(str(shipped))
    assert state.kind == "full", state.kind
    if configs:
        model = checkpoint.load_weights(model, state.model)
logits = model(tokens)
logits = logits.detach().numpy() if kind == "torch" else np.asarray(logits)
assert logits.shape == (1, 5, config.vocab_size) and np.isfinite(logits).all(), logits.shape
loaded = [name for name in foreign if name in sys.modules]
assert not loaded, f"omni_{kind} imported {loaded}"
what = "with the shipped weights" if shipped.is_file() and configs else "with fresh weights"
print(f"ok: omni_{kind}: {len(modules)} modules and a forward pass {what}, without {', '.join(foreign)}")
"""


def run(*command: str | Path, **options) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)


def build_wheel() -> Path:
    """The wheel, from a copy of what is packed: no build leftovers come into the tree."""
    out = ROOMS / "wheel"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("omni_jax", "omni_torch", "parity"):
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, folder)
    (wheel,) = out.glob("*.whl")
    return wheel


def bare_environment(kind: str, wheel: Path) -> Path:
    """An environment with this wheel and one extra; its dependencies are kept while their declaration stays."""
    room = ROOMS / kind
    python, stamp = room / "bin" / "python", room / ".installed"
    declared = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    digest = hashlib.sha256(declared).hexdigest()
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    if not stamp.exists() or stamp.read_text() != digest:
        print(f"isolation: installing .venvs/{kind} (once; a few minutes)", flush=True)
        shutil.rmtree(room, ignore_errors=True)
        run(sys.executable, "-m", "venv", "--without-pip", room)
        extra = "" if kind == "none" else f"[{kind}]"
        run(*pip, "install", "--quiet", "-c", ROOT / "constraints.txt", f"{wheel}{extra}")
        stamp.write_text(digest)
    else:
        run(*pip, "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
    return python


def main() -> int:
    import json

    ROOMS.mkdir(exist_ok=True)
    wheel = build_wheel()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    failed = []
    for kind, foreign in FOREIGN.items():
        python = bare_environment(kind, wheel)
        with tempfile.TemporaryDirectory() as folder:
            ended = subprocess.run(
                [str(python), "-c", PROBE, kind, json.dumps(foreign), str(ROOT)], cwd=folder, env=environment
            )
        if ended.returncode != 0:
            failed.append(kind)
            print(f"isolation: the environment {kind!r} failed", file=sys.stderr)
    print("isolation: " + (f"failed in {', '.join(failed)}" if failed else "all three environments are right"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
