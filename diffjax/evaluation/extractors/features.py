"""Images to feature vectors: what a distance between image sets is measured on."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from diffjax.compiling import jit
from diffjax.errors import UserError
from diffjax.evaluation.extractors import classifier


@dataclass(frozen=True)
class Extractor:
    """A named, hashed map from images to features.

    Attributes:
        name: written beside every number, such as `"classifier:digits"`.
        sha256: hex digest of what defines the map (weights, or the definition's text). Numbers of
            two extractors with different hashes can't be compared.
        image_shape: `(H, W, C)` that it takes; None takes any.
        apply: images `[B, H, W, C]` in [-1, 1] -> (features `[B, F]`, logits `[B, K]` or None);
            jitted, so that repeated calls share one compilation.
        test_accuracy: share of real test images whose label is that of the largest logit; None
            without logits, and where their classes are not the data's, which then have no accuracy.
        batch_size_images: images a call.
        provenance: what else defines the map, such as `resize`, written beside every number.
        prepare: what is done to a batch of images on the host first; `apply` sees its result.
        for_cmmd: whether a Gaussian kernel's distance on these features is CMMD.
    """

    name: str
    sha256: str
    image_shape: tuple[int, int, int] | None
    apply: Callable[..., tuple[jax.Array, jax.Array | None]]
    test_accuracy: float | None = None
    batch_size_images: int = 256
    provenance: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[np.ndarray], np.ndarray] = lambda images: images
    for_cmmd: bool = False

    def by(self, num_images: int) -> "Extractor":
        """The same for calls of that many images: a batch is as large, or the next power of two.

        A few images do not cost a whole batch of a large network then, and all numbers of them are
        compiled a few times in all. The features are the same but for rounding.

        Example:
            >>> [pixel_features(2).by(num).batch_size_images for num in (3, 30, 3000)]
            [4, 32, 256]
        """
        enough = 1 << (max(num_images, 1) - 1).bit_length()
        return replace(self, batch_size_images=min(self.batch_size_images, enough))

    def features(self, images: np.ndarray) -> np.ndarray:
        """Features `[N, F]` float32 of images `[N, H, W, C]` in [-1, 1]; see `extract`."""
        return self.extract(images)[0]

    def extract(
        self, images: np.ndarray, sharding: jax.sharding.Sharding | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Features and logits, batch by batch; the last batch is padded, so nothing recompiles.

        Args:
            images: `[N, H, W, C]` float in [-1, 1], N >= 1.
            sharding: of a batch over devices of this process, so that each looks at its rows; the
                size of a batch is rounded up to what they divide.

        Returns:
            Features `[N, F]` and logits `[N, K]`, float32; None instead of logits where the
            extractor has none.

        Raises:
            UserError: no images, images of another shape, of integer type, or that are not finite.
        """
        check_images(images, self.image_shape, f"extractor {self.name}")
        devices = 1 if sharding is None else sharding.num_devices
        size = -(-self.batch_size_images // devices) * devices
        parts = []
        for start in range(0, len(images), size):
            batch = np.asarray(images[start : start + size], np.float32)
            missing = size - len(batch)
            batch = self.prepare(np.pad(batch, [(0, missing), (0, 0), (0, 0), (0, 0)]))
            placed = batch if sharding is None else jax.device_put(batch, sharding)
            parts.append(self.apply(placed))
        join = partial(_join, num_images=len(images))
        features, logits = zip(*parts, strict=True)
        return join(features), None if logits[0] is None else join(logits)


def classifier_features(name: str = "digits") -> Extractor:
    """The penultimate layer and the logits of a classifier.

    Args:
        name: a shipped classifier (`"digits"`, `"fashion_mnist"`), or the path of an `.npz` that
            `python -m experiments.train_classifier` wrote.

    Raises:
        UserError: see `diffjax.evaluation.extractors.classifier.load`.

    Example:
        >>> extractor = classifier_features("digits")
        >>> extractor.features(np.zeros((3, 8, 8, 1), np.float32)).shape
        (3, 64)
    """
    trained = classifier.load(name)

    def apply(images: jax.Array) -> tuple[jax.Array, jax.Array]:
        outputs: Any = trained.network.apply({"params": trained.params}, images)
        logits, features = outputs
        return features, logits

    return Extractor(
        name=f"classifier:{trained.name}",
        sha256=trained.sha256,
        image_shape=trained.image_shape,
        apply=jit(apply),
        test_accuracy=trained.test_accuracy,
    )


def pixel_features(size: int = 8) -> Extractor:
    """Pixels after averaging over equal areas, for sets that have no classifier.

    A feature is the mean of one of `size x size` rectangles of one channel; rectangles may cut
    pixels, which then count by their share. It sees layout and colour, no detail: two models can
    be ranked by it when they differ much, not when both are good.

    Args:
        size: rectangles a side; an image with fewer pixels a side than that is refused.

    Example:
        >>> pixel_features(size=2).features(np.ones((1, 8, 8, 3), np.float32)).shape
        (1, 12)
    """
    if size < 1:
        raise UserError(f"pixel_features(size={size}): size must be at least 1")

    def apply(images: jax.Array) -> tuple[jax.Array, None]:
        batch, height, width, _ = images.shape
        if min(height, width) < size:
            raise UserError(f"pixel_features(size={size}) can't take {height}x{width} images")
        means = _areas(size, height) @ images.reshape(batch, height, -1)
        means = means.reshape(batch, size, width, -1)
        return (_areas(size, width) @ means).reshape(batch, -1), None

    definition = f"means over {size}x{size} equal rectangles, by area, row-major, channels last"
    return Extractor(
        name=f"pixels:{size}x{size}",
        sha256=hashlib.sha256(definition.encode()).hexdigest(),
        image_shape=None,
        apply=jax.jit(apply),
    )


def pretrained(
    name: str,
    apply: Callable[..., tuple[jax.Array, jax.Array | None]],
    batch_size_images: int,
    prepare: Callable[[np.ndarray], np.ndarray] = lambda images: images,
    **provenance: str,
) -> Extractor:
    """An extractor of images of any size; its hash is that of its provenance, as sorted JSON.

    Args:
        name: see `Extractor`.
        apply: see `Extractor`.
        batch_size_images: see `Extractor`.
        prepare: see `Extractor`.
        **provenance: all that the features depend on, such as `weights_sha256` and `resize`.
    """
    if batch_size_images < 1:
        raise UserError(f"{name}: batch_size_images={batch_size_images} must be at least 1")
    definition = json.dumps(provenance, sort_keys=True)
    return Extractor(
        name=name,
        sha256=hashlib.sha256(definition.encode()).hexdigest(),
        image_shape=None,
        apply=apply,
        batch_size_images=batch_size_images,
        provenance=provenance,
        prepare=prepare,
    )


def with_params(
    look: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array | None]], params: Any
) -> Callable[[Any], tuple[jax.Array, jax.Array | None]]:
    """`images -> (features, logits)` for a network, with its parameters wherever the images are.

    Args:
        look: jitted `(params, images) -> (features, logits or None)`.
        params: put on each device that looks at images, once.
    """

    @functools.cache
    def beside(mesh: jax.sharding.Mesh | None) -> Any:
        where = None
        if mesh is not None:
            where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        with jax.ensure_compile_time_eval():  # Kept, also where the images are traced.
            return jax.device_put(params, where)

    def apply(images: Any) -> tuple[jax.Array, jax.Array | None]:
        sharding = getattr(images, "sharding", None)
        mesh = sharding.mesh if isinstance(sharding, jax.sharding.NamedSharding) else None
        return look(beside(mesh), images)

    return apply


def as_rgb(images: Any) -> jax.Array:
    """`[B, H, W, 3]`: grey images `[B, H, W, 1]` are repeated, colour images stay as they are.

    Raises:
        UserError: neither one nor three channels.

    Example:
        >>> as_rgb(jnp.zeros((2, 8, 8, 1))).shape
        (2, 8, 8, 3)
    """
    channels = images.shape[-1]
    if channels not in (1, 3):
        raise UserError(f"images have {channels} channels; this extractor takes 1 or 3")
    return jnp.broadcast_to(images, (*images.shape[:-1], 3))


def check_shapes(params: Any, expected: Any, name: str) -> None:
    """Refuses parameters of other names or shapes than a network has.

    Args:
        params: nested dicts of arrays.
        expected: the same of anything with a shape.
        name: of the file that they are from.

    Raises:
        UserError: see above; it names the first.
    """
    found, wanted = (
        traverse_util.flatten_dict(jax.tree.map(lambda leaf: leaf.shape, tree), sep=".")
        for tree in (params, expected)
    )
    for key in sorted(wanted.keys() | found.keys()):
        shape, right = found.get(key), wanted.get(key)
        if shape != right:
            raise UserError(f"{name} is of another network: {key} is {shape} and should be {right}")


def check_images(images: np.ndarray, shape: tuple[int, ...] | None, whose: str) -> None:
    """Refuses what is no array of finite float images `[N, *shape]`, N >= 1.

    Args:
        images: to be checked.
        shape: `(H, W, C)`; None accepts any.
        whose: for the message, such as "extractor pixels:8x8".

    Raises:
        UserError: see above; for pixels that are not finite it says in how many images.
    """
    if images.ndim != 4 or (shape is not None and images.shape[1:] != shape):
        wanted = "[N, H, W, C]" if shape is None else f"[N, {', '.join(map(str, shape))}]"
        raise UserError(f"{whose} takes images {wanted}, not {list(images.shape)}")
    if not len(images):
        raise UserError(f"{whose} was given no images")
    if not np.issubdtype(images.dtype, np.floating):
        raise UserError(f"{whose} takes float images in [-1, 1], not {images.dtype}")
    bad = int((~np.isfinite(images)).any((1, 2, 3)).sum())
    if bad:
        raise UserError(f"{bad} of {len(images)} images have pixels that are not finite")


def _areas(size: int, length: int) -> jax.Array:
    """`[size, length]` weights: the share of pixel j in interval i, rows summing to 1."""
    edges = np.linspace(0.0, length, size + 1)
    low, high = edges[:-1, None], edges[1:, None]
    pixel = np.arange(length)
    overlap = np.minimum(high, pixel + 1) - np.maximum(low, pixel)
    return jnp.asarray(np.maximum(overlap, 0.0) * size / length, jnp.float32)


def _join(parts: tuple[jax.Array, ...], num_images: int) -> np.ndarray:
    return np.concatenate([np.asarray(part, np.float32) for part in parts])[:num_images]
