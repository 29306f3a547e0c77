"""Training of FlexIP adapters: what is kept of one that stops, and gone on with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from host import flexips
from host.flexips import Make, require_same, weights
from host.tapping import FAMILIES

TinyModel = Callable[[str], Any]


@pytest.fixture
def make(tiny_model: TinyModel, pack: ModuleType) -> Make:
    return flexips.maker(pack, tiny_model)


def test_a_training_that_goes_on_is_one_that_never_stopped(make: Make, tmp_path: Path) -> None:
    whole, state = make(steps=5), tmp_path / "a.state.safetensors"
    whole.run()

    def stop(trainer: Any) -> None:
        if trainer.progress.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(steps=5, state=state, watch=stop).run()
    later = make(steps=5, state=state)
    assert later.progress.step == 2
    later.run()
    assert later.progress.losses == whole.progress.losses
    require_same(weights(later), weights(whole))
    require_same(dict(later.result.state_dict()), dict(whole.result.state_dict()))
    # With more steps it goes on from the end; with as many there is nothing left to do.
    done = make(steps=5, state=state)
    done.run()
    require_same(weights(done), weights(whole))
    assert not list(tmp_path.glob("*.part"))


def test_a_state_of_another_adapter_is_refused(make: Make, tmp_path: Path) -> None:
    state = tmp_path / "a.state.safetensors"
    make(steps=1, state=state).run()
    with pytest.raises(ValueError, match="holds a training with model SD3, this one has Flux"):
        make(FAMILIES["Flux"], state=state)
    with pytest.raises(ValueError, match="with mode literal, this one has linear"):
        make(state=state, mode="linear")
    kept = load_file(state)
    with safe_open(state, framework="pt") as file:
        metadata = file.metadata()
    strange = {
        "of another adapter": {"average.queries": torch.zeros(2)},
        "does not say how far": {"step": torch.tensor(-5.0)},
    }
    for sentence, tensors in strange.items():
        save_file({**kept, **tensors}, state, metadata)
        with pytest.raises(ValueError, match=sentence):
            make(state=state)
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        make(state=state)


def test_interruption_keeps_the_state_and_the_next_training_runs(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management
    import comfy.utils

    def stop(_bar: Any, value: int, *_args: Any) -> None:
        if value == 2:
            comfy.model_management.interrupt_current_processing()

    state = tmp_path / "a.state.safetensors"
    with monkeypatch.context() as patch:
        # Its hook is not called for every step of a fast training.
        patch.setattr(comfy.utils.ProgressBar, "update_absolute", stop)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            make(state=state).run()
    assert not comfy.model_management.in_training
    later = make(state=state)
    assert later.progress.step == 2
    later.run()
    assert later.progress.step == 4


def test_half_a_step_is_not_kept(make: Make, tmp_path: Path) -> None:
    state = tmp_path / "a.state.safetensors"
    stopped = make(state=state, save_every=1)
    update = stopped.averaged.update_parameters

    def stop(network: Any) -> None:
        if stopped.progress.step == 2:
            raise KeyboardInterrupt
        update(network)

    stopped.averaged.update_parameters = stop
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    later, whole = make(state=state), make()
    assert later.progress.step == 2
    later.run()
    whole.run()
    require_same(weights(later), weights(whole))


class FullDevice(TorchDispatchMode):
    """Has no room for another copy."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            raise torch.OutOfMemoryError
        return func(*args, **(kwargs or {}))


def test_a_full_device_keeps_nothing_from_being_saved(make: Make, tmp_path: Path) -> None:
    state = tmp_path / "a.state.safetensors"
    trainer = make(steps=2, state=state)
    trainer.run()
    state.unlink()
    with FullDevice():
        trainer.save()
    later = make(steps=2, state=state)
    require_same(weights(later), weights(trainer))


def test_a_new_training_that_fails_at_once_keeps_the_old_state(make: Make, tmp_path: Path) -> None:
    state = tmp_path / "a.state.safetensors"
    make(steps=2, state=state).run()
    anew = make(steps=2, state=state, resume=False)

    def fail(*_: Any) -> float:
        raise MemoryError

    anew._backward = fail
    with pytest.raises(MemoryError):
        anew.run()
    assert make(steps=2, state=state).progress.step == 2


@pytest.mark.parametrize("where", ["loss", "gradients"])
def test_a_loss_that_is_no_number_keeps_what_was_good(
    make: Make,
    pack: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    state = tmp_path / "a.state.safetensors"
    good = make(steps=4, state=state, save_every=1)
    module, count = pack.nodes.host.flexip_training, iter(range(9))

    def broken(*args: Any) -> Tensor:
        loss = true(*args)
        if next(count) != 2:
            return loss
        # The root of nothing has no slope.
        return loss * torch.nan if where == "loss" else loss + (0 * loss).sqrt()

    true = module.losses.prediction_error
    monkeypatch.setattr(module.losses, "prediction_error", broken)
    with pytest.raises(ValueError, match=r"any more after step 3 of 4: lower the rate, or choose"):
        good.run()
    assert all(t.isfinite().all() for t in good.network.parameters())
    monkeypatch.undo()
    # What the second step led to was never seen to be good.
    later = make(steps=4, state=state)
    assert later.progress.step == 1
    later.run()
    whole = make(steps=4)
    whole.run()
    require_same(weights(later), weights(whole))
