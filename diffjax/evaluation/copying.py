"""Two more tests for copies of training images: cell by cell, and image by image."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffjax.errors import UserError
from diffjax.evaluation.distances import squared_distances
from diffjax.evaluation.image_statistics import Images
from diffjax.evaluation.neighbours import nearest

_FEWEST_IN_CELL = 20
_CLUSTERED_IMAGES = 5000
_CLUSTERED_BYTES = 2**30
_BLOCK_SIZE = 500


class DataCopying(NamedTuple):
    """The statistic C_T, and the share of test images that lie in cells it is made of.

    Attributes:
        value: in standard deviations of the null hypothesis: about 0 for samples as far from the
            training set as test images are; below -3, copies; above 3, too far from it. None where
            no cell has enough samples and test images.
        tested_share: in [0, 1]; cells with too few samples or test images are left out.
    """

    value: float | None
    tested_share: float


def data_copying(
    samples: np.ndarray,
    train: np.ndarray | Images,
    test: np.ndarray,
    *,
    num_cells: int = 5,
    seed: int = 0,
) -> DataCopying:
    """The test of Meehan, Chaudhuri & Dasgupta 2020 (arXiv:2004.05675), for copies in some cells.

        C_T = Σ_π P(π)·Z(π) / Σ_π P(π),    Z = (U - nm/2) / √(nm(n + m + 1)/12)

    Cells π are those of k-means on the training set. In each, U counts the pairs of one of its m
    samples and one of its n test images of which the sample is farther from the cell's training
    images (ties half), and P is the cell's share of the test images. Cells with fewer than 20
    samples, as in the paper, or without test images are left out. Samples that copy in one cell
    and are too far off in another cancel in one global test; here they cancel in the mean alone.

    Args:
        samples: `[M, ...]`, pixels or features.
        train: `[N, ...]`; k-means sees at most 5000 of them (`clustered_rows`), evenly spaced. Of
            `Images`, those and a batch are in memory at a time.
        test: `[L, ...]`, held out; of none there is no value.
        num_cells: of the k-means.
        seed: of its start.

    Raises:
        UserError: shapes that do not fit, or numbers that are not finite.

    Example:
        >>> train, test = np.random.default_rng(0).normal(size=(2, 300, 3))
        >>> data_copying(train + 0.01, train, test).value < -3
        True
    """
    from scipy.cluster.vq import kmeans2  # half a second, for which no training should wait

    if num_cells < 1:
        raise UserError(f"data_copying(num_cells={num_cells}): at least 1 is needed")
    if not len(test):
        return DataCopying(None, 0.0)
    train = Images.of(train)
    some = _flat(train.take(clustered_rows(train.shape)))
    samples, test = _flat(samples), _flat(test)
    if not samples.shape[1] == some.shape[1] == test.shape[1]:
        raise UserError("samples, training and test images differ in shape")
    rng = np.random.default_rng(seed)
    start = some[rng.choice(len(some), min(num_cells, len(some)), replace=False)]
    centres, _ = kmeans2(some, start, minit="matrix")
    ours, fresh = (_nearest(images, centres)[0] for images in (samples, test))
    cells = [
        cell
        for cell in range(len(centres))
        if (ours == cell).sum() >= _FEWEST_IN_CELL and (fresh == cell).any()
    ]
    to_samples, to_test = _within_cells(((samples, ours), (test, fresh)), cells, centres, train)
    scores, num_tested = [], []
    for cell in cells:
        distances = to_samples[ours == cell], to_test[fresh == cell]
        if np.isfinite(distances[0][0]):  # Of a cell without training images there are none.
            scores.append(_mann_whitney_z(*distances))
            num_tested.append(len(distances[1]))
    if not scores:
        return DataCopying(None, 0.0)
    value = float(np.average(scores, weights=num_tested))
    return DataCopying(value, sum(num_tested) / len(test))


def clustered_rows(shape: tuple[int, ...]) -> np.ndarray:
    """Which images of a set of this shape k-means sees: at most 5000, and at most 1 GiB of float64.

    Example:
        >>> len(clustered_rows((60_000, 32, 32, 3))), len(clustered_rows((60_000, 256, 256, 3)))
        (5000, 682)
    """
    affordable = max(_CLUSTERED_BYTES // (8 * max(math.prod(shape[1:]), 1)), 100)
    return np.arange(0, shape[0], max(-(-shape[0] // min(_CLUSTERED_IMAGES, affordable)), 1))


def _within_cells(
    sets: Sequence[tuple[np.ndarray, np.ndarray]],
    cells: Sequence[int],
    centres: np.ndarray,
    train: Images,
) -> list[np.ndarray]:
    """Of each set (images, their cells) the squared distances to the nearest training image of the
    same cell, in these cells; infinite in others, and in a cell without training images.
    """
    best = [np.full(len(images), np.inf) for images, _ in sets]
    for batch in train.batches().batches:
        block = _flat(batch)
        cell_of_train = _nearest(block, centres)[0]
        for cell in set(cells) & set(cell_of_train.tolist()):
            there = block[cell_of_train == cell]
            for (images, cell_of), least in zip(sets, best, strict=True):
                rows = cell_of == cell
                least[rows] = np.minimum(least[rows], _nearest(images[rows], there)[1])
    return best


def inauthentic(indices: np.ndarray, distances: np.ndarray, train: np.ndarray | Images) -> float:
    """Share of samples nearer to a training image than that image's nearest other one is.

        mean_j 1[|y_j - x_i| < min_{l≠i} |x_i - x_l|],    x_i the training image nearest to y_j

    It is 1 - authenticity of Alaa et al. 2022 (arXiv:2102.08921). An exact copy always counts. The
    share of *fresh* real images is not 0: it is the chance that of two neighbours each is the
    other's nearest, 2/3 on a line and falling to 1/2 with the dimension, for evenly spread data.

    Args:
        indices: `[M, k]`, from `nearest(samples, train, k=k)`; the first column counts.
        distances: `[M, k]`, likewise.
        train: `[N, ...]`, at least 2.

    Raises:
        UserError: fewer than two training images, or numbers that are not finite.

    Example:
        >>> train = np.array([[0.0], [1.0], [2.0]])
        >>> inauthentic(*nearest(np.array([[0.1], [9.0]]), train), train)
        0.5
    """
    train = Images.of(train)
    copied, of_sample = np.unique(indices[:, 0], return_inverse=True)
    # The nearest of a training image is itself, or a copy of it, at distance 0.
    apart = nearest(train.take(copied), train, k=2)[1][:, 1]
    closer = (distances[:, 0] < apart[of_sample]) | (distances[:, 0] == 0.0)
    return float(closer.mean())


def _flat(images: np.ndarray) -> np.ndarray:
    flat = np.reshape(images, (len(images), -1)).astype(np.float64)
    if not len(flat) or not np.isfinite(flat).all():
        raise UserError("there are no images, or some are not finite")
    return flat


def _nearest(images: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index and squared distance of the nearest other; unlike `nearest`, nothing is compiled,
    which for many small sets of unlike sizes would take most of the time.
    """
    blocks = squared_distances(images, others, _BLOCK_SIZE)
    found = [(block.argmin(1), block.min(1)) for _, block in blocks]
    return np.concatenate([i for i, _ in found]), np.concatenate([d for _, d in found])


def _mann_whitney_z(ours: np.ndarray, fresh: np.ndarray) -> float:
    """Distances of samples against those of test images; negative where samples are nearer."""
    # Here, because it takes a second that training does not wait for.
    from scipy.stats import rankdata

    m, n = len(ours), len(fresh)
    ranks = rankdata(np.concatenate([ours, fresh]))
    u = ranks[:m].sum() - m * (m + 1) / 2
    return float((u - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12))
