"""Structure-to-Detail Edit in ComfyUI's executor against the graph of its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from host import tiny_clip
from host.edits import latent_for, left_half
from host.graphs import NodeGraph, Wire
from host.inprocess import Execution, Host
from host.inversions import Calls
from host.prompts import PromptFailed

TinyModel = Callable[[str], Any]

SOURCE, TARGET = "a man in a red hat, blue shirt", "a man in a green hat, blue shirt"
WIDGETS: dict[str, Any] = dict(
    source_prompt=SOURCE,
    target_prompt=TARGET,
    steps=4,
    guidance=2.0,
    method="RF-Solver",
    locator="attention",
    mask_threshold=0.25,
    structure_end=0.5,
    detail_start=0.0,
    detail_end=0.4,
    blocks="all",
    seed=3,
)


def defaults(host: Host, class_type: str) -> dict[str, Any]:
    """What a node's widgets have when it is dropped into a graph."""
    types = host.nodes[class_type].INPUT_TYPES()  # type: ignore[attr-defined]
    widgets = types["required"] | types.get("optional", {})
    return {
        name: options["default"]
        for name, (_kind, options) in widgets.items()
        if "default" in options
    }


def one_node(
    model: Any, latent: Tensor, mask: Tensor | None, **widgets: Any
) -> tuple[NodeGraph, Wire]:
    """A graph of the one node; its mask is kept, too."""
    graph = NodeGraph()
    optional = {} if mask is None else {"mask": graph.give(mask)}
    wires = {"model": model, "clip": tiny_clip.clip(), "latent": {"samples": latent}}
    given = {name: graph.give(thing) for name, thing in wires.items()}
    node = graph.add("PinpointStructureDetailEdit", **given, **optional, **{**WIDGETS, **widgets})
    graph.keep(node.out(1))
    return graph, graph.keep(node)


def parts(
    host: Host, model: Any, latent: Tensor, mask: Tensor | None, **changed: Any
) -> tuple[NodeGraph, Wire, Wire]:
    """The graph that a person would draw instead, and the wires of its latent and its mask."""
    graph, w = NodeGraph(), {**WIDGETS, **changed}
    model, clip, picture = (
        graph.give(thing) for thing in (model, tiny_clip.clip(), {"samples": latent})
    )
    source, target, empty = (
        graph.add("CLIPTextEncode", clip=clip, text=text)
        for text in (w["source_prompt"], w["target_prompt"], "")
    )
    sigmas = graph.add(
        "BasicScheduler", model=model, scheduler="simple", steps=w["steps"], denoise=1.0
    )
    search = dict(model=model, latent=picture, threshold=w["mask_threshold"], seed=w["seed"])
    if mask is not None:
        place = graph.give(mask)
    elif w["locator"] == "attention":
        prompts = {name: w[name] for name in ("source_prompt", "target_prompt")}
        search = {**defaults(host, "PinpointAttentionMask"), **search, **prompts}
        place = graph.add("PinpointAttentionMask", clip=clip, **search)
    else:
        search = {**defaults(host, "PinpointVelocityMask"), **search}
        place = graph.add("PinpointVelocityMask", source=source, target=target, **search)
    fused = dict(blocks=w["blocks"], start=w["detail_start"], end=w["detail_end"])
    detailed = w["detail_end"] > w["detail_start"]
    record = {**defaults(host, "PinpointRecordValues"), **fused}
    recording = graph.add("PinpointRecordValues", model=model, **record)
    way = graph.add(
        "PinpointInvert",
        **dict(model=recording if detailed else model, source=source, latent=picture),
        **dict(sigmas=sigmas, method=w["method"], guidance=1.0, gamma=0.5, seed=w["seed"]),
        measure_round_trip=False,
    )
    memory = dict(trajectory=way.out(2), mask=place, strength=1.0, trend="constant")
    editing = graph.add("PinpointInjectValues", model=model, **fused, **memory)
    guider = graph.add(
        "PinpointSourceTargetGuider",
        **dict(model=editing if detailed else model, source=source, target=target, negative=empty),
        **dict(source_guidance=1.0, target_guidance=w["guidance"], guidance_mode="auto"),
    )
    structure = dict(method=w["method"], start=0.0, end=w["structure_end"], anchor=True)
    edited = graph.add(
        "SamplerCustomAdvanced",
        noise=way.out(0),
        guider=guider,
        sampler=graph.add("PinpointStructureSampler", **memory, **structure),
        sigmas=sigmas,
        latent_image=picture,
    )
    graph.keep(place)
    return graph, graph.keep(edited), place


def values(done: Execution, *wires: Wire) -> list[Any]:
    return [done.value(*wire) for wire in wires]


@pytest.mark.parametrize("name", ["sd3_bare", "wan"])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"locator": "velocity", "method": "FireFlow"},
        {"detail_end": 0.0, "method": "Euler", "structure_end": 1.0, "guidance": 1.0},
        {"detail_start": 0.3, "detail_end": 0.9, "structure_end": 0.0, "mask_threshold": 0.6},
    ],
    ids=["as it comes", "velocity", "no detail", "no structure"],
)
def test_one_node_equals_its_parts(
    host: Host, tiny_model: TinyModel, name: str, changed: dict[str, Any]
) -> None:
    model, latent = tiny_model(name), latent_for(name)
    graph, node = one_node(model, latent, None, **changed)
    found = values(host.execute(graph.nodes), node, node.out(1))
    graph, edited, place = parts(host, model, latent, None, **changed)
    expected = values(host.execute(graph.nodes), edited, place)
    assert torch.equal(found[0]["samples"], expected[0]["samples"])
    assert torch.equal(found[1], expected[1])
    inside = (torch.nn.functional.avg_pool2d(found[1], 8) > 0).expand_as(latent)
    assert torch.equal(found[0]["samples"][~inside], latent[~inside])
    assert (found[0]["samples"] - latent)[inside].abs().mean() > 0.01


def test_a_connected_mask_takes_the_place_of_the_search(host: Host, tiny_model: TinyModel) -> None:
    """And with it the prompts may be anything."""
    model, latent = tiny_model("sd3_bare"), latent_for("sd3_bare")
    graph, node = one_node(model, latent, left_half(latent), source_prompt="", target_prompt="")
    found = values(host.execute(graph.nodes), node, node.out(1))
    prompts = dict(source_prompt="", target_prompt="")
    graph, edited, _ = parts(host, model, latent, left_half(latent), **prompts)
    (expected,) = values(host.execute(graph.nodes), edited)
    assert torch.equal(found[0]["samples"], expected["samples"])
    assert torch.equal(found[1], left_half(latent))


def test_changed_widgets_keep_what_they_do_not_change_in_the_cache(
    host: Host, tiny_model: TinyModel
) -> None:
    calls = Calls(tiny_model("sd3_bare"))
    # The mask is grown, and of a tiny picture a warmer one would leave nothing outside.
    graph, node = one_node(calls.model, latent_for("sd3_bare"), None, mask_threshold=0.95)
    widgets = graph.nodes[graph.find("PinpointStructureDetailEdit")]["inputs"]
    executor = host.new_executor()
    first = host.execute(graph.nodes, executor).value(*node)["samples"]
    # Two prompts at four levels for the mask, two calls a step for each way.
    assert len(calls.sigmas) == 2 * 4 + 2 * 4 + 2 * 4
    for name, value, again in (
        ("guidance", 3.0, 8),
        ("structure_end", 0.2, 8),
        ("mask_threshold", 0.6, 8 + 8),
        ("detail_end", 0.8, 8 + 8),
    ):
        calls.sigmas.clear()
        before, widgets[name] = widgets[name], value
        assert not torch.equal(host.execute(graph.nodes, executor).value(*node)["samples"], first)
        assert len(calls.sigmas) == again, name
        widgets[name] = before
        assert torch.equal(host.execute(graph.nodes, executor).value(*node)["samples"], first)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"target_prompt": SOURCE}, "say the same, so there is nothing to locate"),
        ({"blocks": "single"}, "blocks has 'single', which SD3 has not"),
        ({"detail_start": 0.3, "detail_end": 0.3, "blocks": "none"}, None),
    ],
    ids=["same prompts", "blocks", "no detail, any blocks"],
)
def test_errors_of_parts_are_errors_of_the_node(
    host: Host, tiny_model: TinyModel, changed: dict[str, Any], says: str | None
) -> None:
    graph, _ = one_node(tiny_model("sd3_bare"), latent_for("sd3_bare"), None, **changed)
    if says is None:
        host.execute(graph.nodes)
        return
    with pytest.raises(PromptFailed, match=says):
        host.execute(graph.nodes)
