"""MMDiT: the network of Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206)."""

from diffjax.models.sd3.network import MMDiT as MMDiT
from diffjax.models.sd3.sizes import SIZES as SIZES
