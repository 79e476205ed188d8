"""CLIP's image embeddings as features (Radford et al. 2021, arXiv:2103.00020).

A kernel distance on them is CMMD (Jayasumana et al. 2024, arXiv:2401.09603), which uses the
vision transformer L/14 at 336 pixels.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.errors import UserError
from diffjax.evaluation.extractors import dinov2
from diffjax.evaluation.extractors.features import Extractor, pretrained, with_params
from diffjax.models.clip.published import FAMILY
from diffjax.models.clip.sizes import SIZES
from diffjax.pretrained.downloads import find_weights

SIZE = 336
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, for pixels in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
_PUBLISHED = SIZES["vitl14_336"]


def resize(images: np.ndarray) -> np.ndarray:
    """Resizes images to 336x336 as in CMMD's own code.

    It crops the central square and applies Pillow's bicubic filter with antialiasing, on uint8.

    Args:
        images: `[B, H, W, C]` in [-1, 1], rounded to 256 levels first; C is 1 or 3.

    Returns:
        `[B, 336, 336, 3]` uint8.

    Example:
        >>> resize(np.ones((2, 32, 40, 1), np.float32)).shape
        (2, 336, 336, 3)
    """
    _, height, width, _ = images.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return dinov2.resize(images[:, top : top + side, left : left + side], SIZE)


def clip_features(
    weights: str = "", sha256: str = _PUBLISHED.sha256, batch_size_images: int = 32
) -> Extractor:
    """Extractor of image embeddings of CLIP ViT-L/14 at 336 pixels, `[N, 768]`, for CMMD.

    The embeddings have length 1.

    Args:
        weights: path of the `pytorch_model.bin` of `openai/clip-vit-large-patch14-336`, or of its
            weights as safetensors, or a URL to download one from
            (`diffjax.models.clip.sizes.SIZES`).
        sha256: hex digest of that file; change it to use another file.
        batch_size_images: images per network evaluation; 32 is typical.

    Raises:
        UserError: no such file, another hash, weights of another network.
    """
    if not weights:
        raise UserError(
            "clip_features needs weights: the path of the pytorch_model.bin of "
            f"openai/clip-vit-large-patch14-336, or its URL {_PUBLISHED.address}"
        )
    network = FAMILY.size("vitl14_336")
    _, params = FAMILY.read(find_weights(weights, sha256), network)

    @jax.jit
    def encode(params: Any, levels: jax.Array) -> tuple[jax.Array, None]:
        mean, std = (jnp.array(each)[None, None, None] for each in (MEAN, STD))
        pixels = (levels.astype(jnp.float32) / 255.0 - mean) / std
        # Lower precision, the default on GPUs and TPUs, would change the features.
        with jax.default_matmul_precision("highest"):
            return network.apply({"params": params}, pixels), None

    extractor = pretrained(
        "clip:vitl14_336",
        with_params(encode, params),
        batch_size_images,
        resize,
        architecture="CLIP ViT-L/14 at 336 pixels",
        layer="image embedding, divided by its length",
        weights_sha256=sha256.lower(),
        resize="middle square, Pillow bicubic to 336x336, antialiased, on uint8 (as cmmd)",
        scaling="(x/255 - mean) / std of CLIP",
        grey="repeated to three channels",
        precision="float32",
    )
    return replace(extractor, for_cmmd=True)
