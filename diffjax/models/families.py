"""Families of denoisers by their network, to find the family of a file of published weights."""

from collections.abc import Mapping
from typing import Any

from diffjax.models.dit.network import DiT
from diffjax.models.dit.published import FAMILY as DIT
from diffjax.models.edm2.network import EDM2
from diffjax.models.edm2.published import FAMILY as EDM2_FAMILY
from diffjax.models.sit.network import SiT
from diffjax.models.sit.published import FAMILY as SIT
from diffjax.pretrained.family import Family

DENOISERS: Mapping[type[Any], Family] = {DiT: DIT, SiT: SIT, EDM2: EDM2_FAMILY}
