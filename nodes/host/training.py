"""A model that can be trained, a copy that autograd accepts, and the "sampler" that trains it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
import torch.nn.functional as F
from comfy.ldm.chroma.model import Chroma
from comfy.ldm.flux.model import Flux
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.ldm.wan.model import WanModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.weight_adapter.base import WeightAdapterTrainBase
from comfy.weight_adapter.bypass import BypassInjectionManager
from torch import Tensor, nn

from ...kernels import identity as losses
from . import checkpointing, families
from .learning_settings import Weighting

log = logging.getLogger(__name__)

injection_key, checkpoint_key = "pinpoint_low_rank", "pinpoint_checkpointing"
loaded_key, whole_key = "pinpoint_loaded", "pinpoint_loaded_whole"

_flux = r"double_blocks\.\d+\.(img|txt)_attn\.(qkv|proj)|single_blocks\.\d+\.linear[12]"
TARGETS: dict[type[nn.Module], str] = {
    UNetModel: r".*\.attn2\.to_(q|k|v|out\.0)",
    WanModel: r"blocks\.\d+\.cross_attn\.(q|k|v|o)",
    MMDiT: r"joint_blocks\.\d+\.(context|x)_block\.attn2?\.(qkv|proj)",
    Flux: _flux,
    Chroma: _flux,
    QwenImageTransformer2DModel: r"transformer_blocks\.\d+\.attn\.(to_|add_)\w+(\.0)?",
    NextDiT: r"layers\.\d+\.attention\.(qkv|out)",
}
"""The linear layers of each network through which picture and prompt attend to each other."""


class LowRank(WeightAdapterTrainBase):
    """A change of a linear layer by the product of two thin matrices (LoRA, Hu et al., 2021).

    It starts as no change at all.
    """

    def __init__(self, layer: nn.Module, rank: int, generator: torch.Generator):
        super().__init__()
        # Weights of quantised layers may be packed, and have another shape.
        inputs, outputs = layer.in_features, layer.out_features
        bound = inputs**-0.5
        down = torch.rand(rank, inputs, generator=generator) * (2 * bound) - bound
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        self.is_on = True

    def h(self, x: Tensor, base_out: Tensor) -> Tensor:
        """What is added to the layer's output; ComfyUI's interface."""
        if not self.is_on:
            return base_out.new_zeros(())
        return F.linear(F.linear(x, self.down.to(x)), self.up.to(base_out))

    @classmethod
    def of(cls, layer: nn.Module, up: Tensor, down: Tensor, alpha: Tensor | None) -> LowRank:
        """A change that was learned before, by the parts of a LoRA."""
        change = cls(layer, len(down), torch.Generator())
        scale = 1.0 if alpha is None else float(alpha) / len(down)
        change.up.data, change.down.data = up.float() * scale, down.float().clone()
        return change

    def weights(self, name: str) -> dict[str, Tensor]:
        """By ComfyUI's LoRA names, fp32 on the CPU."""
        rank = torch.tensor(float(len(self.down)))
        parts = {"lora_up.weight": self.up, "lora_down.weight": self.down, "alpha": rank}
        return {f"{name}.{part}": t.detach().float().cpu().clone() for part, t in parts.items()}


@dataclass(frozen=True)
class Trainee:
    """A model in training.

    Attributes:
        model: a copy with weights of its own.
        source: what it was copied from. A clone of the copy, when it is forgotten, would take the
            changes out of it.
        changes: the low-rank changes by the names of their layers, "diffusion_model.<module>".
    """

    model: ModelPatcher
    source: ModelPatcher
    changes: dict[str, LowRank]

    def parameters(self) -> list[nn.Parameter]:
        """All that can be learned in it."""
        return [p for change in self.changes.values() for p in change.parameters()]

    def learn(self, is_learning: bool) -> None:
        """Whether the changes are learned. What is not, and still empty, is not calculated."""
        for change in self.changes.values():
            change.requires_grad_(is_learning)
            change.is_on = is_learning or bool(change.up.any())

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """While this is open, the model is as it was before the training; without gradients."""
        before = [(change, change.is_on) for change in self.changes.values()]
        for change, _ in before:
            change.is_on = False
        try:
            with torch.no_grad():
                yield
        finally:
            for change, is_on in before:
                change.is_on = is_on

    @property
    def rank(self) -> int:
        """Of the changes; 0 if there are none."""
        return max((len(change.down) for change in self.changes.values()), default=0)

    def lora(self) -> dict[str, Tensor]:
        """What was learned, as a LoRA."""
        return {k: t for name, c in self.changes.items() for k, t in c.weights(name).items()}


class LastGood:
    """What was learned when the loss was a number for the last time."""

    def __init__(self, learned: list[nn.Parameter]):
        self._learned = learned
        self._copies = [parameter.detach().clone() for parameter in learned]

    def keep(self) -> None:
        """This is good."""
        for copy, parameter in zip(self._copies, self._learned, strict=True):
            copy.copy_(parameter.detach())

    def is_finite(self) -> bool:
        """Whether what is learned now is numbers."""
        return all(bool(parameter.isfinite().all()) for parameter in self._learned)

    def restore(self) -> None:
        """Go back."""
        with torch.no_grad():
            for copy, parameter in zip(self._copies, self._learned, strict=True):
                parameter.copy_(copy)


class TrainingSampler(comfy.samplers.Sampler):
    """A "sampler" that trains: ComfyUI prepares model and conditionings as for any other.

    Attributes:
        inner_model: the model in training, while it runs.
    """

    inner_model: Any
    _options: dict[str, Any]

    def train(self) -> None:
        """Make all steps."""
        raise NotImplementedError

    def run_on(self, model: ModelPatcher, prompt: list[Any], latent: Tensor, seed: int) -> None:
        """Have ComfyUI prepare a model, and train.

        Args:
            prompt: a conditioning such as will be learned from.
            latent: (1, C, [T,] H, W), such as will be learned from.
        """
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": prompt})
        sigmas = torch.tensor([1.0, 0.0])
        guider.sample(torch.zeros_like(latent), latent, self, sigmas, seed=seed)

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
        self.inner_model, self._options = model_wrap.inner_model, extra_args["model_options"]
        self.train()
        return latent_image

    def _sigmas(self, uniform: Tensor, weighting: Weighting) -> Tensor:
        """(B,) noise levels for as many numbers in (0, 1), of which 0 is the picture."""
        levels = losses.logit_normal(uniform) if weighting == "logit-normal" else uniform
        sampling = self.inner_model.model_sampling
        return torch.tensor([float(sampling.percent_to_sigma(1 - x)) for x in levels.tolist()])

    def _call(self, prompt: list[Any], x: Tensor, sigma: Tensor, options: dict[str, Any]) -> Tensor:
        """What the model makes of noised latents, (B, C, [T,] H, W).

        Args:
            prompt: a conditioning with one row for all, or one for each.
            x: (B, C, [T,] H, W).
            sigma: (B,).
            options: the model's, in place of those that ComfyUI prepared.
        """
        like = x[: len(prompt[0][0])]
        conds = {"positive": comfy.sampler_helpers.convert_cond(prompt)}
        conds = comfy.samplers.process_conds(self.inner_model, like, conds, x.device, like)
        given = [conds["positive"]]
        return comfy.samplers.calc_cond_batch(self.inner_model, given, x, sigma, options)[0]


def load_again(model: ModelPatcher) -> None:
    """Bring a model back after a text encoder may have taken its place on the device."""
    if not comfy.model_management.is_device_cpu(model.load_device):
        load(model)


@contextmanager
def in_training(
    model: ModelPatcher,
    rank: int,
    seed: int,
    precision: torch.dtype | None = None,
    *,
    saves_memory: bool = False,
    lora: Mapping[str, Tensor] | None = None,
) -> Iterator[Trainee]:
    """A model with low-rank changes, loaded, for the time of a training.

    Inference mode ends and gradients are recorded while this is open.

    Args:
        rank: of the changes; 0 = none.
        precision: in which it computes; None = as it comes.
        saves_memory: whether its blocks are computed twice instead of kept.
        lora: changes that were learned before and are learned on, whatever the rank.

    Raises:
        ValueError: a family of which the layers to change are not known, changes of other layers,
            or a model that cannot be loaded again.
    """
    with torch.inference_mode(False), torch.enable_grad():
        trained = own_copy(model, "model")
        changes = _low_rank(trained, rank, seed, lora or {}) if rank or lora else {}
        if precision is not None:
            trained.set_model_compute_dtype(precision)
        manager = BypassInjectionManager()
        for name, change in changes.items():
            manager.add_adapter(name, change)
        trained.set_injections(injection_key, manager.create_injections(trained.model))
        if saves_memory:
            blocks = checkpointing.blocks_of(trained.model.diffusion_model)
            trained.set_injections(checkpoint_key, [checkpointing.checkpointed(blocks)])
        trained.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, whole_key, _loaded_whole)
        before = comfy.model_management.in_training
        comfy.model_management.in_training = True
        try:
            load(trained)
            yield Trainee(trained, model, changes)
        finally:
            comfy.model_management.in_training = before
            trained.eject_model()


def load(model: ModelPatcher) -> None:
    """Put a model to be trained where it computes, and leave all the room to its gradients."""
    with torch.no_grad():
        comfy.model_management.load_models_gpu([model], memory_required=1e20, force_full_load=True)


def _loaded_whole(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Guiders load a part of a model where memory is scarce, and autograd needs the whole."""
    return executor(*args, **{**kwargs, "force_full_load": True})


def require_loadable(patcher: ModelPatcher, name: str) -> None:
    """Refuse what cannot be loaded a second time.

    Raises:
        ValueError: it comes from such a loader.
    """
    if patcher.cached_patcher_init is None:
        raise ValueError(
            f"{name} comes from a loader that cannot load it a second time, which learning needs: "
            "use Load Checkpoint, Load Diffusion Model or Load CLIP"
        )


def own_copy(patcher: ModelPatcher, name: str) -> ModelPatcher:
    """A clone with weights of its own, loaded again from the file, through which gradients flow.

    ComfyUI loads weights in inference mode, and autograd refuses to keep those. To be called
    outside of it.

    Args:
        name: of the input that it came from, for errors.

    Raises:
        ValueError: it comes from a loader that cannot load it again.
    """
    require_loadable(patcher, name)
    load, inputs, *place = patcher.cached_patcher_init
    loaded = load(*inputs, disable_dynamic=True)
    if place:
        loaded = loaded[place[0]]
    # With dynamic VRAM, the clone would move its weights about while gradients need them.
    copy = patcher.clone(disable_dynamic=True, model_override=loaded.get_clone_model_override())
    # Some loaders load to the device at once: were this patcher forgotten, ComfyUI would take the
    # copy's model for a leak and collect garbage before every call.
    copy.set_attachments(loaded_key, loaded)
    copy.model.requires_grad_(False)
    for key in list(copy.injections):
        log.warning(f"Pinpoint: {key} belongs to the original {name} and is left out of learning")
        copy.remove_injections(key)
    return copy


def _low_rank(
    model: ModelPatcher, rank: int, seed: int, lora: Mapping[str, Tensor]
) -> dict[str, LowRank]:
    network = model.model.diffusion_model
    pattern = next((p for kind, p in TARGETS.items() if isinstance(network, kind)), None)
    if pattern is None:
        raise ValueError(
            f"model is {families.name(model)}, of which Pinpoint does not know the layers to "
            "change: set steps to 0, which learns a word only, or load SD1.5, SDXL, SD3, Flux, "
            "Chroma, Qwen-Image, Z-Image, Lumina 2 or Wan"
        )
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for name, module in network.named_modules():
        # A quantised checkpoint's linear layers are of a class of ComfyUI's own.
        if not hasattr(module, "in_features") or not re.fullmatch(pattern, name):
            continue
        key = f"diffusion_model.{name}"
        up, down = (lora.get(f"{key}.lora_{side}.weight") for side in ("up", "down"))
        if up is not None and down is not None:
            if (len(up), down.shape[1]) != (module.out_features, module.in_features):
                continue
            changes[key] = LowRank.of(module, up, down, lora.get(f"{key}.alpha"))
        elif rank:
            changes[key] = LowRank(module, rank, generator)
    strange = {key.rsplit(".lora_up", 1)[0] for key in lora if ".lora_up" in key} - changes.keys()
    if strange:
        raise ValueError(
            f"identity changes {min(strange)}, which cannot be learned on in this model: load the "
            "model that it was learned with, or disconnect it"
        )
    if not changes:
        raise ValueError(
            f"model is {families.name(model)}, but none of its layers are those that Pinpoint "
            "changes: load it with Load Checkpoint or Load Diffusion Model, or set steps to 0, "
            "which learns a word only"
        )
    return changes
