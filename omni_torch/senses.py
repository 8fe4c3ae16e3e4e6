"""Pictures and clips on their way to OmniLM.encode: from files, and from generate's lists.

Shapes: F mel frames, M mel bands, H height, W width.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from .layers import dtype_name

__all__ = ["read_senses", "senses_of"]

_Path = str | os.PathLike[str]


def read_senses(model: Any, image: _Path | None, audio: _Path | None) -> dict[str, Any]:
    """A picture's and a sound file's content as generate's `images` and `mels`, as the model's config asks for them.

    Raises:
        ValueError: a file that cannot be read; a model that cannot see, or hear; a clip that is too long for it.
    """
    from .audio import load_audio
    from .vision import load_image

    for file, name, section in ((image, "image", "vision"), (audio, "audio", "audio")):
        if file is not None and getattr(model.config, section) is None:
            raise ValueError(
                f"{name} = {os.fspath(file)!r}, and the model's config has no section {section!r}: it cannot read it; "
                f"leave --{name} out, or give another model"
            )
    made: dict[str, Any] = {}
    if image is not None:
        made["images"] = [load_image(image, size=model.config.vision.img_size)]
    if audio is not None:
        name = f"sound file {os.fspath(audio)!r}"
        try:
            mel = model.features(load_audio(audio, model.config.audio.sample_rate))
        except ValueError as bad:
            raise ValueError(str(bad) if os.fspath(audio) in str(bad) else f"{name}: {bad}") from None
        _check_clip(name, tuple(mel.shape), model.config)
        made["mels"] = [mel]
    return made


def senses_of(model: Any, images: Any, mels: Any, prompts: int) -> tuple[dict[str, Any] | None, list[int]]:
    """OmniLM.encode's arguments, None where there is nothing to see or hear; the number of vectors before each prompt.

    `images` and `mels` are generate's.

    Raises:
        ValueError: as generate.
    """
    pictures = _one_per_prompt("images", images, prompts)
    clips = _one_per_prompt("mels", mels, prompts)
    senses: dict[str, Any] = {}
    if any(picture is not None for picture in pictures):
        _check_sense(model, "images", "vision")
        senses |= _stacked("images", "has_image", pictures)
    if any(clip is not None for clip in clips):
        _check_sense(model, "mels", "audio")
        senses |= _padded(model, clips)
    if not senses:
        return None, [0] * prompts
    checked = dict.fromkeys(("images", "mel", "mel_lengths", "has_image", "has_audio")) | senses
    model.check_senses(prompts, **checked)
    lengths = [0 if clip is None else model.config.audio.num_vectors(len(clip)) for clip in clips]
    return senses, [(picture is not None) + length for picture, length in zip(pictures, lengths, strict=True)]


def _one_per_prompt(name: str, values: Any, prompts: int) -> list[Any]:
    if values is None:
        return [None] * prompts
    if not isinstance(values, list | tuple) or len(values) != prompts:
        found = f"{len(values)} entries" if isinstance(values, list | tuple) else f"a {type(values).__name__}"
        raise ValueError(
            f"{name} is {found}: must be a list with one entry for each of {prompts} prompts; give None "
            "where a prompt has none"
        )
    return list(values)


def _check_sense(model: Any, name: str, section: str) -> None:
    if getattr(getattr(model, "config", None), section, None) is None:
        raise ValueError(
            f"{name} are given, and the model's config has no section {section!r}: it cannot read them; leave "
            "them out, or give an OmniLM that can"
        )


def _stacked(name: str, has: str, values: list[Any]) -> dict[str, Any]:
    """Arrays of one shape as a batch, 0 where there is none."""
    given = _given(name, values)
    shapes = sorted({tuple(value.shape) for value in given.values()})
    if len(shapes) > 1 or len(shapes[0]) != 3 or shapes[0][0] != 3:
        last = all(len(shape) == 3 and shape[2] == 3 for shape in shapes)
        fix = "permute(2, 0, 1) moves the colours to the front" if last else "give load_image(path, size=224)'s"
        raise ValueError(
            f"{name} have the shapes {', '.join(map(str, shapes))}: must be (3, H, W), the same for all; {fix}"
        )
    empty = torch.zeros_like(next(iter(given.values())))
    batch = torch.stack([given.get(i, empty) for i in range(len(values))])
    return {name: batch, has: torch.tensor([value is not None for value in values])}


def _padded(model: Any, clips: list[Any]) -> dict[str, Any]:
    """Clips of any length as a batch."""
    given = _given("mels", clips)
    for i, clip in given.items():
        _check_clip(f"mels[{i}]", tuple(clip.shape), model.config)
    first = next(iter(given.values()))
    batch = first.new_zeros(len(clips), max(map(len, given.values())), first.shape[1])
    for i, clip in given.items():
        batch[i, : len(clip)] = clip
    lengths = torch.tensor([len(given[i]) if i in given else 0 for i in range(len(clips))])
    return {"mel": batch, "mel_lengths": lengths, "has_audio": lengths > 0}


def _given(name: str, values: list[Any]) -> dict[int, Tensor]:
    """Those that are not None, by their place: of one dtype, so that none is rounded to another's."""
    given = {i: _as_tensor(f"{name}[{i}]", value) for i, value in enumerate(values) if value is not None}
    dtypes = sorted({str(dtype_name(value.dtype)) for value in given.values()})
    if len(dtypes) > 1:
        raise ValueError(f"{name} have the dtypes {', '.join(dtypes)}: must be one for all; cast them to float32")
    return given


def _as_tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, str | os.PathLike):
        fix = "load_image(path)" if name.startswith("images") else "model.features(load_audio(path))"
        raise ValueError(f"{name} = {os.fspath(value)!r} is a path: must be an array; give {fix}")
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} is a {type(value).__name__} that is no array of numbers; pass a tensor") from None
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {dtype_name(tensor.dtype)}: must be floating point; divide levels by 255")
    return tensor


def _check_clip(name: str, shape: tuple[int, ...], config: Any) -> None:
    if len(shape) != 2 or 0 in shape or shape[1] != 128:
        raise ValueError(
            f"{name} has shape {shape}: must be (frames, 128) with at least one frame; give model.features(wave)'s"
        )
    audio, most = config.audio, max(config.thinker.ctx_len // 4, 1)
    if audio.num_vectors(shape[0]) > most:
        frames = most * audio.downsample_factor
        seconds = (frames - 1) * audio.hop_length / audio.sample_rate
        raise ValueError(
            f"{name} has {shape[0]} frames, which become {audio.num_vectors(shape[0])} vectors: allowed are up to "
            f"ctx_len // 4 = {most}, that is {frames} frames or {seconds:.2f} seconds; cut the clip"
        )
