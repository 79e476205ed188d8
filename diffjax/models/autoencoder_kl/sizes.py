"""The published autoencoders of latent diffusion, and how their latents are scaled.

Networks of `sd-vae` and `sdxl` are equal; their weights and scales are not. Of `sd-vae` and `edm2`
the weights are equal too.
"""

from collections.abc import Mapping
from typing import NamedTuple

from diffjax.pretrained.family import Size

_4 = {"latent_channels": 4, "quant_convs": True}
_16 = {"latent_channels": 16, "quant_convs": False}
_32 = {"latent_channels": 32, "quant_convs": True}
_HUB = "https://huggingface.co"
_MSE = "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815"


def _on_hub(name: str) -> str:
    return f"{_HUB}/stabilityai/{name}/resolve/main/diffusion_pytorch_model.safetensors"


SIZES: Mapping[str, Size] = {
    "sd-vae": Size(
        _4,
        83_653_863,
        _on_hub("sd-vae-ft-ema"),
    ),
    "sdxl": Size(
        _4,
        83_653_863,
        _on_hub("sdxl-vae"),
    ),
    "sd3": Size(_16, 83_819_683),
    "flux": Size(_16, 83_819_683),
    "edm2": Size(_4, 83_653_863, _on_hub("sd-vae-ft-mse"), _MSE),
}
"""`sd-vae` is of Stable Diffusion 1 and 2, of DiT and SiT; `flux` is of FLUX.1."""
FLUX2_SIZES: Mapping[str, Size] = {"flux2": Size(_32, 84_046_371)}
RESCALED: Mapping[str, str] = {"edm2": "sd-vae"}
"""Sizes whose weights are those of another one; their latents are scaled otherwise."""


class Weights(NamedTuple):
    """A published file of weights.

    Attributes:
        size: the name of the network's size and of the scale of its latents.
        address: the URL of the file; "" if it lies beside its model alone.
        sha256: hex digest of the file; "" if it is not known here.
    """

    size: str
    address: str = ""
    sha256: str = ""


WEIGHTS: Mapping[str, Weights] = {
    "sd-vae-ft-ema": Weights("sd-vae", _on_hub("sd-vae-ft-ema")),
    "sd-vae-ft-mse": Weights("sd-vae", _on_hub("sd-vae-ft-mse"), _MSE),
    "sd-vae-ft-mse-edm2": Weights("edm2", _on_hub("sd-vae-ft-mse"), _MSE),
    "sdxl-vae": Weights(
        "sdxl",
        _on_hub("sdxl-vae"),
        "1598f3d24932bcfe6634e8b618ea1e30ab1d57f5aad13a6d2de446d2199f2341",
    ),
    "sd3-vae": Weights("sd3"),
    "flux-vae": Weights("flux"),
    "flux2-vae": Weights("flux2"),
}
"""Published files by their own names. The decoders of the two `sd-vae` differ, not the encoders."""


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
    "sdxl": Scaling(0.13025),
    "sd3": Scaling(1.5305, 0.0609),
    "flux": Scaling(0.3611, 0.1159),
    "flux2": Scaling(1.0),
    # To a standard deviation of 0.5: NVlabs/edm2, `training/encoders.py`.
    "edm2": Scaling(
        (0.5 / 4.17, 0.5 / 4.62, 0.5 / 3.71, 0.5 / 3.28),
        (5.81, 3.25, 0.12, -2.15),
    ),
}
"""The published ones, by the names of `SIZES`. Those of `edm2` are of each channel, to a standard
deviation of 0.5; those of `flux2` lie in its file."""
