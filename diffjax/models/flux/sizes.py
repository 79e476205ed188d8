"""The published sizes of Flux.1 (Black Forest Labs 2024).

Numbers of parameters are of latents of 16 channels, T5's states of width 4096 and pooled vectors of
768. Fill takes 16 channels of masked latents and 64 of a mask beside the input.
"""

from collections.abc import Mapping
from typing import Any

from diffjax.pretrained.family import Size

_WIDTHS: Mapping[str, Any] = {
    "hidden_size": 3072,
    "depth": 19,
    "single_depth": 38,
    "num_heads": 24,
    "rotary_axes": (16, 56, 56),
}

SIZES: Mapping[str, Size] = {
    "FLUX.1-dev": Size({**_WIDTHS, "embedded_guidance": 3.5, "beside_channels": 0}, 11_901_408_320),
    "FLUX.1-schnell": Size(
        {**_WIDTHS, "embedded_guidance": 0.0, "beside_channels": 0, "length": 256},
        11_891_178_560,
    ),
    "FLUX.1-Fill-dev": Size(
        {**_WIDTHS, "embedded_guidance": 30.0, "beside_channels": 80}, 11_902_391_360
    ),
}
