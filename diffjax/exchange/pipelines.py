"""Pipelines of diffusers: folders with a network, text encoders, an autoencoder and a scheduler.

model_index.json          the class of each part
unet/, transformer/ or prior/     the network
text_encoder/, text_encoder_2/, text_encoder_3/, and a tokenizer for each
vae/ or movq/, scheduler/
image_encoder/                    of a prior
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffjax.codecs import Codec
from diffjax.codecs.autoencoders import AutoencoderFolder
from diffjax.codecs.embeddings import Embeddings
from diffjax.conditions import Tokens
from diffjax.errors import UserError, nearest
from diffjax.pretrained.folders import CONFIG, PIPELINE, read_object
from diffjax.pretrained.lora import NETWORK, Lora
from diffjax.text import (
    AlongFeatures,
    AlongTokens,
    FolderEncoder,
    PooledFrom,
    Prompts,
    Zeros,
    prompts,
    read_text_encoder,
)
from diffjax.text.encoders import Sizes

Components = Mapping[str, Any]
"""Replacements of parts of a pipeline by name: paths, and entries of the scheduler's config."""
NO_COMPONENTS: Components = MappingProxyType({})
SCHEDULER = "scheduler"
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_PRIOR = "prior"
_CODECS: Mapping[str, Callable[[str], Codec]] = {
    "vae": AutoencoderFolder,
    "movq": AutoencoderFolder,
    _PRIOR: Embeddings,
}
"""The parts that decode samples to pictures or embeddings, and the codecs that read them."""
DENOISERS = ("unet", "transformer", _PRIOR)
NETWORKS = (*DENOISERS, "vae", "movq", *_ENCODERS)
"""The parts of a pipeline that are networks here; other parts are settings and vocabularies."""


_CHATS = "Qwen3ForCausalLM"
_CLASSES = (
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "MultilingualCLIP",
    "T5EncoderModel",
    _CHATS,
)
"""The classes of text encoders of transformers that are known here."""
_CHAT_MARKS = (
    "<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
)
"""The text before and after a prompt of Qwen3: its `chat_template` with `enable_thinking=False`."""


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


def reads_prompts(path: Path) -> bool:
    """Whether a path is a pipeline whose pictures depend on texts, directly or through a prior.

    Example:
        >>> reads_prompts(Path("no such folder"))
        False
    """
    return is_pipeline(path) and bool(
        {*_ENCODERS, "movq"} & {*part_names(read_object(path / PIPELINE))}
    )


def part_names(entries: Mapping[str, Any]) -> list[str]:
    """The names of the parts that a pipeline has, from the entries of `model_index.json`."""
    return [name for name, x in entries.items() if isinstance(x, list) and x and x[0] is not None]


def part_of(pipeline: Path, name: str, components: Components = NO_COMPONENTS) -> Path:
    """The folder of a part of a pipeline, or the one that is given in its place.

    Raises:
        UserError: it is missing.
    """
    if name in components:
        return Path(components[name])
    if not (pipeline / name).is_dir():
        raise UserError(f"{pipeline} is half a pipeline: the folder {name} is missing")
    return pipeline / name


def check_components(components: Components, known: Sequence[str], source: Path) -> None:
    """Refuses replacements that no part of a pipeline can have, before anything is read.

    Args:
        components: the replacements by name.
        known: the names of the parts.
        source: the pipeline or file, for errors.

    Raises:
        UserError: no part has the name, or a path is empty or missing.
    """
    if not isinstance(components, Mapping):
        raise UserError(
            f"components={components!r} is to be names and paths, as {{'tokenizer': 'FOLDER'}}"
        )
    for name, value in components.items():
        if name not in known:
            raise UserError(
                f"components: {source} has no place for a component {name!r}; "
                f"{nearest(str(name), known)}"
            )
        if name == SCHEDULER:
            if not isinstance(value, Mapping):
                raise UserError(
                    f"components: the scheduler {value!r} is to be entries of its config, as "
                    "{'timestep_spacing': 'trailing'}"
                )
        elif not isinstance(value, str | Path) or not str(value) or not Path(value).exists():
            raise UserError(f"components: the {name} {str(value)!r} does not exist: name its path")


def components_of(pipeline: Path) -> list[str]:
    """The names of components of a pipeline that others can take the place of."""
    texts = texts_of(pipeline)
    return [NETWORK, SCHEDULER, *texts, *map(tokenizer_of, texts)]


def tokenizer_of(text_encoder: str) -> str:
    """The name of the tokenizer of a text encoder."""
    return text_encoder.replace("text_encoder", "tokenizer")


def codec_of(pipeline: Path) -> Codec:
    """What makes pictures of the samples of a pipeline; of a prior's, embeddings.

    Raises:
        UserError: its folder is missing.
    """
    names = part_names(read_object(pipeline / PIPELINE))
    name = next((name for name in _CODECS if name in names), "vae")
    return _CODECS[name](str(part_of(pipeline, name)))


def prompts_of(
    pipeline: Path,
    tokens: Tokens,
    loras: Sequence[Lora] = (),
    components: Components = NO_COMPONENTS,
    dtype: str = "float32",
) -> Prompts | None:
    """The condition of texts of a pipeline; None of one without text encoders.

    Padding counts as tokens, as in training. Encoders are combined as the models were trained:

    - one CLIP, after its final norm: Stable Diffusion;
    - one or two CLIPs, before the last layer and its norm, beside each other, and the pooled vector
      of the last: SDXL, where the network takes a pooled vector;
    - two CLIPs in the same way, with both pooled vectors, and then T5's tokens, or zeros without
      T5: Stable Diffusion 3;
    - T5, and the pooled vector of CLIP: Flux.1;
    - three layers of Qwen3 beside each other, at each quarter of its depth, of a text as the
      question in a chat that is answered without thinking; padding is not attended to within it:
      Flux.2 Klein;
    - CLIP, after its final norm, with its pooled vector, where padding is hidden: unCLIP's prior.

    T5 reads as many tokens as are left of those that the network was trained with.

    Args:
        pipeline: the folder.
        tokens: the token states that the network takes.
        loras: files of LoRA, which may be of text encoders too.
        components: folders of text encoders and tokenizers in the place of those of the pipeline.
        dtype: the compute type of the text encoders, in which their weights are kept.

    Raises:
        UserError: a part is missing, can't be read, or is of another model.
    """
    entries, names = read_object(pipeline / PIPELINE), texts_of(pipeline)
    if not names:
        return None
    read = functools.partial(_read, pipeline, loras, components, dtype=dtype)
    kind = entries[names[0]][1]
    longer = [name for name in names if entries[name][1] == "T5EncoderModel"]
    clips = [name for name in names if name not in longer]
    early = {"layer": -2, "normed": False}
    third = _ENCODERS[-1] in entries  # perhaps left out, with no class
    if kind not in _CLASSES:
        raise UserError(
            f"{pipeline} has a {kind}, a text encoder that is not known here ("
            f"{', '.join(_CLASSES)} are): pass texts=False, and states in the place of texts"
        )
    if kind == _CHATS:
        folder = part_of(pipeline, names[0], components)
        depth = int(read_object(folder / CONFIG)["num_hidden_layers"])
        layers = tuple(depth * quarter // 4 for quarter in (1, 2, 3))
        how = {"layer": layers, "normed": False, "padding": False, "around": _CHAT_MARKS}
        encoder = read(names[0], length=tokens.length, **how)
    elif _PRIOR in part_names(entries):
        encoder = read(clips[0], padding=False)
    elif not longer and not third:
        how = early if tokens.pooled_width else {}
        each = tuple(read(name, **how) for name in clips)
        encoder = each[0] if len(each) == 1 else AlongFeatures(each, pooled=(len(each) - 1,))
    elif not third:
        states = read(longer[0], length=tokens.length)
        encoder = PooledFrom(states, read(clips[0]))
    else:
        each = tuple(read(name, **early) for name in clips)
        beside = AlongFeatures(each, pooled=tuple(range(len(each))))
        left = tokens.length - beside.sizes.length
        nothing = Zeros(Sizes(left, tokens.width, 0))
        encoder = AlongTokens((beside, read(longer[0], length=left) if longer else nothing))
    check_sizes(encoder.sizes, tokens, pipeline)
    # SDXL was trained with zeros in the place of texts that were dropped.
    return prompts(encoder, None if entries.get("force_zeros_for_empty_prompt") else "")


def check_sizes(there: Sizes, tokens: Tokens, source: Path) -> None:
    """Refuses text encoders with other states than a network takes.

    Raises:
        UserError: widths differ.
    """
    needed = (tokens.width, tokens.pooled_width)
    if (there.width, there.pooled_width if tokens.pooled_width else 0) != needed:
        raise UserError(
            f"{source}: its text encoders have states of width {there.width} and pooled vectors "
            f"of {there.pooled_width}, and its network takes {needed[0]} and {needed[1]}"
        )


def _read(
    pipeline: Path, loras: Sequence[Lora], components: Components, name: str, **how: Any
) -> FolderEncoder:
    """A text encoder of a pipeline with its tokenizer, and what files of LoRA have for it."""
    files = tuple((lora.file, lora.weight) for lora in loras if name in lora.parts)
    tokenizer = part_of(pipeline, tokenizer_of(name), components)
    folder = part_of(pipeline, name, components)
    return read_text_encoder(folder, tokenizer, loras=files, **{"padding": True, **how})


def shift_depends_on_steps(pipeline: Path) -> bool:
    """Whether its shift depends on the number of steps, as that of Flux.2 does."""
    return str(read_object(pipeline / PIPELINE).get("_class_name", "")).startswith("Flux2")


def sets_times(pipeline: Path) -> bool:
    """Whether a pipeline has times of its own, uniform before the shift, as those of Flux have."""
    return str(read_object(pipeline / PIPELINE).get("_class_name", "")).startswith("Flux")
