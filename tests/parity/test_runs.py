"""`parity run` end to end on what users hand it by mistake: one clear message, exit code 2 or 3, nothing that passes.

Nothing is stubbed here. The runs share this process where they can, since importing both frameworks takes seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

torch = pytest.importorskip("torch")
pytest.importorskip("jax")

from omni_torch.checkpoint import save_checkpoint  # noqa: E402
from omni_torch.config import ThinkerConfig  # noqa: E402
from omni_torch.thinker import ThinkerLM  # noqa: E402
from parity.cli import app  # noqa: E402
from parity.errors import CannotLook  # noqa: E402
from parity.fixtures import ASSETS  # noqa: E402
from parity.precision import resolve_device  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ThinkerConfig(vocab_size=29, n_layers=1, d_model=8, n_heads=2, d_ff=10, dropout=0.0, ctx_len=16)
GQA = ThinkerConfig(**TINY.to_dict() | {"use_gqa": True, "kv_groups": 1})
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234567\n"

State = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the configuration that belongs to model.pt beside it."""
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    return tmp_path


def parity(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120"})


def model(config: ThinkerConfig = TINY) -> ThinkerLM:
    torch.manual_seed(0)
    return ThinkerLM.from_config(config)


def saved(path: Path, change: Callable[[State], object] = lambda state: None, config: ThinkerConfig = TINY) -> Path:
    """A checkpoint in the plain format of a state dict, with one thing changed."""
    state = {key: value.detach().clone() for key, value in model(config).named_parameters()}
    change(state)
    torch.save(state, path)
    return path


def refused(ended: Result, path: Path, *words: str) -> None:
    """Exit code 2 and one message that names the file and the trouble; nothing is reported as compared."""
    assert ended.exit_code == 2, ended.output
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    assert ended.stderr.startswith("parity: ")
    assert ended.stderr.count("parity: ") == 1
    assert str(path) in ended.stderr
    for word in words:
        assert word in ended.stderr, ended.stderr


# --- checkpoints -----------------------------------------------------------------------------------------------------

FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda good: b"", "empty"),
    "truncated": (lambda good: good[: len(good) // 2], "cut"),
    "a Git-LFS pointer": (lambda good: LFS, "git lfs pull"),
    "a web page": (lambda good: b"<!DOCTYPE html><html>not found</html>", "web page"),
    "one bit flipped": (lambda good: good[:999] + bytes([good[999] ^ 1]) + good[1000:], ""),
    "something else": (lambda good: b"hello", ""),
}


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_is_no_checkpoint(what: str, folder: Path) -> None:
    change, words = FILES[what]
    path = folder / "model.pt"
    save_checkpoint(path, model=model())
    path.write_bytes(change(path.read_bytes()))
    refused(parity("run", "--checkpoint", path, "--only", "logits"), path, words)


def test_the_shipped_file_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "thinker.pt"
    whole = (ASSETS / "thinker.pt").read_bytes()
    path.write_bytes(whole[:-1000])
    refused(parity("run", "--checkpoint", path), path)


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    refused(parity("run", "--checkpoint", path), path, "no such file", "check the path")
    refused(parity("run", "--checkpoint", tmp_path), tmp_path, "this is a folder")


def narrow(state: State) -> None:
    state["norm.weight"] = state["norm.weight"][:-1]


def spoil(state: State) -> None:
    state["blocks.0.attn.o.weight"][3, 2] = float("nan")


def endless(state: State) -> None:
    state["norm.weight"][1] = float("inf")


def double(state: State) -> None:
    state["norm.weight"] = state["norm.weight"].double()


WEIGHTS: dict[str, tuple[Callable[[State], object], tuple[str, ...]]] = {
    "key missing": (lambda state: state.pop("blocks.0.norm2.weight"), ("missing", "blocks.0.norm2.weight")),
    "key unexpected": (
        lambda state: state.update({"blocks.0.surprise": torch.ones(2)}),
        ("unexpected", "blocks.0.surprise"),
    ),
    "key misshapen": (narrow, ("norm.weight", "(7,)", "(8,)")),
    "NaN": (spoil, ("blocks.0.attn.o.weight", "1 of 64 values that are not finite")),
    "Inf": (endless, ("norm.weight", "1 of 8 values that are not finite")),
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_weights_that_do_not_fit(what: str, folder: Path) -> None:
    change, words = WEIGHTS[what]
    path = saved(folder / "model.pt", change)
    refused(parity("run", "--checkpoint", path, "--only", "logits"), path, *words)


def test_weights_of_another_architecture(folder: Path) -> None:
    path = saved(folder / "model.pt", config=GQA)
    refused(parity("run", "--checkpoint", path), path, "missing", "unexpected", "use_gqa=True")


def test_weights_of_another_model_altogether(folder: Path) -> None:
    path = folder / "model.pt"
    torch.save(torch.nn.Linear(3, 2).state_dict(), path)
    refused(parity("run", "--checkpoint", path), path, "another architecture", "tok_emb.weight")


def test_a_checkpoint_without_a_configuration(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pt")
    refused(parity("run", "--checkpoint", path), path, "no configuration beside", "--config FILE")


def test_a_configuration_that_is_none(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text("{")
    refused(parity("run", "--config", path), path, "JSON")


def test_a_good_checkpoint_is_judged(folder: Path) -> None:
    """The same path as all of the above; only the file is right."""
    path = saved(folder / "model.pt")
    ended = parity("run", "--checkpoint", path, "--only", "logits", "--precision", "float64")
    assert ended.exit_code == 0, ended.output
    assert "AGREE" in ended.stdout


# --- texts, names, devices -------------------------------------------------------------------------------------------


def test_a_text_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("Grüße\n".encode("latin-1"))
    refused(parity("run", "--text", path), path, "not UTF-8 at byte 2", "iconv")


@pytest.mark.parametrize(("option", "check"), [("--audio", "mel"), ("--image", "image")])
def test_a_sound_or_a_picture_that_is_none(option: str, check: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    refused(parity("run", "--only", check, option, path), path, option, "no such file")
    refused(parity("run", "--only", check, option, tmp_path), tmp_path, option, "this is a folder")
    for content in (b"", b"neither sound nor picture", LFS):
        path.write_bytes(content)
        refused(parity("run", "--only", check, option, path), path)


@pytest.mark.parametrize(("option", "check", "other"), [("--audio", "mel", "image"), ("--image", "image", "mel")])
def test_a_file_for_another_check(option: str, check: str, other: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"RIFF")
    ended = parity("run", "--only", other, option, tmp_path / "file")
    assert ended.exit_code == 2, ended.output
    assert f"{option}: no meaning for {other}" in ended.stderr
    assert f"it is for {check}" in ended.stderr


def test_a_good_sound_and_a_good_picture_are_compared(tmp_path: Path) -> None:
    soundfile, image = pytest.importorskip("soundfile"), pytest.importorskip("PIL.Image")
    soundfile.write(tmp_path / "own.wav", [0.0, 0.5, -0.5, 0.25] * 500, 8000)
    image.new("RGBA", (9, 7), (10, 200, 30, 99)).save(tmp_path / "own.png")
    ended = parity(
        "run", "--only", "mel,image", "--audio", tmp_path / "own.wav", "--image", tmp_path / "own.png",
        "--json", tmp_path / "run.json",
    )  # fmt: skip
    assert ended.exit_code == 0, ended.output
    assert "--audio reached only mel" in " ".join(ended.stdout.split())
    names = {row["name"] for c in json.loads((tmp_path / "run.json").read_text())["checks"] for row in c["rows"]}
    assert {"own.wav: samples", "own.wav: torch.stft", "own.png", "own.png, resized"} <= names


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--only", "logit"), "did you mean 'logits'"),
        (("--only", "nothing"), "known: logits, gradients"),
        (("--device", "gpu"), "known: cpu, cuda, tpu"),
        (("--precision", "float31"), "float32"),
        (("--config", "mha-swiglo"), "mha-swiglu"),
    ],
)
def test_unknown_names(arguments: tuple[str, ...], words: str) -> None:
    ended = parity("run", *arguments)
    assert ended.exit_code == 2, ended.output
    assert ended.stdout == ""
    assert arguments[1] in ended.stderr
    assert words in ended.stderr


@pytest.mark.parametrize("device", ["cuda", "tpu"])
def test_a_device_that_is_not_there(device: str) -> None:
    try:
        resolve_device(device)
        pytest.skip(f"{device} is there")
    except CannotLook as error:
        missing = str(error)
    ended = parity("run", "--device", device)
    assert ended.exit_code == 3
    assert ended.stdout == ""
    assert missing in ended.stderr
    assert "--device cpu" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--only", "logit"), 2),
        (("--checkpoint", "model.pt"), 2),
        (("--text", "text.txt"), 2),
        (("--device", "cuda"), 3),
    ],
)
def test_as_a_process(arguments: tuple[str, ...], code: int, folder: Path) -> None:
    """The exit code and the one line that a shell sees."""
    (folder / "model.pt").write_bytes(LFS)
    (folder / "text.txt").write_bytes(b"\xff\xfe")
    # No GPU for this process, whatever the machine has.
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "parity", "run", *arguments]
    done = subprocess.run(command, cwd=folder, env=hidden, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("parity: ")
    assert len(done.stderr.splitlines()) == 1, done.stderr
