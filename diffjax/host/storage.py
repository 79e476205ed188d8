"""A disk that is full, broken or not ours, told from an error in the program."""

import errno
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from diffjax.errors import UserError


def _said(*numbers: int) -> dict[str, int]:
    return {os.strerror(number): number for number in numbers}


WRITING = _said(
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM,
    errno.ESTALE, errno.ENOMEM,
)  # fmt: skip
"""What keeps a file from being written, by the system's words."""
READING = _said(
    errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENOMEM, errno.EMFILE, errno.ENFILE,
    errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ENETDOWN, errno.ENETUNREACH, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ENOLCK,
    errno.ENOBUFS,
)  # fmt: skip
"""What keeps a file from being read, and says nothing of what is in it. Some of it is said of other
processes as well, so that only a failure to read is looked up here."""


class StorageError(UserError):
    """The run's folder can't be written any more."""


def cause(error: BaseException, causes: Mapping[str, int] = WRITING) -> str | None:
    """What the system said, if it is one of these causes; None if it is not.

    Readers and writers in other languages pass the system's words on in errors of their own.

    Example:
        >>> cause(ValueError("INTERNAL: writing /a/b: No space left on device"))
        'No space left on device'
        >>> cause(ValueError("shapes differ")) is None
        True
    """
    seen = error
    while seen is not None:
        for text, number in causes.items():
            if getattr(seen, "errno", None) == number or text in str(seen):
                return text
        seen = seen.__cause__ or seen.__context__
    return None


@contextmanager
def told_in_one_line(workdir: Path) -> Iterator[None]:
    """Turns a failure of storage inside the block into one line.

    Raises:
        StorageError: in place of whatever was raised because of storage.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = cause(error)
        if said is None:
            raise
        raise StorageError(
            f"{workdir} can't be written any more: {said}; the checkpoints in it are whole: mend "
            "that, and the same command goes on from the newest"
        ) from error


def make_writable(folder: Path) -> None:
    """Makes a folder, or finds that files can be made in it.

    Raises:
        UserError: they can't.
    """
    try:
        os.fspath(folder).encode()
    except UnicodeEncodeError:  # Orbax writes names as UTF-8.
        raise UserError(f"{os.fspath(folder)!r} is no UTF-8: choose another folder") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Some bytes and not only a name: a full disk often has room for names.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise UserError(
            f"can't write to {folder}: {error.strerror}; choose another folder"
        ) from error
