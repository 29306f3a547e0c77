"""Scores against the packages that define them, and against PIE-Bench's evaluator written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from host import judges
from host.judges import drawn_pictures, photographs, random_pictures


@pytest.fixture(scope="module")
def scores(pack: ModuleType) -> ModuleType:
    return pack.kernels.scores


PAIRS: dict[str, Callable[[], tuple[Tensor, Tensor, Tensor]]] = {
    "random": random_pictures,
    "portraits": drawn_pictures,
    "photographs": photographs,
}
pairs = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


# Pixels


def written_out(a: Tensor, b: Tensor, mask: Tensor) -> tuple[float, float]:
    """PSNR and MSE of PIE-Bench's evaluator: both are multiplied by the mask, means are of all."""
    one, other = (np.asarray(p[0].movedim(0, -1), np.float64) for p in (a, b))
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


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
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
