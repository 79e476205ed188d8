"""The gradient noise scale of a loss by log-SNR: the batch size beyond which gains are small."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax import Array
from jax.flatten_util import ravel_pytree

from diffjax.compiling import jit
from diffjax.errors import UserError

EDGES = tuple(float(edge) for edge in range(-10, 11, 2))
"""Bins of log-SNR, 2 wide."""
_POOL_KEYS = 4096
_MOST_POOLS = 8

LossOf = Callable[[Any, Array], tuple[Array, Array]]
"""`(params, key) -> loss, log_snr` of one random example, scalars."""


class GradientNoiseScale(NamedTuple):
    """The gradient noise scale with its interval and its two estimators.

    Attributes:
        scale: `trace/squared_norm`, in examples; None if `squared_norm` is not positive.
        low: lower end of the 95 % interval.
        high: upper end of the 95 % interval; None if the gradient does not differ significantly
            from 0.
        trace: unbiased estimate of `tr Σ` for one example's gradient.
        squared_norm: unbiased estimate of `|G|²` for the mean gradient; it can be negative.
        examples: number of examples used.
    """

    scale: float | None
    low: float | None
    high: float | None
    trace: float
    squared_norm: float
    examples: int


def noise_scale(
    gradients: np.ndarray | Array, examples_each: int, level: float = 0.95
) -> GradientNoiseScale:
    """Estimates the simple noise scale `B = tr Σ/|G|²` from mean gradients of small batches.

    For K batches with m examples each, with mean gradients `g_k`,

        |G|² = (|Σ g_k|² - Σ |g_k|²)/(K(K - 1))
        tr Σ = m·(Σ |g_k|² - |Σ g_k|²/K)/(K - 1)

    are unbiased. They are the estimators of McCandlish et al. 2018 (arXiv:1812.06162), appendix
    A.1, for batches of m and K·m. The gradient of a batch much smaller than B is mostly noise, and
    a batch much larger than B gains little. The interval comes from a jackknife over the batches of
    1/B, which is closer to a normal distribution than B.

    Args:
        gradients: `[K, P]`, K at least 3; 16 is typical.
        examples_each: m, examples per batch.
        level: confidence level of the interval.

    Raises:
        UserError: fewer than 3 batches.

    Example:
        >>> noise_scale(np.array([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0]]), examples_each=4).scale
        6.0
    """
    count = len(gradients)
    if count < 3:
        raise UserError(f"a noise scale needs at least three batches, not {count}")
    gradients = jnp.asarray(gradients)
    # Only inner products of gradients are needed: K² numbers instead of K·P.
    gram = np.asarray(jnp.matmul(gradients, gradients.T, precision="highest"), np.float64)
    whole, own, diagonal = gram.sum(), np.trace(gram), np.diag(gram)
    square, trace = _moments(whole, own, count, examples_each)
    without = whole - 2.0 * gram.sum(axis=1) + diagonal, own - diagonal
    squares, traces = _moments(*without, count - 1, examples_each)
    inverse = squares / traces
    spread = np.sqrt((count - 1) / count * np.sum((inverse - np.mean(inverse)) ** 2))
    half = scipy.special.stdtrit(count - 1, 0.5 + 0.5 * level) * spread
    scale, low, high = (_inverse(square / trace + shift) for shift in (0.0, half, -half))
    return GradientNoiseScale(scale, low, high, float(trace), float(square), count * examples_each)


def _moments(whole: Any, own: Any, count: int, examples_each: int) -> tuple[Any, Any]:
    """`|G|²` and `tr Σ` from `|Σ g_k|²` and `Σ |g_k|²`."""
    square = (whole - own) / (count * (count - 1))
    return square, examples_each * (own - whole / count) / (count - 1)


def _inverse(value: Any) -> float | None:
    return float(1.0 / value) if value > 0 else None


@dataclass(frozen=True)
class NoiseByLogSNR:
    """Gradient noise scales of a model's loss by log-SNR.

    Attributes:
        edges: `[K+1]`, edges of the bins of log-SNR, ascending.
        bins: `[K]`, noise scale of each bin; None if training has too few examples there.
        share: `[K]`, share of the training examples in each bin.
    """

    edges: tuple[float, ...]
    bins: tuple[GradientNoiseScale | None, ...]
    share: tuple[float, ...]


def noise_by_log_snr(
    loss_of: LossOf,
    params: Any,
    key: Array,
    *,
    edges: Sequence[float] = EDGES,
    num_batches: int = 16,
    batch_size: int = 16,
) -> NoiseByLogSNR:
    """Measures the gradient noise scale for examples of each bin of log-SNR.

    Examples are drawn as in training and sorted into bins by their log-SNR. They are not
    reweighted, so the scale of a bin is the batch size for examples of that bin only.

    Args:
        loss_of: the loss of one random example; its log-SNR must not depend on `params`.
        params: parameters at which the gradient is computed.
        key: random key of the examples.
        edges: edges of the bins of log-SNR, ascending.
        num_batches: small batches per bin, at least 3; 16 is typical.
        batch_size: examples in each of them; 16 is typical.

    Returns:
        Scales by bin; None for bins with fewer than `num_batches·batch_size` of 32,768 examples.

    Raises:
        UserError: a gradient is not finite.
    """
    log_snr_of = jax.jit(jax.vmap(lambda key: loss_of(params, key)[1]))

    @jit
    def gradient(params: Any, keys: Array) -> Array:
        def mean_loss(params: Any) -> Array:
            return jnp.mean(jax.vmap(lambda key: loss_of(params, key)[0])(keys))

        return ravel_pytree(jax.grad(mean_loss)(params))[0].astype(jnp.float32)

    needed = num_batches * batch_size
    keys = jax.random.split(key, _MOST_POOLS * _POOL_KEYS)
    levels = np.concatenate(
        [np.asarray(log_snr_of(pool)) for pool in keys.reshape(_MOST_POOLS, _POOL_KEYS)]
    )
    bins, share = [], []
    for low, high in pairwise(edges):
        inside = np.flatnonzero((levels >= low) & (levels < high))
        share.append(len(inside) / len(levels))
        if len(inside) < needed:
            bins.append(None)
            continue
        rows = inside[:needed].reshape(num_batches, batch_size)
        gradients = jnp.stack([gradient(params, keys[row]) for row in rows])
        if not jnp.isfinite(gradients).all():
            raise UserError(
                f"a gradient at log-SNR {low:g} … {high:g} is not finite: has training diverged?"
            )
        bins.append(noise_scale(gradients, batch_size))
    return NoiseByLogSNR(tuple(edges), tuple(bins), tuple(share))
