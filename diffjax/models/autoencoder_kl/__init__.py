"""AutoencoderKL: the autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752)."""

from diffjax.models.autoencoder_kl.network import AutoencoderKL as AutoencoderKL
from diffjax.models.autoencoder_kl.network import AutoencoderKLFlux2 as AutoencoderKLFlux2
from diffjax.models.autoencoder_kl.network import Posterior as Posterior
from diffjax.models.autoencoder_kl.sizes import SIZES as SIZES
