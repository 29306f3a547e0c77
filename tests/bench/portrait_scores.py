"""The Flux-Sculptor paper's columns, defined for portraits that a program draws."""

from __future__ import annotations

import torch
from torch import Tensor

from portraits.dataset import Edit, smallest_change
from portraits.judging import drawn_values, fitted_identities, nearest
from portraits.people import attributes, identity_ranges

fitted = [name for name in identity_ranges if not name.startswith("mole")]
"""Half of the portraits have no mole, and many hide it."""
fitting_steps = 40


class Panel:
    """All values of all attributes, drawn once for a batch of edits that is judged many times."""

    def __init__(self, edits: list[Edit]):
        self.edits = edits
        people = [edit.target for edit in edits]
        self.drawn = {attribute: drawn_values(people, attribute) for attribute in attributes}

    def verdicts(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each picture shows what was asked for, and the share of other attributes kept.

        An attribute counts where it can be seen in the true edit.
        """
        right, seen = [], []
        for attribute, (drawings, region) in self.drawn.items():
            values = nearest(images, drawings, region)
            wanted = [
                attributes[attribute].index(e.target.attributes[attribute]) for e in self.edits
            ]
            right.append(torch.tensor(values) == torch.tensor(wanted))
            seen.append(region.sum((1, 2)) >= smallest_change)
        right, seen = torch.stack(right, 1).float(), torch.stack(seen, 1).float()
        rows = torch.arange(len(self.edits))
        asked = torch.tensor([list(attributes).index(e.attribute) for e in self.edits])
        edited = right[rows, asked].clone()
        seen[rows, asked] = 0
        return edited, (right * seen).sum(1) / seen.sum(1)


def identity_kept(edits: list[Edit], images: Tensor) -> Tensor:
    """How well the drawn identity is found in each picture, 1 = exactly.

    One minus the mean error of its parameters as fitted to the picture, in parts of their ranges.
    """
    people = fitted_identities(images, [e.target for e in edits], fitting_steps, moles=(0.05,))
    names = list(identity_ranges)
    errors = []
    for name in fitted:
        low, high = identity_ranges[name]
        index = names.index(name)
        found, true = (
            torch.tensor([p.identity[index] for p in group])
            for group in (people, [e.source for e in edits])
        )
        errors.append((found - true).abs() / (high - low))
    return 1 - torch.stack(errors).mean(0)
