"""unCLIP's prior: a diffusion model of CLIP's image embeddings (Ramesh et al. 2022)."""

from diffjax.models.unclip.network import UnclipPrior as UnclipPrior
from diffjax.models.unclip.sizes import SIZES as SIZES
