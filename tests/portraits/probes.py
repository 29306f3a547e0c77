"""What features know of portraits: linear probes that read identities and attributes from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .people import Portrait, attributes, identity_ranges

_mole_x, _mole_size = (list(identity_ranges).index(name) for name in ("mole x", "mole size"))
value_counts = [len(values) for values in attributes.values()]
answers = len(identity_ranges) + sum(value_counts)
"""Of a probe: a number for each identity parameter, and a score for each value."""


@dataclass(frozen=True)
class Labels:
    """Who is in N portraits.

    Attributes:
        identity: (N, 16), each range scaled to -1..1; a mole that is not there is in the middle.
        chosen: (N, 11), the index of each attribute's value.
    """

    identity: Tensor
    chosen: Tensor

    def of(self, picked: Tensor) -> Labels:
        """Those of some portraits."""
        return Labels(self.identity[picked], self.chosen[picked])

    def repeated(self, count: int) -> Labels:
        """Each portrait's as often as there are answers for it."""
        return Labels(*(t.repeat_interleave(count, 0) for t in (self.identity, self.chosen)))


@dataclass(frozen=True)
class Findings:
    """How well a probe reads: R2 by identity parameter, and the share of right values."""

    r2: dict[str, float]
    accuracy: dict[str, float]


def labels(portraits: list[Portrait]) -> Labels:
    """The truth."""
    low, high = torch.tensor(list(identity_ranges.values())).unbind(1)
    identity = (torch.tensor([p.identity for p in portraits]) - low) / (high - low) * 2 - 1
    identity[identity[:, _mole_size] <= -1, _mole_x] = 0
    chosen = [
        [values.index(p.attributes[name]) for name, values in attributes.items()] for p in portraits
    ]
    return Labels(identity, torch.tensor(chosen))


def split(found: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Answers (N, 63) as identities (N, 16) and scores (N, values) for each attribute."""
    identity, scores = found.split([len(identity_ranges), sum(value_counts)], 1)
    return identity, list(scores.split(value_counts, 1))


def error(found: Tensor, truth: Labels, identity_weight: float) -> Tensor:
    """Squared error of the identity and cross-entropy of the attributes, each a mean."""
    identity, scores = split(found)
    entropies = [F.cross_entropy(each, truth.chosen[:, i]) for i, each in enumerate(scores)]
    squared = F.mse_loss(identity, truth.identity)
    return identity_weight * squared + torch.stack(entropies).mean()


def probed(known: Tensor, known_labels: Labels, asked: Tensor, asked_labels: Labels) -> Findings:
    """Fit a probe to features (N, D) and judge it by others (M, D)."""
    hot = [
        F.one_hot(known_labels.chosen[:, index], count).float()
        for index, count in enumerate(value_counts)
    ]
    found = _ridge(known, torch.cat([known_labels.identity, *hot], 1), asked)
    identity, scores = split(found)
    truth = asked_labels.identity
    unexplained = (identity - truth).pow(2).mean(0) / truth.var(0, unbiased=False)
    right = [
        (each.argmax(1) == asked_labels.chosen[:, index]).float().mean()
        for index, each in enumerate(scores)
    ]
    return Findings(
        {name: 1 - float(part) for name, part in zip(identity_ranges, unexplained, strict=True)},
        {name: float(share) for name, share in zip(attributes, right, strict=True)},
    )


def _ridge(x: Tensor, y: Tensor, asked: Tensor, strength: float = 0.1) -> Tensor:
    """Predict (M, K) from features (M, D), by ridge regression on (N, D) and (N, K)."""
    mean, deviation, middle = x.mean(0), x.std(0) + 1e-6, y.mean(0)
    x, asked = (((part - mean) / deviation).double() for part in (x, asked))
    # Of the two forms, the one whose matrix has a side per portrait serves wide features too.
    products = x @ x.T
    products += strength * products.diagonal().mean() * torch.eye(len(x), dtype=x.dtype)
    found: Tensor = asked @ x.T @ torch.linalg.solve(products, (y - middle).double())
    return found.float() + middle
