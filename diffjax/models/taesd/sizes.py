"""The published autoencoders, by the name of their files."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# Parameters of encoder and decoder: 1,222,532 and 1,222,531 (taesd, taesdxl), 1,229,456 and
# 1,229,443 (taesd3, taef1), 1,338,528 and 1,338,499 (taef2).
SIZES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "taesd": {"latent_channels": 4},  # of Stable Diffusion 1 and 2
        "taesdxl": {"latent_channels": 4},
        "taesd3": {"latent_channels": 16},
        "taef1": {"latent_channels": 16},  # of FLUX.1
        "taef2": {"latent_channels": 32, "pooled": True},  # of FLUX.2
    }
)
