"""Distances between two sets of feature vectors, in float64 on the host."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from diffjax.errors import UserError

FEWEST_IMAGES = 3
"""Smallest number of images for which the kernel distance has a standard error."""


class Statistics(NamedTuple):
    """Mean `[F]` and covariance `[F, F]` (divided by n - 1), float64, of n feature vectors."""

    mean: np.ndarray
    cov: np.ndarray
    n: int


def statistics(features: np.ndarray) -> Statistics:
    """Mean and covariance of features `[N, F]`.

    Raises:
        UserError: fewer than two vectors, or vectors that are not finite.

    Example:
        >>> statistics(np.array([[0.0, 1.0], [2.0, 1.0]])).cov.tolist()
        [[2.0, 0.0], [0.0, 0.0]]
    """
    features = checked(features, at_least=2)
    return Statistics(
        features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)), len(features)
    )


def frechet_distance(
    mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray
) -> float:
    """Squared Fréchet (2-Wasserstein) distance between two Gaussians.

        d² = |m1 - m2|² + tr C1 + tr C2 - 2 tr (C1^½ C2 C1^½)^½

    On Inception features this is FID (Heusel et al. 2017, arXiv:1706.08500).
    The last trace is the sum of the roots of the eigenvalues of a symmetric matrix, so singular
    covariances (fewer images than features) need no special treatment.

    Args:
        mean_1: `[F]`.
        cov_1: `[F, F]`, symmetric, no negative eigenvalues.
        mean_2: as `mean_1`.
        cov_2: as `cov_1`.

    Returns:
        The distance, at least 0, in squared units of the features.

    Raises:
        UserError: shapes that do not fit, or numbers that are not finite.

    Example:
        >>> frechet_distance(np.zeros(2), np.eye(2), np.array([3.0, 0.0]), 4.0 * np.eye(2))
        11.0
    """
    arrays = [np.asarray(a, np.float64) for a in (mean_1, cov_1, mean_2, cov_2)]
    mean_1, cov_1, mean_2, cov_2 = arrays
    if mean_1.ndim != 1 or not mean_1.shape * 2 == cov_1.shape == cov_2.shape == mean_2.shape * 2:
        raise UserError(f"Fréchet distance of shapes {[a.shape for a in arrays]}")
    if not all(np.isfinite(a).all() for a in arrays):
        raise UserError("Fréchet distance of statistics that are not finite")
    return frechet_distance_from_root(mean_1, cov_1, symmetric_root(cov_1), mean_2, cov_2)


def frechet_distance_from_root(
    mean_1: Float[np.ndarray, " features"],
    cov_1: Float[np.ndarray, " features features"],
    root_1: Float[np.ndarray, " features features"],
    mean_2: Float[np.ndarray, " features"],
    cov_2: Float[np.ndarray, " features features"],
) -> float:
    """`frechet_distance` without checks, with `root_1 = symmetric_root(cov_1)` as an argument.

    Computing the root is most of the work, so it can be shared by many second Gaussians.
    """
    eigenvalues = np.linalg.eigvalsh(root_1 @ cov_2 @ root_1)
    cross = np.sqrt(np.maximum(eigenvalues, 0.0)).sum()
    squared = np.sum((mean_1 - mean_2) ** 2) + np.trace(cov_1) + np.trace(cov_2) - 2.0 * cross
    return float(max(squared, 0.0))


class KernelDistance(NamedTuple):
    """An estimate of the kernel distance, its standard error, and the vectors used of each set."""

    value: float
    standard_error: float
    num_1: int
    num_2: int


def kernel_distance(
    features_1: np.ndarray, features_2: np.ndarray, *, seed: int = 0, max_images: int = 5000
) -> KernelDistance:
    """Squared maximum mean discrepancy under a cubic kernel, unbiased.

        k(x, y) = (x·y / F + 1)³
        MMD² = mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j)

    On Inception features this is the kernel inception distance, KID (Bińkowski et al. 2018,
    arXiv:1801.01401). The paper reports the mean over random subsets of 1000; here all pairs are
    used together, which estimates the same number with less variance. Its expectation does not
    depend on the number of images, and is 0 for two samples of one distribution, so small negative
    values are normal.

    The standard error is that of the two-sample jackknife (Arvesen 1969, Ann. Math. Stat. 40). It
    includes the choice of images of both sets, and is conservative (too large) near 0.

    Args:
        features_1: `[N1, F]`.
        features_2: `[N2, F]`.
        seed: seed of the random subset, if a set has more than `max_images`.
        max_images: largest number of images used of each set; the cost grows with its square (5000
            x 128 takes about 2 s).

    Raises:
        UserError: fewer than 3 vectors in a set, other widths, or vectors that are not finite.

    Example:
        >>> features = np.random.default_rng(0).normal(size=(2, 200, 4))
        >>> kernel_distance(features[0], features[1] + 1.0).value > 1.0
        True
    """
    if max_images < FEWEST_IMAGES:
        raise UserError(f"kernel_distance(max_images={max_images}): at least 3 are needed")
    rng = np.random.default_rng(seed)
    x = _subset(checked(features_1, at_least=FEWEST_IMAGES), max_images, rng)
    y = _subset(checked(features_2, at_least=FEWEST_IMAGES), max_images, rng)
    if x.shape[1] != y.shape[1]:
        raise UserError(f"features of different widths, {x.shape[1]} and {y.shape[1]}")
    m, n = len(x), len(y)
    rows_x, rows_y = _within(x), _within(y)
    cross = _kernel(x, y)
    cross_x, cross_y = cross.sum(1), cross.sum(0)

    def estimate(sum_x, m, sum_y, n, sum_cross):
        return sum_x / (m * (m - 1)) + sum_y / (n * (n - 1)) - 2.0 * sum_cross / (m * n)

    sum_x, sum_y, sum_cross = rows_x.sum(), rows_y.sum(), cross_x.sum()
    value = estimate(sum_x, m, sum_y, n, sum_cross)
    # Each vector occurs in a row and in a column, hence the factor 2.
    without_x = estimate(sum_x - 2.0 * rows_x, m - 1, sum_y, n, sum_cross - cross_x)
    without_y = estimate(sum_x, m, sum_y - 2.0 * rows_y, n - 1, sum_cross - cross_y)
    variance = (m - 1) * without_x.var() + (n - 1) * without_y.var()
    return KernelDistance(float(value), float(np.sqrt(variance)), m, n)


def gaussian_kernel_distance(
    features_1: np.ndarray,
    features_2: np.ndarray,
    *,
    sigma: float = 10.0,
    scale: float = 1000.0,
    block_size: int = 1000,
) -> float:
    """Squared maximum mean discrepancy under a Gaussian kernel over all pairs, times a scale.

        k(x, y) = exp(-|x - y|² / 2σ²)
        MMD² = mean_{ij} k(x_i, x_j) + mean_{ij} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j)

    On CLIP embeddings of length 1 these defaults are CMMD (Jayasumana et al. 2024,
    arXiv:2401.09603; `diffjax.evaluation.extractors.clip`); on other features the result is not
    CMMD. Each vector also forms a pair with itself, as in their code, so the result is at least 0
    and biased upwards: by `scale · (1 - E k)(1/N1 + 1/N2)` for equal distributions. If σ is far
    from the typical distance of two vectors, the distance is not sensitive.

    Args:
        features_1: `[N1, F]`.
        features_2: `[N2, F]`.
        sigma: width of the kernel, in units of the features; 10 in CMMD.
        scale: factor of the result; 1000 in CMMD.
        block_size: vectors per block; `block_size * max(N1, N2)` kernel values are in memory.

    Raises:
        UserError: sigma not positive, other widths, or vectors that are not finite.

    Example:
        >>> near = gaussian_kernel_distance(np.zeros((2, 1)), np.full((3, 1), 10.0), scale=1.0)
        >>> round(near, 4)  # 2 - 2 exp(-1/2)
        0.7869
    """
    if sigma <= 0.0 or block_size < 1:
        raise UserError(f"gaussian_kernel_distance(sigma={sigma}, block_size={block_size})")
    x, y = checked(features_1, at_least=1), checked(features_2, at_least=1)
    if x.shape[1] != y.shape[1]:
        raise UserError(f"features of different widths, {x.shape[1]} and {y.shape[1]}")

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        blocks = squared_distances(a, b, block_size)
        return sum(np.exp(-d / (2.0 * sigma**2)).sum() for _, d in blocks) / (len(a) * len(b))

    return float(scale * (mean(x, x) + mean(y, y) - 2.0 * mean(x, y)))


def squared_distances(
    x: Float64[np.ndarray, " n features"], y: Float64[np.ndarray, " m features"], block_size: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields the squared distances of `x` `[N, F]` to `y` `[M, F]` in blocks of rows, `[b, M]`.

    Args:
        x: float64.
        y: float64.
        block_size: rows b of a block; the last may have fewer.

    Yields:
        The rows of `x` of a block as a slice, and their distances.
    """
    squares_y = np.einsum("ij,ij->i", y, y)
    for start in range(0, len(x), block_size):
        rows = slice(start, start + block_size)
        block = x[rows]
        squared = np.einsum("ij,ij->i", block, block)[:, None] + squares_y - 2.0 * block @ y.T
        yield rows, np.maximum(squared, 0.0)


def symmetric_root(
    matrix: Float[np.ndarray, " features features"],
) -> Float[np.ndarray, " features features"]:
    """The symmetric square root of a positive semi-definite matrix `[F, F]`."""
    eigenvalues, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(eigenvalues, 0.0))) @ vectors.T


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    inner = x @ y.T / x.shape[1] + 1.0
    return inner * inner * inner


def _within(x: Float64[np.ndarray, " n features"]) -> Float64[np.ndarray, " n"]:
    """Row sums of the kernel matrix of a set with itself, without its diagonal."""
    kernel = _kernel(x, x)
    return kernel.sum(1) - np.diagonal(kernel)


def _subset(features: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    if len(features) <= most:
        return features
    return features[np.sort(rng.choice(len(features), most, replace=False))]


def checked(features: np.ndarray, at_least: int) -> Float64[np.ndarray, " n features"]:
    """Checks features and converts them to float64 `[N, F]`.

    Raises:
        UserError: the shape is not `[N, F]`, N < `at_least`, or some vectors are not finite.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2:
        raise UserError(f"features must be [N, F], not {list(features.shape)}")
    if len(features) < at_least:
        raise UserError(f"{len(features)} images are too few: at least {at_least} are needed")
    bad = int((~np.isfinite(features)).any(1).sum())
    if bad:
        raise UserError(f"{bad} of {len(features)} feature vectors are not finite")
    return features
