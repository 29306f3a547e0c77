"""Learning an identity: first a word for it, then the word and a low-rank change of the model.

S2Edit (arXiv 2507.04584), stage 1, as far as it is published: a learned word next to the class
word, kept orthogonal to attribute words, whose attention is confined to the person.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import latent_preview
import node_helpers
import torch
from comfy.patcher_extension import WrappersMP
from comfy.sd import CLIP
from torch import Tensor
from torch.autograd.graph import allow_mutation_on_saved_tensors

from ...kernels import identity as losses
from ...kernels import masks
from . import confining, families, training, word_learning, words
from .identity import Identity
from .progress import show

log = logging.getLogger(__name__)

Weighting = Literal["uniform", "logit-normal"]
preview_level = 0.25
"""Part of the schedule that lies before the noise level of previews."""


@dataclass(frozen=True)
class LearningSettings:
    """How an identity is learned.

    Attributes:
        name: of the word, `<name>` in prompts.
        class_word: what it is an instance of.
        start_word: whose embeddings the word's vectors start from.
        attributes: words that shall stay free to be changed.
        vectors: of the word, in each text encoder.
        token_steps: steps in which only the word is learned.
        token_rate: Adam's rate for the word, in parts of its size; 0 = it stays as it starts.
        steps: steps in which the model is changed too.
        rate: Adam's rate for the low-rank change.
        rank: of the change.
        batch: noised copies of a picture in each step.
        update_every: steps between updates of the word.
        orthogonality: weight of the loss that keeps the word apart from the attributes.
        weighting: which noise levels are drawn.
        outside_weight: weight of the picture outside the mask in the loss.
        confined: whether the word is seen inside the mask only.
        precision: in which the model computes; None = as it comes.
        saves_memory: whether blocks are computed twice instead of kept.
        preview_every: steps between previews; 0 = none.
        seed: of noise, noise levels and the change's first values.
    """

    name: str
    class_word: str
    start_word: str
    attributes: tuple[str, ...] = ()
    vectors: int = 1
    token_steps: int = 100
    token_rate: float = 0.02
    steps: int = 300
    rate: float = 1e-3
    rank: int = 8
    batch: int = 4
    update_every: int = 5
    orthogonality: float = 0.1
    weighting: Weighting = "uniform"
    outside_weight: float = 1.0
    confined: bool = True
    precision: torch.dtype | None = None
    saves_memory: bool = True
    preview_every: int = 25
    seed: int = 0

    @property
    def total(self) -> int:
        """Steps of both phases."""
        return self.token_steps + self.steps


@dataclass(frozen=True)
class Picture:
    """What is learned from.

    Attributes:
        latent: (1, C, [T,] H, W), as VAE Encode gives it.
        prompt: describes it, with `<name>` in it.
        mask: (1, h, w) in [0, 1], where the person is, or None.
    """

    latent: Tensor
    prompt: str
    mask: Tensor | None = None


@dataclass
class Lesson:
    """What has been learned so far, and how it went.

    Attributes:
        losses: of each step, the noise's or velocity's mean squared error.
        cosines: mean |cos| between the word and the attributes, at each update of the word.
    """

    losses: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)


class Learner(comfy.samplers.Sampler):
    """A "sampler" that trains: ComfyUI prepares model and conditionings as for any other.

    After an error or an interruption, `identity` gives what has been learned until then.
    """

    def __init__(
        self,
        trainee: training.Trainee,
        clip: CLIP,
        pictures: list[Picture],
        settings: LearningSettings,
    ):
        """
        Args:
            clip: from `word_learning.trainable`.
        """
        self.trainee, self.clip, self.pictures = trainee, clip, pictures
        self.settings = settings
        self.lesson = Lesson()
        self.word = word_learning.LearnedWord(clip, settings.start_word, settings.vectors)
        self._knowing = words.with_words(clip, {settings.name: self.word})
        offsets = list(self.word.offsets.values())
        self._word_optimizer = torch.optim.Adam(offsets, lr=settings.token_rate, betas=(0.9, 0.99))
        changes = trainee.parameters()
        self._optimizer = torch.optim.Adam(changes, lr=settings.rate) if changes else None
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._encoded: dict[str, word_learning.EncodedPrompt] = {}
        self._apart: dict[str, tuple[Tensor, Tensor]] = {}
        self._taps: dict[int, dict[str, Any]] = {}

    def run(self) -> None:
        """Learn.

        Raises:
            ValueError: the loss is no number any more.
        """
        self._progress = comfy.utils.ProgressBar(self.settings.total)
        self._progress.update_absolute(0)
        show("reading the prompt")
        first = self.pictures[0]
        guider = comfy.samplers.CFGGuider(self.trainee.model)
        with torch.no_grad():
            guider.inner_set_conds({"positive": self._conditioning(self._encode(first.prompt))})
        sigmas = torch.tensor([1.0, 0.0])
        latent = first.latent.clone()
        guider.sample(torch.zeros_like(latent), latent, self, sigmas, seed=self.settings.seed)

    def identity(self) -> Identity:
        """What has been learned so far."""
        with torch.no_grad():
            vectors = {key: v.detach().cpu().clone() for key, v in self.word.items()}
        settings = self.settings
        recipe = {key: str(value) for key, value in asdict(settings).items()}
        recipe |= {"prompt": self.pictures[0].prompt, "steps_done": str(len(self.lesson.losses))}
        return Identity(
            name=settings.name,
            class_word=settings.class_word,
            family=families.name(self.trainee.model),
            vectors=vectors,
            lora=self.trainee.lora(),
            recipe=recipe,
        )

    def sample(
        self,
        model_wrap: comfy.samplers.CFGGuider,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """ComfyUI's sampler interface; returns the latent as it came."""
        self._model, self._options = model_wrap.inner_model, extra_args["model_options"]
        self._read_attributes()
        for steps in self._windows():
            # Models and text encoders add in place to what autograd has kept.
            with allow_mutation_on_saved_tensors():
                if self.settings.token_rate:
                    self._encoded.clear()
                for step in steps:
                    comfy.model_management.throw_exception_if_processing_interrupted()
                    self._step(step)
                self._update_word(steps)
        return latent_image

    def _windows(self) -> Iterator[range]:
        """Steps between which the word does not change; none reaches over both phases."""
        settings = self.settings
        bounds = ((0, settings.token_steps), (settings.token_steps, settings.total))
        for start, stop in bounds:
            for first in range(start, stop, settings.update_every):
                yield range(first, min(first + settings.update_every, stop))

    def _step(self, step: int) -> None:
        settings, phase_two = self.settings, step >= self.settings.token_steps
        picture = self.pictures[self._drawn(len(self.pictures))]
        prompt = self._encode(picture.prompt)
        loss = self._loss(picture, prompt)
        loss.backward()
        value = float(loss.detach())
        if not math.isfinite(value):
            rates = "rate and token_rate" if phase_two else "token_rate"
            raise ValueError(
                f"loss is no number any more after step {step + 1} of {settings.total}: lower "
                f"{rates}, or choose fp32 in precision"
            )
        self.lesson.losses.append(value)
        if phase_two and self._optimizer is not None:
            done = (step - settings.token_steps) / settings.steps
            _set_rate(self._optimizer, settings.rate * _remaining(done))
            self._optimizer.step()
        if self._optimizer is not None:
            self._optimizer.zero_grad()
        self._report(step, picture, prompt)

    def _loss(self, picture: Picture, prompt: word_learning.EncodedPrompt) -> Tensor:
        settings, sampling = self.settings, self._model.model_sampling
        latent = self._clean(picture).expand(settings.batch, *picture.latent.shape[1:])
        levels = losses.stratified(settings.batch, self._generator)
        if settings.weighting == "logit-normal":
            levels = losses.logit_normal(levels)
        sigma = torch.tensor([float(sampling.percent_to_sigma(1 - u)) for u in levels.tolist()])
        sigma = sigma.to(latent)
        noise = torch.randn(latent.shape, generator=self._generator).to(latent)
        x = sampling.noise_scaling(sigma.view(-1, *[1] * (latent.ndim - 1)), noise, latent)
        predicted = self._denoised(picture, prompt, x, sigma)
        weight = None
        if picture.mask is not None and settings.outside_weight != 1:
            inside = masks.resized(picture.mask.to(latent), *latent.shape[-2:])
            weight = inside + settings.outside_weight * (1 - inside)
            weight = weight.view(1, *[1] * (latent.ndim - 3), *weight.shape)[:, :, 0]
        return losses.prediction_error(predicted.float(), latent, sigma, weight).mean()

    def _clean(self, picture: Picture) -> Tensor:
        latent = picture.latent.clone().to(self.trainee.model.load_device, torch.float32)
        return self._model.process_latent_in(latent)

    def _denoised(
        self, picture: Picture, prompt: word_learning.EncodedPrompt, x: Tensor, sigma: Tensor
    ) -> Tensor:
        conds = {"positive": comfy.sampler_helpers.convert_cond(self._conditioning(prompt))}
        conds = comfy.samplers.process_conds(self._model, x[:1], conds, x.device, x[:1])
        options = self._confined(picture, prompt)
        given = [conds["positive"]]
        return comfy.samplers.calc_cond_batch(self._model, given, x, sigma, options)[0]

    def _confined(self, picture: Picture, prompt: word_learning.EncodedPrompt) -> dict[str, Any]:
        """Options of a model call in which the word is seen inside the mask only."""
        if picture.mask is None or not self.settings.confined:
            return self._options
        kind, inner = WrappersMP.APPLY_MODEL, self._options["transformer_options"]
        if id(picture) not in self._taps:
            length = prompt.conditioning[0][0].shape[1]
            place = confining.Confinement(prompt.rows, length, picture.mask)
            self._taps[id(picture)] = confining.confined_rows(self.trainee.source, place).wrappers
        wrappers = {**inner.get("wrappers", {}), kind: self._taps[id(picture)][kind]}
        return {**self._options, "transformer_options": {**inner, "wrappers": wrappers}}

    def _conditioning(self, prompt: word_learning.EncodedPrompt) -> list[Any]:
        if not families.has_embedded_guidance(self.trainee.model):
            return prompt.conditioning
        return node_helpers.conditioning_set_values(prompt.conditioning, {"guidance": 1.0})

    def _encode(self, text: str) -> word_learning.EncodedPrompt:
        if text not in self._encoded:
            # A word that stays as it starts is read once, without gradients.
            with torch.set_grad_enabled(self.settings.token_rate > 0):
                name = self.settings.name
                self._encoded[text] = word_learning.encode(self._knowing, text, name)
            training.load(self.trainee.model)
        return self._encoded[text]

    def _update_word(self, steps: range) -> None:
        settings = self.settings
        if not settings.token_rate:
            return
        self._word_optimizer.zero_grad()
        for text, prompt in self._encoded.items():
            loss = None
            if text in self._apart:
                apart = self._apart[text]
                found = losses.cosines(prompt.features, *apart).detach().abs().mean()
                self.lesson.cosines.append(float(found))
                loss = settings.orthogonality * word_learning.orthogonality(prompt, *apart)
            prompt.backward(len(steps), loss)
        _set_rate(
            self._word_optimizer, settings.token_rate * _remaining(steps.start / settings.total)
        )
        self._word_optimizer.step()

    def _read_attributes(self) -> None:
        """Features of the attribute words and of the class word, in place of the learned word."""
        settings = self.settings
        if not settings.attributes or not settings.orthogonality or not settings.token_rate:
            return
        texts = (*settings.attributes, settings.class_word)
        for prompt in {picture.prompt for picture in self.pictures}:
            found = []
            reading = word_learning.features_in_place(self.clip, prompt, settings.name, texts)
            for text, features in zip(texts, reading, strict=True):
                show(f"read '{text}'")
                comfy.model_management.throw_exception_if_processing_interrupted()
                found.append(features)
            self._apart[prompt] = torch.stack(found[:-1]), found[-1]

    def _drawn(self, count: int) -> int:
        return int(torch.randint(count, (1,), generator=self._generator))

    def _report(self, step: int, picture: Picture, prompt: word_learning.EncodedPrompt) -> None:
        settings, recent = self.settings, self.lesson.losses[-20:]
        phase = "word and model" if step >= settings.token_steps else "word"
        if step % 5 == 0:
            mean = sum(recent) / len(recent)
            show(f"{phase}: step {step + 1} of {settings.total}, loss {mean:.4f}")
        preview = None
        if settings.preview_every and step % settings.preview_every == 0:
            preview = self._preview(picture, prompt)
        self._progress.update_absolute(step + 1, settings.total, preview)

    def _preview(self, picture: Picture, prompt: word_learning.EncodedPrompt) -> Any:
        """The picture as the model sees it now in much noise, always the same."""
        model = self.trainee.model
        previewer = latent_preview.get_previewer(model.load_device, self._model.latent_format)
        if previewer is None:
            return None
        with torch.no_grad():
            latent, sampling = self._clean(picture), self._model.model_sampling
            generator = torch.Generator().manual_seed(self.settings.seed)
            noise = torch.randn(latent.shape, generator=generator).to(latent)
            sigma = latent.new_tensor([float(sampling.percent_to_sigma(preview_level))])
            x = sampling.noise_scaling(sigma, noise, latent)
            denoised = self._denoised(picture, prompt, x, sigma)
            return previewer.decode_latent_to_preview_image("JPEG", denoised)


def _remaining(done: float) -> float:
    """Part of a rate after a part of the steps: constant, then falling to nothing."""
    return 0.5 * (1 + math.cos(math.pi * done))


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
