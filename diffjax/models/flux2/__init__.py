"""Flux.2 (Black Forest Labs 2025): Flux with shared modulations."""

from diffjax.models.flux2.network import Flux2 as Flux2
from diffjax.models.flux2.sizes import SIZES as SIZES
