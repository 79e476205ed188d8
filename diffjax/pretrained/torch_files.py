"""Reads weights from files of torch, without torch and without running code.

A file of `torch.save` is a pickle that names functions to call. This reader knows only the few
functions that build tensors, and replaces them by its own. Any other name is refused, so a
file can't run code.
"""

import functools
import io
import logging
import math
import mmap
import os
import pickle
import pickletools
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffjax.errors import UserError, nearest
from diffjax.pretrained.tensors import MappedFile, Tensor

_LOG = logging.getLogger("diffjax")
STORAGES: Mapping[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
"""The types of numbers by torch's names of their storages."""
_ZIP = b"PK\x03\x04"
# The start of files that torch wrote before version 1.6 (2020), such as the weights of FID.
_OLD_MAGIC, _OLD_VERSION = 0x1950A86A20F9469CFC6C, 1001
# Tensors may share a storage, and each becomes a copy. All copies together are limited to this
# multiple of the file's size.
_MOST_COPIES = 4
# The parts of what trainings store that are wanted, the first of them that is there.
_PARTS = ("ema", "model_ema1", "model", "state_dict")
_DAMAGED = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)


def read_torch(path: str, part: str = "") -> dict[str, Tensor]:
    """Reads the tensors of a file of `torch.save`, in both of its formats; see `read_state_dict`.

    Raises:
        UserError: the file has another format, is damaged, lacks the part, or contains no tensors.
    """

    def damaged(error: BaseException) -> UserError:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return UserError(f"can't read weights from {path}: {reason}")

    def of(view: _View, buffer: Callable[[str], np.ndarray]) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            try:
                return _array(view, buffer(view.storage.key))
            except _DAMAGED as error:
                raise damaged(error) from error

        return read

    try:
        with open(path, "rb") as file:
            start, size = file.read(4), os.fstat(file.fileno()).st_size
        if start != _ZIP and start[:1] != pickle.PROTO:
            raise pickle.UnpicklingError("it is neither a file of safetensors nor of torch.save")
        if start == _ZIP and not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("its end is missing: copy or download it again")
        tree, buffer = (_read_zip if start == _ZIP else _read_old)(path, size)
        if not isinstance(tree, dict):
            raise pickle.UnpicklingError(
                f"it contains a {type(tree).__name__}, not a dict of tensors"
            )
        tensors, left = {}, _MOST_COPIES * size
        for key, view in _part(tree, part).items():
            if not isinstance(key, str) or not isinstance(view, _View):
                raise pickle.UnpicklingError(f"{key!r} is a {type(view).__name__}, not a tensor")
            shape, dtype = _checked(view), np.dtype(STORAGES[view.storage.kind])
            left -= math.prod(shape) * dtype.itemsize
            if left < 0:
                raise pickle.UnpicklingError(
                    f"its tensors need more than {_MOST_COPIES * size} bytes"
                )
            tensors[key] = Tensor(shape, dtype, of(view, buffer))
        return tensors
    except _DAMAGED as error:
        raise damaged(error) from error


def _part(tree: Mapping[Any, Any], part: str) -> Mapping[Any, Any]:
    """One part of a training checkpoint, such as `{"model": …, "ema": …, "opt": …, "args": …}`."""
    parts = {
        name: inner
        for name, inner in tree.items()
        if isinstance(inner, dict) and any(isinstance(value, _View) for value in inner.values())
    }
    chosen = part or next((name for name in _PARTS if name in parts), "")
    if chosen and chosen not in parts:
        raise pickle.UnpicklingError(f"it has no part {chosen!r}; {nearest(chosen, parts)}")
    if chosen and not part and len(parts) > 1:
        _LOG.info("of the parts %s of the file, %s is read", ", ".join(parts), chosen)
    return parts[chosen] if chosen else tree


class _Storage(NamedTuple):
    key: str
    kind: str
    size: int


class _View(NamedTuple):
    storage: Any
    offset: Any
    size: Any
    stride: Any


class _Unpickler(pickle.Unpickler):
    """A restricted unpickler that can only build tensors."""

    def __init__(self, file: Any, size: int):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}
        self._file, self._size, self._admitted = file, size, _admitted()

    def load(self) -> Any:
        """Reads one pickle, after checking that its object numbers do not exhaust the memory.

        Python allocates memory for as many objects as the largest number of an object.
        """
        start, most = self._file.tell(), self._size
        for operation, argument, _ in pickletools.genops(self._file):
            if operation.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > most:
                raise pickle.UnpicklingError(f"it has an object number {argument} above {most}")
        self._file.seek(start)
        return super().load()

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name == "torch" and global_name in STORAGES:
            return global_name
        found = self._admitted.get(f"{module_name}.{global_name}")
        if found is None:
            raise pickle.UnpicklingError(
                f"it names {module_name}.{global_name}, but only tensors are allowed"
            )
        return found

    def persistent_load(self, pid: Any, /) -> _Storage:
        _, kind, key, _, size, *view = pid
        if kind not in STORAGES or type(key) is not str or type(size) is not int or any(view):
            raise pickle.UnpicklingError(f"{pid!r:.60} is not a storage of numbers")
        storage = _Storage(key, kind, size)
        if self.storages.setdefault(key, storage) != storage:
            raise pickle.UnpicklingError(f"storage {key} is described twice")
        return storage


def _admitted() -> dict[str, Any]:
    """The names that a pickle may use; new objects per file, since it could set attributes."""

    class Tree(dict):
        def __setstate__(self, state: Any) -> None:
            """Ignores attributes: module versions, settings."""

    def tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> _View:
        return _View(storage, offset, size, stride)

    def parameter(data: Any, *rest: Any) -> Any:
        return data

    return {
        "argparse.Namespace": Tree,  # settings of a training, which are left out
        "collections.OrderedDict": Tree,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_parameter": parameter,
    }


def _read_zip(path: str, size: int) -> tuple[Any, Callable[[str], np.ndarray]]:
    """Reads the format of torch 1.6 and later: a zip with a pickle and one file per storage."""
    archive = zipfile.ZipFile(path)
    names = archive.namelist()
    pickles = [name for name in names if name.endswith("/data.pkl")]
    if len(set(names)) < len(names):
        raise pickle.UnpicklingError("two of its entries have one name")
    if len(pickles) != 1:
        raise pickle.UnpicklingError("it is a zip file, but torch.save did not write it")
    folder = pickles[0].removesuffix("data.pkl")
    # Nothing in it is compressed, so all entries together can't be larger than the file.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise pickle.UnpicklingError("it is a compressed zip, which torch.save does not write")
    if sum(entry.file_size for entry in archive.infolist()) > size:
        raise pickle.UnpicklingError("its entries overlap")
    if any(entry.flag_bits & 1 for entry in archive.infolist()):
        raise pickle.UnpicklingError("it is an encrypted zip")
    if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
        raise pickle.UnpicklingError("its numbers are big-endian")
    content = archive.read(pickles[0])
    unpickler = _Unpickler(io.BytesIO(content), len(content))
    tree = unpickler.load()
    content, places = MappedFile(path), {}
    for key, storage in unpickler.storages.items():
        entry = archive.getinfo(f"{folder}data/{key}")
        _check_bytes(entry.file_size, storage)
        archive.open(entry).close()  # Compares the directory with what stands before the numbers.
        name, extra = content.array(entry.header_offset + 26, "<u2", 2).tolist()
        places[key] = entry.header_offset + 30 + name + extra, entry

    @functools.cache  # Several tensors may have one storage.
    def buffer(key: str) -> np.ndarray:
        storage, (start, entry) = unpickler.storages[key], places[key]
        if zlib.crc32(content.bytes(start, entry.file_size)) != entry.CRC:
            raise zipfile.BadZipFile(f"the numbers of storage {key} are damaged")
        return content.array(start, STORAGES[storage.kind], storage.size)

    return tree, buffer


def _read_old(path: str, size: int) -> tuple[Any, Callable[[str], np.ndarray]]:
    """Reads the older format: five pickles, then the storages, each after its length."""
    with open(path, "rb") as opened:
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    content = MappedFile(path)
    if _Unpickler(data, size).load() != _OLD_MAGIC or _Unpickler(data, size).load() != _OLD_VERSION:
        raise pickle.UnpicklingError("torch.save did not write it")
    if not _Unpickler(data, size).load()["little_endian"]:
        raise pickle.UnpicklingError("its numbers are big-endian")
    unpickler = _Unpickler(data, size)
    tree = unpickler.load()
    places, keys = {}, _Unpickler(data, size).load()
    if set(keys) != unpickler.storages.keys():
        raise pickle.UnpicklingError("its list of storages is not that of its tensors")
    for key in keys:
        storage = unpickler.storages[key]
        if int.from_bytes(data.read(8), "little") != storage.size:
            raise pickle.UnpicklingError(f"storage {key} has another size than its tensors")
        num_bytes = storage.size * np.dtype(STORAGES[storage.kind]).itemsize
        places[key] = data.tell()
        _check_bytes(min(num_bytes, size - data.tell()), storage)
        data.seek(num_bytes, os.SEEK_CUR)

    def buffer(key: str) -> np.ndarray:
        storage = unpickler.storages[key]
        return content.array(places[key], STORAGES[storage.kind], storage.size)

    return tree, buffer


def _check_bytes(num_bytes: int, storage: _Storage) -> None:
    if num_bytes != storage.size * np.dtype(STORAGES[storage.kind]).itemsize:
        raise pickle.UnpicklingError(f"it ends within storage {storage.key}")


def _checked(view: _View) -> tuple[int, ...]:
    """The shape of a tensor, after checking that it lies inside its storage."""
    size, stride = tuple(view.size), tuple(view.stride)
    numbers = (view.offset, *size, *stride)
    if not isinstance(view.storage, _Storage) or len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor has no storage or no strides")
    if any(type(number) is not int or number < 0 for number in numbers):
        raise pickle.UnpicklingError("a tensor has invalid sizes or strides")
    length, last = (
        view.storage.size,
        view.offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)),
    )
    if math.prod(size) > length or (math.prod(size) and last >= length):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    return size


def _array(view: _View, buffer: np.ndarray) -> np.ndarray:
    """A tensor of its storage: the storage itself, read-only, if it is all of it; else a copy."""
    strides = [step * buffer.itemsize for step in view.stride]
    array = np.lib.stride_tricks.as_strided(
        buffer[view.offset :], tuple(view.size), strides, writeable=False
    )
    return array if array.size == buffer.size and array.flags.c_contiguous else array.copy()
