"""Apply FlexIP Adapter on tiny models of true architectures: what is added where, and when."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from host import flexips, foreign, stock, subjects
from host.edits import left_half, patcher_state
from host.subjects import Case
from host.tapping import FAMILIES, Family, families, few

TinyModel = Callable[[str], Any]

modes = pytest.mark.parametrize("mode", ["literal", "linear"])


class Spy:
    """What an attention gives before and after what a model in between adds to it."""

    def __init__(self, pack: ModuleType):
        self.tap = pack.nodes.host.tap
        self.seen: list[tuple[Any, Tensor, Tensor]] = []

    def around(self, model: Any, change: Callable[[Any], Any]) -> Any:
        inner: list[Tensor] = []

        def before(attention: Any, proceed: Any) -> Tensor:
            inner.append(proceed(attention))
            return inner[-1].clone()

        def after(attention: Any, proceed: Any) -> Tensor:
            out = proceed(attention)
            self.seen.append((attention, inner.pop(), out.clone()))
            return out

        return self.tap.tapped(change(self.tap.tapped(model, before)), after)


def expected(case: Case, attention: Any, gamma: float, mode: str) -> Tensor:
    """What the picture's tokens of one conditioning read, by the definition, in float64."""
    network = case.adapter.patcher.model.double()
    text, subject = attention.call.text.double(), case.subject
    kinds = [kind for _, kind in attention.call.branches]
    block = case.pack.nodes.host.adapters.block_key(attention.place.block)
    read = []
    for row, kind in enumerate(kinds):
        seen = float(kind != 1)
        low, high = subject.low.double() * seen, subject.high.double() * seen
        kept = network.preservation(low, high).flatten(0, 1)[None]
        free = network.personalization(text[row : row + 1], high[None])
        q = attention.q[row : row + 1, :, attention.place.image].double()

        def look(tokens: Tensor, q: Tensor = q) -> Tensor:
            heads = q.shape[1]
            k, v = (layer[block](tokens) for layer in (network.to_k, network.to_v))
            k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (k, v))
            weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
            return (weights @ v).transpose(1, 2).flatten(2)

        if mode == "literal":
            read.append(look(torch.cat([gamma * kept, (1 - gamma) * free], 1)))
        else:
            read.append(gamma * look(kept) + (1 - gamma) * look(free))
    network.float()
    return torch.cat(read)


@families
@modes
def test_each_block_reads_the_gated_tokens(
    pack: ModuleType, case: Callable[..., Case], family: Family, mode: str
) -> None:
    made, spy, mask = case(family, references=2), Spy(pack), left_half(family.latent())
    model = spy.around(made.model, lambda m: made.applied(m, mode=mode, weight=0.7, mask=mask))
    stock.velocity(model, family.prompt(1), family.prompt(2), 2.0, family.latent(), 0.6)
    assert len(spy.seen) == len(family.seen)
    for attention, before, after in spy.seen:
        place = attention.place
        if place.text is None:
            assert torch.equal(before, after)
            continue
        frames, *grid = place.grid
        inside = F.interpolate(mask[:, None], grid, mode="area").flatten().repeat(frames)
        added = 0.7 * inside[None, :, None] * expected(made, attention, 0.6, mode)
        outside = inside == 0
        image = after[:, place.image]
        assert torch.equal(image[:, outside], before[:, place.image][:, outside])
        torch.testing.assert_close(
            image.double(), before[:, place.image].double() + added, rtol=2e-4, atol=2e-4
        )
        # The prompt's tokens do not look at the subject.
        rest = torch.ones(after.shape[1], dtype=torch.bool)
        rest[place.image] = False
        assert torch.equal(after[:, rest], before[:, rest])


@few
def test_weight_zero_is_the_model_itself(case: Callable[..., Case], family: Family) -> None:
    made = case(family)
    assert torch.equal(family.velocity(made.applied(weight=0.0)), family.velocity(made.model))


@few
def test_nothing_sticks(case: Callable[..., Case], family: Family) -> None:
    made = case(family)
    model = foreign.attention_override(foreign.wrapper("apply_model")(made.model))
    before, state = family.velocity(model), patcher_state(model)
    changed = family.velocity(made.applied(model))
    assert not torch.equal(changed, before)
    assert torch.equal(family.velocity(model), before)
    assert patcher_state(model) == state


@few
def test_same_seed_same_picture(case: Callable[..., Case], family: Family) -> None:
    made = case(family)
    model = made.applied()
    first = family.velocity(model)
    assert torch.equal(family.velocity(model), first)
    assert torch.equal(family.velocity(made.applied()), first)


@few
def test_a_batch_is_as_its_rows(case: Callable[..., Case], family: Family) -> None:
    made = case(family)
    masks = torch.stack([left_half(family.latent())[0], 1 - left_half(family.latent())[0]])
    x, prompts = family.latent(2), (family.prompt(1), family.prompt(2))
    both = stock.velocity(made.applied(mask=masks), *prompts, 2.0, x, 0.6)
    for row in range(2):
        model = made.applied(mask=masks[row : row + 1])
        one = stock.velocity(model, *prompts, 2.0, x[row : row + 1], 0.6)
        torch.testing.assert_close(both[row : row + 1], one, rtol=1e-3, atol=1e-3)


@few
@pytest.mark.parametrize(("start", "end", "acts"), [(0, 1, True), (0.9, 1, False), (0, 0.1, False)])
def test_it_acts_between_start_and_end(
    case: Callable[..., Case], family: Family, start: float, end: float, acts: bool
) -> None:
    made = case(family)
    sigma = float(made.model.get_model_object("model_sampling").percent_to_sigma(0.5))
    found, plain = (
        stock.velocity(model, family.prompt(1), None, 1.0, family.latent(), sigma)
        for model in (made.applied(start=start, end=end), made.model)
    )
    assert torch.equal(found, plain) != acts


@few
@pytest.mark.parametrize("percent", [0.0, 0.2, 0.5, 0.9])
def test_gamma_follows_the_schedule(
    pack: ModuleType, case: Callable[..., Case], family: Family, percent: float
) -> None:
    made, gates = case(family), pack.nodes.host.gates
    sampling = made.model.get_model_object("model_sampling")
    sigma = min(float(sampling.percent_to_sigma(percent)), float(sampling.sigma_max))
    gate = gates.Gate().extended("all", gates.Schedule("linear", 0.2, 0.8))
    found, right = (
        stock.velocity(model, family.prompt(1), None, 1.0, family.latent(), sigma)
        for model in (made.applied(gate=gate), made.applied(gamma=0.2 + 0.6 * percent))
    )
    torch.testing.assert_close(found, right, rtol=1e-2, atol=2e-3)


def test_progress_is_that_of_the_shifted_model(pack: ModuleType, tiny_model: TinyModel) -> None:
    """A shift that comes after the adapter moves its start and end too."""
    families_ = pack.nodes.host.families
    (shifted,) = stock.call("ModelSamplingSD3", model=tiny_model("sd3"), shift=7.0)
    for model in (tiny_model("sd3"), shifted, tiny_model("sd15")):
        sampling = model.get_model_object("model_sampling")
        for percent in (0.1, 0.35, 0.7, 0.99):
            sigma = float(sampling.percent_to_sigma(percent))
            assert families_.progress(sampling, sigma) == pytest.approx(percent, abs=1e-3)
        assert families_.progress(sampling, 0.0) == pytest.approx(1, abs=1e-3)
        assert families_.progress(sampling, float(sampling.sigma_max)) < 2e-3


@few
def test_blocks_have_gates_of_their_own(
    pack: ModuleType, case: Callable[..., Case], family: Family
) -> None:
    made, spy = case(family), Spy(pack)
    gate = made.gate(("all", 0.2), ("0%-10%", 0.9))
    model = spy.around(made.model, lambda m: made.applied(m, gate=gate))
    stock.velocity(model, family.prompt(1), None, 1.0, family.latent(), 0.6)
    crossing = [seen for seen in spy.seen if seen[0].place.text is not None]
    for number, (attention, before, after) in enumerate(crossing):
        gamma = 0.9 if number == 0 else 0.2
        image = attention.place.image
        added = (after[:, image] - before[:, image]).double()
        torch.testing.assert_close(
            added, expected(made, attention, gamma, "literal"), rtol=1e-3, atol=1e-3
        )


@few
def test_subjects_share_the_picture_in_any_order(
    case: Callable[..., Case], pack: ModuleType, family: Family
) -> None:
    made, mask = case(family), left_half(family.latent())
    other = subjects.subject(pack, seed=7)
    flat = made.applied(mask=mask[0])
    assert torch.equal(family.velocity(flat), family.velocity(made.applied(mask=mask)))
    one = made.applied(made.applied(mask=mask), subject=other, mask=1 - mask)
    two = made.applied(made.applied(subject=other, mask=1 - mask), mask=mask)
    assert not torch.equal(family.velocity(one), family.velocity(made.applied(mask=mask)))
    torch.testing.assert_close(family.velocity(one), family.velocity(two), rtol=1e-4, atol=1e-4)


def sample(family: Family, model: Any) -> None:
    stock.call(
        "KSampler",
        **dict(model=model, seed=0, steps=4, cfg=2.0, sampler_name="euler"),
        **dict(scheduler="simple", positive=family.prompt(1), negative=family.prompt(2)),
        latent_image={"samples": family.latent()},
    )


def watched_tokens(made: Case, monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Tensor]]:
    """All preservation tokens that its adapter makes from now on."""
    network, seen = made.adapter.patcher.model, []
    tokens = network.preservation

    def counted(*given: Tensor) -> Tensor:
        seen.append(weakref.ref(found := tokens(*given)))
        return found

    monkeypatch.setattr(network, "preservation", counted)
    return seen


def test_what_blocks_see_is_made_once_a_run_and_freed(
    case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES["SD3"]
    made = case(family)
    made_tokens = watched_tokens(made, monkeypatch)
    sample(family, made.applied())
    assert len(made_tokens) == 2
    gc.collect()
    assert all(tensor() is None for tensor in made_tokens)


def test_trainings_do_not_pile_up_prompts(
    case: Callable[..., Case], pack: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have other prompts in every step, and a run ends with them only."""
    made = case(FAMILIES["SD3"])
    made_tokens = watched_tokens(made, monkeypatch)
    most = pack.nodes.host.adapting.most_kept

    def look(_trainer: Any) -> None:
        alive.append(sum(tensor() is not None for tensor in made_tokens))

    alive: list[int] = []
    make = flexips.maker(pack, lambda _: made.applied())
    make(steps=most + 8, batch=1, watch=look).run()
    assert len(made_tokens) == most + 8
    assert max(alive) == most


@families
@pytest.mark.parametrize("kind", ["mask", "window"])
def test_where_it_does_not_act_nothing_moves(
    case: Callable[..., Case], family: Family, kind: str
) -> None:
    made = case(family)
    settings = {
        "mask": dict(mask=torch.zeros(1, 8, 8)),
        "window": dict(start=0.98),
    }[kind]
    assert torch.equal(family.velocity(made.applied(**settings)), family.velocity(made.model))


@pytest.mark.parametrize(("start", "is_said"), [(0.5, False), (0.98, True)])
def test_a_window_without_a_step_is_said(
    case: Callable[..., Case], caplog: pytest.LogCaptureFixture, start: float, is_said: bool
) -> None:
    family = FAMILIES["SD3"]
    said = "no step of this run lies between start 0.98 and end 1, so tiny does nothing"
    sample(family, case(family).applied(start=start))
    assert (said in caplog.text) == is_said


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"family": "Flux"}, "adapter tiny was trained for Flux, the model is SD3"),
        ({"text_width": 99}, "adapter tiny reads prompts 99 wide, the model is given 64"),
    ],
)
def test_adapters_of_other_models_are_refused(
    case: Callable[..., Case], changes: dict[str, Any], sentence: str
) -> None:
    family = FAMILIES["SD3"]
    made = case(family)
    made.adapter = replace(made.adapter, **changes)
    with pytest.raises(ValueError, match=sentence):
        family.velocity(made.applied())


def test_settings_that_cannot_act_are_refused(case: Callable[..., Case]) -> None:
    made = case(FAMILIES["SD3"])
    with pytest.raises(ValueError, match=r"start is 0\.5 and end 0\.5: choose a start below"):
        made.applied(start=0.5, end=0.5)
    with pytest.raises(ValueError, match="blocks is 'joint 1', in which adapter tiny has no gate"):
        made.applied(blocks="joint 1", gate=made.gate(("joint 0", 0.5)))
    with pytest.raises(ValueError, match="mask holds values that are not finite"):
        made.applied(mask=torch.full((1, 4, 4), float("nan")))
    narrow = replace(made.subject, low=made.subject.low[..., :3])
    with pytest.raises(ValueError, match="low_encoder whose features are 3 wide, the adapter was"):
        made.applied(subject=narrow)
    narrow = replace(made.subject, high=made.subject.high[..., :3])
    with pytest.raises(ValueError, match="high_encoder whose features are 3 wide"):
        made.applied(subject=narrow)
    swapped = replace(made.subject, encoders=made.subject.encoders[::-1])
    with pytest.raises(
        ValueError, match="low_encoder that is clip_vision_model 20 wide, of 28 pixels"
    ):
        made.applied(subject=swapped)
