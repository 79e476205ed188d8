"""The published autoencoders of latent diffusion, and how their latents are scaled.

Networks of `sd-vae` and `sdxl` are equal; their weights and scales are not.
"""

from collections.abc import Mapping
from typing import NamedTuple

from diffjax.pretrained.family import Size

_4 = {"latent_channels": 4, "quant_convs": True}
_16 = {"latent_channels": 16, "quant_convs": False}
_HUB = "https://huggingface.co"

SIZES: Mapping[str, Size] = {
    "sd-vae": Size(
        _4,
        83_653_863,
        f"{_HUB}/stabilityai/sd-vae-ft-ema/resolve/main/diffusion_pytorch_model.safetensors",
    ),
    "sdxl": Size(
        _4,
        83_653_863,
        f"{_HUB}/stabilityai/sdxl-vae/resolve/main/diffusion_pytorch_model.safetensors",
    ),
    "sd3": Size(_16, 83_819_683),
    "flux": Size(_16, 83_819_683),
}
"""`sd-vae` is of Stable Diffusion 1 and 2, of DiT and SiT; `flux` is of FLUX.1."""


class Scaling(NamedTuple):
    """What models are trained on: `scale·(z − shift)`, of a standard deviation of about 1.

    Attributes:
        scale: the factor.
        shift: the mean of the latents.
    """

    scale: float
    shift: float = 0.0


SCALINGS: Mapping[str, Scaling] = {
    "sd-vae": Scaling(0.18215),
    "sdxl": Scaling(0.13025),
    "sd3": Scaling(1.5305, 0.0609),
    "flux": Scaling(0.3611, 0.1159),
}
"""The published ones, by the names of `SIZES`."""
