"""Losses of a learned word, against formulas written out."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def identity(pack: ModuleType) -> ModuleType:
    return pack.kernels.identity


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_cosines_leave_out_what_all_words_share(identity: ModuleType) -> None:
    word, attributes, class_word = drawn(1, 32), drawn(3, 1, 32, seed=1), drawn(1, 32, seed=2)
    plain = identity.cosines(word, attributes, class_word)
    shared = 40 * drawn(1, 32, seed=3)
    moved = identity.cosines(word + shared, attributes + shared, class_word + shared)
    torch.testing.assert_close(moved, plain, rtol=1e-3, atol=1e-4)
    common = (attributes[0] + attributes[2] + class_word) / 3
    a, b = (word - common)[0], (attributes[1] - common)[0]
    torch.testing.assert_close(plain[1, 0], a @ b / (a.norm() * b.norm()))


def test_the_class_word_is_no_farther_from_attributes_than_chance(identity: ModuleType) -> None:
    attributes, class_word = drawn(5, 1, 4096), drawn(1, 4096, seed=1)
    assert identity.cosines(class_word, attributes, class_word).abs().max() < 0.05


def test_orthogonality_loss_is_least_at_a_right_angle(identity: ModuleType) -> None:
    attributes, class_word = drawn(4, 2, 16), drawn(2, 16, seed=1)
    word = drawn(2, 16, seed=2).requires_grad_()
    optimizer = torch.optim.Adam([word], lr=0.05)
    for _ in range(1000):
        optimizer.zero_grad()
        loss = identity.orthogonality_loss(identity.cosines(word, attributes, class_word))
        loss.backward()
        optimizer.step()
    assert identity.cosines(word.detach(), attributes, class_word).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
def test_prediction_error_is_that_of_the_network(identity: ModuleType, kind: str) -> None:
    clean, noise, output = (drawn(2, 4, 5, 6, seed=i) for i in range(3))
    sigma = torch.tensor([0.3, 0.8])
    shaped = sigma.view(-1, 1, 1, 1)
    if kind == "flow":
        x, true = (1 - shaped) * clean + shaped * noise, noise - clean
    else:
        x, true = clean + shaped * noise, noise
    error = identity.prediction_error(x - shaped * output, clean, sigma)
    torch.testing.assert_close(error, (output - true).square().mean((1, 2, 3)))


def test_prediction_error_counts_by_weight(identity: ModuleType) -> None:
    clean, predicted, sigma = drawn(1, 4, 6, 6), drawn(1, 4, 6, 6, seed=1), torch.tensor([0.5])
    weight = torch.zeros(1, 1, 6, 6)
    weight[..., :3] = 1
    left = identity.prediction_error(predicted[..., :3], clean[..., :3], sigma)
    torch.testing.assert_close(identity.prediction_error(predicted, clean, sigma, weight), left)
    ones = torch.ones_like(weight)
    whole = identity.prediction_error(predicted, clean, sigma)
    torch.testing.assert_close(identity.prediction_error(predicted, clean, sigma, ones), whole)
    nothing = identity.prediction_error(predicted, clean, sigma, 0 * ones)
    assert nothing.tolist() == [0.0]


def test_levels_are_spread_evenly(identity: ModuleType) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        levels = identity.stratified(8, generator)
        assert (levels * 8).long().tolist() == list(range(8))
        assert ((levels > 0) & (levels < 1)).all()


def test_logit_normal_levels_lie_in_the_middle(identity: ModuleType) -> None:
    uniform = (torch.arange(20000) + 0.5) / 20000
    levels = identity.logit_normal(uniform)
    logits = torch.logit(levels)
    assert abs(float(logits.mean())) < 1e-3
    assert abs(float(logits.std()) - 1) < 1e-2
