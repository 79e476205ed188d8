"""The published networks of DDPM, for CIFAR-10 and for images of 256 pixels (CelebA-HQ, LSUN).

Numbers of parameters are 35.7 M and 114 M in Ho et al. 2020, appendix B. That of 256 pixels has no
dropout. Weights are those of diffusers, as `google/ddpm-cifar10-32` and `google/ddpm-celebahq-256`.
"""

from collections.abc import Mapping

from diffjax.pretrained.family import Size

SIZES: Mapping[str, Size] = {
    "DDPM-CIFAR10": Size({"side": 32, "attention_levels": (1,)}, 35_746_307),
    "DDPM-256": Size(
        {
            "side": 256,
            "channel_multipliers": (1, 1, 2, 2, 4, 4),
            "attention_levels": (4,),
            "dropout": 0.0,
        },
        113_673_219,
    ),
}
