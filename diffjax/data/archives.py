"""Reading of untrusted `.npz` files: no pickles, and bounded memory."""

import io
import math
import os
import zipfile
from pathlib import Path
from typing import Any, cast

import numpy as np

from diffjax.errors import UserError

# Images and weights compress to a tenth at best; a larger ratio than this is a decompression bomb.
_MAX_RATIO = 100
_FREE_BYTES = 2**28  # accepted at any ratio: a set of blank images is not an attack


def read_npz(file: Path | bytes, where: str) -> dict[str, np.ndarray]:
    """Reads all arrays of an `.npz` file, without pickles and with bounded memory.

    Args:
        file: a path, or the bytes of a file.
        where: the name of the file in errors.

    Returns:
        The arrays by name.

    Raises:
        UserError: the file can't be read, is damaged or is not an `.npz`, it holds objects, or it
            would decompress to more than 256 MB and more than a hundred times its size.

    Example:
        >>> file = io.BytesIO()
        >>> np.savez(file, a=np.arange(3))
        >>> read_npz(file.getvalue(), "it")
        {'a': array([0, 1, 2])}
    """
    try:
        size = len(file) if isinstance(file, bytes) else os.path.getsize(file)
        stream = io.BytesIO(file) if isinstance(file, bytes) else file
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
            unpacked = sum(entry.file_size for entry in entries)
            check_unpacked(unpacked, size, where)
            return {
                entry.filename.removesuffix(".npy"): _read_array(archive, entry)
                for entry in entries
            }
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"can't read {where}: {error.strerror or error}") from None
    # NumPy parses headers as Python, and zips can be broken anywhere: any exception is possible.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"can't read arrays from {where}: {reason}") from None


def check_unpacked(unpacked: int, size: int, where: str) -> None:
    """Refuses a decompression bomb.

    Raises:
        UserError: `unpacked` bytes are more than 256 MB and more than a hundred times `size`.
    """
    if unpacked > max(_FREE_BYTES, _MAX_RATIO * size):
        raise UserError(f"{where} would unpack from {size} to {unpacked} bytes: that is refused")


def _read_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    """Reads one array, whose header has to agree with the size of the entry."""
    with archive.open(entry) as stream:
        version = np.lib.format.read_magic(cast(Any, stream))
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{entry.filename} is of an unknown version")
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_{version[1]}")
        shape, in_columns, dtype = read_header(stream)
        if dtype.hasobject:
            raise ValueError(f"{entry.filename} holds objects, not numbers")
        num_bytes = math.prod(shape) * dtype.itemsize
        # Never more is unpacked than the zip's directory states for the entry.
        if min(shape, default=0) < 0 or num_bytes > entry.file_size:
            raise ValueError(f"{entry.filename} announces {num_bytes} bytes, more than it holds")
        content = stream.read()
    if len(content) != num_bytes:
        raise ValueError(f"{entry.filename} announces {num_bytes} bytes and holds {len(content)}")
    # A copy, because an array on bytes is read-only.
    return np.ndarray(shape, dtype, content, order="F" if in_columns else "C").copy()
