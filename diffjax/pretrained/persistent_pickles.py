"""Reads NVIDIA's pickles of networks (EDM, EDM2), without running the code that they hold.

Such a file is a pickle of a dict, as `{"ema": network, "loss_fn": …}`. Each object in it is
`torch_utils.persistence._reconstruct_persistent_obj(meta)`, with

    meta = {"type": "class", "version": 6, "module_src": source, "class_name": …, "state": {…}}

The authors' reader executes the source. Here an object is a `Persistent`, of its class's name and
its state: tensors, further objects, and the arguments that it was made with.
"""

import io
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.errors import UserError, nearest
from diffjax.pretrained import torch_files as torch
from diffjax.pretrained.tensors import Tensor, first_bytes

_OLD_START = pickle.dumps(torch._OLD_MAGIC, 2)
"""How files of `torch.save` in its older format begin."""


@dataclass(frozen=True)
class Persistent:
    """An object of a file, as data.

    Attributes:
        class_name: its class, such as `Precond`.
        state: its attributes by name.
    """

    class_name: str
    state: Mapping[str, Any]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The keyword arguments that it was made with: numbers, texts, lists and dicts."""
        settings = self.state.get("_init_kwargs")
        return settings if isinstance(settings, dict) else {}


@dataclass(frozen=True)
class Network:
    """A network of a file.

    Attributes:
        class_name: its class, such as `Precond`.
        settings: the keyword arguments that it was made with.
        tensors: its parameters and buffers by the paths of their modules, as `unet.out_gain`.
    """

    class_name: str
    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def is_persistent_pickle(path: Path) -> bool:
    """Whether a file begins as a pickle, and not as safetensors or the older `torch.save`.

    Raises:
        UserError: the file can't be read.
    """
    start = first_bytes(path, len(_OLD_START))
    # The length of a header of safetensors may begin as a pickle does.
    return start[:1] == pickle.PROTO and start[8:9] != b"{" and start != _OLD_START


def read_persistent_pickle(path: Path, part: str = "ema") -> Network:
    """Reads a network from a pickle of NVIDIA's; nothing of it is executed.

    Args:
        path: the path of the file, as `edm2-img512-xs-2147483-0.135.pkl`.
        part: the part of the dict in the file.

    Raises:
        UserError: there is no such file or part, the file is damaged, or it names anything but
            tensors, arrays, dicts and modules.
    """
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            unpickler = _Unpickler(file, size)
            tree = unpickler.load()
        if not isinstance(tree, dict):
            raise pickle.UnpicklingError(f"it contains a {type(tree).__name__}, not a dict")
        if not isinstance(tree.get(part), Persistent):
            networks = [name for name, inner in tree.items() if isinstance(inner, Persistent)]
            raise pickle.UnpicklingError(f"it has no network {part!r}; {nearest(part, networks)}")
        network: Persistent = tree[part]
        views = dict(_views(network.state, "", set()))
        tensors = _tensors(views, unpickler.numbers, size)
        return Network(network.class_name, network.settings, tensors)
    except torch._DAMAGED as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"can't read weights from {path}: {reason}") from error


class _Unpickler(torch._Unpickler):
    """A restricted unpickler that builds tensors, dicts and `Persistent`s."""

    def __init__(self, file: Any, size: int):
        super().__init__(file, size)
        self.numbers: dict[str, np.ndarray] = {}
        """Those of all storages, by their keys."""
        self._admitted.update(_admitted(self._storage))

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        # Modules of torch itself are pickled by their names.
        if module_name.startswith("torch.nn.modules.") and "." not in global_name:
            return type(global_name, (_Module,), {})
        return super().find_class(module_name, global_name)

    def _storage(self, content: bytes) -> Any:
        """A storage from the bytes of `torch.save`, in its older format."""
        storage, numbers = _read_storage(content)
        storage = storage._replace(key=str(len(self.numbers)))
        self.numbers[storage.key] = numbers
        return storage


class _Module:
    """A module of torch, such as `ModuleDict`, whose class is not stored in the file."""

    state: Mapping[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


def _admitted(storage: Any) -> dict[str, Any]:
    """The names that a pickle may use beside those of `torch.save`."""

    class EasyDict(dict):
        def __setstate__(self, state: Any) -> None:
            """Ignores attributes."""

    class Array:
        """An array or a type of NumPy, which nobody needs."""

        def __init__(self, *args: Any) -> None:
            del args

        def __setstate__(self, state: Any) -> None:
            """Ignores the numbers."""

    def persistent(meta: Any) -> Persistent:
        if not isinstance(meta, dict) or meta.get("type") != "class":
            raise pickle.UnpicklingError("it has an object that is not described by its class")
        name, state = meta.get("class_name"), meta.get("state")
        if not isinstance(name, str) or not isinstance(state, dict):
            raise pickle.UnpicklingError("it has an object without a class or a state")
        return Persistent(name, state)

    core = ("numpy.core.multiarray", "numpy._core.multiarray")
    return {
        "torch_utils.persistence._reconstruct_persistent_obj": persistent,
        "dnnlib.util.EasyDict": EasyDict,
        "builtins.set": set,
        "torch.storage._load_from_bytes": storage,
        "numpy.ndarray": Array,
        "numpy.dtype": Array,
        **{f"{room}.{name}": Array for room in core for name in ("_reconstruct", "scalar")},
    }


def _read_storage(content: Any) -> tuple[Any, np.ndarray]:
    if not isinstance(content, bytes):
        raise pickle.UnpicklingError("a storage has no bytes")
    file, size = io.BytesIO(content), len(content)
    magic, version, system = (torch._Unpickler(file, size).load() for _ in range(3))
    if magic != torch._OLD_MAGIC or version != torch._OLD_VERSION:
        raise pickle.UnpicklingError("a storage was not written by torch.save")
    if not system["little_endian"]:
        raise pickle.UnpicklingError("its numbers are big-endian")
    storage = torch._Unpickler(file, size).load()
    keys = torch._Unpickler(file, size).load()
    if not isinstance(storage, torch._Storage) or keys != [storage.key]:
        raise pickle.UnpicklingError("a storage holds something else than numbers")
    if int.from_bytes(file.read(8), "little") != storage.size or storage.size < 0:
        raise pickle.UnpicklingError(f"storage {storage.key} has another size than its tensor")
    dtype, start = np.dtype(torch.STORAGES[storage.kind]), file.tell()
    if size - start != storage.size * dtype.itemsize:
        raise pickle.UnpicklingError(f"it ends within storage {storage.key}")
    return storage, np.frombuffer(content, dtype, storage.size, start)


def _views(state: Mapping[str, Any], prefix: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """The parameters and buffers of a module and of those in it, by their paths."""
    # A module in itself, or very often in others, would have names without end.
    if id(state) in seen:
        raise pickle.UnpicklingError(f"the module {prefix.rstrip('.') or 'itself'} occurs twice")
    seen.add(id(state))
    for kind in ("_parameters", "_buffers"):
        for name, view in _dict(state, kind).items():
            if view is not None:
                yield f"{prefix}{name}", view
    for name, module in _dict(state, "_modules").items():
        if module is None:
            continue
        if not isinstance(module, Persistent | _Module):
            raise pickle.UnpicklingError(f"{prefix}{name} is a {type(module).__name__}, no module")
        yield from _views(module.state, f"{prefix}{name}.", seen)


def _dict(state: Mapping[str, Any], name: str) -> Mapping[Any, Any]:
    inner = state.get(name, {})
    if not isinstance(inner, dict):
        raise pickle.UnpicklingError(f"{name} is a {type(inner).__name__}, not a dict")
    return inner


def _tensors(
    views: Mapping[str, Any], numbers: Mapping[str, np.ndarray], size: int
) -> dict[str, Tensor]:
    """Tensors by name, after checking that they lie in their storages."""
    tensors, left = {}, torch._MOST_COPIES * size
    for name, view in views.items():
        if not isinstance(view, torch._View):
            raise pickle.UnpicklingError(f"{name} is a {type(view).__name__}, not a tensor")
        shape, buffer = torch._checked(view), numbers[view.storage.key]
        left -= int(np.prod(shape, dtype=object)) * buffer.itemsize
        if left < 0:
            raise pickle.UnpicklingError(
                f"its tensors need more than {torch._MOST_COPIES * size} bytes"
            )

        def read(view: Any = view, buffer: np.ndarray = buffer) -> np.ndarray:
            return torch._array(view, buffer)

        tensors[name] = Tensor(shape, buffer.dtype, read)
    return tensors
