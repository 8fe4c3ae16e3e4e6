"""Training on the toy world: files, resume, the evaluation, bad input. Small models and few rows."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from omni_jax import world_batch, world_train
from omni_jax.__main__ import app
from omni_jax.checkpoint import export_weights, load_checkpoint
from omni_jax.config import ThinkerConfig
from omni_jax.fusion import OmniLM
from omni_jax.omni_config import AudioConfig, OmniConfig, VisionConfig
from omni_jax.world_batch import Asked, share_right, world_questions, world_tokenizer, world_training
from omni_jax.world_train import evaluate_world, train_world

STEPS = 6

CONFIG = OmniConfig(
    thinker=ThinkerConfig(600, n_layers=1, d_model=32, n_heads=2, d_ff=32, dropout=0.0, ctx_len=128),
    audio=AudioConfig(d=16, heads=2, ff=16, layers=1, dropout=0.0, downsample_factor=8),
    vision=VisionConfig(img_size=48, patch=24, d=16, heads=2, ff=16, layers=1, dropout=0.0),
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A model and an update that take no time, and a look at three pictures and clips."""
    rows = {"_PICTURES": 2, "_CLIPS": 1, "_BOTH": 1, "_STORIES": 1}
    for name, value in rows.items():
        monkeypatch.setattr(world_batch, name, value)
    monkeypatch.setattr(world_train, "world_config", lambda: CONFIG)
    whole = world_train.evaluate_world
    monkeypatch.setattr(world_train, "evaluate_world", lambda *given, **named: whole(*given, **named | {"count": 3}))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("world") / "run"


def test_a_run_leaves_its_files(out) -> None:
    found = train_world(out, max_steps=STEPS, quiet=True)
    names = ["config.json", "last.pt", "metrics.json", "metrics.jsonl", "model.safetensors", "run.json"]
    assert sorted(path.name for path in out.iterdir()) == [*names, "tokenizer.model"]
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(found))
    assert found["steps"] == STEPS
    for split in ("heldout", "validation"):
        for sense in ("pictures", "clips"):
            figures = found[split][sense]
            assert 0.0 <= figures["accuracy"] <= 1.0
            assert 0.0 <= figures["zeroed"] <= 1.0
            assert 0.0 < figures["chance"] < 1.0
    assert found["heldout"]["clips"]["questions"] == 3
    assert load_checkpoint(out / "last.pt").step == STEPS
    assert OmniConfig.from_json(out / "config.json") == CONFIG
    whole, best = (export_weights(OmniLM.from_checkpoint(path)) for path in (out, out / "model.safetensors"))
    assert whole.keys() == best.keys()
    assert all(np.array_equal(np.asarray(whole[key]), np.asarray(best[key])) for key in whole)


def test_the_loss_falls(tmp_path) -> None:
    train_world(tmp_path, max_steps=40, quiet=True)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_resume_gives_the_same_bits(out, tmp_path) -> None:
    if not (out / "last.pt").exists():
        train_world(out, max_steps=STEPS, quiet=True)
    run = world_train._WorldRun(tmp_path, world_training(STEPS, 0), 1, resume=False, quiet=True)
    run.folder.write_tokenizer(run.tokenizer_file)
    run.run(until=2)
    assert load_checkpoint(tmp_path / "last.pt").step == 2
    train_world(tmp_path, max_steps=STEPS, resume=True, quiet=True)
    assert (tmp_path / "last.pt").read_bytes() == (out / "last.pt").read_bytes()
    assert (tmp_path / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_run_is_never_overwritten_or_resumed_with_other_settings(out, tmp_path) -> None:
    if not (out / "last.pt").exists():
        train_world(out, max_steps=STEPS, quiet=True)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=r"already holds a run.*--resume"):
        train_world(out, max_steps=STEPS, quiet=True)
    with pytest.raises(ValueError, match="max_steps was 6 and is 7"):
        train_world(out, max_steps=7, resume=True, quiet=True)
    with pytest.raises(ValueError, match="the text is another one"):
        train_world(out, max_steps=STEPS, difficulty=2, resume=True, quiet=True)
    with pytest.raises(ValueError, match="holds no run to resume"):
        train_world(tmp_path / "none", resume=True, quiet=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"difficulty": 4}, "difficulty = 4"), ({"max_steps": 0}, "max_steps=0"), ({"seed": -1}, "seed=-1")],
)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        train_world(tmp_path / "run", **settings)
    assert not list(tmp_path.iterdir())


def test_the_command_refuses_what_does_not_fit(tmp_path) -> None:
    for given, message in (
        (["--task", "world", "--text", "x"], "are for --task text"),
        (["--task", "song"], "must be text or world"),
        ([], "needs --config FILE and --text FILE"),
    ):
        ended = CliRunner().invoke(app, ["train", "--out", str(tmp_path / "run"), *given])
        assert ended.exit_code == 2, ended.stderr
        assert message in ended.stderr
    assert not list(tmp_path.iterdir())


def test_answers_are_judged_exactly_and_beside_the_commonest() -> None:
    questions = ["where?", "where?", "where?", "what colour is the ring?", "what colour is the cross?"]
    asked = Asked(questions, ["top left", "top left", "top right", "red", "blue"], [np.zeros(1)] * 5)
    judged = share_right(asked, [" top left", "top", "top right", "red", "red"])
    assert judged["accuracy"] == 0.6
    assert judged["chance"] == 0.6  # "top left" twice, and either colour once
    assert judged["by_question"] == {"where": 0.6667, "what colour": 0.5}
    assert judged["questions"] == 5


def test_the_evaluation_is_that_of_each_question_alone(monkeypatch) -> None:
    """In one batch with the others, and for the words of a model that always says the same."""
    tokenizer, _ = world_tokenizer()
    model = OmniLM.from_config(CONFIG)
    model.eval()
    pictures, clips = world_questions(0, "heldout", 3)
    for name, asked in (("pictures", pictures), ("clips", clips)):
        together = world_train._answers(model, tokenizer, name, asked, zeroed=False)
        alone = [
            world_train._answers(model, tokenizer, name, Asked([q], [a], [x]), zeroed=False)[0]
            for q, a, x in zip(*asked, strict=True)
        ]
        assert together == alone
    monkeypatch.setattr(world_train, "_answers", lambda model, tokenizer, name, asked, zeroed: asked.answers)
    found = evaluate_world(model, tokenizer, count=3)
    assert [found[sense]["accuracy"] for sense in ("pictures", "clips")] == [1.0, 1.0]
