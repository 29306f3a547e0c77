"""The two-prompt guider against ComfyUI's own, asked twice: one prompt and one latent at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from host import foreign, stock
from host.edits import latent_for

# Velocities are of a few units; batches of other sizes add in another order, and dividing by
# sigma and scaling by guidance enlarges that.
TOLERANCE = 5e-5
FLOW_MODELS = ("sd3", "sd3_bare", "sd35", "flux", "flux2", "schnell", "wan")

# ComfyUI's SD3 has no DIFFUSION_MODEL wrapper.
HOOKED = [
    pytest.param(name, hook, id=f"{name}-{kind}")
    for kind, hook in foreign.HOOKS.items()
    for name in ("sd3", "flux")
    if (name, kind) != ("sd3", "DIFFUSION_MODEL")
]

TinyModel = Callable[[str], Any]


@dataclass
class Case:
    """Two prompts at two latents: what a step of an edit asks."""

    source: stock.Conditioning
    target: stock.Conditioning
    negative: stock.Conditioning
    source_x: Tensor
    target_x: Tensor
    sigma: float = 0.7
    source_guidance: float = 1.5
    target_guidance: float = 4.0

    def ours(self, pack: ModuleType, model: Any, mode: str = "cfg") -> tuple[Tensor, Tensor]:
        """Velocities (target, source) by the guider of the pack."""
        guider = pack.nodes.host.guiding.SourceTargetGuider(
            model,
            self.source,
            self.target,
            self.negative,
            self.source_guidance,
            self.target_guidance,
            mode,
        )
        return stock.inside(
            guider,
            self.target_x,
            lambda guider, args: guider.velocities(self.target_x, self.source_x, self.sigma, args),
        )

    def stocks(self, model: Any) -> tuple[Tensor, Tensor]:
        """The same by ComfyUI's guider, one after the other."""
        asked = (
            (self.target, self.target_guidance, self.target_x),
            (self.source, self.source_guidance, self.source_x),
        )
        target, source = (
            stock.velocity(model, prompt, self.negative, cfg, x, self.sigma)
            for prompt, cfg, x in asked
        )
        return target, source

    def assert_same(self, pack: ModuleType, model: Any, witness: Any = None) -> None:
        """Both ways give the same velocities."""
        expected = self.stocks(model if witness is None else witness)
        for name, found, wanted in zip(
            ("target", "source"), self.ours(pack, model), expected, strict=True
        ):
            assert torch.isfinite(found).all(), name
            error = (found - wanted).abs().max().item()
            assert error <= TOLERANCE, f"{name}: {error:.1e}"


def case(name: str = "sd3", batch: int = 2, size: tuple[int, int] = (8, 8), **changes: Any) -> Case:
    source_x, target_x = (latent_for(name, batch, *size, seed=seed) for seed in (11, 12))
    prompts = {
        "source": stock.conditioning(1),
        "target": stock.conditioning(2),
        "negative": stock.conditioning(3),
    }
    return Case(**{**prompts, "source_x": source_x, "target_x": target_x, **changes})


@pytest.mark.parametrize("name", FLOW_MODELS)
@pytest.mark.parametrize(("batch", "size"), [(1, (8, 8)), (2, (6, 11)), (5, (7, 5))], ids=str)
def test_each_prompt_is_asked_at_its_own_latent(
    pack: ModuleType, tiny_model: TinyModel, name: str, batch: int, size: tuple[int, int]
) -> None:
    case(name, batch, size).assert_same(pack, tiny_model(name))


@pytest.mark.parametrize(
    ("source_guidance", "target_guidance"),
    [(1.0, 1.0), (1.0, 5.0), (3.5, 1.0), (0.0, 2.0), (13.5, 13.5)],
    ids=str,
)
def test_every_pair_of_guidances(
    pack: ModuleType, tiny_model: TinyModel, source_guidance: float, target_guidance: float
) -> None:
    guided = case(source_guidance=source_guidance, target_guidance=target_guidance)
    guided.assert_same(pack, tiny_model("sd3"))


@pytest.mark.parametrize("sigma", [1.0, 0.3, 0.02])
def test_every_noise_level(pack: ModuleType, tiny_model: TinyModel, sigma: float) -> None:
    case(sigma=sigma).assert_same(pack, tiny_model("flux"))


@pytest.mark.parametrize(("name", "hook"), HOOKED)
def test_hooks_of_other_packs_act_on_both_branches(
    pack: ModuleType, tiny_model: TinyModel, name: str, hook: Callable[[Any], Any]
) -> None:
    plain, hooked = tiny_model(name), hook(tiny_model(name))
    example = case(name)
    for without, with_hook in zip(example.stocks(plain), example.stocks(hooked), strict=True):
        assert (without - with_hook).abs().max() > 0.01, "the example does nothing"
    example.assert_same(pack, hooked)


def test_all_hooks_at_once(pack: ModuleType, tiny_model: TinyModel) -> None:
    model = tiny_model("flux")
    for name, hook in foreign.HOOKS.items():
        # It would take the place of the other cfg function.
        if name != "RescaleCFG":
            model = hook(model)
    case("flux").assert_same(pack, model)


@pytest.mark.parametrize("change", foreign.PROMPTS.values(), ids=foreign.PROMPTS)
@pytest.mark.parametrize("branches", ["source", "target", "source target", "negative"])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_prompts_with_controls_areas_masks_and_ranges(
    pack: ModuleType,
    tiny_model: TinyModel,
    name: str,
    branches: str,
    change: Callable[[stock.Conditioning], stock.Conditioning],
) -> None:
    example, model = case(name), tiny_model(name)
    plain = example.stocks(model)
    for branch in branches.split():
        setattr(example, branch, change(getattr(example, branch)))
    changed = example.stocks(model)
    assert any((a - b).abs().max() > 0.01 for a, b in zip(plain, changed, strict=True))
    example.assert_same(pack, model)


def test_prompts_of_several_parts(pack: ModuleType, tiny_model: TinyModel) -> None:
    parts = [*stock.conditioning(4), *stock.conditioning(5), *stock.conditioning(6)]
    weighted = stock.with_values(parts, strength=0.4)
    case(target=weighted, negative=parts).assert_same(pack, tiny_model("sd3"))


def test_patches_see_only_the_two_indices_they_know(
    pack: ModuleType, tiny_model: TinyModel
) -> None:
    seen = []

    def record(executor: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        options = args[5]
        seen.append((options["cond_or_uncond"], len(options["uuids"]), len(args[0])))
        return executor(*args, **kwargs)

    model = tiny_model("sd3").clone()
    model.add_wrapper_with_key("apply_model", "recorder", record)
    case(batch=3).ours(pack, model)
    assert seen == [([1, 0, 1, 0], 4, 12)]


@pytest.mark.parametrize("name", ["flux", "schnell"])
def test_embedded_guidance_is_a_number_for_the_model(
    pack: ModuleType, tiny_model: TinyModel, name: str
) -> None:
    """Flux.1-dev is asked once a prompt, with its number; schnell has none, so it is guided."""
    model, example = tiny_model(name), case(name)
    if name == "flux":
        witness = case(
            name,
            source=stock.with_values(example.source, guidance=1.5),
            target=stock.with_values(example.target, guidance=4.0),
            source_guidance=1.0,
            target_guidance=1.0,
        )
        assert (witness.stocks(model)[0] - example.stocks(model)[0]).abs().max() > 0.01
    else:
        witness = example
    found = example.ours(pack, model, "auto")
    for ours, theirs in zip(found, witness.stocks(model), strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE


def test_embedded_guidance_needs_no_negative(pack: ModuleType, tiny_model: TinyModel) -> None:
    example = case("flux", negative=None)
    without = example.ours(pack, tiny_model("flux"), "auto")
    for a, b in zip(without, case("flux").ours(pack, tiny_model("flux"), "auto"), strict=True):
        assert torch.equal(a, b)


def test_a_stock_sampler_follows_the_target_prompt_exactly(
    pack: ModuleType, tiny_model: TinyModel
) -> None:
    import comfy.samplers

    model, example = tiny_model("sd3"), case()
    ours = pack.nodes.host.guiding.SourceTargetGuider(
        model, example.source, example.target, example.negative, 1.5, 4.0
    )
    theirs = comfy.samplers.CFGGuider(model)
    theirs.set_conds(example.target, example.negative)
    theirs.set_cfg(4.0)
    sigmas = torch.tensor([0.8, 0.5, 0.2, 0.0])
    euler = comfy.samplers.sampler_object("euler")
    mask = torch.linspace(0, 1, 8).expand(1, 8, 8)
    for latent in (torch.zeros_like(example.source_x), example.source_x):
        for denoise_mask in (None, mask):
            sampled = [
                guider.sample(
                    example.target_x,
                    latent,
                    euler,
                    sigmas,
                    denoise_mask=denoise_mask,
                    disable_pbar=True,
                    seed=1,
                )
                for guider in (ours, theirs)
            ]
            # Where the mask is 0 ours gives the latent's own bits back, stock a rounded copy.
            inside = slice(None) if denoise_mask is None else slice(1, None)
            assert torch.equal(sampled[0][..., inside], sampled[1][..., inside])


def test_models_without_flow_are_refused(pack: ModuleType, tiny_model: TinyModel) -> None:
    with pytest.raises(ValueError, match=r"^model is SD15, which does not predict a flow velocity"):
        case().ours(pack, tiny_model("sd15"))


@pytest.mark.parametrize(("source", "target"), [(1.0, 4.0), (4.0, 1.0), (2.0, 2.0)], ids=str)
def test_guidance_without_a_negative_is_refused(
    pack: ModuleType, tiny_model: TinyModel, source: float, target: float
) -> None:
    lonely = case(negative=None, source_guidance=source, target_guidance=target)
    message = rf"^negative is not connected.*source guidance is {source:g}.*{target:g}.*connect"
    with pytest.raises(ValueError, match=message):
        lonely.ours(pack, tiny_model("sd3"))


def test_no_negative_is_needed_at_guidance_one(pack: ModuleType, tiny_model: TinyModel) -> None:
    lonely = case(negative=None, source_guidance=1.0, target_guidance=1.0)
    lonely.assert_same(pack, tiny_model("sd3"))
