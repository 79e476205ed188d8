"""Stable Diffusion: the U-Nets of Rombach et al. 2022 (arXiv:2112.10752) and of SDXL."""

from diffjax.models.stable_diffusion.network import StableDiffusionUNet as StableDiffusionUNet
from diffjax.models.stable_diffusion.sizes import SIZES as SIZES
