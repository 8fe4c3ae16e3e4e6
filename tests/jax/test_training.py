"""Train steps and the trainer: resume to the last bit, one compilation, files, bad input, Ctrl-C."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from typer.testing import CliRunner

from omni_jax import training, training_run
from omni_jax.__main__ import app
from omni_jax.checkpoint import load_checkpoint
from omni_jax.config import ThinkerConfig
from omni_jax.data import token_stream
from omni_jax.tokenizer import BPETokenizer
from omni_jax.training import TrainConfig, Trainer, train, train_step_mse
from omni_jax.training_utils import NumericalError

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = "omni_jax"

CONFIG = {"vocab_size": 280, "n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 32, "ctx_len": 16, "dropout": 0.1}
TRAIN = {"lr": 0.01, "max_steps": 12, "warmup_steps": 2, "batch_size": 2, "gradient_accumulation_steps": 2}
TRAIN |= {"val_freq": 4, "checkpoint_freq": 5, "print_freq": 2, "seed": 3}
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "that", "hat"]
TEXT = "".join(" ".join(WORDS[(i * k) % 10] for k in range(1, 10)) + "\n" for i in range(1, 41))


def make(out, resume=False, **changes) -> Trainer:
    flat = CONFIG | TRAIN | changes
    ids, val_ids = (
        token_stream([[3 + (i * k) % 97 for k in range(1, 12)] for i in documents], 1, 2)
        for documents in (range(1, 30), range(30, 34))
    )
    return Trainer(ThinkerConfig.from_dict(flat), TrainConfig.from_dict(flat), ids, val_ids, out, resume, quiet=True)


def lines(out) -> list[dict]:
    """Metrics without what a clock says."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "tokens_per_second"} for record in records]


def files(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from beginning to end."""
    out = tmp_path_factory.mktemp("run") / "whole"
    trainer = make(out)
    trainer.run()
    return out


@pytest.fixture
def inputs(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | TRAIN))
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def test_a_run_leaves_its_files_and_learns(whole) -> None:
    assert sorted(files(whole)) == ["best.pt", "config.json", "last.pt", "metrics.jsonl", "run.json"]
    records = lines(whole)
    assert [record["step"] for record in records] == [2, 4, 6, 8, 10, 12]
    assert [record["step"] for record in records if "val_loss" in record] == [4, 8, 12]
    assert all(record["tokens"] == 2 * 2 * 16 for record in records)
    assert records[-1]["loss"] < records[0]["loss"]
    assert ThinkerConfig.from_json(whole / "config.json").to_dict() == CONFIG | {
        key: value for key, value in ThinkerConfig.from_dict(CONFIG).to_dict().items() if key not in CONFIG
    }
    last, best = load_checkpoint(whole / "last.pt"), load_checkpoint(whole / "best.pt")
    assert last.step == 12
    assert last.best_val_loss == min(record["val_loss"] for record in records if "val_loss" in record)
    assert best.step in (4, 8, 12)
    assert best.best_val_loss == last.best_val_loss


@pytest.mark.parametrize("stop", [1, 5, 7])
def test_resume_is_bitwise_what_no_interruption_gives(whole, tmp_path, stop) -> None:
    """Dropout is on, and every update accumulates two micro-batches."""
    out = tmp_path / "run"
    make(out).run(until=stop)
    assert load_checkpoint(out / "last.pt").step == stop
    with (out / "metrics.jsonl").open("a") as file:  # as a run that was killed after its last checkpoint leaves it
        file.write('{"step": 99, "loss": 1.0}\n{"step": 1')
    trainer = make(out, resume=True)
    assert trainer.state.step == stop
    trainer.run()
    assert (out / "last.pt").read_bytes() == (whole / "last.pt").read_bytes()
    assert (out / "best.pt").read_bytes() == (whole / "best.pt").read_bytes()
    assert lines(out) == lines(whole)


def test_dropout_and_accumulation_are_really_on(whole, tmp_path) -> None:
    for change in ({"dropout": 0.0}, {"gradient_accumulation_steps": 1}):
        out = tmp_path / next(iter(change))
        make(out, **change).run(until=3)
        assert lines(out)[0]["loss"] != lines(whole)[0]["loss"]


def test_a_finished_run_resumes_to_nothing(whole) -> None:
    before = files(whole)
    assert make(whole, resume=True).run().step == 12
    assert files(whole) == before


def test_a_run_is_never_overwritten_or_resumed_with_other_settings(whole) -> None:
    before = files(whole)
    with pytest.raises(ValueError, match=r"already holds a run.*--resume"):
        make(whole)
    with pytest.raises(ValueError, match=r"lr was 0\.01 and is 0\.02; seed was 3 and is 4"):
        make(whole, resume=True, lr=0.02, seed=4)
    with pytest.raises(ValueError, match="d_ff was 32 and is 64"):
        make(whole, resume=True, d_ff=64)
    flat = CONFIG | TRAIN
    ids = token_stream([[5, 6, 7] * 10], 1, 2)
    none = np.zeros(0, np.int32)
    with pytest.raises(ValueError, match="the text is another one"):
        Trainer(ThinkerConfig.from_dict(flat), TrainConfig.from_dict(flat), ids, none, whole, resume=True)
    assert files(whole) == before


def test_there_must_be_a_run_to_resume(tmp_path) -> None:
    with pytest.raises(ValueError, match="holds no run to resume"):
        make(tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


def test_without_validation_there_is_no_best_file(tmp_path) -> None:
    flat = CONFIG | TRAIN
    ids = token_stream([[5, 6, 7] * 10], 1, 2)
    none = np.zeros(0, np.int32)
    trainer = Trainer(ThinkerConfig.from_dict(flat), TrainConfig.from_dict(flat), ids, none, tmp_path, quiet=True)
    assert trainer.validate() == math.inf
    trainer.run(until=4)
    assert not (tmp_path / "best.pt").exists()


BAD_CONFIGS = [
    ({"lr": 0.0}, "lr=0.0 is not allowed: must be above 0"),
    ({"lr": "3e-4"}, "lr='3e-4' is not allowed: must be a finite number"),
    ({"wd": -0.1}, "wd=-0.1 is not allowed: must be at least 0"),
    ({"warmup_steps": 12}, "warmup_steps=12 is not allowed: must be below max_steps=12"),
    ({"max_steps": 0, "warmup_steps": 0}, "max_steps=0 is not allowed: must be 1 to"),
    ({"batch_size": 0}, "batch_size=0 is not allowed: must be 1 to"),
    ({"batch_size": 2.5}, "batch_size=2.5 is not allowed: must be an integer"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 is not allowed"),
    ({"max_grad_norm": 0}, "max_grad_norm=0.0 is not allowed: must be above 0"),
    ({"val_split": 1.0}, r"val_split=1.0 is not allowed: must be in \[0, 1\)"),
    ({"val_freq": 0}, "val_freq=0 is not allowed"),
    ({"checkpoint_freq": 0}, "checkpoint_freq=0 is not allowed"),
    ({"print_freq": -1}, "print_freq=-1 is not allowed"),
    ({"seed": -1}, "seed=-1 is not allowed: must be 0 to"),
    ({"use_amp": 1}, "use_amp=1 is not allowed: must be true or false"),
    ({"warmup_stps": 3}, "unknown key 'warmup_stps'; the nearest known key is 'warmup_steps'"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CONFIGS)
def test_training_keys_that_are_not_allowed(inputs, change, message) -> None:
    flat = CONFIG | TRAIN | change
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(flat)
    (inputs / "bad.json").write_text(json.dumps(flat))
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_json(inputs / "bad.json")


def test_nested_and_flat_files_give_the_same_config(inputs) -> None:
    flat = TrainConfig.from_json(inputs / "config.json")
    assert flat == TrainConfig(**TRAIN)
    (inputs / "nested.json").write_text(json.dumps({"thinker": CONFIG | TRAIN, "lr": 7.0, "num_workers": 2}))
    assert TrainConfig.from_json(inputs / "nested.json") == flat
    assert TrainConfig.from_dict(CONFIG) == TrainConfig()


BAD_IDS = [
    ([1, 5, 2], "ids has 3 tokens, must have at least ctx_len"),
    ([1, 280] * 20, r"ids\[1\] = 280 is not a token id"),
    ([1.0] * 40, "must be 1-D integers"),
    ([[1, 2]] * 40, "must be 1-D integers"),
]


@pytest.mark.parametrize(("ids", "message"), BAD_IDS)
def test_ids_that_are_not_allowed(tmp_path, ids, message) -> None:
    flat, none = CONFIG | TRAIN, np.zeros(0, np.int32)
    with pytest.raises(ValueError, match=message):
        Trainer(ThinkerConfig.from_dict(flat), TrainConfig.from_dict(flat), np.array(ids), none, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def bad_text(folder) -> str:
    (folder / "text.txt").write_bytes(b"good\nbad \xff\n")
    return "not UTF-8 at byte 9"


def blank_text(folder) -> str:
    (folder / "text.txt").write_text(" \n\n")
    return "no line that is not blank"


def one_line(folder) -> str:
    (folder / "text.txt").write_text(TEXT.replace("\n", " ") + "\n")
    return "val_split=0.1 takes 1 of the text's 1 documents"


def no_text(folder) -> str:
    (folder / "text.txt").unlink()
    return "does not exist"


def large_vocabulary(folder) -> str:
    (folder / "config.json").write_text(json.dumps(CONFIG | TRAIN | {"vocab_size": 4000}))
    return "no tokenizer of vocab_size = 4000"


def long_rows(folder) -> str:
    (folder / "config.json").write_text(json.dumps(CONFIG | TRAIN | {"ctx_len": 100_000}))
    return "must have at least ctx_len"


@pytest.mark.parametrize("spoil", [bad_text, blank_text, one_line, no_text, large_vocabulary, long_rows])
def test_bad_input_is_refused_before_anything_is_written(inputs, spoil) -> None:
    message = spoil(inputs)
    with pytest.raises(ValueError, match=message):
        train(inputs / "config.json", inputs / "text.txt", inputs / "out", quiet=True)
    assert not (inputs / "out").exists()


def test_tokenizers_must_belong_to_the_config_and_the_run(inputs) -> None:
    config, text, out = inputs / "config.json", inputs / "text.txt", inputs / "out"
    other, right = inputs / "other.model", inputs / "right.model"
    BPETokenizer.train(text, other, 275)
    BPETokenizer.train(text, right, 280)
    with pytest.raises(ValueError, match="vocab_size=280 is not allowed: must be the tokenizer's 275 pieces"):
        train(config, text, out, other, quiet=True)
    assert not out.exists()
    state = train(config, text, out, right, max_steps=3, quiet=True)
    assert state.step == 3
    assert (out / "tokenizer.model").read_bytes() == right.read_bytes()
    with pytest.raises(ValueError, match="cannot be resumed with another tokenizer"):
        train(config, text, out, other, resume=True, max_steps=3, quiet=True)
    with pytest.raises(ValueError, match="max_steps was 3 and is 12"):
        train(config, text, out, resume=True, quiet=True)
    assert train(config, text, out, resume=True, max_steps=3, quiet=True).step == 3


def test_unequal_counts_divide_once(tmp_path) -> None:
    """Two micro-batches of different length in tokens are one big batch: PAD, which is not predicted, is in one."""
    ids = token_stream([[5, 6, 7, 0, 0, 0, 8, 9] * 2, [9, 8, 7, 6, 5, 4, 3] * 2, [4] * 15, [5, 0] * 8], 1, 2)
    none = np.zeros(0, np.int32)
    seen = {}
    for accumulation, batch_size in ((2, 2), (1, 4)):
        flat = CONFIG | TRAIN | {"dropout": 0.0, "gradient_accumulation_steps": accumulation}
        flat |= {"batch_size": batch_size, "warmup_steps": 0, "print_freq": 1}
        out = tmp_path / str(accumulation)
        trainer = Trainer(ThinkerConfig.from_dict(flat), TrainConfig.from_dict(flat), ids, none, out, quiet=True)
        if accumulation == 2:
            tokens_ABT = trainer._batch()
            counts = (tokens_ABT[:, :, 1:] != 0).sum(axis=(1, 2))
            assert counts[0] != counts[1]
        trainer._batch = lambda tokens=tokens_ABT, a=accumulation, b=batch_size: tokens.reshape(a, b, -1)
        trainer.run(until=1)
        (seen[accumulation],) = lines(out)
    assert seen[1]["tokens"] == seen[2]["tokens"] == counts.sum()
    for key in ("loss", "grad_norm"):
        # Sums of some hundred float32 terms in another order.
        assert abs(seen[1][key] - seen[2][key]) <= 100 * np.finfo(np.float32).eps * abs(seen[1][key])


def test_mixed_precision_keeps_the_state_in_float32(whole, tmp_path) -> None:
    trainer = make(tmp_path / "run", use_amp=True)
    trainer.run(until=2)
    checkpoint = load_checkpoint(tmp_path / "run" / "last.pt")
    for array in [*checkpoint.model.values(), checkpoint.optimizer["state"][0]["exp_avg"]]:
        assert "float32" in str(array.dtype)
    loss, exact = lines(tmp_path / "run")[0]["loss"], lines(whole)[0]["loss"]
    assert loss != exact
    assert abs(loss - exact) < float(jnp.finfo(jnp.bfloat16).eps) * exact


def test_command_line(inputs) -> None:
    given = ["train", "--config", str(inputs / "config.json"), "--text", str(inputs / "text.txt")]
    command = [sys.executable, "-m", PACKAGE, *given, "--out", "out", "--max-steps", "3", "--seed", "7"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=inputs, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "step 3/3  loss" in done.stderr
    assert "step 3 done" in done.stdout
    again = CliRunner().invoke(app, [*given, "--out", str(inputs / "out")])
    assert again.exit_code == 2
    assert again.stderr.startswith("error: ")
    assert len(again.stderr.splitlines()) == 1
    assert json.loads((inputs / "out" / "config.json").read_text())["seed"] == 7
    (inputs / "text.txt").write_bytes(b"\xff")
    assert CliRunner().invoke(app, [*given, "--out", str(inputs / "other"), "--quiet"]).exit_code == 2


def test_ctrl_c_saves_and_resume_goes_on(inputs) -> None:
    (inputs / "config.json").write_text(json.dumps(CONFIG | TRAIN | {"max_steps": 10**6, "print_freq": 1}))
    command = [sys.executable, "-m", PACKAGE, "train", "--config", "config.json", "--text", "text.txt", "--out", "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=inputs, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert "finishing the step" in rest
    assert "Traceback" not in rest
    step = load_checkpoint(inputs / "out" / "last.pt").step
    assert step is not None
    assert step >= 3
    records = lines(inputs / "out")
    assert [record["step"] for record in records] == list(range(1, step + 1))


@pytest.mark.parametrize("bad", ["loss", "gradients"])
def test_nan_ends_the_run_before_anything_is_changed(tmp_path, monkeypatch, bad) -> None:
    out = tmp_path / "run"
    make(out).run(until=3)
    before = files(out)
    exact = training.cross_entropy

    def spoilt(logits, targets):
        loss = exact(logits, targets)
        if bad == "loss":
            return loss * math.nan
        slope = logits[0, 0, 0] - jax.lax.stop_gradient(logits[0, 0, 0])
        return loss + jnp.sqrt(jnp.abs(slope))  # slope Inf · 0 at value 0

    monkeypatch.setattr(training, "cross_entropy", spoilt)
    training_run._train_step.clear_cache()  # or the program that was compiled with the right loss would run
    trainer = make(out, resume=True)
    with pytest.raises(NumericalError, match=r"update 4: .*nothing was updated"):
        trainer.run()
    training_run._train_step.clear_cache()
    assert files(out) == before
    assert trainer.state.step == 3


def test_a_bad_update_is_found_late_and_still_changed_nothing(tmp_path, monkeypatch) -> None:
    """The host looks at the device every hundred steps only; the batch of the third update is poisoned."""
    out = tmp_path / "run"
    make(out, print_freq=100, val_freq=100, checkpoint_freq=100).run(until=2)
    exact = training.cross_entropy

    def spoilt(logits, targets):
        return exact(logits, targets) * jnp.where(jnp.any(targets == 279), jnp.nan, 1.0)

    monkeypatch.setattr(training, "cross_entropy", spoilt)
    training_run._train_step.clear_cache()
    trainer = make(out, resume=True, print_freq=100, val_freq=100, checkpoint_freq=100)
    batch = trainer._batch

    def poisoned():
        tokens_ABT = batch()
        if trainer.state.step == 3:
            tokens_ABT[1, 0, 5] = 279
        return tokens_ABT

    trainer._batch = poisoned
    with pytest.raises(NumericalError, match="update 4: "):
        trainer.run()
    training_run._train_step.clear_cache()
    assert load_checkpoint(out / "last.pt").step == trainer.state.step == 3


def test_a_run_compiles_once_and_donates(tmp_path, monkeypatch) -> None:
    static, donated = ("gradients_of", "graphdef", "train_config"), ("params", "optimizer", "before")
    for module, name, given in (
        (training_run, "_train_step", {"static_argnames": static, "donate_argnames": donated}),
        (training, "_validation", {"static_argnames": "graphdef"}),
    ):
        counted = chex.assert_max_traces(getattr(module, name).__wrapped__, n=1)
        monkeypatch.setattr(module, name, jax.jit(counted, **given))
    trainer = make(tmp_path / "run")
    old = jax.tree.leaves((trainer.state.params, trainer.state.optimizer))
    trainer.run(until=5)
    assert all(leaf.is_deleted() for leaf in old)
    other = make(tmp_path / "run", resume=True)
    other.run()
    chex.clear_trace_counter()


# train_step_mse ------------------------------------------------------------------------------------------------------


class Net(nnx.Module):
    """One layer with dropout, which counts how often it is traced."""

    traces = 0

    def __init__(self, rate: float = 0.0) -> None:
        self.linear = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(rate, rngs=nnx.Rngs(1))

    def __call__(self, x):
        type(self).traces += 1
        return self.linear(self.drop(x))


def batch_of(n: int):
    x = np.random.default_rng(0).standard_normal((n, 3), np.float32)
    return x, x.sum(axis=1, keepdims=True)


def test_mse_step_learns_and_returns_the_loss_before() -> None:
    model, optimizer = Net(), optax.sgd(0.1)
    x, y = batch_of(32)
    state = optimizer.init(nnx.state(model, nnx.Param))
    before = [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    expected = float(jnp.mean(jnp.square(model.linear(x) - y)))
    Net.traces, losses, new = 0, [], model
    for _ in range(50):
        new, state, loss = train_step_mse(new, (x, y), optimizer, state)
        losses.append(loss)
    assert Net.traces == 1
    assert abs(losses[0] - expected) <= 32 * np.finfo(np.float32).eps * expected
    assert type(losses[0]) is float
    assert losses[-1] < 0.01 * losses[0]
    after = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_mse_step_trains_with_dropout_and_leaves_the_given_model() -> None:
    """As torch's model.train() does; a model in evaluation mode compiles to the same program."""
    model, optimizer = Net(0.5), optax.adamw(0.1)
    model.eval()
    state = optimizer.init(nnx.state(model, nnx.Param))
    batch = batch_of(8)
    Net.traces = 0
    first, next_state, loss = train_step_mse(model, batch, optimizer, state)
    again, _, same = train_step_mse(model, batch, optimizer, state)
    assert loss == same
    assert model.drop.deterministic
    assert not first.drop.deterministic
    assert int(model.drop.rngs.count[...]) == 0
    assert int(first.drop.rngs.count[...]) == 1
    _, _, other = train_step_mse(first, batch, optimizer, next_state)
    assert other != loss
    assert Net.traces == 1
    chex.assert_trees_all_equal(nnx.state(first, nnx.Param), nnx.state(again, nnx.Param))


@pytest.mark.parametrize("shape", [(4,), (1, 4), (4, 2), ()])
def test_mse_step_broadcasts_nothing(shape) -> None:
    model, optimizer = Net(), optax.sgd(0.1)
    state = optimizer.init(nnx.state(model, nnx.Param))
    with pytest.raises(ValueError, match=r"y has shape .* and model\(x\) \(4, 1\)"):
        train_step_mse(model, (np.ones((4, 3), np.float32), np.ones(shape, np.float32)), optimizer, state)
    with pytest.raises(ValueError, match="not empty"):
        train_step_mse(model, (np.ones((0, 3), np.float32), np.ones((0, 1), np.float32)), optimizer, state)


def test_an_mse_step_on_a_nan_batch_raises_and_takes_lists() -> None:
    model, optimizer = nnx.Linear(3, 1, rngs=nnx.Rngs(0)), optax.adam(0.1)
    opt_state = optimizer.init(nnx.state(model, nnx.Param))
    with pytest.raises(NumericalError, match="no parameter was updated"):
        train_step_mse(model, (np.full((2, 3), np.nan, np.float32), np.zeros((2, 1), np.float32)), optimizer, opt_state)
    new, _, loss = train_step_mse(model, ([[1.0, 2.0, 3.0]], [[1.0]]), optimizer, opt_state)
    assert np.isfinite(loss)
    assert not np.array_equal(new.kernel[...], model.kernel[...])
