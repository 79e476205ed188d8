"""Means and covariances of vectors that come in batches and do not fit in memory."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from diffjax.errors import UserError
from diffjax.evaluation.scores.distances import Statistics, checked


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of vectors that come in batches, in float64.

        m = m_a + (m_b - m_a) n_b/n,    S = S_a + S_b + (m_b - m_a)(m_b - m_a)ᵀ n_a n_b/n

    (Chan, Golub & LeVeque 1983, *Algorithms for computing the sample variance*). Only centred
    values are squared, so precision is not lost if the mean is much larger than the deviations.

    Attributes:
        n: number of vectors.
        mean: `[F]`.
        scatter: `[F, F]`, the sum of outer products of deviations from the mean.
    """

    n: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def none(cls, num_features: int) -> "Moments":
        """The moments of no vectors."""
        return cls(0, np.zeros(num_features), np.zeros((num_features, num_features)))

    @classmethod
    def of(cls, batches: Iterable[np.ndarray]) -> "Moments":
        """The moments of all vectors in batches `[B, F]`.

        Raises:
            UserError: no batch, other widths, or vectors that are not finite.

        Example:
            >>> x = np.random.default_rng(0).normal(1e6, 1.0, (1000, 2))
            >>> found = Moments.of(x[i : i + 64] for i in range(0, 1000, 64)).statistics()
            >>> bool(np.allclose(found.cov, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9))
            True
        """
        total = None
        for batch in batches:
            total = (total or cls.none(batch.shape[-1])).add(batch)
        if total is None:
            raise UserError("there are no vectors to take moments of")
        return total

    def add(self, batch: np.ndarray) -> "Moments":
        """Returns the moments with the vectors `[B, F]` of one more batch.

        Raises:
            UserError: another width, or vectors that are not finite.
        """
        batch = checked(batch, at_least=0)
        if not len(batch):
            return self
        mean = batch.mean(0)
        deviations = batch - mean
        return self.merge(Moments(len(batch), mean, deviations.T @ deviations))

    def merge(self, other: "Moments") -> "Moments":
        """Returns the moments of the vectors of both.

        Raises:
            UserError: the widths differ.
        """
        if self.mean.shape != other.mean.shape:
            raise UserError(f"features of different widths, {len(self.mean)} and {len(other.mean)}")
        n = self.n + other.n
        if not n:
            return self
        gap = other.mean - self.mean
        scatter = self.scatter + other.scatter
        scatter += np.outer(gap, gap) * (self.n * other.n / n)
        return Moments(n, self.mean + gap * (other.n / n), scatter)

    def statistics(self) -> Statistics:
        """Mean and covariance of all vectors; equal to `distances.statistics` of all together.

        Raises:
            UserError: fewer than two vectors.
        """
        if self.n < 2:
            raise UserError(f"{self.n} images are too few: at least 2 are needed")
        return Statistics(self.mean, self.scatter / (self.n - 1), self.n)
