"""Training of FlexIP adapters: what is drawn and learned; `test_flexip_states`: what is kept."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from host import flexips, stock
from host.flexips import HIGH, LOW, NEVER, SIZES, Make, require_same, weights
from host.tapping import Family, each_of

TinyModel = Callable[[str], Any]

families = each_of("SD1.5", "SD3", "Flux")


@pytest.fixture
def make(tiny_model: TinyModel, pack: ModuleType) -> Make:
    return flexips.maker(pack, tiny_model)


def prompted(family: Family) -> stock.Conditioning:
    """The first pair's caption as models are trained with it: distilled ones without guidance."""
    return stock.with_values(family.prompt(0), guidance=1.0)


@families
@pytest.mark.parametrize("is_tapped", [False, True])
def test_a_new_adapter_changes_nothing(
    pack: ModuleType, family: Family, tiny_model: TinyModel, is_tapped: bool
) -> None:
    tap = pack.nodes.host.tap
    halved = tap.changing(lambda attention: attention.v * 0.5)
    models = {"plain": tiny_model(family.model)}
    models["tapped"] = tap.tapped(models["plain"], halved)
    model, x = models["tapped" if is_tapped else "plain"], family.latent()
    make = flexips.maker(pack, lambda _: model)
    expected = stock.velocity(model, prompted(family), None, 1.0, x, 0.6)
    found: list[Tensor] = []

    def look(trainer: Any) -> None:
        pair = trainer.pairs.pair(0)
        with torch.no_grad():
            denoised, _ = trainer.denoised(
                trainer.network, [pair], torch.tensor([0.5]), x, torch.tensor([0.6])
            )
        found.append((x - denoised) / 0.6)

    make(family, watch=look, steps=1, rate=0.0).run()
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


@families
def test_loss_falls_on_the_same_pair(make: Make, family: Family) -> None:
    trainer = make(family, pairs=1, steps=40, batch=4, **NEVER)
    trainer.run()
    first, last = (
        sum(part) / 8 for part in (trainer.progress.losses[:8], trainer.progress.losses[-8:])
    )
    assert last < 0.97 * first


@families
def test_base_model_keeps_its_weights(make: Make, family: Family, tiny_model: TinyModel) -> None:
    model = tiny_model(family.model)
    before = {key: t.clone() for key, t in model.model.state_dict().items()}
    trainer = make(family, steps=2)
    started = weights(trainer)
    trainer.run()
    require_same(before, dict(model.model.state_dict()))
    assert all(t.grad is None for t in model.model.parameters())
    changed = [key for key, t in weights(trainer).items() if not torch.equal(t, started[key])]
    assert any("to_v" in key for key in changed)
    assert any("detail" in key for key in changed)


@families
def test_saving_memory_changes_nothing_else(make: Make, family: Family) -> None:
    whole, again = (make(family, steps=3, saves_memory=saves) for saves in (False, True))
    whole.run()
    again.run()
    assert again.progress.losses == pytest.approx(whole.progress.losses, rel=1e-4)
    for key, tensor in weights(whole).items():
        torch.testing.assert_close(weights(again)[key], tensor, rtol=2e-2, atol=2e-3)


def test_keys_of_a_unet_start_from_its_own(tiny_model: TinyModel, pack: ModuleType) -> None:
    training, model = pack.nodes.host.flexip_training, tiny_model("sd15")
    network = training.new_network(model, LOW, HIGH, 768, **{**SIZES, "width": 768})
    own = model.model.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn2
    assert torch.equal(network.to_k["input_1"].weight, own.to_k.weight.float())
    assert not network.to_v["input_1"].weight.any()


def test_the_same_seed_trains_the_same_and_no_other_randomness_is_touched(make: Make) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, second, other = make(), make(), make(seed=5)
    for trainer in (first, second, other):
        trainer.run()
    assert torch.equal(before, torch.get_rng_state())
    require_same(weights(first), weights(second))
    assert first.progress.losses == second.progress.losses != other.progress.losses


def test_captions_of_several_lengths_are_learned_as_in_one_batch(make: Make) -> None:
    """Of four pairs, those without their caption have a shorter text."""
    trainer = make(steps=1, batch=4, rate=0.0, drop_text=0.5, drop_subject=0.0, drop_both=0.0)
    lengths: list[set[int]] = []
    true = trainer.denoised

    def seen(network: Any, pairs: Any, *args: Any) -> Any:
        lengths.append({len(pair.text) for pair in pairs})
        return true(network, pairs, *args)

    trainer.denoised = seen
    trainer.run()
    assert sorted(map(sorted, lengths)) == [[5], [12]]


def test_shares_of_what_is_dropped(make: Make) -> None:
    trainer = make(drop_both=0.1, drop_subject=0.2, drop_text=0.3)
    chance, found = random.Random(1), {"both": 0, "subject": 0, "text": 0, "none": 0}
    pair = trainer.pairs.pair(0)
    for _ in range(4000):
        seen = trainer._dropped(pair, chance)
        blank, silent = not seen.low.any() and not seen.high.any(), len(seen.text) == 5
        found[
            "both" if blank and silent else "subject" if blank else "text" if silent else "none"
        ] += 1
        assert torch.equal(seen.latent, pair.latent)
        assert seen.invariant == pair.invariant
    assert [n / 4000 for n in found.values()] == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.02)


def test_gamma_is_of_the_range_of_the_kind(make: Make) -> None:
    trainer = make(steps=6, batch=8, gamma_invariant=(0.7, 0.9), gamma_variant=(0.1, 0.3), **NEVER)
    seen: list[tuple[bool, float]] = []
    true = trainer.denoised

    def watched(network: Any, pairs: Any, gamma: Tensor, *args: Any) -> Any:
        seen.extend((p.invariant, float(g)) for p, g in zip(pairs, gamma, strict=True))
        return true(network, pairs, gamma, *args)

    trainer.denoised = watched
    trainer.run()
    for kind, low, high in ((True, 0.7, 0.9), (False, 0.1, 0.3)):
        gammas = [gamma for invariant, gamma in seen if invariant == kind]
        assert len(gammas) > 10
        assert all(low <= gamma <= high for gamma in gammas)
        assert max(gammas) - min(gammas) > 0.1


def test_noise_levels_are_of_the_chosen_part(make: Make) -> None:
    trainer = make(steps=4, batch=8, levels=(0.5, 0.75), **NEVER)
    seen: list[float] = []
    true = trainer.denoised

    def watched(network: Any, pairs: Any, gamma: Tensor, x: Tensor, sigma: Tensor) -> Any:
        seen.extend(sigma.tolist())
        return true(network, pairs, gamma, x, sigma)

    trainer.denoised = watched
    trainer.run()
    least, most = trainer._sigmas(torch.tensor([0.5, 0.75]), "uniform").tolist()
    assert least <= min(seen) < max(seen) <= most
    assert max(seen) - min(seen) > 0.7 * (most - least)


class Together:
    """One of two processes, as `accelerate` joins them; the other's numbers are known already."""

    num_processes = 2

    def __init__(self, process_index: int, other: Tensor | None = None):
        self.process_index, self.other = process_index, other

    @property
    def is_main_process(self) -> bool:
        """The first is."""
        return self.process_index == 0

    def reduce(self, tensor: Tensor, _reduction: str) -> Tensor:
        """The mean of both; alone it keeps its own."""
        self.own = tensor.clone()
        return tensor if self.other is None else (tensor + self.other) / 2


def test_processes_learn_from_other_pairs_and_stay_the_same(make: Make, tmp_path: Path) -> None:
    alone = [Together(0), Together(1)]
    for one in alone:
        make(steps=1, accelerator=one).run()
    first, second = (one.own for one in alone)
    assert not torch.equal(first, second)
    both = []
    for index, other in ((0, second), (1, first)):
        state = tmp_path / f"{index}.state.safetensors"
        both.append(make(steps=1, state=state, accelerator=Together(index, other)))
        both[-1].run()
        # One of them writes.
        assert state.exists() == (index == 0)
    require_same(weights(both[0]), weights(both[1]))
    assert both[0].progress.losses == both[1].progress.losses
    assert both[0].progress.losses[0] == pytest.approx(float(first[-1] + second[-1]) / 2)


def test_average_follows_and_is_what_is_saved(make: Make) -> None:
    trainer = make(steps=3, average=0.0)
    trainer.run()
    require_same(dict(trainer.result.state_dict()), weights(trainer))
    slow = make(steps=3, average=0.9999)
    slow.run()
    key = "to_v.joint_0.weight"
    averaged, last = slow.result.state_dict()[key], weights(slow)[key]
    # In the beginning an average over a tenth of the steps; all else would stay where it started.
    assert 0 < (averaged - last).abs().max() < last.abs().max()


@families
def test_saved_adapter_is_applied_as_it_was_trained(
    make: Make,
    family: Family,
    tiny_model: TinyModel,
    pack: ModuleType,
    tmp_path: Path,
) -> None:
    host, model = pack.nodes.host, tiny_model(family.model)
    x, sigma, gamma = family.latent(), 0.6, 0.4
    found: list[Tensor] = []

    def look(trainer: Any) -> None:
        pair = trainer.pairs.pair(0)
        if trainer.progress.step == 4:
            with torch.no_grad():
                denoised, _ = trainer.denoised(
                    trainer.result.half().float(),
                    [pair],
                    torch.tensor([gamma]),
                    x,
                    torch.tensor([sigma]),
                )
            found.append((x - denoised) / sigma)

    trainer = make(family, watch=look)
    trainer.run()
    name = host.families.name(model)
    content = host.adapter_files.content(
        trainer.result, host.layouts.blocks_of(model), name, "literal", {}
    )
    path = tmp_path / "a.safetensors"
    host.tensor_files.write(path, *content)
    adapter, pair = host.adapter_files.load_file(path), trainer.pairs.pair(0)
    subject = host.subjects.Subject(
        pair.low[None], pair.high[None], torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)
    )
    settings = host.adapting.Settings(1.0, host.gates.constant(gamma), adapter.mode)
    with torch.inference_mode():
        applied = host.adapting.applied(model, adapter, subject, settings)
    seen = stock.velocity(applied, prompted(family), None, 1.0, x, sigma)
    plain = stock.velocity(model, prompted(family), None, 1.0, x, sigma)
    assert (seen - plain).abs().max() > 1e-3
    torch.testing.assert_close(seen, found[0], rtol=1e-3, atol=1e-3)
