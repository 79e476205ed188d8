"""CLIP's image embeddings as features (Radford et al. 2021, arXiv:2103.00020).

A kernel distance on them is CMMD (Jayasumana et al. 2024, arXiv:2401.09603), which uses the
vision transformer L/14 at 336 pixels.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diffjax.data import to_uint8
from diffjax.errors import UserError
from diffjax.evaluation.extractors import dinov2
from diffjax.evaluation.extractors.features import Extractor, as_rgb, pretrained, with_params
from diffjax.models.clip.network import ClipVision
from diffjax.models.clip.published import FAMILY
from diffjax.models.clip.sizes import SIZES
from diffjax.models.clip_text.published import FAMILY as TEXT_FAMILY
from diffjax.pretrained.downloads import find_weights, sha256_of_file
from diffjax.pretrained.folders import Contents, read_object, read_weights
from diffjax.text.encoders import TextEncoder
from diffjax.text.tokenizers import read_tokenizer

SIZE = 336
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, for pixels in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
_PUBLISHED = SIZES["vitl14_336"]
_WEIGHTS = ("safetensors", "bin", "pt", "pth")
_TOKENIZER = ("tokenizer*.json", "vocab.*", "merges.txt", "special_tokens_map.json")


def resize(images: np.ndarray) -> np.ndarray:
    """Resizes images to 336x336 as in CMMD's own code.

    It crops the central square and applies Pillow's bicubic filter with antialiasing, on uint8.

    Args:
        images: `[B, H, W, C]` in [-1, 1], rounded to 256 levels first; C is 1 or 3.

    Returns:
        `[B, 336, 336, 3]` uint8.

    Example:
        >>> resize(np.ones((2, 32, 40, 1), np.float32)).shape
        (2, 336, 336, 3)
    """
    _, height, width, _ = images.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return dinov2.resize(images[:, top : top + side, left : left + side], SIZE)


def clip_features(
    weights: str = "", sha256: str = _PUBLISHED.sha256, batch_size_images: int = 32
) -> Extractor:
    """Extractor of image embeddings of CLIP ViT-L/14 at 336 pixels, `[N, 768]`, for CMMD.

    The embeddings have length 1.

    Args:
        weights: path of the `pytorch_model.bin` of `openai/clip-vit-large-patch14-336`, or of its
            weights as safetensors, or a URL to download one from
            (`diffjax.models.clip.sizes.SIZES`).
        sha256: hex digest of that file; change it to use another file.
        batch_size_images: images per network evaluation; 32 is typical.

    Raises:
        UserError: no such file, another hash, weights of another network.
    """
    if not weights:
        raise UserError(
            "clip_features needs weights: the path of the pytorch_model.bin of "
            f"openai/clip-vit-large-patch14-336, or its URL {_PUBLISHED.address}"
        )
    network = FAMILY.size("vitl14_336")
    _, params = FAMILY.read(find_weights(weights, sha256), network)

    @jax.jit
    def encode(params: Any, levels: jax.Array) -> tuple[jax.Array, None]:
        mean, std = (jnp.array(each)[None, None, None] for each in (MEAN, STD))
        pixels = (levels.astype(jnp.float32) / 255.0 - mean) / std
        # Lower precision, the default on GPUs and TPUs, would change the features.
        with jax.default_matmul_precision("highest"):
            return network.apply({"params": params}, pixels), None

    extractor = pretrained(
        "clip:vitl14_336",
        with_params(encode, params),
        batch_size_images,
        resize,
        architecture="CLIP ViT-L/14 at 336 pixels",
        layer="image embedding, divided by its length",
        weights_sha256=sha256.lower(),
        resize="middle square, Pillow bicubic to 336x336, antialiased, on uint8 (as cmmd)",
        scaling="(x/255 - mean) / std of CLIP",
        grey="repeated to three channels",
        precision="float32",
    )
    return replace(extractor, for_cmmd=True)


def clip_folder(weights: str = "", batch_size_images: int = 32, caption: str = "{}") -> Extractor:
    """Extractor of embeddings of images and texts by a CLIP in a folder of transformers.

    Both have length 1. Images are resized and normalised as the folder's
    `preprocessor_config.json` describes it, as `CLIPImageProcessor` does; without that file to the
    size of `config.json`, with the numbers of OpenAI's CLIP.

    Args:
        weights: the folder: `config.json`, weights, the tokenizer's files, and
            `preprocessor_config.json`; such as `openai/clip-vit-base-patch32`.
        batch_size_images: images per network evaluation; 32 is typical.
        caption: what is made of a text before it is read, `{}` being the text; such as "A photo
            depicts {}." of Hessel et al.

    Raises:
        UserError: no such folder, a file is missing or damaged, another network or preprocessing.

    References:
        Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
        2021, arXiv:2103.00020
    """
    if not weights:
        raise UserError(
            "clip_folder needs weights: the folder of a CLIP of transformers, such as "
            "openai/clip-vit-base-patch32, with config.json, weights and tokenizer"
        )
    if caption.count("{}") != 1:
        raise UserError(f"caption={caption!r} needs one {{}}, where the text is")
    contents = read_weights(weights)
    network, size = _vision(contents)
    how = _preprocessing(contents.place, size)
    text, source = TEXT_FAMILY.network_of(contents.state, weights, contents.config), weights
    params = FAMILY.to_ours(contents.state, network, source)
    words = read_tokenizer(weights, text.length)
    encoder = TextEncoder(words, text, TEXT_FAMILY.to_ours(contents.state, text, source))

    @jax.jit
    def encode(params: Any, levels: jax.Array) -> tuple[jax.Array, None]:
        mean, std = (jnp.array(each)[None, None, None] for each in (how.mean, how.std))
        pixels = (levels.astype(jnp.float32) / 255.0 - mean) / std
        with jax.default_matmul_precision("highest"):
            features: Any = network.apply({"params": params}, pixels)
        return features, None

    @functools.lru_cache(2)  # those of samples and of test images, for each recipe again
    def embedded(given: tuple[str, ...]) -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            pooled = np.asarray(encoder([caption.format(one) for one in given]).pooled)
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)

    vit = network.vit
    extractor = pretrained(
        f"clip_folder:{contents.place.name}",
        with_params(encode, params),
        batch_size_images,
        how.resize,
        architecture=f"CLIP, images of {vit.depth} blocks of {vit.width}, patches of {vit.patch}; "
        f"texts of {text.depth} blocks of {text.width}",
        layer="embedding, divided by its length",
        weights_sha256=_sha256_of(contents.place, [f"*.{kind}" for kind in _WEIGHTS]),
        tokenizer_sha256=_sha256_of(contents.place, _TOKENIZER),
        resize=how.describe(),
        scaling=f"(x/255 - mean) / std, mean {list(how.mean)}, std {list(how.std)}",
        grey="repeated to three channels",
        caption=caption,
        precision="float32",
    )
    return replace(extractor, texts=lambda given: embedded(tuple(given)))


class Preprocessing(NamedTuple):
    """What `CLIPImageProcessor` does with images.

    Attributes:
        shortest: the shortest side of an image is resized to so many pixels.
        side: the side of the square in the middle that is cut out.
        mean: the mean of the channels, for pixels in [0, 1].
        std: the standard deviation of the channels.
    """

    shortest: int
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def describe(self) -> str:
        return (
            f"shortest side to {self.shortest}, Pillow bicubic, antialiased, on uint8, then the "
            f"middle {self.side}x{self.side} (as CLIPImageProcessor)"
        )

    def resize(self, images: np.ndarray) -> np.ndarray:
        """Images `[B, H, W, C]` in [-1, 1] -> `[B, side, side, 3]` uint8."""
        levels = np.asarray(as_rgb(to_uint8(np.clip(images, -1.0, 1.0))))
        _, height, width, _ = levels.shape
        # The longer side is rounded down, and so is the place of the middle.
        rows, columns = (self.shortest * n // min(height, width) for n in (height, width))
        top, left = (rows - self.side) // 2, (columns - self.side) // 2
        box = (left, top, left + self.side, top + self.side)
        bicubic = Image.Resampling.BICUBIC
        return np.stack(
            [
                np.asarray(Image.fromarray(one).resize((columns, rows), bicubic).crop(box))
                for one in levels
            ]
        )


def _vision(contents: Contents) -> tuple[ClipVision, int]:
    """The image encoder of a folder, and the side of its images in pixels."""
    config, source = contents.config.get("vision_config"), str(contents.place)
    if not isinstance(config, Mapping) or "text_config" not in contents.config:
        raise UserError(f"{source} is no CLIP of images and texts: its config.json has one of both")
    # transformers leaves out what is as in OpenAI's ViT-B/32.
    settings = {
        "num_heads": config.get("num_attention_heads", 12),
        "activation": config.get("hidden_act", "quick_gelu"),
        "epsilon": config.get("layer_norm_eps", 1e-5),
    }
    network = FAMILY.network_of(contents.state, source, **settings)
    return network, network.vit.grid * network.vit.patch


def _preprocessing(folder: Path, side: int) -> Preprocessing:
    """How images are resized and scaled for a network of images of `side` pixels."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return Preprocessing(side, side, MEAN, STD)
    given = read_object(file)

    def pixels(name: str, of: str) -> Any:
        found = given.get(name, side)
        return found.get(of) if isinstance(found, Mapping) else found

    shortest, square = pixels("size", "shortest_edge"), pixels("crop_size", "height")
    resample = given.get("resample", Image.Resampling.BICUBIC)
    if square != side or not isinstance(shortest, int) or shortest < side:
        raise UserError(
            f"{file} makes images of {square} pixels from {shortest}, and the network reads {side}"
        )
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    left_out = [step for step in steps if not given.get(step, True)]
    if left_out or resample != Image.Resampling.BICUBIC:
        odd = f"{left_out[0]}=false" if left_out else f"resample={resample}"
        raise UserError(f"{file} has {odd}: only bicubic resizing with all steps is known")
    mean, std = (tuple(given.get(f"image_{name}", x)) for name, x in (("mean", MEAN), ("std", STD)))
    return Preprocessing(shortest, side, mean, std)


def _sha256_of(folder: Path, patterns: Sequence[str]) -> str:
    """The hash of a file, or that of the hashes of several, in the order of their names."""
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    hashes = [sha256_of_file(file) for file in files]
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()
