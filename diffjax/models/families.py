"""Families of denoisers by their network, to find the family of a file of published weights."""

from collections.abc import Mapping
from typing import Any

from diffjax.models.ddt.network import DDT
from diffjax.models.ddt.published import FAMILY as DDT_FAMILY
from diffjax.models.dit.network import DiT
from diffjax.models.dit.published import FAMILY as DIT_FAMILY
from diffjax.models.jit.network import JiT
from diffjax.models.jit.published import FAMILY as JIT_FAMILY
from diffjax.models.lightningdit.network import LightningDiT
from diffjax.models.lightningdit.published import FAMILY as LIGHTNINGDIT_FAMILY
from diffjax.models.sit.network import SiT
from diffjax.models.sit.published import FAMILY as SIT_FAMILY
from diffjax.models.uvit.network import UViT
from diffjax.models.uvit.published import FAMILY as UVIT_FAMILY
from diffjax.pretrained.family import Family

DENOISERS: Mapping[type[Any], Family] = {
    DiT: DIT_FAMILY,
    SiT: SIT_FAMILY,
    LightningDiT: LIGHTNINGDIT_FAMILY,
    JiT: JIT_FAMILY,
    DDT: DDT_FAMILY,
    UViT: UVIT_FAMILY,
}
