"""Every widget of every node: what ComfyUI checks, and what reaches a node by wire unchecked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from host import flexips, identities, ip_adapters, stock, subjects, tiny_clip
from host.edits import picture_latent
from host.graphs import NodeGraph
from host.inprocess import Host
from host.node_ids import NODES
from host.prompts import PromptFailed, PromptRejected
from host.tapping import FAMILIES

TinyModel = Callable[[str], Any]

# Those that refuse flow models.
NOISE_PREDICTION = ("PinpointNullTextInversion", "PinpointNullTextGuider")
nodes = pytest.mark.parametrize("class_type", NODES)

# Small enough to run, where a widget's default is made for real models.
QUICK = {"steps": 4, "n_max": 3, "samples": 2, "inner_steps": 1, "token_steps": 1}
QUICK |= {"width": 64, "resolution": 64, "detail_depth": 1, "global_depth": 1, "text_depth": 1}
# What a person writes, and all of the two blocks that a tiny SD3 has.
TEXTS = {
    "source_prompt": "a red hat",
    "target_prompt": "a blue hat",
    "prompt": "photo of a person",
    "blocks": "all",
}


@pytest.fixture
def folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    host: Host,  # noqa: ARG001
) -> Callable[[str], Path]:
    """A function that makes an empty folder the only one of its kind below models."""
    import folder_paths

    def emptied(kind: str) -> Path:
        path = tmp_path / kind
        path.mkdir()
        entry: tuple[list[str], set[str]] = ([str(path)], set())
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, entry)
        monkeypatch.delitem(folder_paths.filename_list_cache, kind, raising=False)
        return path

    return emptied


@pytest.fixture(autouse=True)
def identity(pack: ModuleType, folder: Callable[[str], Path]) -> Any:
    """The only one in models/identities."""
    folder("identities")
    ann = identities.ann(pack)
    pack.nodes.host.identity_files.save(ann, "saved")
    return ann


@pytest.fixture(autouse=True)
def ip_adapters_folder(folder: Callable[[str], Path]) -> None:
    """One file in models/ipadapter."""
    ip_adapters.write(folder("ipadapter"), "small", ip_adapters.weights("global"))


@pytest.fixture
def flexip_things(
    pack: ModuleType,
    tiny_model: TinyModel,
    tmp_path: Path,
    folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """Adapters, subjects, encoders, and a folder to train from."""
    import folder_paths

    family = FAMILIES["SD3"]
    adapter = subjects.adapter(pack, tiny_model("sd3_bare"), family)
    subjects.save(pack, adapter, folder("flexip") / "saved.safetensors")
    flexips.folder(tmp_path / "input" / "flexip")
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path / "input"))
    return {
        "CLIP_VISION": flexips.encoder("dinov2"),
        "PINPOINT_ADAPTER": adapter,
        "PINPOINT_SUBJECT": subjects.subject(pack),
        "PINPOINT_GATE": pack.nodes.host.gates.constant(0.4),
        "FLOATS": [0.2, 0.4],
    }


@pytest.fixture
def things(
    identity: Any,
    tiny_model: TinyModel,
    demo: stock.Demo,
    noise_things: dict[str, Any],
    flexip_things: dict[str, Any],
    class_type: str,
) -> dict[str, Any]:
    """Something for every wire, by the wire's type or the input's name."""
    picture, latent = torch.rand(1, 64, 64, 3), {"samples": picture_latent()}
    model, sigmas = tiny_model("sd3_bare"), torch.linspace(1, 0, 5)
    recording = stock.call(
        "PinpointRecordValues",
        model=model,
        **dict(blocks="all", start=0.0, end=0.5, tokens="image", precision="fp16"),
        **dict(device="CPU", limit_gb=1.0),
    )[0]
    trajectory = stock.call(
        "PinpointInvert",
        model=recording,
        source=stock.conditioning(1),
        latent=latent,
        sigmas=sigmas,
        **dict(method="Euler", guidance=1.0, gamma=0.5, seed=0, measure_round_trip=False),
    )[2]
    return {
        "MODEL": model,
        "CLIP": tiny_clip.clip(),
        "VAE": demo.vae,
        "SIGMAS": sigmas,
        "PINPOINT_TRAJECTORY": trajectory,
        "PINPOINT_IDENTITY": identity,
        "HOOKS": stock.call("PinpointIdentityHook", model=model, identity=identity, strength=1.0)[
            0
        ],
        "source": stock.conditioning(1),
        "target": stock.conditioning(2),
        "negative": stock.conditioning(3),
        "LATENT": latent,
        "IMAGE": picture,
        "MASK": torch.ones(1, 64, 64),
        **flexip_things,
        **(noise_things if class_type in NOISE_PREDICTION else {}),
    }


@pytest.fixture(scope="module")
def noise_things(tiny_model: TinyModel) -> dict[str, Any]:
    """What nodes get in place of `things` that work with models that predict noise."""
    inputs = {
        "model": tiny_model("sdxl"),
        "source": stock.conditioning(1),
        "negative": stock.conditioning(3),
        "latent": {"samples": picture_latent(channels=4)},
        "sigmas": torch.tensor([2.0, 0.7, 0.0]),
    }
    tuning = dict(guidance=7.5, inner_steps=1, learning_rate=0.01, early_stop=1.0)
    trajectory = stock.call("PinpointNullTextInversion", **inputs, **tuning)[2]
    return {
        "MODEL": inputs["model"],
        "SIGMAS": inputs["sigmas"],
        "LATENT": inputs["latent"],
        "PINPOINT_TRAJECTORY": trajectory,
        "positive": inputs["source"],
    }


def inputs_of(host: Host, class_type: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Name, type and options of a node's inputs; the type of a list of choices is that list."""
    types = host.nodes[class_type].INPUT_TYPES()  # type: ignore[attr-defined]
    for group in ("required", "optional"):
        for name, (kind, *options) in types.get(group, {}).items():
            yield name, kind, options[0] if options else {}


def graph_of(host: Host, class_type: str, things: dict[str, Any]) -> NodeGraph:
    """A graph in which the node has all its inputs and works."""
    graph, inputs = NodeGraph(), {}
    for name, kind, options in inputs_of(host, class_type):
        if kind in ("INT", "FLOAT", "BOOLEAN", "COMBO", "STRING"):
            default = options.get("default", options.get("options", [None])[0])
            inputs[name] = {**QUICK, **TEXTS}.get(name, default)
        # Which takes the place of another input.
        elif kind != "CURVE":
            # An input may take several types.
            first = kind.split(",")[0]
            inputs[name] = graph.give(things[first if first in things else name])
    node = graph.add(class_type, **inputs)
    if class_type in ("PinpointEditSampler", "PinpointFlowSolver", "PinpointStructureSampler"):
        _sample_with(graph, things, sampler=node)
    elif class_type == "PinpointSourceTargetGuider":
        _sample_with(graph, things, guider=node)
    elif class_type in ("PinpointNullTextGuider", "PinpointPromptToPromptGuider"):
        euler = graph.add("KSamplerSelect", sampler_name="euler")
        _sample_with(graph, things, guider=node, sampler=euler)
    else:
        graph.keep(node)
    return graph


def _sample_with(graph: NodeGraph, things: dict[str, Any], **part: Any) -> None:
    model = graph.give(things["MODEL"])
    others = {
        "noise": lambda: graph.add("RandomNoise", noise_seed=1),
        "sigmas": lambda: graph.add(
            "BasicScheduler", model=model, scheduler="simple", steps=4, denoise=1.0
        ),
        "latent_image": lambda: graph.give(things["LATENT"]),
        "guider": lambda: graph.add(
            "PinpointSourceTargetGuider",
            model=model,
            **{name: graph.give(things[name]) for name in ("source", "target", "negative")},
            **dict(source_guidance=1.5, target_guidance=4.0, guidance_mode="auto"),
        ),
        "sampler": lambda: graph.add(
            "PinpointEditSampler",
            **dict(method="FocusFlow", n_max=3, n_min=0, n_avg=1, reanchor=False),
        ),
    }
    missing = {name: make() for name, make in others.items() if name not in part}
    graph.keep(graph.add("SamplerCustomAdvanced", **missing, **part))


def outcome(host: Host, graph: NodeGraph) -> str:
    """How a prompt ends: "success", or what is said."""
    try:
        host.execute(graph.nodes)
    except PromptRejected as rejected:
        return f"rejected: {rejected}"
    except PromptFailed as failed:
        return f"{failed.exception_type}: {failed.message}"
    return "success"


def numbers(host: Host, class_type: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The inputs that are numbers."""
    for name, kind, options in inputs_of(host, class_type):
        if kind in ("INT", "FLOAT"):
            yield name, kind, options


def beyond(kind: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """The nearest values outside a widget's range."""
    step = 1 if kind == "INT" else 0.01
    return options["min"] - step, options["max"] + step


def test_the_pack_has_these_nodes(pack: ModuleType) -> None:
    """So that a new node is added to the checks below."""
    assert {node.define_schema().node_id for node in pack.nodes.all_nodes} == set(NODES)


@nodes
def test_every_node_works_with_its_defaults(
    host: Host, things: dict[str, Any], class_type: str
) -> None:
    assert outcome(host, graph_of(host, class_type, things)) == "success"


@nodes
def test_every_number_has_a_range_and_every_input_and_output_a_tooltip(
    host: Host, class_type: str
) -> None:
    for name, _, options in inputs_of(host, class_type):
        assert options.get("tooltip"), name
    for name, kind, options in numbers(host, class_type):
        assert options["min"] <= options["default"] <= options["max"], (name, kind)
    schema = host.nodes[class_type].define_schema()  # type: ignore[attr-defined]
    assert all(output.tooltip for output in schema.outputs)
    assert schema.description
    assert schema.display_name
    assert schema.category.startswith("pinpoint/")


@nodes
def test_missing_inputs_are_named(host: Host, things: dict[str, Any], class_type: str) -> None:
    required = host.nodes[class_type].INPUT_TYPES()["required"]  # type: ignore[attr-defined]
    for name in required:
        graph = graph_of(host, class_type, things)
        del graph.nodes[graph.find(class_type)]["inputs"][name]
        assert outcome(host, graph).endswith(f"Required input is missing: {name}")


@nodes
def test_values_out_of_range_are_rejected_before_anything_runs(
    host: Host, things: dict[str, Any], class_type: str
) -> None:
    for name, kind, options in numbers(host, class_type):
        for value in (*beyond(kind, options), -(10**30), 10**30):
            graph = graph_of(host, class_type, things)
            graph.nodes[graph.find(class_type)]["inputs"][name] = value
            said = outcome(host, graph)
            assert said.startswith("rejected: "), f"{name} = {value}: {said}"
            assert name in said


@nodes
@pytest.mark.parametrize("by_wire", [False, True], ids=["typed", "by wire"])
def test_no_number_may_be_nan(
    host: Host, things: dict[str, Any], class_type: str, by_wire: bool
) -> None:
    """Python's JSON reader takes NaN, and ComfyUI's range checks let it through."""
    found = {}
    for name, kind, _ in numbers(host, class_type):
        if kind == "INT":
            continue
        graph = graph_of(host, class_type, things)
        value = graph.give(math.nan) if by_wire else math.nan
        graph.nodes[graph.find(class_type)]["inputs"][name] = value
        found[name] = outcome(host, graph)
    wrong = {
        name: said
        for name, said in found.items()
        if not said.startswith(f"ValueError: {name} is nan: ")
    }
    assert not wrong


@nodes
@pytest.mark.timeout(60)
def test_values_out_of_range_by_wire_are_refused_in_a_sentence(
    host: Host, things: dict[str, Any], class_type: str
) -> None:
    """ComfyUI checks the range of typed values only."""
    wrong = {}
    for name, kind, options in numbers(host, class_type):
        for value in (*beyond(kind, options), *([math.inf] if kind == "FLOAT" else [])):
            graph = graph_of(host, class_type, things)
            graph.nodes[graph.find(class_type)]["inputs"][name] = graph.give(value)
            said = outcome(host, graph)
            if not said.startswith(f"ValueError: {name} is {value:g}"):
                wrong[f"{name} = {value}"] = said
    assert not wrong


@nodes
def test_unknown_choices_by_wire_are_refused_in_a_sentence(
    host: Host, things: dict[str, Any], class_type: str
) -> None:
    for name, kind, _ in inputs_of(host, class_type):
        if kind != "COMBO":
            continue
        graph = graph_of(host, class_type, things)
        graph.nodes[graph.find(class_type)]["inputs"][name] = graph.give("something else")
        assert outcome(host, graph).startswith(f"ValueError: {name} is something else")
