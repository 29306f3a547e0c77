"""Laws 2 and 9 for adapters: nothing of other packs is lost, nothing stays after an error."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from host import foreign, stock, subjects
from host.edits import picture_latent
from host.tapping import FAMILIES, Family, each_of

TinyModel = Callable[[str], Any]

OTHERS = {
    "LoRA": foreign.lora,
    "model function wrapper": foreign.model_function_wrapper,
    "attention override": foreign.attention_override,
    "apply_model": foreign.wrapper("apply_model"),
    "calc_cond_batch": foreign.wrapper("calc_cond_batch"),
    "predict_noise": foreign.wrapper("predict_noise"),
    "after cfg": foreign.after_cfg,
}
others = pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
two_families = each_of("SD3", "Flux")


@pytest.fixture
def apply(pack: ModuleType) -> Callable[..., Any]:
    """A function that applies an adapter made for a family to a model."""

    def apply(model: Any, family: Family, seed: int = 0, **settings: Any) -> Any:
        adapter = subjects.adapter(pack, model, family)
        given = subjects.settings(pack, **settings)
        subject = subjects.subject(pack, seed=seed)
        return pack.nodes.host.adapting.applied(model, adapter, subject, given)

    return apply


@two_families
@others
def test_other_packs_act_before_and_after(
    apply: Callable[..., Any],
    tiny_model: TinyModel,
    family: Family,
    other: Callable[[Any], Any],
) -> None:
    model = tiny_model(family.model)
    before, after = apply(other(model), family), other(apply(model, family))
    found = family.velocity(before)
    torch.testing.assert_close(found, family.velocity(after), rtol=1e-5, atol=1e-5)
    for alone in (other(model), apply(model, family)):
        assert (found - family.velocity(alone)).abs().max() > 1e-3


@pytest.mark.parametrize("changed", foreign.PROMPTS.values(), ids=foreign.PROMPTS)
def test_what_belongs_to_a_prompt_acts_beside_it(
    apply: Callable[..., Any],
    tiny_model: TinyModel,
    changed: Callable[[stock.Conditioning], stock.Conditioning],
) -> None:
    family = FAMILIES["SD3"]
    model, latent = tiny_model(family.model), torch.randn(1, 16, 8, 8)

    def velocity(model: Any, prompt: stock.Conditioning) -> Tensor:
        return stock.velocity(model, prompt, family.prompt(2), 2.0, latent, 0.6)

    adapted, prompt = apply(model, family), family.prompt(1)
    both = velocity(adapted, changed(prompt))
    assert torch.equal(velocity(apply(model, family), changed(prompt)), both)
    for alone in (velocity(adapted, prompt), velocity(model, changed(prompt))):
        assert (both - alone).abs().max() > 1e-3


def test_attention_of_other_rows_is_refused(
    apply: Callable[..., Any], tiny_model: TinyModel
) -> None:
    """As packs for attention couple make them."""
    family = FAMILIES["SD1.5"]
    model = apply(tiny_model(family.model), family)
    model.set_model_attn2_patch(
        lambda n, k, v, _options: tuple(t.repeat(2, 1, 1) for t in (n, k, v))
    )
    model.set_model_attn2_output_patch(lambda n, _options: n[: len(n) // 2])
    with pytest.raises(ValueError, match="gives block input 1 8 rows where there are 4 latents"):
        family.velocity(model)


def test_a_mask_of_tiles_is_refused(apply: Callable[..., Any], tiny_model: TinyModel) -> None:
    family = FAMILIES["SD1.5"]
    plain, latent = tiny_model(family.model).clone(), torch.randn(1, 4, 8, 16)

    def tiled(apply_model: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        tiles = args["input"].chunk(2, -1)
        return torch.cat([apply_model(tile, args["timestep"], **args["c"]) for tile in tiles], -1)

    plain.set_model_unet_function_wrapper(tiled)

    def velocity(**settings: Any) -> Tensor:
        return stock.velocity(
            apply(plain, family, **settings), family.prompt(1), None, 1.0, latent, 0.6
        )

    assert velocity().isfinite().all()
    with pytest.raises(
        ValueError, match="16x8 cells, but another node shows the model tiles of 8x8"
    ):
        velocity(mask=torch.ones(1, 8, 16))


@two_families
def test_two_adapters_add_up(
    apply: Callable[..., Any], tiny_model: TinyModel, family: Family
) -> None:
    model = tiny_model(family.model)
    one, both = apply(model, family), apply(apply(model, family), family, seed=3)
    assert not torch.equal(family.velocity(one), family.velocity(both))


def test_context_windows_have_the_subject(apply: Callable[..., Any], tiny_model: TinyModel) -> None:
    family = FAMILIES["Wan"]
    model = tiny_model("wan")
    settings = dict(context_length=2, context_overlap=1, context_schedule="standard_static")
    settings |= dict(context_stride=1, closed_loop=False, fuse_method="pyramid", dim=2)
    settings |= dict(freenoise=False, causal_window_fix=False)
    windows = foreign.node("ContextWindowsManual", **settings)
    latent = picture_latent(1, 5, 6, 4)

    def sampled(model: Any) -> Tensor:
        return stock.call(
            "KSampler",
            **dict(model=model, seed=0, steps=2, cfg=2.0, sampler_name="euler", denoise=1.0),
            **dict(scheduler="simple", positive=family.prompt(1), negative=family.prompt(2)),
            latent_image={"samples": latent},
        )[0]["samples"]

    found = sampled(windows(apply(model, family)))
    assert found.isfinite().all()
    assert not torch.equal(found, sampled(windows(model)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@two_families
def test_half_precision_gives_nearly_the_same(
    apply: Callable[..., Any], tiny_model: TinyModel, family: Family, dtype: torch.dtype
) -> None:
    model = tiny_model(family.model)
    half = model.clone()
    half.set_model_compute_dtype(dtype)
    # The tiny models' own rounding errors are as large as what the adapter adds.
    rounded, exact = (family.velocity(apply(m, family)) - family.velocity(m) for m in (half, model))
    alike = torch.nn.functional.cosine_similarity(rounded.flatten(), exact.flatten(), 0)
    assert alike > (0.99 if dtype == torch.float16 else 0.7)


def test_an_error_leaves_nothing_behind(
    apply: Callable[..., Any], tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.ldm.modules.diffusionmodules.mmdit as mmdit

    family = FAMILIES["SD3"]
    model = tiny_model("sd3")
    applied = apply(model, family)
    before, calls, kept = family.velocity(applied), [0], []
    network = applied.get_additional_models()[0].model
    tokens = network.preservation

    def watched(*given: Tensor) -> Tensor:
        kept.append(weakref.ref(found := tokens(*given)))
        return found

    def broken(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise RuntimeError("out of memory")
        return forward(self, *args, **kwargs)

    forward = mmdit.JointBlock.forward
    with monkeypatch.context() as patch:
        patch.setattr(network, "preservation", watched)
        patch.setattr(mmdit.JointBlock, "forward", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            stock.call(
                "KSampler",
                **dict(model=applied, seed=0, steps=4, cfg=2.0, sampler_name="euler"),
                **dict(scheduler="simple", positive=family.prompt(1), negative=family.prompt(2)),
                latent_image={"samples": family.latent()},
            )
    gc.collect()
    assert kept
    assert all(tensor() is None for tensor in kept)
    assert torch.equal(family.velocity(applied), before)
