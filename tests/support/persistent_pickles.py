"""Pickles as NVIDIA's code writes them, made without it and without torch."""

import functools
import io
import pickle
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

SOURCE = "raise SystemExit('the source of a file was executed')"
MAGIC = 0x1950A86A20F9469CFC6C
KINDS = {"float16": "HalfStorage", "float32": "FloatStorage", "float64": "DoubleStorage"}


class Call:
    """What a pickle calls: a function by its name, with arguments, and perhaps a state for it."""

    def __init__(self, name: str, *arguments: Any, state: Any = None):
        self.name, self.arguments, self.state = name, arguments, state

    def __reduce__(self) -> tuple:
        return _called(self.name), self.arguments, self.state


def persistent(class_name: str, state: dict[str, Any]) -> Call:
    """An object of a persistent class."""
    meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": class_name}
    return Call("torch_utils.persistence._reconstruct_persistent_obj", meta | {"state": state})


def module(class_name="Net", parameters=(), buffers=(), modules=(), **settings: Any) -> Call:
    """A module with arrays and further modules, as torch keeps them."""
    state = {
        "training": False,
        "_parameters": OrderedDict(
            {name: x if x is None else parameter(x) for name, x in dict(parameters).items()}
        ),
        "_buffers": OrderedDict({name: tensor(x) for name, x in dict(buffers).items()}),
        "_modules": OrderedDict(modules),
        "_forward_hooks": OrderedDict(),
        "_init_args": (),
        "_init_kwargs": dict(settings),
    }
    return persistent(class_name, state)


def parameter(array: np.ndarray) -> Call:
    return Call("torch._utils._rebuild_parameter", tensor(array), True, OrderedDict())


def tensor(array: np.ndarray, **changes: Any) -> Call:
    """A tensor of a storage that it fills."""
    array = np.array(array, order="C", copy=None)
    strides = tuple(step // array.itemsize for step in array.strides)
    numbers = {"offset": 0, "size": array.shape, "stride": strides, **changes}
    content = numbers.pop("storage", None)
    content = storage_bytes(array) if content is None else content
    storage = Call("torch.storage._load_from_bytes", content)
    return Call("torch._utils._rebuild_tensor_v2", storage, *numbers.values(), False, OrderedDict())


def storage_bytes(array: np.ndarray) -> bytes:
    """The numbers of an array in the older format of `torch.save`."""
    storage = Storage(KINDS[array.dtype.name], array.size)
    header = {"little_endian": True, "protocol_version": 1001}
    file = io.BytesIO()
    for part in (MAGIC, 1001, header, storage, [storage.key]):
        _Pickler(file, 2).dump(part)
    return file.getvalue() + array.size.to_bytes(8, "little") + array.tobytes()


def dumped(tree: Any, protocol: int = 4) -> bytes:
    """The bytes of a pickle."""
    file = io.BytesIO()
    _Pickler(file, protocol).dump(tree)
    return file.getvalue()


class Storage(NamedTuple):
    """A storage, which a pickle names and whose numbers come later."""

    kind: str
    size: int
    key: str = "7"


class _Pickler(pickle._Pickler):
    """Writes names of functions without looking for them."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        pickler: Any = self
        pickler.write(f"c{obj.__module__}\n{obj.__qualname__}\n".encode())
        pickler.memoize(obj)

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Storage):
            return None
        return ("storage", _called(f"torch.{obj.kind}"), obj.key, "cpu", obj.size, None)


@functools.cache
def _called(name: str) -> Any:
    """A stand-in of this name, for functions that need not exist here."""
    room, _, own = name.rpartition(".")
    return type(own, (), {"__module__": room, "__qualname__": own})
