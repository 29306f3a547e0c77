"""The attention tap: invisible when it only looks, exact when it changes, gone when it is gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from host import stock
from host.edits import patcher_state
from host.tapping import FAMILIES, Family, Witness, each_of, families

TinyModel = Callable[[str], Any]
Proceed = Callable[[Any], Tensor]

two_families = each_of("SD3.5-medium", "Flux")


@pytest.fixture
def tap(pack: ModuleType) -> ModuleType:
    return pack.nodes.host.tap


def by_hand(attention: Any) -> Tensor:
    """What an attention gives, by its definition."""
    products = attention.q @ attention.k.transpose(2, 3) * attention.scale
    if attention.mask is not None:
        products = products + attention.mask.unsqueeze(-3)
    return (products.softmax(dim=-1) @ attention.v).transpose(1, 2).flatten(2)


# Looking


@families
def test_looking_changes_nothing(tap: ModuleType, tiny_model: TinyModel, family: Family) -> None:
    model = tiny_model(family.model)
    state, before = patcher_state(model), family.velocity(model)
    tapped = tap.tapped(model, tap.observing(lambda _: None))
    assert torch.equal(family.velocity(tapped), before)
    assert torch.equal(family.velocity(model), before)
    assert patcher_state(model) == state


@families
def test_a_handler_is_shown_what_the_model_computes_with(
    tap: ModuleType, tiny_model: TinyModel, family: Family
) -> None:
    seen = []

    def handler(attention: Any, proceed: Proceed) -> Tensor:
        seen.append(f"{attention.place.block} {attention.place.kind}")
        torch.testing.assert_close(proceed(attention), by_hand(attention), rtol=1e-4, atol=1e-5)
        return by_hand(attention)

    model = tiny_model(family.model)
    by_definition = family.velocity(tap.tapped(model, handler))
    assert seen == list(family.seen)
    torch.testing.assert_close(by_definition, family.velocity(model), rtol=1e-3, atol=1e-3)


def test_a_models_own_mask_is_shown(tap: ModuleType, tiny_model: TinyModel) -> None:
    family, model, masks = FAMILIES["Qwen-Image"], tiny_model("qwen"), []

    def handler(attention: Any, proceed: Proceed) -> Tensor:
        masks.append(attention.mask)
        torch.testing.assert_close(proceed(attention), by_hand(attention), rtol=1e-4, atol=1e-5)
        return by_hand(attention)

    ignoring = torch.tensor([[1] * 7 + [0] * 5])
    prompt = stock.with_values(family.prompt(1), attention_mask=ignoring)
    x = family.latent(2)
    masked = stock.velocity(tap.tapped(model, handler), prompt, None, 1.0, x, 0.6)
    assert [mask.shape for mask in masks] == [(2, 1, 32)] * 2
    assert all((mask[..., 7:12] < -1e30).all() for mask in masks)
    torch.testing.assert_close(masked, stock.velocity(model, prompt, None, 1.0, x, 0.6))
    assert not torch.allclose(masked, stock.velocity(model, family.prompt(1), None, 1.0, x, 0.6))


# Changing


@families
def test_values_that_stay_change_nothing_and_others_do(
    tap: ModuleType, tiny_model: TinyModel, family: Family
) -> None:
    def without_picture(attention: Any) -> Tensor | None:
        if attention.place.kind == "cross":
            return None
        values = attention.v.clone()
        values[:, :, attention.place.image] = 0
        return values

    model = tiny_model(family.model)
    before = family.velocity(model)
    same = tap.tapped(model, tap.changing(lambda attention: attention.v.clone()))
    assert torch.equal(family.velocity(same), before)
    changed = tap.tapped(model, tap.changing(without_picture))
    assert (family.velocity(changed) - before).abs().mean() > 0.01
    assert torch.equal(family.velocity(model), before)


@each_of(*(name for name, family in FAMILIES.items() if "joint" in family.seen[0]))
def test_a_handlers_mask_hides_the_text(
    tap: ModuleType, tiny_model: TinyModel, family: Family
) -> None:
    def without_text(attention: Any, proceed: Proceed) -> Tensor:
        if attention.place.text is None:
            return proceed(attention)
        mask = attention.q.new_zeros(1, 1, attention.q.shape[2], attention.k.shape[2])
        mask[..., attention.place.text] = -1e4
        return proceed(replace(attention, mask=mask))

    def difference(model: Any) -> float:
        """How far two prompts are from each other."""
        prompts, x = (family.prompt(1), family.prompt(2)), family.latent()
        first, second = (stock.velocity(model, prompt, None, 1.0, x, 0.6) for prompt in prompts)
        return (first - second).abs().max().item()

    model = tiny_model(family.model)
    assert difference(model) > 1e-3
    assert difference(tap.tapped(model, without_text)) < 1e-4


@pytest.mark.parametrize("heads_out", [False, True])
@pytest.mark.parametrize("heads_in", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_every_form_of_comfyuis_attention_is_kept(
    tap: ModuleType, tiny_model: TinyModel, heads_in: bool, heads_out: bool, kv_heads: int
) -> None:
    from comfy.ldm.modules.attention import optimized_attention

    options, witness = {}, Witness()

    def spy(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        options.update(args["transformer_options"])
        return extra["original_block"](args)

    model = tap.tapped(tiny_model("sd3"), tap.observing(witness))
    model.set_model_patch_replace(spy, "dit", "double_block", 1)
    FAMILIES["SD3"].velocity(model)
    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(4, h, 32, 8, generator=generator) for h in (2, kv_heads, kv_heads))
    if not heads_in:
        q, k, v = (t.transpose(1, 2).flatten(2) for t in (q, k, v))
    form = dict(skip_reshape=heads_in, skip_output_reshape=heads_out, scale=0.3)
    arguments = dict(**form, enable_gqa=kv_heads < 2)
    witness.attentions.clear()
    through_tap = optimized_attention(q, k, v, 2, transformer_options=options, **arguments)
    assert torch.equal(through_tap, optimized_attention(q, k, v, 2, **arguments))
    (shown,) = witness.attentions
    assert (shown.q.shape, shown.v.shape) == ((4, 2, 32, 8), (4, kv_heads, 32, 8))
    assert shown.scale == 0.3


# Nothing sticks


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Any]]:
    """ComfyUI's TorchCompileModel, with a backend that runs what was traced as it is."""
    import comfy.ldm.flux.math
    import comfy.ldm.modules.diffusionmodules.mmdit
    from comfy.ldm.modules.attention import attention_pytorch
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    # ComfyUI's attention for the CPU cannot be traced; this one, for GPUs, becomes part of a graph.
    for module in (comfy.ldm.flux.math, comfy.ldm.modules.diffusionmodules.mmdit):
        monkeypatch.setattr(module, "optimized_attention", attention_pytorch)

    def compile_model(model: Any) -> Any:
        model = model.clone()
        options: Any = {"guard_filter_fn": skip_torch_compile_dict}
        set_torch_compile_wrapper(model=model, backend="eager", options=options)
        return model

    torch._dynamo.reset()
    yield compile_model
    torch._dynamo.reset()


@two_families
def test_compiled_models_neither_forget_nor_freeze_a_handler(
    tap: ModuleType, tiny_model: TinyModel, compiled: Callable[[Any], Any], family: Family
) -> None:
    settings = {"factor": 1.0}
    handler = tap.changing(lambda attention: attention.v * settings["factor"])
    model = tiny_model(family.model)
    alone, without = compiled(model), family.velocity(model)
    tapped = tap.tapped(model, handler)

    def is_untouched() -> bool:
        return torch.allclose(family.velocity(alone), without, rtol=1e-4, atol=1e-5)

    torch._dynamo.utils.counters.clear()
    assert is_untouched()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    for both in (tap.tapped(alone, handler), compiled(tapped)):
        for factor in (1.0, 0.0, 0.5):
            settings["factor"] = factor
            assert torch.equal(family.velocity(both), family.velocity(tapped))
        assert not torch.allclose(family.velocity(both), without, atol=1e-2)
        assert is_untouched()


@pytest.mark.parametrize("error", ["ValueError", "InterruptProcessingException"])
@two_families
def test_errors_and_interrupts_leave_nothing_behind(
    tap: ModuleType, tiny_model: TinyModel, family: Family, error: str
) -> None:
    import comfy.model_management

    kind = getattr(comfy.model_management, error, ValueError)
    failing, seen, model = True, [], tiny_model(family.model)

    def change(attention: Any) -> Tensor:
        seen.append(f"{attention.place.block} {attention.place.kind}")
        if failing and len(seen) == 2:
            raise kind("stop")
        return attention.v * 0.5

    state, before = patcher_state(model), family.velocity(model)
    tapped = tap.tapped(model, tap.changing(change))
    with pytest.raises(kind):
        family.velocity(tapped)
    assert torch.equal(family.velocity(model), before)
    assert patcher_state(model) == state
    failing = False
    del seen[:]
    halved = tap.tapped(model, tap.changing(lambda attention: attention.v * 0.5))
    assert torch.equal(family.velocity(tapped), family.velocity(halved))
    assert seen == list(family.seen)
    # Compiled models of others are compiled again.
    assert torch._dynamo.eval_frame._stance.stance == "default"
