"""A model in training: its gradients, with and without kept blocks, and what is learned in it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tiny
from host import stock, tiny_clip
from host.edits import left_half
from host.inprocess import Host
from host.tapping import FAMILIES, WORDS, Family, each_of

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


@each_of("SD3", "SD3.5-medium", "Flux", "Chroma", "Wan", "SD1.5", "SDXL")
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
        word = word_learning.LearnedWord(word_learning.first_vectors(clip, "person", 2, "start"))
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


def half(clip: Any) -> Any:
    """A text encoder that is loaded in fp16 from now on."""
    load, inputs = clip.patcher.cached_patcher_init

    def halved(**kwargs: Any) -> Any:
        patcher = load(*inputs, **kwargs)
        patcher.model.half()
        return patcher

    clone = clip.clone()
    clone.patcher.cached_patcher_init = (halved, ())
    return clone


def test_large_text_encoder_keeps_no_copies_of_its_weights(
    pack: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It computes in fp32: what autograd kept of an fp16 encoder would be all its weights anew."""
    monkeypatch.setattr(pack.nodes.host.word_learning, "most_kept", 0)
    word_learning, kept = pack.nodes.host.word_learning, []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor.detach().clone()

    copied = pack.nodes.host.gradients.copied_for_backward()
    with torch.inference_mode(False), torch.enable_grad(), copied:
        clip = word_learning.trainable(half(tiny_clip.clip()))
        word = word_learning.LearnedWord(word_learning.first_vectors(clip, "person", 1, "start"))
        knowing = pack.nodes.host.words.with_words(clip, {"ann": word})
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            prompt = word_learning.encode(knowing, "a <ann> person", "ann")
        weight = clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[
            0
        ].mlp.fc1.weight
        sizes = {weight.shape, weight.T.shape}
        assert kept
        assert not any(tensor.shape in sizes for tensor in kept)
        prompt.conditioning[0][0].sum().backward()
        prompt.backward(1, None)
        assert word.offsets["l"].grad.any()


def quantised(folder: Path) -> str:
    """A file of the tiny SD3 whose linear layers are in fp8, as ComfyUI's quantiser writes it."""
    weights = tiny.sd3(pooled=False)
    mark = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    for name in [key for key in weights if re.search(r"attn\.(qkv|proj)\.weight$", key)]:
        scale = weights[name].abs().max() / 448
        weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        stem = name.removesuffix("weight")
        weights |= {f"{stem}weight_scale": scale, f"{stem}comfy_quant": mark.clone()}
    file = folder / "sd3_fp8.safetensors"
    save_file(weights, file)
    return file.name


def test_quantised_checkpoints_are_learned_in(
    pack: ModuleType, tiny_model: TinyModel, host: Host
) -> None:
    """Their layers are no nn.Linear, and what is learned goes on top of them when applied."""
    from comfy.quant_ops import QuantizedTensor

    tiny_model("sd3_bare")
    file = quantised(host.base / "models" / "diffusion_models")
    model = stock.call("UNETLoader", unet_name=file, weight_dtype="default")[0]
    layer = model.model.diffusion_model.joint_blocks[0].x_block.attn.qkv
    assert isinstance(layer.weight, QuantizedTensor)
    family = FAMILIES["SD3"]
    text = family.prompt(1)[0][0]
    with torch.inference_mode(), pack.nodes.host.training.in_training(model, 2, 1) as trainee:
        assert len(trainee.changes) == 7
        found, *ups = Loss(family).gradients(trainee, text)
        assert found.any()
        assert len(ups) == 7
        generator = torch.Generator().manual_seed(2)
        for change in trainee.changes.values():
            change.up.data = 0.2 * torch.randn(change.up.shape, generator=generator)
        trained, lora = answer(trainee.model), trainee.lora()
    identity = pack.nodes.host.identity.Identity("ann", "person", "SD3", {}, lora)
    applied, _ = pack.nodes.host.applying.applied(model, tiny_clip.clip(), identity)
    assert not applied.patches
    assert (loaded_answer(applied) - loaded_answer(model)).abs().max() > 0.05
    torch.testing.assert_close(loaded_answer(applied), trained, rtol=1e-3, atol=1e-3)


def test_a_network_without_known_layers_is_refused(
    pack: ModuleType, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT

    training = pack.nodes.host.training
    monkeypatch.setitem(training.TARGETS, MMDiT, r"elsewhere\.\d+")
    refused = pytest.raises(ValueError, match="model is SD3, but none of its layers are those that")
    with refused, training.in_training(tiny_model("sd3_bare"), 2, 1):
        pass


def test_the_copy_stays_where_it_is_loaded(
    pack: ModuleType, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not of the kind that ComfyUI moves about while it computes, and guiders load it all."""
    import comfy.model_management
    import comfy.samplers
    from comfy.model_patcher import ModelPatcher

    class Moving(ModelPatcher):
        def is_dynamic(self) -> bool:
            return True

    model, loads = tiny_model("sd3_bare").clone(), []
    model.__class__ = Moving
    true = comfy.model_management.load_models_gpu

    def load(models: list[Any], **given: Any) -> None:
        loads.append(given.get("force_full_load"))
        true(models, **given)

    with pack.nodes.host.training.in_training(model, 2, 1) as trainee:
        assert not trainee.model.is_dynamic()
        monkeypatch.setattr(comfy.model_management, "load_models_gpu", load)
        guider = comfy.samplers.CFGGuider(trainee.model)
        guider.inner_set_conds({"positive": stock.conditioning(1)})
        stock.inside(guider, torch.zeros(1, 16, 8, 8), lambda *_: None)
    assert loads == [True]
