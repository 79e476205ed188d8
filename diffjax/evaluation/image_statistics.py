"""Collects the statistics that metrics need (moments, features, …) from batches of images."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffjax.data import Source
from diffjax.data.pipeline import batch_at
from diffjax.errors import UserError
from diffjax.evaluation.extractors.features import Extractor, check_images
from diffjax.evaluation.moments import Moments
from diffjax.evaluation.scores.distances import Statistics
from diffjax.evaluation.scores.inception_score import NUM_SPLITS, InceptionScore, ScoreSums

MOST_FEATURES = 10_000
_BATCH_SIZE_IMAGES = 1024


@dataclass(frozen=True)
class Batches:
    """A set of images as an iterator of batches, which can be read once.

    Attributes:
        num_images: total number of images.
        batches: `[B, H, W, C]` float each, in order; B may change.
        earlier_seconds: returns how long those took that another process had drawn before.
    """

    num_images: int
    batches: Iterable[np.ndarray]
    earlier_seconds: Callable[[], float] = lambda: 0.0

    @classmethod
    def of(cls, images: np.ndarray) -> "Batches":
        """Splits an array into batches.

        Example:
            >>> [len(batch) for batch in Batches.of(np.zeros((1500, 8, 8, 1))).batches]
            [1024, 476]
        """
        starts = range(0, len(images), _BATCH_SIZE_IMAGES)
        return cls(len(images), (images[i : i + _BATCH_SIZE_IMAGES] for i in starts))

    def peek(self) -> tuple[np.ndarray, "Batches"]:
        """Returns the first batch, and new `Batches` that still contain it.

        Raises:
            UserError: there are no batches.
        """
        rest = iter(self.batches)
        first = next(rest, None)
        if first is None:
            raise UserError("there are no images")
        return first, Batches(self.num_images, chain([first], rest))


@dataclass(frozen=True)
class ImageSet:
    """Images that are read on demand, so that they are never all in memory.

    Attributes:
        shape: `(N, H, W, C)`, or of vectors `(N, F)`.
        take: reads the images of given rows: `[n]` -> `[n, H, W, C]` float.
    """

    shape: tuple[int, ...]
    take: Callable[[np.ndarray], np.ndarray]

    @classmethod
    def of(cls, images: "np.ndarray | ImageSet") -> "ImageSet":
        """Wraps an array; an `ImageSet` is returned unchanged.

        Example:
            >>> images = ImageSet.of(np.zeros((1500, 8, 8, 1)))
            >>> len(images), [len(batch) for batch in images.batches().batches]
            (1500, [1024, 476])
        """
        if isinstance(images, ImageSet):
            return images
        return cls(images.shape, lambda rows: images[rows])

    @classmethod
    def in_source(
        cls,
        source: Source,
        image_shape: tuple[int, ...],
        most: int,
        decode: Callable[[np.ndarray], np.ndarray] = lambda images: images,
    ) -> "ImageSet":
        """The images of a source, decoded; at most `most` of them, evenly spaced."""
        num = min(len(source), most)
        places = np.arange(num) * len(source) // max(num, 1)

        def take(rows: np.ndarray) -> np.ndarray:
            if not len(rows):
                return np.zeros((0, *image_shape), np.float32)
            return decode(batch_at(source, places[rows])["image"])

        return cls((num, *image_shape), take)

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self) -> Batches:
        """All images in order, in batches; each call reads them again."""
        size = read_at_once(self.shape[1:])
        starts = range(0, len(self), size)
        return Batches(
            len(self), (self.take(np.arange(i, min(i + size, len(self)))) for i in starts)
        )


def read_at_once(image_shape: tuple[int, ...]) -> int:
    """Batch size for reading: 1024, or a smaller multiple of 256 with at most 256 MB of float32.

    Example:
        >>> read_at_once((32, 32, 3)), read_at_once((256, 256, 3))
        (1024, 256)
    """
    affordable = 2**28 // (4 * max(math.prod(image_shape), 1))
    return max(min(affordable, _BATCH_SIZE_IMAGES) // 256, 1) * 256


@dataclass(frozen=True)
class CollectedStatistics:
    """Statistics of a set of images; except for `predicted`, their size does not depend on N.

    Attributes:
        num_images: number of images, N.
        statistics: mean and covariance of the features of all images.
        features: `[min(N, MOST_FEATURES), F]` float32, of the rows that `thinned_rows` draws.
        images: `[min(N, most_images), H, W, C]`, of rows drawn in the same way.
        predicted: `[N]`, the class with the largest logit; None without logits.
        score: Inception score of all images; None without logits, or if there are fewer images
            than splits.
    """

    num_images: int
    statistics: Statistics
    features: np.ndarray
    images: np.ndarray
    predicted: np.ndarray | None
    score: InceptionScore | None


def collect(images: Batches, extractor: Extractor, **how: Any) -> CollectedStatistics:
    """Computes the statistics of images for one extractor; `how` is as in `collect_each`."""
    return collect_each(images, [extractor], **how)[0]


def collect_each(
    images: Batches,
    extractors: Sequence[Extractor],
    *,
    seed: int = 0,
    most_images: int = 1000,
    sharding: jax.sharding.Sharding | None = None,
    shared: bool = False,
) -> list[CollectedStatistics]:
    """Computes the statistics of a set of images for several extractors, reading each batch once.

    Args:
        images: images in [-1, 1]; the iterator is consumed.
        extractors: maps from images to features.
        seed: seed of the random choice of kept rows and of the splits of the Inception score.
        most_images: largest number of images that are kept.
        sharding: sharding of a batch, so that each device processes its rows.
        shared: whether all processes of a run have the same images; each then processes a part.

    Raises:
        UserError: fewer than 2 images, a number other than announced, or images that an extractor
            does not accept.
    """
    n, num_seen, kept = images.num_images, 0, []
    collectors = [_Collector(extractor, n, seed) for extractor in extractors]
    rows = thinned_rows(n, most_images, seed)
    for batch in images.batches:
        for collector in collectors:
            collector.add(batch, num_seen, sharding, shared)
        kept.append(batch[_within(rows, num_seen, len(batch))])
        num_seen += len(batch)
    if not kept or num_seen != n:
        raise UserError(f"{n} images were announced and {num_seen} came")
    return [collector.collected(np.concatenate(kept)) for collector in collectors]


class _Collector:
    """Accumulates the statistics of the batches so far for one extractor."""

    def __init__(self, extractor: Extractor, n: int, seed: int):
        self.extractor, self.n, self.seed = extractor, n, seed
        self.rows = thinned_rows(n, MOST_FEATURES, seed)
        self.moments: Moments | None = None
        self.score: ScoreSums | None = None
        self.features: list[np.ndarray] = []
        self.predicted: list[np.ndarray] = []

    def add(
        self, batch: np.ndarray, start: int, sharding: jax.sharding.Sharding | None, shared: bool
    ) -> None:
        check_images(batch, self.extractor.image_shape, f"extractor {self.extractor.name}")
        extract = _in_parts if shared and jax.process_count() > 1 else Extractor.extract
        if self.moments is None:  # Later batches have the same size; the last may be smaller.
            self.extractor = self.extractor.by(len(batch))
        features, logits = extract(self.extractor, batch, sharding)
        self.moments = (self.moments or Moments.none(features.shape[1])).add(features)
        self.features.append(features[_within(self.rows, start, len(batch))])
        if logits is None:
            return
        self.predicted.append(logits.argmax(1).astype(np.int32))
        if self.n >= NUM_SPLITS:
            none = partial(ScoreSums.none, self.n, logits.shape[1], NUM_SPLITS, self.seed)
            self.score = (self.score or none()).add(start, logits)

    def collected(self, images: np.ndarray) -> CollectedStatistics:
        assert self.moments is not None
        return CollectedStatistics(
            num_images=self.n,
            statistics=self.moments.statistics(),
            features=np.concatenate(self.features),
            images=images,
            predicted=np.concatenate(self.predicted) if self.predicted else None,
            score=self.score and self.score.score(),
        )


def _in_parts(
    extractor: Extractor, batch: np.ndarray, sharding: jax.sharding.Sharding | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Features and logits of a batch that all processes have; each process computes some rows.

    Features are gathered, not moments: JAX would send moments as float32 and lose half their
    digits. So each process sums the same numbers in float64 as a single process.
    """
    size = -(-len(batch) // jax.process_count())
    rows = size * jax.process_index() + np.arange(size)
    found = extractor.extract(batch[np.minimum(rows, len(batch) - 1)], sharding)
    return jax.tree.map(
        lambda mine: np.asarray(multihost_utils.process_allgather(mine, tiled=True))[: len(batch)],
        found,
    )


def thinned_rows(num: int, most: int, seed: int) -> np.ndarray:
    """Draws at most `most` of `num` rows without replacement, in ascending order.

    Example:
        >>> thinned_rows(3, 5, seed=0), len(thinned_rows(100, 5, seed=0))
        (array([0, 1, 2]), 5)
    """
    if num <= most:
        return np.arange(num)
    return np.sort(np.random.default_rng(seed).choice(num, most, replace=False))


def _within(rows: np.ndarray, start: int, size: int) -> np.ndarray:
    """The rows (ascending) that belong to a batch, as positions in that batch."""
    first, last = np.searchsorted(rows, [start, start + size])
    return rows[first:last] - start
