"""Whole edits with models that ComfyUI's own nodes have changed, against the written-out loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from host import foreign, stock
from host.edits import Edit, latent_for, left_half

TOLERANCE = 2e-4

TinyModel = Callable[[str], Any]

WINDOWS: dict[str, Any] = dict(
    context_length=3,
    context_overlap=1,
    context_schedule="standard_static",
    context_stride=1,
    closed_loop=False,
    fuse_method="pyramid",
    dim=2,
    freenoise=False,
    cond_retain_index_list="",
    split_conds_to_windows=False,
)
CHANGES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "another shift of SD3": ("sd3", foreign.node("ModelSamplingSD3", shift=1.3)),
    "another shift of Flux": (
        "flux",
        foreign.node("ModelSamplingFlux", max_shift=1.5, base_shift=0.5, width=64, height=64),
    ),
    "a LoRA": ("sd3", foreign.lora),
    "hooks on both sides of the guidance": (
        "sd3",
        lambda model: foreign.before_cfg(foreign.after_cfg(foreign.cfg_function(model))),
    ),
    "context windows": ("wan", foreign.node("ContextWindowsManual", **WINDOWS)),
}


@pytest.mark.parametrize(("name", "change"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("method", ["FlowEdit", "FocusFlow as published"])
def test_edits_follow_what_other_nodes_did_to_the_model(
    tiny_model: TinyModel, name: str, change: Callable[[Any], Any], method: str
) -> None:
    latent = latent_for(name, 1)
    if name == "wan":
        latent = latent.repeat(1, 1, 3, 1, 1) + 0.3 * torch.arange(6).view(1, 1, 6, 1, 1)
    edit = Edit(change(tiny_model(name)), latent, method, n_min=1)
    found = edit.run()
    assert (found - edit.written_out()).abs().max() <= TOLERANCE
    assert (found - edit.having(model=tiny_model(name)).run()).abs().max() > 0.01


# EasyCache needs a DIFFUSION_MODEL wrapper, which ComfyUI's SD3 does not have.
@pytest.mark.parametrize(
    ("name", "cache"), [("sd3", "LazyCache"), ("flux", "LazyCache"), ("flux", "EasyCache")]
)
@pytest.mark.parametrize("n_min", [0, 2])
def test_step_caches_run_along(tiny_model: TinyModel, name: str, n_min: int, cache: str) -> None:
    """With nothing to reuse they change nothing; reusing, they keep the outside of the mask."""
    plain = Edit(tiny_model(name), n_min=n_min)
    edit = plain.having(mask=left_half(plain.latent))

    def cached(threshold: float) -> Tensor:
        widgets = dict(start_percent=0.0, end_percent=1.0, verbose=False)
        model = stock.call(cache, model=edit.model, reuse_threshold=threshold, **widgets)[0]
        return edit.having(model=model).run()

    assert (cached(0.0) - edit.run()).abs().max() <= TOLERANCE
    reused = cached(3.0)
    assert (reused - edit.run()).abs().max() > 0.01
    assert torch.equal(reused[..., 4:], edit.latent[..., 4:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_latents_of_other_dtypes_keep_their_values(
    tiny_model: TinyModel, dtype: torch.dtype
) -> None:
    """ComfyUI's samplers return float32; what did not move is the same number in it."""
    latent = latent_for("sd3").to(dtype)
    edited = Edit(tiny_model("sd3"), latent, mask=left_half(latent)).run()
    assert edited.dtype == torch.float32
    assert torch.equal(edited[..., 4:], latent[..., 4:].float())
