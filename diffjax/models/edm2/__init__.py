"""EDM2: the magnitude-preserving U-Net of Karras et al. 2024 (arXiv:2312.02696)."""

from diffjax.models.edm2.network import EDM2 as EDM2
from diffjax.models.edm2.sizes import SIZES as SIZES
