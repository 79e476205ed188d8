"""LightningDiT: DiT with parts of language models (Yao et al. 2025, arXiv:2501.01423)."""

from diffjax.models.lightningdit.network import LightningDiT as LightningDiT
from diffjax.models.lightningdit.sizes import SIZES as SIZES
