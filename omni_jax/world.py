"""A toy world of pictures, sounds and stories that the project makes itself, with right answers (omni_jax's copy).

The same file stands in both twins. Whatever is drawn follows from (seed, split, index, difficulty) alone. The splits
"train" and "validation" never hold a held-out composition: no shape in its held-out colours, no two sound words in a
held-out order. In the split "heldout" every picture and every clip has one. So a right answer there is not recalled.

    pictures   shapes in one colour, 48 × 48, with a caption and questions
    clips      words of a made-up spoken language at 16 kHz: a digit is two tones at once, "up" and "down" are chirps,
               "fast" and "slow" are rhythms of clicks
    stories    sentences about both, text alone

Shapes: H height, W width, N samples.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, UInt8

__all__ = [
    "SPLITS",
    "COLOURS",
    "SHAPES",
    "SOUNDS",
    "LISTEN",
    "Picture",
    "Clip",
    "make_picture",
    "make_clip",
    "make_story",
    "is_held_out_pair",
    "is_held_out_order",
    "longest_clip",
    "world_words",
    "write_world",
]

SPLITS = ("train", "validation", "heldout")
"""Names of the splits."""
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 180),
    "orange": (245, 135, 25),
}
"""Red, green and blue levels of each colour, before jitter."""
SHAPES = ("circle", "square", "triangle", "cross", "ring")
"""The shapes."""
SOUNDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("up", "down", "fast", "slow"),
)
"""The words that can be heard."""
LISTEN = "what do you hear?"
"""The question whose answer is a clip's transcript."""

_SIDE, _RATE = 48, 16000  # pixels; samples a second
_PAINTS = {name: np.array(levels, np.float64) for name, levels in COLOURS.items()}
_COUNTS = ("one", "two", "three", "four", "five")
_PLACES = (("top left", "top right"), ("bottom left", "bottom right"))
_LOW, _HIGH = (500.0, 660.0, 870.0, 1150.0), (1600.0, 2100.0, 2800.0, 3700.0)  # Hz
_NAMES = ("fox", "owl", "bee", "cat", "hen")
_KINDS = {"picture": 0, "clip": 1, "story": 2}


class _Level(NamedTuple):
    """What a difficulty means."""

    most_shapes: int
    radius: tuple[float, float]  # of a single shape, pixels
    noise: float  # of a picture, levels
    turn: float  # radians either way
    most_words: int
    word: tuple[float, float]  # seconds
    gap: tuple[float, float]  # seconds
    bend: float  # of the pitch, relative, either way
    hiss: float  # standard deviation of a clip's noise at most
    two_kinds: bool  # pictures with a second shape, whose questions name what they ask about


_LEVELS = {
    1: _Level(3, (9.0, 13.0), 4.0, 0.1, 3, (0.15, 0.22), (0.04, 0.08), 0.02, 0.003, False),
    2: _Level(4, (7.0, 12.0), 10.0, 0.25, 4, (0.14, 0.25), (0.03, 0.10), 0.04, 0.01, False),
    3: _Level(5, (6.0, 11.0), 20.0, 0.4, 6, (0.12, 0.25), (0.02, 0.12), 0.06, 0.03, True),
}
_ENDS = (0.02, 0.06)  # seconds before the first and behind the last word


class Picture(NamedTuple):
    """pixels: (48, 48, 3), levels of 0 … 255; kinds: the (colour, shape) in it, "" for one that has no name;
    questions: (question, answer), with the caption's first if all has a name (else "a red thing" would be learnt, and
    said of any shape that was never seen red)."""

    pixels: UInt8[np.ndarray, "H W 3"]
    caption: str
    kinds: tuple[tuple[str, str], ...]
    questions: tuple[tuple[str, str], ...]


class Clip(NamedTuple):
    """wave: (N,), mono, 16 kHz, every sample a 16-bit level divided by 32768; transcript: its words, spaces between."""

    wave: Float32[np.ndarray, " N"]
    transcript: str


def is_held_out_pair(colour: str, shape: str) -> bool:
    """Whether this colour of this shape stands in the split "heldout" alone: one colour for each shape.

    Raises:
        ValueError: no colour or no shape of this world.
    """
    _check_among("colour", colour, tuple(COLOURS))
    _check_among("shape", shape, SHAPES)
    return tuple(COLOURS).index(colour) == SHAPES.index(shape)


def is_held_out_order(first: str, second: str) -> bool:
    """Whether `second` right behind `first` is heard in the split "heldout" alone: so for one word behind each.

    Raises:
        ValueError: no word of SOUNDS.
    """
    _check_among("first", first, SOUNDS)
    _check_among("second", second, SOUNDS)
    return (3 * SOUNDS.index(first) + 5) % len(SOUNDS) == SOUNDS.index(second)


def make_picture(seed: int, split: str, index: int, difficulty: int = 1) -> Picture:
    """The picture of this number: shapes of one colour (at difficulty 3 also another shape) on a grey ground.

    Raises:
        ValueError: a split or difficulty that there is not, a negative seed or index.
    """
    random, level = _generator("picture", seed, split, index, difficulty), _LEVELS[difficulty]
    colour, shape = _kind(random, split)
    kinds, paints = [(colour, shape)], [_PAINTS[colour]]
    if level.two_kinds and random.random() < 0.5:
        while kinds[-1][0] == colour or kinds[-1][1] == shape:  # so that a question can name one by either
            kinds[1:] = [_kind(random, "train")]
        paints.append(_PAINTS[kinds[1][0]])
    elif split != "heldout" and (luck := random.random()) < 0.75:
        # A colour or a shape without a name. Without them red would come to mean "no circle", and a circle "not red".
        kinds = [("", shape) if luck < 0.5 else (colour, "")]
        paints = [_unnamed_paint(random, shape)] if luck < 0.5 else paints
    count = 1 if len(kinds) > 1 else int(random.integers(1, level.most_shapes + 1))
    quarters = random.permutation(4)
    ground = random.uniform(0.0, 255.0)
    while min(np.abs(paint - ground).max() for paint in paints) < 60.0:  # to be told from the ground
        ground = random.uniform(0.0, 255.0)
    pixels = np.full((_SIDE, _SIDE, 3), ground)
    corners = [divmod(int(quarter), 2) for quarter in quarters[: max(min(count, 4), len(kinds))]]
    spots: list[tuple[int, tuple[float, float]]] = [(i % len(kinds), at) for i, at in enumerate(corners)]
    if count == 5:
        spots.append((0, (0.5, 0.5)))
    shrink = 1.0 if count == 1 else 0.75 if count < 5 else 0.6
    for i, (row, column) in spots:
        radius = random.uniform(*level.radius) * shrink
        y, x = (_SIDE * (0.25 + 0.5 * at) + random.uniform(-2.0, 2.0) for at in (row, column))
        cover = _cover(kinds[i][1], y, x, radius, random.uniform(-level.turn, level.turn))[:, :, None]
        pixels += cover * (paints[i] + random.uniform(-15.0, 15.0, 3) - pixels)
    pixels += random.normal(0.0, level.noise * random.random(), pixels.shape)
    places = [_PLACES[row][column] for row, column in (corners if len(kinds) > 1 else sorted(corners))]
    caption, questions = _words(kinds, count, places)
    return Picture(np.clip(np.rint(pixels), 0, 255).astype(np.uint8), caption, tuple(kinds), questions)


def make_clip(seed: int, split: str, index: int, difficulty: int = 1) -> Clip:
    """The clip of this number: one to three words (at difficulty 3 up to six), at least two in the split "heldout".

    Raises:
        ValueError: a split or difficulty that there is not, a negative seed or index.
    """
    random, level = _generator("clip", seed, split, index, difficulty), _LEVELS[difficulty]
    words = _sequence(random, split, level.most_words)
    parts = [np.zeros(int(_RATE * random.uniform(*_ENDS)))]
    bend = 1.0 + level.bend * random.uniform(-1.0, 1.0)  # as one voice is higher than another
    for i, word in enumerate(words):
        seconds = np.arange(int(_RATE * random.uniform(*level.word))) / _RATE
        tone = _sound(word, seconds, bend * (1.0 + 0.25 * level.bend * random.uniform(-1.0, 1.0)), random)
        parts.append(random.uniform(0.5, 1.0) * tone)
        ends = level.gap if i + 1 < len(words) else _ENDS
        parts.append(np.zeros(int(_RATE * random.uniform(*ends))))
    wave = np.concatenate(parts) * 10.0 ** random.uniform(-1.2, -0.2)
    wave += random.normal(0.0, level.hiss * random.random(), wave.size)
    levels = np.clip(np.rint(wave * 32768.0), -32768, 32767)
    return Clip((levels / 32768.0).astype(np.float32), " ".join(words))


def make_story(seed: int, split: str, index: int, difficulty: int = 1) -> str:
    """The story of this number: a line of text, with `difficulty` sentences more than one.

    Raises:
        ValueError: a split or difficulty that there is not, a negative seed or index.
    """
    random = _generator("story", seed, split, index, difficulty)
    name = _pick(random, _NAMES)
    sentences = [f"once a {name} saw {_a(' '.join(_kind(random, split)))}."]
    for _ in range(difficulty):
        if random.random() < 0.5:
            sentences.append(f"the {name} heard {' '.join(_sequence(random, split, 3))}.")
        else:
            row, column = random.integers(0, 2, 2)
            sentences.append(f"{_a(' '.join(_kind(random, split)))} was at the {_PLACES[row][column]}.")
    return " ".join(sentences)


def longest_clip(difficulty: int = 1) -> int:
    """Samples of the longest clip that this difficulty can have.

    Raises:
        ValueError: a difficulty that there is not.
    """
    _check_difficulty(difficulty)
    level = _LEVELS[difficulty]
    return int(_RATE * (level.most_words * level.word[1] + (level.most_words - 1) * level.gap[1] + 2 * _ENDS[1]))


def world_words() -> list[str]:
    """Lines with all words of this world, each alone and behind a space, for a tokenizer to be trained on.

    Every colour, shape and word for a sound stands alone, so that no held-out composition is among them.
    """
    questions = ["what colour?", "what shape?", "how many?", "where?", "caption:", LISTEN]
    questions += ["what colour is the", "what shape is the", "where is the", "thing?"]
    nouns = [*COLOURS, *SHAPES, *SOUNDS, *_COUNTS, *_NAMES]
    texts = [*questions, *nouns, *(f" {noun}" for noun in nouns), " thing", " things"]
    texts += [f" {noun}{end}" for noun in SHAPES for end in ("s", "?", ".")]
    texts += [f" {noun}." for noun in SOUNDS] + [
        f" {place}{end}" for row in _PLACES for place in row for end in ("", ".")
    ]
    texts += [f"once a {name} saw a" for name in _NAMES] + [f" the {name} heard" for name in _NAMES]
    return texts + [" a", " an", " and", " was at the"]


def write_world(
    folder: str | os.PathLike[str],
    seed: int = 0,
    difficulty: int = 1,
    split: str = "train",
    count: int = 10,
) -> Path:
    """Write `count` pictures (PNG), clips (WAV) and stories, and world.jsonl, which says what they are.

    load_image(size=None) times 255 and load_audio read the files back as exactly the arrays that were drawn. A line of
    world.jsonl is one item of each kind: {"index", "image", "caption", "questions", "audio", "transcript", "story"},
    with names of files in the folder, which is made if there is none.

    Returns:
        The path of world.jsonl.

    Raises:
        ValueError: a setting that make_picture refuses, a count below 1, or a folder that already holds a world.jsonl.
        OSError: a file cannot be written.
    """
    import soundfile
    from PIL import Image

    _generator("picture", seed, split, 0, difficulty)
    if type(count) is not int or count < 1:
        raise ValueError(f"count = {count!r} is not allowed: must be an integer from 1 up; give for example 10")
    folder = Path(folder)
    index_file = folder / "world.jsonl"
    if index_file.exists():
        raise ValueError(f"{str(index_file)!r} is there already, and not overwritten; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        picture, clip = make_picture(seed, split, i, difficulty), make_clip(seed, split, i, difficulty)
        image, audio = f"picture-{i:04d}.png", f"clip-{i:04d}.wav"
        Image.fromarray(picture.pixels).save(folder / image)
        soundfile.write(folder / audio, (clip.wave * 32768.0).astype(np.int16), _RATE, subtype="PCM_16")
        record: dict[str, Any] = {"index": i, "image": image, "caption": picture.caption}
        record |= {"questions": [list(pair) for pair in picture.questions], "audio": audio}
        record |= {"transcript": clip.transcript, "story": make_story(seed, split, i, difficulty)}
        lines.append(json.dumps(record) + "\n")
    index_file.write_text("".join(lines), encoding="utf-8")
    return index_file


def _generator(kind: str, seed: int, split: str, index: int, difficulty: int) -> np.random.Generator:
    _check_difficulty(difficulty)
    _check_among("split", split, SPLITS)
    for name, value in (("seed", seed), ("index", index)):
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} = {value!r} is not allowed: must be an integer from 0 up; give for example 0")
    return np.random.default_rng((seed, _KINDS[kind], SPLITS.index(split), difficulty, index))


def _check_difficulty(difficulty: int) -> None:
    if type(difficulty) is not int or difficulty not in _LEVELS:
        raise ValueError(f"difficulty = {difficulty!r} is not allowed: must be 1 (easy), 2 or 3 (hard); give 1")


def _check_among(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} = {value!r} is not allowed: must be one of {', '.join(allowed)}")


def _pick(random: np.random.Generator, choices: Any) -> Any:
    return choices[int(random.integers(len(choices)))]


def _kind(random: np.random.Generator, split: str) -> tuple[str, str]:
    """A colour and a shape that this split may show together."""
    names = [(c, s) for c in COLOURS for s in SHAPES if is_held_out_pair(c, s) == (split == "heldout")]
    return _pick(random, names)


def _unnamed_paint(random: np.random.Generator, shape: str) -> Float64[np.ndarray, "3"]:
    """Any colour, but none like the shape's held-out one."""
    banned = next(paint for colour, paint in _PAINTS.items() if is_held_out_pair(colour, shape))
    paint = banned
    while np.abs(paint - banned).max() < 75.0:
        paint = random.uniform(0.0, 255.0, 3)
    return paint


def _sequence(random: np.random.Generator, split: str, most: int) -> list[str]:
    """Words for a clip that this split may let follow each other; of "heldout", one place has a held-out order."""
    held_out = split == "heldout"
    words = [_pick(random, SOUNDS) for _ in range(int(random.integers(2 if held_out else 1, most + 1)))]
    if held_out:
        at = int(random.integers(len(words) - 1))
        words[at + 1] = SOUNDS[(3 * SOUNDS.index(words[at]) + 5) % len(SOUNDS)]
        return words
    for i in range(1, len(words)):
        while is_held_out_order(words[i - 1], words[i]):
            words[i] = _pick(random, SOUNDS)
    return words


def _a(thing: str) -> str:
    return f"{'an' if thing.startswith('orange') else 'a'} {thing}"


def _words(kinds: list[tuple[str, str]], count: int, places: list[str]) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The caption, and questions with their answers; "caption:" comes first, if all in the picture has a name."""
    colour, shape = kinds[0]
    asked = colour and shape  # where there are two kinds, each has both
    if len(kinds) > 1:
        caption = " and ".join(_a(" ".join(kind)) for kind in kinds)
        questions = [("how many?", _COUNTS[len(kinds) - 1])]
        for (c, s), place in zip(kinds, places, strict=True):
            questions += [(f"what colour is the {s}?", c), (f"what shape is the {c} thing?", s)]
            questions += [(f"where is the {s}?", place)]
    else:
        thing = f"{colour} {shape or 'thing'}".strip()
        caption = _a(thing) if count == 1 else f"{_COUNTS[count - 1]} {thing}{'es' if shape == 'cross' else 's'}"
        questions = [("what colour?", colour)] if colour else []
        questions += [("what shape?", shape)] if shape else []
        questions += [("how many?", _COUNTS[count - 1])]
        questions += [("where?", " and ".join(places))] if count < 4 else []
    return caption, (*([("caption:", caption)] if asked else []), *questions)


def _cover(figure: str, y: float, x: float, radius: float, turn: float) -> Float64[np.ndarray, "H W"]:
    """The share of each pixel that the figure covers, by its signed distance from the outline."""
    rows, columns = np.mgrid[0:_SIDE, 0:_SIDE] + 0.5
    v, u = rows - y, columns - x
    u, v = np.cos(turn) * u + np.sin(turn) * v, np.cos(turn) * v - np.sin(turn) * u
    if figure == "circle":
        outside = np.hypot(u, v) - radius
    elif figure == "ring":
        outside = np.abs(np.hypot(u, v) - 0.75 * radius) - 0.25 * radius
    elif figure == "square":
        outside = np.maximum(np.abs(u), np.abs(v)) - 0.85 * radius
    elif figure == "cross":
        arm, width = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
        outside = np.maximum(arm - radius, width - 0.3 * radius)
    elif figure == "":  # a flower or a star of five to seven leaves, turned anyhow, which looks like no other
        angle = np.arctan2(v, u)
        leaves = 5 + int(100.0 * abs(turn)) % 3
        outside = np.hypot(u, v) - radius * (0.7 + 0.3 * np.cos(leaves * angle))
    else:  # a triangle that stands on its side: the largest distance from its three sides
        slope = 0.5 * np.sqrt(3.0)
        outside = np.maximum(v, slope * np.abs(u) - 0.5 * v) - 0.6 * radius
    return np.clip(0.5 - outside, 0.0, 1.0)


def _sound(
    word: str, seconds: Float64[np.ndarray, " N"], bend: float, random: np.random.Generator
) -> Float64[np.ndarray, " N"]:
    """The word's sound, with soft ends, at most 1."""
    length = seconds[-1]
    soft = np.clip(np.minimum(seconds, length - seconds) / 0.01, 0.0, 1.0)
    if word in ("fast", "slow"):
        clicks = 6 if word == "fast" else 2
        return np.clip(random.normal(0.0, 0.4, seconds.size), -1.0, 1.0) * ((seconds / length * clicks) % 1.0 < 0.4)
    if word in ("up", "down"):
        ends = (600.0, 3000.0) if word == "up" else (3000.0, 600.0)
        phase = ends[0] * seconds + 0.5 * (ends[1] - ends[0]) / length * np.square(seconds)
        return 0.8 * soft * np.sin(2.0 * np.pi * bend * phase)
    row, column = divmod(SOUNDS.index(word), 4)
    low, high = (np.sin(2.0 * np.pi * (bend * f * seconds + random.random())) for f in (_LOW[row], _HIGH[column]))
    return 0.45 * soft * (low + high)
