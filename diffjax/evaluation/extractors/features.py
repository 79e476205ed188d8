"""The `Extractor`: a map from images to the features on which image sets are compared."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.compiling import jit
from diffjax.data import DataSet
from diffjax.errors import UserError
from diffjax.evaluation.extractors import classifier


@dataclass(frozen=True)
class Extractor:
    """A named, hashed map from images to features.

    Attributes:
        name: its name in the provenance of every metric, such as `"classifier:digits"`.
        sha256: hex digest of what defines the map (weights, or the text of its definition). Metrics
            with different hashes can't be compared.
        image_shape: `(H, W, C)` of its input; None accepts any.
        apply: images `[B, H, W, C]` in [-1, 1] -> (features `[B, F]`, logits `[B, K]` or None);
            jitted, so that repeated calls share one compilation.
        test_accuracy: accuracy on real test images; None without logits, and if the classes are not
            those of the data.
        batch_size_images: images per call of `apply`; 256 is typical, 32 for large networks.
        provenance: further properties that define the map, such as `resize`.
        prepare: preprocesses a batch of images on the host, before `apply`.
        texts: `texts -> embeddings [n, F]` of length 1, comparable with the features of images, of
            a network that has a text encoder; else None.
        for_cmmd: whether the distance with a Gaussian kernel on these features is CMMD.
        of_data: returns the extractor that takes the place of this one for a data set; see `of`.
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
    texts: Callable[[Sequence[str]], np.ndarray] | None = None
    of_data: "Callable[[DataSet], Extractor] | None" = None

    def of(self, dataset: DataSet) -> "Extractor":
        """The extractor for a data set: this one, unless it depends on the data."""
        return self if self.of_data is None else self.of_data(dataset)

    def by(self, num_images: int) -> "Extractor":
        """Returns the extractor with a batch size for `num_images` images.

        It is the next power of two, at most the current batch size. So a few images do not cost a
        whole batch of a large network, and there are only few compilations. The features are
        the same up to rounding.

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
        """Features and logits, computed in batches; the last is padded, so nothing recompiles.

        Args:
            images: `[N, H, W, C]` float in [-1, 1], N >= 1.
            sharding: sharding of a batch over devices of this process; the batch size is rounded up
                to a multiple of their number.

        Returns:
            Features `[N, F]` and logits `[N, K]`, float32; None instead of logits if the
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
    """Extractor of the penultimate layer and the logits of a small classifier.

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
    # A shipped file does not change, so all evaluations of a process share its program.
    return _shipped(name) if name in classifier.SHIPPED else _of_classifier(name)


def _of_classifier(name: str) -> Extractor:
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


_shipped = functools.cache(_of_classifier)


def pixel_features(size: int = 8) -> Extractor:
    """Extractor of pixels averaged over equal areas, for data sets without a classifier.

    A feature is the mean over one of `size x size` rectangles of one channel; a pixel that a
    rectangle cuts counts by its share. The features contain layout and colour but no detail. They
    can rank two models that differ much, but not two good models.

    Args:
        size: rectangles per side, 8 is typical; images with fewer pixels per side are refused.

    Example:
        >>> pixel_features(size=2).features(np.ones((1, 8, 8, 3), np.float32)).shape
        (1, 12)
    """
    if size < 1:
        raise UserError(f"pixel_features(size={size}): size must be at least 1")

    definition = f"means over {size}x{size} equal rectangles, by area, row-major, channels last"
    return Extractor(
        name=f"pixels:{size}x{size}",
        sha256=hashlib.sha256(definition.encode()).hexdigest(),
        image_shape=None,
        apply=partial(_means, size),
    )


@partial(jax.jit, static_argnums=0)
def _means(size: int, images: jax.Array) -> tuple[jax.Array, None]:
    batch, height, width, _ = images.shape
    if min(height, width) < size:
        raise UserError(f"pixel_features(size={size}) can't take {height}x{width} images")
    means = _areas(size, height) @ images.reshape(batch, height, -1)
    means = means.reshape(batch, size, width, -1)
    return (_areas(size, width) @ means).reshape(batch, -1), None


def pretrained(
    name: str,
    apply: Callable[..., tuple[jax.Array, jax.Array | None]],
    batch_size_images: int,
    prepare: Callable[[np.ndarray], np.ndarray] = lambda images: images,
    **provenance: str,
) -> Extractor:
    """Builds an extractor for images of any size; its hash is that of its provenance as JSON.

    Args:
        name: see `Extractor`.
        apply: see `Extractor`.
        batch_size_images: see `Extractor`.
        prepare: see `Extractor`.
        **provenance: everything on which the features depend, such as `weights_sha256`, `resize`.
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
    evaluate: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array | None]], params: Any
) -> Callable[[Any], tuple[jax.Array, jax.Array | None]]:
    """An extractor's map with its parameters bound, which it copies once to the images' devices.

    Args:
        evaluate: jitted `(params, images) -> (features, logits or None)`.
        params: the parameters.

    Returns:
        `images -> (features, logits or None)`.
    """

    @functools.cache
    def params_on(mesh: jax.sharding.Mesh | None) -> Any:
        where = None
        if mesh is not None:
            where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        with jax.ensure_compile_time_eval():  # Concrete arrays, also if the images are traced.
            return jax.device_put(params, where)

    def apply(images: Any) -> tuple[jax.Array, jax.Array | None]:
        sharding = getattr(images, "sharding", None)
        mesh = sharding.mesh if isinstance(sharding, jax.sharding.NamedSharding) else None
        return evaluate(params_on(mesh), images)

    return apply


def as_rgb(images: Any) -> jax.Array:
    """Converts images to `[B, H, W, 3]`: a single grey channel is repeated.

    Raises:
        UserError: the images have neither one nor three channels.

    Example:
        >>> as_rgb(jnp.zeros((2, 8, 8, 1))).shape
        (2, 8, 8, 3)
    """
    channels = images.shape[-1]
    if channels not in (1, 3):
        raise UserError(f"images have {channels} channels; this extractor accepts 1 or 3")
    return jnp.broadcast_to(images, (*images.shape[:-1], 3))


def check_images(images: np.ndarray, shape: tuple[int, ...] | None, whose: str) -> None:
    """Checks that images are a finite float array `[N, *shape]`, N >= 1.

    Args:
        images: the array to check.
        shape: `(H, W, C)`; None accepts any.
        whose: the user of the images for the message, such as "extractor pixels:8x8".

    Raises:
        UserError: another shape or dtype, no images, or pixels that are not finite.
    """
    if images.ndim != 4 or (shape is not None and images.shape[1:] != shape):
        wanted = "[N, H, W, C]" if shape is None else f"[N, {', '.join(map(str, shape))}]"
        raise UserError(f"{whose} needs images {wanted}, not {list(images.shape)}")
    if not len(images):
        raise UserError(f"{whose}: there are no images")
    if not np.issubdtype(images.dtype, np.floating):
        raise UserError(f"{whose} needs float images in [-1, 1], not {images.dtype}")
    bad = int((~np.isfinite(images)).any((1, 2, 3)).sum())
    if bad:
        raise UserError(f"{bad} of {len(images)} images have pixels that are not finite")


def _areas(size: int, length: int) -> jax.Array:
    """Averaging weights `[size, length]`: the share of pixel j in interval i; rows sum to 1."""
    edges = np.linspace(0.0, length, size + 1)
    low, high = edges[:-1, None], edges[1:, None]
    pixel = np.arange(length)
    overlap = np.minimum(high, pixel + 1) - np.maximum(low, pixel)
    return jnp.asarray(np.maximum(overlap, 0.0) * size / length, jnp.float32)


def _join(parts: tuple[jax.Array, ...], num_images: int) -> np.ndarray:
    return np.concatenate([np.asarray(part, np.float32) for part in parts])[:num_images]
