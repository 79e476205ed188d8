"""Arrays that take long to make and never change: made once, then read from a file."""

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


def stored(folder: str | None, facts: Mapping[str, Any], make: Callable[[], Arrays]) -> Arrays:
    """The arrays that `make` gives: from a file if they were made before, otherwise made and kept.

    The file is named by the hash of the facts. It is written whole or not at all, and holds a hash
    of its content: a damaged one is made again, with a warning. One that can't be written is a
    warning too. Nothing in it can run code. Any file may be deleted at any time.

    Args:
        folder: where files lie; None keeps nothing.
        facts: plain JSON values: all that the arrays depend on.
        make: gives arrays by name, of numbers.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     first = stored(folder, {"of": 3}, lambda: {"x": np.arange(3)})
        ...     second = stored(folder, {"of": 3}, lambda: {})
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
        _write(path, text, found)
    return found


def _read(path: Path, text: str) -> Arrays | None:
    """None where there is no file, or one that can't be trusted."""
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        _LOG.warning("can't read %s (%s); making it again", path, error.strerror)
        return None
    facts, _, arrays = content.partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != digest or facts != text.encode():
        _LOG.warning("%s is damaged; making it again", path)
        return None
    return read_npz(arrays, str(path))


def _write(path: Path, text: str, arrays: Arrays) -> None:
    if any(array.dtype.hasobject for array in arrays.values()):
        raise TypeError("arrays of objects are not stored: reading them could run code")
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
        _LOG.warning("can't keep %s (%s); it will be made again", path, error.strerror)
        if scratch is not None:
            Path(scratch).unlink(missing_ok=True)
