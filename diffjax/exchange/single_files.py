"""Files of whole models: a network, its text encoders and its autoencoder in one.

    model.diffusion_model.…                  the network
    cond_stage_model.transformer.…           CLIP L of Stable Diffusion 1
    cond_stage_model.model.…                 OpenCLIP H of Stable Diffusion 2
    conditioner.embedders.0.transformer.…    CLIP L of SDXL
    conditioner.embedders.1.model.…          OpenCLIP bigG of SDXL; 0 in its refiner
    first_stage_model.…                      the autoencoder

Such a file has no tokenizer and no scheduler.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffjax.conditions import Tokens, TokenStates
from diffjax.errors import UserError
from diffjax.exchange.pipelines import SCHEDULER, Components, check_sizes, tokenizer_of
from diffjax.models.clip_text.published import encoders_in
from diffjax.pretrained.family import Denoiser
from diffjax.pretrained.folders import read_weights
from diffjax.pretrained.lora import Lora
from diffjax.text import AlongFeatures, Prompts, prompts, read_text_encoder
from diffjax.text.encoders import Sizes

_FIRST = "tokenizer"
_TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_LEADING = {**_TABLE, "timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}


def texts_in(file: Path) -> list[str]:
    """The names of the text encoders in a file, as in the folder of a pipeline."""
    return list(encoders_in(read_weights(file).state)) if file.is_file() else []


def components_in(file: Path) -> list[str]:
    """The names of components that a file lacks: tokenizers, the first for all, a scheduler."""
    texts = texts_in(file)
    return [SCHEDULER, *dict.fromkeys([_FIRST, *map(tokenizer_of, texts)] if texts else [])]


def scheduler_of(denoiser: Denoiser) -> Mapping[str, Any]:
    """The scheduler of a Stable Diffusion, which no file has: Euler for SDXL, DDIM before."""
    xl = denoiser.network.embedding.added_width > 0
    name = "EulerDiscreteScheduler" if xl else "DDIMScheduler"
    return {"_class_name": name, **_LEADING, "clip_sample": False}


@dataclass(frozen=True)
class WithoutTokenizer:
    """In the place of the text encoders of a file, whose tokenizer is not known: refuses texts.

    Attributes:
        file: the file.
        sizes: those of the states that the network takes.
    """

    file: str
    sizes: Sizes

    def __call__(self, texts: Sequence[str]) -> TokenStates:
        """Refuses.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"the prompt {texts[0]!r} needs a tokenizer, which {self.file} lacks: name the folder "
            "of CLIP's by components={'tokenizer': FOLDER}, or --component=tokenizer:FOLDER"
        )

    def release(self) -> None:
        """There is nothing to free."""


def prompts_in(
    file: Path,
    tokens: Tokens,
    loras: Sequence[Lora],
    components: Components,
    dtype: str = "float32",
) -> Prompts | None:
    """The condition of texts of a file of a whole model; None of a file without text encoders.

    Stable Diffusion 2 has the states before the last layer, after the final norm. Folders of
    diffusers have an encoder without that layer instead.

    Args:
        file: the file.
        tokens: the token states that the network takes.
        loras: files of LoRA, which may be of text encoders too.
        components: the folder of the `tokenizer`, and that of the `tokenizer_2`, by default the
            same.
        dtype: the compute type of the text encoders, in which their weights are kept.

    Raises:
        UserError: a text encoder or a tokenizer can't be read, or is of another model.
    """
    names = texts_in(file)
    if not names:
        return None
    words = [components.get(tokenizer_of(name), components.get(_FIRST)) for name in names]
    if None in words:
        sizes = Sizes(tokens.length, tokens.width, tokens.pooled_width)
        return prompts(WithoutTokenizer(str(file), sizes), None)
    open_clip = encoders_in(read_weights(file).state)[names[0]].endswith("model.")
    early = tokens.pooled_width > 0 or open_clip
    each = tuple(
        read_text_encoder(
            file,
            tokenizer,
            dtype=dtype,
            part=name,
            layer=-2 if early else -1,
            normed=not tokens.pooled_width,
            padding=True,
            loras=tuple((lora.file, lora.weight) for lora in loras if name in lora.parts),
        )
        for name, tokenizer in zip(names, words, strict=True)
    )
    encoder = each[0] if len(each) == 1 else AlongFeatures(each, pooled=(len(each) - 1,))
    check_sizes(encoder.sizes, tokens, file)
    # SDXL was trained with zeros in the place of texts that were dropped, its refiner was not.
    return prompts(encoder, None if len(each) > 1 else "")
