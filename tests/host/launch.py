"""The command-line arguments every ComfyUI here is started with."""

from __future__ import annotations

from pathlib import Path


def has_accelerator() -> bool:
    """Whether PyTorch sees a device that ComfyUI can use without `--cpu`."""
    import torch

    backends = (torch.cuda, torch.backends.mps, torch.xpu)
    return any(backend.is_available() for backend in backends)


def arguments(base: Path, cpu: bool | None = None) -> list[str]:
    """Arguments that keep ComfyUI inside `base`; `cpu=None` uses an accelerator if there is one."""
    if cpu is None:
        cpu = not has_accelerator()
    return [
        *(["--cpu"] if cpu else []),
        *("--base-directory", str(base)),
        *("--database-url", "sqlite:///:memory:"),
        "--disable-api-nodes",
    ]
