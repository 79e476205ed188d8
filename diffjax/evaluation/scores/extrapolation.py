"""Extrapolates the Fréchet distance to infinitely many samples."""

from typing import NamedTuple

import numpy as np

from diffjax.errors import UserError
from diffjax.evaluation.scores.distances import (
    Statistics,
    checked,
    frechet_distance_from_root,
    statistics,
    symmetric_root,
)

SPLITS = (1, 2, 4)
"""Numbers of equal parts into which the samples are divided; each is one point of the fit."""
_NUM_GROUPS = 10


class ExtrapolatedDistance(NamedTuple):
    """The intercept of a line fitted to Fréchet distances as a function of 1/n.

    Attributes:
        value: the distance at 1/n = 0; it can be negative if the true distance is near 0.
        standard_error: standard error of the value, from a jackknife over ten groups of samples.
        sizes: samples per part, for each point of the line.
        distances: mean Fréchet distance of the parts of each size.
    """

    value: float
    standard_error: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


def fewest_samples(num_features: int) -> int:
    """Smallest number of samples for `extrapolated_distance`.

    Its smallest part must have three times as many samples as features; with fewer, the distance
    is not linear enough in 1/n.
    """
    # One group more, because the jackknife leaves one out.
    return -(-3 * num_features * max(SPLITS) * _NUM_GROUPS // (_NUM_GROUPS - 1)) + max(SPLITS)


def extrapolated_distance(
    features: np.ndarray, reference: Statistics, *, seed: int = 0
) -> ExtrapolatedDistance:
    """Fréchet distance at infinitely many samples, by a linear fit in 1/n (Chong & Forsyth 2020).

        E[d²_n] = d²_∞ + c/n + O(1/n²),    n = N, N/2, N/4

    The bias of the distance at n samples falls as 1/n, and c depends on the model, so models can
    be ranked wrongly even at equal n. The intercept has no bias of order 1/n (arXiv:1911.07023).
    The paper draws 15 overlapping subsets. Here all samples are split at random into equal parts,
    and the distances of parts of one size are averaged: each size uses each sample once, so errors
    that all sizes share do not change the slope. The bias from the finite number of reference
    images remains.

    Args:
        features: `[N, F]` of the samples; N at least `fewest_samples(F)`, about 13 F.
        reference: mean and covariance of the features of real images.
        seed: seed of the random split.

    Raises:
        UserError: too few samples, another width than the reference's, or not finite.

    Example:
        >>> features = np.random.default_rng(0).normal(size=(4000, 2))
        >>> found = extrapolated_distance(features, Statistics(np.zeros(2), np.eye(2), 1))
        >>> found.sizes, abs(found.value) < 3 * found.standard_error
        ((4000, 2000, 1000), True)
    """
    features = checked(features, at_least=2)
    if reference.cov.shape != (features.shape[1],) * 2:
        raise UserError(
            f"features of different widths, {features.shape[1]} and {len(reference.cov)}"
        )
    needed = fewest_samples(features.shape[1])
    if len(features) < needed:
        raise UserError(
            f"extrapolating the distance of {features.shape[1]} features needs at least {needed} "
            f"samples, not {len(features)}"
        )
    features = features[np.random.default_rng(seed).permutation(len(features))]
    root = symmetric_root(reference.cov)
    distances = _distances(features, reference, root)
    # Every tenth sample, so that each part loses the same share.
    group = np.arange(len(features)) % _NUM_GROUPS
    without = [
        _intercept(_distances(rest, reference, root), len(rest))
        for rest in (features[group != i] for i in range(_NUM_GROUPS))
    ]
    return ExtrapolatedDistance(
        value=_intercept(distances, len(features)),
        standard_error=float(np.sqrt((_NUM_GROUPS - 1) * np.var(without))),
        sizes=tuple(len(features) // parts for parts in SPLITS),
        distances=tuple(distances),
    )


def _distances(features: np.ndarray, real: Statistics, root: np.ndarray) -> list[float]:
    """Mean Fréchet distance of the parts, for each number of parts in `SPLITS`."""
    means = []
    for num_parts in SPLITS:
        parts = [statistics(part) for part in np.array_split(features, num_parts)]
        distances = [
            frechet_distance_from_root(real.mean, real.cov, root, part.mean, part.cov)
            for part in parts
        ]
        means.append(float(np.mean(distances)))
    return means


def _intercept(distances: list[float], num_samples: int) -> float:
    return float(np.polyfit([parts / num_samples for parts in SPLITS], distances, 1)[1])
