"""DDT: the decoupled diffusion transformer (Wang et al. 2025, arXiv:2504.05741)."""

from diffjax.models.ddt.network import DDT as DDT
from diffjax.models.ddt.sizes import SIZES as SIZES
