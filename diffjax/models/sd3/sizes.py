"""The published sizes of Stable Diffusion 3 and 3.5 (Esser et al. 2024; Stability AI 2024).

Numbers of parameters are of latents of 16 channels, states of width 4096 and pooled vectors of
2048; the stored positions are among them, without which they are 2,028,328,000, 2,243,171,520 and
8,056,627,520.
"""

from collections.abc import Mapping

from diffjax.pretrained.family import Size

_WIDTHS = {
    "medium": {"hidden_size": 1536, "depth": 24, "num_heads": 24},
    "large": {"hidden_size": 2432, "depth": 38, "num_heads": 38},
}

SIZES: Mapping[str, Size] = {
    "SD3-Medium": Size(
        {**_WIDTHS["medium"], "qk_norm": False, "dual_blocks": 0, "stored_positions": 192},
        2_084_951_104,
    ),
    "SD3.5-Medium": Size(
        {**_WIDTHS["medium"], "qk_norm": True, "dual_blocks": 13, "stored_positions": 384},
        2_469_663_936,
    ),
    "SD3.5-Large": Size(
        {**_WIDTHS["large"], "qk_norm": True, "dual_blocks": 0, "stored_positions": 192},
        8_146_280_768,
    ),
}
