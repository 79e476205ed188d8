"""The published decoders of Kandinsky 2."""

from collections.abc import Mapping
from typing import Any

from diffjax.pretrained.family import Size

_21: dict[str, Any] = {
    "image_shape": (64, 64, 4),
    "image_width": 768,
    "text_width": 1024,
    "pooled_width": 768,
    "num_image_tokens": 10,
    "given_channels": 0,
}
_22 = {
    **_21,
    "image_width": 1280,
    "text_width": 0,
    "pooled_width": 0,
    "num_image_tokens": 32,
}
SIZES: Mapping[str, Size] = {
    "Kandinsky-2.1": Size(_21, 1_228_661_768),
    "Kandinsky-2.1-inpainting": Size({**_21, "given_channels": 5}, 1_228_679_048),
    "Kandinsky-2.2": Size(_22, 1_253_057_288),
    "Kandinsky-2.2-inpainting": Size({**_22, "given_channels": 5}, 1_253_074_568),
}
