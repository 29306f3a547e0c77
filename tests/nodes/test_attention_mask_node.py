"""The Attention Mask node: phrases to masks, and a hat that it has to find."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from host import stock, tiny_clip
from host.edits import latent_for, patcher_state, picture_latent
from host.graphs import NodeGraph
from host.inprocess import Host
from host.inversions import Calls
from host.prompts import PromptInterrupted
from host.stock import Demo
from portraits import judging
from portraits.dataset import edited_pixels, edits, pictures
from portraits.drawing import draw
from portraits.people import phrase

TinyModel = Callable[[str], Any]

SOURCE, TARGET = "a man, red hat, blue shirt", "a man, green hat, blue shirt"
WIDGETS: dict[str, Any] = dict(
    **dict(source_prompt=SOURCE, target_prompt=TARGET, added="", removed="", blocks="all"),
    **dict(highest_noise=0.8, lowest_noise=0.7, samples=2, propagation=0, contrast=0.0),
    **dict(threshold=0.5, softness=1.0, smallest_part=0, dilation=0, soft_edge=0.0, seed=5),
)


@dataclass
class Mask:
    """All inputs of the node; at threshold 0.5 and softness 1 the soft mask is the heat."""

    model: Any
    latent: Tensor = field(default_factory=lambda: picture_latent(1, 16, 16))

    def inputs(self, **widgets: Any) -> dict[str, Any]:
        """Wires and widgets."""
        wires = {"model": self.model, "clip": tiny_clip.clip(), "latent": {"samples": self.latent}}
        return {**wires, **WIDGETS, **widgets}

    def run(self, **widgets: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Soft mask, mask, phrase masks and heat maps."""
        return stock.call("PinpointAttentionMask", **self.inputs(**widgets))


@pytest.fixture
def mask(tiny_model: TinyModel) -> Mask:
    return Mask(tiny_model("sd3_bare"))


def tokens_of(pixels: Tensor) -> Tensor:
    """A mask at a picture's size on the grid of a model with patches of two cells."""
    return F.avg_pool2d(pixels[:, None], 16)[:, 0]


@pytest.mark.parametrize("contrast", [0.0, 0.7])
@pytest.mark.parametrize("batch", [1, 2])
def test_heat_is_the_phrases_attention(
    pack: ModuleType, mask: Mask, batch: int, contrast: float
) -> None:
    located = pack.nodes.host.attention_map
    mask.latent = picture_latent(batch, 16, 16)
    soft, hard, each, _ = mask.run(contrast=contrast)
    heats = []
    # Word for word: <start> a man , green hat , blue shirt <end>.
    for text in (TARGET, SOURCE):
        prompt = stock.call("CLIPTextEncode", clip=tiny_clip.clip(), text=text)[0]
        columns = torch.zeros(77, 2)
        columns[[4, 5], 0] = 1 / 2
        columns[[1, 2, 7, 8], 1] = 1 / 4
        chosen = located.layouts.chosen_blocks(mask.model, "all")
        settings = located.GatherSettings(chosen, (), 0.8, 0.7, 2, 0, 5)
        with torch.inference_mode():
            maps = located.gathered(mask.model, prompt, columns, mask.latent, settings)
        heats.append(located.phrase_heat(maps, 0.01, 0.99, contrast)[:, 0])
    # The added phrase first, all pictures of each phrase together.
    torch.testing.assert_close(tokens_of(each), torch.cat(heats), rtol=0, atol=1e-5)
    union = torch.stack(heats).amax(0)
    torch.testing.assert_close(tokens_of(soft), union, rtol=0, atol=1e-5)
    assert torch.equal(hard, (soft >= 0.5).float())
    assert soft.shape == (batch, 128, 128)
    assert each.shape == (2 * batch, 128, 128)


def test_phrases_by_name(mask: Mask) -> None:
    both, _, each, overlays = mask.run()
    named = mask.run(added="Green  Hat", removed="red hat")
    assert torch.equal(named[2], each)
    one = mask.run(added="green hat", source_prompt="")
    assert torch.equal(one[2], each[:1])
    assert torch.equal(one[0], one[2])
    other = mask.run(removed="red hat", target_prompt="")
    assert torch.equal(other[2], each[1:])
    assert torch.equal(torch.maximum(one[0], other[0]), both)
    two = mask.run(added="hat, shirt", removed="")
    assert len(two[2]) == 2
    assert len(overlays) == len(two[3]) == 3
    assert overlays.shape == (3, 128, 128, 3)


def test_shape_of_the_mask(mask: Mask) -> None:
    plain, hard, each, _ = mask.run()
    lower = mask.run(threshold=0.3)
    assert lower[1].mean() > hard.mean()
    assert torch.equal(lower[1], (plain >= 0.3).float())
    assert torch.equal(mask.run(softness=0.0)[0], hard)
    grown = mask.run(dilation=3)
    assert (grown[0] >= plain).all()
    assert grown[0].mean() > plain.mean()
    smooth = mask.run(softness=0.0, soft_edge=1.0)
    assert torch.equal(smooth[1], hard)
    assert ((smooth[0] > 0) & (smooth[0] < 1)).float().mean() > 0.1
    narrow = mask.run(clip_low=30.0, clip_high=70.0)[0]
    assert (narrow == 0).float().mean() > (plain == 0).float().mean() + 0.1
    assert not mask.run(smallest_part=4096)[1].any()
    few = mask.run(smallest_part=2)[1]
    assert (few <= hard).all()
    for picture in (few, hard):
        assert set(picture.unique().tolist()) <= {0.0, 1.0}
    assert len(each) == 2


@pytest.mark.parametrize("name", ["wan", "sd3_bare"])
def test_same_again_and_nothing_sticks(tiny_model: TinyModel, name: str) -> None:
    model = tiny_model(name)
    mask, x = Mask(model, latent_for(name, 2)), latent_for(name, seed=4)

    def output() -> Tensor:
        return stock.velocity(model, stock.conditioning(1), None, 1.0, x, 0.6)

    before, state, kept = output(), patcher_state(model), mask.latent.clone()
    torch.manual_seed(1)
    found = mask.run()
    torch.manual_seed(2)
    generator = torch.get_rng_state()
    again = mask.run()
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)
    assert not torch.equal(mask.run(seed=6)[0], found[0])
    assert torch.equal(output(), before)
    assert patcher_state(model) == state
    assert torch.equal(mask.latent, kept)
    assert found[0].shape == (2, 64, 64)


def test_levels_and_calls(mask: Mask) -> None:
    calls = Calls(mask.model)
    mask.model = calls.model
    mask.run(highest_noise=0.9, lowest_noise=0.3, samples=3)
    assert calls.sigmas == pytest.approx([0.9, 0.6, 0.3] * 2)
    calls.sigmas.clear()
    mask.run(highest_noise=0.9, lowest_noise=0.3, samples=1, added="hat")
    assert calls.sigmas == pytest.approx([0.9])


@pytest.mark.parametrize(
    ("widgets", "says"),
    [
        ({"target_prompt": SOURCE}, "say the same, so there is nothing to locate"),
        ({"added": "cap"}, r"added has 'cap', which is not in target_prompt"),
        ({"removed": "green hat"}, r"removed has 'green hat', which is not in source_prompt"),
        ({"heads": "2"}, r"heads names head 2, but the model's attention has heads 0-1"),
        ({"blocks": "double"}, r"blocks has 'double', which SD3 has not"),
        ({"clip": None}, "clip is empty"),
        ({"samples": 0}, "samples is 0: enter a number from 1"),
        ({"image": torch.zeros(2, 8, 8, 3)}, "image has 2 pictures, the latent 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_meant_is_refused(mask: Mask, widgets: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        mask.run(**widgets)


def test_an_interrupt_is_noticed_before_the_next_call(host: Host, mask: Mask) -> None:
    import comfy.model_management

    calls = Calls(mask.model)
    model = calls.model

    def interrupt(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        out = executor(*args, **kwargs)
        if len(calls.sigmas) == 2:
            comfy.model_management.interrupt_current_processing()
        return out

    model.add_wrapper_with_key("apply_model", "trap", interrupt)
    mask.model = model
    graph, given = NodeGraph(), mask.inputs(samples=4)
    wires = {name: graph.give(given.pop(name)) for name in ("model", "clip", "latent")}
    node = graph.add("PinpointAttentionMask", **wires, **given)
    graph.keep(node)
    with pytest.raises(PromptInterrupted, match="PinpointAttentionMask"):
        host.execute(graph.nodes)
    assert len(calls.sigmas) == 2
    calls.sigmas = [0.0] * 9
    found = host.execute(graph.nodes).value(*node)
    assert torch.equal(found, Mask(calls.model, mask.latent).run(samples=4)[0])


# A hat


def test_the_demo_model_finds_hats(demo: Demo) -> None:
    """On portraits that no training saw, whose true regions are drawn."""
    hats = [edit for edit in edits("attention mask", 0, 44) if edit.attribute == "hat"]
    shares = []
    for edit in hats:
        drawn = pictures([edit.source]).float().movedim(1, -1) / 255
        wires = {"model": demo.model, "clip": demo.clip}
        wires["latent"] = stock.call("VAEEncode", vae=demo.vae, pixels=drawn)[0]
        names = dict(zip(("source_prompt", "target_prompt"), edit.prompts, strict=True))
        search = {**WIDGETS, **wires, **names, "blocks": "25%-100%", "samples": 4}
        search |= dict(highest_noise=0.85, lowest_noise=0.6)
        truth = edited_pixels(draw([edit.source]), draw([edit.target]))
        found, elsewhere = (
            stock.call("PinpointAttentionMask", **{**search, **phrases})[1]
            for phrases in ({}, dict(added=phrase("shirt", edit.target)))
        )
        share = judging.intersection_over_union(torch.cat([found, elsewhere]), truth)
        shares.append(share)
    found, elsewhere = torch.stack(shares).T
    assert found.mean() > 0.5
    assert found.min() > 0.35
    assert elsewhere.max() < 0.1


def test_nothing_found_is_said(mask: Mask, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert not mask.run(smallest_part=64)[1].any()
    assert "nothing is hot enough" in caplog.text


def test_noise_levels_the_wrong_way_round_are_refused(mask: Mask) -> None:
    with pytest.raises(ValueError, match=r"lowest_noise is 0\.7, above highest_noise \(0\.5\)"):
        mask.run(highest_noise=0.5)


def test_a_model_of_nan_is_refused(mask: Mask) -> None:
    broken = mask.model.clone()
    broken.set_model_unet_function_wrapper(
        lambda apply, args: apply(args["input"] * torch.nan, args["timestep"], **args["c"])
    )
    mask.model = broken
    with pytest.raises(ValueError, match="attention holds values that are not finite"):
        mask.run()
