"""Families of denoisers by their network, to find the family of a file of published weights."""

from collections.abc import Mapping
from typing import Any

from diffjax.models.adm.network import ADM, ADMUpsampler
from diffjax.models.adm.published import FAMILY as ADM_FAMILY
from diffjax.models.adm.published import UPSAMPLER
from diffjax.models.dit.network import DiT
from diffjax.models.dit.published import FAMILY as DIT
from diffjax.models.edm.network import DhariwalUNet, SongUNet
from diffjax.models.edm.published import DHARIWAL
from diffjax.models.edm.published import FAMILY as SONG
from diffjax.models.sit.network import SiT
from diffjax.models.sit.published import FAMILY as SIT
from diffjax.pretrained.family import Family

DENOISERS: Mapping[type[Any], Family] = {
    ADM: ADM_FAMILY,
    ADMUpsampler: UPSAMPLER,
    DhariwalUNet: DHARIWAL,
    DiT: DIT,
    SiT: SIT,
    SongUNet: SONG,
}
