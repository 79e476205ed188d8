"""The published sizes of DiT (Peebles & Xie 2022, table 1): `DiT(10, **SIZES["DiT-S/2"].settings)`.

Numbers of parameters are for latents `[32, 32, 4]`, 1,000 classes and learned variance. The
authors' code counts the fixed position embeddings too: 256·1152 more in `DiT-XL/2`.
"""

from collections.abc import Mapping

from diffjax.pretrained.family import Size

WIDTHS = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}
_NUM_PARAMETERS = {
    "S": {2: 32_865_056, 4: 32_920_448, 8: 33_142_016},
    "B": {2: 130_315_808, 4: 130_426_496, 8: 130_869_248},
    "L": {2: 457_840_672, 4: 457_988_224, 8: 458_578_432},
    "XL": {2: 674_834_720, 4: 675_000_704, 8: 675_664_640},
}
_ADDRESSES = {"DiT-XL/2": "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt"}

SIZES: Mapping[str, Size] = {
    f"DiT-{name}/{patch_size}": Size(
        {"patch_size": patch_size, **widths},
        _NUM_PARAMETERS[name][patch_size],
        _ADDRESSES.get(f"DiT-{name}/{patch_size}", ""),
    )
    for name, widths in WIDTHS.items()
    for patch_size in (2, 4, 8)
}
