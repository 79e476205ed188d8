"""DiT: the diffusion transformer (Peebles & Xie 2022, arXiv:2212.09748)."""

from diffjax.models.dit.network import DiT as DiT
from diffjax.models.dit.sizes import SIZES as SIZES
