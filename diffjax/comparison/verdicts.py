"""Which arm of a comparison is best, and how sure one may be, from several training seeds each."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import scipy.special

_MOST_SEEDS = 1_000


class Interval(NamedTuple):
    """A mean and what it may be."""

    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """How one arm differs from another, over the seeds that they share.

    Attributes:
        interval: of the mean difference, at the level asked for, for this pair by itself.
        p: of Student's paired test, two-sided, times what Holm's rule asks for all pairs of arms.
        decided: whether `p` is small enough.
        seeds: how many would decide it with probability 0.8 if mean and deviation of the difference
            are what they are here; None if more than 1,000.
    """

    interval: Interval
    p: float
    decided: bool
    seeds: int | None


def mean_interval(
    values: Sequence[float],
    level: float = 0.95,
    *,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> Interval:
    """The mean of few values with Student's interval; verdicts are by this one.

    Args:
        values: one of each training seed.
        level: how often the interval holds the truth.
        bounds: the least and the greatest value that the number can have. The interval ends there,
            and holds the truth as often, since the truth lies within them. With one value, of
            which there is no interval, it stays infinite.

    Example:
        >>> [round(x, 2) for x in mean_interval([1.0, 2.0, 3.0])]
        [2.0, -0.48, 4.48]
        >>> [round(x, 2) for x in mean_interval([0.9, 0.95], bounds=(0.0, 1.0))]
        [0.93, 0.61, 1.0]
    """
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return Interval(mean, -np.inf, np.inf)
    half = float(
        scipy.special.stdtrit(n - 1, 0.5 + 0.5 * level) * np.std(values, ddof=1) / np.sqrt(n)
    )
    return Interval(mean, max(mean - half, bounds[0]), min(mean + half, bounds[1]))


def bootstrap_interval(
    values: Sequence[Sequence[float]] | np.ndarray,
    level: float = 0.95,
    *,
    num_resamples: int = 2_000,
    seed: int = 0,
) -> Interval:
    """The mean of a table of values with the percentile bootstrap's interval.

    Rows and columns are drawn anew with replacement, each by themselves (the pigeonhole bootstrap,
    Owen 2007, Annals of Applied Statistics 1): another set of training seeds and of noise seeds.
    With few rows it is too narrow: of 3 normal values in one column its 95 % interval holds the
    truth in 74 %, of 10 in 90 %. That of `mean_interval` holds it in 95 %.

    Args:
        values: `[S, G]`: a row for each training seed, a column for each noise seed.
        level: of the interval.
        num_resamples: how many times the table is drawn.
        seed: of the drawing.

    Example:
        >>> [round(x, 1) for x in bootstrap_interval([[1.0], [2.0], [3.0]])]
        [2.0, 1.0, 3.0]
    """
    table = np.asarray(values, float)
    mean, (rows, columns) = float(table.mean()), table.shape
    if rows < 2:
        return Interval(mean, -np.inf, np.inf)
    rng = np.random.default_rng(seed)
    row = rng.integers(rows, size=(num_resamples, rows, 1))
    column = rng.integers(columns, size=(num_resamples, 1, columns))
    means = table[row, column].mean((1, 2))
    low, high = np.quantile(means, [0.5 - 0.5 * level, 0.5 + 0.5 * level])
    return Interval(mean, float(low), float(high))


def finite(value: float) -> float | None:
    """The number for a file of JSON, which has no infinity; None in its place."""
    return float(value) if np.isfinite(value) else None


def differences(
    arms: Mapping[str, Sequence[float] | Mapping[Any, float]], level: float = 0.95
) -> dict[tuple[str, str], Difference]:
    """Every pair of arms, by differences seed by seed.

    Seeds shift all arms alike (the same noise, order of data and test), and drop out. With
    probability `level` or more, no pair of arms that are equal is called decided (Holm 1979),
    whichever arm leads.

    Args:
        arms: numbers by seed; a list counts its seeds from 0.
        level: see above.

    Returns:
        By (one, other), the first of less mean: one minus other. Pairs that share fewer than two
        seeds are missing.

    Example:
        >>> found = differences({"a": [0.50, 0.61, 0.55], "b": [0.91, 1.00, 0.95]})
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
    """What a difference from the arm of least mean says, in words.

    Example:
        >>> pairs = differences({"a": [0.50, 0.61, 0.55], "b": [0.56, 0.58, 0.60]})
        >>> verdict_of(pairs["a", "b"])
        'inconclusive; if the true difference is this one, 29 seeds show it 4 times in 5'
    """
    if found.decided:
        return "worse"
    shown = f"{found.seeds} seeds show it 4 times in 5" if found.seeds else "1,000 are too few"
    return f"inconclusive; if the true difference is this one, {shown}"


def _p_value(gap: np.ndarray) -> float:
    spread = np.std(gap, ddof=1)
    if spread == 0.0:
        return float(gap[0] == 0.0)
    t = abs(np.mean(gap)) / spread * np.sqrt(len(gap))
    return float(2.0 * scipy.special.stdtr(len(gap) - 1, -t))


def _seeds_needed(gap: np.ndarray, p: float, power: float = 0.8) -> int | None:
    """The least number of seeds with which Student's test would see this difference at `p`."""
    spread = np.std(gap, ddof=1)
    if spread == 0.0:
        return 2 if gap[0] else None
    effect = abs(np.mean(gap)) / spread

    def power_of(n: int) -> float:
        limit = scipy.special.stdtrit(n - 1, 1.0 - 0.5 * p)
        return 1.0 - scipy.special.nctdtr(n - 1, effect * np.sqrt(n), limit)

    n = bisect_left(range(_MOST_SEEDS + 1), power, lo=2, key=power_of)
    return n if n <= _MOST_SEEDS else None
