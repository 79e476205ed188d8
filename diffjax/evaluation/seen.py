"""What the numbers need of a set of images, gathered batch by batch."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import jax
import numpy as np

from diffjax.errors import UserError
from diffjax.evaluation.distances import Statistics
from diffjax.evaluation.features import Extractor, check_images
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
class Seen:
    """What is left of a set of images; its size does not hang on how many there were, but for
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


def see(
    images: Batches,
    extractor: Extractor,
    *,
    seed: int = 0,
    most_features: int = MOST_FEATURES,
    most_images: int = 1000,
    num_splits: int = 10,
    sharding: jax.sharding.Sharding | None = None,
) -> Seen:
    """Looks at each batch once and lets it go.

    Args:
        images: in [-1, 1]; they are used up.
        extractor: images to features.
        seed: of the random choice of what is kept, and of the splits of the Inception score.
        most_features: of how many images features are kept.
        most_images: how many images are kept.
        num_splits: of the Inception score.
        sharding: of a batch, so that each device looks at its rows.

    Raises:
        UserError: fewer images than 2, or another number than announced; images that the extractor
            does not take.
    """
    n = images.num_images
    feature_rows, image_rows = (thinned_rows(n, m, seed) for m in (most_features, most_images))
    moments, score, num_seen = None, None, 0
    kept_features, kept_images, predicted = [], [], []
    for batch in images.batches:
        check_images(batch, extractor.image_shape, f"extractor {extractor.name}")
        features, logits = extractor.extract(batch, sharding)
        moments = (moments or Moments.none(features.shape[1])).add(features)
        kept_features.append(features[_within(feature_rows, num_seen, len(batch))])
        kept_images.append(batch[_within(image_rows, num_seen, len(batch))])
        if logits is not None:
            predicted.append(logits.argmax(1).astype(np.int32))
            if n >= num_splits:
                score = score or ScoreSums.none(n, logits.shape[1], num_splits, seed)
                score = score.add(num_seen, logits)
        num_seen += len(batch)
    if moments is None or num_seen != n:
        raise UserError(f"{n} images were announced and {num_seen} came")
    return Seen(
        num_images=n,
        statistics=moments.statistics(),
        features=np.concatenate(kept_features),
        images=np.concatenate(kept_images),
        predicted=np.concatenate(predicted) if predicted else None,
        score=score and score.score(),
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
