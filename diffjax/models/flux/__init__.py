"""Flux.1 and Flux.2 (Black Forest Labs 2024 and 2025): MMDiT, with blocks over one sequence."""

from diffjax.models.flux.network import Flux as Flux
from diffjax.models.flux.sizes import SIZES as SIZES
