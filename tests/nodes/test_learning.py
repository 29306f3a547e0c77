"""Learn Identity: what it learns from, how it learns, and what it leaves behind."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from host import stock, tiny_clip
from host.inprocess import Host

TinyModel = Callable[[str], Any]

SETTINGS: dict[str, Any] = dict(
    prompt="a person with red hair",
    name="ann",
    class_word="person",
    attributes="hair, smile",
    token_steps=2,
    token_rate=0.02,
    steps=2,
    rate=1e-3,
    rank=2,
    batch=2,
    orthogonality=0.1,
    preservation=1.0,
    confine_word=True,
    outside_weight=1.0,
    weighting="uniform",
    seed=3,
    vectors=1,
    start_word="",
    update_every=2,
    resolution=512,
    precision="auto",
    save_memory=False,
    preview_every=0,
)
LISTS = ("image", "mask", "prompt")


def learn(demo: stock.Demo, model: Any, clip: Any, image: Any, **changed: Any) -> tuple[Any, ...]:
    """Run the node as ComfyUI does: every input is a list."""
    inputs = {**SETTINGS, "model": model, "clip": clip, "vae": demo.vae, "image": image}
    inputs |= changed
    lists = {k: v if k in LISTS and isinstance(v, list) else [v] for k, v in inputs.items()}
    return stock.call("PinpointLearnIdentity", **lists)


@pytest.fixture(scope="module")
def picture() -> Tensor:
    """(1, 64, 64, 3)."""
    return torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def learned(demo: stock.Demo, tiny_model: TinyModel, picture: Tensor) -> Callable[..., Any]:
    """Learns on a tiny SD3; returns the node's outputs."""

    def run(image: Any = picture, **changed: Any) -> tuple[Any, ...]:
        clip = changed.pop("clip", tiny_clip.clip())
        return learn(demo, tiny_model("sd3_bare"), clip, image, **changed)

    return run


def test_learns_word_and_change(learned: Callable[..., Any]) -> None:
    identity, preview, curve, report = learned()
    assert (identity.name, identity.class_word, identity.family) == ("ann", "person", "SD3")
    assert {k: v.shape for k, v in identity.vectors.items()} == {"l": (1, 64)}
    ups = [t for key, t in identity.lora.items() if key.endswith("lora_up.weight")]
    assert len(ups) == 7
    assert all(up.shape[1] == 2 and up.any() for up in ups)
    assert preview.shape == (1, 64, 64, 3)
    assert curve.shape == (1, 300, 600, 3)
    assert "4 steps" in report


def test_learns_the_same_again_and_touches_no_other_randomness(
    learned: Callable[..., Any],
) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, second = learned(), learned()
    assert torch.equal(before, torch.get_rng_state())
    assert_same(first[0].vectors, second[0].vectors)
    assert_same(first[0].lora, second[0].lora)
    assert torch.equal(first[1], second[1])
    other = learned(seed=4)[0]
    assert not torch.equal(first[0].vectors["l"], other.vectors["l"])


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def test_model_and_clip_are_as_they_were(
    learned: Callable[..., Any], tiny_model: TinyModel, pack: ModuleType
) -> None:
    import comfy.model_management

    model, clip = tiny_model("sd3_bare"), tiny_clip.clip()

    def seen() -> tuple[Tensor, Tensor]:
        x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(5))
        return stock.velocity(
            model, stock.conditioning(1), None, 1.0, x, 0.5
        ), clip.encode_from_tokens(clip.tokenize("a person"))

    before, weights = seen(), {k: v.clone() for k, v in model.model.state_dict().items()}
    learned()
    with pytest.raises(ValueError, match="no number"):
        broken(learned, pack)
    for ours, theirs in zip(before, seen(), strict=True):
        assert torch.equal(ours, theirs)
    assert_same(weights, dict(model.model.state_dict()))
    assert not comfy.model_management.in_training
    assert not torch.is_grad_enabled() or not clip.patcher.injections


def broken(learned: Callable[..., Any], pack: ModuleType) -> None:
    """Learn with a loss that is no number after the first step."""
    kernel, count = pack.nodes.host.learning.losses, iter([1.0, float("nan")])
    true = kernel.prediction_error
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "prediction_error", lambda *args: true(*args) * next(count))
        learned()


def test_loss_that_is_no_number_stops(learned: Callable[..., Any], pack: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"no number any more after step 2 of 4: lower token_rate"):
        broken(learned, pack)


def test_word_only(learned: Callable[..., Any], pack: ModuleType) -> None:
    identity = learned(steps=0)[0]
    assert identity.lora == {}
    start = pack.nodes.host.word_learning.embedded(tiny_clip.clip(), "person")
    assert not torch.equal(identity.vectors["l"], start["l"])


def test_change_only_with_a_rare_word(learned: Callable[..., Any], pack: ModuleType) -> None:
    identity = learned(token_steps=0, token_rate=0.0, start_word="sks", vectors=2)[0]
    start = pack.nodes.host.word_learning.embedded(tiny_clip.clip(), "sks")["l"]
    assert len(start) in (1, 2)
    expected = start[[i % len(start) for i in range(2)]]
    assert torch.equal(identity.vectors["l"], expected)
    assert identity.lora


def test_stock_lora_loader_gives_what_was_trained(tiny_model: TinyModel, pack: ModuleType) -> None:
    import comfy.sd

    training, model = pack.nodes.host.training, tiny_model("sd3_bare")
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(5))
    text = stock.conditioning(1)[0][0]
    sigma = torch.tensor([0.5])

    def output(patcher: Any) -> Tensor:
        with torch.no_grad():
            return patcher.model.apply_model(x, sigma, c_crossattn=text, transformer_options={})

    with torch.inference_mode(), training.in_training(model, 4, 1, None) as trainee:
        untouched = output(trainee.model)
        generator = torch.Generator().manual_seed(2)
        for change in trainee.changes.values():
            change.up.data = 0.2 * torch.randn(change.up.shape, generator=generator)
        trained, lora = output(trainee.model), trainee.lora()
    assert torch.equal(untouched, velocity_model(model, output))
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    assert (trained - untouched).abs().max() > 0.05
    torch.testing.assert_close(velocity_model(patched, output), trained, rtol=1e-4, atol=1e-4)


def velocity_model(patcher: Any, output: Callable[[Any], Tensor]) -> Tensor:
    """What a loaded model says."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher])
    with torch.inference_mode():
        return output(patcher)


@pytest.mark.parametrize("saves_memory", [False, True], ids=["kept", "twice"])
@pytest.mark.parametrize("name", ["sd3", "sd35", "flux", "sd15", "sdxl", "chroma"])
def test_gradients_are_right(
    name: str, saves_memory: bool, tiny_model: TinyModel, pack: ModuleType
) -> None:
    """Against finite differences, where blocks write into what autograd keeps."""
    training, model = pack.nodes.host.training, tiny_model(name)
    channels = model.model.latent_format.latent_channels
    drawn = torch.Generator().manual_seed(6)
    x = torch.randn(1, channels, 8, 8, generator=drawn)
    width = 768 if name == "sd15" else 64
    text = torch.randn(1, 6, width, generator=drawn)
    conds = given(model, x)
    goal = torch.randn(x.shape, generator=drawn)

    def loss(trainee: Any, text: Tensor) -> Tensor:
        sigma = torch.tensor([0.7])
        options: dict[str, Any] = {}
        out = trainee.model.model.apply_model(
            x, sigma, c_crossattn=text, transformer_options=options, **conds
        )
        return (out * goal).sum()

    with (
        torch.inference_mode(),
        training.in_training(model, 2, 1, torch.float32, saves_memory=saves_memory) as trainee,
    ):
        text = text.clone().requires_grad_()
        x, goal = x.clone(), goal.clone()
        conds = {k: v.clone() if torch.is_tensor(v) else v for k, v in conds.items()}
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            loss(trainee, text).backward()
        way = text.grad / text.grad.norm()
        change = next(iter(trainee.changes.values()))
        assert change.up.grad is not None
        with torch.no_grad():
            step = 0.02
            found = (loss(trainee, text + step * way) - loss(trainee, text - step * way)) / 2 / step
        torch.testing.assert_close(found, text.grad.norm(), rtol=0.03, atol=1e-3)


@pytest.mark.parametrize("kind", ["word", "change"])
def test_saving_memory_changes_nothing_else(learned: Callable[..., Any], kind: str) -> None:
    kept, again = learned()[0], learned(save_memory=True)[0]
    for key, expected in (kept.vectors if kind == "word" else kept.lora).items():
        found = (again.vectors if kind == "word" else again.lora)[key]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def given(model: Any, x: Tensor) -> dict[str, Any]:
    """What a model is given beside latents, sigma and text."""
    import comfy.sampler_helpers
    import comfy.samplers

    conds = comfy.sampler_helpers.convert_cond(stock.conditioning(2))
    conds = comfy.samplers.encode_model_conds(model.model.extra_conds, conds, x, x.device, "")
    named = conds[0]["model_conds"].items()
    return {key: cond.cond for key, cond in named if key != "c_crossattn"}


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


def test_word_is_kept_apart_from_attributes(learned: Callable[..., Any]) -> None:
    def cosine(**changed: Any) -> float:
        words = "hair, smile, hat, lips, skin"
        quick = dict(token_steps=25, steps=0, token_rate=0.15, batch=1, update_every=1)
        report = learned(attributes=words, **quick, **changed)[3]
        return number_in(report, r"\|cos\| to the attribute words ([\d.]+)")

    assert cosine(orthogonality=100.0) < 0.6 * cosine(orthogonality=1e-6)


def test_without_orthogonality_no_attribute_is_read(learned: Callable[..., Any]) -> None:
    assert "|cos|" not in learned(orthogonality=0.0)[3]
    assert "|cos|" not in learned(attributes="")[3]


def test_outside_of_the_mask_does_not_count_at_weight_0(
    learned: Callable[..., Any], picture: Tensor
) -> None:
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    torch.testing.assert_close(
        *(loss_of(learned(mask=mask, outside_weight=w, token_steps=1, steps=0)) for w in (1, 1))
    )
    with_outside = loss_of(learned(mask=mask, outside_weight=1.0, token_steps=1, steps=0))
    without = loss_of(learned(mask=mask, outside_weight=0.0, token_steps=1, steps=0))
    assert with_outside != without
    assert picture.shape[1:3] == mask.shape[1:]


def loss_of(outputs: tuple[Any, ...]) -> float:
    """The loss at the end, from the report."""
    return number_in(outputs[3], r"([\d.]+) at the end")


def number_in(report: str, pattern: str) -> float:
    """What a pattern's group finds in a report."""
    (found,) = re.findall(pattern, report)
    return float(found)


def test_confined_word_learns_something_else(learned: Callable[..., Any]) -> None:
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:48, 16:48] = 1
    everywhere = learned(mask=mask, confine_word=False)[0].vectors["l"]
    inside = learned(mask=mask)[0].vectors["l"]
    full = learned(mask=torch.ones(1, 64, 64))[0].vectors["l"]
    assert not torch.equal(everywhere, inside)
    assert not torch.equal(full, inside)


def test_confinement_leaves_the_change_in_place(
    learned: Callable[..., Any], pack: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone of an injected model would take its injections along when it is forgotten."""
    change, calls = pack.nodes.host.training.LowRank, 0
    true = change.h

    def counted(self: Any, *args: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return true(self, *args)

    monkeypatch.setattr(change, "h", counted)
    learned(preview_every=0)
    free, calls = calls, 0
    learned(preview_every=0, mask=torch.ones(1, 64, 64))
    assert calls >= free > 0


@pytest.mark.parametrize(
    "shapes",
    [[(1, 64, 64, 4)], [(1, 64, 64, 1)], [(2, 64, 64, 3)], [(1, 64, 96, 3), (2, 48, 64, 3)]],
    ids=["RGBA", "grey", "batch", "sizes"],
)
def test_learns_from_all_kinds_of_pictures(
    learned: Callable[..., Any], shapes: list[tuple[int, ...]]
) -> None:
    drawn = torch.Generator().manual_seed(1)
    images = [torch.rand(shape, generator=drawn) for shape in shapes]
    identity, preview, _, _ = learned(images, steps=4)
    assert identity.lora
    assert preview.shape == (1, *shapes[0][1:3], 3)
    assert torch.isfinite(preview).all()


def test_response_to_other_words_is_kept(learned: Callable[..., Any], pack: ModuleType) -> None:
    """The loss of a change that ignores the prompt is what it takes from the response."""
    variations = pack.nodes.host.word_learning.variations
    assert variations("a <ann> person, red hat, smiling", "ann", ["old"]) == [
        "a <ann> person, smiling",
        "a <ann> person, red hat",
        "a <ann> person, red hat, smiling, old",
    ]
    free = learned(preservation=0.0, steps=8)[0]
    kept = learned(preservation=100.0, steps=8)[0]
    assert not torch.equal(free.vectors["l"], kept.vectors["l"])
    assert any(not torch.equal(free.lora[key], kept.lora[key]) for key in free.lora)


def test_unchanged_model_is_as_before(tiny_model: TinyModel, pack: ModuleType) -> None:
    training = pack.nodes.host.training
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(5))
    text, sigma = stock.conditioning(1)[0][0], torch.tensor([0.5])

    def output(patcher: Any) -> Tensor:
        return patcher.model.apply_model(x, sigma, c_crossattn=text, transformer_options={})

    with training.in_training(tiny_model("sd3_bare"), 4, 1) as trainee, torch.no_grad():
        before = output(trainee.model)
        for change in trainee.changes.values():
            change.up.data += 0.2
        changed = output(trainee.model)
        with trainee.unchanged():
            assert torch.equal(output(trainee.model), before)
        assert torch.equal(output(trainee.model), changed)
    assert not torch.equal(before, changed)


def test_transparent_places_are_white(learned: Callable[..., Any], picture: Tensor) -> None:
    clear = torch.cat([picture, torch.zeros(1, 64, 64, 1)], -1)
    white = torch.ones_like(picture)
    assert_same(learned(clear)[0].vectors, learned(white)[0].vectors)


def test_large_pictures_are_scaled_down(learned: Callable[..., Any]) -> None:
    assert learned(torch.rand(1, 256, 128, 3), resolution=64)[1].shape == (1, 88, 48, 3)


def test_each_picture_has_its_prompt(learned: Callable[..., Any], picture: Tensor) -> None:
    prompts = ["a person", "a <ann> person with a hat"]
    identity = learned(picture.repeat(2, 1, 1, 1), prompt=prompts, steps=6)[0]
    assert identity.recipe["prompt"] == "a <ann> person"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "1x1": ({"image": torch.rand(1, 1, 1, 3)}, "image is 1x1"),
    "channels": ({"image": torch.rand(1, 64, 64, 2)}, "image has 2 channels"),
    "not finite": ({"image": torch.full((1, 64, 64, 3), torch.nan)}, "not finite"),
    "no class word": ({"prompt": "a cat"}, "neither <ann> nor the class_word 'person'"),
    "no class": ({"prompt": "a cat", "class_word": " "}, "prompt is 'a cat'"),
    "prompts": ({"prompt": ["a person"] * 3}, "3 prompts for 1 pictures"),
    "name": ({"name": "a b"}, "name is 'a b'"),
    "empty mask": ({"mask": torch.zeros(1, 64, 64)}, "mask is empty"),
    "masks": ({"mask": torch.ones(2, 64, 64)}, "2 masks for 1 pictures"),
    "no steps": ({"steps": 0, "token_steps": 0}, "both 0"),
    "no rate": ({"token_rate": 0.0}, "token_rate is 0, so 2 token_steps"),
    "no clip": ({"clip": None}, "clip is empty"),
    "no vae": ({"vae": None}, "vae is empty"),
    "rank": ({"rank": 0}, "rank is 0"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refuses_with_a_sentence(
    learned: Callable[..., Any], case: tuple[dict[str, Any], str]
) -> None:
    changed, sentence = case
    with pytest.raises(ValueError, match=re.escape(sentence)):
        learned(**changed)


def test_refuses_a_model_that_cannot_be_loaded_again(
    demo: stock.Demo, tiny_model: TinyModel, picture: Tensor
) -> None:
    model = tiny_model("sd3_bare").clone()
    model.cached_patcher_init = None
    with pytest.raises(ValueError, match="model comes from a loader that cannot load it a second"):
        learn(demo, model, tiny_clip.clip(), picture)


def test_interrupted_learning_is_kept(
    learned: Callable[..., Any],
    host: Host,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import comfy.model_management
    import comfy.utils

    def stop(value: int, *_args: Any, **_kwargs: Any) -> None:
        if value == 3:
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        learned()
    assert not comfy.model_management.in_training
    file = host.base / "models" / "identities" / "ann.partial.safetensors"
    assert str(file) in caplog.text
    identity, about = stock.call("PinpointLoadIdentity", file_name=file.name)
    assert identity.lora
    assert "steps_done: 3" in about
    assert not list(file.parent.glob("*.part"))


def test_shows_progress_before_it_reads_anything(
    learned: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, pack: ModuleType
) -> None:
    import comfy.utils

    events: list[str] = []
    encode = pack.nodes.host.word_learning.features_in_place
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, *_args, **_kw: events.append(str(value))
    )

    def reading(*args: Any) -> Any:
        events.append("read")
        return encode(*args)

    monkeypatch.setattr(pack.nodes.host.word_learning, "features_in_place", reading)
    learned()
    assert events[:2] == ["0", "read"]
    assert [e for e in events if e.isdigit()][-1] != "0"
