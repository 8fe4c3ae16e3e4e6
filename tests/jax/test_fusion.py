"""fuse, OmniLM and split_frozen: order, masks, policies, rows that lack a modality, what is refused, checkpoints."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni_jax import (
    CheckpointError,
    adamw_step,
    cross_entropy,
    init_adamw_state,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from omni_jax.audio import mel_spectrogram
from omni_jax.checkpoint import export_weights, load_report
from omni_jax.config import PAD_ID, ThinkerConfig
from omni_jax.fusion import OmniLM, fuse, fuse_chunks, split_frozen
from omni_jax.layers import TokenIdError
from omni_jax.omni_config import AudioConfig, OmniConfig, VisionConfig
from omni_jax.pt_format import write_pt
from omni_jax.thinker import ThinkerLM

THINKER = ThinkerConfig(31, 2, 24, 4, 20, dropout=0.0, ctx_len=24, use_gqa=True)
AUDIO = AudioConfig(d=12, heads=3, ff=16, layers=1, dropout=0.0)
VISION = VisionConfig(img_size=16, patch=8, d=12, layers=1, heads=2, ff=16, dropout=0.0)
CONFIG = OmniConfig(THINKER, AUDIO, VISION)
EPS = float(np.finfo(np.float32).eps)
SUM = 1000
"""More roundings than one logit of this model has on its way."""


@cache
def make(config: OmniConfig = CONFIG) -> OmniLM:
    model = OmniLM.from_config(config)
    draw = np.random.default_rng(5)
    if model.vision_encoder is not None:  # cls, pos and biases of attention start at 0
        state = nnx.state(model.vision_encoder, nnx.Param)
        moved = jax.tree.map(lambda x: x + jnp.asarray(0.1 * draw.standard_normal(x.shape), x.dtype), state)
        nnx.update(model.vision_encoder, moved)
    model.eval()
    return model


@partial(jax.jit, static_argnums=0)
def forward(graphdef, params, *args, **kwargs):
    return nnx.merge(graphdef, params)(*args, **kwargs)


def call(model: Any, *args, **kwargs) -> jax.Array:
    return forward(*nnx.split(model), *args, **kwargs)


def inputs(seed: int = 0) -> dict[str, Any]:
    """Row 0 sees, row 1 hears 9 of 20 frames, row 2 does both, row 3 neither; NaN is where nothing may be read."""
    draw = np.random.default_rng(seed)
    images, mel = draw.random((4, 3, 16, 16), np.float32), draw.standard_normal((4, 20, 128), np.float32)
    images[[1, 3]] = mel[[0, 3]] = mel[1, 9:] = np.nan
    has = {"has_image": np.array([True, False, True, False]), "has_audio": np.array([False, True, True, False])}
    return {"images": images, "mel": mel, "mel_lengths": np.array([0, 9, 20, 0]), **has}


def tokens(rows: int = 4, time: int = 6) -> np.ndarray:
    return np.random.default_rng(1).integers(3, 31, (rows, time), np.int32)


def embeddings(*lengths: int) -> list[np.ndarray]:
    draw = np.random.default_rng(2)
    return [draw.standard_normal((2, length, 8), np.float32) for length in lengths]


def assert_close(found: Any, expected: Any) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= SUM * EPS * np.abs(expected).max()


def assert_says(error: pytest.ExceptionInfo[BaseException], *names: str) -> None:
    assert all(name in str(error.value) for name in names), error.value


# fuse ----------------------------------------------------------------------------------------------------------------


def test_exercise_7() -> None:
    """One image vector, 10 of audio and 5 of text of width 256 make 16."""
    draw = np.random.default_rng(0)
    parts = [draw.standard_normal((1, length, 256), np.float32) for length in (1, 10, 5)]
    fused = fuse(*parts)
    assert fused.embeddings.shape == (1, 16, 256)
    assert np.array_equal(fused.embeddings, np.concatenate(parts, axis=1))
    assert fused.attention_mask.shape == (1, 16)
    assert bool(fused.attention_mask.all())
    assert fused.targets is None


def test_masks_and_targets() -> None:
    image, audio, text = embeddings(1, 3, 2)
    image[1] = audio[0, 2] = math.nan
    audio_mask = np.array([[True, True, False], [True, True, True]])
    targets = np.array([[5, 6], [7, PAD_ID]])
    fused = fuse(image, audio, text, image_mask=np.array([True, False]), audio_mask=audio_mask, targets=targets)
    assert fused.attention_mask.tolist() == [[True, True, True, False, True, True], [False] + [True] * 5]
    assert bool((fused.embeddings[~fused.attention_mask] == 0).all())
    assert np.array_equal(fused.embeddings[:, 4:], text)
    assert fused.targets is not None
    assert fused.targets.tolist() == [[PAD_ID] * 4 + [5, 6], [PAD_ID] * 4 + [7, PAD_ID]]


def test_what_is_masked_out_has_no_gradient() -> None:
    image, text = embeddings(1, 2)
    image[1] = math.nan
    gradient = jax.grad(lambda x: fuse(x, text=text, image_mask=np.array([True, False])).embeddings.sum())(image)
    assert gradient[:, 0, 0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("policy", "ctx_len", "lengths"),
    [
        ("family", 40, (1, 10, 9)),
        ("family", 20, (1, 5, 9)),  # the audio, always, although all would fit
        ("family", 12, (1, 3, 7)),
        ("family", 4, (1, 1, 1)),
        ("longest", 20, (1, 10, 9)),
        ("longest", 19, (1, 9, 9)),
        ("longest", 18, (1, 8, 9)),
        ("longest", 10, (1, 4, 5)),
        ("longest", 3, (1, 1, 1)),
        ("error", 20, (1, 10, 9)),
    ],
)
def test_policies(policy, ctx_len, lengths) -> None:
    parts = embeddings(1, 10, 9)
    targets = np.arange(3, 21).reshape(2, 9)
    fused = fuse(*parts, targets=targets, ctx_len=ctx_len, policy=policy)
    cut = np.concatenate([part[:, :length] for part, length in zip(parts, lengths, strict=True)], axis=1)
    assert np.array_equal(fused.embeddings, cut)
    assert fused.targets is not None
    assert np.array_equal(fused.targets[:, -lengths[2] :], targets[:, : lengths[2]])


def test_text_alone_may_fill_the_context() -> None:
    (text,) = embeddings(9)
    assert fuse(text=text, ctx_len=9).embeddings.shape[1] == 9
    assert fuse(text=text, ctx_len=7).embeddings.shape[1] == 7


def test_chunks_repeat_all_but_the_longest() -> None:
    image, audio, text = embeddings(1, 10, 3)
    targets = np.arange(3, 9).reshape(2, 3)
    chunks = fuse_chunks(image, audio, text, targets=targets, ctx_len=8)
    assert [chunk.embeddings.shape[1] for chunk in chunks] == [8, 8, 6]
    assert np.array_equal(np.concatenate([chunk.embeddings[:, 1:-3] for chunk in chunks], axis=1), audio)
    for chunk in chunks:
        assert np.array_equal(chunk.embeddings[:, :1], image)
        assert np.array_equal(chunk.embeddings[:, -3:], text)
        assert chunk.targets is not None
        assert np.array_equal(chunk.targets[:, -3:], targets)
    (whole,) = fuse_chunks(image, audio, text, ctx_len=14)
    assert np.array_equal(whole.embeddings, fuse(image, audio, text).embeddings)


def rows() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Rows that differ in what they have, of three modalities with padding anywhere, and each of them alone."""
    draw = np.random.default_rng(6)
    lengths = np.array([[1, 10, 9], [1, 0, 9], [0, 10, 2], [0, 0, 9], [1, 2, 5], [0, 0, 0], [1, 10, 0], [0, 3, 9]])
    batch: dict[str, Any] = {}
    alone: list[dict[str, Any]] = [{} for _ in lengths]
    for i, (name, width) in enumerate((("image", 1), ("audio", 10), ("text", 9))):
        vectors = draw.standard_normal((len(lengths), width, 8), np.float32)
        mask = draw.permuted(np.arange(width)[None] < lengths[:, i : i + 1], axis=1)
        vectors[~mask] = math.nan
        batch |= {name: vectors, f"{name}_mask": mask}
        for row, own in enumerate(mask):
            if own.any():
                alone[row][name] = vectors[row : row + 1, own]
    batch["targets"] = draw.integers(1, 31, (len(lengths), 9), np.int32)
    for row, own in enumerate(batch["text_mask"]):
        if own.any():
            alone[row]["targets"] = batch["targets"][row : row + 1, own]
    return batch, alone


def assert_is_row(fused: Any, row: int, alone: Any) -> None:
    """What the row keeps is what it is alone, in its order; elsewhere are zeros and PAD."""
    kept = np.asarray(fused.attention_mask[row])
    assert np.array_equal(np.asarray(fused.embeddings[row])[kept], np.asarray(alone.embeddings[0]))
    assert not np.asarray(fused.embeddings[row])[~kept].any()
    targets = np.asarray(fused.targets[row])
    assert (targets[~kept] == PAD_ID).all()
    assert targets[kept].tolist() == ([PAD_ID] * kept.sum() if alone.targets is None else alone.targets[0].tolist())


@pytest.mark.parametrize("policy", ["family", "longest"])
@pytest.mark.parametrize("ctx_len", [3, 4, 7, 12, 19, 20])
def test_each_row_is_cut_as_it_is_alone(policy, ctx_len) -> None:
    """A long clip in one row takes no text, and no target, from another; inside jit too, where masks are not known."""
    batch, alone = rows()
    cut = partial(fuse, ctx_len=ctx_len, policy=policy)
    for fused in (cut(**batch), jax.jit(cut)(**batch)):
        for row, own in enumerate(alone):
            if own:
                assert_is_row(fused, row, cut(**own))
            else:
                assert not np.asarray(fused.attention_mask[row]).any()
        widest = max(cut(**own).embeddings.shape[1] for own in alone if own)
        assert fused.embeddings.shape[1] == widest <= ctx_len


def test_text_that_fits_stays_in_its_place() -> None:
    """The last places are the text's, padding included, whatever is cut of the clip before it."""
    batch, _ = rows()
    fused = fuse(**batch, ctx_len=24)
    assert np.array_equal(np.asarray(fused.attention_mask)[:, -9:], batch["text_mask"])
    assert fused.embeddings.shape[1] == 1 + 6 + 9


def test_each_row_has_the_chunks_that_it_has_alone() -> None:
    """A row that needs fewer of them is not read, nor has it targets, in the others."""
    batch, alone = rows()
    chunks = fuse_chunks(**batch, ctx_len=14)
    assert [chunk.embeddings.shape[1] for chunk in chunks] == [14, 14, 12]
    for row, own in enumerate(alone):
        single = fuse_chunks(**own, ctx_len=14) if own else []
        for chunk, part in zip(chunks, single, strict=False):
            assert_is_row(chunk, row, part)
        for chunk in chunks[len(single) :]:
            assert not np.asarray(chunk.attention_mask[row]).any()
            assert not np.asarray(chunk.targets[row]).any()


REFUSED = {
    "nothing": ({}, ("image, audio and text are all None",)),
    "mask without its part": ({"text": 5, "audio_mask": "rows"}, ("audio_mask is given without audio",)),
    "rank": ({"text": "flat"}, ("text has shape (2, 8)", "(B, length, D)")),
    "width": ({"image": 1, "text": "wide"}, ("text is", "(2, 5, 9)", "(2, 1, 8)")),
    "dtype": ({"image": 1, "text": "half"}, ("float16", "cast")),
    "mask of ones": ({"text": 5, "text_mask": "ones"}, ("text_mask is", "boolean", "(2,) or (2, 5)")),
    "mask of another shape": ({"text": 5, "text_mask": "long"}, ("text_mask", "(2, 6)")),
    "targets without text": ({"image": 1, "targets": 5}, ("targets", "no text")),
    "targets of another length": ({"text": 5, "targets": 4}, ("targets have shape (2, 4)", "(2, 5)")),
    "targets of floats": ({"text": 5, "targets": "floats"}, ("targets", "integers")),
    "policy": ({"text": 5, "policy": "cut"}, ("policy = 'cut'", "family, longest, error")),
    "ctx_len": ({"text": 5, "ctx_len": 0}, ("ctx_len = 0",)),
    "too long": (
        {"image": 1, "text": 5, "ctx_len": 5, "policy": "error"},
        ("1 of image, 5 of text are 6", "ctx_len=5"),
    ),
    "no room": ({"image": 1, "text": 5, "ctx_len": 1, "policy": "longest"}, ("ctx_len=1",)),
}


def given(value: int | str, name: str) -> Any:
    if name in ("ctx_len", "policy"):
        return value
    if isinstance(value, int):
        return np.ones((2, value), np.int32) if name == "targets" else embeddings(value)[0]
    return {
        "rows": np.ones(2, np.bool_),
        "flat": np.ones((2, 8)),
        "wide": np.ones((2, 5, 9), np.float32),
        "half": np.ones((2, 5, 8), np.float16),
        "ones": np.ones((2, 5)),
        "long": np.ones((2, 6), np.bool_),
        "floats": np.ones((2, 5)),
    }[value]


@pytest.mark.parametrize("name", REFUSED)
def test_fuse_refuses(name) -> None:
    arguments, names = REFUSED[name]
    with pytest.raises(ValueError) as caught:
        fuse(**{key: given(value, key) for key, value in arguments.items()})
    assert_says(caught, *names)


def test_chunks_refuse_what_leaves_no_room() -> None:
    image, text = embeddings(3, 5)
    with pytest.raises(ValueError, match="3 of image, 5 of text do not fit into ctx_len=3"):
        fuse_chunks(image, text=text, ctx_len=3)


# OmniLM --------------------------------------------------------------------------------------------------------------


def test_each_row_is_as_it_is_alone() -> None:
    """What a row lacks, and what stands behind a clip's length, changes nothing, not even as NaN."""
    model, batch, ids = make(), inputs(), tokens()
    logits = call(model, ids, **batch)
    assert logits.shape == (4, 1 + 5 + 6, 31)
    assert_close(model(ids, **batch), logits)
    alone = [
        {"images": batch["images"][:1]},
        {"mel": batch["mel"][1:2, :9]},
        {"images": batch["images"][2:3], "mel": batch["mel"][2:3]},
        {},
    ]
    for row, arguments in enumerate(alone):
        assert_close(logits[row, -6:], call(model, ids[row : row + 1], **arguments)[0, -6:])
    assert_close(logits[3:, -6:], call(model.thinker, ids[3:]))


def test_padding_of_the_text_changes_nothing() -> None:
    model, batch, ids = make(), inputs(), tokens()
    kept = np.arange(6)[None] >= np.array([0, 2, 3, 1])[:, None]
    logits = call(model, np.where(kept, ids, PAD_ID), **batch, attention_mask=kept)
    alone = call(model, ids[2:3, 3:], images=batch["images"][2:3], mel=batch["mel"][2:3])
    assert_close(logits[2, -3:], alone[0, -3:])


def test_the_image_is_the_cls_vector_and_the_order_image_audio_text() -> None:
    model, batch, ids = make(), inputs(), tokens()
    row = {"images": batch["images"][2:3], "mel": batch["mel"][2:3]}
    assert model.vision_encoder is not None
    assert model.proj_v is not None
    assert model.audio_encoder is not None
    assert model.proj_a is not None
    cls, _ = model.vision_encoder(row["images"])
    before = jnp.concatenate([model.proj_v(cls), model.proj_a(model.audio_encoder(row["mel"]))], axis=1)
    found, mask = model.encode(**row)
    assert_close(found, before)
    assert bool(mask.all())
    whole = jnp.concatenate([before, model.thinker.tok_emb(ids[2:3])], axis=1)
    assert_close(call(model, ids[2:3], **row), call(model.thinker, embeddings=whole))


def test_encode_masks_what_is_not_there() -> None:
    found, mask = make().encode(**inputs())
    assert mask.sum(axis=1).tolist() == [1, 3, 6, 0]
    assert bool((found[~mask] == 0).all())


def test_loss_is_the_mean_over_the_targets_of_the_text() -> None:
    model, batch, ids = make(), inputs(), tokens()
    targets = np.roll(ids, -1, axis=1)
    targets[:, -1] = targets[1, 3:] = PAD_ID
    graphdef, params = nnx.split(model)
    loss, gradients = jax.jit(jax.value_and_grad(lambda p: nnx.merge(graphdef, p).loss(ids, targets, **batch)))(params)
    assert_close(loss[None], cross_entropy(call(model, ids, **batch)[:, -6:], targets)[None])
    assert all(bool(jnp.isfinite(gradient).all()) for gradient in jax.tree.leaves(gradients))


def test_all_is_cut_to_the_context_as_the_family_does() -> None:
    """24 in all: 1 for the image, 24 // 4 = 6 for the audio, the text then has 24 − 7 − 1."""
    model, ids = make(), tokens(1, 24)
    mel = np.random.default_rng(3).standard_normal((1, 100, 128), np.float32)
    images = inputs()["images"][:1]
    assert call(model, ids).shape == (1, 24, 31)
    logits = call(model, ids, images=images, mel=mel)
    assert logits.shape == (1, 1 + 6 + 16, 31)
    before, _ = model.encode(images, mel)
    assert before.shape == (1, 7, 24)
    targets = np.full_like(ids, 5)
    assert_close(
        model.loss(ids, targets, images=images, mel=mel)[None], cross_entropy(logits[:, 7:], targets[:, :16])[None]
    )


def test_a_bfloat16_model_computes_in_bfloat16() -> None:
    given = {name: jnp.asarray(value) for name, value in inputs().items()}
    for kinds in ({"param_dtype": jnp.bfloat16}, {"dtype": jnp.bfloat16}):
        model = OmniLM.from_config(CONFIG, **kinds)
        assert jax.eval_shape(partial(forward, *nnx.split(model)), tokens(), **given).dtype == jnp.bfloat16
        loss = jax.eval_shape(lambda model=model: model.loss(tokens(), tokens(), **given))
        assert loss.dtype == jnp.float32


def test_one_program_for_other_masks_lengths_and_values() -> None:
    model = make()
    graphdef, params = nnx.split(model)
    chex.clear_trace_counter()
    run = jax.jit(chex.assert_max_traces(lambda p, *args, **kwargs: nnx.merge(graphdef, p)(*args, **kwargs), n=1))
    for seed in range(3):
        batch = inputs(seed)
        batch["has_audio"] = np.roll(batch["has_audio"], seed)
        batch["mel_lengths"] = np.full(4, 5 + seed)
        batch["mel"] = np.nan_to_num(batch["mel"])
        assert bool(jnp.isfinite(run(params, tokens(), **batch)).all())


def test_cheap_weights_are_those_of_the_constructor() -> None:
    """Leaf by leaf: the same zeros and ones, and the same bound of uniform draws, up to chance."""
    config = OmniConfig(THINKER, AudioConfig(d=48, heads=3, ff=64, layers=1), VisionConfig(32, 8, 48, 1, 3, 64))
    cheap, slow = (
        dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
        for model in (OmniLM.from_config(config), OmniLM(config, rngs=nnx.Rngs(0)))
    )
    assert cheap.keys() == slow.keys()
    for path, ours in cheap.items():
        a, b = np.asarray(ours.get_value()), np.asarray(slow[path].get_value())
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if not b.any() or (b == 1.0).all():
            assert np.array_equal(a, b), path
        elif path[-1] != "embedding" and b.size >= 48:
            assert 0.8 < np.abs(a).max() / np.abs(b).max() < 1.25, path


def test_features_are_one_affine_function_of_log10() -> None:
    model = make()
    draw = np.random.default_rng(4)
    waves = np.stack([draw.standard_normal(2000), 1e-3 * draw.standard_normal(2000), np.zeros(2000)]).astype(np.float32)
    found = model.features(waves)
    assert found.shape == (3, 13, 128)
    mel = mel_spectrogram(waves, 16000, 1024, 160, 400)
    expected = (jnp.log10(jnp.maximum(mel, 1e-10)) + 4.0) / 4.0
    assert float(jnp.abs(found - jnp.swapaxes(expected, 1, 2)).max()) <= 20 * EPS
    assert float(jnp.abs(found[2] + 1.5).max()) <= 10 * EPS
    assert_close(found[1], model.features(waves[1]))
    assert_close(found, jax.jit(model.features)(waves))
    assert float(model.features(jnp.sin(jnp.arange(2000.0))).max()) < 2.2


BAD_INPUTS = {
    "has_image without images": ({"has_image": "yes"}, ("has_image is given without images",)),
    "has_audio without mel": ({"has_audio": "yes"}, ("has_audio is given without mel",)),
    "mel_lengths without mel": ({"mel_lengths": [3, 3]}, ("mel_lengths is given without mel",)),
    "another batch of images": ({"images": (1, 3, 16, 16)}, ("images has 1 rows", "batch 2", "has_image=")),
    "another batch of clips": ({"mel": (3, 20, 128)}, ("mel has 3 rows", "has_audio=")),
    "one image": ({"images": (3, 16, 16)}, ("(3, 16, 16)", "(B, 3, H, W)")),
    "patches": ({"images": (2, 3, 12, 16)}, ("12 × 16", "8")),
    "mels": ({"mel": (2, 20, 80)}, ("(2, 20, 80)", "128")),
    "NaN in an image": ({"images": (2, 3, 16, 16), "nan": "images"}, ("images holds NaN", "[1, 0, 0, 0]")),
    "NaN in a clip": ({"mel": (2, 20, 128), "nan": "mel"}, ("mel holds NaN", "[1, 0, 0]")),
    "levels": ({"images": "levels"}, ("images", "floating point", "255")),
    "mask of one row": ({"images": (2, 3, 16, 16), "has_image": "one"}, ("has_image", "(2,)")),
    "mask of ones": ({"mel": (2, 20, 128), "has_audio": "ones"}, ("has_audio", "boolean")),
    "a clip without frames": ({"mel": (2, 20, 128), "mel_lengths": [20, 0]}, ("mel_lengths[1] = 0", "has_audio=")),
    "too many frames": ({"mel": (2, 20, 128), "mel_lengths": [20, 21]}, ("mel_lengths[1] = 21", "20 frames")),
    "lengths of floats": ({"mel": (2, 20, 128), "mel_lengths": [1.0, 2.0]}, ("mel_lengths", "integers")),
    "tokens of one row": ({"tokens": "flat"}, ("tokens have shape (6,)",)),
    "a token beyond": ({"tokens": "beyond"}, ("31",)),
    "mask of the text": ({"attention_mask": "yes"}, ("attention_mask", "(2, 6)")),
}


def bad_inputs(arguments: dict) -> dict[str, Any]:
    made = {
        "yes": np.array([True, True]),
        "one": np.array([True]),
        "ones": np.ones(2, np.float32),
        "levels": np.ones((2, 3, 16, 16), np.uint8),
        "flat": tokens(2)[0],
        "beyond": np.full((2, 6), 31),
    }
    found: dict[str, Any] = {"tokens": tokens(2)}
    for name, value in arguments.items():
        if isinstance(value, tuple):
            found[name] = np.ones(value, np.float32)
        else:
            found[name] = np.array(value) if isinstance(value, list) else made.get(value, value)
    bad = found.pop("nan", None)
    if bad is not None:
        found[bad][1].reshape(-1)[0] = math.nan
    return found


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_inputs_are_refused(name) -> None:
    arguments, names = BAD_INPUTS[name]
    with pytest.raises(ValueError) as caught:
        make()(**bad_inputs(arguments))
    assert_says(caught, *names)


def test_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="targets have shape"):
        make().loss(tokens(), tokens()[:, :3])
    with pytest.raises(TokenIdError):
        make().loss(tokens(), tokens() + 31)


@pytest.mark.parametrize(("sense", "given"), [("vision", "images"), ("audio", "mel")])
def test_a_sense_that_the_model_lacks(sense, given) -> None:
    sections = {"audio": AUDIO, "vision": VISION, sense: None}
    model = make(OmniConfig(THINKER, **sections))
    assert not [name for name in export_weights(model) if name.startswith((sense, f"proj_{sense[0]}"))]
    with pytest.raises(ValueError, match=f"no section '{sense}'"):
        model(tokens(), **{given: jnp.ones((4, 3, 16, 16)) if given == "images" else jnp.ones((4, 20, 128))})
    if sense == "audio":
        with pytest.raises(ValueError, match="no section 'audio'"):
            model.features(jnp.ones(2000))


def test_nothing_to_encode() -> None:
    with pytest.raises(ValueError, match="images and mel are both None"):
        make().encode()


def test_a_clip_that_is_too_short() -> None:
    """What helps is what `features` takes: it has no n_fft and no pad_mode."""
    for shape in ((512,), (2, 512)):
        with pytest.raises(ValueError, match=r"the wave has 512 samples: .* 513 .*; give a longer one, or fill it up"):
            make().features(jnp.ones(shape))
    with pytest.raises(ValueError, match="channels last"):
        make().features(jnp.ones((2000, 2)))
    assert make().features(jnp.ones(513)).shape == (4, 128)


def test_a_long_clip_in_one_row_cuts_no_other() -> None:
    """100 frames are 25 vectors, 24 // 4 = 6 of them are kept; the text beside has room for 24 - 6 - 1."""
    model, ids = make(), tokens(2, 20)
    mel = np.random.default_rng(3).standard_normal((2, 100, 128)).astype(np.float32)
    given = {"mel": mel, "has_audio": np.array([True, False])}
    logits = call(model, ids, **given)
    alone = call(model, ids[1:])
    assert_close(logits[1, -20:], alone[0])
    targets = np.where(np.arange(2)[:, None] == 1, ids, PAD_ID)
    loss = model.loss(ids, targets, **given)
    expected = cross_entropy(alone, ids[1:])
    assert_close(loss[None], expected[None])


# Frozen parts --------------------------------------------------------------------------------------------------------


def named(state: nnx.State) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(state)
    return {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in flat}


def test_frozen_parts_keep_every_bit() -> None:
    graphdef, params = nnx.split(OmniLM.from_config(CONFIG))
    trainable, frozen = split_frozen(params, ["vision_encoder", "thinker.blocks.0.attn."])
    assert named(trainable).keys() | named(frozen).keys() == named(params).keys()
    assert all(name.startswith(("vision_encoder.", "thinker.blocks.0.attn.")) for name in named(frozen))

    @jax.jit
    def step(trainable, frozen, state, batch):
        def loss(trainable):
            return nnx.merge(graphdef, trainable, frozen).loss(tokens(), tokens(), **batch)

        return adamw_step(trainable, jax.grad(loss)(trainable), state, lr=1e-2, weight_decay=0.5)

    state, batch = init_adamw_state(trainable), inputs()
    moved = trainable
    for _ in range(3):
        moved, state = step(moved, frozen, state, batch)
    after = named(nnx.state(nnx.merge(graphdef, moved, frozen), nnx.Param))
    assert all(np.array_equal(value, after[name]) for name, value in named(frozen).items())
    assert not any(np.array_equal(value, after[name]) for name, value in named(trainable).items())


@pytest.mark.parametrize(
    ("frozen", "names"),
    [
        (["vision"], ("'vision'", "audio_encoder, proj_a, proj_v, thinker, vision_encoder")),
        ("thinker", ("['thinker']",)),
        (["thinker", "audio_encoder", "proj_a", "vision_encoder", "proj_v"], ("leave a parameter",)),
    ],
)
def test_split_frozen_refuses(frozen, names) -> None:
    with pytest.raises(ValueError) as caught:
        split_frozen(nnx.state(make(), nnx.Param), frozen)
    assert_says(caught, *names)


# Checkpoints ---------------------------------------------------------------------------------------------------------


def same(model: OmniLM, other: OmniLM) -> None:
    assert model.config == other.config
    ours, theirs = export_weights(model), export_weights(other)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


def part(model: OmniLM, name: str) -> dict[str, np.ndarray]:
    """As torch.compile names what it holds."""
    return {f"_orig_mod.{key}": np.asarray(value) for key, value in export_weights(getattr(model, name)).items()}


def save(tree: Any, path) -> None:
    with path.open("wb") as stream:
        write_pt(stream, tree)


def family(model: OmniLM, folder) -> None:
    """A folder as the family's trainers leave it: a multimodal dict, the encoders in files of their own."""
    save({name: part(model, name) for name in ("thinker", "proj_a", "proj_v")} | {"step": 3}, folder / "omni.pt")
    save({"vit": part(model, "vision_encoder")}, folder / "vision.pt")
    save({"enc": part(model, "audio_encoder"), "head": {"weight": np.ones((2, 12))}}, folder / "audio.pt")


@pytest.mark.parametrize("name", ["omni.pt", "omni.safetensors"])
def test_saved_and_loaded(name, tmp_path) -> None:
    model = make()
    optimizer = None if name.endswith("safetensors") else {"state": {}}
    save_checkpoint(tmp_path / name, model=model, step=7, optimizer=optimizer)
    CONFIG.to_json(tmp_path / "config.json")
    loaded = OmniLM.from_checkpoint(tmp_path)
    same(model, loaded)
    assert loaded.thinker.blocks[0].drop.deterministic
    held = load_checkpoint(tmp_path / name)
    assert (held.kind, held.step) == ("safetensors" if optimizer is None else "multimodal", 7)
    assert sorted(held.parts) == ["audio_encoder", "proj_a", "proj_v", "vision_encoder"]
    same(model, load_weights(OmniLM.from_config(CONFIG), held))
    alone = ThinkerLM.from_checkpoint(tmp_path)
    assert np.array_equal(call(alone, tokens()), call(model.thinker, tokens()))


def test_the_familys_dicts_with_encoders_in_files_of_their_own(tmp_path) -> None:
    model = make()
    family(model, tmp_path)
    CONFIG.to_json(tmp_path / "some.json")
    files = {"audio": tmp_path / "audio.pt", "vision": tmp_path / "vision.pt"}
    same(model, OmniLM.from_checkpoint(tmp_path / "omni.pt", config=tmp_path / "some.json", **files))
    same(model, OmniLM.from_checkpoint(tmp_path / "omni.pt", config=CONFIG, **files))
    with pytest.raises(CheckpointError, match="holds no vision_encoder"):
        OmniLM.from_checkpoint(tmp_path / "omni.pt", config=CONFIG, audio=files["audio"])
    with pytest.raises(CheckpointError, match="holds no audio_encoder"):
        OmniLM.from_checkpoint(tmp_path / "omni.pt", config=CONFIG, audio=files["vision"], vision=files["vision"])
    deaf = OmniConfig(THINKER, None, VISION)
    same(make_from(model, deaf), OmniLM.from_checkpoint(tmp_path / "omni.pt", config=deaf, vision=files["vision"]))
    with pytest.raises(ValueError, match="no section 'audio'"):
        OmniLM.from_checkpoint(tmp_path / "omni.pt", config=deaf, **files)
    with pytest.raises(ValueError, match="no config file"):
        OmniLM.from_checkpoint(tmp_path / "omni.pt", **files)


def make_from(model: OmniLM, config: OmniConfig) -> OmniLM:
    """A model of fewer parts, with those of `model`."""
    smaller = OmniLM.from_config(config)
    wanted = export_weights(smaller)
    return load_weights(smaller, {key: value for key, value in export_weights(model).items() if key in wanted})


def test_what_does_not_fit_is_listed(tmp_path) -> None:
    model = make()
    save_checkpoint(tmp_path / "omni.pt", model=model, parts={"talker": {"w": np.ones(2)}})
    held = load_checkpoint(tmp_path / "omni.pt")
    report = load_report(model, held)
    assert report.fits
    assert report.ignored == {"talker": "a part that the model does not have"}
    with pytest.raises(ValueError, match="the config is not that of the checkpoint"):
        OmniLM.from_checkpoint(tmp_path / "omni.pt", config=OmniConfig(ThinkerConfig(31, 3, 24, 4, 20), AUDIO, VISION))
    other = OmniConfig(THINKER, AUDIO, VisionConfig(img_size=32, patch=8, d=12, layers=1, heads=2, ff=16))
    with pytest.raises(CheckpointError, match=r"vision_encoder\.pos has shape"):
        OmniLM.from_checkpoint(tmp_path / "omni.pt", config=other)
    save_checkpoint(tmp_path / "thinker.pt", model=model.thinker)
    empty, held = OmniLM.from_config(CONFIG), load_checkpoint(tmp_path / "thinker.pt")
    with pytest.raises(CheckpointError, match="missing: audio_encoder"):
        load_weights(empty, held)
