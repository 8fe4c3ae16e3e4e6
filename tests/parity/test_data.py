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
    assert all(name in found.notes[0] for name in data.LOSSES)
    assert found.controls == []
    assert len(found.notes) == 1


def test_without_a_loss_its_control_is_named() -> None:
    found = data.run(Scope(precisions=("bfloat16",)), lambda *_: None)
    assert "none of them was asked for" in found.notes[0]
    assert len(found.notes) == 1
    assert all(name in found.notes[0] for name in (*data.LOSSES, "padding counted"))
    assert {shown.name for shown in found.controls} == set(data.CONTROLS) - {"padding counted"}
    assert all(shown.rejected for shown in found.controls)
    assert found.verdict is Verdict.AGREE


def test_the_last_start_exists() -> None:
    """A row tells where it begins, and in one stream the last document begins exactly at len − length."""
    ids, length = data.STREAMS["last document just fills a row"]
    assert ids[len(ids) - length] == data.BOS
    assert data.BOS not in ids[len(ids) - length + 1 :]
    for ids, length in data.STREAMS.values():
        rows = [tuple(ids[s : s + length]) for s in range(len(ids) - length + 1)]
        assert len(set(rows)) == len(rows)
    truth = data.expected(data.seen("jax"))
    assert truth["token_batch: starts, last document just fills a row"].tolist()[-1] == len(data.STREAM) - 7
    assert truth["token_batch: starts, last document too short"].tolist()[-1] < len(data.STREAM) - 11


@pytest.mark.parametrize("seed", [1, 5, 2**40, 2**64 - 1])
def test_other_seeds(seed) -> None:
    """They give other bytes, which agree as well; the caller's generator is where it was."""
    state = torch.random.get_rng_state()
    found = {side: data.seen(side, seed) for side in TWINS}
    rows = data.exact_rows(found["jax"], found["torch"], data.expected(found["jax"], seed))
    assert [row for row in rows if row.verdict is not Verdict.AGREE] == []
    assert torch.equal(torch.random.get_rng_state(), state)
    usual = data.seen("torch")
    changed = {name for name, x in found["torch"].items() if x.shape != usual[name].shape or np.any(x != usual[name])}
    kinds = ("epoch_order: bytes", "make_dataloader: items, shuffled", "make_dataloader: items of crops")
    assert {*kinds, *(f"token_batch: bytes, {name}" for name in data.STREAMS if name != "one place")} <= changed


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
    return access(lambda self, idx, clean: change(self, clean(self, idx)), dataset)


def access(change: Callable[[Any, Any, Callable[..., Any]], Any], dataset: str) -> Callable[[Patch, Any], None]:
    """A bug in what a dataset gives for an index: change(dataset, index, clean access)."""

    def inject(patch: Patch, twin: Any) -> None:
        clean = getattr(twin, dataset).__getitem__
        patch.setattr(getattr(twin, dataset), "__getitem__", lambda self, idx: change(self, idx, clean))

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


def of_the_first_row(self: Any, idx: int, clean: Callable[..., Any]) -> Any:
    """The right start, but the tokens of row 0."""
    start = int(clean(self, idx)[0]) - int(self.tokens[idx, 0])
    return self.tokens[0, start : start + self.crop_len]


LAST, CROPS = "last document just fills a row", "RandomCropSequenceDataset: whole crops"
PADDING = ("pad_1d_sequences: padding_mask", "collate_next_token_batch: padding_mask")
ORDERS = ("shuffled", "in order")
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
        (f"token_batch: bytes, {LAST}",),
    ),
    "seed ignored": (
        patched("token_batch", lambda clean: lambda ids, b, n, seed, step: clean(ids, b, n, 0, step)),
        (f"token_batch: bytes, {LAST}",),
    ),
    "step in 32 bits": (
        patched("token_batch", lambda clean: lambda ids, b, n, seed, step: clean(ids, b, n, seed, step % 2**32)),
        (f"token_batch: bytes, {LAST}",),
    ),
    "batches of int64": (
        patched("token_batch", lambda clean: lambda *a: clean(*a).astype(np.int64)),
        (f"token_batch: bytes, {LAST}",),
    ),
    "rows off by one": (
        patched("token_batch", lambda clean: lambda ids, *a: np.roll(clean(np.roll(ids, 1), *a), 1)),
        (f"token_batch: starts, {LAST}", "token_batch: starts, no BOS"),
    ),
    "one order for all epochs": (
        patched("epoch_order", lambda clean: lambda n, seed, epoch: clean(n, seed, 0)),
        ("epoch_order: bytes", "epoch_order: the orders differ", "make_dataloader: items, shuffled"),
    ),
    "an item twice": (
        patched("epoch_order", lambda clean: lambda *a: np.maximum(clean(*a), 1)),
        ("epoch_order: sorted",),
    ),
    "no EOS": (
        patched("token_stream", lambda clean: lambda docs, bos, eos: clean(docs, bos, eos)[:-1]),
        ("token_stream",),
    ),
    "last start left out": (
        patched("token_batch", lambda clean: lambda ids, *a: clean(ids[:-1], *a)),
        (f"token_batch: starts, {LAST}", f"token_batch: bytes, {LAST}", "token_batch: starts, no BOS"),
    ),
    "zeros without BOS": (
        patched("token_batch", lambda clean: lambda ids, *a: clean(ids, *a) * np.int32(data.BOS in ids)),
        ("token_batch: starts, no BOS", "token_batch: bytes, no BOS", "token_batch: starts, one place"),
    ),
    "zeros without BOS in time": (
        patched(
            "token_batch", lambda clean: lambda ids, b, n, *a: clean(ids, b, n, *a) * np.int32(data.BOS in ids[:-n])
        ),
        ("token_batch: starts, BOS too late",),
    ),
    "crop of one token": (
        access(lambda self, i, clean: clean(self, i)[:1], "RandomCropSequenceDataset"),
        (CROPS, "make_dataloader: items of crops"),
    ),
    "crop of row 0": (
        access(of_the_first_row, "RandomCropSequenceDataset"),
        (CROPS, "make_dataloader: items of crops"),
    ),
    "item of row 0": (
        access(lambda self, i, clean: clean(self, 0), "NextTokenDataset"),
        ("NextTokenDataset: input_ids", "NextTokenDataset: target_ids", "make_dataloader: items, in order"),
    ),
    "pair of row 0": (
        access(lambda self, i, clean: (clean(self, i)[0], clean(self, 0)[1]), "TensorPairDataset"),
        ("TensorPairDataset: y", "make_dataloader: y of pairs"),
    ),
    "drop_last ignored": (
        patched(
            "make_dataloader",
            lambda clean: lambda ds, n, shuffle=True, drop_last=False, **k: clean(ds, n, shuffle, **k),
        ),
        tuple(f"make_dataloader: shapes, {order}, drop_last{end}" for order in ORDERS for end in ("", ", no seed")),
    ),
    "shuffle ignored": (
        patched("make_dataloader", lambda clean: lambda ds, n, shuffle=True, *a, **k: clean(ds, n, True, *a, **k)),
        ("make_dataloader: items, in order", "make_dataloader: items, in order, drop_last, no seed"),
    ),
    "never shuffled": (
        patched("make_dataloader", lambda clean: lambda ds, n, shuffle=True, *a, **k: clean(ds, n, False, *a, **k)),
        ("make_dataloader: items, shuffled", "make_dataloader: items, shuffled, no seed"),
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


SAME_IN_BOTH = {
    "last start left out",
    "rows off by one",
    "zeros without BOS",
    "crop of one token",
    "crop of row 0",
    "item of row 0",
    "drop_last ignored",
    "one order for all epochs",
    "seed ignored",
    "step ignored",
}
"""Bugs that leave the twins equal."""
PROPERTIES = {
    "one order for all epochs": "epoch_order: the orders differ",
    "seed ignored": "token_batch: the batches differ",
    "step ignored": "token_batch: the batches differ",
}
"""Where the bytes are equal, and wrong, something else must tell."""


@pytest.mark.parametrize("bug", sorted(SAME_IN_BOTH))
def test_a_bug_in_both_twins_is_named(monkeypatch, bug) -> None:
    still = patched("token_batch", lambda clean: lambda ids, b, n, seed, step: clean(ids, b, n, seed, 0))
    inject, names = BUGS.get(bug, (still, ()))
    for twin in TWINS.values():
        inject(monkeypatch, twin)
    found = {side: data.seen(side, 3) for side in TWINS}
    rows = data.exact_rows(found["jax"], found["torch"], data.expected(found["jax"], 3))
    wrong = {row.name: row.evidence for row in rows if row.verdict is Verdict.DIFFER}
    told = PROPERTIES.get(bug, names[0] if names else "")
    assert all(f"{side}: " in wrong[told] for side in TWINS)


@pytest.mark.parametrize("sides", [("jax",), ("torch",), ("jax", "torch")], ids="+".join)
@pytest.mark.parametrize(
    "bug",
    [
        "last start left out",
        "crop of one token",
        "crop of row 0",
        "item of row 0",
        "zeros without BOS",
        "drop_last ignored",
    ],
)
def test_the_run_says_differ(monkeypatch, bug, sides) -> None:
    for side in sides:
        BUGS[bug][0](monkeypatch, TWINS[side])
    found = data.run(Scope(precisions=("bfloat16",), controls=False), lambda *_: None)
    assert found.verdict is Verdict.DIFFER
    assert found.exit_code == 1


def starts_bug(kind: str) -> Callable[[Patch, Any], None]:
    def change(self: Any, idx: int, clean: Callable[..., Any]) -> Any:
        start = int(clean(self, idx)[0]) - int(self.tokens[idx, 0])
        if kind == "last start never":
            start %= data.STARTS - 1
        elif kind == "early starts oftener":
            start = min(start, start * 7 % data.STARTS)
        elif kind == "one start for all":
            start = 3
        elif kind == "of row 0":
            idx = 0
        elif kind == "one short":
            return self.tokens[idx, start : start + self.crop_len - 1]
        elif kind == "first token repeated":
            return self.tokens[idx, [start] * self.crop_len]
        return self.tokens[idx, start : start + self.crop_len]

    return access(change, "RandomCropSequenceDataset")


CONTENT = ["of row 0", "one short", "first token repeated"]


@pytest.mark.parametrize("side", TWINS)
@pytest.mark.parametrize("kind", ["last start never", "early starts oftener", "one start for all", *CONTENT])
def test_unfair_crops_are_named(monkeypatch, kind, side) -> None:
    starts_bug(kind)(monkeypatch, TWINS[side])
    starts = {(s, mode): x for s in TWINS for mode, x in data.crop_starts(s, 0).items()}
    wrong = {row.name: row.evidence for row in data._crop_rows(starts) if row.verdict is Verdict.DIFFER}
    modes = ("by access", "by epoch", "by item")
    assert all(("no whole piece" in evidence) == (kind in CONTENT) for evidence in wrong.values())
    assert set(wrong) == {f"RandomCropSequenceDataset: starts {mode} ({side})" for mode in modes}


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
