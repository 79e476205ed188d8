"""The published priors."""

from collections.abc import Mapping
from typing import Any

from diffjax.pretrained.family import Size

_COMMON: dict[str, Any] = {"width": 2048, "depth": 20, "num_heads": 32, "length": 77}
SIZES: Mapping[str, Size] = {
    "Kandinsky-2.1-prior": Size({**_COMMON, "features": 768}, 1_022_030_080),
    "Kandinsky-2.2-prior": Size({**_COMMON, "features": 1280}, 1_026_225_920),
}
"""With the embeddings of CLIP L (2.1) and of OpenCLIP bigG (2.2)."""
