"""A word that is being learned: its vectors, what a text encoder makes of them, their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from comfy.sd import CLIP
from torch import Tensor, nn

from . import checkpointing, encoders, phrases, training, words

Conditioning = list[Any]

most_kept = 2**30
"""Bytes of weights that a prompt may keep a second time: more than CLIP-L, less than CLIP-G."""


def trainable(clip: CLIP) -> CLIP:
    """A copy of a text encoder through which gradients reach learned words.

    ComfyUI's text encoders compute in fp32. Between a prompt's steps, layers of another type would
    keep their weights a second time (T5-XXL 19 GB), so where that is much they are computed a
    second time instead.
    """
    copy = clip.clone()
    copy.patcher = training.own_copy(clip.patcher, "clip")
    copy.cond_stage_model = copy.patcher.model
    layers = list(checkpointing.layers_of(copy.cond_stage_model))
    weights = [weight for layer in layers for weight in layer.parameters()]
    if 4 * sum(w.numel() for w in weights if w.dtype != torch.float32) <= most_kept:
        return copy
    # For good: clones come and go with it, and would take an injection of the patcher along.
    checkpointing.checkpointed(layers).inject(copy.patcher)
    return copy


def load(clip: CLIP) -> None:
    """Bring a text encoder back, where a model may have taken its place on the device."""
    if not comfy.model_management.is_device_cpu(clip.patcher.load_device):
        comfy.model_management.load_models_gpu([clip.patcher])


def require_known(clip: CLIP, text: str, name: str) -> None:
    """Refuse a text with a learned word that a text encoder does not know.

    Args:
        name: the input that the text came from.

    Raises:
        ValueError: it has one.
    """
    unknown = words.unknown_words(clip, text)
    if unknown:
        raise ValueError(
            f"{name} has <{unknown[0]}>, which the clip does not know: connect the clip of an "
            "Apply Identity that does, or write it in other words"
        )


def embedded(clip: CLIP, text: str, name: str) -> dict[str, Tensor]:
    """The input embeddings of a text in each text encoder, (tokens, width), fp32 on the CPU.

    Learned words and textual inversions stand for their vectors, as in prompts.

    Args:
        name: the input that the text came from, for errors.

    Raises:
        ValueError: a learned word that the text encoder does not know, or no tokens at all.
    """
    require_known(clip, text, name)
    found = {}
    for key, tokens in phrases.own_tokens(clip, text).items():
        encoder = encoders.part(clip.cond_stage_model, key)
        if encoder is None:
            continue
        if not tokens:
            raise ValueError(
                f"{name} has '{text}', for which the text encoder has no tokens: write it in "
                "other words"
            )
        found[key] = _vectors(encoder.transformer.get_input_embeddings(), tokens)
    return found


def _vectors(table: nn.Module, tokens: Sequence[Any]) -> Tensor:
    numbers = [token if isinstance(token, int) else 0 for token in tokens]
    ids = torch.tensor(numbers, dtype=torch.long, device=table.weight.device)
    with torch.no_grad():
        vectors = table(ids, out_dtype=torch.float32).float().cpu().clone()
    for row, token in enumerate(tokens):
        if torch.is_tensor(token):
            vectors[row] = token.detach()
    return vectors


def first_vectors(clip: CLIP, text: str, count: int, name: str) -> dict[str, Tensor]:
    """A number of vectors for each text encoder, a text's; see `embedded`."""
    found = embedded(clip, text, name).items()
    return {key: vectors[[i % len(vectors) for i in range(count)]] for key, vectors in found}


class LearnedWord(Mapping[str, Tensor]):
    """Vectors of a word by text encoder, learned as offsets from another word's.

    The offsets are counted in the size of the vectors that they start from, so that one rate serves
    text encoders whose embeddings differ a hundred times. Whoever looks a text encoder up gets the
    vectors as they are then; gradients lead to the offsets.

    Attributes:
        offsets: what is learned.
    """

    def __init__(self, start: Mapping[str, Tensor]):
        """
        Args:
            start: the first vectors of each text encoder, (n, width).
        """
        self._start = dict(start)
        self._sizes = {key: float(v.square().mean().sqrt()) for key, v in start.items()}
        self.offsets = {key: nn.Parameter(torch.zeros_like(v)) for key, v in start.items()}

    def __getitem__(self, key: str) -> Tensor:
        return self._start[key] + self._sizes[key] * self.offsets[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._start)

    def __len__(self) -> int:
        return len(self._start)


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


def features_in_place(
    clip: CLIP, prompt: str, name: str, texts: Sequence[tuple[str, str]]
) -> Iterator[Tensor]:
    """What a text encoder makes of words or phrases in the place of the learned word, in turn.

    Args:
        texts: each with the input that it came from.
    """
    stand_ins = [f"{name}-{number}" for number in range(len(texts))]
    vectors = {
        stand_in: embedded(clip, text, origin)
        for stand_in, (origin, text) in zip(stand_ins, texts, strict=True)
    }
    knowing = words.with_words(clip, vectors)
    for stand_in in stand_ins:
        with torch.no_grad():
            yield encode(knowing, prompt.replace(f"<{name}>", f"<{stand_in}>"), stand_in).features


def plain(clip: CLIP, text: str) -> Conditioning:
    """The conditioning of a prompt, without gradients."""
    with torch.no_grad():
        return clip.encode_from_tokens_scheduled(clip.tokenize(text), show_pbar=False)


def without_word(prompt: str, name: str, class_word: str) -> str:
    """A prompt without the learned word: its class word, where that is not written anyway."""
    rest = " ".join(prompt.replace(f"<{name}>", " ").split())
    if not class_word or phrases.place_of(rest, class_word) is not None:
        return rest
    return prompt.replace(f"<{name}>", class_word)


def variations(prompt: str, name: str, attributes: Sequence[str]) -> list[str]:
    """The prompt without one of its clauses, or with an attribute as one more."""
    written, clauses = f"<{name}>", phrases.split_clauses(prompt)
    without = [
        "".join(clauses[:i] + clauses[i + 1 :]).lstrip(",\n\uff0c\u3001 ")
        for i, clause in enumerate(clauses)
        if written not in clause
    ]
    return without + [f"{prompt}, {text}" for text in attributes]
