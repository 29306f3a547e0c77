"""The proving ground itself: what is drawn, named and encoded is what the judging takes it for."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from host import stock
from host.inprocess import Host
from portraits import checkpoint, codec, dataset, judging, text_encoder, weights
from portraits.drawing import draw
from portraits.people import Portrait, attributes, caption, identity_ranges, phrase_order
from portraits.training import Trainer

# The issue asks for 10 ms a portrait, which the benches show; a loaded machine gets three times it.
MILLISECONDS_A_PORTRAIT = 30
CODEC_PSNR, SD15_CODEC_PSNR = 28.0, 27.0
CODEC_BYTES, SD3_BYTES, FLUX_BYTES, SD15_BYTES = 5e6, 10e6, 12e6, 10e6
IDENTITY_BYTES = 3e5


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads that wait for each other on a busy machine would be timed, and waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


PLAIN = {"hair length": "long", "hat": "no", "eyewear": "no", "beard": "no"}
PLAIN |= {"expression": "neutral", "lips": "red", "skin": "pale"}
"""Attributes that hide nothing."""


def people(count: int = 24) -> list[Portrait]:
    return dataset.people("tests", 0, count)


# Drawing


def test_drawing_is_quick() -> None:
    crowd = people(64)
    draw(crowd[:2])
    started = time.process_time()
    draw(crowd)
    assert (time.process_time() - started) / len(crowd) * 1000 <= MILLISECONDS_A_PORTRAIT


def test_pictures_are_colours_of_the_asked_size() -> None:
    for size in (32, 128):
        drawn = draw(people(3), size)
        assert drawn.shape == (3, 3, size, size)
        assert drawn.min() >= 0
        assert drawn.max() <= 1
    assert dataset.pictures(people(5), chunk=2).dtype == torch.uint8


def test_a_portrait_does_not_depend_on_its_batch() -> None:
    crowd = people()
    together = draw(crowd)
    apart = torch.cat([draw([person]) for person in crowd])
    assert torch.allclose(together, apart, rtol=0, atol=1e-6)


@pytest.mark.parametrize("attribute", attributes)
def test_every_value_of_an_attribute_looks_different(attribute: str) -> None:
    person = people(1)[0]
    person = Portrait({**person.attributes, **PLAIN}, person.identity)
    drawn = draw([person.having(attribute, value) for value in attributes[attribute]])
    for a in range(len(drawn)):
        for b in range(a):
            mask = dataset.edited_pixels(drawn[a : a + 1], drawn[b : b + 1])
            assert mask.sum() >= dataset.smallest_change / 2, (attribute, a, b)


@pytest.mark.parametrize("parameter", identity_ranges)
def test_every_identity_parameter_shows_and_is_named_by_nothing(parameter: str) -> None:
    index = list(identity_ranges).index(parameter)
    shown = {**people(1)[0].attributes, **PLAIN}
    # The mole has to be there to be moved.
    middle = [(low + high) / 2 for low, high in identity_ranges.values()]
    low, high = (
        Portrait(shown, (*middle[:index], end, *middle[index + 1 :]))
        for end in identity_ranges[parameter]
    )
    assert (draw([low]) - draw([high])).abs().max() > 0.05
    assert caption(low) == caption(high)


def test_masks_of_edits_are_exact() -> None:
    """Outside the mask the true edit is the source; inside, every pixel is another."""
    for edit in dataset.edits("tests", 0, 22):
        source, target = draw([edit.source]), draw([edit.target])
        mask = dataset.edited_pixels(source, target)
        difference = (source - target).abs().amax(1)
        assert (difference[mask == 0] <= dataset.change_threshold).all()
        assert (difference[mask == 1] > dataset.change_threshold).all()
        assert mask.sum() >= dataset.smallest_change
        assert mask.mean() < 0.9
        assert edit.source.identity == edit.target.identity
        changed = {
            name
            for name in attributes
            if edit.source.attributes[name] != edit.target.attributes[name]
        }
        assert changed == {edit.attribute}


def test_edits_take_all_attributes_in_turn() -> None:
    found = [edit.attribute for edit in dataset.edits("tests", 1, 2 * len(attributes))]
    assert found == 2 * list(attributes)


# Captions


def test_captions_name_every_attribute() -> None:
    person = people(1)[0].having("hair length", "short")
    for name, values in attributes.items():
        texts = {caption(person.having(name, value)) for value in values}
        assert len(texts) == len(values), name


def test_captions_name_no_identity() -> None:
    crowd = people()
    same = crowd[0].attributes
    assert len({caption(Portrait(same, person.identity)) for person in crowd}) == 1


def tokens(demo: stock.Demo, text: str) -> list[int]:
    (row,) = demo.clip.tokenize(text)["l"]
    return [token for token, _ in row]


def test_captions_of_an_edit_have_the_same_number_of_tokens(demo: stock.Demo) -> None:
    """So that source and target share a model call, and words stay at their places."""
    end = demo.clip.tokenizer.clip_l.end_token
    lengths = [
        [tokens(demo, text).index(end) for text in edit.prompts]
        for edit in dataset.edits("tests", 2, 44)
    ]
    assert all(source == target for source, target in lengths)
    assert max(map(max, lengths)) < 77


def test_captions_may_leave_phrases_out() -> None:
    person = people(1)[0]
    assert caption(person, []) == "portrait of a person"
    assert len(caption(person, phrase_order[:3]).split(", ")) == 4


# Text encoder

ENCODER_SHA256 = "6efd5b47b1a79261c244621f78af035e789ad694288427e9f7e8dd9774aca48b"


def digest(tensors: dict[str, Tensor]) -> str:
    """Over names, shapes and bytes, in the order of the names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def test_text_encoder_has_the_same_bytes_on_every_machine() -> None:
    assert digest(text_encoder.state_dict()) == ENCODER_SHA256


def test_stock_clip_gives_what_the_training_looked_up(demo: stock.Demo) -> None:
    """The layers pass their input through, so the hidden state is token plus position."""
    token_table, places = (table.float() for table in text_encoder.embeddings())
    for person in people(3):
        text = caption(person)
        encoded = demo.prompt(text)[0][0]
        expected = token_table[tokens(demo, text)] + places
        assert encoded.shape == (1, text_encoder.positions, 4096)
        assert torch.allclose(encoded[0, :, : text_encoder.width], expected, rtol=0, atol=1e-5)
        assert not encoded[..., text_encoder.width :].any()


# Codec


@pytest.fixture(scope="module")
def held_out() -> Tensor:
    return dataset.pictures(dataset.people("held-out", 7, 10)).float() / 255


def encoded(demo: stock.Demo, pictures: Tensor) -> dict[str, Tensor]:
    return stock.call("VAEEncode", vae=demo.vae, pixels=pictures.movedim(1, -1))[0]


def test_codec_reconstructs_held_out_portraits(demo: stock.Demo, held_out: Tensor) -> None:
    decoded = stock.call("VAEDecode", vae=demo.vae, samples=encoded(demo, held_out))[0]
    decoded = decoded.movedim(-1, 1).clamp(0, 1)
    assert judging.psnr(decoded, held_out).mean() >= CODEC_PSNR


def test_codec_of_sd15_reconstructs_held_out_portraits(
    held_out: Tensor,
    host: Host,  # noqa: ARG001
) -> None:
    (vae,) = stock.call("VAELoader", vae_name=checkpoint.sd15_vae_name)
    (latent,) = stock.call("VAEEncode", vae=vae, pixels=held_out.movedim(1, -1))
    assert latent["samples"].shape[1] == codec.sd15_channels
    (decoded,) = stock.call("VAEDecode", vae=vae, samples=latent)
    found = judging.psnr(decoded.movedim(-1, 1).clamp(0, 1), held_out)
    assert found.mean() >= SD15_CODEC_PSNR


def test_encoder_is_the_projection_it_was_set_to(demo: stock.Demo, held_out: Tensor) -> None:
    basis = codec.principal_components(dataset.pictures(dataset.people("train", 1, 512)) / 255)
    raw = encoded(demo, held_out)["samples"]
    latents = demo.model.model.process_latent_in(raw)
    expected = codec.project(held_out, basis)
    # Weights are kept in fp16.
    assert (latents - expected).abs().max() <= 0.03
    assert expected.abs().max() > 2


@pytest.mark.parametrize("channels", [codec.channels, codec.sd15_channels])
def test_encoder_can_be_set_to_any_projection(
    channels: int,
    held_out: Tensor,
    host: Host,  # noqa: ARG001
) -> None:
    basis = codec.principal_components(held_out, channels)
    made = codec.build(channels)
    codec.set_encoder(made, basis)
    with torch.no_grad():
        found = made.taesd_encoder(held_out)
    assert torch.allclose(found, codec.project(held_out, basis), rtol=0, atol=1e-4)


def test_projection_is_that_of_its_blocks() -> None:
    images = draw(people(4), 16)
    basis = codec.principal_components(draw(people(64), 32))
    mean, components, deviation = basis
    found = codec.project(images, basis)
    for picture in range(4):
        for row in range(2):
            for column in range(2):
                rows, columns = (slice(8 * i, 8 * i + 8) for i in (row, column))
                block = images[picture, :, rows, columns].flatten()
                expected = components @ (block - mean) * codec.spread(basis) / deviation
                assert torch.allclose(found[picture, :, row, column], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("file", "limit"),
    [
        (weights.codec_file, CODEC_BYTES),
        (weights.sd15_codec_file, CODEC_BYTES),
        (weights.network_files["sd3"], SD3_BYTES),
        (weights.network_files["flux"], FLUX_BYTES),
        (weights.network_files["sd15"], SD15_BYTES),
        *((file, IDENTITY_BYTES) for file in weights.identity_files),
    ],
    ids=["codec", "sd15 codec", "sd3", "flux", "sd15", "ann", "bea"],
)
def test_weights_are_small_enough_to_ship(file: Path, limit: float) -> None:
    assert 1e5 < file.stat().st_size <= limit


# Sets and training


def test_splits_do_not_meet() -> None:
    splits = {
        (split, seed): {person.identity for person in dataset.people(split, seed, 200)}
        for split in ("train", "held-out", "tests", "demo")
        for seed in (0, 1)
    }
    seen: set[Any] = set()
    for identities in splits.values():
        assert len(identities) == 200
        assert not seen & identities
        seen |= identities
    assert dataset.people("train", 1, 50) == dataset.people("train", 1, 200)[:50]


def test_edits_of_a_split_are_not_its_people() -> None:
    edited = {edit.source.identity for edit in dataset.edits("held-out", 0, 22)}
    assert not edited & {person.identity for person in dataset.people("held-out", 0, 500)}


class ToyTraining:
    """A small regression whose batches depend on the step only."""

    def __init__(self, state: Path, steps: int = 12):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
        self.trainer = Trainer(self.model, steps, 1e-2, state, save_every=4)

    def run(self, stop_at: int | None = None) -> dict[str, Tensor]:
        for step in self.trainer.run():
            if step == stop_at:
                break
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(16, 5, generator=generator)
            self.trainer.descend((self.model(x) - x[:, :2]).pow(2).mean())
        return {**self.model.state_dict(), **{f"average {n}": t for n, t in self.average()}}

    def average(self) -> Sequence[tuple[str, Tensor]]:
        return [(name, tensor) for name, tensor in self.trainer.average.items()]


@pytest.mark.parametrize("stop_at", [4, 6, 11])
def test_resumed_training_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, stop_at: int
) -> None:
    whole = ToyTraining(tmp_path / "whole.safetensors").run()
    ToyTraining(tmp_path / "broken.safetensors").run(stop_at)
    resumed = ToyTraining(tmp_path / "broken.safetensors")
    assert resumed.trainer.step == stop_at // 4 * 4
    after = resumed.run()
    assert after.keys() == whole.keys()
    assert all(torch.equal(after[name], whole[name]) for name in whole)


def test_training_learns_and_its_state_survives_a_broken_write(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    toy = ToyTraining(state)
    before = {name: tensor.clone() for name, tensor in toy.model.state_dict().items()}
    toy.run()
    assert all(not torch.equal(t, before[n]) for n, t in toy.model.state_dict().items())
    assert ToyTraining(state).trainer.step == 12
    assert not list(tmp_path.glob("*.part"))


# Judging


@pytest.mark.parametrize("attribute", attributes)
def test_drawn_portraits_are_judged_as_what_they_are(attribute: str) -> None:
    """Where the attribute can be seen at all; a bald head has no hair colour."""
    sampled = people(16)
    seen = judging.visible(sampled, attribute, 40)
    crowd = [person for person, shown in zip(sampled, seen, strict=True) if shown]
    noisy = draw(crowd)
    noisy = noisy + 0.05 * torch.randn(noisy.shape, generator=torch.Generator().manual_seed(0))
    found = judging.nearest_values(noisy, crowd, attribute)
    assert len(crowd) >= 8
    assert found == [person.attributes[attribute] for person in crowd]


def test_scores_of_known_pictures() -> None:
    black, gray = torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.1)
    assert judging.psnr(black, gray).item() == pytest.approx(20, abs=1e-3)
    assert judging.psnr(black, black).item() == judging.highest_psnr
    half = torch.zeros(1, 8, 8)
    half[..., :4] = 1
    mixed = torch.where(half[:, None] > 0, gray, black)
    assert judging.psnr(black, mixed, half).item() == pytest.approx(20, abs=1e-3)
    assert judging.psnr(black, mixed, 1 - half).item() == judging.highest_psnr
    quarter = half * half.transpose(1, 2)
    assert judging.intersection_over_union(half, quarter).item() == 0.5
    assert judging.outside(half, 2).sum() == 8 * 2
