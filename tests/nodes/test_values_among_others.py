"""Recorded and injected values among other prompts, injections and packs: none of it is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from host import foreign, stock
from host.edits import latent_for, left_half, patcher_state, picture_latent
from host.inversions import (
    FLOWS,
    Inversion,
    edit_guider,
    inversion_for,
    recording,
    sample,
    solver,
    velocity,
)
from host.inversions import injecting as inject
from host.recordings import LEVEL, in_windows, recorded, source, target

TinyModel = Callable[[str], Any]
models = pytest.mark.parametrize("name", FLOWS)


@models
def test_a_recorder_elsewhere_and_all_originals_are_as_before(
    tiny_model: TinyModel, name: str
) -> None:
    model, x = tiny_model(name), latent_for(name, 1, 8, 8, seed=4)
    before, state = velocity(model, target(), x, 0.6), patcher_state(model)
    marked = recording(model)
    assert torch.equal(velocity(marked, target(), x, 0.6), before)
    job = inversion_for(marked, name, method="Euler")
    state_of_marked = patcher_state(marked)
    trajectory = job.having(measure_round_trip=True).run()[2]
    plain = job.having(model=model).run()[2]
    assert torch.equal(plain.latents, trajectory.latents)
    assert plain.values is None
    kept = trajectory.values.bytes
    assert patcher_state(marked) == state_of_marked
    sample(marked, job.latent, solver("Euler"), sigmas=job.sigmas)
    assert trajectory.values.bytes == kept
    injected = inject(model, trajectory, left_half(job.latent))
    assert not torch.equal(velocity(injected, target(), x, 0.6), before)
    assert torch.equal(velocity(model, target(), x, 0.6), before)
    assert patcher_state(model) == state


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        *(("sd3", hook) for hook in ("optimized_attention_override", "LoRA", "APPLY_MODEL")),
        *(("flux", hook) for hook in ("optimized_attention_override", "LoRA", "DIFFUSION_MODEL")),
    ],
)
def test_hooks_of_other_packs_act_before_and_after(
    tiny_model: TinyModel, name: str, hook: str
) -> None:
    plain, install = tiny_model(name), foreign.HOOKS[hook]
    model = install(plain)
    trajectory, x, sigma = recorded(model, name)
    own = velocity(model, source(), x, sigma)
    assert torch.equal(velocity(inject(model, trajectory), source(), x, sigma), own)
    before = velocity(inject(model, trajectory), target(), x, sigma)
    after = velocity(install(inject(plain, trajectory)), target(), x, sigma)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-5)
    without = velocity(inject(plain, trajectory), target(), x, sigma)
    assert (before - without).abs().max() > 0.01


def test_of_two_recorders_the_last_one_counts(tiny_model: TinyModel) -> None:
    model = tiny_model("flux")
    twice = recording(recording(model, blocks="double"), blocks="single", precision="fp16")
    kept = inversion_for(twice, "flux", method="Euler").run()[2].values.kept
    assert [str(block) for block, _ in kept] == ["single 0"]
    assert {k.values.dtype for levels in kept.values() for k in levels.values()} == {torch.float16}


def test_injections_add_up(tiny_model: TinyModel) -> None:
    model = tiny_model("flux")
    trajectory, x, sigma = recorded(model, "flux")
    left = left_half(x)
    upper = left.mT.contiguous()
    chained = inject(inject(model, trajectory, left), trajectory, upper)
    together = inject(model, trajectory, left * upper)
    assert torch.equal(*(velocity(m, target(), x, sigma) for m in (chained, together)))
    chained = inject(inject(model, trajectory, blocks="double"), trajectory, blocks="single")
    together = inject(model, trajectory)
    assert torch.equal(*(velocity(m, target(), x, sigma) for m in (chained, together)))


def test_context_windows_have_values_of_their_own(tiny_model: TinyModel) -> None:
    model = in_windows(tiny_model("wan"), 2, 1)
    job = Inversion(recording(model), picture_latent(1, 3, 8, 8), method="Euler")
    trajectory = job.run()[2]
    x, sigma = trajectory.latents[LEVEL].clone(), trajectory.sigmas[LEVEL]
    injected = inject(model, trajectory)
    own = velocity(model, source(), x, sigma)
    assert torch.equal(velocity(injected, source(), x, sigma), own)
    other = velocity(injected, target(), x, sigma)
    assert (other - velocity(model, target(), x, sigma)).abs().max() > 0.01
    assert {window for _block, window in trajectory.values.kept} == {(0, 1), (1, 2)}
    says = "no attention values of layer 0 for {}: give .* the same context windows"
    with pytest.raises(ValueError, match=says.format("all frames at once")):
        velocity(inject(tiny_model("wan"), trajectory), target(), x, sigma)
    wide = in_windows(tiny_model("wan"), 2, 0, "batched")
    with pytest.raises(ValueError, match=says.format("frames 2")):
        velocity(inject(wide, trajectory), target(), x, sigma)


def test_the_source_branch_of_an_edit_keeps_its_own(tiny_model: TinyModel) -> None:
    model = tiny_model("sd3")
    trajectory, x, _ = recorded(model, "sd3")
    guider = edit_guider(inject(model, trajectory), source(), target())
    latents = latent_for("sd3", seed=4), x

    def look(guider: Any, extra_args: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return guider.velocities(*latents, 0.6, extra_args)

    found = stock.inside(guider, x, look)
    expected = (
        velocity(inject(model, trajectory), target(), latents[0], 0.6),
        velocity(model, source(), x, 0.6),
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (velocity(inject(model, trajectory), source(), x, 0.6) - found[1]).abs().max() > 0.01


def test_a_negative_prompt_gets_the_values_too(tiny_model: TinyModel) -> None:
    model, negative = tiny_model("sd3"), stock.conditioning(3)
    trajectory, x, sigma = recorded(model, "sd3")
    injected = inject(model, trajectory)
    found = stock.velocity(injected, target(), negative, 3.0, x, sigma)
    wanted, unwanted = (velocity(injected, p, x, sigma) for p in (target(), negative))
    expected = unwanted + 3.0 * (wanted - unwanted)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
