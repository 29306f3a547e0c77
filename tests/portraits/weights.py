"""Where the shipped weights of the proving ground lie."""

from pathlib import Path

folder = Path(__file__).parent / "weights"
codec_file = folder / "taesd_portraits.safetensors"
sd15_codec_file = folder / "taesd_portraits_sd15.safetensors"
network_files = {name: folder / f"{name}_portraits.safetensors" for name in ("sd3", "flux", "sd15")}
identity_files = [folder / "identities" / f"pinpoint_{name}.safetensors" for name in ("ann", "bea")]
"""The two portraits that the workflows load, as Learn Identity learns them with its defaults."""
low_encoder_file = folder / "image_encoders" / "pinpoint_dino.safetensors"
high_encoder_file = folder / "image_encoders" / "pinpoint_clip.safetensors"
"""Of the image encoders that look at reference pictures."""
flexip_file = folder / "flexip" / "pinpoint_portraits.safetensors"
