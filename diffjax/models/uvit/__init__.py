"""U-ViT: a vision transformer with long skips (Bao et al. 2022, arXiv:2209.12152)."""

from diffjax.models.uvit.network import UViT as UViT
from diffjax.models.uvit.sizes import SIZES as SIZES
