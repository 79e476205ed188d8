"""Folders of weights with the names of this library, of any network.

config.json              the network's class, its settings, and the shape of its images
weights.safetensors      each parameter by its path, as block_0.attention.qkv.kernel
"""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from diffjax.errors import UserError
from diffjax.host.files import place_of, write_whole
from diffjax.pretrained.family import Denoiser
from diffjax.pretrained.files import read_state_dict, write_safetensors
from diffjax.pretrained.folders import CONFIG
from diffjax.pretrained.tensors import finite
from diffjax.spec import as_spec, build, from_json, spec, to_json

_WEIGHTS, _NETWORK, _SHAPE = "weights.safetensors", "network", "image_shape"
_CONDITION = "condition"


def write_own(folder: str | Path, network: Any, params: Any) -> None:
    """Writes a network and its parameters to a folder.

    Args:
        folder: is made if need be; the one above it must exist.
        network: a Flax module, or a `Denoiser`.
        params: nested dicts of arrays.

    Raises:
        UserError: a file can't be written.
    """
    place = place_of(str(folder))
    module = network.network if isinstance(network, Denoiser) else network
    entries: dict[str, Any] = {_NETWORK: _spec_of(module)}
    if isinstance(network, Denoiser):
        entries[_SHAPE] = tuple(network.image_shape)
        entries[_CONDITION] = as_spec(network.condition)
    leaves: Any = traverse_util.flatten_dict(params, sep=".")
    try:
        place.mkdir(exist_ok=True)
        write_safetensors(place / _WEIGHTS, {name: np.asarray(x) for name, x in leaves.items()})
        write_whole(place / CONFIG, to_json(ConfigDict(entries)))
    except OSError as error:
        raise UserError(f"can't write weights to {folder}: {error.strerror}") from error


def is_own(folder: Path) -> bool:
    """Whether a folder was written by `write_own`."""
    return (folder / CONFIG).is_file() and (folder / _WEIGHTS).is_file()


def read_own(
    folder: str | Path, allowed_packages: tuple[str, ...] = ("diffjax",)
) -> tuple[Any, dict[str, Any]]:
    """Reads a network and its parameters from a folder that `write_own` wrote.

    Args:
        folder: the folder.
        allowed_packages: whose networks its `config.json` may name.

    Returns:
        The network, a Flax module or a `Denoiser`, and nested dicts of arrays, which are views of
        the file.

    Raises:
        UserError: a file is missing or damaged, or names something else than a network.

    Example:
        >>> import tempfile
        >>> from diffjax.models import DiT
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_own(folder, DiT(num_classes=10), {"w": np.ones(2, np.float32)})
        ...     network, params = read_own(folder)
        ...     network.num_classes, params
        (10, {'w': array([1., 1.], dtype=float32)})
    """
    place = place_of(str(folder))
    try:
        entries = from_json((place / CONFIG).read_text(encoding="utf-8"), allowed_packages)
        network = build(entries[_NETWORK])
        if not isinstance(network, nn.Module):
            raise UserError(f"{_NETWORK} is a {type(network).__name__}, not a network")
        if _SHAPE in entries:
            height, width, channels = map(int, entries[_SHAPE])
            known = {"condition": build(entries[_CONDITION])} if _CONDITION in entries else {}
            network = Denoiser(network, (height, width, channels), **known)
    except KeyError as error:
        raise UserError(f"{place / CONFIG} lacks {_NETWORK}") from error
    except (OSError, TypeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"can't read {place / CONFIG}: {reason}") from error
    state = read_state_dict(place / _WEIGHTS)
    return network, traverse_util.unflatten_dict(
        {name: np.asarray(finite(name, x, str(place))) for name, x in state.items()}, sep="."
    )


def _spec_of(module: nn.Module) -> ConfigDict:
    """The spec of a network, without the fields that Flax adds."""
    fields = {field.name: getattr(module, field.name) for field in dataclasses.fields(module)}
    known = {name: as_spec(x) for name, x in fields.items() if name not in ("parent", "name")}
    return spec(type(module), **known)
