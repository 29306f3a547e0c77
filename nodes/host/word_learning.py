"""A word that is being learned: its vectors, what a text encoder makes of them, their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy.sd import CLIP
from torch import Tensor, nn

from ...kernels import identity as losses
from . import encoders, training, words

Conditioning = list[Any]

stand_in = "pinpoint-attribute"
"""Name of the word in whose place attribute words are read."""


def trainable(clip: CLIP) -> CLIP:
    """A copy of a text encoder through which gradients reach learned words."""
    copy = clip.clone()
    copy.patcher = training.own_copy(clip.patcher, "clip")
    copy.cond_stage_model = copy.patcher.model
    return copy


def embedded(clip: CLIP, text: str) -> dict[str, Tensor]:
    """The input embeddings of a word in each text encoder, (tokens, width), fp32 on the CPU."""
    found = {}
    for key in clip.tokenize(""):
        model = getattr(clip.cond_stage_model, f"clip_{key}", None)
        model = model or getattr(clip.cond_stage_model, key, None)
        if model is None:
            continue
        tokenizer = encoders.part(clip.tokenizer, key)
        stop = -1 if tokenizer.tokenizer_adds_end_token else None
        ids = tokenizer.tokenizer(text)["input_ids"][tokenizer.tokens_start : stop]
        table = model.transformer.get_input_embeddings()
        device = table.weight.device
        with torch.no_grad():
            vectors = table(torch.tensor(ids, device=device), out_dtype=torch.float32)
        found[key] = vectors.float().cpu().clone()
    return found


class LearnedWord:
    """Vectors of a word in all text encoders, learned as offsets from another word's.

    The offsets are counted in the deviation of the vectors that they start from, so that one rate
    serves text encoders whose embeddings differ in size a hundred times.
    """

    def __init__(self, clip: CLIP, name: str, start: str, count: int):
        """
        Args:
            clip: from `trainable`.
            start: the word whose embeddings are the first vectors.
            count: of vectors for each text encoder.
        """
        self.name = name
        self.start, self.sizes, self.offsets = {}, {}, {}
        for key, vectors in embedded(clip, start).items():
            rows = vectors[[i % len(vectors) for i in range(count)]]
            self.start[key], self.sizes[key] = rows, float(rows.square().mean().sqrt())
            self.offsets[key] = nn.Parameter(torch.zeros_like(rows))
        self._clip = clip

    def vectors(self) -> dict[str, Tensor]:
        """The word's vectors as they are now; gradients lead to the offsets."""
        return {
            key: self.start[key] + self.sizes[key] * offset for key, offset in self.offsets.items()
        }

    def knowing(self) -> CLIP:
        """A text encoder that knows the word as it is now."""
        return words.with_words(self._clip, {self.name: self.vectors()})


@dataclass
class EncodedPrompt:
    """A prompt between text encoder and model.

    The model's gradients are gathered at its entrance, over many steps, and led back through the
    text encoder once: it costs far more than they do, and the word does not change in between.

    Attributes:
        conditioning: what the model is given, cut off from the text encoder.
        rows: of the conditioning, the learned word's.
        features: (P, width) of the learned word, from the text encoder's output.
    """

    conditioning: Conditioning
    rows: tuple[int, ...]
    features: Tensor
    _outputs: list[Tensor]
    _inputs: list[Tensor]

    def backward(self, steps: int, loss: Tensor | None) -> None:
        """Lead the mean of the gathered gradients, and of a loss on the features, to the word."""
        pairs = [(o, i.grad / steps) for o, i in self._matched() if i.grad is not None]
        outputs, gradients = [o for o, _ in pairs], [g for _, g in pairs]
        if loss is not None:
            outputs, gradients = [*outputs, loss], [*gradients, torch.ones_like(loss)]
        if outputs:
            torch.autograd.backward(outputs, gradients)

    def _matched(self) -> list[tuple[Tensor, Tensor]]:
        pairs = zip(self._outputs, self._inputs, strict=True)
        return [(o, i) for o, i in pairs if o.requires_grad]


def encode(clip: CLIP, prompt: str, name: str) -> EncodedPrompt:
    """Encode a prompt that holds a learned word, with gradients.

    Raises:
        ValueError: the text encoder is of an unknown kind, or gives more than one conditioning.
    """
    tokens = clip.tokenize(prompt)
    encoded = clip.encode_from_tokens_scheduled(tokens, show_pbar=False)
    if len(encoded) != 1:
        raise ValueError(
            "clip has a schedule of hooks, with which nothing can be learned: connect it without"
        )
    (cond, entries), outputs, inputs = encoded[0], [], []

    def cut(tensor: Tensor) -> Tensor:
        outputs.append(tensor)
        inputs.append(tensor.detach().clone().requires_grad_())
        return inputs[-1]

    given = dict(entries)
    if torch.is_tensor(given.get("pooled_output")):
        given["pooled_output"] = cut(given["pooled_output"])
    rows = words.rows_of_words(clip, tokens, cond.shape[1])[name.casefold()]
    return EncodedPrompt([[cut(cond), given]], tuple(rows), features(cond, rows), outputs, inputs)


def features(cond: Tensor, rows: Sequence[int]) -> Tensor:
    """(P, width): the mean of each run of neighbouring rows; SD3 has its words in two places."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][-1] == row - 1:
            runs[-1].append(row)
        else:
            runs.append([row])
    return torch.stack([cond[0, run].mean(0) for run in runs])


def features_in_place(clip: CLIP, prompt: str, name: str, text: str) -> Tensor:
    """What a text encoder makes of a word or phrase in the place of the learned word."""
    knowing = words.with_words(clip, {stand_in: embedded(clip, text)})
    with torch.no_grad():
        return encode(knowing, prompt.replace(f"<{name}>", f"<{stand_in}>"), stand_in).features


def orthogonality(prompt: EncodedPrompt, attributes: Tensor, class_word: Tensor) -> Tensor:
    """See `kernels.identity.orthogonality_loss`."""
    return losses.orthogonality_loss(prompt.features, attributes, class_word)
