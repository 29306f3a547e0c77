"""Which body of a kernel runs, and what is said of it."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

device = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def bodies(pack: ModuleType, caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    """The module, as if it had said nothing yet."""
    module: Any = importlib.import_module(f"{pack.__name__}.kernels.bodies")
    caplog.set_level(logging.INFO, logger=module.__name__)
    for said in (module._warned, module._told, module._installed):
        said.cache_clear()
    yield module
    module._installed.cache_clear()


@pytest.fixture
def few(pack: ModuleType) -> Callable[..., Tensor]:
    """A kernel with two bodies, on tensors that both can take unless others are given."""
    tokens = importlib.import_module(f"{pack.__name__}.kernels.tokens")
    kept = torch.arange(6.0, device=device).view(1, 3, 2)

    def run(given: Tensor = kept) -> Tensor:
        return tokens.gathered(given, torch.tensor([2, 0], device=given.device))

    return run


@pytest.fixture
def triton_runs(pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by a name with every kernel whose Triton body runs."""
    pytest.importorskip("triton")
    found = []
    for name in ("attention", "blending", "flow", "masks", "tokens"):
        module = importlib.import_module(f"{pack.__name__}.kernels.triton_bodies.{name}")
        for function in vars(module).copy():
            if function in CALLS:
                real = getattr(module, function)

                def counted(*args: Any, real: Any = real, function: str = function) -> Any:
                    found.append(function)
                    return real(*args)

                monkeypatch.setattr(module, function, counted)
    return found


X = torch.ones(1, 2, 3, 4, device=device)
GROUP, WEIGHT = torch.ones(3, 1, device=device), torch.ones(1, 3, device=device)
INDEX = torch.tensor([1], device=device)
CALLS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "attention_to": ("attention", (X, X, GROUP, 1.0)),
    "attention_from": ("attention", (X, X, 1.0)),
    "blend_into": ("attention", (X.clone(), X, WEIGHT)),
    "moved": ("flow", (X, [(X, X, 1)], X, 1.0, 1)),
    "velocity_difference": ("masks", (X, X)),
    "gathered": ("tokens", (X[0], INDEX)),
    "scattered": ("tokens", (X[0, :, :1], X[0], INDEX)),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_switch_chooses_the_body_of_every_kernel(
    pack: ModuleType, monkeypatch: pytest.MonkeyPatch, triton_runs: list[str], name: str
) -> None:
    module, given = CALLS[name]
    kernel = getattr(importlib.import_module(f"{pack.__name__}.kernels.{module}"), name)
    for chosen, expected in ((None, []), ("", []), ("torch", []), ("triton", [name])):
        monkeypatch.delenv("PINPOINT_KERNELS", raising=False)
        if chosen is not None:
            monkeypatch.setenv("PINPOINT_KERNELS", chosen)
        kernel(*given)
        assert triton_runs == expected


def test_masks_and_many_groups_are_left_to_torch(
    pack: ModuleType, monkeypatch: pytest.MonkeyPatch, triton_runs: list[str]
) -> None:
    monkeypatch.setenv("PINPOINT_KERNELS", "triton")
    kernels, mask = pack.kernels.attention, torch.ones_like(X[0, 0, :, :3], dtype=torch.bool)
    kernels.attention_to(X, X, GROUP, 1.0, mask)
    kernels.attention_from(X, X, 1.0, mask)
    kernels.attention_to(X, X, GROUP.expand(3, kernels.most_groups + 1), 1.0)
    assert not triton_runs
    kernels.attention_to(X, X, GROUP.expand(3, kernels.most_groups), 1.0)
    assert triton_runs


def test_an_unknown_body_is_refused(
    bodies: Any, few: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(bodies.variable, "cuda")
    with pytest.raises(ValueError, match="PINPOINT_KERNELS is cuda, but kernels have two bodies"):
        few()


def test_without_triton_torch_runs_and_that_is_said_once(
    bodies: Any,
    few: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(bodies.variable, "triton")
    for name in [n for n in sys.modules if n.split(".")[0] == "triton" or "triton_bodies" in n]:
        monkeypatch.delitem(sys.modules, name)
    # None stands for a module that cannot be found.
    monkeypatch.setitem(sys.modules, "triton", None)
    assert few().tolist() == few().tolist() == [[[4, 5], [0, 1]]]
    assert caplog.messages == [
        "Pinpoint: PINPOINT_KERNELS is triton, but triton is not installed, so torch runs instead"
    ]


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ({"device": "cpu"}, "not on a GPU"),
        ({"dtype": torch.float64}, "torch.float64"),
        ({"requires_grad": True}, "gradients are asked for"),
    ],
    ids=str,
)
def test_tensors_that_triton_cannot_take_are_torchs(
    bodies: Any,
    few: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    triton_runs: list[str],
    made: dict[str, Any],
    reason: str,
) -> None:
    monkeypatch.setenv(bodies.variable, "triton")
    if "device" in made:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for _ in range(2):
        few(torch.ones(1, 3, 2, **{"device": device, **made}))
    assert not triton_runs
    (message,) = caplog.messages
    assert reason in message


def test_that_triton_runs_is_said_once(
    bodies: Any,
    few: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    triton_runs: list[str],
) -> None:
    monkeypatch.setenv(bodies.variable, "triton")
    assert few().tolist() == few().tolist() == [[[4, 5], [0, 1]]]
    assert triton_runs == ["gathered"] * 2
    assert caplog.messages == [
        "Pinpoint: PINPOINT_KERNELS is triton, so kernels run their Triton bodies"
    ]
