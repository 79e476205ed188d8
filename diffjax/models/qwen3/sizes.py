"""The published sizes of Qwen3; the layer of the next token's probabilities is not counted.

In 4B and smaller ones it is the table of tokens. Flux.2 Klein reads 4B and 8B.
"""

from collections.abc import Mapping
from typing import Any

from diffjax.pretrained.family import Size


def _size(width: int, depth: int, num_heads: int, mlp_width: int) -> dict[str, Any]:
    return {"width": width, "depth": depth, "num_heads": num_heads, "mlp_width": mlp_width}


SIZES: Mapping[str, Size] = {
    "Qwen3-0.6B": Size(_size(1024, 28, 16, 3072), 596_049_920),
    "Qwen3-4B": Size(_size(2560, 36, 32, 9728), 4_022_468_096),
    "Qwen3-8B": Size(_size(4096, 36, 32, 12_288), 7_568_405_504),
}
