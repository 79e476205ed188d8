"""The sizes of DDT (Wang et al. 2025): 8 of 12, 20 of 24 and 22 of 28 blocks are the encoder.

Numbers of parameters are for latents `[32, 32, 4]` and 1,000 classes. `DDT-XL/2` is the published
network, with 675 M.
"""

from collections.abc import Mapping

from diffjax.models.dit.sizes import WIDTHS
from diffjax.pretrained.family import Size

_ENCODERS = {"B": 8, "L": 20, "XL": 22}
_NUM_PARAMETERS = {"B": 130_262_800, "L": 457_648_144, "XL": 674_646_352}

SIZES: Mapping[str, Size] = {
    f"DDT-{name}/2": Size(
        {"patch_size": 2, **WIDTHS[name], "encoder_depth": _ENCODERS[name]}, number
    )
    for name, number in _NUM_PARAMETERS.items()
}
