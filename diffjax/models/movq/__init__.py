"""MOVQ: the vector-quantised autoencoder of Kandinsky 2 (Zheng et al. 2022, arXiv:2209.09002)."""

from diffjax.models.movq.network import MOVQ as MOVQ
from diffjax.models.movq.sizes import SIZES as SIZES
