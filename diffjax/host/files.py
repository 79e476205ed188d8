"""Writes files atomically: a reader sees the old file or the complete new one."""

import io
import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.errors import UserError


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Writes a file atomically: readers, and a power failure, leave the old or the new content.

    The content is first written to a temporary file, whose name contains the machine and the
    process, and then renamed. Several processes may write the same file; the last one wins.

    Args:
        path: the path of the file; its folder must exist.
        content: text (written as UTF-8) or bytes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(f"{folder}/a.txt", "one")
        ...     write_whole(f"{folder}/a.txt", b"two")
        ...     [(file.name, file.read_text()) for file in Path(folder).iterdir()]
        [('a.txt', 'two')]
    """
    path = Path(path)
    scratch = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
    # The new name is stored in the folder, which not every file system can sync.
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_npz(path: str | Path, **arrays: Any) -> None:
    """Writes named arrays as a compressed `.npz` file atomically."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_whole(path, content.getvalue())


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes a mapping as JSON atomically; values of types unknown to JSON become text."""
    write_whole(path, json.dumps(content, indent=2, default=str) + "\n")


def clear_unfinished(folder: Path) -> None:
    """Deletes temporary files that dead processes of this machine left in a folder."""
    for file in folder.glob(f"*.{platform.node()}.*.tmp"):
        pid = file.name.split(".")[-2]
        if pid.isdecimal() and not _alive(int(pid)):
            file.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def place_of(path: str) -> Path:
    """The place that a config names; `~` is the home folder.

    Raises:
        UserError: nothing can have such a name.

    Example:
        >>> place_of("data/mnist").name
        'mnist'
    """
    try:
        place = Path(path).expanduser()
        place.exists()
    except (OSError, RuntimeError) as error:  # Too long, or an unknown ~user.
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"no path {path!r}: {reason}") from None
    return place
