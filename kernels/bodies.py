"""Which of its two bodies a kernel runs: torch's, or the same written in Triton.

PINPOINT_KERNELS is `torch` (as if unset) or `triton`. Torch is the default because what is not
proven faster than torch is not the default here, and no GPU was at hand to prove it on:
`tests/bench/kernels.py` does so where there is one.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

log = logging.getLogger(__name__)

variable = "PINPOINT_KERNELS"
_dtypes = (torch.float32, torch.float16, torch.bfloat16)


def triton_runs(*tensors: Tensor) -> bool:
    """Whether a kernel's Triton body runs on its floating-point tensors; said once in the log.

    Raises:
        ValueError: PINPOINT_KERNELS is neither torch nor triton.
    """
    chosen = os.environ.get(variable) or "torch"
    if chosen not in ("torch", "triton"):
        raise ValueError(f"{variable} is {chosen}, but kernels have two bodies: torch and triton")
    if chosen == "torch":
        return False
    hindrance = _hindrance(tensors)
    if hindrance:
        _warned(f"Pinpoint: {variable} is triton, but {hindrance}, so torch runs instead")
        return False
    _told(f"Pinpoint: {variable} is triton, so kernels run their Triton bodies")
    return True


def interpreted() -> bool:
    """Whether Triton runs in its interpreter, on any device, as it does when it is tested."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _hindrance(tensors: tuple[Tensor, ...]) -> str | None:
    """Why Triton cannot run, or None."""
    if not _installed():
        return "triton is not installed"
    if not (interpreted() or all(tensor.is_cuda for tensor in tensors)):
        return "tensors are not on a GPU"
    odd = next((tensor.dtype for tensor in tensors if tensor.dtype not in _dtypes), None)
    if odd is not None:
        return f"tensors are {odd}"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "gradients are asked for"
    return None


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def _warned(message: str) -> None:
    log.warning(message)


@cache
def _told(message: str) -> None:
    log.info(message)
