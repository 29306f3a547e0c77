"""A whole training of a FlexIP adapter: pictures encoded, adapter trained, watched and saved."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from comfy.sd import VAE
from torch import Tensor

from . import (
    adapter_files,
    families,
    flexip_folders,
    flexip_samples,
    layouts,
    tensor_files,
    training,
)
from .flexip_pairs import Encoders, FolderPairs, Store
from .flexip_settings import TrainingSettings
from .flexip_training import Trainer, new_network
from .subjects import EncoderKinds

log = logging.getLogger(__name__)

cache_folder = "encoded"
"""Beside the pictures."""
_between_texts = 1.0
"""Seconds."""


@dataclass(frozen=True)
class Plan:
    """What is to be trained.

    Attributes:
        settings: of the training.
        sizes: of the adapter, see `kernels.flexip.FlexIPSizes`.
        resolution, augmentation, invariant_share: of the pairs, see `FolderPairs`.
        validate_every: steps between validation pictures; 0 = none.
    """

    settings: TrainingSettings
    sizes: dict[str, int]
    resolution: int
    augmentation: str
    invariant_share: float
    validate_every: int


class Watcher(Protocol):
    """Who is told how it goes."""

    def tell(self, text: str) -> None:
        """About once a second while it trains, for every picture before that."""

    def show(self, step: int, steps: int, pictures: Tensor) -> None:
        """Validation pictures, (3, H, W, 3)."""


@dataclass(frozen=True)
class Outcome:
    """What a training gave.

    Attributes:
        path: of the adapter.
        losses: of every step.
        pictures: the last validation pictures, or the goal of the pair they would show.
        report: in words.
    """

    path: Path
    losses: list[float]
    pictures: Tensor
    report: str


def state_of(path: Path) -> Path:
    """What the training of an adapter goes on from."""
    name = path.name.removesuffix(tensor_files.suffix)
    return path.with_name(f"{name}{adapter_files.state_suffix}")


def train(
    encoders: Encoders,
    root: Path,
    plan: Plan,
    path: Path,
    watcher: Watcher,
    *,
    resume: bool = True,
    cache: Path | None = None,
    accelerator: Any = None,
) -> Outcome:
    """Train an adapter and save it; a training that stops can be gone on with from its state file.

    Args:
        root: the folder of pictures, see `flexip_folders`.
        path: the file to be written.
        resume: go on from the state file beside it, if there is one.
        cache: where encoded pictures are kept, if not below root.
        accelerator: of `accelerate`, if there are several processes.

    Raises:
        ValueError: models, pictures, settings or files that cannot be used, or a loss that is no
            number.
    """
    started = time.perf_counter()
    # Before hours go into pictures for it.
    layouts.layout_of(encoders.model)
    training.require_loadable(encoders.model, "model")
    pairs = _pairs(encoders, root, plan, cache or root / cache_folder, watcher, accelerator)
    state = state_of(path)
    _wait(accelerator)
    # ComfyUI's nodes run in inference mode, in which nothing can be trained.
    with torch.inference_mode(False), torch.enable_grad():
        network = new_network(encoders.model, *pairs.widths, plan.settings.seed, **plan.sizes)
        watch = _Watch(encoders.vae, pairs, plan, watcher)
        trainer = Trainer(
            encoders.model,
            network,
            pairs,
            plan.settings,
            state,
            max(50, min(1000, plan.settings.steps // 10)),
            watch,
            accelerator,
            origin=f"{root.name} as {' and '.join(map(str, encoders.kinds))} see them",
            resume=resume,
        )
        before = trainer.progress.step
        try:
            trainer.run()
        # ComfyUI's interruption is no Exception.
        except BaseException:
            # A training that begins anew has not touched an older state before its first step.
            is_own = resume or trainer.progress.step > before
            if trainer.is_main and is_own and state.exists():
                log.warning(
                    f"Pinpoint: training stopped after step {trainer.progress.step} of "
                    f"{plan.settings.steps}; with resume it goes on from {state}"
                )
            raise
        if trainer.is_main:
            _save(trainer, plan, path, encoders.kinds)
    made = (
        f"{path.stem} trained in {time.perf_counter() - started:.0f} s, steps {before} to "
        f"{trainer.progress.step}, from {pairs.collection}"
    )
    if before >= plan.settings.steps:
        made = f"{path.stem} had made all of its {before} steps before: raise steps to go on"
    report = [
        made,
        _ends(trainer.progress.losses),
        f"{path.stat().st_size / 1e6:.1f} MB in {path}" if trainer.is_main else "",
        watch.trouble,
    ]
    shown = watch.pictures if watch.pictures is not None else pairs.goal()
    return Outcome(path, trainer.progress.losses, shown, "\n".join(filter(None, report)))


def _pairs(
    encoders: Encoders, root: Path, plan: Plan, cache: Path, watcher: Watcher, accelerator: Any
) -> FolderPairs:
    collection = flexip_folders.found(root)
    if accelerator is None:
        share = 0, 1
        store = Store(cache, encoders)
    else:
        share = accelerator.process_index, accelerator.num_processes
        # The first one to come makes the folder.
        with accelerator.main_process_first():
            store = Store(cache, encoders)
    found = FolderPairs(collection, store, plan.resolution, plan.augmentation, plan.invariant_share)
    found.encode(watcher.tell, *share)
    _wait(accelerator)
    return found


class _Watch:
    """What is done after every step: telling how it goes, and validation pictures."""

    def __init__(self, vae: VAE, pairs: FolderPairs, plan: Plan, watcher: Watcher):
        self.vae, self.pairs, self.plan, self.watcher = vae, pairs, plan, watcher
        self.pictures: Tensor | None = None
        self.trouble = ""
        self._told = -_between_texts

    def __call__(self, trainer: Trainer) -> None:
        """See `Trainer`."""
        if not trainer.is_main:
            return
        step, steps = trainer.progress.step, self.plan.settings.steps
        recent = trainer.progress.losses[-20:]
        if time.monotonic() - self._told >= _between_texts or step >= steps:
            self._told = time.monotonic()
            mean = sum(recent) / len(recent)
            self.watcher.tell(f"step {step} of {steps}, loss {mean:.4f}")
        every = self.plan.validate_every
        if every and (step % every == 0 or step >= steps):
            self._validate(trainer, step, steps)

    def _validate(self, trainer: Trainer, step: int, steps: int) -> None:
        try:
            self.pictures = flexip_samples.pictures(trainer, self.pairs.fixed(), self.vae)
        # What is trained is worth more than pictures of it; an interruption is no Exception.
        except Exception as error:
            log.warning("Pinpoint: no validation pictures at step %d", step, exc_info=True)
            self.trouble = f"no validation pictures at step {step}: {error}"
        else:
            self.trouble = ""
            self.watcher.show(step, steps, self.pictures)


def _save(trainer: Trainer, plan: Plan, path: Path, encoders: EncoderKinds) -> None:
    settings, model = plan.settings, trainer.model
    recipe = {key: str(value) for key, value in asdict(settings).items()}
    of_pairs = ("resolution", "augmentation", "invariant_share")
    recipe |= {key: str(getattr(plan, key)) for key in of_pairs}
    blocks, family = layouts.blocks_of(model), families.name(model)
    content = adapter_files.content(trainer.result, blocks, family, settings.mode, recipe, encoders)
    tensor_files.write(path, *content)


def _ends(losses: list[float]) -> str:
    first, last = (sum(end) / len(end) for end in (losses[:20], losses[-20:]))
    return f"loss {first:.4f} at the start, {last:.4f} at the end"


def _wait(accelerator: Any) -> None:
    if accelerator is not None:
        accelerator.wait_for_everyone()
