"""Prefetches batches: a thread makes them, and copies them to the devices, during other steps."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")


@contextmanager
def prefetched(items: Iterator[Item], ahead: int = 2) -> Iterator[Iterator[Item]]:
    """Iterates over `items` in order, with up to `ahead` items made in advance by a thread.

    An exception in `items` is raised at the position of its item. The thread ends with the block,
    after the item that it is making.

    Args:
        items: an iterator that only the thread advances.
        ahead: number of items made in advance, at least 1; 2 is typical. For batches, this many
            more are on the devices.

    Example:
        >>> with prefetched(iter("abc")) as letters:
        ...     "".join(letters)
        'abc'
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        yield _taken(pool, items, ahead)
    finally:
        pool.shutdown(cancel_futures=True)


def _taken(pool: Executor, items: Iterator[Item], ahead: int) -> Iterator[Item]:
    end: Any = object()
    coming = deque(pool.submit(next, items, end) for _ in range(ahead))
    while (item := coming.popleft().result()) is not end:
        coming.append(pool.submit(next, items, end))
        yield item
