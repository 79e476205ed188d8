"""Reads weights from torch or safetensors files, without these packages and without running code.

A file of `torch.save` is a pickle that names functions to call. This reader knows only the few
functions that build tensors, and replaces them by its own. Any other name is refused, so a
file can't run code.
"""

import io
import json
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffjax.errors import UserError

_DTYPES: Mapping[str, Any] = {
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
_SAFE_DTYPES: Mapping[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_ZIP = b"PK\x03\x04"
# The start of files that torch wrote before version 1.6 (2020), such as the weights of FID.
_OLD_MAGIC, _OLD_VERSION = 0x1950A86A20F9469CFC6C, 1001
# Tensors may share a storage, and each becomes a copy. All copies together are limited to this
# multiple of the file's size.
_MOST_COPIES = 4
_DAMAGED = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
)


class StateDict:
    """Named arrays of a file, taken one by one to detect missing and superfluous weights.

    Args:
        name: name of the file, for messages.
        arrays: arrays by their names in torch.
    """

    def __init__(self, name: str, arrays: Mapping[str, np.ndarray]):
        self.name = name
        self._left = dict(arrays)

    def take(self, key: str) -> np.ndarray:
        """Removes and returns the array with this name.

        Raises:
            UserError: there is no array with this name, or it was taken already.
        """
        if key not in self._left:
            raise UserError(f"{self.name} has no weights {key!r}: it belongs to another network")
        return self._left.pop(key)

    def rest(self) -> dict[str, np.ndarray]:
        """All that was not taken yet, by name."""
        return dict(self._left)

    def check_empty(self, ignore: Callable[[str], bool] = lambda key: False) -> None:
        """Checks that all arrays were taken.

        Args:
            ignore: whether an array with this name may be left.

        Raises:
            UserError: the file has other arrays that were not taken.
        """
        left = [key for key in self._left if not ignore(key)]
        if left:
            raise UserError(
                f"{self.name} has {len(left)} weights too many, such as {left[0]!r}: it belongs to "
                "another network"
            )


def read_state_dict(name: str, data: bytes) -> StateDict:
    """Reads a `state_dict` from the bytes of a torch file (both formats) or a safetensors file.

    Args:
        name: name of the file, for messages.
        data: the whole file.

    Raises:
        UserError: the file has another format, is damaged, or contains anything but tensors.
    """
    try:
        if data[8:9] == b"{":
            return StateDict(name, _read_safetensors(data))
        tree, buffers = _read_zip(data) if data.startswith(_ZIP) else _read_old(data)
        if not isinstance(tree, dict):
            raise pickle.UnpicklingError(
                f"it contains a {type(tree).__name__}, not a dict of tensors"
            )
        for key, value in tree.items():
            if not isinstance(key, str) or not isinstance(value, _View):
                raise pickle.UnpicklingError(f"{key!r} is a {type(value).__name__}, not a tensor")
        return StateDict(name, _arrays(tree, buffers, _MOST_COPIES * len(data)))
    except _DAMAGED as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"can't read weights from {name}: {reason}") from error


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

    def __init__(self, file: io.BytesIO):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}
        self._file, self._admitted = file, _admitted()

    def load(self) -> Any:
        """Reads one pickle, after checking that its object numbers do not exhaust the memory.

        Python allocates memory for as many objects as the largest number of an object.
        """
        start, most = self._file.tell(), len(self._file.getbuffer())
        for operation, argument, _ in pickletools.genops(self._file):
            if operation.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > most:
                raise pickle.UnpicklingError(f"it has an object number {argument} above {most}")
        self._file.seek(start)
        return super().load()

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name == "torch" and global_name in _DTYPES:
            return global_name
        found = self._admitted.get(f"{module_name}.{global_name}")
        if found is None:
            raise pickle.UnpicklingError(
                f"it names {module_name}.{global_name}, but only tensors are allowed"
            )
        return found

    def persistent_load(self, pid: Any, /) -> _Storage:
        _, kind, key, _, size, *view = pid
        if kind not in _DTYPES or type(key) is not str or type(size) is not int or any(view):
            raise pickle.UnpicklingError(f"{pid!r:.60} is not a storage of numbers")
        storage = _Storage(key, kind, size)
        if self.storages.setdefault(key, storage) != storage:
            raise pickle.UnpicklingError(f"storage {key} is described twice")
        return storage


def _admitted() -> dict[str, Any]:
    """The names that a pickle may use; new objects per file, since it could set attributes."""

    class Tree(dict):
        def __setstate__(self, state: Any) -> None:
            """Ignores torch's notes about module versions."""

    def tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> _View:
        return _View(storage, offset, size, stride)

    def parameter(data: Any, *rest: Any) -> Any:
        return data

    return {
        "collections.OrderedDict": Tree,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_parameter": parameter,
    }


def _read_zip(data: bytes) -> tuple[Any, dict[str, np.ndarray]]:
    """Reads the format of torch 1.6 and later: a zip with a pickle and one file per storage."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise pickle.UnpicklingError("it is a zip file, but torch.save did not write it")
        folder = pickles[0].removesuffix("data.pkl")
        # Nothing in it is compressed, so all entries together can't be larger than the file.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise pickle.UnpicklingError("it is a compressed zip, which torch.save does not write")
        if sum(entry.file_size for entry in archive.infolist()) > len(data):
            raise pickle.UnpicklingError("its entries overlap")
        if any(entry.flag_bits & 1 for entry in archive.infolist()):
            raise pickle.UnpicklingError("it is an encrypted zip")
        if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
            raise pickle.UnpicklingError("its numbers are big-endian")
        unpickler = _Unpickler(io.BytesIO(archive.read(pickles[0])))
        tree = unpickler.load()
        buffers = {
            key: _buffer(archive.read(f"{folder}data/{key}"), storage)
            for key, storage in unpickler.storages.items()
        }
    return tree, buffers


def _read_old(data: bytes) -> tuple[Any, dict[str, np.ndarray]]:
    """Reads the older format: five pickles, then the storages, each after its length."""
    file = io.BytesIO(data)
    if _Unpickler(file).load() != _OLD_MAGIC or _Unpickler(file).load() != _OLD_VERSION:
        raise pickle.UnpicklingError("torch.save did not write it")
    if not _Unpickler(file).load()["little_endian"]:
        raise pickle.UnpicklingError("its numbers are big-endian")
    unpickler = _Unpickler(file)
    tree = unpickler.load()
    buffers = {}
    for key in _Unpickler(file).load():
        storage = unpickler.storages[key]
        size = int.from_bytes(file.read(8), "little")
        if size != storage.size:
            raise pickle.UnpicklingError(f"storage {key} has another size than its tensors")
        num_bytes = size * np.dtype(_DTYPES[storage.kind]).itemsize
        buffers[key] = _buffer(file.read(min(num_bytes, len(data))), storage)
    return tree, buffers


def _read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    """Reads safetensors: eight bytes with the length of a JSON header, the header, the numbers."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    arrays, left = {}, len(data) - start
    for key, entry in header.items():
        first, last = entry["data_offsets"]
        if not 0 <= first <= last <= len(data) - start:
            raise ValueError(f"{key!r} reaches beyond the file")
        left -= last - first
        if left < 0:
            raise ValueError(f"{key!r} overlaps others")
        numbers = np.frombuffer(data[start + first : start + last], _SAFE_DTYPES[entry["dtype"]])
        arrays[key] = numbers.reshape(entry["shape"])
    return arrays


def _buffer(data: bytes, storage: _Storage) -> np.ndarray:
    array = np.frombuffer(data, _DTYPES[storage.kind])
    if len(array) != storage.size:
        raise pickle.UnpicklingError(f"it ends within storage {storage.key}")
    return array


def _arrays(
    tree: Mapping[str, Any], buffers: Mapping[str, np.ndarray], most_bytes: int
) -> dict[str, np.ndarray]:
    """Copies all tensors, unless shared storages make the copies larger than `most_bytes`."""
    arrays, left = {}, most_bytes
    for key, view in tree.items():
        arrays[key] = _array(view, buffers)
        left -= arrays[key].nbytes
        if left < 0:
            raise pickle.UnpicklingError(f"its tensors need more than {most_bytes} bytes")
    return arrays


def _array(view: _View, buffers: Mapping[str, np.ndarray]) -> np.ndarray:
    """Copies a tensor from its storage, after checking that it lies inside the storage."""
    size, stride = tuple(view.size), tuple(view.stride)
    numbers = (view.offset, *size, *stride)
    if not isinstance(view.storage, _Storage) or len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor has no storage or no strides")
    if any(type(number) is not int or number < 0 for number in numbers):
        raise pickle.UnpicklingError("a tensor has invalid sizes or strides")
    buffer = buffers[view.storage.key]
    last = view.offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > len(buffer) or (math.prod(size) and last >= len(buffer)):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    strides = [step * buffer.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(buffer[view.offset :], size, strides).copy()
