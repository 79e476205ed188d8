"""The published networks of EDM, by the names of their files (README.md of the authors).

`vp` is DDPM++, `ve` NCSN++ and `adm` ADM; all are of EDM's preconditioning. The networks of AFHQ
are those of FFHQ, trained with a dropout of 0.25, which a file does not show. Numbers of parameters
are those of the authors' code, with the random frequencies of NCSN++, which it does not count.
"""

from collections.abc import Mapping
from typing import Any

from diffjax.models.edm.network import NCSNPP
from diffjax.pretrained.family import Size

_ADDRESS = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained"
_CIFAR = {"image_shape": (32, 32, 3), "num_classes": 10}
_CIFAR_ALONE = {"image_shape": (32, 32, 3), "num_classes": 0}
_IMAGENET = {"image_shape": (64, 64, 3), "num_classes": 1000}
_FACES = {
    "image_shape": (64, 64, 3),
    "num_classes": 0,
    "channel_multipliers": (1, 2, 2, 2),
    "dropout": 0.05,
}


def _size(name: str, num_parameters: int, settings: Mapping[str, Any], **more: Any) -> Size:
    return Size({**settings, **more}, num_parameters, f"{_ADDRESS}/{name}.pkl")


def _sizes(*sizes: tuple[str, int, Mapping[str, Any], Mapping[str, Any]]) -> dict[str, Size]:
    return {name: _size(name, number, settings, **more) for name, number, settings, more in sizes}


SIZES: Mapping[str, Size] = _sizes(
    ("edm-cifar10-32x32-cond-vp", 55_735_299, _CIFAR, {}),
    ("edm-cifar10-32x32-uncond-vp", 55_733_891, _CIFAR_ALONE, {}),
    ("edm-cifar10-32x32-cond-ve", 56_400_771, _CIFAR, NCSNPP),
    ("edm-cifar10-32x32-uncond-ve", 56_397_955, _CIFAR_ALONE, NCSNPP),
    ("edm-ffhq-64x64-uncond-vp", 61_805_571, _FACES, {}),
    ("edm-ffhq-64x64-uncond-ve", 62_761_219, _FACES, NCSNPP),
    ("edm-afhqv2-64x64-uncond-vp", 61_805_571, _FACES, {}),
    ("edm-afhqv2-64x64-uncond-ve", 62_761_219, _FACES, NCSNPP),
)
OF_ADM: Mapping[str, Size] = _sizes(
    (
        "edm-imagenet-64x64-cond-adm",
        295_899_267,
        {"image_shape": (64, 64, 3), "num_classes": 1000},
        {},
    ),
)
