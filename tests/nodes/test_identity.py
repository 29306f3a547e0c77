"""Identities applied, through the node."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from host import stock, tiny_clip
from host.edits import patcher_state, picture_latent
from host.foreign import lora_weights
from host.identities import LORA, apply, encoded, velocity

TinyModel = Callable[[str], Any]


def test_nothing_sticks_and_strength_0_leaves_the_model_as_it_is(
    tiny_model: TinyModel, ann: Any
) -> None:
    model, clip, text = tiny_model("sd3_bare"), tiny_clip.clip(), "a red hat"
    state, before = patcher_state(model), velocity(model, clip, text)
    mask = torch.zeros(1, 8, 8)
    for inputs in ({"strength": 0.0}, {"strength": 0.0, "mask": mask}):
        off = apply(model, ann, **inputs)
        assert torch.equal(velocity(*off, text), before)
    on = velocity(*apply(model, ann), text)
    assert (on - before).abs().mean() > 0.01
    assert torch.equal(velocity(model, clip, text), before)
    assert torch.equal(velocity(*apply(model, ann), text), on)
    assert patcher_state(model) == state


def test_the_change_of_the_model_is_the_stock_loaders(tiny_model: TinyModel, ann: Any) -> None:
    import comfy.sd

    model = tiny_model("sd3_bare")
    expected, _ = comfy.sd.load_lora_for_models(model, None, dict(ann.lora), 0.7, 0)
    found = apply(model, ann, strength=0.7)
    text = "a red hat"
    assert torch.equal(velocity(*found, text), velocity(expected, tiny_clip.clip(), text))


def test_the_word_is_known_by_its_name_or_another(tiny_model: TinyModel, ann: Any) -> None:
    model = tiny_model("sd3_bare")
    named, renamed = apply(model, ann), apply(model, ann, name=" <Bea> ")
    assert torch.equal(velocity(*named, "a <ann>"), velocity(*renamed, "a <bea>"))
    assert not torch.equal(velocity(*named, "a <ann>"), velocity(*named, "a person"))


def test_several_identities_act_together(tiny_model: TinyModel, ann: Any) -> None:
    model = tiny_model("sd3_bare")
    bea = replace(ann, name="bea", vectors={"l": ann.vectors["l"].flip(0)}, lora={})
    left = torch.zeros(1, 8, 8)
    left[..., :4] = 1
    first = apply(model, ann, mask=left)
    both = apply(first[0], bea, first[1], mask=1 - left)
    second = apply(model, bea, mask=1 - left)
    turned = apply(second[0], ann, second[1], mask=left)
    text = "<ann> and <bea> on a beach"
    assert torch.allclose(velocity(*both, text), velocity(*turned, text), atol=1e-5)
    assert torch.equal(velocity(*both, "a hat"), velocity(*first, "a hat"))
    assert not torch.allclose(velocity(*both, text), velocity(first[0], both[1], text), atol=1e-3)


def test_stock_loras_before_and_after_stay(tiny_model: TinyModel, ann: Any) -> None:
    import comfy.sd

    model, text = tiny_model("sd3_bare"), "a red hat"

    def lora(model: Any, clip: Any) -> tuple[Any, Any]:
        return comfy.sd.load_lora_for_models(model, clip, lora_weights(), 0.5, 0.5)

    after = lora(*apply(model, ann))
    before = apply(lora(model, None)[0], ann)
    assert torch.allclose(velocity(*after, text), velocity(*before, text), atol=1e-4)
    assert not torch.allclose(velocity(*after, text), velocity(*apply(model, ann), text), atol=1e-3)
    tokens = after[1].tokenize("a <ann>")["l"][0]
    assert torch.equal(tokens[2][0], ann.vectors["l"][0])


def test_quantised_weights_are_bypassed_and_bypasses_stack(
    pack: ModuleType, tiny_model: TinyModel, ann: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each injection puts back what it found, so that none may be left in the model."""
    from comfy import model_management

    model, text = tiny_model("sd3_bare"), "a red hat"
    plain, clip = velocity(model, tiny_clip.clip(), text), tiny_clip.clip()
    bea = replace(ann, name="bea", vectors={}, lora={k: v * 0.5 for k, v in ann.lora.items()})
    patched = apply(apply(model, ann)[0], bea)
    monkeypatch.setattr(pack.nodes.host.applying, "QuantizedTensor", torch.Tensor)
    bypassed = apply(apply(model, ann)[0], bea)
    assert not bypassed[0].patches
    found = velocity(*bypassed, text)
    torch.testing.assert_close(found, velocity(*patched, text), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, velocity(*apply(model, ann), text), atol=1e-3)
    model_management.unload_all_models()
    assert torch.equal(velocity(model, clip, text), plain)


def test_a_hook_changes_the_model_for_its_prompts_only(tiny_model: TinyModel, ann: Any) -> None:
    def sampled(strength: float, *hooked: float) -> torch.Tensor:
        model, clip = apply(tiny_model("sd3_bare"), ann, strength=strength)
        positive, negative = (encoded(clip, text) for text in ("a <ann>", ""))
        for each in hooked:
            (hooks,) = stock.call("PinpointIdentityHook", model=model, identity=ann, strength=each)
            (positive,) = stock.call(
                "ConditioningSetProperties",
                cond_NEW=positive,
                strength=1.0,
                set_cond_area="default",
                hooks=hooks,
            )
        return stock.call(
            "KSampler",
            **dict(model=model, positive=positive, negative=negative),
            **dict(seed=1, steps=2, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0),
            latent_image={"samples": picture_latent()},
        )[0]["samples"]

    plain = sampled(0.0)
    everywhere, hooked = sampled(0.7), sampled(0.0, 0.7)
    assert torch.equal(hooked, everywhere)
    assert (hooked - plain).abs().mean() > 0.01
    assert torch.equal(sampled(0.0), plain)


def test_hooks_of_others_stay(tiny_model: TinyModel, ann: Any) -> None:
    def hook(strength: float, **others: Any) -> Any:
        inputs = dict(model=tiny_model("sd3_bare"), identity=ann, strength=strength)
        return stock.call("PinpointIdentityHook", **inputs, **others)[0]

    first = hook(0.3)
    both = hook(0.4, prev_hooks=first)
    assert sorted(each.strength_model for each in both.hooks) == [0.3, 0.4]
    assert len(first.hooks) == 1


def test_changes_that_no_hook_can_make_are_refused(
    pack: ModuleType, tiny_model: TinyModel, ann: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(message: str, identity: Any = ann, model: str = "sd3_bare") -> None:
        with pytest.raises(ValueError, match=message):
            stock.call(
                "PinpointIdentityHook", model=tiny_model(model), identity=identity, strength=1.0
            )

    refused("was learned with SD3, the model is Flux", model="flux")
    refused("<ann> is a word alone", replace(ann, lora={}))
    elsewhere = {key.replace("blocks.0", "blocks.7"): t for key, t in ann.lora.items()}
    refused("changes 1 weights, of which the model has 0", replace(ann, lora=elsewhere))
    monkeypatch.setattr(pack.nodes.host.applying, "QuantizedTensor", torch.Tensor)
    refused("quantised weights")


def test_another_family_is_refused(tiny_model: TinyModel, ann: Any) -> None:
    with pytest.raises(
        ValueError, match=r"identity <ann> was learned with SD3, the model is Flux: l"
    ):
        apply(tiny_model("flux"), ann)


def test_other_text_encoders_are_refused(tiny_model: TinyModel, ann: Any) -> None:
    wide = replace(ann, vectors={"l": torch.ones(1, 768)})
    said = r"with the text encoders {}, the clip has l \(64 wide\): load the text encoders"
    with pytest.raises(ValueError, match=said.format(r"l \(768 wide\)")):
        apply(tiny_model("sd3_bare"), wide)
    other = replace(ann, vectors={"t5xxl": torch.ones(1, 4096)})
    with pytest.raises(ValueError, match=said.format(r"t5xxl \(4096 wide\)")):
        apply(tiny_model("sd3_bare"), other)


def test_weights_that_the_model_has_not_are_refused(tiny_model: TinyModel, ann: Any) -> None:
    model = tiny_model("sd3_bare")
    elsewhere = {key.replace("blocks.0", "blocks.7"): t for key, t in ann.lora.items()}
    smaller = {**ann.lora, f"{LORA}.lora_down.weight": torch.ones(4, 64)}
    for lora in (elsewhere, smaller):
        with pytest.raises(
            ValueError, match="changes 1 weights, of which the model has 0: load the"
        ):
            apply(model, replace(ann, lora=lora))


def test_names_that_are_taken_or_impossible_are_refused(tiny_model: TinyModel, ann: Any) -> None:
    model = tiny_model("sd3_bare")
    first = apply(model, ann)
    with pytest.raises(ValueError, match="identity is called <Ann>, and the clip knows another"):
        apply(first[0], ann, first[1], name="Ann")
    for name in ("two words", "<>", "(ann)", "ann:1.2"):
        with pytest.raises(
            ValueError, match="write a name of letters, digits, - and _, such as ann"
        ):
            apply(model, ann, name=name)


def test_masks_that_cannot_act(
    tiny_model: TinyModel, ann: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, mask = tiny_model("sd3_bare"), torch.ones(1, 8, 8)
    with pytest.raises(ValueError, match="mask holds values that are not finite"):
        apply(model, ann, mask=mask * torch.nan)
    with pytest.raises(ValueError, match="identity <ann> has no learned word whose attention"):
        apply(model, replace(ann, vectors={}), mask=mask)
    with caplog.at_level(logging.WARNING):
        apply(model, ann, mask=mask * 0)
    assert [r.message for r in caplog.records if "Pinpoint" in r.message] == [
        "Pinpoint: the mask of <ann> is empty, so the picture never looks at it"
    ]
