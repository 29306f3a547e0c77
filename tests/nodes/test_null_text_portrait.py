"""Null-text inversion of a portrait with the trained UNet: it comes back as the codec leaves it."""

from __future__ import annotations

import torch

from host import stock
from host.inprocess import Host
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
    prompt, negative = (
        stock.call("CLIPTextEncode", clip=clip, text=text)[0] for text in (caption(person), "")
    )
    (latent,) = stock.call("VAEEncode", vae=vae, pixels=source.movedim(1, -1))
    (sigmas,) = stock.call(
        "BasicScheduler", model=model, scheduler="normal", steps=steps, denoise=1.0
    )

    def returned(inner_steps: int) -> float:
        noise, _, trajectory, _ = stock.call(
            "PinpointNullTextInversion",
            model=model,
            source=prompt,
            negative=negative,
            latent=latent,
            sigmas=sigmas,
            guidance=guidance,
            inner_steps=inner_steps,
            learning_rate=0.01,
            early_stop=1.0,
        )
        (guider,) = stock.call(
            "PinpointNullTextGuider",
            model=model,
            trajectory=trajectory,
            positive=prompt,
            guidance=guidance,
        )
        (sampler,) = stock.call("KSamplerSelect", sampler_name="euler")
        found, _ = stock.call(
            "SamplerCustomAdvanced",
            noise=noise,
            guider=guider,
            sampler=sampler,
            sigmas=sigmas,
            latent_image=latent,
        )
        return quality(found)

    def quality(found: dict[str, torch.Tensor]) -> float:
        image = stock.call("VAEDecode", vae=vae, samples=found)[0].movedim(-1, 1)
        return float(psnr(image, source))

    limit = quality(latent)
    assert returned(0) < limit - 3, "without tuning it is lost"
    assert returned(10) > limit - loss_in_db
