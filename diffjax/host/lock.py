"""Locks a run's folder for one training process; the system releases the lock when it dies."""

import errno
import fcntl
import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from diffjax.errors import UserError
from diffjax.host.processes import in_first

LOCK = "lock.json"
_LOG = logging.getLogger("diffjax")


@contextmanager
def locked(workdir: Path, what: str = "trained", flag: str = "--workdir") -> Iterator[None]:
    """Locks a folder inside the block; in a run of several processes, the first one does.

    The lock is `flock` on `lock.json`, and the file contains the process that holds it. The system
    releases the lock when that process ends for any reason; the file stays, but it is not the lock
    itself. The package `filelock` is not used: it would empty the file that names the holder, and
    on a file system without locks it uses one that outlives its process.

    Args:
        workdir: a folder that exists.
        what: is done there, for errors.
        flag: that names it, for errors.

    Raises:
        UserError: another process holds the lock (with its number, host and start time), or the
            file belongs to another user.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with locked(folder):
        ...     with locked(folder):
        ...         pass
        Traceback (most recent call last):
        ...
        diffjax.errors.UserError: ... is being trained by process ...
    """
    path = workdir / LOCK
    with ExitStack() as held:

        def take() -> None:
            # Not truncated: until the lock is acquired, the content is another process's.
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise UserError(
                    f"{path} can't be opened: {error.strerror}; choose another {flag}"
                ) from error
            held.callback(os.close, handle)
            _take(handle, path, f"{what} by", flag)

        in_first(take)
        yield


def _take(handle: int, path: Path, what: str, flag: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UserError(
                f"{path.parent} is being {what} {_holder(path)}: wait for it, stop it, or "
                f"choose another {flag}"
            ) from None
        _LOG.warning(
            "%s can't be locked (%s): make sure that no other process writes in this folder",
            path,
            error.strerror,
        )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    holder = {"pid": os.getpid(), "host": platform.node(), "since": now}
    os.ftruncate(handle, 0)
    os.pwrite(handle, (json.dumps(holder) + "\n").encode(), 0)


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, TypeError, KeyError):  # The holder may be writing it now.
        return "another process"
