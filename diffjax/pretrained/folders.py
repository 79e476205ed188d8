"""Folders of diffusers: `config.json`, and weights in one file or in shards; pipelines of them.

    transformer/config.json
    transformer/diffusion_pytorch_model.safetensors
    text_encoder/model.safetensors                       as transformers calls it
    vae/...                                              a pipeline has a folder for each part
    model_index.json

Shards are files `*-00001-of-00002.safetensors`, with an index, `*.safetensors.index.json`, of the
tensors in each of them. A folder without `config.json` may have an encoder and a decoder in two
files, `NAME_encoder.pth` and `NAME_decoder.pth`.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from diffjax.errors import UserError
from diffjax.host.files import place_of, write_json
from diffjax.pretrained.files import read_state_dict, write_safetensors
from diffjax.pretrained.persistent_pickles import is_persistent_pickle, read_persistent_pickle
from diffjax.pretrained.tensors import Tensor

CONFIG, PIPELINE = "config.json", "model_index.json"
WEIGHTS = "diffusion_pytorch_model"
"""The name of a file of weights of diffusers, without its end."""
_NAMES = (WEIGHTS, "model", "pytorch_model")  # the others of transformers
KINDS = ("safetensors", "bin", "pt", "pth")
"""The ends of names of files of weights."""
_DENOISERS = ("transformer", "unet", "prior")
_LARGEST_TEXT_BYTES = 2**26
MOST_SHARD_BYTES = 10 * 10**9
"""The largest file that diffusers writes."""


class Contents(NamedTuple):
    """What a file or a folder of weights has.

    Attributes:
        state: the tensors by name, which are read when they are used.
        config: the entries of `config.json`, or the settings in a pickle of NVIDIA's; empty for
            other files.
        place: the file, or the folder of the network within a pipeline.
    """

    state: Mapping[str, Tensor]
    config: Mapping[str, Any]
    place: Path

    def part(self, prefix: str) -> "Contents":
        """The tensors with names that begin with a prefix, without it and without a config.

        Example:
            >>> found = Contents({"vae.x": None, "text.y": None}, {}, Path("x.pth")).part("text.")
            >>> list(found.state), str(found.place)
            (['y'], 'x.pth: text.')
        """
        names = (name for name in self.state if name.startswith(prefix))
        state = {name.removeprefix(prefix): self.state[name] for name in names}
        return Contents(state, {}, Path(f"{self.place}: {prefix}"))


def read_weights(path: str | Path, part: str = "") -> Contents:
    """Reads a file of weights, a folder, or the denoiser of a pipeline.

    Args:
        path: the path of a file of torch or safetensors, or of a folder of diffusers or with an
            encoder and a decoder; `~` is the home folder.
        part: the part of a torch file that has several, such as `ema`; see `read_state_dict`.

    Raises:
        UserError: there is nothing of this kind, a shard is missing, or something is damaged.

    Example:
        >>> import tempfile, numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_folder(folder, {"w": np.ones(2, np.float32)}, {"_class_name": "Network"})
        ...     read_weights(folder).config["_class_name"]
        'Network'
    """
    place = place_of(str(path))
    if not place.is_dir():
        if is_persistent_pickle(place):
            network = read_persistent_pickle(place, part or "ema")
            settings = {"_class_name": network.class_name, **network.settings}
            return Contents(network.tensors, settings, place)
        return Contents(_unwrapped(read_state_dict(place, part)), {}, place)
    if not (place / CONFIG).exists() and (place / PIPELINE).exists():
        place = denoiser_of(place)
    if not (place / CONFIG).exists() and (pair := _pair(place)):
        return Contents(pair, {}, place)
    if not (place / CONFIG).exists():
        files = sorted(x.name for kind in KINDS for x in place.glob(f"*.{kind}"))
        hint = f"; name a file of it, {', '.join(files[:3])}" if files else ""
        raise UserError(
            f"the folder {path} is no network of diffusers: it has neither {CONFIG} nor "
            f"{PIPELINE}{hint}"
        )
    config = read_object(place / CONFIG)
    return Contents(_read_weights(place, part), config, place)


def is_folder(path: Path) -> bool:
    """Whether a path is a folder of diffusers or a pipeline of it."""
    return (path / CONFIG).is_file() or (path / PIPELINE).is_file()


def write_folder(
    folder: str | Path,
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    most_shard_bytes: int = MOST_SHARD_BYTES,
    name: str = WEIGHTS,
) -> None:
    """Writes a folder as diffusers does: `config.json`, and one file of weights or several shards.

    Args:
        folder: is made if need be; the one above it must exist.
        state: arrays by name.
        config: the entries of `config.json`.
        most_shard_bytes: the largest size of a file, if no tensor is larger.
        name: the name of the file of weights, without its end; transformers has `model`.

    Raises:
        UserError: a file can't be written.
    """
    place = place_of(str(folder))
    shards = _in_shards(state, most_shard_bytes)
    names = [f"{name}.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        names = [f"{name}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    try:
        place.mkdir(exist_ok=True)
        for file, shard in zip(names, shards, strict=True):
            write_safetensors(place / file, {key: state[key] for key in shard})
        if len(shards) > 1:
            where = {key: file for file, keys in zip(names, shards, strict=True) for key in keys}
            size = {"total_size": sum(state[key].nbytes for key in state)}
            index = {"metadata": size, "weight_map": dict(sorted(where.items()))}
            write_json(place / f"{name}.safetensors.index.json", index)
        write_json(place / CONFIG, config)
    except OSError as error:
        raise UserError(f"can't write weights to {folder}: {error.strerror}") from error


def _in_shards(state: Mapping[str, Any], most_bytes: int) -> list[list[str]]:
    """The names of the tensors of each shard, in their order."""
    shards, left = [[]], most_bytes
    for name, array in state.items():
        if array.nbytes > left and shards[-1]:
            shards.append([])
            left = most_bytes
        shards[-1].append(name)
        left -= array.nbytes
    return shards


def _unwrapped(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors without the prefixes that all have of a network that torch wrapped for training.

    Example:
        >>> list(_unwrapped({"module._orig_mod.w": None, "module._orig_mod.b": None}))
        ['w', 'b']
    """
    for prefix in ("module.", "_orig_mod."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def denoiser_of(pipeline: Path) -> Path:
    """The folder of the denoiser of a pipeline.

    Raises:
        UserError: it is missing.
    """
    parts = read_object(pipeline / PIPELINE)
    for name in _DENOISERS:
        if name in parts and (pipeline / name).is_dir():
            return pipeline / name
    names = ", ".join(path.name for path in sorted(pipeline.iterdir()) if path.is_dir())
    raise UserError(
        f"{pipeline} is a pipeline without a folder {' or '.join(_DENOISERS)}: "
        + (f"name one of its folders, {names}" if names else "copy or download it again")
    )


def _pair(folder: Path) -> dict[str, Tensor]:
    """The tensors of `NAME_encoder.pth` and `NAME_decoder.pth`; none without such a pair."""
    pairs = []
    for file in sorted(folder.glob("*_encoder.*")):
        other = file.with_name(file.name.replace("_encoder.", "_decoder."))
        if other.is_file():
            pairs.append({"encoder": file, "decoder": other})
    if len(pairs) > 1:
        names = ", ".join(pair["encoder"].name for pair in pairs)
        raise UserError(f"{folder} has several pairs of an encoder and a decoder: {names}")
    return {
        f"{part}.{name}": tensor
        for part, file in (pairs[0].items() if pairs else ())
        for name, tensor in read_state_dict(file).items()
    }


def _read_weights(folder: Path, part: str) -> dict[str, Tensor]:
    for kind in KINDS:
        if index := _only(folder, sorted(folder.glob(f"*.{kind}.index.json"))):
            return _read_shards(folder, index)
        if file := _only(folder, sorted(folder.glob(f"*.{kind}"))):
            return read_state_dict(file, part)
    raise UserError(f"{folder} has no weights: a file {WEIGHTS}.safetensors is missing")


def _only(folder: Path, files: list[Path]) -> Path | None:
    if len(files) > 1:
        # Other precisions lie beside the file of the usual name.
        usual = [
            file
            for file in files
            if file.name.startswith(tuple(f"{name}.{_kind_of(file)}" for name in _NAMES))
        ]
        if len(usual) != 1:
            names = ", ".join(file.name for file in files)
            raise UserError(f"{folder} has several files of weights: name one of {names}")
        files = usual
    return files[0] if files else None


def _kind_of(file: Path) -> str:
    return next(kind for kind in KINDS if f".{kind}" in file.name)


def _read_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
        raise UserError(f"{index} has no weight_map of names to files")
    state: dict[str, Tensor] = {}
    for name in dict.fromkeys(places.values()):
        if PurePath(name).name != name or name in ("", ".."):
            raise UserError(f"{index} names a shard outside of its folder: {name}")
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks the shard {name}, which {index.name} names")
        shard = read_state_dict(folder / name)
        for key in shard:
            if places.get(key) != name:
                where = f"in {places[key]} by" if key in places else "not in"
                raise UserError(f"{folder / name} has the tensor {key}, which is {where} the index")
        state |= shard
    if lacking := [key for key in places if key not in state]:
        raise UserError(f"{folder / places[lacking[0]]} lacks the tensor {lacking[0]} of the index")
    return state


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        if path.stat().st_size > _LARGEST_TEXT_BYTES:
            raise ValueError("it is too large")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_without_duplicates)
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"can't read {path}: {reason}") from error


def _without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it has {name!r} twice")
        found[name] = value
    return found
