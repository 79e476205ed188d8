"""Reads named tensors from files of weights, and writes them as safetensors.

A file of safetensors has a header of names, types, shapes and places as JSON, then the numbers
(https://huggingface.co/docs/safetensors).
"""

import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from diffjax.errors import UserError
from diffjax.host.files import place_of
from diffjax.pretrained.persistent_pickles import is_persistent_pickle, read_persistent_pickle
from diffjax.pretrained.tensors import MappedFile, Tensor, first_bytes
from diffjax.pretrained.torch_files import read_torch

_DTYPES: Mapping[str, Any] = {
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


def read_state_dict(path: str | Path, part: str = "") -> dict[str, Tensor]:
    """Reads names, shapes and types of the tensors in a file; their numbers when they are used.

    The format is recognised by the content: safetensors, a file of `torch.save` (both formats), or
    a pickle of NVIDIA's (`diffjax.pretrained.persistent_pickles`). No code of a file is run. A file
    must not be changed while its tensors are in use.

    Args:
        path: the path of the file; `~` is the home folder.
        part: the part of a torch file that has several, such as `ema` and `model`, the one that is
            read; by default the first of `ema`, `model_ema1`, `model` and `state_dict` that is
            there. Of a pickle of NVIDIA's, the network, by default `ema`.

    Raises:
        UserError: there is no such file or part, the file has another format, is damaged, or
            contains anything but tensors. Damage within the numbers of a tensor is noticed when it
            is read.
    """
    place = place_of(str(path))
    start = first_bytes(place, 9)
    # A safetensors file begins with eight bytes for the length of its header, which is JSON.
    if start[8:9] != b"{":
        if is_persistent_pickle(place):
            return dict(read_persistent_pickle(place, part or "ema").tensors)
        return read_torch(str(place), part)
    if part:
        raise UserError(f"{path} has no part {part!r}: a file of safetensors has none")
    return _read_safetensors(str(place))


def read_safetensors_metadata(path: str | Path) -> dict[str, str]:
    """The texts in the header of a file of safetensors; none of a file in another format."""
    try:
        with safetensors.safe_open(str(place_of(str(path))), "numpy") as file:
            return dict(file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return {}


def write_safetensors(
    path: str | Path, state: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes named tensors as a safetensors file, atomically.

    Args:
        path: the path of the file; its folder must exist.
        state: arrays, or tensors of another file, by name.
        metadata: texts for the header; by default `{"format": "pt"}`, which other readers expect.

    Raises:
        UserError: the file can't be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_safetensors(f"{folder}/w.safetensors", {"w": np.ones(2, np.float32)})
        ...     np.asarray(read_state_dict(f"{folder}/w.safetensors")["w"])
        array([1., 1.], dtype=float32)
    """
    place = place_of(str(path))
    scratch = place.with_name(f"{place.name}.{platform.node()}.{os.getpid()}.tmp")
    # The writer copies the memory of an array as it lies, so an array may be no transposed view.
    arrays = {name: np.array(value, order="C", copy=None) for name, value in state.items()}
    header = dict(metadata or {"format": "pt"})
    try:
        safetensors.numpy.save_file(arrays, scratch, header)
        os.replace(scratch, place)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"can't write weights to {path}: {error}") from error
    finally:
        scratch.unlink(missing_ok=True)


def _read_safetensors(path: str) -> dict[str, Tensor]:
    try:
        file, content = safetensors.safe_open(path, "numpy"), MappedFile(path)
        # The library has checked that the tensors lie one after the other, without holes.
        tensors, start = {}, 8 + int.from_bytes(content.bytes(0, 8), "little")
        for name in file.offset_keys():
            header = file.get_slice(name)
            if header.get_dtype() not in _DTYPES:
                raise ValueError(f"{name!r} has the type {header.get_dtype()}; {_known_types()}")
            shape, dtype = tuple(header.get_shape()), np.dtype(_DTYPES[header.get_dtype()])
            tensors[name] = _tensor(content, start, shape, dtype)
            start += math.prod(shape) * dtype.itemsize
        return tensors
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"can't read weights from {path}: {error}") from error


def _tensor(content: MappedFile, start: int, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    def read() -> np.ndarray:
        return content.array(start, dtype, math.prod(shape)).reshape(shape)

    return Tensor(shape, dtype, read)


def _known_types() -> str:
    return f"known: {', '.join(_DTYPES)}"
