"""The toy world: the same draws every time, no held-out composition in training, files that read back exactly."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import numpy as np
import pytest

from omni_jax.audio import load_audio
from omni_jax.vision import load_image
from omni_jax.world import (
    COLOURS,
    LISTEN,
    SHAPES,
    SOUNDS,
    SPLITS,
    is_held_out_order,
    is_held_out_pair,
    longest_clip,
    make_clip,
    make_picture,
    make_story,
    world_words,
    write_world,
)
from omni_jax.world_batch import world_config, world_questions, world_rows, world_tokenizer

DIFFICULTIES = (1, 2, 3)
DRAWS = 150
UNKNOWN = 3


def held_out_pairs(text: str) -> list[str]:
    """Every held-out colour right before its shape."""
    return [f"{c} {s}" for c in COLOURS for s in SHAPES if is_held_out_pair(c, s) and re.search(rf"\b{c} {s}", text)]


def held_out_orders(text: str) -> list[tuple[str, str]]:
    words = re.findall(r"\w+", text)
    return [(a, b) for a, b in pairwise(words) if a in SOUNDS and b in SOUNDS and is_held_out_order(a, b)]


def test_every_draw_follows_from_its_numbers_alone() -> None:
    for make in (make_picture, make_clip, make_story):
        again = [make(7, "train", 5, 2), make(7, "train", 4, 2), make(7, "train", 5, 2)]
        assert repr(again[0]) == repr(again[2])
        for other in ((8, "train", 5, 2), (7, "validation", 5, 2), (7, "train", 6, 2), (7, "train", 5, 3)):
            if make is make_story:
                continue  # a few hundred stories in all: two may be alike
            assert not np.array_equal(make(*other)[0], again[0][0])
    a, b = make_picture(7, "train", 5, 2), make_picture(7, "train", 5, 2)
    assert np.array_equal(a.pixels, b.pixels)
    assert np.array_equal(make_clip(7, "train", 5).wave, make_clip(7, "train", 5).wave)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_held_out_compositions_are_never_trained_on(split, difficulty) -> None:
    for i in range(DRAWS):
        picture, clip = make_picture(3, split, i, difficulty), make_clip(3, split, i, difficulty)
        assert not any(c and s and is_held_out_pair(c, s) for c, s in picture.kinds)
        texts = [picture.caption, make_story(3, split, i, difficulty), *map(" ".join, picture.questions)]
        assert not any(held_out_pairs(text) for text in texts)
        assert not held_out_orders(clip.transcript)
        assert not held_out_orders(make_story(3, split, i, difficulty))
    assert not any(held_out_pairs(line) or held_out_orders(line) for line in world_words())


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_a_colour_without_a_name_is_not_the_held_out_one(difficulty) -> None:
    """In its pixels, since no word says it."""
    seen = 0
    for i in range(DRAWS):
        picture = make_picture(3, "train", i, difficulty)
        (colour, shape) = picture.kinds[0]
        if colour:
            continue
        seen += 1
        banned = next(np.array(COLOURS[c], float) for c in COLOURS if is_held_out_pair(c, shape))
        ground = np.median(picture.pixels.reshape(-1, 3), axis=0)
        distance = np.abs(picture.pixels - ground).max(axis=2)
        painted = picture.pixels[distance > 0.9 * np.quantile(distance, 0.99)].mean(axis=0)
        assert np.abs(painted - banned).max() > 40.0, (i, shape, painted)
    assert seen > DRAWS // 10


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_what_is_held_out_has_a_held_out_composition_every_time(difficulty) -> None:
    for i in range(DRAWS):
        assert is_held_out_pair(*make_picture(3, "heldout", i, difficulty).kinds[0])
        assert held_out_orders(make_clip(3, "heldout", i, difficulty).transcript)


def test_every_part_of_a_held_out_composition_is_trained_on() -> None:
    kinds = {kind for i in range(6 * DRAWS) for kind in make_picture(0, "train", i).kinds}
    assert {(c, s) for c in COLOURS for s in SHAPES if not is_held_out_pair(c, s)} <= kinds
    words = {word for i in range(2 * DRAWS) for word in make_clip(0, "train", i).transcript.split()}
    assert words == set(SOUNDS)
    assert sum(is_held_out_pair(c, s) for c in COLOURS for s in SHAPES) == len(SHAPES)
    assert sum(is_held_out_order(a, b) for a in SOUNDS for b in SOUNDS) == len(SOUNDS)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_pictures_and_clips_are_what_they_say(difficulty) -> None:
    lengths, noise = [], []
    for i in range(DRAWS):
        picture, clip = make_picture(1, "train", i, difficulty), make_clip(1, "train", i, difficulty)
        assert picture.pixels.shape == (48, 48, 3)
        assert picture.pixels.dtype == np.uint8
        asked = dict(picture.questions)
        named = all("" not in kind for kind in picture.kinds)
        assert asked.get("caption:") == (picture.caption if named else None)
        assert len(asked) == len(picture.questions)
        assert clip.wave.dtype == np.float32
        assert np.array_equal(clip.wave * 32768, np.rint(clip.wave * 32768))
        assert 0.1 < np.abs(clip.wave).max() * 10 < 10.0
        lengths.append(clip.wave.size)
        noise.append(picture.pixels[:2, :2].astype(float).std())
    assert max(lengths) <= longest_clip(difficulty)
    assert max(lengths) > 0.8 * longest_clip(difficulty)


def test_difficulty_is_harder() -> None:
    """More noise, smaller shapes, more of them, longer clips."""

    def facts(difficulty: int) -> tuple[float, int, int]:
        pictures = [make_picture(2, "train", i, difficulty) for i in range(100)]
        noise = np.mean([p.pixels[23:25, :3].astype(float).std(axis=(0, 1)).mean() for p in pictures])
        return float(noise), len({dict(p.questions)["how many?"] for p in pictures}), longest_clip(difficulty)

    easy, middle, hard = map(facts, DIFFICULTIES)
    assert easy[0] < middle[0] < hard[0]
    assert easy[1] <= middle[1] <= hard[1]
    assert easy[2] < middle[2] < hard[2]


def test_files_read_back_as_exactly_what_was_drawn(tmp_path) -> None:
    index = write_world(tmp_path / "new" / "world", seed=4, difficulty=2, split="heldout", count=3)
    records = [json.loads(line) for line in index.read_text().splitlines()]
    assert [record["index"] for record in records] == [0, 1, 2]
    for i, record in enumerate(records):
        picture, clip = make_picture(4, "heldout", i, 2), make_clip(4, "heldout", i, 2)
        levels = np.asarray(load_image(index.parent / record["image"], size=None))
        assert np.array_equal(levels, picture.pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255.0))
        assert np.array_equal(np.asarray(load_audio(index.parent / record["audio"])), clip.wave)
        assert [tuple(pair) for pair in record["questions"]] == list(picture.questions)
        assert (record["caption"], record["transcript"]) == (picture.caption, clip.transcript)
        assert record["story"] == make_story(4, "heldout", i, 2)
    before = index.read_bytes()
    with pytest.raises(ValueError, match="already, and not overwritten"):
        write_world(index.parent)
    assert index.read_bytes() == before


BAD = [
    (lambda: make_picture(0, "test", 0), "split = 'test' is not allowed: must be one of train, validation, heldout"),
    (lambda: make_clip(-1, "train", 0), "seed = -1 is not allowed"),
    (lambda: make_story(0, "train", 1.5), "index = 1.5 is not allowed"),
    (lambda: make_picture(0, "train", 0, 4), r"difficulty = 4 is not allowed: must be 1 \(easy\), 2 or 3"),
    (lambda: longest_clip(0), "difficulty = 0"),
    (lambda: is_held_out_pair("pink", "circle"), "colour = 'pink'"),
    (lambda: is_held_out_pair("red", "star"), "shape = 'star'"),
    (lambda: is_held_out_order("one", "ten"), "second = 'ten'"),
    (lambda: write_world("nowhere", count=0), "count = 0 is not allowed"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_refused_before_anything_is_written(case, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_rows_have_fixed_shapes_and_targets_for_answers_alone(difficulty) -> None:
    tokenizer, _ = world_tokenizer()
    early, late = (world_rows(world_config(), tokenizer, 0, "train", step, 10, difficulty) for step in (3, 9))
    for part, other in zip(early, late, strict=True):
        assert [None if x is None else x.shape for x in part] == [None if x is None else x.shape for x in other]
        predicted = part.targets != 0
        shifted = np.concatenate([part.tokens[:, 1:], part.targets[:, -1:]], axis=1)
        hidden = shifted == UNKNOWN  # a word of a picture's answer that is not shown
        colour = np.isin(shifted, _colours(tokenizer))
        same = predicted & ~hidden & ~colour
        assert np.array_equal(part.targets[same], shifted[same])
        assert not (hidden & ~predicted).any()
    alone, mixed = early
    assert alone.has_image.all()
    said = tokenizer.decode(mixed.targets[0].tolist())
    assert tokenizer.decode(mixed.tokens[0].tolist()) == f"{LISTEN}{said}"
    assert said.strip() == make_clip(0, "train", 3 * int((mixed.frames > 0).sum()), difficulty).transcript
    assert mixed.has_image.any()
    assert not mixed.has_image[0]
    assert (mixed.has_audio == (mixed.frames > 0)).all()
    assert not mixed.has_audio[-1]
    assert (mixed.targets[-1] != 0).sum() > 8  # a story
    assert not (mixed.tokens[~mixed.has_image] == UNKNOWN).any()


def test_captions_come_late_and_until_then_no_word_of_an_answer_is_shown() -> None:
    tokenizer, _ = world_tokenizer()
    early, late = (world_rows(world_config(), tokenizer, 0, "train", step, 10)[0] for step in (5, 6))
    asks = [["caption:" in tokenizer.decode(row.tolist()) for row in part.tokens] for part in (early, late)]
    assert not any(asks[0])
    assert 0.05 < np.mean(asks[1]) < 0.4
    for row, asked in zip(late.targets, asks[1], strict=True):
        assert not asked or "thing" not in tokenizer.decode(row[row != 0].tolist())
    answers = [part.targets > UNKNOWN for part in (early, late)]
    shown = [(part.tokens[:, 1:] != UNKNOWN)[words[:, :-1]].mean() for part, words in zip((early, late), answers)]
    assert shown[0] == 0.0
    assert 0.3 < shown[1] < 0.7


def test_the_colour_that_a_caption_shows_is_any() -> None:
    tokenizer, _ = world_tokenizer()
    right = []
    for step in range(10):
        part = world_rows(world_config(), tokenizer, 0, "train", 10 + step, 20)[0]
        after, answers = part.tokens[:, 1:], part.targets[:, :-1]
        coloured = np.isin(after, _colours(tokenizer)) & (answers != 0)
        assert np.isin(answers[coloured], _colours(tokenizer)).all()
        right += (after == answers)[coloured].tolist()
    assert len(right) > 100
    assert np.mean(right) < 0.5


def _colours(tokenizer) -> list[int]:
    return [tokenizer.encode(f" {colour}")[0] for colour in COLOURS]


def test_the_tokenizer_is_the_same_every_time_and_spells_the_world() -> None:
    tokenizer, model = world_tokenizer()
    assert world_tokenizer()[1] == model
    for i in range(30):
        for difficulty, split in zip(DIFFICULTIES, SPLITS, strict=True):
            words = f" {make_clip(0, split, i, difficulty).transcript}"
            assert len(tokenizer.encode(words)) == len(words.split())
            assert tokenizer.decode(tokenizer.encode(words)) == words


def test_questions_of_the_evaluation_are_the_worlds() -> None:
    pictures, clips = world_questions(0, "heldout", 5)
    assert clips.questions == [LISTEN] * 5
    assert clips.answers == [make_clip(0, "heldout", i).transcript for i in range(5)]
    first = make_picture(0, "heldout", 0)
    assert list(zip(pictures.questions, pictures.answers, strict=True))[: len(first.questions)] == list(first.questions)
