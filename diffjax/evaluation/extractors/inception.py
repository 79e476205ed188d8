"""Features of the Inception network of FID, KID, sFID and the Inception score."""

from functools import partial
from typing import Any

import jax

from diffjax.compiling import jit
from diffjax.errors import UserError, nearest
from diffjax.evaluation.extractors.features import Extractor, as_rgb, pretrained, with_params
from diffjax.models.inception.network import SIZE, InceptionV3, Layers
from diffjax.models.inception.published import FAMILY
from diffjax.models.inception.sizes import SIZES
from diffjax.pretrained.downloads import find_weights

_PUBLISHED = SIZES["2015-12-05"]


def resize(images: jax.Array) -> jax.Array:
    """Resizes images to 299x299 as in pytorch-fid: bilinear, half-pixel centres, no antialiasing.

    Pixel i is interpolated at `(i + 1/2) old/299 - 1/2`; larger images are sampled, not averaged.
    TensorFlow 1 and torch-fidelity use `i old/299` instead, which changes the features.

    Args:
        images: `[B, H, W, C]`.

    Example:
        >>> import jax.numpy as jnp
        >>> resize(jnp.ones((2, 32, 32, 3))).shape
        (2, 299, 299, 3)
    """
    batch, _, _, channels = images.shape
    return jax.image.resize(images, (batch, SIZE, SIZE, channels), "linear", antialias=False)


def inception_features(
    weights: str = "",
    layer: str = "pool",
    sha256: str = _PUBLISHED.sha256,
    batch_size_images: int = 32,
) -> Extractor:
    """Extractor of the FID Inception network: with `layer="pool"` distances are FID and KID.

    It returns the logits with every layer, so that the Inception score is always available. Their
    1008 classes are not the labels of the data, so there is no accuracy.

    Args:
        weights: path of `pt_inception-2015-12-05-6726825d.pth`, or a URL to download it from
            (`diffjax.models.inception.sizes.SIZES`).
        layer: `"pool"` (FID, KID), `"spatial"` (sFID), `"middle"` or `"logits"`; see
            `diffjax.models.inception.network.Layers`.
        sha256: hex digest of that file; change it to use another file.
        batch_size_images: images per network evaluation; 32 is typical.

    Raises:
        UserError: no such layer or file, another hash, weights of another network.
    """
    if layer not in Layers._fields:
        raise UserError(f"inception has no layer {layer!r}; {nearest(layer, Layers._fields)}")
    if not weights:
        raise UserError(
            "inception_features needs weights: the path of pt_inception-2015-12-05-6726825d.pth, "
            f"or its URL {_PUBLISHED.address}"
        )
    _, params = FAMILY.read(find_weights(weights, sha256))

    @partial(jit, static_argnames="layer")
    def evaluate(params: Any, images: jax.Array, layer: str) -> tuple[jax.Array, jax.Array]:
        # Lower precision, the default on GPUs and TPUs, would change the features.
        with jax.default_matmul_precision("highest"):
            layers: Any = InceptionV3().apply({"params": params}, resize(as_rgb(images)))
        return getattr(layers, layer), layers.logits

    return pretrained(
        f"inception:{layer}",
        with_params(partial(evaluate, layer=layer), params),
        batch_size_images,
        architecture="FID InceptionV3 (inception-2015-12-05)",
        layer=layer,
        weights_sha256=sha256.lower(),
        resize="bilinear to 299x299, half-pixel centres, no antialiasing (as pytorch-fid)",
        scaling="2 x/255 - 1",
        grey="repeated to three channels",
        precision="float32",
    )
