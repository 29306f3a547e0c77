"""Velocity Mask against FocusFlow's phase 1 written out, and pastes that never leave their mask."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from host import stock
from host.edits import MaskSearch, latent_for, picture_latent
from host.inprocess import Host
from host.prompts import PromptFailed
from host.stock import Demo

TinyModel = Callable[[str], Any]


def written_out_heat(search: MaskSearch, guidance: float, low: float, high: float) -> Tensor:
    """FocusFlow's steps 1 to 5, noise by noise, with ComfyUI's CFG guider."""
    clean = search.model.model.process_latent_in(search.latent)
    sigma, total = search.noise_level, torch.zeros(())
    for k in range(search.samples):
        generator = torch.Generator().manual_seed(search.seed + 100 * k)
        noise = torch.randn(clean.shape[1:], generator=generator).expand_as(clean)
        z = (1 - sigma) * clean + sigma * noise
        target, source = (
            stock.velocity(search.model, prompt, stock.conditioning(3), guidance, z, sigma)
            for prompt in (search.target, search.source)
        )
        total = total + (target - source).abs().mean(1) / search.samples
    flat = total.flatten(1)
    bounds = flat.quantile(torch.tensor([low, high]), dim=1)[..., None]
    return ((flat.clamp(*bounds) - bounds[0]) / (bounds[1] - bounds[0] + 1e-8)).view_as(total)


@pytest.mark.parametrize("name", ["sd3", "sd35", "schnell"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 9)], ids=str)
def test_published_settings_give_the_published_mask(
    tiny_model: TinyModel, name: str, guidance: float, shape: tuple[int, int, int]
) -> None:
    """At threshold 0.5 and softness 1 nothing is added to FocusFlow's soft mask."""
    search = MaskSearch(
        tiny_model(name),
        picture_latent(*shape),
        guidance=guidance,
        threshold=0.5,
        softness=1.0,
        dilation=3,
        blur=5,
    )
    soft, hard, overlay = search.run()
    heat = F.max_pool2d(written_out_heat(search, guidance, 0.01, 0.99), 3, 1, 1)
    expected = F.avg_pool2d(heat, 5, 1, 2, count_include_pad=False)
    cells = F.avg_pool2d(soft, 8)
    # Rounding, enlarged by stretching a map of small differences to the whole range.
    assert (cells - expected).abs().max() < 1e-3
    assert soft.shape == hard.shape == (shape[0], shape[1] * 8, shape[2] * 8)
    assert overlay.shape == (*soft.shape, 3)
    assert torch.equal(hard, (soft >= 0.5).float())


def test_embedded_guidance_reaches_the_model(tiny_model: TinyModel) -> None:
    search = MaskSearch(tiny_model("flux"), threshold=0.5, softness=1.0, blur=0)
    told = search.having(
        source=stock.with_values(search.source, guidance=search.guidance),
        target=stock.with_values(search.target, guidance=search.guidance),
    )
    expected = written_out_heat(told, 1.0, 0.01, 0.99)
    assert (F.avg_pool2d(search.run()[0], 8) - expected).abs().max() < 1e-3
    assert (search.having(guidance=1.0).run()[0] - search.run()[0]).abs().max() > 0.01


def test_clipping_quantiles_are_widgets(tiny_model: TinyModel) -> None:
    extras = dict(clip_low=20.0, clip_high=70.0)
    search = MaskSearch(tiny_model("sd3"), threshold=0.5, softness=1.0, blur=0, extras=extras)
    expected = written_out_heat(search, 1.0, 0.2, 0.7)
    assert (F.avg_pool2d(search.run()[0], 8) - expected).abs().max() < 1e-3


def test_masks_have_the_size_of_the_picture(tiny_model: TinyModel) -> None:
    """Flux.2's latents are a sixteenth of the picture, not an eighth."""
    soft, hard, overlay = MaskSearch(tiny_model("flux2"), latent_for("flux2", 2, 3, 5)).run()
    assert soft.shape == hard.shape == (2, 48, 80)
    assert overlay.shape == (2, 48, 80, 3)


def test_masks_of_video_have_one_picture_a_clip(tiny_model: TinyModel) -> None:
    soft, hard, overlay = MaskSearch(tiny_model("wan"), latent_for("wan", 2)).run()
    assert soft.shape == hard.shape == (2, 64, 64)
    assert overlay.shape == (2, 64, 64, 3)


def test_soft_mask_rises_around_the_threshold(tiny_model: TinyModel) -> None:
    search = MaskSearch(tiny_model("sd3"), threshold=0.4, softness=0.2)
    soft, hard, _ = search.run()
    assert torch.equal(hard, (soft >= 0.5).float())
    assert soft.min() == 0
    assert soft.max() == 1
    assert torch.equal(search.having(softness=0.0).run()[0], hard)
    lower, _, _ = search.having(threshold=0.3).run()
    assert (lower >= soft).all()
    assert lower.mean() > soft.mean()


def test_dilation_and_blur_work_on_the_heat(tiny_model: TinyModel) -> None:
    search = MaskSearch(tiny_model("sd3"), blur=0)
    assert (search.having(dilation=3).run()[1] >= search.run()[1]).all()
    assert search.having(dilation=3).run()[1].sum() > search.run()[1].sum()
    spread = search.having(threshold=0.5, softness=1.0)
    assert spread.having(blur=5).run()[0].std() < spread.run()[0].std()


def test_heat_map_is_laid_over_the_given_picture(tiny_model: TinyModel) -> None:
    search = MaskSearch(tiny_model("sd3"))
    black = search.having(extras={"image": torch.zeros(1, 40, 50, 4)}).run()[2]
    white = search.having(extras={"image": torch.ones(1, 40, 50, 4)}).run()[2]
    assert black.shape == white.shape == (1, 64, 64, 3)
    assert (white > black).all()


@pytest.mark.parametrize("images", [2, 3])
def test_pictures_and_latents_of_other_batches(tiny_model: TinyModel, images: int) -> None:
    search = MaskSearch(
        tiny_model("sd3"), picture_latent(2), extras={"image": torch.rand(images, 64, 64, 3)}
    )
    if images == 2:
        assert search.run()[2].shape == (2, 64, 64, 3)
        return
    with pytest.raises(ValueError, match=r"^image has 3 .*2"):
        search.run()


SAME = dict(target=stock.conditioning(1))
REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "equal prompts": ("sd3", SAME, r"^source and target prompts .*: change the target prompt or"),
    "prompts that differ by rounding": (
        "sd3",
        dict(target=[[stock.conditioning(1)[0][0] + 1e-6, stock.conditioning(1)[0][1]]]),
        r"^source and target prompts .*so there is nothing to locate: change the target prompt",
    ),
    "a prompt of NaN": (
        "sd3",
        dict(target=[[stock.conditioning(1)[0][0] * torch.nan, stock.conditioning(1)[0][1]]]),
        r"^model returned values that are not finite: check",
    ),
    "a model without flow": ("sd15", {}, r"^model is SD15, .*: load a flow model"),
    "latent of another model": (
        "sd3",
        dict(latent=picture_latent(1, 8, 8, channels=4)),
        r"^latent has 4 channels, the model needs 16: encode",
    ),
    "NaN in the latent": (
        "sd3",
        dict(latent=torch.full((1, 16, 8, 8), torch.nan)),
        r"^latent holds values that are not finite: check",
    ),
    "noise level of NaN": ("sd3", dict(noise_level=torch.nan), r"^noise_level is nan: enter"),
    "infinite guidance": ("sd3", dict(guidance=torch.inf), r"^guidance is inf: enter"),
    "threshold of NaN": ("sd3", dict(threshold=torch.nan), r"^threshold is nan: enter"),
    "softness of NaN": ("sd3", dict(softness=torch.nan), r"^softness is nan: enter"),
    "quantile of NaN": ("sd3", dict(extras={"clip_low": torch.nan}), r"^clip_low is nan: enter"),
}


@pytest.mark.parametrize(("name", "settings", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_located_is_refused_in_a_sentence(
    tiny_model: TinyModel, name: str, settings: dict[str, Any], message: str
) -> None:
    shape = dict(latent=picture_latent(1, 8, 8, channels=4)) if name == "sd15" else {}
    with pytest.raises(ValueError, match=message):
        MaskSearch(tiny_model(name), **{**shape, **settings}).run()


def test_a_model_without_flow_is_not_asked(host: Host, tiny_model: TinyModel) -> None:
    asked = []

    def record(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        asked.append(args)
        return executor(*args, **kwargs)

    model = tiny_model("sd15").clone()
    model.add_wrapper_with_key("apply_model", "recorder", record)
    graph, _ = MaskSearch(model, picture_latent(1, 8, 8, channels=4)).graph()
    with pytest.raises(PromptFailed, match="ValueError: model is SD15"):
        host.execute(graph.nodes)
    assert not asked


# Composite Edit


def composite(source: Tensor, edited: Tensor, mask: Tensor, **widgets: Any) -> tuple[Tensor, ...]:
    """The composite and its opacity."""
    widgets = {"threshold": 0.5, "feather": 4, **widgets}
    return stock.call("PinpointCompositeEdit", source=source, edited=edited, mask=mask, **widgets)


def pictures(batch: int, height: int, width: int, channels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(height * width)
    shape = (batch, height, width, channels)
    source = torch.rand(shape, generator=generator)
    return source, torch.rand((batch, height, width, 3), generator=generator)


def blob_mask(batch: int, height: int, width: int) -> Tensor:
    """Soft blobs, some of which touch the border."""
    generator = torch.Generator().manual_seed(batch)
    rough = torch.rand((batch, 1, 4, 4), generator=generator)
    return F.interpolate(rough, (height, width), mode="bicubic").clamp(0, 1)[:, 0]


@pytest.mark.parametrize("feather", [0, 1, 4, 100])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(
    ("batch", "height", "width", "channels"),
    [(1, 64, 64, 3), (2, 37, 51, 3), (3, 64, 40, 4), (1, 1, 7, 3)],
    ids=str,
)
def test_pixels_outside_the_mask_are_the_sources_bit_for_bit(
    batch: int,
    height: int,
    width: int,
    channels: int,
    feather: int,
    threshold: float,
    host: Host,  # noqa: ARG001
) -> None:
    source, edited = pictures(batch, height, width, channels)
    mask = blob_mask(batch, height, width)
    mask[:, :, : width // 4] = 0
    result, opacity = composite(source, edited, mask, threshold=threshold, feather=feather)
    outside = (mask < threshold) | (mask == 0)
    assert result.shape == source.shape
    assert torch.equal(result[outside], source[outside])
    assert not opacity[outside].any()
    if channels == 4:
        assert torch.equal(result[..., 3], source[..., 3])
    inside = opacity == 1
    assert torch.equal(result[..., :3][inside], edited[inside])
    between = (opacity > 0) & (opacity < 1)
    blend = source[..., :3].lerp(edited, opacity[..., None])
    assert torch.allclose(result[..., :3][between], blend[between], rtol=0, atol=1e-6)
    assert feather or not between.any()


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(("value", "wanted"), [(0.0, 0), (1.0, 1)], ids=["empty", "full"])
@pytest.mark.parametrize("size", [(64, 64), (7, 5), (1, 1), (200, 133)], ids=str)
def test_empty_and_full_masks_of_any_size(value: float, wanted: int, size: tuple[int, int]) -> None:
    source, edited = pictures(2, 64, 48)
    result, _ = composite(source, edited, torch.full((1, *size), value))
    assert torch.equal(result, (source, edited)[wanted])


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("size", [(61, 67), (64, 71), (65, 64), (79, 66)], ids=str)
def test_an_edit_cropped_by_the_encoder_is_laid_where_it_came_from(
    size: tuple[int, int], demo: Demo
) -> None:
    """The stock VAE crops to whole cells, evenly on both sides."""
    source, _ = pictures(1, *size)
    cropped = demo.vae.vae_encode_crop_pixels(source)
    assert cropped.shape[1:3] != source.shape[1:3]
    covered_mask = torch.ones(1, *cropped.shape[1:3])
    for mask in (torch.ones(1, *size), covered_mask, torch.ones(1, 8, 8)):
        result, opacity = composite(source, cropped, mask, feather=0)
        assert torch.equal(result, source), "the crop is the source's own pixels"
        assert opacity.sum() == cropped.shape[1] * cropped.shape[2]
    inverse = 1 - cropped
    result, opacity = composite(source, inverse, covered_mask, feather=0)
    assert torch.equal(result[0][opacity[0] == 1], 1 - source[0][opacity[0] == 1])
    assert torch.equal(result[0][opacity[0] == 0], source[0][opacity[0] == 0])


@pytest.mark.usefixtures("host")
def test_one_source_or_one_mask_serves_a_batch() -> None:
    source, edited = pictures(3, 16, 16)
    mask = blob_mask(1, 16, 16)
    by_one, _ = composite(source[:1], edited, mask)
    apart = [composite(source[:1], row, mask)[0] for row in edited.split(1)]
    assert torch.equal(by_one, torch.cat(apart))


@pytest.mark.usefixtures("host")
def test_composite_leaves_its_inputs_alone() -> None:
    source, edited = pictures(1, 16, 16)
    mask = blob_mask(1, 16, 16)
    kept = [tensor.clone() for tensor in (source, edited, mask)]
    composite(source, edited, mask)
    assert all(map(torch.equal, (source, edited, mask), kept))


@pytest.mark.usefixtures("host")
def test_a_broken_edit_does_not_break_the_outside() -> None:
    source, edited = pictures(1, 16, 16)
    mask = torch.zeros(1, 16, 16)
    mask[:, 4:8] = 1
    result, _ = composite(source, edited * torch.nan, mask)
    assert torch.equal(result[mask == 0], source[mask == 0])


COMPOSITE_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "edit of another size": (
        dict(edited=torch.rand(1, 64, 32, 3)),
        r"^edited is 32x64, source 64x64: scale",
    ),
    "edit larger than its source": (
        dict(edited=torch.rand(1, 72, 64, 3)),
        r"^edited is 64x72, source 64x64: scale",
    ),
    "other batches": (
        dict(edited=torch.rand(2, 64, 64, 3), mask=torch.rand(3, 64, 64)),
        r"^edited has 2 images .* 3: use one image, or 3",
    ),
    "threshold of NaN": (dict(threshold=torch.nan), r"^threshold is nan: enter a "),
}


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(("inputs", "message"), COMPOSITE_REFUSALS.values(), ids=COMPOSITE_REFUSALS)
def test_pictures_that_do_not_fit_are_refused_in_a_sentence(
    inputs: dict[str, Any], message: str
) -> None:
    source, edited = pictures(1, 64, 64)
    with pytest.raises(ValueError, match=message):
        composite(**{"source": source, "edited": edited, "mask": blob_mask(1, 64, 64), **inputs})


@pytest.mark.parametrize("name", ["sd3", "flux", "flux2", "wan"])
def test_rough_picture_is_comfyuis_fast_preview(
    pack: ModuleType, tiny_model: TinyModel, name: str
) -> None:
    import latent_preview

    model, latent = tiny_model(name), latent_for(name, 2)
    locating = pack.nodes.host.locating
    found = locating.rough_picture(model, latent)
    form = model.model.latent_format
    previewer = latent_preview.Latent2RGBPreviewer(
        form.latent_rgb_factors, form.latent_rgb_factors_bias, form.latent_rgb_factors_reshape
    )
    for row, picture in zip(model.model.process_latent_in(latent).split(1), found, strict=True):
        expected = np.asarray(previewer.decode_latent_to_preview(row))
        # The preview is cut to whole numbers.
        assert np.abs(picture.numpy() * 255 - expected).max() < 1.001
