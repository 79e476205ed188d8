"""The published autoencoders of latent diffusion, and how their latents are scaled.

Networks of `sd-vae` and `sdxl` are equal; their weights and scales are not.
"""

from collections.abc import Mapping
from typing import NamedTuple

from diffjax.pretrained.family import Size

_4 = {"latent_channels": 4, "quant_convs": True}
_16 = {"latent_channels": 16, "quant_convs": False}
_32 = {"latent_channels": 32, "quant_convs": True, "patch_size": 2}
_HUB = "https://huggingface.co"

SIZES: Mapping[str, Size] = {
    "sd-vae": Size(
        _4,
        83_653_863,
        f"{_HUB}/stabilityai/sd-vae-ft-ema/resolve/main/diffusion_pytorch_model.safetensors",
    ),
    "edm2": Size(
        _4,
        83_653_863,
        f"{_HUB}/stabilityai/sd-vae-ft-mse/resolve/main/diffusion_pytorch_model.safetensors",
    ),
    "sdxl": Size(
        _4,
        83_653_863,
        f"{_HUB}/stabilityai/sdxl-vae/resolve/main/diffusion_pytorch_model.safetensors",
    ),
    "sd3": Size(_16, 83_819_683),
    "flux": Size(_16, 83_819_683),
    "flux2": Size(_32, 84_046_371),
}
"""`sd-vae` is of Stable Diffusion 1 and 2, of DiT and SiT; `edm2` is one of its kind, with the
statistics of EDM2; `flux` is of FLUX.1."""


class Scaling(NamedTuple):
    """What models are trained on: `scale·(z − shift)`, of a standard deviation of about 1.

    Attributes:
        scale: the factor, one or one for each channel.
        shift: the mean of the latents, likewise.
    """

    scale: float | tuple[float, ...]
    shift: float | tuple[float, ...] = 0.0


SCALINGS: Mapping[str, Scaling] = {
    "sd-vae": Scaling(0.18215),
    "edm2": Scaling(tuple(0.5 / x for x in (4.17, 4.62, 3.71, 3.28)), (5.81, 3.25, 0.12, -2.15)),
    "sdxl": Scaling(0.13025),
    "sd3": Scaling(1.5305, 0.0609),
    "flux": Scaling(0.3611, 0.1159),
    "flux2": Scaling(1.0),
}
"""The published ones, by the names of `SIZES`. Those of `edm2` are of each channel, to a standard
deviation of 0.5; those of `flux2` lie in its file."""
