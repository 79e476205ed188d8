"""A small image classifier, for the accuracy of samples and for the features of distances.

The shipped weights come from `python -m experiments.train_classifier`; no download, no pickle.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from diffjax.data.archives import read_npz
from diffjax.errors import UserError, nearest
from diffjax.host.files import place_of

# sha256 of each file in `weights/`: a damaged or exchanged file would change every metric silently.
SHIPPED: Mapping[str, str] = {
    "digits": "3081c58fc0e202540da6ce0abea5aabe7a486d32ba136a6ddc2b6a6f9aca88f7",
    "fashion_mnist": "1be19b3c64bc451a74d4b7d6986a1d450b11c6acecdc54bee8d4ace2151c093c",
}
_METADATA = "metadata"


class Classifier(nn.Module):
    """A residual convolutional network for small images.

    Each stage first merges patches of pixels, then applies a residual 3x3 convolution. The result
    at all positions goes through one hidden layer.

    Attributes:
        num_classes: number of logits.
        widths: channels of each stage.
        patches: side of the patches that each stage merges, in pixels of its input.
        num_features: width of the penultimate layer.
    """

    num_classes: int
    widths: tuple[int, ...]
    patches: tuple[int, ...]
    num_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Classifies images.

        Args:
            x: images `[B, H, W, C]` in [-1, 1].

        Returns:
            Logits `[B, num_classes]`, and the features `[B, num_features]` of the penultimate
            layer after its ReLU; the logits are linear in them.
        """
        for width, patch in zip(self.widths, self.patches, strict=True):
            x = nn.relu(nn.LayerNorm()(nn.Dense(width)(_merge_patches(x, patch))))
            x = nn.relu(x + nn.LayerNorm()(nn.Conv(width, (3, 3))(x)))
        features = nn.relu(nn.Dense(self.num_features)(x.reshape(len(x), -1)))
        return nn.Dense(self.num_classes)(features), features


@dataclass(frozen=True)
class TrainedClassifier:
    """A trained classifier, read from a file.

    Attributes:
        name: its name, or the path of its file.
        sha256: hex digest of the file.
        network: the module.
        params: its parameters, float32.
        metadata: written by the training script: `dataset`, `train_sha256`, `test_accuracy`,
            `image_shape`, `network`, `seed`, `command`.
    """

    name: str
    sha256: str
    network: Classifier
    params: Any
    metadata: Mapping[str, Any]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(H, W, C)` of its input images."""
        height, width, channels = self.metadata["image_shape"]
        return height, width, channels

    @property
    def test_accuracy(self) -> float:
        """Accuracy on real test images in [0, 1], measured after its training."""
        return float(self.metadata["test_accuracy"])


def load(name: str) -> TrainedClassifier:
    """Reads a shipped classifier by name, or one of your own by the path of its `.npz`.

    The sha256 of a shipped file is verified. A file of your own is not, but its sha256 is part of
    the provenance of every metric.

    Args:
        name: `"digits"`, `"fashion_mnist"`, or a path that ends in `.npz`.

    Raises:
        UserError: the name is unknown, or the file is damaged or has another hash.

    Example:
        >>> load("digits").image_shape
        (8, 8, 1)
    """
    if name.endswith(".npz"):
        try:
            return decode(name, place_of(name).read_bytes())
        except OSError as error:
            raise UserError(f"can't read the classifier {name}: {error.strerror}") from error
    if name not in SHIPPED:
        raise UserError(f"no shipped classifier is called {name!r}; {nearest(name, SHIPPED)}")
    file = resources.files("diffjax.evaluation.extractors").joinpath(f"weights/{name}.npz")
    return decode(name, file.read_bytes(), expected_sha256=SHIPPED[name])


def decode(name: str, data: bytes, expected_sha256: str | None = None) -> TrainedClassifier:
    """Decodes a classifier from the bytes of an `.npz` that `classifier_to_npz` wrote.

    Args:
        name: for messages and provenance.
        data: the whole file.
        expected_sha256: hex digest that the file must have; None accepts any.

    Raises:
        UserError: the hash differs, or the file is not such an `.npz`.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    if expected_sha256 is not None and sha256 != expected_sha256:
        raise UserError(
            f"weights of classifier {name!r} have sha256 {sha256[:12]}…, not "
            f"{expected_sha256[:12]}…: the file is damaged or was exchanged; reinstall diffjax"
        )
    try:
        arrays = read_npz(data, name)
        metadata = json.loads(str(arrays.pop(_METADATA)))
        settings = metadata["network"]
        network = Classifier(
            settings["num_classes"],
            tuple(settings["widths"]),
            tuple(settings["patches"]),
            settings["num_features"],
        )
    except (UserError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{name} is not a classifier written by experiments.train_classifier"
        ) from error
    params = traverse_util.unflatten_dict(
        {key: np.asarray(value, np.float32) for key, value in arrays.items()}, sep="/"
    )
    return TrainedClassifier(name, sha256, network, params, metadata)


def classifier_to_npz(network: Classifier, params: Any, metadata: Mapping[str, Any]) -> bytes:
    """Encodes a classifier as the bytes of an `.npz`: float16 parameters and metadata as JSON.

    Equal arguments yield equal bytes, so the hash identifies the weights.

    Args:
        network: the module; its settings become part of the metadata.
        params: its parameters.
        metadata: plain JSON values; see `TrainedClassifier.metadata`.
    """
    settings = {
        "num_classes": network.num_classes,
        "widths": network.widths,
        "patches": network.patches,
        "num_features": network.num_features,
    }
    text = json.dumps({**metadata, "network": settings}, indent=1)
    arrays = {
        key: np.asarray(value, np.float16)
        for key, value in traverse_util.flatten_dict(params, sep="/").items()
    }
    file = io.BytesIO()
    np.savez_compressed(file, **{_METADATA: np.array(text)}, **arrays)  # pyright: ignore[reportArgumentType]
    return file.getvalue()


def _merge_patches(x: jax.Array, size: int) -> jax.Array:
    """`[B, H, W, C]` to `[B, ⌈H/size⌉, ⌈W/size⌉, size² C]`, padded with zeros at the far edges.

    A dense layer on it equals a convolution whose stride is its width; XLA's gradient of that
    convolution takes twice the time on a CPU.
    """
    batch, height, width, channels = x.shape
    rows, columns = -(-height // size), -(-width // size)
    pad = ((0, 0), (0, rows * size - height), (0, columns * size - width), (0, 0))
    x = jnp.pad(x, pad).reshape(batch, rows, size, columns, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, size * size * channels)
