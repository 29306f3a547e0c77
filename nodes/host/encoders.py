"""Text encoders: where the tokens of a prompt lie in the CONDITIONING that is made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy import sd1_clip, sdxl_clip
from comfy.sd import CLIP
from comfy.text_encoders import flux, qwen_image, sd3_clip
from torch import nn

RowsOf = Callable[[nn.Module, dict[str, int], int], dict[str, range]]
"""(text encoder, counts of tokens, rows of the conditioning) -> in which rows each tokenizer's
tokens lie, from the first; those that come out before row 0 or after the last are cut off."""


def _own(model: nn.Module, counts: dict[str, int], _length: int) -> dict[str, range]:
    return {model.clip_name: range(counts[model.clip_name])}


def _cut(model: nn.Module, counts: dict[str, int], length: int) -> dict[str, range]:
    """The beginning of the template is cut off."""
    return {model.clip_name: range(length - counts[model.clip_name], length)}


def _sdxl(_model: nn.Module, counts: dict[str, int], _length: int) -> dict[str, range]:
    """Side by side; of a CLIP-L with more tokens than CLIP-G, the rest is cut off."""
    return dict.fromkeys("lg", range(min(counts["l"], counts["g"])))


def _sd3(model: nn.Module, counts: dict[str, int], _length: int) -> dict[str, range]:
    """CLIP-L and CLIP-G side by side, then T5; each of them may be absent."""
    clips = [key for key in "lg" if getattr(model, f"clip_{key}") is not None]
    start = min((counts[key] for key in clips), default=0)
    rows = dict.fromkeys(clips, range(start))
    if model.t5xxl is not None:
        rows["t5xxl"] = range(start, start + counts["t5xxl"])
    return rows


def _flux(_model: nn.Module, counts: dict[str, int], _length: int) -> dict[str, range]:
    """Of CLIP-L there is only the pooled output."""
    return {"t5xxl": range(counts["t5xxl"])}


TOKEN_ROWS: dict[type, RowsOf] = {
    sd1_clip.SD1ClipModel: _own,
    flux.Flux2TEModel: _own,
    sdxl_clip.SDXLClipModel: _sdxl,
    sd3_clip.SD3ClipModel: _sd3,
    flux.FluxClipModel: _flux,
    qwen_image.QwenImageTEModel: _cut,
}
"""By the class whose `encode_token_weights` makes the conditioning."""


def rows_of(model: nn.Module) -> RowsOf:
    """Where a text encoder's tokens lie.

    Raises:
        ValueError: a text encoder of an unknown kind.
    """
    # A subclass with a method of its own (Ovis, PixelDiT ...) lays tokens out in its own way.
    method = "encode_token_weights"
    kind = next((kind for kind in type(model).__mro__ if method in vars(kind)), type(model))
    if kind not in TOKEN_ROWS:
        raise ValueError(
            f"clip is {kind.__name__}, in which Pinpoint cannot find words: load the text encoder "
            "of SD1.5, SDXL, SD3, SD3.5, Flux, Flux.2, Chroma, Qwen-Image, Z-Image, Lumina 2 or Wan"
        )
    return TOKEN_ROWS[kind]


def token_rows(clip: CLIP, tokens: dict[str, Any], length: int) -> dict[str, range]:
    """In which rows of a conditioning of some length each tokenizer's tokens lie, see `RowsOf`.

    Raises:
        ValueError: a text encoder of an unknown kind, or one that does not keep to the table.
    """
    counts = {key: sum(map(len, sections)) for key, sections in tokens.items()}
    spans = rows_of(clip.cond_stage_model)(clip.cond_stage_model, counts, length)
    if max(span.stop for span in spans.values()) != length:
        raise ValueError(
            f"clip made {length} tokens where its tokenizer made {counts}: use a text encoder that "
            "no other node changed"
        )
    return spans


def part(owner: Any, key: str) -> Any:
    """A tokenizer or text encoder by its tokens' key: "l" is called clip_l, "t5xxl" just so."""
    return getattr(owner, f"clip_{key}", None) or getattr(owner, key, None)


def width(clip: CLIP, key: str) -> int | None:
    """How wide the vectors are that a text encoder takes, None if it is not loaded."""
    encoder = part(clip.cond_stage_model, key)
    if encoder is None:
        return None
    return encoder.transformer.get_input_embeddings().weight.shape[-1]


def fits(clip: CLIP, key: str, token: Any) -> bool:
    """Whether a token is no vector, or one of the width that its text encoder takes."""
    return not torch.is_tensor(token) or token.shape[-1] == width(clip, key)
