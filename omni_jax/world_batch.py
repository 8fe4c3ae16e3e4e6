"""The toy world as batches for OmniLM, and what is asked in its evaluation, in numpy alone (omni_jax's copy).

The same file stands in both twins, so that both are trained and judged on the same rows.

Shapes: B rows, T tokens, S samples, H height, W width, N any.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int

from .config import BOS_ID, EOS_ID, PAD_ID, ThinkerConfig
from .mel import num_frames
from .omni_config import AudioConfig, OmniConfig, VisionConfig
from .tokenizer import BPETokenizer
from .train_config import TrainConfig
from .world import COLOURS, LISTEN, Picture, longest_clip, make_clip, make_picture, make_story, world_words

__all__ = [
    "WorldRows",
    "Asked",
    "world_tokenizer",
    "world_config",
    "world_training",
    "world_rows",
    "first_weights",
    "world_questions",
    "share_right",
    "row_levels",
]

_VOCABULARY = 600
_PICTURES = 56  # rows of an update with a picture alone; and those of the other part, by what they have:
_CLIPS, _BOTH, _STORIES = 8, 10, 4
_TOKENS = {1: (26, 34), 2: (26, 34), 3: (64, 80)}  # of a row's text, in the two parts; what does not fit is not asked
# In the first part of a run, as long as shapes are not known, words would teach what the eyes should: that after "red"
# no circle comes. So until then no caption is asked for, and no word of a picture's answers is shown when the next one
# is predicted. Later so many pictures that can be are asked for the caption and nothing else, and so many words stay
# hidden. Where a caption's colour is shown, it is any colour: the shape behind it must be seen, since no word tells it.
_FIRST, _CAPTIONS, _HIDDEN = 0.6, 0.8, 0.5
_UNKNOWN = 3  # the id of what is no known piece
_Row = tuple[list[int], list[int], list[bool]]
_ROWS = 3  # keeps the order of a row's questions apart from what else the seed draws


class WorldRows(NamedTuple):
    """Rows of one update, of the same shapes every time.

    tokens, targets: (B, T); a question has no targets, its answer has, with the end-of-text id; a story has all.
    images: (B, 3, H, W); waves: (B, S), of which a clip has the first `frames` mel frames; None where no row has one.
    """

    tokens: Int[np.ndarray, "B T"]
    targets: Int[np.ndarray, "B T"]
    images: Float32[np.ndarray, "B 3 H W"]
    has_image: Bool[np.ndarray, " B"]
    waves: Float32[np.ndarray, "B S"] | None
    frames: Int[np.ndarray, " B"] | None
    has_audio: Bool[np.ndarray, " B"] | None


class Asked(NamedTuple):
    """Questions of one sense, their right answers, and what each is about: levels (3, H, W), or a wave (S,)."""

    questions: list[str]
    answers: list[str]
    senses: list[np.ndarray]


def world_tokenizer() -> tuple[BPETokenizer, bytes]:
    """The tokenizer of the world's words, and the bytes of its file, the same every time."""
    with tempfile.TemporaryDirectory() as room:
        text, model = Path(room) / "words.txt", Path(room) / "tokenizer.model"
        text.write_text("\n".join(3 * world_words()) + "\n", encoding="utf-8")
        return BPETokenizer.train(text, model, _VOCABULARY), model.read_bytes()


def world_config() -> OmniConfig:
    """The model that is trained on the world: about a million parameters."""
    return OmniConfig(
        thinker=ThinkerConfig(
            vocab_size=_VOCABULARY, n_layers=3, d_model=128, n_heads=4, d_ff=256, dropout=0.0, ctx_len=128, use_gqa=True
        ),
        audio=AudioConfig(d=96, heads=3, ff=192, layers=2, dropout=0.0, downsample_factor=8),
        vision=VisionConfig(img_size=48, patch=12, d=96, layers=3, heads=3, ff=192, dropout=0.0),
    )


def world_training(max_steps: int | None = None, seed: int = 0) -> TrainConfig:
    """How it is trained; `max_steps` updates, where not None.

    Raises:
        ValueError: what TrainConfig refuses.
    """
    steps = 1500 if max_steps is None else max_steps
    rows = _PICTURES + _CLIPS + _BOTH + _STORIES
    return TrainConfig(
        lr=2e-3, wd=0.05, warmup_steps=min(100, (steps if isinstance(steps, int) else 1) // 10), max_steps=steps,
        batch_size=rows, val_split=0.0, checkpoint_freq=200, print_freq=20, seed=seed,
    )  # fmt: skip


def world_rows(
    config: OmniConfig,
    tokenizer: BPETokenizer,
    seed: int,
    split: str,
    step: int,
    max_steps: int,
    difficulty: int = 1,
) -> tuple[WorldRows, WorldRows]:
    """The rows of update `step` of `max_steps`, in two parts of fixed shapes: pictures; and clips, both, and stories.

    In a row are questions to what it has, in any order, each followed by its answer.

    Raises:
        ValueError: what make_picture refuses.
    """
    random = np.random.default_rng((seed, _ROWS, step))
    pictures = _PICTURES + _BOTH
    seen = [make_picture(seed, split, step * pictures + i, difficulty) for i in range(pictures)]
    clips = _CLIPS + _BOTH
    heard = [make_clip(seed, split, step * clips + i, difficulty) for i in range(clips)]
    short, long = _TOKENS[difficulty]
    captions, hidden = (0.0, 1.0) if step < _FIRST * max_steps else (_CAPTIONS, _HIDDEN)

    def asked_of(picture: Picture) -> list[tuple[str, str]]:
        questions = picture.questions
        named = questions[0][1] == picture.caption
        return [*questions[:1]] if named and random.random() < captions else [*questions[named:]]

    colours = [_encode_answer(tokenizer, colour)[0] for colour in COLOURS]
    first = [_row(tokenizer, asked_of(p), hidden, colours, random, short) for p in seen[:_PICTURES]]
    alone = WorldRows(*_stack(first), _levels(seen[:_PICTURES]), np.ones(_PICTURES, np.bool_), None, None, None)

    asked = [[(LISTEN, clip.transcript)] for clip in heard]
    for i, picture in enumerate(seen[_PICTURES:]):
        asked[_CLIPS + i] += asked_of(picture)
    second = [_row(tokenizer, pairs, hidden, colours, random, long) for pairs in asked]
    stories = [make_story(seed, split, step * _STORIES + i, difficulty) for i in range(_STORIES)]
    told = [[BOS_ID, *tokenizer.encode(story), EOS_ID] for story in stories]
    second += [_cut(ids, ids, [True] * len(ids), long) for ids in told]
    B, side = clips + _STORIES, seen[0].pixels.shape[0]
    images = np.zeros((B, 3, side, side), np.float32)
    images[_CLIPS:clips] = _levels(seen[_PICTURES:])
    waves, frames = np.zeros((B, longest_clip(difficulty)), np.float32), np.zeros(B, np.int32)
    assert config.audio is not None
    for i, clip in enumerate(heard):
        waves[i, : clip.wave.size] = clip.wave
        frames[i] = num_frames(clip.wave.size, config.audio.n_fft, config.audio.hop_length)
    row = np.arange(B)
    has_image = (row >= _CLIPS) & (row < clips)
    return alone, WorldRows(*_stack(second), images, has_image, waves, frames, row < clips)


def first_weights(
    config: OmniConfig, weights: Mapping[str, Float32[np.ndarray, "..."]], seed: int
) -> dict[str, Float32[np.ndarray, "..."]]:
    """What a new model should start with in place of some of its `weights`, by torch key, in shapes like theirs.

    With the usual start the vectors of words are so long that what is seen and heard hardly counts beside them, patches
    have no places, since `pos` is 0, and all pictures give much the same vector, since no level is negative. So words
    start at a tenth; levels count from 0.5, four times as much; and `pos` and `cls` are N(0, 0.3²).
    """
    assert config.vision is not None
    random = np.random.default_rng((seed, _ROWS))
    eye = "vision_encoder"
    proj = np.float32(4.0) * np.asarray(weights[f"{eye}.proj.weight"], np.float32)
    words = np.float32(0.1) * np.asarray(weights["thinker.tok_emb.weight"], np.float32)
    made = {"thinker.tok_emb.weight": words, f"{eye}.proj.weight": proj}
    made[f"{eye}.proj.bias"] = np.float32(-0.5) * proj.sum(axis=(1, 2, 3))
    grid = config.vision.img_size // config.vision.patch
    for name, count in (("cls", 1), ("pos", 1 + grid * grid)):
        made[f"{eye}.{name}"] = random.normal(0.0, 0.3, (1, count, config.vision.d)).astype(np.float32)
    return made


def world_questions(seed: int, split: str, count: int, difficulty: int = 1) -> tuple[Asked, Asked]:
    """Every question about the first `count` pictures of a split, and the first `count` clips to be transcribed.

    Raises:
        ValueError: what make_picture refuses.
    """
    pictures = [make_picture(seed, split, i, difficulty) for i in range(count)]
    rows = [(q, a, levels) for p, levels in zip(pictures, _levels(pictures)) for q, a in p.questions]
    clips = [make_clip(seed, split, i, difficulty) for i in range(count)]
    heard = Asked([LISTEN] * count, [clip.transcript for clip in clips], [clip.wave for clip in clips])
    return Asked(*(list(column) for column in zip(*rows, strict=True))), heard


def share_right(asked: Asked, said: Sequence[str]) -> dict[str, Any]:
    """The share of exactly right answers, in all and by question; chance: that of each question's commonest answer."""
    right: Counter[str] = Counter()
    answers: dict[str, Counter[str]] = {}
    for question, answer, text in zip(asked.questions, asked.answers, said, strict=True):
        question = _kind_of(question)
        right[question] += text.strip() == answer
        answers.setdefault(question, Counter())[answer] += 1
    total = sum(sum(counts.values()) for counts in answers.values())
    commonest = sum(max(counts.values()) for counts in answers.values())
    by_question = {q: round(right[q] / sum(counts.values()), 4) for q, counts in answers.items()}
    return {
        "accuracy": round(sum(right.values()) / total, 4),
        "chance": round(commonest / total, 4),
        "questions": total,
        "by_question": by_question,
    }


def _kind_of(question: str) -> str:
    """The question without what it names: "what colour is the circle?" is "what colour"."""
    return next((kind for kind in ("what colour", "what shape", "where") if question.startswith(kind)), question)


def _levels(pictures: Sequence[Any]) -> Float32[np.ndarray, "B 3 H W"]:
    """As load_image reads them: levels of 0 … 255 divided by 255."""
    pixels = np.stack([picture.pixels for picture in pictures]).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pixels).astype(np.float32) / np.float32(255.0)


def _encode_answer(tokenizer: BPETokenizer, answer: str) -> list[int]:
    return tokenizer.encode(f" {answer}")


def _row(
    tokenizer: BPETokenizer,
    pairs: list[tuple[str, str]],
    share: float,
    colours: Sequence[int],
    random: np.random.Generator,
    T: int,
) -> _Row:
    """Questions and answers as T + 1 ids; what is shown of them, without a `share` of a picture's answers; and which
    of them the model must predict."""
    ids, shown, wanted = [BOS_ID], [BOS_ID], [False]
    for i in random.permutation(len(pairs)):
        question, answer = tokenizer.encode(pairs[i][0]), _encode_answer(tokenizer, pairs[i][1])
        if len(ids) + len(question) + len(answer) + 1 > T + 1:
            continue
        ids += [*question, *answer, EOS_ID]
        wanted += [False] * len(question) + [True] * (len(answer) + 1)
        if pairs[i][0] != LISTEN:
            drawn = [int(random.choice(colours)) if id in colours else id for id in answer]
            answer = [_UNKNOWN if random.random() < share else id for id in drawn]
        shown += [*question, *answer, EOS_ID]
    return _cut(ids, shown, wanted, T)


def _cut(ids: list[int], shown: list[int], wanted: list[bool], T: int) -> _Row:
    def filled(values: list[Any], filler: Any) -> list[Any]:
        return (values + [filler] * (T + 1))[: T + 1]

    return filled(ids, PAD_ID), filled(shown, PAD_ID), filled(wanted, False)


def _stack(rows: list[_Row]) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    ids, shown, wanted = (np.array(column) for column in zip(*rows, strict=True))
    targets = np.where(wanted, ids, PAD_ID)
    return shown[:, :-1].astype(np.int32), targets[:, 1:].astype(np.int32)


def row_levels(rows: tuple[WorldRows, WorldRows]) -> list[Int[np.ndarray, " N"]]:
    """Ids, pictures and waves as integers: what a fingerprint of the data is taken of."""
    made = []
    for part in rows:
        made += [part.tokens.ravel(), np.rint(part.images * 255.0).astype(np.int64).ravel()]
        made += [] if part.waves is None else [np.rint(part.waves * 32768.0).astype(np.int64).ravel()]
    return made
