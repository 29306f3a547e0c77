"""Edits for tests: through the nodes of the pack, and by loops written out from the papers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

import tiny

from . import stock
from .graphs import NodeGraph, Wire

Velocity = Callable[[str, Tensor, float], Tensor]
MaskAt = Callable[[float], Tensor]


def picture_latent(batch: int = 1, *size: int, channels: int = 16, seed: int = 31) -> Tensor:
    """A latent as it comes from VAE Encode, (batch, channels, *size); 8x8 cells if none given."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, channels, *(size or (8, 8))), generator=generator) * 1.3 + 0.1


def left_half(latent: Tensor) -> Tensor:
    """A hard mask over the left half of a latent's cells."""
    mask = torch.zeros(1, *latent.shape[-2:])
    mask[..., : latent.shape[-1] // 2] = 1
    return mask


def soft_ramp(latent: Tensor) -> Tensor:
    """A soft mask from 0 at the left to 1 at the right border, both included."""
    height, width = latent.shape[-2:]
    return torch.linspace(0, 1, width).expand(1, height, width)


def latent_for(name: str, batch: int = 1, *size: int, seed: int = 31) -> Tensor:
    """A latent for one of the tiny models; Wan's and Qwen-Image's are 5-D."""
    frames = {"wan": (2,), "qwen": (1,)}.get(name, ())
    channels = {"flux2": 128, "sd15": 4}.get(name, tiny.latent_channels)
    return picture_latent(batch, *frames, *(size or (8, 8)), channels=channels, seed=seed)


@dataclass(frozen=True)
class Edit:
    """All settings of an edit; `replace` makes another."""

    model: Any
    latent: Tensor = field(default_factory=picture_latent)
    method: str = "FocusFlow"
    steps: int = 6
    n_max: int = 5
    n_min: int = 0
    n_avg: int = 1
    reanchor: bool = False
    mask: Tensor | None = None
    noise_mask: Tensor | None = None
    seed: int = 7
    source: stock.Conditioning = field(default_factory=lambda: stock.conditioning(1))
    target: stock.Conditioning = field(default_factory=lambda: stock.conditioning(2))
    negative: stock.Conditioning | None = field(default_factory=lambda: stock.conditioning(3))
    source_guidance: float = 1.5
    target_guidance: float = 4.0
    guidance_mode: str = "cfg"
    remember_source: bool = True
    active_tokens: bool = False
    refresh: int = 1
    halo: int = 1
    schedule: Tensor | None = None
    """Sigmas in place of a scheduler's."""

    def having(self, **changes: Any) -> Edit:
        """The same edit with other settings."""
        return replace(self, **changes)

    def guider_widgets(self) -> dict[str, Any]:
        """The values of the Source/Target Guider's widgets."""
        names = ("source_guidance", "target_guidance", "guidance_mode", "remember_source")
        return {name: getattr(self, name) for name in names}

    def sampler_widgets(self) -> dict[str, Any]:
        """The values of the Edit Sampler's widgets."""
        names = (
            "method",
            "n_max",
            "n_min",
            "n_avg",
            "reanchor",
            "active_tokens",
            "refresh",
            "halo",
        )
        return {name: getattr(self, name) for name in names}

    def parts(self) -> dict[str, Any]:
        """The inputs of SamplerCustomAdvanced, each from its node."""
        latent = {"samples": self.latent}
        if self.noise_mask is not None:
            latent["noise_mask"] = self.noise_mask
        return {
            "noise": stock.call("RandomNoise", noise_seed=self.seed)[0],
            "guider": stock.call(
                "PinpointSourceTargetGuider",
                model=self.model,
                source=self.source,
                target=self.target,
                negative=self.negative,
                **self.guider_widgets(),
            )[0],
            "sampler": stock.call("PinpointEditSampler", **self.sampler_widgets(), mask=self.mask)[
                0
            ],
            "sigmas": self.sigmas(),
            "latent_image": latent,
        }

    def sigmas(self) -> Tensor:
        """The schedule, `steps` + 1 numbers."""
        if self.schedule is not None:
            return self.schedule
        return stock.call(
            "BasicScheduler", model=self.model, scheduler="simple", steps=self.steps, denoise=1.0
        )[0]

    def run(self) -> Tensor:
        """The edited latent."""
        return stock.call("SamplerCustomAdvanced", **self.parts())[0]["samples"]

    def graph(self, reverse: bool = False) -> tuple[NodeGraph, Wire]:
        """The same edit as a graph for the executor, and the wire with its result.

        Args:
            reverse: write the independent nodes in the opposite order, with other ids.
        """
        graph = NodeGraph()
        model, latent = graph.give(self.model), graph.give({"samples": self.latent})
        prompts = {name: graph.give(getattr(self, name)) for name in ("source", "target")}
        adders = {
            "noise": lambda: graph.add("RandomNoise", noise_seed=self.seed),
            "guider": lambda: graph.add(
                "PinpointSourceTargetGuider",
                model=model,
                **prompts,
                negative=graph.give(self.negative),
                **self.guider_widgets(),
            ),
            "sampler": lambda: graph.add(
                "PinpointEditSampler",
                **self.sampler_widgets(),
                **({} if self.mask is None else {"mask": graph.give(self.mask)}),
            ),
            "sigmas": lambda: graph.add(
                "BasicScheduler", model=model, scheduler="simple", steps=self.steps, denoise=1.0
            ),
        }
        order = list(adders)[::-1] if reverse else list(adders)
        parts = {name: adders[name]() for name in order}
        edited = graph.add("SamplerCustomAdvanced", **parts, latent_image=latent)
        return graph, graph.keep(edited)

    def written_out(self, mask_at: Callable[[float], Tensor] | None = None) -> Tensor:
        """The edited latent by a loop that follows the papers, with ComfyUI's own guider.

        `mask_at` gives another mask for each sigma, in place of the edit's own.
        """
        prompts = {
            "source": (self.source, self.source_guidance),
            "target": (self.target, self.target_guidance),
        }

        def velocity(name: str, x: Tensor, sigma: float) -> Tensor:
            prompt, cfg = prompts[name]
            return stock.velocity(self.model, prompt, self.negative, cfg, x, sigma)

        mask = torch.ones(1, 1, 1) if self.mask is None else self.mask
        masks = mask_at or (lambda _: mask)
        clean = self.model.model.process_latent_in(self.latent)
        loop = published_loop if self.method == "FocusFlow as published" else delta_loop
        edited = loop(self, clean, lambda s: masks(s)[:, None], velocity)
        return self.model.model.process_latent_out(edited)


def edit_for(model: Any, name: str, **settings: Any) -> Edit:
    """An edit with a tiny model, in the guidance mode that a person would get."""
    return Edit(model, **{"latent": latent_for(name), "guidance_mode": "auto", **settings})


@dataclass(frozen=True)
class MaskSearch:
    """All settings of a Velocity Mask."""

    model: Any
    latent: Tensor = field(default_factory=picture_latent)
    noise_level: float = 0.75
    samples: int = 3
    guidance: float = 4.0
    threshold: float = 0.3
    softness: float = 0.3
    dilation: int = 0
    blur: int = 3
    seed: int = 5
    source: stock.Conditioning = field(default_factory=lambda: stock.conditioning(1))
    target: stock.Conditioning = field(default_factory=lambda: stock.conditioning(2))
    extras: dict[str, Any] = field(default_factory=dict)
    """Optional inputs."""

    def having(self, **changes: Any) -> MaskSearch:
        """The same search with other settings."""
        return replace(self, **changes)

    def widgets(self) -> dict[str, Any]:
        """The inputs that are values."""
        wires = ("model", "latent", "source", "target", "extras")
        names = (item.name for item in fields(self) if item.name not in wires)
        return {name: getattr(self, name) for name in names} | self.extras

    def things(self) -> dict[str, Any]:
        """The inputs that come by wire."""
        prompts = {"source": self.source, "target": self.target}
        return {"model": self.model, "latent": {"samples": self.latent}, **prompts}

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Soft mask, hard mask and heat map."""
        return stock.call("PinpointVelocityMask", **self.things(), **self.widgets())

    def graph(self) -> tuple[NodeGraph, Wire]:
        """The same search as a graph for the executor, and the wire with its soft mask."""
        graph = NodeGraph()
        wires = {name: graph.give(thing) for name, thing in self.things().items()}
        return graph, graph.keep(graph.add("PinpointVelocityMask", **wires, **self.widgets()))


def contents(thing: Any) -> Any:
    """Everything in nested containers, the leaves by identity, to be compared later."""
    if isinstance(thing, dict):
        return {key: contents(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [contents(value) for value in thing]
    return id(thing)


def patcher_state(model: Any) -> Any:
    """What a ModelPatcher would show of a change, to be compared later."""
    names = (
        "model_options",
        "patches",
        "object_patches",
        "weight_wrapper_patches",
        "wrappers",
        "callbacks",
        "injections",
        "attachments",
        "additional_models",
        "hook_patches",
        "patches_uuid",
    )
    hooks = [module._forward_hooks or module._forward_pre_hooks for module in model.model.modules()]
    return {name: contents(getattr(model, name)) for name in names}, any(hooks)


def noises(seed: int, like: Tensor) -> Iterator[Tensor]:
    """Noise after noise for a batch, row i from a generator of its own with seed + i."""
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(like))]
    while True:
        yield torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators])


def delta_loop(edit: Edit, clean: Tensor, mask_at: MaskAt, velocity: Velocity) -> Tensor:
    """FlowEdit's algorithm 1, its steps held inside a mask, its free steps anchored outside."""
    noise, sigmas = noises(edit.seed, clean), edit.sigmas().tolist()
    edited, anchor = clean.clone(), None
    for index in range(edit.steps - edit.n_max, edit.steps):
        s, following = sigmas[index], sigmas[index + 1]
        mask = mask_at(s)
        if edit.steps - index > edit.n_min:
            if edit.reanchor:
                edited = mask * edited + (1 - mask) * clean
            difference = torch.zeros_like(clean)
            for _ in range(edit.n_avg):
                z_source = (1 - s) * clean + s * next(noise)
                z_target = edited + z_source - clean
                v_target = velocity("target", z_target, s)
                difference += (v_target - velocity("source", z_source, s)) / edit.n_avg
            edited = edited + (following - s) * mask * difference
            continue
        if anchor is None:
            anchor = next(noise)
            edited = edited + ((1 - s) * clean + s * anchor) - clean
        edited = mask * edited + (1 - mask) * ((1 - s) * clean + s * anchor)
        edited = edited + (following - s) * velocity("target", edited, s)
    return edited if anchor is None else mask * edited + (1 - mask) * clean


def published_loop(edit: Edit, clean: Tensor, mask_at: MaskAt, velocity: Velocity) -> Tensor:
    """FocusFlow's published code: whole velocities, blended by the mask."""
    noise, sigmas = noises(edit.seed, clean), edit.sigmas().tolist()
    edited, sampling = clean.clone(), False
    for index in range(edit.steps - edit.n_max, edit.steps):
        s, following = sigmas[index], sigmas[index + 1]
        mask, blend = mask_at(s), torch.zeros_like(clean)
        if edit.steps - index > edit.n_min:
            for _ in range(edit.n_avg):
                z_source = (1 - s) * clean + s * next(noise)
                z_target = edited + z_source - clean
                v_target = velocity("target", z_target, s)
                v_source = velocity("source", z_source, s)
                blend += (mask * v_target + (1 - mask) * v_source) / edit.n_avg
        else:
            if not sampling:
                edited, sampling = edited + ((1 - s) * clean + s * next(noise)) - clean, True
            blend = mask * velocity("target", edited, s)
            blend += (1 - mask) * velocity("source", edited, s)
        edited = edited + (following - s) * blend
    return edited
