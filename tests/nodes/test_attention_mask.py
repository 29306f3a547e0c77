"""What Attention Mask gathers, against whole maps of what an override of its own is shown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from host import foreign, stock
from host.edits import patcher_state
from host.tapping import FAMILIES, Family, each_of, families

TinyModel = Callable[[str], Any]

some_families = each_of("SD3.5-medium", "Flux.2", "Wan", "SD1.5")


@pytest.fixture
def located(pack: ModuleType) -> ModuleType:
    return pack.nodes.host.attention_map


@dataclass
class Shown:
    """An attention as ComfyUI's override is shown it, its queries and keys in heads."""

    q: Tensor
    k: Tensor
    mask: Tensor | None

    def seen_by(self, rows: range, keys: slice, columns: Tensor, heads: list[int]) -> Tensor:
        """The mean over heads of the whole map between some queries and some keys, in float64."""
        k = self.k.repeat_interleave(self.q.shape[1] // self.k.shape[1], 1)
        q, k = self.q[:, heads].double(), k[:, heads, keys].double()
        scores = q[:, :, list(rows)] @ k.mT / q.shape[-1] ** 0.5
        if self.mask is not None:
            mask = self.mask if self.mask.shape[-2] == 1 else self.mask[..., list(rows), :]
            scores = scores + mask.double().unsqueeze(-3)
        return (scores.softmax(-1) @ columns.double()[:, None]).mean(1)


def attentions(model: Any, prompt: stock.Conditioning, x: Tensor, sigma: float) -> list[Shown]:
    """All attentions of a model call, in order."""
    shown = []

    def override(
        attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        heads = kwargs.get("heads") or args[0]
        mask = kwargs.get("mask", args[1] if len(args) > 1 else None)
        in_heads = q.clone(), k.clone()
        if not kwargs.get("skip_reshape"):
            width = q.shape[-1] // heads
            in_heads = tuple(t.unflatten(2, (-1, width)).transpose(1, 2) for t in in_heads)
        shown.append(Shown(in_heads[0], in_heads[1], mask))
        return attention(q, k, v, *args, **kwargs)

    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    stock.velocity(clone, prompt, None, 1.0, x, sigma)
    return shown


def levels(highest: float, lowest: float, samples: int) -> list[float]:
    step = (highest - lowest) / max(1, samples - 1)
    return [highest - k * step for k in range(samples)]


def noised(model: Any, latent: Tensor, level: float, seed: int) -> tuple[Tensor, float]:
    """The picture with one noise for all of a batch, and the noise level as the model counts."""
    import comfy.model_sampling

    clean = model.model.process_latent_in(latent)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(clean.shape[1:], generator=generator).expand_as(clean)
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, comfy.model_sampling.CONST):
        return (1 - level) * clean + level * noise, level
    sigma = level / (1 - level)
    return clean + sigma * noise, sigma


def whole_maps(
    model: Any,
    family: Family,
    prompt: stock.Conditioning,
    columns: Tensor,
    latent: Tensor,
    *,
    blocks: tuple[str, ...] | None = None,
    heads: list[int] | None = None,
    samples: int = 2,
    propagation: int = 0,
) -> Tensor:
    """What `gathered` promises, from whole maps, with levels from 0.85 to 0.6 and seed 5."""
    sums: dict[Any, Any] = defaultdict(float)
    for k, level in enumerate(levels(0.85, 0.6, samples)):
        x, sigma = noised(model, latent, level, 5 + 100 * k)
        own = None
        calls = attentions(model, prompt, x, sigma)
        # Picture-to-video models also attend to a picture, which is none of `seen`.
        calls = [c for c in calls if c.k.shape[2] != 257]
        refiners = len(calls) - len(family.seen)
        for name, call in zip(family.seen, calls[refiners:], strict=True):
            block, kind = name.rsplit(" ", 1)
            image, grid = family.image_of(block, kind), family.grid_of(block)
            chosen = heads or list(range(call.q.shape[1]))
            span = slice(image.start, image.stop)
            if kind != "cross":
                own = call, image, span
            if kind == "self" or (blocks is not None and block not in blocks):
                continue
            laid = torch.zeros(len(latent), call.k.shape[2], columns.shape[-1])
            laid[:, list(family.words)] = columns
            maps = call.seen_by(image, slice(None), laid, chosen)
            assert own is not None
            for _ in range(propagation):
                self_call, rows, keys = own
                unmasked = Shown(self_call.q, self_call.k, None)
                maps = unmasked.seen_by(rows, keys, maps, chosen)
            sums[grid] = sums[grid] + maps
    total: Any = 0
    finest = max(sums, key=lambda grid: grid[1] * grid[2])
    for (frames, *size), maps in sums.items():
        framed = maps.movedim(1, 2).unflatten(2, (frames, *size)).mean(2)
        framed = framed / framed.amax((1, 2, 3), keepdim=True)
        total = total + F.interpolate(framed, finest[1:], mode="bilinear")
    return total


def weights(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Search:
    """One call of `gathered`."""

    located: ModuleType
    model: Any
    family: Family
    columns: Tensor
    batch: int = 2

    def found(self, prompt: stock.Conditioning | None = None, **settings: Any) -> Tensor:
        """The maps."""
        chosen = self.located.layouts.chosen_blocks(self.model, settings.pop("blocks", "all"))
        given = {**dict(samples=2, propagation=0, seed=5), **settings}
        gathering = self.located.GatherSettings(chosen, **given)
        prompt = prompt or self.family.prompt(1)
        latent = self.family.latent(self.batch)
        with torch.inference_mode():
            return self.located.gathered(self.model, prompt, self.columns, latent, gathering)

    def expected(self, **settings: Any) -> Tensor:
        """The same from whole maps."""
        prompt, latent = self.family.prompt(1), self.family.latent(self.batch)
        return whole_maps(self.model, self.family, prompt, self.columns, latent, **settings)


def close(found: Tensor, expected: Tensor) -> bool:
    # Maps have their maximum at 1 for each grid.
    return found.shape == expected.shape and bool((found - expected).abs().max() < 2e-4)


# Maps


@families
def test_maps_are_those_of_whole_attention(
    located: ModuleType, tiny_model: TinyModel, family: Family
) -> None:
    rows = 1 if "lumina2_bare" in family.model else 2
    columns = weights(1, rows, len(family.words), 3)
    search = Search(located, tiny_model(family.model), family, columns, rows)
    expected = search.expected()
    found = search.found()
    assert close(found, expected)
    assert found.dtype == torch.float32
    # Groups and rows differ, so that none can have taken another's place.
    assert (found[:, 0] - found[:, 1]).abs().max() > 0.01


@some_families
@pytest.mark.parametrize("propagation", [1, 3])
def test_maps_spread_along_the_pictures_own_attention(
    located: ModuleType, tiny_model: TinyModel, family: Family, propagation: int
) -> None:
    columns = weights(1, len(family.words), 2)
    search = Search(located, tiny_model(family.model), family, columns)
    found = search.found(propagation=propagation)
    assert close(found, search.expected(propagation=propagation))
    assert not close(found, search.expected())


@pytest.mark.parametrize(
    ("name", "choice", "blocks"),
    [
        ("SD3.5-medium", "joint 1", ("joint 1",)),
        ("Flux", "double", ("double 0",)),
        ("Flux", "50%-100%", ("single 0",)),
        ("SD1.5", "input, output 1", ("input 1", "output 1")),
        ("SDXL", "middle", ("middle 0", "middle 0.1")),
    ],
)
def test_only_the_chosen_blocks_are_read(
    located: ModuleType, tiny_model: TinyModel, name: str, choice: str, blocks: tuple[str, ...]
) -> None:
    family = FAMILIES[name]
    search = Search(located, tiny_model(family.model), family, weights(1, len(family.words), 2))
    found = search.found(blocks=choice)
    assert close(found, search.expected(blocks=blocks))
    assert not (found.shape == (all_of := search.expected()).shape and close(found, all_of))


@pytest.mark.parametrize(("choice", "heads"), [("0", [0]), ("1", [1]), ("3, 5-7", [3, 5, 6, 7])])
def test_only_the_chosen_heads_are_read(
    located: ModuleType, tiny_model: TinyModel, choice: str, heads: list[int]
) -> None:
    family = FAMILIES["SD1.5" if max(heads) > 1 else "SD3"]
    search = Search(located, tiny_model(family.model), family, weights(1, len(family.words), 2))
    found = search.found(heads=located.chosen_heads(choice), propagation=1)
    assert close(found, search.expected(heads=heads, propagation=1))
    assert not close(found, search.expected(propagation=1))
    with pytest.raises(ValueError, match=r"names head 9, but the model's attention has heads 0-"):
        search.found(heads=located.chosen_heads("1, 9"))


def test_heads_by_name(located: ModuleType) -> None:
    for text in ("all", " ALL ", ""):
        assert located.chosen_heads(text) == ()
    assert located.chosen_heads("7, 0-2,1") == (0, 1, 2, 7)
    for text in ("a", "1-", "1,,2", "-3"):
        with pytest.raises(ValueError, match=r"heads is '.*': write all, or numbers and ranges"):
            located.chosen_heads(text)
    with pytest.raises(ValueError, match="heads has 7-4, which falls: write 4-7"):
        located.chosen_heads("1, 7-4")


def test_a_models_mask_hides_words(located: ModuleType, tiny_model: TinyModel) -> None:
    family = FAMILIES["Qwen-Image"]
    ignoring = torch.tensor([[1] * 7 + [0] * 5])
    prompt = stock.with_values(family.prompt(1), attention_mask=ignoring)
    columns = torch.eye(12)
    search = Search(located, tiny_model("qwen"), family, columns)
    found = search.found(prompt)
    masked = whole_maps(search.model, family, prompt, columns, family.latent(2))
    assert close(found, masked)
    assert not found[:, 7:].any()
    assert (found[:, :7] > 0).all()


def test_a_mask_over_all_tokens_is_cut_to_the_pictures(
    located: ModuleType, tiny_model: TinyModel
) -> None:
    """As ComfyUI's Apply Style Model makes it for Flux."""
    family = FAMILIES["Flux"]
    bias = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(3)) * 2
    prompt = stock.with_values(
        family.prompt(1), attention_mask=bias, attention_mask_img_shape=(4, 5)
    )
    search = Search(located, tiny_model("flux"), family, weights(1, 12, 2))
    masked = whole_maps(search.model, family, prompt, search.columns, family.latent(2))
    assert close(search.found(prompt), masked)
    assert not close(masked, search.expected())


@some_families
def test_rows_are_pictures_and_one_noise_serves_all(
    located: ModuleType, tiny_model: TinyModel, family: Family
) -> None:
    columns = weights(1, 3, len(family.words), 2)
    search = Search(located, tiny_model(family.model), family, columns, batch=3)
    together = search.found(propagation=1)
    assert torch.equal(search.found(propagation=1), together)
    latent, prompt = family.latent(3), family.prompt(1)
    settings = located.GatherSettings(
        located.layouts.chosen_blocks(search.model, "all"), samples=2, propagation=1, seed=5
    )
    for row in range(3):
        one = slice(row, row + 1)
        with torch.inference_mode():
            alone = located.gathered(search.model, prompt, columns[one], latent[one], settings)
        assert close(together[one], alone)


@pytest.mark.parametrize("name", ["SD3", "SD1.5"])
@pytest.mark.parametrize("highest", [1.0, 0.0])
def test_noise_levels_at_their_ends(
    located: ModuleType, tiny_model: TinyModel, name: str, highest: float
) -> None:
    family = FAMILIES[name]
    search = Search(located, tiny_model(family.model), family, weights(1, 12, 2))
    assert torch.isfinite(search.found(highest=highest, lowest=0.0)).all()


def test_attention_of_others_is_read_and_none_is_said(
    located: ModuleType, tiny_model: TinyModel
) -> None:
    family, plain = FAMILIES["SD1.5"], tiny_model("sd15")
    model = plain.clone()
    state = patcher_state(plain)
    for block in (("input", 1), ("output", 0), ("output", 1)):
        model.set_model_attn2_replace(lambda q, *_: q, *block)
    columns = weights(1, 12, 2)
    with pytest.raises(ValueError, match="another node replaces their attention: choose others"):
        Search(located, model, family, columns).found()
    # Nothing to spread along where another pack took over the picture's own attention.
    model = plain.clone()
    model.set_model_attn1_replace(lambda q, *_: q, "output", 0)
    search = Search(located, model, family, columns)
    found = [search.found(blocks="output 0", propagation=count) for count in (0, 2)]
    assert torch.equal(*found)
    assert search.found(propagation=1).shape == found[0].shape
    # A LoRA changes what is read.
    flux, hooked = FAMILIES["Flux"], foreign.lora(tiny_model("flux"))
    search = Search(located, hooked, flux, columns)
    assert close(search.found(), search.expected())
    assert not close(search.found(), Search(located, tiny_model("flux"), flux, columns).found())
    assert patcher_state(plain) == state


def test_heat_is_each_maps_own_and_contrast_takes_the_rest_away(located: ModuleType) -> None:
    maps = weights(2, 2, 3, 5, 7) * torch.tensor([1.0, 5.0, 0.3]).view(1, 3, 1, 1)
    stretched = torch.empty(2, 3, 5, 7)
    for row in range(2):
        for group in range(3):
            flat = maps[row, group].flatten()
            low, high = flat.quantile(0.1), flat.quantile(0.8)
            stretched[row, group] = (maps[row, group].clamp(low, high) - low) / (high - low)
    heat = located.phrase_heat(maps, 0.1, 0.8, 0.0)
    torch.testing.assert_close(heat, stretched[:, :2], rtol=0, atol=1e-5)
    left = (stretched[:, :2] - 0.6 * stretched[:, 2:]).clamp(min=0)
    expected = left / left.amax((2, 3), keepdim=True)
    found = located.phrase_heat(maps, 0.1, 0.8, 0.6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
