"""The published sizes of SiT (Ma et al. 2024, table 1): those of DiT with patches of 2.

The file of `SiT-XL/2` is linked from the authors' `download.py`.
"""

from collections.abc import Mapping
from dataclasses import replace

from diffjax.models.dit.sizes import SIZES as DIT
from diffjax.pretrained.family import Size

SIZES: Mapping[str, Size] = {
    f"SiT-{name}/2": replace(DIT[f"DiT-{name}/2"], address="") for name in ("S", "B", "L", "XL")
}
