"""DDPM: the U-Nets of Ho et al. 2020 (arXiv:2006.11239)."""

from diffjax.models.ddpm.network import DDPMUNet as DDPMUNet
from diffjax.models.ddpm.sizes import SIZES as SIZES
