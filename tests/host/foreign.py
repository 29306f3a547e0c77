"""What other packs do to a model and to a prompt: one small example for every hook ComfyUI has.

Each changes the result, tells conditional from unconditional rows, and depends on the latent that
it is shown, so that a hook that sees the wrong rows gives the wrong numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import tiny

from . import stock

Model = Any
Hook = Callable[..., Any]
Arguments = dict[str, Any]

FACTOR = {0: 1.1, 1: 0.8}
"""By what a hook scales conditional (0) and unconditional (1) rows; it knows no other index."""


def scaled(rows: Tensor, kinds: list[int]) -> Tensor:
    """Scale each chunk of a batch by the factor of its kind."""
    chunks = rows.chunk(len(kinds))
    return torch.cat([chunk * FACTOR[kind] for chunk, kind in zip(chunks, kinds, strict=True)])


def options_in(args: tuple[Any, ...]) -> dict[str, Any]:
    """The transformer options among a model call's arguments, whose order models differ in."""
    return next(arg for arg in args if isinstance(arg, dict) and "cond_or_uncond" in arg)


def lora_weights() -> dict[str, Tensor]:
    """A LoRA of rank 4 on the first attention of the tiny SD3 and Flux."""
    generator = torch.Generator().manual_seed(4)
    names = ("joint_blocks.0.x_block.attn.qkv", "double_blocks.0.img_attn.qkv")
    shapes = {"up": (3 * tiny.hidden, 4), "down": (4, tiny.hidden)}
    return {
        f"diffusion_model.{name}.lora_{half}.weight": torch.randn(shape, generator=generator) * 0.3
        for name in names
        for half, shape in shapes.items()
    }


def lora(model: Model) -> Model:
    """A LoRA for the whole model."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, lora_weights(), 0.5, 0)[0]


def model_function_wrapper(model: Model) -> Model:
    """The oldest hook: around every call of the model."""

    def wrapper(apply_model: Hook, args: Arguments) -> Tensor:
        assert args["c"]["transformer_options"]["cond_or_uncond"] == args["cond_or_uncond"]
        out = apply_model(args["input"], args["timestep"], **args["c"])
        return scaled(out, args["cond_or_uncond"]) + 0.1 * args["input"]

    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model


def attention_override(model: Model) -> Model:
    """Around every attention."""

    def override(attention: Hook, q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = attention(q, *args, **kwargs)
        return scaled(out, kwargs["transformer_options"]["cond_or_uncond"])

    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


def wrapper(kind: str) -> Callable[[Model], Model]:
    """A hook that adds one of the wrappers of `comfy.patcher_extension`."""

    def apply_model(executor: Hook, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return scaled(executor(x, *args, **kwargs), options_in(args)["cond_or_uncond"]) + 0.1 * x

    def diffusion_model(executor: Hook, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return scaled(executor(x, *args, **kwargs), options_in(args)["cond_or_uncond"]) + 0.1 * x

    def calc_cond_batch(
        executor: Hook, model: Any, conds: list, x: Tensor, *args: Any
    ) -> list[Tensor]:
        return [0.9 * out + 0.1 * x for out in executor(model, conds, x, *args)]

    def predict_noise(executor: Hook, x: Tensor, *args: Any) -> Tensor:
        return 0.9 * executor(x, *args) + 0.1 * x.sin()

    wrappers = {
        "apply_model": apply_model,
        "diffusion_model": diffusion_model,
        "calc_cond_batch": calc_cond_batch,
        "predict_noise": predict_noise,
    }

    def install(model: Model) -> Model:
        model = model.clone()
        model.add_wrapper_with_key(kind, "another pack", wrappers[kind])
        return model

    return install


def cfg_function(model: Model) -> Model:
    """In place of classifier-free guidance."""

    def guide(args: Arguments) -> Tensor:
        difference = args["cond"] - args["uncond"]
        return args["uncond"] + 0.7 * args["cond_scale"] * difference + 0.1 * args["input"]

    model = model.clone()
    model.set_model_sampler_cfg_function(guide)
    return model


def before_cfg(model: Model) -> Model:
    """Between the model and classifier-free guidance."""

    def change(args: Arguments) -> list[Tensor]:
        cond, uncond = args["conds_out"]
        return [1.1 * cond + 0.1 * args["input"], 0.8 * uncond]

    model = model.clone()
    model.set_model_sampler_pre_cfg_function(change)
    return model


def after_cfg(model: Model) -> Model:
    """After classifier-free guidance, with a model call of its own, as attention guidance has."""
    import comfy.samplers

    def change(args: Arguments) -> Tensor:
        own = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], args["input"], args["sigma"], args["model_options"]
        )[0]
        return args["denoised"] + 0.3 * (args["cond_denoised"] - own.sin()) + 0.1 * args["input"]

    model = model.clone()
    model.set_model_sampler_post_cfg_function(change)
    return model


def cond_batch_function(model: Model) -> Model:
    """In place of the model calls of a step."""
    import comfy.samplers

    def evaluate(args: Arguments) -> list[Tensor]:
        outs = comfy.samplers.calc_cond_batch(
            args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
        )
        return [0.9 * out + 0.1 * args["input"] for out in outs]

    model = model.clone()
    model.model_options["sampler_calc_cond_batch_function"] = evaluate
    return model


def node(class_type: str, **widgets: Any) -> Callable[[Model], Model]:
    """A hook that one of ComfyUI's own nodes installs."""
    return lambda model: stock.call(class_type, model=model, **widgets)[0]


HOOKS: dict[str, Callable[[Model], Model]] = {
    "LoRA": lora,
    "model_function_wrapper": model_function_wrapper,
    "optimized_attention_override": attention_override,
    "APPLY_MODEL": wrapper("apply_model"),
    "DIFFUSION_MODEL": wrapper("diffusion_model"),
    "CALC_COND_BATCH": wrapper("calc_cond_batch"),
    "PREDICT_NOISE": wrapper("predict_noise"),
    "sampler_cfg_function": cfg_function,
    "pre-CFG": before_cfg,
    "post-CFG": after_cfg,
    "sampler_calc_cond_batch_function": cond_batch_function,
    "Skip Layer Guidance": node(
        "SkipLayerGuidanceDiT",
        double_layers="0",
        single_layers="0",
        scale=2.0,
        start_percent=0.0,
        end_percent=1.0,
        rescaling_scale=0.0,
    ),
    "RescaleCFG": node("RescaleCFG", multiplier=0.7),
    "CFG-Zero*": node("CFGZeroStar"),
    "Tangential CFG": node("TCFG"),
    "CFGNorm": node("CFGNorm", strength=1.0),
}


def control() -> Any:
    """A ControlNet that adds what it computes from the latent to the picture's hidden state."""
    from comfy.controlnet import ControlBase

    direction = torch.linspace(-1, 1, tiny.hidden)

    class Control(ControlBase):
        def get_control(self, x_noisy: Tensor, t: Tensor, *_: Any) -> dict[str, list[Tensor]]:
            tokens = -(-x_noisy.shape[-2] // 2) * -(-x_noisy.shape[-1] // 2)
            strength = t.view(-1) / t.max() + x_noisy.flatten(1).mean(1)
            hint = (strength[:, None, None] * direction).expand(-1, tokens, -1)
            return {"input": [hint], "output": [hint], "middle": []}

    return Control()


def other(prompt: stock.Conditioning) -> stock.Conditioning:
    """A second prompt to combine with a first one."""
    return stock.with_values(stock.conditioning(77), **prompt[0][1])


def with_control(prompt: stock.Conditioning) -> stock.Conditioning:
    """The prompt with a ControlNet."""
    return stock.with_values(prompt, control=control())


def in_area(prompt: stock.Conditioning) -> stock.Conditioning:
    """Another prompt for a part of the picture."""
    part = stock.call(
        "ConditioningSetArea",
        conditioning=other(prompt),
        **dict(width=32, height=48, x=16, y=8, strength=0.8),
    )[0]
    return [*prompt, *part]


def in_mask(prompt: stock.Conditioning) -> stock.Conditioning:
    """Another prompt inside a soft mask."""
    mask = torch.linspace(0, 1, 64).view(1, 1, -1).expand(1, 64, -1)
    part = stock.call(
        "ConditioningSetMask",
        conditioning=other(prompt),
        **dict(mask=mask, strength=0.9, set_cond_area="default"),
    )[0]
    return [*stock.with_values(prompt, strength=0.5), *part]


def in_late_steps(prompt: stock.Conditioning) -> stock.Conditioning:
    """Another prompt that takes over when the schedule has begun."""
    early, late = (
        stock.call("ConditioningSetTimestepRange", conditioning=part, start=start, end=end)[0]
        for part, start, end in ((prompt, 0.0, 0.05), (other(prompt), 0.05, 1.0))
    )
    return [*early, *late]


def with_lora(prompt: stock.Conditioning) -> stock.Conditioning:
    """The prompt with a LoRA of its own, as a hook."""
    import comfy.hooks

    return stock.with_values(prompt, hooks=comfy.hooks.create_hook_lora(lora_weights(), 0.5, 0))


PROMPTS: dict[str, Callable[[stock.Conditioning], stock.Conditioning]] = {
    "ControlNet": with_control,
    "area": in_area,
    "mask": in_mask,
    "timestep range": in_late_steps,
    "hook LoRA": with_lora,
}
