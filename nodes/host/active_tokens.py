"""Edits that cost what they change: of the target, only tokens inside the mask are calculated.

Outside of the mask an edit's target is the source, noised alike. So the target's tokens there need
no calculation of their own: attention sees the keys and values that the source has in the same
block. In the first block the tokens inside the mask are taken out, all blocks run on them and on
the prompt, and the last block puts them back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...kernels import tokens as picking
from . import families, layouts, remembering
from .branches import Options
from .layouts import Block

log = logging.getLogger(__name__)

active_key = "pinpoint_active_tokens"
"""In `model_options`: the `ActiveTokens` of a pair's call."""
largest_share = 0.8
"""Of the picture's tokens; with more of them active, less is saved than what is kept costs."""
_more_tokens = {"ref_latents": "reference pictures", "attention_mask": "an attention mask"}
_parts = {"area", "mask", "control", "hooks", "timestep_start", "timestep_end"}
"""Of a prepared conditioning, by which it is not there at every place or step."""


@dataclass(frozen=True)
class ActiveSettings:
    """What is calculated of the target.

    Attributes:
        refresh: steps from one evaluation of the source, from which outside tokens are taken, to
            the next, at least 1, where the source is remembered.
        halo: tokens around the mask that are calculated too.
    """

    refresh: int
    halo: int


class ActiveTokens:
    """Which tokens of one edit are calculated, and what the others are to them.

    Args:
        model: see `hindrance`.
        mask: (B or 1, 1, H, W) on the latent's grid; where it is above 0 for any row, all rows are
            calculated.
    """

    def __init__(self, model: ModelPatcher, settings: ActiveSettings, mask: Tensor):
        self.settings = settings
        self.blocks = layouts.blocks_of(model)
        grid = layouts.grid_of(model, tuple(mask.shape))
        inside = picking.touched(mask[:, 0], grid[1:], settings.halo)
        self.index = inside.nonzero()[:, 0]
        self.outside = (~inside).nonzero()[:, 0]
        self.kept: dict[tuple, tuple[Tensor, Tensor]] = {}
        self.step, self.part = 0, 0

    @property
    def share(self) -> float:
        """Of the picture's tokens that are calculated."""
        return len(self.index) / (len(self.index) + len(self.outside))

    @property
    def is_due(self) -> bool:
        """Whether the source has to be evaluated at this step, even if its answer is known."""
        return self.step % self.settings.refresh == 0

    def cost(self, model: ModelPatcher, rows: int) -> int:
        """Bytes of the keys and values that are kept.

        Args:
            rows: of the batch that the source is evaluated in.
        """
        widths = list(layouts.attention_widths(model).values())
        width = sum(widths) + _second_attentions(model) * widths[0]
        return 2 * rows * width * len(self.outside) * model.model.get_dtype_inference().itemsize

    def recorded(self, options: Options) -> Options:
        """Options of a full call whose outside keys and values are kept."""
        return self._in_blocks(options, _Call(self, is_full=True))

    def applied(self, options: Options) -> Options:
        """Options of a call that calculates the active tokens only."""
        return self._in_blocks(options, _Call(self, is_full=False))

    def _in_blocks(self, options: Options, call: _Call) -> Options:
        inner = options["transformer_options"]
        replaced = inner.get("patches_replace", {})
        blocks = {
            ("single_block" if block.kind == "single" else "double_block", block.index): _Replaced(
                call, block, is_first=block == self.blocks[0], is_last=block == self.blocks[-1]
            )
            for block in self.blocks
        }
        return {
            **options,
            "transformer_options": {**inner, "patches_replace": {**replaced, "dit": blocks}},
        }


@dataclass
class _Call:
    """What the blocks of one call of the network share."""

    tokens: ActiveTokens
    is_full: bool
    text: int = 0
    positions: Tensor | None = None
    """Of prompt and active tokens, (B, 1, L, ...), where a family gives them to its blocks."""

    def begin(self, args: dict[str, Any]) -> dict[str, Any]:
        """Take the active tokens out of the picture, in front of the first block."""
        index, self.text = self.tokens.index, args["txt"].shape[1]
        if args.get("pe") is not None:
            words = torch.arange(self.text, device=index.device)
            self.positions = args["pe"].index_select(2, torch.cat([words, index + self.text]))
        return {**args, "img": picking.gathered(args["img"], index)}

    def end(self, out: dict[str, Any], joined: bool) -> dict[str, Any]:
        """Put the active tokens back, behind the last block. Nobody looks at the others."""
        text = self.text if joined else 0
        words, active = out["img"].split([text, out["img"].shape[1] - text], 1)
        count = len(self.tokens.index) + len(self.tokens.outside)
        nothing = active.new_zeros(len(active), count, active.shape[2])
        whole = picking.scattered(active, nothing, self.tokens.index)
        return {**out, "img": torch.cat([words, whole], 1) if text else whole}


@dataclass(frozen=True)
class _Replaced:
    """Runs a block on active tokens, or on all while it keeps those outside."""

    call: _Call
    block: Block
    is_first: bool
    is_last: bool

    def __call__(self, args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        call, options = self.call, args["transformer_options"]
        attending = _Attending(call, self.block, options["cond_or_uncond"])
        options = {**options, "optimized_attention_override": attending}
        args = {**args, "transformer_options": options}
        if call.is_full:
            return extra["original_block"](args)
        if self.is_first:
            args = call.begin(args)
        if call.positions is not None:
            args["pe"] = call.positions
        out = extra["original_block"](args)
        return call.end(out, self.block.kind == "single") if self.is_last else out


class _Attending:
    """The attention of one block: keeps what is outside, or lets it be seen."""

    def __init__(self, call: _Call, block: Block, kinds: Iterable[int]):
        self.call, self.block, self.kinds = call, block, list(kinds)
        self.turn = 0

    def __call__(
        self,
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        skip_reshape: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        # SD3.5 medium has a second attention of the picture to itself.
        turn, self.turn = self.turn, self.turn + 1
        along = 2 if skip_reshape else 1
        if self.call.is_full:
            self._keep(turn, k, v, along)
        else:
            k, v = self._joined(turn, k, v, along)
        return func(q, k, v, heads, skip_reshape=skip_reshape, **kwargs)

    def _key(self, turn: int, kind: int) -> tuple:
        return (self.call.tokens.part, self.block, turn, kind)

    def _keep(self, turn: int, k: Tensor, v: Tensor, along: int) -> None:
        tokens = self.call.tokens
        words = k.shape[along] - len(tokens.index) - len(tokens.outside)
        outside = tokens.outside + words
        parts = [t.index_select(along, outside).chunk(len(self.kinds)) for t in (k, v)]
        for kind, *pair in zip(self.kinds, *parts, strict=True):
            tokens.kept[self._key(turn, kind)] = (pair[0], pair[1])

    def _joined(self, turn: int, k: Tensor, v: Tensor, along: int) -> tuple[Tensor, Tensor]:
        kept = self.call.tokens.kept
        # A guided target can have a negative prompt where the unguided source has none.
        keys = (self._key(turn, kind) for kind in self.kinds)
        pairs = [kept[key] if key in kept else kept[self._key(turn, 0)] for key in keys]
        outside = [torch.cat(parts) for parts in zip(*pairs, strict=True)]
        return torch.cat([k, outside[0]], along), torch.cat([v, outside[1]], along)


def planned(
    model: ModelPatcher, settings: ActiveSettings, mask: Tensor, rows: int, reason: str | None
) -> ActiveTokens | None:
    """The active tokens of an edit, or None and a warning that says why there are none.

    With an empty mask there is no edit, and no warning here.

    Args:
        mask: see `ActiveTokens`; a number if there is none.
        rows: of the batch that the source is evaluated in.
        reason: what is known to stand against them, see `hindrance`.
    """
    if reason is None and mask.ndim == 0:
        reason = "there is no mask: connect one"
    if reason is None:
        found = ActiveTokens(model, settings, mask)
        if not len(found.index):
            return None
        cost, free = found.cost(model, rows), model.get_free_memory(mask.device)
        kept = f"{cost / 2**20:.0f} MB"
        if found.share > largest_share:
            reason = f"the mask takes {found.share:.0%} of the picture's tokens"
        elif cost > free / 2:
            reason = f"it would keep {kept}, and {free / 2**20:.0f} MB are free"
        else:
            log.info(f"Pinpoint: {found.share:.0%} of all tokens are calculated, and {kept} kept")
            return found
    log.warning(f"Pinpoint: active_tokens is on, but the whole picture is calculated: {reason}")
    return None


def hindrance(
    model: ModelPatcher, options: Options, conds: Sequence[list[dict]], shares_calls: bool
) -> str | None:
    """Why the tokens of an edit cannot be calculated apart; None if they can.

    Args:
        options: `model_options` as the sampler gets them.
        conds: prepared conditionings of each prompt.
        shares_calls: whether rows of several prompts may be in one call.
    """
    if not isinstance(model.model.diffusion_model, Flux | MMDiT):
        return f"the model is {families.name(model)}; it works with SD3, SD3.5 and Flux"
    others = _hooks_of_others(model, options)
    if others:
        return f"other nodes change the model or its sampling ({', '.join(others)})"
    entries = [entry for prompt in conds for entry in prompt]
    found = {key for entry in entries for key in entry["model_conds"]}
    named = [what for key, what in _more_tokens.items() if key in found]
    if named:
        return f"the prompts bring {named[0]}"
    if not shares_calls or any(_parts & entry.keys() for entry in entries):
        return "the prompts have areas, ControlNets, hooks or parts of the steps"
    if any(len(prompt) > 1 for prompt in conds):
        return "prompts are combined"
    return None


def _hooks_of_others(model: ModelPatcher, options: Options) -> list[str]:
    inner = options["transformer_options"]
    found = [name for name in remembering.hooks if options.get(name)]
    found += ["optimized_attention_override"] if "optimized_attention_override" in inner else []
    found += [str(name) for name, given in inner.get("patches", {}).items() if given]
    found += [str(name) for name, given in inner.get("patches_replace", {}).items() if given]
    for wrappers in (options.get("wrappers", {}), inner.get("wrappers", {})):
        found += [
            str(key or kind) for kind, kinds in wrappers.items() for key in kinds if kinds[key]
        ]
    found += [key for key in model.object_patches if key.startswith("diffusion_model")]
    found += [str(key) for key, given in model.injections.items() if given]
    return sorted(set(found))


def _second_attentions(model: ModelPatcher) -> int:
    """Blocks whose picture attends to itself once more, as in SD3.5 medium."""
    blocks = getattr(model.model.diffusion_model, "joint_blocks", ())
    return sum(block.x_block.x_block_self_attn for block in blocks)
