"""Statistical tests between arms with several training seeds: intervals, p-values, verdicts."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import scipy.special

_MOST_SEEDS = 1_000


class ConfidenceInterval(NamedTuple):
    """A mean with the ends of its confidence interval."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """The difference of two arms over the seeds that they share.

    Attributes:
        interval: confidence interval of the mean difference, for this pair alone.
        p: two-sided p-value of Student's paired test, with Holm's correction for all pairs of arms.
        decided: whether `p` is significant.
        seeds: number of seeds for a power of 0.8, if mean and deviation of the difference are the
            measured ones; None if more than 1,000.
    """

    interval: ConfidenceInterval
    p: float
    decided: bool
    seeds: int | None


def mean_interval(
    values: Sequence[float],
    level: float = 0.95,
    *,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> ConfidenceInterval:
    """The mean of a few values with Student's interval; verdicts use this interval.

    Args:
        values: one value for each training seed.
        level: coverage of the interval; 0.95 is typical.
        bounds: smallest and largest possible value. The interval is clipped to them, which does
            not change its coverage. With only one value, the interval is infinite.

    Example:
        >>> [round(x, 2) for x in mean_interval([1.0, 2.0, 3.0])]
        [2.0, -0.48, 4.48]
        >>> [round(x, 2) for x in mean_interval([0.9, 0.95], bounds=(0.0, 1.0))]
        [0.93, 0.61, 1.0]
    """
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return ConfidenceInterval(mean, -np.inf, np.inf)
    half = float(
        scipy.special.stdtrit(n - 1, 0.5 + 0.5 * level) * np.std(values, ddof=1) / np.sqrt(n)
    )
    return ConfidenceInterval(mean, max(mean - half, bounds[0]), min(mean + half, bounds[1]))


def bootstrap_interval(
    values: Sequence[Sequence[float]] | np.ndarray,
    level: float = 0.95,
    *,
    num_resamples: int = 2_000,
    seed: int = 0,
) -> ConfidenceInterval:
    """The mean of a table of values with a percentile bootstrap interval.

    Rows (training seeds) and columns (noise seeds) are resampled independently with replacement
    (the pigeonhole bootstrap, Owen 2007, Annals of Applied Statistics 1). With few rows it is too
    narrow: for 3 normal values in one column the coverage of its 95 % interval is 74 %, for 10
    values 90 %. The coverage of `mean_interval` is 95 %.

    Args:
        values: `[S, G]`: a row for each training seed, a column for each noise seed.
        level: nominal coverage of the interval; 0.95 is typical.
        num_resamples: number of bootstrap resamples; 2,000 is typical.
        seed: seed of the resampling.

    Example:
        >>> [round(x, 1) for x in bootstrap_interval([[1.0], [2.0], [3.0]])]
        [2.0, 1.0, 3.0]
    """
    table = np.asarray(values, float)
    mean, (rows, columns) = float(table.mean()), table.shape
    if rows < 2:
        return ConfidenceInterval(mean, -np.inf, np.inf)
    rng = np.random.default_rng(seed)
    row = rng.integers(rows, size=(num_resamples, rows, 1))
    column = rng.integers(columns, size=(num_resamples, 1, columns))
    means = table[row, column].mean((1, 2))
    low, high = np.quantile(means, [0.5 - 0.5 * level, 0.5 + 0.5 * level])
    return ConfidenceInterval(mean, float(low), float(high))


def finite(value: float) -> float | None:
    """Converts a number for JSON, which has no infinity: None if it is not finite."""
    return float(value) if np.isfinite(value) else None


def paired_differences(
    arms: Mapping[str, Sequence[float] | Mapping[Any, float]], level: float = 0.95
) -> dict[tuple[str, str], Difference]:
    """Tests every pair of arms by their paired differences over seeds.

    A seed shifts all arms together (equal noise, order of data and test), and this shift cancels
    in the differences. With probability `level` or more, no pair of equal arms is called different
    (Holm 1979).

    Args:
        arms: values by seed for each arm; the seeds of a list are 0, 1, ….
        level: 1 minus the family-wise error rate; 0.95 is typical.

    Returns:
        By (one, other), where the first has the lower mean: the difference one minus other. Pairs
        that share fewer than two seeds are left out.

    Example:
        >>> found = paired_differences({"a": [0.50, 0.61, 0.55], "b": [0.91, 1.00, 0.95]})
        >>> found["a", "b"].decided, round(found["a", "b"].interval.mean, 2)
        (True, -0.4)
    """
    by_seed = {
        name: dict(values if isinstance(values, Mapping) else enumerate(values))
        for name, values in arms.items()
    }
    ranked = sorted(arms, key=lambda name: float(np.mean(list(by_seed[name].values()))))
    found = {
        (one, other): np.array([a - by_seed[other][s] for s, a in by_seed[one].items()
                                if s in by_seed[other]])
        for one, other in combinations(ranked, 2)
    }  # fmt: skip
    pairs = [pair for pair, gap in found.items() if len(gap) > 1]
    gaps = [found[pair] for pair in pairs]
    raw = [_p_value(gap) for gap in gaps]
    order = np.argsort(raw)
    corrected, worst = np.zeros(len(raw)), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, raw[index] * (len(raw) - rank)))
        corrected[index] = worst
    return {
        pair: Difference(
            mean_interval(gap.tolist(), level),
            float(p),
            bool(p <= 1.0 - level),
            _seeds_needed(gap, (1.0 - level) / len(raw)),
        )
        for pair, gap, p in zip(pairs, gaps, corrected, strict=True)
    }


def verdict_of(found: Difference) -> str:
    """Describes the difference from the arm with the lowest mean in words.

    Example:
        >>> pairs = paired_differences({"a": [0.50, 0.61, 0.55], "b": [0.56, 0.58, 0.60]})
        >>> verdict_of(pairs["a", "b"])
        'inconclusive; if the true difference is this one, 29 seeds have a power of 80 %'
    """
    if found.decided:
        return "worse"
    needed = f"{found.seeds} seeds have a power of 80 %" if found.seeds else "1,000 are too few"
    return f"inconclusive; if the true difference is this one, {needed}"


def _p_value(gap: np.ndarray) -> float:
    spread = np.std(gap, ddof=1)
    if spread == 0.0:
        return float(gap[0] == 0.0)
    t = abs(np.mean(gap)) / spread * np.sqrt(len(gap))
    return float(2.0 * scipy.special.stdtr(len(gap) - 1, -t))


def _seeds_needed(gap: np.ndarray, p: float, power: float = 0.8) -> int | None:
    """The smallest number of seeds with which Student's test has this power at level `p`."""
    spread = np.std(gap, ddof=1)
    if spread == 0.0:
        return 2 if gap[0] else None
    effect = abs(np.mean(gap)) / spread

    def power_of(n: int) -> float:
        limit = scipy.special.stdtrit(n - 1, 1.0 - 0.5 * p)
        return 1.0 - scipy.special.nctdtr(n - 1, effect * np.sqrt(n), limit)

    n = bisect_left(range(_MOST_SEEDS + 1), power, lo=2, key=power_of)
    return n if n <= _MOST_SEEDS else None
