"""What a training goes on from, in a safetensors file: weights, their average, their moments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import tensor_files
from .flexip_settings import Progress

_moments = ("exp_avg", "exp_avg_sq")


def save(
    path: Path,
    network: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    origin: Mapping[str, str],
) -> None:
    """Write a training, in place of an earlier one.

    Args:
        origin: what must be the same for it to go on, in words.

    Raises:
        ValueError: it cannot be written.
    """
    # Every tensor of these files is of floating point, see `tensor_files.read`.
    tensors = {
        "step": torch.tensor(float(progress.step), dtype=torch.float64),
        "losses": torch.tensor(progress.losses, dtype=torch.float64),
    }
    averages = dict(average.named_parameters())
    for name, parameter in network.named_parameters():
        moments = optimizer.state.get(parameter, {})
        tensors[f"model.{name}"] = parameter.detach()
        tensors[f"average.{name}"] = averages[name].detach()
        for key in _moments:
            tensors[f"{key}.{name}"] = moments.get(key, torch.zeros_like(parameter))
    tensor_files.write(path, tensors, dict(origin))


def restore(
    path: Path,
    network: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    origin: Mapping[str, str],
) -> Progress:
    """Go back to what was saved; returns how far it had come.

    Raises:
        ValueError: the file is damaged, or of another training.
    """
    tensors, metadata = tensor_files.read(path)
    for name, value in origin.items():
        if metadata.get(name) != value:
            raise ValueError(
                f"file {path.name} holds a training with {name} {metadata.get(name)}, this one has "
                f"{value}: choose another file_name, or turn resume off to begin anew"
            )
    named, averages = dict(network.named_parameters()), dict(average.named_parameters())
    expected = {
        f"{kind}.{name}": parameter.shape
        for kind in ("model", "average", *_moments)
        for name, parameter in named.items()
    }
    found = {name: t.shape for name, t in tensors.items() if name not in ("step", "losses")}
    if expected != found:
        raise ValueError(
            f"file {path.name} holds the training of another adapter: choose another file_name, "
            "the sizes and the model that it was started with, or turn resume off"
        )
    progress = _progress(tensors, path)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[f"model.{name}"])
            averages[name].copy_(tensors[f"average.{name}"])
            optimizer.state[parameter] = _state_of(tensors, name, parameter, progress.step)
    return progress


def _progress(tensors: Mapping[str, Tensor], path: Path) -> Progress:
    step, losses = tensors.get("step"), tensors.get("losses")
    if step is not None and losses is not None and step.ndim == 0 and losses.ndim == 1:
        progress = Progress(int(step), losses.tolist())
        if progress.step == len(progress.losses):
            return progress
    raise ValueError(
        f"file {path.name} is damaged: it does not say how far the training had come; turn resume "
        "off to begin anew"
    )


def _state_of(
    tensors: dict[str, Tensor], name: str, parameter: Tensor, step: int
) -> dict[str, Any]:
    moments = {key: tensors[f"{key}.{name}"].to(parameter.device) for key in _moments}
    return {"step": torch.tensor(float(step)), **moments}
