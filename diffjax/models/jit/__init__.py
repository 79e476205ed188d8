"""JiT: a transformer on large patches of pixels (Li & He 2025, arXiv:2511.13720)."""

from diffjax.models.jit.network import JiT as JiT
from diffjax.models.jit.sizes import SIZES as SIZES
