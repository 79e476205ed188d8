"""The real images that samples are compared with, and their features, extracted once."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

import diffjax
from diffjax.codecs import Codec, Identity
from diffjax.data import DataSet, Source, all_captions, eval_batches, to_float, to_uint8
from diffjax.evaluation.cached_arrays import Arrays, cached
from diffjax.evaluation.extractors.features import Extractor
from diffjax.evaluation.image_statistics import (
    MOST_FEATURES,
    ImageSet,
    collect,
    read_at_once,
    thinned_rows,
)
from diffjax.evaluation.scores.copying import inauthentic
from diffjax.evaluation.scores.distances import (
    FEWEST_IMAGES,
    KernelDistance,
    Statistics,
    kernel_distance,
    symmetric_root,
)
from diffjax.evaluation.scores.neighbours import nearest_neighbours
from diffjax.oracle.analytic import GaussianMixture

_FORMAT = 3  # of what is stored of a data set
MAX_IMAGES = 60_000
"""The most of each split that are looked at, evenly spaced."""


@dataclass(frozen=True)
class Reference:
    """The real images that samples are compared with, their features, and the floors of metrics.

    Attributes:
        name: name of the data set.
        extractor: the extractor of the features.
        train_images: N images `[H, W, C]` float32 in [-1, 1], read on demand.
        class_counts: `[K]`, number of them in each class; without classes one entry, N.
        train_features: `[min(N, 10,000), F]` float32, drawn by the seed.
        train_statistics: mean and covariance of the features of all N images.
        train_root: symmetric root of their covariance.
        train_sha256: fingerprint of the train split.
        test_features: `[M, F]` float32.
        test_logits: `[M, K]` float32; None if the extractor has no logits.
        some_test_images: `[L, H, W, C]` float32, the test images that `test_neighbours` is for.
        test_neighbours: indices `[L, 2]` and distances `[L, 2]` of their nearest train images, from
            `nearest_neighbours`.
        inauthentic_floor: share of them that are `inauthentic`; None without test images.
        kernel_floor: kernel distance between the test and the train split; None for fewer than 3
            test images.
        max_neighbour_images: number of samples that are compared with their nearest train images.
        seed: seed of every random choice of images.
        sharding: sharding of a batch of images, so that each device processes its rows.
        codec: what the images were decoded by.
        test_sha256: fingerprint of the test split.
        mixture: the true distribution of the real images, if it is known; else None.
        test_texts: M captions of the test images; empty where there are none.
        shared: whether all processes of a run compare the same samples at the same time; each then
            processes a part of them.
    """

    name: str
    extractor: Extractor
    train_images: ImageSet
    class_counts: np.ndarray
    train_features: np.ndarray
    train_statistics: Statistics
    train_root: np.ndarray
    train_sha256: str
    test_features: np.ndarray
    test_logits: np.ndarray | None
    some_test_images: np.ndarray
    test_neighbours: tuple[np.ndarray, np.ndarray]
    inauthentic_floor: float | None
    kernel_floor: KernelDistance | None
    max_neighbour_images: int
    seed: int
    sharding: jax.sharding.Sharding | None = None
    codec: Codec = Identity()
    test_sha256: str = ""
    mixture: GaussianMixture | None = None
    shared: bool = False
    test_texts: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return (
            f"Reference({self.name}: {len(self.train_images):,} images, "
            f"{len(self.test_features):,} for testing, by {self.extractor.name})"
        )


def reference(
    dataset: DataSet,
    extractor: Extractor,
    *,
    max_images: int = MAX_IMAGES,
    max_neighbour_images: int = 1000,
    seed: int = 0,
    folder: str | None = None,
    sharding: jax.sharding.NamedSharding | None = None,
    shared: bool = False,
) -> Reference:
    """Extracts the features and floors of a data set once, for any number of `compare` calls.

    Images are read in batches and not kept, so memory does not depend on their number, except for
    at most `max_images` test features. `Reference` lists what is kept.

    Args:
        dataset: samples are compared with its real training images, decoded by its codec. Floors
            come from its test split; if that is small or empty, some floors are None.
        extractor: map from images to features.
        max_images: largest number of images used of each split, evenly spaced.
        max_neighbour_images: largest number of test images whose nearest train images are found.
        seed: seed of the random choice of images and samples.
        folder: cache folder for the extracted arrays, such as
            `diffjax.evaluation.cached_arrays.FOLDER`; None disables the cache.
        sharding: sharding of a batch of images over devices of this process; None uses one device.
        shared: see `Reference`. It applies only to samples: each process reads the whole data set.

    Raises:
        UserError: images of a shape that the extractor does not accept, or fewer than 3 for
            training.
    """
    decode, shape = _decoder(dataset.codec, sharding), dataset.picture_shape
    train_images, test_images = (
        ImageSet.in_source(source, shape, max_images, decode)
        for source in (dataset.reference, dataset.test)
    )
    (train_crc32, class_counts), (test_crc32, _) = (
        _read_through(source, dataset, max_images) for source in (dataset.reference, dataset.test)
    )
    some_test_images = test_images.take(thinned_rows(len(test_images), max_neighbour_images, seed))
    train_sha256, test_sha256 = dataset.reference.fingerprint(), dataset.test.fingerprint()
    facts = {
        "format": _FORMAT,
        "version": diffjax.__version__,
        "backend": jax.default_backend(),
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "train_sha256": train_sha256,
        "test_sha256": test_sha256,
        # Fingerprints hash only a part of large data, but the arrays depend on every pixel.
        "images_crc32": [train_crc32, test_crc32],
        **dataset.codec.facts,
        "max_images": max_images,
        "max_neighbour_images": max_neighbour_images,
        "max_features": MOST_FEATURES,
        "seed": seed,
    }
    make = partial(
        _extracted, train_images, test_images, some_test_images, extractor, seed, sharding
    )
    found = cached(folder, facts, make)
    floor = found["kernel_floor"]
    return Reference(
        name=dataset.name,
        extractor=extractor,
        train_images=train_images,
        class_counts=class_counts,
        train_features=found["train_features"],
        train_statistics=Statistics(
            found["train_mean"], found["train_cov"], int(found["train_count"])
        ),
        train_root=found["train_root"],
        train_sha256=train_sha256,
        test_features=found["test_features"],
        test_logits=found.get("test_logits"),
        some_test_images=some_test_images,
        test_neighbours=(found["neighbour_indices"], found["neighbour_distances"]),
        inauthentic_floor=float(found["inauthentic_floor"]) if len(test_images) else None,
        kernel_floor=None
        if np.isnan(floor[0])
        else KernelDistance(float(floor[0]), float(floor[1]), int(floor[2]), int(floor[3])),
        max_neighbour_images=max_neighbour_images,
        seed=seed,
        sharding=sharding,
        codec=dataset.codec,
        test_sha256=test_sha256,
        mixture=dataset.mixture,
        shared=shared,
        test_texts=tuple(all_captions(dataset.test, max_images)),
    )


def _decoder(
    codec: Codec, sharding: jax.sharding.NamedSharding | None
) -> Callable[[np.ndarray], np.ndarray]:
    """`latents -> images`, with the values of image files where the codec has such images."""
    if codec.pixels:  # They are those of image files already.
        return codec.decoder(sharding)
    decode = codec.decoder(sharding)
    return (lambda latents: to_float(to_uint8(decode(latents)))) if codec.bounded else decode


def thin(images: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Draws at most `most` of the images without replacement; their order is kept."""
    if len(images) <= most:
        return images
    return images[thinned_rows(len(images), most, seed)]


def class_counts(dataset: DataSet, max_images: int = MAX_IMAGES) -> np.ndarray:
    """How many of the real images each class has, `[K]`; `[N]` where there are no classes."""
    return _read_through(dataset.reference, dataset, max_images)[1]


def _read_through(source: Source, dataset: DataSet, most: int) -> tuple[int, np.ndarray]:
    """A checksum of the images that are used, and the number of images of each class."""
    checksum, class_counts = 0, np.zeros(max(dataset.num_classes, 1), int)
    if not len(source):
        return checksum, class_counts
    size = read_at_once(dataset.image_shape)
    for batch in eval_batches(source, batch_size=size, limit_images=most):
        checksum = zlib.crc32(np.ascontiguousarray(batch["image"]).data, checksum)
        # The labels of a data set without classes have no meaning.
        labels = batch["label"] if dataset.num_classes else np.zeros(len(batch["label"]), int)
        class_counts += np.bincount(labels, minlength=len(class_counts))
    return checksum, class_counts


def _extracted(
    train_images: ImageSet,
    test_images: ImageSet,
    some_test_images: np.ndarray,
    extractor: Extractor,
    seed: int,
    sharding: jax.sharding.Sharding | None,
) -> Arrays:
    """Computes the expensive arrays of a data set: features, statistics, neighbours, floors."""
    train = collect(train_images.batches(), extractor, seed=seed, most_images=0, sharding=sharding)
    # Without test images, one train image determines the width of the empty features.
    some = test_images if len(test_images) else ImageSet.of(train_images.take(np.arange(1)))
    fitting = extractor.by(len(some))
    found = [fitting.extract(batch, sharding) for batch in some.batches().batches]
    features, logits = zip(*found, strict=True)
    test_features = np.concatenate(features)[: len(test_images)]
    indices, distances = nearest_neighbours(some_test_images, train_images, k=2)
    floor: Any = (np.nan, np.nan, len(test_images), len(train.features))
    if len(test_images) >= FEWEST_IMAGES:
        floor = kernel_distance(test_features, train.features, seed=seed)
    mean, cov, count = train.statistics
    return {
        "train_features": train.features,
        "train_mean": mean,
        "train_cov": cov,
        "train_count": np.array(count),
        "train_root": symmetric_root(cov),
        "test_features": test_features,
        **(
            {} if logits[0] is None else {"test_logits": np.concatenate(logits)[: len(test_images)]}
        ),
        "neighbour_indices": indices,
        "neighbour_distances": distances,
        "inauthentic_floor": np.array(
            inauthentic(indices, distances, train_images) if len(test_images) else np.nan
        ),
        "kernel_floor": np.array(floor),
    }
