"""The sizes of U-ViT (Bao et al. 2022, table 1): 44 M (S), 58 M (S deep), 131 M, 287 M, 501 M (H).

Numbers of parameters are for latents `[32, 32, 4]` and 1,000 classes. The authors' networks are for
CIFAR-10 (S/2), CelebA at 64 pixels (S/4), both without classes; ImageNet at 64 (M/4 and L/4, with
`null_row=False`); and its latents of 256 (L/2, H/2) and of 512 pixels (L/4, H/4).
"""

from collections.abc import Mapping

from diffjax.pretrained.family import Size

_WIDTHS = {
    "S": {"hidden_size": 512, "depth": 13, "num_heads": 8},
    "S-deep": {"hidden_size": 512, "depth": 17, "num_heads": 8},
    "M": {"hidden_size": 768, "depth": 17, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 21, "num_heads": 16},
    "H": {"hidden_size": 1152, "depth": 29, "num_heads": 16, "final_conv": False},
}
_NUM_PARAMETERS: Mapping[str, Mapping[int, int]] = {
    "S": {2: 44_772_516, 4: 44_723_412},
    "S-deep": {2: 58_425_508},
    "M": {4: 130_818_260},
    "L": {2: 286_763_172, 4: 286_664_916},
    "H": {2: 500_832_016, 4: 500_721_472},
}

SIZES: Mapping[str, Size] = {
    f"U-ViT-{name}/{patch_size}": Size({"patch_size": patch_size, **_WIDTHS[name]}, number)
    for name, numbers in _NUM_PARAMETERS.items()
    for patch_size, number in numbers.items()
}
