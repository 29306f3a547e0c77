"""The attention tap: one hook through which everything here reads or changes attention.

A wrapper of the model call sets `optimized_attention_override`, which every supported model calls,
for this one call. What it calls in turn is what other packs left there, before or after. A
`ModelCall` says which latents, prompts and noise level the attention belongs to. Nothing is counted
across calls, so that split batches, context windows, skipped calls and extra passes of other packs
cannot confuse it.

Compiled models run uncompiled while they are tapped: slower, never stale.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from . import families
from .layouts import Block, Layout, Place, Shape, layout_of

wrapper_key = "pinpoint_attention_tap"
source_key = "pinpoint_source_uuids"
"""In `transformer_options`: uuids of the conditionings that describe the picture as it is."""
inside_key = "pinpoint_inside_replacement"
"""In `transformer_options`: the taps that have already handled a replaced attention as a whole."""


@dataclass
class ModelCall:
    """One call of the model, as the tap's handlers see it.

    Attributes:
        latent: shape of its latents, (B, C, [T,] H, W); B counts all branches.
        branches: one entry for each conditioning in the batch: (uuid, index), index 0 is the
            positive and 1 the negative prompt. Their rows lie one branch after the other.
        text: the prompt's tokens as the model is given them, (B, L, width), or None.
        sigma: noise level as the sampler counts it.
        window: the frames of a context window, or None.
        sampling: the model's `model_sampling`.
        options: the model call's `transformer_options`.
    """

    latent: tuple[int, ...]
    branches: list[tuple[Any, int]]
    text: Tensor | None
    sigma: float
    window: tuple[int, ...] | None
    options: dict[str, Any]
    sampling: Any = None

    @property
    def text_length(self) -> int | None:
        """Tokens of the prompt."""
        return None if self.text is None else self.text.shape[1]

    @cached_property
    def progress(self) -> float:
        """How far its noise level lies from the first (0) to the picture (1)."""
        return families.progress(self.sampling, self.sigma)

    @property
    def sources(self) -> frozenset[Any]:
        """Uuids of the source prompts, when a Source/Target Guider evaluates both."""
        return self.options.get(source_key, frozenset())

    @property
    def rows(self) -> int:
        """Rows of one branch."""
        return self.latent[0] // max(1, len(self.branches))

    def rows_of(self, chosen: Callable[[Any, int], bool]) -> list[slice]:
        """The rows of the branches for which `chosen(uuid, index)` holds."""
        rows = self.rows
        return [
            slice(i * rows, (i + 1) * rows)
            for i, branch in enumerate(self.branches)
            if chosen(*branch)
        ]


@dataclass(frozen=True)
class Attention:
    """One attention call. `q`, `k`, `v` are (B, heads, tokens, width) after RoPE and norms."""

    call: ModelCall
    place: Place
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float
    """What the products of queries and keys are multiplied by."""


Proceed = Callable[[Attention], Tensor]
Handler = Callable[[Attention, Proceed], Tensor]
"""Gets an attention and what runs it; returns the result, (B, tokens, heads * width)."""


def tapped(
    model: ModelPatcher, handler: Handler, *, innermost: bool = False, replaced: bool = False
) -> ModelPatcher:
    """A clone of a model whose attention goes through a handler; the newest handler is outermost.

    Args:
        innermost: put this one inside of all others instead, where it sees what they leave.
        replaced: let it handle also what other packs put in place of a UNet's cross-attention, as
            IP-Adapter packs do. They are given queries, keys and values, but no mask.

    Raises:
        ValueError: a family whose attention is not known.
    """
    tap = wrapper_of(model, handler, replaced=replaced)
    clone = model.clone()
    others = clone.get_wrappers(WrappersMP.APPLY_MODEL, wrapper_key) if innermost else []
    if others:
        clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, wrapper_key)
    for each in (tap, *others):
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, wrapper_key, each)
    return clone


def wrapper_of(
    model: ModelPatcher, handler: Handler, *, replaced: bool = False
) -> Callable[..., Tensor]:
    """What puts a handler around the attention of one call of a model; see `tapped`."""
    return _Tap(handler, layout_of(model), model.model.diffusion_model, replaced)


@dataclass(frozen=True)
class _Tap:
    """A wrapper of the model call that puts a handler around its attention."""

    handler: Handler
    layout: Layout
    network: nn.Module
    replaced: bool

    def __call__(
        self,
        executor: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006
        **kwargs: Any,
    ) -> Tensor:
        sampling = executor.class_obj.model_sampling  # type: ignore[attr-defined]
        call = _model_call(x, t, c_crossattn, transformer_options, sampling)
        override = _Override(self, call, {"c_crossattn": c_crossattn, **kwargs})
        options = {**transformer_options, "optimized_attention_override": override}
        if not self.layout.indexed:
            _name_blocks(options, self.layout.blocks(self.network))
        if self.replaced:
            override.surround_replacements(options)
        with _uncompiled():
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def _model_call(
    x: Tensor, t: Tensor, text: Tensor | None, options: dict[str, Any], sampling: Any
) -> ModelCall:
    kinds = options.get("cond_or_uncond") or [0]
    uuids = options.get("uuids") or [None] * len(kinds)
    window = options.get("context_window")
    sigmas = options.get("sigmas")
    return ModelCall(
        latent=tuple(x.shape),
        branches=list(zip(uuids, kinds, strict=True)),
        text=text,
        sigma=float((t if sigmas is None else sigmas).flatten()[0]),
        window=None if window is None else tuple(window.index_list),
        options=options,
        sampling=sampling,
    )


def _uncompiled() -> AbstractContextManager[Any]:
    """While this is open, compiled models run as they are written.

    ComfyUI lets compiled code forget what `transformer_options` it was made for, so that a model
    that ran without a tap would ignore one, and a model that ran with one would go on using it.
    """
    # PyTorch 2.5 has no such switch, but there ComfyUI does not compile.
    stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if stance is None else stance("force_eager")


class _Override:
    """What ComfyUI calls in place of its attention function during one model call."""

    def __init__(self, tap: _Tap, call: ModelCall, given: dict[str, Any]):
        self.tap, self.call, self.given = tap, call, given
        self.previous = call.options.get("optimized_attention_override")
        self.turns: Counter = Counter()

    def as_now(self) -> _Override:
        """One that goes on counting from here by itself."""
        override = copy(self)
        override.turns = Counter(self.turns)
        if isinstance(self.previous, _Override):
            override.previous = self.previous.as_now()
        return override

    def __call__(
        self,
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        shared = {"attn_precision": attn_precision, "skip_reshape": skip_reshape, **kwargs}

        def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, flat: bool) -> Tensor:
            options = {**shared, "mask": mask, "skip_output_reshape": not flat}
            if self.previous is not None:
                return self.previous(func, q, k, v, heads, **options)
            return func(q, k, v, heads, **options)

        options = kwargs.get("transformer_options") or {}
        is_inside = any(tap is self.tap for tap in options.get(inside_key, ()))
        place = None if is_inside else self._place(q, k, options, skip_reshape)
        if place is None:
            return run(q, k, v, mask, not skip_output_reshape)

        def proceed(attention: Attention) -> Tensor:
            given = (attention.q, attention.k, attention.v)
            if not skip_reshape:
                given = tuple(t.transpose(1, 2).flatten(2) for t in given)
            return run(*given, attention.mask, True)

        width = q.shape[-1] if skip_reshape else q.shape[-1] // heads
        if not skip_reshape:
            q, k, v = (_in_heads(t, width) for t in (q, k, v))
        scale = kwargs.get("scale") or 1 / math.sqrt(width)
        out = self.tap.handler(Attention(self.call, place, q, k, v, mask, scale), proceed)
        return out.unflatten(2, (heads, -1)).transpose(1, 2) if skip_output_reshape else out

    def surround_replacements(self, options: dict[str, Any]) -> None:
        """Put the handler around what stands in place of cross-attentions in a call's options."""
        replaced = options.get("patches_replace", {})
        if others := replaced.get("attn2"):
            surrounded = {key: partial(self._surround, other) for key, other in others.items()}
            options["patches_replace"] = {**replaced, "attn2": surrounded}

    def _surround(
        self, other: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """Handle a replaced attention as one; what it calls inside is not handled again."""
        inside = {**options, inside_key: (*options.get(inside_key, ()), self.tap)}
        place = self._place(q, k, options, False)
        if place is None:
            return other(q, k, v, options)

        def proceed(attention: Attention) -> Tensor:
            given = (t.transpose(1, 2).flatten(2) for t in (attention.q, attention.k, attention.v))
            return other(*given, inside)

        width = q.shape[-1] // options["n_heads"]
        q, k, v = (_in_heads(t, width) for t in (q, k, v))
        attention = Attention(self.call, place, q, k, v, None, 1 / math.sqrt(width))
        return self.tap.handler(attention, proceed)

    def _place(
        self, q: Tensor, k: Tensor, options: dict[str, Any], skip_reshape: bool
    ) -> Place | None:
        length = 2 if skip_reshape else 1
        names = ("block", "block_type", "block_index")
        turn = tuple(options.get(name) for name in names)
        shape = Shape(
            queries=q.shape[length],
            keys=k.shape[length],
            options=options,
            latent=self.call.latent,
            given=self.given,
            turn=self.turns[turn],
        )
        self.turns[turn] += 1
        return self.tap.layout.place(self.tap.network, shape)


def _in_heads(tokens: Tensor, width: int) -> Tensor:
    """To (B, heads, tokens, width); SD3's values have their heads already."""
    return tokens.reshape(*tokens.shape[:2], -1, width).transpose(1, 2)


def as_now(options: dict[str, Any]) -> dict[str, Any]:
    """A copy of a model call's `transformer_options`, for a block that is computed again later."""
    kept, override = dict(options), options.get("optimized_attention_override")
    if isinstance(override, _Override):
        kept["optimized_attention_override"] = override.as_now()
    return kept


def _name_blocks(options: dict[str, Any], blocks: list[Block]) -> None:
    """Let an SD3 transformer say which block runs, as other families do."""
    replaced = options.get("patches_replace", {})
    named = dict(replaced.get("dit", {}))
    for block in blocks:
        key = ("double_block", block.index)
        named[key] = _NamedBlock(block, named.get(key))
    options["patches_replace"] = {**replaced, "dit": named}


class _NamedBlock:
    """Runs a block, or what replaces it, with its name in the options."""

    def __init__(self, block: Block, previous: Callable | None):
        self.block, self.previous = block, previous

    def __call__(self, args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        names = {"block_type": self.block.kind, "block_index": self.block.index}
        args = {**args, "transformer_options": {**args["transformer_options"], **names}}
        if self.previous is not None:
            return self.previous(args, extra)
        return extra["original_block"](args)


def observing(look: Callable[[Attention], None]) -> Handler:
    """A handler that looks at an attention and changes nothing."""

    def handler(attention: Attention, proceed: Proceed) -> Tensor:
        look(attention)
        return proceed(attention)

    return handler


def changing(change: Callable[[Attention], Tensor | None]) -> Handler:
    """A handler that may return other values (B, heads, tokens, width) for an attention."""

    def handler(attention: Attention, proceed: Proceed) -> Tensor:
        values = change(attention)
        return proceed(attention if values is None else replace(attention, v=values))

    return handler
