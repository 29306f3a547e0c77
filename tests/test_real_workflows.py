"""The example workflows of models that do not ship: with their links, and run on stand-ins."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Iterator

import numpy as np
import pytest

from host import stand_ins
from host.base import make_base
from host.cases import PORTRAIT, drawn_case, png
from host.inprocess import Host
from host.options import REAL_WEIGHTS
from host.server import Server
from host.workflows import load, run

every = pytest.mark.parametrize("name", REAL_WEIGHTS)
KINDS = {
    "s2edit_sd15": {"source", "edit", "reconstruction"},
    "s2edit_sdxl": {"source", "edit", "reconstruction"},
    "flexip_ip_adapter_sd15": {"subject", "edit"},
}
"""What the workflows save, but for those that find a mask."""


@pytest.fixture(scope="module")
def server(
    host: Host,  # noqa: ARG001
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """A server that has tiny stand-ins for the models."""
    base = make_base(tmp_path_factory.mktemp("stand_ins"), checkpoint=False)
    stand_ins.install(base)
    with Server(base, cpu=True) as server:
        server.upload_image(PORTRAIT, png(drawn_case(0).image))
        yield server
    # A gigabyte, which pytest would keep.
    shutil.rmtree(base)


@every
def test_models_can_be_downloaded(name: str) -> None:
    """ComfyUI offers a download for `models` whose name is a widget's value."""
    models = [
        (model, node["widgets_values"])
        for node in load(name)["nodes"]
        for model in node["properties"].get("models", ())
    ]
    assert len(models) == len(REAL_WEIGHTS[name])
    (note,) = (node for node in load(name)["nodes"] if node["type"] == "MarkdownNote")
    for model, values in models:
        assert model["name"] in values
        assert model["url"].startswith("https://huggingface.co/")
        assert model["url"].endswith(f"/{model['name']}")
        assert f"]({model['url']})" in note["widgets_values"][0]
        assert f"*models/{model['directory']}*" in note["widgets_values"][0]


@every
def test_only_the_weights_are_missing(server: Server, host: Host, name: str) -> None:
    import execution

    (host.base / "input" / PORTRAIT).write_bytes(png(drawn_case(0).image))
    graph = server.convert(load(name))
    # The picture is saved without any model, so ComfyUI would run the graph for that alone.
    (edit,) = (i for i, node in graph.items() if "pinpoint/edit" in node["inputs"].values())
    valid, *_, errors = asyncio.run(execution.validate_prompt("check", graph, [edit]))
    reasons = [
        (reason["type"], reason["extra_info"]["input_name"])
        for entry in errors.values()
        for reason in entry["errors"]
    ]
    assert not valid
    assert sorted(reasons) == sorted(("value_not_in_list", i) for i in REAL_WEIGHTS[name])


@every
def test_workflow_runs_on_stand_ins(server: Server, name: str) -> None:
    saved = run(server, name, stand_ins.shorten)
    assert saved.keys() == KINDS.get(name, {"source", "edit", "mask"})
    for kind, picture in saved.items():
        # A reference is no part of the picture and keeps its size.
        assert kind == "subject" or picture.shape == (stand_ins.SIDE, stand_ins.SIDE, 3)
        assert picture.std() > 2
    others = (picture for kind, picture in saved.items() if kind != "edit")
    assert not any(np.array_equal(saved["edit"], other) for other in others)
    log = server.log.read_text("utf-8", errors="replace")
    # Of weights that do not fit, and of pictures that are not finite.
    assert not re.search("(?i)missing|unexpected|left over|invalid value", log)
