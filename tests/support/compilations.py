"""What JAX compiles meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The programs that are compiled meanwhile, or taken from a cache of compiled ones.

    Example:
        >>> with compilations() as programs:
        ...     _ = jax.jit(lambda x: x + 1)(1)
        >>> len(programs)
        1
    """
    found: list[str] = []

    def listen(event: str, duration_secs: float, **how: object) -> None:
        del duration_secs, how
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
