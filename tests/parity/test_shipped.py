"""The shipped weights are what their sidecar says: the same files, the same losses, found anew from the files alone."""

from __future__ import annotations

import hashlib
import json
import runpy
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from omni_torch.checkpoint import load_checkpoint, load_weights  # noqa: E402
from omni_torch.config import ThinkerConfig  # noqa: E402
from omni_torch.thinker import ThinkerLM  # noqa: E402
from omni_torch.tokenizer import BPETokenizer  # noqa: E402
from parity import corpus, shipped  # noqa: E402

ROOT = Path(__file__).parents[2]
SIDECAR = shipped.read_sidecar()
RECIPE, LOSSES = SIDECAR["recipe"], SIDECAR["loss_nats_per_token"]
MARGIN = 0.5  # nats per token by which the model must beat the bigram
PRINTED = 10.0**-shipped.DIGITS  # one unit of the last decimal in the sidecar


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer(shipped.TOKENIZER)


@pytest.fixture(scope="module")
def text() -> str:
    return corpus.training_text(RECIPE["corpus_seed"], RECIPE["stories"], RECIPE["docs_every"])


@pytest.fixture(scope="module")
def train_ids(text, tokenizer) -> np.ndarray:
    return corpus.flat_ids(tokenizer.encode(line) for line in text.splitlines())


@pytest.fixture(scope="module")
def held_out_stories() -> list[str]:
    return list(corpus.stories(RECIPE["heldout_seed"], RECIPE["heldout_stories"], "heldout"))


@pytest.fixture(scope="module")
def held_out(held_out_stories, tokenizer) -> list[list[int]]:
    return [tokenizer.encode(story) for story in held_out_stories]


@pytest.fixture(scope="module")
def model():
    model = ThinkerLM.from_config(ThinkerConfig(**SIDECAR["config"]))
    return load_weights(model, load_checkpoint(shipped.WEIGHTS)).eval()


def test_what_ships_is_small_and_of_the_promised_shape():
    config = ThinkerConfig.from_json(shipped.CONFIG)
    assert config == ThinkerConfig(**SIDECAR["config"])
    assert config.use_gqa
    assert config.use_swiglu
    assert config.ctx_len == 512
    assert config.vocab_size <= 1024
    assert 250_000 <= SIDECAR["parameters"] <= 600_000
    files = (shipped.WEIGHTS, shipped.TOKENIZER, shipped.CONFIG, shipped.SIDECAR)
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20


def test_hashes(text, model):
    have = {
        "corpus": sha256(text.encode()),
        "docs": sha256(corpus.DOCS.read_text(encoding="utf-8").encode()),
        "tokenizer": sha256(shipped.TOKENIZER.read_bytes()),
        "weights": shipped.weights_digest({key: value.numpy() for key, value in model.state_dict().items()}),
        "file": sha256(shipped.WEIGHTS.read_bytes()),
    }
    assert have == SIDECAR["sha256"], "a part was changed after training: run scripts/train_shipped.py again"


def test_training_never_saw_the_held_out_stories(text, held_out_stories):
    assert len(set(held_out_stories)) == RECIPE["heldout_stories"]
    assert not [story for story in held_out_stories if story in text]
    lines = set(text.splitlines())
    validation = list(corpus.stories(RECIPE["validation_seed"], RECIPE["validation_stories"]))
    assert not lines & set(validation)


def test_held_out_losses_are_those_of_the_sidecar(model, train_ids, held_out):
    """The claim of the shipped weights: at least half a nat per token below the bigram, on stories nobody told them."""
    assert len(train_ids) == SIDECAR["tokens"]["corpus"]
    held_out_ids = corpus.flat_ids(held_out)
    ours = shipped.model_loss(model, corpus.padded_rows(held_out))
    bigram = corpus.bigram_loss(train_ids, held_out_ids)
    unigram = corpus.unigram_loss(train_ids, held_out_ids)
    assert ours <= bigram - MARGIN
    assert bigram < unigram
    nats = corpus.choice_nats(RECIPE["heldout_seed"], RECIPE["heldout_stories"], "heldout")
    predicted = sum(len(ids) + 1 for ids in held_out)  # its ids and EOS
    assert predicted == SIDECAR["tokens"]["heldout_predicted"]
    assert abs(ours - LOSSES["heldout"]) <= PRINTED
    assert abs(bigram - LOSSES["heldout_bigram"]) <= PRINTED
    assert abs(unigram - LOSSES["heldout_unigram"]) <= PRINTED
    assert abs(nats / predicted - LOSSES["heldout_grammar"]) <= PRINTED
    # Nobody beats the code length of the one who knows the grammar: a lower loss would mean that a target leaked.
    assert ours > LOSSES["heldout_grammar"]


def test_the_figure_needs_the_trained_weights(held_out):
    """Negative controls: fresh weights, and trained ones that see their tokens in another order, are far above."""
    torch.manual_seed(0)
    model = ThinkerLM.from_config(ThinkerConfig(**SIDECAR["config"]))
    few = held_out[:4]
    assert shipped.model_loss(model, corpus.padded_rows(few)) > LOSSES["heldout_bigram"]
    load_weights(model, load_checkpoint(shipped.WEIGHTS))
    backwards = corpus.padded_rows([ids[::-1] for ids in few])
    assert shipped.model_loss(model, backwards) > LOSSES["heldout_bigram"]


def test_every_document_fits_the_context(train_ids, held_out):
    starts = np.flatnonzero(np.append(train_ids, corpus.BOS) == corpus.BOS)
    assert np.diff(starts).max() <= SIDECAR["config"]["ctx_len"]
    assert max(map(len, held_out)) + 2 <= SIDECAR["config"]["ctx_len"]


def test_the_sample_is_the_models(model, tokenizer):
    sample = SIDECAR["sample"]
    assert sample["continuation"].startswith(shipped.greedy(model, tokenizer, sample["prompt"], 16))


def test_the_file_is_the_familys_full_format(model):
    saved = torch.load(shipped.WEIGHTS, map_location="cpu", weights_only=True)
    assert {"model", "optimizer", "scheduler", "scaler", "step", "best_val_loss"} <= set(saved)
    assert saved["scaler"] is None
    assert saved["step"] == SIDECAR["steps"] == RECIPE["max_steps"]
    assert abs(saved["best_val_loss"] - LOSSES["best_validation"]) <= PRINTED
    assert list(saved["model"]) == list(model.state_dict())

    # torch's own classes take their parts and hand out the same.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0)
    optimizer.load_state_dict(saved["optimizer"])
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == RECIPE["weight_decay"] == 0.1
    assert group["betas"] == tuple(RECIPE["betas"])
    assert len(saved["optimizer"]["state"]) == len(group["params"]) == len(list(model.parameters()))
    for index, parameter in enumerate(model.parameters()):
        entry = saved["optimizer"]["state"][index]
        assert set(entry) == {"step", "exp_avg", "exp_avg_sq"}
        assert entry["step"] == SIDECAR["steps"]
        assert entry["exp_avg"].shape == entry["exp_avg_sq"].shape == parameter.shape
        assert entry["exp_avg"].abs().max() > 0
        assert entry["exp_avg_sq"].min() >= 0
    last = group["lr"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    scheduler.load_state_dict(saved["scheduler"])
    assert scheduler.last_epoch == SIDECAR["steps"]
    assert scheduler.get_last_lr() == [last]
    assert abs(last / RECIPE["lr"] - 0.1) <= np.finfo(float).eps  # the end of the cosine


def test_the_recipe_is_the_familys():
    family = {"weight_decay": 0.1, "max_grad_norm": 1.0, "betas": [0.9, 0.999], "eps": 1e-8}
    assert {key: RECIPE[key] for key in family} == family
    assert 0 < RECIPE["warmup_steps"] < RECIPE["max_steps"]
    assert SIDECAR["config"]["dropout"] == 0.0
    script = runpy.run_path(str(ROOT / "scripts" / "train_shipped.py"))
    assert json.loads(json.dumps(asdict(script["Recipe"]()))) == RECIPE, "the recipe was changed: train again"
    assert asdict(script["CONFIG"]) == SIDECAR["config"]
    assert SIDECAR["versions"].keys() == {"python", "torch", "numpy", "sentencepiece"}


@pytest.mark.long
def test_the_command_repeats_and_resumes(tmp_path):
    """Four steps at once, and the same with a stop after two: the same files, byte for byte."""
    digests = []
    for name, stops in (("once", [[]]), ("twice", [["--stop-after", "2"], []])):
        out, work = tmp_path / name, tmp_path / f"{name}-work"
        for stop in stops:
            command = [sys.executable, "scripts/train_shipped.py", "--quiet", "--steps", "4", "--stories", "80"]
            done = subprocess.run(
                [*command, "--out", str(out), "--work", str(work), *stop], cwd=ROOT, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            assert ("going on from step 2" in done.stdout) == (name == "twice" and not stop)
        sidecar = json.loads((out / "thinker.json").read_text(encoding="utf-8"))
        del sidecar["cpu_seconds"]
        digests.append([sidecar, *(sha256((out / file).read_bytes()) for file in ("thinker.pt", "tokenizer.model"))])
        assert not list(work.iterdir())
    assert digests[0] == digests[1]


def test_a_trial_does_not_replace_what_ships():
    command = [sys.executable, "scripts/train_shipped.py", "--steps", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--out" in done.stderr


@pytest.mark.parametrize("side", ["jax", "torch"])
def test_the_shipped_omni_answers_what_it_has_never_met_in_either_twin(side) -> None:
    """Three quarters of the answers, at least; with a black picture or a silent clip, hardly more than by chance."""
    package = pytest.importorskip(f"omni_{side}")
    train = pytest.importorskip(f"omni_{side}.world_train")
    folder = ROOT / "parity" / "assets" / "omni"
    model = package.OmniLM.from_checkpoint(folder / "model.safetensors")
    model.eval()
    found = train.evaluate_world(model, package.BPETokenizer(folder / "tokenizer.model"), count=20)
    for figures in found.values():
        assert figures["accuracy"] >= 0.75
        assert figures["zeroed"] < figures["chance"] + 0.2


def test_the_sidecar_of_the_omni_holds_what_is_promised() -> None:
    figures = json.loads((ROOT / "parity" / "assets" / "omni" / "figures.json").read_text())["heldout"]
    for sense in ("pictures", "clips"):
        assert figures[sense]["accuracy"] >= 0.7
        assert figures[sense]["zeroed"] < 0.3
