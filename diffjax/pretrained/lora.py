"""Files of LoRA: changes of low rank of the layers of a published network.

    W' = W + weight * scale * B A        A [rank, in], B [out, rank], scale = alpha / rank

The weights of a convolution are a matrix of `out` rows. Three dialects name the same two matrices:

| | A | B | names of layers |
|---|---|---|---|
| peft, diffusers | `unet.LAYER.lora_A.weight` | `lora_B` | as in the network's tensors |
| older diffusers | `unet.LAYER.lora.down.weight` | `lora.up` | also `attn1.processor.to_q_lora` |
| kohya | `lora_unet_LAYER.lora_down.weight` | `lora_up` | with `_` for `.` |

alpha is a tensor `LAYER.alpha`, or is in the settings of peft: in the header of the file
(`lora_adapter_metadata`) or beside it (`adapter_config.json`). Without any, scale is 1.
"""

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffjax.errors import UserError
from diffjax.host.files import place_of
from diffjax.pretrained.downloads import sha256_of_file
from diffjax.pretrained.files import read_safetensors_metadata, read_state_dict
from diffjax.pretrained.folders import read_object
from diffjax.pretrained.tensors import Tensor, finite

NETWORK = "network"
"""The part of a pipeline that denoises; others have the names of their folders."""

_PARTS = {
    "unet.": NETWORK,
    "transformer.": NETWORK,
    "diffusion_model.": NETWORK,
    "base_model.model.": NETWORK,
    "lora_unet_": NETWORK,
    "lora_transformer_": NETWORK,
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
_MATRIX = re.compile(
    r"(?P<layer>.+?)(?:\.lora_(?P<peft>[AB])(?:\.default)?|"
    r"(?:\.lora|_lora|\.lora_linear_layer)\.(?P<old>down|up)|"
    r"\.lora_(?P<kohya>down|up))\.weight"
)
_ALPHA = re.compile(r"(?P<layer>.+)\.alpha")
_DOWN = ("A", "down")
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class LowRank(NamedTuple):
    """The change of one layer.

    Attributes:
        layer: the name of the layer, perhaps with `_` for `.`.
        down: A, `[rank, in, ...]`.
        up: B, `[out, rank, ...]`.
        scale: alpha / rank.
    """

    layer: str
    down: Tensor | np.ndarray
    up: Tensor | np.ndarray
    scale: float

    def change(self, shape: Sequence[int]) -> np.ndarray:
        """The change of weights of a shape `[out, ...]`: `scale * B A`."""
        down, up = (np.asarray(x).astype(np.float32) for x in (self.down, self.up))
        rank = len(down)
        product = up.reshape(-1, rank) @ down.reshape(rank, -1)
        return (np.float32(self.scale) * product).reshape(shape)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether weights of a shape can be changed by it."""
        out, rank = self.up.shape[:2]
        return (
            (out, rank) == (shape[0], self.down.shape[0])
            and math.prod(self.up.shape[2:]) == 1
            and math.prod(self.down.shape[1:]) == math.prod(shape[1:])
        )


@dataclass(frozen=True, eq=False)
class Lora:
    """A file of LoRA, and how strongly it is used.

    Attributes:
        file: the file.
        weight: 1 is as it was trained, 0 changes nothing.
        sha256: hex digest of the file.
        parts: the changes by the part of a pipeline: `network`, `text_encoder`, and others of
            the names of their folders.
    """

    file: str
    weight: float
    sha256: str
    parts: Mapping[str, Sequence[LowRank]]

    @property
    def facts(self) -> dict[str, Any]:
        """What a run records of it."""
        return {"file": self.file, "sha256": self.sha256, "weight": self.weight}


def read_lora(path: str | Path, weight: float = 1.0) -> Lora:
    """Reads a file of LoRA in any of the three dialects; its matrices when they are used.

    Args:
        path: the path of the file, of safetensors or torch.
        weight: how strongly it is used: 1 is as it was trained, 0 changes nothing, and a negative
            weight goes the other way. Typical are 0.5 to 1.

    Raises:
        UserError: it can't be read, has something else than LoRA, half a layer, or no numeric
            weight.
    """
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise UserError(f"the LoRA {path} has the weight {weight!r}, which is to be a number")
    place = place_of(str(path))
    if place.is_dir():
        files = ", ".join(sorted(file.name for file in place.glob("*.safetensors"))) or "none"
        raise UserError(f"{path} is a folder: name a file of LoRA; it has {files}")
    state = read_state_dict(place)
    matrices: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for name, tensor in state.items():
        if match := _MATRIX.fullmatch(name):
            kind = match["peft"] or match["old"] or match["kohya"]
            which = "down" if kind in _DOWN else "up"
            if len(tensor.shape) < 2 or not all(tensor.shape):
                raise UserError(f"{path}: {name} is {list(tensor.shape)}, which is no matrix")
            matrices.setdefault(match["layer"], {})[which] = finite(name, tensor, str(path))
        elif (match := _ALPHA.fullmatch(name)) and math.prod(tensor.shape) == 1:
            alpha = np.asarray(finite(name, tensor, str(path)))
            alphas[match["layer"]] = float(alpha.astype(np.float32).reshape(()))
        else:
            raise UserError(
                f"{path}: the tensor {name} is of no LoRA that is known, whose tensors end in "
                "lora_A.weight and lora_B.weight, lora.down.weight and lora.up.weight, or "
                "lora_down.weight, lora_up.weight and alpha"
            )
    if not matrices:
        raise UserError(f"{path} has no LoRA: it has no tensors")
    parts: dict[str, list[LowRank]] = {}
    settings = _settings(place, matrices)
    for name, found in matrices.items():
        for which in ("down", "up"):
            if which not in found:
                raise UserError(f"{path} has half a LoRA of {name}: its {which} matrix is missing")
        part, prefix, layer = _named(name)
        rank = found["down"].shape[0]
        of_part = {k.removeprefix(prefix): x for k, x in settings.items() if k.startswith(prefix)}
        scale = _scale(of_part or settings, layer, rank, str(path))
        if name in alphas:
            scale = alphas[name] / rank
        parts.setdefault(part, []).append(LowRank(layer, found["down"], found["up"], scale))
    if alone := sorted(alphas.keys() - matrices.keys()):
        raise UserError(f"{path} has an alpha of {alone[0]} without its matrices")
    return Lora(str(path), float(weight), sha256_of_file(place), parts)


def _named(name: str) -> tuple[str, str, str]:
    """The part that a layer is of, the beginning that says so, and the name of the layer."""
    prefix = next((prefix for prefix in _PARTS if name.startswith(prefix)), "")
    layer = name.removeprefix(prefix).replace(".processor.", ".")
    stem, _, last = layer.rpartition(".")
    if stem.endswith(".self_attn") and last in _OLD_TEXT:
        layer = f"{stem}.{_OLD_TEXT[last]}"
    elif last == "to_out":
        layer = f"{layer}.0"
    return _PARTS.get(prefix, NETWORK), prefix, layer


def _settings(file: Path, names: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of peft, from the header of a file or from beside it; empty without."""
    text = read_safetensors_metadata(file).get("lora_adapter_metadata")
    if text is not None:
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{file}: lora_adapter_metadata in its header is no JSON object")
        return found
    if any(name.startswith("base_model.model.") for name in names):
        return read_object(file.with_name("adapter_config.json"))  # of peft, which has alpha
    return {}


def _scale(settings: Mapping[str, Any], layer: str, rank: int, file: str) -> float:
    """alpha / rank by peft's settings; patterns of names come before the common value."""
    try:
        alpha = settings.get("lora_alpha", rank)
        for pattern, value in (settings.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", layer):
                alpha = value
        return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise UserError(f"{file}: its settings of peft can't be used: {error}") from error


def unknown_layers(lora: Lora, part: str, state: Mapping[str, Any]) -> list[str]:
    """The layers of a part that tensors of a network lack, in the order of the file."""
    known = _known(state)
    return [change.layer for change in lora.parts[part] if _flat(change.layer) not in known]


def of_another_network(lora: Lora, part: str, state: Mapping[str, Any], source: str) -> UserError:
    """The error that names the first layer that a network lacks, and the nearest one it has."""
    unknown, known = unknown_layers(lora, part, state), _known(state)
    count = f", {len(unknown)} of {len(lora.parts[part])} layers" if len(unknown) > 1 else ""
    close = difflib.get_close_matches(_flat(unknown[0]), known, n=1)
    near = f"; did you mean {known[close[0]]}?" if close else ""
    return UserError(
        f"the LoRA {lora.file} is of another network than {source}, which has no layer "
        f"{unknown[0]}{count}{near}"
    )


def merged(state: Mapping[str, Any], lora: Lora, part: str, source: str) -> dict[str, Any]:
    """Published tensors with the changes of a LoRA, which are computed when a tensor is read.

    Args:
        state: the tensors of a network by name.
        lora: the file; all its layers are there (`unknown_layers`).
        part: the part of a pipeline that the tensors are of.
        source: the file of the tensors, for errors.

    Returns:
        The tensors; those that the file does not name are the same objects. Changed ones are
        float32, also where they are stored in half precision.

    Raises:
        UserError: matrices have other sizes than a layer.
    """
    found = dict(state)
    for name, change in changes_by_name(state, lora, part, source).items():
        found[name] = _changed(state[name], change, np.float32(lora.weight))
    return found


def changes_by_name(
    state: Mapping[str, Any], lora: Lora, part: str, source: str
) -> dict[str, LowRank]:
    """The changes of a part by the names of the tensors that they are of.

    Args:
        state: tensors or shapes of a network by name; all layers are there (`unknown_layers`).
        lora: the file.
        part: the part of a pipeline that the tensors are of.
        source: the file of the tensors, for errors.

    Raises:
        UserError: matrices have other sizes than a layer.
    """
    known, found = _known(state), {}
    for change in lora.parts[part]:
        layer = known[_flat(change.layer)]
        name = f"{layer}.weight"
        if not change.fits(state[name].shape):
            raise UserError(
                f"the LoRA {lora.file} is of another network than {source}: {layer} is "
                f"{list(state[name].shape)}, and its matrices are {list(change.up.shape)} and "
                f"{list(change.down.shape)}"
            )
        found[name] = change
    return found


def _changed(before: Any, change: LowRank, weight: np.float32) -> Tensor:
    shape = tuple(before.shape)

    def read() -> np.ndarray:
        return np.asarray(before).astype(np.float32) + weight * change.change(shape)

    return Tensor(shape, np.dtype(np.float32), read)


def _known(state: Mapping[str, Any]) -> dict[str, str]:
    """The layers with weights of two or more axes, by their names with `_` for `.`."""
    return {
        _flat(layer): layer
        for name, x in state.items()
        if name.endswith(".weight") and len(x.shape) > 1
        for layer in [name.removesuffix(".weight")]
    }


def _flat(layer: str) -> str:
    return layer.replace(".", "_")
