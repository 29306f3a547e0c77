"""Prompts at latents of their own, and the model calls that evaluate them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from comfy.model_base import BaseModel
from torch import Tensor

Options = dict[str, Any]


@dataclass
class Branch:
    """One prompt at one latent: its conditionings (negative None = not needed) and scale."""

    x: Tensor
    positive: list[dict]
    negative: list[dict] | None
    cfg: float

    @property
    def conds(self) -> list[list[dict] | None]:
        return [self.positive, self.negative]


def predict_together(
    model: BaseModel, branches: list[Branch], sigma: Tensor, options: Options
) -> list[list[Tensor]]:
    """All branches in one call: ComfyUI batches the conditionings, we exchange the latents.

    The exchange happens outside of every other wrapper of the model call, so that each sees the
    rows as the model will. `cond_or_uncond` is mapped back to 0 and 1, the values that patches of
    other packs know.
    """
    latents = {c["uuid"]: b.x for b in branches for conds in b.conds for c in conds or ()}
    inner: Callable | None = options.get("model_function_wrapper")

    def exchange_rows(apply_model: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        c = dict(args["c"])
        uuids = c["transformer_options"]["uuids"]
        kinds = [index % 2 for index in args["cond_or_uncond"]]
        c["transformer_options"] = {**c["transformer_options"], "cond_or_uncond": kinds}
        rows = torch.cat([latents[uuid] for uuid in uuids])
        args = {**args, "input": rows, "c": c, "cond_or_uncond": kinds}
        if inner is not None:
            return inner(apply_model, args)
        return apply_model(args["input"], args["timestep"], **c)

    paired = {**options, "model_function_wrapper": exchange_rows}
    conds = [cond for branch in branches for cond in branch.conds]
    out = comfy.samplers.calc_cond_batch(model, conds, branches[0].x, sigma, paired)
    return [out[first : first + 2] for first in range(0, len(out), 2)]


def predict_apart(
    model: BaseModel, branches: list[Branch], sigma: Tensor, options: Options
) -> list[list[Tensor]]:
    """One call for each branch, as the stock guider makes it; the source, which comes last in the
    list, first, because the target may need what it leaves behind.
    """
    custom = options.get("sampler_calc_cond_batch_function")
    if custom is None:
        outputs = [
            comfy.samplers.calc_cond_batch(model, b.conds, b.x, sigma, options)
            for b in branches[::-1]
        ]
    else:
        shared = {"sigma": sigma, "model": model, "model_options": options}
        outputs = [custom({"conds": b.conds, "input": b.x, **shared}) for b in branches[::-1]]
    return outputs[::-1]


def guide(
    model: BaseModel, branch: Branch, out: list[Tensor], sigma: Tensor, options: Options
) -> Tensor:
    """Classifier-free guidance with the pre- and post-CFG hooks of other packs."""
    args = {"conds": branch.conds, "cond_scale": branch.cfg, "timestep": sigma, "sigma": sigma}
    for hook in options.get("sampler_pre_cfg_function", []):
        out = hook(
            {**args, "conds_out": out, "input": branch.x, "model": model, "model_options": options}
        )
    return comfy.samplers.cfg_function(
        model,
        out[0],
        out[1],
        branch.cfg,
        branch.x,
        sigma,
        model_options=options,
        cond=branch.positive,
        uncond=branch.negative,
    )
