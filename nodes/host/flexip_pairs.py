"""Pairs of a folder's pictures: each is encoded once, and kept in files until it is drawn."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.utils
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor

from ...kernels import crops
from . import arguments, subjects, tensor_files
from .flexip_folders import Collection, Picture
from .flexip_settings import Pair, Text

AUGMENTATIONS = ("none", "flip", "flip and crop")
_views = dict(zip(AUGMENTATIONS, (1, 2, 4), strict=True))
"""How many views of a reference each makes."""
_smallest_crop, _largest_crop = 0.7, 0.95
_white = (1.0, 1.0, 1.0)
_same = 0.01
"""What an encoder answers differs by less than this part of its deviation, or it is another one."""

_Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Encoders:
    """What pictures and captions are encoded with; `model` only tells which latents it takes."""

    model: ModelPatcher
    clip: CLIP
    vae: VAE
    low: ClipVisionModel
    high: ClipVisionModel

    @property
    def kinds(self) -> subjects.EncoderKinds:
        """Of the image encoders."""
        return subjects.kind_of(self.low), subjects.kind_of(self.high)

    @torch.no_grad()
    def seen(self, image: Tensor, mask: Tensor | None) -> _Tensors:
        """A reference: patch features (P, W) and embedding (C,)."""
        low, high = subjects.features(image, self.low, self.high, mask)
        return {"low": low[0], "high": high[0]}

    @torch.no_grad()
    def latent(self, image: Tensor, side: int) -> Tensor:
        """A goal, (C, [T,] h, w): the middle of a picture (1, H, W, C)."""
        latent = self.vae.encode(_square(image, side))
        return arguments.latent_samples(self.model, {"samples": latent})[0]

    @torch.no_grad()
    def text(self, caption: str) -> _Tensors:
        """A caption, by the names of `Text`'s parts."""
        tokens = self.clip.tokenize(caption)
        encoded = self.clip.encode_from_tokens(tokens, return_dict=True)
        names = {"cond": "tokens", "pooled_output": "pooled", "attention_mask": "mask"}
        return {
            name: encoded[key][0] for key, name in names.items() if encoded.get(key) is not None
        }

    def answers(self) -> _Tensors:
        """What they make of a picture and a caption that are always the same."""
        row = torch.linspace(0, 1, 64)
        image = torch.stack(
            [row.expand(64, 64), row[:, None].expand(64, 64), row.flip(0).expand(64, 64)], -1
        )[None]
        return {
            **self.seen(image, None),
            "latent": self.latent(image, 64),
            "tokens": self.text("a photo")["tokens"],
        }


class Store:
    """Files of what encoders made, below a folder for each set of encoders.

    Raises:
        ValueError: see `Encoders`, or files that cannot be written.
    """

    def __init__(self, cache: Path, encoders: Encoders):
        self.encoders = encoders
        self.folder = _folder_for(cache, _compact(encoders.answers()))

    def ensure(self, name: str, make: Callable[[], _Tensors]) -> None:
        """Make a file if it is not there."""
        path = self._path(name)
        if not path.exists():
            # Processes of one training may need the same caption at once.
            tensor_files.write(path, _compact(make()), {}, part=f"{os.getpid()}.part")

    def read(self, name: str, only: Mapping[str, int | None] | None = None) -> _Tensors:
        """A file's tensors; see `tensor_files.read`.

        Raises:
            ValueError: it is damaged.
        """
        path = self._path(name)
        try:
            return tensor_files.read(path, only)[0]
        except ValueError as error:
            raise ValueError(
                f"{error}: delete {path.parent}, and its pictures are encoded again"
            ) from error

    def _path(self, name: str) -> Path:
        # Folders with very many files are slow.
        key = hashlib.sha256(name.encode()).hexdigest()[:32]
        return self.folder / key[:2] / f"{key}.safetensors"


class FolderPairs:
    """Pairs of a collection's pictures, as `flexip_settings.Pairs`.

    Args:
        resolution: side of the goals, in pixels.
        augmentation: one of AUGMENTATIONS; of invariant pairs' references.
        invariant_share: how often a pair is an invariant one, where there are both kinds.

    Raises:
        ValueError: a resolution that the VAE cannot encode, or a caption that cannot be read.
    """

    def __init__(
        self,
        collection: Collection,
        store: Store,
        resolution: int,
        augmentation: str = "none",
        invariant_share: float = 0.5,
    ):
        self.collection, self.store = collection, store
        self.resolution, self.augmentation = resolution, augmentation
        shares = {(True, False): 1.0, (False, True): 0.0}
        has = bool(collection.invariant), bool(collection.subjects)
        self.invariant_share = shares.get(has, invariant_share)
        cell = store.encoders.vae.spacial_compression_encode()
        if resolution % cell:
            lower = resolution // cell * cell
            raise ValueError(
                f"resolution is {resolution}, the VAE encodes cells of {cell} pixels: choose "
                f"{lower or cell} or {lower + cell}"
            )
        pictures = collection.pictures
        self._invariant = frozenset(collection.invariant)
        self._captions = {picture: picture.caption() for picture in pictures}
        self._names = {p: f"{p.name} {p.stamp()} {resolution} {augmentation}" for p in pictures}

    def encode(self, tell: Callable[[str], None], part: int = 0, parts: int = 1) -> None:
        """Encode what is not yet encoded; an interrupted encoding goes on where it stopped.

        Args:
            tell: is told which picture it is at.
            part, parts: which share of the pictures, where several processes do one each.

        Raises:
            ValueError: a picture or mask that cannot be used.
        """
        pictures = self.collection.pictures[part::parts]
        bar = comfy.utils.ProgressBar(2 * len(pictures) + 1)
        # All pictures first: image encoders and text encoders may not fit side by side.
        tasks = [(p, self._encode_picture) for p in pictures]
        tasks += [(p, self._encode_caption) for p in pictures]
        for done, (picture, encode) in enumerate(tasks):
            comfy.model_management.throw_exception_if_processing_interrupted()
            tell(f"encoding {picture.name}, {done + 1} of {len(tasks)}")
            encode(picture)
            bar.update_absolute(done + 1)
        self._encode_text("")

    @property
    def empty(self) -> Text:
        """The empty prompt."""
        return self._text("")

    @property
    def widths(self) -> tuple[int, int, int]:
        """Of the low-level features, the embedding, and the text."""
        pair = self.fixed()
        return pair.low.shape[-1], pair.high.shape[-1], pair.text.shape[-1]

    def fixed(self) -> Pair:
        """The pair that validation pictures are made of: always the same, a variant one at best."""
        return self._pair(*self._fixed, 0)

    def goal(self) -> Tensor:
        """What `fixed` is to become, (1, H, W, 3)."""
        return _square(self._fixed[1].pixels(), self.resolution)

    def drawn(self, chance: random.Random) -> Pair:
        """See `Pairs`."""
        if chance.random() < self.invariant_share:
            picture = chance.choice(self.collection.invariant)
            return self._pair(picture, picture, chance.randrange(_views[self.augmentation]))
        reference, target = chance.sample(chance.choice(self.collection.subjects), 2)
        return self._pair(reference, target, 0)

    @property
    def _fixed(self) -> tuple[Picture, Picture]:
        if self.collection.subjects:
            reference, target, *_ = self.collection.subjects[0]
            return reference, target
        picture = self.collection.invariant[0]
        return picture, picture

    def _pair(self, reference: Picture, target: Picture, view: int) -> Pair:
        seen = self.store.read(self._names[reference], {"low": view, "high": view})
        goal = self.store.read(self._names[target], {"latent": None})
        text = self._text(self._captions[target])
        return Pair(
            low=seen["low"],
            high=seen["high"],
            latent=goal["latent"],
            text=text.tokens,
            pooled=text.pooled,
            invariant=reference == target,
            text_mask=text.mask,
        )

    def _encode_picture(self, picture: Picture) -> None:
        def make() -> _Tensors:
            image, mask, encoders = picture.pixels(), picture.mask(), self.store.encoders
            # References of variant pairs are other pictures already.
            is_varied = picture in self._invariant
            augmentation = self.augmentation if is_varied else AUGMENTATIONS[0]
            try:
                views = _augmented(image, mask, augmentation, random.Random(picture.name))
                seen = [encoders.seen(*view) for view in views]
                latent = encoders.latent(image, self.resolution)
            except ValueError as error:
                raise ValueError(f"picture {picture.name}: {error}") from error
            both = {key: torch.stack([one[key] for one in seen]) for key in ("low", "high")}
            return {**both, "latent": latent}

        self.store.ensure(self._names[picture], make)

    def _encode_caption(self, picture: Picture) -> None:
        self._encode_text(self._captions[picture])

    def _encode_text(self, caption: str) -> None:
        self.store.ensure(f"text {caption}", lambda: self.store.encoders.text(caption))

    def _text(self, caption: str) -> Text:
        found = self.store.read(f"text {caption}")
        return Text(found["tokens"], found.get("pooled"), found.get("mask"))


def _square(image: Tensor, side: int) -> Tensor:
    """The middle of a picture (1, H, W, C) as a goal, (1, side, side, 3)."""
    whole = crops.on_color(image[0], _white)[None].movedim(-1, 1)
    return comfy.utils.common_upscale(whole, side, side, "lanczos", "center").movedim(1, -1)


def _folder_for(cache: Path, answers: _Tensors) -> Path:
    """The folder of the encoders that answer so: files of others would not fit."""
    name = "encoders.safetensors"
    known = sorted(cache.glob(f"*/{name}"))
    for file in known:
        said, _ = tensor_files.read(file)
        if said.keys() == answers.keys() and all(_alike(answers[key], said[key]) for key in said):
            return file.parent
    numbers = [int(file.parent.name) for file in known if file.parent.name.isdecimal()]
    folder = cache / str(max(numbers, default=0) + 1)
    tensor_files.write(folder / name, answers, {})
    return folder


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    one, other = one.float(), other.float()
    return bool((one - other).abs().max() <= _same * other.std())


def _compact(tensors: _Tensors) -> _Tensors:
    """In 16 bits, where the values allow it."""
    short = {key: tensor.to("cpu", torch.float16) for key, tensor in tensors.items()}
    return {
        key: t if t.isfinite().all() else tensors[key].to("cpu", torch.float32)
        for key, t in short.items()
    }


def _augmented(
    image: Tensor, mask: Tensor | None, augmentation: str, chance: random.Random
) -> list[tuple[Tensor, Tensor | None]]:
    """Views of a reference (1, H, W, C) and its mask; the first is the picture as it is."""
    views = [(image, mask)]
    if augmentation == AUGMENTATIONS[2]:
        views.append(_cropped(image, mask, chance))
    if augmentation != AUGMENTATIONS[0]:
        views += [(i.flip(2), None if m is None else m.flip(2)) for i, m in views]
    return views


def _cropped(
    image: Tensor, mask: Tensor | None, chance: random.Random
) -> tuple[Tensor, Tensor | None]:
    """A part of a picture; all of it, if no subject would be left."""
    part = chance.uniform(_smallest_crop, _largest_crop)
    places = []
    for size in image.shape[1:3]:
        length = max(1, round(size * part))
        start = chance.randint(0, size - length)
        places.append(slice(start, start + length))
    rows, columns = places
    if mask is None:
        return image[:, rows, columns], None
    kept = mask[:, rows, columns]
    return (image[:, rows, columns], kept) if (kept >= 0.5).any() else (image, mask)
