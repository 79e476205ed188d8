"""The published networks of ADM, by the names of their files (README.md of the authors).

Numbers of parameters are those of the authors' code.
"""

from collections.abc import Mapping
from typing import Any

from diffjax.pretrained.family import Size

_ADDRESS = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021"
_64 = {"image_shape": (64, 64, 3), "channel_multipliers": (1, 2, 3, 4)}
_128 = {"image_shape": (128, 128, 3), "channel_multipliers": (1, 1, 2, 3, 4)}
_256 = {"image_shape": (256, 256, 3), "channel_multipliers": (1, 1, 2, 2, 4, 4)}
_512 = {
    "image_shape": (512, 512, 3),
    "channel_multipliers": (0.5, 1, 1, 2, 2, 4, 4),
    "first_multiplier": 0.5,
}


def _size(name: str, num_parameters: int, **settings: Any) -> Size:
    return Size(settings, num_parameters, f"{_ADDRESS}/{name}.pt")


SIZES: Mapping[str, Size] = {
    "ADM-64": _size(
        "64x64_diffusion",
        295_904_454,
        **_64,
        channels=192,
        num_res_blocks=3,
        dropout=0.1,
        qkv_order="parts",
    ),
    "ADM-128": _size("128x128_diffusion", 421_529_606, **_128, num_heads=4),
    "ADM-256": _size("256x256_diffusion", 553_838_086, **_256),
    "ADM-256-unconditional": _size("256x256_diffusion_uncond", 552_814_086, **_256, num_classes=0),
    "ADM-512": _size("512x512_diffusion", 558_997_638, **_512),
}
UPSAMPLERS: Mapping[str, Size] = {
    "ADM-64-to-256": _size("64_256_upsampler", 311_795_910, **_256, channels=192, num_heads=4),
    "ADM-128-to-512": _size(
        "128_512_upsampler",
        308_835_270,
        image_shape=(512, 512, 3),
        channel_multipliers=(1, 1, 2, 2, 4, 4),
        channels=192,
        attention_resolutions=(32, 16),
    ),
}
CLASSIFIERS: Mapping[str, Size] = {
    "ADM-classifier-64": _size("64x64_classifier", 65_438_568, **_64, num_res_blocks=4),
    "ADM-classifier-128": _size("128x128_classifier", 42_568_040, **_128),
    "ADM-classifier-256": _size("256x256_classifier", 54_096_360, **_256),
    "ADM-classifier-512": _size("512x512_classifier", 54_448_360, **_512),
}
