"""Files of LoRA in the three dialects that `diffjax.pretrained.lora` reads."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffjax.pretrained.files import write_safetensors
from diffjax.pretrained.lora import LowRank

FILE = "pytorch_lora_weights.safetensors"
"""The name of a file of LoRA in a folder, where diffusers looks for it."""


class Dialect(NamedTuple):
    """How a file names the changes.

    Attributes:
        tensors: `(change, folder) -> tensors by name`; the folder is that of the network in a
            pipeline, `unet` or `transformer`.
        header: `(changes, folder) -> texts for the header`.
    """

    tensors: Callable[[LowRank, str], Mapping[str, Any]]
    header: Callable[[Sequence[LowRank], str], Mapping[str, str]]


def write_lora(
    file: Path, changes: Sequence[LowRank], dialect: Dialect, folder: str = "unet"
) -> None:
    """Writes changes of layers as a file of LoRA.

    Args:
        file: its path.
        changes: with the names of layers that the dialect's readers know.
        dialect: one of `DIALECTS`.
        folder: the folder of the network in a pipeline, `unet` or `transformer`.

    Raises:
        UserError: the file can't be written.
    """
    state: dict[str, Any] = {}
    for change in changes:
        state |= dialect.tensors(change, folder)
    write_safetensors(file, state, {"format": "pt", **dialect.header(changes, folder)})


def _peft(change: LowRank, folder: str) -> Mapping[str, Any]:
    begin = f"{folder}.{change.layer}"
    return {f"{begin}.lora_A.weight": change.down, f"{begin}.lora_B.weight": change.up}


def _settings_of_peft(changes: Sequence[LowRank], folder: str) -> Mapping[str, str]:
    """`LoraConfig`'s: what most layers have, and the rank and alpha of the others."""
    ranks = {change.layer: change.down.shape[0] for change in changes}
    alphas = {change.layer: _alpha(change) for change in changes}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    settings = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {layer: x for layer, x in ranks.items() if x != rank},
        "alpha_pattern": {layer: x for layer, x in alphas.items() if x != alpha},
        "target_modules": sorted(ranks),
    }
    named = {f"{folder}.{name}": value for name, value in settings.items()}
    return {"lora_adapter_metadata": json.dumps(named, sort_keys=True)}


def _old(change: LowRank, folder: str) -> Mapping[str, Any]:
    """Without alpha: the scale is in the second matrix."""
    begin = f"{folder}.{change.layer}.lora"
    up = np.asarray(change.up)
    return {
        f"{begin}.down.weight": change.down,
        f"{begin}.up.weight": (up * np.asarray(change.scale, up.dtype)),
    }


def _kohya(change: LowRank, folder: str) -> Mapping[str, Any]:
    del folder  # All networks are called unet there.
    begin = f"lora_unet_{change.layer.replace('.', '_')}"
    return {
        f"{begin}.lora_down.weight": change.down,
        f"{begin}.lora_up.weight": change.up,
        f"{begin}.alpha": np.asarray(_alpha(change), np.float32),
    }


def _alpha(change: LowRank) -> float:
    return change.scale * change.down.shape[0]


def _most_common(values: Mapping[str, Any]) -> Any:
    found = list(values.values())
    return max(found, key=found.count)


def _no_header(changes: Sequence[LowRank], folder: str) -> Mapping[str, str]:
    del changes, folder
    return {}


DIALECTS: Mapping[str, Dialect] = {
    "lora": Dialect(_peft, _settings_of_peft),
    "lora_old": Dialect(_old, _no_header),
    "lora_kohya": Dialect(_kohya, _no_header),
}
"""By the names of `experiments.convert --to`: peft and diffusers, older diffusers, kohya."""
