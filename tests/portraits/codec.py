"""TAESDs whose encoders start as the principal components of 8x8 colour blocks.

From ordinary initialisation the two halves do not find each other in the time that two CPU cores
give. With the encoder set by hand to an exact linear transform (28 dB when inverted linearly), only
the 16-channel decoder is trained, and a transformer can be trained on the latents at the same time.
Four components are too few (21 dB), so the 4-channel encoder is trained on from there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

channels = 16
"""Of SD3's and Flux's latents."""
sd15_channels = 4
sd3_scale, sd3_shift = 1.5305, 0.0609
"""SD3's latent format: the transformer sees (raw - shift) * scale, which is what we train on."""
flux_scale, flux_shift = 0.3611, 0.1159
"""Flux's latent format; scaled so, the same latents reach a Flux transformer."""
sd15_scale, sd15_shift = 0.18215, 0.0
"""SD1.5's latent format: the UNet sees what the encoder computes."""

Basis = tuple[Tensor, Tensor, Tensor]
"""Mean (192,), components (channels, 192) and their deviations (channels,)."""


def spread(basis: Basis) -> Tensor:
    """Deviation of each latent channel; rare large values of fine detail must fit TAESD's clamp."""
    return torch.tensor([1.0] * 3 + [0.6] * (len(basis[1]) - 3))


def build(channels: int = channels) -> nn.Module:
    """ComfyUI's TAESD with freshly drawn weights."""
    from comfy.taesd.taesd import TAESD

    codec = TAESD(latent_channels=channels)
    for name, parameter in codec.named_parameters():
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
            if ".conv.4." in name:
                nn.init.zeros_(parameter)
        elif parameter.ndim == 1:
            nn.init.zeros_(parameter)
    codec.vae_scale.requires_grad_(False)
    codec.vae_shift.requires_grad_(False)
    return codec


def principal_components(images: Tensor, channels: int = channels) -> Basis:
    """The first components of the 8x8 colour blocks of pictures.

    In float64 with a fixed sign, so that separate runs agree on the latent space.
    """
    blocks = F.unfold(images, 8, stride=8).permute(0, 2, 1).reshape(-1, 192).double()
    mean = blocks.mean(0)
    values, vectors = torch.linalg.eigh((blocks - mean).T @ (blocks - mean) / len(blocks))
    components = vectors.flip(1).T[:channels]
    components = components * components.sum(1, keepdim=True).sign()
    deviation = values.flip(0)[:channels].sqrt()
    return mean.float(), components.float(), deviation.float()


def project(images: Tensor, basis: Basis) -> Tensor:
    """(B, 3, H, W) in 0..1 -> latents (B, channels, H/8, W/8), what the encoder computes."""
    mean, components, deviation = basis
    blocks = F.unfold(images, 8, stride=8).permute(0, 2, 1) - mean
    latents = blocks @ components.T * (spread(basis) / deviation)
    rows, columns = images.shape[2] // 8, images.shape[3] // 8
    return latents.permute(0, 2, 1).unflatten(2, (rows, columns)).contiguous()


@torch.no_grad()
def set_encoder(codec: nn.Module, basis: Basis) -> None:
    """Set the encoder's weights so that it computes `project`.

    The strided convolutions become pixel unshuffles and the last two form the projection; positive
    and negative parts travel in separate channels because every block ends in a ReLU. Channels that
    this leaves free keep their drawn weights, from which an encoder can be trained on.
    """
    mean, components, deviation = basis
    channels, encoder = len(components), codec.taesd_encoder
    first, half, quarter, eighth, last = (encoder[i] for i in (0, 2, 6, 10, 14))
    for layer, used in ((first, 3), (half, 12), (quarter, 48), (eighth, 2 * channels)):
        layer.weight[:used] = 0
    last.weight.zero_()
    for c in range(3):
        first.weight[c, c, 1, 1] = 1
    for conv, planes in ((half, 3), (quarter, 12)):
        for c in range(planes):
            for y in range(2):
                for x in range(2):
                    conv.weight[(c * 2 + y) * 2 + x, c, 1 + y, 1 + x] = 1
    kernel = _project_unshuffled(components)
    eighth.weight[:channels, :48, 1:, 1:] = kernel
    eighth.weight[channels : 2 * channels, :48, 1:, 1:] = -kernel
    gain, index = spread(basis) / deviation, torch.arange(channels)
    last.weight[index, index, 1, 1] = gain
    last.weight[index, index + channels, 1, 1] = -gain
    last.bias.copy_(-(components @ mean) * gain)


def _project_unshuffled(components: Tensor) -> Tensor:
    """Components over a flat 8x8x3 block -> a 2x2 kernel over twice-unshuffled channels.

    Channel ((c*2 + y1)*2 + x1)*4 + y2*2 + x2 and kernel cell (y3, x3) hold pixel row
    y3*4 + y2*2 + y1, likewise for columns.
    """
    blocks = components.view(-1, 3, 2, 2, 2, 2, 2, 2)  # k c y3 y2 y1 x3 x2 x1
    return blocks.permute(0, 1, 4, 7, 3, 6, 2, 5).reshape(len(components), 48, 2, 2)
