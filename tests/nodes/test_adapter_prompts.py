"""Adapters and the prompts of a run: which of them see the subject, and as what they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from host import stock
from host.edits import Edit
from host.null_texts import NullText
from host.subjects import Case
from host.tapping import FAMILIES, Family, each_of, few

TinyModel = Callable[[str], Any]

modes = pytest.mark.parametrize("mode", ["literal", "linear"])


@few
def test_prompts_of_a_batch_are_read_each(case: Callable[..., Case], family: Family) -> None:
    made = case(family)
    ((first, entries),), ((second, _),) = family.prompt(1), family.prompt(2)
    pooled = {k: v.repeat(2, 1) for k, v in entries.items() if k == "pooled_output"}
    together = [[torch.cat([first, second]), {**entries, **pooled}]]
    x, model = family.latent(1).repeat(2, *[1] * (family.latent().ndim - 1)), made.applied()
    both = stock.velocity(model, together, None, 1.0, x, 0.6)
    for row, prompt in enumerate((family.prompt(1), family.prompt(2))):
        one = stock.velocity(model, prompt, None, 1.0, x[:1], 0.6)
        torch.testing.assert_close(both[row : row + 1], one, rtol=1e-3, atol=1e-3)


def test_a_prompt_that_changes_in_a_run_is_read_again(case: Callable[..., Case]) -> None:
    """As the Null-Text Guider changes it, under the same uuid."""
    import comfy.samplers
    from comfy.patcher_extension import WrappersMP

    family, factor = FAMILIES["SD1.5"], [1.0]
    made = case(family)

    def scale(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        return executor(*args[:3], args[3] * factor[0], *args[4:], **kwargs)

    changing = made.model.clone()
    changing.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", scale)
    guider = comfy.samplers.CFGGuider(made.applied(changing))
    guider.inner_set_conds({"positive": family.prompt(1)})
    x = family.latent()

    def look(guider: Any, extra_args: dict[str, Any]) -> list[Tensor]:
        found = []
        for factor[0] in (1.0, 0.5):
            found.append(guider(x, x.new_full((len(x),), 0.6), **extra_args))
        return found

    first, second = stock.inside(guider, x, look)
    again, _ = stock.inside(guider, x, look)
    assert torch.equal(first, again)
    factor[0] = 0.5
    alone = stock.velocity(made.applied(changing), family.prompt(1), None, 1.0, x, 0.6)
    torch.testing.assert_close((x - second) / 0.6, alone)


@each_of("SD1.5", "SDXL")
@modes
def test_a_prompt_counts_alike_beside_a_longer_one(
    case: Callable[..., Case], family: Family, mode: str
) -> None:
    """ComfyUI repeats the shorter one, if both fit into one call."""
    made = case(family)
    absent = made.without_subject()
    model = made.applied(subject=absent, mode=mode)
    short, long, x = family.prompt(1), family.prompt(2, tokens=24), family.latent()
    positive, negative = (
        stock.velocity(model, prompt, None, 1.0, x, 0.6) for prompt in (short, long)
    )
    both = stock.velocity(model, short, long, 2.0, x, 0.6)
    torch.testing.assert_close(both, 2 * positive - negative, rtol=1e-3, atol=1e-3)


@few
def test_guiders_of_three_prompts_show_the_subject_to_two(
    case: Callable[..., Case], family: Family
) -> None:
    made, x = case(family), family.latent()
    model = made.applied()
    prompts = [family.prompt(seed) for seed in (1, 2, 3)]
    one, two = (stock.velocity(model, prompt, None, 1.0, x, 0.6) for prompt in prompts[:2])
    unseen = made.applied(subject=made.without_subject())
    three = stock.velocity(unseen, prompts[2], None, 1.0, x, 0.6)
    (guider,) = stock.call(
        "DualCFGGuider",
        model=model,
        **dict(zip(("cond1", "cond2", "negative"), prompts, strict=True)),
        **dict(cfg_conds=1.5, cfg_cond2_negative=3.0, style="regular"),
    )

    def look(guider: Any, extra_args: dict[str, Any]) -> Tensor:
        return (x - guider(x, x.new_full((len(x),), 0.6), **extra_args)) / 0.6

    expected = three + 3.0 * (two - three) + 1.5 * (one - two)
    torch.testing.assert_close(stock.inside(guider, x, look), expected, rtol=1e-3, atol=2e-3)


@few
def test_areas_have_their_part_of_the_mask(case: Callable[..., Case], family: Family) -> None:
    made, x = case(family), family.latent()
    mask = torch.zeros(1, *x.shape[-2:])
    mask[..., 4:] = 1
    rows, columns = x.shape[-2], 4
    left = stock.with_values(family.prompt(1), area=(rows, columns, 0, 0), strength=1.0)
    right = stock.with_values(family.prompt(2), area=(rows, columns, 0, 4), strength=1.0)
    found, plain = (
        stock.velocity(model, left + right, None, 1.0, x, 0.6)
        for model in (made.applied(mask=mask), made.model)
    )
    assert torch.equal(found[..., :4], plain[..., :4])
    assert not torch.equal(found[..., 4:8], plain[..., 4:8])


def test_a_copy_for_an_area_is_known_as_the_prompt_whose_text_it_has(
    pack: ModuleType, tiny_model: TinyModel
) -> None:
    from comfy.patcher_extension import WrappersMP

    family, told = FAMILIES["SD1.5"], []
    step_prompts = pack.nodes.host.step_prompts

    def listen(executor: Any, *args: Any) -> Tensor:
        told.append(args[2]["transformer_options"][step_prompts.prompts_key])
        return executor(*args)

    model = step_prompts.remembering(tiny_model(family.model))
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", listen)
    area, words = (family.latent().shape[-2], 4, 0, 4), {"ann": [3]}
    positive = stock.with_values(
        family.prompt(1, tokens=24), area=area, strength=1.0, pinpoint_words=words
    )
    stock.velocity(model, positive, family.prompt(2, tokens=8), 2.0, family.latent(), 0.6)
    kind = step_prompts.StepPrompt
    own, negative = told[0].found.values()
    assert own == [kind(False, 24, words, area), kind(True, 8, {}, area)]
    assert negative == [kind(True, 8, {}, None)]


def attending(seen: bool) -> Callable[..., Tensor]:
    """What another pack puts in place of a cross-attention: the same, seen by overrides or not."""
    from comfy.ldm.modules.attention import optimized_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        more = {"transformer_options": options} if seen else {}
        return optimized_attention(q, k, v, options["n_heads"], **more)

    return attend


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("name", ["SD1.5", "SDXL"])
def test_replaced_cross_attention_has_the_subject_once(
    case: Callable[..., Case], pack: ModuleType, name: str, seen: bool
) -> None:
    """As IP-Adapter packs replace it, before or after, and with two subjects."""
    family = FAMILIES[name]
    made = case(family)
    blocks = pack.nodes.host.layouts.blocks_of(made.model)

    def replaced(model: Any) -> Any:
        other = model.clone()
        for block in blocks:
            other.set_model_attn2_replace(attending(seen), block.kind, block.index, block.part)
        return other

    applied = made.applied()
    wanted = family.velocity(applied)
    assert (wanted - family.velocity(made.model)).abs().max() > 1e-3
    assert torch.equal(family.velocity(replaced(applied)), wanted)
    assert torch.equal(family.velocity(made.applied(replaced(made.model))), wanted)
    twice = made.applied(applied)
    assert torch.equal(family.velocity(replaced(twice)), family.velocity(twice))


def test_what_replaces_cross_attention_still_acts(case: Callable[..., Case]) -> None:
    family = FAMILIES["SD1.5"]
    made = case(family)
    found = []
    for weight in (0.0, 1.0):
        model = made.applied(weight=weight).clone()
        for block in (("input", 1), ("middle", 0)):
            model.set_model_attn2_replace(lambda q, _k, _v, _extra: 0.5 * q, *block)
        found.append(family.velocity(model))
    plain = [family.velocity(made.applied(weight=weight)) for weight in (0.0, 1.0)]
    for a, b in ((found[0], found[1]), (found[0], plain[0]), (found[1], plain[1])):
        assert (a - b).abs().max() > 1e-3


def test_null_text_inversion_works_with_it(case: Callable[..., Case]) -> None:
    """It changes the empty prompt in every step, and takes gradients through the model."""
    made = case(FAMILIES["SDXL"])
    job = NullText(made.applied(), stock.conditioning(1), stock.conditioning(3))
    plain = replace(job, model=made.model)
    noise, _, trajectory, _ = job.run()
    back = job.back(noise, job.replaying(trajectory))
    assert back.isfinite().all()
    assert not torch.equal(plain.back(noise, plain.replaying(trajectory)), back)


def test_an_edit_of_equal_prompts_moves_nothing(case: Callable[..., Case]) -> None:
    family = FAMILIES["SD3"]
    made = case(family)
    edit = Edit(made.applied(), family.latent()).having(target=family.prompt(1))
    edit = edit.having(source=family.prompt(1), source_guidance=4.0)
    made_of, _ = stock.call("SamplerCustomAdvanced", **edit.parts())
    assert torch.equal(made_of["samples"], family.latent())
