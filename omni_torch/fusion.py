"""Pictures, clips and text in one sequence of embeddings, and OmniLM, the model that reads it.

Shapes: B batch, I image vectors, U audio vectors, T text tokens, N all of them, D model, M mel bands, S samples,
H height, W width, V vocabulary.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .audio import log_mel, mel_spectrogram
from .audio_encoder import AudioEncoderTiny, check_mel
from .config import PAD_ID
from .layers import check_tensor, dtype_name
from .losses import cross_entropy
from .mel import check_length
from .omni_config import OmniConfig
from .thinker import ThinkerLM
from .vision import check_images
from .vision_encoder import ViTTiny

__all__ = ["Fused", "fuse", "fuse_chunks", "OmniLM", "split_frozen"]

_POLICIES = ("family", "longest", "error")


class Fused(NamedTuple):
    """Embeddings of several modalities in one sequence.

    embeddings: (B, N, D), 0 where a row lacks the modality. attention_mask: (B, N), True where it has it, as
    ThinkerLM takes it. targets: (B, N), the token after each position, PAD where none is to be predicted; or None.
    """

    embeddings: Float[Tensor, "B N D"]
    attention_mask: Bool[Tensor, "B N"]
    targets: Int[Tensor, "B N"] | None


def fuse(
    image: Float[Tensor, "B I D"] | None = None,
    audio: Float[Tensor, "B U D"] | None = None,
    text: Float[Tensor, "B T D"] | None = None,
    *,
    audio_mask: Bool[Tensor, " B"] | Bool[Tensor, "B U"] | None = None,
    image_mask: Bool[Tensor, " B"] | Bool[Tensor, "B I"] | None = None,
    text_mask: Bool[Tensor, " B"] | Bool[Tensor, "B T"] | None = None,
    targets: Int[Tensor, "B T"] | None = None,
    ctx_len: int | None = None,
    policy: str = "family",
) -> Fused:
    """Embeddings (B, N, D) one after the other: image, audio, text, those that are given.

    A mask is False where a row lacks the modality, (B,), or where a vector of it is padding; the embeddings there are
    never read. `targets` are the next token of each text position; those of all others, and of text that is masked or
    cut, become PAD, which the loss ignores.

    With `ctx_len`, what is too long is cut at its end, by `policy`:
        "family": audio to ctx_len // 4, always; then text beside others to ctx_len − (image + audio) − 1, at least 1.
        "longest": the longest modality, vector by vector, the first of several, until all fit.
        "error": not at all; lengths are those of the batch, padding included, whatever the masks say.
    Each row is cut as it would be alone: lengths are those of what its masks keep. N is then the most that a row can
    keep, by the shapes alone, inside jit as outside; where rows have too many places for it, the first ones that hold
    nothing are left out, so that the text comes last as before.

    Raises:
        ValueError: nothing given; shapes, dtypes or batches that do not fit together; a policy that is not known;
            "longest" (with a ctx_len below the number of modalities) or "error" that cannot make it fit.
    """
    parts, masks, targets = _checked_parts(image, audio, text, image_mask, audio_mask, text_mask, targets)
    lengths = {name: part.shape[1] for name, part in parts.items()}
    if policy not in _POLICIES:
        raise ValueError(f"policy = {policy!r}: must be one of {', '.join(_POLICIES)}; give 'family'")
    if ctx_len is not None:
        alone = (image is None or image_mask is not None) and (audio is None or audio_mask is not None)
        most = _most(lengths, _check_ctx_len(ctx_len), policy, alone)
        if most < sum(lengths.values()):
            return _narrow(_join(parts, _cut(masks, ctx_len, policy), targets), most)
    return _join(parts, masks, targets)


def fuse_chunks(
    image: Float[Tensor, "B I D"] | None = None,
    audio: Float[Tensor, "B U D"] | None = None,
    text: Float[Tensor, "B T D"] | None = None,
    *,
    audio_mask: Bool[Tensor, " B"] | Bool[Tensor, "B U"] | None = None,
    image_mask: Bool[Tensor, " B"] | Bool[Tensor, "B I"] | None = None,
    text_mask: Bool[Tensor, " B"] | Bool[Tensor, "B T"] | None = None,
    targets: Int[Tensor, "B T"] | None = None,
    ctx_len: int,
) -> list[Fused]:
    """As `fuse`, but nothing is cut off: a list, each at most ctx_len long.

    The longest modality (the first of several) comes in consecutive chunks, the last one may be shorter; the others
    are repeated in each, with their targets. Each row comes in the chunks that it would have alone, and is masked out,
    without targets, in those that others need beyond them.

    Raises:
        ValueError: as `fuse`; the other modalities alone leave no place in ctx_len, padding included.
    """
    parts, masks, targets = _checked_parts(image, audio, text, image_mask, audio_mask, text_mask, targets)
    lengths = {name: part.shape[1] for name, part in parts.items()}
    longest = max(lengths, key=lengths.__getitem__)
    room = _check_ctx_len(ctx_len) - sum(lengths.values()) + lengths[longest]
    if room < 1:
        raise ValueError(
            f"{_listed(lengths)} do not fit into ctx_len={ctx_len}: without {longest}, which comes in chunks, they "
            "must be shorter; cut them"
        )
    total, chunks = sum(lengths.values()), []
    for number in range(-(-lengths[longest] // room)):
        # No row has less room than the batch's lengths leave, nor more in this chunk than they would.
        most = min(ctx_len, total - number * room)
        chunks.append(_narrow(_join(parts, _chunk(masks, ctx_len, number), targets), most))
    return chunks


class OmniLM(nn.Module):
    """ThinkerLM with ears and eyes: encoders, a linear layer (with bias) behind each, and the language model.

    A picture becomes one vector, the CLS token's, a clip one for every downsample_factor mel frames; they stand before
    the text: image, audio, text. `config` keeps the argument. A member whose section the config lacks is None.
    Weights start from torch's default initialisation. A new model is in training mode: call `model.eval()` before
    inference, or dropout is on.

    Raises:
        ValueError: what the members' constructors refuse.
    """

    def __init__(self, config: OmniConfig) -> None:
        super().__init__()
        self.config = config
        audio, vision, D = config.audio, config.vision, config.thinker.d_model
        self.thinker = ThinkerLM.from_config(config.thinker)
        if audio is None:
            self.audio_encoder = self.proj_a = None
        else:
            sizes = (audio.d, audio.heads, audio.ff, audio.layers, audio.dropout, audio.downsample_factor)
            self.audio_encoder = AudioEncoderTiny(*sizes)
            self.proj_a = nn.Linear(audio.d, D, bias=True)
        if vision is None:
            self.vision_encoder = self.proj_v = None
        else:
            sizes = (vision.img_size, vision.patch, vision.d, vision.layers, vision.heads, vision.ff, vision.dropout)
            self.vision_encoder = ViTTiny(*sizes)
            self.proj_v = nn.Linear(vision.d, D, bias=True)

    @classmethod
    def from_config(cls, config: OmniConfig) -> OmniLM:
        """The model that `config` describes, with fresh weights."""
        return cls(config)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        *,
        config: OmniConfig | str | os.PathLike[str] | None = None,
        audio: str | os.PathLike[str] | None = None,
        vision: str | os.PathLike[str] | None = None,
    ) -> OmniLM:
        """The model in a checkpoint file, or in the best one of a folder; in evaluation mode, so that dropout is off.

        The file is an export or a dict {thinker, proj_a, proj_v, ...}. The encoders are in it, or in files of their
        own, {enc, ...} and {vit, ...}: `audio` and `vision`. The config is the one given, or that of a file, or
        config.json beside the checkpoint; parts that it has no section for are left out. The model has the file's
        dtype, and is on the CPU.

        Raises:
            CheckpointError: a file cannot be read, or its weights are not those of such a model.
            ValueError: there is no config, it cannot be read, or is that of another model.
        """
        from .architecture import read_omni
        from .checkpoint import load_weights

        weights, found, stored = read_omni(path, config, audio, vision)
        with torch.random.fork_rng(devices=[]):  # the first weights are thrown away
            model = cls(found)
        return load_weights(model.to(getattr(torch, stored)), weights).eval()

    def features(
        self, wave: Float[Tensor, "B S"] | Float[Tensor, " S"]
    ) -> Float[Tensor, "B F M"] | Float[Tensor, "F M"]:
        """What the audio encoder reads of each wave: (B, frames, 128), or (frames, 128) for one (S,).

            (log10(max(mel, 1e-10)) + 4) / 4

        of mel_spectrogram by the config's sample_rate, n_fft, hop_length and win_length: about −1.5 for silence,
        2.1 for a full tone. The numbers are constants: neither the rest of the clip nor the batch changes a frame.

        Raises:
            ValueError: a model without audio section; a wave of no more than n_fft // 2 samples; what mel_spectrogram
                refuses.
        """
        audio = self.config.audio
        if audio is None:
            raise ValueError(_lacks("audio"))
        check_length(tuple(getattr(wave, "shape", ())), audio.n_fft, "give a longer one, or fill it up with zeros")
        mel = mel_spectrogram(wave, audio.sample_rate, audio.n_fft, audio.hop_length, audio.win_length)
        return (log_mel(mel, floor=1e-10) / math.log(10.0) + 4.0).transpose(-1, -2) / 4.0

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        *,
        images: Float[Tensor, "B 3 H W"] | None = None,
        mel: Float[Tensor, "B F M"] | None = None,
        mel_lengths: Int[Tensor, " B"] | None = None,
        has_image: Bool[Tensor, " B"] | None = None,
        has_audio: Bool[Tensor, " B"] | None = None,
        attention_mask: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B N V"]:
        """Logits (B, N, V) for the token after each position of the fused sequence.

        images (B, 3, H, W) in [0, 1]; mel (B, frames, 128), as `features` gives it, of which each clip has the first
        mel_lengths (None: all). has_image and has_audio (B,) say which rows have them (None: all); what the others
        hold there is never read, and they are as they would be without. `attention_mask` (B, T) is True for tokens that
        are not padding. Each row is cut to ctx_len as the family does with it alone (see `fuse`). The last T of the N
        positions are the text's, wherever picture, clip and T fit into N.

        Inside torch.compile the values are not checked: mel_lengths beyond the frames count as all frames, those below
        1 as no clip.

        Raises:
            ValueError: an input of another shape or dtype, of a sense that the model lacks, or without what it is
                about; NaN or Inf in it; a clip without frames.
            TokenIdError: a token id out of range.
        """
        fused = self._fuse(tokens, None, images, mel, mel_lengths, has_image, has_audio, attention_mask)
        return self.thinker(embeddings=fused.embeddings, attention_mask=fused.attention_mask)

    def loss(
        self,
        tokens: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        *,
        images: Float[Tensor, "B 3 H W"] | None = None,
        mel: Float[Tensor, "B F M"] | None = None,
        mel_lengths: Int[Tensor, " B"] | None = None,
        has_image: Bool[Tensor, " B"] | None = None,
        has_audio: Bool[Tensor, " B"] | None = None,
        attention_mask: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy, a scalar, over the targets that are not PAD: the token after each of `tokens`.

        The other arguments are forward's.

        Raises:
            ValueError, TokenIdError: as forward; targets of another shape, not integers, or out of range.
        """
        fused = self._fuse(tokens, targets, images, mel, mel_lengths, has_image, has_audio, attention_mask)
        assert fused.targets is not None
        logits = self.thinker(embeddings=fused.embeddings, attention_mask=fused.attention_mask)
        return cross_entropy(logits, fused.targets)

    def encode(
        self,
        images: Float[Tensor, "B 3 H W"] | None = None,
        mel: Float[Tensor, "B F M"] | None = None,
        mel_lengths: Int[Tensor, " B"] | None = None,
        has_image: Bool[Tensor, " B"] | None = None,
        has_audio: Bool[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B N D"], Bool[Tensor, "B N"]]:
        """What stands before the text: embeddings (B, N, D) and mask (B, N). The arguments are forward's.

        Raises:
            ValueError: as forward; neither images nor mel.
        """
        if images is None and mel is None:
            raise ValueError("images and mel are both None: must be one of them at least; pass images= or mel=")
        encoded = self._encode(None, images, mel, mel_lengths, has_image, has_audio)
        fused = fuse(**encoded, ctx_len=self.config.thinker.ctx_len)
        return fused.embeddings, fused.attention_mask

    def _fuse(
        self,
        tokens: Any,
        targets: Any,
        images: Any,
        mel: Any,
        mel_lengths: Any,
        has_image: Any,
        has_audio: Any,
        attention_mask: Any,
    ) -> Fused:
        check_tensor("tokens", tokens)
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}: must be (B, T) with at least one entry on each axis; add "
                "the missing axis, for example tokens[None]"
            )
        if attention_mask is not None:
            _check_mask("attention_mask", attention_mask, [tuple(tokens.shape)])
        text = self.thinker.tok_emb(tokens)
        encoded = self._encode(len(tokens), images, mel, mel_lengths, has_image, has_audio)
        return fuse(
            **encoded, text=text, text_mask=attention_mask, targets=targets, ctx_len=self.config.thinker.ctx_len
        )

    def _encode(
        self, batch: int | None, images: Any, mel: Any, mel_lengths: Any, has_image: Any, has_audio: Any
    ) -> dict[str, Any]:
        """The arguments of `fuse` for image and audio."""
        images, mel, mel_lengths = self.check_senses(batch, images, mel, mel_lengths, has_image, has_audio)
        made: dict[str, Any] = {}
        dtype = self.thinker.tok_emb.weight.dtype
        if images is not None:
            assert self.vision_encoder is not None
            assert self.proj_v is not None
            cls_B1D, _ = self.vision_encoder(images)
            made |= {"image": self.proj_v(cls_B1D).to(dtype), "image_mask": has_image}
        if mel is not None:
            assert self.audio_encoder is not None
            assert self.proj_a is not None
            audio_mask = has_audio
            if mel_lengths is None:
                audio_BUD = self.audio_encoder(mel)
            else:
                audio_BUD, lengths = self.audio_encoder(mel, mel_lengths)
                audio_mask = _before(lengths, audio_BUD.shape[1])
                audio_mask = audio_mask if has_audio is None else audio_mask & has_audio[:, None]
            made |= {"audio": self.proj_a(audio_BUD).to(dtype), "audio_mask": audio_mask}
        return made

    def check_senses(
        self, batch: int | None, images: Any, mel: Any, mel_lengths: Any, has_image: Any, has_audio: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """images (B, 3, H, W), mel (B, frames, 128) and mel_lengths (B,), 0 where nothing is to be read in them.

        `batch` is the number of rows, None for any; the other arguments are forward's. Nothing is computed.

        Raises:
            ValueError: as forward.
        """
        about = {"has_image": (has_image, "images", images), "has_audio": (has_audio, "mel", mel)}
        for other, (given, name, x) in (about | {"mel_lengths": (mel_lengths, "mel", mel)}).items():
            if given is not None and x is None:
                raise ValueError(f"{other} is given without {name}, which it is about; pass {name}=, or leave it out")
        if images is not None:
            if self.vision_encoder is None:
                raise ValueError(_lacks("vision"))
            check_images(images, self.vision_encoder.patch)
            batch = _check_batch("images", images, batch)
            images = _present("images", images, has_image)
        if mel is not None:
            if self.audio_encoder is None:
                raise ValueError(_lacks("audio"))
            check_mel(mel)
            batch = _check_batch("mel", mel, batch)
            if has_audio is not None:
                _check_mask("has_audio", has_audio, [(batch,)])
            mel_lengths, kept = _lengths(mel, mel_lengths, has_audio)
            mel = _present("mel", mel, kept)
        return images, mel, mel_lengths


def split_frozen(params: Mapping[str, Tensor], frozen: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The trainable parameters and the frozen ones, of `dict(model.named_parameters())` of any shapes.

    `frozen` are dotted names of modules or parameters, such as "vision_encoder" or "thinker.blocks.0". Those of modules
    are the same in both twins; the last part of a parameter's is the framework's own: weight here where JAX says
    kernel, scale or embedding (in_proj_weight where it says in_proj.kernel). Give an optimizer the first alone: the
    others then keep every bit, whatever its weight decay.

    Raises:
        ValueError: a name that no parameter begins with; nothing left to train.
    """
    prefixes = _check_prefixes(frozen, list(params))
    parts: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name, value in params.items():
        parts[f"{name}.".startswith(prefixes)][name] = value
    if not parts[0]:
        raise ValueError(f"frozen = {list(frozen)}: must leave a parameter to train; freeze fewer")
    return parts


# Pieces of fuse ------------------------------------------------------------------------------------------------------


def _checked_parts(
    image: Any, audio: Any, text: Any, image_mask: Any, audio_mask: Any, text_mask: Any, targets: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
    """The modalities that are given and their masks (B, length), in the order of the sequence."""
    given = {"image": (image, image_mask), "audio": (audio, audio_mask), "text": (text, text_mask)}
    parts: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for name, (part, mask) in given.items():
        if part is None:
            if mask is not None:
                raise ValueError(f"{name}_mask is given without {name}; pass {name}= or leave it out")
            continue
        check_tensor(name, part)
        if part.ndim != 3 or 0 in part.shape or not part.is_floating_point():
            raise ValueError(
                f"{name} has shape {tuple(part.shape)} and dtype {dtype_name(part.dtype)}: must be floating point of "
                "shape (B, length, D), with at least one entry on each axis; give embeddings"
            )
        first = next(iter(parts.values()), part)
        if (part.shape[0], part.shape[2], part.dtype) != (first.shape[0], first.shape[2], first.dtype):
            raise ValueError(
                f"{name} is {dtype_name(part.dtype)} of shape {tuple(part.shape)} beside {dtype_name(first.dtype)} of "
                f"shape {tuple(first.shape)}: batch, last axis and dtype must be equal; project and cast them first"
            )
        B, length, _ = part.shape
        if mask is None:
            mask = torch.ones(1, 1, dtype=torch.bool, device=part.device)
        else:
            _check_mask(f"{name}_mask", mask, [(B,), (B, length)])
        parts[name], masks[name] = part, (mask[:, None] if mask.ndim == 1 else mask).expand(B, length)
    if not parts:
        raise ValueError("image, audio and text are all None: must be one of them at least; give embeddings")
    if targets is not None:
        check_tensor("targets", targets)
        whole = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
        wanted = tuple(text.shape[:2]) if text is not None else None
        if tuple(targets.shape) != wanted or not whole:
            raise ValueError(
                f"targets have shape {tuple(targets.shape)} and dtype {dtype_name(targets.dtype)}: must be integers, "
                f"one for each text position, {wanted or 'and there is no text'}; give the next token of each"
            )
    return parts, masks, targets


def _most(lengths: dict[str, int], ctx_len: int, policy: str, alone: bool) -> int:
    """The most vectors that a row can keep; `alone`: a row's text may stand alone."""
    total = sum(lengths.values())
    if policy == "family":
        others = lengths.get("image", 0) + min(lengths.get("audio", 0), max(ctx_len // 4, 1))
        text = lengths.get("text", 0)
        beside = others + min(text, max(ctx_len - others - 1, 1))
        return max(beside, min(text, ctx_len)) if alone else beside
    if total > ctx_len and (policy == "error" or len(lengths) > ctx_len):
        raise ValueError(
            f"{_listed(lengths)} are {total}: must be at most ctx_len={ctx_len}; cut them, or use policy='family' or "
            "'longest', or fuse_chunks"
        )
    return min(total, ctx_len)


def _cut(masks: dict[str, Tensor], ctx_len: int, policy: str) -> dict[str, Tensor]:
    """The masks, False for what is cut, of each row by what it keeps itself."""
    numbers = {name: mask.cumsum(dim=1) for name, mask in masks.items()}  # from 1
    if policy == "longest":
        # Of all vectors those with the lowest numbers are kept; of equal ones those of the first modality go first.
        ranks = {name: len(masks) * number - i for i, (name, number) in enumerate(numbers.items())}
        never = torch.iinfo(torch.int64).max
        ranks_BN = torch.cat([torch.where(mask, ranks[name], never) for name, mask in masks.items()], dim=1)
        last_B1 = ranks_BN.sort(dim=1).values[:, ctx_len - 1 : ctx_len]
        return {name: mask & (ranks[name] <= last_B1) for name, mask in masks.items()}
    kept = dict(masks)
    if "audio" in kept:
        kept["audio"] = kept["audio"] & (numbers["audio"] <= max(ctx_len // 4, 1))
    if "text" in kept:
        others_B1 = torch.zeros(1, 1, dtype=torch.int64, device=kept["text"].device)
        for name in kept.keys() - {"text"}:
            others_B1 = others_B1 + kept[name].sum(dim=1, keepdim=True)
        room_B1 = torch.where(others_B1 > 0, (ctx_len - others_B1 - 1).clamp(min=1), ctx_len)
        kept["text"] = kept["text"] & (numbers["text"] <= room_B1)
    return kept


def _chunk(masks: dict[str, Tensor], ctx_len: int, number: int) -> dict[str, Tensor]:
    """The masks of chunk `number`: of each row's longest modality what comes in it, all of the others, or nothing."""
    counts_BM = torch.cat([mask.sum(dim=1, keepdim=True) for mask in masks.values()], dim=1)
    longest_B1 = counts_BM.argmax(dim=1, keepdim=True)
    most_B1 = counts_BM.amax(dim=1, keepdim=True)
    room_B1 = ctx_len - counts_BM.sum(dim=1, keepdim=True) + most_B1
    before_B1 = number * room_B1
    kept = {}
    for i, (name, mask) in enumerate(masks.items()):
        number_BN = mask.cumsum(dim=1)
        inside_BN = (number_BN > before_B1) & (number_BN <= before_B1 + room_B1)
        kept[name] = mask & torch.where(longest_B1 == i, inside_BN, before_B1 < most_B1)
    return kept


def _join(parts: dict[str, Tensor], masks: dict[str, Tensor], targets: Tensor | None) -> Fused:
    mask_BN = torch.cat([*masks.values()], dim=1)
    joined_BND = torch.cat([*parts.values()], dim=1)
    # where, not a product: a NaN that is masked out must not come through.
    embeddings_BND = torch.where(mask_BN[:, :, None], joined_BND, 0.0)
    if targets is None:
        return Fused(embeddings_BND, mask_BN, None)
    targets = torch.where(masks["text"], targets, PAD_ID)
    B, N = mask_BN.shape
    others = targets.new_full((B, N - targets.shape[1]), PAD_ID)
    return Fused(embeddings_BND, mask_BN, torch.cat([others, targets], dim=1))


def _narrow(fused: Fused, width: int) -> Fused:
    """`width` places a row, of which it keeps no more: the first ones that it does not keep are left out."""
    empty_BN = ~fused.attention_mask
    surplus = empty_BN.shape[1] - width
    if surplus == 0:
        return fused
    out_BN = empty_BN & (empty_BN.cumsum(dim=1) <= surplus)
    order_BN = out_BN.to(torch.int8).argsort(dim=1, stable=True)[:, :width]
    embeddings_BND, mask_BN, targets_BN = fused
    return Fused(
        embeddings_BND.take_along_dim(order_BN[:, :, None], dim=1),
        mask_BN.take_along_dim(order_BN, dim=1),
        None if targets_BN is None else targets_BN.take_along_dim(order_BN, dim=1),
    )


def _listed(lengths: dict[str, int]) -> str:
    return ", ".join(f"{length} of {name}" for name, length in lengths.items())


def _check_ctx_len(ctx_len: Any) -> int:
    if isinstance(ctx_len, bool) or not isinstance(ctx_len, int) or ctx_len < 1:
        raise ValueError(f"ctx_len = {ctx_len!r}: must be an integer from 1 up; give the model's")
    return ctx_len


# Pieces of OmniLM ----------------------------------------------------------------------------------------------------


def _lacks(sense: str) -> str:
    what = "pictures" if sense == "vision" else "sound"
    return f"the model cannot read {what}: its config has no section {sense!r}; leave it out, or give another model"


def _check_mask(name: str, mask: Any, shapes: list[tuple[int, ...]]) -> None:
    check_tensor(name, mask)
    if mask.dtype != torch.bool or tuple(mask.shape) not in shapes:
        raise ValueError(
            f"{name} is {dtype_name(mask.dtype)} of shape {tuple(mask.shape)}: must be boolean of shape "
            f"{' or '.join(map(str, shapes))}; give True for what is there"
        )


def _check_batch(name: str, x: Any, batch: int | None) -> int:
    """That it is floating, and has a row for each of the text's."""
    if not x.is_floating_point():
        raise ValueError(
            f"{name} has dtype {dtype_name(x.dtype)}: must be floating point; divide levels of 0 … 255 by 255"
        )
    if batch is not None and len(x) != batch:
        raise ValueError(
            f"{name} has {len(x)} rows, and the batch {batch}: must be equal; fill up rows without one, and say which "
            f"they are: has_{'image' if name == 'images' else 'audio'}="
        )
    return len(x)


def _lengths(mel: Tensor, mel_lengths: Any, has_audio: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(mel_lengths, 1 in rows without a clip; which frames are to be read), None for all of both."""
    if mel_lengths is None:
        return None, has_audio
    check_tensor("mel_lengths", mel_lengths)
    B, frames, _ = mel.shape
    whole = not (mel_lengths.is_floating_point() or mel_lengths.is_complex() or mel_lengths.dtype == torch.bool)
    if tuple(mel_lengths.shape) != (B,) or not whole:
        raise ValueError(
            f"mel_lengths have shape {tuple(mel_lengths.shape)} and dtype {dtype_name(mel_lengths.dtype)}: must be "
            f"integers of shape {(B,)}; give each clip's number of frames"
        )
    if has_audio is not None:
        mel_lengths = torch.where(has_audio, mel_lengths, 1)
    if not torch.compiler.is_compiling():
        for i, length in enumerate(mel_lengths.tolist()):
            if not 1 <= length <= frames:
                raise ValueError(
                    f"mel_lengths[{i}] = {length}: must be from 1 to the {frames} frames of mel; a row without a clip "
                    "is False in has_audio="
                )
    kept = _before(mel_lengths, frames)
    return mel_lengths, kept if has_audio is None else kept & has_audio[:, None]


def _before(lengths: Tensor, count: int) -> Tensor:
    return torch.arange(count, device=lengths.device)[None] < lengths[:, None]


def _present(name: str, x: Tensor, kept: Tensor | None) -> Tensor:
    """x, 0 where it is not to be read, so that a NaN there has no gradient either; the rest must be finite."""
    if kept is not None:
        if name == "images":
            _check_mask("has_image", kept, [(len(x),)])
        x = torch.where(kept.reshape(*kept.shape, *[1] * (x.ndim - kept.ndim)), x, 0.0)
    if not torch.compiler.is_compiling():  # inside torch.compile the values are not known
        bad = ~x.detach().isfinite()
        if bool(bad.any()):
            raise ValueError(
                f"{name} holds NaN or Inf, first at {bad.nonzero()[0].tolist()}: must be finite; look at where it "
                "comes from"
            )
    return x


def _check_prefixes(frozen: Sequence[str], names: list[str]) -> tuple[str, ...]:
    if isinstance(frozen, str):
        raise ValueError(f"frozen = {frozen!r}: must be a list of names; give [{frozen!r}]")
    prefixes = tuple(f"{prefix.removesuffix('.')}." for prefix in frozen)
    for prefix in prefixes:
        if not any(f"{name}.".startswith(prefix) for name in names):
            first = ", ".join(sorted({name.partition(".")[0] for name in names}))
            raise ValueError(f"frozen = {prefix[:-1]!r} is no module or parameter of the model; it has {first}")
    return prefixes
