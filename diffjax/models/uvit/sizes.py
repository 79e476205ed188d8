"""The sizes of U-ViT (Bao et al. 2022, table 1): 44 M (S), 58 M (S deep), 131 M, 287 M, 501 M (H).

Numbers of parameters are for the authors' data sets: CIFAR-10 (S/2), CelebA at 64 pixels (S/4),
ImageNet at 64 (M/4 and L/4, without a null label), and its latents of 256 pixels (L/2 and H/2).
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
    "S": {2: 0, 4: 0},
    "S-deep": {2: 0},
    "M": {4: 0},
    "L": {2: 0, 4: 0},
    "H": {2: 0, 4: 0},
}

SIZES: Mapping[str, Size] = {
    f"U-ViT-{name}/{patch_size}": Size({"patch_size": patch_size, **_WIDTHS[name]}, number)
    for name, numbers in _NUM_PARAMETERS.items()
    for patch_size, number in numbers.items()
}
