"""Writes tensors as a file of `torch.save`, without torch: what the authors' programs load."""

import os
import pickle
import platform
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.errors import UserError, nearest
from diffjax.host.files import place_of
from diffjax.pretrained.torch_files import STORAGES

_ALIGNMENT = 64  # of the numbers of a tensor in the file, as torch has it
_HEADER_BYTES = 30  # of an entry of a zip, before its name
_KINDS = {np.dtype(dtype): kind for kind, dtype in STORAGES.items()}


def write_torch(path: str | Path, state: Mapping[str, Any]) -> None:
    """Writes named tensors as `torch.save` writes a dict of them (since torch 1.6), atomically.

    Args:
        path: the path of the file; its folder must exist.
        state: arrays, or tensors of another file, by name; one after the other is read.

    Raises:
        UserError: the file can't be written, or torch has no tensors of a type.

    Example:
        >>> import tempfile
        >>> from diffjax.pretrained.files import read_state_dict
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_torch(f"{folder}/w.pt", {"w": np.ones(2, np.float32)})
        ...     np.asarray(read_state_dict(f"{folder}/w.pt")["w"])
        array([1., 1.], dtype=float32)
    """
    place = place_of(str(path))
    scratch = place.with_name(f"{place.name}.{platform.node()}.{os.getpid()}.tmp")
    # A pickle of protocol 2 of a dict, whose values are calls of a function of torch.
    pickled = [pickle.PROTO + b"\x02" + pickle.EMPTY_DICT]
    try:
        with zipfile.ZipFile(scratch, "w") as archive:
            for number, (name, tensor) in enumerate(state.items()):
                array = np.array(tensor, order="C", copy=None)
                pickled.append(_plain(name) + _tensor(array, name, number) + pickle.SETITEM)
                _add(archive, f"data/{number}", array.tobytes())
            _add(archive, "data.pkl", b"".join(pickled) + pickle.STOP)
            _add(archive, "byteorder", b"little")
            _add(archive, "version", b"3\n")
        os.replace(scratch, place)
    except OSError as error:
        raise UserError(f"can't write weights to {path}: {error.strerror}") from error
    finally:
        scratch.unlink(missing_ok=True)


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(f"archive/{name}")
    start = archive.fp.tell() if archive.fp else 0
    # An extra field of the header fills the space up to the next multiple.
    space = -(start + _HEADER_BYTES + len(entry.filename) + 4) % _ALIGNMENT
    entry.extra = b"FB" + space.to_bytes(2, "little") + bytes(space)
    archive.writestr(entry, content)


def _tensor(array: np.ndarray, name: str, number: int) -> bytes:
    """The call `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`."""
    if array.dtype not in _KINDS:
        raise UserError(
            f"{name} has the type {array.dtype}; {nearest(str(array.dtype), map(str, _KINDS))}"
        )
    storage = _tuple(
        _plain("storage"),
        _named("torch", _KINDS[array.dtype]),
        _plain(str(number)),
        _plain("cpu"),
        _plain(array.size),
    )
    strides = tuple(step // array.itemsize for step in array.strides)
    arguments = _tuple(
        storage + pickle.BINPERSID,
        _plain(0),
        _plain(array.shape),
        _plain(strides),
        pickle.NEWFALSE,
        _named("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE,
    )
    return _named("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def _plain(value: Any) -> bytes:
    """The pickle of a text, an integer or a tuple of integers, without its start and end."""
    return pickle.dumps(value, 2)[2:-1]


def _named(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE
