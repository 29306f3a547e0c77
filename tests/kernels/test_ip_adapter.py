"""Image projections of IP-Adapters against formulas written out in float64, and their keys."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

GLOBAL_KEYS = {"proj.weight", "proj.bias", "norm.weight", "norm.bias"}
FULL_KEYS = {f"proj.{place}.{kind}" for place in (0, 2, 3) for kind in ("weight", "bias")}
PLUS_KEYS = {
    "latents",
    *(
        f"{name}.{kind}"
        for name in ("proj_in", "proj_out", "norm_out")
        for kind in ("weight", "bias")
    ),
    *(
        f"layers.{layer}.{part}"
        for layer in range(4)
        for part in (
            *("0.norm1.weight", "0.norm1.bias", "0.norm2.weight", "0.norm2.bias"),
            *("0.to_q.weight", "0.to_kv.weight", "0.to_out.weight"),
            *("1.0.weight", "1.0.bias", "1.1.weight", "1.3.weight"),
        )
    ),
}
"""As public files have them, below image_proj."""


@pytest.fixture(scope="module")
def kernel(pack: ModuleType) -> ModuleType:
    return pack.kernels.ip_adapter


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def filled(network: Any) -> Any:
    """The network with drawn weights, in float64."""
    network = network.double()
    for seed, parameter in enumerate(network.parameters()):
        parameter.data = drawn(*parameter.shape, seed=seed) / max(1, parameter.shape[-1]) ** 0.5
    return network


def norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def plus(kernel: ModuleType, heads: int = 2) -> Any:
    sizes: dict[str, int] = dict(
        image_width=20, inner=24, width=28, tokens=5, attention_width=64 * heads
    )
    return filled(kernel.Resampler(**sizes, mlp_width=96, depth=4))


def test_keys_are_those_of_public_files(kernel: ModuleType) -> None:
    assert kernel.ImageProjection(20, 28, 4).state_dict().keys() == GLOBAL_KEYS
    assert kernel.FullProjection(20, 20, 28).state_dict().keys() == FULL_KEYS
    assert plus(kernel).state_dict().keys() == PLUS_KEYS
    branch = kernel.IPAdapterBranch(kernel.ImageProjection(20, 28, 4), {"1": 32, "3": 64}, 28)
    layers = {f"ip_adapter.{n}.to_{kind}_ip.weight" for n in (1, 3) for kind in "kv"}
    assert branch.state_dict().keys() == {f"image_proj.{key}" for key in GLOBAL_KEYS} | layers


def test_global_projection(kernel: ModuleType) -> None:
    network = filled(kernel.ImageProjection(20, 28, 4))
    weights, embedding = network.state_dict(), drawn(3, 20, seed=9)
    expected = torch.stack(
        [
            norm(
                weights,
                "norm",
                embedding @ weights["proj.weight"][28 * i : 28 * (i + 1)].T
                + weights["proj.bias"][28 * i : 28 * (i + 1)],
            )
            for i in range(4)
        ],
        1,
    )
    torch.testing.assert_close(network(embedding), expected)


def test_full_projection(kernel: ModuleType) -> None:
    network = filled(kernel.FullProjection(20, 22, 28))
    weights, features = network.state_dict(), drawn(3, 7, 20, seed=9)
    inner = gelu(linear(weights, "proj.0", features))
    expected = norm(weights, "proj.3", linear(weights, "proj.2", inner))
    torch.testing.assert_close(network(features), expected)


@pytest.mark.parametrize("heads", [1, 2])
def test_resampler(kernel: ModuleType, heads: int) -> None:
    network = plus(kernel, heads)
    weights, features = network.state_dict(), drawn(3, 7, 20, seed=9)
    inside, tokens = linear(weights, "proj_in", features), weights["latents"].expand(3, -1, -1)
    for layer in range(4):
        name, mlp = f"layers.{layer}.0", f"layers.{layer}.1"
        looking = norm(weights, f"{name}.norm2", tokens)
        seen = torch.cat([norm(weights, f"{name}.norm1", inside), looking], 1)
        keys_values = linear(weights, f"{name}.to_kv", seen)
        read = []
        for head in range(heads):
            part, second = (slice(64 * h, 64 * (h + 1)) for h in (head, heads + head))
            q = linear(weights, f"{name}.to_q", looking)[..., part]
            scores = q @ keys_values[..., part].mT / 8
            read.append(scores.softmax(-1) @ keys_values[..., second])
        tokens = tokens + linear(weights, f"{name}.to_out", torch.cat(read, -1))
        inner = gelu(linear(weights, f"{mlp}.1", norm(weights, f"{mlp}.0", tokens)))
        tokens = tokens + linear(weights, f"{mlp}.3", inner)
    expected = norm(weights, "norm_out", linear(weights, "proj_out", tokens))
    torch.testing.assert_close(network(features), expected)


def test_a_branch_reads_what_its_projection_does(kernel: ModuleType) -> None:
    embedding, hidden = drawn(2, 20, seed=3), drawn(2, 7, 20, seed=4)
    for projection, read in (
        (kernel.ImageProjection(20, 28, 4), embedding),
        (kernel.FullProjection(20, 20, 28), hidden),
        (plus(kernel), hidden),
    ):
        branch = filled(kernel.IPAdapterBranch(projection, {"1": 32, "3": 64}, 28))
        tokens = branch.tokens(embedding, hidden)
        assert torch.equal(tokens, projection(read))
        weights = branch.state_dict()
        for number in ("1", "3"):
            found = branch.keys_values(number, tokens)
            for kind, part in zip("kv", found, strict=True):
                expected = linear(weights, f"ip_adapter.{number}.to_{kind}_ip", tokens)
                torch.testing.assert_close(part, expected)
