"""Learn Identity: how it learns, and what it leaves behind."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from host import lessons, stock, tiny_clip
from host.inprocess import Host
from host.lessons import Learned, assert_same, loss_of, number_in

WORD: dict[str, Any] = dict(token_steps=1, steps=0)
LEFT = torch.zeros(1, 64, 64)
LEFT[..., :32] = 1


def test_learns_word_and_change(learned: Learned) -> None:
    identity, preview, curve, report = learned()
    assert (identity.name, identity.class_word, identity.family) == ("ann", "person", "SD3")
    assert {k: v.shape for k, v in identity.vectors.items()} == {"l": (1, 64)}
    ups = [t for key, t in identity.lora.items() if key.endswith("lora_up.weight")]
    assert len(ups) == 7
    assert all(up.shape[1] == 2 and up.any() for up in ups)
    assert preview.shape == (1, 64, 64, 3)
    assert curve.shape == (1, 300, 600, 3)
    assert "4 steps" in report


def test_learns_the_same_again_and_touches_no_other_randomness(learned: Learned) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, second = learned(), learned()
    assert torch.equal(before, torch.get_rng_state())
    assert_same(first[0].vectors, second[0].vectors)
    assert_same(first[0].lora, second[0].lora)
    assert torch.equal(first[1], second[1])
    other = learned(seed=4, steps=0)[0]
    assert not torch.equal(first[0].vectors["l"], other.vectors["l"])


def test_model_and_clip_are_as_they_were(
    learned: Learned, tiny_model: lessons.TinyModel, pack: ModuleType
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


def broken(learned: Learned, pack: ModuleType) -> None:
    """Learn with a loss that is no number after the first step."""
    kernel, count = pack.nodes.host.learning.losses, iter([1.0, float("nan")])
    true = kernel.prediction_error
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "prediction_error", lambda *args: true(*args) * next(count))
        learned()


def test_loss_that_is_no_number_stops_and_what_was_learned_before_is_kept(
    learned: Learned, pack: ModuleType, host: Host
) -> None:
    with pytest.raises(ValueError, match=r"no number any more after step 2 of 4: lower token_rate"):
        broken(learned, pack)
    identity, about = kept(host)
    assert "steps_done: 1" in about
    assert identity.vectors


def test_what_is_no_number_is_not_kept(learned: Learned, pack: ModuleType, host: Host) -> None:
    """The loss is still a number when the word is none any more."""
    learner = pack.nodes.host.learning.Learner
    update = learner._update_word

    def spoiled(self: Any, steps: range) -> None:
        update(self, steps)
        if steps.stop == 4:
            next(iter(self.word.offsets.values())).data[:] = torch.nan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "_update_word", spoiled)
        with pytest.raises(ValueError, match="any more after step 4 of 4: lower rate and token_r"):
            learned()
    identity, about = kept(host)
    assert "steps_done: 4" in about
    assert any(up.any() for key, up in identity.lora.items() if "lora_up" in key)


def kept(host: Host) -> tuple[Any, str]:
    """The identity whose learning was stopped, and what its file tells."""
    file = host.base / "models" / "identities" / "ann.partial.safetensors"
    assert not list(file.parent.glob("*.part"))
    return stock.call("PinpointLoadIdentity", file_name=file.name)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyError("strange")])
def test_any_error_leaves_what_was_learned(
    learned: Learned, pack: ModuleType, host: Host, error: Exception
) -> None:
    learner = pack.nodes.host.learning.Learner
    true = learner._step

    def failing(self: Any, step: int) -> None:
        if step == 1:
            raise error
        true(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "_step", failing)
        with pytest.raises(type(error)):
            learned()
    assert "steps_done: 1" in kept(host)[1]


def test_a_preview_that_fails_costs_nothing_learned(
    learned: Learned, pack: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    expected = learned()[0]
    monkeypatch.setattr(pack.nodes.host.lessons, "preview", failing)
    identity, shown, _, report = learned()
    assert_same(identity.vectors, expected.vectors)
    assert torch.equal(shown, lessons.PICTURE)
    assert "no preview" in report
    assert "out of memory" in report


def test_a_preview_that_is_interrupted_leaves_the_identity(
    learned: Learned, pack: ModuleType, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy.model_management import InterruptProcessingException

    def stopped(*_args: Any, **_kwargs: Any) -> None:
        raise InterruptProcessingException

    monkeypatch.setattr(pack.nodes.host.lessons, "preview", stopped)
    with pytest.raises(InterruptProcessingException):
        learned()
    assert "steps_done: 4" in kept(host)[1]


def test_previews_are_confined_as_the_learning_is(
    learned: Learned, pack: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor | None] = []
    true = pack.nodes.host.applying.applied

    def applied(*args: Any) -> Any:
        seen.append(args[4])
        return true(*args)

    monkeypatch.setattr(pack.nodes.host.applying, "applied", applied)
    learned(mask=LEFT, confine_word=False, **WORD)
    learned(mask=LEFT, **WORD)
    assert seen[0] is None
    assert seen[1] is not None
    assert torch.equal(seen[1], LEFT)


def test_nothing_stays_in_memory(learned: Learned) -> None:
    """Text encoders add in place to what autograd keeps, which then leads back to itself."""

    def calculated() -> int:
        gc.collect()
        tensors = (each for each in gc.get_objects() if issubclass(type(each), Tensor))
        return sum(tensor.grad_fn is not None for tensor in tensors)

    before = calculated()
    learned(mask=LEFT)
    learned(save_memory=True)
    assert calculated() == before


def test_word_only(learned: Learned, pack: ModuleType) -> None:
    identity = learned(**WORD)[0]
    assert identity.lora == {}
    start = pack.nodes.host.word_learning.embedded(tiny_clip.clip(), "person", "class_word")
    assert not torch.equal(identity.vectors["l"], start["l"])


def test_change_only_with_a_rare_word(learned: Learned, pack: ModuleType) -> None:
    identity = learned(token_steps=0, token_rate=0.0, start_word="sks", vectors=2)[0]
    start = pack.nodes.host.word_learning.embedded(tiny_clip.clip(), "sks", "start_word")["l"]
    assert len(start) in (1, 2)
    expected = start[[i % len(start) for i in range(2)]]
    assert torch.equal(identity.vectors["l"], expected)
    assert identity.lora


@pytest.mark.parametrize("masked", [False, True])
def test_saving_memory_changes_nothing_else(learned: Learned, masked: bool) -> None:
    given = {"mask": LEFT} if masked else {}
    whole, again = learned(**given)[0], learned(**given, save_memory=True)[0]
    for expected, found in ((whole.vectors, again.vectors), (whole.lora, again.lora)):
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-5)


def test_changes_rest_in_the_first_phase(learned: Learned, pack: ModuleType) -> None:
    """They are neither calculated nor given gradients."""
    learner, seen = pack.nodes.host.learning.Learner, []
    true = learner._step

    def watched(self: Any, step: int) -> None:
        (change, *_) = self.trainee.changes.values()
        seen.append((change.is_on, change.up.requires_grad))
        true(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "_step", watched)
        learned()
    assert seen == [(False, False)] * 2 + [(True, True)] * 2


def test_learns_on_from_an_identity(learned: Learned) -> None:
    first = learned()[0]
    still = dict(token_steps=0, token_rate=0.0, steps=1, rate=0.0, rank=5, vectors=3)
    same = learned(identity=first, name="", **still)[0]
    assert same.name == "ann"
    assert_same(same.vectors, first.vectors)
    assert_same(same.lora, first.lora)
    further = learned(identity=first, name="bea")[0]
    assert further.name == "bea"
    for ours, begun in ((further.vectors, first.vectors), (further.lora, first.lora)):
        assert ours.keys() == begun.keys()
        assert any(not torch.equal(ours[key], begun[key]) for key in ours)
    assert_same(learned(identity=first, **WORD)[0].lora, first.lora)


def test_recipe_and_report_tell_what_was_learned_before(learned: Learned) -> None:
    first, *_, report = learned()
    assert (first.recipe["rank"], first.recipe["steps_done"]) == ("2", "4")
    assert first.recipe["precision"] == "auto"
    assert "changed layers of rank 2" in report
    second, *_, report = learned(
        identity=first, name="bea", prompt="one person", rank=5, token_steps=1, steps=0
    )
    assert second.recipe["rank"] == "2"
    assert second.recipe["steps_done"] == "4, then 1"
    assert second.recipe["prompt"] == f"{first.recipe['prompt']}, then one <bea> person"
    again = learned(identity=first)[0].recipe
    assert (again["steps_done"], again["prompt"]) == ("4, then 4", first.recipe["prompt"])
    assert "changed layers of rank 2" in report
    assert "no change of the model" in learned(**WORD)[3]


def test_report_compares_the_first_half_with_the_last(learned: Learned, pack: ModuleType) -> None:
    lesson = pack.nodes.host.learning_settings.Lesson(losses=[4.0, 2.0, 1.0])
    report = pack.nodes.host.lessons._report(learned(**WORD)[0], lesson, 0, 1.0)
    assert "loss 3.0000 at the start, 1.5000 at the end" in report


def test_learns_on_from_fitting_identities_only(learned: Learned) -> None:
    first = learned()[0]
    with pytest.raises(ValueError, match="<ann> was learned with Flux, the model is SD3"):
        learned(identity=replace(first, family="Flux"))
    with pytest.raises(ValueError, match=r"with the text encoders l \(8 wide\)"):
        learned(identity=replace(first, vectors={"l": torch.ones(1, 8)}))
    other = {key.replace("x_block", "y_block"): t for key, t in first.lora.items()}
    with pytest.raises(ValueError, match=r"changes diffusion_model.* cannot be learned on in this"):
        learned(identity=replace(first, lora=other))


def test_word_is_kept_apart_from_attributes(learned: Learned) -> None:
    def cosine(**changed: Any) -> float:
        words = "hair, smile, hat, lips, skin"
        quick = dict(token_steps=25, steps=0, token_rate=0.15, batch=1, update_every=1)
        report = learned(attributes=words, **quick, **changed)[3]
        return number_in(report, r"\|cos\| to the attribute words ([\d.]+)")

    assert cosine(orthogonality=100.0) < 0.6 * cosine(orthogonality=1e-6)


def test_without_orthogonality_no_attribute_is_read(learned: Learned) -> None:
    assert "|cos|" not in learned(orthogonality=0.0)[3]
    assert "|cos|" not in learned(attributes="")[3]


def test_outside_of_the_mask_does_not_count_at_weight_0(learned: Learned) -> None:
    def loss(**changed: Any) -> float:
        return loss_of(learned(confine_word=False, **changed, **WORD))

    inside, outside = (loss(mask=m, outside_weight=0.0) for m in (LEFT, 1 - LEFT))
    assert abs(inside - outside) > 0.01
    # The halves weigh the same.
    assert (inside + outside) / 2 == pytest.approx(loss(mask=LEFT), abs=2e-4)


def test_confined_word_learns_something_else(learned: Learned) -> None:
    alone = learned(**WORD)[0]
    assert_same(learned(mask=LEFT, confine_word=False, **WORD)[0].vectors, alone.vectors)
    left, right = (learned(mask=m, **WORD)[0].vectors["l"] for m in (LEFT, 1 - LEFT))
    assert not torch.equal(left, alone.vectors["l"])
    assert not torch.equal(left, right)


def test_confinement_leaves_the_change_in_place(
    learned: Learned, pack: ModuleType, monkeypatch: pytest.MonkeyPatch
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


def test_response_to_other_words_is_kept(learned: Learned) -> None:
    """The loss of a change that ignores the prompt is what it takes from the response."""
    free, held = learned(preservation=0.0)[0], learned(preservation=100.0)[0]
    assert not torch.equal(free.vectors["l"], held.vectors["l"])
    assert any(not torch.equal(free.lora[key], held.lora[key]) for key in free.lora)


def test_interrupted_learning_is_kept(
    learned: Learned,
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
    assert str(host.base / "models" / "identities" / "ann.partial.safetensors") in caplog.text
    identity, about = kept(host)
    assert identity.lora
    assert "steps_done: 3" in about


def test_shows_progress_before_it_reads_anything(
    learned: Learned, monkeypatch: pytest.MonkeyPatch, pack: ModuleType
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
