"""The layout of the authors' files (willisma/SiT): that of DiT.

A file does not show whether it is of SiT or of DiT. Time is 0 for noise and 1 for data, and is
embedded without a scale; the network predicts the velocity `data - noise`. So with the path
`Linear`, where time is 1 for noise and the velocity is `noise - data`, the noise label is `1 - t`
and the prediction has the other sign.
"""

from dataclasses import replace
from typing import Any

from diffjax.models.dit.published import FAMILY as DIT
from diffjax.models.sit.network import SiT
from diffjax.models.sit.sizes import SIZES
from diffjax.pretrained.family import Denoiser


def sit(
    image_shape: tuple[int, int, int] = (32, 32, 4),
    num_classes: int = 1000,
    out_channels: int = 8,
    **settings: Any,
) -> Denoiser:
    """A SiT with the authors' settings: latents of 256 pixels, ImageNet, twice the channels."""
    return Denoiser(SiT(num_classes, out_channels=out_channels, **settings), image_shape)


FAMILY = replace(DIT, name="SiT", network=sit, sizes=SIZES)
