"""python -m omni_torch: what the commands print, keep, refuse, and with which exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import soundfile
import typer
from PIL import Image
from typer.testing import CliRunner

from omni_torch import generation
from omni_torch.__main__ import app
from omni_torch.audio import load_audio
from omni_torch.checkpoint import load_checkpoint, save_checkpoint
from omni_torch.config import ThinkerConfig
from omni_torch.fusion import OmniLM
from omni_torch.omni_config import AudioConfig, OmniConfig, VisionConfig
from omni_torch.prompting import continued_text
from omni_torch.thinker import ThinkerLM
from omni_torch.tokenizer import BPETokenizer
from omni_torch.training_utils import NumericalError
from omni_torch.vision import load_image

PACKAGE = "omni_torch"
ROOT = Path(__file__).parent.parent.parent
STORY = "".join(f"Once upon a time, {i} foxes ran over the hill, and the owl said {i + 1}.\n" for i in range(50))
CTX_LEN = 48

COMMON = {"--checkpoint", "--tokenizer", "--config", "--n-heads", "--max-new-tokens", "--temperature"}
COMMON |= {"--top-k", "--top-p", "--repetition-penalty", "--seed"}
SURFACE = {
    "train": {
        *("--task", "--difficulty", "--config", "--text", "--out", "--tokenizer", "--resume", "--max-steps", "--seed"),
        "--quiet",
    },
    "generate": COMMON | {"--prompt", "--image", "--audio", "--num-samples", "--window", "--json", "--stream"},
    "chat": COMMON,
    "inspect": {"checkpoint", "--config", "--n-heads", "--json"},
    "convert": {"source", "target", "--kind", "--split-qkv", "--config", "--n-heads", "--json"},
}


def run(*arguments, stdin=None):
    ended = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exception
    return ended


def refused(ended, code=2):
    """The one line that a refusal writes."""
    assert ended.exit_code == code, ended.output
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.endswith("\n")
    return ended.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as a training run leaves it: weights, config, tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "story.txt").write_text(STORY, encoding="utf-8", newline="")
    tokenizer = BPETokenizer.train(folder / "story.txt", folder / "tokenizer.model", 300)
    config = ThinkerConfig(tokenizer.vocab_size, 1, 16, 2, 32, dropout=0.5, ctx_len=CTX_LEN)
    config.to_json(folder / "config.json")
    save_checkpoint(folder / "thinker.pt", model=ThinkerLM.from_config(config), step=7, best_val_loss=1.5)
    return folder


@pytest.fixture
def pretended(monkeypatch):
    """Put something else in the place of generate."""
    return lambda function: monkeypatch.setattr(generation, "generate", function)


def test_commands_and_options_are_those_written_here():
    found = {
        name: {option for parameter in command.params for option in parameter.opts} - {"--help"}
        for name, command in typer.main.get_command(app).commands.items()
    }
    assert found == SURFACE
    assert all(name in run("--help").stdout for name in SURFACE)
    for name in ("generate", "chat"):
        assert "above temperature 0 their texts differ" in " ".join(run(name, "--help").stdout.split())


# --- generate


def test_generate_says_in_json_what_generate_returns(folder):
    ended = run(
        "generate", "--checkpoint", folder / "thinker.pt", "--prompt", "the fox", "--json", "--max-new-tokens", 9,
        "--num-samples", 2, "--temperature", 1.5, "--seed", 3,
    )  # fmt: skip
    assert (ended.exit_code, ended.stderr, ended.stdout.count("\n")) == (0, "", 1)
    found = json.loads(ended.stdout)
    assert list(found) == [
        "checkpoint", "tokenizer", "prompt", "seed", "rows", "tokens_per_second", "seconds_to_first_token",
    ]  # fmt: skip
    assert found["checkpoint"] == str(folder / "thinker.pt")
    assert found["tokenizer"] == str(folder / "tokenizer.model")
    assert (found["prompt"], found["seed"]) == ("the fox", 3)
    assert found["tokens_per_second"] > 0
    assert found["seconds_to_first_token"] > 0
    tokenizer = BPETokenizer(folder / "tokenizer.model")
    prompt = tokenizer.encode("the fox", add_bos=True)
    model = ThinkerLM.from_checkpoint(folder / "thinker.pt")
    made = generation.generate(model, prompt, max_new_tokens=9, num_samples=2, temperature=1.5, seed=3)
    assert [row["tokens"] for row in found["rows"]] == made.tokens
    assert [row["logprobs"] for row in found["rows"]] == made.logprobs
    assert [row["stop_reason"] for row in found["rows"]] == made.stop_reasons
    for row in found["rows"]:
        assert list(row) == ["text", "tokens", "logprobs", "stop_reason"]
        assert "the fox" + row["text"] == tokenizer.decode(prompt + row["tokens"])


def test_text_is_the_same_streamed_and_not_and_from_stdin(folder):
    ours = ("generate", "--checkpoint", folder, "--max-new-tokens", 9)
    texts = [run(*ours, "--prompt", "the fox", *how).stdout for how in ((), ("--stream",), ("--no-stream",))]
    texts.append(run(*ours, "--prompt", "-", stdin="the fox\n").stdout)
    row = json.loads(run(*ours, "--prompt", "the fox", "--json").stdout)["rows"][0]
    assert set(texts) == {row["text"] + "\n"}
    two = run(*ours, "--prompt", "the fox", "--num-samples", 2).stdout
    assert two == f"--- 1 of 2\n{row['text']}\n--- 2 of 2\n{row['text']}\n"


def test_no_new_tokens_is_no_text(folder):
    ours = ("generate", "--checkpoint", folder, "--prompt", "the fox", "--max-new-tokens", 0)
    assert run(*ours).stdout == "\n"
    found = json.loads(run(*ours, "--json").stdout)
    assert found["rows"] == [{"text": "", "tokens": [], "logprobs": [], "stop_reason": "length"}]
    assert found["tokens_per_second"] is found["seconds_to_first_token"] is None


def test_the_first_space_of_a_continuation_is_kept(folder):
    """A model of the library's defaults takes the first space of a text for its own."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "story.txt"), model_prefix=str(folder / "prefix"), model_type="bpe", vocab_size=60,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2,
    )  # fmt: skip
    tokenizer = BPETokenizer(folder / "prefix.model")
    prompt, ids = tokenizer.encode("the fox", add_bos=True), tokenizer.encode("ran over", add_eos=True)
    assert tokenizer.decode(ids) == "ran over"
    assert "".join(continued_text(tokenizer, prompt, ids)) == " ran over"
    assert (
        next(continued_text(tokenizer, prompt, chain(ids[:1], iter(lambda: pytest.fail("took too many"), 0))))[0] == " "
    )


BAD = {
    "no text": (("--prompt", ""), "the prompt is empty"),
    "half a character": (("--prompt", "\udce4"), "lone surrogate"),
    "too much text": (("--prompt", STORY), "allowed are up to ctx_len=48"),
    "negative length": (("--max-new-tokens", -1), "max_new_tokens=-1 is not allowed"),
    "too long": (("--max-new-tokens", 500), "or pass --window to let the oldest tokens go"),
    "temperature": (("--temperature", -0.5), "temperature=-0.5 is not allowed"),
    "top_k": (("--top-k", -1), "top_k=-1 is not allowed"),
    "top_p": (("--top-p", 1.5), "top_p=1.5 is not allowed"),
    "penalty": (("--repetition-penalty", 0), "repetition_penalty=0"),
    "samples": (("--num-samples", 0), "num_samples=0 is not allowed"),
    "seed": (("--seed", -1), "seed=-1 is not allowed"),
    "heads": (("--n-heads", 3), "n_heads=3"),
    "no checkpoint": (("--checkpoint", "/nowhere/x.pt"), "checkpoint '/nowhere/x.pt' does not exist"),
    "no config": (("--config", "/nowhere/x.json"), "'/nowhere/x.json' does not exist"),
    "no tokenizer": (("--tokenizer", "/nowhere/x.model"), "tokenizer model '/nowhere/x.model' does not exist"),
    "stream of JSON": (("--stream", "--json"), "--stream shows one text"),
    "stream of two": (("--stream", "--num-samples", 2), "--stream shows one text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(folder, name):
    given, words = BAD[name]
    ended = run(
        "generate", "--checkpoint", folder, "--prompt", "the fox", *given
    )  # of an option twice, the last counts
    line = refused(ended)
    assert line.startswith("error: ")
    assert words in line


def test_the_space_of_stdin_is_kept_but_for_the_end_of_the_line(folder):
    ours = ("generate", "--checkpoint", folder, "--max-new-tokens", 1, "--json", "--prompt", "-")
    assert json.loads(run(*ours, stdin=b"  the fox \r\n").stdout)["prompt"] == "  the fox "
    assert json.loads(run(*ours, stdin=b"the fox\n\n").stdout)["prompt"] == "the fox\n"


@pytest.mark.parametrize("command", [("generate", "--prompt", "-"), ("chat",)])
def test_a_closed_stdin_is_said(folder, command):
    given = [sys.executable, "-m", PACKAGE, *command, "--checkpoint", str(folder)]
    ended = subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", *given], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: stdin is closed, and ")
    assert ended.stderr.count("\n") == 1


def test_stdin_that_is_no_text(folder):
    line = refused(run("generate", "--checkpoint", folder, "--prompt", "-", stdin=b"fox\xff"))
    assert "the prompt on stdin is not UTF-8 at byte 3" in line


def test_a_tokenizer_of_another_vocabulary_is_refused_before_any_work(folder, tmp_path, pretended):
    pretended(lambda *_, **__: pytest.fail("worked"))
    for size in (299, 301):
        BPETokenizer.train(folder / "story.txt", tmp_path / "other.model", size)
        for command in (("generate", "--prompt", "the fox"), ("chat",)):
            ended = run(*command, "--checkpoint", folder, "--tokenizer", tmp_path / "other.model", stdin="fox\n")
            assert f"other.model' has {size} ids, and the model" in refused(ended)
            assert "has vocab_size=300: must be equal" in ended.stderr


def test_a_checkpoint_without_a_tokenizer_says_so(folder, tmp_path):
    (tmp_path / "thinker.pt").write_bytes((folder / "thinker.pt").read_bytes())
    line = refused(run("generate", "--checkpoint", tmp_path / "thinker.pt", "--prompt", "the fox"))
    assert "no tokenizer.model beside the checkpoint" in line
    ours = ("generate", "--checkpoint", tmp_path, "--prompt", "the fox", "--tokenizer", folder / "tokenizer.model")
    assert "n_heads" in refused(run(*ours))
    assert run(*ours, "--n-heads", 2, "--max-new-tokens", 9).exit_code == 0
    assert run(*ours, "--config", folder / "config.json", "--max-new-tokens", 9).exit_code == 0


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (NumericalError("the logits of row 0\nhold NaN"), 1, "error: the logits of row 0 hold NaN\n"),
        (OSError("disk"), 2, "error: disk\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(folder, pretended, raised, code, line):
    def fail(*_, **__):
        raise raised

    pretended(fail)
    assert refused(run("generate", "--checkpoint", folder, "--prompt", "fox", "--no-stream"), code) == line


# --- chat


class Speaker:
    """Stands for generate: says given replies, and remembers what it was asked."""

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []

    def __call__(self, model, prompt_ids, **settings):
        assert settings.pop("stream") is True
        self.asked.append((list(prompt_ids), settings))
        for number in self.replies.pop(0):
            if isinstance(number, BaseException):
                raise number
            yield [number]


@pytest.fixture
def tokenizer(folder):
    return BPETokenizer(folder / "tokenizer.model")


# Pictures and sounds -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def senses(folder, tmp_path_factory):
    """A folder with a model that sees and hears, and a picture and two sounds, one of them too long."""
    made = tmp_path_factory.mktemp("senses")
    thinker = ThinkerConfig.from_json(folder / "config.json")
    audio = AudioConfig(d=12, ff=16, layers=1, sample_rate=8000, n_fft=256, win_length=200)
    vision = VisionConfig(img_size=16, patch=8, d=12, layers=1, ff=16)
    config = OmniConfig(thinker, audio, vision)
    config.to_json(made / "config.json")
    save_checkpoint(made / "omni.safetensors", model=OmniLM.from_config(config))
    (made / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (20, 30, 3), np.uint8)).save(made / "a picture.png")
    for name, seconds in (("sound", 0.4), ("long", 2.0)):
        soundfile.write(made / f"{name}.wav", draw.uniform(-1, 1, int(16000 * seconds)), 16000)
    return made


def test_generate_looks_and_listens(senses):
    prompt = ("generate", "--checkpoint", senses, "--prompt", "the fox", "--max-new-tokens", 5)
    files = ("--image", senses / "a picture.png", "--audio", senses / "sound.wav")
    ended = run(*prompt, *files, "--json")
    assert (ended.exit_code, ended.stderr) == (0, "")
    found = json.loads(ended.stdout)
    assert (found["image"], found["audio"]) == (str(files[1]), str(files[3]))
    model = OmniLM.from_checkpoint(senses)
    images = [load_image(senses / "a picture.png", size=16)]
    mels = [model.features(load_audio(senses / "sound.wav", 8000))]
    assert mels[0].shape == (21, 128)
    ids = BPETokenizer(senses / "tokenizer.model").encode("the fox", add_bos=True)
    made = generation.generate(model, ids, 5, images=images, mels=mels)
    (row,) = found["rows"]
    assert (row["tokens"], row["logprobs"]) == (made.tokens[0], made.logprobs[0])
    assert run(*prompt, *files).stdout == row["text"] + "\n"
    deaf = json.loads(run(*prompt, *files[:2], "--json").stdout)
    assert "audio" not in deaf
    assert deaf["rows"][0]["logprobs"] != row["logprobs"]
    blind = json.loads(run(*prompt, "--json").stdout)
    assert blind["rows"][0]["logprobs"] != deaf["rows"][0]["logprobs"]


BAD_FILES = {
    "no picture": (("--image", "/nowhere/a.png"), "'/nowhere/a.png' does not exist"),
    "no sound": (("--audio", "/nowhere/a.wav"), "'/nowhere/a.wav' does not exist"),
    "a picture to listen to": (("--audio", "a picture.png"), "a picture.png"),
    "a sound to look at": (("--image", "sound.wav"), "sound.wav"),
    "a long sound": (
        ("--image", "a picture.png", "--audio", "long.wav"),
        "long.wav' has 101 frames, which become 26 vectors: allowed are up to ctx_len // 4 = 12",
    ),
    "heads": (("--image", "a picture.png", "--n-heads", 2), "n_heads = 2"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_generate_refuses(senses, name):
    given, words = BAD_FILES[name]
    files = [senses / word if (senses / str(word)).is_file() else word for word in given]
    line = refused(run("generate", "--checkpoint", senses, "--prompt", "the fox", *files))
    assert words in line


def test_a_model_that_cannot_see_says_so(folder, senses):
    picture = ("--image", senses / "a picture.png")
    line = refused(run("generate", "--checkpoint", folder, "--prompt", "the fox", *picture))
    assert "no section 'vision'" in line
    alone = json.loads((senses / "config.json").read_text(encoding="utf-8")) | {"audio": None}
    (senses / "eyes.json").write_text(json.dumps(alone), encoding="utf-8")
    sound = ("--audio", senses / "sound.wav", "--config", senses / "eyes.json")
    line = refused(run("generate", "--checkpoint", senses, "--prompt", "the fox", *sound))
    assert "no section 'audio'" in line


def test_chat_answers_line_by_line(folder):
    """With the model itself: the reply is what generate prints for the same text."""
    ours = ("--checkpoint", folder, "--temperature", 0, "--max-new-tokens", 9)
    text = run("generate", "--prompt", "the fox", *ours).stdout
    ended = run("chat", *ours, stdin="the fox\n\n  \n/reset\nthe fox\n")
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert ended.stdout == f"you> {text}you> you> you> (forgotten; the conversation begins anew)\nyou> {text}you> \n"


def test_chat_keeps_what_was_said_as_tokens(folder, tokenizer, pretended):
    cut, whole = tokenizer.encode(" and 🦊"), tokenizer.encode(" ran.", add_eos=True)
    speaker = Speaker(cut, whole, cut, cut)
    pretended(speaker)
    ended = run(
        "chat", "--checkpoint", folder, "--seed", 5, "--max-new-tokens", 8, stdin="a\nb\nc\n/reset\nd\n/quit\ne\n"
    )
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert ended.stdout == (
        "you>  and 🦊\nyou>  ran.\nyou>  and 🦊\nyou> (forgotten; the conversation begins anew)\nyou>  and 🦊\nyou> "
    )
    first = [1, *tokenizer.encode("a")]
    second = [*first, *cut, *tokenizer.encode(" b")]
    third = [*second, *whole, 1, *tokenizer.encode("c")]
    assert [ids for ids, _ in speaker.asked] == [first, second, third, [1, *tokenizer.encode("d")]]
    assert [settings["seed"] for _, settings in speaker.asked] == [5, 6, 7, 5]
    assert all(settings["max_new_tokens"] == 8 for _, settings in speaker.asked)


def test_chat_window_slides_and_says_so_once(folder, tokenizer, pretended):
    reply = tokenizer.encode(" owl")
    speaker = Speaker(*[reply] * 9)
    pretended(speaker)
    ended = run("chat", "--checkpoint", folder, "--max-new-tokens", 10, stdin="the fox ran over the hill\n" * 9)
    room = CTX_LEN - 10
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert ended.stdout.count(f"(the context is full: from here on the model sees the last {room} tokens)") == 1
    lengths = [len(ids) for ids, _ in speaker.asked]
    assert max(lengths) == lengths[-1] == room
    assert lengths[0] < room
    for ids, _ in speaker.asked:
        assert ids[0] == 1
        assert tokenizer.decode(ids).endswith("the fox ran over the hill")
    everything = [*tokenizer.encode("the fox ran over the hill"), *reply]
    everything += [*tokenizer.encode(" the fox ran over the hill"), *reply] * 8
    assert speaker.asked[-1][0][1:] == everything[: -len(reply)][-room + 1 :]


def test_chat_goes_on_for_longer_than_its_context(folder):
    ended = run("chat", "--checkpoint", folder, "--max-new-tokens", 20, stdin="the fox ran over the hill\n" * 4)
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert ended.stdout.count("(the context is full") == 1
    assert ended.stdout.count("you> ") == 5


def test_ctrl_c_ends_a_reply_and_keeps_it(folder, tokenizer, pretended):
    said = tokenizer.encode(" owl")
    speaker = Speaker([*said, KeyboardInterrupt()], said)
    pretended(speaker)
    ended = run("chat", "--checkpoint", folder, stdin="a\nb\n")
    assert (ended.exit_code, ended.stdout) == (0, "you>  owl (stopped)\nyou>  owl\nyou> \n")
    assert speaker.asked[1][0] == [1, *tokenizer.encode("a"), *said, *tokenizer.encode(" b")]


def test_chat_reads_no_command_it_does_not_know(folder, pretended):
    pretended(Speaker())
    ended = run("chat", "--checkpoint", folder, stdin="/help\n/quit now\n/quit\n")
    assert ended.exit_code == 0
    assert ended.stdout.count("is no command: there are /reset and /quit)") == 2


@pytest.mark.parametrize("length", [0, -1, CTX_LEN - 1])
def test_chat_refuses_a_reply_that_leaves_no_room(folder, length):
    line = refused(run("chat", "--checkpoint", folder, "--max-new-tokens", length, stdin="fox\n"))
    assert f"max_new_tokens={length} is not allowed: must be 1 to {CTX_LEN - 2}" in line


def test_chat_says_bad_settings_and_bad_numbers_in_a_line(folder, pretended):
    line = refused(run("chat", "--checkpoint", folder, "--top-p", 2, stdin="fox\n"))
    assert line.startswith("error: top_p=2.0 is not allowed")
    pretended(Speaker([NumericalError("the logits hold NaN")]))
    ended = run("chat", "--checkpoint", folder, stdin="fox\n")
    assert (ended.exit_code, ended.stderr) == (1, "error: the logits hold NaN\n")


# --- inspect and convert


def test_inspect(folder):
    ended = run("inspect", folder / "thinker.pt")
    assert (ended.exit_code, ended.stderr) == (0, "")
    for words in ("kind: full", "step: 7", "1.5", "vocab_size = 300", "n_heads = 2", "SHA-256"):
        assert words in ended.stdout
    found = json.loads(run("inspect", folder, "--json").stdout)
    assert (found["kind"], found["step"], found["best_val_loss"]) == ("full", 7, 1.5)
    assert "does not exist" in refused(run("inspect", folder / "other.pt"))
    (folder / "alone").mkdir()
    (folder / "alone" / "a.pt").write_bytes((folder / "thinker.pt").read_bytes())
    alone = ("inspect", folder / "alone" / "a.pt")
    assert "--n-heads N" in run(*alone).stdout
    assert "n_heads = 2  [hint]" in run(*alone, "--n-heads", 2).stdout
    assert "ctx_len = 48  [config file]" in run(*alone, "--config", folder / "config.json").stdout
    ended = run("convert", folder / "alone" / "a.pt", folder / "alone" / "b.safetensors", "--n-heads", 2)
    assert ended.stdout.endswith("assumed: dropout=0.1, rope_theta=10000.0, ctx_len=512\n")


def test_convert(folder, tmp_path):
    ended = run("convert", folder / "thinker.pt", tmp_path / "x.safetensors")
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert "thinker.pt (full) -> " in ended.stdout
    proof = json.loads((tmp_path / "x.safetensors.manifest.json").read_text())
    assert (proof["dropped"], proof["notes"]) == ({}, [])
    save_checkpoint(tmp_path / "o.pt", model=load_checkpoint(folder / "thinker.pt").model, optimizer={"state": {}})
    ended = run("convert", tmp_path / "o.pt", tmp_path / "x.safetensors")
    assert ended.stdout.endswith("left out: optimizer (a safetensors file does not hold it)\n")
    assert "optimizer" in json.loads((tmp_path / "x.safetensors.manifest.json").read_text())["dropped"]
    assert (tmp_path / "x.safetensors.manifest.json").is_file()
    again = run("convert", tmp_path / "x.safetensors", tmp_path / "y.pt", "--kind", "legacy", "--json")
    assert json.loads(again.stdout)["target_kind"] == "legacy"
    before, after = load_checkpoint(folder / "thinker.pt").model, load_checkpoint(tmp_path / "y.pt").model
    assert before.keys() == after.keys()
    assert all(before[key].tolist() == after[key].tolist() for key in before)
    assert "kind" in refused(run("convert", folder / "thinker.pt", tmp_path / "z.pt", "--kind", "other"))
    refused(run("convert", folder / "thinker.pt", folder / "thinker.pt"))


# --- the process


def process(*arguments, stdin="", **environment):
    return subprocess.run(
        [sys.executable, "-m", "omni_torch", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_chat_in_a_process_of_its_own(folder):
    ours = ("--checkpoint", folder, "--max-new-tokens", 9, "--temperature", 0)
    ended = process("chat", *ours, stdin="the fox\n", PYTHONIOENCODING="utf-8")
    text = run("generate", "--prompt", "the fox", *ours).stdout
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == f"you> {text}you> \n"


def test_ctrl_c_at_the_prompt_of_a_pipe_ends_the_chat(folder, tmp_path):
    command = [sys.executable, "-m", "omni_torch", "chat", "--checkpoint", str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    # A child inherits that Ctrl-C is ignored, as it is in a shell's background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        chat = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)
    with chat:
        assert chat.stdout is not None
        assert chat.stderr is not None
        assert chat.stdout.read(5) == "you> "
        time.sleep(1)  # Python sees a signal in a read, or at its next instruction, not between the two
        for _ in range(4):  # so one may be lost
            chat.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                chat.wait(30)
                break
        assert chat.returncode == 130
        assert chat.stderr.read() == "interrupted\n"
