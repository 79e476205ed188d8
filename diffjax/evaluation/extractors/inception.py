"""The Inception network that defines FID, KID, sFID and the Inception score.

It is the network of the TensorFlow graph `inception-2015-12-05`, which differs from the published
Inception v3 (Szegedy et al. 2015, arXiv:1512.00567) in its pooling: averages exclude the padding,
and the last block uses a maximum. Parameters have the names of the PyTorch file of pytorch-fid
and torch-fidelity. The network is only for inference.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffjax.compiling import jit
from diffjax.errors import UserError, nearest
from diffjax.evaluation.extractors.features import (
    Extractor,
    as_rgb,
    check_shapes,
    pretrained,
    with_params,
)
from diffjax.pretrained.downloads import read_weights
from diffjax.pretrained.torch_files import StateDict, read_state_dict

URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIZE = 299
_BATCH_NORM_EPSILON = 1e-3
_SPATIAL_CHANNELS = 7


class Layers(NamedTuple):
    """Features of a batch of images at several layers.

    Attributes:
        pool: `[B, 2048]`, means of the last block over all positions, for FID and KID.
        spatial: `[B, 2023]`, seven channels of the last but one block with 17x17 positions
            (`Mixed_6d`), for sFID (Nash et al. 2021, arXiv:2103.03841) as computed since
            Dhariwal & Nichol 2021.
        middle: `[B, 768]`, means of the last block with 17x17 positions (`Mixed_6e`).
        logits: `[B, 1008]` without their bias, for the Inception score (Salimans et al. 2016,
            arXiv:1606.03498).
    """

    pool: jax.Array
    spatial: jax.Array
    middle: jax.Array
    logits: jax.Array


class InceptionV3(nn.Module):
    """The Inception network, with batch normalisation folded into convolutions (see `convert`)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> Layers:
        """Computes the features of images.

        Args:
            x: `[B, 299, 299, 3]` in [-1, 1].
        """
        x = _conv(x, "Conv2d_1a_3x3", 32, (3, 3), stride=2)
        x = _conv(x, "Conv2d_2a_3x3", 32, (3, 3), padding="VALID")
        x = _shrink(_conv(x, "Conv2d_2b_3x3", 64, (3, 3)))
        x = _conv(x, "Conv2d_3b_1x1", 80)
        x = _shrink(_conv(x, "Conv2d_4a_3x3", 192, (3, 3), padding="VALID"))
        x = InceptionA(32, name="Mixed_5b")(x)
        x = InceptionA(64, name="Mixed_5c")(x)
        x = InceptionA(64, name="Mixed_5d")(x)
        x = InceptionB(name="Mixed_6a")(x)
        x = InceptionC(128, name="Mixed_6b")(x)
        x = InceptionC(160, name="Mixed_6c")(x)
        x = InceptionC(160, name="Mixed_6d")(x)
        spatial = x[..., :_SPATIAL_CHANNELS].reshape(len(x), -1)
        x = InceptionC(192, name="Mixed_6e")(x)
        middle = x.mean((1, 2))
        x = InceptionD(name="Mixed_7a")(x)
        x = InceptionE(_average, name="Mixed_7b")(x)
        x = InceptionE(_maximum, name="Mixed_7c")(x)
        pool = x.mean((1, 2))
        return Layers(pool, spatial, middle, nn.Dense(1008, use_bias=False, name="fc")(pool))


class InceptionA(nn.Module):
    """Inception block with branches 1x1, 5x5, twice 3x3, and a mean of `pool_features` channels."""

    pool_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = _conv(x, "branch1x1", 64)
        five = _conv(x, "branch5x5_1", 48)
        five = _conv(five, "branch5x5_2", 64, (5, 5))
        double = _conv(x, "branch3x3dbl_1", 64)
        double = _conv(double, "branch3x3dbl_2", 96, (3, 3))
        double = _conv(double, "branch3x3dbl_3", 96, (3, 3))
        pool = _conv(_average(x), "branch_pool", self.pool_features)
        return jnp.concatenate([one, five, double, pool], -1)


class InceptionB(nn.Module):
    """Reduction block from 35x35 to 17x17 positions."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = _conv(x, "branch3x3", 384, (3, 3), stride=2)
        double = _conv(x, "branch3x3dbl_1", 64)
        double = _conv(double, "branch3x3dbl_2", 96, (3, 3))
        double = _conv(double, "branch3x3dbl_3", 96, (3, 3), stride=2)
        return jnp.concatenate([three, double, _shrink(x)], -1)


class InceptionC(nn.Module):
    """Inception block with branches of 1x7 and 7x1 convolutions, which have `width` channels."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = _conv(x, "branch1x1", 192)
        seven = _conv(x, "branch7x7_1", self.width)
        seven = _conv(seven, "branch7x7_2", self.width, (1, 7))
        seven = _conv(seven, "branch7x7_3", 192, (7, 1))
        double = _conv(x, "branch7x7dbl_1", self.width)
        double = _conv(double, "branch7x7dbl_2", self.width, (7, 1))
        double = _conv(double, "branch7x7dbl_3", self.width, (1, 7))
        double = _conv(double, "branch7x7dbl_4", self.width, (7, 1))
        double = _conv(double, "branch7x7dbl_5", 192, (1, 7))
        pool = _conv(_average(x), "branch_pool", 192)
        return jnp.concatenate([one, seven, double, pool], -1)


class InceptionD(nn.Module):
    """Reduction block from 17x17 to 8x8 positions."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = _conv(x, "branch3x3_1", 192)
        three = _conv(three, "branch3x3_2", 320, (3, 3), stride=2)
        seven = _conv(x, "branch7x7x3_1", 192)
        seven = _conv(seven, "branch7x7x3_2", 192, (1, 7))
        seven = _conv(seven, "branch7x7x3_3", 192, (7, 1))
        seven = _conv(seven, "branch7x7x3_4", 192, (3, 3), stride=2)
        return jnp.concatenate([three, seven, _shrink(x)], -1)


class InceptionE(nn.Module):
    """Inception block with branches that split into 1x3 and 3x1; `pool` is a mean or a maximum."""

    pool: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = _conv(x, "branch1x1", 320)
        three = _conv(x, "branch3x3_1", 384)
        wide, high = (
            _conv(three, "branch3x3_2a", 384, (1, 3)),
            _conv(three, "branch3x3_2b", 384, (3, 1)),
        )
        double = _conv(x, "branch3x3dbl_1", 448)
        double = _conv(double, "branch3x3dbl_2", 384, (3, 3))
        wide_2, high_2 = (
            _conv(double, "branch3x3dbl_3a", 384, (1, 3)),
            _conv(double, "branch3x3dbl_3b", 384, (3, 1)),
        )
        pool = _conv(self.pool(x), "branch_pool", 192)
        return jnp.concatenate([one, wide, high, wide_2, high_2, pool], -1)


def resize(images: jax.Array) -> jax.Array:
    """Resizes images to 299x299 as in pytorch-fid: bilinear, half-pixel centres, no antialiasing.

    Pixel i is interpolated at `(i + 1/2) old/299 - 1/2`; larger images are sampled, not averaged.
    TensorFlow 1 and torch-fidelity use `i old/299` instead, which changes the features.

    Args:
        images: `[B, H, W, C]`.

    Example:
        >>> resize(jnp.ones((2, 32, 32, 3))).shape
        (2, 299, 299, 3)
    """
    batch, _, _, channels = images.shape
    return jax.image.resize(images, (batch, SIZE, SIZE, channels), "linear", antialias=False)


def convert(state: StateDict) -> Any:
    """Converts parameters to those of `InceptionV3`; batch normalisation is folded in.

        w' = w·γ/√(v + ε),  b' = β - m·γ/√(v + ε),  ε = 0.001

    computed in float64 before rounding to float32.

    Args:
        state: tensors of the PyTorch network.

    Raises:
        UserError: weights are missing, superfluous, or have other shapes.
    """
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    expected = jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"]
    params = _converted(state, expected, "")
    check_shapes(params, expected, state.name)
    state.check_empty(
        lambda key: (
            key == "fc.bias" or key.endswith("num_batches_tracked") or key.startswith("AuxLogits.")
        )
    )
    return params


def inception_features(
    weights: str = "", layer: str = "pool", sha256: str = SHA256, batch_size_images: int = 32
) -> Extractor:
    """Extractor of the FID Inception network: with `layer="pool"` distances are FID and KID.

    It returns the logits with every layer, so that the Inception score is always available. Their
    1008 classes are not the labels of the data, so there is no accuracy.

    Args:
        weights: path of `pt_inception-2015-12-05-6726825d.pth`, or a URL to download it from
            (`diffjax.evaluation.extractors.inception.URL`).
        layer: `"pool"` (FID, KID), `"spatial"` (sFID), `"middle"` or `"logits"`; see `Layers`.
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
            f"or its URL {URL}"
        )
    params = convert(read_state_dict(weights, read_weights(weights, sha256)))

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


def _converted(state: StateDict, expected: Any, path: str) -> Any:
    """Converts the parameters below `path`, a dotted name that ends in a dot."""
    if path == "fc.":
        return {"kernel": state.take("fc.weight").T}
    if "conv" in expected:
        return {"conv": _folded(state, path)}
    return {name: _converted(state, expected[name], f"{path}{name}.") for name in expected}


def _folded(state: StateDict, path: str) -> dict[str, np.ndarray]:
    """Folds the batch normalisation after a convolution into it; the kernel is channels-last."""
    names = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    kernel, gamma, beta, mean, variance = (
        state.take(f"{path}{name}").astype(np.float64) for name in names
    )
    try:
        factor = gamma / np.sqrt(variance + _BATCH_NORM_EPSILON)
        folded = kernel.transpose(2, 3, 1, 0) * factor, beta - mean * factor
    except ValueError as error:
        raise UserError(f"{state.name}: the shapes of {path}* do not fit: {error}") from error
    return dict(zip(("kernel", "bias"), (part.astype(np.float32) for part in folded), strict=True))


class _Unit(nn.Module):
    features: int
    kernel: tuple[int, int]
    stride: int
    padding: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        strides = (self.stride, self.stride)
        conv = nn.Conv(self.features, self.kernel, strides, self.padding, name="conv")
        return nn.relu(conv(x))


def _conv(
    x: jax.Array,
    name: str,
    features: int,
    kernel: tuple[int, int] = (1, 1),
    *,
    stride: int = 1,
    padding: str | None = None,
) -> jax.Array:
    """A convolution with ReLU; by default it is padded if its stride is 1."""
    padding = padding or ("SAME" if stride == 1 else "VALID")
    return _Unit(features, kernel, stride, padding, name=name)(x)


def _average(x: jax.Array) -> jax.Array:
    """Means over 3x3 positions, without the padding."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _maximum(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (1, 1), "SAME")


def _shrink(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2), "VALID")
