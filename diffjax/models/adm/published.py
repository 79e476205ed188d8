"""The layouts of the authors' files (openai/guided-diffusion).

Blocks are numbered on the way down and on the way up, and each has places for a residual block, its
attention, and a residual block that doubles. The columns of queries, keys and values are ordered
head by head, but for the network of 64 pixels; the network here has the same order (`qkv_order`).

The networks are of DDPM's objective with 1,000 steps and a learned variance: noise labels are whole
timesteps 0 to 999. The one of 64 pixels has the cosine schedule, the others the linear one.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.models.adm.network import ADM, ADMClassifier, ADMUpsampler
from diffjax.models.adm.sizes import CLASSIFIERS, SIZES, UPSAMPLERS
from diffjax.models.unet import UNet, multipliers_of
from diffjax.pretrained.family import Denoiser, Family, Published, Size
from diffjax.pretrained.tables import Row, Table, count, layer, norm, within
from diffjax.pretrained.tensors import Tensor
from diffjax.pretrained.transforms import conv, dense, each, squeeze, then

_pixelwise = then(squeeze(2, 3), dense)
"""A dense layer of each pixel, `[out, in, 1, 1]` there."""
_of_sequence = then(squeeze(2), dense)
"""A dense layer of each pixel of a row of pixels, `[out, in, 1]` there."""

_RESIDUAL = (
    *norm("in_layers.0", "norm_1"),
    *layer("in_layers.2", "conv_1", conv),
    *layer("emb_layers.1", "modulation"),
    *norm("out_layers.0", "norm_2"),
    *layer("out_layers.3", "conv_2", conv),
    *layer("skip_connection", "skip", _pixelwise),
)
_ATTENTION = (
    *norm("norm", "norm"),
    *layer("qkv", "attention/qkv", _of_sequence),
    *layer("proj_out", "attention/out", _of_sequence),
)
_REST = (
    *layer("time_embed.0", "conditioning/hidden"),
    *layer("time_embed.2", "conditioning/out"),
    Row("label_emb.weight", "conditioning/label/embedding"),
    *layer("input_blocks.0.0", "conv_in", conv),
    *norm("out.0", "final_norm"),
    *layer("out.2", "final_conv", conv),
    Row(
        "out.2.positional_embedding",
        "pool/positions",
        each(lambda array: array.T[None], lambda array: array[0].T),
    ),
    *layer("out.2.qkv_proj", "pool/qkv", _of_sequence),
    *layer("out.2.c_proj", "pool/out", _of_sequence),
)


def _places(network: UNet, height: int) -> Iterator[tuple[str, str]]:
    """The published place and our name of each block, residual ones and those of attention."""
    levels, blocks = len(network.channel_multipliers), network.num_res_blocks
    number = 0
    for level in range(levels):
        for i in range(blocks):
            number += 1
            yield f"input_blocks.{number}.0", f"down_{level}_{i}"
            yield f"input_blocks.{number}.1", f"down_{level}_{i}_attention"
        if level < levels - 1:
            number += 1
            yield f"input_blocks.{number}.0", f"down_{level}_resample"
    yield from (
        ("middle_block.0", "middle_0"),
        ("middle_block.1", "middle_attention"),
        ("middle_block.2", "middle_1"),
    )
    number = -1
    for level in reversed(range(levels)):
        for i in range(blocks + 1):
            number += 1
            yield f"output_blocks.{number}.0", f"up_{level}_{i}"
            yield f"output_blocks.{number}.1", f"up_{level}_{i}_attention"
        attends = height >> level in network.attention_resolutions
        yield f"output_blocks.{number}.{1 + attends}", f"up_{level}_resample"


def _table(denoiser: Denoiser) -> Table:
    rows = list(_REST)
    for theirs, ours in _places(denoiser.network, denoiser.image_shape[0]):
        attention = ours.endswith("attention")
        rows += within(_ATTENTION if attention else _RESIDUAL, theirs, ours)
    return rows


def adm(
    image_shape: tuple[int, int, int] = (256, 256, 3),
    num_classes: int = 1000,
    out_channels: int = 6,
    **settings: Any,
) -> Denoiser:
    """An ADM with the authors' settings: ImageNet, learned variance."""
    return Denoiser(ADM(num_classes, out_channels=out_channels, **settings), image_shape)


def upsampler(
    image_shape: tuple[int, int, int] = (256, 256, 3),
    num_classes: int = 1000,
    out_channels: int = 6,
    **settings: Any,
) -> Denoiser:
    """An upsampler with the authors' settings: ImageNet, learned variance, four times the side."""
    return Denoiser(ADMUpsampler(num_classes, out_channels=out_channels, **settings), image_shape)


def classifier(
    image_shape: tuple[int, int, int] = (256, 256, 3), num_classes: int = 1000, **settings: Any
) -> Denoiser:
    """A classifier with the authors' settings: the logits of ImageNet's classes."""
    return Denoiser(ADMClassifier(0, out_channels=num_classes, **settings), image_shape)


def _inputs_of_upsampler(denoiser: Denoiser) -> tuple[Any, ...]:
    x, noise_label, labels = denoiser.inputs
    height, width, channels = denoiser.image_shape
    small = jax.ShapeDtypeStruct((1, height // 4, width // 4, channels), jnp.float32)
    return x, noise_label, {"label": labels, "small": small}


def _of_size(settings: Mapping[str, Any]) -> tuple[int, ...]:
    height, levels = settings["image_shape"][0], len(settings["channel_multipliers"])
    there = settings.get("attention_resolutions", ADM.attention_resolutions)
    return tuple(level for level in range(levels) if height >> level in there)


def _common(shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, Size]) -> dict[str, Any]:
    """The settings that follow from the way down, and from a size with attention where it is here.

    Levels begin after a block that halves, which looks like any other; but the last level of all
    networks attends, and a block that halves does not.
    """
    channels = shapes["time_embed.0.weight"][1]
    number = count("input_blocks.{i}.0.in_layers.2.bias", shapes)
    blocks = 0
    while f"input_blocks.{number - blocks}.1.qkv.bias" in shapes:
        blocks += 1
    levels = (number + 1) // (blocks + 1)
    first = [1 + level * (blocks + 1) for level in range(levels)]
    found = {
        "channels": channels,
        "channel_multipliers": multipliers_of(
            channels, [shapes[f"input_blocks.{i}.0.in_layers.2.bias"][0] for i in first]
        ),
        "num_res_blocks": blocks,
        "first_multiplier": shapes["input_blocks.0.0.bias"][0] / channels,
    }
    attending = tuple(
        level for level, i in enumerate(first) if f"input_blocks.{i}.1.qkv.bias" in shapes
    )
    for size in sizes.values():
        settings = {"first_multiplier": 1.0, "num_res_blocks": 2, **size.settings}
        same = all(settings.get(name, value) == value for name, value in found.items())
        if same and _of_size(size.settings) == attending:
            found["image_shape"] = size.settings["image_shape"]
    return found


def _recognise_adm(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return _recognise(shapes, SIZES, 1)


def _recognise_upsampler(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return _recognise(shapes, UPSAMPLERS, 2)


def _recognise(
    shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, Size], images: int
) -> dict[str, Any]:
    """The settings of a denoiser whose input is one image, or two of them beside each other."""
    channels = shapes["input_blocks.0.0.weight"][1]
    if channels != 3 * images:
        raise KeyError(f"input_blocks.0.0.weight of {3 * images} channels")
    return _common(shapes, sizes) | {
        "num_classes": shapes.get("label_emb.weight", (0,))[0],
        "out_channels": shapes["out.2.bias"][0],
    }


def _published(denoiser: Denoiser) -> Published:
    """Without guidance by a classifier; 250 steps as the authors' README has them."""
    learned = denoiser.network.out_channels == 2 * denoiser.image_shape[-1]
    cosine = denoiser.image_shape[0] == 64
    objective = "objective=iddpm,noise_label=step" if cosine else "objective=dit"
    return Published(
        objective=objective if learned else f"{objective},wrappers=none",
        solver="ddpm_learned" if learned else "ddpm_large",
        grid="linspace",
        num_steps=250,
        guidance_scale=1.0,
        condition_dropout=0.0,
    )


def _without_variance(state: Mapping[str, Any], denoiser: Denoiser) -> Mapping[str, Any]:
    """Tensors of a network with twice the channels, without the second half of them."""
    channels, names = denoiser.image_shape[-1], ("out.2.weight", "out.2.bias")
    twice = all(name in state and state[name].shape[0] == 2 * channels for name in names)
    if not twice or denoiser.network.out_channels not in (0, channels):
        return state

    def first(tensor: Any) -> Tensor:
        def read() -> np.ndarray:
            return np.asarray(tensor)[:channels]

        return Tensor((channels, *tensor.shape[1:]), tensor.dtype, read)

    return {**state, **{name: first(state[name]) for name in names}}


FAMILY = Family(
    "ADM",
    adm,
    SIZES,
    _table,
    _recognise_adm,
    lambda denoiser: denoiser.inputs,
    published=_published,
    without_variance=_without_variance,
)
UPSAMPLER = Family(
    "ADM upsampler",
    upsampler,
    UPSAMPLERS,
    _table,
    _recognise_upsampler,
    _inputs_of_upsampler,
    published=_published,
    without_variance=_without_variance,
)
CLASSIFIER = Family(
    "ADM classifier",
    classifier,
    CLASSIFIERS,
    _table,
    lambda shapes: _common(shapes, CLASSIFIERS) | {"num_classes": shapes["out.2.c_proj.bias"][0]},
    lambda denoiser: denoiser.inputs,
)
