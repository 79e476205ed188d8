"""Class tokens of DINOv2 as features (Oquab et al. 2023, arXiv:2304.07193).

Fréchet distances on them agree better with human judgement than those on Inception features (Stein
et al. 2023, arXiv:2306.04675).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diffjax.data import to_uint8
from diffjax.errors import UserError
from diffjax.evaluation.extractors.features import Extractor, as_rgb, pretrained, with_params
from diffjax.models.dinov2.published import FAMILY
from diffjax.models.dinov2.sizes import SIZES, url
from diffjax.pretrained.downloads import find_weights

SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for pixels in [0, 1]


def resize(images: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Resizes images to 224x224 as dgm-eval does by default: Pillow's bicubic filter on uint8.

    The filter has antialiasing.

    Args:
        images: `[B, H, W, C]` in [-1, 1], rounded to 256 levels first; C is 1 or 3.
        size: side of the result, in pixels.

    Returns:
        `[B, size, size, 3]` uint8.

    Example:
        >>> resize(np.ones((2, 32, 32, 1), np.float32)).shape
        (2, 224, 224, 3)
    """
    levels = np.asarray(as_rgb(to_uint8(np.clip(images, -1.0, 1.0))))
    bicubic = Image.Resampling.BICUBIC
    return np.stack(
        [np.asarray(Image.fromarray(one).resize((size, size), bicubic)) for one in levels]
    )


def dinov2_features(
    weights: str = "", model: str = "vitl14", sha256: str = "", batch_size_images: int = 32
) -> Extractor:
    """Extractor of the class token of a DINOv2 network, `[N, 384]`, `[N, 768]` or `[N, 1024]`.

    Args:
        weights: path of the model's `dinov2_*_pretrain.pth`, or a URL to download it from
            (`diffjax.models.dinov2.sizes.url`).
        model: a name in `diffjax.models.dinov2.sizes.SIZES`, such as `vitl14`.
        sha256: hex digest of the file; by default that of the published one.
        batch_size_images: images per network evaluation; 32 is typical.

    Raises:
        UserError: no such model or file, another hash, weights of another network.
    """
    network = FAMILY.size(model)
    if not weights:
        raise UserError(
            f"dinov2_features needs weights: the path of dinov2_{model}_pretrain.pth, or its "
            f"URL {url(model)}"
        )
    sha256 = (sha256 or SIZES[model].sha256).lower()
    _, params = FAMILY.read(find_weights(weights, sha256), network)

    @jax.jit
    def evaluate(params: Any, levels: jax.Array) -> tuple[jax.Array, None]:
        mean, std = (jnp.array(each)[None, None, None] for each in (MEAN, STD))
        pixels = (levels.astype(jnp.float32) / 255.0 - mean) / std
        # Lower precision, the default on GPUs and TPUs, would change the features.
        with jax.default_matmul_precision("highest"):
            return network.apply({"params": params}, pixels)[:, 0], None

    return pretrained(
        f"dinov2:{model}",
        with_params(evaluate, params),
        batch_size_images,
        resize,
        architecture=f"DINOv2 {model}",
        layer="class token after the last normalisation",
        weights_sha256=sha256,
        resize="Pillow bicubic to 224x224, antialiased, on uint8 (as dgm-eval)",
        scaling="(x/255 - mean) / std of ImageNet",
        positions="bicubic, antialiased, 37x37 to 16x16"
        if network.num_registers
        else "bicubic, not antialiased, 37x37 to 16x16 in steps of 37/16.1",
        grey="repeated to three channels",
        precision="float32",
    )
