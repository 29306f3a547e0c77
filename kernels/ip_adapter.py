"""The image projections of public IP-Adapter files, by their keys (arXiv 2308.06721)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .flexip import Gated, in_heads

head_width = 64


class ImageProjection(nn.Module):
    """Of ip-adapter_sd15, ip-adapter_sdxl and their like: an embedding to a few tokens."""

    def __init__(self, image_width: int, width: int, tokens: int, operations: Any = nn):
        super().__init__()
        self.tokens = tokens
        self.proj = operations.Linear(image_width, tokens * width)
        self.norm = operations.LayerNorm(width)

    def forward(self, embedding: Tensor) -> Tensor:
        """(B, image_width) -> (B, tokens, width)."""
        return self.norm(self.proj(embedding).unflatten(1, (self.tokens, -1)))


class FullProjection(nn.Module):
    """Of ip-adapter-full-face_sd15: a token for each of the encoder's hidden states."""

    def __init__(self, image_width: int, inner: int, width: int, operations: Any = nn):
        super().__init__()
        self.proj = nn.Sequential(
            operations.Linear(image_width, inner),
            nn.GELU(),
            operations.Linear(inner, width),
            operations.LayerNorm(width),
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, T, image_width) -> (B, T, width)."""
        return self.proj(features)


class _Attention(nn.Module):
    """Learned tokens that read picture features and each other."""

    def __init__(self, width: int, inner: int, operations: Any = nn):
        super().__init__()
        self.heads = inner // head_width
        self.norm1 = operations.LayerNorm(width)
        self.norm2 = operations.LayerNorm(width)
        self.to_q = operations.Linear(width, inner, bias=False)
        self.to_kv = operations.Linear(width, 2 * inner, bias=False)
        self.to_out = operations.Linear(inner, width, bias=False)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        features, tokens = self.norm1(features), self.norm2(tokens)
        keys, values = self.to_kv(torch.cat([features, tokens], 1)).chunk(2, -1)
        q, k, v = (in_heads(t, self.heads) for t in (self.to_q(tokens), keys, values))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """Of ip-adapter-plus files: the encoder's hidden states to 16 tokens."""

    def __init__(
        self,
        image_width: int,
        inner: int,
        width: int,
        tokens: int,
        attention_width: int,
        mlp_width: int,
        depth: int,
        operations: Any = nn,
    ):
        """
        Args:
            inner: width of the tokens between the layers.
            attention_width: of all heads together.
        """
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, tokens, inner) / inner**0.5)
        self.proj_in = operations.Linear(image_width, inner)
        self.proj_out = operations.Linear(inner, width)
        self.norm_out = operations.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    _Attention(inner, attention_width, operations),
                    nn.Sequential(
                        operations.LayerNorm(inner),
                        operations.Linear(inner, mlp_width, bias=False),
                        nn.GELU(),
                        operations.Linear(mlp_width, inner, bias=False),
                    ),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, T, image_width) -> (B, tokens, width)."""
        features = self.proj_in(features)
        tokens = self.latents.to(features).expand(len(features), -1, -1)
        for attention, mlp in self.layers:
            tokens = tokens + attention(features, tokens)
            tokens = tokens + mlp(tokens)
        return self.norm_out(self.proj_out(tokens))


Projection = ImageProjection | FullProjection | Resampler


class IPAdapterBranch(nn.Module):
    """One IP-Adapter file: a projection, and keys and values for each cross-attention.

    Args:
        layers: number of each cross-attention in the file -> its width.
        width: of the tokens.
    """

    def __init__(
        self,
        projection: Projection,
        layers: dict[str, int],
        width: int,
        operations: Any = nn,
    ):
        super().__init__()
        self.image_proj = projection
        self.ip_adapter = nn.ModuleDict(
            {
                number: nn.ModuleDict(
                    {
                        "to_k_ip": operations.Linear(width, inner, bias=False),
                        "to_v_ip": operations.Linear(width, inner, bias=False),
                    }
                )
                for number, inner in layers.items()
            }
        )

    def tokens(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        """(R, image_width) or (R, T, image_width), whichever it reads, -> (R, tokens, width)."""
        whole = isinstance(self.image_proj, ImageProjection)
        return self.image_proj(embedding if whole else hidden)

    def keys_values(self, number: str, tokens: Tensor) -> Gated:
        """What a cross-attention looks at: (B, T, width) -> (B, T, its width) each."""
        layer = self.ip_adapter[number]
        return Gated(layer["to_k_ip"](tokens), layer["to_v_ip"](tokens))
