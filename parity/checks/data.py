"""Data: the same bytes from both twins, what the masks mean, a loss that padding does not touch, fair random crops."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from parity import statistics as st
from parity.checks import Progress, Scope
from parity.result import CheckResult, Control, Row
from parity.verdict import Verdict, accepts

__all__ = ["BLIND", "CLAIM", "CONTROLS", "PRECISIONS", "crop_starts", "exact_rows", "expected", "run", "seen"]

NAME = "data"
CLAIM = (
    "For the same (seed, step) and the same (seed, epoch) both twins give the same bytes; padding, collating and "
    "loading give equal fields, and masks that mean the same; the loss of a model is the same with and without "
    "padding, left or right, up to rounding; and each twin's own generator starts its random crops uniformly and "
    "independently."
)
BLIND = (
    "Other arguments than those tried; several workers or threads, and prefetching (the twins' tests have them); "
    "torch's order without a seed; gradients under padding; deviations of the crops below those printed (`smallest "
    "seen`), and dependence beyond neighbours. The bytes are compared with each other: that their draws are good is "
    "seen only in that rows begin documents, that orders are permutations and that the next step differs."
)
CONTROLS = {
    "mask inverted": "padding_mask where attention_mask belongs",
    "padding from values": "a mask that takes a real token equal to pad_value for padding",
    "targets not shifted": "every position asked for the token it was given",
    "padding counted": "the loss divided by all B x T positions",
    "next step": "the token batch of the step after",
    "a start left out": "random crops that never begin at the last place",
}
PRECISIONS = ("float64", "float32")
"""Of the loss; bytes and crops have none."""

BOS, EOS, PAD = 1, 2, 0
DOCUMENTS = [[3 + (7 * i * i + j) % 50 for j in range(1 + i % 9)] for i in range(23)]
STEPS = ((0, 0), (0, 1), (5, 2**31), (5, 2**63))
"""(seed, step) of the token batches; the same as (seed, epoch) of the orders."""
SEQUENCES = [
    [BOS, 9, PAD, 14, 33, 7, EOS],
    [BOS, 21, 40, 8, 8, PAD, EOS],
    [BOS, PAD],
    [BOS, 5, 5, 5, 5, 28, 17, 11, 30, EOS],
]
"""Of unequal length, with real tokens that equal the pad value."""
JUDGED = 2
"""The first of them, whose loss is taken: of one length, so that one program does them without padding."""
BATCH = 3
CONFIG = "mha-swiglu"
LOSSES = ("loss, unpadded", "loss, padded right", "loss, padded left")
STARTS = 16
"""Places where a crop may begin."""
DRAWS = 1200

Arrays = dict[str, np.ndarray]


def run(scope: Scope, progress: Progress) -> CheckResult:
    """Compare bytes and fields, judge the losses in noise units, test the crops."""
    started = time.perf_counter()
    result = CheckResult(NAME)
    progress(0, 3, "bytes and fields")
    found = {side: seen(side) for side in ("jax", "torch")}
    truth = expected(found["jax"])
    result.rows += exact_rows(found["jax"], found["torch"], truth)
    progress(1, 3, "random crops")
    starts = {(side, mode): x for side in ("jax", "torch") for mode, x in crop_starts(side, scope.seed).items()}
    result.rows += _crop_rows(starts)
    progress(2, 3, "losses")
    rows, controls, notes = _losses(scope)
    result.rows += rows
    result.notes += notes
    if scope.controls:
        result.controls = _merged([*_exact_controls(truth), *controls, _crop_control(starts)])
    result.seconds = time.perf_counter() - started
    progress(3, 3, "")
    return result


# ------------------------------------------------------------------------------------------------ bytes and fields


def seen(side: str) -> Arrays:
    """What one twin gives, as numpy arrays by name. The twins mirror each other, so one program asks both."""
    data, array = _twin(side)
    stream = data.token_stream(DOCUMENTS, BOS, EOS)
    batches = [data.token_batch(stream, 5, 11, seed, step) for seed, step in STEPS]
    orders = [data.epoch_order(29, seed, epoch) for seed, epoch in STEPS]
    text, begins = stream.tolist(), [i for i, token in enumerate(stream) if token == BOS]
    pieces = {tuple(text[i : i + 11]) for i in begins}
    found: Arrays = {
        "token_stream": stream,
        "token_batch: bytes": np.frombuffer(b"".join(batch.tobytes() for batch in batches), np.uint8),
        "token_batch: rows that begin a document": np.array([tuple(r) in pieces for b in batches for r in b.tolist()]),
        "epoch_order: bytes": np.frombuffer(b"".join(order.tobytes() for order in orders), np.uint8),
        "epoch_order: sorted": np.array([np.sort(order) for order in orders]),
    }
    padded = data.pad_1d_sequences([array(s) for s in SEQUENCES], PAD)
    found |= {f"pad_1d_sequences: {name}": getattr(padded, name) for name in ("tokens", "lengths", "padding_mask")}
    items = _items(data, array)
    collated = data.collate_next_token_batch(items, PAD)
    found |= {f"collate_next_token_batch: {name}": value for name, value in collated.items()}
    loader = data.make_dataloader(items, BATCH, collate_fn=data.collate_next_token_batch, seed=3)
    for epoch in range(2):
        batches = list(loader)
        for name in collated:
            found[f"make_dataloader: {name}, epoch {epoch}"] = np.concatenate([_flat(b[name]) for b in batches])
    return {name: np.asarray(value) for name, value in found.items()}


def expected(jax: Mapping[str, np.ndarray]) -> Arrays:
    """The same by plain lists; what is random is taken from the JAX side."""
    stream = [token for document in DOCUMENTS for token in (BOS, *document, EOS)]
    orders = {epoch: _order(epoch) for epoch in range(2)}
    whole = _padded([(s, s) for s in SEQUENCES])
    truth = {
        "token_stream": stream,
        "token_batch: bytes": jax["token_batch: bytes"],
        "token_batch: rows that begin a document": [True] * (5 * len(STEPS)),
        "epoch_order: bytes": jax["epoch_order: bytes"],
        "epoch_order: sorted": [list(range(29))] * len(STEPS),
        "pad_1d_sequences: tokens": whole["input_ids"],
        "pad_1d_sequences: lengths": [len(s) for s in SEQUENCES],
        "pad_1d_sequences: padding_mask": whole["padding_mask"],
    }
    pairs = [(s[:-1], s[1:]) for s in SEQUENCES]
    truth |= {f"collate_next_token_batch: {name}": rows for name, rows in _padded(pairs).items()}
    for epoch, order in orders.items():
        batches = [_padded([pairs[i] for i in order[at : at + BATCH]]) for at in range(0, len(order), BATCH)]
        for name in batches[0]:
            flat = [x for batch in batches for row in batch[name] for x in row]
            truth[f"make_dataloader: {name}, epoch {epoch}"] = flat
    return {name: np.asarray(value) for name, value in truth.items()}


def _order(epoch: int) -> list[int]:
    from omni_jax.data import epoch_order

    return epoch_order(len(SEQUENCES), 3, epoch).tolist()


def _padded(pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, list[list[Any]]]:
    """The padded batch, written without arrays; True in attention_mask is a token, True in padding_mask is padding."""
    width = max(len(inputs) for inputs, _ in pairs)
    keep = [[t < len(inputs) for t in range(width)] for inputs, _ in pairs]
    return {
        "input_ids": [inputs + [PAD] * (width - len(inputs)) for inputs, _ in pairs],
        "target_ids": [targets + [PAD] * (width - len(targets)) for _, targets in pairs],
        "attention_mask": keep,
        "padding_mask": [[not kept for kept in row] for row in keep],
    }


def exact_rows(jax: Mapping[str, np.ndarray], torch: Mapping[str, np.ndarray], truth: Arrays) -> list[Row]:
    """One row a field: both sides must be equal to the truth in every value, shape and kind (bool or integer)."""
    rows = []
    for name in dict.fromkeys([*truth, *jax, *torch]):
        faults = [
            f"{side}: {fault}" for side, x in (("jax", jax), ("torch", torch)) if (fault := _fault(name, x, truth))
        ]
        shape = truth[name].shape if name in truth else ()
        verdict = Verdict.DIFFER if faults else Verdict.AGREE
        words = "; ".join(faults) or f"all {truth[name].size} values equal"
        rows.append(Row(NAME, "", "", "exact", name, verdict, words, shape=shape, excess=np.inf if faults else 0.0))
    return rows


def _fault(name: str, side: Mapping[str, np.ndarray], truth: Arrays) -> str:
    """What is wrong with one field of one side, in words; empty if nothing is."""
    if name not in truth or name not in side:
        return f"has no {name}" if name not in side else f"has {name}, which nobody expects"
    x, y = side[name], truth[name]
    if x.shape != y.shape:
        return f"shape {x.shape} for {y.shape}"
    if (x.dtype.kind == "b") != (y.dtype.kind == "b") or x.dtype.kind not in "biu":
        return f"dtype {x.dtype} for {y.dtype}"
    wrong = np.argwhere(x != y)
    return f"{len(wrong)} of {x.size} values differ, the first at {wrong[0].tolist()}" if len(wrong) else ""


def _exact_controls(truth: Arrays) -> list[Control]:
    from omni_jax.data import token_batch

    data, array = _twin("jax")
    collated = data.collate_next_token_batch(_items(data, array), PAD)
    stream = data.token_stream(DOCUMENTS, BOS, EOS)
    later = b"".join(token_batch(stream, 5, 11, seed, step + 1).tobytes() for seed, step in STEPS)
    name = "collate_next_token_batch: attention_mask"
    shown = {
        "mask inverted": (name, ~collated["attention_mask"]),
        "padding from values": (name, collated["input_ids"] != PAD),
        "targets not shifted": ("collate_next_token_batch: target_ids", collated["input_ids"]),
        "next step": ("token_batch: bytes", np.frombuffer(later, np.uint8)),
    }
    controls = []
    for control, (field, wrong) in shown.items():
        fault = _fault(field, {field: wrong}, truth)
        controls.append(Control(control, bool(fault), f"{field.split(': ')[1]}: {fault or 'passed'}"))
    return controls


def _twin(side: str) -> tuple[Any, Callable[[list[int]], Any]]:
    """The data module of a twin, and how a list of ids becomes an array of its own."""
    if side == "jax":
        from omni_jax import data

        return data, lambda ids: np.asarray(ids, np.int32)
    import torch

    from omni_torch import data

    return data, lambda ids: torch.tensor(ids, dtype=torch.long)


def _items(data: Any, array: Callable[[list[int]], Any]) -> list[Any]:
    return [data.NextTokenDataset(array(s)[None])[0] for s in SEQUENCES]


def _flat(x: Any) -> np.ndarray:
    return np.asarray(x).reshape(-1)


# ------------------------------------------------------------------------------------------------ losses


def _losses(scope: Scope) -> tuple[list[Row], list[Control], list[str]]:
    """The loss of one model on padded rows, each side's batch by its own collate, against the unpadded reference."""
    import jax

    import omni_jax.losses
    import omni_torch.losses
    from parity.fixtures import twins, weights_of
    from parity.judge import Judge
    from parity.pair import Pair
    from parity.precision import resolve_device, unit_roundoff
    from parity.sides import TorchSide

    made = twins(CONFIG).pair
    assert made.torch_call is not None
    call = made.torch_call
    (ours, array), (theirs, tensor) = _twin("jax"), _twin("torch")

    def jax_losses(params):
        logits = lambda tokens, mask: made.jax(params, tokens, None, mask, None)["logits"]  # noqa: E731
        return _three(logits, omni_jax.losses.cross_entropy, _items(ours, array), ours, np.asarray)

    def torch_losses(net):
        import torch

        logits = lambda tokens, mask: call(net, tokens, None, mask, None)["logits"]  # noqa: E731
        device = next(net.parameters()).device
        return _three(
            logits,
            omni_torch.losses.cross_entropy,
            _items(theirs, tensor),
            theirs,
            lambda x: torch.as_tensor(np.array(x), device=device),
        )

    pair = Pair(
        jax=jax_losses,
        torch=made.torch,
        template=made.template,
        links=made.links,
        taps={},
        name=NAME,
        torch_call=torch_losses,
        hasty=True,
    )
    judge = Judge(pair, draws=scope.draws, seed=scope.seed, devices=resolve_device(scope.device), device=scope.device)
    weights = weights_of(CONFIG, "randomised", scope.seed)
    wrong_pair = copy.copy(pair)
    wrong_pair.torch_call = lambda net: _wrong(
        lambda tokens, mask: call(net, tokens, None, mask, None)["logits"],
        omni_torch.losses.cross_entropy,
        {k: v[:JUDGED] for k, v in theirs.collate_next_token_batch(_items(theirs, tensor), PAD).items()},
    )
    rows, controls, notes = [], [], []
    for precision in [p for p in PRECISIONS if p in scope.precisions]:
        model = judge.noise(weights, (), precision)
        reference = pair.named(jax.tree.unflatten(model.tree, model.reference))[LOSSES[0]]
        findings = judge(weights, (), precision, oracle=dict.fromkeys(LOSSES, reference))
        rows += findings.rows(NAME, CONFIG, "randomised")
        if scope.controls:
            noise = findings.values[LOSSES[1]][3]
            wide, unit = precision == "float64", unit_roundoff(precision)
            values, _ = TorchSide(wrong_pair)(weights, (), precision)
            for name, value in values.items():
                passed = accepts(value, reference, noise, unit, noisy_reference=wide)
                words = f"{precision}: loss {float(value):.4f} for {float(reference):.4f}"
                controls.append(Control(name, not passed, words))
    if not rows:
        notes.append(f"losses are looked at in {' and '.join(PRECISIONS)} only; none of them was asked for")
    return rows, controls, notes


def _three(logits: Callable[..., Any], loss: Callable[..., Any], items: Any, data: Any, as_array: Any) -> Any:
    """The mean loss over the targets that count: of rows as they are, and of rows padded right and left."""
    inputs, targets = (as_array(np.stack([np.asarray(item[k]) for item in items[:JUDGED]])) for k in (0, 1))
    batch = {name: np.asarray(v)[:JUDGED] for name, v in data.collate_next_token_batch(items, PAD).items()}
    # Rolled until the last token is at the end: padding left. One forward pass for both kinds.
    shift = int((~batch["attention_mask"][0]).sum())
    both = {k: as_array(np.concatenate([v, np.roll(v, shift, axis=1)])) for k, v in batch.items()}
    out = logits(both["input_ids"], both["attention_mask"])
    values = (
        loss(logits(inputs, None), targets, PAD),
        loss(out[:JUDGED], both["target_ids"][:JUDGED], PAD),
        loss(out[JUDGED:], both["target_ids"][JUDGED:], PAD),
    )
    return dict(zip(LOSSES, values))


def _wrong(logits: Callable[..., Any], loss: Callable[..., Any], batch: Mapping[str, Any]) -> dict[str, Any]:
    """Losses that a mistake would give, by the names of CONTROLS."""
    tokens, targets, mask = batch["input_ids"], batch["target_ids"], batch["attention_mask"]
    right = loss(logits(tokens, mask), targets, PAD)
    return {
        "mask inverted": loss(logits(tokens, ~mask), targets, PAD),
        "padding from values": loss(logits(tokens, tokens != PAD), targets, PAD),
        "targets not shifted": loss(logits(tokens, mask), tokens, PAD),
        "padding counted": right * int((targets != PAD).sum()) / targets.numel(),
    }


# ------------------------------------------------------------------------------------------------ crops


def crop_starts(side: str, seed: int) -> Arrays:
    """Starts of random crops, each in 0 … STARTS − 1: access by access, epoch by epoch, and item by item."""
    data, array = _twin(side)
    width = STARTS + 2
    one = array(list(range(width)))[None]
    advancing, told = (data.RandomCropSequenceDataset(one, 3, seed) for _ in range(2))
    many = data.RandomCropSequenceDataset(array(list(range(width)) * DRAWS).reshape(DRAWS, width), 3, seed)
    many.set_epoch(0)

    def at_epoch(epoch: int) -> int:
        told.set_epoch(epoch)
        return int(told[0][0])

    return {
        "by access": np.array([int(advancing[0][0]) for _ in range(DRAWS)]),
        "by epoch": np.array([at_epoch(epoch) for epoch in range(DRAWS)]),
        "by item": np.array([int(many[i][0]) for i in range(DRAWS)]),
    }


def _tests(starts: np.ndarray, level: float) -> tuple[st.Outcome, ...]:
    # The middles of STARTS equal cells of (−1, 1): then the cells of the χ² test are the starts.
    x, law = (2.0 * starts + 1.0) / STARTS - 1.0, st.uniform(1.0)
    return st.chi_square_test(x, law, level, cells=STARTS), st.lag_test(x, law, level)


def _crop_level(starts: Mapping[Any, np.ndarray]) -> float:
    return st.share(2 * len(starts))  # two tests each


def _crop_rows(starts: Mapping[tuple[str, str], np.ndarray]) -> list[Row]:
    rows = []
    for (side, mode), x in starts.items():
        outcomes = _tests(x, _crop_level(starts))
        outside = bool(np.any((x < 0) | (x >= STARTS)))
        worst, smallest = min(outcomes, key=lambda o: o.p / o.level), outcomes[0]
        words = "a start outside the row" if outside else f"{worst.test} p {worst.p:.2g} against {worst.level:.1g}"
        rejected = outside or any(outcome.rejected for outcome in outcomes)
        rows.append(
            Row(
                NAME,
                "",
                "",
                "draws",
                f"RandomCropSequenceDataset: starts {mode} ({side})",
                Verdict.DIFFER if rejected else Verdict.AGREE,
                f"{words}; smallest seen: {smallest.unit} {smallest.smallest:.2g}",
                shape=x.shape,
                excess=abs(np.log(max(worst.p, 1e-300)) / np.log(worst.level)),
                smallest_seen=smallest.smallest,
            )
        )
    return rows


def _crop_control(starts: Mapping[tuple[str, str], np.ndarray]) -> Control:
    outcomes = [min(_tests(x % (STARTS - 1), _crop_level(starts)), key=lambda o: o.p) for x in starts.values()]
    words = f"{outcomes[0].test}: p {max(o.p for o in outcomes):.2g} at most, against {outcomes[0].level:.1g}"
    return Control("a start left out", all(outcome.rejected for outcome in outcomes), words)


def _merged(controls: Sequence[Control]) -> list[Control]:
    """One control a name, in the order of CONTROLS: rejected only if it was rejected wherever it was shown."""
    from parity.checks._steps import merge

    order = list(CONTROLS)
    return sorted(merge(controls), key=lambda control: order.index(control.name))
