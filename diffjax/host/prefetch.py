"""Batches that are made, and put on the devices, while the step before them runs."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")


@contextmanager
def prefetched(items: Iterator[Item], ahead: int = 2) -> Iterator[Iterator[Item]]:
    """The same items in the same order, up to `ahead` of them made before they are asked for.

    One thread makes them, one after the other. What `items` raises is raised where its item would
    have come. The thread ends with the context, when the item that it is at is done.

    Args:
        items: asked by the thread alone.
        ahead: how many are kept ready; for batches, that many more of them on the devices.

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
