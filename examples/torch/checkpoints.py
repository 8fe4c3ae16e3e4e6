"""Checkpoints in PyTorch (exercise 8): made of every kind, inspected, loaded; and its three questions.

1. How many parameters does the model have? Inspection counts them, by module too. Summing over the values of a new
   checkpoint does not: those are dicts, and most numbers in the file are the optimizer's.
2. What happens if the architecture does not match the checkpoint? An error that lists every key which does not fit, and
   the model stays as it was. One thing no shape tells: the number of heads.
3. What information is stored in the new format? The weights, the states of optimizer, scheduler and scaler, the step
   and the best validation loss: all that training needs to go on. The other kinds hold weights only.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from omni_torch import (
    CheckpointError,
    ThinkerConfig,
    ThinkerLM,
    TrainConfig,
    Trainer,
    convert_checkpoint,
    inspect_checkpoint,
    load_checkpoint,
    load_report,
    load_weights,
    num_parameters,
    save_checkpoint,
    set_seed,
    token_stream,
)

CONFIG = ThinkerConfig(vocab_size=40, n_layers=2, d_model=32, n_heads=4, d_ff=64, dropout=0.0, ctx_len=16)
STEPS = 20


def make_trainer(folder: Path, resume: bool = False) -> Trainer:
    """A short run, kept in a folder. The texts count upwards, which is soon learned."""
    documents = [[3 + (first + i) % 37 for i in range(20)] for first in range(37)]
    ids, val_ids = (token_stream(part, bos_id=1, eos_id=2) for part in (documents[:30], documents[30:]))
    settings = TrainConfig(lr=0.01, max_steps=STEPS, batch_size=4, val_freq=10, checkpoint_freq=STEPS)
    return Trainer(CONFIG, settings, ids, val_ids, folder, resume=resume, quiet=True)


def make_model(config: ThinkerConfig = CONFIG) -> ThinkerLM:
    """A model with fresh weights."""
    set_seed(1)
    return ThinkerLM.from_config(config).eval()


def logits_of(model: ThinkerLM) -> np.ndarray:
    """What the model says of one text."""
    with torch.inference_mode():
        return model(torch.tensor([[1, 5, 6, 7, 8]])).numpy()


def look(folder: Path) -> None:
    """The exercise: what is in the file, and into a model with it."""
    checkpoint = load_checkpoint(folder / "best.pt")
    print(f"  kind: {checkpoint.kind}")
    print(f"  Step: {checkpoint.step}")
    print(f"  Best validation loss: {checkpoint.best_val_loss:.4f}")
    print(f"  Has optimizer state: {checkpoint.optimizer is not None}")
    print(f"  Has scheduler state: {checkpoint.scheduler is not None}")
    print(f"  Has scaler state: {checkpoint.scaler is not None}")
    check(checkpoint.kind == "full" and checkpoint.step == STEPS, "a new checkpoint, of the last validation")
    model = make_model()
    before = logits_of(model)
    load_weights(model, checkpoint)
    print("  Model loaded successfully!")
    check(not np.array_equal(logits_of(model), before), "the weights are others now")
    # Without a model at hand: config.json beside the file says what to build. So for a folder, whose best one it takes.
    built = ThinkerLM.from_checkpoint(folder)
    check(built.config == CONFIG, "the architecture is the one that was trained")
    check(np.array_equal(logits_of(built), logits_of(model)), "and so are the weights")


def every_kind(folder: Path) -> None:
    """The kinds of files, each written, inspected and loaded again."""
    source = folder / "best.pt"
    legacy, exchange, several = (folder / name for name in ("legacy.pt", "thinker.safetensors", "omni.pt"))
    dropped = convert_checkpoint(source, legacy, kind="legacy").dropped
    print(f"  left out in {legacy.name}: {', '.join(dropped)}")
    convert_checkpoint(source, exchange, kind="safetensors")
    weights = load_checkpoint(source).model
    projector = {"proj_a": {"weight": torch.ones(32, 8)}}
    save_checkpoint(several, model=weights, parts=projector, step=STEPS, best_val_loss=None)
    for path, kind in ((source, "full"), (legacy, "legacy"), (exchange, "safetensors"), (several, "multimodal")):
        found = inspect_checkpoint(path)
        held = ", ".join(name for name, there in found.states.items() if there) or "no training state"
        print(f"  {path.name}: {found.kind}, {found.parameters} parameters, {found.bytes} bytes, {held}")
        check(found.kind == kind, f"{path.name} is told by its content")
        check(found.parts == ({"proj_a": 256} if kind == "multimodal" else {}), "what is not the thinker is apart")
        again = load_checkpoint(path).model
        same = all(torch.equal(torch.as_tensor(again[key]), torch.as_tensor(weights[key])) for key in weights)
        check(again.keys() == weights.keys() and same, "not a bit of the weights has changed")


def question_1(folder: Path) -> None:
    """How many parameters does the model have?"""
    found = inspect_checkpoint(folder / "best.pt")
    for module, count in found.modules.items():
        print(f"  {module}: {count}")
    checkpoint = load_checkpoint(folder / "best.pt")
    summed = sum(value.numel() for value in checkpoint.model.values())
    check(found.parameters == summed == num_parameters(make_model()), "file, dict and model have the same number")
    check(found.bytes > 3 * 4 * found.parameters, "the file holds more: the optimizer's two moments of each as well")
    print(f"  Answer: {found.parameters}.")


def question_2(folder: Path) -> None:
    """What happens if model architecture doesn't match checkpoint?"""
    checkpoint = load_checkpoint(folder / "best.pt")
    wrong = make_model(
        ThinkerConfig(vocab_size=40, n_layers=3, d_model=32, n_heads=4, d_ff=48, dropout=0.0, ctx_len=16)
    )
    before = logits_of(wrong)
    report = load_report(wrong, checkpoint)
    print(f"  {str(report).splitlines()[0]}")
    check(not report.fits and len(report.missing) > 0, "the report, made beforehand, knows the third block's keys")
    try:
        load_weights(wrong, checkpoint)
        raise RuntimeError("not so: the wrong model refuses the weights")
    except CheckpointError as error:
        message = str(error)
        print("\n".join(f"  {line[:110]}" for line in message.splitlines()[:4]))
    check(all(key in message for key in (*report.missing, "blocks.0.mlp.gate_proj.weight")), "every key is listed")
    check(np.array_equal(logits_of(wrong), before), "and nothing of the model was changed")

    # Nothing but a config beside the file, or the caller, knows into how many heads d_model was cut.
    alone = folder / "alone"
    alone.mkdir()
    convert_checkpoint(folder / "best.pt", alone / "weights.pt", kind="legacy")
    try:
        ThinkerLM.from_checkpoint(alone / "weights.pt")
        raise RuntimeError("not so: without a config n_heads must be told")
    except ValueError as error:
        print(f"  {str(error).replace(str(alone), '...')[:160]}")
        check("n_heads" in str(error), "it says what it has to be told")
    # With the wrong number all shapes fit, and the model says something else.
    right, two = (logits_of(ThinkerLM.from_checkpoint(alone / "weights.pt", n_heads=n)) for n in (4, 2))
    check(np.array_equal(right, logits_of(ThinkerLM.from_checkpoint(folder))), "with 4 heads it is the model")
    check(not np.allclose(two, right), "with 2 it is not, and no error could say so")
    print("  Answer: an error that lists what does not fit; the model keeps the weights it had.")


def question_3(folder: Path) -> None:
    """What information is stored in the new checkpoint format?"""
    found = inspect_checkpoint(folder / "best.pt")
    print("\n".join(f"  {line}" for line in str(found).splitlines()[1:9]))
    expected = {"model", "optimizer", "scheduler", "scaler", "step", "best_val_loss"}
    check(expected <= set(found.keys), "at the top stand the six names that the exercise expects")
    check(found.states["optimizer"] and found.states["scheduler"], "what the next step depends on is there")
    # The proof of it: the run goes on from the file.
    resumed = make_trainer(folder, resume=True)
    check(resumed.state.step == STEPS and resumed.state.best_val_loss == found.best_val_loss, "a trainer stands there")
    print("  Answer: the weights, the states of optimizer, scheduler and scaler, the step, the best validation loss.")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        make_trainer(folder).run()
        for part in (look, every_kind, question_1, question_2, question_3):
            print(f"{part.__name__}: {part.__doc__}")
            part(folder)


def check(true: bool, claim: str) -> None:
    if not true:
        raise RuntimeError(f"not so: {claim}")


if __name__ == "__main__":
    main()
