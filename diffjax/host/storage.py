"""Distinguishes storage errors (full disk, missing permission, …) from errors in the program."""

import errno
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from diffjax.errors import UserError


def _by_message(*numbers: int) -> dict[str, int]:
    return {os.strerror(number): number for number in numbers}


WRITING = _by_message(
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM,
    errno.ESTALE, errno.ENOMEM,
)  # fmt: skip
"""Errors that prevent writing a file: the system's message and its number."""
READING = _by_message(
    errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENOMEM, errno.EMFILE, errno.ENFILE,
    errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ENETDOWN, errno.ENETUNREACH, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ENOLCK,
    errno.ENOBUFS,
)  # fmt: skip
"""Errors that prevent reading a file, whatever its content: the system's message and its number.
Some messages also occur in errors about other processes, so use it only for errors of reading."""


class StorageError(UserError):
    """The run's folder can't be written any more, for example because the disk is full."""


def cause(error: BaseException, causes: Mapping[str, int] = WRITING) -> str | None:
    """The system's message, if an error was caused by one of these storage errors; else None.

    The chain of causes is searched as well. Libraries in other languages raise their own errors
    with the system's message in them, so messages are compared too.

    Args:
        error: the exception.
        causes: `WRITING` or `READING`.

    Example:
        >>> cause(ValueError("INTERNAL: writing /a/b: No space left on device"))
        'No space left on device'
        >>> cause(ValueError("shapes differ")) is None
        True
    """
    current = error
    while current is not None:
        for text, number in causes.items():
            if getattr(current, "errno", None) == number or text in str(current):
                return text
        current = current.__cause__ or current.__context__
    return None


@contextmanager
def translate_storage_errors(workdir: Path) -> Iterator[None]:
    """Replaces exceptions that storage errors cause inside the block by a one-line error.

    Args:
        workdir: the run's folder, for the message.

    Raises:
        StorageError: instead of the exception that a storage error caused.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = cause(error)
        if reason is None:
            raise
        raise StorageError(
            f"{workdir} can't be written any more: {reason}; its checkpoints are intact: fix the "
            "storage, and run the same command to resume from the newest"
        ) from error


def check_named(workdir: str | Path) -> None:
    """Refuses an empty name of a folder, which would be the folder that the process is in.

    Raises:
        UserError: it is "".
    """
    if not os.fspath(workdir):
        raise UserError("workdir='' is no folder: name one, as runs/digits, or . for this one")


def make_writable(folder: Path) -> None:
    """Creates a folder if it does not exist, and checks that files can be written to it.

    Raises:
        UserError: the folder can't be created or written to.
    """
    try:
        os.fspath(folder).encode()
    except UnicodeEncodeError:  # Orbax writes names as UTF-8.
        raise UserError(f"{os.fspath(folder)!r} is not UTF-8: choose another folder") from None
    if folder.is_file():
        raise UserError(f"{folder} is a file, not a folder: choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Writes bytes, not only a name: a full disk often has space for names.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise UserError(
            f"can't write to {folder}: {error.strerror}; choose another folder"
        ) from error
