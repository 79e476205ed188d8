"""Precision, recall, density and coverage: separate measures of fidelity and diversity.

They are computed in float64 on the host.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from diffjax.errors import UserError
from diffjax.evaluation.scores.distances import checked, squared_distances


class ManifoldScores(NamedTuple):
    """Precision, recall, density and coverage of samples with respect to real images.

    Attributes:
        precision: share of samples that lie in the ball of some real vector, in [0, 1].
        recall: share of real vectors that lie in the ball of some sample, in [0, 1].
        density: mean number of real balls that contain a sample, divided by k; near 1 for equal
            distributions, and can be larger.
        coverage: share of real vectors whose ball contains a sample, in [0, 1].
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_scores(
    real: np.ndarray, samples: np.ndarray, *, k: int = 5, block_size: int = 1000
) -> ManifoldScores:
    """Precision and recall of Kynkäänniemi et al., density and coverage of Naeem et al.

    With `B(v)` the open ball around v up to the k-th nearest other vector of v's own set,

        precision = mean_j 1[∃i: y_j ∈ B(x_i)]      recall   = mean_i 1[∃j: x_i ∈ B(y_j)]
        density   = mean_j Σ_i 1[y_j ∈ B(x_i)] / k  coverage = mean_i 1[∃j: y_j ∈ B(x_i)]

    for real vectors x and samples y (arXiv:1904.06991; arXiv:2002.09797, whose package `prdc` uses
    open balls too). All four depend on k, and all but density depend on the numbers of vectors, so
    use equal numbers. For equal distributions and n vectors each, coverage is near `1 - 2^-k`. An
    outlier among the real vectors has a large ball and increases precision; density and coverage
    are less sensitive to it.

    Args:
        real: `[N, F]`, N > k.
        samples: `[M, F]`, M > k.
        k: the radius of a ball is the distance to the k-th nearest neighbour; Kynkäänniemi et al.
            use 3, Naeem et al. 5.
        block_size: vectors per block; `block_size * max(N, M)` distances are in memory.

    Raises:
        UserError: k below 1, at most k vectors in a set, different widths, or not finite.

    Example:
        >>> line = np.arange(6.0)[:, None]
        >>> manifold_scores(line, line + 0.5, k=1)
        ManifoldScores(precision=1.0, recall=1.0, density=1.8333333333333333, coverage=1.0)
    """
    if k < 1 or block_size < 1:
        raise UserError(f"manifold_scores(k={k}, block_size={block_size}): both must be at least 1")
    real, samples = checked(real, at_least=k + 1), checked(samples, at_least=k + 1)
    if real.shape[1] != samples.shape[1]:
        raise UserError(f"features of different widths, {real.shape[1]} and {samples.shape[1]}")
    # Distances are only compared, so squared distances are enough.
    real_radii, sample_radii = (_radii(x, k, block_size) for x in (real, samples))
    num_balls = np.zeros(len(samples), int)
    recalled, covered = np.zeros((2, len(real)), bool)
    for rows, squared in squared_distances(real, samples, block_size):
        inside = squared < real_radii[rows, None]
        num_balls += inside.sum(0)
        covered[rows] = inside.any(1)
        recalled[rows] = (squared < sample_radii).any(1)
    return ManifoldScores(
        precision=float((num_balls > 0).mean()),
        recall=float(recalled.mean()),
        density=float(num_balls.mean() / k),
        coverage=float(covered.mean()),
    )


def _radii(
    features: Float64[np.ndarray, " n features"], k: int, block_size: int
) -> Float64[np.ndarray, " n"]:
    """`[N]`, the squared distance of each vector to its k-th nearest other one."""
    radii = np.empty(len(features))
    for rows, squared in squared_distances(features, features, block_size):
        # A vector is not its own neighbour; a copy of it is.
        squared[np.arange(len(squared)), np.arange(rows.start, rows.start + len(squared))] = np.inf
        radii[rows] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    return radii
