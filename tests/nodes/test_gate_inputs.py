"""FlexIP Gate's inputs: what each makes of gamma, and what is refused."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from host import stock
from host.inprocess import Host

pytestmark = pytest.mark.usefixtures("host")

WIDGETS = dict(shape="linear", first=0.2, last=0.8, values="0.1, 0.5; 0.3", blocks="all")


def gate(**changes: Any) -> Any:
    (made,) = stock.call("PinpointFlexIPGate", **{**WIDGETS, **changes})
    return made


def over(gate: Any, *progress: float) -> list[float]:
    ((_, schedule),) = gate.groups
    return [schedule.at(place) for place in progress]


def test_shapes_go_from_first_to_last() -> None:
    assert over(gate(), 0, 0.5, 1) == pytest.approx([0.2, 0.5, 0.8])
    assert over(gate(shape="constant"), 0, 1) == [0.2, 0.2]
    assert over(gate(shape="list"), 0, 0.25, 0.5, 1) == pytest.approx([0.1, 0.3, 0.5, 0.3])


@pytest.mark.parametrize(
    "floats",
    [[0.9, 0.1, 0.5], (0.9, 0.1, 0.5), np.array([0.9, 0.1, 0.5]), torch.tensor([0.9, 0.1, 0.5])],
    ids=["list", "tuple", "array", "tensor"],
)
def test_floats_of_another_node_replace_the_shape(floats: Any) -> None:
    assert over(gate(floats=floats), 0, 0.25, 0.5, 1) == pytest.approx([0.9, 0.5, 0.1, 0.5])


@pytest.mark.parametrize("number", [0.4, torch.tensor(0.4)])
def test_one_number_stays(number: Any) -> None:
    assert over(gate(floats=number), 0, 1) == pytest.approx([0.4, 0.4])


def test_lists_come_under_two_names(host: Host) -> None:
    node: Any = host.nodes["PinpointFlexIPGate"]
    (floats,) = (i for i in node.GET_SCHEMA().inputs if i.id == "floats")
    assert floats.get_io_type() == "FLOATS,FLOAT"


def test_a_drawn_curve_replaces_the_shape() -> None:
    points = {"points": [[0.0, 0.0], [0.5, 1.0], [1.0, 0.5]], "interpolation": "linear"}
    (curve,) = stock.call("CurveEditor", curve=points)
    assert over(gate(curve=curve), 0, 0.25, 0.5, 1) == pytest.approx([0, 0.5, 1, 0.5], abs=0.02)


def test_a_gate_for_some_blocks_extends_another(pack: ModuleType) -> None:
    made = gate(blocks="joint 0", shape="constant", others=gate(shape="constant", first=0.7))
    assert isinstance(made, pack.nodes.host.gates.Gate)
    assert [(names, schedule.at(0.5)) for names, schedule in made.groups] == [
        ("all", 0.7),
        ("joint 0", 0.2),
    ]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            dict(shape="list", values="0.1, much"),
            "values is '0.1, much': write numbers from 0 to 1",
        ),
        (dict(shape="list", values=" "), "values is empty: give at least one number"),
        (dict(shape="list", values="0.1, 1.5"), "values holds 1.5: gamma is a number from 0 to 1"),
        (dict(floats=[]), "floats is empty: give at least one number from 0 to 1"),
        (dict(floats=[0.1, float("nan")]), "floats holds nan: gamma is a number from 0 to 1"),
        (dict(floats=[None]), r"floats is \[None\], which is no list of numbers: connect numbers"),
        (dict(floats=[[0.1], [0.2, 0.3]]), "which is no list of numbers"),
        (dict(floats="much"), r"floats is \['much'\], which is no list of numbers"),
        (dict(floats=-0.5), "floats holds -0.5: gamma is a number from 0 to 1"),
        (dict(floats=0.5, curve=object()), "curve and floats are both connected: disconnect one"),
    ],
)
def test_what_is_no_gamma_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        gate(**changes)
