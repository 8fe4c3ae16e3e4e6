"""README's code runs as it stands, and its picture of the run is of this program."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_there_are_two_examples():
    assert len(BLOCKS) == 2


@pytest.mark.parametrize(("extra", "verdict"), [("", "DIFFER"), (", approximate=False", "AGREE")])
def test_the_foreign_pair_prints_what_is_said_of_it(extra, verdict):
    lines = run(BLOCKS[0].replace("jax.nn.gelu(h)", f"jax.nn.gelu(h{extra})")).splitlines()
    assert [line.split()[2] for line in lines] == [verdict, verdict]


def test_the_checkpoint_loads_and_generates_in_jax():
    *text, shape = run(BLOCKS[1]).strip().splitlines()
    assert "".join(text).strip()
    assert re.fullmatch(r"\(1, \d+, 1024\)", shape)


COMMANDS = re.findall(r"^python (-m omni_\w+ (?:inspect|generate|convert) .*?) *(?:#.*)?$", README, re.M)


def test_there_are_five_commands():
    assert [line.split()[2] for line in COMMANDS] == ["inspect", "generate", "convert", "generate", "generate"]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_command_runs_as_it_stands(tmp_path, line):
    for folder in ("parity", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    if "world/" in line:
        code = re.search(r'^python -c "(.*write_world.*)"$', README, re.M)
        assert code
        subprocess.run([sys.executable, "-c", code[1]], cwd=tmp_path, env=environment, check=True)
    done = subprocess.run(
        [sys.executable, *shlex.split(line)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()
    if "convert" in line:
        assert "left out: optimizer" in done.stdout
        assert (tmp_path / "thinker.safetensors").is_file()


def test_the_commands_named_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([a-z]+)`?", README):
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"


def test_the_files_named_exist():
    for name in re.findall(r"`((?:omni_|parity/|tests/|docs/)[\w/]+\.?\w*)`", README):
        path = ROOT / name
        assert path.exists() or (ROOT / f"{name}.md").exists() or (ROOT / name.split(".")[0]).exists(), name


def test_the_picture_has_every_check_and_ends_in_agreement():
    from parity.checks import CHECKS

    picture = README.split("<!-- run -->")[1].split("<!-- /run -->")[0]
    for check in CHECKS:
        assert re.search(rf"^{check} +\d+ .* AGREE *$", picture, re.M), check
    assert "undetermined" in picture
    assert "CPU only" in picture
