"""Two tests for copies of training images: data-copying (C_T) and authenticity."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffjax.errors import UserError
from diffjax.evaluation.image_statistics import ImageSet
from diffjax.evaluation.scores.distances import squared_distances
from diffjax.evaluation.scores.neighbours import nearest_neighbours

_FEWEST_IN_CELL = 20
_CLUSTERED_IMAGES = 5000
_CLUSTERED_BYTES = 2**30
_BLOCK_SIZE = 500


class DataCopying(NamedTuple):
    """The statistic C_T, and the share of test images in the cells that it uses.

    Attributes:
        value: in standard deviations of the null hypothesis: about 0 for samples as far from the
            training set as test images are; below -3, copies; above 3, too far from it. None if
            no cell has enough samples and test images.
        tested_share: share of test images in the cells that are used, in [0, 1]; cells with too few
            samples or test images are left out.
    """

    value: float | None
    tested_share: float


def data_copying(
    samples: np.ndarray,
    train: np.ndarray | ImageSet,
    test: np.ndarray,
    *,
    num_cells: int = 5,
    seed: int = 0,
) -> DataCopying:
    """The data-copying test of Meehan, Chaudhuri & Dasgupta 2020 (arXiv:2004.05675).

        C_T = Σ_π P(π)·Z(π) / Σ_π P(π),    Z = (U - nm/2) / √(nm(n + m + 1)/12)

    Cells π are the clusters of k-means on the training set. A cell has m samples, n test images,
    and the share P of all test images. U counts its pairs of a sample and a test image in which
    the sample is farther from the cell's training images (ties count half). Cells with fewer than
    20 samples, as in the paper, or without test images are left out. In one global test, samples
    that are copies in one cell and too far away in another would cancel; here Z is computed for
    each cell first, and cancels only in the mean.

    Args:
        samples: `[M, ...]`, pixels or features.
        train: `[N, ...]`; k-means uses at most 5000 of them (`clustered_rows`), evenly spaced. With
            `ImageSet`, only those and one batch are in memory.
        test: `[L, ...]`, held-out images; without any, the value is None.
        num_cells: number of clusters of k-means; 5 is typical.
        seed: seed of the initial centres.

    Raises:
        UserError: shapes that do not fit, or numbers that are not finite.

    Example:
        >>> train, test = np.random.default_rng(0).normal(size=(2, 300, 3))
        >>> data_copying(train + 0.01, train, test).value < -3
        True
    """
    from scipy.cluster.vq import kmeans2  # This import takes half a second; trainings skip it.

    if num_cells < 1:
        raise UserError(f"data_copying(num_cells={num_cells}): at least 1 is needed")
    if not len(test):
        return DataCopying(None, 0.0)
    train = ImageSet.of(train)
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
        if np.isfinite(distances[0][0]):  # A cell without training images has no distances.
            scores.append(_mann_whitney_z(*distances))
            num_tested.append(len(distances[1]))
    if not scores:
        return DataCopying(None, 0.0)
    value = float(np.average(scores, weights=num_tested))
    return DataCopying(value, sum(num_tested) / len(test))


def clustered_rows(shape: tuple[int, ...]) -> np.ndarray:
    """Rows of the images that k-means uses: evenly spaced, at most 5000 and 1 GiB of float64.

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
    train: ImageSet,
) -> list[np.ndarray]:
    """Squared distances to the nearest training image of the same cell, for each set of images.

    A set is (images, their cells). Distances are infinite in cells that are not listed, and in
    cells without training images.
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


def inauthentic(indices: np.ndarray, distances: np.ndarray, train: np.ndarray | ImageSet) -> float:
    """Share of samples that are closer to a training image than any other training image is.

        mean_j 1[|y_j - x_i| < min_{l≠i} |x_i - x_l|],    x_i the training image nearest to y_j

    This is 1 - authenticity of Alaa et al. 2022 (arXiv:2102.08921). An exact copy always counts.
    The share for *fresh* real images is not 0: it is the probability that two neighbours are each
    other's nearest. For evenly spread data this is 2/3 on a line and falls to 1/2 with increasing
    dimension.

    Args:
        indices: `[M, k]`, from `nearest_neighbours(samples, train, k=k)`; only the first column
            is used.
        distances: `[M, k]`, likewise.
        train: `[N, ...]`, at least 2.

    Raises:
        UserError: fewer than two training images, or numbers that are not finite.

    Example:
        >>> train = np.array([[0.0], [1.0], [2.0]])
        >>> inauthentic(*nearest_neighbours(np.array([[0.1], [9.0]]), train), train)
        0.5
    """
    train = ImageSet.of(train)
    copied, of_sample = np.unique(indices[:, 0], return_inverse=True)
    # The nearest image of a training image is itself, or a copy of it, at distance 0.
    apart = nearest_neighbours(train.take(copied), train, k=2)[1][:, 1]
    closer = (distances[:, 0] < apart[of_sample]) | (distances[:, 0] == 0.0)
    return float(closer.mean())


def _flat(images: np.ndarray) -> np.ndarray:
    flat = np.reshape(images, (len(images), -1)).astype(np.float64)
    if not len(flat) or not np.isfinite(flat).all():
        raise UserError("there are no images, or some are not finite")
    return flat


def _nearest(images: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index and squared distance of the nearest of the others, computed without JAX.

    `nearest_neighbours` would compile for each of many small sets of different sizes, which would
    take most of the time.
    """
    blocks = squared_distances(images, others, _BLOCK_SIZE)
    found = [(block.argmin(1), block.min(1)) for _, block in blocks]
    return np.concatenate([i for i, _ in found]), np.concatenate([d for _, d in found])


def _mann_whitney_z(ours: np.ndarray, fresh: np.ndarray) -> float:
    """Mann-Whitney Z of two sets of distances; negative if samples are nearer than test images."""
    # Imported here because it takes a second, which trainings should not wait for.
    from scipy.stats import rankdata

    m, n = len(ours), len(fresh)
    ranks = rankdata(np.concatenate([ours, fresh]))
    u = ranks[:m].sum() - m * (m + 1) / 2
    return float((u - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12))
