"""The one-node edit against its parts, in ComfyUI's executor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from host import stock
from host.edits import Edit, MaskSearch, left_half, picture_latent
from host.graphs import NodeGraph, Wire
from host.inprocess import Host
from host.prompts import PromptFailed

TinyModel = Callable[[str], Any]

WIDGETS: dict[str, Any] = dict(
    seed=7,
    steps=6,
    strength=0.85,
    source_guidance=1.5,
    target_guidance=4.0,
    mask_threshold=0.3,
    mask_blur=3,
)


def edit_with_words(edit: Edit, **widgets: Any) -> tuple[NodeGraph, Wire]:
    """A graph of the one node with an edit's model, prompts, latent and mask."""
    graph = NodeGraph()
    wires = {
        name: graph.give(getattr(edit, name))
        for name in ("model", "source", "target", "negative", "mask")
        if getattr(edit, name) is not None
    }
    wires["latent"] = graph.give({"samples": edit.latent})
    words = graph.add("PinpointEditWithWords", **wires, **{**WIDGETS, **widgets})
    graph.keep(words.out(1))
    return graph, graph.keep(words)


def run(host: Host, edit: Edit, **widgets: Any) -> tuple[Tensor, Tensor]:
    """The latent and the mask of the one node."""
    graph, words = edit_with_words(edit, **widgets)
    done = host.execute(graph.nodes)
    return done.value(words.node_id)["samples"], done.value(words.node_id, 1)


@pytest.mark.parametrize("name", ["sd3", "sd35", "flux", "schnell"])
def test_one_node_equals_its_parts(host: Host, tiny_model: TinyModel, name: str) -> None:
    """Also bit for bit: it calls them and has no arithmetic of its own."""
    edit = Edit(tiny_model(name), picture_latent(2), n_max=5, guidance_mode="auto")
    latent, mask = run(host, edit)
    search = MaskSearch(edit.model, edit.latent, samples=10, guidance=edit.source_guidance, seed=0)
    assert torch.equal(mask, search.run()[0])
    assert torch.equal(latent, edit.having(mask=mask).run())
    assert not torch.equal(latent, edit.run())


def test_a_connected_mask_takes_the_place_of_the_search(host: Host, tiny_model: TinyModel) -> None:
    edit = Edit(tiny_model("sd3"), mask=left_half(picture_latent()))
    graph, words = edit_with_words(edit)
    done = host.execute(graph.nodes)
    assert torch.equal(done.value(words.node_id, 1), edit.mask)
    assert torch.equal(done.value(words.node_id)["samples"], edit.run())


@pytest.mark.parametrize(
    ("steps", "strength", "n_max"),
    [(6, 1.0, 6), (6, 0.5, 3), (6, 0.0, 0), (1, 0.3, 0), (10, 0.66, 7)],
    ids=str,
)
def test_strength_is_the_share_of_steps(
    host: Host, tiny_model: TinyModel, steps: int, strength: float, n_max: int
) -> None:
    edit = Edit(tiny_model("sd3"), steps=steps, n_max=n_max, mask=torch.ones(1, 8, 8))
    latent, _ = run(host, edit, steps=steps, strength=strength)
    assert torch.equal(latent, edit.run())
    assert torch.equal(latent, edit.latent) == (n_max == 0)


def test_widgets_of_the_search_reach_it(host: Host, tiny_model: TinyModel) -> None:
    edit = Edit(tiny_model("sd3"))
    plain, low, smooth = (
        run(host, edit, **changed)[1] for changed in ({}, {"mask_threshold": 0.1}, {"mask_blur": 7})
    )
    assert low.mean() > plain.mean()
    assert smooth.std() < plain.std()


def test_no_negative_is_needed_with_embedded_guidance(host: Host, tiny_model: TinyModel) -> None:
    edit = Edit(tiny_model("flux"), guidance_mode="auto")
    assert torch.equal(run(host, edit.having(negative=None))[0], run(host, edit)[0])


def test_a_second_seed_gives_another_edit_in_the_same_mask(
    host: Host, tiny_model: TinyModel
) -> None:
    edit = Edit(tiny_model("sd3"))
    (first, mask), (second, same_mask) = run(host, edit), run(host, edit, seed=8)
    assert not torch.equal(first, second)
    assert torch.equal(mask, same_mask)


def test_changed_widgets_keep_the_mask_in_the_cache(host: Host, tiny_model: TinyModel) -> None:
    """Trying another strength must not search for the mask again."""
    asked = []

    def count(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asked.append(len(x))
        return executor(x, *args, **kwargs)

    model = tiny_model("sd3").clone()
    model.add_wrapper_with_key("apply_model", "counter", count)
    graph, _ = edit_with_words(Edit(model))
    executor = host.new_executor()
    host.execute(graph.nodes, executor)
    assert len(asked) == 1 + 5
    asked.clear()
    graph.nodes[graph.find("PinpointEditWithWords")]["inputs"]["seed"] = 8
    host.execute(graph.nodes, executor)
    assert len(asked) == 5


def test_equal_prompts_are_an_error_only_where_a_mask_is_searched(
    host: Host, tiny_model: TinyModel
) -> None:
    same = Edit(tiny_model("sd3"), target=stock.conditioning(1), target_guidance=1.5)
    with pytest.raises(PromptFailed, match=r"source and target prompts .* nothing to locate"):
        run(host, same, target_guidance=1.5)
    masked = same.having(mask=left_half(same.latent))
    assert torch.equal(run(host, masked, target_guidance=1.5)[0], same.latent)


REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no negative": (
        "sd3",
        dict(negative=None),
        r"ValueError: negative is not connected, .*: connect a negative prompt",
    ),
    "a model without flow": (
        "sd15",
        dict(latent=picture_latent(1, 8, 8, channels=4)),
        r"ValueError: model is SD15, .*: load a flow model",
    ),
    "latent of another model": (
        "sd3",
        dict(latent=picture_latent(1, 8, 8, channels=4)),
        r"ValueError: latent has 4 channels, the model needs 16: encode",
    ),
    "masks of another batch": (
        "sd3",
        dict(mask=torch.ones(3, 8, 8)),
        r"ValueError: mask has 3 images, the latent 1: use one mask",
    ),
}


@pytest.mark.parametrize(("name", "changes", "message"), REFUSALS.values(), ids=REFUSALS)
def test_impossible_edits_are_refused_in_a_sentence(
    host: Host, tiny_model: TinyModel, name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PromptFailed, match=message):
        run(host, Edit(tiny_model(name), **changes))


def test_embedded_guidance_is_not_asked_of_a_model_without_it(tiny_model: TinyModel) -> None:
    """SD3 would drop the numbers silently and run without any guidance."""
    with pytest.raises(ValueError, match=r"^guidance_mode is embedded, .*: choose"):
        Edit(tiny_model("sd3"), guidance_mode="embedded").run()
