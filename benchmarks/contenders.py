"""The contenders of generate.py: each in a process of its own, on one core with one thread, serving a job per line.

A worker is started as `python contenders.py NAME FOLDER`, mel.py's as `python mel.py NAME FOLDER`; it answers the jobs
that come on stdin with JSON lines.
Nothing of a job's preparation is timed; every job runs once before the first round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CONTENDERS = ("hf", "omni_torch", "omni_jax", "gemv")
MODEL = {
    "vocab_size": 32000,
    "n_layers": 4,
    "d_model": 256,
    "n_heads": 4,
    "d_ff": 1024,
    "dropout": 0.0,
    "rope_theta": 10000.0,
    "ctx_len": 512,
    "use_gqa": True,
    "kv_groups": 2,
    "use_swiglu": True,
}
ONE_THREAD = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
ROOT = Path(__file__).resolve().parent.parent
Job = Callable[[], list[list[int]]]
Maker = Callable[[str, int, int, int], Job]


def write_weights(folder: Path) -> None:
    """The model's weights and config, drawn as a new torch model's are, for all contenders to load."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    D, F, V = MODEL["d_model"], MODEL["d_ff"], MODEL["vocab_size"]
    kv = D // MODEL["n_heads"] * MODEL["kv_groups"]
    shapes: dict[str, tuple[int, ...]] = {"norm.weight": (D,), "tok_emb.weight": (V, D), "lm_head.weight": (V, D)}
    for i in range(MODEL["n_layers"]):
        block = {"norm1": (D,), "norm2": (D,), "attn.q": (D, D), "attn.k": (kv, D), "attn.v": (kv, D), "attn.o": (D, D)}
        block |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
        shapes |= {f"blocks.{i}.{name}.weight": shape for name, shape in block.items()}
    arrays = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            x = np.ones(shape)
        elif name == "tok_emb.weight":
            x = rng.standard_normal(shape)
        else:
            x = rng.uniform(-1, 1, shape) / np.sqrt(shape[1])
        arrays[name] = x.astype(np.float32)
    save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(MODEL))


def bytes_per_token(folder: Path) -> int:
    """What decoding one token must read: every weight but the embedding table, of which it takes one row."""
    from safetensors.numpy import load_file

    return sum(x.nbytes for name, x in load_file(folder / "model.safetensors").items() if name != "tok_emb.weight")


def prompts(rows: int, length: int) -> list[list[int]]:
    """The same random ids for every contender."""
    return np.random.default_rng(1).integers(3, MODEL["vocab_size"], (rows, length)).tolist()


class Worker:
    """A contender's process."""

    def __init__(self, name: str, folder: Path, core: int, script: str = __file__) -> None:
        environment = os.environ | ONE_THREAD | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(Path(script).resolve()), name, str(folder)]
        self.name = name
        self._process = subprocess.Popen(
            command,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=lambda: pin_to(core),
        )
        self._answer()

    def run(self, *job: str | int) -> dict[str, Any]:
        """One round: wall and CPU seconds, and what was made (ids, or mel.py's error)."""
        assert self._process.stdin is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker {self.name} ended with exit code {self._process.wait()}")
        return json.loads(line)


def pin_to(core: int) -> None:
    """This process on one core, where the system can do that (Linux)."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


def serve(make: Callable[..., Callable[[], Any]], told: Callable[[Any], Any] = lambda made: made) -> None:
    """Answer jobs until stdin ends; `told` makes JSON of a result, when the clocks have stopped."""
    ready: dict[tuple[Any, ...], Callable[[], Any]] = {}
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        key = tuple(json.loads(line))
        if key not in ready:
            ready[key] = make(*key)
            ready[key]()
        cpu, wall = time.process_time(), time.perf_counter()
        made = ready[key]()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"wall": wall, "cpu": cpu, "made": told(made)}), flush=True)


def hf(folder: Path) -> Maker:
    """transformers' LlamaForCausalLM of the same shape, with the same weights."""
    import torch
    import transformers
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        vocab_size=MODEL["vocab_size"],
        hidden_size=MODEL["d_model"],
        intermediate_size=MODEL["d_ff"],
        num_hidden_layers=MODEL["n_layers"],
        num_attention_heads=MODEL["n_heads"],
        num_key_value_heads=MODEL["kv_groups"],
        max_position_embeddings=MODEL["ctx_len"],
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": MODEL["rope_theta"]},
        pad_token_id=0,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    model: Any = transformers.LlamaForCausalLM(config).eval()  # in float32, torch's default
    theirs = {
        "tok_emb": "model.embed_tokens",
        "blocks": "model.layers",
        "norm.": "model.norm.",
        "norm1": "input_layernorm",
        "norm2": "post_attention_layernorm",
    }
    theirs |= {f"attn.{part}": f"self_attn.{part}_proj" for part in "qkvo"}
    state = {}
    for name, value in load_file(folder / "model.safetensors").items():
        for ours, name_there in theirs.items():
            if name.startswith(ours) or (ours not in ("norm.",) and f".{ours}." in name):
                name = name.replace(ours, name_there, 1)
        state[name] = value
    model.load_state_dict(state)

    def make(job: str, rows: int, length: int, new: int) -> Job:
        tokens = torch.tensor(prompts(rows, length))
        mask = torch.ones_like(tokens)

        @torch.inference_mode()
        def prefill() -> list[list[int]]:
            return model(tokens, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True).tolist()

        def decode() -> list[list[int]]:
            made = model.generate(tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None)
            return made[:, length:].tolist()

        return prefill if job == "prefill" else decode

    return make


def omni_torch(folder: Path) -> Maker:
    """The PyTorch twin, eager."""
    import torch

    from omni_torch import ThinkerLM, generate, init_cache

    torch.set_num_threads(1)
    model = ThinkerLM.from_checkpoint(folder / "model.safetensors")

    def make(job: str, rows: int, length: int, new: int) -> Job:
        ids = prompts(rows, length)
        tokens = torch.tensor(ids)

        @torch.inference_mode()
        def prefill() -> list[list[int]]:
            logits, _ = model(tokens, cache=init_cache(model, rows), last_only=True)
            return logits[:, -1].argmax(-1, keepdim=True).tolist()

        return prefill if job == "prefill" else lambda: generate(model, ids, new, eos_id=None).tokens

    return make


def omni_jax(folder: Path) -> Maker:
    """The JAX twin."""
    import jax
    from flax import nnx

    from omni_jax import ThinkerLM, generate, init_cache

    model = ThinkerLM.from_checkpoint(folder / "model.safetensors")
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: Any, tokens: Any) -> Any:
        model = nnx.merge(graphdef, state)
        logits, cache = model(tokens, cache=init_cache(model, tokens.shape[0]), last_only=True)
        return logits[:, -1].argmax(-1, keepdims=True), cache

    def make(job: str, rows: int, length: int, new: int) -> Job:
        ids = prompts(rows, length)
        tokens = np.array(ids, np.int32)
        if job == "prefill":
            return lambda: jax.block_until_ready(run(state, tokens))[0].tolist()
        return lambda: generate(model, ids, new, eos_id=None).tokens

    return make


def gemv(folder: Path) -> Maker:
    """No contender: how long the weights alone take from memory, as one matrix times a vector per token."""
    import torch

    torch.set_num_threads(1)
    D = MODEL["d_model"]
    matrix = np.ones((bytes_per_token(folder) // (4 * D), D), np.float32)
    row, column = np.ones(len(matrix), np.float32), np.ones(D, np.float32)
    turned = np.ones((D, len(matrix)), np.float32)
    there, row_there, column_there = map(torch.from_numpy, (matrix, row, column))
    # Which library and layout streams fastest differs from machine to machine: the fastest is the probe.
    ways: list[Callable[[], Any]] = [
        lambda: matrix @ column,
        lambda: row @ matrix,
        lambda: column @ turned,
        lambda: torch.mv(there, column_there),
        lambda: torch.mv(there.t(), row_there),
    ]

    def seconds(way: Callable[[], Any]) -> float:
        start = time.process_time()
        way()
        return time.process_time() - start

    fastest = min(ways, key=lambda way: min(seconds(way) for _ in range(10)))

    def make(job: str, rows: int, length: int, new: int) -> Job:
        def stream() -> list[list[int]]:
            for _ in range(new):
                fastest()
            return []

        return stream

    return make


MAKERS = {"hf": hf, "omni_torch": omni_torch, "omni_jax": omni_jax, "gemv": gemv}

if __name__ == "__main__":
    serve(MAKERS[sys.argv[1]](Path(sys.argv[2])))
