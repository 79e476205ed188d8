"""EDM's networks: U-Nets of Karras et al. 2022 (arXiv:2206.00364), DDPM++, NCSN++ and ADM."""

from diffjax.models.edm.network import DhariwalUNet as DhariwalUNet
from diffjax.models.edm.network import SongUNet as SongUNet
from diffjax.models.edm.sizes import SIZES as SIZES
