"""The accumulation check: it passes the twins, rejects bugs put into them, and their trainers keep its formula."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

import omni_jax.training  # noqa: E402
import omni_torch.optim  # noqa: E402
import omni_torch.training  # noqa: E402
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
    clipped = {"gradient norm", *(f"clipped gradient {key}" for key in keys)}
    assert names["micro-batches"] == plain | clipped | {"counted tokens"}
    both = {"loss and gradients (jax)", "loss and gradients (torch)"}
    assert names["against its own big batch"] == names["no token counts"] == both


def test_micro_batches_are_unequal_in_length_and_in_counted_tokens():
    config = dropout.small(accumulation.CONFIG, Scope()).config
    rows = accumulation.micro_batches(config, 0)
    targets = rows[..., 1:]
    assert tuple((targets != 0).sum(axis=(1, 2))) == accumulation.MICRO == (10, 1, 0, 8)
    widths = [accumulation._cut(torch.from_numpy(part)).shape[1] for part in rows]
    assert widths == [8, 3, 2, 8]
    # The same tokens and targets as the big batch's, which is what the reference is made of.
    tokens, big_targets, mask = dropout.batch(config, 0)
    whole = np.delete(rows, 2, axis=0).reshape(len(tokens), -1)
    assert np.array_equal(whole[:, :-1], tokens)
    assert np.array_equal(whole[:, 1:], big_targets)
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

    monkeypatch.setattr(omni_torch.training, "cross_entropy", counted_all)
    found = differing()
    assert "loss" in found["micro-batches"]
    assert "gradient lm_head.weight" in found["micro-batches"]
    assert found["against its own big batch"] == {"loss and gradients (torch)"}


def test_clipping_of_each_tensor_by_itself_is_seen(monkeypatch, fresh):
    clean = omni_torch.optim.clip_grad_norm_

    def each(grads, max_norm):
        return torch.stack([clean([g], max_norm) for g in grads]).square().sum().sqrt()

    monkeypatch.setattr(omni_torch.optim, "clip_grad_norm_", each)
    found = differing()
    (regime,) = found
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
    clean = omni_jax.training.cross_entropy

    def summed(logits, targets, ignore_index=0):
        count = jax.numpy.sum(targets != 0, dtype=jax.numpy.int32)
        return clean(logits, targets) * jax.numpy.maximum(count, 1).astype(logits.dtype)

    monkeypatch.setattr(omni_jax.training, "cross_entropy", summed)
    found = differing()
    assert {"loss", "gradient lm_head.weight"} <= found["micro-batches"]
    assert "loss and gradients (jax)" in found["against its own big batch"]


def torch_unweighted(nats_of, params, batches):
    """The mean of the micro-batches' means: each divided by its own count."""
    parts = [CLEAN_TORCH(nats_of, params, [batch]) for batch in batches]
    mean = {k: torch.stack([part[1][k] for part in parts]).mean(dim=0) for k in params}
    return torch.stack([part[0] for part in parts]).mean(), mean, torch.stack([part[2] for part in parts]).sum()


def jax_unweighted(nats_of, params, batches):
    """The same by giving every micro-batch the same say, with the count of tokens as it was."""

    def mean_of(params, batch):
        nats, count = nats_of(params, batch)
        return nats / jax.numpy.maximum(count, 1).astype(nats.dtype), jax.numpy.ones((), jax.numpy.int32)

    loss, gradients, _ = CLEAN_JAX(mean_of, params, batches)
    return loss, gradients, CLEAN_JAX(nats_of, params, batches)[2]


def jax_last_dropped(nats_of, params, batches):
    return CLEAN_JAX(nats_of, params, jax.tree.map(lambda x: x[:-1], batches))


def torch_last_dropped(nats_of, params, batches):
    return CLEAN_TORCH(nats_of, params, list(batches)[:-1])


CLEAN_TORCH, CLEAN_JAX = omni_torch.training.accumulated_gradients, omni_jax.training.accumulated_gradients
UNWEIGHTED = {"torch": (omni_torch.training, torch_unweighted), "jax": (omni_jax.training, jax_unweighted)}
DROPPED = {"torch": (omni_torch.training, torch_last_dropped), "jax": (omni_jax.training, jax_last_dropped)}


@pytest.mark.parametrize("side", ["jax", "torch"])
def test_accumulation_without_token_weighting_is_seen(monkeypatch, fresh, side):
    monkeypatch.setattr(UNWEIGHTED[side][0], "accumulated_gradients", UNWEIGHTED[side][1])
    found = differing()
    assert {"loss", "gradient norm", "gradient lm_head.weight"} <= found["micro-batches"]
    assert "counted tokens" not in found["micro-batches"]
    assert found["against its own big batch"] == {f"loss and gradients ({side})"}


@pytest.mark.parametrize("side", ["jax", "torch"])
def test_a_micro_batch_left_out_is_seen(monkeypatch, fresh, side):
    monkeypatch.setattr(DROPPED[side][0], "accumulated_gradients", DROPPED[side][1])
    found = differing()
    assert {"counted tokens", "loss", "gradient lm_head.weight"} <= found["micro-batches"]


def torch_nats(model, params, tokens_BT, amp):
    """No max(count, 1): 0 / 0 where nothing counts, as torch's own mean gives it."""
    logits = torch.func.functional_call(model, dict(params), (tokens_BT[:, :-1].long(),))
    targets = tokens_BT[:, 1:].long()
    count = (targets != 0).sum()
    V = logits.shape[-1]
    return torch.nn.functional.cross_entropy(logits.reshape(-1, V), targets.reshape(-1), ignore_index=0) * count, count


def jax_nats(graphdef, params, rest, tokens_BT, amp):
    nats, count = CLEAN_NATS(graphdef, params, rest, tokens_BT, amp)
    number = count.astype(nats.dtype)
    return nats / number * number, count


CLEAN_NATS = omni_jax.training._nats
NOT_A_NUMBER = {"torch": (omni_torch.training, torch_nats), "jax": (omni_jax.training, jax_nats)}


@pytest.mark.parametrize("side", ["jax", "torch"])
def test_nan_from_a_micro_batch_of_padding_is_seen(monkeypatch, fresh, side):
    monkeypatch.setattr(NOT_A_NUMBER[side][0], "_nats", NOT_A_NUMBER[side][1])
    found = differing()
    assert "loss" in found["micro-batches"]  # cross_entropy keeps what is ignored out of the gradients
    assert f"loss and gradients ({side})" in found["no token counts"]
    assert f"loss and gradients ({side})" in found["against its own big batch"]


def test_a_division_by_no_tokens_is_seen(monkeypatch, fresh):
    """Right for every update but the one without a counted token."""

    def divided(nats_of, params, batches):
        loss, gradients, tokens = CLEAN_TORCH(nats_of, params, batches)
        factor = tokens.clamp(min=1) / tokens if tokens == 0 else torch.ones(())
        return loss * factor, {k: g * factor for k, g in gradients.items()}, tokens

    monkeypatch.setattr(omni_torch.training, "accumulated_gradients", divided)
    assert differing() == {"no token counts": {"loss and gradients (torch)"}}


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
    rows = trainer._batch()
    counts = (rows[..., 1:] != 0).sum(axis=(1, 2))
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

    model = judge.noise(weights, (rows,), "float32")
    reference, noise, _ = judge._named(model)
    assert reference["gradient norm"] > accumulation.MAX_NORM
    for key, m in moments.items():
        name = f"clipped gradient {key}"
        gradient = m.astype(np.float64) / (1.0 - 0.9)
        assert accepts(gradient, reference[name], noise[name], unit_roundoff("float32")), name
        assert not accepts(reference[f"gradient {key}"], reference[name], noise[name], unit_roundoff("float32")), name
