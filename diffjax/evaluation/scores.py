"""Scores of samples alone, with no real image in sight."""

from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax, logsumexp

from diffjax.errors import UserError
from diffjax.evaluation.distances import checked


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the splits, each in [1, number of classes]."""

    value: float
    standard_deviation: float


def inception_score(logits: np.ndarray, *, num_splits: int = 10, seed: int = 0) -> InceptionScore:
    """How sure a classifier is of each sample, and how many classes it finds (Salimans et al.).

        IS = exp( mean_i KL(p(y | x_i) || p(y)) ),    p(y) = mean_i p(y | x_i)

    (arXiv:1606.03498), for each of `num_splits` parts of the shuffled samples. It is 1 where all
    samples look alike to the classifier, and the number of classes where it is sure of each and
    finds all equally often. It sees no variety inside a class and knows no real image. On the
    logits of another classifier than Inception's it can't be compared with published ones.

    Args:
        logits: `[N, K]`, N >= `num_splits`.
        num_splits: parts; the score rises with the size of a part.
        seed: of the shuffle.

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


def _score(logits: np.ndarray) -> float:
    each = log_softmax(logits, axis=1)
    overall = logsumexp(each, axis=0) - np.log(len(each))
    return float(np.exp((np.exp(each) * (each - overall)).sum(1).mean()))
