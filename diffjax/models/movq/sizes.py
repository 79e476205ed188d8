"""The published MOVQ."""

from collections.abc import Mapping

from diffjax.pretrained.family import Size

SIZES: Mapping[str, Size] = {
    "movq": Size(
        {},
        67_832_495,
        "https://huggingface.co/kandinsky-community/kandinsky-2-2-decoder/resolve/main/movq/"
        "diffusion_pytorch_model.safetensors",
    )
}
"""Kandinsky 2.1 and 2.2 have the same one."""
