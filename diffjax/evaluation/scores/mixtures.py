"""Metrics with respect to a known distribution, for mixtures of Gaussians and other toy data."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr

from diffjax.errors import UserError
from diffjax.evaluation.scores.distances import checked
from diffjax.oracle.analytic import GaussianMixture
from diffjax.process.paths import Linear


class SlicedDistance(NamedTuple):
    """A sliced Wasserstein distance, and the distances along its directions.

    Attributes:
        value: root of the mean of `squared`, in units of the samples.
        squared: `[L]`, squared distance along each direction.
        directions: `[L, d]`, unit vectors.
    """

    value: float
    squared: np.ndarray
    directions: np.ndarray


def sliced_wasserstein(
    samples_1: np.ndarray, samples_2: np.ndarray, *, num_directions: int = 100, seed: int = 0
) -> SlicedDistance:
    """Sliced 2-Wasserstein distance of two empirical distributions (Bonneel et al. 2015).

        SW² = mean_u W²(<u, x>, <u, y>),    W² = ∫_0^1 (F_x⁻¹(q) - F_y⁻¹(q))² dq

    over directions u drawn evenly from the unit sphere (J. Math. Imaging Vis. 51; first Rabin et
    al. 2011). Each W is exact, also for different numbers of samples; only the directions are
    random. The distance of two finite sets from the same distribution is not 0 but about N^-½.

    Args:
        samples_1: `[N, ...]`, d numbers each.
        samples_2: `[M, ...]`, d numbers each.
        num_directions: L, number of random directions; 100 is typical. In one dimension all are
            the same.
        seed: seed of the directions.

    Raises:
        UserError: no samples or directions, shapes that do not fit, or numbers not finite.

    Example:
        >>> found = sliced_wasserstein(np.array([[0.0], [1.0]]), np.array([[2.0]]))
        >>> round(found.value**2, 6)  # (2² + 1²) / 2
        2.5
    """
    x, y = (checked(np.reshape(s, (len(s), -1)), at_least=1) for s in (samples_1, samples_2))
    if x.shape[1] != y.shape[1]:
        raise UserError(f"samples of different widths, {x.shape[1]} and {y.shape[1]}")
    directions = _directions(num_directions, x.shape[1], seed)
    squared = np.array([_squared_distance(x @ u, y @ u) for u in directions])
    return SlicedDistance(float(np.sqrt(squared.mean())), squared, directions)


def sliced_wasserstein_to(
    data: GaussianMixture, samples: np.ndarray, *, num_directions: int = 100, seed: int = 0
) -> SlicedDistance:
    """Sliced 2-Wasserstein distance between samples and a mixture, without drawing from it.

        W² = mean_i x_i² - 2 Σ_i x_(i) ∫_{(i-1)/N}^{i/N} F⁻¹(q) dq + E z²

    along each direction, where z is a one-dimensional mixture. Its quantiles are found numerically,
    and its mean between two of them has a closed form. As in `sliced_wasserstein`, only the
    directions are random, and the distance of N exact draws is not 0 but about N^-½.

    Args:
        data: a mixture whose covariances have no eigenvalue 0.
        samples: `[N, ...]` of the mixture's shape.
        num_directions: as in `sliced_wasserstein`, which has the same ones for the same seed.
        seed: the seed of the directions.

    Raises:
        UserError: another shape, no directions, or numbers not finite.

    Example:
        >>> unit = GaussianMixture(jnp.ones(1), jnp.zeros((1, 1)), jnp.ones((1, 1, 1)))
        >>> found = sliced_wasserstein_to(unit, np.array([[3.0]]), num_directions=1)
        >>> round(found.value**2, 6)  # one point: E (3 - z)² = 9 + 1
        10.0
    """
    if samples.shape[1:] != data.means.shape[1:]:
        raise UserError(
            f"samples of this mixture are {list(data.means.shape[1:])}, not "
            f"{list(samples.shape[1:])}"
        )
    x = checked(np.reshape(samples, (len(samples), -1)), at_least=1)
    weights, means, covariances = (
        np.asarray(part, np.float64) for part in (data.weights, data.means, data.covariances)
    )
    means, directions = means.reshape(len(means), -1), _directions(num_directions, x.shape[1], seed)
    squared = np.array([
        _squared_distance_to(x @ u, weights, means @ u, np.sqrt((covariances @ u) @ u))
        for u in directions
    ])  # fmt: skip
    return SlicedDistance(float(np.sqrt(squared.mean())), squared, directions)


class ModeWeights(NamedTuple):
    """Share of the samples in each component of a mixture.

    Attributes:
        found: `[K]`, the shares of the samples; they sum to 1.
        exact: `[K]`, the mixture's own weights.
        standard_error: `[K]`, standard error of `found`.
        total_variation: half the sum of absolute differences, in [0, 1].
    """

    found: np.ndarray
    exact: np.ndarray
    standard_error: np.ndarray
    total_variation: float


def mode_weights(samples: np.ndarray, data: GaussianMixture) -> ModeWeights:
    """Weights of the modes in samples of a mixture, compared with its own weights.

        found_k = mean_j p(k | y_j),    p(k | y) = w_k N(y; m_k, C_k) / Σ_i w_i N(y; m_i, C_i)

    For exact samples of the mixture the expectation of `found` is w, even if the components
    overlap. (Counting the most likely component of each sample would be biased.) If the components
    overlap, `found` is biased towards w for other samples. It does not measure the shape of the
    modes; `sliced_wasserstein` does.

    Args:
        samples: `[N, ...]` of the mixture's shape, N >= 2.
        data: a mixture whose covariances have no eigenvalue 0.

    Raises:
        UserError: another shape, too few samples, or samples that no component can have made.

    Example:
        >>> two = GaussianMixture(
        ...     jnp.array([0.5, 0.5]), jnp.array([[-9.0], [9.0]]), jnp.ones((2, 1, 1))
        ... )
        >>> mode_weights(np.array([[-9.0], [9.0], [8.0], [10.0]]), two).found.tolist()
        [0.25, 0.75]
    """
    if samples.shape[1:] != data.means.shape[1:] or len(samples) < 2:
        raise UserError(
            f"mode_weights needs at least 2 samples {list(data.means.shape[1:])}, "
            f"not {list(samples.shape)}"
        )
    shares = np.asarray(_responsibilities(data, jnp.asarray(samples)), np.float64)
    if not np.isfinite(shares).all():
        raise UserError("some samples are not finite, or a covariance of the mixture is singular")
    found, exact = shares.mean(0), np.asarray(data.weights, np.float64)
    error = shares.std(0, ddof=1) / np.sqrt(len(shares))
    return ModeWeights(found, exact, error, float(0.5 * np.abs(found - exact).sum()))


@jax.jit
def _responsibilities(data: GaussianMixture, samples: jax.Array) -> jax.Array:
    return data.responsibilities(Linear(), samples, jnp.zeros(len(samples)))


def _squared_distance(x: np.ndarray, y: np.ndarray) -> float:
    """The squared 2-Wasserstein distance of two sets of numbers, `[N]` and `[M]`."""
    x, y = np.sort(x), np.sort(y)
    # Both quantile functions are steps; between two ends of steps both are constant. In units of
    # 1/NM the ends are whole numbers.
    ends = np.union1d(np.arange(1, len(x) + 1) * len(y), np.arange(1, len(y) + 1) * len(x))
    lengths = np.diff(ends, prepend=0) / (len(x) * len(y))
    gaps = x[(ends - 1) // len(y)] - y[(ends - 1) // len(x)]
    return float(lengths @ gaps**2)


def _squared_distance_to(
    x: np.ndarray, weights: np.ndarray, means: np.ndarray, deviations: np.ndarray
) -> float:
    """The squared 2-Wasserstein distance of numbers `[N]` from a normal mixture, `[K]` each."""
    ends = _quantiles(np.arange(1, len(x)) / len(x), weights, means, deviations)
    z = (ends[:, None] - means) / deviations
    # Up to each end, ∫ z f(z) dz of every component.
    below = (means * ndtr(z) - deviations * _normal(z)) @ weights
    parts = np.diff(np.concatenate([[0.0], below, [weights @ means]]))
    square = weights @ (means**2 + deviations**2)
    return float(max(np.mean(x**2) - 2.0 * np.sort(x) @ parts + square, 0.0))


def _quantiles(
    shares: np.ndarray, weights: np.ndarray, means: np.ndarray, deviations: np.ndarray
) -> np.ndarray:
    """Quantiles of a one-dimensional mixture; `shares` are ascending in (0, 1)."""
    # So dense that a few Newton steps from between two of them converge.
    places = np.unique(means + deviations * np.linspace(-9.0, 9.0, 401)[:, None])
    levels = ndtr((places[:, None] - means) / deviations) @ weights
    right = np.clip(np.searchsorted(levels, shares), 1, len(places) - 1)
    low, high, found = places[right - 1], places[right], np.interp(shares, levels, places)
    for _ in range(5):
        z = (found[:, None] - means) / deviations
        slope = _normal(z) @ (weights / deviations)
        step = (ndtr(z) @ weights - shares) / np.maximum(slope, np.finfo(float).tiny)
        found = np.clip(found - step, low, high)
    return found


def _normal(z: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi)


def _directions(num: int, width: int, seed: int) -> np.ndarray:
    """Random directions `[L, d]`, uniform on the unit sphere."""
    if num < 1:
        raise UserError(f"num_directions={num}: a sliced distance needs at least 1")
    directions = np.random.default_rng(seed).normal(size=(num, width))
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)
