"""LPIPS's networks: the small trained weights come with torchmetrics, their backbones do not.

Nothing is downloaded: a backbone is looked for in models/lpips and in the cache of torch hub.
"""

from __future__ import annotations

import pickle
import re
from functools import lru_cache
from pathlib import Path
from typing import Literal

import comfy.model_management
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...kernels.scores import Distance
from . import adapters

folder = "lpips"
Net = Literal["alex", "vgg", "squeeze"]
BACKBONES: dict[Net, str] = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
"""Names under which torchvision keeps its weights."""
activations = 400
"""Values for each pixel that the largest network, vgg, has in memory at once."""
_source = "https://download.pytorch.org/models"


def path_to(net: Net) -> Path:
    """The file of a backbone.

    Raises:
        ValueError: it is in none of the folders.
    """
    name = BACKBONES[net]
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for place in (*map(Path, folder_paths.get_folder_paths(folder)), cache):
        if (place / name).is_file():
            return place / name
    raise ValueError(
        f"lpips is {net}, whose backbone {name} is not in models/lpips, and not in {cache}: "
        f"download {_source}/{name} into models/lpips"
    )


def load(net: Net) -> Distance:
    """One of the networks, with its backbone.

    Raises:
        ValueError: the backbone's file is missing or damaged.
    """
    path = path_to(net)
    patcher = _read(net, path, path.stat().st_mtime_ns)

    def distance(a: Tensor, b: Tensor, as_map: bool) -> Tensor:
        room = 4 * activations * (a.nelement() // a.shape[1] + b.nelement() // b.shape[1])
        comfy.model_management.load_models_gpu([patcher], memory_required=room)
        patcher.model.spatial = as_map
        device = patcher.load_device
        found: Tensor = patcher.model(a.to(device), b.to(device))
        return found.to(a.device)

    return distance


@lru_cache(maxsize=1)
def _read(net: Net, path: Path, _written: int) -> ModelPatcher:
    """A network of which ComfyUI decides where it lies; the last one is kept (60 MB at most)."""
    # Imported late: torchmetrics takes a second, and only these nodes need it.
    from torchmetrics.functional.image.lpips import _LPIPS

    network = _LPIPS(net=net, pnet_rand=True)
    _fill(network.net, path)
    return adapters.patcher(network)


_damages = (
    *(AttributeError, EOFError, KeyError, OSError, RuntimeError, TypeError),
    pickle.UnpicklingError,
)
"""What reading a file raises that is not whole, or another one."""
_slice = re.compile(r"^(?:slice\d+|slices\.\d+)\.")


def _fill(backbone: nn.Module, path: Path) -> None:
    """Copy torchvision's weights into the slices that LPIPS cuts a backbone into."""
    try:
        # Nobody publishes all three as safetensors; read like this, a file can hold tensors only.
        weights = torch.load(path, map_location="cpu", weights_only=True)
        found = {
            name: weights[_slice.sub("features.", name)].float() for name in backbone.state_dict()
        }
        backbone.load_state_dict(found)
    except _damages as error:
        raise ValueError(
            f"lpips needs {path.name}, which is damaged in {path.parent}: download "
            f"{_source}/{path.name} again"
        ) from error
