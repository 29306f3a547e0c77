"""Change Mask finds what an editor changed, and takes back what it did to the whole picture."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from host import stock
from host.repairs import DEFAULTS, repairs
from portraits.dataset import edits, people, pictures
from portraits.instruction_editor import Drift, drawn_drift, drifted

pytestmark = pytest.mark.usefixtures("host")

ZOOMED = Drift(1.02, (0.01, -0.015), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
TINTED = Drift(1.0, (0.0, 0.0), (1.05, 0.97, 1.0), (-0.02, 0.01, 0.02))


def changes(source: Tensor, edited: Tensor, **widgets: Any) -> tuple[Any, ...]:
    """Aligned picture, mask, heat map and report; pictures (B, 3, H, W) here."""
    aligned, mask, heat, report = stock.call(
        "PinpointChangeMask",
        source=source.movedim(1, -1),
        edited=edited.movedim(1, -1),
        **{**DEFAULTS, **widgets},
    )
    return aligned.movedim(-1, 1), mask, heat, report


@pytest.fixture(scope="module")
def portraits() -> Tensor:
    return pictures(people("tests", 0, 3)).float() / 255


@pytest.fixture(scope="module")
def edited_pair() -> tuple[Tensor, Tensor]:
    """A portrait and its true edit, a hat."""
    edit = edits("tests", 0, 9)[-1]
    source, target = (pictures([person]).float() / 255 for person in (edit.source, edit.target))
    return source, target


def test_the_repair_keeps_the_edit_and_restores_the_rest() -> None:
    """A tenth of tests/bench/repair.py, at twice the demo's size."""
    found = repairs("held-out", 1, 10, 256)
    assert min(case.outside(case.repaired) for case in found) >= 40
    kept = [case.kept(case.repaired) for case in found]
    assert sum(kept) / len(kept) >= 0.95
    for case in found:
        assert case.outside(case.edited) < 30, "the editor did harm"
        outside = case.mask[0] == 0
        assert torch.equal(case.repaired[..., outside], case.source[..., outside])


def test_an_edit_in_place_stays_as_it_is(edited_pair: tuple[Tensor, Tensor]) -> None:
    """What was not moved or tinted is not resampled."""
    source, target = edited_pair
    aligned, mask, _, report = changes(source, target)
    assert torch.equal(aligned, target)
    assert "not moved or tinted as a whole" in report
    inside = mask[0] > 0
    assert 0 < inside.float().mean() < 0.5
    assert (source - target).abs().amax(1)[0][~inside].max() < DEFAULTS["threshold"]


@pytest.mark.parametrize("drift", [ZOOMED, TINTED], ids=["zoomed", "tinted"])
def test_nothing_is_changed_where_only_the_whole_was(portraits: Tensor, drift: Drift) -> None:
    aligned, mask, _, report = changes(portraits, drifted(portraits, drift))
    assert not mask.any()
    assert (aligned - portraits)[..., 8:-8, 8:-8].abs().mean() < 0.01
    assert len(report.splitlines()) == 3
    if drift is ZOOMED:
        zoom, right, down = map(float, re.findall(r"[-+]?\d+\.\d+", report)[:3])
        assert zoom == pytest.approx(1.02, abs=1e-3)
        assert right == pytest.approx(1.28, abs=0.1)
        assert down == pytest.approx(-1.92, abs=0.1)
    else:
        assert "zoom" not in report
        gain, offset = map(float, re.findall(r"red (\S+) (\S+),", report)[0])
        assert gain == pytest.approx(1.05, abs=0.01)
        assert offset == pytest.approx(-0.02, abs=0.005)


def test_what_is_not_looked_for_is_not_undone(portraits: Tensor) -> None:
    moved = drifted(portraits[:1], ZOOMED)
    aligned, mask, _, _ = changes(portraits[:1], moved, align="none", match_colors=False)
    assert torch.equal(aligned, moved)
    assert mask.mean() > 0.1
    tinted = drifted(portraits[:1], TINTED)
    aligned, mask, _, report = changes(portraits[:1], tinted, align="none")
    assert (aligned - portraits[:1]).abs().mean() < 0.005
    assert not mask.any()
    assert "zoom" not in report


def test_a_batch_is_single_pictures(portraits: Tensor) -> None:
    rng = random.Random(0)
    edited = torch.cat([drifted(one[None], drawn_drift(rng)) for one in portraits])
    together = changes(portraits, edited)
    for index in range(len(portraits)):
        apart = changes(portraits[index : index + 1], edited[index : index + 1])
        for a, b in zip(together[:3], apart[:3], strict=True):
            assert torch.equal(a[index], b[0])
        assert together[3].splitlines()[index].split(":")[1] == apart[3].split(":")[1]
    shared = changes(portraits[:1], edited)
    assert shared[1].shape == (3, 128, 128)
    assert torch.equal(shared[1][0], together[1][0])


def test_sizes_that_differ(portraits: Tensor) -> None:
    """A VAE's crop is laid where it was; what an editor scaled is scaled back."""
    source = portraits[:1]
    aligned, mask, _, _ = changes(source, source[..., 4:-4, 2:-2])
    assert torch.equal(aligned, source)
    assert not mask.any()
    larger = torch.nn.functional.interpolate(source, (256, 272), mode="bicubic").clamp(0, 1)
    aligned, mask, _, _ = changes(source, larger)
    assert aligned.shape == source.shape
    assert not mask.any()


def test_widgets_shape_the_mask(edited_pair: tuple[Tensor, Tensor]) -> None:
    source, target = edited_pair
    difference = (source - target).abs().amax(1)
    plain = changes(source, target, dilation=0, tolerance=0, smallest_part=0)[1]
    assert (difference[plain > 0] >= 0.4 * 0.06).all(), "the rim of a change counts from there on"
    assert (plain[difference >= 0.06] == 1).all()
    grown = changes(source, target, dilation=6, tolerance=0, smallest_part=0)[1]
    assert (grown >= plain).all()
    assert grown.sum() > plain.sum()
    soft = changes(source, target, dilation=6, tolerance=0, smallest_part=0, feather=5)[1]
    assert ((soft > 0) == (grown > 0)).all()
    assert ((soft > 0) & (soft < 1)).any()
    assert not changes(source, target, smallest_part=20000)[1].any()
    speck = source.clone()
    speck[..., 40:43, 40:43] = 1 - speck[..., 40:43, 40:43].round()
    assert changes(source, speck, smallest_part=0)[1][0, 41, 41]
    assert not changes(source, speck, smallest_part=16)[1].any()


def test_thin_lines_that_come_and_go_are_seen(portraits: Tensor) -> None:
    lined = portraits[:1].clone()
    lined[..., 60, 20:100] = 1 - portraits[:1, :, 60, 20:100].round()
    for before, after in ((portraits[:1], lined), (lined, portraits[:1])):
        assert changes(before, after)[1][0, 60, 30:90].float().mean() > 0.9


NAN = torch.full((1, 3, 16, 16), torch.nan)
PLAIN = torch.full((1, 3, 16, 16), 0.5)
REFUSALS: dict[str, tuple[Tensor, Tensor, dict[str, Any], str]] = {
    "source of NaN": (NAN, PLAIN, {}, r"^source holds values that are not finite: check"),
    "edited of NaN": (PLAIN, NAN, {}, r"^edited holds values that are not finite: check"),
    "grey": (PLAIN[:, :1], PLAIN, {}, r"^source is 1x16x16x1: use RGB or RGBA"),
    "no pictures": (PLAIN, PLAIN[:0], {}, r"^edited is 0x16x16x3: use RGB or RGBA"),
    "batches": (
        PLAIN.expand(2, -1, -1, -1),
        PLAIN.expand(3, -1, -1, -1),
        {},
        r"^source has 2 images where another input has 3: use one",
    ),
    "threshold of NaN": (PLAIN, PLAIN, {"threshold": torch.nan}, r"^threshold is nan: enter"),
    "align": (PLAIN, PLAIN, {"align": "all"}, r"^align is all: choose one of none, shift, zoom"),
}


@pytest.mark.parametrize(
    ("source", "edited", "widgets", "message"), REFUSALS.values(), ids=REFUSALS
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(
    source: Tensor, edited: Tensor, widgets: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        changes(source, edited, **widgets)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 5), (33, 500)], ids=str)
@pytest.mark.parametrize("align", ["none", "shift", "zoom and shift"])
def test_pictures_of_any_size_and_without_any_texture(size: tuple[int, int], align: str) -> None:
    flat = torch.full((1, 3, *size), 0.4)
    aligned, mask, heat, _ = changes(flat, flat, align=align)
    assert torch.equal(aligned, flat)
    assert not mask.any()
    assert heat.shape == (1, *size, 3)


def test_an_empty_and_a_full_mask_are_said(
    portraits: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    changes(portraits[:1], portraits[:1])
    assert "so the mask is empty: lower it" in caplog.text
    black = torch.zeros(1, 3, 64, 64)
    changes(black, black + 1, align="none", match_colors=False)
    assert "so the mask is full: raise it" in caplog.text
