"""The published RAEs of DINOv2 with registers, all with a decoder of one size.

That for images of 512 pixels is left out, and those whose encoder is SigLIP 2 or MAE.
"""

from collections.abc import Mapping

from diffjax.pretrained.family import Size

_HUB = "https://huggingface.co/nyu-visionx"


def _size(name: str, width: int, depth: int, num_parameters: int) -> Size:
    settings = {"encoder_width": width, "encoder_depth": depth, "num_heads": 16}
    address = f"{_HUB}/{name}/resolve/main/diffusion_pytorch_model.safetensors"
    return Size(settings, num_parameters, address)


SIZES: Mapping[str, Size] = {
    name: _size(name, *numbers)
    for name, numbers in {
        "RAE-dinov2-wReg-base-ViTXL-n08": (768, 12, 502_031_104),
        "RAE-dinov2-wReg-small-ViTXL-n08": (384, 12, 436_867_840),
        "RAE-dinov2-wReg-large-ViTXL-n08": (1024, 24, 720_245_504),
    }.items()
}
"""By the names of the authors' folders."""
