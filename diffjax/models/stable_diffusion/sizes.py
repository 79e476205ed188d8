"""The published networks of Stable Diffusion.

Numbers of parameters are those of the public files: 859,520,964 for 1.x, 865,910,724 for 2.x and
2,567,463,684 for SDXL. What they were trained to predict differs within a size: 2.1 at 768 pixels
predicts v, the others the noise.
"""

from collections.abc import Mapping
from typing import Any

from diffjax.models.unet import Transformers
from diffjax.pretrained.family import Size

_COMMON: dict[str, Any] = {"channels": 320, "num_res_blocks": 2, "given_channels": 0}
_FOUR = {"channel_multipliers": (1, 2, 4, 4), "transformers": Transformers((1, 1, 1, 0))}
_LATER = {"num_heads": 0, "linear_projection": True}
_SD1 = {
    **_COMMON,
    **_FOUR,
    "image_shape": (64, 64, 4),
    "context_width": 768,
    "num_heads": 8,
    "linear_projection": False,
}
_SD2 = {**_COMMON, **_FOUR, **_LATER, "image_shape": (96, 96, 4), "context_width": 1024}
_SDXL = {
    **_COMMON,
    **_LATER,
    "image_shape": (128, 128, 4),
    "context_width": 2048,
    "channel_multipliers": (1, 2, 4),
    "transformers": Transformers((0, 2, 10), 10),
    "added_features": 2816,
    "num_numbers": 6,
}
SIZES: Mapping[str, Size] = {
    "SD1": Size(_SD1, 859_520_964),
    "SD1-inpainting": Size({**_SD1, "given_channels": 5}, 859_535_364),
    "SD2": Size(_SD2, 865_910_724),
    "SD2-inpainting": Size({**_SD2, "image_shape": (64, 64, 4), "given_channels": 5}, 865_925_124),
    "SDXL": Size(_SDXL, 2_567_463_684),
    "SDXL-inpainting": Size({**_SDXL, "given_channels": 5}, 2_567_478_084),
    "SDXL-refiner": Size(
        {
            **_SDXL,
            "context_width": 1280,
            "channels": 384,
            "channel_multipliers": (1, 2, 4, 4),
            "transformers": Transformers((0, 4, 4, 0), 4),
            "added_features": 2560,
            "num_numbers": 5,
        },
        2_259_526_660,
    ),
}
