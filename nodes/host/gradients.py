"""Gradients through a loaded model without a second copy of it."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn


def differentiable(model: ModelPatcher) -> ModelPatcher:
    """A clone whose weights do not stand in the way of gradients with respect to its inputs.

    ComfyUI loads weights in inference mode, and autograd refuses to keep those. Here every call
    works with copies, which live as long as the gradients of that call: as much memory as a copy of
    the model, but nothing is loaded again, quantised weights and other packs' patches go along.
    Only weights that ComfyUI moves in and out of the graphics card while it computes (dynamic VRAM)
    are loaded a second time, to stay where they are.

    Raises:
        ValueError: with dynamic VRAM, a loader that cannot load the model again.
    """
    if model.is_dynamic() and model.cached_patcher_init is None:
        raise ValueError(
            "model comes from a loader that cannot load it a second time, which gradients need: "
            "use Load Checkpoint or Load Diffusion Model, or start ComfyUI with "
            "--disable-dynamic-vram"
        )
    clone = model.clone(disable_dynamic=True)
    for name, module in clone.model.diffusion_model.named_modules():
        if not hasattr(module, "weight_function"):
            continue
        for parameter in ("weight", "bias"):
            if getattr(module, parameter, None) is not None:
                clone.add_weight_wrapper(f"diffusion_model.{name}.{parameter}", torch.clone)
    return clone


def copied_for_backward() -> torch.autograd.graph.saved_tensors_hooks:
    """A context in which networks may change in place what autograd keeps, for it keeps copies.

    PyTorch's `allow_mutation_on_saved_tensors` copies less, but watches every operation in Python,
    which takes longer than the work of a small network. Weights do not change and are not copied.
    """

    def keep(tensor: Tensor) -> Tensor:
        origin = tensor if tensor._base is None else tensor._base
        return tensor if isinstance(origin, nn.Parameter) else tensor.detach().clone()

    return torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept)


class KeptActivations:
    """Bounds the device memory for what autograd keeps between a call and its gradients.

    Used around a call. What does not fit goes to main memory until it is needed.

    Attributes:
        needed: bytes that were kept in the call, wherever.
    """

    def __init__(self, device: torch.device, limit: float | None = None):
        """
        Args:
            device: where the model computes.
            limit: bytes; three quarters of what is free on the device if not given.
        """
        free = comfy.model_management.get_free_memory(device)
        self.limit = 0.75 * free if limit is None else limit
        self.needed = 0
        self._storages: set[int] = set()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, self._give_back)

    def __enter__(self) -> KeptActivations:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _keep(self, tensor: Tensor) -> tuple[torch.device, Tensor]:
        # A tensor that led back to its own calculation would never be freed.
        kept = tensor.detach()
        storage = kept.untyped_storage().data_ptr()
        if storage not in self._storages:
            self.needed += kept.nbytes
            if self.needed > self.limit:
                kept = kept.cpu()
            else:
                self._storages.add(storage)
        return tensor.device, kept

    def _give_back(self, packed: tuple[torch.device, Tensor]) -> Tensor:
        device, kept = packed
        return kept.to(device)
