"""Proportions of class labels in an evaluation, and their comparison with the real images."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

_FEW_CLASSES = 20


def proportional_labels(n: int, shares: Sequence[int] | np.ndarray) -> np.ndarray:
    """Labels in given proportions, evenly interleaved, int32 `[n]`.

    Class c with share s_c has the quota `q_c = n·s_c/Σs`, and gets `⌊q_c⌋` labels. The remaining
    labels go to the largest remainders `q_c - ⌊q_c⌋`; ties go to the lower class (Hamilton 1792).
    For equal shares the result is `0, 1, …, K - 1, 0, …`.

    Args:
        n: number of labels.
        shares: `[K]`, integers with any sum above 0, such as the images of each class.

    Example:
        >>> proportional_labels(5, [1, 1, 1]).tolist(), proportional_labels(7, [900, 100]).tolist()
        ([0, 1, 2, 0, 1], [0, 0, 0, 1, 0, 0, 0])
    """
    counts = _largest_remainders(n, shares)
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    # The j-th of the m labels of a class has the relative position (j + 1/2)/m.
    first = np.repeat(np.cumsum(counts) - counts, counts)
    place = (np.arange(n) - first + 0.5) / np.repeat(counts, counts)
    return labels[np.lexsort((labels, place))]


def label_mix(labels: np.ndarray, class_counts: np.ndarray) -> str:
    """Describes the proportions of labels for a provenance; equal proportions have equal texts.

    Args:
        labels: `[n]`.
        class_counts: `[K]`, number of real images of each class.

    Returns:
        "balanced" if all classes are equally frequent, up to one label; "data" if they have the
        proportions of the real images; else the count of each class, or a hash of the counts.

    Example:
        >>> real = np.array([900, 100])
        >>> [label_mix(np.array(labels), real) for labels in ([0, 1] * 5, [0] * 9 + [1], [1, 1])]
        ['balanced', 'data', '1: 2']
    """
    classes, counts = np.unique(labels, return_counts=True)
    known: Mapping[str, np.ndarray] = {"balanced": np.ones_like(class_counts), "data": class_counts}
    for name, shares in known.items():
        expected = _largest_remainders(len(labels), shares)
        same = np.array_equal(classes, np.flatnonzero(expected))
        if same and np.array_equal(counts, expected[classes]):
            return name
    text = ", ".join(f"{label}: {count}" for label, count in zip(classes, counts, strict=True))
    if len(classes) <= _FEW_CLASSES:
        return text
    return f"listed, {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _largest_remainders(n: int, shares: Sequence[int] | np.ndarray) -> np.ndarray:
    """Distributes n among shares by largest remainders, `[K]`, in exact integer arithmetic."""
    whole = [int(share) for share in shares]
    total = sum(whole)
    counts = np.array([n * share // total for share in whole])
    remainders = [n * share % total for share in whole]
    by_size = sorted(range(len(whole)), key=lambda place: -remainders[place])
    counts[by_size[: n - counts.sum()]] += 1
    return counts
