"""Communication between the processes of one run: errors, decisions and arrays.

In a run of one process these functions do not communicate. In a run of several processes, every
process has to call them, because they are collective operations.
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
    """Another process of the run died or does not answer.

    Attributes:
        status: exit status of the program: 75, a temporary failure (EX_TEMPFAIL).
    """

    status: int = 75


def is_first() -> bool:
    """Whether this is process 0, which alone writes folders, the lock, logs and pages."""
    return jax.process_index() == 0


def part_of_processes() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are.

    Example:
        >>> part_of_processes()
        (0, 1)
    """
    return jax.process_index(), jax.process_count()


def in_first(action: Callable[[], Any]) -> None:
    """Runs an action in process 0 only; if it raises a `UserError`, all processes raise it.

    Args:
        action: a function without arguments; its result is ignored.

    Raises:
        UserError: the action raised it in process 0.
    """
    refusal = None
    if is_first():
        try:
            action()
        except UserError as error:
            refusal = error
    if jax.process_count() > 1:
        message = np.zeros(_MESSAGE_BYTES, np.uint8)
        text = (str(refusal) or "refused" if refusal else "").encode()[:_MESSAGE_BYTES]
        message[: len(text)] = np.frombuffer(text, np.uint8)
        message = bytes(np.asarray(multihost_utils.broadcast_one_to_all(message))).rstrip(b"\0")
        if message and refusal is None:
            refusal = UserError(message.decode(errors="replace"))
    if refusal is not None:
        raise refusal


def all_agree(fine: bool) -> bool:
    """Whether `fine` is True in every process (a logical AND over processes)."""
    if jax.process_count() == 1:
        return fine
    return bool(np.all(multihost_utils.process_allgather(np.asarray(fine))))


def of_first(numbers: np.ndarray) -> np.ndarray:
    """The float64 numbers of process 0, `[n]`, in every process, for decisions that all make alike.

    Example:
        >>> of_first(np.array([0.1, np.nan]))
        array([0.1, nan])
    """
    if jax.process_count() == 1:
        return numbers
    # As integers of 32 bits: JAX would round float64 to float32.
    bits = np.ascontiguousarray(numbers, np.float64).view(np.uint32)
    return np.asarray(multihost_utils.broadcast_one_to_all(bits)).view(np.float64)


def to_host(tree: Any) -> Any:
    """Copies a tree of device arrays to NumPy, gathering shards that other processes hold.

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
def translate_lost_processes() -> Iterator[None]:
    """Replaces the error of a collective operation that lost a process by a one-line error.

    Raises:
        ProcessLost: instead of JAX's runtime error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_loss(error):
            raise
        raise ProcessLost(
            f"process {jax.process_index()} of {jax.process_count()} lost another one "
            f"({str(error).strip().splitlines()[0][:200]}); run the same command on all of them "
            "to resume from the newest checkpoint"
        ) from error


def is_loss(error: BaseException) -> bool:
    """Whether an error reports a lost connection to another process.

    It is recognised by words of its message: the backends of CPU, GPU and TPU have different
    messages and no error type for it.
    """
    if jax.process_count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError):
        return False
    known = ("gloo", "connection", "socket", "nccl", "coordination", "heartbeat", "unavailable")
    return any(word in str(error).lower() for word in known)
