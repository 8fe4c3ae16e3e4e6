"""The accumulation check: it passes the twins, rejects bugs put into them, and their trainers keep its formula."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

import omni_jax.losses  # noqa: E402
import omni_torch.losses  # noqa: E402
import omni_torch.optim  # noqa: E402
from parity.checks import Scope, accumulation, dropout  # noqa: E402
from parity.precision import unit_roundoff  # noqa: E402
from parity.result import CheckResult  # noqa: E402
from parity.verdict import Verdict, accepts  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def result() -> CheckResult:
    return accumulation.run(Scope(), lambda *_: None)


# --- the twins -------------------------------------------------------------------------------------------------------


def test_the_run_agrees(result):
    assert result.error is None
    assert [row for row in result.rows if row.verdict is not Verdict.AGREE] == []
    assert result.exit_code == 0


@pytest.mark.parametrize("control", accumulation.CONTROLS)
def test_the_control_is_rejected(result, control):
    (found,) = [c for c in result.controls if c.name == control]
    assert found.rejected, found.evidence


def test_every_control_is_declared(result):
    assert [c.name for c in result.controls] == list(accumulation.CONTROLS)


@pytest.mark.parametrize("precision", accumulation.PRECISIONS)
def test_every_gradient_is_compared_accumulated_and_clipped(result, precision):
    keys = [link.torch for link in dropout.small(accumulation.CONFIG, Scope()).judge.pair.links]
    assert len(keys) == 10
    rows = [row for row in result.rows if row.precision == precision]
    names = {regime: {row.name for row in rows if row.regime == regime} for regime in {row.regime for row in rows}}
    plain = {"loss", *(f"gradient {key}" for key in keys)}
    assert names["one big batch"] == plain
    assert names["micro-batches"] == plain | {"gradient norm", *(f"clipped gradient {key}" for key in keys)}
    assert names["against its own big batch"] == {"loss and gradients (jax)", "loss and gradients (torch)"}


def test_micro_batches_are_unequal_in_length_and_in_counted_tokens():
    config = dropout.small(accumulation.CONFIG, Scope()).config
    tokens, targets, mask = dropout.batch(config, 0)
    per_micro = [part.sum() for part in np.split(targets != 0, accumulation.MICRO)]
    lengths = [part.sum(axis=1).max() for part in np.split(mask, accumulation.MICRO)]
    assert per_micro == [10, 1, 8]
    assert len(set(lengths)) > 1
    assert (tokens[~mask] == 0).all()


def test_clipping_is_active():
    whole = dropout.undropped(accumulation.CONFIG, Scope(), "float64")
    assert accumulation._norm({k: v[2] for k, v in whole.values.items()}) > accumulation.MAX_NORM


def test_bfloat16_alone_is_not_looked_at():
    narrow = accumulation.run(Scope(precisions=("bfloat16",)), lambda *_: None)
    assert narrow.exit_code == 3
    assert narrow.error is not None
    assert "float64 and float32" in narrow.error


# --- bugs in the twins -----------------------------------------------------------------------------------------------


@pytest.fixture
def fresh() -> Iterator[None]:
    """What was found with the twins as they are must not stand in for what a bug gives, nor the other way round."""
    dropout.undropped.cache_clear()
    yield
    dropout.undropped.cache_clear()


def differing(**scope: Any) -> dict[str, set[str]]:
    """Regime -> names that differ, in float64."""
    found = accumulation.run(Scope(precisions=("float64",), **scope), lambda *_: None)
    assert found.verdict is Verdict.DIFFER
    names: dict[str, set[str]] = {}
    for row in found.rows:
        if row.verdict is Verdict.DIFFER:
            names.setdefault(row.regime, set()).add(row.name)
    return names


def test_padding_that_counts_is_seen(monkeypatch, fresh):
    """The mean over all targets, as cross_entropy of most libraries gives it when it ignores no index."""

    def counted_all(logits, targets, ignore_index=0):
        V = logits.shape[-1]
        total = torch.nn.functional.cross_entropy(
            logits.reshape(-1, V), targets.reshape(-1).long(), ignore_index=0, reduction="sum"
        )
        return total / targets.numel()

    monkeypatch.setattr(omni_torch.losses, "cross_entropy", counted_all)
    found = differing()
    assert "loss" in found["micro-batches"]
    assert "gradient lm_head.weight" in found["micro-batches"]
    assert found["against its own big batch"] == {"loss and gradients (torch)"}


def test_clipping_of_each_tensor_by_itself_is_seen(monkeypatch, fresh):
    clean = omni_torch.optim.clip_grad_norm_

    def each(grads, max_norm):
        return torch.stack([clean([g], max_norm) for g in grads]).square().sum().sqrt()

    monkeypatch.setattr(omni_torch.optim, "clip_grad_norm_", each)
    (regime,) = found = differing()
    assert regime == "micro-batches"
    assert all(name.startswith("clipped gradient ") for name in found[regime])
    assert "clipped gradient lm_head.weight" in found[regime]


def test_clipping_that_does_nothing_is_seen(monkeypatch, fresh):
    monkeypatch.setattr(
        omni_torch.optim, "clip_grad_norm_", lambda grads, max_norm: omni_torch.optim.global_norm(grads)
    )
    found = differing()
    assert len(found["micro-batches"]) == 10


def test_a_loss_of_sums_is_seen_on_the_jax_side(monkeypatch, fresh):
    """nats · count where nats are already a sum: right for the big batch's direction, wrong in scale and in shares."""
    clean = omni_jax.losses.cross_entropy

    def summed(logits, targets, ignore_index=0):
        count = jax.numpy.sum(targets != 0, dtype=jax.numpy.int32)
        return clean(logits, targets) * jax.numpy.maximum(count, 1).astype(logits.dtype)

    monkeypatch.setattr(omni_jax.losses, "cross_entropy", summed)
    # The big batch's pair was made before, and keeps the right loss; what is compiled below has the wrong one.
    found = differing()
    assert {"loss", "gradient lm_head.weight"} <= found["micro-batches"]
    assert "loss and gradients (jax)" in found["against its own big batch"]


def test_means_of_means_are_seen(monkeypatch, fresh):
    clean = accumulation.torch_accumulated

    def means(net, tokens, targets, mask):
        parts = [clean(net, *(x[i : i + 1] for x in (tokens, targets, mask))) for i in range(len(tokens))]
        grads = {k: torch.stack([part[1][k] for part in parts]).mean(dim=0) for k in parts[0][1]}
        clipped = {k: g.clone() for k, g in grads.items()}
        norm = omni_torch.optim.clip_grad_norm_(list(clipped.values()), accumulation.MAX_NORM)
        return sum(part[0] for part in parts) / len(parts), grads, norm, clipped

    monkeypatch.setattr(accumulation, "torch_accumulated", means)
    found = differing()
    assert {"loss", "gradient norm", "gradient lm_head.weight"} <= found["micro-batches"]
    assert found["against its own big batch"] == {"loss and gradients (torch)"}


# --- the trainers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["jax", "torch"])
def test_the_trainers_first_moment_is_that_of_the_clipped_accumulated_gradient(tmp_path, side):
    """One update of the twin's own Trainer on rows with unequal numbers of PAD: m is (1 − β₁)·gradient, to scale."""
    package = pytest.importorskip(f"omni_{side}.training")
    if not hasattr(package, "Trainer"):
        pytest.skip(f"omni_{side} has no Trainer")
    small = dropout.small(accumulation.CONFIG, Scope())
    fields = small.config.to_dict() | {"dropout": 0.0, "ctx_len": 6}
    rng = np.random.default_rng(3)
    ids = rng.integers(3, small.config.vocab_size, 400)
    ids[rng.random(400) < np.linspace(0.0, 1.0, 400)] = 0  # PAD: ever more of it
    settings = {"batch_size": 2, "gradient_accumulation_steps": 3, "max_grad_norm": accumulation.MAX_NORM}
    trainer = package.Trainer(
        package.ThinkerConfig(**fields), package.TrainConfig(**settings), ids, ids[:0], tmp_path / side, quiet=True
    )
    tokens = trainer._batch()
    micro = (tokens[..., :-1], tokens[..., 1:].astype(np.int32), np.ones(tokens[..., 1:].shape, bool))
    counts = (micro[1] != 0).sum(axis=(1, 2))
    assert len(set(counts)) == 3

    judge = accumulation._judge(Scope(draws=16), small.config)
    links = judge.pair.links
    if side == "jax":
        from parity.weights import to_torch

        weights = to_torch(links, jax.tree.map(np.array, trainer.state.params))
        moments = to_torch(links, trainer.run(until=1).optimizer.m)
    else:
        weights = {k: p.detach().numpy().copy() for k, p in trainer.state.params.items()}
        moments = {k: s.m.numpy() for k, s in zip(weights, trainer.run(until=1).optimizer)}
    assert set(moments) == {link.torch for link in links}

    model = judge.noise(weights, micro, "float32")
    reference, noise, _ = judge._named(model)
    assert reference["gradient norm"] > accumulation.MAX_NORM
    for key, m in moments.items():
        name = f"clipped gradient {key}"
        gradient = m.astype(np.float64) / (1.0 - 0.9)
        assert accepts(gradient, reference[name], noise[name], unit_roundoff("float32")), name
        assert not accepts(reference[f"gradient {key}"], reference[name], noise[name], unit_roundoff("float32")), name
