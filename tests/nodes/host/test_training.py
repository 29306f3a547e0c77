"""A model in training: its gradients, with and without kept blocks, and what is learned in it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from host import stock, tiny_clip
from host.edits import left_half
from host.inprocess import Host
from host.tapping import FAMILIES, WORDS, Family

TinyModel = Callable[[str], Any]

ROWS = (3, 7)
"""Of a learned word in a prompt."""


def test_stock_lora_loader_gives_what_was_trained(tiny_model: TinyModel, pack: ModuleType) -> None:
    import comfy.sd

    training, model = pack.nodes.host.training, tiny_model("sd3_bare")
    with torch.inference_mode(), training.in_training(model, 4, 1, None) as trainee:
        untouched = answer(trainee.model)
        generator = torch.Generator().manual_seed(2)
        for change in trainee.changes.values():
            change.up.data = 0.2 * torch.randn(change.up.shape, generator=generator)
        trained, lora = answer(trainee.model), trainee.lora()
    assert torch.equal(untouched, loaded_answer(model))
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    assert (trained - untouched).abs().max() > 0.05
    torch.testing.assert_close(loaded_answer(patched), trained, rtol=1e-4, atol=1e-4)


def answer(patcher: Any) -> Tensor:
    """What a tiny SD3 that is loaded says."""
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(5))
    text, sigma = stock.conditioning(1)[0][0], torch.tensor([0.5])
    with torch.no_grad():
        return patcher.model.apply_model(x, sigma, c_crossattn=text, transformer_options={})


def loaded_answer(patcher: Any) -> Tensor:
    """What a tiny SD3 says."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher])
    with torch.inference_mode():
        return answer(patcher)


def test_unchanged_model_is_as_before(tiny_model: TinyModel, pack: ModuleType) -> None:
    training = pack.nodes.host.training
    with training.in_training(tiny_model("sd3_bare"), 4, 1) as trainee:
        before = answer(trainee.model)
        for change in trainee.changes.values():
            change.up.data += 0.2
        changed = answer(trainee.model)
        with trainee.unchanged():
            assert torch.equal(answer(trainee.model), before)
        assert torch.equal(answer(trainee.model), changed)
    assert not torch.equal(before, changed)


class Loss:
    """A loss of one call of a model, in training."""

    def __init__(self, family: Family, wrappers: dict[str, Any] | None = None):
        """
        Args:
            wrappers: of a tapped model.
        """
        self.family, self.wrappers = family, wrappers or {}
        self.x = family.latent()
        self.goal = torch.randn(self.x.shape, generator=torch.Generator().manual_seed(6))

    def __call__(self, model: Any, text: Tensor) -> Tensor:
        conds = given(model, self.x, self.family)
        options = {"wrappers": self.wrappers}
        out = model.model.apply_model(
            self.x, torch.tensor([0.7]), c_crossattn=text, transformer_options=options, **conds
        )
        return (out * self.goal).sum()

    def gradients(self, trainee: Any, text: Tensor) -> list[Tensor]:
        """With respect to the prompt and to the changes."""
        text = text.clone().requires_grad_()
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            self(trainee.model, text).backward()
        ups = [change.up.grad for change in trainee.changes.values()]
        return [text.grad, *(up for up in ups if up is not None)]


def given(model: Any, x: Tensor, family: Family) -> dict[str, Any]:
    """What a model is given beside latents, sigma and text."""
    import comfy.sampler_helpers
    import comfy.samplers

    conds = comfy.sampler_helpers.convert_cond(family.prompt(2))
    conds = comfy.samplers.encode_model_conds(model.model.extra_conds, conds, x, x.device, "")
    named = conds[0]["model_conds"].items()
    return {key: cond.cond for key, cond in named if key != "c_crossattn"}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(FAMILIES[name], id=name)
        for name in ("SD3", "SD3.5-medium", "Flux", "Chroma", "Wan", "SD1.5", "SDXL")
    ],
)
def test_gradients_are_right_and_the_same_when_memory_is_saved(
    family: Family, tiny_model: TinyModel, pack: ModuleType
) -> None:
    """With a word that is seen in places: in a UNet and in Wan, the options say which block runs.

    Against finite differences, as blocks write into what autograd keeps.
    """
    host, model = pack.nodes.host, tiny_model(family.model)
    place = host.confining.Confinement(ROWS, WORDS, left_half(family.latent()))
    wrappers = host.confining.confined_rows(model, place).wrappers
    (text, _), *_ = family.prompt(1)
    found = []
    for saves_memory in (False, True):
        with host.training.in_training(
            model, 2, 1, torch.float32, saves_memory=saves_memory
        ) as trainee:
            loss = Loss(family, wrappers)
            for change in trainee.changes.values():
                change.up.data += 0.05
            found.append(loss.gradients(trainee, text))
            if not saves_memory:
                slope = found[0][0].norm()
                way = 0.02 * found[0][0] / slope
                with torch.no_grad():
                    rise = loss(trainee.model, text + way) - loss(trainee.model, text - way)
                torch.testing.assert_close(rise / 0.04, slope, rtol=0.03, atol=1e-3)
    kept, again = found
    assert len(kept) == len(again) > 1
    for ours, theirs in zip(again, kept, strict=True):
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_gradients_gathered_are_those_of_a_single_way(pack: ModuleType, host: Host) -> None:
    """Two steps' gradients, led back once, equal those of their mean loss in one graph."""
    assert host
    word_learning = pack.nodes.host.word_learning
    with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad():
        clip = word_learning.trainable(tiny_clip.clip())
        word = word_learning.LearnedWord(clip, "person", 2)
        knowing = pack.nodes.host.words.with_words(clip, {"ann": word})
        offset = word.offsets["l"]
        goals = [torch.randn(77, 64, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]

        def loss(cond: Tensor, goal: Tensor) -> Tensor:
            return (cond.tanh() * goal).sum()

        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            prompt = word_learning.encode(knowing, "a <ann> person", "ann")
            for goal in goals:
                loss(prompt.conditioning[0][0], goal).backward()
            prompt.backward(2, prompt.features.sum())
        gathered = offset.grad.clone()
        offset.grad = None
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            cond = knowing.encode_from_tokens(knowing.tokenize("a <ann> person"))
            rows = list(prompt.rows)
            whole = sum(loss(cond, goal) for goal in goals) / 2 + cond[0, rows].mean(0).sum()
            whole.backward()
    assert gathered.abs().max() > 1e-3
    torch.testing.assert_close(gathered, offset.grad, rtol=1e-4, atol=1e-5)
