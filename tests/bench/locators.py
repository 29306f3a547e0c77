"""Masks for the benches: from attention, from velocities, and the true ones."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import edits
from bench.edits import Case
from bench.lab import Lab
from portraits import dataset
from portraits.judging import intersection_over_union

token, cell = 16, 8
"""Pixels along one of the demo models' image tokens, and along a cell of their latents."""
least_share = 0.05
"""A token or cell belongs to a mask when the mask holds this much of it."""


def overlap(mask: Tensor, truth: Tensor, side: int) -> Tensor:
    """IoU (B,) of two pixel masks (B, H, W), both on a grid of squares of `side` pixels."""
    a, b = ((F.avg_pool2d(m[:, None], side) >= least_share).float()[:, 0] for m in (mask, truth))
    return intersection_over_union(a, b)


def true_masks(_lab: Lab, _model: Any, case: Case) -> tuple[Tensor, None]:
    """The exact mask on the latent grid, and no located region to judge."""
    return edits.cells(case.truth), None


def velocity_masks(lab: Lab, model: Any, case: Case) -> tuple[Tensor, Tensor]:
    """Velocity Mask's soft and hard mask."""
    return edits.velocity_masks(lab, model, case)


def attention_heats(lab: Lab, model: Any, case: Case, **settings: Any) -> list[Tensor]:
    """Heat of the added and of the removed phrase, each (B, rows, columns) of image tokens.

    By the functions of Attention Mask: the node takes one prompt, here each picture of a batch has
    its own. `node_masks` is compared with the result by the bench.
    """
    located, layouts = _module(lab, "attention_map"), _module(lab, "layouts")
    widgets = {**node_defaults(lab), **settings}
    gathering = located.GatherSettings(
        layouts.chosen_blocks(model, widgets["blocks"]),
        located.chosen_heads(widgets["heads"]),
        widgets["highest_noise"],
        widgets["lowest_noise"],
        widgets["samples"],
        widgets["propagation"],
        case.seed,
    )
    heats = []
    low, high = widgets["clip_low"] / 100, widgets["clip_high"] / 100
    for turn, name in enumerate(("target", "source")):
        columns = torch.stack([phrase_columns(lab, edit, turn) for edit in case.edits])
        prompt, latent = case.prompts[name], case.latent["samples"]
        maps = located.gathered(model, prompt, columns, latent, gathering)
        heats.append(located.phrase_heat(maps, low, high, widgets["contrast"])[:, 0])
    return heats


def shaped_masks(
    lab: Lab, case: Case, heats: list[Tensor], **settings: Any
) -> tuple[Tensor, Tensor]:
    """Soft and hard mask of `attention_heats`, at the pictures' size."""
    widgets = {**node_defaults(lab), **settings}
    names = ("threshold", "softness", "smallest_part", "dilation", "soft_edge")
    shape = _module(lab, "attention_map").MaskShape(*(widgets[name] for name in names))
    cells = case.latent["samples"].shape[-2:]
    union = torch.stack([shape.cleaned(heat, cells) for heat in heats]).amax(0)
    size = case.source.shape[-2:]
    soft, hard = (
        F.interpolate(mask[:, None], size, mode="nearest-exact")[:, 0]
        for mask in (shape.soft(union), shape.hard(union))
    )
    return soft, hard


def attention_masks(lab: Lab, model: Any, case: Case) -> tuple[Tensor, Tensor]:
    """Attention Mask's soft mask as a person finds the node, and the region before it is grown."""
    heats = attention_heats(lab, model, case)
    soft, _ = shaped_masks(lab, case, heats)
    return soft, shaped_masks(lab, case, heats, dilation=0)[1]


def node_masks(lab: Lab, case: Case, index: int) -> tuple[Tensor, Tensor]:
    """What the node itself finds for one edit of a case."""
    edit: dataset.Edit = case.edits[index]
    widgets = node_defaults(lab)
    soft, hard, *_ = lab.run(
        "PinpointAttentionMask",
        **{
            **widgets,
            "model": lab.model,
            "clip": lab.clip,
            "latent": {"samples": case.latent["samples"][index : index + 1]},
            "source_prompt": edit.prompts[0],
            "target_prompt": edit.prompts[1],
            "seed": case.seed,
        },
    )
    return soft, hard


def node_defaults(lab: Lab) -> dict[str, Any]:
    """The widgets of Attention Mask as a person finds them."""
    node: Any = lab.host.nodes["PinpointAttentionMask"]
    inputs = node.define_schema().inputs
    return {w.id: w.default for w in inputs if getattr(w, "default", None) is not None}


def _module(lab: Lab, name: str) -> Any:
    return sys.modules[f"{lab.host.pack.__name__}.nodes.host.{name}"]


class _Tokenizer:
    """A CLIP that only tokenizes: the positions of words do not need its network."""

    def __init__(self, clip: Any, length: int):
        self._clip, self._length = clip, length

    def __getattr__(self, name: str) -> Any:
        return getattr(self._clip, name)

    def encode_from_tokens_scheduled(self, _tokens: Any) -> list:
        """As long as the real one's, and empty."""
        return [[torch.zeros(1, self._length, 1), {}]]


def phrase_columns(lab: Lab, edit: dataset.Edit, turn: int) -> Tensor:
    """(77, 2): tokens of an edit's phrase in the target (turn 0) or source caption, and the rest's.

    The phrase is the one that Attention Mask chooses when none is named.
    """
    located, phrases = _module(lab, "attention_map"), _module(lab, "phrases")
    request = located.requests_for(*edit.prompts, "", "")[turn]
    (phrase,) = request.wanted
    clip = _Tokenizer(lab.clip, 77)
    encoded = phrases.encode_with_positions(clip, request.text, [phrase], request.prompt_name)
    return located.phrase_columns(encoded, [phrase])
