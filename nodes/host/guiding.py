"""A guider that knows two prompts, and the one model call that evaluates both."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import comfy.patcher_extension
import comfy.samplers
import node_helpers
import torch
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from torch import Tensor

from ...kernels import flow
from . import active_tokens, arguments, families, remembering, tap, values
from .active_tokens import ActiveSettings, ActiveTokens
from .branches import Branch, Options, guide, predict_apart, predict_together

log = logging.getLogger(__name__)

Conditioning = list[Any]
Conds = Sequence[list[dict] | None]
GuidanceMode = Literal["auto", "cfg", "embedded"]


pair_key = "pinpoint_pair"
"""In `model_options`: marks a call of the guider whose batch is [target rows, source rows]; True
if the source's do not depend on the edit."""
differing_key = "pinpoint_prompts_differ"
"""In `transformer_options`: set on a model to which the same two prompts are not the same."""
parts_key = "pinpoint_prompt_parts"
"""In `transformer_options`: uuids of the source's and of the target's positive conditionings, each
in their order."""


class SourceTargetGuider(comfy.samplers.CFGGuider):
    """Guidance for edits: the target prompt for any sampler, and both prompts for edit samplers.

    With a stock sampler it behaves as a CFG guider on the target prompt. Edit samplers call
    `velocities`, which evaluates target and source, conditional and unconditional, in one model
    call when shapes and memory allow.
    """

    def __init__(
        self,
        model: ModelPatcher,
        source: Conditioning,
        target: Conditioning,
        negative: Conditioning | None = None,
        source_guidance: float = 1.0,
        target_guidance: float = 1.0,
        mode: GuidanceMode = "auto",
        *,
        remembers: bool = False,
    ):
        """
        Args:
            model: a flow model.
            source, target: conditionings that describe the picture as it is and as it shall be.
            negative: for classifier-free guidance; not needed at guidance 1.
            source_guidance, target_guidance: guidance scales.
            mode: "cfg" for classifier-free guidance, "embedded" for models that take guidance as a
                number (Flux.1-dev), "auto" to choose by the model.
            remembers: whether what the model says of the source is kept for the next edit of the
                same picture. Both prompts are then asked apart, so that the answer is the same to
                the last bit whether the source is remembered or not.

        Raises:
            ValueError: not a flow model, or guidance other than 1 without a negative.
        """
        self.require_model(model)
        takes_guidance = families.has_embedded_guidance(model)
        if mode == "embedded" and not takes_guidance:
            raise ValueError(
                f"guidance_mode is embedded, but {families.name(model)} takes no guidance number: "
                "choose cfg or auto"
            )
        super().__init__(model)
        if takes_guidance and mode != "cfg":
            source = node_helpers.conditioning_set_values(source, {"guidance": source_guidance})
            target = node_helpers.conditioning_set_values(target, {"guidance": target_guidance})
            self.source_cfg = self.target_cfg = 1.0
        else:
            self.source_cfg, self.target_cfg = source_guidance, target_guidance
            _require_negative(negative, source_guidance, target_guidance)
        treated_alike = differing_key not in model.model_options["transformer_options"]
        same_guidance = source_guidance == target_guidance
        self.same_prompts = treated_alike and same_guidance and _equal(source, target)
        self.set_cfg(self.target_cfg)
        conds = {"positive": target, "source_positive": source}
        if negative is not None:
            conds["negative"] = negative
            conds["source_negative"] = node_helpers.conditioning_set_values(
                negative, {"prompt_type": "negative"}
            )
        self.inner_set_conds(conds)
        self._memory = remembering.memory_of(model)
        asked_of = (source, negative, self.source_cfg)
        self._asked_of = asked_of if remembers and remembering.has_content(asked_of) else None
        self._run: bytes | None = None

    def require_model(self, model: ModelPatcher) -> None:
        """Refuse models that this guider cannot guide.

        Raises:
            ValueError: not a flow model.
        """
        families.require_flow(model)

    def sample(self, noise: Tensor, latent_image: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As ComfyUI's, for a latent of the model's own space."""
        arguments.latent_samples(self.model_patcher, {"samples": latent_image})
        return super().sample(noise, latent_image, *args, **kwargs)

    def inner_sample(
        self,
        noise: Tensor,
        latent_image: Tensor,
        device: torch.device,
        sampler: comfy.samplers.Sampler,
        sigmas: Tensor,
        denoise_mask: Tensor | None,
        callback: Callable[..., None] | None,
        disable_pbar: bool,
        seed: int,
        latent_shapes: list[tuple[int, ...]] | None = None,
    ) -> Tensor:
        """As ComfyUI's, but what did not move keeps the bits it had on the LATENT wire.

        The way into the model's latent space and back costs a rounding error otherwise. The
        source's conditionings are prepared apart from the target's, because ComfyUI gives the areas
        and ControlNets of one conditioning to all that are prepared with it.
        """
        # ComfyUI does not shift an empty latent either.
        empty = not latent_image.any()
        clean = latent_image if empty else self.inner_model.process_latent_in(latent_image)
        source = {key: self.conds.pop(f"source_{key}") for key in self._source_keys()}
        self.source_conds = comfy.samplers.process_conds(
            self.inner_model,
            noise,
            source,
            device,
            clean,
            denoise_mask,
            seed,
            latent_shapes=latent_shapes,
        )
        self._evaluated_source = False
        if self._asked_of:
            # All that may be in prepared conditionings.
            given = (*self._asked_of, noise, clean, denoise_mask, sigmas, seed)
            self._run = remembering.digest(given)
        try:
            edited = super().inner_sample(
                noise,
                latent_image,
                device,
                sampler,
                sigmas,
                denoise_mask,
                callback,
                disable_pbar,
                seed,
                latent_shapes=latent_shapes,
            )
        finally:
            self._warn_of_unshared_values()
            # ComfyUI cleans up the ControlNets of all conditionings that are here.
            self.conds |= {f"source_{key}": conds for key, conds in self.source_conds.items()}
        if empty:
            return edited
        unmoved = self.inner_model.process_latent_out(clean.to(torch.float32))
        return torch.where(edited == unmoved, latent_image, edited)

    def _warn_of_unshared_values(self) -> None:
        warning = self.model_options["transformer_options"].get(values.sharing_key)
        if warning is not None and not self._evaluated_source:
            log.warning(warning)

    def _source_keys(self) -> list[str]:
        keys = [key for key in self.conds if key.startswith("source_")]
        return [key.removeprefix("source_") for key in keys]

    def velocities(
        self,
        target: Tensor,
        source: Tensor,
        sigma: float,
        extra_args: dict[str, Any],
        *,
        source_stays: bool = True,
        active: ActiveTokens | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Guided velocities of both prompts, each at its own latent.

        Args:
            target, source: latents at `sigma` in the model's space, same shape (B, C, ..., H, W).
            sigma: in (0, 1].
            extra_args: what ComfyUI hands to a sampler ("model_options", "seed").
            source_stays: whether another edit would ask the same of the source.
            active: the tokens of which the target's velocity is wanted.
        """
        options = create_model_options_clone(extra_args["model_options"])
        options[pair_key] = source_stays
        options[active_tokens.active_key] = active
        x = torch.cat([target, source])
        denoised = self(x, x.new_full((len(x),), sigma), options, extra_args.get("seed"))
        return flow.velocity(x, denoised, sigma).chunk(2)

    def draws_per_call(self, latent: Tensor, draws: int) -> int:
        """How many noised copies of a latent batch fit into memory at once, at least 1."""
        if draws == 1:
            return 1
        free = self.model_patcher.get_free_memory(latent.device)
        rows, *rest = latent.shape
        while draws > 1:
            if self.inner_model.memory_required([rows * draws, *rest]) * 1.5 < free:
                break
            draws = (draws + 1) // 2
        return draws

    def active_tokens(
        self, settings: ActiveSettings, mask: Tensor, rows: int, options: Options
    ) -> ActiveTokens | None:
        """The tokens of an edit that are calculated; None, with a warning, for all.

        Args:
            mask: (B or 1, 1, H, W) on the latent's grid, or a number if there is none.
            rows: of a prompt in a call's batch.
            options: `model_options` as the sampler gets them.
        """
        prompts = [*self.conds.values(), *self.source_conds.values()]
        rows *= 1 if self.source_cfg == 1.0 else 2
        reason = active_tokens.hindrance(
            self.model_patcher, options, prompts, self._can_share_a_call(options)
        )
        return active_tokens.planned(self.model_patcher, settings, mask, rows, reason)

    def target_velocity(self, x: Tensor, sigma: float, extra_args: dict[str, Any]) -> Tensor:
        """Guided velocity of the target prompt alone."""
        timestep = x.new_full((len(x),), sigma)
        denoised = self(x, timestep, extra_args["model_options"], extra_args.get("seed"))
        return flow.velocity(x, denoised, sigma)

    def predict_noise(
        self,
        x: Tensor,
        timestep: Tensor,
        model_options: Options = {},  # noqa: B006
        seed: int | None = None,
    ) -> Tensor:
        """Denoised latents; for a pair, those of [target rows, source rows]."""
        if pair_key not in model_options:
            return super().predict_noise(x, timestep, _with_sources(model_options, []), seed)
        self._evaluated_source = True
        own_keys = (pair_key, active_tokens.active_key)
        options = {key: value for key, value in model_options.items() if key not in own_keys}
        (target, source), sigma = x.chunk(2), timestep[: len(x) // 2]
        if self.same_prompts and torch.equal(target, source):
            alone = _with_sources(options, [])
            denoised = super().predict_noise(target, sigma, alone, seed)
            return torch.cat([denoised, denoised])
        branches = [
            self._branch(self.conds, target, sigma, self.target_cfg, options),
            self._branch(self.source_conds, source, sigma, self.source_cfg, options),
        ]
        active = model_options.get(active_tokens.active_key)
        remembers = model_options[pair_key] and self._remembers(options)
        if remembers or active is not None:
            return self._predict_in_turn(branches, sigma, options, active, remembers=remembers)
        options = _with_sources(options, branches[1].conds, branches[0].conds)
        predicted = predict_together if self._can_share_a_call(options) else predict_apart
        outputs = predicted(self.inner_model, branches, sigma, options)
        # The target last: samplers with CFG++ keep what they saw last.
        guided = [
            guide(self.inner_model, branch, output, sigma, options)
            for branch, output in zip(branches[::-1], outputs[::-1], strict=True)
        ]
        return torch.cat(guided[::-1])

    def _remembers(self, options: Options) -> bool:
        return self._run is not None and remembering.is_repeatable(options)

    def _predict_in_turn(
        self,
        branches: list[Branch],
        sigma: Tensor,
        options: Options,
        active: ActiveTokens | None,
        *,
        remembers: bool,
    ) -> Tensor:
        """Both branches, each asked alone, the source only if its answer is not known."""
        target, source = branches
        key = remembering.digest([self._run, source.x, sigma]) if remembers else b""
        known = self._memory.get(key) if remembers else None
        # What has to be evaluated anyway can be taken anew.
        is_due = active is not None and (active.is_due or not remembers)
        if known is None or is_due:
            asked = _with_sources(options, source.conds)
            asked = active.recorded(asked) if active is not None and is_due else asked
            answer = self._predict_alone(source, sigma, asked)
            if known is None and remembers:
                self._memory.keep(key, answer)
            known = answer if known is None else known
        asked = _with_sources(options, [], target.conds)
        asked = asked if active is None else active.applied(asked)
        own = self._predict_alone(target, sigma, asked)
        return torch.cat([own, known.to(own)])

    def _predict_alone(self, branch: Branch, sigma: Tensor, options: Options) -> Tensor:
        predicted = predict_together if self._can_share_a_call(options) else predict_apart
        (outputs,) = predicted(self.inner_model, [branch], sigma, options)
        return guide(self.inner_model, branch, outputs, sigma, options)

    def _branch(
        self, conds: dict[str, list[dict]], x: Tensor, sigma: Tensor, cfg: float, options: Options
    ) -> Branch:
        unguided = math.isclose(cfg, 1.0) and not options.get("disable_cfg1_optimization", False)
        negative = None if unguided else conds.get("negative")
        return Branch(x, conds["positive"], negative, cfg)

    def _can_share_a_call(self, options: dict[str, Any]) -> bool:
        """Whether rows may be exchanged inside one call.

        Areas crop the latent, ControlNets and CALC_COND_BATCH wrappers read it before we can
        exchange rows, hooks give each prompt a call of its own, and the listed options slice or
        distribute the batch themselves.
        """
        if {"context_handler", "multigpu_clones", "sampler_calc_cond_batch_function"} & set(
            options
        ):
            return False
        wrappers = comfy.patcher_extension.WrappersMP.CALC_COND_BATCH
        if comfy.patcher_extension.get_all_wrappers(wrappers, options, is_model_options=True):
            return False
        if values.sharing_key in options["transformer_options"]:
            # ComfyUI would run prompts of another length first, before there are source values.
            lengths = [_text_shape(c["positive"]) for c in (self.conds, self.source_conds)]
            if lengths[0] != lengths[1]:
                return False
        prepared = [*self.conds.values(), *self.source_conds.values()]
        entries = [entry for conds in prepared for entry in conds]
        return not any({"area", "control", "hooks"} & entry.keys() for entry in entries)


def _with_sources(options: Options, sources: Conds, targets: Conds = ()) -> Options:
    """Options that tell attention handlers which conditionings are the source's."""
    inner = dict(options["transformer_options"])
    inner[tap.source_key] = frozenset(_uuids(sources))
    if values.sharing_key in inner:
        # Hooks of guidance may evaluate the target once more, as perturbed attention does.
        hooks = (f"sampler_{name}_function" for name in ("pre_cfg", "cfg", "post_cfg"))
        asked_again = any(options.get(hook) for hook in hooks)
        inner[values.shared_key] = values.SharedValues(_uuids(targets), asked_again)
        inner[parts_key] = [_uuids(conds[:1]) for conds in (sources, targets)]
    return {**options, "transformer_options": inner}


def _uuids(conds: Conds) -> list[Any]:
    return [c["uuid"] for entries in conds for c in entries or ()]


def _text_shape(conds: list[dict]) -> list[torch.Size]:
    texts = [entry["model_conds"].get("c_crossattn") for entry in conds]
    return [text.cond.shape for text in texts if text is not None]


def _require_negative(
    negative: Conditioning | None, source_guidance: float, target_guidance: float
) -> None:
    if negative is None and not (source_guidance == target_guidance == 1.0):
        raise ValueError(
            f"negative is not connected, but source guidance is {source_guidance:g} and target "
            f"guidance {target_guidance:g}: connect a negative prompt (empty text will do) or set "
            "both guidances to 1"
        )


def _equal(a: Any, b: Any) -> bool:
    """Structural equality of conditionings: same numbers in the same places."""
    if torch.is_tensor(a) or torch.is_tensor(b):
        return (
            torch.is_tensor(a) and torch.is_tensor(b) and a.shape == b.shape and torch.equal(a, b)
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a is b or a == b
