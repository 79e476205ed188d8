"""ADM: U-Nets of Dhariwal & Nichol 2021 (arXiv:2105.05233), with upsamplers and classifiers."""

from diffjax.models.adm.network import ADM as ADM
from diffjax.models.adm.sizes import SIZES as SIZES
