"""Null-text inversion of a portrait with the trained UNet: it comes back as the codec leaves it."""

from __future__ import annotations

import torch
from torch import Tensor

from host import stock
from host.inprocess import Host
from host.null_texts import NullText
from portraits import checkpoint, sd15
from portraits.dataset import people, pictures
from portraits.judging import psnr
from portraits.people import caption

steps, guidance = 25, 7.5
loss_in_db = 0.5


def test_a_portrait_comes_back(host: Host) -> None:  # noqa: ARG001
    (person,) = people("tests", 4, 1)
    source = pictures([person]).float() / 255
    with torch.inference_mode():
        model = sd15.load_model()
    (vae,) = stock.call("VAELoader", vae_name=checkpoint.sd15_vae_name)
    (clip,) = stock.call("CLIPLoader", clip_name=checkpoint.clip_name, type="stable_diffusion")
    described, empty = (
        stock.call("CLIPTextEncode", clip=clip, text=text)[0] for text in (caption(person), "")
    )
    (latent,) = stock.call("VAEEncode", vae=vae, pixels=source.movedim(1, -1))
    (sigmas,) = stock.call(
        "BasicScheduler", model=model, scheduler="normal", steps=steps, denoise=1.0
    )
    job = NullText(model, described, empty, latent["samples"], tuple(sigmas.tolist()), guidance)

    def returned(inner_steps: int) -> float:
        tuned = job.having(inner_steps=inner_steps)
        noise, _, trajectory, _ = tuned.run()
        return quality(tuned.back(noise, tuned.replaying(trajectory)))

    def quality(samples: Tensor) -> float:
        image = stock.call("VAEDecode", vae=vae, samples={"samples": samples})[0].movedim(-1, 1)
        return float(psnr(image, source))

    limit = quality(job.latent)
    assert returned(0) < limit - 3, "without tuning it is lost"
    assert returned(10) > limit - loss_in_db
