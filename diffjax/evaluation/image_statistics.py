"""What the numbers need of a set of images, gathered batch by batch."""

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
from diffjax.evaluation.distances import Statistics
from diffjax.evaluation.extractors.features import Extractor, check_images
from diffjax.evaluation.moments import Moments
from diffjax.evaluation.scores import InceptionScore, ScoreSums

MOST_FEATURES = 10_000
_BATCH_SIZE_IMAGES = 1024


@dataclass(frozen=True)
class Batches:
    """Images that come batch by batch, once.

    Attributes:
        num_images: how many there are in all.
        batches: `[B, H, W, C]` float each, in order; B may change.
    """

    num_images: int
    batches: Iterable[np.ndarray]

    @classmethod
    def of(cls, images: np.ndarray) -> "Batches":
        """Parts of an array.

        Example:
            >>> [len(batch) for batch in Batches.of(np.zeros((1500, 8, 8, 1))).batches]
            [1024, 476]
        """
        starts = range(0, len(images), _BATCH_SIZE_IMAGES)
        return cls(len(images), (images[i : i + _BATCH_SIZE_IMAGES] for i in starts))

    def peek(self) -> tuple[np.ndarray, "Batches"]:
        """The first batch, and all of them.

        Raises:
            UserError: there is none.
        """
        rest = iter(self.batches)
        first = next(rest, None)
        if first is None:
            raise UserError("there are no images")
        return first, Batches(self.num_images, chain([first], rest))


@dataclass(frozen=True)
class Images:
    """Images that are read where they lie when they are wanted, so that never all are in memory.

    Attributes:
        shape: `(N, H, W, C)`, or of vectors `(N, F)`.
        take: rows `[n]` -> those images `[n, H, W, C]` float.
    """

    shape: tuple[int, ...]
    take: Callable[[np.ndarray], np.ndarray]

    @classmethod
    def of(cls, images: "np.ndarray | Images") -> "Images":
        """Those of an array; what are `Images` already stay as they are.

        Example:
            >>> images = Images.of(np.zeros((1500, 8, 8, 1)))
            >>> len(images), [len(batch) for batch in images.batches().batches]
            (1500, [1024, 476])
        """
        if isinstance(images, Images):
            return images
        return cls(images.shape, lambda rows: images[rows])

    @classmethod
    def in_source(cls, source: Source, image_shape: tuple[int, ...], most: int) -> "Images":
        """Those of a source of images; of a larger one `most`, evenly spaced."""
        num = min(len(source), most)
        places = np.arange(num) * len(source) // max(num, 1)

        def take(rows: np.ndarray) -> np.ndarray:
            if not len(rows):
                return np.zeros((0, *image_shape), np.float32)
            return batch_at(source, places[rows])["image"]

        return cls((num, *image_shape), take)

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self) -> Batches:
        """All of them, in order, read anew at each call."""
        size = read_at_once(self.shape[1:])
        starts = range(0, len(self), size)
        return Batches(
            len(self), (self.take(np.arange(i, min(i + size, len(self)))) for i in starts)
        )


def read_at_once(image_shape: tuple[int, ...]) -> int:
    """Images a batch: 1024, or fewer, in 256s, where those would take more than 256 MB of float32.

    Example:
        >>> read_at_once((32, 32, 3)), read_at_once((256, 256, 3))
        (1024, 256)
    """
    affordable = 2**28 // (4 * max(math.prod(image_shape), 1))
    return max(min(affordable, _BATCH_SIZE_IMAGES) // 256, 1) * 256


@dataclass(frozen=True)
class Seen:
    """What is left of a set of images; its size does not depend on how many there were, but for
    `predicted`.

    Attributes:
        num_images: N.
        statistics: mean and covariance of the features of all.
        features: `[min(N, most_features), F]` float32, of those that `thinned_rows` chooses.
        images: `[min(N, most_images), H, W, C]`, likewise.
        predicted: `[N]`, the class of the largest logit; None without logits.
        score: the Inception score of all; None without logits, or with fewer images than splits.
    """

    num_images: int
    statistics: Statistics
    features: np.ndarray
    images: np.ndarray
    predicted: np.ndarray | None
    score: InceptionScore | None


def see(images: Batches, extractor: Extractor, **how: Any) -> Seen:
    """Looks at each batch once and lets it go; `how` is as in `see_each`."""
    return see_each(images, [extractor], **how)[0]


def see_each(
    images: Batches,
    extractors: Sequence[Extractor],
    *,
    seed: int = 0,
    most_features: int = MOST_FEATURES,
    most_images: int = 1000,
    num_splits: int = 10,
    sharding: jax.sharding.Sharding | None = None,
    shared: bool = False,
) -> list[Seen]:
    """Shows each batch to all extractors, once, and lets it go.

    Args:
        images: in [-1, 1]; they are used up.
        extractors: images to features.
        seed: of the random choice of what is kept, and of the splits of the Inception score.
        most_features: of how many images features are kept.
        most_images: how many images are kept.
        num_splits: of the Inception score.
        sharding: of a batch, so that each device looks at its rows.
        shared: all processes of a run see the same images now, and each looks at its part of them.

    Raises:
        UserError: fewer images than 2, or another number than announced; images that an extractor
            does not take.
    """
    n, num_seen, kept = images.num_images, 0, []
    looks = [_Look(extractor, n, seed, most_features, num_splits) for extractor in extractors]
    rows = thinned_rows(n, most_images, seed)
    for batch in images.batches:
        for look in looks:
            look.add(batch, num_seen, sharding, shared)
        kept.append(batch[_within(rows, num_seen, len(batch))])
        num_seen += len(batch)
    if not kept or num_seen != n:
        raise UserError(f"{n} images were announced and {num_seen} came")
    return [look.seen(np.concatenate(kept)) for look in looks]


class _Look:
    """What one extractor has made of the batches so far."""

    def __init__(
        self, extractor: Extractor, n: int, seed: int, most_features: int, num_splits: int
    ):
        self.extractor, self.n, self.seed, self.num_splits = extractor, n, seed, num_splits
        self.rows = thinned_rows(n, most_features, seed)
        self.moments: Moments | None = None
        self.score: ScoreSums | None = None
        self.features: list[np.ndarray] = []
        self.predicted: list[np.ndarray] = []

    def add(
        self, batch: np.ndarray, start: int, sharding: jax.sharding.Sharding | None, shared: bool
    ) -> None:
        check_images(batch, self.extractor.image_shape, f"extractor {self.extractor.name}")
        extract = _in_parts if shared and jax.process_count() > 1 else Extractor.extract
        if self.moments is None:  # Later batches are as large, and the last perhaps smaller.
            self.extractor = self.extractor.by(len(batch))
        features, logits = extract(self.extractor, batch, sharding)
        self.moments = (self.moments or Moments.none(features.shape[1])).add(features)
        self.features.append(features[_within(self.rows, start, len(batch))])
        if logits is None:
            return
        self.predicted.append(logits.argmax(1).astype(np.int32))
        if self.n >= self.num_splits:
            none = partial(ScoreSums.none, self.n, logits.shape[1], self.num_splits, self.seed)
            self.score = (self.score or none()).add(start, logits)

    def seen(self, images: np.ndarray) -> Seen:
        assert self.moments is not None
        return Seen(
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
    """Features and logits of a batch that all processes have, each of which looks at some rows.

    Features are gathered rather than moments, which would lose half their digits on the way: JAX
    carries float32. So each process adds up the same numbers in float64 as one alone would.
    """
    size = -(-len(batch) // jax.process_count())
    rows = size * jax.process_index() + np.arange(size)
    found = extractor.extract(batch[np.minimum(rows, len(batch) - 1)], sharding)
    return jax.tree.map(
        lambda mine: np.asarray(multihost_utils.process_allgather(mine, tiled=True))[: len(batch)],
        found,
    )


def thinned_rows(num: int, most: int, seed: int) -> np.ndarray:
    """Which of `num` images are kept if at most `most` are: ascending, without replacement.

    Example:
        >>> thinned_rows(3, 5, seed=0), len(thinned_rows(100, 5, seed=0))
        (array([0, 1, 2]), 5)
    """
    if num <= most:
        return np.arange(num)
    return np.sort(np.random.default_rng(seed).choice(num, most, replace=False))


def _within(rows: np.ndarray, start: int, size: int) -> np.ndarray:
    """Those of the ascending rows that lie in a batch, counted from its start."""
    first, last = np.searchsorted(rows, [start, start + size])
    return rows[first:last] - start
