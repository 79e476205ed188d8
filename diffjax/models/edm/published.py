"""The layout of the authors' pickles (NVlabs/edm), `ema` of them.

A file names its levels by their heights, and holds the filters of its resampling. One block has its
attention with it. Labels of classes are vectors there, a row of the identity or zeros for the null
label; a row of the table here. The columns of queries, keys and values are interleaved channel by
channel; the network here has the same order (`qkv_order`).

The networks are of EDM's preconditioning with `sigma_data = 0.5` and are evaluated on any path by
its noise level: the target is `F`, the input `x_t` divided by its deviation, and the noise label
`log(σ)/4` (`noise_label=log_sigma`). Networks trained by the authors' other preconditionings are
those of

    VP       path=ddpm, target=noise, noise_label=time of scale 999
    VE       path=ve, target=scaled_score, noise_label=log_half_sigma
    iDDPM    path=cosine_table, target=noise, noise_label=step; twice the channels
"""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from diffjax.errors import UserError
from diffjax.models.edm.network import POSITIONAL, RANDOM, DhariwalUNet, SongUNet
from diffjax.models.edm.sizes import OF_ADM, SIZES
from diffjax.models.layers.resampling import BOX, SMOOTH
from diffjax.models.unet import WITHOUT_NULL_ROW, Resampling, UNet
from diffjax.pretrained.family import Config, Denoiser, Family, Published
from diffjax.pretrained.tables import Row, Table, count, layer, norm, within
from diffjax.pretrained.transforms import constant, conv, dense, squeeze, then

_pixelwise = then(squeeze(2, 3), dense)
"""A dense layer of each pixel, `[out, in, 1, 1]` there."""

_BLOCK = (
    *norm("norm0", "norm_1"),
    *layer("conv0", "conv_1", conv),
    *layer("affine", "modulation"),
    *norm("norm1", "norm_2"),
    *layer("conv1", "conv_2", conv),
    *layer("skip", "skip", _pixelwise),
)
_ATTENTION = (
    *norm("norm2", "norm"),
    *layer("qkv", "attention/qkv", _pixelwise),
    *layer("proj", "attention/out", _pixelwise),
)
_MAPPING = (
    Row("map_noise.freqs", "conditioning/frequencies"),
    Row("map_augment.weight", "conditioning/augmentation/kernel", dense),
    Row("map_label.weight", "conditioning/label/embedding", dense),
    Row("map_label.bias", "conditioning/label_bias"),
    *layer("map_layer0", "conditioning/hidden"),
    *layer("map_layer1", "conditioning/out"),
)


def _table(denoiser: Denoiser, out_norm: str, out_conv: str) -> Table:
    """The rows of a network; its last two layers have other names in the two classes."""
    network, height = denoiser.network, denoiser.image_shape[0]
    rows = [*_MAPPING, *layer(f"enc.{_side(height)}_conv", "conv_in", conv)]
    for theirs, block, attention in _blocks(network, height):
        rows += within(_BLOCK, theirs, block)
        rows += within(_ATTENTION, theirs, attention)
    rows += _images(network, height)
    rows += norm(out_norm.format(side=_side(height)), "final_norm")
    rows += layer(out_conv.format(side=_side(height)), "final_conv", conv)
    taps = np.asarray(network.resampling.taps, np.float32) / sum(network.resampling.taps)
    known = constant(lambda: np.outer(taps, taps)[None, None])
    rows += [Row(f"{name}.resample_filter", (), known) for name in _filters(network, height)]
    return within(rows, "model")


def _side(height: int, level: int = 0) -> str:
    return f"{height >> level}x{height >> level}"


def _blocks(network: UNet, height: int) -> Iterator[tuple[str, str, str]]:
    """The published name of each block, and ours of its residual block and of its attention."""
    levels, blocks = len(network.channel_multipliers), network.num_res_blocks

    def named(theirs: str, ours: str) -> tuple[str, str, str]:
        return theirs, ours, f"{ours}_attention"

    for level in range(levels):
        side = _side(height, level)
        if level:
            yield named(f"enc.{side}_down", f"down_{level - 1}_resample")
        for i in range(blocks):
            yield named(f"enc.{side}_block{i}", f"down_{level}_{i}")
    yield f"dec.{_side(height, levels - 1)}_in0", "middle_0", "middle_attention"
    yield named(f"dec.{_side(height, levels - 1)}_in1", "middle_1")
    for level in range(levels):
        side = _side(height, level)
        if level < levels - 1:
            yield named(f"dec.{side}_up", f"up_{level + 1}_resample")
        for i in range(blocks + 1):
            yield named(f"dec.{side}_block{i}", f"up_{level}_{i}")


def _images(network: UNet, height: int) -> list[Row]:
    """The rows of what images are added by on the way down, and taken by on the way up."""
    rows = []
    name, how = _OF_IMAGES.get(network.images_in, ("", _pixelwise))
    for level in range(1, len(network.channel_multipliers)):
        side = _side(height, level)
        rows += layer(f"enc.{side}_{name}", f"image_{level}", how) if name else []
        rows += norm(f"dec.{side}_aux_norm", f"out_{level}_norm")
        rows += layer(f"dec.{side}_aux_conv", f"out_{level}_conv", conv)
    return rows


_OF_IMAGES = {"skip": ("aux_skip", _pixelwise), "residual": ("aux_residual", conv)}


def _filters(network: UNet, height: int) -> Iterator[str]:
    """The published layers that hold a filter."""
    for level in range(1, len(network.channel_multipliers)):
        for block in (f"enc.{_side(height, level)}_down", f"dec.{_side(height, level - 1)}_up"):
            yield from (f"{block}.conv0", f"{block}.skip")
        if network.images_in == "skip":
            yield f"enc.{_side(height, level)}_aux_down"
        if network.images_in == "residual":
            yield f"enc.{_side(height, level)}_aux_residual"
        if network.images_out:
            yield f"dec.{_side(height, level - 1)}_aux_up"


def _recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The settings that both classes share; names show the sizes of maps."""
    sides = sorted(
        (int(name.split(".")[2].split("x")[0]) for name in shapes if _FIRST.fullmatch(name)),
        reverse=True,
    )
    channels = shapes["model.map_layer0.weight"][0] // 4
    first = [f"model.enc.{side}x{side}_block0" for side in sides]
    label = shapes.get("model.map_label.weight", (0, 0))
    return {
        "image_shape": (sides[0], sides[0], shapes[f"model.enc.{_side(sides[0])}_conv.weight"][1]),
        "num_classes": label[1],
        "channels": channels,
        "channel_multipliers": tuple(
            shapes[f"{name}.conv0.weight"][0] // channels for name in first
        ),
        "num_res_blocks": count(f"{first[0][:-1]}{{i}}.conv0.weight", shapes),
        "attention_resolutions": tuple(
            side for side, name in zip(sides, first, strict=True) if f"{name}.qkv.weight" in shapes
        ),
    }


_FIRST = re.compile(r"model\.enc\.([0-9]+)x\1_block0\.conv0\.weight")


def _recognise_song(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    found = _recognise(shapes)
    _check_last(f"model.dec.{_side(found['image_shape'][0])}_aux_conv.weight", shapes)
    embedding = RANDOM if "model.map_noise.freqs" in shapes else POSITIONAL
    smallest = _side(found["image_shape"][0], 1)
    length = shapes[f"model.enc.{smallest}_down.conv0.resample_filter"][-1]
    ways = [
        way
        for way, (name, _) in _OF_IMAGES.items()
        if f"model.enc.{smallest}_{name}.bias" in shapes
    ]
    augment_dim = shapes.get("model.map_augment.weight", (0, 0))[1]
    return found | {
        "embedding": replace(
            embedding,
            width=shapes["model.map_layer0.weight"][1] // found["channels"],
            augment_dim=augment_dim,
        ),
        "resampling": Resampling({2: BOX, 4: SMOOTH}[length], projected=True),
        "images_in": ways[0] if ways else "none",
        "images_out": f"model.dec.{smallest}_aux_conv.bias" in shapes,
    }


def _recognise_dhariwal(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    augment_dim = shapes.get("model.map_augment.weight", (0, 0))[1]
    _check_last("model.out_conv.weight", shapes)
    return _recognise(shapes) | {"embedding": replace(WITHOUT_NULL_ROW, augment_dim=augment_dim)}


def _check_last(name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses tensors without the last layer of a class."""
    if name not in shapes:
        raise KeyError(name)


def song_unet(
    image_shape: tuple[int, int, int] = (32, 32, 3), num_classes: int = 10, **settings: Any
) -> Denoiser:
    """A `SongUNet` with the authors' settings for CIFAR-10."""
    return Denoiser(SongUNet(num_classes, **settings), image_shape)


def dhariwal_unet(
    image_shape: tuple[int, int, int] = (64, 64, 3), num_classes: int = 1000, **settings: Any
) -> Denoiser:
    """A `DhariwalUNet` with the authors' settings for ImageNet."""
    return Denoiser(DhariwalUNet(num_classes, **settings), image_shape)


def _settings(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that names and shapes do not show, from the arguments in a pickle."""
    return {"dropout": float(entries.get("dropout", 0.1))}


def _entries(denoiser: Denoiser) -> dict[str, Any]:
    del denoiser
    raise UserError("a pickle of EDM holds its authors' code: its tensors alone can be written")


_CONFIG = Config("EDMPrecond", {"sigma_data": 0.5}, _settings, _entries, where="the pickle")
"""Other classes are of the preconditionings VP, VE and iDDPM: their networks predict otherwise."""


def _published(denoiser: Denoiser) -> Published:
    """Heun's steps without noise: 35 evaluations of CIFAR-10, 79 of 64 pixels (table 2)."""
    return Published(
        objective="objective=edm,noise_label=log_sigma",
        solver="edm_heun",
        grid="karras",
        num_steps=18 if denoiser.image_shape[0] <= 32 else 40,
        guidance_scale=1.0,
        condition_dropout=0.0,
    )


_UNUSED = ("u",)
"""The table of noise levels of a network with the preconditioning of improved DDPM."""

FAMILY = Family(
    "EDM",
    song_unet,
    SIZES,
    functools.partial(_table, out_norm="dec.{side}_aux_norm", out_conv="dec.{side}_aux_conv"),
    _recognise_song,
    lambda denoiser: denoiser.inputs,
    unused=_UNUSED,
    config=_CONFIG,
    published=_published,
)
DHARIWAL = Family(
    "EDM of ADM",
    dhariwal_unet,
    OF_ADM,
    functools.partial(_table, out_norm="out_norm", out_conv="out_conv"),
    _recognise_dhariwal,
    lambda denoiser: denoiser.inputs,
    unused=_UNUSED,
    config=_CONFIG,
    published=_published,
)
