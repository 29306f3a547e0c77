"""Scores against the packages that define them, and against PIE-Bench's evaluator written out."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from host import judges, stock
from host.inprocess import Host
from portraits.dataset import edits, pictures

DEFAULTS: dict[str, Any] = dict(
    source_prompt="", target_prompt="", lpips="none", regions="as published", names=""
)
NETS = ("alex", "vgg", "squeeze")
Scores = dict[str, float | None]


@pytest.fixture(scope="module")
def scores(pack: ModuleType) -> ModuleType:
    return pack.kernels.scores


@pytest.fixture(scope="module")
def scoring(pack: ModuleType) -> ModuleType:
    return pack.nodes.host.scoring


@pytest.fixture
def lpips_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    host: Host,  # noqa: ARG001
) -> Path:
    """An empty folder that is models/lpips, and no cache of torch hub."""
    import folder_paths

    folder = tmp_path / "lpips"
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "lpips", ([str(folder)], set()))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return folder


def random_pictures(side: int = 64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Two pictures (1, 3, H, W) and a region (1, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, 1, 3, side, side + 8, generator=generator)
    region = F.interpolate(torch.rand(1, 1, 4, 4, generator=generator), a.shape[2:])[:, 0]
    return a, (0.7 * a + 0.3 * b), (region > 0.5).float()


def drawn_pictures() -> tuple[Tensor, Tensor, Tensor]:
    edit = edits("tests", 0, 9)[-1]
    a, b = (pictures([person]).float() / 255 for person in (edit.source, edit.target))
    region = torch.zeros(1, 128, 128)
    region[:, :40, 30:100] = 1
    return a, b, region


PAIRS: dict[str, Callable[[], tuple[Tensor, Tensor, Tensor]]] = {
    "random": random_pictures,
    "portraits": drawn_pictures,
}
pairs = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


def as_image(picture: Tensor) -> Tensor:
    return picture.movedim(1, -1)


def measured(source: Tensor, edited: Tensor, **inputs: Any) -> tuple[Any, ...]:
    """Outputs of the node; pictures (B, 3, H, W) here."""
    return stock.call(
        "PinpointEditScore",
        source=as_image(source),
        edited=as_image(edited),
        **{**DEFAULTS, **inputs},
    )


def rows_of(text: str) -> list[dict[str, float | None]]:
    """The rows of the csv output."""
    return [
        {name: float(cell) if cell else None for name, cell in row.items() if name != "name"}
        for row in csv.DictReader(io.StringIO(text))
    ]


# Pixels


def written_out(a: Tensor, b: Tensor, mask: Tensor) -> tuple[float, float]:
    """PSNR and MSE of PIE-Bench's evaluator: both are multiplied by the mask, means are of all."""
    one, other = (np.asarray(as_image(p)[0], np.float64) for p in (a, b))
    painted = np.asarray(mask[0], np.float64)[..., None]
    error = np.square(one * painted - other * painted).mean()
    return 10 * np.log10(1 / error), error


@pairs
@pytest.mark.parametrize("inverted", [False, True], ids=["foreground", "background"])
def test_regions_are_scored_as_pie_bench_does(
    scores: ModuleType, pair: Callable[[], tuple[Tensor, Tensor, Tensor]], inverted: bool
) -> None:
    from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
    from torchmetrics.regression import MeanSquaredError

    a, b, region = pair()
    mask = 1 - region if inverted else region
    found = scores.pixel_scores(a, b, mask)
    psnr, mse = written_out(a, b, mask)
    assert found["psnr"] == pytest.approx(min(psnr, 100), abs=1e-4)
    assert found["mse"] == pytest.approx(mse, abs=1e-4)
    x, y = (p * mask[:, None] for p in (a, b))
    assert found["psnr"] == pytest.approx(float(PeakSignalNoiseRatio(1.0)(x, y)), abs=1e-4)
    metric = StructuralSimilarityIndexMeasure(data_range=1.0)
    assert found["ssim"] == pytest.approx(float(metric(x, y)), abs=1e-4)
    metric = MeanSquaredError()
    assert found["mse"] == pytest.approx(float(metric(x.contiguous(), y.contiguous())), abs=1e-6)


@pairs
def test_pixels_only_counts_the_regions_own(
    scores: ModuleType, pair: Callable[[], tuple[Tensor, Tensor, Tensor]]
) -> None:
    a, b, region = pair()
    for mask in (region, 1 - region):
        found = scores.pixel_scores(a, b, mask, published=False)
        error = ((a - b).square().mean(1) * mask).sum() / mask.sum()
        assert found["mse"] == pytest.approx(float(error), abs=1e-6)
        outside = scores.pixel_scores(a, b.where(mask[:, None] > 0, b + 0.3), mask, published=False)
        assert outside["psnr"] == found["psnr"]
    whole = scores.pixel_scores(a, b)
    for published in (True, False):
        full = scores.pixel_scores(a, b, torch.ones_like(region), published=published)
        assert full == pytest.approx(whole, abs=1e-6)


def test_the_same_pictures_and_empty_regions(scores: ModuleType) -> None:
    a, b, region = random_pictures()
    assert scores.pixel_scores(a, a) == {"psnr": 100, "ssim": 1, "mse": 0}
    assert set(scores.pixel_scores(a, b, 0 * region).values()) == {None}
    small = scores.pixel_scores(a[..., :8, :8], b[..., :8, :8])
    assert small["ssim"] is None
    assert small["psnr"] is not None


def test_the_share_of_a_true_edit(scores: ModuleType) -> None:
    a, b, _ = drawn_pictures()
    assert scores.kept_share(a, b, b) == 1
    assert scores.kept_share(a, a, b) == 0
    assert scores.kept_share(a, (a + b) / 2, b) == pytest.approx(0.5, abs=1e-5)
    assert scores.kept_share(a, b, a) is None


# LPIPS


@pytest.mark.parametrize("net", NETS)
@pairs
def test_lpips_is_that_of_its_package(
    scores: ModuleType,
    pack: ModuleType,
    pair: Callable[[], tuple[Tensor, Tensor, Tensor]],
    net: str,
    lpips_folder: Path,
) -> None:
    """The package's own trained weights, over the same random backbone."""
    import lpips

    weights = judges.backbone(net, lpips_folder)
    reference = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    pack.nodes.host.lpips_nets._fill(reference.net, next(lpips_folder.iterdir()))
    assert torch.equal(next(iter(reference.net.parameters())), next(iter(weights.values())))
    distance = pack.nodes.host.lpips_nets.load(net)
    a, b, region = pair()
    with torch.no_grad():
        mask = region[:, None]
        expected = [reference(a * 2 - 1, b * 2 - 1), reference(a * mask * 2 - 1, b * mask * 2 - 1)]
        whole = scores.perceptual_distance(a, b, distance)
        inside = scores.perceptual_distance(a, b, distance, region)
        own = scores.perceptual_distance(a, b, distance, torch.ones_like(region), published=False)
    # The mean of the enlarged map, where the whole picture's score is the mean of each layer.
    assert own == pytest.approx(whole, rel=0.05)
    assert whole == pytest.approx(float(expected[0]), abs=1e-4)
    assert inside == pytest.approx(float(expected[1]), abs=1e-4)
    assert scores.perceptual_distance(a, a, distance) == 0
    assert scores.perceptual_distance(a, b, distance, 0 * region) is None


@pytest.mark.parametrize("net", NETS)
def test_a_missing_backbone_is_asked_for(net: str, lpips_folder: Path) -> None:  # noqa: ARG001
    a, b, _ = random_pictures()
    link = r"https://download\.pytorch\.org/models/\S+\.pth into models/lpips$"
    with pytest.raises(ValueError, match=rf"^lpips is {net}, whose backbone .*: download {link}"):
        measured(a, b, lpips=net)


def test_a_damaged_backbone_is_refused(lpips_folder: Path) -> None:
    a, b, _ = random_pictures()
    file = lpips_folder / "alexnet-owt-7be5be79.pth"
    for content in (b"", b"nothing", None):
        torch.save({"features.0.weight": torch.ones(3)}, file) if content is None else (
            file.write_bytes(content)
        )
        with pytest.raises(ValueError, match=r"^lpips needs alexnet.*, which is damaged in"):
            measured(a, b, lpips="alex")


# Networks


@pytest.fixture(scope="module")
def clip(host: Host) -> judges.Clip:  # noqa: ARG001
    return judges.clip()


@pytest.fixture(scope="module")
def squares() -> tuple[Tensor, Tensor]:
    """A portrait and its edit at the tiny judges' own size, so that nothing resizes them."""
    a, b, _ = drawn_pictures()
    small = [F.interpolate(p, (judges.side, judges.side), mode="area") for p in (a, b)]
    return small[0], small[1]


def normalised(picture: Tensor, encoder: Any) -> Tensor:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoder.image_mean, encoder.image_std))
    return ((picture * 255).round() / 255 - mean) / std


def test_clip_scores_are_those_of_transformers(
    clip: judges.Clip, squares: tuple[Tensor, Tensor]
) -> None:
    from transformers import CLIPTokenizer

    texts = ["portrait of a person, no hat", "portrait of a person, red hat"]
    mask = torch.zeros(1, judges.side, judges.side)
    mask[:, 10:40, 10:40] = 1
    *_, table, text, _ = measured(
        *squares,
        mask=mask,
        clip=clip.text,
        clip_vision=clip.vision,
        source_prompt=texts[0],
        target_prompt=texts[1],
    )
    (found,) = rows_of(text)
    folder = Path(__import__("comfy.sd1_clip").sd1_clip.__file__).parent / "sd1_tokenizer"
    ids = CLIPTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        text_model, vision_model = clip.reference.text_model, clip.reference.vision_model
        words = clip.reference.text_projection(text_model(**ids).pooler_output)
        shown = torch.cat([*squares, squares[1] * mask[:, None]])
        seen = clip.reference.visual_projection(
            vision_model(normalised(shown, clip.vision)).pooler_output
        )
    before, after, inside = seen

    def cosine(a: Tensor, b: Tensor) -> Any:
        return pytest.approx(float(F.cosine_similarity(a, b, dim=0)), abs=1e-4)

    assert found["clip-i"] == cosine(before, after)
    assert found["clip whole"] == cosine(after, words[1])
    assert found["clip inside"] == cosine(inside, words[1])
    assert found["clip direction"] == cosine(after - before, words[1] - words[0])
    assert "clip whole x10^2" in table


def test_structure_and_dino_are_those_of_transformers(
    host: Host,  # noqa: ARG001
    squares: tuple[Tensor, Tensor],
) -> None:
    encoder, reference = judges.dino()
    (found,) = rows_of(measured(*squares, dino=encoder)[6])
    keys: list[Tensor] = []
    layer = reference.encoder.layer[-1].attention.k_proj
    hook = layer.register_forward_hook(lambda _module, _args, out: keys.append(out[0]))
    with torch.no_grad():
        classes = [reference(normalised(p, encoder)).pooler_output[0] for p in squares]
    hook.remove()
    # Splice's loss, written out.
    similar = []
    for one in keys:
        norms = one.norm(dim=1).clamp(min=1e-8)
        similar.append((one @ one.T) / (norms[:, None] * norms[None]))
    assert found["structure distance"] == pytest.approx(
        float(F.mse_loss(similar[0], similar[1])), abs=1e-4
    )
    expected = float(F.cosine_similarity(classes[0], classes[1], dim=0))
    assert found["dino-i"] == pytest.approx(expected, abs=1e-4)
    assert (found["structure distance"] or 0) > 1e-4, "the pictures differ"


def test_a_clip_without_projection_is_refused(
    host: Host,  # noqa: ARG001
    squares: tuple[Tensor, Tensor],
) -> None:
    made = judges.clip(projection=False)
    with pytest.raises(ValueError, match=r"^clip has clip_l without its text projection"):
        measured(*squares, clip=made.text, clip_vision=made.vision, target_prompt="a hat")


def test_networks_that_do_not_fit_are_refused(
    clip: judges.Clip, squares: tuple[Tensor, Tensor], demo: stock.Demo
) -> None:
    encoder, _ = judges.dino()
    say = {"target_prompt": "a hat"}
    refused: dict[str, dict[str, Any]] = {
        r"^clip is connected without clip_vision": dict(clip=clip.text),
        r"^clip has clip_l, .*, none of which gives the 128 channels|^clip has ": dict(
            clip=demo.clip, clip_vision=clip.vision, **say
        ),
        r"^dino is clip_vision_model: use a DINOv2": dict(dino=clip.vision),
        r"^target_prompt is longer than the 77 tokens": dict(
            clip=clip.text, clip_vision=clip.vision, target_prompt="hat " * 80
        ),
    }
    for message, inputs in refused.items():
        with pytest.raises(ValueError, match=message):
            measured(*squares, **inputs)
    similarity = rows_of(measured(*squares, identity=encoder)[6])[0]["identity"]
    assert similarity is not None
    assert 0 < similarity < 1


def test_a_direction_needs_a_change(clip: judges.Clip, squares: tuple[Tensor, Tensor]) -> None:
    one = squares[0]
    inputs = dict(clip=clip.text, clip_vision=clip.vision, source_prompt="a", target_prompt="b")
    (found,) = rows_of(measured(one, one, **inputs)[6])
    assert found["clip direction"] is None
    assert found["clip-i"] == pytest.approx(1, abs=1e-6)


# The node


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("value", [0.0, 1.0], ids=["empty", "full"])
@pytest.mark.parametrize("regions", ["as published", "pixels only"])
def test_masks_without_one_region_give_no_nan(value: float, regions: str) -> None:
    a, b, _ = random_pictures()
    mask = torch.full((1, 8, 8), value)
    *floats, table, text, _ = measured(a, b, mask=mask, regions=regions)
    missing = "foreground" if value == 0 else "background"
    (row,) = rows_of(text)
    assert all((row[name] is None) == name.startswith(missing) for name in row)
    assert "not defined" in table
    assert "nan" not in table + text
    assert floats[2:] == [-1, -1, -1], "no network was connected"
    assert (floats[0] == -1) == (value == 1)


@pytest.mark.usefixtures("host")
def test_a_batch_is_single_edits_and_their_mean(scoring: ModuleType) -> None:
    a, _, region = random_pictures()
    edited = torch.cat([(a * part).clamp(0, 1) for part in (0.9, 1.2, 0.5)])
    psnr, *_, table, text, picture = measured(a, edited, mask=region, names="low, high, half")
    rows = rows_of(text)
    for index, row in enumerate(rows):
        assert row == rows_of(measured(a, edited[index : index + 1], mask=region)[6])[0]
    assert psnr == pytest.approx(np.mean([row["background psnr"] for row in rows]), abs=1e-5)
    assert "low" in table.splitlines()[0]
    assert table.splitlines()[0].endswith("mean")
    assert len(picture) == 3
    again = scoring.from_csv(text, 3)
    assert again[1]["whole ssim"] == pytest.approx(rows[1]["whole ssim"])


@pytest.mark.usefixtures("host")
def test_the_true_edit_is_compared(
    tmp_path: Path,  # noqa: ARG001
) -> None:
    a, b, _ = drawn_pictures()
    (row,) = rows_of(measured(a, (a + b) / 2, target=as_image(b))[6])
    assert row["edit kept"] == pytest.approx(0.5, abs=1e-4)
    assert row["true edit psnr"] == pytest.approx(row["whole psnr"], abs=1e-3)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "sizes": (
        {"target": torch.rand(1, 8, 9, 3)},
        r"^target is 9x8, source 72x64: scale one of them .*or align",
    ),
    "batches": ({"mask": torch.ones(2, 8, 8)}, r"^source has 3 images where .* has 2|^mask has 2"),
    "mask of NaN": ({"mask": torch.full((1, 8, 8), torch.nan)}, r"^mask holds values that are not"),
    "names": ({"names": "a, b"}, r"^names has 2 names for 3 edits: write one"),
    "lpips": ({"lpips": "resnet"}, r"^lpips is resnet: choose one of none, alex, vgg, squeeze"),
    "regions": ({"regions": "all"}, r"^regions is all: choose one of as published, pixels only"),
}


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(("inputs", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_scored_is_refused_in_a_sentence(
    inputs: dict[str, Any], message: str
) -> None:
    a, b, _ = random_pictures()
    with pytest.raises(ValueError, match=message):
        measured(a.expand(3, -1, -1, -1), b, **inputs)


# Compare Edits


def compared(source: Tensor, edited: Tensor, **inputs: Any) -> Tensor:
    widgets = {"names": "", "columns": 4, "show": "", **inputs}
    return stock.call(
        "PinpointCompareEdits", source=as_image(source), edited=as_image(edited), **widgets
    )[0]


@pytest.mark.usefixtures("host")
def test_the_sheet_shows_every_picture() -> None:
    a, b, _ = drawn_pictures()
    sheet = compared(a, torch.cat([b, a * 0.5]), columns=2)
    rounded = (sheet * 255).round()
    for picture in (a, b, a * 0.5):
        wanted = (as_image(picture)[0] * 255).round()
        places = [
            (y, x)
            for y in range(sheet.shape[1] - 127)
            for x in (12, sheet.shape[2] // 2 + 6)
            if torch.equal(rounded[0, y : y + 128, x : x + 128], wanted)
        ]
        assert len(places) == 1
    assert (sheet[0, -40:] < 0.9).any(), "scores are written below the pictures"


@pytest.mark.usefixtures("host")
def test_scores_come_from_edit_score_or_are_measured() -> None:
    a, b, region = random_pictures()
    text = measured(a, b, mask=region)[6]
    measured_here = compared(a, b, mask=region)
    assert torch.equal(compared(a, b, scores=text), measured_here)
    less = compared(a, b, mask=region, show="background psnr")
    assert less.shape[1] < measured_here.shape[1]
    for inputs, message in {
        ("show", "beauty"): r"^show has beauty, which is no score here: use whole psnr",
        ("scores", "nothing"): r"^scores has 0 rows for 1 edits: connect the csv",
        ("scores", "name,psnr\na,high"): r"^scores is no csv of Edit Score",
    }.items():
        with pytest.raises(ValueError, match=message):
            compared(a, b, **dict([inputs]))
