"""LPIPS's networks: the small trained weights come with torchmetrics, their backbones do not.

Nothing is downloaded: a backbone is looked for in models/lpips and in the cache of torch hub.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Literal

import comfy.model_management
import folder_paths
import torch
from torch import Tensor, nn

from ...kernels.scores import Distance

folder = "lpips"
Net = Literal["alex", "vgg", "squeeze"]
BACKBONES: dict[Net, str] = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
"""Names under which torchvision keeps its weights."""
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
    # Imported late: torchmetrics takes a second, and only these nodes need it.
    from torchmetrics.functional.image.lpips import _LPIPS

    path = path_to(net)
    network = _LPIPS(net=net, pnet_rand=True)
    _fill(network.net, path)
    device = comfy.model_management.get_torch_device()
    network.to(device)

    def distance(a: Tensor, b: Tensor, as_map: bool) -> Tensor:
        network.spatial = as_map
        found: Tensor = network(a.to(device), b.to(device))
        return found.to(a.device)

    return distance


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
