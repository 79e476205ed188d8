"""Labels by number or name, and in turn."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from diffjax.errors import UserError, nearest


def labels_called(
    given: Iterable[int | str], num_classes: int, names: Sequence[str] = ()
) -> np.ndarray:
    """Labels by number or name, int32 `[n]`.

    A number is the label of that number, from 0. A text is the label of the class with that name;
    where no class has it, and it is made of digits, of that number.

    Args:
        given: numbers, or texts as a command line has them.
        num_classes: 0 is unconditional, of which 0 alone is a label.
        names: of the classes.

    Raises:
        UserError: the first that is no label.

    Example:
        >>> labels_called([0, "0", "7"], 3, ["10", "3", "7"]).tolist()
        [0, 0, 2]
    """
    known = {name: i for i, name in enumerate(names)}
    classes = max(num_classes, 1)

    def number(label: int | str) -> int:
        found: Any = label
        if isinstance(label, str):
            found = known.get(label, int(label) if label.isdecimal() else None)
        if found in range(classes):  # NumPy's whole numbers are, 2.5 is not.
            return int(found)
        there = f"this run has {classes}, from 0 to {classes - 1}"
        if num_classes == 0:
            there = "this run has no classes: give the number of samples alone"
        elif isinstance(label, str) and known:
            there = nearest(label, known)
        raise UserError(f"no label is called {label!r}; {there}")

    return np.array([number(label) for label in given], np.int32)


def balanced_labels(n: int, num_classes: int) -> np.ndarray:
    """`0, 1, …, num_classes - 1, 0, …`, `[n]`; all 0 for an unconditional model.

    Example:
        >>> balanced_labels(5, 3).tolist()
        [0, 1, 2, 0, 1]
    """
    return np.arange(n, dtype=np.int32) % max(num_classes, 1)
