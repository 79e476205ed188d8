"""The layout of the authors' files (willisma/SiT): that of DiT.

A file does not show whether it is of SiT or of DiT. Time is 0 for noise and 1 for data, and is
embedded without a scale; the network predicts the velocity `data - noise`. So with the path
`Linear`, where time is 1 for noise and the velocity is `noise - data`, the noise label is `1 - t`
and the prediction has the other sign (`noise_label=time_to_data`, `target=velocity_to_data`). The
authors' sampling guides three of four channels. Of their ways to sample, this has Heun's with 250
evaluations (Ma et al. 2024, section 4), in whole steps.
"""

from dataclasses import replace
from typing import Any

from diffjax.models.dit.published import FAMILY as DIT
from diffjax.models.sit.network import SiT
from diffjax.models.sit.sizes import SIZES
from diffjax.pretrained.family import Denoiser, Published


def sit(
    image_shape: tuple[int, int, int] = (32, 32, 4),
    num_classes: int = 1000,
    out_channels: int = 8,
    **settings: Any,
) -> Denoiser:
    """A SiT with the authors' settings: latents of 256 pixels, ImageNet, twice the channels."""
    return Denoiser(SiT(num_classes, out_channels=out_channels, **settings), image_shape)


def _published(denoiser: Denoiser) -> Published:
    del denoiser
    return Published(
        objective="objective=sit",
        solver="heun",
        grid="uniform",
        num_steps=125,
        guidance_scale=4.0,
        guidance="cfg+first_channels",
        codec="sd-vae-ft-mse",
    )


FAMILY = replace(DIT, name="SiT", network=sit, sizes=SIZES, published=_published)
