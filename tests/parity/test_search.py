"""The search finds what ordinary fixtures miss, and is quiet on what is right."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from parity.errors import Misuse
from parity.search import Example, Found, Subject, search, snippet
from parity.search_command import budget_of, lines, search_all
from parity.search_inputs import choice, floats, integers, mask
from parity.search_subjects import subjects

pytestmark = pytest.mark.usefixtures("one_thread")
EVALUATIONS = 60


def subject(ours, theirs, draw=None, smooth=(0,), **more) -> Subject:
    """Two functions of arrays; by default of one of shape (2, 6)."""
    from parity.pair import pair_of

    pair = pair_of(lambda p, *x: ours(*x), lambda p, *x: theirs(*x), {}, torch_shapes={})
    draw = draw or (lambda d: Example((floats(d, (2, 6)),)))
    return Subject("planted", lambda variant: pair, draw, smooth=smooth, **more)


def norm(library, eps, fast=False):
    def run(x):
        mean = library.mean(x, -1, keepdims=True)
        spread = library.mean(x * x, -1, keepdims=True) - mean * mean
        if not fast:
            spread = library.mean((x - mean) * (x - mean), -1, keepdims=True)
        return (x - mean) / library.sqrt(spread + eps)

    return run


def eps():
    import jax.numpy as jnp
    import torch

    return subject(norm(jnp, 1e-5), norm(torch, 1e-6))


def fast_variance():
    import jax.numpy as jnp
    import torch

    return subject(norm(jnp, 1e-5), norm(torch, 1e-5, fast=True))


def tanh_gelu():
    import jax
    import torch

    return subject(lambda x: jax.nn.gelu(x, approximate=True), torch.nn.functional.gelu)


def last_of_ties():
    import jax.numpy as jnp
    import torch

    return subject(
        lambda x: jnp.argmax(x, -1).astype(jnp.int32),
        lambda x: x.shape[-1] - 1 - torch.argmax(x.flip(-1), -1),
        smooth=(),
    )


def floor_of_log():
    import jax.numpy as jnp
    import torch

    return subject(lambda x: jnp.log(jnp.abs(x)), lambda x: torch.log(x.abs().clamp(min=torch.finfo(x.dtype).tiny)))


def masked_row():
    import jax.numpy as jnp
    import torch

    def ours(x, keep):
        e = jnp.where(keep, jnp.exp(x - jnp.max(x, -1, keepdims=True)), 0.0)
        return e / jnp.maximum(jnp.sum(e, -1, keepdims=True), jnp.finfo(x.dtype).tiny)

    def theirs(x, keep):
        return torch.softmax(torch.where(keep, x, -torch.inf), -1)

    def draw(d):
        return Example((floats(d, (2, 6), (-3, 0), False), mask(d, 2, 6)))

    return subject(ours, theirs, draw, smooth=())


def id_out_of_range():
    import jax.numpy as jnp
    import torch

    table = np.arange(10.0, dtype=np.float32)

    def draw(d):
        reach = choice(d, (0, 2))
        return Example((integers(d, (3,), -reach, 9 + reach),))

    return subject(
        lambda i: jnp.take(jnp.asarray(table, jnp.result_type(float)), i, mode="clip"),
        lambda i: torch.nn.functional.embedding(i, torch.from_numpy(table).to(torch.float64)[:, None])[:, 0],
        draw,
        smooth=(),
        precisions=("float64",),
    )


PLANTED = (eps, fast_variance, tanh_gelu, last_of_ties, floor_of_log, masked_row, id_out_of_range)


@pytest.mark.parametrize("plant", PLANTED, ids=lambda f: f.__name__)
def test_a_planted_difference_is_found_and_its_snippet_shows_it(plant):
    planted = plant()
    found = search(planted, EVALUATIONS)
    assert found.example is not None, found
    assert found.verdict is not None
    assert found.to_dict()["snippet"] in "\n".join(lines([found]))
    # The snippet, with the subject itself for its name, is the example again.
    text = snippet("planted", found.example).replace("show('planted'", "show(planted")
    told: list[Any] = []
    exec(text, {"planted": planted, "print": told.append})
    assert told[0].parted
    assert told[0].verdict == found.verdict


def test_the_right_ones_agree():
    import jax.numpy as jnp
    import torch

    found = search(subject(norm(jnp, 1e-5), norm(torch, 1e-5)), EVALUATIONS)
    assert found.example is None, found
    assert found.verdict == "AGREE"
    assert 0 < found.evaluations <= EVALUATIONS


def test_the_same_seed_gives_the_same_search():
    first, second = (search(eps(), EVALUATIONS, seed=3) for _ in range(2))
    assert (first.evaluations, first.z) == (second.evaluations, second.z)
    assert first.example is not None
    assert second.example is not None
    assert snippet("x", first.example) == snippet("x", second.example)


def test_gradient_ascent_climbs_to_what_drawn_inputs_do_not_reach():
    """The sides part as x³, too little to be seen at the size that is drawn."""
    unit = float(np.finfo(np.float64).eps)

    def draw(d):
        return Example((np.abs(floats(d, (3,), (0, 0), False, ("normal",))),))

    def planted(smooth):
        return subject(
            lambda x: 1.0 + x, lambda x: 1.0 + x + unit * x * x * x / 8, draw, smooth=smooth, precisions=("float64",)
        )

    still, moved = search(planted(()), EVALUATIONS), search(planted((0,)), EVALUATIONS)
    assert still.example is None
    assert moved.example is not None


MUTANTS = {
    "norm-fast-variance": "layer-norm",
    "moe-tie-order": "moe",
    "embedding-clamped": "embedding",
    "loss-zero-ignored": "cross-entropy",
    "sampling-draw-unscaled": "sample",
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_bug_that_fixtures_hardly_reach_is_found(name):
    from parity.mutants import catalogue, inject

    mutant = next(m for m in catalogue([]) if m.id == name)
    with inject.injected(mutant.edits) as injection:
        found = search(next(s for s in subjects() if s.name == MUTANTS[name]), EVALUATIONS)
    assert not injection.dead
    assert found.example is not None, found
    clean = search(next(s for s in subjects() if s.name == MUTANTS[name]), EVALUATIONS)
    assert clean.example is None, clean
    assert clean.verdict == "AGREE"


def test_ctrl_c_keeps_what_was_found():
    def stop(found: Found) -> None:
        if found.evaluations == 5:
            raise KeyboardInterrupt

    found = Found("planted")
    with pytest.raises(KeyboardInterrupt):
        search(tanh_gelu_clean(), EVALUATIONS, tell=stop, found=found)
    assert (found.evaluations, found.ended) == (5, False)


def tanh_gelu_clean():
    import jax.numpy as jnp
    import torch

    return subject(lambda x: jnp.tanh(x), torch.tanh, smooth=())


def test_a_budget_is_evaluations_or_seconds():
    assert budget_of("40") == (40, None)
    assert budget_of("90s")[1] == 90.0
    for wrong in ("0", "-3", "1.5", "many", "s"):
        with pytest.raises(Misuse, match="must be evaluations of each function"):
            budget_of(wrong)
    results, ended = search_all([tanh_gelu_clean()], 1 << 30, 0.0)
    assert ended
    assert results[0].evaluations == 1


def test_the_record_is_plain_json():
    results, _ = search_all([id_out_of_range(), tanh_gelu_clean()], 30)
    first, second = (json.loads(json.dumps(f.to_dict(), allow_nan=False)) for f in results)
    assert "import numpy" in first["snippet"]
    assert second["snippet"] is None


def test_the_command_refuses_what_it_would_not_look_at():
    from typer.testing import CliRunner

    from parity.cli import app

    for words, told in (
        (["--search", "--device", "cuda"], "not with --search"),
        (["--budget", "9"], "only a search has one"),
        (["--search", "--only", "nothing"], "nothing"),
    ):
        result = CliRunner().invoke(app, ["run", *words])
        assert result.exit_code == 2
        assert told in result.stderr
