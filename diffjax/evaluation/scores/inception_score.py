"""The Inception score, which depends on samples only and not on real images."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import entr, log_softmax, logsumexp, softmax

from diffjax.errors import UserError
from diffjax.evaluation.scores.distances import checked

NUM_SPLITS = 10
"""Parts of the samples, as in Salimans et al. 2016."""


class InceptionScore(NamedTuple):
    """The Inception score: its mean, in [1, number of classes], and deviation over the splits."""

    value: float
    standard_deviation: float


def inception_score(
    logits: np.ndarray, *, num_splits: int = NUM_SPLITS, seed: int = 0
) -> InceptionScore:
    """Inception score: confidence of a classifier and diversity of classes (Salimans et al. 2016).

        IS = exp( mean_i KL(p(y | x_i) || p(y)) ),    p(y) = mean_i p(y | x_i)

    (arXiv:1606.03498), for each of `num_splits` parts of the shuffled samples. It is 1 if the
    classifier predicts the same for all samples, and the number of classes if it is certain of each
    sample and all classes are equally frequent. It does not measure diversity within a class, and
    does not use real images. With logits of a classifier other than Inception it can't be compared
    with published scores.

    Args:
        logits: `[N, K]`, N >= `num_splits`.
        num_splits: number of parts; 10 is standard. The score rises with the size of a part.
        seed: seed of the shuffle.

    Raises:
        UserError: fewer samples than splits, or logits that are not finite.

    Example:
        >>> round(inception_score(20.0 * np.eye(4), num_splits=1).value, 4)
        4.0
    """
    if num_splits < 1:
        raise UserError(f"inception_score(num_splits={num_splits}): at least 1 is needed")
    logits = checked(logits, at_least=num_splits)
    order = np.random.default_rng(seed).permutation(len(logits))
    scores = [_score(part) for part in np.array_split(logits[order], num_splits)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


@dataclass(frozen=True)
class ScoreSums:
    """Sums that compute `inception_score` from batches of logits, with one row per split.

        log IS = H(p(y)) - mean_i H(p(y | x_i)),    H(p) = -Σ_y p log p

    Attributes:
        split_of: `[N]`, the split of each sample.
        num: `[S]`, samples of each split seen so far.
        probabilities: `[S, K]`, sums of p(y | x).
        entropies: `[S]`, sums of the entropy of p(y | x).
    """

    split_of: np.ndarray
    num: np.ndarray
    probabilities: np.ndarray
    entropies: np.ndarray

    @classmethod
    def none(cls, num_samples: int, num_classes: int, num_splits: int, seed: int) -> "ScoreSums":
        """Empty sums; the splits are those of `inception_score` with the same seed."""
        split_of = np.empty(num_samples, np.int32)
        order = np.random.default_rng(seed).permutation(num_samples)
        for i, rows in enumerate(np.array_split(order, num_splits)):
            split_of[rows] = i
        zeros = np.zeros(num_splits)
        return cls(split_of, zeros, np.zeros((num_splits, num_classes)), zeros)

    def add(self, start: int, logits: np.ndarray) -> "ScoreSums":
        """Returns the sums with the logits `[B, K]` of samples `start` to `start + B - 1`.

        Raises:
            UserError: logits that are not finite.
        """
        p = softmax(checked(logits, at_least=1), axis=1)
        member = self.split_of[start : start + len(p)] == np.arange(len(self.num))[:, None]
        return ScoreSums(
            self.split_of,
            self.num + member.sum(1),
            self.probabilities + member @ p,
            self.entropies + member @ entr(p).sum(1),
        )

    def score(self) -> InceptionScore:
        """The Inception score, after all samples have been added."""
        overall = entr(self.probabilities / self.num[:, None]).sum(1)
        scores = np.exp(overall - self.entropies / self.num)
        return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def _score(logits: np.ndarray) -> float:
    each = log_softmax(logits, axis=1)
    overall = logsumexp(each, axis=0) - np.log(len(each))
    return float(np.exp((np.exp(each) * (each - overall)).sum(1).mean()))
