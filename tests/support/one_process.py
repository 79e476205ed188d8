"""What programs ask processes of their own for, done in the process of the tests.

A process takes seconds to import what this one has.
"""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Here:
    """Stands in for a ProcessPoolExecutor: calls what it is given at once, and initializes nothing.

    Example:
        >>> with Here() as pool:
        ...     pool.submit(pow, 2, 3).result()
        8
    """

    def __init__(self, *how: Any, **more: Any):
        del how, more

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future
