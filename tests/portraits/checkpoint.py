"""The demo checkpoint: codec, transformer and text encoder in one SD3 file for the stock loader."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from . import text_encoder, weights

name = "pinpoint_portraits_sd3.safetensors"


def ensure(models_dir: Path) -> Path:
    """The checkpoint in `models_dir/checkpoints`, made if it is absent or older than its parts.

    Takes a few seconds and 270 MB, nearly all of it the generated text encoder.
    """
    target = models_dir / "checkpoints" / name
    parts = (weights.codec_file, weights.transformer_file)
    if target.exists() and target.stat().st_mtime >= max(p.stat().st_mtime for p in parts):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".part")
    save_file(assemble(*parts), unfinished)
    unfinished.replace(target)
    return target


def assemble(codec: Path, transformer: Path) -> dict:
    """The tensors of an SD3 checkpoint, in the key names of Stability's single files."""
    prefixed = {
        "first_stage_model.": load_file(codec),
        "model.diffusion_model.": load_file(transformer),
        "text_encoders.clip_l.transformer.": text_encoder.state_dict(),
    }
    return {prefix + key: t for prefix, part in prefixed.items() for key, t in part.items()}
