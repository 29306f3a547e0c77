"""The Learn Identity node's work: pictures to learn from, the learning, and what is shown of it."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass, replace

import comfy.model_management
import comfy.sample
import node_helpers
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor

from ...kernels import masks
from . import (
    applying,
    arguments,
    families,
    identity_files,
    phrases,
    training,
    word_learning,
    words,
)
from .identity import Identity
from .learning import Learner
from .learning_settings import LearningSettings, Lesson, Picture

log = logging.getLogger(__name__)

smallest_side = 32
"""Pixels; less leaves the model a handful of latent cells."""
# Little guidance, as more would show the prompt rather than the person.
preview_steps, preview_guidance = 20, 2.0


@dataclass(frozen=True)
class Material:
    """What the node is given to learn from.

    Attributes:
        images: (B, H, W, 1, 3 or 4) in [0, 1], each of a size of its own.
        masks: (B, H, W) in [0, 1]; none, one, or one for each picture.
        prompts: one, or one for each picture.
        resolution: pictures of more pixels than its square are scaled down.
    """

    images: list[Tensor]
    masks: list[Tensor]
    prompts: list[str]
    resolution: int

    def pictures(self, model: ModelPatcher, vae: VAE, name: str, class_word: str) -> list[Picture]:
        """Encode the pictures.

        Raises:
            ValueError: pictures that are too small or not finite, masks or prompts that do not fit
                them, a VAE of another model, or a prompt without the class word.
        """
        images = [row[None] for image in self.images for row in image]
        found = [row[None] for mask in self.masks for row in mask]
        areas = [None] * len(images) if not found else _each(found, len(images), "mask", "masks")
        texts = _each(self.prompts, len(images), "prompt", "prompts")
        prompts = [placed(text, name, class_word) for text in texts]
        for area in found:
            arguments.require_finite_mask(area)
            if not (area > 0).any():
                raise ValueError(
                    "mask is empty, so the word could not be seen anywhere: paint the person, or "
                    "disconnect it"
                )
        pictures = []
        scaled = [_scaled(_coloured(image), self.resolution) for image in images]
        for pixels, area, prompt in zip(scaled, areas, prompts, strict=True):
            latent = vae.encode(pixels)
            samples = arguments.latent_samples(model, {"samples": latent})
            mask = None if area is None else _as_encoded(vae, area, pixels)
            pictures.append(Picture(samples, prompt, mask))
        return pictures

    def first(self) -> Tensor:
        """The first picture as it is learned from, (1, H, W, 3)."""
        return _scaled(_coloured(self.images[0][:1]), self.resolution)


def _as_encoded(vae: VAE, mask: Tensor, pixels: Tensor) -> Tensor:
    """The part of a picture's mask that VAE Encode leaves of the picture, which it crops."""
    kept = vae.vae_encode_crop_pixels(pixels).shape[1:3]
    if mask.shape[1:] == kept:
        return mask
    whole = masks.resized(mask.float(), *pixels.shape[1:3]).clamp(0, 1)
    # In colour, as VAEs that want transparency add that.
    return vae.vae_encode_crop_pixels(whole[..., None].expand(-1, -1, -1, 3))[..., 0]


def require_parts(clip: CLIP | None, vae: VAE | None) -> None:
    """Refuse a checkpoint without a text encoder or a VAE.

    Raises:
        ValueError: for either.
    """
    if clip is None:
        raise ValueError("clip is empty, as the checkpoint has no text encoder: use Load CLIP")
    if vae is None:
        raise ValueError("vae is empty, as the checkpoint has none: use Load VAE")


def require_fitting(
    model: ModelPatcher, clip: CLIP, settings: LearningSettings, start: Identity | None
) -> None:
    """Refuse settings that do not go with model and text encoder, before anything is loaded.

    Args:
        start: an identity to learn on from.

    Raises:
        ValueError: a name that prompts know already; learned words in the settings that they do
            not know; an identity of another model.
    """
    if settings.name.casefold() in words.known_words(clip):
        raise ValueError(
            f"name is {settings.name}, and the clip knows another identity of that name: write "
            "another, or connect the clip without Apply Identity"
        )
    is_begun = start is not None and bool(start.vectors)
    if not is_begun or (settings.reads_attributes and not settings.class_word):
        word_learning.require_known(clip, settings.start_word, settings.start_name)
    if settings.reads_attributes:
        word_learning.require_known(clip, ", ".join(settings.attributes), "attributes")
    if start is not None:
        applying.require_family(model, start)
        applying.require_fitting(clip, start)


def precision_for(model: ModelPatcher, chosen: torch.dtype | None) -> torch.dtype | None:
    """In which a model is trained: as chosen, else bf16 where the device has it.

    fp16, in which many models come, lets small gradients vanish.
    """
    device = model.load_device
    if chosen is not None or comfy.model_management.is_device_cpu(device):
        return chosen
    has_bf16 = comfy.model_management.should_use_bf16(device)
    return torch.bfloat16 if has_bf16 else torch.float32


def _each(given: list, count: int, one: str, several: str) -> list:
    if len(given) not in (1, count):
        raise ValueError(
            f"{one} has {len(given)} {several} for {count} pictures: give one, or one for each"
        )
    return given * count if len(given) == 1 else given


def placed(prompt: str, name: str, class_word: str) -> str:
    """A prompt with the learned word in it: where it is written, or before the class word.

    Raises:
        ValueError: it has neither.
    """
    spelled, count = re.subn(f"<{re.escape(name)}>", f"<{name}>", prompt, flags=re.IGNORECASE)
    if count:
        return spelled
    place = phrases.place_of(prompt, class_word)
    if place is None:
        lacks = f"no <{name}>"
        if class_word:
            lacks = f"neither <{name}> nor the class_word '{class_word}'"
        raise ValueError(
            f"prompt is '{prompt}', which has {lacks}: write for example 'photo of a <{name}> "
            f"{class_word or 'person'}'"
        )
    return f"{prompt[:place]}<{name}> {prompt[place:]}"


def _coloured(image: Tensor) -> Tensor:
    """(1, H, W, 3): grey pictures in three channels, transparent ones on white."""
    channels = image.shape[-1]
    if channels not in (1, 3, 4):
        raise ValueError(f"image has {channels} channels: connect an RGB, RGBA or grey picture")
    height, width = image.shape[1:3]
    if min(height, width) < smallest_side:
        raise ValueError(
            f"image is {width}x{height}: nothing can be learned from less than {smallest_side} "
            "pixels on a side"
        )
    if not torch.isfinite(image).all():
        raise ValueError("image holds values that are not finite: check where it comes from")
    if channels == 4:
        colour, alpha = image[..., :3], image[..., 3:]
        return colour * alpha + (1 - alpha)
    return image.expand(*image.shape[:3], 3)


def _scaled(image: Tensor, resolution: int) -> Tensor:
    height, width = image.shape[1:3]
    factor = resolution / (height * width) ** 0.5
    if factor >= 1:
        return image
    size = [max(smallest_side, round(side * factor / 8) * 8) for side in (height, width)]
    return F.interpolate(image.movedim(-1, 1), size, mode="area").movedim(1, -1)


def learn(
    model: ModelPatcher,
    clip: CLIP,
    pictures: list[Picture],
    settings: LearningSettings,
    start: Identity | None = None,
) -> tuple[Identity, Lesson, str]:
    """Learn an identity; returns it, how its learning went, and a report.

    If it stops before its end, what has been learned so far is kept in models/identities.

    Args:
        start: an identity to learn on from.

    Raises:
        ValueError: see `training.in_training` and `Learner.run`.
    """
    started = time.perf_counter()
    rank = settings.rank if settings.steps else 0
    lora = {} if start is None else start.lora
    with training.in_training(
        model, rank, settings.seed, settings.precision,
        saves_memory=settings.saves_memory, lora=lora,
    ) as trainee:  # fmt: skip
        # What inference mode made can't be kept for gradients.
        own = [
            replace(p, latent=p.latent.clone(), mask=p.mask if p.mask is None else p.mask.clone())
            for p in pictures
        ]
        learner = Learner(trainee, word_learning.trainable(clip), own, settings, start)
        try:
            learner.run()
        # ComfyUI's interruption is no Exception.
        except BaseException:
            if learner.lesson.losses:
                _keep(learner.identity(), f"after {len(learner.lesson.losses)} steps")
            raise
        identity = learner.identity()
    seconds = time.perf_counter() - started
    return identity, learner.lesson, _report(identity, learner.lesson, trainee.rank, seconds)


def _keep(identity: Identity, when: str) -> None:
    try:
        path = identity_files.save_partial(identity)
    except ValueError as error:
        log.warning(f"Pinpoint: learning stopped {when}, and what was learned is lost: {error}")
    else:
        log.warning(f"Pinpoint: learning stopped {when}; what was learned until then is in {path}")


def _report(identity: Identity, lesson: Lesson, rank: int, seconds: float) -> str:
    count = min(20, (len(lesson.losses) + 1) // 2)
    first, last = (sum(end) / count for end in (lesson.losses[:count], lesson.losses[-count:]))
    vectors = sum(len(v) for v in identity.vectors.values())
    changed = sum(key.endswith("lora_up.weight") for key in identity.lora)
    layers = f"{changed} changed layers of rank {rank}" if changed else "no change of the model"
    lines = [
        f"<{identity.name}> learned in {seconds:.0f} s, {len(lesson.losses)} steps",
        f"loss {first:.4f} at the start, {last:.4f} at the end",
        f"{vectors} vectors, {layers}",
    ]
    if lesson.cosines:
        lines.append(f"mean |cos| to the attribute words {lesson.cosines[-1]:.3f}")
    return "\n".join(lines)


def preview_or(
    instead: Tensor,
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    identity: Identity,
    picture: Picture,
    settings: LearningSettings,
) -> tuple[Tensor, str]:
    """See `preview`; another picture if there is none, and why, for what was learned is not lost.

    If it is interrupted, the identity is kept in models/identities.
    """
    try:
        return preview(model, clip, vae, identity, picture, settings), ""
    except comfy.model_management.InterruptProcessingException:
        _keep(identity, "while its preview was made")
        raise
    except Exception as error:
        log.warning("Pinpoint: <%s> is learned, but has no preview", identity.name, exc_info=True)
        return instead, f"\nno preview, as the picture shows itself: {error}"


def preview(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    identity: Identity,
    picture: Picture,
    settings: LearningSettings,
) -> Tensor:
    """The picture's prompt, sampled from noise with the identity applied: (1, H, W, 3)."""
    mask = picture.mask if settings.confined else None
    knowing, reading = applying.applied(model, clip, identity, 1.0, mask)
    conds = [
        reading.encode_from_tokens_scheduled(reading.tokenize(text))
        for text in (picture.prompt, "")
    ]
    guidance = preview_guidance
    if families.has_embedded_guidance(model):
        conds = [node_helpers.conditioning_set_values(c, {"guidance": guidance}) for c in conds]
        guidance = 1.0
    latent = torch.zeros_like(picture.latent)
    # ComfyUI's own noise would seed the global generator.
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(settings.seed))
    positive, negative = conds
    samples = comfy.sample.sample(
        knowing, noise, preview_steps, guidance, "euler", "simple", positive, negative, latent,
        disable_pbar=True, seed=settings.seed,
    )  # fmt: skip
    image = vae.decode(samples)
    return image.reshape(-1, *image.shape[-3:])
