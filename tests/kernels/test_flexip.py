"""FlexIP's adapter and its gate, against formulas written out in float64."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

HEADS, WIDTH = 2, 16
"""Of a block's attention, which is HEADS * WIDTH wide."""
SIZES: dict[str, Any] = dict(
    low_width=12,
    high_width=10,
    text_width=14,
    width=32,
    blocks={"joint_0": HEADS * WIDTH, "input_4_1": 48},
    head_width=8,
    detail_tokens=5,
    global_tokens=3,
    detail_depth=2,
    global_depth=1,
    text_depth=2,
)

modes = pytest.mark.parametrize("mode", ["literal", "linear"])


@pytest.fixture(scope="module")
def flexip(pack: ModuleType) -> ModuleType:
    return pack.kernels.flexip


@pytest.fixture
def network(flexip: ModuleType) -> Any:
    """An adapter of drawn weights, in float64."""
    network = flexip.FlexIP(flexip.FlexIPSizes(**SIZES)).double()
    for seed, parameter in enumerate(network.parameters()):
        parameter.data = drawn(*parameter.shape, seed=seed) * 0.3
    return network


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def subject(rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Patch features, an embedding and a prompt."""
    return drawn(rows, 7, 12, seed=91), drawn(rows, 10, seed=92), drawn(rows, 6, 14, seed=93)


# Written out


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + (
        layer.bias
    )


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """(B, Q, heads * width), (B, K, …) -> (B, Q, …), one head after the other."""
    size = q.shape[-1] // heads
    read = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[..., part] @ k[..., part].mT / math.sqrt(size)
        read.append(scores.softmax(-1) @ v[..., part])
    return torch.cat(read, -1)


def reading(layer: Any, tokens: Tensor, memory: Tensor) -> Tensor:
    keys_values = linear(layer.to_kv, norm(layer.norm_memory, memory))
    k, v = keys_values[..., : keys_values.shape[-1] // 2], keys_values[..., tokens.shape[-1] :]
    q = linear(layer.to_q, norm(layer.norm, tokens))
    tokens = tokens + linear(layer.to_out, attention(q, k, v, SIZES["width"] // 8))
    inner = gelu(linear(layer.widen, norm(layer.norm_mlp, tokens)))
    return tokens + linear(layer.narrow, inner)


def stack(layers: Any, tokens: Tensor, memory: Tensor) -> Tensor:
    for layer in layers.readings:
        tokens = reading(layer, tokens, memory)
    return norm(layers.norm, tokens)


def summary(network: Any, high: Tensor) -> Tensor:
    """(B, high_width) -> (B, global_tokens, width)."""
    return linear(network.high, high).reshape(len(high), 3, 32)


def heads(x: Tensor) -> Tensor:
    """(B, T, HEADS * WIDTH) -> (B, HEADS, T, WIDTH)."""
    return x.unflatten(2, (HEADS, WIDTH)).transpose(1, 2)


# The adapter


def test_shapes(network: Any) -> None:
    low, high, text = subject()
    assert network.preservation(low, high).shape == (2, 5 + 3, 32)
    assert network.personalization(text, high[:, None]).shape == (2, 6, 32)
    made = network(low, high, text)
    assert made.keys() == SIZES["blocks"].keys()
    for block, width in SIZES["blocks"].items():
        (kept, free) = made[block]
        assert kept.keys.shape == kept.values.shape == (2, 8, width)
        assert free.keys.shape == free.values.shape == (2, 6, width)


def test_preservation_is_the_papers_figure(network: Any) -> None:
    low, high, _ = subject()
    memory = linear(network.low, low)
    detail = stack(network.detail, network.queries.expand(2, -1, -1), memory)
    overall = stack(network.overall, summary(network, high), memory)
    expected = torch.cat([detail, overall], 1)
    torch.testing.assert_close(network.preservation(low, high), expected)


def test_personalization_is_the_papers_figure(network: Any) -> None:
    _, high, text = subject()
    expected = stack(network.personal, linear(network.text, text), summary(network, high))
    torch.testing.assert_close(network.personalization(text, high[:, None]), expected)


def test_personalization_sees_all_references_in_any_order(network: Any) -> None:
    text, high = subject(1)[2], drawn(1, 3, 10, seed=5)
    memory = torch.cat([summary(network, high[:, i]) for i in range(3)], 1)
    expected = stack(network.personal, linear(network.text, text), memory)
    torch.testing.assert_close(network.personalization(text, high), expected)
    torch.testing.assert_close(network.personalization(text, high.flip(1)), expected)


def test_order_of_patches_does_not_matter(network: Any) -> None:
    low, high, _ = subject()
    found = network.preservation(low.flip(1), high)
    torch.testing.assert_close(found, network.preservation(low, high))


@modes
def test_a_new_adapter_adds_exactly_zero(flexip: ModuleType, mode: str) -> None:
    torch.manual_seed(0)
    network = flexip.FlexIP(flexip.FlexIPSizes(**SIZES))
    network.silence()
    made = network(*(t.float() for t in subject()))["joint_0"]
    q = drawn(2, HEADS, 9, WIDTH).float()
    added = flexip.gated_attention(q, made, (0.3, 0.7), mode)
    assert torch.equal(added, torch.zeros(2, 9, HEADS * WIDTH))


@modes
def test_gradients_reach_all_parameters(flexip: ModuleType, network: Any, mode: str) -> None:
    made = network(*subject())
    widths = SIZES["blocks"]
    read = [
        flexip.gated_attention(drawn(2, 2, 9, widths[block] // 2), both, (0.4, 0.6), mode)
        for block, both in made.items()
    ]
    sum((r * drawn(*r.shape, seed=4)).sum() for r in read).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_silent_adapter_learns_to_speak(flexip: ModuleType, network: Any) -> None:
    network.silence()
    made = network(*subject())["joint_0"]
    flexip.gated_attention(drawn(2, HEADS, 9, WIDTH), made, (0.4, 0.6), "literal").sum().backward()
    assert network.to_v["joint_0"].weight.grad.abs().max() > 0


def test_operations_are_those_that_are_given(flexip: ModuleType) -> None:
    import comfy.ops

    network = flexip.FlexIP(flexip.FlexIPSizes(**SIZES), comfy.ops.manual_cast)
    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.LayerNorm)]
    assert layers
    assert all(type(layer).__module__ == "comfy.ops" for layer in layers)


# The gate


def branches(flexip: ModuleType, rows: int = 2) -> list[Any]:
    """Keys and values of two branches, of 8 and of 6 tokens."""
    return [
        flexip.Gated(*(drawn(rows, count, HEADS * WIDTH, seed=count + i) for i in range(2)))
        for count in (8, 6)
    ]


def queries(rows: int = 2) -> Tensor:
    return drawn(rows, HEADS, 9, WIDTH, seed=50)


def flat(q: Tensor) -> Tensor:
    return q.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.5, 1.0])
def test_literal_is_one_attention_to_scaled_tokens(flexip: ModuleType, gamma: float) -> None:
    q, (kept, free) = queries(), branches(flexip)
    keys = torch.cat([kept.keys * gamma, free.keys * (1 - gamma)], 1)
    values = torch.cat([kept.values * gamma, free.values * (1 - gamma)], 1)
    expected = attention(flat(q), keys, values, HEADS)
    found = flexip.gated_attention(q, (kept, free), (gamma, 1 - gamma), "literal")
    torch.testing.assert_close(found, expected)


def test_literal_scales_tokens_as_the_figure_does(flexip: ModuleType, network: Any) -> None:
    """As keys and values are linear in the tokens, they can be scaled in their place."""
    low, high, text = subject()
    kept = network.preservation(low, high)
    free = network.personalization(text, high[:, None])
    joined = torch.cat([0.7 * kept, 0.3 * free], 1)
    keys, values = network.keys_values("joint_0", joined)
    expected = attention(flat(queries()), keys, values, HEADS)
    made = network(low, high, text)["joint_0"]
    found = flexip.gated_attention(queries(), made, (0.7, 0.3), "literal")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.5, 1.0])
def test_linear_is_the_sum_of_two_attentions(flexip: ModuleType, gamma: float) -> None:
    q, (kept, free) = queries(), branches(flexip)
    expected = gamma * attention(flat(q), kept.keys, kept.values, HEADS)
    expected = expected + (1 - gamma) * attention(flat(q), free.keys, free.values, HEADS)
    found = flexip.gated_attention(q, (kept, free), (gamma, 1 - gamma), "linear")
    torch.testing.assert_close(found, expected)


@modes
@pytest.mark.parametrize("closed", [0, 1])
def test_a_closed_branchs_values_do_not_count(flexip: ModuleType, mode: str, closed: int) -> None:
    q, both = queries(), branches(flexip)
    other = list(both)
    other[closed] = both[closed]._replace(values=both[closed].values * 100)
    gains = (0.0, 1.0) if closed == 0 else (1.0, 0.0)
    found = flexip.gated_attention(q, both, gains, mode)
    assert torch.equal(flexip.gated_attention(q, other, gains, mode), found)
    changed = flexip.gated_attention(q, other, (0.5, 0.5), mode)
    assert not torch.allclose(changed, flexip.gated_attention(q, both, (0.5, 0.5), mode))


@modes
def test_order_of_tokens_within_a_branch_does_not_matter(flexip: ModuleType, mode: str) -> None:
    q, both = queries(), branches(flexip)
    shuffled = [flexip.Gated(*(t.roll(3, 1) for t in branch)) for branch in both]
    found = flexip.gated_attention(q, shuffled, (0.7, 0.3), mode)
    torch.testing.assert_close(found, flexip.gated_attention(q, both, (0.7, 0.3), mode))


@modes
def test_order_of_branches_does_not_matter(flexip: ModuleType, mode: str) -> None:
    q, both = queries(), branches(flexip)
    found = flexip.gated_attention(q, both[::-1], (0.3, 0.7), mode)
    torch.testing.assert_close(found, flexip.gated_attention(q, both, (0.7, 0.3), mode))


@modes
def test_gains_for_each_row_are_those_of_numbers(flexip: ModuleType, mode: str) -> None:
    q, both = queries(3), branches(flexip, 3)
    gammas = torch.tensor([0.0, 0.3, 1.0])
    found = flexip.gated_attention(q, both, (gammas, 1 - gammas), mode)
    for row, gamma in enumerate(gammas.tolist()):
        alone = [flexip.Gated(*(t[row : row + 1] for t in branch)) for branch in both]
        expected = flexip.gated_attention(q[row : row + 1], alone, (gamma, 1 - gamma), mode)
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-6, atol=1e-6)


@modes
def test_one_row_of_a_branch_serves_all_rows(flexip: ModuleType, mode: str) -> None:
    """As the subject's tokens do where prompts differ."""
    q, (_, free), (kept, _) = queries(3), branches(flexip, 3), branches(flexip, 1)
    repeated = flexip.Gated(*(t.expand(3, -1, -1) for t in kept))
    expected = flexip.gated_attention(q, (repeated, free), (0.7, 0.3), mode)
    found = flexip.gated_attention(q, (kept, free), (0.7, 0.3), mode)
    torch.testing.assert_close(found, expected)


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_precision_is_the_queries(flexip: ModuleType, mode: str, dtype: torch.dtype) -> None:
    q, both = queries(), branches(flexip)
    exact = flexip.gated_attention(q, both, (0.7, 0.3), mode)
    cast = [flexip.Gated(*(t.to(dtype) for t in branch)) for branch in both]
    gains = torch.tensor([0.7, 0.7]), torch.tensor([0.3, 0.3])
    found = flexip.gated_attention(q.to(dtype), cast, gains, mode)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=20 * torch.finfo(dtype).eps)
