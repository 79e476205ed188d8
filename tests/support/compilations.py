"""What JAX traces and compiles meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

TRACED = "/jax/core/compile/"
COMPILED = f"{TRACED}backend_compile_duration"


@contextmanager
def compilations(which: str = COMPILED) -> Iterator[list[str]]:
    """The programs that are compiled meanwhile, or taken from a cache of compiled ones.

    Or other events, whose names begin with `which`; those of tracing as well, with `TRACED`.

    Example:
        >>> with compilations() as programs:
        ...     _ = jax.jit(lambda x: x + 1)(1)
        >>> len(programs)
        1
    """
    found: list[str] = []

    def listen(event: str, duration_secs: float, **how: object) -> None:
        del duration_secs, how
        if event.startswith(which):
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
