"""A file cache for arrays that are expensive to compute."""

import hashlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.data.archives import read_npz
from diffjax.pretrained.downloads import CACHE

FOLDER = f"{CACHE}/references"
_LOG = logging.getLogger("diffjax")
Arrays = dict[str, np.ndarray]


def cached(
    folder: str | None,
    facts: Mapping[str, Any],
    make: Callable[[], Arrays],
    *,
    worth: Callable[[Arrays], bool] = lambda arrays: True,
) -> Arrays:
    """Returns arrays from a cache file if it exists; otherwise computes and stores them.

    The name of the file is the hash of the facts. It is written atomically and contains a hash
    of its content: a damaged file is computed again, with a warning. A file that can't be written
    is only a warning. Reading a file can't run code. Any file may be deleted at any time.

    Args:
        folder: folder of the files; None disables the cache.
        facts: plain JSON values on which the arrays depend.
        make: computes the numeric arrays by name.
        worth: whether arrays that were computed are stored.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     first = cached(folder, {"of": 3}, lambda: {"x": np.arange(3)})
        ...     second = cached(folder, {"of": 3}, lambda: {})
        >>> second
        {'x': array([0, 1, 2])}
    """
    if folder is None:
        return make()
    text = json.dumps(facts, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()
    path = Path(folder).expanduser() / f"{name}.arrays"
    found = _read(path, text)
    if found is None:
        found = make()
        if worth(found):
            _write(path, text, found)
    return found


def _read(path: Path, text: str) -> Arrays | None:
    """The arrays of a cache file; None if there is no file, or if it is damaged."""
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        _LOG.warning("can't read %s (%s); computing it again", path, error.strerror)
        return None
    facts, _, arrays = content.partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != digest or facts != text.encode():
        _LOG.warning("%s is damaged; computing it again", path)
        return None
    return read_npz(arrays, str(path))


def _write(path: Path, text: str, arrays: Arrays) -> None:
    if any(array.dtype.hasobject for array in arrays.values()):
        raise TypeError("arrays of objects are not cached: reading them could run code")
    file = io.BytesIO()
    np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    content = text.encode() + b"\n" + file.getvalue()
    digest = hashlib.sha256(content).hexdigest().encode()
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as target:
            target.write(digest + b"\n" + content)
        os.replace(scratch, path)
    except OSError as error:
        _LOG.warning("can't write %s (%s); it will be computed again", path, error.strerror)
        if scratch is not None:
            Path(scratch).unlink(missing_ok=True)
