"""Learning a word for a person: losses and noise levels. Pure tensor functions.

S2Edit (arXiv 2507.04584) keeps the learned word apart from the attributes that shall stay free by
an orthogonality loss in the text encoder's space. Its exact algebra is not published; this is ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosines(word: Tensor, attributes: Tensor, class_word: Tensor) -> Tensor:
    """Cosines between what a text encoder makes of a word and of attribute words.

    Features of all words share a large common part: position, and the direction in which a text
    encoder's features crowd. It is taken away first, as otherwise no two words would be orthogonal;
    for each attribute it is the mean over the class word and the other attributes. With the
    attribute itself in the mean, unrelated words would seem opposed, by 1 / K.

    Args:
        word: (P, width), the learned word's features; P parts when several encoders are used.
        attributes: (K, P, width), those of attribute words in its place.
        class_word: (P, width), those of the class word in its place.

    Returns:
        (K, P) in [-1, 1].
    """
    total = attributes.sum(0) + class_word
    common = (total - attributes) / len(attributes)
    return F.cosine_similarity(word - common, attributes - common, dim=-1)


def orthogonality_loss(found: Tensor) -> Tensor:
    """Mean square of `cosines`: least where the word is orthogonal to every attribute."""
    return found.square().mean()


def prediction_error(
    predicted: Tensor, clean: Tensor, sigma: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Mean squared error of a network's own prediction, read from its denoised latents.

    The error of x0 is sigma times that of the noise (epsilon prediction) or of the velocity (flow),
    so dividing by sigma gives the loss that the network was trained with.

    Args:
        predicted, clean: latents, (B, C, [T,] H, W).
        sigma: (B,), as the sampler counts it.
        weight: of each place, broadcastable to the latents; its mean need not be 1.

    Returns:
        (B,).
    """
    squared = (predicted - clean).square() / sigma.view(-1, *[1] * (clean.ndim - 1)).square()
    if weight is None:
        return squared.flatten(1).mean(1)
    weight = weight.expand_as(squared)
    return (squared * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp(min=1e-6)


def stratified(count: int, generator: torch.Generator) -> Tensor:
    """(count,) numbers in (0, 1), one from each of as many equal parts, in ascending order.

    Spreading a batch's noise levels evenly makes its loss vary less than independent draws do.
    """
    draws = torch.rand(count, generator=generator).clamp(1e-4, 1 - 1e-4)
    return (torch.arange(count) + draws) / count


def logit_normal(uniform: Tensor) -> Tensor:
    """Uniform numbers in (0, 1) to logit-normal ones: most of them in the middle.

    Stable Diffusion 3 (Esser et al., 2024, section 3.1), location 0 and scale 1.
    """
    return torch.sigmoid(torch.special.ndtri(uniform))
