"""Training of a FlexIP adapter: the model, the text encoders and the image encoders stay frozen.

FlexIP (arXiv 2504.07405): pairs of the same picture ask for preservation, pairs of other pictures
of the same subject for adaptation, so gamma is drawn from another range for each kind.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ...kernels import identity as losses
from ...kernels.flexip import FlexIP, FlexIPSizes
from . import families, flexip_state, gradients, layouts, training
from .adapters import block_key
from .flexip_lesson import Lesson
from .flexip_settings import Pair, Pairs, Progress, Text, TrainingSettings

_plain_floats = (torch.float32, torch.float16, torch.bfloat16)
"""Weights of other types are quantised: they mean nothing without their scales."""


def new_network(
    model: ModelPatcher,
    low_width: int,
    high_width: int,
    text_width: int,
    seed: int = 0,
    **sizes: int,
) -> FlexIP:
    """An adapter for a model that changes nothing yet.

    Where an attention reads texts as wide as the adapter's tokens (UNets), its own keys are what
    the adapter's start from, as in IP-Adapter. Values start at zero, which IP-Adapter's do not.

    Args:
        seed: of its first weights.
        sizes: see `FlexIPSizes`.
    """
    widths = {block_key(b): w for b, w in layouts.attention_widths(model).items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = FlexIP(FlexIPSizes(low_width, high_width, text_width, blocks=widths, **sizes))
    network.silence()
    for block, keys in layouts.text_keys(model).items():
        started = network.to_k[block_key(block)].weight
        if keys.shape == started.shape and keys.dtype in _plain_floats:
            with torch.no_grad():
                started.copy_(keys.detach())
    return network


class Trainer(training.TrainingSampler):
    """Trains an adapter.

    Args:
        state: a file to go on from, written every `save_every` steps and at the end. When the loss
            is no number any more, it is left as it was.
        watch: called after every step, and once if there are none to make; may raise to stop.
        accelerator: of `accelerate`; each of its processes learns from other pairs.
        origin: where pairs come from; a state of another origin is refused.
        resume: go on from the state; otherwise it stays until there is a new one.
    """

    def __init__(
        self,
        model: ModelPatcher,
        network: FlexIP,
        pairs: Pairs,
        settings: TrainingSettings,
        state: Path | None = None,
        save_every: int = 500,
        watch: Callable[[Trainer], None] | None = None,
        accelerator: Any = None,
        origin: str = "",
        resume: bool = True,
    ):
        self.model, self.pairs, self.settings = model, pairs, settings
        self.state, self.save_every, self.watch = state, save_every, watch
        self.network, self.accelerator = network.to(model.load_device), accelerator
        self.averaged = AveragedModel(self.network, multi_avg_fn=_averaging(settings.average))
        self._optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=settings.rate,
            weight_decay=settings.weight_decay,
            betas=(0.9, 0.99),
        )
        self.progress = Progress()
        self._is_whole = True
        self._origin = {
            "model": families.name(model),
            "mode": settings.mode,
            "pictures": origin,
        }
        if resume and state is not None and state.exists():
            self.progress = flexip_state.restore(
                state, self.network, self.result, self._optimizer, self._origin
            )
            self.averaged.n_averaged.fill_(self.progress.step)
        self._first = self.progress.step

    def run(self) -> None:
        """Train.

        Raises:
            ValueError: the loss is no number any more.
        """
        settings = self.settings
        with training.in_training(
            self.model, 0, settings.seed, settings.precision, saves_memory=settings.saves_memory
        ) as trainee:
            self._trainee = trainee
            first = self.pairs.drawn(random.Random(settings.seed))
            prompt, latent = self._conditioning([first]), first.latent[None].float()
            self.run_on(trainee.model, prompt, latent, settings.seed)

    @property
    def result(self) -> FlexIP:
        """The averaged adapter."""
        return self.averaged.module

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.accelerator is None or self.accelerator.is_main_process

    def load_again(self) -> None:
        """Bring the model back after others, such as a VAE, may have taken its place."""
        training.load_again(self._trainee.model)

    def train(self) -> None:
        """Make the steps that are left, and save the state."""
        try:
            self._make_steps()
        finally:
            if self._is_whole and self.progress.step > self._first:
                self.save()

    def save(self) -> None:
        """Write what a later run needs to go on."""
        if self.state is not None and self.is_main:
            flexip_state.save(
                self.state,
                self.network,
                self.result,
                self._optimizer,
                self.progress,
                self._origin,
            )

    def denoised(
        self, network: FlexIP, pairs: Sequence[Pair], gamma: Tensor, x: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Lesson]:
        """What the model makes of noised latents with an adapter; and the adapter's gradients.

        Args:
            pairs: of each row the reference and the caption; captions of one length.
            gamma: (B,).
            x: (B, C, [T,] H, W).
            sigma: (B,).
        """
        low, high = (
            torch.stack([getattr(pair, name) for pair in pairs]).to(x.device, torch.float32)
            for name in ("low", "high")
        )
        lesson = Lesson(network, low, high, gamma.to(x.device), self.settings.mode)
        inner, kind = self._options["transformer_options"], WrappersMP.APPLY_MODEL
        own = {"pinpoint_training": lesson.wrappers(self._trainee.source)}
        others = inner.get("wrappers", {})
        wrappers = {**others, kind: {**others.get(kind, {}), **own}}
        options = {**self._options, "transformer_options": {**inner, "wrappers": wrappers}}
        return self._call(self._conditioning(pairs), x, sigma, options), lesson

    def _make_steps(self) -> None:
        steps = self.settings.steps
        bar = comfy.utils.ProgressBar(steps)
        while True:
            comfy.model_management.throw_exception_if_processing_interrupted()
            is_left = self.progress.step < steps
            if is_left:
                # Models add in place to what autograd has kept.
                with gradients.copied_for_backward():
                    self._step()
                bar.update_absolute(self.progress.step)
            if self.watch is not None:
                self.watch(self)
            if not is_left or self.progress.step >= steps:
                return

    def _step(self) -> None:
        settings, step = self.settings, self.progress.step
        rank = 0 if self.accelerator is None else self.accelerator.process_index
        # Seeded for each step: a training that goes on does as one that was never stopped.
        chance = random.Random(f"{settings.seed}:{step}:{rank}")
        generator = torch.Generator().manual_seed(chance.getrandbits(62))
        pairs = [self._dropped(self.pairs.drawn(chance), chance) for _ in range(settings.batch)]
        self._optimizer.zero_grad()
        loss = self._gather(self._backward(pairs, chance, generator))
        norm = float(nn.utils.clip_grad_norm_(self.network.parameters(), 1.0))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._is_whole = False
            raise ValueError(
                f"loss is no number any more after step {step + 1} of {settings.steps}: lower the "
                "rate, or choose fp32 in precision"
            )
        # What the last step led to is known to be good only now.
        if step and step % self.save_every == 0:
            self.save()
        # Whoever stops a script stops it anywhere; of half a step nothing may be saved.
        self._is_whole = False
        self._descend()
        self.progress.losses.append(loss)
        self.progress.step += 1
        self._is_whole = True

    def _descend(self) -> None:
        settings, done = self.settings, self.progress.step
        warm = min(1.0, (done + 1) / max(1, settings.warm_up))
        rate = settings.rate * warm * (0.5 + 0.5 * math.cos(math.pi * done / settings.steps))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self.averaged.update_parameters(self.network)

    def _gather(self, loss: float) -> float:
        """The loss over all processes, which get the mean of their gradients."""
        if self.accelerator is None:
            return loss
        parameters = list(self.network.parameters())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([g.flatten() for g in grads] + [grads[0].new_tensor([loss])])
        flat = self.accelerator.reduce(flat, "mean")
        parts = flat[:-1].split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()
        return float(flat[-1])

    def _dropped(self, pair: Pair, chance: random.Random) -> Pair:
        """A pair whose reference or caption may be missing, for guidance."""
        settings, draw = self.settings, chance.random()
        bounds = (settings.drop_both, settings.drop_subject, settings.drop_text)
        both, subject, text = (sum(bounds[: i + 1]) for i in range(3))
        if draw < subject:
            pair = pair.without_subject()
        if draw < both or subject <= draw < text:
            pair = pair.captioned(Text(*self.pairs.empty))
        return pair

    def _backward(
        self, pairs: list[Pair], chance: random.Random, generator: torch.Generator
    ) -> float:
        """Calculate gradients; returns the loss."""
        settings, device = self.settings, self.model.load_device
        ranges = (settings.gamma_variant, settings.gamma_invariant)
        gamma = torch.tensor([chance.uniform(*ranges[pair.invariant]) for pair in pairs])
        latents = torch.stack([pair.latent for pair in pairs]).to(device, torch.float32)
        clean = self.inner_model.process_latent_in(latents)
        levels = losses.stratified(settings.batch, generator)
        levels = levels[torch.randperm(len(levels), generator=generator)]
        lowest, highest = settings.levels
        levels = lowest + (highest - lowest) * levels
        sigma = self._sigmas(levels, settings.weighting).to(clean)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        shaped = sigma.view(-1, *[1] * (clean.ndim - 1))
        noised = self.inner_model.model_sampling.noise_scaling(shaped, noise, clean)
        total = 0.0
        for rows in _alike(pairs):
            chosen = [pairs[row] for row in rows]
            found, lesson = self.denoised(
                self.network, chosen, gamma[rows], noised[rows], sigma[rows]
            )
            loss = losses.prediction_error(found, clean[rows], sigma[rows]).sum() / len(pairs)
            loss.backward()
            lesson.backward()
            total += float(loss.detach())
        return total

    def _conditioning(self, pairs: Sequence[Pair]) -> list:
        text = torch.stack([pair.text for pair in pairs])
        entries: dict[str, Any] = {}
        if pairs[0].pooled is not None:
            entries["pooled_output"] = torch.stack([pair.pooled for pair in pairs])
        if pairs[0].text_mask is not None:
            # One for all, as `_alike` has it: models count its tokens over all rows.
            entries["attention_mask"] = pairs[0].text_mask.long()[None]
        if families.has_embedded_guidance(self.model):
            entries["guidance"] = 1.0
        return [[text, entries]]


def _alike(pairs: Sequence[Pair]) -> list[list[int]]:
    """Rows that can go through the model together: their captions have one length and mask."""
    groups: dict[tuple, list[int]] = {}
    for row, pair in enumerate(pairs):
        mask = None if pair.text_mask is None else tuple(pair.text_mask.tolist())
        groups.setdefault((len(pair.text), mask), []).append(row)
    return list(groups.values())


def _averaging(decay: float) -> Callable[..., None]:
    """An exponential average that forgets faster in the beginning, where all is far from done."""

    def update(averages: Any, current: Any, count: Any) -> None:
        number = float(count)
        get_ema_multi_avg_fn(min(decay, (1 + number) / (10 + number)))(averages, current, count)

    return update
