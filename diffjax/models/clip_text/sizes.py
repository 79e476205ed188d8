"""The sizes of published text encoders of CLIP.

Radford et al. 2021, table 20; Cherti et al. 2022 for H and bigG. Counts are without a projection
where the size has no `num_features`, as in Stable Diffusion 1 and in Flux.
"""

from collections.abc import Mapping

from diffjax.pretrained.family import Size

SIZES: Mapping[str, Size] = {
    "clip-l": Size({"width": 768, "depth": 12, "num_heads": 12}, 123_060_480),
    "clip-b32": Size({"width": 512, "depth": 12, "num_heads": 8}, 63_165_952),
    "clip-h": Size(
        {"width": 1024, "depth": 24, "num_heads": 16, "activation": "gelu"}, 352_984_064
    ),
    # In folders of Stable Diffusion 2, without the last block, which it does not use.
    "clip-h-23": Size(
        {"width": 1024, "depth": 23, "num_heads": 16, "activation": "gelu"}, 340_387_840
    ),
    "clip-bigg": Size(
        {
            "width": 1280,
            "depth": 32,
            "num_heads": 20,
            "num_features": 1280,
            "activation": "gelu",
        },
        694_659_840,
    ),
}
