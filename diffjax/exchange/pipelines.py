"""Pipelines of diffusers: folders with a network, text encoders, an autoencoder and a scheduler.

model_index.json          the class of each part
unet/ or transformer/     the network
text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/
vae/, scheduler/
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffjax.conditions import Tokens
from diffjax.errors import UserError
from diffjax.pretrained.folders import PIPELINE, read_object
from diffjax.pretrained.lora import Lora
from diffjax.text import AlongFeatures, Prompts, prompts, read_text_encoder

_ENCODERS = ("text_encoder", "text_encoder_2")
NETWORKS = ("unet", "transformer", "vae", *_ENCODERS)
"""The parts of a pipeline that are networks here; other parts are settings and vocabularies."""


def is_pipeline(path: Path) -> bool:
    """Whether a path is the folder of a pipeline."""
    return (path / PIPELINE).is_file()


def texts_of(path: Path) -> list[str]:
    """The names of the text encoders of a pipeline; none of another path.

    Example:
        >>> texts_of(Path("no such folder"))
        []
    """
    if not is_pipeline(path):
        return []
    return [name for name in part_names(read_object(path / PIPELINE)) if name in _ENCODERS]


def part_names(entries: Mapping[str, Any]) -> list[str]:
    """The names of the parts that a pipeline has, from the entries of `model_index.json`."""
    return [name for name, x in entries.items() if isinstance(x, list) and x and x[0] is not None]


def part_of(pipeline: Path, name: str) -> Path:
    """The folder of a part of a pipeline.

    Raises:
        UserError: it is missing.
    """
    if not (pipeline / name).is_dir():
        raise UserError(f"{pipeline} is half a pipeline: the folder {name} is missing")
    return pipeline / name


def prompts_of(pipeline: Path, tokens: Tokens, loras: Sequence[Lora] = ()) -> Prompts | None:
    """The condition of texts of a pipeline; None of one without text encoders.

    One encoder is used after its final norm (Stable Diffusion). Where the network takes a pooled
    vector, states are those of the layer before the last, without the norm, beside each other, and
    the last encoder pools (SDXL). Padding counts as tokens, as in training.

    Args:
        pipeline: the folder.
        tokens: the token states that the network takes.
        loras: files of LoRA, which may be of text encoders too.

    Raises:
        UserError: a part is missing, can't be read, or is of another model.
    """
    entries, names = read_object(pipeline / PIPELINE), texts_of(pipeline)
    if not names:
        return None
    how = {"layer": -2, "normed": False} if tokens.pooled_width else {}
    each = tuple(
        read_text_encoder(
            part_of(pipeline, name),
            part_of(pipeline, name.replace("text_encoder", "tokenizer")),
            padding=True,
            loras=tuple((lora.file, lora.weight) for lora in loras if name in lora.parts),
            **how,
        )
        for name in names
    )
    encoder = each[0] if len(each) == 1 else AlongFeatures(each, pooled=(len(each) - 1,))
    there, needed = encoder.sizes, (tokens.width, tokens.pooled_width)
    if (there.width, there.pooled_width if tokens.pooled_width else 0) != needed:
        raise UserError(
            f"{pipeline}: its text encoders have states of width {there.width} and pooled vectors "
            f"of {there.pooled_width}, and its network takes {needed[0]} and {needed[1]}"
        )
    # SDXL was trained with zeros in the place of texts that were dropped.
    return prompts(encoder, None if entries.get("force_zeros_for_empty_prompt") else "")
