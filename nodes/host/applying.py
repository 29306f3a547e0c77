"""An identity put into a model and its text encoder."""

from __future__ import annotations

from typing import Any

import comfy.lora
import comfy.utils
import comfy.weight_adapter
from comfy.hooks import HookGroup, create_hook_lora
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import PatcherInjection
from comfy.quant_ops import QuantizedTensor
from comfy.sd import CLIP
from torch import Tensor

from . import arguments, confining, encoders, families, progress, words
from .identity import Identity, require_name

bypass_key = "bypass_lora"
"""Of the injections that ComfyUI's own bypass LoRA loader makes."""


def applied(
    model: ModelPatcher,
    clip: CLIP,
    identity: Identity,
    strength: float = 1.0,
    mask: Tensor | None = None,
    name: str = "",
) -> tuple[ModelPatcher, CLIP]:
    """Clones of a model and its text encoder that know an identity.

    Args:
        strength: of the change of the model's weights; at 0 they are untouched.
        mask: (B or 1, H, W), the identity's word acts inside only.
        name: in prompts, in place of the identity's own.

    Raises:
        ValueError: an identity of another model family or text encoder, a name that is taken, a
            mask that cannot be used, or no text encoder.
    """
    if clip is None:
        raise ValueError("clip is empty, as the checkpoint has no text encoder: use Load CLIP")
    require_family(model, identity)
    name = name_in_prompts(identity, name)
    if name.casefold() in words.known_words(clip):
        raise ValueError(
            f"identity is called <{name}>, and the clip knows another of that name: write another "
            "in name"
        )
    model = _with_lora(model, identity, strength)
    require_fitting(clip, identity)
    if identity.vectors:
        clip = words.with_words(clip, {name: identity.vectors})
    if mask is not None:
        model = _confined(model, clip, name, mask)
    return model, clip


def name_in_prompts(identity: Identity, name: str) -> str:
    """What an identity is called: by its own name, if no other is given.

    Raises:
        ValueError: a name that cannot stand in a prompt.
    """
    return require_name(name) if name.strip() else identity.name


def _confined(model: ModelPatcher, clip: CLIP, name: str, mask: Tensor) -> ModelPatcher:
    arguments.require_finite_mask(mask)
    encoders.rows_of(clip.cond_stage_model)
    if name.casefold() not in words.known_words(clip):
        raise ValueError(
            f"mask is connected, but identity <{name}> has no learned word whose attention could "
            "be confined: disconnect it"
        )
    if not mask.any():
        progress.warn(f"the mask of <{name}> is empty, so the picture never looks at it")
    return confining.confined(model, name, mask)


def require_family(model: ModelPatcher, identity: Identity) -> None:
    """Refuse an identity of another model family."""
    if identity.family != families.name(model):
        raise ValueError(
            f"identity <{identity.name}> was learned with {identity.family}, the model is "
            f"{families.name(model)}: load the model that it was learned with"
        )


def require_fitting(clip: CLIP, identity: Identity) -> None:
    """Refuse vectors that no text encoder takes, and tell of text encoders that have none."""
    if not identity.vectors:
        return
    widths = {key: encoders.width(clip, key) for key in clip.tokenize("")}
    loaded = {key: width for key, width in widths.items() if width is not None}
    wrong = {
        key: vectors.shape[-1]
        for key, vectors in identity.vectors.items()
        if loaded.get(key, vectors.shape[-1]) != vectors.shape[-1]
    }
    if wrong or not loaded.keys() & identity.vectors.keys():
        learned = {key: vectors.shape[-1] for key, vectors in identity.vectors.items()}
        raise ValueError(
            f"identity <{identity.name}> was learned with the text encoders {_told(learned)}, the "
            f"clip has {_told(loaded)}: load the text encoders that it was learned with"
        )
    missing = loaded.keys() - identity.vectors.keys()
    if missing:
        progress.warn(
            f"<{identity.name}> was learned without {', '.join(sorted(missing))}, which reads "
            "prompts as if it were not there"
        )


def _told(widths: dict[str, int]) -> str:
    return ", ".join(f"{key} ({width} wide)" for key, width in sorted(widths.items()))


def _with_lora(model: ModelPatcher, identity: Identity, strength: float) -> ModelPatcher:
    clone = model.clone()
    if not identity.lora or strength == 0:
        return clone
    patches = _patches(model, identity)
    if _is_quantised(model, patches):
        _bypass(clone, patches, strength)
    else:
        clone.add_patches(patches, strength)
    return clone


def hooks(model: ModelPatcher, identity: Identity, strength: float) -> HookGroup:
    """An identity's change of a model for chosen conditionings alone, as ComfyUI's hook.

    Raises:
        ValueError: an identity of another model or without a change of it, or quantised weights,
            which ComfyUI's hooks would round.
    """
    require_family(model, identity)
    if not identity.lora:
        raise ValueError(
            f"identity <{identity.name}> is a word alone and changes nothing of the model: use "
            "Apply Identity"
        )
    if _is_quantised(model, _patches(model, identity)):
        raise ValueError(
            "model has quantised weights, in which hooks would round the change away: use the "
            "strength of Apply Identity"
        )
    return create_hook_lora(dict(identity.lora), strength, 0.0)


def _patches(model: ModelPatcher, identity: Identity) -> dict[str, Any]:
    """The change by the names of the model's weights, all of which it has in fitting sizes."""
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(dict(identity.lora), names, log_missing=False)
    modules = {key.removesuffix(".lora_up.weight") for key in identity.lora if "lora_up" in key}
    fitting = 0
    for key, patch in patches.items():
        up, down = patch.weights[:2]
        weight = _weight(model, key)
        fitting += weight.shape[0] == up.shape[0] and weight[0].numel() == down[0].numel()
    if fitting != len(modules):
        raise ValueError(
            f"identity <{identity.name}> changes {len(modules)} weights, of which the model has "
            f"{fitting}: load the model that it was learned with"
        )
    return patches


def _is_quantised(model: ModelPatcher, patches: dict[str, Any]) -> bool:
    return any(isinstance(_weight(model, key), QuantizedTensor) for key in patches)


def _weight(model: ModelPatcher, key: str) -> Tensor:
    return comfy.utils.get_attr(model.model, key)


def _bypass(model: ModelPatcher, patches: dict[str, Any], strength: float) -> None:
    """Add what the patches do to the layers' outputs, as quantised weights would round it away.

    Earlier injections of ComfyUI's own loader and of other identities stay. Each replaces the
    layers' forward and puts back what it found, so the last one in has to be the first one out.
    """
    manager = comfy.weight_adapter.BypassInjectionManager()
    for key, adapter in patches.items():
        manager.add_adapter(key, adapter, strength=strength)
    earlier = model.get_injections(bypass_key) or []
    stacked = [*earlier, *manager.create_injections(model.model)]

    def inject(patcher: ModelPatcher) -> None:
        for injection in stacked:
            injection.inject(patcher)

    def eject(patcher: ModelPatcher) -> None:
        for injection in reversed(stacked):
            injection.eject(patcher)

    model.set_injections(bypass_key, [PatcherInjection(inject=inject, eject=eject)])
