"""Checkpoints whose arrays are saved in one piece, each by one of the devices that hold it.

Orbax cuts an array that several devices hold into as many pieces, each with a compiled program of
its own: seconds of the first checkpoint of every network, where eight devices are one processor.
"""

import contextlib
from collections.abc import Iterator

import jax
import pytest


@contextlib.contextmanager
def whole_checkpoints() -> Iterator[None]:
    """All that are saved meanwhile. What they hold is the same, and reads the same."""
    import orbax.checkpoint as ocp  # which takes seconds to import

    handler = ocp.type_handlers.get_type_handler(jax.Array)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handler, "_use_replica_parallel", False)
        yield
