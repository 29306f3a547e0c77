"""Inversions, fused edits and their parts for tests, each through the nodes of the pack."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import stock
from .edits import latent_for, picture_latent
from .graphs import NodeGraph, Wire
from .tapping import FAMILIES, ROWS, WORDS

METHODS = ("RF-Solver", "FireFlow", "Euler", "RF-Inversion")
FAMILY_OF = {
    family.model: family
    for family in reversed(FAMILIES.values())
    if family.extras is None and family.channels > 4
}
"""Of each tiny flow model, run in the plainest way."""
FLOWS = tuple(reversed(FAMILY_OF))
"""Tiny flow models, SD3 first."""
REFINERS = {"lumina2": 2, "zimage": 2}
"""Attentions before the first block."""

Attention = Callable[..., Tensor]
Change = Callable[[int, Tensor], Tensor]
"""(number of the attention in the model call, values (B, heads, tokens, width)) to values."""


@dataclass(frozen=True)
class Inversion:
    """All settings of an Invert node; `replace` makes another."""

    model: Any
    latent: Tensor = field(default_factory=picture_latent)
    schedule: tuple[float, ...] = (1.0, 0.8, 0.55, 0.3, 0.0)
    method: str = "RF-Solver"
    guidance: float = 1.0
    gamma: float = 0.5
    seed: int = 3
    measure_round_trip: bool = False
    source: stock.Conditioning = field(default_factory=lambda: stock.conditioning(1, guidance=1.0))
    negative: stock.Conditioning | None = None

    def having(self, **changes: Any) -> Inversion:
        """The same inversion with other settings."""
        return replace(self, **changes)

    @property
    def sigmas(self) -> Tensor:
        """The schedule as it goes on a wire."""
        return torch.tensor(self.schedule)

    @property
    def prompt(self) -> stock.Conditioning:
        """The source prompt with the guidance that is given to models as a number."""
        return stock.with_values(self.source, guidance=self.guidance)

    def widgets(self) -> dict[str, Any]:
        """The inputs that are values."""
        names = ("method", "guidance", "gamma", "seed", "measure_round_trip")
        return {name: getattr(self, name) for name in names}

    def wires(self) -> dict[str, Any]:
        """The inputs that come by wire."""
        optional = {} if self.negative is None else {"negative": self.negative}
        latent = {"samples": self.latent}
        things = {"model": self.model, "source": self.source, "sigmas": self.sigmas}
        return {**things, "latent": latent, **optional}

    def run(self) -> tuple[Any, dict[str, Tensor], Any, str]:
        """Noise, the noise as a latent, trajectory and report."""
        return stock.call("PinpointInvert", **self.wires(), **self.widgets())

    def sampled(self, sampler: Any, noise: Any = None, **settings: Any) -> Tensor:
        """The source sampled again from its noise, along the same schedule."""
        noise = self.run()[0] if noise is None else noise
        given = {"prompt": self.prompt, "sigmas": self.sigmas, **settings}
        return sample(self.model, self.latent, sampler, noise=noise, **given)


def inversion_for(model: Any, name: str, **settings: Any) -> Inversion:
    """An inversion with a tiny model."""
    return Inversion(model, **{"latent": latent_for(name), **settings})


def node(class_type: str, **inputs: Any) -> Any:
    """First output of one of the pack's nodes; widgets that are not given have their defaults."""
    # To a type checker, a plain import of `nodes` would be of our own.
    nodes: Any = importlib.import_module("nodes")
    widgets = nodes.NODE_CLASS_MAPPINGS[class_type].define_schema().inputs
    defaults = {w.id: w.default for w in widgets if getattr(w, "default", None) is not None}
    return stock.call(class_type, **{**defaults, **inputs})[0]


def solver(method: str = "RF-Solver", **widgets: Any) -> Any:
    """A SAMPLER from the Flow Solver node, with the node's defaults."""
    return node("PinpointFlowSolver", method=method, **widgets)


def structure(trajectory: Any, mask: Tensor, **widgets: Any) -> Any:
    """A SAMPLER from the Structure Sampler node, with the node's defaults but Euler."""
    wires = {"trajectory": trajectory, "mask": mask}
    return node("PinpointStructureSampler", **wires, **{"method": "Euler", **widgets})


def recording(model: Any, **widgets: Any) -> Any:
    """A MODEL from the Record Values node; everything is recorded, exactly, if not told else."""
    everything = dict(blocks="all", start=0.0, end=1.0, precision="fp32", limit_gb=1.0)
    return node("PinpointRecordValues", model=model, **{**everything, **widgets})


def injecting(
    model: Any, trajectory: Any = None, mask: Tensor | None = None, **widgets: Any
) -> Any:
    """A MODEL from the Inject Values node; everything is injected if not told else."""
    everything = dict(blocks="all", start=0.0, end=1.0)
    optional = {"trajectory": trajectory, "mask": mask}
    wired = {name: thing for name, thing in optional.items() if thing is not None}
    return node("PinpointInjectValues", model=model, **wired, **{**everything, **widgets})


def guider_for(model: Any, prompt: stock.Conditioning) -> Any:
    """ComfyUI's guider of one prompt."""
    return stock.call("BasicGuider", model=model, conditioning=prompt)[0]


def edit_guider(
    model: Any,
    source: stock.Conditioning,
    target: stock.Conditioning,
    negative: stock.Conditioning | None = None,
    source_guidance: float = 1.0,
    target_guidance: float = 1.0,
    **widgets: Any,
) -> Any:
    """A GUIDER from the Source/Target Guider node."""
    prompts = {"source": source, "target": target, "negative": negative}
    guidances = dict(source_guidance=source_guidance, target_guidance=target_guidance)
    widgets = {"guidance_mode": "auto", **guidances, **widgets}
    return stock.call("PinpointSourceTargetGuider", model=model, **prompts, **widgets)[0]


def sample(
    model: Any,
    latent: Tensor,
    sampler: Any,
    *,
    sigmas: Tensor,
    prompt: stock.Conditioning | None = None,
    noise: Any = 0,
    guider: Any = None,
    noise_mask: Tensor | None = None,
) -> Tensor:
    """What SamplerCustomAdvanced returns.

    `prompt` is the target, seed 2 if not given; `noise` is a NOISE or a seed.
    """
    prompt = stock.conditioning(2) if prompt is None else prompt
    if isinstance(noise, int):
        noise = stock.call("RandomNoise", noise_seed=noise)[0]
    wired = {"samples": latent}
    if noise_mask is not None:
        wired["noise_mask"] = noise_mask
    return stock.call(
        "SamplerCustomAdvanced",
        noise=noise,
        guider=guider_for(model, prompt) if guider is None else guider,
        sampler=sampler,
        sigmas=sigmas,
        latent_image=wired,
    )[0]["samples"]


def euler() -> Any:
    """ComfyUI's own Euler sampler."""
    return stock.call("KSamplerSelect", sampler_name="euler")[0]


def velocity(model: Any, prompt: stock.Conditioning, x: Tensor, sigma: float) -> Tensor:
    """Unguided velocity by ComfyUI's own guider."""
    return stock.velocity(model, prompt, None, 1.0, x, sigma)


class Calls:
    """A clone of a model that notes the noise level and the latents of each of its calls."""

    def __init__(self, model: Any):
        self.sigmas: list[float] = []
        self.latents: list[Tensor] = []
        self.model = model.clone()
        self.model.add_wrapper_with_key("apply_model", "counter", self._note)

    def _note(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.sigmas.append(float(args[3]["sigmas"][0]))
        self.latents.append(x.clone())
        return executor(x, t, *args, **kwargs)


class Values:
    """Attention values of a model call, read and written without the pack's tap.

    An override of ComfyUI's attention function; attentions are numbered as they come.
    """

    def __init__(self, model: Any):
        self.model = model
        self.seen: list[Tensor] = []

    def read(self, prompt: stock.Conditioning, x: Tensor, sigma: float) -> list[Tensor]:
        """The values (B, heads, tokens, width) of all attentions in a call."""
        self.seen = []
        velocity(self.changed(lambda _number, values: values), prompt, x, sigma)
        return self.seen

    def changed(self, change: Change) -> Any:
        """A clone whose attention works with other values, in one call."""
        count = iter(range(10**6))

        def override(
            attention: Attention, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any
        ) -> Tensor:
            values = v
            if v.ndim == 3:
                values = v.unflatten(2, (kwargs.get("heads") or args[0], -1))
            if not kwargs.get("skip_reshape"):
                values = values.transpose(1, 2)
            self.seen.append(values.clone())
            values = change(next(count), values)
            if not kwargs.get("skip_reshape"):
                values = values.transpose(1, 2)
            return attention(q, k, values.reshape(v.shape), *args, **kwargs)

        clone = self.model.clone()
        clone.model_options["transformer_options"]["optimized_attention_override"] = override
        return clone


class PicturesValues(NamedTuple):
    """Where the picture's values are in a tiny model's calls."""

    attentions: tuple[int, ...]
    """Numbers of the attentions whose values are the picture's, as they come in a call."""
    image: slice
    """The picture's tokens in them."""
    mask: Tensor
    """A mask over these tokens."""


def values_of_picture(name: str, mask: Tensor, words: int = WORDS) -> PicturesValues:
    """What `mask`, one row at a latent's size, is for the values of a tiny model."""
    family, latent = FAMILY_OF[name], latent_for(name)
    cell = math.ceil(ROWS / family.grid[1])
    tokens = mask[:, None].unfold(2, cell, cell).unfold(3, cell, cell).mean((-2, -1)).flatten()
    if latent.ndim == 5:
        tokens = tokens.repeat(latent.shape[2])
    # SD3.5-medium's second attention of a block is not used.
    attentions = tuple(
        number + REFINERS.get(name, 0)
        for number, seen in enumerate(family.seen)
        if seen.endswith("joint") or ("layer" in seen and seen.endswith("self"))
    )
    start = words if family.start == WORDS else family.start
    return PicturesValues(attentions, slice(start, start + len(tokens)), tokens)


def inversion_graph(job: Inversion) -> tuple[NodeGraph, Wire]:
    """An inversion and the way back as a graph for the executor; the wire is the last latent."""
    graph = NodeGraph()
    wires = {name: graph.give(thing) for name, thing in job.wires().items()}
    inverted = graph.add("PinpointInvert", **wires, **job.widgets())
    guider = graph.add("BasicGuider", model=wires["model"], conditioning=wires["source"])
    widgets = dict(gamma=job.gamma, eta=0.0, eta_start=0.0, eta_end=1.0, eta_trend="constant")
    back = graph.add(
        "SamplerCustomAdvanced",
        noise=inverted.out(0),
        guider=guider,
        sampler=graph.add("PinpointFlowSolver", method=job.method, **widgets),
        sigmas=wires["sigmas"],
        latent_image=wires["latent"],
    )
    return graph, graph.keep(back)
