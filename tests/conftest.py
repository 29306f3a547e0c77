"""Settings of the whole test suite, and the ComfyUIs that its tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch

import tiny

if TYPE_CHECKING:
    from host.inprocess import Host
    from host.server import Server
    from host.stock import Demo


class RootIsNoPackage:
    """Keeps pytest from importing the repository's `__init__.py`, which is ComfyUI's to load."""

    @pytest.hookimpl
    def pytest_collect_directory(
        self, path: Path, parent: pytest.Collector
    ) -> pytest.Collector | None:
        """Make the repository's root a plain folder; leave all others to pytest."""
        if path == parent.config.rootpath:
            return pytest.Dir.from_parent(parent, path=path)
        return None


def pytest_configure(config: pytest.Config) -> None:
    """Register what has to hold above this folder, where a conftest's own hooks are not asked."""
    config.pluginmanager.register(RootIsNoPackage())
    # Several processes share the cores, and tiny models gain nothing from a second thread.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Without a GPU, Triton can only be interpreted, and it asks for that when it is first imported.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """A ComfyUI in this process; on the CPU, where the laws can be held to the last bit."""
    from host import graphs, inprocess
    from host.base import make_base

    host = inprocess.start(make_base(tmp_path_factory.mktemp("base")), cpu=True)
    host.nodes.update(graphs.NODES)
    return host


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real ComfyUI server with a base directory of its own."""
    from host.base import make_base
    from host.server import Server

    with Server(make_base(tmp_path_factory.mktemp("server")), cpu=True) as server:
        yield server


@pytest.fixture(scope="session")
def pack(host: Host) -> ModuleType:
    """Pinpoint as ComfyUI's loader imported it; everything in it is an attribute of this."""
    return host.pack


@pytest.fixture(scope="session")
def tiny_model(host: Host) -> Callable[[str], Any]:
    """A function that loads one of the models of `tiny` with the stock loader.

    Those of `tiny_built`, which no loader takes, it builds.
    """
    from host import stock, tiny_built

    @cache
    def load(name: str) -> Any:
        if name in tiny_built.RECIPES:
            return tiny_built.model(name)
        file = tiny.ensure(name, host.base / "models" / "diffusion_models")
        return stock.call("UNETLoader", unet_name=file, weight_dtype="default")[0]

    return load


@pytest.fixture(scope="session")
def demo(host: Host) -> Demo:  # noqa: ARG001
    """The demo checkpoint, loaded by the stock loader."""
    from host import stock
    from portraits import checkpoint

    return stock.Demo(*stock.call("CheckpointLoaderSimple", ckpt_name=checkpoint.name))


@pytest.fixture
def lpips_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    host: Host,  # noqa: ARG001
) -> Path:
    """An empty folder that is models/lpips, and no cache of torch hub."""
    import folder_paths
    import torch

    folder = tmp_path / "lpips"
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "lpips", ([str(folder)], set()))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return folder
