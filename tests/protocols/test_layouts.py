"""Small complete examples of each layout, written by hand, as their publishers have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from protocols import drawn
from protocols.cases import BadCase, ProtocolError, at_size_of, limited, opened, opened_mask, scaled
from protocols.layouts import LAYOUTS, PIE_TYPES, mask_of_runs

SIDE = 6
PIE: dict[str, dict[str, Any]] = {
    "000000000000": {
        "image_path": "0_random_140/000000000000.jpg",
        "original_prompt": "a slanted mountain bicycle on the road",
        "editing_prompt": "a slanted [rusty] mountain bicycle on the road",
        "editing_instruction": "Make the frame of the bike rusty",
        "editing_type_id": "0",
        "blended_word": "bicycle bicycle",
        "mask": [8, 2, 20, 100],
    },
    "621000000000": {
        "image_path": "6_change_attribute_color_40/1_artificial/621000000000.jpg",
        "original_prompt": "a [blue] bird",
        "editing_prompt": "a [red] bird",
        "editing_instruction": "",
        "editing_type_id": "6",
        "blended_word": "",
        "mask": [],
    },
}
FOCUSFLOW = """
- input_img: images/cat.png
  source_prompt: a ginger cat
  target_prompts:
    - a tiger
    - a sleeping ginger cat
  target_codes: [tiger, sleeping]
- input_img: images/van.png
  source_prompt: a yellow van
  target_prompts: [a green van]
  target_codes: [green]
"""
DREAMBENCH = """Classes

subject_name,class
backpack,backpack
bear_plushie,stuffed animal
dog2,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a santa hat'.format(unique_token, class_token),
]
"""


def picture(file: Path, size: tuple[int, int] = (SIDE, SIDE)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 100, 50)).save(file)


def test_pie_bench(tmp_path: Path) -> None:
    (tmp_path / "mapping_file.json").write_text(json.dumps(PIE), "utf-8")
    first, second = LAYOUTS["pie-bench"](tmp_path).cases
    assert first.target_prompt == "a slanted rusty mountain bicycle on the road"
    assert (second.source_prompt, second.target_prompt) == ("a blue bird", "a red bird")
    assert (first.group, second.group) == ("random", "change attribute: color")
    assert first.image == tmp_path / "annotation_images/0_random_140/000000000000.jpg"
    assert first.id == "0_random_140/000000000000"
    assert first.instruction == "Make the frame of the bike rusty"


def test_pie_bench_masks_are_the_references() -> None:
    # What evaluate.py of cure-lab/PnPInversion makes of runs, written out.
    runs = PIE["000000000000"]["mask"]
    flat = np.zeros(SIDE * SIDE)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        for place in range(start, min(start + length, SIDE * SIDE)):
            flat[place] = 1
    expected = flat.reshape(SIDE, SIDE)
    expected[0, :] = expected[-1, :] = 1
    expected[:, 0] = expected[:, -1] = 1
    found = np.asarray(mask_of_runs(runs, (SIDE, SIDE)))
    assert np.array_equal(found, expected * 255)
    assert 0 in found


def test_runs_come_back_as_the_mask() -> None:
    mask = torch.zeros(9, 7)
    mask[2:5, 1:4] = 1
    mask[6, 2:] = 1
    found = np.asarray(mask_of_runs(drawn.runs_of(mask), (7, 9))) > 0
    assert np.array_equal(found[1:-1, 1:-1], mask[1:-1, 1:-1].numpy() > 0)


def test_focusflow(tmp_path: Path) -> None:
    file = tmp_path / "edits.yaml"
    file.write_text(FOCUSFLOW, "utf-8")
    cases = LAYOUTS["focusflow"](file).cases
    assert [case.target_prompt for case in cases] == [
        *("a tiger", "a sleeping ginger cat", "a green van")
    ]
    assert cases[1].image == tmp_path / "images/cat.png"
    assert [case.id for case in cases] == ["000_cat/tiger", "000_cat/sleeping", "001_van/green"]


def test_flowedit_as_it_is_published(tmp_path: Path) -> None:
    file = tmp_path / "flowedit.yaml"
    text = FOCUSFLOW.replace("input_img: images/", "init_img: example_images/")
    file.write_text(text.replace("  target_codes: [green]\n", ""), "utf-8")
    picture(tmp_path / "Images" / "cat.png")
    picture(tmp_path / "van.png")
    cases = LAYOUTS["focusflow"](file).cases
    assert [case.image for case in cases[1:]] == [
        tmp_path / "Images/cat.png",
        tmp_path / "van.png",
    ]
    assert cases[-1].id == "001_van/tar_0"
    file.write_text(text.replace("[a green van]", "a green van"), "utf-8")
    with pytest.raises(ProtocolError, match=r"entry 2: .*target_prompts is one text: write a list"):
        LAYOUTS["focusflow"](file)


def test_dreambench(tmp_path: Path) -> None:
    (tmp_path / "prompts_and_classes.txt").write_text(DREAMBENCH, "utf-8")
    for subject in ("backpack", "bear_plushie", "dog2"):
        for number in range(2):
            picture(tmp_path / subject / f"{number:02}.jpg")
    cases = LAYOUTS["subjects"](tmp_path).cases
    # Two objects by two prompts and a dog by one, four seeds each.
    assert len(cases) == (2 * 2 + 1) * 4
    assert cases[0].target_prompt == "a backpack in the jungle"
    assert cases[8].target_prompt == "a stuffed animal in the jungle"
    assert cases[-1].target_prompt == "a dog wearing a santa hat"
    assert [case.seed for case in cases[:5]] == [0, 1, 2, 3, 0]
    assert [path.name for path in cases[0].references] == ["00.jpg", "01.jpg"]


def test_portraits(tmp_path: Path) -> None:
    said: dict[str, Any] = {
        "attributes": {"hair": ["black hair", "red hair"], "mouth": ["a smile", "a straight face"]},
        "cases": [
            {
                "image": "ann.jpg",
                "mask": "ann_hair.png",
                "source_prompt": "a woman with black hair",
                "target_prompt": "a woman with red hair",
                "attribute": "hair",
                "value": "red hair",
            }
        ],
    }
    (tmp_path / "portraits.json").write_text(json.dumps(said), "utf-8")
    Image.new("L", (2 * SIDE, 2 * SIDE), 255).save(tmp_path / "ann_hair.png")
    protocol = LAYOUTS["portraits"](tmp_path)
    (case,) = protocol.cases
    assert (case.attribute, case.value) == ("hair", "red hair")
    assert protocol.attributes["mouth"] == ["a smile", "a straight face"]
    assert case.mask is not None
    mask = case.mask((SIDE, SIDE))
    assert (mask.size, mask.getextrema()) == ((SIDE, SIDE), (255, 255))
    said["cases"][0]["value"] = "green hair"
    (tmp_path / "portraits.json").write_text(json.dumps(said), "utf-8")
    with pytest.raises(ProtocolError, match=r"case 1: .*green hair is none of black hair"):
        LAYOUTS["portraits"](tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_there_is_named(layout: str, tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match=r"cannot be read .*: name"):
        LAYOUTS[layout](tmp_path / "nowhere")


def test_an_entry_of_another_form_is_named(tmp_path: Path) -> None:
    broken = {"000000000000": {**PIE["000000000000"], "editing_type_id": str(len(PIE_TYPES))}}
    (tmp_path / "mapping_file.json").write_text(json.dumps(broken), "utf-8")
    with pytest.raises(ProtocolError, match=r"mapping_file\.json, 000000000000: IndexError"):
        LAYOUTS["pie-bench"](tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_drawn_portraits_are_read_back(layout: str, tmp_path: Path) -> None:
    count = 8
    cases = LAYOUTS[layout](drawn.WRITERS[layout](tmp_path, 1, count)).cases
    assert len(cases) == count
    assert len({case.id for case in cases}) == count
    for case in cases:
        assert opened(case.image).size == (128, 128)
        assert case.target_prompt.startswith("portrait of a person, ")
        assert case.target_prompt != case.source_prompt
    masks = [case.mask((128, 128)) for case in cases if case.mask]
    assert all(0 < np.asarray(mask).mean() < 255 for mask in masks)
    assert len(masks) == (count if layout in ("pie-bench", "portraits") else 0)


def test_a_portrait_is_what_it_is_drawn_as(tmp_path: Path) -> None:
    drawn.portraits(tmp_path, 1, 3)
    for case in LAYOUTS["portraits"](tmp_path).cases:
        wanted, shown = drawn.words(case, opened(case.image))
        # The source has all but the edit.
        assert shown.pop(case.attribute) != case.value
        assert wanted.pop(case.attribute) == case.value
        if "hair" not in case.attribute:
            assert shown == wanted


def test_a_file_that_is_no_picture_is_one_bad_case(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(BadCase, match=r"bad\.png cannot be opened"):
        opened(tmp_path / "bad.png")


def test_pictures_are_averaged_where_they_can_be() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    found = np.asarray(scaled(Image.fromarray(pixels), (4, 4)))
    expected = pixels.reshape(4, 2, 4, 2, 3).mean((1, 3))
    assert np.abs(found - expected).max() <= 0.5
    assert limited((512, 256), 128) == (128, 64)
    assert limited((512, 256), None) == (512, 256)


def test_masks_are_decoded_in_the_picture_s_own_raster(tmp_path: Path) -> None:
    side, first = 2 * SIDE, PIE["000000000000"]
    mask = torch.zeros(side, side)
    mask[4:8, 2:6] = 1
    said = {"000000000000": {**first, "mask": drawn.runs_of(mask)}}
    (tmp_path / "mapping_file.json").write_text(json.dumps(said), "utf-8")
    file = tmp_path / "annotation_images" / first["image_path"]
    file.parent.mkdir(parents=True)
    Image.new("RGB", (side, side)).save(file)
    (case,) = LAYOUTS["pie-bench"](tmp_path).cases
    found = case.mask_at((SIDE, SIDE))
    assert found is not None
    assert np.array_equal(np.asarray(found)[1:-1, 1:-1] > 0, mask[1::2, 1::2][1:-1, 1:-1] > 0)


def test_sixteen_bits_of_grey_are_scaled(tmp_path: Path) -> None:
    grey = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    found = np.asarray(opened(tmp_path / "grey.png"))
    assert found[..., 0].tolist() == [[0, 100], [200, 255]]
    assert np.asarray(opened_mask(tmp_path / "grey.png", (2, 2))).tolist() == [[0, 100], [200, 255]]


@pytest.mark.parametrize("painted", [True, False])
def test_a_mask_may_be_painted_in_alpha(painted: bool, tmp_path: Path) -> None:
    light = np.array([[255, 255], [0, 0]], np.uint8)
    alpha = np.array([[0, 255], [0, 255]], np.uint8) if painted else np.full((2, 2), 255, np.uint8)
    Image.fromarray(np.stack([light] * 3 + [alpha], -1)).save(tmp_path / "mask.png")
    found = np.asarray(opened_mask(tmp_path / "mask.png", (2, 2)))
    assert np.array_equal(found, alpha if painted else light)


def test_an_edit_that_a_vae_cropped_is_laid_where_it_was() -> None:
    source = Image.fromarray(np.random.default_rng(0).integers(0, 256, (77, 70, 3), np.uint8))
    edit = source.crop((3, 6, 67, 70))
    assert edit.size == (64, 64)
    assert at_size_of(source, edit) == source
    assert at_size_of(source, edit.resize((32, 32))).size == source.size
    assert at_size_of(edit, source) == scaled(source, edit.size)
