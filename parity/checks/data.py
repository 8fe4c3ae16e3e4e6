"""Data: the same bytes from both twins, what the masks mean, a loss that padding does not touch, fair random crops."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from parity import statistics as st
from parity.checks import Progress, Scope
from parity.result import CheckResult, Control, Row
from parity.verdict import Verdict, accepts

__all__ = ["BLIND", "CLAIM", "CONTROLS", "PRECISIONS", "crop_starts", "exact_rows", "expected", "run", "seen"]

NAME = "data"
CLAIM = (
    "For the same (seed, step) and the same (seed, epoch) both twins give the same bytes, and rows begin at every "
    "place where they may and nowhere else; datasets give whole items, whatever the index; padding, collating, "
    "stacking and loading give equal fields, batches of equal size and masks that mean the same; the loss of a model "
    "is the same with and without padding, left or right, up to rounding; and each twin's own generator starts its "
    "random crops uniformly and independently."
)
BLIND = (
    "Other arguments than those tried, among them what must be refused; several workers or threads, prefetching, "
    "batch() of the JAX loader and iterable datasets (the twins' tests have them); the width of integers and floats "
    "outside token batches and orders; which order comes without a seed, other than that it is not the plain one "
    "and another in the next epoch; gradients under padding; deviations of the crops below those printed (`smallest "
    "seen`), and dependence beyond neighbours. The bytes are compared with each other: a wrong generator in both twins "
    "is seen only if an order is no permutation, a start is never drawn or not allowed, the seed, step or epoch does "
    "not matter, or a row depends on the batch size; that starts and orders come equally often is not tested."
)
CONTROLS = {
    "mask inverted": "padding_mask where attention_mask belongs",
    "padding from values": "a mask that takes a real token equal to pad_value for padding",
    "targets not shifted": "every position asked for the token it was given",
    "padding counted": "the loss divided by all B x T positions",
    "next step": "the token batch of the step after",
    "last start left out": "token batches that never begin at the last document, which just fills a row",
    "a start left out": "random crops that never begin at the last place",
}
PRECISIONS = ("float64", "float32")
"""Of the loss; bytes and crops have none."""

BOS, EOS, PAD = 1, 2, 0
DOCUMENTS = [[3 + 10 * i + j for j in range(1 + i % 9)] for i in range(23)]
"""No id twice, so that a row tells where it begins."""
STREAM = [token for document in DOCUMENTS for token in (BOS, *document, EOS)]
PLAIN = list(range(40, 60))
STREAMS = {
    "last document too short": (STREAM, len(DOCUMENTS[-1]) + 6),
    "last document just fills a row": (STREAM, len(DOCUMENTS[-1]) + 2),
    "no BOS": (PLAIN, 4),
    "BOS too late": ([*PLAIN, BOS, 60], 4),
    "one place": (PLAIN, len(PLAIN)),
}
"""Of token batches: ids, and the length of a row."""
DRAWN = 256
"""Rows of a token batch. With six batches at least, one of 23 starts stays out by chance with p < 1e-28."""
STEPS = ((0, 0), (0, 1), (5, 1), (5 + 2**32, 1), (5, 2**31), (5, 2**63))
"""(seed, step) of the token batches, besides those of the run's seed; the same as (seed, epoch) of the orders."""
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
LOSS_CONTROLS = ("padding counted",)
"""Those that only a loss can reject."""
STARTS = 16
"""Places where a crop may begin."""
CROP = 3
WIDTH = STARTS + CROP - 1
DRAWS = 1200
ITEMS = 25
"""Rows of the datasets, all different; 4 does not divide them, 5 does. One chance in 25! that a shuffle moves none."""
INDICES = (*range(ITEMS), -1, -ITEMS)
CROP_LENGTHS = (1, CROP, WIDTH)
LOADERS = tuple(
    (shuffle, drop, seeded) for shuffle in (True, False) for drop in (True, False) for seeded in (True, False)
)
FAR = 2**40
"""An epoch to go to."""

Arrays = dict[str, np.ndarray]


def run(scope: Scope, progress: Progress) -> CheckResult:
    """Compare bytes and fields, judge the losses in noise units, test the crops."""
    started = time.perf_counter()
    result = CheckResult(NAME)
    progress(0, 3, "bytes and fields")
    found = {side: seen(side, scope.seed) for side in ("jax", "torch")}
    truth = expected(found["jax"], scope.seed)
    result.rows += exact_rows(found["jax"], found["torch"], truth)
    progress(1, 3, "random crops")
    starts = {(side, mode): x for side in ("jax", "torch") for mode, x in crop_starts(side, scope.seed).items()}
    result.rows += _crop_rows(starts)
    progress(2, 3, "losses")
    rows, controls, notes = _losses(scope)
    result.rows += rows
    result.notes += notes
    if scope.controls:
        result.controls = _merged([*_exact_controls(truth, scope.seed), *controls, _crop_control(starts)])
    result.seconds = time.perf_counter() - started
    progress(3, 3, "")
    return result


# ------------------------------------------------------------------------------------------------ bytes and fields


def seen(side: str, seed: int = 0) -> Arrays:
    """What one twin gives, as numpy arrays by name. The twins mirror each other, so one program asks both."""
    data, array = _twin(side)
    with _own_generator(side):
        found = _pure(data, seed) | _datasets(data, array, seed) | _padding(data, array)
        found |= _loaders(data, array, seed) | _padding_loader(data, array, seed)
    return {name: np.asarray(value) for name, value in found.items()}


def expected(jax: Mapping[str, np.ndarray], seed: int = 0) -> Arrays:
    """The same by plain lists; what is random is taken from the JAX side."""
    pairs = [(s[:-1], s[1:]) for s in SEQUENCES]
    keys = _keys(seed)
    truth: dict[str, Any] = {
        "token_stream": STREAM,
        "token_batch: the batches differ": True,
        "token_batch: a smaller batch is its beginning": [True] * len(keys),
        "epoch_order: bytes": jax["epoch_order: bytes"],
        "epoch_order: sorted": [list(range(29))] * len(keys),
        "epoch_order: of one": [[0]] * len(keys),
        "epoch_order: the orders differ": True,
    }
    for name, (ids, length) in STREAMS.items():
        truth[f"token_batch: bytes, {name}"] = jax.get(f"token_batch: bytes, {name}", np.empty(0, np.uint8))
        places = range(len(ids) - length + 1)
        truth[f"token_batch: starts, {name}"] = [s for s in places if ids[s] == BOS] or list(places)
    grid = _grid(ITEMS).tolist()
    rows = [grid[i] for i in INDICES]
    truth |= {
        "lengths of the datasets": [ITEMS] * 3,
        "NextTokenDataset: input_ids": [row[:-1] for row in rows],
        "NextTokenDataset: target_ids": [row[1:] for row in rows],
        "TensorPairDataset: x": [_number(i % ITEMS) for i in INDICES],
        "TensorPairDataset: y": [[i % ITEMS, 7] for i in INDICES],
        "RandomCropSequenceDataset: whole crops": np.ones((len(CROP_LENGTHS), 3, len(INDICES)), bool),
        "PaddedBatch: its fields in order": [1, 2, 3],
    }
    for pad in (PAD, 77):
        whole, batch = _padded([(s, s) for s in SEQUENCES], pad), _padded(pairs, pad)
        truth |= {
            f"pad_1d_sequences: tokens{_with(pad)}": whole["input_ids"],
            f"pad_1d_sequences: lengths{_with(pad)}": [len(s) for s in SEQUENCES],
            f"pad_1d_sequences: padding_mask{_with(pad)}": whole["padding_mask"],
        }
        truth |= {f"collate_next_token_batch: {name}{_with(pad)}": value for name, value in batch.items()}
    truth |= _expected_loaders(seed)
    for epoch in range(2):
        order = _order(len(SEQUENCES), seed, epoch)
        batches = [_padded([pairs[i] for i in order[at : at + BATCH]]) for at in range(0, len(order), BATCH)]
        for name in batches[0]:
            flat = [x for batch in batches for row in batch[name] for x in row]
            truth[f"make_dataloader: {name}, epoch {epoch}"] = flat
    return {name: np.asarray(value) for name, value in truth.items()}


def _keys(seed: int) -> list[tuple[int, int]]:
    return list(dict.fromkeys([*STEPS, (seed, 2), (seed, 3), (seed, 2**32 + 2)]))


def _pure(data: Any, seed: int) -> dict[str, Any]:
    """What is a pure function of (seed, step) or (seed, epoch)."""
    keys = _keys(seed)
    orders = [data.epoch_order(29, *key) for key in keys]
    found: dict[str, Any] = {
        "token_stream": data.token_stream(DOCUMENTS, BOS, EOS),
        "epoch_order: bytes": _bytes(orders),
        "epoch_order: sorted": [np.sort(order) for order in orders],
        "epoch_order: of one": [data.epoch_order(1, *key) for key in keys],
        "epoch_order: the orders differ": len({order.tobytes() for order in orders}) == len(keys),
    }
    for name, (ids, length) in STREAMS.items():
        try:
            batches = [data.token_batch(np.array(ids, np.int32), DRAWN, length, *key) for key in keys]
        except (ValueError, IndexError):  # refused: then its rows say that this side has none
            continue
        found[f"token_batch: bytes, {name}"] = _bytes(batches)
        found[f"token_batch: starts, {name}"] = _begun(batches, ids, length)
        if "token_batch: the batches differ" not in found:  # of one stream
            few = [data.token_batch(np.array(ids, np.int32), 5, length, *key) for key in keys]
            same = [np.array_equal(x, y[:5]) for x, y in zip(few, batches)]
            found["token_batch: a smaller batch is its beginning"] = same
            found["token_batch: the batches differ"] = len({batch.tobytes() for batch in batches}) == len(keys)
    return found


def _begun(batches: Sequence[np.ndarray], ids: Sequence[int], length: int) -> np.ndarray:
    """The places in `ids` where rows began, each once, in order; −1 for a row that is no piece of `ids`."""
    places = {tuple(ids[s : s + length]): s for s in range(len(ids) - length + 1)}
    return np.unique([places.get(tuple(row), -1) for batch in batches for row in batch.tolist()])


def _datasets(data: Any, array: Callable[[Any], Any], seed: int) -> dict[str, Any]:
    """Every item of each dataset, the first and the last by a negative index too."""
    tokens = array(_grid(ITEMS))
    following, pairs = data.NextTokenDataset(tokens), _pairs(data, array)
    items, couples = [following[i] for i in INDICES], [pairs[i] for i in INDICES]
    whole = []
    for length in CROP_LENGTHS:
        free, seeded, told = (data.RandomCropSequenceDataset(tokens, length, s) for s in (None, seed, seed))
        told.set_epoch(seed)
        rows = np.array(INDICES) % ITEMS
        whole.append([_starts([crops[i] for i in INDICES], rows, length) >= 0 for crops in (free, seeded, told)])
    return {
        "lengths of the datasets": [len(following), len(pairs), len(data.RandomCropSequenceDataset(tokens, 1))],
        "NextTokenDataset: input_ids": _stacked(item[0] for item in items),
        "NextTokenDataset: target_ids": _stacked(item[1] for item in items),
        "TensorPairDataset: x": _stacked(couple[0] for couple in couples),
        "TensorPairDataset: y": _stacked(couple[1] for couple in couples),
        "RandomCropSequenceDataset: whole crops": whole,
    }


def _padding(data: Any, array: Callable[[Any], Any]) -> dict[str, Any]:
    batch = data.PaddedBatch(1, 2, 3)
    found: dict[str, Any] = {"PaddedBatch: its fields in order": [batch.tokens, batch.lengths, batch.padding_mask]}
    for pad in (PAD, 77):
        padded = data.pad_1d_sequences([array(s) for s in SEQUENCES], pad)
        for field in dataclasses.fields(padded):
            found[f"pad_1d_sequences: {field.name}{_with(pad)}"] = getattr(padded, field.name)
        collated = data.collate_next_token_batch(_items(data, array), pad)
        found |= {f"collate_next_token_batch: {name}{_with(pad)}": value for name, value in collated.items()}
    return found


def _loaders(data: Any, array: Callable[[Any], Any], seed: int) -> dict[str, Any]:
    """Batches that are stacked as they are: whole items in the right order, batches of the right number and size."""
    tokens = array(_grid(ITEMS))
    found: dict[str, Any] = {}
    for shuffle, drop, seeded in LOADERS:
        label, shapes, visits = _label(shuffle, drop, seeded), [], []
        for size in (4, 5):
            dataset = data.NextTokenDataset(tokens)
            loader = data.make_dataloader(dataset, size, shuffle, drop, seed=seed if seeded else None)
            epochs = []
            for epoch in (0, 1, FAR) if seeded else (0, 1):
                if epoch == FAR:
                    getattr(loader, "sampler", loader).set_epoch(FAR)
                batches = [(np.asarray(x), np.asarray(y)) for x, y in loader]
                shapes += [(len(loader), *x.shape, *y.shape) for x, y in batches]
                epochs.append([_item(x, y) for xs, ys in batches for x, y in zip(xs, ys)])
            visits += _told(epochs) if shuffle and not seeded else [i for visited in epochs for i in visited]
        found |= {f"make_dataloader: shapes, {label}": shapes, f"make_dataloader: items, {label}": visits}
    couples = list(data.make_dataloader(_pairs(data, array), 4, seed=seed))
    crops = list(data.make_dataloader(data.RandomCropSequenceDataset(tokens, CROP, seed), 4, seed=seed))
    rows = [np.asarray(row) for batch in crops for row in batch]
    visited = np.array([int(row.flat[0]) // WIDTH for row in rows])
    return found | {
        "make_dataloader: x of pairs": np.concatenate([np.asarray(x) for x, _ in couples]),
        "make_dataloader: y of pairs": np.concatenate([np.asarray(y) for _, y in couples]),
        "make_dataloader: items of crops": np.where(_starts(rows, visited, CROP) >= 0, visited, -1),
    }


def _expected_loaders(seed: int) -> dict[str, Any]:
    truth: dict[str, Any] = {}
    for shuffle, drop, seeded in LOADERS:
        label, shapes, visits = _label(shuffle, drop, seeded), [], []
        for size in (4, 5):
            sizes = [min(size, ITEMS - at) for at in range(0, ITEMS, size)]
            if drop:
                sizes = [n for n in sizes if n == size]
            for epoch in (0, 1, FAR) if seeded else (0, 1):
                shapes += [(len(sizes), n, WIDTH - 1, n, WIDTH - 1) for n in sizes]
                if seeded or not shuffle:
                    order = _order(ITEMS, seed, epoch) if shuffle else list(range(ITEMS))
                    visits += order[: sum(sizes)]
            if shuffle and not seeded:
                visits += [sum(sizes), sum(sizes), True, True]
        truth |= {f"make_dataloader: shapes, {label}": shapes, f"make_dataloader: items, {label}": visits}
    order = _order(ITEMS, seed, 0)
    return truth | {
        "make_dataloader: x of pairs": [_number(i) for i in order],
        "make_dataloader: y of pairs": [[i, 7] for i in order],
        "make_dataloader: items of crops": order,
    }


def _told(epochs: list[list[int]]) -> list[int]:
    """What can be told of two epochs in an order that nobody knows."""
    different = [len(set(visited) - {-1}) for visited in epochs]
    return [*different, all(visited != sorted(visited) for visited in epochs), epochs[0] != epochs[1]]


def _label(shuffle: bool, drop: bool, seeded: bool) -> str:
    return f"{'shuffled' if shuffle else 'in order'}{', drop_last' if drop else ''}{'' if seeded else ', no seed'}"


def _padding_loader(data: Any, array: Callable[[Any], Any], seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    loader = data.make_dataloader(_items(data, array), BATCH, collate_fn=data.collate_next_token_batch, seed=seed)
    for epoch in range(2):
        batches = list(loader)
        for name in batches[0]:
            found[f"make_dataloader: {name}, epoch {epoch}"] = np.concatenate([_flat(b[name]) for b in batches])
    return found


def _own_generator(side: str) -> contextlib.AbstractContextManager[Any]:
    """Loaders and crops without a seed draw from torch's global generator, which the caller gets back as it was."""
    if side == "jax":
        return contextlib.nullcontext()
    import torch

    return torch.random.fork_rng(devices=[])


def _grid(rows: int) -> np.ndarray:
    """Row i holds i·WIDTH … (i + 1)·WIDTH − 1: a piece of it says of which row it is, and where it begins."""
    return np.arange(rows * WIDTH, dtype=np.int32).reshape(rows, WIDTH)


def _starts(crops: Sequence[Any], rows: np.ndarray, length: int) -> np.ndarray:
    """Where each crop begins in its row of _grid; −1 for what is not `length` tokens of that row as they stand."""
    found = [np.asarray(crop) for crop in crops]
    values = np.stack([crop if crop.shape == (length,) else np.full(length, -1) for crop in found]).astype(np.int64)
    starts = values[:, 0] - WIDTH * rows
    whole = (values - values[:, :1] == np.arange(length)).all(axis=1) & (starts >= 0) & (starts <= WIDTH - length)
    return np.where(whole, starts, -1)


def _item(inputs: np.ndarray, targets: np.ndarray) -> int:
    """Which item of a NextTokenDataset of _grid this is; −1 if none."""
    row = int(inputs[0]) // WIDTH if inputs.size else -1
    whole = np.arange(row * WIDTH, (row + 1) * WIDTH)
    return row if np.array_equal(inputs, whole[:-1]) and np.array_equal(targets, whole[1:]) else -1


def _pairs(data: Any, array: Callable[[Any], Any]) -> Any:
    return data.TensorPairDataset(array([_number(i) for i in range(ITEMS)]), array([[i, 7] for i in range(ITEMS)]))


def _number(i: int) -> list[list[float]]:
    """x of item i of the pairs, exact in every format."""
    return [[i + 0.25, -float(i)]] * 2


def _with(pad: int) -> str:
    return "" if pad == PAD else f", pad_value {pad}"


def _bytes(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.frombuffer(b"".join(x.tobytes() for x in arrays), np.uint8)


def _stacked(items: Iterable[Any]) -> np.ndarray:
    return np.stack([np.asarray(item) for item in items])


def _order(n: int, seed: int, epoch: int) -> list[int]:
    from omni_jax.data import epoch_order

    return epoch_order(n, seed, epoch).tolist()


def _padded(pairs: Sequence[tuple[list[int], list[int]]], pad: int = PAD) -> dict[str, list[list[Any]]]:
    """The padded batch, written without arrays; True in attention_mask is a token, True in padding_mask is padding."""
    width = max(len(inputs) for inputs, _ in pairs)
    keep = [[t < len(inputs) for t in range(width)] for inputs, _ in pairs]
    return {
        "input_ids": [inputs + [pad] * (width - len(inputs)) for inputs, _ in pairs],
        "target_ids": [targets + [pad] * (width - len(targets)) for _, targets in pairs],
        "attention_mask": keep,
        "padding_mask": [[not kept for kept in row] for row in keep],
    }


def exact_rows(jax: Mapping[str, np.ndarray], torch: Mapping[str, np.ndarray], truth: Arrays) -> list[Row]:
    """One row a field: both sides must be equal to the truth in every value, in shape and kind (bool, int, float)."""
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
    if not any(x.dtype.kind in kind and y.dtype.kind in kind for kind in ("b", "iu", "f")):
        return f"dtype {x.dtype} for {y.dtype}"
    wrong = np.argwhere(x != y)
    return f"{len(wrong)} of {x.size} values differ, the first at {wrong[0].tolist()}" if len(wrong) else ""


def _exact_controls(truth: Arrays, seed: int) -> list[Control]:
    data, array = _twin("jax")
    collated = data.collate_next_token_batch(_items(data, array), PAD)
    place = "last document just fills a row"
    ids, length = STREAMS[place]
    draw = lambda ids, late: [data.token_batch(ids, DRAWN, length, s, step + late) for s, step in _keys(seed)]  # noqa: E731
    name = "collate_next_token_batch: attention_mask"
    shown = {
        "mask inverted": (name, ~collated["attention_mask"]),
        "padding from values": (name, collated["input_ids"] != PAD),
        "targets not shifted": ("collate_next_token_batch: target_ids", collated["input_ids"]),
        "next step": (f"token_batch: bytes, {place}", _bytes(draw(ids, 1))),
        "last start left out": (f"token_batch: starts, {place}", _begun(draw(ids[:-1], 0), ids, length)),
    }
    controls = []
    for control, (field, wrong) in shown.items():
        fault = _fault(field, {field: wrong}, truth)
        controls.append(Control(control, bool(fault), f"{field.split(': ')[1]}: {fault or 'passed'}"))
    return controls


def _twin(side: str) -> tuple[Any, Callable[[Any], Any]]:
    """The data module of a twin, and how numbers become an array of its own: integers by default, or float32."""
    if side == "jax":
        from omni_jax import data

        return data, lambda x: (a := np.asarray(x)).astype(np.float32 if a.dtype.kind == "f" else np.int32)
    import torch

    from omni_torch import data

    return data, lambda x: torch.tensor(x, dtype=torch.float32 if np.asarray(x).dtype.kind == "f" else torch.long)


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
        only = " and ".join(PRECISIONS)
        notes.append(f"not looked at: {'; '.join(LOSSES)}; they are taken in {only} only; none of them was asked for")
        if scope.controls:
            notes[-1] += f"; nor is the control that needs one shown: {', '.join(LOSS_CONTROLS)}"
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
    """Starts of random crops, each in 0 … STARTS − 1: access by access, epoch by epoch, and item by item.

    −1 is a crop that is not CROP tokens of its row as they stand.
    """
    data, array = _twin(side)
    few, crops = array(_grid(ITEMS)), data.RandomCropSequenceDataset
    advancing, told = crops(few, CROP, seed), crops(few, CROP, seed)
    many = crops(array(_grid(DRAWS)), CROP, seed)
    many.set_epoch(0)
    counts = np.arange(DRAWS)

    def at_epoch(epoch: int) -> Any:
        told.set_epoch(epoch)
        return told[ITEMS // 2]

    return {
        "by access": _starts([advancing[i] for i in (counts % ITEMS).tolist()], counts % ITEMS, CROP),
        "by epoch": _starts([at_epoch(epoch) for epoch in range(DRAWS)], np.full(DRAWS, ITEMS // 2), CROP),
        "by item": _starts([many[i] for i in range(DRAWS)], counts, CROP),
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
        outside = int(np.sum((x < 0) | (x >= STARTS)))
        outcomes = _tests(np.clip(x, 0, STARTS - 1), _crop_level(starts))
        worst, smallest = min(outcomes, key=lambda o: o.p / o.level), outcomes[0]
        words = (
            f"{outside} of {len(x)} are no whole piece of their row"
            if outside
            else f"{worst.test} p {worst.p:.2g} against {worst.level:.1g}"
        )
        rejected = outside > 0 or any(outcome.rejected for outcome in outcomes)
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
