"""Parameters of a test of which a few are quick witnesses, and the rest is `thorough`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

CROSS = pytest.mark.thorough(tenth=False)


def witnesses(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """All cases as parameters; those that are not quick are in no run without `thorough`.

    A case is a value, or a tuple of the values of several parameters.

    Raises:
        ValueError: a quick one is no case.

    Example:
        >>> [len(case.marks) for case in witnesses(["a", "b"], ["b"])]
        [1, 0]
    """
    cases = list(cases)
    if strange := [case for case in quick if case not in cases]:
        raise ValueError(f"no cases: {strange}")
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=() if case in quick else CROSS
        )
        for case in cases
    ]
