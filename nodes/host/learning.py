"""Learning an identity: first a word for it, then the word and a low-rank change of the model.

S2Edit (arXiv 2507.04584), stage 1, as far as it is published: a learned word next to the class
word, kept orthogonal to attribute words, whose attention is confined to the person.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview
import node_helpers
import torch
from comfy.patcher_extension import WrappersMP
from comfy.sd import CLIP
from torch import Tensor

from ...kernels import identity as losses
from ...kernels import masks
from . import confining, families, gradients, training, word_learning, words
from .identity import Identity
from .learning_settings import LearningSettings, Lesson, Picture
from .progress import show

preview_level = 0.25
"""Part of the schedule that lies before the noise level of previews."""


@dataclass(frozen=True)
class _Sample:
    """Noised copies of a picture: latents as the sampler sees them, their sigmas, the goal."""

    clean: Tensor
    latent: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, sampling: Any, clean: Tensor, noise: Tensor, sigma: Tensor) -> _Sample:
        """Noise clean latents as a model's sampling does."""
        shaped = sigma.view(-1, *[1] * (clean.ndim - 1))
        return cls(clean, sampling.noise_scaling(shaped, noise, clean), sigma)

    def part(self, rows: slice) -> _Sample:
        """Some of them."""
        return _Sample(self.clean[rows], self.latent[rows], self.sigma[rows])


class Learner(training.TrainingSampler):
    """Learns an identity.

    After an error or an interruption, `identity` gives what has been learned until then.
    """

    def __init__(
        self,
        trainee: training.Trainee,
        clip: CLIP,
        pictures: list[Picture],
        settings: LearningSettings,
        start: Identity | None = None,
    ):
        """
        Args:
            clip: from `word_learning.trainable`.
            start: what is learned on.

        Raises:
            ValueError: a start_word that the text encoder has no vectors for.
        """
        self.trainee, self.clip, self.pictures = trainee, clip, pictures
        self.settings = settings
        self.lesson = Lesson()
        self._start = start
        vectors = start.vectors if start is not None else {}
        self.word = word_learning.LearnedWord(
            vectors
            or word_learning.first_vectors(
                clip, settings.start_word, settings.vectors, settings.start_name
            )
        )
        self._knowing = words.with_words(clip, {settings.name: self.word})
        offsets = list(self.word.offsets.values())
        self._word_optimizer = torch.optim.Adam(offsets, lr=settings.token_rate, betas=(0.9, 0.99))
        changes = trainee.parameters()
        self._optimizer = torch.optim.Adam(changes, lr=settings.rate) if changes else None
        self._good = training.LastGood([*offsets, *changes])
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._encoded: dict[str, word_learning.EncodedPrompt] = {}
        self._apart: dict[str, tuple[Tensor, Tensor]] = {}
        self._taps: dict[tuple, dict[str, Any]] = {}
        self._plain_prompts: dict[str, list[Any]] = {}
        self._varied: dict[str, str | None] = {}

    def run(self) -> None:
        """Learn.

        Raises:
            ValueError: the loss is no number any more.
        """
        self._progress = comfy.utils.ProgressBar(self.settings.total)
        self._progress.update_absolute(0)
        show("reading the prompt")
        first = self.pictures[0]
        with torch.no_grad():
            prompt = self._guided(self._encode(first.prompt).conditioning)
        self.run_on(self.trainee.model, prompt, first.latent.clone(), self.settings.seed)

    def identity(self) -> Identity:
        """What has been learned so far."""
        if not self._good.is_finite():
            self._good.restore()
        with torch.no_grad():
            vectors = {key: v.detach().cpu().clone() for key, v in self.word.items()}
        settings = self.settings
        return Identity(
            name=settings.name,
            class_word=settings.class_word,
            family=families.name(self.trainee.model),
            vectors=vectors,
            lora=self.trainee.lora(),
            recipe=self._recipe(),
        )

    def _recipe(self) -> dict[str, str]:
        """How it was learned; of what was learned before, the steps and the prompt stay."""
        told = self.settings.recipe() | {"rank": str(self.trainee.rank)}
        before = {} if self._start is None else self._start.recipe
        told["steps_done"] = _then(before.get("steps_done"), str(len(self.lesson.losses)))
        earlier, prompt = before.get("prompt"), self.pictures[0].prompt
        if earlier is None or not earlier.endswith(prompt):
            earlier = _then(earlier, prompt)
        told["prompt"] = earlier
        return told

    def train(self) -> None:
        """Make all steps."""
        self._read_attributes()
        phases = (0, self.settings.token_steps)
        for steps in self._windows():
            if steps.start in phases:
                self.trainee.learn(steps.start >= self.settings.token_steps)
            # Models and text encoders add in place to what autograd has kept.
            with gradients.copied_for_backward():
                if self.settings.token_rate:
                    self._encoded.clear()
                self._varied.clear()
                for step in steps:
                    comfy.model_management.throw_exception_if_processing_interrupted()
                    self._step(step)
                self._update_word(steps)
        self._require_numbers(self._good.is_finite(), self.settings.total - 1)

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
        sample = self._noised(picture)
        predicted = self._denoised(picture, prompt, sample)
        loss = losses.prediction_error(
            predicted, sample.clean, sample.sigma, self._weight(picture, sample)
        ).mean()
        value = float(loss.detach())
        self._require_numbers(math.isfinite(value), step)
        self.lesson.losses.append(value)
        if phase_two and settings.preservation:
            part = slice(step % 2, None, 2) if settings.batch > 1 else slice(None)
            kept = self._response_error(picture, sample.part(part), predicted[part].detach())
            loss = loss + settings.preservation * kept
        loss.backward()
        if phase_two and self._optimizer is not None:
            done = (step - settings.token_steps) / settings.steps
            _set_rate(self._optimizer, settings.rate * _remaining(done))
            self._optimizer.step()
        if self._optimizer is not None:
            self._optimizer.zero_grad()
        self._report(step, picture, prompt)

    def _require_numbers(self, are_there: bool, step: int) -> None:
        if are_there:
            self._good.keep()
            return
        self._good.restore()
        settings = self.settings
        rates = "rate and token_rate" if step >= settings.token_steps else "token_rate"
        raise ValueError(
            f"loss is no number any more after step {step + 1} of {settings.total}: lower {rates}, "
            "or choose fp32 in precision"
        )

    def _noised(self, picture: Picture) -> _Sample:
        settings = self.settings
        clean = self._clean(picture).expand(settings.batch, *picture.latent.shape[1:])
        levels = losses.stratified(settings.batch, self._generator)
        sigma = self._sigmas(levels, settings.weighting).to(clean)
        noise = torch.randn(clean.shape, generator=self._generator).to(clean)
        return _Sample.of(self.inner_model.model_sampling, clean, noise, sigma)

    def _weight(self, picture: Picture, sample: _Sample) -> Tensor | None:
        outside, clean = self.settings.outside_weight, sample.clean
        if picture.mask is None or outside == 1:
            return None
        inside = masks.resized(picture.mask.to(clean), *clean.shape[-2:])
        weight = inside + outside * (1 - inside)
        return weight.reshape(1, *[1] * (clean.ndim - 3), *weight.shape[-2:])

    def _clean(self, picture: Picture) -> Tensor:
        latent = picture.latent.to(self.trainee.model.load_device, torch.float32)
        return self.inner_model.process_latent_in(latent)

    def _response_error(self, picture: Picture, sample: _Sample, predicted: Tensor) -> Tensor:
        """How differently the model with the identity responds to a change of other words.

        Words of the prompt are left out or added, the same with and without identity: the
        prediction has to move as that of the unchanged model does. Without this, one picture is
        learned by heart, with all that the prompt names.
        """
        name = self.settings.name
        if picture.prompt not in self._varied:
            found = word_learning.variations(picture.prompt, name, self.settings.attributes)
            self._varied[picture.prompt] = found[self._drawn(len(found))] if found else None
        varied = self._varied[picture.prompt]
        if varied is None:
            return predicted.new_zeros(())
        with self.trainee.unchanged():
            plain, other = (
                self._call(self._plain(text), sample.latent, sample.sigma, self._options)
                for text in (picture.prompt, varied)
            )
        found = self._denoised(picture, self._encode(varied), sample)
        return losses.prediction_error(found, predicted + other - plain, sample.sigma).mean()

    def _plain(self, text: str) -> list[Any]:
        """The conditioning of a prompt without the learned word."""
        settings = self.settings
        text = word_learning.without_word(text, settings.name, settings.class_word)
        if text not in self._plain_prompts:
            self._plain_prompts[text] = self._guided(word_learning.plain(self.clip, text))
            training.load_again(self.trainee.model)
        return self._plain_prompts[text]

    def _denoised(
        self, picture: Picture, prompt: word_learning.EncodedPrompt, sample: _Sample
    ) -> Tensor:
        options = self._confined(picture, prompt)
        guided = self._guided(prompt.conditioning)
        return self._call(guided, sample.latent, sample.sigma, options)

    def _confined(self, picture: Picture, prompt: word_learning.EncodedPrompt) -> dict[str, Any]:
        """Options of a model call in which the word is seen inside the mask only."""
        if picture.mask is None or not self.settings.confined:
            return self._options
        kind, inner = WrappersMP.APPLY_MODEL, self._options["transformer_options"]
        place = id(picture), prompt.rows, prompt.conditioning[0][0].shape[1]
        if place not in self._taps:
            inside = confining.Confinement(*place[1:], picture.mask)
            self._taps[place] = confining.confined_rows(self.trainee.source, inside).wrappers
        wrappers = {**inner.get("wrappers", {}), kind: self._taps[place][kind]}
        return {**self._options, "transformer_options": {**inner, "wrappers": wrappers}}

    def _guided(self, prompt: list[Any]) -> list[Any]:
        if not families.has_embedded_guidance(self.trainee.model):
            return prompt
        return node_helpers.conditioning_set_values(prompt, {"guidance": 1.0})

    def _encode(self, text: str) -> word_learning.EncodedPrompt:
        if text not in self._encoded:
            # A word that stays as it starts is read once, without gradients.
            is_learned = torch.is_grad_enabled() and self.settings.token_rate > 0
            with torch.set_grad_enabled(is_learned):
                name = self.settings.name
                self._encoded[text] = word_learning.encode(self._knowing, text, name)
            training.load_again(self.trainee.model)
        return self._encoded[text]

    def _update_word(self, steps: range) -> None:
        settings = self.settings
        if not settings.token_rate:
            return
        # Reading the prompts may have made room for the model.
        word_learning.load(self._knowing)
        self._word_optimizer.zero_grad()
        apart = {text: self._apart[text] for text in self._encoded if text in self._apart}
        found = []
        for text, prompt in self._encoded.items():
            loss = None
            if text in apart:
                cosines = losses.cosines(prompt.features, *apart[text])
                found.append(float(cosines.detach().abs().mean()))
                # As the noise's error is the mean over the window.
                loss = settings.orthogonality * losses.orthogonality_loss(cosines) / len(apart)
            prompt.backward(len(steps), loss)
        if found:
            self.lesson.cosines.append(sum(found) / len(found))
        _set_rate(
            self._word_optimizer, settings.token_rate * _remaining(steps.start / settings.total)
        )
        self._word_optimizer.step()

    def _read_attributes(self) -> None:
        """Features of the attribute words and of the class word, in place of the learned word."""
        settings = self.settings
        if not settings.reads_attributes:
            return
        # Without a class word, the first meaning stands for it.
        classed = settings.class_word or settings.start_word
        texts = [*(("attributes", word) for word in settings.attributes), ("class_word", classed)]
        for prompt in {picture.prompt for picture in self.pictures}:
            found = []
            reading = word_learning.features_in_place(self.clip, prompt, settings.name, texts)
            for (_, text), features in zip(texts, reading, strict=True):
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
        """A picture as the model sees it now in much noise, which is always the same."""
        model = self.trainee.model
        previewer = latent_preview.get_previewer(model.load_device, self.inner_model.latent_format)
        if previewer is None:
            return None
        with torch.no_grad():
            latent, sampling = self._clean(picture), self.inner_model.model_sampling
            generator = torch.Generator().manual_seed(self.settings.seed)
            noise = torch.randn(latent.shape, generator=generator).to(latent)
            sigma = latent.new_tensor([float(sampling.percent_to_sigma(preview_level))])
            sample = _Sample.of(sampling, latent, noise, sigma)
            denoised = self._denoised(picture, prompt, sample)
            return previewer.decode_latent_to_preview_image("JPEG", denoised)


def _then(earlier: str | None, value: str) -> str:
    return value if earlier is None else f"{earlier}, then {value}"


def _remaining(done: float) -> float:
    """Part of a rate after a part of the steps: from 1 to 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * done))


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
