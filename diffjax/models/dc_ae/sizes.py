"""The published DC-AEs, and how their latents are scaled.

Those of a name with `in` are of ImageNet, `mix` of several data sets, `sana` of Sana.
"""

from collections.abc import Mapping

from diffjax.pretrained.family import Size

_HUB = "https://huggingface.co/mit-han-lab"


def _size(
    name: str, num_parameters: int, latent_channels: int, *further: int, **how: object
) -> Size:
    """By the channels of the levels further than the first five."""
    levels = 5 + len(further)
    settings = {
        "latent_channels": latent_channels,
        "channels": (128, 256, 512, 512, 1024, *further),
        "encoder_blocks": (0, 4, 8, *(2,) * (levels - 3)),
        "decoder_blocks": (0, 5, 10, *(2,) * (levels - 3)),
        "attention_levels": tuple(range(3, levels)),
        "kernel_sizes": (),
        "batch_norm": True,
        "shuffle": True,
        **how,
    }
    address = f"{_HUB}/{name}-diffusers/resolve/main/diffusion_pytorch_model.safetensors"
    return Size(settings, num_parameters, address)


_F32 = 323_369_260, 32, 1024
_F64 = 676_908_940, 128, 1024, 2048
_F128 = 1_120_695_052, 512, 1024, 2048, 2048
_SANA = {
    "encoder_blocks": (2, 2, 2, 3, 3, 3),
    "decoder_blocks": (3, 3, 3, 3, 3, 3),
    "kernel_sizes": (5,),
    "batch_norm": False,
    "shuffle": False,
}

SIZES: Mapping[str, Size] = {
    name: _size(name, *numbers)
    for numbers, names in (
        (_F32, ("dc-ae-f32c32-in-1.0", "dc-ae-f32c32-mix-1.0")),
        (_F64, ("dc-ae-f64c128-in-1.0", "dc-ae-f64c128-mix-1.0")),
        (_F128, ("dc-ae-f128c512-in-1.0", "dc-ae-f128c512-mix-1.0")),
    )
    for name in names
} | {
    name: _size(name, 312_250_275, 32, 1024, **_SANA)
    for name in ("dc-ae-f32c32-sana-1.0", "dc-ae-f32c32-sana-1.1")
}
"""By the names of the authors' files; weights of `in` and `mix` differ, their networks do not."""

SCALES: Mapping[str, float] = {
    "dc-ae-f32c32-in-1.0": 0.3189,
    "dc-ae-f32c32-mix-1.0": 0.4552,
    "dc-ae-f64c128-in-1.0": 0.2889,
    "dc-ae-f64c128-mix-1.0": 0.4538,
    "dc-ae-f128c512-in-1.0": 0.4883,
    "dc-ae-f128c512-mix-1.0": 0.3620,
    "dc-ae-f32c32-sana-1.0": 0.41407,
    "dc-ae-f32c32-sana-1.1": 0.41407,
}
"""What latents are multiplied by for models that are trained on them, to a deviation of about 1."""
