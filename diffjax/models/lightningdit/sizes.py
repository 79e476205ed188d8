"""The sizes of LightningDiT in the authors' code (`models/lightningdit.py`).

Numbers of parameters are for latents `[16, 16, 32]` and 1,000 classes. The authors' code counts the
fixed position embeddings too. The paper's network is `LightningDiT-XL/1`, with 675 M.
"""

from collections.abc import Mapping

from diffjax.pretrained.family import Size

_WIDTHS = {
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
    "1p0B": {"hidden_size": 1536, "depth": 24, "num_heads": 24},
    "1p6B": {"hidden_size": 1792, "depth": 28, "num_heads": 28},
}
_NUM_PARAMETERS: Mapping[str, Mapping[int, int]] = {
    "B": {1: 130_359_584, 2: 130_507_136},
    "L": {2: 458_087_520},
    "XL": {1: 674_961_824, 2: 675_183_104},
    "1p0B": {1: 1_029_007_904, 2: 1_029_302_912},
    "1p6B": {1: 1_631_308_368, 2: 1_631_652_528},
}

SIZES: Mapping[str, Size] = {
    f"LightningDiT-{name}/{patch_size}": Size({"patch_size": patch_size, **_WIDTHS[name]}, number)
    for name, numbers in _NUM_PARAMETERS.items()
    for patch_size, number in numbers.items()
}
