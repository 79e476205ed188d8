"""Families of denoisers by their network: what a file of published weights belongs to."""

from collections.abc import Mapping
from typing import Any

from diffjax.models.dit.network import DiT
from diffjax.models.dit.published import FAMILY as DIT
from diffjax.models.sit.network import SiT
from diffjax.models.sit.published import FAMILY as SIT
from diffjax.pretrained.family import Family

DENOISERS: Mapping[type[Any], Family] = {DiT: DIT, SiT: SIT}
