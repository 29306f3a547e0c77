"""ComfyUI's tokenizers and text encoders, small enough to be made in a moment.

Only the networks in them are replaced by ones whose every row depends on its own token alone, so
that a word's rows are those that change with it. Needs `inprocess.start`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

CLIPS = ("sd15", "sdxl", "refiner", "sd3", "sd3_clips", "sd3_l")
# In these, rows begin with their token's number.
READABLE = ("sd3_t5", "flux", "chroma", "flux2", "klein", "qwen_image", "z_image", "lumina2", "wan")
TINY_CLIP = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "projection_dim": 64,
}

Encoder = Callable[..., Any]


class TokenRows(nn.Module):
    """Embeddings without a table."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.1, 3, width)[None])

    def forward(self, ids: Tensor, out_dtype: torch.dtype) -> Tensor:
        """(B, tokens) -> (B, tokens, width), a token's number first."""
        rows = torch.sin(ids[..., None] * self.weight[0].double())
        rows[..., 0] = ids
        return rows.to(out_dtype)


class ContextFree(nn.Module):
    """Stands for a language model: whichever layers are asked for, its output is its input."""

    num_layers = 99

    def __init__(self, config: dict[str, Any], *_args: Any) -> None:
        super().__init__()
        # SD3 sets T5's rows under CLIP's, which it makes 4096 wide.
        self.rows = TokenRows(4096 if "t5" in config.get("model_type", "") else 8)

    def get_input_embeddings(self) -> TokenRows:
        """As ComfyUI's networks."""
        return self.rows

    def forward(self, *_args: Any, embeds: Tensor, intermediate_output: Any, **_kw: Any) -> Any:
        """As ComfyUI's networks."""
        if isinstance(intermediate_output, list):
            return embeds, torch.stack([embeds] * len(intermediate_output), 1)
        return embeds, embeds


def byte_tokenizer(_data: Any) -> dict[str, Any]:
    """As Flux.2's, whose 131072 tokens are in its text encoder's file, but with the bytes only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"]
    names = ["<unk>", "<s>", "</s>", *letters]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return {"tokenizer_object": tokenizer}


def parts_of(name: str) -> tuple[Any, Any]:
    """Classes of a text encoder and its tokenizer, as ComfyUI's CLIP loaders choose them."""
    from comfy import sd1_clip, sdxl_clip
    from comfy.text_encoders import flux, lumina2, pixart_t5, qwen_image, sd3_clip, wan, z_image

    sd3 = {
        "sd3": {},
        "sd3_clips": {"t5": False},
        "sd3_t5": {"clip_l": False, "clip_g": False},
        "sd3_l": {"clip_g": False, "t5": False},
    }
    if name in sd3:
        return sd3_clip.sd3_clip(**sd3[name]), sd3_clip.SD3Tokenizer
    return {
        "sd15": (sd1_clip.SD1ClipModel, sd1_clip.SD1Tokenizer),
        "sdxl": (sdxl_clip.SDXLClipModel, sdxl_clip.SDXLTokenizer),
        "refiner": (sdxl_clip.SDXLRefinerClipModel, sdxl_clip.SDXLTokenizer),
        "flux": (flux.flux_clip(), flux.FluxTokenizer),
        "chroma": (pixart_t5.pixart_te(), pixart_t5.PixArtTokenizer),
        "flux2": (flux.flux2_te(), flux.Flux2Tokenizer),
        "klein": (flux.klein_te(), flux.KleinTokenizer),
        "qwen_image": (qwen_image.te(), qwen_image.QwenImageTokenizer),
        "z_image": (z_image.te(), z_image.ZImageTokenizer),
        "lumina2": (lumina2.te(), lumina2.LuminaTokenizer),
        "wan": (wan.te(), wan.WanT5Tokenizer),
    }[name]


def without_context(model: nn.Module) -> None:
    """Random weights for CLIP, in which nothing passes from one token to another."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "text_model" in name:
            mixes = "out_proj" in name or "fc2" in name
            weight.data = torch.randn(weight.shape, generator=generator) * (not mixes)


@contextmanager
def encoders() -> Iterator[Encoder]:
    """A function that makes one of ComfyUI's text encoders, small and free of context."""
    import comfy.sd
    from comfy.text_encoders import flux, llama, t5

    # Byte pieces as in Gemma's and UMT5's, whose files hold 256000 pieces.
    pieces = Path(t5.__file__).parent / "t5_pile_tokenizer" / "tokenizer.model"
    data = torch.frombuffer(bytearray(pieces.read_bytes()), dtype=torch.uint8)

    @cache
    def make(name: str, embeddings: str | None = None, **tokenizer_data: Any) -> Any:
        model, tokenizer = parts_of(name)
        clip = comfy.sd.CLIP(
            SimpleNamespace(clip=model, tokenizer=tokenizer, params={}),
            embedding_directory=embeddings,
            tokenizer_data={"spiece_model": data, **tokenizer_data},
            model_options={
                f"{key}_model_config": {
                    **TINY_CLIP,
                    "max_position_embeddings": tokenizer_data.get(f"{key}_max_length", 77),
                }
                for key in ("clip_l", "clip_g")
            },
        )
        without_context(clip.cond_stage_model)
        return clip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t5, "T5", ContextFree)
        for network in ("Mistral3Small24B", "Qwen3_4B", "Qwen25_7BVLI", "Gemma2_2B"):
            patch.setattr(llama, network, ContextFree)
        patch.setattr(flux, "load_mistral_tokenizer", byte_tokenizer)
        yield make
