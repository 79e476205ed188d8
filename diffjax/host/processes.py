"""Several processes of one run: what one of them finds out, all of them know.

Each of these is nothing at all in a run of one process. In a run of several, all have to come by:
they talk to each other.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffjax.errors import UserError

_MESSAGE_BYTES = 1024


class ProcessLost(UserError):
    """Another process of the run died, or does not answer.

    Attributes:
        status: for a program to end with: that of a failure that passes (EX_TEMPFAIL).
    """

    status: int = 75


def is_first() -> bool:
    """Whether this process is the one that writes: folders, lock, logs, pages."""
    return jax.process_index() == 0


def in_first(action: Callable[[], Any]) -> None:
    """Does something in the first process alone; where that is refused, all are told why.

    Raises:
        UserError: what the first process raised.
    """
    refusal = None
    if is_first():
        try:
            action()
        except UserError as error:
            refusal = error
    if jax.process_count() > 1:
        said = np.zeros(_MESSAGE_BYTES, np.uint8)
        text = (str(refusal) or "refused" if refusal else "").encode()[:_MESSAGE_BYTES]
        said[: len(text)] = np.frombuffer(text, np.uint8)
        said = bytes(np.asarray(multihost_utils.broadcast_one_to_all(said))).rstrip(b"\0")
        if said and refusal is None:
            refusal = UserError(said.decode(errors="replace"))
    if refusal is not None:
        raise refusal


def all_agree(fine: bool) -> bool:
    """Whether it is fine in every process."""
    if jax.process_count() == 1:
        return fine
    return bool(np.all(multihost_utils.process_allgather(np.asarray(fine))))


def to_host(tree: Any) -> Any:
    """Arrays on the devices as NumPy arrays, in every process, wherever their parts are.

    Example:
        >>> to_host({"a": jax.numpy.arange(2)})
        {'a': array([0, 1], dtype=int32)}
    """

    def one(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            x = multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(one, tree)


@contextmanager
def losses_told() -> Iterator[None]:
    """Turns the failure of a collective operation, when its other end is gone, into one line.

    Raises:
        ProcessLost: in its place.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_loss(error):
            raise
        raise ProcessLost(
            f"process {jax.process_index()} of {jax.process_count()} lost another one "
            f"({str(error).strip().splitlines()[0][:200]}); the same command on all of them goes "
            "on from the newest checkpoint"
        ) from error


def is_loss(error: BaseException) -> bool:
    """Whether an error is about the connection to another process.

    The backends for CPU, GPU and TPU each have words of their own, and no type of error.
    """
    if jax.process_count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError):
        return False
    known = ("gloo", "connection", "socket", "nccl", "coordination", "heartbeat", "unavailable")
    return any(word in str(error).lower() for word in known)
