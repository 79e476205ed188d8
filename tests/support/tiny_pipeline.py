"""A pipeline of Stable Diffusion as diffusers saves it, of drawn weights, written without torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffjax.codecs.autoencoders import Variational, write_autoencoder
from diffjax.models.autoencoder_kl.network import AutoencoderKL
from diffjax.models.clip_text.network import ClipText
from diffjax.models.clip_text.published import FAMILY as CLIP
from diffjax.models.stable_diffusion.published import FAMILY as STABLE_DIFFUSION
from diffjax.models.unet import Transformers
from diffjax.pretrained.folders import write_folder
from diffjax.text import read_tokenizer
from tests.models.published.test_families import drawn
from tests.support.vocabularies import write_clip

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
WIDTH, LENGTH, SIDE = 8, 9, 16
"""Of token states, of texts, and of pictures, whose latents have half that side."""
_CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "vae": ("diffusers", "AutoencoderKL"),
    "scheduler": ("diffusers", "DDIMScheduler"),
}
CAPTIONS = ("red", "blue", "green")


def write_pipeline(place: Path, **scheduler: Any) -> Path:
    """Writes the folder; entries of the scheduler beside those of Stable Diffusion 1."""
    place.mkdir()
    entries = {"_class_name": "StableDiffusionPipeline", **_CLASSES}
    (place / "model_index.json").write_text(json.dumps(entries))
    (place / "scheduler").mkdir()
    text = json.dumps({**SCHEDULER, **scheduler})
    (place / "scheduler/scheduler_config.json").write_text(text)
    words = read_tokenizer(write_clip(place / "tokenizer")).library.get_vocab_size()
    texts = ClipText(WIDTH, 1, 2, vocabulary=words, length=LENGTH)
    _write(place / "text_encoder", CLIP, texts, "model")
    denoiser = STABLE_DIFFUSION.network(
        image_shape=(SIDE // 2, SIDE // 2, 4),
        context_width=WIDTH,
        channels=8,
        channel_multipliers=(1,),
        num_res_blocks=1,
        num_heads=2,
        num_groups=4,
        transformers=Transformers((1,)),
    )
    _write(place / "unet", STABLE_DIFFUSION, denoiser, "diffusion_pytorch_model")
    autoencoder = Variational(AutoencoderKL(channels=(8, 8), num_res_blocks=1, num_groups=4))
    params = drawn(autoencoder.layout, autoencoder.network)
    write_autoencoder(place / "vae", autoencoder, params, 0.18215, 0.0)
    return place


def _write(folder: Path, family: Any, network: Any, name: str) -> None:
    state = family.to_theirs(drawn(family, network), network)
    write_folder(folder, state, family.config.entries(network), name=name)


def write_pictures(place: Path, number: int = 4, captions: bool = True) -> Path:
    """Writes pictures of one colour each, with captions beside them."""
    place.mkdir()
    rng = np.random.default_rng(0)
    for i in range(number):
        colour = tuple(rng.integers(0, 256, 3).tolist())
        Image.new("RGB", (SIDE + i, SIDE), colour).save(place / f"{i}.png")
        if captions:
            (place / f"{i}.txt").write_text(CAPTIONS[i % 3])
    return place
