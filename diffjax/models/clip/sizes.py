"""The published sizes of CLIP's vision transformers (Radford et al. 2021, table 20) and files."""

from collections.abc import Mapping

from diffjax.pretrained.family import Size

SIZES: Mapping[str, Size] = {
    "vitb32": Size(
        {"width": 768, "depth": 12, "num_heads": 12, "num_features": 512, "grid": 7, "patch": 32},
        87_849_216,
    ),
    "vitb16": Size(
        {"width": 768, "depth": 12, "num_heads": 12, "num_features": 512, "grid": 14, "patch": 16},
        86_192_640,
    ),
    "vitl14": Size(
        {"width": 1024, "depth": 24, "num_heads": 16, "num_features": 768, "grid": 16, "patch": 14},
        303_966_208,
    ),
    "vitl14_336": Size(
        {"width": 1024, "depth": 24, "num_heads": 16, "num_features": 768, "grid": 24, "patch": 14},
        304_293_888,
        "https://huggingface.co/openai/clip-vit-large-patch14-336/resolve/main/pytorch_model.bin",
        "c6032c2e0caae3dc2d4fba35535fa6307dbb49df59c7e182b1bc4b3329b81801",
    ),
}
