"""The training pictures that a page shows, and their means."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from diffjax.conditions import Classes
from diffjax.data import DataSet, all_examples
from diffjax.runs.load import Run

_MOST_BYTES = 2**28
_MOST_PICTURES = 10_000


@dataclass(frozen=True)
class Examples:
    """Training pictures as the network has them (pictures, or latents), with their conditions.

    Attributes:
        images: `[N, h, w, c]`, evenly spaced in the training set.
        condition: N rows.
        labels: `[N]` classes of the condition; None for a model of no classes.
        num_train: pictures in the whole training set.
    """

    images: np.ndarray
    condition: Any
    labels: np.ndarray | None
    num_train: int

    @classmethod
    def of(cls, run: Run, dataset: DataSet) -> "Examples":
        """Those of a run: as many as fit into 256 MB, and at most 10,000."""
        most = max(1, _MOST_BYTES // (4 * int(np.prod(dataset.image_shape))))
        batch = all_examples(dataset.train, min(_MOST_PICTURES, most))
        kind = run.parts.wired.condition
        condition = kind.of_batch(batch)
        labels = np.asarray(batch["label"]) if isinstance(kind, Classes) else None
        return cls(np.asarray(batch["image"]), condition, labels, len(dataset.train))

    def shown(self, n: int) -> np.ndarray:
        """The rows of n examples, of different classes where there are classes.

        Example:
            >>> images = np.zeros((5, 2, 2, 1))
            >>> Examples(images, None, np.array([1, 1, 0, 1, 0]), 5).shown(3).tolist()
            [2, 0, 4]
            >>> Examples(images, None, None, 5).shown(2).tolist()
            [0, 2]
        """
        n = min(n, len(self.images))
        if self.labels is None:
            return np.arange(n) * len(self.images) // n
        place = np.zeros(len(self.labels), int)
        for label in np.unique(self.labels):
            of_class = self.labels == label
            place[of_class] = np.arange(of_class.sum())
        return np.lexsort((np.arange(len(place)), self.labels, place))[:n]

    @property
    def means(self) -> dict[int, np.ndarray]:
        """The mean of all examples of each class; under 0 that of all where there are none.

        Example:
            >>> images = np.arange(4.0).reshape(4, 1, 1, 1)
            >>> Examples(images, None, np.array([0, 1, 0, 1]), 4).means[1].item()
            2.0
        """
        labels = np.zeros(len(self.images), int) if self.labels is None else self.labels
        return {int(c): self.images[labels == c].mean(axis=0) for c in np.unique(labels)}


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """The root of the mean squared difference of two pictures, `√(mean (x − y)²)`.

    Example:
        >>> distance(np.zeros((2, 2, 1)), np.full((2, 2, 1), 0.5))
        0.5
    """
    return float(np.sqrt(np.mean(np.square(one - other))))


def variety(groups: np.ndarray) -> float:
    """The mean distance of two pictures of one group, over all pairs of all groups.

    Equal pictures have a variety of 0. Of independent pictures whose pixels have the variance v it
    is about `√(2v)`.

    Args:
        groups: `[groups, n, H, W, C]`, n at least 2.

    Example:
        >>> two = np.stack([np.zeros((2, 2, 1)), np.ones((2, 2, 1))])
        >>> variety(np.stack([two, np.zeros_like(two)]))
        0.5
    """
    n = groups.shape[1]
    flat = groups.reshape(len(groups), n, -1).astype(np.float64)
    between = [
        np.sqrt(np.mean(np.square(flat[:, i] - flat[:, j]), axis=-1))
        for i in range(n)
        for j in range(i)
    ]
    return float(np.mean(between))
