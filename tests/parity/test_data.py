"""The data check: it agrees, its controls are rejected, and bugs put into either twin are named by their row."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("jax")

import omni_jax.data  # noqa: E402
import omni_torch.data  # noqa: E402
from parity.checks import Scope, data  # noqa: E402
from parity.verdict import Verdict  # noqa: E402

TWINS: dict[str, Any] = {"jax": omni_jax.data, "torch": omni_torch.data}
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def result(one_thread):
    seen = []
    found = data.run(Scope(), lambda done, total, label: seen.append((done, total)))
    assert seen[-1] == (3, 3)
    return found


def test_the_run_agrees(result) -> None:
    assert [row for row in result.rows if row.verdict is not Verdict.AGREE] == []
    assert result.verdict is Verdict.AGREE
    assert result.exit_code == 0
    names = {(row.precision, row.name) for row in result.rows}
    assert {(p, name) for p in data.PRECISIONS for name in data.LOSSES} <= names
    for field in ("input_ids", "target_ids", "attention_mask", "padding_mask"):
        assert ("exact", f"collate_next_token_batch: {field}") in names
        assert ("exact", f"make_dataloader: {field}, epoch 1") in names
    assert len(names) == len(result.rows)


@pytest.mark.parametrize("control", data.CONTROLS)
def test_the_control_is_rejected(result, control) -> None:
    (shown,) = [found for found in result.controls if found.name == control]
    assert shown.rejected, shown.evidence
    assert shown.evidence


def test_what_the_losses_are_taken_of(result) -> None:
    """The judged rows have one length, are padded in the batch, and hold a token that equals the pad value."""
    judged = data.SEQUENCES[: data.JUDGED]
    assert len({len(s) for s in judged}) == 1 < len(judged)
    assert len(judged[0]) < max(map(len, data.SEQUENCES))
    assert all(data.PAD in s[1:-1] for s in judged)


def test_only_the_precisions_asked_for() -> None:
    found = data.run(Scope(precisions=("bfloat16",), controls=False), lambda *_: None)
    assert {row.precision for row in found.rows} == {"exact", "draws"}
    assert "none of them was asked for" in found.notes[0]
    assert found.controls == []


def test_importing_the_check_imports_no_framework() -> None:
    code = "import sys, parity.checks.data; print([m for m in ('jax', 'torch', 'flax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- bugs in a twin --------------------------------------------------------------------------------------------------


def patched(name: str, change: Callable[[Any], Callable[..., Any]]) -> Callable[[Patch, Any], None]:
    """A bug that puts change(clean function) in a function's place."""
    return lambda patch, twin: patch.setattr(twin, name, change(getattr(twin, name)))


def item(change: Callable[[Any, Any], Any], dataset: str) -> Callable[[Patch, Any], None]:
    """A bug in a dataset's items."""

    def inject(patch: Patch, twin: Any) -> None:
        clean = getattr(twin, dataset).__getitem__
        patch.setattr(getattr(twin, dataset), "__getitem__", lambda self, idx: change(self, clean(self, idx)))

    return inject


def mask_of(change: Callable[[Any], Any]) -> Callable[[Patch, Any], None]:
    """A bug in the mask that padding gives."""

    def wrap(clean):
        def padded(seqs, pad_value=0):
            batch = clean(seqs, pad_value)
            return dataclasses.replace(batch, padding_mask=change(batch))

        return padded

    return patched("pad_1d_sequences", wrap)


def one_late(batch: Any) -> Any:
    mask = batch.padding_mask & False
    mask[:, 1:] = batch.padding_mask[:, :-1]
    return mask


PADDING = ("pad_1d_sequences: padding_mask", "collate_next_token_batch: padding_mask")
BUGS: dict[str, tuple[Callable[[Patch, Any], None], tuple[str, ...]]] = {
    "mask inverted": (mask_of(lambda b: ~b.padding_mask), PADDING),
    "mask from values": (mask_of(lambda b: b.tokens == 0), PADDING),
    "mask one late": (mask_of(one_late), PADDING),
    "mask of integers": (mask_of(lambda b: b.padding_mask * b.lengths[:, None]), PADDING[:1]),
    "targets not shifted": (
        item(lambda self, pair: (pair[0], pair[0]), "NextTokenDataset"),
        ("collate_next_token_batch: target_ids", "make_dataloader: target_ids, epoch 0"),
    ),
    "next step": (
        patched("token_batch", lambda clean: lambda ids, b, n, seed, step: clean(ids, b, n, seed, step + 1)),
        ("token_batch: bytes",),
    ),
    "seed ignored": (
        patched("token_batch", lambda clean: lambda ids, b, n, seed, step: clean(ids, b, n, 0, step)),
        ("token_batch: bytes",),
    ),
    "step in 32 bits": (
        patched("token_batch", lambda clean: lambda ids, b, n, seed, step: clean(ids, b, n, seed, step % 2**32)),
        ("token_batch: bytes",),
    ),
    "batches of int64": (
        patched("token_batch", lambda clean: lambda *a: clean(*a).astype(np.int64)),
        ("token_batch: bytes",),
    ),
    "rows off by one": (
        patched("token_batch", lambda clean: lambda ids, *a: np.roll(clean(np.roll(ids, 1), *a), 1)),
        ("token_batch: rows that begin a document",),
    ),
    "one order for all epochs": (
        patched("epoch_order", lambda clean: lambda n, seed, epoch: clean(n, seed, 0)),
        ("epoch_order: bytes", "make_dataloader: input_ids, epoch 1"),
    ),
    "an item twice": (
        patched("epoch_order", lambda clean: lambda *a: np.maximum(clean(*a), 1)),
        ("epoch_order: sorted",),
    ),
    "no EOS": (
        patched("token_stream", lambda clean: lambda docs, bos, eos: clean(docs, bos, eos)[:-1]),
        ("token_stream",),
    ),
}


@pytest.mark.parametrize("side", TWINS)
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_the_bytes_is_named(monkeypatch, bug, side) -> None:
    inject, names = BUGS[bug]
    clean = data.seen("torch" if side == "jax" else "jax")
    truth = data.expected(data.seen("jax"))
    inject(monkeypatch, TWINS[side])
    seen = {side: data.seen(side)}
    seen["torch" if side == "jax" else "jax"] = clean
    wrong = {row.name: row.evidence for row in data.exact_rows(seen["jax"], seen["torch"], truth) if row.excess}
    assert set(names) <= set(wrong)
    assert all(evidence.startswith(f"{side}: ") for evidence in wrong.values())


def starts_bug(kind: str) -> Callable[[Patch, Any], None]:
    def change(self: Any, crop: Any) -> Any:
        start = int(crop[0])
        if kind == "last start never":
            start %= data.STARTS - 1
        elif kind == "early starts oftener":
            start = min(start, start * 7 % data.STARTS)
        elif kind == "one start for all":
            start = 3
        row = self.tokens[0]
        return row[start : start + self.crop_len]

    return item(change, "RandomCropSequenceDataset")


@pytest.mark.parametrize("side", TWINS)
@pytest.mark.parametrize("kind", ["last start never", "early starts oftener", "one start for all"])
def test_unfair_crops_are_named(monkeypatch, kind, side) -> None:
    starts_bug(kind)(monkeypatch, TWINS[side])
    starts = {(s, mode): x for s in TWINS for mode, x in data.crop_starts(s, 0).items()}
    wrong = {row.name for row in data._crop_rows(starts) if row.verdict is Verdict.DIFFER}
    modes = ("by access", "by epoch", "by item")
    assert wrong == {f"RandomCropSequenceDataset: starts {mode} ({side})" for mode in modes}


def test_a_repeating_generator_is_named(monkeypatch) -> None:
    """Fair starts, each drawn twice: only their correlation shows it."""
    starts = {(s, mode): x for s in TWINS for mode, x in data.crop_starts(s, 0).items()}
    starts["torch", "by access"] = np.repeat(starts["torch", "by access"], 2)
    wrong = [(row.name, row.evidence) for row in data._crop_rows(starts) if row.verdict is Verdict.DIFFER]
    assert [name for name, _ in wrong] == ["RandomCropSequenceDataset: starts by access (torch)"]
    assert wrong[0][1].startswith("lag 1")


@pytest.mark.parametrize("bug", ["mask inverted", "mask from values", "targets not shifted"])
def test_a_bug_in_padding_changes_the_loss_and_is_named(monkeypatch, one_thread, bug) -> None:
    """On the torch side, so that nothing is compiled; the JAX side is judged as it was."""
    BUGS[bug][0](monkeypatch, TWINS["torch"])
    found = data.run(Scope(controls=False), lambda *_: None)
    assert found.verdict is Verdict.DIFFER
    wrong = {(row.precision, row.name) for row in found.rows if row.verdict is Verdict.DIFFER}
    losses = data.LOSSES if bug == "targets not shifted" else data.LOSSES[1:]
    assert {(p, name) for p in data.PRECISIONS for name in losses} <= wrong
