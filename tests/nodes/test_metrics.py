"""Edit Score against the libraries that define its networks, and Compare Edits."""

from __future__ import annotations

import csv
import io
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

DEFAULTS: dict[str, Any] = dict(
    source_prompt="", target_prompt="", lpips="none", regions="as published", names=""
)
NETS = ("alex", "vgg", "squeeze")
Scores = dict[str, float | None]


@pytest.fixture(scope="module")
def scoring(pack: ModuleType) -> ModuleType:
    return pack.nodes.host.scoring


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


# LPIPS


@pytest.mark.parametrize("net", NETS)
def test_a_missing_backbone_is_asked_for(net: str, lpips_folder: Path) -> None:  # noqa: ARG001
    a, b, _ = judges.random_pictures()
    link = r"https://download\.pytorch\.org/models/\S+\.pth into models/lpips$"
    with pytest.raises(ValueError, match=rf"^lpips is {net}, whose backbone .*: download {link}"):
        measured(a, b, lpips=net)


def test_a_damaged_backbone_is_refused(lpips_folder: Path) -> None:
    a, b, _ = judges.random_pictures()
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
    a, b, _ = judges.drawn_pictures()
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
    }
    for message, inputs in refused.items():
        with pytest.raises(ValueError, match=message):
            measured(*squares, **inputs)
    similarity = rows_of(measured(*squares, identity=encoder)[6])[0]["identity"]
    assert similarity is not None
    assert 0 < similarity < 1


def test_a_long_prompt_counts_as_far_as_a_clip_reads(
    clip: judges.Clip, squares: tuple[Tensor, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    found = []
    for count in (75, 80):
        given = dict(clip=clip.text, clip_vision=clip.vision, target_prompt="hat " * count)
        found.append(rows_of(measured(*squares, **given)[6])[0]["clip whole"])
        long = "target_prompt is longer than the 77 tokens" in caplog.text
        assert long == (count == 80)
    assert found[0] == found[1]


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
    a, b, _ = judges.random_pictures()
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
    a, _, region = judges.random_pictures()
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
    a, b, _ = judges.drawn_pictures()
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
    a, b, _ = judges.random_pictures()
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
    a, b, _ = judges.drawn_pictures()
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
    a, b, region = judges.random_pictures()
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
