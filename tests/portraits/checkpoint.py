"""The demo models as files that stock loaders know, made from the shipped weights.

One SD3 checkpoint with everything in it, for Flux a transformer, a VAE and a text encoder, and for
SD1.5 a VAE; its UNet is loaded by `sd15`. With them two identities of the SD3 model, its FlexIP
adapter and the image encoders.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import codec, text_encoder, weights

name = "pinpoint_portraits_sd3.safetensors"
flux_name = "pinpoint_portraits_flux.safetensors"
vae_name = "pinpoint_portraits_flux_vae.safetensors"
sd15_vae_name = "pinpoint_portraits_sd15_vae.safetensors"
clip_name = "pinpoint_portraits_clip_l.safetensors"


def ensure(models_dir: Path) -> list[Path]:
    """The files below `models_dir`, each made if it is absent or older than its parts.

    Takes a few seconds and 530 MB, nearly all of it the generated text encoder, twice.
    """
    codec_file, sd15_codec = weights.codec_file, weights.sd15_codec_file
    sd3, flux = (weights.network_files[name] for name in ("sd3", "flux"))
    recipes: dict[str, tuple[Callable[[], dict[str, Tensor]], tuple[Path, ...]]] = {
        f"checkpoints/{name}": (sd3_checkpoint, (codec_file, sd3)),
        f"diffusion_models/{flux_name}": (lambda: load_file(flux), (flux,)),
        f"vae/{vae_name}": (flux_vae, (codec_file,)),
        f"vae/{sd15_vae_name}": (lambda: load_file(sd15_codec), (sd15_codec,)),
        f"text_encoders/{clip_name}": (text_encoder.state_dict, ()),
    }
    for target, (make, parts) in recipes.items():
        _make(models_dir / target, make, parts)
    made = [models_dir / target for target in recipes]
    shipped = {
        "identities": weights.identity_files,
        "clip_vision": [weights.low_encoder_file, weights.high_encoder_file],
        "flexip": [weights.flexip_file],
    }
    return [
        *made,
        *(_copy(file, models_dir / kind) for kind, files in shipped.items() for file in files),
    ]


def _make(target: Path, make: Callable[[], dict[str, Tensor]], parts: tuple[Path, ...]) -> None:
    newest = max((part.stat().st_mtime for part in parts), default=0)
    if target.exists() and target.stat().st_mtime >= newest:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".part")
    save_file(make(), unfinished)
    unfinished.replace(target)


def _copy(file: Path, folder: Path) -> Path:
    """What is shipped as it is loaded, its metadata with it."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(file, folder / file.name))


def sd3_checkpoint() -> dict[str, Tensor]:
    """The tensors of an SD3 checkpoint, in the key names of Stability's single files."""
    prefixed = {
        "first_stage_model.": load_file(weights.codec_file),
        "model.diffusion_model.": load_file(weights.network_files["sd3"]),
        "text_encoders.clip_l.transformer.": text_encoder.state_dict(),
    }
    return {prefix + key: t for prefix, part in prefixed.items() for key, t in part.items()}


def flux_vae() -> dict[str, Tensor]:
    """The same codec, its latents scaled as Flux's are instead of SD3's."""
    scale, shift = torch.tensor(codec.flux_scale).half(), torch.tensor(codec.flux_shift).half()
    return {**load_file(weights.codec_file), "vae_scale": scale, "vae_shift": shift}
