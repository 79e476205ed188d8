"""Class tokens of DINOv2 as features (Oquab et al. 2023, arXiv:2304.07193).

Fréchet distances on them agree better with human judgement than those on Inception features (Stein
et al. 2023, arXiv:2306.04675).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diffjax.data import to_uint8
from diffjax.errors import UserError
from diffjax.evaluation.extractors.features import Extractor, as_rgb, pretrained, with_params
from diffjax.kinds import Positive
from diffjax.models.dinov2.network import PATCH
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
    return _extractor(
        f"dinov2:{model}",
        model,
        (weights, sha256, batch_size_images),
        SIZE // PATCH,
        lambda tokens: tokens[:, 0],
        "class token after the last normalisation",
    )


def dinov2_patches(
    weights: str = "",
    model: str = "vitb14",
    sha256: str = "",
    batch_size_images: int = 32,
    patches_per_side: Positive[int] = 16,
) -> Extractor:
    """Extractor of the patches of a DINOv2 network, `[N, rows, columns, 384]`, 768 or 1,024.

    They are the targets of REPA (`diffjax.objectives.repa`): a row and a column for each token of
    the network that is trained, so images are resized to 14 pixels for each. REPA's authors take
    `vitb14` at 16 patches for ImageNet at 256 pixels. Two details differ: they resize images by
    PyTorch's bicubic filter without antialiasing, and positions with it; here both are as of
    `dinov2_features`.

    Args:
        weights: as in `dinov2_features`.
        model: a name in `diffjax.models.dinov2.sizes.SIZES`.
        sha256: as in `dinov2_features`.
        batch_size_images: images per network evaluation; 32 is typical.
        patches_per_side: rows and columns.

    Raises:
        UserError: as in `dinov2_features`.
    """
    return _extractor(
        f"dinov2_patches:{model}",
        model,
        (weights, sha256, batch_size_images),
        patches_per_side,
        lambda tokens: tokens[:, -(patches_per_side**2) :].reshape(
            -1, patches_per_side, patches_per_side, tokens.shape[-1]
        ),
        "patches after the last normalisation",
    )


def _extractor(
    name: str,
    model: str,
    of_file: tuple[str, str, int],
    patches_per_side: int,
    chosen: Callable[[jax.Array], jax.Array],
    layer: str,
) -> Extractor:
    weights, sha256, batch_size_images = of_file
    network = FAMILY.size(model)
    if not weights:
        raise UserError(
            f"features of DINOv2 need weights: the path of dinov2_{model}_pretrain.pth, or its "
            f"URL {url(model)}"
        )
    sha256 = (sha256 or SIZES[model].sha256).lower()
    _, params = FAMILY.read(find_weights(weights, sha256), network)
    grid, pixels = f"{patches_per_side}x{patches_per_side}", PATCH * patches_per_side

    @jax.jit
    def evaluate(params: Any, levels: jax.Array) -> tuple[jax.Array, None]:
        mean, std = (jnp.array(each)[None, None, None] for each in (MEAN, STD))
        pixels = (levels.astype(jnp.float32) / 255.0 - mean) / std
        # Lower precision, the default on GPUs and TPUs, would change the features.
        with jax.default_matmul_precision("highest"):
            return chosen(network.apply({"params": params}, pixels)), None

    return pretrained(
        name,
        with_params(evaluate, params),
        batch_size_images,
        partial(resize, size=pixels),
        architecture=f"DINOv2 {model}",
        layer=layer,
        weights_sha256=sha256,
        resize=f"Pillow bicubic to {pixels}x{pixels}, antialiased, on uint8 (as dgm-eval)",
        scaling="(x/255 - mean) / std of ImageNet",
        positions=f"bicubic, antialiased, 37x37 to {grid}"
        if network.num_registers
        else f"bicubic, not antialiased, 37x37 to {grid} in steps of 37/{patches_per_side + 0.1:g}",
        grey="repeated to three channels",
        precision="float32",
    )
